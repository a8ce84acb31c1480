"""A training step as nnU-Net takes it, without data set and trainer: network, loss, optimiser and a made-up batch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nnunet_conres.optimizers import MUON_LR, MUON_WEIGHT_DECAY, muon_of

DEVICES = ("cuda", "cpu")
OPTIMIZERS = ("sgd", "adam", "muon")


@dataclass(frozen=True)
class TrainingStep:
    """What decides how much memory a training step takes.

    Attributes:
        architecture: The plans' `architecture` entry, all arguments resolved.
        patch_size: Voxels along each axis.
        batch_size: Patches in a batch.
        input_channels: Image channels, and in a cascade one more per foreground label.
        output_channels: Segmentation heads: labels with background, or regions.
        device: "cuda" or "cpu": which operations autocast runs in 16 bits, and how the optimiser works.
        mixed_precision: Whether to train under autocast, float16 on CUDA and bfloat16 on a CPU; float32 if not.
        has_regions: Whether targets are regions.
        has_ignore_label: Whether there is an ignore label.
        optimizer: "sgd", nnU-Net's with Nesterov momentum, "adam" or "muon".

    Raises:
        ValueError: Device or optimiser is unknown, or a number below 1.
    """

    architecture: Mapping[str, Any]
    patch_size: Sequence[int]
    batch_size: int
    input_channels: int
    output_channels: int
    device: str = "cuda"
    mixed_precision: bool = True
    has_regions: bool = False
    has_ignore_label: bool = False
    optimizer: str = "sgd"

    def __post_init__(self) -> None:
        if self.device not in DEVICES:
            raise ValueError(f"The device is {self.device!r}; expected one of {DEVICES}.")
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"The optimiser is {self.optimizer!r}; expected one of {OPTIMIZERS}.")
        if len(self.patch_size) != 3:
            raise ValueError(f"The patch size is {list(self.patch_size)}; expected three numbers.")
        numbers = (*self.patch_size, self.batch_size, self.input_channels, self.output_channels)
        if min(numbers) < 1:
            raise ValueError(f"Patch size, batch size and numbers of channels are {numbers}; expected 1 or more.")

    @property
    def arguments(self) -> Mapping[str, Any]:
        """The network's arguments."""
        return self.architecture["arch_kwargs"]

    @property
    def is_conresnet(self) -> bool:
        """Whether the network is trained with residual maps."""
        return "background_class" in self.arguments

    @property
    def n_segmentation_outputs(self) -> int:
        """Number of scales of the segmentation that the network puts out under deep supervision."""
        has_one = "n_stages" not in self.arguments or self.arguments.get("auxiliary_heads") is False
        return 1 if has_one else int(self.arguments["n_stages"]) - 1


class RunningStep:
    """Network, loss, optimiser and batch of a training step, ready to be run.

    The optimiser has its state already, as from the second step on.

    Args:
        step: What is trained.
        device: Where.
    """

    def __init__(self, step: TrainingStep, device: torch.device) -> None:
        from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

        self.step = step
        with device:
            self.network: nn.Module = get_network_from_plans(
                step.architecture["network_class_name"],
                dict(step.arguments),
                step.architecture["_kw_requires_import"],
                step.input_channels,
                step.output_channels,
                allow_init=True,
                deep_supervision=True,
            )
        if step.is_conresnet:
            self.network.residual_outputs = True
        self.loss = training_loss(step)
        self.optimizer = _optimizer(step, self.network)
        sizes = target_sizes(step)
        self.data = torch.randn(step.batch_size, step.input_channels, *step.patch_size, device=device)
        self.targets = [_target(step, size, device) for size in sizes]

    def tensors(self) -> Iterator[Tensor]:
        """Everything that is alive before the step."""
        yield from self.network.parameters()
        yield from self.network.buffers()
        for state in self.optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))
        yield self.data
        yield from self.targets

    def run(
        self,
        autocast: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
        behind_loss: Callable[[], Any] = lambda: None,
    ) -> Any:
        """Takes the step as nnU-Net's trainer does.

        Args:
            autocast: Makes the context in which forward and loss run.
            behind_loss: Called between loss and backward.

        Returns:
            What ``behind_loss`` returned.
        """
        self.optimizer.zero_grad(set_to_none=True)
        with autocast():
            output = self.network(self.data)
            loss = self.loss(output, self.targets)
        result = behind_loss()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 12)
        self.optimizer.step()
        return result


