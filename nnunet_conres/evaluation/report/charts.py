"""The report's charts as SVG, in the colours and fonts of the surrounding page."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from nnunet_conres.evaluation.report.text import escape, is_number, letter, plain_number, shortened

# Number of model colours in report.css. Further models reuse them from the start.
NUMBER_OF_COLOURS: Final = 7

# In units of the drawing, which the page scales to the available space.
_WIDTH: Final = 360
_MARGIN: Final = 8
_TOP: Final = 2
_ROW: Final = 62
_FOOT: Final = 44

# Vertical positions within a row: the head's two lines, the centre of the points, and the mean below them.
_NAME, _NOTE, _POINTS, _MEAN = 12, 25, 45, 58
_HALF_BOX: Final = 10.5

# Fewest values with a box: quartiles of fewer values are meaningless.
_SMALLEST_BOX: Final = 5

# If the largest value is more than this many times the 90th percentile, it would dominate a linear scale.
_LONG_TAIL: Final = 6.0


@dataclass(frozen=True)
class Row:
    """A model's row in a chart.

    Attributes:
        index: The model's position in the comparison, which determines its colour and letter.
        name: The model's name.
        values: One finite number per case.
        note: Text below the name.
        centre: Mean difference to the baseline.
        low: Lower end of the interval of the mean difference.
        high: Upper end of this interval.
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
    """A curve, such as a loss over the epochs.

    Attributes:
        index: The model's position in the comparison.
        epochs: x values: epochs, or mean probabilities in a reliability chart.
        values: y values; None if missing.
        dashed: Whether to draw the curve dashed.
    """

    index: int
    epochs: Sequence[float]
    values: Sequence[float | None]
    dashed: bool = False


def colour_of(index: int) -> str:
    """Return the style sheet variable of a model's colour."""
    return f"var(--model-{index % NUMBER_OF_COLOURS})"


def distribution_chart(rows: Sequence[Row], *, axis: str, title: str) -> str:
    """Draw every model's values as points with a box.

    Args:
        rows: One per model.
        axis: Axis label, with unit.
        title: Alternative text for screen readers.

    Returns:
        An svg element.
    """
    scale = _scale([value for row in rows for value in row.values])
    parts = _frame(scale, len(rows), axis)
    for place, row in enumerate(rows):
        top = _TOP + place * _ROW
        parts += _head(row, top)
        values = np.sort(np.asarray(row.values, float))
        parts.append(_points(scale(values), top, row.index))
        if len(values) >= _SMALLEST_BOX:
            parts += _box(values, scale, top, row.index)
        elif len(values):
            parts.append(_median(float(np.median(values)), scale, top))
    return _svg(parts, _TOP + len(rows) * _ROW + _FOOT, title)


def difference_chart(rows: Sequence[Row], *, axis: str, better: str | None, title: str) -> str:
    """Draw every case's difference to the baseline as a point, with the median and the interval of the mean.

    Args:
        rows: One per model other than the baseline; `values` are the differences.
        axis: Axis label, with unit.
        better: "higher" if positive differences are gains, "lower" if negative ones are, None if neither.
        title: Alternative text for screen readers.

    Returns:
        An svg element.
    """
    ends = [value for row in rows for value in (row.low, row.high, row.centre) if value is not None]
    scale = _scale([*(value for row in rows for value in row.values), *ends], symmetric=True)
    bottom = _TOP + len(rows) * _ROW
    parts = _frame(scale, len(rows), axis)
    zero = float(scale(0.0))
    for place, row in enumerate(rows):
        top = _TOP + place * _ROW
        parts += _head(row, top)
        # Starts at half height, so that it does not cross the text.
        parts.append(_stroke(f"M{zero:.1f} {top + _ROW / 2:.1f}V{top + _ROW:.1f}", 1.2))
        values = np.sort(np.asarray(row.values, float))
        parts.append(_points(scale(values), top, row.index))
        if len(values):
            parts.append(_median(float(np.median(values)), scale, top))
        if row.centre is not None and is_number(row.centre):
            y = top + _MEAN
            if row.low is not None and row.high is not None and is_number(row.low) and is_number(row.high):
                low, high = scale(np.array([row.low, row.high]))
                parts.append(_stroke(f"M{low:.1f} {y}H{high:.1f}", 5, colour_of(row.index)))
            parts.append(_dots(np.array([float(scale(row.centre))]), np.array([float(y)]), 6))
    if better in ("higher", "lower"):
        left, right = ("worse", "better") if better == "higher" else ("better", "worse")
        parts.append(_text(_MARGIN, bottom + _FOOT - 9, f"\N{LEFTWARDS ARROW} {left}"))
        parts.append(_text(_WIDTH - _MARGIN, bottom + _FOOT - 9, f"{right} \N{RIGHTWARDS ARROW}", anchor="end"))
    return _svg(parts, bottom + _FOOT, title)


