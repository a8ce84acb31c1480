"""NIfTI files to the last byte: what ITK, with which nnU-Net reads, passes over in silence is an error here."""

from __future__ import annotations

import gzip
import io
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import nibabel

READ_ERRORS: Final = (OSError, EOFError, zlib.error, RuntimeError, ValueError, OverflowError)
"""What reading a damaged file may raise."""

_HEADER_SIZE: Final = 348
# The header, and four bytes that say that no extension follows.
_VOXELS_AT: Final = 352
# For images: about as small as the default, in a third of the time.
_COMPRESSION: Final = 4


@dataclass(frozen=True)
class Nifti:
    """Content of a NIfTI-1 file.

    Attributes:
        header: Its header.
        stored: Voxels as stored, without the header's scaling, (x, y, z, ...), in memory as in the file: x fastest.
    """

    header: nibabel.Nifti1Header
    stored: NDArray[Any]

    def values(self) -> NDArray[Any]:
        """Voxels with the header's scaling."""
        slope, intercept = _scaling(self.header)
        return self.stored if (slope, intercept) == (1.0, 0.0) else np.asarray(self.stored * slope + intercept)

    def not_finite(self) -> int:
        """Number of voxels that are NaN or infinite."""
        if not np.issubdtype(self.stored.dtype, np.inexact):
            return 0
        return int(self.stored.size - np.count_nonzero(np.isfinite(self.stored)))


def is_nifti(path: Path) -> bool:
    """Whether a file is called as NIfTI files are, and is not hidden as macOS's `._` files are."""
    return path.name.lower().endswith((".nii", ".nii.gz")) and not path.name.startswith(".")


def stem(path: Path) -> str:
    """File name without .nii or .nii.gz."""
    name = path.name
    for ending in (".nii.gz", ".nii"):
        if name.lower().endswith(ending):
            return name[: -len(ending)]
    return name


def read_nifti(path: Path) -> Nifti:
    """Read a NIfTI-1 file, compressed or not; what was compressed is compared with its check sum.

    Raises:
        OSError, EOFError, zlib.error, ValueError: The file is not there, cut short, damaged or not NIfTI-1.
    """
    content = path.read_bytes()
    if path.name.lower().endswith(".gz"):
        content = gzip.decompress(content)
    header = _header(content[:_HEADER_SIZE])
    shape = tuple(int(size) for size in header.get_data_shape())
    dtype = header.get_data_dtype()
    offset = int(header["vox_offset"]) or _VOXELS_AT
    expected = offset + math.prod(shape) * dtype.itemsize
    if len(content) < expected:
        raise ValueError(f"it is truncated: {len(content)} bytes where its header promises {expected}")
    stored = np.frombuffer(content, dtype, math.prod(shape), offset).reshape(shape, order="F")
    return Nifti(header, stored)


def read_header(path: Path) -> nibabel.Nifti1Header:
    """Read a NIfTI-1 file's header only. Raises what `read_nifti` does."""
    with gzip.open(path, "rb") if path.name.lower().endswith(".gz") else path.open("rb") as stream:
        return _header(stream.read(_HEADER_SIZE))


def _header(content: bytes) -> nibabel.Nifti1Header:
    import nibabel

    sizes = (int.from_bytes(content[:4], "little"), int.from_bytes(content[:4], "big"))
    if len(content) < _HEADER_SIZE or _HEADER_SIZE not in sizes:
        raise ValueError("it does not begin with a NIfTI-1 header")
    header = nibabel.Nifti1Header.from_fileobj(io.BytesIO(content), check=False)
    try:
        header.get_data_dtype()
        header.get_slope_inter()
        header.get_best_affine()
    except (nibabel.spatialimages.HeaderDataError, KeyError) as error:
        raise ValueError(f"its header has an impossible voxel type or scaling: {error}") from error
    return header


def _scaling(header: nibabel.Nifti1Header) -> tuple[float, float]:
    """Slope and intercept of a header; a slope of 0 or NaN means none."""
    slope, intercept = header.get_slope_inter()
    return (1.0, 0.0) if slope is None else (float(slope), float(intercept or 0.0))


