"""Channels-last networks compute the same as contiguous ones. The tests treat a CPU as a GPU."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from nnunet_conres.architectures import layout
from nnunet_conres.architectures.conresnet import ConResNet
from nnunet_conres.architectures.conresnet_paper import ConResNetPaper
from nnunet_conres.architectures.layout import (
    InstanceNorm3d,
    fast,
    weights_to_channels_last,
    with_channels_last_weights,
)
from nnunet_conres.architectures.memory_efficient import GroupNormReLU
from nnunet_conres.architectures.residual_map_unet import ResidualMapUNet
from nnunet_conres.architectures.unet3d import UNet3D
from nnunet_conres.architectures.vnet import VNet
from tests.small_networks import arguments

ARGUMENTS = arguments(input_channels=2, num_classes=3, deep_supervision=True)
BLOCKS = {"n_blocks_per_stage": [1, 1, 2], "n_conv_per_stage_decoder": [1, 1]}
CONVS = {"n_conv_per_stage": [2, 2, 2], "n_conv_per_stage_decoder": [2, 2]}
RESIDUALS = {"residual_outputs": True, "background_class": True}
NETWORKS = {
    "PlainConvUNet": lambda: PlainConvUNet(**ARGUMENTS, **CONVS),
    "ResidualEncoderUNet": lambda: ResidualEncoderUNet(**ARGUMENTS, **BLOCKS),
    "ResidualMapUNet": lambda: ResidualMapUNet(**ARGUMENTS, **BLOCKS, **RESIDUALS),
    "ConResNet": lambda: ConResNet(**ARGUMENTS, **BLOCKS, **RESIDUALS),
    "ConResNetPaper": lambda: ConResNetPaper(2, 3, True, **RESIDUALS),
    "VNet": lambda: VNet(**ARGUMENTS, **CONVS),
    "VNet without norm": lambda: VNet(**{**ARGUMENTS, "norm_op": None, "nonlin": nn.PReLU, "nonlin_kwargs": None}),
    "UNet3D": lambda: UNet3D(**ARGUMENTS, **CONVS),
    "UNet3D with batch norm": lambda: UNet3D(**{**ARGUMENTS, "norm_op": nn.BatchNorm3d}, **CONVS),
}
STOCK = ["PlainConvUNet", "ResidualEncoderUNet"]
SIZE = (8, 16, 24)


def slow(*names: str) -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.slow) for name in sorted(names)]


@pytest.fixture
def cpu_is_fast(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Treat the CPU as a GPU."""
    torch.compiler.reset()
    monkeypatch.setattr(layout, "_DEVICES", {"cpu"})
    n_threads = torch.get_num_threads()
    torch.set_num_threads(2)  # with one thread, a CPU has no channels-last convolution with 1x1x1 kernels
    yield
    torch.set_num_threads(n_threads)
    torch.compiler.reset()


def pair(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module]:
    """Return a network and its fast form."""
    torch.manual_seed(0)
    plain = NETWORKS[name]().to(dtype)
    for parameter in plain.parameters():
        if parameter.ndim == 1:  # the biases and scales of norms, which all start as 0 and 1
            nn.init.normal_(parameter, 0.5, 0.2)
    return plain, fast(copy.deepcopy(plain))


def results(network: Any, image: Tensor) -> list[Tensor]:
    """Return outputs and gradients."""
    torch.manual_seed(1)  # dropout
    network.zero_grad()
    outputs = network(image)
    sum(output.float().square().mean() for output in outputs).backward()
    return [*outputs, *(parameter.grad for parameter in network.parameters())]


class Convolutions:
    """A compiler that records which inputs of convolutions are channels-last, forward and backward.

    Inputs of one channel have the same memory layout in both formats and count as channels-last.
    """

    def __init__(self) -> None:
        self.are_channels_last: list[bool] = []
        self.n_conversions = 0
        self.first_stride: int | None = None
        self.backend = aot_autograd(fw_compiler=self._look, bw_compiler=self._look)

    def _look(self, graph: torch.fx.GraphModule, _: Any) -> Any:
        for node in graph.graph.nodes:
            if node.target is torch.ops.aten.convolution.default:
                inputs = [node.args[0]]
            elif node.target is torch.ops.aten.convolution_backward.default:
                inputs = [node.args[0], node.args[1]]
            else:
                asked = node.kwargs.get("memory_format")
                self.n_conversions += asked in (torch.channels_last_3d, torch.contiguous_format)
                continue
            for one in inputs:
                if "adaptive" in one.name:  # ConResNet's image residual, averaged down to the coarsest level
                    continue
                # compare strides: the gradient of a concatenation is part of a larger tensor, so not contiguous itself
                value = one.meta["val"]
                self.first_stride = self.first_stride or value.stride(1)
                self.are_channels_last.append(value.stride(1) == 1 or value.shape[1] == 1)
        return make_boxed_func(graph.forward)


