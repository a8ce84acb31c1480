"""Mixed precision of training steps on a CPU; on CUDA nnU-Net has its own."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_conres.architectures.blocks import stage_sizes
from nnunet_conres.nnunet import switch_from_environment
from nnunet_conres.plans.entries import stages_of

# Set to 0, false or f to train in float32 on a CPU.
CPU_BFLOAT16_VARIABLE = "nnUNet_conres_cpu_bf16"


def cpu_has_bfloat16() -> bool:
    """Return whether this processor multiplies bfloat16 matrices in hardware (AMX or AVX-512 BF16)."""
    return cpu_has_amx() or _cpu_has("avx512_bf16", "_is_avx512_bf16_supported")


def cpu_has_amx() -> bool:
    """Return whether this processor multiplies bfloat16 matrices in tiles (AMX)."""
    return _cpu_has("amx_bf16", "_is_amx_tile_supported")


def _cpu_has(capability: str, check: str) -> bool:
    if hasattr(torch.cpu, "get_capabilities"):
        return bool(torch.cpu.get_capabilities().get(capability))
    # Releases of torch before get_capabilities have private functions for these checks.
    return bool(getattr(torch.cpu, check, lambda: False)())


def bfloat16_gradients_are_wrong(depths: Sequence[int], kernel_depths: Sequence[int]) -> bool:
    """Return whether gradients of some convolution's weights may be NaN in bfloat16 on this processor.

    oneDNN's kernels for AVX-512 without AMX seem to read uninitialised memory and multiply it by 0, in convolutions
    whose kernel is longer along the first axis than the input. Seen with PyTorch 2.14 and oneDNN 3.12: depth 2 with
    kernels of 3, depths 3 and 4 with kernels of 5.

    Args:
        depths: Sizes of the feature maps along the patch's first axis, one per stage.
        kernel_depths: Kernel sizes along that axis, one per stage.
    """
    if cpu_has_amx():
        return False
    return any(1 < depth < kernel for depth, kernel in zip(depths, kernel_depths, strict=True))


def wants_cpu_bfloat16() -> bool:
    """Return False if the environment variable ``nnUNet_conres_cpu_bf16`` turns off bfloat16 steps."""
    return switch_from_environment(CPU_BFLOAT16_VARIABLE) is not False


def training_precision(device: torch.device) -> str:
    """Return the name of a training step's arithmetic: nnU-Net's own on CUDA, that of ``cpu_autocast`` elsewhere."""
    if device.type == "cuda":
        return "float16 mixed"
    return "bfloat16 mixed" if isinstance(cpu_autocast(device), torch.autocast) else "float32"


def cpu_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Return the context of a training or validation step.

    Args:
        device: Device of the training.

    Returns:
        bfloat16 autocast on a CPU that has it in hardware, unless turned off; otherwise a context that does nothing
        (nnU-Net opens its own on CUDA).
    """
    if device.type == "cpu" and cpu_has_bfloat16() and wants_cpu_bfloat16():
        return torch.autocast("cpu", dtype=torch.bfloat16)
    return nullcontext()


class CpuPrecisionTrainer(nnUNetTrainer):
    """nnU-Net's trainer, with steps in bfloat16 on a CPU that has it in hardware.

    Attributes:
        training_precision: Name of the steps' arithmetic; nnU-Net writes it to debug.json, for comparisons.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.training_precision = self._precision()

    def _precision(self) -> str:
        precision = training_precision(self.device)
        if self.device.type != "cpu" or precision == "float32":
            return precision
        strides, kernel_sizes = stages_of(self.configuration_manager)
        depths = [size[0] for size in stage_sizes(self.configuration_manager.patch_size, strides)]
        kernels = [kernel[0] for kernel in kernel_sizes]
        if not bfloat16_gradients_are_wrong(depths, kernels):
            return precision
        self.print_to_log_file(
            f"This processor's bfloat16 convolutions are not reliable where a kernel is deeper than its input, as in "
            f"this network (depths {depths}, kernels {kernels}): training in float32."
        )
        return "float32"

    def _autocast(self) -> AbstractContextManager[object]:
        return nullcontext() if self.training_precision == "float32" else cpu_autocast(self.device)

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        with self._autocast():
            return super().train_step(batch)

    def validation_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        with self._autocast():
            return super().validation_step(batch)
