import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

from nnunet_conres import cli
from nnunet_conres.datasets.brats import convert_brats
from nnunet_conres.datasets.brats_export import Export, ExportError, _name_errors, export_brats
from nnunet_conres.datasets.brats_scheme_files import LABELS
from nnunet_conres.datasets.brats_schemes import ANY, SCHEMES

SHAPE = (7, 6, 5)
AFFINE = np.array([[-1.0, 0, 0, 0], [0, -1.0, 0, 239], [0, 0, 1.0, 0], [0, 0, 0, 1]])
IDS = {
    "2018": "Brats18_TCIA_1_1",
    "2021": "BraTS2021_00001",
    "2023": "BraTS-GLI-00001-000",
    "2023-MEN": "BraTS-MEN-00001-000",
    "2023-MET": "BraTS-MET-00001-000",
    "2023-SSA": "BraTS-SSA-00001-000",
    "2023-PED": "BraTS-PED-00001-000",
    "2024": "BraTS-GLI-00001-100",
    "2024-GoAT": "BraTS-GoAT-00001",
    "2024-MEN-RT": "BraTS-MEN-RT-0001-1",
    "2024-PED": "BraTS-PED-00001-000",
    "2025-GLI": "BraTS-GLI-00001-000",
    "2025-MET": "BraTS-MET-00001-000",
    "MSD": "BRATS_001",
}
GLIOMA = {
    "labels": {"background": 0, "whole_tumor": [1, 2, 3], "tumor_core": [2, 3], "enhancing_tumor": 3},
    "regions_class_order": [1, 2, 3],
}


def save(path: Path, array: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, affine), path)
    return path


def load(path: Path) -> np.ndarray:
    return np.asarray(nibabel.load(path).dataobj)


@pytest.fixture
def predictions(tmp_path: Path) -> Path:
    """Write a folder as nnU-Net does, with a prediction for one case of BraTS 2018."""
    folder = tmp_path / "predictions"
    save(folder / "Brats18_A_1.nii.gz", np.random.default_rng(0).integers(0, 4, SHAPE, np.uint8))
    for name in ("dataset.json", "plans.json"):
        (folder / name).write_text(json.dumps(GLIOMA))
    (folder / "Brats18_A_1.npz").write_bytes(b"probabilities")
    return folder


def export(folder: Path, scheme: str = "2018", **arguments: Any) -> Export:
    return export_brats(folder, folder.parent / "out", scheme, progress=False, **arguments)


def errors_of(folder: Path, scheme: str = "2018", **arguments: Any) -> tuple[str, ...]:
    with pytest.raises(ExportError) as caught:
        export(folder, scheme, **arguments)
    assert not (folder.parent / "out").exists()
    assert not list(folder.parent.glob(".*"))
    return caught.value.errors


class TestRoundTrip:
    @pytest.mark.parametrize("mode", ["regions", "labels"])
    @pytest.mark.parametrize("scheme", list(SCHEMES))
    def test_converted_labels_come_back(self, tmp_path: Path, scheme: str, mode: Any) -> None:
        """Voxels, geometry and name equal those of the source's label file."""
        rng = np.random.default_rng(1)
        case_id, layout = IDS[scheme], SCHEMES[scheme].layout
        source = tmp_path / "source"
        for channels in layout.images:
            shape = SHAPE if len(channels) == 1 else (*SHAPE, len(channels))
            save(source / layout.expected(case_id, channels), rng.integers(1, 99, shape).astype(np.int16))
        labels = rng.choice([0, *SCHEMES[scheme].labels], SHAPE).astype(np.uint8)
        original = save(source / layout.expected(case_id, LABELS), labels)
        (tmp_path / "raw").mkdir()
        done = convert_brats([source], 501, schemes=(scheme,), mode=mode, raw_folder=tmp_path / "raw", progress=False)
        export_brats(
            done.dataset_folder / "labelsTr",
            tmp_path / "out",
            scheme,
            dataset_json=done.dataset_folder / "dataset.json",
            reference_folder=source,
            progress=False,
        )
        assert [path.name for path in (tmp_path / "out").iterdir()] == [f"{case_id}.nii.gz"]
        back = nibabel.load(tmp_path / "out" / f"{case_id}.nii.gz")
        np.testing.assert_array_equal(np.asarray(back.dataobj), labels)
        assert back.get_data_dtype() == np.uint8
        np.testing.assert_array_equal(back.affine, nibabel.load(original).affine)
        assert not (np.array_equal(load(done.dataset_folder / f"labelsTr/{case_id}.nii.gz"), labels)) or scheme in (
            "2024-MEN-RT",
            "MSD",
        )


