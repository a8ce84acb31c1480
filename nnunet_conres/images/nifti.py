"""NIfTI files: headers as nibabel objects, stored voxels, and the voxel grid."""

from __future__ import annotations

import contextlib
import gzip
import io
import math
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from nnunet_conres.files import written_whole
from nnunet_conres.images.content import read_content, too_short, unreadable

if TYPE_CHECKING:
    import nibabel

# Header sizes of NIfTI-1 and NIfTI-2. Four bytes after the header say that no extension follows.
_HEADER_SIZES: Final = (348, 540)
_NO_EXTENSION: Final = b"\0\0\0\0"
_VOXELS_AT: Final = _HEADER_SIZES[0] + len(_NO_EXTENSION)
# Compression level of images: about as small as with the default, in a third of the time.
_COMPRESSION: Final = 4
# Labels are rounded at most by this much, however coarse the rounding of their storage.
_FARTHEST: Final = 0.01


@dataclass(frozen=True)
class Nifti:
    """Content of a NIfTI file.

    Attributes:
        header: Header of the file.
        stored: Voxels as stored, without the header's scaling, (x, y, z, ...), in memory as in the file: x fastest.
            Trailing axes of length 1 after the third are dropped, as in ITK.
        compressed: Whether the file is compressed, whatever its name says.
    """

    header: nibabel.Nifti1Header
    stored: NDArray[Any]
    compressed: bool = False

    @property
    def scaling(self) -> tuple[float, float]:
        """Slope and intercept; a slope of 0 or NaN means none."""
        slope, intercept = self.header.get_slope_inter()
        return (1.0, 0.0) if slope is None else (float(slope), float(intercept or 0.0))

    def values(self) -> NDArray[Any]:
        """Return the voxels with the header's scaling."""
        slope, intercept = self.scaling
        return self.stored if (slope, intercept) == (1.0, 0.0) else np.asarray(self.stored * slope + intercept)

    def labels(self) -> NDArray[Any]:
        """Return the values, rounded to integers where they differ only by the rounding of their storage."""
        return whole_numbers(self.values(), self.scaling[1])

    def not_finite(self) -> int:
        """Return the number of voxels that are NaN or infinite."""
        if not np.issubdtype(self.stored.dtype, np.inexact):
            return 0
        return int(self.stored.size - np.count_nonzero(np.isfinite(self.stored)))


def whole_numbers(values: NDArray[Any], intercept: float = 0.0) -> NDArray[Any]:
    """Round labels to the integers that they stand for.

    A header's slope and intercept are 32-bit numbers: 50 x 0.02 is 0.99999998, and 32000 x 0.01 - 319 is 0.99999285.
    A value becomes an integer if it differs from it by no more than the 32-bit rounding error of
    `slope x stored + intercept`.

    Args:
        values: Values of any shape and type.
        intercept: Intercept of the header.

    Returns:
        The values. Those that are not near an integer are unchanged.
    """
    if values.dtype.kind != "f":
        return values
    nearest = np.rint(values)
    # Rounding error of the product plus that of the sum.
    tolerance = np.finfo(np.float32).eps * (np.abs(values - intercept) + abs(intercept))
    with np.errstate(invalid="ignore"):
        return np.where(np.abs(values - nearest) <= np.minimum(tolerance, _FARTHEST), nearest, values)


def is_nifti(path: Path) -> bool:
    """Return whether a file is named as a NIfTI file, and is not hidden as macOS's `._` files are."""
    return path.name.lower().endswith((".nii", ".nii.gz")) and not path.name.startswith(".")


def stem(path: Path) -> str:
    """Return the file name without .nii or .nii.gz."""
    name = path.name
    for ending in (".nii.gz", ".nii"):
        if name.lower().endswith(ending):
            return name[: -len(ending)]
    return name


