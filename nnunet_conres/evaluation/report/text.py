"""Names and numbers as the report writes them, safe to put in a page."""

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
    """Text as it stands in a page, in elements and in quoted attributes."""
    return html.escape(str(text), quote=True)


def breakable(text: Any) -> str:
    """A name as HTML that may go on in the next line between its words, which names of trainers run together."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[_:/])", "<wbr>", escape(text))


def is_number(value: Any) -> bool:
    """Whether a value is a finite number, and no truth value."""
    if type(value) is float:  # most are
        return math.isfinite(value)
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def plain_number(value: float | None, decimals: int, *, signed: bool = False) -> str:
    """A number with a minus sign that is one, and a plus sign if asked for; a dash where there is none."""
    if value is None or not is_number(value):
        return "\N{EN DASH}"
    text = f"{value:+.{decimals}f}" if signed else f"{value:.{decimals}f}"
    if float(text) == 0:
        text = text.lstrip("+-")
    return text.replace("-", MINUS)


def number(value: float | None, decimals: int, *, signed: bool = False) -> str:
    """Like `plain_number`, as HTML: the dash says what it is."""
    return plain_number(value, decimals, signed=signed) if is_number(value) else NONE


def interval(low: float | None, high: float | None, decimals: int, *, signed: bool = False) -> str:
    """Both ends of an interval as HTML; empty where one is missing."""
    if not is_number(low) or not is_number(high):
        return ""
    return f"{number(low, decimals, signed=signed)} to {number(high, decimals, signed=signed)}"


def probability(value: float | None) -> str:
    """A p value as HTML, with no more digits than it is worth."""
    if not is_number(value):
        return NONE
    return "&lt; 0.001" if float(value or 0) < 0.001 else f"{value:.3f}"


def significant_digits(value: float | None, digits: int = 3) -> str:
    """A number of unknown size as HTML, without an exponent."""
    if value is None or not is_number(value):
        return NONE
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:,.{decimals}f}".replace(",", "\N{NARROW NO-BREAK SPACE}").replace("-", MINUS)


def duration(seconds: float | None) -> str:
    """A time in the unit a person would use, as HTML."""
    if seconds is None or not is_number(seconds):
        return NONE
    for limit, divisor, unit in ((120, 1, "s"), (7200, 60, "min"), (172800, 3600, "h")):
        if seconds < limit:
            return f"{significant_digits(seconds / divisor)} {unit}"
    return f"{significant_digits(seconds / 86400)} d"


def letter(index: int) -> str:
    """A, B, ..., Z, AA, ...: what a model is called where there is no room for its name."""
    text = ""
    index += 1
    while index:
        index, rest = divmod(index - 1, 26)
        text = chr(ord("A") + rest) + text
    return text


def shortened(text: str, length: int) -> str:
    """Text with its middle left out if it is longer; the ends tell names apart best."""
    if len(text) <= length:
        return text
    end = (length - 1) // 2
    return f"{text[: length - 1 - end]}\N{HORIZONTAL ELLIPSIS}{text[len(text) - end :]}"


def without_folders(text: str) -> str:
    """Text in which absolute paths have their last two parts only: the page is sent to others."""

    def end(match: re.Match[str]) -> str:
        return "/".join(["\N{HORIZONTAL ELLIPSIS}", *re.split(r"[/\\]", match[0])[-2:]])

    return re.sub(r"""(?<![\w./\\<])(?:[A-Za-z]:)?(?:[/\\][^\s/\\,;:'"()]+){2,}""", end, text)


def readable(key: str) -> str:
    """A region's key as a person writes it."""
    return key.replace("_", " ")


def script_data(content: Mapping[str, Any] | Sequence[Any]) -> str:
    """JSON that can stand in a script element, whatever its texts are."""
    text = json.dumps(without_nan(content), ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
