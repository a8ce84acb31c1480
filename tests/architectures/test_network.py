"""What all three networks check alike."""

from typing import Any

import pytest
from torch import nn

from nnunet_conres.architectures.conresnet import ConResNet
from nnunet_conres.architectures.network import PlansNetwork
from nnunet_conres.architectures.unet3d import UNet3D
from nnunet_conres.architectures.vnet import VNet


@pytest.mark.parametrize("network_class", [ConResNet, VNet, UNet3D])
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
    ],
)
def test_refuses_arguments_out_of_range(
    network_class: type[PlansNetwork], changes: dict[str, Any], message: str
) -> None:
    valid = {
        "input_channels": 2,
        "num_classes": 3,
        "n_stages": 3,
        "features_per_stage": [4, 8, 12],
        "conv_op": nn.Conv3d,
        "kernel_sizes": 3,
        "strides": [1, 2, 2],
        "nonlin": nn.ReLU,
    }
    network_class(**valid)
    with pytest.raises(ValueError, match=message):
        network_class(**(valid | changes))
