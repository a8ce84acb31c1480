"""The benchmark of a comparison: it runs, and the second run takes less memory and processor time."""

import json
from pathlib import Path

import pytest
from benchmark import main


@pytest.mark.slow
def test_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--cases", "10", "--models", "2", "--shape", "16", "16", "16", "--folder", str(tmp_path)]
    main(["compare", *arguments, "-o", str(tmp_path / "report.json")])
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    first, second = report["contenders"].values()
    # the first run reads images and executes networks, which needs PyTorch
    assert second["memory_bytes"] < 300e6 < first["memory_bytes"]
    assert 0 < second["processor_seconds"] < first["processor_seconds"]
    assert report["report_bytes"] > 100_000
    assert "10 cases of 16 x 16 x 16 voxels, 2 models" in capsys.readouterr().out
