"""Checks of case ids, which become file names, parts of commands, and lines of reports."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from typing import Final

_PARTS: Final = {
    "/": "which separates folders",
    "\\": "which separates folders",
    "..": "which leads to the folder above",
}
_STARTS: Final = {".": "as hidden files do", "-": "as options of commands do"}
_CHARACTERS: Final = {
    "Cc": "a control character",
    "Cs": "bytes that are not UTF-8",
    "Zl": "a line break",
    "Zp": "a line break",
}
_MOST_SHOWN: Final = 5


def why_unsafe(case_id: str) -> str:
    """Return why a case must not have this id, as the end of a sentence; empty for a safe id.

    An id may end in `_0000` like nnU-Net's image names, because nnU-Net takes only the last such part of an image name
    as the channel.
    """
    if not case_id:
        return "is empty"
    for part, what in _PARTS.items():
        if part in case_id:
            return f"contains {part}, {what}"
    if case_id[0] in _STARTS:
        return f"begins with {case_id[0]}, {_STARTS[case_id[0]]}"
    kinds = {unicodedata.category(character) for character in case_id}
    return next((f"contains {what}" for kind, what in _CHARACTERS.items() if kind in kinds), "")


def unsafe_ids(case_ids: Iterable[str], where: object) -> list[str]:
    """Return one message per kind of unsafe id; none if all ids are safe.

    Call it wherever ids are read, before anything is named after them.

    Args:
        case_ids: Ids from file names, dataset.json, splits or a list.
        where: The file or folder that contains the ids.
    """
    bad: dict[str, list[str]] = {}
    for case_id in case_ids:
        reason = why_unsafe(case_id)
        if reason:
            bad.setdefault(reason, []).append(ascii(case_id))
    errors = []
    for reason, ids in bad.items():
        shown = ", ".join(ids[:_MOST_SHOWN])
        if len(ids) == 1:
            errors.append(f"{where} has the case id {shown}, which {reason}; rename the case.")
        else:
            more = f" and {len(ids) - _MOST_SHOWN} more" if len(ids) > _MOST_SHOWN else ""
            errors.append(f"{where} has {len(ids)} case ids, each of which {reason}: {shown}{more}; rename the cases.")
    return errors
