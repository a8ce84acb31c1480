"""Trainers of ConResNet. As in nnU-Net, a variant is the one thing that differs, and its name says it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from nnunetv2.training.data_augmentation.compute_initial_patch_size import get_patch_size
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn

from nnunet_conres.architectures.conresnet import ConResNet
from nnunet_conres.architectures.conresnet_paper import PAPER_DIVISOR
from nnunet_conres.losses import PAPER_RESIDUAL_WEIGHT, RESIDUAL_WEIGHT, ConResLoss, ResidualMapLoss
from nnunet_conres.planning.architectures import (
    conresnet_architecture,
    conresnet_paper_architecture,
    names_paper_topology,
)
from nnunet_conres.residuals import has_neighbours
from nnunet_conres.trainers.augmentation import with_deformation, with_spatial, without_intensity_transforms
from nnunet_conres.trainers.base import PluginTrainer, check_slice_axis, with_paper_patch

PAPER_PATCH_SIZE = (80, 160, 160)
PAPER_BATCH_SIZE = 2


class nnUNetTrainerConResNet(PluginTrainer):
    """ConResNet, its topology derived from the plans, under nnU-Net's recipe with another optimiser, Muon.

    Without a residual stream, unless the plans have one: residual maps are predicted from the segmentation's own
    features, to teach these. docs/results.md has the evidence for that and for the optimiser.

    Attributes:
        residual_weight: Weight of the residual maps in the objective.
        residual_input: ``"decoder"``, ``"shared_encoder"``, or None for what the plans say.
        residual_stream: Whether there is a residual stream; None for what the plans say.
    """

    network_name = "ConResNet"
    optimizer_kind = "muon"
    loss_parts = ("segmentation", "residual")
    residual_weight: float = RESIDUAL_WEIGHT
    residual_input: str | None = None
    residual_stream: bool | None = None

    @classmethod
    def architecture(cls, configuration: ConfigurationManager) -> dict[str, Any]:
        return conresnet_architecture(configuration, cls.residual_input, cls.residual_stream)

    @classmethod
    def resolve(cls, configuration: ConfigurationManager, name: str) -> dict[str, Any]:
        entries = super().resolve(configuration, name)
        check_slice_axis(configuration, name, cls.network_name)
        if names_paper_topology(configuration):
            check_paper_patch(configuration, name)
        return entries

    @classmethod
    def build_network_architecture(
        cls,
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        network = super().build_network_architecture(
            plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision
        )
        assert isinstance(network, ConResNet)
        # Residual maps are supervised with the segmentation, and left out with it.
        network.residual_outputs = enable_deep_supervision
        return network

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
        assert scales is not None
        labels = self.label_manager
        residual = ResidualMapLoss(
            classes=None if labels.has_regions else labels.foreground_labels,
            ignore_label=labels.ignore_label,
            slice_axis=self.configuration_manager.network_arch_init_kwargs["slice_axis"],
            background_channel=not labels.has_regions,
            ddp=self.is_ddp,
        )
        return ConResLoss(super()._build_loss(), residual, len(scales), self.residual_weight)

    def get_tr_and_val_datasets(self) -> tuple[Any, Any]:
        datasets = super().get_tr_and_val_datasets()
        if self.label_manager.has_ignore_label and isinstance(self.loss, ConResLoss):
            self._check_neighbours(datasets[0], self.loss)
        return datasets

    def _check_neighbours(self, dataset: Any, loss: ConResLoss) -> None:
        """Leaves residuals out where no case has two neighbouring annotated slices, and says so.

        Batches can't tell: nnU-Net makes background of what lies beyond the volume, and rotation spreads a slice over
        its neighbours, so that pairs would seem to be there.
        """
        slice_axis = self.configuration_manager.network_arch_init_kwargs["slice_axis"]
        for identifier in dataset.identifiers:
            annotation = np.asarray(dataset.load_case(identifier)[1][0])
            annotated = (annotation != self.label_manager.ignore_label) & (annotation >= 0)
            if has_neighbours(annotated, slice_axis):
                return
        loss.has_residuals = False
        self.print_to_log_file(
            f"WARNING: in none of the {len(dataset.identifiers)} training cases are two neighbouring slices annotated, "
            f"so no residual between slices is defined. Its loss is NaN in the log and takes no part in the training, "
            f"which goes on with the segmentation alone. Annotate slabs of at least 2 slices along the first axis of "
            f"the patch (nnunet-conres sparsify --slab 2), or train another network, such as nnUNetTrainerUNet3D."
        )


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


class nnUNetTrainerConResNetStream(nnUNetTrainerConResNet):
    """With the paper's residual stream, a second decoder whose attention acts on the first."""

    residual_stream = True


