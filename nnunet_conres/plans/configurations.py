"""Write the network's resolved arguments of a training into its plans.

nnU-Net rebuilds the network for prediction from the trainer's name and the plans.json saved with the model. Those plans
must therefore contain every decision of the trainer. Otherwise, after a change of a default, old checkpoints would be
loaded into another network.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from nnunet_conres import __version__

# Arguments that plans and trainer set explicitly. A checkpoint that differs in one of them belongs to another network.
# In all other arguments a continued training follows its checkpoint, so that a changed default does not break it.
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
    """Describe how two ``architecture`` entries differ in the network that they define; empty if they agree.

    Args:
        theirs: Entry of an existing checkpoint or model.
        ours: Entry of the current training.
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
    """Return plans entries with the paper's batch size and its patch, on every axis no larger than the images need.

    Args:
        entries: Further entries that the trainer writes into the plans.
        configuration: Configuration of stock plans.
        patch_size: The paper's patch in voxels.
        batch_size: The paper's batch size.
        divisor: Product of the network's strides; the extent that the images need is rounded up to a multiple of it.
    """
    median_shape = configuration.configuration.get("median_image_size_in_voxels", configuration.patch_size)
    needed = [-(-round(extent) // divisor) * divisor for extent in median_shape]
    return entries | {"patch_size": list(map(min, patch_size, needed)), "batch_size": batch_size}


def with_configuration(plans: dict[str, Any], configuration: str, **entries: Any) -> dict[str, Any]:
    """Return plans in which a configuration has these entries (``architecture``, ``patch_size``, ``batch_size``).

    Inheritance between configurations is a shallow update, so an entry set here hides the inherited one. The plans also
    get the plugin's version. It is saved with plans.json and, as part of the trainer's arguments, in checkpoints.

    Args:
        plans: Plans as nnU-Net loads them; not modified.
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
    """Return the configuration with its inheritance resolved.

    Raises:
        RuntimeError: If the plans have no such configuration (nnU-Net's message lists the available ones).
    """
    return PlansManager(plans).get_configuration(configuration)
