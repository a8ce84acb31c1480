"""Loading and augmentation: nnU-Net's, against drawing first, loading only what is needed and augmenting on the device.

All contenders draw the same random numbers in a round. The cost of a sample on a core is processor time, which other
programs on the machine hardly change; its cost on a GPU is wall time. Both differ between samples, since only a third
of nnU-Net's samples are rotated or scaled, so means over all rounds are compared.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from nnunetv2.training.data_augmentation.compute_initial_patch_size import get_patch_size
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params, nnUNetDatasetBlosc2
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from benchmarks import epochs, machine
from benchmarks.arguments import add_turns, positive
from benchmarks.networks import Task
from benchmarks.report import as_text, ratio_table, ratios_as_json, table
from benchmarks.timing import BenchmarkError, Phases, Ratio, in_turn, totals
from nnunet_conres.augmentation.loading import DeviceBatches, DrawFirstLoader, finish
from nnunet_conres.augmentation.on_device import DevicePipeline
from nnunet_conres.datasets.phantom import make_phantom

REGIONS = {"background": 0, "whole tumor": [1, 2, 3], "tumor core": [2, 3], "enhancing tumor": 3}
ROTATION = (-np.pi / 6, np.pi / 6)  # nnU-Net's for patches that are not flat

STOCK_LOADING, OUR_LOADING = "nnU-Net, loading alone", "draw first, loading alone"
STOCK, OURS = "nnU-Net, loading and augmentation", "draw first, loading and augmentation"
LOADING_LIMIT, SAMPLE_LIMIT = 0.3, 1.1
STATED_FOR = "Limits are stated for one thread of a CPU, patches of 128^3 and cases of BraTS's size."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--patch", type=positive, nargs=3, default=(128, 128, 128), metavar="SIZE", help="voxels (default: 128 128 128)"
    )
    parser.add_argument(
        "--shape",
        type=positive,
        nargs=3,
        default=(140, 171, 140),
        metavar="SIZE",
        help="of the cases after cropping, voxels (default: 140 171 140, BraTS's)",
    )
    parser.add_argument("--channels", type=positive, default=4, metavar="N", help="of images (default: %(default)s)")
    parser.add_argument("--cases", type=positive, default=4, metavar="N", help="(default: %(default)s)")
    parser.add_argument(
        "--workers",
        type=positive,
        nargs="+",
        default=[],
        metavar="N",
        help="also measure how fast N worker processes deliver batches of 2 (default: do not)",
    )
    parser.add_argument(
        "--trainers",
        nargs="+",
        default=[],
        metavar="NAME",
        help="also time epochs of nnUNetv2_train with each, for each number of workers "
        f"(for example {' '.join(epochs.TRAINERS)}; default: none)",
    )
    parser.add_argument(
        "--epochs",
        type=positive,
        nargs=3,
        default=(3, 250, 50),
        metavar="N",
        help="epochs (the first does not count), and training and validation iterations of each "
        "(default: 3 250 50; nnU-Net has 250 50)",
    )
    add_turns(parser, rounds=40, warmup=2)


def pipeline(patch: tuple[int, ...]) -> ComposeTransforms:
    """Return nnU-Net's pipeline for three regions, in up to six scales."""
    scales = [[0.5**level] * 3 for level in range(6) if min(patch) >= 2**level]
    return nnUNetTrainer.get_training_transforms(
        patch, ROTATION, scales, (0, 1, 2), False, regions=[[1, 2, 3], [2, 3], [3]]
    )


@contextmanager
def preprocessed(patch: tuple[int, ...], shape: tuple[int, ...], channels: int, cases: int) -> Iterator[Path]:
    """Provide a temporary preprocessed data set of synthetic cases, and yield the folder of the cases."""
    blocks, chunks = comp_blosc2_params((channels, *shape), patch)
    task = Task(patch, 2, channels, 3, 3)
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root, epochs.DATASET, epochs.data_identifier(task))
        folder.mkdir(parents=True)
        dataset = {"labels": REGIONS, "regions_class_order": [1, 2, 3], "file_ending": ".nii.gz"}
        dataset["channel_names"] = {str(channel): f"channel {channel}" for channel in range(channels)}
        epochs.write_plans(folder.parent, task, dataset, [f"case_{number}" for number in range(cases)])
        for number in range(cases):
            images, annotation = make_phantom(shape, number)
            image = np.stack([images[channel % len(images)] for channel in range(channels)]).astype(np.float32)
            image = (image - image.mean()) / image.std()
            annotation = annotation.astype(np.int8)[None]
            locations = {region: np.argwhere(np.isin(annotation, region))[::10] for region in ((1, 2, 3), (2, 3), (3,))}
            nnUNetDatasetBlosc2.save_case(
                image, annotation, {"class_locations": locations}, str(folder / f"case_{number}"), chunks, blocks
            )
        yield folder


