"""Overlap of two masks, and distances between their surfaces, with the conventions of the challenges' evaluations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

Distances = tuple[NDArray[np.float64], NDArray[np.float64]]


def border_distances(
    reference: NDArray[np.bool_], prediction: NDArray[np.bool_], spacing: Sequence[float]
) -> Distances:
    """Compute the distances between the border voxels of two masks.

    A voxel is on the border if one of its six neighbours is not in the mask, or if it lies at the border of the image.

    Args:
        reference: Not empty.
        prediction: Not empty, same shape.
        spacing: Voxel size along the axes, mm.

    Returns:
        The distance of every border voxel of the reference to the prediction's border, and of every border voxel of the
        prediction to the reference's border, mm.
    """
    from scipy.ndimage import binary_erosion
    from scipy.spatial import KDTree

    where = box_of(reference | prediction)
    points = [
        np.argwhere(mask & ~binary_erosion(mask)) * np.asarray(spacing, np.float64)
        for mask in (reference[where], prediction[where])
    ]
    there, _ = KDTree(points[1]).query(points[0])
    back, _ = KDTree(points[0]).query(points[1])
    return there, back


def exact_border_distances(
    reference: NDArray[np.bool_], prediction: NDArray[np.bool_], spacing: Sequence[float]
) -> Distances:
    """Compute the same as `border_distances` without rounding of coordinates: neighbours are exactly a voxel apart.

    Slower if the masks are far apart, because the distance map covers the space between them.
    """
    from scipy.ndimage import binary_erosion, distance_transform_edt

    where = box_of(reference | prediction)
    borders = [mask & ~binary_erosion(mask) for mask in (reference[where], prediction[where])]
    maps = [distance_transform_edt(~border, sampling=spacing) for border in borders]
    return maps[1][borders[0]], maps[0][borders[1]]


def pooled_hd95(distances: Distances) -> float:
    """Return the 95th percentile of the distances of both directions together, mm."""
    return float(np.percentile(np.concatenate(distances), 95))


def border_share(distances: Distances, tolerance: float) -> float:
    """Return the share of each border within the tolerance (mm) of the other border, averaged over both borders."""
    there, back = (float(np.mean(one_way <= tolerance)) for one_way in distances)
    return (there + back) / 2


def surface_hd95(reference: NDArray[np.bool_], prediction: NDArray[np.bool_], spacing: Sequence[float]) -> float:
    """Return the larger of the two directed 95th percentiles of surface distances, weighted by surface area.

    The surface lies between voxels: there is one piece in every cell of 2x2x2 voxels that is partly in the mask.

    Args:
        reference: Three axes.
        prediction: Same shape.
        spacing: Voxel size along the axes, mm.

    Returns:
        Distance in mm; infinite if a mask is empty.

    Source:
        Nikolov et al., JMIR 2021. BraTS used their implementation from 2023 to 2025.
    """
    from scipy.spatial import KDTree

    if not reference.any() or not prediction.any():
        return math.inf
    where = box_of(reference | prediction)
    areas = _areas(tuple(float(step) for step in spacing))
    points, sizes = [], []
    for mask in (reference[where], prediction[where]):
        codes = _codes(mask)
        cells = (codes > 0) & (codes < 255)
        points.append(np.argwhere(cells) * np.asarray(spacing))
        sizes.append(areas[codes[cells]])
    directed = []
    for one, other in ((0, 1), (1, 0)):
        distances, _ = KDTree(points[other]).query(points[one])
        order = np.argsort(distances)
        shares = np.cumsum(sizes[one][order]) / sizes[one].sum()
        at = int(np.searchsorted(shares, 0.95))
        directed.append(float(distances[order][min(at, distances.size - 1)]))
    return max(directed)


def _codes(mask: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Return which corners of each cell of 2x2x2 voxels are in a mask, one bit each.

    Cells that lie partly outside the image are included.
    """
    padded = np.pad(mask, 1).astype(np.uint8)
    size = [extent + 1 for extent in mask.shape]
    codes = np.zeros(size, np.uint8)
    for bit, corner in enumerate(np.ndindex(2, 2, 2)):
        part = tuple(slice(start, start + extent) for start, extent in zip(corner, size, strict=True))
        codes |= padded[part] << bit
    return codes


@cache
def _areas(spacing: tuple[float, ...]) -> NDArray[np.float64]:
    """Return the area (mm²) of the surface in a cell, by the cell's code.

    Marching cubes places the surface through the midpoints of the cell's edges.
    """
    from skimage.measure import marching_cubes

    areas = np.zeros(256)
    for code in range(1, 255):
        # A cell and its complement have the same surface. In ambiguous cells, each of the fewer corners is cut off
        # separately.
        fewer = code if code.bit_count() <= 4 else 255 - code
        corners = np.array([fewer >> bit & 1 for bit in range(8)], np.float64).reshape(2, 2, 2)
        vertices, faces, _, _ = marching_cubes(corners, 0.5, spacing=spacing, method="lorensen")
        triangles = vertices[faces].astype(np.float64)
        sides = triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0]
        areas[code] = np.linalg.norm(np.cross(*sides), axis=1).sum() / 2
    return areas


def dice(one: NDArray[np.bool_], other: NDArray[np.bool_], *, empty: float = 1.0) -> float:
    """Return the Dice of two masks; `empty` if both masks are empty."""
    total = int(one.sum()) + int(other.sum())
    return 2 * int((one & other).sum()) / total if total else empty


def box_of(mask: NDArray[np.bool_], margin: int = 0) -> tuple[slice, ...]:
    """Return the bounding box of a mask with a margin in voxels; the box of the first voxel if the mask is empty."""
    box = []
    for axis in range(mask.ndim):
        at = np.flatnonzero(mask.any(axis=tuple(other for other in range(mask.ndim) if other != axis)))
        box.append(slice(max(0, int(at[0]) - margin), int(at[-1]) + margin + 1) if at.size else slice(0, 1))
    return tuple(box)


def around(boxes: Sequence[tuple[slice, ...]]) -> tuple[slice, ...]:
    """Return the bounding box of all boxes with a margin of one voxel."""
    return tuple(
        slice(max(0, min(side.start for side in sides) - 1), max(side.stop for side in sides) + 1)
        for sides in zip(*boxes, strict=True)
    )
