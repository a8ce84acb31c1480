"""Epochs of nnUNetv2_train on preprocessed cases: time, GPU utilisation and memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.networks import CONFIGURATION, Task, stock_plans
from benchmarks.report import table
from benchmarks.timing import BenchmarkError, Ratio

DATASET = "Dataset998_Synthetic"
STOCK = "nnUNetTrainer"
TRAINERS = (STOCK, "nnUNetTrainerMuon", "nnUNetTrainerConResNet")
EPOCH_LIMIT, LEAST_BUSY = 0.35, 0.85

_TRAINERS_FOLDER = Path(__file__).parent / "epoch_trainers"
_TRAIN = "from nnunetv2.run.run_training import run_training_entry; run_training_entry()"


def data_identifier(task: Task) -> str:
    """Return the name of the folder of preprocessed cases within the folder of the data set."""
    return f"{stock_plans(task)['plans_name']}_{CONFIGURATION}"


def write_plans(folder: Path, task: Task, dataset_json: Mapping[str, Any], cases: Sequence[str]) -> None:
    """Write the files that nnUNetv2_train needs beside the cases: plans, labels, and folds (half for validation)."""
    plans = stock_plans(task) | {"dataset_name": folder.name, "image_reader_writer": "SimpleITKIO"}
    plans |= {"transpose_forward": [0, 1, 2], "transpose_backward": [0, 1, 2]}
    plans["configurations"][CONFIGURATION] |= {
        "data_identifier": data_identifier(task),
        "use_mask_for_norm": [False] * task.channels,
        "normalization_schemes": ["ZScoreNormalization"] * task.channels,
    }
    fold = {"train": list(cases[::2]), "val": list(cases[1::2])}
    content = {"nnUNetPlans": plans, "dataset": dataset_json, "splits_final": [fold], "dataset_fingerprint": {}}
    for name, value in content.items():
        (folder / f"{name}.json").write_text(json.dumps(value))


def measure(
    preprocessed: Path, trainers: Sequence[str], workers: Sequence[int], device: torch.device, epochs: Sequence[int]
) -> list[dict[str, Any]]:
    """Train with each trainer and each number of workers.

    Args:
        preprocessed: nnU-Net's folder of preprocessed data sets, `DATASET` among them.
        trainers: Names of trainers of nnU-Net or of this package.
        workers: Numbers of worker processes for the batches.
        device: Device to train on.
        epochs: Number of epochs, of which the first does not count, and training and validation iterations per epoch.

    Returns:
        For each training: ``trainer``, ``workers``, seconds of the ``epochs`` that count, share of the time in which
        the GPU was ``busy`` (None without a GPU), ``peak_bytes`` of tensors, and ``reserved_bytes``.

    Raises:
        BenchmarkError: A training failed.
    """
    return [_train(preprocessed, trainer, number, device, epochs) for number in workers for trainer in trainers]


def _train(
    preprocessed: Path, trainer: str, workers: int, device: torch.device, epochs: Sequence[int]
) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        output, log = Path(folder, "times.json"), Path(folder, "log.txt")
        environment = os.environ | {
            "nnUNet_raw": folder,
            "nnUNet_preprocessed": str(preprocessed),
            "nnUNet_results": folder,
            "nnUNet_extTrainer": str(_TRAINERS_FOLDER),
            "nnUNet_n_proc_DA": str(workers),
            "BENCHMARK_EPOCHS": " ".join(map(str, epochs)),
            "BENCHMARK_OUTPUT": str(output),
        }
        command = [sys.executable, "-c", _TRAIN, DATASET, CONFIGURATION, "0", "-tr", f"{trainer}_Timed"]
        with Utilisation(device) as utilisation, log.open("w") as file:
            status = subprocess.run(
                [*command, "-device", device.type], env=environment, stdout=file, stderr=subprocess.STDOUT, check=False
            ).returncode
        if status or not output.is_file():
            last = "\n".join(log.read_text().splitlines()[-15:])
            raise BenchmarkError(f"The training of {trainer} with {workers} workers failed:\n{last}")
        found = json.loads(output.read_text())
    counted = found.pop("epochs")[1:]
    return {
        "trainer": trainer,
        "workers": workers,
        "epochs": [end - start for start, end in counted],
        "busy": utilisation.share(counted[0][0], counted[-1][1]),
        **found,
    }


class Utilisation:
    """Polls nvidia-smi, while it is open, for the share of time in which the GPU executes anything."""

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._found: list[tuple[float, float]] = []

    def __enter__(self) -> Utilisation:
        if self._on_cuda:
            query = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "-lms", "200"]
            self._process = subprocess.Popen([*query, "-i", "0"], stdout=subprocess.PIPE, text=True)
            self._thread = threading.Thread(target=self._read, daemon=True)
            self._thread.start()
        return self

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._found.append((time.time(), float(line) / 100))

    def __exit__(self, *error: object) -> None:
        if self._on_cuda:
            self._process.terminate()
            self._process.wait()
            self._thread.join()

    def share(self, start: float, end: float) -> float | None:
        """Return the mean between two times, or None without a sample."""
        found = [share for when, share in self._found if start <= when <= end]
        return float(np.mean(found)) if found else None


def ratios(found: Sequence[Mapping[str, Any]]) -> list[Ratio]:
    """Return the ratios of epoch times to those of nnU-Net's trainer with the most workers."""
    most = max(entry["workers"] for entry in found)
    stock = [entry for entry in found if entry["trainer"] == STOCK and entry["workers"] == most]
    if not stock:
        return []
    return [
        Ratio.of_medians(
            f"epoch: {entry['trainer']}, {entry['workers']} workers / {STOCK}, {most} workers",
            entry["epochs"],
            stock[0]["epochs"],
            EPOCH_LIMIT if entry["trainer"] != STOCK else None,
        )
        for entry in found
        if entry is not stock[0]
    ]


def as_table(found: Sequence[Mapping[str, Any]], iterations: int) -> str:
    """Format epochs as a table."""
    rows = []
    for entry in found:
        seconds = float(np.median(entry["epochs"]))
        busy = "" if entry["busy"] is None else f"{100 * entry['busy']:.0f} %"
        peaks = [f"{entry[key] / 2**20:.0f}" for key in ("peak_bytes", "reserved_bytes")]
        numbers = [f"{seconds:.1f}", f"{1000 * seconds / iterations:.0f}", busy, *peaks]
        rows.append([entry["trainer"], str(entry["workers"]), *numbers])
    head = [
        "",
        "workers",
        "epoch, s",
        "an iteration, ms",
        f"GPU busy (at least {100 * LEAST_BUSY:.0f} %)",
        "peak MiB",
        "reserved MiB",
    ]
    return table(head, rows)
