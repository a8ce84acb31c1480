"""Read and write images and labels with nnU-Net's own readers and writers, and with checks that these lack."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from nnunet_conres.errors import InputError, file_errors
from nnunet_conres.files import failed_write
from nnunet_conres.folders import partial_folder
from nnunet_conres.images.content import CHECKED, check_whole, unreadable
from nnunet_conres.images.nifti import (
    check_version,
    header_of,
    is_nifti,
    itk_reason,
    read_nifti,
    whole_numbers,
    write_nifti,
)
from nnunet_conres.text import number_text

# Maximum number of values in a message.
_NAMED: Final = 5


@dataclass(frozen=True)
class Volume:
    """An image file as nnU-Net reads it.

    Attributes:
        voxels: (C, z, y, x), float32.
        properties: Properties from nnU-Net's reader, for `write_seg` of the same class.
        not_finite: Number of voxels that are NaN or infinite in the file. ITK reads them as 0 from NIfTI files.
        intercept: Intercept of the scaling in the file's header.
    """

    voxels: NDArray[np.float32]
    properties: Mapping[str, Any]
    not_finite: int = 0
    intercept: float = 0.0

    @property
    def spacing(self) -> tuple[float, ...]:
        """Voxel size along (z, y, x), mm."""
        return tuple(float(step) for step in self.properties["spacing"])


@dataclass(frozen=True)
class Labels:
    """A label file as nnU-Net reads it.

    Attributes:
        voxels: (z, y, x), int32.
        properties: Properties from nnU-Net's reader, for `write_labels`.
        inexact: A value that nnU-Net reads slightly off its label, such as 0.9999998; None if there is none. nnU-Net's
            training cuts off the fraction.
    """

    voxels: NDArray[np.int32]
    properties: Mapping[str, Any]
    inexact: float | None = None

    @property
    def spacing(self) -> tuple[float, ...]:
        """Voxel size along (z, y, x), mm."""
        return tuple(float(step) for step in self.properties["spacing"])


# --- reading --------------------------------------------------------------------------------------------------------


def reader_for(dataset_json: Mapping[str, Any], files: Sequence[Path]) -> type:
    """Return nnU-Net's reader and writer class for a data set, chosen as nnU-Net does.

    Args:
        dataset_json: Content of dataset.json.
        files: Files of the data set, at least one. nnU-Net chooses a class that can read the first file; if no class
            can, the next file is tried.

    Returns:
        A subclass of nnU-Net's BaseReaderWriter.

    Raises:
        InputError: No class can read any of the files.
    """
    from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json

    files = list(dict.fromkeys(files))
    for path in files:
        # Suppress nnU-Net's output about classes that do not fit: it looks like an error.
        with contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(RuntimeError):
            return determine_reader_writer_from_dataset_json(dict(dataset_json), str(path), verbose=False)
    for path in files[:1]:
        _check_name_and_content(path)
    more = f" and {len(files) - 1} more" if len(files) > 1 else ""
    raise InputError(
        f"None of nnU-Net's readers can read {files[0]}{more}; expected files of the kind that their ending, "
        f"{dataset_json.get('file_ending')}, stands for."
    )


def reader_of_file(path: Path, dataset_json: Mapping[str, Any] | None = None) -> type:
    """Return nnU-Net's reader for one file.

    Args:
        path: The file.
        dataset_json: Content of the data set's dataset.json, if known. It may name the reader.

    Returns:
        The reader that dataset.json names; else SimpleITK's, or nibabel's if SimpleITK can't read the file.
    """
    from nnunetv2.imageio.nibabel_reader_writer import NibabelIO
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

    if dataset_json is not None and dataset_json.get("overwrite_image_reader_writer", "None") != "None":
        return reader_for({"file_ending": path.suffix, **dataset_json}, [path])
    if not is_nifti(path):
        return SimpleITKIO
    try:
        _call(SimpleITKIO, "read_images", path)
    except InputError:
        with contextlib.suppress(InputError):
            _call(NibabelIO, "read_images", path)
            return NibabelIO
    return SimpleITKIO


def check_image(path: Path, reader: type) -> None:
    """Check an image file for errors that nnU-Net's reader would not notice, or would report without a reason.

    Args:
        path: The file.
        reader: A subclass of nnU-Net's BaseReaderWriter.

    Raises:
        DamagedFileError: It is cut short, or does not match its checksum.
        InputError: It can't be read.
    """
    _check(path, reader)


def read_volume(path: Path, reader: type) -> Volume:
    """Read an image file as nnU-Net does, after checking that it is complete.

    Args:
        path: The file.
        reader: A subclass of nnU-Net's BaseReaderWriter.

    Raises:
        DamagedFileError: It is cut short, or does not match its checksum.
        InputError: It can't be read.
    """
    return _read(path, reader, "read_images")


def read_labels(path: Path, reader: type, allowed: Iterable[int] | None = None) -> Labels:
    """Read a label file as nnU-Net does, after checking that it is complete.

    Values that differ from an integer only by the rounding of their storage become that integer.

    Args:
        path: The file.
        reader: A subclass of nnU-Net's BaseReaderWriter.
        allowed: Allowed labels; any by default.

    Raises:
        DamagedFileError: It is cut short, or does not match its checksum.
        InputError: It can't be read, has NaN or infinite voxels, more than one channel, or invalid label values.
    """
    volume = _read(path, reader, "read_seg")
    if volume.not_finite:
        raise InputError(f"{path} has {volume.not_finite} voxels that are NaN or infinite; expected labels.")
    if volume.voxels.shape[0] != 1:
        raise InputError(f"{path} has {volume.voxels.shape[0]} channels; expected labels in a single one.")
    values = volume.voxels[0]
    with np.errstate(invalid="ignore"):  # values too large for int32 are found below
        integers = values.astype(np.int32)
    exact = np.array_equal(integers, values)
    labels = integers if exact else whole_numbers(values, volume.intercept)
    met = _values_of(labels)
    strange = met[(met % 1 != 0) | (np.abs(met) > np.iinfo(np.int32).max)]
    if strange.size:
        raise InputError(f"{path} has values that are not integers: {listed(strange)}; expected labels.")
    if allowed is not None:
        known = sorted(int(label) for label in allowed)
        strange = met[~np.isin(met, known)]
        if strange.size:
            raise InputError(
                f"{path} has labels that dataset.json does not name: {listed(strange)}; expected "
                f"{', '.join(map(str, known))}."
            )
    inexact = None if exact else float(values[values != labels][0])
    return Labels(labels.astype(np.int32, copy=False), volume.properties, inexact)


def _values_of(labels: NDArray[Any]) -> NDArray[Any]:
    """Return the values of a label map in ascending order."""
    if labels.dtype.kind == "i" and labels.size and labels.min() >= 0 and labels.max() < 1 << 16:
        return np.flatnonzero(np.bincount(labels.ravel()))  # a tenth of the time of np.unique
    return np.unique(labels)


def listed(values: NDArray[Any]) -> str:
    """Format numbers for a message: the first few, and the number of the others."""
    return ", ".join(number_text(value) for value in values[:_NAMED].tolist()) + (
        f" and {len(values) - _NAMED} more" if len(values) > _NAMED else ""
    )


def _read(path: Path, reader: type, method: str) -> Volume:
    not_finite, intercept = _check(path, reader)
    voxels, properties = _call(reader, method, path)
    if not_finite is None:
        not_finite = int(voxels.size - np.count_nonzero(np.isfinite(voxels)))
    return Volume(voxels, _three_axes(voxels, properties), not_finite, intercept)


def _call(reader: type, method: str, path: Path) -> tuple[NDArray[np.float32], Mapping[str, Any]]:
    """Call one of the reader's methods for a file, and turn its errors into InputError."""
    instance: Any = reader()
    try:
        # Suppress the reader's output about TIFF files without spacing.
        with contextlib.redirect_stdout(io.StringIO()):
            return getattr(instance, method)(str(path) if method == "read_seg" else [str(path)])
    except Exception as error:  # each of nnU-Net's readers raises different errors
        if _uses_itk(reader):
            raise unreadable(path, itk_reason(error)) from error
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = (lines[-1] if lines else type(error).__name__).rstrip(".")
        raise unreadable(path, f"{reader.__name__} does not read it ({reason})") from error


