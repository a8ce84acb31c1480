"""The trainers of scripts/quickstart.sh: networks and optimisers on equal terms, for a few short epochs.

nnU-Net finds them through its environment variable nnUNet_extTrainer.
"""

from __future__ import annotations

import os
from typing import Any

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_conres.trainers import nnUNetTrainerConResNet, nnUNetTrainerMuon


class ShortTraining(nnUNetTrainer):
    """Comes before a trainer of the package among the bases: four epochs of a few iterations."""

    training_epochs = 4
    checkpoint_interval_minutes = 0.5
    progress_seconds = 5.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.num_iterations_per_epoch = int(os.environ["QUICKSTART_ITERATIONS"])
        self.num_val_iterations_per_epoch = max(1, self.num_iterations_per_epoch // 5)


class nnUNetTrainerQuickstart(ShortTraining, nnUNetTrainerMuon):
    """nnU-Net's own network and optimiser, with this package's checkpoints, precision and progress line."""

    configure_optimizers = nnUNetTrainer.configure_optimizers


class nnUNetTrainerMuonQuickstart(ShortTraining, nnUNetTrainerMuon):
    """nnU-Net's own network with the optimiser that ConResNet has."""


class nnUNetTrainerConResNetQuickstart(ShortTraining, nnUNetTrainerConResNet):
    """ConResNet."""
