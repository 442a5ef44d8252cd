"""What an update of transformer_small costs with K = 3 passes, against the baseline and the published approach.

    python benchmarks/step.py                        # about 10 minutes on two CPU cores
    python benchmarks/step.py --precision bf16       # on a GPU
    python benchmarks/step.py --precision bf16 --extrapolate 2000    # minutes for 50,000 updates, from so many in a row
    python benchmarks/step.py --profile              # where the time of one update of each variant goes
    python benchmarks/step.py --quick                # a smoke test; writes no file unless --out is given

An update is all of `Trainer.train_step` of fairseq under the flags of configs/iwslt14_transformer_small.yaml: the batch
to the device, K passes, loss, backward, scaling of the gradient, Adam, learning rate, log. Variants:

    baseline     label_smoothed_cross_entropy, one pass
    published    what the published code does: K passes one after the other, the loss under autograd (`reference`)
    stacked, sequential, recompute               the pass modes with the automatic choice of the loss' back end
    stacked_logits, recompute_logits             the same, the loss from logits; only where --variants names them

Batches have the sentence lengths of IWSLT'14 De-En where these are to be had, made into batches by fairseq itself; the
words are random. Of an epoch's batches, sorted by length, those at evenly spaced quantiles are taken. Each repeat runs
every variant on the same batch, in rotated order; ratios are medians of a repeat's own ratios.

Memory, at most over all batches: `peak_mib` is that of parameters, optimiser state, gradients and all else an update
makes; `peak_above_state_mib` is that without parameters, one gradient for each and the optimiser's state.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fairseq import options
from fairseq.data.data_utils import batch_by_size
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.trainer import Trainer
from measure import MIB, RESULTS, batch, dictionary, machine, now_ms, peak_memory, rotated, summary, write_csv
from tqdm import tqdm, trange

import intra_distillation_fairseq  # noqa: F401  registers criterion, models and task
from intra_distillation_fairseq.experiments.recipes import as_flags, read_recipe
from intra_distillation_fairseq.losses.backends import BACKENDS
from intra_distillation_fairseq.tasks.translation_intra_distillation import TranslationIntraDistillationTask

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "configs" / "iwslt14_transformer_small.yaml"
OUT, OUT_EXTRAPOLATE, OUT_PROFILE = (RESULTS / f"step{name}.csv" for name in ("", "_extrapolated", "_profile"))
LENGTHS = "iwslt14-lengths/bpe10k_lengths_with_eos.npz"
PUBLISHED_UPDATES = 50_000
BASELINE, PUBLISHED = "baseline", "published"

# Flags that replace the recipe's. A constant weight: the published one is 0 in the first update and tiny in the next.
PASSES = {"criterion": "intra_distillation", "id-alpha-schedule": "constant"}
VARIANTS: dict[str, dict[str, Any]] = {
    BASELINE: {"criterion": "label_smoothed_cross_entropy"},
    PUBLISHED: {**PASSES, "id-pass-mode": "sequential", "id-loss-backend": "reference"},
    "stacked": {**PASSES, "id-pass-mode": "stacked", "id-loss-backend": "auto"},
    "sequential": {**PASSES, "id-pass-mode": "sequential", "id-loss-backend": "auto"},
    "recompute": {**PASSES, "id-pass-mode": "recompute", "id-loss-backend": "auto"},
    "stacked_logits": {**PASSES, "id-pass-mode": "stacked", "id-loss-backend": "auto", "id-loss-input": "logits"},
    "recompute_logits": {**PASSES, "id-pass-mode": "recompute", "id-loss-backend": "auto", "id-loss-input": "logits"},
}
DEFAULT_VARIANTS = list(VARIANTS)[:5]
PRECISIONS = {"fp32": {}, "bf16": {"bf16": True}, "fp16": {"fp16": True}}


# -- batches


def default_lengths() -> Path | None:
    """The file of IWSLT'14 lengths in the folder where the tests look for real corpora, if it is there."""
    given = os.environ.get("ID_SHARED_DATA")
    path = (Path(given) if given else ROOT.parent / "shared" / "data") / LENGTHS
    return path if path.is_file() else None


def sentence_lengths(path: Path | None) -> np.ndarray:
    """(sentences, 2): source and target tokens, end of sentence included.

    Without a file, 20,000 pairs from a log-normal distribution with the mean and deviation (3.02, 0.63) and the
    correlation (0.97) that the logarithms of IWSLT'14's have.
    """
    if path is not None:
        with np.load(path) as arrays:
            return np.stack([arrays["train_de"], arrays["train_en"]], 1).astype(np.int64)
    generator = np.random.default_rng(1)
    common, own = generator.normal(size=(20_000, 1)), generator.normal(size=(20_000, 2))
    return np.rint(np.exp(3.02 + 0.62 * common + 0.106 * own)).clip(2, 175).astype(np.int64)


