from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nnunet_conres.optimizers import MUON_LR, MUON_WEIGHT_DECAY, Muon, muon_of, orthogonalize


def newton_schulz(matrix: Tensor) -> Tensor:
    """As the source has it: five rounds on the whole matrix, here in double precision."""
    x = matrix.double()
    x = x / x.norm()
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


class TestOrthogonalize:
    @pytest.mark.parametrize("shape", [(32, 27), (32, 864), (96, 32), (3, 3)])
    def test_is_newton_schulz(self, shape: tuple[int, int]) -> None:
        matrices = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
        (found,) = orthogonalize([matrices])
        for matrix, one in zip(matrices, found, strict=True):
            wide = shape[0] <= shape[1]
            expected = newton_schulz(matrix) if wide else newton_schulz(matrix.mT).mT
            torch.testing.assert_close(one.double(), expected, rtol=0, atol=1e-4)

    def test_singular_values_become_about_1_and_vectors_stay(self) -> None:
        matrix = torch.randn(24, 60, generator=torch.Generator().manual_seed(1))
        u, _, v = torch.linalg.svd(matrix, full_matrices=False)
        found = orthogonalize([1e-6 * matrix[None]])[0][0]  # whatever the size
        assert ((torch.linalg.svdvals(found) > 0.65) & (torch.linalg.svdvals(found) < 1.25)).all()
        in_their_axes = u.mT @ found @ v.mT
        off_diagonal = in_their_axes - torch.diag(in_their_axes.diagonal())
        assert off_diagonal.abs().max() < 1e-4

    def test_what_is_nearly_singular(self) -> None:
        generator = torch.Generator().manual_seed(2)
        u, _, v = torch.linalg.svd(torch.randn(64, 400, generator=generator), full_matrices=False)
        matrix = u @ torch.diag(10 ** torch.linspace(0, -7, 64)) @ v
        found = orthogonalize([matrix[None]])[0][0]
        torch.testing.assert_close(found.double(), newton_schulz(matrix), rtol=0, atol=1e-3)

    def test_in_single_precision_whatever_the_trainer_has(self) -> None:
        """A step under bfloat16 autocast was unstable: half the digits are gone where singular values are squared."""
        matrices = torch.randn(1, 32, 100, generator=torch.Generator().manual_seed(3))
        with torch.autocast("cpu", torch.bfloat16):
            (found,) = orthogonalize([matrices])
        assert torch.equal(found, orthogonalize([matrices])[0])

    def test_nothing_of_nothing(self) -> None:
        (found,) = orthogonalize([torch.zeros(1, 4, 9)])
        assert torch.equal(found, torch.zeros(1, 4, 9))

    def test_batches_do_not_mix(self) -> None:
        """Some have the same number of rows, as they are or transposed, and are calculated with together."""
        generator = torch.Generator().manual_seed(4)
        shapes = [(2, 8, 30), (1, 12, 12), (3, 8, 9), (1, 40, 8), (2, 12, 50)]
        batches = [10.0**number * torch.randn(*shape, generator=generator) for number, shape in enumerate(shapes)]
        before = [batch.clone() for batch in batches]
        for batch, found in zip(batches, orthogonalize(batches), strict=True):
            for matrix, one in zip(batch, found, strict=True):
                wide = matrix.shape[0] <= matrix.shape[1]
                expected = newton_schulz(matrix) if wide else newton_schulz(matrix.mT).mT
                torch.testing.assert_close(one.double(), expected, rtol=0, atol=1e-4)
        assert all(map(torch.equal, batches, before))


