"""Predict cases in the layout of a BraTS challenge, and write the predictions in its format."""

from __future__ import annotations

import contextlib
import sys
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from nnunet_conres.case_ids import why_unsafe
from nnunet_conres.datasets.brats_check import check_case
from nnunet_conres.datasets.brats_export import Prediction, export_case
from nnunet_conres.datasets.brats_find import Case, Found, Missing, find_cases, nifti_files
from nnunet_conres.datasets.brats_write import Job, case_files, write_case
from nnunet_conres.errors import InputError, file_errors
from nnunet_conres.evaluation.postprocessing import Postprocessing
from nnunet_conres.files import write_json
from nnunet_conres.folders import visible
from nnunet_conres.predictor import DEFAULT_CHECKPOINT, load_predictor, predict_logits, trained_folds
from nnunet_conres.submission.models import FILE_ENDING, Challenge, challenge_of, drops_channels, postprocessing_for
from nnunet_conres.text import short_message

if TYPE_CHECKING:
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

RECORD: Final = "predict-brats.json"
"""File in the output folder with the result of every case."""


@dataclass
class Predictions:
    """Result of `predict_brats`.

    Attributes:
        written: Files in the output folder, by case.
        failed: Errors of the failed cases, by case.
        missing: Channels that a predicted case lacks, by case.
        seconds: Time from a case's images to its file, by case.
        warnings: Messages for the user.
    """

    written: dict[str, str] = field(default_factory=dict)
    failed: dict[str, tuple[str, ...]] = field(default_factory=dict)
    missing: dict[str, tuple[str, ...]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def as_json(self, **about: Any) -> dict[str, Any]:
        """Return the result as JSON content.

        Args:
            about: Further entries, placed first.
        """
        cases = {
            name: {
                "file": file,
                "seconds": round(self.seconds[name], 1),
                **({"missing": list(self.missing[name])} if name in self.missing else {}),
            }
            for name, file in self.written.items()
        }
        failed = {name: list(messages) for name, messages in self.failed.items()}
        return {**about, "failed": failed, "written": cases, "warnings": self.warnings}


def predict_brats(
    input_folder: str | Path,
    output_folder: str | Path,
    model_folder: str | Path,
    *,
    scheme: str | None = None,
    folds: Sequence[int | str] | None = None,
    checkpoint: str = DEFAULT_CHECKPOINT,
    missing: Missing | None = None,
    postprocessing: str | Path | None = None,
    device: str | None = None,
    mirroring: bool = True,
    step_size: float = 0.5,
    progress: bool = True,
) -> Predictions:
    """Predict the cases of a BraTS challenge: one file CASE.nii.gz each, with its labels and in the case's geometry.

    Errors in the model, or in the input as a whole, are raised before anything is predicted. An error in a single case
    fails only that case. After every case, a JSON file in the output folder lists the written and the failed cases.

    Args:
        input_folder: Contains a folder for each case. Nothing is written to it.
        output_folder: May exist. Files of cases with the same names are replaced.
        model_folder: nnU-Net's folder of a trained model, or the model folder written by `package_model`.
        scheme: The challenge: name of a scheme, or a TOML file that describes one; by default the scheme of the model's
            data set.
        folds: Folds whose predictions are averaged; by default all folds of the model.
        checkpoint: Name of the checkpoint file in a fold's folder.
        missing: "zero" predicts cases that lack modalities, with zero images in their place. "refuse" fails them. By
            default, a case may lack the modalities that training cases lacked, or any if the trainer drops channels.
        postprocessing: Post-processing of the label maps: file written by ``nnunet-conres postprocess fit``.
        device: cuda, cpu or mps; by default cuda if available, otherwise cpu.
        mirroring: Whether to average predictions of mirrored images, if the model was trained with mirroring.
        step_size: Step of the sliding window, in patches.
        progress: Whether to show a progress bar on stderr.

    Raises:
        InputError: Nothing was predicted. Lists all errors.
    """
    source, output, model = Path(input_folder), Path(output_folder), Path(model_folder)
    errors = list(_folder_errors(source, output))
    try:
        predictor = load_predictor(
            model,
            trained_folds(model, checkpoint) or (0,) if folds is None else folds,
            checkpoint,
            device=default_device() if device is None else device,
            mirroring=mirroring,
            step_size=step_size,
            progress=False,
        )
        if predictor.configuration_manager.previous_stage_name is not None:
            errors.append(f"{model} is the second stage of a cascade, which is not supported; take another model.")
    except InputError as error:
        errors += error.errors
    challenge: Challenge | None = None
    if (model / "dataset.json").is_file():
        try:
            challenge = challenge_of(model, scheme)
        except InputError as error:
            errors += error.errors
    rules: Postprocessing | None = None
    if postprocessing is not None:
        try:
            rules = postprocessing_for(postprocessing, model)
        except InputError as error:
            errors += error.errors
    if challenge is None or not source.is_dir():
        raise InputError(errors)
    # "zero" finds all cases; those that lack too many channels fail one by one below. The cases count as held out,
    # because nothing is trained on them.
    found = find_cases([], held_out_folders=[source], selection=challenge.selection, missing="zero")
    errors += found.errors
    if not found.cases:  # then the scheme is probably wrong, not every case
        errors += found.foreign_errors
    if errors:
        raise InputError(errors)

    # Labels are ignored.
    names = _names([replace(case, labels=None) for case in found.cases], source)
    done = Predictions(warnings=list(challenge.warnings))
    failed = _failures(found, names, source, challenge, done)
    taken = Counter(name.casefold() for name in names.values())
    allowed = _may_lack(challenge, predictor.trainer_name, missing)
    cases = []
    for case, name in names.items():
        if case.case_id.casefold() in found.doubled:
            continue
        if taken[name.casefold()] > 1:
            failed[name].append(f"{case.first_image.parent}: {name} occurs more than once; rename one of the folders.")
        elif not allowed.issuperset(case.missing):
            failed[name].append(_absent(case, challenge))
        else:
            cases.append(case)
    done.failed = {name: tuple(messages) for name, messages in failed.items()}

    def record() -> None:
        from nnunet_conres import __version__

        content = done.as_json(
            version=__version__,
            scheme=challenge.scheme.name,
            model={
                "trainer": predictor.trainer_name,
                "plans": predictor.plans_manager.plans_name,
                "data_set": predictor.plans_manager.dataset_name,
                "folds": len(predictor.list_of_parameters),
            },
            postprocessing=None if rules is None or rules.source is None else rules.source.name,
            device=predictor.device.type,
        )
        write_json(output / RECORD, content)

    with file_errors(output):
        output.mkdir(parents=True, exist_ok=True)
        for name in done.failed:  # remove predictions of an earlier run
            if not why_unsafe(name):
                (output / f"{name}{FILE_ENDING}").unlink(missing_ok=True)
    record()
    for case, result in _predict(cases, names, output, predictor, challenge, rules, progress):
        name = names[case]
        if isinstance(result, float):
            done.written[name], done.seconds[name] = f"{name}{FILE_ENDING}", result
            if case.missing:
                done.missing[name] = case.missing
        else:
            done.failed[name] = result
        record()
    return done


def default_device() -> str:
    """Return "cuda" if available, otherwise "cpu"."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _folder_errors(source: Path, output: Path) -> Iterator[str]:
    if not source.is_dir():
        yield f"{source} is not a folder; expected a folder with a folder for each case."
    if output.exists() and not output.is_dir():
        yield f"{output} is a file; expected a folder for the predictions, or a new name."
    if output.resolve().is_relative_to(source.resolve()):
        yield f"{output} lies in the input folder {source}; choose an output folder outside of it."


def _names(cases: Sequence[Case], source: Path) -> dict[Case, str]:
    """Return the name of each case: its folder's name if the challenge names cases so, otherwise the case id.

    Challenges expect the folder's name, which in some years was longer than the id in the file names.
    """
    shared = Counter(case.first_image.parent.resolve() for case in cases)
    shared[source.resolve()] += 2

    def name(case: Case) -> str:
        folder = case.first_image.parent
        own = shared[folder.resolve()] == 1 and not case.scheme.layout.has_folders
        return folder.name if own and case.scheme.may_be(folder.name) and not why_unsafe(folder.name) else case.case_id

    return {case: name(case) for case in cases}


def _failures(
    found: Found, names: Mapping[Case, str], source: Path, challenge: Challenge, done: Predictions
) -> dict[str, list[str]]:
    """Return the errors of single cases, by name.

    Warnings are added to `done`: files beside a complete case that do not belong to it, and folders whose images have
    another id.
    """
    failed: dict[str, list[str]] = defaultdict(list)
    folders = {image.parent.resolve(): name for case, name in names.items() for image in case.images if image}
    for case, name in names.items():
        if not name.casefold().startswith(case.case_id.casefold()):
            done.warnings.append(f"{case.first_image.parent} has the images of {case.case_id}; predicted as {name}.")
    for where, messages in found.bad.items():
        path = Path(where)
        if not path.is_file():
            failed[path.name] += messages
        elif path.parent.resolve() in folders:
            done.warnings += messages
        else:
            of_folder = path.parent.resolve() != source.resolve()
            failed[path.parent.name if of_folder else path.name] += messages
    for reason, places in found.foreign.items():
        for place in places:
            failed[Path(place).name].append(f"{place} {reason}.")
    expected = challenge.scheme.layout.expected()
    for folder in visible(source):
        of_case = folder.is_dir() and challenge.scheme.may_be(folder.name) and folder.name not in failed
        if of_case and not any(nifti_files(folder)):
            failed[folder.name].append(f"{folder} has no image; expected {expected} in the folder of a case.")
    return failed


def _may_lack(challenge: Challenge, trainer: str, missing: Missing | None) -> frozenset[str]:
    """Return the channels that a case may lack."""
    if missing == "zero" or (missing is None and drops_channels(trainer)):
        return frozenset(challenge.scheme.layout.channels)
    return frozenset() if missing == "refuse" else frozenset(challenge.missing)


def _absent(case: Case, challenge: Challenge) -> str:
    trained = ", ".join(challenge.missing) or "none"
    return (
        f"{case.first_image.parent} lacks {' and '.join(case.missing)}; training cases of this model lacked {trained}. "
        f"Add the file, or predict the case anyway with --missing zero. For such cases, train a ..._ChannelDropout, or "
        f"convert training cases with brats-convert --missing zero."
    )


# --- case by case ---------------------------------------------------------------------------------------------------


def _predict(
    cases: Sequence[Case],
    names: Mapping[Case, str],
    output: Path,
    predictor: nnUNetPredictor,
    challenge: Challenge,
    rules: Postprocessing | None,
    progress: bool,
) -> Iterator[tuple[Case, float | tuple[str, ...]]]:
    """Predict cases, and read the next one meanwhile. Yield the seconds that each case took, or its errors."""
    from tqdm import tqdm

    def submit(number: int) -> Future[Any] | None:
        return pool.submit(_prepared, cases[number], predictor) if number < len(cases) else None

    # nnU-Net's output goes to stderr, because it is not a result.
    with ThreadPoolExecutor(1) as pool, contextlib.redirect_stdout(sys.stderr):
        pending = submit(0)
        for number, case in enumerate(tqdm(cases, desc="Predicting", unit="case", disable=not progress)):
            assert pending is not None
            current, target = pending, output / f"{names[case]}{FILE_ENDING}"
            try:
                begin = time.monotonic()
                data, properties = current.result()
                pending = submit(number + 1)
                _write(case, data, properties, target, predictor, challenge, rules)
                yield case, time.monotonic() - begin
            except Exception as error:  # no error may stop the other cases
                if pending is current:
                    pending = submit(number + 1)
                target.unlink(missing_ok=True)  # may be from an earlier run
                yield case, _messages(case, error)


def _messages(case: Case, error: Exception) -> tuple[str, ...]:
    if isinstance(error, InputError):
        return error.errors
    traceback.print_exception(error, file=sys.stderr)
    return (f"{case.first_image.parent}: {type(error).__name__}: {short_message(error)}.",)


def _prepared(case: Case, predictor: nnUNetPredictor) -> tuple[Any, Mapping[str, Any]]:
    """Return a preprocessed case, and the properties that nnU-Net needs to restore its geometry."""
    import torch

    errors = check_case(case).errors
    if errors:
        raise InputError(errors)
    configuration = predictor.configuration_manager
    with tempfile.TemporaryDirectory() as folder:
        dataset = Path(folder)
        files = [dataset / file for file in case_files(case)]
        files[0].parent.mkdir()
        write_case(Job(case, dataset, "link"))
        data, _, properties = configuration.preprocessor_class(verbose=False).run_case(
            [str(file) for file in files], None, predictor.plans_manager, configuration, predictor.dataset_json
        )
    return torch.from_numpy(data).float(), properties


def _write(
    case: Case,
    data: Any,
    properties: Mapping[str, Any],
    target: Path,
    predictor: nnUNetPredictor,
    challenge: Challenge,
    rules: Postprocessing | None,
) -> None:
    """Predict a case, and write the prediction in the challenge's format."""
    from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape

    plans = predictor.plans_manager
    with_probabilities = rules is not None and rules.needs_probabilities
    converted = convert_predicted_logits_to_segmentation_with_correct_shape(
        predict_logits(predictor, data, case.first_image.parent).numpy(),
        plans,
        predictor.configuration_manager,
        predictor.label_manager,
        properties,
        return_probabilities=with_probabilities,
    )
    labels, probabilities = converted if with_probabilities else (converted, None)
    if rules is not None:
        labels = rules.apply(labels, probabilities, properties["spacing"])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"{case.case_id}{FILE_ENDING}")
        plans.image_reader_writer_class().write_seg(labels, str(path), properties)
        job = Prediction(path, challenge.table, challenge.tissues, challenge.scheme, case.first_image, 0, target)
        errors = export_case(job).errors
    if errors:
        raise InputError([error.replace(str(path), f"The prediction of {case.case_id}") for error in errors])
