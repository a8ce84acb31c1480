"""Other forms of ConResNet in the study: that each is what its description says."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from forms import BorderMapLoss, DerivedLoss, FallingWeight, LowMomentum, border, signed_differences
from torch import Tensor, nn

from nnunet_conres.architectures.blocks import WeightStandardizedConv3d
from nnunet_conres.architectures.conresnet import ConResNet
from nnunet_conres.architectures.context_residual import SupervisedModule
from nnunet_conres.losses import ResidualMapLoss
from nnunet_conres.residuals import inter_slice_residual

STREAM_FORMS = ("Signed", "Stopped", "Border", "Finest")
OTHER_FORMS = ("DifferenceInput", "Context", "AddedSkips", "Trilinear", "GroupNorms")
SIZE = (6, 8, 8)

NetworkOf = Callable[[str | None, bool], ConResNet]


def images() -> Tensor:
    return torch.randn(2, 2, *SIZE, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("form", STREAM_FORMS + OTHER_FORMS)
def test_outputs_are_those_of_the_package_and_everything_learns(form: str, network_of: NetworkOf) -> None:
    stream = form in STREAM_FORMS
    network = network_of(form, stream)
    outputs, expected = network(images()), network_of(None, stream)(images())
    assert [output.shape for output in outputs] == [output.shape for output in expected]
    sum(output.float().square().mean() for output in outputs).backward()
    # what a norm takes away again, a bias before it, learns nothing, and at random no weight does
    idle = [n for n, p in network.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    idle += [n for n, p in network.named_parameters() if n.endswith("weight") and not p.grad.any()]
    assert not idle


def test_signed_differences_are_those_of_a_loop() -> None:
    volume = images().numpy()
    expected = np.zeros((2, 4, *SIZE), np.float32)
    for k in range(SIZE[1]):
        if k > 0:
            expected[:, :2, :, k] = volume[:, :, :, k] - volume[:, :, :, k - 1]
        if k < SIZE[1] - 1:
            expected[:, 2:, :, k] = volume[:, :, :, k] - volume[:, :, :, k + 1]
    np.testing.assert_array_equal(signed_differences(torch.from_numpy(volume), 1).numpy(), expected)


def test_borders_are_those_of_a_loop() -> None:
    volume = images().numpy()
    expected = np.zeros_like(volume)
    for index in np.ndindex(*volume.shape):
        for axis in (2, 3, 4):
            if index[axis]:
                before = list(index)
                before[axis] -= 1
                expected[index] = max(expected[index], abs(volume[index] - volume[tuple(before)]))
    np.testing.assert_array_equal(border(torch.from_numpy(volume)).numpy(), expected)


def test_the_target_of_borders_marks_changes_along_all_axes() -> None:
    labels = torch.zeros(1, 1, 5, 5, 5, dtype=torch.int16)
    labels[0, 0, 2, 2, 2] = 1
    target, mask = BorderMapLoss(classes=[1, 2]).residual_of(labels)
    assert mask is None
    assert torch.nonzero(target[0, 0]).tolist() == [[2, 2, 2], [2, 2, 3], [2, 3, 2], [3, 2, 2]]
    assert not target[0, 1].any()


@pytest.mark.parametrize("ignored", [False, True])
def test_the_derived_loss_is_the_dice_of_residuals(ignored: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(2, 3, 4, 3, 3, generator=generator)
    labels = torch.randint(0, 3, (2, 1, 4, 3, 3), generator=generator)
    annotated = torch.ones_like(labels, dtype=torch.bool)
    if ignored:
        annotated[:, :, 2] = False
    residual = ResidualMapLoss([1, 2], ignore_label=3 if ignored else None, background_channel=True)
    loss = DerivedLoss(Zero(), residual, 1, residual_weight=2.0)
    value = loss([logits, torch.zeros(2, 3, 4, 3, 3)], [torch.where(annotated, labels, 3)])

    probability = torch.softmax(logits, 1).numpy()
    dices = []
    for label in (1, 2):
        overlap = sizes = 0.0
        for b, k in np.ndindex(2, 4):
            if k == 0 or (ignored and k in (2, 3)):
                continue
            truth = (labels[b, 0, k] == label).numpy() != (labels[b, 0, k - 1] == label).numpy()
            derived = abs(probability[b, label, k] - probability[b, label, k - 1])
            overlap += (derived * truth).sum()
            sizes += derived.sum() + truth.sum()
        dices.append((2 * overlap + 1) / (sizes + 1))
    assert float(value) == pytest.approx(2 * (1 - np.mean(dices)), rel=1e-5)
    assert float(loss.parts["residual"]) == pytest.approx(1 - np.mean(dices), rel=1e-5)


class Zero(nn.Module):
    def forward(self, outputs: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
        return torch.zeros(())


def test_context_starts_as_the_identity_and_then_does_not(network_of: NetworkOf) -> None:
    network, plain = network_of("Context", False), network_of(None, False)
    for output, expected in zip(network(images()), plain(images()), strict=True):
        torch.testing.assert_close(output, expected)
    nn.init.ones_(network.decoder.stages[-1].context.weight)
    assert not torch.allclose(network(images())[0], plain(images())[0])


@pytest.mark.parametrize(("form", "reaches"), [(None, False), ("DifferenceInput", True), ("Context", True)])
def test_neighbouring_slices_are_seen_where_kernels_are_flat(
    form: str | None, reaches: bool, network_of: NetworkOf
) -> None:
    """At full resolution, with coarser levels cut off, plans of thick slices have no kernel across slices."""
    network = network_of(form, False)
    if form == "Context":
        nn.init.ones_(network.decoder.stages[-1].context.weight)
    for up in network.decoder.segmentation_up:
        nn.init.zeros_(up.weight)
    x = images().requires_grad_()
    # a norm would reach everywhere
    for parent in list(network.modules()):
        for name, module in parent.named_children():
            if isinstance(module, nn.InstanceNorm3d):
                setattr(parent, name, nn.Identity())
    network(x)[0][:, :, 2].sum().backward()
    seen = {int(k) for k in torch.nonzero(x.grad.abs().sum((0, 1, 3, 4)))}
    assert seen == ({1, 2, 3} if reaches else {2})


def gradients_of_residual_maps(network_of: NetworkOf, form: str | None) -> Sequence[Tensor | None]:
    network = network_of(form, True)
    module: Any = network.decoder.stages[0]  # the coarsest: no attention of a level below reaches it
    torch.stack([output.square().mean() for output in network(images())[-1:]]).sum().backward()
    return [parameter.grad for parameter in module.segmentation.parameters()]


def test_stopped_gradients_do_not_reach_the_features(network_of: NetworkOf) -> None:
    assert all(gradient is None for gradient in gradients_of_residual_maps(network_of, "Stopped"))
    assert all(gradient is not None and gradient.any() for gradient in gradients_of_residual_maps(network_of, None))


def test_stopping_gradients_changes_no_output(network_of: NetworkOf) -> None:
    for output, expected in zip(network_of("Stopped", True)(images()), network_of(None, True)(images()), strict=True):
        torch.testing.assert_close(output, expected)


def test_the_finest_stream_depends_on_the_image_residual_itself(network_of: NetworkOf) -> None:
    network = network_of("Finest", True)
    network(images())
    finest: Any = network.decoder.stages[-1]
    torch.testing.assert_close(finest.image_residual, inter_slice_residual(images(), 0))
    assert isinstance(network.decoder.stages[0], SupervisedModule)
    features = torch.randn(2, 16, *SIZE)
    with torch.no_grad():
        before = finest(features, torch.zeros(1))[0]
        finest.image_residual = finest.image_residual + 1
        assert not torch.allclose(before, finest(features, torch.zeros(1))[0])


def test_no_norm_but_group_norm_is_left(network_of: NetworkOf) -> None:
    network = network_of("GroupNorms", False)
    assert not any(isinstance(module, nn.InstanceNorm3d) for module in network.modules())
    wide = [m for m in network.modules() if type(m) is nn.Conv3d and max(m.kernel_size) > 1]
    assert not wide
    assert any(isinstance(module, WeightStandardizedConv3d) for module in network.modules())


def test_skips_are_added(network_of: NetworkOf) -> None:
    network: Any = network_of("AddedSkips", False)
    skip = torch.randn(2, 8, *SIZE)
    below = torch.randn(2, 16, 6, 4, 4)
    lifted, _ = network.decoder.lift(1, below, below, skip, None)
    torch.testing.assert_close(lifted, network.decoder.segmentation_up[1](below) + skip)


def test_trilinear_upsampling_keeps_what_is_constant(network_of: NetworkOf) -> None:
    network: Any = network_of("Trilinear", False)
    up = network.decoder.segmentation_up[1](torch.ones(1, 16, 6, 4, 4))
    assert up.shape == (1, 8, *SIZE)
    torch.testing.assert_close(up, up[..., :1, :1, :1].expand_as(up))


def test_the_weight_falls_to_0_over_the_training_also_where_it_was_interrupted() -> None:
    weights = []

    class Trainer:
        current_epoch, num_epochs, _full_epoch_iterations, residual_weight = 0, 2, 5, 0.5
        loss = nn.Identity()

        def __init__(self) -> None:
            self._epoch_outputs: list[dict[str, Any]] = []

        def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
            weights.append(self.loss.residual_weight)
            self._epoch_outputs.append(batch)
            return batch

    trainer = type("Falling", (FallingWeight, Trainer), {})()
    for _ in range(5):
        trainer.train_step({})
    trainer.current_epoch, trainer._epoch_outputs = 1, [{}, {}]  # what a checkpoint in mid-epoch had
    for _ in range(3):
        trainer.train_step({})
    np.testing.assert_allclose(weights, 0.5 * (1 - np.array([0, 1, 2, 3, 4, 7, 8, 9]) / 10))


def test_low_momentum_changes_the_momentum_alone() -> None:
    class Trainer:
        def configure_optimizers(self) -> tuple[torch.optim.Optimizer, str]:
            weight = nn.Parameter(torch.zeros(1))
            return torch.optim.SGD([weight], 0.1, momentum=0.99, weight_decay=3e-5, nesterov=True), "schedule"

    optimizer, schedule = type("Low", (LowMomentum, Trainer), {})().configure_optimizers()
    (group,) = optimizer.param_groups
    assert (group["momentum"], group["lr"], group["weight_decay"], group["nesterov"]) == (0.95, 0.1, 3e-5, True)
    assert schedule == "schedule"
