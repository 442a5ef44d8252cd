"""What the criterion hands to the loss, logits or features, through which back end, and that training is the same."""

import argparse
import functools

import pytest
import torch
from fairseq.distributed import ModuleProxyWrapper
from in_process import gradient, make_criterion, make_model
from torch import nn

from intra_distillation_fairseq import passes
from intra_distillation_fairseq.projection import why_not_apart, why_not_plain

MODES = list(passes.PASS_MODES)
CASES = [("reference", "logits"), ("chunked", "logits"), ("chunked", "features")]


def losses_of_training(task, sample, updates, **settings):
    """The loss at every update of a training with dropout, Adam and a growing alpha'."""
    model, criterion = make_model(task, dropout=0.3, attention_dropout=0.1), make_criterion(task, **settings)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    optimizer.backward = lambda loss: loss.backward()
    torch.manual_seed(7)
    losses = []
    for update in range(updates):
        optimizer.zero_grad()
        loss, sample_size, _ = task.train_step(sample, model, criterion, optimizer, update)
        for parameter in model.parameters():
            parameter.grad.div_(sample_size)
        optimizer.step()
        losses.append(loss.item() / sample_size)
    return losses


@pytest.mark.parametrize(("mode", "divergence"), [("stacked", "x"), ("stacked", "js"), ("recompute", "x")])
def test_fifty_updates_agree_step_by_step(task, sample, mode, divergence):
    curves = [
        losses_of_training(
            task, sample, 50, id_loss_backend=backend, id_loss_input=input_, id_pass_mode=mode, id_divergence=divergence
        )
        for backend, input_ in CASES
    ]
    assert curves[0][-1] < 0.8 * max(curves[0])  # it does learn
    for curve in curves[1:]:
        assert curve == pytest.approx(curves[0], rel=2e-4)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("prefix", [0, 1])
def test_gradients_do_not_depend_on_how_the_loss_is_computed(task, sample, mode, shared, prefix):
    """Every parameter's, that of a projection shared with the embedding included."""
    model = make_model(task, dropout=0.3, share_decoder_input_output_embed=shared)
    results = []
    for backend, input_ in CASES:
        criterion = make_criterion(
            task,
            id_loss_backend=backend,
            id_loss_input=input_,
            id_pass_mode=mode,
            ignore_prefix_size=prefix,
            id_alpha_schedule="constant",
        )
        torch.manual_seed(4)
        results.append(gradient(model, criterion, sample))
        assert criterion.takes_features == (input_ == "features")
    for loss, _, log, got in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-5)
        assert log["id_loss"].item() == pytest.approx(results[0][2]["id_loss"].item(), rel=1e-4)
        torch.testing.assert_close(got, results[0][3], rtol=1e-3, atol=1e-4)


def test_an_output_bias_takes_part(task, sample):
    model = make_model(task, dropout=0.3)
    projection = model.decoder.output_projection
    projection.bias = nn.Parameter(torch.linspace(-1, 1, projection.out_features))
    results = []
    for backend, input_ in CASES:
        torch.manual_seed(4)
        results.append(gradient(model, make_criterion(task, id_loss_backend=backend, id_loss_input=input_), sample))
        results[-1] += (projection.bias.grad.clone(),)
        assert results[-1][-1].abs().max() > 0
    for result in results[1:]:
        assert result[0] == pytest.approx(results[0][0], rel=1e-5)
        torch.testing.assert_close(result[-1], results[0][-1], rtol=1e-3, atol=1e-4)


def test_auto_takes_features_where_the_model_allows(task, sample, caplog):
    caplog.set_level("INFO")
    model, criterion = make_model(task, dropout=0.3), make_criterion(task)
    for _ in range(2):
        gradient(model, criterion, sample)
    messages = [
        r.getMessage() for r in caplog.records if r.getMessage().startswith(("loss back end", "the loss takes"))
    ]
    assert messages == [
        "loss back end: chunked (chosen automatically)",
        "the loss takes features and projects them itself",
    ]
    with_accuracy = make_criterion(task, report_accuracy=True)
    gradient(model, with_accuracy, sample)
    assert not with_accuracy.takes_features
    by_definition = make_criterion(task, id_loss_backend="reference")
    gradient(model, by_definition, sample)
    assert not by_definition.takes_features


