"""Last stage of a comparison: the files that people and programs read."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nnunet_conres.files import write_json, written_whole


def write_comparison(folder: Path, content: Mapping[str, Any], page: str) -> tuple[Path, Path, Path]:
    """Write report.html, report.json and cases.csv.

    Args:
        folder: Where they go.
        content: What report.json holds.
        page: What report.html holds.

    Returns:
        The three files.
    """
    report, json, cases = folder / "report.html", folder / "report.json", folder / "cases.csv"
    _write_csv(cases, content)
    with written_whole(report) as partial:
        partial.write_text(page, encoding="utf-8", newline="\n")
    write_json(json, content, indent=None)
    return report, json, cases


def _write_csv(path: Path, content: Mapping[str, Any]) -> None:
    """A row per case, model and region; an empty cell where there is no value."""
    metrics = [metric["key"] for metric in content["metrics"]]
    names = {model["key"]: model["name"] for model in content["models"]}
    with written_whole(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["case", "fold", "model", "region", *metrics])
        for case in content["cases"]:
            for key, regions in case["scores"].items():
                for region, values in regions.items():
                    cells = ["" if values[metric] is None else values[metric] for metric in metrics]
                    fold = "" if case["fold"] is None else case["fold"]
                    writer.writerow([case["id"], fold, names[key], region, *cells])
