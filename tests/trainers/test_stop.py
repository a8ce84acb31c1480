"""The file that ends a training early."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nnunet_conres.trainers import nnUNetTrainerVNet
from nnunet_conres.trainers.resume import FINAL_CHECKPOINT, LATEST_CHECKPOINT
from nnunet_conres.trainers.stop import STOP_FILE


class StopsInTheFirstEpoch(nnUNetTrainerVNet):
    """A trainer whose user creates the file during the first epoch."""

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        if self.current_epoch == 0:
            Path(self.output_folder, STOP_FILE).touch()
        return super().train_step(batch)


def test_ends_after_the_epoch_and_goes_on_with_c(make_trainer: Callable[..., Any]) -> None:
    trainer = make_trainer(StopsInTheFirstEpoch)
    trainer.run_training()
    folder = Path(trainer.output_folder)
    final = folder / FINAL_CHECKPOINT
    assert torch.load(final, weights_only=False)["current_epoch"] == 1  # the epoch that nnU-Net would train next
    assert not (folder / STOP_FILE).exists()
    assert "STOP was found: the training ends after 1 of 2 epochs" in Path(trainer.log_file).read_text()

    continued = make_trainer(StopsInTheFirstEpoch, continue_training=True)
    continued.load_checkpoint(str(final))
    continued.on_train_start()
    # if killed now, the training continues from here, not from a final checkpoint, which --c takes for the end
    assert [path.name for path in folder.glob("checkpoint_*")] == [LATEST_CHECKPOINT, "checkpoint_best.pth"] or not (
        final.exists()
    )
    assert (folder / LATEST_CHECKPOINT).is_file()

    again = make_trainer(StopsInTheFirstEpoch, continue_training=True)
    again.load_checkpoint(str(folder / LATEST_CHECKPOINT))
    (folder / STOP_FILE).touch()  # left over: a new start means that training is wanted
    again.run_training()
    assert torch.load(final, weights_only=False)["current_epoch"] == 2
    assert len(again.logger.get_value("train_losses", step=None)) == 2


@pytest.mark.parametrize("configuration", ["3d_fullres"])
def test_a_file_in_the_last_epoch_changes_nothing(make_trainer: Callable[..., Any], configuration: str) -> None:
    trainer = make_trainer(StopsInTheFirstEpoch, configuration=configuration)
    trainer.num_epochs = 1
    trainer.run_training()
    assert (Path(trainer.output_folder) / FINAL_CHECKPOINT).is_file()
    assert "STOP was found" not in Path(trainer.log_file).read_text()
