"""Raw data that change after preprocessing, from labels to a whole data set: what is rebuilt, refused or reported."""

from __future__ import annotations

import errno
import gzip
import json
import multiprocessing.dummy
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813  (as everybody calls it)
import torch
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

from nnunet_conres import cli
from nnunet_conres.datasets.fingerprint import carry_fingerprint
from nnunet_conres.errors import InputError, file_errors
from nnunet_conres.planning import planners
from nnunet_conres.planning.commands import PlanOptions, plan, plan_and_preprocess
from nnunet_conres.preprocessing.dataset import PreprocessedDataset
from nnunet_conres.preprocessing.sources import RECORD
from nnunet_conres.trainers import nnUNetTrainerVNet

NAME = "Dataset701_Made"
SHAPE = (12, 16, 20)
DATA = "nnUNetVNetPlans_3d_fullres"


@pytest.fixture
def raw(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write a raw data set of three cases with a synthetic fingerprint and without plans."""
    make({"shape": SHAPE, "spacing": (1.0, 1.0, 1.0)}, cases=3)

    class Model:
        """A stand-in: memory doesn't matter here."""

        def __init__(self, progress: Callable[[], None]) -> None: ...

        def total(self, step: Any) -> int:
            return 10**8

        execute = total

    monkeypatch.setattr(planners, "MemoryModel", Model)
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    # nnU-Net would read three images in worker processes, each of which imports nnU-Net
    extractor = "nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor.multiprocessing.get_context"
    monkeypatch.setattr(extractor, lambda _: multiprocessing.dummy)
    return tmp_path / "raw" / NAME


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "preprocessed" / NAME


def complete(**kwargs: Any) -> Any:
    defaults: dict[str, Any] = {"configurations": ["3d_fullres"], "processes": [1], "progress": False}
    (done,) = plan_and_preprocess([701], PlanOptions("vnet"), fingerprint_processes=1, **(defaults | kwargs))
    return done


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.iterdir()}


def changed_cases(before: dict[str, Any], after: dict[str, Any]) -> set[str]:
    return {
        name.split(".")[0].removesuffix("_seg") for name in {*before, *after} if before.get(name) != after.get(name)
    }


def write_labels(path: Path, low: int = 2, same_size_as: Path | None = None) -> np.ndarray:
    """Write corrected labels; uncompressed if the file must have the size of another."""
    labels = np.zeros(SHAPE, np.uint8)
    labels[low : low + 5, 3:9, 5:14] = 1
    sitk.WriteImage(sitk.GetImageFromArray(labels), path, same_size_as is None)
    assert same_size_as is None or path.stat().st_size == same_size_as.stat().st_size
    return labels


def make_uncompressed(raw: Path) -> None:
    """Rewrite the data set uncompressed, so that file sizes don't depend on their content."""
    for path in raw.glob("*Tr/*.nii.gz"):
        image = sitk.ReadImage(path)
        path.unlink()
        sitk.WriteImage(image, path.with_name(path.name.removesuffix(".gz")))
    content = json.loads((raw / "dataset.json").read_text())
    (raw / "dataset.json").write_text(json.dumps(content | {"file_ending": ".nii"}))


def labels_there(folder: Path, case_id: str) -> np.ndarray:
    labels = nnUNetDatasetBlosc2(str(folder / DATA), [case_id]).load_case(case_id)[1][0]
    return np.maximum(labels, 0)  # nnU-Net marks background outside the nonzero region with -1


def keep_fingerprint(folder: Path) -> None:
    """Make the fingerprint newer than every file that a test writes."""
    os.utime(folder / "dataset_fingerprint.json", (3e9, 3e9))


