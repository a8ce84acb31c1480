# shellcheck shell=bash
# Creates or updates the virtual environment that a script of this project runs in. To be sourced.
#
#   . "$(dirname "${BASH_SOURCE[0]}")/_environment.sh"
#   setup_environment VENV_DIR [EXTRAS] [extras-only]
#
# VENV_DIR  folder of the environment; a relative path is relative to the repository's root, so that every script works
#           from any folder
# EXTRAS    extras of pyproject.toml to install beside the package, comma separated ("dev"); none by default
# extras-only  installs the package and one extra, without the package's own requirements (PyTorch, nnU-Net)
#
# Afterwards VENV_PYTHON is the environment's interpreter, its commands (nnUNetv2_train, nnunet-conres, ...) come first
# in PATH, and REPOSITORY_ROOT is the root of the checkout. The package is installed in editable mode: scripts run the
# current code of the checkout, and a changed source file needs no new installation. The package is installed again only
# if something that affects it changed: pyproject.toml, the start-up files, the version, the interpreter or the extras.
#
# Returns 1, with the reason on stderr, if there is no suitable Python or the installation failed. It can be interrupted
# at any point and run again: an incomplete environment is rebuilt.
#
# PYTHON=/path/to/python chooses the interpreter. pip is configured as always (pip.conf, PIP_* variables), for example
# to take PyTorch from another index.

REPOSITORY_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)" || return 1
export REPOSITORY_ROOT

# Prints the head comment of the script and exits, if the first argument is -h or --help.
help_if_asked() {
    case "$1" in
        -h | --help)
            sed -n '2,/^set /s/^# \{0,1\}//p' "$0"
            exit 0
            ;;
    esac
}

_environment_error() {
    printf 'error: %s\n' "$1" >&2
    shift
    [ "$#" -eq 0 ] || printf '       %s\n' "$@" >&2
}

# Fails if the interpreter is too old or cannot make a virtual environment. Runs it, since a version manager's shim can
# also exist for a version that is not installed.
_is_suitable_python() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1 &&
        "$1" -c 'import ensurepip, venv' >/dev/null 2>&1
}

# Prints the interpreter to build the environment with.
_find_python() {
    local candidate
    if [ -n "${PYTHON:-}" ]; then
        if _is_suitable_python "$PYTHON"; then
            printf '%s\n' "$PYTHON"
            return 0
        fi
        _environment_error "PYTHON=$PYTHON is not a Python >= 3.10 with the modules venv and ensurepip." \
            "Set PYTHON to another interpreter, or unset it to have one searched for."
        return 1
    fi
    for candidate in python3 python3.13 python3.12 python3.11 python3.10 python; do
        if command -v "$candidate" >/dev/null 2>&1 && _is_suitable_python "$candidate"; then
            printf '%s\n' "$candidate"
            return 0
        fi
    done
    _environment_error "found no Python >= 3.10 that can create a virtual environment (modules venv and ensurepip)." \
        "Install one (on Debian and Ubuntu: apt-get install python3 python3-venv), or set PYTHON=/path/to/python."
    return 1
}

# Prints the stamp that shows whether an existing environment still fits: its location, and a hash of what affects it.
_environment_stamp() {
    "$1" - "$REPOSITORY_ROOT" "$2" "$3" <<'PYTHON_CODE'
import hashlib
import os
import sys

root, venv, extras = sys.argv[1:]
digest = hashlib.sha256(f"{extras}\n{sys.version}\n".encode())
at_the_top = os.path.join("nnunet_conres", "registration", "site_packages")
startup_files = [os.path.join(at_the_top, name) for name in sorted(os.listdir(os.path.join(root, at_the_top)))]
for name in ("pyproject.toml", os.path.join("nnunet_conres", "__init__.py"), *startup_files):
    path = os.path.join(root, name)
    if not os.path.isfile(path):
        continue
    with open(path, "rb") as file:
        digest.update(file.read())
print(f"{os.path.realpath(sys.executable)} {root} {venv}")
print(digest.hexdigest())
PYTHON_CODE
}

