"""Last stage of a comparison: the files that people and programs read."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nnunet_conres.files import write_json, written_whole


def write_comparison(folder: Path, content: Mapping[str, Any], page: str) -> tuple[Path, Path, Path]:
    """Write report.html, report.json, cases.csv, and calibration.csv and reliability.csv of models with probabilities.

    Args:
        folder: Where they go.
        content: What report.json holds.
        page: What report.html holds.

    Returns:
        The first three files.
    """
    report, json, cases = folder / "report.html", folder / "report.json", folder / "cases.csv"
    _write_csv(cases, content)
    _write_calibration(folder, content)
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


def _write_calibration(folder: Path, content: Mapping[str, Any]) -> None:
    """Write calibration.csv and reliability.csv, or remove those of before where no model has probabilities."""
    errors, curves = folder / "calibration.csv", folder / "reliability.csv"
    calibration = content.get("calibration") or {}
    if not calibration.get("pooled"):
        for path in (errors, curves):
            path.unlink(missing_ok=True)
        return
    metrics = [metric["key"] for metric in calibration["metrics"]]
    names = {model["key"]: model["name"] for model in content["models"]}
    folds = {case["id"]: "" if case["fold"] is None else case["fold"] for case in content["cases"]}
    with written_whole(errors) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["case", "fold", "model", "region", *metrics])
        for key, cases in calibration["cases"].items():
            for case, regions in cases.items():
                for region, values in regions.items():
                    cells = ["" if values[metric] is None else values[metric] for metric in metrics]
                    writer.writerow([case, folds[case], names[key], region, *cells])
    with written_whole(curves) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["model", "region", "metric", "bin_low", "bin_high", "voxels", "probability", "frequency"])
        bins = calibration["bins"]
        for key, regions in calibration["pooled"].items():
            for region, of_metric in regions.items():
                for metric, curve in of_metric.items():
                    for place in range(bins):
                        cells = [curve[name][place] for name in ("voxels", "probability", "frequency")]
                        ends = [round(end / bins, 6) for end in (place, place + 1)]
                        row = ["" if cell is None else cell for cell in cells]
                        writer.writerow([names[key], region, metric, *ends, *row])
