"""How much memory an update takes beyond parameters, gradients and optimiser, for each token and pass.

    python benchmarks/activations.py            # about 5 minutes on one CPU core, 8 GiB of memory
    python benchmarks/activations.py --quick    # a smoke test; writes no file unless --out is given

`measure.peak_memory` counts the bytes of tensors, so the numbers are the same on every CPU; matrix products are not
computed, since only the sizes of their results matter. Batches have sentences of 25 tokens on both sides, no padding.
The numbers of several sizes are fitted, by least squares, with

    MiB beyond state and gradients = a + tokens * (b0 + b1 * K)         tokens: target tokens of the single batch

The trainers and variants are those of benchmarks/step.py; benchmarks/estimate.py computes from the result. Where the
peak is at the end of the forward passes, when most gradients do not exist yet, `a` is below 0.
"""

from __future__ import annotations

import argparse
import gc
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from measure import MIB, RESULTS, batch, machine, write_csv
from step import BASELINE, make_trainer, memory, state_mib
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

OUT = RESULTS / "scale_activations.csv"
LENGTH = 25
SIZES = {
    "transformer_small": {"types": 12_001, "embed_dim": 512, "ffn_embed_dim": 1024, "attention_heads": 4, "layers": 6},
    "transformer_big": {"types": 32_001, "embed_dim": 1024, "ffn_embed_dim": 4096, "attention_heads": 16, "layers": 6},
}
TINY = {"types": 100, "embed_dim": 16, "ffn_embed_dim": 32, "attention_heads": 2, "layers": 1}
# transformer_big is measured in 16 bits, as it is trained.
CELLS = (("transformer_small", "fp32"), ("transformer_small", "bf16"), ("transformer_big", "bf16"))
VARIANTS = (BASELINE, "stacked", "stacked_logits", "recompute")


class SizesOnly(TorchDispatchMode):
    """Matrix products give zeros, allocated as ever: most of an update's time is saved, and none of its memory."""

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        name, kwargs = function.overloadpacket.__name__, kwargs or {}
        if name == "addmm_":
            return args[0]
        if name not in ("mm", "addmm", "bmm", "baddbmm"):
            return function(*args, **kwargs)
        if "out" in kwargs:
            return kwargs["out"].zero_()
        a, b = args[-2:]
        return a.new_zeros((*a.shape[:-1], b.shape[-1]))


def points(variant: str) -> Sequence[tuple[int, int]]:
    """What to measure, (target tokens, K): enough of both to tell a, b0 and b1 apart."""
    if variant == BASELINE:
        return (1000, 1), (1500, 1), (2000, 1)
    # Only with recompute is there something that K does not multiply: the activations of one pass.
    return ((500, 3), (1000, 2), (500, 5), (1000, 3))[: 4 if variant == "recompute" else 3]


def fit(measured: Sequence[tuple[int, int, float]], once: bool) -> tuple[float, float, float, float]:
    """Least squares over (tokens, K, MiB).

    Args:
        measured: the points.
        once: whether there is memory for each token that K does not multiply; else b0 is 0.

    Returns:
        a in MiB; b0 in KiB per token, b1 in KiB per token and pass; and the largest relative error.
    """
    tokens, passes, mib = (np.array(column, dtype=float) for column in zip(*measured))
    matrix = np.stack([np.ones_like(tokens), tokens * passes, *([tokens] if once else [])], 1)
    solution = np.linalg.lstsq(matrix, mib, rcond=None)[0]
    error = float(np.abs(matrix @ solution / mib - 1).max())
    a, b1, *rest = solution
    return float(a), 1024 * float(sum(rest)), 1024 * float(b1), error


def measure(model: str, sizes: dict[str, int], variant: str, precision: str) -> dict[str, Any]:
    """One row.

    Args:
        model: its name.
        sizes: as in SIZES.
        variant: of benchmarks/step.py.
        precision: fp32 or bf16.
    """
    gc.collect()  # the last variant's trainer refers to itself
    device, generator = torch.device("cpu"), torch.Generator().manual_seed(1)
    trainer, measured = None, []
    for tokens, passes in points(variant):
        sample = batch(torch.full((tokens // LENGTH, 2), LENGTH), sizes["types"], generator, device)
        if trainer is None:
            settings = SimpleNamespace(**sizes, precision=precision, num_passes=passes, max_tokens=1024)
            trainer = make_trainer(variant, settings, device)
            with SizesOnly():
                trainer.train_step([sample])  # makes the optimiser's state
        if variant != BASELINE:
            trainer.get_criterion().num_passes = passes
        with SizesOnly():
            mib = memory(trainer, sample, device)["peak_above_state_mib"]
        measured.append((tokens, passes, mib))
    a, b0, b1, error = fit(measured, once=variant == "recompute")
    parameters = sum(p.numel() for p in trainer.model.parameters())
    trainer.zero_grad()
    state, gradients = (mib * MIB / parameters for mib in state_mib(trainer))
    return {
        "model": model,
        "precision": precision,
        "variant": variant,
        "a_mib": round(a, 1),
        "b0_kib": round(b0, 2),
        "b1_kib": round(b1, 2),
        "largest_error": round(error, 4),
        "parameters": parameters,
        "state_bytes_per_parameter": round(state, 2),
        "gradient_bytes_per_parameter": round(gradients, 2),
        "measured": " ".join(f"{tokens}x{passes}:{mib:.1f}" for tokens, passes, mib in measured),
        "sentence_length": LENGTH,
        **sizes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a tiny model")
    parser.add_argument("--out", type=Path, help=f"the CSV (benchmarks/results/{OUT.name}; none with --quick)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.INFO)
    warnings.filterwarnings("ignore")
    facts = machine(torch.device("cpu"))
    cells = [(*cell, variant) for cell in CELLS for variant in VARIANTS]
    rows = []
    for model, precision, variant in tqdm(cells, unit="variant"):
        row = measure(model, TINY if args.quick else SIZES[model], variant, precision)
        rows.append({**row, **facts})
        print(
            f"{model} {precision} {variant}: {row['a_mib']:,.1f} MiB + tokens * ({row['b0_kib']:.1f} + "
            f"{row['b1_kib']:.1f} * K) KiB, to {100 * row['largest_error']:.1f}%",
            flush=True,
        )
    out = args.out or (None if args.quick else OUT)
    if out is not None:
        write_csv(out, rows)


if __name__ == "__main__":
    main()
