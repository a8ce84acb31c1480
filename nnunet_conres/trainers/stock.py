"""nnU-Net's own network under the recipe of this package."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager

from nnunet_conres.trainers.base import PluginTrainer


class nnUNetTrainerMuon(PluginTrainer):
    """The network of the plans, as it is, trained as nnUNetTrainerConResNet trains its own; in 3D.

    It is what ConResNet has to be compared with to tell what the network does from what the optimiser does.
    """

    network_name = "What nnUNetTrainerMuon trains"
    optimizer_kind = "muon"

    @classmethod
    def architecture(cls, configuration: ConfigurationManager) -> dict[str, Any]:
        return deepcopy(configuration.configuration["architecture"])
