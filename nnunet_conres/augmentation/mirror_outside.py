"""Mirroring of image and segmentation beyond the volume, where nnU-Net's loader has padded."""

from __future__ import annotations

from typing import Any

import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from torch import Tensor

OUTSIDE = -1
"""Label with which nnU-Net's loader marks voxels beyond the volume."""


class MirrorOutsideTransform(BasicTransform):
    """Continues the volume beyond its border by mirroring, where nnU-Net's loader has put zeros and label -1.

    nnU-Net crops every case to the bounding box of its nonzero voxels. So the bounding box of all labels but -1 in a
    patch is the part of the patch within the volume. (Label -1 within that box, where the image is zero, stays.) The
    border voxel is repeated, as with SciPy's "reflect" and NumPy's "symmetric". A patch without any voxel of the volume
    stays as it is.

    Must come first in the pipeline: before nnU-Net's Convert3DTo2DTransform and before label -1 is removed.

    Source: Çiçek et al. 2016, whose training data are mirrored outside the volume.
    """

    def get_parameters(self, **data_dict: Any) -> dict[str, Any]:
        """Find the box in ``segmentation``, (C, X, Y, Z), first channel.

        Returns:
            ``indices``: for every axis the source index of each voxel, or None if the axis stays as it is.
        """
        inside = data_dict["segmentation"][0] != OUTSIDE
        indices: list[Tensor | None] = []
        for axis, extent in enumerate(inside.shape):
            others = [dim for dim in range(inside.ndim) if dim != axis]
            occupied = torch.nonzero(inside.amax(dim=others)).flatten()
            if len(occupied) == 0:
                return {"indices": [None] * inside.ndim}
            first, length = int(occupied[0]), int(occupied[-1] - occupied[0]) + 1
            if length == extent:
                indices.append(None)
                continue
            position = (torch.arange(extent) - first) % (2 * length)
            indices.append(first + torch.minimum(position, 2 * length - 1 - position))
        return {"indices": indices}

    def _apply_to_image(self, img: Tensor, **params: Any) -> Tensor:
        for axis, index in enumerate(params["indices"], start=1):
            if index is not None:
                img = img.index_select(axis, index.to(img.device))
        return img

    def _apply_to_segmentation(self, segmentation: Tensor, **params: Any) -> Tensor:
        return self._apply_to_image(segmentation, **params)

    def _apply_to_regr_target(self, regression_target: Tensor, **params: Any) -> Tensor:
        return self._apply_to_image(regression_target, **params)
