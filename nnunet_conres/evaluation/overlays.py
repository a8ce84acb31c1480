"""Figures of a case's slices with outlines of the reference and the prediction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nnunet_conres.case_ids import unsafe_ids
from nnunet_conres.colours import colours_of
from nnunet_conres.errors import InputError
from nnunet_conres.evaluation.figures import (
    LEGEND_COLUMNS,
    Legend,
    channels_to_show,
    content_range,
    dice_text,
    draw_outline,
    grey_window,
    save_figure,
    slices_to_show,
    write_legend,
)
from nnunet_conres.folders import list_files, writing
from nnunet_conres.images.volumes import read_standing, read_standing_labels, reader_for

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


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
    """Draw the slices with most labels, one row per channel, with outlines of the labels.

    Reference outlines are solid, prediction outlines are dashed.

    Args:
        images: (C, z, y, x), any intensities. FLAIR and contrast-enhanced T1 are shown if the channel names identify
            them, otherwise the first channel.
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
        ValueError: The shapes do not match.
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
    legend_rows = -(-(len(regions) + 2) // LEGEND_COLUMNS)
    top, bottom = 0.4 if reference is None else 0.75, 0.2 + 0.2 * legend_rows
    figure_size = (panel_width * len(slices), panel_height * len(shown) + top + bottom)
    figure = Figure(figsize=(max(figure_size[0], 6.0), figure_size[1]), facecolor="black")
    axes = figure.subplots(len(shown), len(slices), squeeze=False)
    figure.subplots_adjust(
        left=0, right=1, top=1 - top / figure_size[1], bottom=bottom / figure_size[1], wspace=0.01, hspace=0.01
    )

    colours = colours_of(regions)
    for row, channel in enumerate(shown):
        low, high = grey_window(images[channel])
        for column, z in enumerate(slices):
            panel: Axes = axes[row, column]
            panel.imshow(
                images[channel, z], cmap="gray", vmin=low, vmax=high, aspect=spacing[1] / spacing[2], origin="upper"
            )
            panel.set_axis_off()
            for name, values in regions.items():
                # Inner and outer regions often share a border. Thinner inner outlines keep both visible.
                within = sum(set(other) < set(values) for other in regions.values())
                if reference is not None:
                    line_width = 1.6 + 0.8 * min(within, 3)
                    draw_outline(panel, np.isin(reference[z], values), colours[name], line_width, dashed=False)
                # Thin, so that a solid outline of the same colour stays visible below it.
                line_width = 1.3 if reference is None else 0.9
                draw_outline(panel, np.isin(prediction[z], values), colours[name], line_width, dashed=True)
            panel.set_xlim(left_column - 0.5, right_column - 0.5)
            panel.set_ylim(bottom_row - 0.5, top_row - 0.5)
            label = f"{channels[channel]}, " if channel < len(channels) else ""
            panel.text(0.02, 0.98, f"{label}slice {z}", transform=panel.transAxes, va="top", color="white", fontsize=8)
    _write_title(figure, title, prediction, regions, reference, top / figure_size[1])
    lines = [{"color": "white", "linewidth": 2.0, "label": "reference"}] if reference is not None else []
    lines.append({"color": "white", "linewidth": 0.9, "linestyle": (0, (4, 3)), "label": "prediction"})
    write_legend(figure, colours, *lines)
    return figure


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
        image_folder: Images with nnU-Net's names, CASE_0000 and so on.
        prediction_folder: Label maps named after the cases.
        output_folder: Receives CASE.png for every prediction; created if necessary.
        legend: Names and labels of the data set.
        reference_folder: Label maps named after the cases, if there are any.
        progress: Whether to show a progress bar on stderr.

    Returns:
        The files written.

    Raises:
        InputError: Files are missing, can't be read or do not match. Missing files are reported before anything is
            written, other errors after all valid cases are drawn.
    """
    from tqdm import tqdm

    ending = legend.file_ending
    jobs: list[tuple[str, list[Path], Path, Path | None]] = []
    errors: list[str] = []
    predictions = list_files(Path(prediction_folder), ending)
    errors += unsafe_ids((prediction.name[: -len(ending)] for prediction in predictions), prediction_folder)
    for prediction in predictions:
        case_id = prediction.name[: -len(ending)]
        images = [Path(image_folder) / f"{case_id}_{i:04d}{ending}" for i in range(len(legend.channels))]
        reference = None if reference_folder is None else Path(reference_folder) / prediction.name
        needed = images if reference is None else [*images, reference]
        errors += [f"{path} does not exist; {prediction} needs it." for path in needed if not path.is_file()]
        jobs.append((case_id, images, prediction, reference))
    if not jobs:
        errors.append(f"{prediction_folder} has no file ending in {ending}; expected predictions of nnU-Net.")
    if errors:
        raise InputError(errors)

    content = {"file_ending": ending, "overwrite_image_reader_writer": legend.reader}
    reader = reader_for(content, [images[0] for _, images, _, _ in jobs])
    output = Path(output_folder)
    with writing(output):
        written = []
        for case_id, images, prediction, reference in tqdm(jobs, desc="Drawing", unit="case", disable=not progress):
            try:
                voxels = [read_standing(path, reader) for path in images]
                predicted = read_standing_labels(prediction, reader)
                truth = None if reference is None else read_standing_labels(reference, reader)
            except InputError as error:
                errors += error.errors
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
                errors.append(f"{prediction}, its images and its reference do not fit each other: {error}")
                continue
            written.append(save_figure(figure, output / f"{case_id}.png", dpi=150))
        if errors:
            shown = "\n".join(f"  - {message}" for message in errors)
            raise InputError(
                f"{len(written)} of {len(jobs)} cases were drawn, in {output}; the others can't be:\n{shown}"
            )
        return written


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
    text = f"Dice: {dice_text(prediction, reference, regions)}"
    figure.text(0.5, 1 - 0.7 * height, text, ha="center", va="center", color="lightgrey", fontsize=9)
