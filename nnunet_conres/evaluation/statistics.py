"""Paired comparison of models with a baseline: differences, confidence intervals, tests and conclusions."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from nnunet_conres.evaluation.metrics import METRICS, Metric
from nnunet_conres.evaluation.scoring import MEAN
from nnunet_conres.text import first_few

# Increased by every change that alters results. This invalidates the cache.
STATISTICS_VERSION: Final = 1

# Fewer differences can't give a two-sided p below 0.05: the smallest p of five is 2 / 2**5 = 0.0625.
FEWEST_FOR_TEST: Final = 6

# Decimals of differences. Smaller differences are floating-point rounding errors, not wins or losses.
_DECIMALS: Final = 9

Conclusion = Literal["better", "worse", "none", "mixed", "equal", "untested"]


@dataclass(frozen=True)
class Interval:
    """A confidence interval; both ends are NaN if it is undefined."""

    low: float
    high: float


@dataclass(frozen=True)
class PairedComparison:
    """Comparison of a model with the baseline over the same cases, by one metric, for one label or region.

    Differences are the model's value minus the baseline's. Metrics that are best at zero (volume errors) are compared
    by their absolute values.

    Attributes:
        model: The model.
        baseline: The baseline.
        region: Label or region, or "mean".
        metric: Key of the metric.
        count: Number of differences: one per case, or one per group if groups are given.
        left_out: Cases in which the model or the baseline has no value.
        model_mean: Mean of the model.
        baseline_mean: Mean of the baseline over the same cases.
        mean_difference: In the metric's unit.
        mean_interval: Confidence interval of the mean difference.
        median_difference: In the metric's unit.
        median_interval: Confidence interval of the median difference.
        p_value: Two-sided p of the Wilcoxon signed-rank test; NaN if there are too few differences.
        p_corrected: p after Holm's correction over all models and regions of this metric.
        effect: Matched-pairs rank-biserial correlation, from -1 (worse in every case) to 1 (better in every case).
        wins: Number of cases or groups in which the model is better.
        ties: Number of cases or groups in which both are equal.
        losses: Number of cases or groups in which the model is worse.
        confidence: Confidence level of the intervals. A p_corrected below 1 - confidence is significant.
        grouped: Whether there is one difference per group.
        conclusion: "better" or "worse"; "none" if the test is not significant; "mixed" if the test is significant, but
            the interval of the mean does not confirm it; "equal" if no case has a difference; "untested" if there are
            too few differences.
        sentence: The conclusion as a sentence.
    """

    model: str
    baseline: str
    region: str
    metric: str
    count: int
    left_out: tuple[str, ...]
    model_mean: float
    baseline_mean: float
    mean_difference: float
    mean_interval: Interval
    median_difference: float
    median_interval: Interval
    p_value: float
    p_corrected: float
    effect: float
    wins: int
    ties: int
    losses: int
    confidence: float
    grouped: bool
    conclusion: Conclusion
    sentence: str


def compare_paired(
    values: Mapping[str, Mapping[str, Mapping[str, Mapping[str, float]]]],
    baseline: str,
    *,
    models: Sequence[str] | None = None,
    regions: Sequence[str] | None = None,
    metrics: Sequence[str] | None = None,
    groups: Mapping[str, str] | None = None,
    definitions: Mapping[str, Metric] = METRICS,
    confidence: float = 0.95,
    samples: int = 10000,
    seed: int = 0,
) -> list[PairedComparison]:
    """Compare models with a baseline, metric by metric and region by region.

    Args:
        values: Scores by model, case, region and metric, as in `Scores.values`.
        baseline: The model that the others are compared with.
        models: Models to compare with the baseline; all others by default.
        regions: Labels or regions; by default all regions of the baseline, including "mean".
        metrics: Keys of metrics; by default all measured metrics in `definitions` that have a better direction.
        groups: Group of every case, if cases are not independent: the patient, for example, if there are several time
            points. Differences are averaged within each group, which then counts once.
        definitions: The metrics of the values, by key.
        confidence: Confidence level of the intervals; the significance level of the test is 1 - confidence.
        samples: Number of bootstrap samples.
        seed: Seed of the bootstrap. The same seed gives the same result, independent of the other comparisons.

    Returns:
        The comparisons, ordered by metric, then region, then model.

    Raises:
        ValueError: Models were scored on different cases or regions, or a name is unknown.

    Source:
        Wilcoxon, Biometrics Bulletin 1945; Holm, Scandinavian Journal of Statistics 1979; Efron, Journal of the
        American Statistical Association 1987 (BCa intervals); Kerby, Comprehensive Psychology 2014 (rank-biserial).
    """
    others = [name for name in values if name != baseline] if models is None else list(models)
    errors = list(_name_errors(values, [baseline, *others], confidence, samples))
    if errors:
        raise ValueError("\n".join(errors))
    first = next(iter(values[baseline].values()))
    chosen_regions = list(first) if regions is None else list(regions)
    measured = next(iter(first.values()))
    compared = [m.key for m in definitions.values() if m.better != "none" and m.key in measured]
    chosen_metrics = compared if metrics is None else list(metrics)
    errors = list(_case_errors(values, baseline, others, chosen_regions, chosen_metrics, groups, definitions))
    if errors:
        raise ValueError("\n".join(errors))

    pairs = [
        _pair(values, model, baseline, region, definitions[key], groups)
        for key in chosen_metrics
        for region in chosen_regions
        for model in others
    ]
    differences = [pair.differences for pair in pairs]
    means = mean_intervals(differences, confidence=confidence, samples=samples, seed=seed)
    medians = median_intervals(differences, confidence=confidence, samples=samples, seed=seed)
    found = [
        _compare(*each, confidence=confidence, grouped=groups is not None)
        for each in zip(pairs, means, medians, strict=True)
    ]
    comparisons = []
    for key in chosen_metrics:
        family = [comparison for comparison in found if comparison.metric == key]
        corrected = holm([comparison.p_value for comparison in family])
        comparisons += [
            _conclude(replace(comparison, p_corrected=p), definitions[key])
            for comparison, p in zip(family, corrected, strict=True)
        ]
    return comparisons


# --- single steps ---------------------------------------------------------------------------------------------------


def wilcoxon(differences: NDArray[np.float64]) -> float:
    """Compute the two-sided p of the Wilcoxon signed-rank test.

    Args:
        differences: Paired differences; zeros are left out, as in Wilcoxon's test.

    Returns:
        The p value; 1 if all differences are zero. It is exact for up to 50 differences without ties in their absolute
        values and for up to 13 with ties; beyond, it is that of the normal approximation.
    """
    from scipy.stats import wilcoxon as signed_rank

    not_zero = differences[differences != 0]
    if not not_zero.size:
        return 1.0
    return float(min(1.0, signed_rank(not_zero).pvalue))


def holm(p_values: Sequence[float]) -> list[float]:
    """Apply Holm's correction to the p values of a family of tests.

    Args:
        p_values: One per comparison; NaN for a comparison that was not tested and does not belong to the family.

    Returns:
        The corrected p values in the same order, at most 1.
    """
    corrected = [math.nan] * len(p_values)
    tested = sorted((p, index) for index, p in enumerate(p_values) if not math.isnan(p))
    highest = 0.0
    for rank, (p, index) in enumerate(tested):
        highest = max(highest, min(1.0, (len(tested) - rank) * p))
        corrected[index] = highest
    return corrected


def rank_biserial(differences: NDArray[np.float64]) -> float:
    """Compute the matched-pairs rank-biserial correlation.

    Args:
        differences: Paired differences; zeros are left out.

    Returns:
        Rank sum of the positive differences minus that of the negative ones, divided by the total rank sum: from -1
        (all are negative) to 1 (all are positive), 0 if all are zero.
    """
    from scipy.stats import rankdata

    not_zero = differences[differences != 0]
    if not not_zero.size:
        return 0.0
    ranks = rankdata(np.abs(not_zero))
    return float((ranks * np.sign(not_zero)).sum() / ranks.sum())


def mean_intervals(
    series: Sequence[Sequence[float] | NDArray[np.float64]],
    groups: Sequence[Sequence[str] | None] | None = None,
    *,
    confidence: float = 0.95,
    samples: int = 10000,
    seed: int = 0,
) -> list[Interval]:
    """Compute bias-corrected and accelerated (BCa) bootstrap intervals of means.

    Args:
        series: One series of values per mean, without NaN.
        groups: For each series, the group of every value, if the values of a group are not independent. The bootstrap
            then samples groups with all their values.
        confidence: Confidence level, between 0 and 1.
        samples: Number of bootstrap samples.
        seed: Seed of the bootstrap of each series.

    Returns:
        One interval per series; NaN for fewer than two values or groups, a single point if all values or group means
        are equal.
    """
    data = [_sums_and_sizes(*pair) for pair in zip(series, groups or [None] * len(series), strict=True)]
    return _bootstrap(data, _means, "BCa", confidence, samples, seed)


def _sums_and_sizes(values: Sequence[float] | NDArray[np.float64], groups: Sequence[str] | None) -> NDArray[np.float64]:
    """Return the sum and the number of the values of each group, shape (2, groups)."""
    if groups is None:
        return np.stack([np.asarray(values, np.float64), np.ones(len(values))])
    members: dict[str, list[float]] = defaultdict(list)
    for value, group in zip(values, groups, strict=True):
        members[group].append(value)
    return np.array([[math.fsum(of) for of in members.values()], [len(of) for of in members.values()]], np.float64)


def median_intervals(
    series: Sequence[Sequence[float] | NDArray[np.float64]],
    *,
    confidence: float = 0.95,
    samples: int = 10000,
    seed: int = 0,
) -> list[Interval]:
    """Compute percentile bootstrap intervals of medians, for which the acceleration of BCa is not defined.

    Args:
        series: As for `mean_intervals`.
        confidence: Confidence level, between 0 and 1.
        samples: Number of bootstrap samples.
        seed: As for `mean_intervals`.

    Returns:
        As `mean_intervals`.
    """
    data = [np.asarray(values, np.float64)[np.newaxis] for values in series]
    return _bootstrap(data, _medians, "percentile", confidence, samples, seed)


def _bootstrap(
    series: Sequence[NDArray[np.float64]],
    statistic: Callable[[NDArray[np.float64], NDArray[np.int32]], NDArray[np.float64]],
    method: str,
    confidence: float,
    samples: int,
    seed: int,
) -> list[Interval]:
    """Compute bootstrap intervals of a statistic. Series of the same length share their samples.

    Args:
        series: Arrays (rows, units); units are resampled, and all numbers of a unit are in its column.
        statistic: Function of series (S, rows, units) and samples (D, units), which contain how often each unit was
            drawn. Returns (S, D).
        method: SciPy's name of the method.
        confidence: Confidence level, between 0 and 1.
        samples: Number of bootstrap samples.
        seed: Seed of the bootstrap.
    """
    from scipy.stats import bootstrap

    intervals = [Interval(math.nan, math.nan)] * len(series)
    by_length: dict[int, list[int]] = defaultdict(list)
    for number, data in enumerate(series):
        if data.shape[1] < 2:
            continue
        # Compare the statistic of each unit, not the columns: groups can have different sizes but equal means.
        alone = statistic(data[np.newaxis], np.eye(data.shape[1], dtype=np.int32))[0]
        if np.ptp(alone) == 0:
            intervals[number] = Interval(float(alone[0]), float(alone[0]))
        else:
            by_length[data.shape[1]].append(number)
    for length, numbers in by_length.items():
        together = np.stack([series[number] for number in numbers])

        def of_drawings(
            drawn: NDArray[np.intp], axis: int = -1, length: int = length, together: NDArray[np.float64] = together
        ) -> NDArray[np.float64]:
            found = statistic(together, _counts(np.atleast_2d(drawn), length))
            return found if drawn.ndim > 1 else found[:, 0]

        found = bootstrap(
            (np.arange(length),),
            of_drawings,
            confidence_level=confidence,
            n_resamples=samples,
            # Limits memory to a few MB.
            batch=max(1, 1_000_000 // length),
            method=method,
            random_state=np.random.default_rng(seed),
        ).confidence_interval
        for number, low, high in zip(numbers, found.low, found.high, strict=True):
            intervals[number] = Interval(float(low), float(high))
    return intervals


def _counts(drawn: NDArray[np.intp], length: int) -> NDArray[np.int32]:
    """Count how often each unit was drawn, shape (D, units), from the indices of the drawn units, shape (D, any)."""
    rows = np.arange(len(drawn))[:, np.newaxis] * length
    return np.bincount((rows + drawn).ravel(), minlength=len(drawn) * length).reshape(-1, length).astype(np.int32)


def _means(series: NDArray[np.float64], counts: NDArray[np.int32]) -> NDArray[np.float64]:
    totals = (series.reshape(-1, series.shape[-1]) @ counts.T.astype(np.float64)).reshape(*series.shape[:2], -1)
    means = totals[:, 0] / totals[:, 1]
    # Round, so that equal means are equal numbers regardless of the order of summation.
    scale = np.abs(series[:, 0]).max(axis=1, keepdims=True)
    scale[scale == 0] = 1
    return np.asarray(np.round(means / scale, 12) * scale, np.float64)


def _medians(series: NDArray[np.float64], counts: NDArray[np.int32]) -> NDArray[np.float64]:
    units = counts.shape[1]
    # The median of a sample has a rank near the middle: only eight standard deviations to both sides are searched.
    reach = 4 * math.isqrt(units) + 4
    start, stop = max(0, units // 2 - reach), units // 2 + reach
    middle = (int(counts[0].sum()) - 1) / 2
    columns = np.ascontiguousarray(counts.T, np.int16 if units < 1 << 15 else np.int32)
    order = np.argsort(series[:, 0], axis=1)
    outside = np.zeros((len(series), units), np.float32)
    np.put_along_axis(outside, order[:, :start], 1, axis=1)
    before = (outside @ columns.astype(np.float32)).astype(columns.dtype)
    found = []
    for values, ranks, drawn_before in zip(series[:, 0], order, before, strict=True):
        near = ranks[start:stop]
        drawn = np.cumsum(columns[near], axis=0, dtype=columns.dtype)
        drawn += drawn_before
        if (drawn_before > middle).any() or (drawn[-1] <= middle).any():
            near, drawn = ranks, np.cumsum(columns[ranks], axis=0, dtype=columns.dtype)
        # The k-th value of a sample (from 0) is the first at which more than k draws have accumulated.
        low, high = (values[near[(drawn <= place).sum(axis=0)]] for place in (math.floor(middle), math.ceil(middle)))
        found.append((low + high) / 2)
    return np.array(found)


# --- one comparison -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Pair:
    """Values of a model and the baseline in one metric and region.

    Attributes:
        model: The model.
        baseline: The baseline.
        region: Label or region.
        metric: The metric.
        means: Mean of the model and of the baseline for every case or group, shape (groups, 2).
        left_out: Cases in which the model or the baseline has no value.
    """

    model: str
    baseline: str
    region: str
    metric: Metric
    means: NDArray[np.float64]
    left_out: tuple[str, ...]

    @property
    def differences(self) -> NDArray[np.float64]:
        """The model's values minus the baseline's."""
        found: NDArray[np.float64] = np.round(self.means[:, 0] - self.means[:, 1], _DECIMALS)
        return found


def _pair(
    values: Mapping[str, Mapping[str, Mapping[str, Mapping[str, float]]]],
    model: str,
    baseline: str,
    region: str,
    metric: Metric,
    groups: Mapping[str, str] | None,
) -> _Pair:
    members: dict[str, list[tuple[float, float]]] = defaultdict(list)
    left_out = []
    for case in values[baseline]:
        own, other = (metric.compared(values[name][case][region][metric.key]) for name in (model, baseline))
        if math.isnan(own) or math.isnan(other):
            left_out.append(case)
        else:
            members[case if groups is None else groups[case]].append((own, other))
    means = [[sum(of) / len(of) for of in zip(*pairs, strict=True)] for pairs in members.values()]
    return _Pair(model, baseline, region, metric, np.array(means).reshape(-1, 2), tuple(left_out))


def _compare(pair: _Pair, mean: Interval, median: Interval, *, confidence: float, grouped: bool) -> PairedComparison:
    """Compute all numbers of a comparison, except for the corrected p and the conclusion."""
    differences = pair.differences
    # Positive where the model is better.
    gains = differences if pair.metric.higher_is_better else -differences
    none = differences.size == 0
    return PairedComparison(
        model=pair.model,
        baseline=pair.baseline,
        region=pair.region,
        metric=pair.metric.key,
        count=differences.size,
        left_out=pair.left_out,
        model_mean=math.nan if none else float(pair.means[:, 0].mean()),
        baseline_mean=math.nan if none else float(pair.means[:, 1].mean()),
        mean_difference=math.nan if none else float(differences.mean()),
        mean_interval=mean,
        median_difference=math.nan if none else float(np.median(differences)),
        median_interval=median,
        p_value=wilcoxon(differences) if differences.size >= FEWEST_FOR_TEST else math.nan,
        p_corrected=math.nan,
        effect=math.nan if none else rank_biserial(gains),
        wins=int((gains > 0).sum()),
        ties=int((gains == 0).sum()),
        losses=int((gains < 0).sum()),
        confidence=confidence,
        grouped=grouped,
        conclusion="untested",
        sentence="",
    )


def _conclude(comparison: PairedComparison, metric: Metric) -> PairedComparison:
    concluded = replace(comparison, conclusion=_conclusion(comparison, metric))
    return replace(concluded, sentence=_sentence(concluded, metric))


def _conclusion(comparison: PairedComparison, metric: Metric) -> Conclusion:
    if comparison.count and not comparison.wins and not comparison.losses:
        return "equal"
    if math.isnan(comparison.p_corrected):
        return "untested"
    if comparison.p_corrected >= 1 - comparison.confidence:
        return "none"
    higher_is_better = metric.higher_is_better
    interval = comparison.mean_interval
    # The test uses ranks, the mean the differences themselves: one large failure can outweigh many small gains.
    if interval.low > 0 and (comparison.effect > 0) == higher_is_better:
        return "better" if higher_is_better else "worse"
    if interval.high < 0 and (comparison.effect < 0) == higher_is_better:
        return "worse" if higher_is_better else "better"
    return "mixed"


def _sentence(comparison: PairedComparison, metric: Metric) -> str:
    unit = "group" if comparison.grouped else "case"
    on = f"On {_number_of(comparison.count, unit)}"
    region = "averaged over the regions" if comparison.region == MEAN else f"of {comparison.region}"
    what, than = f"{comparison.model}'s {metric.phrase} {region}", f"than {comparison.baseline}'s"
    number = len(comparison.left_out)
    left_out = f" {_number_of(number, 'case')} without a value left out." if number else ""
    if not comparison.count:
        return f"No case has a value of {what} to compare with {comparison.baseline}'s.{left_out}"
    if comparison.conclusion == "equal":
        return f"{on}, {what} is the same as {comparison.baseline}'s.{left_out}"

    difference, low, high = comparison.mean_difference, comparison.mean_interval.low, comparison.mean_interval.high
    decimals = _decimals(metric, (difference, low, high))
    sentence = (
        f"{on}, {what} is {'higher' if difference > 0 else 'lower'} {than} by {_amount(metric, difference, decimals)}"
    )
    if difference == 0:
        sentence = f"{on}, {what} is on average the same as {comparison.baseline}'s"
    if difference < 0:
        # As in "lower by 2 mm (1 to 3)": a minus sign marks the opposite direction.
        low, high = -high, -low
    ends = (metric.text(end, decimals=decimals, unit=False) for end in (low, high))
    notes = [] if math.isnan(low) else [f"{100 * comparison.confidence:g} % interval {' to '.join(ends)}"]
    if not math.isnan(comparison.p_corrected):
        notes.append(f"p {_p_text(comparison.p_corrected)} after Holm")
    if notes:
        sentence += f" ({'; '.join(notes)})"
    if comparison.conclusion == "untested":
        need = f"a test needs {_number_of(FEWEST_FOR_TEST, unit)}"
        return f"{sentence}: too few to conclude anything, {need}.{left_out}"
    if comparison.conclusion == "mixed":
        most = "better" if comparison.effect > 0 else "worse"
        return (
            f"{sentence}: {most} in the typical {unit} by the test, but not on average; look at the {unit}s with the "
            f"largest differences.{left_out}"
        )
    if comparison.conclusion == "none":
        return f"{sentence}: no difference can be concluded.{left_out}"
    return f"{sentence}: {comparison.conclusion}.{left_out}"


def _number_of(count: int, unit: str) -> str:
    return f"{count} {unit}" if count == 1 else f"{count} {unit}s"


def _decimals(metric: Metric, values: Sequence[float]) -> int:
    """Return the metric's number of decimals, or up to two more if a non-zero value would be shown as zero."""
    fewest = metric.decimals or 2  # means of counts are not integers
    for decimals in (fewest, fewest + 1):
        if all(value == 0 or round(value, decimals) != 0 for value in values):
            return decimals
    return fewest + 2


