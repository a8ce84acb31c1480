"""Tables and figures of the runs of study.py: one of each for every question of questions.yaml, and all numbers as CSV.

    python scripts/study/tables.py WORK... --output TABLES

Writes runs.csv (a row for every run, failed ones too), pairs.csv, study.md and a figure for every question. A
difference is averaged over the seeds of a case and the cases of a patient; intervals (95 %, BCa bootstrap) and
Wilcoxon's p are over patients. Holm's correction is over the mean Dice of all pairs on all data sets.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from nnunet_conres.evaluation.statistics import holm, mean_intervals, wilcoxon
from nnunet_conres.text import markdown_table

QUESTIONS = Path(__file__).resolve().parent / "questions.yaml"
METRICS = {"dice": 100, "dice_ends": 100, "dice_middle": 100, "hd95": 1}
"""Metrics, and the factor to the unit of the tables: points of Dice, and mm."""
DRAWS = 10000

Scores = Mapping[tuple[str, str], Sequence[Mapping[str, Any]]]
"""The runs of a model, a seed each, by data set and model."""


def read(works: Sequence[Path]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """The scores of all runs, in order of their seeds."""
    found = defaultdict(list)
    for work in works:
        for file in sorted((work / "scores").glob("*.json")):
            run = json.loads(file.read_text())
            found[run["data"], run["run"]["model"]].append(run)
    return dict(found)


def run_rows(scores: Scores) -> list[dict[str, Any]]:
    """A row for every run: what it was, and the mean over its validation cases."""
    rows = []
    for (data, model), runs in scores.items():
        for run in runs:
            study, cases = run["run"]["study"], run["cases"]
            row = {"data": data, "model": model, "trainer": run["run"]["trainer"], "plans": run["run"]["plans"]}
            row |= {"configuration": run["run"]["configuration"], "annotation": run["run"]["data"]}
            row |= {"fold": run["run"]["fold"], **{key: study[key] for key in ("seed", "iterations", "width")}}
            row |= {"status": "failed" if run.get("failed") else "done", "cases": len(cases)}
            row |= {"parameters": run.get("parameters"), "step_seconds": run.get("step_seconds")}
            for metric in METRICS:
                values = [case["mean"][metric] for case in cases.values() if case["mean"][metric] is not None]
                row[metric] = float(np.mean(values)) if values else None
            rows.append(row)
    return rows


def differences(
    model: Sequence[Mapping[str, Any]], against: Sequence[Mapping[str, Any]], region: str, metric: str
) -> np.ndarray:
    """Differences of a model from another, one per patient.

    Args:
        model: The runs of a model, a seed each.
        against: Those of the other. Seeds that only one of them has are left out.
        region: A class, or "mean".
        metric: One of `METRICS`.

    Returns:
        Differences, averaged over seeds, then over the cases of a patient; those without a value are left out.
    """
    others = {run["run"]["study"]["seed"]: run for run in against}
    of_case = defaultdict(list)
    for run in model:
        other = others.get(run["run"]["study"]["seed"], {"cases": {}})
        for case, values in run["cases"].items():
            pair = (values[region][metric], other["cases"].get(case, {region: {metric: None}})[region][metric])
            if None not in pair:
                of_case[case].append(pair[0] - pair[1])
    group = model[0].get("group") if model else None
    of_patient = defaultdict(list)
    for case, values in of_case.items():
        found = re.search(group, case) if group else None
        of_patient[found[0] if found else case].append(np.mean(values))
    return np.array([np.mean(of_patient[patient]) for patient in sorted(of_patient)])


def pair_rows(scores: Scores, questions: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for every pair, data set, class and metric."""
    rows = []
    for question, entries in questions.items():
        for data in dict.fromkeys(data for data, _ in scores):
            for model, against in entries.get("pairs", []):
                runs, others = scores.get((data, model)), scores.get((data, against))
                if runs is None or others is None:
                    continue
                lengths = [of[0]["run"]["study"]["iterations"] for of in (runs, others)]
                regions = next((list(case) for run in runs for case in run["cases"].values()), ["mean"])
                for region in ["mean", *(region for region in regions if region != "mean")]:
                    for metric, unit in METRICS.items():
                        row = {"question": question, "data": data, "model": model, "against": against}
                        row |= dict(zip(("iterations", "against_iterations"), lengths, strict=True))
                        row |= {"region": region, "metric": metric}
                        rows.append(row | _tested(unit * differences(runs, others, region, metric), metric))
    primary = [row for row in rows if row["region"] == "mean" and row["metric"] == "dice"]
    # A pair of two questions is one test.
    tests = {_pair(row): row["p"] for row in primary}
    corrected = dict(zip(tests, holm(list(tests.values())), strict=True))
    for row in rows:
        row["p_holm"] = None
    for row in primary:
        row["p_holm"] = corrected[_pair(row)]
    return rows


