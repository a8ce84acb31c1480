"""Errors of a tiled prediction against the distance from the borders between tiles."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours, distinct for people with any colour vision.
_COLOURS: Final = ("#D55E00", "#E69F00", "#0072B2", "#000000", "#009E73", "#CC79A7")
_MARKERS: Final = "osD^vP"

# The figure leaves out distances with a smaller share of the voxels: their points would show a handful of voxels.
_SHOWN_SHARE: Final = 0.01


@dataclass(frozen=True)
class Curve:
    """A rate per distance with its confidence interval.

    Attributes:
        rate: (distances,), over the voxels of all cases together; NaN where there are none.
        low: (distances,), lower end of the interval.
        high: (distances,), upper end of the interval.
    """

    rate: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]

    def as_json(self) -> dict[str, list[float | None]]:
        """Return lists of numbers, with null for NaN."""
        return {
            name: [None if np.isnan(value) else float(value) for value in getattr(self, name)]
            for name in ("rate", "low", "high")
        }


def whole_tiles(shape: Sequence[int], tile: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Return the range around an image's centre that tiles fill without a remainder.

    nnU-Net spreads tiles evenly over an image, so tiles that should lie side by side still overlap if the image is not
    a multiple of the tile. In this range they do not overlap. Along each axis, the range leaves out at most a quarter
    of a tile.

    Args:
        shape: Size of the image in voxels.
        tile: Size of a tile in voxels, as many axes.

    Returns:
        Start and stop per axis, which may lie outside the image.
    """
    ranges = []
    for size, length in zip(shape, tile, strict=True):
        total = max(1, math.ceil(size / length - 0.25)) * length
        start = (size - total) // 2
        ranges.append((start, start + total))
    return tuple(ranges)


def take_range(voxels: NDArray[Any], ranges: Sequence[tuple[int, int]], fill: float = 0) -> NDArray[Any]:
    """Crop or pad an array to ranges of its last axes.

    Args:
        voxels: The array; leading axes without a range stay as they are.
        ranges: Start and stop per axis, which may lie outside.
        fill: Value outside the array.

    Returns:
        A new array with the size of the ranges.
    """
    first = voxels.ndim - len(ranges)
    taken = np.full((*voxels.shape[:first], *(stop - start for start, stop in ranges)), fill, dtype=voxels.dtype)
    source, target = [slice(None)] * first, [slice(None)] * first
    for (start, stop), size in zip(ranges, voxels.shape[first:], strict=True):
        source.append(slice(max(start, 0), min(stop, size)))
        target.append(slice(max(-start, 0), min(stop, size) - start))
    taken[tuple(target)] = voxels[tuple(source)]
    return taken


def internal_border_distance(
    shape: Sequence[int], tile: Sequence[int], starts: Sequence[Sequence[int]]
) -> NDArray[np.float64]:
    """Return the number of voxels between each voxel and the nearest face of its tile that lies within the image.

    Faces of a tile at the border of the image do not count, since the network could see nothing beyond them. Where
    tiles overlap, the tile in which the voxel lies deepest counts.

    Args:
        shape: Size of the image in voxels.
        tile: Size of a tile in voxels, as many axes.
        starts: First voxel of the tiles along each axis, from nnU-Net's `compute_steps_for_sliding_window`;
            there is a tile for every combination.

    Returns:
        Array of the given shape: 0 for a voxel that touches such a face, infinite where a tile has none.

    Raises:
        ValueError: A tile extends beyond the image, or voxels lie in no tile.
    """
    per_axis = []
    for axis, (size, length, positions) in enumerate(zip(shape, tile, starts, strict=True)):
        # There is a tile for every combination of positions, so the deepest one can be found for each axis separately.
        deepest = np.full(size, -1.0)
        for start in positions:
            if start < 0 or start + length > size:
                raise ValueError(
                    f"The tile from {start} to {start + length} reaches out of axis {axis} of size {size}."
                )
            before = np.arange(length) if start > 0 else np.full(length, np.inf)
            after = np.arange(length)[::-1] if start + length < size else np.full(length, np.inf)
            inside = deepest[start : start + length]
            np.maximum(inside, np.minimum(before, after), out=inside)
        if (deepest < 0).any():
            raise ValueError(f"No tile covers voxel {int(np.argmin(deepest))} of axis {axis}.")
        per_axis.append(deepest)
    distance = np.full(tuple(shape), np.inf)
    for axis, values in enumerate(per_axis):
        np.minimum(distance, values.reshape([-1 if other == axis else 1 for other in range(len(shape))]), out=distance)
    return distance


