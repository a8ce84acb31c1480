"""Description of the machine and the software of a benchmark."""

from __future__ import annotations

import os
import platform
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import nnunet_conres
from nnunet_conres.trainers.precision import cpu_has_bfloat16

_PACKAGES = ("nnunetv2", "dynamic-network-architectures", "batchgeneratorsv2", "numpy", "SimpleITK")


def describe(device: torch.device) -> dict[str, Any]:
    """Return processor, threads, load, GPU, versions and date, as JSON types.

    Args:
        device: Device that does the work.
    """
    versions: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__}
    versions |= {package: version(package) for package in _PACKAGES}
    versions["nnunet-conres"] = nnunet_conres.__version__
    description: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": _load(),
        "bfloat16_in_hardware": cpu_has_bfloat16(),
        "device": device.type,
        "versions": versions,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        description["gpu"] = properties.name
        description["gpu_memory"] = properties.total_memory
        versions |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    return description


def in_a_line(machine: dict[str, Any]) -> str:
    """Format the description as one line."""
    versions = machine["versions"]
    parts = [machine["processor"], f"{machine['threads']} of {machine['cores']} cores"]
    if "gpu" in machine:
        parts.insert(0, machine["gpu"])
    if machine["load"] is not None:
        parts.append(f"load {machine['load']:.1f} before")
    parts += [f"{name} {versions[name]}" for name in ("torch", "nnunetv2", "nnunet-conres")]
    return ", ".join([*parts, machine["date"]])


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _load() -> float | None:
    """Return the load average of the last minute, which is that of other processes: this one has just started."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None
