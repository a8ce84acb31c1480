"""Parts of all figures of slices: planes, outlines, notes and legends."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from nnunet_conres.errors import InputError
from nnunet_conres.evaluation.surfaces import dice
from nnunet_conres.files import written_whole
from nnunet_conres.nnunet import ignore_label, label_values

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Channels to prefer: those on which raters outline tumours. In lower case, including the names of BraTS 2023.
_PREFERRED_CHANNELS: Final = (("flair", "t2f", "t2-flair"), ("t1ce", "t1c", "t1gd", "t1-ce"))

LEGEND_COLUMNS: Final = 5


@dataclass(frozen=True)
class Legend:
    """Names of the channels and labels of a data set.

    Attributes:
        channels: Names of the channels, in order.
        regions: Label values of every label or region to outline, by name.
        file_ending: File ending of all images, as in dataset.json.
        ignore_label: Label of voxels that are not annotated; None if there is none.
        reader: Name of nnU-Net's reader for the files; "None" if nnU-Net chooses it by the file ending.
    """

    channels: tuple[str, ...]
    regions: Mapping[str, tuple[int, ...]]
    file_ending: str = ".nii.gz"
    ignore_label: int | None = None
    reader: str = "None"


def read_legend(dataset_json: str | Path) -> Legend:
    """Read the names and labels that a figure needs from a dataset.json.

    Args:
        dataset_json: The file.

    Returns:
        Channel names, and all labels or regions but background and ignore.

    Raises:
        InputError: There is no such file, or it is not a dataset.json.
    """
    path = Path(dataset_json)
    if not path.is_file():
        raise InputError(f"{path} does not exist; expected the dataset.json of the data set.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        channels = tuple(name for _, name in sorted((int(i), n) for i, n in content["channel_names"].items()))
        labels = content["labels"]
        reader = str(content.get("overwrite_image_reader_writer", "None"))
        return Legend(channels, label_values(labels), content["file_ending"], ignore_label(labels), reader)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path} is not the dataset.json of an nnU-Net data set: {error!r}.") from error


def slices_to_show(
    prediction: NDArray[Any],
    regions: Mapping[str, Sequence[int]],
    reference: NDArray[Any] | None = None,
    number: int = 3,
) -> list[int]:
    """Return the slices along the first axis with the largest labelled areas, at a distance from each other.

    Areas of nested regions add up, so slices through the innermost regions come first.

    Args:
        prediction: Label map (z, y, x).
        regions: Label values of the regions to count, by name.
        reference: Label map of the same shape, counted together with the prediction.
        number: Maximum number of slices, 1 or more.

    Returns:
        Slice indices in ascending order; the middle slice alone if nothing is labelled.
    """
    area = np.zeros(prediction.shape[0], np.int64)
    for values in regions.values():
        labelled = np.isin(prediction, values)
        if reference is not None:
            labelled |= np.isin(reference, values)
        area += labelled.sum(axis=(1, 2))
    occupied = np.flatnonzero(area)
    if not occupied.size:
        return [prediction.shape[0] // 2]
    # Neighbouring slices look alike, so chosen slices are at least this far apart.
    gap = max(1, (int(occupied[-1]) - int(occupied[0]) + 1) // (number + 2))
    chosen: list[int] = []
    while len(chosen) < number and area.any():
        best = int(np.argmax(area))
        chosen.append(best)
        area[max(0, best - gap + 1) : best + gap] = 0
    return sorted(chosen)


@dataclass(frozen=True)
class View:
    """A plane through a volume: an index along one axis; the other two are rows and columns of the picture."""

    axis: int
    index: int
    rows: int
    columns: int

    def of(self, volume: NDArray[Any]) -> NDArray[Any]:
        plane = np.take(volume, self.index, axis=self.axis)
        return plane if self.rows < self.columns else plane.T


def content_box(image: NDArray[Any]) -> list[tuple[int, int]]:
    """Return the index range (first, one past the last) of all voxels but background along each axis, with a margin."""
    return _box(image != image.flat[0])


def _box(content: NDArray[np.bool_]) -> list[tuple[int, int]]:
    if not content.any():
        return [(0, size) for size in content.shape]
    ranges = []
    for axis, size in enumerate(content.shape):
        occupied = np.flatnonzero(content.any(axis=tuple({*range(content.ndim)} - {axis})))
        margin = max(2, size // 25)
        ranges.append((max(0, int(occupied[0]) - margin), min(size, int(occupied[-1]) + 1 + margin)))
    return ranges


def show_plane(
    panel: Axes,
    view: View,
    volume: NDArray[Any],
    *,
    values: tuple[float, float],
    limits: Sequence[tuple[int, int]],
    spacing: Sequence[float],
    reverse: Sequence[bool],
    colour_map: str = "gray",
) -> None:
    """Draw a plane of a volume.

    Args:
        panel: Axes to draw on.
        view: The plane.
        volume: Three axes.
        values: Values at the two ends of the colour map.
        limits: Index range (first, one past the last) to show along each axis.
        spacing: Voxel size along the three axes in mm.
        reverse: Whether to flip each axis.
        colour_map: Name of a Matplotlib colour map.
    """
    aspect = spacing[view.rows] / spacing[view.columns]
    low, high = values
    panel.imshow(view.of(volume), cmap=colour_map, vmin=low, vmax=high, aspect=aspect, interpolation="nearest")
    panel.set_axis_off()
    for axis, limit, set_limit in (
        (view.columns, limits[view.columns], panel.set_xlim),
        (view.rows, limits[view.rows][::-1], panel.set_ylim),
    ):
        first, last = limit[0] - 0.5, limit[1] - 0.5
        set_limit(*((last, first) if reverse[axis] else (first, last)))


def write_note(panel: Axes, text: str) -> None:
    """Write a note into the upper left corner of a panel."""
    note = panel.text(0.03, 0.97, text, transform=panel.transAxes, va="top", color="white", fontsize=8)
    note.set_bbox({"facecolor": "black", "alpha": 0.6, "linewidth": 0, "pad": 1.5})


def write_legend(figure: Figure, colours: Mapping[str, str], *more: Mapping[str, Any]) -> None:
    """Write a legend of colours and lines below the panels.

    Args:
        figure: The figure.
        colours: By name of the label or region.
        more: Properties of further lines, each with a `label`.
    """
    from matplotlib.lines import Line2D

    lines = [*({"color": colour, "linewidth": 4, "label": name} for name, colour in colours.items()), *more]
    figure.legend(
        handles=[Line2D([], [], **line) for line in lines],
        loc="lower center",
        ncols=min(len(lines), LEGEND_COLUMNS),
        frameon=False,
        labelcolor="white",
        fontsize=8,
        handlelength=2.5,
    )


def save_figure(figure: Figure, path: Path, dpi: int = 120) -> Path:
    """Write a figure atomically."""
    with written_whole(path) as partial:
        figure.savefig(partial, dpi=dpi, facecolor=figure.get_facecolor())
    return path


def tint(panel: Axes, mask: NDArray[np.bool_], colour: str, opacity: float) -> None:
    """Lay a colour over the voxels of a mask."""
    from matplotlib.colors import to_rgb

    layer = np.zeros((*mask.shape, 4))
    layer[mask] = (*to_rgb(colour), opacity)
    panel.imshow(layer, aspect=panel.get_aspect(), interpolation="nearest")


def channels_to_show(names: Sequence[str], count: int) -> list[int]:
    """Return which of the first `count` channels to show, by name: FLAIR and contrast-enhanced T1, else the first."""
    lower = [name.lower() for name in names[:count]]
    found = [next((lower.index(name) for name in synonyms if name in lower), -1) for synonyms in _PREFERRED_CHANNELS]
    return [channel for channel in found if channel >= 0] or [0]


def grey_window(image: NDArray[Any]) -> tuple[float, float]:
    """Return the intensities to show as black and white, without counting voxels of the background."""
    values = image[image != image.flat[0]]
    if not values.size:
        return 0.0, 1.0
    low, middle, high = (float(value) for value in np.percentile(values, (0.5, 50, 99.7)))
    # A dark background is shown black, even if interpolation has left a few voxels darker still.
    background = float(image.flat[0])
    low = max(low, background) if background < middle else low
    return low, max(high, low + 1e-6)


def content_range(images: NDArray[Any]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the rows and columns (first, one past the last) of all voxels but background, with a margin."""
    rows, columns = _box((images != images[:, :1, :1, :1]).any(axis=(0, 1)))
    return rows, columns


