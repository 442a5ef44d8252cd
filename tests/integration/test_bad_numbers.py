"""Numbers that go wrong: each has one outcome, and the log names update, sentences and terms of the loss."""

import math
import re
from pathlib import Path

import pytest
import torch
from fairseq import options
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.logging import metrics
from fairseq.trainer import Trainer
from fairseq_commands import TINY_MODEL, TRAINING, command
from in_process import make_criterion, make_model, make_task
from several_processes import run_several
from test_training import logged, parameters
from tiny_corpus import write_corpus

from intra_distillation_fairseq.experiments.logs import TrainingLog
from intra_distillation_fairseq.losses.backends import BACKENDS
from intra_distillation_fairseq.losses.objective import Objective
from intra_distillation_fairseq.tasks.bad_numbers import MOST_SKIPPED_IN_A_ROW, SPIKE_FACTOR, SPIKE_MEMORY, RunningMean

OURS = "--task translation_intra_distillation --criterion intra_distillation --label-smoothing 0.1".split()
FLOAT16 = ["--fp16 --fp16-no-flatten-grads", "--memory-efficient-fp16"]
ELSEWHERE = "train on in another --save-dir with --continue-once CHECKPOINT"
PLANTED = ["--user-dir", Path(__file__).parent / "planted_numbers", "--arch", "planted_transformer"]


def planted(what: str, first: int, last: int, rank: int = 0) -> list:
    """Flags that spoil the training batches first to last of one process."""
    return [*PLANTED, "--plant", f"{what}:{first}:{last}:{rank}"]


def last_line(text: str) -> str:
    return text.strip().splitlines()[-1]


def skipped_updates(log: str) -> list[int]:
    return [int(update) for update in re.findall(r"update (\d+) skipped", log)]


def counted(log: str, name: str) -> int:
    """What the end-of-epoch lines add up to."""
    return sum(int(line.get(f"train_{name}", 0)) for line in logged(log, "train"))


def read(log: str) -> TrainingLog:
    """As train.sh reads it."""
    result = TrainingLog()
    for line in log.split("\n"):
        result.feed(line)
    return result


def assert_stopped_with_one_line(done, folder: Path) -> str:
    """Exit code 1 and one line, without a stack trace and without fairseq's crash.pt; returns the line."""
    assert done.returncode == 1, done.stderr[-3000:]
    assert "Traceback" not in done.stderr + done.stdout
    assert "Detected nan/inf" not in done.stdout  # fairseq's NanDetector, which prints every gradient
    assert not (folder / "crash.pt").exists()
    line = last_line(done.stderr)
    assert line.startswith("error: update ")
    assert done.stderr.count("error: ") == 1
    return line


def assert_finite_log(log: str) -> None:
    """Every number of every line; the ppl of a large loss may be infinite."""
    assert not re.search(r'"\w*(loss|gnorm|alpha)": "(nan|inf)"', log)


# overflow in float16


@pytest.mark.parametrize("precision", FLOAT16)
@pytest.mark.parametrize("task", ["translation_intra_distillation", "translation"])
def test_an_overflow_in_float16_is_skipped_and_counted(train, precision, task):
    flags = [*OURS, "--task", task, "--id-alpha-schedule", "constant", *precision.split()]
    done = train(*flags, "--fp16-init-scale", 2**20, "--max-update", 3, "--no-save")
    assert done.returncode == 0, done.stderr[-3000:]
    updates = logged(done.stdout)
    assert [u["num_updates"] for u in updates] == ["1", "2", "3"]
    skipped = skipped_updates(done.stdout)
    assert len(skipped) >= 3
    assert counted(done.stdout, "skipped") == len(skipped)
    assert float(updates[-1]["loss_scale"]) == 2**20 / 2 ** len(skipped)
    assert "setting loss scale to: 524288.0" in done.stdout
    assert_finite_log(done.stdout)
    if task == "translation_intra_distillation":
        assert re.search(r"update 1 skipped: .*; rank 0: sentences [\d ]+ \(loss \d.*ls_loss \d.*id_loss", done.stdout)


@pytest.mark.parametrize("precision", FLOAT16)
def test_the_least_loss_scale_stops_with_one_line(train, tmp_path, precision):
    flags = ["--fp16-init-scale", 2**20, "--min-loss-scale", 2**18, "--max-update", 3]
    line = assert_stopped_with_one_line(train(*OURS, *precision.split(), *flags), tmp_path / "run")
    assert line.startswith("error: update 1: Minimum loss scale reached")
    assert line.endswith(f"{ELSEWHERE}, an older one, and a lower --lr, or anew in bfloat16 or float32")


