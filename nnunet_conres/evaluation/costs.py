"""Cost of a model, from its plans and from the logs of its trainings."""

from __future__ import annotations

import re
import statistics
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from nnunet_conres.errors import InputError
from nnunet_conres.evaluation.cache import Cache, key_of, state_of
from nnunet_conres.evaluation.predictions import Contender
from nnunet_conres.families import find_trainer
from nnunet_conres.files import read_json
from nnunet_conres.nnunet import CHECKPOINTS, Model, architecture_errors, resolved_configuration
from nnunet_conres.text import short_message
from nnunet_conres.unpickling import read_checkpoint

# Trainers of this package also record this attribute, which nnU-Net writes into debug.json, and two log lines.
_PRECISION_ATTRIBUTE: Final = "training_precision"
# Conditions that the folds of a model should share: attributes of Cost, and their plurals for messages.
_CONDITIONS: Final = {"device": "devices", "precision": "precisions", "optimizer": "optimisers"}
_CPU_SHARE_LINE: Final = re.compile(r"Share of the CPU cores used: ([\d.]+)")
# A larger difference means that the machine was loaded differently during the trainings.
_MOST_SHARE_DIFFERENCE: Final = 0.1
# Below this share, other work had most of the cores, and its amount determined the times.
_LEAST_SHARE: Final = 0.5
_PEAK_MEMORY_LINE: Final = re.compile(r"Peak GPU memory: ([\d.]+) GiB")

_TIMED_LINE: Final = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d+): (.*)")
_GIGA: Final = 1e9


@dataclass(frozen=True)
class Cost:
    """Cost of a model. Unknown values are None.

    Attributes:
        parameters: Trainable parameters of the network.
        conv_gflops_per_patch: Floating point operations, in 1e9, of all convolutions in the forward pass of one patch,
            as in prediction; a multiplication and an addition count as two.
        patch_size: In voxels.
        batch_size: Patches per step.
        epochs: Epochs trained; the minimum over the folds.
        epoch_seconds: Median over epochs and folds.
        training_seconds: Sum over the epochs, mean over folds, without the final validation.
        peak_memory_gib: Largest value logged.
        prediction_seconds_per_case: Median over the cases of the final validation: sliding window with mirroring on
            preprocessed data.
        device: Device of the training.
        precision: Precision of the training steps.
        optimizer: Name of the optimiser and its initial learning rate.
        cpu_share: For a training on a CPU, the share of the cores' time that it got, 0 to 1; median over epochs and
            folds.
    """

    parameters: int | None = None
    conv_gflops_per_patch: float | None = None
    patch_size: tuple[int, ...] | None = None
    batch_size: int | None = None
    epochs: int | None = None
    epoch_seconds: float | None = None
    training_seconds: float | None = None
    peak_memory_gib: float | None = None
    prediction_seconds_per_case: float | None = None
    device: str | None = None
    precision: str | None = None
    optimizer: str | None = None
    cpu_share: float | None = None


Curves = dict[str, dict[str, Any]]
"""By fold: {"epochs": [0, 1, ...], "series": {name: values}}."""


@dataclass(frozen=True)
class Costs:
    """Costs and training curves of several models.

    Attributes:
        costs: By model key.
        curves: By model key; empty for an ensemble.
        warnings: Values that could not be determined, and differences between the trainings.
    """

    costs: Mapping[str, Cost]
    curves: Mapping[str, Curves]
    warnings: tuple[str, ...]


def costs_of(models: Sequence[Contender], cache_folder: Path | None = None) -> Costs:
    """Collect costs and training curves of models; an ensemble costs the sum of its members.

    Args:
        models: Members precede their ensembles.
        cache_folder: Where to cache parameters and operations of networks.
    """
    costs: dict[str, Cost] = {}
    curves: dict[str, Curves] = {}
    notes: list[str] = []
    for model in models:
        if model.members:
            costs[model.key], curves[model.key] = ensemble_cost([costs[key] for key in model.members]), {}
        else:
            costs[model.key], curves[model.key], found = model_cost(model, cache_folder)
            notes += found
    notes += unlike_conditions({model.name: costs[model.key] for model in models if not model.members})
    return Costs(costs, curves, tuple(notes))


