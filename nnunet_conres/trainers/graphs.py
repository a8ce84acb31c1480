"""Training steps with small batches as CUDA graphs, so that the GPU need not wait for Python."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import nn
from torch._dynamo import OptimizedModule

from nnunet_conres.trainers.nonfinite import FiniteStepsTrainer
from nnunet_conres.trainers.recipe import wants_fast_step

MOST_VOXELS: Final = 2**20
"""Largest batch, in voxels, that is trained with graphs. On an H200, Python takes 14 to 17 ms per step and the GPU
10 ns per voxel (42 ms for two patches of 128 x 128 x 128). So the GPU waits for Python with up to 1.5 million voxels,
and a slower GPU with fewer."""

_DEVICES = {"cuda"}


def waits_for_python(device: torch.device, batch_size: int, patch_size: Sequence[int]) -> bool:
    """Return whether batches are so small that a GPU finishes before Python launches its next operation."""
    return device.type in _DEVICES and batch_size * math.prod(int(extent) for extent in patch_size) <= MOST_VOXELS


def with_graphs(network: nn.Module, **options: Any) -> Any:
    """Compile a network for training steps whose forward and backward passes are CUDA graphs.

    Outputs of a pass are valid until ``torch.compiler.cudagraph_mark_step_begin``, which must be called at the start of
    every step. PyTorch raises an error if they are used later.

    Args:
        network: The network, not compiled yet.
        options: Options of ``torch.compile``.
    """
    return torch.compile(network, mode="reduce-overhead", dynamic=False, **options)


class GraphedStepsTrainer(FiniteStepsTrainer):
    """nnU-Net's trainer, whose network runs as CUDA graphs in training steps with small batches.

    In validation steps and predictions, sizes vary and outputs are kept for longer, so the network is compiled as in
    nnU-Net. A training step needs the outputs of its network only within the step, and its loss, which is logged, is
    computed outside of the graphs. If a step with graphs fails, it is repeated without, and so are all later steps. Not
    with DistributedDataParallel.
    """

    _graphed_network: OptimizedModule | None = None

    def initialize(self) -> None:
        super().initialize()
        plan = self.configuration_manager
        is_small = waits_for_python(self.device, plan.batch_size, plan.patch_size)
        if is_small and not self.is_ddp and self._do_i_compile() and wants_fast_step():
            assert isinstance(self.network, OptimizedModule)
            self._graphed_network = with_graphs(self.network._orig_mod)  # the same weights

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        if self._graphed_network is None:
            return super().train_step(batch)
        compiled, n_skipped = self.network, len(self.skipped_in_a_row)
        stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        self.network = self._graphed_network
        torch.compiler.cudagraph_mark_step_begin()
        try:
            return super().train_step(batch)
        except (RuntimeError, AssertionError) as error:  # PyTorch's code for graphs uses assertions
            if self._is_step_taken or len(self.skipped_in_a_row) > n_skipped:  # the step was complete
                raise
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        finally:
            self.network = compiled
        self._graphed_network = None
        if stream is not None:
            torch.cuda.set_stream(stream)  # which PyTorch does not do if a capture fails
        torch.compiler.reset()  # frees the graphs' memory
        self.print_to_log_file(f"WARNING: training continues without CUDA graphs of the network: {reason}")
        return super().train_step(batch)
