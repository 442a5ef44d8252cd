"""Switch transformers through the real commands: criteria, precisions, processes, resume, generation, messages."""

import csv
import math
import re
import subprocess
import sys

import pytest
import torch
from fairseq_commands import TINY_MODEL, TRAINING, USER_DIR, command
from several_processes import several_processes
from test_training import assert_same_parameters, logged, parameters

SWITCH = ["--task", "translation_intra_distillation", "--arch", "switch_transformer_small"]
LSCE = "--criterion label_smoothed_cross_entropy --label-smoothing 0.1".split()
ID = "--criterion intra_distillation --label-smoothing 0.1 --id-pass-mode".split()
LAYERS = 2  # of TINY_MODEL: one encoder, one decoder layer


@pytest.mark.parametrize(
    "flags",
    [
        [*LSCE],
        ["--criterion", "cross_entropy", "--sentence-avg", "--update-freq", 2],
        [*LSCE, "--amp"],
        [*LSCE, "--bf16", "--fp16-no-flatten-grads"],
        [*LSCE, "--memory-efficient-fp16", "--fp16-init-scale", 4, "--switch-jitter", 0.01],
        [*ID, "stacked", "--fp16", "--fp16-no-flatten-grads", "--fp16-init-scale", 4],
        [*ID, "sequential", "--update-freq", 2],
        [*ID, "recompute", "--switch-expert-dropout", 0.2],
        [*ID, "recompute", "--memory-efficient-fp16", "--fp16-init-scale", 4],
    ],
    ids=lambda flags: " ".join(map(str, flags[1:])),
)
def test_trains_with_every_criterion_and_precision(train, flags):
    done = train(*SWITCH, *flags, "--max-update", 6, "--no-save")
    assert done.returncode == 0, done.stderr[-3000:]
    updates = logged(done.stdout)
    assert [u["num_updates"] for u in updates] == ["1", "2", "3", "4", "5", "6"]
    assert float(updates[-1]["nll_loss"]) < float(updates[0]["nll_loss"])
    for u in updates:
        assert 0.01 * LAYERS * 0.9 < float(u["balance_loss"]) < 0.01 * LAYERS * 2  # 0.01 per layer at perfect balance
        assert 0 <= float(u["dropped"]) < 0.5
    assert any(float(u["dropped"]) > 0 for u in updates)
    if "id_alpha" in updates[0]:  # the criterion still hears of the update number
        alphas = [float(u["id_alpha"]) for u in updates]
        assert alphas[0] == 0 < alphas[1] < 5 == alphas[2]
    validation = logged(done.stdout, "valid")[0]
    assert not any("balance" in name or "dropped" in name for name in validation)


def test_the_loss_is_added_to_training_and_not_to_validation(train, tmp_path):
    """At the first update the weight changes `loss` by the logged balance loss (base 2 there), and nothing else."""
    flags = [*SWITCH, *LSCE, "--max-update", 1, "--dropout", 0, "--lr", 0]
    without = train(*flags, "--switch-loss-weight", 0, save_dir=tmp_path / "without")
    with_loss = train(*flags, "--switch-loss-weight", 5, save_dir=tmp_path / "with")
    a, b = logged(without.stdout)[0], logged(with_loss.stdout)[0]
    assert float(a["balance_loss"]) == 0
    assert float(b["balance_loss"]) > 5 * LAYERS * 0.9
    assert float(b["loss"]) - float(a["loss"]) == pytest.approx(float(b["balance_loss"]) / math.log(2), abs=2e-3)
    assert a["nll_loss"] == b["nll_loss"]
    assert float(a["gnorm"]) != float(b["gnorm"])
    c, d = (logged(done.stdout, "valid")[0]["valid_loss"] for done in (without, with_loss))
    assert c == d


def test_no_capacity_limit_drops_nothing(train):
    done = train(*SWITCH, *LSCE, "--switch-experts", 3, "--switch-capacity-factor", 3, "--max-update", 3, "--no-save")
    assert done.returncode == 0, done.stderr[-3000:]
    assert [float(u["dropped"]) for u in logged(done.stdout)] == [0, 0, 0]


@pytest.mark.parametrize(("backend", "mode"), [("c10d", "recompute"), ("legacy_ddp", "stacked")])
def test_two_processes_equal_one_with_update_freq_two(train, tiny_data, tmp_path, backend, mode):
    """Some expert of some process is without a token now and then: c10d must not wait for its gradient."""
    flags = [*SWITCH, *ID, mode, "--dropout", 0.0, "--max-update", 5, "--switch-experts", 8, "--max-tokens", 60]
    one = train(*flags, "--update-freq", 2, save_dir=tmp_path / "one")
    assert one.returncode == 0, one.stderr[-3000:]
    logs = several_processes(2, tiny_data, tmp_path / "two", *flags, "--ddp-backend", backend)
    expected, got = logged(one.stdout), logged(logs[0])
    assert len(got) == 5
    for a, b in zip(expected, got):
        for name in ("loss", "balance_loss", "dropped"):
            assert float(a[name]) == pytest.approx(float(b[name]), abs=2e-3)
    assert_same_parameters(
        tmp_path / "one" / "checkpoint_last.pt", tmp_path / "two" / "checkpoint_last.pt", rtol=1e-3, atol=1e-4
    )


