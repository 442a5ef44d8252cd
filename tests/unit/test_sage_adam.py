"""SageAdam: steps worked out by hand, its two traps, flat buffers, state, wrong settings."""

import math
from types import SimpleNamespace

import pytest
import torch
from fairseq import optim
from fairseq.optim.adam import Adam
from fairseq.optim.fp16_optimizer import FP16Optimizer, MemoryEfficientFP16Optimizer
from omegaconf import OmegaConf

import intra_distillation_fairseq  # noqa: F401
from intra_distillation_fairseq.errors import UserError
from intra_distillation_fairseq.optim.sage_adam import SageAdam, SageAdamConfig

SETTINGS = {"lr": 0.01, "betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.1}


def steps(optimizer, parameters, gradients):
    """One step for each list of gradients, a gradient for each parameter."""
    for now in gradients:
        for parameter, gradient in zip(parameters, now):
            parameter.grad = gradient.clone().to(parameter.dtype)
        optimizer.step()


def random_gradients(parameters, count, seed=0, scale=1e-4):
    generator = torch.Generator().manual_seed(seed)
    return [[scale * torch.randn(p.shape, generator=generator) for p in parameters] for _ in range(count)]


def fresh(dtype=torch.float32, seed=1):
    """Three parameters, one of them all zeros, as biases are before the first update."""
    generator = torch.Generator().manual_seed(seed)
    values = [0.05 * torch.randn(4, 3, generator=generator), torch.zeros(5), torch.ones(2)]
    return [torch.nn.Parameter(value.to(dtype)) for value in values]


def test_three_steps_by_hand():
    """The formula in plain Python numbers: Adam's part, then the ratio, for gradients 1, -2, 0.5 at theta = 0.5."""
    lr, b1, b2, adam_eps, wd, b0, eps = 0.01, 0.9, 0.98, 1e-6, 0.1, 0.75, 1e-12
    theta = torch.nn.Parameter(torch.tensor([0.5], dtype=torch.float64))
    optimizer = SageAdam([theta], lr, (b1, b2), adam_eps, wd, b0, eps)

    # step 1: m = 0.1, v = 0.02, both corrected 1; one sensitivity only: the ratio is 1, the step Adam's
    steps(optimizer, [theta], [[torch.tensor([1.0])]])
    t1 = 0.5 * (1 - lr * wd) - lr * (math.sqrt(1 - b2) / (1 - b1)) * 0.1 / (math.sqrt(0.02) + adam_eps)
    assert theta.item() == pytest.approx(t1, rel=1e-14)
    assert t1 == pytest.approx(0.5 - 0.0005 - 0.01, abs=1e-6)

    # step 2: m = 0.09 - 0.2 = -0.11, v = 0.0196 + 0.08 = 0.0996; I1 = 0.5, I2 = 2 t1, S = 0.25 (0.75 I1 + I2)
    steps(optimizer, [theta], [[torch.tensor([-2.0])]])
    i1, i2 = 0.5, 2 * t1
    corrected = 0.25 * (0.75 * i1 + i2) / (1 - 0.75**2)
    ratio = (abs(i2 - corrected) + eps) / (corrected + eps)
    assert ratio == pytest.approx(0.26, abs=0.01)
    t2 = t1 * (1 - lr * wd) - lr * ratio * (math.sqrt(1 - b2**2) / (1 - b1**2)) * -0.11 / (math.sqrt(0.0996) + adam_eps)
    assert theta.item() == pytest.approx(t2, rel=1e-14)

    # step 3: m = -0.099 + 0.05 = -0.049, v = 0.097608 + 0.005 = 0.102608; I3 = 0.5 t2
    steps(optimizer, [theta], [[torch.tensor([0.5])]])
    i3 = 0.5 * t2
    corrected = 0.25 * (0.75**2 * i1 + 0.75 * i2 + i3) / (1 - 0.75**3)
    ratio = (abs(i3 - corrected) + eps) / (corrected + eps)
    assert ratio == pytest.approx(0.55, abs=0.01)
    t3 = t2 * (1 - lr * wd) - lr * ratio * (math.sqrt(1 - b2**3) / (1 - b1**3)) * -0.049 / (
        math.sqrt(0.102608) + adam_eps
    )
    assert theta.item() == pytest.approx(t3, rel=1e-14)


def test_with_a_ratio_of_one_it_is_fairseqs_adam_bit_for_bit():
    """An eps far above the sensitivities makes every ratio exactly 1: what remains must be Adam with its weight decay."""
    ours, theirs = fresh(), fresh()
    gradients = random_gradients(ours, 5)
    steps(SageAdam(ours, **SETTINGS, sage_eps=1e30), ours, gradients)
    steps(Adam(theirs, **SETTINGS), theirs, gradients)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs))
    usual = fresh()
    steps(SageAdam(usual, **SETTINGS), usual, gradients)
    assert not torch.equal(usual[0], theirs[0])


