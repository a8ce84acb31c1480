"""Split a data set into folds that keep patients together and balance tumour volume and grade."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from nnunet_conres.datasets.brats_write import CASES_FILE
from nnunet_conres.datasets.raw import (
    TrainingCase,
    find_dataset,
    find_training_cases,
    inexact_labels,
    read_dataset_json,
)
from nnunet_conres.errors import InputError, file_errors
from nnunet_conres.files import write_json
from nnunet_conres.folders import list_files, visible, writing
from nnunet_conres.images.volumes import read_labels, reader_for
from nnunet_conres.nnunet import PREPROCESSED, RESULTS, SPLITS_FILE, folder_from_environment, not_set
from nnunet_conres.parallel import map_cases
from nnunet_conres.text import aligned, first_few

Balance = Literal["both", "grade", "volume", "none"]

BALANCES: Final[tuple[Balance, ...]] = ("both", "grade", "volume", "none")

DEFAULT_FOLDS: Final = 5

DEFAULT_SEED: Final = 12345
"""The seed of nnU-Net's own splits."""

UNKNOWN: Final = "unknown"
"""Grade of a case whose grade is not known."""

# BraTS from 2023 on: challenge, patient, time point, as in BraTS-GLI-00005-100 or BraTS-MEN-RT-0012-1.
_PATIENT_AND_TIME: Final = re.compile(r"(BraTS-(?:[A-Za-z]+-)+\d+)-\d{1,3}", re.IGNORECASE)

# Weight of equal sizes relative to equal volumes and grades: equal sizes come first.
_SIZE_WEIGHT: Final = 10.0

# The exchange of groups ends by itself; this limit is only for safety.
_MOST_ROUNDS: Final = 100
# Smaller gains, in squared shares, are only rounding.
_NEGLIGIBLE: Final = 1e-12

_NOT_A_GRADE: Final = ("", "na", "n/a", "nan", "none", UNKNOWN)


@dataclass(frozen=True)
class CaseFacts:
    """The facts about a case that decide its fold.

    Attributes:
        case_id: nnU-Net's id of the case.
        group: Name of its group. Cases of one group stay in the same fold.
        volume: Volume of all foreground labels except ignore, ml.
        grade: Such as HGG or LGG, or `UNKNOWN`.
    """

    case_id: str
    group: str
    volume: float = 0.0
    grade: str = UNKNOWN


@dataclass(frozen=True)
class Fold:
    """One fold in nnU-Net's splits file. Both lists are sorted.

    Attributes:
        training: Ids of the cases to train on.
        validation: Ids of the held-out cases.
    """

    training: tuple[str, ...]
    validation: tuple[str, ...]

    def as_json(self) -> dict[str, list[str]]:
        """Return the entry of the splits file as nnU-Net reads it."""
        return {"train": list(self.training), "val": list(self.validation)}


@dataclass(frozen=True)
class Split:
    """Result of `split`.

    Attributes:
        path: The splits file that nnU-Net reads.
        folds: The folds in the file.
        cases: Facts about all cases, by id.
        other_trainings: A message for every trained fold whose held-out cases differ from the new folds, or are
            unknown.
        warnings: Other warnings for the user.
        unchanged: Whether the file existed already with the same content.
    """

    path: Path
    folds: tuple[Fold, ...]
    cases: Mapping[str, CaseFacts]
    other_trainings: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    unchanged: bool = False