def test_resuming_equals_never_stopping(train, tmp_path):
    flags = [*SWITCH, *ID, "recompute", "--update-freq", 2, "--max-update", 4, "--save-interval-updates", 1]
    flags += ["--keep-interval-updates", 1, "--switch-jitter", 0.01, "--switch-expert-dropout", 0.1]
    whole = train(*flags, save_dir=tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr[-3000:]
    stopped = train(*flags, "--stop-time-hours", 1e-9, save_dir=tmp_path / "parts")
    assert stopped.returncode == 0, stopped.stderr[-3000:]
    rest = train(*flags, save_dir=tmp_path / "parts")
    names = ("num_updates", "loss", "balance_loss", "dropped")
    expected, got = ([[u[n] for n in names] for u in logged(done.stdout)] for done in (whole, rest))
    assert got == expected[1:]
    assert len(got) == 3
    assert_same_parameters(tmp_path / "whole" / "checkpoint_last.pt", tmp_path / "parts" / "checkpoint_last.pt")


@pytest.fixture(scope="module")
def trained(tiny_data, tmp_path_factory):
    """Trained until it translates; a checkpoint after each of the last two epochs."""
    save_dir = tmp_path_factory.mktemp("trained switch")
    done = command(
        "train", tiny_data, "--user-dir", USER_DIR, "--save-dir", save_dir, *TINY_MODEL, *TRAINING, *SWITCH, *LSCE,
        "--max-update", 60, "--keep-last-epochs", 2, "--log-interval", 100,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return save_dir / "checkpoint_last.pt"


def translations(tiny_data, path, *flags) -> dict[int, tuple[str, float]]:
    """Sentence number -> translation and score, of fairseq-generate."""
    done = command(
        "generate", tiny_data, "--user-dir", USER_DIR, "--path", path, "--source-lang", "xx", "--target-lang", "en",
        "--cpu", "--beam", 2, "--max-len-b", 10, *flags,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    lines = re.findall(r"^H-(\d+)\t(\S+)\t(.*)", done.stdout, re.M)
    return {int(number): (text, float(score)) for number, score, text in lines}


@pytest.mark.parametrize("task", ["translation", "translation_intra_distillation"])
def test_generate_does_not_depend_on_the_batch(tiny_data, trained, task):
    """All eleven sentences at once, and each alone; under the stock task, too."""
    together, alone = (translations(tiny_data, trained, "--task", task, "--batch-size", size) for size in (11, 1))
    assert set(together) == set(alone) == set(range(11))
    for number, (text, score) in together.items():
        assert alone[number][0] == text
        assert alone[number][1] == pytest.approx(score, abs=1e-3)


def test_average_of_checkpoints_translates(tiny_data, trained, tmp_path):
    from intra_distillation_fairseq import checkpoints

    epochs = sorted(trained.parent.glob("checkpoint[0-9]*.pt"))
    assert len(epochs) == 2
    checkpoints.average(epochs, tmp_path / "average.pt")
    mean = parameters(tmp_path / "average.pt")["encoder.layers.0.fc1.w1"]
    torch.testing.assert_close(mean, sum(parameters(e)["encoder.layers.0.fc1.w1"] for e in epochs) / 2)
    assert len(translations(tiny_data, tmp_path / "average.pt")) == 11


def test_loading_from_python(tiny_data, trained):
    code = (
        "from fairseq.models.transformer import TransformerModel\n"
        f"model = TransformerModel.from_pretrained({str(trained.parent)!r}, 'checkpoint_last.pt', {str(tiny_data)!r}, "
        f"user_dir={str(USER_DIR)!r}, source_lang='xx', target_lang='en')\n"
        "assert type(model.models[0]).__name__ == 'SwitchTransformerModel'\n"
        "print(model.translate('ka be', beam=2, max_len_b=10))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--task", "translation"], "error: --task is one that does not add the load-balancing loss"),
        (["--switch-experts", 0], "error: --switch-experts is '0': allowed is at least 1"),
        (["--checkpoint-activations"], "error: --checkpoint-activations (or --offload-activations) is set"),
    ],
)
def test_wrong_flags_end_with_one_line_and_no_checkpoint(train, tmp_path, flags, message):
    done = train(*SWITCH, *LSCE, "--max-update", 2, *flags)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith(message)
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.rglob("*.pt"))


def test_hydra_yaml(tiny_data, tmp_path):
    (tmp_path / "run.yaml").write_text(
        f"""
common: {{user_dir: "{USER_DIR}", cpu: true, seed: 1, log_format: json, log_interval: 1}}
checkpoint: {{save_dir: "{tmp_path / "ck"}"}}
task: {{_name: translation_intra_distillation, data: "{tiny_data}", source_lang: xx, target_lang: en}}
dataset: {{max_tokens: 300, num_workers: 0}}
criterion: {{_name: label_smoothed_cross_entropy, label_smoothing: 0.1}}
optimizer: {{_name: adam}}
lr_scheduler: {{_name: fixed}}
optimization: {{max_update: 2, lr: [0.001]}}
model: {{_name: switch_transformer_small, switch_experts: 3, encoder_layers: 1, decoder_layers: 1, encoder_embed_dim: 16,
  decoder_embed_dim: 16}}
hydra: {{run: {{dir: "{tmp_path / "hydra"}"}}}}
""",
        encoding="utf-8",
    )
    done = command("hydra_train", "--config-dir", tmp_path, "--config-name", "run")
    assert done.returncode == 0, done.stderr[-3000:]
    assert parameters(tmp_path / "ck" / "checkpoint_last.pt")["decoder.layers.0.fc1.w1"].size(0) == 3


def test_the_benchmark_runs(tmp_path):
    script, out = USER_DIR.parent / "benchmarks" / "switch.py", tmp_path / "new folder" / "switch.csv"
    done = subprocess.run([sys.executable, script, "--quick", "--out", out], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    with open(out, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    archs = ["transformer_small", "switch_transformer_small"]
    assert [(row["phase"], row["arch"]) for row in rows] == [(p, a) for p in ("step", "update") for a in archs]
    assert all(float(row["ms"]) > 0 and int(row["repeats"]) == 2 for row in rows)
    assert [float(row["ratio"]) for row in rows[::2]] == [1, 1]
