"""Trainers of ConResNet. As in nnU-Net, a variant is the one thing that differs, and its name says it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.random import RandomTransform
from nnunetv2.training.data_augmentation.compute_initial_patch_size import get_patch_size
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn

from nnunet_conres.architectures.conresnet import ConResNet
from nnunet_conres.architectures.conresnet_paper import PAPER_DIVISOR
from nnunet_conres.losses import PAPER_RESIDUAL_WEIGHT, RESIDUAL_WEIGHT, ConResLoss, ResidualMapLoss
from nnunet_conres.trainers.base import PluginTrainer, check_slice_axis
from nnunet_conres.trainers.plans import (
    conresnet_architecture,
    conresnet_paper_architecture,
    names_paper_topology,
    paper_patch_size,
)

PAPER_PATCH_SIZE = (80, 160, 160)
PAPER_BATCH_SIZE = 2


class nnUNetTrainerConResNet(PluginTrainer):
    """ConResNet under nnU-Net's own recipe, its topology derived from the plans."""

    loss_parts = ("segmentation", "residual")
    residual_weight: float = RESIDUAL_WEIGHT
    residual_input: str | None = None

    @classmethod
    def resolve(cls, configuration: ConfigurationManager, name: str) -> dict[str, Any]:
        check_slice_axis(configuration, name, "ConResNet")
        if names_paper_topology(configuration):
            check_paper_patch(configuration, name)
        return {"architecture": conresnet_architecture(configuration, cls.residual_input)}

    @staticmethod
    def build_network_architecture(
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        """Builds the network that the plans name, or derives it from stock plans; also called for prediction."""
        architecture = conresnet_architecture(configuration_manager)
        return _build(architecture, num_input_channels, num_output_channels, enable_deep_supervision)

    def _get_deep_supervision_scales(self) -> list[list[float]]:
        if names_paper_topology(self.configuration_manager):
            return [[1.0, 1.0, 1.0]]  # one segmentation head, at full size
        return super()._get_deep_supervision_scales()

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        super().set_deep_supervision_enabled(enabled)
        network = self._unwrapped_network()
        assert isinstance(network, ConResNet)
        network.residual_outputs = enabled

    def _build_loss(self) -> nn.Module:
        if not self.enable_deep_supervision:
            raise ValueError(
                "ConResNet's residual maps are supervised where nnU-Net's deep supervision is: leave "
                "enable_deep_supervision on, or train plans that name ConResNet with a stock trainer."
            )
        scales = self._get_deep_supervision_scales()
        # nnU-Net gives the coarsest scale no weight; with a single scale it divides 0 by 0
        with np.errstate(invalid="ignore"):
            segmentation = super()._build_loss()
        if len(scales) == 1:
            segmentation.weight_factors = (1.0,)
        labels = self.label_manager
        residual = ResidualMapLoss(
            classes=None if labels.has_regions else labels.foreground_labels,
            ignore_label=labels.ignore_label,
            slice_axis=self.configuration_manager.network_arch_init_kwargs["slice_axis"],
            background_channel=not labels.has_regions,
            ddp=self.is_ddp,
        )
        return ConResLoss(segmentation, residual, len(scales), self.residual_weight)


def check_paper_patch(configuration: ConfigurationManager, name: str) -> None:
    """Refuses patches that the paper topology can't take.

    Raises:
        ValueError: If a side of the patch is not divisible by 8.
    """
    patch_size = [int(extent) for extent in configuration.patch_size]
    if any(extent % PAPER_DIVISOR for extent in patch_size):
        fitting = [-(-extent // PAPER_DIVISOR) * PAPER_DIVISOR for extent in patch_size]
        raise ValueError(
            f"The paper topology halves the resolution three times: every side of the patch must be divisible by "
            f"{PAPER_DIVISOR}, but configuration {name} has {patch_size}. {fitting} would do."
        )


def _build(
    architecture: dict[str, Any], num_input_channels: int, num_output_channels: int, enable_deep_supervision: bool
) -> nn.Module:
    network = get_network_from_plans(
        architecture["network_class_name"],
        architecture["arch_kwargs"],
        architecture["_kw_requires_import"],
        num_input_channels,
        num_output_channels,
        allow_init=True,
        deep_supervision=enable_deep_supervision,
    )
    # Residual maps are supervised with the segmentation, and left out with it.
    network.residual_outputs = enable_deep_supervision
    return network


class nnUNetTrainerConResNetSharedEncoder(nnUNetTrainerConResNet):
    """One encoder, with the same weights, runs over the image and over its inter-slice residual."""

    residual_input = "shared_encoder"

    @staticmethod
    def build_network_architecture(
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        architecture = conresnet_architecture(configuration_manager, "shared_encoder")
        return _build(architecture, num_input_channels, num_output_channels, enable_deep_supervision)


class nnUNetTrainerConResNet_NoMirroring(nnUNetTrainerConResNet):
    """Without mirroring, neither as augmentation nor at prediction."""

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self) -> tuple[Any, ...]:  # noqa: N802
        rotation, dummy_2d, initial_patch_size, _ = super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        self.inference_allowed_mirroring_axes = None
        return rotation, dummy_2d, initial_patch_size, None


class nnUNetTrainerConResNetPaper(nnUNetTrainerConResNet):
    """The paper: its topology, loss, optimiser, schedule, patch, batch and augmentation.

    With stock plans patch and batch size become the paper's (80 x 160 x 160, no axis larger than the images need; 2). A
    configuration that names the paper topology itself keeps its own.

    Source: Zhang et al. 2021, sections III-E and IV-B.
    """

    training_epochs = 160  # of 250 iterations: 40,000
    residual_weight = PAPER_RESIDUAL_WEIGHT
    scaling = (0.9, 1.1)

    def __init__(
        self,
        plans: dict[str, Any],
        configuration: str,
        fold: int,
        dataset_json: dict[str, Any],
        device: torch.device = torch.device("cuda"),  # noqa: B008  (nnU-Net's own signature)
    ) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.initial_lr = 1e-4
        self.weight_decay = 5e-4

    @classmethod
    def resolve(cls, configuration: ConfigurationManager, name: str) -> dict[str, Any]:
        check_slice_axis(configuration, name, "ConResNet")
        entries: dict[str, Any] = {"architecture": conresnet_paper_architecture(configuration)}
        if names_paper_topology(configuration):
            check_paper_patch(configuration, name)
        else:
            median_shape = configuration.configuration.get("median_image_size_in_voxels", configuration.patch_size)
            entries["patch_size"] = paper_patch_size(PAPER_PATCH_SIZE, median_shape, PAPER_DIVISOR)
            entries["batch_size"] = PAPER_BATCH_SIZE
        return entries

    @staticmethod
    def build_network_architecture(
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        architecture = conresnet_paper_architecture(configuration_manager)
        return _build(architecture, num_input_channels, num_output_channels, enable_deep_supervision)

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, PolyLRScheduler]:
        optimizer = torch.optim.Adam(self.network.parameters(), self.initial_lr, weight_decay=self.weight_decay)
        return optimizer, PolyLRScheduler(optimizer, self.initial_lr, self.num_epochs, exponent=0.9)

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        # the paper's rate falls with every iteration, nnU-Net's with every epoch
        iteration = len(self._epoch_outputs) / self._full_epoch_iterations
        self.lr_scheduler.step(self.current_epoch + iteration)
        return super().train_step(batch)

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self) -> tuple[Any, ...]:  # noqa: N802
        _, dummy_2d, _, mirror_axes = super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        patch_size = self.configuration_manager.patch_size
        no_rotation = (0.0, 0.0)
        initial_patch_size = get_patch_size(patch_size, no_rotation, no_rotation, no_rotation, self.scaling)
        if dummy_2d:
            initial_patch_size[0] = patch_size[0]
        return no_rotation, dummy_2d, initial_patch_size, mirror_axes

    @classmethod
    def get_training_transforms(cls, *args: Any, **kwargs: Any) -> BasicTransform:
        """nnU-Net's pipeline without rotation and intensity transforms; scaling by 0.9 to 1.1, always.

        Takes the arguments of nnU-Net's method of this name.
        """
        pipeline = nnUNetTrainer.get_training_transforms(*args, **kwargs)
        transforms = []
        for transform in pipeline.transforms:
            if isinstance(transform, RandomTransform) and _is_intensity_transform(transform.transform):
                continue
            if isinstance(transform, SpatialTransform):
                transform.p_rotation = 0
                transform.p_scaling = 1
                transform.scaling = cls.scaling
            transforms.append(transform)
        return ComposeTransforms(transforms)


def _is_intensity_transform(transform: BasicTransform) -> bool:
    """Whether a transform changes grey values: all of nnU-Net's that do live in these packages."""
    return transform.__class__.__module__.startswith(
        (
            "batchgeneratorsv2.transforms.intensity",
            "batchgeneratorsv2.transforms.noise",
            "batchgeneratorsv2.transforms.spatial.low_resolution",
        )
    )


class nnUNetTrainerConResNet_1epoch(nnUNetTrainerConResNet):
    """1 epoch, to try a pipeline."""

    training_epochs = 1


class nnUNetTrainerConResNet_5epochs(nnUNetTrainerConResNet):
    """5 epochs."""

    training_epochs = 5


class nnUNetTrainerConResNet_10epochs(nnUNetTrainerConResNet):
    """10 epochs."""

    training_epochs = 10


class nnUNetTrainerConResNet_20epochs(nnUNetTrainerConResNet):
    """20 epochs."""

    training_epochs = 20


class nnUNetTrainerConResNet_50epochs(nnUNetTrainerConResNet):
    """50 epochs."""

    training_epochs = 50


class nnUNetTrainerConResNet_100epochs(nnUNetTrainerConResNet):
    """100 epochs."""

    training_epochs = 100


class nnUNetTrainerConResNet_250epochs(nnUNetTrainerConResNet):
    """250 epochs."""

    training_epochs = 250


class nnUNetTrainerConResNet_500epochs(nnUNetTrainerConResNet):
    """500 epochs."""

    training_epochs = 500


class nnUNetTrainerConResNet_2000epochs(nnUNetTrainerConResNet):
    """2000 epochs."""

    training_epochs = 2000
