"""Cases for the report's viewer: cropped, reduced to some slices and packed into pictures for a web page."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from nnunet_conres.evaluation.figures import content_range, grey_window

# WebP quality: compression artefacts are invisible at the size in which slices are shown.
_IMAGE_QUALITY: Final = 60

# Regions per plane: one bit each of an 8-bit grey picture.
_BITS: Final = 8

# Slices shown before the first and after the last labelled slice.
_MARGIN: Final = 3

# WebP's maximum side length in pixels.
_LONGEST_SIDE: Final = 16383

# Pixels per picture. A browser keeps a dozen pictures in memory, with four bytes per pixel.
_MOST_PIXELS: Final = 1 << 23


@dataclass(frozen=True)
class CaseVolumes:
    """Voxels of a case for the viewer.

    Slices are taken along the first axis and shown unchanged, the first row on top. The arrays should be in LPS
    orientation, in which slices are seen from the feet with the face up.

    Attributes:
        case_id: As in the comparison's list of cases.
        images: (C, z, y, x), any intensities; background has the value of the first voxel.
        channels: Name of every channel.
        reference: Label map (z, y, x), or None if there is none.
        predictions: Label map (z, y, x) of every model, by model key.
        regions: Label values of every label or region, by name.
        spacing: Voxel size along (z, y, x) in mm.
    """

    case_id: str
    images: NDArray[Any]
    channels: Sequence[str]
    reference: NDArray[Any] | None
    predictions: Mapping[str, NDArray[Any]]
    regions: Mapping[str, Sequence[int]]
    spacing: Sequence[float] = (1.0, 1.0, 1.0)

    def errors(self) -> list[str]:
        """Return a message for every error that prevents showing these volumes."""
        if self.images.ndim != 4 or 0 in self.images.shape:
            return [f"The images of {self.case_id} have shape {self.images.shape}; expected (C, z, y, x), none 0."]
        found = []
        if len(self.channels) != len(self.images):
            found.append(f"{self.case_id} has {len(self.images)} channels, but {len(self.channels)} names of channels.")
        labels = {f"prediction of {key}": prediction for key, prediction in self.predictions.items()}
        if self.reference is not None:
            labels["reference"] = self.reference
        for name, label_map in labels.items():
            if label_map.shape != self.images.shape[1:]:
                found.append(
                    f"The {name} of {self.case_id} has shape {label_map.shape}; expected {self.images.shape[1:]} like "
                    "the images."
                )
        if not labels:
            found.append(f"{self.case_id} has neither a reference nor a prediction; expected one at least.")
        if not self.regions:
            found.append(f"{self.case_id} names no regions; expected at least one, with its label values.")
        if len(self.spacing) != 3 or not all(np.isfinite(size) and size > 0 for size in self.spacing):
            found.append(f"The spacing of {self.case_id} is {tuple(self.spacing)}; expected three positive numbers.")
        return found


def pack_case(case: CaseVolumes, slices_per_case: int = 64) -> dict[str, Any]:
    """Convert volumes to the data of the page's viewer.

    Slices are cropped to the non-background area, windowed to 8 bits, and laid out side by side in one picture per
    channel, with invisible compression losses. Labels are stored without loss, one bit per region. So are the
    inter-slice residuals, which are computed on the whole volume before slices are selected.

    Args:
        case: The volumes.
        slices_per_case: Maximum number of slices, 1 or more. Fewer are kept if slices are very large.

    Returns:
        `id`; `size` (rows, columns) of a slice and `spacing` (y, x) of its pixels; `depth`, the number of slices of the
        volume; `slices`, the indices of the kept slices; `start`, the position of the initial slice in `slices`;
        `columns`, the number of slices side by side in a picture; `channels` with name and picture; `regions`; `labels`
        and `residuals`, pictures with eight regions each, by "reference" or the model's key. Pictures are data URLs.

    Raises:
        ValueError: The volumes do not match. Lists all errors.
    """
    errors = case.errors()
    if slices_per_case < 1:
        errors.append(f"slices_per_case is {slices_per_case}; expected 1 or more.")
    if errors:
        raise ValueError("\n".join(errors))
    label_maps = dict(case.predictions)
    if case.reference is not None:
        label_maps = {"reference": case.reference, **label_maps}
    membership = {
        key: np.stack([np.isin(label_map, list(values)) for values in case.regions.values()])
        for key, label_map in label_maps.items()
    }
    window = _shown_area(case.images, membership)
    rows, columns = (part.stop - part.start for part in window)
    largest = max(1, min(_MOST_PIXELS // (rows * columns), (_LONGEST_SIDE // rows) * (_LONGEST_SIDE // columns)))
    slices = _shown_slices(case.images, membership, min(slices_per_case, largest))
    per_row = min(_LONGEST_SIDE // columns, max(1, round(np.sqrt(len(slices) * rows / columns))))
    per_row = max(per_row, -(-len(slices) // max(1, _LONGEST_SIDE // rows)))

    def sheet(volume: NDArray[Any]) -> NDArray[Any]:
        return _side_by_side(volume[(slices, *window)], per_row)

    channels = []
    for name, image in zip(case.channels, case.images, strict=True):
        low, high = grey_window(image)
        grey = np.clip((sheet(image).astype(np.float32) - low) / (high - low), 0, 1) * 255
        channels.append({"name": str(name), "picture": _picture(np.rint(np.nan_to_num(grey)).astype(np.uint8))})
    return {
        "id": case.case_id,
        "size": [rows, columns],
        "spacing": [float(size) for size in case.spacing[1:]],
        "depth": int(case.images.shape[1]),
        "slices": [int(index) for index in slices],
        "start": _most_different(membership, slices),
        "columns": per_row,
        "channels": channels,
        "regions": [str(name) for name in case.regions],
        "labels": {
            key: [_picture(sheet(plane), lossless=True) for plane in _planes(masks)]
            for key, masks in membership.items()
        },
        "residuals": {
            key: [_picture(sheet(plane), lossless=True) for plane in _planes(_residuals(label_map, case.regions))]
            for key, label_map in label_maps.items()
        },
    }


def _residuals(label_map: NDArray[Any], regions: Mapping[str, Sequence[int]]) -> NDArray[np.bool_]:
    """Compute the inter-slice residual of every region, (R, z, y, x)."""
    import torch

    from nnunet_conres.residuals import label_residual

    target = torch.from_numpy(label_map.astype(np.int32))[None, None]
    residual, _ = label_residual(target, classes=[[int(value) for value in values] for values in regions.values()])
    return residual[0].numpy()


def _shown_area(images: NDArray[Any], membership: Mapping[str, NDArray[np.bool_]]) -> tuple[slice, slice]:
    """Return the rows and columns that contain more than background, in the images or in a label map."""
    ranges = [list(limits) for limits in content_range(images)]
    # False positives outside the head must stay visible.
    labelled = np.any([masks.any(axis=(0, 1)) for masks in membership.values()], axis=0)
    for axis, limits in enumerate(ranges):
        occupied = np.flatnonzero(labelled.any(axis=1 - axis))
        if occupied.size:
            limits[0] = min(limits[0], max(0, int(occupied[0]) - 1))
            limits[1] = max(limits[1], min(labelled.shape[axis], int(occupied[-1]) + 2))
    return slice(*ranges[0]), slice(*ranges[1])


def _shown_slices(images: NDArray[Any], membership: Mapping[str, NDArray[np.bool_]], number: int) -> NDArray[np.intp]:
    """Return evenly spaced indices over the labelled slices; without labels, over the non-background slices."""
    depth = images.shape[1]
    occupied = np.flatnonzero(np.any([masks.any(axis=(0, 2, 3)) for masks in membership.values()], axis=0))
    if not occupied.size:
        occupied = np.flatnonzero((images != images[:, :1, :1, :1]).any(axis=(0, 2, 3)))
    first, last = (occupied[0], occupied[-1]) if occupied.size else (0, depth - 1)
    first, last = max(0, int(first) - _MARGIN), min(depth - 1, int(last) + _MARGIN)
    return np.unique(np.rint(np.linspace(first, last, min(number, last - first + 1))).astype(np.intp))


def _most_different(membership: Mapping[str, NDArray[np.bool_]], slices: NDArray[np.intp]) -> int:
    """Return the position of the slice in which label maps differ most from the first label map.

    If no slice differs, it is the slice with most labels.
    """
    first, *others = (masks[:, slices] for masks in membership.values())
    different = np.zeros(len(slices), np.int64)
    for other in others:
        different += (first ^ other).sum(axis=(0, 2, 3))
    if not different.any():
        different = first.sum(axis=(0, 2, 3))
    return int(np.argmax(different)) if different.any() else len(slices) // 2


def _planes(masks: NDArray[np.bool_]) -> list[NDArray[np.uint8]]:
    """Pack masks (R, z, y, x) into the bits of 8-bit volumes (z, y, x): region r is bit r % 8 of volume r // 8."""
    planes = []
    for start in range(0, len(masks), _BITS):
        plane = np.zeros(masks.shape[1:], np.uint8)
        for bit, mask in enumerate(masks[start : start + _BITS]):
            plane |= mask.astype(np.uint8) << bit
        planes.append(plane)
    return planes


def _side_by_side(slices: NDArray[Any], per_row: int) -> NDArray[Any]:
    """Arrange slices (n, y, x) in rows of `per_row`, left to right and top to bottom; unused space is 0."""
    number, rows, columns = slices.shape
    grid = -(-number // per_row)
    sheet = np.zeros((grid * per_row, rows, columns), slices.dtype)
    sheet[:number] = slices
    return sheet.reshape(grid, per_row, rows, columns).transpose(0, 2, 1, 3).reshape(grid * rows, per_row * columns)


def _picture(pixels: NDArray[np.uint8], *, lossless: bool = False) -> str:
    """Encode an 8-bit grey picture as a data URL."""
    from PIL import Image, features

    kind = "png" if lossless else "webp" if features.check("webp") else "jpeg"
    buffer = io.BytesIO()
    if lossless:
        Image.fromarray(pixels).save(buffer, kind, optimize=True)
    else:
        Image.fromarray(pixels).save(buffer, kind, quality=_IMAGE_QUALITY)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
