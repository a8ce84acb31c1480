"""Record the raw files of preprocessed data and fingerprints, and check whether the raw files are still the same.

The record of a case is stored in its properties, in the .pkl file that nnU-Net writes next to the data. The record of a
fingerprint is stored in its JSON file. A program that computes them again, such as nnU-Net itself, overwrites these
files and thereby removes the old record.
"""

from __future__ import annotations

import filecmp
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from nnunet_conres.datasets.fingerprint import SOURCES
from nnunet_conres.datasets.raw import TrainingCase, find_training_cases, read_dataset_json
from nnunet_conres.errors import InputError
from nnunet_conres.files import write_json
from nnunet_conres.folders import list_files
from nnunet_conres.text import first_few
from nnunet_conres.unpickling import read_pickle

RECORD: Final = SOURCES
"""Key of the record in a case's properties, and in a fingerprint."""

GT_SEGMENTATIONS: Final = "gt_segmentations"
"""Folder next to the preprocessed data with copies of the label files, which nnU-Net makes after preprocessing."""

_TIMES: Final = ("modified", "changed")


def files_of(case: TrainingCase, *, digest: bool = True) -> list[dict[str, Any]]:
    """Return size, times and checksum of a case's raw files: its images in order, then its labels.

    Args:
        case: The case.
        digest: Whether to read the files and compute a checksum of their content.

    Returns:
        An entry per file: "name", "size" in bytes, "modified" and "changed" in nanoseconds since 1970, and "digest" if
        requested. "changed" is the time when the system last recorded a change; no program can set it.
    """
    entries = []
    for path in (*case.images, case.labels):
        # Before the content is read, so that a file that changes in the meantime differs from this entry.
        status = path.stat()
        entry = {
            "name": path.name,
            "size": status.st_size,
            "modified": status.st_mtime_ns,
            "changed": status.st_ctime_ns,
        }
        entries.append(entry | ({"digest": _digest(path)} if digest else {}))
    return entries


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


@dataclass(frozen=True)
class Judgement:
    """Whether a preprocessed case still matches its raw files.

    Attributes:
        changed: A certain difference; empty if there is none.
        uncertain: A possible difference; empty if there is none.
        record: A record with the files' current times, if only the times changed and not the content.
    """

    changed: str = ""
    uncertain: str = ""
    record: dict[str, Any] | None = None


def judge(
    case: TrainingCase,
    properties: Mapping[str, Any],
    properties_file: Path,
    copy_of_labels: Path,
    *,
    with_images: bool,
) -> Judgement:
    """Compare raw files with the record of a preprocessed case or, without a record, with nnU-Net's own files.

    Args:
        case: The current raw files.
        properties: Properties of the preprocessed case.
        properties_file: File of the properties.
        copy_of_labels: The label file in gt_segmentations; it may be missing.
        with_images: Whether to read images whose times differ but whose sizes are equal. Labels are always read then.
    """
    record = properties.get(RECORD)
    if record is None:
        return _judge_without_record(case, properties_file, copy_of_labels)
    now, then = files_of(case, digest=False), record["files"]
    if len(now) != len(then):
        return Judgement(changed=f"{len(now) - 1} images, {len(then) - 1} when it was preprocessed")
    uncertain, has_new_times = "", False
    for path, entry, before in zip((*case.images, case.labels), now, then, strict=True):
        if entry["size"] != before["size"]:
            return Judgement(changed=f"{path.name} has another size")
        if all(entry[time] == before[time] for time in _TIMES):
            continue
        if not with_images and path != case.labels:
            # Copying a data set with its times changes only "changed"; writing changes both times.
            uncertain = uncertain or (
                f"{path.name} has another modification time" if entry["modified"] != before["modified"] else ""
            )
            continue
        if _digest(path) != before["digest"]:
            return Judgement(changed=f"{path.name} has another content")
        has_new_times = True
    if not has_new_times or uncertain or not with_images:
        return Judgement(uncertain=uncertain)
    files = [entry | {"digest": before["digest"]} for entry, before in zip(now, then, strict=True)]
    return Judgement(record={**record, "files": files})


def _judge_without_record(case: TrainingCase, properties_file: Path, copy_of_labels: Path) -> Judgement:
    """Compare label files with nnU-Net's copies. nnU-Net does not copy images, so compare only their times."""
    if copy_of_labels.is_file() and not filecmp.cmp(case.labels, copy_of_labels, shallow=False):
        return Judgement(changed=f"{case.labels.name} differs from its copy in {GT_SEGMENTATIONS}")
    made = properties_file.stat().st_mtime_ns
    for path in (*case.images, case.labels):
        if path.stat().st_mtime_ns > made:
            return Judgement(uncertain=f"{path.name} is newer than the preprocessed case")
    return Judgement()


# --- start of a training ----------------------------------------------------------------------------------------------


