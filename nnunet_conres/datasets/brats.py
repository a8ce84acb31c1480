"""BraTS's folders into nnU-Net's raw format, whatever the year: one channel order, one set of labels."""

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
    """What `convert_brats` wrote.

    Attributes:
        dataset_folder: The new folder in nnUNet_raw.
        training_ids: Cases in imagesTr and labelsTr.
        test_ids: Cases in imagesTs.
        test_label_ids: Those of `test_ids` with labels, in labelsTs.
        schemes: Names of the schemes met.
        transfers: Number of image files linked, copied, compressed, and split from files with several channels.
        missing: The channels that are zero images, by the case that lacks them.
        warnings: What the user should know and nnU-Net does not mind.
        skipped: Errors by the case or file that was left out for them.
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

    Labelled cases of `input_folders` go to imagesTr and labelsTr, all others to imagesTs, the labels of held-out cases
    to labelsTs. Everything is checked before anything is written, and the data set gets its name only when complete:
    whatever interrupts the conversion, the next one starts anew, and clears away what this one left. While one
    conversion writes, a second one for the same number is refused.

    Args:
        input_folders: Searched with all their subfolders.
        dataset_id: nnU-Net's number for the data set, 1 to 999.
        held_out_folders: Like `input_folders`, but none of these cases is trained on.
        corrected_folders: Searched with all their subfolders for files that take the place of those of the same case
            and part, as challenges release corrected labels.
        dataset_name: The part of the data set's name after the number.
        schemes: Names of the schemes the files may follow, or TOML files that describe further ones; more than one
            allows a mixture. ("auto",) takes any scheme, but only one.
        mode: "regions" has nnU-Net predict whole tumour, tumour core and so on, which lie within each other; "labels"
            the tissues.
        image_mode: "link" makes hard links where the file system can and copies elsewhere; "copy" always copies. Files
            that are not yet compressed are compressed in both cases, and those with several channels split.
        missing: "zero" writes a zero image in place of an absent modality, and says so in cases.json; "refuse" takes no
            such case. A case without any image is never taken.
        skip_bad: Whether cases with errors are left out, instead of forbidding the conversion.
        processes: Number of processes, 1 or more.
        raw_folder: nnU-Net's raw folder; by default the value of the environment variable nnUNet_raw.
        progress: Whether to show progress bars on stderr.

    Returns:
        What was written.

    Raises:
        ConversionError: Something is wrong with the arguments or the target, which is checked before any file, or with
            the input. Lists all that was found.
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
        # Known at once, while reading a thousand cases takes minutes.
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
            # All of them, where messages of one kind are cut short: --missing zero takes them.
            incomplete = "".join(f"Without {parts}: {', '.join(ids)}. " for parts, ids in found.incomplete.items())
            errors.append(
                f"{incomplete}{len(bad)} cases or files have errors, and {len(kept)} cases have none. Correct them, or "
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
        # Once more, since another may have been made while this one's files were checked.
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
    """Write the data set to a folder, and check that all of it is there."""
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
    """What may have been meant otherwise, seen over all cases."""
    schemes = list(dict.fromkeys(case.scheme for case in cases))
    for scheme in schemes:
        labelled = [case for case in cases if case.scheme is scheme and case.labels is not None]
        met = {value for case in labelled for value in findings[case.case_id].values}
        never = [f"{value} {tissue}" for value, tissue in scheme.labels.items() if value not in met]
        if labelled and met and never:
            yield (
                f"No label file has {' or '.join(never)}, which {scheme.called} has. Look into it: are the files of "
                f"another year, or relabelled?"
            )
    label_set = common_label_set(schemes)
    for scheme in dict.fromkeys(case.scheme for case in cases if case.labels is not None):
        lacking = [] if label_set is None else [t for t in label_set.tissues if t not in scheme.labels.values()]
        if lacking:
            yield (
                f"{scheme.called} has no label for {' or '.join(lacking)}: its cases act as negatives for it. That is "
                f"right where there can be none, as before surgery, and wrong elsewhere."
            )
    labelled_folders = {collection(case) for case in cases if case.trains}
    unlabelled = [case.case_id for case in cases if case.labels is None and collection(case) in labelled_folders]
    if unlabelled:
        yield f"{first_few(unlabelled)}: no labels, beside cases that have them. Went to imagesTs."
    patients = defaultdict(list)
    for case in cases:
        # Ids of 2017 to 2020 differ in the year alone where a patient was released again.
        patients[re.sub(r"^brats\d\d_", "", case.case_id.casefold())].append(case.case_id)
    again = [" and ".join(ids) for ids in patients.values() if len(ids) > 1]
    if again:
        yield f"{first_few(again)}: probably the same patient in two years' releases. Leave one out of each pair."
    trained = {case.patient for case in cases if case.trains}
    both = [case.case_id for case in cases if case.held_out and case.patient in trained]
    if both:
        yield (
            f"{first_few(both)}: held out, and the same patients are trained on at other time points. Hold out "
            f"all cases of a patient, or none."
        )
    if not any(case.trains for case in cases):
        yield "No case has labels: the data set can be predicted, but not trained on."
