"""Trainers that differ in their number of epochs only."""

import pickle

import pytest

import nnunet_conres.trainers
from nnunet_conres.families import LENGTHS, TRAINERS, TRAINING_LENGTHS


@pytest.mark.parametrize("family", sorted({trainer for trainer, _ in LENGTHS.values()}))
def test_every_family_has_every_length(family: str) -> None:
    for ending, epochs in TRAINING_LENGTHS.items():
        trainer = getattr(nnunet_conres.trainers, f"{family}_{ending}")
        assert trainer.training_epochs == epochs
        assert ending == f"{epochs}epoch{'s' if epochs > 1 else ''}"
        assert trainer.__base__ is getattr(nnunet_conres.trainers, family)
        # folders and checkpoints contain the name, and worker processes get the class
        assert trainer.__name__ == f"{family}_{ending}"
        assert pickle.loads(pickle.dumps(trainer)) is trainer
        assert TRAINERS[trainer.__name__].startswith(f"{family} for {epochs} epoch")