def _uses_itk(reader: type) -> bool:
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

    return issubclass(reader, SimpleITKIO)


def _check(path: Path, reader: type) -> tuple[int | None, float]:
    """Check a file for errors that its reader would not notice.

    Returns:
        The number of voxels that are not finite, None if the reader does not hide them; and the intercept of the
        scaling.
    """
    if not path.is_file():
        raise unreadable(path, "there is no such file")
    itk = _uses_itk(reader)
    if not is_nifti(path):
        if itk and not path.name.lower().endswith(CHECKED):
            raise unreadable(
                path,
                f"SimpleITK does not notice where a file of this format is cut short; convert it to one of "
                f"{', '.join(CHECKED)}",
            )
        check_whole(path)
        return None, 0.0
    nifti = read_nifti(path)
    named_compressed = path.name.lower().endswith(".gz")
    # ITK reads an uncompressed file under any name.
    if nifti.compressed != named_compressed and not (itk and named_compressed):
        raise unreadable(path, _misnamed(path, nifti.compressed))
    if itk:
        check_version(path, nifti.header)
        twin = path.with_name(path.name[:-3])
        if named_compressed and twin.is_file():
            raise unreadable(path, f"SimpleITK would take its voxels from {twin.name} beside it; move one of the two")
    return nifti.not_finite(), nifti.scaling[1]


