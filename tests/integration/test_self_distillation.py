"""Self-distillation: the criterion in this process, fairseq-train with it, and the rounds of self_distill.sh."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from fairseq.criterions import CRITERION_REGISTRY
from fairseq.logging import metrics
from fairseq_commands import TINY_MODEL, TINY_RECIPE, TRAINING, USER_DIR, command
from in_process import gradient, make_criterion, make_model, make_task
from omegaconf import OmegaConf
from test_training import assert_same_parameters, logged

from intra_distillation_fairseq import checkpoints
from intra_distillation_fairseq.cli import main
from intra_distillation_fairseq.criterions.self_distillation import SelfDistillationCriterionConfig
from intra_distillation_fairseq.experiments.prepared import open_prepared
from intra_distillation_fairseq.files import file_sha256
from intra_distillation_fairseq.losses.divergence import x_divergence

SCRIPTS = Path(main.__file__).resolve().parents[2] / "scripts"
PLAIN = "--task translation_intra_distillation --criterion label_smoothed_cross_entropy --label-smoothing 0.1".split()
OURS = "--task translation_intra_distillation --criterion self_distillation --label-smoothing 0.1".split()


@pytest.fixture(scope="module")
def teacher(tiny_data, tmp_path_factory) -> Path:
    """A checkpoint of another size than the student's, trained for a few updates with much dropout."""
    folder = tmp_path_factory.mktemp("teacher")
    done = command(
        "train", tiny_data, "--user-dir", USER_DIR, "--save-dir", folder, *TINY_MODEL, *TRAINING, *PLAIN,
        "--encoder-layers", 2, "--decoder-ffn-embed-dim", 24, "--dropout", 0.5, "--max-update", 9,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "checkpoint_last.pt"


def distilling(task, teacher, **settings):
    defaults = {"label_smoothing": 0.1, "sentence_avg": False, "max_update": 100, "teacher": teacher and str(teacher)}
    cfg = OmegaConf.structured(SelfDistillationCriterionConfig(**{**defaults, **settings}))
    return CRITERION_REGISTRY["self_distillation"].build_criterion(cfg, task)


def taught_logits(teacher, sample):
    from fairseq.checkpoint_utils import load_model_ensemble_and_task

    (model,), _, _ = load_model_ensemble_and_task([str(teacher)])
    return model.eval()(**sample["net_input"])[0].detach()


def expected_terms(logits, taught, sample, pad, prefix=0):
    """(cross-entropy, KL, X-divergence) of some passes, summed over the tokens, as the formulas stand, in float64."""
    target = sample["target"][:, prefix:].reshape(-1)
    keep = target.ne(pad)
    lprobs = [torch.log_softmax(z[:, prefix:].flatten(0, 1).double(), -1)[keep] for z in logits]
    log_t = torch.log_softmax(taught[:, prefix:].flatten(0, 1).double(), -1)[keep]
    smoothed = torch.full_like(log_t, 0.1 / (log_t.size(-1) - 1)).scatter_(-1, target[keep, None], 0.9)
    cross_entropy = sum(-(smoothed * lp).sum() for lp in lprobs) / len(lprobs)
    kl = sum((log_t.exp() * (log_t - lp)).sum() for lp in lprobs) / len(lprobs)
    return cross_entropy, kl, x_divergence(lprobs).sum()


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize(("passes", "alpha"), [(1, 5.0), (2, 3.0), (3, 0.5)])
def test_loss_and_gradient_are_those_of_the_formula(task, sample, teacher, passes, alpha, prefix):
    """With dropout, so that it also shows that the teacher takes none of the student's random numbers."""
    model = make_model(task, dropout=0.3)
    criterion = distilling(
        task, teacher, id_num_passes=passes, id_alpha=alpha, id_alpha_schedule="constant", id_pass_mode="sequential",
        ignore_prefix_size=prefix,
    )  # fmt: skip
    torch.manual_seed(4)
    loss, sample_size, log, got = gradient(model, criterion, sample)
    assert sample_size == sample["ntokens"]

    model.zero_grad()
    torch.manual_seed(4)
    logits = [model(**sample["net_input"])[0] for _ in range(passes)]
    taught = taught_logits(teacher, sample)
    cross_entropy, kl, divergence = expected_terms(logits, taught, sample, task.target_dictionary.pad(), prefix)
    expected = cross_entropy + kl + (alpha * divergence if passes > 1 else 0)
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert log["loss"].item() == pytest.approx(loss)
    assert log["ls_loss"].item() == pytest.approx(cross_entropy.item(), rel=1e-5)
    assert log["kd_loss"].item() == pytest.approx(kl.item(), rel=1e-4)
    torch.testing.assert_close(
        got, torch.cat([p.grad.flatten() for p in model.parameters()]), rtol=1e-3, atol=1e-4
    )  # fmt: skip
    if passes > 1:
        assert log["id_loss"].item() == pytest.approx(divergence.item(), rel=1e-4)
        assert log["id_alpha"] == alpha
    else:
        assert not {"id_loss", "id_alpha"} & set(log)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("settings", [{}, {"sentence_avg": True, "report_accuracy": True}])
def test_a_teacher_that_agrees_leaves_label_smoothed_cross_entropy(task, sample, teacher, backend, settings):
    """Without dropout, the student's own parameters as its teacher: KL and its gradient are 0."""
    model = make_model(task)
    criterion = distilling(task, teacher, id_loss_backend=backend, **settings)
    criterion.teacher.model = make_model(task).eval()
    expected = gradient(model, make_criterion(task, "label_smoothed_cross_entropy", **settings), sample)
    got = gradient(model, criterion, sample)
    assert got[2]["kd_loss"].item() == 0.0
    assert got[0] == pytest.approx(expected[0], rel=1e-6)
    assert got[1] == expected[1]
    assert got[2]["nll_loss"].item() == pytest.approx(expected[2]["nll_loss"].item(), rel=1e-6)
    torch.testing.assert_close(got[3], expected[3], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["stacked", "recompute"])
def test_every_way_to_run_the_passes_gives_the_same(task, sample, teacher, mode):
    model = make_model(task)  # without dropout
    settings = {"id_num_passes": 2, "id_alpha_schedule": "constant"}
    expected = gradient(model, distilling(task, teacher, id_pass_mode="sequential", **settings), sample)
    got = gradient(model, distilling(task, teacher, id_pass_mode=mode, **settings), sample)
    assert got[0] == pytest.approx(expected[0], rel=1e-6)
    torch.testing.assert_close(got[3], expected[3], rtol=1e-4, atol=1e-5)


def test_the_teacher_is_no_part_of_the_criterion_and_never_changes(task, sample, teacher):
    model, criterion = make_model(task, dropout=0.3), distilling(task, teacher)
    frozen = criterion.teacher.model
    before = {name: value.clone() for name, value in frozen.state_dict().items()}
    assert not list(criterion.parameters()) and not criterion.state_dict()
    assert not any(module is frozen for module in criterion.modules())
    criterion.train()
    optimizer = torch.optim.SGD([*model.parameters(), *criterion.parameters()], lr=0.1)
    for _ in range(2):
        gradient(model, criterion, sample)
        optimizer.step()
    assert not any(module.training for module in frozen.modules())
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in frozen.parameters())
    assert all(torch.equal(before[name], value) for name, value in frozen.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_teacher_takes_the_students_type_and_the_divergence_stays_float32(task, sample, teacher, dtype):
    model, criterion = make_model(task).to(dtype), distilling(task, teacher)
    taught = criterion.teacher.logits(sample["net_input"], model)
    assert taught.dtype == dtype and not taught.requires_grad
    _, _, log, _ = gradient(model, criterion, sample)
    assert log["kd_loss"].dtype == torch.float32
    expected = gradient(make_model(task), distilling(task, teacher), sample)[2]["kd_loss"].item()
    assert log["kd_loss"].item() == pytest.approx(expected, rel=0.02)


def test_validation_is_fairseqs(task, sample, teacher):
    model = make_model(task, dropout=0.3)
    expected = task.valid_step(sample, model, make_criterion(task, "label_smoothed_cross_entropy"))
    got = task.valid_step(sample, model, distilling(task, teacher))
    assert got[0].item() == expected[0].item()
    assert set(got[2]) == set(expected[2])


@pytest.mark.parametrize("passes", [1, 2])
def test_logged_scalars_are_per_token_and_base_two(task, sample, teacher, passes):
    criterion = distilling(task, teacher, id_num_passes=passes, id_alpha_schedule="constant")
    loss, _, log, _ = gradient(make_model(task, dropout=0.3), criterion, sample)
    with metrics.aggregate() as aggregator:
        type(criterion).reduce_metrics([log, log])
    values = aggregator.get_smoothed_values()
    per_token = 1 / sample["ntokens"] / math.log(2)
    assert values["loss"] == pytest.approx(loss * per_token, abs=1e-3)
    for name in ("ls_loss", "nll_loss", "kd_loss"):
        assert values[name] == pytest.approx(log[name].item() * per_token, abs=1e-3)
    assert ("id_loss" in values, "id_alpha" in values) == (passes > 1, passes > 1)


def test_one_pass_needs_neither_schedule_nor_task(tiny_data, sample, teacher):
    stock = make_task(tiny_data, "translation")
    criterion = distilling(stock, teacher, id_alpha=-1.0, id_scale="unbiased", max_update=0)
    assert gradient(make_model(stock, dropout=0.3), criterion, sample)[2]["kd_loss"] > 0
    with pytest.raises(SystemExit, match="^error: --task is one that does not tell the criterion the update number"):
        distilling(stock, teacher, id_num_passes=2)


# -- what cannot be a teacher


def changed(teacher: Path, folder: Path, change) -> Path:
    """The teacher's checkpoint with something else in it."""
    state = checkpoints.load(teacher)
    change(state)
    path = folder / "changed.pt"
    checkpoints.write(state, path)
    return path


def refusal(task, teacher, **settings) -> str:
    with pytest.raises(SystemExit) as error:
        distilling(task, teacher, **settings)
    text = str(error.value)
    assert text.startswith("error: ") and "\n" not in text
    return text


def test_files_that_are_no_teacher(task, teacher, tmp_path):
    text, cut = tmp_path / "text.pt", tmp_path / "cut.pt"
    text.write_text("hello")
    cut.write_bytes(teacher.read_bytes()[:-2000])
    bare = changed(teacher, tmp_path, lambda state: state.update(cfg=None, args=None))
    assert (
        refusal(task, None) == "error: --teacher is missing: self_distillation needs the checkpoint of a trained model"
    )
    assert refusal(task, tmp_path / "no.pt") == f"error: --teacher: checkpoint '{tmp_path / 'no.pt'}' does not exist"
    assert f"--teacher '{tmp_path}' is a folder: give a checkpoint in it" in refusal(task, tmp_path)
    assert f"--teacher: checkpoint '{text}'" in refusal(task, text)
    assert f"--teacher: checkpoint '{cut}' is not a whole file" in refusal(task, cut)
    assert f"--teacher '{bare}' has no configuration" in refusal(task, bare)


def test_models_that_are_no_teacher(task, teacher, tmp_path):
    def forget(state):
        del state["model"]["encoder.layers.0.fc1.weight"]

    def rename(state):
        state["cfg"]["model"]._name = state["cfg"]["model"].arch = "no_such_model"

    broken = changed(teacher, tmp_path, forget)
    assert "encoder.layers.0.fc1.weight" in (text := refusal(task, broken))
    assert f"--teacher '{broken}' cannot be built over the dictionaries of this training (" in text
    unknown = changed(teacher, tmp_path, rename)
    assert refusal(task, unknown) == (
        f"error: --teacher '{unknown}' is a 'no_such_model', an architecture that neither fairseq nor this plugin has"
    )


def test_adaptive_softmax_is_refused_on_both_sides(train, tiny_data, task, teacher, tmp_path):
    flags = ["--max-update", 2, "--adaptive-softmax-cutoff", "10,20"]
    done = train(*OURS, "--teacher", teacher, *flags)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: --adaptive-softmax-cutoff is set: self_distillation compares distributions")
    done = train("--criterion", "adaptive_loss", "--ddp-backend", "legacy_ddp", *flags, save_dir=tmp_path / "adaptive")
    assert done.returncode == 0, done.stderr[-3000:]
    adaptive = tmp_path / "adaptive" / "checkpoint_last.pt"
    assert f"--teacher '{adaptive}' has an adaptive softmax" in refusal(task, adaptive)


def test_features_are_refused(task, sample, teacher):
    criterion = distilling(task, teacher, id_loss_input="features")
    with pytest.raises(SystemExit, match="^error: --id-loss-input is 'features', but the divergence from the teacher"):
        gradient(make_model(task), criterion, sample)


# -- dictionaries


@pytest.fixture
def prepared(tiny_data, tmp_path) -> Path:
    """The tiny corpus as a prepared data folder."""
    return make_prepared(tiny_data, tmp_path / "data für xx-en")


def make_prepared(tiny_data: Path, folder: Path) -> Path:
    (folder / "raw").mkdir(parents=True)
    shutil.copytree(tiny_data, folder / "bin")
    shutil.copy(tiny_data.parent / "test.en", folder / "raw" / "test.en")
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "source_lang": "xx", "target_lang": "en"}))
    return folder


