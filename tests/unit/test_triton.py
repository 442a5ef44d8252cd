"""The Triton back end without a GPU: in Triton's interpreter, which runs the kernels on the CPU, and compiled only.

Triton decides when it is first imported whether its functions are interpreted. The tests that need this are run in a
process of their own, by test_in_the_interpreter; alone: TRITON_INTERPRET=1 pytest tests/unit/test_triton.py.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from intra_distillation_fairseq.errors import UserError
from intra_distillation_fairseq.losses.backends import BACKENDS
from intra_distillation_fairseq.losses.closed_form import CLOSED_FORMS
from intra_distillation_fairseq.losses.objective import Objective

triton = pytest.importorskip("triton", reason="needs the package triton")

from intra_distillation_fairseq.losses import triton_kernels  # noqa: E402
from intra_distillation_fairseq.losses.triton_kernels import triton_loss  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="run by test_in_the_interpreter")
compiled = pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET is set")

PAD = 1
reference = BACKENDS["reference"].from_logits


def objective(divergence="x", weight=5.0, smoothing=0.1, ignore_index=PAD):
    return Objective(divergence, weight, smoothing, ignore_index)


def random_logits(k, n, v, dtype=torch.float64, scale=2.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(k, n, v, generator=generator, dtype=torch.float64) * scale).to(dtype)


def random_target(n, v, seed=0):
    """n token ids, the second of them padding."""
    target = torch.randint(2, v, (n,), generator=torch.Generator().manual_seed(seed))
    target[1:2] = PAD
    return target


def with_gradient(loss, logits, target, objective, upstream=1.0, **options):
    """The four numbers of the loss and upstream times its gradient."""
    leaf = logits.detach().clone().requires_grad_()
    result = loss(leaf, target, objective, **options)
    (gradient,) = torch.autograd.grad(result.loss * upstream, leaf)
    return *(value.detach() for value in result), gradient


@compiled
def test_in_the_interpreter():
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        env={**environment, "TRITON_INTERPRET": "1"},
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-10000:] + done.stderr[-2000:]


@interpreted
@pytest.mark.parametrize("divergence", CLOSED_FORMS)
@pytest.mark.parametrize(
    ("k", "n", "v"),  # a block has 1024, 512, 512 and 128 columns in float64 for K = 2, 3, 4 and 5 to 8
    [
        (2, 3, 5),
        (2, 1, 1024),
        (3, 4, 1203),
        (3, 2, 513),
        (4, 2, 512),
        (5, 2, 300),
        (6, 2, 11),
        (7, 2, 128),
        (8, 3, 257),
    ],
)
def test_equal_to_the_reference(k, n, v, divergence):
    logits, target = random_logits(k, n, v), random_target(n, v)
    for a, b in zip(*(with_gradient(f, logits, target, objective(divergence), -0.3) for f in (triton_loss, reference))):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


@interpreted
@pytest.mark.parametrize("divergence", CLOSED_FORMS)
def test_gradcheck(divergence):
    logits, target = random_logits(3, 2, 4).requires_grad_(), torch.tensor([3, PAD])
    assert torch.autograd.gradcheck(lambda z: 1.7 * triton_loss(z, target, objective(divergence)).loss, (logits,))


@interpreted
@pytest.mark.parametrize("divergence", CLOSED_FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_within_twice_that_of_plain_pytorch(dtype, divergence):
    logits, target = random_logits(3, 8, 1201, dtype, seed=2), random_target(8, 1201)
    exact = with_gradient(reference, logits.double(), target, objective(divergence))
    plain = with_gradient(reference, logits, target, objective(divergence))
    found = with_gradient(triton_loss, logits, target, objective(divergence))
    for e, p, f in zip(exact[:4], plain[:4], found[:4]):
        assert f.dtype == torch.float32
        # One unit in the last place of the sum, which plain PyTorch may hit by chance.
        assert abs(f.double() - e) <= 2 * abs(p.double() - e) + 1.2e-7 * abs(e)
    gradients = [x[4].double() for x in (exact, plain, found)]
    assert found[4].dtype == dtype
    errors = [(g - gradients[0]).pow(2).mean().sqrt() for g in gradients[1:]]
    # The interpreter cuts float32 off where bfloat16 should be rounded: twice the error, by itself.
    assert errors[1] <= (2.1 if dtype == torch.bfloat16 else 1.25) * errors[0]
    # Element by element: one unit in the last place of the type, or a subnormal step, and the error of float32.
    allowed = torch.finfo(dtype).eps * gradients[0].abs() + torch.finfo(dtype).smallest_normal + 1e-6
    assert ((gradients[2] - gradients[0]).abs() <= allowed).all()


@interpreted
@pytest.mark.parametrize("shift", [0.0, 3.0])
@pytest.mark.parametrize(("noise", "about"), [(1e-2, 2.7e-4), (1e-3, 2.7e-6), (1e-4, 2.7e-8)])
def test_a_tiny_divergence_does_not_cancel(noise, about, shift):
    """Neither where the passes agree nor where they differ by a constant, which the divergence does not see."""
    base = random_logits(1, 1, 12001, scale=3.0)
    constant = shift * torch.arange(3.0, dtype=torch.float64)[:, None, None]
    logits = (base + noise * random_logits(3, 1, 12001, seed=7) + constant).float()
    target = torch.tensor([5])
    exact = reference(logits.double(), target, objective()).divergence_sum.item()
    assert exact == pytest.approx(about, rel=0.3)
    assert triton_loss(logits, target, objective()).divergence_sum.item() == pytest.approx(exact, rel=1e-3)


@interpreted
@pytest.mark.parametrize("divergence", CLOSED_FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("gap", [50.0, 100.0, 105.0, 200.0, 1000.0])
def test_finite_at_a_large_gap_of_logits(gap, dtype, divergence):
    logits = torch.zeros(3, 2, 5, dtype=dtype)
    logits[0, :, 0] = gap
    logits[1, :, 1] = gap
    logits[2, :, 2] = -gap
    target = torch.tensor([3, 4])
    *values, gradient = with_gradient(triton_loss, logits, target, objective(divergence))
    *expected, expected_gradient = with_gradient(reference, logits.double(), target, objective(divergence))
    assert [v.item() for v in values] == pytest.approx([v.item() for v in expected], rel=1e-6)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-3, atol=1e-4)


@interpreted
@pytest.mark.parametrize("divergence", CLOSED_FORMS)
@pytest.mark.parametrize("n", [0, 1, 5])
def test_only_padding_gives_zero(n, divergence):
    """Padding is not even read: NaN there changes nothing."""
    logits = torch.full((3, n, 7), float("nan"))
    *values, gradient = with_gradient(triton_loss, logits, torch.full((n,), PAD), objective(divergence))
    assert [value.item() for value in values] == [0, 0, 0, 0]
    assert gradient.shape == logits.shape and (gradient == 0).all()


@interpreted
@pytest.mark.parametrize("divergence", CLOSED_FORMS)
def test_padding_outside_the_vocabulary(divergence):
    logits, target = random_logits(3, 3, 11), torch.tensor([4, -100, 7])
    found = with_gradient(triton_loss, logits, target, objective(divergence, ignore_index=-100))
    expected = with_gradient(reference, logits, target.where(target >= 0, PAD), objective(divergence))
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


@interpreted
@pytest.mark.parametrize("divergence", CLOSED_FORMS)
@pytest.mark.parametrize("wrong", ["nan", "inf", "target -1", "target 11"])
def test_what_is_wrong_becomes_nan(wrong, divergence):
    """In the loss and in the gradient of its token, so that a check of either sees it."""
    logits, target = random_logits(3, 3, 11), torch.tensor([4, 5, 7])
    if wrong.startswith("target"):
        target[1] = int(wrong.split()[1])
    else:
        logits[2, 1, 3] = float(wrong)
    loss, *_, gradient = with_gradient(triton_loss, logits, target, objective(divergence))
    assert loss.isnan()
    assert gradient[:, 1].isnan().any() and gradient[:, [0, 2]].isfinite().all()


@interpreted
@pytest.mark.parametrize("how", ["apart", "rows of a wider tensor", "interleaved", "transposed", "one and the same"])
def test_where_the_passes_lie(how):
    """K tensors or one, views with distant or interleaved rows; overwritten only where each pass has its own memory."""
    k, n, v = 3, 4, 13
    if how == "apart":
        owner = [z.clone() for z in random_logits(k, n, v)]
        views = list
    elif how == "rows of a wider tensor":
        owner, views = [random_logits(k, n, v + 5)], lambda o: [o[0][:, :, 2 : v + 2]]
    elif how == "interleaved":
        owner, views = [random_logits(n, k, v)], lambda o: list(o[0].unbind(1))
    elif how == "transposed":
        owner, views = [random_logits(n, v, k)], lambda o: [o[0].permute(2, 0, 1)]
    else:
        owner, views = [random_logits(1, n, v)[0]], lambda o: [o[0]] * k
    target = random_target(n, v)
    gradients = []
    for loss, options in ((reference, {}), (triton_loss, {}), (triton_loss, {"overwrite_logits": True})):
        leaves = [z.detach().clone().requires_grad_() for z in owner]
        given = views([z * 1.0 for z in leaves])  # not the leaves: these may not be overwritten
        before = [z.detach().clone() for z in given]
        result = loss(given if len(given) > 1 else given[0], target, objective(), **options)
        gradients.append(torch.autograd.grad(result.loss, leaves))
        changed = any(not torch.equal(a, b) for a, b in zip(given, before))
        assert changed == (bool(options) and how in ("apart", "rows of a wider tensor"))
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-11, atol=1e-13)


@interpreted
def test_a_second_backward_over_overwritten_logits_raises():
    logits, target = random_logits(3, 4, 11).requires_grad_(), random_target(4, 11)
    kept = logits * 1.0
    loss = triton_loss(kept, target, objective()).loss
    first, again = (torch.autograd.grad(loss, logits, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, again) and torch.equal(kept, logits)

    overwritten = logits * 1.0
    loss = triton_loss(overwritten, target, objective(), overwrite_logits=True).loss
    (gradient,) = torch.autograd.grad(loss, overwritten, retain_graph=True)
    assert gradient.data_ptr() == overwritten.data_ptr()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, overwritten)


@interpreted
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("divergence", CLOSED_FORMS)
def test_scales_before_it_rounds_to_float16(divergence, overwrite):
    """A gradient below float16's range survives if the upstream gradient (fairseq's loss scale) lifts it into it."""
    logits = random_logits(3, 3, 2001, torch.float16)
    target = torch.tensor([5, 6, 7])
    *_, exact = with_gradient(reference, logits.double(), target, objective(divergence), 1e-8 * 2.0**24)
    leaf = logits.clone().requires_grad_()
    loss = triton_loss(leaf * 1.0, target, objective(divergence), overwrite_logits=overwrite).loss
    (loss * 1e-8 * 2.0**24).backward()
    torch.testing.assert_close(leaf.grad.double(), exact, rtol=1e-3, atol=1e-7)
    assert (exact / 2.0**24).abs().max() < 2**-25 < leaf.grad.abs().max()  # half of float16's smallest number


@interpreted
@pytest.mark.parametrize("divergence", CLOSED_FORMS)
def test_loss_and_gradient_of_a_block(divergence):
    logits, target = random_logits(3, 5, 11), random_target(5, 11)
    block = logits.clone()
    losses = triton_kernels.loss_and_gradient_(block, target, objective(divergence), 256.0)
    *values, gradient = with_gradient(reference, logits, target, objective(divergence), 256.0)
    torch.testing.assert_close(block, gradient, rtol=1e-11, atol=1e-13)
    assert [losses.nll.sum().item(), losses.divergence.sum().item()] == pytest.approx([v.item() for v in values[2:]])
    assert [value[1].item() for value in losses] == [0, 0, 0]


@interpreted
@pytest.mark.parametrize("divergence", CLOSED_FORMS)
def test_rows_beyond_2_to_the_31_elements(divergence):
    """Three rows 2**30 elements apart; the pages between them are never touched, so that no memory is used."""
    k, n, v, distance = 2, 3, 9, 2**30
    memory = torch.empty(2 * distance + 2 * v, dtype=torch.bfloat16)
    wide = [memory.as_strided((n, v), (distance, 1), i * v) for i in range(k)]
    logits, target = random_logits(k, n, v, torch.bfloat16), torch.tensor([3, 4, 8])
    for view, z in zip(wide, logits):
        view.copy_(z)
    found = triton_kernels.statistics(wide, target, objective(divergence))
    triton_kernels.write_gradient(wide, target, objective(divergence), found, torch.tensor(1.0), out=wide)
    losses = triton_kernels.loss_and_gradient_(logits, target, objective(divergence), 1.0)
    assert torch.equal(torch.stack(wide), logits)
    assert all(torch.equal(a, b) for a, b in zip(found.losses, losses))


@interpreted
def test_unfit_input_is_named():
    target = torch.tensor([2, 3])
    for k in (1, 9):
        with pytest.raises(UserError, match=f"takes 2 to 8 passes, given {k}: use --id-loss-backend chunked"):
            triton_loss(random_logits(k, 2, 5), target, objective())
    with pytest.raises(UserError, match=r"out of torch.float32, .* given torch.int64$"):
        triton_loss(torch.zeros(3, 2, 5, dtype=torch.int64), target, objective())
    with pytest.raises(UserError, match=r"one type .* given torch.float32, torch.float64$"):
        triton_loss([torch.zeros(2, 5), torch.zeros(2, 5).double()], target, objective())
    with pytest.raises(UserError, match=r"given \(2, 5\), \(2, 5\), \(2, 5\) and \(3,\)$"):
        triton_loss(torch.zeros(3, 2, 5), torch.tensor([2, 3, 4]), objective())
    logits = random_logits(3, 2, 5)
    found = triton_kernels.statistics(logits, target, objective())
    with pytest.raises(ValueError, match="the last dimension of out must have stride 1"):
        triton_kernels.write_gradient(
            logits, target, objective(), found, torch.tensor(1.0), torch.empty(5, 2, 3).mT.mT.permute(2, 1, 0)
        )


@compiled
def test_the_cpu_is_refused_without_the_interpreter():
    with pytest.raises(UserError, match="one CUDA device, given cpu: use --id-loss-backend chunked"):
        triton_loss(random_logits(3, 2, 5), torch.tensor([2, 3]), objective())


KERNELS = {"statistics": triton_kernels._statistics_kernel, "gradient": triton_kernels._gradient_kernel}
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def compile_for(arch, kernel, dtype, k, vocabulary, aligned, divergence):
    """The kernel compiled for a GPU that need not be there, as the launch would do it."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = triton_kernels._options(k, vocabulary, TYPES[dtype], objective(divergence))
    launch = {name: options.pop(name) for name in ("num_warps", "enable_fp_fusion")}
    constants = {**options, "ALIGNED": aligned, "TO_ALIGNED": aligned}
    pointers = {"logits": f"*{dtype}", "gradient": f"*{dtype}", "target": "*i64"}
    signature = {
        p.name: "constexpr" if p.is_constexpr else p.annotation_type or pointers.get(p.name, "*fp32")
        for p in kernel.params
    }
    constants = {name: value for name, value in constants.items() if name in signature}
    return triton.compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", arch, 32), options=launch)


