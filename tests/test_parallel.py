"""Work over cases in several processes."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nnunet_conres.errors import InputError
from nnunet_conres.parallel import map_cases

WORK = """
import sys, time
from pathlib import Path

def work(path):
    Path(path).touch()
    time.sleep(300)

if __name__ == "__main__":
    from nnunet_conres.parallel import map_cases
    list(map_cases(work, sys.argv[1:], 2, "Waiting", False))
"""


class TestMapCases:
    @pytest.mark.parametrize("processes", [1, 2])
    def test_results_in_the_items_order(self, processes: int) -> None:
        assert list(map_cases(abs, [-3, 1, -2], processes, "Counting", False)) == [3, 1, 2]

    def test_a_worker_that_was_killed(self) -> None:
        with pytest.raises(InputError, match=r"Counting: a process was killed.* fewer processes than 2"):
            list(map_cases(os._exit, [1, 1, 1], 2, "Counting", False))

    @pytest.mark.skipif(not hasattr(os, "killpg"), reason="groups of processes are POSIX's")
    def test_workers_end_with_a_parent_that_was_killed(self, tmp_path: Path) -> None:
        (tmp_path / "waiting.py").write_text(WORK)
        marks = [tmp_path / "first", tmp_path / "second"]
        root = Path(__file__).parents[1]
        parent = subprocess.Popen(
            [sys.executable, str(tmp_path / "waiting.py"), *map(str, marks)],
            env=os.environ | {"PYTHONPATH": str(root)},
            start_new_session=True,
        )
        try:
            wait_until(lambda: all(mark.exists() for mark in marks), 60)
            parent.kill()
            parent.wait()
            wait_until(lambda: not group_lives(parent.pid), 30)
            assert not group_lives(parent.pid)
        finally:
            if group_lives(parent.pid):
                os.killpg(parent.pid, signal.SIGKILL)


def group_lives(leader: int) -> bool:
    try:
        os.killpg(leader, 0)
    except ProcessLookupError:
        return False
    return True


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)
