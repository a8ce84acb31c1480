import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from scipy.stats import bootstrap

from nnunet_conres.evaluation.metrics import METRICS
from nnunet_conres.evaluation.statistics import (
    Interval,
    PairedComparison,
    compare_paired,
    holm,
    mean_intervals,
    median_intervals,
    rank_biserial,
    wilcoxon,
)


def scores(
    models: Mapping[str, Sequence[float]], metric: str = "dice", region: str = "tumour"
) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    return {
        model: {f"case_{number}": {region: {metric: float(value)}} for number, value in enumerate(values)}
        for model, values in models.items()
    }


def compare(own: Sequence[float], base: Sequence[float], metric: str = "dice", **keywords: Any) -> PairedComparison:
    (found,) = compare_paired(scores({"base": base, "own": own}, metric), "base", metrics=[metric], **keywords)
    return found


def mean_interval(values: Sequence[float], groups: Sequence[str] | None = None, **keywords: Any) -> Interval:
    return mean_intervals([values], [groups], **keywords)[0]


def median_interval(values: Sequence[float], **keywords: Any) -> Interval:
    return median_intervals([values], **keywords)[0]


# --- second implementations -----------------------------------------------------------------------------------------


def midranks(sizes: Sequence[float]) -> list[float]:
    return [sum(other < size for other in sizes) + (sum(other == size for other in sizes) + 1) / 2 for size in sizes]


def wilcoxon_by_enumeration(differences: Sequence[float]) -> float:
    """Return the share of sign assignments whose rank sum is at least as far from the middle as the observed one."""
    values = [d for d in differences if d]
    ranks = midranks([abs(d) for d in values])
    middle = sum(ranks) / 2
    observed = abs(sum(r for r, d in zip(ranks, values, strict=True) if d > 0) - middle)
    ways = [
        abs(sum(r for r, sign in zip(ranks, signs, strict=True) if sign) - middle)
        for signs in itertools.product((0, 1), repeat=len(ranks))
    ]
    return sum(way >= observed - 1e-9 for way in ways) / len(ways)


def bca_by_hand(values: np.ndarray, samples: int, seed: int) -> tuple[float, float]:
    """Compute a BCa interval by Efron and Tibshirani, An Introduction to the Bootstrap, equations 14.9 to 14.15."""
    from statistics import NormalDist

    normal = NormalDist()
    drawn = np.random.default_rng(seed).choice(values, (samples, len(values))).mean(1)
    bias = normal.inv_cdf(float((drawn < values.mean()).mean()))
    jackknife = np.array([np.delete(values, i).mean() for i in range(len(values))])
    spread = jackknife.mean() - jackknife
    acceleration = (spread**3).sum() / (6 * (spread**2).sum() ** 1.5)
    ends = []
    for share in (0.025, 0.975):
        z = bias + normal.inv_cdf(share)
        ends.append(float(np.quantile(drawn, normal.cdf(bias + z / (1 - acceleration * z)))))
    return ends[0], ends[1]


# --- tests ----------------------------------------------------------------------------------------------------------


class TestWilcoxon:
    @pytest.mark.parametrize("count", [6, 7, 9, 10])
    @pytest.mark.parametrize("kind", ["different", "ties", "ties and zeros"])
    def test_equals_all_signs(self, count: int, kind: str) -> None:
        rng = np.random.default_rng(count)
        for shift in (0.0, 0.5, 3.0):
            values = rng.normal(shift, 1, count)
            if kind != "different":
                values = np.round(values * 2) / 2
                values[values == 0] = 0.5
            if kind == "ties and zeros":
                values[:2] = 0
            assert wilcoxon(values) == pytest.approx(wilcoxon_by_enumeration(values))

    def test_by_hand(self) -> None:
        # All six have the same sign: two of 64 sign assignments are as far from the middle.
        assert wilcoxon(np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])) == pytest.approx(2 / 64)
        # Ranks 1 to 6, of which 1 is negative: the sets {} and {1} at either end are as far from the middle.
        assert wilcoxon(np.array([-0.1, 0.2, 0.3, 0.4, 0.5, 0.6])) == pytest.approx(4 / 64)

    def test_many(self) -> None:
        # 200 differences: normal approximation of the rank sum, with ties.
        values = np.round(np.random.default_rng(0).normal(0.15, 1, 200), 1)
        kept = values[values != 0]
        ranks = np.array(midranks(list(np.abs(kept))))
        spread = math.sqrt((ranks**2).sum() / 4)
        z = (ranks[kept > 0].sum() - ranks.sum() / 2) / spread
        assert wilcoxon(values) == pytest.approx(math.erfc(abs(z) / math.sqrt(2)), rel=0.02)

    def test_no_difference(self) -> None:
        assert wilcoxon(np.zeros(8)) == 1