@compiled
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("k", [3, 8])
@pytest.mark.parametrize("arch", [80, 90])
def test_compiles_without_spills(arch, k, dtype, kernel, tmp_path, monkeypatch):
    """For each architecture: odd rows of X on the one, aligned rows of JS on the other, so that all branches are seen."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    aligned, divergence = (False, "x") if (arch == 80) == (dtype != "fp16") else (True, "js")
    vocabulary = 12000 if aligned else 12001
    done = compile_for(arch, KERNELS[kernel], dtype, k, vocabulary, aligned, divergence)
    ptx, cubin = done.asm["ptx"], tmp_path / "kernel.cubin"
    cubin.write_bytes(done.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    usage = subprocess.run([tool, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL"))
    assert registers <= 200 and stack <= 64 and local == 0
    assert re.search(r"mul\.lo\.s64\s+%rd\d+, %rd\d+, %rd\d+;", ptx)  # token * row_stride
    assert ("ld.global.v4.b32" in ptx) == aligned  # 16 bytes at once
    if kernel == "gradient":
        assert ("st.global.v4.b32" in ptx) == aligned
        assert "cvt.rn.f32.f64" in ptx  # the weights arrive as float64, whatever Python's floats would become


@compiled
def test_what_changes_between_steps_compiles_nothing():
    """Triton's own key of a launch: equal for any weight, offset, number of tokens and address."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    memory = torch.zeros(64)
    assert memory.data_ptr() % 16 == 0
    for kernel in KERNELS.values():
        key = create_function_from_signature(kernel.signature, kernel.params, make_backend(GPUTarget("cuda", 90, 32)))
        keys = []
        for start, integer, weight in ((0, 16, 5.0), (1, 1, 0.0), (2, 2**40 + 1, 1.0)):
            arguments = [
                0 if p.is_constexpr else weight if p.annotation_type == "fp64" else integer if p.annotation_type
                else memory[start:]
                for p in kernel.params
            ]  # fmt: skip
            keys.append(str(key(*arguments)[1]))
        assert keys[0] == keys[1] == keys[2]


