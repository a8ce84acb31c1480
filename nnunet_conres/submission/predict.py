"""Predicts cases in the layout of a BraTS challenge, and writes what the challenge wants of them."""

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
"""File in the output folder that tells what became of every case."""


@dataclass
class Predictions:
    """What `predict_brats` did.

    Attributes:
        written: Files in the output folder, by case.
        failed: What kept a case from being predicted, by case.
        missing: The channels that a predicted case lacks.
        seconds: From a case's images to its file.
        warnings: What the user should know.
    """

    written: dict[str, str] = field(default_factory=dict)
    failed: dict[str, tuple[str, ...]] = field(default_factory=dict)
    missing: dict[str, tuple[str, ...]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def as_json(self, **about: Any) -> dict[str, Any]:
        """For programs.

        Args:
            about: Further entries, which come first.
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
    """Predict the cases of a BraTS challenge, one file CASE.nii.gz each, with its labels and in the case's geometry.

    What is wrong with the model, or with the cases altogether, is raised before anything is predicted. What is wrong
    with single cases fails these alone. After every case a JSON file in the output folder says what was written and
    what failed.

    Args:
        input_folder: With a folder for each case. Nothing is written to it.
        output_folder: May exist. Files of cases of the same names are replaced.
        model_folder: nnU-Net's folder of a trained model, or that of `package_model`.
        scheme: The challenge: a scheme's name, or a TOML file that describes one; by default that of the model's data
            set.
        folds: Folds whose predictions are averaged; by default all that the model has.
        checkpoint: Name of the file in a fold's folder.
        missing: "zero" predicts cases that lack modalities with zero images in their place, "refuse" fails them; by
            default those are predicted that lack what training cases lacked too, and all if the trainer drops channels.
        postprocessing: What is done to the label maps: the file of ``nnunet-conres postprocess fit``.
        device: cuda, cpu or mps; by default cuda where there is one, else cpu.
        mirroring: Whether predictions of mirrored images are averaged, where the model was trained for it.
        step_size: Of the sliding window, in patches.
        progress: Whether to show a progress bar on stderr.

    Raises:
        InputError: Nothing was predicted. Lists all that is wrong.
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
    # Those that may not be predicted fail one by one. As held out, for nothing is trained on them.
    found = find_cases([], held_out_folders=[source], selection=challenge.selection, missing="zero")
    errors += found.errors
    if not found.cases:  # rather the scheme is wrong than every case
        errors += found.foreign_errors
    if errors:
        raise InputError(errors)

    # Labels, where there are any, are not looked at.
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
        for name in done.failed:  # of an earlier run
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
    """The GPU where there is one, else the CPU."""
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
    """What each case is called: as its own folder, where that is named as the challenge names cases, else by its id.

    Challenges want the folder's name back, which has been longer than the id of the files in it.
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
    """What is wrong with single cases, by their names.

    Warnings go to `done`: files beside a complete case that are none of it, and folders with the images of another id.
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
    """The channels that a case may lack."""
    if missing == "zero" or (missing is None and drops_channels(trainer)):
        return frozenset(challenge.scheme.layout.channels)
    return frozenset() if missing == "refuse" else frozenset(challenge.missing)


def _absent(case: Case, challenge: Challenge) -> str:
    trained = ", ".join(challenge.missing) or "none"
    return (
        f"{case.first_image.parent} lacks {' and '.join(case.missing)}; training cases of this model lacked {trained}. "
        f"Add the file; or train a ..._ChannelDropout, or on cases of brats-convert --missing zero, which lack it too; "
        f"--missing zero predicts the case all the same."
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
    """Predict cases, the next one being read meanwhile: the seconds that each took, or what failed it."""
    from tqdm import tqdm

    def submit(number: int) -> Future[Any] | None:
        return pool.submit(_prepared, cases[number], predictor) if number < len(cases) else None

    # What nnU-Net prints is no result.
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
            except Exception as error:  # whatever it is, the other cases are predicted
                if pending is current:
                    pending = submit(number + 1)
                target.unlink(missing_ok=True)  # of an earlier run
                yield case, _messages(case, error)


def _messages(case: Case, error: Exception) -> tuple[str, ...]:
    if isinstance(error, InputError):
        return error.errors
    traceback.print_exception(error, file=sys.stderr)
    return (f"{case.first_image.parent}: {type(error).__name__}: {short_message(error)}.",)


def _prepared(case: Case, predictor: nnUNetPredictor) -> tuple[Any, Mapping[str, Any]]:
    """A case as the network takes it, and what nnU-Net has to know to put the prediction back."""
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
    """Predict a case, and write it as the challenge wants it."""
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