class TestLabels:
    def test_that_were_corrected_are_preprocessed_again(self, raw: Path, folder: Path) -> None:
        complete()
        before = snapshot(folder / DATA)
        labels = write_labels(raw / "labelsTr" / "case_1.nii.gz")
        done = complete()
        assert done.preprocessed[0].written == ("case_1",)
        assert "of these 1 again, because their raw files changed: case_1 (case_1.nii.gz has" in done.as_text()
        np.testing.assert_array_equal(labels_there(folder, "case_1"), labels)
        assert changed_cases(before, snapshot(folder / DATA)) == {"case_1"}
        copy = folder / "gt_segmentations" / "case_1.nii.gz"
        assert copy.read_bytes() == (raw / "labelsTr" / "case_1.nii.gz").read_bytes()
        places = pickle.loads((folder / DATA / "case_1.pkl").read_bytes())["class_locations"][1]
        assert (labels[tuple(places.T[1:])] == 1).all()
        assert complete().preprocessed[0].written == ()

    @pytest.mark.parametrize("keep_time", ["second", "nanosecond"])
    def test_of_the_same_size_and_second(self, raw: Path, folder: Path, keep_time: str) -> None:
        make_uncompressed(raw)
        keep_fingerprint(folder)
        complete()
        path, other = raw / "labelsTr" / "case_1.nii", raw / "labelsTr" / "case_0.nii"
        before = path.stat().st_mtime_ns
        labels = write_labels(path, same_size_as=other)
        after = before if keep_time == "nanosecond" else before // 10**9 * 10**9 + (before + 5) % 10**9
        os.utime(path, ns=(after, after))
        assert complete().preprocessed[0].written == ("case_1",)
        np.testing.assert_array_equal(labels_there(folder, "case_1"), labels)
        assert (folder / "gt_segmentations" / "case_1.nii").read_bytes() == path.read_bytes()

    def test_of_other_times_and_the_same_content_are_the_same(self, raw: Path, folder: Path) -> None:
        keep_fingerprint(folder)
        complete()
        before = snapshot(folder / DATA)
        os.utime(raw / "labelsTr" / "case_1.nii.gz")
        os.utime(raw / "imagesTr" / "case_2_0000.nii.gz")
        assert complete().preprocessed[0].written == ()
        after = snapshot(folder / DATA)
        assert {name for name in after if after[name] != before[name]} == {"case_1.pkl", "case_2.pkl"}  # new times
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("nnunet_conres.preprocessing.sources._digest", None)  # no file needs to be read again
            assert complete().preprocessed[0].written == ()

    def test_names_that_changed_in_dataset_json(self, raw: Path, folder: Path) -> None:
        complete()
        content = json.loads((raw / "dataset.json").read_text())
        content["labels"]["ignore"] = 3
        (raw / "dataset.json").write_text(json.dumps(content))
        assert len(complete().preprocessed[0].written) == 3

    def test_next_commands_tell_of_outdated_cases(self, raw: Path, folder: Path) -> None:
        complete()
        write_labels(raw / "labelsTr" / "case_1.nii.gz")
        keep_fingerprint(folder)
        fingerprint = folder / "dataset_fingerprint.json"
        content = json.loads(fingerprint.read_text())
        content.pop(RECORD, None)
        fingerprint.write_text(json.dumps(content))
        keep_fingerprint(folder)
        (done,) = plan([701], PlanOptions("vnet"))
        assert done.next_commands[0].endswith("with the same options: 1 cases of 3d_fullres are missing or outdated")


class TestImages:
    def test_that_changed_are_preprocessed_again(self, raw: Path, folder: Path) -> None:
        complete()
        image = sitk.GetImageFromArray(np.random.default_rng(7).normal(9, 2, SHAPE).astype(np.float32))
        sitk.WriteImage(image, raw / "imagesTr" / "case_2_0000.nii.gz")
        before = labels_there(folder, "case_2")
        assert complete().preprocessed[0].written == ("case_2",)
        np.testing.assert_array_equal(labels_there(folder, "case_2"), before)

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_with_voxels_that_are_not_finite_are_refused(self, raw: Path, folder: Path, value: float) -> None:
        content = json.loads((raw / "dataset.json").read_text())
        content["overwrite_image_reader_writer"] = "NibabelIO"  # ITK reads them as 0
        (raw / "dataset.json").write_text(json.dumps(content))
        complete()
        path = raw / "imagesTr" / "case_2_0000.nii.gz"
        voxels = sitk.GetArrayFromImage(sitk.ReadImage(path))
        voxels[5, 6, 7] = value
        sitk.WriteImage(sitk.GetImageFromArray(voxels), path)
        keep_fingerprint(folder)
        before = snapshot(folder / DATA)
        with pytest.raises(InputError, match=r"Case case_2 can't be .*channel 0 has voxels that are NaN or infinite"):
            complete()
        assert snapshot(folder / DATA) == before


