"""A data set that looks large to nnU-Net's planners: tiny images with the fingerprint of large ones."""

import json
import multiprocessing.dummy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813  (as everybody calls it)
import torch

NAME = "Dataset701_Made"
TINY = (12, 16, 20)


@pytest.fixture(autouse=True)
def _folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep_nnunet_small: Callable[[pytest.MonkeyPatch], None]
) -> Iterator[None]:
    for name in ("raw", "preprocessed", "results"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
    monkeypatch.setenv("nnUNet_def_n_proc", "1")
    keep_nnunet_small(monkeypatch)
    # nnU-Net would start twelve processes to match three file names
    monkeypatch.setattr("nnunetv2.utilities.utils.Pool", multiprocessing.dummy.Pool)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def _write_dataset(
    root: Path,
    shape: tuple[int, int, int],
    spacing: tuple[float, float, float],
    cases: int = 40,
    channels: int = 1,
    labels: dict[str, Any] | None = None,
) -> None:
    """Write a raw data set of tiny images, and the fingerprint of images with the given shape and spacing."""
    raw, preprocessed = root / "raw" / NAME, root / "preprocessed" / NAME
    for folder in (raw / "imagesTr", raw / "labelsTr", preprocessed):
        folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    tiny = TINY
    images = [sitk.GetImageFromArray(rng.normal(5, 1, tiny).astype(np.float32)) for _ in range(channels)]
    annotation = np.zeros(tiny, np.uint8)
    annotation[4:8, 4:10, 4:12] = 1
    for number in range(3):
        for channel, image in enumerate(images):
            sitk.WriteImage(image, raw / "imagesTr" / f"case_{number}_{channel:04d}.nii.gz")
        sitk.WriteImage(sitk.GetImageFromArray(annotation), raw / "labelsTr" / f"case_{number}.nii.gz")
    dataset_json = {
        "channel_names": {str(channel): "T1" for channel in range(channels)},
        "labels": labels or {"background": 0, "organ": 1, "tumor": 2},
        "numTraining": cases,
        "file_ending": ".nii.gz",
    }
    (raw / "dataset.json").write_text(json.dumps(dataset_json))
    (preprocessed / "dataset.json").write_text(json.dumps(dataset_json))
    statistics = {"mean": 5.0, "std": 1.0, "percentile_00_5": 2.0, "percentile_99_5": 8.0, "median": 5.0}
    fingerprint = {
        "spacings": [spacing] * 3,
        "shapes_after_crop": [shape] * 3,
        "foreground_intensity_properties_per_channel": {str(channel): statistics for channel in range(channels)},
        "median_relative_size_after_cropping": 1.0,
    }
    (preprocessed / "dataset_fingerprint.json").write_text(json.dumps(fingerprint))


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., None]:
    """Return a function that writes the data set."""

    def write(kind: dict[str, Any], **kwargs: Any) -> None:
        _write_dataset(tmp_path, **kind, **kwargs)

    return write
