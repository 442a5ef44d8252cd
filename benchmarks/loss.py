"""What the loss of K passes costs: the published code's way, our definition under autograd, and the fused back ends.

    python benchmarks/loss.py                    # the main case and a sweep over N, V, K and dtype, about 10 minutes
    python benchmarks/loss.py --cases main       # K = 3, N = 2,048, V = 12,001 in float32 only
    python benchmarks/loss.py --dtype bfloat16   # the same around the main case in bfloat16; for a GPU
    python benchmarks/loss.py --cases all        # every combination; for a GPU
    python benchmarks/loss.py --quick            # a smoke test; writes no file unless --out is given

Variants of the group "logits" start from logits, those of the group "features" from the decoder's features, output
projection included; the sweep has the latter, whose time is mostly that of the projection, in the main case only.
Before anything is timed, values and gradients of each are compared with float64 ones; where they disagree, nothing is
measured. Each repeat runs every variant of a group, in rotated order, so that what else the machine does meets them
alike: `speedup` is the median of a repeat's own ratios reference / variant.

Memory is that of tensors beyond the inputs, at most (`measure.peak_memory`); "and gradients" leaves the gradients of
the inputs out as well, which every implementation has to hand over. That of backward is that of both.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from measure import MIB, RESULTS, Stopwatch, available_mib, machine, peak_memory, rotated, summary, write_csv
from torch import Tensor
from tqdm import tqdm

from intra_distillation_fairseq.losses.backends import BACKENDS
from intra_distillation_fairseq.losses.closed_form import CLOSED_FORMS
from intra_distillation_fairseq.losses.objective import ConsistencyLoss, Objective, weighted

OUT = RESULTS / "loss.csv"
PADDING = 1
ALPHA, LABEL_SMOOTHING = 5.0, 0.1  # the published recipe's
PHASES = ("forward", "backward", "both")
REFERENCE = {"logits": "reference", "features": "reference_features"}
# Largest error allowed of values and gradients, relative to the largest one. Gradients are rounded to the type of the
# logits (published: twice, and their sum again). From features the logits are rounded, too, by up to 2^-9 of a logit of
# about 8 in bfloat16, which changes a probability by 2%, and alpha multiplies that.
TOLERANCE = {
    "logits": {"float32": (1e-5, 1e-5), "bfloat16": (1e-5, 2e-2), "float16": (1e-5, 2e-3)},
    "features": {"float32": (1e-5, 1e-5), "bfloat16": (2e-2, 1e-1), "float16": (2e-3, 2e-2)},
}


class Case(NamedTuple):
    """One shape: K passes over N tokens with V types."""

    num_passes: int
    tokens: int
    vocabulary: int
    dtype: str


MAIN = Case(3, 2048, 12_001, "float32")
QUICK = Case(3, 32, 101, "float32")
SWEEP = {
    "num_passes": (2, 3, 5, 8),
    "tokens": (256, 1024, 2048, 4096),
    "vocabulary": (4001, 12_001, 32_001),
    "dtype": ("float32", "bfloat16"),
}


def cases(which: str, dtype: str = MAIN.dtype) -> list[Case]:
    """main: that case; sweep: and all that differ from it in one of K, N, V and type; all: every combination.

    dtype is the type of the main case and of what is made from it.
    """
    first, others = MAIN._replace(dtype=dtype), []
    if which == "sweep":
        others = [first._replace(**{name: value}) for name, values in SWEEP.items() for value in values]
    elif which == "all":
        others = [Case(*values) for values in itertools.product(*SWEEP.values())]
    return list(dict.fromkeys([first, *others]))


def groups(case: Case, which: str, every: list[Case]) -> list[str]:
    """Of which groups the variants are measured in this case of several."""
    return ["logits"] if which == "sweep" and case != every[0] else ["logits", "features"]


class Input(NamedTuple):
    """What the variants are given. Logits have deviation 2, and 0.5 between passes, about as in training."""

    logits: Tensor  # K x N x V
    features: Tensor  # K x N x H
    weight: Tensor  # V x H
    target: Tensor  # N, of which a sixteenth is padding
    objective: Objective


def make_input(case: Case, width: int, divergence: str, device: torch.device) -> Input:
    generator = torch.Generator(device).manual_seed(1)
    settings = {"generator": generator, "device": device}

    def passes(size: int) -> Tensor:
        common = torch.randn(case.tokens, size, **settings).mul_(2)
        result = torch.empty(case.num_passes, case.tokens, size, dtype=getattr(torch, case.dtype), device=device)
        for one_pass in result:
            one_pass.copy_(torch.randn(case.tokens, size, **settings).mul_(0.5).add_(common))
        return result

    weight = torch.randn(case.vocabulary, width, **settings).mul_(width**-0.5).to(getattr(torch, case.dtype))
    target = torch.randint(4, case.vocabulary, (case.tokens,), **settings)
    target[::16] = PADDING
    objective = Objective(divergence, ALPHA, LABEL_SMOOTHING, PADDING)
    return Input(passes(case.vocabulary), passes(width), weight, target, objective)


# -- the variants


def published(logits: list[Tensor], target: Tensor, objective: Objective) -> ConsistencyLoss:
    """The loss as the published code computes it, in our words.

    Each pass has a cross-entropy of its own, from log_softmax in float32, and a stored float32 softmax; the divergence
    takes the logarithms of the stored probabilities and of their mean, elementwise, all of it under autograd.
    """
    k, vocabulary = len(logits), logits[0].size(-1)
    padding = target.eq(objective.ignore_index)
    nll_sum = smooth_sum = divergence_sum = 0.0
    probs = []
    for z in logits:
        lprobs = torch.log_softmax(z, -1, dtype=torch.float32)
        nll = -lprobs.gather(-1, target.unsqueeze(-1)).squeeze(-1)
        nll_sum = nll_sum + nll.masked_fill(padding, 0.0).sum() / k
        smooth_sum = smooth_sum + (-lprobs.sum(-1)).masked_fill(padding, 0.0).sum() / k
        probs.append(torch.softmax(z.float(), -1))
    mean = sum(probs) / k
    for p in probs:
        factor = p - mean if objective.divergence == "x" else p
        per_token = (factor * (p.log() - mean.log())).sum(-1)
        divergence_sum = divergence_sum + per_token.masked_fill(padding, 0.0).sum() / k
    return weighted(objective, vocabulary, nll_sum, smooth_sum, divergence_sum)


class Variant(NamedTuple):
    """One implementation.

    Attributes:
        group: logits or features: what its inputs are.
        loss: (inputs, target, objective) -> ConsistencyLoss; inputs as `inputs` gives them.
        stacked: takes the K passes in one tensor, as the stacked pass mode hands them over; the others take K tensors.
            Each gets what costs it least: under autograd, taking one tensor apart copies its gradient.
        overwrites: its backward puts the gradient into the memory of the logits, as in training.
    """

    group: str
    loss: Callable[[list[Tensor], Tensor, Objective], ConsistencyLoss]
    stacked: bool = True
    overwrites: bool = False

    def inputs(self, given: Input) -> list[Tensor]:
        """The tensors whose gradients are wanted. They share the memory of `given` where nothing overwrites it."""
        block = given.logits if self.group == "logits" else given.features
        if self.overwrites:
            block = block.clone()
        passes = [block] if self.stacked else list(block)
        return [t.detach().requires_grad_() for t in (passes if self.group == "logits" else [*passes, given.weight])]


def variants(device: torch.device) -> dict[str, Variant]:
    """By name; of the group features those with _features."""

    def from_logits(name: str, overwrite: bool) -> Callable[..., ConsistencyLoss]:
        def loss(inputs, target, objective):
            given = inputs if name == "reference" else inputs[0]
            return BACKENDS[name].from_logits(given, target, objective, overwrite_logits=overwrite)

        return loss

    def from_features(name: str) -> Callable[..., ConsistencyLoss]:
        def loss(inputs, target, objective):
            *features, weight = inputs
            given = features if name == "reference" else features[0]
            return BACKENDS[name].from_features(given, weight, None, target, objective)

        return loss

    fused = ["chunked", *(["triton"] if device.type == "cuda" else [])]
    result = {
        "published": Variant("logits", published, stacked=False),
        "reference": Variant("logits", from_logits("reference", False), stacked=False),
    }
    for name in fused:
        result[name] = Variant("logits", from_logits(name, False))
        result[f"{name}_in_place"] = Variant("logits", from_logits(name, True), overwrites=True)
    result["reference_features"] = Variant("features", from_features("reference"), stacked=False)
    for name in fused:
        result[f"{name}_features"] = Variant("features", from_features(name))
    return result


def forward(variant: Variant, inputs: list[Tensor], given: Input) -> ConsistencyLoss:
    return variant.loss(inputs, given.target, given.objective)


def both(variant: Variant, inputs: list[Tensor], given: Input) -> tuple[ConsistencyLoss, tuple[Tensor, ...]]:
    loss = forward(variant, inputs, given)
    return loss, torch.autograd.grad(loss.loss, inputs)


# -- are they right


def expected(group: str, given: Input) -> tuple[Tensor, list[Tensor]]:
    """The four values of ConsistencyLoss, and the gradients in float32: the definition in float64, chunk by chunk."""
    k, tokens, vocabulary = given.logits.shape
    step = max(1, (64 * MIB) // (8 * k * vocabulary))  # of 64 MiB in float64
    values = torch.zeros(4, dtype=torch.float64, device=given.target.device)
    by_token = given.logits if group == "logits" else given.features
    gradient = torch.empty_like(by_token, dtype=torch.float32)
    weight = given.weight.double().requires_grad_()
    weight_gradient = torch.zeros_like(weight)
    for start in range(0, tokens, step):
        rows = slice(start, start + step)
        block = by_token[:, rows].double().requires_grad_()
        target = given.target[rows]
        if group == "logits":
            loss = BACKENDS["reference"].from_logits(block, target, given.objective)
            gradient[:, rows] = torch.autograd.grad(loss.loss, block)[0]
        else:
            loss = BACKENDS["reference"].from_features(block, weight, None, target, given.objective)
            gradient[:, rows], more = torch.autograd.grad(loss.loss, (block, weight))
            weight_gradient += more
        values += torch.stack([value.detach() for value in loss])
    return values, [gradient] if group == "logits" else [gradient, weight_gradient.float()]


def errors(variant: Variant, given: Input, values: Tensor, gradients: list[Tensor]) -> tuple[float, float]:
    """Largest error of values and of gradients, relative to the largest value and to each tensor's largest gradient."""
    inputs = variant.inputs(given)
    loss, found = both(variant, inputs, given)
    value_error = float(((torch.stack(loss).detach().double() - values).abs() / values.abs()).max())
    if not variant.stacked:
        k = len(given.logits)
        found = (torch.stack(found[:k]), *found[k:])
    gradient_error = max(
        float((mine.detach().float() - right).abs().max() / right.abs().max()) for mine, right in zip(found, gradients)
    )
    return value_error, gradient_error


