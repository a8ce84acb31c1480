"""Compares trained models: scores, statistics, ensembles, costs, and a report of all that."""

from __future__ import annotations

import csv
import math
import statistics as means
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Final

from nnunet_conres import __version__
from nnunet_conres.datasets.raw import short_message, some
from nnunet_conres.errors import InputError, file_errors
from nnunet_conres.evaluation.costs import Cost, Curves, ensemble_cost, model_cost, unlike_conditions
from nnunet_conres.evaluation.ensembles import build_ensemble, ensemble_members, settings_differences
from nnunet_conres.evaluation.json_values import without_nan
from nnunet_conres.evaluation.labels import label_values
from nnunet_conres.evaluation.metrics import METRICS, MetricOptions
from nnunet_conres.evaluation.models import (
    Found,
    Missing,
    Model,
    ModelName,
    find_cross_validation,
    find_test_set,
    iterate_missing,
    other_splits,
    read_json,
    same_cases,
)
from nnunet_conres.evaluation.report import REPORT_FORMAT, CaseVolumes, write_report
from nnunet_conres.evaluation.scoring import MEAN, Scores, ScoringJob, score_cases
from nnunet_conres.evaluation.statistics import PairedComparison, compare_paired, mean_interval
from nnunet_conres.files import write_json, written_whole
from nnunet_conres.folders import list_files, writing
from nnunet_conres.images.volumes import reader_for
from nnunet_conres.nnunet import FOLDER_VARIABLES, folder_from_environment
from nnunet_conres.text import aligned

MOST_DISAGREEMENTS: Final = 10

_MAIN_METRIC: Final = "dice"
_CONCLUDED_METRICS: Final = ("dice", "hd95")


@dataclass(frozen=True)
class CompareOptions:
    """How models are compared.

    Attributes:
        intersection: Whether to compare on the common cases where models have different ones.
        ensembles: Whether to average probabilities and compare that as further models.
        run: Whether to run the commands that make what is missing.
        device: Device of those commands; None for cuda where there is a GPU, else cpu.
        metrics: Conventions of the metrics.
        group_pattern: Regular expression that finds in a case's id what it is grouped by, where cases are not
            independent; None for the patients of BraTS's ids since 2023.
        processes: Cases scored at once.
        progress: Whether to show progress bars on stderr.
    """

    intersection: bool = False
    ensembles: bool = True
    run: bool = False
    device: str | None = None
    metrics: MetricOptions = field(default_factory=MetricOptions)
    group_pattern: str | None = None
    processes: int = 1
    progress: bool = True


@dataclass(frozen=True)
class _Task:
    """What is compared, checked and complete.

    Attributes:
        kind: "cross-validation" or "test".
        dataset_name: Name of the data set.
        dataset_json: Content of its dataset.json.
        models: The models, the baseline first.
        cases: Ids of the cases.
        references: True label map by case.
        images: Image files by case, one per channel; without the cases that have none.
        settings: Folder with the dataset.json and plans.json that a model predicted with, by its key.
        groups: Group of every case; None where each case is its own.
        missing_probabilities: What makes the probabilities that an ensemble lacks.
        left_out: Cases that have a reference or a prediction, and are not compared.
        warnings: What has been found already.
    """

    kind: str
    dataset_name: str
    dataset_json: Mapping[str, Any]
    models: list[Model]
    cases: list[str]
    references: Mapping[str, Path]
    images: Mapping[str, Sequence[Path]]
    settings: Mapping[str, Path]
    groups: Mapping[str, str] | None
    missing_probabilities: Sequence[Missing]
    left_out: Sequence[str]
    warnings: list[str]

    @property
    def folds(self) -> list[int]:
        """The folds that held the compared cases out, in the first model."""
        folds = {self.models[0].predictions[case].fold for case in self.cases}
        return sorted(fold for fold in folds if fold is not None)


