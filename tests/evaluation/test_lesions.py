"""The challenges' scores, against loops over single lesions and values computed by hand."""

import itertools
import math
from dataclasses import replace
from typing import Any

import cc3d
import numpy as np
import pytest
from scipy.ndimage import (
    binary_dilation,
    binary_erosion,
    distance_transform_edt,
    gaussian_filter,
    generate_binary_structure,
)

from nnunet_conres.evaluation.lesions import challenge_scores
from nnunet_conres.evaluation.rules import Rules, read_rules
from nnunet_conres.evaluation.surfaces import (
    border_distances,
    border_share,
    exact_border_distances,
    pooled_hd95,
    surface_hd95,
)

BALL = generate_binary_structure(3, 2)
A = {"ET": (3,), "TC": (1, 3), "WT": (1, 2, 3), "NETC": (1,)}
B = {"ET": (3,), "NETC": (1,), "SNFH": (2,), "RC": (4,), "TC": (1, 3), "WT": (1, 2, 3)}
ISOTROPIC, ANISOTROPIC = (1.0, 1.0, 1.0), (3.0, 0.8, 0.5)


def maps(seed: int, values: tuple[int, ...], shape: tuple[int, ...] = (14, 20, 22)) -> tuple[np.ndarray, np.ndarray]:
    """Return labels with many lesions, and a disturbed copy."""
    rng = np.random.default_rng(seed)
    reference, prediction = np.zeros((2, *shape), np.uint8)
    for value in values:
        smooth = gaussian_filter(rng.standard_normal(shape), 1.1)
        disturbed = smooth + gaussian_filter(rng.standard_normal(shape), 1.1) * 0.6
        reference[smooth > np.quantile(smooth, 0.96)] = value
        prediction[disturbed > np.quantile(disturbed, 0.96)] = value
    return reference, prediction


def box(*corners: tuple[tuple[int, int], ...], shape: tuple[int, ...] = (12, 16, 40)) -> np.ndarray:
    mask = np.zeros(shape, np.uint8)
    for corner in corners:
        mask[tuple(slice(*side) for side in corner)] = 1
    return mask


# --- second implementations -----------------------------------------------------------------------------------------


def grown(mask: np.ndarray, dilation: int) -> list[np.ndarray]:
    """Return one part of the mask per component of its dilation, along x first, as files are read as x, y, z."""
    dilated = binary_dilation(mask, BALL, iterations=dilation) if dilation else mask
    numbers = cc3d.connected_components(np.ascontiguousarray(dilated.T), connectivity=26).T
    return [mask & (numbers == number) for number in range(1, int(numbers.max()) + 1)]


def joined(lesions: list[np.ndarray], others: list[np.ndarray]) -> list[np.ndarray]:
    by_first: dict[int, np.ndarray] = {}
    alone = []
    for lesion in lesions:
        near = binary_dilation(lesion, BALL)
        touched = [number for number, other in enumerate(others) if (near & other).any()]
        if touched:
            by_first[touched[0]] = by_first.get(touched[0], np.zeros_like(lesion)) | lesion
        else:
            alone.append(lesion)
    return [*by_first.values(), *alone]


def lesions_of(labels: np.ndarray, regions: dict, rules: Rules, smallest: bool, voxel: float) -> dict[str, list]:
    found = {}
    for region, values in regions.items():
        lesions = grown(np.isin(labels, values), rules.dilation.get(region, min(rules.dilation.values())))
        if smallest:
            least = rules.smallest_volume.get(region, min(rules.smallest_volume.values()))
            lesions = [lesion for lesion in lesions if lesion.sum() * voxel > least]
        found[region] = lesions
    for region, others in rules.joined_by.items():
        merged = found[region]
        for other in others:
            merged = joined(
                merged,
                lesions_of(labels, {other: regions[other]}, replace(rules, joined_by={}), smallest, voxel)[other],
            )
        found = {**found, region + "+": merged}
    return {region: found.get(region + "+", found[region]) for region in regions}