class TestStockData:
    @pytest.fixture(autouse=True)
    def _stock(self, raw: Path, folder: Path) -> None:
        """Write data without a record, as nnU-Net's own commands do."""
        complete()
        for path in (folder / DATA).glob("*.pkl"):
            properties = pickle.loads(path.read_bytes())
            del properties[RECORD]
            path.write_bytes(pickle.dumps(properties))
        keep_fingerprint(folder)

    def test_are_left_alone(self, folder: Path) -> None:
        before = snapshot(folder / DATA)
        assert complete().preprocessed[0].written == ()
        assert snapshot(folder / DATA) == before

    def test_old_labels_are_found_by_the_copies(self, raw: Path, folder: Path) -> None:
        path = raw / "labelsTr" / "case_1.nii.gz"
        labels = write_labels(path)
        os.utime(path, (1e9, 1e9))  # unpacked from an archive
        done = complete()
        assert dict(done.preprocessed[0].outdated) == {
            "case_1": "case_1.nii.gz differs from its copy in gt_segmentations"
        }
        np.testing.assert_array_equal(labels_there(folder, "case_1"), labels)
        assert complete().preprocessed[0].written == ()

    def test_old_images_are_found_by_their_times(self, raw: Path, folder: Path) -> None:
        os.utime(raw / "imagesTr" / "case_0_0000.nii.gz", (2e9, 2e9))
        assert complete().preprocessed[0].written == ("case_0",)
        assert complete().preprocessed[0].written == ()


class TestCasesThatAreGone:
    def test_are_refused_with_their_list_and_removed_on_demand(self, raw: Path, folder: Path, capsys: Any) -> None:
        complete()
        for path in raw.glob("*Tr/case_1*"):
            path.unlink()
        before = snapshot(folder), snapshot(folder / DATA)
        with pytest.raises(InputError, match=rf"{DATA} has 1 cases that are not in {raw}: case_1\. .* --clean"):
            complete()
        assert (snapshot(folder), snapshot(folder / DATA)) == before
        done = complete(clean=True)
        assert done.preprocessed[0].written == ()
        assert {path.name.split(".")[0].removesuffix("_seg") for path in (folder / DATA).iterdir()} == {
            "case_0",
            "case_2",
        }
        assert {path.name for path in (folder / "gt_segmentations").iterdir()} == {"case_0.nii.gz", "case_2.nii.gz"}
        assert f"Removing 1 cases from {folder / DATA}" in capsys.readouterr().out
        assert len(json.loads((folder / "dataset_fingerprint.json").read_text())["spacings"]) == 2

    def test_a_data_set_that_was_replaced_under_its_name(self, raw: Path, folder: Path) -> None:
        complete()
        for path in raw.glob("*Tr/*"):
            path.rename(path.with_name(path.name.replace("case", "other")))
        with pytest.raises(InputError, match=r"has 3 cases that are not in .*: case_0, case_1, case_2\."):
            complete()
        assert complete(clean=True).preprocessed[0].written == ("other_0", "other_1", "other_2")
        assert {path.name[:7] for path in (folder / DATA).iterdir()} == {"other_0", "other_1", "other_2"}

    def test_splits_that_name_them_are_named(self, raw: Path, folder: Path) -> None:
        complete()
        splits = folder / "splits_final.json"
        splits.write_text(json.dumps([{"train": ["case_0", "case_9"], "val": ["case_1"]}]))
        text = f"{splits} names 1 cases that are not in {raw}: case_9. Remove it"
        assert text in complete().as_text()
        splits.write_text("[1]")
        assert f"{splits} can't be read as nnU-Net's splits" in complete().as_text()


