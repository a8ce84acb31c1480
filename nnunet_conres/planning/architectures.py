"""From the ``architecture`` entry of nnU-Net's plans to that of our networks, every argument spelled out.

What plans say of a topology (stages, features, kernels, strides, norm) is carried over. Plans that name one of our
networks already keep its arguments.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager

from nnunet_conres.architectures import conresnet_paper, unet3d, vnet
from nnunet_conres.architectures.blocks import per_stage, triple
from nnunet_conres.errors import InputError

CONRESNET = "nnunet_conres.architectures.conresnet.ConResNet"
CONRESNET_PAPER = "nnunet_conres.architectures.conresnet_paper.ConResNetPaper"
RESIDUAL_MAP_UNET = "nnunet_conres.architectures.residual_map_unet.ResidualMapUNet"
VNET = "nnunet_conres.architectures.vnet.VNet"
UNET3D = "nnunet_conres.architectures.unet3d.UNet3D"

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
_IMPORTED_ARGUMENTS = ("conv_op", "norm_op", "dropout_op", "nonlin")

_NO_LAYERS = {
    "norm_op": None,
    "norm_op_kwargs": None,
    "dropout_op": None,
    "dropout_op_kwargs": None,
    "nonlin_kwargs": None,
}
_VNET_DEFAULTS = _NO_LAYERS | {
    "n_conv_per_stage": None,
    "n_conv_per_stage_decoder": None,
    "conv_bias": True,
    "nonlin": "torch.nn.PReLU",
    "auxiliary_heads": True,
    "checkpointing": "none",
}
_UNET3D_DEFAULTS = _NO_LAYERS | {
    "n_conv_per_stage": 2,
    "n_conv_per_stage_decoder": 2,
    "conv_bias": False,
    "nonlin": None,
    "downsampling": "strided_conv",
    "auxiliary_heads": True,
    "checkpointing": "none",
}


def conresnet_architecture(configuration: ConfigurationManager, shared_encoder: bool = False) -> dict[str, Any]:
    """The ``architecture`` entry of a configuration for ConResNet.

    Args:
        configuration: Configuration of stock plans, or of plans that name ConResNet already, which keep its arguments.
        shared_encoder: Whether one encoder runs over image and image residual. The trainer decides, whatever the plans
            say, so that its name says which network it trains.

    Returns:
        Dictionary with ``network_class_name``, ``arch_kwargs`` and ``_kw_requires_import``, as plans hold it.

    Raises:
        InputError: If the plans name a network whose topology can't be carried over.
    """
    entry = _residual_map_entry(configuration, CONRESNET, {"slice_axis": 0})
    entry["arch_kwargs"]["shared_encoder"] = shared_encoder
    return entry


def residual_maps_architecture(configuration: ConfigurationManager) -> dict[str, Any]:
    """The ``architecture`` entry of a configuration for ResidualMapUNet.

    Args:
        configuration: Configuration of stock plans, or of plans that name ResidualMapUNet already, which keep its
            arguments.

    Raises:
        InputError: If the plans name a network whose topology can't be carried over.
    """
    return _residual_map_entry(configuration, RESIDUAL_MAP_UNET, {})


def _residual_map_entry(
    configuration: ConfigurationManager, class_name: str, own_arguments: Mapping[str, Any]
) -> dict[str, Any]:
    """Entry for a network with nnU-Net's residual encoder and residual maps; ``own_arguments`` are its defaults."""
    network = class_name.rpartition(".")[2]
    given = deepcopy(configuration.network_arch_init_kwargs)
    arguments = _shared_arguments(configuration, network)
    arguments |= {"background_class": False, "checkpointing": "none", **own_arguments}
    if configuration.network_arch_class_name == class_name:
        return _entry(class_name, arguments | given)
    n_stages = given["n_stages"]
    blocks = given.get("n_blocks_per_stage")
    if blocks is None:
        # a residual block has two convolutions: as many as the plans ask for
        convs = per_stage("n_conv_per_stage", given.get("n_conv_per_stage", 2), n_stages)
        blocks = [max(1, n // 2) for n in convs]
    arguments["n_blocks_per_stage"] = blocks
    # Stock plans have two convolutions per decoder level; these networks have one, ConResNet one in either stream.
    arguments["n_conv_per_stage_decoder"] = [1] * (n_stages - 1)
    return _entry(class_name, arguments)


def conresnet_paper_architecture(configuration: ConfigurationManager) -> dict[str, Any]:
    """The ``architecture`` entry of a configuration for the paper's ConResNet.

    Args:
        configuration: Any configuration; one that names ConResNetPaper itself keeps its arguments.
    """
    arguments = {
        "strides": [list(stride) for stride in conresnet_paper.STRIDES],
        "background_class": False,
        "slice_axis": 0,
        "checkpointing": "none",
    }
    if configuration.network_arch_class_name == CONRESNET_PAPER:
        arguments |= deepcopy(configuration.network_arch_init_kwargs)
    else:
        arguments["checkpointing"] = _checkpointing_of(configuration, CONRESNET)
    return _entry(CONRESNET_PAPER, arguments)


def set_background_class(architecture: dict[str, Any], has_regions: bool) -> None:
    """Writes into an ``architecture`` entry whether the first class is the background, which has no residual map.

    Args:
        architecture: Entry of any network; left as it is where the network has no residual maps.
        has_regions: Whether the data set is trained on regions, which have no background.
    """
    if "background_class" in architecture["arch_kwargs"]:
        architecture["arch_kwargs"]["background_class"] = not has_regions


def stages_of(configuration: ConfigurationManager) -> tuple[list[list[int]], list[list[int]]]:
    """Strides and kernel sizes, three numbers each, of every stage of a network; empty for one without stages."""
    if configuration.network_arch_class_name == CONRESNET_PAPER:
        return [list(s) for s in conresnet_paper.STRIDES], [list(k) for k in conresnet_paper.KERNEL_SIZES]
    arguments = configuration.network_arch_init_kwargs
    if "n_stages" not in arguments:  # a transformer, such as nnU-Net's Primus
        return [], []
    strides, kernel_sizes = (
        [triple(value) for value in per_stage(name, arguments[name], arguments["n_stages"])]
        for name in ("strides", "kernel_sizes")
    )
    return strides, kernel_sizes


def vnet_architecture(configuration: ConfigurationManager) -> dict[str, Any]:
    """The ``architecture`` entry of a configuration for V-Net.

    Kernels grow from 3 to 5. Features are half of the plans': V-Net's decoder works on twice its encoder's, so that it
    has those of nnU-Net's U-Net, and its encoder starts with the paper's 16 where plans say 32.

    Args:
        configuration: Configuration of stock plans, or of plans that name V-Net already, which keep its arguments.

    Raises:
        InputError: If the plans name a network whose topology can't be carried over.
    """
    if configuration.network_arch_class_name == VNET:
        return _entry(VNET, _VNET_DEFAULTS | deepcopy(configuration.network_arch_init_kwargs))
    arguments = _shared_arguments(configuration, "VNet")
    n_stages = arguments["n_stages"]
    features = per_stage("features_per_stage", arguments["features_per_stage"], n_stages)
    kernel_sizes = per_stage("kernel_sizes", arguments["kernel_sizes"], n_stages)
    convolutions = vnet.convolutions_per_stage(n_stages)
    arguments |= {
        "features_per_stage": [max(1, f // 2) for f in features],
        "kernel_sizes": [[5 if k == 3 else k for k in triple(kernel)] for kernel in kernel_sizes],
        "n_conv_per_stage": convolutions,
        "n_conv_per_stage_decoder": convolutions[-2::-1],
        "nonlin": "torch.nn.PReLU",
        "nonlin_kwargs": {},
        "auxiliary_heads": True,
        "checkpointing": "none",
    }
    return _entry(VNET, arguments)


def vnet_paper_architecture(configuration: ConfigurationManager) -> dict[str, Any]:
    """The ``architecture`` entry for V-Net as the paper has it.

    Args:
        configuration: Any configuration; one that names V-Net with a single head itself keeps its arguments.
    """
    if names_single_headed(configuration, VNET):
        return vnet_architecture(configuration)
    arguments = _as_plans(vnet.paper_arguments())
    arguments["checkpointing"] = _checkpointing_of(configuration, VNET)
    return _entry(VNET, arguments)


def unet3d_architecture(configuration: ConfigurationManager) -> dict[str, Any]:
    """The ``architecture`` entry of a configuration for 3D U-Net.

    A stage's features are what leaves it: where plans say 32, 64 the first makes 16, then 32, the second 32, then 64.

    Args:
        configuration: Configuration of stock plans, or of plans that name 3D U-Net already, which keep its arguments.

    Raises:
        InputError: If the plans name a network whose topology can't be carried over.
    """
    given = deepcopy(configuration.network_arch_init_kwargs)
    if configuration.network_arch_class_name == UNET3D:
        return _entry(UNET3D, _UNET3D_DEFAULTS | given)
    arguments = _shared_arguments(configuration, "UNet3D")
    n_stages = arguments["n_stages"]
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
    return _entry(UNET3D, arguments)


def unet3d_paper_architecture(configuration: ConfigurationManager) -> dict[str, Any]:
    """The ``architecture`` entry for 3D U-Net as the paper has it, but for ``downsampling``, which plans may choose.

    Args:
        configuration: Any configuration; one that names 3D U-Net with a single head itself keeps its arguments, one
            that names 3D U-Net at all its way of downsampling; others get strided convolutions.
    """
    if names_single_headed(configuration, UNET3D):
        return unet3d_architecture(configuration)
    arguments = _as_plans(unet3d.paper_arguments())
    if configuration.network_arch_class_name == UNET3D:
        given = configuration.network_arch_init_kwargs
        arguments["downsampling"] = given.get("downsampling", arguments["downsampling"])
    arguments["checkpointing"] = _checkpointing_of(configuration, UNET3D)
    return _entry(UNET3D, arguments)


def _checkpointing_of(configuration: ConfigurationManager, class_name: str) -> str:
    """What plans of a network say of its checkpointing, which the network's other topology takes over."""
    if configuration.network_arch_class_name != class_name:
        return "none"
    return str(configuration.network_arch_init_kwargs.get("checkpointing", "none"))


def names_conresnet_paper(configuration: ConfigurationManager) -> bool:
    """Whether a configuration asks for the paper's ConResNet itself."""
    return configuration.network_arch_class_name == CONRESNET_PAPER


def names_single_headed(configuration: ConfigurationManager, class_name: str) -> bool:
    """Whether a configuration asks for V-Net or 3D U-Net with a head at full size only, as the papers have them.

    Args:
        configuration: Any configuration.
        class_name: Which of the two.
    """
    return (
        configuration.network_arch_class_name == class_name
        and configuration.network_arch_init_kwargs.get("auxiliary_heads", True) is False
    )


def has_auxiliary_heads(configuration: ConfigurationManager) -> bool:
    """Whether the network of a configuration puts out a segmentation at every scale; if not, at full size only."""
    if names_conresnet_paper(configuration):
        return False
    return bool(configuration.network_arch_init_kwargs.get("auxiliary_heads", True))


def _shared_arguments(configuration: ConfigurationManager, network: str) -> dict[str, Any]:
    """What plans say of a network and means the same for ours.

    Raises:
        InputError: If they say too little.
    """
    given = deepcopy(configuration.network_arch_init_kwargs)
    missing = [argument for argument in _REQUIRED_ARGUMENTS if argument not in given]
    is_paper = names_conresnet_paper(configuration) or given.get("auxiliary_heads") is False
    if missing and not is_paper:
        raise InputError(
            f"Cannot derive {network} from these plans: their network {configuration.network_arch_class_name} has no "
            f"{', '.join(missing)}. Use plans of a U-Net, such as nnUNetPlans or nnUNetResEncUNetMPlans."
        )
    if is_paper:
        raise InputError(
            f"Cannot derive {network} from these plans: their network {configuration.network_arch_class_name} is a "
            f"paper's own. Train it with its own trainer, or use plans of a U-Net, such as nnUNetPlans."
        )
    if given.get("nonlin") is None:
        raise InputError(
            f"Cannot derive {network} from these plans: their network {configuration.network_arch_class_name} has no "
            f"nonlinearity (nonlin). Use plans of a U-Net, such as nnUNetPlans."
        )
    arguments = {argument: given.get(argument) for argument in _SHARED_ARGUMENTS}
    arguments["conv_bias"] = bool(given.get("conv_bias", True))
    return arguments


def _entry(class_name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    # nnU-Net takes the scales of deep supervision from the strides, and wants three numbers for each stage
    for argument in ("kernel_sizes", "strides"):
        if argument in arguments and "n_stages" in arguments:
            values = per_stage(argument, arguments[argument], arguments["n_stages"])
            arguments[argument] = [triple(value) for value in values]
    imports = [argument for argument in _IMPORTED_ARGUMENTS if argument in arguments]
    return {"network_class_name": class_name, "arch_kwargs": arguments, "_kw_requires_import": imports}


def _as_plans(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments with classes named by where they are imported from, as JSON can hold them."""
    return {
        argument: f"{value.__module__}.{value.__name__}" if isinstance(value, type) else value
        for argument, value in arguments.items()
    }
