"""Registers everything with fairseq; importing it twice does no harm."""

import contextlib
import logging
from collections.abc import Iterator


@contextlib.contextmanager
def log_left_alone() -> Iterator[None]:
    """Whatever the body imports, the root logger is afterwards as it was before.

    fairseq.models.wav2vec.wav2vec2_classification calls logging.basicConfig(level=DEBUG) when it is imported, which
    would print the chatter of every library in a notebook. fairseq's commands set up the log before any import.
    """
    level, handlers = logging.root.level, logging.root.handlers[:]
    try:
        yield
    finally:
        logging.root.setLevel(level)
        for handler in set(logging.root.handlers).difference(handlers):
            logging.root.removeHandler(handler)


with log_left_alone():
    from intra_distillation_fairseq import compat

    compat.install()

    from intra_distillation_fairseq.criterions import intra_distillation, self_distillation, self_teaching  # noqa: F401
    from intra_distillation_fairseq.models import architectures, switch_transformer  # noqa: F401
    from intra_distillation_fairseq.optim import sage_adam  # noqa: F401
    from intra_distillation_fairseq.tasks import translation_intra_distillation  # noqa: F401
