"""Learning rate schedules that nnU-Net lacks."""

from __future__ import annotations

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


class StepLRScheduler(LRScheduler):
    """Schedule that divides the learning rate by 10 at regular intervals.

    Like nnU-Net's own schedule, it takes the epoch and keeps no state: a continued training needs only the epoch.

    Args:
        optimizer: The optimiser.
        initial_lr: Learning rate of the first epochs.
        step_epochs: Number of epochs between two divisions; may be a fraction.
    """

    def __init__(self, optimizer: Optimizer, initial_lr: float, step_epochs: float) -> None:
        self.initial_lr = initial_lr
        self.step_epochs = step_epochs
        super().__init__(optimizer)

    def step(self, epoch: float | None = None) -> None:
        """Set the learning rate of an epoch, by default epoch 0."""
        lr = self.initial_lr * 0.1 ** int((epoch or 0) / self.step_epochs)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self._last_lr = [lr for _ in self.optimizer.param_groups]
