"""MkDocs hooks of the documentation site: navigation from the folders of docs, and generated pages.

The command-line reference is generated from the argparse parser; the changelog and the contributing guide are generated
from the files in the repository's root. Needs neither PyTorch nor nnU-Net.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

ROOT = Path(__file__).resolve().parent.parent
COMMAND_LINE = "reference/command_line.md"
FROM_ROOT = {"changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md"}

# Title of each section and its pages in order. Pages of the folder that are not listed follow, by name.
SECTIONS: dict[str, tuple[str, tuple[str, ...]]] = {
    "How-to": (
        "how-to",
        (
            "brats",
            "compare",
            "planning",
            "train-faster",
            "postprocess",
            "uncertainty",
            "submit-to-brats",
            "sparse_annotation",
            "residuals",
            "cluster",
            "authors_weights",
            "family",
        ),
    ),
    "Explanation": (
        "explanation",
        ("conresnet", "vnet_unet3d", "muon", "augmentation", "overlap_tile", "discovery"),
    ),
    "Reference": (
        "reference",
        ("trainers", "command_line", "environment", "files", "images", "metrics", "challenge-rules", "api"),
    ),
}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Build the navigation from the pages in docs."""
    docs = Path(config.docs_dir)
    navigation: list[object] = [{"Home": "index.md"}, {"Tutorial": "tutorial.md"}]
    for title, (folder, order) in SECTIONS.items():
        there = {path.stem for path in (docs / folder).glob("*.md")}
        if folder == "reference":
            there.add(Path(COMMAND_LINE).stem)
        pages = [name for name in order if name in there] + sorted(there - set(order))
        navigation.append({title: [f"{folder}/{name}.md" for name in pages]})
    navigation += [
        {"Results": "results.md"},
        {"Longer trainings": "results_longer.md"},
        {"Benchmarks": "benchmarks.md"},
    ]
    config.nav = [*navigation, {"Changes": "changelog.md"}, {"Contributing": "contributing.md"}]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    from mkdocs.structure.files import File

    pages = {COMMAND_LINE: command_line_reference()}
    for name, source in FROM_ROOT.items():
        pages[name] = as_page((ROOT / source).read_text(encoding="utf-8"))
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def as_page(text: str) -> str:
    """Return a file of the repository's root as a page of docs, with links relative to docs."""
    in_docs = {source: name for name, source in FROM_ROOT.items()}

    def moved(link: re.Match[str]) -> str:
        target = link[1].removeprefix("docs/")
        return f"]({in_docs.get(target, target)}"

    return re.sub(r"\]\(([^)#]+)", moved, text)


def command_line_reference() -> str:
    """Return every subcommand with its --help text, as Markdown."""
    sys.path.insert(0, str(ROOT))
    from nnunet_conres.cli import build_parser

    # argparse wraps at the width of the terminal
    os.environ["COLUMNS"] = "84"
    os.environ["NO_COLOR"] = "1"
    parser = build_parser()
    parts = [
        "# Command line",
        "Generated from the parser. To train and predict, use nnU-Net's commands with a trainer of this package after "
        "`-tr`.",
        _help(parser),
    ]
    for subparser in command_parsers(parser):
        parts += [f"## {subparser.prog.partition(' ')[2]}", _help(subparser)]
    return "\n\n".join(parts) + "\n"


def command_parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """Yield the parsers of all subcommands, nested ones included."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for subparser in action.choices.values():
                yield subparser
                yield from command_parsers(subparser)


def _help(parser: argparse.ArgumentParser) -> str:
    return f"```text\n{parser.format_help().rstrip()}\n```"
