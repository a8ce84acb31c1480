"""Cases in the layout of BraTS metastases 2025 and 2026, and a tiny model for them with random weights."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from scipy import ndimage

from nnunet_conres.datasets.brats_schemes import SCHEMES
from nnunet_conres.registration import TRAINER_FOLDER, VARIABLE
from tests.small_networks import plain_unet

# An atlas grid and a native scanner grid.
GRIDS = {
    "atlas": ((24, 24, 16), np.array([[-1.0, 0, 0, 0], [0, -1.0, 0, 239], [0, 0, 1.0, 0], [0, 0, 0, 1]])),
    "native": ((20, 17, 9), np.array([[0.8, 0, 0, -70.25], [0, 0.78, 0.5, -90], [0, -0.1, 3.9, 11.5], [0, 0, 0, 1]])),
}
PARTS = ("t2f", "t1n", "t1c", "t2w")
FOLDER = "nnUNetTrainerMuon__nnUNetPlans__3d_fullres"


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Find trainers even if the package is not installed, and use one thread, which is faster for tiny networks."""
    monkeypatch.setenv(VARIABLE, TRAINER_FOLDER)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def save(path: Path, voxels: np.ndarray, affine: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(voxels, affine), path)


@pytest.fixture(scope="session")
def write_case() -> Callable[..., Path]:
    """Function that writes a case's images to a folder. The case is named after the folder by default."""

    def write(
        folder: Path, grid: str = "atlas", parts: tuple[str, ...] = PARTS, seed: int = 0, case_id: str | None = None
    ) -> Path:
        rng = np.random.default_rng(seed)
        shape, affine = GRIDS[grid]
        for part in parts:
            image = 100 + 400 * ndimage.gaussian_filter(rng.normal(0, 1, shape), 1)
            image[:2] = 0  # cropped away by nnU-Net
            save(folder / f"{case_id or folder.name}-{part}.nii.gz", image.astype(np.float32), affine)
        return folder

    return write


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Path]:
    """Function that makes a model folder like those of nnU-Net."""

    def make(
        folder: Path, *, scheme: str = "2025-MET", trainer: str = "nnUNetTrainerMuon", folds: int = 2, **dataset: Any
    ) -> Path:
        resampling = {
            f"resampling_fn_{what}{suffix}": value
            for what, is_seg in (("data", False), ("seg", True), ("probabilities", False))
            for suffix, value in (
                ("", "resample_data_or_seg_to_shape"),
                ("_kwargs", {"is_seg": is_seg, "order": 1, "order_z": 0, "force_separate_z": None}),
            )
        }
        channels = SCHEMES[scheme].layout.channels
        plans = {
            "dataset_name": "Dataset950_Tiny",
            "plans_name": "nnUNetPlans",
            "transpose_forward": [1, 0, 2],
            "transpose_backward": [1, 0, 2],
            "image_reader_writer": "SimpleITKIO",
            "label_manager": "LabelManager",
            "foreground_intensity_properties_per_channel": {str(number): {} for number in range(len(channels))},
            "configurations": {
                "3d_fullres": resampling
                | {
                    "data_identifier": "nnUNetPlans_3d_fullres",
                    "preprocessor_name": "DefaultPreprocessor",
                    "batch_size": 2,
                    "patch_size": [12, 16, 16],
                    "spacing": [1.0, 1.0, 1.0],
                    "normalization_schemes": ["ZScoreNormalization"] * len(channels),
                    "use_mask_for_norm": [True] * len(channels),
                    "architecture": plain_unet(),
                }
            },
        }
        content = {
            "channel_names": {str(number): name for number, name in enumerate(channels)},
            **SCHEMES[scheme].label_set.dataset_json("regions"),
            "file_ending": ".nii.gz",
            "brats_schemes": [scheme],
        } | dataset
        folder.mkdir(parents=True)
        (folder / "plans.json").write_text(json.dumps(plans))
        (folder / "dataset.json").write_text(json.dumps(content))
        manager = PlansManager(plans)
        heads = manager.get_label_manager(content).num_segmentation_heads
        for fold in range(folds):
            torch.manual_seed(fold)
            built = nnUNetTrainer.build_network_architecture(
                manager, manager.get_configuration("3d_fullres"), len(channels), heads, enable_deep_supervision=False
            )
            for name, parameter in built.named_parameters():
                if "seg_layers" in name:
                    torch.nn.init.normal_(parameter, std=1.0)
            optimizer = torch.optim.AdamW(built.parameters())
            sum(parameter.sum() for parameter in built.parameters()).backward()
            optimizer.step()
            checkpoint = {
                "network_weights": built.state_dict(),
                "optimizer_state": optimizer.state_dict(),
                "logging": {"dice": [np.float64(0.5)]},
                "trainer_name": trainer,
                "init_args": {"configuration": "3d_fullres", "fold": fold, "plans": plans},
                "inference_allowed_mirroring_axes": (0, 1),
            }
            (folder / f"fold_{fold}").mkdir()
            torch.save(checkpoint, folder / f"fold_{fold}" / "checkpoint_final.pth")
        return folder

    return make


@pytest.fixture(scope="session")
def shared_model(shared_folder: Callable[..., Path], make_model: Callable[..., Path]) -> Path:
    """A model of two folds in a results folder. Read-only."""
    return shared_folder("submission", lambda folder: make_model(folder / "Dataset950_Tiny" / FOLDER)) / (
        f"Dataset950_Tiny/{FOLDER}"
    )


@pytest.fixture
def postprocessing_file(tmp_path: Path, shared_model: Path) -> Path:
    """Write post-processing rules that need probabilities: a threshold, and the smallest volume of a region in mm³."""
    file = tmp_path / "rules.json"
    steps = {"tumor_core": {"threshold": 0.6}, "enhancing_tumor": {"smallest_total": 1e6}}
    dataset = json.loads((shared_model / "dataset.json").read_text())
    file.write_text(json.dumps({"format": 1, "dataset_json": dataset, "steps": steps}))
    return file
