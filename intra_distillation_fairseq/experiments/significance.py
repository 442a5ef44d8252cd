"""Paired bootstrap tests of systems against one baseline: sacrebleu's own, with a memory, as each takes seconds."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from intra_distillation_fairseq.experiments.prepared import raw_lines
from intra_distillation_fairseq.files import file_sha256, read_json, write_json

RESAMPLES = 1000
SEED = "12345"  # sacrebleu's default


class PairedBootstrap:
    """Tests pairs of evaluation folders.

    Args:
        memory: JSON file that keeps the results, by the SHA-256 of the texts; made and extended as need be.
        say: prints one line of progress.
    """

    def __init__(self, memory: Path, say: Callable[[str], None]) -> None:
        self._memory = memory
        self._say = say
        self._known: dict[str, float] = read_json(memory) or {}
        self._digests: dict[Path, str] = {}

    def test(self, what: str, baseline: Path, systems: dict[str, Path], tokenize: str) -> dict[str, float | None]:
        """Test each system against the baseline, on the same resamples of the same test set.

        Equal texts have p = 1; sacrebleu would give the smallest p there is, as no resample differs by more than none.

        Args:
            what: names the tests in the progress.
            baseline: evaluation folder, which holds hypotheses.txt and references.txt, both as they were scored.
            systems: name -> evaluation folder.
            tokenize: sacrebleu's tokeniser for BLEU.
        Returns:
            name -> p-value; None where the references are others, or a text is gone.
        """
        keys = {name: self._key(baseline, folder, tokenize) for name, folder in systems.items()}
        missing = [name for name, key in keys.items() if key and key not in self._known]
        if missing:
            self._say(f"paired bootstrap, {what}: {', '.join(missing)}")
            for name, p in _paired_bootstrap(baseline, {name: systems[name] for name in missing}, tokenize).items():
                self._known[keys[name]] = p
            write_json(self._memory, self._known)
        return {name: self._known[key] if key else None for name, key in keys.items()}

    def _key(self, baseline: Path, system: Path, tokenize: str) -> str | None:
        """Digest of all that decides a p-value; None where the two cannot be compared."""
        texts = [folder / f"{name}.txt" for name in ("hypotheses", "references") for folder in (baseline, system)]
        if not all(path.is_file() for path in texts):
            return None
        *hypotheses, reference, other = map(self._sha256, texts)
        if reference != other:
            return None
        facts = [*hypotheses, reference, tokenize, importlib.metadata.version("sacrebleu"), RESAMPLES, SEED]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def _sha256(self, path: Path) -> str:
        if path not in self._digests:
            self._digests[path] = file_sha256(path)
        return self._digests[path]


def _paired_bootstrap(baseline: Path, systems: dict[str, Path], tokenize: str) -> dict[str, float]:
    from sacrebleu.metrics import BLEU  # slow to import
    from sacrebleu.significance import PairedTest

    texts = {name: raw_lines(folder / "hypotheses.txt") for name, folder in systems.items()}
    reference_lines, baseline_lines = raw_lines(baseline / "references.txt"), raw_lines(baseline / "hypotheses.txt")
    values = {name: 1.0 for name, lines in texts.items() if lines == baseline_lines}
    others = [(name, lines) for name, lines in texts.items() if name not in values]
    if others:
        metrics: dict[str, Any] = {"BLEU": BLEU(tokenize=tokenize, force=True)}
        with _fixed_seed():
            test = PairedTest(
                [("(baseline)", baseline_lines), *others], metrics, [reference_lines], "bs", n_samples=RESAMPLES
            )
            _, scores = test()
        values |= {name: scores["BLEU"][scores["System"].index(name)].p_value for name, _ in others}
    return values


@contextmanager
def _fixed_seed() -> Iterator[None]:
    """Sacrebleu takes its seed from the environment, where another one would change the table."""
    before = os.environ.get("SACREBLEU_SEED")
    os.environ["SACREBLEU_SEED"] = SEED
    try:
        yield
    finally:
        del os.environ["SACREBLEU_SEED"]
        if before is not None:
            os.environ["SACREBLEU_SEED"] = before
