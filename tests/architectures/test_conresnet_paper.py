"""ConResNetPaper against outputs of the authors' published code."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from nnunet_conres.architectures.authors_weights import from_authors_state_dict
from nnunet_conres.architectures.blocks import WeightStandardizedConv3d
from nnunet_conres.architectures.conresnet_paper import STRIDES, ConResNetPaper


def shapes(output: Tensor | list[Tensor]) -> list[tuple[int, ...]] | tuple[int, ...]:
    return tuple(output.shape) if isinstance(output, Tensor) else [tuple(x.shape) for x in output]


@pytest.mark.parametrize("kernel", [1, 3])
def test_weight_standardisation_filter_by_filter(kernel: int) -> None:
    conv = WeightStandardizedConv3d(5, 4, kernel, padding=kernel // 2, bias=False).double()
    image = torch.randn(1, 5, 6, 6, 6, dtype=torch.float64)
    filters = []
    for one in conv.weight:
        mean = sum(one.flatten()) / one.numel()
        variance = sum((value - mean) ** 2 for value in one.flatten()) / (one.numel() - 1)
        filters.append((one - mean) / torch.sqrt(variance + 1e-12))
    torch.testing.assert_close(conv(image), F.conv3d(image, torch.stack(filters), padding=kernel // 2))


class TestAuthorsOutputs:
    """Against outputs computed by the authors' code, not by this project."""

    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-5), (torch.float32, 1e-4)])
    @pytest.mark.parametrize("mode", ["evaluation", "training without dropout"])
    def test_the_network_gives_them(self, authors: Any, mode: str, dtype: torch.dtype, tolerance: float) -> None:
        network = from_authors_state_dict(authors.state_dict, residual_outputs=True).to(dtype)
        if mode != "evaluation":
            network.train().encoder.fusion.dropout.eval()
        with torch.no_grad():
            authors.check_outputs(network(authors.image().to(dtype)), tolerance)

    def test_float64_agrees_in_all_digits_that_were_published(self, authors: Any) -> None:
        network = from_authors_state_dict(authors.state_dict, residual_outputs=True)
        with torch.no_grad():
            authors.check_outputs(network(authors.image()), 1e-12)

    def test_plain_graph_gives_them_too(self, authors: Any, plain_graph: Any) -> None:
        with torch.no_grad():
            authors.check_outputs(plain_graph(authors.state_dict, authors.image()), 1e-9)


@pytest.mark.parametrize("checkpointing", [pytest.param("none", marks=pytest.mark.slow), "full"])
def test_gradients_are_those_of_a_plain_composition(authors: Any, plain_graph: Any, checkpointing: str) -> None:
    """Every gradient, of all weights and of the image, against autograd of plain functions in float64."""
    weights = authors.state_dict
    network = from_authors_state_dict(weights, residual_outputs=True).train()
    network.encoder.fusion.dropout.eval()
    network.encoder.checkpointing = network.decoder.checkpointing = checkpointing == "full"
    image = authors.image()[:1, :, :8, :16, :16].contiguous()
    ours, theirs = image.clone().requires_grad_(), image.clone().requires_grad_()
    leaves = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
    upstream = [torch.randn(1, 3, 8, 16, 16, dtype=torch.float64) for _ in range(4)]
    torch.autograd.backward(network(ours), upstream)
    torch.autograd.backward(plain_graph(leaves, theirs), upstream)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-8, atol=1e-8)
    expected = from_authors_state_dict(
        {name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in leaves.items()}
    )
    assert {"seg_cls.0.bias", "conv_4_32.0.weight"} <= {name for name, leaf in leaves.items() if leaf.grad is not None}
    gradients = expected.state_dict()
    for name, parameter in network.named_parameters():
        scale = float(gradients[name].abs().max())
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-8, atol=1e-8 * max(scale, 1), msg=name)


def test_parameters_of_the_paper_all_with_a_gradient() -> None:
    network = ConResNetPaper(4, 3, residual_outputs=True)
    assert sum(p.numel() for p in network.parameters() if p.requires_grad) == 19_018_732
    sum(output.square().mean() for output in network(torch.randn(1, 4, 8, 16, 16))).backward()
    without = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def test_counts_of_the_authors_module(authors: Any) -> None:
    """19,018,732 parameters in use and 422,464 that no output depends on."""
    total = sum(math.prod(shape) for _, shape in authors.facts["parameters"])
    assert total == 19_018_732 + 422_464


def test_residual_outputs_are_four_full_size_maps_in_both_modes() -> None:
    network = ConResNetPaper(4, 3)
    image = torch.randn(1, 4, 8, 16, 16)
    assert shapes(network(image)) == (1, 3, 8, 16, 16)
    network.residual_outputs = True
    for mode in (True, False):
        network.train(mode)
        assert shapes(network(image)) == [(1, 3, 8, 16, 16)] * 4
    network.decoder.deep_supervision = True
    assert shapes(network(image)) == [(1, 3, 8, 16, 16)] * 4
    network.residual_outputs = False
    assert shapes(network(image)) == [(1, 3, 8, 16, 16)]


def test_the_background_has_no_residual_map() -> None:
    network = ConResNetPaper(1, 3, residual_outputs=True, background_class=True)
    assert shapes(network(torch.randn(1, 1, 8, 8, 8))) == [(1, 3, 8, 8, 8)] + [(1, 2, 8, 8, 8)] * 3


@pytest.mark.parametrize(
    "argument", ["norm_op", "n_blocks_per_stage", "features_per_stage", "kernel_sizes", "shared_encoder", "topology"]
)
def test_has_no_argument_that_means_nothing(argument: str) -> None:
    with pytest.raises(TypeError, match=argument):
        ConResNetPaper(4, 3, **{argument: None})


def test_has_the_papers_strides_only() -> None:
    """nnU-Net's trainers read the strides from plans. Other values are refused."""
    ConResNetPaper(4, 3, strides=[list(stride) for stride in STRIDES])
    with pytest.raises(ValueError, match="strides of ConResNetPaper are fixed"):
        ConResNetPaper(4, 3, strides=[[1, 1, 1], [1, 2, 2], [2, 2, 2], [2, 2, 2]])


@pytest.mark.parametrize("mode", [True, False])
def test_extreme_intensities_give_finite_outputs_and_gradients(mode: bool) -> None:
    network = ConResNetPaper(1, 2, residual_outputs=True).train(mode)
    image = torch.randn(1, 1, 8, 8, 8)
    image[0, 0, 3, 4, 5] = 1e30
    outputs = network(image)
    assert all(torch.isfinite(output).all() for output in outputs)
    sum(output.sigmoid().mean() for output in outputs).backward()
    assert all(torch.isfinite(p.grad).all() for p in network.parameters())
