"""What nnU-Net expects of V-Net and 3D U-Net alike."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from torch import nn

from nnunet_conres.architectures.blocks import pad_to_multiple
from nnunet_conres.architectures.network import PlansNetwork
from nnunet_conres.architectures.unet3d import UNet3D
from nnunet_conres.architectures.vnet import VNet

NETWORKS = [VNet, UNet3D]


def arguments(**changes: Any) -> dict[str, Any]:
    """Constructor arguments of a small anisotropic network in the manner of stock plans."""
    return {
        "input_channels": 2,
        "num_classes": 3,
        "n_stages": 3,
        "features_per_stage": [4, 8, 12],
        "conv_op": nn.Conv3d,
        "kernel_sizes": [[1, 3, 3], [3, 3, 3], [3, 3, 3]],
        "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2]],
        "conv_bias": True,
        "norm_op": nn.InstanceNorm3d,
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "nonlin": nn.LeakyReLU,
        "nonlin_kwargs": {"inplace": True},
    } | changes


@pytest.mark.parametrize("network_class", NETWORKS)
class TestNetwork:
    # also sizes that the strides don't divide
    @pytest.mark.parametrize("size", [(4, 8, 12), (5, 7, 9), (3, 11, 8)])
    def test_outputs_and_gradients(self, network_class: type[PlansNetwork], size: tuple[int, ...]) -> None:
        network = network_class(**arguments(deep_supervision=True))
        outputs = network(torch.randn(2, 2, *size))
        half = [size[0], -(-size[1] // 2), -(-size[2] // 2)]
        assert [list(o.shape) for o in outputs] == [[2, 3, *size], [2, 3, *half]]
        sum(o.square().mean() for o in outputs).backward()
        assert all(p.grad is not None for p in network.parameters())
        network.decoder.deep_supervision = False
        assert network(torch.randn(1, 2, *size)).shape == (1, 3, *size)

    def test_evaluation_gives_what_training_gives(self, network_class: type[PlansNetwork]) -> None:
        network = network_class(**arguments(deep_supervision=True))
        image = torch.randn(1, 2, 4, 8, 8)
        with torch.no_grad():
            first = network(image)[0]
            network.decoder.deep_supervision = False
            torch.testing.assert_close(network.eval()(image), first)

    def test_a_checkpoint_with_deep_supervision_loads_without(self, network_class: type[PlansNetwork]) -> None:
        with_supervision, without = network_class(**arguments(deep_supervision=True)), network_class(**arguments())
        without.load_state_dict(with_supervision.state_dict())
        image = torch.randn(1, 2, 4, 8, 8)
        with torch.no_grad():
            torch.testing.assert_close(without(image), with_supervision(image)[0], rtol=0, atol=0)

    def test_without_auxiliary_heads_there_is_one_output(self, network_class: type[PlansNetwork]) -> None:
        network = network_class(**arguments(deep_supervision=True, auxiliary_heads=False))
        outputs = network(torch.randn(1, 2, 4, 8, 8))
        assert [tuple(o.shape) for o in outputs] == [(1, 3, 4, 8, 8)]
        assert len(network.decoder.seg_layers) == 1

    def test_plans_alone_instantiate_it(self, network_class: type[PlansNetwork]) -> None:
        given = arguments(
            conv_op="torch.nn.modules.conv.Conv3d", norm_op="torch.nn.InstanceNorm3d", nonlin="torch.nn.ReLU"
        )
        given = {k: v for k, v in given.items() if k not in ("input_channels", "num_classes")}
        name = f"{network_class.__module__}.{network_class.__name__}"
        network = get_network_from_plans(name, given, ["conv_op", "norm_op", "nonlin"], 1, 2, deep_supervision=True)
        assert type(network).__name__ == network_class.__name__

    @pytest.mark.parametrize("extra", [{}, {"deep_supervision": True}, {"auxiliary_heads": False}])
    @pytest.mark.parametrize("size", [(4, 8, 12), (5, 7, 9)])
    def test_feature_map_size_equals_what_convolutions_put_out(
        self, network_class: type[PlansNetwork], extra: dict[str, Any], size: tuple[int, ...]
    ) -> None:
        network = network_class(**arguments(input_channels=3, **extra))
        elements = 0

        def count(module: nn.Module, args: Any, output: torch.Tensor) -> None:
            nonlocal elements
            elements += output.numel()

        for module in network.modules():
            if isinstance(module, nn.Conv3d):
                module.register_forward_hook(count)
        # transposed convolutions may put out more than is kept; the planner counts what is kept
        transposed = [m for m in network.modules() if isinstance(m, nn.ConvTranspose3d)]
        network(torch.zeros(1, 3, *size))
        sizes = network.feature_map_sizes(size)
        elements += sum(m.out_channels * int(np.prod(s)) for m, s in zip(transposed, sizes[-2::-1], strict=True))
        assert network.compute_conv_feature_map_size(size) == elements

    def test_feature_map_size_refuses_channels(self, network_class: type[PlansNetwork]) -> None:
        with pytest.raises(ValueError, match="spatial patch size"):
            network_class(**arguments()).compute_conv_feature_map_size((1, 4, 8, 8))

    def test_pretrained_weights_from_three_to_five_classes(
        self, network_class: type[PlansNetwork], tmp_path: Path
    ) -> None:
        source, target = network_class(**arguments()), network_class(**arguments(num_classes=5))
        torch.save({"network_weights": source.state_dict()}, tmp_path / "checkpoint.pth")
        load_pretrained_weights(target, str(tmp_path / "checkpoint.pth"))
        for name, weight in source.state_dict().items():
            if "seg_layers" not in name:
                torch.testing.assert_close(target.state_dict()[name], weight)

    def test_checkpoint_of_another_topology_says_so(self, network_class: type[PlansNetwork]) -> None:
        other = PlainConvUNet(**arguments(n_conv_per_stage=2, n_conv_per_stage_decoder=2)).state_dict()
        with pytest.raises(RuntimeError, match=r"belongs to another network than this one \(features \[4, 8, 12\]"):
            network_class(**arguments()).load_state_dict(other)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"n_conv_per_stage": [1, 0, 2]}, "n_conv_per_stage must be 1 or more"),
            ({"n_conv_per_stage_decoder": 0}, "n_conv_per_stage_decoder must be 1 or more"),
            ({"n_conv_per_stage": [2, 2]}, "n_conv_per_stage .* 3 entries"),
            ({"n_conv_per_stage_decoder": [2, 2, 2]}, "n_conv_per_stage_decoder .* 2 entries"),
        ],
    )
    def test_refuses_arguments_out_of_range(
        self, network_class: type[PlansNetwork], changes: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(ValueError, match=message):
            network_class(**arguments(**changes))

    @pytest.mark.parametrize("size", [(4, 8, 8), (5, 7, 9)])
    def test_compiles_without_graph_break(self, network_class: type[PlansNetwork], size: tuple[int, ...]) -> None:
        torch.compiler.reset()
        network = network_class(**arguments(deep_supervision=True))
        compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
        image = torch.randn(1, 2, *size)
        for output, expected in zip(compiled(image), network(image), strict=True):
            torch.testing.assert_close(output, expected)

    @pytest.mark.slow
    def test_compiled_code_has_the_same_gradients(self, network_class: type[PlansNetwork]) -> None:
        torch.compiler.reset()
        network = network_class(**arguments(deep_supervision=True)).double()
        image = torch.randn(1, 2, 5, 7, 9, dtype=torch.float64)
        sum(output.square().sum() for output in network(image)).backward()
        expected = [p.grad.clone() for p in network.parameters()]
        network.zero_grad()
        sum(output.square().sum() for output in torch.compile(network, fullgraph=True)(image)).backward()
        for parameter, gradient in zip(network.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, gradient)

    def test_works_under_bfloat16_autocast(self, network_class: type[PlansNetwork]) -> None:
        network = network_class(**arguments(auxiliary_heads=False))
        network.apply(network.initialize)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            # not smaller: some processors' gradients are wrong where a kernel is deeper than its input
            output = network(torch.randn(1, 2, 16, 16, 16))
        output.float().sum().backward()
        assert all(torch.isfinite(p.grad).all() for p in network.parameters())


def test_max_pooling_with_odd_sizes_equals_ceil_mode() -> None:
    network = UNet3D(**arguments(downsampling="max_pool"))
    pool = network.encoder.down[1]
    image = torch.randn(1, 2, 5, 7, 9)
    torch.testing.assert_close(pool(image), nn.functional.max_pool3d(image, 2, ceil_mode=True))
    assert network.compute_conv_feature_map_size((4, 8, 8)) > 0


def test_padding_compiles_for_sizes_that_vary() -> None:
    """PyTorch could not compile a modulo of sizes in front of what divides by their number of voxels, as norms do."""

    def padded_and_normalised(image: torch.Tensor) -> torch.Tensor:
        return nn.functional.batch_norm(pad_to_multiple(image, (1, 2, 2)), None, None, training=True)

    torch.compiler.reset()
    # as PyTorch's own compiler, short of making code
    compiled = torch.compile(padded_and_normalised, fullgraph=True, backend="aot_eager_decomp_partition")
    for size in ((4, 8, 8), (5, 7, 9)):
        image = torch.randn(2, 2, *size, requires_grad=True)
        torch.testing.assert_close(compiled(image), padded_and_normalised(image))


@pytest.mark.gpu
@pytest.mark.parametrize("network_class", NETWORKS)
def test_compiled_mixed_precision_on_a_gpu(network_class: type[PlansNetwork]) -> None:
    torch.compiler.reset()
    network = network_class(**arguments(deep_supervision=True)).cuda()
    network.apply(network.initialize)
    optimizer = torch.optim.SGD(network.parameters(), 0.01)
    scaler = torch.amp.GradScaler("cuda")
    compiled = torch.compile(network)
    for size in ((8, 16, 16), (5, 7, 9)):
        with torch.autocast("cuda"):
            outputs = compiled(torch.randn(2, 2, *size, device="cuda"))
            loss = sum(output.float().square().mean() for output in outputs)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert torch.isfinite(loss)
