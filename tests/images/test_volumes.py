"""Reading and writing through nnU-Net's readers: geometry, and writers that are stopped halfway."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO, NibabelIOWithReorient
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO, SimpleITKIOWithReorient
from nnunetv2.imageio.tif_reader_writer import Tiff3DIO

from nnunet_conres.errors import InputError
from nnunet_conres.images.volumes import (
    affine_of,
    read_labels,
    read_volume,
    reader_for,
    reader_of_file,
    standing,
    write_labels,
    write_map,
)

SHAPE = (6, 7, 8)
READERS = (SimpleITKIO, SimpleITKIOWithReorient, NibabelIO, NibabelIOWithReorient)


def turned(seed: int) -> np.ndarray:
    """Return a direction matrix: axes permuted and flipped, then rotated by up to 0.3 rad."""
    rng = np.random.default_rng(seed)
    permutation = np.eye(3)[rng.permutation(3)] * rng.choice([-1, 1], 3)[:, None]
    angles = rng.uniform(-0.3, 0.3, 3)
    rotation = np.eye(3)
    for axis, angle in enumerate(angles):
        one = np.eye(3)
        first, second = (other for other in range(3) if other != axis)
        one[first, first] = one[second, second] = np.cos(angle)
        one[first, second], one[second, first] = -np.sin(angle), np.sin(angle)
        rotation = rotation @ one
    return rotation @ permutation


def save(path: Path, seed: int) -> SimpleITK.Image:
    image = SimpleITK.GetImageFromArray(np.random.default_rng(seed).integers(0, 4, SHAPE).astype(np.uint8))
    image.SetSpacing((1.0, 2.0, 3.0))
    image.SetOrigin((4.0, -5.0, 6.0))
    image.SetDirection(turned(seed).ravel())
    SimpleITK.WriteImage(image, str(path))
    return SimpleITK.ReadImage(str(path))


def save_sheared(path: Path, dtype: type = np.uint8) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3] = np.diag([-1.0, -1.0, 1.0]) @ turned(3) @ np.diag([1.0, 2.0, 3.0])
    affine[:3, 1] += 0.3 * affine[:3, 0]
    labels = np.random.default_rng(3).integers(0, 4, SHAPE[::-1])
    nibabel.save(nibabel.Nifti1Image(labels.astype(dtype), affine), path)
    return affine


class TestStanding:
    @pytest.mark.parametrize("seed", range(12))
    @pytest.mark.parametrize("ending", [".nii.gz", ".nrrd"])
    def test_as_itk_orients(self, tmp_path: Path, seed: int, ending: str) -> None:
        image = save(tmp_path / f"a{ending}", seed)
        expected = SimpleITK.DICOMOrient(image, "LPS")
        for reader in READERS if ending == ".nii.gz" else READERS[:2]:
            read = read_volume(tmp_path / f"a{ending}", reader)
            voxels, spacing = standing(read.voxels[0], read.properties)
            assert np.array_equal(voxels, SimpleITK.GetArrayFromImage(expected))
            assert np.allclose(spacing, expected.GetSpacing()[::-1], atol=1e-5)

    def test_without_geometry(self) -> None:
        voxels = np.zeros(SHAPE)
        same, spacing = standing(voxels, {"spacing": (1, 2, 3)})
        assert same is voxels
        assert spacing == (1.0, 2.0, 3.0)


@pytest.mark.parametrize("seed", range(4))
def test_affine_is_nibabels(tmp_path: Path, seed: int) -> None:
    save(tmp_path / "a.nii.gz", seed)
    affine = affine_of(read_volume(tmp_path / "a.nii.gz", SimpleITKIO).properties)
    assert affine is not None
    assert np.allclose(affine, nibabel.load(tmp_path / "a.nii.gz").affine, atol=1e-5)


class TestWriteMap:
    @pytest.mark.parametrize("seed", range(4))
    @pytest.mark.parametrize("reader", READERS)
    def test_lies_where_the_file_does(self, tmp_path: Path, seed: int, reader: type) -> None:
        image = save(tmp_path / "a.nii.gz", seed)
        read = read_volume(tmp_path / "a.nii.gz", reader)
        written = SimpleITK.ReadImage(str(write_map(tmp_path / "b.nii.gz", read.voxels[0] + 0.5, read.properties)))
        assert np.array_equal(SimpleITK.GetArrayFromImage(written), SimpleITK.GetArrayFromImage(image) + 0.5)
        assert np.allclose(written.GetSpacing(), image.GetSpacing(), atol=1e-5)
        assert np.allclose(written.GetOrigin(), image.GetOrigin(), atol=1e-4)
        assert np.allclose(written.GetDirection(), image.GetDirection(), atol=1e-5)

    @pytest.mark.parametrize("reader", READERS[2:])
    def test_sheared(self, tmp_path: Path, reader: type) -> None:
        affine = save_sheared(tmp_path / "a.nii.gz")
        read = read_volume(tmp_path / "a.nii.gz", reader)
        written = nibabel.load(write_map(tmp_path / "b.nii.gz", read.voxels[0], read.properties))
        assert np.allclose(written.affine, affine, atol=1e-5)
        assert np.array_equal(written.get_fdata(), nibabel.load(tmp_path / "a.nii.gz").get_fdata())


class TestReader:
    def test_as_nnunet_chooses(self, tmp_path: Path) -> None:
        save(tmp_path / "straight.nii.gz", 0)
        save_sheared(tmp_path / "sheared.nii.gz")
        for name, expected in (("straight", SimpleITKIO), ("sheared", NibabelIO)):
            path = tmp_path / f"{name}.nii.gz"
            assert reader_for({"file_ending": ".nii.gz"}, [path]) is expected
            assert reader_of_file(path) is expected
        named = {"file_ending": ".nii.gz", "overwrite_image_reader_writer": "NibabelIOWithReorient"}
        assert reader_for(named, [path]) is NibabelIOWithReorient
        assert reader_of_file(path, named) is NibabelIOWithReorient

    def test_none_can(self, tmp_path: Path) -> None:
        (tmp_path / "a.nii.gz").write_text("no image")
        with pytest.raises(InputError, match=r"a\.nii\.gz cannot be read: it does not begin with a NIfTI header"):
            reader_for({"file_ending": ".nii.gz"}, [tmp_path / "a.nii.gz"])


class TestReadLabels:
    def test_values_and_channels(self, tmp_path: Path) -> None:
        save(tmp_path / "a.nii.gz", 0)
        with pytest.raises(InputError, match=r"labels that dataset\.json does not name: 2, 3; expected 0, 1\."):
            read_labels(tmp_path / "a.nii.gz", SimpleITKIO, (0, 1))
        two = SimpleITK.GetImageFromArray(np.zeros((2, *SHAPE), np.uint8), isVector=False)
        SimpleITK.WriteImage(two, str(tmp_path / "two.nii.gz"))
        with pytest.raises(InputError, match="2 channels; expected labels in a single one"):
            read_labels(tmp_path / "two.nii.gz", SimpleITKIO)


class TestWriteLabels:
    @pytest.mark.parametrize(
        ("reader", "largest"),
        # SimpleITKIOWithReorient writes 8 bits only.
        [(reader, 3) for reader in (*READERS, Tiff3DIO)]
        + [(reader, 300) for reader in (SimpleITKIO, *READERS[2:], Tiff3DIO)],
    )
    def test_round_trip(self, tmp_path: Path, reader: type, largest: int) -> None:
        ending = ".tif" if reader is Tiff3DIO else ".nii.gz"
        labels = np.random.default_rng(0).integers(0, largest + 1, SHAPE).astype(np.uint16)
        properties = {"spacing": (3.0, 2.0, 1.0)}
        if reader is not Tiff3DIO:
            save(tmp_path / "a.nii.gz", 1)
            properties = dict(read_labels(tmp_path / "a.nii.gz", reader).properties)
            labels = labels.reshape(read_labels(tmp_path / "a.nii.gz", reader).voxels.shape)
        path = tmp_path / "out" / f"b{ending}"
        path.parent.mkdir()
        write_labels(path, labels, properties, reader)
        read = read_labels(path, reader)
        assert np.array_equal(read.voxels, labels)
        assert np.allclose(read.spacing, properties["spacing"])
        expected = ["b.json", "b.tif"] if reader is Tiff3DIO else ["b.nii.gz"]
        assert sorted(file.name for file in path.parent.iterdir()) == expected

    def test_what_does_not_come_back(self, tmp_path: Path) -> None:
        """nnU-Net's class writes 8 bits: 300 becomes 44."""
        save(tmp_path / "a.nii.gz", 0)
        read = read_labels(tmp_path / "a.nii.gz", SimpleITKIOWithReorient)
        with pytest.raises(InputError, match=r"b\.nii\.gz could not be written completely"):
            write_labels(tmp_path / "b.nii.gz", read.voxels * 300, read.properties, SimpleITKIOWithReorient)
        assert [file.name for file in tmp_path.iterdir()] == ["a.nii.gz"]


