"""What an update of transformer_small sends between processes, counted: does it depend on K and on the pass mode?

    python benchmarks/reductions.py            # about a minute on two CPU cores
    python benchmarks/reductions.py --quick    # a smoke test; writes no file unless --out is given

Two processes on the CPU (gloo), fairseq's trainer under the flags of configs/iwslt14_transformer_small.yaml, as in
benchmarks/step.py. The profiler records each collective operation of one update with the shape and type of its tensor.
Those of the gradients are in float32, the parameters' type; what fairseq sums for the log and its checks is not.
"""

from __future__ import annotations

import argparse
import gc
import logging
import math
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from measure import MIB, RESULTS, machine, random_batch, write_csv
from step import BASELINE, make_trainer
from torch import distributed, multiprocessing

from intra_distillation_fairseq.files import read_json, write_json

OUT = RESULTS / "scale_reductions.csv"
PROCESSES = 2
BYTES = {"float": 4, "double": 8, "long int": 8}
SMALL = {"types": 12_001, "embed_dim": 512, "ffn_embed_dim": 1024, "attention_heads": 4, "layers": 6}
TINY = {"types": 100, "embed_dim": 16, "ffn_embed_dim": 32, "attention_heads": 2, "layers": 1}


class Cell(NamedTuple):
    """What is trained."""

    ddp_backend: str
    variant: str
    num_passes: int
    update_freq: int


CELLS = [
    Cell(backend, *rest)
    for backend in ("c10d", "legacy_ddp")
    for rest in (
        (BASELINE, 1, 1),
        ("stacked", 3, 1),
        ("stacked", 6, 1),
        ("sequential", 3, 1),
        ("recompute", 3, 1),
        ("stacked", 3, 4),
        ("sequential", 3, 4),
    )
]


def collectives(profiler: torch.profiler.profile) -> Iterator[tuple[str, str, int]]:
    """(operation, type of the numbers, bytes) of each collective operation that gloo ran."""
    for event in profiler.profiler.kineto_results.events():
        if event.name().startswith("gloo:"):
            for shape, kind in zip(event.shapes(), event.dtypes()):
                yield event.name().removeprefix("gloo:"), kind, math.prod(shape) * BYTES[kind]


def count(cell: Cell, rank: int, sizes: dict[str, int]) -> dict[str, Any]:
    """One row: what the third update sends (before the second, c10d arranges its buckets anew)."""
    gc.collect()  # the last cell's trainer refers to itself
    args = SimpleNamespace(**sizes, precision="fp32", num_passes=cell.num_passes, max_tokens=1024)
    group = {"distributed-world-size": PROCESSES, "distributed-rank": rank, "ddp-backend": cell.ddp_backend}
    device = torch.device("cpu")
    trainer = make_trainer(cell.variant, args, device, {**group, "update-freq": cell.update_freq})
    samples = [random_batch(sizes["types"], 50, device)] * cell.update_freq
    for _ in range(2):
        trainer.train_step(samples)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profiler:
        trainer.train_step(samples)
    seen = list(collectives(profiler))
    gradients = [size for operation, kind, size in seen if (operation, kind) == ("all_reduce", "float")]
    parameters = sum(p.numel() for p in trainer.model.parameters())
    return {
        **cell._asdict(),
        "processes": PROCESSES,
        "parameters": parameters,
        "gradient_calls": len(gradients),
        "gradient_mib": round(sum(gradients) / MIB, 3),
        "bytes_per_parameter": round(sum(gradients) / parameters, 6),
        "other_calls": len(seen) - len(gradients),
        "other_bytes": sum(size for _, _, size in seen) - sum(gradients),
    }


def work(rank: int, folder: str, sizes: dict[str, int], cells: list[Cell]) -> None:
    """One of the processes; rank 0 leaves the rows in rows.json."""
    logging.disable(logging.INFO)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting"
    distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=PROCESSES)
    rows = [count(cell, rank, sizes) for cell in cells]
    if rank == 0:
        write_json(Path(folder) / "rows.json", {"rows": rows})
    distributed.destroy_process_group()


def measure(sizes: dict[str, int], cells: list[Cell]) -> list[dict[str, Any]]:
    """The rows of all cells, from processes of their own."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(work, (folder, sizes, cells), nprocs=PROCESSES)
        return read_json(Path(folder) / "rows.json")["rows"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a tiny model")
    parser.add_argument("--out", type=Path, help=f"the CSV (benchmarks/results/{OUT.name}; none with --quick)")
    args = parser.parse_args()
    facts = machine(torch.device("cpu")) | {"threads": 1}
    rows = [{**row, **facts} for row in measure(TINY if args.quick else SMALL, CELLS)]
    for row in rows:
        print(
            f"{row['ddp_backend']:10} {row['variant']:10} K={row['num_passes']} update-freq {row['update_freq']}: "
            f"{row['gradient_calls']} reductions of gradients, {row['gradient_mib']:.3f} MiB = "
            f"{row['bytes_per_parameter']} bytes per parameter; {row['other_calls']} others, {row['other_bytes']} bytes"
        )
    out = args.out or (None if args.quick else OUT)
    if out is not None:
        write_csv(out, rows)


if __name__ == "__main__":
    main()
