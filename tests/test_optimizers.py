from __future__ import annotations

import copy
import functools
import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nnunet_conres.architectures.conresnet import ConResNet
from nnunet_conres.architectures.conresnet_paper import ConResNetPaper
from nnunet_conres.architectures.residual_map_unet import ResidualMapUNet
from nnunet_conres.architectures.unet3d import UNet3D
from nnunet_conres.architectures.vnet import VNet
from nnunet_conres.errors import InputError
from nnunet_conres.optimizers import MUON_LR, MUON_WEIGHT_DECAY, Muon, muon_of, orthogonalize
from tests.small_networks import arguments


def newton_schulz(matrix: Tensor) -> Tensor:
    """Run five iterations on the whole matrix as in the source, but in double precision."""
    x = matrix.double()
    x = x / x.norm()
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


class TestOrthogonalize:
    @pytest.mark.parametrize("shape", [(32, 27), (32, 864), (96, 32), (3, 3)])
    def test_is_newton_schulz(self, shape: tuple[int, int]) -> None:
        matrices = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
        (found,) = orthogonalize([matrices])
        for matrix, one in zip(matrices, found, strict=True):
            wide = shape[0] <= shape[1]
            expected = newton_schulz(matrix) if wide else newton_schulz(matrix.mT).mT
            torch.testing.assert_close(one.double(), expected, rtol=0, atol=1e-4)

    def test_singular_values_become_about_1_and_vectors_stay(self) -> None:
        matrix = torch.randn(24, 60, generator=torch.Generator().manual_seed(1))
        u, _, v = torch.linalg.svd(matrix, full_matrices=False)
        found = orthogonalize([1e-6 * matrix[None]])[0][0]  # the norm must not matter
        assert ((torch.linalg.svdvals(found) > 0.65) & (torch.linalg.svdvals(found) < 1.25)).all()
        in_their_axes = u.mT @ found @ v.mT
        off_diagonal = in_their_axes - torch.diag(in_their_axes.diagonal())
        assert off_diagonal.abs().max() < 1e-4

    def test_what_is_nearly_singular(self) -> None:
        generator = torch.Generator().manual_seed(2)
        u, _, v = torch.linalg.svd(torch.randn(64, 400, generator=generator), full_matrices=False)
        matrix = u @ torch.diag(10 ** torch.linspace(0, -7, 64)) @ v
        found = orthogonalize([matrix[None]])[0][0]
        torch.testing.assert_close(found.double(), newton_schulz(matrix), rtol=0, atol=1e-3)

    def test_in_single_precision_whatever_the_trainer_has(self) -> None:
        """Steps under bfloat16 autocast were unstable: squaring the singular values loses half of the digits."""
        matrices = torch.randn(1, 32, 100, generator=torch.Generator().manual_seed(3))
        with torch.autocast("cpu", torch.bfloat16):
            (found,) = orthogonalize([matrices])
        assert torch.equal(found, orthogonalize([matrices])[0])

    def test_nothing_of_nothing(self) -> None:
        (found,) = orthogonalize([torch.zeros(1, 4, 9)])
        assert torch.equal(found, torch.zeros(1, 4, 9))

    def test_batches_do_not_mix(self) -> None:
        """Some have the same number of rows, possibly after transposition, and are computed together."""
        generator = torch.Generator().manual_seed(4)
        shapes = [(2, 8, 30), (1, 12, 12), (3, 8, 9), (1, 40, 8), (2, 12, 50)]
        batches = [10.0**number * torch.randn(*shape, generator=generator) for number, shape in enumerate(shapes)]
        before = [batch.clone() for batch in batches]
        for batch, found in zip(batches, orthogonalize(batches), strict=True):
            for matrix, one in zip(batch, found, strict=True):
                wide = matrix.shape[0] <= matrix.shape[1]
                expected = newton_schulz(matrix) if wide else newton_schulz(matrix.mT).mT
                torch.testing.assert_close(one.double(), expected, rtol=0, atol=1e-4)
        assert all(map(torch.equal, batches, before))


def with_singular_values(rows: int, columns: int, values: Tensor) -> Tensor:
    noise = torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(rows + columns))
    u, _, v = torch.linalg.svd(noise, full_matrices=False)
    return ((u * values.double()) @ v).float()


def dominated(ratio: float) -> Tensor:
    values = torch.full((64,), ratio)
    values[0] = 1
    return with_singular_values(64, 400, values)


