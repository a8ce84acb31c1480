"""The quickstart script, without its steps that take minutes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(os.name == "nt", reason="needs a POSIX shell")


def run(
    repository_root: Path, *arguments: str, code: str = 'main "$@"', **more: str
) -> subprocess.CompletedProcess[str]:
    """Run the script, or `code` with the script's functions."""
    script = (repository_root / "scripts" / "quickstart.sh").read_text().removesuffix('main "$@"\n')
    return subprocess.run(
        ["bash", "-c", script + code, str(repository_root / "scripts" / "quickstart.sh"), *arguments],
        env=os.environ | more,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--size", "huge"), "--size is huge; expected small or gpu."),
        (("--device", "tpu"), "--device is tpu; expected cpu, cuda or mps."),
        (("--epochs",), "unknown option --epochs"),
    ],
)
def test_wrong_arguments_are_named(repository_root: Path, arguments: tuple[str, ...], message: str) -> None:
    done = run(repository_root, *arguments)
    assert done.returncode == 1
    assert message in done.stderr


class TestLock:
    CODE = 'PROJECT=x; WORK="$1"; FRESH=yes; enter_work_folder; echo entered'

    def test_a_second_run_is_refused_and_deletes_nothing(self, repository_root: Path, tmp_path: Path) -> None:
        first = run(repository_root, str(tmp_path), code=self.CODE)
        assert "entered" in first.stdout
        assert not (tmp_path / ".lock").exists()  # released at the end
        (tmp_path / "nnUNet_results" / "model").mkdir()
        (tmp_path / ".lock").write_text(f"{os.getpid()}\n")
        second = run(repository_root, str(tmp_path), code=self.CODE)
        assert second.returncode == 1
        assert f"another quickstart, process {os.getpid()}, works in {tmp_path}" in second.stderr
        assert (tmp_path / "nnUNet_results" / "model").is_dir()
        assert (tmp_path / ".lock").exists()

    def test_that_of_a_killed_run_does_not_count(self, repository_root: Path, tmp_path: Path) -> None:
        (tmp_path / ".nnunet-conres-quickstart").touch()
        gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
        (tmp_path / ".lock").write_text(gone.stdout)
        assert "entered" in run(repository_root, str(tmp_path), code=self.CODE).stdout


def test_the_progress_of_a_training_is_shown_without_a_terminal(repository_root: Path, tmp_path: Path) -> None:
    log = tmp_path / "train.log"
    log.write_text("Epoch 1\nEpoch 1 of 4, iteration 3 of 20, loss 0.5, 2 min 5 s left\n")
    code = 'sleep() { :; }; SECONDS=65; (show_progress 0 "$1") | head -n 1'
    done = run(repository_root, str(log), code=code)
    assert done.stdout == "    1 min 05 s  Epoch 1 of 4, iteration 3 of 20, loss 0.5, 2 min 5 s left\n"


def test_trainers_differ_in_network_and_optimiser_only(repository_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("nnUNet_extTrainer", str(repository_root / "scripts" / "quickstart_trainers"))
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    names = ("nnUNetTrainerQuickstart", "nnUNetTrainerMuonQuickstart", "nnUNetTrainerConResNetQuickstart")
    stock, muon, conresnet = map(recursive_find_trainer_class_by_name, names)
    assert stock.configure_optimizers is nnUNetTrainer.configure_optimizers
    assert muon.configure_optimizers is conresnet.configure_optimizers is not stock.configure_optimizers
    assert stock.architecture.__func__ is muon.architecture.__func__ is not conresnet.architecture.__func__
    for attribute in ("training_epochs", "checkpoint_interval_minutes", "progress_seconds", "training_lr", "_autocast"):
        assert len({getattr(trainer, attribute) for trainer in (stock, muon, conresnet)}) == 1
    assert stock.checkpoint_interval_minutes == 0.5