def _amount(metric: Metric, difference: float, decimals: int) -> str:
    smallest = 10.0**-decimals
    too_small = abs(difference) < smallest / 2
    number = metric.text(smallest if too_small else abs(difference), decimals=decimals, unit=False)
    # "Lower by 2 %" would mean a relative difference.
    unit = "percentage points" if metric.unit == "%" else metric.unit
    return f"{'less than ' if too_small else ''}{number}{' ' if unit else ''}{unit}"


def _p_text(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"= {p:.3f}" if p < 0.1 else f"= {p:.2f}"


# --- what is compared -----------------------------------------------------------------------------------------------


def _name_errors(values: Mapping[str, Any], models: Sequence[str], confidence: float, samples: int) -> Iterator[str]:
    for name in dict.fromkeys(models):
        if name not in values:
            yield f"{name!r} is not among the models scored; expected one of {', '.join(values)}."
        elif not values[name]:
            yield f"{name!r} has no case scored; expected one or more."
    if len(set(models)) < len(models):
        yield f"A model is named twice among {', '.join(models)}; expected the baseline and others, once each."
    if not 0 < confidence < 1:
        yield f"confidence is {confidence}; expected a number between 0 and 1."
    if samples < 1:
        yield f"samples is {samples}; expected 1 or more."


def _case_errors(
    values: Mapping[str, Mapping[str, Mapping[str, Mapping[str, float]]]],
    baseline: str,
    models: Sequence[str],
    regions: Sequence[str],
    metrics: Sequence[str],
    groups: Mapping[str, str] | None,
    definitions: Mapping[str, Metric],
) -> Iterator[str]:
    for key in metrics:
        if key not in definitions:
            yield f"{key!r} is not a metric; expected some of {', '.join(definitions)}."
        elif definitions[key].better == "none":
            yield f"{key!r} cannot be compared: neither high nor low values are better."
    cases = set(values[baseline])
    for model in models:
        for here, there, which in (
            (baseline, model, cases - set(values[model])),
            (model, baseline, set(values[model]) - cases),
        ):
            if which:
                yield (
                    f"{len(which)} case{'' if len(which) == 1 else 's'} of {here} {'is' if len(which) == 1 else 'are'} "
                    f"not among those of {there}: {first_few(sorted(which))}; expected the same cases of both."
                )
    for model in (baseline, *models):
        for region in regions:
            without = [case for case, scores in values[model].items() if region not in scores]
            if without:
                yield f"{model} has no score of {region!r} for {first_few(without)}; expected it for all cases."
    if groups is not None:
        without = sorted(cases - set(groups))
        if without:
            yield f"No group is named for {first_few(without)}; expected one for every case."
