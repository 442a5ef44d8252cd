"""Keeps libraries from talking over a command that uses fairseq in its own process."""

from __future__ import annotations

import logging
import warnings


def quiet() -> None:
    """Only warnings from now on: importing fairseq leaves the log at its most talkative, for every library."""
    import fairseq  # noqa: F401  now, so that it does not undo this later

    logging.root.setLevel(logging.WARNING)
    logging.getLogger("fairseq").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", "Support for mismatched key_padding_mask")  # torch, about fairseq's masks
