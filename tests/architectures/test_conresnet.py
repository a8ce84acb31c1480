"""The context residual modules and the two decoders of ConResNet. test_network.py tests what all networks share."""

from typing import Any

import pytest
import torch
from torch import Tensor

from nnunet_conres.architectures.conresnet import ConResNet
from nnunet_conres.architectures.context_residual import ContextResidualModule
from tests import small_networks


def arguments(**changes: Any) -> dict[str, Any]:
    """Return constructor arguments of a small isotropic network, as in stock plans."""
    isotropic = {"kernel_sizes": [[3, 3, 3]] * 3, "strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2]]}
    stages = {"features_per_stage": [4, 8, 16], "n_blocks_per_stage": 1}
    return small_networks.arguments(input_channels=2, num_classes=3, **isotropic, **stages) | changes


@pytest.mark.parametrize("shared_encoder", [False, True])
def test_every_level_has_a_module_with_the_papers_attention(shared_encoder: bool) -> None:
    """F * (1 + sigmoid(S)) at every level, voxel by voxel, and residual maps from S."""
    network = ConResNet(**arguments(shared_encoder=shared_encoder, residual_outputs=True)).eval()
    assert len(network.decoder.stages) == 2
    seen: dict[Any, Tensor] = {}
    for level, module in enumerate(network.decoder.stages):
        assert isinstance(module, ContextResidualModule)
        module.segmentation.register_forward_hook(lambda m, i, o, level=level: seen.update({("F", level): o}))
        module.register_forward_hook(
            lambda m, i, o, level=level: seen.update({("attended", level): o[0], ("S", level): o[1]})
        )
    with torch.no_grad():
        _, *residual_maps = network(torch.randn(1, 2, 8, 8, 8))
        for level in range(2):
            attended = seen["F", level] * (1 + 1 / (1 + torch.exp(-seen["S", level])))
            torch.testing.assert_close(seen["attended", level], attended, rtol=1e-5, atol=1e-6)
            head = network.decoder.seg_layers.residual[level]
            weight, bias = head.weight[:, :, 0, 0, 0], head.bias
            expected = torch.einsum("oc,bcxyz->boxyz", weight, seen["S", level]) + bias.view(-1, 1, 1, 1)
            torch.testing.assert_close(residual_maps[-(level + 1)], expected, rtol=1e-5, atol=1e-5)


def test_the_residual_stream_acts_on_the_segmentation() -> None:
    network = ConResNet(**arguments()).eval()
    image = torch.randn(1, 2, 8, 8, 8)
    with torch.no_grad():
        before = network(image)
        for module in network.decoder.stages:
            module.merge.conv.bias.add_(1)
        assert not torch.allclose(network(image), before)


def test_the_encoder_is_shared_or_the_stream_starts_from_the_image() -> None:
    own, shared = ConResNet(**arguments()), ConResNet(**arguments(shared_encoder=True))
    assert own.decoder.stages[0].project.in_channels == 2
    assert shared.decoder.stages[0].project is None
    encoded: list[torch.Size] = []
    shared.encoder.register_forward_hook(lambda m, inputs, o: encoded.append(inputs[0].shape))
    shared(torch.randn(3, 2, 8, 8, 8))
    assert encoded == [(6, 2, 8, 8, 8)]  # images and their residuals in one batch


def test_slices_beyond_the_receptive_field_of_a_change_are_untouched_but_for_the_next() -> None:
    """The residual compares a slice with the one before: a change of slice k changes the residual at k and k + 1."""
    network = ConResNet(**arguments(kernel_sizes=1, strides=[1, 1, 1], norm_op=None, norm_op_kwargs=None)).eval()
    image = torch.randn(1, 2, 8, 4, 4)
    changed = image.clone()
    changed[:, :, 3] += 1
    with torch.no_grad():
        difference = (network(changed) - network(image)).abs().amax((0, 1, 3, 4))
    touched = torch.nonzero(difference > 1e-7).flatten().tolist()
    assert touched[0] == 3
    assert 4 in touched
    assert len(touched) <= 4


def test_slice_axis_moves_with_the_data() -> None:
    torch.manual_seed(1)
    along_first = ConResNet(**arguments(slice_axis=0)).eval()
    along_last = ConResNet(**arguments(slice_axis=2)).eval()
    weights = {
        k: v.transpose(2, 4) if v.ndim == 5 else v  # the kernels are transposed, too
        for k, v in along_first.state_dict().items()
    }
    along_last.load_state_dict(weights)
    image = torch.randn(1, 2, 8, 12, 16)
    with torch.no_grad():
        torch.testing.assert_close(along_last(image.transpose(2, 4)).transpose(2, 4), along_first(image))


@pytest.mark.parametrize("argument", ["topology", "residual_input", "residual_stream", "attention", "n_conv_per_stage"])
def test_has_no_argument_that_means_nothing(argument: str) -> None:
    with pytest.raises(TypeError, match=argument):
        ConResNet(**arguments(**{argument: None}))


def test_refuses_a_slice_axis_out_of_range() -> None:
    with pytest.raises(ValueError, match="slice_axis"):
        ConResNet(**arguments(slice_axis=3))


def test_residual_blocks_learn_from_the_first_step() -> None:
    network = ConResNet(**arguments())
    network.apply(network.initialize)
    block = network.encoder.stages[0].blocks[0]
    block(torch.rand(1, 4, 8, 8, 8)).square().mean().backward()
    assert all(parameter.grad is not None for parameter in block.parameters())
    assert float(block.conv1.conv.weight.grad.abs().sum()) > 0
