"""newstest2014 English-German, the test set: out of its archive, or through sacrebleu, with the same text."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from intra_distillation_fairseq.corpus.archives import MAX_UNPACKED, copy_members
from intra_distillation_fairseq.corpus.clean import read_lines
from intra_distillation_fairseq.corpus.disk import is_full
from intra_distillation_fairseq.corpus.oddities import Oddities, scan
from intra_distillation_fairseq.corpus.pairs import Pair, join_sides
from intra_distillation_fairseq.corpus.segments import Segment, join_segments, read_segments
from intra_distillation_fairseq.corpus.stages import FileDigests
from intra_distillation_fairseq.corpus.wmt17_archives import TEST_ARCHIVE, TEST_MD5, TEST_URL, other_bytes
from intra_distillation_fairseq.errors import UserError

_SACREBLEU_SET, _SACREBLEU_PAIR = "wmt14/full", "en-de"
_MEMBERS = ("test-full/newstest2014-deen-src.en.sgm", "test-full/newstest2014-deen-ref.de.sgm")


@dataclass(frozen=True)
class TestSet:
    """Where the test set comes from; English first.

    Attributes:
        origin: for messages and the manifest.
        archive: test-full.tgz. None: sacrebleu's files.
        texts: sacrebleu's files, one sentence a line. None: the archive.
        sha256: name -> checksum of what it is read from.
    """

    origin: str
    archive: Path | None
    texts: tuple[Path, Path] | None
    sha256: dict[str, str]

    def read(
        self, folder: Path, replace_invalid: bool = False, max_bytes: int = MAX_UNPACKED
    ) -> tuple[list[Pair], dict[str, Oddities]]:
        """Its pairs, and what is odd in each file.

        Args:
            folder: files of an archive are copied there first.
            replace_invalid: put U+FFFD where the text is not UTF-8.
            max_bytes: how much the archive may unpack to.

        Raises:
            UserError: the archive is damaged or unpacks to more, or the two sides do not have the same sentences.
        """
        files = self.texts or tuple(folder / Path(member).name for member in _MEMBERS)
        if not self.texts:
            copy_members(self.archive, dict(zip(_MEMBERS, files)), max_bytes)
        names, found = tuple(map(str, files)), tuple(scan(path, replace_invalid) for path in files)
        texts = [read_lines(path, replace_invalid) for path in files]
        if self.texts:
            pairs = list(join_sides(*texts, names))
        else:
            pairs = join_segments(tuple(map(segments, texts, names, found)), names, found)
        return pairs, {path.name: oddities for path, oddities in zip(files, found)}


def segments(lines: Iterable[str], name: str, found: Oddities) -> list[Segment]:
    """The segments of an .sgm file, with the text exactly as sacrebleu reads it (see `segment_text`)."""
    read = read_segments(lines, name, found, lambda line: line.startswith("<seg "))
    return [replace(segment, text=segment_text(segment.text)) for segment in read]


def segment_text(line: str) -> str:
    """What sacrebleu's "<seg.*?>(.*)</seg>.*?" leaves of a line, with single spaces and entities as they are.

    Looked up without that expression, which takes hours on a line of a million ">".
    """
    tag, end = line.find("<seg"), line.rfind("</seg>")
    start = line.find(">", tag) + 1
    if tag > -1 and 0 < start <= end:
        line = line[:tag] + line[start:end] + line[end + len("</seg>") :]
    return " ".join(line.split())


def from_archive(path: Path, digests: FileDigests, accept_other: bool) -> TestSet:
    """The test set of test-full.tgz.

    Args:
        path: the archive.
        digests: remembers checksums.
        accept_other: take it with any checksum.

    Raises:
        UserError: its checksum is not the published one.
    """
    md5 = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
    if md5 != TEST_MD5 and not accept_other:
        raise other_bytes(path, "MD5", md5, TEST_MD5)
    return TestSet(TEST_ARCHIVE, path, None, {TEST_ARCHIVE: digests.sha256(path)})


def from_sacrebleu(digests: FileDigests) -> TestSet:
    """The test set that `sacrebleu -t wmt14/full -l en-de` scores against, downloaded and checked by sacrebleu.

    Raises:
        UserError: sacrebleu could not get it.
    """
    from sacrebleu.dataset import DATASETS

    try:
        dataset = DATASETS[_SACREBLEU_SET]
        texts = (
            Path(dataset.get_source_file(_SACREBLEU_PAIR)),
            Path(dataset.get_reference_files(_SACREBLEU_PAIR)[0]),
        )
    except (Exception, SystemExit) as error:  # it has no errors of its own, and leaves with sys.exit on a wrong MD5
        if is_full(error):
            raise
        why = " ".join(str(error).split())
        raise UserError(
            f"sacrebleu could not get its test set {_SACREBLEU_SET} ({why}): check the network, or put {TEST_ARCHIVE} "
            f"({TEST_URL}) into a folder with the other archives and give --archives DIR"
        ) from None
    origin = f"sacrebleu {_SACREBLEU_SET}"
    return TestSet(origin, None, texts, {f"{origin}/{path.name}": digests.sha256(path) for path in texts})
