"""The Muon optimiser: SGD whose steps for hidden matrices are orthogonal matrices."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.optim import Optimizer

from nnunet_conres.errors import InputError

# Quintic Newton-Schulz iteration: p(s) = 3.4445 s - 4.775 s^3 + 2.0315 s^5. Five rounds take singular values in
# [0.0015, 1] to [0.68, 1.203]; smaller ones grow by a factor of at most 485.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ROUNDS = 5
_EPSILON = 1e-7
MUON_LR = 0.03
# Times the learning rate, weights decay by 3e-5 per step. This is as in nnU-Net, where a learning rate of 0.01 with a
# momentum of 0.99 acts like a rate of 1.
MUON_WEIGHT_DECAY = 1e-3
ADAM_LR_FACTOR = 0.1
_CAPTURE_DEVICES = {"cuda"}
_STEPS_BEFORE_CAPTURE = 3

# Parameter groups, each with its parameters that have gradients.
_Groups: TypeAlias = "list[tuple[dict[str, Any], list[Tensor]]]"

# nnU-Net's name for all output layers, which it does not load from pretrained weights.
_HEADS = "seg_layers"
# Modules that embed patches as tokens, and that map tokens to the output. Adam takes all their parameters.
_BLOCKS = "dynamic_network_architectures.building_blocks."
_EMBEDDINGS = (
    (_BLOCKS + "patch_encode_decode", "PatchEmbed"),
    (_BLOCKS + "patch_encode_decode", "PatchEmbed_deeper"),
    (_BLOCKS + "patch_encode_decode", "PatchEmbedDeeperControlled"),
)
_DECODERS = ((_BLOCKS + "patch_encode_decode", "PatchDecode"),)
# Parameters that are vectors, one per token.
_TOKENS = {
    "pos_embed": ((_BLOCKS + "eva", "Eva"),),
    "register_tokens": (("dynamic_network_architectures.architectures.primus", "Primus"),),
}


class Muon(Optimizer):
    """Muon for matrices, Adam for all other parameters.

    The gradient of a convolution is dominated by a few directions. Muon replaces the step of SGD with Nesterov momentum
    by the nearest (semi-)orthogonal matrix, so that the weights change in all directions at the same pace, however
    large the gradient.

    A step with a gradient that is not finite (NaN, Inf, or a norm beyond the range of float32) changes neither
    parameters nor state. This is decided on the device, without waiting for it.

    A step consists of hundreds of small operations. With ``capture``, a GPU runs them as one CUDA graph. If the capture
    fails, a single warning gives the reason, and steps run one operation at a time.

    Args:
        groups: Parameters, or parameter groups as in other optimisers of PyTorch; all on one device. Muon takes groups
            with ``orthogonal`` true. Their parameters have at least two dimensions, (outputs, inputs, ...), or
            (inputs, outputs, ...) if ``transposed`` is true as well; all dimensions but the first are flattened. Adam
            takes the other groups.
        lr: Learning rate of the matrices: a step changes all singular directions of a matrix by
            lr * sqrt(max(1, n / m)), with n the number of outputs and m the number of inputs. Kernel positions count as
            inputs of convolutions, and as outputs of transposed convolutions. Adam's learning rate is ``lr`` times the
            group's ``lr_factor``, so that one schedule serves all groups.
        momentum: Muon's momentum, in [0, 1).
        weight_decay: Decay of parameters per step, relative to their size and the group's learning rate.
        betas: Adam's decay rates of gradients and squared gradients, in [0, 1).
        eps: Added to Adam's denominator, above 0.
        capture: Whether to capture steps on a GPU in a CUDA graph, from the fourth step on. The graph keeps copies of
            the gradients and of intermediate results, about four times the size of the parameters.

    Raises:
        ValueError: If a number is out of range or not finite, or a parameter of an orthogonal group has fewer than two
            dimensions.

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
        capture: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "lr_factor": 1.0,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "betas": betas,
            "eps": eps,
            "orthogonal": False,
            "transposed": False,
            "steps": 0,  # for Adam's bias corrections; in the groups, so that it is saved with them
        }
        super().__init__(groups, defaults)
        self._capture = capture
        self._steps_before_capture = _STEPS_BEFORE_CAPTURE
        self._captured: _CapturedStep | None = None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in PyTorch's optimisers. The constructor calls this for each of its groups."""
        values = self.defaults | param_group
        for name in ("lr", "lr_factor", "momentum", "weight_decay", "betas", "eps"):
            numbers = values[name] if name == "betas" else (values[name],)
            if any(isinstance(number, bool) for number in numbers):  # which Python takes for 0 or 1
                raise ValueError(f"Expected {name} to be a number, got {values[name]}.")
        for name in ("lr", "lr_factor", "weight_decay"):
            if not 0 <= values[name] < math.inf:  # NaN is in no range
                raise ValueError(f"Expected a finite {name} of 0 or more, got {values[name]}.")
        if not 0 < values["eps"] < math.inf:
            raise ValueError(f"Expected a finite eps above 0, got {values['eps']}.")
        for name, share in (("momentum", values["momentum"]), *(("betas", share) for share in values["betas"])):
            if not 0 <= share < 1:
                raise ValueError(f"Expected {name} in [0, 1), got {values[name]}.")
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        flat = [tuple(parameter.shape) for parameter in group["params"] if parameter.ndim < 2]
        if group["orthogonal"] and flat:
            raise ValueError(f"Orthogonal groups hold matrices, but there are parameters of shape {flat[:3]}.")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step. Return the result of ``closure``, which computes the loss and its gradients; None without it."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = [(group, [one for one in group["params"] if one.grad is not None]) for group in self.param_groups]
        groups = [(group, parameters) for group, parameters in groups if parameters]
        if not groups:
            return loss
        if not (self._capture and self._replay(groups)):
            self._update(groups, [_gradients(parameters) for _, parameters in groups], [_rate(g) for g, _ in groups])
        return loss

    def _update(self, groups: _Groups, gradients: list[list[Tensor]], rates: Sequence[float | Tensor]) -> None:
        """Take the step, with operations on the device only and without reading values from it."""
        # The sum is NaN or Inf if one of the norms is. The updates below are masked with it instead of skipped, so that
        # the CPU need not wait for a GPU.
        norms = torch._foreach_norm([gradient for ours in gradients for gradient in ours])
        is_finite = torch.stack(norms).sum().isfinite()
        matrices: list[tuple[dict[str, Any], list[Tensor], list[Tensor], float | Tensor]] = []
        for (group, parameters), ours, rate in zip(groups, gradients, rates, strict=True):
            if group["weight_decay"] != 0:
                torch._foreach_mul_(parameters, 1 - is_finite * (rate * group["weight_decay"]))
            if group["orthogonal"]:
                matrices.append((group, parameters, ours, rate))
            else:
                self._adam(group, parameters, ours, rate, is_finite)
        self._muon(matrices, is_finite)

    def _muon(
        self, groups: list[tuple[dict[str, Any], list[Tensor], list[Tensor], float | Tensor]], is_finite: Tensor
    ) -> None:
        matrices: list[Tensor] = []
        changes: list[tuple[list[Tensor], float | Tensor]] = []
        for group, parameters, gradients, rate in groups:
            buffers = self._state("momentum_buffer", parameters)
            steps = [torch.where(is_finite, gradient, 0.0) for gradient in gradients]
            torch._foreach_mul_(buffers, torch.where(is_finite, group["momentum"], 1.0))
            torch._foreach_add_(buffers, steps)
            torch._foreach_add_(steps, buffers, alpha=group["momentum"])
            # Parameters of one shape form a batch: a GPU would wait for the launch of each.
            for numbers in _alike(parameters):
                is_last = _is_channels_last(parameters[numbers[0]])
                matrices.append(torch.stack([_as_matrix(steps[number], is_last) for number in numbers]))
                outputs, inputs = matrices[-1].shape[1:]
                if group["transposed"]:
                    outputs, inputs = inputs, outputs
                size = rate * max(1.0, outputs / inputs) ** 0.5
                changes.append(([parameters[number] for number in numbers], size))
            del steps
        if not matrices:
            return
        for (ours, size), orthogonal in zip(changes, orthogonalize(matrices), strict=True):
            orthogonal = orthogonal * (is_finite * -size)
            torch._foreach_add_(ours, [_like(ours[0], matrix) for matrix in orthogonal])

    def _adam(
        self,
        group: dict[str, Any],
        parameters: list[Tensor],
        gradients: list[Tensor],
        rate: float | Tensor,
        is_finite: Tensor,
    ) -> None:
        gradients = [torch.where(is_finite, gradient, 0.0) for gradient in gradients]
        means, squares = self._state("exp_avg", parameters), self._state("exp_avg_sq", parameters)
        if not isinstance(group["steps"], Tensor):
            group["steps"] = torch.full((), float(group["steps"]), device=is_finite.device)
        group["steps"] = group["steps"].to(is_finite.device)
        number = group["steps"].add_(is_finite).clamp(min=1)
        first, second = group["betas"]
        torch._foreach_mul_(means, torch.where(is_finite, first, 1.0))
        torch._foreach_add_(means, gradients, alpha=1 - first)
        torch._foreach_mul_(squares, torch.where(is_finite, second, 1.0))
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - second)
        roots = torch._foreach_sqrt(squares)
        torch._foreach_mul_(roots, (1 - second**number) ** -0.5)
        torch._foreach_add_(roots, group["eps"])
        steps = torch._foreach_div(means, roots)
        torch._foreach_mul_(steps, is_finite * (-rate / (1 - first**number)))
        torch._foreach_add_(parameters, steps)

    def _replay(self, groups: _Groups) -> bool:
        """Take the step with a CUDA graph, and capture one first if none fits. Return whether the step was taken."""
        if groups[0][1][0].device.type not in _CAPTURE_DEVICES or torch.compiler.is_compiling():
            return False
        has_state = all(self.state.get(parameter) for _, parameters in groups for parameter in parameters)
        if self._steps_before_capture > 0 or not has_state:  # these steps initialise state and libraries
            self._steps_before_capture -= 1
            return False
        key = self._key(groups)
        if self._captured is None or self._captured.key != key:
            self._captured = None  # frees its memory first
            try:
                self._captured = _CapturedStep(key, groups, self._update)
            except RuntimeError as error:
                self._capture = False
                reason = str(error).strip().splitlines()[0]
                warnings.warn(f"Muon's steps are not captured in a CUDA graph: {reason}", stacklevel=3)
                return False
        self._captured.replay(groups)
        return True

    def _key(self, groups: _Groups) -> list[Any]:
        """Return everything that a graph fixes: addresses of tensors, and all settings but the learning rate."""
        key: list[Any] = []
        for group, parameters in groups:
            values = {name: value for name, value in group.items() if name not in ("params", "lr", "initial_lr")}
            steps = values.pop("steps")
            tensors = [steps] if isinstance(steps, Tensor) else []
            for parameter in parameters:
                tensors += [parameter, *self.state[parameter].values()]
            key.append((values, [(tensor.data_ptr(), tensor.shape, tensor.stride()) for tensor in tensors]))
        return key

    def __getstate__(self) -> dict[str, Any]:  # a copy has other tensors
        return super().__getstate__() | {"_capture": self._capture, "_captured": None, "_steps_before_capture": 1}

    def _state(self, name: str, parameters: list[Tensor]) -> list[Tensor]:
        for parameter in parameters:
            if name not in self.state[parameter]:
                self.state[parameter][name] = torch.zeros_like(parameter)
        return [self.state[parameter][name] for parameter in parameters]


