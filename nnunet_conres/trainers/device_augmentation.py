"""nnU-Net's augmentation on the training device; worker processes only draw parameters and load voxels."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from typing import Any, Final
from unittest import mock

import numpy as np
import torch
from batchgenerators.dataloading.multi_threaded_augmenter import MultiThreadedAugmenter
from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter
from batchgenerators.dataloading.single_threaded_augmenter import SingleThreadedAugmenter
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA

from nnunet_conres.augmentation.loading import DeviceBatches, DrawFirstLoader
from nnunet_conres.augmentation.on_device import DevicePipeline
from nnunet_conres.errors import InputError
from nnunet_conres.nnunet import switch_from_environment
from nnunet_conres.text import first_few

DEVICE_AUGMENTATION_VARIABLE: Final = "nnUNet_conres_device_augmentation"
"""0: augmentation on the CPU, as in nnU-Net. 1: on the training device, even if that is a CPU."""
SEED_VARIABLE: Final = "nnUNet_conres_seed"
"""Seed of the initial weights and the batches, a whole number."""

_PROCESSES_VARIABLE = "nnUNet_n_proc_DA"  # nnU-Net's


def wants_device_augmentation(device: torch.device) -> bool:
    """Return whether to augment on the training device: as the environment says, else only on CUDA.

    Raises:
        InputError: The environment variable is neither 0 nor 1.
    """
    wanted = switch_from_environment(DEVICE_AUGMENTATION_VARIABLE)
    return device.type == "cuda" if wanted is None else wanted


def seed_of_environment() -> int | None:
    """Return the seed in the environment variable, None if it is not set.

    Raises:
        InputError: It is not a whole number of at least 0.
    """
    text = os.environ.get(SEED_VARIABLE, "").strip()
    if text == "":
        return None
    if not text.isdecimal():
        raise InputError(f"{SEED_VARIABLE} is {text!r}; expected a whole number of at least 0.")
    return int(text)


class DeviceAugmentationMixin(nnUNetTrainer):
    """nnU-Net's trainer, which augments on the training device. Must come first among a trainer's bases.

    Pipeline, sampling and their parameters stay those of the trainer. The worker processes draw the parameters of the
    transforms and load the voxels that these need.

    Attributes:
        augments_on_device: Read by the memory model, which has only the class of a trainer.
    """

    augments_on_device = True

    # set by nnU-Net's constructor, which is untyped
    device: torch.device
    local_rank: int

    def initialize(self) -> None:
        seed = seed_of_environment()
        if seed is not None:
            random.seed(seed)
            np.random.seed(seed % 2**32)
            torch.manual_seed(seed)
        super().initialize()

    def get_dataloaders(self) -> tuple[Iterator[dict[str, Any]], Iterator[dict[str, Any]]]:
        if not wants_device_augmentation(self.device):
            return super().get_dataloaders()
        processes = get_allowed_n_proc_DA()
        # nnU-Net creates its loaders here and starts processes for them. With 0 processes there is nothing to stop.
        with mock.patch.dict(os.environ, {_PROCESSES_VARIABLE: "0"}):
            stock = super().get_dataloaders()
        loaders: list[Any] = [getattr(one, "data_loader", None) for one in stock]
        if not all(type(loader) is nnUNetDataLoader for loader in loaders):
            self.print_to_log_file(
                f"WARNING: {type(self).__name__} overrides get_dataloaders, so augmentation runs on the CPU."
            )
            return super().get_dataloaders()
        pipelines = [DevicePipeline(loader.transforms) for loader in loaders]
        self._say_where(pipelines[0])
        sources = [
            self._source(DrawFirstLoader.of(loader, pipeline), number, wanted)
            for number, (loader, pipeline, wanted) in enumerate(
                zip(loaders, pipelines, (processes, (processes + 1) // 2), strict=True)
            )
        ]
        train, val = (
            DeviceBatches(source, pipeline, self.device) for source, pipeline in zip(sources, pipelines, strict=True)
        )
        return train, val

    def _source(self, loader: DrawFirstLoader, number: int, processes: int) -> Iterator[dict[str, Any]]:
        """Start worker processes that load samples, each with a separate seed; with 0 processes, load in this one."""
        if processes == 0:
            return SingleThreadedAugmenter(loader, None)
        seed = seed_of_environment()
        sequence = np.random.SeedSequence(None if seed is None else [seed, self.local_rank, number])
        seeds = [int(one) for one in sequence.generate_state(processes)]
        pin = self.device.type == "cuda"
        # Samples may be larger than patches, and are ready sooner than nnU-Net's batches, so fewer are cached.
        cached = max(3, processes // 4)
        source: Any
        if seed is None:
            source = NonDetMultiThreadedAugmenter(loader, None, processes, cached, seeds, pin, wait_time=0.002)
        else:  # in a fixed order
            source = MultiThreadedAugmenter(loader, None, processes, 1, seeds, pin, wait_time=0.002)
        source._start()  # from this thread, before another one exists
        return source

    def _say_where(self, pipeline: DevicePipeline) -> None:
        self.print_to_log_file(
            f"Augmentation runs on {self.device}; set {DEVICE_AUGMENTATION_VARIABLE}=0 to run it on the CPU."
        )
        if pipeline.on_cpu:
            self.print_to_log_file(
                f"The CPU runs the augmentation up to {pipeline.unknown[-1]}, because nnunet-conres can't run these "
                f"transforms on {self.device}: {first_few(pipeline.unknown, 10)}."
            )

    def on_train_end(self) -> None:
        for batches in (self.dataloader_train, self.dataloader_val):
            if isinstance(batches, DeviceBatches):
                batches.close()
        super().on_train_end()