def check(names: dict[str, Variant], given: Input, case: Case) -> dict[str, tuple[float, float]]:
    """Name -> errors.

    Raises:
        SystemExit: one of them is not small.
    """
    result = {}
    for group in REFERENCE:
        members = {name: variant for name, variant in names.items() if variant.group == group}
        if not members:
            continue
        values, gradients = expected(group, given)
        value_allowed, gradient_allowed = TOLERANCE[group][case.dtype]
        for name, variant in members.items():
            value_error, gradient_error = result[name] = errors(variant, given, values, gradients)
            # "not below": a result that is no number is wrong, too.
            if not (value_error <= value_allowed and gradient_error <= gradient_allowed):
                raise SystemExit(
                    f"error: {name} disagrees with the float64 reference at {describe(case)}: relative error of the "
                    f"values {value_error:.1e} (allowed {value_allowed:.0e}), of the gradients {gradient_error:.1e} "
                    f"(allowed {gradient_allowed:.0e}); nothing is measured"
                )
    return result


# -- the measurement


def memory(variant: Variant, given: Input, device: torch.device) -> dict[str, float]:
    """Phase -> peak MiB above the inputs."""
    inputs = variant.inputs(given)
    return {
        "forward": peak_memory(lambda: forward(variant, inputs, given), device),
        "both": peak_memory(lambda: both(variant, inputs, given), device),
    }


