"""nnU-Net's own trainer at the lengths and the precision of the study, so that both sides of a comparison are alike.

nnU-Net trains in float32 on a CPU where this package's trainers take bfloat16; nothing else differs here from the stock
trainer. Found by nnU-Net when ``nnUNet_extTrainer`` names this folder.
"""

from __future__ import annotations

from typing import Any

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_conres.trainers.precision import cpu_autocast, training_precision


class nnUNetTrainerBaseline(nnUNetTrainer):
    """nnU-Net's trainer with bfloat16 steps on a CPU that has them in hardware."""

    training_epochs = 1000

    def __init__(
        self,
        plans: dict[str, Any],
        configuration: str,
        fold: int,
        dataset_json: dict[str, Any],
        device: torch.device = torch.device("cuda"),  # noqa: B008  (nnU-Net's own signature)
    ) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs = self.training_epochs
        self.training_precision = training_precision(device)

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        with cpu_autocast(self.device):
            return super().train_step(batch)

    def validation_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        with cpu_autocast(self.device):
            return super().validation_step(batch)


class nnUNetTrainerBaseline_5epochs(nnUNetTrainerBaseline):
    """5 epochs."""

    training_epochs = 5
