"""Matching the intensity histogram of a training patch to that of another.

V-Net matches whole scans to one another. A transform in nnU-Net's loader sees one patch at a time, so here each worker
process remembers the quantiles of the patches it saw last, and matches a patch to one of them.

Source: Milletari et al., "V-Net", 3DV 2016; the piecewise linear map between quantiles is that of Nyúl et al., "New
variants of a method of MRI scale standardization", IEEE TMI 19(2), 2000.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from batchgeneratorsv2.transforms.base.basic_transform import ImageOnlyTransform
from torch import Tensor

FloatArray = npt.NDArray[np.floating[Any]]
# Ascending grey values, and the values they are mapped to.
GreyMap = tuple[FloatArray, FloatArray]

# Fewer voxels than this say too little about a histogram: a patch with fewer is neither matched nor remembered.
MIN_VOXELS = 100
# nnU-Net's label of voxels outside its nonzero mask, and of padding.
OUTSIDE = -1
# Entries of the lookup table of a map. A search for the right quantile takes ten times as long per voxel.
_TABLE_SIZE = 2**14
# Voxels that are mapped at a time on a CPU, few enough for its cache.
_CHUNK = 2**16


class HistogramMatchingTransform(ImageOnlyTransform):
    """Maps the grey values of a patch such that its quantiles become those of an earlier patch.

    The map of a channel is monotone, and piecewise linear between quantiles. Beyond the lowest and the highest quantile
    its slope is 1. All channels are matched to the same remembered patch. Patches are remembered as they were before
    matching.

    Must come first in the pipeline: before nnU-Net's Convert3DTo2DTransform, which turns slices into channels, and
    before RemoveLabelTransform, which removes the label that marks voxels outside of the image. Do not wrap it in a
    RandomTransform, or it misses the patches for which it is not called.

    Args:
        p: Probability that a patch is matched, 0..1.
        memory: Number of patches to remember, >= 1; the oldest is dropped first.
        n_quantiles: Number of quantiles, evenly spaced from minimum to maximum, >= 2.
        max_voxels: Number of voxels, drawn at random, from which the quantiles are computed, at least 100.

    Raises:
        ValueError: If a value is out of range.

    Source: Milletari et al. 2016, with the approximation described above.
    """

    def __init__(self, p: float, *, memory: int = 16, n_quantiles: int = 128, max_voxels: int = 20_000) -> None:
        super().__init__()
        if not 0 <= p <= 1:
            raise ValueError(f"p must be a probability in 0..1; got {p!r}.")
        if memory < 1 or n_quantiles < 2 or max_voxels < MIN_VOXELS:
            raise ValueError(
                f"memory must be at least 1, n_quantiles at least 2 and max_voxels at least {MIN_VOXELS}; got "
                f"memory={memory!r}, n_quantiles={n_quantiles!r}, max_voxels={max_voxels!r}."
            )
        self.p = p
        self.n_quantiles = n_quantiles
        self.max_voxels = max_voxels
        # One array (channels, quantiles) per patch; NaN for a channel without a histogram.
        self.remembered: deque[FloatArray] = deque(maxlen=memory)

    def get_parameters(self, **data_dict: Any) -> dict[str, Any]:
        """Compute the patch's quantiles, draw a reference among the remembered ones, then remember the patch.

        Args:
            data_dict: ``image``, float, shape (C, *spatial); ``segmentation``, shape (S, *spatial), whose first channel
                is -1 in padding or outside nnU-Net's nonzero mask, or none.

        Returns:
            ``maps``: per channel a pair of ascending grey values and the values they are mapped to, or None for a
            channel that stays as it is; ``inside``: boolean, shape (*spatial), True for voxels to map, or None for all.
        """
        image = data_dict["image"]
        segmentation = data_dict.get("segmentation")
        inside = None if segmentation is None else segmentation[0] != OUTSIDE
        quantiles = self._quantiles(image, inside)
        maps: list[GreyMap | None] = [None] * len(image)
        candidates = [table for table in self.remembered if len(table) == len(image)]
        if np.random.uniform() < self.p and candidates:
            reference = candidates[np.random.randint(len(candidates))]
            maps = [_grey_map(source, target) for source, target in zip(quantiles, reference, strict=True)]
        if not np.isnan(quantiles).all():
            self.remembered.append(quantiles)
        return {"maps": maps, "inside": inside}

    def _apply_to_image(self, img: Tensor, **params: Any) -> Tensor:
        maps, inside = params["maps"], params["inside"]
        if all(grey_map is None for grey_map in maps):
            return img
        result = torch.empty_like(img, memory_format=torch.contiguous_format)
        for channel, grey_map in enumerate(maps):
            if grey_map is None:
                result[channel] = img[channel]
            else:
                _apply(grey_map, img[channel], inside, out=result[channel])
        return result

    def _quantiles(self, image: Tensor, inside: Tensor | None) -> FloatArray:
        """Compute quantiles, (channels, n_quantiles), from the same voxels in all channels; NaN for no histogram."""
        voxels = self._sample(image[0].numel(), inside)
        levels = np.linspace(0, 1, self.n_quantiles)
        table = np.full((len(image), self.n_quantiles), np.nan)
        for row, channel in zip(table, image, strict=True):
            values = channel.reshape(-1)
            values = (values if voxels is None else values[voxels]).double()
            values = values[torch.isfinite(values)]
            if len(values) < MIN_VOXELS:
                continue
            spread = values.max() - values.min()
            # rounding errors of a constant image are no contrast to stretch
            if spread > max(values.abs().max() * 1e-6, 1e-30):
                row[:] = np.quantile(values.numpy(), levels)
        return table

    def _sample(self, n: int, inside: Tensor | None) -> Tensor | None:
        """Draw the indices of at most max_voxels inside voxels at random; None for all."""
        inside = None if inside is None else inside.reshape(-1)
        if n > self.max_voxels:
            # Draw first, and check then which voxels are inside: listing all of these, as below, takes longer. So few
            # are drawn that duplicates do not matter.
            drawn = torch.from_numpy(np.random.randint(n, size=2 * self.max_voxels))
            if inside is not None:
                drawn = drawn[inside[drawn]]
            if len(drawn) >= self.max_voxels // 4:
                return drawn[: self.max_voxels]
        if inside is None:
            return None
        candidates = inside.nonzero()[:, 0]
        if len(candidates) <= self.max_voxels:
            return candidates
        return candidates[torch.from_numpy(np.random.randint(len(candidates), size=self.max_voxels))]


def _grey_map(source: FloatArray, target: FloatArray) -> GreyMap | None:
    """Return the map from one row of quantiles to another, or None if one of the channels has no histogram."""
    if np.isnan(source).any() or np.isnan(target).any():
        return None
    # A grey value that many voxels share spans several quantiles. It is mapped to the middle of their targets.
    values, first, counts = np.unique(source, return_index=True, return_counts=True)
    return values, (target[first] + target[first + counts - 1]) / 2


def _apply(grey_map: GreyMap, image: Tensor, inside: Tensor | None, out: Tensor) -> None:
    """Write the mapped image to ``out``; voxels that are not inside are copied."""
    values, mapped = grey_map
    # The first and the last piece of the map are computed, not looked up: a single bright voxel may stretch them so far
    # that the others would share a few entries of the table.
    lower, upper = min(1, len(values) - 2), len(values) - 2
    low, high = float(values[lower]), float(values[upper])
    table = torch.from_numpy(np.interp(np.linspace(low, high, _TABLE_SIZE), values, mapped)).to(out)
    # one more entry, so that the highest grey value has an upper neighbour
    steps = torch.diff(table, append=table[-1:])
    scale = (_TABLE_SIZE - 1) / (high - low) if high > low else 0.0
    below, above = float(values[0]) - low, float(values[-1]) - high
    slope_below = (float(mapped[0]) - float(mapped[lower])) / below if below else 1.0
    slope_above = (float(mapped[-1]) - float(mapped[upper])) / above

    inside = None if inside is None else inside.reshape(-1)
    voxels, result = image.reshape(-1), out.view(-1)
    size = _CHUNK if out.device.type == "cpu" else max(1, len(voxels))
    for start in range(0, len(voxels), size):
        chunk = voxels[start : start + size]
        clipped = chunk.clamp(low, high)
        position = (clipped - low) * scale
        entry = position.int().clamp_(0, _TABLE_SIZE - 1)
        matched = table.index_select(0, entry)
        matched.addcmul_(steps.index_select(0, entry), position.sub_(entry))
        # Beyond the table: first the slope of the outermost piece, then slope 1.
        beyond = chunk - clipped
        piece = beyond.clamp(below, above)
        matched.add_(beyond.sub_(piece))
        matched.add_(piece.clamp_min(0), alpha=slope_above).add_(piece.clamp_max(0), alpha=slope_below)
        if inside is not None:
            matched = torch.where(inside[start : start + size], matched, chunk)
        result[start : start + size] = matched
