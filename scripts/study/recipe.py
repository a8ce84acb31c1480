"""The trainers of scripts/study/study.py: what all runs of a list have in common."""

from __future__ import annotations

import os
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.training.nnUNetTrainer.variants.data_augmentation.nnUNetTrainerNoMirroring import (
    nnUNetTrainerNoMirroring,
)
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA

import nnunet_conres.trainers
from nnunet_conres.trainers.precision import CpuPrecisionTrainer


class SeededTransform(BasicTransform):
    """A pipeline that draws the same random numbers in every training.

    Reseeding with each sample also determines what the data loader draws for the next one.

    Args:
        pipeline: The transforms.
        seed: Of the training.
        samples: Number of samples drawn before, in a training that goes on from a checkpoint.
    """

    def __init__(self, pipeline: BasicTransform, seed: int, samples: int) -> None:
        super().__init__()
        self.pipeline, self.seed, self.samples = pipeline, seed, samples

    def __call__(self, **sample: Any) -> dict[str, Any]:
        self.samples += 1
        state = int(np.random.SeedSequence((self.seed, self.samples)).generate_state(1)[0])
        np.random.seed(state)
        torch.manual_seed(state)
        return self.pipeline(**sample)


class EqualTerms(nnUNetTrainerNoMirroring):
    """Comes before a trainer among the bases of a run's: length, batch size, seed, no mirroring.

    Attributes:
        study: Entries of the run, as in the list of runs.
    """

    study: Mapping[str, Any]

    def __init__(
        self,
        plans: dict[str, Any],
        configuration: str,
        fold: int | str,
        dataset_json: dict[str, Any],
        device: torch.device = torch.device("cuda"),  # noqa: B008  (nnU-Net's own default)
    ) -> None:
        if self.study["batch_size"]:
            plans = deepcopy(plans)
            plans["configurations"][configuration]["batch_size"] = self.study["batch_size"]
        super().__init__(plans, configuration, fold, dataset_json, device)

    def initialize(self) -> None:
        self.num_iterations_per_epoch = self.study["iterations_per_epoch"]
        self.num_epochs = self.study["iterations"] // self.num_iterations_per_epoch
        self.num_val_iterations_per_epoch, self.save_every = 10, 1
        for name, value in self.study["settings"].items():
            if not hasattr(self, name):
                raise AttributeError(f"{type(self).__name__} has no attribute {name} to set (study, settings).")
            setattr(self, name, value)
        torch.manual_seed(self.study["seed"])
        np.random.seed(self.study["seed"])
        super().initialize()

    def on_train_start(self) -> None:
        # nnU-Net takes all cores of a CPU, however many trainings share it.
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
        super().on_train_start()

    # nnU-Net calls these static methods on the instance.
    def get_training_transforms(self, *args: Any, **kwargs: Any) -> BasicTransform:
        return self._seeded(super().get_training_transforms(*args, **kwargs), self.num_iterations_per_epoch)

    def get_validation_transforms(self, *args: Any, **kwargs: Any) -> BasicTransform:
        return self._seeded(super().get_validation_transforms(*args, **kwargs), self.num_val_iterations_per_epoch)

    def _seeded(self, pipeline: BasicTransform, iterations: int) -> BasicTransform:
        # Several processes would all draw the same numbers, and their order is not determined anyway.
        if get_allowed_n_proc_DA() > 1:
            return pipeline
        return SeededTransform(pipeline, self.study["seed"], self.current_epoch * iterations * self.batch_size)


def trainer(base: str, study: Mapping[str, Any]) -> type:
    """Base class of a run's trainer.

    Args:
        base: nnUNetTrainer, or a trainer of this package.
        study: Entries of the run, as in the list of runs.
    """
    own = CpuPrecisionTrainer if base == nnUNetTrainer.__name__ else getattr(nnunet_conres.trainers, base)
    return type(f"EqualTerms_{base}", (EqualTerms, own), {"study": study})
