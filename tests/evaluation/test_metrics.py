import itertools
import math
from dataclasses import asdict

import numpy as np
import pytest
import SimpleITK

from nnunet_conres.errors import InputError
from nnunet_conres.evaluation.lesions import challenge_scores
from nnunet_conres.evaluation.metrics import METRICS, MetricOptions, measure
from nnunet_conres.evaluation.rules import read_rules

SPACINGS = [(1.0, 1.0, 1.0), (3.0, 0.8, 0.5), (0.7, 2.5, 1.2)]


def blobs(seed: int, shape: tuple[int, ...] = (9, 12, 11), share: float = 0.35) -> tuple[np.ndarray, np.ndarray]:
    """Return a smooth mask with some components, touching the border of the image, and a disturbed copy."""
    from scipy.ndimage import gaussian_filter

    rng = np.random.default_rng(seed)
    smooth = gaussian_filter(rng.standard_normal(shape), 1.3)
    disturbed = smooth + gaussian_filter(rng.standard_normal(shape), 1.0) * 0.6
    return smooth > np.quantile(smooth, 1 - share), disturbed > np.quantile(disturbed, 1 - share)


def boxes(*corners: tuple[tuple[int, int], ...], shape: tuple[int, ...]) -> np.ndarray:
    mask = np.zeros(shape, bool)
    for corner in corners:
        mask[tuple(slice(start, stop) for start, stop in corner)] = True
    return mask


# --- second implementations -----------------------------------------------------------------------------------------


def surface_by_hand(mask: np.ndarray, ignored: np.ndarray | None = None) -> list[tuple[int, ...]]:
    points = []
    for at in np.ndindex(mask.shape):
        if not mask[at]:
            continue
        for axis, step in itertools.product(range(mask.ndim), (-1, 1)):
            neighbour = tuple(at[a] + step * (a == axis) for a in range(mask.ndim))
            outside = any(not 0 <= n < size for n, size in zip(neighbour, mask.shape, strict=True))
            if outside or (not mask[neighbour] and not (ignored is not None and ignored[neighbour])):
                points.append(at)
                break
    return points


def distances_by_hand(first: np.ndarray, second: np.ndarray, spacing: tuple[float, ...]) -> tuple[list, list]:
    surfaces = [
        [tuple(i * s for i, s in zip(at, spacing, strict=True)) for at in surface_by_hand(mask)]
        for mask in (first, second)
    ]

    def one_way(points: list, others: list) -> list[float]:
        return [min(math.dist(p, q) for q in others) for p in points]

    return one_way(surfaces[0], surfaces[1]), one_way(surfaces[1], surfaces[0])


def percentile_95(values: list[float]) -> float:
    ordered = sorted(values)
    at = 0.95 * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


def hd95_by_hand(first: np.ndarray, second: np.ndarray, spacing: tuple[float, ...]) -> float:
    return max(percentile_95(values) for values in distances_by_hand(first, second, spacing))


def components_by_hand(mask: np.ndarray) -> list[set[tuple[int, ...]]]:
    """Return the connected components with 26 neighbours, in 3D."""
    left = {tuple(int(i) for i in at) for at in np.argwhere(mask)}
    found = []
    while left:
        component, fresh = set(), [left.pop()]
        while fresh:
            at = fresh.pop()
            component.add(at)
            for step in itertools.product((-1, 0, 1), repeat=3):
                neighbour = tuple(a + s for a, s in zip(at, step, strict=True))
                if neighbour in left:
                    left.remove(neighbour)
                    fresh.append(neighbour)
        found.append(component)
    return found


def dilated_by_hand(voxels: set[tuple[int, ...]], shape: tuple[int, ...], times: int) -> set[tuple[int, ...]]:
    """Dilate by 18 neighbours, `times` times."""
    steps = [s for s in itertools.product((-1, 0, 1), repeat=3) if np.count_nonzero(s) <= 2]
    for _ in range(times):
        voxels = {tuple(a + s for a, s in zip(at, step, strict=True)) for at in voxels for step in steps}
        voxels = {at for at in voxels if all(0 <= a < size for a, size in zip(at, shape, strict=True))}
    return voxels


def as_mask(voxels: set[tuple[int, ...]], shape: tuple[int, ...]) -> np.ndarray:
    mask = np.zeros(shape, bool)
    for at in voxels:
        mask[at] = True
    return mask


