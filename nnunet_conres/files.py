"""JSON, TOML and CSV files, and atomic writes."""

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
    """Return a temporary path beside a file or folder: hidden, and different at each call.

    It keeps the suffix of the path, because some writers choose the format by it.
    """
    return path.with_name(f".{path.stem}.partial-{secrets.token_hex(4)}{path.suffix}")


def is_temporary(path: Path, of: Path | None = None) -> bool:
    """Return whether a name comes from `temporary_beside`: for the path ``of``, or for any path by default."""
    stem, ending = (".+", r"(\.[^.]+)?") if of is None else (re.escape(of.stem), re.escape(of.suffix))
    return re.fullmatch(rf"\.{stem}\.partial-[0-9a-f]{{8}}{ending}", path.name) is not None


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Write a file atomically: a temporary file is renamed to it if the block ends without an error.

    Args:
        path: The file; an existing file is replaced.

    Yields:
        The temporary path to write to, with the same suffix.

    Raises:
        InputError: The file system refused, for example because the disk is full or the folder is not writable.
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
    """Return the error for a file that a library failed to write.

    Many libraries report neither the file nor the reason. To find the reason, write a file of the same size beside it.

    Args:
        path: The file.
        size: Size of the file in bytes.
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
    return InputError(
        f"{path} could not be written completely. The disk has {free / 2**20:.0f} MiB left. Check the disk."
    )


def write_json(path: Path, content: Any, *, indent: int | None = 2) -> None:
    """Write a JSON file atomically.

    Args:
        path: The file; an existing file is replaced.
        content: The content.
        indent: Indentation; None for a single line, which takes a fifth of the time.
    """
    with written_whole(path) as partial:
        partial.write_text(json.dumps(content, indent=indent) + "\n", encoding="utf-8")


def write_csv(path: Path, rows: Iterable[Iterable[Any]]) -> None:
    """Write a CSV file atomically, None as an empty cell."""
    with written_whole(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


def write_if_changed(path: Path, content: Any, *, sort: bool = True) -> bool:
    """Write a JSON file atomically, and create its folder, unless it has the same content already.

    Args:
        path: The file.
        content: The content.
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
    """Return the content of a JSON file, None if it cannot be read or is not valid JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def read_json(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file.

    Raises:
        InputError: It cannot be read, or is not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}.") from error
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} contains a {type(content).__name__}; expected a JSON object.")
    return content


def read_toml(path: Path) -> dict[str, Any]:
    """Return the content of a TOML file.

    Raises:
        InputError: It cannot be read, or is not valid TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}.") from error
    except ValueError as error:  # wrong encoding, or invalid TOML
        raise InputError(f"{path} is not valid TOML: {error}.") from error


def without_nan(content: Any) -> Any:
    """Return a copy of JSON-like content with Python numbers for NumPy numbers, and None for NaN and infinities."""
    if type(content) is float:  # first, because most values are
        return content if math.isfinite(content) else None
    if isinstance(content, Mapping):
        return {str(key): without_nan(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [without_nan(value) for value in content]
    if hasattr(content, "item"):
        return without_nan(content.item())
    return content
