"""nnU-Net's own network under the recipe of this package."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager

from nnunet_conres.trainers.base import PluginTrainer
from nnunet_conres.trainers.channel_dropout import ChannelDropoutMixin
from nnunet_conres.trainers.recipe import MuonMixin


class nnUNetTrainerMuon(MuonMixin, PluginTrainer):
    """The 3D network of the plans, nnU-Net's own for example, under nnU-Net's recipe with Muon as the optimiser.

    Compare it with ConResNet to separate the effect of the network from that of the optimiser.
    """

    network_name = "nnUNetTrainerMuon"

    @classmethod
    def architecture(cls, configuration: ConfigurationManager) -> dict[str, Any]:
        return deepcopy(configuration.configuration["architecture"])


class nnUNetTrainerMuon_ChannelDropout(ChannelDropoutMixin, nnUNetTrainerMuon):
    """With channels left out at random, for cases that lack modalities."""