STOPPED = """
import resource
import sys
from pathlib import Path

import numpy as np
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.imageio.tif_reader_writer import Tiff3DIO

from nnunet_conres.errors import InputError
from nnunet_conres.files import write_json, written_whole
from nnunet_conres.images.nifti import header_of, write_nifti
from nnunet_conres.images.volumes import write_labels, write_map

folder = Path(sys.argv[1])
labels = np.random.default_rng(0).integers(0, 4, (40, 40, 40)).astype(np.uint8)
itk = {"origin": (0.0,) * 3, "spacing": (1.0,) * 3, "direction": (1.0, 0, 0, 0, 1, 0, 0, 0, 1)}
properties = {"spacing": (1.0,) * 3, "sitk_stuff": itk}
nib = {"spacing": (1.0,) * 3, "nibabel_stuff": {"original_affine": np.eye(4)}}


def figure(path):
    from matplotlib.figure import Figure

    from nnunet_conres.evaluation.figures import save_figure

    drawn = Figure(figsize=(4, 4))
    drawn.subplots().imshow(labels[0])
    save_figure(drawn, path)


writers = {
    "itk.nii.gz": lambda path: write_labels(path, labels, properties, SimpleITKIO),
    "itk.nrrd": lambda path: write_labels(path, labels, properties, SimpleITKIO),
    "itk.mha": lambda path: write_labels(path, labels, properties, SimpleITKIO),
    "itk.gipl": lambda path: write_labels(path, labels, properties, SimpleITKIO),
    "nib.nii.gz": lambda path: write_labels(path, labels, nib, NibabelIO),
    "tiff.tif": lambda path: write_labels(path, labels, properties, Tiff3DIO),
    "map.nii.gz": lambda path: write_map(path, labels.astype(np.float32), properties),
    "nifti.nii.gz": lambda path: write_nifti(path, labels, header_of(np.eye(4))),
    "text.json": lambda path: write_json(path, list(range(9000))),
    "figure.png": figure,
}
figure(folder / "figure.png")  # fonts are looked for once
(folder / "figure.png").unlink()
_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
for name, write in writers.items():
    try:
        write(folder / name)
    except InputError as error:
        assert str(folder / name) in str(error), error
        print(name, "refused")
    else:
        print(name, "written")
"""


def test_writers_that_are_stopped_say_so(tmp_path: Path) -> None:
    """With a limit of 4 KiB per file, as on a full disk. ITK itself continues silently."""
    done = subprocess.run([sys.executable, "-c", STOPPED, str(tmp_path)], capture_output=True, text=True, check=True)
    lines = [line for line in done.stdout.splitlines() if line.endswith(("refused", "written"))]
    assert len(lines) == 10
    assert not [line for line in lines if line.endswith("written")], lines
    assert list(tmp_path.iterdir()) == []
