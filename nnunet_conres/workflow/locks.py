"""Locks between processes, on one machine and across the nodes of a cluster, which outlive no process.

A lock is one that the operating system holds on a file (``flock``) and gives back when the last process that inherited
it ends, however that happens. Some network file systems keep such locks to one node. So the file also says who holds
it, and the holder touches it all the time: what another node has touched lately counts as held.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Final

HEARTBEAT_SECONDS: Final = 30.0
# What a node may be late with its touch, clocks that differ included, before its lock counts as abandoned.
STALE_SECONDS: Final = 600.0
JOB_VARIABLE: Final = "SLURM_JOB_ID"


class LockedError(RuntimeError):
    """A lock is held by somebody else."""


@dataclass(frozen=True)
class Holder:
    """Who holds a lock.

    Attributes:
        host: Name of the machine.
        pid: Process on it.
        job: SLURM's job id; empty outside of SLURM.
        since: When it was taken, seconds since 1970.
    """

    host: str
    pid: int
    job: str = ""
    since: float = 0.0

    def __str__(self) -> str:
        job = f", SLURM job {self.job}" if self.job else ""
        return f"process {self.pid} on {self.host}{job}"


def holder(path: Path) -> Holder | None:
    """Who holds a lock now; None if nobody does, or whoever took it last is gone."""
    try:
        with path.open() as file:
            if _taken(file):
                return _read(path) or Holder(host="unknown", pid=0)
            # Nobody on this node, which is all that some file systems tell.
            elsewhere = _read(path)
            if elsewhere is None or elsewhere.host == socket.gethostname() or _is_gone(elsewhere, path):
                return None
            return elsewhere
    except FileNotFoundError:
        return None


@contextlib.contextmanager
def hold(path: Path, *, wait: bool = True, poll_seconds: float = 5.0) -> Iterator[int]:
    """Holds a lock.

    Args:
        path: The lock's file; made where it is not there, with its folder. It stays afterwards, empty.
        wait: Whether to wait for a lock that is held.
        poll_seconds: How often to look.

    Yields:
        The file descriptor, for processes that are to hold the lock as long as they live (``pass_fds``).

    Raises:
        LockedError: It is held and not to be waited for.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    told = False
    with path.open("a+") as file:
        while not _take(file, path):
            message = f"{path} is held by {holder(path) or 'another process'}"
            if not wait:
                raise LockedError(f"{message}.")
            if not told:
                print(f"Waiting: {message}.", flush=True)
                told = True
            time.sleep(poll_seconds)
        me = Holder(socket.gethostname(), os.getpid(), os.environ.get(JOB_VARIABLE, ""), time.time())
        _write(file, json.dumps(asdict(me)))
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
    """Holds a number of locks out of several, whichever are free.

    Args:
        paths: The locks' files.
        number: How many to hold.
        poll_seconds: How often to look.

    Yields:
        Positions of the locks among ``paths``, and their file descriptors.
    """
    if number > len(paths):
        raise ValueError(f"{number} GPUs were asked for, but there are {len(paths)} here.")
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


def _take(file: IO[str], path: Path) -> bool:
    import fcntl  # not on Windows, where the workflow does not run, but the command's help does

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    elsewhere = _read(path)
    if elsewhere is not None and elsewhere.host != socket.gethostname() and not _is_gone(elsewhere, path):
        fcntl.flock(file, fcntl.LOCK_UN)
        return False
    return True


def _taken(file: IO[str]) -> bool:
    import fcntl

    try:
        # Shared: two that only look must not see each other. It needs no right to write.
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    fcntl.flock(file, fcntl.LOCK_UN)
    return False


def _is_gone(who: Holder, path: Path) -> bool:
    """Whether a holder on another node is gone: its job has ended, or it has not touched the lock for long."""
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
        return Holder(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _write(file: IO[str], text: str) -> None:
    file.seek(0)
    file.truncate()
    file.write(text)
    file.flush()


def _touch(path: Path, done: threading.Event) -> None:
    while not done.wait(HEARTBEAT_SECONDS):
        with contextlib.suppress(OSError):
            os.utime(path)
