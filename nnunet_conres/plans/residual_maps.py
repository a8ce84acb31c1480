"""The plans entry of ResidualMapUNet, and the arguments that it shares with ConResNet."""

from __future__ import annotations

from typing import Any

from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager

from nnunet_conres.architectures.blocks import per_stage
from nnunet_conres.architectures.residual_map_unet import ResidualMapUNet
from nnunet_conres.plans.entries import as_entry, own_arguments, shared_arguments


def architecture(configuration: ConfigurationManager) -> dict[str, Any]:
    """Return the ``architecture`` entry of a configuration for ResidualMapUNet.

    Args:
        configuration: Configuration of stock plans, or one that already names ResidualMapUNet, whose arguments are
            kept.

    Raises:
        InputError: If the plans name a network whose topology can't be carried over.
    """
    return as_entry(ResidualMapUNet, residual_map_arguments(configuration, ResidualMapUNet))


def residual_map_arguments(configuration: ConfigurationManager, network: type) -> dict[str, Any]:
    """Return the arguments of a network with nnU-Net's residual encoder and residual maps.

    Raises:
        InputError: If the plans name a network whose topology can't be carried over.
    """
    arguments = shared_arguments(configuration, network)
    own = own_arguments(configuration, network)
    if own is not None:
        return arguments | own
    given, n_stages = configuration.network_arch_init_kwargs, arguments["n_stages"]
    blocks = given.get("n_blocks_per_stage")
    if blocks is None:
        # a residual block has two convolutions, so this keeps the plans' number of convolutions
        convs = per_stage("n_conv_per_stage", given.get("n_conv_per_stage", 2), n_stages)
        blocks = [max(1, n // 2) for n in convs]
    arguments["n_blocks_per_stage"] = blocks
    # Stock plans have two convolutions per decoder stage; these networks have one, ConResNet one in each stream.
    arguments["n_conv_per_stage_decoder"] = [1] * (n_stages - 1)
    return arguments
