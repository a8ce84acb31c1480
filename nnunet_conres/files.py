"""JSON, and files that are found whole or not at all."""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nnunet_conres.errors import InputError, file_errors


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A temporary path beside a file, which gets the file's name when the block ends without an error.

    Args:
        path: The file; one that exists is replaced.

    Yields:
        Where to write. It has the file's ending, because some writers choose the format by it.

    Raises:
        InputError: The file system refused: the disk is full, or the folder can't be written to.
    """
    partial = path.with_name(f".{path.stem}.{secrets.token_hex(4)}.partial{path.suffix}")
    try:
        with file_errors(path):
            try:
                yield partial
                partial.replace(path)
            except OSError as error:
                if error.filename is not None and Path(os.fsdecode(error.filename)) == partial:
                    raise OSError(error.errno, error.strerror, str(path)) from error  # a name that the user knows
                raise
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_json(path: Path, content: Any, *, indent: int | None = 2) -> None:
    """Write a JSON file; whoever looks finds it whole or not at all.

    Args:
        path: The file; one that exists is replaced.
        content: What it holds.
        indent: Of the lines; None for a single one, which takes a fifth of the time.
    """
    with written_whole(path) as partial:
        partial.write_text(json.dumps(content, indent=indent) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file's content.

    Raises:
        InputError: It cannot be read, or is no JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}.") from error
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}; expected a JSON object.")
    return content


def without_nan(content: Any) -> Any:
    """A copy of JSON-like content in which NumPy's numbers are Python's, and NaN and infinities are None."""
    if type(content) is float:  # most are
        return content if math.isfinite(content) else None
    if isinstance(content, Mapping):
        return {str(key): without_nan(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [without_nan(value) for value in content]
    if hasattr(content, "item"):
        return without_nan(content.item())
    return content
