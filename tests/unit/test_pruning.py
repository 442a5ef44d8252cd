"""Which parameters are pruned, in which order, how many, and how the curve is kept."""

import argparse
import json

import numpy as np
import pytest
import torch
from fairseq.data import Dictionary
from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_REGISTRY
from torch import nn

import intra_distillation_fairseq  # noqa: F401  registers the architectures
from intra_distillation_fairseq import checkpoints
from intra_distillation_fairseq.analysis.pruning import Ranking, prunable_parameters, pruned
from intra_distillation_fairseq.errors import UserError
from intra_distillation_fairseq.experiments import pruning_curve
from intra_distillation_fairseq.experiments.prunable_model import PrunableModel, read_sensitivity
from intra_distillation_fairseq.experiments.pruning_curve import PruningRecord
from intra_distillation_fairseq.export import for_plain_fairseq


def build(arch="transformer_small", **flags) -> nn.Module:
    sizes = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in {"embed_dim": 8, "ffn_embed_dim": 12, "attention_heads": 2, "layers": 2}.items()
    }
    args = argparse.Namespace(arch=arch, max_source_positions=64, max_target_positions=64, **sizes, **flags)
    ARCH_CONFIG_REGISTRY[arch](args)
    words = Dictionary()
    for number in range(16):
        words.add_symbol(str(number))
    task = argparse.Namespace(source_dictionary=words, target_dictionary=words, adds_router_loss=True)
    torch.manual_seed(1)
    model = ARCH_MODEL_REGISTRY[arch].build_model(args, task)
    model.built_with = args
    return model


# -- what is pruned


@pytest.mark.parametrize("positions", [False, True])
def test_everything_but_layer_norms_competes(positions):
    model = build(encoder_learned_pos=positions, decoder_learned_pos=positions)
    names = prunable_parameters(model)
    parameters = dict(model.named_parameters())
    assert set(parameters) - set(names) == {name for name in parameters if "layer_norm" in name}
    assert list(names) == [name for name in parameters if name in names]
    assert "encoder.layers.0.self_attn.k_proj.bias" in names and "decoder.output_projection.weight" in names
    assert ("encoder.embed_positions.weight" in names) == positions  # those of sines are no parameters
    assert all(aliases == [name] for name, aliases in names.items())


def test_shared_embeddings_compete_once():
    names = prunable_parameters(build(share_all_embeddings=True))
    assert names["encoder.embed_tokens.weight"] == [
        "encoder.embed_tokens.weight",
        "decoder.embed_tokens.weight",
        "decoder.output_projection.weight",
    ]
    assert "decoder.embed_tokens.weight" not in names and "decoder.output_projection.weight" not in names
    tied = prunable_parameters(build(share_decoder_input_output_embed=True))
    assert tied["decoder.embed_tokens.weight"] == ["decoder.embed_tokens.weight", "decoder.output_projection.weight"]


def test_experts_and_routers_compete():
    model = build("switch_transformer_small", num_experts=3)
    names = prunable_parameters(model)
    parameters = dict(model.named_parameters())
    assert set(parameters) - set(names) == {name for name in parameters if "layer_norm" in name}
    assert {name.rpartition(".")[2] for name in names if ".fc1." in name} == {"w1", "b1", "w2", "b2", "weight"}
    assert any(name.endswith("fc1.router.weight") for name in names)


# -- order and counts

SCORES = {"a": torch.tensor([[4.0, 1.0], [9.0, 2.0]]), "b": torch.tensor([8.0, 1.0, 3.0, 0.0, 7.0, 5.0])}


def test_the_lowest_scores_of_all_parameters_go_first():
    ranking = Ranking.by_score(SCORES)
    masks = ranking.masks(0.4)  # 0, 1, 1, 2: one layer loses two of four, the other two of six
    assert masks["a"].tolist() == [[False, True], [False, True]]
    assert masks["b"].tolist() == [False, True, False, True, False, False]
    # of the two entries 1.0 the first one goes first
    assert ranking.masks(0.2)["a"].tolist() == [[False, True], [False, False]]
    assert ranking.masks(0.2)["b"].tolist() == [False, False, False, True, False, False]


@pytest.mark.parametrize(
    ("size", "ratio", "count"), [(100, 0.29, 29), (10, 0.7, 7), (10, 0.69, 6), (10, 0, 0), (10, 1, 10), (7, 1e-05, 0)]
)
def test_exactly_the_floor(size, ratio, count):
    """0.29 * 100 is 28.999999999999996 to a computer."""
    ranking = Ranking.by_score({"a": torch.zeros(size)})
    assert ranking.count(ratio) == count == ranking.masks(ratio)["a"].sum()