def test_the_first_step_moves_and_is_adams():
    ours, theirs = fresh(), fresh()
    gradients = random_gradients(ours, 1)
    steps(SageAdam(ours, **SETTINGS), ours, gradients)
    steps(Adam(theirs, **SETTINGS), theirs, gradients)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs))
    assert all((a != b).all() for a, b in zip(ours, fresh()))


def test_a_parameter_that_is_zero_after_the_first_step_moves_like_adams():
    """Its sensitivity is 0: the authors' code would multiply its step by 0."""
    ours, theirs = ([torch.nn.Parameter(torch.ones(3))] for _ in range(2))
    optimizers = SageAdam(ours, lr=0.01), Adam(theirs, lr=0.01)
    for parameters, optimizer in zip((ours, theirs), optimizers):
        steps(optimizer, parameters, [[torch.zeros(3)]])  # the first step, whose ratio is 1 for all, goes nowhere
        with torch.no_grad():
            parameters[0].zero_()
        steps(optimizer, parameters, [[torch.tensor([1e-5, -1.0, 1e-9])]])
    assert torch.equal(ours[0], theirs[0])
    assert (ours[0] != 0).all()


def test_default_eps_is_far_below_the_sensitivities_of_gradients_per_token():
    """With |theta g| from 1e-9 on the ratio is that of the formula without eps; with an eps of 1e-6 it would be 1."""

    def moved(sage_eps, size):
        parameter = [torch.nn.Parameter(torch.full((1,), 0.01, dtype=torch.float64))]
        optimizer = SageAdam(parameter, lr=1e-9, eps=1e-30, sage_eps=sage_eps)
        gradients = [[torch.tensor([size * g], dtype=torch.float64)] for g in (1.0, 1.1)]
        steps(optimizer, parameter, gradients[:1])
        before = parameter[0].item()
        steps(optimizer, parameter, gradients[1:])
        return before - parameter[0].item()

    default = SageAdam([torch.zeros(1)]).defaults["sage_eps"]
    for size in (1e-7, 1e-4):
        adam = moved(1e30, size)
        # I2 = 1.1 I1: |I2 - Ih| / Ih = 0.75 * 0.1 / (0.75 + 1.1)
        assert moved(default, size) / adam == pytest.approx(0.075 / 1.85, rel=0.05)
        assert moved(1e-6, size) / adam > 0.4


def test_the_ratio_does_not_depend_on_the_scale_of_the_gradient():
    """A loss 2^10 times as large: the same steps, once neither eps matters (powers of two keep every bit)."""
    ours, scaled = fresh(torch.float64), fresh(torch.float64)
    gradients = random_gradients(ours, 6)
    settings = {"lr": 0.01, "eps": 1e-30, "sage_eps": 1e-30}
    steps(SageAdam(ours, **settings), ours, gradients)
    steps(SageAdam(scaled, **settings), scaled, [[1024 * g for g in now] for now in gradients])
    for a, b in zip(ours, scaled):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


def test_the_ratio_stays_within_its_bounds():
    """At most beta0 / (1 - beta0), reached when a sensitivity appears from nothing; here 3 times Adam's step."""
    sizes = [1e-12] * 30 + [1.0]
    moves = []
    for sage_eps in (1e-30, 1e30):
        parameter = [torch.nn.Parameter(torch.ones(1, dtype=torch.float64))]
        optimizer = SageAdam(parameter, lr=1e-12, betas=(0.0, 0.0), eps=1e-30, sage_eps=sage_eps)
        steps(optimizer, parameter, [[torch.tensor([s], dtype=torch.float64)] for s in sizes[:-1]])
        before = parameter[0].item()
        steps(optimizer, parameter, [[torch.tensor([sizes[-1]], dtype=torch.float64)]])
        moves.append(before - parameter[0].item())
    assert moves[0] / moves[1] == pytest.approx(0.75 / 0.25, rel=1e-3)


