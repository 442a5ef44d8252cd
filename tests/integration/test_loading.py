"""intra_distillation_fairseq.load on a run that train.sh made: the same translations as evaluate.sh, errors in one line."""

from __future__ import annotations

import random
import re
import shutil
from pathlib import Path

import pytest
import torch
from wit3_sample import sentence

import intra_distillation_fairseq
from intra_distillation_fairseq import checkpoints
from intra_distillation_fairseq.cli import main
from intra_distillation_fairseq.errors import UserError
from intra_distillation_fairseq.loading import find_checkpoint

CONFIG = """
train:
  arch: transformer_small
  encoder-layers: 1
  decoder-layers: 1
  encoder-embed-dim: 16
  decoder-embed-dim: 16
  encoder-ffn-embed-dim: 32
  decoder-ffn-embed-dim: 32
  optimizer: adam
  lr: 0.005
  dropout: 0.1
  max-tokens: 200
  max-update: 150
  num-workers: 0
methods:
  transformer: {criterion: label_smoothed_cross_entropy}
evaluate: {beam: 2, max-len-a: 0, max-len-b: 30, batch-size: 7}
"""


def prepare(folder: Path, seed: int) -> Path:
    rng = random.Random(seed)
    words = ["prepare-parallel", "--src", "de", "--tgt", "en", "--out", folder / "data", "--vocab-size", 100]
    for split, lines in (("train", 150), ("valid", 12), ("test", 20)):
        for lang in ("de", "en"):
            (folder / f"{split}.{lang}").write_text("".join(sentence(rng) + "\n" for _ in range(lines)))
        words += [f"--{split}", folder / split]
    assert main.main([*map(str, words), "--jobs", "1"]) == 0
    return folder / "data"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A trained and evaluated run in a folder with a space and an ü; its data beside it."""
    folder = tmp_path_factory.mktemp("geladen, ü")
    data, config = prepare(folder, 1), folder / "config.yaml"
    config.write_text(CONFIG)
    words = ["train", data, "--method", "transformer", "--config", config, "--save-dir", folder / "run"]
    assert main.main([*map(str, words)]) == 0
    assert main.main(["evaluate", str(folder / "run")]) == 0
    return folder / "run"


def test_model_task_and_config(run):
    model, task, config = intra_distillation_fairseq.load(run)
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert len(task.source_dictionary) == model.encoder.embed_tokens.num_embeddings
    assert config.optimization.max_update == 150
    saved = checkpoints.load(run / "checkpoint_best.pt")["model"]
    for name, value in model.state_dict().items():
        if name in saved:
            torch.testing.assert_close(value, saved[name], rtol=0, atol=0)


def test_translations_are_those_of_evaluate(run):
    loaded = intra_distillation_fairseq.load(run)
    source = (run.parent / "data" / "raw" / "test.de").read_text().splitlines()
    hypotheses = (run / "eval" / "best" / "hypotheses.txt").read_text().splitlines()
    assert intra_distillation_fairseq.load(run, "last").update == 150
    assert loaded.translate(source) == hypotheses
    assert loaded.translate(source[3]) == hypotheses[3]
    assert len(set(hypotheses)) > 1  # else any order would do


def test_without_the_sentencepiece_model(run, tmp_path):
    data = shutil.copytree(run.parent / "data", tmp_path / "data")
    (data / "spm" / "spm.model").unlink()
    loaded = intra_distillation_fairseq.load(run, data=data)
    with pytest.raises(UserError, match="no sentencepiece model: '.*spm.model' does not exist, so give load") as error:
        loaded.translate("ba")
    assert "\n" not in str(error.value)


def test_what_is_made_of_a_linked_checkpoint_belongs_beside_the_link(run, tmp_path, monkeypatch):
    link = tmp_path / "checkpoint_best.pt"
    link.symlink_to(run / "checkpoint_best.pt")
    monkeypatch.chdir(tmp_path)
    for path in (find_checkpoint(Path(".")), find_checkpoint(Path("checkpoint_best.pt"))):
        assert path == link.parent.resolve() / link.name
    loaded = intra_distillation_fairseq.load(link)
    assert loaded.record["settings"]["method"] == "transformer"  # run.json of the run that the link leads to


def test_translating_leaves_the_mode_of_the_model(run):
    loaded = intra_distillation_fairseq.load(run)
    once = loaded.translate(["ba ba"])
    loaded.model.train()
    assert loaded.translate(["ba ba"]) == once
    assert loaded.model.training


def test_a_checkpoint_file_without_its_run_folder(run, tmp_path):
    shutil.copy(run / "checkpoint_last.pt", tmp_path / "model.pt")
    loaded = intra_distillation_fairseq.load(tmp_path / "model.pt")
    assert loaded.record is None
    with pytest.raises(UserError, match="no sentencepiece model: give load"):
        loaded.translate("ba")
    assert intra_distillation_fairseq.load(tmp_path, "model.pt", data=run.parent / "data").translate("ba") is not None
    assert intra_distillation_fairseq.load(tmp_path, "model.pt", data=run.parent / "data" / "bin").data is None


@pytest.mark.parametrize(
    ("place", "name", "message"),
    [
        ("nowhere", "best", "'.*nowhere' does not exist: give a run folder of train.sh or a checkpoint file"),
        (
            "",
            "best",
            r"checkpoint 'best': '.*checkpoint_best.pt' does not exist \(the folder has broken.pt, empty.pt\)",
        ),
        (
            "",
            "broken.pt",
            "'.*broken.pt' was not loaded|'.*broken.pt' is not a whole file|'.*broken.pt' cannot be read",
        ),
        ("", "empty.pt", "'.*empty.pt' is not a fairseq checkpoint: it has no history"),
    ],
)
def test_errors_in_one_line(tmp_path, place, name, message):
    (tmp_path / "broken.pt").write_bytes(b"nothing")
    torch.save({"model": {}}, tmp_path / "empty.pt")
    with pytest.raises(UserError, match=message) as error:
        intra_distillation_fairseq.load(tmp_path / place, name)
    assert "\n" not in str(error.value)


def test_data_with_other_dictionaries(run, tmp_path):
    other = prepare(tmp_path, 2)
    with pytest.raises(
        UserError, match="the dictionaries of '.*' are not those the model was trained with: give '.*data'"
    ):
        intra_distillation_fairseq.load(run, data=other)


def test_data_that_is_gone(run, tmp_path):
    state = checkpoints.load(run / "checkpoint_best.pt")
    state["cfg"]["task"]["data"] = "/no/such/folder"
    checkpoints.write(state, tmp_path / "model.pt")
    with pytest.raises(UserError, match="the data of '.*model.pt' is not at '/no/such/folder' any more: give"):
        intra_distillation_fairseq.load(tmp_path / "model.pt")


def test_data_of_another_size(run, tmp_path):
    state = checkpoints.load(run / "checkpoint_best.pt")
    name = "encoder.embed_tokens.weight"
    state["model"][name] = state["model"][name][:-1].clone()
    checkpoints.write(state, tmp_path / "model.pt")
    with pytest.raises(
        UserError, match="the parameters of '.*model.pt' do not fit the dictionaries of .*size mismatch"
    ):
        intra_distillation_fairseq.load(tmp_path / "model.pt", data=run.parent / "data")


def test_the_example_of_the_documentation(run, capsys):
    """docs/analysis.md, word for word."""
    page = (Path(__file__).resolve().parents[2] / "docs" / "analysis.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert code.count('"runs/de-en/id_x"') == 1
    capsys.readouterr()
    exec(code.replace('"runs/de-en/id_x"', repr(str(run))), names := {})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and "first feed-forward layer: mean" in lines[1]
    zeros = sum(int((p == 0).sum()) for name, p in names["model"].named_parameters() if name in names["names"])
    assert zeros >= len(names["ranking"]) * 3 // 10
