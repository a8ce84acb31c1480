"""Formatting of names and numbers in the report, escaped for HTML."""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from nnunet_conres.files import without_nan

MINUS = "\N{MINUS SIGN}"
NONE = '<span class="none" title="not available">\N{EN DASH}<span class="unseen"> not available</span></span>'


def escape(text: Any) -> str:
    """Escape text for HTML elements and quoted attributes."""
    return html.escape(str(text), quote=True)


def breakable(text: Any) -> str:
    """Return a name as HTML with optional line breaks between its words, as in CamelCase names of trainers."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[_:/])", "<wbr>", escape(text))


def is_number(value: Any) -> bool:
    """Return whether a value is a finite number and not a bool."""
    if type(value) is float:  # the most frequent case
        return math.isfinite(value)
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def plain_number(value: float | None, decimals: int, *, signed: bool = False) -> str:
    """Format a number with a typographic minus and, if `signed`, a plus sign; a dash if there is no number."""
    if value is None or not is_number(value):
        return "\N{EN DASH}"
    text = f"{value:+.{decimals}f}" if signed else f"{value:.{decimals}f}"
    if float(text) == 0:
        text = text.lstrip("+-")
    return text.replace("-", MINUS)


def number(value: float | None, decimals: int, *, signed: bool = False) -> str:
    """Format a number like `plain_number`, as HTML; the dash has the title "not available"."""
    return plain_number(value, decimals, signed=signed) if is_number(value) else NONE


def interval(low: float | None, high: float | None, decimals: int, *, signed: bool = False) -> str:
    """Format both ends of an interval as HTML; empty if one is missing."""
    if not is_number(low) or not is_number(high):
        return ""
    return f"{number(low, decimals, signed=signed)} to {number(high, decimals, signed=signed)}"


def probability(value: float | None) -> str:
    """Format a p value as HTML, with three decimals."""
    if not is_number(value):
        return NONE
    return "&lt; 0.001" if float(value or 0) < 0.001 else f"{value:.3f}"


def significant_digits(value: float | None, digits: int = 3) -> str:
    """Format a number of any magnitude as HTML, with significant digits and without an exponent."""
    if value is None or not is_number(value):
        return NONE
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:,.{decimals}f}".replace(",", "\N{NARROW NO-BREAK SPACE}").replace("-", MINUS)


def duration(seconds: float | None) -> str:
    """Format a time as HTML, in seconds, minutes, hours or days."""
    if seconds is None or not is_number(seconds):
        return NONE
    for limit, divisor, unit in ((120, 1, "s"), (7200, 60, "min"), (172800, 3600, "h")):
        if seconds < limit:
            return f"{significant_digits(seconds / divisor)} {unit}"
    return f"{significant_digits(seconds / 86400)} d"


def letter(index: int) -> str:
    """Return a model's short name for places without room for the full name: A, B, ..., Z, AA, ..."""
    text = ""
    index += 1
    while index:
        index, rest = divmod(index - 1, 26)
        text = chr(ord("A") + rest) + text
    return text


def shortened(text: str, length: int) -> str:
    """Shorten text that is too long by removing its middle, because the ends distinguish names best."""
    if len(text) <= length:
        return text
    end = (length - 1) // 2
    return f"{text[: length - 1 - end]}\N{HORIZONTAL ELLIPSIS}{text[len(text) - end :]}"


def without_folders(text: str) -> str:
    """Shorten absolute paths to their last two parts, because the page may be sent to others."""
    word = r"""[^\s/\\,;:'"()]+"""
    # A folder may have spaces in its name; the text after the last part may not be taken for one.
    path = rf"(?<![\w./\\<])(?:[A-Za-z]:)?(?:[/\\]{word}(?: {word})*(?=[/\\]))+[/\\]{word}"
    return re.sub(path, lambda match: short_path(match[0]), text)


def short_path(path: str) -> str:
    """Shorten a path to its last two parts."""
    return "/".join(["\N{HORIZONTAL ELLIPSIS}", *re.split(r"[/\\]", path)[-2:]])


def readable(key: str) -> str:
    """Return a key with spaces in place of underscores."""
    return key.replace("_", " ")


def script_data(content: Mapping[str, Any] | Sequence[Any]) -> str:
    """Return JSON that is safe in a script element, whatever text it contains."""
    text = json.dumps(without_nan(content), ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
