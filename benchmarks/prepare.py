"""Speed and memory of scripts/prepare_wmt17.sh, stage by stage, on real text repeated to any size.

    python benchmarks/prepare.py TEXT             # 1M pairs with --jobs 1 and 2, 250k with 2; up to an hour
    python benchmarks/prepare.py TEXT --pairs 60000 --jobs 2 --out /tmp/quick.csv

TEXT is a folder with the archives of WMT'17, or small ones of the same layout; what is in them is repeated as a whole
until there are so many pairs. The command is watched from outside: the wall time of a stage goes from its line of
progress to the next one's; processor time of the parent process (which reads, hands out, collects and writes) and of
all other processes together is the kernel's; peak memory is VmHWM, the largest of any one process. Pairs per second of
processor time depend little on what else the machine does; pairs per second of wall time depend on it.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from intra_distillation_fairseq.corpus.archives import copy_members
from intra_distillation_fairseq.corpus.wmt17 import SOURCE, TARGET
from intra_distillation_fairseq.corpus.wmt17_archives import ARCHIVES, TEST_ARCHIVE, find_local
from intra_distillation_fairseq.files import replacing

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "prepare.csv"
POLL_S = 0.1
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class Repeated:
    """A file of bytes that come so many times."""

    def __init__(self, text: bytes, times: int):
        self._text, self._left, self._at = text, times, 0

    def read(self, size: int) -> bytes:
        out = bytearray()
        while self._left and len(out) < size:
            some = self._text[self._at : self._at + size - len(out)]
            out += some
            self._at += len(some)
            if self._at == len(self._text):
                self._left, self._at = self._left - 1, 0
        return bytes(out)


def write_archives(text: Path, folder: Path, pairs: int) -> int:
    """Archives of at least so many pairs; returns how many."""
    folder.mkdir()
    shutil.copyfile(text / TEST_ARCHIVE, folder / TEST_ARCHIVE)
    texts, given = {}, 0
    for archive in ARCHIVES:
        names = {f"{archive.inner}.{lang}": folder / lang for lang in (SOURCE, TARGET)}
        given += max(copy_members(find_local(archive, text)[0], names).values())
        texts[archive] = {name: path.read_bytes() for name, path in names.items()}
    times = math.ceil(pairs / given)
    for archive, members in texts.items():
        with tarfile.open(folder / archive.mirrors[0].name, "w:gz", compresslevel=1) as tar:
            for name, member in members.items():
                info = tarfile.TarInfo(name)
                info.size = times * len(member)
                tar.addfile(info, Repeated(member, times))
    return times * given


@dataclass
class Use:
    """What a stage has used so far: processor seconds, and bytes at most, of the parent and of the others."""

    start: float
    end: float = 0.0
    cpu_s: tuple[float, float] = (0.0, 0.0)
    peak: list[int] = field(default_factory=lambda: [0, 0])


def processor_seconds(pid: int) -> tuple[float, float]:
    """Of a process, and of those of its children that have ended."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    own, children = sum(map(int, fields[11:13])), sum(map(int, fields[13:15]))
    return own / TICKS_PER_S, children / TICKS_PER_S


def descendants(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in map(int, (task / "children").read_text().split()):
            found += [child, *descendants(child)]
    return found


def peak_bytes(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().split("\n")
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), 0)


def watch(command: list[str]) -> dict[str, Use]:
    """Run the command; returns stage -> what it used."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    uses: dict[str, Use] = {}
    totals = {"": (0.0, 0.0)}  # stage -> processor seconds from the start of the command to its end

    def look() -> None:
        if not uses:
            return
        stage = list(uses)[-1]
        try:
            totals[stage] = processor_seconds(process.pid)
            for who, pids in enumerate(([process.pid], descendants(process.pid))):
                for pid in pids:
                    uses[stage].peak[who] = max(uses[stage].peak[who], peak_bytes(pid))
        except (FileNotFoundError, ProcessLookupError):
            pass  # one of them has just ended

    def poll() -> None:
        while process.poll() is None:
            look()
            time.sleep(POLL_S)

    poller = threading.Thread(target=poll)
    poller.start()
    said = []
    for line in process.stderr:
        said.append(line)
        if line.endswith(" ...\n"):
            look()
            for use in list(uses.values())[-1:]:
                use.end = time.monotonic()
            Path(f"/proc/{process.pid}/clear_refs").write_text("5")  # the peak of the parent starts anew
            uses[line.split()[0]] = Use(time.monotonic())
    code = process.wait()
    poller.join()
    if code:
        sys.exit(f"{' '.join(command)}: ended with code {code}:\n{''.join(said)}")
    list(uses.values())[-1].end = time.monotonic()
    before = (0.0, 0.0)
    for stage, use in uses.items():
        use.cpu_s = tuple(now - then for now, then in zip(totals[stage], before))
        before = totals[stage]
    return uses


def measure(archives: Path, pairs: int, jobs: int, facts: dict) -> list[dict]:
    out = archives.parent / "out"
    command = [str(Path(sys.executable).with_name("intra-distillation")), "prepare-wmt17", "--archives", str(archives)]
    command += ["--accept-other-archives", "--out", str(out), "--jobs", str(jobs)]
    uses = watch(command)
    shutil.rmtree(out)
    rows = []
    for stage, use in uses.items():
        wall, (parent, others) = use.end - use.start, use.cpu_s
        rows.append(
            {
                "pairs": pairs,
                "jobs": jobs,
                "stage": stage,
                "wall_s": round(wall, 1),
                "pairs_per_s": round(pairs / wall),
                "parent_cpu_s": round(parent, 2),
                "others_cpu_s": round(others, 2),
                "pairs_per_cpu_s": round(pairs / (parent + others)) if parent + others else "",
                "parent_peak_mb": round(use.peak[0] / 1e6),
                "others_peak_mb": round(use.peak[1] / 1e6),
                **facts,
            }
        )
        print(", ".join(f"{key} {value}" for key, value in list(rows[-1].items())[:10]), flush=True)
    return rows


def facts_of_this_run() -> dict[str, str | int]:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n")
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return {
        "cpu": next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "?"),
        "cores": len(os.sched_getaffinity(0)),
        "load_at_start": round(os.getloadavg()[0], 1),
        "python": sys.version.split()[0],
        **{name: metadata.version(name) for name in ("sacremoses", "sentencepiece")},
        "git_commit": commit.stdout.strip(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("text", type=Path, metavar="TEXT", help="folder with archives, test-full.tgz among them")
    parser.add_argument("--pairs", type=int, nargs="+", default=[250_000, 1_000_000, 1_000_000], help="of each run")
    parser.add_argument("--jobs", type=int, nargs="+", default=[2, 1, 2], help="of each run")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the CSV (benchmarks/results/prepare.csv)")
    args = parser.parse_args()
    if len(args.pairs) != len(args.jobs):
        parser.error(f"--pairs has {len(args.pairs)} numbers and --jobs {len(args.jobs)}: give one of each per run")
    rows = []
    for pairs, jobs in zip(args.pairs, args.jobs):
        with tempfile.TemporaryDirectory(prefix="prepare-") as scratch:
            archives = Path(scratch) / "archives"
            given = write_archives(args.text, archives, pairs)
            rows += measure(archives, given, jobs, facts_of_this_run())
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(args.out) as temporary, open(temporary, "w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