def swap_types(data_bin: Path) -> None:
    """The same types under other numbers."""
    for name in ("dict.xx.txt", "dict.en.txt"):
        lines = (data_bin / name).read_text(encoding="utf-8").splitlines(keepends=True)
        lines[0], lines[1] = lines[1], lines[0]
        (data_bin / name).write_text("".join(lines), encoding="utf-8")


def trained_on(teacher: Path, folder: Path, data: Path, digest: str | None = None) -> Path:
    """The teacher as if it had been trained on other data; with a run.json beside it that knows the dictionaries."""
    folder.mkdir(exist_ok=True)
    if digest:
        record = {"format": 1, "dictionary_digest": digest, "data": str(data.parent)}
        (folder / "run.json").write_text(json.dumps(record))
    return changed(teacher, folder, lambda state: state["cfg"]["task"].update(data=str(data)))


def test_other_dictionaries_of_the_same_size_are_refused(task, teacher, tiny_data, tmp_path):
    other = shutil.copytree(tiny_data, tmp_path / "other")
    same = trained_on(teacher, tmp_path / "same", other)
    distilling(task, same)  # elsewhere, but the same
    swap_types(other)
    assert refusal(task, same) == (
        f"error: --teacher '{same}' was trained with other dictionaries (those of '{other}') than this training has "
        f"(those of '{tiny_data}'): train the student on the teacher's data, or give a teacher trained on this one"
    )


