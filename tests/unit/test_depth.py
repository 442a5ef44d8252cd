"""The first layers of a model: as a view of it, and as a checkpoint."""

import argparse
import contextlib
import copy

import pytest
import torch
from fairseq.data import Dictionary
from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_REGISTRY, build_model
from fairseq.modules import LayerDropModuleList
from omegaconf import OmegaConf
from torch import nn

from intra_distillation_fairseq import checkpoints, loading
from intra_distillation_fairseq.errors import UserError
from intra_distillation_fairseq.experiments import depth_curve
from intra_distillation_fairseq.experiments.recipes import Evaluation
from intra_distillation_fairseq.models.depth import cut_in_place, depth, first_layers, truncate_state

KINDS = {
    "post-norm": {},
    "pre-norm": {"encoder_normalize_before": True, "decoder_normalize_before": True},
    "shared embeddings": {"share_all_embeddings": True, "decoder_learned_pos": True},
    "layerdrop": {"encoder_layerdrop": 0.5, "decoder_layerdrop": 0.5},
    "switch": {"arch": "switch_transformer_small"},
    "unequal": {"encoder_layers": 5},
}


def task() -> argparse.Namespace:
    words = Dictionary()
    for i in range(20):
        words.add_symbol(str(i))
    return argparse.Namespace(source_dictionary=words, target_dictionary=words)


def settings(arch="transformer_small", **changes) -> argparse.Namespace:
    sizes = {f"{side}_{what}": value for side in ("encoder", "decoder") for what, value in
             (("layers", 4), ("embed_dim", 8), ("ffn_embed_dim", 12), ("attention_heads", 2))}  # fmt: skip
    args = argparse.Namespace(**{"max_source_positions": 16, "max_target_positions": 16, **sizes, **changes})
    args.arch = args._name = arch
    ARCH_CONFIG_REGISTRY[arch](args)
    return args


def make(args: argparse.Namespace) -> nn.Module:
    torch.manual_seed(1)
    model = ARCH_MODEL_REGISTRY[args._name].build_model(copy.deepcopy(args), task()).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:  # biases and norms, which fairseq starts at the same values in all layers
            nn.init.normal_(parameter, 1, 0.3)
    return model


def logits(model: nn.Module) -> torch.Tensor:
    source = torch.tensor([[5, 6, 7, 2], [1, 8, 9, 2]])
    return model(source, torch.tensor([4, 3]), torch.tensor([[2, 4, 5], [2, 6, 1]]))[0]


