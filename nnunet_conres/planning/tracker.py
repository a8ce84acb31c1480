"""Counts the memory of a training step by executing it on tensors without data.

Every operation of forward, loss, backward and optimiser is executed on fake tensors, which know shape and type only: a
patch that needs a large GPU is measured on any machine in seconds. The live storages are followed from creation to
release; what a kernel allocates inside itself is not seen.

Where the memory of a GPU is asked for, its autocast policy is applied to tensors that say they are on the CPU, because
PyTorch runs backward on fake CUDA tensors only where there is a CUDA device.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from nnunet_conres.planning.training_step import RunningStep, TrainingStep


@dataclass(frozen=True)
class Measurement:
    """Memory of live storages in bytes.

    Attributes:
        peak: The most at any moment of the step.
        before: Before the step: parameters, state of the optimiser and the batch.
        kept: Beyond that, at the end of forward and loss: what is kept for backward.
    """

    peak: int
    before: int
    kept: int


class LiveStorages(TorchDispatchMode):
    """Within, follows the storages that operations create.

    Attributes:
        current: Bytes alive now.
        peak: The most so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.current = self.peak = 0
        self._alive: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.native_group_norm_backward.default and output[0].dtype != args[1].dtype:
            # what it does with bfloat16 on a CPU; without data it is computed in other types
            output = (torch.empty_like(args[1]), *output[1:])
        tree_map_only(Tensor, self.add, output)
        return output

    def add(self, tensor: Tensor) -> None:
        """Follows the storage of a tensor from now on."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return
        self.current += size
        self.peak = max(self.peak, self.current)

        def gone(_: Any) -> None:
            self.current -= size
            del self._alive[key]

        self._alive[key] = weakref.ref(storage, gone)


# What CUDA's autocast runs in other types than the CPU's does, as far as our networks and losses use it.
_FLOAT32 = frozenset(
    {"group_norm", "interpolate", "softmax", "log_softmax", "sum", "exp", "log", "pow", "cross_entropy", "nll_loss"}
    | {"binary_cross_entropy_with_logits", "prod", "logsumexp"}
)
_HALF = frozenset({"prelu"})
_AS_THEY_COME = frozenset({"avg_pool3d", "pad"})


class CudaAutocast(TorchFunctionMode):
    """Within, autocast to float16 on a CPU gives every operation the types that CUDA's autocast gives it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if func is Tensor.backward:
            # As it does, but in this mode, for what is computed again: while a function is handled its mode is off.
            with self:
                _engine_run_backward(
                    args, (torch.ones_like(args[0]),), False, False, (), allow_unreachable=True, accumulate_grad=True
                )
            return None
        if torch.is_autocast_enabled("cpu"):
            if name in _FLOAT32:
                args, kwargs = tree_map_only(Tensor, _to_float32, (args, kwargs))
            elif name in _HALF:
                args, kwargs = tree_map_only(Tensor, _to_float16, (args, kwargs))
            elif name in _AS_THEY_COME:
                with torch.autocast("cpu", enabled=False):
                    return func(*args, **kwargs)
        return func(*args, **kwargs)


def _to_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype == torch.float16 else tensor


def _to_float16(tensor: Tensor) -> Tensor:
    return tensor.half() if tensor.dtype == torch.float32 else tensor


def measure_training_step(step: TrainingStep, *, fake: bool = True) -> Measurement:
    """Counts the memory of a training step.

    Args:
        step: What is trained, and how.
        fake: Whether to execute on tensors without data; otherwise the step is really taken, on the CPU.

    Returns:
        Memory of the second step, when the optimiser has its state.
    """
    with contextlib.ExitStack() as stack:
        if fake:
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        running = RunningStep(step, torch.device("cpu"))
        live = LiveStorages()
        for tensor in running.tensors():
            live.add(tensor)
        before = live.current
        stack.enter_context(live)
        if step.device == "cuda":
            stack.enter_context(CudaAutocast())
        kept = running.run(_autocast(step), lambda: live.current - before)
        return Measurement(peak=live.peak, before=before, kept=kept)


def _autocast(step: TrainingStep) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    if not step.mixed_precision:
        return contextlib.nullcontext
    return functools.partial(torch.autocast, "cpu", torch.float16 if step.device == "cuda" else torch.bfloat16)