@pytest.mark.usefixtures("cpu_is_fast")
class TestNetworks:
    @pytest.mark.parametrize("name", [*STOCK, "ConResNet", *slow("ConResNetPaper", "UNet3D with batch norm")])
    def test_compiled_without_graph_break_gives_the_same(self, name: str) -> None:
        plain, ours = pair(name)
        image = torch.randn(2, 2, *SIZE, dtype=torch.float64)
        found = results(torch.compile(ours, fullgraph=True, backend="aot_eager"), image)
        for value, expected in zip(found, results(plain, image), strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-10)
        for key, expected in plain.state_dict().items():  # statistics of batch norms
            torch.testing.assert_close(ours.state_dict()[key], expected)

    @pytest.mark.parametrize("name", ["ResidualEncoderUNet", *slow(*(NETWORKS.keys() - {"ResidualEncoderUNet"}))])
    def test_all_convolutions_are_channels_last(self, name: str) -> None:
        """In single precision, because a CPU has no channels-last convolutions in double precision."""
        plain, ours = pair(name, torch.float32)
        weights_to_channels_last(ours)
        image = torch.randn(2, 2, *SIZE)
        compiler = Convolutions()
        found = results(torch.compile(ours, fullgraph=True, backend=compiler.backend), image)
        reference = results(plain, image)
        atol = 1e-5 * max(float(expected.detach().abs().max()) for expected in reference)
        for value, expected in zip(found, reference, strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=atol)
        assert compiler.are_channels_last.count(False) == 0
        assert len(compiler.are_channels_last) > 20
        # images, averages in residual encoders, and gradients of the logits
        assert compiler.n_conversions <= 1 + 2 + 5

    # Not ConResNetPaper: convolutions of meta tensors lose the layout, and autocast does not support the meta device.
    @pytest.mark.parametrize(
        "name", ["ResidualMapUNet", *slow(*(NETWORKS.keys() - {"ResidualMapUNet", "ConResNetPaper"}))]
    )
    def test_graphs_hold_nothing_of_another_device(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Otherwise they would not become CUDA graphs. Meta tensors, which have no values, stand for any device."""
        monkeypatch.setattr(layout, "_DEVICES", {"meta"})
        devices: set[str] = set()

        def look(graph: torch.fx.GraphModule, _: Any) -> Any:
            values = [node.meta.get("val") for node in graph.graph.nodes]
            devices.update(one.device.type for one in torch.utils._pytree.tree_leaves(values) if torch.is_tensor(one))
            return make_boxed_func(graph.forward)

        ours = fast(NETWORKS[name]()).to("meta")
        backend = aot_autograd(fw_compiler=look, bw_compiler=look)
        results(torch.compile(ours, fullgraph=True, backend=backend), torch.randn(2, 2, *SIZE, device="meta"))
        assert devices == {"meta"}

    @pytest.mark.parametrize("name", slow(*NETWORKS))
    def test_mixed_precision_is_as_exact(self, name: str) -> None:
        plain, ours = pair(name, torch.float32)
        weights_to_channels_last(ours)
        image = torch.randn(2, 2, *SIZE)
        exact = torch.cat([value.flatten() for value in results(copy.deepcopy(plain).double(), image.double())])
        errors = []
        for network in (plain, torch.compile(ours, fullgraph=True, backend="aot_eager")):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                found = torch.cat([value.double().flatten() for value in results(network, image)])
            errors.append(float((found - exact).detach().norm() / exact.detach().norm()))
        # another order of the same operations multiplies ConResNetPaper's rounding error of 4 % by 1.22
        limit = 1.3 if name == "ConResNetPaper" else 1.1
        assert 1e-4 < errors[1] < limit * errors[0]

    @pytest.mark.parametrize("name", slow("ConResNetPaper", "ConResNet", "VNet", "UNet3D with batch norm"))
    def test_networks_that_are_not_made_fast_stay_contiguous(self, name: str) -> None:
        """As with nnUNet_conres_fast_step=0 and in the contiguous runs of the benchmark."""
        plain, _ = pair(name, torch.float32)
        compiler = Convolutions()
        results(torch.compile(plain, fullgraph=True, backend=compiler.backend), torch.randn(2, 2, *SIZE))
        assert compiler.first_stride == SIZE[0] * SIZE[1] * SIZE[2]
        assert compiler.are_channels_last.count(True) == 0

    def test_images_of_one_channel(self) -> None:
        ours = fast(PlainConvUNet(**(ARGUMENTS | CONVS | {"input_channels": 1})))
        weights_to_channels_last(ours)
        compiler = Convolutions()
        results(torch.compile(ours, fullgraph=True, backend=compiler.backend), torch.randn(2, 1, *SIZE))
        assert compiler.first_stride == 1
        assert compiler.are_channels_last.count(False) == 0

    @pytest.mark.parametrize("name", [*STOCK, "ConResNetPaper", "VNet", "UNet3D with batch norm"])
    def test_predicts_single_patches_without_being_compiled(self, name: str) -> None:
        plain, ours = pair(name, torch.float32)
        plain.eval(), ours.eval()
        image = torch.randn(1, 2, *SIZE)
        layouts: list[bool] = []
        for module in ours.modules():
            if isinstance(module, nn.Conv3d | nn.ConvTranspose3d):
                module.register_forward_pre_hook(
                    lambda _, inputs: layouts.append(inputs[0].is_contiguous(memory_format=torch.channels_last_3d))
                )
        with torch.inference_mode():
            for value, expected in zip(ours(image), plain(image), strict=True):
                torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
        # ConResNetPaper stays contiguous, because its group norm would copy
        assert layouts[0] == (name != "ConResNetPaper")

    def test_training_that_is_not_compiled_is_as_before(self) -> None:
        plain, ours = pair("ConResNet")
        image = torch.randn(1, 2, *SIZE, dtype=torch.float64)
        for value, expected in zip(results(ours, image), results(plain, image), strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-10)
            assert value.stride() == expected.stride()


def test_a_cpu_computes_as_before() -> None:
    torch.compiler.reset()
    for name in STOCK:
        plain, ours = pair(name, torch.float32)
        image = torch.randn(1, 2, *SIZE)
        with torch.no_grad():
            for value, expected in zip(ours(image), plain(image), strict=True):
                torch.testing.assert_close(value, expected, rtol=0, atol=0)
    compiler = Convolutions()
    torch.compile(ours, fullgraph=True, backend=compiler.backend)(image)
    assert compiler.n_conversions == 0


@pytest.mark.usefixtures("cpu_is_fast")
@pytest.mark.parametrize("name", STOCK)
def test_state_goes_both_ways(name: str) -> None:
    plain, ours = pair(name)
    weights_to_channels_last(ours)
    assert isinstance(ours, type(plain))
    assert type(ours).__name__ == type(plain).__name__
    assert list(ours.state_dict()) == list(plain.state_dict())
    for source, target in ((ours, plain), (plain, ours)):
        for parameter in source.parameters():
            nn.init.normal_(parameter)
        strides = [parameter.stride() for parameter in target.parameters()]
        target.load_state_dict(source.state_dict())
        for parameter, expected, stride in zip(target.parameters(), source.parameters(), strides, strict=True):
            assert torch.equal(parameter, expected)
            assert parameter.stride() == stride


@pytest.mark.usefixtures("cpu_is_fast")
def test_weights_of_other_networks_stay() -> None:
    """A user's trainer derived from ours may build another network, whose images are contiguous."""
    other, part = _two_convolutions(), fast(_two_convolutions())
    weights_to_channels_last(nn.ModuleDict({"other": other, "part": part}))
    assert all(parameter.is_contiguous() for parameter in other.parameters())
    assert all(not parameter.is_contiguous() for parameter in part.parameters() if parameter.ndim == 5)


def test_can_be_pickled_and_copied() -> None:
    ours = fast(PlainConvUNet(**ARGUMENTS, **CONVS))
    for other in (pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours)):
        assert type(other) is type(ours)
        assert other.has_group_norm == ours.has_group_norm
        torch.testing.assert_close(other.state_dict(), ours.state_dict(), rtol=0, atol=0)
        assert not {id(value) for value in other.parameters()} & {id(value) for value in ours.parameters()}


