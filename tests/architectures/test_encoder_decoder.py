"""Properties that V-Net and 3D U-Net share, in addition to those of all networks (test_network.py)."""

from typing import Any

import pytest
import torch
from torch import nn

from nnunet_conres.architectures.network import PlansNetwork
from nnunet_conres.architectures.unet3d import UNet3D
from nnunet_conres.architectures.vnet import VNet


def arguments(**changes: Any) -> dict[str, Any]:
    """Return constructor arguments of a small anisotropic network, as in stock plans."""
    return {
        "input_channels": 2,
        "num_classes": 3,
        "n_stages": 3,
        "features_per_stage": [4, 8, 12],
        "conv_op": nn.Conv3d,
        "kernel_sizes": [[1, 3, 3], [3, 3, 3], [3, 3, 3]],
        "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2]],
        "norm_op": nn.InstanceNorm3d,
        "nonlin": nn.LeakyReLU,
    } | changes


@pytest.mark.parametrize("network_class", [VNet, UNet3D])
class TestNetwork:
    def test_without_auxiliary_heads_there_is_one_output(self, network_class: type[PlansNetwork]) -> None:
        network: Any = network_class(**arguments(deep_supervision=True, auxiliary_heads=False))
        outputs = network(torch.randn(1, 2, 4, 8, 8))
        assert [tuple(o.shape) for o in outputs] == [(1, 3, 4, 8, 8)]
        assert len(network.decoder.seg_layers) == 1

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"n_conv_per_stage": [1, 0, 2]}, "n_conv_per_stage must be 1 or more"),
            ({"n_conv_per_stage": [2, 2]}, "n_conv_per_stage .* 3 entries"),
        ],
    )
    def test_refuses_arguments_out_of_range(
        self, network_class: type[PlansNetwork], changes: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(ValueError, match=message):
            network_class(**arguments(**changes))


def test_max_pooling_with_odd_sizes_equals_ceil_mode() -> None:
    network: Any = UNet3D(**arguments(downsampling="max_pool"))
    pool = network.encoder.down[1]
    image = torch.randn(1, 2, 5, 7, 9)
    torch.testing.assert_close(pool(image), nn.functional.max_pool3d(image, 2, ceil_mode=True))
