"""Trainers that differ from another in their number of epochs only, called as nnU-Net calls its own."""

from __future__ import annotations

from nnunet_conres.registration import TRAINING_LENGTHS
from nnunet_conres.trainers.base import PluginTrainer
from nnunet_conres.trainers.conresnet import nnUNetTrainerConResNet, nnUNetTrainerConResNet_SGD
from nnunet_conres.trainers.residual_maps import nnUNetTrainerResidualMaps, nnUNetTrainerResidualMaps_SGD
from nnunet_conres.trainers.stock import nnUNetTrainerMuon
from nnunet_conres.trainers.unet3d import nnUNetTrainerUNet3D
from nnunet_conres.trainers.vnet import nnUNetTrainerVNet


def with_epochs(trainer: type[PluginTrainer], name: str, epochs: int) -> type[PluginTrainer]:
    """A subclass of a trainer with another number of epochs; of this module, so that it can be pickled."""
    return type(name, (trainer,), {"__module__": __name__, "__doc__": f"{epochs} epochs.", "training_epochs": epochs})


ALL = {
    f"{trainer.__name__}_{suffix}": with_epochs(trainer, f"{trainer.__name__}_{suffix}", epochs)
    for trainer in (
        nnUNetTrainerConResNet,
        nnUNetTrainerConResNet_SGD,
        nnUNetTrainerResidualMaps,
        nnUNetTrainerResidualMaps_SGD,
        nnUNetTrainerVNet,
        nnUNetTrainerUNet3D,
        nnUNetTrainerMuon,
    )
    for suffix, epochs in TRAINING_LENGTHS.items()
}
"""The trainers by name; they are attributes of this module too."""

globals().update(ALL)
