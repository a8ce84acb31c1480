"""Checkpoints within an epoch, written atomically, and trainings that continue from the last step in them."""

from __future__ import annotations

import math
import os
import pickle
import time
from copy import deepcopy
from pathlib import Path
from typing import Any, Final

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from nnunet_conres import __version__
from nnunet_conres.errors import InputError
from nnunet_conres.plans.configurations import configuration_of, differences_in_topology, with_configuration

LATEST_CHECKPOINT: Final = "checkpoint_latest.pth"
FINAL_CHECKPOINT: Final = "checkpoint_final.pth"
CHECKPOINT_VARIABLE: Final = "nnUNet_conres_checkpoint_minutes"
"""Environment variable that overrides `checkpoint_interval_minutes` of all trainers."""


class ResumableTrainer(nnUNetTrainer):
    """nnU-Net's trainer, which continues within an epoch and loses only minutes if it is killed.

    The state of an unfinished epoch is kept in the log, which nnU-Net writes into checkpoints: see `LossPartsLogger`.

    Attributes:
        checkpoint_interval_minutes: Longest time between two versions of checkpoint_latest.pth, which is also written
            within an epoch and its validation. A killed training that continues with ``--c`` loses at most the steps of
            this time. The environment variable nnUNet_conres_checkpoint_minutes takes precedence.
    """

    checkpoint_interval_minutes: float = 5.0

    # set by nnU-Net's constructor, which is untyped
    num_iterations_per_epoch: int
    plans_manager: PlansManager
    configuration_manager: ConfigurationManager

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        interval = _checkpoint_interval(self.checkpoint_interval_minutes)
        super().__init__(*args, **kwargs)
        self.checkpoint_interval_minutes = interval
        self._full_epoch_iterations = self.num_iterations_per_epoch
        self._earlier_outputs: list[dict[str, Any]] = []
        self._epoch_outputs: list[dict[str, Any]] = []
        self._epoch_started = self._last_checkpoint = time.monotonic()

    @property
    def epoch_progress(self) -> float:
        """Share of the epoch's training steps that were taken, 0 to 1, including those before a checkpoint."""
        return len(self._epoch_outputs) / self._full_epoch_iterations

    def on_train_start(self) -> None:
        super().on_train_start()
        if self.local_rank == 0:
            for leftover in Path(self.output_folder).glob("checkpoint_*.pth.partial"):
                leftover.unlink()  # of a training that was killed while writing
        self._last_checkpoint = time.monotonic()

    def on_epoch_start(self) -> None:
        log = self.logger.local_logger
        unfinished, log.unfinished_epoch = log.unfinished_epoch, None
        self._earlier_outputs = []
        elapsed = 0.0
        if unfinished is not None and unfinished["epoch"] == self.current_epoch:
            self._earlier_outputs = unfinished["outputs"]
            elapsed = unfinished["seconds"]
        self._epoch_started = time.monotonic() - elapsed
        super().on_epoch_start()
        log.my_fantastic_logging["epoch_start_timestamps"][-1] -= elapsed

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        self._epoch_outputs = list(self._earlier_outputs)
        # nnU-Net reads the number of iterations after this call: a continued epoch has fewer left.
        self._full_epoch_iterations = self.num_iterations_per_epoch
        self.num_iterations_per_epoch = max(0, self._full_epoch_iterations - len(self._earlier_outputs))
        if self._earlier_outputs:
            self.print_to_log_file(
                f"Continuing this epoch after iteration {len(self._earlier_outputs)} of {self._full_epoch_iterations}"
            )

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        outputs = super().train_step(batch)
        self._epoch_outputs.append(outputs)
        self._maybe_save_latest()
        return outputs

    def on_train_epoch_end(self, train_outputs: list[dict[str, Any]]) -> None:
        self.num_iterations_per_epoch = self._full_epoch_iterations
        super().on_train_epoch_end(self._earlier_outputs + train_outputs)

    def validation_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        outputs = super().validation_step(batch)
        self._maybe_save_latest()
        return outputs

    def _maybe_save_latest(self) -> None:
        """Write checkpoint_latest.pth with the state of this epoch, if the existing one is too old."""
        if time.monotonic() - self._last_checkpoint < self.checkpoint_interval_minutes * 60:
            return
        log = self.logger.local_logger
        log.unfinished_epoch = {
            "epoch": self.current_epoch,
            "outputs": list(self._epoch_outputs),
            "seconds": time.monotonic() - self._epoch_started,
        }
        # nnU-Net stores the epoch after the current one as the next to train; here the current one is not done yet.
        self.current_epoch -= 1
        try:
            self.save_checkpoint(os.path.join(self.output_folder, LATEST_CHECKPOINT))
        finally:
            self.current_epoch += 1
            log.unfinished_epoch = None

    def save_checkpoint(self, filename: str) -> None:
        """Write a checkpoint atomically: a killed training leaves no truncated file under its name."""
        partial = f"{filename}.partial"
        super().save_checkpoint(partial)
        if self.local_rank == 0 and not self.disable_checkpointing:
            os.replace(partial, filename)
        # Only the latest counts: --c prefers it to the best, however old it is.
        if os.path.basename(filename) == LATEST_CHECKPOINT:
            self._last_checkpoint = time.monotonic()

    def load_checkpoint(self, filename_or_checkpoint: str) -> None:
        """Load a checkpoint as nnU-Net does, into the network that it was trained with.

        Raises:
            InputError: If the topology of the checkpoint is not that of the plans and this trainer.
        """
        if not self.was_initialized:
            self._take_architecture_from(_open_checkpoint(filename_or_checkpoint), filename_or_checkpoint)
        super().load_checkpoint(filename_or_checkpoint)
        versions = self.my_init_kwargs["plans"].setdefault("nnunet_conres", {"version": "unknown"})
        if versions["version"] != __version__:
            versions["continued_with"] = __version__

    def _take_architecture_from(self, checkpoint: dict[str, Any], filename: str) -> None:
        """Adopt the architecture arguments of a checkpoint, so that a changed default doesn't break ``--c``.

        Arguments that come from the plans must agree: with other strides it would be another network.
        """
        plans = checkpoint["init_args"]["plans"]
        if checkpoint["init_args"]["configuration"] != self.configuration_name:
            raise InputError(
                f"{filename} was trained in configuration {checkpoint['init_args']['configuration']}, this training is "
                f"in {self.configuration_name}."
            )
        theirs = configuration_of(plans, self.configuration_name).configuration["architecture"]
        different = differences_in_topology(theirs, self.configuration_manager.configuration["architecture"])
        if different:
            raise InputError(
                f"{filename} belongs to another network than these plans and this trainer: {'; '.join(different)}. "
                f"Continue it with the plans it was started with, or start a new training without --c."
            )
        self.plans_manager = PlansManager(
            with_configuration(self.plans_manager.plans, self.configuration_name, architecture=deepcopy(theirs))
        )
        self.configuration_manager = self.plans_manager.get_configuration(self.configuration_name)


def _open_checkpoint(filename: str) -> dict[str, Any]:
    """Read a checkpoint; weights and optimiser state stay in the file until they are used.

    Raises:
        InputError: If it is damaged.
    """
    try:
        return torch.load(filename, map_location="cpu", weights_only=False, mmap=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise InputError(
            f"{filename} is damaged and cannot be loaded ({str(error).splitlines()[0]}). Move it away. --c then "
            f"uses another checkpoint of its folder, or starts from scratch if there is none."
        ) from error


def _checkpoint_interval(minutes: float) -> float:
    """Return the interval in the environment variable, or ``minutes``, the trainer's, if it is not set."""
    text = os.environ.get(CHECKPOINT_VARIABLE)
    if text is None:
        return minutes
    try:
        given = float(text)
    except ValueError:
        given = math.nan
    if not given >= 0:
        raise InputError(f"{CHECKPOINT_VARIABLE} is {text!r}; expected minutes, 0 or more.")
    return given
