"""nnU-Net's commands as a user types them, from training to prediction on another machine."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
import torch

from nnunet_conres.trainers.precision import training_precision

# A trainer with two steps instead of 250 in a user's folder, where nnU-Net must find it.
USER_TRAINER = """
from nnunet_conres.trainers import BASE


class BASE_TwoSteps(BASE):
    training_epochs = 1

    def initialize(self):
        super().initialize()
        self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 2, 1
"""


def run(command: str, *arguments: str, check: bool = True, **environment: str) -> str:
    """Run a command of this environment and return its output."""
    script = Path(sys.executable).parent / command
    result = subprocess.run(
        [sys.executable, str(script), *arguments],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert (result.returncode == 0) == check, result.stdout[-4000:]
    return result.stdout


@pytest.mark.parametrize(
    "base",
    [
        "nnUNetTrainerConResNet",
        pytest.param("nnUNetTrainerVNet", marks=pytest.mark.slow),
        pytest.param("nnUNetTrainerUNet3D", marks=pytest.mark.slow),
    ],
)
def test_train_predict_find_best_and_move_elsewhere(
    preprocessed: Callable[[str], Path], results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: str
) -> None:
    folder = tmp_path / "my trainers"
    folder.mkdir()
    (folder / "two_steps.py").write_text(USER_TRAINER.replace("BASE", base))
    monkeypatch.setenv("nnUNet_extTrainer", str(folder))
    name = f"{base}_TwoSteps"
    dataset = preprocessed("regions").name
    images = Path(os.environ["nnUNet_raw"]) / dataset / "imagesTr"
    one_case = tmp_path / "images"
    one_case.mkdir()
    for file in images.glob("case_0_*"):
        shutil.copy(file, one_case)
    trainer = ["-tr", name]
    few_processes = ["-npp", "1", "-nps", "1", "-device", "cpu"]

    run("nnUNetv2_train", dataset, "3d_fullres", "0", *trainer, "-device", "cpu", "--npz")
    model = results / dataset / f"{name}__nnUNetPlans__3d_fullres"
    assert (model / "fold_0" / "validation" / "summary.json").is_file()

    here, there, moved = tmp_path / "here", tmp_path / "there", tmp_path / "elsewhere"
    arguments = ["-i", str(one_case), "-d", dataset, "-c", "3d_fullres", "-f", "0", *trainer]
    in_one_process = ["-npp", "0", "-nps", "0", "-device", "cpu"]
    run("nnUNetv2_predict", *arguments, *in_one_process, "-o", str(here), "--save_probabilities")
    prediction = sitk.ReadImage(here / "case_0.nii.gz")
    source = sitk.ReadImage(next(one_case.iterdir()))
    assert prediction.GetSize() == source.GetSize()
    assert prediction.GetSpacing() == source.GetSpacing()
    assert set(np.unique(sitk.GetArrayFromImage(prediction))) <= {0, 1, 2, 3}

    run("nnUNetv2_find_best_configuration", dataset, "-c", "3d_fullres", *trainer, "-f", "0", "-np", "1")
    best = json.loads((results / dataset / "inference_information.json").read_text())
    assert name in json.dumps(best["best_model_or_ensemble"])

    run("nnunet-conres", "compare", "-d", dataset, *trainer, "-f", "0", "-np", "1", "-o", str(tmp_path / "report"))
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    cost = report["models"][0]["cost"]
    assert cost["device"] == "cpu"
    assert cost["precision"] == training_precision(torch.device("cpu"))
    assert None not in (cost["parameters"], cost["epoch_seconds"], cost["prediction_seconds_per_case"])
    expected = json.loads((model / "fold_0" / "validation" / "summary.json").read_text())["foreground_mean"]["Dice"]
    assert report["summary"]["m0"]["mean"]["dice"]["mean"] == pytest.approx(expected)

    archive = tmp_path / "model.zip"
    run("nnUNetv2_export_model_to_zip", "-d", dataset, "-c", "3d_fullres", "-f", "0", *trainer, "-o", str(archive))
    run("nnUNetv2_install_pretrained_model_from_zip", str(archive), nnUNet_results=str(moved))
    run(
        "nnUNetv2_predict_from_modelfolder",
        *("-i", str(one_case), "-o", str(there), "-m", str(moved / dataset / model.name), "-f", "0"),
        *few_processes,
        "--save_probabilities",
        nnUNet_results=str(moved),
    )
    probabilities = [np.load(folder / "case_0.npz")["probabilities"] for folder in (here, there)]
    np.testing.assert_array_equal(*probabilities)


def test_our_trainers_are_found_and_refuse_in_one_line(preprocessed: Callable[[str], Path], results: Path) -> None:
    """nnU-Net finds the package's trainers without set-up. The 2D configuration is refused before any work."""
    dataset = preprocessed("labels").name
    output = run(
        *("nnUNetv2_train", dataset, "2d", "0", "-tr", "nnUNetTrainerConResNetPaper", "-device", "cpu"), check=False
    )
    assert "Traceback" not in output
    assert output.strip().splitlines()[-1].startswith("nnunet-conres: error: ConResNetPaper supports 3D")
    assert not results.exists()
