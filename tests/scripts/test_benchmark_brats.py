"""The comparison of conversions: every converter runs, and all write the same labels."""

import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
from benchmark import main
from benchmarks import brats


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("brats")
    brats.write_cases(folder, 2, (18, 17, 16))
    return folder / "cases"


def read(path: Path) -> np.ndarray:
    return SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path)))


def test_all_write_the_same_labels(cases: Path, tmp_path: Path) -> None:
    found = {}
    for name, convert in brats.contestants(cases, 1).items():
        folder = tmp_path / str(len(found))
        folder.mkdir()
        convert(folder)
        found[name] = sorted(folder.rglob("labelsTr/*.nii.gz"))
    assert not found.pop(brats.CHECKS)
    reference = found[brats.SCRIPT]
    assert len(reference) == 2
    for name, paths in found.items():
        assert [path.name for path in paths] == [path.name for path in reference], name
        for path, expected in zip(paths, reference, strict=True):
            np.testing.assert_array_equal(read(path), read(expected), err_msg=name)
            images = list((path.parent.parent / "imagesTr").glob(f"{path.name[:-7]}_*.nii.gz"))
            assert len(images) == 4, name


def test_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--cases", "1", "--shape", "16", "16", "16", "--rounds", "1", "--warmup", "0", "--processes", "1"]
    main(["brats", *arguments, "--folder", str(tmp_path), "-o", str(tmp_path / "report.json")])
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    seconds = {name: entry["seconds"]["median"] for name, entry in report["contenders"].items()}
    for name, contestant, reference, at_most in brats.TARGETS:
        ratio = report["ratios"][name]
        assert ratio["measured"] == pytest.approx(seconds[contestant] / seconds[reference])
        assert ratio["at_most"] == at_most
    assert "1 cases of 16 x 16 x 16 voxels" in capsys.readouterr().out
