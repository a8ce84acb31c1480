"""Trainers of ConResNet. As in nnU-Net, a variant changes one thing, and its name says which."""

from __future__ import annotations

from typing import Any

import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from nnunetv2.training.data_augmentation.compute_initial_patch_size import get_patch_size
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager

from nnunet_conres.architectures.conresnet_paper import DIVISOR, ConResNetPaper
from nnunet_conres.errors import InputError
from nnunet_conres.losses import PAPER_RESIDUAL_WEIGHT
from nnunet_conres.plans import conresnet
from nnunet_conres.plans.configurations import with_paper_patch
from nnunet_conres.plans.entries import names_paper_form
from nnunet_conres.trainers.augmentation import with_deformation, with_spatial, without_intensity_transforms
from nnunet_conres.trainers.channel_dropout import ChannelDropoutMixin
from nnunet_conres.trainers.recipe import MuonMixin
from nnunet_conres.trainers.residual_maps import ResidualMapTrainer

PAPER_PATCH_SIZE = (80, 160, 160)
PAPER_BATCH_SIZE = 2


class nnUNetTrainerConResNet(MuonMixin, ResidualMapTrainer):
    """ConResNet, its topology derived from the plans, under nnU-Net's recipe with Muon as the optimiser.

    It has two decoders, with context residual modules and the paper's attention at every level. The residual stream
    predicts the residual maps.
    """

    network_name = "ConResNet"

    @classmethod
    def architecture(cls, configuration: ConfigurationManager) -> dict[str, Any]:
        return conresnet.architecture(configuration)


class nnUNetTrainerConResNetSharedEncoder(nnUNetTrainerConResNet):
    """One encoder, with the same weights, runs over the image and over its inter-slice residual."""

    @classmethod
    def architecture(cls, configuration: ConfigurationManager) -> dict[str, Any]:
        return conresnet.architecture(configuration, shared_encoder=True)


class nnUNetTrainerConResNet_NoMirroring(nnUNetTrainerConResNet):
    """Without mirroring, neither as augmentation nor at prediction."""

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self) -> tuple[Any, ...]:  # noqa: N802
        rotation, dummy_2d, initial_patch_size, _ = super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        self.inference_allowed_mirroring_axes = None
        return rotation, dummy_2d, initial_patch_size, None


class nnUNetTrainerConResNet_ChannelDropout(ChannelDropoutMixin, nnUNetTrainerConResNet):
    """With channels left out at random, for cases that lack modalities."""


class nnUNetTrainerConResNet_SGD(nnUNetTrainerConResNet):
    """With nnU-Net's own optimiser and schedule."""

    configure_optimizers = nnUNetTrainer.configure_optimizers


def check_paper_patch(configuration: ConfigurationManager, name: str) -> None:
    """Refuse patches that ConResNetPaper can't take.

    Raises:
        InputError: If a side of the patch is not divisible by 8.
    """
    patch_size = [int(extent) for extent in configuration.patch_size]
    if any(extent % DIVISOR for extent in patch_size):
        fitting = [-(-extent // DIVISOR) * DIVISOR for extent in patch_size]
        raise InputError(
            f"ConResNetPaper halves the resolution three times: every side of the patch must be divisible by "
            f"{DIVISOR}, but configuration {name} has {patch_size}. Use for example {fitting}."
        )


class nnUNetTrainerConResNetPaper(ResidualMapTrainer):
    """ConResNet as in the paper: topology, loss, optimiser, schedule, patch, batch and augmentation.

    With stock plans, patch and batch size become the paper's (80 x 160 x 160, no axis larger than the images need; 2).
    A configuration that names ConResNetPaper keeps its own patch and batch size.

    Source: Zhang et al. 2021, sections III-E and IV-B.
    """

    network_name = "ConResNetPaper"
    training_epochs = 160  # of 250 iterations: 40,000
    training_lr = 1e-4
    training_weight_decay = 5e-4
    lr_by_iteration = True
    residual_weight = PAPER_RESIDUAL_WEIGHT
    scaling = (0.9, 1.1)

    @classmethod
    def architecture(cls, configuration: ConfigurationManager) -> dict[str, Any]:
        return conresnet.paper_architecture(configuration)

    @classmethod
    def resolve(cls, configuration: ConfigurationManager, name: str) -> dict[str, Any]:
        entries = super().resolve(configuration, name)
        if names_paper_form(configuration, ConResNetPaper):
            check_paper_patch(configuration, name)
            return entries
        return with_paper_patch(entries, configuration, PAPER_PATCH_SIZE, PAPER_BATCH_SIZE, DIVISOR)

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
        """Return nnU-Net's pipeline without rotation and intensity transforms, and with scaling by 0.9 to 1.1, always.

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
    """B-spline deformations beside nnU-Net's rotations and scalings, with the same probability, in one resampling.

    Source: 3D U-Net's deformation (Çiçek et al. 2016, section 2): control points 32 voxels apart, displacements of 4
        voxels standard deviation.
    """

    p_deformation = 0.2
    grid_spacing = 32.0
    sigma = 4.0

    @classmethod
    def get_training_transforms(cls, *args: Any, **kwargs: Any) -> BasicTransform:
        """Return nnU-Net's pipeline with the deformation. Takes the arguments of nnU-Net's method of this name."""
        return with_spatial(
            nnUNetTrainer.get_training_transforms(*args, **kwargs),
            lambda transform: with_deformation(
                transform, p_deformation=cls.p_deformation, grid_spacing=cls.grid_spacing, sigma=cls.sigma
            ),
        )