def test_overflows_that_lower_no_loss_scale_do_not_go_on_for_ever(train, tmp_path):
    flags = ["--fp16-init-scale", 2**20, "--threshold-loss-scale", 2**20, "--max-update", 3]
    line = assert_stopped_with_one_line(train(*OURS, *FLOAT16[1].split(), *flags), tmp_path / "run")
    assert f"the {MOST_SKIPPED_IN_A_ROW}th batch in a row" in line


# NaN


@pytest.mark.parametrize("what", ["nan", "inf", "nan-gradient"])
@pytest.mark.parametrize("criterion", ["intra_distillation", "label_smoothed_cross_entropy"])
def test_a_gradient_that_is_not_finite_is_skipped_and_counted(train, what, criterion):
    done = train(*OURS, "--criterion", criterion, "--max-update", 6, "--no-save", *planted(what, 3, 4))
    assert done.returncode == 0, done.stderr[-3000:]
    assert [u["num_updates"] for u in logged(done.stdout)] == ["1", "2", "3", "4", "5", "6"]
    assert skipped_updates(done.stdout) == [3, 3]
    assert counted(done.stdout, "skipped") == 2
    assert read(done.stdout).skipped == [3, 3]
    assert [u.get("skipped") for u in logged(done.stdout)] == [None, None, "2", "0", "0", "0"]
    assert_finite_log(done.stdout)


def test_a_loss_that_is_not_finite_is_no_overflow(train):
    """Nothing of the loss scale's: it is as it was, and the least one is never reached."""
    flags = [*FLOAT16[0].split(), "--fp16-init-scale", 4, "--min-loss-scale", 1, "--max-update", 3, "--no-save"]
    done = train(*OURS, *flags, *planted("nan", 2, 7))
    assert done.returncode == 0, done.stderr[-3000:]
    assert skipped_updates(done.stdout) == read(done.stdout).skipped == [2] * 6
    assert re.search(r"WARNING .* update 2 skipped: the gradient is not finite; rank 0: .*\(loss nan", done.stdout)
    assert counted(done.stdout, "skipped") == 6
    assert [float(u["loss_scale"]) for u in logged(done.stdout)] == [4, 4, 4]
    assert_finite_log(done.stdout)


def test_amp_on_a_cpu_is_float32_in_this_too(train):
    done = train(*OURS, "--amp", "--max-update", 4, "--no-save", *planted("nan", 2, 2))
    assert done.returncode == 0, done.stderr[-3000:]
    assert skipped_updates(done.stdout) == [2]


def test_the_policy_to_stop_names_update_sentences_and_terms(train, tmp_path):
    """Two batches an update: only the one with a term that is not finite is named, and checkpoints stay as they were."""
    flags = [*OURS, "--update-freq", 2, "--id-nan-policy", "stop"]
    flags += ["--save-interval-updates", 1, "--keep-interval-updates", 1]
    assert train(*flags, "--max-update", 2).returncode == 0
    last = tmp_path / "run" / "checkpoint_last.pt"
    before = last.read_bytes()
    # The checkpoint is that of another architecture's name with the same parameters.
    done = train(*flags, "--max-update", 9, *planted("nan", 2, 2))
    line = assert_stopped_with_one_line(done, tmp_path / "run")
    assert line.startswith("error: update 3: the gradient is not finite (norm nan); rank 0: sentences ")
    assert line.count("sentences ") == 1
    assert re.search(r"\(loss nan, ls_loss nan, nll_loss nan, id_loss nan, id_alpha \d", line)
    assert "the same command with --id-nan-policy skip goes on without this batch" in line
    assert line.endswith(ELSEWHERE)
    assert "--restore-file" not in line
    assert last.read_bytes() == before
    again = train(*flags, "--max-update", 4, *PLANTED)
    assert again.returncode == 0, again.stderr[-3000:]
    assert [u["num_updates"] for u in logged(again.stdout)] == ["3", "4"]


def test_the_policy_to_stop_holds_in_float16(train, tmp_path):
    """For a loss that is not finite; an overflow before it is skipped as ever."""
    flags = [*FLOAT16[1].split(), "--fp16-init-scale", 2**15, "--id-nan-policy", "stop", "--max-update", 9]
    done = train(*OURS, *flags, *planted("nan", 9, 10))
    line = assert_stopped_with_one_line(done, tmp_path / "run")
    update = 9 - len(skipped_updates(done.stdout))
    assert 1 < update < 9
    assert re.match(rf"error: update {update}: the gradient is not finite; rank 0: sentences [\d ]+ \(loss nan", line)