@interpreted
@pytest.mark.parametrize(("divergence", "from_features"), [("x", False), ("x", True), ("js", False)])
def test_fifty_updates_agree_with_the_reference_step_by_step(divergence, from_features):
    """With dropout, in float32, with a growing weight."""
    target = random_target(4, 37)

    def losses(backend, from_features):
        torch.manual_seed(0)
        embedding, projection = torch.nn.Embedding(37, 16), torch.nn.Linear(16, 37)
        parameters = [*embedding.parameters(), *projection.parameters()]
        optimizer = torch.optim.Adam(parameters, lr=0.02)
        curve = []
        for update in range(50):
            torch.manual_seed(update)
            features = [torch.dropout(embedding(target), 0.3, train=True) for _ in range(3)]
            wanted = objective(divergence, update / 10)
            if from_features:
                loss = (
                    BACKENDS[backend].from_features(features, projection.weight, projection.bias, target, wanted).loss
                )
            else:
                loss = BACKENDS[backend].from_logits([projection(f) for f in features], target, wanted, True).loss
            optimizer.zero_grad()
            (loss / 4).backward()
            optimizer.step()
            curve.append(loss.item())
        return curve

    expected = losses("reference", from_features=False)
    assert expected[-1] < 0.8 * max(expected)
    assert losses("triton", from_features) == pytest.approx(expected, rel=2e-4)
