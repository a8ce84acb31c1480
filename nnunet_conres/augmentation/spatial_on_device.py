"""Spatial transforms in two parts: parameters and the voxels they reach, on the CPU; resampling, on any device.

Positions are voxel indices in the patch that nnU-Net's loader would have cut out of the case (the initial patch), or in
the box within it that was loaded. Voxels outside of the box are padding, which grid_sample and batchgeneratorsv2's crop
add themselves.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from torch import Tensor
from torch.nn.functional import grid_sample

from nnunet_conres.augmentation.bspline import BSplineSpatialTransform

Interval = tuple[int, int]

# Padding values of nnU-Net's loader.
PADDED_IMAGE, PADDED_LABEL = 0, -1
# How far rounding in float32 may move a position, in voxels.
_ROUNDING = 0.01
# Voxels of label indicators that are resampled at a time, except that it is at least one label: 64 MiB.
INDICATOR_VOXELS = 2**24
# batchgeneratorsv2 compares the scores of labels in float16, between 0 and this.
_FULL_SCORE = 1000


class SpatialDraws:
    """Draws a spatial transform's parameters with its own ``get_parameters``, but without the sampling grid.

    Args:
        transform: SpatialTransform or BSplineSpatialTransform.
    """

    def __init__(self, transform: SpatialTransform) -> None:
        self.transform = transform
        # An elastic field is drawn for every voxel. All else is a matrix, for which a grid of one voxel is enough.
        self._drawing = copy.copy(transform)
        if transform.p_elastic_deform == 0:
            dim = len(transform.patch_size)
            self._drawing._grid_cache = {tuple(transform.patch_size): torch.zeros((1,) * dim + (dim,))}

    def __call__(self, image: Tensor) -> dict[str, Any]:
        """Draw the parameters for an image, of which only the shape (C, *spatial) is used."""
        if isinstance(self.transform, BSplineSpatialTransform):
            return self.transform.draw(image)
        parameters = self._drawing.get_parameters(image=image)
        if parameters["elastic_offsets"] is None:
            parameters["grid"] = None
        return {name: parameters[name] for name in ("grid", "center_location_in_pixels", "affine")}


def is_crop(parameters: dict[str, Any]) -> bool:
    """Return whether the patch is only cropped, without interpolation."""
    return all(parameters.get(name) is None for name in ("grid", "affine", "control_displacements"))


def reach(transform: SpatialTransform, parameters: dict[str, Any], shape: Sequence[int]) -> list[Interval]:
    """Return the voxels that a transform may read, along each axis, as half-open intervals.

    Args:
        transform: The transform.
        parameters: Parameters from ``SpatialDraws``.
        shape: Shape of the initial patch, spatial axes.

    Returns:
        Intervals in voxels of the initial patch, which may extend beyond it; none is empty.
    """
    patch, centre = transform.patch_size, parameters["center_location_in_pixels"]
    if is_crop(parameters):
        starts = [math.floor(c) - n // 2 for c, n in zip(centre, patch, strict=True)]
        intervals = [(start, start + int(n)) for start, n in zip(starts, patch, strict=True)]
    else:
        further = {"nearest": 0, "bilinear": 0, "bicubic": 1}
        beyond = max(further[transform.mode_image], further[transform.mode_seg])
        intervals = [
            (math.floor(low - _ROUNDING) - beyond, math.floor(high + _ROUNDING) + 2 + beyond)
            for low, high in _extremes(transform, parameters, shape)
        ]
    modes = (transform.padding_mode_image, transform.border_mode_seg)
    return [
        # With mirroring at the border take the whole axis: a tighter interval is not worth the effort.
        (min(low, 0), max(high, extent)) if "reflection" in modes and (low < 0 or high > extent) else (low, high)
        for (low, high), extent in zip(intervals, shape, strict=True)
    ]


def _extremes(
    transform: SpatialTransform, parameters: dict[str, Any], shape: Sequence[int]
) -> list[tuple[float, float]]:
    """Return the lowest and highest sampled position along each axis."""
    grid = parameters.get("grid")
    if grid is not None:
        points = grid.reshape(-1, len(shape)).flip(-1)
        low, high = points.amin(0).tolist(), points.amax(0).tolist()
        return [((a + 1) * s / 2 - 0.5, (b + 1) * s / 2 - 0.5) for a, b, s in zip(low, high, shape, strict=True)]
    dim = len(shape)
    affine = np.eye(dim) if parameters["affine"] is None else parameters["affine"]
    half = np.abs(affine) @ ((np.array(transform.patch_size) - 1) / 2)
    low, high = -half, half
    displacements = parameters.get("control_displacements")
    if displacements is not None:
        # the spline is a weighted mean of its control points
        moved = displacements.numpy().reshape(-1, dim) @ affine.T
        low, high = low + moved.min(0), high + moved.max(0)
    middle = np.array(parameters["center_location_in_pixels"]) - 0.5
    return list(zip((middle + low).tolist(), (middle + high).tolist(), strict=True))


def labels_in(*segmentations: np.ndarray[Any, Any]) -> list[int]:
    """Return the labels that occur, ascending."""
    return sorted({int(label) for one in segmentations for label in pd.unique(one.ravel())})


def pads_like_the_loader(transform: SpatialTransform) -> bool:
    """Return whether the transform pads image and labels with the same values as nnU-Net's loader."""
    image = 0 if transform.padding_mode_image == "zeros" else transform.padding_value_image
    labels = 0 if transform.border_mode_seg == "zeros" else transform.padding_value_seg
    return (
        transform.padding_mode_image in ("zeros", "constant")
        and transform.border_mode_seg in ("zeros", "constant")
        and (image, labels) == (PADDED_IMAGE, PADDED_LABEL)
    )


