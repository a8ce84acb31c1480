"""Batches with voxels that are not finite, in real trainings on a CPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import nn

from nnunet_conres.errors import InputError
from nnunet_conres.trainers import nnUNetTrainerMuon, nnUNetTrainerUNet3DPaper, nnUNetTrainerVNet
from nnunet_conres.trainers.base import PluginTrainer
from nnunet_conres.trainers.nonfinite import (
    MOST_IN_A_ROW,
    MOST_WHILE_SCALING,
    SKIPPED_STEPS,
    FiniteStepsTrainer,
    _all_finite,
)
from nnunet_conres.trainers.resume import LATEST_CHECKPOINT


class PlansNetwork(nnUNetTrainerMuon):
    configure_optimizers = nnUNetTrainer.configure_optimizers


class PlansNetworkAdam(PlansNetwork):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.network.parameters(), 1e-3, weight_decay=0.1)
        return optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)


class PlansNetworkBatchNorm(PlansNetwork):
    @classmethod
    def architecture(cls, configuration: Any) -> dict[str, Any]:
        entry = super().architecture(configuration)
        entry["arch_kwargs"]["norm_op"] = "torch.nn.modules.batchnorm.BatchNorm3d"
        return entry


class Batches:
    """nnU-Net's batches. Those with the given numbers have one voxel in the first image that is not finite."""

    def __init__(self, loader: Any, broken: set[int], value: float = math.nan) -> None:
        self.loader, self.broken, self.value, self.number = loader, broken, value, -1

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        batch = next(self.loader)
        self.number += 1
        if self.number in self.broken:
            batch["data"][0, 0, 3, 3, 3] = self.value
            batch["keys"] = ["case_broken", *batch["keys"][1:]]
        return batch


@pytest.fixture
def start(make_trainer: Callable[..., Any]) -> Callable[..., Any]:
    """Function that starts the training of a trainer class, with some batches broken."""

    def start(trainer_class: type, broken: set[int], value: float = math.nan, **kwargs: Any) -> Any:
        trainer = make_trainer(trainer_class, **kwargs)
        trainer.on_train_start()
        trainer.dataloader_train = Batches(trainer.dataloader_train, broken, value)
        trainer.on_train_start = lambda: None
        return trainer

    return start


def _state(trainer: Any) -> list[torch.Tensor]:
    states = [trainer.network.state_dict(), *trainer.optimizer.state_dict()["state"].values()]
    return [value.clone() for state in states for value in state.values() if isinstance(value, torch.Tensor)]


def _step(trainer: Any) -> dict[str, Any]:
    trainer.network.train()
    outputs: dict[str, Any] = trainer.train_step(next(trainer.dataloader_train))
    return outputs


def _steps(trainer: Any, number: int) -> None:
    for _ in range(number):
        _step(trainer)


def _log_of(trainer: Any) -> str:
    return "".join(path.read_text() for path in Path(trainer.output_folder).glob("training_log*.txt"))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nnunets_own_step_is_spoilt_by_one_voxel(start: Callable[..., Any], value: float) -> None:
    """The reason for the mixin, which can be removed once nnU-Net skips such steps."""
    trainer = start(nnUNetTrainer, {0}, value)
    _step(trainer)
    assert not all(bool(tensor.isfinite().all()) for tensor in trainer.network.parameters())


@pytest.mark.parametrize(
    ("trainer_class", "value"),
    [
        (PlansNetwork, math.nan),
        (PlansNetwork, math.inf),
        (nnUNetTrainerMuon, -math.inf),
        (PlansNetworkAdam, math.nan),
        (PlansNetworkBatchNorm, math.inf),
    ],
)
def test_a_step_that_is_not_finite_changes_nothing(
    trainer_class: type, value: float, start: Callable[..., Any]
) -> None:
    trainer = start(trainer_class, {1}, value)
    assert _step(trainer)["skipped"] == 0
    before = _state(trainer)
    outputs = _step(trainer)
    assert outputs["skipped"] == 1
    assert outputs["skipped_cases"] == ["case_broken"]
    after = _state(trainer)
    if trainer_class is PlansNetworkBatchNorm:  # which also counts batches
        before, after = ([tensor for tensor in state if tensor.is_floating_point()] for state in (before, after))
    assert all(map(torch.equal, before, after))
    assert _step(trainer)["skipped"] == 0
    after = _state(trainer)
    assert not all(map(torch.equal, before, after[: len(before)]))
    assert all(bool(tensor.isfinite().all()) for tensor in after)


