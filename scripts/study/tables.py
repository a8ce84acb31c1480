"""What came out of the study's stages, kept beside the list of runs, and as tables and curves in docs/results.md."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import re
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from runs import dataset_of, runs_of, setting_of

from nnunet_conres.evaluation.scoring import MEAN
from nnunet_conres.evaluation.statistics import compare_paired, holm
from nnunet_conres.text import markdown_table

_METRICS = ("dice", "hd95")


def save_results(
    study: Mapping[str, Any],
    stage: str,
    report: Mapping[str, Any],
    file: Path,
    curves: Mapping[str, Sequence[float]] | None = None,
) -> None:
    """Keeps what the tables need of a report of `nnunet-conres compare`.

    Args:
        study: Content of runs.yaml.
        stage: The stage.
        report: Content of report.json.
        file: Where to.
        curves: By a run's name, the mean Dice of validation patches by epoch, for the figure.
    """
    region = "mean" if "mean" in next(iter(report["summary"].values())) else report["regions"][0]
    keys = {model["name"]: model for model in report["models"]}
    rows = []
    for run in runs_of(dict(study), stage):
        model = keys[run.name]
        row: dict[str, Any] = {"network": run.network, "iterations": run.iterations, "seed": run.seed}
        row["parameters"] = model["cost"]["parameters"]
        if curves and run.name in curves:
            row["validation_dice"] = [round(float(value), 4) for value in curves[run.name]]
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
    content = {"stage": stage, "setting": _setting(study, stage), "folds": report["dataset"]["folds"]}
    content |= {"cases": len(report["cases"]), "rows": rows}
    file.write_text(_json(content) + "\n")


def _setting(study: Mapping[str, Any], stage: str) -> dict[str, Any]:
    return dataclasses.asdict(setting_of(study, stage)) | {"epoch": runs_of(dict(study), stage)[0].epoch}


def _json(content: Any) -> str:
    """JSON with a case to a line rather than a number to a line."""
    text = json.dumps(content, indent=1)
    return re.sub(r"\[[-\d.e,\s]+\]|\[\s+[-\d.e]+,\s+null\s+\]", lambda found: " ".join(found[0].split()), text)


def write_tables(study: Mapping[str, Any], results: Path, document: Path) -> None:
    """Puts the tables of stages, contrasts and pairs between their marks in the document.

    Args:
        study: Content of runs.yaml.
        results: Folder of the saved results.
        document: Markdown file with a line ``<!-- study: NAME -->`` and one ``<!-- end -->`` for each table.

    Raises:
        RuntimeError: If the document has no marks for a stage that has results, or for a contrast or pairs whose stages
            have results, a file of results is damaged, or those of a stage are of other runs than runs.yaml has, or of
            the same ones on another data set, other folds or another device, or with another batch or length of epochs.
    """
    text = document.read_text()
    stages = {stage: _read_stage(file) for stage, file in _files(study, results).items()}
    for stage, content in stages.items():
        saved = [(row["network"], row["iterations"], row["seed"]) for row in content["rows"]]
        listed = [(run.network, run.iterations, run.seed) for run in runs_of(dict(study), stage)]
        of_others = content["folds"] != study["stages"][stage]["folds"] or content["setting"] != _setting(study, stage)
        if saved != listed or of_others:
            raise RuntimeError(f"{results / stage}.json has other runs than runs.yaml; run the stage {stage}.")
    for name, table in _tables(study, stages, read_steps(results / "steps.json")).items():
        found = re.search(f"(<!-- study: {name} -->\n)(.*?)(<!-- end -->)", text, re.DOTALL)
        if found is None:
            raise RuntimeError(
                f"{document} has no lines <!-- study: {name} --> and <!-- end -->, between which to write."
            )
        text = f"{text[: found.end(1)]}{table}\n{text[found.start(3) :]}"
    document.write_text(text)


def _files(study: Mapping[str, Any], results: Path) -> dict[str, Path]:
    files = {stage: results / f"{stage}.json" for stage in study["stages"]}
    return {stage: file for stage, file in files.items() if file.is_file()}


def read_steps(file: Path) -> dict[str, Any]:
    """Saved times of steps by setting and network; none where there is no such file.

    Raises:
        RuntimeError: If the file is damaged.
    """
    if not file.is_file():
        return {}
    with _told_by_name(file):
        return dict(json.loads(file.read_text()))


def _read_stage(file: Path) -> dict[str, Any]:
    with _told_by_name(file):
        content = json.loads(file.read_text())
        _ = content["setting"], content["folds"], content["cases"], content["rows"][0]["dice"]["mean"]
        return dict(content)


@contextlib.contextmanager
def _told_by_name(file: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise RuntimeError(f"{file} is damaged ({error!r}); remove it, and make it again.") from error


def _tables(study: Mapping[str, Any], stages: Mapping[str, Any], steps: Mapping[str, Any]) -> dict[str, str]:
    def there(runs: Sequence[str]) -> bool:
        return all(run.split("/")[0] in stages for run in runs)

    def steps_of(stage: str) -> Mapping[str, Any]:
        return steps.get(setting_of(study, stage).name, {})

    tables = {
        stage: f"{_table(content, steps_of(stage))}\n\n(`study.py run {stage}`)" for stage, content in stages.items()
    }
    for name, runs in study.get("contrasts", {}).items():
        if there(runs):
            tables[name] = _table(contrast(runs, stages), steps_of(runs[0].split("/")[0]))
    for name, pairs in study.get("pairs", {}).items():
        if all(there(pair) for pair in pairs):
            tables[name] = _pairs_table(study, pairs, stages, steps_of)
    return tables


def contrast(runs: Sequence[str], stages: Mapping[str, Any]) -> dict[str, Any]:
    """Compares runs of any stages, the first being the baseline, on the cases that all of them were judged on.

    Args:
        runs: As in runs.yaml: stage/network, with @iterations and #seed where the stage has several.
        stages: Saved results by stage.

    Returns:
        Content like that of a stage's results. p are corrected over the runs given, a metric at a time.

    Raises:
        ValueError: If a stage has no such run, or several, or the runs have no case in common.
    """
    rows = [dict(find_run(run, stages)) for run in runs]
    common = [case for case in rows[0]["cases"] if all(case in row["cases"] for row in rows)]
    if not common:
        raise ValueError(f"{', '.join(runs)} were judged on no common case.")
    values: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    for run, row in zip(runs, rows, strict=True):
        values[run] = {}
        for case in common:
            scores = zip(_METRICS, row["cases"][case], strict=True)
            values[run][case] = {MEAN: {metric: math.nan if s is None else s for metric, s in scores}}
        for number, metric in enumerate(_METRICS):
            scored = [row["cases"][case][number] for case in common if row["cases"][case][number] is not None]
            row[metric] = {"mean": statistics.fmean(scored) if scored else math.nan}
            row.pop(f"{metric}_difference", None)
    for comparison in compare_paired(values, runs[0], regions=[MEAN], metrics=_METRICS):
        rows[runs.index(comparison.model)][f"{comparison.metric}_difference"] = {
            "mean_difference": comparison.mean_difference,
            "low": comparison.mean_interval.low,
            "high": comparison.mean_interval.high,
            "p": comparison.p_value,
            "p_holm": comparison.p_corrected,
            "wins": comparison.wins,
            "losses": comparison.losses,
        }
    return {"cases": len(common), "rows": rows}


def find_run(run: str, stages: Mapping[str, Any]) -> dict[str, Any]:
    """The row of a run, which is given as in ``contrast``.

    Raises:
        ValueError: If the stage has no such run, or several.
    """
    found = re.fullmatch(r"(?P<stage>\w+)/(?P<network>\w+)(@(?P<iterations>\d+))?(#(?P<seed>\d+))?", run)
    if found is None or found["stage"] not in stages:
        raise ValueError(f"{run} is no run; expected stage/network, stage/network@iterations or stage/network#seed.")
    rows = [
        row
        for row in stages[found["stage"]]["rows"]
        if row["network"] == found["network"]
        and found["iterations"] in (None, str(row["iterations"]))
        and found["seed"] in (None, str(row["seed"]))
    ]
    if len(rows) != 1:
        raise ValueError(f"Stage {found['stage']} has {len(rows)} runs {run}; expected one.")
    return rows[0]


def _pairs_table(
    study: Mapping[str, Any],
    pairs: Sequence[Sequence[str]],
    stages: Mapping[str, Any],
    steps_of: Callable[[str], Mapping[str, Any]],
) -> str:
    compared = [contrast(pair, stages) for pair in pairs]
    corrected = {
        metric: holm([content["rows"][1][f"{metric}_difference"]["p"] for content in compared]) for metric in _METRICS
    }
    table = []
    for number, (pair, content) in enumerate(zip(pairs, compared, strict=True)):
        first, second = content["rows"]
        stage = pair[1].split("/")[0]
        difference = second["dice_difference"]
        steps = [steps_of(stage).get(row["network"]) for row in (first, second)]
        times = [None if step is None else step["ms"] / step["baseline_ms"] for step in steps]
        table.append(
            [
                dataset_of(study, stage),
                str(second["iterations"]),
                *(f"{100 * row['dice']['mean']:.2f}" for row in (first, second)),
                _points(difference),
                _p(corrected["dice"][number]),
                f"{difference['wins']} of {content['cases']}",
                *(f"{row['hd95']['mean']:.2f}" for row in (first, second)),
                _p(corrected["hd95"][number]),
                "" if None in times else f"{times[1] / times[0]:.2f}",
            ]
        )
    a, b = (f"`{row['network']}`" for row in compared[0]["rows"])
    header = ["data", "iterations", f"{a}, %", f"{b}, %", "points", "p (Holm)", "better in"]
    header += [f"{a}, HD95, mm", f"{b}, HD95, mm", "p (Holm)", "step"]
    return markdown_table(header, table)


def draw_curves(stage: Mapping[str, Any], file: Path) -> None:
    """Draws the mean Dice of validation patches over the iterations, a line for each run of a stage.

    Args:
        stage: Saved results of a stage.
        file: Where to, a PNG.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for row in stage["rows"]:
        dice = row.get("validation_dice")
        if dice:
            iterations = [row["iterations"] * (number + 1) / len(dice) for number in range(len(dice))]
            axes.plot(iterations, [100 * value for value in dice], label=_label(row, stage["rows"]))
    axes.set(xlabel="iterations", ylabel="Dice of validation patches, %")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)


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
            cells.append(_points(difference))
            cells += [_p(difference["p_holm"]), f"{difference['wins']} of {content['cases']}"]
        cells.append(f"{row['hd95']['mean']:.2f}")
        cells.append(_p(row["hd95_difference"]["p_holm"]) if "hd95_difference" in row else "")
        step = steps.get(row["network"])
        cells.append("" if step is None else f"{step['ms'] / step['baseline_ms']:.2f}")
        table.append(cells)
    return markdown_table(header, table)


def _label(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    label = row["network"]
    for key, words in (("iterations", "{} iterations"), ("seed", "seed {}")):
        if len({other.get(key) for other in rows}) > 1:
            label += ", " + words.format(row[key])
    return label


def _points(difference: Mapping[str, float]) -> str:
    low, high = 100 * difference["low"], 100 * difference["high"]
    return f"{100 * difference['mean_difference']:+.2f} ({low:+.2f} to {high:+.2f})"


def _p(value: float | None) -> str:
    if value is None:
        return ""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"
