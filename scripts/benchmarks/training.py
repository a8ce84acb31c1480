"""A training step as nnU-Net's trainer does it, in phases."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from torch import Tensor, nn

from benchmarks.networks import Model, make_batch
from benchmarks.timing import BenchmarkError, Clock, Phases
from nnunet_conres.architectures.layout import weights_to_channels_last
from nnunet_conres.optimizers import muon_of
from nnunet_conres.trainers.graphs import waits_for_python, with_graphs

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "mixed": torch.float16}
LOSS_PHASES = ("loss forward", "loss backward")

_CLIP = 12
# Far below nnU-Net's: the rate does not affect the time of a step, but diverging weights would slow down later steps.
_LEARNING_RATE = 1e-5


def check_precision(precision: str, device: torch.device) -> None:
    """Refuse a precision that the device does not support.

    Raises:
        BenchmarkError: For float16 with scaled gradients on a CPU.
    """
    if precision == "mixed" and device.type != "cuda":
        raise BenchmarkError(
            "--precision mixed is nnU-Net's float16 with scaled gradients, for CUDA only; the CPU's is bfloat16."
        )


class TimedStep:
    """A model with batch and optimiser; every call is a training step.

    Args:
        model: Model to train.
        device: Device that does the work.
        precision: ``"float32"``; ``"bfloat16"``, autocast; or ``"mixed"``, nnU-Net's on CUDA: float16 and scaled
            gradients.
        compiled: Whether network and loss are compiled; a graph break is then an error. Small batches use CUDA graphs
            where our trainers do.
    """

    def __init__(self, model: Model, device: torch.device, precision: str, compiled: bool = False) -> None:
        check_precision(precision, device)
        self.device = device
        self.dtype = PRECISIONS[precision]
        self.images, self.targets = make_batch(model, device)
        network = model.network.train()
        self.parameters = list(network.parameters())
        self.optimizer: torch.optim.Optimizer
        if model.optimizer == "muon":
            self.optimizer = muon_of(network, _LEARNING_RATE, weight_decay=3e-5, capture=compiled and model.is_fast)
        else:
            self.optimizer = torch.optim.SGD(
                self.parameters, _LEARNING_RATE, weight_decay=3e-5, momentum=0.99, nesterov=True
            )
        self.scaler = torch.amp.GradScaler("cuda") if precision == "mixed" else None
        self.network: Callable[[Tensor], Any] = network
        self.loss: Callable[[Any, Any], Tensor] = model.loss
        patch = model.configuration.patch_size
        self.has_graphs = compiled and model.is_fast and waits_for_python(device, len(self.images), patch)
        if compiled:
            weights_to_channels_last(network)
            # all networks of a class share one forward function, which is compiled again for each of them
            torch._dynamo.config.recompile_limit = 64
            for module in model.loss.modules():
                if isinstance(module, DeepSupervisionWrapper):
                    # NumPy numbers in a condition would break the graph
                    module.weight_factors = tuple(float(weight) for weight in module.weight_factors)
            self.network = (with_graphs if self.has_graphs else torch.compile)(network, fullgraph=True)
            self.loss = torch.compile(model.loss, fullgraph=True)

    def _autocast(self, device_type: str) -> AbstractContextManager[object]:
        # on a CPU, our trainers use autocast for the whole step; on CUDA, nnU-Net uses it for network and loss
        if self.dtype == torch.float32 or self.device.type != device_type:
            return nullcontext()
        return torch.autocast(device_type, dtype=self.dtype)

    def forward(self) -> list[Tensor]:
        """Return the network's outputs."""
        if self.has_graphs:
            torch.compiler.cudagraph_mark_step_begin()
        with self._autocast("cpu"), self._autocast("cuda"):
            outputs = self.network(self.images)
        return [outputs] if isinstance(outputs, Tensor) else list(outputs)

    def __call__(self) -> Phases:
        """Run a step, and time the loss and its gradients separately from the network."""
        clock = Clock(self.device)
        with self._autocast("cpu"):
            self.optimizer.zero_grad(set_to_none=True)
            outputs = self.forward()
            clock.lap("forward")
            # the same graph, cut at the outputs
            logits = [output.detach().requires_grad_() for output in outputs]
            with self._autocast("cuda"):
                loss = self.loss(logits, self.targets)
            clock.lap("loss forward")
            (loss if self.scaler is None else self.scaler.scale(loss)).backward()
            clock.lap("loss backward")
            used = [(output, leaf.grad) for output, leaf in zip(outputs, logits, strict=True) if leaf.grad is not None]
            torch.autograd.backward([output for output, _ in used], [gradient for _, gradient in used])
            clock.lap("backward")
            self._update()
            clock.lap("optimiser")
        return clock.seconds()

    def as_trained(self) -> None:
        """Run the same step in one piece, as the trainer does. For memory: a cut graph holds a little more."""
        with self._autocast("cpu"):
            self.optimizer.zero_grad(set_to_none=True)
            with self._autocast("cuda"):
                loss = self.loss(self.forward(), self.targets)
            (loss if self.scaler is None else self.scaler.scale(loss)).backward()
            self._update()

    def peak_bytes(self) -> int:
        """Return the memory of a step on CUDA: tensors held between steps, plus the largest increase within one."""
        self.as_trained()
        self.optimizer.zero_grad(set_to_none=True)
        state = [value for values in self.optimizer.state.values() for value in values.values()]
        tensors = [*self.parameters, *state, self.images, *self.targets]
        own = sum(tensor.untyped_storage().nbytes() for tensor in tensors if isinstance(tensor, Tensor))
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self.as_trained()
        torch.cuda.synchronize()
        return own + torch.cuda.max_memory_allocated() - before

    def _update(self) -> None:
        if self.scaler is None:
            nn.utils.clip_grad_norm_(self.parameters, _CLIP)
            self.optimizer.step()
            return
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.parameters, _CLIP)
        self.scaler.step(self.optimizer)
        self.scaler.update()