def gaussian(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


ADVERSARIAL: dict[str, Callable[[], Tensor]] = {
    "square": lambda: gaussian(320, 320),
    "wide": lambda: gaussian(32, 864),
    "tall": lambda: gaussian(864, 32),
    "one dominant direction, 1e-3": lambda: dominated(1e-3),
    "one dominant direction, 1e-4": lambda: dominated(1e-4),
    "one dominant direction, 1e-6": lambda: dominated(1e-6),
    "half of the rank": lambda: with_singular_values(64, 400, torch.arange(64) < 32),
    "rank 1": lambda: with_singular_values(320, 2000, torch.arange(320) < 1),
    "seven decades, wide": lambda: with_singular_values(64, 400, 10 ** torch.linspace(0, -7, 64)),
    "seven decades, tall": lambda: with_singular_values(400, 64, 10 ** torch.linspace(0, -7, 64)),
    "equal rows": lambda: torch.ones(64, 1) @ gaussian(1, 400),
    "kernel 1x1x1": lambda: gaussian(32, 16),
    "one number": lambda: torch.full((1, 1), -3.0),
    "one row": lambda: gaussian(1, 27),
    "one column": lambda: gaussian(32, 1),
    "large": lambda: 1e12 * gaussian(8, 30),
    "small": lambda: 1e-5 * gaussian(8, 30),
    "zero": lambda: torch.zeros(16, 27),
}


def to_tf32(value: Tensor) -> Tensor:
    """Round float32 to ten bits of mantissa, as a GPU does with the operands of a product under TF32."""
    bits = value.contiguous().view(torch.int32)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


class LowPrecision(TorchDispatchMode):
    """A device that rounds the operands of matrix products if PyTorch's ``setting`` for CUDA or MKL-DNN allows it."""

    def __init__(self, setting: Any) -> None:
        super().__init__()
        self.setting = setting
        self.products: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        n_added = {torch.ops.aten.bmm.default: 0, torch.ops.aten.baddbmm.default: 1}.get(func)
        if n_added is not None:
            precision = self.setting.fp32_precision
            self.products.append(precision)
            if precision == "tf32":
                args = (*args[:n_added], *(to_tf32(arg) for arg in args[n_added:]))
            if precision == "bf16":
                args = (*args[:n_added], *(arg.bfloat16().float() for arg in args[n_added:]))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def precision_settings() -> Iterator[Any]:
    """PyTorch's settings for products of float32 matrices. The defaults are restored after the test."""
    backends: Any = torch.backends
    if not hasattr(backends.cuda.matmul, "fp32_precision"):
        pytest.skip("this PyTorch has no settings per device")
    yield backends
    torch.set_float32_matmul_precision("highest")
    for one in (backends, backends.cuda.matmul, backends.mkldnn.matmul):
        one.fp32_precision = "none"


class TestPrecision:
    """Singular values of difficult matrices, against the SVD in double precision."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("name", ADVERSARIAL)
    def test_singular_values(self, name: str, dtype: torch.dtype) -> None:
        matrix = ADVERSARIAL[name]().to(dtype)
        found = orthogonalize([matrix[None]])[0][0].double()
        u, values, v = torch.linalg.svd(matrix.double(), full_matrices=False)
        relative = values / values.norm().clamp(min=1e-7)
        expected = relative
        for _ in range(5):
            expected = 3.4445 * expected - 4.7750 * expected**3 + 2.0315 * expected**5
        assert torch.linalg.matrix_norm(found - (u * expected) @ v, 2) < 2e-3
        # the documented range, for each singular vector
        in_their_axes = (u.mT @ found @ v.mT).diagonal()
        assert in_their_axes[relative > 0.0015].numel() == 0 or in_their_axes[relative > 0.0015].min() > 0.68 - 1e-3
        assert in_their_axes.max() < 1.203 + 1e-3
        assert (in_their_axes <= 485 * relative + 1e-3).all()

    @pytest.mark.parametrize("name", ["one dominant direction, 1e-3", "rank 1", "seven decades, tall"])
    def test_rounding_to_tf32_would_spoil_it(self, name: str, precision_settings: Any) -> None:
        """The emulation shows the rounding, so the tests below would fail if products were not guarded against it."""
        from nnunet_conres import optimizers

        matrix = ADVERSARIAL[name]()
        wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT
        gram = (wide @ wide.mT / wide.norm() ** 2)[None]
        precision_settings.cuda.matmul.fp32_precision = "tf32"
        with LowPrecision(precision_settings.cuda.matmul) as device:
            rounded = optimizers._newton_schulz(to_tf32(gram))
        assert set(device.products) == {"tf32"}
        assert torch.linalg.matrix_norm((rounded[0] @ wide / wide.norm()).double(), 2) > 0.72  # 0.696 or 1.203 exactly
        exact = optimizers._newton_schulz(gram)
        assert torch.linalg.matrix_norm((rounded - exact)[0] @ wide / wide.norm(), 2) > 0.2

    @pytest.mark.parametrize(
        ("rounded", "form", "lowest", "largest"),
        [
            ("all", "float32", 0.682, 1.202),
            ("last", "TF32", 0.496, 1.202),
            ("last", "bfloat16", 0.0, 2.57),
            ("on X", "TF32", 0.682, 1.202),
            ("on X", "bfloat16", 0.669, 1.202),
        ],
    )
    def test_documented_ranges(self, rounded: str, form: str, lowest: float, largest: float) -> None:
        """The table of docs/explanation/muon.md: smallest and largest singular values, tiny ones left out."""
        from nnunet_conres import optimizers

        cast = {"float32": Tensor.float, "TF32": to_tf32, "bfloat16": lambda x: x.bfloat16().float()}[form]
        matrices = {name: make() for name, make in ADVERSARIAL.items() if name != "zero"}
        matrices |= {f"{n} equal rows": torch.ones(n, 1) @ gaussian(1, 400) for n in (7, 130, 145)}
        smallest, largests = [], []
        for matrix in matrices.values():
            wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT
            x = wide / wide.norm()
            u, values, v = torch.linalg.svd(x.double(), full_matrices=False)
            if rounded == "on X":
                a, b, c = optimizers._COEFFICIENTS
                for _ in range(5):
                    gram = cast(x) @ cast(x).mT
                    x = a * x + cast(b * gram + c * cast(gram) @ cast(gram)) @ cast(x)
            else:
                factor = optimizers._newton_schulz((x @ x.mT)[None])[0]
                x = cast(factor / wide.norm()) @ cast(wide)
            smallest.append((u.mT @ x.double() @ v.mT).diagonal()[values > 0.0015].min().item())
            largests.append(torch.linalg.matrix_norm(x.double(), 2).item())
        assert min(smallest) == pytest.approx(lowest, abs=0.02)
        assert max(largests) == pytest.approx(largest, rel=0.02)

    @pytest.mark.parametrize("allowed", ["allow_tf32", "high", "medium", "all devices", "matmul"])
    @pytest.mark.parametrize("device", ["cuda", "mkldnn"])
    def test_nothing_is_rounded_whatever_is_allowed(self, device: str, allowed: str, precision_settings: Any) -> None:
        backends = precision_settings
        setting = getattr(backends, device).matmul
        matrices = [ADVERSARIAL[name]()[None] for name in ("one dominant direction, 1e-3", "rank 1")]
        expected = orthogonalize(matrices)
        if allowed == "allow_tf32":
            backends.cuda.matmul.allow_tf32 = True
        elif allowed == "all devices":
            backends.fp32_precision = "tf32"
        elif allowed == "matmul":
            setting.fp32_precision = "tf32"
        else:
            torch.set_float32_matmul_precision(allowed)
        before = [one.fp32_precision for one in (backends, backends.cuda.matmul, backends.mkldnn.matmul)]
        with LowPrecision(setting) as emulated:
            found = orthogonalize(matrices)
        assert emulated.products
        assert set(emulated.products) <= {"ieee", "none"}
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        after = [one.fp32_precision for one in (backends, backends.cuda.matmul, backends.mkldnn.matmul)]
        assert after == before

    def test_what_follows_a_general_setting_goes_on_following_it(self, precision_settings: Any) -> None:
        precision_settings.fp32_precision = "tf32"
        orthogonalize([torch.ones(1, 2, 3)])
        precision_settings.fp32_precision = "ieee"
        assert precision_settings.cuda.matmul.fp32_precision == "ieee"

    def test_settings_come_back_after_an_error(self, precision_settings: Any) -> None:
        torch.set_float32_matmul_precision("high")
        with pytest.raises(RuntimeError):
            orthogonalize([torch.ones(1, 2, 3), torch.ones(1, 2, 3, device="meta")])
        assert torch.get_float32_matmul_precision() == "high"

    def test_older_versions_of_pytorch(self, precision_settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        class Old:
            """Settings without ``fp32_precision``."""

        inside: list[str] = []
        norm = torch.linalg.matrix_norm

        def matrix_norm(*args: Any, **kwargs: Any) -> Tensor:
            inside.append(torch.get_float32_matmul_precision())
            return norm(*args, **kwargs)

        monkeypatch.setattr(torch.backends.cuda, "matmul", Old())
        monkeypatch.setattr(torch.linalg, "matrix_norm", matrix_norm)
        torch.set_float32_matmul_precision("medium")
        orthogonalize([torch.ones(1, 2, 3)])
        assert inside == ["highest"]
        assert torch.get_float32_matmul_precision() == "medium"

    @pytest.mark.gpu
    def test_tf32_on_a_gpu(self, precision_settings: Any) -> None:
        matrices = [ADVERSARIAL[name]()[None] for name in ("one dominant direction, 1e-3", "rank 1", "square")]
        expected = orthogonalize(matrices)
        torch.backends.cuda.matmul.allow_tf32 = True
        for one, other in zip(orthogonalize([matrix.cuda() for matrix in matrices]), expected, strict=True):
            assert torch.linalg.matrix_norm((one.cpu() - other).double(), 2) < 4e-3


def same_parameters(shape: tuple[int, ...]) -> tuple[nn.Parameter, nn.Parameter]:
    start = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return nn.Parameter(start.clone()), nn.Parameter(start.clone())


def assert_same_steps(one: torch.optim.Optimizer, other: torch.optim.Optimizer, atol: float = 1e-6) -> None:
    """Check that four steps of both optimisers give the same result. Each has one parameter."""
    (ours,), (theirs,) = (optimizer.param_groups[0]["params"] for optimizer in (one, other))
    generator = torch.Generator().manual_seed(1)
    before = ours.detach().clone()
    for _ in range(4):
        gradient = torch.randn(ours.shape, generator=generator)
        for parameter, optimizer in ((ours, one), (theirs, other)):
            parameter.grad = gradient.clone()
            optimizer.step()
    assert (ours - before).abs().max() > 0.02
    torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


class TestMuon:
    @pytest.mark.parametrize("shape", [(8, 40), (40, 8), (12, 12)])
    def test_is_pytorchs(self, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
        """The same steps as torch.optim.Muon, with its default for ``adjust_lr_fn``, "original".

        Its momentum buffer is an average, (1 - momentum) times ours. This has no effect, because steps are scaled to
        norm 1 first. It computes in bfloat16, which the test replaces by the precision of the parameters.
        """
        if not hasattr(torch.optim, "Muon"):
            pytest.skip("this PyTorch has no Muon")
        monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
        ours, theirs = same_parameters(shape)
        assert_same_steps(
            Muon([{"params": [ours], "orthogonal": True}], lr=0.03, momentum=0.9, weight_decay=0.1),
            torch.optim.Muon([theirs], lr=0.03, momentum=0.9, weight_decay=0.1, nesterov=True),
        )

    def test_is_pytorchs_in_bfloat16(self) -> None:
        """Against PyTorch's unchanged Muon, whose five iterations in bfloat16 have three significant digits."""
        if not hasattr(torch.optim, "Muon"):
            pytest.skip("this PyTorch has no Muon")
        ours, theirs = same_parameters((8, 40))
        assert_same_steps(
            Muon([{"params": [ours], "orthogonal": True}], lr=0.03, momentum=0.9, weight_decay=0.1),
            torch.optim.Muon([theirs], lr=0.03, momentum=0.9, weight_decay=0.1, nesterov=True),
            atol=0.03 * 0.02 * 4,
        )

    @pytest.mark.parametrize("shape", [(8, 4, 3, 3, 3), (40, 2, 1, 1, 1), (16, 16, 1, 3, 3), (64, 2, 3, 3)])
    def test_is_timms_for_convolutions(self, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
        """With Jordan's coefficients and learning rate, which are not timm's defaults, and float32 for bfloat16."""
        timm = pytest.importorskip("timm.optim.muon")
        in_float32 = functools.partial(timm.zeropower_via_newtonschulz, dtype=torch.float32)
        monkeypatch.setattr(timm, "zeropower_via_newtonschulz", in_float32)
        ours, theirs = same_parameters(shape)
        assert_same_steps(
            Muon([{"params": [ours], "orthogonal": True}], lr=0.03, momentum=0.9, weight_decay=0.1),
            timm.Muon(
                [{"params": [theirs], "use_muon": True}],
                lr=0.03,
                momentum=0.9,
                weight_decay=0.1,
                nesterov=True,
                ns_coefficients="original",
                adjust_lr_fn="original",
                conv_mode="flatten",
            ),
        )

    def test_other_groups_take_steps_of_adam(self) -> None:
        torch.manual_seed(0)
        start = [torch.randn(5), torch.randn(3, 5)]
        ours, theirs = ([nn.Parameter(value.clone()) for value in start] for _ in range(2))
        optimizers = (
            Muon([{"params": ours, "lr_factor": 0.5}], lr=0.2, weight_decay=0.1),
            torch.optim.AdamW(theirs, lr=0.1, betas=(0.9, 0.99), weight_decay=0.1),
        )
        for _ in range(5):
            gradients = [torch.randn_like(value) for value in start]
            for parameters, optimizer in zip((ours, theirs), optimizers, strict=True):
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter.grad = gradient.clone()
                optimizer.step()
        torch.testing.assert_close(ours, theirs)

    def test_convolutions_are_matrices_of_outputs_by_all_else(self) -> None:
        torch.manual_seed(0)
        conv = nn.Parameter(torch.randn(6, 4, 3, 3, 3))
        matrix = nn.Parameter(conv.detach().reshape(6, 108).clone())
        gradient = torch.randn(6, 4, 3, 3, 3)
        conv.grad, matrix.grad = gradient, gradient.reshape(6, 108)
        Muon([{"params": [conv, matrix], "orthogonal": True}], lr=0.1).step()
        torch.testing.assert_close(conv.detach().reshape(6, 108), matrix.detach())

    def test_parameters_of_one_shape_do_not_mix(self) -> None:
        torch.manual_seed(0)
        together = [nn.Parameter(torch.zeros(4, 6)) for _ in range(3)]
        alone = [nn.Parameter(torch.zeros(4, 6)) for _ in range(3)]
        for one, other in zip(together, alone, strict=True):
            one.grad = torch.randn(4, 6)
            other.grad = one.grad.clone()
            Muon([{"params": [other], "orthogonal": True}], lr=1).step()
        Muon([{"params": together, "orthogonal": True}], lr=1).step()
        torch.testing.assert_close(together, alone)

    def test_weight_decay_goes_by_the_rate(self) -> None:
        parameter = nn.Parameter(torch.full((2, 2), 8.0))
        parameter.grad = torch.zeros(2, 2)
        Muon([{"params": [parameter], "orthogonal": True}], lr=0.5, weight_decay=0.5).step()
        assert torch.equal(parameter.detach(), torch.full((2, 2), 6.0))

    def test_state_goes_on(self) -> None:
        torch.manual_seed(0)
        networks: list[nn.Module] = [nn.ModuleDict({"conv": nn.Conv3d(2, 4, 3), "seg_layers": nn.Conv3d(4, 2, 1)})]
        optimizers = [muon_of(networks[0], 0.1, 0.01)]
        gradients = [[torch.randn_like(parameter) for parameter in networks[0].parameters()] for _ in range(4)]

        def step(which: int, number: int) -> None:
            for parameter, gradient in zip(networks[which].parameters(), gradients[number], strict=True):
                parameter.grad = gradient.clone()
            optimizers[which].step()

        step(0, 0)
        step(0, 1)
        networks.append(copy.deepcopy(networks[0]))
        optimizers.append(muon_of(networks[1], 0.7, 0))
        optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
        for which in (0, 1):
            step(which, 2)
            step(which, 3)
        torch.testing.assert_close(list(networks[0].parameters()), list(networks[1].parameters()), rtol=0, atol=0)

    @pytest.mark.gpu
    def test_a_gpu_takes_the_steps_of_a_cpu(self) -> None:
        torch.manual_seed(0)
        here = nn.ModuleDict(
            {
                "conv": nn.Conv3d(3, 8, 3),
                "norm": nn.InstanceNorm3d(8, affine=True),
                "up": nn.ConvTranspose3d(8, 4, 2, 2),
                "seg_layers": nn.Conv3d(4, 2, 1),
            }
        )
        there = copy.deepcopy(here).cuda()
        optimizers = [muon_of(network, 0.1, 0.01) for network in (here, there)]
        for _ in range(3):
            for one, other in zip(here.parameters(), there.parameters(), strict=True):
                one.grad = torch.randn_like(one)
                other.grad = one.grad.cuda()
            for optimizer in optimizers:
                optimizer.step()
        for one, other in zip(here.parameters(), there.parameters(), strict=True):
            torch.testing.assert_close(one, other.cpu(), rtol=0, atol=1e-4)

    def test_without_gradient_nothing_moves(self) -> None:
        still, moving = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(2, 3))
        moving.grad = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
        Muon([{"params": [still, moving], "orthogonal": True}], lr=0.1, weight_decay=0.5).step()
        assert torch.equal(still.detach(), torch.ones(2, 3))
        assert not torch.equal(moving.detach(), torch.ones(2, 3))

    @pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf"), -0.1, True, False])
    @pytest.mark.parametrize("name", ["lr", "weight_decay", "momentum", "betas", "eps", "lr_factor"])
    def test_numbers_out_of_range(self, name: str, number: float) -> None:
        value = (0.9, number) if name == "betas" else number
        parameter = nn.Parameter(torch.ones(2))
        with pytest.raises(ValueError, match=f"Expected .*{name}.*, got .*{number}"):
            Muon([{"params": [parameter], name: value}], lr=0.1)
        if name != "lr_factor":
            with pytest.raises(ValueError, match=f"Expected .*{name}.*, got .*{number}"):
                Muon([parameter], **({"lr": 0.1} | {name: value}))
        with pytest.raises(ValueError, match=f"Expected .*{name}"):
            Muon([nn.Parameter(torch.ones(2))], lr=0.1).add_param_group({"params": [parameter], name: value})

    @pytest.mark.parametrize("wrong", [{"momentum": 1.0}, {"betas": (1.0, 0.9)}, {"eps": 0.0}])
    def test_ends_of_ranges(self, wrong: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match=f"Expected .*{next(iter(wrong))}"):
            Muon([nn.Parameter(torch.ones(2))], lr=0.1, **wrong)
        Muon([nn.Parameter(torch.ones(2))], lr=0.0, momentum=0.0, betas=(0.0, 0.0))

    def test_vectors_are_no_matrices(self) -> None:
        with pytest.raises(ValueError, match=r"parameters of shape \[\(2,\)\]"):
            Muon([{"params": [nn.Parameter(torch.ones(2))], "orthogonal": True}], lr=0.1)


class RecordedGraph(TorchDispatchMode):
    """A CUDA graph on a CPU. Captured operations have no effect. A replay reads and writes the same memory again."""

    made: ClassVar[list[RecordedGraph]] = []

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}
        self.made.append(self)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for one in tree_leaves((args, kwargs)):
            if isinstance(one, Tensor):
                self.before.setdefault(one.data_ptr(), (one, one.clone()))
        output = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, output))
        return output

    def replay(self) -> None:
        for func, args, kwargs, output in self.calls:
            for old, new in zip(tree_leaves(output), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)

    @classmethod
    @contextmanager
    def capture(cls, graph: RecordedGraph, capture_error_mode: str) -> Iterator[None]:
        with graph:
            yield
        for one, value in graph.before.values():
            one.copy_(value)


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[RecordedGraph]:
    """Capture graphs on the CPU. Return the list of graphs."""
    monkeypatch.setattr("nnunet_conres.optimizers._CAPTURE_DEVICES", {"cpu"})
    monkeypatch.setattr(torch.cuda, "CUDAGraph", RecordedGraph)
    monkeypatch.setattr(torch.cuda, "graph", RecordedGraph.capture)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: None)
    RecordedGraph.made = []
    return RecordedGraph.made


