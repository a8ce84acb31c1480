import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from nnunet_conres import locks
from nnunet_conres.errors import InputError
from nnunet_conres.locks import STALE_SECONDS, LockedError, hold, hold_some, holder, private_folder

pytest.importorskip("fcntl", reason="needs an operating system with flock")

# Holds a lock; with "child", starts a process that inherits it.
HOLD = """
import subprocess, sys, time
from pathlib import Path
from typing import Any
from nnunet_conres.locks import hold
with hold(Path(sys.argv[1])) as descriptor:
    child = subprocess.Popen(["sleep", "60"], pass_fds=[descriptor]) if "child" in sys.argv else None
    print(child.pid if child else 0, flush=True)
    time.sleep(60)
"""


def start(path: Path, *arguments: str) -> tuple[subprocess.Popen, int]:
    command = [sys.executable, "-c", HOLD, str(path), *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, int(process.stdout.readline())


def elsewhere(path: Path, age: float = 0.0, job: str = "") -> None:
    """Write a lock file like a holder on another node, on a file system whose locks work only within a node."""
    path.write_text(json.dumps({"host": "node7", "pid": 5, "job": job, "since": 0.0}))
    os.utime(path, (time.time() - age, time.time() - age))


class TestHold:
    def test_excludes_others_as_long_as_it_lasts(self, tmp_path: Path) -> None:
        path = tmp_path / "new" / "lock"
        with hold(path):
            who = holder(path)
            assert who is not None
            assert (who.host, who.pid) == (socket.gethostname(), os.getpid())
            with pytest.raises(LockedError, match=f"process {os.getpid()} on"), hold(path, wait=False):
                pass
        assert holder(path) is None
        with hold(path, wait=False):
            pass

    def test_is_given_back_by_a_process_that_is_killed(self, tmp_path: Path) -> None:
        process, _ = start(tmp_path / "lock")
        assert str(holder(tmp_path / "lock")).startswith(f"process {process.pid} on")
        process.kill()
        process.wait()
        assert holder(tmp_path / "lock") is None

    def test_lasts_as_long_as_a_command_that_inherited_it(self, tmp_path: Path) -> None:
        process, child = start(tmp_path / "lock", "child")
        process.kill()
        process.wait()
        assert holder(tmp_path / "lock") is not None
        os.kill(child, signal.SIGKILL)
        deadline = time.monotonic() + 10
        while holder(tmp_path / "lock") is not None and time.monotonic() < deadline:
            time.sleep(0.05)
        assert holder(tmp_path / "lock") is None

    def test_waits(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        process, _ = start(tmp_path / "lock")
        subprocess.Popen(["sh", "-c", f"sleep 0.5; kill {process.pid}"])
        with hold(tmp_path / "lock", poll_seconds=0.05):
            pass
        assert f"is held by process {process.pid}" in capsys.readouterr().out
        process.wait()


def test_a_file_in_place_of_the_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="lock: Not a directory"):
        holder(tmp_path / "file" / "lock")
    with pytest.raises(InputError, match="file"), hold(tmp_path / "file" / "lock"):
        pass


class TestFilesOfOthers:
    """The path of a lock may be a link or another file, which must not be emptied."""

    @pytest.fixture
    def thesis(self, tmp_path: Path) -> Path:
        path = tmp_path / "thesis.tex"
        path.write_text("years of work")
        return path

    def test_a_symbolic_link_is_refused(self, tmp_path: Path, thesis: Path) -> None:
        lock = tmp_path / "lock"
        lock.symlink_to(thesis)
        with pytest.raises(InputError, match=r"lock: Too many levels of symbolic links\. Remove"), hold(lock):
            pass
        assert thesis.read_text() == "years of work"

    @pytest.mark.parametrize("content", [b"years of work", b'{"a": 1}', b"\xff\x00", b"[]"])
    def test_a_file_that_holds_something_else_is_refused(self, thesis: Path, content: bytes) -> None:
        thesis.write_bytes(content)
        with pytest.raises(InputError, match="is not a lock file"), hold(thesis):
            pass
        assert thesis.read_bytes() == content

    def test_what_a_killed_holder_left_is_taken(self, tmp_path: Path) -> None:
        elsewhere(tmp_path / "lock", STALE_SECONDS + 60)
        with hold(tmp_path / "lock") as descriptor:
            assert json.loads(os.pread(descriptor, 1000, 0))["pid"] == os.getpid()


class TestPrivateFolder:
    def test_is_made_for_this_user_only(self, tmp_path: Path) -> None:
        for _ in range(2):
            assert private_folder(tmp_path / "gpus").stat().st_mode & 0o777 == 0o700
        (tmp_path / "gpus").chmod(0o777)
        assert private_folder(tmp_path / "gpus").stat().st_mode & 0o777 == 0o700

    @pytest.mark.parametrize("kind", ["link", "broken link", "file"])
    def test_anything_else_is_refused(self, tmp_path: Path, kind: str) -> None:
        path, target = tmp_path / "gpus", tmp_path / "target"
        if kind == "link":
            target.mkdir(mode=0o755)
        if kind == "file":
            path.touch()
        else:
            path.symlink_to(target)
        with pytest.raises(InputError, match="gpus"):
            private_folder(path)
        assert not target.exists() or target.stat().st_mode & 0o777 == 0o755

    @pytest.mark.skipif(os.geteuid() != 0, reason="needs a superuser, who can give a folder away")
    def test_one_of_somebody_else_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "gpus").mkdir(mode=0o700)
        os.chown(tmp_path / "gpus", 12345, 12345)
        with pytest.raises(InputError, match="belongs to another user"):
            private_folder(tmp_path / "gpus")


