"""The experts' layer against a loop over tokens, its loss by hand, and what the two architectures are made of."""

import argparse
import math

import pytest
import torch
from fairseq.data import Dictionary
from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_REGISTRY
from torch import nn

import intra_distillation_fairseq  # noqa: F401  registers the architectures
from intra_distillation_fairseq import passes
from intra_distillation_fairseq.models.switch_layer import (
    SwitchFeedForward,
    expert_capacity,
    recording,
    switch_layers,
)
from intra_distillation_fairseq.tasks.router_loss import RouterLossMixin, WithRouterLoss

T, B, D, F, E = 7, 5, 6, 10, 4


def layer(capacity_factor=1.25, weight=0.01, jitter=0.0, dropout=0.0, experts=E, seed=1) -> SwitchFeedForward:
    torch.manual_seed(seed)
    return SwitchFeedForward(D, F, experts, capacity_factor, weight, jitter, torch.relu, nn.Dropout(dropout)).double()


def batch(seed=2) -> tuple[torch.Tensor, torch.Tensor]:
    """x (T, B, D) and a padding mask (B, T): sentences padded on the left, on the right and not at all."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(T, B, D, generator=generator, dtype=torch.double)
    mask = torch.zeros(B, T, dtype=torch.bool)
    mask[0, :3] = True
    mask[2, 4:] = True
    return x, mask


def reference(module: SwitchFeedForward, x: torch.Tensor, mask: torch.Tensor, capacity: float):
    """Token by token: output, balance loss, real tokens and dropped ones."""
    y = [[torch.zeros(D, dtype=x.dtype) for _ in range(B)] for _ in range(T)]
    load, counts, probability, dropped = [0] * E, [0] * E, torch.zeros(E, dtype=x.dtype), 0
    for t in range(T):
        for b in range(B):
            if mask[b, t]:
                continue
            p = (module.router.weight @ x[t, b]).softmax(0)
            e = int(p.argmax())
            counts[e] += 1
            probability = probability + p
            if load[e] >= capacity:
                dropped += 1
                continue
            load[e] += 1
            hidden = torch.relu(x[t, b] @ module.w1[e] + module.b1[e])
            y[t][b] = p[e] * (hidden @ module.w2[e] + module.b2[e])
    n = sum(counts)
    balance = module.loss_weight * E * sum(c / n * p / n for c, p in zip(counts, probability))
    return torch.stack([torch.stack(row) for row in y]), balance, n, dropped


def run(module, x, mask=None):
    """Output and record of one training forward."""
    with recording([module]):
        module.padding_mask = mask
        y = module(x)
        (record,) = module.records
    return y, record


def gradients(module, x, y, balance) -> list[torch.Tensor]:
    weights = torch.sin(torch.arange(y.numel(), dtype=y.dtype)).view(y.shape)  # any upstream gradient
    return torch.autograd.grad((y * weights).sum() + 3 * balance, [x, *module.parameters()])


@pytest.mark.parametrize("capacity_factor", [0.3, 1.0, 1.25, 4.0, 9.0])
def test_training_equals_a_loop_over_tokens(capacity_factor):
    """Output, balance loss and all gradients, with padding; the smaller factors drop tokens, in order."""
    module, (x, mask) = layer(capacity_factor, weight=0.5), batch()
    x.requires_grad_()
    capacity = expert_capacity(int((~mask).sum()), capacity_factor, E)
    expected, balance, n, dropped = reference(module, x, mask, capacity)
    y, record = run(module, x, mask)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(record.balance_loss, balance)
    assert (int(record.tokens), int(record.dropped)) == (n, dropped)
    assert (dropped > 0) == (capacity_factor <= 1.25)
    for got, want in zip(gradients(module, x, y, record.balance_loss), gradients(module, x, expected, balance)):
        torch.testing.assert_close(got, want)


def test_evaluation_equals_a_loop_over_tokens_without_limit():
    module, (x, mask) = layer(0.3).eval(), batch()
    module.padding_mask = mask
    torch.testing.assert_close(module(x), reference(module, x, mask, math.inf)[0])
    assert module.padding_mask is None  # of one forward only


def test_the_first_tokens_find_room():
    """Capacity by hand: 3 of 6 tokens want expert 0, which takes ceil(1 * 6 / 3) = 2; padding takes no place."""
    module = layer(1.0, experts=3)
    x = torch.zeros(4, 2, D, dtype=torch.double)
    wanted = [[0, 1], [2, 0], [0, 0], [2, 2]]  # T x B; of the third row the first is padding, of the fourth the last
    mask = torch.zeros(2, 4, dtype=torch.bool)
    mask[0, 2] = mask[1, 3] = True
    with torch.no_grad():
        module.router.weight.zero_()
        for e in range(3):
            module.router.weight[e, e] = 1
    for t in range(4):
        for b in range(2):
            x[t, b, wanted[t][b]] = 1
    y, record = run(module, x, mask)
    assert y.ne(0).any(-1).tolist() == [[True, True], [True, True], [False, False], [True, False]]
    assert (int(record.tokens), int(record.dropped)) == (6, 1)


def test_padding_changes_nothing():
    """Neither what stands in it nor how much there is of it: the same real tokens, the same everything."""
    module, (x, mask) = layer(1.0), batch()
    y, record = run(module, x, mask)
    assert y[mask.t()].eq(0).all()
    other = torch.where(mask.t().unsqueeze(-1), 100 * torch.randn_like(x), x)
    more = torch.cat([other, torch.randn(3, B, D, dtype=torch.double)])
    y_more, record_more = run(module, more, torch.cat([mask, torch.ones(B, 3, dtype=torch.bool)], 1))
    torch.testing.assert_close(y_more[:T], y)
    for a, b in zip(record, record_more):
        torch.testing.assert_close(a, b)


def test_a_batch_of_padding_is_harmless():
    module, (x, _) = layer(), batch()
    for training in (True, False):
        module.train(training).padding_mask = torch.ones(B, T, dtype=torch.bool)
        assert module(x).eq(0).all()


def test_evaluation_does_not_depend_on_the_batch():
    module, (x, mask) = layer(0.3).eval(), batch()
    module.padding_mask = mask
    together = module(x)
    for b in range(B):
        alone = module(x[~mask[b], b : b + 1])
        torch.testing.assert_close(together[~mask[b], b : b + 1], alone)


def test_balance_loss_is_the_weight_at_perfect_balance():
    module = layer(weight=0.01, experts=4)
    with torch.no_grad():
        module.router.weight.zero_()
        module.router.weight[:4, :4] = torch.eye(4)
    x = torch.zeros(8, 1, D, dtype=torch.double)
    x[torch.arange(8), 0, torch.arange(8) % 4] = 2
    _, record = run(module, x)
    assert record.balance_loss.item() == pytest.approx(0.01)


def test_balance_loss_by_hand():
    """Two experts, three tokens with p = (3/4, 1/4), (3/4, 1/4), (1/4, 3/4): 2 (2/3 * 7/12 + 1/3 * 5/12) = 19/18."""
    module = layer(weight=1.0, experts=2)
    with torch.no_grad():
        module.router.weight.zero_()
        module.router.weight[0, 0] = math.log(3)
    x = torch.zeros(3, 1, D, dtype=torch.double)
    x[:, 0, 0] = torch.tensor([1.0, 1.0, -1.0])
    _, record = run(module, x)
    assert record.balance_loss.item() == pytest.approx(19 / 18)


def test_gradcheck():
    module = layer(0.8, weight=0.5)
    torch.manual_seed(3)
    x = torch.randn(3, 2, D, dtype=torch.double, requires_grad=True)
    mask = torch.tensor([[False, False, False], [False, False, True]])

    def function(x, *_parameters):
        y, record = run(module, x, mask)
        assert record.dropped > 0
        return y, record.balance_loss

    assert torch.autograd.gradcheck(function, (x, *module.parameters()))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16])
def test_router_works_in_float32(precision, training):
    module, (x, _) = layer().to(precision).train(training), batch()
    tokens = x.to(precision).view(-1, D)
    expected = (tokens.float() @ module.router.weight.float().t()).softmax(-1)
    assert module.route(tokens).dtype == torch.float32
    torch.testing.assert_close(module.route(tokens), expected)
    assert module(x.to(precision)).dtype == precision
    module = module.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(module.route(tokens), expected)
        assert module(x.float()).dtype == torch.bfloat16  # as a linear layer has it


def test_every_expert_gets_a_gradient():
    """Zeros where no token came: DistributedDataParallel waits for every parameter."""
    module = layer()
    module.padding_mask = torch.tensor([[False, True]])  # a single real token
    x = torch.randn(2, 1, D, dtype=torch.double)
    module(x).sum().backward()
    assert all(p.grad is not None for p in module.parameters())
    assert sorted(bool(g.ne(0).any()) for g in module.b2.grad) == [False, False, False, True]


def test_one_expert_is_a_dense_feed_forward():
    module, (x, _) = layer(1.0, experts=1), batch()
    dense = (x @ module.w1[0] + module.b1[0]).relu() @ module.w2[0] + module.b2[0]
    y, record = run(module, x)
    torch.testing.assert_close(y, dense)
    assert int(record.dropped) == 0


def test_each_expert_starts_as_a_linear_layer_does():
    torch.manual_seed(1)
    module = SwitchFeedForward(64, 256, 4, 1.25, 0.01, 0.0, torch.relu, nn.Identity())
    module.requires_grad_(False)
    for weight, bias, fan_in in ((module.w1, module.b1, 64), (module.w2, module.b2, 256)):
        for e in range(4):
            assert float(weight[e].abs().max()) == pytest.approx(fan_in**-0.5, rel=1e-3)
            assert float(weight[e].var()) == pytest.approx(1 / (3 * fan_in), rel=0.05)
        assert 0.9 * fan_in**-0.5 < float(bias.abs().max()) <= fan_in**-0.5


def test_jitter_moves_the_router_in_training_only():
    module, (x, _) = layer(jitter=0.3), batch()
    tokens = x.view(-1, D)
    plain = (tokens @ module.router.weight.t()).softmax(-1)
    assert not torch.allclose(module.route(tokens), plain)
    torch.testing.assert_close(module.eval().route(tokens), plain)
    module.train().jitter = 1e-9
    torch.testing.assert_close(module.route(tokens), plain)


def test_forwards_without_gradients_are_not_recorded():
    module, (x, _) = layer(), batch()
    with recording([module]):
        with torch.no_grad():
            module(x)
        assert module.records == []
        module(x)
        assert len(module.records) == 1
    assert module.records is None


# -- the models


def dictionary(types: int) -> Dictionary:
    result = Dictionary()
    for i in range(types - len(result)):
        result.add_symbol(str(i))
    return result


def build(arch: str, types: int, router_loss=True, **flags):
    args = argparse.Namespace(max_source_positions=512, max_target_positions=512, **flags)
    ARCH_CONFIG_REGISTRY[arch](args)
    words = dictionary(types)
    task = argparse.Namespace(source_dictionary=words, target_dictionary=words, adds_router_loss=router_loss)
    torch.manual_seed(1)
    return ARCH_MODEL_REGISTRY[arch].build_model(args, task)


TINY = {
    f"{side}_{name}": value
    for side in ("encoder", "decoder")
    for name, value in {"embed_dim": 8, "ffn_embed_dim": 12, "attention_heads": 2, "layers": 2}.items()
}


# fairseq's attention, in a model of float64.
SOFTMAX_IN_FLOAT32 = {"rtol": 1e-5, "atol": 1e-6}


def net_input(seed=4) -> dict[str, torch.Tensor]:
    """Three sentences; the source is padded on the left, the target on the right."""
    generator = torch.Generator().manual_seed(seed)
    source = torch.randint(4, 30, (3, 6), generator=generator)
    target = torch.randint(4, 30, (3, 5), generator=generator)
    source[0, :3] = source[2, :1] = target[1, 2:] = 1
    return {"src_tokens": source, "src_lengths": source.ne(1).sum(1), "prev_output_tokens": target}


@pytest.mark.parametrize(
    ("arch", "types", "parameters"),
    [("switch_transformer_small", 12_001, 87_805_440), ("switch_transformer_big", 32_001, 576_887_808)],
)
def test_parameter_count(arch, types, parameters):
    with torch.device("meta"):  # no memory for the 577M
        model = build(arch, types)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert len(switch_layers(model)) == 12


@pytest.mark.parametrize("pre_norm", [False, True])
def test_layers_get_their_padding(pre_norm):
    """Real tokens of the source in the encoder, of the target in the decoder."""
    flags = {"encoder_normalize_before": pre_norm, "decoder_normalize_before": pre_norm}
    model = build("switch_transformer_small", 30, **TINY, **flags)
    with recording(switch_layers(model)):
        model(**net_input())
        assert [[int(r.tokens) for r in m.records] for m in switch_layers(model)] == [[14]] * 2 + [[12]] * 2


@pytest.mark.parametrize("pre_norm", [False, True])
def test_one_expert_of_each_layer_is_fairseqs_transformer(pre_norm):
    """Everything around the experts is fairseq's: with one expert of the same parameters the logits are equal."""
    flags = {
        **TINY,
        "encoder_normalize_before": pre_norm,
        "decoder_normalize_before": pre_norm,
        "activation_fn": "gelu",
    }
    dense = build("transformer_small", 30, **flags).double().eval()
    switch = build("switch_transformer_small", 30, switch_experts=1, **flags).double().eval()
    state = dense.state_dict()
    for name in [name for name in state if ".fc1." in name or ".fc2." in name]:
        prefix, which, what = name.rsplit(".", 2)
        value = state.pop(name)
        new = f"{prefix}.fc1.{'w' if what == 'weight' else 'b'}{which[-1]}"
        state[new] = (value.t() if what == "weight" else value).unsqueeze(0)
    missing, unexpected = switch.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(name.endswith("router.weight") for name in missing)
    expected, got = dense(**net_input())[0], switch(**net_input())[0]
    real = net_input()["prev_output_tokens"].ne(1)
    torch.testing.assert_close(got[real], expected[real], **SOFTMAX_IN_FLOAT32)