def test_with_finite_terms_every_batch_of_the_update_is_named(train, tmp_path):
    flags = ["--update-freq", 2, "--id-nan-policy", "stop", "--max-update", 4]
    done = train(*OURS, *flags, *planted("nan-gradient", 3, 3))
    line = assert_stopped_with_one_line(done, tmp_path / "run")
    assert len(re.findall(r"sentences [\d ]+ \(loss \d", line)) == 2


@pytest.mark.parametrize("precision", ["", FLOAT16[0]])
def test_a_model_that_is_nan_itself_stops(train, tmp_path, precision):
    flags = [*precision.split(), "--max-update", 9]
    line = assert_stopped_with_one_line(train(*OURS, *flags, *planted("nan", 3, 99)), tmp_path / "run")
    assert line.startswith("error: update 3: the gradient is not finite")
    assert f"the {MOST_SKIPPED_IN_A_ROW}th batch in a row that leads to no update" in line
    assert line.endswith(f"{ELSEWHERE}, an older one, and a lower --lr or a --clip-norm")


@pytest.mark.parametrize(("backend", "precision"), [("c10d", ""), ("legacy_ddp", FLOAT16[0])])
@pytest.mark.parametrize("policy", ["skip", "stop"])
def test_a_nan_in_one_rank_of_two_is_met_alike_by_both(tiny_data, tmp_path, backend, precision, policy):
    """Both name the guilty one; one line is in the log."""
    flags = [*OURS, "--ddp-backend", backend, *precision.split(), "--id-nan-policy", policy, "--max-update", 5]
    first, second = run_several(2, tiny_data, tmp_path / "run", *flags, *planted("nan", 2, 3, rank=1))
    named = r"update 2.*: the gradient is not finite( \(norm nan\))?; rank 1: sentences [\d ]+ \(loss nan"
    if policy == "stop":
        lines = [assert_stopped_with_one_line(done, tmp_path / "run") for done in (first, second)]
        assert lines[0] == lines[1]
        assert re.match(f"error: {named}", lines[0])
        assert "rank 0: " not in lines[0]
        return
    assert [done.returncode for done in (first, second)] == [0, 0], first.stderr[-3000:] + second.stderr[-3000:]
    assert len(re.findall(named, first.stdout)) == 2
    assert "rank 0: sentences" not in first.stdout + second.stdout
    assert read(first.stdout + second.stdout).skipped == [2, 2]  # in one file, as fairseq's own launch writes it
    assert counted(first.stdout, "skipped") == 2
    assert [u["num_updates"] for u in logged(first.stdout)] == ["1", "2", "3", "4", "5"]
    assert_finite_log(first.stdout)
    assert all(value.isfinite().all() for value in parameters(tmp_path / "run" / "checkpoint_last.pt").values())


# in this process: what an update leaves behind


@pytest.fixture
def make_trainer(tiny_data, tmp_path):
    """make_trainer(*flags): fairseq's trainer of a tiny model, as fairseq-train makes it."""

    def make(*flags: object) -> Trainer:
        arguments = [tiny_data, "--save-dir", tmp_path, *TINY_MODEL, *TRAINING, *OURS, "--max-update", 9, *flags]
        cfg = convert_namespace_to_omegaconf(
            options.parse_args_and_arch(options.get_training_parser(), [str(a) for a in arguments])
        )
        metrics.reset()
        task = make_task(tiny_data)
        task.load_dataset("train")
        torch.manual_seed(1)
        model, criterion = task.build_model(cfg.model), task.build_criterion(cfg.criterion)
        return Trainer(cfg, task, model, criterion)

    return make


def batches(trainer: Trainer) -> list[dict]:
    dataset = trainer.task.datasets["train"]
    return [dataset.collater([dataset[i] for i in range(start, start + 4)]) for start in (0, 4, 8)]


def spoiled(trainer: Trainer, sample: dict) -> None:
    """One update on a batch in which the model gives NaN."""
    projection = trainer.model.decoder.output_projection
    hook = projection.register_forward_hook(lambda module, inputs, output: output * float("nan"))
    try:
        assert trainer.train_step([sample]) is None
    finally:
        hook.remove()


