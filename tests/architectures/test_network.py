"""Requirements of nnU-Net and this package on every network, tested for the networks of all families."""

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from torch import Tensor, nn

from nnunet_conres.architectures.blocks import pad_to_multiple
from nnunet_conres.architectures.conresnet import ConResNet
from nnunet_conres.architectures.network import PlansNetwork, ResidualMapsMixin
from nnunet_conres.architectures.unet3d import UNet3D
from nnunet_conres.architectures.vnet import VNet
from nnunet_conres.families import FAMILIES, load
from tests.small_networks import arguments

DYNAMIC = arguments()
RESIDUAL = DYNAMIC | {"n_blocks_per_stage": [1, 1, 2], "background_class": True}
DROPOUT = {"dropout_op": nn.Dropout3d, "dropout_op_kwargs": {"p": 0.5}}


@dataclass(frozen=True)
class Kind:
    """A network class and constructor arguments.

    Attributes:
        network: Its class.
        given: Constructor arguments except ``input_channels``, ``num_classes`` and ``deep_supervision``.
    """

    network: type[PlansNetwork]
    given: Mapping[str, Any]

    def make(self, channels: int = 2, classes: int = 3, **changes: Any) -> Any:
        return self.network(input_channels=channels, num_classes=classes, **{**self.given, **changes})

    @property
    def has_residual_maps(self) -> bool:
        return issubclass(self.network, ResidualMapsMixin)

    @property
    def is_fixed(self) -> bool:
        return self.network.fixed_stages is not None

    def supervised(self, **changes: Any) -> Any:
        """Make the network as it is trained."""
        return self.make(
            deep_supervision=True, **({"residual_outputs": True} if self.has_residual_maps else {}), **changes
        )


def kind_of(network: type[PlansNetwork]) -> Kind:
    """Return a network with those of the arguments above that its constructor takes."""
    arguments = RESIDUAL if network.fixed_stages is None else {"background_class": True}
    takes = inspect.signature(network).parameters
    return Kind(network, {name: value for name, value in arguments.items() if name in takes})


NETWORKS = {path.rpartition(".")[2]: kind_of(load(path)) for family in FAMILIES for path in family.networks} | {
    "ConResNet, shared encoder": Kind(ConResNet, RESIDUAL | {"shared_encoder": True}),
    "UNet3D, max pooling": Kind(UNet3D, DYNAMIC | {"downsampling": "max_pool"}),
}
VARIANTS = {
    "ConResNet, dropout": Kind(ConResNet, RESIDUAL | DROPOUT),
    "UNet3D, batch norm": Kind(UNet3D, DYNAMIC | {"norm_op": nn.BatchNorm3d}),
    "VNet, dropout": Kind(VNet, DYNAMIC | DROPOUT),
}
every = pytest.mark.parametrize("kind", NETWORKS.values(), ids=NETWORKS)


def _narrow(kinds: dict[str, Kind]) -> Any:
    """Parametrise with all kinds, of which networks of fixed width and those of VARIANTS are marked as slow.

    Compiling the paper's network takes a minute.
    """
    return pytest.mark.parametrize(
        "kind",
        [
            pytest.param(kind, id=name, marks=[pytest.mark.slow] * (kind.is_fixed or name in VARIANTS))
            for name, kind in kinds.items()
        ],
    )


every_narrow, with_variants_narrow = _narrow(NETWORKS), _narrow(NETWORKS | VARIANTS)
with_variants = pytest.mark.parametrize("kind", (NETWORKS | VARIANTS).values(), ids=[*NETWORKS, *VARIANTS])
dynamic = pytest.mark.parametrize(
    "kind",
    [kind for kind in NETWORKS.values() if not kind.is_fixed],
    ids=[name for name, kind in NETWORKS.items() if not kind.is_fixed],
)
with_residual_maps = pytest.mark.parametrize(
    "kind",
    [kind for kind in NETWORKS.values() if kind.has_residual_maps],
    ids=[name for name, kind in NETWORKS.items() if kind.has_residual_maps],
)

SIZE = (8, 16, 16)


def shapes(output: Tensor | list[Tensor]) -> list[tuple[int, ...]] | tuple[int, ...]:
    return tuple(output.shape) if isinstance(output, Tensor) else [tuple(x.shape) for x in output]


def objective(outputs: list[Tensor]) -> Tensor:
    return sum((output.float().square().mean() for output in outputs), start=torch.zeros(()))


def gradients(network: Any, image: Tensor) -> list[Tensor]:
    torch.manual_seed(1)  # dropout
    network.zero_grad()
    outputs = network(image)
    sum(output.square().mean() for output in outputs).backward()
    return [*outputs, *(parameter.grad.clone() for parameter in network.parameters())]


