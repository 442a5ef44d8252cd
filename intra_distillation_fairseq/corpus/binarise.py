"""fairseq-preprocess as a subprocess, and a check of what it wrote."""

from __future__ import annotations

import errno
import os
import struct
import subprocess
import sys
from array import array
from pathlib import Path

from intra_distillation_fairseq.corpus.subwords import FAIRSEQ_SPECIALS
from intra_distillation_fairseq.corpus.workers import die_with_parent
from intra_distillation_fairseq.errors import UserError
from intra_distillation_fairseq.progress import Progress

_INDEX_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQ")  # magic, version, code of the tokens' type, number of sentences
# code in the index -> bytes of one token
_TOKEN_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 8: 2, 9: 4, 10: 8}
_BLOCK_SENTENCES = 1 << 18
_LARGEST_FOR_TWO_BYTES = 65500  # types of a dictionary, fairseq.data.indexed_dataset.best_fitting_int_dtype
_POLL_S = 0.5


def binarise(data: Path, destination: Path, languages: tuple[str, str], jobs: int, log: Path) -> None:
    """Run fairseq-preprocess on pieces/ and dict.txt of a data folder.

    Args:
        data: the data folder; paths are given relative to it, because fairseq splits them at commas.
        destination: folder within `data` to make.
        languages: source and target.
        jobs: worker processes; the bytes do not depend on it.
        log: file for its output.

    Raises:
        UserError: it failed; the end of its log has been printed.
        OSError: it failed for want of space on the disk.
    """
    command = [sys.executable, "-m", "fairseq_cli.preprocess"]
    command += ["--source-lang", languages[0], "--target-lang", languages[1]]
    for split in ("train", "valid", "test"):
        command += [f"--{split}pref", f"pieces/{split}"]
    command += ["--joined-dictionary", "--srcdict", "dict.txt", "--padding-factor", "1"]
    command += ["--destdir", os.path.relpath(destination, data), "--workers", str(jobs)]
    # The folder must not be searched for modules, as python -m otherwise does with the current one.
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "PYTHONUTF8": "1"}
    log.parent.mkdir(exist_ok=True)
    with open(log, "wb") as stream:
        stream.write(("+ " + " ".join(command) + "\n").encode())
        stream.flush()
        with subprocess.Popen(
            command,
            cwd=data,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            preexec_fn=die_with_parent,
        ) as child:
            try:
                code = _wait(child, data, destination, languages)
            except BaseException:
                child.kill()
                raise
    # Its own copy of the log, with times in it, which would make two equal folders differ.
    (destination / "preprocess.log").unlink(missing_ok=True)
    if code:
        end = log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:]
        if any(os.strerror(errno.ENOSPC) in line for line in end):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        print("\n".join(end), file=sys.stderr)
        raise UserError(f"fairseq-preprocess ended with code {code}: its output is in '{log}'")


def _wait(child: subprocess.Popen, data: Path, destination: Path, languages: tuple[str, str]) -> int:
    """Show by the size of its files how far fairseq-preprocess is, which itself says nothing; returns its exit code."""
    texts = [data / "pieces" / f"{split}.{lang}" for split in ("train", "valid", "test") for lang in languages]
    total = sum(map(_tokens, texts))
    width = 2 if (data / "dict.txt").read_bytes().count(b"\n") + FAIRSEQ_SPECIALS < _LARGEST_FOR_TWO_BYTES else 4
    with Progress("binarise", total, "tokens") as progress:
        while True:
            try:
                return child.wait(_POLL_S)
            except subprocess.TimeoutExpired:
                written = sum(_size(path) for path in destination.glob("*.bin")) // width
                progress.show(min(written, total))  # the parts of several workers are copied at the end


def _tokens(path: Path) -> int:
    """Pieces and ends of sentences of a text in pieces."""
    tokens = 0
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            tokens += block.count(b" ") + 2 * block.count(b"\n")
    return tokens


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # a worker's part, copied and removed just now
        return 0


def check_binarised(destination: Path, languages: tuple[str, str], lines: dict[str, int], entries: int) -> None:
    """Compare what fairseq-preprocess wrote with what it was given, which its exit code does not do.

    Args:
        destination: the folder it wrote.
        languages: source and target.
        lines: split -> lines of its pieces.
        entries: lines of dict.txt.

    Raises:
        UserError: a file is missing, has another number of sentences, or another size than its index says.
    """
    again = "delete the folder and run again"
    for lang in languages:
        dictionary = destination / f"dict.{lang}.txt"
        got = dictionary.read_bytes().count(b"\n") if dictionary.exists() else 0
        if got != entries:
            raise UserError(f"'{dictionary}' has '{got}' entries, expected are {entries}: {again}")
        for split, expected in lines.items():
            stem = destination / f"{split}.{'-'.join(languages)}.{lang}"
            sentences, data_bytes = _read_index(Path(f"{stem}.idx"))
            if sentences != expected:
                raise UserError(f"'{stem}.idx' has '{sentences}' sentences, expected are {expected}: {again}")
            actual = Path(f"{stem}.bin").stat().st_size if Path(f"{stem}.bin").exists() else 0
            if actual != data_bytes:
                raise UserError(f"'{stem}.bin' has '{actual}' bytes, its index says {data_bytes}: {again}")


def index_header(path: Path) -> tuple[int, int] | None:
    """Code of the tokens' type, and number of sentences, of a fairseq .idx file; None where it is of another format."""
    with open(path, "rb") as stream:
        head = stream.read(_HEADER.size)
    if len(head) < _HEADER.size or not head.startswith(_INDEX_MAGIC):
        return None
    _, _, code, sentences = _HEADER.unpack(head)
    return code, sentences


def _read_index(path: Path) -> tuple[int, int]:
    """Number of sentences, and bytes of all their tokens, by the index of a fairseq memory-mapped data set."""
    header = index_header(path) if path.exists() else None
    if header is None or header[0] not in _TOKEN_BYTES:
        return 0, 0
    code, sentences = header
    tokens, left = 0, sentences
    with open(path, "rb") as stream:
        stream.seek(_HEADER.size)
        while left:  # not all at once: a large corpus has millions
            some = min(left, _BLOCK_SENTENCES)
            lengths = stream.read(4 * some)
            if len(lengths) != 4 * some:
                return 0, 0
            tokens += sum(array("i", lengths))
            left -= some
    return sentences, _TOKEN_BYTES[code] * tokens
