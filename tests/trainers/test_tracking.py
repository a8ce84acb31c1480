"""TensorBoard and MLflow, read back with their own readers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nnunet_conres.errors import InputError
from nnunet_conres.trainers import nnUNetTrainerConResNet, nnUNetTrainerVNet
from nnunet_conres.trainers.tracking import TRACKERS, MLflowTracker, TensorBoardTracker


@pytest.fixture(autouse=True)
def _off(monkeypatch: pytest.MonkeyPatch) -> None:
    for tracker in TRACKERS:
        monkeypatch.delenv(tracker.variable, raising=False)


def test_are_off_by_default(make_trainer: Callable[..., Any]) -> None:
    assert make_trainer(nnUNetTrainerVNet).logger.loggers == []


@pytest.mark.usefixtures("nothing_is_written")
@pytest.mark.parametrize("tracker", TRACKERS)
class TestRefusals:
    def test_a_package_that_is_not_installed(
        self, make_trainer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tracker: Any
    ) -> None:
        monkeypatch.setattr("nnunet_conres.trainers.tracking.find_spec", lambda name: None)
        monkeypatch.setenv(tracker.variable, "1")
        with pytest.raises(InputError, match=f"pip install {tracker.package}"):
            make_trainer(nnUNetTrainerVNet)

    def test_another_value(
        self, make_trainer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tracker: Any
    ) -> None:
        monkeypatch.setenv(tracker.variable, "yes")
        with pytest.raises(InputError, match=f"{tracker.variable} is 'yes'; expected 1"):
            make_trainer(nnUNetTrainerVNet)


def test_tensorboard_has_every_epoch(make_trainer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv(TensorBoardTracker.variable, "1")
    trainer = make_trainer(nnUNetTrainerConResNet)
    trainer.run_training()
    trainer.logger.log_summary("final_val/foreground_dice", 0.5)

    events = reader.EventAccumulator(str(Path(trainer.output_folder) / "tensorboard"))
    events.Reload()
    for key in ("train_losses", "val_losses", "train_residual_losses", "mean_fg_dice"):
        expected = trainer.logger.get_value(key, step=None)
        assert [(event.step, event.value) for event in events.Scalars(key)] == [
            (step, pytest.approx(value, rel=1e-6)) for step, value in enumerate(expected)
        ]
    assert len(events.Scalars("epoch_seconds")) == 2
    assert [event.value for event in events.Scalars("final_val/foreground_dice")] == [0.5]
    assert "fold/text_summary" in events.Tags()["tensors"]


def test_mlflow_has_every_epoch_in_one_run(
    make_trainer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv(MLflowTracker.variable, "1")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    trainer = make_trainer(nnUNetTrainerConResNet)
    trainer.run_training()
    make_trainer(nnUNetTrainerConResNet, continue_training=True).logger.log_summary("final_val/class_(1, 2)_dice", 0.5)

    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("nnunet")
    (run,) = client.search_runs([experiment.experiment_id])
    history = client.get_metric_history(run.info.run_id, "train_losses")
    expected = trainer.logger.get_value("train_losses", step=None)
    assert [(metric.step, metric.value) for metric in history] == [
        (step, pytest.approx(value)) for step, value in enumerate(expected)
    ]
    assert run.data.metrics["final_val/class__1_ 2__dice"] == 0.5
    assert run.data.tags["trainer"] == "nnUNetTrainerConResNet"