def test_other_dictionaries_of_another_size_are_refused(task, teacher, tiny_data, tmp_path):
    other = shutil.copytree(tiny_data, tmp_path / "other")
    with open(other / "dict.en.txt", "a", encoding="utf-8") as dictionary:
        dictionary.write("new 1\n")
    assert f"other dictionaries (those of '{other}')" in refusal(task, trained_on(teacher, tmp_path / "run", other))


def test_where_the_data_is_gone_the_run_folder_tells(prepared, teacher, tmp_path, caplog):
    task, gone = make_task(prepared / "bin"), tmp_path / "gone" / "bin"
    digest = open_prepared(prepared, ()).dictionary_digest
    with caplog.at_level(logging.WARNING):
        distilling(task, trained_on(teacher, tmp_path / "same", gone, digest))
    assert "dictionaries" not in caplog.text
    other = trained_on(teacher, tmp_path / "other", gone, "0" * 64)
    assert f"--teacher '{other}' was trained with other dictionaries (those of '{gone}')" in refusal(task, other)


def test_a_data_folder_that_was_prepared_again_is_not_believed(prepared, teacher, tiny_data, tmp_path):
    """The student trains on the new dictionaries, in the folder where the teacher's were."""
    digest = open_prepared(prepared, ()).dictionary_digest
    swap_types(prepared / "bin")
    stale = trained_on(teacher, tmp_path / "run", prepared / "bin", digest)
    assert "was trained with other dictionaries" in refusal(make_task(prepared / "bin"), stale)


