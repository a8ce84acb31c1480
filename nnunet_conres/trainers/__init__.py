"""Trainers that nnU-Net finds by name (see nnunet_conres.registration)."""

from nnunet_conres.trainers.conresnet import (
    nnUNetTrainerConResNet,
    nnUNetTrainerConResNet_1epoch,
    nnUNetTrainerConResNet_5epochs,
    nnUNetTrainerConResNet_10epochs,
    nnUNetTrainerConResNet_20epochs,
    nnUNetTrainerConResNet_50epochs,
    nnUNetTrainerConResNet_100epochs,
    nnUNetTrainerConResNet_250epochs,
    nnUNetTrainerConResNet_500epochs,
    nnUNetTrainerConResNet_2000epochs,
    nnUNetTrainerConResNet_NoMirroring,
    nnUNetTrainerConResNetPaper,
    nnUNetTrainerConResNetSharedEncoder,
)

__all__ = [
    "nnUNetTrainerConResNet",
    "nnUNetTrainerConResNetPaper",
    "nnUNetTrainerConResNetSharedEncoder",
    "nnUNetTrainerConResNet_1epoch",
    "nnUNetTrainerConResNet_5epochs",
    "nnUNetTrainerConResNet_10epochs",
    "nnUNetTrainerConResNet_20epochs",
    "nnUNetTrainerConResNet_50epochs",
    "nnUNetTrainerConResNet_100epochs",
    "nnUNetTrainerConResNet_250epochs",
    "nnUNetTrainerConResNet_500epochs",
    "nnUNetTrainerConResNet_2000epochs",
    "nnUNetTrainerConResNet_NoMirroring",
]
