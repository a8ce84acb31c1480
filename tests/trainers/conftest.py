"""A tiny data set, planned and preprocessed by nnU-Net, with labels or regions, and without or with an ignore label."""

import json
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
import torch

SHAPE = (16, 20, 24)
N_CASES = 6
LABELS = {
    "labels": {"background": 0, "oedema": 1, "necrosis": 2, "enhancing": 3},
    "regions": {"background": 0, "whole tumor": [1, 2, 3], "tumor core": [2, 3], "enhancing tumor": 3},
    "ignore": {"background": 0, "oedema": 1, "necrosis": 2, "ignore": 3},
    "ignored_regions": {"background": 0, "whole tumor": [1, 2], "tumor core": 2, "ignore": 3},
}
DATASETS = {kind: f"Dataset{900 + number}_{kind}" for number, kind in enumerate(LABELS)}


def _case(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return two image channels and nested ellipsoids of labels 1, 2, 3."""
    rng = np.random.default_rng(seed)
    centre = np.array(SHAPE) / 2 + rng.uniform(-1, 1, 3)
    grid = np.stack(np.meshgrid(*[np.arange(s) for s in SHAPE], indexing="ij"), -1)
    distance = np.sqrt((((grid - centre) / (5, 6, 7)) ** 2).sum(-1))
    labels = (distance < 1).astype(np.uint8) + (distance < 0.7) + (distance < 0.4)
    images = np.stack([labels + rng.normal(0, 0.3, SHAPE), -1.0 * labels + rng.normal(0, 0.3, SHAPE)]) + 5
    return images.astype(np.float32), labels.astype(np.uint8)


def _write_raw(folder: Path, kind: str) -> None:
    for sub in ("imagesTr", "labelsTr"):
        (folder / sub).mkdir(parents=True)
    for number in range(N_CASES):
        images, labels = _case(number)
        for channel, image in enumerate(images):
            sitk.WriteImage(sitk.GetImageFromArray(image), folder / "imagesTr" / f"case_{number}_{channel:04d}.nii.gz")
        sitk.WriteImage(sitk.GetImageFromArray(labels), folder / "labelsTr" / f"case_{number}.nii.gz")
    dataset: dict[str, Any] = {
        "channel_names": {"0": "T1", "1": "T2"},
        "labels": LABELS[kind],
        "numTraining": N_CASES,
        "file_ending": ".nii.gz",
    }
    if "regions" in kind:
        dataset["regions_class_order"] = [1, 2, 3] if kind == "regions" else [1, 2]
    (folder / "dataset.json").write_text(json.dumps(dataset))


@pytest.fixture(scope="session")
def _folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Set nnU-Net's folders for the session, and keep it from starting many processes."""
    root = tmp_path_factory.mktemp("nnunet")
    settings = {f"nnUNet_{name}": str(root / name) for name in ("raw", "preprocessed", "results")}
    settings |= {"nnUNet_def_n_proc": "1", "nnUNet_n_proc_DA": "0"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
            if "proc" not in name:
                Path(value).mkdir()
        yield root


@pytest.fixture(scope="session")
def preprocessed(
    _folders: Path, shared_folder: Callable[..., Path], keep_nnunet_small: Callable[[pytest.MonkeyPatch], None]
) -> Callable[[str], Path]:
    """Function that returns the preprocessed folder of a kind of the data set, which is made at first use."""
    from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprints, plan_experiments, preprocess

    def write(kind: str, root: Path) -> None:
        name = DATASETS[kind]
        number = int(name[7:10])
        _write_raw(root / "raw" / name, kind)
        with pytest.MonkeyPatch.context() as patch:
            keep_nnunet_small(patch)
            for variable in ("raw", "preprocessed"):
                patch.setenv(f"nnUNet_{variable}", str(root / variable))
            # nnU-Net's planner passes this to torch as the number of threads, which must not be 0
            patch.setenv("nnUNet_n_proc_DA", "1")
            extract_fingerprints([number], num_processes=1, check_dataset_integrity=True)
            plan_experiments([number])
            _shrink_plans(root / "preprocessed" / name / "nnUNetPlans.json")
            preprocess([number], configurations=["3d_fullres", "3d_lowres"], num_processes=[1, 1])

    def make(kind: str) -> Path:
        folder = _folders / "preprocessed" / DATASETS[kind]
        if not folder.exists():
            made = shared_folder(f"trainers_{kind}", partial(write, kind))
            shutil.copytree(made, _folders, dirs_exist_ok=True)
        return folder

    return make


def _shrink_plans(file: Path) -> None:
    """Reduce the features, and add lowres and cascade configurations, which such small images would not get."""
    plans = json.loads(file.read_text())
    fullres = plans["configurations"]["3d_fullres"]
    arguments = fullres["architecture"]["arch_kwargs"]
    arguments["features_per_stage"] = [min(32, 4 * 2**i) for i in range(arguments["n_stages"])]
    fullres["batch_size"] = 2
    plans["configurations"]["3d_lowres"] = {
        "data_identifier": "nnUNetPlans_3d_lowres",
        "inherits_from": "3d_fullres",
        "spacing": [2.0, 2.0, 2.0],
        "patch_size": [8, 12, 12],
        "next_stage": "3d_cascade_fullres",
    }
    plans["configurations"]["3d_cascade_fullres"] = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
    file.write_text(json.dumps(plans))


@pytest.fixture
def results(_folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Set a separate results folder for the test."""
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))
    return tmp_path / "results"


@pytest.fixture
def nothing_is_written(results: Path) -> Iterator[None]:
    """Check after the test that it left no results folder."""
    yield
    assert not results.exists()


@pytest.fixture
def make_trainer(preprocessed: Callable[[str], Path], results: Path) -> Callable[..., Any]:
    """Function that makes a trainer of a class for a kind of the data set, with two tiny epochs."""

    def make(
        trainer_class: type,
        kind: str = "labels",
        configuration: str = "3d_fullres",
        fold: int | str = 0,
        plans: dict[str, Any] | None = None,
        continue_training: bool = False,
        device: str = "cpu",
    ) -> Any:
        folder = preprocessed(kind)
        plans = plans or json.loads((folder / "nnUNetPlans.json").read_text())
        trainer = trainer_class(
            plans=plans | {"continue_training": continue_training},
            configuration=configuration,
            fold=fold,
            dataset_json=json.loads((folder / "dataset.json").read_text()),
            device=torch.device(device),
        )
        trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch, trainer.num_epochs = 3, 2, 2
        return trainer

    return make


@pytest.fixture
def stock_plans(preprocessed: Callable[[str], Path]) -> dict[str, Any]:
    """Return plans as nnU-Net writes them, with lowres and cascade."""
    return json.loads((preprocessed("labels") / "nnUNetPlans.json").read_text())


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch, keep_nnunet_small: Callable[[pytest.MonkeyPatch], None]) -> Iterator[None]:
    """Save time with tiny networks: one thread, few processes, and training curves of less than 3000 x 5400 pixels."""
    keep_nnunet_small(monkeypatch)
    monkeypatch.setitem(matplotlib.rcParams, "savefig.dpi", 20)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