def small_network(channels_last: bool = False) -> nn.ModuleDict:
    torch.manual_seed(0)
    network = nn.ModuleDict(
        {
            "conv": nn.Conv3d(3, 8, 3),
            "other": nn.Conv3d(3, 8, 3),
            "norm": nn.InstanceNorm3d(8, affine=True),
            "up": nn.ConvTranspose3d(8, 4, (1, 2, 2), (1, 2, 2)),
            "seg_layers": nn.Conv3d(4, 2, 1),
        }
    )
    return network.to(memory_format=torch.channels_last_3d) if channels_last else network


class TestCapture:
    """Steps replayed from a graph equal those taken one operation at a time."""

    def test_same_steps(self, recorded: list[RecordedGraph]) -> None:
        networks = [small_network(), small_network(channels_last=True)]
        optimizers = [muon_of(network, 0.1, 0.01, capture=network is networks[1]) for network in networks]
        scalers = [torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=3) for _ in networks]
        generator = torch.Generator().manual_seed(1)
        n_graphs, states = [], [optimizer.state_dict() for optimizer in optimizers]
        for number in range(12):
            gradients = [torch.randn(one.shape, generator=generator) for one in networks[0].parameters()]
            if number == 6:
                gradients[2][0] = float("inf")  # the scaler skips this step
            for which, (network, optimizer, scaler) in enumerate(zip(networks, optimizers, scalers, strict=True)):
                PolyLRScheduler(optimizer, 0.1, 12).step(number)
                if number == 8:
                    optimizer.param_groups[0]["momentum"] = 0.5
                if number == 10:  # resumed
                    optimizer = optimizers[which] = muon_of(network, 0.1, 0.01, capture=which == 1)
                    optimizer.load_state_dict(copy.deepcopy(states[1 - which]))
                for parameter, gradient in zip(network.parameters(), gradients, strict=True):
                    parameter.grad = torch.empty_like(parameter).copy_(gradient) * scaler.scale(torch.ones(()))
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(network.parameters(), 12)
                scaler.step(optimizer)
                scaler.update()
            states = [optimizer.state_dict() for optimizer in optimizers]
            torch.testing.assert_close(*(list(network.parameters()) for network in networks), rtol=0, atol=1e-6)
            n_graphs.append(len(recorded))
        # three steps before the first capture, also after resuming; a changed momentum needs a new graph
        assert n_graphs == [0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 2, 2]
        assert networks[1]["up"].weight.is_contiguous(memory_format=torch.channels_last_3d)

    def test_gradients_that_are_not_finite_change_nothing(self, recorded: list[RecordedGraph]) -> None:
        network = small_network()
        optimizer = muon_of(network, 0.1, 0.01, capture=True)
        for number in range(6):
            for parameter in network.parameters():
                parameter.grad = torch.full_like(parameter, float("nan") if number == 5 else 1.0)
            before = copy.deepcopy((list(network.parameters()), optimizer.state_dict()))
            optimizer.step()
        assert len(recorded) == 1
        torch.testing.assert_close(list(network.parameters()), before[0], rtol=0, atol=0)
        assert equal_values(optimizer.state_dict(), before[1])

    def test_a_parameter_that_comes_later(self, recorded: list[RecordedGraph]) -> None:
        networks = [small_network(), small_network()]
        optimizers = [muon_of(network, 0.1, 0.01, capture=network is networks[1]) for network in networks]
        for number in range(8):
            for network, optimizer in zip(networks, optimizers, strict=True):
                for parameter in network.parameters() if number > 4 else network["conv"].parameters():
                    parameter.grad = torch.full_like(parameter, 1.0 + number)
                optimizer.step()
        torch.testing.assert_close(*(list(network.parameters()) for network in networks), rtol=0, atol=1e-6)
        assert len(recorded) == 2

    def test_goes_on_without_where_it_fails(
        self, recorded: list[RecordedGraph], monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
    ) -> None:
        def fail(*_: Any, **__: Any) -> Any:
            raise RuntimeError("operation not permitted when stream is capturing")

        monkeypatch.setattr(torch.cuda, "graph", fail)
        networks = [small_network(), small_network()]
        optimizers = [muon_of(network, 0.1, 0.01, capture=network is networks[1]) for network in networks]
        for number in range(6):
            for network, optimizer in zip(networks, optimizers, strict=True):
                for parameter in network.parameters():
                    parameter.grad = torch.full_like(parameter, 1.0 + number)
                optimizer.step()
        assert [str(one.message) for one in recwarn] == [
            "Muon's steps are not captured in a CUDA graph: operation not permitted when stream is capturing"
        ]
        torch.testing.assert_close(*(list(network.parameters()) for network in networks), rtol=0, atol=0)

    @pytest.mark.gpu
    def test_on_a_gpu(self) -> None:
        networks = [small_network().cuda(), small_network(channels_last=True).cuda()]
        optimizers = [muon_of(network, 0.1, 0.01, capture=network is networks[1]) for network in networks]
        for number in range(8):
            gradients = [torch.randn_like(one) for one in networks[0].parameters()]
            for network, optimizer in zip(networks, optimizers, strict=True):
                PolyLRScheduler(optimizer, 0.1, 8).step(number)
                for parameter, gradient in zip(network.parameters(), gradients, strict=True):
                    parameter.grad = torch.empty_like(parameter).copy_(gradient)
                optimizer.step()
        assert optimizers[1]._captured is not None
        torch.testing.assert_close(*(list(network.parameters()) for network in networks), rtol=0, atol=1e-4)