def _check_name_and_content(path: Path) -> None:
    """Raise the reason why no reader can read a file, if it can be determined."""
    if not path.is_file():
        raise unreadable(path, "there is no such file")
    if not is_nifti(path):
        check_whole(path)
        return
    nifti = read_nifti(path)
    if nifti.compressed != path.name.lower().endswith(".gz"):
        raise unreadable(path, _misnamed(path, nifti.compressed))


def _misnamed(path: Path, compressed: bool) -> str:
    if compressed:
        return f"it is compressed, and its name does not say so; rename it to {path.name}.gz, or decompress it"
    return f"it is not compressed, although its name ends in .gz; rename it to {path.name[:-3]}, or compress it"


def _three_axes(voxels: NDArray[Any], properties: Mapping[str, Any]) -> Mapping[str, Any]:
    """Remove a fourth axis of length 1 from ITK's geometry: nnU-Net's `write_seg` fails with it."""
    stuff = properties.get("sitk_stuff")
    if stuff is None or len(stuff["spacing"]) != 4 or voxels.shape[0] != 1:
        return properties
    direction = np.reshape(stuff["direction"], (4, 4))[:3, :3]
    three = {"spacing": stuff["spacing"][:3], "origin": stuff["origin"][:3], "direction": tuple(direction.ravel())}
    return {**properties, "sitk_stuff": {**stuff, **three}}


# --- geometry -------------------------------------------------------------------------------------------------------


def affine_of(properties: Mapping[str, Any]) -> NDArray[np.float64] | None:
    """Return the affine of an image from nnU-Net's readers: voxel (x, y, z) to mm to the right, front and head.

    Args:
        properties: Properties from the reader.

    Returns:
        (4, 4), or None for 2D images and formats without a geometry.
    """
    if "nibabel_stuff" in properties:
        stuff = properties["nibabel_stuff"]
        return np.asarray(stuff.get("reoriented_affine", stuff["original_affine"]), dtype=np.float64)
    stuff = properties.get("sitk_stuff")
    if stuff is None or len(stuff["spacing"]) != 3:
        return None
    # ITK's axes point to the left and the back.
    turned = np.diag([-1.0, -1.0, 1.0])
    affine = np.eye(4)
    affine[:3, :3] = turned @ np.reshape(stuff["direction"], (3, 3)) @ np.diag(stuff["spacing"])
    affine[:3, 3] = turned @ np.asarray(stuff["origin"])
    return affine


def standing(voxels: NDArray[Any], properties: Mapping[str, Any]) -> tuple[NDArray[Any], tuple[float, ...]]:
    """Reorient a volume so that its slices are seen from the feet with the face up.

    Args:
        voxels: (z, y, x), from nnU-Net's reader.
        properties: Properties from the reader. A volume without a geometry is unchanged.

    Returns:
        The volume in LPS orientation, and its voxel size along (z, y, x) in mm.
    """
    spacing = tuple(float(step) for step in properties["spacing"])
    affine = affine_of(properties)
    if affine is None:
        return voxels, spacing
    turned, _, order = _turned(voxels.T, affine, "LPS")
    return turned.T, tuple(spacing[::-1][axis] for axis in order)[::-1]


