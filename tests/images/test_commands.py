"""The same bad file, and the same full disk, for every command that reads or writes images."""

from __future__ import annotations

import gzip
import json
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
from matplotlib.image import imread

from nnunet_conres import cli
from nnunet_conres.images.nifti import is_nifti, read_nifti

SHAPE = (34, 32, 30)  # x, y, z
LABELS = {"background": 0, "whole_tumor": [1, 2, 3], "tumor_core": [2, 3], "enhancing_tumor": 3}
STRAIGHT = np.diag([-1.0, -1.0, 2.0, 1.0])
SHEARED = STRAIGHT + np.array([[0, 0.3, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
CASE = "Brats18_A_1"


def save(path: Path, voxels: np.ndarray, affine: np.ndarray = STRAIGHT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(voxels, affine), path)
    return path


def labels_of(seed: int, block: int = 8) -> np.ndarray:
    """Return random labels in blocks, whose outlines are fast to draw. Blocks of 1 voxel give large files."""
    blocks = np.random.default_rng(seed).integers(0, 4, [-(-size // block) for size in SHAPE]).astype(np.uint8)
    return np.kron(blocks, np.ones((block,) * 3, np.uint8))[tuple(slice(size) for size in SHAPE)]


def write_all(root: Path, affine: np.ndarray, block: int = 8) -> None:
    """Write a raw data set, predictions for it, and BraTS cases."""
    dataset = root / "raw" / "Dataset007_Thing"
    for case_id, seed in ((CASE, 0), ("Brats18_B_1", 1)):
        image = np.random.default_rng(seed).normal(100, 10, SHAPE).astype(np.float32)
        save(dataset / "imagesTr" / f"{case_id}_0000.nii.gz", image, affine)
        for folder, other in ((dataset / "labelsTr", 0), (root / "predictions", 10)):
            save(folder / f"{case_id}.nii.gz", labels_of(seed + other, block), affine)
        for modality in ("flair", "t1", "t1ce", "t2"):
            save(root / "brats" / case_id / f"{case_id}_{modality}.nii", image, affine)
        save(
            root / "brats" / case_id / f"{case_id}_seg.nii", (labels_of(seed, block) * 4 // 3).astype(np.int16), affine
        )
    content = {"channel_names": {"0": "T1"}, "labels": LABELS, "regions_class_order": [1, 2, 3], "numTraining": 2}
    for folder in (dataset, root / "predictions"):
        (folder / "dataset.json").write_text(json.dumps(content | {"file_ending": ".nii.gz"}))


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
    write_all(tmp_path, STRAIGHT)
    return tmp_path


def arguments_of(root: Path) -> dict[str, list[str]]:
    """Return command lines by name, with `out` as the output folder."""
    dataset, predictions, out = root / "raw" / "Dataset007_Thing", root / "predictions", root / "out"
    djfile = ["-djfile", str(dataset / "dataset.json")]
    compared = ["--reference", dataset / "labelsTr", "-i", dataset / "imagesTr", "--no_ensembles", "-np", "1"]
    lines = {
        "split": ["split", "-d", "7", "--folds", "2", "-np", "1"],
        "sparsify": ["sparsify", "-d", "7", "-o", "8", "--every", "5", "-np", "1"],
        "overlay": [
            "overlay",
            "-i",
            dataset / "imagesTr",
            "--predictions",
            predictions,
            "-ref",
            dataset / "labelsTr",
            *djfile,
        ],
        "residuals": ["residuals", "-i", dataset / "labelsTr"],
        "compare": ["compare", "--predictions", f"A={predictions}", f"B={dataset / 'labelsTr'}", *compared, *djfile],
        "brats-convert": ["brats-convert", "-i", root / "brats", "-d", "9", "-np", "1"],
        "brats-export": ["brats-export", "-i", predictions, "--scheme", "2018", "-np", "1"],
        "phantom": ["phantom", "-n", "1", "--held-out", "0"],
    }
    with_output = ("overlay", "residuals", "compare", "brats-export", "phantom")
    return {name: [str(part) for part in [*line, *(["-o", out] if name in with_output else [])]]
            for name, line in lines.items()}  # fmt: skip


def read_by(root: Path, command: str) -> Path:
    """Return a label file that the command reads."""
    files = {
        "brats-convert": root / "brats" / CASE / f"{CASE}_seg.nii",
        "brats-export": root / "predictions" / f"{CASE}.nii.gz",
    }
    return files.get(command, root / "raw" / "Dataset007_Thing" / "labelsTr" / f"{CASE}.nii.gz")


READERS = ("split", "sparsify", "overlay", "residuals", "compare", "brats-convert", "brats-export")


def error_of(root: Path, command: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.main(arguments_of(root)[command]) == 2
    captured = capsys.readouterr()
    return " ".join(captured.err.split())


@pytest.mark.parametrize("command", READERS)
@pytest.mark.parametrize("value", [np.nan, pytest.param(np.inf, marks=pytest.mark.slow)])
def test_labels_that_are_not_finite(root: Path, command: str, value: float, capsys: pytest.CaptureFixture[str]) -> None:
    """ITK reads such labels as 0, which would be annotated background."""
    path = read_by(root, command)
    voxels = np.asarray(nibabel.load(path).dataobj).astype(np.float32)
    voxels[3, 4, 5] = value
    save(path, voxels)
    assert f"{path} has 1 voxels that are NaN or infinite" in error_of(root, command, capsys)


@pytest.mark.parametrize("command", READERS)
def test_labels_cut_short(root: Path, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = read_by(root, command)
    path.write_bytes(path.read_bytes()[:-30])
    assert f"{path} cannot be read: it is cut short" in error_of(root, command, capsys)


@pytest.mark.parametrize("command", ["overlay", "residuals", "compare", "sparsify", "split"])
def test_labels_compressed_without_gz(root: Path, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """nnU-Net can't read a compressed file in a data set of .nii files."""
    for path in sorted(root.rglob("*.nii.gz")):
        path.with_name(path.name[:-3]).write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    for path in root.rglob("dataset.json"):
        path.write_text(path.read_text().replace(".nii.gz", ".nii"))
    wrong = read_by(root, command).with_name(f"{CASE}.nii")
    wrong.write_bytes(gzip.compress(wrong.read_bytes()))
    error = error_of(root, command, capsys)
    assert (
        f"{wrong} cannot be read: it is compressed, and its name does not say so; rename it to {CASE}.nii.gz" in error
    )


def test_brats_under_any_name(root: Path) -> None:
    """brats-convert recognises compressed files under any name, and writes files that nnU-Net can read."""
    folder = root / "brats" / CASE
    for part in ("seg", "t1"):
        path = folder / f"{CASE}_{part}.nii"
        path.write_bytes(gzip.compress(path.read_bytes()) + b"\x01\x02")
    path = folder / f"{CASE}_t2.nii"
    path.rename(folder / f"{CASE}_t2.nii.gz")
    assert cli.main(arguments_of(root)["brats-convert"]) == 0
    dataset = next((root / "raw").glob("Dataset009_*"))
    image = nibabel.load(folder / f"{CASE}_flair.nii").get_fdata()
    for channel in range(4):
        assert np.array_equal(nibabel.load(dataset / "imagesTr" / f"{CASE}_{channel:04d}.nii.gz").get_fdata(), image)
    assert np.array_equal(nibabel.load(dataset / "labelsTr" / f"{CASE}.nii.gz").get_fdata() > 0, labels_of(0) > 0)


def test_sheared_axes_and_pictures(root: Path) -> None:
    write_all(root, SHEARED)
    assert cli.main(arguments_of(root)["overlay"]) == 0
    assert sorted(path.name for path in (root / "out").iterdir()) == [f"{CASE}.png", "Brats18_B_1.png"]


@pytest.mark.slow
@pytest.mark.parametrize("reader", ["NibabelIO", "NibabelIOWithReorient", None])
def test_sheared_axes_are_read_as_nnunet_reads_them(
    root: Path, reader: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    """SimpleITK refuses sheared axes. nnU-Net reads them with nibabel, automatically or because of dataset.json."""
    commands = ("split", "sparsify", "overlay", "residuals", "compare")
    for command in commands:
        assert cli.main(arguments_of(root)[command]) == 0
    (root / "out").rename(root / "straight")
    shutil.rmtree(next((root / "raw").glob("Dataset008_*")))
    write_all(root, SHEARED)
    if reader is not None:
        for path in root.rglob("dataset.json"):
            content = json.loads(path.read_text())
            path.write_text(json.dumps(content | {"overwrite_image_reader_writer": reader}))
    for command in commands:
        assert cli.main(arguments_of(root)[command]) == 0, capsys.readouterr().err
    sparse = next((root / "raw").glob("Dataset008_*")) / "labelsTr" / f"{CASE}.nii.gz"
    maps = sorted((root / "out").glob("*_residual_*.nii.gz"))
    assert len(maps) == 6
    for path in (sparse, *maps):
        assert np.allclose(nibabel.load(path).affine, SHEARED, atol=1e-5)
    for path in maps:
        voxels = nibabel.load(path).get_fdata()
        assert np.array_equal(voxels, nibabel.load(root / "straight" / path.name).get_fdata())
    pictures = {path.name for path in (root / "straight").glob("*.png")}
    assert pictures == {path.name for path in (root / "out").glob("*.png")}
    assert len(pictures) == 4
    report = json.loads((root / "out" / "report.json").read_text())
    assert not [warning for warning in report["warnings"] if "No pictures" in warning]
    assert len(report["disagreements"]) == 2


@pytest.mark.parametrize(
    "command",
    [
        "sparsify",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("overlay", "residuals", "compare", "brats-convert", "brats-export", "phantom")
        ),
    ],
)
def test_on_a_full_disk_nothing_cut_stays(root: Path, command: str) -> None:
    """With a limit of 4 KiB per file, the error names a file, and no incomplete file is left."""
    write_all(root, STRAIGHT, block=1)
    before = {path for path in root.rglob("*") if path.is_file()}
    line = [sys.executable, "-m", "nnunet_conres.cli", *arguments_of(root)[command]]
    done = subprocess.run(
        ["bash", "-c", 'ulimit -f 4; exec "$@"', "bash", *line], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert str(root) in done.stderr.splitlines()[-1], done.stderr
    assert ".partial" not in done.stderr, "a temporary name says nothing to the user"
    assert any(part in done.stderr for part in ("File too large", "could not be written completely")), done.stderr
    after = {path for path in root.rglob("*") if path.is_file()} - before
    assert not [path for path in after if ".partial" in str(path)]
    for path in after:
        if is_nifti(path):
            read_nifti(path)
        elif path.suffix == ".png":
            imread(path)
    assert not list((root / "raw").glob("Dataset00[89]*"))
