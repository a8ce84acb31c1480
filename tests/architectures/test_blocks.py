"""Resizing against PyTorch."""

import pytest
import torch
from torch.nn import functional as F

from nnunet_conres.architectures.blocks import resize

SIZES = [((4, 5, 3), (8, 10, 6)), ((7, 6, 5), (13, 6, 9)), ((8, 6, 4), (3, 1, 4)), ((1, 2, 3), (4, 4, 4))]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize(("before", "after"), SIZES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_resizing_is_trilinear(
    before: tuple[int, ...], after: tuple[int, ...], layout: torch.memory_format, dtype: torch.dtype
) -> None:
    x = torch.randn(2, 3, *before, dtype=dtype, generator=torch.Generator().manual_seed(0))
    x = x.contiguous(memory_format=layout).requires_grad_()
    y = x.detach().clone().requires_grad_()
    output, expected = resize(x, after), F.interpolate(y, after, mode="trilinear", align_corners=True)
    assert output.is_contiguous(memory_format=layout)
    weights = torch.randn(expected.shape, dtype=dtype, generator=torch.Generator().manual_seed(1))
    (output * weights).sum().backward()
    (expected * weights).sum().backward()
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(output, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(x.grad, y.grad, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_resizing_in_half_precision_keeps_what_is_constant(dtype: torch.dtype) -> None:
    """Interpolation weights sum to 1 in half precision, too. Outputs of heads with a bias are resized."""
    assert (resize(torch.ones(1, 2, 5, 6, 7, dtype=dtype), (20, 24, 28)) == 1).all()
    x = torch.randn(1, 2, 5, 6, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = F.interpolate(x.double(), (20, 24, 28), mode="trilinear", align_corners=True)
    assert (resize(x, (20, 24, 28)) - expected).abs().max() < 3 * torch.finfo(dtype).eps * x.abs().max()
