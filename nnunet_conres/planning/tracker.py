"""Measure the memory of a training step by executing it on tensors without data.

Forward, loss, backward and optimiser are executed on fake tensors, which have only a shape and a type. A patch that
needs a large GPU is thus measured on any machine in seconds. Storages are followed from creation to release. Memory
that a kernel allocates internally is not counted.

To measure the memory on a GPU, CUDA's autocast policy is applied to fake CPU tensors: PyTorch runs backward on fake
CUDA tensors only if there is a CUDA device. The measured step uses the contiguous memory format and is not compiled.
A compiled step in channels-last format takes less, but a captured optimiser keeps its temporary memory.
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
        before: Alive before the step, by kind: parameters, optimizer, batch.
        kept: Additionally kept for backward at the end of forward and loss, by module of the network, and loss.
        gradients: Gradients of the parameters.
        live: Alive after each allocation of the step, in order.
        n_backward: Number of entries of `live` before the optimiser runs.
        after_backward: Alive at the end of backward.
    """

    before: Mapping[str, int]
    kept: Mapping[str, int]
    gradients: int
    live: NDArray[np.int64]
    n_backward: int
    after_backward: int

    @property
    def peak(self) -> int:
        """Maximum at any moment."""
        return int(self.live.max())


class LiveStorages(TorchDispatchMode):
    """Mode that follows the storages that operations create.

    Attributes:
        part: Name of the part that new storages are assigned to.
        current: Bytes alive now.
        by_part: Bytes alive now, by part.
        live: Bytes alive after each allocation so far.
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
            return 1  # data-dependent branches: assume annotated voxels and finite values
        output = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.native_group_norm_backward.default and output[0].dtype != args[1].dtype:
            # with bfloat16 on a CPU the real operation keeps the input's type; the fake one returns another
            output = (torch.empty_like(args[1]), *output[1:])
        tree_map_only(Tensor, self.add, output)
        return output

    def add(self, tensor: Tensor) -> None:
        """Follow the storage of a tensor from now on."""
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
        """Assign the storages that a module of the network creates to the part with the module's name.

        Names are cut after their first number, as in encoder.stages.0.
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


# Operations of our networks and losses that CUDA's autocast runs in other types than the CPU's.
_FLOAT32 = frozenset(
    {"group_norm", "interpolate", "softmax", "log_softmax", "sum", "exp", "log", "pow", "cross_entropy", "nll_loss"}
    | {"binary_cross_entropy_with_logits", "prod", "logsumexp"}
)
_HALF = frozenset({"prelu"})
_AS_THEY_COME = frozenset({"avg_pool2d", "avg_pool3d", "pad"})


class CudaAutocast(TorchFunctionMode):
    """Mode in which autocast to float16 on a CPU uses the types of CUDA's autocast for every operation."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if func is Tensor.backward:
            # Like Tensor.backward, but with this mode on, for recomputed activations. A mode is off while it handles a
            # function.
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
    """Measure the memory of a training step.

    The optimiser already has its state, as from the second step on.

    Args:
        step: The training step.
        fake: Whether to execute on tensors without data; otherwise the step is really executed, on the CPU.

    Raises:
        Exception: Any error of the network, the loss or the optimiser if the step can't be executed.
    """
    return measure_batches(step, [step.batch_size], fake=fake)[0]


def measure_batches(step: TrainingStep, batch_sizes: Sequence[int], *, fake: bool = True) -> list[Measurement]:
    """Measure the memory of a training step at several batch sizes.

    The optimiser does not depend on the batch, so it is executed only with the first.

    Args:
        step: The training step; its batch size is ignored.
        batch_sizes: Patches in each batch.
        fake: Whether to execute on tensors without data; otherwise the steps are really executed, on the CPU.

    Raises:
        Exception: Any error of the network, the loss or the optimiser if a step can't be executed.
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