@pytest.mark.parametrize("order", ["score", "random"])
def test_a_larger_ratio_prunes_what_a_smaller_one_does(order):
    generator = torch.Generator().manual_seed(3)
    values = {"a": torch.randint(5, (9, 7), generator=generator).float(), "b": torch.zeros(30)}  # many ties
    shapes = {name: value.shape for name, value in values.items()}
    ranking = Ranking.by_score(values) if order == "score" else Ranking.at_random(shapes, 1)
    previous = {name: torch.zeros(shape, dtype=torch.bool) for name, shape in shapes.items()}
    for ratio in (0.1, 0.25, 0.6, 1):
        masks = ranking.masks(ratio)
        assert sum(int(mask.sum()) for mask in masks.values()) == int(93 * ratio)
        assert all((masks[name] >= previous[name]).all() for name in masks)
        previous = masks


def test_the_random_order_depends_on_its_seed_alone():
    shapes = {"a": torch.Size([10, 10]), "b": torch.Size([20])}
    one, same, other = (Ranking.at_random(shapes, seed).masks(0.5) for seed in (1, 1, 2))
    assert all(one[name].equal(same[name]) for name in shapes)
    assert not one["a"].equal(other["a"])
    assert 0 < one["b"].sum() < 20  # over both parameters


def test_zeroing_keeps_the_rest():
    state = {
        "x": torch.tensor([1.0, -2.0, 3.0], dtype=torch.float16),
        "y": torch.tensor([1.0, -2.0, 3.0], dtype=torch.float16),
        "norm": torch.ones(3),
    }
    mask = torch.tensor([False, True, False])
    after = pruned(state, {"x": ["x", "y", "gone"]}, {"x": mask})
    assert after.keys() == state.keys()
    assert after["x"].tolist() == [1, 0, 3] and after["x"].dtype == torch.float16
    assert after["y"].data_ptr() == after["x"].data_ptr()  # written once
    assert after["norm"] is state["norm"] and state["x"].tolist() == [1, -2, 3]


# -- a checkpoint and its sensitivities


@pytest.fixture
def saved(tmp_path):
    """A checkpoint in half precision with tied embeddings, and its model."""
    model = build(share_all_embeddings=True)
    cfg = {"model": model.built_with, "task": {"_name": "translation_intra_distillation"}}
    state = {"cfg": cfg, "model": model.half().state_dict(), "last_optimizer_state": {"exp_avg": torch.ones(9)}}
    checkpoints.write(state, tmp_path / "checkpoint_best.pt")
    return tmp_path / "checkpoint_best.pt", model


def test_a_pruned_checkpoint(saved, tmp_path):
    path, network = saved
    model = PrunableModel(path, network)
    assert len(model) == sum(p.numel() for name, p in network.named_parameters() if "layer_norm" not in name)
    model.write(model.ranking("magnitude", {}, 1).masks(0.5), tmp_path / "half.pt")
    before, after = checkpoints.load(path), checkpoints.load(tmp_path / "half.pt")
    assert "last_optimizer_state" not in after
    assert after["cfg"]["task"] == before["cfg"]["task"]
    names = [name for name, _ in network.named_parameters() if "layer_norm" not in name]
    values = torch.cat([before["model"][name].flatten() for name in names])
    left = torch.cat([after["model"][name].flatten() for name in names])
    zeroed = left.ne(values)
    assert int((left == 0).sum()) >= len(model) // 2
    assert values[zeroed].abs().max() <= values[~zeroed & (left != 0)].abs().min()
    for name, value in after["model"].items():
        assert value.dtype == before["model"][name].dtype
        if "layer_norm" in name or "version" in name:
            assert value.equal(before["model"][name])
    shared = [after["model"][f"{name}.weight"] for name in ("encoder.embed_tokens", "decoder.output_projection")]
    assert shared[0].equal(shared[1])
    assert (tmp_path / "half.pt").stat().st_size <= path.stat().st_size


def test_a_checkpoint_with_other_names(saved):
    path, _ = saved
    with pytest.raises(UserError) as error:
        PrunableModel(path, build("switch_transformer_small", num_experts=3, share_all_embeddings=True))
    assert str(error.value) == (
        f"'{path}' has no 'encoder.layers.0.fc1.w1': it is of a fairseq that named parameters otherwise; train or save "
        "it again"
    )


def sensitivities(model: PrunableModel) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {name: rng.random(value.shape, np.float32) for name, value in model.parameters.items()}