def test_an_epoch_counts_and_names_them(start: Callable[..., Any]) -> None:
    trainer = start(PlansNetwork, {1, 3})
    losses: list[float] = []
    step = trainer.train_step
    trainer.train_step = lambda batch: losses.append(step(batch)) or losses[-1]
    trainer.run_training()
    log = trainer.logger.local_logger.my_fantastic_logging
    assert log[SKIPPED_STEPS] == [1, 1]
    taken = [[float(out["loss"]) for out in losses[start : start + 3] if not out["skipped"]] for start in (0, 3)]
    assert [len(one) for one in taken] == [2, 2]
    np.testing.assert_allclose(log["train_losses"], [np.mean(one) for one in taken])
    text = "Skipped 1 of 3 training steps, whose loss or gradient was not finite. Cases of these batches: case_broken"
    assert _log_of(trainer).count(text) == 2


def test_a_few_in_a_row_end_the_training_and_name_the_cases(start: Callable[..., Any]) -> None:
    trainer = start(PlansNetwork, set(range(1, 99)))
    trainer.num_iterations_per_epoch = 20
    before = deepcopy(trainer.network.state_dict())
    with pytest.raises(InputError, match=f"in {MOST_IN_A_ROW} training steps in a row.*infinite: case_broken. Look"):
        trainer.run_training()
    assert trainer.dataloader_train.number == MOST_IN_A_ROW
    after = trainer.network.state_dict()
    assert all(bool(tensor.isfinite().all()) for tensor in after.values())
    assert not all(torch.equal(before[name], after[name]) for name in before)  # the first step was taken