class TestHolm:
    def test_by_hand(self) -> None:
        # 3 x 0.01; 2 x 0.03; 1 x 0.04, but no less than the one before.
        assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
        assert holm([0.6, 0.5]) == [1, 1]
        assert holm([0.02]) == [0.02]
        assert holm([]) == []

    def test_what_was_not_tested_is_not_counted(self) -> None:
        found = holm([0.02, math.nan, 0.01])
        assert found[::2] == pytest.approx([0.02, 0.02])
        assert math.isnan(found[1])

    def test_rejects_as_the_stepwise_procedure(self) -> None:
        rng = np.random.default_rng(0)
        for _ in range(50):
            p = rng.random(7) ** 3 / 3
            rejected = np.zeros(7, bool)
            for step, index in enumerate(np.argsort(p)):
                if p[index] > 0.05 / (7 - step):
                    break
                rejected[index] = True
            np.testing.assert_array_equal(np.array(holm(list(p))) <= 0.05, rejected)


class TestRankBiserial:
    def test_by_hand(self) -> None:
        # Ranks 1, 2, 3 and 4, of which 2 is negative: (8 - 2) / 10.
        assert rank_biserial(np.array([0.1, -0.2, 0.3, 0.4, 0.0])) == pytest.approx(0.6)
        # Ranks 1.5, 1.5 and 3: (1.5 - 4.5) / 6.
        assert rank_biserial(np.array([1.0, -1.0, -2.0])) == pytest.approx(-0.5)

    @pytest.mark.parametrize(("values", "expected"), [([1, 2], 1), ([-1, -2], -1), ([0, 0], 0), ([], 0)])
    def test_ends(self, values: list[float], expected: float) -> None:
        assert rank_biserial(np.array(values, dtype=float)) == expected


class TestIntervals:
    def test_mean_equals_a_second_implementation(self) -> None:
        values = np.random.default_rng(1).exponential(1, 25)  # skewed, so that bias and acceleration matter
        found = mean_interval(values, samples=100000)
        assert (found.low, found.high) == pytest.approx(bca_by_hand(values, 100000, 7), abs=0.02)
        # A percentile interval differs clearly.
        drawn = np.random.default_rng(8).choice(values, (100000, 25)).mean(1)
        assert abs(found.high - np.quantile(drawn, 0.975)) > 0.04

    def test_median_equals_a_second_implementation(self) -> None:
        values = np.random.default_rng(2).normal(0, 1, 31)
        found = median_interval(values, samples=20000)
        drawn = np.median(np.random.default_rng(3).choice(values, (20000, 31)), axis=1)
        assert (found.low, found.high) == pytest.approx(tuple(np.quantile(drawn, (0.025, 0.975))), abs=0.03)

    @pytest.mark.parametrize("kind", ["mean", "median"])
    def test_many_series_equal_scipys_one_by_one(self, kind: str) -> None:
        rng = np.random.default_rng(0)
        # several lengths, with and without ties; the median of the longest is searched near the middle only
        series = [rng.gamma(2, size=n) for n in (40, 41, 41, 600)]
        # integers, because rounding may make SciPy treat equal means of other numbers as different
        series += [rng.integers(0, 9, n) * 1.0 for n in (6, 7, 41, 600)]
        found = (mean_intervals if kind == "mean" else median_intervals)(series, samples=500, seed=3)
        for values, interval in zip(series, found, strict=True):
            expected = bootstrap(
                (values,),
                np.mean if kind == "mean" else np.median,
                n_resamples=500,
                method="BCa" if kind == "mean" else "percentile",
                random_state=np.random.default_rng(3),
            ).confidence_interval
            assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high), rel=1e-9)

    @pytest.mark.filterwarnings("error")
    def test_the_same_in_groups_of_different_sizes(self) -> None:
        assert mean_interval([0.0, 0.0, 0.0], ["a", "a", "b"]) == Interval(0.0, 0.0)
        found = mean_interval([0.1, 0.1, 0.1, 0.1], ["a", "a", "a", "b"])
        assert (found.low, found.high) == pytest.approx((0.1, 0.1), rel=1e-9)

    def test_the_order_of_summing_up_does_not_matter(self) -> None:
        """Many means of 12 numbers with one decimal are equal, but their floating-point sums differ."""
        tenths = [3.0, 9.0, 1.0, 7.0, 7.0, 2.0, 8.0, 1.0, 6.0, 4.0, 3.0, 7.0]
        exact, found = mean_interval(tenths), mean_interval([value / 10 for value in tenths])
        assert (found.low, found.high) == pytest.approx((exact.low / 10, exact.high / 10), rel=1e-9)

    def test_the_seed_decides(self) -> None:
        values = np.random.default_rng(1).normal(0, 1, 20)
        assert mean_interval(values, samples=500) == mean_interval(values, samples=500)
        assert mean_interval(values, samples=500) != mean_interval(values, samples=500, seed=1)

    def test_confidence(self) -> None:
        values = np.random.default_rng(1).normal(0, 1, 20)
        wide, narrow = (mean_interval(values, confidence=c) for c in (0.99, 0.8))
        assert wide.low < narrow.low < narrow.high < wide.high

    def test_groups_are_drawn_whole(self) -> None:
        rng = np.random.default_rng(4)
        sizes = rng.integers(1, 5, 25)
        groups = np.repeat(np.arange(25), sizes)
        values = rng.normal(0, 1, 25)[groups] + rng.normal(0, 0.1, groups.size)
        found = mean_interval(values, [f"p{group}" for group in groups])
        drawn = []
        for chosen in rng.integers(0, 25, (4000, 25)):
            members = np.concatenate([values[groups == group] for group in chosen])
            drawn.append(members.mean())
        assert (found.low, found.high) == pytest.approx(tuple(np.quantile(drawn, (0.025, 0.975))), abs=0.06)
        alone = mean_interval(values)
        assert found.high - found.low > 1.2 * (alone.high - alone.low)
        assert mean_interval(values, [str(number) for number in range(values.size)]) == alone

    def test_one_group(self) -> None:
        assert math.isnan(mean_interval([0.1, 0.2], ["p", "p"]).low)

    def test_few_and_equal(self) -> None:
        assert mean_interval([0.25] * 4) == Interval(0.25, 0.25)
        assert math.isnan(mean_interval([0.25]).low)
        assert math.isnan(median_interval([]).high)


