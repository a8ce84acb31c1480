import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

import nnunet_conres
from nnunet_conres import cli
from nnunet_conres.cli.arguments import number_of_processes
from nnunet_conres.registration import TRAINER_FOLDER, TRAINERS, VARIABLE


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"nnunet-conres {nnunet_conres.__version__}\n"


def test_without_a_command_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([])
    assert stop.value.code == 2
    assert "COMMAND" in capsys.readouterr().err


class TestInfo:
    def test_exit_code_tells_whether_all_is_well(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(VARIABLE, TRAINER_FOLDER)
        assert cli.main(["info"]) == 0
        monkeypatch.delenv(VARIABLE)
        assert cli.main(["info"]) == 1

    def test_all_lists_every_trainer(self, capsys: pytest.CaptureFixture[str]) -> None:
        cli.main(["info"])
        families = capsys.readouterr().out
        cli.main(["info", "--all"])
        text = capsys.readouterr().out
        for name, description in TRAINERS.items():
            assert any(line.split(maxsplit=1) == [name, description] for line in text.splitlines())
        assert len(families.splitlines()) < len(text.splitlines()) / 2

    def test_json(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        monkeypatch.setenv(VARIABLE, TRAINER_FOLDER)
        cli.main(["info", "--json"])
        read = json.loads(capsys.readouterr().out)
        assert read["ok"] is True
        assert read["trainers"] == TRAINERS

    def test_answers_in_half_a_second(self, repository_root: Path) -> None:
        # The best of some: what else the machine is doing does not count.
        seconds = []
        for _ in range(5):
            begin = time.perf_counter()
            command = [sys.executable, "-m", "nnunet_conres.cli", "info"]
            run = subprocess.run(command, cwd=repository_root, capture_output=True, text=True, check=False)
            seconds.append(time.perf_counter() - begin)
            assert "Trainers" in run.stdout
        assert min(seconds) < 0.5


class TestErrors:
    @pytest.mark.parametrize("name", ["info", "compare", "brats-convert"])
    def test_an_unknown_option_shows_the_usage_of_its_subcommand(
        self, name: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        needed = {"info": [], "compare": ["-o", "x"], "brats-convert": ["-i", "x", "-d", "501"]}[name]
        with pytest.raises(SystemExit) as stop:
            cli.main([name, *needed, "--cores", "2"])
        told = capsys.readouterr().err
        assert stop.value.code == 2
        assert told.startswith(f"usage: nnunet-conres {name} ")
        assert told.endswith(f"nnunet-conres {name}: error: unrecognized arguments: --cores 2\n")

    @pytest.fixture
    def _failing(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(arguments: argparse.Namespace) -> int:
            raise request.param

        def add(subparsers: "cli.Subparsers") -> None:
            subparsers.add_parser("fail").set_defaults(handler=fail)

        monkeypatch.setattr(cli, "_SUBCOMMANDS", (add,))

    @pytest.mark.parametrize(
        "_failing",
        [ValueError("what and why"), RuntimeError("what and why"), FileNotFoundError("what and why")],
        indirect=True,
    )
    @pytest.mark.usefixtures("_failing")
    def test_one_that_the_user_can_mend_is_a_line(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["fail"]) == 2
        assert capsys.readouterr() == ("", "nnunet-conres: error: what and why\n")

    @pytest.mark.parametrize("_failing", [TypeError("a fault of ours")], indirect=True)
    @pytest.mark.usefixtures("_failing")
    def test_one_of_ours_is_not_hidden(self) -> None:
        with pytest.raises(TypeError):
            cli.main(["fail"])


def test_number_of_processes_names_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("nnUNet_def_n_proc", "many")
    assert number_of_processes(3) == 3
    with pytest.raises(ValueError, match="nnUNet_def_n_proc is 'many'"):
        number_of_processes(None)
