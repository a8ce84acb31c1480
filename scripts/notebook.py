"""Write docs/tutorial.ipynb from docs/tutorial.md, for a GPU on Colab: python scripts/notebook.py"""

from __future__ import annotations

import json
import re
from pathlib import Path

DOCS = Path(__file__).resolve().parent.parent / "docs"


def notebook(markdown: str) -> str:
    """Convert a page to a notebook: prose becomes text, shell commands become cells, printed output is left out."""
    cells = []
    for part in re.split(r"^(```\w+\n.*?^```\n)", markdown, flags=re.DOTALL | re.MULTILINE):
        block = re.fullmatch(r"```(\w+)\n(.*?)```\n", part, re.DOTALL)
        if block is None:
            # Relative links and pictures would not work outside docs.
            text = re.sub(r"^!\[.*?\]\(.*?\)\n", "", part, flags=re.MULTILINE | re.DOTALL)
            text = re.sub(r"\[([^\]]*)\]\((?!http)[^)]*\)", r"\1", text).strip()
            if text:
                cells.append(_cell("markdown", text))
        elif block[1] == "bash":
            cells.append(_cell("code", _commands(block[2].strip())))
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"
    metadata = {
        "accelerator": "GPU",
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    }
    document = {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(document, indent=1, ensure_ascii=False) + "\n"


def _commands(block: str) -> str:
    if block.startswith("pip install"):
        return "\n".join(
            [
                "# A wheel that you uploaded (python -m build --wheel in a checkout), or the release on PyPI.",
                "from pathlib import Path",
                "",
                'package = next((str(path) for path in Path().glob("nnunet_conres-*.whl")), "nnunet-conres")',
                "%pip install {package}",
            ]
        )
    if block.startswith("export"):
        # Shell variables do not outlive their cell.
        lines = ["import os", ""]
        for name, value in re.findall(r"^export (\w+)=(\S+)", block, re.MULTILINE):
            value = "cuda" if name == "DEVICE" else value
            path = value.removeprefix("$PWD/")
            lines.append(f'os.environ["{name}"] = ' + (f'"{value}"' if path == value else f'os.path.abspath("{path}")'))
        return "\n".join(lines)
    return f"%%bash\n{block}"


def _cell(kind: str, text: str) -> dict[str, object]:
    cell: dict[str, object] = {"cell_type": kind, "metadata": {}, "source": text.splitlines(keepends=True)}
    return cell | ({"execution_count": None, "outputs": []} if kind == "code" else {})


def main() -> None:
    text = notebook((DOCS / "tutorial.md").read_text(encoding="utf-8"))
    (DOCS / "tutorial.ipynb").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