def test_a_flat_buffer_gives_what_separate_tensors_give():
    apart = fresh()
    flat = [torch.nn.Parameter(torch.cat([p.detach().flatten() for p in apart]))]
    gradients = random_gradients(apart, 7)
    steps(SageAdam(apart, **SETTINGS), apart, gradients)
    steps(SageAdam(flat, **SETTINGS), flat, [[torch.cat([g.flatten() for g in now])] for now in gradients])
    assert torch.equal(flat[0], torch.cat([p.detach().flatten() for p in apart]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_resumed_equals_uninterrupted_bit_for_bit(dtype, tmp_path):
    expected, stopped = fresh(dtype), fresh(dtype)
    gradients = random_gradients(expected, 8, scale=1e-2)
    steps(SageAdam(expected, **SETTINGS), expected, gradients)
    assert all((a != b).any() for a, b in zip(expected, fresh(dtype)))

    first = SageAdam(stopped, **SETTINGS)
    steps(first, stopped, gradients[:3])
    torch.save({"optimizer": first.state_dict(), "model": stopped}, tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    second = SageAdam(loaded["model"], lr=1.0)
    second.load_state_dict(loaded["optimizer"])
    steps(second, loaded["model"], gradients[3:])
    assert all(torch.equal(a, b) for a, b in zip(expected, loaded["model"]))
    averages = {"exp_avg", "exp_avg_sq", "exp_avg_sensitivity"}
    for parameter in loaded["model"]:
        state = second.state[parameter]
        assert set(state) == averages | {"step"}
        assert {state[name].dtype for name in averages} == {torch.float64 if dtype == torch.float64 else torch.float32}
        assert state["step"] == 8


def test_closure_and_parameters_without_a_gradient():
    parameter, idle = torch.nn.Parameter(torch.tensor([2.0])), torch.nn.Parameter(torch.ones(1))
    optimizer = SageAdam([parameter, idle], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = parameter.pow(2).sum()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(3)]
    assert losses[0] == 4
    assert losses[2] < losses[1] < losses[0]
    assert idle.item() == 1
    assert idle not in optimizer.state


def test_sparse_gradients_are_refused():
    embedding = torch.nn.Embedding(5, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(UserError, match="^a gradient is sparse: sage_adam needs dense ones"):
        SageAdam(embedding.parameters()).step()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"betas": (0.9, 1.0)}, "--adam-betas is '(0.9, 1.0)': allowed are two numbers of at least 0 and below 1"),
        ({"betas": (0.9,)}, "--adam-betas is '(0.9,)': allowed are two numbers of at least 0 and below 1"),
        ({"betas": (-0.1, 0.9)}, "--adam-betas is '(-0.1, 0.9)': allowed are two numbers"),
        ({"sage_beta": 1.0}, "--sage-beta is '1.0': allowed is a number above 0 and below 1"),
        ({"sage_beta": 0.0}, "--sage-beta is '0.0': allowed is a number above 0 and below 1"),
        ({"sage_beta": float("nan")}, "--sage-beta is 'nan': allowed is a number above 0 and below 1"),
        ({"sage_eps": -1e-6}, "--sage-eps is '-1e-06': allowed is a number of at least 1e-30"),
        ({"sage_eps": 0.0}, "--sage-eps is '0.0': allowed is a number of at least 1e-30"),
        ({"eps": 0.0}, "--adam-eps is '0.0': allowed is a number of at least 1e-30"),
        ({"weight_decay": -0.1}, "--weight-decay is '-0.1': allowed is a number of at least 0"),
    ],
)
def test_wrong_settings_are_named_in_one_line(settings, message):
    with pytest.raises(UserError) as error:
        SageAdam([torch.zeros(1)], **settings)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def built(**settings):
    """The optimiser as fairseq builds it, from its configuration."""
    defaults = {"_name": "sage_adam", "lr": [0.01], "adam_betas": "(0.9, 0.98)", "adam_eps": 1e-6, "weight_decay": 0.1}
    return OmegaConf.merge(OmegaConf.structured(SageAdamConfig()), {**defaults, **settings})