@dataclass(frozen=True)
class Comparison:
    """What a comparison found and wrote.

    Attributes:
        content: What report.json holds.
        report: report.html.
        json: report.json.
        csv: cases.csv.
    """

    content: Mapping[str, Any]
    report: Path
    json: Path
    csv: Path

    def as_text(self) -> str:
        """The main figures for a person at a terminal."""
        content = self.content
        region = _overall(content["regions"])
        rows = [("", f"Dice ({region})", "95 % interval", f"HD95 ({region})", "s per epoch", "cases")]
        for model in content["models"]:
            dice, hd95 = (content["summary"][model["key"]][region][key] for key in ("dice", "hd95"))
            rows.append(
                (
                    model["name"],
                    METRICS["dice"].text(_number(dice["mean"])),
                    " to ".join(METRICS["dice"].text(_number(dice[end])) for end in ("low", "high")),
                    METRICS["hd95"].text(_number(hd95["mean"])),
                    "-" if model["cost"]["epoch_seconds"] is None else f"{model['cost']['epoch_seconds']:.1f}",
                    str(dice["n"]),
                )
            )
        lines = aligned(rows)
        lines.insert(1, "-" * max(map(len, lines)))
        lines += ["", *content["conclusions"], *(f"warning: {warning}" for warning in content["warnings"])]
        return "\n".join([*lines, "", f"Report: {self.report}", f"        {self.json}", f"        {self.csv}"])


# --- what is compared -------------------------------------------------------------------------------------------------


def compare_cross_validation(
    dataset_name: str,
    names: Sequence[ModelName],
    folds: Sequence[int],
    output_folder: str | Path,
    options: CompareOptions | None = None,
) -> Comparison:
    """Compares models by the cases that their folds held out, and writes the report.

    Args:
        dataset_name: Whole name of the data set.
        names: The models, the baseline first.
        folds: Folds that every model has to have.
        output_folder: Where the report goes; made if need be.
        options: How to compare.

    Returns:
        What was found and written.

    Raises:
        InputError: Something is missing or does not fit; lists all that was found, with the commands that help.
    """
    options = options or CompareOptions()

    device = options.device or _available_device()

    def find() -> Found:
        return find_cross_validation(dataset_name, names, folds, device=device)

    found = _found_or_made(find, options, len(names))
    references = _reference_folder(dataset_name)
    if references is None:
        raise InputError([f"{dataset_name} has neither labelsTr in nnUNet_raw nor gt_segmentations in preprocessed."])
    settings = {model.key: model.folder for model in found.models if model.folder is not None}
    dataset_json = read_json(settings[found.models[0].key] / "dataset.json")
    task = _task(
        "cross-validation", dataset_name, dataset_json, found, references, _raw_images(dataset_name), settings, options
    )
    with writing(Path(output_folder)):
        return _compare(task, Path(output_folder), options)


def compare_test_set(
    predictions: Mapping[str, str | Path],
    references: str | Path,
    dataset_json: str | Path,
    output_folder: str | Path,
    options: CompareOptions | None = None,
    *,
    images: str | Path | None = None,
    model_folders: Mapping[str, str | Path] | None = None,
) -> Comparison:
    """Compares folders of predictions of the same images, and writes the report.

    Args:
        predictions: Folder by the model's name, the baseline first.
        references: Folder with the true label maps.
        dataset_json: The data set's dataset.json.
        output_folder: Where the report goes; made if need be.
        options: How to compare.
        images: Folder with the images, named as nnU-Net names them, for the pictures of the report.
        model_folders: Trained model folder by the models' names, for costs and curves.

    Returns:
        What was found and written.

    Raises:
        InputError: Something is missing or does not fit; lists all that was found.
    """
    options = options or CompareOptions()
    content = read_json(Path(dataset_json))
    if "file_ending" not in content:
        raise InputError(f"{dataset_json} has no file_ending; expected the dataset.json of an nnU-Net data set.")
    file_ending = str(content["file_ending"])
    device = options.device or _available_device()
    folders = {name: Path(folder) for name, folder in predictions.items()}
    trained = {name: Path(folder) for name, folder in (model_folders or {}).items()}
    missing = [
        f"{folder} is not a folder; expected {what}."
        for folder, what in ((references, "the true label maps"), (images, "images"))
        if folder is not None and not Path(folder).is_dir()
    ]

    def find() -> Found:
        found = find_test_set(folders, trained, file_ending, device=device)
        found.faults[:0] = missing
        return found

    found = _found_or_made(find, options, len(folders))
    settings = {model.key: folders[model.name] for model in found.models}
    shown = {} if images is None else _images_by_case(Path(images), file_ending)
    name = str(content.get("name", Path(dataset_json).resolve().parent.name))
    task = _task("test", name, content, found, Path(references), shown, settings, options)
    with writing(Path(output_folder)):
        return _compare(task, Path(output_folder), options)


