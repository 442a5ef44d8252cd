"""What the benchmarks share: input of the right shape, clocks, peak memory, statistics, facts of the machine, CSV."""

from __future__ import annotations

import csv
import gc
import itertools
import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from fairseq.data import Dictionary
from torch import Tensor

from intra_distillation_fairseq.experiments.runs import environment
from intra_distillation_fairseq.files import replacing

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else torch's profiler prints two lines for each measurement

MIB = 1 << 20
RESULTS = Path(__file__).resolve().parent / "results"


# -- input


def dictionary(types: int) -> Dictionary:
    """A dictionary of so many types, fairseq's four special ones included."""
    result = Dictionary()
    for i in range(types - len(result)):
        result.add_symbol(f"w{i}")
    return result


def batch(lengths: Tensor, types: int, generator: torch.Generator, device: torch.device) -> dict[str, Any]:
    """A batch of random words, padded as fairseq pads: the source on the left, the target on the right.

    Args:
        lengths: (B, 2), source and target tokens of each sentence.
        types: size of the vocabulary.
        generator: draws the words.
        device: where the tensors are to be.
    """

    def side(column: Tensor, left_pad: bool) -> Tensor:
        words = torch.randint(4, types, (len(column), int(column.max())), generator=generator)
        places = torch.arange(words.size(1)).expand_as(words)
        padding = places < (column.max() - column)[:, None] if left_pad else places >= column[:, None]
        return words.masked_fill(padding, 1).to(device)

    source, target = side(lengths[:, 0], True), side(lengths[:, 1], False)
    net_input = {"src_tokens": source, "src_lengths": lengths[:, 0].to(device), "prev_output_tokens": target}
    return {"net_input": net_input, "target": target, "ntokens": int(lengths[:, 1].sum()), "nsentences": len(lengths)}


def random_batch(types: int, tokens: int, device: torch.device) -> dict[str, Any]:
    """About `tokens` target tokens in sentences of 20 to 30, as fairseq's batches have sentences of similar length."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(20, 31, (max(2, tokens // 25), 2), generator=generator)  # source, target
    return batch(lengths, types, generator, device)


# -- time


def clock(device: torch.device) -> str:
    """Which clock tells most: on one CPU thread the process', which the machine's other work lengthens least."""
    return "process" if device.type == "cpu" and torch.get_num_threads() == 1 else "wall"


def now_ms(device: torch.device) -> float:
    """Milliseconds on that clock, after the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1000 * (time.process_time() if clock(device) == "process" else time.perf_counter())


class Stopwatch:
    """Times short work between marks. On a GPU the marks are events in its queue and nothing waits between them."""

    def __init__(self, device: torch.device):
        self._device, self._marks = device, []
        # More than the caches of a GPU: writing it empties them, and keeps the device busy while the host hands out
        # the work to be timed.
        self._scratch = torch.empty(256 * MIB, dtype=torch.uint8, device=device) if device.type == "cuda" else None

    def start(self) -> None:
        """Forget what was measured and set the first mark."""
        if self._scratch is not None:
            torch.cuda.synchronize(self._device)
            self._scratch.zero_()
        self._marks = []
        self.mark()

    def mark(self) -> None:
        """Set a mark after the work given so far."""
        if self._scratch is None:
            self._marks.append(now_ms(self._device))
        else:
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self._device))
            self._marks.append(event)

    def laps_ms(self) -> list[float]:
        """Milliseconds from each mark to the next."""
        if self._scratch is None:
            return [after - before for before, after in zip(self._marks, self._marks[1:])]
        torch.cuda.synchronize(self._device)
        return [before.elapsed_time(after) for before, after in zip(self._marks, self._marks[1:])]


def rotated(items: Sequence, repeat: int) -> list:
    """The items, in each repeat beginning with another: what came before a variant is not always the same one."""
    start = repeat % len(items)
    return [*items[start:], *items[:start]]


# -- memory


def peak_memory(work: Callable[[], object], device: torch.device | None = None) -> float:
    """How much tensor memory `work` holds at most beyond what was there when it began, in MiB.

    On a GPU it is the allocator's counter. On a CPU the profiler records each allocation and each release of a tensor,
    in bytes as asked for, so the result is exact and the same every time; releases of what had been allocated before
    are not in it, so `work` should release nothing that it did not make (set gradients to None before).
    """
    gc.collect()
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / MIB
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate((event.nbytes() for event in events), initial=0)) / MIB


def available_mib() -> float:
    """Memory that new work on the CPU may take; infinite where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").split("\n")
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return float("inf")


# -- results


def summary(name: str, values: Sequence[float], digits: int) -> dict[str, float]:
    """Median and 20/80 quantiles."""
    quantiles = torch.tensor(values, dtype=torch.double).quantile(torch.tensor([0.5, 0.2, 0.8], dtype=torch.double))
    return {f"{name}{suffix}": round(float(q), digits) for suffix, q in zip(("", "_q20", "_q80"), quantiles)}


def cpu_name() -> str:
    """The processor as the system calls it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n")
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


def machine(device: torch.device) -> dict[str, Any]:
    """On what, with what and when: the last columns of every row."""
    facts = environment()
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "clock": clock(device),
        **{key: facts[key] for key in ("python", "torch", "git_commit", "time")},
    }


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write the rows, whole or not at all; the folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