class TestIdsThatEndAsChannels:
    """nnU-Net takes only the last _XXXX of an image's name for the channel."""

    IDS = ("patient_0001", "patient_0001_0000", "patient")

    def test_are_converted_predicted_and_exported(self, tmp_path: Path) -> None:
        rng = np.random.default_rng(0)
        labels = {case_id: rng.choice([0, 1, 2, 4], SHAPE).astype(np.uint8) for case_id in self.IDS}
        for number, case_id in enumerate(self.IDS):
            for channel, part in enumerate(("flair", "t1", "t1ce", "t2")):
                image = np.full(SHAPE, 100 + 10 * number + channel, np.int16)
                save(tmp_path / f"source/{case_id}/{case_id}_{part}.nii.gz", image)
            save(tmp_path / f"source/{case_id}/{case_id}_seg.nii.gz", labels[case_id])
        (tmp_path / "raw").mkdir()
        done = convert_brats([tmp_path / "source"], 501, schemes=["2018"], raw_folder=tmp_path / "raw", progress=False)
        # nnU-Net's search finds the right channels of each case ...
        found = get_filenames_of_train_images_and_targets(str(done.dataset_folder))
        assert sorted(found) == sorted(self.IDS)
        for number, case_id in enumerate(self.IDS):
            values = [int(load(Path(path)).max()) for path in found[case_id]["images"]]
            assert values == [100 + 10 * number + channel for channel in range(4)]
        # ... and names predictions by these ids.
        shutil.copytree(done.dataset_folder / "labelsTr", tmp_path / "predictions")
        shutil.copyfile(done.dataset_folder / "dataset.json", tmp_path / "predictions/dataset.json")
        exported = export_brats(
            tmp_path / "predictions",
            tmp_path / "out",
            "2018",
            reference_folder=done.dataset_folder / "imagesTr",
            progress=False,
        )
        assert sorted(exported.case_ids) == sorted(self.IDS)
        for case_id, expected in labels.items():
            np.testing.assert_array_equal(load(tmp_path / f"out/{case_id}.nii.gz"), expected)


def test_the_time_for_names_grows_with_their_number(tmp_path: Path) -> None:
    names = [tmp_path / f"Brats18_A_{number}_1.nii.gz" for number in range(40_000)]
    begin = time.process_time()
    assert not list(_name_errors(tmp_path, names, SCHEMES["2018"], ANY))
    # About a second if each name is checked once, minutes if each is compared with all others.
    assert time.process_time() - begin < 20


