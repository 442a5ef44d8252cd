"""Work on chunks of sentence pairs in several processes, results in order."""

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

Pair = tuple[str, str]
Result = TypeVar("Result")

CHUNK_PAIRS = 2000


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


def map_pairs(
    function: Callable[[list[Pair]], Result],
    pairs: Iterable[Pair],
    jobs: int,
    initializer: Callable[..., None],
    arguments: tuple = (),
) -> Iterator[Result]:
    """Apply `function` to chunks of pairs and yield the results in the order of the pairs.

    Both sides of a pair travel in one task, so that no worker can shift them against each other.

    Args:
        function: takes a list of at most 2,000 pairs.
        pairs: any number of them; read as the work goes on, never all at once.
        jobs: number of processes; 1 works in this one.
        initializer: called once in each worker, with `arguments`.
        arguments: see `initializer`.

    Raises:
        UserError: a worker was killed from outside, which is nearly always for lack of memory.
    """
    iterator = iter(pairs)
    chunks = iter(lambda: list(islice(iterator, CHUNK_PAIRS)), [])
    if jobs == 1:
        initializer(*arguments)
        yield from map(function, chunks)
        return
    pool = ProcessPoolExecutor(
        jobs, mp_context=get_context("fork"), initializer=_start_worker, initargs=(os.getpid(), initializer, arguments)
    )
    try:
        waiting = deque(pool.submit(function, chunk) for chunk in islice(chunks, 2 * jobs))
        while waiting:
            result = waiting.popleft().result()
            for chunk in islice(chunks, 1):
                waiting.append(pool.submit(function, chunk))
            yield result
    except BrokenProcessPool:
        raise UserError(
            f"a worker process of --jobs '{jobs}' was killed, memory may be short: give fewer --jobs"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