def write_measured(path, sha256, checkpoint="checkpoint_best.pt") -> None:
    path.write_text(json.dumps({"format": 1, "checkpoint": checkpoint, "checkpoint_sha256": sha256}))


def refused(path, model) -> str:
    with pytest.raises(UserError) as error:
        read_sensitivity(path, model)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_sensitivities_of_the_model(saved, tmp_path):
    model = PrunableModel(*saved)
    arrays = sensitivities(model)
    np.savez(tmp_path / "s.npz", **arrays, **{"encoder.layers.0.final_layer_norm.weight": np.ones(8)})
    write_measured(tmp_path / "s.json", model.sha256)
    found = read_sensitivity(tmp_path / "s.npz", model)
    assert found.keys() == model.parameters.keys()
    masks = model.ranking("sensitivity", found, 1).masks(0.25)
    joined = np.concatenate([array.ravel() for array in arrays.values()])
    chosen = torch.cat([mask.flatten() for mask in masks.values()]).numpy()
    assert chosen.sum() == len(model) // 4 and joined[chosen].max() < joined[~chosen].min()


def test_sensitivities_of_something_else(saved, tmp_path):
    model, path = PrunableModel(*saved), tmp_path / "s.npz"
    how = "make one with  intra-distillation sensitivity RUN_DIR"
    assert refused(path, model) == f"sensitivity file '{path}' does not exist: {how}, or name one with --sensitivity"
    arrays = sensitivities(model)
    write_measured(tmp_path / "s.json", model.sha256)

    name = "encoder.layers.0.fc1.weight"
    np.savez(path, **{key: value for key, value in arrays.items() if key != name})
    assert refused(path, model) == f"'{path}' is of another model: it has no '{name}'; {how}"

    np.savez(path, **{**arrays, name: np.ones((12, 9), np.float32)})
    assert refused(path, model) == (
        f"'{path}' is of another model: '{name}' has the shape (12, 9) there and (12, 8) in '{saved[0]}'; {how}"
    )

    np.savez(path, **{**arrays, name: np.full((12, 8), np.nan, np.float32)})
    assert refused(path, model) == f"'{path}' has values in '{name}' that are not numbers: measure again"

    np.savez(path, **arrays)
    write_measured(tmp_path / "s.json", "e" * 64, "checkpoint_last.pt")
    assert refused(path, model) == (
        f"'{path}' was measured on another checkpoint (checkpoint_last.pt, sha256 {'e' * 12}) than '{saved[0]}' "
        f"(sha256 {model.sha256[:12]}): measure this one first"
    )


def test_sensitivities_without_their_record(saved, tmp_path):
    """That of another epoch's checkpoint has the same names and shapes."""
    model, path = PrunableModel(*saved), tmp_path / "s.npz"
    np.savez(path, **sensitivities(model))
    assert refused(path, model) == (
        f"'{tmp_path}/s.json' is missing beside '{path}' and tells which checkpoint was measured: measure again, or copy "
        "both files"
    )
    (tmp_path / "s.json").write_text('{"format": 1}')
    assert refused(path, model).startswith(f"'{tmp_path}/s.json' is damaged, it has no 'checkpoint_sha256': move it ")


@pytest.mark.parametrize(
    ("name", "flag"), [("checkpoint_last.pt", " --checkpoint last"), ("checkpoint3.pt", " --checkpoint checkpoint3.pt")]
)
def test_how_to_measure_another_checkpoint(saved, tmp_path, name, flag):
    model = PrunableModel(saved[0].rename(tmp_path / name), saved[1])
    said = refused(tmp_path / "s.npz", model)
    assert f": make one with  intra-distillation sensitivity RUN_DIR{flag}, or name one" in said


@pytest.mark.parametrize("content", ["text", "array", "objects", "cut", "empty"])
def test_what_is_no_sensitivity_file(saved, tmp_path, content):
    model, path = PrunableModel(*saved), tmp_path / "s.npz"
    arrays = sensitivities(model)
    if content == "array":
        with open(path, "wb") as file:
            np.save(file, np.ones(3))
    elif content == "objects":
        np.savez(path, **{name: np.array([None]) for name in arrays})
    else:
        np.savez(path, **arrays)
        path.write_bytes({"text": b"hello\n", "cut": path.read_bytes()[:-200], "empty": b""}[content])
    assert refused(path, model).startswith(f"'{path}' is not a sensitivity file (npz with an array per parameter): ")


# -- without the plugin


def test_a_switch_transformer_stays_with_the_plugin():
    model = build("switch_transformer_small", num_experts=3)
    state = {"cfg": {"model": model.built_with}, "model": {}}
    assert for_plain_fairseq(state) is state


