"""ResidualMapUNet against nnU-Net's residual encoder U-Net. test_network.py tests what all networks share."""

from typing import Any

import pytest
import torch
from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet

from nnunet_conres.architectures.context_residual import ContextResidualModule
from nnunet_conres.architectures.residual_map_unet import ResidualMapUNet
from tests import small_networks


def arguments(**changes: Any) -> dict[str, Any]:
    stages = {"features_per_stage": [4, 8, 16], "n_blocks_per_stage": [1, 2, 2], "n_conv_per_stage_decoder": [1, 2]}
    return small_networks.arguments(input_channels=2, num_classes=3, **stages) | changes


def stock_names(name: str) -> str:
    """Return the name of a parameter in nnU-Net's network."""
    return name.replace("decoder.up.", "decoder.transpconvs.").replace(
        "decoder.seg_layers.segmentation.", "decoder.seg_layers."
    )


def test_the_segmentation_is_that_of_nnunets_residual_encoder_unet() -> None:
    """The same weights give the same outputs at all scales. Only the residual heads are added."""
    network = ResidualMapUNet(**arguments(deep_supervision=True))
    stock = ResidualEncoderUNet(**arguments(deep_supervision=True))
    weights = {stock_names(k): v for k, v in network.state_dict().items() if "seg_layers.residual" not in k}
    missing, unexpected = stock.load_state_dict(weights, strict=False)
    assert unexpected == []
    assert all(name.startswith("decoder.encoder.") for name in missing)  # nnU-Net's decoder refers to its encoder
    image = torch.randn(2, 2, 4, 8, 8)
    for ours, theirs in zip(network(image), stock(image), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_has_no_inter_slice_operation() -> None:
    network = ResidualMapUNet(**arguments())
    assert not any(isinstance(module, ContextResidualModule) for module in network.modules())


def test_residual_heads_add_nothing_else() -> None:
    network = ResidualMapUNet(**arguments(num_classes=3, background_class=True))
    heads = [tuple(head.weight.shape[:2]) for head in network.decoder.seg_layers.residual]
    assert heads == [(2, 8), (2, 4)]


@pytest.mark.parametrize("argument", ["slice_axis", "shared_encoder", "attention", "residual_stream"])
def test_has_no_argument_that_means_nothing(argument: str) -> None:
    with pytest.raises(TypeError, match=argument):
        ResidualMapUNet(**arguments(**{argument: None}))
