"""Memory of training steps: measured by execution on fake tensors, and interpolated between executions."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nnunet_conres.augmentation.on_device import device_memory
from nnunet_conres.errors import InputError
from nnunet_conres.planning.tracker import Measurement, measure_batches
from nnunet_conres.planning.training_step import TrainingStep
from nnunet_conres.plans.entries import stride_products
from nnunet_conres.text import format_shape

# Memory that execution on fake tensors does not show: the kernels' workspace, 0 to 12 % of the peak at
# 128 x 128 x 128 on an H200 (docs/benchmarks.md); on a GPU also the CUDA context with its libraries, and gaps between
# PyTorch's blocks.
WORKSPACE_SHARE = 0.12
CUDA_CONTEXT = 500 * 2**20


class UntrainableError(InputError):
    """A training step can't be executed: the network does not fit its patch."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Memory of a training step in bytes.

    Attributes:
        parameters: Parameters and buffers of the network.
        gradients: Gradients of the parameters, at the end of backward.
        optimizer: State of the optimiser.
        batch: Images and annotations.
        activations: Memory kept for backward at the end of the loss, by the module that allocated it.
        loss: Memory that the loss keeps for backward in addition.
        peak: Maximum at any moment.
        workspace: Allowance for memory that the executed step does not show: kernels' workspace, gaps in the
            allocator, the CUDA context, augmentation on the device.
    """

    parameters: int
    gradients: int
    optimizer: int
    batch: int
    activations: Mapping[str, int]
    loss: int
    peak: int
    workspace: int

    @property
    def total(self) -> int:
        """Peak plus workspace."""
        return self.peak + self.workspace


def estimate_memory(step: TrainingStep) -> MemoryEstimate:
    """Estimate the memory of a training step by executing it once.

    The optimiser already has its state, as from the second step on.

    Args:
        step: The training step.

    Raises:
        UntrainableError: The step can't be executed.
    """
    (measured,) = _execute(step, [step.batch_size])
    activations = dict(measured.kept)
    loss = activations.pop("loss", 0)
    return MemoryEstimate(
        parameters=measured.before["parameters"],
        gradients=measured.gradients,
        optimizer=measured.before.get("optimizer", 0),
        batch=measured.before["batch"],
        activations=activations,
        loss=loss,
        peak=measured.peak,
        workspace=_workspace(step, measured.peak),
    )


class MemoryModel:
    """Total memory of many training steps, from two executions per topology.

    The size of each tensor in a step is either constant or proportional to the voxels of the batch. The memory alive
    after each allocation is therefore constant + slope * voxels. Two batches of one patch give both values for every
    allocation. The maximum over all allocations is the peak for other batches, and for other patches that the network's
    strides divide.

    Args:
        progress: Called once per execution.
    """

    def __init__(self, progress: Callable[[], Any] = lambda: None) -> None:
        self._progress = progress
        self._moments: dict[str, _Moments] = {}
        self._executed: dict[str, int] = {}

    def total(self, step: TrainingStep) -> int:
        """Return peak plus workspace in bytes.

        Raises:
            UntrainableError: The topology can't be trained with this patch.
        """
        peak = self.peak(step)
        return peak + _workspace(step, peak)

    def peak(self, step: TrainingStep) -> int:
        """Return the maximum memory at any moment in bytes.

        Raises:
            UntrainableError: The topology can't be trained with this patch.
        """
        key = _key(step)
        if key in self._executed:
            return self._executed[key]
        topology = _topology_key(step)
        if topology not in self._moments:
            first, second = self._run(step, _BATCHES)
            self._moments[topology] = _Moments.between(first, second, _voxels(step))
        return self._moments[topology].peak(step.batch_size * _voxels(step))

    def execute(self, step: TrainingStep) -> int:
        """Return the total by executing this step. Later calls of `peak` and `total` use the result.

        Raises:
            UntrainableError: The step can't be executed.
        """
        key = _key(step)
        if key not in self._executed:
            self._executed[key] = self._run(step, [step.batch_size])[0].peak
        return self.total(step)

    def _run(self, step: TrainingStep, batch_sizes: Sequence[int]) -> list[Measurement]:
        measured = _execute(step, batch_sizes)
        for _ in measured:
            self._progress()
        return measured


_BATCHES = (2, 3)  # nnU-Net's smallest batch size, and the next


@dataclass(frozen=True)
class _Moments:
    """Bytes alive after every allocation of a step: constant + slope * voxels of the batch."""

    constant: NDArray[np.float64]
    slope: NDArray[np.float64]

    @classmethod
    def between(cls, first: Measurement, second: Measurement, patch_voxels: int) -> _Moments:
        low = first.live.astype(float)
        if first.n_backward == second.n_backward:
            # during the optimiser's update, batch and outputs are still alive
            more = np.full(len(low), float(second.after_backward - first.after_backward))
            more[: second.n_backward] = second.live - low[: second.n_backward]
        else:  # the executed operations depend on the batch
            low, more = low.max(keepdims=True), np.array([float(second.peak - first.peak)])
        per_patch = more / (_BATCHES[1] - _BATCHES[0])
        return cls(low - _BATCHES[0] * per_patch, per_patch / patch_voxels)

    def peak(self, voxels: int) -> int:
        return int((self.constant + self.slope * voxels).max())


def _execute(step: TrainingStep, batch_sizes: Sequence[int]) -> list[Measurement]:
    try:
        return measure_batches(step, batch_sizes)
    except (ValueError, RuntimeError) as error:
        network = str(step.architecture["network_class_name"]).rpartition(".")[2]
        raise UntrainableError(
            f"{step.trainer.__name__} can't train {network} with a patch of {format_shape(step.patch_size)} "
            f"voxels and a "
            f"batch of {batch_sizes[0]}: {str(error).strip().splitlines()[0] if str(error).strip() else repr(error)}"
        ) from error


def _workspace(step: TrainingStep, peak: int) -> int:
    return round(WORKSPACE_SHARE * peak) + (CUDA_CONTEXT if step.device == "cuda" else 0) + augmentation_memory(step)


def augmentation_memory(step: TrainingStep) -> int:
    """Return the memory of augmentation on the device in bytes; 0 if it runs on the CPU.

    It adds to the step's memory: augmentation runs in a separate stream, whose memory PyTorch does not reuse for the
    step.
    """
    if step.device != "cuda" or not getattr(step.trainer, "augments_on_device", False):
        return 0
    regions = step.labels.num_segmentation_heads + step.labels.has_ignore_label
    target_bytes = regions if step.labels.has_regions else 2
    return device_memory(step.patch_size, step.batch_size, step.input_channels, target_bytes)


def _voxels(step: TrainingStep) -> int:
    return math.prod(step.patch_size)


def _key(step: TrainingStep) -> str:
    return f"{_topology_key(step)} {tuple(step.patch_size)} {step.batch_size}"


def _topology_key(step: TrainingStep) -> str:
    """Return a key that is equal for steps whose memory depends only on the voxels of their batches."""
    labels = (step.labels.label_dict, step.labels.regions_class_order)
    key = [step.trainer.__name__, step.architecture, step.input_channels, labels, step.device, step.mixed_precision]
    if not _is_divisible(step):
        key.append(list(step.patch_size))  # each feature map is rounded up by a different amount
    return json.dumps(key, default=int)


def _is_divisible(step: TrainingStep) -> bool:
    divisors = stride_products(step.architecture, len(step.patch_size))
    return divisors is not None and not any(e % d for e, d in zip(step.patch_size, divisors, strict=True))
