"""Trainers of 3D U-Net."""

from __future__ import annotations

import math
from typing import Any

from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.intensity.brightness import MultiplicativeBrightnessTransform
from batchgeneratorsv2.transforms.intensity.contrast import ContrastTransform
from batchgeneratorsv2.transforms.intensity.gamma import GammaTransform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from nnunetv2.training.data_augmentation.compute_initial_patch_size import get_patch_size
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager
from torch import nn

from nnunet_conres.augmentation.mirror_outside import MirrorOutsideTransform
from nnunet_conres.losses import VoxelWeightedCrossEntropyLoss
from nnunet_conres.plans import unet3d
from nnunet_conres.trainers.augmentation import with_deformation, with_spatial, without_intensity_transforms
from nnunet_conres.trainers.base import PluginTrainer


class nnUNetTrainerUNet3D(PluginTrainer):
    """3D U-Net under nnU-Net's own recipe, its topology derived from the plans."""

    network_name = "3D U-Net"

    @classmethod
    def architecture(cls, configuration: ConfigurationManager) -> dict[str, Any]:
        return unet3d.architecture(configuration)


class nnUNetTrainerUNet3DPaper(nnUNetTrainerUNet3D):
    """3D U-Net as in the paper: topology, loss, batch norm and augmentation.

    The paper does not state patch size, batch size and optimiser for padded convolutions. They are those of the plans
    and of nnU-Net.

    Attributes:
        background_weight: Weight of annotated background voxels in the loss.
        foreground_weight: Weight of all other annotated voxels. The paper reduces the weight of the background and
            raises that of the foreground, but gives no values.
        rotation: Largest angle about each axis in radians.
        scaling: Range of the scaling, for which the paper gives no values.

    Source: Çiçek et al. 2016, sections 2 and 3.2.
    """

    training_epochs = 280  # of 250 iterations: 70,000
    background_weight = 0.5
    foreground_weight = 2.0
    rotation = math.radians(30)
    scaling = (0.85, 1.25)
    grid_spacing = 32.0
    sigma = 4.0

    @classmethod
    def architecture(cls, configuration: ConfigurationManager) -> dict[str, Any]:
        return unet3d.paper_architecture(configuration)

    def _build_segmentation_loss(self) -> nn.Module:
        labels = self.label_manager
        return self._at_all_scales(
            VoxelWeightedCrossEntropyLoss(
                labels.has_regions,
                labels.ignore_label,
                background_weight=self.background_weight,
                foreground_weight=self.foreground_weight,
                ddp=self.is_ddp,
            )
        )

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self) -> tuple[Any, ...]:  # noqa: N802
        _, dummy_2d, _, _ = super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        self.inference_allowed_mirroring_axes = None
        patch_size = self.configuration_manager.patch_size
        rotation = (-self.rotation, self.rotation)
        initial_patch_size = get_patch_size(patch_size, rotation, rotation, rotation, self.scaling)
        if dummy_2d:
            initial_patch_size[0] = patch_size[0]
        return rotation, dummy_2d, initial_patch_size, None

    @classmethod
    def get_training_transforms(cls, *args: Any, **kwargs: Any) -> BasicTransform:
        """Return a pipeline that always rotates, scales and deforms, with nnU-Net's brightness, contrast and gamma.

        No noise, blur, low resolution or flipping. Outside of the volume the data are mirrored.
        Takes the arguments of nnU-Net's method of this name.
        """
        pipeline = without_intensity_transforms(
            nnUNetTrainer.get_training_transforms(*args, **kwargs),
            keep=(MultiplicativeBrightnessTransform, ContrastTransform, GammaTransform),
        )

        def all_of_them(transform: SpatialTransform) -> SpatialTransform:
            return with_deformation(
                transform,
                p_rotation=1,
                p_scaling=1,
                scaling=cls.scaling,
                p_deformation=1,
                grid_spacing=cls.grid_spacing,
                sigma=cls.sigma,
                center_deformation=False,
                padding_mode_image="reflection",
                border_mode_seg="reflection",
            )

        deformed = with_spatial(pipeline, all_of_them)
        return ComposeTransforms([MirrorOutsideTransform(), *deformed.transforms])
