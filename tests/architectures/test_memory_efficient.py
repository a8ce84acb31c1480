"""Operations that save little memory for backward give the same results as plain autograd."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nnunet_conres.architectures.memory_efficient import GroupNormReLU, attend, residual_of_sigmoid
from nnunet_conres.residuals import inter_slice_residual


def leaf(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def number_kept(function: Callable[[], Tensor]) -> int:
    """Return how many different tensors autograd saves for backward."""
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = function()
    del result
    return len(kept)


class TestResidualOfSigmoid:
    @pytest.mark.parametrize("axis", [0, 1, 2])
    def test_gradient(self, axis: int) -> None:
        x = leaf(2, 3, 3, 4, 5)
        assert torch.autograd.gradcheck(lambda x: residual_of_sigmoid(x, axis), (x,))
        torch.testing.assert_close(residual_of_sigmoid(x, axis), inter_slice_residual(torch.sigmoid(x), axis))

    def test_single_slice(self) -> None:
        x = leaf(1, 2, 1, 4, 5)
        residual_of_sigmoid(x, 0).sum().backward()
        assert x.grad is not None
        assert (x.grad == 0).all()

    def test_equal_slices_have_no_gradient(self) -> None:
        x = torch.ones(1, 1, 3, 2, 2, requires_grad=True)
        residual_of_sigmoid(x, 0).sum().backward()
        assert x.grad is not None
        assert (x.grad == 0).all()

    def test_keeps_its_input_only(self) -> None:
        x = leaf(1, 2, 3, 4, 5)
        assert number_kept(lambda: residual_of_sigmoid(x, 0)) == 1


class TestAttend:
    def test_gradient(self) -> None:
        features, residual = leaf(2, 3, 3, 4, 5), leaf(2, 3, 3, 4, 5, seed=1)
        assert torch.autograd.gradcheck(attend, (features, residual))
        torch.testing.assert_close(attend(features, residual), features * (1 + torch.sigmoid(residual)))

    def test_of_two_types(self) -> None:
        output = attend(leaf(1, 2, 3, 4, 5, dtype=torch.bfloat16), leaf(1, 2, 3, 4, 5, dtype=torch.float32))
        assert output.dtype == torch.float32

    def test_keeps_its_inputs_only(self) -> None:
        features, residual = leaf(1, 2, 3, 4, 5), leaf(1, 2, 3, 4, 5, seed=1)
        assert number_kept(lambda: attend(features, residual)) == 2


class TestGroupNormReLU:
    def module(self) -> GroupNormReLU:
        torch.manual_seed(0)
        module = GroupNormReLU(4, 8)
        nn.init.normal_(module.weight)
        nn.init.normal_(module.bias)
        return module

    def test_gradient(self) -> None:
        module = self.module().double()

        def apply(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return torch.func.functional_call(module, {"weight": weight, "bias": bias}, (x,))

        x = leaf(2, 8, 3, 4, 5)
        assert torch.autograd.gradcheck(apply, (x, module.weight, module.bias))
        reference = F.relu(F.group_norm(x, 4, module.weight, module.bias, module.eps))
        torch.testing.assert_close(module(x), reference, rtol=0, atol=0)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_in_half_precision(self, dtype: torch.dtype) -> None:
        """Only the type of input and output limits the precision. Parameters get float32 gradients."""
        module = self.module()
        x, y = leaf(2, 8, 6, 7, 5, dtype=dtype), leaf(2, 8, 6, 7, 5, dtype=dtype)
        output = module(x)
        assert output.dtype == dtype
        output.float().square().sum().backward()
        found = [output.float(), x.grad.float(), module.weight.grad, module.bias.grad]
        module.zero_grad()
        reference = F.relu(F.group_norm(y.float(), 4, module.weight, module.bias, module.eps))
        reference.square().sum().backward()
        tolerance = 4 * torch.finfo(dtype).eps
        for value, expected in zip(
            found, [reference, y.grad.float(), module.weight.grad, module.bias.grad], strict=True
        ):
            assert (value - expected).abs().max() <= tolerance * expected.abs().max()

    def test_keeps_input_and_output_only(self) -> None:
        x, module = leaf(2, 8, 3, 4, 5, dtype=torch.float16), self.module()
        # input, output, scale, mean and deviation
        assert number_kept(lambda: module(x)) == 5

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    def test_under_cuda_autocast(self) -> None:
        module = self.module().cuda()
        x, y = (leaf(2, 8, 6, 7, 5, dtype=torch.float16).detach().cuda().requires_grad_() for _ in range(2))
        with torch.autocast("cuda", torch.float16):
            output = module(x)
            reference = F.relu(F.group_norm(y, 4, module.weight, module.bias, module.eps))
        assert output.dtype == torch.float16
        torch.testing.assert_close(output, reference.half(), rtol=0, atol=0)
        gradients = torch.autograd.grad(output.float().square().sum(), (x, module.weight, module.bias))
        expected = torch.autograd.grad(reference.half().float().square().sum(), (y, module.weight, module.bias))
        for value, other in zip(gradients, expected, strict=True):
            torch.testing.assert_close(value, other, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("function", ["residual_of_sigmoid", "attend", "GroupNormReLU"])
def test_compiled_gradient(function: str) -> None:
    """PyTorch 2.11 loses the gradient of compiled functions whose result was changed in place."""
    torch.compiler.reset()
    norm = GroupNormReLU(2, 4)

    def attended(x: Tensor) -> Tensor:
        return attend(x * 2, x + 1)

    def residual(x: Tensor) -> Tensor:
        return residual_of_sigmoid(x * 2, 0)

    def normed(x: Tensor) -> Tensor:
        return norm(x * 2)

    chosen = {"residual_of_sigmoid": residual, "attend": attended, "GroupNormReLU": normed}[function]
    x = leaf(2, 4, 3, 4, 5, dtype=torch.float32)
    compiled = torch.compile(chosen, backend="aot_eager", fullgraph=True)
    (found,) = torch.autograd.grad(compiled(x).square().sum(), x)
    (expected,) = torch.autograd.grad(chosen(x).square().sum(), x)
    assert expected.abs().max() > 0
    torch.testing.assert_close(found, expected)
