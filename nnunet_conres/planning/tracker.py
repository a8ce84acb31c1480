"""Counts the memory of a training step by executing it on tensors without data.

Every operation of forward, loss, backward and optimiser is executed on fake tensors, which know shape and type only: a
patch that needs a large GPU is measured on any machine in seconds. The live storages are followed from creation to
release; what a kernel allocates inside itself is not seen.

Where the memory of a GPU is asked for, its autocast policy is applied to tensors that say they are on the CPU, because
PyTorch runs backward on fake CUDA tensors only where there is a CUDA device. Counted is the contiguous step that is not
compiled: compiled and channels-last it takes less, but a captured optimiser keeps what it needs on the way.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from nnunet_conres.planning.training_step import RunningStep, TrainingStep


@dataclass(frozen=True)
class Measurement:
    """Memory of live storages in bytes.

    Attributes:
        before: Before the step, by kind: parameters, optimizer, batch.
        kept: Beyond that, what is kept for backward at the end of forward and loss: by module of the network, and loss.
        gradients: Of the parameters.
        live: After every allocation of the step, in their order.
        n_backward: How many of these are before the optimiser's.
        after_backward: At the end of backward.
    """

    before: Mapping[str, int]
    kept: Mapping[str, int]
    gradients: int
    live: NDArray[np.int64]
    n_backward: int
    after_backward: int

    @property
    def peak(self) -> int:
        """The most at any moment."""
        return int(self.live.max())


class LiveStorages(TorchDispatchMode):
    """Within, follows the storages that operations create.

    Attributes:
        part: Name of the part that storages belong to from now on.
        current: Bytes alive now.
        by_part: The same by part.
        live: Bytes alive after every allocation so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.part = ""
        self.current = 0
        self.by_part: Counter[str] = Counter()
        self.live: list[int] = []
        self._alive: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return 1  # what depends on the data: there are annotated voxels, and all numbers are finite
        output = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.native_group_norm_backward.default and output[0].dtype != args[1].dtype:
            # what it does with bfloat16 on a CPU; without data it is computed in other types
            output = (torch.empty_like(args[1]), *output[1:])
        tree_map_only(Tensor, self.add, output)
        return output

    def add(self, tensor: Tensor) -> None:
        """Follows the storage of a tensor from now on."""
        storage = tensor.untyped_storage()
        key, size, part = storage._cdata, storage.nbytes(), self.part
        if key in self._alive:
            return
        self.current += size
        self.by_part[part] += size
        self.live.append(self.current)

        def gone(_: Any) -> None:
            self.current -= size
            self.by_part[part] -= size
            del self._alive[key]

        self._alive[key] = weakref.ref(storage, gone)

    @contextlib.contextmanager
    def by_module(self, network: nn.Module) -> Iterator[None]:
        """Within, what a module of the network creates belongs to the part with its name.

        Names end with the first number in them, as in encoder.stages.0.
        """
        names = {module: _part_name(name) for name, module in network.named_modules()}
        outer: list[str] = []

        def enter(module: nn.Module, _: Any) -> None:
            outer.append(self.part)
            self.part = names[module]

        def leave(_: nn.Module, __: Any, ___: Any) -> None:
            self.part = outer.pop()

        handles = []
        for module in names:
            handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _part_name(module: str) -> str:
    parts = module.split(".")
    numbers = [position for position, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[0] + 1] if numbers else parts) or "network"


# What CUDA's autocast runs in other types than the CPU's does, as far as our networks and losses use it.
_FLOAT32 = frozenset(
    {"group_norm", "interpolate", "softmax", "log_softmax", "sum", "exp", "log", "pow", "cross_entropy", "nll_loss"}
    | {"binary_cross_entropy_with_logits", "prod", "logsumexp"}
)
_HALF = frozenset({"prelu"})
_AS_THEY_COME = frozenset({"avg_pool2d", "avg_pool3d", "pad"})


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
    """Counts the memory of a training step from the second one on, when the optimiser has its state.

    Args:
        step: What is trained, and how.
        fake: Whether to execute on tensors without data; otherwise the step is really taken, on the CPU.

    Raises:
        Exception: Whatever the network, the loss or the optimiser raise where such a step can't be taken.
    """
    return measure_batches(step, [step.batch_size], fake=fake)[0]


def measure_batches(step: TrainingStep, batch_sizes: Sequence[int], *, fake: bool = True) -> list[Measurement]:
    """Counts the memory of training steps with several batches.

    The optimiser, which does not depend on the batch, is executed with the first only.

    Args:
        step: What is trained, and how; its batch size is not used.
        batch_sizes: Patches in each batch.
        fake: Whether to execute on tensors without data; otherwise the steps are really taken, on the CPU.

    Raises:
        Exception: Whatever the network, the loss or the optimiser raise where such a step can't be taken.
    """
    with contextlib.ExitStack() as stack:
        if fake:
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        running = RunningStep(replace(step, batch_size=batch_sizes[0]), torch.device("cpu"))
        measured = []
        for number, batch_size in enumerate(batch_sizes):
            running.optimizer.zero_grad(set_to_none=True)
            running.make_batch(batch_size)
            measured.append(_measure(step, running, update=number == 0))
        return measured


def _measure(step: TrainingStep, running: RunningStep, *, update: bool) -> Measurement:
    live = LiveStorages()
    for live.part, tensor in running.tensors():
        live.add(tensor)
    before = dict(live.by_part)
    live.by_part.clear()
    live.part = "loss"
    kept: dict[str, int] = {}
    at_backward = (0, 0)

    def after(phase: str) -> None:
        nonlocal at_backward
        if phase == "loss":
            kept.update({part: size for part, size in live.by_part.items() if size})
        elif phase == "backward":
            at_backward = len(live.live), live.current

    with contextlib.ExitStack() as stack:
        stack.enter_context(live)
        stack.enter_context(live.by_module(running.network))
        if step.device == "cuda":
            stack.enter_context(CudaAutocast())
        running.run(_autocast(step), after, update=update)
    gradients = [parameter.grad for parameter in running.network.parameters() if parameter.grad is not None]
    return Measurement(
        before=before,
        kept=kept,
        gradients=sum(gradient.untyped_storage().nbytes() for gradient in gradients),
        live=np.array(live.live, np.int64),
        n_backward=at_backward[0],
        after_backward=at_backward[1],
    )


def _autocast(step: TrainingStep) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    if not step.mixed_precision:
        return contextlib.nullcontext
    return functools.partial(torch.autocast, "cpu", torch.float16 if step.device == "cuda" else torch.bfloat16)
