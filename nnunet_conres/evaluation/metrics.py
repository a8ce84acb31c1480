"""Metrics of a predicted mask against its reference: overlap, surface, volume and lesions, in physical units.

`docs/reference/metrics.md` states the convention and the source of each.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from nnunet_conres.errors import InputError
from nnunet_conres.evaluation.lesions import grown_together
from nnunet_conres.evaluation.rules import Rules
from nnunet_conres.evaluation.surfaces import around, box_of

# Raise when the value of a metric changes, so that older scores are not read from a cache.
METRIC_VERSION: Final = 1

Better = Literal["higher", "lower", "zero", "none"]


@dataclass(frozen=True)
class Metric:
    """Names and meaning of a metric.

    Attributes:
        key: Name in scores, tables and JSON.
        name: Display name.
        phrase: Name of the compared value within a sentence.
        unit: "mm", "ml", "%", or empty for a fraction of 1 or a count.
        better: Which values are better: "higher", "lower", those nearer to "zero", or "none" if the value only
            describes the case.
        decimals: Digits to show after the decimal point; 0 for a count.
        description: Meaning, in one line.
    """

    key: str
    name: str
    phrase: str
    unit: str
    better: Better
    decimals: int
    description: str

    @property
    def higher_is_better(self) -> bool:
        """Whether a higher value of `compared` is better."""
        return self.better == "higher"

    def compared(self, value: float) -> float:
        """Return the value to compare models by: without its sign if zero is best."""
        return abs(value) if self.better == "zero" else value

    def text(self, value: float, *, decimals: int | None = None, unit: bool = True) -> str:
        """Format a value for people: rounded, with its unit; "-" if it is NaN.

        Args:
            value: In the metric's unit.
            decimals: Digits after the decimal point, if not the metric's.
            unit: Whether to write the unit.
        """
        if math.isnan(value):
            return "-"
        digits = self.decimals if decimals is None else decimals
        # Rounding may leave "-0.000"; adding zero makes it "0.000".
        number = f"{round(value, digits) + 0.0:.{digits}f}"
        return f"{number} {self.unit}" if unit and self.unit else number


def _of_sizes() -> Iterator[Metric]:
    """Yield the metrics of challenges that match lesions one to one: of all, of large and of small lesions."""
    for size in ("", "large ", "small "):
        prefix, lesions = size.replace(" ", "_"), f"{size}lesions"
        name = lesions.capitalize()
        if size:
            yield Metric(f"{prefix}lesions_found", f"{name} found", f"number of {lesions} found", "", "higher", 0, "")
            yield Metric(f"{prefix}lesions_missed", f"{name} missed", f"number of {lesions} missed", "", "lower", 0, "")
            yield Metric(f"{prefix}lesions_false", f"False {lesions}", f"number of false {lesions}", "", "lower", 0, "")
        for key, what, about in (
            ("precision", "precision", "Share of the predicted lesions that are true."),
            ("recall", "recall", "Share of the true lesions that are found."),
            ("f1", "F1", "Harmonic mean of precision and recall."),
        ):
            yield Metric(f"{prefix}lesion_{key}", f"{name}: {what}", f"{what} of {lesions}", "", "higher", 3, about)
        measures: tuple[tuple[str, str, str, Better, int], ...] = (
            ("dice", "Dice", "", "higher", 3),
            ("surface_dice", "surface Dice", "", "higher", 3),
            ("hd95", "HD95", "mm", "lower", 2),
        )
        for key, what, unit, better, digits in measures:
            phrase = f"{what} of {lesions}"
            if size:
                yield Metric(f"{prefix}lesion_{key}", f"{name}: {what}", phrase, unit, better, digits, "")
            title, phrase = f"{name}: standard deviation of {what}", f"standard deviation of {phrase}"
            about = "Over the lesions of the case."
            yield Metric(f"{prefix}lesion_{key}_sd", title, phrase, unit, "none", digits, about)


_DESCRIPTIONS: Final = {
    "dice": "Overlap of the two volumes, 0 to 1.",
    "iou": "Intersection divided by union, 0 to 1.",
    "hd95": "95 % of each surface lies at most this far from the other.",
    "surface_dice": "Share of the two surfaces that lies within the tolerance of the other, 0 to 1.",
    "volume_error": "Predicted minus true volume.",
    "relative_volume_error": "Predicted minus true volume, in percent of the true volume.",
    "lesion_dice": "Mean Dice of the lesions, where missed and falsely found ones count as 0.",
    "lesion_hd95": "Mean HD95 of the lesions, where missed and falsely found ones count as the penalty.",
    "lesion_surface_dice": "Mean surface Dice of the lesions, where missed and falsely found ones count as 0.",
    "lesions_found": "True lesions matched by a predicted lesion.",
    "lesions_missed": "True lesions without a matching predicted lesion.",
    "lesions_false": "Predicted lesions without a matching true lesion.",
    "reference_volume": "Volume of the reference.",
    "predicted_volume": "Volume of the prediction.",
}

# Key, name, phrase, unit, which values are better, decimals.
_ROWS: Final[tuple[tuple[str, str, str, str, Better, int], ...]] = (
    ("dice", "Dice", "Dice", "", "higher", 3),
    ("iou", "IoU", "IoU", "", "higher", 3),
    ("hd95", "HD95", "HD95", "mm", "lower", 2),
    ("surface_dice", "Surface Dice", "surface Dice", "", "higher", 3),
    ("volume_error", "Volume error", "absolute volume error", "ml", "zero", 2),
    ("relative_volume_error", "Relative volume error", "absolute relative volume error", "%", "zero", 1),
    ("lesion_dice", "Lesion-wise Dice", "lesion-wise Dice", "", "higher", 3),
    ("lesion_hd95", "Lesion-wise HD95", "lesion-wise HD95", "mm", "lower", 2),
    ("lesion_surface_dice", "Lesion-wise surface Dice", "lesion-wise surface Dice", "", "higher", 3),
    ("lesions_found", "Lesions found", "number of lesions found", "", "higher", 0),
    ("lesions_missed", "Lesions missed", "number of lesions missed", "", "lower", 0),
    ("lesions_false", "False lesions", "number of false lesions", "", "lower", 0),
    ("reference_volume", "True volume", "true volume", "ml", "none", 2),
    ("predicted_volume", "Predicted volume", "predicted volume", "ml", "none", 2),
)
_PLAIN: Final = [Metric(*row, _DESCRIPTIONS[row[0]]) for row in _ROWS]

METRICS: Final[Mapping[str, Metric]] = MappingProxyType(
    {metric.key: metric for metric in (*_PLAIN[:-2], *_of_sizes(), *_PLAIN[-2:])}
)


@dataclass(frozen=True)
class MetricOptions:
    """Conventions of the metrics, which may depend on the data set.

    Attributes:
        tolerance: Tolerance of the surface Dice, mm: a surface at most this far off counts as correct.
        empty: Scores of a case whose reference, prediction or both have no voxel: "brats", as in the BraTS challenge
            (both empty: perfect; one: Dice 0 and the penalty in mm), or "nan", as in nnU-Net: NaN where a value is
            undefined.
        penalty: Distance in mm that a missed or false mask or lesion counts. None for the diagonal of the image:
            373.1 mm for an image of BraTS, where the challenge takes 374.
        lesion_dilation: True lesions with up to twice this many voxels between them count as one. A predicted lesion
            matches a true one up to this many voxels away. BraTS 2023 takes 3 for gliomas and 1 for metastases.
        lesion_volume: True lesions up to this many mm³ are ignored. BraTS 2023 takes 50 for gliomas, 2 for metastases.
        rules: Rules of a challenge. They replace all of the above except the tolerance.
        like_brats_evaluation: Whether to compute what the organisers' tool prints, where it differs from the rules.
    """

    tolerance: float = 1.0
    empty: Literal["brats", "nan"] = "brats"
    penalty: float | None = None
    lesion_dilation: int = 3
    lesion_volume: float = 50.0
    rules: Rules | None = None
    like_brats_evaluation: bool = False

    def __post_init__(self) -> None:
        errors = []
        if not (math.isfinite(self.tolerance) and self.tolerance >= 0):
            errors.append(f"tolerance is {self.tolerance}; expected 0 mm or more.")
        if self.empty not in ("brats", "nan"):
            errors.append(f"empty is {self.empty!r}; expected 'brats' or 'nan'.")
        if self.penalty is not None and not (math.isfinite(self.penalty) and self.penalty >= 0):
            errors.append(f"penalty is {self.penalty}; expected 0 mm or more, or None for the image's diagonal.")
        if self.lesion_dilation < 0:
            errors.append(f"lesion_dilation is {self.lesion_dilation}; expected 0 voxels or more.")
        if not (math.isfinite(self.lesion_volume) and self.lesion_volume >= 0):
            errors.append(f"lesion_volume is {self.lesion_volume}; expected 0 mm³ or more.")
        if self.like_brats_evaluation and (self.rules is None or not self.rules.table):
            errors.append(
                "brats-evaluation scores the challenges of 2026 only; expected their rules, such as 2026-MET, with "
                "like_brats_evaluation."
            )
        if errors:
            raise InputError(errors)

    @property
    def measured(self) -> tuple[str, ...]:
        """Keys of the metrics that are measured, in the order of the table."""
        if self.rules is None:
            return _MEASURED
        if self.rules.matching == "dilation":
            return (*(key for key in _MEASURED if key not in _OWN), "lesion_surface_dice")
        sizes = ("", "large_", "small_") if self.rules.large_volume is not None else ("",)
        others = [key for key in METRICS if key.startswith(("large_", "small_"))]
        return tuple(
            key for key in METRICS if key not in _OWN and (key not in others or key.split("_")[0] + "_" in sizes)
        )


_OWN: Final = ("iou", "volume_error", "relative_volume_error")
"""Metrics that no challenge scores."""

_MEASURED: Final = (
    "dice",
    "iou",
    "hd95",
    "surface_dice",
    "volume_error",
    "relative_volume_error",
    "lesion_dice",
    "lesion_hd95",
    "lesions_found",
    "lesions_missed",
    "lesions_false",
    "reference_volume",
    "predicted_volume",
)


def measure(
    reference: NDArray[np.bool_],
    prediction: NDArray[np.bool_],
    spacing: Sequence[float],
    options: MetricOptions | None = None,
    *,
    ignored: NDArray[np.bool_] | None = None,
    lesions: bool = True,
) -> dict[str, float]:
    """Measure all metrics of a predicted mask.

    Args:
        reference: The true mask, two or three axes. Axes of one voxel are left out: a slice has an outline, not a
            surface, and no volume in ml.
        prediction: The predicted mask, same shape.
        spacing: Voxel size along the axes, mm.
        options: Conventions; BraTS's by default.
        ignored: Voxels that are not annotated, same shape: they belong to neither mask, and a surface towards them
            does not count.
        lesions: Whether to measure lesions too, which takes minutes for a mask in thousands of pieces.

    Returns:
        The value of every metric that needs no challenge's rules; NaN if undefined.

    Raises:
        ValueError: Shapes or spacing do not fit each other.

    Source:
        Maier-Hein et al., "Metrics reloaded", Nature Methods 2024 (Dice, IoU, HD95, surface Dice); LaBella et al. and
        Moawad et al., BraTS 2023 (lesions, empty masks).
    """
    options = options or MetricOptions()
    _check(reference, prediction, spacing, ignored)
    diagonal = math.hypot(*(reference.shape[axis] * spacing[axis] for axis in _axes(reference.shape)))
    if ignored is not None and ignored.any():
        reference, prediction = reference & ~ignored, prediction & ~ignored
    else:
        ignored = None
    pair = _crop(reference, prediction, ignored, tuple(spacing), margin=max(1, options.lesion_dilation))
    penalty = diagonal if options.penalty is None else options.penalty
    # In the order of the table, not of the computation.
    found = {**_overlap(pair, options), **_surfaces(pair, options, penalty)}
    if lesions:
        found |= _lesions(pair, options, penalty)
    return {key: float(found[key]) for key in _MEASURED if key in found}


# --- the two masks --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Pair:
    """Both masks, cropped to the box that holds them and a margin, without axes of one voxel."""

    reference: NDArray[np.bool_]
    prediction: NDArray[np.bool_]
    ignored: NDArray[np.bool_] | None  # voxels that are not annotated
    spacing: tuple[float, ...]
    flat: bool  # the image is a slice


def _check(
    reference: NDArray[np.bool_],
    prediction: NDArray[np.bool_],
    spacing: Sequence[float],
    ignored: NDArray[np.bool_] | None,
) -> None:
    errors = []
    for name, mask in (("reference", reference), ("prediction", prediction), ("ignored mask", ignored)):
        if mask is None:
            continue
        if mask.dtype != np.bool_:
            errors.append(f"The {name} has values of type {mask.dtype}; expected True and False.")
        if mask.shape != reference.shape:
            errors.append(f"The {name} has shape {mask.shape}; expected {reference.shape} like the reference.")
    if reference.ndim not in (2, 3) or not reference.size:
        errors.append(f"The reference has shape {reference.shape}; expected two or three axes with voxels in them.")
    if len(spacing) != reference.ndim or not all(math.isfinite(step) and step > 0 for step in spacing):
        errors.append(f"The spacing is {tuple(spacing)}; expected {reference.ndim} lengths above 0 mm.")
    if errors:
        raise ValueError("\n".join(errors))


def _axes(shape: Sequence[int]) -> list[int]:
    """Return the axes of more than one voxel; all axes if there are fewer than two such."""
    axes = [axis for axis, size in enumerate(shape) if size > 1]
    return axes if len(axes) > 1 else list(range(len(shape)))


def _crop(
    reference: NDArray[np.bool_],
    prediction: NDArray[np.bool_],
    ignored: NDArray[np.bool_] | None,
    spacing: tuple[float, ...],
    margin: int,
) -> _Pair:
    axes = _axes(reference.shape)
    thin = tuple(0 if axis not in axes else slice(None) for axis in range(reference.ndim))
    box = box_of((reference | prediction)[thin], margin)

    def cut(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
        return np.ascontiguousarray(mask[thin][box])

    unknown = None if ignored is None else cut(ignored)
    return _Pair(cut(reference), cut(prediction), unknown, tuple(spacing[axis] for axis in axes), len(axes) < 3)


# --- overlap and volume ---------------------------------------------------------------------------------------------


def _overlap(pair: _Pair, options: MetricOptions) -> dict[str, float]:
    true, predicted = int(pair.reference.sum()), int(pair.prediction.sum())
    common = int((pair.reference & pair.prediction).sum())
    perfect = _if_both_empty(1.0, options)
    # nnU-Net sets an arbitrary thickness for a slice, so a slice has no volume here.
    millilitres = math.nan if pair.flat else math.prod(pair.spacing) / 1000
    if true:
        relative = 100 * (predicted - true) / true
    else:
        # Relative to an empty reference the error would be infinite, and so would any mean with it.
        relative = math.nan if predicted else _if_both_empty(0.0, options)
    return {
        "dice": 2 * common / (true + predicted) if true + predicted else perfect,
        "iou": common / (true + predicted - common) if true + predicted else perfect,
        "volume_error": (predicted - true) * millilitres,
        "relative_volume_error": relative,
        "reference_volume": true * millilitres,
        "predicted_volume": predicted * millilitres,
    }


def _if_both_empty(value: float, options: MetricOptions) -> float:
    return value if options.empty == "brats" else math.nan


def _if_one_empty(penalty: float, options: MetricOptions) -> float:
    return penalty if options.empty == "brats" else math.nan


# --- surfaces -------------------------------------------------------------------------------------------------------


def _surfaces(pair: _Pair, options: MetricOptions, penalty: float) -> dict[str, float]:
    any_true, any_predicted = bool(pair.reference.any()), bool(pair.prediction.any())
    if not any_true and not any_predicted:
        return {"hd95": _if_both_empty(0.0, options), "surface_dice": _if_both_empty(1.0, options)}
    if not any_true or not any_predicted:
        return {"hd95": _if_one_empty(penalty, options), "surface_dice": 0.0}
    there, back = _surface_distances(pair)
    if not there.size or not back.size:
        # A mask that borders only on ignored voxels has no surface.
        return {"hd95": math.nan, "surface_dice": math.nan}
    # Include distances equal to the tolerance despite rounding: 3 x 0.1 mm is more than 0.3 mm.
    tolerance = options.tolerance * (1 + 1e-9)
    within = int((there <= tolerance).sum()) + int((back <= tolerance).sum())
    return {"hd95": _hd95(there, back), "surface_dice": within / (there.size + back.size)}


def _hd95(there: NDArray[np.float64], back: NDArray[np.float64]) -> float:
    return float(max(np.percentile(there, 95), np.percentile(back, 95)))


def _surface_distances(pair: _Pair) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the distance in mm of every surface voxel to the other surface: reference to prediction, and back."""
    from scipy.spatial import KDTree

    surfaces = [
        np.argwhere(_surface(mask, pair.ignored)) * np.asarray(pair.spacing)
        for mask in (pair.reference, pair.prediction)
    ]
    if not all(len(points) for points in surfaces):
        return np.empty(0), np.empty(0)
    # A distance map would cover the whole box, and a stray voxel far away makes that as large as the image.
    there, _ = KDTree(surfaces[1]).query(surfaces[0])
    back, _ = KDTree(surfaces[0]).query(surfaces[1])
    return there, back