def split(
    dataset: int | str,
    *,
    folds: int = DEFAULT_FOLDS,
    balance: Balance = "both",
    seed: int = DEFAULT_SEED,
    group: str | None = None,
    validation_file: str | Path | None = None,
    grades_file: str | Path | None = None,
    force: bool = False,
    processes: int = 1,
    progress: bool = True,
) -> Split:
    """Write the splits file of a data set to the folder where nnU-Net reads it, before or after planning.

    Args:
        dataset: Id or name of a data set in nnUNet_raw.
        folds: Number of folds, 2 or more. Not used if `validation_file` is given.
        balance: Property to balance over the folds: tumour volume, grade, both (the grade as far as it is known), or
            none.
        seed: Random seed, 0 or more. Other seeds give other folds of similar balance.
        group: Regular expression, searched for in every id. Its first group in parentheses, or the whole match if it
            has none, names the group of the case. By default the group is the patient: from the data set's cases.json,
            else from the id in BraTS 2023 and later. Any other case is a group by itself.
        validation_file: File with the ids of the cases to hold out, one per line. Makes a single fold.
        grades_file: CSV file with a column Grade and a column of ids. By default grades are read from the data set's
            cases.json.
        force: Whether to replace a file with other splits.
        processes: Number of processes, 1 or more.
        progress: Whether to show a progress bar on stderr.

    Returns:
        The folds and the path of the splits file.

    Raises:
        InputError: The data set, a file or an argument is invalid. Lists all errors.
    """
    folder = find_dataset(dataset)
    errors = list(_argument_errors(folds, balance, seed, processes))
    preprocessed = folder_from_environment(PREPROCESSED)
    if preprocessed is None:
        errors.append(not_set(PREPROCESSED))
    dataset_json, found = read_dataset_json(folder)
    errors += found
    if dataset_json is None:
        raise InputError(errors)
    cases, found = find_training_cases(folder, dataset_json)
    errors += found
    ids = [case.case_id for case in cases]

    pattern, found = compile_group(group)
    errors += found
    known, found = _read_cases_file(folder / CASES_FILE)
    errors += found
    patients = {case_id: facts["patient"] for case_id, facts in known.items() if "patient" in facts}
    groups, found = group_cases(ids, pattern, patients)
    errors += found
    grades, found = _grades(known, grades_file, ids)
    errors += found
    reader: type | None = None
    if cases:
        try:
            reader = reader_for(dataset_json, [case.images[0] for case in cases])
        except InputError as error:
            errors += error.errors
    volumes: dict[str, float] = {}
    inexact: dict[str, float] = {}
    if reader is not None:
        jobs = [_Measure(case, reader, dataset_json["labels"].get("ignore")) for case in cases]
        for case, result in zip(cases, map_cases(_measure, jobs, max(1, processes), "Volumes", progress), strict=True):
            if isinstance(result, str):
                errors.append(result)
                continue
            volumes[case.case_id], off = result
            if off is not None:
                inexact[case.case_id] = off
    facts = {
        case_id: CaseFacts(case_id, groups.get(case_id, case_id), volumes.get(case_id, 0.0), grades[case_id])
        for case_id in ids
    }
    held_out: set[str] = set()
    if validation_file is not None:
        held_out, found = _read_validation(Path(validation_file), facts)
        errors += found
    elif groups:
        errors += _too_few_errors(facts, folds, balance)
    if errors or preprocessed is None:
        raise InputError(errors)

    if validation_file is not None:
        entries = [_fold(ids, held_out)]
    else:
        entries = [_fold(ids, part) for part in balanced_parts(list(facts.values()), folds, balance, seed)]

    path = preprocessed / folder.name / SPLITS_FILE
    content = [entry.as_json() for entry in entries]
    results = folder_from_environment(RESULTS)
    ending = str(dataset_json["file_ending"])
    # Hold the lock from reading the old file to replacing it: two runs at once must not both find no file.
    with writing(path.parent, lock=f".{path.name}.lock"):
        before = _read_splits(path)
        trainings = [] if results is None else list(_other_trainings(results / folder.name, entries, before, ending))
        if path.exists() and before != content and not force:
            reasons = [f"{path} exists already and has other splits; add --force to replace it."]
            raise InputError(reasons + [f"Already trained: {training}" for training in trainings])
        if before != content:
            with file_errors(path):
                write_json(path, content)
    notes = list(_notes(folder, facts, entries, balance if validation_file is None else "none", pattern, content))
    if inexact and reader is not None:
        off = next(iter(inexact.values()))
        notes.append(
            f"{len(inexact)} cases, {first_few(list(inexact))}, have labels that {inexact_labels(reader, off)}"
        )
    return Split(path, tuple(entries), facts, tuple(trainings), tuple(notes), unchanged=before == content)


def patient_of(case_id: str) -> str:
    """Return the patient from a case id: for ids of BraTS 2023 and later, the id without its time point.

    Args:
        case_id: For example BraTS-GLI-00005-100.

    Returns:
        For example BraTS-GLI-00005; any other id is unchanged.
    """
    match = _PATIENT_AND_TIME.fullmatch(case_id)
    return match[1] if match else case_id


