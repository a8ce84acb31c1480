import gzip
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from nnunet_conres import cli
from nnunet_conres.datasets import brats
from nnunet_conres.datasets.brats import Conversion, ConversionError, convert_brats
from nnunet_conres.datasets.brats_find import nifti_files

SHAPE = (7, 6, 5)
AFFINE = np.array([[-1.0, 0, 0, 0], [0, -1.0, 0, 239], [0, 0, 1.0, 0], [0, 0, 0, 1]])
# Independent copy of the module's tables, as a reference: file parts, an id, and source labels to nnU-Net's labels.
UNTIL_2021 = ("_flair", "_t1", "_t1ce", "_t2", "_seg")
SINCE_2023 = ("-t2f", "-t1n", "-t1c", "-t2w", "-seg")
KNOWN: dict[str, tuple[tuple[str, ...], str, dict[int, int]]] = {
    "2018": (UNTIL_2021, "Brats18_TCIA_1_1", {0: 0, 1: 2, 2: 1, 4: 3}),
    "2021": (UNTIL_2021, "BraTS2021_00001", {0: 0, 1: 2, 2: 1, 4: 3}),
    "2023": (SINCE_2023, "BraTS-GLI-00001-000", {0: 0, 1: 2, 2: 1, 3: 3}),
    "2023-MEN": (SINCE_2023, "BraTS-MEN-00001-000", {0: 0, 1: 2, 2: 1, 3: 3}),
    "2023-MET": (SINCE_2023, "BraTS-MET-00001-000", {0: 0, 1: 2, 2: 1, 3: 3}),
    "2023-SSA": (SINCE_2023, "BraTS-SSA-00001-000", {0: 0, 1: 2, 2: 1, 3: 3}),
    "2023-PED": (SINCE_2023, "BraTS-PED-00001-000", {0: 0, 1: 2, 2: 1, 3: 3}),
    # oedema 2, necrosis 1, enhancing 3, cavity 4
    "2024": (SINCE_2023, "BraTS-GLI-00001-100", {0: 0, 1: 2, 2: 1, 3: 3, 4: 4}),
    # enhancing 1, non-enhancing 2, cyst 3, oedema 4; outermost first oedema, non-enhancing, cyst, enhancing
    "2024-PED": (SINCE_2023, "BraTS-PED-00001-000", {0: 0, 1: 4, 2: 2, 3: 3, 4: 1}),
    "2024-GoAT": (SINCE_2023, "BraTS-GoAT-00001", {0: 0, 1: 2, 2: 1, 3: 3}),
    "2025-GLI": (SINCE_2023, "BraTS-GLI-00001-000", {0: 0, 1: 2, 2: 1, 3: 3, 4: 4}),
    "2025-MET": (SINCE_2023, "BraTS-MET-00001-000", {0: 0, 1: 2, 2: 1, 3: 3, 4: 4}),
    "MSD": ((), "BRATS_001", {0: 0, 1: 1, 2: 2, 3: 3}),
}
# Schemes that share their ids with other schemes.
ON_REQUEST = ("2023-MET", "2023-PED", "2024-PED", "2025-GLI", "2025-MET")


def save(path: Path, array: np.ndarray, affine: np.ndarray = AFFINE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, affine), path)


def write_case(
    folder: Path, case_id: str, scheme: str = "2018", *, labelled: bool = True, ending: str = ".nii.gz", seed: int = 0
) -> dict[str, Path]:
    """Write a case whose channels have distinct intensities: hundreds 1 to 4 for FLAIR, T1, T1ce, T2."""
    rng = np.random.default_rng(seed)
    parts, _, table = KNOWN[scheme]
    channels = [(100 * number + rng.integers(0, 50, SHAPE)).astype(np.int16) for number in (1, 2, 3, 4)]
    labels = rng.choice(list(table), SHAPE).astype(np.uint8)
    files = {}
    if not parts:
        files["images"] = folder / ("imagesTr" if labelled else "imagesTs") / f"{case_id}{ending}"
        save(files["images"], np.stack(channels, axis=-1))
        files["seg"] = folder / "labelsTr" / f"{case_id}{ending}"
    else:
        for part, channel in zip(parts[:4], channels, strict=True):
            files[part[1:]] = folder / f"{case_id}{part}{ending}"
            save(files[part[1:]], channel)
        files["seg"] = folder / f"{case_id}{parts[4]}{ending}"
    if labelled:
        save(files["seg"], labels)
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


