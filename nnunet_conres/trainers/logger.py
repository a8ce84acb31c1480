"""nnU-Net's training log with the parts of the objective and the names of classes, and a figure of both."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator
from nnunetv2.training.logging.nnunet_logger import LocalLogger
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import distributed

from nnunet_conres.colours import colours_of
from nnunet_conres.files import written_whole

FIGURE_NAME = "progress_conres.png"


def loss_part_key(phase: str, part: str) -> str:
    """Return the name under which a part of the objective is logged; ``phase`` is "train" or "val"."""
    return f"{phase}_{part}_losses"


class LossPartsLogger(LocalLogger):
    """Logger of one value per epoch of every part of the objective, separately for training and validation.

    Args:
        parts: Names of the parts of the objective.
        region_names: Names of the foreground classes or regions, in the order of the logged Dice.
        verbose: As in nnU-Net's logger.

    Attributes:
        unfinished_epoch: State of an epoch that is not finished, saved with the next checkpoint and restored from a
            loaded one; None between epochs.
    """

    def __init__(self, parts: Sequence[str], region_names: Sequence[str], verbose: bool = False) -> None:
        super().__init__(verbose)
        self.parts = list(parts)
        self.region_names = list(region_names)
        self.unfinished_epoch: dict[str, Any] | None = None
        for key in self._own_keys():
            self.my_fantastic_logging[key] = []

    def _own_keys(self) -> list[str]:
        return [loss_part_key(phase, part) for part in self.parts for phase in ("train", "val")]

    def get_checkpoint(self) -> dict[str, Any]:
        """Return the log for a checkpoint: finished epochs, and separately the state of an unfinished one."""
        if self.unfinished_epoch is None:
            return super().get_checkpoint()
        finished = self.unfinished_epoch["epoch"]
        lists = {key: values[:finished] for key, values in self.my_fantastic_logging.items()}
        return lists | {"unfinished_epoch": self.unfinished_epoch}

    def load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Load a log. If it lacks our keys (from a stock trainer or an older version), pad them with NaN."""
        checkpoint = dict(checkpoint)
        self.unfinished_epoch = checkpoint.pop("unfinished_epoch", None)
        super().load_checkpoint(checkpoint)
        epochs = len(checkpoint["train_losses"])
        for key in self._own_keys():
            values = self.my_fantastic_logging.setdefault(key, [])
            # nnU-Net draws only as many epochs as the shortest list has: missing values would empty progress.png.
            self.my_fantastic_logging[key] = [math.nan] * (epochs - len(values)) + values

    def plot_progress_png(self, output_folder: str) -> None:
        """Draw nnU-Net's progress.png, and progress_conres.png beside it."""
        super().plot_progress_png(output_folder)
        if self.parts:
            # nnU-Net's figure changes matplotlib's settings for the whole process, to a font four times as large.
            with matplotlib.style.context("default"):
                figure = loss_parts_figure(self.my_fantastic_logging, self.parts, self.region_names)
                with written_whole(Path(output_folder, FIGURE_NAME)) as partial:
                    figure.savefig(partial, dpi=100)


def loss_parts_figure(logging: dict[str, list[Any]], parts: Sequence[str], region_names: Sequence[str]) -> Figure:
    """Draw curves of the parts of the objective, in training and validation, and of the Dice per class or region.

    Args:
        logging: Lists with one entry per epoch, as in nnU-Net's logger.
        parts: Names of the parts of the objective; one panel each.
        region_names: Names of the entries of ``dice_per_class_or_region``, which are in the last panel.

    Returns:
        The figure.
    """
    figure = Figure(figsize=(9, 3.2 * (len(parts) + 1)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(parts) + 1, 1, sharex=True, squeeze=False)[:, 0]
    for axis, part in zip(axes, parts, strict=False):
        for phase, colour, style in (("train", "#0072B2", "-"), ("val", "#D55E00", "--")):
            values = logging[loss_part_key(phase, part)]
            axis.plot(values, style, color=colour, marker="o", markersize=4, label=f"{phase} {part} loss")
        axis.set_ylabel(f"{part} loss")
    dice = np.asarray(logging["dice_per_class_or_region"], dtype=float)
    number = dice.shape[1] if dice.ndim == 2 else 0
    names = [region_names[index] if index < len(region_names) else f"class {index + 1}" for index in range(number)]
    for index, (name, colour) in enumerate(colours_of(names).items()):
        # Pale colours are meant for a black background, and need an edge on white.
        edge = [withStroke(linewidth=3, foreground="#555555")]
        axes[-1].plot(dice[:, index], color=colour, marker="o", markersize=4, label=name, path_effects=edge)
    axes[-1].set(ylabel="pseudo Dice", xlabel="epoch", ylim=(0, 1))
    axes[-1].set_xlim(-0.5, max(len(dice), 1) - 0.5)  # a single epoch has no extent
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    for axis in axes:
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize="small")
    return figure