def _available_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _found_or_made(find: Callable[[], Found], options: CompareOptions, number: int) -> Found:
    """So many models; commands that make what is missing are run where that is wanted.

    Raises:
        InputError: They are not complete, or a command failed.
    """
    found = find()
    if options.run and not found.faults:
        todo = list(iterate_missing(found, probabilities=options.ensembles and number > 1))
        unknown = [missing for missing in todo if not missing.is_known]
        if unknown:
            raise InputError(
                [
                    f"--run does not know the whole command: name the model's folder with --model, run it yourself, or "
                    f"leave --run out and do without the ensemble. {missing.as_text}"
                    if missing.command
                    else missing.as_text
                    for missing in unknown
                ]
            )
        for missing in todo:
            print(missing.as_text, flush=True)
            try:
                code = subprocess.run(missing.command, check=False).returncode
            except FileNotFoundError as error:
                raise InputError(f"{missing.command[0]} is not installed here; run it where nnU-Net is.") from error
            if code != 0:
                raise InputError(f"The command failed with exit code {code}: {missing.remedy}")
        if todo:
            found = find()
    faults = found.faults + [missing.as_text for missing in found.missing]
    if not options.intersection:
        faults += [f"{gap.as_text} Or compare on the common cases with --intersection." for gap in found.gaps]
    if faults:
        raise InputError(faults)
    return found


def _task(
    kind: str,
    dataset_name: str,
    dataset_json: Mapping[str, Any],
    found: Found,
    reference_folder: Path,
    images: Mapping[str, Sequence[Path]],
    settings: Mapping[str, Path],
    options: CompareOptions,
) -> _Task:
    file_ending = str(dataset_json["file_ending"])
    references = {path.name.removesuffix(file_ending): path for path in list_files(reference_folder, file_ending)}
    cases, faults = same_cases(found.models, list(references), intersection=options.intersection)
    faults += _other_labels(found.models, dataset_json, settings)
    groups, ungrouped = _groups(cases, options.group_pattern)
    faults += ungrouped
    if faults:
        raise InputError(faults)
    warnings = []
    predicted = {case for model in found.models for case in model.predictions}
    left_out = predicted - set(cases)
    if options.intersection:
        warnings += [f"{gap.what} Left out for all models." for gap in found.gaps]
        if left_out:
            warnings.append(f"Compared on the {len(cases)} common cases only; left out: {some(sorted(left_out))}.")
        others = other_splits(found.models)
        if others:
            warnings.append(
                f"{some(others)}: trained on other splits than {found.models[0].name}. Each case was held out, but the "
                f"models learned from different cases."
            )
    if kind == "test":
        unpredicted = sorted(set(references) - predicted)
        left_out |= set(unpredicted)
        if unpredicted:
            warnings.append(f"No model predicted {some(unpredicted)}, for which there is a reference.")
    return _Task(
        kind,
        dataset_name,
        dataset_json,
        found.models,
        cases,
        references,
        images,
        settings,
        groups,
        found.missing_probabilities,
        sorted(left_out | {case for gap in found.gaps for case in gap.cases}),
        warnings,
    )


def _groups(cases: Sequence[str], pattern: str | None) -> tuple[dict[str, str] | None, list[str]]:
    from nnunet_conres.datasets.splits import compile_group, group_cases

    compiled, faults = compile_group(pattern)
    if faults:
        return None, faults
    groups, faults = group_cases(cases, compiled)
    return (groups if len(set(groups.values())) < len(groups) else None), faults


def _other_labels(
    models: Sequence[Model], dataset_json: Mapping[str, Any], settings: Mapping[str, Path]
) -> Iterator[str]:
    for model in models:
        path = settings[model.key] / "dataset.json"
        if path.is_file() and read_json(path).get("labels") != dataset_json.get("labels"):
            yield (
                f"{model.name} was trained with the labels {read_json(path).get('labels')}, but the comparison is in "
                f"{dataset_json.get('labels')}: their scores are not those of the same thing."
            )


def _reference_folder(dataset_name: str) -> Path | None:
    for variable, name in ((FOLDER_VARIABLES[0], "labelsTr"), (FOLDER_VARIABLES[1], "gt_segmentations")):
        root = folder_from_environment(variable)
        if root is not None and (root / dataset_name / name).is_dir():
            return root / dataset_name / name
    return None