def compile_group(group: str | None) -> tuple[re.Pattern[str] | None, list[str]]:
    """Compile the pattern of --group for `group_cases`: None if it is not given; also a message if it is invalid."""
    if group is None:
        return None, []
    try:
        return re.compile(group), []
    except re.error as error:
        return None, [f"--group {group!r} is not a regular expression: {error}."]


def group_cases(
    ids: Sequence[str], pattern: re.Pattern[str] | None = None, patients: Mapping[str, str] | None = None
) -> tuple[dict[str, str], list[str]]:
    """Return the group of every case.

    Args:
        ids: Ids of the cases.
        pattern: Its first group in parentheses, or the whole match if it has none, names the group. By default the
            group is the patient.
        patients: Known patients by case id. For other cases the patient is derived from the id.

    Returns:
        Groups by case id, and a message if ids have no group.
    """
    if pattern is None:
        return {case_id: (patients or {}).get(case_id) or patient_of(case_id) for case_id in ids}, []
    groups: dict[str, str] = {}
    for case_id in ids:
        match = pattern.search(case_id)
        name = match and match[1 if pattern.groups else 0]
        if name:
            groups[case_id] = name
    missing = [case_id for case_id in ids if case_id not in groups]
    if not missing:
        return groups, []
    return groups, [
        f"--group {pattern.pattern!r} finds no group for {len(missing)} of {len(ids)} cases: {first_few(missing, 20)}; "
        f"expected an expression that matches every id."
    ]


def balanced_parts(cases: Sequence[CaseFacts], folds: int, balance: Balance, seed: int) -> list[set[str]]:
    """Divide cases into balanced parts of about equal size without splitting groups.

    First, groups are dealt to the parts like cards, grade by grade; within a grade, groups with the most cases and the
    largest tumours come first. Then groups are swapped or moved as long as this makes the parts more similar. Equal
    sizes have the largest weight.

    Args:
        cases: Cases of at least as many groups as parts.
        folds: Number of parts, 2 or more.
        balance: Property to balance over the parts.
        seed: Random seed. It selects among divisions that are about equally balanced.

    Returns:
        Case ids of every part.
    """
    rng = np.random.default_rng(seed)
    members: dict[str, list[CaseFacts]] = defaultdict(list)
    for case in sorted(cases, key=lambda case: case.case_id):
        members[case.group].append(case)
    groups = list(members.values())

    size = _shares([len(group) for group in groups])
    # Subtract the share of cases: to have an equal mean volume, a part with more cases needs more volume.
    columns, order = [_SIZE_WEIGHT * size], [size]
    if balance in ("both", "volume"):
        volume = _shares([sum(case.volume for case in group) for group in groups])
        columns.append(volume - size)
        order.insert(0, volume)
    if balance in ("both", "grade"):
        for grade in sorted({case.grade for case in cases}):
            share = _shares([sum(case.grade == grade for case in group) for group in groups])
            columns.append(share - size)
            order.append(share)
    # The last key of lexsort counts most. Ties are in random order, and so are the groups of one round.
    shuffled = rng.permutation(len(groups))
    dealt = shuffled[np.lexsort([-column[shuffled] for column in order])]
    part = np.zeros(len(groups), dtype=np.int64)
    for first in range(0, len(groups), folds):
        chosen = dealt[first : first + folds]
        part[chosen] = rng.permutation(folds)[: len(chosen)]
    part = _exchange(np.stack(columns, axis=1), part, folds)
    return [
        {case.case_id for group, own in zip(groups, part, strict=True) if own == number for case in group}
        for number in range(folds)
    ]


def _shares(values: Sequence[float]) -> NDArray[np.float64]:
    """Return each value as a fraction of the sum."""
    array = np.asarray(values, dtype=np.float64)
    return array / (array.sum() or 1.0)