class TestTransposedConvolutions:
    """With kernel = stride, the input channels x of a voxel become a block of k voxels of all outputs: y = W^T x."""

    @pytest.mark.parametrize("shape", [(8, 4, 2, 2, 2), (8, 8, 1, 2, 2), (24, 4, 1, 1, 2), (6, 2, 2, 2)])
    def test_step_is_that_of_the_linear_map(self, shape: tuple[int, ...]) -> None:
        """PyTorch's Muon, for the matrix (outputs x kernel, inputs) that maps a voxel to its block."""
        if not hasattr(torch.optim, "Muon"):
            pytest.skip("this PyTorch has no Muon")
        ours, _ = same_parameters(shape)
        linear = nn.Parameter(ours.detach().flatten(1).mT.contiguous())
        optimizers = (
            Muon([{"params": [ours], "orthogonal": True, "transposed": True}], lr=0.03, momentum=0.95),
            torch.optim.Muon([linear], lr=0.03, momentum=0.95, weight_decay=0),
        )
        ours.grad = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        linear.grad = ours.grad.flatten(1).mT.contiguous()
        before = ours.detach().clone()
        for optimizer in optimizers:
            optimizer.step()
        changes = (ours.detach() - before).flatten(1).mT
        expected = linear.detach() - before.flatten(1).mT
        assert (changes - expected).norm() < 0.02 * expected.norm()  # PyTorch computes in bfloat16

    @pytest.mark.parametrize(
        "layer",
        [
            nn.Conv3d(1, 32, 3, padding=1),
            nn.Conv3d(16, 32, 3, padding=1),
            nn.Conv3d(32, 32, 2, stride=2),
            nn.ConvTranspose3d(32, 16, 2, stride=2),
            nn.ConvTranspose3d(32, 32, 2, stride=2),
            nn.ConvTranspose3d(32, 16, (1, 2, 2), stride=(1, 2, 2)),
            nn.ConvTranspose3d(48, 8, (1, 1, 2), stride=(1, 1, 2)),
        ],
        ids=str,
    )
    def test_output_changes_by_the_learning_rate(self, layer: nn.Conv3d | nn.ConvTranspose3d) -> None:
        """The root mean square of the change, for inputs of unit variance, for all convolutions and channel counts."""
        torch.manual_seed(0)
        nn.init.zeros_(layer.weight)
        layer.weight.grad = torch.randn_like(layer.weight)
        network = nn.ModuleDict({"layer": layer, "seg_layers": nn.Identity()})
        muon_of(network, lr=0.01, weight_decay=0).step()
        size = [8 * stride for stride in layer.stride]
        with torch.no_grad():
            change = layer(torch.randn(2, layer.in_channels, *size)) - layer.bias.view(-1, 1, 1, 1)
        assert 0.68 <= change[:, :, 1:-1, 1:-1, 1:-1].square().mean().sqrt() / 0.01 <= 1.2


