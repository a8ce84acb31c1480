"""3D U-Net's entry of plans."""

from __future__ import annotations

from typing import Any

from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager

from nnunet_conres.architectures.unet3d import UNet3D, paper_arguments
from nnunet_conres.plans.entries import as_entry, kept_arguments, names_paper_form, own_arguments, shared_arguments


def architecture(configuration: ConfigurationManager) -> dict[str, Any]:
    """The ``architecture`` entry of a configuration for 3D U-Net.

    A stage's features are what leaves it: where plans say 32, 64 the first makes 16, then 32, the second 32, then 64.

    Args:
        configuration: Configuration of stock plans, or of plans that name 3D U-Net already, which keep its arguments.

    Raises:
        InputError: If the plans name a network whose topology can't be carried over.
    """
    own = own_arguments(configuration, UNet3D)
    if own is not None:
        return as_entry(UNet3D, own)
    arguments = shared_arguments(configuration, UNet3D)
    given, n_stages = configuration.network_arch_init_kwargs, arguments["n_stages"]
    # Pairs, as the paper has them; plans of a residual encoder count blocks instead, and decode by single convolutions.
    if "n_conv_per_stage" not in given:
        given = {"n_conv_per_stage": [2] * n_stages, "n_conv_per_stage_decoder": [2] * (n_stages - 1)}
    arguments["n_conv_per_stage"] = given["n_conv_per_stage"]
    arguments["n_conv_per_stage_decoder"] = given.get("n_conv_per_stage_decoder", 2)
    return as_entry(UNet3D, arguments)


def paper_architecture(configuration: ConfigurationManager) -> dict[str, Any]:
    """The ``architecture`` entry for 3D U-Net as the paper has it, but for ``downsampling``, which plans may choose.

    Args:
        configuration: Any configuration; one that names 3D U-Net with a single head itself keeps its arguments, one
            that names 3D U-Net at all its way of downsampling; others get strided convolutions.
    """
    if names_paper_form(configuration, UNet3D):
        return architecture(configuration)
    kept = kept_arguments(configuration, UNet3D, "checkpointing", "downsampling")
    return as_entry(UNet3D, paper_arguments() | kept)