class TestOutputs:
    # patch, strides, kernels: as planned, and odd sizes as in hand-edited plans
    CASES = (
        ((8, 8, 8), [1, 2], [3, 3]),
        ((4, 16, 12), [1, [1, 2, 2], [2, 2, 2]], [[1, 3, 3], [3, 3, 3], [3, 3, 3]]),
        ((5, 23, 18), [1, [1, 2, 2], [1, 2, 2], [2, 2, 2]], [[1, 3, 3], [1, 3, 3], [3, 3, 3], [3, 3, 3]]),
        ((7, 13, 9), [1, 2, 2, 2], [3, 3, 3, 3]),
        ((9, 10, 11), [1, [3, 2, 2], [1, 1, 2]], [3, [3, 1, 5], 3]),
        ((16, 32, 32), [1, [1, 2, 2], 2, 2, 2, [1, 2, 2]], [[1, 3, 3]] + [3] * 5),
    )

    @dynamic
    @pytest.mark.parametrize(("patch", "strides", "kernels"), CASES)
    def test_shapes_at_all_scales_and_gradients(
        self, kind: Kind, patch: tuple[int, ...], strides: list[Any], kernels: list[Any]
    ) -> None:
        n_stages = len(strides)
        network = kind.make(
            n_stages=n_stages,
            features_per_stage=[4, 8, 8, 8, 8, 8][:n_stages],
            strides=strides,
            kernel_sizes=kernels,
            **({"n_blocks_per_stage": 1} if "n_blocks_per_stage" in kind.given else {}),
        )
        # a batch of 2: PyTorch refuses instance norm of a single bottleneck voxel, as in the smallest cases
        image = torch.randn(2, 2, *patch)
        network.eval()
        scales, size = [], list(patch)
        for stride in strides[:-1]:
            stride = [stride] * 3 if isinstance(stride, int) else stride
            size = [math.ceil(extent / step) for extent, step in zip(size, stride, strict=True)]
            scales.append((2, 3, *size))
        assert shapes(network(image)) == (2, 3, *patch)
        network.decoder.deep_supervision = True
        expected = list(scales)
        if kind.has_residual_maps:
            assert shapes(network(image)) == expected
            network.residual_outputs = True
            expected += [(2, 2, *scale[2:]) for scale in scales]  # the background has none
        outputs = network(image)
        assert shapes(outputs) == expected
        objective(outputs).backward()
        assert [name for name, p in network.named_parameters() if p.grad is None] == []

    @with_residual_maps
    def test_residual_outputs_without_deep_supervision(self, kind: Kind) -> None:
        network = kind.make(residual_outputs=True)
        segmentation, *residuals = network(torch.randn(1, 2, *SIZE))
        assert shapes(segmentation) == (1, 3, *SIZE)
        assert shapes(residuals[0]) == (1, 2, *SIZE)

    @with_residual_maps
    def test_residual_heads_are_not_computed_unless_asked_for(self, kind: Kind) -> None:
        network = kind.make(deep_supervision=True)
        calls: list[int] = []
        for head in network.decoder.seg_layers.residual:
            head.register_forward_hook(lambda *_: calls.append(1))
        network(torch.randn(1, 2, *SIZE))
        assert calls == []
        network.residual_outputs = True
        network(torch.randn(1, 2, *SIZE))
        assert len(calls) == len(network.decoder.seg_layers.residual)

    @with_residual_maps
    def test_every_residual_channel_learns(self, kind: Kind) -> None:
        """Every residual channel has a loss. If the classes include the background, there is one channel fewer."""
        with_background, regions = kind.make(), kind.make(background_class=False)
        for network, channels in ((with_background, 2), (regions, 3)):
            assert {head.out_channels for head in network.decoder.seg_layers.residual} == {channels}
        with pytest.raises(ValueError, match="leave none"):
            kind.make(classes=1)

    @every
    @pytest.mark.parametrize(("channels", "classes"), [(1, 2), (4, 3), (6, 105)])
    def test_any_number_of_channels_and_classes(self, kind: Kind, channels: int, classes: int) -> None:
        network = kind.make(channels, classes)
        assert shapes(network(torch.randn(1, channels, *SIZE))) == (1, classes, *SIZE)

    @every
    def test_evaluation_gives_what_training_gives(self, kind: Kind) -> None:
        network = kind.make(deep_supervision=True)
        for module in network.modules():
            if isinstance(module, nn.Dropout3d):
                module.p = 0.0
        image = torch.randn(1, 2, *SIZE)
        with torch.no_grad():
            first = network(image)[0]
            network.decoder.deep_supervision = False
            torch.testing.assert_close(network.eval()(image), first, rtol=1e-4, atol=1e-5)

    @dynamic
    @pytest.mark.parametrize(
        "changes",
        [{"norm_op": None, "norm_op_kwargs": None, "conv_bias": False}, {"norm_op_kwargs": {"affine": False}}],
    )
    def test_without_parameters_of_norms(self, kind: Kind, changes: dict[str, Any]) -> None:
        network = kind.make(**changes)
        network.apply(network.initialize)
        assert torch.isfinite(network(torch.randn(1, 2, *SIZE))).all()