class TestFingerprint:
    def test_of_other_data_is_taken_again(self, raw: Path, folder: Path, capsys: Any) -> None:
        fingerprint = folder / "dataset_fingerprint.json"
        made = fingerprint.read_bytes()
        complete(preprocess=False)
        assert fingerprint.read_bytes() == made  # it is newer than every raw file
        for case in ("imagesTr/case_3_0000.nii.gz", "labelsTr/case_3.nii.gz"):
            shutil.copy2(raw / case.replace("3", "2", 1), raw / case)
        complete(preprocess=False)
        assert "it was extracted from 3 cases, but there are 4 now). Extracting it again" in capsys.readouterr().out
        content = json.loads(fingerprint.read_text())
        assert len(content["spacings"]) == 4
        fingerprint.write_text(fingerprint.read_text()[:100])  # nnU-Net was killed while it wrote
        complete(preprocess=False)
        assert "it can't be read" in capsys.readouterr().out
        assert json.loads(fingerprint.read_text()) == content
        before = fingerprint.read_bytes()
        complete(preprocess=False)
        assert fingerprint.read_bytes() == before
        labels = raw / "labelsTr" / "case_0.nii.gz"
        write_labels(labels)
        assert cli.main(["plan", "-d", "701", "-a", "vnet"]) == 2
        assert f"The raw data changed after {fingerprint} was extracted: files of case_0 changed. Extract" in (
            capsys.readouterr().err
        )
        complete(preprocess=False)
        assert "(files of case_0 changed). Extracting it again" in capsys.readouterr().out

    def test_nnunets_own_is_read_by_nnunet(self, raw: Path, folder: Path) -> None:
        """nnU-Net ignores the record in the fingerprint."""
        from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner

        complete(preprocess=False, clean=True)
        assert RECORD in json.loads((folder / "dataset_fingerprint.json").read_text())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ExperimentPlanner, "static_estimate_VRAM_usage", staticmethod(lambda *_: 10**8))
            assert ExperimentPlanner(701).plan_experiment()["configurations"]["3d_fullres"]["patch_size"]


