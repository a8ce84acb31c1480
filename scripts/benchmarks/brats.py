"""Conversion of a BraTS folder, with checks, against rewriting all files and against nnU-Net's own script.

All contenders read the same synthetic cases. Each conversion writes a separate data set folder, which is removed
afterwards. The files are in the page cache for all contenders.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import SimpleITK
import torch
from nnunetv2.dataset_conversion.Dataset137_BraTS21 import copy_BraTS_segmentation_and_convert_labels_to_nnUNet

from benchmarks import machine
from benchmarks.arguments import add_turns, positive
from benchmarks.report import as_text, ratio_table, ratios_as_json, table
from benchmarks.timing import BenchmarkError, Clock, Phases, Ratio, in_turn, spread, totals
from nnunet_conres.datasets.brats_check import check_case
from nnunet_conres.datasets.brats_find import find_cases
from nnunet_conres.datasets.phantom import MODALITIES, write_brats_phantoms

OURS, OURS_ALONE, CHECKS = "brats-convert", "brats-convert, 1 process", "its checks alone, 1 process"
EVERYTHING, SCRIPT = "read and write everything, 1 process", "nnU-Net's Dataset137_BraTS21, 1 process"

# (name, contestant, reference, contestant / reference at most)
TARGETS = (
    # nnU-Net's scripts for BraTS run in one process.
    ("brats-convert / read and write everything", OURS, EVERYTHING, 0.3),
    ("the same, both in 1 process", OURS_ALONE, EVERYTHING, None),
    ("brats-convert / nnU-Net's script", OURS, SCRIPT, None),
)

# Further cases are copies of these under other names; the timing does not depend on this.
_DIFFERENT_CASES = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cases", type=positive, default=285, metavar="N", help="(default: %(default)s)")
    parser.add_argument(
        "--shape",
        type=positive,
        nargs=3,
        default=(96, 96, 64),
        metavar="N",
        help="voxels of each along x, y, z; BraTS has 240 240 155 (default: 96 96 64)",
    )
    parser.add_argument(
        "--processes",
        type=positive,
        default=2,
        metavar="N",
        help="of brats-convert (default: %(default)s)",
    )
    parser.add_argument("--folder", type=Path, metavar="FOLDER", help="put the data into a new folder within this one")
    add_turns(parser, rounds=3, warmup=1)


def write_cases(folder: Path, cases: int, shape: tuple[int, int, int]) -> None:
    """Write synthetic cases in BraTS 2018's layout; a few different cases repeat in turn."""
    made = write_brats_phantoms(
        folder / "made", training_cases=min(cases, _DIFFERENT_CASES), held_out_cases=0, shape=shape
    )
    sources = [made.training / "HGG" / case_id for case_id in made.training_ids]
    for number in range(cases):
        source = sources[number % len(sources)]
        case_id = f"Brats18_MADE_{number:03d}_1"
        target = folder / "cases" / "HGG" / case_id
        target.mkdir(parents=True)
        for path in source.iterdir():
            shutil.copyfile(path, target / path.name.replace(source.name, case_id))


def rewrite_case(job: tuple[Path, Path]) -> None:
    """Read every file of a case with SimpleITK and write it again; nnU-Net's own function maps the labels."""
    case, dataset = job
    for channel, modality in enumerate(MODALITIES):
        image = SimpleITK.ReadImage(str(case / f"{case.name}_{modality}.nii.gz"))
        SimpleITK.WriteImage(image, str(dataset / "imagesTr" / f"{case.name}_{channel:04d}.nii.gz"))
    _rewrite_labels(case, dataset)


def copy_case(job: tuple[Path, Path]) -> None:
    """Copy the images and map the labels, as nnU-Net's script does in one process; it checks labels only."""
    case, dataset = job
    for channel, modality in enumerate(MODALITIES):
        target = dataset / "imagesTr" / f"{case.name}_{channel:04d}.nii.gz"
        shutil.copy(case / f"{case.name}_{modality}.nii.gz", target)
    _rewrite_labels(case, dataset)


def _rewrite_labels(case: Path, dataset: Path) -> None:
    target = dataset / "labelsTr" / f"{case.name}.nii.gz"
    copy_BraTS_segmentation_and_convert_labels_to_nnUNet(str(case / f"{case.name}_seg.nii.gz"), str(target))


