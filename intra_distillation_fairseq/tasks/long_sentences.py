"""Sentences beyond the limits of model or batch: left out and counted, or named before the training begins."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
from fairseq import utils

logger = logging.getLogger(__name__)

# How many of the sentences that are too long a message names.
NAMED = 20


class LongSentencesMixin:
    """Put before any fairseq task class: the limits hold for every set, and what breaks them is said in one line.

    fairseq ends with a stack trace where a sentence of another set than the training set is too long, and where one is
    within the model's limit but not within --max-tokens-valid even under --skip-invalid-size-inputs-valid-test.
    """

    def get_batch_iterator(
        self, dataset, max_tokens=None, max_sentences=None, max_positions=None, *args: Any, **kwargs: Any
    ):
        """As it is, with max_tokens as a further limit of a sentence's length, as fairseq has it in training."""
        limits = utils.resolve_max_positions(max_positions, max_tokens)
        return super().get_batch_iterator(dataset, max_tokens, max_sentences, limits, *args, **kwargs)

    def filter_indices_by_size(self, indices, dataset, max_positions=None, ignore_invalid_inputs=False) -> np.ndarray:
        """The sentences within the limits.

        Args:
            indices: (N,) sentence ids.
            dataset: of the sentences.
            max_positions: most tokens of a source and of a target sentence, with their end of sentence.
            ignore_invalid_inputs: leave longer ones out, with a warning.

        Raises:
            SystemExit: one is longer and may not be left out, or none is short enough.
        """
        kept, ignored = dataset.filter_indices_by_size(indices, max_positions)
        if len(ignored) == 0:
            return kept
        name = next((name for name, held in self.datasets.items() if held is dataset), None)
        counted = f"{len(ignored)} of {len(indices)} sentences" + (f" of the set '{name}'" if name else "")
        named = " ".join(map(str, sorted(ignored)[:NAMED])) + (" ..." if len(ignored) > NAMED else "")
        limits = (
            f"{max_positions} tokens (source, target; --max-source-positions, --max-target-positions, --max-tokens)"
        )
        if not ignore_invalid_inputs:
            raise SystemExit(
                f"error: {counted} are longer than {limits}: sentences {named}: shorten them, raise the limits, or "
                "leave them out with --skip-invalid-size-inputs-valid-test"
            )
        if len(kept) == 0:
            raise SystemExit(f"error: {counted} are longer than {limits}: none is left; raise the limits")
        logger.warning(f"{counted} are left out, since they are longer than {limits}: sentences {named}")
        return kept
