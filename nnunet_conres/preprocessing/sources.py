"""What preprocessed data and fingerprints were made from, and whether the raw files are still the same.

The record of a case stands among its properties, in the .pkl that nnU-Net writes beside the data, and that of a
fingerprint in its JSON file: whoever makes them again, also nnU-Net itself, replaces the record with them.
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
"""Key of a record among a case's properties, and in a fingerprint."""

GT_SEGMENTATIONS: Final = "gt_segmentations"
"""Folder beside the preprocessed data with copies of the label files, which nnU-Net makes after preprocessing."""

_TIMES: Final = ("modified", "changed")


def files_of(case: TrainingCase, *, digest: bool = True) -> list[dict[str, Any]]:
    """Size, times and content of a case's raw files: its images in order, then its labels.

    Args:
        case: The case.
        digest: Whether to read the files, for a checksum of their content.

    Returns:
        An entry per file: "name", "size" in bytes, "modified" and "changed" in nanoseconds since 1970 (the latter is
        when the system last noted a change, which no program can set), and "digest" if asked for.
    """
    entries = []
    for path in (*case.images, case.labels):
        # before the content is read: a file that changes meanwhile differs from what is noted here
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
    """Whether a preprocessed case is what its raw files would give today.

    Attributes:
        changed: What differs for sure; empty if nothing does.
        uncertain: What may differ; empty if nothing does.
        record: A record with the files' present times, where these differ and the content does not.
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
    """Compares raw files with the record of a preprocessed case, or where it has none, with what nnU-Net leaves.

    Args:
        case: The raw files of today.
        properties: Properties of the preprocessed case.
        properties_file: Where they are.
        copy_of_labels: The file in gt_segmentations; it may be missing.
        with_images: Whether to read images whose times differ while their sizes agree; labels are read anyway.
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
            # copying a data set sets the one time, writing sets both
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
    """Of nnU-Net's own data the label files are there as copies; of the images only the times can tell."""
    if copy_of_labels.is_file() and not filecmp.cmp(case.labels, copy_of_labels, shallow=False):
        return Judgement(changed=f"{case.labels.name} differs from its copy in {GT_SEGMENTATIONS}")
    made = properties_file.stat().st_mtime_ns
    for path in (*case.images, case.labels):
        if path.stat().st_mtime_ns > made:
            return Judgement(uncertain=f"{path.name} is newer than the preprocessed case")
    return Judgement()


# --- a training -------------------------------------------------------------------------------------------------------


def training_data_errors(
    raw: Path, preprocessed: Path, data: Path, settings: Mapping[str, Any]
) -> tuple[list[str], list[str]]:
    """What in preprocessed data is not what the raw data would give today, at the start of a training.

    Args:
        raw: The raw data set; on a cluster it may be missing, and nothing is known then.
        preprocessed: The preprocessed data set.
        data: The folder in it with the cases to train on.
        settings: What the plans want of the data.

    Returns:
        What differs for sure and what may differ, a message for each kind.
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
            continue  # nnU-Net says so itself, if it trains on this case
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
    """Ids of all cases of which a folder of preprocessed data has some file, as nnU-Net finds them there."""
    endings = ("_seg.b2nd", ".b2nd", ".npz", ".pkl")
    names = [path.name for path in list_files(data, endings)] if data.is_dir() else []
    found = (next((name[: -len(ending)] for ending in endings if name.endswith(ending)), "") for name in names)
    return sorted({case_id for case_id in found if case_id})


# --- fingerprints -----------------------------------------------------------------------------------------------------


def sizes_and_times(cases: Iterable[TrainingCase]) -> dict[str, list[list[int]]]:
    """Of each case, size and times of each raw file."""
    return {
        case.case_id: [[entry["size"], *(entry[time] for time in _TIMES)] for entry in files_of(case, digest=False)]
        for case in cases
    }


def fingerprint_differences(
    fingerprint_file: Path, cases: Sequence[TrainingCase], *, is_copy_different: bool
) -> list[str]:
    """What in the raw data differs from what a fingerprint was taken of.

    Args:
        fingerprint_file: nnU-Net's dataset_fingerprint.json.
        cases: The training cases of today.
        is_copy_different: Whether files that were copied, moved or unpacked since count as different: size and
            modification time are the same then, also where another data set was unpacked in place of the first.

    Returns:
        Messages, one per case that differs; empty if nothing does.
    """
    try:
        fingerprint = json.loads(fingerprint_file.read_text(encoding="utf-8"))
    except ValueError as error:  # cut short, when nnU-Net was killed while it wrote
        return [f"it can't be read: {error}"]
    end = None if is_copy_different else -1
    now = {case_id: [file[:end] for file in files] for case_id, files in sizes_and_times(cases).items()}
    record = fingerprint.get(RECORD)
    if record is None:
        number = len(fingerprint.get("spacings", ()))
        if number != len(now):
            return [f"it was taken of {number} cases, and there are {len(now)}"]
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
    """Writes into a new fingerprint what it was taken of; nnU-Net passes the entry over.

    Args:
        fingerprint_file: nnU-Net's dataset_fingerprint.json.
        files: The raw files as `sizes_and_times` gave them before it was taken.
    """
    fingerprint = json.loads(fingerprint_file.read_text(encoding="utf-8"))
    write_json(fingerprint_file, fingerprint | {RECORD: files})
