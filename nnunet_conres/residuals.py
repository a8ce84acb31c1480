"""The inter-slice residual of images, feature maps and label maps.

For a volume ``v`` with slices ``v[0] ... v[D-1]`` along the slice axis the inter-slice residual is ``r[0] = 0`` and
``r[k] = |v[k] - v[k-1]|``. For a binary mask it is 1 where the mask changes from one slice to the next: at the borders
of objects, and most of all where their shape changes fastest.

Source: Zhang et al., "Inter-slice Context Residual Learning for 3D Medical Image Segmentation", IEEE TMI 2021,
arXiv 2011.14155, section III.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

# A class is one label; a region is the union of several.
LabelOrRegion: TypeAlias = "int | Sequence[int]"


def _slice_dimension(tensor: Tensor, slice_axis: int) -> int:
    """Convert a spatial axis (0, 1, 2 or -1, ...) of a (B, C, X, Y, Z) tensor to a tensor dimension."""
    spatial_axes = tensor.ndim - 2
    if not -spatial_axes <= slice_axis < spatial_axes:
        raise ValueError(
            f"slice_axis {slice_axis} is out of range: a tensor of shape {tuple(tensor.shape)} has "
            f"{max(spatial_axes, 0)} spatial axes. Expected (batch, channel, *spatial)."
        )
    return slice_axis % spatial_axes + 2


def inter_slice_residual(volume: Tensor, slice_axis: int = 0) -> Tensor:
    """Return the absolute difference of every slice to the previous one; 0 in the first slice.

    Differentiable for floating-point input, and traced by ``torch.compile`` without a graph break.

    Args:
        volume: Images, feature maps or masks, shape (B, C, *spatial), on any device; floating point, boolean, or
            an integer type that can hold the differences.
        slice_axis: Spatial axis along which slices follow each other; 0 is the first axis of an nnU-Net patch, the one
            with the largest spacing.

    Returns:
        Tensor of the shape, dtype and device of ``volume``. Values are >= 0; for a boolean mask, True where it changes.

    Raises:
        ValueError: If ``volume`` has no such spatial axis.

    Source: Zhang et al. 2021, section III-B.
    """
    dim = _slice_dimension(volume, slice_axis)
    depth = volume.shape[dim]
    if depth < 2:
        return torch.zeros_like(volume)
    current = volume.narrow(dim, 1, depth - 1)
    previous = volume.narrow(dim, 0, depth - 1)

    if volume.is_floating_point():
        # One subtraction of two views, then one padded copy; F.pad counts from the last dimension backwards.
        padding = [0, 0] * (volume.ndim - dim - 1) + [1, 0]
        return F.pad((current - previous).abs(), padding)

    residual = torch.zeros_like(volume)
    if volume.dtype == torch.bool:
        difference = current ^ previous
    else:
        # Unsigned integers would wrap below zero, and small signed ones would overflow.
        wide = torch.int64 if volume.dtype.itemsize > 2 else torch.int32
        difference = (current.to(wide) - previous.to(wide)).abs()
    residual.narrow(dim, 1, depth - 1).copy_(difference)
    return residual


def residual_mask(annotated: Tensor, slice_axis: int = 0) -> Tensor:
    """Return where the residual of a partly annotated label map is defined: where both slices are annotated.

    It is undefined in the first slice, which has no previous slice.

    Args:
        annotated: True for annotated voxels, boolean, shape (B, 1, *spatial).
        slice_axis: Spatial axis along which slices follow each other.

    Returns:
        Boolean tensor of the same shape.

    Raises:
        ValueError: If ``annotated`` has no such spatial axis.
    """
    dim = _slice_dimension(annotated, slice_axis)
    mask = torch.zeros_like(annotated)
    depth = annotated.shape[dim]
    if depth > 1:
        both = annotated.narrow(dim, 1, depth - 1) & annotated.narrow(dim, 0, depth - 1)
        mask.narrow(dim, 1, depth - 1).copy_(both)
    return mask


def has_neighbours(annotated: np.ndarray, slice_axis: int = 0) -> bool:
    """Return whether any voxel and the voxel before it along the slice axis are both annotated.

    Otherwise no residual is defined.

    Args:
        annotated: True for annotated voxels, boolean, any number of axes.
        slice_axis: Axis along which slices follow each other.
    """
    first_to_last = np.moveaxis(annotated, slice_axis, 0)
    return bool((first_to_last[1:] & first_to_last[:-1]).any())


def label_residual(
    target: Tensor,
    *,
    classes: Sequence[LabelOrRegion] | None = None,
    ignore_label: int | None = None,
    slice_axis: int = 0,
) -> tuple[Tensor, Tensor | None]:
    """Return the inter-slice residual of an annotation, one binary channel per foreground class or region.

    Takes both formats of targets in nnU-Net's losses: label maps (one integer channel) and regions (one 0/1 channel per
    region, plus a last channel for the ignore label). If everything is annotated, the residual of the first slice is 0
    by definition.

    Args:
        target: Label map, shape (B, 1, *spatial), any integer or floating dtype, when ``classes`` is given; otherwise
            regions, shape (B, R, *spatial) or (B, R + 1, *spatial) with the ignore label last, bool or 0/1.
        classes: Foreground labels, or regions as sequences of labels. None if the channels of ``target`` are regions
            already.
        ignore_label: Label of unannotated voxels, None if everything is annotated. For region targets any value but
            None means that the last channel marks unannotated voxels.
        slice_axis: Spatial axis along which slices follow each other.

    Returns:
        The residual, boolean, shape (B, number of classes or regions, *spatial), False where undefined, and the mask of
        defined voxels, boolean, shape (B, 1, *spatial), or None if everything is annotated.

    Raises:
        ValueError: If a label map has more than one channel, or the slice axis is out of range.
    """
    if classes is None:
        if ignore_label is None:
            return inter_slice_residual(target.bool(), slice_axis), None
        annotated: Tensor | None = ~target[:, -1:].bool()
        membership = target[:, :-1].bool()
    else:
        if target.shape[1] != 1:
            raise ValueError(
                f"A label map has one channel, this target has shape {tuple(target.shape)}. Leave `classes` out if its "
                f"channels are regions."
            )
        annotated = target != ignore_label if ignore_label is not None else None
        membership = torch.cat([_belongs_to(target, labels) for labels in classes], 1)
    residual = inter_slice_residual(membership, slice_axis)
    if annotated is None:
        return residual, None
    mask = residual_mask(annotated, slice_axis)
    return residual & mask, mask


def _belongs_to(labels: Tensor, members: LabelOrRegion) -> Tensor:
    """Return a boolean mask of the voxels with one of the given labels; the loop of comparisons avoids graph breaks."""
    # A single label may be a NumPy integer, as in nnU-Net's label manager.
    first, *others = members if isinstance(members, Sequence) else [members]
    mask = torch.eq(labels, first)
    for label in others:
        mask = mask | torch.eq(labels, label)
    return mask


def max_pool_to(mask: Tensor, size: Sequence[int]) -> Tensor:
    """Shrink a binary volume by max pooling: a coarse voxel is set if any voxel it covers is set.

    Nearest-neighbour shrinking, which nnU-Net uses for label maps, would lose most of a border that is one voxel wide.

    Args:
        mask: Binary volume, bool or 0/1, shape (B, C, X, Y, Z).
        size: Target spatial size (x, y, z), along each axis from 1 to the size of ``mask``. Sizes that a convolution
            with strides of 1 or 2 produces, ceil(X / stride), are pooled over the same blocks of voxels as in that
            convolution.

    Returns:
        Tensor of shape (B, C, *size), same dtype as ``mask``.

    Raises:
        ValueError: If a target size is below 1 or larger than the volume.
    """
    size = list(size)
    full = list(mask.shape[2:])
    if size == full:
        return mask
    if len(size) != len(full) or any(not 0 < s <= f for s, f in zip(size, full, strict=True)):
        raise ValueError(f"Cannot shrink a volume of size {full} to {size}: it must not be larger, nor empty.")
    # bfloat16 represents 0 and 1 exactly and needs half the memory traffic of float32.
    floating = mask if mask.is_floating_point() else mask.to(torch.bfloat16)
    window = [-(-f // s) for f, s in zip(full, size, strict=True)]
    if all(-(-f // w) == s for f, w, s in zip(full, window, size, strict=True)):
        pooled = F.max_pool3d(floating, window, window, ceil_mode=True)
    else:
        pooled = F.adaptive_max_pool3d(floating, size)
    return pooled.to(mask.dtype)


def residual_pyramid(
    residual: Tensor, mask: Tensor | None, sizes: Sequence[Sequence[int]]
) -> list[tuple[Tensor, Tensor | None]]:
    """Return max-pooled copies of a full-resolution residual target, one per size.

    A coarse voxel is defined if at least one voxel it covers is defined; its target is the maximum over the defined
    ones. Each size is pooled from the next finer one, like the feature maps of consecutive strided convolutions, so
    that odd sizes stay aligned with them. The result equals pooling the full-resolution residual directly, because a
    maximum of maxima is the maximum.

    Args:
        residual: Binary residual at full resolution, shape (B, C, X, Y, Z), False where undefined.
        mask: Where it is defined, shape (B, 1, X, Y, Z), or None for everywhere.
        sizes: Target spatial sizes, none larger than the one before; equal sizes share one tensor.

    Returns:
        Pairs (residual, mask) in the order of ``sizes``.

    Raises:
        ValueError: If a target size is larger than the one before, or than the volume.
    """
    levels = []
    for size in sizes:
        residual = max_pool_to(residual, size)
        mask = None if mask is None else max_pool_to(mask, size)
        levels.append((residual, mask))
    return levels
