"""Synthetic data sets for planning: the metadata that nnU-Net's planners read, without images."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

DATASET_NAME = "Dataset999_Made"
_FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")


@dataclass(frozen=True)
class DataSet:
    """Metadata of a data set for a planner.

    Attributes:
        title: Description.
        channels: Names of the channels, which determine nnU-Net's normalisation.
        labels: As in dataset.json; a list of numbers is a region.
        spacing: Spacing of every case, mm.
        shape: Shape of every case after cropping, voxels, in nnU-Net's order of axes.
        cases: Number of training cases.
    """

    title: str
    channels: tuple[str, ...]
    labels: dict[str, int | list[int]]
    spacing: tuple[float, float, float]
    shape: tuple[int, int, int]
    cases: int

    @property
    def dataset_json(self) -> dict[str, Any]:
        """Content of dataset.json, with a list of cases and a reader, so that nnU-Net looks for no images."""
        has_regions = any(isinstance(label, list) for label in self.labels.values())
        return {
            "channel_names": {str(number): name for number, name in enumerate(self.channels)},
            "labels": {"background": 0, **self.labels},
            **({"regions_class_order": list(range(1, len(self.labels) + 1))} if has_regions else {}),
            "numTraining": self.cases,
            "file_ending": ".nii.gz",
            "overwrite_image_reader_writer": "SimpleITKIO",
            "dataset": {"case": {"images": ["none"], "label": "none"}},
        }

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Content of dataset_fingerprint.json."""
        statistics = {"mean": 0.0, "std": 1.0, "percentile_00_5": -1.0, "percentile_99_5": 1.0, "median": 0.0}
        return {
            "spacings": [self.spacing],
            "shapes_after_crop": [self.shape],
            "foreground_intensity_properties_per_channel": {str(n): statistics for n in range(len(self.channels))},
            "median_relative_size_after_cropping": 1.0,
        }


DATA_SETS = {
    "brats": DataSet(
        title="BraTS-like: 4 channels, 3 regions",
        channels=("FLAIR", "T1", "T1ce", "T2"),
        labels={"whole_tumor": [1, 2, 3], "tumor_core": [2, 3], "enhancing_tumor": 3},
        spacing=(1.0, 1.0, 1.0),
        shape=(140, 171, 136),
        cases=1000,
    ),
    "abdomen": DataSet(
        title="Abdominal-CT-like: 1 channel, 14 labels",
        channels=("CT",),
        labels={f"organ_{number}": number for number in range(1, 15)},
        spacing=(2.5, 0.8, 0.8),
        shape=(130, 512, 512),
        cases=100,
    ),
}


@contextlib.contextmanager
def nnunet_folders(data: DataSet) -> Iterator[None]:
    """Provide nnU-Net's folders, with the data set in them, within the context."""
    with tempfile.TemporaryDirectory() as root, mock.patch.dict(os.environ):
        for name in _FOLDERS:
            folder = Path(root, name, DATASET_NAME)
            folder.mkdir(parents=True)
            (folder / "dataset.json").write_text(json.dumps(data.dataset_json), encoding="utf-8")
            (folder / "dataset_fingerprint.json").write_text(json.dumps(data.fingerprint), encoding="utf-8")
            os.environ[name] = str(folder.parent)
        yield