@pytest.mark.parametrize("betas", ["(0.9, 0.98)", (0.9, 0.98), [0.9, 0.98]])
def test_settings_reach_the_optimiser(betas):
    optimizer = optim.build_optimizer(built(adam_betas=betas, sage_beta=0.8, sage_eps=1e-9), fresh())
    expected = {**SETTINGS, "sage_beta": 0.8, "sage_eps": 1e-9}
    assert optimizer.optimizer_config == expected
    assert {name: optimizer.param_groups[0][name] for name in expected} == expected
    assert optimizer.supports_flat_params
    assert optimizer.supports_memory_efficient_fp16
    assert not optimizer.supports_step_with_scale  # fairseq divides by loss scale and tokens itself, before the step


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"adam_betas": "0.9"}, "error: --adam-betas is '0.9': allowed are two numbers"),
        ({"adam_betas": "(0.9, x)"}, "error: --adam-betas is '(0.9, x)': allowed are two numbers"),
        ({"sage_beta": 2.0}, "error: --sage-beta is '2.0': allowed is a number above 0 and below 1"),
    ],
)
def test_wrong_flags_end_fairseq_with_one_line(settings, message):
    with pytest.raises(SystemExit) as error:
        optim.build_optimizer(built(**settings), fresh())
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def fairseqs_settings(**common):
    return SimpleNamespace(
        optimizer=built(),
        common=SimpleNamespace(
            fp16_init_scale=128, fp16_scale_window=None, fp16_scale_tolerance=0.0, threshold_loss_scale=None,
            min_loss_scale=1e-4, model_parallel_size=1, **common,
        ),
        optimization=SimpleNamespace(update_freq=[1]),
        distributed_training=SimpleNamespace(distributed_world_size=1),
    )  # fmt: skip


def test_fairseqs_flat_float32_master_under_fp16(monkeypatch):
    """`--fp16`: one float32 buffer of all parameters, gradients divided by loss scale and tokens before the step."""
    # fairseq looks the buffer up by the index of a CUDA device; None is the index of the CPU.
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    halves, tokens = fresh(torch.float16), 50
    masters = [torch.nn.Parameter(p.detach().float()) for p in halves]
    optimizer = FP16Optimizer.build_optimizer(fairseqs_settings(), halves)
    assert optimizer.has_flat_params
    assert [p.numel() for p in optimizer.fp32_optimizer.params] == [sum(p.numel() for p in halves)]
    plain = SageAdam(masters, **SETTINGS)
    for gradients in random_gradients(halves, 5, scale=1e-2):
        optimizer.zero_grad()
        optimizer.backward(sum((p.float() * tokens * g).sum() for p, g in zip(halves, gradients)))
        optimizer.multiply_grads(1 / tokens)
        optimizer.clip_grad_norm(0.0)
        optimizer.step()
        in_halves = [(128 * tokens * g).half().float() / 128 / tokens for g in gradients]
        steps(plain, masters, [in_halves])
    for half, master in zip(halves, masters):
        torch.testing.assert_close(half, master.half(), rtol=1e-3, atol=1e-6)
    (flat,) = optimizer.fp32_params.values()
    torch.testing.assert_close(flat, torch.cat([m.detach().flatten() for m in masters]), rtol=1e-4, atol=1e-7)


def test_memory_efficient_fp16_keeps_its_averages_in_float32_when_resumed():
    parameters = fresh(torch.float16)
    optimizer = MemoryEfficientFP16Optimizer.build_optimizer(fairseqs_settings(), parameters)
    steps(optimizer, parameters, random_gradients(parameters, 2, scale=1e-2))
    again = MemoryEfficientFP16Optimizer.build_optimizer(fairseqs_settings(), parameters)
    again.load_state_dict(optimizer.state_dict())
    for parameter in parameters:
        assert again.optimizer.state[parameter]["exp_avg_sensitivity"].dtype == torch.float32
        for name, value in optimizer.optimizer.state[parameter].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(again.optimizer.state[parameter][name]))
