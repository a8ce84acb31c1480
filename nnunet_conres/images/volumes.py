"""Images and labels through nnU-Net's own readers and writers, with the checks that these lack."""

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

# Of values that are named in a message.
_NAMED: Final = 5


@dataclass(frozen=True)
class Volume:
    """An image file as nnU-Net reads it.

    Attributes:
        voxels: (C, z, y, x), float32.
        properties: What nnU-Net's reader says of it, for the same class's `write_seg`.
        not_finite: Number of voxels that are NaN or infinite in the file. ITK reads them as 0 from NIfTI files.
        intercept: Of the scaling in the file's header.
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
        properties: What nnU-Net's reader says of it, for `write_labels`.
        inexact: A value that nnU-Net reads a little off the label that it stands for, as 0.9999998; None where there is
            none. nnU-Net's training cuts the fraction off.
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
    """nnU-Net's reader and writer for a data set, chosen as nnU-Net does.

    Args:
        dataset_json: Content of dataset.json.
        files: Files of the data set, at least one; nnU-Net takes a class that can read the first. Where none can, the
            next is asked.

    Returns:
        A subclass of nnU-Net's BaseReaderWriter.

    Raises:
        InputError: None can read any of the files.
    """
    from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json

    files = list(dict.fromkeys(files))
    for path in files:
        # What nnU-Net prints about classes that do not fit looks like an error.
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
    """nnU-Net's reader for one file.

    Args:
        path: The file.
        dataset_json: Content of its data set's dataset.json, if it is known: it may name the reader.

    Returns:
        The reader that dataset.json names; else SimpleITK's, or nibabel's where SimpleITK can't read the file.
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
    """Check what nnU-Net's reader would pass over in an image file, or refuse without saying why.

    Args:
        path: The file.
        reader: A subclass of nnU-Net's BaseReaderWriter.

    Raises:
        DamagedFileError: It is cut short, or does not match its checksum.
        InputError: It can't be read.
    """
    _check(path, reader)


def read_volume(path: Path, reader: type) -> Volume:
    """Read an image file as nnU-Net does, after checking that it is whole.

    Args:
        path: The file.
        reader: A subclass of nnU-Net's BaseReaderWriter.

    Raises:
        DamagedFileError: It is cut short, or does not match its checksum.
        InputError: It can't be read.
    """
    return _read(path, reader, "read_images")


def read_labels(path: Path, reader: type, allowed: Iterable[int] | None = None) -> Labels:
    """Read a label file as nnU-Net does, after checking that it is whole.

    Values within the rounding of their storage of an integer are that label.

    Args:
        path: The file.
        reader: A subclass of nnU-Net's BaseReaderWriter.
        allowed: The labels that may occur; any by default.

    Raises:
        DamagedFileError: It is cut short, or does not match its checksum.
        InputError: It can't be read, has NaN or infinite voxels, more than one channel, or values that are no labels.
    """
    volume = _read(path, reader, "read_seg")
    if volume.not_finite:
        raise InputError(f"{path} has {volume.not_finite} voxels that are NaN or infinite; expected labels.")
    if volume.voxels.shape[0] != 1:
        raise InputError(f"{path} has {volume.voxels.shape[0]} channels; expected labels in a single one.")
    values = volume.voxels[0]
    with np.errstate(invalid="ignore"):  # numbers too large for it are found below
        integers = values.astype(np.int32)
    exact = np.array_equal(integers, values)
    labels = integers if exact else whole_numbers(values, volume.intercept)
    met = _values_of(labels)
    strange = met[(met % 1 != 0) | (np.abs(met) > np.iinfo(np.int32).max)]
    if strange.size:
        raise InputError(f"{path} has values that are no integers: {listed(strange)}; expected labels.")
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
    """The values of a label map, ascending."""
    if labels.dtype.kind == "i" and labels.size and labels.min() >= 0 and labels.max() < 1 << 16:
        return np.flatnonzero(np.bincount(labels.ravel()))  # a tenth of the time of np.unique
    return np.unique(labels)


def listed(values: NDArray[Any]) -> str:
    """Numbers for a message, the first few of many."""
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
    """What one of the reader's methods gives for a file."""
    instance: Any = reader()
    try:
        # It prints that a TIFF file has no spacing.
        with contextlib.redirect_stdout(io.StringIO()):
            return getattr(instance, method)(str(path) if method == "read_seg" else [str(path)])
    except Exception as error:  # each of nnU-Net's readers has its own
        if _uses_itk(reader):
            raise unreadable(path, itk_reason(error)) from error
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = (lines[-1] if lines else type(error).__name__).rstrip(".")
        raise unreadable(path, f"{reader.__name__} does not read it ({reason})") from error


def _uses_itk(reader: type) -> bool:
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

    return issubclass(reader, SimpleITKIO)


