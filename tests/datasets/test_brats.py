import gzip
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from nnunet_conres import cli
from nnunet_conres.datasets import brats
from nnunet_conres.datasets.brats import SCHEMES, Conversion, ConversionError, convert_brats, to_nnunet_labels

SHAPE = (7, 6, 5)
AFFINE = np.array([[-1.0, 0, 0, 0], [0, -1.0, 0, 239], [0, 0, 1.0, 0], [0, 0, 0, 1]])
# Written out once more, as a reference for the module's tables.
ENDINGS = {
    "2018": ("_flair", "_t1", "_t1ce", "_t2", "_seg"),
    "2023": ("-t2f", "-t1n", "-t1c", "-t2w", "-seg"),
}
SOURCE_VALUES = {"2018": (0, 1, 2, 4), "2023": (0, 1, 2, 3)}


def save(path: Path, array: np.ndarray, affine: np.ndarray = AFFINE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, affine), path)


def write_case(
    folder: Path, case_id: str, scheme: str = "2018", *, labelled: bool = True, ending: str = ".nii.gz", seed: int = 0
) -> dict[str, Path]:
    """A case whose channels can be told apart by their intensities: hundreds 1 to 4 for FLAIR, T1, T1ce, T2."""
    rng = np.random.default_rng(seed)
    files = {}
    for number, part in enumerate(ENDINGS[scheme][:4], start=1):
        files[part[1:]] = folder / f"{case_id}{part}{ending}"
        save(files[part[1:]], (100 * number + rng.integers(0, 50, SHAPE)).astype(np.int16))
    if labelled:
        files["seg"] = folder / f"{case_id}{ENDINGS[scheme][4]}{ending}"
        save(files["seg"], rng.choice(SOURCE_VALUES[scheme], SHAPE).astype(np.uint8))
    return files


def load(path: Path) -> np.ndarray:
    return np.asarray(nibabel.load(path).dataobj)


@pytest.fixture
def raw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (tmp_path / "nn" / name).mkdir(parents=True)
        monkeypatch.setenv(name, str(tmp_path / "nn" / name))
    return tmp_path / "nn" / "nnUNet_raw"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tmp_path / "source"


def convert(*folders: Path, **arguments: Any) -> Conversion:
    return convert_brats(folders, 501, progress=False, **arguments)


def faults_of(*folders: Path, **arguments: Any) -> tuple[str, ...]:
    with pytest.raises(ConversionError) as caught:
        convert(*folders, **arguments)
    return caught.value.faults


