"""What dataset.json says of labels and regions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def label_values(labels: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Label values of every label or region but background and ignore, by name, in the file's order.

    Args:
        labels: The entry ``labels`` of dataset.json.

    Raises:
        TypeError, ValueError, AttributeError: It is none.
    """
    return {
        str(name): tuple(int(value) for value in (values if isinstance(values, (list, tuple)) else (values,)))
        for name, values in labels.items()
        if name not in ("background", "ignore")
    }


def ignore_label(labels: Mapping[str, Any]) -> int | None:
    """The label of voxels that are not annotated, None where there is none.

    Args:
        labels: The entry ``labels`` of dataset.json.
    """
    return None if labels.get("ignore") is None else int(labels["ignore"])
