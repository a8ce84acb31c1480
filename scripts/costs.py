"""Estimate the costs of BraTS 2021 for the workflow's example, with ResidualMaps in place of ConResNet.

Prints GPU hours, storage and read rate. Operations and parameters are counted on tensors without data, from the plans
that the planners make for BraTS-like data at 8 GiB. The speed of the GPU is assumed: every printed hour is inversely
proportional to --tflops.

    python scripts/costs.py
    python scripts/costs.py --tflops 15 --cases 12510
"""

from __future__ import annotations

import argparse
import contextlib
import io
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from benchmarks.report import table
from benchmarks.synthetic import DATA_SETS, DATASET_NAME, nnunet_folders
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.experiment_planning.experiment_planners.residual_unets.residual_encoder_unet_planners import (
    nnUNetPlannerResEncM,
)
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch.utils.flop_counter import FlopCounterMode

from nnunet_conres.planning.planners import PLANNERS

TARGET_GIB = 8
EPOCHS, TRAINING_BATCHES, VALIDATION_BATCHES = 1000, 250, 50
CHANNELS, REGIONS = 4, 3
FOLDS = 5
# A training step is assumed to cost as much as three forward passes.
STEP = 3
# Bytes per value: preprocessed images and labels are stored as float32 and int8, probabilities as float32.
FLOAT, LABEL = 4, 1
# Voxels of an original BraTS case; probabilities are stored in this size.
CASE_VOXELS = 240 * 240 * 155
# Bytes per parameter: float32 weights and momentum. Adam's second moment is neglected: Muon leaves few parameters to
# Adam. Two checkpoints per fold: final or latest, and best.
CHECKPOINT_BYTES, CHECKPOINTS = 8, 2


@dataclass(frozen=True)
class Counted:
    """A planned network with its operations and parameters.

    Attributes:
        name: Name of the model.
        patch: Patch size in voxels.
        batch: Patches per batch.
        flops: FLOPs of a forward pass of one batch.
        parameters: Number of parameters.
        slowness: Time per operation relative to nnU-Net's U-Net; measured for ResidualMaps on a CPU, 1 for the others.
    """

    name: str
    patch: tuple[int, ...]
    batch: int
    flops: int
    parameters: int
    slowness: float

    @property
    def epoch_flops(self) -> float:
        return self.flops * (STEP * TRAINING_BATCHES + VALIDATION_BATCHES)


def count() -> Iterator[Counted]:
    """Plan four models and count their operations and parameters."""
    data = DATA_SETS["brats"]
    planners = {
        "nnU-Net": (ExperimentPlanner, 1.0),
        "ResEnc-M": (nnUNetPlannerResEncM, 1.0),
        "ResidualMaps": (PLANNERS["residual_maps"], 1.1),
        "V-Net": (PLANNERS["vnet"], 1.0),
    }
    with nnunet_folders(data), torch.device("meta"):
        for name, (planner, slowness) in planners.items():
            with contextlib.redirect_stdout(io.StringIO()):
                plans = planner(DATASET_NAME, gpu_memory_target_in_gb=TARGET_GIB).plan_experiment()
            found = PlansManager(plans).get_configuration("3d_fullres")
            network = get_network_from_plans(
                found.network_arch_class_name,
                found.network_arch_init_kwargs,
                found.network_arch_init_kwargs_req_import,
                CHANNELS,
                REGIONS,
                allow_init=False,
                deep_supervision=True,
            )
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                network(torch.empty(found.batch_size, CHANNELS, *found.patch_size))
            yield Counted(
                name,
                tuple(found.patch_size),
                found.batch_size,
                counter.get_total_flops(),
                sum(parameter.numel() for parameter in network.parameters()),
                slowness,
            )


def report(models: list[Counted], tflops: float, cases: int, cores: int) -> Iterator[str]:
    """Yield the report in Markdown.

    Args:
        models: The models.
        tflops: TFLOP/s that a GPU is assumed to sustain.
        cases: Number of training cases.
        cores: Number of cores for preprocessing.
    """
    yield f"Every hour below rests on an assumed {tflops:g} TFLOP/s, sustained.\n"
    head = ["", "patch", "batch", "TFLOP forward", "million parameters", "TFLOP per epoch", "s per epoch"]
    rows, total, longest, parameters = [], 0.0, 0.0, 0
    for model in models:
        seconds = model.epoch_flops * model.slowness / (tflops * 1e12)
        hours = seconds * EPOCHS / 3600
        total, longest = total + FOLDS * hours, max(longest, hours)
        parameters += model.parameters
        rows.append(
            [
                model.name,
                " x ".join(map(str, model.patch)),
                str(model.batch),
                f"{model.flops / 1e12:.2f}",
                f"{model.parameters / 1e6:.0f}",
                f"{model.epoch_flops / 1e12:,.0f}",
                f"{seconds:.0f}",
                f"{hours:.1f}",
                f"{FOLDS * hours:.0f}",
            ]
        )
    yield table([*head, "h per training", f"GPU hours, {FOLDS} folds"], rows)
    yield f"\nTrainings together: {total:.0f} GPU hours, {total / 24:.0f} days on one GPU; the longest {longest:.0f} h."

    shape = DATA_SETS["brats"].shape
    cropped = shape[0] * shape[1] * shape[2]
    preprocessed = cases * cropped * (CHANNELS * FLOAT + LABEL)
    checkpoints = FOLDS * CHECKPOINTS * CHECKPOINT_BYTES * parameters
    probabilities = len(models) * cases * CASE_VOXELS * REGIONS * FLOAT
    first = models[0]
    patches = first.batch * first.patch[0] * first.patch[1] * first.patch[2] * (CHANNELS * FLOAT + LABEL)
    rate = len(models) * FOLDS * patches / (first.flops * STEP / (tflops * 1e12))
    yield f"\n{cases:,} cases, uncompressed:\n"
    yield table(
        ["", ""],
        [
            ["preprocessed data", f"{preprocessed / 1e9:,.0f} GB"],
            ["checkpoints", f"{checkpoints / 1e9:,.0f} GB"],
            [f"probabilities for ensembles, {len(models)} models", f"{probabilities / 1e9:,.0f} GB"],
            ["validation, cases of one training", f"{cases / FOLDS:,.0f}"],
            [f"read by {len(models) * FOLDS} trainings of {first.name} at once", f"{rate / 1e9:.1f} GB/s"],
            [f"preprocessing at 10 s a case and core, {cores} cores", f"{cases * 10 / cores / 3600:.1f} h"],
        ],
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--tflops", type=float, default=30.0, help="assumed speed of a GPU (default: %(default)s)")
    parser.add_argument("--cases", type=int, default=1251, help="for training (default: %(default)s)")
    parser.add_argument("--cores", type=int, default=8, help="for preprocessing (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.tflops <= 0 or arguments.cases < FOLDS or arguments.cores < 1:
        parser.error(f"expected --tflops above 0, --cases of {FOLDS} or more, and --cores of 1 or more")
    print(*report(list(count()), arguments.tflops, arguments.cases, arguments.cores), sep="\n")


if __name__ == "__main__":
    main()
