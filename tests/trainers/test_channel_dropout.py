"""Channel dropout in nnU-Net's training."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from nnunet_conres.trainers import nnUNetTrainerMuon_ChannelDropout


def test_training_batches_lack_channels_and_validation_batches_do_not(
    make_trainer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nnUNetTrainerMuon_ChannelDropout, "p_channel_dropout", 1)
    trainer = make_trainer(nnUNetTrainerMuon_ChannelDropout)
    trainer.on_train_start()
    batch = next(trainer.dataloader_train)
    present = (batch["data"] != 0).flatten(2).any(2)
    assert present.sum(1).tolist() == [1] * len(present)  # of two channels
    assert np.isfinite(trainer.train_step(batch)["loss"])
    assert (next(trainer.dataloader_val)["data"] != 0).flatten(2).any(2).all()