def test_steps_that_are_not_in_a_row_do_not_end_it(start: Callable[..., Any]) -> None:
    trainer = start(PlansNetwork, {number for number in range(30) if number % MOST_IN_A_ROW})
    trainer.num_iterations_per_epoch = 30
    trainer.num_epochs = 1
    trainer.run_training()
    assert trainer.logger.local_logger.my_fantastic_logging[SKIPPED_STEPS] == [30 // MOST_IN_A_ROW * 4]


def test_a_network_that_overflows_is_not_blamed_on_the_images(start: Callable[..., Any]) -> None:
    trainer = start(PlansNetwork, set())
    loss = trainer.loss
    trainer.loss = lambda *args: loss(*args) * math.inf
    with pytest.raises(RuntimeError, match=r"The images are finite. Cases of these batches: case_\d"):
        _steps(trainer, MOST_IN_A_ROW)


def test_weights_that_are_not_finite_replace_no_checkpoint(start: Callable[..., Any]) -> None:
    trainer = start(PlansNetwork, set())
    latest = Path(trainer.output_folder, LATEST_CHECKPOINT)
    trainer.save_checkpoint(str(latest))
    before = latest.read_bytes()
    with torch.no_grad():
        next(trainer.network.parameters()).view(-1)[0] = math.nan
    with pytest.raises(RuntimeError, match=r"Weights are not finite in epoch 0 \(\S+.*latest.pth\S* was not written"):
        trainer.save_checkpoint(str(latest))
    assert latest.read_bytes() == before
    assert [path.name for path in latest.parent.glob("*.pth*")] == [LATEST_CHECKPOINT]
    with pytest.raises(RuntimeError, match="The network's weights are not finite"):
        _steps(trainer, MOST_IN_A_ROW)


def test_a_continued_epoch_counts_all_of_them(
    start: Callable[..., Any], make_trainer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("nnUNet_conres_checkpoint_minutes", "0")
    trainer = start(PlansNetwork, {0})
    trainer.on_epoch_start()
    trainer.on_train_epoch_start()
    for _ in range(2):
        _step(trainer)
    resumed = make_trainer(PlansNetwork, continue_training=True)
    resumed.load_checkpoint(str(Path(trainer.output_folder, LATEST_CHECKPOINT)))
    resumed.num_epochs = 1
    resumed.run_training()
    assert resumed.logger.local_logger.my_fantastic_logging[SKIPPED_STEPS] == [1]
    assert "Skipped 1 of 3 training steps" in _log_of(resumed)


def test_a_validation_loss_that_is_not_finite_is_named(start: Callable[..., Any]) -> None:
    trainer = start(PlansNetwork, set())
    trainer.num_epochs = 1
    trainer.dataloader_val = Batches(trainer.dataloader_val, {0})
    trainer.run_training()
    assert "The validation loss is not finite. Cases of these batches: case_broken" in _log_of(trainer)


class FakeScaler(torch.amp.GradScaler):
    """A gradient scaler that works on a CPU, with a given initial scale."""

    def __init__(self, scale: float) -> None:
        super().__init__("cpu", init_scale=scale)


def test_a_scaler_that_begins_too_high_is_given_time(start: Callable[..., Any]) -> None:
    trainer = start(PlansNetwork, set())
    trainer.grad_scaler = FakeScaler(2.0**127)
    loss = trainer.loss
    trainer.loss = lambda *args: loss(*args) * 2.0**12
    before = _state(trainer)
    skipped = 0
    while _step(trainer)["skipped"]:
        skipped += 1
        assert all(map(torch.equal, before, _state(trainer)))
    assert MOST_IN_A_ROW < skipped < MOST_WHILE_SCALING


def test_with_a_scaler_broken_batches_end_it_as_soon(start: Callable[..., Any]) -> None:
    trainer = start(PlansNetwork, set(range(99)))
    trainer.grad_scaler = FakeScaler(2.0**10)
    with pytest.raises(InputError, match="case_broken"):
        _steps(trainer, MOST_IN_A_ROW)
    assert trainer.dataloader_train.number == MOST_IN_A_ROW - 1


@pytest.mark.slow
@pytest.mark.parametrize("trainer_class", [PlansNetwork, nnUNetTrainerMuon])
def test_with_a_compiled_network(
    trainer_class: type, start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("nnUNet_compile", "t")
    monkeypatch.setattr(trainer_class, "_do_i_compile", lambda self: True)
    trainer = start(trainer_class, {1})
    assert isinstance(trainer.network, torch._dynamo.OptimizedModule)
    _step(trainer)
    before = _state(trainer)
    assert _step(trainer)["skipped"] == 1
    assert all(map(torch.equal, before, _state(trainer)))
    assert _step(trainer)["skipped"] == 0


def test_all_trainers_of_the_package_have_it() -> None:
    for trainer_class in (PluginTrainer, nnUNetTrainerVNet, nnUNetTrainerUNet3DPaper):
        assert issubclass(trainer_class, FiniteStepsTrainer)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_finite_numbers_are_told_exactly(dtype: torch.dtype) -> None:
    largest = torch.full((5, 7), torch.finfo(dtype).max, dtype=dtype)
    counts = torch.arange(3)
    assert _all_finite([largest, counts, torch.zeros(0)])
    assert _all_finite([])
    for value in (math.nan, math.inf, -math.inf):
        broken = largest.clone()
        broken[3, 2] = value
        assert not _all_finite([largest, broken])
        assert bool(broken.isfinite().all()) is False


# --- several processes ------------------------------------------------------------------------------------------------


class _Stock:
    """The attributes of a trainer that nnU-Net's step needs, without data and files."""

    def __init__(self, network: nn.Module) -> None:
        self.network, self.device, self.grad_scaler, self.is_ddp = network, torch.device("cpu"), None, True
        self.optimizer = torch.optim.SGD(network.parameters(), 0.1, 0.9)
        self.loss, self.current_epoch = nn.functional.mse_loss, 0


def _one_of_two(rank: int, port: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.manual_seed(0)
    network = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Conv3d(1, 2, 3), nn.LeakyReLU()))
    trainer: Any = FiniteStepsTrainer.__new__(FiniteStepsTrainer)
    trainer.__dict__.update(vars(_Stock(network)))
    trainer.skipped_in_a_row = []
    trainer.optimizer.register_step_pre_hook(trainer._before_step)
    results = []
    for number in range(3 + MOST_IN_A_ROW):
        data = torch.randn(1, 1, 5, 5, 5)
        if rank == 1 and (number == 1 or number >= 3):
            data[0, 0, 2, 2, 2] = math.nan
        batch = {"data": data, "target": torch.zeros(1, 2, 3, 3, 3), "keys": [f"case_{rank}"]}
        try:
            outputs = trainer.train_step(batch)
            results.append((outputs["skipped"], outputs["skipped_cases"]))
        except InputError as error:
            results.append((2, [str(error)]))
    torch.save((results, network.state_dict()), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_all_processes_decide_alike(tmp_path: Path) -> None:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_one_of_two, (port, str(tmp_path)), nprocs=2)
    (first, weights), (second, other_weights) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first == second
    assert [kind for kind, _ in first] == [0, 1, 0, *[1] * (MOST_IN_A_ROW - 1), 2]
    assert first[1][1] == ["case_1"]
    assert "infinite: case_1." in first[-1][1][0]
    for name, value in weights.items():
        assert value.isfinite().all()
        assert torch.equal(value, other_weights[name])