class _CapturedStep:
    """A step as a CUDA graph. Each replay first copies gradients and learning rates to the tensors that it reads.

    Args:
        key: Everything that the graph fixes.
        groups: Parameter groups, each with its parameters that have gradients.
        update: Takes the step, given groups, gradients and learning rates.
    """

    def __init__(self, key: list[Any], groups: _Groups, update: Callable[..., None]) -> None:
        self.key = key
        device = groups[0][1][0].device
        self._gradients = [[torch.empty_like(one) for one in _gradients(parameters)] for _, parameters in groups]
        self._rates = torch.zeros(len(groups), device=device)
        self._graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.current_stream(device)
        try:
            # With thread_local, other threads may use CUDA meanwhile, for example to pin memory.
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                update(groups, self._gradients, self._rates.unbind())
        finally:
            torch.cuda.set_stream(stream)  # which PyTorch does not do if a capture fails

    def replay(self, groups: _Groups) -> None:
        """Take a step with the current gradients and learning rates of the groups."""
        to = [gradient for ours in self._gradients for gradient in ours]
        torch._foreach_copy_(to, [gradient for _, parameters in groups for gradient in _gradients(parameters)])
        for number, (group, _) in enumerate(groups):
            self._rates[number].fill_(_rate(group))
        self._graph.replay()