class TestTraining:
    @pytest.fixture
    def start(self, raw: Path, folder: Path) -> Callable[[], Any]:
        """Return a function that starts a training on the preprocessed data."""
        complete()

        def start() -> Any:
            plans = json.loads((folder / "nnUNetVNetPlans.json").read_text())
            dataset_json = json.loads((folder / "dataset.json").read_text())
            trainer = nnUNetTrainerVNet(
                plans | {"continue_training": False}, "3d_fullres", "all", dataset_json, torch.device("cpu")
            )
            trainer.on_train_start()
            return trainer

        return start

    def test_starts_where_nothing_changed(self, start: Callable[[], Any], raw: Path) -> None:
        for path in raw.glob("*Tr/*"):
            os.utime(path)
        shutil.copytree(raw, raw.with_name("copy"))
        shutil.rmtree(raw)
        raw.with_name("copy").rename(raw)
        trainer = start()
        assert "Warning: The raw files of 3 cases" in self.log_of(trainer)  # the copied images have new times
        shutil.rmtree(raw)
        assert self.log_of(start()).count("Warning") == 1  # the earlier warning

    @staticmethod
    def log_of(trainer: Any) -> str:
        """Return the text of all logs: nnU-Net names them by the second, so two trainings may share one."""
        return "".join(path.read_text() for path in sorted(Path(trainer.output_folder).glob("training_log*.txt")))

    def test_refuses_old_labels(self, start: Callable[[], Any], raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write_labels(raw / "labelsTr" / "case_1.nii.gz")
        with pytest.raises(InputError, match=r"raw files of 1 cases in .* changed .*: case_1 \(.*plan_and_preprocess"):
            start()
        complete()
        start()
        write_labels(raw / "labelsTr" / "case_1.nii.gz", low=3)
        monkeypatch.delenv("nnUNet_raw")
        start()  # without raw data, nothing is checked

    def test_refuses_cases_that_are_gone(self, start: Callable[[], Any], raw: Path) -> None:
        for path in raw.glob("*Tr/case_1*"):
            path.unlink()
        with pytest.raises(InputError, match=r"1 cases in .* are not in .*: case_1\."):
            start()

    def test_refuses_data_of_other_plans(self, start: Callable[[], Any], folder: Path) -> None:
        path = folder / "nnUNetVNetPlans.json"
        plans = json.loads(path.read_text())
        plans["configurations"]["3d_fullres"]["normalization_schemes"] = ["NoNormalization"]
        path.write_text(json.dumps(plans))
        with pytest.raises(InputError, match=r"3 cases in .* were preprocessed for other plans: case_0, case_1"):
            start()

    def test_refuses_old_labels_of_stock_data(self, start: Callable[[], Any], raw: Path, folder: Path) -> None:
        for path in (folder / DATA).glob("*.pkl"):
            properties = pickle.loads(path.read_bytes())
            del properties[RECORD]
            path.write_bytes(pickle.dumps(properties))
        os.utime(raw / "imagesTr" / "case_0_0000.nii.gz", (2e9, 2e9))
        assert "case_0 (case_0_0000.nii.gz is newer than the preprocessed case)" in self.log_of(start())
        write_labels(raw / "labelsTr" / "case_1.nii.gz")
        with pytest.raises(InputError, match=r"case_1 \(case_1.nii.gz differs from its copy in gt_segmentations\)"):
            start()


_SLOW_PREPROCESSING = """
import sys, time
from pathlib import Path
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunet_conres.preprocessing.dataset import PreprocessedDataset
import nnunet_conres.preprocessing.dataset as module

run = DefaultPreprocessor.run_case_save
def slow(self, target, *args):
    run(self, target, *args)
    if "case_1" in target:
        Path(sys.argv[3]).touch()
        time.sleep(float(sys.argv[4]))
DefaultPreprocessor.run_case_save = slow
raw, folder = map(Path, sys.argv[1:3])
print(PreprocessedDataset(raw, folder, "nnUNetVNetPlans").complete({"3d_fullres": 1}, progress=False)[0].written)
"""


class TestKilledAndConcurrentRuns:
    def begin(self, raw: Path, folder: Path, mark: Path, seconds: float) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", _SLOW_PREPROCESSING, str(raw), str(folder), str(mark), str(seconds)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        while not mark.exists():
            assert process.poll() is None
            time.sleep(0.05)
        return process

    def test_leftovers_of_a_killed_run_are_cleared(self, raw: Path, folder: Path, tmp_path: Path) -> None:
        complete(preprocess=False)
        process = self.begin(raw, folder, tmp_path / "mark", 600)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert list(folder.glob(f".{DATA}.partial-????????"))
        assert complete().preprocessed[0].written == ("case_1", "case_2")
        assert not list(folder.glob(".*"))

    def test_a_second_run_waits_and_leaves_the_first_alone(self, raw: Path, folder: Path, tmp_path: Path) -> None:
        complete(preprocess=False)
        process = self.begin(raw, folder, tmp_path / "mark", 4)
        data = PreprocessedDataset(raw, folder, "nnUNetVNetPlans")
        assert data.complete({"3d_fullres": 1}, progress=False)[0].written == ()
        assert process.communicate()[0].strip() == "('case_0', 'case_1', 'case_2')"
        assert process.returncode == 0
        assert not list(folder.glob(".*"))


class TestFilesThatCannotBeWritten:
    @pytest.mark.parametrize("as_npz", [False, True])
    def test_data(
        self, raw: Path, folder: Path, as_npz: bool, limited_files: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Blosc2 reports neither which file it could not write nor why."""
        complete(preprocess=False)
        if as_npz:
            monkeypatch.setattr("nnunet_conres.preprocessing.dataset._holds_npz", lambda _: True)
        before = sorted(folder.rglob("*"))
        with limited_files(2048), pytest.raises(InputError) as caught:
            PreprocessedDataset(raw, folder, "nnUNetVNetPlans").complete({"3d_fullres": 1}, progress=False)
        path = folder / DATA / ("case_0.npz" if as_npz else "case_0.b2nd")
        assert str(caught.value).startswith(f"{path}: File too large. Raise the limit")
        assert [path for path in sorted(folder.rglob("*")) if path not in before] == [folder / DATA]

    def test_properties(self, raw: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        complete(preprocess=False)

        def full(path: Path, _: Any) -> None:
            with file_errors(path):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr("nnunet_conres.preprocessing.dataset._note", full)
        with pytest.raises(InputError, match=f"^{folder / DATA / 'case_0.pkl'}: No space left"):
            PreprocessedDataset(raw, folder, "nnUNetVNetPlans").complete({"3d_fullres": 1}, progress=False)

    @pytest.mark.parametrize("size", [16, 512])
    def test_fingerprint(self, raw: Path, folder: Path, size: int, limited_files: Any) -> None:
        """16 bytes are too few for the lock, which is written first, 512 for the fingerprint. No partial file stays."""
        fingerprint = folder / "dataset_fingerprint.json"
        with limited_files(size), pytest.raises(InputError, match=f"^{fingerprint}: File too large"):
            complete(preprocess=False, clean=True)
        assert fingerprint.exists() == (size == 16)
        assert not list(folder.glob(".*"))


class TestFilesThatNnunetDoesNotReadAsTheyAre:
    @pytest.mark.parametrize("part", ["imagesTr/case_1_0000", "labelsTr/case_1"])
    def test_compressed_without_gz(self, raw: Path, part: str) -> None:
        make_uncompressed(raw)
        path = raw / f"{part}.nii"
        path.write_bytes(gzip.compress(path.read_bytes()))
        with pytest.raises(InputError) as caught:
            complete(clean=True)
        assert f"{path} cannot be read: it is compressed, and its name does not say so" in str(caught.value)

    def test_labels_with_a_scale_factor(self, raw: Path) -> None:
        """Training would truncate 0.99999285 to 0."""
        path = raw / "labelsTr" / "case_1.nii.gz"
        labels = sitk.GetArrayFromImage(sitk.ReadImage(path))
        image = nibabel.Nifti1Image(np.rint((labels.T + 319.0) / 0.01).astype(np.int16), np.diag([-1, -1, 1, 1]))
        image.header.set_slope_inter(0.01, -319.0)
        path.write_bytes(gzip.compress(image.to_bytes()))
        with pytest.raises(InputError, match=f"Case case_1 can't be preprocessed.*{path} has labels that nnU-Net's"):
            complete(clean=True)

    def test_labels_that_are_not_finite(self, raw: Path) -> None:
        path = raw / "labelsTr" / "case_1.nii.gz"
        labels = sitk.GetArrayFromImage(sitk.ReadImage(path)).astype(np.float32)
        labels[0, 0, 0] = np.nan
        sitk.WriteImage(sitk.GetImageFromArray(labels), path)
        with pytest.raises(InputError, match=f"Case case_1 can't be preprocessed.*{path} has 1 voxels that are NaN"):
            complete(clean=True)


def test_a_fingerprint_that_was_carried_over_is_kept(raw: Path, folder: Path) -> None:
    """Sparsifying changes label files and deliberately keeps the dense data set's fingerprint."""
    complete(preprocess=False, clean=True)
    dense = folder.with_name("Dataset700_Dense")
    folder.rename(dense)
    write_labels(raw / "labelsTr" / "case_1.nii.gz")
    assert carry_fingerprint(dense, folder)
    before = (folder / "dataset_fingerprint.json").read_bytes()
    complete(preprocess=False)
    assert (folder / "dataset_fingerprint.json").read_bytes() == before