class TestExport:
    def test_labels_of_the_challenge(self, predictions: Path) -> None:
        done = export(predictions)
        predicted, written = (load(folder / "Brats18_A_1.nii.gz") for folder in (predictions, done.folder))
        np.testing.assert_array_equal(written, np.vectorize({0: 0, 1: 2, 2: 1, 3: 4}.get)(predicted))
        assert [path.name for path in done.folder.iterdir()] == ["Brats18_A_1.nii.gz"]

    def test_data_sets_of_nnunets_own_scripts(self, predictions: Path) -> None:
        labels = {"background": 0, "whole tumor": [1, 2, 3], "tumor core": [2, 3], "enhancing tumor": [3]}
        (predictions / "dataset.json").write_text(json.dumps({**GLIOMA, "labels": labels}))
        assert set(np.unique(load(export(predictions).folder / "Brats18_A_1.nii.gz"))) == {0, 1, 2, 4}

    @pytest.mark.parametrize(("threshold", "replaced"), [(3, False), (4, True)])
    def test_little_enhancing_tumour_becomes_necrosis(self, predictions: Path, threshold: int, replaced: bool) -> None:
        predicted = np.zeros(SHAPE, np.uint8)
        predicted[0, 0, :3] = 3
        predicted[1, 0, :3] = 1
        save(predictions / "Brats18_A_1.nii.gz", predicted)
        done = export(predictions, et_min_voxels=threshold)
        written = load(done.folder / "Brats18_A_1.nii.gz")
        assert set(written[0, 0, :3]) == ({1} if replaced else {4})
        assert set(written[1, 0, :3]) == {2}
        assert done.cleaned == ({"Brats18_A_1": 3} if replaced else {})

    def test_of_a_child_becomes_non_enhancing(self, tmp_path: Path) -> None:
        folder = tmp_path / "predictions"
        predicted = np.zeros(SHAPE, np.uint8)
        predicted[0, 0, 0], predicted[0, 0, 1] = 4, 3  # enhancing, cyst
        save(folder / "BraTS-PED-00001-000.nii.gz", predicted)
        (folder / "dataset.json").write_text(json.dumps(SCHEMES["2024-PED"].label_set.dataset_json("regions")))
        written = load(export(folder, "2024-PED", et_min_voxels=2).folder / "BraTS-PED-00001-000.nii.gz")
        assert written[0, 0, 0] == 2
        assert written[0, 0, 1] == 3

    def test_source_geometry(self, predictions: Path, tmp_path: Path) -> None:
        """Affines equal within tolerance become equal to the last bit, for BraTS's images and nnU-Net's."""
        shifted = AFFINE.copy()
        shifted[1, 3] += 2e-4
        for number, name in enumerate(("images/Brats18_A_1/Brats18_A_1_t1.nii.gz", "imagesTs/Brats18_A_1_0000.nii.gz")):
            reference = save(tmp_path / str(number) / name, np.ones(SHAPE, np.int16), shifted)
            done = export_brats(
                predictions, tmp_path / f"out{number}", "2018", reference_folder=tmp_path / str(number), progress=False
            )
            written = nibabel.load(done.folder / "Brats18_A_1.nii.gz")
            np.testing.assert_array_equal(written.affine, nibabel.load(reference).affine)

    def test_a_label_that_the_challenge_lacks_may_be_known_but_not_predicted(self, predictions: Path) -> None:
        content = SCHEMES["2024"].label_set.dataset_json("regions")
        (predictions / "dataset.json").write_text(json.dumps(content))
        export(predictions)
        (predictions.parent / "out" / "Brats18_A_1.nii.gz").unlink()
        save(predictions / "Brats18_A_2.nii.gz", np.full(SHAPE, 4, np.uint8))
        with pytest.raises(ExportError, match=r"Brats18_A_2.nii.gz has labels 4 resection_cavity \(210 voxels\)"):
            export(predictions)

    def test_what_the_data_set_lacks_is_a_warning(self, tmp_path: Path) -> None:
        folder = tmp_path / "predictions"
        save(folder / "BraTS-GLI-00001-100.nii.gz", np.zeros(SHAPE, np.uint8))
        (folder / "dataset.json").write_text(json.dumps(GLIOMA))
        (warning,) = export(folder, "2024").warnings
        assert "has no label for resection_cavity" in warning

    def test_command(self, predictions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        arguments = ["brats-export", "-i", str(predictions), "-o", str(tmp_path / "new" / "out"), "--scheme", "2018"]
        assert cli.main([*arguments, "-np", "1", "--et-min-voxels", "500"]) == 0
        output = capsys.readouterr().out
        assert "1 cases" in output
        assert "Brats18_A_1:" in output
        assert (tmp_path / "new/out/Brats18_A_1.nii.gz").is_file()


class TestErrors:
    def test_labels_of_another_data_set(self, predictions: Path) -> None:
        (predictions / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "liver": 1}}))
        (error,) = errors_of(predictions)
        assert "not those of brats-convert" in error

    def test_regions_written_in_another_order(self, predictions: Path) -> None:
        (predictions / "dataset.json").write_text(json.dumps({**GLIOMA, "regions_class_order": [1, 3, 2]}))
        (error,) = errors_of(predictions)
        assert "in the order [1, 3, 2]" in error

    def test_no_dataset_json(self, predictions: Path) -> None:
        (predictions / "dataset.json").unlink()
        (error,) = errors_of(predictions)
        assert "-djfile" in error

    def test_labels_that_are_the_challenges_already(self, predictions: Path) -> None:
        save(predictions / "Brats18_B_1.nii.gz", np.full(SHAPE, 4, np.uint8))
        (error,) = errors_of(predictions)
        assert "Brats18_B_1.nii.gz has labels 4 (210 voxels)" in error
        assert "already has the challenge's labels?" in error

    def test_names_of_another_year(self, predictions: Path) -> None:
        (error,) = errors_of(predictions, "2023")
        assert "but as those of --scheme 2018" in error

    def test_images_among_predictions(self, predictions: Path) -> None:
        save(predictions / "Brats18_B_1_0000.nii.gz", np.full(SHAPE, 300, np.int16))
        (error,) = errors_of(predictions)
        assert "Brats18_B_1_0000.nii.gz has labels 300" in error
        assert "is this an image" in error
        (predictions / "Brats18_B_1_0000.nii.gz").rename(predictions / "Brats18_B_1_flair.nii.gz")
        assert any("Brats18_B_1_flair.nii.gz: named as BraTS names images" in error for error in errors_of(predictions))

    @pytest.mark.parametrize("case_id", ["-rf", "a..b", "new\nline"])
    def test_ids_that_are_no_names(self, predictions: Path, case_id: str) -> None:
        save(predictions / f"{case_id}.nii.gz", np.zeros(SHAPE, np.uint8))
        (error,) = errors_of(predictions)
        assert f"has the case id {case_id!a}, which" in error

    def test_a_full_disk_names_the_file(self, predictions: Path) -> None:
        save(predictions / "Brats18_B_1.nii.gz", np.random.default_rng(0).integers(0, 4, (96, 96, 96), np.uint8))
        code = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (16384, 16384))