def checkpoint(model: nn.Module, model_cfg: argparse.Namespace, **others) -> dict:
    return {
        "model": model.state_dict(),
        "cfg": {"model": model_cfg, "task": {"_name": "translation"}},
        "args": None,
        "last_optimizer_state": {"state": {}},
        "optimizer_history": [{"num_updates": 7}],
        "extra_state": {"epoch": 2},
        **others,
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 3])
def test_the_view_computes_what_the_cut_checkpoint_does(kind, n):
    args = settings(**KINDS[kind])
    model = make(args)
    view = first_layers(model, n)
    cut = truncate_state(checkpoint(model, args), n)
    small = build_model(cut["cfg"]["model"], task()).eval()
    small.load_state_dict(cut["model"])
    assert view.state_dict().keys() == small.state_dict().keys()
    assert torch.equal(logits(view), logits(small))
    assert not torch.allclose(logits(view), logits(model), atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_the_view_shares_its_parameters_and_leaves_the_model_alone(kind):
    model = make(settings(**KINDS[kind]))
    before, names, layers = logits(model), list(model.state_dict()), depth(model)
    view = first_layers(model, 2)
    assert depth(view) == (2, 2) and (view.encoder.num_layers, view.decoder.num_layers) == (2, 2)
    whole = dict(model.named_parameters())
    assert all(parameter is whole[name] for name, parameter in view.named_parameters())
    assert type(view) is type(model)
    assert (depth(model), list(model.state_dict()), model.encoder.num_layers) == (layers, names, layers[0])
    assert torch.equal(logits(model), before)
    logits(view).sum().backward()
    reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert reached == set(dict(view.named_parameters()))


def test_layers_that_are_dropped_at_random_remain_so():
    model = make(settings(**KINDS["layerdrop"]))
    view = first_layers(model, 2)
    assert type(view.encoder.layers) is type(view.decoder.layers) is LayerDropModuleList
    assert view.encoder.layers.p == 0.5
    view.train()
    assert min(len(list(view.decoder.layers)) for _ in range(50)) == 0


def test_in_place_only_while_the_body_runs():
    model = make(settings())
    expected, whole = logits(first_layers(model, 1)), logits(model)
    with cut_in_place(model, 1):
        assert depth(model) == (1, 1)
        assert torch.equal(logits(model), expected)
    assert depth(model) == (4, 4)
    with contextlib.suppress(TypeError), cut_in_place(model, 1):
        model()  # a failure of the body
    assert depth(model) == (4, 4)
    assert torch.equal(logits(model), whole)


@pytest.mark.parametrize("n", [-1, 0, 5])
@pytest.mark.parametrize("cut", [first_layers, lambda model, n: truncate_state(checkpoint(model, settings()), n)])
def test_numbers_out_of_bounds(n, cut):
    with pytest.raises(UserError) as caught:
        cut(make(settings()), n)
    expected = f"{n} layers were asked for: the model has 4 encoder and 4 decoder layers, allowed is 1 to 4"
    assert str(caught.value) == expected


def test_the_smaller_side_bounds_both():
    args = settings(**KINDS["unequal"])
    with pytest.raises(UserError, match="the model has 5 encoder and 4 decoder layers, allowed is 1 to 4"):
        first_layers(make(args), 5)
    with pytest.raises(UserError, match="the model has 5 encoder and 4 decoder layers, allowed is 1 to 4"):
        truncate_state(checkpoint(make(args), args), 5)


def test_models_without_such_layers():
    with pytest.raises(UserError, match="a Linear cannot be cut to its first layers: it has no encoder.layers and"):
        first_layers(nn.Linear(2, 2), 1)
    with pytest.raises(UserError, match="the checkpoint is not of an encoder-decoder transformer: it has no self-att"):
        truncate_state({"model": {"encoder.layers.0.weight": 1, "decoder.layers.0.weight": 1}}, 1)


def test_layers_of_another_kind_in_between():
    args = settings(base_layers=1)
    with pytest.raises(UserError, match="the checkpoint has --base-layers, which stand between the others"):
        truncate_state(checkpoint(make(settings()), args), 2)


def test_what_a_cut_checkpoint_keeps_and_what_not():
    args = settings(encoder_layers_to_keep="0,2,3,4", decoder_layers_to_keep="1,2,3,4")
    model = make(settings())
    state = checkpoint(model, args, extra_state={"epoch": 2, "ema": model.state_dict(), "ema_start": 3})
    before = copy.deepcopy((state["cfg"], list(state["model"]), list(state["extra_state"]["ema"])))
    cut = truncate_state(state, 2)
    assert (state["cfg"], list(state["model"]), list(state["extra_state"]["ema"])) == before
    assert state.keys() - cut.keys() == {"last_optimizer_state"}
    assert (cut["optimizer_history"], cut["cfg"]["task"]) == (state["optimizer_history"], state["cfg"]["task"])
    assert cut["extra_state"].keys() == {"epoch", "ema", "ema_start"}
    assert cut["extra_state"]["ema"].keys() == cut["model"].keys() < state["model"].keys()
    new = cut["cfg"]["model"]
    assert (new.encoder_layers, new.decoder_layers) == (2, 2)
    assert new.encoder_layers_to_keep is None and new.decoder_layers_to_keep is None
    assert new.encoder_embed_dim == 8


def test_settings_of_an_older_checkpoint():
    args = settings()
    cut = truncate_state(checkpoint(make(args), args, cfg=None, args=args), 2)
    assert cut["cfg"] is None and cut["args"].encoder_layers == 2 and args.encoder_layers != 2


@pytest.mark.parametrize("as_config", [False, True])
def test_settings_of_hydra_are_nested(as_config):
    cfg = {"model": {"_name": "transformer", "encoder": {"layers": 4}, "decoder": {"layers": 4, "layers_to_keep": "1"}}}
    if as_config:
        cfg = OmegaConf.create(cfg)
        OmegaConf.set_struct(cfg, True)
    cut = truncate_state(checkpoint(make(settings()), settings(), cfg=cfg), 3)["cfg"]["model"]
    assert cut["encoder"] == {"layers": 3, "layers_to_keep": None} == cut["decoder"]
    assert cfg["model"]["encoder"]["layers"] == 4


# -- the curve


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run folder with two checkpoints, and no data behind it."""
    args = settings()
    model = make(args)
    for name, update in (("checkpoint_best.pt", 7), ("checkpoint_last.pt", 8)):
        checkpoints.write(checkpoint(model, args, optimizer_history=[{"num_updates": update}]), tmp_path / name)
    (tmp_path / "test.de-en.de.bin").write_text("words")
    (tmp_path / "test.en").write_text("words")
    data = argparse.Namespace(
        folder=tmp_path, bin=tmp_path, pair="de-en", source_lang="de", references=tmp_path / "test.en"
    )
    monkeypatch.setattr(
        loading, "load", lambda place, **_: argparse.Namespace(model=model, data=data, evaluation=Evaluation())
    )
    monkeypatch.setattr(depth_curve, "open_prepared", lambda folder, splits: data)
    monkeypatch.setattr(depth_curve, "_processor", lambda: "Z80")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


@pytest.fixture
def translate(run, monkeypatch):
    """Stands in for fairseq-generate, which gets a checkpoint file: the norm's first bias is the score."""

    def translate_and_score(data, cut, evaluation, out, **_):
        bias = checkpoints.load(cut)["model"]["decoder.layers.0.final_layer_norm.bias"][0].item()
        return {"bleu": bias, "chrf": 1.0, **dict.fromkeys(depth_curve._SPEEDS, 1.0)}

    monkeypatch.setattr(depth_curve, "translate_and_score", translate_and_score)


def measure(run, name="best", **options):
    with depth_curve.opened(run, name, **options) as curve:
        curve.measure(1, lambda line: None)
    return curve


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (lambda patch, run: patch.setenv("OMP_NUM_THREADS", "2"), "OMP_NUM_THREADS is 2, there 1"),
        (lambda patch, run: patch.delenv("OMP_NUM_THREADS"), "OMP_NUM_THREADS is not set, there 1"),
        (lambda patch, run: patch.setattr(depth_curve, "_processor", lambda: "6502"), "processor is 6502, there Z80"),
        (lambda patch, run: (run / "test.en").write_text("other words"), "another test set"),
        (lambda patch, run: patch.setattr(depth_curve, "FORMAT", 2), "another version of the file"),
        (
            lambda patch, run: (run / "checkpoint_last.pt").replace(run / "checkpoint_best.pt"),
            "another checkpoint of this name",
        ),
    ],
)
def test_points_of_other_inputs_are_replaced_only_by_force(run, translate, monkeypatch, change, difference):
    path = measure(run, layers=[1, 2]).path
    before = path.read_bytes()
    change(monkeypatch, run)
    with pytest.raises(UserError) as caught:
        measure(run, layers=[3])
    assert str(caught.value) == (
        f"'{path}' was measured with other inputs ({difference}): measure as it was, or replace all of it with --force"
    )
    assert path.read_bytes() == before
    assert [point["layers"] for point in measure(run, layers=[3], force=True).record["points"]] == [3]
    assert not (run / "analysis" / ".source.pt").exists()


