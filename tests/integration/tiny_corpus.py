"""Generated parallel text for tests."""

from __future__ import annotations

import random
from pathlib import Path


def write_corpus(folder: Path, splits: dict[str, int], seed: int = 1) -> None:
    """Sentences of invented words on the source side and the same words in reverse order on the target side."""
    rng = random.Random(seed)
    words = [a + b for a in "kbmtr" for b in "aeiou"]
    for split, size in splits.items():
        sentences = [[rng.choice(words) for _ in range(rng.randint(2, 9))] for _ in range(size)]
        (folder / f"{split}.xx").write_text("".join(" ".join(s) + "\n" for s in sentences), encoding="utf-8")
        (folder / f"{split}.en").write_text("".join(" ".join(s[::-1]) + "\n" for s in sentences), encoding="utf-8")
