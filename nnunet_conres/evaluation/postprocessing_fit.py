"""Choice of a model's post-processing on its validation predictions, cross-validated over the folds.

A value may suit only the cases that it was chosen on. So the value for a fold's cases is chosen on the cases of the
other folds, and the gain is measured on cases that were not used for the choice. A step is off unless the whole 95 %
interval of its gain is above zero.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from nnunet_conres import __version__
from nnunet_conres.errors import InputError
from nnunet_conres.evaluation.finding import Found
from nnunet_conres.evaluation.lesions import challenge_scores
from nnunet_conres.evaluation.postprocessing import NEUTRAL, Postprocessing, RegionSteps, Scheme
from nnunet_conres.evaluation.probabilities import read_probabilities
from nnunet_conres.evaluation.rules import Rules, labels_of_regions
from nnunet_conres.evaluation.scoring import read_pair
from nnunet_conres.evaluation.statistics import Interval, mean_intervals
from nnunet_conres.evaluation.surfaces import dice
from nnunet_conres.files import without_nan, write_json
from nnunet_conres.folders import writing
from nnunet_conres.images.volumes import reader_for
from nnunet_conres.nnunet import ignore_label
from nnunet_conres.parallel import map_all_cases
from nnunet_conres.text import aligned

CANDIDATES: Final[Mapping[str, tuple[Any, ...]]] = {
    "threshold": (0.3, 0.4, 0.6, 0.7),
    "smallest_component": (10.0, 25.0, 50.0, 100.0, 250.0, 500.0, 1000.0, 2500.0),
    "fill_holes": (True,),
    "smallest_total": (25.0, 50.0, 100.0, 250.0, 500.0, 1000.0),
}
"""Values to try for each step: probabilities for thresholds, mm³ for volumes. Volumes ascend, weakest step first."""

_NAMES: Final = {
    "threshold": "threshold",
    "smallest_component": "smallest component",
    "fill_holes": "fill holes",
    "smallest_total": "smallest total",
}
_LEAVE_OFF: Final = None


@dataclass(frozen=True)
class Evidence:
    """Evidence for or against a step.

    Attributes:
        region: The label or region.
        step: Name of the field of `RegionSteps`.
        chosen: The best value on all cases; None if the step is best left off.
        by_fold: For each fold, the best value on the cases of the other folds; None if the step is best left off.
        means: Mean score over all cases, by value. The key "off" stands for no step.
        gain: Mean gain on cases that were not used for the choice.
        interval: 95 % interval of the gain.
        better: Number of cases whose score rises.
        worse: Number of cases whose score falls.
        kept: Whether the step is used.
    """

    region: str
    step: str
    chosen: Any
    by_fold: Mapping[int, Any]
    means: Mapping[str, float]
    gain: float
    interval: Interval
    better: int
    worse: int

    @property
    def kept(self) -> bool:
        """Whether the step is used: a value was chosen, and the whole interval of the gain is above zero."""
        return self.chosen is not _LEAVE_OFF and self.interval.low > 0


@dataclass(frozen=True)
class Together:
    """Effect of all kept steps on a region. Each case is post-processed with the values chosen on the other folds.

    Attributes:
        region: The label or region.
        before: Mean score without post-processing.
        after: Mean score with post-processing.
        interval: 95 % interval of the gain.
    """

    region: str
    before: float
    after: float
    interval: Interval


@dataclass(frozen=True)
class Fit:
    """Result of `fit_postprocessing`.

    Attributes:
        path: The JSON file.
        postprocessing: The chosen post-processing.
        evidence: Evidence for every step of every region.
        together: Effect of all kept steps, for every region.
        metric: Name of the score.
        notes: Why no thresholds were tried, if so, and which regions lose by all kept steps.
    """

    path: Path
    postprocessing: Postprocessing
    evidence: Sequence[Evidence]
    together: Sequence[Together]
    metric: str
    notes: Sequence[str]

    def as_text(self) -> str:
        """Format the tables for a terminal."""
        rows = [("", "step", "best value", "by fold", f"gain in {self.metric}", "95 % interval", "better/worse", "")]
        for one in self.evidence:
            rows.append(
                (
                    one.region,
                    _NAMES[one.step],
                    _value_text(one.step, one.chosen),
                    ", ".join(_value_text(one.step, value) for value in one.by_fold.values()),
                    _gain_text(one.gain),
                    _interval_text(one.interval),
                    f"{one.better}/{one.worse}",
                    "kept" if one.kept else "left off",
                )
            )
        lines = aligned(rows)
        lines.insert(1, "-" * max(map(len, lines)))
        together = [("All kept steps", "before", "after", "gain", "95 % interval")]
        for region in self.together:
            numbers = (f"{region.before:.4f}", f"{region.after:.4f}", _gain_text(region.after - region.before))
            together.append((region.region, *numbers, _interval_text(region.interval)))
        lines += ["", *aligned(together), "", *self.notes]
        if self.postprocessing.does_nothing:
            lines.append("No step has a certain gain, so the post-processing changes nothing.")
        return "\n".join([*lines, str(self.path)])


def _value_text(step: str, value: Any) -> str:
    if value is _LEAVE_OFF:
        return "off"
    return "on" if value is True else f"{value:g}" + ("" if step == "threshold" else " mm³")


def _gain_text(gain: float) -> str:
    return "-" if math.isnan(gain) else f"{round(gain, 4) + 0.0:+.4f}"


def _interval_text(interval: Interval) -> str:
    return f"{_gain_text(interval.low)} to {_gain_text(interval.high)}"


def fit_postprocessing(
    found: Found, output: str | Path, *, rules: Rules | None = None, processes: int = 1, progress: bool = True
) -> Fit:
    """Choose the post-processing of a model, and write it to a file.

    Args:
        found: The validation predictions of one model, from `find_cross_validation`.
        output: The JSON file to write; an existing one is replaced.
        rules: Rules of a challenge. If given, the score is the lesion-wise Dice by these rules, otherwise the Dice of
            each region.
        processes: Number of cases scored in parallel.
        progress: Whether to show a progress bar on stderr.

    Returns:
        The chosen post-processing with its evidence.

    Raises:
        InputError: There are fewer than two folds, or files can't be read or do not match.
    """
    output, model = Path(output), found.models[0]
    if len(found.folds) < 2:
        raise InputError(
            f"{model.name} has fold {', '.join(map(str, found.folds))} only; expected two or more, because the values "
            f"of a fold are chosen on the other folds. Train another fold, and name all folds with -f."
        )
    less = _less(found.dataset_json)
    scheme = Scheme.of(found.dataset_json, less)
    notes = []
    file_ending = str(found.dataset_json["file_ending"])
    with_probabilities = all(model.predictions[case].probabilities(file_ending).is_file() for case in found.cases)
    if not with_probabilities:
        lines = [missing.as_text for missing in found.missing_probabilities]
        notes.append("\n  ".join(["No thresholds are tried.", *dict.fromkeys(lines)]))
    scorer = _scorer(scheme, found.dataset_json, rules)
    reader = reader_for(found.dataset_json, [found.references[case] for case in found.cases])
    ignore = ignore_label(found.dataset_json["labels"])
    jobs = []
    for case in found.cases:
        one = model.predictions[case]
        probabilities = one.probabilities(file_ending) if with_probabilities else None
        jobs.append(_Job(case, found.references[case], one.labels, probabilities, scheme, scorer, reader, ignore))
    results = dict(zip(found.cases, map_all_cases(_try, jobs, processes, "Trying", progress), strict=True))
    folds = {case: fold for case in found.cases if (fold := model.predictions[case].fold) is not None}  # never None
    groups = dict(found.groups or {case: case for case in found.cases})
    evidence = [
        _evidence(region, step, {case: result[region][step] for case, result in results.items()}, folds, groups)
        for region in scheme.regions
        for step in next(iter(results.values()))[region]
    ]
    postprocessing = _chosen(scheme, evidence, found.folds)
    before = {
        case: {region: next(iter(steps.values()))[_LEAVE_OFF] for region, steps in result.items()}
        for case, result in results.items()
    }
    after = before
    if not postprocessing.does_nothing:
        applied = [replace(job, postprocessing=postprocessing.of_fold(folds[job.case])) for job in jobs]
        scores = map_all_cases(_apply, applied, processes, "Together", progress)
        after = dict(zip(found.cases, scores, strict=True))
    together = [
        _together(
            region,
            {case: scores[region] for case, scores in before.items()},
            {case: scores[region] for case, scores in after.items()},
            groups,
        )
        for region in scheme.regions
    ]
    notes += notes_on_losses(together)
    metric = "Dice" if rules is None else f"lesion-wise Dice ({rules.name})"
    fit = Fit(output, postprocessing, evidence, together, metric, notes)
    with writing(output.parent, lock=f".{output.name}.lock"):
        write_json(output, _content(fit, found, less, rules))
    return fit


def notes_on_losses(together: Sequence[Together]) -> list[str]:
    """Return a note on the regions whose score falls when all kept steps are applied; empty if there are none.

    Each step is chosen by the score of one region. It can change the scores of other regions too.

    Args:
        together: Effect of all kept steps, for every region.
    """
    lost = [one.region for one in together if one.interval.high < 0]
    if not lost:
        return []
    return [
        f"All kept steps together lower the score of {', '.join(lost)}, because steps of one region change others too. "
        f"Compare this loss with the gains in the last table."
    ]


def _less(dataset_json: Mapping[str, Any]) -> dict[str, str]:
    """Return the label that replaces enhancing tumour where its volume is implausibly small.

    Empty for regions: their replacement follows from their nesting (`Scheme.around`).
    """
    values = Scheme.of(dataset_json)
    if values.has_regions:
        return {}
    names = {name.lower().replace(" ", "_").replace("-", "_"): name for name in values.regions}
    enhancing = [names[name] for name in ("enhancing", "enhancing_tumor", "enhancing_tumour", "et") if name in names]
    others = ("necrosis", "nonenhancing", "nonenhancing_tumor", "netc", "ncr", "net", "necrotic_core")
    instead = [names[name] for name in others if name in names]
    return {enhancing[0]: instead[0]} if enhancing and instead else {}


def _content(fit: Fit, found: Found, less: Mapping[str, str], rules: Rules | None) -> dict[str, Any]:
    model = found.models[0].model
    content: dict[str, Any] = without_nan(
        {
            **fit.postprocessing.as_json(),
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "nnunet_conres": __version__,
            "dataset": found.dataset_name,
            "model": model and {key: getattr(model, key) for key in ("trainer", "plans", "configuration")},
            "metric": fit.metric,
            "rules": rules and rules.name,
            "number_of_cases": len(found.cases),
            "dataset_json": {
                key: found.dataset_json[key]
                for key in ("labels", "regions_class_order", "file_ending", "overwrite_image_reader_writer")
                if key in found.dataset_json
            },
            "less": dict(less),
            "evidence": [asdict(one) | {"kept": one.kept} for one in fit.evidence],
            "together": [asdict(one) for one in fit.together],
            "notes": list(fit.notes),
        }
    )
    return content


# --- scores ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Scorer:
    """Score of a region: its Dice, or a challenge's lesion-wise Dice; 1 if neither label map has the region.

    The rules of 2026 give no score for such a case. Removing a false lesion from it would then gain nothing.
    """

    labels: Mapping[str, tuple[int, ...]]
    rules: Mapping[str, tuple[Rules, Mapping[str, tuple[int, ...]]]]

    def __call__(
        self, region: str, reference: NDArray[Any], prediction: NDArray[Any], spacing: Sequence[float]
    ) -> float:
        if region in self.rules:
            rules, labels = self.rules[region]
            score = challenge_scores(reference, prediction, spacing, rules, labels)[rules.regions[0]]["lesion_dice"]
            return 1.0 if math.isnan(score) else score
        return dice(*(np.isin(labels, self.labels[region]) for labels in (reference, prediction)))


def _scorer(scheme: Scheme, dataset_json: Mapping[str, Any], rules: Rules | None) -> _Scorer:
    if rules is None:
        return _Scorer(scheme.regions, {})
    known = labels_of_regions(rules, dataset_json["labels"]).labels
    names = {values: name for name, values in known.items() if name in rules.regions}
    missing = [region for region, values in scheme.regions.items() if tuple(sorted(values)) not in names]
    if missing:
        raise InputError(
            f"The rules {rules.name} do not score {', '.join(missing)}; expected a data set with the regions "
            f"{', '.join(rules.regions)} only, or leave --rules out."
        )
    chosen = {region: names[tuple(sorted(values))] for region, values in scheme.regions.items()}
    return _Scorer(
        scheme.regions,
        {region: (replace(rules, regions=(name,)), known) for region, name in chosen.items()},
    )


@dataclass(frozen=True)
class _Job:
    """A case to score."""

    case: str
    reference: Path
    prediction: Path
    probabilities: Path | None
    scheme: Scheme
    scorer: _Scorer
    reader: type
    ignore: int | None
    postprocessing: Postprocessing | None = None


def _read(job: _Job) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any] | None, tuple[float, ...]]:
    allowed = sorted({0, *(value for values in job.scheme.regions.values() for value in values)})
    reference, prediction, spacing, _ = read_pair(job.reference, job.prediction, job.reader, allowed, job.ignore)
    probabilities = None if job.probabilities is None else read_probabilities(job.probabilities)
    return reference, prediction, probabilities, spacing


def _score(job: _Job, region: str, reference: NDArray[Any], labels: NDArray[Any], spacing: Sequence[float]) -> float:
    if job.ignore is not None:
        annotated = reference != job.ignore
        reference, labels = reference * annotated, labels * annotated
    return job.scorer(region, reference, labels, spacing)


def _try(job: _Job) -> dict[str, dict[str, dict[Any, float]]]:
    """Score every value of every step; return the scores by region, step and value. None stands for no step."""
    reference, labels, probabilities, spacing = _read(job)
    scores: dict[str, dict[str, dict[Any, float]]] = {}
    for region in job.scheme.regions:
        off = _score(job, region, reference, labels, spacing)
        scores[region] = {}
        for step, values in CANDIDATES.items():
            if (step == "threshold" and probabilities is None) or (
                step == "smallest_total" and not job.scheme.around[region]
            ):
                continue
            scores[region][step] = {_LEAVE_OFF: off}
            previous = labels
            for value in values:
                steps = {region: replace(RegionSteps(), **{step: value})}
                changed = Postprocessing(job.scheme, steps).apply(labels, probabilities, spacing)
                last = next(reversed(scores[region][step].values()))
                same = np.array_equal(changed, previous)
                scores[region][step][value] = last if same else _score(job, region, reference, changed, spacing)
                previous = changed
    return scores


def _apply(job: _Job) -> dict[str, float]:
    """Post-process a case and return its scores by region."""
    assert job.postprocessing is not None
    reference, labels, probabilities, spacing = _read(job)
    changed = job.postprocessing.apply(labels, probabilities, spacing)
    return {region: _score(job, region, reference, changed, spacing) for region in job.scheme.regions}


# --- the choice -----------------------------------------------------------------------------------------------------


def _evidence(
    region: str,
    step: str,
    scores: Mapping[str, Mapping[Any, float]],
    folds: Mapping[str, int],
    groups: Mapping[str, str],
) -> Evidence:
    by_fold = {}
    for fold in sorted(set(folds.values())):
        # Leave out the patients of the held-out cases too: their other images may be in other folds.
        held_out = {groups[case] for case, of_case in folds.items() if of_case == fold}
        by_fold[fold] = best_value([of for case, of in scores.items() if groups[case] not in held_out])
    gains = [of[by_fold[folds[case]]] - of[_LEAVE_OFF] for case, of in scores.items()]
    (interval,) = mean_intervals([gains], [[groups[case] for case in scores]])
    return Evidence(
        region,
        step,
        best_value(list(scores.values())),
        by_fold,
        {
            "off" if value is _LEAVE_OFF else str(value): _mean([of[value] for of in scores.values()])
            for value in next(iter(scores.values()))
        },
        _mean(gains),
        interval,
        sum(gain > 1e-9 for gain in gains),
        sum(gain < -1e-9 for gain in gains),
    )


def best_value(scores: Sequence[Mapping[Any, float]]) -> Any:
    """Return the value with the highest gain, None for no step; of equal values the first, which changes least.

    Args:
        scores: Scores of each case, by value. The first value is None, which stands for no step.
    """
    best, highest = _LEAVE_OFF, 0.0
    for value in scores[0] if scores else ():
        gain = math.fsum(of[value] - of[_LEAVE_OFF] for of in scores)
        if gain > highest + 1e-12:
            best, highest = value, gain
    return best


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _chosen(scheme: Scheme, evidence: Sequence[Evidence], folds: Sequence[int]) -> Postprocessing:
    steps = {region: RegionSteps() for region in scheme.regions}
    of_folds = {fold: dict(steps) for fold in folds}
    neutral = asdict(RegionSteps())
    for one in evidence:
        if not one.kept:
            continue
        steps[one.region] = replace(steps[one.region], **{one.step: one.chosen})
        for fold, value in one.by_fold.items():
            mine = neutral[one.step] if value is _LEAVE_OFF else value
            of_folds[fold][one.region] = replace(of_folds[fold][one.region], **{one.step: mine})
    assert neutral["threshold"] == NEUTRAL
    return Postprocessing(scheme, steps, of_folds)


def _together(
    region: str, before: Mapping[str, float], after: Mapping[str, float], groups: Mapping[str, str]
) -> Together:
    (interval,) = mean_intervals([[after[case] - before[case] for case in before]], [[groups[case] for case in before]])
    return Together(region, _mean(list(before.values())), _mean(list(after.values())), interval)