def curve_chart(lines: Sequence[Line], *, axis: str, title: str) -> str:
    """Draw curves over the epochs, each in the colour of its model.

    Args:
        lines: The curves.
        axis: Label of the y axis.
        title: Alternative text for screen readers.

    Returns:
        An svg element.
    """
    left, right, top, bottom = 44, _WIDTH - 18, 24, 200
    drawn: list[tuple[NDArray[np.float64], NDArray[np.float64]]] = []
    for line in lines:
        values = np.array(line.values, float)  # NaN for None
        epochs = np.asarray(line.epochs, float)[: len(values)]
        drawn.append((epochs, values[: len(epochs)]))
    horizontal = _even([x for x, _ in drawn], left, right)
    vertical = _even([y for _, y in drawn], bottom, top)
    parts = [_text(left, 12, axis, "title")] if axis else []
    for epoch in horizontal.ticks(6, whole=True):
        at = float(horizontal(epoch))
        parts.append(_stroke(f"M{at:.1f} {top}V{bottom}", 0.8, "var(--grid)"))
        parts.append(_text(at, bottom + 11, f"{epoch:.0f}", "muted", "middle"))
    for value, text in _labelled(vertical.ticks(6)):
        at = float(vertical(value))
        parts.append(_stroke(f"M{left} {at:.1f}H{right}", 0.8, "var(--grid)"))
        parts.append(_text(left - 4, at, text, "muted", "end"))
    parts.append(_text((left + right) / 2, bottom + 27, "epoch", "muted", "middle"))

    solid = [line.index for line in lines if not line.dashed]
    # A model with several folds has several lines; thin lines are easier to distinguish.
    width = 1.1 if len(solid) > len(set(solid)) else 1.8
    ends: dict[int, tuple[float, float]] = {}
    for line, (x, y) in zip(lines, drawn, strict=True):
        known = np.flatnonzero(np.isfinite(y))
        if not known.size:
            continue
        across, down = horizontal(x), vertical(y)
        if known.size == 1:
            parts.append(_dots(across[known], down[known], 5, colour_of(line.index), 0.6))
        # Start a new part of the path after a gap.
        starts = np.diff(known, prepend=-2) > 1
        points = zip(starts, across[known].tolist(), down[known].tolist(), strict=True)
        path = "".join(f"{'M' if start else 'L'}{a:.1f} {b:.1f}" for start, a, b in points)
        parts.append(_stroke(path, width, colour_of(line.index), dashed=line.dashed))
        if not line.dashed:
            ends.setdefault(line.index, (float(across[known[-1]]), float(down[known[-1]])))
    for index, end, height in _apart(ends, top, bottom):
        style = f"fill: {colour_of(index)}; font-weight: bold"
        parts.append(_text(end + 4, height, letter(index), style=style))
    return _svg(parts, 236, title)


def reliability_chart(lines: Sequence[Line], *, title: str) -> str:
    """Draw observed frequency over predicted probability, and the diagonal of perfect calibration.

    Args:
        lines: The models' curves. `epochs` are the mean probabilities of the bins, `values` the observed frequencies,
            both 0 to 1.
        title: Alternative text for screen readers.

    Returns:
        An svg element.
    """
    left, right, top, bottom = 44, _WIDTH - 18, 8, 292
    horizontal, vertical = _Scale(0, 1, left, right), _Scale(0, 1, bottom, top)
    parts = []
    for value, text in _labelled([place / 5 for place in range(6)]):
        column, row = float(horizontal(value)), float(vertical(value))
        parts.append(_stroke(f"M{column:.1f} {top}V{bottom}M{left} {row:.1f}H{right}", 0.8, "var(--grid)"))
        parts.append(_text(column, bottom + 11, text, "muted", "middle"))
        parts.append(_text(left - 4, row, text, "muted", "end"))
    parts.append(_stroke(f"M{left} {bottom}L{right} {top}", 1, "var(--edge)", dashed=True))
    parts.append(_text((left + right) / 2, bottom + 27, "predicted probability", "muted", "middle"))
    turned = f'transform="rotate(-90 10 {(top + bottom) / 2:.0f})"'
    parts.append(f"<g {turned}>{_text(10, (top + bottom) / 2, 'observed frequency', 'muted', 'middle')}</g>")
    ends: dict[int, tuple[float, float]] = {}
    for line in lines:
        x, y = (np.array(values, float) for values in (line.epochs, line.values))  # NaN for None
        known = np.isfinite(x) & np.isfinite(y)
        if not known.any():
            continue
        across, down = horizontal(x[known]), vertical(y[known])
        path = "".join(f"{'L' if n else 'M'}{a:.1f} {b:.1f}" for n, (a, b) in enumerate(zip(across, down, strict=True)))
        parts.append(_stroke(path, 1.6, colour_of(line.index), dashed=line.dashed))
        parts.append(_dots(across, down, 4.2, colour_of(line.index)))
        ends[line.index] = (float(across[-1]), float(down[-1]))
    for index, end, height in _apart(ends, top, bottom):
        parts.append(_text(end + 5, height, letter(index), style=f"fill: {colour_of(index)}; font-weight: bold"))
    return _svg(parts, bottom + 36, title)


