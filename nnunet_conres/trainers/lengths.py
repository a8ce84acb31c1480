"""Trainers that differ from another trainer only in the number of epochs, named as in nnU-Net.

They are created on first access, as attributes of this module, so that they can be pickled.
"""

from __future__ import annotations

from typing import Any

from nnunet_conres.families import LENGTHS, load_trainer


def __getattr__(name: str) -> Any:
    if name not in LENGTHS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    trainer, epochs = LENGTHS[name]
    attributes = {"__module__": __name__, "__doc__": f"{epochs} epochs.", "training_epochs": epochs}
    globals()[name] = type(name, (load_trainer(trainer),), attributes)
    return globals()[name]
