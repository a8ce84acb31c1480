"""The report's charts: SVG drawn by Matplotlib whose colours and fonts are those of the page it stands in."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from nnunet_conres.evaluation.report.text import escape, is_number, letter, plain_number, shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Of different models in report.css; from then on they come again.
NUMBER_OF_COLOURS: Final = 7

# Stand for variables of the page's style sheet. No chart has these colours otherwise.
_INK: Final = "#010101"
_MUTED: Final = "#010201"
_GRID: Final = "#010301"
_STAND_INS: Final = {_INK: "var(--ink)", _MUTED: "var(--muted)", _GRID: "var(--grid)"}

# In points, which are the units of the drawing; the page scales it to the room there is.
_WIDTH: Final = 360
_ROW: Final = 62
_FOOT: Final = 44

# A quarter of so few values is no value in particular.
_SMALLEST_BOX: Final = 5

# Where the largest value is that many times the 90th percentile, an even scale would show it and nothing else.
_LONG_TAIL: Final = 6.0


@dataclass(frozen=True)
class Row:
    """What a chart shows of a model.

    Attributes:
        index: The model's place in the comparison; gives colour and letter.
        name: The model's name.
        values: A number per case, finite.
        note: Stands below the name.
        centre: Mean difference to the baseline.
        low: Lower end of its interval.
        high: Upper end.
    """

    index: int
    name: str
    values: Sequence[float]
    note: str = ""
    centre: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Line:
    """A curve over the epochs.

    Attributes:
        index: The model's place in the comparison.
        epochs: x.
        values: y; None where there is none.
        dashed: Whether to draw it dashed.
    """

    index: int
    epochs: Sequence[float]
    values: Sequence[float | None]
    dashed: bool = False


def colour_of(index: int) -> str:
    """The variable of the style sheet that holds a model's colour."""
    return f"var(--model-{index % NUMBER_OF_COLOURS})"


def distribution_chart(rows: Sequence[Row], *, axis: str, title: str) -> str:
    """Draw every model's values as points with a box.

    Args:
        rows: One per model.
        axis: What the values are, with unit.
        title: Read out instead of the picture.

    Returns:
        An svg element.
    """
    with _style():
        figure, axes = _figure(len(rows) * _ROW + _FOOT, bottom=_FOOT, top=2)
        for place, row in enumerate(rows):
            _write_head(axes, row, place)
            values = np.sort(np.asarray(row.values, float))
            _draw_points(axes, values, place, row.index)
            if len(values) >= _SMALLEST_BOX:
                _draw_box(axes, values, place, row.index)
            elif len(values):
                _draw_tick(axes, float(np.median(values)), place)
        _set_range(axes, np.concatenate([np.asarray(row.values, float) for row in rows]), axis)
        axes.set_ylim(len(rows), 0)
        return _svg(figure, title)