def _exchange(shares: NDArray[np.float64], part: NDArray[np.int64], parts: int) -> NDArray[np.int64]:
    """Swap groups between parts, or move one, as long as the sums of the parts become more equal.

    Args:
        shares: (groups, quantities), contribution of every group to the sums.
        part: (groups,), the part of every group.
        parts: Number of parts; none of them becomes empty.

    Returns:
        The new part of every group.
    """
    part = part.copy()
    sums = np.stack([shares[part == number].sum(axis=0) for number in range(parts)])
    for _ in range(_MOST_ROUNDS):
        changed = False
        for group in range(len(part)):
            own = part[group]
            # If the first of two parts gains d and the second loses d, their sum of squares changes by
            # 2 d (first - second) + 2 d^2. Below is half of it. In a swap d is the difference of two groups, in a move
            # one whole group.
            gain = shares - shares[group]
            swaps = (gain * (sums[own] - sums[part])).sum(axis=1) + (gain**2).sum(axis=1)
            moves = ((sums - sums[own]) * shares[group]).sum(axis=1) + (shares[group] ** 2).sum()
            swaps[part == own] = moves[own] = 0.0
            if (part == own).sum() == 1:
                moves[:] = 0.0
            other, target = int(np.argmin(swaps)), int(np.argmin(moves))
            if min(swaps[other], moves[target]) > -_NEGLIGIBLE:
                continue
            if swaps[other] <= moves[target]:
                target = int(part[other])
                part[other] = own
            part[group] = target
            sums = np.stack([shares[part == number].sum(axis=0) for number in range(parts)])
            changed = True
        if not changed:
            break
    return part


def format_table(done: Split) -> str:
    """Format the folds as a text table: cases, groups, mean volume and grades of the held-out cases.

    Args:
        done: Result of `split`.

    Returns:
        Lines without a final line break.
    """
    grades = sorted({case.grade for case in done.cases.values()})
    shown = [] if grades == [UNKNOWN] else grades
    rows = [("fold", "training", "validation", "groups", "mean volume", *shown)]
    for number, fold in enumerate(done.folds):
        held_out = [done.cases[case_id] for case_id in fold.validation]
        rows.append((str(number), str(len(fold.training)), *_cells(held_out, shown)))
    rows.append(("all", "", *_cells(list(done.cases.values()), shown)))
    return "\n".join(aligned(rows, left=0))


def _cells(cases: Sequence[CaseFacts], grades: Sequence[str]) -> tuple[str, ...]:
    counts = Counter(case.grade for case in cases)
    mean = np.mean([case.volume for case in cases])
    groups = len({case.group for case in cases})
    return (str(len(cases)), str(groups), f"{mean:.1f} ml", *(str(counts[grade]) for grade in grades))


def _fold(ids: Sequence[str], held_out: set[str]) -> Fold:
    return Fold(
        tuple(sorted(case_id for case_id in ids if case_id not in held_out)),
        tuple(sorted(case_id for case_id in ids if case_id in held_out)),
    )


# --- checks ---------------------------------------------------------------------------------------------------------


def _argument_errors(folds: int, balance: str, seed: int, processes: int) -> Iterator[str]:
    if folds < 2:
        yield f"The number of folds is {folds}; expected 2 or more. For a single one give --validation FILE."
    if balance not in BALANCES:
        yield f"The property to balance is {balance!r}; expected one of {', '.join(BALANCES)}."
    if not 0 <= seed < 2**32:
        yield f"The seed is {seed}; expected 0 to {2**32 - 1}."
    if processes < 1:
        yield f"The number of processes is {processes}; expected 1 or more."


def _too_few_errors(cases: Mapping[str, CaseFacts], folds: int, balance: str) -> Iterator[str]:
    groups = {case.group for case in cases.values()}
    if len(groups) < folds:
        yield (
            f"{len(cases)} cases make {len(groups)} groups ({first_few(sorted(groups))}), which are too few for "
            f"{folds} folds; ask for fewer --folds, or group differently."
        )
    if balance == "grade" and all(case.grade == UNKNOWN for case in cases.values()):
        yield (
            f"No grade is known to balance: the data set has no {CASES_FILE} with grades. Give --grades FILE.csv with "
            f"a column Grade and a column with the ids, or balance the volume alone."
        )


