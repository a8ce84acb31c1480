"""Commands in separate processes that write to the same target at the same time."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import nibabel
import numpy as np
import pytest

from nnunet_conres.datasets.splits import split
from nnunet_conres.errors import InputError
from nnunet_conres.evaluation.figures import read_legend
from nnunet_conres.evaluation.overlays import write_overlays
from nnunet_conres.evaluation.residual_maps import write_residual_maps

SHAPE = (16, 16, 8)
CASES = 12
# Holds the lock of a folder with `writing`, like every command that adds files to a folder.
WRITE = """
import sys
from pathlib import Path
from nnunet_conres.folders import writing
with writing(Path(sys.argv[1]), lock=sys.argv[2]):
    print("writing", flush=True)
    sys.stdin.readline()
"""
# Runs a command that waits for a line of input while it writes, so that a second command can start.
SLOW = """
import sys
import nnunet_conres.datasets.{module} as module
before = module.{function}
jobs = []
def slow(job):
    done = before(job)
    jobs.append(job)
    if len(jobs) == {after}:
        sys.stdin.readline()
    return done
module.{function} = slow
from nnunet_conres import cli
sys.exit(cli.main(sys.argv[1:]))
"""


def save(path: Path, voxels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(voxels, np.diag([-1.0, -1.0, 1.0, 1.0])), path)


@pytest.fixture
def raw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    return tmp_path / "nnUNet_raw"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Write BraTS cases."""
    rng = np.random.default_rng(0)
    for number in range(CASES):
        case_id = f"Brats18_A_{number}_1"
        for part in ("flair", "t1", "t1ce", "t2"):
            image = rng.integers(1, 100, SHAPE).astype(np.int16)
            save(tmp_path / "source" / case_id / f"{case_id}_{part}.nii.gz", image)
        save(tmp_path / "source" / case_id / f"{case_id}_seg.nii.gz", rng.choice([0, 1, 2, 4], SHAPE).astype(np.uint8))
    return tmp_path / "source"


@pytest.fixture
def dataset(raw: Path) -> Path:
    """Write a labelled data set."""
    rng = np.random.default_rng(0)
    folder = raw / "Dataset007_Toy"
    for number in range(CASES):
        save(folder / f"imagesTr/case_{number}_0000.nii.gz", rng.integers(1, 100, SHAPE).astype(np.int16))
        save(folder / f"labelsTr/case_{number}.nii.gz", rng.integers(0, 2, SHAPE).astype(np.uint8))
    content = {"channel_names": {"0": "MRI"}, "labels": {"background": 0, "lesion": 1}, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps({**content, "numTraining": CASES}))
    return folder


@pytest.fixture
def predictions(tmp_path: Path) -> Path:
    """Write predictions for a data set of brats-convert."""
    rng = np.random.default_rng(0)
    for number in range(CASES):
        save(tmp_path / "predictions" / f"Brats18_A_{number}_1.nii.gz", rng.integers(0, 4, SHAPE).astype(np.uint8))
    regions = {"background": 0, "whole_tumor": [1, 2, 3], "tumor_core": [2, 3], "enhancing_tumor": 3}
    content = {"labels": regions, "regions_class_order": [1, 2, 3]}
    (tmp_path / "predictions" / "dataset.json").write_text(json.dumps(content))
    return tmp_path / "predictions"


def start(code: list[str]) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, *code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def slow(module: str, function: str, arguments: list[str], after: int = 3) -> "subprocess.Popen[str]":
    return start(["-c", SLOW.format(module=module, function=function, after=after), *arguments])


def command(arguments: list[str]) -> "subprocess.Popen[str]":
    return start(["-m", "nnunet_conres.cli", *arguments])


def wait_for(found: Callable[[], object], process: "subprocess.Popen[str]") -> None:
    end = time.monotonic() + 120
    while not found():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.05)


def both(first: "subprocess.Popen[str]", folder: Path, second: Callable[[], "subprocess.Popen[str]"]) -> str:
    """Start the second command after the first has begun to write. Return the output of the first."""
    wait_for(lambda: [path for path in folder.glob(".*.partial-*/**/*") if path.is_file()], first)
    (partial,) = folder.glob(".*.partial-*")
    late = second()
    _, refused = late.communicate()
    assert partial.is_dir(), "the second command has touched what the first one writes"
    printed, error = first.communicate("\n")
    assert first.returncode == 0, error
    assert late.returncode == 2
    assert "Traceback" not in refused
    assert f"is being written by process {first.pid} on" in refused
    assert not list(folder.glob(".*"))
    return printed


def kill_and_repeat(first: "subprocess.Popen[str]", folder: Path, second: Callable[[], "subprocess.Popen[str]"]) -> str:
    """Kill the first command while it writes, and run the second. Return the output of the second."""
    wait_for(lambda: [path for path in folder.glob(".*.partial-*/**/*") if path.is_file()], first)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert list(folder.glob(".*.partial-*"))
    again = second()
    printed, error = again.communicate()
    assert again.returncode == 0, error
    assert not list(folder.glob(".*"))
    return printed


