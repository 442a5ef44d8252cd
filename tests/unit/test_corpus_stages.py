from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys

import pytest

from intra_distillation_fairseq.corpus.stages import DataFolder, FileDigests, Stage, file_sha256, lock, read_json
from intra_distillation_fairseq.errors import UserError


class Recorder:
    """A folder with one stage "make" that writes raw/a (its text) and raw/b; counts how often it is made."""

    def __init__(self, path):
        self.path, self.made = path, 0

    def run(self, text="one", settings=None, inputs=None, force=False, fail=False):
        def make(out):
            self.made += 1
            (out / "raw").mkdir()
            (out / "raw" / "a").write_text(text)
            if fail:
                raise UserError("no")
            (out / "raw" / "b").write_text("b")
            return {"lines": 1}

        folder = DataFolder(self.path, force=force, say=lambda line: None)
        return folder.run(Stage("make", settings or {"x": 1}, inputs or {"in": "0" * 64}, make))


@pytest.fixture
def stage(tmp_path):
    return Recorder(tmp_path / "data")


def test_made_once(stage):
    first, second = stage.run(), stage.run()
    assert stage.made == 1 and first == second
    assert first["outputs"]["raw/a"]["sha256"] == file_sha256(stage.path / "raw/a")
    assert first["report"] == {"lines": 1}


@pytest.mark.parametrize("change", [{"settings": {"x": 2}}, {"inputs": {"in": "1" * 64}}, {"force": True}])
def test_made_again_when_something_has_changed(stage, change):
    stage.run()
    stage.run(text="two", **change)
    assert stage.made == 2 and (stage.path / "raw/a").read_text() == "two"


@pytest.mark.parametrize("harm", ["edit", "edit with the same size", "delete", "delete the stamp", "break the stamp"])
def test_made_again_when_an_output_is_not_what_it_was(stage, harm):
    stage.run()
    path = stage.path / "raw/a"
    stamp = stage.path / "stages/make.json"
    if harm == "edit":
        path.write_text("longer than it was")
    elif harm == "edit with the same size":
        path.write_text("eno")
        os.utime(path, ns=(1, 1))
    elif harm == "delete":
        path.unlink()
    elif harm == "delete the stamp":
        stamp.unlink()
    else:
        stamp.write_text('{"key": ')
    stage.run()
    assert stage.made == 2 and path.read_text() == "one"


def test_not_made_again_for_a_copied_folder(stage):
    stage.run()
    os.utime(stage.path / "raw/a", ns=(1, 1))
    stage.run()
    assert stage.made == 1


def test_failure_leaves_what_was_there(stage):
    stage.run()
    with pytest.raises(UserError):
        stage.run(text="two", settings={"x": 2}, fail=True)
    assert (stage.path / "raw/a").read_text() == "one"
    assert sorted(p.name for p in stage.path.iterdir()) == ["raw", "stages"]
    stage.run()
    assert stage.made == 2  # the failed one; the first is still good


def test_old_files_of_a_stage_go(stage):
    stage.run()
    (stage.path / "raw" / "left over").write_text("x")
    stage.run(force=True)
    assert sorted(p.name for p in (stage.path / "raw").iterdir()) == ["a", "b"]


def test_left_overs_of_a_killed_run_go(stage):
    (stage.path / ".making-make-abc" / "raw").mkdir(parents=True)
    stage.run()
    assert not list(stage.path.glob(".making*"))


def test_lock_names_its_holder(tmp_path):
    path = tmp_path / "data" / ".lock"
    with lock(path, "the data folder"):
        code = (
            "from pathlib import Path; import sys; sys.argv[0] = 'intra-distillation'\n"
            "from intra_distillation_fairseq.corpus.stages import lock\n"
            f"with lock(Path({str(path)!r}), 'the data folder'): pass"
        )
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert other.returncode == 1
        assert f"the data folder '{tmp_path / 'data'}' is in use by process {os.getpid()} on " in other.stderr
        assert "wait for it, or stop it first" in other.stderr
    with lock(path, "the data folder"), open(path) as stream, pytest.raises(BlockingIOError):
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match=r"the data folder '.*file/data' cannot be written \(Not a directory\)"),
        lock(tmp_path / "file" / "data" / ".lock", "the data folder"),
    ):
        pass


def test_digests_are_remembered_until_the_file_changes(tmp_path):
    text = tmp_path / "text"
    text.write_text("a")
    first = FileDigests(tmp_path / "known.json").sha256(text)
    known = read_json(tmp_path / "known.json")
    known[str(text)]["sha256"] = "remembered"
    (tmp_path / "known.json").write_text(json.dumps(known))
    assert FileDigests(tmp_path / "known.json").sha256(text) == "remembered"
    os.utime(text, ns=(1, 1))
    assert FileDigests(tmp_path / "known.json").sha256(text) == first == file_sha256(text)


def test_waiting_for_a_lock_says_so(tmp_path):
    path, said = tmp_path / "download" / ".lock", []
    path.parent.mkdir()
    with open(path, "w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        stream.write("process 4711 on elsewhere\n")
        stream.flush()

        def say(line):
            said.append(line)
            fcntl.flock(stream, fcntl.LOCK_UN)

        with lock(path, "the download folder", say):
            assert path.read_text().startswith(f"process {os.getpid()} on ")
    assert said == [f"the download folder '{path.parent}' is in use by process 4711 on elsewhere: waiting for it"]
