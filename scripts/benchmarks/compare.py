"""Comparison of models whose scores are cached: time, memory and size of the report.

The command runs twice, in separate processes, on the same synthetic cross-validation. The first run fills the cache.
The second run is the result; its time includes the start of the interpreter.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK
import torch

from benchmarks import machine
from benchmarks.arguments import positive
from benchmarks.report import as_text, table
from benchmarks.timing import BenchmarkError
from nnunet_conres.datasets.phantom import MODALITIES, make_phantom

DATASET, FOLDS, EPOCHS = "Dataset999_Synthetic", 5, 1000
CHANNELS = {str(number): modality for number, modality in enumerate(MODALITIES)}
LABELS = {"background": 0, "whole tumor": [1, 2, 3], "tumor core": [2, 3], "enhancing tumor": 3}

# Starts a command and measures it. On Linux, the memory of a process includes that of the process that started it, so
# the launcher has to be small.
_LAUNCHER = """
import json, resource, subprocess, sys, time
began = time.perf_counter()
code = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps([time.perf_counter() - began, used.ru_utime + used.ru_stime, used.ru_maxrss]))
sys.exit(code)
"""

# Further cases are hard links to these; the timing does not depend on this.
_DIFFERENT_CASES = 8
_STAGES = 6


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cases", type=positive, default=50, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--models", type=positive, default=4, metavar="N", help="(default: %(default)s)")
    parser.add_argument(
        "--shape",
        type=positive,
        nargs=3,
        default=(240, 240, 155),
        metavar="N",
        help="voxels of each image along x, y, z (default: those of BraTS, 240 240 155)",
    )
    parser.add_argument("--folder", type=Path, metavar="FOLDER", help="put the data into a new folder within this one")


def write_data(folder: Path, cases: int, models: int, shape: tuple[int, int, int]) -> list[str]:
    """Write raw data and trained models.

    Returns:
        The models, as arguments of -tr.
    """
    raw, results = folder / "raw" / DATASET, folder / "results" / DATASET
    for name in (raw / "imagesTr", raw / "labelsTr", folder / "preprocessed"):
        name.mkdir(parents=True)
    dataset_json = {
        "name": DATASET,
        "channel_names": CHANNELS,
        "labels": LABELS,
        "regions_class_order": [1, 2, 3],
        "numTraining": cases,
        "file_ending": ".nii.gz",
    }
    (raw / "dataset.json").write_text(json.dumps(dataset_json))
    images, labels = make_phantom(shape[::-1], 0)
    labels = np.array([0, 2, 1, 0, 3], np.uint8)[labels]
    different = min(cases, _DIFFERENT_CASES)
    for channel, image in enumerate(images):
        _write(image, _copies(raw / "imagesTr", f"_{channel:04d}", range(cases)))
    for number in range(different):
        shifted = np.roll(labels, number, axis=2)
        _write(shifted, _copies(raw / "labelsTr", "", range(number, cases, different)))
    for model in range(models):
        trained = results / f"nnUNetTrainer__plans{model}__3d_fullres"
        for fold in range(FOLDS):
            (trained / f"fold_{fold}" / "validation").mkdir(parents=True)
        for number in range(different):
            predicted = np.roll(labels, (1 + number % (model + 2), number + model), axis=(1, 2))
            paths = [
                trained / f"fold_{case % FOLDS}" / "validation" / f"case_{case:04d}.nii.gz"
                for case in range(number, cases, different)
            ]
            _write(predicted, paths)
        (trained / "dataset.json").write_text(json.dumps(dataset_json))
        (trained / "plans.json").write_text(json.dumps(_plans(f"plans{model}")))
        for fold in range(FOLDS):
            _write_training(trained / f"fold_{fold}", [f"case_{case:04d}" for case in range(fold, cases, FOLDS)])
    return [f"{chr(ord('A') + model)}=nnUNetTrainer:plans{model}" for model in range(models)]


def _copies(folder: Path, channel: str, cases: range) -> list[Path]:
    return [folder / f"case_{case:04d}{channel}.nii.gz" for case in cases]


def _write(voxels: np.ndarray, paths: list[Path]) -> None:
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(voxels), str(paths[0]), True)
    for path in paths[1:]:
        os.link(paths[0], path)


def _write_training(fold: Path, cases: list[str]) -> None:
    """Write the files of a training and its validation that a comparison reads."""
    listed = [{"prediction_file": str(fold / "validation" / f"{case}.nii.gz")} for case in cases]
    (fold / "validation" / "summary.json").write_text(json.dumps({"metric_per_case": listed}))
    falling = [float(value) for value in np.exp(-np.arange(EPOCHS) / 200)]
    logging = {
        "train_losses": falling,
        "val_losses": falling,
        "ema_fg_dice": falling,
        "dice_per_class_or_region": [[np.float32(value)] * 3 for value in falling],
        "epoch_start_timestamps": [100.0 * epoch for epoch in range(EPOCHS)],
        "epoch_end_timestamps": [100.0 * epoch + 90 for epoch in range(EPOCHS)],
    }
    weights = {f"layer {number}": torch.zeros(1_000_000) for number in range(30)}
    torch.save({"network_weights": weights, "logging": logging}, fold / "checkpoint_final.pth")
    (fold / "debug.json").write_text(json.dumps({"device": "cuda:0", "gpu_name": "synthetic"}))
    line = "2026-01-01 10:00:00.000000: Epoch {} \n"
    (fold / "training_log_2026_1_1_10_00_00.txt").write_text("".join(line.format(epoch) for epoch in range(EPOCHS)))


def _plans(name: str) -> dict[str, Any]:
    """Return nnU-Net's plans for BraTS."""
    arguments = {
        "n_stages": _STAGES,
        "features_per_stage": [32, 64, 128, 256, 320, 320],
        "conv_op": "torch.nn.modules.conv.Conv3d",
        "kernel_sizes": [[3, 3, 3]] * _STAGES,
        "strides": [[1, 1, 1]] + [[2, 2, 2]] * (_STAGES - 1),
        "n_conv_per_stage": [2] * _STAGES,
        "n_conv_per_stage_decoder": [2] * (_STAGES - 1),
        "conv_bias": True,
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
        "norm_op_kwargs": {"eps": 1e-05, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }
    architecture = {
        "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
        "arch_kwargs": arguments,
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }
    configuration = {
        "data_identifier": f"{name}_3d_fullres",
        "batch_size": 2,
        "patch_size": [128, 128, 128],
        "spacing": [1.0, 1.0, 1.0],
        "architecture": architecture,
    }
    return {
        "dataset_name": DATASET,
        "plans_name": name,
        "image_reader_writer": "SimpleITKIO",
        "label_manager": "LabelManager",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": {"3d_fullres": configuration},
    }


def measured(command: list[str], environment: dict[str, str]) -> dict[str, float]:
    """Run a command and return its wall time and processor time in s, and its peak memory in bytes.

    Raises:
        BenchmarkError: The command failed.
    """
    launched = [sys.executable, "-c", _LAUNCHER, *command]
    process = subprocess.run(launched, env=environment, capture_output=True, text=True, check=False)
    if process.returncode != 0:
        raise BenchmarkError(f"nnunet-conres compare failed: {process.stderr}")
    seconds, processor_seconds, memory = json.loads(process.stdout)
    unit = 1 if sys.platform == "darwin" else 1024
    return {"seconds": seconds, "processor_seconds": processor_seconds, "memory_bytes": memory * unit}


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure both runs and return the report."""
    if min(arguments.shape) < 16:
        raise BenchmarkError(f"--shape must be at least 16 16 16, got {' '.join(map(str, arguments.shape))}.")
    if arguments.folder is not None and not arguments.folder.is_dir():
        raise BenchmarkError(f"--folder {arguments.folder} does not exist.")
    about = machine.describe(arguments.device)
    runs = {}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        folder = Path(temporary)
        models = write_data(folder, arguments.cases, arguments.models, tuple(arguments.shape))
        environment = {f"nnUNet_{name}": str(folder / name) for name in ("raw", "preprocessed", "results")}
        command = [sys.executable, "-m", "nnunet_conres.cli", "compare", "-d", DATASET, "-tr", *models, "-np", "1"]
        for name in ("first run", "all scores cached"):
            runs[name] = measured([*command, "-o", str(folder / "compared")], {**os.environ, **environment})
        size = (folder / "compared" / "report.html").stat().st_size
    shape = " x ".join(map(str, arguments.shape))
    return {
        "benchmark": "compare",
        "title": f"{arguments.cases} cases of {shape} voxels, {arguments.models} models; report.html: "
        f"{size / 1e6:.1f} MB",
        "machine": about,
        "cases": arguments.cases,
        "models": arguments.models,
        "shape": list(arguments.shape),
        "report_bytes": size,
        "contenders": runs,
    }


def as_table(report: dict[str, Any]) -> str:
    """Format the report as text."""
    rows = [
        [name, f"{run['seconds']:.1f}", f"{run['processor_seconds']:.1f}", f"{run['memory_bytes'] / 1e6:.0f}"]
        for name, run in report["contenders"].items()
    ]
    return as_text(report, table(["", "s", "processor s", "MB"], rows))
