"""The archives of WMT'17 English-German: where they are, what is in them, their checksums and line counts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from intra_distillation_fairseq.corpus.download import Mirror
from intra_distillation_fairseq.corpus.stages import FileDigests
from intra_distillation_fairseq.errors import UserError

# statmt.org's own; then the copies that the Hugging Face data sets use, which were packed again as .zip. The checksums
# are those of TensorFlow Datasets (.tgz) and of the data set cards (.zip).
_STATMT_2013 = "http://www.statmt.org/wmt13"
_STATMT_2017 = "http://data.statmt.org/wmt17/translation-task"
_COPY_2013 = "https://huggingface.co/datasets/wmt/wmt13/resolve/main-zip"
_COPY_2017 = "https://huggingface.co/datasets/wmt/wmt17/resolve/main-zip/translation-task"


@dataclass(frozen=True)
class Archive:
    """One archive of training text.

    Attributes:
        name: of its text, as files here are named.
        inner: path of the text within the archive, without the language.
        pairs: lines of each side of the published text.
        mirrors: where it can be had.
    """

    name: str
    inner: str
    pairs: int
    mirrors: tuple[Mirror, ...]


# In the order in which fairseq's prepare-wmt14en2de.sh joins them.
ARCHIVES = (
    Archive(
        name="europarl-v7",
        inner="training/europarl-v7.de-en",
        pairs=1_920_209,
        mirrors=(
            Mirror(
                f"{_STATMT_2013}/training-parallel-europarl-v7.tgz",
                "0224c7c710c8a063dfd893b0cc0830202d61f4c75c17eb8e31836103d27d96e7",
            ),
            Mirror(
                f"{_COPY_2013}/training-parallel-europarl-v7.zip",
                "5b2d8b32c2396da739b4e731871c597fcc6e75729becd74619d0712eecf7770e",
            ),
        ),
    ),
    Archive(
        name="commoncrawl",
        inner="commoncrawl.de-en",
        pairs=2_399_123,
        mirrors=(
            Mirror(
                f"{_STATMT_2013}/training-parallel-commoncrawl.tgz",
                "c7a74e2ea01ac6c920123108627e35278d4ccb5701e15428ffa34de86fa3a9e5",
            ),
            Mirror(
                f"{_COPY_2013}/training-parallel-commoncrawl.zip",
                "5ffe980072ea29adfd84568d099bea366d9f72772b988e670794ae851b4e5627",
            ),
        ),
    ),
    Archive(
        name="news-commentary-v12",
        inner="training/news-commentary-v12.de-en",
        pairs=270_769,  # from memory: no source at hand gives it
        mirrors=(
            Mirror(
                f"{_STATMT_2017}/training-parallel-nc-v12.tgz",
                "2b45f30ef1d550d302fd17dd3a5cbe19134ccc4c2cf50c2dae534aee600101a2",
            ),
            Mirror(
                f"{_COPY_2017}/training-parallel-nc-v12.zip",
                "a3e922fd19485a25870e628fdecb81b7d621f545e16df21a38fae15127413122",
            ),
        ),
    ),
)

# Nobody has published its SHA-256; the MD5 is that of sacrebleu.
TEST_ARCHIVE = "test-full.tgz"
TEST_URL = "https://statmt.org/wmt14/test-full.tgz"
TEST_MD5 = "a8cd784e006feb32ac6f3d9ec7eb389a"
TEST_PAIRS = 3003


def find_local(archive: Archive, folder: Path) -> tuple[Path, Mirror]:
    """The archive's file in a folder, under its name at any of its mirrors.

    Raises:
        UserError: there is none.
    """
    for mirror in archive.mirrors:
        if (folder / mirror.name).is_file():
            return folder / mirror.name, mirror
    first, *others = (mirror.name for mirror in archive.mirrors)
    raise UserError(
        f"--archives '{folder}' has no '{first}' (nor {', '.join(others)}): put it there, or leave --archives away to "
        "download the archives"
    )


def check_local(archive: Archive, folder: Path, digests: FileDigests, accept_other: bool) -> tuple[Path, str]:
    """The archive's file in a folder, and its SHA-256.

    Args:
        archive: which one.
        folder: where it lies.
        digests: remembers checksums.
        accept_other: take it with any checksum.

    Raises:
        UserError: it is not there, or its checksum is not the published one.
    """
    path, mirror = find_local(archive, folder)
    actual = digests.sha256(path)
    if actual != mirror.sha256 and not accept_other:
        raise other_bytes(path, "SHA-256", actual, mirror.sha256)
    return path, actual


def other_bytes(path: Path, kind: str, actual: str, published: str) -> UserError:
    """The message for a local archive that is not the published one."""
    return UserError(
        f"'{path}' has the {kind} '{actual}', published is {published}: get it again, or give "
        "--accept-other-archives to take it as it is"
    )
