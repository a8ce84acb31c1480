"""The line that shows the progress of a training."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nnunet_conres.text import duration
from nnunet_conres.trainers import nnUNetTrainerConResNet

LINE = re.compile(
    r"Epoch (\d) of 2, (iteration|validation) (\d) of (\d), loss (\S+), segmentation loss (\S+), "
    r"residual loss (\S+), .+ left"
)


class OftenShown(nnUNetTrainerConResNet):
    progress_seconds = 0.0


def test_a_line_for_every_step_without_a_terminal(
    make_trainer: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = make_trainer(OftenShown)
    trainer.run_training()
    found = [LINE.fullmatch(line) for line in capsys.readouterr().out.splitlines()]
    lines = [line.groups() for line in found if line]
    steps = [("iteration", str(n), "3") for n in (1, 2, 3)] + [("validation", str(n), "2") for n in (1, 2)]
    assert [line[:4] for line in lines] == [(epoch, *step) for epoch in "12" for step in steps]
    # mean over the three steps of the first epoch, which is what nnU-Net logs
    assert float(lines[2][4]) == pytest.approx(trainer.logger.get_value("train_losses", step=0), abs=6e-4)
    assert "iteration" not in Path(trainer.log_file).read_text()
    assert trainer.seconds_left() == 0


def test_one_line_on_a_terminal(
    make_trainer: Callable[..., Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(nnUNetTrainerConResNet)
    trainer.on_train_start()
    trainer.on_epoch_start()
    trainer.on_train_epoch_start()
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    trainer._progress_shown -= 2
    capsys.readouterr()
    trainer.train_step(next(trainer.dataloader_train))
    trainer.print_to_log_file("next")
    out = capsys.readouterr().out
    assert out.startswith("\r\x1b[KEpoch 1 of 2, iteration 1 of 3, loss")
    assert out.split("\r\x1b[K")[2].endswith("next\n")


def test_the_time_left_counts_every_step_that_is_to_come(make_trainer: Callable[..., Any]) -> None:
    trainer = make_trainer(nnUNetTrainerConResNet)
    trainer._full_epoch_iterations, trainer._step_seconds["train"] = 3, [2.0]
    # two epochs of 3 steps and 2 validation steps, which count as a third of a step until one was timed
    assert trainer.seconds_left() == pytest.approx(2 * 6 + 4 * 2 / 3)
    trainer._step_seconds["val"], trainer.current_epoch = [1.0], 1
    assert trainer.seconds_left() == pytest.approx(2 * 3 + 2)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.6, "1 min 0 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