def test_a_sentence_alone_gets_the_logits_it_gets_in_a_batch():
    model = build("switch_transformer_small", 30, switch_capacity_factor=0.5, **TINY).double().eval()
    inputs = net_input()
    together = model(**inputs)[0]
    for b in range(3):
        source, target = inputs["src_tokens"][b], inputs["prev_output_tokens"][b]
        source, target = source[source.ne(1)].unsqueeze(0), target[target.ne(1)].unsqueeze(0)
        alone = model(source, torch.tensor([source.size(1)]), target)[0]
        torch.testing.assert_close(together[b : b + 1, : target.size(1)], alone, **SOFTMAX_IN_FLOAT32)


def test_incremental_decoding_equals_the_whole_target_at_once():
    model = build("switch_transformer_small", 30, switch_capacity_factor=0.5, **TINY).double().eval()
    inputs = net_input()
    target = inputs["prev_output_tokens"][[0, 2]]
    encoder_out = model.encoder(inputs["src_tokens"][[0, 2]], inputs["src_lengths"][[0, 2]])
    whole = model.decoder(target, encoder_out)[0]
    state = {}
    for t in range(target.size(1)):
        step = model.decoder(target[:, : t + 1], encoder_out, incremental_state=state)[0]
        torch.testing.assert_close(step, whole[:, t : t + 1], **SOFTMAX_IN_FLOAT32)


