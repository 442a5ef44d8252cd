"""fairseq-train --optimizer sage_adam: flags, both criteria, precisions, resume, messages."""

import pytest
import torch
from test_training import OURS, assert_same_parameters, logged

SAGE = "--optimizer sage_adam --adam-betas (0.9,0.98) --adam-eps 1e-6 --weight-decay 1e-4 --sage-beta 0.8".split()
CRITERIA = {
    "intra_distillation": OURS,
    "label_smoothed_cross_entropy": "--criterion label_smoothed_cross_entropy --label-smoothing 0.1".split(),
}
CRITERIA["label_smoothed_cross_entropy"] += ["--task", "translation_intra_distillation"]


def optimizer_state(checkpoint):
    import intra_distillation_fairseq  # noqa: F401  makes checkpoints loadable

    return torch.load(checkpoint, weights_only=True)["last_optimizer_state"]


@pytest.mark.parametrize("flags", ["", "--fp16 --fp16-no-flatten-grads --fp16-init-scale 4"])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_trains_with_either_criterion_and_its_flags_arrive(train, tmp_path, criterion, flags):
    done = train(*CRITERIA[criterion], *SAGE, *flags.split(), "--max-update", 8)
    assert done.returncode == 0, done.stderr[-3000:]
    losses = [float(update["nll_loss"]) for update in logged(done.stdout)]
    assert len(losses) == 8
    assert losses[-1] < losses[0]
    state = optimizer_state(tmp_path / "run" / "checkpoint_last.pt")
    (group,) = state["param_groups"]
    assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.9, 0.98), 1e-6, 1e-4)
    assert (group["sage_beta"], group["sage_eps"]) == (0.8, 1e-12)
    for of_parameter in state["state"].values():
        assert of_parameter["step"] == 8
        assert of_parameter["exp_avg_sensitivity"].dtype == torch.float32


def test_it_is_not_adam_and_all_parameters_move(train, tmp_path):
    """Attention's output bias and LayerNorm's shift start at exactly 0."""
    flags = [*CRITERIA["label_smoothed_cross_entropy"], "--max-update", 6]
    for name, optimizer in (("sage", SAGE), ("adam", ["--optimizer", "adam", *SAGE[2:-2]])):
        assert train(*flags, *optimizer, save_dir=tmp_path / name).returncode == 0
    sage, adam = (
        torch.load(tmp_path / name / "checkpoint_last.pt", weights_only=True)["model"] for name in ("sage", "adam")
    )
    zeros = [n for n in sage if n.endswith(("out_proj.bias", "layer_norm.bias"))]
    assert len(zeros) >= 8
    assert all((sage[name] != 0).all() for name in zeros)
    assert not torch.equal(sage["encoder.layers.0.fc1.weight"], adam["encoder.layers.0.fc1.weight"])


@pytest.mark.parametrize(
    ("criterion", "flags"),
    [
        ("intra_distillation", ""),
        ("label_smoothed_cross_entropy", ""),
        ("label_smoothed_cross_entropy", "--memory-efficient-fp16 --fp16-init-scale 4"),
    ],
)
def test_resuming_equals_never_stopping(train, tmp_path, criterion, flags):
    """Stopped after 1 update of 6, and again after 2, where epoch 2 begins."""
    flags = [*CRITERIA[criterion], *SAGE, *flags.split(), "--update-freq", 2, "--max-update", 6]
    flags += ["--save-interval-updates", 1, "--keep-interval-updates", 1]
    whole = train(*flags, save_dir=tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr[-3000:]
    for _ in range(2):
        stopped = train(*flags, "--stop-time-hours", 1e-9, save_dir=tmp_path / "parts")
        assert stopped.returncode == 0, stopped.stderr[-3000:]
    rest = train(*flags, save_dir=tmp_path / "parts")
    got, expected = logged(rest.stdout), logged(whole.stdout)[2:]
    assert [(u["num_updates"], u["loss"]) for u in got] == [(u["num_updates"], u["loss"]) for u in expected]
    assert [u["num_updates"] for u in got] == ["3", "4", "5", "6"]
    checkpoints = [tmp_path / name / "checkpoint_last.pt" for name in ("whole", "parts")]
    assert_same_parameters(*checkpoints)
    a, b = (optimizer_state(checkpoint)["state"] for checkpoint in checkpoints)
    for index, state in a.items():
        for name in ("exp_avg", "exp_avg_sq", "exp_avg_sensitivity"):
            assert state[name].dtype == torch.float32
            assert torch.equal(state[name], b[index][name]), (index, name)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--sage-beta 1", "error: --sage-beta is '1.0': allowed is a number above 0 and below 1"),
        ("--sage-eps=-1e-6", "error: --sage-eps is '-1e-06': allowed is a number of at least 1e-30"),
        ("--adam-betas (0.9,1.2)", "error: --adam-betas is '(0.9, 1.2)': allowed are two numbers of at least 0"),
        ("--adam-betas none", "error: --adam-betas is 'none': allowed are two numbers of at least 0"),
        ("--sage-beta much", "argument --sage-beta: invalid float value: 'much'"),
    ],
)
def test_wrong_flags_end_with_one_line_and_no_checkpoint(train, tmp_path, flags, message):
    done = train(*OURS, *SAGE, *flags.split(), "--max-update", 2)
    assert done.returncode != 0
    assert message in done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.rglob("*.pt"))