class Turns:
    """A contender; all contenders draw the same random numbers in a round.

    Args:
        call: Function to time; its result is ignored.
        device: Device that does the work.
    """

    def __init__(self, call: Callable[[], Any], device: torch.device) -> None:
        self.call, self.device = call, device
        self.turn = 0

    def __call__(self) -> Phases:
        np.random.seed(self.turn)
        torch.manual_seed(self.turn)
        self.turn += 1
        before = time.process_time()
        self.call()
        return {"processor": time.process_time() - before}


class OnDevice(Turns):
    """Loading on the CPU and augmentation on a GPU, timed as two phases."""

    def __init__(self, loader: DrawFirstLoader, device: torch.device) -> None:
        super().__init__(lambda: None, device)
        self.loader = loader

    def __call__(self) -> Phases:
        batch: dict[str, Any] = {}
        self.call = lambda: batch.update(next(self.loader))
        phases = super().__call__()
        torch.cuda.synchronize()
        before = time.perf_counter()
        finish(batch, self.loader.pipeline, self.device)
        torch.cuda.synchronize()
        return phases | {"device": time.perf_counter() - before}


def megabytes(batch: dict[str, Any]) -> float:
    """Return the size in MB of the tensors that leave a worker."""
    parts = batch.get("samples", [batch])
    tensors = [value for part in parts for name in part for value in _tensors(part[name])]
    return sum(tensor.nbytes for tensor in tensors) / 1e6


