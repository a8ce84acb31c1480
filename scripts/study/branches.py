"""Made-up trees of thin vessels: branching shapes that change from each slice to the next.

What makes them hard: vessels are one to three voxels wide, run in all directions, so that a slice holds dots, ovals and
streaks that are elsewhere in the next one, and have the intensity of specks that belong to nothing. Bulbs, the second
class, differ from vessels by their shape alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

VESSEL, BULB = 1, 2
FEWEST_VOXELS = 24
TREES = 3

_STEP = 0.5  # voxels between two points of a centre line
_RADII = (0.6, 1.6)  # voxels, at the tips and at the root
_CONTRAST = 2.5  # of vessels, in standard deviations of the noise


def make_branches(shape: Sequence[int], seed: int | Sequence[int]) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Makes one case.

    Args:
        shape: Voxels along (z, y, x), at least 24 each.
        seed: Anything that ``numpy.random.default_rng`` takes; the same seed gives the same voxels.

    Returns:
        Image, float32, noise of unit variance with vessels 2.5 above a background that is not even; and labels, uint8,
        0 background, 1 vessel, 2 bulb. Both (z, y, x).

    Raises:
        ValueError: If an axis is too short.
    """
    size = np.array(shape, dtype=int)
    if size.shape != (3,) or size.min() < FEWEST_VOXELS:
        raise ValueError(f"shape is {tuple(shape)}; expected three axes of at least {FEWEST_VOXELS} voxels.")
    rng = np.random.default_rng(seed)
    labels = np.zeros(size, dtype=np.uint8)
    for _ in range(TREES):
        _grow(labels, rng)
    specks = np.zeros(size, dtype=bool)
    for _ in range(rng.integers(10, 20)):
        _fill(specks, rng.uniform(0, size), rng.uniform(0.8, 2.2), True)
    bright = ndimage.gaussian_filter(((labels > 0) | specks).astype(np.float32), 0.5)
    uneven = _smooth(rng, size, 8.0)
    noise = _smooth(rng, size, 0.6)
    return (_CONTRAST * bright + 0.5 * uneven + noise).astype(np.float32), labels


def _grow(labels: NDArray[np.uint8], rng: np.random.Generator) -> None:
    """Draws one tree, from a point near a border into the volume, and bulbs on some of its branches."""
    size = np.array(labels.shape)
    start = rng.uniform(0.2, 0.8, 3) * size
    side = rng.integers(3)
    start[side] = rng.choice([2, size[side] - 3])
    direction = (size / 2 - start) / np.linalg.norm(size / 2 - start)
    bulbs: list[tuple[NDArray[np.float64], float]] = []
    branches = [(start, direction, _RADII[1], 0)]
    while branches:
        point, direction, radius, generation = branches.pop()
        turn = rng.normal(0, 0.02, 3)
        for _ in range(int(rng.uniform(0.4, 0.8) * size.max() / _STEP / (1 + 0.4 * generation))):
            turn = 0.9 * turn + rng.normal(0, 0.015, 3)
            direction = direction + turn
            direction /= np.linalg.norm(direction)
            point = point + _STEP * direction
            if (point < 1).any() or (point > size - 2).any():
                break
            _fill(labels, point, radius, VESSEL)
            radius = max(_RADII[0], radius * 0.995)
            if generation < 3 and rng.random() < 0.03:
                aside = direction + rng.normal(0, 0.8, 3)
                branches.append((point, aside / np.linalg.norm(aside), 0.85 * radius, generation + 1))
        else:
            if rng.random() < 0.5:
                bulbs.append((point, rng.uniform(2.0, 3.2)))
    for point, radius in bulbs:
        _fill(labels, point, radius, BULB)


def _fill(volume: NDArray, centre: NDArray[np.float64], radius: float, value: int | bool) -> None:
    """Sets the voxels of a ball, the nearest one at least."""
    low = np.maximum(0, np.floor(centre - radius).astype(int))
    high = np.minimum(volume.shape, np.ceil(centre + radius).astype(int) + 1)
    box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    axes = np.meshgrid(*[np.arange(a, b) - c for a, b, c in zip(low, high, centre, strict=True)], indexing="ij")
    volume[box][sum(axis**2 for axis in axes) <= radius**2] = value
    nearest = np.clip(np.rint(centre).astype(int), 0, np.array(volume.shape) - 1)
    volume[tuple(nearest)] = value


def _smooth(rng: np.random.Generator, size: NDArray[np.int_], sigma: float) -> NDArray[np.float32]:
    """Noise of zero mean and unit variance, correlated over about sigma voxels."""
    field = ndimage.gaussian_filter(rng.standard_normal(size, dtype=np.float32), sigma, mode="wrap")
    return (field - field.mean()) / field.std()
