"""The plans entry of ConResNet."""

from __future__ import annotations

from typing import Any

from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager

from nnunet_conres.architectures.conresnet import ConResNet
from nnunet_conres.architectures.conresnet_paper import ConResNetPaper
from nnunet_conres.plans.entries import as_entry, kept_arguments, own_arguments
from nnunet_conres.plans.residual_maps import residual_map_arguments


def architecture(configuration: ConfigurationManager, shared_encoder: bool = False) -> dict[str, Any]:
    """Return the ``architecture`` entry of a configuration for ConResNet.

    Args:
        configuration: Configuration of stock plans, or one that already names ConResNet, whose arguments are kept.
        shared_encoder: Whether one encoder runs over image and image residual. Overrides the plans, so that the name of
            the trainer determines the network.

    Raises:
        InputError: If the plans name a network whose topology can't be carried over.
    """
    arguments = residual_map_arguments(configuration, ConResNet)
    return as_entry(ConResNet, arguments | {"shared_encoder": shared_encoder})


def paper_architecture(configuration: ConfigurationManager) -> dict[str, Any]:
    """Return the ``architecture`` entry of a configuration for the paper's ConResNet.

    Args:
        configuration: Any configuration. If it names ConResNetPaper, its arguments are kept. If it names ConResNet,
            only its checkpointing is kept.
    """
    kept = kept_arguments(configuration, ConResNet, "checkpointing")
    return as_entry(ConResNetPaper, kept | (own_arguments(configuration, ConResNetPaper) or {}))
