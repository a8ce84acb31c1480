"""Colours of labels and regions: the same in every picture."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

COLOURS: Final = ("#56B4E9", "#D55E00", "#F0E442", "#CC79A7", "#009E73", "#E69F00", "#0072B2")
"""Okabe and Ito's, the ones that stand out from grey first: people with any colour vision can distinguish them."""


def colours_of(names: Iterable[str]) -> dict[str, str]:
    """A colour for every label or region, by their order."""
    return {name: COLOURS[number % len(COLOURS)] for number, name in enumerate(names)}