def test_expert_dropout_defaults_to_activation_dropout():
    for flags, expected in (({}, 0.2), ({"switch_expert_dropout": 0.4}, 0.4), ({"switch_expert_dropout": 0.0}, 0.0)):
        model = build("switch_transformer_small", 30, activation_dropout=0.2, **TINY, **flags)
        assert [m.dropout_module.p for m in switch_layers(model)] == [expected] * 4


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"switch_experts": 0}, "error: --switch-experts is '0': allowed is at least 1"),
        ({"switch_capacity_factor": 0.0}, "error: --switch-capacity-factor is '0.0': allowed is a number above 0"),
        ({"switch_capacity_factor": math.inf}, "error: --switch-capacity-factor is 'inf': allowed is a number above 0"),
        ({"switch_loss_weight": -1.0}, "error: --switch-loss-weight is '-1.0': allowed is a number from 0"),
        ({"switch_loss_weight": math.nan}, "error: --switch-loss-weight is 'nan': allowed is a number from 0"),
        ({"switch_jitter": 1.0}, "error: --switch-jitter is '1.0': allowed is from 0 to below 1"),
        ({"switch_expert_dropout": 1.5}, "error: --switch-expert-dropout is '1.5': allowed is from 0 to below 1"),
        ({"checkpoint_activations": True}, "error: --checkpoint-activations (or --offload-activations) is set"),
        ({"offload_activations": True}, "error: --checkpoint-activations (or --offload-activations) is set"),
        ({"quant_noise_pq": 0.1}, "error: --quant-noise-pq is set"),
    ],
)
def test_wrong_flags_are_one_line(flags, message):
    with pytest.raises(SystemExit) as leaving:
        build("switch_transformer_small", 30, **TINY, **flags)
    assert str(leaving.value).startswith(message)
    assert "\n" not in str(leaving.value)