def _raw_images(dataset_name: str) -> dict[str, list[Path]]:
    raw = folder_from_environment(FOLDER_VARIABLES[0])
    if raw is None or not (raw / dataset_name / "imagesTr").is_dir():
        return {}
    try:
        file_ending = str(read_json(raw / dataset_name / "dataset.json")["file_ending"])
    except (InputError, KeyError):
        return {}
    return _images_by_case(raw / dataset_name / "imagesTr", file_ending)


def _images_by_case(folder: Path, file_ending: str) -> dict[str, list[Path]]:
    cases: dict[str, list[Path]] = {}
    for path in list_files(folder, file_ending):
        stem = path.name.removesuffix(file_ending)
        if stem[-5:-4] == "_" and stem[-4:].isdigit():
            cases.setdefault(stem[:-5], []).append(path)
    return cases


# --- comparison -------------------------------------------------------------------------------------------------------


def _compare(task: _Task, output: Path, options: CompareOptions) -> Comparison:
    with file_errors(output):
        output.mkdir(parents=True, exist_ok=True)
    warnings = list(task.warnings)
    models = task.models + (_ensembles(task, output, options, warnings) if options.ensembles else [])
    jobs = [
        ScoringJob(model.key, case, task.references[case], model.predictions[case].labels)
        for model in models
        for case in task.cases
    ]
    scores = score_cases(
        jobs,
        task.dataset_json,
        options=options.metrics,
        cache_folder=output / "cache",
        processes=options.processes,
        progress=options.progress,
    )
    if scores.displaced:
        warnings.append(
            f"By their headers, {some([str(path) for path in scores.displaced])} do not lie where the reference does "
            f"(origin or directions). Voxels were compared one by one all the same: are these predictions of the same "
            f"images, and not turned?"
        )
    costs, curves = _costs(models, warnings)
    content = _content(task, models, scores, costs, curves, options, warnings)
    written = Comparison(content, output / "report.html", output / "report.json", output / "cases.csv")
    _write_csv(written.csv, content)
    _write_report(written.report, task, models, content)
    write_json(written.json, content)
    return written


def _ensembles(task: _Task, output: Path, options: CompareOptions, warnings: list[str]) -> list[Model]:
    """Ensembles of all models that have probabilities; what is missing for more becomes a warning."""
    file_ending = str(task.dataset_json["file_ending"])
    able = [
        model
        for model in task.models
        if all(model.predictions[case].probabilities(file_ending).is_file() for case in task.cases)
    ]
    if len(task.models) > 1 and len(able) < len(task.models):
        without = [model.name for model in task.models if model not in able]
        lines = [f"No ensemble with {', '.join(without)}: probabilities are missing. Run these, or add --run:"]
        for missing in task.missing_probabilities:
            lines.append(missing.remedy if missing.command else missing.as_text)
        warnings.append("\n".join(lines))
    if len(able) < 2:
        return []
    differences = settings_differences(able, task.settings)
    if differences:
        warnings.append("No ensembles. " + " ".join(differences))
        return []
    return [
        build_ensemble(
            f"e{number}",
            members,
            task.cases,
            output / "ensembles" / "_".join(member.key for member in members),
            settings_folder=task.settings[members[0].key],
            processes=options.processes,
            progress=options.progress,
        )
        for number, members in enumerate(ensemble_members(able))
    ]


def _costs(models: Sequence[Model], warnings: list[str]) -> tuple[dict[str, Cost], dict[str, Curves]]:
    costs: dict[str, Cost] = {}
    curves: dict[str, Curves] = {}
    for model in models:
        if model.members:
            costs[model.key], curves[model.key] = ensemble_cost([costs[key] for key in model.members]), {}
        else:
            costs[model.key], curves[model.key], notes = model_cost(model)
            warnings += notes
    warnings += unlike_conditions({model.name: costs[model.key] for model in models if not model.members})
    return costs, curves


