"""Trainers that nnU-Net finds by name (see nnunet_conres.registration).

The lengths of a training, such as nnUNetTrainerConResNet_5epochs, are made in nnunet_conres.trainers.lengths.
"""

from nnunet_conres.trainers import lengths
from nnunet_conres.trainers.conresnet import (
    nnUNetTrainerConResNet,
    nnUNetTrainerConResNet_NoMirroring,
    nnUNetTrainerConResNet_SGD,
    nnUNetTrainerConResNetBSpline,
    nnUNetTrainerConResNetPaper,
    nnUNetTrainerConResNetSharedEncoder,
)
from nnunet_conres.trainers.residual_maps import nnUNetTrainerResidualMaps, nnUNetTrainerResidualMaps_SGD
from nnunet_conres.trainers.stock import nnUNetTrainerMuon
from nnunet_conres.trainers.unet3d import nnUNetTrainerUNet3D, nnUNetTrainerUNet3DPaper
from nnunet_conres.trainers.vnet import nnUNetTrainerVNet, nnUNetTrainerVNetPaper

globals().update(lengths.ALL)

__all__ = [
    "nnUNetTrainerConResNet",
    "nnUNetTrainerConResNetBSpline",
    "nnUNetTrainerConResNetPaper",
    "nnUNetTrainerConResNetSharedEncoder",
    "nnUNetTrainerConResNet_NoMirroring",
    "nnUNetTrainerConResNet_SGD",
    "nnUNetTrainerMuon",
    "nnUNetTrainerResidualMaps",
    "nnUNetTrainerResidualMaps_SGD",
    "nnUNetTrainerUNet3D",
    "nnUNetTrainerUNet3DPaper",
    "nnUNetTrainerVNet",
    "nnUNetTrainerVNetPaper",
    *lengths.ALL,
]