class TestAnotherNode:
    def test_counts_while_it_is_touched(self, tmp_path: Path) -> None:
        path = tmp_path / "lock"
        elsewhere(path)
        assert str(holder(path)) == "process 5 on node7"
        with pytest.raises(LockedError, match="node7"), hold(path, wait=False):
            pass

    def test_no_longer_when_it_has_not_been_touched(self, tmp_path: Path) -> None:
        path = tmp_path / "lock"
        elsewhere(path, STALE_SECONDS + 60)
        assert holder(path) is None
        with hold(path, wait=False):
            pass

    @pytest.mark.parametrize(("answer", "gone"), [("echo RUNNING", False), ("true", True)])
    def test_a_job_that_has_ended_is_gone_at_once(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str, gone: bool
    ) -> None:
        squeue = tmp_path / "squeue"
        squeue.write_text(f"#!/bin/sh\n{answer}\n")
        squeue.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
        elsewhere(tmp_path / "lock", job="12")
        assert (holder(tmp_path / "lock") is None) == gone

    def test_a_holder_touches_it(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(locks, "HEARTBEAT_SECONDS", 0.05)
        path = tmp_path / "lock"
        with hold(path):
            os.utime(path, (0, 0))
            deadline = time.monotonic() + 5
            while path.stat().st_mtime < 1 and time.monotonic() < deadline:
                time.sleep(0.02)
            assert path.stat().st_mtime > 1


class TestHoldSome:
    def test_takes_those_that_are_free(self, tmp_path: Path) -> None:
        paths = [tmp_path / str(number) for number in range(3)]
        with hold(paths[1]), hold_some(paths, 2) as (positions, descriptors):
            assert positions == [0, 2]
            assert len(descriptors) == 2
        assert all(holder(path) is None for path in paths)

    def test_more_than_there_are(self, tmp_path: Path) -> None:
        with (
            pytest.raises(ValueError, match="2 GPUs are needed, but this machine has 1"),
            hold_some([tmp_path / "0"], 2),
        ):
            pass


def test_one_that_cannot_be_written(tmp_path: Path, limited_files: Any) -> None:
    target = tmp_path / "new"
    refused = pytest.raises(InputError, match=f"^{target}: File too large")
    with limited_files(16), refused, hold(tmp_path / ".lock", target=str(target)):
        pass
    assert not list(tmp_path.iterdir())
