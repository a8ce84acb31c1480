"""Trainings whose augmentation runs on the training device, here the CPU."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.intensity.inversion import InvertImageTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_conres.augmentation.loading import DeviceBatches
from nnunet_conres.errors import InputError
from nnunet_conres.trainers import nnUNetTrainerMuon, nnUNetTrainerUNet3DPaper, nnUNetTrainerVNetPaper
from nnunet_conres.trainers.device_augmentation import DeviceAugmentationMixin, wants_device_augmentation

VARIABLE, SEED = "nnUNet_conres_device_augmentation", "nnUNet_conres_seed"
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class OnDevice(DeviceAugmentationMixin, nnUNetTrainer):
    """A user's trainer, as in the documentation."""


@pytest.fixture(autouse=True)
def _on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "1")


def log_of(trainer: Any) -> str:
    return Path(trainer.log_file).read_text()


def start(trainer: Any) -> Any:
    trainer.initialize()
    trainer.dataloader_train, trainer.dataloader_val = trainer.get_dataloaders()
    return trainer


@pytest.mark.parametrize(
    ("value", "device", "expected"),
    [(None, CUDA, True), (None, CPU, False), ("0", CUDA, False), ("1", CPU, True), ("False", CUDA, False)],
)
def test_is_on_by_default_on_cuda(
    monkeypatch: pytest.MonkeyPatch, value: str | None, device: torch.device, expected: bool
) -> None:
    if value is None:
        monkeypatch.delenv(VARIABLE)
    else:
        monkeypatch.setenv(VARIABLE, value)
    assert wants_device_augmentation(device) == expected


@pytest.mark.parametrize(("name", "value"), [(VARIABLE, "yes"), (SEED, "-1"), (SEED, "four")])
def test_unknown_settings_are_refused(
    make_trainer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=f"{name} is '{value}'; expected"):
        start(make_trainer(OnDevice))


@pytest.mark.parametrize(
    ("trainer_class", "kind"),
    [
        (OnDevice, "labels"),
        (OnDevice, "ignored_regions"),
        (nnUNetTrainerVNetPaper, "regions"),
        (nnUNetTrainerUNet3DPaper, "labels"),
    ],
)
def test_batches_have_the_form_of_nnunets(
    make_trainer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, trainer_class: type, kind: str
) -> None:
    ours = start(make_trainer(trainer_class, kind))
    monkeypatch.setenv(VARIABLE, "0")
    stock = start(make_trainer(trainer_class, kind))
    for name in ("dataloader_train", "dataloader_val"):
        mine, theirs = next(getattr(ours, name)), next(getattr(stock, name))
        assert mine.keys() == theirs.keys()
        assert (mine["data"].dtype, mine["data"].shape) == (theirs["data"].dtype, theirs["data"].shape)
        targets = [one["target"] if isinstance(one["target"], list) else [one["target"]] for one in (mine, theirs)]
        assert [(t.dtype, t.shape) for t in targets[0]] == [(t.dtype, t.shape) for t in targets[1]]


def test_training_goes_to_its_end(make_trainer: Callable[..., Any]) -> None:
    trainer = make_trainer(nnUNetTrainerMuon)
    trainer.run_training()
    assert "Augmentation runs on cpu; set nnUNet_conres_device_augmentation=0" in log_of(trainer)
    assert "can't run these transforms" not in log_of(trainer)
    assert (Path(trainer.output_folder) / "checkpoint_final.pth").is_file()
    assert len(trainer.logger.local_logger.my_fantastic_logging["train_losses"]) == 2


def test_a_training_ended_in_mid_epoch_goes_on(make_trainer: Callable[..., Any]) -> None:
    class EndedError(Exception):
        pass

    first = make_trainer(nnUNetTrainerMuon)
    first.checkpoint_interval_minutes = 0
    first.on_train_start()
    batches, given = first.dataloader_train, []
    assert isinstance(batches, DeviceBatches)

    def two_batches(source: Any) -> Any:
        if len(given) == 2:
            raise EndedError
        given.append(1)
        return DeviceBatches.__next__(source)

    first.dataloader_train = iter(lambda: two_batches(batches), None)
    first.on_train_start = lambda: None
    with pytest.raises(EndedError):
        first.run_training()
    second = make_trainer(nnUNetTrainerMuon, continue_training=True)
    second.load_checkpoint(str(Path(first.output_folder) / "checkpoint_latest.pth"))
    second.run_training()
    assert "Continuing this epoch after iteration 2 of 3" in log_of(second)


