"""Averaging of checkpoints, and reading them safely."""

import argparse
import logging

import pytest
import torch

from intra_distillation_fairseq import checkpoints
from intra_distillation_fairseq.errors import UserError


def save(path, model, update=3, **more):
    torch.save(
        {
            "cfg": {"model": argparse.Namespace(arch="x")},
            "model": model,
            "optimizer_history": [{"num_updates": update}],
            "extra_state": {"val_loss": 4.5},
            "last_optimizer_state": {"state": {}},
            **more,
        },
        path,
    )
    return path


@pytest.fixture
def three(tmp_path):
    torch.manual_seed(1)
    models = [
        {"w": torch.randn(3, 5), "half": torch.randn(4).half(), "n": torch.tensor([2 * i, 1 + i])} for i in range(3)
    ]
    return models, [save(tmp_path / f"checkpoint{i}.pt", model, update=i) for i, model in enumerate(models)]


def test_the_mean_is_exact(three, tmp_path):
    models, paths = three
    output = tmp_path / "mean é.pt"
    checkpoints.average(paths, output)
    state = checkpoints.load(output)
    for name in ("w", "half"):
        exact = sum(model[name].double() for model in models) / 3
        assert torch.equal(state["model"][name], exact.to(models[0][name].dtype))
        assert state["model"][name].dtype == models[0][name].dtype
    assert state["model"]["n"].tolist() == [2, 2]
    assert state["model"]["n"].dtype == torch.int64


def test_whole_numbers_are_rounded_down(tmp_path):
    paths = [save(tmp_path / f"{n}.pt", {"n": torch.tensor([n, -n])}) for n in (1, 2)]
    checkpoints.average(paths, tmp_path / "mean.pt")
    assert checkpoints.load(tmp_path / "mean.pt")["model"]["n"].tolist() == [1, -2]


def test_what_is_kept_and_what_is_left_out(three, tmp_path):
    checkpoints.average(three[1], tmp_path / "mean.pt")
    state = checkpoints.load(tmp_path / "mean.pt")
    assert state["cfg"]["model"].arch == "x"
    assert state["optimizer_history"] == [{"num_updates": 0}]
    assert "last_optimizer_state" not in state


def test_inputs_are_not_changed_and_nothing_else_is_written(three, tmp_path):
    models, paths = three
    before = sorted(tmp_path.iterdir())
    checkpoints.average(paths, tmp_path / "mean.pt")
    assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / "mean.pt"])
    assert torch.equal(checkpoints.load(paths[0])["model"]["w"], models[0]["w"])


def test_one_checkpoint_is_its_own_mean(three, tmp_path):
    checkpoints.average(three[1][:1], tmp_path / "mean.pt")
    assert torch.equal(checkpoints.load(tmp_path / "mean.pt")["model"]["w"], three[0][0]["w"])


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"w": torch.zeros(3, 5)}, "are not of one model: only one of them has 'half'"),
        (
            {"w": torch.zeros(2, 5), "half": torch.zeros(4), "n": torch.zeros(2)},
            r"are not of one model: 'w' has the shapes \(2, 5\) and \(3, 5\)",
        ),
    ],
)
def test_different_models_are_refused(three, tmp_path, model, message):
    other = save(tmp_path / "other.pt", model)
    with pytest.raises(UserError, match=message):
        checkpoints.average([three[1][0], other], tmp_path / "mean.pt")
    assert not (tmp_path / "mean.pt").exists()


def test_facts(three):
    assert checkpoints.facts(three[1][2]) == checkpoints.CheckpointFacts(update=2, valid_loss=4.5)


def test_files_that_are_no_checkpoints_are_refused(three, tmp_path):
    with pytest.raises(UserError, match="'.*missing.pt' does not exist"):
        checkpoints.load(tmp_path / "missing.pt")
    cut = tmp_path / "cut.pt"
    cut.write_bytes(three[1][0].read_bytes()[:900])
    with pytest.raises(UserError, match="checkpoint '.*cut.pt' is not a whole file .*: take another one"):
        checkpoints.load(cut)
    (tmp_path / "text.pt").write_text("a text, and no checkpoint\n" * 9)
    with pytest.raises(UserError, match=r"'.*text.pt' was not loaded: its content is not that of a checkpoint; "):
        checkpoints.load(tmp_path / "text.pt")
    torch.save({"weights": 1}, tmp_path / "other.pt")
    with pytest.raises(UserError, match="is not a fairseq checkpoint: it has no 'model'"):
        checkpoints.load(tmp_path / "other.pt")


class Intruder:
    """Would run code when it is unpickled."""

    def __reduce__(self):
        return (print, ("not safe",))


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path, capsys):
    path = save(tmp_path / "bad.pt", {"w": torch.zeros(1)}, extra=Intruder())
    with pytest.raises(UserError) as caught:
        checkpoints.load(path)
    message = str(caught.value)
    assert message.startswith(f"checkpoint '{path}' was not loaded: it holds builtins.print; allowed are tensors")
    assert message.isprintable() and "weights_only" not in message  # one line, no colours, none of torch's advice
    assert "not safe" not in capsys.readouterr().out


def test_checkpoints_of_the_old_format_are_read(tmp_path):
    path = tmp_path / "legacy.pt"
    torch.save({"model": {"w": torch.arange(999)}}, path, _use_new_zipfile_serialization=False)
    assert torch.equal(checkpoints.load(path)["model"]["w"], torch.arange(999))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="legacy.pt' is not a whole file"):
        checkpoints.load(path)


def test_the_callers_logging_stays_as_it_was(three):
    before = logging.root.manager.disable
    try:
        for level in (logging.NOTSET, logging.ERROR):
            logging.disable(level)
            checkpoints.load(three[1][0])
            assert logging.root.manager.disable == level
    finally:
        logging.disable(before)