class nnUNetTrainerConResNetSharedEncoder(nnUNetTrainerConResNet):
    """With the residual stream; one encoder, with the same weights, runs over image and inter-slice residual."""

    residual_input = "shared_encoder"


class nnUNetTrainerConResNet_NoMirroring(nnUNetTrainerConResNet):
    """Without mirroring, neither as augmentation nor at prediction."""

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self) -> tuple[Any, ...]:  # noqa: N802
        rotation, dummy_2d, initial_patch_size, _ = super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        self.inference_allowed_mirroring_axes = None
        return rotation, dummy_2d, initial_patch_size, None


class nnUNetTrainerConResNet_SGD(nnUNetTrainerConResNet):
    """With nnU-Net's own optimiser and schedule."""

    optimizer_kind = "sgd"


class nnUNetTrainerConResNetPaper(nnUNetTrainerConResNet):
    """The paper: its topology, loss, optimiser, schedule, patch, batch and augmentation.

    With stock plans patch and batch size become the paper's (80 x 160 x 160, no axis larger than the images need; 2). A
    configuration that names the paper topology itself keeps its own.

    Source: Zhang et al. 2021, sections III-E and IV-B.
    """

    training_epochs = 160  # of 250 iterations: 40,000
    training_lr = 1e-4
    training_weight_decay = 5e-4
    optimizer_kind = "adam"
    lr_by_iteration = True
    residual_weight = PAPER_RESIDUAL_WEIGHT
    scaling = (0.9, 1.1)

    @classmethod
    def architecture(cls, configuration: ConfigurationManager) -> dict[str, Any]:
        return conresnet_paper_architecture(configuration)

    @classmethod
    def resolve(cls, configuration: ConfigurationManager, name: str) -> dict[str, Any]:
        entries = super().resolve(configuration, name)
        if names_paper_topology(configuration):
            return entries
        return with_paper_patch(entries, configuration, PAPER_PATCH_SIZE, PAPER_BATCH_SIZE, PAPER_DIVISOR)

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, PolyLRScheduler]:
        optimizer = torch.optim.Adam(self.network.parameters(), self.initial_lr, weight_decay=self.weight_decay)
        return optimizer, PolyLRScheduler(optimizer, self.initial_lr, self.num_epochs, exponent=0.9)

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
        pipeline = without_intensity_transforms(nnUNetTrainer.get_training_transforms(*args, **kwargs))

        def scaling_only(transform: SpatialTransform) -> SpatialTransform:
            transform.p_rotation = 0
            transform.p_scaling = 1
            transform.scaling = cls.scaling
            return transform

        return with_spatial(pipeline, scaling_only)


class nnUNetTrainerConResNetBSpline(nnUNetTrainerConResNet):
    """B-spline deformations beside nnU-Net's rotations and scalings, as often as those; in one resampling.

    Source: 3D U-Net's deformation (Çiçek et al. 2016, section 2): control points 32 voxels apart, displacements of 4
        voxels standard deviation.
    """

    p_deformation = 0.2
    grid_spacing = 32.0
    sigma = 4.0

    @classmethod
    def get_training_transforms(cls, *args: Any, **kwargs: Any) -> BasicTransform:
        """nnU-Net's pipeline with the deformation. Takes the arguments of nnU-Net's method of this name."""
        return with_spatial(
            nnUNetTrainer.get_training_transforms(*args, **kwargs),
            lambda transform: with_deformation(
                transform, p_deformation=cls.p_deformation, grid_spacing=cls.grid_spacing, sigma=cls.sigma
            ),
        )
