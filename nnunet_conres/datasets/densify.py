"""Dense volumes for sparsely annotated training cases: annotated voxels as they are, the others predicted.

Source: Çiçek et al., 3D U-Net, MICCAI 2016, the semi-automated use: a network trained on the annotated slices of some
volumes labels all other slices of these very volumes.
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
"""File in the output folder that tells which model made it."""


@dataclass(frozen=True)
class TrainedModel(Model):
    """A trained nnU-Net model, as nnUNetv2_predict names it.

    Attributes:
        folds: Folds whose predictions are averaged.
        checkpoint: Name of the checkpoint file.
    """

    folds: tuple[Fold, ...]
    checkpoint: str = DEFAULT_CHECKPOINT


@dataclass(frozen=True)
class Densification:
    """What `densify` wrote.

    Attributes:
        output_folder: Holds a label file per case, dataset.json and plans.json.
        cases: All cases, sorted by id.
        files: The label file of each, by case id.
        written: Ids of the cases written now; the others were there already.
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
    """Predict the training cases of a sparsely annotated data set and keep what is annotated.

    The prediction is nnU-Net's own, the same as nnUNetv2_predict's. Files have the geometry and the format of the
    annotation, and get their names only when complete.

    Args:
        dataset: Number or name of a data set in nnUNet_raw with an ignore label.
        model: What to predict with, trained on that data set.
        output_folder: Gets a label file per case; created if need be.
        device: "cuda", "cpu" or "mps".
        mirroring: Whether to average over mirrored images (test-time augmentation).
        step_size: Step of the sliding window in patches, above 0 and at most 1.
        cross_validation: Predict each case with those folds only that had it in their validation set, which have not
            seen its annotated slices, instead of with all folds.
        previous_stage_folder: For a cascade: predictions of the stage before, one per case.
        reference_folder: If given, must have a label file for each case; for figures drawn afterwards.
        existing: What to do with an output folder that is not empty: refuse it, overwrite the cases' files, or
            continue, which leaves complete files of the same model and options as they are.
        preprocessing_processes: As -npp of nnUNetv2_predict; 0 for none but this one.
        export_processes: As -nps of nnUNetv2_predict; 0 for none but this one.
        progress: Whether to show progress bars on stderr.

    Returns:
        What was written.

    Raises:
        InputError: Something is wrong with the data set, the model or the arguments. Lists all that was found.
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
            f"{dataset_folder} has {len(cases)} training cases, but its dataset.json says numTraining {expected}. Put "
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

    # Before anything is written, because whatever nnU-Net has against the model comes up there.
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
        # Once more, since another run may have written there while this one checked.
        errors = list(_output_errors(output, dataset_folder, cases, existing, record))
        if errors:
            raise InputError(errors)
        before = {path.name for path in output.iterdir()}
        try:
            with file_errors(output):
                if existing == "overwrite":
                    # What is left of another model would pass for this one's if this run were interrupted and
                    # continued.
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
                # As it was, so that the same command can be given again.
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
    """Annotated voxels as they are, all others as predicted.

    Args:
        labels: Label map, sparsely annotated.
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
                f"Fold {fold} has no {model.checkpoint} in {folder}, only {', '.join(others)}: its training has not "
                f"come to the end. Finish it with {command} --c, or take another checkpoint with -chk {others[-1]}."
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
                f"{dataset_json.get(key)}. Preprocess and train anew."
            )


def _by_validation_fold(
    model: TrainedModel, name: str, cases: Sequence[TrainingCase]
) -> tuple[dict[tuple[Fold, ...], list[TrainingCase]], list[str]]:
    """The cases grouped by those of the model's folds that have them in their validation set."""
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
        f"Case {case.case_id} is in the validation set of none of the folds {' '.join(map(str, model.folds))}; give "
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
        yield f"{output} is not a folder; expected one to write to."
        return
    inputs = {path.parent.resolve() for case in cases for path in (case.labels, *case.images)}
    raw = dataset_folder.resolve().parent
    if output.resolve() in inputs or raw in (output.resolve(), *output.resolve().parents):
        yield f"{output} holds files of a data set in {raw}; choose another -o."
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
    """What is wrong with the folders that hold a file per case beside the data set's own."""
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
            yield f"{model.configuration} is no cascade; leave -prev_stage_predictions out."
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
    """What one process needs to turn logits into a case's file."""

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
    """Predicts groups of cases, each with its predictor, and yields the id of each case that is written."""
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
                # Logits are large: not more of them may wait than the workers soon get to.
                while len(running) >= export_processes + 2:
                    done, running = wait(running, return_when=FIRST_COMPLETED)
                    yield from (future.result() for future in done)
                running.add(pool.submit(_write_case, job))
            # Off the device, where the next fold's network needs the room.
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
    """Case id, network input and properties of each case, as nnUNetv2_predict preprocesses them."""
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
    """When each fold's checkpoint was written: a model trained anew under the same name is another one."""
    from datetime import datetime, timezone

    folder = model.folder(name)
    files = {} if folder is None else {str(fold): folder / f"fold_{fold}" / model.checkpoint for fold in model.folds}
    return {
        fold: datetime.fromtimestamp(file.stat().st_mtime, timezone.utc).isoformat(timespec="seconds")
        for fold, file in files.items()
        if file.is_file()
    }