def by_hand(reference: np.ndarray, prediction: np.ndarray, spacing: tuple, rules: Rules, regions: dict) -> dict:
    volume = math.prod(spacing)
    true = lesions_of(reference, regions, rules, False, 1)
    if rules.group_predictions:
        predicted = lesions_of(prediction, regions, rules, True, volume if rules.group_predictions == "mm3" else 1)
    else:
        predicted = {}
        for region, values in regions.items():
            numbers = cc3d.connected_components(np.isin(prediction, values), connectivity=26)
            predicted[region] = [numbers == number for number in range(1, int(numbers.max()) + 1)]
    penalty = math.hypot(*reference.shape) if rules.penalty is None else rules.penalty
    scores = {}
    for region in rules.regions:
        rows, met, missed, found = [], set(), 0, 0
        for lesion in true[region]:
            near = binary_dilation(lesion, BALL, iterations=rules.dilation[region])
            hits = [number for number, part in enumerate(predicted[region]) if (part & near).any()]
            met |= set(hits)
            if lesion.sum() * volume <= rules.smallest_volume[region]:
                continue
            union = np.zeros_like(lesion)
            for number in hits:
                union |= predicted[region][number]
            if hits:
                found += 1
                rows.append(
                    (2 * (lesion & union).sum() / (lesion.sum() + union.sum()), surface_hd95(lesion, union, spacing))
                )
            else:
                missed += 1
                rows.append((0, penalty))
        false = len(predicted[region]) - len(met)
        rows += [(0, penalty)] * (false if rules.count_false else 0)
        scores[region] = {
            "lesion_dice": sum(row[0] for row in rows) / len(rows) if rows else 1,
            "lesion_hd95": sum(row[1] for row in rows) / len(rows) if rows else 0,
            "lesions_found": found,
            "lesions_missed": missed,
            "lesions_false": false,
        }
    return scores


def components(mask: np.ndarray) -> list[np.ndarray]:
    numbers = cc3d.connected_components(mask, connectivity=26)
    return [numbers == number for number in range(1, int(numbers.max()) + 1)]


def best_matching(reference: np.ndarray, prediction: np.ndarray) -> float:
    """Return the highest sum of Dice over all one-to-one matchings."""
    lesions, parts = components(reference), components(prediction)
    few, many = sorted((lesions, parts), key=len)
    dice = [[2 * (a & b).sum() / (a.sum() + b.sum()) for b in many] for a in few]
    return max(
        sum(row[place] for row, place in zip(dice, order, strict=True))
        for order in itertools.permutations(range(len(many)), len(few))
    )


# --- surfaces -------------------------------------------------------------------------------------------------------