def test_where_nothing_tells_sizes_are_compared(task, teacher, tmp_path, caplog):
    gone = tmp_path / "gone"
    with caplog.at_level(logging.WARNING):
        distilling(task, trained_on(teacher, tmp_path / "run", gone))
    assert f"are not in '{gone}' any more" in caplog.text and "only their sizes are compared" in caplog.text

    def grow(state):
        state["cfg"]["task"]["data"] = str(gone)
        for name, value in state["model"].items():
            if name.endswith(("decoder.embed_tokens.weight", "output_projection.weight")):
                state["model"][name] = torch.cat([value, value[:1]])

    assert "size mismatch" in refusal(task, changed(teacher, tmp_path, grow))


# -- fairseq-train


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--sentence-avg --report-accuracy",
        "--fp16 --fp16-no-flatten-grads --fp16-init-scale 4",
        "--bf16 --fp16-no-flatten-grads",
        "--memory-efficient-fp16 --fp16-init-scale 4",
        "--amp",
        "--id-num-passes 2 --id-alpha 1 --update-freq 2",
    ],
)
def test_trains_in_every_precision_and_learns_from_the_teacher(train, teacher, flags):
    done = train(*OURS, "--teacher", teacher, *flags.split(), "--max-update", 6, "--no-save")
    assert done.returncode == 0, done.stderr[-3000:]
    updates = logged(done.stdout)
    losses = [float(update["kd_loss"]) for update in updates]
    assert len(losses) == 6 and losses[-1] < losses[0]
    assert all(("id_loss" in update) == ("--id-num-passes" in flags) for update in updates)
    assert not {"valid_kd_loss", "valid_ls_loss", "valid_id_loss"} & set(logged(done.stdout, "valid")[0])


