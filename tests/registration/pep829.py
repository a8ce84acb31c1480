"""Process the start-up files of a site-packages folder like Python 3.15, following the text of PEP 829.

For Python versions that do not read `.start` files: `addsitedir` replaces `site.addsitedir`.
"""

import os
import pkgutil
import re
import sys
import traceback


def addsitedir(sitedir: str) -> None:
    names = sorted(name for name in os.listdir(sitedir) if not name.startswith("."))
    sys.path.append(os.path.abspath(sitedir))

    # all path extensions come before all lines of code
    imports = {}
    for name in (name for name in names if name.endswith(".pth")):
        lines = _lines(os.path.join(sitedir, name))
        imports[name] = [line for line in lines if line.startswith(("import ", "import\t"))]
        for folder in (os.path.abspath(os.path.join(sitedir, line)) for line in lines if line not in imports[name]):
            if folder not in sys.path and os.path.exists(folder):
                sys.path.append(folder)

    for name, lines in imports.items():
        if f"{name.removesuffix('.pth')}.start" not in names:
            for line in lines:
                _attempt(exec, line)

    for name in (name for name in names if name.endswith(".start")):
        for entry in _lines(os.path.join(sitedir, name)):
            _attempt(_call, entry)


def _lines(path: str) -> list[str]:
    with open(path, encoding="utf-8-sig") as file:
        lines = [line.strip() for line in file.read().splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def _call(entry: str) -> None:
    if not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*", entry):
        raise ValueError(f"{entry} is not package.module:callable")
    pkgutil.resolve_name(entry)()


def _attempt(function, argument: str) -> None:
    """Call the function. Print an error and continue."""
    try:
        function(argument)
    except Exception:
        traceback.print_exc()
