"""Folders: what is in them, and how they are written: by one process at a time, and never in part."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from nnunet_conres.errors import InputError, file_errors
from nnunet_conres.files import is_temporary, temporary_beside
from nnunet_conres.locks import Holder, LockedError, hold, holder

_LOCK: Final = ".lock"

# --- what is in a folder ----------------------------------------------------------------------------------------------


def is_hidden(path: Path) -> bool:
    """Whether a file or folder is hidden: `.DS_Store`, and the `._NAME` that macOS leaves beside NAME."""
    return path.name.startswith(".")


def visible(folder: Path) -> list[Path]:
    """What is in a folder and is not hidden, sorted by name.

    Raises:
        InputError: The folder is missing, is a file or may not be read.
    """
    with file_errors(folder):
        return sorted(path for path in folder.iterdir() if not is_hidden(path))


def list_files(folder: Path, endings: str | tuple[str, ...] = "", *, ignore_case: bool = False) -> list[Path]:
    """The files of a folder, not of its subfolders, sorted by name; hidden ones are passed over.

    Args:
        folder: The folder.
        endings: What a file's name ends in, or several endings of which it has one; every file by default.
        ignore_case: Whether `.NII` is as good as `.nii`; the endings are in lower case then.

    Raises:
        InputError: The folder is missing, is a file or may not be read.
    """
    return [
        path
        for path in visible(folder)
        if (path.name.lower() if ignore_case else path.name).endswith(endings) and path.is_file()
    ]


# --- writing --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def new_folder(target: Path, *, lock: Path | None = None) -> Iterator[Path]:
    """Write a folder that appears under its name when everything is in it, or not at all.

    One process at a time writes a target: a second one is refused as long as the first one lives, on other nodes of a
    cluster too. What killed processes left of the target is removed.

    Args:
        target: The new folder. It does not exist, or is empty; folders above it are made.
        lock: File that excludes other writers, `lock_of(target)` by default. Removed afterwards.

    Yields:
        An empty folder beside the target, to write to. It is renamed at the end, and removed if anything is raised.

    Raises:
        InputError: Another process writes the target, or the file system refuses.
    """
    with file_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    target = Path(os.path.abspath(target))  # "." has no name to write under
    with _only_writer(target, lock or lock_of(target)):
        clear_leftovers(target.parent, target)
        with partial_folder(target) as partial:
            yield partial
            with file_errors(target):
                with contextlib.suppress(FileNotFoundError):
                    target.rmdir()  # an empty one; not every system replaces it
                partial.rename(target)


@contextlib.contextmanager
def partial_folder(target: Path) -> Iterator[Path]:
    """A folder for what is not complete yet, beside the file or folder that it is to become.

    Args:
        target: The file or folder, which errors name instead.

    Yields:
        An empty folder, which is gone when the block ends.

    Raises:
        InputError: The file system refuses.
    """
    partial = temporary_beside(target)
    try:
        with file_errors(target):
            partial.mkdir()
        yield partial
    except InputError as error:
        raise error.naming(target, instead_of=partial) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def clear_leftovers(folder: Path, of: Path | None = None) -> None:
    """Remove what killed processes left under temporary names.

    Args:
        folder: Where; it may be missing. Nobody else writes now what is removed.
        of: The file or folder that was to be written; any by default.
    """
    for path in folder.iterdir() if folder.is_dir() else ():
        if not is_temporary(path, of):
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(folder: Path, *, lock: str = _LOCK) -> Iterator[None]:
    """Write files to a folder that may hold others, as the only process that does.

    Args:
        folder: Made if need be, and removed again if nothing was written. What killed processes left is removed.
        lock: Name of the file in it that excludes other writers; another name where only one of its files is written,
            and others may be written meanwhile.

    Raises:
        InputError: Another process writes there, or the file system refuses.
    """
    made = [above for above in (folder, *folder.parents) if not above.exists()]
    with file_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        with _only_writer(folder, folder / lock):
            if lock == _LOCK:
                clear_leftovers(folder)
            yield
    finally:
        with contextlib.suppress(OSError):  # it is not empty
            for empty in made:
                empty.rmdir()


@contextlib.contextmanager
def one_at_a_time(target: Path) -> Iterator[None]:
    """Wait until no other process writes a file or folder.

    Args:
        target: The file or folder; the one above it is made if need be.

    Raises:
        InputError: The file system refuses.
    """
    lock = lock_of(target)
    with contextlib.ExitStack() as stack:
        with file_errors(lock):
            stack.enter_context(hold(lock, poll_seconds=1, target=str(target)))
        try:
            yield
        finally:
            # While it is held: nobody else can have taken it.
            with contextlib.suppress(OSError):
                lock.unlink()


def lock_of(target: Path) -> Path:
    """The file that excludes other writers of a new folder: beside it, under a hidden name."""
    absolute = Path(os.path.abspath(target))
    return absolute.with_name(f".{absolute.name}.lock")


def being_written(target: Path, lock: Path | None = None) -> Iterator[str]:
    """A message if another process writes a new folder now: so that a second one is refused before it checks its input.

    Args:
        target: The new folder.
        lock: As for `new_folder`.
    """
    who = holder(lock or lock_of(target))
    if who is not None:
        yield _is_being_written(target, who)


def _is_being_written(target: Path, who: Holder) -> str:
    """The message for a second writer, also of something else that the same lock excludes."""
    written = who.target or str(target)
    other_name = ", or choose another name" if written == str(target) else ""
    return f"{written} is being written by {who}. Wait until it has ended{other_name}."


def check_complete(folder: Path, names: Iterable[str]) -> None:
    """Check that files that were written are there, before their folder gets its name.

    Args:
        folder: The folder.
        names: Of the files, with the folders below it that hold them.

    Raises:
        InputError: Some are missing.
    """
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise InputError(
            f"{folder} was changed while it was written: {len(missing)} files are missing, {missing[0]} among them. "
            f"Run the command again, and change nothing in the folder before it ends."
        )


@contextlib.contextmanager
def _only_writer(target: Path, lock: Path) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        try:
            with file_errors(lock):
                stack.enter_context(hold(lock, wait=False, target=str(target)))
        except LockedError as error:
            raise InputError(_is_being_written(target, holder(lock) or Holder(host="unknown", pid=0))) from error
        try:
            yield
        finally:
            # While it is held: nobody else can have taken it.
            with contextlib.suppress(OSError):
                lock.unlink()