KINDS = {
    "float32": "--optimizer adam",
    "sage": "--optimizer sage_adam",
    "bfloat16": "--bf16",
    "float16": FLOAT16[0],
    "memory-efficient float16": FLOAT16[1],
    "amp": "--amp",
}


def scale_as_on_a_gpu(trainer: Trainer, scale: float) -> None:
    """--amp; on a CPU fairseq switches its loss scale off."""
    trainer.optimizer._grad_scaler = torch.amp.GradScaler("cpu", init_scale=scale)


@pytest.mark.parametrize("kind", KINDS)
def test_a_skipped_update_leaves_everything_as_it_was(make_trainer, kind):
    """A training with a spoiled batch equals one without this batch, bit for bit."""
    states = []
    for spoil in (True, False):
        trainer = make_trainer(*KINDS[kind].split(), "--id-loss-input", "logits", "--clip-norm", 0.5)
        if kind == "amp":
            scale_as_on_a_gpu(trainer, 8.0)
        first, bad, last = batches(trainer)
        with metrics.aggregate("epoch"):
            trainer.train_step([first])
            if spoil:
                spoiled(trainer, bad)
            trainer.train_step([last])
            counts = metrics.get_smoothed_values("epoch")
        assert trainer.get_num_updates() == 2
        assert counts.get("skipped", 0) == spoil
        states.append([*trainer.model.state_dict().values(), *moments(trainer)])
        if kind in ("float16", "bfloat16"):
            states[-1] += [p.detach() for p in trainer.optimizer.fp32_params]
        if kind == "amp":
            states[-1].append(torch.tensor(list(trainer.optimizer.scaler.state_dict().values())))
        elif "fp16" in KINDS[kind]:
            states[-1].append(torch.tensor([value or 0.0 for value in vars(trainer.optimizer.scaler).values()]))
        # An exception must not leave fairseq's metrics switched on.
        assert len(metrics.get_active_aggregators()) == 1
    assert len(states[0]) == len(states[1])
    assert all(torch.equal(a, b) for a, b in zip(*states))


def test_under_amp_an_overflow_is_tried_again_and_then_skipped(make_trainer, caplog):
    trainer = make_trainer("--amp", "--amp-batch-retries", 1)
    scale_as_on_a_gpu(trainer, 2.0**127)
    first, last, _ = batches(trainer)
    with metrics.aggregate("epoch"), caplog.at_level("INFO"):
        trainer.train_step([first])
        assert metrics.get_smoothed_value("epoch", "skipped") == 1
        assert trainer.optimizer.scaler.get_scale() == 2.0**125
        scale_as_on_a_gpu(trainer, 8.0)
        trainer.train_step([last])
    (line,) = [line for line in caplog.messages if "skipped" in line]
    assert re.match(r"update 1 skipped: overflow in float16; rank 0: sentences 2 0 1 3 \(loss \d", line)
    assert trainer.get_num_updates() == 1


def test_the_batch_in_place_of_an_empty_share_is_named_as_such(make_trainer, caplog):
    """Times 0, a loss of NaN is NaN."""
    trainer = make_trainer()
    trainer.reset_dummy_batch(batches(trainer)[1])
    with metrics.aggregate("epoch"):
        spoiled(trainer, {})
    assert "rank 0: sentences 4 7 5 6 in place of an empty share (loss nan)" in caplog.text


def moments(trainer: Trainer) -> list[torch.Tensor]:
    state = trainer.optimizer.state_dict()["state"]
    return [value for values in state.values() for value in values.values() if torch.is_tensor(value)]


def all_padding(trainer: Trainer, sample: dict) -> dict:
    """The batch with nothing in its target."""
    target = torch.full_like(sample["target"], trainer.task.target_dictionary.pad())
    return {**sample, "target": target, "ntokens": 0}


@pytest.mark.parametrize("criterion", ["intra_distillation", "label_smoothed_cross_entropy", "self_teaching"])
@pytest.mark.parametrize("more", ["", "--sentence-avg", "--arch switch_transformer_small --switch-experts 2"])
def test_a_batch_of_padding_contributes_nothing(make_trainer, criterion, more):
    layers = ["--encoder-layers", 2, "--decoder-layers", 2]
    layers += ["--student-layers", 1] if criterion == "self_teaching" else []
    trainer = make_trainer(*layers, "--criterion", criterion, *more.split())
    sample = batches(trainer)[0]
    with metrics.aggregate("epoch"):
        trainer.train_step([all_padding(trainer, sample)])
        assert metrics.get_smoothed_value("epoch", "gnorm") == 0
        trainer.train_step([sample])
        expected = metrics.get_smoothed_value("epoch", "nll_loss")
        trainer.valid_step(all_padding(trainer, sample))
        assert metrics.get_smoothed_value("epoch", "nll_loss") == expected > 0
        trainer.train_step([all_padding(trainer, sample), sample])
        assert all(math.isfinite(value) for value in metrics.get_smoothed_values("epoch").values())
    assert trainer.get_num_updates() == 3