def errors_of(*folders: Path, **arguments: Any) -> tuple[str, ...]:
    with pytest.raises(ConversionError) as caught:
        convert(*folders, **arguments)
    return caught.value.errors


@pytest.mark.usefixtures("raw")
class TestConvert:
    @pytest.mark.parametrize("scheme", list(KNOWN))
    @pytest.mark.parametrize("ending", [".nii.gz", ".nii"])
    def test_channels_labels_and_geometry(self, source: Path, scheme: str, ending: str) -> None:
        _, case_id, table = KNOWN[scheme]
        files = write_case(source / "HGG" / case_id, case_id, scheme, ending=ending)
        done = convert(source, schemes=(scheme,) if scheme in ON_REQUEST else ("auto",))
        assert done.schemes == (scheme,)
        for channel in range(4):
            image = load(done.dataset_folder / f"imagesTr/{case_id}_{channel:04d}.nii.gz")
            assert set(image.ravel() // 100) == {channel + 1}
            assert (image.dtype, image.shape) == (np.int16, SHAPE)
        written = nibabel.load(done.dataset_folder / f"labelsTr/{case_id}.nii.gz")
        np.testing.assert_allclose(written.affine, AFFINE, atol=1e-6)
        expected = np.vectorize(table.get)(load(files["seg"]))
        np.testing.assert_array_equal(np.asarray(written.dataobj), expected)
        assert len(np.unique(expected)) == len(table)
        assert not done.warnings

    @pytest.mark.parametrize("scheme", list(KNOWN))
    def test_itk_and_nnunet_read_what_was_written(self, source: Path, scheme: str) -> None:
        """nnU-Net reads with ITK. The tests above use nibabel, which wrote the reference."""
        import SimpleITK

        _, case_id, table = KNOWN[scheme]
        files = write_case(source / case_id, case_id, scheme)
        folder = convert(source, schemes=(scheme,)).dataset_folder
        written = SimpleITK.ReadImage(str(folder / f"labelsTr/{case_id}.nii.gz"))
        original = SimpleITK.ReadImage(str(files["seg"]))
        assert written.GetSize() == original.GetSize()
        np.testing.assert_allclose(written.GetOrigin(), original.GetOrigin(), atol=1e-5)
        np.testing.assert_allclose(written.GetDirection(), original.GetDirection(), atol=1e-6)
        voxels = SimpleITK.GetArrayFromImage(original)
        np.testing.assert_array_equal(SimpleITK.GetArrayFromImage(written), np.vectorize(table.get)(voxels))
        channel = SimpleITK.ReadImage(str(folder / f"imagesTr/{case_id}_0002.nii.gz"))
        np.testing.assert_allclose(channel.GetOrigin(), original.GetOrigin(), atol=1e-5)
        assert set(SimpleITK.GetArrayFromImage(channel).ravel() // 100) == {3}

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

    def test_labels_instead_of_regions(self, source: Path) -> None:
        write_case(source, "a")
        content = json.loads((convert(source, mode="labels").dataset_folder / "dataset.json").read_text())
        assert content["labels"] == {"background": 0, "oedema": 1, "necrosis": 2, "enhancing": 3}
        assert "regions_class_order" not in content

    def test_what_is_known_of_cases(self, source: Path) -> None:
        write_case(source / "HGG" / "a", "a")
        write_case(source / "LGG" / "b", "b")
        write_case(source / "c", "c", labelled=False)
        known = json.loads((convert(source).dataset_folder / "cases.json").read_text())
        assert {case: about.get("grade") for case, about in known.items()} == {"a": "HGG", "b": "LGG", "c": None}
        assert known["a"]["source"] == str(source / "HGG" / "a")
        assert known["a"]["scheme"] == "2018"

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
        write_case(source, "BraTS-GLI-00001-000", "2023", labelled=False)
        done = convert(source)
        assert done.test_ids == ("BraTS-GLI-00001-000",)
        assert ["but not for training" in warning for warning in done.warnings] == [True]

    def test_mixture_only_when_asked_for(self, source: Path) -> None:
        write_case(source / "old", "a", "2018")
        write_case(source / "new", "BraTS-GLI-00001-000", "2023")
        (error,) = errors_of(source)
        assert "mix" in error
        assert "--scheme 2018 2023" in error
        done = convert(source, schemes=("2018", "2023"))
        assert done.training_ids == ("BraTS-GLI-00001-000", "a")
        assert done.schemes == ("2018", "2023")
        for case in done.training_ids:
            assert set(load(done.dataset_folder / f"imagesTr/{case}_0002.nii.gz").ravel() // 100) == {3}
        shutil.rmtree(done.dataset_folder)
        strange = errors_of(source, schemes=("2018",))
        assert any("BraTS-GLI-00001-000: is named as in" in error and "does not allow" in error for error in strange)

    def test_a_mixture_has_one_set_of_labels(self, source: Path) -> None:
        write_case(source / "old", "a", "2018")
        _, case_id, _ = KNOWN["2024"]
        write_case(source / "new", case_id, "2024")
        done = convert(source, schemes=("2018", "2024"))
        content = json.loads((done.dataset_folder / "dataset.json").read_text())
        assert content["labels"]["resection_cavity"] == 4
        assert content["regions_class_order"] == [1, 2, 3, 4]
        (warning,) = done.warnings
        assert "BraTS 2017 to 2020 (--scheme 2018) has no label for resection_cavity" in warning

    def test_a_mixture_without_one_is_refused(self, source: Path) -> None:
        write_case(source / "gli", KNOWN["2023"][1], "2023")
        write_case(source / "ped", KNOWN["2024-PED"][1], "2024-PED")
        (error,) = errors_of(source, schemes=("2023", "2024-PED"))
        assert "whose labels stand for different tissues" in error

    def test_2023_and_2024_are_told_apart_by_time_points(self, source: Path) -> None:
        write_case(source / "a", "BraTS-GLI-00001-001", "2023")
        write_case(source / "b", "BraTS-GLI-00002-101", "2024")
        (error,) = errors_of(source)
        assert "--scheme 2023 2024" in error
        done = convert(source, schemes=("2023", "2024"))
        known = json.loads((done.dataset_folder / "cases.json").read_text())
        assert [about["scheme"] for about in known.values()] == ["2023", "2024"]

    def test_labels_of_2024_under_names_of_2023(self, source: Path) -> None:
        write_case(source, "BraTS-GLI-00001-000", "2024")
        (error,) = errors_of(source)
        assert "has labels 4 (" in error
        assert "--scheme 2024" in error
        assert convert(source, schemes=("2024",)).schemes == ("2024",)

    def test_paediatric_cases_need_their_year(self, source: Path) -> None:
        write_case(source, "BraTS-PED-00001-000", "2024-PED")
        (error,) = errors_of(source)
        assert "could be of BraTS 2023, paediatric (--scheme 2023-PED) or BraTS 2024" in error
        (error,) = errors_of(source, schemes=("2023-PED",))
        assert "--scheme 2024-PED" in error
        convert(source, schemes=("2024-PED",))

    def test_names_that_are_no_challenges_need_a_scheme(self, source: Path) -> None:
        write_case(source, "patient7", "2023")
        (error,) = errors_of(source)
        assert "patient7: could be of BraTS 2023, adult glioma (--scheme 2023)" in error
        assert convert(source, schemes=("2023",)).training_ids == ("patient7",)

    def test_other_challenges_are_not_taken_for_the_one_named(self, source: Path) -> None:
        write_case(source, "BraTS-MEN-00001-000", "2023-MEN")
        (error,) = errors_of(source, schemes=("2023",))
        assert "is named as in BraTS 2023, meningioma (--scheme 2023-MEN)" in error

    def test_decathlon_with_cases_without_labels(self, source: Path) -> None:
        write_case(source / "Task01_BrainTumour", "BRATS_001", "MSD")
        write_case(source / "Task01_BrainTumour", "BRATS_485", "MSD", labelled=False)
        (source / "Task01_BrainTumour/imagesTr/._BRATS_001.nii.gz").write_bytes(b"left by macOS")
        done = convert(source)
        assert (done.training_ids, done.test_ids) == (("BRATS_001",), ("BRATS_485",))
        assert done.transfers == {"linked": 0, "copied": 0, "compressed": 0, "split": 8}

    def test_bad_cases_are_left_out_when_asked_for(self, source: Path) -> None:
        sound = write_case(source / "sound", "sound")
        _not_finite(write_case(source / "a", "a"))
        _remove(write_case(source / "b", "b"))
        _truncate(write_case(source / "c", "c"))
        write_case(source / "d1", "d")
        write_case(source / "d2", "d")
        save(source / "notes.nii.gz", load(sound["t1"]))
        done = convert(source, skip_bad=True)
        assert done.training_ids == ("sound",)
        names = {Path(where).name for where in done.skipped}
        assert names == {"a", "b", "c", "d", "notes.nii.gz"}
        listed = " ".join(error for errors in done.skipped.values() for error in errors)
        for part in ("NaN or infinite", "is missing", "cannot be read", "occurs 2 times", "fits no naming scheme"):
            assert part in listed
        assert len(list((done.dataset_folder / "imagesTr").iterdir())) == 4

    def test_no_case_left(self, source: Path, raw: Path) -> None:
        _remove(write_case(source / "b", "b"))
        errors = errors_of(source, skip_bad=True)
        assert any("No case is left" in error for error in errors)
        assert any("is missing" in error for error in errors)
        assert list(raw.iterdir()) == []

    def test_images_are_linked_and_labels_are_not(self, source: Path) -> None:
        files = write_case(source, "a")
        done = convert(source)
        assert done.transfers == {"linked": 4, "copied": 0, "compressed": 0, "split": 0}
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
        assert convert(source).transfers == {"linked": 0, "copied": 4, "compressed": 0, "split": 0}

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

    @pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
    @pytest.mark.parametrize("inner", ["00000057_brain_{}.nii", "{}.nii.gz", "same"])
    def test_folders_as_unpackers_leave_them(self, source: Path, ending: str, inner: str) -> None:
        """Kaggle's copies unpack to a folder with the name of the file, which contains the file under another name."""
        expected = {}
        for number in range(3):
            case_id = f"BraTS20_Training_{number:03d}"
            for part, path in write_case(source / "HGG" / case_id, case_id, seed=number).items():
                expected[case_id, part] = load(path)
                name = path.name if inner == "same" else inner.format(part)
                folder = path.with_name(f"{case_id}_{part}{ending}")
                content = path.read_bytes() if name.endswith(".gz") else gzip.decompress(path.read_bytes())
                path.unlink()
                folder.mkdir()
                (folder / name).write_bytes(content)
                (folder / ".DS_Store").write_bytes(b"macOS")
        done = convert(source)
        assert done.training_ids == tuple(f"BraTS20_Training_{number:03d}" for number in range(3))
        for case_id in done.training_ids:
            for channel, part in enumerate(("flair", "t1", "t1ce", "t2")):
                image = load(done.dataset_folder / f"imagesTr/{case_id}_{channel:04d}.nii.gz")
                np.testing.assert_array_equal(image, expected[case_id, part])
        assert {facts["grade"] for facts in json.loads((done.dataset_folder / "cases.json").read_text()).values()} == {
            "HGG"
        }
        assert not done.warnings

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
        for case_id, labelled in (("00001", True), ("00002", False), ("00004", True)):
            case_id = f"BraTS-GLI-{case_id}-000"
            files = write_case(source / case_id, case_id, "2023", labelled=labelled)
        write_case(source / "elsewhere" / "BraTS-GLI-00003-000", "BraTS-GLI-00003-000", "2023", labelled=False)
        save(files["t1c"], np.zeros(SHAPE, np.int16))
        warnings = convert(source).warnings
        assert len(warnings) == 2
        assert "BraTS-GLI-00004-000-t1c.nii.gz is 0 everywhere" in warnings[0]
        assert warnings[1].startswith("BraTS-GLI-00002-000: no labels")

    def test_a_label_that_no_case_has_is_a_doubt(self, source: Path) -> None:
        files = write_case(source, "a")
        values = load(files["seg"]).copy()
        values[values == 4] = 1
        save(files["seg"], values)
        (warning,) = convert(source).warnings
        assert "No label file has 4 enhancing, which BraTS 2017 to 2020 (--scheme 2018) defines" in warning

    def test_a_patient_released_twice_is_a_doubt(self, source: Path) -> None:
        write_case(source, "Brats18_TCIA01_1_1")
        write_case(source, "BraTS19_TCIA01_1_1")
        (warning,) = convert(source).warnings
        assert "BraTS19_TCIA01_1_1 and Brats18_TCIA01_1_1: probably the same patient" in warning

    def test_intensities_below_zero(self, source: Path) -> None:
        files = write_case(source, "a")
        save(files["t1"], load(files["t1"]) - 250)
        assert load(convert(source).dataset_folder / "imagesTr/a_0001.nii.gz").min() < 0

    def test_headers_that_say_the_same_in_other_words(self, source: Path) -> None:
        """Some files have only the qform, one only the sform, one both, and one the sform with another code."""
        files = write_case(source, "a")
        codes = {"flair": (1, 0), "t1": (0, 1), "t1ce": (2, 1), "t2": (0, 4), "seg": (1, 0)}
        for part, (qform, sform) in codes.items():
            image = nibabel.Nifti1Image(load(files[part]), None)
            image.header.set_xyzt_units("mm")
            if qform:
                image.set_qform(AFFINE, qform)
            if sform:
                image.set_sform(AFFINE, sform)
            nibabel.save(image, files[part])
        done = convert(source)
        np.testing.assert_allclose(nibabel.load(done.dataset_folder / "labelsTr/a.nii.gz").affine, AFFINE, atol=1e-6)

    def test_forms_that_contradict_each_other_in_all_files_alike(self, source: Path) -> None:
        """ITK chooses between qform and sform by their codes, which differ here. The grids are equal nevertheless."""
        other = AFFINE.copy()
        other[:3, 3] = (90, 130, -70)
        for number, path in enumerate(write_case(source, "a").values()):
            image = nibabel.Nifti1Image(load(path), None)
            image.set_qform(other, 1)
            image.set_sform(AFFINE, 1 + number % 2)
            nibabel.save(image, path)
        assert convert(source).training_ids == ("a",)

    def test_several_streams_in_one_file(self, source: Path) -> None:
        """As pigz and bgzip write them."""
        files = write_case(source, "a")
        content = gzip.decompress(files["t1"].read_bytes())
        files["t1"].write_bytes(gzip.compress(content[:400]) + gzip.compress(content[400:]))
        assert convert(source).training_ids == ("a",)

    def test_labels_with_a_scale(self, source: Path) -> None:
        files = write_case(source, "a")
        values = load(files["seg"])
        image = nibabel.Nifti1Image((values * 2).astype(np.uint8), AFFINE)
        nibabel.save(image, files["seg"])
        # nibabel would scale the voxels itself, so the slope is written into the bytes of the file.
        content = bytearray(gzip.decompress(files["seg"].read_bytes()))
        content[112:116] = np.float32(0.5).tobytes()
        files["seg"].write_bytes(gzip.compress(bytes(content)))
        written = load(convert(source).dataset_folder / "labelsTr/a.nii.gz")
        np.testing.assert_array_equal(written == 3, values == 4)


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
    return "a_seg.nii.gz has labels 3 (3 voxels), 7 (1 voxels); BraTS 2017 to 2020 (--scheme 2018) has 0 background"


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
    """Cut a gzip stream in half. ITK silently reads the missing half as zeros."""
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
    return "a_t2.nii cannot be read: it is cut short: 770 bytes, its header says 772"


def _damage(files: dict[str, Path]) -> str:
    content = bytearray(files["t1"].read_bytes())
    content[-6] ^= 0xFF  # in the checksum
    files["t1"].write_bytes(content)
    return "a_t1.nii.gz cannot be read"


def _empty_file(files: dict[str, Path]) -> str:
    files["t1"].write_bytes(b"")
    return "a_t1.nii.gz cannot be read"


def _not_nifti(files: dict[str, Path]) -> str:
    files["t1"].write_bytes(gzip.compress(b"no image " * 100))
    return "a_t1.nii.gz cannot be read: it does not begin with a NIfTI header"


def _colour(files: dict[str, Path]) -> str:
    save(files["t1"], np.zeros(SHAPE, [("R", "u1"), ("G", "u1"), ("B", "u1")]))
    return "a_t1.nii.gz has voxels of type"


def _oblique(files: dict[str, Path]) -> str:
    skewed = AFFINE.copy()
    skewed[0, 1] = 0.5
    image = nibabel.Nifti1Image(load(files["t1"]), skewed)
    image.set_qform(None, 0)
    nibabel.save(image, files["t1"])
    return "a_t1.nii.gz"


def _no_such_type(files: dict[str, Path]) -> str:
    content = bytearray(gzip.decompress(files["t1"].read_bytes()))
    content[70:72] = (227).to_bytes(2, "little")
    files["t1"].write_bytes(gzip.compress(bytes(content)))
    return "a_t1.nii.gz cannot be read: its header has an impossible voxel type"


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
    _colour,
    _no_such_type,
    _oblique,
    _four_dimensions,
)


class TestErrors:
    @pytest.mark.parametrize("plant", PLANTED)
    def test_is_reported_and_nothing_written(
        self, source: Path, raw: Path, plant: Callable[[dict[str, Path]], str]
    ) -> None:
        expected = plant(write_case(source / "a", "a"))
        write_case(source / "sound", "sound")
        errors = errors_of(source)
        assert any(expected in error for error in errors), errors
        assert not any("sound" in error for error in errors)
        assert list(raw.iterdir()) == []

    def test_all_are_reported_together(self, source: Path, raw: Path) -> None:
        _relabel(write_case(source / "a", "a"))
        for number, plant in enumerate((_remove, _truncate, _move)):
            plant(write_case(source / str(number), "a" if plant is _remove else f"b{number}"))
        text = "\n".join(errors_of(source))
        for part in (
            "occurs 2 times",
            "is missing",
            "has labels 3",
            "cannot be read",
            "origin",
        ):
            assert part in text

    def test_many_are_grouped_with_the_number_of_cases(self, source: Path, raw: Path) -> None:
        for number in range(40):
            case_id = f"BraTS20_Training_{number:03d}"
            files = write_case(source / case_id, case_id, seed=number)
            if number < 30:
                files["t1"].unlink()
            elif number < 38:
                files["flair"].rename(source / case_id / "00000057_brain.nii.gz")
        with pytest.raises(ConversionError) as caught:
            convert(source)
        lines = str(caught.value).splitlines()
        assert len(caught.value.errors) == 30 + 8 + 8 + 1
        # Names that match no scheme, and missing files: five lines for each, and one with the number of the others.
        assert len(lines) == 1 + 2 * 6 + 1
        assert lines[6] == "  - ... and 3 more errors of this kind, 8 in all."
        assert lines[12] == "  - ... and 33 more errors of this kind, 38 in all."
        assert lines[-1].endswith(
            "46 cases or files have errors, 2 cases have none. Correct them, or leave them out with --skip-bad."
        )
        assert not list(raw.iterdir())

    @pytest.mark.parametrize("case_id", ["-rf", "Brats18..A", "Brats18_\n_1"])
    def test_ids_that_are_no_names(self, source: Path, raw: Path, case_id: str) -> None:
        write_case(source / "a", case_id)
        (error,) = errors_of(source, schemes=("2018",))
        assert f"has the case id {case_id!a}, which" in error
        assert not list(raw.iterdir())

    def test_no_case(self, source: Path, raw: Path) -> None:
        source.mkdir()
        (error,) = errors_of(source)
        assert str(source) in error
        assert "CASE_{flair,t1,t1ce,t2,seg}.nii.gz or CASE-{t2f,t1n,t1c,t2w,seg}.nii.gz" in error

    def test_no_folder(self, source: Path, raw: Path) -> None:
        (error,) = errors_of(source)
        assert f"{source} is not a folder" in error

    def test_arguments_and_target_are_checked_before_any_file(
        self, source: Path, raw: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write_case(source, "a")
        (raw / "Dataset501_Other").mkdir()
        monkeypatch.setattr(brats, "find_cases", None)
        monkeypatch.setattr(brats, "check_case", None)
        errors = errors_of(source, image_mode="symlink")
        assert [("image mode" in error, "taken by" in error) for error in errors] == [(True, False), (False, True)]

    def test_a_mistyped_raw_folder_is_not_made(self, source: Path, raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write_case(source, "a")
        monkeypatch.setenv("nnUNet_raw", f"{raw}_mistyped")
        (error,) = errors_of(source)
        assert f"nnUNet_raw is {raw}_mistyped, which does not exist" in error
        assert not raw.with_name("nnUNet_raw_mistyped").exists()

    @pytest.mark.parametrize("name", ["held_out", "HoldOut", "Validation", "ValidationData", "test", "BraTS_Testing"])
    def test_labelled_cases_of_a_held_out_folder_inside_the_input(self, source: Path, raw: Path, name: str) -> None:
        """With -i one level too high, nnU-Net would train on held-out cases."""
        for folder, case_id in (("training", "a"), (name, "b")):
            write_case(source / folder / "HGG" / case_id, case_id)
        write_case(source / name / "c", "c", labelled=False)
        (error,) = errors_of(source)
        assert f"1 labelled cases lie in {source / name}, whose name says that they are not for training: b." in error
        assert list(raw.iterdir()) == []
        done = convert(source / "training", held_out_folders=[source / name])
        assert (done.training_ids, done.test_ids) == (("a",), ("b", "c"))

    def test_a_folder_named_itself_is_meant(self, source: Path, raw: Path) -> None:
        for folder, case_id in (("training", "a"), ("held_out", "b"), ("latest", "c"), ("values", "d")):
            write_case(source / folder / case_id, case_id)
        assert convert(source, source / "held_out").training_ids == ("a", "b", "c", "d")

    @pytest.mark.parametrize("place", ["nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"])
    def test_id_taken_by_another_name(self, source: Path, raw: Path, place: str) -> None:
        write_case(source, "a")
        (raw.parent / place / "Dataset501_Heart").mkdir()
        (error,) = errors_of(source)
        assert "Dataset501_Heart" in error

    def test_data_set_exists(self, source: Path, raw: Path) -> None:
        write_case(source, "a")
        (raw / "Dataset501_BraTS").mkdir()
        (error,) = errors_of(source)
        assert "exists already" in error
        assert list((raw / "Dataset501_BraTS").iterdir()) == []

    def test_same_case_for_training_and_held_out(self, source: Path, raw: Path) -> None:
        write_case(source, "a")
        errors = errors_of(source, held_out_folders=[source])
        assert any("both the input and the held-out folders" in error for error in errors)

    def test_raw_folder_not_set(self, source: Path, raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write_case(source, "a")
        monkeypatch.delenv("nnUNet_raw")
        (error,) = errors_of(source)
        assert "nnUNet_raw is not set" in error

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"schemes": ("1999",)}, "scheme is 1999. Expected auto or any of 2018, 2021, 2023"),
            ({"mode": "voxels"}, "mode is 'voxels'; expected regions or labels"),
            ({"schemes": ("auto", "2018")}, "cannot be combined"),
            ({"dataset_name": "my data"}, "'my data'"),
            ({"image_mode": "symlink"}, "'symlink'"),
            ({"processes": 0}, "processes is 0"),
        ],
    )
    def test_arguments(self, source: Path, raw: Path, arguments: dict[str, Any], message: str) -> None:
        write_case(source, "a")
        assert any(message in error for error in errors_of(source, **arguments))

    @pytest.mark.parametrize("number", [0, 1000])
    def test_data_set_id(self, source: Path, raw: Path, number: int) -> None:
        write_case(source, "a")
        with pytest.raises(ConversionError, match=f"id is {number}; expected 1 to 999"):
            convert_brats([source], number, progress=False)

    def test_a_failed_write_leaves_nothing(self, source: Path, raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        write_case(source, "a")
        monkeypatch.setattr(brats, "write_case", full)
        with pytest.raises(OSError, match="No space left"):
            convert(source)
        assert list(raw.iterdir()) == []

    def test_what_a_killed_conversion_left_does_not_matter(self, source: Path, raw: Path) -> None:
        write_case(source, "a")
        left = raw / ".Dataset501_BraTS.partial-0123abcd" / "imagesTr"
        left.mkdir(parents=True)
        (left / "half_0000.nii.gz").write_bytes(b"half")
        done = convert(source)
        assert len(list((done.dataset_folder / "imagesTr").iterdir())) == 4
        assert [path.name for path in raw.iterdir()] == ["Dataset501_BraTS"]

    def test_a_kill_leaves_no_half_data_set(self, source: Path, raw: Path) -> None:
        """A killed process cannot clean up. The next conversion does."""
        write_case(source, "a")
        script = (
            "import os, signal\n"
            "from nnunet_conres.datasets import brats\n"
            "def die(job):\n"
            "    (job.dataset / 'imagesTr' / 'half_0000.nii.gz').write_bytes(b'half')\n"
            "    os.kill(os.getpid(), getattr(signal, 'SIGKILL', signal.SIGTERM))\n"
            "brats.write_case = die\n"
            f"brats.convert_brats([{str(source)!r}], 501, progress=False)\n"
        )
        run = subprocess.run([sys.executable, "-c", script], check=False)
        assert run.returncode != 0
        assert [path.name.split("-")[0] for path in sorted(raw.iterdir())] == [
            ".Dataset501.lock",
            ".Dataset501_BraTS.partial",
        ]
        assert convert(source).training_ids == ("a",)
        assert [path.name for path in raw.iterdir()] == ["Dataset501_BraTS"]

    def test_decathlon(self, source: Path, raw: Path) -> None:
        files = write_case(source, "BRATS_001", "MSD")
        save(files["images"], load(files["images"])[..., :3])
        write_case(source, "BRATS_002", "MSD")
        (source / "imagesTr/BRATS_002.nii.gz").unlink()
        files = write_case(source, "BRATS_003", "MSD")
        moved = AFFINE.copy()
        moved[2, 3] = 1
        save(files["seg"], load(files["seg"]), moved)
        text = "\n".join(errors_of(source))
        assert "BRATS_001.nii.gz has size 7 x 6 x 5 x 3; expected 4 channels" in text
        assert "imagesTr/BRATS_002.nii.gz is missing" in text.replace("\\", "/")
        assert "labelsTr/BRATS_003.nii.gz and BRATS_003.nii.gz do not lie on the same" in text.replace("\\", "/")


class TestCommand:
    def test_converts(self, source: Path, raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
        write_case(source / "in", "a")
        write_case(source / "out", "b")
        arguments = ["brats-convert", "-i", str(source / "in"), "--held-out", str(source / "out")]
        assert cli.main([*arguments, "-d", "77", "-name", "X", "--transfer", "copy", "-np", "1"]) == 0
        output = capsys.readouterr().out
        assert str(raw / "Dataset077_X") in output
        assert "training cases: 1" in output
        assert "8 copied" in output
        assert "linked" not in output
        assert (raw / "Dataset077_X/labelsTs/b.nii.gz").is_file()

    def test_errors_without_a_traceback(self, source: Path, raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
        _remove(write_case(source / "a", "a"))
        assert cli.main(["brats-convert", "-i", str(source), "-d", "77"]) == 2
        error = capsys.readouterr().err
        assert "1 error found" in error
        assert "a_t1ce.nii.gz is missing" in error


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_a_link_to_a_folder_above_is_followed_once(tmp_path: Path) -> None:
    (tmp_path / "case").mkdir()
    (tmp_path / "case" / "a.nii.gz").touch()
    (tmp_path / "case" / "above").symlink_to(tmp_path)
    assert [path.name for path in nifti_files(tmp_path)] == ["a.nii.gz"]
