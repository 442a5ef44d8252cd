"""A tiny archive of the layout of IWSLT'14 (2014-01.tgz), made of generated words."""

from __future__ import annotations

import io
import random
import tarfile
from pathlib import Path

SYLLABLES = [consonant + vowel for consonant in "bdklmr" for vowel in "aeiou"]
TEST_SETS = ("TED.dev2010", "TEDX.dev2012", "TED.tst2010")


def sentence(rng: random.Random) -> str:
    words = ["".join(rng.choice(SYLLABLES) for _ in range(rng.randint(1, 3))) for _ in range(rng.randint(3, 9))]
    return " ".join(words).capitalize() + rng.choice(".?!")


def train_tags(rng: random.Random, talks: int, lines: int) -> str:
    out = []
    for talk in range(talks):
        out.append(f"<url>http://www.ted.com/talks/{talk}</url>")
        out += [sentence(rng) for _ in range(lines)]
        out += [f"<talkid>{talk}</talkid>", f"<title>Title {talk}: {sentence(rng)}</title>"]
        out += [f"<description>TED Talk {talk}: {sentence(rng)}</description>", "<keywords>talks, words</keywords>"]
    return "\n".join(out) + "\n"


def xml_set(rng: random.Random, lang: str, lines: int) -> str:
    segs = "".join(f'<seg id="{i + 1}"> {sentence(rng)} </seg>\n' for i in range(lines))
    return (
        f'<?xml version="1.0" encoding="UTF-8"?>\n<mteval>\n<srcset setid="x" srclang="{lang}">\n'
        f'<doc docid="1" genre="lectures">\n<title>A title</title>\n{segs}</doc>\n</srcset>\n</mteval>\n'
    )


def pair_files(lang: str, talks: int = 6, lines: int = 30, sets: tuple[str, ...] = TEST_SETS) -> dict[str, str]:
    """Name -> text of the members of one pair's archive; the same arguments give the same text."""
    pair, files = f"{lang}-en", {}
    for side in (lang, "en"):
        rng = random.Random(f"{pair} {side}")
        files[f"train.tags.{pair}.{side}"] = train_tags(rng, talks, lines)
        for name in sets:
            files[f"IWSLT14.{name}.{pair}.{side}.xml"] = xml_set(rng, side, 12)
    return files


def tgz(members: dict[str, bytes | str]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, text in members.items():
            data = text if isinstance(text, bytes) else text.encode()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def write_archive(path: Path, pairs: dict[str, dict[str, str]]) -> Path:
    """Write an archive of archives; `pairs` is source language -> files (see `pair_files`)."""
    outer = {}
    for lang, files in pairs.items():
        pair = f"{lang}-en"
        outer[f"2014-01/texts/{lang}/en/{pair}.tgz"] = tgz({f"{pair}/{name}": text for name, text in files.items()})
    path.write_bytes(tgz(outer))
    return path
