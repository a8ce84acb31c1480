"""The trainers of scripts/benchmarks/epochs.py: NAME_Timed is NAME with short, timed epochs.

nnU-Net finds them through its environment variable nnUNet_extTrainer.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

import nnunet_conres.trainers

SUFFIX = "_Timed"


class TimedEpochs(nnUNetTrainer):
    """Mixin that writes epoch times instead of validating. List it before the trainer among the bases."""

    def initialize(self) -> None:
        self.num_epochs, self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = (
            int(number) for number in os.environ["BENCHMARK_EPOCHS"].split()
        )
        super().initialize()

    def on_train_end(self) -> None:
        times = [self.logger.get_value(f"epoch_{end}_timestamps", step=None) for end in ("start", "end")]
        on_cuda = self.device.type == "cuda"
        peak = torch.cuda.max_memory_allocated() if on_cuda else 0
        reserved = torch.cuda.max_memory_reserved() if on_cuda else 0
        found = {"epochs": list(zip(*times, strict=True)), "peak_bytes": peak, "reserved_bytes": reserved}
        Path(os.environ["BENCHMARK_OUTPUT"]).write_text(json.dumps(found))
        super().on_train_end()

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        pass


def __getattr__(name: str) -> Any:
    base = name.removesuffix(SUFFIX)
    if base == name:
        raise AttributeError(name)
    trainer = nnUNetTrainer if base == nnUNetTrainer.__name__ else getattr(nnunet_conres.trainers, base)
    globals()[name] = made = type(name, (TimedEpochs, trainer), {"__module__": __name__})
    return made