def training_data_errors(
    raw: Path, preprocessed: Path, data: Path, settings: Mapping[str, Any]
) -> tuple[list[str], list[str]]:
    """Check at the start of a training whether preprocessed data still match the raw data and the plans.

    Args:
        raw: Folder of the raw data set. On a cluster it may be missing; then nothing is checked.
        preprocessed: Folder of the preprocessed data set.
        data: Folder in it with the cases to train on.
        settings: The plans' settings that determine the data.

    Returns:
        Messages about certain differences and messages about possible differences, one for each kind.
    """
    dataset_json = read_dataset_json(raw)[0] if raw.is_dir() else None
    cases = {case.case_id: case for case in find_training_cases(raw, dataset_json)[0]} if dataset_json else {}
    if dataset_json is None or not cases:
        return [], []
    copies, ending = preprocessed / GT_SEGMENTATIONS, dataset_json["file_ending"]
    gone, changed, other_plans, uncertain = [], [], [], []
    for case_id in cases_in(data):
        if case_id not in cases:
            gone.append(case_id)
            continue
        path = data / f"{case_id}.pkl"
        try:
            properties = read_pickle(path)
            judgement = judge(cases[case_id], properties, path, copies / f"{case_id}{ending}", with_images=False)
        except InputError:
            continue  # nnU-Net reports it if it trains on this case
        if judgement.changed:
            changed.append(f"{case_id} ({judgement.changed})")
        elif judgement.uncertain:
            uncertain.append(f"{case_id} ({judgement.uncertain})")
        record = properties.get(RECORD)
        if record is not None and record["settings"] != settings:
            other_plans.append(case_id)
    certain = [
        (changed, f"The raw files of {len(changed)} cases in {raw} changed after they were preprocessed: "),
        (gone, f"{len(gone)} cases in {data} are not in {raw}: "),
        (other_plans, f"{len(other_plans)} cases in {data} were preprocessed for other plans: "),
    ]
    warning = f"The raw files of {len(uncertain)} cases in {raw} may have changed after they were preprocessed: "
    return (
        [f"{message}{first_few(names, 10)}." for names, message in certain if names],
        [f"{warning}{first_few(uncertain, 10)}."] if uncertain else [],
    )


def cases_in(data: Path) -> list[str]:
    """Return the ids of all cases with any file in a folder of preprocessed data, as nnU-Net finds them."""
    endings = ("_seg.b2nd", ".b2nd", ".npz", ".pkl")
    names = [path.name for path in list_files(data, endings)] if data.is_dir() else []
    found = (next((name[: -len(ending)] for ending in endings if name.endswith(ending)), "") for name in names)
    return sorted({case_id for case_id in found if case_id})


# --- fingerprints -----------------------------------------------------------------------------------------------------


def sizes_and_times(cases: Iterable[TrainingCase]) -> dict[str, list[list[int]]]:
    """Return size and times of each raw file, by case id."""
    return {
        case.case_id: [[entry["size"], *(entry[time] for time in _TIMES)] for entry in files_of(case, digest=False)]
        for case in cases
    }


def fingerprint_differences(
    fingerprint_file: Path, cases: Sequence[TrainingCase], *, is_copy_different: bool
) -> list[str]:
    """Return the differences between the raw data and the files that a fingerprint was computed from.

    Args:
        fingerprint_file: nnU-Net's dataset_fingerprint.json.
        cases: The current training cases.
        is_copy_different: Whether files that were copied, moved or unpacked in the meantime count as different. Their
            size and modification time are unchanged, but this is also possible if another data set was unpacked in
            place of the first.

    Returns:
        Messages, one per case that differs; empty if there is no difference.
    """
    try:
        fingerprint = json.loads(fingerprint_file.read_text(encoding="utf-8"))
    except ValueError as error:  # truncated, because nnU-Net was killed while writing
        return [f"it can't be read: {error}"]
    end = None if is_copy_different else -1
    now = {case_id: [file[:end] for file in files] for case_id, files in sizes_and_times(cases).items()}
    record = fingerprint.get(RECORD)
    if record is None:
        number = len(fingerprint.get("spacings", ()))
        if number != len(now):
            return [f"it was extracted from {number} cases, but there are {len(now)} now"]
        made = fingerprint_file.stat().st_mtime_ns
        newer = [case_id for case_id, files in now.items() if any(max(times) > made for _, *times in files)]
        return [f"files of {case_id} are newer" for case_id in newer]
    then = {case_id: [file[:end] for file in files] for case_id, files in record.items()}
    return [
        *(f"{case_id} is gone" for case_id in then if case_id not in now),
        *(f"{case_id} is new" for case_id in now if case_id not in then),
        *(f"files of {case_id} changed" for case_id in now if case_id in then and now[case_id] != then[case_id]),
    ]


def note_in_fingerprint(fingerprint_file: Path, files: Mapping[str, list[list[int]]]) -> None:
    """Record in a new fingerprint the raw files it was computed from; nnU-Net ignores the entry.

    Args:
        fingerprint_file: nnU-Net's dataset_fingerprint.json.
        files: Result of `sizes_and_times` from before the fingerprint was computed.
    """
    fingerprint = json.loads(fingerprint_file.read_text(encoding="utf-8"))
    write_json(fingerprint_file, fingerprint | {RECORD: files})