class TestInNnUNet:
    @every
    def test_plans_alone_instantiate_it(self, kind: Kind) -> None:
        given = dict(kind.given)
        for name, path in {"conv_op": "torch.nn.modules.conv.Conv3d", "nonlin": "torch.nn.LeakyReLU"}.items():
            if name in given:
                given[name] = path
        if "norm_op" in given:
            given["norm_op"] = "torch.nn.modules.instancenorm.InstanceNorm3d"
        imports = [name for name in ("conv_op", "norm_op", "nonlin") if name in given]
        class_name = f"{kind.network.__module__}.{kind.network.__name__}"
        network = get_network_from_plans(class_name, given, imports, 1, 4, deep_supervision=True)
        assert type(network).__name__ == kind.network.__name__
        assert shapes(network(torch.randn(1, 1, *SIZE)))[0] == (1, 4, *SIZE)

    @every
    def test_a_checkpoint_with_deep_supervision_loads_without(self, kind: Kind) -> None:
        supervised, plain = kind.supervised().eval(), kind.make().eval()
        plain.load_state_dict(supervised.state_dict())
        image = torch.randn(1, 2, *SIZE)
        with torch.no_grad():
            torch.testing.assert_close(plain(image), supervised(image)[0], rtol=0, atol=0)

    @every
    def test_pretrained_weights_from_three_to_five_classes(self, kind: Kind, tmp_path: Path) -> None:
        source, target = kind.make(classes=3), kind.make(classes=5)
        heads = {k: v.clone() for k, v in target.state_dict().items() if ".seg_layers." in k}
        assert heads
        torch.save({"network_weights": source.state_dict()}, tmp_path / "source.pth")
        load_pretrained_weights(target, str(tmp_path / "source.pth"))
        for name, value in target.state_dict().items():
            assert torch.equal(value, heads[name] if name in heads else source.state_dict()[name])

    @every
    def test_checkpoint_of_another_network_says_so(self, kind: Kind) -> None:
        other = PlainConvUNet(2, num_classes=3, n_conv_per_stage=2, n_conv_per_stage_decoder=2, **DYNAMIC)
        with pytest.raises(RuntimeError, match=r"belongs to another network than this one.*missing in the checkpoint"):
            kind.make().load_state_dict(other.state_dict())

    @dynamic
    def test_checkpoint_of_other_features_says_so(self, kind: Kind) -> None:
        other = kind.make(features_per_stage=[4, 8, 16])
        with pytest.raises(RuntimeError, match=r"features \[4, 8, 12\].*of another shape"):
            kind.make().load_state_dict(other.state_dict())