def write_nifti(path: Path, voxels: NDArray[Any], like: nibabel.Nifti1Header) -> None:
    """Write voxels, unscaled, in the place and orientation that another file's header tells, compressed.

    Args:
        path: Ends in .nii.gz.
        voxels: (x, y, z).
        like: Header of a file whose first three axes are those of the voxels.
    """
    header = like.copy()
    header.set_data_shape(voxels.shape)
    header.set_data_dtype(voxels.dtype)
    header.set_slope_inter(1.0, 0.0)
    header["cal_min"] = header["cal_max"] = 0
    # Extensions of the other file are left behind.
    header["vox_offset"] = _VOXELS_AT
    header["magic"] = b"n+1"
    content = voxels.astype(header.get_data_dtype(), copy=False).tobytes(order="F")
    if voxels.dtype == np.uint8:
        # Labels: long runs of one value. Half the time of any other way.
        compressor = zlib.compressobj(1, zlib.DEFLATED, 31, zlib.DEF_MEM_LEVEL, zlib.Z_RLE)
    else:
        compressor = zlib.compressobj(_COMPRESSION, zlib.DEFLATED, 31)
    with path.open("wb") as stream:
        stream.write(compressor.compress(header.binaryblock + b"\0\0\0\0"))
        stream.write(compressor.compress(content))
        stream.write(compressor.flush())


def compress(source: Path, target: Path) -> None:
    """Compress a file, byte for byte."""
    with gzip.GzipFile(target, "wb", compresslevel=_COMPRESSION, mtime=0) as stream:
        stream.write(source.read_bytes())


@dataclass(frozen=True)
class Grid:
    """Where the voxels of a file lie.

    Attributes:
        size: Number of voxels along x, y, z.
        spacing: mm.
        origin: mm, as ITK has it.
        direction: Columns of the direction matrix, row by row.
        affine: Voxel to mm by the header's sform, else its qform, else neither, as nibabel has it.
    """

    size: tuple[int, ...]
    spacing: tuple[float, ...]
    origin: tuple[float, ...]
    direction: tuple[float, ...]
    affine: NDArray[Any]


def read_grid(path: Path, header: nibabel.Nifti1Header) -> Grid:
    """Where a file's voxels lie for ITK, with which nnU-Net reads, and by its header.

    Raises:
        RuntimeError: ITK refuses the file, for example because its axes are not at right angles.
    """
    import SimpleITK

    reader = SimpleITK.ImageFileReader()
    reader.SetFileName(str(path))
    reader.SetImageIO("NiftiImageIO")
    reader.ReadImageInformation()
    dimensions = reader.GetDimension()
    direction = np.reshape(reader.GetDirection(), (dimensions, dimensions))[:3, :3]
    return Grid(
        size=tuple(reader.GetSize()[:3]),
        spacing=tuple(reader.GetSpacing()[:3]),
        origin=tuple(reader.GetOrigin()[:3]),
        direction=tuple(float(cosine) for cosine in direction.ravel()),
        affine=header.get_best_affine(),
    )


def grid_difference(first: Grid, second: Grid) -> str:
    """What differs between two voxel grids beyond the precision of NIfTI's float32, or an empty string.

    A header tells its geometry twice, and ITK and nibabel choose between the two by different rules; grids are the same
    if they are for either.
    """
    if first.size != second.size:
        return f"size {_numbers(second.size)}, expected {_numbers(first.size)}"
    # nnU-Net compares spacings with this tolerance and stops at more.
    if not np.allclose(first.spacing, second.spacing, rtol=1e-5, atol=1e-8):
        return f"spacing {_numbers(second.spacing)} mm, expected {_numbers(first.spacing)} mm"
    # A direction that is stored as a quaternion can come out this far from itself: a tenth of a voxel in a corner.
    if np.allclose(first.affine, second.affine, rtol=1e-5, atol=1e-3):
        return ""
    if not np.allclose(first.origin, second.origin, rtol=1e-5, atol=1e-3):
        return f"origin {_numbers(second.origin)} mm, expected {_numbers(first.origin)} mm"
    if not np.allclose(first.direction, second.direction, rtol=0, atol=1e-3):
        return f"direction {_numbers(second.direction)}, expected {_numbers(first.direction)}"
    return ""


def _numbers(values: Sequence[float]) -> str:
    return " x ".join(f"{value:.7g}" for value in values)
