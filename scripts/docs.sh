#!/usr/bin/env bash
# Builds the documentation into site/ (open site/index.html), in a separate environment. Every broken link is an error.
#
#   scripts/docs.sh [--serve] [mkdocs arguments]
#
# --serve   shows the site at http://127.0.0.1:8000 and rebuilds it after every change
#
# The environment is .venv-docs in the repository's root: MkDocs, without PyTorch and nnU-Net (see _environment.sh).
set -euo pipefail

. "$(dirname "${BASH_SOURCE[0]}")/_environment.sh"
help_if_asked "${1:-}"

command=build
if [ "${1:-}" = "--serve" ]; then
    command=serve
    shift
fi

setup_environment .venv-docs docs extras-only
cd "$REPOSITORY_ROOT"
# Without it, Material for MkDocs announces its successor at every start.
export NO_MKDOCS_2_WARNING=1
exec "$VENV_PYTHON" -m mkdocs "$command" --strict "$@"
