"""Ordered parallel map over processes, in bounded memory."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ordered(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    workers: int,
    setup: Callable[..., None],
    arguments: tuple[Any, ...],
) -> Iterator[Result]:
    """Yield function(item) for each of `items`, in order, computed by `workers` processes (0: by this one).

    Each process calls setup(*arguments) first. Items are read only a few ahead of the results, so memory
    is bounded for any number of items. Exceptions from `function` are raised here. Raise OSError if a
    worker process was killed.
    """
    if workers == 0:
        setup(*arguments)
        yield from map(function, items)
        return
    context = multiprocessing.get_context("spawn")  # fork would copy locks that other threads hold
    with ProcessPoolExecutor(workers, context, _start, (setup, arguments)) as pool:
        waiting: deque[Future[Result]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                del item
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise OSError(
                "a worker process was killed, by lack of memory or a fault of a foreign tokenizer; "
                "run the same command again with fewer --workers to resume"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _start(setup: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent handles it
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    setup(*arguments)


def _leave_with_parent() -> None:
    """Exit this process when its parent has been killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
