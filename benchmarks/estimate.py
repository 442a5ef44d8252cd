"""The tables of docs/scaling.md: memory, time and communication of an update on paper, from measured constants.

    python benchmarks/estimate.py

Measured: benchmarks/results/scale_activations.csv (bytes for each token and pass), scale_reductions.csv (what is sent),
step.csv (time on a CPU). What is assumed of GPUs stands in ASSUMED and in the headings of the tables.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from measure import RESULTS

from intra_distillation_fairseq.experiments.recipes import read_recipe

RECIPE = Path(__file__).resolve().parents[1] / "configs" / "wmt17_transformer_big.yaml"
GIB, GB = 2**30, 1e9


class Model(NamedTuple):
    """A Transformer with as many layers on both sides, nothing shared; experts: feed-forward layers in place of one."""

    types: int
    width: int
    ffn: int
    layers: int = 6
    experts: int = 1

    def _layers(self, experts: int) -> int:
        d, f = self.width, self.ffn
        attention, ffn, norm = 4 * (d * d + d), 2 * d * f + f + d, 2 * d
        router = self.experts * d if self.experts > 1 else 0
        encoder = attention + experts * ffn + router + 2 * norm
        return self.layers * (encoder + encoder + attention + norm)

    @property
    def parameters(self) -> int:
        """All of them: the layers, two embeddings and the output projection."""
        return self._layers(self.experts) + 3 * self.types * self.width

    @property
    def flop(self) -> int:
        """Of one pass over a source and a target token, forward and backward.

        Two for each parameter that multiplies the token forward, four backward. Left out: attention's own products,
        1.2% of transformer_small's and 0.4% of transformer_big's at 25 tokens a sentence.
        """
        return 6 * (self._layers(1) + self.types * self.width)


MODELS = {
    "transformer_small": Model(12_001, 512, 1024),
    "switch_transformer_small": Model(12_001, 512, 1024, experts=4),
    "transformer_big": Model(32_001, 1024, 4096),
    "switch_transformer_big": Model(32_001, 1024, 4096, experts=4),
}

# Bytes for each parameter: the parameter, its gradient, Adam's two averages, a float32 copy of the parameter and of
# its gradient; and what the reduction of the gradients holds besides (c10d's buckets, legacy_ddp's buffer).
STATE = {
    "fp32": (4, 4, 8, 0, 4),
    "fp16, bf16": (2, 2, 8, 8, 2),
    "memory-efficient-fp16, -bf16": (2, 2, 8, 0, 2),
}
SIXTEEN = "fp16, bf16"
RECOMPUTE_FACTOR = 4 / 3  # each forward runs twice: 2 + 2 + 4 in place of 2 + 4

# Nothing of this is measured here.
ASSUMED = {
    "memory": 141e9,  # bytes of an H200, vendor's number
    "usable": 0.9,  # of it; the rest is for the CUDA context and for what the allocator cannot use
    "peak": 989e12,  # FLOP/s of an H200 in 16 bits without sparsity, vendor's number
    "utilisation": (0.2, 0.35, 0.5),  # of that peak over a whole update: a guess
    "links": {8: 450e9, 64: 50e9},  # bytes/s of a GPU each way: NVLink within a node, 400 Gbit/s between nodes
}


# -- what was measured


def rows_of(name: str) -> list[dict[str, str]]:
    """A CSV of benchmarks/results."""
    with open(RESULTS / name, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def activation_mib(model: str, precision: str, variant: str, tokens: int, num_passes: int) -> float:
    """MiB beyond parameters, gradients and optimiser, by the measured fit; at least 0.

    Args:
        model: its name.
        precision: fp32 or bf16.
        variant: of benchmarks/activations.py.
        tokens: target tokens of the single batch.
        num_passes: K; 1 for the variant baseline.
    """
    for row in rows_of("scale_activations.csv"):
        if (row["model"], row["precision"], row["variant"]) == (model, precision, variant):
            per_token = float(row["b0_kib"]) + float(row["b1_kib"]) * num_passes
            return max(0.0, float(row["a_mib"]) + tokens * per_token / 1024)
    raise KeyError(f"{model} {precision} {variant} is not in scale_activations.csv")


def memory_gib(model: str, variant: str, tokens: int, num_passes: int, gpus: int) -> float:
    """GiB of an update in 16 bits on each of several GPUs."""
    per_parameter = sum(STATE[SIXTEEN][:4]) + (STATE[SIXTEEN][4] if gpus > 1 else 0)
    state = MODELS[model].parameters * per_parameter
    return state / GIB + activation_mib(model, "bf16", variant, tokens, num_passes) / 1024


def most_tokens(model: str, variant: str, num_passes: int, gpus: int = 8) -> int:
    """The largest --max-tokens, in thousands, whose update fits into an H200."""
    room = ASSUMED["memory"] * ASSUMED["usable"] / GIB
    tokens = 1000
    while memory_gib(model, variant, tokens + 1000, num_passes, gpus) <= room:
        tokens += 1000
    return tokens


def flop(model: str, tokens: int, num_passes: int, recompute: bool = False) -> float:
    """Of an update over so many target tokens and as many source tokens."""
    return MODELS[model].flop * tokens * num_passes * (RECOMPUTE_FACTOR if recompute else 1)


def sent_bytes(model: str, gpus: int, bytes_per_number: int = 2) -> float:
    """What each GPU sends for one update: a ring's share of the sum of all gradients, whatever K is."""
    return 2 * (gpus - 1) / gpus * MODELS[model].parameters * bytes_per_number


