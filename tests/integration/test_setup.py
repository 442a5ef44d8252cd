"""scripts/setup.sh with an interpreter that only pretends to install: its decisions, messages and exit codes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Makes empty environments, notes what pip is asked for, fails where FAIL says so; anything else is done by a real Python.
PRETENDING = """#!/usr/bin/env bash
case "$1 $2" in
    "-m venv")
        dir=${@: -1}
        mkdir -p "$dir/bin" && cp "$0" "$dir/bin/python"
        printf '#!/bin/sh\\n' >"$dir/bin/intra-distillation" && chmod +x "$dir/bin/intra-distillation" ;;
    "-m pip")
        printf '%s\\n' "$*" >>"$CALLS"
        [ -z "$FAIL" ] || [[ "$*" != *"$FAIL"* ]] || { echo "no network here"; exit 1; } ;;
    *)
        [ -n "$HAS_TORCH" ] || [[ "$*" != *"import torch, sys"* ]] || exit 1
        exec "$REAL" "$@" ;;
esac
"""


@pytest.fixture
def setup(tmp_path):
    """setup(...) runs setup.sh of a copy of the repository, whose name has a space."""
    root = tmp_path / "a copy"
    shutil.copytree(ROOT / "scripts", root / "scripts")
    shutil.copy(ROOT / "setup.py", root)
    python = tmp_path / "python"
    python.write_text(PRETENDING)
    python.chmod(0o755)

    def run(*arguments: str, fail: str = "", has_torch: bool = False, **environment: str):
        (tmp_path / "calls").write_text("")
        done = subprocess.run(
            ["bash", root / "scripts/setup.sh", *arguments],
            capture_output=True,
            text=True,
            env={
                **{name: value for name, value in os.environ.items() if name not in ("TORCH_SPEC", "ID_VENV")},
                "PYTHON": str(python),
                "REAL": sys.executable,
                "CALLS": str(tmp_path / "calls"),
                "FAIL": fail,
                "HAS_TORCH": "yes" if has_torch else "",
                **environment,
            },
        )
        done.calls = (tmp_path / "calls").read_text()
        done.root = root
        return done

    return run


def test_installs_and_has_nothing_to_do_the_second_time(setup):
    first = setup()
    assert first.returncode == 0, first.stderr
    assert "install torch==2.13.0" in first.calls
    assert "--no-build-isolation fairseq-fixed==0.12.3.1" in first.calls
    assert "setup: complete in" in first.stderr
    second = setup()
    assert (second.returncode, second.calls, second.stderr) == (0, "", "")


def test_a_changed_setup_py_is_followed_in_place(setup):
    root = setup().root
    (root / ".venv" / "in use").touch()
    with open(root / "setup.py", "a") as file:
        file.write("# changed\n")
    again = setup()
    assert again.returncode == 0
    assert "-e" in again.calls
    assert "torch==" not in again.calls
    assert (root / ".venv" / "in use").exists()


def test_a_torch_that_is_there_is_kept(setup):
    done = setup(has_torch=True)
    assert done.returncode == 0, done.stderr
    assert "keeping the torch that" in done.stderr
    assert "install torch" not in done.calls


def test_torch_spec_may_hold_options(setup):
    assert (
        "install torch==2.11.0 --index-url file:///x\n" in setup(TORCH_SPEC="torch==2.11.0 --index-url file:///x").calls
    )


@pytest.mark.parametrize(("fail", "step"), [("torch==", "torch"), ("fairseq-fixed", "fairseq"), (" -e ", "package")])
def test_a_failure_names_the_step_and_its_log_and_is_made_good_by_the_next_run(setup, fail, step):
    done = setup(fail=fail)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"error: step '{step}' failed; its whole log is {done.root}/logs/setup/")
    assert "no network here" in done.stderr
    assert Path(last.rpartition(" is ")[2]).read_text() == "no network here\n"
    assert setup().returncode == 0


def test_a_folder_of_somebody_else_is_left_alone(setup, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter").write_text("dear")
    done = setup(ID_VENV=str(tmp_path / "mine"))
    assert done.returncode == 1
    assert f"error: '{tmp_path / 'mine'}' is not an environment that setup.sh made: remove it, or set" in done.stderr
    assert (tmp_path / "mine" / "letter").read_text() == "dear"
    assert done.calls == ""


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (["--fast"], {}, "error: setup.sh takes no argument, given '--fast': see bash scripts/setup.sh -h"),
        ([], {"PYTHON": "python0"}, "error: no interpreter 'python0': install Python 3.11 or newer, or set PYTHON="),
    ],
)
def test_messages(setup, arguments, environment, message):
    done = setup(*arguments, **environment)
    assert done.returncode == 1
    assert done.stderr.startswith(message)


def test_help(setup):
    assert "TORCH_SPEC  what pip installs where it has none" in setup("-h").stdout