def target_sizes(step: TrainingStep) -> list[list[int]]:
    """Spatial size of the annotation at every scale of deep supervision, full resolution first."""
    from nnunet_conres.architectures.blocks import stage_sizes

    strides = step.arguments["strides"][1 : step.n_segmentation_outputs]
    return [list(step.patch_size), *stage_sizes(step.patch_size, strides)]


def training_loss(step: TrainingStep) -> nn.Module:
    """The loss that our trainers give a network under nnU-Net's recipe.

    Source: nnU-Net's ``nnUNetTrainer._build_loss``.
    """
    from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss
    from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
    from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss

    from nnunet_conres.losses import ConResLoss, ResidualMapLoss, SegmentationLoss

    dice = {"batch_dice": False, "smooth": 1e-5, "ddp": False}
    if step.has_regions:
        single: nn.Module = DC_and_BCE_loss(
            {},
            dice | {"do_bg": True},
            use_ignore_label=step.has_ignore_label,
            dice_class=MemoryEfficientSoftDiceLoss,
        )
    else:
        single = DC_and_CE_loss(
            dice | {"do_bg": False},
            {},
            ignore_label=step.output_channels if step.has_ignore_label else None,
            dice_class=MemoryEfficientSoftDiceLoss,
        )
    n_scales = step.n_segmentation_outputs
    weights = [1.0 / 2**scale for scale in range(n_scales)]
    if n_scales > 1:
        weights[-1] = 0.0
    loss: nn.Module = SegmentationLoss(DeepSupervisionWrapper(single, [w / sum(weights) for w in weights]))
    if step.is_conresnet:
        residual = ResidualMapLoss(
            classes=None if step.has_regions else list(range(1, step.output_channels)),
            ignore_label=step.output_channels if step.has_ignore_label else None,
            slice_axis=step.arguments.get("slice_axis", 0),
        )
        loss = ConResLoss(loss, residual, n_scales)
    return loss


def _target(step: TrainingStep, size: Sequence[int], device: torch.device) -> Tensor:
    if step.has_regions:
        channels = step.output_channels + step.has_ignore_label
        return torch.rand(step.batch_size, channels, *size, device=device) > 0.8
    labels = torch.rand(step.batch_size, 1, *size, device=device) * (step.output_channels + step.has_ignore_label)
    return labels.to(torch.int16)


def _optimizer(step: TrainingStep, network: nn.Module) -> torch.optim.Optimizer:
    parameters = list(network.parameters())
    # what PyTorch chooses by itself on either device
    foreach = step.device == "cuda"
    optimizer: torch.optim.Optimizer
    if step.optimizer == "muon":
        optimizer = muon_of(network, MUON_LR, MUON_WEIGHT_DECAY)
        for group in optimizer.param_groups:
            names = ["momentum_buffer"] if group["orthogonal"] else ["exp_avg", "exp_avg_sq"]
            for parameter in group["params"]:
                optimizer.state[parameter] = {name: torch.zeros_like(parameter) for name in names}
    elif step.optimizer == "adam":
        optimizer = torch.optim.Adam(parameters, 1e-4, weight_decay=5e-4, foreach=foreach)
        for parameter in parameters:
            state = {"exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
            optimizer.state[parameter] = {"step": torch.tensor(1.0)} | state
    else:
        optimizer = torch.optim.SGD(parameters, 1e-2, momentum=0.99, nesterov=True, weight_decay=3e-5, foreach=foreach)
        for parameter in parameters:
            optimizer.state[parameter] = {"momentum_buffer": torch.zeros_like(parameter)}
    return optimizer
