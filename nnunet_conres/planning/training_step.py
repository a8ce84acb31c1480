"""A training step as in nnU-Net, without a data set: a trainer's network, loss and optimiser, and a random batch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.training.nnUNetTrainer.variants.network_architecture.nnUNetTrainerNoDeepSupervision import (
    nnUNetTrainerNoDeepSupervision,
)
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import Tensor, nn

from nnunet_conres.errors import InputError
from nnunet_conres.plans.entries import set_background_class

DEVICES = ("cuda", "cpu")


@dataclass(frozen=True)
class TrainingStep:
    """Everything that determines the memory of a training step.

    Attributes:
        trainer: The trainer, whose network, loss and optimiser are used.
        architecture: The `architecture` entry of the plans.
        patch_size: Voxels along each axis; three values, or two for 2D.
        batch_size: Patches in a batch.
        input_channels: Image channels; in a cascade, one more per foreground label.
        labels: Labels or regions, as nnU-Net reads them from dataset.json.
        device: "cuda" or "cpu". Decides which operations autocast runs in 16 bits, and how the optimiser works.
        mixed_precision: Whether to train under autocast, float16 on CUDA and bfloat16 on a CPU; otherwise float32.

    Raises:
        InputError: The device is unknown, or a number is below 1.
    """

    trainer: type[nnUNetTrainer]
    architecture: Mapping[str, Any]
    patch_size: Sequence[int]
    batch_size: int
    input_channels: int
    labels: LabelManager
    device: str = "cuda"
    mixed_precision: bool = True

    def __post_init__(self) -> None:
        if self.device not in DEVICES:
            raise InputError(f"The device is {self.device!r}; expected one of {DEVICES}.")
        if len(self.patch_size) not in (2, 3):
            raise InputError(f"The patch size is {list(self.patch_size)}; expected three numbers, or two for 2D.")
        numbers = (*self.patch_size, self.batch_size, self.input_channels)
        if min(numbers) < 1:
            raise InputError(f"Patch size, batch size and number of channels are {numbers}; expected 1 or more.")

    @property
    def arguments(self) -> Mapping[str, Any]:
        """Arguments of the network."""
        return self.architecture["arch_kwargs"]


class RunningStep:
    """Network, loss, optimiser and batch of a training step, ready to run.

    The optimiser already has its state, as from the second step on.

    Args:
        step: The training step.
        device: The device to run it on.
    """

    def __init__(self, step: TrainingStep, device: torch.device) -> None:
        trainer = _trainer(step)
        with device:
            self.network: nn.Module = trainer.build_network_architecture(
                trainer.plans_manager,
                trainer.configuration_manager,
                step.input_channels,
                step.labels.num_segmentation_heads,
                trainer.enable_deep_supervision,
            )
        trainer.network = self.network
        self.optimizer: torch.optim.Optimizer = trainer.configure_optimizers()[0]
        self.loss: nn.Module = trainer._build_loss()
        self._make_optimizer_state(step)
        self._step, self._device = step, device
        self._scales: list[list[float]] | None = trainer._get_deep_supervision_scales()
        self.make_batch(step.batch_size)

    def make_batch(self, batch_size: int) -> None:
        """Replace the batch by a new random one of this size."""
        step = replace(self._step, batch_size=batch_size)
        self.data = torch.randn(batch_size, step.input_channels, *step.patch_size, device=self._device)
        self.targets: Tensor | list[Tensor]
        if self._scales is None:
            self.targets = _target(step, step.patch_size, self._device)
        else:
            self.targets = [_target(step, _scaled(step.patch_size, scale), self._device) for scale in self._scales]

    def _make_optimizer_state(self, step: TrainingStep) -> None:
        for group in self.optimizer.param_groups:
            if "foreach" in group and group["foreach"] is None:
                group["foreach"] = step.device == "cuda"  # PyTorch's default on either device
        for parameter in self.network.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor that is alive before the step, with its kind: parameters, optimizer, batch."""
        for tensor in (*self.network.parameters(), *self.network.buffers()):
            yield "parameters", tensor
        for state in self.optimizer.state.values():
            yield from (("optimizer", value) for value in state.values() if isinstance(value, Tensor))
        for tensor in (self.data, *(self.targets if isinstance(self.targets, list) else [self.targets])):
            yield "batch", tensor

    def run(
        self,
        autocast: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
        after: Callable[[str], None] = lambda phase: None,
        *,
        update: bool = True,
    ) -> None:
        """Run the step as nnU-Net's trainer does.

        Args:
            autocast: Returns the context in which forward and loss run.
            after: Called with the name of each phase at its end: forward, loss, backward, optimizer.
            update: Whether to run the optimiser after backward.
        """
        self.optimizer.zero_grad(set_to_none=True)
        with autocast():
            output = self.network(self.data)
            after("forward")
            loss = self.loss(output, self.targets)
        after("loss")
        loss.backward()
        after("backward")
        if not update:
            return
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 12)
        self.optimizer.step()
        after("optimizer")
        del output  # alive until here, as in nnU-Net's trainer


def _trainer(step: TrainingStep) -> Any:
    """Return a trainer that can build network, loss and optimiser.

    nnU-Net's constructor creates the folders and files of a training, so it is not called. The attributes that the
    building methods read are set here instead. The trainer is on the CPU, so that nothing is compiled.
    """
    architecture = deepcopy(dict(step.architecture))
    set_background_class(architecture, step.labels.has_regions)
    configuration = {
        "architecture": architecture,
        "patch_size": list(step.patch_size),
        "batch_size": step.batch_size,
        "batch_dice": False,
    }
    trainer: Any = object.__new__(step.trainer)
    trainer.plans_manager = PlansManager({"configurations": {"0": configuration}})
    trainer.configuration_manager = ConfigurationManager(configuration)
    trainer.configuration_name = "0"
    trainer.label_manager = step.labels
    trainer.device = torch.device("cpu")
    trainer.is_ddp, trainer.local_rank = False, 0
    trainer.initial_lr, trainer.weight_decay = 1e-2, 3e-5
    trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.current_epoch = 1000, 250, 0
    trainer.enable_deep_supervision = not issubclass(step.trainer, nnUNetTrainerNoDeepSupervision)
    return trainer


def _scaled(size: Sequence[int], scale: Sequence[float]) -> list[int]:
    """Return the size of the annotation at a scale, rounded as in nnU-Net's transform for deep supervision."""
    return [round(extent * float(share)) for extent, share in zip(size, scale, strict=True)]


def _target(step: TrainingStep, size: Sequence[int], device: torch.device) -> Tensor:
    heads = step.labels.num_segmentation_heads
    if step.labels.has_regions:
        return torch.rand(step.batch_size, heads + step.labels.has_ignore_label, *size, device=device) > 0.8
    labels = torch.rand(step.batch_size, 1, *size, device=device) * (heads + step.labels.has_ignore_label)
    return labels.to(torch.int16)
