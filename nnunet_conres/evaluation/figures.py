"""Pictures of a case's slices with its reference and its prediction, also where only some slices are annotated."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from nnunet_conres.case_ids import unsafe_ids
from nnunet_conres.errors import InputError
from nnunet_conres.files import written_whole
from nnunet_conres.folders import list_files, writing
from nnunet_conres.images.volumes import affine_of, read_labels, read_volume, reader_for, standing
from nnunet_conres.nnunet import ignore_label, label_values

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, the ones that stand out from grey first: told apart by people with any colour vision.
COLOURS: Final = ("#56B4E9", "#D55E00", "#F0E442", "#CC79A7", "#009E73", "#E69F00", "#0072B2")

# Where several channels could be shown: those that raters outline tumours on. In lower case, with the names of 2023.
_PREFERRED_CHANNELS: Final = (("flair", "t2f", "t2-flair"), ("t1ce", "t1c", "t1gd", "t1-ce"))

_LEGEND_COLUMNS: Final = 5

# A veil of a colour that no image has.
_NOT_ANNOTATED: Final = "#1D2B4A"


@dataclass(frozen=True)
class Legend:
    """What the channels and the labels of a data set are called.

    Attributes:
        channels: Names of the channels, in order.
        regions: Label values of every label or region to outline, by name.
        file_ending: Of all images, as in dataset.json.
        ignore_label: The label of voxels that are not annotated, None where there is none.
        reader: Name of nnU-Net's reader for the files, "None" where nnU-Net chooses it by their ending.
    """

    channels: tuple[str, ...]
    regions: Mapping[str, tuple[int, ...]]
    file_ending: str = ".nii.gz"
    ignore_label: int | None = None
    reader: str = "None"


def read_legend(dataset_json: str | Path) -> Legend:
    """Read from a data set's dataset.json what a figure needs.

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

    shown = channels_to_show(channels, images.shape[0])
    slices = slices_to_show(prediction, regions, reference, number_of_slices)
    (top_row, bottom_row), (left_column, right_column) = content_range(images[shown])
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

    colours = {name: COLOURS[number % len(COLOURS)] for number, name in enumerate(regions)}
    for row, channel in enumerate(shown):
        low, high = grey_window(images[channel])
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
                    draw_outline(panel, np.isin(reference[z], values), colours[name], line_width, dashed=False)
                # Thin, so that on a solid outline of the same colour both are seen.
                line_width = 1.3 if reference is None else 0.9
                draw_outline(panel, np.isin(prediction[z], values), colours[name], line_width, dashed=True)
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
        InputError: Files are missing, can't be read or do not fit each other. All missing ones are named before
            anything is written; the others are named after all cases that can be drawn have been.
    """
    ending = legend.file_ending
    jobs: list[tuple[str, list[Path], Path, Path | None]] = []
    faults: list[str] = []
    predictions = list_files(Path(prediction_folder), ending)
    faults += unsafe_ids((prediction.name[: -len(ending)] for prediction in predictions), prediction_folder)
    for prediction in predictions:
        case_id = prediction.name[: -len(ending)]
        images = [Path(image_folder) / f"{case_id}_{i:04d}{ending}" for i in range(len(legend.channels))]
        reference = None if reference_folder is None else Path(reference_folder) / prediction.name
        needed = images if reference is None else [*images, reference]
        faults += [f"{path} does not exist; {prediction} needs it." for path in needed if not path.is_file()]
        jobs.append((case_id, images, prediction, reference))
    if not jobs:
        faults.append(f"{prediction_folder} has no file ending in {ending}; expected predictions of nnU-Net.")
    if faults:
        raise InputError(faults)

    content = {"file_ending": ending, "overwrite_image_reader_writer": legend.reader}
    reader = reader_for(content, [images[0] for _, images, _, _ in jobs])
    output = Path(output_folder)
    with writing(output):
        return _write_overlays(jobs, output, legend, reader, progress)


def _write_overlays(
    jobs: Sequence[tuple[str, list[Path], Path, Path | None]],
    output: Path,
    legend: Legend,
    reader: type,
    progress: bool,
) -> list[Path]:
    from tqdm import tqdm

    faults: list[str] = []
    written = []
    for case_id, images, prediction, reference in tqdm(jobs, desc="Drawing", unit="case", disable=not progress):
        try:
            voxels = [read_standing(path, reader) for path in images]
            predicted = read_standing_labels(prediction, reader)
            truth = None if reference is None else read_standing_labels(reference, reader)
        except InputError as error:
            faults += error.faults
            continue
        try:
            figure = overlay_figure(
                np.stack([image for image, _ in voxels]),
                predicted,
                regions=legend.regions,
                reference=truth,
                channels=legend.channels,
                spacing=voxels[0][1],
                title=case_id,
            )
        except ValueError as error:
            faults.append(f"{prediction}, its images and its reference do not fit each other: {error}")
            continue
        written.append(_save(figure, output / f"{case_id}.png"))
    if faults:
        shown = "\n".join(f"  - {fault}" for fault in faults)
        raise InputError(f"{len(written)} of {len(jobs)} cases were drawn, in {output}; the others can't be:\n{shown}")
    return written


def _save(figure: Figure, path: Path) -> Path:
    with written_whole(path) as partial:
        figure.savefig(partial, dpi=150, facecolor=figure.get_facecolor())
    return path


def sparse_annotation_figure(
    image: NDArray[Any],
    sparse: NDArray[Any],
    dense: NDArray[Any],
    *,
    ignore_label: int,
    regions: Mapping[str, Sequence[int]],
    truth: NDArray[Any] | None = None,
    axis: int = 0,
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
    reverse: Sequence[bool] = (False, False, False),
    title: str = "",
) -> Figure:
    """Draw which slices are annotated, what a network makes of them and, if it is known, the truth, side by side.

    The rows are a cut across the slices, where the annotated ones are bands; the slice that is farthest from an
    annotated one, of those with foreground; and the annotated slice with most foreground.

    Args:
        image: One channel with three axes, any intensities.
        sparse: Label map of the same shape, as annotated.
        dense: Label map of the same shape, the annotation completed.
        ignore_label: Value in `sparse` of voxels that are not annotated.
        regions: Label values of every label or region to show, by name, the outermost first.
        truth: Label map of the same shape, if there is one.
        axis: Axis of the slices.
        spacing: Voxel size along the three axes in mm.
        reverse: For each axis, whether to show it from its end to its beginning.
        title: Shown on top, with the Dice of every region below if there is a truth: of what is not annotated.

    Returns:
        The figure; `savefig` writes it. It is not known to pyplot, so there is nothing to close.

    Raises:
        ValueError: Shapes do not fit each other.
    """
    from matplotlib.figure import Figure

    if image.ndim != 3:
        raise ValueError(f"The image has shape {image.shape}; expected three axes.")
    columns = {"annotated": sparse, "completed": dense} | ({} if truth is None else {"truth": truth})
    for name, labels in columns.items():
        if labels.shape != image.shape:
            raise ValueError(f"The labels {name!r} have shape {labels.shape}; expected {image.shape} like the image.")

    across, along = (other for other in range(3) if other != axis)
    reference = dense if truth is None else truth
    foreground = np.isin(reference, sorted({value for values in regions.values() for value in values}))
    known = sparse != ignore_label
    annotated = np.flatnonzero(known.any(axis=(across, along)))
    # Of the two cuts across the slices, the one that shows more.
    cuts = [
        View(cut, _busiest(foreground, cut, np.arange(image.shape[cut])), axis, other)
        for cut, other in ((across, along), (along, across))
    ]
    views = [max(cuts, key=lambda view: int(view.of(foreground).sum()))]
    missing, present = _slices_of_interest(foreground, axis, annotated)
    views += [View(axis, index, across, along) for index in (missing, present) if index is not None]

    limits = content_box(image)
    ratios = []
    for view in views:
        rows, width = ((limits[a][1] - limits[a][0]) * spacing[a] for a in (view.rows, view.columns))
        ratios.append(float(np.clip(rows / width, 0.25, 2.0)))
    panel_width = 3.0
    legend_rows = -(-(len(regions) + 2) // _LEGEND_COLUMNS)
    top, bottom = 0.6 if truth is None else 0.8, 0.15 + 0.2 * legend_rows
    figure_size = (panel_width * len(columns), panel_width * sum(ratios) + top + bottom)
    figure = Figure(figsize=figure_size, facecolor="black")
    axes = figure.subplots(
        len(views), len(columns), squeeze=False, gridspec_kw={"height_ratios": ratios, "wspace": 0.02, "hspace": 0.03}
    )
    figure.subplots_adjust(left=0.01, right=0.99, top=1 - top / figure_size[1], bottom=bottom / figure_size[1])

    occupied = image[image != image.flat[0]]
    low, high = np.percentile(occupied if occupied.size else image, (0.5, 99.7))
    colours = {name: COLOURS[number % len(COLOURS)] for number, name in enumerate(regions)}
    for row, view in enumerate(views):
        for column, (name, labels) in enumerate(columns.items()):
            panel: Axes = axes[row, column]
            panel.imshow(
                view.of(image),
                cmap="gray",
                vmin=low,
                vmax=high,
                aspect=spacing[view.rows] / spacing[view.columns],
                interpolation="nearest",
            )
            panel.set_axis_off()
            if name == "annotated":
                tint(panel, ~view.of(known), _NOT_ANNOTATED, 0.75)
            for region, values in regions.items():
                mask = np.isin(view.of(labels), values)
                tint(panel, mask, colours[region], 0.4)
                # Around bands of a voxel or two there would be nothing but outline.
                if name != "annotated" or view.axis == axis:
                    draw_outline(panel, mask, colours[region], 1.2, dashed=False)
            for limit, shown, set_limit in (
                (limits[view.columns], view.columns, panel.set_xlim),
                (limits[view.rows][::-1], view.rows, panel.set_ylim),
            ):
                first, last = limit[0] - 0.5, limit[1] - 0.5
                set_limit(*((last, first) if reverse[shown] else (first, last)))
            if view.axis != axis:
                _mark_slices(panel, annotated)
                text = "cut across the slices"
            else:
                text = f"slice {view.index}, {'annotated' if view.index in annotated else 'not annotated'}"
            if column == 0:
                label = panel.text(0.04, 0.96, text, transform=panel.transAxes, va="top", color="white", fontsize=8)
                label.set_bbox({"facecolor": "black", "alpha": 0.6, "linewidth": 0, "pad": 1.5})
            if row == 0:
                panel.set_title(name, color="white", fontsize=10, pad=3)
    heading = f"{title}{': ' if title else ''}{len(annotated)} of {image.shape[axis]} slices annotated"
    figure.text(0.5, 1 - 0.2 / figure_size[1], heading, ha="center", va="center", color="white", fontsize=11)
    if truth is not None:
        scores = _dice_text(np.where(known, 0, dense), np.where(known, 0, truth), regions)
        text = f"Dice where not annotated: {scores}"
        figure.text(0.5, 1 - 0.45 / figure_size[1], text, ha="center", va="center", color="lightgrey", fontsize=9)
    _write_sparse_legend(figure, colours)
    return figure


@dataclass(frozen=True)
class SparseCase:
    """The files of one case for `write_sparse_annotation_figures`.

    Attributes:
        case_id: Names the picture.
        images: One file per channel.
        sparse: Labels as annotated.
        dense: Labels completed.
        truth: Labels of all voxels, if there are any.
    """

    case_id: str
    images: tuple[Path, ...]
    sparse: Path
    dense: Path
    truth: Path | None = None


def write_sparse_annotation_figures(
    cases: Sequence[SparseCase], output_folder: str | Path, *, dataset_json: str | Path, progress: bool = True
) -> list[Path]:
    """Write a picture per case with annotation, completed labels and truth side by side.

    Args:
        cases: The cases to draw.
        output_folder: Gets CASE.png for every case; created if need be.
        dataset_json: The sparsely annotated data set's, for names and for the ignore label.
        progress: Whether to show a progress bar on stderr.

    Returns:
        The files written.

    Raises:
        InputError: The files of a case can't be read or do not fit each other, or dataset.json has no ignore label.
    """
    legend = read_legend(dataset_json)
    if legend.ignore_label is None:
        raise InputError(f"{dataset_json} has no label 'ignore'; expected that of a sparsely annotated data set.")
    content = {"file_ending": legend.file_ending, "overwrite_image_reader_writer": legend.reader}
    if not cases:
        return []
    reader = reader_for(content, [case.images[0] for case in cases])
    output = Path(output_folder)
    with writing(output):
        return _write_sparse_annotation_figures(cases, output, legend, reader, progress)


def _write_sparse_annotation_figures(
    cases: Sequence[SparseCase], output: Path, legend: Legend, reader: type, progress: bool
) -> list[Path]:
    from tqdm import tqdm

    assert legend.ignore_label is not None, "checked before"
    written = []
    for case in tqdm(cases, desc="Drawing", unit="case", disable=not progress):
        image = read_volume(case.images[channels_to_show(legend.channels, len(case.images))[0]], reader)
        sparse = read_labels(case.sparse, reader).voxels
        dense = read_labels(case.dense, reader).voxels
        truth = None if case.truth is None else read_labels(case.truth, reader).voxels
        try:
            figure = sparse_annotation_figure(
                image.voxels[0],
                sparse,
                dense,
                ignore_label=legend.ignore_label,
                regions=legend.regions,
                truth=truth,
                axis=_annotated_axis(sparse != legend.ignore_label),
                spacing=image.spacing,
                reverse=reversed_axes(image.properties),
                title=case.case_id,
            )
        except ValueError as error:
            raise InputError(f"{case.sparse}, its images and its completion do not fit: {error}") from error
        written.append(_save(figure, output / f"{case.case_id}.png"))
    return written


@dataclass(frozen=True)
class View:
    """A plane through a volume: at an index of an axis, with two others as rows and columns of the picture."""

    axis: int
    index: int
    rows: int
    columns: int

    def of(self, volume: NDArray[Any]) -> NDArray[Any]:
        plane = np.take(volume, self.index, axis=self.axis)
        return plane if self.rows < self.columns else plane.T


def _busiest(foreground: NDArray[np.bool_], axis: int, indices: NDArray[np.intp]) -> int:
    """That of some slices with most foreground; the middle one of them if there is none."""
    area = foreground.sum(axis=tuple({0, 1, 2} - {axis}))[indices]
    return int(indices[np.argmax(area)] if area.any() else indices[len(indices) // 2])


def _slices_of_interest(
    foreground: NDArray[np.bool_], axis: int, annotated: NDArray[np.intp]
) -> tuple[int | None, int | None]:
    """A slice far from all annotated ones, and an annotated one; None where there is none."""
    present = _busiest(foreground, axis, annotated) if annotated.size else None
    missing = np.setdiff1d(np.arange(foreground.shape[axis]), annotated)
    if not missing.size:
        return None, present
    occupied = np.flatnonzero(foreground.any(axis=tuple({0, 1, 2} - {axis})))
    candidates = np.intersect1d(missing, occupied) if np.isin(missing, occupied).any() else missing
    if annotated.size:
        distance = np.abs(candidates[:, None] - annotated[None]).min(axis=1)
        candidates = candidates[distance == distance.max()]
    return _busiest(foreground, axis, candidates), present


def content_box(image: NDArray[Any]) -> list[tuple[int, int]]:
    """Indices (first, one past the last) along each axis of all that is not background, and a margin around."""
    content = image != image.flat[0]
    if not content.any():
        return [(0, size) for size in image.shape]
    ranges = []
    for axis, size in enumerate(image.shape):
        occupied = np.flatnonzero(content.any(axis=tuple({0, 1, 2} - {axis})))
        margin = max(2, size // 25)
        ranges.append((max(0, int(occupied[0]) - margin), min(size, int(occupied[-1]) + 1 + margin)))
    return ranges


def _annotated_axis(known: NDArray[np.bool_]) -> int:
    """The axis with the smallest share of slices in which anything is annotated; the first of several."""
    shares = [known.any(axis=tuple({0, 1, 2} - {axis})).mean() for axis in range(3)]
    return int(np.argmin(shares))


def tint(panel: Axes, mask: NDArray[np.bool_], colour: str, opacity: float) -> None:
    """Lay a colour over the voxels of a mask."""
    from matplotlib.colors import to_rgb

    layer = np.zeros((*mask.shape, 4))
    layer[mask] = (*to_rgb(colour), opacity)
    panel.imshow(layer, aspect=panel.get_aspect(), interpolation="nearest")


def _mark_slices(panel: Axes, rows: NDArray[np.intp]) -> None:
    """White bars at both sides of a cut, beside the annotated slices."""
    sides = panel.get_xlim()
    segments = [[(side, row - 0.5), (side, row + 0.5)] for row in rows for side in sides]
    from matplotlib.collections import LineCollection

    panel.add_collection(LineCollection(segments, colors="white", linewidths=5, capstyle="butt"), autolim=False)


def reversed_axes(properties: Mapping[str, Any]) -> tuple[bool, ...]:
    """For each axis of an array of nnU-Net's readers, whether a viewer from the feet, face up, reads it backwards."""
    affine = affine_of(properties)
    if affine is None:
        return (False, False, False)
    directions = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    # Towards the left and the back, and downwards, is how pictures are read.
    read = np.array([-1.0, -1.0, -1.0])
    reverse = []
    for direction in directions.T[::-1]:
        main = int(np.argmax(np.abs(direction)))
        reverse.append(bool(direction[main] * read[main] < 0))
    return tuple(reverse)


