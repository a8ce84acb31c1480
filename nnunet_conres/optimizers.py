"""Optimisers: Muon, SGD whose steps for the weights of convolutions are orthogonal matrices."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

# Quintic Newton-Schulz iteration: p(s) = 3.4445 s - 4.775 s^3 + 2.0315 s^5 takes singular values in (0, 1] to about 1
# (0.7 to 1.2) in five rounds, small ones fastest.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ROUNDS = 5
_EPSILON = 1e-7
MUON_LR = 0.03
# Times the learning rate that is 3e-5 per step, as in nnU-Net, where 0.01 and a momentum of 0.99 act like a rate of 1.
MUON_WEIGHT_DECAY = 1e-3
ADAM_LR_FACTOR = 0.1


class Muon(Optimizer):
    """Muon for matrices, Adam for all other parameters.

    The gradient of a convolution is dominated by few directions. Muon replaces the step that SGD with Nesterov momentum
    would take by the nearest (semi-)orthogonal matrix, so that the weights change in all directions at the same pace,
    however large the gradient.

    Args:
        groups: Parameter groups as for any optimiser of PyTorch, or parameters. A group with ``orthogonal`` true holds
            matrices: parameters of two dimensions or more, all but the first of which are taken together. Adam takes
            the others.
        lr: Learning rate of the matrices: a step changes all singular directions of an n x m matrix by
            lr * sqrt(max(1, n / m)). Adam's is ``lr * lr_factor`` of the group, so that one schedule is enough for all.
        momentum: Share of the earlier steps in Muon's.
        weight_decay: By how much parameters shrink, relative to their size and the group's learning rate.
        betas: Adam's shares of the earlier gradients and squared gradients.
        eps: Added to Adam's denominator.

    Raises:
        ValueError: If a number is out of range, or a parameter of an orthogonal group has fewer than two dimensions.

    Source: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks",
        https://kellerjordan.github.io/posts/muon/, with the learning rate of the reference implementation.
    """

    def __init__(
        self,
        groups: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
    ) -> None:
        if lr < 0 or weight_decay < 0 or not all(0 <= share < 1 for share in (momentum, *betas)):
            raise ValueError(
                f"Expected lr and weight_decay of 0 or more, momentum and betas in [0, 1); got {lr}, {weight_decay}, "
                f"{momentum} and {betas}."
            )
        defaults = {
            "lr": lr,
            "lr_factor": 1.0,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "betas": betas,
            "eps": eps,
            "orthogonal": False,
            "steps": 0,  # for Adam's corrections; among the groups' entries, as it is saved with these
        }
        super().__init__(groups, defaults)
        for group in self.param_groups:
            flat = [tuple(parameter.shape) for parameter in group["params"] if parameter.ndim < 2]
            if group["orthogonal"] and flat:
                raise ValueError(f"Orthogonal groups hold matrices, but there are parameters of shape {flat[:3]}.")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes a step. Returns what ``closure`` does, which computes the loss and its gradients; None without."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters: list[Tensor] = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not parameters:
                continue
            lr = group["lr"] * group["lr_factor"]
            torch._foreach_mul_(parameters, 1 - lr * group["weight_decay"])
            if not group["orthogonal"]:
                self._adam(group, parameters, lr)
                continue
            self._muon(group, parameters, lr)
        return loss

    def _muon(self, group: dict[str, Any], parameters: list[Tensor], lr: float) -> None:
        buffers = self._state("momentum_buffer", parameters)
        gradients = _gradients(parameters)
        torch._foreach_mul_(buffers, group["momentum"])
        torch._foreach_add_(buffers, gradients)
        steps = torch._foreach_add(gradients, buffers, alpha=group["momentum"])
        alike = _by_shape(parameters)
        # those of one shape in one go: a GPU would wait for each
        matrices = [torch.stack([steps[number].flatten(1) for number in numbers]) for numbers in alike]
        del steps
        for numbers, orthogonal in zip(alike, orthogonalize(matrices), strict=True):
            rows, columns = orthogonal.shape[1:]
            ours = [parameters[number] for number in numbers]
            changes = [matrix.view(ours[0].shape) for matrix in orthogonal]
            torch._foreach_add_(ours, changes, alpha=-lr * max(1.0, rows / columns) ** 0.5)

    def _adam(self, group: dict[str, Any], parameters: list[Tensor], lr: float) -> None:
        gradients = _gradients(parameters)
        means, squares = self._state("exp_avg", parameters), self._state("exp_avg_sq", parameters)
        group["steps"] += 1
        number = group["steps"]
        first, second = group["betas"]
        torch._foreach_lerp_(means, gradients, 1 - first)
        torch._foreach_mul_(squares, second)
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - second)
        roots = torch._foreach_sqrt(squares)
        torch._foreach_div_(roots, (1 - second**number) ** 0.5)
        torch._foreach_add_(roots, group["eps"])
        torch._foreach_addcdiv_(parameters, means, roots, -lr / (1 - first**number))

    def _state(self, name: str, parameters: list[Tensor]) -> list[Tensor]:
        for parameter in parameters:
            if name not in self.state[parameter]:
                self.state[parameter][name] = torch.zeros_like(parameter)
        return [self.state[parameter][name] for parameter in parameters]


def _gradients(parameters: list[Tensor]) -> list[Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def _by_shape(parameters: list[Tensor]) -> list[list[int]]:
    """Where in the list those of each shape are."""
    shapes: dict[torch.Size, list[int]] = {}
    for number, parameter in enumerate(parameters):
        shapes.setdefault(parameter.shape, []).append(number)
    return list(shapes.values())


def orthogonalize(batches: Sequence[Tensor]) -> list[Tensor]:
    """About the nearest (semi-)orthogonal matrices: U V^T of the singular value decomposition U S V^T.

    Newton-Schulz multiplies by polynomials of X X^T only. These commute, so that all rounds are done on that matrix,
    which is small where X is wide, and X itself is multiplied once. Of a network's many shapes few have different
    numbers of rows: the rounds, two dozen small operations that a GPU waits for, are done once for each of these.

    Args:
        batches: (B, n, m) each, finite.

    Returns:
        Of each batch (B, n, m) with singular values of about 0.7 to 1.2, but for those below a thousandth of the norm,
        which stay smaller. 0 where a matrix is 0.
    """
    wide = [batch.mT if batch.shape[1] > batch.shape[2] else batch for batch in batches]
    # Squared singular values need the digits of single precision, and a trainer may step under autocast.
    kind = batches[0].device.type  # older versions of PyTorch have no autocast elsewhere
    with torch.autocast(kind, enabled=False) if kind in ("cpu", "cuda") else nullcontext():
        wide = [batch.float() for batch in wide]
        norms = [torch.linalg.matrix_norm(batch, keepdim=True) + _EPSILON for batch in wide]
        by_rows: dict[tuple[torch.device, int], list[int]] = {}
        for number, batch in enumerate(wide):
            by_rows.setdefault((batch.device, batch.shape[1]), []).append(number)
        orthogonal: dict[int, Tensor] = {}
        for numbers in by_rows.values():
            normal = (wide[number] / norms[number] for number in numbers)
            grams = torch.cat([torch.bmm(matrices, matrices.mT) for matrices in normal])
            factors = _newton_schulz(grams).split([len(wide[number]) for number in numbers])
            for number, factor in zip(numbers, factors, strict=True):
                orthogonal[number] = torch.bmm(factor / norms[number], wide[number])
    ours = [orthogonal[number] for number in range(len(wide))]
    return [one.mT if one.shape != batch.shape else one for one, batch in zip(ours, batches, strict=True)]


def _newton_schulz(gram: Tensor) -> Tensor:
    """What matrices X of norm 1 have to be multiplied by, given all X X^T (B, n, n)."""
    a, b, c = _COEFFICIENTS
    factor = None
    for _ in range(_ROUNDS):
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        polynomial.diagonal(dim1=1, dim2=2).add_(a)
        factor = polynomial if factor is None else torch.bmm(polynomial, factor)
        gram = torch.bmm(torch.bmm(polynomial, gram), polynomial)
    assert factor is not None
    return factor


def muon_of(network: nn.Module, lr: float, weight_decay: float) -> Muon:
    """The optimiser of a network: Muon for the weights of its convolutions, Adam for heads, norms and biases.

    Args:
        network: Its heads are called ``seg_layers``, as in nnU-Net's networks.
        lr: Muon's learning rate; Adam's is a tenth of it.
        weight_decay: Of the convolutions' weights.
    """
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in network.named_parameters():
        is_matrix = parameter.ndim > 2 and "seg_layers" not in name
        (matrices if is_matrix else others).append(parameter)
    groups = [
        {"params": matrices, "orthogonal": True, "weight_decay": weight_decay},
        {"params": others, "lr_factor": ADAM_LR_FACTOR},
    ]
    return Muon([group for group in groups if group["params"]], lr)
