"""`intra-distillation doctor`: on this installation, on broken ones, and what it says of others."""

from __future__ import annotations

import inspect
import json
import os
import re
import signal
import subprocess
import sys
import tempfile

import pytest

from intra_distillation_fairseq import compat
from intra_distillation_fairseq.cli.main import main
from intra_distillation_fairseq.experiments import diagnosis, probes, processes, trial
from intra_distillation_fairseq.experiments.diagnosis import FAIL, OK, WARNING
from intra_distillation_fairseq.experiments.prepared import PreparedData

COMMAND = (sys.executable, "-c", "import sys; sys.argv[0] = 'intra-distillation'; "
           "from intra_distillation_fairseq.cli.main import main; sys.exit(main())", "doctor")  # fmt: skip


def doctor(*flags: object, **environment: object) -> subprocess.CompletedProcess:
    env = {**os.environ, **{name: str(value) for name, value in environment.items()}}
    return subprocess.run([*COMMAND, *map(str, flags)], capture_output=True, text=True, env=env, timeout=600)


def lines_of(done: subprocess.CompletedProcess) -> dict[str, str]:
    """Part -> its line."""
    table = done.stdout.split("\n\n")[0].split("\n")
    return {line[9:24].strip(): line for line in table}


def test_a_whole_installation(tmp_path):
    scratch, report = tmp_path / "temporary", tmp_path / "report.json"
    scratch.mkdir()
    done = doctor("--cpu", "--json", report, TMPDIR=scratch, OMP_NUM_THREADS=1)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    lines = lines_of(done)
    for part in ("python", "machine", "disk", "numpy", "torch", "gpu", "gloo", "fairseq", "batching", "plugin"):
        assert part in lines, done.stdout
    assert all(line.startswith((OK, WARNING)) for line in lines.values()), done.stdout
    called = re.findall(r"^    (\w+)\(\)", inspect.getsource(compat.install), re.M)
    others = {"allow_fairseq_checkpoints", "end_prefetching_at_exit", "let_ddp_run_on_cpu"}  # these wrap nothing
    assert len(called) > 15 and set(re.split(", | ", lines["plugin"])) >= set(called) - others
    assert {"loss reference", "loss chunked", "loss triton"} < lines.keys()
    trial_line = "10 updates with 3 passes on the CPU, resumed at 5, and a sentence translated, in "
    assert trial_line in lines["trial"]
    content = json.loads(report.read_text(encoding="utf-8"))
    assert content["environment"]["python"] and len(content["findings"]) == len(lines)
    assert not list(scratch.iterdir())


@pytest.mark.parametrize("blocked", [("torch",), ("fairseq", "sentencepiece")])
def test_what_is_missing_fails_with_its_remedy(blocked, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Missing:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.split('.')[0] in {blocked!r}:\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Missing())\n"
    )
    done = doctor(PYTHONPATH=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert not done.stderr
    lines = lines_of(done)
    for name in blocked:
        assert lines[name].startswith(FAIL) and f"No module named '{name}'" in lines[name], done.stdout
        assert lines[name].endswith("run bash scripts/setup.sh")
    assert lines["trial"].endswith("no training was tried: mend the failures above first")
    assert lines["numpy"].startswith(OK)
    failed = sum(line.startswith(FAIL) for line in lines.values())
    assert f"\n{failed} failed, " in done.stdout


def test_a_report_needs_a_folder(tmp_path, capsys):
    assert main(["doctor", "--json", str(tmp_path / "no" / "report.json")]) == 2
    assert "its folder does not exist: make it, or give another file" in capsys.readouterr().err
    assert main(["doctor", "--json", str(tmp_path)]) == 2
    assert "cannot be written: give the name of a file in a folder of yours" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import os; os.kill(os.getpid(), 11)", "killed by signal 11"),
        ("import sys; sys.exit('it is broken')", "it is broken"),
        ("print('chatter')", "exit status 0"),
    ],
)
def test_a_probe_without_an_answer(code, reason, monkeypatch):
    monkeypatch.setattr(probes, "_CHILD", code)
    (finding,) = diagnosis._probed("torch", diagnosis._torch)
    assert finding.status == FAIL and reason in finding.text and "setup.sh" in finding.advice


TORCH = {"version": "2.11.0+cu130", "cuda": "13.0", "threads": 8, "gpus": [], "distributed": {"gloo": None}}
GPU = {"name": "NVIDIA H200", "gib": 139.8, "capability": "9.0", "bf16": True}
FAIRSEQ = {
    "path": "/there/fairseq",
    "distributions": {"fairseq-fixed": "0.12.3.1"},
    "compiled": None,
    "plugin": None,
    "mended": {"a": True, "b": True},
}


