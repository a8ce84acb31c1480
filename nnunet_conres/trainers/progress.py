"""A line with the progress, the losses and the remaining time of a training."""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections import deque
from typing import Any, ClassVar

import torch

from nnunet_conres.text import duration
from nnunet_conres.trainers.resume import ResumableTrainer

_CLEAR_LINE = "\r\x1b[K"
# Assumed ratio until the first validation step is timed: it has no backward pass.
_VALIDATION_PER_TRAINING_STEP = 1 / 3


class ProgressTrainer(ResumableTrainer):
    """nnU-Net's trainer, which shows its progress within an epoch, and on a CPU logs its share of the cores.

    On a terminal a single line is updated. Elsewhere, for example in the output of a job, new lines are printed at
    longer intervals. None of them go to the log file of the training.

    Attributes:
        progress_seconds: Minimum time between two lines if the output is not a terminal.
    """

    progress_seconds: ClassVar[float] = 60.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._step_seconds: dict[str, deque[float]] = {phase: deque(maxlen=50) for phase in ("train", "val")}
        self._step_ended = self._progress_shown = time.monotonic()
        self._epoch_clocks = self._step_ended, time.process_time()
        self._validation_steps = 0
        self._line_is_open = False

    def on_epoch_start(self) -> None:
        super().on_epoch_start()
        self._epoch_clocks = time.monotonic(), time.process_time()

    def on_epoch_end(self) -> None:
        if self.device.type == "cpu":
            seconds, used = time.monotonic() - self._epoch_clocks[0], time.process_time() - self._epoch_clocks[1]
            # Far below 1 if the machine does other work; then the times are not comparable.
            share = used / max(seconds * torch.get_num_threads(), 1e-9)
            self.print_to_log_file(f"Share of the CPU cores used: {share:.2f}")
        super().on_epoch_end()

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        self._validation_steps, self._step_ended = 0, time.monotonic()

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self._validation_steps, self._step_ended = 0, time.monotonic()

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        outputs = super().train_step(batch)
        self._show_progress("train")
        return outputs

    def validation_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        outputs = super().validation_step(batch)
        self._validation_steps += 1
        self._show_progress("val")
        return outputs

    def print_to_log_file(self, *args: Any, **kwargs: Any) -> None:
        # nnU-Net's constructor prints before the attribute is set
        if getattr(self, "_line_is_open", False):
            self._line_is_open = False
            print(_CLEAR_LINE, end="", flush=True)
        super().print_to_log_file(*args, **kwargs)

    def _show_progress(self, phase: str) -> None:
        now = time.monotonic()
        self._step_seconds[phase].append(now - self._step_ended)
        self._step_ended = now
        on_terminal = sys.stdout.isatty()
        if self.local_rank != 0 or now - self._progress_shown < (1.0 if on_terminal else self.progress_seconds):
            return
        self._progress_shown = now
        if on_terminal:
            self._line_is_open = True
            print(f"{_CLEAR_LINE}{self.progress()}", end="", flush=True)
        else:
            print(self.progress(), flush=True)

    def progress(self) -> str:
        """Return the line: epoch, iteration, mean losses of the last iterations, time left to the final validation."""
        done, total = len(self._epoch_outputs), self._full_epoch_iterations
        last = self._epoch_outputs[-10:]
        losses = []
        for key in last[-1] if last else ():
            if key.endswith("loss"):
                values = [value for step in last if math.isfinite(value := float(step[key]))]
                losses.append(f"{key.replace('_', ' ')} {statistics.mean(values) if values else math.nan:.3f}")
        where = f"iteration {done} of {total}"
        if self._validation_steps and done == total:
            where = f"validation {self._validation_steps} of {self.num_val_iterations_per_epoch}"
        parts = [f"Epoch {self.current_epoch + 1} of {self.num_epochs}", where, *losses]
        return ", ".join([*parts, f"{duration(self.seconds_left())} left"])

    def seconds_left(self) -> float:
        """Estimate the time until the last epoch ends, from the median times of the last steps."""
        median = {phase: statistics.median(seconds) for phase, seconds in self._step_seconds.items() if seconds}
        train = median.get("train", median.get("val", 0.0) / _VALIDATION_PER_TRAINING_STEP)
        val = median.get("val", train * _VALIDATION_PER_TRAINING_STEP)
        epochs = self.num_epochs - self.current_epoch
        return train * max(0, epochs * self._full_epoch_iterations - len(self._epoch_outputs)) + val * max(
            0, epochs * self.num_val_iterations_per_epoch - self._validation_steps
        )
