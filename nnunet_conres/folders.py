"""Listing folders, and writing them: by one process at a time, and either completely or not at all."""

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

# --- content of a folder ----------------------------------------------------------------------------------------------


def is_hidden(path: Path) -> bool:
    """Return whether a file or folder is hidden, such as `.DS_Store`, or the `._NAME` that macOS adds beside NAME."""
    return path.name.startswith(".")


def visible(folder: Path) -> list[Path]:
    """Return the files and folders in a folder that are not hidden, sorted by name.

    Raises:
        InputError: The folder is missing, is a file or may not be read.
    """
    with file_errors(folder):
        return sorted(path for path in folder.iterdir() if not is_hidden(path))


def list_files(folder: Path, endings: str | tuple[str, ...] = "", *, ignore_case: bool = False) -> list[Path]:
    """Return the files of a folder that are not hidden, without those of its subfolders, sorted by name.

    Args:
        folder: The folder.
        endings: File name ending, or several alternatives; every file by default.
        ignore_case: Whether `.NII` matches `.nii`; the endings must be in lower case then.

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
    """Write a folder that appears under its name once it is complete, or not at all.

    Only one process at a time writes a target. A second one is refused while the first one runs, also on other nodes of
    a cluster. Leftovers of killed processes are removed.

    Args:
        target: The new folder. It must be missing or empty; its parent folders are created.
        lock: Lock file that excludes other writers, `lock_of(target)` by default. Removed afterwards.

    Yields:
        An empty folder beside the target, to write to. It is renamed at the end, and removed on any exception.

    Raises:
        InputError: Another process writes the target, or the file system refuses.
    """
    with file_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    target = Path(os.path.abspath(target))  # "." has no name to derive others from
    with _only_writer(target, lock or lock_of(target)):
        clear_leftovers(target.parent, target)
        with partial_folder(target) as partial:
            yield partial
            with file_errors(target):
                with contextlib.suppress(FileNotFoundError):
                    target.rmdir()  # an empty folder; not every system replaces it on renaming
                partial.rename(target)


@contextlib.contextmanager
def partial_folder(target: Path) -> Iterator[Path]:
    """Create a temporary folder for incomplete content, beside the final file or folder.

    Args:
        target: The final file or folder. Errors name it instead of the temporary folder.

    Yields:
        An empty folder. When the block ends, it is removed unless it was renamed.

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
    """Remove temporary files and folders that killed processes left.

    Args:
        folder: The folder to clear; may be missing. No running process may be writing these temporary files.
        of: The file or folder that was being written; any by default.
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
    """Hold a folder's lock while files are written to it. The folder may contain other files.

    Args:
        folder: Created if missing, and removed again if nothing was written. With the default lock, leftovers of killed
            processes are removed.
        lock: Name of the lock file in the folder. Use another name to write a single file while other processes may
            write other files.

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
        with contextlib.suppress(OSError):  # not empty
            for empty in made:
                empty.rmdir()


@contextlib.contextmanager
def one_at_a_time(target: Path) -> Iterator[None]:
    """Hold the lock of a file or folder; wait while another process writes it.

    Args:
        target: The file or folder; its parent folder is created if missing.

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
            # Removed while it is held, so that no other process can have taken it.
            with contextlib.suppress(OSError):
                lock.unlink()


def lock_of(target: Path) -> Path:
    """Return the lock file that excludes other writers of a target: beside it, under a hidden name."""
    absolute = Path(os.path.abspath(target))
    return absolute.with_name(f".{absolute.name}.lock")


def being_written(target: Path, lock: Path | None = None) -> Iterator[str]:
    """Yield a message if another process is writing a new folder.

    So a second process is refused before it checks its input.

    Args:
        target: The new folder.
        lock: As for `new_folder`.
    """
    who = holder(lock or lock_of(target))
    if who is not None:
        yield _is_being_written(target, who)


def _is_being_written(target: Path, who: Holder) -> str:
    """Return the message for a second writer; the holder may be writing another target under the same lock."""
    written = who.target or str(target)
    other_name = ", or choose another name" if written == str(target) else ""
    return f"{written} is being written by {who}. Wait until it has ended{other_name}."


def check_complete(folder: Path, names: Iterable[str]) -> None:
    """Check that all written files exist, before their folder gets its final name.

    Args:
        folder: The folder.
        names: Paths of the files, relative to the folder.

    Raises:
        InputError: Some files are missing.
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
            # Removed while it is held, so that no other process can have taken it.
            with contextlib.suppress(OSError):
                lock.unlink()
