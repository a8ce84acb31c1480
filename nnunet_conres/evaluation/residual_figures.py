"""Figures of slices next to their inter-slice residual, with the mean residual of every slice as a curve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from nnunet_conres.colours import COLOURS, colours_of
from nnunet_conres.evaluation.figures import (
    View,
    channels_to_show,
    content_box,
    draw_outline,
    show_plane,
    slices_to_show,
    tint,
    value_range,
    write_note,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PANEL: Final = 2.4  # inches
_CURVE: Final = 1.6
_SLICES: Final = 3

# Colour map of residual and attention maps: the lowest value is black.
_MAP_COLOURS: Final = "magma"


@dataclass(frozen=True)
class Slicing:
    """How slices are taken and shown.

    Attributes:
        axis: Axis of the slices.
        spacing: Voxel size along the three axes in mm.
        reverse: For each axis, whether to show it reversed.
        title: Title of the figure.
    """

    axis: int = 0
    spacing: Sequence[float] = (1.0, 1.0, 1.0)
    reverse: Sequence[bool] = (True, False, False)
    title: str = ""


_ALONG_Z: Final = Slicing()


@dataclass(frozen=True)
class Column:
    """Content of one column of the figure, which shows one slice per row.

    Attributes:
        title: Title above the column.
        volume: Volume with three axes, drawn with the colour map.
        limits: Values at both ends of the colour map.
        colour_map: Name of a Matplotlib colour map.
        tinted: Masks drawn as a transparent overlay, by label or region.
        outlined: Masks drawn as solid outlines, by label or region.
        dashed: Masks drawn as dashed outlines, by label or region.
        offset: -1 to show the previous slice.
    """

    title: str
    volume: NDArray[Any]
    limits: tuple[float, float]
    colour_map: str = "gray"
    tinted: Mapping[str, NDArray[np.bool_]] = field(default_factory=dict)
    outlined: Mapping[str, NDArray[np.bool_]] = field(default_factory=dict)
    dashed: Mapping[str, NDArray[np.bool_]] = field(default_factory=dict)
    offset: int = 0


@dataclass(frozen=True)
class Curve:
    """The mean residual of every slice, as a curve.

    Attributes:
        name: Name in the legend; empty for no entry.
        values: One per slice.
        colour: Colour of the line.
        style: Matplotlib's line style.
    """

    name: str
    values: Sequence[float] | NDArray[np.float64]
    colour: str
    style: str = "-"


def image_residual_figure(
    image: NDArray[Any],
    residual: NDArray[Any],
    means: Sequence[float],
    slicing: Slicing = _ALONG_Z,
    *,
    unit: str = "standard deviations",
) -> Figure:
    """Draw slices of an image, the previous slices, and the residual between them.

    Args:
        image: Any intensities, axes z, y, x.
        residual: Residual, same shape.
        means: Mean residual of every slice.
        slicing: How slices are taken and shown.
        unit: Unit of the residual.

    Returns:
        The figure; `savefig` writes it. It is not known to pyplot, so there is nothing to close.
    """
    limits = content_box(image)
    first, last = max(1, limits[slicing.axis][0]), limits[slicing.axis][1] - 1
    slices = sorted({max(1, round(first + share * (last - first))) for share in (0.3, 0.5, 0.7)})
    shown = value_range(image[image != image.flat[0]])
    high = _high_end(residual)
    columns = [
        Column("slice before", image, shown, offset=-1),
        Column("slice", image, shown),
        Column(f"residual, 0 to {high:.3g} {unit}", residual, (0.0, high), _MAP_COLOURS),
    ]
    return draw(
        columns,
        slices,
        [Curve("", means, COLOURS[0])],
        slicing,
        limits=limits,
        unit=unit,
    )


def label_residual_figure(
    labels: NDArray[Any],
    residuals: Mapping[str, NDArray[np.bool_]],
    means: Mapping[str, Sequence[float]],
    slicing: Slicing = _ALONG_Z,
    *,
    regions: Mapping[str, Sequence[int]],
) -> Figure:
    """Draw slices of a label map, the previous slices, and the residual of every label or region.

    Args:
        labels: Label map, axes z, y, x.
        residuals: Residual masks of the same shape, by name.
        means: Mean residual of every slice, by name.
        regions: Label values by name.
        slicing: How slices are taken and shown.

    Returns:
        The figure; `savefig` writes it. It is not known to pyplot, so there is nothing to close.
    """
    masks = {name: np.isin(labels, values) for name, values in regions.items()}
    nothing = np.zeros(labels.shape, np.uint8)
    columns = [
        Column("slice before", nothing, (0, 1), tinted=masks, offset=-1),
        Column("slice", nothing, (0, 1), tinted=masks),
        Column("residual", nothing, (0, 1), tinted=residuals),
    ]
    return draw(
        columns,
        slices_of(residuals, slicing.axis),
        [Curve(name, means[name], colour) for name, colour in colours_of(regions).items()],
        slicing,
        limits=content_box(np.logical_or.reduce(list(masks.values()))),
        unit="share of voxels",
        names=tuple(regions),
    )


def predicted_residual_figure(
    images: Sequence[NDArray[Any]],
    prediction: NDArray[Any],
    predicted: Mapping[str, NDArray[np.float32]],
    attention: NDArray[np.float32] | None,
    of_prediction: Mapping[str, NDArray[np.bool_]],
    slicing: Slicing = _ALONG_Z,
    *,
    regions: Mapping[str, Sequence[int]],
    reference: NDArray[Any] | None = None,
    of_reference: Mapping[str, NDArray[np.bool_]] | None = None,
    channels: Sequence[str] = (),
) -> Figure:
    """Draw a network's predicted residual next to the residuals of its segmentation and of the reference, if known.

    Args:
        images: One per channel, axes z, y, x. One of them is shown, with the outlines of the labels.
        prediction: Predicted label map, same shape.
        predicted: Predicted residuals, 0 to 1, by name. The figure shows their maximum at every voxel.
        attention: Attention map, 1 to 2; None if the network has no attention.
        of_prediction: Residual of the predicted labels, by name.
        regions: Label values by name.
        reference: Reference label map, if there is one.
        of_reference: Residual of the reference labels, by name.
        channels: Names of the channels.
        slicing: How slices are taken and shown.

    Returns:
        The figure; `savefig` writes it. It is not known to pyplot, so there is nothing to close.
    """
    image = images[channels_to_show(channels, len(images))[0]]
    predicted_masks = {name: np.isin(prediction, values) for name, values in regions.items()}
    true_masks = {} if reference is None else {n: np.isin(reference, values) for n, values in regions.items()}
    strongest = np.maximum.reduce(list(predicted.values()))
    nothing = np.zeros(image.shape, np.uint8)
    columns = [
        Column("image", image, value_range(image[image != image.flat[0]]), outlined=true_masks, dashed=predicted_masks)
    ]
    if of_reference:
        columns.append(Column("residual of the reference", nothing, (0, 1), tinted=of_reference))
    columns += [
        Column("residual of the prediction", nothing, (0, 1), tinted=of_prediction),
        Column("predicted residual, 0 to 1", strongest, (0.0, 1.0), _MAP_COLOURS),
    ]
    if attention is not None:
        low, high = value_range(attention[attention != 1])
        columns.append(Column(f"attention, {low:.2f} to {high:.2f}", attention, (low, high), _MAP_COLOURS))
    known = of_reference or of_prediction
    curves = [Curve("predicted residual", mean_per_slice(strongest, slicing.axis), "white")]
    for name, residuals, style in (("prediction", of_prediction, "-"), ("reference", of_reference or {}, "--")):
        if residuals:
            anywhere = np.logical_or.reduce([*residuals.values()])
            curves.append(Curve(f"of the {name}", mean_per_slice(anywhere, slicing.axis), "grey", style))
    curves += [Curve(name, [], colour) for name, colour in colours_of(regions).items()]
    return draw(
        columns,
        slices_of(known, slicing.axis),
        curves,
        slicing,
        limits=content_box(image),
        unit="any region",
        names=tuple(regions),
    )


def slices_of(residuals: Mapping[str, NDArray[np.bool_]], axis: int) -> list[int]:
    """Return the slices with the largest residual, spaced apart; never the first slice, which has no residual."""
    total = np.logical_or.reduce(list(residuals.values())).astype(np.uint8)
    slices = slices_to_show(np.moveaxis(total, axis, 0), {"residual": (1,)}, number=_SLICES)
    return [max(1, index) for index in slices]


def draw(
    columns: Sequence[Column],
    slices: Sequence[int],
    curves: Sequence[Curve],
    slicing: Slicing,
    *,
    limits: Sequence[tuple[int, int]],
    unit: str,
    names: Sequence[str] = (),
) -> Figure:
    """Draw one row per slice, with the given columns, and the curves over all slices below.

    Args:
        columns: From left to right.
        slices: Slice indices along the axis, from top to bottom.
        curves: Curves below the slices.
        limits: Indices (first, one past the last) of the part to show, along each axis.
        slicing: How slices are taken and shown.
        unit: Unit of the curves.
        names: Labels or regions, the outermost first, which determine the colours.

    Returns:
        The figure.
    """
    from matplotlib.figure import Figure

    rows_axis, columns_axis = (other for other in range(3) if other != slicing.axis)
    height, width = ((limits[a][1] - limits[a][0]) * slicing.spacing[a] for a in (rows_axis, columns_axis))
    panel_height = _PANEL * float(np.clip(height / width, 0.3, 1.3))
    top = 0.55
    legend_columns = len(columns) + 1
    legend_rows = -(-sum(bool(curve.name) for curve in curves) // legend_columns)
    bottom = 0.5 + 0.22 * legend_rows
    size = (_PANEL * len(columns), top + panel_height * len(slices) + 0.3 + _CURVE + bottom)
    figure = Figure(figsize=size, facecolor="black")
    panels = figure.add_gridspec(
        len(slices),
        len(columns),
        left=0.01,
        right=0.99,
        top=1 - top / size[1],
        bottom=(bottom + _CURVE + 0.3) / size[1],
        wspace=0.02,
        hspace=0.03,
    )
    colours = colours_of(names)
    for row, index in enumerate(slices):
        for number, column in enumerate(columns):
            panel = figure.add_subplot(panels[row, number])
            view = View(slicing.axis, index + column.offset, rows_axis, columns_axis)
            show_plane(
                panel,
                view,
                column.volume,
                values=column.limits,
                limits=limits,
                spacing=slicing.spacing,
                reverse=slicing.reverse,
                colour_map=column.colour_map,
            )
            _draw_masks(panel, column, view, colours)
            if row == 0:
                panel.set_title(column.title, color="white", fontsize=8, pad=3)
            write_note(panel, str(view.index))
    figure.text(0.5, 1 - 0.17 / size[1], slicing.title, ha="center", va="center", color="white", fontsize=10)
    plot = figure.add_axes((0.85 / size[0], bottom / size[1], 1 - 1.0 / size[0], _CURVE / size[1]))
    _draw_curves(plot, curves, slices, slicing.axis, unit)
    if legend_rows:
        figure.legend(
            *plot.get_legend_handles_labels(),
            loc="lower center",
            ncols=legend_columns,
            frameon=False,
            labelcolor="white",
            fontsize=8,
        )
    return figure


def _draw_masks(panel: Axes, column: Column, view: View, colours: Mapping[str, str]) -> None:
    for name, mask in column.tinted.items():
        tint(panel, view.of(mask), colours[name], 0.85)
    for name, mask in column.outlined.items():
        draw_outline(panel, view.of(mask), colours[name], 1.4, dashed=False)
    for name, mask in column.dashed.items():
        draw_outline(panel, view.of(mask), colours[name], 0.9, dashed=True)


def _draw_curves(plot: Axes, curves: Sequence[Curve], slices: Sequence[int], axis: int, unit: str) -> None:
    plot.set_facecolor("black")
    for index in slices:
        plot.axvline(index, color="#555555", linewidth=0.8)
    for curve in curves:
        label = curve.name or "_nolegend_"
        plot.plot(range(len(curve.values)), curve.values, curve.style, color=curve.colour, linewidth=1.2, label=label)
    plot.set_xlabel(f"slice along axis {axis}", color="white", fontsize=8)
    plot.set_ylabel(f"mean residual\n({unit})", color="white", fontsize=7)
    plot.set_ylim(bottom=0)
    plot.margins(x=0.01)
    plot.tick_params(colors="white", labelsize=7)
    for side, spine in plot.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color("white")


def mean_per_slice(residual: NDArray[Any], axis: int) -> tuple[float, ...]:
    """Return the mean over all voxels of each slice."""
    means = residual.mean(axis=tuple({0, 1, 2} - {axis}), dtype=np.float64)
    return tuple(float(value) for value in means)


def _high_end(residual: NDArray[Any]) -> float:
    """Return the value to show brightest: the 98th percentile of the positive values."""
    positive = residual[residual > 0]
    return float(np.percentile(positive, 98)) if positive.size else 1.0
