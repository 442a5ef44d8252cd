"""What to say when the disk is full."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from intra_distillation_fairseq.errors import UserError


def is_full(error: BaseException) -> bool:
    """Tell whether an error says that the disk, or the user's share of it, is full."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def explain_full_disk(out: Path, flag: str = "--out") -> Iterator[None]:
    """Turn the error of a full disk, wherever it comes from in the body, into one line.

    Args:
        out: the folder that the command writes to.
        flag: by which it is given.

    Raises:
        UserError: the disk is full.
    """
    try:
        yield
    except OSError as error:
        if not is_full(error):
            raise
        raise UserError(
            f"no space left on the disk of '{error.filename or out}' ({error.strerror}): free some and run the same "
            f"command again, it goes on where it stopped; or give another {flag}"
        ) from None
