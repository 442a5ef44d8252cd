"""manifest.json: what a data folder holds and what it was made from."""

from __future__ import annotations

from typing import Any

FORMAT = 1
_VERSIONS = ("sacremoses", "sentencepiece", "fairseq", "unicode")


def build_manifest(
    corpus: str,
    languages: tuple[str, str],
    raw: dict[str, Any],
    learnt: dict[str, Any],
    encoded: dict[str, Any],
    binary: dict[str, Any],
) -> dict[str, Any]:
    """Put the manifest together from the stamps of the stages, so that it tells of the files that are there.

    Args:
        corpus: its name.
        languages: source and target.
        raw: stamp of the stage that made raw/; its report has `lines` per split and may have `test_sets`.
        learnt: stamp of subwords.
        encoded: stamp of encode.
        binary: stamp of binarise.
    """
    settings: dict[str, Any] = {}
    for stamp in (raw, learnt, encoded, binary):
        settings.update(stamp["settings"])
    versions = {name: settings.pop(name) for name in _VERSIONS if name in settings}
    settings.pop("languages")
    splits = {
        split: {
            "lines": lines,
            "binarised_lines": encoded["report"]["lines"][split],
            "sha256": {lang: raw["outputs"][f"raw/{split}.{lang}"]["sha256"] for lang in languages},
        }
        for split, lines in raw["report"]["lines"].items()
    }
    return {
        "format": FORMAT,
        "corpus": corpus,
        "source_lang": languages[0],
        "target_lang": languages[1],
        "splits": splits,
        "test_sets": raw["report"].get("test_sets", []),
        "inputs": raw["report"]["inputs"],
        "settings": settings,
        "versions": versions,
        "vocab_types": learnt["report"]["types"],
    }
