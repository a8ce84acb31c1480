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
from nnunet_conres.architectures.conresnet_paper import paper_arguments

CONRESNET = "nnunet_conres.architectures.conresnet.ConResNet"

# Arguments of nnU-Net's U-Nets that mean the same for our networks.
_SHARED_ARGUMENTS = (
    "n_stages",
    "features_per_stage",
    "conv_op",
    "kernel_sizes",
    "strides",
    "conv_bias",
    "norm_op",
    "norm_op_kwargs",
    "dropout_op",
    "dropout_op_kwargs",
    "nonlin",
    "nonlin_kwargs",
)
_REQUIRED_ARGUMENTS = ("n_stages", "features_per_stage", "conv_op", "kernel_sizes", "strides")
_IMPORTED_ARGUMENTS = ["conv_op", "norm_op", "dropout_op", "nonlin"]

# What ConResNet's constructor does with an argument that is left out. These never change: an argument missing in plans
# that name ConResNet means what it meant when they were written. A better default goes into the functions below.
_CONSTRUCTOR_DEFAULTS = {"residual_input": "decoder", "slice_axis": 0, "topology": "dynamic"}

# What plans and trainer ask for by name; a checkpoint that differs here can't be continued. In all other arguments a
# continued training follows its checkpoint.
TOPOLOGY_ARGUMENTS = ("n_stages", "features_per_stage", "kernel_sizes", "strides", "topology", "residual_input")


def conresnet_architecture(configuration: ConfigurationManager, residual_input: str | None = None) -> dict[str, Any]:
    """The ``architecture`` entry of a configuration for ConResNet, every argument spelled out.

    Args:
        configuration: Configuration of stock plans, which becomes the dynamic topology, or of plans that name ConResNet
            already, which keep their topology and arguments.
        residual_input: ``"decoder"`` or ``"shared_encoder"``; None keeps what the plans say, else "decoder".

    Returns:
        Dictionary with ``network_class_name``, ``arch_kwargs`` and ``_kw_requires_import``, as plans hold it.

    Raises:
        ValueError: If the plans name a network whose topology can't be carried over.
    """
    if names_paper_topology(configuration):
        return conresnet_paper_architecture(configuration, residual_input)
    given = deepcopy(configuration.network_arch_init_kwargs)
    name = configuration.network_arch_class_name
    missing = [argument for argument in _REQUIRED_ARGUMENTS if argument not in given]
    if missing:
        raise ValueError(
            f"Cannot derive ConResNet from these plans: their network {name} has no {', '.join(missing)}. Use plans of "
            f"a U-Net, such as nnUNetPlans or nnUNetResEncUNetMPlans."
        )
    arguments = {argument: given.get(argument) for argument in _SHARED_ARGUMENTS}
    arguments["conv_bias"] = bool(given.get("conv_bias", False))
    arguments |= _CONSTRUCTOR_DEFAULTS
    n_stages = given["n_stages"]
    blocks = given.get("n_blocks_per_stage")
    if blocks is None:
        # a residual block has two convolutions: as many as the plans ask for
        convs = given.get("n_conv_per_stage", 2)
        blocks = [max(1, n // 2) for n in (convs if isinstance(convs, (list, tuple)) else [convs] * n_stages)]
    arguments["n_blocks_per_stage"] = blocks
    # Stock plans have two convolutions per decoder level; here one is the segmentation's and one the residual's.
    arguments["n_conv_per_stage_decoder"] = [1] * (n_stages - 1)
    if name == CONRESNET:
        arguments |= {argument: value for argument, value in given.items() if argument != "n_conv_per_stage"}
        arguments["n_blocks_per_stage"] = blocks
    if residual_input is not None:
        arguments["residual_input"] = residual_input
    return _architecture(arguments)


def conresnet_paper_architecture(
    configuration: ConfigurationManager, residual_input: str | None = None
) -> dict[str, Any]:
    """The ``architecture`` entry of a configuration for the paper topology.

    Args:
        configuration: Any configuration; one that names the paper topology itself keeps its other arguments.
        residual_input: As for ``conresnet_architecture``.
    """
    arguments = paper_arguments()
    arguments["conv_op"] = f"{arguments['conv_op'].__module__}.{arguments['conv_op'].__name__}"
    arguments |= _CONSTRUCTOR_DEFAULTS | {"topology": "paper"}
    if names_paper_topology(configuration):
        arguments |= configuration.network_arch_init_kwargs
    if residual_input is not None:
        arguments["residual_input"] = residual_input
    return _architecture(arguments)


def _architecture(arguments: dict[str, Any]) -> dict[str, Any]:
    imports = [argument for argument in _IMPORTED_ARGUMENTS if argument in arguments]
    return {"network_class_name": CONRESNET, "arch_kwargs": arguments, "_kw_requires_import": imports}


def names_paper_topology(configuration: ConfigurationManager) -> bool:
    """Whether a configuration asks for the paper topology itself."""
    return (
        configuration.network_arch_class_name == CONRESNET
        and configuration.network_arch_init_kwargs.get("topology") == "paper"
    )


def differences_in_topology(theirs: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    """Where two ``architecture`` entries ask for different networks, in words; empty where they agree.

    Args:
        theirs: Entry of an existing checkpoint or model.
        ours: Entry of the training at hand.
    """
    if theirs["network_class_name"] != ours["network_class_name"]:
        return [f"{theirs['network_class_name']} there, {ours['network_class_name']} here"]
    return [
        f"{argument}: {theirs['arch_kwargs'].get(argument)} there, {ours['arch_kwargs'].get(argument)} here"
        for argument in TOPOLOGY_ARGUMENTS
        if theirs["arch_kwargs"].get(argument) != ours["arch_kwargs"].get(argument)
    ]


def paper_patch_size(paper: tuple[int, int, int], median_shape: list[float], divisor: int) -> list[int]:
    """The paper's patch, on every axis no larger than the images need.

    Args:
        paper: Patch of the paper in voxels.
        median_shape: Median image shape in voxels, axes in the same order.
        divisor: What the network's strides multiply to; sizes are rounded up to it.

    Returns:
        Patch size in voxels, every entry a multiple of ``divisor``.
    """
    needed = [-(-round(extent) // divisor) * divisor for extent in median_shape]
    return [min(p, n) for p, n in zip(paper, needed, strict=True)]


def with_configuration(plans: dict[str, Any], configuration: str, **entries: Any) -> dict[str, Any]:
    """Plans whose configuration has these entries (``architecture``, ``patch_size``, ``batch_size``) of its own.

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
