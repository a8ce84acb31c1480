"""NIfTI files whose names, headers and scaling are unusual."""

from __future__ import annotations

import gzip
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

from nnunet_conres.errors import InputError
from nnunet_conres.images.content import DamagedFileError
from nnunet_conres.images.nifti import header_of, read_header, read_nifti, whole_numbers, write_nifti
from nnunet_conres.images.volumes import read_labels, read_volume

AFFINE = np.array([[-2.0, 0, 0, 5], [0, -1.5, 0, 7], [0, 0, 3.0, -9], [0, 0, 0, 1]])
LABELS = np.random.default_rng(0).integers(0, 4, (8, 7, 6)).astype(np.uint8)


def content_of(voxels: np.ndarray, slope: float = 1.0, intercept: float = 0.0) -> bytes:
    """Return an uncompressed file with this scaling in its header. nibabel would choose the scaling itself."""
    header = nibabel.Nifti1Image(voxels, AFFINE, dtype=voxels.dtype).header.copy()
    header["scl_slope"], header["scl_inter"] = slope, intercept
    header["vox_offset"], header["magic"] = 352, b"n+1"
    return bytes(header.binaryblock + b"\0\0\0\0" + voxels.tobytes(order="F"))


class TestNames:
    def test_not_compressed_under_gz(self, tmp_path: Path) -> None:
        path = tmp_path / "a.nii.gz"
        path.write_bytes(content_of(LABELS))
        assert np.array_equal(read_nifti(path).stored, LABELS)
        assert np.array_equal(read_labels(path, SimpleITKIO).voxels, LABELS.T)  # ITK reads it, too
        with pytest.raises(
            InputError, match=r"it is not compressed, although its name ends in \.gz; rename it to a\.nii"
        ):
            read_labels(path, NibabelIO)

    def test_compressed_without_gz(self, tmp_path: Path) -> None:
        path = tmp_path / "a.nii"
        path.write_bytes(gzip.compress(content_of(LABELS)))
        assert np.array_equal(read_nifti(path).stored, LABELS)
        assert read_header(path).get_data_shape() == LABELS.shape
        for reader in (SimpleITKIO, NibabelIO):
            with pytest.raises(
                InputError, match=r"it is compressed, and its name does not say so; rename it to a\.nii\.gz"
            ):
                read_labels(path, reader)

    def test_twin_without_gz(self, tmp_path: Path) -> None:
        """ITK takes the header of a.nii.gz and the voxels of a.nii."""
        (tmp_path / "a.nii.gz").write_bytes(gzip.compress(content_of(LABELS)))
        (tmp_path / "a.nii").write_bytes(content_of(LABELS + 1))
        read = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(tmp_path / "a.nii.gz")))
        assert np.array_equal(read, (LABELS + 1).T)
        with pytest.raises(InputError, match=r"SimpleITK would take its voxels from a\.nii beside it"):
            read_labels(tmp_path / "a.nii.gz", SimpleITKIO)
        assert np.array_equal(read_labels(tmp_path / "a.nii", SimpleITKIO).voxels, (LABELS + 1).T)
        assert np.array_equal(read_labels(tmp_path / "a.nii.gz", NibabelIO).voxels, LABELS.T)


class TestRead:
    def test_wrong_checksum_which_nibabel_accepts(self, tmp_path: Path) -> None:
        path = tmp_path / "a.nii.gz"
        voxels = np.random.default_rng(0).integers(0, 4, (60, 60, 60)).astype(np.uint8)
        content = bytearray(gzip.compress(content_of(voxels)))
        content[-6] ^= 0xFF
        path.write_bytes(content)
        assert np.array_equal(np.asarray(nibabel.load(path).dataobj), voxels)
        with pytest.raises(DamagedFileError, match="do not match their checksum"):
            read_nifti(path)

    @pytest.mark.parametrize("more", [(1,), (1, 1)])
    def test_axes_of_length_one_after_the_third(self, tmp_path: Path, more: tuple[int, ...]) -> None:
        path = tmp_path / "a.nii.gz"
        nibabel.save(nibabel.Nifti1Image(LABELS.reshape(*LABELS.shape, *more), AFFINE), path)
        assert read_nifti(path).stored.shape == LABELS.shape
        assert np.array_equal(read_labels(path, SimpleITKIO).voxels, LABELS.T)

    def test_fourth_axis_of_length_one_in_nrrd(self, tmp_path: Path) -> None:
        image = SimpleITK.GetImageFromArray(LABELS[None], isVector=False)
        image.SetSpacing((2.0, 3.0, 4.0, 1.0))
        SimpleITK.WriteImage(image, str(tmp_path / "a.nrrd"))
        labels = read_labels(tmp_path / "a.nrrd", SimpleITKIO)
        assert np.array_equal(labels.voxels, LABELS)
        assert labels.spacing == (4.0, 3.0, 2.0)
        # With four axes, nnU-Net's writer fails.
        SimpleITKIO().write_seg(labels.voxels, str(tmp_path / "b.nrrd"), labels.properties)
        assert SimpleITK.ReadImage(str(tmp_path / "b.nrrd")).GetSpacing() == (2.0, 3.0, 4.0)

    def test_nifti_2(self, tmp_path: Path) -> None:
        path = tmp_path / "a.nii.gz"
        nibabel.save(nibabel.Nifti2Image(LABELS, AFFINE), path)
        assert np.array_equal(read_nifti(path).stored, LABELS)
        assert np.array_equal(read_labels(path, NibabelIO).voxels, LABELS.T)
        with pytest.raises(InputError, match="it is NIfTI-2, and SimpleITK reads NIfTI-1 only"):
            read_labels(path, SimpleITKIO)
        write_nifti(tmp_path / "b.nii.gz", LABELS, read_header(path))
        written = nibabel.load(tmp_path / "b.nii.gz")
        assert isinstance(written, nibabel.Nifti1Image)
        assert np.array_equal(np.asarray(written.dataobj), LABELS)
        assert np.allclose(written.affine, AFFINE)


