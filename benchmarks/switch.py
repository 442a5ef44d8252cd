"""What a training step of switch_transformer_small costs against transformer_small's, at equal width.

    python benchmarks/switch.py            # a few minutes on one CPU core
    python benchmarks/switch.py --quick    # a smoke test; writes no file unless --out is given

Each repeat runs one step of every model, in turn, so that what else the machine does meets them alike; `ratio` is the
median of a repeat's own ratios. A step is the task's train_step (forward, backward) on one batch of random sentences
of similar length; an update adds the optimiser (Adam) and the zeroing of gradients. On one thread of a CPU the clock is
the processor time of this process, which the machine's other work lengthens least; otherwise it is the wall's.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from fairseq.criterions.label_smoothed_cross_entropy import LabelSmoothedCrossEntropyCriterion
from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_REGISTRY
from fairseq.optim.adam import FairseqAdam, FairseqAdamConfig
from measure import RESULTS, dictionary, machine, now_ms, random_batch, summary, write_csv
from torch import nn

import intra_distillation_fairseq  # noqa: F401  registers models and task
from intra_distillation_fairseq.tasks.translation_intra_distillation import (
    TranslationIntraDistillationConfig,
    TranslationIntraDistillationTask,
)

DENSE, SWITCH = "transformer_small", "switch_transformer_small"
PHASES = ("step", "update")
OUT = RESULTS / "switch.csv"


def build(arch: str, task, args: argparse.Namespace, device: torch.device) -> nn.Module:
    flags = argparse.Namespace(max_source_positions=512, max_target_positions=512, dropout=0.3, attention_dropout=0.1)
    for side in ("encoder", "decoder"):
        for name in ("embed_dim", "ffn_embed_dim", "layers", "attention_heads"):
            setattr(flags, f"{side}_{name}", getattr(args, name))
    ARCH_CONFIG_REGISTRY[arch](flags)
    torch.manual_seed(1)
    return ARCH_MODEL_REGISTRY[arch].build_model(flags, task).to(device, getattr(torch, args.precision))


def make_update(arch: str, args: argparse.Namespace, device: torch.device) -> tuple[Callable[[], list[float]], int]:
    """A function that runs one update and returns the milliseconds of its step and of the whole; and the parameters."""
    words = dictionary(args.types)
    task = TranslationIntraDistillationTask(TranslationIntraDistillationConfig(), words, words)
    model = build(arch, task, args, device)
    criterion = LabelSmoothedCrossEntropyCriterion(task, sentence_avg=False, label_smoothing=0.1)
    config = FairseqAdamConfig(adam_betas="(0.9, 0.98)", adam_eps=1e-6, weight_decay=1e-4, lr=[1e-4])
    optimizer = FairseqAdam(config, list(model.parameters()))
    sample = random_batch(args.types, args.tokens, device)
    updates = 0

    def update() -> list[float]:
        nonlocal updates
        start = now_ms(device)
        task.train_step(sample, model, criterion, optimizer, updates)
        step = now_ms(device) - start
        optimizer.multiply_grads(1 / sample["ntokens"])
        optimizer.step()
        optimizer.zero_grad()
        updates += 1
        return [step, now_ms(device) - start]

    return update, sum(p.numel() for p in model.parameters())


def measure(args: argparse.Namespace, device: torch.device) -> list[dict]:
    made = {arch: make_update(arch, args, device) for arch in (DENSE, SWITCH)}
    times: dict[str, list[list[float]]] = {arch: [] for arch in made}
    for repeat in range(args.warmup + args.repeats):
        for arch, (update, _) in made.items():
            milliseconds = update()
            if repeat >= args.warmup:
                times[arch].append(milliseconds)
        print(f"{repeat + 1} of {args.warmup + args.repeats}", end="\r", file=sys.stderr, flush=True)
    sample = random_batch(args.types, args.tokens, torch.device("cpu"))
    facts = machine(device)
    rows = []
    for phase, name in enumerate(PHASES):
        for arch, (_, parameters) in made.items():
            milliseconds = [both[phase] for both in times[arch]]
            ratios = [both[phase] / dense[phase] for both, dense in zip(times[arch], times[DENSE])]
            rows.append(
                {
                    "phase": name,
                    "arch": arch,
                    "parameters": parameters,
                    **summary("ms", milliseconds, 1),
                    **summary("ratio", ratios, 3),
                    "tokens_per_s": round(1000 * sample["ntokens"] / statistics.median(milliseconds)),
                    "repeats": args.repeats,
                    "target_tokens": sample["ntokens"],
                    "source_tokens": int(sample["net_input"]["src_lengths"].sum()),
                    "sentences": sample["nsentences"],
                    "types": args.types,
                    "width": args.embed_dim,
                    "ffn": args.ffn_embed_dim,
                    "layers": f"{args.layers}+{args.layers}",
                    "precision": args.precision,
                    **facts,
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda where there is one"
    )
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32", help="of the parameters")
    parser.add_argument("--threads", type=int, default=1, help="threads of the CPU (1)")
    parser.add_argument("--tokens", type=int, default=1500, help="target tokens of the batch, about (1500)")
    parser.add_argument("--types", type=int, default=12_001, help="vocabulary (12001)")
    parser.add_argument("--layers", type=int, default=6, help="on each side (6)")
    parser.add_argument("--embed-dim", type=int, default=512, help="width (512)")
    parser.add_argument(
        "--ffn-embed-dim", type=int, default=1024, help="width of a feed-forward layer or expert (1024)"
    )
    parser.add_argument("--attention-heads", type=int, default=4, help="(4)")
    parser.add_argument("--repeats", type=int, default=15, help="measured updates of each model (15)")
    parser.add_argument("--warmup", type=int, default=2, help="updates before these (2)")
    parser.add_argument("--quick", action="store_true", help="a tiny model, 2 repeats")
    parser.add_argument("--out", type=Path, help=f"the CSV (benchmarks/results/{OUT.name}; none with --quick)")
    args = parser.parse_args()
    if args.quick:
        args.tokens, args.types, args.layers, args.repeats, args.warmup = 100, 100, 1, 2, 1
        args.embed_dim, args.ffn_embed_dim = 16, 32
    if min(args.threads, args.tokens, args.repeats, args.layers) < 1 or args.types < 5:
        parser.error("--threads, --tokens, --repeats, --layers: allowed is at least 1; --types: at least 5")
    torch.set_num_threads(args.threads)
    cuda = torch.cuda.is_available() if args.device == "auto" else args.device == "cuda"
    rows = measure(args, torch.device("cuda" if cuda else "cpu"))

    for row in rows:
        print(
            f"{row['phase']:7} {row['arch']:26} {row['parameters']:>11,} parameters {row['ms']:10.1f} ms "
            f"({row['ms_q20']:.1f} to {row['ms_q80']:.1f})  {row['ratio']:.2f} times the dense one's "
            f"({row['ratio_q20']:.2f} to {row['ratio_q80']:.2f})"
        )
    out = args.out or (None if args.quick else OUT)
    if out is not None:
        write_csv(out, rows)


if __name__ == "__main__":
    main()
