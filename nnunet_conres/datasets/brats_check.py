"""Check the files of BraTS cases before anything is written."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from nnunet_conres.datasets.brats_find import Case
from nnunet_conres.datasets.brats_scheme_files import LABELS, Content
from nnunet_conres.datasets.brats_schemes import label_message, labels_outside
from nnunet_conres.errors import InputError
from nnunet_conres.images.content import DamagedFileError
from nnunet_conres.images.nifti import Grid, grid_difference, read_grid, read_nifti


@dataclass(frozen=True)
class Findings:
    """Result of `check_case`. Errors prevent the conversion of a case, warnings do not.

    Attributes:
        errors: One message each.
        warnings: One message each.
        values: Label values in the label file other than 0.
    """

    errors: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    values: tuple[int, ...] = ()


def check_case(case: Case) -> Findings:
    """Read all files of a case and report problems with files, geometry and labels.

    Args:
        case: The complete case.

    Returns:
        Errors: a file that is unreadable, truncated or of the wrong dimensions; voxels that are not finite; geometry
        that differs between files; labels outside the scheme. Warnings: labels that are all background, images that
        are 0.
    """
    errors: list[str] = []
    warnings: list[str] = []
    values: tuple[int, ...] = ()
    scheme = case.scheme
    reference: tuple[Path, Grid] | None = None
    for path, content in zip((*case.images, case.labels), (*scheme.layout.images, LABELS), strict=True):
        if path is None:
            continue
        try:
            file = read_nifti(path)
            grid = read_grid(path, file.header)
        except InputError as error:
            advice = "Get the file again, or leave" if isinstance(error, DamagedFileError) else "Correct it, or leave"
            errors.append(f"{error} {advice} the case out.")
            continue
        wrong = _kind_error(file.stored, len(content))
        if wrong:
            errors.append(f"{path} {wrong}")
            continue
        if reference is None:
            reference = (path, grid)
        else:
            difference = grid_difference(reference[1], grid)
            if difference:
                errors.append(
                    f"{path} and {reference[0].name} do not lie on the same voxel grid: {difference}. All files of a "
                    f"case need the same grid; resample the file that differs, or leave the case out."
                )
        not_finite = file.not_finite()
        if not_finite:
            errors.append(f"{path} has {not_finite} voxels that are NaN or infinite; expected finite intensities.")
        elif content == LABELS:
            labels = file.labels()
            strange = labels_outside(labels, (0, *scheme.labels))
            if strange:
                errors.append(label_message(path, strange, scheme))
                continue
            values = tuple(value for value in scheme.labels if (labels == value).any())
            if not values:
                warnings.append(f"{path} is all background: the case has no tumour.")
        else:
            warnings += _empty_channels(path, file.stored, content)
    return Findings(tuple(errors), tuple(warnings), values)


def _kind_error(voxels: NDArray[Any], channels: int) -> str:
    """Return an error message about a file's dimensions or voxel type, or an empty string."""
    if voxels.dtype.kind not in "iuf":
        return f"has voxels of type {voxels.dtype}; expected one number per voxel."
    if channels == 1 and voxels.ndim != 3:
        return f"has {voxels.ndim} dimensions; expected one three-dimensional image."
    if channels > 1 and (voxels.ndim != 4 or voxels.shape[3] != channels):
        return f"has size {' x '.join(map(str, voxels.shape))}; expected {channels} channels along a fourth dimension."
    return ""


def _empty_channels(path: Path, voxels: NDArray[Any], channels: Content) -> Iterator[str]:
    for index, name in enumerate(channels):
        channel = voxels if len(channels) == 1 else voxels[..., index]
        # The middle slice is enough for most channels that are not empty.
        if not channel[..., channel.shape[2] // 2].any() and not channel.any():
            where = "" if len(channels) == 1 else f" in channel {index}, {name}"
            yield f"{path} is 0 everywhere{where}: the modality is empty."
