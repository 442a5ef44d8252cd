"""newstest2014 English-German, the test set: out of its archive, or through sacrebleu, with the same text."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from intra_distillation_fairseq.corpus.archives import copy_members
from intra_distillation_fairseq.corpus.clean import read_lines
from intra_distillation_fairseq.corpus.disk import is_full
from intra_distillation_fairseq.corpus.pairs import Pair, join_sides
from intra_distillation_fairseq.corpus.stages import FileDigests
from intra_distillation_fairseq.corpus.wmt17_archives import TEST_ARCHIVE, TEST_MD5, TEST_URL, other_bytes
from intra_distillation_fairseq.errors import UserError

_SACREBLEU_SET, _SACREBLEU_PAIR = "wmt14/full", "en-de"
_MEMBERS = ("test-full/newstest2014-deen-src.en.sgm", "test-full/newstest2014-deen-ref.de.sgm")
_SEGMENT = re.compile("<seg.*?>(.*)</seg>.*?")


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

    def read(self, folder: Path) -> list[Pair]:
        """Its pairs; files of an archive are copied to `folder` first.

        Raises:
            UserError: the archive is damaged, or the two sides do not have the same number of sentences.
        """
        if self.texts:
            return list(join_sides(*map(read_lines, self.texts), tuple(map(str, self.texts))))
        files = tuple(folder / Path(member).name for member in _MEMBERS)
        copy_members(self.archive, dict(zip(_MEMBERS, files)))
        return list(join_sides(*map(segments, files), tuple(map(str, files))))


def segments(path: Path) -> list[str]:
    """The sentences of an .sgm file exactly as sacrebleu reads them: single spaces, entities as they are."""
    lines = (line for line in read_lines(path) if line.startswith("<seg "))
    return [" ".join(_SEGMENT.sub(r"\1", line).split()) for line in lines]


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