def blobs(seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    smooth = gaussian_filter(rng.standard_normal((9, 12, 11)), 1.3)
    disturbed = smooth + gaussian_filter(rng.standard_normal((9, 12, 11)), 1.0) * 0.6
    return smooth > np.quantile(smooth, 0.65), disturbed > np.quantile(disturbed, 0.65)


class TestSurfaces:
    @pytest.mark.parametrize(
        ("seed", "spacing", "expected"),
        [
            (0, ISOTROPIC, 1.0),
            (0, ANISOTROPIC, 0.8),
            (1, ISOTROPIC, 1.4142135623730951),
            (1, ANISOTROPIC, 1.2806248474865698),
            (2, ISOTROPIC, 1.0),
            (2, ANISOTROPIC, 0.9433981132056605),
        ],
    )
    def test_hd95_equals_that_of_surface_distance(self, seed: int, spacing: tuple, expected: float) -> None:
        """Values from compute_robust_hausdorff of the package surface-distance 0.1."""
        assert surface_hd95(*blobs(seed), spacing) == pytest.approx(expected, abs=1e-9)

    def test_areas_equal_those_of_surface_distance(self) -> None:
        """Values are the sums of surface-distance's surfel_areas_gt and surfel_areas_pred."""
        from nnunet_conres.evaluation.surfaces import _areas, _codes

        masks = np.random.default_rng(9).random((2, 7, 8, 9)) < 0.5
        for spacing, expected in (
            (ISOTROPIC, (519.8926572344023, 523.4893980305092)),
            (ANISOTROPIC, (830.934727671972, 825.8010942599193)),
        ):
            assert [_areas(spacing)[_codes(mask)].sum() for mask in masks] == pytest.approx(expected)

    def test_an_empty_mask_is_infinitely_far(self) -> None:
        full, empty = np.ones((3, 3, 3), bool), np.zeros((3, 3, 3), bool)
        assert surface_hd95(full, empty, ISOTROPIC) == surface_hd95(empty, full, ISOTROPIC) == math.inf

    @pytest.mark.parametrize("spacing", [ISOTROPIC, ANISOTROPIC])
    def test_borders(self, spacing: tuple) -> None:
        masks = blobs(3)
        borders = [np.argwhere(mask & ~binary_erosion(mask)) * np.array(spacing) for mask in masks]
        every = np.linalg.norm(borders[0][:, None] - borders[1][None], axis=-1)
        distances = border_distances(*masks, spacing)
        for exact, fast in zip(exact_border_distances(*masks, spacing), distances, strict=True):
            np.testing.assert_allclose(exact, fast, atol=1e-12)
        np.testing.assert_allclose(np.sort(distances[0]), np.sort(every.min(1)))
        np.testing.assert_allclose(np.sort(distances[1]), np.sort(every.min(0)))
        assert pooled_hd95(distances) == pytest.approx(np.percentile([*every.min(1), *every.min(0)], 95))
        shares = [np.mean(every.min(axis) <= 0.6) for axis in (1, 0)]
        assert border_share(distances, 0.6) == pytest.approx(np.mean(shares))


# --- 2023 to 2025 ---------------------------------------------------------------------------------------------------


class TestDilation:
    @pytest.mark.parametrize("spacing", [ISOTROPIC, ANISOTROPIC])
    @pytest.mark.parametrize(
        ("name", "values", "regions"),
        [
            ("2023-GLI", (2, 1, 3), A),
            ("2023-MET", (2, 1, 3), A),
            ("2024-MET", (2, 1, 3), A),
            ("2024-GLI", (2, 1, 3, 4), B),
            ("2024-MEN-RT", (1,), {"GTV": (1,)}),
        ],
    )
    def test_against_loops(self, name: str, values: tuple, regions: dict, spacing: tuple) -> None:
        rules = read_rules(name)
        regions = {region: regions[region] for region in rules.masks}
        # The lesions here have few voxels: a smaller dilation keeps them from all growing together.
        rules = replace(rules, dilation={region: min(1, d) for region, d in rules.dilation.items()})
        rules = replace(rules, smallest_volume={region: 5.0 for region in rules.regions})
        for seed in range(2):
            reference, prediction = maps(seed, values)
            found = challenge_scores(reference, prediction, spacing, rules, regions)
            expected = by_hand(reference, prediction, spacing, rules, regions)
            assert list(found) == list(rules.regions)
            for region in rules.regions:
                assert {key: found[region][key] for key in expected[region]} == pytest.approx(expected[region])

    def scores(self, reference: np.ndarray, prediction: np.ndarray, name: str = "2023-GLI", **changes: Any) -> dict:
        rules = replace(read_rules(name), **changes)
        spacing = changes.pop("spacing", ISOTROPIC)
        return challenge_scores(reference * 3, prediction * 3, spacing, rules, A)["ET"]

    def test_both_empty(self) -> None:
        nothing = box()
        assert self.scores(nothing, nothing) == {
            "dice": 1, "surface_dice": 1, "hd95": 0, "lesion_dice": 1, "lesion_surface_dice": 1, "lesion_hd95": 0,
            "lesions_found": 0, "lesions_missed": 0, "lesions_false": 0, "reference_volume": 0, "predicted_volume": 0,
        }  # fmt: skip

    def test_one_empty(self) -> None:
        full, nothing = box(((2, 8), (2, 8), (2, 8))), box()
        for pair, missed, false in (((full, nothing), 1, 0), ((nothing, full), 0, 1)):
            scores = self.scores(*pair)
            worst = {"dice": 0, "surface_dice": 0, "hd95": 374, "lesion_dice": 0, "lesion_surface_dice": 0}
            assert {key: scores[key] for key in worst} == worst
            assert (scores["lesion_hd95"], scores["lesions_missed"], scores["lesions_false"]) == (374, missed, false)

    def test_one_prediction_of_two_lesions(self) -> None:
        # The lesions are 7 voxels apart, so that dilations by 3 do not touch. The predicted bar covers both.
        reference = box(((2, 8), (2, 8), (2, 8)), ((2, 8), (2, 8), (15, 21)))
        prediction = box(((2, 8), (2, 8), (2, 21)))
        scores = self.scores(reference, prediction)
        assert (scores["lesions_found"], scores["lesions_false"]) == (2, 0)
        # Each lesion of 216 voxels is scored against the whole bar of 684.
        assert scores["lesion_dice"] == pytest.approx(2 * 216 / (216 + 684))
        assert scores["dice"] == pytest.approx(2 * 432 / (432 + 684))

    def test_many_predictions_of_one_lesion(self) -> None:
        reference = box(((2, 8), (2, 8), (2, 14)))
        prediction = box(((2, 8), (2, 8), (2, 6)), ((2, 8), (2, 8), (8, 14)))
        scores = self.scores(reference, prediction)
        assert (scores["lesions_found"], scores["lesions_missed"], scores["lesions_false"]) == (1, 0, 0)
        assert scores["lesion_dice"] == pytest.approx(2 * 360 / (432 + 360))

    @pytest.mark.parametrize(("volume", "counted"), [(50, 0), (51, 1)])
    def test_smallest_lesion_in_mm3(self, volume: int, counted: int) -> None:
        reference = box(((3, 4), (3, 4), (0, volume)), shape=(8, 8, 60))
        rules = read_rules("2023-GLI")
        scores = challenge_scores(reference * 3, reference * 0, (0.5, 2.0, 1.0), rules, A)["ET"]
        assert (scores["lesions_missed"], scores["lesion_dice"]) == (counted, 1 - counted)
        assert scores["lesion_hd95"] == 374 * counted

    def test_small_predictions_are_removed_first(self) -> None:
        small, large = ((3, 4), (3, 4), (2, 4)), ((3, 5), (3, 5), (20, 24))
        scores = self.scores(box(large), box(large, small), "2024-MET")
        assert (scores["lesions_false"], scores["dice"], scores["lesion_dice"]) == (0, 1, 1)
        scores = self.scores(box(large), box(large, small), "2023-MET")
        assert (scores["lesions_false"], scores["lesion_dice"]) == (1, 0.5)
        assert scores["dice"] < 1

    def test_false_ones_do_not_count_before_radiotherapy(self) -> None:
        lesion, other = ((2, 8), (2, 8), (2, 8)), ((2, 8), (2, 8), (24, 30))
        rules = read_rules("2024-MEN-RT")
        scores = challenge_scores(box(lesion), box(lesion, other), ISOTROPIC, rules, {"GTV": (1,)})["GTV"]
        assert (scores["lesions_false"], scores["lesion_dice"], scores["lesion_hd95"]) == (1, 1, 0)
        missed = challenge_scores(box(lesion), box(), ANISOTROPIC, rules, {"GTV": (1,)})["GTV"]
        # The penalty is in voxels, whatever their size.
        assert missed["lesion_hd95"] == pytest.approx(math.sqrt(12**2 + 16**2 + 40**2))

    def test_lesions_that_touch_one_of_another_tissue_are_one(self) -> None:
        labels = box(((4, 8), (4, 8), (4, 8)), ((4, 8), (4, 8), (20, 24))) * 3
        labels[4:8, 4:8, 8:20] = 1
        prediction = np.where(labels == 3, 3, 0)
        prediction[:, :, 20:] = 0
        rules = read_rules("2024-MET")
        scores = challenge_scores(labels, prediction, ISOTROPIC, rules, A)["ET"]
        assert (scores["lesions_found"], scores["lesions_missed"]) == (1, 0)
        assert scores["lesion_dice"] == pytest.approx(2 * 64 / (128 + 64))
        apart = challenge_scores(labels, prediction, ISOTROPIC, replace(rules, joined_by={}), A)["ET"]
        assert (apart["lesions_found"], apart["lesions_missed"]) == (1, 1)


# --- 2026 -----------------------------------------------------------------------------------------------------------

MET = read_rules("2026-MET")


def one_to_one(reference: np.ndarray, prediction: np.ndarray, **keywords: Any) -> dict[str, float]:
    rules = replace(MET, regions=("ET",))
    spacing = keywords.pop("spacing", ISOTROPIC)
    return challenge_scores(reference * 3, prediction * 3, spacing, rules, {"ET": (3,)}, **keywords)["ET"]


class TestOneToOne:
    @pytest.mark.parametrize("seed", range(4))
    def test_matching_is_the_best_of_all(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        reference, prediction = np.zeros((2, 6, 12, 12), np.uint8)
        for mask in (reference, prediction):
            for _ in range(5):
                start = rng.integers(0, (4, 9, 9))
                mask[tuple(slice(s, s + e) for s, e in zip(start, rng.integers(1, 4, 3), strict=True))] = 1
        scores = one_to_one(reference, prediction)
        total = scores["lesion_dice"] * sum(scores[f"lesions_{kind}"] for kind in ("found", "missed", "false"))
        assert total == pytest.approx(best_matching(reference, prediction))

    def test_no_match_is_made_twice(self) -> None:
        reference = box(((2, 8), (2, 8), (2, 8)), ((2, 8), (2, 8), (15, 21)))
        scores = one_to_one(reference, box(((2, 8), (2, 8), (2, 21))))
        assert (scores["lesions_found"], scores["lesions_missed"], scores["lesions_false"]) == (1, 1, 0)
        assert scores["lesion_dice"] == pytest.approx(2 * 216 / (216 + 684) / 2)
        assert scores["lesion_f1"] == pytest.approx(2 / 3)

    def test_nothing_is_dilated(self) -> None:
        scores = one_to_one(box(((2, 8), (2, 8), (2, 8))), box(((2, 8), (2, 8), (8, 14))))
        assert (scores["lesions_found"], scores["lesions_missed"], scores["lesions_false"]) == (0, 1, 1)
        assert (scores["lesion_dice"], scores["lesion_hd95"]) == (0, 373)

    def test_sizes_and_least_dice(self) -> None:
        large, small = ((2, 5), (2, 5), (2, 5)), ((2, 4), (2, 4), (20, 24))  # 27 and 16 mm³
        barely = ((4, 11), (4, 11), (4, 11))  # overlaps the large one in one voxel: Dice 2 / (27 + 343)
        false = ((2, 4), (10, 12), (20, 24))
        scores = one_to_one(box(large, small), box(barely, small, false))
        assert [scores[f"large_lesions_{kind}"] for kind in ("found", "missed", "false")] == [0, 1, 0]
        assert [scores[f"small_lesions_{kind}"] for kind in ("found", "missed", "false")] == [1, 0, 1]
        assert scores["large_lesion_dice"] == pytest.approx(2 / (27 + 343))
        assert (scores["small_lesion_dice"], scores["small_lesion_f1"]) == (0.5, pytest.approx(2 / 3))
        assert scores["lesions_found"] == 2

    def test_distances_are_in_mm(self) -> None:
        reference = box(((2, 8), (2, 8), (2, 8)))
        prediction = np.roll(reference, 1, axis=0)
        scores = one_to_one(reference, prediction, spacing=ANISOTROPIC)
        assert scores["hd95"] == scores["lesion_hd95"] == 3
        assert (
            scores["surface_dice"]
            < one_to_one(reference, prediction, spacing=ANISOTROPIC, tolerance=3)["surface_dice"]
            == 1
        )

    def test_empty(self) -> None:
        full, nothing = box(((2, 8), (2, 8), (2, 8))), box()
        both = one_to_one(nothing, nothing)
        for key in ("dice", "surface_dice", "hd95", "lesion_dice", "lesion_hd95", "lesion_f1", "large_lesion_dice"):
            assert math.isnan(both[key])
        for pair in ((full, nothing), (nothing, full)):
            scores = one_to_one(*pair)
            assert [scores[key] for key in ("dice", "surface_dice", "hd95", "lesion_f1")] == [0, 0, 373, 0]
            assert [scores[key] for key in ("lesion_dice", "lesion_hd95", "large_lesion_dice")] == [0, 373, 0]


class TestLikeBratsEvaluation:
    """Each deviation that docs/reference/challenge-rules.md lists."""

    def scores(self, reference: np.ndarray, prediction: np.ndarray, spacing: tuple = ISOTROPIC) -> dict[str, float]:
        return one_to_one(reference, prediction, spacing=spacing, like_brats_evaluation=True)

    def test_whole_regions_have_unit_voxels_and_half_a_tolerance(self) -> None:
        reference = box(((2, 8), (2, 8), (2, 8)))
        prediction = np.roll(reference, 1, axis=2)
        one, other = (self.scores(reference, prediction, spacing) for spacing in (ISOTROPIC, ANISOTROPIC))
        assert one["hd95"] == other["hd95"] == 1
        # Each border has 152 voxels. The two share 100: rings of 20 in five slices.
        borders = [mask & ~binary_erosion(mask) for mask in (reference > 0, prediction > 0)]
        assert (
            one["surface_dice"]
            == other["surface_dice"]
            == pytest.approx((borders[0] & borders[1]).sum() / borders[0].sum())
        )
        assert one["lesion_surface_dice"] == 1

    def test_lesions_have_voxel_sizes_turned_around(self) -> None:
        reference = box(((2, 8), (2, 8), (2, 8)))
        scores = self.scores(reference, np.roll(reference, 1, axis=0), ANISOTROPIC)
        assert scores["lesion_hd95"] == 0.5  # the voxel size of x, used along z

    def test_tolerance_of_lesions_is_the_smallest_voxel_size(self) -> None:
        reference = box(((2, 8), (2, 8), (2, 8)))
        prediction = np.roll(reference, 1, axis=2)
        scores = self.scores(reference, prediction, (2.0, 2.0, 2.0))
        assert scores["lesion_surface_dice"] == 1
        turned = self.scores(reference, prediction, ANISOTROPIC)["lesion_surface_dice"]
        borders = [mask & ~binary_erosion(mask) for mask in (reference > 0, prediction > 0)]
        far = distance_transform_edt(~borders[1], sampling=ANISOTROPIC[::-1])[borders[0]]
        back = distance_transform_edt(~borders[0], sampling=ANISOTROPIC[::-1])[borders[1]]
        assert turned == pytest.approx((np.mean(far <= 0.5) + np.mean(back <= 0.5)) / 2)

    def test_means_are_of_matched_lesions_only(self) -> None:
        lesion, missed, false = ((2, 8), (2, 8), (2, 8)), ((2, 4), (2, 4), (14, 16)), ((2, 4), (2, 4), (24, 26))
        scores = self.scores(box(lesion, missed), box(lesion, false))
        assert (scores["lesion_dice"], scores["lesion_hd95"], scores["lesion_dice_sd"]) == (1, 0, 0)
        assert [scores[f"lesions_{kind}"] for kind in ("found", "missed", "false")] == [1, 1, 1]

    def test_no_match_is_infinitely_far(self) -> None:
        scores = self.scores(box(((2, 8), (2, 8), (2, 8))), box())
        assert (scores["lesion_dice"], scores["lesion_surface_dice"], scores["lesion_hd95"]) == (0, 0, math.inf)
        assert (scores["dice"], scores["hd95"]) == (0, 373)
        assert math.isnan(scores["lesion_hd95_sd"])

    def test_false_ones_of_any_size_count_as_large(self) -> None:
        large, tiny = ((2, 8), (2, 8), (2, 8)), ((2, 3), (2, 3), (20, 21))
        scores = self.scores(box(large), box(large, tiny))
        assert (scores["large_lesion_dice"], scores["large_lesion_hd95"]) == (0.5, 186.5)
        assert scores["large_lesions_false"] == 1
        assert math.isnan(scores["small_lesions_false"])  # no true lesion is small
        assert math.isnan(scores["small_lesion_dice"])

    def test_a_poor_match_keeps_its_dice_and_is_missed(self) -> None:
        scores = self.scores(box(((2, 5), (2, 5), (2, 5))), box(((4, 11), (4, 11), (4, 11))))
        assert (scores["large_lesions_found"], scores["large_lesions_missed"], scores["large_lesions_false"]) == (
            0,
            1,
            0,
        )
        assert scores["large_lesion_dice"] == pytest.approx(2 / (27 + 343))
        assert scores["large_lesion_precision"] == 0
        assert scores["lesions_found"] == 1

    def test_both_empty(self) -> None:
        scores = self.scores(box(), box())
        assert all(math.isnan(scores[key]) for key in ("dice", "hd95", "lesion_dice", "lesion_hd95", "lesion_f1"))
        assert scores["lesions_found"] == 0

    def test_equals_what_the_tool_printed(self) -> None:
        """Values of region TC from brats-evaluation 0.0.10 with panoptica 2.1.7; NIfTI stores sizes as float32."""
        reference, prediction = maps(5, (2, 1, 3, 4))
        spacing = tuple(float(np.float32(step)) for step in (3.0, 0.8, 0.5))
        regions = {region: B[region] for region in MET.regions}
        scores = challenge_scores(reference, prediction, spacing, MET, regions, like_brats_evaluation=True)["TC"]
        printed = {
            "lesions_found": 33,
            "lesions_false": 7,
            "lesions_missed": 12,
            "lesion_precision": 0.825,
            "lesion_recall": 0.7333333333333333,
            "lesion_f1": 0.7764705882352941,
            "dice": 0.6157112526539278,
            "surface_dice": 0.5930763716776845,
            "hd95": 2.23606797749979,
            "lesion_dice": 0.5617921296315395,
            "lesion_dice_sd": 0.2163015077208936,
            "lesion_surface_dice": 0.7448559065927692,
            "lesion_surface_dice_sd": 0.1541885506423484,
            "lesion_hd95": 3.037050075552824,
            "lesion_hd95_sd": 3.454737039510079,
            "large_lesions_found": 5,
            "large_lesions_false": 7,
            "large_lesions_missed": 0,
            "large_lesion_precision": 0.4166666666666667,
            "large_lesion_recall": 1,
            "large_lesion_f1": 0.5882352941176471,
            "large_lesion_dice": 0.2298841240787549,
            "large_lesion_dice_sd": 0.2862075052194052,
            "large_lesion_hd95": 220.2505161975945,
            "large_lesion_hd95_sd": 180.7658086245251,
            "large_lesion_surface_dice": 0.2976054074141071,
            "large_lesion_surface_dice_sd": 0.359643487221173,
            "small_lesions_found": 26,
            "small_lesions_missed": 14,
            "small_lesions_false": 7,
            "small_lesion_precision": 0.7878787878787878,
            "small_lesion_recall": 0.65,
            "small_lesion_f1": 0.7123287671232876,
        }
        assert {key: scores[key] for key in printed} == pytest.approx(printed, abs=1e-9)