def lesions_by_hand(
    reference: np.ndarray, prediction: np.ndarray, spacing: tuple[float, ...], options: MetricOptions
) -> dict[str, float]:
    """Score one lesion after another, each dilated separately, as the challenge's published code does."""
    shape = reference.shape
    true = {tuple(int(i) for i in at) for at in np.argwhere(reference)}
    groups = components_by_hand(as_mask(dilated_by_hand(true, shape, options.lesion_dilation), shape))
    predicted = components_by_hand(prediction)
    dice, distances, met, found, missed = [], [], set(), 0, 0
    penalty = math.sqrt(sum((n * s) ** 2 for n, s in zip(shape, spacing, strict=True)))
    for group in groups:
        lesion = group & true
        reach = dilated_by_hand(lesion, shape, options.lesion_dilation)
        hits = [number for number, part in enumerate(predicted) if part & reach]
        met |= set(hits)
        if len(lesion) * math.prod(spacing) <= options.lesion_volume:
            continue
        matched = set().union(*(predicted[number] for number in hits))
        found, missed = found + bool(hits), missed + (not hits)
        dice.append(2 * len(lesion & matched) / (len(lesion) + len(matched)))
        distances.append(hd95_by_hand(as_mask(lesion, shape), as_mask(matched, shape), spacing) if matched else penalty)
    false = len(predicted) - len(met)
    dice += [0.0] * false
    distances += [penalty] * false
    return {
        "lesion_dice": sum(dice) / len(dice) if dice else 1.0,
        "lesion_hd95": sum(distances) / len(distances) if distances else 0.0,
        "lesions_found": found,
        "lesions_missed": missed,
        "lesions_false": false,
    }


def itk(mask: np.ndarray, spacing: tuple[float, ...]) -> SimpleITK.Image:
    image = SimpleITK.GetImageFromArray(mask.astype(np.uint8))
    image.SetSpacing(spacing[::-1])
    return image


# --- tests ----------------------------------------------------------------------------------------------------------


class TestMetrics:
    def test_the_table_names_what_is_measured(self) -> None:
        scores = measure(*blobs(0), (1.0, 1.0, 1.0))
        assert list(scores) == list(MetricOptions().measured)
        assert set(scores) <= set(METRICS)
        assert all(type(value) is float for value in scores.values())
        assert all(metric.key == key for key, metric in METRICS.items())

    def test_volume_errors_are_compared_without_sign(self) -> None:
        assert METRICS["volume_error"].compared(-2.5) == 2.5
        assert METRICS["dice"].compared(-2.5) == -2.5
        assert not METRICS["volume_error"].higher_is_better
        assert METRICS["dice"].higher_is_better

    @pytest.mark.parametrize(
        ("key", "value", "keywords", "text"),
        [
            ("dice", 0.12345, {}, "0.123"),
            ("hd95", 2.0, {}, "2.00 mm"),
            ("hd95", 2.0, {"unit": False}, "2.00"),
            ("volume_error", -0.001, {}, "0.00 ml"),
            ("volume_error", -0.001, {"decimals": 3}, "-0.001 ml"),
            ("lesions_found", 3.0, {}, "3"),
            ("dice", math.nan, {}, "-"),
        ],
    )
    def test_text(self, key: str, value: float, keywords: dict, text: str) -> None:
        assert METRICS[key].text(value, **keywords) == text


class TestMetricOptions:
    def test_all_errors_at_once(self) -> None:
        with pytest.raises(InputError, match=r"(?s)tolerance is -1.*empty is 'x'.*penalty.*dilation.*lesion_volume"):
            MetricOptions(tolerance=-1, empty="x", penalty=math.inf, lesion_dilation=-1, lesion_volume=math.nan)  # type: ignore[arg-type]

    def test_as_json(self) -> None:
        assert asdict(MetricOptions()) == {
            "tolerance": 1.0,
            "empty": "brats",
            "penalty": None,
            "lesion_dilation": 3,
            "lesion_volume": 50.0,
            "rules": None,
            "like_brats_evaluation": False,
        }

    def test_what_is_measured_by_rules(self) -> None:
        with pytest.raises(InputError, match="challenges of 2026 only"):
            MetricOptions(rules=read_rules("2023-GLI"), like_brats_evaluation=True)
        lesions = np.zeros((4, 5, 6), np.uint8)
        lesions[1, 1, 1] = 1
        for name in ("2023-GLI", "2026-MET", "2026-PED"):
            rules = read_rules(name)
            for like in (False, bool(rules.table)):
                options = MetricOptions(rules=rules, like_brats_evaluation=like)
                scores = challenge_scores(lesions, lesions, (1, 1, 1), rules, {"ET": (1,)}, like_brats_evaluation=like)
                assert set(options.measured) == set(scores["ET"]) <= set(METRICS)