def model_cost(model: Contender, cache_folder: Path | None = None) -> tuple[Cost, Curves, list[str]]:
    """Collect costs and training curves of a trained model.

    Args:
        model: The model. Its cost is unknown if the folder or the nnU-Net name is unknown.
        cache_folder: Where to cache parameters and operations of networks.

    Returns:
        The cost, the curves, and warnings about values that could not be determined.
    """
    if model.folder is None or model.model is None:
        return Cost(), {}, []
    notes: list[str] = []
    known = _network_cost(model.folder, model.model, model.name, notes, Cache(cache_folder))
    curves: Curves = {}
    durations: dict[int | str, list[float]] = {}
    predicting: list[float] = []
    peaks: list[float] = []
    shares: list[float] = []
    conditions: dict[str, set[str]] = {name: set() for name in _CONDITIONS}
    for fold in model.folds:
        folder = model.folder / f"fold_{fold}"
        logged, reasons = _logged(folder)
        if logged is None:
            notes.append(
                " ".join([f"{model.name}, fold {fold}: no readable checkpoint, so no training curves.", *reasons])
            )
        else:
            curves[str(fold)] = _curves(logged, _region_names(model.folder))
            starts, ends = logged.get("epoch_start_timestamps", []), logged.get("epoch_end_timestamps", [])
            durations[fold] = [end - start for start, end in zip(starts, ends, strict=False)]
        lines = _log_lines(folder)
        predicting += _prediction_seconds(lines)
        peaks += [float(found[1]) for _, line in lines if (found := _PEAK_MEMORY_LINE.match(line))]
        shares += [float(found[1]) for _, line in lines if (found := _CPU_SHARE_LINE.match(line))]
        for name, value in _training_conditions(folder).items():
            conditions[name].add(value)
    for name, what in _CONDITIONS.items():
        if len(values := conditions[name]) > 1:
            notes.append(f"{model.name}: folds were trained on different {what}: {', '.join(sorted(values))}.")
    known |= {name: ", ".join(sorted(values)) or None for name, values in conditions.items()}
    every_epoch = [seconds for of_fold in durations.values() for seconds in of_fold]
    return (
        Cost(
            **known,
            epochs=min((len(of_fold) for of_fold in durations.values()), default=None),
            epoch_seconds=statistics.median(every_epoch) if every_epoch else None,
            training_seconds=statistics.mean(map(sum, durations.values())) if every_epoch else None,
            peak_memory_gib=max(peaks, default=None),
            prediction_seconds_per_case=statistics.median(predicting) if predicting else None,
            cpu_share=statistics.median(shares) if shares else None,
        ),
        curves,
        notes,
    )


def ensemble_cost(members: Sequence[Cost]) -> Cost:
    """Return the sum of the members' costs; a value is None if that of a member is unknown."""

    def total(values: Sequence[float | None]) -> Any:
        return None if any(value is None for value in values) else sum(value for value in values if value is not None)

    return Cost(
        parameters=total([member.parameters for member in members]),
        training_seconds=total([member.training_seconds for member in members]),
        prediction_seconds_per_case=total([member.prediction_seconds_per_case for member in members]),
    )


def unlike_conditions(costs: Mapping[str, Cost]) -> list[str]:
    """Return warnings about training conditions that differ between models.

    Args:
        costs: By model name.
    """
    warned = []
    for attribute, what in (
        ("optimizer", "optimiser"),
        ("precision", "precision"),
        ("device", "device"),
        ("epochs", "number of epochs"),
        ("batch_size", "batch size"),
        ("patch_size", "patch size"),
    ):
        values = {name: getattr(cost, attribute) for name, cost in costs.items()}
        known = {name: value for name, value in values.items() if value is not None}
        if len(set(known.values())) > 1:
            listed = "; ".join(f"{name}: {_readable(value)}" for name, value in known.items())
            warned.append(f"The models differ in their {what}, which may matter as much as the network: {listed}.")
    if not _loads_are_alike([cost.cpu_share for cost in costs.values()]):
        listed = "; ".join(
            f"{name}: {cost.cpu_share:.2f}" for name, cost in costs.items() if cost.cpu_share is not None
        )
        warned.append(
            f"The machine was busy with other work during some trainings, so their times are not comparable. Share of "
            f"the CPU cores used: {listed}."
        )
    return warned