class Turns:
    """A contender that converts all cases into a new folder, created before and removed after the timed part.

    Args:
        convert: Converts all cases into the folder that is passed to it.
        folder: Parent of that folder.
    """

    def __init__(self, convert: Callable[[Path], object], folder: Path) -> None:
        self.convert = convert
        self.folder = folder

    def __call__(self) -> Phases:
        with tempfile.TemporaryDirectory(dir=self.folder) as raw:
            clock = Clock(torch.device("cpu"))
            self.convert(Path(raw))
            clock.lap("convert")
        return clock.seconds()


def contestants(source: Path, processes: int) -> Mapping[str, Callable[[Path], object]]:
    """Return the timed conversions, by name. The time of our own command includes the start of the interpreter."""
    folders = sorted((source / "HGG").iterdir())

    def each(convert_case: Callable[[tuple[Path, Path]], None]) -> Callable[[Path], object]:
        def run(raw: Path) -> None:
            for name in ("imagesTr", "labelsTr"):
                (raw / name).mkdir()
            for folder in folders:
                convert_case((folder, raw))

        return run

    def command(processes: int) -> Callable[[Path], object]:
        def run(raw: Path) -> None:
            line = [sys.executable, "-m", "nnunet_conres.cli", "brats-convert", "-i", str(source), "-d", "501"]
            folders = {f"nnUNet_{name}": str(raw) for name in ("raw", "preprocessed", "results")}
            subprocess.run(
                [*line, "-np", str(processes)], env={**os.environ, **folders}, check=True, capture_output=True
            )

        return run

    return {
        OURS: command(processes),
        OURS_ALONE: command(1),
        CHECKS: lambda _: [check_case(case) for case in find_cases([source]).cases],
        EVERYTHING: each(rewrite_case),
        SCRIPT: each(copy_case),
    }


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure conversions and return the report."""
    if min(arguments.shape) < 16:
        raise BenchmarkError(f"--shape must be at least 16 16 16, got {' '.join(map(str, arguments.shape))}.")
    if arguments.device.type != "cpu":
        raise BenchmarkError("Conversion runs on the CPU. Use --device cpu.")
    if arguments.folder is not None and not arguments.folder.is_dir():
        raise BenchmarkError(f"--folder {arguments.folder} does not exist.")
    about = machine.describe(arguments.device)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        folder = Path(temporary)
        write_cases(folder, arguments.cases, tuple(arguments.shape))
        size = sum(path.stat().st_size for path in (folder / "cases").rglob("*.nii.gz"))
        runs = {
            name: Turns(convert, folder) for name, convert in contestants(folder / "cases", arguments.processes).items()
        }
        times = in_turn(dict(runs), arguments.rounds, arguments.warmup)
    seconds = {name: totals(phases) for name, phases in times.items()}
    ratios = [
        Ratio.median_of_rounds(name, seconds[contestant], seconds[reference], limit)
        for name, contestant, reference, limit in TARGETS
    ]
    shape = " x ".join(map(str, arguments.shape))
    processes = "1 process" if arguments.processes == 1 else f"{arguments.processes} processes"
    return {
        "benchmark": "brats",
        "title": f"{arguments.cases} cases of {shape} voxels, {size / 1e6:.0f} MB, {processes}; medians of "
        f"{arguments.rounds} rounds",
        "machine": about,
        "cases": arguments.cases,
        "shape": list(arguments.shape),
        "bytes": size,
        "processes": arguments.processes,
        "rounds": arguments.rounds,
        "warmup": arguments.warmup,
        "contenders": {name: {"seconds": spread(values)} for name, values in seconds.items()},
        "ratios": ratios_as_json(ratios),
    }


def as_table(report: dict[str, Any]) -> str:
    """Format the report as text."""
    rows = [
        [name, f"{entry['seconds']['median']:.2f}", f"{1000 * entry['seconds']['median'] / report['cases']:.0f}"]
        for name, entry in report["contenders"].items()
    ]
    return as_text(report, table(["", "s", "ms per case"], rows), ratio_table(report["ratios"]))
