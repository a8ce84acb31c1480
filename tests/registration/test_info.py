import json
import os
import platform
from pathlib import Path

import pytest

import nnunet_conres
from nnunet_conres.registration import TRAINER_FOLDER, TRAINERS, VARIABLE, info
from nnunet_conres.registration.info import collect

PATHS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")


@pytest.fixture(autouse=True)
def _healthy(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment in which all is well, for each test to spoil."""
    monkeypatch.setenv(VARIABLE, TRAINER_FOLDER)
    for name in PATHS:
        monkeypatch.delenv(name, raising=False)
    versions = {"nnunetv2": "2.8.1", "torch": "2.10.0"}
    monkeypatch.setattr(info, "installed_version", versions.get)
    monkeypatch.setattr(info, "version_problem", lambda: None)


def test_all_is_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("nnUNet_raw", "/data/raw")
    found = collect()
    assert found.ok
    assert found.problems == []
    assert found.nnunet_recent_enough
    assert found.versions == {
        "nnunet-conres": nnunet_conres.__version__,
        "nnunetv2": "2.8.1",
        "torch": "2.10.0",
        "python": platform.python_version(),
    }
    assert found.paths == {"nnUNet_raw": "/data/raw", "nnUNet_preprocessed": None, "nnUNet_results": None}
    assert (found.discovery.active, found.discovery.folder) == (True, TRAINER_FOLDER)
    assert found.discovery.other_folders == []
    text = found.as_text()
    assert "active" in text
    assert "PROBLEM" not in text
    for line in ("2.8.1", "/data/raw", "not set", *TRAINERS, *TRAINERS.values()):
        assert line in text


def test_json_is_the_same_in_json() -> None:
    found = collect()
    read = json.loads(json.dumps(found.as_json()))
    assert read["ok"] is True
    assert read["discovery"]["active"] is True
    assert read["trainers"] == TRAINERS
    assert read["versions"]["nnunetv2"] == "2.8.1"


def test_other_folders_are_listed_in_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    gone = str(tmp_path / "gone")
    monkeypatch.setenv(VARIABLE, os.pathsep.join([gone, TRAINER_FOLDER, str(tmp_path)]))
    found = collect()
    assert found.ok
    assert found.discovery.other_folders == [info.Folder(gone, False), info.Folder(str(tmp_path), True)]
    assert f"{gone} (does not exist)" in found.as_text()


def test_inactive_discovery_comes_with_the_command_that_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "/mine")
    found = collect()
    assert not found.ok
    assert not found.discovery.active
    assert os.pathsep.join(["/mine", TRAINER_FOLDER]) in found.problems[0]
    assert "--target" in found.problems[0]
    assert "NOT ACTIVE" in found.as_text()


def test_nnunet_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(info, "version_problem", lambda: "nnU-Net 2.0 is too old")
    found = collect()
    assert not found.ok
    assert not found.nnunet_recent_enough
    assert "PROBLEM: nnU-Net 2.0 is too old" in found.as_text()


def test_missing_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(info, "installed_version", {"nnunetv2": "2.8.1"}.get)
    found = collect()
    assert not found.ok
    assert "torch               not installed" in found.as_text()
    assert found.problems[0].startswith("PyTorch is not installed")