class TestComparePaired:
    def test_numbers(self) -> None:
        base = [0.5, 0.6, 0.7, 0.8, 0.9, 0.4, 0.3]
        steps = [0.01, 0.02, -0.03, 0.04, 0.05, 0.06, 0.0]
        found = compare([b + s for b, s in zip(base, steps, strict=True)], base)
        assert (found.count, found.wins, found.ties, found.losses) == (7, 5, 1, 1)
        assert found.mean_difference == pytest.approx(0.15 / 7)
        assert found.median_difference == pytest.approx(0.02)
        assert found.baseline_mean == pytest.approx(np.mean(base))
        assert found.model_mean == pytest.approx(np.mean(base) + 0.15 / 7)
        # Ranks 1 to 6, of which 3 is negative.
        assert found.effect == pytest.approx((18 - 3) / 21)
        assert found.p_value == found.p_corrected == pytest.approx(wilcoxon_by_enumeration(steps))
        assert found.mean_interval.low < found.mean_difference < found.mean_interval.high
        assert found.conclusion == "none"

    @pytest.mark.parametrize(
        ("metric", "sign", "conclusion", "direction"),
        [
            ("dice", 1, "better", "higher"),
            ("dice", -1, "worse", "lower"),
            ("hd95", 1, "worse", "higher"),
            ("hd95", -1, "better", "lower"),
        ],
    )
    def test_direction(self, metric: str, sign: int, conclusion: str, direction: str) -> None:
        base = np.linspace(0.5, 0.8, 12)
        found = compare(base + sign * np.linspace(0.01, 0.02, 12), base, metric)
        assert found.conclusion == conclusion
        assert found.effect == (1 if conclusion == "better" else -1)
        assert (found.wins, found.losses) == ((12, 0) if conclusion == "better" else (0, 12))
        assert f"is {direction} than base's by 0.01" in found.sentence
        assert found.sentence.endswith(f": {conclusion}.")

    def test_volume_errors_without_sign(self) -> None:
        base = np.linspace(-8, -4, 10)
        found = compare(-base / 2, base, "volume_error")
        assert found.conclusion == "better"
        assert found.mean_difference == pytest.approx(-3)
        assert found.baseline_mean == pytest.approx(6)
        assert "absolute volume error of tumour is lower than base's by 3.00 ml" in found.sentence

    def test_sentence(self) -> None:
        base = np.full(10, 0.8)
        found = compare(base + np.arange(1, 11) / 1000, base)
        low, high = found.mean_interval.low, found.mean_interval.high
        assert found.sentence == (
            "On 10 cases, own's Dice of tumour is higher than base's by 0.005 "
            f"(95 % interval {low:.3f} to {high:.3f}; p = 0.002 after Holm): better."
        )
        found = compare(np.full(11, 0.8) - np.arange(1, 12) / 10000, np.full(11, 0.8), confidence=0.9)
        low, high = found.mean_interval.low, found.mean_interval.high
        assert found.sentence == (
            "On 11 cases, own's Dice of tumour is lower than base's by 0.0006 "
            f"(90 % interval {-high:.4f} to {-low:.4f}; p < 0.001 after Holm): worse."
        )

    @pytest.mark.parametrize(
        ("metric", "step", "text"),
        [
            ("hd95", 2.0, "by 2.00 mm ("),
            ("hd95", 0.0012, "by 0.001 mm ("),
            ("hd95", 0.00001, "by less than 0.0001 mm ("),
            ("relative_volume_error", 2.0, "by 2.0 percentage points ("),
            ("lesions_missed", 0.25, "by 0.25 ("),
        ],
    )
    def test_amounts(self, metric: str, step: float, text: str) -> None:
        base = np.linspace(10, 20, 8)
        assert f"higher than base's {text}" in compare(base + step, base, metric).sentence

    def test_nothing_to_conclude(self) -> None:
        base = np.full(8, 0.8)
        found = compare(base + np.array([1, -2, 3, -4, 5, -6, 7, -8]) / 100, base)
        assert found.conclusion == "none"
        assert found.sentence.endswith("after Holm): no difference can be concluded.")
        assert " by 0.005 (95 % interval -0." in found.sentence

    def test_test_and_mean_contradict_each_other(self) -> None:
        base = np.full(15, 0.8)
        steps = np.arange(1, 16) / 1000
        steps[-1] = -0.7  # one failure outweighs fourteen small gains
        found = compare(base + steps, base)
        assert found.p_corrected < 0.05
        assert found.mean_difference < 0 < found.effect
        assert found.conclusion == "mixed"
        assert "better in the typical case by the test, but not on average" in found.sentence

    @pytest.mark.parametrize("metric", ["dice", "hd95"])
    @pytest.mark.parametrize("sign", [1, -1])
    def test_few_large_differences_against_many_small_ones(self, metric: str, sign: int) -> None:
        steps = np.concatenate([np.linspace(-0.002, -0.001, 60), np.linspace(0.4, 0.5, 8)]) * sign
        found = compare(0.5 + steps, np.full(68, 0.5), metric)
        # The test and the interval are both significant, in opposite directions.
        assert found.p_corrected < 0.05
        assert found.mean_interval.low > 0 or found.mean_interval.high < 0
        assert found.conclusion == "mixed"
        typical = "worse" if (sign == 1) == (metric == "dice") else "better"
        assert f": {typical} in the typical case by the test" in found.sentence

    @pytest.mark.parametrize("count", [1, 2, 5])
    def test_few(self, count: int) -> None:
        base = np.full(count, 0.8)
        found = compare(base + np.arange(1, count + 1) / 100, base)
        assert math.isnan(found.p_value)
        assert math.isnan(found.p_corrected)
        assert found.conclusion == "untested"
        assert found.sentence.startswith(f"On {count} case{'s' * (count > 1)}, own's Dice of tumour is higher")
        assert found.sentence.endswith("too few to conclude anything, a test needs 6 cases.")
        assert ("interval" in found.sentence) == (count > 1)
        assert "nan" not in found.sentence

    @pytest.mark.parametrize("count", [1, 3, 8])
    def test_no_difference(self, count: int) -> None:
        values = np.linspace(0.1, 0.9, count)
        # A difference within rounding errors is no difference.
        found = compare(values + 1e-13, values)
        assert (found.conclusion, found.ties, found.effect) == ("equal", count, 0)
        assert found.p_value == 1 if count == 8 else math.isnan(found.p_value)
        assert found.sentence == (f"On {count} case{'s' * (count > 1)}, own's Dice of tumour is the same as base's.")

    def test_cases_without_a_value(self) -> None:
        base = [0.5, math.nan, 0.7, 0.8, 0.9, 0.4, 0.3, 0.2]
        own = [0.6, 0.9, 0.8, math.nan, 0.95, 0.5, 0.31, 0.22]
        found = compare(own, base)
        assert found.left_out == ("case_1", "case_3")
        assert (found.count, found.wins) == (6, 6)
        assert found.baseline_mean == pytest.approx(np.mean([0.5, 0.7, 0.9, 0.4, 0.3, 0.2]))
        assert found.sentence.endswith(" 2 cases without a value left out.")

    def test_no_case_has_a_value(self) -> None:
        found = compare([0.5, 0.6], [math.nan, math.nan])
        assert (found.count, found.conclusion) == (0, "untested")
        assert found.sentence == (
            "No case has a value of own's Dice of tumour to compare with base's. 2 cases without a value left out."
        )
        assert math.isnan(found.mean_difference)
        assert math.isnan(found.mean_interval.low)
        assert found.left_out == ("case_0", "case_1")

    def test_groups_count_once(self) -> None:
        base = np.full(12, 0.5)
        own = base + np.array([0.1, 0.3, 0.02, 0.04, 0.05, 0.06, 0.07, 0.01, 0.01, 0.01, 0.01, 0.01])
        groups = {f"case_{n}": "first" if n < 2 else f"p{min(n, 7)}" for n in range(12)}
        found = compare(own, base, groups=groups)
        # The first group has two cases, the last has five, the others have one each.
        steps = np.array([0.2, 0.02, 0.04, 0.05, 0.06, 0.07, 0.01])
        assert (found.count, found.grouped) == (7, True)
        assert found.mean_difference == pytest.approx(steps.mean())
        assert found.median_difference == pytest.approx(np.median(steps))
        assert found.p_value == pytest.approx(2 / 2**7)
        assert found.sentence.startswith("On 7 groups, ")

    def test_holm_over_models_and_regions_of_a_metric(self) -> None:
        rng = np.random.default_rng(0)
        values: dict[str, Any] = {}
        for model, shift in (("base", 0), ("one", 0.02), ("two", 0.005)):
            values[model] = {
                f"c{n}": {
                    region: {"dice": 0.7 + shift + rng.normal(0, 0.01), "hd95": 5 + rng.normal(0, 1)}
                    for region in ("core", "whole")
                }
                for n in range(12)
            }
        found = compare_paired(values, "base", metrics=["dice", "hd95"], samples=200)
        order = [(c.metric, c.region, c.model) for c in found]
        assert order == list(itertools.product(("dice", "hd95"), ("core", "whole"), ("one", "two")))
        for metric in ("dice", "hd95"):
            family = [c for c in found if c.metric == metric]
            assert [c.p_corrected for c in family] == pytest.approx(holm([c.p_value for c in family]))
        assert any(c.p_corrected > c.p_value for c in found)
        # The other comparisons affect only the correction.
        (alone,) = compare_paired(values, "base", models=["two"], regions=["whole"], metrics=["dice"], samples=200)
        with_others = next(c for c in found if (c.metric, c.region, c.model) == ("dice", "whole", "two"))
        assert alone.mean_interval == with_others.mean_interval
        assert alone.p_value == alone.p_corrected == with_others.p_value

    def test_all_metrics_but_those_that_only_describe(self) -> None:
        cases = {f"c{n}": {"tumour": dict.fromkeys(METRICS, 0.5)} for n in range(2)}
        found = compare_paired({"base": cases, "own": cases}, "base")
        assert [c.metric for c in found] == [key for key in METRICS if not key.endswith(("_volume", "_sd"))]

    def test_different_cases_are_refused(self) -> None:
        values = scores({"base": [0.1, 0.2, 0.3], "own": [0.1, 0.2]})
        values["own"]["other"] = values["own"].pop("case_0")
        with pytest.raises(ValueError, match="the same cases of both") as caught:
            compare_paired(values, "base", metrics=["dice"])
        assert "2 cases of base are not among those of own: case_0, case_2" in str(caught.value)
        assert "1 case of own is not among those of base: other" in str(caught.value)

    @pytest.mark.parametrize(
        ("baseline", "keywords", "message"),
        [
            ("no", {}, "'no' is not among the models"),
            ("base", {"models": ["no"]}, "'no' is not among the models"),
            ("base", {"models": ["base"]}, "named twice"),
            ("base", {"regions": ["no"]}, "no score of 'no'"),
            ("base", {"metrics": ["no"]}, "'no' is not a metric"),
            ("base", {"metrics": ["true_volume"]}, "'true_volume' is not a metric"),
            ("base", {"metrics": ["reference_volume"]}, "cannot be compared"),
            ("base", {"groups": {"case_0": "a"}}, "No group is named for case_1"),
            ("base", {"confidence": 95}, "between 0 and 1"),
            ("base", {"samples": 0}, "samples is 0"),
        ],
    )
    def test_errors(self, baseline: str, keywords: dict[str, Any], message: str) -> None:
        values = scores({"base": [0.1, 0.2], "own": [0.1, 0.2]})
        with pytest.raises(ValueError, match=message):
            compare_paired(values, baseline, **{"metrics": ["dice"], **keywords})
