"""Last stage of a comparison: writes the report and the tables."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from nnunet_conres.errors import file_errors
from nnunet_conres.files import write_csv, write_json, written_whole

# Columns of brats-evaluation's tables, in order, and the metric in each.
_ALL: Final = {
    "all_instance_tp": "lesions_found",
    "all_instance_fp": "lesions_false",
    "all_instance_fn": "lesions_missed",
    "all_instance_prec": "lesion_precision",
    "all_instance_rec": "lesion_recall",
    "all_instance_f1": "lesion_f1",
}
_GLOBAL: Final = {"global_dsc": "dice", "global_nsd": "surface_dice", "global_hd95": "hd95"}
_COLUMNS: Final[Mapping[str, Mapping[str, str]]] = {
    "seg": {
        **_ALL,
        **_GLOBAL,
        "lesionwise_dsc_mean": "lesion_dice",
        "lesionwise_dsc_std": "lesion_dice_sd",
        "lesionwise_nsd_mean": "lesion_surface_dice",
        "lesionwise_nsd_std": "lesion_surface_dice_sd",
        "lesionwise_hd95_mean": "lesion_hd95",
        "lesionwise_hd95_std": "lesion_hd95_sd",
    },
    "mets": {
        **_ALL,
        "large_instance_tp": "large_lesions_found",
        "large_instance_fp": "large_lesions_false",
        "large_instance_fn": "large_lesions_missed",
        "large_instance_prec": "large_lesion_precision",
        "large_instance_rec": "large_lesion_recall",
        "large_instance_f1": "large_lesion_f1",
        "lesionwise_dsc_mean": "large_lesion_dice",
        "lesionwise_dsc_std": "large_lesion_dice_sd",
        "lesionwise_hd95_mean": "large_lesion_hd95",
        "lesionwise_hd95_std": "large_lesion_hd95_sd",
        "lesionwise_nsd_mean": "large_lesion_surface_dice",
        "lesionwise_nsd_std": "large_lesion_surface_dice_sd",
        "small_instance_tp": "small_lesions_found",
        "small_instance_fn": "small_lesions_missed",
        "small_instance_fp": "small_lesions_false",
        "small_instance_prec": "small_lesion_precision",
        "small_instance_rec": "small_lesion_recall",
        "small_instance_f1": "small_lesion_f1",
        **_GLOBAL,
    },
}


def write_comparison(folder: Path, content: Mapping[str, Any], page: str) -> tuple[Path, Path, Path]:
    """Write report.html, report.json and cases.csv; with probabilities, calibration.csv and reliability.csv too.

    Args:
        folder: Output folder.
        content: Content of report.json.
        page: Content of report.html.

    Returns:
        Paths of report.html, report.json and cases.csv.
    """
    report, json, cases = folder / "report.html", folder / "report.json", folder / "cases.csv"
    scores = ((case["id"], key, regions) for case in content["cases"] for key, regions in case["scores"].items())
    write_csv(cases, _case_rows(scores, content, content["metrics"]))
    _write_calibration(folder, content)
    with written_whole(report) as partial:
        partial.write_text(page, encoding="utf-8", newline="\n")
    write_json(json, content, indent=None)
    return report, json, cases


def _case_rows(
    cases: Iterable[tuple[str, str, Mapping[str, Any]]],
    content: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]],
) -> Iterator[list[Any]]:
    """Yield a header and one row per case, model and region.

    Args:
        cases: Case id, model key, and values by region and metric.
        content: Content of report.json.
        metrics: The metrics, one column each.
    """
    keys = [metric["key"] for metric in metrics]
    names = {model["key"]: model["name"] for model in content["models"]}
    folds = {case["id"]: case["fold"] for case in content["cases"]}
    yield ["case", "fold", "model", "region", *keys]
    for case, model, regions in cases:
        for region, values in regions.items():
            yield [case, folds[case], names[model], region, *(values[key] for key in keys)]


def write_brats_tables(folder: Path, content: Mapping[str, Any], table: str, names: Mapping[str, str]) -> None:
    """Write each model's scores in the table format of brats-evaluation's brats-parse-metrics.

    Args:
        folder: Receives MODEL.csv for each model, where MODEL is its name with _ in place of special characters;
            created if necessary.
        content: Content of report.json, with scores computed like brats-evaluation's.
        table: "seg" or "mets".
        names: File name of the reference, by case.
    """
    with file_errors(folder):
        folder.mkdir(exist_ok=True)
    columns = _COLUMNS[table]
    stems = [re.sub(r"[^\w.+-]+", "_", model["name"]) for model in content["models"]]
    taken = Counter(stem.casefold() for stem in stems)
    for model, stem in zip(content["models"], stems, strict=True):
        file_name = f"{stem}.csv" if taken[stem.casefold()] == 1 else f"{stem}_{model['key']}.csv"
        rows = {
            names[case["id"]]: [
                _like_the_tool(case["scores"][model["key"]][region], metric)
                for region in content["regions"]
                for metric in columns.values()
            ]
            for case in content["cases"]
        }
        head = ["subject_id", *(f"{column}_{region.lower()}" for region in content["regions"] for column in columns)]
        summaries = zip(*(_summary(values) for values in zip(*rows.values(), strict=True)), strict=True)
        rows |= dict(zip(("mean", "std", "median"), map(list, summaries), strict=True))
        cells = ([name, *(None if np.isnan(v) else float(v) for v in values)] for name, values in rows.items())
        write_csv(folder / file_name, [head, *cells])


def _like_the_tool(values: Mapping[str, Any], metric: str) -> float:
    """Return a score as brats-evaluation prints it: hd95 is infinite if there are lesions, but none is matched."""
    if metric == "lesion_hd95" and not values["lesions_found"] and values["lesions_missed"] + values["lesions_false"]:
        return float("inf")
    return float("nan") if values[metric] is None else values[metric]


def _summary(column: tuple[float, ...]) -> tuple[float, float, float]:
    """Return mean, standard deviation and median of the values that are not NaN."""
    values = np.array([value for value in column if not np.isnan(value)], np.float64)
    if not values.size:
        return (float("nan"),) * 3
    with np.errstate(invalid="ignore"):
        deviation = float(values.std(ddof=1)) if values.size > 1 else float("nan")
    return float(values.mean()), deviation, float(np.median(values))


def _write_calibration(folder: Path, content: Mapping[str, Any]) -> None:
    """Write calibration.csv and reliability.csv; remove old ones if no model has probabilities."""
    errors, curves = folder / "calibration.csv", folder / "reliability.csv"
    calibration = content.get("calibration") or {}
    if not calibration.get("pooled"):
        for path in (errors, curves):
            path.unlink(missing_ok=True)
        return
    cases = ((case, key, regions) for key, of in calibration["cases"].items() for case, regions in of.items())
    write_csv(errors, _case_rows(cases, content, calibration["metrics"]))
    names = {model["key"]: model["name"] for model in content["models"]}
    bins = calibration["bins"]
    rows: list[list[Any]] = [
        ["model", "region", "metric", "bin_low", "bin_high", "voxels", "probability", "frequency"],
        *(
            [
                *(names[key], region, metric, round(place / bins, 6), round((place + 1) / bins, 6)),
                *(curve[name][place] for name in ("voxels", "probability", "frequency")),
            ]
            for key, regions in calibration["pooled"].items()
            for region, of_metric in regions.items()
            for metric, curve in of_metric.items()
            for place in range(bins)
        ),
    ]
    write_csv(curves, rows)