def test_a_users_transform_is_named_once(make_trainer: Callable[..., Any]) -> None:
    class Inverting(OnDevice):
        @staticmethod
        def get_training_transforms(*args: Any, **kwargs: Any) -> BasicTransform:
            pipeline = nnUNetTrainer.get_training_transforms(*args, **kwargs)
            return ComposeTransforms(
                [*pipeline.transforms[:3], InvertImageTransform(1, 1, 1), *pipeline.transforms[3:]]
            )

    trainer = start(make_trainer(Inverting))
    next(trainer.dataloader_train)
    next(trainer.dataloader_train)
    (line,) = [line for line in log_of(trainer).splitlines() if "can't run" in line]
    assert "these transforms on cpu: InvertImageTransform." in line


def test_a_trainer_with_loaders_of_its_own_keeps_them(make_trainer: Callable[..., Any]) -> None:
    class Own(nnUNetTrainer):
        def get_dataloaders(self) -> Any:
            return iter([{"data": 0}]), iter([{"data": 1}])

    class Mixed(DeviceAugmentationMixin, Own):
        pass

    trainer = start(make_trainer(Mixed))
    assert [next(loader)["data"] for loader in (trainer.dataloader_train, trainer.dataloader_val)] == [0, 1]
    assert "WARNING: Mixed overrides get_dataloaders" in log_of(trainer)


def first_batches(trainer: Any, number: int = 3) -> list[np.ndarray]:
    start(trainer)
    try:
        return [next(trainer.dataloader_train)["data"].numpy() for _ in range(number)]
    finally:
        for batches in (trainer.dataloader_train, trainer.dataloader_val):
            batches.close()


def test_a_seed_makes_batches_and_weights_repeatable(
    make_trainer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With two worker processes, each with its own random numbers."""
    monkeypatch.setenv("nnUNet_n_proc_DA", "2")
    runs = []
    for seed in ("7", "7", "8"):
        monkeypatch.setenv(SEED, seed)
        trainer = make_trainer(OnDevice)
        batches = first_batches(trainer)
        runs.append((batches, next(trainer.network.parameters()).detach().clone()))
    same, again, other = runs
    np.testing.assert_array_equal(same[0], again[0])
    assert torch.equal(same[1], again[1])
    assert not np.array_equal(same[0][0], other[0][0])
    assert not torch.equal(same[1], other[1])
    assert not np.array_equal(same[0][0], same[0][1])


def test_processes_and_ranks_draw_different_numbers(
    make_trainer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("nnUNet_n_proc_DA", "2")
    monkeypatch.setattr("nnunet_conres.trainers.device_augmentation.MultiThreadedAugmenter._start", lambda self: None)
    monkeypatch.setattr(
        "nnunet_conres.trainers.device_augmentation.NonDetMultiThreadedAugmenter._start", lambda self: None
    )
    seeds: list[int] = []
    for seed in ("", "5"):
        monkeypatch.setenv(SEED, seed)
        for rank in (0, 1):
            trainer = make_trainer(OnDevice)
            trainer.initialize()
            trainer.local_rank = rank
            for batches in trainer.get_dataloaders():
                seeds += batches.source.seeds
    assert len(set(seeds)) == len(seeds) >= 2 * 2 * 2


def test_the_thread_ends_with_the_training(make_trainer: Callable[..., Any]) -> None:
    trainer = make_trainer(OnDevice)
    trainer.on_train_start()
    for name in ("dataloader_train", "dataloader_val"):
        batches = getattr(trainer, name)
        batches._ahead = True
        next(batches)
    assert sum(thread.name == "augmentation" for thread in threading.enumerate()) == 2
    trainer.on_train_end()
    assert not any(thread.name == "augmentation" for thread in threading.enumerate())