def test_resuming_equals_never_stopping_and_the_checkpoint_has_no_teacher(train, teacher, tmp_path):
    flags = [*OURS, "--teacher", teacher, "--update-freq", 2, "--max-update", 7]
    flags += ["--save-interval-updates", 1, "--keep-interval-updates", 1]
    whole = train(*flags, save_dir=tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr[-3000:]
    for _ in range(3):
        stopped = train(*flags, "--stop-time-hours", 1e-9, save_dir=tmp_path / "parts")
        assert stopped.returncode == 0, stopped.stderr[-3000:]
    rest = train(*flags, save_dir=tmp_path / "parts")
    expected, got = logged(whole.stdout)[3:], logged(rest.stdout)
    assert [update["num_updates"] for update in got] == ["4", "5", "6", "7"]
    assert [(u["loss"], u["kd_loss"]) for u in got] == [(u["loss"], u["kd_loss"]) for u in expected]
    assert_same_parameters(tmp_path / "whole" / "checkpoint_last.pt", tmp_path / "parts" / "checkpoint_last.pt")
    plain = train(*PLAIN, "--max-update", 1, save_dir=tmp_path / "plain")
    assert plain.returncode == 0, plain.stderr[-3000:]
    student, other = (checkpoints.load(tmp_path / name / "checkpoint_last.pt") for name in ("whole", "plain"))
    assert student["model"].keys() == other["model"].keys()
    assert student["criterion"] is None
    entries = [state["last_optimizer_state"]["state"] for state in (student, other)]
    assert len(entries[0]) == len(entries[1])


def test_validation_bleu_is_the_students(train, teacher, tmp_path):
    """Built through the student's task, the teacher would translate the validation set in its place."""
    scores = []
    for name, flags in (("plain", PLAIN), ("taught", [*OURS, "--teacher", teacher])):
        bleu = ["--eval-bleu", "--eval-bleu-args", '{"beam": 1, "max_len_b": 9}', "--eval-bleu-print-samples"]
        done = train(*flags, *bleu, "--lr", 0, "--max-update", 1, "--no-save", save_dir=tmp_path / name)
        assert done.returncode == 0, done.stderr[-3000:]
        scores.append([line.partition("example ")[2] for line in done.stdout.splitlines() if "example " in line])
    assert scores[0] == scores[1] != []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", "error: --teacher is missing: self_distillation needs the checkpoint of a trained model"),
        ("--teacher no/such.pt", "error: --teacher: checkpoint 'no/such.pt' does not exist"),
        ("--teacher TEACHER --id-num-passes 0", "error: --id-num-passes is 0: allowed is at least 1"),
    ],
)
def test_wrong_flags_end_with_one_line_and_no_checkpoint(train, teacher, tmp_path, flags, message):
    done = train(*OURS, *flags.replace("TEACHER", str(teacher)).split(), "--max-update", 5)
    assert done.returncode != 0
    assert done.stderr.strip().splitlines()[-1] == message
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.rglob("*.pt"))