def test_force_measures_again_what_was_asked_for(run, translate):
    assert measure(run, layers=[1, 2, 4]).path == run / "analysis" / "layers.json"
    with depth_curve.opened(run, "best", layers=[2], force=True) as curve:
        assert [point["layers"] for point in curve.record["points"]] == [4, 1]


def test_each_checkpoint_has_its_own_file(run, translate):
    best, last = measure(run, layers=[1]), measure(run, "last", layers=[1])
    assert (best.path.name, best.record["update"]) == ("layers.json", 7)
    assert (last.path.name, last.record["update"]) == ("layers_last.json", 8)
    assert measure(run, "checkpoint_best.pt", layers=[1]).path == best.path


def test_a_training_that_goes_on_does_not_mix_checkpoints(run, translate):
    with depth_curve.opened(run, "best", layers=[1, 2]) as curve:
        curve.measure(1, lambda line: exchange(run / "checkpoint_best.pt"))
        first, second = (point["bleu"] for point in curve.record["points"])
    assert first == second
    assert checkpoints.load(run / "checkpoint_best.pt")["model"]["decoder.layers.0.final_layer_norm.bias"][0] == 9


def exchange(path):
    state = checkpoints.load(path)
    state["model"]["decoder.layers.0.final_layer_norm.bias"][0] = 9
    checkpoints.write(state, path)