def difference_chart(rows: Sequence[Row], *, axis: str, better: str | None, title: str) -> str:
    """Draw every case's difference to the baseline as a point, with the median and the interval of the mean.

    Args:
        rows: One per model other than the baseline; `values` are the differences.
        axis: What differs, with unit.
        better: "higher" if positive differences are gains, "lower" if negative ones are, None if neither.
        title: Read out instead of the picture.

    Returns:
        An svg element.
    """
    with _style():
        figure, axes = _figure(len(rows) * _ROW + _FOOT, bottom=_FOOT, top=2)
        for place, row in enumerate(rows):
            _write_head(axes, row, place)
            # Not through the text.
            axes.plot([0, 0], [place + 0.5, place + 1], color=_INK, linewidth=1.2, clip_on=False)
            values = np.sort(np.asarray(row.values, float))
            _draw_points(axes, values, place, row.index)
            if len(values):
                _draw_tick(axes, float(np.median(values)), place)
            if row.centre is not None and is_number(row.centre):
                if row.low is not None and row.high is not None and is_number(row.low) and is_number(row.high):
                    line = axes.plot([row.low, row.high], [place + 0.94] * 2, color=_colour(row.index), linewidth=5)
                    line[0].set_clip_on(False)
                _draw_dots(axes, np.array([row.centre]), np.array([place + 0.94]), None, 6.0)
        ends = [value for row in rows for value in (row.low, row.high, row.centre) if is_number(value)]
        everything = np.concatenate([np.asarray(row.values, float) for row in rows] + [np.asarray(ends, float)])
        _set_range(axes, everything, axis, symmetric=True)
        if better in ("higher", "lower"):
            left, right = ("worse", "better") if better == "higher" else ("better", "worse")
            for x, text in ((0, f"\N{LEFTWARDS ARROW} {left}"), (1, f"{right} \N{RIGHTWARDS ARROW}")):
                axes.annotate(
                    text,
                    (x, 0),
                    xytext=(0, -_FOOT + 9),
                    xycoords="axes fraction",
                    textcoords="offset points",
                    ha="right" if x else "left",
                    color=_INK,
                )
        axes.set_ylim(len(rows) + 0.08, 0)
        return _svg(figure, title)


def curve_chart(lines: Sequence[Line], *, axis: str, title: str) -> str:
    """Draw curves over the epochs, those of a model in its colour.

    Args:
        lines: The curves.
        axis: What the values are.
        title: Read out instead of the picture.

    Returns:
        An svg element.
    """
    with _style():
        figure, axes = _figure(236, bottom=36, top=24, left=44, right=18)
        ends: dict[int, tuple[float, float]] = {}
        solid = [line.index for line in lines if not line.dashed]
        # Of several folds each has a line; thinner ones are told apart.
        width = 1.1 if len(solid) > len(set(solid)) else 1.8
        for line in lines:
            y = np.array([np.nan if not is_number(value) else value for value in line.values], float)
            x = np.asarray(line.epochs, float)[: len(y)]
            y = y[: len(x)]
            drawn = axes.plot(x, y, color=_colour(line.index), linewidth=width)[0]
            drawn.set_clip_on(False)
            drawn.set_dash_capstyle("butt")
            if line.dashed:
                drawn.set_linestyle((0, (4, 2.5)))
            known = np.flatnonzero(np.isfinite(y))
            if known.size == 1:
                _draw_dots(axes, x[known], y[known], line.index, 5.0)
            if known.size and not line.dashed:
                ends.setdefault(line.index, (float(x[known[-1]]), float(y[known[-1]])))
        _write_letters(axes, ends)
        axes.grid(axis="both", color=_GRID, linewidth=0.8)
        from matplotlib.ticker import MaxNLocator

        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.tick_params(colors=_MUTED)
        axes.set_xlabel("epoch", color=_MUTED, fontsize=10, labelpad=3)
        axes.set_title(axis, color=_INK, fontsize=11, fontweight="bold", loc="left", pad=6) if axis else None
        return _svg(figure, title)


def _style() -> Any:
    from matplotlib import rc_context

    # Text stays text, and none of it is taken for mathematics, since names may have dollar signs.
    return rc_context({"svg.fonttype": "none", "text.parse_math": False, "font.size": 10, "path.simplify": False})


