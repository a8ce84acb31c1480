"""Skipping of training steps whose gradient is not finite. They are counted, and a few in a row end the training."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import Tensor, distributed, nn
from torch.optim import Optimizer

from nnunet_conres.errors import InputError
from nnunet_conres.text import first_few

MOST_IN_A_ROW: Final = 5
SKIPPED_STEPS: Final = "skipped_steps"
"""Name under which the number of skipped steps of an epoch is logged."""
# A gradient scaler whose scale is too large skips steps and halves the scale each time. From 2**16 it takes 40 steps to
# 2**-24, the smallest number of float16.
MOST_WHILE_SCALING: Final = 40


@dataclass(frozen=True)
class SkippedStep:
    """A training step that was skipped.

    Attributes:
        cases: Cases of the batch, of all processes.
        broken: Cases among them whose image has a voxel that is not finite.
        is_loss_finite: Whether the loss was finite, and only the gradient was not.
    """

    cases: tuple[str, ...]
    broken: tuple[str, ...]
    is_loss_finite: bool


class FiniteStepsTrainer(nnUNetTrainer):
    """nnU-Net's trainer, whose network stays finite for any batch.

    Without a gradient scaler, nnU-Net's own step applies any gradient: a single NaN voxel turns all weights into NaN.
    Here such a step is skipped, as by a gradient scaler: weights, optimiser state and running statistics of batch norms
    stay as they are. With DistributedDataParallel the gradients are averaged before, so that all processes skip the
    same steps.

    Attributes:
        skipped_in_a_row: Steps that were skipped since the last one that was taken.
    """

    # set by nnU-Net's constructor, which is untyped
    optimizer: Optimizer
    network: nn.Module

    def initialize(self) -> None:
        super().initialize()
        self.skipped_in_a_row: list[SkippedStep] = []
        self._is_step_taken = False
        self.optimizer.register_step_pre_hook(self._before_step)

    def _before_step(self, optimizer: Optimizer, *_: Any) -> None:
        """Remove all gradients if one is not finite: without gradients the optimiser changes nothing."""
        # A scaler does not call the optimiser in such a step, unless the optimiser supports scaling itself.
        if self.grad_scaler is None or getattr(optimizer, "_step_supports_amp_scaling", False):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            if not _all_finite([parameter.grad for parameter in parameters if parameter.grad is not None]):
                for parameter in parameters:
                    parameter.grad = None
                return
        self._is_step_taken = True

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        self._is_step_taken = False
        # Running statistics change in the forward pass, before the gradient is known.
        buffers = [buffer for buffer in self.network.buffers() if buffer.is_floating_point()]
        before = [buffer.clone() for buffer in buffers]
        outputs = super().train_step(batch)
        suspects: list[str] = []
        if self._is_step_taken:
            self.skipped_in_a_row.clear()
        else:
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)
            suspects = self._note_skipped(batch, bool(np.isfinite(outputs["loss"])))
        # nnU-Net collates lists by concatenation.
        return outputs | {"skipped": int(not self._is_step_taken), "skipped_cases": suspects}

    def _note_skipped(self, batch: dict[str, Any], is_loss_finite: bool) -> list[str]:
        """Record a skipped step, and end the training after too many in a row. Return the cases to check."""
        skipped = _skipped_step(batch, is_loss_finite)
        if self.is_ddp:  # so that all processes decide alike, and name the cases of all
            steps: list[Any] = [None] * distributed.get_world_size()
            distributed.all_gather_object(steps, skipped)
            skipped = SkippedStep(
                tuple(case for step in steps for case in step.cases),
                tuple(case for step in steps for case in step.broken),
                all(step.is_loss_finite for step in steps),
            )
        self.skipped_in_a_row.append(skipped)
        is_scaling = self.grad_scaler is not None and all(step.is_loss_finite for step in self.skipped_in_a_row)
        if len(self.skipped_in_a_row) >= (MOST_WHILE_SCALING if is_scaling else MOST_IN_A_ROW):
            self._stop()
        return list(skipped.broken or skipped.cases)

    def _stop(self) -> None:
        steps = self.skipped_in_a_row
        cases, broken = (
            first_few(sorted({case for step in steps for case in getattr(step, which)}), 20)
            for which in ("cases", "broken")
        )
        what = (
            f"Loss or gradient was not finite in {len(steps)} training steps in a row, the last in epoch "
            f"{self.current_epoch}; all were skipped."
        )
        if broken:
            raise InputError(
                f"{what} The preprocessed images of these cases have voxels that are NaN or infinite: {broken}. Look "
                f"for such voxels in their raw images, correct them or remove the cases, and preprocess again. These "
                f"steps did not change the weights."
            )
        if _not_finite(self.network):
            raise RuntimeError(f"{what} The network's weights are not finite. Continue from an earlier checkpoint.")
        raise RuntimeError(
            f"{what} The images are finite. Cases of these batches: {cases or 'unknown'}. A lower learning rate may "
            f"help. These steps did not change the weights."
        )

    def on_train_epoch_end(self, train_outputs: list[dict[str, Any]]) -> None:
        taken = [outputs for outputs in train_outputs if not outputs["skipped"]]
        # A loss that is not finite would hide the others in the mean. All processes skip the same steps.
        super().on_train_epoch_end(taken or train_outputs)
        # The log lacks this key if nnU-Net's own trainer started the training.
        self.logger.local_logger.my_fantastic_logging.setdefault(SKIPPED_STEPS, [math.nan] * self.current_epoch)
        self.logger.log(SKIPPED_STEPS, len(train_outputs) - len(taken), self.current_epoch)
        if len(taken) < len(train_outputs):
            named = Counter(case for outputs in train_outputs for case in outputs["skipped_cases"])
            self.print_to_log_file(
                f"Skipped {len(train_outputs) - len(taken)} of {len(train_outputs)} training steps, whose loss or "
                f"gradient was not finite. Cases of these batches: {_with_counts(named)}"
            )

    def validation_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        outputs = super().validation_step(batch)
        skipped = None if np.isfinite(outputs["loss"]) else _skipped_step(batch, is_loss_finite=False)
        return outputs | {"not_finite_cases": [] if skipped is None else list(skipped.broken or skipped.cases)}

    def on_validation_epoch_end(self, val_outputs: list[dict[str, Any]]) -> None:
        super().on_validation_epoch_end(val_outputs)
        named = Counter(case for outputs in val_outputs for case in outputs["not_finite_cases"])
        if named:
            self.print_to_log_file(f"The validation loss is not finite. Cases of these batches: {_with_counts(named)}")

    def save_checkpoint(self, filename: str) -> None:
        """Write a checkpoint, unless its weights are not finite.

        Raises:
            RuntimeError: A weight is NaN or infinite. An existing file stays as it was.
        """
        if not self.disable_checkpointing:
            broken = _not_finite(self.network)  # the same in all processes
            if broken:
                path = Path(filename)
                raise RuntimeError(
                    f"Weights are not finite in epoch {self.current_epoch} ({first_few(broken, 3)}); {path} was not "
                    f"written; other checkpoints in {path.parent} are unchanged. Continue from them with --c."
                )
        super().save_checkpoint(filename)


def _skipped_step(batch: dict[str, Any], is_loss_finite: bool) -> SkippedStep:
    cases = tuple(str(case) for case in batch.get("keys", ()))
    broken = [case for case, image in zip(cases, batch["data"], strict=False) if not _all_finite([image])]
    return SkippedStep(cases, tuple(broken), is_loss_finite)


def _not_finite(network: nn.Module) -> list[str]:
    """Return the names of weights and running statistics with a number that is not finite."""
    state = network.state_dict()
    return [] if _all_finite(list(state.values())) else [name for name in state if not _all_finite([state[name]])]


def _all_finite(tensors: Sequence[Tensor]) -> bool:
    """Return whether all numbers are finite. Needs one read from the device (rarely two), and no tensor copies."""
    numbers = [tensor.detach() for tensor in tensors if tensor.is_floating_point() and tensor.numel()]
    if not numbers:
        return True
    # The Euclidean norm is fast, but overflows; the largest magnitude is exact.
    return any(
        bool(torch.stack([norm.double() for norm in torch._foreach_norm(numbers, order)]).isfinite().all())
        for order in (2.0, float("inf"))
    )


def _with_counts(cases: Counter[str]) -> str:
    return first_few([f"{case} x{number}" if number > 1 else case for case, number in cases.most_common()], 20)