@pytest.mark.usefixtures("cpu_is_fast")
class TestNorms:
    """Against PyTorch's norms."""

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("affine", [True, False])
    def test_instance_norm(self, dtype: torch.dtype, affine: bool) -> None:
        norm = InstanceNorm3d(6, affine=affine).to(torch.promote_types(dtype, torch.float32))
        reference = nn.InstanceNorm3d(6, affine=affine).double()
        reference.load_state_dict(norm.state_dict())
        self.compare(norm, reference, dtype)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    def test_group_norm(self, dtype: torch.dtype) -> None:
        norm = GroupNormReLU(3, 6).to(torch.promote_types(dtype, torch.float32))
        reference = nn.Sequential(nn.GroupNorm(3, 6), nn.ReLU()).double()
        reference[0].load_state_dict(norm.state_dict())
        self.compare(norm, reference, dtype)

    @staticmethod
    def compare(norm: nn.Module, reference: nn.Module, dtype: torch.dtype) -> None:
        compiled = torch.compile(norm, fullgraph=True, backend="aot_eager")
        generator = torch.Generator().manual_seed(0)
        # far from 0, where mean^2 would cancel digits
        noise = torch.randn(2, 6, 5, 6, 7, dtype=torch.float64, generator=generator) + 20
        x = noise.to(dtype).clone(memory_format=torch.channels_last_3d).requires_grad_()
        y = x.detach().double().requires_grad_()
        output, expected = compiled(x), reference(y)
        assert output.dtype == dtype
        assert output.is_contiguous(memory_format=torch.channels_last_3d)
        tolerance = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 2e-2}[dtype]
        torch.testing.assert_close(output.double(), expected, rtol=tolerance, atol=tolerance)
        weights = torch.randn(expected.shape, dtype=torch.float64, generator=generator)
        (output.double() * weights).sum().backward()
        (expected * weights).sum().backward()
        torch.testing.assert_close(x.grad.double(), y.grad, rtol=tolerance, atol=5 * tolerance)

    @pytest.mark.parametrize("affine", [True, False])
    def test_instance_norm_of_a_single_patch(self, affine: bool) -> None:
        x = torch.randn(1, 4, 5, 6, 7, generator=torch.Generator().manual_seed(0)) + 20
        norm, reference = InstanceNorm3d(4, affine=affine), nn.InstanceNorm3d(4, affine=affine).double()
        for parameter, other in zip(norm.parameters(), reference.parameters(), strict=True):
            other.data = nn.init.normal_(parameter).data.double()
        with torch.inference_mode():
            output = norm(x.contiguous(memory_format=torch.channels_last_3d))
        assert output.is_contiguous(memory_format=torch.channels_last_3d)
        torch.testing.assert_close(output.double(), reference(x.double()), rtol=1e-4, atol=1e-4)

    def test_no_variance_in_a_single_voxel(self) -> None:
        with torch.no_grad(), pytest.raises(ValueError, match="more than 1 spatial element"):
            InstanceNorm3d(2)(torch.zeros(1, 2, 1, 1, 1))


