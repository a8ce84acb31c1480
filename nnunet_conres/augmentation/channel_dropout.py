"""Dropout of channels of a training patch, for cases that lack modalities at prediction."""

from __future__ import annotations

from typing import Any

import numpy as np
from batchgeneratorsv2.transforms.base.basic_transform import ImageOnlyTransform
from torch import Tensor


class ChannelDropoutTransform(ImageOnlyTransform):
    """Sets each channel to 0 with a probability, but never all of them.

    nnU-Net's z-score maps an image of zeros, the channel of an absent modality, to 0, with and without a mask. So this
    must come after all intensity transforms, and before the channels of a cascade are added.

    Args:
        p: Probability of each channel, 0..1. If all channels would be dropped, a random one stays.

    Raises:
        ValueError: If p is out of range.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        if not 0 <= p <= 1:
            raise ValueError(f"p must be a probability in 0..1; got {p!r}.")
        self.p = p

    def get_parameters(self, **data_dict: Any) -> dict[str, Any]:
        """Draw the channels of ``image``, (C, *spatial), that are dropped.

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
