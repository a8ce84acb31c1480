"""Measure the Dice of models with a missing channel: each channel in turn is set to zero in the held-out cases.

    python scripts/study/missing_channels.py -m MODEL [MODEL ...] [-f 0 1 2 3 4]

A MODEL is nnU-Net's folder DATASET/TRAINER__PLANS__CONFIGURATION. The preprocessed cases and the splits of the data set
are in $nnUNet_preprocessed. In preprocessed cases, zero is the z-score of a zero image. Predictions use no mirroring.
They are scored on the preprocessed grid by the mean Dice of all labels or regions; Dice is 1 if truth and prediction
are empty. Prints a Markdown table: the mean over cases, and the paired difference from the first model with its 95 %
interval (BCa bootstrap over patients).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from nnunet_conres.datasets.splits import group_cases
from nnunet_conres.errors import InputError
from nnunet_conres.evaluation.statistics import mean_intervals
from nnunet_conres.files import read_json, try_read_json
from nnunet_conres.nnunet import FOLDER_VARIABLES, folder_from_environment
from nnunet_conres.predictor import DEFAULT_CHECKPOINT, load_predictor, model_errors, predict_logits
from nnunet_conres.text import markdown_table

COMPLETE = "all channels"


def channel_names(models: Sequence[Path], folds: Sequence[int], checkpoint: str) -> list[str]:
    """Check the models and return the names of their channels.

    Raises:
        InputError: A model or one of its folds is missing, a model is given twice, data sets or channels differ, or
            there is only one channel.
    """
    errors = [error for model in models for error in model_errors(model, folds, checkpoint)]
    if errors:
        raise InputError(errors)
    channels = {model: list(read_json(model / "dataset.json")["channel_names"].values()) for model in models}
    for model in models[1:]:
        if model.parent.name != models[0].parent.name or channels[model] != channels[models[0]]:
            errors.append(f"{model} has another data set or other channels than {models[0]}.")
    if len(set(models)) < len(models):
        errors.append("A model is named twice; expected each once.")
    if len(channels[models[0]]) < 2:
        errors.append(f"{models[0]} has one channel only; expected two or more, of which one can be absent.")
    if errors:
        raise InputError(errors)
    return channels[models[0]]


def score(model: Path, folds: Sequence[int], checkpoint: str, device: str) -> dict[str, list[float]]:
    """Predict the cases that the folds held out, and return their Dice.

    Args:
        model: The model's folder.
        folds: Folds; each predicts the cases that it held out.
        checkpoint: Name of the checkpoint file in a fold's folder.
        device: cuda, cpu or mps.

    Returns:
        By case: the mean Dice of all labels or regions with all channels, and then without each channel in turn.

    Raises:
        InputError: The model cannot be loaded, or the data set is missing.
    """
    import torch
    from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class

    root = folder_from_environment(FOLDER_VARIABLES[1])
    if root is None:
        raise InputError("The environment variable nnUNet_preprocessed is not set.")
    path = root / model.parent.name / "splits_final.json"
    splits = try_read_json(path) or []
    missing = [fold for fold in folds if fold >= len(splits)]
    if missing:
        raise InputError(
            f"{path} lacks fold {', '.join(map(str, missing))}; expected the splits that {model.name} was trained on."
        )
    scores: dict[str, list[float]] = {}
    for fold in folds:
        predictor = load_predictor(model, [fold], checkpoint, device=device, mirroring=False, progress=False)
        labels = predictor.plans_manager.get_label_manager(predictor.dataset_json)
        regions = labels.foreground_regions if labels.has_regions else labels.foreground_labels
        folder = str(path.parent / predictor.configuration_manager.data_identifier)
        cases = infer_dataset_class(folder)(folder, splits[fold]["val"])
        for case in tqdm(cases.identifiers, f"{model.name}, fold {fold}", disable=None):
            data, truth, *_ = cases.load_case(case)
            data, truth = np.array(data[:]), np.array(truth[:])[0]
            scores[case] = []
            for absent in (None, *range(len(data))):
                image = torch.from_numpy(data.copy())
                if absent is not None:
                    image[absent] = 0
                logits = predict_logits(predictor, image, case)
                predicted = np.asarray(labels.convert_logits_to_segmentation(logits))
                scores[case].append(mean_dice(truth, predicted, regions))
    return scores


def mean_dice(truth: np.ndarray, predicted: np.ndarray, regions: Sequence[int | Sequence[int]]) -> float:
    """Return the mean Dice of labels or regions; 1 for a label or region that is absent from both arrays."""
    values = []
    for region in regions:
        one, other = (np.isin(array, region) for array in (truth, predicted))
        total = int(one.sum()) + int(other.sum())
        values.append(2 * int((one & other).sum()) / total if total else 1.0)
    return float(np.mean(values))


def table(names: Sequence[str], channels: Sequence[str], scores: Sequence[Mapping[str, Sequence[float]]]) -> str:
    """Format the scores as a Markdown table.

    Args:
        names: Names of the models; the first is the reference.
        channels: Names of the channels.
        scores: Result of `score` for each model.
    """
    cases = list(scores[0])
    groups, _ = group_cases(cases)
    rows = []
    for number, row in enumerate((COMPLETE, *(f"without {channel}" for channel in channels))):
        values = [np.array([of_model[case][number] for case in cases]) for of_model in scores]
        cells = [f"{values[0].mean():.3f}"]
        for others in values[1:]:
            difference = others - values[0]
            (interval,) = mean_intervals([difference], [[groups[case] for case in cases]])
            cells += [
                f"{others.mean():.3f}",
                f"{difference.mean():+.3f} ({interval.low:+.3f} to {interval.high:+.3f})",
            ]
        rows.append([row, *cells])
    head = [f"Dice, {len(cases)} cases", names[0]]
    for name in names[1:]:
        head += [name, "difference (95 %)"]
    return markdown_table(head, rows)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "-m", metavar="MODEL", type=Path, nargs="+", required=True, help="model folders; the first is the reference"
    )
    parser.add_argument("-f", metavar="FOLD", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="(default: 0 1 2 3 4)")
    parser.add_argument("-chk", metavar="FILE", default=DEFAULT_CHECKPOINT, help="(default: %(default)s)")
    parser.add_argument("-device", choices=("cuda", "cpu", "mps"), default="cuda", help="(default: %(default)s)")
    parsed = parser.parse_args(arguments)
    models = [Path(os.path.abspath(model)) for model in parsed.m]
    try:
        channels = channel_names(models, parsed.f, parsed.chk)
        scores = [score(model, parsed.f, parsed.chk, parsed.device) for model in models]
    except InputError as error:
        sys.exit(f"error: {error}")
    names = [model.name.partition("__")[0] for model in models]
    if len(set(names)) < len(names):
        names = [model.name for model in models]
    print(table(names, channels, scores))


if __name__ == "__main__":
    main()
