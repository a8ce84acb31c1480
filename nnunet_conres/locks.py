"""Locks between processes, on one machine and across the nodes of a cluster. No lock outlives its process.

A lock is an operating system lock on a file (``flock``). The system releases it when the last process that inherited it
ends, for whatever reason. On some network file systems such locks work only within one node. So the file also names the
holder, and the holder touches it regularly: a file that another node touched recently counts as locked.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import socket
import stat
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Final

from nnunet_conres.errors import InputError, file_errors

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

HEARTBEAT_SECONDS: Final = 30.0
# A lock counts as abandoned if its file was not touched for this long. Allows for clocks that differ between nodes.
STALE_SECONDS: Final = 600.0
# A lock file has about 100 characters.
_MOST_CHARACTERS: Final = 10_000
JOB_VARIABLE: Final = "SLURM_JOB_ID"


class LockedError(InputError):
    """Another process holds the lock."""


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock.

    Attributes:
        host: Host name.
        pid: Process id on that host.
        job: SLURM job id; empty outside of SLURM.
        since: Time at which the lock was taken, in seconds since 1970.
        target: Path that the holder writes, if the lock is for writing.
    """

    host: str
    pid: int
    job: str = ""
    since: float = 0.0
    target: str = ""

    def __str__(self) -> str:
        job = f", SLURM job {self.job}" if self.job else ""
        return f"process {self.pid} on {self.host}{job}"


def holder(path: Path) -> Holder | None:
    """Return the current holder of a lock; None if the lock is free, or its last holder is gone.

    Raises:
        InputError: The file system refuses.
    """
    with file_errors(path):
        try:
            with path.open() as file:
                # Shared, so that two processes that only look do not see each other. Needs no write permission.
                free = _flock(file, shared=True)
                if free is False:
                    return _read(path) or Holder(host="unknown", pid=0)
                _unlock(file)
                return _noted(path, without_flock=free is None)
        except FileNotFoundError:
            return None


@contextlib.contextmanager
def hold(path: Path, *, wait: bool = True, poll_seconds: float = 5.0, target: str = "") -> Iterator[int]:
    """Hold a lock.

    Args:
        path: The lock file; created if missing, with its folder. It stays afterwards, empty, unless the holder removes
            it.
        wait: Whether to wait while another process holds the lock.
        poll_seconds: Time between two attempts.
        target: Path that is written under the lock, for messages in other processes.

    Yields:
        The file descriptor, for child processes that hold the lock as long as they run (``pass_fds``).

    Raises:
        LockedError: Another process holds the lock, and ``wait`` is False.
        InputError: The file is a symbolic link or not a lock file, or the file system refuses.
    """
    with file_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    is_reported = False
    with contextlib.ExitStack() as stack:
        while not _take(file := stack.enter_context(_open(path)), path):
            stack.close()  # reopened for each attempt: the holder may remove the file
            message = f"{path} is held by {holder(path) or 'another process'}"
            if not wait:
                raise LockedError(f"{message}.")
            if not is_reported:
                print(f"Waiting: {message}.", flush=True)
                is_reported = True
            time.sleep(poll_seconds)
        _check_is_lock(file, path)
        me = Holder(socket.gethostname(), os.getpid(), os.environ.get(JOB_VARIABLE, ""), time.time(), target)
        try:
            with file_errors(target or path):
                _write(file, json.dumps(asdict(me)))
        except InputError:  # full disk: an empty file would stay in the user's folder
            path.unlink(missing_ok=True)
            raise
        done = threading.Event()
        heartbeat = threading.Thread(target=_touch, args=(path, done), daemon=True)
        heartbeat.start()
        try:
            yield file.fileno()
        finally:
            done.set()
            heartbeat.join()
            _write(file, "")


