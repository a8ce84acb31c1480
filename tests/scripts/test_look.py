"""What the study sees of trained networks."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from look import WITHOUT, attention, dice, gradients, precision, replaced
from torch import Tensor, nn

from nnunet_conres.architectures.conresnet import ConResNet
from nnunet_conres.architectures.context_residual import ContextResidualModule
from nnunet_conres.losses import ConResLoss, ResidualMapLoss

SIZE = (6, 8, 8)


class Segmentation(nn.Module):
    def forward(self, outputs: list[Tensor], targets: list[Tensor]) -> Tensor:
        return nn.functional.cross_entropy(outputs[0], targets[0][:, 0])


def batches(number: int = 2) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "data": torch.randn(2, 2, *SIZE, generator=generator),
            "target": [torch.randint(0, 3, (2, 1, *SIZE), generator=generator)],
        }
        for _ in range(number)
    ]


@pytest.fixture
def trainer(network_of: Callable[..., ConResNet]) -> Any:
    network = network_of(None, True)
    loss = ConResLoss(Segmentation(), ResidualMapLoss([1, 2], background_channel=True), 2)
    return SimpleNamespace(network=network, loss=loss, label_manager=SimpleNamespace(has_regions=False))


def test_gradients_are_those_of_the_parts(trainer: Any) -> None:
    (batch,) = batches(1)
    found = gradients(trainer.network, trainer.loss, [batch])
    trainer.loss(trainer.network(batch["data"]), batch["target"]).backward()
    encoder = torch.cat([p.grad.flatten() for p in trainer.network.encoder.parameters()])
    trainer.network.zero_grad()
    trainer.loss.residual_weight = 0
    trainer.loss(trainer.network(batch["data"]), batch["target"]).backward()
    everything = [p.grad.clone() for p in trainer.network.parameters() if p.grad is not None]
    assert found["segmentation_gradient"] == pytest.approx(float(torch.cat([g.flatten() for g in everything]).norm()))
    of_segmentation = torch.cat([p.grad.flatten() for p in trainer.network.encoder.parameters()])
    of_residual = encoder - of_segmentation
    cosine = float(of_segmentation @ of_residual / of_segmentation.norm() / of_residual.norm())
    assert found["cosine"] == pytest.approx(cosine, abs=1e-4)
    trainer.network.zero_grad()
    (0.5 * trainer.loss.residual(trainer.network(batch["data"])[2:], batch["target"][0])[0]).backward()
    residual = torch.cat([p.grad.flatten() for p in trainer.network.parameters() if p.grad is not None])
    assert found["residual_gradient"] == pytest.approx(float(residual.norm()), rel=1e-4)


def test_dice_is_that_of_a_loop(trainer: Any) -> None:
    drawn = batches()
    overlap, sizes = np.zeros(2), np.zeros(2)
    with torch.no_grad():
        for batch in drawn:
            predicted = trainer.network(batch["data"])[0].argmax(1).numpy()
            truth = batch["target"][0][:, 0].numpy()
            for label in (1, 2):
                overlap[label - 1] += np.logical_and(predicted == label, truth == label).sum()
                sizes[label - 1] += (predicted == label).sum() + (truth == label).sum()
        assert dice(trainer, drawn) == pytest.approx(np.mean(2 * overlap / sizes))


def test_dice_of_regions_is_taken_of_each() -> None:
    logits = torch.full((1, 2, 1, 1, 4), -1.0)
    logits[0, 0, 0, 0, :2] = 1
    logits[0, 1, 0, 0, 0] = 1
    target = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]]).view(1, 2, 1, 1, 4)
    trainer = SimpleNamespace(network=lambda data: [logits], label_manager=SimpleNamespace(has_regions=True))
    assert dice(trainer, [{"data": None, "target": [target]}]) == pytest.approx((2 / 3 + 1) / 2)


def test_attention_is_what_features_are_multiplied_with(trainer: Any) -> None:
    stages: Any = list(trainer.network.decoder.stages)
    for stage in stages:
        nn.init.zeros_(stage.merge.conv.weight)
        nn.init.zeros_(stage.merge.conv.bias)
    with torch.no_grad():
        levels = attention(trainer.network, stages, batches())
    assert levels == [(1.5, 0.0), (1.5, 0.0)]
    assert not any(stage._forward_hooks for stage in stages)


STREAMS: dict[str, tuple[str | None, dict[str, Any]]] = {
    "paper": (None, {}),
    "identity": (None, {"attention": "identity"}),
    "narrow": (None, {"attention": "identity", "residual_features_per_stage": [4, 8, 8]}),
    "signed": ("Signed", {}),
    "border": ("Border", {}),
    "finest": ("Finest", {}),
}


def with_a_stream(network_of: Callable[..., ConResNet], stream: str) -> tuple[ConResNet, list[Any]]:
    form, arguments = STREAMS[stream]
    network = network_of(form, True, **arguments)
    modules = [module for module in network.decoder.stages if isinstance(module, ContextResidualModule)]
    for module in modules:
        if module.gate is not None:
            nn.init.normal_(module.gate.weight)
    return network, modules


@pytest.mark.parametrize("stream", STREAMS)
def test_flat_attention_changes_nothing_where_it_is_flat_and_something_where_not(
    network_of: Callable[..., ConResNet], stream: str
) -> None:
    network, modules = with_a_stream(network_of, stream)
    data = batches()[0]["data"]
    before = network(data)[0]
    with replaced(network, WITHOUT["attention over space"]):
        assert not torch.allclose(network(data)[0], before)
    torch.testing.assert_close(network(data)[0], before)
    for module in modules:
        nn.init.zeros_(module.merge.conv.weight)
    before = network(data)[0]
    with replaced(network, WITHOUT["attention over space"]):
        torch.testing.assert_close(network(data)[0], before)


@pytest.mark.parametrize("stream", STREAMS)
def test_untold_streams_are_those_whose_weights_for_the_features_are_0(
    network_of: Callable[..., ConResNet], stream: str
) -> None:
    network, modules = with_a_stream(network_of, stream)
    data = batches()[0]["data"]
    told = network(data)[0]
    with replaced(network, WITHOUT["the features' residual"]):
        untold = network(data)[0]
    assert not torch.allclose(untold, told)
    for module in modules:
        nn.init.zeros_(module.feature_residual.weight)
    torch.testing.assert_close(network(data)[0], untold)


def test_without_attention_there_is_none_to_flatten(network_of: Callable[..., ConResNet]) -> None:
    network = network_of(None, True, attention="none")
    data = batches()[0]["data"]
    before = network(data)[0]
    with replaced(network, WITHOUT["attention over space"]):
        torch.testing.assert_close(network(data)[0], before)


def test_a_perfect_segmentation_has_a_perfect_residual(trainer: Any) -> None:
    drawn = batches()

    def network(data: Tensor) -> list[Tensor]:
        (batch,) = (b for b in drawn if b["data"] is data)
        onehot = nn.functional.one_hot(batch["target"][0][:, 0], 3).movedim(-1, 1).float()
        constant = torch.zeros(2, 3, *SIZE)
        return [100 * onehot, onehot, constant]

    trainer.network = network
    found = precision(trainer, drawn)
    assert found["segmentation_precision"] == pytest.approx(1)
    # a constant's average precision is the share of positives
    truth = torch.cat([trainer.loss.residual.residual_of(batch["target"][0])[0] for batch in drawn])
    assert found["residual_precision"] == pytest.approx(float(truth.float().mean((0, 2, 3, 4)).mean()))
    assert math.isfinite(found["residual_precision"])
