"""The command in the container, from the challenge's folders to its label maps, against nnU-Net's predictor."""

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
import torch
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from nnunet_conres import cli
from nnunet_conres.errors import InputError
from nnunet_conres.submission.predict import RECORD, Predictions, predict_brats

# Labels of metastases 2025, indexed by nnU-Net's labels: background, oedema, necrosis, enhancing, cavity.
TO_CHALLENGE = np.array([0, 2, 1, 3, 4], np.uint8)
PARTS = ("t2f", "t1n", "t1c", "t2w")
ATLAS, NATIVE = "BraTS-MET-00001-000", "BraTS-MET-01000-001"

NO_NETWORK = """
import socket

def refuse(self, address):
    raise OSError(f"the network is off: {address}")

socket.socket.connect = socket.socket.connect_ex = refuse
"""


def predict(source: Path, model: Path, **arguments: Any) -> Predictions:
    output = arguments.pop("output", source.parent / "output")
    return predict_brats(source, output, model, device="cpu", progress=False, **arguments)


def nnunets(model: Path, folder: Path, parts: tuple[str, ...] = PARTS) -> np.ndarray:
    """Return nnU-Net's prediction of a case, (x, y, z)."""
    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(model), None)
    images, properties = SimpleITKIO().read_images([str(folder / f"{folder.name}-{part}.nii.gz") for part in parts])
    return predictor.predict_single_npy_array(images, properties).transpose(2, 1, 0)


def labels_of(path: Path) -> np.ndarray:
    return np.asarray(nibabel.load(path).dataobj)


@pytest.fixture
def source(tmp_path: Path, write_case: Callable[..., Path]) -> Path:
    """Write two cases, one on an atlas grid and one on a scanner grid."""
    write_case(tmp_path / "input" / ATLAS, "atlas", seed=1)
    write_case(tmp_path / "input" / NATIVE, "native", seed=2)
    return tmp_path / "input"


