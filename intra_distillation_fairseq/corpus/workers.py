"""Work in several processes, results in order."""

from __future__ import annotations

import ctypes
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing import get_context
from typing import TypeVar

from intra_distillation_fairseq.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")


def die_with_parent() -> None:
    """Have Linux end this process when its parent dies.

    A worker waits for work for ever when its parent was killed, and holds the parent's lock on the data folder, so the
    next run would be refused.
    """
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def _start_worker(parent: int, initializer: Callable[..., None], arguments: tuple) -> None:
    die_with_parent()
    if os.getppid() != parent:  # it died before the call above
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets Ctrl-C too and tells the workers
    initializer(*arguments)


def _start_nothing() -> None:
    pass


def map_in_order(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    jobs: int,
    initializer: Callable[..., None] = _start_nothing,
    arguments: tuple = (),
) -> Iterator[Result]:
    """Apply `function` to items in several processes and yield the results in the order of the items.

    Args:
        function: a function of a module, called in a worker.
        items: any number of them; taken as the work goes on, never all at once.
        jobs: number of processes; 1 works in this one.
        initializer: called once in each worker, with `arguments`.
        arguments: see `initializer`.

    Raises:
        UserError: a worker was killed from outside, which is nearly always for lack of memory.
    """
    iterator = iter(items)
    if jobs == 1:
        initializer(*arguments)
        yield from map(function, iterator)
        return
    pool = ProcessPoolExecutor(
        jobs, mp_context=get_context("fork"), initializer=_start_worker, initargs=(os.getpid(), initializer, arguments)
    )
    try:
        waiting = deque(pool.submit(function, item) for item in islice(iterator, 2 * jobs))
        while waiting:
            result = waiting.popleft().result()
            for item in islice(iterator, 1):
                waiting.append(pool.submit(function, item))
            yield result
    except BrokenProcessPool:
        raise UserError(
            f"a worker process of --jobs '{jobs}' was killed, memory may be short: give fewer --jobs"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