@pytest.mark.parametrize(
    ("judge", "found", "part", "status", "text"),
    [
        ("_torch", {**TORCH, "gpus": [GPU]}, "gpu", OK, "NVIDIA H200, 140 GiB, capability 9.0, bfloat16"),
        ("_torch", {**TORCH, "version": "2.5.1"}, "torch", FAIL, "2.6 or newer is needed"),
        ("_torch", {**TORCH, "distributed": {"nccl": "no"}}, "nccl", WARNING, "does not work (no)"),
        ("_fairseq", FAIRSEQ, "plugin", OK, "functions of fairseq mended by a, b"),
        ("_fairseq", {**FAIRSEQ, "mended": {"a": True, "b": False}}, "plugin", FAIL, "not in place: b: another --user-dir"),
        ("_fairseq", {**FAIRSEQ, "distributions": {"fairseq": "0.12.2", "fairseq-fixed": "0.12.3.1"}}, "fairseq", FAIL,
         "overwrite each other"),
        ("_fairseq", {**FAIRSEQ, "distributions": {"fairseq": "1.0.0a0"}}, "fairseq", WARNING,
         "tried are fairseq 0.12.2 and fairseq-fixed 0.12.3.1"),
        ("_fairseq", {**FAIRSEQ, "compiled": "ImportError: x"}, "batching", FAIL, "compiled part is missing"),
        ("_fairseq", {**FAIRSEQ, "plugin": "ImportError: x"}, "plugin", FAIL, "cannot be imported (ImportError: x)"),
        ("_losses", {"chunked": "its values differ"}, "loss chunked", FAIL, "setup.sh"),
        ("_losses", {"triton": "it needs a CUDA GPU and ..."}, "loss triton", OK, "not to be used"),
        ("_losses", {"triton": "its kernels do not run"}, "loss triton", WARNING, "chunked is used instead"),
        ("_packages", {"sentencepiece": {"version": "0.2.0", "error": None}}, "sentencepiece", WARNING,
         "bytes and scores are those of 0.2.3"),
    ],
)  # fmt: skip
def test_what_is_said_of_other_installations(judge, found, part, status, text):
    finding = next(one for one in getattr(diagnosis, judge)(found) if one.part == part)
    assert finding.status == status and text in finding.line()


@pytest.fixture
def broken_trial(tmp_path, monkeypatch):
    """broken_trial(lines of a shell script): the trial with that instead of fairseq-train; its folders in tmp_path."""
    scratch = tmp_path / "temporary"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    monkeypatch.setattr(trial, "_prepare", lambda folder: PreparedData(folder, "xx", "en", "", ""))
    before = {name: os.environ.get(name) for name in ("TMPDIR", "TRITON_CACHE_DIR")}

    def run(script: str) -> diagnosis.Finding:
        fake = tmp_path / "fairseq-train"
        fake.write_text("#!/bin/sh\n" + script, encoding="utf-8")
        fake.chmod(0o755)
        monkeypatch.setattr(processes, "fairseq_command", lambda name: str(fake))
        try:
            with diagnosis._scratch() as folder:
                return diagnosis._trial(folder, cpu=True)
        finally:
            assert not list(scratch.iterdir()) and {name: os.environ.get(name) for name in before} == before

    return run


def test_a_training_that_fails(broken_trial):
    finding = broken_trial("echo before; echo it is broken; exit 3")
    assert (finding.status, finding.text) == (FAIL, "train: exit status 3, it is broken")
    assert finding.log == "before\nit is broken"


def test_a_training_that_does_not_train(broken_trial):
    finding = broken_trial("exit 0")
    assert (finding.status, finding.text) == (FAIL, "train: it ended at update 0 instead of 5")


def test_a_signal_leaves_nothing_behind(broken_trial):
    with pytest.raises(SystemExit) as caught:
        broken_trial(f"kill -TERM {os.getpid()}; exec tail -f /dev/null")
    assert caught.value.code == 128 + signal.SIGTERM


def test_a_value_that_is_not_the_reference_one_is_found(monkeypatch):
    import torch

    from intra_distillation_fairseq.losses import backends

    def wrong(*args):
        loss = backends.reference_from_features(*args)
        return loss._replace(loss=loss.loss * 1.01)

    monkeypatch.setitem(backends.BACKENDS, "wrong", backends.Backend(backends.reference, wrong))
    with pytest.raises(ArithmeticError, match="differ from those of reference by"):
        probes._compare_with_reference(backends, "wrong", torch.device("cpu"))
    probes._compare_with_reference(backends, "chunked", torch.device("cpu"))
