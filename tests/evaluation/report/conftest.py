"""A synthetic comparison and matching volumes."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest

from nnunet_conres.evaluation.report.cases import CaseVolumes

REGIONS = {"whole_tumor": (1, 2, 3), "tumor_core": (2, 3), "enhancing_tumor": (3,)}
METRICS: list[dict[str, Any]] = [
    {"key": "dice", "name": "Dice", "unit": "", "better": "higher", "decimals": 3, "description": "Overlap, 0 to 1."},
    {"key": "hd95", "name": "HD95", "unit": "mm", "better": "lower", "decimals": 1},
    {"key": "volume_error", "name": "Volume error", "unit": "ml", "better": "zero", "decimals": 2},
    {"key": "volume", "name": "True volume", "unit": "ml", "better": None, "decimals": 2},
]


def statistics(values: list[float]) -> dict[str, Any]:
    if not values:
        return dict.fromkeys(("mean", "median", "std", "low", "high")) | {"n": 0}
    mean, error = float(np.mean(values)), 1.96 * float(np.std(values)) / len(values) ** 0.5
    return {
        "n": len(values),
        "mean": mean,
        "median": float(np.median(values)),
        "std": float(np.std(values)),
        "low": mean - error,
        "high": mean + error,
    }


def scores(rng: np.random.Generator, skill: float) -> dict[str, dict[str, float | None]]:
    made: dict[str, dict[str, float | None]] = {}
    for number, region in enumerate(REGIONS):
        dice = float(np.clip(0.93 + skill - 0.05 * number - rng.gamma(1.5, 0.03), 0, 1))
        made[region] = {
            "dice": dice,
            "hd95": float(rng.gamma(2, 3 * (1.05 - dice) + 0.5)),
            "volume_error": float(rng.normal(0, 4 - 20 * skill)),
            "volume": float(rng.gamma(3, 20)),
        }
    made["mean"] = {key: float(np.mean([made[region][key] for region in REGIONS])) for key in made["whole_tumor"]}
    return made


def curves(rng: np.random.Generator, fold: int, residual: bool, epochs: int = 50) -> dict[str, Any]:
    t = np.arange(epochs) + fold
    falling = np.exp(-t / 12)

    def noisy(values: np.ndarray) -> list[float]:
        return (values + rng.normal(0, 0.01, epochs)).tolist()

    series = {
        "train_losses": noisy(0.1 + falling),
        "val_losses": noisy(0.15 + falling),
        "ema_fg_dice": noisy(0.85 - 0.8 * falling),
        **{f"dice {region}": noisy(0.9 - 0.05 * n - 0.8 * falling) for n, region in enumerate(REGIONS)},
    }
    if residual:
        series |= {
            "train_segmentation_losses": noisy(0.05 + 0.7 * falling),
            "train_residual_losses": noisy(0.05 + 0.3 * falling),
            "val_residual_losses": noisy(0.07 + 0.3 * falling),
        }
    return {"epochs": list(range(epochs)), "series": series}


def synthetic_comparison(
    names: tuple[str, ...] = ("nnUNetTrainer", "nnUNetTrainerConResNet"),
    number_of_cases: int = 12,
    *,
    with_ensemble: bool = False,
    with_curves: bool = True,
    number_of_disagreements: int = 3,
    number_of_metrics: int = len(METRICS),
    seed: int = 0,
) -> dict[str, Any]:
    """Return the content of report.json for models that differ a little."""
    rng = np.random.default_rng(seed)
    metrics = METRICS[:number_of_metrics]
    keys = [f"m{index}" for index in range(len(names))]
    models = [
        {
            "key": key,
            "name": name,
            "baseline": index == 0,
            "trainer": name,
            "plans": "nnUNetPlans",
            "configuration": "3d_fullres",
            "folds": [0, 1],
            "members": None,
            "cost": {
                "parameters": 31_195_000 - 9_000_000 * index,
                "conv_gflops_per_patch": 531.2 + 100 * index,
                "patch_size": [128, 128, 128],
                "batch_size": 2,
                "epoch_seconds": 62.0,
                "epochs": 50,
                "training_seconds": 3100.0,
                "peak_memory_gib": None,
                "prediction_seconds_per_case": 1.9,
                "device": "cpu",
                "precision": "bfloat16",
                "optimizer": "Muon, learning rate 0.03",
            },
            "curves": {str(fold): curves(rng, fold, index > 0) for fold in (0, 1)} if with_curves else None,
        }
        for index, (key, name) in enumerate(zip(keys, names, strict=True))
    ]
    if with_ensemble:
        cost = dict.fromkeys(models[0]["cost"])
        keys.append("m0+m1")
        models.append(
            models[0]
            | dict.fromkeys(("trainer", "plans", "configuration", "curves"))
            | {"key": "m0+m1", "name": "ensemble of both", "baseline": False, "members": ["m0", "m1"], "cost": cost}
        )
    cases = [
        {
            "id": f"case_{number}",
            "fold": number % 2,
            "scores": {key: scores(rng, 0.02 * index) for index, key in enumerate(keys)},
        }
        for number in range(1, number_of_cases + 1)
    ]
    # without enhancing tumour there is no distance
    cases[0]["scores"]["m0"]["enhancing_tumor"]["hd95"] = None
    regions = [*REGIONS, "mean"]

    def of(key: str, region: str, metric: str) -> list[float]:
        found = (case["scores"][key][region][metric] for case in cases)
        return [value for value in found if value is not None]

    comparisons = []
    for key in keys[1:]:
        for region in regions:
            for metric in metrics:
                if metric["better"] is None:
                    continue
                pairs = [(case["scores"][key][region], case["scores"]["m0"][region]) for case in cases]
                both = [(a[metric["key"]], b[metric["key"]]) for a, b in pairs if b[metric["key"]] is not None]
                if metric["better"] == "zero":
                    both = [(abs(a), abs(b)) for a, b in both]
                differences = [a - b for a, b in both]
                found = statistics(differences)
                gains = [d if metric["better"] == "higher" else -d for d in differences]
                comparisons.append(
                    {
                        "baseline": "m0",
                        "model": key,
                        "region": region,
                        "metric": metric["key"],
                        "n": found["n"],
                        "mean_difference": found["mean"],
                        "median_difference": found["median"],
                        "low": found["low"],
                        "high": found["high"],
                        "p": 0.0004 if metric["key"] == "dice" else 0.21,
                        "p_holm": 0.0016 if metric["key"] == "dice" else 0.84,
                        "effect_size": 0.61,
                        "wins": sum(gain > 0 for gain in gains),
                        "ties": sum(gain == 0 for gain in gains),
                        "losses": sum(gain < 0 for gain in gains),
                        "sentence": "",
                    }
                )
    shown = min(number_of_disagreements, number_of_cases)
    return {
        "format": 1,
        "created": "2026-11-22T23:00:00Z",
        "nnunet_conres": "0.1.0",
        "nnunetv2": "2.8.1",
        "dataset": {
            "name": "Dataset501_BraTS",
            "kind": "cross-validation",
            "folds": [0, 1],
            "number_of_cases": number_of_cases,
            "reference": "labelsTr",
        },
        "regions": list(REGIONS),
        "metrics": [dict(metric) for metric in metrics],
        "models": models,
        "summary": {
            key: {region: {m["key"]: statistics(of(key, region, m["key"])) for m in metrics} for region in regions}
            for key in keys
        },
        "comparisons": comparisons,
        "conclusions": [
            f"On {number_of_cases} cases, {name}'s mean Dice is higher than that of {names[0]} by 0.021 (95 % interval "
            "0.010 to 0.031; p = 0.002 after Holm): better."
            for name in names[1:]
        ],
        "warnings": ["The models were trained on different devices: times do not compare."],
        "cases": cases,
        "disagreements": [
            {"id": f"case_{number}", "reason": f"Dice (mean) of {names[-1]} is +0.{number}00 against {names[0]}"}
            for number in range(1, shown + 1)
        ],
    }


def synthetic_volumes(
    case_id: str = "case_1",
    keys: tuple[str, ...] = ("m0", "m1"),
    shape: tuple[int, int, int] = (24, 48, 40),
    seed: int = 0,
    channels: tuple[str, ...] = ("T1", "T1ce", "T2", "FLAIR"),
) -> CaseVolumes:
    """Return a ball on black with three nested balls inside, shifted in the predictions."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, size) for size in shape), indexing="ij"))

    def ball(centre: tuple[float, float, float], radius: float) -> np.ndarray:
        return ((grid - np.reshape(centre, (3, 1, 1, 1))) ** 2).sum(0) < radius**2

    def labels(shift: float) -> np.ndarray:
        centre = (0.1, 0.2 + shift, -0.1 + shift / 2)
        made = np.zeros(shape, np.uint8)
        for value, radius in ((1, 0.42), (2, 0.3), (3, 0.17)):
            made[ball(centre, radius + shift / 4)] = value
        return made

    head = ball((0, 0, 0), 0.9)
    reference = labels(0)
    images = []
    for number in range(len(channels)):
        image = 300 + 150 * np.sin(6 * grid[1] + number) * np.cos(5 * grid[2]) + 60 * reference * (number + 1)
        images.append(np.where(head, np.abs(image + rng.normal(0, 15, shape)) + 1, 0).astype(np.float32))
    predictions = {key: labels(0.05 * (index + 1) * (-1) ** index) for index, key in enumerate(keys)}
    return CaseVolumes(case_id, np.stack(images), channels, reference, predictions, REGIONS, (2.0, 1.0, 1.0))


@pytest.fixture(scope="session")
def make_comparison() -> Callable[..., dict[str, Any]]:
    return synthetic_comparison


@pytest.fixture(scope="session")
def make_small_comparison() -> Callable[..., dict[str, Any]]:
    """Return a function that makes comparisons with few charts, the slowest part: Dice only, and no curves."""
    return partial(synthetic_comparison, number_of_metrics=1, with_curves=False)


@pytest.fixture(scope="session")
def make_volumes() -> Callable[..., CaseVolumes]:
    return synthetic_volumes
