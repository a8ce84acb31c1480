"""Third stage of a comparison: means, differences, tests and conclusions from the scores of models."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import numpy as np

from nnunet_conres.evaluation.cache import Cache, key_of
from nnunet_conres.evaluation.metrics import METRICS, Metric
from nnunet_conres.evaluation.scoring import MEAN, Scores
from nnunet_conres.evaluation.statistics import (
    STATISTICS_VERSION,
    PairedComparison,
    compare_paired,
    mean_intervals,
)
from nnunet_conres.files import without_nan

MOST_DISAGREEMENTS: Final = 10

_MAIN_METRIC: Final = "dice"
_CONCLUDED_METRICS: Final = ("dice", "hd95")
# Used instead with the rules of a challenge.
_RANKED_METRICS: Final = ("lesion_dice", "lesion_surface_dice")


@dataclass(frozen=True)
class Findings:
    """Statistics and conclusions, in the form of report.json.

    Attributes:
        regions: Labels or regions.
        summary: Statistics by model, region and metric.
        comparisons: Comparisons of every model with the baseline, by metric and region.
        conclusions: Sentences.
        disagreements: The cases in which a single model's Dice differs most from the baseline's, with a sentence each.
    """

    regions: Sequence[str]
    summary: Mapping[str, Any]
    comparisons: Sequence[Mapping[str, Any]]
    conclusions: Sequence[str]
    disagreements: Sequence[Mapping[str, str]]


def compare_scores(
    scores: Scores,
    names: Mapping[str, str],
    singles: Sequence[str],
    groups: Mapping[str, str] | None = None,
    cache_folder: Path | None = None,
) -> Findings:
    """Compare all models with the baseline.

    Args:
        scores: Scores of all models in all cases.
        names: Display names of the models by key, the baseline first.
        singles: Keys of the models that are neither ensembles nor post-processed, the baseline first.
        groups: Group of every case, if cases are not independent.
        cache_folder: Folder that caches the findings between runs.
    """
    versions = [STATISTICS_VERSION, version("numpy"), version("scipy")]
    form = [field.name for field in fields(Findings)]
    key = key_of(form, versions, scores.values, names, singles, groups)
    return Findings(**Cache(cache_folder).kept(key, lambda: _compare(scores, names, singles, groups)))


def _compare(
    scores: Scores, names: Mapping[str, str], singles: Sequence[str], groups: Mapping[str, str] | None
) -> dict[str, Any]:
    baseline = singles[0]
    regions = [region for region in next(iter(scores.values[baseline].values())) if region != MEAN]
    overall = overall_of(regions)
    named = {names[key]: values for key, values in scores.values.items()}
    compared = compare_paired(named, names[baseline], groups=groups) if len(names) > 1 else []
    conclusions = [
        comparison.sentence
        for comparison in compared
        if comparison.region == overall
        and comparison.metric in (_CONCLUDED_METRICS if scores.options.rules is None else _RANKED_METRICS)
    ]
    conclusions += _does_the_ensemble_help(scores, names, singles, overall, groups)
    keys = {name: key for key, name in names.items()}
    findings = Findings(
        regions,
        summarise(scores.values, groups),
        [comparison_row(comparison, keys) for comparison in compared],
        conclusions,
        _disagreements(scores, names, singles, overall),
    )
    return dict(without_nan(vars(findings)))


def overall_of(regions: Sequence[str]) -> str:
    """Return the region key that stands for a case as a whole: the mean, or the only region."""
    return MEAN if len(regions) > 1 else regions[0]


def _does_the_ensemble_help(
    scores: Scores, names: Mapping[str, str], singles: Sequence[str], region: str, groups: Mapping[str, str] | None
) -> list[str]:
    """Compare ensembles and post-processed models with the best single model.

    Empty if the best single model is the baseline, which they are compared with anyway.
    """

    def mean(key: str) -> float:
        values = [case[region][_MAIN_METRIC] for case in scores.values[key].values()]
        known = [value for value in values if not math.isnan(value)]
        return math.fsum(known) / len(known) if known else -math.inf

    ensembles = [name for key, name in names.items() if key not in singles]
    best = max(singles, key=mean)
    if not ensembles or best == singles[0]:
        return []
    named = {names[key]: values for key, values in scores.values.items()}
    compared = compare_paired(
        named, names[best], models=ensembles, regions=[region], metrics=[_MAIN_METRIC], groups=groups
    )
    return [found.sentence for found in compared]


def summarise(
    values: Mapping[str, Mapping[str, Mapping[str, Mapping[str, float]]]],
    groups: Mapping[str, str] | None,
    definitions: Mapping[str, Metric] = METRICS,
) -> dict[str, Any]:
    """Compute statistics by model, region and metric over the cases that have a value.

    Args:
        values: Scores by model, case, region and metric; NaN if undefined.
        groups: Group of every case, if cases are not independent.
        definitions: The metrics of the values, by key.
    """
    known: dict[tuple[str, str, str], dict[str, float]] = {}
    for key, cases in values.items():
        for region, metrics in next(iter(cases.values())).items():
            for metric in metrics:
                # Absolute volume errors: one case's excess must not cancel another's deficit.
                every = {case: definitions[metric].compared(of[region][metric]) for case, of in cases.items()}
                known[key, region, metric] = {case: value for case, value in every.items() if not math.isnan(value)}
    series = [np.array(list(of.values()), np.float64) for of in known.values()]
    grouped = [None if groups is None else [groups[case] for case in of] for of in known.values()]
    summary: dict[str, Any] = {}
    for (key, region, metric), of_cases, interval in zip(known, series, mean_intervals(series, grouped), strict=True):
        summary.setdefault(key, {}).setdefault(region, {})[metric] = {
            "n": of_cases.size,
            "mean": float(of_cases.mean()) if of_cases.size else None,
            "median": float(np.median(of_cases)) if of_cases.size else None,
            "std": float(of_cases.std(ddof=1)) if of_cases.size > 1 else None,
            "low": interval.low,
            "high": interval.high,
        }
    return summary


def comparison_row(comparison: PairedComparison, keys: Mapping[str, str]) -> dict[str, Any]:
    """Convert a comparison to a row of report.json, with model keys instead of names."""
    return {
        "baseline": keys[comparison.baseline],
        "model": keys[comparison.model],
        "region": comparison.region,
        "metric": comparison.metric,
        "n": comparison.count,
        "left_out": list(comparison.left_out),
        "mean_difference": comparison.mean_difference,
        "median_difference": comparison.median_difference,
        "low": comparison.mean_interval.low,
        "high": comparison.mean_interval.high,
        "median_low": comparison.median_interval.low,
        "median_high": comparison.median_interval.high,
        "p": comparison.p_value,
        "p_holm": comparison.p_corrected,
        "effect_size": comparison.effect,
        "wins": comparison.wins,
        "ties": comparison.ties,
        "losses": comparison.losses,
        "conclusion": comparison.conclusion,
        "sentence": comparison.sentence,
    }


def _disagreements(
    scores: Scores, names: Mapping[str, str], singles: Sequence[str], region: str
) -> list[dict[str, str]]:
    """Return the cases in which a single model's Dice differs most from the baseline's."""
    baseline, *others = singles
    rows = []
    for case, regions in scores.values[baseline].items():
        for other in others:
            difference = scores.values[other][case][region][_MAIN_METRIC] - regions[region][_MAIN_METRIC]
            if not math.isnan(difference):
                rows.append((abs(difference), case, names[other], difference))
    found: dict[str, str] = {}
    for _, case, name, difference in sorted(rows, key=lambda row: (-row[0], row[1])):
        found.setdefault(case, f"Dice ({region}) of {name} is {difference:+.3f} against {names[baseline]}")
    return [{"id": case, "reason": reason} for case, reason in list(found.items())[:MOST_DISAGREEMENTS]]