class LossPartsTrainer(nnUNetTrainer):
    """nnU-Net's trainer, which also logs the parts of the objective, the Dice by name, and the peak of GPU memory.

    Attributes:
        loss_parts: Names of the parts of the objective that are logged separately.
    """

    loss_parts: tuple[str, ...] = ()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        verbose = self.logger.local_logger.verbose
        self.logger.local_logger = LossPartsLogger(self.loss_parts, self.region_names, verbose=verbose)

    @property
    def region_names(self) -> list[str]:
        """Names of the foreground classes or regions, in the order of nnU-Net's Dice."""
        labels = self.label_manager
        wanted = labels.foreground_regions if labels.has_regions else labels.foreground_labels

        def key(value: Any) -> tuple[int, ...]:
            return tuple(value) if isinstance(value, (list, tuple)) else (int(value),)

        names = {key(value): name for name, value in self.dataset_json["labels"].items()}
        return [names.get(key(value), str(value)) for value in wanted]

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        return super().train_step(batch) | self._loss_part_values()

    def validation_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        return super().validation_step(batch) | self._loss_part_values()

    def _loss_part_values(self) -> dict[str, np.ndarray]:
        parts = getattr(self.loss, "parts", {})  # a user's trainer may have another loss
        undefined = torch.tensor(math.nan)
        return {f"{name}_loss": parts.get(name, undefined).float().cpu().numpy() for name in self.loss_parts}

    def on_train_epoch_end(self, train_outputs: list[dict[str, Any]]) -> None:
        super().on_train_epoch_end(train_outputs)
        self._log_loss_parts("train", train_outputs)

    def on_validation_epoch_end(self, val_outputs: list[dict[str, Any]]) -> None:
        super().on_validation_epoch_end(val_outputs)
        self._log_loss_parts("val", val_outputs)

    def _log_loss_parts(self, phase: str, outputs: Sequence[dict[str, Any]]) -> None:
        for part in self.loss_parts:
            values = [float(output[f"{part}_loss"]) for output in outputs]
            if self.is_ddp:
                gathered: list[list[float]] = [[] for _ in range(distributed.get_world_size())]
                distributed.all_gather_object(gathered, values)
                values = [value for one in gathered for value in one]
            # NaN marks batches in which the part was not defined; steps with infinite values were skipped.
            defined = [value for value in values if math.isfinite(value)]
            mean = float(np.mean(defined)) if defined else math.nan
            self.logger.log(loss_part_key(phase, part), mean, self.current_epoch)

    def on_epoch_end(self) -> None:
        for part in self.loss_parts:
            train, val = (self.logger.get_value(loss_part_key(phase, part), step=-1) for phase in ("train", "val"))
            self.print_to_log_file(f"{part} loss: train {train:.4f}, val {val:.4f}")
        dice = self.logger.get_value("dice_per_class_or_region", step=-1)
        named = ", ".join(f"{name} {value:.4f}" for name, value in zip(self.region_names, dice, strict=True))
        self.print_to_log_file(f"Pseudo Dice by name: {named}")
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device) / 2**30
            self.print_to_log_file(f"Peak GPU memory: {peak:.2f} GiB")
        super().on_epoch_end()