def times(names: dict[str, Variant], given: Input, repeats: int, device: torch.device) -> dict[str, list[list[float]]]:
    """Name -> for each repeat the milliseconds of forward, backward and both."""
    result: dict[str, list[list[float]]] = {name: [] for name in names}
    watch = Stopwatch(device)
    for repeat in range(repeats):
        for name in rotated(list(names), repeat):
            inputs = names[name].inputs(given)
            watch.start()
            loss = forward(names[name], inputs, given)
            watch.mark()
            gradients = torch.autograd.grad(loss.loss, inputs)
            watch.mark()
            laps = watch.laps_ms()
            result[name].append([*laps, sum(laps)])
            del inputs, loss, gradients  # the next one begins with their memory
    return result


def describe(case: Case) -> str:
    return f"K={case.num_passes} N={case.tokens} V={case.vocabulary} {case.dtype}"


def measure(
    case: Case, names: dict[str, Variant], args: argparse.Namespace, device: torch.device, facts: dict[str, Any]
) -> list[dict[str, Any]]:
    """The rows of one case; without numbers where the memory of the machine does not suffice."""
    repeats = args.repeats * (2 if case[:3] == MAIN[:3] and case.dtype == args.dtype else 1)
    common = {**case._asdict(), "divergence": args.divergence, "alpha": ALPHA}
    # Ten tensors of the size of the logits in float32: six under autograd (profiled), input, gradients, expected ones.
    needed = 10 * 4 * case.num_passes * case.tokens * case.vocabulary / MIB
    try:
        if device.type == "cpu" and needed > available_mib():
            raise torch.OutOfMemoryError(f"about {needed:,.0f} MiB are needed, {available_mib():,.0f} are there")
        given = make_input(case, args.width, args.divergence, device)
        error = check(names, given, case)
        peaks = {name: memory(variant, given, device) for name, variant in names.items()}
        laps = {}
        for group in {variant.group for variant in names.values()}:
            members = {name: variant for name, variant in names.items() if variant.group == group}
            laps |= times(members, given, repeats, device)
    except torch.OutOfMemoryError as shortage:
        tqdm.write(f"{describe(case)}: out of memory: {str(shortage).splitlines()[0]}", file=sys.stderr)
        return [
            row(common, name, variant, phase, facts, status="out of memory")
            for name, variant in names.items()
            for phase in PHASES
        ]

    rows = []
    for name, variant in names.items():
        handed_over = 0.0 if variant.overwrites else sum(t.nbytes for t in variant.inputs(given)) / MIB
        base = REFERENCE[variant.group]
        for place, phase in enumerate(PHASES):
            numbers: dict[str, Any] = summary("ms", [lap[place] for lap in laps[name]], 3)
            if base in laps:
                ratios = [one[place] / mine[place] for one, mine in zip(laps[base], laps[name])]
                numbers |= summary("speedup", ratios, 3)
            if phase in peaks[name]:
                numbers["peak_above_inputs_mib"] = round(peaks[name][phase], 2)
            if phase == "both":
                numbers["peak_above_inputs_and_gradients_mib"] = round(peaks[name][phase] - handed_over, 2)
            numbers |= {"value_error": f"{error[name][0]:.1e}", "gradient_error": f"{error[name][1]:.1e}"}
            rows.append(row(common, name, variant, phase, facts, repeats=repeats, **numbers))
    return rows


