"""Reads fairseq's training log (--log-format json) into curves; knows what a resume does to them."""

from __future__ import annotations

import csv
import datetime
import json
import re
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from intra_distillation_fairseq.files import replacing

# The tag of train.sh's own lines, which have the shape of fairseq's.
LAUNCH_TAG = "intra_distillation.train"
_LAUNCH = "launch: "
COLUMNS = (
    "update",
    "epoch",
    "train_loss",
    "ls_loss",
    "nll_loss",
    "id_loss",
    "id_alpha",
    "valid_loss",
    "valid_nll_loss",
    "valid_ppl",
    "seconds",
)
_LINE = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) \| \w+ \| (\S+) \| (.*)")
_LOADED = re.compile(r"Loaded checkpoint .* \(epoch \d+ @ (\d+) updates\)")
_SAVED = re.compile(r"Saved checkpoint .* \(epoch \d+ @ (\d+) updates")
_PARAMETERS = re.compile(r"num\. (shared|expert) model params: ([\d,]+) ")
_GPU_MEMORY = re.compile(r"rank +0: capabilities = .* ; total memory = ([\d.]+) GB ;")
_CPU_MEMORY = re.compile(r"peak resident memory: ([\d.]+) MiB")
_SKIPPED = re.compile(r"update (\d+) skipped: .*; rank \d+: ")  # one line for all processes; the guilty ones' ranks
# Every process says so of an update; here each is counted once.
_SPIKE = re.compile(r"update (\d+): a spike: .*; rank 0: ")
_LEFT_OUT = re.compile(r"(\d+) of \d+ sentences of the set '(.*)' are left out, ")
_TRAIN_COLUMNS = {"train_loss": "loss", "ls_loss": "ls_loss", "nll_loss": "nll_loss", "id_loss": "id_loss"}


def own_line(text: str) -> str:
    """A line of train.sh for train.log."""
    return f"{datetime.datetime.now():%Y-%m-%d %H:%M:%S} | INFO | {LAUNCH_TAG} | {text}"


def launch_line(text: str) -> str:
    """The line that begins a launch in train.log."""
    return own_line(_LAUNCH + text)


def memory_line(mib: float) -> str:
    """The line that ends a launch: the largest resident memory that one of its processes had, in MiB."""
    return own_line(f"peak resident memory: {mib:.0f} MiB")


def append_line(path: Path, line: str) -> None:
    """Add a line to a log, on a line of its own even where a kill cut the last one."""
    with open(path, "a+b") as file:
        if file.tell():
            file.seek(-1, 2)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write((line + "\n").encode("utf-8", errors="surrogateescape"))