def epoch_batches(lengths: np.ndarray, max_tokens: int, multiple: int) -> list[np.ndarray]:
    """Indices of the sentences of each batch of an epoch, the shortest first, as fairseq's translation task makes them.

    Sorted by source, then target length, equal ones in random order; sentences beyond max_tokens are left out.
    """
    order = np.random.default_rng(1).permutation(len(lengths))
    order = order[lengths[order].max(1) <= max_tokens]
    order = order[np.argsort(lengths[order, 1], kind="mergesort")]
    order = order[np.argsort(lengths[order, 0], kind="mergesort")]
    return batch_by_size(
        order, None, lengths[order].max(1), max_tokens=max_tokens, required_batch_size_multiple=multiple
    )


def samples(args: argparse.Namespace, number: int | None) -> list[dict[str, Any]]:
    """Batches at evenly spaced quantiles of the epoch's; all of them, in random order, where no number is given."""
    lengths = sentence_lengths(args.lengths)
    every = epoch_batches(lengths, args.max_tokens, read_recipe(RECIPE).train["required-batch-size-multiple"])
    generator = torch.Generator().manual_seed(1)
    if number is None:
        chosen = [every[i] for i in torch.randperm(len(every), generator=generator)]
    else:
        chosen = [every[int((i + 0.5) / number * len(every))] for i in range(number)]
    cpu = torch.device("cpu")  # the trainer moves them, as in training
    return [batch(torch.from_numpy(lengths[indices]), args.types, generator, cpu) for indices in chosen]


# -- updates


def make_trainer(
    variant: str, args: argparse.Namespace, device: torch.device, more: dict[str, Any] | None = None
) -> Trainer:
    """fairseq's trainer with a model, criterion and optimiser of its own; `more` are further options of fairseq."""
    recipe = read_recipe(RECIPE)
    flags = {**recipe.options("id_x" if variant != BASELINE else "transformer"), **VARIANTS[variant]}
    if variant != BASELINE:
        flags["id-num-passes"] = args.num_passes
    for side in ("encoder", "decoder"):
        for name in ("embed_dim", "ffn_embed_dim", "layers", "attention_heads"):
            flags[f"{side}-{name.replace('_', '-')}"] = getattr(args, name)
    flags |= {"task": "translation_intra_distillation", "max-tokens": args.max_tokens, "seed": 1}
    flags |= {**PRECISIONS[args.precision], "cpu": device.type == "cpu", **(more or {})}
    parser = options.get_training_parser()
    cfg = convert_namespace_to_omegaconf(options.parse_args_and_arch(parser, ["no data", *as_flags(flags)]))
    words = dictionary(args.types)
    task = TranslationIntraDistillationTask(cfg.task, words, words)
    torch.manual_seed(1)
    return Trainer(cfg, task, task.build_model(cfg.model), task.build_criterion(cfg.criterion))


def state_mib(trainer: Trainer) -> tuple[float, float]:
    """MiB of parameters, buffers and the optimiser's own tensors; and of one gradient for each parameter."""
    model, optimizer = trainer.model, trainer.optimizer
    tensors = [*model.parameters(), *model.buffers()]
    for copy in optimizer.params:  # the parameters again, or their float32 copies with gradients that stay
        tensors += [copy, *([] if copy.grad is None else [copy.grad])]
    for state in optimizer.optimizer.state.values():
        tensors += [value for value in state.values() if torch.is_tensor(value)]
    unique = {t.data_ptr(): t.nbytes for t in tensors}
    return sum(unique.values()) / MIB, sum(p.nbytes for p in model.parameters()) / MIB


def memory(trainer: Trainer, sample: dict[str, Any], device: torch.device) -> dict[str, float]:
    """MiB of one update."""
    trainer.zero_grad()  # the last update's gradients, which the next one frees first
    state, gradients = state_mib(trainer)
    peak = peak_memory(lambda: trainer.train_step([sample]), device)
    numbers = {"peak": state + peak, "peak_above_state": peak - gradients, "state": state, "gradients": gradients}
    return {f"{name}_mib": round(value, 1) for name, value in numbers.items()}


