"""TensorBoard and MLflow beside nnU-Net's own logs, turned on by environment variables like its Weights & Biases."""

from __future__ import annotations

import math
import os
import re
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Final

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_conres.errors import InputError
from nnunet_conres.nnunet import switch_from_environment

_TIMES: Final = ("epoch_start_timestamps", "epoch_end_timestamps")


class _Tracker:
    """Base of loggers that keep numbers by epoch, with the interface that nnU-Net's MetaLogger expects.

    Attributes:
        variable: The environment variable that turns the logger on.
        package: The package that must be installed.
    """

    variable: ClassVar[str]
    package: ClassVar[str]

    def __init__(self) -> None:
        self._epoch_began = math.nan
        self._epoch = 0

    @classmethod
    def is_enabled(cls) -> bool:
        """Return whether the environment turns it on.

        Raises:
            InputError: The variable is neither on nor off, or the package is not installed.
        """
        if not switch_from_environment(cls.variable):
            return False
        if find_spec(cls.package) is None:
            raise InputError(
                f"{cls.variable} is on, but {cls.package} is not installed here. Run: pip install {cls.package}"
            )
        return True

    def update_config(self, config: dict[str, Any]) -> None:
        """Record the settings of the training; lists and dictionaries are left out."""
        for key, value in {**config, **config.get("hparas", {})}.items():
            if isinstance(value, (str, int, float, bool)):
                self._note(key, value)

    def log(self, key: str, value: Any, step: int) -> None:
        """Record a number of an epoch; nnU-Net's two timestamps become the duration of the epoch."""
        self._epoch = step
        if key == _TIMES[0]:
            self._epoch_began = value
        elif key == _TIMES[1]:
            self._keep("epoch_seconds", value - self._epoch_began, step)
        else:
            self._keep(key, float(value), step)

    def log_summary(self, key: str, value: Any) -> None:
        """Record a number of the whole training."""
        self._keep(key, float(value), self._epoch)

    def finish(self) -> None:
        """End the record. Numbers that nnU-Net's validation adds later are still recorded."""

    def _note(self, key: str, value: Any) -> None:
        raise NotImplementedError

    def _keep(self, key: str, value: float, step: int) -> None:
        raise NotImplementedError


class TensorBoardTracker(_Tracker):
    """Logger to the folder ``tensorboard`` in the output folder. View: ``tensorboard --logdir $nnUNet_results``."""

    variable = "nnUNet_tensorboard_enabled"
    package = "tensorboard"

    def __init__(self, output_folder: Path, resume: bool) -> None:
        from torch.utils.tensorboard import SummaryWriter

        super().__init__()
        folder = output_folder / "tensorboard"
        if not resume:
            shutil.rmtree(folder, ignore_errors=True)  # of an earlier training, whose curves would join these
        self._writer = SummaryWriter(str(folder))

    def _note(self, key: str, value: Any) -> None:
        self._writer.add_text(key, str(value))

    def _keep(self, key: str, value: float, step: int) -> None:
        self._writer.add_scalar(key, value, step)
        self._writer.flush()


class MLflowTracker(_Tracker):
    """Logger to MLflow's server or folder (MLFLOW_TRACKING_URI).

    The experiment is MLFLOW_EXPERIMENT_NAME, by default nnunet. A continued training continues its run.
    """

    variable = "nnUNet_mlflow_enabled"
    package = "mlflow"

    def __init__(self, output_folder: Path, resume: bool) -> None:
        from mlflow import MlflowClient

        super().__init__()
        self._client = MlflowClient()
        noted = output_folder / "mlflow_run_id.txt"
        if resume and noted.is_file():
            self._run = self._client.get_run(noted.read_text().strip()).info.run_id
            self._client.set_terminated(self._run, "RUNNING")
            return
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", "nnunet")
        found = self._client.get_experiment_by_name(experiment)
        number = self._client.create_experiment(experiment) if found is None else found.experiment_id
        name = "/".join(output_folder.parts[-3:])  # data set, model, fold
        self._run = self._client.create_run(number, run_name=name).info.run_id
        noted.write_text(self._run)

    def _note(self, key: str, value: Any) -> None:
        self._client.set_tag(self._run, key, value)

    def _keep(self, key: str, value: float, step: int) -> None:
        if math.isfinite(value):  # not every server accepts NaN and infinity
            # names of regions in nnU-Net's keys, such as (1, 2, 3), have characters that MLflow refuses
            self._client.log_metric(self._run, re.sub(r"[^\w\-. /]", "_", key), value, step=step)

    def finish(self) -> None:
        self._client.set_terminated(self._run)


TRACKERS: Final = (TensorBoardTracker, MLflowTracker)


class TrackedTrainer(nnUNetTrainer):
    """nnU-Net's trainer, which also logs to the `TRACKERS` that the environment turns on."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        enabled = [tracker for tracker in TRACKERS if tracker.is_enabled()]
        super().__init__(*args, **kwargs)
        if self.local_rank != 0:
            return
        for tracker in enabled:
            logger = tracker(Path(self.output_folder), self.logger.resume)
            logger.update_config(
                {
                    "dataset": self.plans_manager.dataset_name,
                    "trainer": type(self).__name__,
                    "plans": self.plans_manager.plans_name,
                    "configuration": self.configuration_name,
                    "fold": self.fold,
                }
            )
            self.logger.loggers.append(logger)

    def on_train_end(self) -> None:
        super().on_train_end()
        for logger in self.logger.loggers:
            if isinstance(logger, _Tracker):
                logger.finish()