class TestConvert:
    @pytest.mark.parametrize("name", ["BraTS", "Other"])
    def test_the_second_one_is_refused(self, source: Path, raw: Path, name: str) -> None:
        arguments = ["brats-convert", "-i", str(source), "-d", "501", "-np", "1"]
        printed = both(slow("brats", "write_case", arguments), raw, lambda: command([*arguments, "-name", name]))
        assert f"training cases: {CASES}\n" in printed
        assert len(list((raw / "Dataset501_BraTS/labelsTr").iterdir())) == CASES
        assert len(list((raw / "Dataset501_BraTS/imagesTr").iterdir())) == 4 * CASES
        assert [path.name for path in raw.iterdir()] == ["Dataset501_BraTS"]

    def test_others_are_not_disturbed(self, source: Path, raw: Path) -> None:
        arguments = ["brats-convert", "-i", str(source), "-np", "1", "-d"]
        processes = [command([*arguments, number]) for number in ("501", "502")]
        errors = [process.communicate()[1] for process in processes]
        assert [process.returncode for process in processes] == [0, 0], errors
        for folder in raw.iterdir():
            assert len(list((folder / "labelsTr").iterdir())) == CASES

    def test_after_a_kill(self, source: Path, raw: Path) -> None:
        arguments = ["brats-convert", "-i", str(source), "-d", "501", "-np", "1"]
        printed = kill_and_repeat(slow("brats", "write_case", arguments), raw, lambda: command(arguments))
        assert f"training cases: {CASES}\n" in printed
        assert len(list((raw / "Dataset501_BraTS/labelsTr").iterdir())) == CASES


class TestExport:
    def test_the_second_one_is_refused(self, predictions: Path, tmp_path: Path) -> None:
        output = tmp_path / "out" / "export"
        arguments = ["brats-export", "-i", str(predictions), "-o", str(output), "--scheme", "2018", "-np", "1"]
        first = slow("brats_export", "export_case", arguments, after=CASES + 3)
        printed = both(first, output.parent, lambda: command(arguments))
        assert f"{output}: {CASES} cases\n" in printed
        assert len(list(output.iterdir())) == CASES

    def test_after_a_kill(self, predictions: Path, tmp_path: Path) -> None:
        output = tmp_path / "out" / "export"
        arguments = ["brats-export", "-i", str(predictions), "-o", str(output), "--scheme", "2018", "-np", "1"]
        first = slow("brats_export", "export_case", arguments, after=CASES + 3)
        kill_and_repeat(first, output.parent, lambda: command(arguments))
        assert len(list(output.iterdir())) == CASES


class TestSparsify:
    def test_the_second_one_is_refused(self, dataset: Path) -> None:
        arguments = ["sparsify", "-d", "7", "-o", "8", "--every", "4", "-np", "1"]
        printed = both(slow("sparse", "_write_case", arguments), dataset.parent, lambda: command(arguments))
        assert f"training cases:   {CASES}\n" in printed
        made = dataset.with_name("Dataset008_ToySparse")
        assert len(list((made / "labelsTr").iterdir())) == CASES
        assert len(list((made / "imagesTr").iterdir())) == CASES

    def test_after_a_kill(self, dataset: Path) -> None:
        arguments = ["sparsify", "-d", "7", "-o", "8", "--every", "4", "-np", "1"]
        kill_and_repeat(slow("sparse", "_write_case", arguments), dataset.parent, lambda: command(arguments))
        assert len(list((dataset.with_name("Dataset008_ToySparse") / "labelsTr").iterdir())) == CASES


class TestFoldersThatMayHoldFiles:
    @pytest.fixture
    def writer(self) -> Iterator[Callable[..., int]]:
        processes = []

        def hold(folder: Path, lock: str = ".lock") -> int:
            process = start(["-c", WRITE, str(folder), lock])
            processes.append(process)
            assert process.stdout is not None
            assert process.stdout.readline() == "writing\n"
            return process.pid

        yield hold
        for process in processes:
            process.communicate("\n")

    def test_residuals(self, dataset: Path, tmp_path: Path, writer: Callable[..., int]) -> None:
        pid = writer(tmp_path / "out")
        with pytest.raises(InputError, match=f"being written by process {pid}"):
            write_residual_maps(dataset / "labelsTr", tmp_path / "out", progress=False)
        write_residual_maps(dataset / "labelsTr", tmp_path / "other", progress=False)
        assert not list((tmp_path / "other").glob(".*"))

    def test_overlay(self, dataset: Path, tmp_path: Path, writer: Callable[..., int]) -> None:
        pid = writer(tmp_path / "out")
        legend = read_legend(dataset / "dataset.json")
        with pytest.raises(InputError, match=f"being written by process {pid}"):
            write_overlays(dataset / "imagesTr", dataset / "labelsTr", tmp_path / "out", legend=legend, progress=False)

    def test_split(self, dataset: Path, writer: Callable[..., int]) -> None:
        preprocessed = Path(os.environ["nnUNet_preprocessed"]) / dataset.name
        pid = writer(preprocessed, ".splits_final.json.lock")
        with pytest.raises(InputError, match=f"being written by process {pid}"):
            split(7, progress=False)
        assert not (preprocessed / "splits_final.json").exists()

    def test_phantom(self, tmp_path: Path, writer: Callable[..., int]) -> None:
        from nnunet_conres.datasets.phantom import write_brats_phantoms

        pid = writer(tmp_path, ".out.lock")
        with pytest.raises(InputError, match=f"being written by process {pid}"):
            write_brats_phantoms(tmp_path / "out", training_cases=1, held_out_cases=0)