def communication_s(model: str, gpus: int) -> float:
    """Seconds of that on the assumed links, if nothing of it is hidden behind backward."""
    return sent_bytes(model, gpus) / ASSUMED["links"][gpus] if gpus > 1 else 0.0


# -- the tables


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def sizes() -> str:
    head = ["model", "parameters", "GFLOP per token and pass"]
    return table(head, ([name, f"{m.parameters:,}", f"{m.flop / 1e9:.3f}"] for name, m in MODELS.items()))


def state() -> str:
    head = ["precision", "parameter", "gradient", "Adam", "float32 copy and its gradient", "one process"]
    big = MODELS["transformer_big"].parameters
    rows = []
    for name, (parameter, gradient, adam, copies, reduction) in STATE.items():
        one = parameter + gradient + adam + copies
        both = one + reduction
        rows.append([name, parameter, gradient, adam, copies, one, both, f"{both * big / GIB:.1f} GiB"])
    return table([*head, "several", "`transformer_big`, several"], rows)


def activations() -> str:
    names = {"baseline": "baseline (K = 1)", "stacked": "stacked, from features"}
    names |= {"stacked_logits": "stacked, from logits", "recompute": "recompute, from features"}
    head = ["model", "precision", "update", "a, MiB", "b0, KiB", "b1, KiB", "largest error of the fit"]
    return table(
        head,
        (
            [row["model"], row["precision"], names[row["variant"]], row["a_mib"], f"{float(row['b0_kib']):.0f}"]
            + [f"{float(row['b1_kib']):.0f}", f"{100 * float(row['largest_error']):.1f}%"]
            for row in rows_of("scale_activations.csv")
        ),
    )


def memory() -> str:
    head = ["model", "max-tokens", *(f"K = {k}" for k in range(1, 7))]
    rows = []
    for model in ("transformer_small", "transformer_big"):
        for tokens in (1024, 4096, 16_384):
            cells = [f"{memory_gib(model, 'baseline', tokens, 1, 8):.1f}"]
            for k in range(2, 7):
                both = (memory_gib(model, variant, tokens, k, 8) for variant in ("stacked_logits", "recompute"))
                cells.append(" / ".join(f"{gib:.1f}" for gib in both))
            rows.append([model, f"{tokens:,}", *cells])
    return table(head, rows)


def most() -> str:
    head = ["model", "baseline", *(f"K = {k}" for k in (2, 3, 6))]
    rows = []
    for model in ("transformer_small", "transformer_big"):
        cells = [f"{most_tokens(model, 'baseline', 1):,}"]
        for k in (2, 3, 6):
            cells.append(" / ".join(f"{most_tokens(model, v, k):,}" for v in ("stacked_logits", "recompute")))
        rows.append([model, *cells])
    return table(head, rows)


def cpu() -> str:
    """The formula against benchmarks/step.py."""
    head = ["update of `transformer_small`", "GFLOP by the formula", "ms measured", "GFLOP/s on two cores"]
    rows = []
    for row in rows_of("step.csv"):
        name = row["variant"]
        passes = 1 if name == "baseline" else int(row["num_passes"])
        work = flop("transformer_small", int(row["target_tokens"]), passes, name == "recompute") / 1e9
        rows.append([name, f"{work:.0f}", row["ms"], f"{1000 * work / float(row['ms']):.0f}"])
    return table(head, rows)


def cpu_rate() -> float:
    """FLOP/s of the baseline in step.csv."""
    (row,) = (row for row in rows_of("step.csv") if row["variant"] == "baseline")
    return flop("transformer_small", int(row["target_tokens"]), 1) / float(row["ms"]) * 1000


