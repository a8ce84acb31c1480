"""The networks that the benchmark compares. All use the same nnU-Net configuration; each has its trainer's loss.

No data set is needed: the plans are those that nnU-Net's planner would write for the patch, and the images are noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from batchgeneratorsv2.transforms.utils.deep_supervision_downsampling import DownsampleSegForDSTransform
from batchgeneratorsv2.transforms.utils.seg_to_regions import ConvertSegmentationToRegionsTransform
from nnunetv2.experiment_planning.experiment_planners.network_topology import get_pool_and_conv_props
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.timing import BenchmarkError
from nnunet_conres.architectures.conresnet_paper import DIVISOR
from nnunet_conres.architectures.network import ResidualMapsMixin
from nnunet_conres.plans.configurations import configuration_of, with_configuration
from nnunet_conres.plans.entries import set_background_class
from nnunet_conres.trainers.base import PluginTrainer
from nnunet_conres.trainers.conresnet import (
    nnUNetTrainerConResNet,
    nnUNetTrainerConResNetPaper,
    nnUNetTrainerConResNetSharedEncoder,
)
from nnunet_conres.trainers.recipe import MuonMixin
from nnunet_conres.trainers.residual_maps import nnUNetTrainerResidualMaps
from nnunet_conres.trainers.stock import nnUNetTrainerMuon
from nnunet_conres.trainers.unet3d import nnUNetTrainerUNet3D
from nnunet_conres.trainers.vnet import nnUNetTrainerVNet

CONFIGURATION = "3d_fullres"
NETWORKS: dict[str, type[nnUNetTrainer]] = {
    "plainconvunet": nnUNetTrainer,
    "resenc": nnUNetTrainer,
    "plainconvunet_muon": nnUNetTrainerMuon,
    "conresnet": nnUNetTrainerConResNet,
    "residual_maps": nnUNetTrainerResidualMaps,
    "conresnet_shared_encoder": nnUNetTrainerConResNetSharedEncoder,
    "conresnet_paper": nnUNetTrainerConResNetPaper,
    "vnet": nnUNetTrainerVNet,
    "unet3d": nnUNetTrainerUNet3D,
}
OURS = tuple(name for name, trainer in NETWORKS.items() if issubclass(trainer, PluginTrainer))
OUR_NETWORKS = tuple(name for name in OURS if NETWORKS[name] is not nnUNetTrainerMuon)
# Suffix of a name: the same network from the same plans, as nnU-Net's own trainer builds it, contiguous in memory.
CONTIGUOUS = "_contiguous"

# values of nnU-Net's planners
_BASE_FEATURES, _MAX_FEATURES, _MIN_EDGE = 32, 320, 4
_RESIDUAL_BLOCKS = (1, 3, 4, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6)
_UNETS = "dynamic_network_architectures.architectures.unet."


@dataclass(frozen=True)
class Task:
    """A segmentation task.

    Attributes:
        patch: Size of the patch in voxels.
        batch: Patches per step.
        channels: Image channels.
        classes: Foreground labels; ignored if there are regions.
        regions: Number of regions, each within the one before, or None for labels.
    """

    patch: tuple[int, ...]
    batch: int
    channels: int
    classes: int
    regions: int | None = None

    @property
    def dataset_json(self) -> dict[str, Any]:
        """Channels and labels as in dataset.json."""
        labels: dict[str, Any] = {"background": 0}
        dataset: dict[str, Any] = {"channel_names": {str(i): f"channel {i}" for i in range(self.channels)}}
        if self.regions is None:
            labels |= {f"label {i}": i for i in range(1, self.classes + 1)}
        else:
            labels |= {f"region {i}": list(range(i, self.regions + 2)) for i in range(1, self.regions + 1)}
            dataset["regions_class_order"] = list(range(1, self.regions + 1))
        return dataset | {"labels": labels}

    def __str__(self) -> str:
        what = _count(self.classes, "label") if self.regions is None else _count(self.regions, "region")
        return f"batch {self.batch}, patch {_by(self.patch)}, {_count(self.channels, 'channel')}, {what}"


@dataclass
class Model:
    """A network ready to train or to predict.

    Attributes:
        network: The network.
        loss: Loss of its trainer, a function of outputs and targets.
        scales: Scales of deep supervision relative to the patch, per target.
        plans: Plans with the network's architecture.
        configuration: The only configuration of the plans.
        task: The task of the network.
        optimizer: "muon", or nnU-Net's "sgd", which also replaces Adam of the paper's trainer.
        is_fast: Whether it is trained as our trainers do it on a GPU.
    """

    network: nn.Module
    loss: nn.Module
    scales: list[list[float]]
    plans: PlansManager
    configuration: ConfigurationManager
    task: Task
    optimizer: str
    is_fast: bool


def stock_plans(task: Task, residual_encoder: bool = False) -> dict[str, Any]:
    """Return plans with the U-Net that nnU-Net's planner builds for an isotropic spacing and this patch.

    Args:
        task: The task.
        residual_encoder: Whether to use nnU-Net's U-Net with a residual encoder instead of the plain one.

    Raises:
        BenchmarkError: If nnU-Net would not plan such a patch.
    """
    _, strides, kernels, fitting, _ = get_pool_and_conv_props((1, 1, 1), task.patch, _MIN_EDGE, 999999)
    if [int(extent) for extent in fitting] != list(task.patch):
        raise BenchmarkError(
            f"nnU-Net would not plan the patch {_by(task.patch)}: strides don't divide its sides. Use {_by(fitting)}."
        )
    n_stages = len(strides)
    if n_stages < 3:
        raise BenchmarkError(
            f"For the patch {_by(task.patch)} nnU-Net would plan {n_stages} stages; its deep supervision needs 3. Use "
            f"a patch of at least 16 x 16 x 16."
        )
    arguments = {
        "n_stages": n_stages,
        "features_per_stage": [min(_MAX_FEATURES, _BASE_FEATURES * 2**stage) for stage in range(n_stages)],
        "conv_op": "torch.nn.modules.conv.Conv3d",
        "kernel_sizes": [list(kernel) for kernel in kernels],
        "strides": [list(stride) for stride in strides],
        "conv_bias": True,
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }
    if residual_encoder:
        arguments["n_blocks_per_stage"] = list(_RESIDUAL_BLOCKS[:n_stages])
        arguments["n_conv_per_stage_decoder"] = [1] * (n_stages - 1)
    else:
        arguments["n_conv_per_stage"] = [2] * n_stages
        arguments["n_conv_per_stage_decoder"] = [2] * (n_stages - 1)
    architecture = {
        "network_class_name": _UNETS + ("ResidualEncoderUNet" if residual_encoder else "PlainConvUNet"),
        "arch_kwargs": arguments,
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }
    configuration = {
        "patch_size": list(task.patch),
        "batch_size": task.batch,
        "batch_dice": False,
        "spacing": [1.0, 1.0, 1.0],
        "architecture": architecture,
    }
    return {
        "plans_name": "nnUNetPlans",
        "label_manager": "LabelManager",
        "configurations": {CONFIGURATION: configuration},
    }


def build(name: str, task: Task, device: torch.device, deep_supervision: bool = True) -> Model:
    """Build a network with fresh weights, and its loss.

    Args:
        name: One of ``NETWORKS``, or one of ``OURS`` followed by ``CONTIGUOUS``.
        task: The task of the network.
        device: Device of the weights.
        deep_supervision: True to build it for training, False for prediction.

    Raises:
        BenchmarkError: If the network cannot take the patch.
    """
    is_fast = name in OURS
    name = name.removesuffix(CONTIGUOUS)
    trainer = NETWORKS[name]
    plans = stock_plans(task, residual_encoder=name == "resenc")
    if name == "conresnet_paper" and any(extent % DIVISOR for extent in task.patch):
        raise BenchmarkError(
            f"{name} halves the resolution three times: the sides of the patch {_by(task.patch)} must be divisible by "
            f"{DIVISOR}."
        )
    if issubclass(trainer, PluginTrainer):
        architecture = trainer.architecture(configuration_of(plans, CONFIGURATION))
        set_background_class(architecture, task.regions is not None)
        plans = with_configuration(plans, CONFIGURATION, architecture=architecture)
    manager = PlansManager(plans)
    configuration = manager.get_configuration(CONFIGURATION)
    heads = manager.get_label_manager(task.dataset_json).num_segmentation_heads
    builder = trainer if is_fast else nnUNetTrainer
    network = builder.build_network_architecture(manager, configuration, task.channels, heads, deep_supervision)
    if isinstance(network, ResidualMapsMixin):
        network.residual_outputs = deep_supervision
    loss, scales = _loss_of(trainer, manager, configuration, task)
    optimizer = "muon" if issubclass(trainer, MuonMixin) else "sgd"
    return Model(network.to(device), loss.to(device), scales, manager, configuration, task, optimizer, is_fast)


def _loss_of(
    trainer_class: type[nnUNetTrainer], plans: PlansManager, configuration: ConfigurationManager, task: Task
) -> tuple[nn.Module, list[list[float]]]:
    """Return a trainer's loss and its scales of deep supervision."""
    # the constructor needs a data set, so the trainer's method runs on an instance with only the attributes it reads
    trainer: Any = object.__new__(trainer_class)
    trainer.plans_manager, trainer.configuration_manager = plans, configuration
    trainer.label_manager = plans.get_label_manager(task.dataset_json)
    trainer.is_ddp, trainer.enable_deep_supervision = False, True
    trainer._do_i_compile = lambda: False
    return trainer._build_loss(), trainer._get_deep_supervision_scales()


