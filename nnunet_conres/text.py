"""Text for messages and reports."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


def aligned(rows: Sequence[Sequence[str]], *, left: int | None = None) -> list[str]:
    """Return the lines of a table whose columns are as wide as their widest cell.

    Args:
        rows: At least one row; all of the same length.
        left: Number of left-aligned columns, all by default; the others are right-aligned, as for numbers.
    """
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    sides = [left is None or column < left for column in range(len(widths))]
    return [
        "  ".join(
            cell.ljust(width) if at_left else cell.rjust(width)
            for cell, width, at_left in zip(row, widths, sides, strict=True)
        ).rstrip()
        for row in rows
    ]


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table; all columns but the first are numbers."""
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def number_text(value: float) -> str:
    """Format a number with six digits, or with nine if six would round it to an integer, such as 0.99999998."""
    short = f"{value:g}"
    return short if float(short) == value or not float(short).is_integer() else f"{value:.9g}"


def format_shape(extents: Sequence[int]) -> str:
    """Format a patch size or a shape, such as 80 x 160 x 160."""
    return " x ".join(str(extent) for extent in extents)


def first_few(names: Sequence[str], most: int = 5) -> str:
    """Join the first names of a list, and append the number of the others."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def duration(seconds: float) -> str:
    """Format a duration in at most two units, such as 45 s, 3 min 20 s or 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return the end of a sentence about an unknown name: a question with the nearest known name, or a full stop."""
    by_lower = {one.lower(): one for one in known}
    near = difflib.get_close_matches(name.lower(), by_lower, 1)
    return f"; did you mean {by_lower[near[0]]}?" if near else "."


def no_device(kind: str, verb: str = "run") -> str:
    """Return the message for a device that is not available.

    Args:
        kind: cuda or mps.
        verb: What the user wanted to do on the device, such as train.
    """
    return f"There is no {kind.upper()} device here that torch can use. To {verb} on the CPU add: -device cpu"


def short_message(error: BaseException) -> str:
    """Return the last line of an error message: ITK names its source file first, and the reason at the end."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__).rstrip(".")
