"""Fingerprints of CT with an ignore label, against nnU-Net's fingerprint of the same images with full labels."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor

from nnunet_conres.datasets.fingerprint import ANNOTATED_ONLY, FINGERPRINT, INTENSITIES, exclude_ignored_voxels
from nnunet_conres.datasets.sparse import SlabRule, sparsify
from nnunet_conres.errors import InputError
from nnunet_conres.planning.commands import PlanOptions, plan
from nnunet_conres.planning.planners import NetworkPlanner

DENSE, SPARSE = "Dataset031_Abdomen", "Dataset032_Sparse"
SHAPE = (24, 20, 22)


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write a CT data set of an organ of 60 HU in tissue of 0 HU, in air of -1000 HU, and set nnU-Net's paths."""
    for name in ("raw", "preprocessed", "results"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
    monkeypatch.setenv("nnUNet_def_n_proc", "1")
    raw = tmp_path / "raw" / DENSE
    for folder in ("imagesTr", "labelsTr"):
        (raw / folder).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(3):
        image = rng.normal(-1000, 20, SHAPE)
        image[:, 4:16, 4:18] = rng.normal(0, 20, (24, 12, 14))
        labels = np.zeros(SHAPE, np.uint8)
        labels[:, 6:12, 6:12] = 1
        image[labels == 1] = rng.normal(60, 10, int(labels.sum()))
        sitk.WriteImage(sitk.GetImageFromArray(image.astype(np.float32)), raw / f"imagesTr/case_{number}_0000.nii.gz")
        sitk.WriteImage(sitk.GetImageFromArray(labels), raw / f"labelsTr/case_{number}.nii.gz")
    dataset_json = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "organ": 1},
        "numTraining": 3,
        "file_ending": ".nii.gz",
    }
    (raw / "dataset.json").write_text(json.dumps(dataset_json))
    return tmp_path


def stock_fingerprint(name: str) -> dict[str, Any]:
    """Write nnU-Net's fingerprint, computed in this process. Return its intensity properties."""
    extractor = DatasetFingerprintExtractor.__new__(DatasetFingerprintExtractor)
    raw = Path(os.environ["nnUNet_raw"], name)
    content = json.loads((raw / "dataset.json").read_text())
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

    cases = [
        extractor.analyze_case(
            [str(image)], str(raw / "labelsTr" / image.name.replace("_0000", "")), SimpleITKIO, 100_000
        )
        for image in sorted((raw / "imagesTr").iterdir())
    ]
    intensities = np.concatenate([case[2][0] for case in cases])
    low, high = np.percentile(intensities, (0.5, 99.5))
    properties = {
        "mean": float(intensities.mean()),
        "std": float(intensities.std()),
        "median": float(np.median(intensities)),
        "min": float(intensities.min()),
        "max": float(intensities.max()),
        "percentile_00_5": float(low),
        "percentile_99_5": float(high),
    }
    fingerprint = {
        "spacings": [list(case[1]) for case in cases],
        "shapes_after_crop": [list(case[0]) for case in cases],
        INTENSITIES: {"0": properties},
        "median_relative_size_after_cropping": 1.0,
    }
    folder = Path(os.environ["nnUNet_preprocessed"], name)
    folder.mkdir(exist_ok=True)
    (folder / FINGERPRINT).write_text(json.dumps(fingerprint))
    shutil.copy(raw / "dataset.json", folder)
    assert content["labels"]
    return properties


def read_intensities(root: Path, name: str) -> dict[str, float]:
    return json.loads((root / "preprocessed" / name / FINGERPRINT).read_text())[INTENSITIES]["0"]


def exclude(root: Path, name: str = SPARSE) -> str | None:
    raw = root / "raw" / name
    dataset_json = json.loads((raw / "dataset.json").read_text())
    return exclude_ignored_voxels(raw, root / "preprocessed" / name, dataset_json)


def test_annotated_intensities_are_those_of_the_organ(folders: Path) -> None:
    sparsify(31, 32, SlabRule(every=4, slab=2), target_name="Sparse", progress=False)
    wrong = stock_fingerprint(SPARSE)
    dense = stock_fingerprint(DENSE)
    assert wrong["mean"] < -200
    changed = exclude(folders)
    assert changed is not None
    assert f"mean {wrong['mean']:.1f} became" in changed
    right = read_intensities(folders, SPARSE)
    assert set(right) == set(dense)
    for key in ("mean", "median", "percentile_00_5", "percentile_99_5"):
        assert right[key] == pytest.approx(dense[key], abs=3)
    assert exclude(folders) is None  # nothing left to change


def test_sparsify_carries_the_dense_fingerprint_over(folders: Path) -> None:
    dense = stock_fingerprint(DENSE)
    sparsify(31, 32, SlabRule(every=4, slab=2), target_name="Sparse", progress=False)
    assert read_intensities(folders, SPARSE) == dense
    assert exclude(folders) is None


def test_dense_and_mri_fingerprints_stay(folders: Path) -> None:
    stock_fingerprint(DENSE)
    before = (folders / "preprocessed" / DENSE / FINGERPRINT).read_bytes()
    assert exclude(folders, DENSE) is None
    assert (folders / "preprocessed" / DENSE / FINGERPRINT).read_bytes() == before
    sparsify(31, 32, SlabRule(every=4, slab=2), target_name="Sparse", progress=False)
    content = json.loads((folders / "raw" / SPARSE / "dataset.json").read_text())
    (folders / "raw" / SPARSE / "dataset.json").write_text(json.dumps(content | {"channel_names": {"0": "T1"}}))
    stock_fingerprint(SPARSE)
    assert exclude(folders) is None


def test_nothing_annotated_is_refused(folders: Path) -> None:
    sparsify(31, 32, SlabRule(every=4, slab=2), target_name="Sparse", progress=False)
    stock_fingerprint(SPARSE)
    for path in (folders / "raw" / SPARSE / "labelsTr").iterdir():
        sitk.WriteImage(sitk.GetImageFromArray(np.full(SHAPE, 2, np.uint8)), path)
    with pytest.raises(InputError, match=r"No training case of .* has annotated foreground"):
        exclude(folders)


def test_planners_plan_by_annotated_intensities(
    folders: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Small:
        def __init__(self, progress: Any) -> None:
            pass

        def total(self, _: Any) -> int:
            return 1

        execute = total

    monkeypatch.setattr("nnunet_conres.planning.planners.MemoryModel", Small)
    monkeypatch.setattr(NetworkPlanner, "progress", False)
    sparsify(31, 32, SlabRule(every=4, slab=2), target_name="Sparse", progress=False)
    stock_fingerprint(SPARSE)
    plan([32], PlanOptions("vnet"))
    assert "mean -" in capsys.readouterr().err
    plans = json.loads((folders / "preprocessed" / SPARSE / "nnUNetVNetPlans.json").read_text())
    assert plans[INTENSITIES]["0"]["mean"] == pytest.approx(60, abs=3)
    assert json.loads((folders / "preprocessed" / SPARSE / FINGERPRINT).read_text())[ANNOTATED_ONLY] is True
