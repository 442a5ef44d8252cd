"""The loss of K passes in Triton: one program per token, float32 inside. Importing this module needs triton.

Notation and gradients as in closed_form.py: l_i = log p_i, m = mean_i p_i, d_j = l_j - mean_i l_i, e_j = l_j - log m.
Statistics of one token, from one read of its K rows in blocks of the vocabulary, with running maxima:
    Z_j = sum_v exp(z_jv - max_j)
    S_j = sum_v exp(z_jv - max_j) * (z_jv - mean_i z_iv)
    X   = mean_j <p_j, d_j> = mean_j S_j / Z_j
X = mean_j <p_j - m, d_j> by definition; as sum_j d_j = 0 this is the first form. The normalisers inside d_j sum to 0
over j and cancel in d_j - <p_j, d_j>: X and its gradient need d_j of the logits only. JS = mean_j <p_j, e_j> needs the
normalisers first: its rows are read a second time, in part from the level-2 cache.
The gradient is one more read and one write; it may go where the logits lie, since every element is read before the same
program writes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from intra_distillation_fairseq.errors import UserError
from intra_distillation_fairseq.losses.closed_form import TokenLosses
from intra_distillation_fairseq.losses.divergence import working_type
from intra_distillation_fairseq.losses.objective import ConsistencyLoss, Objective, weighted

MAX_PASSES = 8
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# Arguments that may change from call to call and must not compile a kernel again: triton would otherwise do so for a
# pointer that is a multiple of 16 bytes, an integer that is 1 or a multiple of 16. Alignment is told by ALIGNED alone.
_OFFSETS = [f"offset_{i}" for i in range(1, MAX_PASSES)]
_COMMON = ["logits", *_OFFSETS, "row_stride", "target", "ignore_index", "tokens", "maxima", "log_normalisers", "inner"]
_PER_TOKEN = ["nll", "smooth", "divergence"]
_GRADIENT = ["gradient", *(f"to_{name}" for name in _OFFSETS), "to_row_stride", "upstream"]


@triton.jit
def _row_pointers(
    base, token, row_stride, offset_1, offset_2, offset_3, offset_4, offset_5, offset_6, offset_7,
    PADDED_K: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """(PADDED_K, 1) pointers to the rows of one token; offset_i: elements from the first pass to pass i, 64 bits."""
    k = tl.arange(0, PADDED_K)
    rows = tl.zeros([PADDED_K], tl.int64) + token * row_stride
    rows += tl.where(k == 1, offset_1, 0) + tl.where(k == 2, offset_2, 0) + tl.where(k == 3, offset_3, 0)
    rows += tl.where(k == 4, offset_4, 0) + tl.where(k == 5, offset_5, 0) + tl.where(k == 6, offset_6, 0)
    rows += tl.where(k == 7, offset_7, 0)
    pointers = base + rows
    if ALIGNED:
        pointers = tl.multiple_of(pointers, 16)  # bytes
    return pointers[:, None]


@triton.jit
def _centred(values, shift, is_pass, K: tl.constexpr):
    """Deviations from the mean of the passes, less each pass's shift, (PADDED_K, B) -> the same.

    Rows that are no pass must hold 0; the shifts sum to 0. The mean is taken twice: the rounding error of the first is
    the same in all passes and would enter sum_j <p_j, d_j> at first order in the deviations, where the divergence is of
    the second. The shift is taken off in between, mostly without rounding, so that what is rounded next is small.
    """
    deviations = tl.where(is_pass, values - (tl.sum(values, 0) * (1.0 / K))[None, :] - shift, 0.0)
    return tl.where(is_pass, deviations - (tl.sum(deviations, 0) * (1.0 / K))[None, :], 0.0)


@triton.jit
def _js_terms(lprobs, valid, K: tl.constexpr):
    """(p_j, e_j = l_j - log m) of a tile of log-probabilities, -inf where not valid; log m without a log of any p."""
    highest = tl.max(lprobs, 0)
    highest = tl.where(highest > -float("inf"), highest, 0.0)
    shares = tl.exp(lprobs - highest[None, :])
    log_mean = highest + tl.log(tl.maximum(tl.sum(shares, 0), 1.0) * (1.0 / K))  # below 1: a column without values
    return shares * tl.exp(highest)[None, :], tl.where(valid, lprobs - log_mean[None, :], 0.0)


@triton.jit(do_not_specialize=[*_COMMON, *_PER_TOKEN])
def _statistics_kernel(
    logits, offset_1: tl.int64, offset_2: tl.int64, offset_3: tl.int64, offset_4: tl.int64, offset_5: tl.int64,
    offset_6: tl.int64, offset_7: tl.int64, row_stride: tl.int64, target, ignore_index: tl.int64, tokens: tl.int64,
    maxima, log_normalisers, inner, nll, smooth, divergence,
    V: tl.constexpr, K: tl.constexpr, PADDED_K: tl.constexpr, BLOCK_V: tl.constexpr, ALIGNED: tl.constexpr,
    IS_X: tl.constexpr,
):  # fmt: skip
    dtype = inner.dtype.element_ty
    token = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, PADDED_K)
    is_pass = (k < K)[:, None]
    label = tl.load(target + token)
    is_real = label != ignore_index
    in_range = (label >= 0) & (label < V)
    passes_read = tl.where(is_real, K, 0)  # nothing of padding
    is_read = (k < passes_read)[:, None]
    rows = _row_pointers(
        logits, token, row_stride, offset_1, offset_2, offset_3, offset_4, offset_5, offset_6, offset_7,
        PADDED_K, ALIGNED,
    )  # fmt: skip
    at_target = tl.load(rows + label, mask=(k < tl.where(is_real & in_range, K, 0))[:, None], other=0.0).to(dtype)
    # A pass may differ from the others by a constant, which no divergence sees: count from the deviation at the target.
    shift = _centred(at_target, 0.0, is_pass, K)
    maximum = tl.sum(at_target, 1)  # of what has been read
    normaliser = tl.where(k < passes_read, 0.0, 1.0).to(dtype)  # 1: its logarithm is 0 where nothing is read
    deviation = tl.zeros([PADDED_K], dtype)  # S_j, counted from shift
    gap = tl.zeros([PADDED_K], dtype)  # sum_v (max_j - z_jv): terms of one sign, as those of the smoothing loss
    for start in range(0, V, BLOCK_V):
        columns = start + tl.arange(0, BLOCK_V)
        valid = is_read & (columns < V)[None, :]
        z = tl.load(rows + columns[None, :], mask=valid, other=-float("inf")).to(dtype)
        higher = tl.maximum(maximum, tl.max(z, 1))
        gap += (higher - maximum) * start
        rescale = tl.exp(maximum - higher)
        maximum = higher
        weights = tl.exp(z - maximum[:, None])
        z = tl.where(valid, z, maximum[:, None])
        normaliser = normaliser * rescale + tl.sum(weights, 1)
        gap += tl.sum(maximum[:, None] - z, 1)
        if IS_X:
            deviation = deviation * rescale + tl.sum(weights * _centred(z, shift, is_pass, K), 1)
    log_normaliser = tl.log(normaliser)
    if IS_X:
        from_shift = deviation / normaliser
        product = from_shift + tl.sum(shift, 1)
        divergence_here = tl.sum(from_shift, 0) * (1.0 / K)  # the shifts sum to 0
    else:
        product = tl.zeros([PADDED_K], dtype)
        for start in range(0, V, BLOCK_V):
            columns = start + tl.arange(0, BLOCK_V)
            valid = is_read & (columns < V)[None, :]
            z = tl.load(rows + columns[None, :], mask=valid, other=-float("inf")).to(dtype)
            probs, excess = _js_terms(z - maximum[:, None] - log_normaliser[:, None], valid, K)
            product += tl.sum(probs * excess, 1)
        divergence_here = tl.sum(product, 0) * (1.0 / K)
    nll_here = tl.sum(maximum - tl.sum(at_target, 1) + log_normaliser, 0) * (1.0 / K)
    smooth_here = tl.sum(gap + log_normaliser * V, 0) * (1.0 / K)
    # A target outside the vocabulary cannot be reported from here: NaN, which `product` takes into the gradient too.
    nll_here = tl.where(in_range, nll_here, float("nan"))
    product = tl.where(in_range, product, float("nan"))
    tl.store(nll + token, tl.where(is_real, nll_here, 0.0))
    tl.store(smooth + token, tl.where(is_real, smooth_here, 0.0))
    tl.store(divergence + token, tl.where(is_real, divergence_here, 0.0))
    tl.store(maxima + k * tokens + token, maximum, mask=k < K)
    tl.store(log_normalisers + k * tokens + token, log_normaliser, mask=k < K)
    tl.store(inner + k * tokens + token, product, mask=k < K)


@triton.jit(do_not_specialize=[*_COMMON, *_GRADIENT, "divergence_weight", "confidence", "smoothing"])
def _gradient_kernel(
    logits, offset_1: tl.int64, offset_2: tl.int64, offset_3: tl.int64, offset_4: tl.int64, offset_5: tl.int64,
    offset_6: tl.int64, offset_7: tl.int64, row_stride: tl.int64, target, ignore_index: tl.int64, tokens: tl.int64,
    maxima, log_normalisers, inner,
    gradient, to_offset_1: tl.int64, to_offset_2: tl.int64, to_offset_3: tl.int64, to_offset_4: tl.int64,
    to_offset_5: tl.int64, to_offset_6: tl.int64, to_offset_7: tl.int64, to_row_stride: tl.int64, upstream,
    divergence_weight: tl.float64, confidence: tl.float64, smoothing: tl.float64,
    V: tl.constexpr, K: tl.constexpr, PADDED_K: tl.constexpr, BLOCK_V: tl.constexpr, ALIGNED: tl.constexpr,
    TO_ALIGNED: tl.constexpr, IS_X: tl.constexpr,
):  # fmt: skip
    dtype = inner.dtype.element_ty
    token = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, PADDED_K)
    is_pass = (k < K)[:, None]
    label = tl.load(target + token)
    is_read = (k < tl.where(label != ignore_index, K, 0))[:, None]  # nothing of padding
    rows = _row_pointers(
        logits, token, row_stride, offset_1, offset_2, offset_3, offset_4, offset_5, offset_6, offset_7,
        PADDED_K, ALIGNED,
    )  # fmt: skip
    to_rows = _row_pointers(
        gradient, token, to_row_stride, to_offset_1, to_offset_2, to_offset_3, to_offset_4, to_offset_5, to_offset_6,
        to_offset_7, PADDED_K, TO_ALIGNED,
    )  # fmt: skip
    maximum = tl.load(maxima + k * tokens + token, mask=k < K, other=0.0)[:, None]
    log_normaliser = tl.load(log_normalisers + k * tokens + token, mask=k < K, other=0.0)[:, None]
    product = tl.load(inner + k * tokens + token, mask=k < K, other=0.0)[:, None]
    # The weights multiply in this precision, before the gradient is rounded to the type of the logits: the loss scale
    # inside `upstream` saves what float16 would have rounded to 0.
    ls_weight = tl.load(upstream).to(dtype) * (1.0 / K)
    divergence_weight = (ls_weight * divergence_weight).to(dtype)
    on_target, on_others = (ls_weight * confidence).to(dtype), (ls_weight * smoothing).to(dtype)
    for start in range(0, V, BLOCK_V):
        columns = start + tl.arange(0, BLOCK_V)
        inside = columns < V
        valid = is_read & inside[None, :]
        if IS_X:
            z = tl.load(rows + columns[None, :], mask=valid, other=0.0).to(dtype)
            probs = tl.where(valid, tl.exp(z - maximum - log_normaliser), 0.0)
            of_divergence = probs * (_centred(z, 0.0, is_pass, K) - product)
            of_divergence += probs - (tl.sum(probs, 0) * (1.0 / K))[None, :]
        else:
            z = tl.load(rows + columns[None, :], mask=valid, other=-float("inf")).to(dtype)
            probs, excess = _js_terms(z - maximum - log_normaliser, valid, K)
            of_divergence = probs * (excess - product)
        of_target = on_others + tl.where(columns == label, on_target, 0.0)
        here = divergence_weight * of_divergence + (ls_weight * probs - of_target[None, :])
        here = tl.where(is_read, here, 0.0).to(gradient.dtype.element_ty)
        tl.store(to_rows + columns[None, :], here, mask=is_pass & inside[None, :])


class Statistics(NamedTuple):
    """What the forward kernel leaves of the logits, in float32 (float64 for float64), in nats.

    Attributes:
        losses: what the loss is made of; not needed for the gradient.
        maximum: (K, N) largest logit of the row; of no meaning at padding, as the next two.
        log_normaliser: (K, N) ln sum_v exp(z_v - maximum). The logsumexp is the sum of these two; kept apart they lose
            less: log p = (z - maximum) - log_normaliser is a difference of small numbers where p is large.
        inner: (K, N) <p_j, z_j - mean_i z_i> for X, <p_j, l_j - log m> for JS.
    """

    losses: TokenLosses | None
    maximum: Tensor
    log_normaliser: Tensor
    inner: Tensor


class _Rows(NamedTuple):
    """Where the rows of K passes lie: `passes` share the type, the device and the distance between rows."""

    passes: list[Tensor]
    offsets: list[int]  # elements from the first pass to passes 1 .. 7
    row_stride: int  # elements
    aligned: bool  # every row begins at a multiple of 16 bytes: loads of 16 bytes are possible


def _rows(given: Sequence[Tensor] | Tensor) -> _Rows:
    """The rows of K tensors (N, V) or one (K, N, V), copied only if their memory is not made of rows."""
    passes = [z.detach() for z in given]
    if any(z.stride() != passes[0].stride() or z.stride(1) != 1 for z in passes):
        passes = [z.contiguous() for z in passes]
    size, base, row_stride = passes[0].element_size(), passes[0].data_ptr(), passes[0].stride(0)
    # Differences of addresses: the passes may be tensors of their own; stacking them would copy all logits.
    offsets = [(z.data_ptr() - base) // size for z in passes[1:]]
    aligned = all(z.data_ptr() % 16 == 0 for z in passes) and row_stride * size % 16 == 0
    return _Rows(passes, offsets + [0] * (MAX_PASSES - len(passes)), row_stride, aligned)


def _has_own_memory(given: Sequence[Tensor] | Tensor) -> bool:
    """Whether each pass is made of rows in a stretch of memory that no other pass shares: it may be overwritten."""
    rows = _rows(given)
    tokens, vocabulary = rows.passes[0].shape
    if any(a.data_ptr() != b.data_ptr() for a, b in zip(rows.passes, given)) or rows.row_stride < vocabulary:
        return False  # copies, or rows that overlap
    starts = sorted([0, *rows.offsets[: len(rows.passes) - 1]])
    return all(b - a >= (tokens - 1) * rows.row_stride + vocabulary for a, b in zip(starts, starts[1:]))


def _check(given: Sequence[Tensor] | Tensor, target: Tensor) -> None:
    """Raises UserError for what the kernels cannot take."""
    first = given[0]
    if not 2 <= len(given) <= MAX_PASSES:
        raise UserError(
            f"the loss back end triton takes 2 to {MAX_PASSES} passes, given {len(given)}: "
            "use --id-loss-backend chunked"
        )
    if first.dtype not in DTYPES or any(z.dtype != first.dtype for z in given):
        raise UserError(
            f"the loss back end triton takes logits of one type out of {', '.join(map(str, DTYPES))}, given "
            f"{', '.join(sorted({str(z.dtype) for z in given}))}"
        )
    if first.dim() != 2 or any(z.shape != first.shape for z in given) or target.shape != first.shape[:1]:
        raise UserError(
            "the loss back end triton takes logits (K, N, V) or K tensors (N, V) and a target (N,), given "
            f"{', '.join(str(tuple(z.shape)) for z in given)} and {tuple(target.shape)}"
        )
    # The decorator has chosen at import: TRITON_INTERPRET=1 makes functions that run on the CPU.
    interpreted = not isinstance(_statistics_kernel, triton.runtime.JITFunction)
    if first.is_cuda == interpreted or any(z.device != first.device for z in (*given, target)):
        where = "the CPU, as TRITON_INTERPRET is set" if interpreted else "one CUDA device"
        raise UserError(
            f"the loss back end triton needs logits and target on {where}, given "
            f"{', '.join(sorted({str(z.device) for z in (*given, target)}))}: use --id-loss-backend chunked"
        )


def _options(k: int, vocabulary: int, dtype: torch.dtype, objective: Objective) -> dict[str, int]:
    """Shape of a program, from the registers a thread needs.

    A tile is (PADDED_K, BLOCK_V) numbers of 32 bits on 4 warps, 128 threads. With 4,096 numbers a thread holds 32 of
    them (24 where K = 3: a row that is no pass is known when compiling and takes nothing), and about three such sets
    are alive at once (logits, weights, deviations): ptxas gives the statistics kernel 128 registers for K = 3 and 168
    for K = 4, the gradient kernel 32 to 72, so that at least 3 programs share a multiprocessor (65,536 registers) and
    some load while others compute. From 5 passes on the same tile takes up to 223 registers; half of it at most 163.
    Smaller tiles spend more of their time on the sums across threads that end a block. float64 takes two registers per
    number: half the tile. With K = 3 and V = 12,001: 1,024 columns, 12 blocks.
    """
    padded = triton.next_power_of_2(k)
    numbers = (4096 if padded <= 4 else 2048) // (2 if dtype == torch.float64 else 1)
    block = min(triton.next_power_of_2(vocabulary), numbers // padded)
    return {
        "V": vocabulary,
        "K": k,
        "PADDED_K": padded,
        "BLOCK_V": block,
        "IS_X": objective.divergence == "x",
        "num_warps": 4,
        "enable_fp_fusion": True,  # the default of triton changes
    }


def statistics(logits: Sequence[Tensor] | Tensor, target: Tensor, objective: Objective) -> Statistics:
    """The statistics of K tensors of logits (N, V), or one (K, N, V), with the target (N,); see Statistics."""
    _check(logits, target)
    rows = _rows(logits)
    first = rows.passes[0]
    tokens, vocabulary = first.shape
    dtype = working_type(first.dtype)
    losses = TokenLosses(*(first.new_empty(tokens, dtype=dtype) for _ in range(3)))
    maximum, log_normaliser, inner = (first.new_empty((len(rows.passes), tokens), dtype=dtype) for _ in range(3))
    with torch.cuda.device_of(first):
        _statistics_kernel[(tokens,)](
            first, *rows.offsets, rows.row_stride, target.contiguous(), objective.ignore_index, tokens,
            maximum, log_normaliser, inner, *losses,
            ALIGNED=rows.aligned, **_options(len(rows.passes), vocabulary, first.dtype, objective),
        )  # fmt: skip
    return Statistics(losses, maximum, log_normaliser, inner)


def write_gradient(
    logits: Sequence[Tensor] | Tensor,
    target: Tensor,
    objective: Objective,
    statistics: Statistics,
    upstream: Tensor,
    out: Sequence[Tensor] | Tensor,
) -> None:
    """Writes upstream * gradient of the summed loss into `out`, 0 at padding.

    Args:
        logits: K tensors (N, V) or one (K, N, V).
        target: (N,) token ids.
        objective: what the loss is.
        statistics: of these logits.
        upstream: scalar tensor on their device; multiplies before the gradient is rounded to the type of `out`.
        out: like logits, made of rows; may be the logits themselves.
    """
    rows, to = _rows(logits), _rows(out)
    if any(a.data_ptr() != b.data_ptr() for a, b in zip(to.passes, out)):
        raise ValueError("the gradient needs memory made of rows: the last dimension of out must have stride 1")
    first = rows.passes[0]
    tokens, vocabulary = first.shape
    eps_i = objective.smoothing_per_type(vocabulary)
    with torch.cuda.device_of(first):
        _gradient_kernel[(tokens,)](
            first, *rows.offsets, rows.row_stride, target.contiguous(), objective.ignore_index, tokens,
            statistics.maximum, statistics.log_normaliser, statistics.inner,
            to.passes[0], *to.offsets, to.row_stride, upstream,
            float(objective.divergence_weight), 1.0 - objective.label_smoothing - eps_i, eps_i,
            ALIGNED=rows.aligned, TO_ALIGNED=to.aligned,
            **_options(len(rows.passes), vocabulary, first.dtype, objective),
        )  # fmt: skip


def loss_and_gradient_(block: Tensor, target: Tensor, objective: Objective, scale: float) -> TokenLosses:
    """Overwrites logits (K, n, V) with scale * gradient of their summed loss and returns what that is made of."""
    found = statistics(block, target, objective)
    upstream = block.new_full((), scale, dtype=found.inner.dtype)  # filled on the device: nothing waits
    write_gradient(block, target, objective, found, upstream, out=block)
    return found.losses


def try_out(device: torch.device) -> None:
    """Compiles and runs both kernels on one token; raises whatever keeps them from it."""
    block = torch.zeros((2, 1, 4), device=device)
    target = torch.zeros(1, dtype=torch.long, device=device)
    loss_and_gradient_(block, target, Objective("x", 1.0, 0.0, ignore_index=-1), 1.0)
    torch.cuda.synchronize(device)  # an error of a kernel shows only now


class _TritonLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, target, objective, overwrite_logits, *given):
        logits = given[0] if given[0].dim() == 3 else given
        found = statistics(logits, target, objective)
        ctx.save_for_backward(target, *found[1:], *given)
        ctx.settings = objective, overwrite_logits
        sums = (per_token.sum() for per_token in found.losses)
        result = weighted(objective, logits[0].size(-1), *sums)
        ctx.mark_non_differentiable(*result[1:])
        return tuple(result)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream, *_unused):
        target, maximum, log_normaliser, inner, *given = ctx.saved_tensors
        objective, overwrite_logits = ctx.settings
        logits = given[0] if given[0].dim() == 3 else given
        if overwrite_logits and _has_own_memory(logits):
            gradients = [z.detach() for z in given]
        else:
            gradients = [torch.empty_like(z, memory_format=torch.contiguous_format) for z in given]
        out = gradients[0] if gradients[0].dim() == 3 else gradients
        found = Statistics(None, maximum, log_normaliser, inner)
        write_gradient(logits, target, objective, found, upstream, out)
        if gradients[0].data_ptr() == given[0].data_ptr():
            # Autograd cannot see what a kernel writes: a second backward over these logits must raise, not be wrong.
            torch.autograd.graph.increment_version(given)
        return (None, None, None, *gradients)


def triton_loss(
    logits: Sequence[Tensor] | Tensor, target: Tensor, objective: Objective, overwrite_logits: bool = False
) -> ConsistencyLoss:
    """The loss of K passes; see backends.py for the arguments."""
    given = (logits,) if torch.is_tensor(logits) else tuple(logits)
    return ConsistencyLoss(*_TritonLoss.apply(target, objective, overwrite_logits, *given))
