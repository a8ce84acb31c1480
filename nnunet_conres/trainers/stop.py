"""Ending a training early and cleanly, by creating a file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Final

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import distributed

from nnunet_conres.trainers.resume import FINAL_CHECKPOINT, LATEST_CHECKPOINT

STOP_FILE: Final = "STOP"
"""Name of the file in the output folder that ends a training after the current epoch: ``touch .../fold_0/STOP``."""


class _Stopped(Exception):  # noqa: N818  (no error)
    """Raised to leave nnU-Net's loop over epochs."""


class StoppableTrainer(nnUNetTrainer):
    """nnU-Net's trainer, which ends early if `STOP_FILE` exists.

    The training ends after the current epoch, with checkpoint_final.pth and the final validation, as after the last
    epoch. ``--c`` continues with the next epoch. The file is removed then, and also when a training starts.
    """

    _continues_final = False

    def load_checkpoint(self, filename_or_checkpoint: Any) -> None:
        super().load_checkpoint(filename_or_checkpoint)
        is_final = filename_or_checkpoint == os.path.join(self.output_folder, FINAL_CHECKPOINT)
        self._continues_final = is_final and self.current_epoch < self.num_epochs

    def on_train_start(self) -> None:
        super().on_train_start()
        if self.local_rank == 0:
            self._stop_file.unlink(missing_ok=True)
            if self._continues_final:
                # It is no longer the final checkpoint, but --c would prefer it to all later ones.
                folder = Path(self.output_folder)
                os.replace(folder / FINAL_CHECKPOINT, folder / LATEST_CHECKPOINT)

    def run_training(self) -> None:
        try:
            super().run_training()
        except _Stopped:
            self.print_to_log_file(
                f"{STOP_FILE} was found: the training ends after {self.current_epoch} of {self.num_epochs} epochs. To "
                f"continue, add --c to the same command."
            )
            self.on_train_end()

    def on_epoch_end(self) -> None:
        super().on_epoch_end()
        if self.current_epoch < self.num_epochs and self._is_asked_to_stop():
            raise _Stopped

    @property
    def _stop_file(self) -> Path:
        return Path(self.output_folder, STOP_FILE)

    def _is_asked_to_stop(self) -> bool:
        asked = [self.local_rank == 0 and self._stop_file.exists()]
        if self.is_ddp:  # all processes must leave the loop in the same epoch
            distributed.broadcast_object_list(asked, src=0)
        if asked[0] and self.local_rank == 0:
            self._stop_file.unlink(missing_ok=True)
        return asked[0]
