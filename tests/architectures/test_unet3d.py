"""3D U-Net against the paper's number of parameters and an independent computation of its graph."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nnunet_conres.architectures.unet3d import UNet3D


def convolution_parameters(network: nn.Module) -> int:
    convolutions = [m for m in network.modules() if isinstance(m, (nn.Conv3d, nn.ConvTranspose3d))]
    return sum(p.numel() for m in convolutions for p in m.parameters())


class TestPaper:
    def test_counts_of_the_paper(self) -> None:
        assert convolution_parameters(UNet3D.paper(3, 3, downsampling="max_pool")) == 19_069_955

    def test_strided_convolutions_add_their_own_weights(self) -> None:
        added = sum(8 * c * c + c for c in (64, 128, 256))
        assert convolution_parameters(UNet3D.paper(3, 3)) == 19_069_955 + added

    def test_every_parameter_gets_a_gradient(self) -> None:
        network = UNet3D.paper(1, 2, deep_supervision=True)
        (output,) = network(torch.randn(2, 1, 16, 16, 16))
        output.square().mean().backward()
        assert all(p.grad is not None for p in network.parameters())

    @pytest.mark.parametrize("downsampling", ["max_pool", "strided_conv"])
    def test_is_the_papers_graph(self, downsampling: str) -> None:
        network = UNet3D.paper(2, 3, downsampling=downsampling).double()
        network.apply(network.initialize)
        image = torch.randn(2, 2, 8, 16, 24, dtype=torch.float64)
        with torch.no_grad():
            torch.testing.assert_close(network(image), paper_forward(network, image))


def paper_forward(network: UNet3D, image: Tensor) -> Tensor:
    """Compute the paper's figure 2 with plain functions that take the network's weights in the paper's order."""
    convolutions = {
        "encoder": iter(
            [m for m in network.encoder.modules() if isinstance(m, nn.Conv3d) and m.kernel_size == (3,) * 3]
        ),
        "decoder": iter(
            [m for m in network.decoder.modules() if isinstance(m, nn.Conv3d) and m.kernel_size == (3,) * 3]
        ),
    }
    down = iter([m for m in network.encoder.modules() if isinstance(m, nn.Conv3d) and m.stride == (2, 2, 2)])
    up = iter([m for m in network.decoder.modules() if isinstance(m, nn.ConvTranspose3d)])

    def convolve(x: Tensor, path: str, channels: int) -> Tensor:
        conv = next(convolutions[path])
        assert conv.weight.shape[0] == channels
        x = F.conv3d(x, conv.weight, conv.bias, padding=1)
        mean, variance = x.mean((0, 2, 3, 4), keepdim=True), x.var((0, 2, 3, 4), correction=0, keepdim=True)
        return F.relu((x - mean) / torch.sqrt(variance + 1e-5))  # batch norm before any training

    x, skips = image, []
    for first, second in ((32, 64), (64, 128), (128, 256)):
        x = convolve(convolve(x, "encoder", first), "encoder", second)
        skips.append(x)
        if network.downsampling == "max_pool":
            x = F.max_pool3d(x, 2)
        else:
            conv = next(down)
            x = F.conv3d(x, conv.weight, conv.bias, stride=2)
    x = convolve(convolve(x, "encoder", 256), "encoder", 512)
    for channels in (256, 128, 64):
        transposed = next(up)
        assert transposed.bias is None
        x = F.conv_transpose3d(x, transposed.weight, stride=2)
        x = torch.cat((x, skips.pop()), 1)
        x = convolve(convolve(x, "decoder", channels), "decoder", channels)
    head = network.decoder.seg_layers[-1]
    return F.conv3d(x, head.weight, head.bias)


class TestDynamic:
    def test_channels_double_before_the_downsampling(self) -> None:
        network = UNet3D(
            1,
            3,
            [8, 16, 32],
            nn.Conv3d,
            [[1, 3, 3], [3, 3, 3], [3, 3, 3]],
            [1, [1, 2, 2], 2],
            2,
            norm_op=nn.InstanceNorm3d,
        )
        kept = [
            [(m.in_channels, m.out_channels) for m in stage.modules() if isinstance(m, nn.Conv3d)]
            for stage in network.encoder.stages
        ]
        assert kept == [[(1, 4), (4, 8)], [(8, 8), (8, 16)], [(16, 16), (16, 32)]]
        assert [m.kernel_size for m in network.encoder.down] == [(1, 2, 2), (2, 2, 2)]
        assert [m.in_channels for m in network.encoder.down] == [8, 16]

    def test_refuses_another_downsampling(self) -> None:
        with pytest.raises(ValueError, match="downsampling must be one of"):
            UNet3D.paper(1, 2, downsampling="average")
