"""`InputError`, the error that the command line shows without a traceback."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator, Sequence
from typing import Final

_MOST_KINDS: Final = 20
_MOST_OF_A_KIND: Final = 5

_NO_PERMISSION: Final = "Give yourself the permission, or choose another place."
_NO_SPACE: Final = "Free some space, or choose another place; then run the command again."
# Advice for file system errors that the user can fix. Other error numbers, such as EBADF, are programming errors.
_ADVICE: Final = {
    errno.ENOENT: "Check the name, and that its folder exists.",
    errno.ENOTDIR: "Check the name: one of its folders is a file.",
    errno.EISDIR: "Expected a file.",
    errno.EEXIST: "Remove it, or choose another name.",
    errno.ENOTEMPTY: "Remove it, or choose another name.",
    errno.ENAMETOOLONG: "Choose a shorter name.",
    errno.ELOOP: "Remove the symbolic link, or name the file itself.",
    errno.EACCES: _NO_PERMISSION,
    errno.EPERM: _NO_PERMISSION,
    errno.EROFS: "Choose another place.",
    errno.ENOSPC: _NO_SPACE,
    errno.EDQUOT: _NO_SPACE,
    errno.EFBIG: "Raise the limit of a file's size (ulimit -f), or choose another place; then run the command again.",
    errno.EIO: "Check the disk.",
    errno.ESTALE: "Check the network file system; then run the command again.",
    errno.EBUSY: "End the program that uses it.",
    errno.EMFILE: "Raise the limit of open files (ulimit -n), or use fewer processes.",
    errno.ENFILE: "Raise the limit of open files (ulimit -n), or use fewer processes.",
}
# Write errors, which the operating system raises without a file name.
_OF_WRITING: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class InputError(ValueError):
    """An error that the user can fix, in an input, a setting or the environment.

    All other exceptions are bugs of this package and keep their traceback.

    Args:
        errors: One message, or a list of errors that were found together before anything was written. Each message
            names the file or value, what was expected, and what to do.

    Attributes:
        errors: One message per error.
    """

    def __init__(self, errors: str | Sequence[str]) -> None:
        if isinstance(errors, str):
            self.errors: tuple[str, ...] = (errors,)
            super().__init__(errors)
            return
        self.errors = tuple(errors)
        noun = "error" if len(errors) == 1 else "errors"
        lines = "\n".join(f"  - {line}" for line in grouped(errors))
        super().__init__(f"Nothing was written: {len(errors)} {noun} found.\n{lines}")

    def naming(self, known: os.PathLike[str], *, instead_of: os.PathLike[str]) -> InputError:
        """Return this error with a temporary path replaced by the path that the user knows.

        Args:
            known: The path that the user asked for.
            instead_of: The temporary path in the messages.
        """
        errors = tuple(error.replace(os.fspath(instead_of), os.fspath(known)) for error in self.errors)
        return type(self)(errors[0] if str(self) == self.errors[0] else errors)

    def __reduce__(self) -> tuple[type[InputError], tuple[str | tuple[str, ...]]]:
        # Worker processes pickle the error. BaseException would call the class with the formatted message.
        return type(self), (self.errors[0] if str(self) == self.errors[0] else self.errors,)


def grouped(messages: Sequence[str]) -> list[str]:
    """Group messages by kind, so that a thousand errors stay readable.

    Show the first few messages of each kind and the number of the others. Two messages are of the same kind if they
    differ only in words with digits or slashes: files, ids and numbers.

    Args:
        messages: One per error.

    Returns:
        The lines to show; the messages themselves if there are few.
    """
    kinds: dict[str, list[str]] = {}
    for message in messages:
        kinds.setdefault(re.sub(r"\S*[\d/\\]\S*", "*", message), []).append(message)
    lines = []
    for number, found in enumerate(kinds.values()):
        if number == _MOST_KINDS:
            left = sum(map(len, list(kinds.values())[number:]))
            lines.append(f"... and {left} more errors, of {len(kinds) - number} other kinds.")
            break
        lines += found[:_MOST_OF_A_KIND]
        if len(found) > _MOST_OF_A_KIND:
            lines.append(f"... and {len(found) - _MOST_OF_A_KIND} more errors of this kind, {len(found)} in all.")
    return lines


@contextlib.contextmanager
def file_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Convert file system errors to an `InputError` that names the file and says what to do.

    Wrap only the lines that access a file, because an OSError inside is taken for a user error.

    Args:
        path: The file or folder. The message names it if the operating system names none.

    Raises:
        InputError: The file system refused, for example because of a missing file, a missing permission or a full
            disk.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None:  # raised by gzip and nibabel for invalid file content
            raise InputError(f"{os.fspath(path)}: {' '.join(str(error).split())}") from error
        if error.errno not in _ADVICE:
            raise
        # If the error names two files, such as source and target of a copy, the second could not be written.
        found = error.filename if error.filename2 is None or error.errno == errno.ENOENT else error.filename2
        named = os.fsdecode(found) if isinstance(found, (str, bytes)) else os.fspath(path)
        raise InputError(f"{named}: {os.strerror(error.errno)}. {_ADVICE[error.errno]}") from error


@contextlib.contextmanager
def writing_errors(target: str | os.PathLike[str]) -> Iterator[None]:
    """Convert file system errors of library code as `file_errors` does; its other errors pass through.

    Args:
        target: The output file or folder. The message names it if a write failed and the operating system names no
            file.

    Raises:
        InputError: The file system refused.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _OF_WRITING or (error.errno in _ADVICE and error.filename is not None):
            with file_errors(target):
                raise
        raise
