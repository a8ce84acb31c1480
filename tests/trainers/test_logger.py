"""The log of loss parts, across checkpoints."""

import math
from pathlib import Path
from typing import Any

import matplotlib.image
import matplotlib.style
import numpy as np
from nnunetv2.training.logging.nnunet_logger import LocalLogger

from nnunet_conres.trainers.logger import FIGURE_NAME, LossPartsLogger, loss_parts_figure

STOCK_KEYS = (
    "mean_fg_dice",
    "ema_fg_dice",
    "dice_per_class_or_region",
    "train_losses",
    "val_losses",
    "lrs",
    "epoch_start_timestamps",
    "epoch_end_timestamps",
)
OWN_KEYS = ("train_segmentation_losses", "val_segmentation_losses", "train_residual_losses", "val_residual_losses")


def logger() -> LossPartsLogger:
    return LossPartsLogger(["segmentation", "residual"], ["whole tumor", "core"])


def fill(log: LocalLogger, epochs: int, keys: tuple[str, ...]) -> None:
    for epoch in range(epochs):
        for key in keys:
            log.log(key, [0.5, math.nan] if "dice_per" in key else 0.1 * epoch, epoch)


def test_keys_are_known_to_nnunets_logger() -> None:
    log = logger()
    fill(log, 2, STOCK_KEYS + OWN_KEYS)
    assert log.get_value("val_residual_losses", None) == [0.0, 0.1]


def test_survives_a_checkpoint() -> None:
    log, resumed = logger(), logger()
    fill(log, 3, STOCK_KEYS + OWN_KEYS)
    resumed.load_checkpoint(log.get_checkpoint())
    assert resumed.my_fantastic_logging == log.my_fantastic_logging
    assert resumed.unfinished_epoch is None


def test_missing_curves_are_padded_so_that_progress_is_still_drawn(tmp_path: Path) -> None:
    stock, resumed = LocalLogger(), logger()
    fill(stock, 3, STOCK_KEYS)
    resumed.load_checkpoint(stock.get_checkpoint())
    assert all(math.isnan(v) for v in resumed.get_value("train_residual_losses", None))
    assert min(len(v) for v in resumed.my_fantastic_logging.values()) == 3
    resumed.plot_progress_png(str(tmp_path))
    for name in ("progress.png", FIGURE_NAME):
        picture = matplotlib.image.imread(tmp_path / name)
        assert picture.std() > 0.01  # something is drawn


def test_the_figure_does_not_take_over_the_style_of_nnunets(tmp_path: Path) -> None:
    log = logger()
    fill(log, 3, STOCK_KEYS + OWN_KEYS)
    log.plot_progress_png(str(tmp_path))
    with matplotlib.style.context("default"):
        figure = loss_parts_figure(log.my_fantastic_logging, log.parts, log.region_names)
        figure.savefig(tmp_path / "alone.png", dpi=100)
    drawn, expected = (matplotlib.image.imread(tmp_path / name) for name in (FIGURE_NAME, "alone.png"))
    np.testing.assert_array_equal(drawn, expected)


def test_an_unfinished_epoch_is_kept_apart_from_the_finished_ones() -> None:
    log, resumed = logger(), logger()
    fill(log, 2, STOCK_KEYS + OWN_KEYS)
    log.log("lrs", 0.01, 2)  # the third epoch has begun
    state: dict[str, Any] = {"epoch": 2, "outputs": [{"loss": 1.0}], "seconds": 3.0}
    log.unfinished_epoch = state
    checkpoint = log.get_checkpoint()
    assert {len(v) for k, v in checkpoint.items() if k != "unfinished_epoch"} == {2}
    assert len(log.get_value("lrs", None)) == 3
    resumed.load_checkpoint(checkpoint)
    assert resumed.unfinished_epoch == state
    assert "unfinished_epoch" not in resumed.my_fantastic_logging
