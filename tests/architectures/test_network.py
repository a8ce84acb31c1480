"""What all three networks check alike."""

from typing import Any

import pytest
import torch
from torch import nn

from nnunet_conres.architectures.conresnet import ConResNet
from nnunet_conres.architectures.network import PlansNetwork
from nnunet_conres.architectures.unet3d import UNet3D
from nnunet_conres.architectures.vnet import VNet

VALID = {
    "input_channels": 2,
    "num_classes": 3,
    "n_stages": 3,
    "features_per_stage": [4, 8, 12],
    "conv_op": nn.Conv3d,
    "kernel_sizes": 3,
    "strides": [1, 2, 2],
    "nonlin": nn.ReLU,
}


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
        ({"checkpointing": "all"}, "checkpointing must be one of"),
    ],
)
def test_refuses_arguments_out_of_range(
    network_class: type[PlansNetwork], changes: dict[str, Any], message: str
) -> None:
    network_class(**VALID)
    with pytest.raises(ValueError, match=message):
        network_class(**(VALID | changes))


def gradients(network: PlansNetwork, image: torch.Tensor) -> list[torch.Tensor]:
    torch.manual_seed(1)  # dropout
    outputs = network(image)
    sum(output.square().mean() for output in outputs).backward()
    return [*outputs, *(parameter.grad for parameter in network.parameters())]


NETWORKS = {
    "ConResNet": (ConResNet, VALID | {"residual_outputs": True}),
    "ConResNet, shared encoder": (ConResNet, VALID | {"residual_outputs": True, "residual_input": "shared_encoder"}),
    "ConResNet, paper": (ConResNet.paper, {"input_channels": 2, "num_classes": 3, "residual_outputs": True}),
    "VNet": (VNet, VALID),
    "UNet3D": (UNet3D, VALID),
    "UNet3D, batch norm": (UNet3D, VALID | {"norm_op": nn.BatchNorm3d}),
    "VNet, dropout": (VNet, VALID | {"dropout_op": nn.Dropout3d, "dropout_op_kwargs": {"p": 0.5}}),
}


class TestCheckpointing:
    """Activations that are computed twice change nothing but memory."""

    @pytest.mark.parametrize("name", list(NETWORKS))
    @pytest.mark.parametrize("checkpointing", ["decoder", "full"])
    def test_same_outputs_gradients_and_statistics(self, name: str, checkpointing: str) -> None:
        network_class, given = NETWORKS[name]
        torch.manual_seed(0)
        plain = network_class(**given, deep_supervision=True)
        saving = network_class(**given, deep_supervision=True, checkpointing=checkpointing)
        saving.load_state_dict(plain.state_dict())
        image = torch.randn(2, 2, 16, 16, 8)
        for value, expected in zip(gradients(saving, image), gradients(plain, image), strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)
        for key, expected in plain.state_dict().items():
            torch.testing.assert_close(saving.state_dict()[key], expected, rtol=0, atol=0)

    @pytest.mark.parametrize("name", list(NETWORKS))
    def test_keeps_less(self, name: str) -> None:
        network_class, given = NETWORKS[name]
        image = torch.randn(1, 2, 16, 16, 8)
        kept = [
            kept_bytes(network_class(**given, deep_supervision=True, checkpointing=checkpointing), image)
            for checkpointing in ("none", "decoder", "full")
        ]
        assert kept[0] > kept[1] > kept[2]

    @pytest.mark.parametrize("name", ["ConResNet", "ConResNet, paper", "VNet", "UNet3D, batch norm"])
    def test_compiles_without_graph_break(self, name: str) -> None:
        torch.compiler.reset()
        network_class, given = NETWORKS[name]
        torch.manual_seed(0)
        network = network_class(**given, deep_supervision=True, checkpointing="full").double()
        image = torch.randn(2, 2, 16, 16, 8, dtype=torch.float64)
        expected = gradients(network, image)
        network.zero_grad()
        compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
        for value, reference in zip(gradients(compiled, image), expected, strict=True):
            torch.testing.assert_close(value, reference)


def kept_bytes(network: PlansNetwork, image: torch.Tensor) -> int:
    """What autograd keeps for backward, each storage once, without the parameters."""
    kept: dict[int, torch.UntypedStorage] = {}
    parameters = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = network(image)
    del outputs
    return sum(storage.nbytes() for pointer, storage in kept.items() if pointer not in parameters)