def _write_sparse_legend(figure: Figure, colours: Mapping[str, str]) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=colour, linewidth=4, label=name) for name, colour in colours.items()]
    handles.append(Line2D([], [], color="white", linewidth=4, label="annotated slices"))
    handles.append(Line2D([], [], color=_NOT_ANNOTATED, linewidth=8, label="not annotated"))
    figure.legend(
        handles=handles,
        loc="lower center",
        ncols=min(len(handles), _LEGEND_COLUMNS),
        frameon=False,
        labelcolor="white",
        fontsize=8,
    )


def read_standing(path: Path, reader: type) -> tuple[NDArray[Any], tuple[float, ...]]:
    """Voxels (z, y, x) of an image and their spacing, turned so that slices are seen from the feet with the face up."""
    volume = read_volume(path, reader)
    if volume.voxels.shape[0] != 1:
        raise InputError(f"{path} has {volume.voxels.shape[0]} channels; expected one, and a file for each channel.")
    return standing(volume.voxels[0], volume.properties)


def read_standing_labels(path: Path, reader: type) -> NDArray[np.int32]:
    """Labels (z, y, x), turned so that slices are seen from the feet with the face up."""
    labels = read_labels(path, reader)
    return standing(labels.voxels, labels.properties)[0]


def channels_to_show(names: Sequence[str], count: int) -> list[int]:
    """Which of so many channels to show, by their names: FLAIR and contrast-enhanced T1, else the first."""
    lower = [name.lower() for name in names[:count]]
    found = [next((lower.index(name) for name in synonyms if name in lower), -1) for synonyms in _PREFERRED_CHANNELS]
    return [channel for channel in found if channel >= 0] or [0]


