"""Files that are found whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nnunet_conres.errors import file_errors


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


def write_json(path: Path, content: Mapping[str, Any] | Sequence[Any]) -> None:
    """Write a JSON file; whoever looks finds it whole or not at all."""
    with written_whole(path) as partial:
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
