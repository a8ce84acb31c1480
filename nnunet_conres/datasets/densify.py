"""Densify sparsely annotated training cases: keep annotated voxels and predict all others.

Source: Çiçek et al., 3D U-Net, MICCAI 2016, the semi-automated setup: a network trained on the annotated slices of
some volumes labels all other slices of the same volumes.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from nnunet_conres.case_ids import unsafe_ids
from nnunet_conres.datasets.raw import TrainingCase, find_dataset, find_training_cases, look_at_case, read_dataset_json
from nnunet_conres.datasets.sparse import IGNORE
from nnunet_conres.errors import InputError, file_errors
from nnunet_conres.files import write_json
from nnunet_conres.folders import check_complete, visible, writing
from nnunet_conres.images.volumes import read_labels, write_labels
from nnunet_conres.nnunet import PREPROCESSED, RESULTS, SPLITS_FILE, Model, folder_from_environment, not_set
from nnunet_conres.parallel import map_cases
from nnunet_conres.predictor import DEFAULT_CHECKPOINT, load_predictor, predict_logits, settings_errors

if TYPE_CHECKING:
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

Fold = int | Literal["all"]
Existing = Literal["refuse", "overwrite", "continue"]

RECORD: Final = "densify.json"
"""File in the output folder that records the model and the options of the prediction."""


@dataclass(frozen=True)
class TrainedModel(Model):
    """A trained nnU-Net model, identified as in nnUNetv2_predict.

    Attributes:
        folds: Folds whose predictions are averaged.
        checkpoint: Name of the checkpoint file.
    """

    folds: tuple[Fold, ...]
    checkpoint: str = DEFAULT_CHECKPOINT


@dataclass(frozen=True)
class Densification:
    """Result of `densify`.

    Attributes:
        output_folder: Folder with a label file per case, dataset.json and plans.json.
        cases: All cases, sorted by id.
        files: The label file of each case, by id.
        written: Ids of the cases written by this run; the others existed already.
        dataset_folder: The sparsely annotated data set.
    """

    output_folder: Path
    cases: tuple[TrainingCase, ...]
    files: Mapping[str, Path]
    written: tuple[str, ...]
    dataset_folder: Path


def densify(
    dataset: int | str,
    model: TrainedModel,
    output_folder: str | Path,
    *,
    device: str = "cuda",
    mirroring: bool = True,
    step_size: float = 0.5,
    cross_validation: bool = False,
    previous_stage_folder: str | Path | None = None,
    reference_folder: str | Path | None = None,
    existing: Existing = "refuse",
    preprocessing_processes: int = 3,
    export_processes: int = 3,
    progress: bool = True,
) -> Densification:
    """Predict the training cases of a sparsely annotated data set and keep the annotated voxels.

    The prediction is the same as that of nnUNetv2_predict. Files have the geometry and the format of the annotation.
    Each file gets its final name only when it is complete.

    Args:
        dataset: Id or name of a data set in nnUNet_raw with an ignore label.
        model: Model trained on this data set.
        output_folder: Gets a label file per case; created if it does not exist.
        device: "cuda", "cpu" or "mps".
        mirroring: Whether to average over mirrored images (test-time augmentation).
        step_size: Step of the sliding window in patches, above 0 and at most 1.
        cross_validation: Predict each case only with the folds that had it in their validation set, instead of with
            all folds. These folds have not seen its annotated slices.
        previous_stage_folder: For a cascade: predictions of the previous stage, one per case.
        reference_folder: If given, must have a label file for each case. Used by figures that are drawn later.
        existing: Treatment of an output folder that is not empty: refuse it, overwrite the cases' files, or continue,
            which keeps complete files of the same model and options.
        preprocessing_processes: As -npp of nnUNetv2_predict; 0 uses the current process.
        export_processes: As -nps of nnUNetv2_predict; 0 uses the current process.
        progress: Whether to show progress bars on stderr.

    Returns:
        The files of all cases.

    Raises:
        InputError: The data set, the model or an argument is invalid. Lists all errors.
    """
    dataset_folder, output = find_dataset(dataset), Path(output_folder)
    name = dataset_folder.name
    errors = list(_argument_errors(model, device, step_size, preprocessing_processes, export_processes))
    dataset_json, found = read_dataset_json(dataset_folder)
    if dataset_json is None:
        raise InputError([*errors, *found])
    if dataset_json["labels"].get(IGNORE) is None:
        raise InputError(
            [
                *errors,
                f"{dataset_folder / 'dataset.json'} has no label {IGNORE!r}: all voxels are annotated, so there is "
                f"nothing to densify. Expected a data set such as nnunet-conres sparsify makes.",
            ]
        )
    errors += _model_errors(model, name, dataset_json)
    cases, found = find_training_cases(dataset_folder, dataset_json)
    errors += found
    expected = dataset_json.get("numTraining", len(cases))
    if not found and expected != len(cases):
        errors.append(
            f"{dataset_folder} has {len(cases)} training cases, but numTraining in its dataset.json is {expected}. Put "
            f"the missing files back, or correct dataset.json."
        )
    ending = str(dataset_json["file_ending"])
    groups: dict[tuple[Fold, ...], list[TrainingCase]] = {model.folds: list(cases)}
    if cross_validation:
        groups, found = _by_validation_fold(model, name, cases)
        errors += found
    record = {
        "dataset": name,
        "trainer": model.trainer,
        "plans": model.plans,
        "configuration": model.configuration,
        "folds": list(model.folds),
        "checkpoint": model.checkpoint,
        "mirroring": mirroring,
        "step_size": step_size,
        "cross_validation": cross_validation,
        "previous_stage": None if previous_stage_folder is None else str(Path(previous_stage_folder).resolve()),
        "trained": _checkpoint_times(model, name),
    }
    errors += _output_errors(output, dataset_folder, cases, existing, record)
    errors += _companion_errors(model, dataset_folder, cases, ending, previous_stage_folder, reference_folder)
    if errors:
        raise InputError(errors)

    # Load the models before anything is written: nnU-Net reports problems with a model when it loads it.
    model_folder = model.folder(name)
    assert model_folder is not None
    pending = {
        folds: [case for case in group if existing != "continue" or not (output / f"{case.case_id}{ending}").is_file()]
        for folds, group in groups.items()
    }
    pending = {folds: group for folds, group in pending.items() if group}
    predictors = [_predictor(model, model_folder, folds, device, mirroring, step_size) for folds in pending]
    unpredicted = [case for group in pending.values() for case in group]
    if predictors:
        first = predictors[0]
        labels = (*first.label_manager.all_labels, first.label_manager.ignore_label)
        jobs = [(case, first.plans_manager.image_reader_writer_class, labels) for case in unpredicted]
        looks = list(map_cases(look_at_case, jobs, max(1, preprocessing_processes), "Checking", progress))
        errors = [error for look in looks for error in look.errors]
        if errors:
            raise InputError(errors)

    written: list[str] = []
    with writing(output):
        # Check again: another run may have written to the folder during the checks.
        errors = list(_output_errors(output, dataset_folder, cases, existing, record))
        if errors:
            raise InputError(errors)
        before = {path.name for path in output.iterdir()}
        try:
            with file_errors(output):
                if existing == "overwrite":
                    # If this run were interrupted and continued, files of another model would count as its own.
                    for case in cases:
                        (output / f"{case.case_id}{ending}").unlink(missing_ok=True)
                write_json(output / RECORD, record)
                shutil.copyfile(model_folder / "plans.json", output / "plans.json")
                write_json(output / "dataset.json", _dense_dataset_json(dataset_json, len(cases)))
            for case_id in _with_bar(
                _predict_groups(
                    predictors,
                    list(pending.values()),
                    output,
                    ending,
                    None if previous_stage_folder is None else Path(previous_stage_folder),
                    preprocessing_processes,
                    export_processes,
                ),
                len(unpredicted),
                progress,
            ):
                written.append(case_id)
        except BaseException:
            if not written:
                # Restore the folder, so that the same command can be run again.
                for path in visible(output):
                    if path.name not in before and path.is_file():
                        path.unlink(missing_ok=True)
            raise
        check_complete(output, (f"{case.case_id}{ending}" for case in cases))
    return Densification(
        output_folder=output,
        cases=tuple(cases),
        files={case.case_id: output / f"{case.case_id}{ending}" for case in cases},
        written=tuple(sorted(written)),
        dataset_folder=dataset_folder,
    )


def merge(labels: NDArray[Any], prediction: NDArray[Any], ignore_label: int) -> NDArray[Any]:
    """Keep annotated voxels and take all others from the prediction.

    Args:
        labels: Sparsely annotated label map.
        prediction: Label map of the same shape.
        ignore_label: Value of the voxels that are not annotated.

    Returns:
        Label map of the same shape and the prediction's type, without the ignore label.

    Raises:
        ValueError: The shapes differ, or the prediction has the ignore label.
    """
    if labels.shape != prediction.shape:
        raise ValueError(f"The labels have shape {labels.shape}, the prediction {prediction.shape}; expected the same.")
    annotated = labels != ignore_label
    merged = prediction.copy()
    merged[annotated] = labels[annotated].astype(prediction.dtype)
    if (merged == ignore_label).any():
        raise ValueError(
            f"The prediction has the ignore label, {ignore_label}; a model of nnU-Net does not predict it."
        )
    return merged


# --- checks ---------------------------------------------------------------------------------------------------------


def _argument_errors(
    model: TrainedModel, device: str, step_size: float, preprocessing_processes: int, export_processes: int
) -> Iterator[str]:
    yield from settings_errors(device, step_size)
    if not model.folds:
        yield "No fold given; expected one or more, or all."
    if len(set(model.folds)) < len(model.folds):
        yield f"The folds are {' '.join(map(str, model.folds))}; expected each only once."
    if preprocessing_processes < 0 or export_processes < 0:
        yield f"The numbers of processes are {preprocessing_processes} and {export_processes}; expected 0 or more."


def _model_errors(model: TrainedModel, name: str, dataset_json: Mapping[str, Any]) -> Iterator[str]:
    folder = model.folder(name)
    if folder is None:
        yield not_set(RESULTS)
        return
    missing = [fold for fold in model.folds if not (folder / f"fold_{fold}" / model.checkpoint).is_file()]
    for fold in missing:
        others = sorted(path.name for path in (folder / f"fold_{fold}").glob("checkpoint_*.pth"))
        command = shlex.join(model.training_command(name, fold))
        if others and DEFAULT_CHECKPOINT in others:
            yield f"Fold {fold} has no {model.checkpoint} in {folder}, only {', '.join(others)}; choose with -chk."
        elif others:
            yield (
                f"Fold {fold} has no {model.checkpoint} in {folder}, only {', '.join(others)}: its training is not "
                f"finished. Finish it with {command} --c, or use another checkpoint with -chk {others[-1]}."
            )
        else:
            yield f"Fold {fold} is not trained: {folder / f'fold_{fold}'} has no {model.checkpoint}. Run: {command}"
    if len(missing) == len(model.folds):
        return
    try:
        plans, theirs = (json.loads((folder / f"{part}.json").read_text("utf-8")) for part in ("plans", "dataset"))
    except (OSError, ValueError) as error:
        yield f"{folder} is not a model of nnU-Net: {error}"
        return
    if plans["dataset_name"] != name:
        yield f"{folder} was trained on {plans['dataset_name']}; expected a model trained on {name}."
    if plans["plans_name"] != model.plans:
        yield f"{folder} was trained with the plans {plans['plans_name']}; expected {model.plans}."
    for key in ("labels", "regions_class_order", "channel_names", "file_ending"):
        if theirs.get(key) != dataset_json.get(key):
            yield (
                f"{folder} was trained when dataset.json had {key} {theirs.get(key)}; now it has "
                f"{dataset_json.get(key)}. Preprocess and train again."
            )


def _by_validation_fold(
    model: TrainedModel, name: str, cases: Sequence[TrainingCase]
) -> tuple[dict[tuple[Fold, ...], list[TrainingCase]], list[str]]:
    """Group the cases by the model's folds that have them in their validation set; also return errors."""
    preprocessed = folder_from_environment(PREPROCESSED)
    if preprocessed is None:
        return {}, [not_set(PREPROCESSED)]
    path = preprocessed / name / SPLITS_FILE
    try:
        splits = json.loads(path.read_text(encoding="utf-8"))
        held_out = {
            fold: set(splits[fold]["val"]) if isinstance(fold, int) and fold < len(splits) else set()
            for fold in model.folds
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        return {}, [f"{path} cannot be read, so it is unknown which fold had a case in its validation set: {error}"]
    unsafe = unsafe_ids(sorted({str(case_id) for ids in held_out.values() for case_id in ids}), path)
    if unsafe:
        return {}, unsafe
    groups: dict[tuple[Fold, ...], list[TrainingCase]] = defaultdict(list)
    for case in cases:
        groups[tuple(fold for fold in model.folds if case.case_id in held_out[fold])].append(case)
    errors = [
        f"Case {case.case_id} is not a validation case of any of the folds {' '.join(map(str, model.folds))}; give "
        f"all folds of the cross-validation, or leave --cross_validation out."
        for case in groups.pop((), [])
    ]
    return dict(groups), errors


def _output_errors(
    output: Path,
    dataset_folder: Path,
    cases: Sequence[TrainingCase],
    existing: Existing,
    record: Mapping[str, Any],
) -> Iterator[str]:
    if output.exists() and not output.is_dir():
        yield f"{output} is not a folder; expected an output folder."
        return
    inputs = {path.parent.resolve() for case in cases for path in (case.labels, *case.images)}
    raw = dataset_folder.resolve().parent
    if output.resolve() in inputs or raw in (output.resolve(), *output.resolve().parents):
        yield f"{output} contains files of a data set in {raw}; choose another -o."
        return
    if not output.is_dir() or not visible(output):
        return
    if existing == "refuse":
        yield f"{output} is not empty; choose another -o, or add --overwrite or --continue."
    elif existing == "continue":
        try:
            before = json.loads((output / RECORD).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            yield f"{output / RECORD} cannot be read, so there is nothing to continue; add --overwrite instead."
            return
        different = [
            f"{key} {before.get(key)} there, {value} now" for key, value in record.items() if before.get(key) != value
        ]
        if different:
            yield f"{output} was begun with other options ({'; '.join(different)}); choose another -o or --overwrite."


def _companion_errors(
    model: TrainedModel,
    dataset_folder: Path,
    cases: Sequence[TrainingCase],
    ending: str,
    previous_stage_folder: str | Path | None,
    reference_folder: str | Path | None,
) -> Iterator[str]:
    """Yield a message for every error about previous-stage predictions and references."""
    name = dataset_folder.name
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    folder = model.folder(name)
    if folder is not None and (folder / "plans.json").is_file():
        stage = None
        with contextlib.suppress(KeyError, RuntimeError, ValueError):
            plans = json.loads((folder / "plans.json").read_text(encoding="utf-8"))
            stage = PlansManager(plans).get_configuration(model.configuration).previous_stage_name
        if stage is not None and previous_stage_folder is None:
            yield (
                f"{model.configuration} is a cascade and needs predictions of {stage} for the training cases. Make "
                f"them with nnUNetv2_predict -d {name} -c {stage} -i {dataset_folder / 'imagesTr'} -o FOLDER, and add "
                f"-prev_stage_predictions FOLDER."
            )
        if stage is None and previous_stage_folder is not None:
            yield f"{model.configuration} is not a cascade; leave -prev_stage_predictions out."
    for place, what in ((previous_stage_folder, "prediction of the previous stage"), (reference_folder, "reference")):
        if place is not None:
            for case in cases:
                path = Path(place) / f"{case.case_id}{ending}"
                if not path.is_file():
                    yield f"{path} is missing; expected the {what} for case {case.case_id}."


# --- prediction -----------------------------------------------------------------------------------------------------


def _predictor(
    model: TrainedModel, folder: Path, folds: Sequence[Fold], device: str, mirroring: bool, step_size: float
) -> nnUNetPredictor:
    predictor = load_predictor(
        folder, folds, model.checkpoint, device=device, mirroring=mirroring, step_size=step_size, progress=False
    )
    if predictor.trainer_name != model.trainer:
        raise InputError([f"{folder} was trained by {predictor.trainer_name}; expected {model.trainer}."])
    return predictor


@dataclass(frozen=True)
class _Output:
    """Arguments of `_write_case`."""

    logits: NDArray[Any]
    properties: Mapping[str, Any]
    plans_manager: Any
    configuration_manager: Any
    dataset_json: Mapping[str, Any]
    case: TrainingCase
    path: Path


def _predict_groups(
    predictors: Sequence[nnUNetPredictor],
    groups: Sequence[Sequence[TrainingCase]],
    output: Path,
    ending: str,
    previous_stage_folder: Path | None,
    preprocessing_processes: int,
    export_processes: int,
) -> Iterator[str]:
    """Predict each group of cases with its predictor, and yield the id of each case once it is written."""
    import multiprocessing

    with contextlib.ExitStack() as stack:
        pool: ProcessPoolExecutor | None = None
        if export_processes:
            context = multiprocessing.get_context("spawn")
            pool = stack.enter_context(ProcessPoolExecutor(export_processes, mp_context=context))
        running: set[Future[str]] = set()
        for predictor, cases in zip(predictors, groups, strict=True):
            by_id = {case.case_id: case for case in cases}
            for case_id, data, properties in _preprocessed(
                predictor, cases, ending, previous_stage_folder, preprocessing_processes
            ):
                logits = predict_logits(predictor, data, by_id[case_id].images[0]).numpy()
                job = _Output(
                    logits,
                    properties,
                    predictor.plans_manager,
                    predictor.configuration_manager,
                    predictor.dataset_json,
                    by_id[case_id],
                    output / f"{case_id}{ending}",
                )
                if pool is None:
                    yield _write_case(job)
                    continue
                # Logits are large, so limit the number of cases that wait for a worker.
                while len(running) >= export_processes + 2:
                    done, running = wait(running, return_when=FIRST_COMPLETED)
                    yield from (future.result() for future in done)
                running.add(pool.submit(_write_case, job))
            # Free device memory for the next predictor's network.
            predictor.network.cpu()
        while running:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in done)


def _preprocessed(
    predictor: nnUNetPredictor,
    cases: Sequence[TrainingCase],
    ending: str,
    previous_stage_folder: Path | None,
    processes: int,
) -> Iterator[tuple[str, Any, Mapping[str, Any]]]:
    """Yield case id, network input and properties of each case, preprocessed as in nnUNetv2_predict."""
    import torch
    from nnunetv2.inference.data_iterators import preprocessing_iterator_fromfiles
    from nnunetv2.utilities.label_handling.label_handling import convert_labelmap_to_one_hot

    images = [[str(path) for path in case.images] for case in cases]
    previous = [
        None if previous_stage_folder is None else str(previous_stage_folder / f"{case.case_id}{ending}")
        for case in cases
    ]
    if processes:
        for item in preprocessing_iterator_fromfiles(
            images,
            previous,
            [case.case_id for case in cases],
            predictor.plans_manager,
            predictor.dataset_json,
            predictor.configuration_manager,
            processes,
            predictor.device.type == "cuda",
        ):
            yield item["ofile"], item["data"], item["data_properties"]
        return
    preprocessor = predictor.configuration_manager.preprocessor_class(verbose=False)
    for case, files, stage in zip(cases, images, previous, strict=True):
        data, labels, properties = preprocessor.run_case(
            files, stage, predictor.plans_manager, predictor.configuration_manager, predictor.dataset_json
        )
        if stage is not None:
            one_hot = convert_labelmap_to_one_hot(labels[0], predictor.label_manager.foreground_labels, data.dtype)
            data = np.vstack((data, one_hot))
        yield case.case_id, torch.from_numpy(data).float(), properties


def _write_case(job: _Output) -> str:
    from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape

    manager = job.plans_manager.get_label_manager(job.dataset_json)
    prediction = convert_predicted_logits_to_segmentation_with_correct_shape(
        job.logits, job.plans_manager, job.configuration_manager, manager, job.properties
    )
    reader_writer = job.plans_manager.image_reader_writer_class
    labels = read_labels(job.case.labels, reader_writer)
    try:
        merged = merge(labels.voxels, prediction, manager.ignore_label)
    except ValueError as error:
        raise InputError(f"{job.case.labels} and its prediction do not fit each other: {error}") from error
    write_labels(job.path, merged, labels.properties, reader_writer)
    return job.case.case_id


def _with_bar(case_ids: Iterator[str], total: int, progress: bool) -> Iterator[str]:
    from tqdm import tqdm

    yield from tqdm(case_ids, total=total, desc="Predicting", unit="case", disable=not progress or not total)


def _dense_dataset_json(dataset_json: Mapping[str, Any], cases: int) -> dict[str, Any]:
    content = {key: value for key, value in dataset_json.items() if key != "dataset"}
    content["labels"] = {key: value for key, value in content["labels"].items() if key != IGNORE}
    content["numTraining"] = cases
    return content


def _checkpoint_times(model: TrainedModel, name: str) -> dict[str, str]:
    """Return when each fold's checkpoint was written, to recognise a model that was retrained under the same name."""
    from datetime import datetime, timezone

    folder = model.folder(name)
    files = {} if folder is None else {str(fold): folder / f"fold_{fold}" / model.checkpoint for fold in model.folds}
    return {
        fold: datetime.fromtimestamp(file.stat().st_mtime, timezone.utc).isoformat(timespec="seconds")
        for fold, file in files.items()
        if file.is_file()
    }