def run_without_network(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a separate process, without any network if the system allows it, otherwise without sockets."""
    guard = tmp_path / "guard"
    guard.mkdir()
    (guard / "sitecustomize.py").write_text(NO_NETWORK)
    command = [sys.executable, "-m", "nnunet_conres.cli", *arguments]
    isolated = ["unshare", "--user", "--map-root-user", "--net"]
    if shutil.which("unshare") and subprocess.run([*isolated, "true"], capture_output=True).returncode == 0:
        command = [*isolated, *command]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("nnUNet_")}
    root = str(Path(__file__).resolve().parents[2])
    return subprocess.run(
        command,
        env=environment | {"PYTHONPATH": os.pathsep.join([str(guard), root]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=600,
    )


def test_as_a_process_without_network(
    source: Path, shared_model: Path, tmp_path: Path, write_case: Callable[..., Path]
) -> None:
    """Complete cases are written as nnU-Net predicts them. Each of the others is reported with its error."""
    truncated, doubled, elsewhere, empty = (f"BraTS-MET-0200{number}-000" for number in range(4))
    for seed, name in enumerate((truncated, doubled, elsewhere), start=3):
        write_case(source / name, seed=seed)
    image = source / truncated / f"{truncated}-t1c.nii.gz"
    image.write_bytes(image.read_bytes()[:-2000])
    shutil.copy(source / doubled / f"{doubled}-t1n.nii.gz", source / doubled / f"{doubled}-t1n.nii")
    write_case(source / elsewhere, "native", parts=("t2w",))
    (source / empty).mkdir()
    (source / ATLAS / "notes.nii.gz").write_bytes(b"")
    before = {path: path.read_bytes() for path in source.rglob("*") if path.is_file()}
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / f"{truncated}.nii.gz").write_bytes(b"of an earlier run")

    run = run_without_network(
        tmp_path, *("predict-brats", "-i", "input", "-o", "output", "-m", str(shared_model), "-device", "cpu")
    )
    assert run.returncode == 1, run.stderr
    assert run.stdout == "output: 2 cases, 4 failed\n"
    assert {path: path.read_bytes() for path in source.rglob("*") if path.is_file()} == before
    names = {f"{ATLAS}.nii.gz", f"{NATIVE}.nii.gz"}
    assert {path.name for path in (tmp_path / "output").iterdir()} == {*names, RECORD}
    for case in (ATLAS, NATIVE):
        written = nibabel.load(tmp_path / "output" / f"{case}.nii.gz")
        expected = TO_CHALLENGE[nnunets(shared_model, source / case)]
        assert len(np.unique(expected)) > 2
        np.testing.assert_array_equal(np.asarray(written.dataobj), expected)
        assert written.get_data_dtype() == np.uint8
        np.testing.assert_array_equal(written.affine, nibabel.load(source / case / f"{case}-t1c.nii.gz").affine)

    record = json.loads((tmp_path / "output" / RECORD).read_text())
    assert record["scheme"] == "2025-MET"
    assert record["model"]["folds"] == 2
    assert {one["file"] for one in record["written"].values()} == names
    failed = record["failed"]
    assert set(failed) == {truncated, doubled, elsewhere, empty}
    assert f"{truncated}-t1c.nii.gz cannot be read: it is cut short" in failed[truncated][0]
    assert f"{doubled} has 2 files for t1n" in failed[doubled][0]
    assert "do not lie on the same voxel grid: size 20 x 17 x 9, expected 24 x 24 x 16" in failed[elsewhere][0]
    assert f"{empty} has no image" in failed[empty][0]
    assert "notes.nii.gz fits no naming scheme" in record["warnings"][0]
    for name, messages in failed.items():
        assert f"{name} failed: {messages[0]}" in run.stderr


def test_the_folder_names_the_case(
    tmp_path: Path, make_model: Callable[..., Path], write_case: Callable[..., Path]
) -> None:
    """The folders of GoAT's hidden cases had three more digits than the ids of the training cases."""
    model = make_model(tmp_path / "model", scheme="2024-GoAT", folds=1)
    write_case(tmp_path / "input/BraTS-GoAT-00001-000", case_id="BraTS-GoAT-00001")
    write_case(tmp_path / "input/odd", case_id="BraTS-GoAT-00002")
    another = write_case(tmp_path / "input/BraTS-GoAT-00009", case_id="BraTS-GoAT-00003")
    done = predict(tmp_path / "input", model, scheme="2026-GoAT")
    assert done.failed == {}
    assert done.warnings == [f"{another} has the images of BraTS-GoAT-00003; predicted as BraTS-GoAT-00009."]
    names = {"BraTS-GoAT-00001-000", "BraTS-GoAT-00002", "BraTS-GoAT-00009"}
    assert set(done.written) == names
    assert {path.name for path in (tmp_path / "output").glob("*.nii.gz")} == {f"{name}.nii.gz" for name in names}


def test_labels_in_a_folder_for_validation_do_not_matter(
    tmp_path: Path, shared_model: Path, write_case: Callable[..., Path]
) -> None:
    """brats-convert refuses such labels by default, because they would be trained on. Prediction ignores them."""
    folder = write_case(tmp_path / "input" / "validation" / ATLAS)
    shutil.copy(folder / f"{ATLAS}-t1c.nii.gz", folder / f"{ATLAS}-seg.nii.gz")
    done = predict(tmp_path / "input", shared_model, folds=[0])
    assert (list(done.written), done.failed) == ([ATLAS], {})


def test_a_folder_that_cannot_be_read_fails_its_case(
    source: Path, shared_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scandir = os.scandir

    def denied(path: Any) -> Any:
        if str(path) == str(source / ATLAS):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    done = predict(source, shared_model, folds=[0])
    assert list(done.written) == [NATIVE]
    assert done.failed[ATLAS] == (f"{source / ATLAS} cannot be read (Permission denied); make it readable.",)


def test_where_every_case_fails_the_record_says_so(source: Path, shared_model: Path, tmp_path: Path) -> None:
    shutil.rmtree(source / NATIVE)
    image = source / ATLAS / f"{ATLAS}-t1c.nii.gz"
    shutil.copy(image, image.with_suffix(""))
    command = ["predict-brats", "-i", str(source), "-o", str(tmp_path / "output"), "-m", str(shared_model)]
    assert cli.main([*command, "-device", "cpu"]) == 1
    record = json.loads((tmp_path / "output" / RECORD).read_text())
    assert record["written"] == {}
    assert f"{ATLAS} has 2 files for t1c" in record["failed"][ATLAS][0]


class TestAbsentModalities:
    @pytest.fixture
    def incomplete(self, tmp_path: Path, write_case: Callable[..., Path]) -> Path:
        write_case(tmp_path / "input" / ATLAS, parts=PARTS[:3], seed=1)
        return tmp_path / "input"

    def test_fail_by_default(self, incomplete: Path, shared_model: Path) -> None:
        done = predict(incomplete, shared_model)
        assert done.written == {}
        assert f"{incomplete / ATLAS} lacks T2; training cases of this model lacked none." in done.failed[ATLAS][0]

    def test_are_zero_images_where_training_cases_lacked_them(
        self, incomplete: Path, make_model: Callable[..., Path], tmp_path: Path
    ) -> None:
        model = make_model(tmp_path / "model", missing_channels=["T2"])
        done = predict(incomplete, model)
        assert done.missing == {ATLAS: ("T2",)}
        written = labels_of(tmp_path / "output" / f"{ATLAS}.nii.gz")
        zero = incomplete / ATLAS / f"{ATLAS}-t2w.nii.gz"
        like = nibabel.load(incomplete / ATLAS / f"{ATLAS}-t2f.nii.gz")
        nibabel.save(nibabel.Nifti1Image(np.zeros(like.shape, np.uint8), like.affine), zero)
        np.testing.assert_array_equal(written, TO_CHALLENGE[nnunets(model, incomplete / ATLAS)])
        zero.unlink()
        (incomplete / ATLAS / f"{ATLAS}-t1c.nii.gz").unlink()
        assert (
            "lacks T1ce and T2; training cases of this model lacked T2." in predict(incomplete, model).failed[ATLAS][0]
        )
        assert list(predict(incomplete, model, missing="zero").written) == [ATLAS]

    def test_may_be_refused(self, incomplete: Path, make_model: Callable[..., Path], tmp_path: Path) -> None:
        model = make_model(tmp_path / "model", folds=1, missing_channels=["T2"])
        assert list(predict(incomplete, model, missing="refuse").failed) == [ATLAS]


class TestRefusals:
    """All errors are reported together before any prediction, and nothing is written."""

    @staticmethod
    def errors(source: Path, model: Path, **arguments: Any) -> str:
        with pytest.raises(InputError) as caught:
            predict(source, model, **arguments)
        assert not (source.parent / "output").exists()
        return "\n".join(caught.value.errors)

    def test_a_model_of_other_channels_and_no_case(
        self, tmp_path: Path, make_model: Callable[..., Path], source: Path
    ) -> None:
        model = make_model(tmp_path / "model", scheme="2024-MEN-RT", folds=1)
        errors = self.errors(source, model, scheme="2026-MET", folds=[0, 3])
        assert f"{model / 'fold_3/checkpoint_final.pth'} does not exist" in errors
        assert f"{model / 'dataset.json'}: the model was trained with the channels T1ce; cases of BraTS 2025" in errors
        assert "the --scheme is one of 2024-MEN-RT" in errors
        assert "brats-convert --scheme 2025-MET" in errors
        assert "2024-MEN-RT" in self.errors(source, model)  # the model's own scheme, which the cases do not follow

    def test_a_model_of_other_tissues(self, tmp_path: Path, make_model: Callable[..., Path], source: Path) -> None:
        model = make_model(tmp_path / "model", scheme="2024-PED", folds=1)
        errors = self.errors(source, model, scheme="2026-MET")
        assert "the tissues oedema, nonenhancing, cyst, enhancing; BraTS 2025 and 2026, metastases" in errors

    def test_labels_of_no_challenge(self, tmp_path: Path, make_model: Callable[..., Path], source: Path) -> None:
        model = make_model(tmp_path / "model", folds=1, labels={"background": 0, "liver": 1}, regions_class_order=None)
        assert "not those of brats-convert" in self.errors(source, model)

    def test_the_archive_of_another_year(self, source: Path, shared_model: Path) -> None:
        archive = source.parent / "ASNR-MICCAI-BraTS2023-MET-Challenge-TrainingData"
        source.rename(archive)
        assert "which is an archive of BraTS 2023" in self.errors(archive, shared_model)

    def test_postprocessing_of_other_labels(
        self, source: Path, make_model: Callable[..., Path], postprocessing_file: Path, tmp_path: Path
    ) -> None:
        model = make_model(tmp_path / "model", scheme="2023-MET", folds=1)
        assert "was fitted to the labels" in self.errors(source, model, postprocessing=postprocessing_file)

    def test_folders(self, source: Path, shared_model: Path, tmp_path: Path) -> None:
        assert "lies in the input folder" in self.errors(source, shared_model, output=source / "predictions")
        assert "is not a folder" in self.errors(tmp_path / "none", tmp_path / "neither")
        (tmp_path / "empty").mkdir()
        assert "No BraTS case found" in self.errors(tmp_path / "empty", shared_model)

    def test_code_in_a_checkpoint(self, source: Path, make_model: Callable[..., Path], tmp_path: Path) -> None:
        model = make_model(tmp_path / "model", folds=1)
        torch.save({"network_weights": Path("x")}, model / "fold_0/checkpoint_final.pth")
        assert "so it was not loaded" in self.errors(source, model)

    def test_exit_code(self, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        command = ["predict-brats", "-i", str(source), "-o", str(tmp_path / "output"), "-m", str(tmp_path / "none")]
        assert cli.main([*command, "-device", "cpu"]) == 2
        assert "is not a trained model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("trained", "scheme", "warning"),
    [
        ("2025-MET", "2023-MET", "the model predicts resection_cavity, for which BraTS 2023 and 2024, metastases"),
        ("2023-MET", "2025-MET", "the model does not predict resection_cavity, which BraTS 2025 and 2026, metastases"),
    ],
)
def test_tissues_that_model_or_challenge_lacks(
    tmp_path: Path, make_model: Callable[..., Path], source: Path, trained: str, scheme: str, warning: str
) -> None:
    done = predict(source, make_model(tmp_path / "model", scheme=trained, folds=1), scheme=scheme)
    assert warning in done.warnings[0]


def test_postprocessing(source: Path, shared_model: Path, postprocessing_file: Path, tmp_path: Path) -> None:
    """Compare with nnU-Net's probabilities, from which the test writes one region over the other."""
    done = predict(source, shared_model, postprocessing=postprocessing_file)
    assert done.failed == {}
    assert json.loads((tmp_path / "output" / RECORD).read_text())["postprocessing"] == "rules.json"
    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(shared_model), None)
    for case in (ATLAS, NATIVE):
        files = [str(source / case / f"{case}-{part}.nii.gz") for part in PARTS]
        _, probabilities = predictor.predict_single_npy_array(
            *SimpleITKIO().read_images(files), save_or_return_probabilities=True
        )
        whole, core, enhancing, cavity = (np.asarray(one).transpose(2, 1, 0) for one in probabilities)
        expected = np.zeros(whole.shape, np.uint8)
        expected[whole > 0.5] = 2  # oedema
        expected[core > 0.6] = 1
        assert (enhancing > 0.5).any()  # below the smallest volume, so it becomes tumour core, like its surroundings
        expected[enhancing > 0.5] = 1
        expected[cavity > 0.5] = 4
        np.testing.assert_array_equal(labels_of(tmp_path / "output" / f"{case}.nii.gz"), expected)


def test_a_failing_prediction_does_not_stop_the_others(
    source: Path, shared_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For example, one image may not fit into the device's memory."""
    whole = nnUNetPredictor.predict_logits_from_preprocessed_data
    calls = []

    def first_fails(self: nnUNetPredictor, data: torch.Tensor) -> torch.Tensor:
        calls.append(data)
        if len(calls) == 1:
            raise RuntimeError("CUDA out of memory")
        return whole(self, data)

    monkeypatch.setattr(nnUNetPredictor, "predict_logits_from_preprocessed_data", first_fails)
    done = predict(source, shared_model, folds=[0])
    assert list(done.written) == [NATIVE]
    assert done.failed[ATLAS] == (f"{source / ATLAS}: RuntimeError: CUDA out of memory.",)


def test_nan_is_no_background(source: Path, make_model: Callable[..., Path], tmp_path: Path) -> None:
    """nnU-Net returns an empty label map if the network computes NaN."""
    model = make_model(tmp_path / "model", folds=1)
    path = model / "fold_0" / "checkpoint_final.pth"
    checkpoint = torch.load(path, weights_only=False)
    next(iter(checkpoint["network_weights"].values()))[0] = torch.nan
    torch.save(checkpoint, path)
    assert not nnunets(model, source / ATLAS).any()
    done = predict(source, model)
    assert done.written == {}
    assert {name: "the model predicts NaN" in message for name, (message,) in done.failed.items()} == {
        ATLAS: True,
        NATIVE: True,
    }
