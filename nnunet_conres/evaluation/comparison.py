"""Comparison of trained models: find, score, test, draw, write. Each stage uses the results of the earlier ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from nnunet_conres import __version__
from nnunet_conres.evaluation.calibration import measure_calibration
from nnunet_conres.evaluation.costs import Costs, costs_of, times_compare
from nnunet_conres.evaluation.drawing import draw_cases
from nnunet_conres.evaluation.ensembles import add_ensembles
from nnunet_conres.evaluation.finding import CompareOptions, Found
from nnunet_conres.evaluation.metrics import METRICS
from nnunet_conres.evaluation.postprocessing_files import add_postprocessed
from nnunet_conres.evaluation.report import REPORT_FORMAT, report_page
from nnunet_conres.evaluation.rules import rules_text
from nnunet_conres.evaluation.scoring import Scores, ScoringJob, reader_name, score_cases
from nnunet_conres.evaluation.testing import Findings, compare_scores, overall_of
from nnunet_conres.evaluation.writing import write_brats_tables, write_comparison
from nnunet_conres.files import without_nan
from nnunet_conres.folders import writing
from nnunet_conres.text import aligned, first_few


@dataclass(frozen=True)
class Comparison:
    """The results of a comparison, and the files that were written.

    Attributes:
        content: Content of report.json.
        report: Path of report.html.
        json: Path of report.json.
        csv: Path of cases.csv.
    """

    content: Mapping[str, Any]
    report: Path
    json: Path
    csv: Path

    def as_text(self) -> str:
        """Return the main figures, conclusions and warnings as text for a terminal."""
        content = self.content
        region = overall_of(content["regions"])
        timed = times_compare([model["cost"] for model in content["models"]])
        heads = ["", f"Dice ({region})", "95 % interval", f"HD95 ({region})", "cases"]
        rows = [[*heads, "s per epoch"] if timed else heads]
        for model in content["models"]:
            dice, hd95 = (content["summary"][model["key"]][region][key] for key in ("dice", "hd95"))
            seconds = model["cost"]["epoch_seconds"]
            row = [
                model["name"],
                METRICS["dice"].text(_number(dice["mean"])),
                " to ".join(METRICS["dice"].text(_number(dice[end])) for end in ("low", "high")),
                METRICS["hd95"].text(_number(hd95["mean"])),
                str(dice["n"]),
            ]
            rows.append([*row, "-" if seconds is None else f"{seconds:.1f}"] if timed else row)
        lines = aligned(rows)
        lines.insert(1, "-" * max(map(len, lines)))
        if content["options"].get("rules"):
            lines += ["", rules_text(content["options"])]
        lines += ["", *content["conclusions"], *(f"warning: {warning}" for warning in content["warnings"])]
        return "\n".join([*lines, "", f"Report: {self.report}", f"        {self.json}", f"        {self.csv}"])


def compare(found: Found, output_folder: str | Path, options: CompareOptions | None = None) -> Comparison:
    """Compare models and write the report.

    Args:
        found: The models and their predictions, from `find_cross_validation` or `find_test_set`.
        output_folder: Folder of the report; created if missing.
        options: How to compare.

    Returns:
        The results, and the paths of the files.

    Raises:
        InputError: Files can't be read or do not fit each other, or the report can't be written.
    """
    options, output = options or CompareOptions(), Path(output_folder)
    cache = output / "cache"
    with writing(output):
        found = add_postprocessed(add_ensembles(found, output, options), output, options)
        jobs = [
            ScoringJob(model.key, case, found.references[case], model.predictions[case].labels)
            for model in found.models
            for case in found.cases
        ]
        reader = reader_name(found.dataset_json, [job.reference for job in jobs], cache / "readers")
        scores = score_cases(
            jobs,
            found.dataset_json,
            options=options.metrics,
            cache_folder=cache / "scores",
            reader=reader,
            processes=options.processes,
            progress=options.progress,
        )
        calibration = (
            measure_calibration(found, cache / "calibration", reader, options) if options.calibration else None
        )
        names = {model.key: model.name for model in found.models}
        singles = [model.key for model in found.models if not model.members]
        findings = compare_scores(scores, names, singles, found.groups, cache / "statistics")
        costs = costs_of(found.models, cache / "networks")
        pictures, warnings = draw_cases(found, [case["id"] for case in findings.disagreements], cache / "pictures")
        content = _content(found, scores, findings, costs, warnings) | {"calibration": calibration}
        report, json, cases = write_comparison(output, content, report_page(content, pictures))
        if options.metrics.rules is not None and options.metrics.like_brats_evaluation:
            names_of_files = {case: found.references[case].name for case in found.cases}
            write_brats_tables(output / "brats_evaluation", content, options.metrics.rules.table, names_of_files)
    return Comparison(content, report, json, cases)


def _content(found: Found, scores: Scores, findings: Findings, costs: Costs, warnings: Sequence[str]) -> dict[str, Any]:
    """Return the content of report.json, except for the calibration."""
    content: dict[str, Any] = without_nan(
        {
            "format": REPORT_FORMAT,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "nnunet_conres": __version__,
            "nnunetv2": version("nnunetv2"),
            "dataset": {
                "name": found.dataset_name,
                "kind": found.kind,
                "folds": found.folds,
                "number_of_cases": len(found.cases),
                "left_out": found.left_out,
                "reference": str(next(iter(found.references.values())).parent) if found.references else "",
            },
            "options": asdict(scores.options),
            "regions": findings.regions,
            "metrics": [
                asdict(METRICS[key]) | {"better": None if METRICS[key].better == "none" else METRICS[key].better}
                for key in scores.options.measured
            ],
            "models": [
                {
                    "key": model.key,
                    "name": model.name,
                    "baseline": model is found.models[0],
                    "trainer": model.model and model.model.trainer,
                    "plans": model.model and model.model.plans,
                    "configuration": model.model and model.model.configuration,
                    "folds": list(model.folds),
                    "members": list(model.members) or None,
                    "cost": asdict(costs.costs[model.key]),
                    "curves": costs.curves[model.key] or None,
                }
                for model in found.models
            ],
            "summary": findings.summary,
            "comparisons": findings.comparisons,
            "conclusions": findings.conclusions,
            "warnings": [
                *found.warnings,
                *_displaced(scores),
                *_missing(scores),
                *costs.warnings,
                *_one_fold(found),
                *warnings,
            ],
            "cases": [
                {
                    "id": case,
                    "fold": found.models[0].predictions[case].fold,
                    "scores": {key: values[case] for key, values in scores.values.items()},
                }
                for case in found.cases
            ],
            "disagreements": findings.disagreements,
        }
    )
    return content


def _displaced(scores: Scores) -> list[str]:
    if not scores.displaced:
        return []
    return [
        f"Headers of {first_few([str(path) for path in scores.displaced])} have another origin or orientation than the "
        f"reference. Voxels were compared by index; check that these are predictions of the same images in the same "
        f"orientation."
    ]


def _missing(scores: Scores) -> list[str]:
    if not scores.missing_regions:
        return []
    assert scores.options.rules is not None, "only rules ask for regions"
    return [
        f"The rules {scores.options.rules.name} score {', '.join(scores.missing_regions)}, but the labels of this data "
        f"set do not distinguish these regions. They are not scored here."
    ]


def _one_fold(found: Found) -> list[str]:
    if len(found.cases) < 2 or len(found.folds) != 1:
        return []
    return [
        f"Only fold {found.folds[0]} is compared: a difference may be due to the split or to chance; compare more "
        f"folds or seeds."
    ]


def _number(value: float | None) -> float:
    return math.nan if value is None else value