@pytest.mark.parametrize(
    ("arch", "expected"), [("transformer_small", "transformer"), ("transformer_iwslt_de_en", "transformer_iwslt_de_en")]
)
def test_settings_that_fairseq_knows(arch, expected):
    state = {"cfg": {"model": argparse.Namespace(arch=arch, _name=arch, encoder_layers=3), "task": {}}, "model": {}}
    after = for_plain_fairseq(state)
    assert after["cfg"]["model"] == {"arch": expected, "_name": expected, "encoder_layers": 3}
    assert state["cfg"]["model"].arch == arch


# -- the curve

SETTINGS = {
    "checkpoint": "checkpoint_best.pt",
    "checkpoint_sha256": "a" * 64,
    "sensitivity_sha256": "b" * 64,
    "seed": 1,
    "prunable": 10,
    "data_digest": "c" * 64,
    "evaluation": {"beam": 5, "lenpen": 1.0},
}


def point(order: str, ratio: float, bleu: float) -> dict:
    values = {"order": order, "ratio": ratio, "pruned": int(10 * ratio), "bleu": bleu}
    return {**values, "bleu_signature": "sig", "chrf": 2 * bleu, "seconds": 1.0}


def test_the_table_and_its_lines(tmp_path):
    record = PruningRecord(tmp_path / "pruning.json", SETTINGS, force=False)
    for one in (point("random", 0.3, 4), point("sensitivity", 0.0, 30), point("sensitivity", 0.3, 29.5)):
        record.add(one)
    record.add(point("sensitivity", 0.5, 8))
    assert pruning_curve.table(record) == (
        "| ratio | pruned | sensitivity | change | random | change |\n"
        "| ----- | -----: | ----------: | -----: | -----: | -----: |\n"
        "| 0     |      0 |       30.00 |  +0.00 |  30.00 |  +0.00 |\n"
        "| 0.3   |      3 |       29.50 |  -0.50 |   4.00 | -26.00 |\n"
        "| 0.5   |      5 |        8.00 | -22.00 |      - |      - |\n"
    )
    assert pruning_curve.tsv(record).split("\n") == [
        "order\tratio\tpruned\tbleu\tchange\tchrf\tbleu_signature",
        "sensitivity\t0\t0\t30\t+0.0000\t60\tsig",
        "sensitivity\t0.3\t3\t29.5\t-0.5000\t59.0\tsig",
        "sensitivity\t0.5\t5\t8\t-22.0000\t16\tsig",
        "random\t0\t0\t30\t+0.0000\t60\tsig",
        "random\t0.3\t3\t4\t-26.0000\t8\tsig",
        "",
    ]
    assert json.loads((tmp_path / "pruning.json").read_text())["points"] == record.points


def test_without_a_score_of_the_whole_model_there_is_no_change(tmp_path):
    record = PruningRecord(tmp_path / "pruning.json", SETTINGS, force=False)
    record.add(point("sensitivity", 0.3, 29.5))
    assert "| 0.3   |      3 |       29.50 |      - |" in pruning_curve.table(record)
    assert "sensitivity\t0.3\t3\t29.5\t\t59.0" in pruning_curve.tsv(record)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"checkpoint_sha256": "d" * 64}, f"the checkpoint's sha256 is {'d' * 12} (there {'a' * 12})"),
        ({"sensitivity_sha256": "d" * 64}, f"the sensitivity file's sha256 is {'d' * 12} (there {'b' * 12})"),
        ({"data_digest": "d" * 64}, f"the sha256 of the data's manifest is {'d' * 12} (there {'c' * 12})"),
        ({"seed": 2}, "--seed is 2 (there 1)"),
        ({"evaluation": {"beam": 4, "lenpen": 1.0}}, "the evaluation has beam 4 (there 5)"),
        ({"seed": 2, "evaluation": {}}, "--seed is 2 (there 1); the evaluation has beam None (there 5), lenpen None"),
    ],
)
def test_other_settings_are_refused(tmp_path, change, said):
    path = tmp_path / "pruning.json"
    record = PruningRecord(path, SETTINGS, force=False)
    record.add(point("sensitivity", 0.3, 29.5))
    record.add(point("random", 0.3, 2.0))
    assert len(PruningRecord(path, SETTINGS, force=False).points) == 2
    with pytest.raises(UserError) as error:
        PruningRecord(path, {**SETTINGS, **change}, force=False)
    assert str(error.value).startswith(f"'{path}' was made with other settings: {said}")
    assert str(error.value).endswith(
        "; repeat them to go on, choose another --out, or begin again with --force"
    ) and "\n" not in str(error.value)


