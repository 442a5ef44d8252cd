"""A soak test: thousands of updates in several processes on the CPU, watched from outside. Does anything grow?

    python benchmarks/scale.py                                     # 2,000 updates in two processes, minutes
    python benchmarks/scale.py -- --id-pass-mode recompute         # further flags of fairseq-train, after --
    python benchmarks/scale.py --quick                             # a smoke test; writes no file unless --out is given

Each process is fairseq-train with a tiny model, `--criterion intra_distillation` (K = 3), c10d over gloo, random text,
validations and checkpoints as a user would have them. Every few updates /proc tells the memory, open files, threads and
processor time of each process, and the run folder the sizes of its files: a row of the CSV for each process. Updates
are read off the log of rank 0. After a warm-up (a tenth of the updates) the last half is held against the first:

    memory         means of the resident set and of its anonymous part (what the process itself has written), within 2%
    files          number and bytes of those in the run folder, open files, threads: the least in a half (which leaves
                   out what comes and goes) must not be more
    log            bytes per update, within 5%; every update has its line
    throughput     reported only, since other work on the machine changes it: for each stretch of the last half its
                   updates per second over those of the same stretch of the first half; and the processor time of an
                   update, which other work changes less

The exit code is 1 where one of the first three grows, or where a process fails. Needs Linux.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from fairseq.data import indexed_dataset
from measure import RESULTS, dictionary, machine, summary, write_csv
from step import sentence_lengths
from tqdm import tqdm

from intra_distillation_fairseq.experiments.launch import TASK, USER_DIR
from intra_distillation_fairseq.experiments.recipes import as_flags

OUT = RESULTS / "scale.csv"
# glibc keeps what is freed, and the more the longer, which would count as memory in use.
_FREED_IS_GIVEN_BACK = {"MALLOC_TRIM_THRESHOLD_": "131072", "MALLOC_MMAP_THRESHOLD_": "131072"}
WARM_UP = 0.1
MEMORY_TOLERANCE, LOG_TOLERANCE, SIZE_TOLERANCE = 0.02, 0.05, 0.001
TYPES, MAX_TOKENS, SENTENCES_PER_BATCH = 1000, 500, 20


# -- the training


def write_data(folder: Path, pairs: int) -> None:
    """Binarised random text as fairseq-preprocess leaves it: xx to en, `pairs` to train on and 50 to validate with."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(1)
    for column, language in enumerate(("xx", "en")):
        dictionary(TYPES).save(str(folder / f"dict.{language}.txt"))
        lengths = sentence_lengths(None)[: pairs + 50, column].clip(max=60).tolist()
        for split, own in (("train", lengths[:pairs]), ("valid", lengths[pairs:])):
            prefix = str(folder / f"{split}.xx-en.{language}")
            builder = indexed_dataset.make_builder(f"{prefix}.bin", "mmap", TYPES)
            for length in own:
                words = torch.randint(4, TYPES, (length,), generator=generator)
                words[-1] = 2  # the end of the sentence
                builder.add_item(words)
            builder.finalize(f"{prefix}.idx")


def flags(data: Path, rank: int, processes: int, meeting: Path, **more: Any) -> list[str]:
    """What to give fairseq-train: a tiny model, K = 3, one of several processes on the CPU.

    Args:
        data: the folder of `write_data`.
        rank: of this process.
        processes: how many there are.
        meeting: a file that is not there yet, through which the processes find each other.
        more: further options, or others in place of these.
    """
    tiny = {"encoder-layers": 1, "encoder-embed-dim": 64, "encoder-ffn-embed-dim": 128, "encoder-attention-heads": 2}
    settings = {
        "user-dir": USER_DIR,
        "task": TASK,
        "arch": "transformer_small",
        **tiny,
        **{name.replace("encoder", "decoder"): value for name, value in tiny.items()},
        "criterion": "intra_distillation",
        "label-smoothing": 0.1,
        "dropout": 0.3,
        "optimizer": "adam",
        "lr": 0.001,
        "max-tokens": MAX_TOKENS,
        "num-workers": 0,
        "required-batch-size-multiple": 1,
        "no-epoch-checkpoints": True,
        "log-format": "json",
        "seed": 1,
        "cpu": True,
        "distributed-world-size": processes,
        "distributed-rank": rank,
        "distributed-init-method": f"file://{meeting}",
        "distributed-no-spawn": True,
        "distributed-backend": "gloo",
        **more,
    }
    return [str(data), *as_flags(settings)]


def last_update(log: Path) -> int:
    """The number of the last update in fairseq's log, 0 before the first one."""
    with open(log, "rb") as file:
        file.seek(max(0, log.stat().st_size - 20_000))
        found = re.findall(rb'\| train_inner \| .*"num_updates": "(\d+)"', file.read())
    return int(found[-1]) if found else 0


# -- what is seen from outside


class Process(NamedTuple):
    """One process at one moment."""

    rss_mib: float
    anonymous_mib: float
    open_files: int
    os_threads: int
    cpu_s: float


