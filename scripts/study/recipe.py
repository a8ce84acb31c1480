"""What all trainings of the study have in common.

All of them, nnU-Net's own trainer among them, take the same precision, epoch length and augmentation; with the same
seed and one worker process, as on a CPU, they see the same batches, so that networks are compared on equal terms.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import numpy as np
import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from dynamic_network_architectures.building_blocks.residual import BasicBlockD
from dynamic_network_architectures.initialization.weight_init import init_last_bn_before_add_to_0
from nnunetv2.training.nnUNetTrainer.variants.data_augmentation.nnUNetTrainerNoMirroring import (
    nnUNetTrainerNoMirroring,
)
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA

from nnunet_conres.trainers.precision import cpu_autocast, training_precision

STOCK = "nnUNetTrainer"
EPOCH = 100  # iterations, where a stage says nothing else


class SeededTransform(BasicTransform):
    """A pipeline that draws from the same random numbers in every training.

    Reseeding with each sample also settles what the data loader draws for the next one.

    Args:
        pipeline: What to apply.
        seed: Where the random numbers start.
        samples: How many samples went before, in a training that is continued.
    """

    def __init__(self, pipeline: BasicTransform, seed: int, samples: int) -> None:
        super().__init__()
        self.pipeline = pipeline
        self.seed = seed
        self.samples = samples

    def __call__(self, **sample: Any) -> dict[str, Any]:
        self.samples += 1
        state = np.random.SeedSequence((self.seed, self.samples)).generate_state(1)[0]
        np.random.seed(state)
        torch.manual_seed(int(state))
        return self.pipeline(**sample)


class StudyRecipe(nnUNetTrainerNoMirroring):
    """Comes before a trainer among the bases of a study's: length, seed, no mirroring.

    Attributes:
        study_epochs: Number of epochs.
        study_iterations: Training iterations of an epoch.
        study_validation_iterations: Validation iterations of an epoch; they choose nothing.
        study_seed: Of initial weights and, with one worker process, patches and augmentation.
        study_lr: Learning rate; None for the trainer's own.
        study_identity_blocks: Whether residual blocks start as the identity, as in nnU-Net's residual networks.
    """

    study_epochs = 10
    study_iterations = EPOCH
    study_validation_iterations = 10
    study_seed = 0
    study_lr: float | None = None
    study_identity_blocks = False

    def initialize(self) -> None:
        self.num_epochs = self.study_epochs
        self.num_iterations_per_epoch = self.study_iterations
        self.num_val_iterations_per_epoch = self.study_validation_iterations
        self.save_every = 1
        if self.study_lr is not None:
            self.initial_lr = self.study_lr
        torch.manual_seed(self.study_seed)
        np.random.seed(self.study_seed)
        super().initialize()
        if self.study_identity_blocks:
            for module in self.network.modules():
                if isinstance(module, BasicBlockD):
                    init_last_bn_before_add_to_0(module)

    def on_train_start(self) -> None:
        # nnU-Net takes all cores of a CPU, however many trainings share it
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
        super().on_train_start()

    # nnU-Net calls these static methods on the instance
    def get_training_transforms(self, *args: Any, **kwargs: Any) -> BasicTransform:
        return self._seeded(super().get_training_transforms(*args, **kwargs), self.num_iterations_per_epoch)

    def get_validation_transforms(self, *args: Any, **kwargs: Any) -> BasicTransform:
        return self._seeded(super().get_validation_transforms(*args, **kwargs), self.num_val_iterations_per_epoch)

    def _seeded(self, pipeline: BasicTransform, iterations: int) -> BasicTransform:
        # several workers, as a GPU needs, would all draw the same; and which of them is first is not settled anyway
        if get_allowed_n_proc_DA() > 1:
            return pipeline
        return SeededTransform(pipeline, self.study_seed, self.current_epoch * iterations * self.batch_size)


class StudyStockTrainer(StudyRecipe):
    """nnU-Net's own trainer, with bfloat16 steps on a CPU that has them in hardware, as this package's trainers."""

    def initialize(self) -> None:
        super().initialize()
        self.training_precision = training_precision(self.device)

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        with cpu_autocast(self.device):
            return super().train_step(batch)

    def validation_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        with cpu_autocast(self.device):
            return super().validation_step(batch)


def study_trainer(
    name: str, module: str, network: Mapping[str, Any], iterations: int, seed: int, epoch: int = EPOCH
) -> type:
    """The trainer of a run.

    Args:
        name: What the class is called; nnU-Net's results are named after it.
        module: Name of the module that defines it, by which it is pickled.
        network: Entry of the network in runs.yaml.
        iterations: How long to train.
        seed: Of initial weights and, with one worker process (nnUNet_n_proc_DA=1), patches and augmentation.
        epoch: Iterations of an epoch.
    """
    attributes = {
        "__module__": module,
        "__doc__": f"{iterations} iterations, seed {seed}.",
        "study_epochs": iterations // epoch,
        "study_iterations": epoch,
        "study_seed": seed,
        **network.get("trainer_attributes", {}),
    }
    trainer = network.get("trainer", STOCK)
    if trainer == STOCK:
        return type(name, (StudyStockTrainer,), attributes)
    forms = (getattr(import_module("forms"), network["form"]),) if "form" in network else ()
    return type(name, (StudyRecipe, *forms, getattr(import_module("nnunet_conres.trainers"), trainer)), attributes)