class TestGradientsThatAreNotFinite:
    @staticmethod
    def made() -> tuple[list[nn.Parameter], Muon]:
        torch.manual_seed(0)
        parameters = [nn.Parameter(torch.randn(shape)) for shape in ((4, 3, 3), (5, 4, 2), (6,), (4, 3, 3))]
        groups = [
            {"params": [parameters[0], parameters[3]], "orthogonal": True, "weight_decay": 0.1},
            {"params": [parameters[1]], "orthogonal": True, "transposed": True, "weight_decay": 0.1},
            {"params": [parameters[2]], "lr_factor": 0.1, "weight_decay": 0.1},
        ]
        return parameters, Muon(groups, lr=0.1)

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
    @pytest.mark.parametrize("number", [0, 1, 2])
    @pytest.mark.parametrize("n_before", [0, 2])
    def test_step_changes_nothing(self, value: float, number: int, n_before: int) -> None:
        """The steps after it are also the same as without it."""
        (ours, one), (theirs, other) = self.made(), self.made()
        generator = torch.Generator().manual_seed(1)
        for turn in range(5):
            gradients = [torch.randn(parameter.shape, generator=generator) for parameter in ours]
            if turn == n_before:
                before = copy.deepcopy((ours, one.state_dict()))
                for parameter, gradient in zip(ours, gradients, strict=True):
                    parameter.grad = gradient.clone()
                ours[number].grad.view(-1)[1] = value  # type: ignore[union-attr]
                one.step()
                torch.testing.assert_close(ours, before[0], rtol=0, atol=0)
                if n_before:
                    assert equal_values(one.state_dict(), before[1])
            for parameters, optimizer in ((ours, one), (theirs, other)):
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter.grad = gradient.clone()
                optimizer.step()
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
        assert equal_values(one.state_dict(), other.state_dict())

    def test_after_clipping_as_nnunet_does(self) -> None:
        """Clipping turns all gradients into NaN if one is NaN."""
        parameters, optimizer = self.made()
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        parameters[1].grad[0, 0, 0] = float("nan")  # type: ignore[index]
        torch.nn.utils.clip_grad_norm_(parameters, 12)
        before = copy.deepcopy(parameters)
        optimizer.step()
        torch.testing.assert_close(parameters, before, rtol=0, atol=0)
        assert all(value.isfinite().all() for state in optimizer.state.values() for value in state.values())

    def test_gradients_stay_as_they_are(self) -> None:
        """Other code may read the gradients after the step."""
        parameters, optimizer = self.made()
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter, float("inf"))
        optimizer.step()
        assert all(parameter.grad is not None and parameter.grad.isinf().all() for parameter in parameters)

    def test_device_is_not_waited_for(self) -> None:
        """Fake tensors, which have no values, raise an error if the step reads a value."""
        from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

        with FakeTensorMode():
            parameters, optimizer = self.made()
            for parameter in parameters:
                parameter.grad = torch.ones_like(parameter)
            for _ in range(2):
                optimizer.step()
            assert len(optimizer.state) == len(parameters)
            with pytest.raises(DataDependentOutputException):
                bool(parameters[0].grad.isfinite().all())  # type: ignore[union-attr]

    def test_state_is_saved(self) -> None:
        (ours, one), (_, other) = self.made(), self.made()
        for parameter in ours:
            parameter.grad = torch.ones_like(parameter)
        one.step()
        buffer = io.BytesIO()
        torch.save(one.state_dict(), buffer)
        buffer.seek(0)
        other.load_state_dict(torch.load(buffer, weights_only=True))
        assert equal_values(one.state_dict(), other.state_dict())


