"""scripts/demo.sh --quick from end to end: invent, prepare, train both methods, evaluate, table and picture."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PNG = b"\x89PNG\r\n\x1a\n"


def demo(out: Path, *flags: str, **kwargs) -> subprocess.CompletedProcess:
    command = ["bash", str(ROOT / "scripts" / "demo.sh"), "--quick", "--out", str(out), *flags]
    return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, **kwargs)


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    """A quick demo that was stopped in its trainings and called again, in a folder with a space and an umlaut."""
    out = tmp_path_factory.mktemp("demo") / "a trüal"
    first = subprocess.Popen(
        ["bash", str(ROOT / "scripts" / "demo.sh"), "--quick", "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        # A shell's background jobs, these tests among them perhaps, ignore Ctrl-C, and bash cannot undo that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    said = ""
    for line in first.stdout:
        said += line
        if "train id_x: 10/30 updates" in line:
            first.send_signal(signal.SIGINT)
    assert first.wait() == 130, said
    assert "stopped by a signal at update" in said and ", saved: the same command goes on" in said
    assert not (out / "curves.png").exists()
    return out, demo(out)


def test_table(done):
    out, result = done
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.split("\n")
    header = next(number for number, line in enumerate(lines) if line.startswith("method"))
    assert lines[header].split() == ["method", "BLEU", "chrF", "valid", "loss", "updates", "seconds", "files"]
    names = [re.split(r"  +", line)[0] for line in lines[header + 2 : header + 6]]
    assert names == ["transformer", "id_x", "(copy the source)", "(most frequent sentence)"]
    assert (out / "results.txt").read_text(encoding="utf-8") in result.stdout


def test_results_are_those_of_the_runs(done):
    out, _ = done
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    for row in results[:2]:
        run = out / row["method"]
        score = json.loads((run / "eval" / "best" / "score.json").read_text(encoding="utf-8"))
        assert (row["bleu"], row["chrf"], row["valid_loss"]) == (score["bleu"], score["chrf"], score["valid_loss"])
        assert row["updates"] == 30
        assert 2 < row["valid_loss"] < 8  # log2 of 251 types is 7.97: it has begun to learn
        assert row["files"] == str(run.resolve())
    # Names and marks are the same in both languages, the rest is not.
    assert 0 < results[2]["bleu"] < 15
    assert results[3]["bleu"] < 15


def test_both_methods_had_the_same_start_data_and_updates(done):
    out, _ = done
    records = [json.loads((out / name / "run.json").read_text(encoding="utf-8")) for name in ("transformer", "id_x")]
    settings = [record["settings"] for record in records]
    for key in ("seed", "data_digest", "flags", "precision"):
        assert settings[0][key] == settings[1][key], key
    assert settings[0]["precision"] == "fp32"
    own = {key for key in settings[1]["options"] if settings[0]["options"].get(key) != settings[1]["options"][key]}
    assert all(key == "criterion" or key.startswith("id-") for key in own)


def test_picture(done):
    content = (done[0] / "curves.png").read_bytes()
    assert content.startswith(PNG)
    assert content[-8:-4] == b"IEND"
    width, height = int.from_bytes(content[16:20], "big"), int.from_bytes(content[20:24], "big")
    assert width > 1000
    assert height > 300


def test_a_second_call_does_nothing(done):
    out, first = done
    models = [out / name / "checkpoint_best.pt" for name in ("transformer", "id_x")]
    before = [path.stat().st_mtime_ns for path in models]
    again = demo(out)
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("already finished, nothing to do") == 2
    assert again.stderr.count("already evaluated, nothing to do") == 2
    assert again.stdout.split("method ")[1] == first.stdout.split("method ")[1]
    assert [path.stat().st_mtime_ns for path in models] == before


def test_another_seed_needs_another_folder(done):
    result = demo(done[0], "--seed", "2")
    assert result.returncode == 2
    assert "exists and is not the archive of seed 2 with 400 + 24 sentences: choose another file" in result.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--fast"], "demo.sh does not know '--fast': see bash scripts/demo.sh -h"),
        (["--out"], "--out needs a value: see bash scripts/demo.sh -h"),
        (["--seed", "one"], "--seed 'one': must be a whole number from 0 to 999999999"),
        (["--out", __file__], f"--out '{__file__}' is a file: give a folder"),
    ],
)
def test_bad_flags(flags, message):
    command = ["bash", str(ROOT / "scripts" / "demo.sh"), *flags]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "VENV": "/nowhere"})
    assert result.returncode == 1
    assert f"error: {message}" in result.stderr


def test_help_needs_no_installation():
    command = ["bash", str(ROOT / "scripts" / "demo.sh"), "-h"]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "VENV": "/nowhere"})
    assert result.returncode == 0
    for flag in ("--out DIR", "--seed N", "--quick"):
        assert flag in result.stdout
