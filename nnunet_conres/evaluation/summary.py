"""nnU-Net's summary.json as a table with the data set's names of labels and regions."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

from nnunet_conres.errors import InputError, file_errors
from nnunet_conres.files import without_nan
from nnunet_conres.text import aligned

Key = int | tuple[int, ...]


@dataclass(frozen=True)
class Score:
    """Scores of one label or region, for one case or averaged over cases as in nnU-Net.

    Attributes:
        dice: 0 to 1; NaN if neither reference nor prediction has a voxel of the label or region.
        iou: 0 to 1 or NaN, as `dice`.
        false_positives: Voxels predicted but not in the reference.
        false_negatives: Voxels in the reference but not predicted.
    """

    dice: float
    iou: float
    false_positives: float
    false_negatives: float

    def as_json(self) -> dict[str, float | None]:
        """Return the scores for JSON, with None in place of NaN."""
        scores = {"Dice": self.dice, "IoU": self.iou, "FP": self.false_positives, "FN": self.false_negatives}
        return dict(without_nan(scores))


@dataclass(frozen=True)
class Summary:
    """Results of nnU-Net's evaluation.

    Attributes:
        source: The file that they were read from.
        mean: Score of every label or region by name, averaged over the cases in which it is not NaN.
        foreground: Mean over the labels or regions of `mean`.
        cases: Scores by name for every case.
        scored: By name, the number of cases whose Dice is not NaN, which are those in the mean Dice.
    """

    source: Path
    mean: Mapping[str, Score]
    foreground: Score
    cases: Mapping[str, Mapping[str, Score]]
    scored: Mapping[str, int]

    def as_json(self) -> dict[str, Any]:
        """Return the summary for JSON, with None in place of NaN."""
        return {
            "source": str(self.source),
            "number_of_cases": len(self.cases),
            "foreground_mean": self.foreground.as_json(),
            "mean": {name: {**score.as_json(), "cases": self.scored[name]} for name, score in self.mean.items()},
            "cases": {
                case: {name: score.as_json() for name, score in scores.items()} for case, scores in self.cases.items()
            },
        }


def read_summary(summary_file: str | Path, dataset_json: str | Path | None = None) -> Summary:
    """Read nnU-Net's summary.json.

    Args:
        summary_file: Output of nnUNetv2_evaluate_folder or of a training's validation.
        dataset_json: The data set's dataset.json, for the names. By default the one next to the summary or up to two
            folders above, where nnU-Net puts it. Without one, labels are named by their numbers.

    Returns:
        The scores, with labels and regions in the order of dataset.json.

    Raises:
        InputError: A file cannot be read, or is not a valid summary.json or dataset.json.
    """
    source = Path(summary_file)
    content = _load(source)
    names_from = Path(dataset_json) if dataset_json is not None else dataset_json_near(source)
    names = _names(names_from) if names_from is not None else {}
    try:
        keys = sorted((_key(text) for text in content["mean"]), key=lambda key: _order(key, names))
        mean = {_name(key, names): _score(content["mean"][str(key)]) for key in keys}
        cases: dict[str, dict[str, Score]] = {}
        for case in content["metric_per_case"]:
            metrics = {_key(text): _score(values) for text, values in case["metrics"].items()}
            cases[_case_id(case["prediction_file"])] = {_name(key, names): metrics[key] for key in keys}
        foreground = _score(content["foreground_mean"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"{source} is not a summary of nnU-Net's evaluation ({error!r}); expected the summary.json that "
            f"nnUNetv2_evaluate_folder writes."
        ) from error
    scored = {name: sum(not math.isnan(case[name].dice) for case in cases.values()) for name in mean}
    return Summary(source, mean, foreground, dict(sorted(cases.items())), scored)


def format_table(summary: Summary) -> str:
    """Format a summary as text: the means, then the Dice of every case.

    Args:
        summary: The summary.

    Returns:
        Lines without a final line break. A dash stands for NaN: neither reference nor prediction has the label.
    """
    total = len(summary.cases)
    rows: list[tuple[str, ...]] = [("", "Dice", "IoU", "FP voxels", "FN voxels", "cases")]
    for name, score in summary.mean.items():
        rows.append((name, *_cells(score), f"{summary.scored[name]} of {total}"))
    if len(summary.mean) > 1:
        rows.append(("mean", *_cells(summary.foreground), ""))
    case_rows: list[tuple[str, ...]] = [("Dice per case", *summary.mean)]
    for case, scores in summary.cases.items():
        case_rows.append((case, *(_fraction(score.dice) for score in scores.values())))
    lines, case_lines = (aligned(table, left=1) for table in (rows, case_rows))
    for table in (lines, case_lines):
        table.insert(1, "-" * max(map(len, table)))
    return "\n".join([*lines, "", *case_lines])


def _load(path: Path) -> Any:
    if path.is_dir():
        there = f", such as {path / 'summary.json'}" if (path / "summary.json").is_file() else ""
        raise InputError(f"{path} is a folder; expected a JSON file{there}.")
    if not path.exists():
        raise InputError(f"{path} does not exist; expected a JSON file.")
    try:
        with file_errors(path):
            return json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path} is not valid JSON: {error}.") from error


def dataset_json_near(summary: Path) -> Path | None:
    for folder in list(summary.resolve().parents)[:3]:
        if (folder / "dataset.json").is_file():
            return folder / "dataset.json"
    return None


def _names(dataset_json: Path) -> dict[frozenset[int], str]:
    """Read the name of every label and region, in the file's order, by the set of its label values."""
    content = _load(dataset_json)
    names: dict[frozenset[int], str] = {}
    try:
        for name, labels in content["labels"].items():
            names[frozenset(labels if isinstance(labels, list) else [int(labels)])] = name
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"{dataset_json} has no usable labels ({error!r}); expected the dataset.json of an nnU-Net data set."
        ) from error
    return names


def _key(text: str) -> Key:
    """Parse a label or region key of summary.json: "3" or "(1, 2, 3)"."""
    if text.startswith("("):
        return tuple(int(part) for part in text.strip("()").split(",") if part.strip())
    return int(text)


def _labels(key: Key) -> frozenset[int]:
    return frozenset({key} if isinstance(key, int) else key)


def _order(key: Key, names: Mapping[frozenset[int], str]) -> tuple[int, list[int]]:
    labels = _labels(key)
    known = list(names)
    return (known.index(labels) if labels in names else len(known), sorted(labels))


def _name(key: Key, names: Mapping[frozenset[int], str]) -> str:
    fallback = f"label {key}" if isinstance(key, int) else f"region {', '.join(map(str, key))}"
    return names.get(_labels(key), fallback)


def _score(values: Mapping[str, Any]) -> Score:
    def number(name: str) -> float:
        value = values[name]
        return math.nan if value is None else float(value)

    return Score(number("Dice"), number("IoU"), number("FP"), number("FN"))


def _case_id(prediction_file: str) -> str:
    """Return the file name without folder and ending. The path may come from another operating system."""
    name = PureWindowsPath(prediction_file).name
    return name[: -len(".nii.gz")] if name.endswith(".nii.gz") else name.rpartition(".")[0] or name


def _fraction(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"


def _cells(score: Score) -> tuple[str, ...]:
    voxels = ("-" if math.isnan(v) else f"{v:.1f}" for v in (score.false_positives, score.false_negatives))
    return (_fraction(score.dice), _fraction(score.iou), *voxels)
