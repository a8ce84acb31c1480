"""Changes to nnU-Net's augmentation pipeline that several trainers share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.random import RandomTransform

from nnunet_conres.augmentation.bspline import BSplineSpatialTransform

# Packages of batchgeneratorsv2 with the intensity transforms of nnU-Net's pipeline.
_INTENSITY_PACKAGES = (
    "batchgeneratorsv2.transforms.intensity.",
    "batchgeneratorsv2.transforms.noise.",
    "batchgeneratorsv2.transforms.spatial.low_resolution.",
)


def without_intensity_transforms(
    pipeline: ComposeTransforms, keep: tuple[type[BasicTransform], ...] = ()
) -> ComposeTransforms:
    """Return nnU-Net's pipeline without its random intensity transforms.

    Args:
        pipeline: The pipeline from nnU-Net's ``get_training_transforms``.
        keep: Intensity transforms to keep.
    """

    def stays(transform: BasicTransform) -> bool:
        if not isinstance(transform, RandomTransform) or isinstance(transform.transform, keep):
            return True
        # The dots limit the match to whole package names: intensity.gamma matches, intensities.gamma would not.
        return not f"{type(transform.transform).__module__}.".startswith(_INTENSITY_PACKAGES)

    return ComposeTransforms([transform for transform in pipeline.transforms if stays(transform)])


def with_spatial(
    pipeline: ComposeTransforms, change: Callable[[SpatialTransform], SpatialTransform]
) -> ComposeTransforms:
    """Return the pipeline with another spatial transform.

    Args:
        pipeline: The pipeline from nnU-Net's ``get_training_transforms``.
        change: Takes nnU-Net's spatial transform and returns a new one, or the same one with changes.
    """
    return ComposeTransforms([change(t) if isinstance(t, SpatialTransform) else t for t in pipeline.transforms])


def with_deformation(transform: SpatialTransform, **changes: Any) -> BSplineSpatialTransform:
    """Return nnU-Net's spatial transform with a B-spline deformation in the same resampling.

    With dummy-2D augmentation the patch of nnU-Net's transform has two axes, and so does the deformation.

    Args:
        transform: nnU-Net's transform; its rotation, scaling and padding are kept.
        **changes: Arguments of ``BSplineSpatialTransform`` that nnU-Net's transform lacks, or that replace its values.
    """
    carried = (
        "patch_size",
        "patch_center_dist_from_border",
        "random_crop",
        "p_rotation",
        "rotation",
        "p_rot_per_axis",
        "p_scaling",
        "scaling",
        "p_synchronize_scaling_across_axes",
        "bg_style_seg_sampling",
        "mode_seg",
        "border_mode_seg",
        "mode_image",
        "padding_mode_image",
        "padding_value_seg",
        "padding_value_image",
        "seg_tiebreak",
    )
    return BSplineSpatialTransform(**({name: getattr(transform, name) for name in carried} | changes))