def _surface(mask: NDArray[np.bool_], ignored: NDArray[np.bool_] | None) -> NDArray[np.bool_]:
    """Return the voxels of a mask that share a face with a voxel outside it, or with the border of the image."""
    from scipy.ndimage import binary_erosion

    # The mask may continue into ignored voxels, so there is no surface towards them.
    return mask & ~binary_erosion(mask if ignored is None else mask | ignored)


# --- lesions --------------------------------------------------------------------------------------------------------


def _lesions(pair: _Pair, options: MetricOptions, penalty: float) -> dict[str, float]:
    from scipy.ndimage import find_objects, generate_binary_structure, label

    # Each component of the dilated mask is the dilation of one lesion. It shows which parts belong together, and which
    # predictions are close enough to count as found.
    grown = grown_together(pair.reference, options.lesion_dilation)
    near, lesions = grown.reach, grown.count
    axes = pair.reference.ndim
    parts, predicted_lesions = label(pair.prediction, generate_binary_structure(axes, axes))  # 26 neighbours

    volume = np.bincount(near[pair.reference], minlength=lesions + 1)
    common = np.bincount(near[pair.reference & pair.prediction], minlength=lesions + 1)
    predicted_volume = np.bincount(parts[pair.prediction], minlength=predicted_lesions + 1)
    both = (near > 0) & (parts > 0)
    meetings = np.unique(np.stack([near[both], parts[both]]), axis=1)

    counted = np.flatnonzero(volume * math.prod(pair.spacing) > options.lesion_volume)
    found = np.intersect1d(counted, meetings[0])
    missed = counted.size - found.size
    false = predicted_lesions - np.unique(meetings[1]).size
    near_boxes, part_boxes = find_objects(near), find_objects(parts)
    dice: list[float] = []
    distances: list[float] = []
    for lesion in found:
        matched = meetings[1, meetings[0] == lesion]
        dice.append(2 * float(common[lesion]) / float(volume[lesion] + predicted_volume[matched].sum()))
        box = around([near_boxes[lesion - 1], *(part_boxes[part - 1] for part in matched)])
        of_lesion = _Pair(
            pair.reference[box] & (near[box] == lesion),
            np.isin(parts[box], matched),
            None if pair.ignored is None else pair.ignored[box],
            pair.spacing,
            pair.flat,
        )
        there, back = _surface_distances(of_lesion)
        if there.size and back.size:
            distances.append(_hd95(there, back))
    dice += [0.0] * (missed + false)
    if options.empty == "brats":
        distances += [penalty] * (missed + false)
    counts = {
        "lesions_found": found.size,
        "lesions_missed": missed,
        "lesions_false": false,
    }
    if not dice:
        return {**counts, "lesion_dice": _if_both_empty(1.0, options), "lesion_hd95": _if_both_empty(0.0, options)}
    return {
        **counts,
        "lesion_dice": math.fsum(dice) / len(dice),
        "lesion_hd95": math.fsum(distances) / len(distances) if distances else math.nan,
    }