@contextlib.contextmanager
def hold_some(paths: list[Path], number: int, *, poll_seconds: float = 2.0) -> Iterator[tuple[list[int], list[int]]]:
    """Hold a number of locks out of several, whichever are free. Wait until there are enough.

    Args:
        paths: The lock files.
        number: Number of locks to hold.
        poll_seconds: Time between two attempts.

    Yields:
        Positions of the locks among ``paths``, and their file descriptors.

    Raises:
        InputError: There are fewer locks than ``number``.
    """
    if number > len(paths):
        raise InputError(f"{number} GPUs are needed, but this machine has {len(paths)}.")
    while True:
        with contextlib.ExitStack() as stack:
            taken: dict[int, int] = {}
            for position, path in enumerate(paths):
                if len(taken) < number:
                    with contextlib.suppress(LockedError):
                        taken[position] = stack.enter_context(hold(path, wait=False))
            if len(taken) == number:
                yield list(taken), list(taken.values())
                return
        time.sleep(poll_seconds)


def private_folder(path: Path) -> Path:
    """Create a folder that only this user can access, in a place that all users write to, such as /tmp.

    Args:
        path: The folder; created if missing.

    Returns:
        The folder.

    Raises:
        InputError: It is a symbolic link or a file, or belongs to another user.
    """
    with file_errors(path):
        path.mkdir(mode=0o700, exist_ok=True)
        found = path.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
            raise InputError(
                f"{path} is not a folder, or belongs to another user. Remove it, or set TMPDIR to "
                f"a folder that only you can write to."
            )
        if stat.S_IMODE(found.st_mode) != 0o700:
            path.chmod(0o700)
    return path


def _open(path: Path) -> IO[str]:
    """Open a lock file without following a symbolic link, which another user may have put there."""
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
    with file_errors(path):
        return os.fdopen(os.open(path, flags, 0o666), "r+", errors="replace")


def _check_is_lock(file: IO[str], path: Path) -> None:
    """Refuse a file with other content, which would be lost."""
    text = file.read(_MOST_CHARACTERS)
    if text.strip() and _holder_in(text) is None:
        raise InputError(f"{path} is not a lock file: it has other content. Rename or remove it.")


def _take(file: IO[str], path: Path) -> bool:
    free = _flock(file, shared=False)
    if free is False:
        return False
    try:
        is_current = os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        is_current = False
    # A file that its holder has removed meanwhile excludes no other process.
    if not is_current or _noted(path, without_flock=free is None) is not None:
        _unlock(file)
        return False
    return True


def _noted(path: Path, *, without_flock: bool) -> Holder | None:
    """Return the holder that a lock file names: on another node, or on any node where ``flock`` is not available."""
    who = _read(path)
    if who is None or _is_gone(who, path):
        return None
    if who.host != socket.gethostname():
        return who
    return who if without_flock and _is_alive(who.pid) else None


def _flock(file: IO[str], *, shared: bool) -> bool | None:
    """Take the ``flock``. Return whether it was free; None if the file system or operating system has none."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            return None
        raise
    return True


def _unlock(file: IO[str]) -> None:
    if fcntl is not None:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_UN)


def _is_alive(pid: int) -> bool:
    if os.name != "posix":
        return True  # os.kill would end the process there
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _is_gone(who: Holder, path: Path) -> bool:
    """Return whether a holder is gone: its job has ended, or it has not touched the file for `STALE_SECONDS`."""
    if who.job and shutil.which("squeue"):
        asked = subprocess.run(
            ["squeue", "--noheader", "--format=%T", "--jobs", who.job], capture_output=True, text=True, check=False
        )
        unknown = asked.returncode != 0 and "Invalid job id" in asked.stderr
        if unknown or (asked.returncode == 0 and not asked.stdout.strip()):
            return True
    return time.time() - path.stat().st_mtime > STALE_SECONDS


def _read(path: Path) -> Holder | None:
    try:
        return _holder_in(path.read_text())
    except (OSError, ValueError):
        return None


def _holder_in(text: str) -> Holder | None:
    try:
        return Holder(**json.loads(text))
    except (ValueError, TypeError):
        return None


def _write(file: IO[str], text: str) -> None:
    # Unbuffered: a buffer that a full disk refused would be written again when the file is closed.
    descriptor, left = file.fileno(), text.encode()
    os.ftruncate(descriptor, 0)
    os.lseek(descriptor, 0, os.SEEK_SET)
    while left:
        left = left[os.write(descriptor, left) :]


def _touch(path: Path, done: threading.Event) -> None:
    while not done.wait(HEARTBEAT_SECONDS):
        with contextlib.suppress(OSError):
            os.utime(path)