def read_nifti(path: Path) -> Nifti:
    """Read a NIfTI file, compressed or not, whatever its name says.

    nibabel reads as many bytes as the header says. It detects a truncated file, but not a wrong checksum, and does not
    recognise compressed data under a name without .gz. Here damaged files are errors, and such compressed data are
    read.

    Raises:
        DamagedFileError: The file is cut short, or does not match its checksum.
        InputError: It can't be read.
    """
    content, compressed = read_content(path)
    header = _header(path, content)
    shape = tuple(int(size) for size in header.get_data_shape())
    dtype = header.get_data_dtype()
    offset = int(header["vox_offset"]) or header.sizeof_hdr + len(_NO_EXTENSION)
    expected = offset + math.prod(shape) * dtype.itemsize
    if len(content) < expected:
        raise too_short(path, len(content), expected)
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    stored = np.frombuffer(content, dtype, math.prod(shape), offset).reshape(shape, order="F")
    return Nifti(header, stored, compressed)


def read_header(path: Path) -> nibabel.Nifti1Header:
    """Read only the header of a NIfTI file. Raises the same errors as `read_nifti`."""
    try:
        with gzip.open(path, "rb") if is_compressed(path) else path.open("rb") as stream:
            content = stream.read(_HEADER_SIZES[-1])
    except (OSError, EOFError, zlib.error):
        content = read_content(path)[0]  # raises an error with the reason
    return _header(path, content)


def is_compressed(path: Path) -> bool:
    """Return whether a file's content is compressed with gzip, whatever its name says."""
    with path.open("rb") as stream:
        return stream.read(2) == b"\x1f\x8b"


def _header(path: Path, content: bytes) -> nibabel.Nifti1Header:
    import nibabel

    sizes = (int.from_bytes(content[:4], "little"), int.from_bytes(content[:4], "big"))
    kinds = zip(_HEADER_SIZES, (nibabel.Nifti1Header, nibabel.Nifti2Header), strict=True)
    kind = next((kind for size, kind in kinds if size in sizes and len(content) >= size), None)
    if kind is None:
        raise unreadable(path, "it does not begin with a NIfTI header")
    header = kind.from_fileobj(io.BytesIO(content), check=False)
    try:
        header.get_data_dtype()
        header.get_slope_inter()
        header.get_best_affine()
    except (nibabel.spatialimages.HeaderDataError, KeyError) as error:
        raise unreadable(path, f"its header has an impossible voxel type or scaling: {error}") from error
    return header


def write_nifti(path: Path, voxels: NDArray[Any], like: nibabel.Nifti1Header) -> None:
    """Write voxels, unscaled and compressed, with the position and orientation of another file's header.

    Args:
        path: The file, which ends in .nii.gz. The write is atomic.
        voxels: (x, y, z).
        like: Header of a file whose first three axes are those of the voxels.

    Raises:
        InputError: The file can't be written.
    """
    import nibabel

    # Write NIfTI-1 even if the other header is NIfTI-2: every program reads the older version.
    header = nibabel.Nifti1Header.from_header(like, check=False)
    header.set_data_shape(voxels.shape)
    header.set_data_dtype(voxels.dtype)
    header.set_slope_inter(1.0, 0.0)
    header["cal_min"] = header["cal_max"] = 0
    # Extensions of the other file are left out.
    header["vox_offset"] = _VOXELS_AT
    header["magic"] = b"n+1"
    content = voxels.astype(header.get_data_dtype(), copy=False).tobytes(order="F")
    if voxels.dtype == np.uint8:
        # Labels have long runs of one value: run-length encoding takes half the time of any other strategy.
        compressor = zlib.compressobj(1, zlib.DEFLATED, 31, zlib.DEF_MEM_LEVEL, zlib.Z_RLE)
    else:
        compressor = zlib.compressobj(_COMPRESSION, zlib.DEFLATED, 31)
    with written_whole(path) as partial, partial.open("wb") as stream:
        stream.write(compressor.compress(header.binaryblock + _NO_EXTENSION))
        stream.write(compressor.compress(content))
        stream.write(compressor.flush())


def header_of(affine: NDArray[Any]) -> nibabel.Nifti1Header:
    """Return a header with the affine of voxels (x, y, z), for `write_nifti`.

    Args:
        affine: (4, 4), voxel to mm as in nibabel: towards the right, the front and the head.
    """
    import nibabel

    header = nibabel.Nifti1Header()
    header.set_data_shape((1, 1, 1))
    axes = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    # A quaternion can't represent axes that are not at right angles.
    header.set_qform(affine, code=1 if np.allclose(axes.T @ axes, np.eye(3), atol=1e-4) else 0)
    header.set_sform(affine, code=1)
    header.set_xyzt_units("mm")
    return header


