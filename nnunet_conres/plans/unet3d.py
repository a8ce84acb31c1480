"""3D U-Net's entry of plans."""

from __future__ import annotations

from typing import Any

from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager

from nnunet_conres.architectures.unet3d import UNet3D, paper_arguments
from nnunet_conres.plans.entries import (
    NO_LAYERS,
    as_entry,
    names_paper_form,
    own_arguments,
    paper_entry,
    shared_arguments,
)

_DEFAULTS = NO_LAYERS | {
    "n_conv_per_stage": 2,
    "n_conv_per_stage_decoder": 2,
    "conv_bias": False,
    "nonlin": None,
    "downsampling": "strided_conv",
    "auxiliary_heads": True,
    "checkpointing": "none",
}


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
        return as_entry(UNet3D, _DEFAULTS | own)
    arguments = shared_arguments(configuration, UNet3D)
    given, n_stages = configuration.network_arch_init_kwargs, arguments["n_stages"]
    # Pairs, as the paper has them; plans of a residual encoder count blocks instead, and decode by single convolutions.
    counts_convolutions = "n_conv_per_stage" in given
    arguments |= {
        "n_conv_per_stage": given["n_conv_per_stage"] if counts_convolutions else [2] * n_stages,
        "n_conv_per_stage_decoder": (
            given.get("n_conv_per_stage_decoder", 2) if counts_convolutions else [2] * (n_stages - 1)
        ),
        "downsampling": "strided_conv",
        "auxiliary_heads": True,
        "checkpointing": "none",
    }
    return as_entry(UNet3D, arguments)


def paper_architecture(configuration: ConfigurationManager) -> dict[str, Any]:
    """The ``architecture`` entry for 3D U-Net as the paper has it, but for ``downsampling``, which plans may choose.

    Args:
        configuration: Any configuration; one that names 3D U-Net with a single head itself keeps its arguments, one
            that names 3D U-Net at all its way of downsampling; others get strided convolutions.
    """
    if names_paper_form(configuration, UNet3D):
        return architecture(configuration)
    own = own_arguments(configuration, UNet3D) or {}
    chosen = {key: own[key] for key in ("downsampling",) if key in own}
    return paper_entry(UNet3D, paper_arguments() | chosen, configuration)
