"""Convert BraTS folders of any year to nnU-Net's raw format, with one channel order and one set of labels."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

from nnunet_conres.datasets.brats_check import Findings, check_case
from nnunet_conres.datasets.brats_find import Case, Missing, collection, find_cases
from nnunet_conres.datasets.brats_scheme_files import Mode
from nnunet_conres.datasets.brats_schemes import AUTO, common_label_set, select_schemes
from nnunet_conres.datasets.brats_write import (
    TRANSFERS,
    ImageMode,
    Job,
    Transfer,
    case_files,
    write_case,
    write_descriptions,
)
from nnunet_conres.datasets.raw import folder_name, id_errors, lock_of_dataset, target_errors
from nnunet_conres.errors import InputError, file_errors
from nnunet_conres.folders import check_complete, new_folder
from nnunet_conres.nnunet import RAW, folder_from_environment, not_set
from nnunet_conres.parallel import map_cases
from nnunet_conres.text import first_few


class ConversionError(InputError):
    """The input or the target does not allow a conversion; nothing was written."""


@dataclass(frozen=True)
class Conversion:
    """Result of `convert_brats`.

    Attributes:
        dataset_folder: The new folder in nnUNet_raw.
        training_ids: Cases in imagesTr and labelsTr.
        test_ids: Cases in imagesTs.
        test_label_ids: Cases in imagesTs that have labels, in labelsTs.
        schemes: Names of the schemes that the cases follow.
        transfers: Number of image files linked, copied, compressed, and split from files with several channels.
        missing: Channels written as zero images, by case.
        warnings: Warnings for the user about problems that nnU-Net does not report.
        skipped: Errors of the cases and files that were left out, by case or file.
    """

    dataset_folder: Path
    training_ids: tuple[str, ...]
    test_ids: tuple[str, ...]
    test_label_ids: tuple[str, ...]
    schemes: tuple[str, ...]
    transfers: Mapping[Transfer, int] = field(default_factory=dict)
    missing: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    skipped: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def convert_brats(
    input_folders: Sequence[str | Path],
    dataset_id: int,
    *,
    held_out_folders: Sequence[str | Path] = (),
    corrected_folders: Sequence[str | Path] = (),
    dataset_name: str = "BraTS",
    schemes: Sequence[str] = (AUTO,),
    mode: Mode = "regions",
    image_mode: ImageMode = "link",
    missing: Missing = "refuse",
    skip_bad: bool = False,
    processes: int = 1,
    raw_folder: str | Path | None = None,
    progress: bool = True,
) -> Conversion:
    """Convert BraTS folders to one nnU-Net data set.

    Labelled cases of `input_folders` go to imagesTr and labelsTr, all others to imagesTs, and the labels of held-out
    cases to labelsTs. All input is checked before anything is written. The data set gets its final name only when it is
    complete. After an interruption, the next conversion removes the incomplete data set and starts again. While a
    conversion writes, a second one for the same id is refused.

    Args:
        input_folders: Folders to search, with all subfolders.
        dataset_id: nnU-Net's id for the data set, 1 to 999.
        held_out_folders: Like `input_folders`, for cases that are not used for training.
        corrected_folders: Folders to search, with all subfolders, for corrected files, such as the corrected labels
            that challenges release. A corrected file replaces the file of the same case and modality (or the labels).
        dataset_name: Name of the data set after the id.
        schemes: Names of the schemes that the files may follow, or TOML files that describe other schemes. Several
            allow a mixture. ("auto",) accepts any scheme, but only one.
        mode: "regions" makes nnU-Net predict nested regions (whole tumour, tumour core and so on), "labels" the
            tissues.
        image_mode: "link" makes hard links where the file system allows them and copies elsewhere; "copy" always
            copies. In both modes uncompressed files are compressed, and files with several channels are split.
        missing: "zero" writes a zero image for a missing modality and records it in cases.json; "refuse" rejects such
            cases. A case without any image is always rejected.
        skip_bad: Whether to leave out cases with errors instead of refusing the conversion.
        processes: Number of processes, 1 or more.
        raw_folder: nnU-Net's raw folder; by default the value of the environment variable nnUNet_raw.
        progress: Whether to show progress bars on stderr.

    Returns:
        Description of the new data set.

    Raises:
        ConversionError: An argument or the target is invalid, which is checked before any file is read, or the input
            has errors. Lists all errors.
    """
    selection, scheme_errors = select_schemes(schemes)
    errors = list(_argument_errors(dataset_id, dataset_name, mode, image_mode, missing, processes))
    errors += scheme_errors
    raw = folder_from_environment(RAW) if raw_folder is None else Path(raw_folder)
    if raw is None:
        errors.append(not_set(RAW))
    else:
        errors += target_errors(raw, dataset_id, dataset_name)
    if errors or raw is None:
        # Report these errors at once: reading a thousand cases takes minutes.
        raise ConversionError(errors)
    found = find_cases(
        input_folders,
        held_out_folders=held_out_folders,
        corrected_folders=corrected_folders,
        selection=selection,
        missing=missing,
    )
    errors += [*found.foreign_errors, *found.errors]
    findings = list(map_cases(check_case, found.cases, max(1, processes), "Checking", progress))
    bad = {where: tuple(messages) for where, messages in found.bad.items()}
    kept: list[tuple[Case, Findings]] = []
    for case, finding in zip(found.cases, findings, strict=True):
        if finding.errors:
            bad[case.case_id] = (*bad.get(case.case_id, ()), *finding.errors)
        elif case.case_id.casefold() not in found.doubled:
            kept.append((case, finding))
    cases = [case for case, _ in kept]
    if not skip_bad:
        errors += [error for messages in bad.values() for error in messages]
        if len(bad) > 5:
            # Repeated messages are shortened, so list all incomplete cases here: --missing zero accepts them.
            incomplete = "".join(f"Without {parts}: {', '.join(ids)}. " for parts, ids in found.incomplete.items())
            errors.append(
                f"{incomplete}{len(bad)} cases or files have errors, {len(kept)} cases have none. Correct them, or "
                f"leave them out with --skip-bad."
            )
    elif bad and not cases:
        errors += [*(error for messages in bad.values() for error in messages), "No case is left to convert."]
    if errors:
        raise ConversionError(errors)
    warnings = [warning for _, finding in kept for warning in finding.warnings]
    warnings += _doubts(cases, {case.case_id: finding for case, finding in kept})

    target = raw / folder_name(dataset_id, dataset_name)
    with new_folder(target, lock=lock_of_dataset(raw, dataset_id)) as partial:
        # Check again: another process may have created the data set while the files were checked.
        errors = list(target_errors(raw, dataset_id, dataset_name, if_busy=False))
        if errors:
            raise ConversionError(errors)
        transfers = _write(partial, target.name, cases, mode, image_mode, processes, progress)
    training = tuple(case.case_id for case in cases if case.trains)
    return Conversion(
        dataset_folder=target,
        training_ids=training,
        test_ids=tuple(case.case_id for case in cases if not case.trains),
        test_label_ids=tuple(case.case_id for case in cases if case.held_out and case.labels is not None),
        schemes=tuple(scheme.name for scheme in selection.known if any(case.scheme is scheme for case in cases)),
        transfers=transfers,
        missing={case.case_id: case.missing for case in cases if case.missing},
        warnings=tuple(warnings),
        skipped=bad,
    )


def _argument_errors(
    dataset_id: int, dataset_name: str, mode: str, image_mode: str, missing: str, processes: int
) -> Iterator[str]:
    yield from id_errors(dataset_id, dataset_name)
    for what, value, known in (
        ("mode", mode, get_args(Mode)),
        ("image mode", image_mode, get_args(ImageMode)),
        ("treatment of missing modalities", missing, get_args(Missing)),
    ):
        if value not in known:
            yield f"The {what} is {value!r}; expected {' or '.join(known)}."
    if processes < 1:
        yield f"The number of processes is {processes}; expected 1 or more."


def _write(
    folder: Path, name: str, cases: Sequence[Case], mode: Mode, image_mode: ImageMode, processes: int, progress: bool
) -> dict[Transfer, int]:
    """Write the data set to a folder, and check that it is complete."""
    label_set = common_label_set(case.scheme for case in cases)
    assert label_set is not None, "mixtures without one are refused"
    files = [file for case in cases for file in case_files(case)]
    with file_errors(folder):
        for part in sorted({"imagesTr", "labelsTr", *(file.split("/")[0] for file in files)}):
            (folder / part).mkdir()
    transfers = dict.fromkeys(TRANSFERS, 0)
    jobs = [Job(case, folder, image_mode) for case in cases]
    for done in map_cases(write_case, jobs, processes, "Writing", progress):
        for transfer in done:
            transfers[transfer] += 1
    with file_errors(folder):
        write_descriptions(folder, name, cases, label_set, mode)
    check_complete(folder, files)
    return transfers


def _doubts(cases: Sequence[Case], findings: Mapping[str, Findings]) -> Iterator[str]:
    """Yield warnings about possible mistakes that show only over all cases."""
    schemes = list(dict.fromkeys(case.scheme for case in cases))
    for scheme in schemes:
        labelled = [case for case in cases if case.scheme is scheme and case.labels is not None]
        met = {value for case in labelled for value in findings[case.case_id].values}
        never = [f"{value} {tissue}" for value, tissue in scheme.labels.items() if value not in met]
        if labelled and met and never:
            yield (
                f"No label file has {' or '.join(never)}, which {scheme.called} defines. Check whether the files are "
                f"of another year, or were relabelled."
            )
    label_set = common_label_set(schemes)
    for scheme in dict.fromkeys(case.scheme for case in cases if case.labels is not None):
        lacking = [] if label_set is None else [t for t in label_set.tissues if t not in scheme.labels.values()]
        if lacking:
            yield (
                f"{scheme.called} has no label for {' or '.join(lacking)}: training treats its cases as cases without "
                f"this tissue. That is correct only if the tissue can't occur in them, for example before surgery."
            )
    labelled_folders = {collection(case) for case in cases if case.trains}
    unlabelled = [case.case_id for case in cases if case.labels is None and collection(case) in labelled_folders]
    if unlabelled:
        yield f"{first_few(unlabelled)}: no labels, although other cases have labels. They are in imagesTs."
    patients = defaultdict(list)
    for case in cases:
        # Ids of 2017 to 2020 differ only in the year if a patient was released again.
        patients[re.sub(r"^brats\d\d_", "", case.case_id.casefold())].append(case.case_id)
    again = [" and ".join(ids) for ids in patients.values() if len(ids) > 1]
    if again:
        yield f"{first_few(again)}: probably the same patient in two years' releases. Leave one out of each pair."
    trained = {case.patient for case in cases if case.trains}
    both = [case.case_id for case in cases if case.held_out and case.patient in trained]
    if both:
        yield (
            f"{first_few(both)}: held out, but other time points of the same patients are training cases. Hold out "
            f"all cases of a patient, or none."
        )
    if not any(case.trains for case in cases):
        yield "No case has labels: the data set can be used for prediction, but not for training."