class Sample(NamedTuple):
    """All processes and the files at one moment."""

    seconds: float
    update: int
    processes: list[Process]
    logs: int  # bytes of all logs
    files: dict[str, int]  # bytes of each other file of the run folder


def look_at(pid: int) -> Process:
    """What /proc tells of a process.

    Raises:
        OSError: it has ended.
    """
    of = Path("/proc") / str(pid)
    sizes = dict(re.findall(r"^(\w+): +(\d+) kB", (of / "smaps_rollup").read_text(encoding="ascii"), re.M))
    numbers = (of / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()  # from its third on: proc(5)
    ticks = os.sysconf("SC_CLK_TCK")
    return Process(
        int(sizes["Rss"]) / 1024,
        int(sizes["Anonymous"]) / 1024,
        len(os.listdir(of / "fd")),
        int(numbers[17]),
        (int(numbers[11]) + int(numbers[12])) / ticks,
    )


def sizes_of(folder: Path) -> dict[str, int]:
    """Bytes of each file in a folder and below it; one that vanishes meanwhile is left out."""
    result = {}
    for path in folder.rglob("*"):
        try:
            if path.is_file():
                result[str(path.relative_to(folder))] = path.stat().st_size
        except FileNotFoundError:
            continue
    return result


def soak(args: argparse.Namespace, folder: Path) -> Iterator[Sample]:
    """Train, and yield a sample every --every updates.

    Raises:
        SystemExit: a process fails.
    """
    run = folder / "run"
    run.mkdir()
    # An epoch has a 25th of the updates: its end, too, is met in the warm-up and many times after it.
    write_data(folder / "data", max(1, args.updates // 25) * args.processes * SENTENCES_PER_BATCH)
    interval = max(1, args.updates // 20)
    settings = {
        "save-dir": run,
        "max-update": args.updates,
        "save-interval-updates": interval,
        "keep-interval-updates": 2,
        "log-interval": 1,
    }
    logs = [run / f"train_rank{rank}.log" for rank in range(args.processes)]
    started = time.monotonic()
    with ExitStack() as stack:
        processes = []
        for rank, log in enumerate(logs):
            words = flags(folder / "data", rank, args.processes, folder / "meeting", **settings)
            command = [sys.executable, "-m", "fairseq_cli.train", *words, *args.flags]
            output = stack.enter_context(open(log, "wb"))
            environment = {**os.environ, "OMP_NUM_THREADS": "1", **_FREED_IS_GIVEN_BACK}
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
            stack.callback(process.wait)
            stack.callback(process.kill)  # called first, and of no effect on one that has ended
            processes.append(process)
        due = args.every
        while any(process.poll() is None for process in processes):
            for process, log in zip(processes, logs):
                if process.poll():
                    text = log.read_text(encoding="utf-8", errors="replace")
                    raise SystemExit(f"error: {log.stem} ended with exit code {process.returncode}:\n{text[-3000:]}")
            update = last_update(logs[0])
            if update >= due:
                try:
                    seen = [look_at(process.pid) for process in processes]
                except OSError:  # the training has just ended
                    break
                sizes = sizes_of(run)
                log_bytes = sum(sizes.pop(log.name) for log in logs)
                yield Sample(time.monotonic() - started, update, seen, log_bytes, sizes)
                due = update + args.every
            time.sleep(0.02)
        codes = [process.wait() for process in processes]
    if any(codes):
        raise SystemExit(f"error: the processes ended with exit codes {codes}: see above")


# -- the judgement


class Finding(NamedTuple):
    """One quantity in both halves. `grows` is None where it is only reported."""

    what: str
    first: float
    last: float
    ratio: str
    allowed: str
    grows: bool | None


def halves(samples: Sequence[Sample]) -> tuple[list[Sample], list[Sample]]:
    """The samples after the warm-up in two halves of equal numbers of updates.

    Raises:
        ValueError: a half has fewer than two samples.
    """
    last = samples[-1].update if samples else 0
    begin = WARM_UP * last
    middle = (begin + last) / 2
    first = [s for s in samples if begin < s.update <= middle]
    second = [s for s in samples if s.update > middle]
    if min(len(first), len(second)) < 2:
        raise ValueError(f"{len(samples)} samples are too few to compare their halves: sample more often")
    return first, second


def compare(
    what: str, parts: Sequence[Sequence[Sample]], value: Callable[[Sample], float], tolerance: float, middle: Callable
) -> Finding:
    """The mean or the least of one quantity in both halves; more than the tolerance above the first one, it grows."""
    first, last = (middle([value(sample) for sample in part]) for part in parts)
    ratio = f"{last / first:.4f}" if first else ""
    return Finding(what, first, last, ratio, f"at most {1 + tolerance:g}", last > first * (1 + tolerance))


def per_update(part: Sequence[Sample], value: Callable[[Sample], float]) -> list[float]:
    """What a quantity that only adds up has gained for each update, from each sample to the next."""
    return [(value(b) - value(a)) / (b.update - a.update) for a, b in zip(part, part[1:])]


def judge(samples: Sequence[Sample]) -> list[Finding]:
    """What grows and what does not, over samples in their order.

    Raises:
        ValueError: too few samples.
    """
    parts = first, last = halves(samples)
    findings = []
    for rank in range(len(samples[0].processes)):
        for name, tolerance, middle in (
            ("rss_mib", MEMORY_TOLERANCE, statistics.mean),
            ("anonymous_mib", MEMORY_TOLERANCE, statistics.mean),
            ("open_files", 0, min),
            ("os_threads", 0, min),
        ):

            def value(sample: Sample, rank: int = rank, name: str = name) -> float:
                return getattr(sample.processes[rank], name)

            findings.append(compare(f"rank {rank}: {name}", parts, value, tolerance, middle))

    findings.append(compare("files", parts, lambda sample: len(sample.files), 0, min))
    findings.append(compare("their bytes", parts, lambda s: sum(s.files.values()), SIZE_TOLERANCE, min))
    # A small file that grows beside a large one: those that stay, one by one.
    for name in sorted(set.intersection(*(set(sample.files) for sample in first + last))):
        findings.append(compare(f"bytes of {name}", parts, lambda s, n=name: s.files[n], SIZE_TOLERANCE, min))
    rates = [(part[-1].logs - part[0].logs) / (part[-1].update - part[0].update) for part in parts]
    ratio, most = rates[1] / rates[0], 1 + LOG_TOLERANCE
    findings.append(Finding("log, bytes per update", *rates, f"{ratio:.4f}", f"at most {most:g}", ratio > most))
    for what, value, inverse in (
        ("updates per second", lambda s: s.seconds, True),
        ("processor ms per update", lambda s: 1000 * sum(p.cpu_s for p in s.processes), False),
    ):
        mine = [[1 / x if inverse else x for x in per_update(part, value)] for part in parts]
        q = summary("", [b / a for a, b in zip(*mine)], 3)
        shown = f"{q['']} ({q['_q20']} to {q['_q80']})"
        findings.append(Finding(what, *map(statistics.median, mine), shown, "reported only", None))
    return findings


# -- the report


def rows_of(samples: Sequence[Sample], facts: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each process of each sample."""
    return [
        {
            "update": sample.update,
            "seconds": round(sample.seconds, 2),
            "rank": rank,
            **{name: round(value, 2) for name, value in process._asdict().items()},
            "log_bytes": sample.logs,
            "files": len(sample.files),
            "file_bytes": sum(sample.files.values()),
            **facts,
        }
        for sample in samples
        for rank, process in enumerate(sample.processes)
    ]


def table(findings: Sequence[Finding]) -> str:
    """Markdown."""
    lines = ["| what | first half | last half | last / first | allowed | |", "|---|---|---|---|---|---|"]
    words = {True: "**grows**", False: "flat", None: ""}
    for f in findings:
        lines.append(f"| {f.what} | {f.first:,.6g} | {f.last:,.6g} | {f.ratio} | {f.allowed} | {words[f.grows]} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--updates", type=int, default=2000, help="(2000)")
    parser.add_argument("--processes", type=int, default=2, help="(2)")
    parser.add_argument("--every", type=int, default=20, help="updates from one sample to the next (20)")
    parser.add_argument("--quick", action="store_true", help="60 updates")
    parser.add_argument("--out", type=Path, help=f"the CSV (benchmarks/results/{OUT.name}; none with --quick)")
    parser.add_argument("flags", nargs="*", metavar="-- FLAGS", help="of fairseq-train; the last one given counts")
    args = parser.parse_args()
    if args.quick:
        args.updates, args.every = 60, 5
    if min(args.updates, args.processes, args.every) < 1:
        parser.error("--updates, --processes, --every: allowed is at least 1")
    if args.updates < 10 * args.every:
        parser.error(f"--updates is {args.updates}: allowed is at least 10 times --every, which is {args.every}")
    if not Path("/proc/self/smaps_rollup").is_file():
        parser.error("this system has no /proc/PID/smaps_rollup, from which memory is read: it needs Linux")

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # or the processes would train on without us
    with tempfile.TemporaryDirectory() as folder, tqdm(total=args.updates, unit="update") as progress:
        samples = []
        for sample in soak(args, Path(folder)):
            samples.append(sample)
            progress.update(sample.update - progress.n)
    try:
        findings = judge(samples)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    print(table(findings))
    out = args.out or (None if args.quick else OUT)
    if out is not None:
        facts = machine(torch.device("cpu")) | {"threads": 1, "clock": "wall"}
        run = {"updates": args.updates, "processes": args.processes, "flags": " ".join(args.flags)}
        write_csv(out, rows_of(samples, {**run, **facts}))
    growing = [finding.what for finding in findings if finding.grows]
    if growing:
        raise SystemExit(f"error: what grows: {', '.join(growing)}")


if __name__ == "__main__":
    main()
