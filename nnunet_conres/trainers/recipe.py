"""Optimiser, learning rate and number of epochs: those of nnU-Net, of Muon, or of a trainer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeVar

import torch
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_conres.nnunet import switch_from_environment
from nnunet_conres.optimizers import MUON_LR, MUON_WEIGHT_DECAY, Muon, muon_of
from nnunet_conres.trainers.resume import ResumableTrainer

FAST_STEP_VARIABLE: Final = "nnUNet_conres_fast_step"
"""0: networks and optimiser steps on a GPU as in nnU-Net."""

_Function = TypeVar("_Function", bound=Callable[..., Any])


def starts_with(lr: float, weight_decay: float) -> Callable[[_Function], _Function]:
    """Attach the default learning rate and weight decay of an optimiser to its ``configure_optimizers``.

    They belong to the method: a subclass that overrides it with another optimiser gets nnU-Net's own values.
    """

    def note(configure_optimizers: _Function) -> _Function:
        configure_optimizers.starts_with = (lr, weight_decay)  # type: ignore[attr-defined]
        return configure_optimizers

    return note


class RecipeTrainer(ResumableTrainer):
    """nnU-Net's trainer, with the settings of the optimiser as class attributes.

    Attributes:
        training_epochs: Number of epochs; 1000 by default, as in nnU-Net.
        training_lr: Initial learning rate; None for the default of the optimiser, 0.03 with Muon, else nnU-Net's own.
        training_weight_decay: Weight decay; None for the default of the optimiser, 1e-3 with Muon, else nnU-Net's own.
        lr_by_iteration: Whether the learning rate decays with every iteration rather than with every epoch; None for
            yes with Muon and no otherwise.
    """

    training_epochs: int = 1000
    training_lr: float | None = None
    training_weight_decay: float | None = None
    lr_by_iteration: bool | None = None

    # set by nnU-Net's constructor, which is untyped
    initial_lr: float
    weight_decay: float

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.num_epochs = self.training_epochs
        nnunets = (self.initial_lr, self.weight_decay)
        self.initial_lr, self.weight_decay = getattr(self.configure_optimizers, "starts_with", nnunets)
        if self.training_lr is not None:
            self.initial_lr = self.training_lr
        if self.training_weight_decay is not None:
            self.weight_decay = self.training_weight_decay

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        by_iteration = isinstance(self.optimizer, Muon) if self.lr_by_iteration is None else self.lr_by_iteration
        if by_iteration:
            self.lr_scheduler.step(self.current_epoch + self.epoch_progress)
        return super().train_step(batch)


def wants_fast_step() -> bool:
    """Return False if the environment variable turns off channels-last networks and captured steps on a GPU."""
    return switch_from_environment(FAST_STEP_VARIABLE) is not False


class MuonMixin(nnUNetTrainer):
    """Muon as the optimiser, with nnU-Net's schedule. Must come first among a trainer's bases."""

    @starts_with(MUON_LR, MUON_WEIGHT_DECAY)
    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, Any]:
        optimizer = muon_of(
            self.network, self.initial_lr, self.weight_decay, capture=self._do_i_compile() and wants_fast_step()
        )
        return optimizer, PolyLRScheduler(optimizer, self.initial_lr, self.num_epochs)