def _figure(height: float, *, bottom: float, top: float, left: float = 8, right: float = 8) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH / 72, height / 72))
    figure.patch.set_visible(False)
    axes = figure.add_axes((left / _WIDTH, bottom / height, 1 - (left + right) / _WIDTH, 1 - (bottom + top) / height))
    axes.patch.set_visible(False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_axisbelow(True)
    return figure, axes


def _colour(index: int) -> str:
    """Stands for a model's colour."""
    return f"#02{index % NUMBER_OF_COLOURS:02x}02"


def _write_head(axes: Axes, row: Row, place: int) -> None:
    from matplotlib.transforms import blended_transform_factory

    where = blended_transform_factory(axes.transAxes, axes.transData)
    axes.text(0, place + 0.19, letter(row.index), transform=where, va="center", color=_INK, fontweight="bold")
    indent = (8 + 8 * len(letter(row.index))) / _WIDTH
    axes.text(indent, place + 0.19, shortened(row.name, 46), transform=where, va="center", color=_INK)
    axes.text(indent, place + 0.40, row.note, transform=where, va="center", color=_MUTED, fontsize=9)


def _draw_points(axes: Axes, values: NDArray[np.float64], place: int, index: int) -> None:
    # The golden ratio spreads neighbours apart, and always in the same way.
    spread = (np.arange(len(values)) * 0.6180339887 % 1 - 0.5) * 0.26
    if len(values) == 1:
        spread[:] = 0
    _draw_dots(axes, values, place + 0.72 + spread, index, 4.2 if len(values) <= 200 else 3.0)


def _draw_dots(axes: Axes, x: NDArray[Any], y: NDArray[Any], index: int | None, size: float) -> None:
    """Points as round ends of lines without a length: one path, not an element each. In ink if there is no index."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    if not len(x):
        return
    vertices = np.repeat(np.column_stack([x, y]), 2, axis=0)
    path = Path(vertices, np.tile([Path.MOVETO, Path.LINETO], len(x)))
    colour, opacity = (_INK, 1.0) if index is None else (_colour(index), 0.6)
    patch = PathPatch(path, facecolor="none", edgecolor=colour, linewidth=size, capstyle="round", alpha=opacity)
    patch.set_clip_on(False)
    patch.set_zorder(3)
    axes.add_patch(patch)


def _draw_box(axes: Axes, values: NDArray[np.float64], place: int, index: int) -> None:
    from matplotlib.patches import Rectangle

    low, middle, high = (float(value) for value in np.percentile(values, (25, 50, 75)))
    reach = 1.5 * (high - low)
    ends = float(values[values >= low - reach].min()), float(values[values <= high + reach].max())
    y, half = place + 0.72, 0.17
    box = Rectangle((low, y - half), high - low, 2 * half, facecolor=_colour(index), edgecolor="none", alpha=0.22)
    edge = Rectangle((low, y - half), high - low, 2 * half, facecolor="none", edgecolor=_INK, linewidth=1)
    for patch in (box, edge):
        patch.set_clip_on(False)
        axes.add_patch(patch)
    for start, end in ((ends[0], low), (high, ends[1])):
        axes.plot([start, end], [y, y], color=_INK, linewidth=1, clip_on=False)
    axes.plot([middle] * 2, [y - half, y + half], color=_INK, linewidth=2.4, clip_on=False, solid_capstyle="butt")


def _draw_tick(axes: Axes, x: float, place: int) -> None:
    y = place + 0.72
    axes.plot([x, x], [y - 0.17, y + 0.17], color=_INK, linewidth=2.4, clip_on=False, solid_capstyle="butt")


def _set_range(axes: Axes, values: NDArray[np.float64], label: str, *, symmetric: bool = False) -> None:
    from matplotlib.ticker import MaxNLocator, NullLocator, ScalarFormatter, SymmetricalLogLocator

    values = values[np.isfinite(values)]
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 1.0)
    sizes = np.abs(values)
    usual = float(np.percentile(sizes, 90)) if values.size else 0.0
    if values.size >= _SMALLEST_BOX and usual > 0 and sizes.max() > _LONG_TAIL * usual and sizes.max() > 2:
        threshold = 10.0 ** np.floor(np.log10(usual))
        axes.set_xscale("symlog", linthresh=threshold, linscale=1.0)
        axes.xaxis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=threshold))
        formatter = ScalarFormatter()
        axes.xaxis.set_major_formatter(formatter)
        label += f", logarithmic beyond {threshold:g}"
        if symmetric:
            high = 1.3 * max(high, -low)
            low = -high
        else:
            low, high = min(1.3 * low, 0.0) if low < 0 else 0.0, 1.3 * high
    else:
        if symmetric:
            high = max(high, -low, 1e-9)
            low = -high
        room = 0.05 * (high - low) or max(0.05 * abs(high), 0.05)
        low, high = low - room, high + room
        axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(low, high)
    axes.grid(axis="x", color=_GRID, linewidth=0.8)
    axes.yaxis.set_major_locator(NullLocator())
    axes.tick_params(axis="x", colors=_MUTED, labelsize=9)
    axes.set_xlabel(label, color=_MUTED, fontsize=10, labelpad=2)


def _write_letters(axes: Axes, ends: Mapping[int, tuple[float, float]]) -> None:
    """Letters of the models right of their curves' ends, pushed apart where they would cover each other."""
    if not ends:
        return
    low, high = axes.get_ylim()
    step = (high - low) / 13
    heights: list[float] = []
    order = sorted(ends, key=lambda index: ends[index][1])
    for index in order:
        heights.append(max(ends[index][1], heights[-1] + step if heights else low))
    ceiling = high
    for place in reversed(range(len(heights))):
        heights[place] = min(heights[place], ceiling)
        ceiling = heights[place] - step
    for index, height in zip(order, heights, strict=True):
        x = ends[index][0]
        axes.annotate(
            letter(index),
            (x, height),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            color=_colour(index),
            fontweight="bold",
            annotation_clip=False,
        )
    axes.set_ylim(low, high)


def _svg(figure: Figure, title: str) -> str:
    """The figure as an svg element that takes its colours, its font and its size from the page."""
    # Marks at the ticks would be definitions with names, of which a page may have only one each. Nor is any clipped.
    for axes in figure.axes:
        axes.tick_params(which="both", bottom=False, left=False, top=False, right=False)
        for line in (*axes.get_xgridlines(), *axes.get_ygridlines()):
            line.set_clip_on(False)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    size = re.search(r'viewBox="([^"]*)"', text)
    body = text[text.index(">", text.index("<svg")) + 1 : text.rindex("</svg>")]
    body = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>|<defs>\s*<style.*?</style>\s*</defs>", "", body, flags=re.S)
    body = re.sub(r'(<g) id="[^"]*"', r"\1", body)
    for stand_in, variable in _stand_ins().items():
        body = body.replace(stand_in, variable)
    # Of fonts only the weight and the size are the chart's. Matplotlib has written them in one property and in several.
    body = re.sub(r"font-family: [^;\"]*;? ?", "", body)
    body = re.sub(r"font: (?:(bold|\d+) )?([\d.]+px) '[^;\"]*", r"font-weight: \1; font-size: \2", body)
    body = body.replace("font-weight: ; ", "")
    body = re.sub(
        r'\b(?:d|x|y|transform|width|height)="[^"]*"',
        lambda attribute: re.sub(r"-?\d+\.\d{3,}", lambda found: f"{float(found[0]):.2f}", attribute[0]),
        body,
    )
    body = re.sub(r"\s*\n\s*", " ", body)
    view = size[1] if size else f"0 0 {_WIDTH} {_WIDTH}"
    return f'<svg class="chart" viewBox="{view}" role="img" aria-label="{escape(title)}">{body}</svg>'


def _stand_ins() -> dict[str, str]:
    return _STAND_INS | {_colour(index): colour_of(index) for index in range(NUMBER_OF_COLOURS)}


def summary_note(values: Sequence[float], decimals: int) -> str:
    """What stands below a model's name: median, quartiles and number of cases."""
    if not len(values):
        return "no values"
    low, middle, high = np.percentile(values, (25, 50, 75))
    texts = [plain_number(float(value), decimals) for value in (middle, low, high)]
    return f"median {texts[0]}, quartiles {texts[1]} to {texts[2]}, n = {len(values)}"