def _content(
    task: _Task,
    models: Sequence[Model],
    scores: Scores,
    costs: Mapping[str, Cost],
    curves: Mapping[str, Curves],
    options: CompareOptions,
    warnings: list[str],
) -> dict[str, Any]:
    """What report.json holds."""
    from importlib.metadata import version

    names = {model.key: model.name for model in models}
    baseline = models[0].key
    regions = [region for region in next(iter(scores.values[baseline].values())) if region != MEAN]
    compared = compare_paired(_named(scores, names), names[baseline], groups=task.groups) if len(models) > 1 else []
    if len(task.cases) > 1 and len(task.folds) == 1:
        warnings.append(
            f"Only fold {task.folds[0]} is compared: what differs may differ by chance of the split or the training; "
            f"other folds and seeds tell."
        )
    conclusions = [
        comparison.sentence
        for comparison in compared
        if comparison.region == _overall(regions) and comparison.metric in _CONCLUDED_METRICS
    ]
    conclusions += _does_the_ensemble_help(models, scores, names, _overall(regions), task.groups)
    keys = {name: key for key, name in names.items()}
    return without_nan(
        {
            "format": REPORT_FORMAT,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "nnunet_conres": __version__,
            "nnunetv2": version("nnunetv2"),
            "dataset": {
                "name": task.dataset_name,
                "kind": task.kind,
                "folds": task.folds,
                "number_of_cases": len(task.cases),
                "left_out": task.left_out,
                "reference": str(next(iter(task.references.values())).parent) if task.references else "",
            },
            "options": options.metrics.as_json(),
            "regions": regions,
            "metrics": [
                metric.as_json() | {"better": None if metric.better == "none" else metric.better}
                for metric in METRICS.values()
            ],
            "models": [
                {
                    "key": model.key,
                    "name": model.name,
                    "baseline": model.key == baseline,
                    "trainer": model.model and model.model.trainer,
                    "plans": model.model and model.model.plans,
                    "configuration": model.model and model.model.configuration,
                    "folds": list(model.folds),
                    "members": list(model.members) or None,
                    "cost": costs[model.key].as_json(),
                    "curves": curves[model.key] or None,
                }
                for model in models
            ],
            "summary": {model.key: _summary(scores, model.key, task.groups) for model in models},
            "comparisons": [_comparison(comparison, keys) for comparison in compared],
            "conclusions": conclusions,
            "warnings": warnings,
            "cases": [
                {
                    "id": case,
                    "fold": models[0].predictions[case].fold,
                    "scores": {model.key: scores.values[model.key][case] for model in models},
                }
                for case in task.cases
            ],
            "disagreements": _disagreements(models, scores, task.cases, _overall(regions)),
        }
    )


def _overall(regions: Sequence[str]) -> str:
    """The row that stands for a case as a whole."""
    return MEAN if len(regions) > 1 else regions[0]


def _named(scores: Scores, names: Mapping[str, str]) -> dict[str, Any]:
    """The scores by the models' names, which is what sentences call them."""
    return {names[key]: values for key, values in scores.values.items()}


def _does_the_ensemble_help(
    models: Sequence[Model], scores: Scores, names: Mapping[str, str], region: str, groups: Mapping[str, str] | None
) -> list[str]:
    """Ensembles against the best single model, where that is not the baseline, which they are compared with anyway."""
    ensembles = [model for model in models if model.members]
    singles = [model for model in models if not model.members]

    def mean(model: Model) -> float:
        values = [case[region][_MAIN_METRIC] for case in scores.values[model.key].values()]
        known = [value for value in values if not math.isnan(value)]
        return means.fmean(known) if known else -math.inf

    if not ensembles:
        return []
    best = max(singles, key=mean)
    if best is models[0]:
        return []
    compared = compare_paired(
        _named(scores, names),
        best.name,
        models=[ensemble.name for ensemble in ensembles],
        regions=[region],
        metrics=[_MAIN_METRIC],
        groups=groups,
    )
    return [comparison.sentence for comparison in compared]


def _summary(scores: Scores, key: str, groups: Mapping[str, str] | None) -> dict[str, Any]:
    cases = scores.values[key]
    summary: dict[str, Any] = {}
    for region, metrics in next(iter(cases.values())).items():
        summary[region] = {}
        for metric in metrics:
            known = {case: value for case, of in cases.items() if not math.isnan(value := of[region][metric])}
            # without the sign of a volume error: too much here does not make up for too little there
            values = [METRICS[metric].compared(value) for value in known.values()]
            interval = mean_interval(values, None if groups is None else [groups[case] for case in known])
            summary[region][metric] = {
                "n": len(values),
                "mean": means.fmean(values) if values else None,
                "median": means.median(values) if values else None,
                "std": means.stdev(values) if len(values) > 1 else None,
                "low": interval.low,
                "high": interval.high,
            }
    return summary