def apply_spatial(
    transform: SpatialTransform,
    data: dict[str, Any],
    parameters: dict[str, Any],
    *,
    shape: Sequence[int],
    box: Sequence[Interval],
    labels: Sequence[int],
    sticks_out: bool,
) -> dict[str, Any]:
    """Resample image and segmentation on their device.

    Args:
        transform: The transform.
        data: ``image``, (C, *box), and ``segmentation``, (S, *box).
        parameters: Parameters from ``SpatialDraws``.
        shape: Shape of the initial patch.
        box: The part of the initial patch that ``data`` contains, an interval along each axis.
        labels: All labels of the segmentation, ascending; extra labels do no harm.
        sticks_out: Whether the transform may read beyond the box.

    Returns:
        ``data``, changed.
    """
    if is_crop(parameters):
        centre = [math.floor(c) - low for c, (low, _) in zip(parameters["center_location_in_pixels"], box, strict=True)]
        return transform.apply(data, grid=None, center_location_in_pixels=centre)
    grid = local_grid(transform, parameters, shape, box, data["image"].device)
    # Each assignment frees the input, which is among the largest tensors.
    data["image"] = transform._apply_to_image(data["image"], grid=grid)
    data["segmentation"] = resample_labels(transform, data["segmentation"], grid, labels, sticks_out)
    return data


def local_grid(
    transform: SpatialTransform,
    parameters: dict[str, Any],
    shape: Sequence[int],
    box: Sequence[Interval],
    device: torch.device,
) -> Tensor:
    """Return the sampling grid for grid_sample on a box of the initial patch, float32, (*patch_size, dim)."""
    # position p relative to the centre of the initial patch is factor * p + offset in units of the box, -1 to 1
    factors = [2 / (high - low) for low, high in box]
    offsets = [(s - low - high) / (high - low) for s, (low, high) in zip(shape, box, strict=True)]
    grid = parameters.get("grid")
    if grid is not None:
        factors = [f * s / 2 for f, s in zip(factors, shape, strict=True)]
        return grid.to(device) * torch.tensor(factors[::-1], device=device) + torch.tensor(offsets[::-1], device=device)
    centre = [c - s / 2 for c, s in zip(parameters["center_location_in_pixels"], shape, strict=True)]
    constants = [f * c + o for f, c, o in zip(factors, centre, offsets, strict=True)]
    if isinstance(transform, BSplineSpatialTransform):
        control_points = transform.control_positions(parameters)
        assert control_points is not None
        control_points = (control_points * torch.tensor(factors) + torch.tensor(constants)).flip(-1)
        # CUDA may round products of float32 matrices to 10 bits, depending on the user's settings.
        exact = torch.float32 if device.type == "cpu" else torch.float64
        return transform.control_grid.evaluate(control_points.to(device, exact)).float()
    size, affine = transform.patch_size, parameters["affine"]
    dim = len(size)
    # sums of one term per axis instead of a product with the matrix: exact on CUDA too
    grid = torch.empty((*size, dim), device=device)
    for axis, other in itertools.product(range(dim), range(dim)):
        voxels = torch.arange(size[other], dtype=torch.float64, device=device) - (size[other] - 1) / 2
        term = voxels * (factors[axis] * affine[axis, other])
        term = (term + constants[axis] if other == 0 else term).float()
        term = term.reshape([-1 if a == other else 1 for a in range(dim)])
        target = grid[..., dim - 1 - axis]
        if other == 0:
            target.copy_(term.expand(target.shape))
        else:
            target.add_(term)
    return grid