@dataclass
class TrainingLog:
    """What a training log says, line by line.

    Attributes:
        update: number of the last update heard of.
        saved: number of updates in the last checkpoint, 0 without one.
        trained: the last launch came to its regular end.
        stop_reason: why the last launch stopped training, in fairseq's words, or "".
        latest: the last values of the `train_inner` and `valid` lines.
        seconds: time of all launches up to the last line, work lost by a kill included.
        parameters: number of the model's parameters, or None before it is built.
        skipped: updates that were not made, each as the number that it would have had: their gradient was not finite.
        spikes: updates whose gradient was out of all proportion.
        left_out: set -> number of its sentences that are longer than the limits.
    """

    update: int = 0
    saved: int = 0
    trained: bool = False
    stop_reason: str = ""
    latest: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    parameters: int | None = None
    skipped: list[int] = field(default_factory=list)
    spikes: list[int] = field(default_factory=list)
    left_out: dict[str, int] = field(default_factory=dict)
    _inner: list[dict[str, Any]] = field(default_factory=list)  # one per train_inner line, update ascending
    _epochs: dict[int, dict[str, Any]] = field(default_factory=dict)  # update -> averages of the epoch that ends there
    _valid: list[dict[str, Any]] = field(default_factory=list)  # one per validation, update ascending
    _before_launch: float = 0.0
    _launched: datetime.datetime | None = None
    _gpu_gib: float | None = None  # of the first process's GPU
    _gpu_free_gib: float | None = None  # least after any logged update
    _cpu_mib: float | None = None

    def feed(self, line: str) -> str | None:
        """Take in one line.

        Returns:
            "train" or "valid" where the line brought new values of that kind, else None.
        """
        match = _LINE.match(line)
        if not match:
            return None
        time, tag, text = datetime.datetime.strptime(match[1], "%Y-%m-%d %H:%M:%S"), match[2], match[3]
        if tag == LAUNCH_TAG and text.startswith(_LAUNCH):
            self._launch(time)
        if self._launched is not None:
            self.seconds = self._before_launch + (time - self._launched).total_seconds()
        if loaded := _LOADED.match(text):
            self._forget_after(int(loaded[1]))
        elif "No existing checkpoint found" in text:
            self._forget_after(-1)
        elif saved := _SAVED.match(text):
            self.saved = int(saved[1])
        elif text.startswith("done training in"):
            self.trained = True
        elif text.startswith(("Stopping training due to", "stopping training because", "early stop since")):
            self.stop_reason = text
        elif parameters := _PARAMETERS.match(text):
            # fairseq counts the experts of a mixture apart, right after the rest.
            number = int(parameters[2].replace(",", ""))
            self.parameters = number + (self.parameters or 0 if parameters[1] == "expert" else 0)
        elif memory := _GPU_MEMORY.match(text):
            self._gpu_gib = float(memory[1])
        elif memory := _CPU_MEMORY.match(text):
            self._cpu_mib = max(float(memory[1]), self._cpu_mib or 0.0)
        elif skipped := _SKIPPED.match(text):
            self.skipped.append(int(skipped[1]))
        elif spike := _SPIKE.match(text):
            self.spikes.append(int(spike[1]))
        elif left_out := _LEFT_OUT.match(text):
            self.left_out[left_out[2]] = int(left_out[1])
        elif text.startswith("{") and tag in ("train_inner", "train", "valid"):
            return self._values(tag, text)
        return None

    def rows(self) -> list[dict[str, Any]]:
        """One row per validation, with the keys of COLUMNS.

        The training values are means over the log intervals since the validation before, alpha' is the last one, and
        all losses are per token and base 2, as fairseq logs them. None where the log does not say.
        """
        rows, previous = [], 0
        for valid in self._valid:
            update = valid["update"]
            inner = [values for values in self._inner if previous < values["num_updates"] <= update]
            if not inner and update in self._epochs:
                inner = [self._epochs[update]]
            row: dict[str, Any] = {column: valid.get(column) for column in COLUMNS}
            for column, key in _TRAIN_COLUMNS.items():
                known = [values[key] for values in inner if key in values]
                row[column] = round(sum(known) / len(known), 6) if known else None
            row["id_alpha"] = inner[-1].get("id_alpha") if inner else None
            rows.append(row)
            previous = update
        return rows

    def tokens_per_second(self) -> float | None:
        """Median over the log intervals of the target tokens trained on in a second, or None."""
        speeds = [values["wps"] for values in self._inner if "wps" in values]
        return statistics.median(speeds) if speeds else None

    def peak_memory(self) -> tuple[float, str] | tuple[None, None]:
        """Peak memory (MiB) and whose: "gpu" (allocated tensors of the first GPU) or "cpu" (largest resident process).

        On a GPU it is the peak of the updates that fairseq logs, to a tenth of a GiB; (None, None) where the log does
        not say.
        """
        if self._gpu_gib is not None and self._gpu_free_gib is not None:
            return round((self._gpu_gib - self._gpu_free_gib) * 1024), "gpu"
        return (self._cpu_mib, "cpu") if self._cpu_mib is not None else (None, None)

    def complete(self, max_update: int) -> bool:
        """Tell whether the last launch trained to its end and saved it, even if nobody was left to note that."""
        return self.trained or (
            max_update > 0 and self.saved >= max_update or self.stop_reason != "" and self.saved == self.update > 0
        )

    def _launch(self, time: datetime.datetime) -> None:
        self._before_launch, self._launched = self.seconds, time
        self.trained, self.stop_reason = False, ""

    def _forget_after(self, update: int) -> None:
        """A resume repeats what came after its checkpoint; a fresh start repeats everything."""
        self._inner = [values for values in self._inner if values["num_updates"] <= update]
        self._epochs = {at: values for at, values in self._epochs.items() if at <= update}
        self._valid = [values for values in self._valid if values["update"] <= update]
        self.skipped = [number for number in self.skipped if number <= update]
        self.spikes = [number for number in self.spikes if number <= update]
        self.update = self.saved = max(update, 0)

    def _values(self, tag: str, text: str) -> str | None:
        try:
            raw = json.loads(text)
        except json.JSONDecodeError:
            return None  # a line cut by a kill
        values = {
            key.removeprefix(f"{tag}_"): number for key, value in raw.items() if (number := _number(value)) is not None
        }
        if "num_updates" not in values:
            return None
        values["num_updates"] = update = int(values["num_updates"])
        self.update = update
        if tag == "train":
            self._epochs[update] = values
            return None
        if tag == "train_inner":
            self._inner.append(values)
            if "gb_free" in values:
                self._gpu_free_gib = min(values["gb_free"], self._gpu_free_gib or values["gb_free"])
            self.latest["loss"] = values.get("loss", float("nan"))
            return "train"
        if self._valid and self._valid[-1]["update"] == update:
            self._valid.pop()
        self._valid.append(
            {
                "update": update,
                "epoch": int(values.get("epoch", 0)),
                "valid_loss": values.get("loss"),
                "valid_nll_loss": values.get("nll_loss"),
                "valid_ppl": values.get("ppl"),
                "seconds": self.seconds,
            }
        )
        self.latest["valid_loss"] = values.get("loss", float("nan"))
        return "valid"


def read_log(path: Path) -> TrainingLog:
    """Read a train.log from its beginning; an empty log where there is none."""
    log = TrainingLog()
    if path.exists():
        for line in path.read_bytes().decode("utf-8", errors="replace").split("\n"):
            log.feed(line)
    return log


def read_curves(path: Path) -> list[dict[str, Any]]:
    """One row per validation of a train.log, with the keys of COLUMNS (see `TrainingLog.rows`)."""
    return read_log(path).rows()


def write_curves(rows: list[dict[str, Any]], path: Path) -> None:
    """Write rows as CSV, whole or not at all; an empty cell where the log does not say."""
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as handle:
        writer = csv.DictWriter(handle, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None