def value_range(values: NDArray[Any]) -> tuple[float, float]:
    """Return the values to show darkest and brightest."""
    if not values.size:
        return 0.0, 1.0
    low, high = (float(value) for value in np.percentile(values, (0.5, 99.7)))
    return low, max(high, low + 1e-6)


def draw_outline(panel: Axes, mask: NDArray[np.bool_], colour: str, width: float, *, dashed: bool) -> None:
    """Draw the outline of a mask along voxel edges, without smoothing."""
    segments = _border(mask)
    if not segments:
        return
    from matplotlib.collections import LineCollection

    if dashed:
        # Black between the dashes makes them stand out from bright tissue and from a solid line below.
        panel.add_collection(LineCollection(segments, colors="black", linewidths=width, capstyle="butt"))
        panel.add_collection(LineCollection(segments, colors=colour, linewidths=width, linestyles=[(0, (4, 3))]))
    else:
        panel.add_collection(LineCollection(segments, colors=colour, linewidths=width, capstyle="projecting"))


def _border(mask: NDArray[np.bool_]) -> list[NDArray[np.float64]]:
    """Return closed paths (points, 2) in x, y around a mask (y, x), along voxel edges."""
    padded = np.pad(mask, 1)
    # Directed edges between inside and outside voxels, by starting corner; the inside is on the right of each edge.
    edges: dict[tuple[int, int], list[tuple[int, int]]] = {}

    inside = padded[1:-1, 1:-1]
    sides: tuple[tuple[NDArray[np.bool_], tuple[int, int], tuple[int, int]], ...] = (
        (inside & ~padded[:-2, 1:-1], (0, 0), (0, 1)),
        (inside & ~padded[2:, 1:-1], (1, 1), (1, 0)),
        (inside & ~padded[1:-1, :-2], (1, 0), (0, 0)),
        (inside & ~padded[1:-1, 2:], (0, 1), (1, 1)),
    )
    for side, start, end in sides:
        for row, column in np.argwhere(side).tolist():
            edges.setdefault((row + start[0], column + start[1]), []).append((row + end[0], column + end[1]))

    paths = []
    while edges:
        first = next(iter(edges))
        corner, path = first, [first]
        while True:
            ends = edges[corner]
            following = ends.pop()
            if not ends:
                del edges[corner]
            path.append(following)
            corner = following
            if corner == first:
                break
        paths.append(np.array(path, np.float64)[:, ::-1] - 0.5)
    return paths


def dice_text(prediction: NDArray[Any], reference: NDArray[Any], regions: Mapping[str, Sequence[int]]) -> str:
    """Return the Dice of up to six labels or regions as text."""
    scores = []
    for name, values in regions.items():
        score = dice(np.isin(reference, values), np.isin(prediction, values), empty=math.nan)
        scores.append(f"{name} -" if math.isnan(score) else f"{name} {score:.3f}")
    # More than a handful would not fit on a line.
    return ",  ".join(scores[:6]) + (", ..." if len(scores) > 6 else "")