def read_standing(path: Path, reader: type) -> tuple[NDArray[Any], tuple[float, ...]]:
    """Read voxels (z, y, x) and spacing of an image, reoriented as by `standing`."""
    volume = read_volume(path, reader)
    if volume.voxels.shape[0] != 1:
        raise InputError(f"{path} has {volume.voxels.shape[0]} channels; expected one, and a file for each channel.")
    return standing(volume.voxels[0], volume.properties)


def read_standing_labels(path: Path, reader: type) -> NDArray[np.int32]:
    """Read labels (z, y, x), reoriented as by `standing`."""
    labels = read_labels(path, reader)
    return standing(labels.voxels, labels.properties)[0]


def reversed_axes(properties: Mapping[str, Any]) -> tuple[bool, ...]:
    """Return which axes of an array from nnU-Net's readers are reversed in a view from the feet, face up."""
    affine = affine_of(properties)
    if affine is None:
        return (False, False, False)
    directions = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    # Pictures are read towards the patient's left, back and feet.
    read = np.array([-1.0, -1.0, -1.0])
    reverse = []
    for direction in directions.T[::-1]:
        main = int(np.argmax(np.abs(direction)))
        reverse.append(bool(direction[main] * read[main] < 0))
    return tuple(reverse)


def _turned(
    voxels: NDArray[Any], affine: NDArray[Any], sides: str
) -> tuple[NDArray[Any], NDArray[np.float64], list[int]]:
    """Reorient voxels (x, y, z) to axis codes such as LPS. Return voxels, affine, and each axis's old index."""
    from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform

    transform = ornt_transform(io_orientation(affine), axcodes2ornt(sides))
    order = [int(axis) for axis in np.argsort(transform[:, 0])]
    return apply_orientation(voxels, transform), affine @ inv_ornt_aff(transform, voxels.shape), order


# --- writing --------------------------------------------------------------------------------------------------------


def write_labels(path: Path, labels: NDArray[Any], properties: Mapping[str, Any], writer: type) -> None:
    """Write labels as nnU-Net does, and read them back: ITK does not report a full disk.

    Args:
        path: The file. The write is atomic. For TIFF nnU-Net writes a second file next to it, with the spacing.
        labels: (z, y, x).
        properties: Properties from nnU-Net's reader of the file whose geometry the labels have.
        writer: A subclass of nnU-Net's BaseReaderWriter.

    Raises:
        InputError: The file could not be written completely.
    """
    instance: Any = writer()
    with partial_folder(path) as folder:
        partial = folder / path.name
        try:
            instance.write_seg(labels, str(partial), dict(properties))
            same = np.array_equal(read_labels(partial, writer).voxels, labels)
        except Exception as error:  # each of nnU-Net's writers raises different errors
            raise failed_write(path, labels.nbytes) from error
        if not same:
            raise failed_write(path, labels.nbytes)
        # Move the label file last: its existence marks the case as complete.
        for written in sorted(folder.iterdir(), key=lambda written: written.name == path.name):
            with file_errors(path):
                written.replace(path.with_name(written.name))


def write_map(path: Path, voxels: NDArray[Any], properties: Mapping[str, Any]) -> Path:
    """Write a map of any numeric type as NIfTI, with the geometry of the file that it was computed from.

    Args:
        path: The file, which ends in .nii.gz. The write is atomic.
        voxels: (z, y, x).
        properties: Properties from nnU-Net's reader of that file. If the reader reoriented the image, the map gets the
            file's orientation again.

    Returns:
        The path.

    Raises:
        InputError: The file can't be written.
    """
    affine = affine_of(properties)
    assert affine is not None, "files without a geometry are refused"
    volume = voxels.T
    sides = _sides_of_file(properties)
    if sides is not None:
        volume, affine, _ = _turned(volume, affine, sides)
    write_nifti(path, volume, header_of(affine))
    return path


def _sides_of_file(properties: Mapping[str, Any]) -> str | None:
    """Return the axis codes of a file, such as LPS, if the reader reoriented the image, else None."""
    import nibabel

    if "original_orientation" in properties.get("sitk_stuff", {}):
        return str(properties["sitk_stuff"]["original_orientation"])
    stuff = properties.get("nibabel_stuff", {})
    return "".join(nibabel.aff2axcodes(stuff["original_affine"])) if "reoriented_affine" in stuff else None
