"""Trainers that compile, on a CPU treated as a GPU. Weights are exchanged with stock trainers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_conres.architectures import layout
from nnunet_conres.errors import InputError
from nnunet_conres.trainers import nnUNetTrainerConResNet, nnUNetTrainerMuon


@pytest.fixture
def compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile without code generation. A graph break is an error."""
    torch.compiler.reset()
    monkeypatch.setattr(layout, "_DEVICES", {"cpu"})
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager", fullgraph=True))


def started(trainer: Any) -> Any:
    trainer.on_train_start()
    trainer.on_epoch_start()
    trainer.on_train_epoch_start()
    return trainer


@pytest.mark.parametrize(
    ("trainer_class", "kind"),
    [(nnUNetTrainerMuon, "labels"), pytest.param(nnUNetTrainerConResNet, "regions", marks=pytest.mark.slow)],
)
def test_steps_are_those_of_a_trainer_that_does_not_compile(
    make_trainer: Callable[..., Any],
    compiles: None,
    monkeypatch: pytest.MonkeyPatch,
    trainer_class: type[nnUNetTrainer],
    kind: str,
) -> None:
    plain = started(make_trainer(trainer_class, kind))
    monkeypatch.setattr(trainer_class, "_do_i_compile", lambda _: True)
    compiled = started(make_trainer(trainer_class, kind))
    assert isinstance(compiled.network, torch._dynamo.OptimizedModule)
    assert compiled.loss._compiled_call_impl is not None
    compiled._unwrapped_network().load_state_dict(plain.network.state_dict())
    batches = [next(plain.dataloader_train) for _ in range(2)]
    for batch in batches:
        losses = [trainer.train_step(deepcopy(batch)) for trainer in (plain, compiled)]
        assert losses[0].keys() == losses[1].keys()
        np.testing.assert_allclose(losses[1]["loss"], losses[0]["loss"], rtol=1e-3)
    weights = compiled._unwrapped_network().decoder.stages[-1].state_dict()
    assert any(w.ndim == 5 and w.is_contiguous(memory_format=torch.channels_last_3d) for w in weights.values())
    for trainer in (plain, compiled):
        trainer.network.eval()
    with torch.no_grad():
        found = [trainer.validation_step(deepcopy(batches[0])) for trainer in (plain, compiled)]
    np.testing.assert_allclose(found[1]["loss"], found[0]["loss"], rtol=1e-3)


@pytest.mark.parametrize(("switch", "is_fast"), [(None, True), ("1", True), ("0", False)])
def test_can_be_switched_off(
    make_trainer: Callable[..., Any],
    compiles: None,
    monkeypatch: pytest.MonkeyPatch,
    switch: str | None,
    is_fast: bool,
) -> None:
    if switch is not None:
        monkeypatch.setenv("nnUNet_conres_fast_step", switch)
    monkeypatch.setattr(nnUNetTrainerMuon, "_do_i_compile", lambda _: True)
    trainer = make_trainer(nnUNetTrainerMuon)
    trainer.initialize()
    weights = [w for w in trainer._unwrapped_network().parameters() if w.ndim == 5 and w.shape[2:].numel() > 1]
    assert all(w.is_contiguous() != is_fast for w in weights)
    assert trainer.optimizer._capture == is_fast
    image = torch.zeros(1, 2, *trainer.configuration_manager.patch_size)
    seen: list[torch.Tensor] = []
    network = trainer._unwrapped_network().eval()
    network.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        network(image)
    assert seen[0].is_contiguous() != is_fast


def test_a_switch_that_is_none_is_refused(make_trainer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("nnUNet_conres_fast_step", "maybe")
    with pytest.raises(InputError, match=r"nnUNet_conres_fast_step is 'maybe'; expected 1 \(on\) or 0 \(off\)"):
        make_trainer(nnUNetTrainerMuon).initialize()


@pytest.mark.parametrize("network", ["PlainConvUNet", "ResidualEncoderUNet"])
def test_weights_go_to_stock_trainers_and_back(
    make_trainer: Callable[..., Any], stock_plans: dict[str, Any], network: str
) -> None:
    architecture = stock_plans["configurations"]["3d_fullres"]["architecture"]
    if network == "ResidualEncoderUNet":
        architecture["network_class_name"] = architecture["network_class_name"].replace("PlainConvUNet", network)
        arguments = architecture["arch_kwargs"]
        arguments["n_blocks_per_stage"] = arguments.pop("n_conv_per_stage")
    trainers = [make_trainer(one, plans=deepcopy(stock_plans)) for one in (nnUNetTrainerMuon, nnUNetTrainer)]
    for trainer in trainers:
        trainer.initialize()
    for source, target in (trainers, trainers[::-1]):
        for parameter in source.network.parameters():
            torch.nn.init.normal_(parameter)
        file = Path(source.output_folder) / "checkpoint_final.pth"
        source.save_checkpoint(str(file))
        load_pretrained_weights(target.network, str(file))
        for name, value in source.network.state_dict().items():
            if ".seg_layers." not in name:
                assert torch.equal(target.network.state_dict()[name], value)
        checkpoint = torch.load(file, weights_only=False)
        target.network.load_state_dict(checkpoint["network_weights"])