def count_by_distance(
    wrong: NDArray[np.bool_], distance: NDArray[np.float64], counted: NDArray[np.bool_], length: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Count the wrong voxels, and all voxels, at every distance.

    Args:
        wrong: Whether a voxel is wrong.
        distance: Distance of every voxel, from `internal_border_distance`.
        counted: Whether a voxel counts.
        length: Number of distances to count, from 0; voxels farther away are left out.

    Returns:
        Wrong voxels and all voxels, each (length,).
    """
    counted = counted & (distance < length)
    at = distance[counted].astype(np.int64)
    return np.bincount(at[wrong[counted]], minlength=length), np.bincount(at, minlength=length)


def bootstrap_rate(
    wrong: NDArray[Any], total: NDArray[Any], *, samples: int = 5000, confidence: float = 0.95, seed: int = 0
) -> Curve:
    """Return the rate over the voxels of all cases, with a percentile interval from drawing cases with replacement.

    Voxels of one case are not independent of each other; cases are.

    Args:
        wrong: (cases, distances), number of wrong voxels. The difference of two such counts over the same voxels gives
            the paired difference of their rates.
        total: (cases, distances), number of voxels.
        samples: Number of draws.
        confidence: Confidence level of the interval, between 0 and 1.
        seed: Seed of the draws.

    Returns:
        The rate per distance and its interval.
    """
    cases = wrong.shape[0]
    draws = np.random.default_rng(seed).multinomial(cases, np.full(cases, 1 / cases), size=samples)
    with np.errstate(invalid="ignore", divide="ignore"):
        rate = wrong.sum(0) / total.sum(0)
        drawn = (draws @ wrong) / (draws @ total)
    low, high = np.full_like(rate, np.nan), np.full_like(rate, np.nan)
    known = total.sum(0) > 0
    low[known], high[known] = np.nanpercentile(drawn[:, known], (50 * (1 - confidence), 50 * (1 + confidence)), axis=0)
    return Curve(rate, low, high)


def tile_figure(
    errors: Mapping[str, Curve],
    excess: Mapping[str, Curve],
    voxels: NDArray[Any],
    *,
    weights: NDArray[np.float64],
    baseline: str,
    title: str = "",
) -> Figure:
    """Draw the weights of tiles, the error against the distance, and its difference from the baseline.

    Args:
        errors: Error rate of every prediction mode, by name, in the order of drawing.
        excess: Error rate minus the baseline's at the same voxels, of the modes to compare with it, by name.
        voxels: (distances,), voxels at each distance.
        weights: (length,), weight of a tile's prediction along one of its axes, 1 at the centre.
        baseline: Name of the mode that the others are compared with.
        title: Title of the figure.

    Returns:
        The figure; `savefig` writes it. pyplot does not know it, so it need not be closed.
    """
    from matplotlib.figure import Figure

    shown = np.flatnonzero(voxels >= _SHOWN_SHARE * voxels.sum())
    style = {
        name: {"color": colour, "marker": marker, "markersize": 4, "linewidth": 1.5}
        for name, colour, marker in zip(errors, _COLOURS, _MARKERS, strict=False)
    }
    figure = Figure(figsize=(13, 4.3), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(0.8, 1, 1))
    _draw_weights(left, weights)

    for axis, curves in ((middle, errors), (right, excess)):
        for name, curve in curves.items():
            axis.plot(shown, 100 * curve.rate[shown], label=name, **style[name])
            colour = style[name]["color"]
            axis.fill_between(shown, 100 * curve.low[shown], 100 * curve.high[shown], color=colour, alpha=0.15, lw=0)
        axis.set_xlabel("distance from the border between tiles (voxels)")
        axis.set_xlim(shown[0] - 0.4, shown[-1] + 0.4)
        axis.grid(alpha=0.3)
    middle.set_ylim(bottom=0)
    middle.set_ylabel("wrong voxels near the object (%)")
    middle.set_title("error", fontsize="medium")
    right.axhline(0, color=style[baseline]["color"], linewidth=1.5)
    right.set_ylabel("percentage points")
    right.set_title(f"error less that of {baseline}, same voxels", fontsize="medium")
    for axis in (left, middle, right):
        axis.spines[["top", "right"]].set_visible(False)
    handles, names = middle.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False, fontsize="small")
    if title:
        figure.suptitle(title, fontsize="medium")
    return figure


def _draw_weights(axis: Any, weights: NDArray[np.float64]) -> None:
    """Draw half-overlapping tiles along one axis: the share of each tile in the prediction of a voxel."""
    length = len(weights)
    step = length // 2
    starts = [step * number for number in range(5)]
    stacked = np.zeros((len(starts), starts[-1] + length))
    for row, start in enumerate(starts):
        stacked[row, start : start + length] = weights
    shares = stacked / stacked.sum(0)
    position = np.arange(stacked.shape[1]) + 0.5
    for row, start in enumerate(starts):
        # One colour for the tiles that also exist without overlap, another for the tiles between them.
        colour = "#0072B2" if row % 2 == 0 else "#56B4E9"
        inside = slice(start, start + length)
        axis.fill_between(position[inside], shares[row, inside], color=colour, alpha=0.35, lw=0)
        axis.plot(position[inside], shares[row, inside], color=colour, linewidth=1.5)
    for border in range(length, starts[-1] + length, length):
        axis.axvline(border, color="#D55E00", linestyle="--", linewidth=1.2)
    axis.set(xlim=(0, starts[-1] + length), ylim=(0, 1.05))
    axis.set_xlabel("position along one axis (voxels)")
    axis.set_ylabel("share in the prediction")
    axis.set_title("half-overlapping tiles (dashed: borders without)", fontsize="medium")