def _tested(values: np.ndarray, metric: str) -> dict[str, Any]:
    better = values < 0 if metric == "hd95" else values > 0
    row = {"patients": len(values), "difference": None, "low": None, "high": None, "p": np.nan}
    if len(values) > 1:
        (interval,) = mean_intervals([values], samples=DRAWS)
        row |= {"difference": values.mean(), "low": interval.low, "high": interval.high, "p": wilcoxon(values)}
    return row | {"better": int(better.sum()), "worse": int(len(values) - better.sum() - (values == 0).sum())}


def picked_row(picked: Sequence[Mapping[str, Any]], folds: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Mean Dice on picked cases, and what as many random cases of a fold would have given.

    Args:
        picked: Runs that held the picked cases out.
        folds: Runs that were validated on a fold.

    Returns:
        Dice of both, the number of picked cases, and the central 95 % of the means of random draws, in %.
    """

    def dice(runs: Sequence[Mapping[str, Any]]) -> np.ndarray:
        of_case = defaultdict(list)
        for run in runs:
            for case, values in run["cases"].items():
                if values["mean"]["dice"] is not None:
                    of_case[case].append(values["mean"]["dice"])
        return 100 * np.array([np.mean(values) for values in of_case.values()])

    chosen, all_cases = dice(picked), dice(folds)
    if not len(chosen) or len(all_cases) < len(chosen):
        return {"cases": len(chosen), "picked": np.nan, "fold": np.nan, "low": np.nan, "high": np.nan}
    rng = np.random.default_rng(0)
    means = [rng.choice(all_cases, len(chosen), replace=False).mean() for _ in range(DRAWS)]
    low, high = np.percentile(means, [2.5, 97.5])
    return {"cases": len(chosen), "picked": chosen.mean(), "fold": all_cases.mean(), "low": low, "high": high}


def _points(row: Mapping[str, Any], digits: int = 2) -> str:
    if row["difference"] is None:
        return "none"
    return f"{row['difference']:+.{digits}f} ({row['low']:+.{digits}f} to {row['high']:+.{digits}f})"


def _p(value: float | None) -> str:
    if value is None or np.isnan(value):
        return ""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def pairs_table(rows: Sequence[Mapping[str, Any]], structures: bool) -> str:
    """Return the rows of a question in Markdown.

    Args:
        rows: From `pair_rows`.
        structures: Whether to also show each class, the ends of the structures and their middle.
    """
    by = {(*_pair(row), row["region"], row["metric"]): row for row in rows}
    regions = defaultdict(set)
    for row in rows:
        regions[row["data"]].add(row["region"])
    lengths_differ = any(row["iterations"] != row["against_iterations"] for row in rows)
    lines = []
    for row in rows:
        by_class = structures and len(regions[row["data"]]) > 2  # the mean of one class is that class
        if row["metric"] != "dice" or (row["region"] != "mean" and not by_class):
            continue
        line = {"data": row["data"] if row["region"] == "mean" else f"..., {row['region']}"}
        line |= {"model": f"`{row['model']}`", "against": f"`{row['against']}`"}
        line |= {"iterations": f"{row['iterations']} / {row['against_iterations']}"} if lengths_differ else {}
        line |= {"points of Dice": _points(row), "p (Holm)": _p(row["p_holm"])}
        line |= {"better in": f"{row['better']} of {row['patients']}"}
        if structures:
            parts = (by[(*_pair(row), row["region"], metric)] for metric in ("dice_ends", "dice_middle"))
            line |= dict(zip(("at the ends", "in the middle"), map(_points, parts), strict=True))
        lines.append(line)
    return markdown_table(list(lines[0]), [list(line.values()) for line in lines]) if lines else ""


def _pair(row: Mapping[str, Any]) -> tuple[str, str, str]:
    return row["data"], row["model"], row["against"]


def draw(rows: Sequence[Mapping[str, Any]], title: str, file: Path) -> None:
    """Differences of the mean Dice with their intervals."""
    from matplotlib.figure import Figure

    rows = [row for row in rows if row["region"] == "mean" and row["difference"] is not None]
    chosen = [row for row in rows if row["metric"] == "dice"]
    order = [_pair(row) for row in chosen]
    figure = Figure((7, 1.5 + 0.3 * len(chosen)), layout="constrained")
    axes = figure.subplots()
    for name, marker, shift in (("dice", "o", 0), ("dice_ends", "<", 0.2), ("dice_middle", "s", 0.35)):
        found = [row for row in rows if row["metric"] == name]
        places = [shift + order.index(_pair(row)) for row in found]
        errors = np.array([[row["difference"] - row["low"], row["high"] - row["difference"]] for row in found]).T
        label = {"dice": "all slices", "dice_ends": "at the ends", "dice_middle": "in the middle"}[name]
        if found:
            values = [row["difference"] for row in found]
            axes.errorbar(values, places, xerr=errors, fmt=marker, markersize=4, capsize=2, label=label)
    axes.axvline(0, color="grey", linewidth=0.8)
    axes.set_yticks(range(len(chosen)), [f"{row['data']}: {row['model']} - {row['against']}" for row in chosen])
    axes.invert_yaxis()
    axes.set(xlabel="points of Dice, 95 % interval over patients", title=title)
    if chosen:
        figure.legend(loc="outside lower center", ncols=3, fontsize="small")
    figure.savefig(file, dpi=120)


def draw_picked(found: Mapping[str, Mapping[str, float]], title: str, file: Path) -> None:
    """Dice of the picked cases among what random cases would have given."""
    from matplotlib.figure import Figure

    figure = Figure((7, 1.4 + 0.3 * len(found)), layout="constrained")
    axes = figure.subplots()
    for place, row in enumerate(found.values()):
        axes.plot([row["low"], row["high"]], [place, place], color="grey", linewidth=4, alpha=0.5)
        axes.plot(row["fold"], place, "|", color="black", markersize=12)
        axes.plot(row["picked"], place, "o")
    axes.set_yticks(range(len(found)), list(found))
    axes.set(xlabel="Dice, %: picked cases (point), fold (line), 95 % of random draws (bar)", title=title)
    figure.savefig(file, dpi=120)


def write(works: Sequence[Path], questions: Mapping[str, Any], output: Path) -> None:
    """Writes all tables and figures."""
    scores = read(works)
    output.mkdir(parents=True, exist_ok=True)
    runs, pairs = run_rows(scores), pair_rows(scores, questions)
    for name, rows in (("runs", runs), ("pairs", pairs)):
        with (output / f"{name}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]) if rows else ["none"], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    parts = []
    for question, entries in questions.items():
        if "picked" in entries:
            picked, fold = entries["picked"]
            data_sets = [data for data, model in scores if model == picked and (data, fold) in scores]
            found = {data: picked_row(scores[data, picked], scores[data, fold]) for data in data_sets}
            cells = [
                [data, str(row["cases"]), *(f"{row[key]:.2f}" for key in ("picked", "fold", "low", "high"))]
                for data, row in found.items()
            ]
            table = markdown_table(["data", "cases", "picked, %", "fold, %", "random, 2.5 %", "random, 97.5 %"], cells)
            if found:
                draw_picked(found, entries["title"], output / f"{question}.png")
        else:
            rows = [row for row in pairs if row["question"] == question]
            found = {row["data"]: row for row in rows}
            table = pairs_table(rows, entries.get("structures", False))
            if found:
                draw(rows, entries["title"], output / f"{question}.png")
        if found:
            parts.append(f"## {entries['title']}\n\n{table}\n\n![{entries['title']}]({question}.png)\n")
    failed = [row for row in runs if row["status"] == "failed"]
    if failed:
        names = [[row["data"], row["model"], str(row["seed"])] for row in failed]
        parts.append(f"## Runs that failed\n\n{markdown_table(['data', 'model', 'seed'], names)}\n")
    (output / "study.md").write_text("\n".join(parts), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("works", type=Path, nargs="+", metavar="WORK", help="folders of study.py")
    parser.add_argument("--output", type=Path, required=True, help="folder for tables and figures")
    parsed = parser.parse_args(arguments)
    missing = [str(work) for work in parsed.works if not any((work / "scores").glob("*.json"))]
    if missing:
        sys.exit(f"error: no scores in {', '.join(missing)}; expected folders that study.py --work was given.")
    write(parsed.works, yaml.safe_load(QUESTIONS.read_text(encoding="utf-8")), parsed.output)
    print((parsed.output / "study.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