def _check(path: Path, reader: type) -> tuple[int | None, float]:
    """Check what a reader would pass over.

    Returns:
        The number of voxels that are not finite, if the reader would hide them, and the intercept of the scaling.
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
    # ITK reads a file that is not compressed under any name.
    if nifti.compressed != named_compressed and not (itk and named_compressed):
        raise unreadable(path, _misnamed(path, nifti.compressed))
    if itk:
        check_version(path, nifti.header)
        twin = path.with_name(path.name[:-3])
        if named_compressed and twin.is_file():
            raise unreadable(path, f"SimpleITK would take its voxels from {twin.name} beside it; move one of the two")
    return nifti.not_finite(), nifti.scaling[1]


def _check_name_and_content(path: Path) -> None:
    """Raises what is wrong with a file that no reader can read, if that can be seen."""
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
    """ITK's geometry without a fourth axis of length 1, with which nnU-Net's `write_seg` fails."""
    stuff = properties.get("sitk_stuff")
    if stuff is None or len(stuff["spacing"]) != 4 or voxels.shape[0] != 1:
        return properties
    direction = np.reshape(stuff["direction"], (4, 4))[:3, :3]
    three = {"spacing": stuff["spacing"][:3], "origin": stuff["origin"][:3], "direction": tuple(direction.ravel())}
    return {**properties, "sitk_stuff": {**stuff, **three}}


# --- geometry -------------------------------------------------------------------------------------------------------


def affine_of(properties: Mapping[str, Any]) -> NDArray[np.float64] | None:
    """Voxel (x, y, z) to mm towards the right, the front and the head, of an array of nnU-Net's readers.

    Args:
        properties: What the reader says of the file.

    Returns:
        (4, 4), or None of 2D images and of formats without a geometry.
    """
    if "nibabel_stuff" in properties:
        stuff = properties["nibabel_stuff"]
        return np.asarray(stuff.get("reoriented_affine", stuff["original_affine"]), dtype=np.float64)
    stuff = properties.get("sitk_stuff")
    if stuff is None or len(stuff["spacing"]) != 3:
        return None
    # ITK counts towards the left and the back.
    turned = np.diag([-1.0, -1.0, 1.0])
    affine = np.eye(4)
    affine[:3, :3] = turned @ np.reshape(stuff["direction"], (3, 3)) @ np.diag(stuff["spacing"])
    affine[:3, 3] = turned @ np.asarray(stuff["origin"])
    return affine


def standing(voxels: NDArray[Any], properties: Mapping[str, Any]) -> tuple[NDArray[Any], tuple[float, ...]]:
    """Turn a volume so that its slices are seen from the feet with the face up.

    Args:
        voxels: (z, y, x), of nnU-Net's reader.
        properties: What the reader says of it. Without a geometry the volume stays as it is.

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
    """Voxels (z, y, x) of an image and their spacing, turned so that slices are seen from the feet with the face up."""
    volume = read_volume(path, reader)
    if volume.voxels.shape[0] != 1:
        raise InputError(f"{path} has {volume.voxels.shape[0]} channels; expected one, and a file for each channel.")
    return standing(volume.voxels[0], volume.properties)


def read_standing_labels(path: Path, reader: type) -> NDArray[np.int32]:
    """Labels (z, y, x), turned so that slices are seen from the feet with the face up."""
    labels = read_labels(path, reader)
    return standing(labels.voxels, labels.properties)[0]


def reversed_axes(properties: Mapping[str, Any]) -> tuple[bool, ...]:
    """For each axis of an array of nnU-Net's readers, whether a viewer from the feet, face up, reads it backwards."""
    affine = affine_of(properties)
    if affine is None:
        return (False, False, False)
    directions = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    # Towards the left and the back, and downwards, is how pictures are read.
    read = np.array([-1.0, -1.0, -1.0])
    reverse = []
    for direction in directions.T[::-1]:
        main = int(np.argmax(np.abs(direction)))
        reverse.append(bool(direction[main] * read[main] < 0))
    return tuple(reverse)


def _turned(
    voxels: NDArray[Any], affine: NDArray[Any], sides: str
) -> tuple[NDArray[Any], NDArray[np.float64], list[int]]:
    """Voxels (x, y, z) with axes towards the sides that three letters stand for, their affine, which axis each was."""
    from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform

    transform = ornt_transform(io_orientation(affine), axcodes2ornt(sides))
    order = [int(axis) for axis in np.argsort(transform[:, 0])]
    return apply_orientation(voxels, transform), affine @ inv_ornt_aff(transform, voxels.shape), order


# --- writing --------------------------------------------------------------------------------------------------------


def write_labels(path: Path, labels: NDArray[Any], properties: Mapping[str, Any], writer: type) -> None:
    """Write labels as nnU-Net does, and read them back: ITK does not say when a disk is full.

    Args:
        path: The file. It is found whole or not at all; for TIFF nnU-Net writes a second one beside it, with the
            spacing.
        labels: (z, y, x).
        properties: What nnU-Net's reader said of the file whose geometry the labels have.
        writer: A subclass of nnU-Net's BaseReaderWriter.

    Raises:
        InputError: The file could not be written whole.
    """
    instance: Any = writer()
    with partial_folder(path) as folder:
        partial = folder / path.name
        try:
            instance.write_seg(labels, str(partial), dict(properties))
            same = np.array_equal(read_labels(partial, writer).voxels, labels)
        except Exception as error:  # each of nnU-Net's writers has its own
            raise failed_write(path, labels.nbytes) from error
        if not same:
            raise failed_write(path, labels.nbytes)
        # The label file last: where it is, the case is complete.
        for written in sorted(folder.iterdir(), key=lambda written: written.name == path.name):
            with file_errors(path):
                written.replace(path.with_name(written.name))


def write_map(path: Path, voxels: NDArray[Any], properties: Mapping[str, Any]) -> Path:
    """Write a map of any type of number as NIfTI, in the geometry of the file that it was computed from.

    Args:
        path: Ends in .nii.gz. It is found whole or not at all.
        voxels: (z, y, x).
        properties: What nnU-Net's reader said of that file. Where it turned the image, the map is turned back.

    Returns:
        The path.

    Raises:
        InputError: The file system did not take it.
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
    """The sides towards which a file's axes go, as three letters, if the reader turned the image."""
    import nibabel

    if "original_orientation" in properties.get("sitk_stuff", {}):
        return str(properties["sitk_stuff"]["original_orientation"])
    stuff = properties.get("nibabel_stuff", {})
    return "".join(nibabel.aff2axcodes(stuff["original_affine"])) if "reoriented_affine" in stuff else None