def measure(args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    facts = machine(device)
    batches = samples(args, args.batches)
    trainers = {name: make_trainer(name, args, device) for name in args.variants}
    peaks: dict[str, list[dict[str, float]]] = {name: [] for name in trainers}
    times: dict[str, list[float]] = {name: [] for name in trainers}
    with tqdm(total=len(trainers) * (1 + len(batches) + args.repeats), unit="update", smoothing=0.1) as progress:
        for trainer in trainers.values():
            trainer.train_step([batches[0]])  # makes the optimiser's state
            progress.update()
        for sample in batches:  # warms up, too
            for name, trainer in trainers.items():
                peaks[name].append(memory(trainer, sample, device))
                progress.update()
        for repeat in range(args.repeats):
            for name in rotated(list(trainers), repeat):
                start = now_ms(device)
                trainers[name].train_step([batches[repeat % len(batches)]])
                times[name].append(now_ms(device) - start)
                progress.update()

    tokens = [batches[repeat % len(batches)]["ntokens"] for repeat in range(args.repeats)]
    rows = []
    for name, mine in times.items():
        numbers: dict[str, Any] = {**loss_of(trainers[name]), **summary("ms", mine, 1)}
        if BASELINE in times:
            numbers |= summary("times_baseline", [m / b for m, b in zip(mine, times[BASELINE])], 3)
        if PUBLISHED in times:
            numbers |= summary("speedup_on_published", [p / m for m, p in zip(mine, times[PUBLISHED])], 3)
        numbers["updates_per_s"] = round(1000 / statistics.median(mine), 3)
        numbers["tokens_per_s"] = round(1000 * sum(tokens) / sum(mine))
        numbers |= max(peaks[name], key=lambda peak: peak["peak_mib"])
        numbers |= {"repeats": args.repeats, "batches": len(batches), "target_tokens": round(statistics.mean(tokens))}
        known = {column: numbers.get(column, "") for column in COLUMNS}
        rows.append({"variant": name, **known, **settings(args), **facts})
    return rows


COLUMNS = (
    "loss_backend loss_input ms ms_q20 ms_q80 times_baseline times_baseline_q20 times_baseline_q80 "
    "speedup_on_published speedup_on_published_q20 speedup_on_published_q80 updates_per_s tokens_per_s peak_mib "
    "peak_above_state_mib state_mib gradients_mib repeats batches target_tokens"
).split()


def loss_of(trainer: Trainer) -> dict[str, str]:
    """Which back end the criterion has chosen, and from what it computes the loss; nothing of the baseline's."""
    criterion = trainer.get_criterion()
    chosen = [name for name, backend in BACKENDS.items() if backend is getattr(criterion, "backend", None)]
    if not chosen:
        return {}
    return {"loss_backend": chosen[0], "loss_input": "features" if criterion.takes_features else "logits"}


def settings(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "num_passes": args.num_passes,
        "max_tokens": args.max_tokens,
        "lengths": "iwslt14_de_en" if args.lengths else "generated",
        "types": args.types,
        "width": args.embed_dim,
        "ffn": args.ffn_embed_dim,
        "layers": f"{args.layers}+{args.layers}",
        "precision": args.precision,
    }


def extrapolate(args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """The first variant, so many updates in a row over the epoch's batches in random order, as training takes them."""
    name, facts = args.variants[0], machine(device)
    trainer, batches = make_trainer(name, args, device), samples(args, None)
    for sample in batches[: min(20, args.extrapolate)]:
        trainer.train_step([sample])
    start = now_ms(device)
    for update in trange(args.extrapolate, unit="update"):
        trainer.train_step([batches[update % len(batches)]])
    seconds = (now_ms(device) - start) / 1000
    minutes = seconds / args.extrapolate * PUBLISHED_UPDATES / 60
    print(f"{name}: {args.extrapolate:,} updates in {seconds:.1f} s: {PUBLISHED_UPDATES:,} take {minutes:.1f} minutes")
    numbers = {"updates": args.extrapolate, "seconds": round(seconds, 2), "minutes_per_50000": round(minutes, 2)}
    return [{"variant": name, **numbers, **settings(args), **facts}]


def profile(args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Operators of the update over the batch in the middle of the epoch, by the time spent in themselves."""
    facts, [sample] = machine(device), samples(args, 1)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    rows = []
    for name in args.variants:
        trainer = make_trainer(name, args, device)
        for _ in range(3):
            trainer.train_step([sample])
        with torch.profiler.profile(activities=activities) as profiler:
            trainer.train_step([sample])
            now_ms(device)
        spent = {
            event.key: (
                (event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total),
                event.count,
            )
            for event in profiler.key_averages()
        }
        total = sum(microseconds for microseconds, _ in spent.values())
        print(f"{name}: {total / 1000:,.0f} ms")
        for operator, (microseconds, calls) in sorted(spent.items(), key=lambda item: -item[1][0])[:12]:
            share = 100 * microseconds / total
            print(f"  {share:5.1f}%  {operator}, {calls} calls")
            numbers = {"percent": round(share, 2), "ms": round(microseconds / 1000, 2), "calls": calls}
            rows.append({"variant": name, "operator": operator, **numbers, **settings(args), **facts})
        del trainer
    return rows


def show(row: dict[str, Any]) -> str:
    def ratio(column: str, text: str) -> str:
        quantiles = f"({row[f'{column}_q20']:.2f} to {row[f'{column}_q80']:.2f})" if row[column] else ""
        return f"{row[column]:.2f} {quantiles} times the {text}, " if row[column] else ""

    return (
        f"{row['variant']:16} {row['ms']:9.1f} ms ({row['ms_q20']:.1f} to {row['ms_q80']:.1f}), "
        f"{ratio('times_baseline', 'time of the baseline')}{ratio('speedup_on_published', 'speed of published')}"
        f"{row['tokens_per_s']:,} target tokens/s, peak {row['peak_mib']:,.0f} MiB, "
        f"{row['peak_above_state_mib']:,.0f} beyond parameters, gradients and optimiser"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda if there is one")
    parser.add_argument("--precision", choices=list(PRECISIONS), default="fp32", help="as fairseq's --bf16 and --fp16")
    parser.add_argument("--num-passes", type=int, default=3, help="K (3)")
    parser.add_argument("--lengths", type=Path, default=default_lengths(), help="npz with train_de and train_en")
    parser.add_argument("--max-tokens", type=int, help="of a batch, as fairseq's (4096 on a GPU, 1024 on a CPU)")
    parser.add_argument("--types", type=int, default=12_001, help="vocabulary (12001)")
    parser.add_argument("--layers", type=int, default=6, help="on each side (6)")
    parser.add_argument("--embed-dim", type=int, default=512, help="width (512)")
    parser.add_argument("--ffn-embed-dim", type=int, default=1024, help="width of the feed-forward layers (1024)")
    parser.add_argument("--attention-heads", type=int, default=4, help="(4)")
    parser.add_argument(
        "--variants", nargs="+", choices=list(VARIANTS), metavar="NAME", help=f"of {', '.join(VARIANTS)}"
    )
    parser.add_argument("--batches", type=int, help="different batches (20 on a GPU, 6 on a CPU)")
    parser.add_argument("--repeats", type=int, help="measured updates of each variant (100 on a GPU, 12 on a CPU)")
    parser.add_argument("--threads", type=int, help="of the CPU (what torch takes: OMP_NUM_THREADS, or every core)")
    parser.add_argument(
        "--extrapolate", type=int, metavar="N", help="only this: N updates of the first variant (stacked)"
    )
    parser.add_argument("--profile", action="store_true", help="only this: the operators of one update of each variant")
    parser.add_argument("--quick", action="store_true", help="a tiny model, 2 repeats")
    parser.add_argument("--out", type=Path, help=f"the CSV (benchmarks/results/{OUT.name}; none with --quick)")
    args = parser.parse_args()
    device = torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")
    if args.device == "cuda" and device.type == "cpu":
        parser.error("--device is cuda, but torch sees no GPU: allowed are auto and cpu")
    if args.precision == "fp16" and device.type == "cpu":
        parser.error("--precision is fp16, which fairseq trains on a GPU only: allowed on a CPU are fp32 and bf16")
    if args.lengths is not None and not args.lengths.is_file():
        parser.error(
            f"--lengths '{args.lengths}' is not a file: give an npz with train_de and train_en, or leave it out"
        )
    if args.quick:
        args.max_tokens, args.types, args.layers, args.embed_dim, args.ffn_embed_dim = 200, 100, 1, 16, 32
        args.batches, args.repeats = 2, 2
    on_gpu = device.type == "cuda"
    args.max_tokens = args.max_tokens or (4096 if on_gpu else 1024)
    args.batches = args.batches or (20 if on_gpu else 6)
    args.repeats = args.repeats or (100 if on_gpu else 12)
    args.variants = args.variants or (["stacked"] if args.extrapolate else DEFAULT_VARIANTS)
    if min(args.batches, args.repeats, args.layers, args.extrapolate or 1, args.threads or 1) < 1 or args.types < 5:
        parser.error(
            "--batches, --repeats, --layers, --extrapolate, --threads: allowed is at least 1; --types: at least 5"
        )
    if args.threads:
        torch.set_num_threads(args.threads)

    logging.disable(logging.INFO)
    warnings.filterwarnings("ignore")  # a page of hydra's and torch's deprecations, which fairseq's commands have too
    if args.extrapolate:
        rows, out = extrapolate(args, device), OUT_EXTRAPOLATE
    elif args.profile:
        rows, out = profile(args, device), OUT_PROFILE
    else:
        rows, out = measure(args, device), OUT
        print("\n".join(map(show, rows)))
    out = args.out or (None if args.quick else out)
    if out is not None:
        write_csv(out, rows)


if __name__ == "__main__":
    main()