def resample_labels(
    transform: SpatialTransform, segmentation: Tensor, grid: Tensor, labels: Sequence[int], sticks_out: bool
) -> Tensor:
    """Resample a segmentation on any device as SpatialTransform does: the label with the highest score wins.

    A score is the interpolated indicator of a label. One call of grid_sample takes all channels and a few labels.

    Args:
        transform: Defines the interpolation, the padding and which label wins a tie.
        segmentation: (S, *box).
        grid: As for grid_sample.
        labels: All labels of the segmentation, ascending.
        sticks_out: Whether the grid may reach beyond the box.

    Returns:
        Tensor of shape (S, *patch_size), same dtype.
    """
    pads = transform.border_mode_seg in ("zeros", "constant")
    padding = "zeros" if pads else transform.border_mode_seg
    pad_label = transform.padding_value_seg if transform.border_mode_seg == "constant" else 0

    def sample(volumes: Tensor, mode: str) -> Tensor:
        return grid_sample(volumes[None], grid[None], mode=mode, padding_mode=padding, align_corners=False)[0]

    def nearest() -> Tensor:
        shift = float(pad_label) if pads else 0.0
        return sample(segmentation.float().sub_(shift), "nearest").add_(shift).to(segmentation.dtype)

    if transform.mode_seg == "nearest":
        return nearest()
    if sticks_out and pads:
        labels = sorted({*labels, int(pad_label)})
    channels, size = segmentation.shape[0], grid.shape[:-1]
    if len(labels) == 1:
        return segmentation.new_full((channels, *size), labels[0])

    def scores(some: Sequence[int]) -> Tensor:
        """Return the scores of some labels, (label, S, *patch)."""
        indicators = torch.empty((len(some), *segmentation.shape), device=segmentation.device)
        for indicator, label in zip(indicators, some, strict=True):
            torch.eq(segmentation, label, out=indicator)
            if pads and label == pad_label:
                indicator.sub_(1)  # grid_sample pads with 0
        found = sample(indicators.mul_(_FULL_SCORE).flatten(0, 1), transform.mode_seg)
        found = found.unflatten(0, (len(some), channels))
        if pads and pad_label in some:
            found[list(some).index(pad_label)].add_(_FULL_SCORE)
        return found.half()

    tiebreak = transform.seg_tiebreak
    if len(labels) == 2:
        (high,) = scores(labels[1:])
        half = _FULL_SCORE / 2
        result = segmentation.new_full(high.shape, labels[0])
        result.masked_fill_(high >= half if tiebreak == "highest" else high > half, labels[1])
        if tiebreak == "nearest":
            tied = high == half
            if tied.any():
                torch.where(tied, nearest(), result, out=result)
        return result

    best = torch.full((channels, *size), -math.inf, dtype=torch.float16, device=segmentation.device)
    result = segmentation.new_zeros(best.shape)
    closest = nearest() if tiebreak == "nearest" else None
    score_of_closest = torch.full_like(best, -math.inf)
    at_a_time = max(1, INDICATOR_VOXELS // segmentation.numel())
    for first in range(0, len(labels), at_a_time):
        some = labels[first : first + at_a_time]
        for label, score in zip(some, scores(some), strict=True):
            if closest is not None:
                torch.where(closest == label, score, score_of_closest, out=score_of_closest)
            result.masked_fill_(score >= best if tiebreak == "highest" else score > best, label)
            torch.maximum(best, score, out=best)
    if closest is not None:
        torch.where(score_of_closest == best, closest, result, out=result)
    return result