def _rate(group: dict[str, Any]) -> float:
    return group["lr"] * group["lr_factor"]


def _is_channels_last(parameter: Tensor) -> bool:
    return parameter.ndim == 5 and not parameter.is_contiguous()


def _as_matrix(tensor: Tensor, is_channels_last: bool) -> Tensor:
    """Flatten to (outputs, inputs). Inputs keep their order in memory, which does not change the step."""
    return (tensor.movedim(1, -1) if is_channels_last else tensor).flatten(1)


def _like(parameter: Tensor, matrix: Tensor) -> Tensor:
    """Undo ``_as_matrix``."""
    if not _is_channels_last(parameter):
        return matrix.view(parameter.shape)
    return matrix.view(parameter.movedim(1, -1).shape).movedim(-1, 1)


def _gradients(parameters: list[Tensor]) -> list[Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def _alike(parameters: list[Tensor]) -> list[list[int]]:
    """Group the indices of the parameters by shape and memory layout."""
    found: dict[tuple[torch.Size, bool], list[int]] = {}
    for number, parameter in enumerate(parameters):
        found.setdefault((parameter.shape, _is_channels_last(parameter)), []).append(number)
    return list(found.values())


def orthogonalize(batches: Sequence[Tensor]) -> list[Tensor]:
    """Return approximately the nearest (semi-)orthogonal matrices, U V^T of the singular value decomposition U S V^T.

    Newton-Schulz multiplies by polynomials of X X^T only. These commute, so all rounds work on that matrix, which is
    small where X is wide, and X itself is multiplied once. A network has many shapes, but few different numbers of
    rows. So the rounds, two dozen small operations that a GPU waits for, run once for each number of rows.

    The price is precision: singular values are squared, and rounding errors of X X^T grow by a factor of 485^2 in five
    rounds. So products are computed in float32, even if autocast, TF32 or bfloat16 is allowed elsewhere.

    Args:
        batches: Tensors of shape (B, n, m), finite, all on one device.

    Returns:
        A tensor of shape (B, n, m) for each batch, in float32, with the same singular vectors. Singular values of at
        least 0.0015 times the Frobenius norm become 0.68 to 1.203. Smaller ones become at most 485 times their ratio to
        the norm, with an error of up to 2e-3. Matrices with a norm below 1e-7 become about 0.
    """
    wide = [batch.mT if batch.shape[1] > batch.shape[2] else batch for batch in batches]
    kind = batches[0].device.type  # older versions of PyTorch have no autocast on other devices
    no_autocast = torch.autocast(kind, enabled=False) if kind in ("cpu", "cuda") else nullcontext()
    with no_autocast, _full_float32():
        wide = [batch.float() for batch in wide]
        norms = [torch.linalg.matrix_norm(batch, keepdim=True).clamp(min=_EPSILON) for batch in wide]
        by_rows: dict[int, list[int]] = {}
        for number, batch in enumerate(wide):
            by_rows.setdefault(batch.shape[1], []).append(number)
        orthogonal: dict[int, Tensor] = {}
        for numbers in by_rows.values():
            normal = (wide[number] / norms[number] for number in numbers)
            grams = torch.cat([torch.bmm(matrices, matrices.mT) for matrices in normal])
            factors = _newton_schulz(grams).split([len(wide[number]) for number in numbers])
            for number, factor in zip(numbers, factors, strict=True):
                orthogonal[number] = torch.bmm(factor / norms[number], wide[number])
    ours = [orthogonal[number] for number in range(len(wide))]
    return [one.mT if one.shape != batch.shape else one for one, batch in zip(ours, batches, strict=True)]


@contextmanager
def _full_float32() -> Iterator[None]:
    """Forbid TF32 and bfloat16 in products of float32 matrices, on GPUs and CPUs. Set nothing if neither is allowed.

    PyTorch's settings are read before they are set, so that torch.compile can trace the usual case.
    """
    backends: Any = torch.backends
    if not hasattr(backends.cuda.matmul, "fp32_precision"):  # before PyTorch 2.9
        precision = torch.get_float32_matmul_precision()
        if precision == "highest":
            yield
            return
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(precision)
        return
    # In these versions, torch.get_float32_matmul_precision raises an error if both kinds of settings were used.
    kinds = (backends.cuda.matmul, backends.mkldnn.matmul)
    lowered = [(kind, kind.fp32_precision) for kind in kinds if kind.fp32_precision not in ("none", "ieee")]
    try:
        for kind, _ in lowered:
            kind.fp32_precision = "ieee"
        yield
    finally:
        for kind, precision in lowered:
            # "none" follows the setting for all kinds, as before
            kind.fp32_precision = "none" if precision == backends.fp32_precision else precision


def _newton_schulz(gram: Tensor) -> Tensor:
    """Return the factors that orthogonalise matrices X of norm 1, given all X X^T, (B, n, n)."""
    a, b, c = _COEFFICIENTS
    factor = None
    for _ in range(_ROUNDS):
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        polynomial.diagonal(dim1=1, dim2=2).add_(a)
        factor = polynomial if factor is None else torch.bmm(polynomial, factor)
        gram = torch.bmm(torch.bmm(polynomial, gram), polynomial)
    assert factor is not None
    return factor


def muon_of(network: nn.Module, lr: float, weight_decay: float, capture: bool = False) -> Muon:
    """Return Muon for the hidden matrices of a network, with Adam for embeddings, output layers, norms and biases.

    Hidden matrices are the weights of convolutions, transposed convolutions and linear layers, including a U-Net's
    first convolution, except in

    - output layers: nnU-Net's ``seg_layers``, and Primus's ``PatchDecode``;
    - Primus's patch embeddings.

    Args:
        network: PlainConvUNet, ResidualEncoderUNet, Primus, a network of this package, or another one with the same
            kinds of layers; bare or in a wrapper such as DistributedDataParallel.
        lr: Muon's learning rate; Adam's is a tenth of it.
        weight_decay: Weight decay of the hidden matrices.
        capture: See `Muon`.

    Raises:
        InputError: If the role of a parameter is unclear, or the output layers are not found.
    """
    matrices, transposed, others = _sorted_parameters(network)
    groups = [
        {"params": matrices, "orthogonal": True, "weight_decay": weight_decay},
        {"params": transposed, "orthogonal": True, "transposed": True, "weight_decay": weight_decay},
        {"params": others, "lr_factor": ADAM_LR_FACTOR},
    ]
    return Muon([group for group in groups if group["params"]], lr, capture=capture)


def _sorted_parameters(network: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter], list[nn.Parameter]]:
    """Return hidden matrices (outputs, inputs, ...), hidden matrices (inputs, outputs, ...), and other parameters."""
    decoders = _loaded(_DECODERS)
    not_hidden = (*_loaded(_EMBEDDINGS), *decoders)
    tokens = {name: _loaded(classes) for name, classes in _TOKENS.items()}
    matrices: dict[nn.Parameter, bool] = {}
    others: dict[nn.Parameter, None] = {}
    unknown: list[str] = []
    outside: list[str] = []
    has_output = False
    # A parameter that several modules share is visited in each of them. Muon takes it only if it is hidden in all.
    for name, module in network.named_modules(remove_duplicate=False):
        prefix = f"{name}." if name else ""
        has_output |= isinstance(module, decoders) or _HEADS in name.split(".")
        if isinstance(module, not_hidden) or name.rpartition(".")[2] == _HEADS:
            outside.append(prefix)
        is_hidden = not prefix.startswith(tuple(outside))
        for key, parameter in module.named_parameters(recurse=False):
            is_weight = isinstance(module, (nn.Linear, _ConvNd)) and key == "weight"
            is_token = isinstance(module, tokens.get(key, ()))
            if parameter.ndim < 2 or is_token or (is_weight and not is_hidden):
                others[parameter] = None
            elif is_weight and getattr(module, "groups", 1) == 1:
                matrices[parameter] = isinstance(module, _ConvTransposeNd)
            else:
                shape = "x".join(map(str, parameter.shape))
                unknown.append(f"{prefix}{key} ({shape}, of {type(module).__name__})")
    what = f"of {type(network).__name__}"
    advice = "Train it with another optimiser, or pass parameter groups to nnunet_conres.optimizers.Muon."
    if unknown:
        raise InputError(
            f"Muon can't tell whether these parameters {what} are hidden matrices: {', '.join(unknown)}. Expected "
            f"weights of convolutions with groups=1, weights of linear layers, or parameters of one dimension. {advice}"
        )
    if not has_output:
        raise InputError(
            f"Muon can't tell which layers {what} make its output. Expected them in a module called {_HEADS}, as in "
            f"nnU-Net's networks. {advice}"
        )
    hidden = [parameter for parameter in matrices if parameter not in others]
    return (
        [parameter for parameter in hidden if not matrices[parameter]],
        [parameter for parameter in hidden if matrices[parameter]],
        list(others),
    )


def _loaded(classes: Iterable[tuple[str, str]]) -> tuple[type, ...]:
    """Return the classes whose modules are imported: a network has no others, and importing Primus takes seconds."""
    found = (getattr(sys.modules.get(module), name, None) for module, name in classes)
    return tuple(one for one in found if isinstance(one, type))