COLUMNS = (
    "group variant phase num_passes tokens vocabulary dtype divergence alpha status ms ms_q20 ms_q80 speedup "
    "speedup_q20 speedup_q80 peak_above_inputs_mib peak_above_inputs_and_gradients_mib value_error gradient_error "
    "repeats"
).split()


def row(common: dict, name: str, variant: Variant, phase: str, facts: dict, status: str = "ok", **numbers) -> dict:
    known = {**common, "group": variant.group, "variant": name, "phase": phase, "status": status, **numbers}
    return {**{column: known.get(column, "") for column in COLUMNS}, **facts}


def show(rows: list[dict[str, Any]]) -> str:
    lines = []
    for one in rows:
        if one["phase"] == "both" and one["status"] == "ok":
            speed = f"{one['speedup']:.2f} times the speed of {REFERENCE[one['group']]}, " if one["speedup"] else ""
            lines.append(
                f"  {one['variant']:20} {one['ms']:10.2f} ms ({one['ms_q20']:.2f} to {one['ms_q80']:.2f}), {speed}"
                f"{one['peak_above_inputs_mib']:,.1f} MiB beyond the inputs, "
                f"{one['peak_above_inputs_and_gradients_mib']:,.1f} beyond these and their gradients"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda if there is one")
    parser.add_argument("--cases", choices=("main", "sweep", "all"), default="sweep", help="(sweep)")
    types = ("float32", "bfloat16", "float16")
    parser.add_argument("--dtype", choices=types, default="float32", help="of logits, in the main case (float32)")
    parser.add_argument("--divergence", choices=CLOSED_FORMS, default="x", help="(x)")
    parser.add_argument("--width", type=int, default=512, help="H, width of the features (512)")
    parser.add_argument("--variants", nargs="+", metavar="NAME", help="only these (all)")
    parser.add_argument("--threads", type=int, help="of the CPU (what torch takes: OMP_NUM_THREADS, or every core)")
    parser.add_argument(
        "--repeats", type=int, default=5, help="runs of each variant (5), twice as many in the main case"
    )
    parser.add_argument("--quick", action="store_true", help="a tiny case, 2 repeats")
    parser.add_argument("--out", type=Path, help=f"the CSV (benchmarks/results/{OUT.name}; none with --quick)")
    args = parser.parse_args()
    if args.quick:
        args.repeats, args.width = 2, 16
    if min(args.repeats, args.width, args.threads or 1) < 1:
        parser.error("--repeats, --width, --threads: allowed is at least 1")
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")
    if args.device == "cuda" and device.type == "cpu":
        parser.error("--device is cuda, but torch sees no GPU: allowed are auto and cpu")
    known = list(variants(device))
    args.variants = args.variants or known
    if unknown := [name for name in args.variants if name not in known]:
        parser.error(f"--variants has '{unknown[0]}': allowed on this device are {', '.join(known)}")

    facts = machine(device)
    rows = []
    every = [QUICK._replace(dtype=args.dtype)] if args.quick else cases(args.cases, args.dtype)
    for case in tqdm(every, unit="case"):
        wanted = groups(case, args.cases, every)
        names = {n: v for n, v in variants(device).items() if n in args.variants and v.group in wanted}
        some = measure(case, names, args, device, facts)
        tqdm.write(f"{describe(case)}\n{show(some)}")
        rows += some
    out = args.out or (None if args.quick else OUT)
    if out is not None:
        write_csv(out, rows)


if __name__ == "__main__":
    main()
