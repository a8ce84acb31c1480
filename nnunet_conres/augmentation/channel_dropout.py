"""Leaves out channels of a training patch, as modalities are absent in cases to be predicted."""

from __future__ import annotations

from typing import Any

import numpy as np
from batchgeneratorsv2.transforms.base.basic_transform import ImageOnlyTransform
from torch import Tensor


class ChannelDropoutTransform(ImageOnlyTransform):
    """Sets each channel to 0 with a probability, and never all of them.

    0 is what nnU-Net's z-score makes of an image that is 0 everywhere, with and without a mask: the channel of an
    absent modality. So this goes after all changes of grey values, and before the channels of a cascade are added.

    Args:
        p: Probability of each channel, 0..1. Where all would be left out, one that is drawn at random stays.

    Raises:
        ValueError: If p is out of range.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        if not 0 <= p <= 1:
            raise ValueError(f"p must be a probability in 0..1; got {p!r}.")
        self.p = p

    def get_parameters(self, **data_dict: Any) -> dict[str, Any]:
        """Draws which channels of ``image``, (C, *spatial), are left out.

        Returns:
            ``dropped``: their indices, at most C - 1 of them.
        """
        channels = len(data_dict["image"])
        dropped = np.flatnonzero(np.random.uniform(size=channels) < self.p).tolist()
        if len(dropped) == channels:
            dropped.pop(np.random.randint(channels))
        return {"dropped": dropped}

    def _apply_to_image(self, img: Tensor, **params: Any) -> Tensor:
        if params["dropped"]:
            img[params["dropped"]] = 0
        return img
