"""fairseq-train, -generate, -interactive with the plugin: modes, precisions, resume, messages."""

import json
import re
import subprocess
import sys

import pytest
import torch
from fairseq_commands import TINY_MODEL, TRAINING, USER_DIR, command

from intra_distillation_fairseq.losses.divergence import DIVERGENCES
from intra_distillation_fairseq.passes import PASS_MODES

OURS = "--task translation_intra_distillation --criterion intra_distillation --label-smoothing 0.1".split()
MODES = list(PASS_MODES)


def logged(text: str, kind: str = "train_inner") -> list[dict]:
    """The JSON lines of one kind (train_inner: one per update; valid: one per validation) in fairseq's log."""
    return [json.loads(line) for line in re.findall(rf"\| {kind} \| (\{{.*\}})", text)]


def parameters(checkpoint) -> dict[str, torch.Tensor]:
    import intra_distillation_fairseq  # noqa: F401  makes checkpoints loadable

    return torch.load(checkpoint, weights_only=True)["model"]


def assert_same_parameters(a, b, **tolerance):
    a, b = parameters(a), parameters(b)
    assert set(a) == set(b)
    for name in a:
        if tolerance:
            torch.testing.assert_close(a[name], b[name], **tolerance)
        else:
            assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--sentence-avg",
        "--update-freq 2",
        "--bf16 --fp16-no-flatten-grads",
        "--fp16 --fp16-no-flatten-grads --fp16-init-scale 4",
        "--memory-efficient-fp16 --fp16-init-scale 4",
        "--amp",
        "--id-loss-input logits",
        "--id-loss-input logits --fp16 --fp16-no-flatten-grads --fp16-init-scale 4 --update-freq 2",
    ],
)
def test_trains_in_every_mode_and_precision(train, mode, flags):
    done = train(*OURS, *flags.split(), "--id-pass-mode", mode, "--max-update", 6, "--no-save")
    assert done.returncode == 0, done.stderr[-3000:]
    updates = logged(done.stdout)
    assert [u["num_updates"] for u in updates] == ["1", "2", "3", "4", "5", "6"]
    losses = [float(u["ls_loss"]) for u in updates]
    assert losses[-1] < losses[0]
    assert all(float(u["id_loss"]) > 0 for u in updates)
    validations = logged(done.stdout, "valid")
    assert validations
    assert "valid_id_loss" not in validations[0]


def test_bf16_really_is_bf16(train):
    flags = [*OURS, "--max-update", 8, "--no-save", "--dropout", 0]
    full, half = (train(*flags, *more) for more in ([], ["--bf16", "--fp16-no-flatten-grads"]))
    a, b = ([float(u["gnorm"]) for u in logged(done.stdout)] for done in (full, half))
    assert a != b
    assert a == pytest.approx(b, rel=0.1)


def test_alpha_follows_completed_updates_with_update_freq(train):
    done = train(*OURS, "--update-freq", 2, "--max-update", 10, "--id-p", 2, "--id-q", 10, "--no-save")
    assert done.returncode == 0, done.stderr[-3000:]
    # linear, as q = alpha * p: alpha' = 5 * (2 x / 10) up to x = 5, with x the updates completed before this one
    expected = [0, 1, 2, 3, 4, 5, 5, 5, 5, 5]
    assert [float(u["id_alpha"]) for u in logged(done.stdout)] == pytest.approx(expected)


