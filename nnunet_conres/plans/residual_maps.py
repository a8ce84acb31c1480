"""ResidualMapUNet's entry of plans, and what it shares with ConResNet's."""

from __future__ import annotations

from typing import Any

from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager

from nnunet_conres.architectures.blocks import per_stage
from nnunet_conres.architectures.residual_map_unet import ResidualMapUNet
from nnunet_conres.plans.entries import as_entry, own_arguments, shared_arguments


def architecture(configuration: ConfigurationManager) -> dict[str, Any]:
    """The ``architecture`` entry of a configuration for ResidualMapUNet.

    Args:
        configuration: Configuration of stock plans, or of plans that name ResidualMapUNet already, which keep its
            arguments.

    Raises:
        InputError: If the plans name a network whose topology can't be carried over.
    """
    return as_entry(ResidualMapUNet, residual_map_arguments(configuration, ResidualMapUNet))


def residual_map_arguments(configuration: ConfigurationManager, network: type) -> dict[str, Any]:
    """Arguments of a network with nnU-Net's residual encoder and residual maps.

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
        # a residual block has two convolutions: as many as the plans ask for
        convs = per_stage("n_conv_per_stage", given.get("n_conv_per_stage", 2), n_stages)
        blocks = [max(1, n // 2) for n in convs]
    arguments["n_blocks_per_stage"] = blocks
    # Stock plans have two convolutions per decoder level; these networks have one, ConResNet one in either stream.
    arguments["n_conv_per_stage_decoder"] = [1] * (n_stages - 1)
    return arguments
