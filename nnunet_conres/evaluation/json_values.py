"""JSON has no NaN and no infinity."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def without_nan(content: Any) -> Any:
    """A copy of JSON-like content in which NumPy's numbers are Python's, and NaN and infinities are None."""
    if isinstance(content, Mapping):
        return {str(key): without_nan(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [without_nan(value) for value in content]
    if hasattr(content, "item") and not isinstance(content, str):
        content = content.item()
    if isinstance(content, float) and not math.isfinite(content):
        return None
    return content