def make_batch(model: Model, device: torch.device, seed: int = 0) -> tuple[Tensor, list[Tensor]]:
    """Make a batch of noise and blocks of labels at all scales, as nnU-Net's loader passes it to a training step.

    Args:
        model: The model that the batch is for.
        device: Device of the batch.
        seed: Seed of the random numbers.

    Returns:
        Images, shape (B, C, X, Y, Z), and targets, (B, 1, x, y, z) int16 or (B, R, x, y, z) bool, full size first.
    """
    task = model.task
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(task.batch, task.channels, *task.patch, generator=generator)
    n_labels = task.classes + 1 if task.regions is None else task.regions + 2
    blocks = torch.randint(0, n_labels, (task.batch, 1, *(-(-e // 4) for e in task.patch)), generator=generator)
    labels = F.interpolate(blocks.float(), task.patch, mode="nearest").to(torch.int16)
    downsample = DownsampleSegForDSTransform(model.scales)
    cases = list(labels)
    if task.regions is not None:
        regions = model.plans.get_label_manager(task.dataset_json).foreground_regions
        to_regions = ConvertSegmentationToRegionsTransform(regions)
        cases = [to_regions(segmentation=case)["segmentation"] for case in cases]
    levels = [downsample(segmentation=case)["segmentation"] for case in cases]
    return images.to(device), [torch.stack(level).to(device) for level in zip(*levels, strict=True)]


def _by(sizes: Sequence[int] | np.ndarray) -> str:
    return " x ".join(str(int(size)) for size in sizes)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
