"""Truncated or damaged files of every format that nnU-Net reads: an error or the whole image, never zeros in it."""

from __future__ import annotations

import gzip
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK
import tifffile
from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.imageio.tif_reader_writer import Tiff3DIO
from skimage import io as skimage_io

from nnunet_conres.errors import InputError
from nnunet_conres.images.content import DamagedFileError, read_content
from nnunet_conres.images.volumes import read_labels, read_volume

LABELS = np.random.default_rng(0).integers(0, 4, (12, 14, 16)).astype(np.uint8)


def itk(path: Path, labels: np.ndarray, *, compress: bool = False) -> None:
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(labels), str(path), compress)


def itk_compressed(path: Path, labels: np.ndarray) -> None:
    itk(path, labels, compress=True)


def tiff(path: Path, labels: np.ndarray) -> None:
    """Write one page per slice, as most programs do."""
    with tifffile.TiffWriter(path) as writer:
        for plane in labels:
            writer.write(plane, contiguous=False, metadata=None, compression="zlib")


def big_tiff(path: Path, labels: np.ndarray) -> None:
    with tifffile.TiffWriter(path, bigtiff=True, byteorder=">") as writer:
        for plane in labels:
            writer.write(plane, contiguous=False, metadata=None)


def picture(path: Path, labels: np.ndarray) -> None:
    skimage_io.imsave(path, labels[6], check_contrast=False)


FORMATS: tuple[tuple[str, Callable[[Path, np.ndarray], None], type], ...] = (
    (".nii.gz", itk, SimpleITKIO),
    (".nii.gz", itk, NibabelIO),
    (".nii", itk, SimpleITKIO),
    (".nii", itk, NibabelIO),
    (".nrrd", itk, SimpleITKIO),
    (".nrrd", itk_compressed, SimpleITKIO),
    (".mha", itk, SimpleITKIO),
    (".mha", itk_compressed, SimpleITKIO),
    (".gipl", itk, SimpleITKIO),
    (".gipl.gz", itk, SimpleITKIO),
    (".tif", tiff, Tiff3DIO),
    (".tiff", big_tiff, Tiff3DIO),
    (".png", picture, NaturalImage2DIO),
    (".bmp", picture, NaturalImage2DIO),
    (".tif", picture, NaturalImage2DIO),
)
IDS = [f"{ending} {write.__name__} {reader.__name__}" for ending, write, reader in FORMATS]


@pytest.mark.parametrize(("ending", "write", "reader"), FORMATS, ids=IDS)
def test_cut_short_is_refused_or_whole(
    tmp_path: Path, ending: str, write: Callable[[Path, np.ndarray], None], reader: type
) -> None:
    path = tmp_path / f"whole{ending}"
    write(path, LABELS)
    content = path.read_bytes()
    whole = read_volume(path, reader).voxels
    expected = LABELS if whole.shape[1] > 1 else LABELS[6:7]
    assert all(np.array_equal(channel, expected) for channel in whole)
    # Another name, because ITK takes the voxels of a .nii.gz from a .nii of the same name.
    cut = tmp_path / f"cut{ending}"
    refused = []
    for share in (0.0, 0.1, 0.3, 0.5, 0.8, 0.95, 0.999, -1, -4, -9, -20):
        cut.write_bytes(content[: int(share * len(content)) if share >= 0 else int(share)])
        try:
            assert np.array_equal(read_volume(cut, reader).voxels, whole), share
        except InputError as error:
            refused.append(str(error))
    assert len(refused) >= 5
    assert all(error.startswith(f"{cut} cannot be read: ") and "No such file" not in error for error in refused)


@pytest.mark.parametrize(
    ("ending", "write"), [(".nii.gz", itk), (".nrrd", itk_compressed), (".mha", itk_compressed), (".gipl.gz", itk)]
)
def test_damage_within_compressed_data(tmp_path: Path, ending: str, write: Callable[[Path, np.ndarray], None]) -> None:
    path = tmp_path / f"a{ending}"
    write(path, LABELS)
    content = bytearray(path.read_bytes())
    content[len(content) // 2 + 100] ^= 0x10
    path.write_bytes(content)
    with pytest.raises(DamagedFileError, match=r"damaged|cut short"):
        read_labels(path, SimpleITKIO)


def test_names_what_is_cut_short(tmp_path: Path) -> None:
    for ending in (".nii", ".mha", ".gipl"):
        path = tmp_path / f"a{ending}"
        itk(path, LABELS)
        size = path.stat().st_size
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(DamagedFileError, match=rf"it is cut short: {size - 100} bytes, its header says {size}"):
            read_labels(path, SimpleITKIO)


def test_a_format_whose_end_is_not_known_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.vtk"
    itk(path, LABELS)
    with pytest.raises(InputError, match=r"does not notice where a file of this format is cut short; convert it"):
        read_volume(path, SimpleITKIO)


@pytest.mark.parametrize(
    ("tail", "what"), [(b"", "nothing"), (b"\0" * 50, "zeros"), (b"\x01\x02\x03", "bytes"), (b"\x1f\x8b\x08x", "half")]
)
def test_bytes_after_the_end_of_compressed_data(tmp_path: Path, tail: bytes, what: str) -> None:
    path = tmp_path / "a.nii.gz"
    itk(path, LABELS)
    path.write_bytes(path.read_bytes() + tail)
    for reader in (SimpleITKIO, NibabelIO):
        assert np.array_equal(read_labels(path, reader).voxels, LABELS)


def test_several_streams_in_a_row(tmp_path: Path) -> None:
    path = tmp_path / "a.gz"
    path.write_bytes(gzip.compress(b"one ") + gzip.compress(b"two") + b"\0\0")
    assert read_content(path) == (b"one two", True)


def test_missing_and_empty(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=re.escape(f"{tmp_path / 'a.mha'} cannot be read: there is no such file.")):
        read_volume(tmp_path / "a.mha", SimpleITKIO)
    (tmp_path / "a.mha").touch()
    with pytest.raises(DamagedFileError, match="it is empty"):
        read_volume(tmp_path / "a.mha", SimpleITKIO)


@pytest.mark.parametrize("ending", [".nii.gz", ".nii", ".nrrd", ".mha", ".tif"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_not_finite_labels(tmp_path: Path, ending: str, value: float) -> None:
    """ITK reads NaN in NIfTI files as 0, which is annotated background."""
    labels = LABELS.astype(np.float32)
    labels[1, 2, 3] = value
    path = tmp_path / f"a{ending}"
    reader: Any = Tiff3DIO if ending == ".tif" else SimpleITKIO
    if ending == ".tif":
        tifffile.imwrite(path, labels)
    else:
        itk(path, labels)
    with pytest.raises(InputError, match=r"a\.\S+ has 1 voxels that are NaN or infinite"):
        read_labels(path, reader)
