#!/usr/bin/env bash
# Checks the whole project in a separate environment: formatting and lint (ruff), types (mypy), tests (pytest).
#
#   scripts/test.sh [--all] [pytest arguments]
#
# --all   also the tests marked slow, which train for some minutes
#
# With pytest arguments, for example a file or -k NAME, only pytest runs. One test process per core, with one thread
# each; -n 0 as a pytest argument runs all tests in one process. The environment is .venv-test in the repository's root;
# the first run creates it (_environment.sh describes the options). Tests that open a report in Chromium are skipped
# without it; on Debian, the script installs it first if run as root.
set -euo pipefail

. "$(dirname "${BASH_SOURCE[0]}")/_environment.sh"
help_if_asked "${1:-}"

run_all=false
if [ "${1:-}" = "--all" ]; then
    run_all=true
    shift
fi

setup_environment .venv-test dev
cd "$REPOSITORY_ROOT"

# Some tests open a report in a browser. They are skipped with a message if there is none and none can be installed.
if ! command -v chromium >/dev/null 2>&1 && ! command -v chromium-browser >/dev/null 2>&1 &&
    ! command -v google-chrome >/dev/null 2>&1 &&
    [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null 2>&1; then
    printf 'Installing Chromium for the tests of the report ...\n' >&2
    (
        export DEBIAN_FRONTEND=noninteractive
        install=(apt-get install --quiet --yes --no-install-recommends chromium)
        "${install[@]}" || { apt-get update --quiet && "${install[@]}"; }
    ) >/dev/null 2>&1 || printf 'It could not be installed: the tests that need it are skipped.\n' >&2
fi

# With one test process per core, one thread each and few worker processes use the cores best.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" MKL_NUM_THREADS="${MKL_NUM_THREADS:-1}"
export nnUNet_n_proc_DA="${nnUNet_n_proc_DA:-1}" nnUNet_def_n_proc="${nnUNet_def_n_proc:-1}"
# A server has no display.
export MPLBACKEND=Agg

if [ "$#" -eq 0 ]; then
    "$VENV_PYTHON" -m ruff check .
    "$VENV_PYTHON" -m ruff format --check .
    "$VENV_PYTHON" -m mypy
fi
if "$run_all"; then
    set -- -m "" "$@"
fi
# Each process starts with a contiguous part of the tests, so that fixtures of a file are set up once; idle processes
# take over tests from others.
"$VENV_PYTHON" -m pytest -n logical --maxprocesses 8 --dist worksteal "$@"
