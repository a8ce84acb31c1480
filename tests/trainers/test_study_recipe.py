"""The trainers of scripts/study: they train on the same batches with every network and optimiser."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[2] / "scripts" / "study"))

import forms
from recipe import trainer

STUDY = {"iterations": 6, "epochs": 2, "batch_size": 3, "seed": 1, "width": 1, "settings": {"initial_lr": 0.25}}


def initialized(make_trainer: Callable[..., Any], base: str, **study: Any) -> Any:
    made = make_trainer(trainer(base, STUDY | study))
    made.initialize()
    return made


def batches(made: Any) -> list[dict[str, Any]]:
    loader, _ = made.get_dataloaders()
    # The first batch is left out: its cases are drawn before the first sample sets the seed.
    return [next(loader) for _ in range(3)][1:]


def test_runs_see_the_same_batches(make_trainer: Callable[..., Any]) -> None:
    stock, muon, other_seed = (
        batches(initialized(make_trainer, base, **study))
        for base, study in (("nnUNetTrainer", {}), ("nnUNetTrainerMuon", {}), ("nnUNetTrainer", {"seed": 2}))
    )
    for one, two, other in zip(stock, muon, other_seed, strict=True):
        assert list(one["keys"]) == list(two["keys"])
        torch.testing.assert_close(one["data"], two["data"], rtol=0, atol=0)
        for here, there in zip(one["target"], two["target"], strict=True):
            torch.testing.assert_close(here, there, rtol=0, atol=0)
        assert not torch.equal(one["data"], other["data"])


def test_length_batch_and_settings_are_the_lists(make_trainer: Callable[..., Any]) -> None:
    made = initialized(make_trainer, "nnUNetTrainer")
    assert (made.num_epochs, made.num_iterations_per_epoch, made.batch_size) == (2, 3, 3)
    assert made.optimizer.param_groups[0]["lr"] == 0.25
    assert made.inference_allowed_mirroring_axes is None
    weights = [parameter.detach().numpy().copy() for parameter in made.network.parameters()]
    again = initialized(make_trainer, "nnUNetTrainer")
    for before, parameter in zip(weights, again.network.parameters(), strict=True):
        np.testing.assert_array_equal(before, parameter.detach().numpy())


def test_an_unknown_setting_is_an_error(make_trainer: Callable[..., Any]) -> None:
    with pytest.raises(AttributeError, match="has no attribute learning_rate to set"):
        initialized(make_trainer, "nnUNetTrainer", settings={"learning_rate": 0.1})


def test_width_is_that_of_every_stage(make_trainer: Callable[..., Any]) -> None:
    wide = initialized(make_trainer, "nnUNetTrainerResidualMaps", width=1.5)
    before = initialized(make_trainer, "nnUNetTrainerResidualMaps")
    assert wide.network.features == [round(1.5 * features) for features in before.network.features]


@pytest.mark.parametrize("name", forms.TRAINERS)
def test_forms_learn(name: str, make_trainer: Callable[..., Any]) -> None:
    made = initialized(make_trainer, name, settings={})
    loader, _ = made.get_dataloaders()
    made.set_deep_supervision_enabled(True)
    made.on_train_epoch_start()
    batch = next(loader)
    losses = [made.train_step(batch)["loss"] for _ in range(5)]
    assert losses[-1] < losses[0]
    assert set(made.loss.parts) == {"segmentation", "residual"}
    without = {name for name, parameter in made.network.named_parameters() if parameter.grad is None}
    coarsest = "decoder.seg_layers.segmentation.0"  # has no weight in nnU-Net's loss
    assert without <= {f"{coarsest}.weight", f"{coarsest}.bias"}
    made.set_deep_supervision_enabled(False)
    with torch.no_grad():
        assert made.network(batch["data"]).shape[2:] == batch["data"].shape[2:]
    assert len(made.step_seconds) == 5


def test_a_loss_that_is_not_finite_ends_a_run(make_trainer: Callable[..., Any]) -> None:
    made = initialized(make_trainer, "nnUNetTrainer")
    loader, _ = made.get_dataloaders()
    batch = next(loader)
    batch["data"][:] = torch.nan
    with pytest.raises(FloatingPointError, match="The loss is nan in epoch 0"):
        made.train_step(batch)
