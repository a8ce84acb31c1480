"""What a training makes of the plans: the network's resolved arguments, written into them.

nnU-Net rebuilds the network for prediction from the trainer's name and the plans.json saved with the model. Everything
the trainer decided therefore has to be in those plans, or a later change of a default would load old checkpoints into
another network.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from nnunet_conres import __version__

# What plans and trainer ask for by name: a checkpoint that differs here belongs to another network. In all other
# arguments a continued training follows its checkpoint, so that a default that changed since does not break it.
_TOPOLOGY_ARGUMENTS = (
    "n_stages",
    "features_per_stage",
    "kernel_sizes",
    "strides",
    "shared_encoder",
    "slice_axis",
    "background_class",
    "downsampling",
    "auxiliary_heads",
)


def differences_in_topology(theirs: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    """Where two ``architecture`` entries ask for different networks, in words; empty where they agree.

    Args:
        theirs: Entry of an existing checkpoint or model.
        ours: Entry of the training at hand.
    """
    if theirs["network_class_name"] != ours["network_class_name"]:
        return [f"{theirs['network_class_name']} there, {ours['network_class_name']} here"]
    there, here = theirs["arch_kwargs"], ours["arch_kwargs"]
    return [
        f"{argument}: {there.get(argument)} there, {here.get(argument)} here"
        for argument in _TOPOLOGY_ARGUMENTS
        if there.get(argument) != here.get(argument)
    ]


def with_paper_patch(
    entries: dict[str, Any],
    configuration: ConfigurationManager,
    patch_size: tuple[int, int, int],
    batch_size: int,
    divisor: int,
) -> dict[str, Any]:
    """Entries for the plans with the paper's patch, on every axis no larger than the images need, and its batch.

    Args:
        entries: What the trainer writes into the plans besides.
        configuration: Configuration of stock plans.
        patch_size: The paper's patch in voxels.
        batch_size: The paper's batch.
        divisor: What the network's strides multiply to; sides of the patch are rounded up to it.
    """
    median_shape = configuration.configuration.get("median_image_size_in_voxels", configuration.patch_size)
    needed = [-(-round(extent) // divisor) * divisor for extent in median_shape]
    return entries | {"patch_size": list(map(min, patch_size, needed)), "batch_size": batch_size}


def with_configuration(plans: dict[str, Any], configuration: str, **entries: Any) -> dict[str, Any]:
    """Plans in which a configuration has these entries itself (``architecture``, ``patch_size``, ``batch_size``).

    Inheritance between configurations is a shallow update, so an entry here hides the inherited one. The plugin's
    version is noted beside them; it travels with plans.json and, as part of the trainer's arguments, in checkpoints.

    Args:
        plans: Plans as nnU-Net loads them; left untouched.
        configuration: Name of the configuration.
        **entries: Its new entries.

    Returns:
        New plans.
    """
    plans = deepcopy(plans)
    plans["configurations"][configuration].update(entries)
    plans["nnunet_conres"] = {"version": __version__}
    return plans


def configuration_of(plans: dict[str, Any], configuration: str) -> ConfigurationManager:
    """The configuration with its inheritance resolved.

    Raises:
        RuntimeError: If the plans have no such configuration (nnU-Net's own message lists those there are).
    """
    return PlansManager(plans).get_configuration(configuration)
