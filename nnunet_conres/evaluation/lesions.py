"""Scores of a case by the rules of a challenge, per region and per lesion."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from nnunet_conres.evaluation.rules import Rules
from nnunet_conres.evaluation.surfaces import (
    around,
    border_distances,
    border_share,
    box_of,
    dice,
    exact_border_distances,
    pooled_hd95,
    surface_hd95,
)

Mask = NDArray[np.bool_]
Numbered = NDArray[np.int32]
"""Number of the lesion that each voxel belongs to, 0 for none."""

# Extra cost of a pair without overlap: of several matchings with the same sum of Dice, the one with most overlapping
# pairs is chosen.
_PAIR: Final = 1e-6


def challenge_scores(
    reference: NDArray[np.integer],
    prediction: NDArray[np.integer],
    spacing: Sequence[float],
    rules: Rules,
    regions: Mapping[str, tuple[int, ...]],
    *,
    tolerance: float = 1.0,
    like_brats_evaluation: bool = False,
) -> dict[str, dict[str, float]]:
    """Score a predicted label map by the rules of a challenge.

    Args:
        reference: The true labels (z, y, x).
        prediction: The predicted labels, same shape.
        spacing: Voxel size along the axes, mm.
        rules: Rules of the challenge.
        regions: Label values by the challenge's region names. Includes unscored regions that join lesions of others.
        tolerance: Tolerance of the surface Dice, mm.
        like_brats_evaluation: Whether to compute what the organisers' tool of 2026 prints, where it differs from the
            rules.

    Returns:
        Scores by scored region, then by metric key; NaN for an undefined score.
    """
    shape = reference.shape
    masks = [{name: np.isin(labels, values) for name, values in regions.items()} for labels in (reference, prediction)]
    occupied = np.any([mask for of_image in masks for mask in of_image.values()], axis=0)
    where = box_of(occupied, max(1, *rules.dilation.values()) + 1)
    true, predicted = ({name: mask[where] for name, mask in of_image.items()} for of_image in masks)
    scored = [region for region in rules.regions if region in regions]
    if rules.matching == "dilation":
        penalty = math.hypot(*shape) if rules.penalty is None else rules.penalty
        lesions, parts = number_lesions(true, rules), number_predicted(predicted, rules, spacing)
        return {
            region: _by_dilation(
                region, true[region], lesions[region], parts[region], spacing, rules, penalty, tolerance
            )
            for region in scored
        }
    one_to_one = _like_brats_evaluation if like_brats_evaluation else _one_to_one
    return {region: one_to_one(true[region], predicted[region], spacing, rules, tolerance) for region in scored}


# --- whole regions --------------------------------------------------------------------------------------------------


def _volumes(reference: Mask, prediction: Mask, spacing: Sequence[float]) -> dict[str, float]:
    millilitres = math.prod(spacing) / 1000
    return {
        "reference_volume": int(reference.sum()) * millilitres,
        "predicted_volume": int(prediction.sum()) * millilitres,
    }


# --- 2023 to 2025: dilation -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lesions:
    """Lesions of a region.

    Attributes:
        numbers: Lesion number of each voxel of the region, 0 elsewhere.
        reach: Lesion number of each voxel in the dilation of a lesion, 0 elsewhere.
        count: Highest lesion number.
    """

    numbers: Numbered
    reach: Numbered
    count: int


def number_lesions(masks: Mapping[str, Mask], rules: Rules) -> dict[str, Lesions]:
    """Number the lesions of each region. Parts whose dilations touch are one lesion; the rules may join more."""
    found = {
        region: grown_together(mask, rules.dilation.get(region, _dilation(rules))) for region, mask in masks.items()
    }
    return _joined(found, rules)


def number_predicted(masks: Mapping[str, Mask], rules: Rules, spacing: Sequence[float]) -> dict[str, Lesions]:
    """Number the predicted lesions of each region.

    By default these are the connected components. With `rules.group_predictions`, they are grouped like the true
    lesions, and the smallest are removed.
    """
    from scipy.ndimage import generate_binary_structure, label

    if not rules.group_predictions:
        found = {}
        for region, mask in masks.items():
            numbers, count = label(mask, generate_binary_structure(mask.ndim, mask.ndim), output=np.int32)
            found[region] = Lesions(numbers, numbers, count)
        return found
    voxel = math.prod(spacing) if rules.group_predictions == "mm3" else 1
    kept = {}
    for region, mask in masks.items():
        grown = grown_together(mask, rules.dilation.get(region, _dilation(rules)))
        sizes = np.bincount(grown.numbers.ravel(), minlength=grown.count + 1) * voxel
        smallest = rules.smallest_volume.get(region, min(rules.smallest_volume.values()))
        numbers = np.where((sizes > smallest)[grown.numbers], grown.numbers, 0)
        kept[region] = Lesions(numbers.astype(np.int32), grown.reach, grown.count)
    return _joined(kept, rules)


def _dilation(rules: Rules) -> int:
    """Return the dilation of a region that is not scored and only joins the lesions of another."""
    return min(rules.dilation.values())


def grown_together(mask: Mask, dilation: int) -> Lesions:
    """Number the connected components of a dilated mask; each is the dilation of one lesion."""
    from scipy.ndimage import binary_dilation, generate_binary_structure, label

    axes = mask.ndim
    # Without the corner neighbours: 18 of 26.
    ball = generate_binary_structure(axes, axes - 1)
    dilated = binary_dilation(mask, ball, iterations=dilation) if dilation else mask
    # Numbered along x first, like the published code, which reads x, y, z: the order matters where a lesion joins two.
    numbers, count = label(dilated.T, generate_binary_structure(axes, axes), output=np.int32)
    reach = np.ascontiguousarray(numbers.T)
    return Lesions(np.where(mask, reach, 0).astype(np.int32), reach, count)


def _joined(found: Mapping[str, Lesions], rules: Rules) -> dict[str, Lesions]:
    """Join the lesions of a region that touch the same lesion of another region, as the rules say."""
    joined = dict(found)
    for region, others in rules.joined_by.items():
        for other in others:
            if region in joined and other in found:
                joined[region] = _join(joined[region], found[other].numbers)
    return joined


def _join(lesions: Lesions, other: Numbered) -> Lesions:
    """Join lesions that touch the same lesion of another region. If one touches several, the lowest number counts."""
    table = np.arange(lesions.count + 1, dtype=np.int32)
    first: dict[int, int] = {}
    for number, touched in sorted(_touching(lesions.numbers, other)):
        first.setdefault(number, touched)
    for number, touched in first.items():
        table[number] = lesions.count + touched
    return Lesions(table[lesions.numbers], table[lesions.reach], lesions.count + int(other.max(initial=0)))


def _touching(one: Numbered, other: Numbered) -> set[tuple[int, int]]:
    """Return pairs of numbers of lesions that overlap or have adjacent voxels (18 neighbours)."""
    pairs: set[tuple[int, int]] = set()
    for step in np.ndindex(*(3,) * one.ndim):
        offset = np.array(step) - 1
        if np.count_nonzero(offset) == one.ndim:
            continue
        here = tuple(slice(max(0, -o), size - max(0, o)) for o, size in zip(offset, one.shape, strict=True))
        there = tuple(slice(max(0, o), size - max(0, -o)) for o, size in zip(offset, one.shape, strict=True))
        both = (one[here] > 0) & (other[there] > 0)
        pairs |= set(zip(one[here][both].tolist(), other[there][both].tolist(), strict=True))
    return pairs


@dataclass(frozen=True)
class Meetings:
    """True and predicted lesions that meet: the predicted one overlaps the dilation of the true one.

    Attributes:
        counted: Numbers of the true lesions that count.
        matched: Numbers of the predicted lesions that meet a counted lesion, by its number; missed ones are absent.
        false: Number of predicted lesions that meet no true lesion.
    """

    counted: list[int]
    matched: Mapping[int, NDArray[np.int32]]
    false: int


def meetings_within_reach(lesions: Lesions, parts: Numbered, smallest: float) -> Meetings:
    """Find the predicted lesions within the dilation of each true lesion. One may lie within several dilations.

    Args:
        lesions: The true lesions.
        parts: Numbers of the predicted lesions, by voxel.
        smallest: True lesions up to this many voxels do not count, but predicted lesions that meet them are not false.
    """
    volume = np.bincount(lesions.numbers.ravel(), minlength=lesions.count + 1)
    volume[0] = 0
    both = (lesions.reach > 0) & (parts > 0)
    pairs = np.unique(np.stack([lesions.reach[both], parts[both]]), axis=1)
    counted = [int(number) for number in np.flatnonzero(volume > max(0, smallest))]
    matched = {number: pairs[1, pairs[0] == number] for number in counted}
    predicted = np.unique(parts)
    false = int(np.count_nonzero(predicted)) - np.unique(pairs[1]).size
    return Meetings(counted, {number: of for number, of in matched.items() if of.size}, false)


def _by_dilation(
    region: str,
    reference: Mask,
    lesions: Lesions,
    predicted: Lesions,
    spacing: Sequence[float],
    rules: Rules,
    penalty: float,
    tolerance: float,
) -> dict[str, float]:
    from scipy.ndimage import find_objects

    parts = predicted.numbers
    smallest = rules.smallest_volume[region] / math.prod(spacing)
    met = meetings_within_reach(lesions, parts, smallest)
    boxes, part_boxes = find_objects(lesions.numbers), find_objects(parts)
    rows = []
    for number, matched in met.matched.items():
        where = around([boxes[number - 1], *(part_boxes[part - 1] for part in matched)])
        pair = lesions.numbers[where] == number, np.isin(parts[where], matched)
        rows.append(_surface_scores(*pair, spacing, tolerance))
    missed = len(met.counted) - len(rows)
    rows += [(0.0, 0.0, penalty)] * (missed + (met.false if rules.count_false else 0))
    dice, share, hd95 = (
        (math.fsum(column) / len(rows) for column in zip(*rows, strict=True)) if rows else (1.0, 1.0, 0.0)
    )
    remaining = parts > 0  # without the smallest lesions, if the rules remove them
    if not reference.any() and not remaining.any():
        whole = (1.0, 1.0, 0.0)
    elif reference.any() and remaining.any():
        whole = _surface_scores(reference, remaining, spacing, tolerance)
    else:
        whole = (0.0, 0.0, penalty)
    return {
        "dice": whole[0],
        "surface_dice": whole[1],
        "hd95": whole[2],
        "lesion_dice": dice,
        "lesion_surface_dice": share,
        "lesion_hd95": hd95,
        "lesions_found": len(met.matched),
        "lesions_missed": missed,
        "lesions_false": met.false,
        **_volumes(reference, remaining, spacing),
    }


def _surface_scores(
    reference: Mask, prediction: Mask, spacing: Sequence[float], tolerance: float
) -> tuple[float, float, float]:
    """Return Dice, surface Dice and HD95."""
    share = border_share(border_distances(reference, prediction, spacing), _including(tolerance))
    return dice(reference, prediction), share, surface_hd95(reference, prediction, spacing)


def _including(tolerance: float) -> float:
    """Return a tolerance that includes distances equal to it despite rounding: 3 x 0.1 mm is more than 0.3 mm."""
    return tolerance * (1 + 1e-9)


# --- 2026: one to one -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Pairs:
    """True and predicted lesions, matched one to one.

    Attributes:
        matched: For each pair, volume of the true lesion in mm³, Dice, surface Dice and HD95 in mm.
        missed: Volume of each true lesion without a match, mm³.
        false: Volume of each predicted lesion without a match, mm³.
    """

    matched: Sequence[tuple[float, float, float, float]]
    missed: Sequence[float]
    false: Sequence[float]


def _match(
    reference: Mask, prediction: Mask, spacing: Sequence[float], distance_spacing: Sequence[float], tolerance: float
) -> _Pairs:
    """Match lesions one to one so that the sum of their Dice is highest, and score the matched pairs."""
    from scipy.ndimage import find_objects, generate_binary_structure, label
    from scipy.optimize import linear_sum_assignment

    touching = generate_binary_structure(reference.ndim, reference.ndim)
    lesions, count = label(reference, touching)
    parts, predicted_count = label(prediction, touching)
    voxels = np.bincount(lesions.ravel(), minlength=count + 1)[1:]
    predicted_voxels = np.bincount(parts.ravel(), minlength=predicted_count + 1)[1:]
    both = (lesions > 0) & (parts > 0)
    common = np.zeros((count, predicted_count), np.int64)
    np.add.at(common, (lesions[both] - 1, parts[both] - 1), 1)
    dice = 2 * common / (voxels[:, None] + predicted_voxels[None, :]) if common.size else common.astype(np.float64)
    rows, columns = linear_sum_assignment(np.where(common > 0, 1 - dice, 1 + _PAIR))
    pairs = [(row, column) for row, column in zip(rows, columns, strict=True) if common[row, column]]
    boxes, predicted_boxes = find_objects(lesions), find_objects(parts)
    cubic = math.prod(spacing)
    matched = []
    for row, column in pairs:
        where = around([boxes[row], predicted_boxes[column]])
        # If the tolerance equals the voxel size, a distance of one voxel has to equal it exactly.
        distances = exact_border_distances(lesions[where] == row + 1, parts[where] == column + 1, distance_spacing)
        matched.append(
            (
                float(voxels[row]) * cubic,
                float(dice[row, column]),
                border_share(distances, tolerance),
                pooled_hd95(distances),
            )
        )
    missed = [float(voxels[row]) * cubic for row in sorted(set(range(count)) - {row for row, _ in pairs})]
    false = set(range(predicted_count)) - {column for _, column in pairs}
    return _Pairs(matched, missed, [float(predicted_voxels[column]) * cubic for column in sorted(false)])


def _whole(
    reference: Mask, prediction: Mask, spacing: Sequence[float], penalty: float, tolerance: float
) -> dict[str, float]:
    if not reference.any() and not prediction.any():
        scores = (math.nan, math.nan, math.nan)
    elif not reference.any() or not prediction.any():
        scores = (0.0, 0.0, penalty)
    else:
        distances = border_distances(reference, prediction, spacing)
        scores = (dice(reference, prediction), border_share(distances, tolerance), pooled_hd95(distances))
    return dict(zip(("dice", "surface_dice", "hd95"), scores, strict=True))


def _counts(prefix: str, found: int, missed: int, false: int) -> dict[str, float]:
    """Return numbers of lesions, precision, recall and F1."""
    return {
        f"{prefix}lesions_found": found,
        f"{prefix}lesions_missed": missed,
        f"{prefix}lesions_false": false,
        f"{prefix}lesion_precision": found / (found + false) if found + false else math.nan,
        f"{prefix}lesion_recall": found / (found + missed) if found + missed else math.nan,
        f"{prefix}lesion_f1": 2 * found / (2 * found + missed + false) if found + missed + false else math.nan,
    }


def _lesion_means(
    prefix: str, matched: Sequence[tuple[float, float, float, float]], others: int, penalty: float
) -> Iterator[tuple[str, float]]:
    """Yield means and standard deviations over the matched pairs and `others` lesions that score 0 or the penalty."""
    for column, (key, worst) in enumerate((("dice", 0.0), ("surface_dice", 0.0), ("hd95", penalty)), start=1):
        values = np.array([pair[column] for pair in matched] + [worst] * others)
        yield f"{prefix}lesion_{key}", float(values.mean()) if values.size else math.nan
        yield f"{prefix}lesion_{key}_sd", float(values.std()) if values.size else math.nan


def _one_to_one(
    reference: Mask, prediction: Mask, spacing: Sequence[float], rules: Rules, tolerance: float
) -> dict[str, float]:
    """Score by the rules: a missed or false lesion counts 0, or the penalty, among those of its size; lengths in mm."""
    assert rules.penalty is not None, "the diagonal is a penalty of rules with dilation"
    tolerance = _including(tolerance)
    pairs = _match(reference, prediction, spacing, spacing, tolerance)
    others = len(pairs.missed) + len(pairs.false)
    scores = {
        **_whole(reference, prediction, spacing, rules.penalty, tolerance),
        **_counts("", len(pairs.matched), len(pairs.missed), len(pairs.false)),
        **dict(_lesion_means("", pairs.matched, others, rules.penalty)),
        **_volumes(reference, prediction, spacing),
    }
    if rules.large_volume is not None:
        for prefix, large in (("large_", True), ("small_", False)):
            matched = [pair for pair in pairs.matched if (pair[0] >= rules.large_volume) == large]
            missed = sum((volume >= rules.large_volume) == large for volume in pairs.missed)
            false = sum((volume >= rules.large_volume) == large for volume in pairs.false)
            found = sum(pair[1] >= rules.found_from_dice for pair in matched)
            scores |= _counts(prefix, found, missed + len(matched) - found, false)
            scores |= dict(_lesion_means(prefix, matched, missed + false, rules.penalty))
    return scores


def _like_brats_evaluation(
    reference: Mask, prediction: Mask, spacing: Sequence[float], rules: Rules, tolerance: float
) -> dict[str, float]:
    """Score as brats-evaluation 0.0.10 does, including where it differs from the rules. Ignores `tolerance`.

    The tool compares whole regions as if voxels were 1 mm, with a tolerance of 0.5. It compares lesions with the voxel
    sizes of x, y, z along z, y, x, and with the smallest voxel size as the tolerance. Its means over all lesions leave
    out missed and false ones. Its means over large or small lesions include missed ones of that size and false ones of
    any size.
    """
    del tolerance
    assert rules.penalty is not None, "the diagonal is a penalty of rules with dilation"
    pairs = _match(reference, prediction, spacing, spacing[::-1], min(spacing))
    found, missed, false = len(pairs.matched), len(pairs.missed), len(pairs.false)
    scores = {
        **_whole(reference, prediction, (1.0,) * reference.ndim, rules.penalty, 0.5),
        **_counts("", found, missed, false),
        **_volumes(reference, prediction, spacing),
    }
    means = dict(_lesion_means("", pairs.matched, 0, rules.penalty))
    if not found and missed + false:
        means |= {"lesion_dice": 0.0, "lesion_surface_dice": 0.0, "lesion_hd95": math.inf}
    scores |= means
    if rules.large_volume is not None:
        for prefix, large in (("large_", True), ("small_", False)):
            matched = [pair for pair in pairs.matched if (pair[0] >= rules.large_volume) == large]
            lost = sum((volume >= rules.large_volume) == large for volume in pairs.missed)
            if not matched and not lost:
                counts = dict.fromkeys(_counts(prefix, 0, 0, 0), math.nan)
                means = dict(_lesion_means(prefix, [], 0, rules.penalty))
            else:
                good = sum(pair[1] >= rules.found_from_dice for pair in matched)
                counts = _counts(prefix, good, lost + len(matched) - good, false)
                # The tool prints 0 where a ratio is undefined.
                counts |= {key: 0.0 for key, value in counts.items() if math.isnan(value)}
                means = dict(_lesion_means(prefix, matched, lost + false, rules.penalty))
            scores |= counts | means
    return scores