from nnunet_conres import cli
sys.exit(cli.main(sys.argv[1:]))
"""
        output = predictions.parent / "out"
        arguments = ["brats-export", "-i", str(predictions), "-o", str(output), "--scheme", "2018", "-np", "1"]
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 2, done.stderr
        assert "Traceback" not in done.stderr
        message = done.stderr.splitlines()[-1]
        assert "Brats18_B_1.nii.gz" in message
        assert "File too large" in message
        assert sorted(path.name for path in predictions.parent.iterdir()) == ["predictions"]

    def test_all_are_reported_together(self, predictions: Path, tmp_path: Path) -> None:
        moved = AFFINE.copy()
        moved[0, 3] = 3
        save(tmp_path / "images/Brats18_A_1_flair.nii.gz", np.ones(SHAPE, np.int16), moved)
        save(tmp_path / "images/Brats18_C_1_flair.nii.gz", np.ones(SHAPE, np.int16))
        (predictions / "Brats18_B_1.nii.gz").write_bytes(b"cut")
        save(predictions / "Brats18_C_1.nii.gz", np.full(SHAPE, 9, np.uint8))
        text = "\n".join(errors_of(predictions, reference_folder=tmp_path / "images", et_min_voxels=-1))
        for part in (
            "--et-min-voxels is -1",
            "Brats18_B_1: no image in",
            "Brats18_B_1.nii.gz cannot be read",
            "Brats18_A_1_flair.nii.gz do not lie on the same voxel grid: origin",
            "has labels 9",
        ):
            assert part in text

    @pytest.mark.parametrize(("arguments", "message"), [({"processes": 0}, "processes is 0"), ({}, "scheme is 1999")])
    def test_arguments(self, predictions: Path, arguments: dict[str, Any], message: str) -> None:
        assert any(message in error for error in errors_of(predictions, "2018" if arguments else "1999", **arguments))

    def test_nothing_to_export(self, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        assert any("has no NIfTI file" in error for error in errors_of(tmp_path / "empty"))
        assert any("is not a folder" in error for error in errors_of(tmp_path / "nowhere"))

    def test_output_taken(self, predictions: Path) -> None:
        (predictions.parent / "out").mkdir()
        (predictions.parent / "out" / "old.nii.gz").write_bytes(b"old")
        with pytest.raises(ExportError, match="exists already"):
            export(predictions)
        assert [path.name for path in (predictions.parent / "out").iterdir()] == ["old.nii.gz"]