@pytest.mark.usefixtures("raw")
class TestConvert:
    @pytest.mark.parametrize("scheme", ["2018", "2023"])
    @pytest.mark.parametrize("ending", [".nii.gz", ".nii"])
    def test_channels_labels_and_geometry(self, source: Path, scheme: str, ending: str) -> None:
        files = write_case(source / "HGG" / "a", "a", scheme, ending=ending)
        done = convert(source)
        for channel in range(4):
            image = load(done.dataset_folder / f"imagesTr/a_{channel:04d}.nii.gz")
            assert set(image.ravel() // 100) == {channel + 1}
            assert image.dtype == np.int16
        written = nibabel.load(done.dataset_folder / "labelsTr/a.nii.gz")
        np.testing.assert_allclose(written.affine, AFFINE, atol=1e-6)
        # oedema 2 -> 1, necrosis 1 -> 2, enhancing 4 or 3 -> 3, voxel by voxel
        table = {0: 0, 1: 2, 2: 1, SOURCE_VALUES[scheme][-1]: 3}
        expected = np.vectorize(table.get)(load(files["seg"]))
        np.testing.assert_array_equal(np.asarray(written.dataobj), expected)
        assert len(np.unique(expected)) == 4

    def test_dataset_json(self, source: Path) -> None:
        write_case(source, "a")
        write_case(source, "b", labelled=False)
        content = json.loads((convert(source, dataset_name="Glioma").dataset_folder / "dataset.json").read_text())
        assert content["channel_names"] == {"0": "FLAIR", "1": "T1", "2": "T1ce", "3": "T2"}
        assert content["labels"] == {
            "background": 0,
            "whole_tumor": [1, 2, 3],
            "tumor_core": [2, 3],
            "enhancing_tumor": 3,
        }
        assert content["regions_class_order"] == [1, 2, 3]
        assert content["numTraining"] == 1
        assert content["file_ending"] == ".nii.gz"
        assert content["name"] == "Dataset501_Glioma"

    @pytest.mark.parametrize("scheme", ["2018", "2023"])
    def test_writing_regions_in_their_order_restores_the_source(self, scheme: str) -> None:
        """The way nnU-Net turns predicted regions into a label map, and back by the scheme's table."""
        from nnunetv2.utilities.label_handling.label_handling import LabelManager

        original = np.random.default_rng(0).choice(SOURCE_VALUES[scheme], SHAPE).astype(np.uint8)
        converted = to_nnunet_labels(original, scheme)
        manager = LabelManager(dict(brats.REGIONS), list(brats.REGIONS_CLASS_ORDER))
        probabilities = np.stack([np.isin(converted, region) for region in manager.foreground_regions]).astype(float)
        restored = manager.convert_probabilities_to_segmentation(probabilities)
        np.testing.assert_array_equal(restored, converted)
        back = {1: 2, 2: 1, 3: SOURCE_VALUES[scheme][-1], 0: 0}
        np.testing.assert_array_equal(np.vectorize(back.get)(restored), original)

    def test_where_cases_go(self, source: Path) -> None:
        write_case(source / "train/HGG/a", "a")
        write_case(source / "train", "b", labelled=False)
        write_case(source / "test/c", "c")
        write_case(source / "test/d", "d", labelled=False)
        done = convert(source / "train", held_out_folders=[source / "test"])
        assert (done.training_ids, done.test_ids, done.test_label_ids) == (("a",), ("b", "c", "d"), ("c",))
        found = {
            folder.name: {path.name.split("_0")[0].split(".")[0] for path in folder.iterdir()}
            for folder in done.dataset_folder.iterdir()
            if folder.is_dir()
        }
        assert found == {"imagesTr": {"a"}, "labelsTr": {"a"}, "imagesTs": {"b", "c", "d"}, "labelsTs": {"c"}}

    def test_unlabelled_cases_alone(self, source: Path) -> None:
        write_case(source, "a", "2023", labelled=False)
        done = convert(source)
        assert done.test_ids == ("a",)
        assert ["not trained on" in warning for warning in done.warnings] == [True]

    def test_mixture_only_when_asked_for(self, source: Path) -> None:
        write_case(source / "old", "a", "2018")
        write_case(source / "new", "b", "2023")
        (fault,) = faults_of(source)
        assert "mix" in fault
        assert "--scheme 2018 2023" in fault
        done = convert(source, schemes=("2018", "2023"))
        assert done.training_ids == ("a", "b")
        assert done.schemes == ("2018", "2023")
        for case in "ab":
            assert set(load(done.dataset_folder / f"imagesTr/{case}_0002.nii.gz").ravel() // 100) == {3}
        strange = faults_of(source, schemes=("2018",), dataset_name="Other")
        assert any("b-t1c.nii.gz" in fault and "does not allow" in fault for fault in strange)

    def test_images_are_linked_and_labels_are_not(self, source: Path) -> None:
        files = write_case(source, "a")
        done = convert(source)
        assert done.transfers == {"linked": 4, "copied": 0, "compressed": 0}
        assert os.path.samefile(files["flair"], done.dataset_folder / "imagesTr/a_0000.nii.gz")
        assert not os.path.samefile(files["seg"], done.dataset_folder / "labelsTr/a.nii.gz")

    def test_copies(self, source: Path) -> None:
        files = write_case(source, "a")
        done = convert(source, image_mode="copy")
        assert done.transfers["copied"] == 4
        target = done.dataset_folder / "imagesTr/a_0000.nii.gz"
        assert not os.path.samefile(files["flair"], target)
        assert target.read_bytes() == files["flair"].read_bytes()

    def test_copies_where_linking_fails(self, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def no_links(*_: object) -> None:
            raise OSError("another device")

        write_case(source, "a")
        monkeypatch.setattr(os, "link", no_links)
        assert convert(source).transfers == {"linked": 0, "copied": 4, "compressed": 0}

    def test_a_link_leads_to_the_file_itself(self, source: Path, tmp_path: Path) -> None:
        files = write_case(tmp_path / "store", "a")
        source.mkdir()
        for path in files.values():
            try:
                (source / path.name).symlink_to(path)
            except OSError:
                pytest.skip("no symbolic links here")
        target = convert(source).dataset_folder / "imagesTr/a_0000.nii.gz"
        assert not target.is_symlink()
        assert os.path.samefile(target, files["flair"])

    def test_compresses_without_touching_a_byte(self, source: Path) -> None:
        files = write_case(source, "a", ending=".nii")
        done = convert(source)
        assert done.transfers["compressed"] == 4
        packed = done.dataset_folder / "imagesTr/a_0001.nii.gz"
        assert gzip.decompress(packed.read_bytes()) == files["t1"].read_bytes()

    def test_float_labels(self, source: Path) -> None:
        files = write_case(source, "a")
        values = load(files["seg"])
        save(files["seg"], values.astype(np.float64))
        written = load(convert(source).dataset_folder / "labelsTr/a.nii.gz")
        assert written.dtype == np.uint8
        np.testing.assert_array_equal(written == 3, values == 4)

    def test_geometry_within_float_tolerance_is_accepted_and_made_equal(self, source: Path) -> None:
        files = write_case(source, "a")
        shifted = AFFINE.copy()
        shifted[1, 3] += 2e-4
        save(files["seg"], load(files["seg"]), shifted)
        done = convert(source)
        written, image = (
            nibabel.load(done.dataset_folder / name) for name in ("labelsTr/a.nii.gz", "imagesTr/a_0000.nii.gz")
        )
        np.testing.assert_allclose(written.affine, image.affine, atol=1e-6)

    def test_several_processes_do_the_same(self, source: Path, raw: Path) -> None:
        for number in range(3):
            write_case(source, f"case{number}", seed=number)
        one = convert(source, dataset_name="One")
        shutil.rmtree(one.dataset_folder.rename(source.parent / "one") / "imagesTs", ignore_errors=True)
        many = convert(source, dataset_name="Many", processes=2)
        assert many.training_ids == one.training_ids
        for number in range(3):
            name = f"labelsTr/case{number}.nii.gz"
            np.testing.assert_array_equal(load(many.dataset_folder / name), load(source.parent / "one" / name))

    def test_overlapping_folders_are_one(self, source: Path) -> None:
        write_case(source / "HGG", "a")
        assert convert(source, source / "HGG").training_ids == ("a",)

    def test_hidden_files_are_passed_over(self, source: Path) -> None:
        write_case(source, "a")
        (source / "._a_t1.nii.gz").write_bytes(b"left by macOS")
        (source / "survival_data.csv").write_text("Brats18ID,Age\n")
        assert convert(source).training_ids == ("a",)

    def test_nnunet_finds_the_data_set_sound(self, source: Path, capfd: pytest.CaptureFixture[str]) -> None:
        from nnunetv2.experiment_planning.verify_dataset_integrity import verify_dataset_integrity

        write_case(source, "a")
        write_case(source, "b", seed=1)
        verify_dataset_integrity(str(convert(source).dataset_folder), num_processes=1)
        output = capfd.readouterr().out
        assert "verify_dataset_integrity Done" in output
        assert "Warning" not in output

    def test_empty_labels_are_a_warning(self, source: Path) -> None:
        files = write_case(source, "a")
        save(files["seg"], np.zeros(SHAPE, np.uint8))
        (warning,) = convert(source).warnings
        assert str(files["seg"]) in warning
        assert "all background" in warning

    def test_doubts_are_warnings(self, source: Path) -> None:
        write_case(source / "BraTS-PED-00001-000", "BraTS-PED-00001-000", "2023")
        write_case(source / "BraTS-GLI-00002-000", "BraTS-GLI-00002-000", "2023", labelled=False)
        write_case(source / "elsewhere" / "BraTS-GLI-00003-000", "BraTS-GLI-00003-000", "2023", labelled=False)
        files = write_case(source / "BraTS-GLI-00004-000", "BraTS-GLI-00004-000", "2023")
        save(files["t1c"], np.zeros(SHAPE, np.int16))
        warnings = convert(source).warnings
        assert len(warnings) == 3
        assert "BraTS-GLI-00004-000-t1c.nii.gz is 0 everywhere" in warnings[0]
        assert warnings[1].startswith("BraTS-PED-00001-000: not named BraTS-GLI-")
        assert warnings[2].startswith("BraTS-GLI-00002-000: no labels")


def _remove(files: dict[str, Path]) -> str:
    files["t1ce"].unlink()
    return "a_t1ce.nii.gz is missing"


def _double(files: dict[str, Path]) -> str:
    save(files["t2"].with_name("a_t2.nii"), load(files["t2"]))
    return "2 files for t2"


def _only_labels(files: dict[str, Path]) -> str:
    for part in ("flair", "t1", "t1ce", "t2"):
        files[part].unlink()
    return "a_flair.nii.gz is missing"


def _repeat_id(files: dict[str, Path]) -> str:
    write_case(files["t1"].parent / "again", "A")
    return "Case id a occurs 2 times"


def _misname(files: dict[str, Path]) -> str:
    files["seg"].rename(files["seg"].with_name("W39_1998.09.19_Segm.nii.gz"))
    return "W39_1998.09.19_Segm.nii.gz fits no naming scheme"


def _resize(files: dict[str, Path]) -> str:
    save(files["t1"], np.ones((7, 6, 4), np.int16))
    return "a_t1.nii.gz and a_flair.nii.gz do not lie on the same voxel grid: size"


def _respace(files: dict[str, Path]) -> str:
    save(files["t1"], load(files["t1"]), AFFINE @ np.diag([1.0, 1.0, 1.01, 1.0]))
    return "a_t1.nii.gz and a_flair.nii.gz do not lie on the same voxel grid: spacing"


def _move(files: dict[str, Path]) -> str:
    affine = AFFINE.copy()
    affine[0, 3] = 0.5
    save(files["t2"], load(files["t2"]), affine)
    return "a_t2.nii.gz and a_flair.nii.gz do not lie on the same voxel grid: origin"


def _turn(files: dict[str, Path]) -> str:
    save(files["seg"], load(files["seg"]), AFFINE @ np.diag([-1.0, -1.0, 1.0, 1.0]))
    return "a_seg.nii.gz and a_flair.nii.gz do not lie on the same voxel grid"


def _relabel(files: dict[str, Path]) -> str:
    values = load(files["seg"]).copy()
    values[0, 0, :3] = 3
    values[0, 1, 0] = 7
    save(files["seg"], values)
    return "a_seg.nii.gz has labels 3 (3 voxels), 7 (1 voxels); BraTS 2017 to 2021 (scheme 2018) has 0 background"


def _label_half(files: dict[str, Path]) -> str:
    values = load(files["seg"]).astype(np.float32)
    values[0, 0, 0] = 0.5
    save(files["seg"], values)
    return "has labels 0.5 (1 voxels)"


def _label_nan(files: dict[str, Path]) -> str:
    values = load(files["seg"]).astype(np.float32)
    values[0, 0, 0] = np.nan
    save(files["seg"], values)
    return "a_seg.nii.gz has 1 voxels that are NaN or infinite"


def _not_finite(files: dict[str, Path]) -> str:
    values = load(files["flair"]).astype(np.float32)
    values[0, 0, 0], values[0, 0, 1] = np.nan, np.inf
    save(files["flair"], values)
    return "a_flair.nii.gz has 2 voxels that are NaN or infinite"


def _truncate(files: dict[str, Path]) -> str:
    """Half a gzip stream: ITK reads this as zeros without a word."""
    values = np.random.default_rng(0).integers(0, 999, (40, 40, 40)).astype(np.int16)
    save(files["t2"], values)
    content = files["t2"].read_bytes()
    files["t2"].write_bytes(content[: len(content) // 2])
    return "a_t2.nii.gz cannot be read"


def _truncate_uncompressed(files: dict[str, Path]) -> str:
    path = files["t2"].with_name("a_t2.nii")
    save(path, load(files["t2"]))
    files["t2"].unlink()
    path.write_bytes(path.read_bytes()[:-2])
    return "a_t2.nii cannot be read: it is truncated: 770 bytes where its header promises 772"


def _damage(files: dict[str, Path]) -> str:
    content = bytearray(files["t1"].read_bytes())
    content[-6] ^= 0xFF  # in the check sum
    files["t1"].write_bytes(content)
    return "a_t1.nii.gz cannot be read"


def _empty_file(files: dict[str, Path]) -> str:
    files["t1"].write_bytes(b"")
    return "a_t1.nii.gz cannot be read"


def _not_nifti(files: dict[str, Path]) -> str:
    files["t1"].write_bytes(gzip.compress(b"no image " * 100))
    return "a_t1.nii.gz cannot be read: it does not begin with a NIfTI-1 header"


def _four_dimensions(files: dict[str, Path]) -> str:
    save(files["t1"], np.ones((*SHAPE, 2), np.int16))
    return "a_t1.nii.gz has 4 dimensions"


PLANTED: tuple[Callable[[dict[str, Path]], str], ...] = (
    _remove,
    _double,
    _only_labels,
    _repeat_id,
    _misname,
    _resize,
    _respace,
    _move,
    _turn,
    _relabel,
    _label_half,
    _label_nan,
    _not_finite,
    _truncate,
    _truncate_uncompressed,
    _damage,
    _empty_file,
    _not_nifti,
    _four_dimensions,
)


class TestFaults:
    @pytest.mark.parametrize("plant", PLANTED)
    def test_is_reported_and_nothing_written(
        self, source: Path, raw: Path, plant: Callable[[dict[str, Path]], str]
    ) -> None:
        expected = plant(write_case(source / "a", "a"))
        write_case(source / "sound", "sound")
        faults = faults_of(source)
        assert any(expected in fault for fault in faults), faults
        assert not any("sound" in fault for fault in faults)
        assert list(raw.iterdir()) == []

    def test_all_are_reported_together(self, source: Path, raw: Path) -> None:
        _relabel(write_case(source / "a", "a"))
        for number, plant in enumerate((_remove, _truncate, _move)):
            plant(write_case(source / str(number), "a" if plant is _remove else f"b{number}"))
        (raw / "Dataset501_Other").mkdir()
        text = "\n".join(faults_of(source, image_mode="symlink"))
        for part in (
            "image mode",
            "taken by",
            "occurs 2 times",
            "is missing",
            "has labels 3",
            "cannot be read",
            "origin",
        ):
            assert part in text

    def test_no_case(self, source: Path, raw: Path) -> None:
        source.mkdir()
        (fault,) = faults_of(source)
        assert str(source) in fault
        assert "CASE_{flair,t1,t1ce,t2,seg}.nii.gz" in fault

    def test_no_folder(self, source: Path, raw: Path) -> None:
        (fault,) = faults_of(source)
        assert f"{source} is not a folder" in fault

    @pytest.mark.parametrize("place", ["nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"])
    def test_id_taken_by_another_name(self, source: Path, raw: Path, place: str) -> None:
        write_case(source, "a")
        (raw.parent / place / "Dataset501_Heart").mkdir()
        (fault,) = faults_of(source)
        assert "Dataset501_Heart" in fault

    def test_data_set_exists(self, source: Path, raw: Path) -> None:
        write_case(source, "a")
        (raw / "Dataset501_BraTS").mkdir()
        (fault,) = faults_of(source)
        assert "exists already" in fault
        assert list((raw / "Dataset501_BraTS").iterdir()) == []

    def test_same_case_for_training_and_held_out(self, source: Path, raw: Path) -> None:
        write_case(source, "a")
        faults = faults_of(source, held_out_folders=[source])
        assert any("both the input and the held-out folders" in fault for fault in faults)

    def test_raw_folder_not_set(self, source: Path, raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write_case(source, "a")
        monkeypatch.delenv("nnUNet_raw")
        (fault,) = faults_of(source)
        assert "nnUNet_raw is not set" in fault

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"schemes": ("1999",)}, "scheme is 1999; expected auto or any of 2018, 2023"),
            ({"schemes": ("auto", "2018")}, "cannot be combined"),
            ({"dataset_name": "my data"}, "'my data'"),
            ({"image_mode": "symlink"}, "'symlink'"),
            ({"processes": 0}, "processes is 0"),
        ],
    )
    def test_arguments(self, source: Path, raw: Path, arguments: dict[str, Any], message: str) -> None:
        write_case(source, "a")
        assert any(message in fault for fault in faults_of(source, **arguments))

    @pytest.mark.parametrize("number", [0, 1000])
    def test_data_set_id(self, source: Path, raw: Path, number: int) -> None:
        write_case(source, "a")
        with pytest.raises(ConversionError, match=f"id is {number}; expected 1 to 999"):
            convert_brats([source], number, progress=False)

    def test_a_failed_write_leaves_nothing(self, source: Path, raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        write_case(source, "a")
        monkeypatch.setattr(brats, "_write_labels", full)
        with pytest.raises(OSError, match="No space left"):
            convert(source)
        assert list(raw.iterdir()) == []

    def test_what_a_killed_conversion_left_does_not_matter(self, source: Path, raw: Path) -> None:
        write_case(source, "a")
        left = raw / ".Dataset501_BraTS.partial" / "imagesTr"
        left.mkdir(parents=True)
        (left / "half_0000.nii.gz").write_bytes(b"half")
        done = convert(source)
        assert len(list((done.dataset_folder / "imagesTr").iterdir())) == 4
        assert [path.name for path in raw.iterdir()] == ["Dataset501_BraTS"]


class TestToNnunetLabels:
    def test_unknown_scheme_value(self) -> None:
        with pytest.raises(ValueError, match=r"labels 4 \(1 voxels\); BraTS 2023"):
            to_nnunet_labels(np.array([0, 1, 4]), "2023")

    def test_tables_agree_with_the_challenge(self) -> None:
        assert SCHEMES["2018"].labels == {1: "necrosis", 2: "oedema", 4: "enhancing"}
        assert SCHEMES["2023"].labels == {1: "necrosis", 2: "oedema", 3: "enhancing"}


class TestCommand:
    def test_converts(self, source: Path, raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
        write_case(source / "in", "a")
        write_case(source / "out", "b")
        arguments = ["brats-convert", "-i", str(source / "in"), "--held-out", str(source / "out")]
        assert cli.main([*arguments, "-d", "77", "-name", "X", "--images", "copy", "-np", "1"]) == 0
        output = capsys.readouterr().out
        assert str(raw / "Dataset077_X") in output
        assert "training cases: 1" in output
        assert "8 copied" in output
        assert (raw / "Dataset077_X/labelsTs/b.nii.gz").is_file()

    def test_faults_without_a_traceback(self, source: Path, raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
        _remove(write_case(source / "a", "a"))
        assert cli.main(["brats-convert", "-i", str(source), "-d", "77"]) == 2
        error = capsys.readouterr().err
        assert "1 fault found" in error
        assert "a_t1ce.nii.gz is missing" in error