def _comparison(comparison: PairedComparison, keys: Mapping[str, str]) -> dict[str, Any]:
    return {
        "baseline": keys[comparison.baseline],
        "model": keys[comparison.model],
        "region": comparison.region,
        "metric": comparison.metric,
        "n": comparison.count,
        "left_out": list(comparison.left_out),
        "mean_difference": comparison.mean_difference,
        "median_difference": comparison.median_difference,
        "low": comparison.mean_interval.low,
        "high": comparison.mean_interval.high,
        "median_low": comparison.median_interval.low,
        "median_high": comparison.median_interval.high,
        "p": comparison.p_value,
        "p_holm": comparison.p_corrected,
        "effect_size": comparison.effect,
        "wins": comparison.wins,
        "ties": comparison.ties,
        "losses": comparison.losses,
        "conclusion": comparison.conclusion,
        "sentence": comparison.sentence,
    }


def _disagreements(models: Sequence[Model], scores: Scores, cases: Sequence[str], region: str) -> list[dict[str, str]]:
    """The cases in which a single model's Dice is farthest from the baseline's."""
    baseline, *others = [model for model in models if not model.members]
    rows = []
    for case in cases:
        of_baseline = scores.values[baseline.key][case][region][_MAIN_METRIC]
        for other in others:
            difference = scores.values[other.key][case][region][_MAIN_METRIC] - of_baseline
            if not math.isnan(difference):
                rows.append((abs(difference), case, other.name, difference))
    found: dict[str, str] = {}
    for _, case, name, difference in sorted(rows, key=lambda row: (-row[0], row[1])):
        found.setdefault(case, f"Dice ({region}) of {name} is {difference:+.3f} against {baseline.name}")
    return [{"id": case, "reason": reason} for case, reason in list(found.items())[:MOST_DISAGREEMENTS]]


# --- files ------------------------------------------------------------------------------------------------------------


def _write_csv(path: Path, content: Mapping[str, Any]) -> None:
    """A row per case, model and region; an empty cell where there is no value."""
    metrics = [metric["key"] for metric in content["metrics"]]
    names = {model["key"]: model["name"] for model in content["models"]}
    with written_whole(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["case", "fold", "model", "region", *metrics])
        for case in content["cases"]:
            for key, regions in case["scores"].items():
                for region, values in regions.items():
                    cells = ["" if values[metric] is None else values[metric] for metric in metrics]
                    fold = "" if case["fold"] is None else case["fold"]
                    writer.writerow([case["id"], fold, names[key], region, *cells])


def _write_report(path: Path, task: _Task, models: Sequence[Model], content: dict[str, Any]) -> None:
    shown = [entry["id"] for entry in content["disagreements"]]
    without = [case for case in shown if case not in task.images]
    if without:
        content["warnings"].append(f"No images to show of {some(without)}: {_where_images_are(task.kind)}")

    def volumes() -> Iterator[CaseVolumes]:
        import numpy as np

        from nnunet_conres.evaluation.figures import read_standing, read_standing_labels

        regions = label_values(task.dataset_json["labels"])
        channel_names = task.dataset_json.get("channel_names", task.dataset_json.get("modality", {}))
        for case in shown:
            if case not in task.images:
                continue
            try:
                reader = reader_for(task.dataset_json, [task.images[case][0]])
                images, spacings = zip(*(read_standing(file, reader) for file in task.images[case]), strict=True)
                found = CaseVolumes(
                    case,
                    np.stack(images),
                    [str(channel_names.get(str(number), f"channel {number}")) for number in range(len(images))],
                    read_standing_labels(task.references[case], reader),
                    {model.key: read_standing_labels(model.predictions[case].labels, reader) for model in models},
                    regions,
                    spacings[0],
                )
                faults = found.faults()
            except ValueError as error:
                faults = [f"{short_message(error)}."]
            # Scores and statistics are there already: what can't be shown must not cost them.
            if faults:
                content["warnings"].append(f"No pictures of {case}: {' '.join(faults)}")
                continue
            yield found

    write_report(content, volumes(), path)


def _where_images_are(kind: str) -> str:
    return (
        "they are looked for in imagesTr of the raw data set."
        if kind == "cross-validation"
        else "name their folder with -i."
    )


def _number(value: float | None) -> float:
    return math.nan if value is None else value
