"""Pictures of a case's slices with the outlines of its reference and its prediction."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, the ones that stand out from grey first: told apart by people with any colour vision.
_COLOURS: Final = ("#56B4E9", "#D55E00", "#F0E442", "#CC79A7", "#009E73", "#E69F00", "#0072B2")

# Where several channels could be shown: those that raters outline tumours on. In lower case, with the names of 2023.
_PREFERRED_CHANNELS: Final = (("flair", "t2f", "t2-flair"), ("t1ce", "t1c", "t1gd", "t1-ce"))

_LEGEND_COLUMNS: Final = 5


@dataclass(frozen=True)
class Legend:
    """What the channels and the labels of a data set are called.

    Attributes:
        channels: Names of the channels, in order.
        regions: Label values of every label or region to outline, by name.
        file_ending: Of all images, as in dataset.json.
    """

    channels: tuple[str, ...]
    regions: Mapping[str, tuple[int, ...]]
    file_ending: str = ".nii.gz"


def read_legend(dataset_json: str | Path) -> Legend:
    """Read from a data set's dataset.json what a figure needs.

    Args:
        dataset_json: The file.

    Returns:
        Channel names, and all labels or regions but background and ignore.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is not a dataset.json.
    """
    path = Path(dataset_json)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; expected the dataset.json of the data set.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        channels = tuple(name for _, name in sorted((int(i), n) for i, n in content["channel_names"].items()))
        regions = {
            name: tuple(int(v) for v in labels) if isinstance(labels, list) else (int(labels),)
            for name, labels in content["labels"].items()
            if name not in ("background", "ignore")
        }
        return Legend(channels, regions, content["file_ending"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is not the dataset.json of an nnU-Net data set: {error!r}.") from error


def overlay_figure(
    images: NDArray[Any],
    prediction: NDArray[Any],
    *,
    regions: Mapping[str, Sequence[int]],
    reference: NDArray[Any] | None = None,
    channels: Sequence[str] = (),
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
    title: str = "",
    number_of_slices: int = 3,
) -> Figure:
    """Draw the slices that show most, once per channel, with outlines of reference (solid) and prediction (dashed).

    Args:
        images: (C, z, y, x), any intensities. FLAIR and contrast-enhanced T1 are shown where the channel names tell
            them, else the first channel.
        prediction: Label map (z, y, x).
        regions: Label values of every label or region to outline, by name, the outermost first.
        reference: Label map (z, y, x), if there is one.
        channels: Names of the channels.
        spacing: Voxel size along (z, y, x) in mm.
        title: Shown on top, with the Dice of every region below if there is a reference.
        number_of_slices: How many slices along z to show, at most.

    Returns:
        The figure; `savefig` writes it. It is not known to pyplot, so there is nothing to close.

    Raises:
        ValueError: Shapes do not fit each other.
    """
    from matplotlib.figure import Figure

    if images.ndim != 4:
        raise ValueError(f"images have shape {images.shape}; expected four axes (C, z, y, x).")
    for name, labels in (("prediction", prediction), ("reference", reference)):
        if labels is not None and labels.shape != images.shape[1:]:
            raise ValueError(f"The {name} has shape {labels.shape}; expected {images.shape[1:]} like the images.")

    shown = _channels_to_show(channels, images.shape[0])
    slices = slices_to_show(prediction, regions, reference, number_of_slices)
    (top_row, bottom_row), (left_column, right_column) = _extent(images[shown])
    height, width = (bottom_row - top_row) * spacing[1], (right_column - left_column) * spacing[2]
    panel_width = 3.0
    panel_height = panel_width * float(np.clip(height / width, 0.4, 2.5))
    legend_rows = -(-(len(regions) + 2) // _LEGEND_COLUMNS)
    top, bottom = 0.4 if reference is None else 0.75, 0.2 + 0.2 * legend_rows
    figure_size = (panel_width * len(slices), panel_height * len(shown) + top + bottom)
    figure = Figure(figsize=(max(figure_size[0], 6.0), figure_size[1]), facecolor="black")
    axes = figure.subplots(len(shown), len(slices), squeeze=False)
    figure.subplots_adjust(
        left=0, right=1, top=1 - top / figure_size[1], bottom=bottom / figure_size[1], wspace=0.01, hspace=0.01
    )

    colours = {name: _COLOURS[number % len(_COLOURS)] for number, name in enumerate(regions)}
    for row, channel in enumerate(shown):
        low, high = _window(images[channel])
        for column, z in enumerate(slices):
            panel: Axes = axes[row, column]
            panel.imshow(
                images[channel, z], cmap="gray", vmin=low, vmax=high, aspect=spacing[1] / spacing[2], origin="upper"
            )
            panel.set_axis_off()
            for name, values in regions.items():
                # Inner regions often share a border with outer ones: thinner, they leave an edge of both to be seen.
                within = sum(set(other) < set(values) for other in regions.values())
                if reference is not None:
                    line_width = 1.6 + 0.8 * min(within, 3)
                    _outline(panel, np.isin(reference[z], values), colours[name], line_width, dashed=False)
                # Thin, so that on a solid outline of the same colour both are seen.
                line_width = 1.3 if reference is None else 0.9
                _outline(panel, np.isin(prediction[z], values), colours[name], line_width, dashed=True)
            panel.set_xlim(left_column - 0.5, right_column - 0.5)
            panel.set_ylim(bottom_row - 0.5, top_row - 0.5)
            label = f"{channels[channel]}, " if channel < len(channels) else ""
            panel.text(0.02, 0.98, f"{label}slice {z}", transform=panel.transAxes, va="top", color="white", fontsize=8)
    _write_title(figure, title, prediction, regions, reference, top / figure_size[1])
    _write_legend(figure, colours, with_reference=reference is not None)
    return figure


def slices_to_show(
    prediction: NDArray[Any],
    regions: Mapping[str, Sequence[int]],
    reference: NDArray[Any] | None = None,
    number: int = 3,
) -> list[int]:
    """Slices along the first axis with the largest labelled area, kept apart from each other.

    Areas of nested regions add up, so that slices through the innermost ones come first.

    Args:
        prediction: Label map (z, y, x).
        regions: Label values that count, by name.
        reference: Label map of the same shape, counted together with the prediction.
        number: How many slices at most, 1 or more.

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
    # Neighbouring slices look alike: between two shown ones lies at least this share of the labelled range.
    gap = max(1, (int(occupied[-1]) - int(occupied[0]) + 1) // (number + 2))
    chosen: list[int] = []
    while len(chosen) < number and area.any():
        best = int(np.argmax(area))
        chosen.append(best)
        area[max(0, best - gap + 1) : best + gap] = 0
    return sorted(chosen)


def write_overlays(
    image_folder: str | Path,
    prediction_folder: str | Path,
    output_folder: str | Path,
    *,
    legend: Legend,
    reference_folder: str | Path | None = None,
    progress: bool = True,
) -> list[Path]:
    """Write one overlay figure per predicted case.

    Args:
        image_folder: Images as nnU-Net names them, CASE_0000 and so on.
        prediction_folder: Label maps named after the cases.
        output_folder: Gets CASE.png for every prediction; created if need be.
        legend: Names and labels of the data set.
        reference_folder: Label maps named after the cases, if there are any.
        progress: Whether to show a progress bar on stderr.

    Returns:
        The files written.

    Raises:
        ValueError: Files are missing or do not fit each other; all missing ones are named before anything is written.
    """
    from tqdm import tqdm

    ending = legend.file_ending
    jobs: list[tuple[str, list[Path], Path, Path | None]] = []
    faults: list[str] = []
    for prediction in sorted(Path(prediction_folder).glob(f"*{ending}")):
        case_id = prediction.name[: -len(ending)]
        images = [Path(image_folder) / f"{case_id}_{i:04d}{ending}" for i in range(len(legend.channels))]
        reference = None if reference_folder is None else Path(reference_folder) / prediction.name
        needed = images if reference is None else [*images, reference]
        faults += [f"{path} does not exist; {prediction} needs it." for path in needed if not path.is_file()]
        jobs.append((case_id, images, prediction, reference))
    if not jobs:
        faults.append(f"{prediction_folder} has no file ending in {ending}; expected predictions of nnU-Net.")
    if faults:
        raise ValueError("\n".join(faults))

    output = Path(output_folder)
    output.mkdir(parents=True, exist_ok=True)
    written = []
    for case_id, images, prediction, reference in tqdm(jobs, desc="Drawing", unit="case", disable=not progress):
        voxels = [_read_standing(path) for path in images]
        predicted = _read_standing(prediction)[0]
        try:
            figure = overlay_figure(
                np.stack([image for image, _ in voxels]),
                predicted,
                regions=legend.regions,
                reference=None if reference is None else _read_standing(reference)[0],
                channels=legend.channels,
                spacing=voxels[0][1],
                title=case_id,
            )
        except ValueError as error:
            raise ValueError(f"{prediction}, its images and its reference do not fit each other: {error}") from error
        path = output / f"{case_id}.png"
        partial = output / f".{case_id}.partial.png"
        figure.savefig(partial, dpi=150, facecolor=figure.get_facecolor())
        partial.replace(path)
        written.append(path)
    return written


def _read_standing(path: Path) -> tuple[NDArray[Any], tuple[float, ...]]:
    """Voxels (z, y, x) and their spacing, turned so that slices are seen from the feet with the face up."""
    import SimpleITK

    image = SimpleITK.DICOMOrient(SimpleITK.ReadImage(str(path)), "LPS")
    return SimpleITK.GetArrayFromImage(image), tuple(image.GetSpacing()[::-1])


def _channels_to_show(names: Sequence[str], count: int) -> list[int]:
    lower = [name.lower() for name in names[:count]]
    found = [next((lower.index(name) for name in synonyms if name in lower), -1) for synonyms in _PREFERRED_CHANNELS]
    return [channel for channel in found if channel >= 0] or [0]


def _window(image: NDArray[Any]) -> tuple[float, float]:
    """Intensities to show as black and white, from the voxels other than the background's."""
    values = image[image != image.flat[0]]
    if not values.size:
        return 0.0, 1.0
    low, middle, high = (float(value) for value in np.percentile(values, (0.5, 50, 99.7)))
    # Black as the background where that is dark, even if interpolation has left a few voxels darker still.
    background = float(image.flat[0])
    low = max(low, background) if background < middle else low
    return low, max(high, low + 1e-6)


def _extent(images: NDArray[Any]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Rows and columns (first, one past the last) of all slices that are not background, and a margin around them."""
    content = (images != images[:, :1, :1, :1]).any(axis=(0, 1))
    if not content.any():
        return (0, content.shape[0]), (0, content.shape[1])
    ranges = []
    for axis, size in enumerate(content.shape):
        occupied = np.flatnonzero(content.any(axis=1 - axis))
        margin = max(2, size // 25)
        ranges.append((max(0, int(occupied[0]) - margin), min(size, int(occupied[-1]) + 1 + margin)))
    return ranges[0], ranges[1]


def _outline(panel: Axes, mask: NDArray[np.bool_], colour: str, width: float, *, dashed: bool) -> None:
    """Draw the border of a mask along the voxels' edges, where it is, not smoothed."""
    segments = _border(mask)
    if not segments:
        return
    from matplotlib.collections import LineCollection

    if dashed:
        # Dark between the dashes, to stand out from bright tissue and from a solid line below.
        panel.add_collection(LineCollection(segments, colors="black", linewidths=width, capstyle="butt"))
        panel.add_collection(LineCollection(segments, colors=colour, linewidths=width, linestyles=[(0, (4, 3))]))
    else:
        panel.add_collection(LineCollection(segments, colors=colour, linewidths=width, capstyle="projecting"))


def _border(mask: NDArray[np.bool_]) -> list[NDArray[np.float64]]:
    """Closed paths (points, 2) in x, y around a mask (y, x), along voxel edges."""
    padded = np.pad(mask, 1)
    # Every edge between a voxel inside and one outside, directed with the inside on its right, by its starting corner.
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


def _write_title(
    figure: Figure,
    title: str,
    prediction: NDArray[Any],
    regions: Mapping[str, Sequence[int]],
    reference: NDArray[Any] | None,
    height: float,
) -> None:
    middle = 0.5 if reference is None else 0.3
    figure.text(0.5, 1 - middle * height, title, ha="center", va="center", color="white", fontsize=11)
    if reference is None:
        return
    scores = []
    for name, values in regions.items():
        true, predicted = np.isin(reference, values), np.isin(prediction, values)
        total = int(true.sum()) + int(predicted.sum())
        scores.append(f"{name} {2 * int((true & predicted).sum()) / total:.3f}" if total else f"{name} -")
    # More than a handful would not fit on a line.
    text = "Dice: " + ",  ".join(scores[:6]) + (", ..." if len(scores) > 6 else "")
    figure.text(0.5, 1 - 0.7 * height, text, ha="center", va="center", color="lightgrey", fontsize=9)


def _write_legend(figure: Figure, colours: Mapping[str, str], *, with_reference: bool) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=colour, linewidth=4, label=name) for name, colour in colours.items()]
    if with_reference:
        handles.append(Line2D([], [], color="white", linewidth=2.0, label="reference"))
    handles.append(Line2D([], [], color="white", linewidth=0.9, linestyle=(0, (4, 3)), label="prediction"))
    figure.legend(
        handles=handles,
        loc="lower center",
        ncols=min(len(handles), _LEGEND_COLUMNS),
        frameon=False,
        labelcolor="white",
        fontsize=8,
        handlelength=2.5,
    )
