"""Figures of a case's segmentation, its entropy, and the disagreement between the members that predicted it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nnunet_conres.colours import colours_of
from nnunet_conres.evaluation.figures import (
    LEGEND_COLUMNS,
    content_range,
    draw_outline,
    grey_window,
    slices_to_show,
    tint,
    write_legend,
    write_note,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PANEL = 2.6
_SIDE = 0.7
_COLOUR_MAP = "magma"


def uncertainty_figure(
    segmentation: NDArray[Any],
    entropy: NDArray[np.floating[Any]],
    disagreement: NDArray[np.floating[Any]] | None,
    *,
    regions: Mapping[str, Sequence[int]],
    image: NDArray[Any] | None = None,
    channel: str = "",
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
    title: str = "",
    subtitle: str = "",
) -> Figure:
    """Draw the slices with most labels: segmentation, entropy and disagreement, one below the other.

    Without any label, the slices with most uncertain voxels are drawn.

    Args:
        segmentation: Label map (z, y, x).
        entropy: 0 to 1, same shape.
        disagreement: 0 to 1, same shape; None if a single member predicted the case.
        regions: Label values of every label or region to outline, by name, the outermost first.
        image: Background image for the outlines of the segmentation, same shape. Without one, labels are filled.
        channel: Name of the image channel.
        spacing: Voxel size along (z, y, x) in mm.
        title: Shown on top.
        subtitle: Shown below the title.

    Returns:
        The figure; `savefig` writes it. It is not known to pyplot, so there is nothing to close.

    Raises:
        ValueError: The shapes do not match.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

    for name, volume in (("entropy", entropy), ("disagreement", disagreement), ("image", image)):
        if volume is not None and volume.shape != segmentation.shape:
            raise ValueError(f"The {name} has shape {volume.shape}; expected {segmentation.shape} like the labels.")
    unsure = (entropy > 0.1).astype(np.uint8)
    slices = slices_to_show(segmentation, regions) if segmentation.any() else slices_to_show(unsure, {"unsure": (1,)})
    shown = (segmentation > 0).astype(np.uint8) | unsure if image is None else image
    (first_row, last_row), (first_column, last_column) = content_range(shown[np.newaxis])
    height, width = (last_row - first_row) * spacing[1], (last_column - first_column) * spacing[2]
    panel_height = _PANEL * float(np.clip(height / width, 0.4, 2.0))
    maps = {"entropy": entropy} | ({} if disagreement is None else {"disagreement": disagreement})
    top, bottom = 0.75, 0.2 + 0.2 * -(-len(regions) // LEGEND_COLUMNS)
    size = (max(_PANEL * len(slices) + _SIDE, 6.0), panel_height * (1 + len(maps)) + top + bottom)
    figure = Figure(figsize=size, facecolor="black")
    axes = figure.subplots(1 + len(maps), len(slices), squeeze=False)
    right = 1 - _SIDE / size[0]
    figure.subplots_adjust(
        left=0, right=right, top=1 - top / size[1], bottom=bottom / size[1], wspace=0.01, hspace=0.01
    )
    colours = colours_of(regions)
    low, high = (0.0, 1.0) if image is None else grey_window(image)
    aspect = spacing[1] / spacing[2]
    for column, z in enumerate(slices):
        panel = axes[0, column]
        background = np.zeros(segmentation.shape[1:]) if image is None else image[z]
        panel.imshow(background, cmap="gray", vmin=low, vmax=high, aspect=aspect, interpolation="nearest")
        for name, values in regions.items():
            mask = np.isin(segmentation[z], values)
            if image is None:
                tint(panel, mask, colours[name], 0.85)
            # Inner and outer regions often share a border. Thinner inner outlines keep both visible.
            within = sum(set(other) < set(values) for other in regions.values())
            draw_outline(panel, mask, colours[name], 1.0 + 0.9 * min(within, 3), dashed=False)
        write_note(panel, f"{channel}, slice {z}" if channel else f"slice {z}")
        for row, (name, volume) in enumerate(maps.items(), 1):
            panel = axes[row, column]
            panel.imshow(volume[z], cmap=_COLOUR_MAP, vmin=0, vmax=1, aspect=aspect, interpolation="nearest")
            write_note(panel, name)
    for panel in axes.flat:
        panel.set_axis_off()
        panel.set_xlim(first_column - 0.5, last_column - 0.5)
        panel.set_ylim(last_row - 0.5, first_row - 0.5)
    bar_height = panel_height * len(maps) / size[1]
    bar = figure.add_axes(
        (right + 0.12 / size[0], bottom / size[1] + 0.1 * bar_height, 0.12 / size[0], 0.8 * bar_height)
    )
    mappable = ScalarMappable(cmap=_COLOUR_MAP)
    mappable.set_clim(0, 1)
    figure.colorbar(mappable, cax=bar)
    bar.tick_params(colors="white", labelsize=7)
    figure.text(0.5, 1 - 0.25 / size[1], title, ha="center", va="center", color="white", fontsize=11)
    figure.text(0.5, 1 - 0.53 / size[1], subtitle, ha="center", va="center", color="lightgrey", fontsize=9)
    write_legend(figure, colours)
    return figure
