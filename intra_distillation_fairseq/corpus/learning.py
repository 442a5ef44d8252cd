"""How far sentencepiece is with learning a vocabulary, by its own log: it offers nothing else."""

from __future__ import annotations

import math
import os
import re
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from intra_distillation_fairseq.progress import Progress

# It begins with far too many pieces and throws away a quarter in each round, until this many times the wanted ones are
# left (unigram_model_trainer.cc: shrinking_factor, desired_vocab_size).
_KEPT, _LAST = 0.75, 1.1
_ROUND = re.compile(rb"EM sub_iter=0 size=(\d+) ")
_POLL_S = 0.5
_STDERR = 2


def rounds(log: bytes, pieces: int) -> tuple[int, int]:
    """Rounds that are done, and all of them; (0, 0) before the first one is.

    Args:
        log: what sentencepiece has written by now.
        pieces: the wanted number.
    """
    sizes = [int(size) for size in _ROUND.findall(log)]
    if not sizes:
        return 0, 0
    to_come = math.ceil(math.log(max(sizes[-1] / (_LAST * pieces), 1.0)) / math.log(1 / _KEPT))
    return len(sizes), len(sizes) + to_come


@contextmanager
def shown(pieces: int) -> Iterator[None]:
    """Show the rounds while the body learns so many pieces with minloglevel=0.

    sentencepiece writes to the process's standard error from C++, so that is a file meanwhile; what was there before is
    shown to. It lets other threads run while it learns.
    """
    ended = threading.Event()
    before = os.dup(_STDERR)
    with tempfile.TemporaryFile() as log, os.fdopen(before, "w", encoding="utf-8", errors="replace") as screen:
        follower = threading.Thread(target=_follow, args=(log.fileno(), pieces, ended, screen), daemon=True)
        os.dup2(log.fileno(), _STDERR)
        try:
            follower.start()
            yield
        finally:
            os.dup2(before, _STDERR)
            ended.set()
            follower.join()


def _follow(log: int, pieces: int, ended: threading.Event, screen) -> None:
    progress = None
    while not ended.wait(_POLL_S):
        done, total = rounds(os.pread(log, os.fstat(log).st_size, 0), pieces)
        if total and progress is None:
            progress = Progress("learn pieces", total, "rounds", stream=screen)
        if progress is not None:
            progress.show(done)
    if progress is not None:
        progress.close()
