"""Colours of labels and regions, the same in all figures."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

COLOURS: Final = ("#56B4E9", "#D55E00", "#F0E442", "#CC79A7", "#009E73", "#E69F00", "#0072B2")
"""The palette of Okabe and Ito, which people with any colour vision can distinguish; best contrast to grey first."""


def colours_of(names: Iterable[str]) -> dict[str, str]:
    """Return a colour for every label or region, by their order."""
    return {name: COLOURS[number % len(COLOURS)] for number, name in enumerate(names)}