ALL = [point(order, ratio, 9) for order, ratio in (("sensitivity", 0), *((o, 0.3) for o in pruning_curve.ORDERS))]


def recorded(path) -> PruningRecord:
    """With all of ALL, and their translations."""
    record = PruningRecord(path, SETTINGS, force=False)
    for one in ALL:
        record.add(one)
        record.folder(one["order"], one["ratio"]).mkdir(parents=True)
    return record


@pytest.mark.parametrize(
    ("key", "kept"),
    [
        *((key, []) for key in ("checkpoint_sha256", "data_digest", "evaluation")),
        ("sensitivity_sha256", [0, 2, 3]),  # those of no pruning, and of other orders
        ("seed", [0, 1, 2]),
    ],
)
def test_force_drops_what_other_settings_decide(tmp_path, key, kept):
    path = tmp_path / "pruning.json"
    recorded(path)
    other = {**SETTINGS, key: {"beam": 1} if key == "evaluation" else 7}
    record = PruningRecord(path, other, force=True)
    assert record.points == [ALL[number] for number in kept]
    # In the file too: who is stopped now does not find the others again.
    assert json.loads(path.read_text()) == {"format": 1, **other, "points": record.points}
    names = {("sensitivity_0.3", "magnitude_0.3", "random_0.3")[n - 1] if n else "unpruned" for n in kept}
    assert {folder.name for folder in (tmp_path / "pruning").iterdir()} == names


def test_settings_that_decide_no_point_may_change(tmp_path):
    path = tmp_path / "pruning.json"
    record = PruningRecord(path, SETTINGS, force=False)
    record.add(ALL[0])
    record.add(ALL[2])
    new = {**SETTINGS, "seed": 2, "sensitivity_sha256": "d" * 64}
    again = PruningRecord(path, new, force=False)
    assert again.points == [ALL[0], ALL[2]]
    again.add(ALL[3])
    assert json.loads(path.read_text())["seed"] == 2


class Fake:
    """In place of a model: it writes nothing, and has an order of ten entries."""

    def __len__(self):
        return 10

    def ranking(self, order, sensitivity, seed):
        return Ranking.at_random({"a": torch.Size([10])}, seed)

    def write(self, masks, output):
        output.touch()


def test_force_measures_anew_what_is_asked_for_and_nothing_else(tmp_path):
    path = tmp_path / "pruning.json"
    record, scored = recorded(path), []

    def score(checkpoint, folder, label):
        order, ratio = label.split()
        there = [(one["order"], one["ratio"]) for one in json.loads(path.read_text())["points"]]
        assert (order, float(ratio)) not in there and len(there) == 3  # dropped just before, the others are there
        scored.append(label)
        return {"bleu": 5, "bleu_signature": "sig", "chrf": 1, "seconds": 1}

    def measure(force):
        options = {"seed": 1, "force": force, "score": score, "save": None, "say": print}
        return pruning_curve.measure(record, Fake(), {}, ["sensitivity", "random"], [0, 0.3], **options)

    assert (measure(False), scored) == (0, [])
    assert (measure(True), scored) == (3, ["sensitivity 0", "sensitivity 0.3", "random 0.3"])
    assert {(one["order"], one["ratio"]): one["bleu"] for one in json.loads(path.read_text())["points"]} == {
        ("sensitivity", 0): 5, ("sensitivity", 0.3): 5, ("magnitude", 0.3): 9, ("random", 0.3): 5,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"format": 2}', "' is damaged or of another version (this one reads format 1): "),
        ('{"format": 1}', "' is damaged, it has no 'points': "),
        ('{"format": 1, "points": [{}]}', "' is damaged, it has no 'order': "),
        ('{"format": 1, "points": [3]}', "' is damaged or of another version (this one reads format 1): "),
        ("3", "' is damaged or of another version (this one reads format 1): "),
    ],
)
def test_damaged_records_are_refused(tmp_path, content, said):
    path = tmp_path / "pruning.json"
    path.write_text(content)
    with pytest.raises(UserError) as error:
        PruningRecord(path, SETTINGS, force=True)
    assert str(error.value) == f"'{path}{said}move it away and make it again with  intra-distillation prune RUN_DIR"


@pytest.mark.parametrize(("ratio", "name"), [(0.3, "0.3"), (1.0, "1"), (0.25, "0.25"), (1e-05, "1e-05")])
def test_ratios_in_names(ratio, name):
    assert pruning_curve.written(ratio) == name
