"""Steps of each network's trainer: how long they take, and how fast the loss falls at the start."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from recipe import study_trainer
from runs import Setting, plans_name


def measure(
    study: dict[str, Any], networks: list[str], folder: Path, setting: Setting, threads: int, rounds: int, work: Path
) -> dict[str, list[float]]:
    """Seconds of every timed step by network; networks take turns, behind two steps each that are not counted.

    Args:
        study: Content of runs.yaml.
        networks: Names of the networks, the baseline first.
        folder: nnU-Net's folder of the preprocessed data set, with the plans.
        setting: Batch and device.
        threads: On a CPU.
        rounds: Steps of each network.
        work: Folder for what the trainers write.
    """
    torch.set_num_threads(threads)
    with results_in(work):
        trainers = {network: network_trainer(study, network, folder, setting) for network in networks}
        batches = {network: _batch(trainer) for network, trainer in trainers.items()}
        times: dict[str, list[float]] = {network: [] for network in networks}
        for number in range(rounds + 2):
            for network, trainer in trainers.items():
                begun = time.perf_counter()
                trainer.train_step(batches[network])
                if setting.device == "cuda":
                    torch.cuda.synchronize()
                if number >= 2:
                    times[network].append(time.perf_counter() - begun)
    return times


def begin(
    study: dict[str, Any],
    networks: list[str],
    folder: Path,
    setting: Setting,
    threads: int,
    iterations: int,
    work: Path,
) -> dict[str, list[float]]:
    """Segmentation loss of the first iterations of fold 0 by network, as in a run of 1,000 iterations and seed 0.

    Args:
        study: Content of runs.yaml.
        networks: Names of the networks.
        folder: nnU-Net's folder of the preprocessed data set, with the plans.
        setting: Batch and device.
        threads: On a CPU.
        iterations: How many.
        work: Folder for what the trainers write.
    """
    losses: dict[str, list[float]] = {}
    os.environ["OMP_NUM_THREADS"] = str(threads)  # what the recipe goes by
    os.environ["nnUNet_n_proc_DA"] = "1"  # as in a run, so that the order of the batches is settled
    with results_in(work):
        for network in networks:
            trainer = network_trainer(study, network, folder, setting)
            trainer.on_train_start()
            trainer.on_epoch_start()
            trainer.on_train_epoch_start()
            outputs = [trainer.train_step(next(trainer.dataloader_train)) for _ in range(iterations)]
            losses[network] = [float(output.get("segmentation_loss", output["loss"])) for output in outputs]
            trainer.dataloader_train._finish()
            trainer.dataloader_val._finish()
    return losses


@contextlib.contextmanager
def results_in(work: Path) -> Iterator[None]:
    """Trainers make a folder in nnUNet_results, here one that is removed again."""
    work.mkdir(parents=True, exist_ok=True)
    before = os.environ.get("nnUNet_results")
    with tempfile.TemporaryDirectory(dir=work) as results:
        os.environ["nnUNet_results"] = results  # looked up by nnU-Net whenever it is needed
        try:
            yield
        finally:
            if before is None:
                del os.environ["nnUNet_results"]
            else:
                os.environ["nnUNet_results"] = before


def network_trainer(study: dict[str, Any], network: str, folder: Path, setting: Setting, fold: int = 0) -> Any:
    """The initialised trainer of a network, as in a run of 1,000 iterations and seed 0.

    Args:
        study: Content of runs.yaml.
        network: Name of the network.
        folder: nnU-Net's folder of the preprocessed data set, with the plans.
        setting: Batch and device.
        fold: Whose cases.
    """
    trainer_class = study_trainer(f"nnUNetTrainerSteps_{network}", __name__, study["networks"][network], 1000, 0)
    file = folder / f"{plans_name(study, network, setting.batch_size)}.json"
    plans = json.loads(file.read_text()) | {"continue_training": False}
    dataset_json = json.loads((folder / "dataset.json").read_text())
    trainer = trainer_class(plans, study["protocol"]["configuration"], fold, dataset_json, torch.device(setting.device))
    trainer.initialize()
    trainer.network.train()
    return trainer


def _batch(trainer: Any) -> dict[str, Any]:
    patch, batch = trainer.configuration_manager.patch_size, trainer.configuration_manager.batch_size
    generator = torch.Generator().manual_seed(0)
    # an ellipsoid: labels that are noise would be a border everywhere
    axes = torch.meshgrid(*[torch.linspace(-1, 1, extent) for extent in patch], indexing="ij")
    inside = sum(axis.square() for axis in axes) < 0.3
    labels = (inside.int() + (inside & (axes[0] > 0)).int())[None, None].repeat(batch, 1, 1, 1, 1)
    noise = torch.randn((batch, trainer.num_input_channels, *patch), generator=generator)
    image = labels + noise
    if trainer.label_manager.has_regions:
        labels = torch.cat([labels > 0] * len(trainer.label_manager.foreground_regions), 1)
    targets = [
        labels[(..., *[slice(None, None, round(1 / factor)) for factor in scale])].to(torch.int16)
        for scale in trainer._get_deep_supervision_scales()
    ]
    return {"data": image, "target": targets}
