"""The trainers of scripts/quickstart.sh: networks and optimisers on equal terms, for a few short epochs.

nnU-Net finds them through its environment variable nnUNet_extTrainer.
"""

from __future__ import annotations

import os

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_conres.trainers import nnUNetTrainerConResNet, nnUNetTrainerMuon


class ShortTraining(nnUNetTrainer):
    """Mixin that shortens training to four epochs of a few iterations. List it before the trainer among the bases."""

    training_epochs = 4
    checkpoint_interval_minutes = 0.5
    progress_seconds = 5.0

    def initialize(self) -> None:
        self.num_iterations_per_epoch = int(os.environ["QUICKSTART_ITERATIONS"])
        self.num_val_iterations_per_epoch = max(1, self.num_iterations_per_epoch // 5)
        super().initialize()


class nnUNetTrainerQuickstart(ShortTraining, nnUNetTrainerMuon):
    """nnU-Net's own network and optimiser, with this package's checkpoints, precision and progress line."""

    configure_optimizers = nnUNetTrainer.configure_optimizers


class nnUNetTrainerMuonQuickstart(ShortTraining, nnUNetTrainerMuon):
    """nnU-Net's own network with Muon, the optimiser of ConResNet."""


class nnUNetTrainerConResNetQuickstart(ShortTraining, nnUNetTrainerConResNet):
    """ConResNet."""