class TestMuon:
    @pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this PyTorch has no Muon to compare with")
    @pytest.mark.parametrize("shape", [(8, 40), (40, 8)])
    def test_is_pytorchs(self, shape: tuple[int, int]) -> None:
        """Which calculates in bfloat16."""
        torch.manual_seed(0)
        start = torch.randn(shape)
        ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
        optimizers = (
            Muon([{"params": [ours], "orthogonal": True}], lr=0.03, momentum=0.9, weight_decay=0.1),
            torch.optim.Muon([theirs], lr=0.03, momentum=0.9, weight_decay=0.1, nesterov=True),
        )
        for _ in range(4):
            gradient = torch.randn(shape)
            for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
                parameter.grad = gradient.clone()
                optimizer.step()
        assert (ours - start).abs().max() > 0.02
        torch.testing.assert_close(ours, theirs, rtol=0, atol=3e-3)

    def test_other_groups_take_steps_of_adam(self) -> None:
        torch.manual_seed(0)
        start = [torch.randn(5), torch.randn(3, 5)]
        ours, theirs = ([nn.Parameter(value.clone()) for value in start] for _ in range(2))
        optimizers = (
            Muon([{"params": ours, "lr_factor": 0.5}], lr=0.2, weight_decay=0.1),
            torch.optim.AdamW(theirs, lr=0.1, betas=(0.9, 0.99), weight_decay=0.1),
        )
        for _ in range(5):
            gradients = [torch.randn_like(value) for value in start]
            for parameters, optimizer in zip((ours, theirs), optimizers, strict=True):
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter.grad = gradient.clone()
                optimizer.step()
        torch.testing.assert_close(ours, theirs)

    def test_convolutions_are_matrices_of_outputs_by_all_else(self) -> None:
        torch.manual_seed(0)
        conv = nn.Parameter(torch.randn(6, 4, 3, 3, 3))
        matrix = nn.Parameter(conv.detach().reshape(6, 108).clone())
        gradient = torch.randn(6, 4, 3, 3, 3)
        conv.grad, matrix.grad = gradient, gradient.reshape(6, 108)
        Muon([{"params": [conv, matrix], "orthogonal": True}], lr=0.1).step()
        torch.testing.assert_close(conv.detach().reshape(6, 108), matrix.detach())

    def test_parameters_of_one_shape_do_not_mix(self) -> None:
        torch.manual_seed(0)
        together = [nn.Parameter(torch.zeros(4, 6)) for _ in range(3)]
        alone = [nn.Parameter(torch.zeros(4, 6)) for _ in range(3)]
        for one, other in zip(together, alone, strict=True):
            one.grad = torch.randn(4, 6)
            other.grad = one.grad.clone()
            Muon([{"params": [other], "orthogonal": True}], lr=1).step()
        Muon([{"params": together, "orthogonal": True}], lr=1).step()
        torch.testing.assert_close(together, alone)

    def test_weight_decay_goes_by_the_rate(self) -> None:
        parameter = nn.Parameter(torch.full((2, 2), 8.0))
        parameter.grad = torch.zeros(2, 2)
        Muon([{"params": [parameter], "orthogonal": True}], lr=0.5, weight_decay=0.5).step()
        assert torch.equal(parameter.detach(), torch.full((2, 2), 6.0))

    def test_state_goes_on(self) -> None:
        torch.manual_seed(0)
        networks = [nn.Conv3d(2, 4, 3)]
        optimizers = [muon_of(networks[0], 0.1, 0.01)]
        gradients = [[torch.randn_like(parameter) for parameter in networks[0].parameters()] for _ in range(4)]

        def step(which: int, number: int) -> None:
            for parameter, gradient in zip(networks[which].parameters(), gradients[number], strict=True):
                parameter.grad = gradient.clone()
            optimizers[which].step()

        step(0, 0)
        step(0, 1)
        networks.append(copy.deepcopy(networks[0]))
        optimizers.append(muon_of(networks[1], 0.7, 0))
        optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
        for which in (0, 1):
            step(which, 2)
            step(which, 3)
        torch.testing.assert_close(list(networks[0].parameters()), list(networks[1].parameters()), rtol=0, atol=0)

    @pytest.mark.gpu
    def test_a_gpu_takes_the_steps_of_a_cpu(self) -> None:
        torch.manual_seed(0)
        here = nn.Sequential(nn.Conv3d(3, 8, 3), nn.InstanceNorm3d(8, affine=True), nn.Conv3d(8, 8, 1))
        there = copy.deepcopy(here).cuda()
        optimizers = [muon_of(network, 0.1, 0.01) for network in (here, there)]
        for _ in range(3):
            for one, other in zip(here.parameters(), there.parameters(), strict=True):
                one.grad = torch.randn_like(one)
                other.grad = one.grad.cuda()
            for optimizer in optimizers:
                optimizer.step()
        for one, other in zip(here.parameters(), there.parameters(), strict=True):
            torch.testing.assert_close(one, other.cpu(), rtol=0, atol=1e-4)

    def test_without_gradient_nothing_moves(self) -> None:
        still, moving = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(2, 3))
        moving.grad = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
        Muon([{"params": [still, moving], "orthogonal": True}], lr=0.1, weight_decay=0.5).step()
        assert torch.equal(still.detach(), torch.ones(2, 3))
        assert not torch.equal(moving.detach(), torch.ones(2, 3))

    @pytest.mark.parametrize("wrong", [{"lr": -1.0}, {"momentum": 1.0}, {"weight_decay": -0.1}, {"betas": (0.9, 1.0)}])
    def test_numbers_out_of_range(self, wrong: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match="Expected lr and weight_decay"):
            Muon([nn.Parameter(torch.ones(2))], **({"lr": 0.1} | wrong))

    def test_vectors_are_no_matrices(self) -> None:
        with pytest.raises(ValueError, match=r"parameters of shape \[\(2,\)\]"):
            Muon([{"params": [nn.Parameter(torch.ones(2))], "orthogonal": True}], lr=0.1)


def test_which_parameters_of_a_network() -> None:
    network = nn.ModuleDict(
        {"conv": nn.Conv3d(2, 4, 3), "up": nn.ConvTranspose3d(4, 2, 2), "norm": nn.InstanceNorm3d(2, affine=True)}
    )
    network["seg_layers"] = nn.Conv3d(2, 3, 1)
    matrices, others = muon_of(network, MUON_LR, MUON_WEIGHT_DECAY).param_groups
    assert {tuple(parameter.shape) for parameter in matrices["params"]} == {(4, 2, 3, 3, 3), (4, 2, 2, 2, 2)}
    assert matrices["orthogonal"]
    assert len(others["params"]) == 6
    assert not others["orthogonal"]
    assert (matrices["lr"] * matrices["weight_decay"], others["weight_decay"]) == (pytest.approx(3e-5), 0)
    assert others["lr"] * others["lr_factor"] == pytest.approx(3e-3)
