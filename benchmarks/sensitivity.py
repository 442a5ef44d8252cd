"""What measuring sensitivity every N updates adds to the time of a training of transformer_small.

    python benchmarks/sensitivity.py            # some minutes on one CPU core
    python benchmarks/sensitivity.py --quick    # a smoke test; writes no file unless --out is given

A measurement is what `--sensitivity-interval` does: gradients of B batches, their sums, the summary and the layers. It
runs through the trainer's update, as in training: each repeat takes one update without and one with a measurement after
it, in rotated order, on the same batch; the difference is what the measurement takes. `share` is that difference,
over what N updates and one measurement take together: N is --interval. `interval_for_3_percent` is the smallest N for
which it is at most 3%. The baseline has one pass for each update, the three passes of `stacked` take longer and leave a
smaller share. The trainers are those of benchmarks/step.py.
"""

from __future__ import annotations

import argparse
import logging
import math
import statistics
import tempfile
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from measure import RESULTS, machine, now_ms, rotated, summary, write_csv
from step import BASELINE, PRECISIONS, default_lengths, make_trainer, samples, settings
from tqdm import tqdm

VARIANTS = (BASELINE, "stacked")
OUT = RESULTS / "sensitivity.csv"
AIM = 0.03


class Batches:
    """In place of a data set: batches that exist already. What collating takes is in neither of the two times."""

    def __init__(self, batches: list[dict[str, Any]]):
        self.batches = batches

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.batches[index]

    def collater(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        return items[0]


def update(trainer: Any, sample: dict[str, Any], measured: bool, device: torch.device) -> float:
    """Milliseconds of one update, with a measurement after it or without."""
    trainer.task.cfg.sensitivity_interval = int(measured)
    start = now_ms(device)
    trainer.train_step([sample])
    return now_ms(device) - start


def measure(args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    facts, batches = machine(device), samples(args, args.batches)
    rows = []
    with tempfile.TemporaryDirectory() as folder, tqdm(total=len(VARIANTS) * args.repeats, unit="repeat") as progress:
        trainers = {name: make_trainer(name, args, device) for name in VARIANTS}
        for trainer in trainers.values():
            trainer.task.datasets["train"] = Batches(batches)
            trainer.task.cfg.save_dir, trainer.task.cfg.train_subset = folder, "train"
            trainer.task._measured_batches = [[number] for number in range(len(batches))]
            for measured in (False, True):
                update(trainer, batches[0], measured, device)
        times: dict[str, dict[bool, list[float]]] = {name: {False: [], True: []} for name in VARIANTS}
        for repeat in range(args.repeats):
            for name, trainer in trainers.items():
                for measured in rotated((False, True), repeat):
                    sample = batches[repeat % len(batches)]
                    times[name][measured].append(update(trainer, sample, measured, device))
                progress.update()
    for name, mine in times.items():
        added = [b - a for a, b in zip(mine[False], mine[True])]
        plain, extra = statistics.mean(mine[False]), statistics.median(added)  # a mean: batches differ in length
        rows.append(
            {
                "variant": name,
                **summary("update_ms", mine[False], 1),
                **summary("measurement_ms", added, 1),
                "interval": args.interval,
                "share": round(extra / (args.interval * plain + extra), 5),
                "interval_for_3_percent": math.ceil(extra / plain * (1 - AIM) / AIM),
                "measured_batches": len(batches),
                "parameters": sum(p.numel() for p in trainers[name].model.parameters()),
                "repeats": args.repeats,
                **settings(args),
                **facts,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda if there is one")
    parser.add_argument("--precision", choices=list(PRECISIONS), default="fp32", help="as fairseq's --bf16 and --fp16")
    parser.add_argument("--interval", type=int, default=1000, help="updates between two measurements (1000)")
    parser.add_argument("--batches", type=int, default=10, help="batches of a measurement (10)")
    parser.add_argument("--max-tokens", type=int, help="of a batch (4096 on a GPU, 1024 on a CPU)")
    parser.add_argument("--repeats", type=int, help="measured updates of each kind (30 on a GPU, 5 on a CPU)")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU (1)")
    parser.add_argument("--quick", action="store_true", help="a tiny model, 2 repeats")
    parser.add_argument("--out", type=Path, help=f"the CSV (benchmarks/results/{OUT.name}; none with --quick)")
    args = parser.parse_args()
    device = torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")
    if min(args.interval, args.batches, args.threads, args.repeats or 1, args.max_tokens or 1) < 1:
        parser.error("--interval, --batches, --max-tokens, --repeats, --threads: allowed is at least 1")
    on_gpu = device.type == "cuda"
    args.max_tokens = args.max_tokens or (4096 if on_gpu else 1024)
    args.repeats = args.repeats or (30 if on_gpu else 5)
    model = SimpleNamespace(types=12_001, layers=6, embed_dim=512, ffn_embed_dim=1024, attention_heads=4)
    if args.quick:
        model = SimpleNamespace(types=100, layers=1, embed_dim=16, ffn_embed_dim=32, attention_heads=4)
        args.max_tokens, args.batches, args.repeats = 200, 2, 2
    for name, value in {**vars(model), "num_passes": 3, "lengths": default_lengths()}.items():
        setattr(args, name, value)
    torch.set_num_threads(args.threads)

    logging.disable(logging.INFO)
    warnings.filterwarnings("ignore")
    rows = measure(args, device)
    for row in rows:
        print(
            f"{row['variant']:10} update {row['update_ms']:,.1f} ms, measurement {row['measurement_ms']:,.1f} ms "
            f"({row['measurement_ms_q20']:,.1f} to {row['measurement_ms_q80']:,.1f}): {100 * row['share']:.2f}% of the "
            f"time at every {row['interval']:,} updates, 3% at every {row['interval_for_3_percent']:,}"
        )
    out = args.out or (None if args.quick else OUT)
    if out is not None:
        write_csv(out, rows)


if __name__ == "__main__":
    main()
