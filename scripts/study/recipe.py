"""The trainers of scripts/study/study.py, with the settings that all runs of a list share."""

from __future__ import annotations

import time
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import forms
import numpy as np
import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from nnunetv2.inference.export_prediction import export_prediction_from_logits
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.training.nnUNetTrainer.variants.data_augmentation.nnUNetTrainerNoMirroring import (
    nnUNetTrainerNoMirroring,
)
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA

import nnunet_conres.trainers
from nnunet_conres.trainers.device_augmentation import DeviceAugmentationMixin, wants_device_augmentation
from nnunet_conres.trainers.precision import CpuPrecisionTrainer


class SeededTransform(BasicTransform):
    """A pipeline that draws the same random numbers in every training.

    Reseeding for each sample also fixes what the data loader draws for the next one.

    Args:
        pipeline: The transforms.
        seed: Seed of the training.
        samples: Number of samples drawn before, in a training that resumes from a checkpoint.
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
    """Mixin for equal length, batch size, width and seed, no mirroring. List it before the trainer among the bases.

    Attributes:
        study: Entries of the run, as in the list of runs.
        step_seconds: Time of each training step of this process: processor time on a CPU, wall time on a GPU.
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
        plans = deepcopy(plans)
        entries = plans["configurations"][configuration]
        if self.study["batch_size"]:
            entries["batch_size"] = self.study["batch_size"]
        if self.study["width"] != 1:
            arguments = entries["architecture"]["arch_kwargs"]
            arguments["features_per_stage"] = [
                2 * round(self.study["width"] * features / 2) for features in arguments["features_per_stage"]
            ]
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.step_seconds: list[float] = []

    def initialize(self) -> None:
        self.num_epochs = self.study["epochs"]
        self.num_iterations_per_epoch = self.study["iterations"] // self.num_epochs
        self.num_val_iterations_per_epoch, self.save_every = 1, 1
        for name, value in self.study["settings"].items():
            if not hasattr(self, name):
                raise AttributeError(f"{type(self).__name__} has no attribute {name} to set (study, settings).")
            setattr(self, name, value)
        torch.manual_seed(self.study["seed"])
        np.random.seed(self.study["seed"])
        super().initialize()

    def on_train_start(self) -> None:
        # nnU-Net uses all cores of a CPU even if several trainings share them, and draws a figure after every epoch.
        threads = torch.get_num_threads()
        super().on_train_start()
        torch.set_num_threads(threads)
        self.logger.plot_progress_png = lambda folder: None

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        clock = time.process_time if self.device.type == "cpu" else time.perf_counter
        start = clock()
        result = super().train_step(batch)
        self.step_seconds.append(clock() - start)
        if not np.isfinite(result["loss"]):
            raise FloatingPointError(f"The loss is {result['loss']} in epoch {self.current_epoch}.")
        return result

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Validate as nnU-Net does, but with fewer tiles and without worker processes.

        Starting the processes would take longer than these predictions.
        """
        self.set_deep_supervision_enabled(False)
        self.network.eval()
        predictor = nnUNetPredictor(tile_step_size=0.75, use_mirroring=False, device=self.device, allow_tqdm=False)
        network = getattr(self.network, "_orig_mod", self.network)  # not compiled again for so few patches
        predictor.manual_initialization(
            network, self.plans_manager, self.configuration_manager, None, self.dataset_json, "", None
        )
        folder = Path(self.output_folder, "validation")
        folder.mkdir(exist_ok=True)
        _, validation = self.get_tr_and_val_datasets()
        for case in validation.identifiers:
            data, _, _, properties = validation.load_case(case)
            logits = predictor.predict_sliding_window_return_logits(torch.from_numpy(np.array(data[:]))).cpu()
            export_prediction_from_logits(
                logits,
                properties,
                self.configuration_manager,
                self.plans_manager,
                self.dataset_json,
                str(folder / case),
                num_threads_torch=torch.get_num_threads(),
            )
        self.set_deep_supervision_enabled(True)

    # nnU-Net calls these static methods on the instance.
    def get_training_transforms(self, *args: Any, **kwargs: Any) -> BasicTransform:
        return self._seeded(super().get_training_transforms(*args, **kwargs), self.num_iterations_per_epoch)

    def get_validation_transforms(self, *args: Any, **kwargs: Any) -> BasicTransform:
        return self._seeded(super().get_validation_transforms(*args, **kwargs), self.num_val_iterations_per_epoch)

    def _seeded(self, pipeline: BasicTransform, iterations: int) -> BasicTransform:
        # Several processes would all draw the same numbers, and their order is not determined anyway.
        if get_allowed_n_proc_DA() > 1 or wants_device_augmentation(self.device):
            return pipeline
        return SeededTransform(pipeline, self.study["seed"], self.current_epoch * iterations * self.batch_size)


def trainer(base: str, study: Mapping[str, Any], name: str = "nnUNetTrainerStudy") -> type:
    """Return the trainer class of a run.

    Args:
        base: nnUNetTrainer, or a trainer of this package or of `forms`.
        study: Entries of the run, as in the list of runs.
        name: Name of the class, and so part of the name of the run's folder.
    """
    if base == nnUNetTrainer.__name__:
        own: tuple[type, ...] = (DeviceAugmentationMixin, CpuPrecisionTrainer)
    else:
        own = (forms.TRAINERS.get(base) or getattr(nnunet_conres.trainers, base),)
    return type(name, (EqualTerms, *own), {"study": study})
