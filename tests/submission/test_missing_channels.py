"""The script that measures models on images with a missing channel."""

import importlib.util
import json
import shutil
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetNumpy
from sklearn.metrics import f1_score

SHAPE = (4, 12, 16, 16)
CASES = ("a", "b", "c")


@pytest.fixture(scope="module")
def script(repository_root: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("missing", repository_root / "scripts/study/missing_channels.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def predict(model: Path, fold: int, image: np.ndarray) -> np.ndarray:
    """Return nnU-Net's prediction for a preprocessed image."""
    predictor = nnUNetPredictor(
        use_mirroring=False, device=torch.device("cpu"), allow_tqdm=False, perform_everything_on_device=False
    )
    predictor.initialize_from_trained_model_folder(str(model), (fold,))
    logits = predictor.predict_sliding_window_return_logits(torch.from_numpy(image))
    manager = predictor.plans_manager.get_label_manager(predictor.dataset_json)
    return np.asarray(manager.convert_logits_to_segmentation(logits))


@pytest.fixture
def models(shared_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Make two models, and cases labelled with the first one's predictions. Case c lacks the third channel."""
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "preprocessed"))
    first = tmp_path / "results" / shared_model.parent.name / shared_model.name
    shutil.copytree(shared_model, first)
    second = first.with_name("nnUNetTrainerMuon_ChannelDropout__nnUNetPlans__3d_fullres")
    shutil.copytree(first, second)
    shutil.copyfile(first / "fold_1/checkpoint_final.pth", second / "fold_0/checkpoint_final.pth")
    data_set = tmp_path / "preprocessed" / first.parent.name
    folder = data_set / "nnUNetPlans_3d_fullres"
    folder.mkdir(parents=True)
    (data_set / "splits_final.json").write_text(json.dumps([{"train": ["a"], "val": ["b", "c"]}, {"val": ["a"]}]))
    for number, case in enumerate(CASES):
        image = np.random.default_rng(number).normal(0, 1, SHAPE).astype(np.float32)
        if case == "c":
            image[2] = 0
        truth = predict(first, 1 if case == "a" else 0, image)[None].astype(np.int8)
        nnUNetDatasetNumpy.save_case(image, truth, {}, str(folder / case))
    return first, second


def test_table(
    script: ModuleType, models: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script.main(["-m", *map(str, models), "-f", "0", "1", "-device", "cpu"])
    head, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert head == [
        "Dice, 3 cases",
        "nnUNetTrainerMuon",
        "nnUNetTrainerMuon_ChannelDropout",
        "difference (95 %)",
    ]
    names = ["all channels", "without FLAIR", "without T1", "without T1ce", "without T2"]
    assert [row[0] for row in rows] == names
    # each fold predicts its held-out cases, and the labels are the first model's predictions
    assert rows[0][1] == "1.000"

    folder = tmp_path / "preprocessed" / models[0].parent.name / "nnUNetPlans_3d_fullres"
    labels = json.loads((models[0] / "dataset.json").read_text())["labels"]
    regions = [tuple(np.atleast_1d(values)) for name, values in labels.items() if name != "background"]
    expected = np.zeros((2, 5, 3))
    for where, case in enumerate(CASES):
        stored = np.load(folder / f"{case}.npz")
        for which, model in enumerate(models):
            for number in range(5):
                image = stored["data"].copy()
                if number:
                    image[number - 1] = 0
                found = predict(model, 1 if case == "a" else 0, image)
                truth = stored["seg"][0]
                pairs = [(np.isin(truth, region).ravel(), np.isin(found, region).ravel()) for region in regions]
                expected[which, number, where] = np.mean([f1_score(*pair, zero_division=1.0) for pair in pairs])
    assert expected[0, 3, 2] == 1  # case c lacks this channel anyway
    assert expected[0, 3, :2].max() < 1
    for number, row in enumerate(rows):
        one, other = expected[:, number].mean(1)
        assert row[1:3] == [f"{one:.3f}", f"{other:.3f}"]
        difference, low, high = (
            float(text) for text in row[3].replace("(", "").replace(")", "").replace("to", "").split()
        )
        assert difference == pytest.approx(other - one, abs=6e-4)
        assert low <= difference <= high


def test_refusals(script: ModuleType, models: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = models

    def error(*arguments: object) -> str:
        with pytest.raises(SystemExit) as caught:
            script.main(["-device", "cpu", "-m", *map(str, arguments)])
        return str(caught.value)

    assert "fold_4/checkpoint_final.pth does not exist" in error(first)
    assert "named twice" in error(first, first, "-f", 0)
    for fold in (0, 2):
        shutil.copytree(first / "fold_0", second / f"fold_{fold}", dirs_exist_ok=True)
    assert "splits_final.json lacks fold 2" in error(second, "-f", 0, 2)
    dataset = json.loads((second / "dataset.json").read_text())
    (second / "dataset.json").write_text(json.dumps(dataset | {"channel_names": {"0": "CT"}}))
    assert "or other channels than" in error(first, second, "-f", 0)
    assert "has one channel only" in error(second, "-f", 0)
    monkeypatch.delenv("nnUNet_preprocessed")
    assert "nnUNet_preprocessed is not set" in error(first, "-f", 0)
