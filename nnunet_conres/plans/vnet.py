"""The plans entry of V-Net."""

from __future__ import annotations

from typing import Any

from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager

from nnunet_conres.architectures.blocks import per_stage, triple
from nnunet_conres.architectures.vnet import VNet, convolutions_per_stage, paper_arguments
from nnunet_conres.plans.entries import as_entry, kept_arguments, names_paper_form, own_arguments, shared_arguments


def architecture(configuration: ConfigurationManager) -> dict[str, Any]:
    """Return the ``architecture`` entry of a configuration for V-Net.

    Kernel sizes of 3 become 5. Features are half of the plans'. V-Net's decoder has twice the features of its encoder,
    so it has those of nnU-Net's U-Net. If the plans start with 32 features, the encoder starts with the paper's 16.

    Args:
        configuration: Configuration of stock plans, or one that already names V-Net, whose arguments are kept.

    Raises:
        InputError: If the plans name a network whose topology can't be carried over.
    """
    own = own_arguments(configuration, VNet)
    if own is not None:
        return as_entry(VNet, own)
    arguments = shared_arguments(configuration, VNet)
    n_stages = arguments["n_stages"]
    features = per_stage("features_per_stage", arguments["features_per_stage"], n_stages)
    kernel_sizes = per_stage("kernel_sizes", arguments["kernel_sizes"], n_stages)
    convolutions = convolutions_per_stage(n_stages)
    arguments |= {
        "features_per_stage": [max(1, f // 2) for f in features],
        "kernel_sizes": [[5 if k == 3 else k for k in triple(kernel)] for kernel in kernel_sizes],
        "n_conv_per_stage": convolutions,
        "n_conv_per_stage_decoder": convolutions[-2::-1],
        "nonlin": "torch.nn.PReLU",
        "nonlin_kwargs": {},
    }
    return as_entry(VNet, arguments)


def paper_architecture(configuration: ConfigurationManager) -> dict[str, Any]:
    """Return the ``architecture`` entry for V-Net as in the paper.

    Args:
        configuration: Any configuration. If it names V-Net with a single head, all its arguments are kept. If it names
            any other V-Net, its checkpointing is kept.
    """
    if names_paper_form(configuration, VNet):
        return architecture(configuration)
    return as_entry(VNet, paper_arguments() | kept_arguments(configuration, VNet, "checkpointing"))
