"""What came out of the study's stages, kept beside the list of runs, and as tables in docs/results.md."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runs import runs_of

from nnunet_conres.text import markdown_table

_METRICS = ("dice", "hd95")


def save_results(study: Mapping[str, Any], stage: str, report: Mapping[str, Any], file: Path) -> None:
    """Keeps what the tables need of a report of `nnunet-conres compare`.

    Args:
        study: Content of runs.yaml.
        stage: The stage.
        report: Content of report.json.
        file: Where to.
    """
    region = "mean" if "mean" in next(iter(report["summary"].values())) else report["regions"][0]
    keys = {model["name"]: model for model in report["models"]}
    rows = []
    for run in runs_of(dict(study), stage):
        model = keys[run.name]
        row: dict[str, Any] = {"network": run.network, "iterations": run.iterations, "seed": run.seed}
        row["parameters"] = model["cost"]["parameters"]
        for metric in _METRICS:
            row[metric] = {key: report["summary"][model["key"]][region][metric][key] for key in ("mean", "low", "high")}
            for comparison in report["comparisons"]:
                if (comparison["model"], comparison["region"], comparison["metric"]) == (model["key"], region, metric):
                    row[f"{metric}_difference"] = {
                        key: comparison[key]
                        for key in ("mean_difference", "low", "high", "p", "p_holm", "wins", "losses")
                    }
        row["cases"] = {
            case["id"]: [case["scores"][model["key"]][region][metric] for metric in _METRICS]
            for case in report["cases"]
        }
        rows.append(row)
    file.parent.mkdir(exist_ok=True)
    content = {"stage": stage, "folds": report["dataset"]["folds"], "cases": len(report["cases"]), "rows": rows}
    file.write_text(_json(content) + "\n")


def _json(content: Any) -> str:
    """JSON with a case to a line rather than a number to a line."""
    text = json.dumps(content, indent=1)
    return re.sub(r"\[\s+([-\d.e]+|null),\s+([-\d.e]+|null)\s+\]", r"[\1, \2]", text)


def write_tables(study: Mapping[str, Any], results: Path, document: Path) -> None:
    """Puts the tables between their marks in the document.

    Raises:
        RuntimeError: If the document has no marks for a stage that has results.
    """
    text = document.read_text()
    steps_file = results / "steps.json"
    steps = json.loads(steps_file.read_text()) if steps_file.is_file() else {}
    for stage in study["stages"]:
        file = results / f"{stage}.json"
        if not file.is_file():
            continue
        begin, end = f"<!-- study: {stage} -->", "<!-- end -->"
        if begin not in text:
            raise RuntimeError(f"{document} has no line {begin}, behind which the table of that stage would stand.")
        head, rest = text.split(begin, 1)
        tail = rest.split(end, 1)[1]
        text = f"{head}{begin}\n{_table(json.loads(file.read_text()), steps)}\n{end}{tail}"
    document.write_text(text)


def _table(content: Mapping[str, Any], steps: Mapping[str, Any]) -> str:
    several = [len({row[key] for row in content["rows"]}) > 1 for key in ("iterations", "seed")]
    header = ["network", *(["iterations"] if several[0] else []), *(["seed"] if several[1] else [])]
    header += ["Dice, %", "against the first, points", "p (Holm)", "better in", "HD95, mm", "p (Holm)", "step"]
    table = []
    for row in content["rows"]:
        cells = [f"`{row['network']}`", *([str(row["iterations"])] if several[0] else [])]
        cells += [str(row["seed"])] if several[1] else []
        cells.append(f"{100 * row['dice']['mean']:.2f}")
        difference = row.get("dice_difference")
        if difference is None:
            cells += ["", "", ""]
        else:
            low, high = 100 * difference["low"], 100 * difference["high"]
            cells.append(f"{100 * difference['mean_difference']:+.2f} ({low:+.2f} to {high:+.2f})")
            cells += [_p(difference["p_holm"]), f"{difference['wins']} of {content['cases']}"]
        cells.append(f"{row['hd95']['mean']:.2f}")
        cells.append(_p(row["hd95_difference"]["p_holm"]) if "hd95_difference" in row else "")
        step = steps.get(row["network"])
        cells.append("" if step is None else f"{step['ratio']:.2f}")
        table.append(cells)
    return markdown_table(header, table)


def _p(value: float | None) -> str:
    if value is None:
        return ""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"