def with_own_forward(model):
    """The same model whose decoder's class makes something of the logits that its output_layer gives."""
    decoder = model.decoder
    stock = type(decoder)

    def forward(self, *args, features_only=False, **kwargs):
        x, extra = stock.forward(self, *args, features_only=features_only, **kwargs)
        return (x if features_only else 2 * x), extra

    decoder.__class__ = type("ScalingDecoder", (stock,), {"forward": forward})
    return model


def with_own_logits(model):
    """The same model whose decoder's class has an output_layer of its own."""
    decoder = model.decoder
    stock = type(decoder)
    decoder.__class__ = type(
        "ScaledDecoder", (stock,), {"output_layer": lambda self, x: 2 * stock.output_layer(self, x)}
    )
    return model


def with_hook(model):
    model.decoder.output_projection.register_forward_hook(lambda *_: None)
    return model


def with_other_projection(model):
    class Projection(nn.Linear):
        pass

    model.decoder.output_projection.__class__ = Projection
    return model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_own_logits, "the decoder computes the logits in a way of its own (ScaledDecoder.output_layer)"),
        (with_own_forward, "the decoder computes the logits in a way of its own (ScalingDecoder.forward)"),
        (with_hook, "its output_projection has hooks"),
        (with_other_projection, "the decoder has no output_projection of type torch.nn.Linear: it is a Projection"),
    ],
)
def test_a_model_of_another_kind_gives_its_logits_and_keeps_them(task, sample, change, message):
    model = change(make_model(task, dropout=0.3))
    results = []
    for settings in ({}, {"id_loss_backend": "reference"}):
        criterion = make_criterion(task, **settings)
        torch.manual_seed(4)
        results.append(gradient(model, criterion, sample))
        assert not criterion.takes_features
        assert not criterion.overwrites_logits
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    torch.testing.assert_close(results[0][3], results[1][3], rtol=1e-3, atol=1e-4)
    with pytest.raises(SystemExit) as error:
        gradient(model, make_criterion(task, id_loss_input="features"), sample)
    assert str(error.value) == f"error: --id-loss-input is 'features', but {message}: use auto or logits"


@pytest.mark.parametrize("mode", MODES)
def test_experts(task, sample, mode):
    """A switch transformer, whose balance loss the task adds, gives features as well."""
    model = make_model(task, arch="switch_transformer_small", dropout=0.3)
    optimizer = argparse.Namespace(backward=lambda loss: loss.backward())
    results = []
    for backend, input_ in CASES:
        criterion = make_criterion(task, id_loss_backend=backend, id_loss_input=input_, id_pass_mode=mode)
        model.zero_grad()
        torch.manual_seed(4)
        loss, _, log = task.train_step(sample, model, criterion, optimizer, 50)
        results.append(
            (loss.item(), log["balance_loss"].item(), torch.cat([p.grad.flatten() for p in model.parameters()]))
        )
    assert results[0][1] > 0
    for result in results[1:]:
        assert result[:2] == pytest.approx(results[0][:2], rel=1e-5)
        torch.testing.assert_close(result[2], results[0][2], rtol=1e-3, atol=1e-4)


def test_accuracy_needs_logits(task, sample):
    with pytest.raises(
        SystemExit, match="^error: --id-loss-input is 'features', but --report-accuracy needs the logits"
    ):
        gradient(make_model(task), make_criterion(task, id_loss_input="features", report_accuracy=True), sample)


def test_a_missing_back_end_is_named(task, sample):
    with pytest.raises(
        SystemExit, match="^error: --id-loss-backend is 'triton', but it needs a CUDA GPU and the model"
    ):
        gradient(make_model(task), make_criterion(task, id_loss_backend="triton"), sample)


def test_wrappers(task, monkeypatch, tmp_path):
    """A projection used outside the model's forward goes well with data parallelism unless that looks for unused parameters."""
    model = make_model(task)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        wrap = functools.partial(nn.parallel.DistributedDataParallel, model)
        assert why_not_apart(ModuleProxyWrapper(wrap())) is None
        wrapped = ModuleProxyWrapper(wrap(find_unused_parameters=True))
        assert why_not_apart(wrapped).startswith("--find-unused-parameters takes an output projection")
        assert why_not_plain(wrapped) is None
    finally:
        torch.distributed.destroy_process_group()