# -- the rounds

CONFIG = (
    TINY_RECIPE
    + """
  label-smoothing: 0.1
  optimizer: adam
  lr: 0.005
  max-tokens: 300
  max-update: 6
  num-workers: 0
  log-interval: 1
methods:
  transformer: {criterion: label_smoothed_cross_entropy}
  id_x: {criterion: intra_distillation, id-num-passes: 2, id-alpha: 5, id-p: 5, id-q: 10}
evaluate: {beam: 1, max-len-a: 1.0, max-len-b: 5}
"""
)


def self_distill(*words: object) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    arguments = ["bash", str(SCRIPTS / "self_distill.sh"), *map(str, words)]
    return subprocess.run(arguments, capture_output=True, text=True, check=False, env=environment)


@pytest.fixture(scope="module")
def distilled(tiny_data, tmp_path_factory):
    """One round of students with two passes; (words of the command, results folder, what it printed)."""
    folder = tmp_path_factory.mktemp("rounds")
    data, config = make_prepared(tiny_data, folder / "data é"), folder / "tiny.yaml"
    config.write_text(CONFIG, encoding="utf-8")
    results = folder / "results 1"
    words = [data, "--rounds", 1, "--config", config, "--results", results, "--student", "id_x"]
    done = self_distill(*words, "--", "--cpu", "--log-interval", 2)
    assert done.returncode == 0, done.stdout + done.stderr
    return words, results, done


def here(capsys, *words: object) -> tuple[int, str]:
    capsys.readouterr()
    status = main.main(["self-distill", *map(str, words)])
    return status, capsys.readouterr().err


def test_rounds_and_table(distilled):
    _, results, done = distilled
    teacher, student = (results / f"round{number}" for number in (0, 1))
    record = json.loads((student / "run.json").read_text())
    checkpoint = teacher / "checkpoint_best.pt"
    taught = ["--criterion", "self_distillation", "--teacher", str(checkpoint)]
    assert record["settings"]["flags"] == [*taught, "--cpu", "--log-interval", "2"]
    assert record["settings"]["method"] == "id_x"
    assert json.loads((student / "teacher.json").read_text()) == {
        "checkpoint": str(checkpoint),
        "sha256": file_sha256(checkpoint),
    }
    log = logged((student / "train.log").read_text())
    assert {"kd_loss", "id_loss", "ls_loss"} <= set(log[0])
    table = json.loads((results / "table1.json").read_text())
    assert [row["method"] for row in table["rows"]] == ["transformer", "id_x"]
    assert [row["published"] for row in table["rows"]] == [33.07, None]
    assert table["of_paper"] is False
    for number, row in enumerate(table["rows"]):
        score = json.loads((results / f"round{number}" / "eval" / "best" / "score.json").read_text())
        assert (row["bleu"], row["valid_loss"]) == (score["bleu"], score["valid_loss"])
        assert {"std", "std_trimmed", "ratio", "gini"} <= set(row["sensitivity"])
    assert len({json.dumps(row["sensitivity_settings"], sort_keys=True) for row in table["rows"]}) == 1
    assert table["rows"][1]["change"] == table["rows"][1]["bleu"] - table["rows"][0]["bleu"]
    text = (results / "table1.md").read_text()
    assert done.stdout == text
    assert "published (another corpus)" in text and "not to be compared" in text and "| 1 (id_x student) |" in text
    lines = (results / "table1.tsv").read_text().splitlines()
    assert len(lines) == 3 and len({line.count("\t") for line in lines}) == 1


