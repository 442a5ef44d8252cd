from __future__ import annotations

import json
import os
import re
import shutil

import pytest

from intra_distillation_fairseq.corpus.stages import DataFolder, FileDigests, Stage
from intra_distillation_fairseq.errors import UserError
from intra_distillation_fairseq.files import file_sha256, read_json


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

        folder = DataFolder(self.path, ("raw", "manifest.json"), force=force, say=lambda line: None)
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


@pytest.mark.parametrize("harm", ["edit", "edit with the same size", "delete", "delete all"])
def test_made_again_when_an_output_is_not_what_it_was(stage, harm):
    stage.run()
    path = stage.path / "raw/a"
    if harm == "edit":
        path.write_text("longer than it was")
    elif harm == "edit with the same size":
        path.write_text("eno")
        os.utime(path, ns=(1, 1))
    elif harm == "delete":
        path.unlink()
    else:
        shutil.rmtree(path.parent)
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


def refused(stage, name):
    message = (
        f"'{stage.path / name}' is there and no stamp in '{stage.path / 'stages'}' says that it was made here: give "
        "another --out, or move it away"
    )
    with pytest.raises(UserError, match=re.escape(message)):
        stage.run()


def test_what_no_stage_made_is_never_replaced(stage):
    (stage.path / "raw").mkdir(parents=True)
    (stage.path / "raw/README").write_text("mine")
    refused(stage, "raw")
    assert sorted(p.relative_to(stage.path).as_posix() for p in stage.path.rglob("*")) == ["raw", "raw/README"]


def test_a_manifest_of_somebody_else_is_never_replaced(stage):
    stage.path.mkdir()
    (stage.path / "manifest.json").write_text("{}")
    refused(stage, "manifest.json")
    (stage.path / "manifest.json").unlink()
    stage.run()
    (stage.path / "manifest.json").write_text("{}")  # as the pipeline does after its stages
    stage.run()


@pytest.mark.parametrize("content", [None, "{", "[]", '{"key": "other"}'])
def test_without_its_stamp_an_output_counts_as_somebody_else_s(stage, content):
    stage.run()
    stamp = stage.path / "stages/make.json"
    stamp.unlink() if content is None else stamp.write_text(content)
    refused(stage, "raw")


@pytest.mark.parametrize("renames", [1, 2, 3])
def test_a_run_killed_while_it_publishes_goes_on(stage, monkeypatch, renames):
    """At the stamp before, at the rename, at the stamp after."""
    real, left = os.replace, [renames]

    def replace(*paths):
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        real(*paths)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        stage.run()
    assert (stage.path / "raw").exists() == (renames == 3)
    assert stage.run()["outputs"].keys() == {"raw/a", "raw/b"} and stage.made == 2


@pytest.mark.parametrize("place", ["raw/text", "raw", "link/text"])
def test_an_input_that_would_be_replaced_is_refused(tmp_path, place):
    (tmp_path / "raw").mkdir()
    (tmp_path / "link").symlink_to("raw")
    message = (
        f"the input '{tmp_path / place}' lies in '{tmp_path / 'raw'}', which is made anew: give another --out, or move "
        "the input"
    )
    with pytest.raises(UserError, match=re.escape(message)):
        DataFolder(tmp_path, ("spm", "raw"), inputs=(tmp_path / place,))
    assert not (tmp_path / "stages").exists()