def grey_window(image: NDArray[Any]) -> tuple[float, float]:
    """Intensities to show as black and white, from the voxels other than the background's."""
    values = image[image != image.flat[0]]
    if not values.size:
        return 0.0, 1.0
    low, middle, high = (float(value) for value in np.percentile(values, (0.5, 50, 99.7)))
    # Black as the background where that is dark, even if interpolation has left a few voxels darker still.
    background = float(image.flat[0])
    low = max(low, background) if background < middle else low
    return low, max(high, low + 1e-6)


def content_range(images: NDArray[Any]) -> tuple[tuple[int, int], tuple[int, int]]:
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


def draw_outline(panel: Axes, mask: NDArray[np.bool_], colour: str, width: float, *, dashed: bool) -> None:
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
    text = f"Dice: {_dice_text(prediction, reference, regions)}"
    figure.text(0.5, 1 - 0.7 * height, text, ha="center", va="center", color="lightgrey", fontsize=9)


def _dice_text(prediction: NDArray[Any], reference: NDArray[Any], regions: Mapping[str, Sequence[int]]) -> str:
    scores = []
    for name, values in regions.items():
        true, predicted = np.isin(reference, values), np.isin(prediction, values)
        total = int(true.sum()) + int(predicted.sum())
        scores.append(f"{name} {2 * int((true & predicted).sum()) / total:.3f}" if total else f"{name} -")
    # More than a handful would not fit on a line.
    return ",  ".join(scores[:6]) + (", ..." if len(scores) > 6 else "")


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
