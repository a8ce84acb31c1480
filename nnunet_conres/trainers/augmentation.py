"""Changes to nnU-Net's augmentation pipeline that several trainers make."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.random import RandomTransform

from nnunet_conres.augmentation.bspline import BSplineSpatialTransform

# Where batchgeneratorsv2 keeps what changes grey values in nnU-Net's pipeline.
_INTENSITY_PACKAGES = (
    "batchgeneratorsv2.transforms.intensity.",
    "batchgeneratorsv2.transforms.noise.",
    "batchgeneratorsv2.transforms.spatial.low_resolution.",
)


def without_intensity_transforms(
    pipeline: ComposeTransforms, keep: tuple[type[BasicTransform], ...] = ()
) -> ComposeTransforms:
    """nnU-Net's pipeline without its random changes of grey values.

    Args:
        pipeline: What nnU-Net's ``get_training_transforms`` returns.
        keep: Transforms that stay all the same.
    """

    def stays(transform: BasicTransform) -> bool:
        if not isinstance(transform, RandomTransform) or isinstance(transform.transform, keep):
            return True
        # with a dot after it, for intensity.gamma is of the package intensity, intensities.gamma would not be
        return not f"{type(transform.transform).__module__}.".startswith(_INTENSITY_PACKAGES)

    return ComposeTransforms([transform for transform in pipeline.transforms if stays(transform)])


def with_spatial(
    pipeline: ComposeTransforms, change: Callable[[SpatialTransform], SpatialTransform]
) -> ComposeTransforms:
    """The pipeline with another spatial transform.

    Args:
        pipeline: What nnU-Net's ``get_training_transforms`` returns.
        change: Takes nnU-Net's spatial transform and returns the one to use, which may be the same, changed.
    """
    return ComposeTransforms([change(t) if isinstance(t, SpatialTransform) else t for t in pipeline.transforms])


def with_deformation(transform: SpatialTransform, **changes: Any) -> BSplineSpatialTransform:
    """nnU-Net's spatial transform with a B-spline deformation in the same resampling.

    With dummy-2D augmentation nnU-Net's transform has a patch of two axes, and so has the deformation.

    Args:
        transform: nnU-Net's; its rotation, scaling and padding carry over.
        **changes: Arguments of ``BSplineSpatialTransform`` that are its own or differ.
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
