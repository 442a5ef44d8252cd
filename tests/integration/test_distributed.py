"""Training in 2 and 4 processes on the CPU: equal to one process with the matching --update-freq, whatever the flags."""

from __future__ import annotations

import itertools

import pytest
import torch
from fairseq.distributed import utils as distributed_utils
from fairseq_commands import TINY_MODEL, TRAINING, USER_DIR, Running, command
from in_process import make_criterion, make_model
from several_processes import several_processes
from test_training import OURS, assert_same_parameters, logged

from intra_distillation_fairseq import checkpoints
from intra_distillation_fairseq.passes import PASS_MODES
from intra_distillation_fairseq.tasks.rank_masks import RankMasksMixin

UPDATES = 20
TASK = "--task translation_intra_distillation --label-smoothing 0.1".split()
# Gradients of the bias of the keys are 0 but for rounding: with a larger epsilon Adam does not make steps of them.
SAME = f"--adam-eps 1e-4 --max-update {UPDATES} --no-epoch-checkpoints".split()
SCHEDULE = ["--id-p", 2, "--id-q", 10]
KINDS = {
    "intra_distillation": [*OURS, *SCHEDULE],
    "self_distillation": [*TASK, "--criterion", "self_distillation", "--id-num-passes", 2, *SCHEDULE],
    "self_teaching": [*TASK, "--criterion", "self_teaching", "--student-layers", 1, "--encoder-layers", 2,
                      "--decoder-layers", 2],
    "switch": [*OURS, *SCHEDULE, "--arch", "switch_transformer_small", "--switch-experts", 4],
    "sage_adam": [*OURS, *SCHEDULE, "--optimizer", "sage_adam"],
}  # fmt: skip
MODES = list(PASS_MODES)
BACKENDS = ["c10d", "legacy_ddp"]
# (kind, pass mode, backend, processes)
EVERY = [
    case
    for case in itertools.product(KINDS, MODES, BACKENDS, (2, 4))
    if case[0] != "self_teaching" or case[1] == "stacked"  # it has no modes
]
SAMPLE = [
    ("intra_distillation", "recompute", "c10d", 4),
    ("self_distillation", "sequential", "legacy_ddp", 2),
    ("self_teaching", "stacked", "c10d", 2),
    ("switch", "stacked", "c10d", 2),
    ("sage_adam", "recompute", "legacy_ddp", 2),
]


