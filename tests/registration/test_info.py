import json
import os
import platform
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import nnunet_conres
from nnunet_conres.families import TRAINERS, TRAINING_LENGTHS
from nnunet_conres.registration import TRAINER_FOLDER, VARIABLE, info
from nnunet_conres.registration.info import collect

GPUS = info.gpus
PATHS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")


@pytest.fixture(autouse=True)
def _healthy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set up an environment without problems. Each test then introduces its own."""
    monkeypatch.setenv(VARIABLE, TRAINER_FOLDER)
    for name in PATHS:
        monkeypatch.delenv(name, raising=False)
    versions = {"nnunetv2": "2.8.1", "torch": "2.10.0"}
    monkeypatch.setattr(info, "installed_version", versions.get)
    monkeypatch.setattr(info, "version_problem", lambda: None)
    monkeypatch.setattr(info, "gpus", list)


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
    for line in ("2.8.1", "/data/raw", "not set"):
        assert line in text


class TestTrainers:
    @pytest.fixture
    def lengths(self) -> set[str]:
        """Return the trainers that differ from another trainer only in their number of epochs."""
        return {name for name in TRAINERS if name.endswith(tuple(f"_{ending}" for ending in TRAINING_LENGTHS))}

    def lines(self, **options: object) -> dict[str, tuple[str, str]]:
        """Return the mark before the name of each trainer, and its description."""
        text = collect().as_text(**options).split(" epochs)\n")[1]
        lines = [line.partition("nnUNetTrainer") for line in text.splitlines()]
        return {(name + rest).split()[0]: (mark, rest.split(maxsplit=1)[1]) for mark, name, rest in lines if name}

    def test_one_line_for_each_family(self, lengths: set[str]) -> None:
        found = self.lines()
        assert {name: text for name, (_, text) in found.items()} == {
            name: text for name, text in TRAINERS.items() if name not in lengths
        }
        with_others = {name.rpartition("_")[0] for name in lengths}
        assert {name for name, (mark, _) in found.items() if mark == "* "} == with_others

    def test_the_lengths_are_named_once(self) -> None:
        text = collect().as_text()
        numbers = re.findall(r"\d+", text.splitlines()[-1])
        assert [int(number) for number in numbers] == list(TRAINING_LENGTHS.values())
        assert "--all" in text

    def test_every_length_on_request(self) -> None:
        found = self.lines(every_length=True)
        assert {name: text for name, (_, text) in found.items()} == TRAINERS
        assert {mark for mark, _ in found.values()} == {"  "}

    @pytest.mark.parametrize("width", [20, 60, 80, 200])
    def test_wrapped_for_a_terminal(self, width: int) -> None:
        text = collect().as_text(width=width).split(" epochs)\n")[1]
        longest = 2 + max(len(name) for name in self.lines()) + 2
        assert max(map(len, text.splitlines())) <= max(width, longest + 30)
        assert text.split() == collect().as_text().split(" epochs)\n")[1].split()

    def test_all_is_on_one_screen(self) -> None:
        lines = collect().as_text(width=80).splitlines()
        assert len(lines) <= 24
        assert max(map(len, lines)) <= 80


class TestGpus:
    @pytest.fixture
    def answer(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Make nvidia-smi report a GPU."""
        program = tmp_path / "nvidia-smi"
        program.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 81559 MiB'\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
        monkeypatch.setattr(sys, "platform", "linux")

    @pytest.mark.skipif(os.name == "nt", reason="needs a POSIX shell")
    @pytest.mark.usefixtures("answer")
    @pytest.mark.parametrize("build", ["'13.0'", "None"])
    def test_are_those_that_the_driver_names(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, build: str) -> None:
        (tmp_path / "version.py").write_text(f"cuda: Optional[str] = {build}\nhip: Optional[str] = None\n")
        place = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
        monkeypatch.setattr(info, "find_spec", lambda name: place)
        (found,) = GPUS()
        assert found.startswith("NVIDIA H100 80GB HBM3, 81559 MiB")
        assert ("built for the CPU only" in found) == (build == "None")

    def test_none_without_a_driver(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.setattr(sys, "platform", "linux")
        assert GPUS() == []

    def test_torch_is_looked_at_without_importing_it(self) -> None:
        import torch

        has_gpu_support = torch.version.cuda is not None or torch.version.hip is not None
        assert info._torch_has_cuda() is has_gpu_support


@pytest.mark.parametrize("name", ["nnunet_conres.start", "nnunet_conres.pth"])
def test_tells_which_startup_file_was_read(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(sys.modules, "_nnunet_conres_startup", SimpleNamespace(activated_by=name))
    assert collect().discovery.startup_file == name
    assert f"discovery           active ({name})\n" in collect().as_text()


def test_without_a_startup_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "_nnunet_conres_startup", raising=False)
    found = collect()
    assert found.ok  # the variable may have been set by hand
    assert found.discovery.startup_file is None
    assert "no start-up file was read; the variable was set by hand" in found.as_text()


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
    assert "torch not installed" in found.as_text()
    assert found.problems[0].startswith("PyTorch is not installed")