def _read_validation(path: Path, cases: Mapping[str, CaseFacts]) -> tuple[set[str], list[str]]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, ValueError) as error:
        return set(), [f"{path} cannot be read: {error}"]
    listed = [line for line in lines if line and not line.startswith("#")]
    errors = []
    unknown = [case_id for case_id in dict.fromkeys(listed) if case_id not in cases]
    if unknown:
        errors.append(
            f"{path} names {len(unknown)} cases that are not in the data set: {first_few(unknown, 20)}; expected "
            f"ids such as {', '.join(list(cases)[:2])}, without channel and file ending."
        )
    twice = [case_id for case_id, times in Counter(listed).items() if times > 1]
    if twice:
        errors.append(f"{path} names {len(twice)} cases more than once: {first_few(twice, 20)}; expected each once.")
    held_out = set(listed)
    if not listed:
        errors.append(f"{path} names no case; expected one id per line.")
    elif held_out >= set(cases):
        errors.append(f"{path} names all {len(cases)} cases, which leaves none to train on.")
    groups = {cases[case_id].group for case_id in held_out if case_id in cases}
    apart = [case.case_id for case in cases.values() if case.group in groups and case.case_id not in held_out]
    if apart and held_out < set(cases):
        errors.append(
            f"{len(apart)} training cases are of the same patient or group as held-out ones: {first_few(apart, 20)}; "
            f"add them to {path}, or remove the other cases of their groups from it."
        )
    return held_out, errors


# --- facts about the cases ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Measure:
    """Arguments of `_measure`."""

    case: TrainingCase
    reader: type
    ignore_label: int | None


def _measure(job: _Measure) -> tuple[float, float | None] | str:
    """Return the labelled volume in ml and a value slightly off a label, if any; or an error message."""
    try:
        labels = read_labels(job.case.labels, job.reader)
    except InputError as error:
        return str(error)
    foreground = labels.voxels != 0
    if job.ignore_label is not None:
        foreground &= labels.voxels != job.ignore_label
    return float(np.count_nonzero(foreground) * np.prod(labels.spacing) / 1000), labels.inexact


def _grades(
    known: Mapping[str, Mapping[str, str]], grades_file: str | Path | None, ids: Sequence[str]
) -> tuple[dict[str, str], list[str]]:
    """Return the grade of every case, UNKNOWN if it is not known, and a message for every error."""
    if grades_file is not None:
        grades, errors = _read_grades(Path(grades_file), ids)
    else:
        grades, errors = {case_id: facts["grade"] for case_id, facts in known.items() if "grade" in facts}, []
    return {case_id: grades.get(case_id, UNKNOWN) for case_id in ids}, errors


def _read_cases_file(path: Path) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Read the grade and the patient of each case from a data set's cases.json."""
    if not path.is_file():
        return {}, []
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found = {
            str(case_id): {key: str(facts[key]) for key in ("grade", "patient") if facts.get(key)}
            for case_id, facts in content.items()
        }
    except (OSError, ValueError, AttributeError, TypeError) as error:
        return {}, [f'{path} cannot be read: {error}; expected {{"CASE": {{"grade": "HGG"}}, ...}}.']
    return found, []