def _tensors(value: Any) -> list[torch.Tensor]:
    return [one for one in (value if isinstance(value, list) else [value]) if isinstance(one, torch.Tensor)]


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure loading and augmentation and return the report."""
    if arguments.trainers and not arguments.workers:
        raise BenchmarkError("--trainers needs --workers: epochs are timed for each number of worker processes.")
    if arguments.epochs[0] < 2:
        raise BenchmarkError("--epochs must begin with 2 or more: the first epoch does not count.")
    device, patch = arguments.device, tuple(arguments.patch)
    about = machine.describe(device)
    initial = [int(extent) for extent in get_patch_size(patch, ROTATION, ROTATION, ROTATION, (0.85, 1.25))]
    manager = LabelManager(REGIONS, regions_class_order=[1, 2, 3])
    with preprocessed(patch, tuple(arguments.shape), arguments.channels, arguments.cases) as folder:

        def stock(transforms: ComposeTransforms | None, batch_size: int = 1) -> nnUNetDataLoader:
            dataset = nnUNetDatasetBlosc2(str(folder))
            return nnUNetDataLoader(dataset, batch_size, initial, patch, manager, 0.33, transforms=transforms)

        def ours(batch_size: int = 1) -> DrawFirstLoader:
            return DrawFirstLoader.of(stock(None, batch_size), DevicePipeline(pipeline(patch)))

        loading, whole, alone = stock(None), stock(pipeline(patch)), ours()
        other = ours()
        runs: dict[str, Turns] = {
            STOCK_LOADING: Turns(lambda: next(loading), device),
            OUR_LOADING: Turns(lambda: next(alone), device),
            STOCK: Turns(lambda: next(whole), device),
            OURS: OnDevice(other, device)
            if device.type == "cuda"
            else Turns(lambda: finish(next(other), other.pipeline, device), device),
        }
        # on first use, blurs time two methods to choose one, which is not part of the cost of a sample
        _let_blurs_choose(whole, patch)
        times = in_turn(dict(runs), arguments.rounds, arguments.warmup)
        sent = {}
        for name, loader in ((STOCK, whole), (OURS, other)):
            sent[name] = float(np.mean([megabytes(next(loader)) for _ in range(max(4, arguments.rounds // 4))]))
        rates = {
            workers: {
                STOCK: _delivery(stock(pipeline(patch), 2), None, device, workers),
                OURS: _delivery(ours(2), device, device, workers),
            }
            for workers in arguments.workers
        }
        trained = epochs.measure(folder.parent.parent, arguments.trainers, arguments.workers, device, arguments.epochs)
    means = {
        name: {phase: float(np.mean([p[phase] for p in phases])) for phase in phases[0]}
        for name, phases in times.items()
    }
    ratios = [
        Ratio("loading alone", *_ratio(times, OUR_LOADING, STOCK_LOADING), LOADING_LIMIT),
        Ratio("loading alone / nnU-Net's loading and augmentation", *_ratio(times, OUR_LOADING, STOCK)),
    ]
    if device.type == "cpu":
        ratios.append(Ratio("loading and augmentation", *_ratio(times, OURS, STOCK), SAMPLE_LIMIT))
    ratios += epochs.ratios(trained) if trained else []
    return {
        "benchmark": "data",
        "title": f"Patch {patch[0]} x {patch[1]} x {patch[2]}, {arguments.channels} channels, 3 regions, cases of "
        f"{' x '.join(map(str, arguments.shape))}; means of {arguments.rounds} samples",
        "machine": about,
        "rounds": arguments.rounds,
        "warmup": arguments.warmup,
        "seconds": means,
        "megabytes_sent": sent,
        "batches_of_2_per_second": rates,
        "epochs": trained,
        "iterations": arguments.epochs[1],
        "ratios": ratios_as_json(ratios),
    }


def _let_blurs_choose(loader: nnUNetDataLoader, patch: tuple[int, ...]) -> None:
    for transform in loader.transforms.transforms:
        inner = getattr(transform, "transform", None)
        if hasattr(inner, "benchmark_use_fft"):
            for sigma in (0.5, 0.75, 1.0):
                for axis in range(3):
                    inner._benchmark_wrapper(torch.zeros(1, *patch), sigma, axis)


def _ratio(times: dict[str, list[Phases]], one: str, other: str) -> tuple[float, None]:
    return float(np.sum(totals(times[one])) / np.sum(totals(times[other]))), None


def _delivery(
    loader: nnUNetDataLoader, augment_on: torch.device | None, device: torch.device, workers: int, batches: int = 20
) -> float:
    """Return the number of batches per second that arrive on the device."""
    on_cuda = device.type == "cuda"
    source = NonDetMultiThreadedAugmenter(loader, None, workers, max(3, workers // 2), None, on_cuda, 0.002)
    source._start()
    made: Any = source if augment_on is None else DeviceBatches(source, loader.pipeline, augment_on)
    for _ in range(2 * max(3, workers // 2) + workers):  # batches that were prepared in advance
        next(made)
    start = time.perf_counter()
    for _ in range(batches):
        batch = next(made)
        batch["data"].to(device, non_blocking=True)
    if on_cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    (source._finish if made is source else made.close)()
    return batches / seconds


def as_table(report: dict[str, Any]) -> str:
    """Format the report as text."""
    rows = []
    for name, phases in report["seconds"].items():
        on_device = f"{1000 * phases['device']:.1f}" if "device" in phases else ""
        sent = report["megabytes_sent"].get(name)
        rows.append([name, f"{1000 * phases['processor']:.0f}", on_device, "" if sent is None else f"{sent:.0f}"])
    parts = [table(["a sample", "processor, ms", "device, ms", "sent, MB"], rows)]
    rates = report["batches_of_2_per_second"]
    if rates:
        rows = [[str(workers), *(f"{found[name]:.2f}" for name in (STOCK, OURS))] for workers, found in rates.items()]
        parts.append(table(["workers", "nnU-Net, batches of 2 a second", "draw first"], rows))
    if report["epochs"]:
        parts.append(epochs.as_table(report["epochs"], report["iterations"]))
    cores = f"{os.cpu_count()} cores; augmentation of the last contender on {report['machine']['device']}."
    return as_text(report, *parts, f"{STATED_FOR} {cores}", ratio_table(report["ratios"]))