def times_compare(costs: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether training times are comparable: same device, same precision, machine not busy with other work.

    Args:
        costs: Costs of the models, as in report.json; unknown values count as equal.
    """
    known = [{cost.get(key) for cost in costs} - {None} for key in ("device", "precision")]
    return all(len(values) < 2 for values in known) and _loads_are_alike([cost.get("cpu_share") for cost in costs])


def _loads_are_alike(shares: Sequence[float | None]) -> bool:
    known = [share for share in shares if share is not None]
    return not known or (max(known) - min(known) <= _MOST_SHARE_DIFFERENCE and min(known) >= _LEAST_SHARE)


def _readable(value: Any) -> str:
    return " x ".join(map(str, value)) if isinstance(value, tuple) else str(value)


# --- network ----------------------------------------------------------------------------------------------------------


def _network_cost(folder: Path, model: Model, name: str, notes: list[str], cache: Cache) -> dict[str, Any]:
    """Return parameters, operations, patch size and batch size, from the plans that the model was trained with."""
    known: dict[str, Any] = {}
    try:
        plans, dataset_json = read_json(folder / "plans.json"), read_json(folder / "dataset.json")
        configuration = resolved_configuration(plans, model.configuration)
        known["patch_size"] = tuple(int(extent) for extent in configuration["patch_size"])
        known["batch_size"] = int(configuration["batch_size"])
        # After retraining, another network may have the same name.
        trained = [state_of(path) for path in sorted(folder.glob("fold_*/checkpoint_*.pth"))]
        key = key_of(version("nnunetv2"), version("torch"), asdict(model), plans, dataset_json, trained)
        known |= cache.kept(key, partial(_count, folder, plans, dataset_json, model))
    except Exception as error:  # other people's trainers and networks fail in their own ways
        notes.append(f"{name}: parameters and operations are not known: {short_message(error)}.")
    return known


def _count(folder: Path, plans_json: dict[str, Any], dataset_json: dict[str, Any], model: Model) -> dict[str, Any]:
    """Count parameters and operations per patch by running the network on PyTorch's meta device, without data.

    Raises:
        InputError: The plans name something as a network or layer that is none; building the network would call it.
    """
    if errors := architecture_errors(folder / "plans.json"):
        raise InputError(errors[0])
    import torch
    from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
    from torch.utils.flop_counter import FlopCounterMode

    plans = PlansManager(plans_json)
    configuration = plans.get_configuration(model.configuration)
    channels = determine_num_input_channels(plans, configuration, dataset_json)
    trainer = find_trainer(model.trainer)
    with warnings.catch_warnings(), torch.device("meta"), torch.no_grad():
        warnings.simplefilter("ignore")
        network = trainer.build_network_architecture(
            plans, configuration, channels, plans.get_label_manager(dataset_json).num_segmentation_heads, False
        ).eval()
        counter = FlopCounterMode(display=False)
        with counter:
            network(torch.empty(1, channels, *configuration.patch_size))
    operations = counter.get_flop_counts()["Global"]
    convolutions = sum(count for operation, count in operations.items() if "convolution" in str(operation))
    return {
        "parameters": sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad),
        "conv_gflops_per_patch": convolutions / _GIGA,
    }


# --- logs -------------------------------------------------------------------------------------------------------------


def _logged(fold_folder: Path) -> tuple[dict[str, list[Any]] | None, list[str]]:
    """Read nnU-Net's log, one value per epoch, from the first checkpoint that has a readable one.

    Returns:
        The log, None if no checkpoint has one; and the reason for every checkpoint that was tried in vain.
    """
    reasons: list[str] = []
    for name in CHECKPOINTS:
        if (fold_folder / name).is_file():
            try:
                return dict(read_checkpoint(fold_folder / name)["logging"]), reasons
            except InputError as error:  # the next one may be readable
                reasons.append(str(error))
            except (KeyError, TypeError, ValueError):
                reasons.append(f"{fold_folder / name} contains no training log of nnU-Net.")
    return None, reasons


def _curves(logged: Mapping[str, list[Any]], regions: Sequence[str]) -> dict[str, Any]:
    series: dict[str, list[float]] = {}
    for key, values in logged.items():
        if key in ("lrs", "epoch_start_timestamps", "epoch_end_timestamps") or not isinstance(values, list):
            continue
        if key == "dice_per_class_or_region":
            per_region = list(zip(*values, strict=False)) if values else []
            for number, of_region in enumerate(per_region):
                name = regions[number] if number < len(regions) else str(number + 1)
                series[f"dice {name}"] = [float(value) for value in of_region]
        elif all(isinstance(value, (int, float)) or hasattr(value, "__float__") for value in values):
            series[key] = [float(value) for value in values]
    epochs = max((len(values) for values in series.values()), default=0)
    return {"epochs": list(range(epochs)), "series": series}


def _region_names(folder: Path) -> list[str]:
    """Return the names of labels or regions in the order in which nnU-Net logs their Dice."""
    labels = read_json(folder / "dataset.json")["labels"]
    names = [name for name in labels if name not in ("background", "ignore")]
    if any(isinstance(labels[name], list) for name in names):
        return names
    # The network's channels are sorted by label, whatever the order in the file.
    return sorted(names, key=lambda name: int(labels[name]))


def _log_lines(fold_folder: Path) -> list[tuple[datetime, str]]:
    """Return all log lines of a fold's trainings with their times, the oldest file first."""
    lines = []
    for path in sorted(fold_folder.glob("training_log_*.txt"), key=lambda path: path.stat().st_mtime):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            found = _TIMED_LINE.match(line)
            if found is not None:
                lines.append((datetime.fromisoformat(found[1]), found[2].strip()))
    return lines


def _prediction_seconds(lines: Sequence[tuple[datetime, str]]) -> list[float]:
    """Return the seconds from the start of each case of a validation to the start of the next case.

    The last case is left out: the lines after it do not mark the end of a prediction.
    """
    seconds = []
    for (began, line), (ended, following) in zip(lines, lines[2:], strict=False):
        # "predicting CASE", then a line with its shape, then the next case
        if line.startswith("predicting ") and following.startswith("predicting "):
            seconds.append((ended - began).total_seconds())
    return seconds


def _training_conditions(fold_folder: Path) -> dict[str, str]:
    """Read the known `_CONDITIONS` of a fold from its debug.json, which nnU-Net writes at each start of a training."""
    try:
        debug = read_json(fold_folder / "debug.json")
    except InputError:
        return {}
    kind = str(debug.get("device", "")).split(":")[0]
    # nnU-Net's own training steps are in mixed precision on CUDA and in single precision elsewhere.
    stock = "float16 mixed" if kind == "cuda" else "float32"
    device = f"{kind} ({debug['gpu_name']})" if kind == "cuda" and "gpu_name" in debug else kind
    precision = str(debug.get(_PRECISION_ATTRIBUTE, stock)) if kind else None
    found = {"device": device, "precision": precision, "optimizer": _optimizer(str(debug.get("optimizer", "")))}
    return {name: value for name, value in found.items() if value}


def _optimizer(text: str) -> str | None:
    """Return name and initial learning rate of an optimiser from its text form in PyTorch."""
    name = re.match(r"(\w+) \(", text)
    if name is None:
        return None
    rate = re.search(r"\binitial_lr: ([\d.e+-]+)", text)
    return name[1] if rate is None else f"{name[1]}, learning rate {float(rate[1]):g}"
