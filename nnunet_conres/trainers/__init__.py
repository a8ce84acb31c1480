"""Trainers that nnU-Net finds by name (see nnunet_conres.registration): those of `nnunet_conres.families`."""

from typing import Any

from nnunet_conres.families import TRAINERS, load_trainer

__all__ = list(TRAINERS)


def __getattr__(name: str) -> Any:
    if name not in TRAINERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return load_trainer(name)
