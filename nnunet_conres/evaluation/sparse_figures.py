"""Figures of sparsely annotated cases and their completed labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from nnunet_conres.colours import colours_of
from nnunet_conres.errors import InputError
from nnunet_conres.evaluation.figures import (
    LEGEND_COLUMNS,
    View,
    channels_to_show,
    content_box,
    dice_text,
    draw_outline,
    read_legend,
    save_figure,
    show_plane,
    tint,
    value_range,
    write_legend,
    write_note,
)
from nnunet_conres.folders import writing
from nnunet_conres.images.volumes import read_labels, read_volume, reader_for, reversed_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Overlay colour, which does not occur in grey images.
_NOT_ANNOTATED: Final = "#1D2B4A"


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
    """Draw the sparse annotation, the completed labels and, if known, the ground truth side by side.

    The rows are a cut across the slices, in which annotated slices are bands; the slice with foreground that is
    farthest from all annotated slices; and the annotated slice with most foreground.

    Args:
        image: One channel with three axes, any intensities.
        sparse: Sparsely annotated label map, same shape.
        dense: Completed label map, same shape.
        ignore_label: Value in `sparse` of voxels that are not annotated.
        regions: Label values of every label or region to show, by name, the outermost first.
        truth: Ground truth, same shape, if there is one.
        axis: Axis of the slices.
        spacing: Voxel size along the three axes in mm.
        reverse: For each axis, whether to show it reversed.
        title: Shown on top. If there is a ground truth, the Dice of every region over the voxels that are not annotated
            follows below.

    Returns:
        The figure; `savefig` writes it. It is not known to pyplot, so there is nothing to close.

    Raises:
        ValueError: The shapes do not match.
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
    # Of the two cuts across the slices, show the one with more foreground.
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
    legend_rows = -(-(len(regions) + 2) // LEGEND_COLUMNS)
    top, bottom = 0.6 if truth is None else 0.8, 0.15 + 0.2 * legend_rows
    figure_size = (panel_width * len(columns), panel_width * sum(ratios) + top + bottom)
    figure = Figure(figsize=figure_size, facecolor="black")
    axes = figure.subplots(
        len(views), len(columns), squeeze=False, gridspec_kw={"height_ratios": ratios, "wspace": 0.02, "hspace": 0.03}
    )
    figure.subplots_adjust(left=0.01, right=0.99, top=1 - top / figure_size[1], bottom=bottom / figure_size[1])

    low, high = value_range(image[image != image.flat[0]])
    colours = colours_of(regions)
    for row, view in enumerate(views):
        for column, (name, labels) in enumerate(columns.items()):
            panel: Axes = axes[row, column]
            show_plane(panel, view, image, values=(low, high), limits=limits, spacing=spacing, reverse=reverse)
            if name == "annotated":
                tint(panel, ~view.of(known), _NOT_ANNOTATED, 0.75)
            for region, values in regions.items():
                mask = np.isin(view.of(labels), values)
                tint(panel, mask, colours[region], 0.4)
                # Outlines would cover annotated bands that are only one or two voxels wide.
                if name != "annotated" or view.axis == axis:
                    draw_outline(panel, mask, colours[region], 1.2, dashed=False)
            if view.axis != axis:
                _mark_slices(panel, annotated)
                text = "cut across the slices"
            else:
                text = f"slice {view.index}, {'annotated' if view.index in annotated else 'not annotated'}"
            if column == 0:
                write_note(panel, text)
            if row == 0:
                panel.set_title(name, color="white", fontsize=10, pad=3)
    heading = f"{title}{': ' if title else ''}{len(annotated)} of {image.shape[axis]} slices annotated"
    figure.text(0.5, 1 - 0.2 / figure_size[1], heading, ha="center", va="center", color="white", fontsize=11)
    if truth is not None:
        scores = dice_text(np.where(known, 0, dense), np.where(known, 0, truth), regions)
        text = f"Dice where not annotated: {scores}"
        figure.text(0.5, 1 - 0.45 / figure_size[1], text, ha="center", va="center", color="lightgrey", fontsize=9)
    write_legend(
        figure,
        colours,
        {"color": "white", "linewidth": 4, "label": "annotated slices"},
        {"color": _NOT_ANNOTATED, "linewidth": 8, "label": "not annotated"},
    )
    return figure


@dataclass(frozen=True)
class SparseCase:
    """The files of one case for `write_sparse_annotation_figures`.

    Attributes:
        case_id: The case, which gives the figure its file name.
        images: One file per channel.
        sparse: Sparsely annotated labels.
        dense: Completed labels.
        truth: Ground truth, if there is one.
    """

    case_id: str
    images: tuple[Path, ...]
    sparse: Path
    dense: Path
    truth: Path | None = None


def write_sparse_annotation_figures(
    cases: Sequence[SparseCase], output_folder: str | Path, *, dataset_json: str | Path, progress: bool = True
) -> list[Path]:
    """Write a figure per case with annotation, completed labels and ground truth side by side.

    Args:
        cases: The cases to draw.
        output_folder: Receives CASE.png for every case; created if necessary.
        dataset_json: dataset.json of the sparsely annotated data set, for names and the ignore label.
        progress: Whether to show a progress bar on stderr.

    Returns:
        The files written.

    Raises:
        InputError: The files of a case can't be read or do not match, or dataset.json has no ignore label.
    """
    from tqdm import tqdm

    legend = read_legend(dataset_json)
    if legend.ignore_label is None:
        raise InputError(f"{dataset_json} has no label 'ignore'; expected that of a sparsely annotated data set.")
    content = {"file_ending": legend.file_ending, "overwrite_image_reader_writer": legend.reader}
    if not cases:
        return []
    reader = reader_for(content, [case.images[0] for case in cases])
    output = Path(output_folder)
    with writing(output):
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
            written.append(save_figure(figure, output / f"{case.case_id}.png", dpi=150))
        return written


def _busiest(foreground: NDArray[np.bool_], axis: int, indices: NDArray[np.intp]) -> int:
    """Return the given slice with most foreground; the middle one if none has foreground."""
    area = foreground.sum(axis=tuple({0, 1, 2} - {axis}))[indices]
    return int(indices[np.argmax(area)] if area.any() else indices[len(indices) // 2])


def _slices_of_interest(
    foreground: NDArray[np.bool_], axis: int, annotated: NDArray[np.intp]
) -> tuple[int | None, int | None]:
    """Return a slice far from all annotated slices, and an annotated slice; None if there is none."""
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


def _annotated_axis(known: NDArray[np.bool_]) -> int:
    """Return the axis with the smallest share of annotated slices; the first of several."""
    shares = [known.any(axis=tuple({0, 1, 2} - {axis})).mean() for axis in range(3)]
    return int(np.argmin(shares))


def _mark_slices(panel: Axes, rows: NDArray[np.intp]) -> None:
    """Draw white bars at both sides of a cut, next to the annotated slices."""
    sides = panel.get_xlim()
    segments = [[(side, row - 0.5), (side, row + 0.5)] for row in rows for side in sides]
    from matplotlib.collections import LineCollection

    panel.add_collection(LineCollection(segments, colors="white", linewidths=5, capstyle="butt"), autolim=False)
