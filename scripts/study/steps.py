"""Time of a training step of each network: whole steps of its trainer, with loss and optimiser, on a made-up batch."""

from __future__ import annotations

import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch


def measure(
    study: dict[str, Any], networks: list[str], folder: Path, device: str, threads: int, rounds: int, work: Path
) -> dict[str, list[float]]:
    """Seconds of every timed step by network; networks take turns, behind two steps each that are not counted.

    Args:
        study: Content of runs.yaml.
        networks: Names of the networks, the baseline first.
        folder: nnU-Net's folder of the preprocessed data set, with the plans.
        device: Where to train.
        threads: On a CPU.
        rounds: Steps of each network.
        work: Folder for what the trainers write.
    """
    work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=work) as results:
        os.environ["nnUNet_results"] = results  # trainers make a folder there
        from plans import plans_name
        from recipe import study_trainer

        torch.set_num_threads(threads)
        dataset_json = json.loads((folder / "dataset.json").read_text())
        trainers = {}
        for network in networks:
            trainer_class = study_trainer(f"nnUNetTrainerSteps_{network}", __name__, study["networks"][network], 100, 0)
            plans = json.loads((folder / f"{plans_name(network)}.json").read_text()) | {"continue_training": False}
            trainer = trainer_class(plans, study["protocol"]["configuration"], 0, dataset_json, torch.device(device))
            trainer.initialize()
            trainer.network.train()
            trainers[network] = trainer
        batches = {network: _batch(trainer) for network, trainer in trainers.items()}
        times: dict[str, list[float]] = {network: [] for network in networks}
        for number in range(rounds + 2):
            for network, trainer in trainers.items():
                begun = time.perf_counter()
                trainer.train_step(batches[network])
                if device == "cuda":
                    torch.cuda.synchronize()
                if number >= 2:
                    times[network].append(time.perf_counter() - begun)
    return times


def _batch(trainer: Any) -> dict[str, Any]:
    patch, batch = trainer.configuration_manager.patch_size, trainer.configuration_manager.batch_size
    generator = torch.Generator().manual_seed(0)
    # an ellipsoid: labels that are noise would be a border everywhere
    axes = torch.meshgrid(*[torch.linspace(-1, 1, extent) for extent in patch], indexing="ij")
    inside = sum(axis.square() for axis in axes) < 0.3
    labels = (inside.int() + (inside & (axes[0] > 0)).int())[None, None].repeat(batch, 1, 1, 1, 1)
    image = labels + torch.randn(labels.shape, generator=generator)
    targets = [
        labels[(..., *[slice(None, None, round(1 / factor)) for factor in scale])].to(torch.int16)
        for scale in trainer._get_deep_supervision_scales()
    ]
    return {"data": image, "target": targets}