def time() -> str:
    low, _, high = ASSUMED["utilisation"]
    head = ["model", "K", "TFLOP", "two CPU cores, s", f"H200 at {low:.0%} to {high:.0%} of its peak, ms"]
    rows = []
    for model in ("transformer_small", "transformer_big"):
        for k in range(1, 7):
            work = flop(model, 4096, k)
            ms = (f"{1000 * work / (share * ASSUMED['peak']):.1f}" for share in (high, low))
            rows.append([model, k, f"{work / 1e12:.2f}", f"{work / cpu_rate():.0f}", " to ".join(ms)])
    return table(head, rows)


def reductions() -> str:
    head = ["`--ddp-backend`", "update", "K", "update-freq", "calls", "MiB of gradients", "bytes per parameter"]
    return table(
        [*head, "others: calls, bytes"],
        (
            [row["ddp_backend"], row["variant"], row["num_passes"], row["update_freq"], row["gradient_calls"]]
            + [f"{float(row['gradient_mib']):.1f}", f"{float(row['bytes_per_parameter']):.4g}"]
            + [f"{row['other_calls']}, {row['other_bytes']}"]
            for row in rows_of("scale_reductions.csv")
        ),
    )


def communication() -> str:
    share = ASSUMED["utilisation"][1]
    kinds = [(tokens, k) for tokens in (1024, 4096) for k in (1, 3)]
    head = ["model", "GPUs", "MB sent by each", "ms", *(f"{tokens:,} tokens, K = {k}" for tokens, k in kinds)]
    rows = []
    for model in ("transformer_small", "transformer_big"):
        for gpus in ASSUMED["links"]:
            computing = (f"{1000 * flop(model, *kind) / (share * ASSUMED['peak']):.1f}" for kind in kinds)
            sent = [f"{sent_bytes(model, gpus) / 1e6:.0f}", f"{1000 * communication_s(model, gpus):.1f}"]
            rows.append([model, gpus, *sent, *computing])
    return table(head, rows)


def hours(gpus: int, num_passes: int, recompute: bool, utilisation: float) -> float:
    """Of all updates of the WMT'17 recipe, its batch whatever the number of GPUs, nothing hidden behind anything."""
    recipe = read_recipe(RECIPE).train
    tokens = recipe["max-tokens"] * recipe["update-freq"]
    computing = flop("transformer_big", tokens, num_passes, recompute) / gpus / (utilisation * ASSUMED["peak"])
    return recipe["max-update"] * (computing + communication_s("transformer_big", gpus)) / 3600


def wmt17() -> str:
    head = ["training", "GPUs", *(f"hours at {u:.0%}" for u in ASSUMED["utilisation"]), "of it communication"]
    kinds: dict[str, Callable[[int, float], float]] = {
        "`transformer`": lambda gpus, u: hours(gpus, 1, False, u),
        "`id_x`, K = 3, stacked": lambda gpus, u: hours(gpus, 3, False, u),
        "`id_x`, K = 3, recompute": lambda gpus, u: hours(gpus, 3, True, u),
    }
    updates = read_recipe(RECIPE).train["max-update"]
    rows = []
    for name, kind in kinds.items():
        for gpus in (1, 8, 64):
            wire = updates * communication_s("transformer_big", gpus) / 3600
            rows.append([name, gpus, *(f"{kind(gpus, u):.1f}" for u in ASSUMED["utilisation"]), f"{wire:.2f}"])
    return table(head, rows)


def sharding() -> str:
    head = ["GPU", *(f"{name}: bytes {sum(parts)}" for name, parts in STATE.items())]
    rows = []
    for name, memory in (("24 GB", 24 * GB), ("80 GB", 80 * GB), ("141 GB", ASSUMED["memory"])):
        rows.append([name, *(f"{0.8 * memory / sum(parts) / 1e9:.1f}" for parts in STATE.values())])
    return table(head, rows)


TABLES: dict[str, Callable[[], str]] = {
    "Models": sizes,
    "Bytes for each parameter": state,
    "Memory beyond that, measured: MiB = a + tokens * (b0 + b1 * K)": activations,
    "GiB on each of several GPUs in 16 bits: stacked from logits / recompute from features": memory,
    "Largest max-tokens on an H200 in 16 bits, the same two": most,
    "The formula against what was measured": cpu,
    "One batch of 4,096 tokens, stacked": time,
    "Measured: what an update sends between two processes": reductions,
    "What an update sends in 16 bits, and how long one batch of each GPU computes at 35%, ms": communication,
    "WMT'17 En-De, transformer_big, hours of the whole recipe": wmt17,
    "Billions of parameters whose state fills 80% of a GPU": sharding,
}


def main() -> None:
    for title, make in TABLES.items():
        print(f"{title}\n\n{make()}\n")


if __name__ == "__main__":
    main()