setup_environment() {
    local venv="$1" extras="${2:-}" only="${3:-}" base_python requirement stamp place incomplete stamp_file
    case "$venv" in
        /* | ?:[/\\]*) ;;
        *) venv="$REPOSITORY_ROOT/$venv" ;;
    esac
    base_python="$(_find_python)" || return 1
    if ! stamp="$(_environment_stamp "$base_python" "$venv" "$extras")"; then
        _environment_error "$REPOSITORY_ROOT is not a complete checkout (see above)."
        return 1
    fi
    stamp_file="$venv/nnunet-conres-environment"
    # Beside the environment, because rebuilding deletes everything in it.
    incomplete="$venv.incomplete"

    if [ ! -e "$incomplete" ] && [ -e "$stamp_file" ] && [ "$(cat "$stamp_file")" = "$stamp" ]; then
        _enter_environment "$venv" && return 0
    fi

    place="$(printf '%s\n' "$stamp" | head -n 1)"
    if [ -e "$incomplete" ] || [ ! -e "$stamp_file" ] || [ "$(head -n 1 "$stamp_file")" != "$place" ] ||
        ! _enter_environment "$venv"; then
        # Only environments that this function made are ever deleted.
        if [ ! -e "$incomplete" ] && [ ! -e "$stamp_file" ] && [ -n "$(ls -A "$venv" 2>/dev/null)" ]; then
            _environment_error "$venv exists, but was not made by this script; move it away or remove it."
            return 1
        fi
        : >"$incomplete" || return 1
        printf 'Creating the environment %s ...\n' "$venv" >&2
        if ! "$base_python" -m venv --clear "$venv"; then
            _environment_error "could not create a virtual environment in $venv (see above)."
            return 1
        fi
        _enter_environment "$venv" || return 1
    fi

    : >"$incomplete" || return 1
    requirement="$REPOSITORY_ROOT"
    [ -z "$extras" ] || requirement="$REPOSITORY_ROOT[$extras]"
    if [ "$only" = extras-only ]; then
        printf 'Installing the tools ...\n' >&2
    else
        printf 'Installing nnunet-conres and what it needs (PyTorch is large: this can take some minutes) ...\n' >&2
    fi
    if ! _install "$requirement" "$extras" "$only"; then
        _environment_error "the installation into $venv failed (see above)."
        return 1
    fi
    printf '%s\n' "$stamp" >"$stamp_file" && rm -f "$incomplete"
}

_install() {
    local pip=("$VENV_PYTHON" -m pip --disable-pip-version-check install --quiet --no-input) needed
    if [ "$3" != extras-only ]; then
        "${pip[@]}" --editable "$1"
        return
    fi
    "${pip[@]}" --no-deps --editable "$REPOSITORY_ROOT" || return 1
    needed="$("$VENV_PYTHON" - "$2" <<'PYTHON_CODE'
import re
import sys
from importlib.metadata import requires

for requirement in requires("nnunet-conres"):
    needed, _, marker = requirement.partition(";")
    if re.search(rf"extra == ['\"]{sys.argv[1]}['\"]", marker):
        print(needed.strip())
PYTHON_CODE
)" || return 1
    # shellcheck disable=SC2086
    "${pip[@]}" $needed
}

# Sets the variables that make a process use the environment. Fails if there is no working interpreter in it.
_enter_environment() {
    local bin="$1/bin"
    # Git Bash on Windows
    [ -d "$1/Scripts" ] && bin="$1/Scripts"
    "$bin/python" -c '' >/dev/null 2>&1 || return 1
    VENV_PYTHON="$bin/python"
    VIRTUAL_ENV="$1"
    case ":$PATH:" in
        ":$bin:"*) ;;
        *) PATH="$bin:$PATH" ;;
    esac
    export VENV_PYTHON VIRTUAL_ENV PATH
    # Either variable would make the environment's interpreter import packages of another one.
    unset PYTHONHOME PYTHONPATH
}
