"""Processing of cases in parallel processes."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import TypeVar

from nnunet_conres.errors import InputError

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def map_cases(
    function: Callable[[_Item], _Result], items: Sequence[_Item], processes: int, title: str, progress: bool
) -> Iterator[_Result]:
    """Yield the results of a function for all items, in the order of the items, with a progress bar."""
    from tqdm import tqdm

    bar = tqdm(total=len(items), desc=title, unit="case", disable=not progress or not items)
    with bar:
        if processes == 1 or len(items) < 2:
            for item in items:
                result = function(item)
                bar.update()
                yield result
            return
        # Spawned on every system: a fork after ITK has started its threads can hang.
        context = multiprocessing.get_context("spawn")
        workers = min(processes, len(items))
        with ProcessPoolExecutor(workers, context, _end_with_parent, (os.getpid(),)) as pool:
            futures = [pool.submit(function, item) for item in items]
            try:
                for _ in as_completed(futures):
                    bar.update()
                yield from (future.result() for future in futures)
            except BrokenProcessPool as error:
                raise InputError(
                    f"{title}: a process was killed, most likely because memory ran out. Run the same command again "
                    f"with fewer processes than {workers}."
                ) from error
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise


def try_cases(
    function: Callable[[_Item], _Result], items: Sequence[_Item], processes: int, title: str, progress: bool
) -> Iterator[_Result | InputError]:
    """As `map_cases`, but yield the `InputError` of an item in place of its result."""
    return map_cases(partial(_result_or_error, function), items, processes, title, progress)


def _result_or_error(function: Callable[[_Item], _Result], item: _Item) -> _Result | InputError:
    try:
        return function(item)
    except InputError as error:
        return error


def map_all_cases(
    function: Callable[[_Item], _Result], items: Sequence[_Item], processes: int, title: str, progress: bool
) -> list[_Result]:
    """As `map_cases`, but return a list, and raise the errors of all items together.

    Raises:
        InputError: The function raised it for some items; each error is listed once.
    """
    results: list[_Result] = []
    errors: dict[str, None] = {}
    for result in try_cases(function, items, processes, title, progress):
        if isinstance(result, InputError):
            errors |= dict.fromkeys(result.errors)
        else:
            results.append(result)
    if errors:
        raise InputError(list(errors))
    return results


def _end_with_parent(parent: int) -> None:
    """End a worker whose parent was killed; otherwise it would wait for work, and keep its memory, for ever."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