def summary_note(values: Sequence[float], decimals: int) -> str:
    """Return the note below a model's name: median, quartiles and number of cases."""
    if not len(values):
        return "no values"
    low, middle, high = np.percentile(values, (25, 50, 75))
    texts = [plain_number(float(value), decimals) for value in (middle, low, high)]
    return f"median {texts[0]}, quartiles {texts[1]} to {texts[2]}, n = {len(values)}"


# --- scales -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Scale:
    """Maps values to positions along an axis.

    Attributes:
        low: Value at the start.
        high: Value at the end.
        start: Position of the start, in units of the drawing.
        end: Position of the end, in units of the drawing.
        threshold: Absolute value up to which the scale is linear, and beyond which it is logarithmic; None for a linear
            scale.
    """

    low: float
    high: float
    start: float
    end: float
    threshold: float | None = None

    def __call__(self, values: Any) -> NDArray[np.float64]:
        low, high = self._even(np.array([self.low, self.high]))
        found: NDArray[np.float64] = self.start + (self._even(values) - low) / (high - low) * (self.end - self.start)
        return found

    def _even(self, values: Any) -> NDArray[np.float64]:
        values = np.asarray(values, float)
        if self.threshold is None:
            return values
        sizes = np.abs(values) / self.threshold
        return np.sign(values) * np.where(sizes <= 1, sizes, 1 + np.log10(np.maximum(sizes, 1)))

    def ticks(self, most: int, *, whole: bool = False) -> list[float]:
        """Return tick values within the range.

        Args:
            most: Maximum number of steps on a linear scale; on a logarithmic one, of powers of ten per sign.
            whole: Whether ticks have to be integers; ignored on a logarithmic scale.
        """
        if self.threshold is not None:
            first, last = round(math.log10(self.threshold)), math.floor(math.log10(max(self.high, -self.low)))
            powers = [10.0**power for power in range(first, last + 1, -(-(last - first + 1) // most))]
            values = [*(-power for power in reversed(powers)), 0.0, *powers]
            return [value for value in values if self.low <= value <= self.high]
        magnitude = 10.0 ** math.floor(math.log10((self.high - self.low) / most))
        steps = [factor * (max(1.0, magnitude) if whole else magnitude) for factor in (1, 2, 2.5, 5, 10)]
        fits = [step for step in steps if (self.high - self.low) / step <= most and (step % 1 == 0 or not whole)]
        step = fits[0]
        return [number * step for number in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]


def _scale(given: Sequence[float], *, symmetric: bool = False) -> _Scale:
    """Return a horizontal axis that shows all values."""
    values = np.asarray(given, float)
    values = values[np.isfinite(values)]
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 1.0)
    sizes = np.abs(values)
    usual = float(np.percentile(sizes, 90)) if values.size else 0.0
    threshold = None
    if values.size >= _SMALLEST_BOX and usual > 0 and sizes.max() > _LONG_TAIL * usual and sizes.max() > 2:
        threshold = 10.0 ** math.floor(math.log10(usual))
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
    return _Scale(low, high, _MARGIN, _WIDTH - _MARGIN, threshold)


def _even(values: Sequence[NDArray[np.float64]], start: float, end: float) -> _Scale:
    """Return an axis for curves."""
    known = np.concatenate([of[np.isfinite(of)] for of in values]) if values else np.empty(0)
    low, high = (float(known.min()), float(known.max())) if known.size else (0.0, 1.0)
    room = 0.05 * (high - low) or max(0.05 * abs(high), 0.05)
    return _Scale(low - room, high + room, start, end)


def _labelled(ticks: Sequence[float]) -> list[tuple[float, str]]:
    """Return tick values with their labels, which have as many decimals as the values need."""
    decimals = next(
        (n for n in range(7) if all(abs(tick - round(tick, n)) <= 1e-9 + 1e-6 * abs(tick) for tick in ticks)), None
    )
    texts = [f"{tick:g}" if decimals is None else plain_number(tick, decimals) for tick in ticks]
    return list(zip(ticks, texts, strict=True))


def _apart(ends: Mapping[int, tuple[float, float]], top: float, bottom: float) -> Iterable[tuple[int, float, float]]:
    """Return models with the ends of their curves, moved apart where their letters would overlap."""
    step = (bottom - top) / 13
    order = sorted(ends, key=lambda index: -ends[index][1])
    heights: list[float] = []
    for index in order:
        heights.append(min(ends[index][1], heights[-1] - step if heights else bottom))
    ceiling = top
    for place in reversed(range(len(heights))):
        heights[place] = max(heights[place], ceiling)
        ceiling = heights[place] + step
    return [(index, ends[index][0], height) for index, height in zip(order, heights, strict=True)]


# --- elements ---------------------------------------------------------------------------------------------------------


def _frame(scale: _Scale, rows: int, label: str) -> list[str]:
    """Draw the grid lines and the axis with its label."""
    bottom = _TOP + rows * _ROW
    parts = []
    for value, text in _labelled(scale.ticks(6)):
        x = float(scale(value))
        parts.append(_stroke(f"M{x:.1f} {_TOP}V{bottom}", 0.8, "var(--grid)"))
        parts.append(_text(x, bottom + 10, text, "muted", "middle"))
    if scale.threshold is not None:
        label += f", logarithmic beyond {scale.threshold:g}"
    return [*parts, _text(_WIDTH / 2, bottom + 23, label, "muted", "middle")]


def _head(row: Row, top: float) -> list[str]:
    indent = _MARGIN + 8 + 8 * len(letter(row.index))
    return [
        _text(_MARGIN, top + _NAME, letter(row.index), "title"),
        _text(indent, top + _NAME, shortened(row.name, 46)),
        _text(indent, top + _NOTE, row.note, "muted"),
    ]


def _points(x: NDArray[np.float64], top: float, index: int) -> str:
    # Golden-ratio jitter separates neighbours, and is reproducible.
    spread = np.asarray(np.arange(len(x)) * 0.6180339887 % 1 - 0.5, np.float64) * (len(x) > 1)
    return _dots(x, top + _POINTS + 16 * spread, 4.2 if len(x) <= 200 else 3, colour_of(index), 0.6)


def _dots(
    x: NDArray[np.float64], y: NDArray[np.float64], size: float, colour: str = "var(--ink)", opacity: float = 1
) -> str:
    """Draw points as round caps of zero-length lines: a single path instead of one element per point."""
    path = "".join(f"M{a:.1f} {b:.1f}h0" for a, b in zip(x.tolist(), y.tolist(), strict=True))
    style = f"stroke: {colour}; stroke-width: {size}; stroke-linecap: round; opacity: {opacity}"
    return f'<path d="{path}" style="{style}"/>' if path else ""


def _box(values: NDArray[np.float64], scale: _Scale, top: float, index: int) -> list[str]:
    low, middle, high = np.percentile(values, (25, 50, 75))
    reach = 1.5 * (high - low)
    ends = values[values >= low - reach].min(), values[values <= high + reach].max()
    first, left, right, last = scale(np.array([ends[0], low, high, ends[1]]))
    y = top + _POINTS
    area = f'x="{left:.1f}" y="{y - _HALF_BOX}" width="{right - left:.1f}" height="{2 * _HALF_BOX}"'
    return [
        f'<rect {area} style="fill: {colour_of(index)}; fill-opacity: .22; stroke: var(--ink)"/>',
        _stroke(f"M{first:.1f} {y}H{left:.1f}M{right:.1f} {y}H{last:.1f}", 1),
        _median(float(middle), scale, top),
    ]


def _median(value: float, scale: _Scale, top: float) -> str:
    return _stroke(f"M{float(scale(value)):.1f} {top + _POINTS - _HALF_BOX}v{2 * _HALF_BOX}", 2.4)


def _stroke(path: str, width: float, colour: str = "var(--ink)", *, dashed: bool = False) -> str:
    dashes = "; stroke-dasharray: 7 4.5" if dashed else ""
    return f'<path d="{path}" style="stroke: {colour}; stroke-width: {width}{dashes}"/>'


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "start", *, style: str = "") -> str:
    """Draw a line of text that is vertically centred at y."""
    attributes = (f' class="{kind}"' if kind else "") + (f' style="{style}"' if style else "")
    return f'<text x="{x:.1f}" y="{y:.1f}" dy=".35em" text-anchor="{anchor}"{attributes}>{escape(text)}</text>'


def _svg(parts: Iterable[str], height: float, title: str) -> str:
    box = f'viewBox="0 0 {_WIDTH} {height}"'
    return f'<svg class="chart" {box} role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
