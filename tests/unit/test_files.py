"""Files written whole or not at all, and locks."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from intra_distillation_fairseq.errors import UserError
from intra_distillation_fairseq.files import lock, read_json, replacing, write_json, write_text


def test_a_failure_leaves_the_old_file(tmp_path):
    path = tmp_path / "a"
    write_text(path, "old\n")
    with pytest.raises(UnicodeEncodeError), replacing(path) as temporary:
        temporary.write_text("new\udc80", encoding="utf-8")
    assert path.read_bytes() == b"old\n" and os.listdir(tmp_path) == ["a"]


def test_the_bytes_are_on_the_disk_before_they_have_the_name(tmp_path, monkeypatch):
    steps = []

    def noting(real, name):
        return lambda *args: (steps.append(name), real(*args))[1]

    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, noting(getattr(os, name), name))
    write_text(tmp_path / "a", "new\n")
    assert steps == ["fsync", "replace"]


def test_leftovers_of_killed_processes_go_and_those_of_live_ones_stay(tmp_path):
    killed = subprocess.Popen([sys.executable, "-c", ""])
    killed.wait()
    host = socket.gethostname()
    live = {f".b.{host}.{os.getppid()}", f".b.elsewhere.{killed.pid}", f"b.{host}.{killed.pid}", f".b.{host}.x"}
    for name in (*live, f".a.{host}.{killed.pid}", f".b.{host}.{killed.pid}"):
        (tmp_path / name).touch()
    write_text(tmp_path / "a", "new\n")
    assert set(os.listdir(tmp_path)) == live | {"a"}


def test_what_a_killed_process_was_writing_goes_with_the_next_write(tmp_path):
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        "from intra_distillation_fairseq.files import replacing\n"
        "with replacing(Path(sys.argv[1])) as temporary:\n"
        "    temporary.write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "a"], check=False)
    assert [name.startswith(".a.") for name in os.listdir(tmp_path)] == [True]
    write_text(tmp_path / "a", "whole\n")
    assert os.listdir(tmp_path) == ["a"]


def test_text_and_mode(tmp_path):
    write_text(tmp_path / "a", "ü\r\n", mode=0o755)
    assert (tmp_path / "a").read_bytes() == "ü\r\n".encode()
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o755


def test_json(tmp_path):
    assert read_json(tmp_path / "a") is None
    write_json(tmp_path / "a", {"ü": 1})
    assert (tmp_path / "a").read_text(encoding="utf-8") == '{\n "ü": 1\n}\n'
    assert read_json(tmp_path / "a") == {"ü": 1}
    for broken in ("{", "[" * 100_000, "[1]"):
        (tmp_path / "a").write_text(broken)
        assert read_json(tmp_path / "a") is None


def test_lock_names_its_holder(tmp_path):
    path = tmp_path / "data" / ".lock"
    with lock(path, "the data folder"):
        code = (
            "from pathlib import Path; import sys; sys.argv[0] = 'intra-distillation'\n"
            "from intra_distillation_fairseq.files import lock\n"
            f"with lock(Path({str(path)!r}), 'the data folder'): pass"
        )
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert other.returncode == 1
        assert f"the data folder '{tmp_path / 'data'}' is in use by process {os.getpid()} on " in other.stderr
        assert "wait for it, or stop it first" in other.stderr
    with lock(path, "the data folder"), open(path) as stream, pytest.raises(BlockingIOError):
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.parametrize(
    ("folder", "reason"), [("{}/file/run", "Not a directory"), ("/proc/run", "No such file or directory")]
)
def test_folder_that_cannot_be_made(tmp_path, folder, reason):
    (tmp_path / "file").write_text("")
    path = Path(folder.format(tmp_path))
    message = f"the run folder '{path}' cannot be written ({reason}): give another folder, or free this one"
    with pytest.raises(UserError, match=re.escape(message)), lock(path / ".lock", "the run folder"):
        pass


def test_file_system_without_locks(tmp_path, monkeypatch):
    def flock(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    message = f"the run folder '{tmp_path}' cannot be locked (No locks available): give a folder on another file system"
    with pytest.raises(UserError, match=re.escape(message)), lock(tmp_path / ".lock", "the run folder"):
        pass


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


def test_a_holder_may_name_others(tmp_path):
    with lock(tmp_path / ".lock", "the run folder") as held:
        held.tell("train (process 4711)")
        with (
            pytest.raises(UserError, match=r"^the run folder '.*' is in use by train \(process 4711\) on .*: wait"),
            lock(tmp_path / ".lock", "the run folder"),
        ):
            pass


def test_a_child_that_inherits_the_lock_holds_it(tmp_path):
    with lock(tmp_path / ".lock", "the run folder") as held:
        child = subprocess.Popen(["sleep", "60"], pass_fds=(held.fileno(),))
    try:
        with pytest.raises(UserError, match="is in use by "), lock(tmp_path / ".lock", "the run folder"):
            pass
    finally:
        child.kill()
        child.wait()
    with open(tmp_path / ".lock", "a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_holder_that_is_killed_holds_nothing(tmp_path):
    code = (
        "import signal, sys; from pathlib import Path\n"
        "from intra_distillation_fairseq.files import lock\n"
        "with lock(Path(sys.argv[1]), 'the run folder'):\n"
        "    print('held', flush=True)\n"
        "    signal.pause()\n"
    )
    path = tmp_path / ".lock"
    holder = subprocess.Popen([sys.executable, "-c", code, path], stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(UserError, match=f"is in use by process {holder.pid} on "), lock(path, "the run folder"):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    assert f"process {holder.pid} " in path.read_text()  # which says nothing any more
    with lock(path, "the run folder"):
        assert path.read_text().startswith(f"process {os.getpid()} on ")