@pytest.fixture(scope="module")
def teacher(tiny_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    flags = [*TASK, "--criterion", "label_smoothed_cross_entropy", "--max-update", 9]
    done = command("train", tiny_data, "--user-dir", USER_DIR, "--save-dir", folder, *TINY_MODEL, *TRAINING, *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "checkpoint_last.pt"


def only_with_full(full: bool, case: object, sample: list) -> None:
    if not full and case not in sample:
        pytest.skip("only with --full")


def flags_of(kind, mode, teacher) -> list:
    flags = [*KINDS[kind], *SAME]
    flags += ["--teacher", teacher] if kind == "self_distillation" else []
    return flags if kind == "self_teaching" else [*flags, "--id-pass-mode", mode]


def assert_same_training(one, several, log_of_one, log_of_several, updates=UPDATES):
    """Losses and gradient norms of every update; parameters and Adam's averages of the gradients at the end."""
    expected, got = logged(log_of_one), logged(log_of_several)
    assert [u["num_updates"] for u in got] == [str(n + 1) for n in range(updates)]
    skipped = {"wps", "ups", "train_wall", "wall", "update"}
    for a, b in zip(expected, got, strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - skipped:
            last_digit = 1.1e-2 if name == "ppl" else 1.1e-3  # of what the log shows
            assert float(b[name]) == pytest.approx(float(a[name]), rel=1e-4, abs=last_digit), name
    a, b = (checkpoints.load(folder / "checkpoint_last.pt") for folder in (one, several))
    assert a["model"].keys() == b["model"].keys()
    for name in a["model"]:
        torch.testing.assert_close(b["model"][name], a["model"][name], rtol=1e-4, atol=1e-6)
    a, b = (state["last_optimizer_state"]["state"] for state in (a, b))
    assert a.keys() == b.keys() and a
    for number in a:
        torch.testing.assert_close(b[number]["exp_avg"], a[number]["exp_avg"], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("kind", "mode", "backend", "processes"), EVERY)
def test_processes_equal_one_with_update_freq(
    train, tiny_data, teacher, tmp_path, full, record_property, kind, mode, backend, processes
):
    only_with_full(full, (kind, mode, backend, processes), SAMPLE)
    # A batch of 7 sentences: 15 batches in an epoch, so that some process ends each with an empty one.
    flags = [*flags_of(kind, mode, teacher), "--dropout", 0, "--max-tokens", 5000, "--batch-size", 7]
    one = train(*flags, "--update-freq", processes, save_dir=tmp_path / "one")
    assert one.returncode == 0, one.stderr[-3000:]
    logs = several_processes(processes, tiny_data, tmp_path / "several", *flags, "--ddp-backend", backend)
    assert_same_training(tmp_path / "one", tmp_path / "several", one.stdout, logs[0])
    record_property("distributed trainings equal to one process", 1)


def batches_as_in_processes_of_their_own() -> None:
    """In one process with --update-freq: each batch of an update draws the masks that the process would that has it."""
    original, begun = RankMasksMixin.train_step, {}

    def train_step(self, sample, model, criterion, optimizer, update_num, *args, **kwargs):
        if begun.get("update") != update_num:
            begun.update(update=update_num, state=torch.get_rng_state(), rank=0)
        torch.set_rng_state(begun["state"])
        distributed_utils.get_global_rank = lambda rank=begun["rank"]: rank
        begun["rank"] += 1
        try:
            return original(self, sample, model, criterion, optimizer, update_num, *args, **kwargs)
        finally:
            distributed_utils.get_global_rank = real_rank

    real_rank = distributed_utils.get_global_rank
    RankMasksMixin.train_step = train_step


@pytest.mark.parametrize(
    ("mode", "backend", "loss_input"),
    list(itertools.product(["stacked", "recompute"], BACKENDS, ["features", "logits"])),
)
def test_with_dropout_each_process_has_its_own_masks(tiny_data, tmp_path, full, mode, backend, loss_input):
    """Equal to one process that gives each batch the masks of the process that would have it; so the passes differ."""
    sample = [("stacked", "c10d", "features"), ("recompute", "legacy_ddp", "logits")]
    only_with_full(full, (mode, backend, loss_input), sample)
    flags = [*flags_of("intra_distillation", mode, None), "--id-loss-input", loss_input, "--dropout", 0.3]
    words = ["--user-dir", USER_DIR, "--save-dir", tmp_path / "one", *TINY_MODEL, *TRAINING, *flags]
    one = Running("train", tiny_data, *words, "--update-freq", 2, before=batches_as_in_processes_of_their_own).wait()
    assert one.returncode == 0, one.stderr[-3000:]
    logs = several_processes(2, tiny_data, tmp_path / "several", *flags, "--ddp-backend", backend)
    assert all(float(u["id_loss"]) > 0 for u in logged(logs[0]))
    assert_same_training(tmp_path / "one", tmp_path / "several", one.stdout, logs[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_shard_changes_nothing(train, tiny_data, tmp_path, full, backend):
    """3 batches in an epoch: the fourth process has none, in training and in validation."""
    only_with_full(full, backend, ["legacy_ddp"])
    flags = [*flags_of("intra_distillation", "recompute", None), "--dropout", 0]
    flags += ["--max-tokens", 5000, "--batch-size", 34]
    one = train(*flags, "--update-freq", 4, save_dir=tmp_path / "one")
    logs = several_processes(4, tiny_data, tmp_path / "several", *flags, "--ddp-backend", backend)
    assert_same_training(tmp_path / "one", tmp_path / "several", one.stdout, logs[0])
    expected, got = (logged(text, "valid")[-1]["valid_loss"] for text in (one.stdout, logs[0]))
    assert float(got) == pytest.approx(float(expected), abs=2e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_batch_beside_an_empty_one_counts(train, tiny_data, tmp_path, full, backend):
    """P12: of 15 batches in an epoch the second process has 7, the last one in a group of two with an empty one."""
    only_with_full(full, backend, ["c10d"])
    flags = [*flags_of("intra_distillation", "sequential", None), "--dropout", 0]
    flags += ["--max-tokens", 5000, "--batch-size", 7]
    one = train(*flags, "--update-freq", 4, save_dir=tmp_path / "one")
    logs = several_processes(
        2, tiny_data, tmp_path / "several", *flags, "--update-freq", 2, "--ddp-backend", backend
    )  # fmt: skip
    assert_same_training(tmp_path / "one", tmp_path / "several", one.stdout, logs[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_processes_with_dropout_and_resume(tiny_data, tmp_path, full, backend):
    """The state broadcast at resume (P5); recompute equals sequential bit for bit inside the data-parallel wrapper."""
    only_with_full(full, backend, ["c10d"])
    flags = [*OURS, "--ddp-backend", backend, "--id-alpha-schedule", "constant"]
    several_processes(
        2, tiny_data, tmp_path / "sequential", *flags, "--id-pass-mode", "sequential", "--max-update", 4
    )  # fmt: skip
    for until in (2, 4):
        logs = several_processes(
            2, tiny_data, tmp_path / "recompute", *flags, "--id-pass-mode", "recompute", "--max-update", until
        )
    assert [u["num_updates"] for u in logged(logs[0])] == ["3", "4"]
    assert float(logged(logs[0])[-1]["id_loss"]) > 0
    assert_same_parameters(*(tmp_path / mode / "checkpoint_last.pt" for mode in ("sequential", "recompute")))


# -- dropout masks, without processes


class Backward:
    """As much of an optimiser as a task's train_step needs."""

    def backward(self, loss):
        loss.backward()


def masks(monkeypatch, task, sample, rank, seed=1, batches=1) -> list[bytes]:
    """What was dropped at each place in each pass over each batch of one update, in the process of this rank."""
    model = make_model(task, dropout=0.3).train()
    criterion = make_criterion(task, id_num_passes=2, id_pass_mode="sequential")
    seen = []
    for name, module in model.named_modules():
        if name.endswith("encoder.dropout_module"):
            module.register_forward_hook(lambda module, inputs, output: seen.append(output.eq(0).numpy().tobytes()))
    monkeypatch.setattr(distributed_utils, "get_global_rank", lambda: rank)
    torch.manual_seed(seed)  # as fairseq's trainer does before each update
    for _ in range(batches):
        task.train_step(sample, model, criterion, Backward(), update_num=0)
    assert len(seen) == 2 * batches
    return seen


def test_masks_differ_from_rank_to_rank_from_pass_to_pass_and_from_batch_to_batch(monkeypatch, task, sample):
    seen = [mask for rank in range(4) for mask in masks(monkeypatch, task, sample, rank, batches=2)]
    assert len(set(seen)) == len(seen) == 4 * 2 * 2


def test_masks_follow_from_the_seed(monkeypatch, task, sample):
    for rank in (0, 3):
        assert masks(monkeypatch, task, sample, rank) == masks(monkeypatch, task, sample, rank)
        assert masks(monkeypatch, task, sample, rank) != masks(monkeypatch, task, sample, rank, seed=2)


def test_the_first_process_draws_what_one_process_draws(monkeypatch, task, sample):
    first = masks(monkeypatch, task, sample, 0, batches=2)
    monkeypatch.setattr(
        RankMasksMixin, "train_step", lambda self, *args, **kw: super(RankMasksMixin, self).train_step(*args, **kw)
    )
    assert masks(monkeypatch, task, sample, 0, batches=2) == first