@pytest.mark.parametrize("mode", ["stacked", "sequential", "recompute"])
@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("loss_input", ["logits", "features"])
def test_beside_a_batch_of_padding_the_gradient_is_that_of_the_other(make_trainer, mode, backend, loss_input):
    flags = ["--id-pass-mode", mode, "--id-loss-backend", backend, "--id-loss-input", loss_input, "--dropout", 0]
    gradients = []
    for beside in (False, True):
        trainer = make_trainer(*flags, "--lr", 0)
        sample = batches(trainer)[0]
        with metrics.aggregate("epoch"):
            trainer.train_step([sample, all_padding(trainer, sample)] if beside else [sample])
        gradients.append(torch.cat([p.grad.flatten() for p in trainer.model.parameters()]))
    assert gradients[0].norm() > 0
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("loss_input", ["logits", "features"])
def test_a_prefix_that_covers_every_token_leaves_nothing(task, sample, loss_input):
    criterion = make_criterion(task, id_loss_input=loss_input, ignore_prefix_size=99)
    model = make_model(task, dropout=0.1).train()
    loss, _, _ = criterion(model, sample)
    loss.backward()
    assert loss == 0
    assert all(p.grad is None or (p.grad == 0).all() for p in model.parameters())


# odd sentences


@pytest.fixture(scope="module")
def odd_data(tmp_path_factory) -> Path:
    """An empty source, an empty target, both, and sentences of 40 and 80 words, in training and validation."""
    folder = tmp_path_factory.mktemp("odd corpus")
    write_corpus(folder, {"train": 20, "valid": 9})
    long = {"xx": [" ".join(["ka"] * n) for n in (40, 80)], "en": ["ka", " ".join(["ka"] * 80)]}
    for split in ("train", "valid"):
        for side, odd in (("xx", ["", "ka", ""]), ("en", ["ka", "", ""])):
            with open(folder / f"{split}.{side}", "a", encoding="utf-8") as file:
                file.write("".join(f"{line}\n" for line in [*odd, *long[side]]))
    done = command(
        "preprocess", "--source-lang", "xx", "--target-lang", "en", "--joined-dictionary", "--destdir", folder / "bin",
        "--trainpref", folder / "train", "--validpref", folder / "valid",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder / "bin"


@pytest.mark.parametrize("criterion", ["intra_distillation", "self_teaching"])
def test_empty_sources_and_targets_of_one_token_train(train, odd_data, criterion):
    """One sentence a batch, so that an end of sentence is all that there is in one."""
    flags = [*OURS, "--criterion", criterion, "--encoder-layers", 2, "--decoder-layers", 2, "--batch-size", 1]
    flags += ["--student-layers", 1] if criterion == "self_teaching" else []
    done = train(*flags, "--max-epoch", 1, "--max-update", 99, "--no-save", data=odd_data)
    assert done.returncode == 0, done.stderr[-3000:]
    updates = logged(done.stdout)
    assert len(updates) == 25
    assert "1" in {u["wpb"] for u in updates}
    assert float(logged(done.stdout, "valid")[0]["valid_bsz"]) == 1
    assert counted(done.stdout, "skipped") == 0
    assert_finite_log(done.stdout)


LIMITS = {
    "--max-source-positions 30 --max-target-positions 30": 2,
    "--max-target-positions 30": 1,
    "--max-tokens 60": 1,
}


@pytest.mark.parametrize("limit", LIMITS)
def test_long_sentences_are_left_out_and_counted(train, odd_data, limit):
    flags = [*OURS, "--batch-size", 5, "--max-epoch", 1, "--max-update", 99, "--no-save", *limit.split()]
    done = train(*flags, "--skip-invalid-size-inputs-valid-test", data=odd_data)
    assert done.returncode == 0, done.stderr[-3000:]
    counts = dict(re.findall(r"(\d+ of \d+) sentences of the set '(\w+)' are left out", done.stdout))
    assert counts == {f"{LIMITS[limit]} of 25": "train", f"{LIMITS[limit]} of 14": "valid"}
    assert sum(int(u["bsz"]) for u in logged(done.stdout)) == 25 - LIMITS[limit]


@pytest.mark.parametrize("limit", LIMITS)
def test_long_sentences_of_the_validation_stop_with_one_line(train, odd_data, tmp_path, limit):
    done = train(*OURS, "--max-update", 2, *limit.split(), data=odd_data)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    ids = "12 13" if LIMITS[limit] == 2 else "13"
    assert f"error: {LIMITS[limit]} of 14 sentences of the set 'valid' are longer than" in last_line(done.stderr)
    assert f": sentences {ids}: " in last_line(done.stderr)
    assert "--skip-invalid-size-inputs-valid-test" in last_line(done.stderr)
    assert not list(tmp_path.rglob("*.pt"))


def test_a_set_of_which_nothing_is_left_stops_with_one_line(train, odd_data):
    done = train(*OURS, "--max-update", 2, "--max-target-positions", 0, "--disable-validation", data=odd_data)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert last_line(done.stderr).startswith("error: 25 of 25 sentences of the set 'train' are longer than")


# spikes


@pytest.mark.parametrize(("clip", "outcome"), [(0, "not clipped (--clip-norm is 0)"), (1, "clipped to 1")])
def test_a_spike_is_noted_and_counted(train, clip, outcome):
    at = SPIKE_MEMORY + 5
    done = train(*OURS, "--max-update", at + 3, "--no-save", "--clip-norm", clip, *planted("huge", at, at))
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = re.findall(r"update \d+: a spike.*", done.stdout)
    assert line.startswith(f"update {at}: a spike: gradient norm ")
    assert f"{outcome}; rank 0: sentences " in line
    assert re.search(r"\(loss [\d.e+]+, ls_loss [\d.e+]+, nll_loss [\d.e+]+, id_loss [\d.e+]+, id_alpha", line)
    assert counted(done.stdout, "spikes") == 1
    assert read(done.stdout).spikes == [at]
    spike, after = (next(u for u in logged(done.stdout) if u["num_updates"] == str(n)) for n in (at, at + 3))
    assert float(spike["loss"]) > 100 > float(after["loss"])


def test_the_usual_norm_follows_a_lasting_change():
    mean = RunningMean()
    for _ in range(SPIKE_MEMORY):
        assert not mean.is_spike(1e9)  # nothing is usual yet
        mean.take(1.0)
    assert mean.value == pytest.approx(1.0)
    assert not mean.is_spike(0.99 * SPIKE_FACTOR)
    assert mean.is_spike(1.01 * SPIKE_FACTOR)
    spikes = 0
    while mean.is_spike(1e4):
        mean.take(1e4)
        spikes += 1
    assert 10 < spikes < 200


# the kernels of the loss


@pytest.mark.parametrize("divergence", ["x", "js"])
@pytest.mark.parametrize("weight", [0.0, 5.0])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_bad_logits_make_the_loss_bad_and_nothing_else(divergence, weight, bad):
    """No exception, and no finite loss from one back end where the definition has none."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 7, 11, generator=generator)
    target = torch.randint(2, 11, (7,), generator=generator)
    target[5] = 1  # padding
    objective = Objective(divergence, weight, 0.1, ignore_index=1)
    spoiled_logits, spoiled_padding = logits.clone(), logits.clone()
    spoiled_logits[1, 2, 3] = spoiled_padding[1, 5, 3] = bad
    for backend in (BACKENDS["reference"], BACKENDS["chunked"]):
        given = spoiled_logits.clone().requires_grad_()
        losses = backend.from_logits(given, target, objective)
        losses.loss.backward()
        assert not losses.loss.isfinite()
    features, projection = torch.randn(3, 7, 4, generator=generator), torch.randn(11, 4, generator=generator)
    features[1, 2, 3] = bad
    for backend in (BACKENDS["reference"], BACKENDS["chunked"]):
        assert not backend.from_features(features, projection, None, target, objective).loss.isfinite()
    # What stands at padding has no part in anything.
    given = spoiled_padding.requires_grad_()
    losses = BACKENDS["chunked"].from_logits(given, target, objective)
    losses.loss.backward()
    assert losses.loss.isfinite()
    assert given.grad.isfinite().all()