class TestMeasure:
    def test_lesions_can_be_left_out(self) -> None:
        everything = measure(*blobs(0), SPACINGS[1])
        others = measure(*blobs(0), SPACINGS[1], lesions=False)
        assert others == {key: everything[key] for key in everything if not key.startswith("lesion")}

    @pytest.mark.parametrize("spacing", SPACINGS)
    @pytest.mark.parametrize("seed", range(3))
    def test_overlap_and_volume_equal_simpleitk(self, seed: int, spacing: tuple[float, ...]) -> None:
        reference, prediction = blobs(seed, share=0.2 + 0.2 * seed)
        prediction &= np.random.default_rng(seed).random(prediction.shape) < 0.8
        scores = measure(reference, prediction, spacing)
        overlap = SimpleITK.LabelOverlapMeasuresImageFilter()
        overlap.Execute(itk(reference, spacing), itk(prediction, spacing))
        assert scores["dice"] == pytest.approx(overlap.GetDiceCoefficient(1), abs=1e-12)
        assert scores["iou"] == pytest.approx(overlap.GetJaccardCoefficient(1), abs=1e-12)
        volumes = []
        for mask in (reference, prediction):
            shape = SimpleITK.LabelShapeStatisticsImageFilter()
            shape.Execute(itk(mask, spacing))
            volumes.append(shape.GetPhysicalSize(1) / 1000)
        assert scores["reference_volume"] == pytest.approx(volumes[0])
        assert scores["predicted_volume"] == pytest.approx(volumes[1])
        assert scores["volume_error"] == pytest.approx(volumes[1] - volumes[0])
        assert scores["relative_volume_error"] == pytest.approx(100 * (volumes[1] / volumes[0] - 1))

    @pytest.mark.parametrize("spacing", SPACINGS)
    @pytest.mark.parametrize("seed", range(3))
    def test_surfaces_equal_all_pairs_of_points(self, seed: int, spacing: tuple[float, ...]) -> None:
        reference, prediction = blobs(seed)
        there, back = distances_by_hand(reference, prediction, spacing)
        scores = measure(reference, prediction, spacing)
        assert scores["hd95"] == pytest.approx(max(percentile_95(there), percentile_95(back)))
        for tolerance in (0.0, 0.8, 1.0, 2.0):
            scores = measure(reference, prediction, spacing, MetricOptions(tolerance=tolerance))
            within = sum(d <= tolerance + 1e-9 for d in there + back)
            assert scores["surface_dice"] == pytest.approx(within / len(there + back))

    @pytest.mark.parametrize("spacing", SPACINGS)
    def test_surfaces_equal_itk_distance_maps(self, spacing: tuple[float, ...]) -> None:
        reference, prediction = blobs(5, (24, 30, 28), share=0.2)
        # ITK's contour does not count the border of the image.
        padded = [itk(np.pad(mask, 1), spacing) for mask in (reference, prediction)]
        contours = [SimpleITK.LabelContour(image, False) for image in padded]
        maps = [
            SimpleITK.GetArrayFromImage(
                SimpleITK.Abs(SimpleITK.SignedMaurerDistanceMap(contour, False, False, True))
            ).astype(float)
            for contour in contours
        ]
        on = [SimpleITK.GetArrayFromImage(contour) > 0 for contour in contours]
        there, back = maps[1][on[0]], maps[0][on[1]]
        scores = measure(reference, prediction, spacing, MetricOptions(tolerance=1.1))
        assert scores["hd95"] == pytest.approx(max(np.percentile(there, 95), np.percentile(back, 95)), rel=1e-5)
        assert scores["surface_dice"] == pytest.approx(
            ((there <= 1.1).sum() + (back <= 1.1).sum()) / (there.size + back.size)
        )

    @pytest.mark.parametrize("spacing", SPACINGS[:2])
    @pytest.mark.parametrize(
        ("dilation", "volume", "empty_corner"),
        [(1, 0.0, False), (0, 2.0, False), (1, 6.0, True), (3, 4.0, True), (2, 50.0, True)],
    )
    def test_lesions_equal_one_after_the_other(
        self, dilation: int, volume: float, empty_corner: bool, spacing: tuple[float, ...]
    ) -> None:
        reference, prediction = blobs(dilation, (10, 14, 13), share=0.06)
        if empty_corner:
            reference[:, :, 4:10] = False  # lesions only at both ends: some are missed, some predictions are false
            prediction[:5] = False
        options = MetricOptions(lesion_dilation=dilation, lesion_volume=volume)
        expected = lesions_by_hand(reference, prediction, spacing, options)
        scores = measure(reference, prediction, spacing, options)
        assert {key: scores[key] for key in expected} == pytest.approx(expected)

    def test_perfect(self) -> None:
        reference, _ = blobs(1, (14, 15, 16))
        scores = measure(reference, reference.copy(), (2.0, 1.0, 1.0), MetricOptions(tolerance=0.0))
        assert (scores["dice"], scores["iou"], scores["hd95"], scores["surface_dice"]) == (1, 1, 0, 1)
        assert (scores["volume_error"], scores["relative_volume_error"]) == (0, 0)
        assert (scores["lesion_dice"], scores["lesion_hd95"], scores["lesions_false"]) == (1, 0, 0)

    def test_touching_volumes(self) -> None:
        shape = (4, 2, 2)
        scores = measure(
            boxes(((0, 2), (0, 2), (0, 2)), shape=shape),
            boxes(((2, 4), (0, 2), (0, 2)), shape=shape),
            (1.5, 1.0, 1.0),
            MetricOptions(tolerance=1.5, lesion_volume=0),
        )
        assert (scores["dice"], scores["iou"], scores["volume_error"]) == (0, 0, 0)
        # Each surface has eight voxels: four are one slice from the other surface, four are two slices from it.
        assert scores["hd95"] == 3.0
        assert scores["surface_dice"] == 0.5
        # The prediction overlaps nowhere, but is close enough to count as found.
        assert (scores["lesions_found"], scores["lesions_missed"], scores["lesions_false"]) == (1, 0, 0)
        assert (scores["lesion_dice"], scores["lesion_hd95"]) == (0, 3.0)

    def test_single_voxels_in_true_units(self) -> None:
        for axis, distance in ((0, 6.0), (1, 1.0), (2, 0.6)):
            reference, prediction = np.zeros((2, 5, 6, 7), bool)
            at = [1, 2, 3]
            reference[tuple(at)] = True
            at[axis] += 2
            prediction[tuple(at)] = True
            scores = measure(reference, prediction, (3.0, 0.5, 0.3))
            assert scores["hd95"] == pytest.approx(distance)
            assert scores["surface_dice"] == (distance <= 1)
            assert scores["reference_volume"] == pytest.approx(0.00045)

    def test_tolerance_holds_for_equal_distances(self) -> None:
        reference, prediction = np.zeros((2, 5, 5, 5), bool)
        reference[0, 1, 1] = prediction[3, 1, 1] = True
        assert measure(reference, prediction, (0.1, 1, 1), MetricOptions(tolerance=0.3))["surface_dice"] == 1

    def test_the_border_of_the_image_is_a_surface(self) -> None:
        reference, prediction = np.ones((3, 3, 3), bool), np.zeros((3, 3, 3), bool)
        prediction[1, 1, 1] = True
        scores = measure(reference, prediction, (1.0, 1.0, 1.0))
        # Distances from the centre: six faces at 1, twelve edges at sqrt(2), eight corners at sqrt(3).
        assert scores["hd95"] == pytest.approx(math.sqrt(3))
        assert scores["surface_dice"] == pytest.approx((6 + 1) / (26 + 1))

    @pytest.mark.parametrize(
        ("empty", "reference", "prediction", "expected"),
        [
            ("brats", False, False, {"dice": 1, "iou": 1, "hd95": 0, "surface_dice": 1, "relative_volume_error": 0}),
            ("brats", False, False, {"lesion_dice": 1, "lesion_hd95": 0, "volume_error": 0, "lesions_false": 0}),
            ("brats", True, False, {"dice": 0, "iou": 0, "hd95": 13, "surface_dice": 0}),
            ("brats", True, False, {"relative_volume_error": -100, "volume_error": -0.024}),
            ("brats", True, False, {"lesion_dice": 0, "lesion_hd95": 13, "lesions_missed": 1, "lesions_false": 0}),
            ("brats", False, True, {"dice": 0, "iou": 0, "hd95": 13, "surface_dice": 0}),
            ("brats", False, True, {"relative_volume_error": math.nan, "volume_error": 0.024}),
            ("brats", False, True, {"lesion_dice": 0, "lesion_hd95": 13, "lesions_missed": 0, "lesions_false": 1}),
            ("nan", False, False, dict.fromkeys(("dice", "iou", "hd95", "surface_dice"), math.nan)),
            ("nan", False, False, dict.fromkeys(("relative_volume_error", "lesion_dice", "lesion_hd95"), math.nan)),
            ("nan", False, False, dict.fromkeys(("volume_error", "reference_volume", "lesions_missed"), 0)),
            ("nan", True, False, {"dice": 0, "iou": 0, "hd95": math.nan, "surface_dice": 0, "lesions_missed": 1}),
            ("nan", True, False, {"lesion_dice": 0, "lesion_hd95": math.nan}),
            ("nan", False, True, {"dice": 0, "iou": 0, "hd95": math.nan, "surface_dice": 0, "lesions_false": 1}),
        ],
    )
    def test_empty(self, empty: str, reference: bool, prediction: bool, expected: dict[str, float]) -> None:
        shape = (6, 8, 6)
        full, nothing = boxes(((1, 4), (1, 5), (1, 5)), shape=shape), np.zeros(shape, bool)
        # The image measures 12 x 4 x 3 mm; its diagonal is 13 mm.
        spacing = (2.0, 0.5, 0.5)
        options = MetricOptions(empty=empty, lesion_volume=0)  # type: ignore[arg-type]
        scores = measure(full if reference else nothing, full if prediction else nothing, spacing, options)
        assert {key: scores[key] for key in expected} == pytest.approx(expected, nan_ok=True)

    def test_penalty(self) -> None:
        nothing = np.zeros((155, 240, 240), bool)
        one = nothing.copy()
        one[0, 0, 0] = True
        scores = measure(nothing, one, (1.0, 1.0, 1.0))
        assert scores["hd95"] == scores["lesion_hd95"] == pytest.approx(373.13, abs=0.005)
        scores = measure(nothing, one, (1.0, 1.0, 1.0), MetricOptions(penalty=374))
        assert scores["hd95"] == scores["lesion_hd95"] == 374

    @pytest.mark.parametrize(("between", "lesions"), [(6, 1), (7, 2)])
    def test_near_lesions_are_one(self, between: int, lesions: int) -> None:
        reference = np.zeros((5, 5, 30), bool)
        reference[2, 2, 4] = reference[2, 2, 5 + between] = True
        prediction = np.zeros_like(reference)
        prediction[2, 2, 4] = True
        scores = measure(reference, prediction, (1, 1, 1), MetricOptions(lesion_volume=0))
        assert (scores["lesions_found"], scores["lesions_missed"]) == (1, lesions - 1)
        # Either one lesion, one of whose two voxels is predicted, or two lesions, of which one is found.
        assert scores["lesion_dice"] == pytest.approx(2 / 3 if lesions == 1 else 1 / 2)

    @pytest.mark.parametrize(("away", "found"), [(3, 1), (4, 0)])
    def test_a_lesion_is_found_from_near(self, away: int, found: int) -> None:
        reference, prediction = np.zeros((2, 5, 5, 30), bool)
        reference[2, 2, 4] = prediction[2, 2, 4 + away] = True
        scores = measure(reference, prediction, (1, 1, 1), MetricOptions(lesion_volume=0))
        assert (scores["lesions_found"], scores["lesions_missed"]) == (found, 1 - found)
        assert scores["lesions_false"] == 1 - found

    @pytest.mark.parametrize(("voxels", "counted"), [(25, 0), (26, 1)])
    def test_small_lesions_are_ignored_by_their_volume(self, voxels: int, counted: int) -> None:
        reference = np.zeros((4, 6, 40), bool)
        reference[1, 2, 2 : 2 + voxels] = True
        scores = measure(reference, reference.copy(), (2.0, 1.0, 1.0))  # 2 mm³ per voxel; 50 mm³ are too few
        assert scores["lesions_found"] == counted
        # A prediction that touches an ignored lesion is not false.
        assert (scores["lesions_false"], scores["lesion_dice"]) == (0, 1)

    def test_ignored_voxels_belong_to_neither(self) -> None:
        reference, prediction = blobs(7)
        ignored = np.random.default_rng(7).random(reference.shape) < 0.2
        scores = measure(reference, prediction, (1, 1, 1), ignored=ignored)
        true, predicted = reference & ~ignored, prediction & ~ignored
        assert scores["dice"] == pytest.approx(2 * (true & predicted).sum() / (true.sum() + predicted.sum()))
        assert scores["reference_volume"] == pytest.approx(true.sum() / 1000)
        surfaces = [surface_by_hand(mask, ignored) for mask in (true, predicted)]
        there, back = ([min(math.dist(p, q) for q in other) for p in one] for one, other in (surfaces, surfaces[::-1]))
        assert scores["hd95"] == pytest.approx(max(percentile_95(there), percentile_95(back)))

    def test_a_lesion_has_no_surface_towards_ignored_voxels(self) -> None:
        shape = (12, 14, 14)
        reference = boxes(((2, 6), (2, 12), (2, 12)), shape=shape)
        bump = ((6, 9), (4, 8), (4, 7))
        prediction = boxes(((2, 6), (2, 12), (2, 12)), bump, shape=shape)
        ignored = boxes(((0, 2), (0, 14), (0, 14)), shape=shape)
        scores = measure(reference, prediction, (1, 1, 1), MetricOptions(lesion_dilation=0), ignored=ignored)
        target = surface_by_hand(reference, ignored)
        distances = [min(math.dist(p, q) for q in target) for p in surface_by_hand(prediction, ignored)]
        assert scores["lesion_hd95"] == scores["hd95"] == pytest.approx(percentile_95(distances))
        # If the face towards the ignored voxels were surface, the bump would be a smaller share of it.
        assert scores["hd95"] > measure(reference, prediction, (1, 1, 1))["hd95"]

    def test_no_surface_towards_ignored_voxels(self) -> None:
        shape = (7, 7, 7)
        reference = boxes(((2, 5), (2, 5), (2, 5)), shape=shape)
        ignored = ~reference
        options = MetricOptions(lesion_volume=0)
        scores = measure(reference, reference.copy(), (1, 1, 1), options, ignored=ignored)
        # All annotated voxels are inside the region: where it ends is unknown.
        assert scores["dice"] == scores["lesion_dice"] == 1
        assert math.isnan(scores["hd95"])
        assert math.isnan(scores["surface_dice"])
        assert math.isnan(scores["lesion_hd95"])

    def test_a_slice_has_an_outline(self) -> None:
        reference, prediction = blobs(3, (20, 24), share=0.3)
        # nnU-Net reads a 2D image as one slice of arbitrary thickness.
        scores = measure(reference[None], prediction[None], (999.0, 1.0, 0.5))
        assert scores["hd95"] == pytest.approx(hd95_by_hand(reference, prediction, (1.0, 0.5)))
        assert math.isnan(scores["volume_error"])
        assert math.isnan(scores["reference_volume"])
        assert scores["relative_volume_error"] == pytest.approx(100 * (prediction.sum() / reference.sum() - 1))
        np.testing.assert_equal(scores, measure(reference, prediction, (1.0, 0.5)))
        nothing = np.zeros((1, 30, 80), bool)
        one = nothing.copy()
        one[0, 1, 1] = True
        assert measure(nothing, one, (999.0, 1.0, 0.5))["hd95"] == 50.0

    def test_an_image_of_one_voxel(self) -> None:
        scores = measure(np.ones((1, 1, 1), bool), np.ones((1, 1, 1), bool), (1, 1, 1))
        assert (scores["dice"], scores["hd95"]) == (1, 0)

    def test_arguments_stay_as_they_are(self) -> None:
        reference, prediction = blobs(2)
        ignored = np.random.default_rng(0).random(reference.shape) < 0.2
        copies = [array.copy() for array in (reference, prediction, ignored)]
        measure(reference, prediction, (1, 1, 1), ignored=ignored)
        for array, copy in zip((reference, prediction, ignored), copies, strict=True):
            np.testing.assert_array_equal(array, copy)

    def test_all_errors_at_once(self) -> None:
        with pytest.raises(ValueError, match=r"(?s)prediction has values of type uint8.*shape \(3, 4, 4\).*spacing"):
            measure(np.zeros((4, 4, 4), bool), np.zeros((3, 4, 4), np.uint8), (1, 1))  # type: ignore[arg-type]