@pytest.mark.parametrize("mode", MODES)
def test_resuming_in_a_later_epoch_equals_never_stopping(train, tmp_path, mode):
    """P2, and P8: alpha' right after the resume. An epoch has 2 updates: stopped after 1, 2 and 3 of 10."""
    flags = [*OURS, "--id-pass-mode", mode, "--update-freq", 2, "--max-update", 10, "--id-p", 1.25, "--id-q", 5]
    flags += ["--save-interval-updates", 1, "--keep-interval-updates", 1]
    whole = train(*flags, save_dir=tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr[-3000:]
    for _ in range(3):  # each stops after one update, and the next goes on
        stopped = train(*flags, "--stop-time-hours", 1e-9, save_dir=tmp_path / "parts")
        assert stopped.returncode == 0, stopped.stderr[-3000:]
    rest = train(*flags, save_dir=tmp_path / "parts")
    expected, got = logged(whole.stdout)[3:], logged(rest.stdout)
    assert [u["num_updates"] for u in got] == ["4", "5", "6", "7", "8", "9", "10"]
    assert got[0]["epoch"] == 2
    assert [(u["id_alpha"], u["loss"]) for u in got] == [(u["id_alpha"], u["loss"]) for u in expected]
    assert 0 < float(got[0]["id_alpha"]) < float(got[1]["id_alpha"]) < 5
    assert_same_parameters(tmp_path / "whole" / "checkpoint_last.pt", tmp_path / "parts" / "checkpoint_last.pt")


def test_id_alpha_in_the_log_is_the_one_in_force(train):
    """With a line every 3 updates it is that of the third, not a mean. Linear, as q = alpha * p: 5 * 2 x / 12."""
    done = train(*OURS, "--max-update", 6, "--id-p", 1, "--id-q", 5, "--log-interval", 3, "--no-save")
    assert [float(u["id_alpha"]) for u in logged(done.stdout)] == pytest.approx([5 * 2 / 6, 5 * 5 / 6], abs=1e-5)


def test_adaptive_softmax_is_refused_with_one_line(train, tmp_path):
    done = train(*OURS, "--max-update", 2, "--adaptive-softmax-cutoff", "10,20")
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("error: --adaptive-softmax-cutoff is set")
    assert not list(tmp_path.rglob("*.pt"))


@pytest.fixture(scope="module")
def trained(tiny_data, tmp_path_factory):
    save_dir = tmp_path_factory.mktemp("trained")
    done = command(
        "train", tiny_data, "--user-dir", USER_DIR, "--save-dir", save_dir, *TINY_MODEL, *TRAINING, *OURS, "--max-update", 8
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return save_dir / "checkpoint_last.pt"


@pytest.mark.parametrize("flags", [[], ["--task", "translation"]])
def test_generate_translates_every_sentence(tiny_data, trained, flags):
    """P1: 11 sentences, which fairseq alone cuts to 8; P4: the checkpoint loads."""
    done = command(
        "generate", tiny_data, "--user-dir", USER_DIR, "--path", trained, "--source-lang", "xx", "--target-lang", "en",
        "--cpu", "--beam", 2, "--max-len-b", 10, "--max-tokens", 300, *(flags or ["--task", "translation_intra_distillation"]),
        fresh=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(int(i) for i in re.findall(r"^H-(\d+)", done.stdout, re.M)) == list(range(11))


def test_interactive(tiny_data, trained):
    done = command(
        "interactive", tiny_data, "--user-dir", USER_DIR, "--path", trained, "--source-lang", "xx", "--target-lang", "en",
        "--cpu", "--beam", 2, "--max-len-b", 10, input="ka be\nmi to ru\n", fresh=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(re.findall(r"^H-\d+", done.stdout, re.M)) == 2


def test_validate(tiny_data, trained):
    done = command(
        "validate", tiny_data, "--user-dir", USER_DIR, "--task", "translation_intra_distillation", "--path", trained, "--cpu",
        "--max-tokens", 300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "valid" in done.stderr


def test_loading_from_python(tiny_data, trained):
    code = (
        "from fairseq.models.transformer import TransformerModel\n"
        f"model = TransformerModel.from_pretrained({str(trained.parent)!r}, 'checkpoint_last.pt', {str(tiny_data)!r}, "
        f"user_dir={str(USER_DIR)!r}, source_lang='xx', target_lang='en')\n"
        "print(model.translate('ka be', beam=2, max_len_b=10))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_other_criteria_under_this_task_are_fairseqs(train, tmp_path):
    """Same losses, same parameters, whichever of the two tasks trains label_smoothed_cross_entropy."""
    for task in ("translation", "translation_intra_distillation"):
        done = train(
            "--task", task, "--criterion", "label_smoothed_cross_entropy", "--label-smoothing", 0.1, "--max-update", 9,
            save_dir=tmp_path / task,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
    assert_same_parameters(
        *(tmp_path / t / "checkpoint_last.pt" for t in ("translation", "translation_intra_distillation"))
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--id-num-passes 1 --max-update 5", "error: --id-num-passes is 1: allowed is at least 2"),
        ("--max-epoch 1", "error: --max-update is 0: allowed is a number above 0"),
        ("--id-p 10 --id-q 5 --max-update 5", "error: --id-p is 10.0 and --id-q is 5.0: allowed is 0 < p < q"),
        ("--id-divergence kl --max-update 5", "argument --id-divergence: invalid choice: 'kl' (choose from {CHOICES})"),
        ("--id-loss-backend cuda --max-update 5", "argument --id-loss-backend: invalid choice: 'cuda'"),
        (
            "--task translation --max-update 5",
            "error: --task is one that does not tell the criterion the update number",
        ),
    ],
)
def test_wrong_flags_end_with_one_line_and_no_checkpoint(train, tmp_path, flags, message):
    done = train(*OURS, *flags.split())
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    # Before Python 3.12 argparse puts each choice into quotes.
    assert message.format(CHOICES=", ".join(DIVERGENCES)) in last.replace(
        ", ".join(map(repr, DIVERGENCES)), ", ".join(DIVERGENCES)
    )
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.rglob("*.pt"))


def test_all_dropout_at_zero_is_warned_about(train):
    done = train(*OURS, "--dropout", 0, "--max-update", 2, "--no-save")
    assert "every dropout of the model is 0: the 3 passes are identical" in done.stdout


def test_hydra_yaml(tiny_data, tmp_path):
    """The same run as a Hydra YAML (README)."""
    (tmp_path / "run.yaml").write_text(
        f"""
common: {{user_dir: "{USER_DIR}", cpu: true, seed: 1, log_format: json, log_interval: 1}}
checkpoint: {{save_dir: "{tmp_path / "ck"}"}}
task: {{_name: translation_intra_distillation, data: "{tiny_data}", source_lang: xx, target_lang: en}}
dataset: {{max_tokens: 300, num_workers: 0}}
criterion: {{_name: intra_distillation, label_smoothing: 0.1, id_num_passes: 2, id_divergence: js}}
optimizer: {{_name: adam, adam_betas: "(0.9,0.98)"}}
lr_scheduler: {{_name: inverse_sqrt, warmup_updates: 5}}
optimization: {{max_update: 4, lr: [0.001]}}
model: {{_name: transformer_small, encoder_layers: 1, decoder_layers: 1, encoder_embed_dim: 16, decoder_embed_dim: 16}}
hydra: {{run: {{dir: "{tmp_path / "hydra"}"}}}}
"""
    )
    done = command("hydra_train", "--config-dir", tmp_path, "--config-name", "run", fresh=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "ck" / "checkpoint_last.pt").exists()
    assert '"train_id_loss"' in (
        done.stdout + done.stderr + "".join(p.read_text() for p in (tmp_path / "hydra").glob("*.log"))
    )
