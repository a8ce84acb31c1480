"""How much memory a training step takes, from the plans alone.

The networks and losses are written down once more in the operations of `ledger`, which know shapes and types, and what
PyTorch keeps of each for backward. `tracker` counts the same by executing the step on tensors without data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from nnunet_conres.planning.ledger import FLOAT32, Ledger
from nnunet_conres.planning.ledger_losses import Loss
from nnunet_conres.planning.ledger_networks import network_of
from nnunet_conres.planning.training_step import TrainingStep

# What no operation shows: kernels' own workspace, 0 to 12 % of the peak at 128 x 128 x 128 on an H200, as
# docs/benchmarks.md has it; and on a GPU the CUDA context with its libraries, and gaps between PyTorch's blocks.
WORKSPACE_SHARE = 0.12
CUDA_CONTEXT = 500 * 2**20


@dataclass(frozen=True)
class MemoryEstimate:
    """Memory of a training step in bytes.

    Attributes:
        parameters: Of the network.
        gradients: Of the parameters, at the end of backward.
        optimizer: State of the optimiser.
        batch: Images and annotations.
        activations: What is kept for backward when the network is through, by encoder stage and decoder level.
        loss: What the loss keeps for backward beside them.
        peak: The most that is alive at any moment.
        workspace: Allowance for what is not seen: kernels' workspace, gaps in the allocator, the CUDA context.
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
        """Peak with workspace."""
        return self.peak + self.workspace


def estimate_memory(step: TrainingStep) -> MemoryEstimate:
    """Predicts the memory of a training step from the second one on, when the optimiser has its state.

    Args:
        step: What is trained, and how.

    Raises:
        ValueError: The network is none of this package's.
    """
    ledger = Ledger(mixed=step.mixed_precision, cuda=step.device == "cuda")
    network = network_of(step, ledger)
    parameters = FLOAT32 * sum(parameter.numel for parameter in network.parameters)
    optimizer = parameters * (2 if step.optimizer == "adam" else 1)
    if step.optimizer == "muon":  # and Adam for what is no matrix
        optimizer += FLOAT32 * sum(parameter.numel for parameter in network.parameters if not parameter.is_matrix)
    fixed = [ledger.storage(parameters), ledger.storage(optimizer + network.buffer_bytes)]
    data = ledger.tensor((step.batch_size, step.input_channels, *step.patch_size), FLOAT32)
    losses = Loss(step, ledger)
    before = ledger.current

    ledger.by_part.clear()
    outputs = network.forward(data)
    loss = losses.forward(outputs)
    ledger.end_of_autocast()
    activations = {part: ledger.by_part.get(part, 0) for part in network.parts}
    kept_by_loss = ledger.by_part.get("loss", 0)
    ledger.backward(loss)
    # what the optimiser makes while no activation is left
    if step.optimizer == "muon":
        temporary = round(_MUON_COPIES * FLOAT32 * sum(p.numel for p in network.parameters if p.is_matrix))
    elif step.device == "cuda":  # all parameters at once
        temporary = parameters * _FOREACH_COPIES[step.optimizer]
    else:
        temporary = 2 * FLOAT32 * max(parameter.numel for parameter in network.parameters)
    at_update = before + parameters + temporary + sum(output.nbytes for output in outputs)
    peak = max(ledger.peak, int(at_update))
    del fixed
    return MemoryEstimate(
        parameters=parameters,
        gradients=parameters,
        optimizer=optimizer,
        batch=before - parameters - optimizer - network.buffer_bytes,
        activations=activations,
        loss=kept_by_loss,
        peak=peak,
        workspace=round(WORKSPACE_SHARE * peak) + (CUDA_CONTEXT if step.device == "cuda" else 0),
    )


# Copies of all gradients that PyTorch's optimisers make with foreach.
_FOREACH_COPIES = {"sgd": 1, "adam": 2}
# The steps of all matrices, as they are and orthogonal, and the small factors between: 2.06 to 2.10 copies in networks
# that nnU-Net plans, counted as in `tracker`.
_MUON_COPIES = 2.1