def _read_grades(path: Path, ids: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Read grades from a CSV file such as BraTS's name_mapping.csv, which has a column of ids for every year."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        return {}, [f"{path} cannot be read: {error}"]
    header = text.partition("\n")[0]
    rows = list(csv.DictReader(text.splitlines(), delimiter=max(",;\t", key=header.count)))
    columns = list(rows[0]) if rows else []
    grade_column = next((name for name in columns if name and name.strip().lower() == "grade"), None)
    if grade_column is None:
        return {}, [f"{path} has no column Grade, but {', '.join(map(str, columns)) or 'nothing'}."]
    wanted = set(ids)
    # Of the columns of ids, take the one with the most ids of this data set.
    hits = {
        name: sum((row[name] or "").strip() in wanted for row in rows)
        for name in columns
        if name and name != grade_column
    }
    id_column = max(hits, key=lambda name: hits[name], default=None)
    if id_column is None or not hits[id_column]:
        listed = ", ".join(hits) or "none"
        return {}, [
            f"{path} has no column with ids of the data set such as {', '.join(ids[:2])}; its columns are {listed}."
        ]
    grades: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        grade = (row[grade_column] or "").strip()
        if grade.lower() not in _NOT_A_GRADE:
            grades[(row[id_column] or "").strip()].add(grade)
    contradicting = sorted(case_id for case_id, found in grades.items() if len(found) > 1 and case_id in wanted)
    if contradicting:
        return {}, [f"{path} gives {len(contradicting)} cases more than one grade: {first_few(contradicting, 20)}."]
    return {case_id: found.pop() for case_id, found in grades.items()}, []


# --- existing splits and trainings ----------------------------------------------------------------------------------


def _read_splits(path: Path) -> Any:
    """Read the splits from a file. Return None if the file does not exist or is not valid."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        for entry in content:
            set(entry["train"]), set(entry["val"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return content


def _other_trainings(results: Path, folds: Sequence[Fold], before: Any, ending: str) -> Iterator[str]:
    """Yield a message for every trained fold whose held-out cases differ from the new splits, or are unknown.

    Args:
        results: The data set's folder of trained models.
        folds: The new splits.
        before: The previous splits, None if there were none.
        ending: File ending of the data set.
    """
    models = [model for model in visible(results) if model.name.count("__") >= 2] if results.is_dir() else []
    for fold_folder in [folder for model in models if model.is_dir() for folder in visible(model)]:
        if not fold_folder.name.startswith("fold_"):
            continue
        number = fold_folder.name.removeprefix("fold_")
        if not number.isdigit() or not any(fold_folder.glob("checkpoint_*.pth")):
            continue
        model = f"{fold_folder.parent.name}, fold {number}"
        if int(number) >= len(folds):
            yield (
                f"{model} in {results} is not a fold of the new splits, which have {len(folds)}; nnU-Net would split "
                f"its cases at random."
            )
            continue
        held_out, source = _held_out(fold_folder, int(number), before, ending)
        new = set(folds[int(number)].validation)
        if held_out is None:
            yield f"{model} in {results} was trained on unknown splits: it has no validation."
        elif held_out != new:
            yield (
                f"{model} in {results} held out other cases ({source}): {len(held_out)}, of which "
                f"{len(held_out & new)} are among the {len(new)} of the new fold. Train it again, or don't compare it."
            )


def _held_out(fold_folder: Path, number: int, before: Any, ending: str) -> tuple[set[str] | None, str]:
    """Return the cases that a trained fold held out, and the source of this information."""
    validation = fold_folder / "validation"
    try:
        summary = json.loads((validation / "summary.json").read_text(encoding="utf-8"))
        names = [re.split(r"[\\/]", entry["prediction_file"])[-1] for entry in summary["metric_per_case"]]
        return {name.removesuffix(ending) for name in names}, "validation/summary.json"
    except (OSError, ValueError, KeyError, TypeError):
        pass
    # An unfinished validation has fewer files than cases. The old splits are complete.
    if before is not None and number < len(before):
        return set(before[number]["val"]), "the previous splits file"
    files = list_files(validation, ending) if validation.is_dir() else []
    return ({path.name.removesuffix(ending) for path in files} or None), "the files in validation"


def _notes(
    folder: Path,
    cases: Mapping[str, CaseFacts],
    folds: Sequence[Fold],
    balance: str,
    pattern: re.Pattern[str] | None,
    content: Any,
) -> Iterator[str]:
    raw = folder / SPLITS_FILE
    if raw.is_file() and _read_splits(raw) != content:
        yield (
            f"{raw} has other splits. nnU-Net's planning stops if this file and the one in the preprocessed folder "
            f"differ. Remove it before you plan."
        )
    if pattern is not None:
        groups: dict[str, set[str]] = defaultdict(set)
        for case in cases.values():
            groups[patient_of(case.case_id)].add(case.group)
        torn = sorted(patient for patient, found in groups.items() if len(found) > 1)
        if torn:
            yield (
                f"--group {pattern.pattern!r} puts time points of {len(torn)} patients into different groups, so that "
                f"a patient may be both in training and validation: {first_few(torn)}."
            )
    if balance in ("both", "grade"):
        unknown = [case.case_id for case in cases.values() if case.grade == UNKNOWN]
        if unknown and len(unknown) < len(cases):
            yield f"The grade of {len(unknown)} of {len(cases)} cases is not known: {first_few(unknown)}."
    sizes = [len(fold.validation) for fold in folds]
    if max(sizes) - min(sizes) > max(1, 0.2 * sum(sizes) / len(sizes)):
        yield f"The folds are of unequal size, {', '.join(map(str, sizes))}: large groups leave no better choice."
