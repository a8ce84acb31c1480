"""The ``architecture`` entry of plans: functions shared by all networks.

The topology in the plans (stages, features, kernels, strides, norm) is carried over. If plans already name one of our
networks, its arguments are kept. Each network has a module beside this one. Its ``architecture`` returns the entry of a
configuration, and ``paper_architecture``, if defined, that of the paper's form.
"""

from __future__ import annotations

import inspect
import math
import pydoc
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager

from nnunet_conres.architectures.blocks import per_stage, triple
from nnunet_conres.errors import InputError

# Arguments of nnU-Net's U-Nets that have the same meaning in our networks.
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
_IMPORTED_ARGUMENTS = ("conv_op", "norm_op", "dropout_op", "nonlin")

# Arguments that nnU-Net or a trainer sets when it builds the network.
_NOT_IN_PLANS = ("deep_supervision", "residual_outputs")


def class_path(network: type) -> str:
    """Return the name of a network's class in plans."""
    return f"{network.__module__}.{network.__name__}"


def as_entry(network: type, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entry for a network of this package, completed with the defaults of the constructor.

    Args:
        network: Class of the network.
        arguments: Arguments of its constructor.

    Returns:
        Dictionary with ``network_class_name``, ``arch_kwargs`` and ``_kw_requires_import``, as in plans.
    """
    complete: dict[str, Any] = {
        name: parameter.default
        for name, parameter in inspect.signature(network).parameters.items()
        if parameter.default is not parameter.empty and name not in _NOT_IN_PLANS
    } | deepcopy(dict(arguments))
    for name, value in complete.items():
        if isinstance(value, type):
            complete[name] = class_path(value)
        elif name in ("kernel_sizes", "strides"):
            # nnU-Net computes the scales of deep supervision from the strides, and expects three numbers per stage
            complete[name] = [triple(one) for one in per_stage(name, value, complete.get("n_stages") or len(value))]
    imports = [argument for argument in _IMPORTED_ARGUMENTS if argument in complete]
    return {"network_class_name": class_path(network), "arch_kwargs": complete, "_kw_requires_import": imports}


def own_arguments(configuration: ConfigurationManager, network: type) -> dict[str, Any] | None:
    """Return a network's arguments from plans that name it; None if they name another network."""
    is_named = configuration.network_arch_class_name == class_path(network)
    return configuration.network_arch_init_kwargs if is_named else None


def kept_arguments(configuration: ConfigurationManager, network: type, *names: str) -> dict[str, Any]:
    """Return the named arguments that plans of a network contain, to carry them over to another form of the network."""
    own = own_arguments(configuration, network) or {}
    return {name: own[name] for name in names if name in own}


def shared_arguments(configuration: ConfigurationManager, network: type) -> dict[str, Any]:
    """Return the arguments in plans that have the same meaning in one of our networks.

    Raises:
        InputError: If the plans name a paper's own network, or lack required arguments.
    """
    given = configuration.network_arch_init_kwargs
    problem = (
        f"Cannot derive {network.__name__} from these plans: their network {configuration.network_arch_class_name}"
    )
    if not has_auxiliary_heads(configuration):
        raise InputError(
            f"{problem} is a paper's own. Train it with its own trainer, or use plans of a U-Net, such as nnUNetPlans."
        )
    missing = [argument for argument in _REQUIRED_ARGUMENTS if argument not in given]
    if missing:
        raise InputError(
            f"{problem} has no {', '.join(missing)}. Use plans of a U-Net, such as nnUNetPlans or "
            f"nnUNetResEncUNetMPlans."
        )
    if given.get("nonlin") is None:
        raise InputError(f"{problem} has no nonlinearity (nonlin). Use plans of a U-Net, such as nnUNetPlans.")
    return {name: given.get(name) for name in _SHARED_ARGUMENTS} | {"conv_bias": bool(given.get("conv_bias", True))}


def set_background_class(architecture: dict[str, Any], has_regions: bool) -> None:
    """Write into an ``architecture`` entry whether the first class is the background, which has no residual map.

    Args:
        architecture: Entry of any network; unchanged if the network has no residual maps.
        has_regions: Whether the data set is trained on regions, which have no background.
    """
    if "background_class" in architecture["arch_kwargs"]:
        architecture["arch_kwargs"]["background_class"] = not has_regions


def fixed_stages(class_name: str) -> tuple[list[list[int]], list[list[int]]] | None:
    """Return strides and kernel sizes, three numbers each, of a network with a fixed topology; None for all others."""
    stages = getattr(pydoc.locate(class_name), "fixed_stages", None)
    return None if stages is None else ([list(stride) for stride in stages[0]], [list(kernel) for kernel in stages[1]])


def stages_of(configuration: ConfigurationManager) -> tuple[list[list[int]], list[list[int]]]:
    """Return strides and kernel sizes, three numbers each, of every stage; empty for a network without stages."""
    arguments = configuration.network_arch_init_kwargs
    if "n_stages" not in arguments:
        # a transformer, such as nnU-Net's Primus, has no stages
        return fixed_stages(configuration.network_arch_class_name) or ([], [])
    strides, kernel_sizes = (
        [triple(value) for value in per_stage(name, arguments[name], arguments["n_stages"])]
        for name in ("strides", "kernel_sizes")
    )
    return strides, kernel_sizes


def stride_products(architecture: Mapping[str, Any], n_axes: int) -> list[int] | None:
    """Return the product of an ``architecture`` entry's strides along each axis; None if it has no strides."""
    fixed = fixed_stages(architecture["network_class_name"])
    strides: Any = architecture["arch_kwargs"].get("strides", fixed and fixed[0])
    if not isinstance(strides, Sequence):
        return None
    return [math.prod(s[axis] if isinstance(s, Sequence) else int(s) for s in strides) for axis in range(n_axes)]


def has_auxiliary_heads(configuration: ConfigurationManager) -> bool:
    """Return whether a configuration's network outputs a segmentation at every scale, or at full size only."""
    network = pydoc.locate(configuration.network_arch_class_name)
    given = configuration.network_arch_init_kwargs
    return bool(given.get("auxiliary_heads", getattr(network, "has_auxiliary_heads", True)))


def names_paper_form(configuration: ConfigurationManager, network: type) -> bool:
    """Return whether a configuration names this network with a head at full size only, as in the papers."""
    return configuration.network_arch_class_name == class_path(network) and not has_auxiliary_heads(configuration)
