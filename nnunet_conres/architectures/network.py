"""Base classes of all networks: checks of their arguments, and errors that explain a checkpoint that does not fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from dynamic_network_architectures.building_blocks.helper import convert_conv_op_to_dim
from dynamic_network_architectures.initialization.weight_init import InitWeights_He
from torch import nn

from nnunet_conres.architectures.blocks import per_stage, triple

CHECKPOINTINGS = ("none", "decoder", "full")


class PlansNetwork(nn.Module):
    """A network that can be built from a plans file alone.

    Constructors take these arguments, which nnU-Net writes into plans for its U-Nets:

    - ``input_channels``, ``num_classes``: image channels, and classes (labels with background, or regions);
    - the arguments below, and ``n_conv_per_stage_decoder``: convolutions per decoder level, lowest resolution first,
      one number or one per level; the argument for the encoder differs between networks;
    - ``conv_bias``: whether convolutions have a bias;
    - ``norm_op``, ``dropout_op``, ``nonlin``: classes, or None, with ``norm_op_kwargs`` and so on for their arguments;
    - ``deep_supervision``: whether logits are returned at all of the plans' scales; can be switched later at
      ``decoder.deep_supervision``.

    Args:
        n_stages: Number of resolutions, at least 2.
        features_per_stage: Channels of every stage, one number or one per stage.
        conv_op: Must be ``torch.nn.Conv3d``.
        kernel_sizes: Odd kernel sizes, one number or (kx, ky, kz) per stage.
        strides: Strides, one number or (sx, sy, sz) per stage; the first stage must have strides of 1.
        checkpointing: What is recomputed for backward instead of being kept: ``"none"``, the levels of the
            ``"decoder"``, or the ``"full"`` network, encoder stages as well.

    Attributes:
        features: Channels, one number per stage.
        kernel_sizes: [kx, ky, kz] per stage.
        strides: [sx, sy, sz] per stage.
        fixed_stages: Strides and kernel sizes, if plans can't change them; otherwise None.
        has_auxiliary_heads: Whether it outputs a segmentation at every scale, if plans have no ``auxiliary_heads``.

    Raises:
        ValueError: If an argument is out of range or does not fit the others.
    """

    fixed_stages: ClassVar[tuple[Sequence[Sequence[int]], Sequence[Sequence[int]]] | None] = None
    has_auxiliary_heads: ClassVar[bool] = True

    def __init__(
        self,
        n_stages: int,
        features_per_stage: int | Sequence[int],
        conv_op: type[nn.Module],
        kernel_sizes: int | Sequence[int | Sequence[int]],
        strides: int | Sequence[int | Sequence[int]],
        checkpointing: str = "none",
    ) -> None:
        super().__init__()
        if convert_conv_op_to_dim(conv_op) != 3:
            raise ValueError(
                f"{type(self).__name__} is a 3D network: conv_op must be torch.nn.Conv3d, not {conv_op.__name__}. Use "
                f"a 3D configuration such as 3d_fullres."
            )
        if n_stages < 2:
            raise ValueError(f"n_stages must be at least 2 (one downsampling), got {n_stages}.")
        self.features: list[int] = per_stage("features_per_stage", features_per_stage, n_stages)
        self.kernel_sizes = [triple(k) for k in per_stage("kernel_sizes", kernel_sizes, n_stages)]
        self.strides = [triple(s) for s in per_stage("strides", strides, n_stages)]
        if self.strides[0] != [1, 1, 1]:
            raise ValueError(
                f"The strides of the first stage must be 1, got {self.strides[0]}: the logits have its resolution and "
                f"must have that of the patch."
            )
        if checkpointing not in CHECKPOINTINGS:
            raise ValueError(f"checkpointing must be one of {CHECKPOINTINGS}, got {checkpointing!r}.")
        self.checkpointing = checkpointing
        positive("features_per_stage", self.features)
        positive("strides", [s for stride in self.strides for s in stride])
        if any(k < 1 or k % 2 == 0 for kernel in self.kernel_sizes for k in kernel):
            raise ValueError(
                f"kernel_sizes must be odd, and 1 or more, so that convolutions keep the size; got {self.kernel_sizes}."
            )

    def summary(self) -> str:
        """Describe the topology in a few words, for messages."""
        return f"features {self.features}, kernels {self.kernel_sizes}, strides {self.strides}"

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load as in ``nn.Module``. For a checkpoint of another topology, the error names the differences.

        Raises:
            RuntimeError: If ``strict`` and names or shapes differ.
        """
        if strict:
            own = self.state_dict()
            differences = [
                listing("missing in the checkpoint", sorted(own.keys() - state_dict.keys())),
                listing("not in this network", sorted(state_dict.keys() - own.keys())),
                listing(
                    "of another shape",
                    [
                        f"{k} {tuple(state_dict[k].shape)} instead of {tuple(own[k].shape)}"
                        for k in own
                        if k in state_dict and state_dict[k].shape != own[k].shape
                    ],
                ),
            ]
            if any(differences):
                raise RuntimeError(
                    f"The checkpoint belongs to another network than this one ({self.summary()}). "
                    + " ".join(d for d in differences if d)
                    + " Use the plans.json saved with that checkpoint, or train again."
                )
        return super().load_state_dict(state_dict, strict, assign)


class ResidualMapsMixin:
    """A network that can return residual maps beside the segmentation.

    Attributes:
        decoder: Has the switches ``deep_supervision`` and ``residual_outputs``.
    """

    decoder: nn.Module

    @property
    def residual_outputs(self) -> bool:
        """Whether forward returns residual maps after the segmentation, in training and evaluation alike."""
        return self.decoder.residual_outputs  # type: ignore[return-value]

    @residual_outputs.setter
    def residual_outputs(self, value: bool) -> None:
        self.decoder.residual_outputs = value  # type: ignore[assignment]

    @staticmethod
    def initialize(module: nn.Module) -> None:
        """Initialise one module: He normal as in nnU-Net.

        In nnU-Net's residual networks, blocks start as the identity. Here all layers learn from the first step: in
        experiments, foreground was predicted sooner.
        """
        InitWeights_He(1e-2)(module)


def residual_classes(num_classes: int, background_class: bool) -> int:
    """Return the number of classes that have a residual map: all but the background.

    Raises:
        ValueError: If no class is left.
    """
    count = num_classes - background_class
    if count < 1:
        raise ValueError(f"{num_classes} classes with the background leave none for residual maps.")
    return count


def spatial_axis(value: int) -> int:
    """Check a slice axis, and return it.

    Raises:
        ValueError: If it is not 0, 1 or 2.
    """
    if value not in (0, 1, 2):
        raise ValueError(f"slice_axis must be 0, 1 or 2, got {value}.")
    return value


def positive(name: str, values: Sequence[int]) -> None:
    """Check that numbers of channels, convolutions and the like are 1 or more.

    Raises:
        ValueError: If one is below 1.
    """
    if any(value < 1 for value in values):
        raise ValueError(f"{name} must be 1 or more, got {list(values)}.")


def counts_per_stage(name: str, value: int | Sequence[int], n_stages: int) -> list[int]:
    """Convert one number of convolutions for all stages, or one per stage, to a list.

    Raises:
        ValueError: If the list has the wrong length, or a number is below 1.
    """
    counts = per_stage(name, value, n_stages)
    positive(name, counts)
    return counts


def listing(what: str, names: Sequence[str], most: int = 3) -> str:
    """Return a sentence with the first names, empty if there are none."""
    if not names:
        return ""
    more = f", ... {len(names) - most} more" if len(names) > most else ""
    return f"{len(names)} entries {what}: {', '.join(names[:most])}{more}."
