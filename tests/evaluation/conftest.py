"""Synthetic trained models in nnU-Net's folders, without any training: logs, label maps and probabilities."""

import json
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813  (as everybody calls it)
import torch

from tests.small_networks import plain_unet

NAME = "Dataset801_Models"
SHAPE = (10, 14, 12)
SPACING = (1.0, 1.0, 2.5)  # x, y, z
LABELS = {
    "labels": {"background": 0, "oedema": 1, "core": 2},
    "regions": {"background": 0, "whole": [1, 2], "core": 2},
}


def reference(case: int) -> np.ndarray:
    """Return a label map of two concentric balls, whose position depends on the case."""
    grid = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), -1)
    distance = np.linalg.norm(grid - np.array(SHAPE) / 2 - case % 3 + 1, axis=-1)
    return ((distance < 4).astype(np.uint8) + (distance < 2)).astype(np.uint8)


def write_labels(path: Path, labels: np.ndarray) -> None:
    image = sitk.GetImageFromArray(labels.astype(np.uint8))
    image.SetSpacing(SPACING)
    sitk.WriteImage(image, str(path))


@dataclass
class Lab:
    """The folders of an nnU-Net user; ``add`` adds a trained model."""

    root: Path
    kind: str = "labels"
    cases: tuple[str, ...] = tuple(f"case_{number}" for number in range(8))
    added: list[Path] = field(default_factory=list)

    @property
    def dataset_json(self) -> dict[str, Any]:
        content: dict[str, Any] = {
            "name": NAME,
            "channel_names": {"0": "FLAIR"},
            "labels": LABELS[self.kind],
            "numTraining": len(self.cases),
            "file_ending": ".nii.gz",
        }
        return content | ({"regions_class_order": [1, 2]} if self.kind == "regions" else {})

    def write_raw(self) -> None:
        raw = self.root / "raw" / NAME
        for folder in ("imagesTr", "labelsTr"):
            (raw / folder).mkdir(parents=True)
        rng = np.random.default_rng(0)
        for number, case in enumerate(self.cases):
            labels = reference(number)
            write_labels(raw / "labelsTr" / f"{case}.nii.gz", labels)
            image = sitk.GetImageFromArray((100 * labels + rng.normal(50, 5, SHAPE)).astype(np.float32))
            image.SetSpacing(SPACING)
            sitk.WriteImage(image, str(raw / "imagesTr" / f"{case}_0000.nii.gz"))
        (raw / "dataset.json").write_text(json.dumps(self.dataset_json))
        planned = self.root / "preprocessed" / NAME
        planned.mkdir()
        (planned / "nnUNetPlans.json").write_text(json.dumps(self.plans))

    def probabilities(self, case: str, blur: float, seed: int) -> np.ndarray:
        """Return the probabilities of a synthetic model: the truth plus uniform noise of amplitude `blur`."""
        rng = np.random.default_rng([seed, self.cases.index(case)])
        labels = reference(self.cases.index(case))
        channels = [labels == 0, labels == 1, labels == 2] if self.kind == "labels" else [labels > 0, labels == 2]
        noisy = np.stack(channels) * 0.5 + 0.25 + rng.uniform(-blur, blur, (len(channels), *SHAPE))
        if self.kind == "labels":
            noisy = np.exp(noisy) / np.exp(noisy).sum(0)
        return np.clip(noisy, 0, 1).astype(np.float32)

    def labels_of(self, probabilities: np.ndarray) -> np.ndarray:
        """Return the most probable labels, or the regions painted in their order, by hand."""
        if self.kind == "labels":
            return probabilities.argmax(0).astype(np.uint8)
        labels = (probabilities[0] > 0.5).astype(np.uint8)
        labels[probabilities[1] > 0.5] = 2
        return labels

    def write_predictions(
        self, folder: Path, cases: Sequence[str], blur: float, seed: int, *, npz: bool = True
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for case in cases:
            probabilities = self.probabilities(case, blur, seed)
            write_labels(folder / f"{case}.nii.gz", self.labels_of(probabilities))
            if npz:
                np.savez_compressed(folder / f"{case}.npz", probabilities=probabilities)
                properties = {
                    "sitk_stuff": {
                        "spacing": SPACING,
                        "origin": (0.0, 0.0, 0.0),
                        "direction": (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0),
                    },
                    "spacing": list(SPACING[::-1]),
                }
                (folder / f"{case}.pkl").write_bytes(pickle.dumps(properties))

    def write_summary(self, folder: Path, cases: Sequence[str]) -> None:
        """Write the part of summary.json that a comparison needs; nnU-Net's validation writes this file last."""
        content = {"metric_per_case": [{"prediction_file": str(folder / f"{case}.nii.gz")} for case in cases]}
        (folder / "summary.json").write_text(json.dumps(content))

    @property
    def plans(self) -> dict[str, Any]:
        return {
            "dataset_name": NAME,
            "plans_name": "nnUNetPlans",
            "image_reader_writer": "SimpleITKIO",
            "label_manager": "LabelManager",
            "transpose_forward": [0, 1, 2],
            "transpose_backward": [0, 1, 2],
            "configurations": {
                "3d_fullres": {
                    "data_identifier": "nnUNetPlans_3d_fullres",
                    "batch_size": 2,
                    "patch_size": [8, 12, 8],
                    "spacing": [2.5, 1.0, 1.0],
                    "architecture": plain_unet(),
                }
            },
        }

    def add(
        self,
        trainer: str = "nnUNetTrainer",
        *,
        folds: Sequence[int] = (0,),
        blur: float = 0.3,
        seed: int = 1,
        npz: bool = True,
        cases: Sequence[str] | None = None,
        device: str = "cpu",
        epochs: int = 3,
        precision: str | None = None,
    ) -> Path:
        model = self.root / "results" / NAME / f"{trainer}__nnUNetPlans__3d_fullres"
        model.mkdir(parents=True, exist_ok=True)
        (model / "dataset.json").write_text(json.dumps(self.dataset_json))
        (model / "plans.json").write_text(json.dumps(self.plans))
        held_out = list(self.cases if cases is None else cases)
        for number, fold in enumerate(folds):
            folder = model / f"fold_{fold}"
            self.write_predictions(folder / "validation", held_out[number :: len(folds)], blur, seed, npz=npz)
            self.write_summary(folder / "validation", held_out[number :: len(folds)])
            logging = {
                "train_losses": [-0.1 * epoch for epoch in range(epochs)],
                "val_losses": [-0.2 * epoch for epoch in range(epochs)],
                "dice_per_class_or_region": [[np.float32(0.5), np.float32(0.25)]] * epochs,
                "lrs": [0.01] * epochs,
                "epoch_start_timestamps": [100.0 * epoch for epoch in range(epochs)],
                "epoch_end_timestamps": [100.0 * epoch + 10 + epoch for epoch in range(epochs)],
            }
            torch.save({"logging": logging}, folder / "checkpoint_final.pth")
            debug = {"device": device} | ({"training_precision": precision} if precision else {})
            (folder / "debug.json").write_text(json.dumps(debug))
            (folder / "training_log_2026_1_1_10_00_00.txt").write_text(
                "2026-01-01 10:00:00.000000: Epoch 0 \n"
                "2026-01-01 10:10:00.000000: predicting case_0 \n"
                "2026-01-01 10:10:00.100000: case_0, shape torch.Size([1, 10, 14, 12]), rank 0 \n"
                "2026-01-01 10:10:02.000000: predicting case_1 \n"
                "2026-01-01 10:10:02.100000: case_1, shape torch.Size([1, 10, 14, 12]), rank 0 \n"
                "2026-01-01 10:10:05.000000: Validation complete \n"
            )
        self.added.append(model)
        return model


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Lab]:
    """Return a function that creates the folders, with raw data and no model."""

    def make(kind: str = "labels") -> Lab:
        for name in ("raw", "preprocessed", "results"):
            (tmp_path / name).mkdir()
            monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
        made = Lab(tmp_path, kind)
        made.write_raw()
        return made

    return make