SCALINGS = [
    (np.uint8, 0.1, 0.0),
    (np.uint8, 0.02, 0.0),
    (np.uint8, 0.02, -1.0),
    (np.uint8, 1 / 3, 0.0),
    (np.int8, -0.1, 4.0),
    (np.int16, 0.01, -319.0),
    (np.int16, 0.2, 2.0),
    (np.int32, 0.001, -1000.0),
    (np.int32, 1e-8, 0.0),
    (np.float32, 0.1, 0.0),
]


class TestWholeNumbers:
    @pytest.mark.parametrize(("dtype", "slope", "intercept"), SCALINGS)
    def test_scaled_labels(self, tmp_path: Path, dtype: type, slope: float, intercept: float) -> None:
        """With a scale factor of 32 bits, nibabel and ITK return labels such as 0.99999285 and 3.9999999."""
        labels = np.random.default_rng(0).choice([0, 1, 2, 4], (5, 4, 3))
        stored = np.rint((labels - intercept) / slope).astype(dtype)
        path = tmp_path / "a.nii"
        path.write_bytes(content_of(stored, slope, intercept))
        assert not np.array_equal(nibabel.load(path).get_fdata(), labels)
        assert np.array_equal(read_nifti(path).labels(), labels)
        for reader in (SimpleITKIO, NibabelIO):
            read = read_labels(path, reader, (0, 1, 2, 4))
            assert np.array_equal(read.voxels, labels.T)
            exact = np.array_equal(reader().read_seg(str(path))[0][0], labels.T)
            assert (read.inexact is None) == exact

    @pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16])
    def test_quantised_numbers_are_no_labels(self, tmp_path: Path, dtype: type) -> None:
        """0, 1, 2, 4 quantised over the range of a type are off by up to a step, and nnU-Net would truncate them."""
        top = np.iinfo(dtype).max
        stored = np.rint(np.array([0, 1, 2, 4]) / 4 * top).astype(dtype).reshape(4, 1, 1)
        path = tmp_path / "a.nii"
        path.write_bytes(content_of(stored, 4 / top))
        with pytest.raises(InputError, match=r"values that are not integers: \d\.\d+, \d\.\d+; expected labels"):
            read_labels(path, SimpleITKIO)

    @pytest.mark.parametrize("value", [0.5, 0.999, 1.0001, 1e30])
    def test_others_stay(self, tmp_path: Path, value: float) -> None:
        assert whole_numbers(np.array([value, np.nan]))[0] == value
        path = tmp_path / "a.nii.gz"
        nibabel.save(nibabel.Nifti1Image(np.full((2, 2, 2), value, np.float32), AFFINE), path)
        with pytest.raises(InputError, match="not integers"):
            read_labels(path, SimpleITKIO)


class TestWrite:
    @pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32])
    def test_as_nibabel_and_itk_read_it(self, tmp_path: Path, dtype: type) -> None:
        voxels = (100 * np.random.default_rng(0).random((5, 4, 3))).astype(dtype)
        write_nifti(tmp_path / "a.nii.gz", voxels, header_of(AFFINE))
        read = nibabel.load(tmp_path / "a.nii.gz")
        assert np.array_equal(np.asarray(read.dataobj), voxels)
        assert np.allclose(read.affine, AFFINE)
        image = SimpleITK.ReadImage(str(tmp_path / "a.nii.gz"))
        assert np.array_equal(SimpleITK.GetArrayFromImage(image), voxels.T)
        assert image.GetSpacing() == (2.0, 1.5, 3.0)
        assert np.allclose(image.GetOrigin(), (-5.0, -7.0, -9.0))
        assert np.allclose(image.GetDirection(), np.eye(3).ravel())
        assert [path.name for path in tmp_path.iterdir()] == ["a.nii.gz"]

    def test_sheared_axes(self, tmp_path: Path) -> None:
        sheared = AFFINE.copy()
        sheared[0, 1] = 0.4
        write_nifti(tmp_path / "a.nii.gz", LABELS, header_of(sheared))
        assert np.allclose(nibabel.load(tmp_path / "a.nii.gz").affine, sheared)
        with pytest.raises(InputError, match="its axes are not at right angles, which SimpleITK does not read"):
            read_volume(tmp_path / "a.nii.gz", SimpleITKIO)
        assert np.array_equal(read_volume(tmp_path / "a.nii.gz", NibabelIO).voxels[0], LABELS.T)