def leaf(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, 3, 4, 5, dtype=torch.float64, generator=generator).requires_grad_()


class TestInstanceNormInPlace:
    def norms(self) -> tuple[InstanceNorm3d, nn.InstanceNorm3d]:
        torch.manual_seed(0)
        ours, reference = InstanceNorm3d(3, affine=True).double(), nn.InstanceNorm3d(3, affine=True).double()
        nn.init.normal_(ours.weight)
        nn.init.normal_(ours.bias)
        reference.load_state_dict(ours.state_dict())
        return ours, reference

    @pytest.mark.parametrize("compiled", [False, True])
    def test_changed_in_place_with_the_same_gradients(self, compiled: bool) -> None:
        torch.compiler.reset()

        def change(norm: nn.Module, x: Tensor, other: Tensor) -> Tensor:
            y = norm(x)
            y += other
            return F.leaky_relu_(y, 0.1)

        results = []
        for norm in self.norms():
            x, other = leaf(0), leaf(1)
            function = torch.compile(change, fullgraph=True, backend="aot_eager") if compiled else change
            y = function(norm, x, other)
            y.square().sum().backward()
            results.append([y, x.grad, other.grad, norm.weight.grad, norm.bias.grad])
        for value, expected in zip(*results, strict=True):
            torch.testing.assert_close(value, expected)

    def test_backward_copies_nothing(self) -> None:
        for norm, copies in zip(self.norms(), (0, 2), strict=True):
            x = leaf(0)
            y = F.leaky_relu_(norm(x))
            with torch.profiler.profile() as profile:
                y.sum().backward()
            large = [event for event in profile.events() if event.name == "aten::copy_"]
            assert len(large) >= copies if copies else len(large) == 0


def _two_convolutions() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv3d(2, 4, 3), nn.LeakyReLU(), nn.Conv3d(4, 4, 3))


@pytest.mark.usefixtures("cpu_is_fast")
def test_gradients_with_distributed_data_parallel(tmp_path: Path) -> None:
    """PyTorch must not warn that gradients and the buckets in which they are summed have different layouts."""
    networks = [fast(_two_convolutions()) for _ in range(2)]
    image = torch.randn(2, 2, 8, 8, 8)
    torch.distributed.init_process_group("gloo", f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    try:
        wrapped = with_channels_last_weights(DistributedDataParallel(networks[1]))
        for _ in range(2):
            for network in (networks[0], wrapped):
                network.zero_grad()
                with warnings.catch_warnings():
                    warnings.simplefilter("error")
                    network(image).square().mean().backward()
    finally:
        torch.distributed.destroy_process_group()
    for expected, found in zip(*(network.parameters() for network in networks), strict=True):
        torch.testing.assert_close(found.grad, expected.grad)
        assert found.ndim < 5 or found.grad.is_contiguous(memory_format=torch.channels_last_3d)