def compress(source: Path, target: Path) -> None:
    """Write a gzip-compressed copy of a file without changing its content."""
    with (
        written_whole(target) as partial,
        gzip.GzipFile(partial, "wb", compresslevel=_COMPRESSION, mtime=0) as stream,
    ):
        stream.write(read_content(source)[0])


@dataclass(frozen=True)
class Grid:
    """Voxel grid of a file.

    Attributes:
        size: Number of voxels along x, y, z.
        spacing: mm.
        origin: mm, in ITK's convention.
        direction: Direction matrix, row by row.
        affine: Voxel to mm in nibabel's convention, from the header's sform, else its qform, else neither.
    """

    size: tuple[int, ...]
    spacing: tuple[float, ...]
    origin: tuple[float, ...]
    direction: tuple[float, ...]
    affine: NDArray[Any]


def read_grid(path: Path, header: nibabel.Nifti1Header) -> Grid:
    """Return a file's voxel grid as read by ITK, which nnU-Net uses, and the affine from its header.

    Raises:
        InputError: ITK refuses the file, for example because its axes are not at right angles.
    """
    import SimpleITK

    check_version(path, header)
    reader = SimpleITK.ImageFileReader()
    reader.SetImageIO("NiftiImageIO")
    try:
        with _named_right(path, header) as named:
            reader.SetFileName(str(named))
            reader.ReadImageInformation()
    except RuntimeError as error:
        raise unreadable(path, itk_reason(error)) from error
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
    """Return how two voxel grids differ beyond the precision of NIfTI's float32, or an empty string.

    A header stores its geometry twice, and ITK and nibabel choose between the two by different rules. Grids count as
    equal if they are equal in ITK or in nibabel.
    """
    if first.size != second.size:
        return f"size {_numbers(second.size)}, expected {_numbers(first.size)}"
    # nnU-Net compares spacings with this tolerance and stops if they differ more.
    if not np.allclose(first.spacing, second.spacing, rtol=1e-5, atol=1e-8):
        return f"spacing {_numbers(second.spacing)} mm, expected {_numbers(first.spacing)} mm"
    # A direction can change by this much when it is stored as a quaternion: a tenth of a voxel in a corner.
    if np.allclose(first.affine, second.affine, rtol=1e-5, atol=1e-3):
        return ""
    if not np.allclose(first.origin, second.origin, rtol=1e-5, atol=1e-3):
        return f"origin {_numbers(second.origin)} mm, expected {_numbers(first.origin)} mm"
    if not np.allclose(first.direction, second.direction, rtol=0, atol=1e-3):
        return f"direction {_numbers(second.direction)}, expected {_numbers(first.direction)}"
    return ""


def _numbers(values: Sequence[float]) -> str:
    return " x ".join(f"{value + 0.0:.7g}" for value in values)  # not -0


@contextlib.contextmanager
def _named_right(path: Path, header: nibabel.Nifti1Header) -> Iterator[Path]:
    """Yield the file, or a temporary copy of its header: ITK can't read compressed NIfTI without .gz in the name."""
    if path.name.lower().endswith(".gz") or not is_compressed(path):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        named = Path(folder, "header.nii")
        named.write_bytes(header.binaryblock + _NO_EXTENSION)
        yield named


def check_version(path: Path, header: nibabel.Nifti1Header) -> None:
    """Raise InputError for NIfTI-2, which ITK does not read."""
    if header.sizeof_hdr != _HEADER_SIZES[0]:
        raise unreadable(path, "it is NIfTI-2, and SimpleITK reads NIfTI-1 only; convert it")


def itk_reason(error: Exception) -> str:
    """Return the reason why ITK can't read a file, for messages."""
    if "orthonormal" in str(error):
        return (
            "its axes are not at right angles, which SimpleITK does not read; nibabel does "
            '("overwrite_image_reader_writer": "NibabelIO" in dataset.json)'
        )
    return "SimpleITK does not read it; it is damaged, or in another format than its name says"
