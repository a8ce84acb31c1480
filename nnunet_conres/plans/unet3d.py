"""The plans entry of 3D U-Net."""

from __future__ import annotations

from typing import Any

from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager

from nnunet_conres.architectures.unet3d import UNet3D, paper_arguments
from nnunet_conres.plans.entries import as_entry, kept_arguments, names_paper_form, own_arguments, shared_arguments


def architecture(configuration: ConfigurationManager) -> dict[str, Any]:
    """Return the ``architecture`` entry of a configuration for 3D U-Net.

    The features of a stage are those of its output. With 32 and 64 in the plans, the convolutions of the first stage
    have 16 and 32 features, those of the second stage 32 and 64.

    Args:
        configuration: Configuration of stock plans, or one that already names 3D U-Net, whose arguments are kept.

    Raises:
        InputError: If the plans name a network whose topology can't be carried over.
    """
    own = own_arguments(configuration, UNet3D)
    if own is not None:
        return as_entry(UNet3D, own)
    arguments = shared_arguments(configuration, UNet3D)
    given, n_stages = configuration.network_arch_init_kwargs, arguments["n_stages"]
    # Pairs of convolutions, as in the paper. Plans of a residual encoder count blocks instead, and have single
    # convolutions in the decoder.
    if "n_conv_per_stage" not in given:
        given = {"n_conv_per_stage": [2] * n_stages, "n_conv_per_stage_decoder": [2] * (n_stages - 1)}
    arguments["n_conv_per_stage"] = given["n_conv_per_stage"]
    arguments["n_conv_per_stage_decoder"] = given.get("n_conv_per_stage_decoder", 2)
    return as_entry(UNet3D, arguments)


def paper_architecture(configuration: ConfigurationManager) -> dict[str, Any]:
    """Return the ``architecture`` entry for 3D U-Net as in the paper, except ``downsampling``, which plans may set.

    Args:
        configuration: Any configuration. If it names 3D U-Net with a single head, all its arguments are kept. If it
            names any other 3D U-Net, its checkpointing and downsampling are kept. The default for downsampling is
            strided convolutions.
    """
    if names_paper_form(configuration, UNet3D):
        return architecture(configuration)
    kept = kept_arguments(configuration, UNet3D, "checkpointing", "downsampling")
    return as_entry(UNet3D, paper_arguments() | kept)
