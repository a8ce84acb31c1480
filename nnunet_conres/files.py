"""JSON, TOML, CSV, and files that are found whole or not at all."""

from __future__ import annotations

import contextlib
import csv
import json
import math
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from nnunet_conres.errors import InputError, file_errors

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def temporary_beside(path: Path) -> Path:
    """A name for what is to get the name of a file or folder when it is complete: hidden, another one each time.

    It has the path's ending, because some writers choose the format by it.
    """
    return path.with_name(f".{path.stem}.partial-{secrets.token_hex(4)}{path.suffix}")


def is_temporary(path: Path, of: Path | None = None) -> bool:
    """Whether a file or folder has a name of `temporary_beside`: of this path, or of any by default."""
    stem, ending = (".+", r"(\.[^.]+)?") if of is None else (re.escape(of.stem), re.escape(of.suffix))
    return re.fullmatch(rf"\.{stem}\.partial-[0-9a-f]{{8}}{ending}", path.name) is not None


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A temporary path beside a file, which gets the file's name when the block ends without an error.

    Args:
        path: The file; one that exists is replaced.

    Yields:
        Where to write, with the file's ending.

    Raises:
        InputError: The file system refused: the disk is full, or the folder can't be written to.
    """
    partial = temporary_beside(path)
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


def failed_write(path: Path, size: int) -> InputError:
    """The error of a file that a library could not write: many say neither which file nor why.

    To know why, a file of that size is written beside it.

    Args:
        path: The file.
        size: Bytes that were to be written.
    """
    attempt = temporary_beside(path)
    block = os.urandom(2**20)
    try:
        with file_errors(path):
            try:
                with attempt.open("wb") as stream:
                    for _ in range(size // len(block) + 1):
                        stream.write(block)
                    stream.flush()
                    os.fsync(stream.fileno())
            except OSError as error:
                raise OSError(error.errno, error.strerror) from error
    except InputError as error:
        return error
    finally:
        attempt.unlink(missing_ok=True)
    free = shutil.disk_usage(path.parent).free
    return InputError(f"{path} could not be written whole. The disk has {free / 2**20:.0f} MiB left. Check the disk.")


def write_json(path: Path, content: Any, *, indent: int | None = 2) -> None:
    """Write a JSON file; whoever looks finds it whole or not at all.

    Args:
        path: The file; one that exists is replaced.
        content: What it holds.
        indent: Of the lines; None for a single one, which takes a fifth of the time.
    """
    with written_whole(path) as partial:
        partial.write_text(json.dumps(content, indent=indent) + "\n", encoding="utf-8")


def write_csv(path: Path, rows: Iterable[Iterable[Any]]) -> None:
    """Write a CSV file, None as an empty cell; whoever looks finds it whole or not at all."""
    with written_whole(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


def write_if_changed(path: Path, content: Any, *, sort: bool = True) -> bool:
    """Write a JSON file, and its folder, unless it holds the same content already.

    Args:
        path: The file.
        content: What it holds.
        sort: Whether to sort the keys of objects.

    Returns:
        Whether it was written.

    Raises:
        InputError: The file system refuses.
    """
    text = json.dumps(content, indent=1, sort_keys=sort) + "\n"
    with file_errors(path):
        try:
            if path.read_text(encoding="utf-8") == text:
                return False
        except FileNotFoundError:
            path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as partial:
        partial.write_text(text, encoding="utf-8")
    return True


def try_read_json(path: Path) -> Any:
    """A JSON file's content, None if it is missing or truncated."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


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


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file's content.

    Raises:
        InputError: It cannot be read, or is not valid TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}.") from error
    except ValueError as error:  # of the encoding, or of TOML
        raise InputError(f"{path} is not valid TOML: {error}.") from error


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
