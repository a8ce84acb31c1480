import argparse
import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import nnunet_conres
from nnunet_conres import cli
from nnunet_conres.cli.arguments import number_of_processes
from nnunet_conres.errors import InputError
from nnunet_conres.families import TRAINERS
from nnunet_conres.locks import LockedError
from nnunet_conres.registration import TRAINER_FOLDER, VARIABLE
from nnunet_conres.workflow.step import StepError


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
        # Minimum processor time over several runs, so that other work of the machine does not count.
        seconds = []
        for _ in range(3):
            begin = os.times()
            command = [sys.executable, "-m", "nnunet_conres.cli", "info"]
            run = subprocess.run(command, cwd=repository_root, capture_output=True, text=True, check=False)
            end = os.times()
            seconds.append(end.children_user + end.children_system - begin.children_user - begin.children_system)
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
        reported = capsys.readouterr().err
        assert stop.value.code == 2
        assert reported.startswith(f"usage: nnunet-conres {name} ")
        assert reported.endswith(f"nnunet-conres {name}: error: unrecognized arguments: --cores 2\n")

    @pytest.fixture
    def _failing(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(arguments: argparse.Namespace) -> int:
            raise request.param

        def add(subparsers: "cli.Subparsers") -> None:
            subparsers.add_parser("fail").set_defaults(handler=fail)

        monkeypatch.setattr(cli, "_SUBCOMMANDS", (add,))

    @pytest.mark.parametrize(
        "_failing", [InputError("what and why"), StepError("what and why"), LockedError("what and why")], indirect=True
    )
    @pytest.mark.usefixtures("_failing")
    def test_one_that_the_user_can_mend_is_a_line(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["fail"]) == 2
        assert capsys.readouterr() == ("", "nnunet-conres: error: what and why\n")

    @pytest.mark.parametrize("_failing", [KeyboardInterrupt()], indirect=True)
    @pytest.mark.usefixtures("_failing")
    def test_ctrl_c_is_a_line(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["fail"]) == 130
        assert capsys.readouterr() == ("", "nnunet-conres: interrupted\n")

    @pytest.mark.parametrize(
        "_failing",
        [
            TypeError("ours"),
            ValueError("ours"),
            RuntimeError("ours"),
            FileNotFoundError(errno.ENOENT, "ours"),
            BrokenPipeError(errno.EPIPE, "the pipe to a worker process"),
        ],
        indirect=True,
    )
    @pytest.mark.usefixtures("_failing")
    def test_one_of_ours_is_not_hidden(self, request: pytest.FixtureRequest) -> None:
        expected = request.node.callspec.params["_failing"]
        with pytest.raises(type(expected)) as caught:
            cli.main(["fail"])
        assert caught.value is expected


@pytest.mark.skipif(os.name == "nt", reason="needs a POSIX shell")
class TestOutput:
    """The reader of the output may end early, and the file for the output may not fit on the disk."""

    def run(self, arguments: str, reader: str, folder: Path) -> subprocess.CompletedProcess[str]:
        command = f"{sys.executable} -m nnunet_conres.cli {arguments} {reader}; exit ${{PIPESTATUS[0]}}"
        return subprocess.run(["bash", "-c", command], cwd=folder, capture_output=True, text=True, check=False)

    @pytest.mark.parametrize("arguments", ["info --all", "info --json", "--help", "workflow --example brats"])
    def test_a_closed_pipe_is_no_error(self, arguments: str, repository_root: Path) -> None:
        run = self.run(arguments, "| true", repository_root)
        assert run.stderr == ""
        assert run.returncode in (0, 1, 141)

    def test_a_reader_that_ends_in_the_middle(self, repository_root: Path, tmp_path: Path) -> None:
        code = (
            "import sys; from nnunet_conres import cli;"
            "cli._SUBCOMMANDS = (lambda parsers: parsers.add_parser('many').set_defaults("
            "handler=lambda arguments: [print(n) for n in range(100_000)]),);"
            "sys.exit(cli.main(['many']))"
        )
        command = f'{sys.executable} -c "{code}" | head -1; exit ${{PIPESTATUS[0]}}'
        run = subprocess.run(["bash", "-c", command], cwd=repository_root, capture_output=True, text=True, check=False)
        assert (run.stdout, run.stderr, run.returncode) == ("0\n", "", 141)

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device that is always full")
    @pytest.mark.parametrize("arguments", ["info", "workflow --example brats"])
    def test_a_full_disk_is_reported(self, arguments: str, repository_root: Path) -> None:
        run = self.run(arguments, "> /dev/full", repository_root)
        assert run.stderr.startswith("nnunet-conres: error: standard output: No space left on device.")
        assert (len(run.stderr.splitlines()), run.returncode) == (1, 2)


def test_number_of_processes_names_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    for text in ("many", "0", "²", ""):
        monkeypatch.setenv("nnUNet_def_n_proc", text)
        assert number_of_processes(3) == 3
        with pytest.raises(InputError, match=f"nnUNet_def_n_proc is '{text}'"):
            number_of_processes(None)
    monkeypatch.delenv("nnUNet_def_n_proc")
    assert number_of_processes(None) == 8
    with pytest.raises(InputError, match="-np is 0"):
        number_of_processes(0)