@dynamic
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"conv_op": nn.Conv2d}, "3D network"),
        ({"n_stages": 1, "features_per_stage": [4], "strides": [1], "kernel_sizes": [3]}, "at least 2"),
        ({"strides": [[2, 2, 2], [2, 2, 2], [2, 2, 2]]}, "first stage must be 1"),
        ({"kernel_sizes": [2, 3, 3]}, "odd"),
        ({"features_per_stage": [4, 8]}, "features_per_stage .* 3 entries"),
        ({"strides": [1, 2, [2, 2]]}, "three entries"),
        ({"features_per_stage": [4, 0, 8]}, "features_per_stage must be 1 or more"),
        ({"strides": [1, 0, 2]}, "strides must be 1 or more"),
        ({"kernel_sizes": -1}, "1 or more"),
        ({"checkpointing": "all"}, "checkpointing must be one of"),
        ({"n_conv_per_stage_decoder": 0}, "n_conv_per_stage_decoder must be 1 or more"),
        ({"n_conv_per_stage_decoder": [2, 2, 2]}, "n_conv_per_stage_decoder .* 2 entries"),
    ],
)
def test_refuses_arguments_out_of_range(kind: Kind, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind.make(**changes)


class TestCheckpointing:
    """Recomputing activations changes memory, but not results."""

    @with_variants
    @pytest.mark.parametrize("checkpointing", ["decoder", "full"])
    def test_same_outputs_gradients_and_statistics(self, kind: Kind, checkpointing: str) -> None:
        torch.manual_seed(0)
        plain = kind.supervised()
        saving = kind.supervised(checkpointing=checkpointing)
        saving.load_state_dict(plain.state_dict())
        image = torch.randn(2, 2, *SIZE)
        for value, expected in zip(gradients(saving, image), gradients(plain, image), strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)
        for key, expected in plain.state_dict().items():
            torch.testing.assert_close(saving.state_dict()[key], expected, rtol=0, atol=0)

    @with_variants
    def test_keeps_less(self, kind: Kind) -> None:
        image = torch.randn(1, 2, *SIZE)
        kept = [
            kept_bytes(kind.supervised(checkpointing=checkpointing), image)
            for checkpointing in ("none", "decoder", "full")
        ]
        assert kept[0] > kept[1] > kept[2]


class TestCompiled:
    @with_variants_narrow
    @pytest.mark.parametrize("checkpointing", [pytest.param("none", marks=pytest.mark.slow), "full"])
    def test_no_graph_break_and_the_same_gradients(self, kind: Kind, checkpointing: str) -> None:
        torch.compiler.reset()  # the number of recompilations of one forward is limited
        torch.manual_seed(0)
        network = kind.supervised(checkpointing=checkpointing).double()
        image = torch.randn(2, 2, *SIZE, dtype=torch.float64)
        expected = gradients(network, image)
        compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
        for value, reference in zip(gradients(compiled, image), expected, strict=True):
            torch.testing.assert_close(value, reference)

    @every_narrow
    def test_switches_still_work(self, kind: Kind) -> None:
        torch.compiler.reset()
        network = kind.supervised().double().eval()
        image = torch.randn(1, 2, *SIZE, dtype=torch.float64)
        compiled = torch.compile(network, fullgraph=True, backend="eager")
        for ours, theirs in zip(compiled(image), network(image), strict=True):
            torch.testing.assert_close(ours, theirs)
        network.decoder.deep_supervision = False
        if kind.has_residual_maps:
            network.residual_outputs = False
        torch.testing.assert_close(compiled(image), network(image))

    @pytest.mark.slow
    @dynamic
    def test_generated_code_trains_the_same(self, kind: Kind) -> None:
        """Forward and backward, on anisotropic stages and odd sizes."""
        torch.compiler.reset()
        network = kind.supervised().double()
        image = torch.randn(2, 2, 5, 12, 10, dtype=torch.float64)
        expected = gradients(network, image)
        for value, reference in zip(gradients(torch.compile(network, fullgraph=True), image), expected, strict=True):
            torch.testing.assert_close(value, reference)

    @pytest.mark.gpu
    @every
    def test_mixed_precision_on_a_gpu(self, kind: Kind) -> None:
        torch.compiler.reset()
        network = kind.supervised().cuda()
        network.apply(network.initialize)
        optimizer = torch.optim.SGD(network.parameters(), 0.01)
        scaler = torch.amp.GradScaler("cuda")
        compiled = torch.compile(network)
        for size in ((8, 16, 16), (8, 16, 16) if kind.is_fixed else (5, 7, 9)):
            with torch.autocast("cuda"):
                loss = objective(compiled(torch.randn(2, 2, *size, device="cuda")))
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            assert torch.isfinite(loss)


@every_narrow
def test_works_under_bfloat16_autocast(kind: Kind) -> None:
    network = kind.supervised()
    network.apply(network.initialize)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        # not smaller: on some processors, gradients are wrong if a kernel is deeper than its input
        outputs = network(torch.randn(1, 2, 32, 32, 32))
    objective(outputs).backward()
    assert all(torch.isfinite(p.grad).all() for p in network.parameters())


def test_padding_compiles_for_sizes_that_vary() -> None:
    """PyTorch could not compile a modulo of sizes before a division by their number of voxels, as in norms."""

    def padded_and_normalised(image: Tensor) -> Tensor:
        return nn.functional.batch_norm(pad_to_multiple(image, (1, 2, 2)), None, None, training=True)

    torch.compiler.reset()
    # like PyTorch's default compiler, without code generation
    compiled = torch.compile(padded_and_normalised, fullgraph=True, backend="aot_eager_decomp_partition")
    for size in ((4, 8, 8), (5, 7, 9)):
        image = torch.randn(2, 2, *size, requires_grad=True)
        torch.testing.assert_close(compiled(image), padded_and_normalised(image))


def kept_bytes(network: Any, image: Tensor) -> int:
    """Return the bytes that autograd saves for backward, each storage counted once, without parameters."""
    kept: dict[int, torch.UntypedStorage] = {}
    parameters = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = network(image)
    del outputs
    return sum(storage.nbytes() for pointer, storage in kept.items() if pointer not in parameters)
