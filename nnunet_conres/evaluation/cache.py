"""Cache of results between runs. The key of a result is a hash of everything that it depends on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from nnunet_conres import __version__
from nnunet_conres.errors import file_errors
from nnunet_conres.files import try_read_json, write_json

_Result = TypeVar("_Result")


def key_of(*parts: Any) -> str:
    """Return a hash of JSON-like parts and of this package's version."""
    return hashlib.sha256(json.dumps([__version__, *parts]).encode()).hexdigest()


def content_of(path: Path) -> str:
    """Return a file's ending and a hash of its content: the same bytes with another ending may be another image."""
    with file_errors(path):
        return path.suffix.lower() + hashlib.sha256(path.read_bytes()).hexdigest()


def state_of(path: Path) -> list[Any]:
    """Return path, size and modification time of a file. Hashing gigabytes would be safer, but takes minutes."""
    with file_errors(path):
        stat = path.stat()
    return [str(path), stat.st_size, stat.st_mtime_ns]


class Cache:
    """A folder of JSON files, one per result.

    Args:
        folder: Created if missing; None to keep nothing.

    Raises:
        InputError: The folder can't be created.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        if folder is not None:
            with file_errors(folder):
                folder.mkdir(parents=True, exist_ok=True)

    def get(self, key: str) -> Any:
        """Return a stored result, or None if there is no readable one."""
        if self.folder is None:
            return None
        return try_read_json(self.folder / f"{key}.json")

    def put(self, key: str, content: Any) -> None:
        """Store a result. Several processes may write the same one at once."""
        if self.folder is not None:
            write_json(self.folder / f"{key}.json", content, indent=None)

    def kept(self, key: str, make: Callable[[], _Result]) -> _Result:
        """Return the stored result; compute and store it if there is none. `make` has to return JSON-like content."""
        content: _Result | None = self.get(key)
        if content is None:
            content = make()
            self.put(key, content)
        return content