def test_training_under_a_task_without_the_loss_stops():
    model = build("switch_transformer_small", 30, router_loss=False, **TINY)
    with pytest.raises(SystemExit, match="error: --task is one that does not add the load-balancing loss"):
        model(**net_input())
    with torch.no_grad():
        model(**net_input())
    model.eval()(**net_input())  # translation needs no such task
    build("switch_transformer_small", 30, router_loss=False, switch_loss_weight=0.0, **TINY)(**net_input())


# -- the loss in training


class PassesCriterion(nn.Module):
    """Sum of the logits of K passes; no dropout, so the passes are equal."""

    def __init__(self, mode: str, num_passes: int):
        super().__init__()
        self.mode, self.num_passes = mode, num_passes

    def forward(self, model, sample):
        logits = passes.run(model, sample["net_input"], self.num_passes, self.mode)
        loss = sum((z * 0.1).sin().sum() for z in logits) / self.num_passes
        return loss, sample["ntokens"], {"loss": loss.data, "sample_size": sample["ntokens"]}


@pytest.mark.parametrize("num_passes", [1, 3])
@pytest.mark.parametrize("mode", list(passes.PASS_MODES))
def test_loss_is_the_mean_over_passes_times_sample_size(mode, num_passes):
    """In every pass mode K equal passes give one pass's gradient; capacity 4 keeps stacked and single batches alike."""
    flags = {"switch_capacity_factor": 4.0, "switch_loss_weight": 0.7, "dropout": 0.0, **TINY}
    model = build("switch_transformer_small", 30, **flags).double()
    sample = {"net_input": net_input(), "ntokens": 12}

    with recording(switch_layers(model)):
        logits = model(**net_input())[0]
        balance = sum(m.records[0].balance_loss for m in switch_layers(model))
    expected_loss = (logits * 0.1).sin().sum() + 12 * balance
    expected = torch.autograd.grad(expected_loss, list(model.parameters()))

    criterion = WithRouterLoss(PassesCriterion(mode, num_passes), switch_layers(model))
    loss, sample_size, log = criterion(model, sample)
    assert all(m.records is None for m in switch_layers(model))
    loss.backward()
    torch.testing.assert_close(loss, expected_loss)
    torch.testing.assert_close(log["loss"], expected_loss.detach())
    torch.testing.assert_close(log["balance_loss"], 12 * balance.detach())
    assert (sample_size, int(log["routed_tokens"]), int(log["dropped_tokens"])) == (12, num_passes * 2 * (14 + 12), 0)
    for parameter, gradient in zip(model.parameters(), expected):
        torch.testing.assert_close(parameter.grad, gradient)


class PlainTask:
    """What a task does with the criterion it is given."""

    def train_step(self, sample, model, criterion, optimizer, update_num):
        return criterion


class Task(RouterLossMixin, PlainTask):
    pass


def test_models_without_experts_are_left_alone():
    criterion = PassesCriterion("stacked", 1)
    assert Task().train_step({}, build("transformer_small", 30, **TINY), criterion, None, 0) is criterion
    wrapped = Task().train_step({}, build("switch_transformer_small", 30, **TINY), criterion, None, 0)
    assert isinstance(wrapped, WithRouterLoss)
