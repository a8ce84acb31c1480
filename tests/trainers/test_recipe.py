"""Optimiser and schedule: Muon, and nnU-Net's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_conres.optimizers import Muon
from nnunet_conres.trainers import (
    nnUNetTrainerConResNet,
    nnUNetTrainerConResNet_SGD,
    nnUNetTrainerMuon,
    nnUNetTrainerMuon_1epoch,
    nnUNetTrainerResidualMaps,
    nnUNetTrainerResidualMaps_SGD,
    nnUNetTrainerUNet3D,
)
from nnunet_conres.trainers.recipe import MuonMixin


def rates(trainer: Any) -> list[float]:
    """Return the learning rates of the first epoch's steps."""
    trainer.num_epochs = 2
    trainer.on_train_start()
    trainer.on_epoch_start()
    trainer.on_train_epoch_start()
    found = []
    for _ in range(3):
        trainer.train_step(next(trainer.dataloader_train))
        found.append(trainer.optimizer.param_groups[0]["lr"])
    return found


@pytest.mark.parametrize("trainer_class", [nnUNetTrainerConResNet, nnUNetTrainerResidualMaps, nnUNetTrainerMuon])
def test_muon(make_trainer: Callable[..., Any], trainer_class: type) -> None:
    trainer = make_trainer(trainer_class)
    found = rates(trainer)
    # nnU-Net's polynomial of 2 epochs, in steps of a third of an epoch
    np.testing.assert_allclose(found, [0.03 * (1 - i / 6) ** 0.9 for i in range(3)])
    assert isinstance(trainer.optimizer, Muon)
    *hidden, others = trainer.optimizer.param_groups
    names = {id(parameter): name for name, parameter in trainer.network.named_parameters()}
    for group in hidden:
        assert group["orthogonal"]
        assert all(names[id(parameter)].endswith(".weight") for parameter in group["params"])
        assert (group["lr"], group["weight_decay"]) == (others["lr"], 1e-3)
    heads = [names[id(parameter)] for parameter in others["params"] if parameter.ndim == 5]
    assert heads
    assert all("seg_layers" in name for name in heads)
    assert (others["lr_factor"], others["weight_decay"]) == (0.1, 0)
    assert sum(len(group["params"]) for group in trainer.optimizer.param_groups) == len(names)


@pytest.mark.parametrize(
    "trainer_class", [nnUNetTrainerConResNet_SGD, nnUNetTrainerResidualMaps_SGD, nnUNetTrainerUNet3D]
)
def test_nnunets_own(make_trainer: Callable[..., Any], trainer_class: type) -> None:
    trainer = make_trainer(trainer_class)
    assert rates(trainer) == [0.01, 0.01, 0.01]
    assert type(trainer.optimizer) is torch.optim.SGD
    (group,) = trainer.optimizer.param_groups
    assert (group["momentum"], group["nesterov"], group["weight_decay"]) == (0.99, True, 3e-5)


@pytest.mark.parametrize("kind", ["labels", "ignored_regions"])
def test_network_of_the_plans(make_trainer: Callable[..., Any], kind: str) -> None:
    trainer = make_trainer(nnUNetTrainerMuon, kind)
    trainer.num_epochs = 1
    trainer.run_training()
    assert type(trainer.network).__name__ == "PlainConvUNet"
    trainer.perform_actual_validation()
    folder = Path(trainer.output_folder)
    assert (folder / "validation" / "summary.json").is_file()
    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False, use_mirroring=False)
    predictor.initialize_from_trained_model_folder(str(folder.parent), ("0",))
    patch = torch.randn(1, trainer.num_input_channels, *trainer.configuration_manager.patch_size)
    trainer.set_deep_supervision_enabled(False)
    trainer.network.eval()
    with torch.no_grad():
        torch.testing.assert_close(predictor.network.eval()(patch), trainer.network(patch))
    assert nnUNetTrainerMuon_1epoch.training_epochs == 1


@pytest.mark.parametrize(
    ("trainer_class", "optimiser_of", "expected"),
    [
        (nnUNetTrainerConResNet, nnUNetTrainer, (torch.optim.SGD, 0.01, 3e-5, 0.01)),
        (nnUNetTrainerUNet3D, MuonMixin, (Muon, 0.03, 1e-3, 0.03 * (5 / 6) ** 0.9)),
    ],
)
def test_the_optimiser_alone_decides(
    make_trainer: Callable[..., Any], trainer_class: type, optimiser_of: type, expected: Any
) -> None:
    class nnUNetTrainerOwn(trainer_class):
        configure_optimizers = optimiser_of.configure_optimizers

    trainer = make_trainer(nnUNetTrainerOwn)
    second = rates(trainer)[1]
    assert (type(trainer.optimizer), trainer.initial_lr, trainer.weight_decay) == expected[:3]
    assert second == pytest.approx(expected[3])


def test_an_optimiser_of_the_users_own(make_trainer: Callable[..., Any]) -> None:
    """It gets nnU-Net's hyper-parameters, keeps its schedule, and continues from its checkpoint."""

    class nnUNetTrainerOwn(nnUNetTrainerConResNet):
        def configure_optimizers(self) -> tuple[torch.optim.Optimizer, Any]:
            optimizer = torch.optim.SGD(self.network.parameters(), self.initial_lr, nesterov=True, momentum=0.9)
            return optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)

    trainer = make_trainer(nnUNetTrainerOwn)
    assert (trainer.initial_lr, trainer.weight_decay) == (0.01, 3e-5)
    assert rates(trainer) == [0.01, 0.01, 0.01]
    file = str(Path(trainer.output_folder) / "checkpoint_latest.pth")
    trainer.save_checkpoint(file)
    again = make_trainer(nnUNetTrainerOwn)
    again.load_checkpoint(file)
    assert again.optimizer.param_groups[0]["momentum"] == 0.9


def test_a_training_goes_on_with_muon(make_trainer: Callable[..., Any]) -> None:
    first = make_trainer(nnUNetTrainerConResNet)
    first.num_epochs = 1
    first.run_training()
    again = make_trainer(nnUNetTrainerConResNet, continue_training=True)
    again.load_checkpoint(str(Path(first.output_folder) / "checkpoint_final.pth"))
    assert isinstance(again.optimizer, Muon)
    for ours, theirs in zip(again.optimizer.state.values(), first.optimizer.state.values(), strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name])