def test_what_is_finished_is_not_done_again(distilled):
    words, results, first = distilled
    written = [results / f"round{number}" / "eval" / "best" / "generate.txt" for number in (0, 1)]
    before = [path.stat().st_mtime_ns for path in written]
    again = self_distill(*words, "--skip-sensitivity", "--", "--cpu", "--log-interval", 2)
    assert again.returncode == 0, again.stderr
    assert again.stdout == first.stdout  # with the sensitivity that was measured before
    assert ": train, log: " not in again.stderr and again.stderr.count("already evaluated, nothing to do") == 2
    assert [path.stat().st_mtime_ns for path in written] == before


def test_a_student_of_another_teacher_is_refused(distilled, tmp_path, capsys):
    words, results, _ = distilled
    copy = shutil.copytree(results, tmp_path / "copy")
    words = [*words[:5], "--results", copy, *words[7:], "--", "--cpu", "--log-interval", 2]
    model = copy / "round0" / "checkpoint_best.pt"
    shutil.copy(copy / "round1" / "checkpoint_best.pt", model)
    status, said = here(capsys, *words)
    assert status == 2
    assert f"error: round 1: the teacher '{model}' is not the one that the student in '{copy / 'round1'}'" in said
    (copy / "round1" / "teacher.json").unlink()
    status, said = here(capsys, *words)
    assert status == 2 and "cannot be told to be the one (no 'teacher.json' there)" in said


def test_other_settings_are_refused_by_the_training(distilled):
    words, _, _ = distilled
    done = self_distill(*words, "--skip-sensitivity", "--", "--cpu", "--log-interval", 3)
    assert done.returncode == 2
    assert "holds a run with other settings" in done.stderr
    assert "error: failed in round 0" in done.stderr.splitlines()[-1]


def test_a_finished_baseline_is_taken_over(distilled, tmp_path):
    words, results, _ = distilled
    baseline = shutil.copytree(results / "round0", tmp_path / "baseline")
    words = [words[0], "--rounds", 1, *words[3:5], "--results", tmp_path / "new", "--baseline", baseline]
    done = self_distill(*words, "--skip-sensitivity", "--", "--cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "differs from what round 0 would be in its flags" in done.stderr
    assert not (tmp_path / "new" / "round0").exists()
    table = json.loads((tmp_path / "new" / "table1.json").read_text())
    assert [row["folder"] for row in table["rows"]] == [str(baseline), str(tmp_path / "new" / "round1")]
    assert table["rows"][1]["published"] == 34.87
    assert "id_loss" not in logged((tmp_path / "new" / "round1" / "train.log").read_text())[0]


def test_mistakes_are_found_before_anything_is_written(distilled, tiny_data, tmp_path, capsys):
    words, results, _ = distilled
    data, config = words[0], words[4]
    new = ["--config", config, "--results", tmp_path / "new"]

    def said(*flags: object) -> str:
        status, text = here(capsys, *flags)
        assert status == 2
        assert not (tmp_path / "new").exists()
        return text

    assert "--rounds '0': needed is a whole number, at least 1" in said(data, *new, "--rounds", 0)
    assert "method 'no' is not in" in said(data, *new, "--student", "no")
    assert "'--teacher' cannot be given after --: each round sets its own" in said(data, *new, "--", "--teacher", "x")
    assert "'--seed' cannot be given after --" in said(data, *new, "--", "--seed", "2")
    assert "is not a finished run of train.sh" in said(data, *new, "--baseline", tmp_path)
    other = make_prepared(tiny_data, tmp_path / "other")
    swap_types(other / "bin")
    text = said(other, *new, "--baseline", results / "round0")
    assert "was trained with other dictionaries (data folder" in text and f"than those of '{other}'" in text