@pytest.mark.slow
def test_step_under_torch_compile(precision_settings: Any) -> None:
    for precision in ("highest", "high"):
        torch._dynamo.reset()
        torch.set_float32_matmul_precision(precision)
        (ours, one), (theirs, other) = TestGradientsThatAreNotFinite.made(), TestGradientsThatAreNotFinite.made()
        compiled = torch.compile(one.step, backend="aot_eager")
        for _ in range(3):
            for mine, yours in zip(ours, theirs, strict=True):
                mine.grad = torch.randn_like(mine)
                yours.grad = mine.grad.clone()
            compiled()
            other.step()
        torch.testing.assert_close(ours, theirs)
        assert torch.get_float32_matmul_precision() == precision


def equal_values(one: Any, other: Any) -> bool:
    """Return whether nested dictionaries and lists have the same numbers."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal_values(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal_values, one, other))
    return torch.equal(torch.as_tensor(one), torch.as_tensor(other)) if isinstance(one, Tensor) else one == other


UNET = arguments(
    input_channels=2,
    num_classes=3,
    features_per_stage=[4, 8, 8],
    norm_op_kwargs={"affine": True},
    nonlin_kwargs={},
    deep_supervision=True,
)
FLAT: dict[str, Any] = UNET | {
    "conv_op": nn.Conv2d,
    "norm_op": nn.InstanceNorm2d,
    "kernel_sizes": 3,
    "strides": [1, 2, 2],
}
CONVS = {"n_conv_per_stage": [2, 2, 2], "n_conv_per_stage_decoder": [2, 2]}
BLOCKS = {"n_blocks_per_stage": [1, 2, 2], "n_conv_per_stage_decoder": [1, 1]}
PRIMUS: dict[str, Any] = {
    "input_channels": 2,
    "num_classes": 3,
    "embed_dim": 24,
    "patch_embed_size": (8, 8, 8),
    "eva_depth": 2,
    "eva_numheads": 2,
    "input_shape": (16, 16, 16),
    "num_register_tokens": 2,
    "init_values": 0.1,
    "scale_attn_inner": True,
}
IN_BLOCKS = r"eva\.blocks\.\d+\.(attn\.(q_proj|k_proj|v_proj|proj)|mlp\.(fc1_g|fc1_x|fc2))\.weight"


def primus(name: str) -> nn.Module:
    from dynamic_network_architectures.architectures import primus

    if not hasattr(primus, name):
        pytest.skip(f"this version of dynamic-network-architectures has no {name}")
    return getattr(primus, name)(**PRIMUS)  # type: ignore[no-any-return]


RESIDUAL_ENCODER = r"encoder\.(stem|stages)\..*\.conv\.weight"


# network, name patterns of the matrices and of the transposed matrices, number of each
NETWORKS: dict[str, tuple[Callable[[], nn.Module], str, str, int, int]] = {
    "PlainConvUNet": (
        lambda: PlainConvUNet(**UNET, **CONVS),
        r"(en|de)coder\.stages\..*\.conv\.weight",
        r"decoder\.transpconvs\.\d\.weight",
        10,
        2,
    ),
    "PlainConvUNet, 2D": (
        lambda: PlainConvUNet(**FLAT, **CONVS),
        r"(en|de)coder\.stages\..*\.conv\.weight",
        r"decoder\.transpconvs\.\d\.weight",
        10,
        2,
    ),
    "PlainConvUNet with batch norm": (
        lambda: PlainConvUNet(**(UNET | {"norm_op": nn.BatchNorm3d}), **CONVS),
        r"(en|de)coder\.stages\..*\.conv\.weight",
        r"decoder\.transpconvs\.\d\.weight",
        10,
        2,
    ),
    "ResidualEncoderUNet": (
        lambda: ResidualEncoderUNet(**UNET, **BLOCKS),
        r"(encoder\.stem|(en|de)coder\.stages)\..*\.conv\.weight",
        r"decoder\.transpconvs\.\d\.weight",
        14,  # stem, two in each of five blocks, one skip that changes the channels, two in the decoder
        2,
    ),
    "Primus": (lambda: primus("Primus"), IN_BLOCKS, "-", 14, 0),
    "PrimusV2": (lambda: primus("PrimusV2"), IN_BLOCKS, "-", 14, 0),
    "PrimusV3": (lambda: primus("PrimusV3"), IN_BLOCKS, "-", 14, 0),
    "VNet": (
        lambda: VNet(**UNET, **CONVS),
        r"encoder\..*\.conv\.weight|decoder\.stages\..*\.conv\.weight",
        r"decoder\.up\.\d\.conv\.weight",
        12,  # as in PlainConvUNet, and two that lower the resolution
        2,
    ),
    "UNet3D": (
        lambda: UNet3D(**UNET, **CONVS),
        r"encoder\..*weight|decoder\.stages\..*\.conv\.weight",
        r"decoder\.up\.\d\.weight",
        12,
        2,
    ),
    "ConResNet": (
        lambda: ConResNet(**UNET, **BLOCKS),
        rf"{RESIDUAL_ENCODER}|decoder\.stages\..*\.weight",
        r"decoder\.(segmentation|residual)_up\.\d\.weight",
        19,  # four per context residual module, but no projection in the second, which has the right channels
        3,
    ),
    "ConResNet with a shared encoder": (
        lambda: ConResNet(**UNET, **BLOCKS, shared_encoder=True),
        rf"{RESIDUAL_ENCODER}|decoder\.stages\..*\.weight",
        r"decoder\.(segmentation|residual)_up\.\d\.weight",
        18,
        4,
    ),
    "ConResNetPaper": (lambda: ConResNetPaper(2, 3), r"(encoder|decoder\.(stages|.*_up))\..*weight", "-", 34, 0),
    "ResidualMapUNet": (
        lambda: ResidualMapUNet(**UNET, **BLOCKS),
        rf"{RESIDUAL_ENCODER}|decoder\.stages\..*\.conv\.weight",
        r"decoder\.up\.\d\.weight",
        14,
        2,
    ),
}


class TestWhichParameters:
    @pytest.mark.parametrize("name", NETWORKS)
    def test_of_networks_that_can_be_planned(self, name: str) -> None:
        make, hidden, transposed, n_hidden, n_transposed = NETWORKS[name]
        network = make()
        parameters = dict(network.named_parameters())
        found = {"matrices": set[str](), "transposed": set[str](), "others": set[str]()}
        names = {parameter: key for key, parameter in parameters.items()}
        for group in muon_of(network, MUON_LR, MUON_WEIGHT_DECAY).param_groups:
            kind = ("transposed" if group["transposed"] else "matrices") if group["orthogonal"] else "others"
            found[kind] |= {names[parameter] for parameter in group["params"]}
        many = {key for key, parameter in parameters.items() if parameter.ndim > 1}
        up = {key for key in many if re.fullmatch(transposed, key)}
        expected = {key for key in many - up if re.fullmatch(hidden, key)}
        assert found["transposed"] == up
        assert found["matrices"] == expected
        assert found["others"] == set(parameters) - up - expected
        assert (len(expected), len(up)) == (n_hidden, n_transposed)

    def test_hyperparameters(self) -> None:
        network = PlainConvUNet(**UNET, **CONVS)
        matrices, transposed, others = muon_of(network, MUON_LR, MUON_WEIGHT_DECAY).param_groups
        for group in (matrices, transposed):
            assert group["lr"] * group["lr_factor"] * group["weight_decay"] == pytest.approx(3e-5)
        assert others["weight_decay"] == 0
        assert others["lr"] * others["lr_factor"] == pytest.approx(3e-3)

    def test_of_a_wrapped_network(self) -> None:
        network = primus("Primus")
        wrapped = nn.ModuleDict({"module": network})  # as by DistributedDataParallel
        groups = [muon_of(one, 0.1, 0).param_groups for one in (network, wrapped)]
        for one, other in zip(*groups, strict=True):
            assert [id(parameter) for parameter in one["params"]] == [id(parameter) for parameter in other["params"]]

    def test_what_is_used_as_an_output_too_is_adams(self) -> None:
        conv = nn.Conv3d(4, 4, 1, bias=False)
        network = nn.ModuleDict({"conv": conv, "seg_layers": nn.ModuleList([conv]), "other": nn.Conv3d(4, 4, 3)})
        matrices, others = muon_of(network, 0.1, 0).param_groups
        assert [parameter.shape[-1] for parameter in matrices["params"]] == [3]
        assert any(parameter is conv.weight for parameter in others["params"])

    def test_unknown_parameters_are_refused(self) -> None:
        """All together: a bare parameter, attention with three matrices in one, groups, and a parametrisation."""
        network = PlainConvUNet(**UNET, **CONVS)
        network.register_parameter("queries", nn.Parameter(torch.ones(1, 3, 4)))
        network.add_module("attention", nn.MultiheadAttention(4, 2))
        network.add_module("depthwise", nn.Conv3d(4, 4, 3, groups=4))
        network.add_module("normed", nn.utils.parametrizations.weight_norm(nn.Conv3d(4, 4, 3)))
        with pytest.raises(InputError) as caught:
            muon_of(network, 0.1, 0)
        for expected in (
            "queries (1x3x4, of PlainConvUNet)",
            "attention.in_proj_weight (12x4, of MultiheadAttention)",
            "depthwise.weight (4x1x3x3x3, of Conv3d)",
            "normed.parametrizations.weight.original1 (4x4x3x3x3",
        ):
            assert expected in str(caught.value)
        assert "decoder" not in str(caught.value)

    def test_networks_without_known_outputs_are_refused(self) -> None:
        with pytest.raises(InputError, match=r"can't tell which layers of Sequential make its output.*seg_layers"):
            muon_of(nn.Sequential(nn.Conv3d(1, 4, 3), nn.Conv3d(4, 2, 1)), 0.1, 0)
