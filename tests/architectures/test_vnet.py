"""V-Net against facts from the paper and an independent computation of its graph."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nnunet_conres.architectures.vnet import ResidualStage, VNet


class TestPaper:
    def test_convolutions_of_the_paper(self) -> None:
        network = VNet.paper(1, 2)

        def large(stages: nn.ModuleList) -> list[list[int]]:
            found = []
            for stage in stages:
                convolutions = [m for m in stage.modules() if isinstance(m, nn.Conv3d)]
                assert {m.kernel_size for m in convolutions} == {(5, 5, 5)}
                found.append([m.out_channels for m in convolutions])
            return found

        assert large(network.encoder.stages) == [[16], [32] * 2, [64] * 3, [128] * 3, [256] * 3]
        assert large(network.decoder.stages) == [[256] * 3, [128] * 3, [64] * 2, [32]]
        down = [m.conv for m in network.encoder.down]
        assert [(m.in_channels, m.out_channels) for m in down] == [(16, 32), (32, 64), (64, 128), (128, 256)]
        assert {(m.kernel_size, m.stride) for m in down} == {((2, 2, 2), (2, 2, 2))}
        assert not any(isinstance(m, (nn.BatchNorm3d, nn.InstanceNorm3d)) for m in network.modules())

    def test_number_of_parameters(self) -> None:
        """Counted by hand: weights, a bias and a slope for every output channel."""

        def layer(cin: int, cout: int, kernel: int) -> int:
            return cin * cout * kernel**3 + 2 * cout

        left = [(1, 16, 1), (32, 32, 2), (64, 64, 3), (128, 128, 3), (256, 256, 3)]
        right = [(256, 256, 3), (128, 128, 3), (64, 64, 2), (32, 32, 1)]
        stages = sum(n * layer(cin, cout, 5) for cin, cout, n in left + right)
        down = sum(layer(c, 2 * c, 2) for c in (16, 32, 64, 128))
        up = layer(256, 128, 2) + layer(256, 64, 2) + layer(128, 32, 2) + layer(64, 16, 2)
        head = 32 * 2 + 2
        assert sum(p.numel() for p in VNet.paper(1, 2).parameters()) == stages + down + up + head

    @pytest.mark.parametrize("channels", [1, 4, 3])
    def test_is_the_papers_graph(self, channels: int) -> None:
        network = VNet.paper(channels, 2).double()
        network.apply(network.initialize)
        image = torch.randn(1, channels, 16, 16, 32, dtype=torch.float64)
        with torch.no_grad():
            torch.testing.assert_close(network(image), paper_forward(network, image))

    def test_every_parameter_gets_a_gradient(self) -> None:
        network = VNet.paper(3, 2, deep_supervision=True)
        (output,) = network(torch.randn(1, 3, 16, 16, 16))
        output.square().mean().backward()
        assert all(p.grad is not None for p in network.parameters())


def paper_forward(network: VNet, image: Tensor) -> Tensor:
    """Compute the paper's figure 2 with plain functions on the state dictionary."""
    w = network.state_dict()

    def prelu(name: str, x: Tensor) -> Tensor:
        slope = w[f"{name}.weight"].view(1, -1, 1, 1, 1)
        return torch.where(x > 0, x, slope * x)

    def stage(name: str, x: Tensor, n: int, shortcut: Tensor) -> Tensor:
        for i in range(n):
            conv = f"{name}.convolutions.{i}"
            x = F.conv3d(x, w[f"{conv}.conv.weight"], w[f"{conv}.conv.bias"], padding=2)
            if i < n - 1:
                x = prelu(f"{conv}.nonlin", x)
        return prelu(f"{name}.nonlin", x + shortcut)

    if 16 % image.shape[1] == 0:
        shortcut = torch.cat([image] * (16 // image.shape[1]), 1)
    else:
        name = "encoder.stages.0.shortcut"
        shortcut = F.conv3d(image, w[f"{name}.weight"], w[f"{name}.bias"])
    features = [stage("encoder.stages.0", image, 1, shortcut)]
    for level, n in enumerate((2, 3, 3, 3)):
        name = f"encoder.down.{level}"
        x = F.conv3d(features[-1], w[f"{name}.conv.weight"], w[f"{name}.conv.bias"], stride=2)
        x = prelu(f"{name}.nonlin", x)
        features.append(stage(f"encoder.stages.{level + 1}", x, n, x))
    x = features.pop()
    for level, n in enumerate((3, 3, 2, 1)):
        name = f"decoder.up.{level}"
        x = F.conv_transpose3d(x, w[f"{name}.conv.weight"], w[f"{name}.conv.bias"], stride=2)
        x = torch.cat((prelu(f"{name}.nonlin", x), features.pop()), 1)
        x = stage(f"decoder.stages.{level}", x, n, x)
    return F.conv3d(x, w["decoder.seg_layers.0.weight"], w["decoder.seg_layers.0.bias"])


class TestDynamic:
    def test_prelu_has_a_slope_for_each_channel(self) -> None:
        network = VNet(1, 2, [4, 8], nn.Conv3d, 3, [1, 2], 2)
        assert sorted({m.num_parameters for m in network.modules() if isinstance(m, nn.PReLU)}) == [4, 8]

    def test_stages_with_a_norm_start_as_their_shortcut(self) -> None:
        network = VNet(
            2, 2, [4, 8], nn.Conv3d, 3, [1, 2], 2, norm_op=nn.InstanceNorm3d, norm_op_kwargs={"affine": True}
        )
        network.apply(network.initialize)
        stage = network.decoder.stages[0]
        assert isinstance(stage, ResidualStage)
        x = torch.randn(1, 8, 6, 6, 6)
        torch.testing.assert_close(stage(x), F.prelu(x, torch.tensor(0.25)))

    def test_decoder_convolves_as_often_as_the_encoder_at_that_resolution(self) -> None:
        network = VNet(1, 6, [2, 4, 6, 8, 10, 12], nn.Conv3d, 3, [1, 2, 2, 2, 2, 2], 2)
        assert [len(s.convolutions) for s in network.encoder.stages] == [1, 2, 3, 3, 3, 3]
        assert [len(s.convolutions) for s in network.decoder.stages] == [3, 3, 3, 2, 1]
