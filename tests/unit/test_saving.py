"""Checkpoints: written whole or not at all, damage seen, the newest whole one found."""

import errno
import os
import random
import resource
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fairseq import checkpoint_utils
from fairseq.dataclass.configs import CheckpointConfig
from fairseq.file_io import PathManager
from omegaconf import OmegaConf

import intra_distillation_fairseq  # noqa: F401  puts the mends in place
from intra_distillation_fairseq.compat.restoring import _or_error, choose
from intra_distillation_fairseq.whole_checkpoints import LAST, damage, newest_whole, set_aside

BLOCK = 65536


def state(update: int, numbers: int = 1000) -> dict:
    return {
        "model": {f"layer{i}": torch.full((numbers,), float(update + i)) for i in range(8)},
        "optimizer_history": [{"num_updates": update}],
        "extra_state": {"train_iterator": {"epoch": 1}, "val_loss": None},
    }


def save(path: Path, update: int) -> Path:
    torch.save(state(update), path)
    return path


def cut(path: Path, size: int) -> None:
    with open(path, "r+b") as file:
        file.truncate(size)


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> bytes:
    """The bytes of a checkpoint of 6.4 MB."""
    path = tmp_path_factory.mktemp("large") / "checkpoint.pt"
    torch.save(state(3, 200_000), path)
    assert damage(path) is None
    return path.read_bytes()


def test_a_checkpoint_cut_at_any_block_is_seen(large, tmp_path, record_property):
    path = tmp_path / "cut.pt"
    path.write_bytes(large)
    sizes = [len(large) - 1, *range((len(large) - 1) // BLOCK * BLOCK, -1, -BLOCK)]  # ends at 0, an empty file
    for size in sizes:
        cut(path, size)
        assert damage(path), size
    record_property("files truncated", len(sizes))


def test_a_checkpoint_cut_near_its_end_is_seen(large, tmp_path, record_property):
    """Where the directory of the archive is: every byte of it."""
    path = tmp_path / "cut.pt"
    path.write_bytes(large)
    for missing in range(1, 1500):
        cut(path, len(large) - missing)
        assert damage(path), missing
    record_property("files truncated", 1499)


def test_a_flipped_bit_in_a_parameter_is_seen(large, tmp_path, full, record_property):
    """torch.load sees none of them."""
    path = tmp_path / "flipped.pt"
    path.write_bytes(large)
    rng = random.Random(1)
    places = [rng.randrange(BLOCK, len(large) - BLOCK) for _ in range(300 if full else 30)]
    flipped = 0
    with open(path, "r+b") as file:
        for place in places:
            if not any(large[place - 64 : place + 64]):
                continue  # padding between the records
            _write(file, place, large[place] ^ 1 << rng.randrange(8))
            assert damage(path), place
            _write(file, place, large[place])
            flipped += 1
    assert damage(path) is None
    assert flipped > 20
    record_property("bits flipped", flipped)


def _write(file, place: int, value: int) -> None:
    file.seek(place)
    file.write(bytes([value]))
    file.flush()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it is empty"),
        (bytes(5000), "it is cut off or damaged: 5,000 bytes"),
        (b"<html>not found</html>", "it is cut off or damaged: 22 bytes"),
    ],
)
def test_what_is_no_checkpoint_at_all_is_seen(tmp_path, content, reason):
    (tmp_path / "c.pt").write_bytes(content)
    assert damage(tmp_path / "c.pt").startswith(reason)


def test_the_format_without_checksums_is_left_to_torch(tmp_path):
    torch.save(state(1), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert damage(tmp_path / "old.pt") is None


def test_a_file_that_cannot_be_opened_is_not_called_damaged(tmp_path):
    with pytest.raises(FileNotFoundError):
        damage(tmp_path / "none.pt")


def test_setting_aside_replaces_nothing(tmp_path):
    names = [set_aside(save(tmp_path / LAST, update)).name for update in (1, 2, 3)]
    assert names == [f"{LAST}.damaged", f"{LAST}.damaged2", f"{LAST}.damaged3"]


def test_the_newest_is_that_of_most_updates_whatever_its_name_and_time(tmp_path):
    save(tmp_path / "checkpoint_best.pt", 30)
    save(tmp_path / "checkpoint2.pt", 20)
    save(tmp_path / "checkpoint_1_9.pt", 9)
    save(tmp_path / "checkpoint_1_9.pt.tmp", 90)
    save(tmp_path / "model.pt", 100)
    save(tmp_path / LAST, 50)
    assert newest_whole(tmp_path) == (tmp_path / "checkpoint_best.pt", {})
    (tmp_path / "checkpoint_best.pt").unlink()
    assert newest_whole(tmp_path).path == tmp_path / "checkpoint2.pt"


def test_a_whole_last_checkpoint_is_taken(tmp_path):
    save(tmp_path / LAST, 5)
    save(tmp_path / "checkpoint_1_9.pt", 9)
    assert choose(tmp_path) == (LAST, [], "")


def test_a_folder_without_checkpoints_is_a_first_start(tmp_path):
    assert choose(tmp_path) == (LAST, [], "")
    assert choose(tmp_path / "none") == (LAST, [], "")


def test_a_damaged_last_checkpoint_is_set_aside_for_the_newest_whole_one(tmp_path):
    last = save(tmp_path / LAST, 9)
    cut(last, 3000)
    cut(save(tmp_path / "checkpoint_2_8.pt", 8), 3000)
    save(tmp_path / "checkpoint1.pt", 6)
    save(tmp_path / "checkpoint_1_2.pt", 2)
    choice = choose(tmp_path)
    assert choice.restore_file == str(tmp_path / "checkpoint1.pt")
    assert choice.error == ""
    first, second = choice.warnings
    assert f"checkpoint '{tmp_path}/checkpoint_2_8.pt' is not taken: it is cut off or damaged: 3,000 bytes" in first
    assert second.startswith(f"checkpoint '{last}' is not taken: it is cut off or damaged: 3,000 bytes")
    assert second.endswith(
        f"set aside as '{LAST}.damaged'; going on from the newest whole one, {tmp_path}/checkpoint1.pt"
    )
    assert (tmp_path / f"{LAST}.damaged").stat().st_size == 3000
    assert (tmp_path / "checkpoint_2_8.pt").stat().st_size == 3000


def test_a_flipped_bit_in_the_last_checkpoint_is_not_trained_on(tmp_path):
    last = save(tmp_path / LAST, 9)
    save(tmp_path / "checkpoint1.pt", 6)
    content = bytearray(last.read_bytes())
    place = content.index(torch.full((10,), 9.0).numpy().tobytes()) + 5
    content[place] ^= 1
    last.write_bytes(content)
    assert "does not match its checksum" in choose(tmp_path).warnings[0]


def test_a_missing_last_checkpoint_does_not_start_the_training_again(tmp_path):
    save(tmp_path / "checkpoint_1_2.pt", 2)
    choice = choose(tmp_path)
    assert choice.restore_file == str(tmp_path / "checkpoint_1_2.pt")
    assert choice.warnings == [
        f"checkpoint '{tmp_path / LAST}' is not taken: it is missing; going on from the newest whole one, "
        f"{tmp_path}/checkpoint_1_2.pt"
    ]


def test_where_none_is_whole_nothing_is_touched(tmp_path):
    cut(save(tmp_path / LAST, 9), 3000)
    cut(save(tmp_path / "checkpoint1.pt", 6), 2000)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for _ in range(2):  # and not at the next start either
        choice = choose(tmp_path)
        assert choice.error.startswith(
            f"checkpoint '{tmp_path / LAST}' cannot be read (it is cut off or damaged: 3,000 bytes, "
        )
        assert choice.error.endswith(
            "), and there is no other whole one to go on from: put a copy in its place, or choose "
            "another --save-dir to train from the beginning"
        )
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


class Trainer:
    """What load_checkpoint asks of fairseq's trainer; it restores nothing but the name."""

    checkpoint_suffix, data_parallel_world_size, task = "", 1, None
    cfg = SimpleNamespace(optimization=SimpleNamespace(max_update=0))

    def load_checkpoint(self, path, *args, **kwargs):
        self.restored = path

    def get_train_iterator(self, **kwargs):
        return SimpleNamespace(epoch=1)

    def lr_step(self, epoch):
        pass


def test_a_finetuning_goes_on_from_its_own_newest_whole_checkpoint(tmp_path):
    cut(save(tmp_path / LAST, 9), 3000)
    own = save(tmp_path / "checkpoint1.pt", 6)
    model = save(tmp_path / "of another training.pt", 1)
    cfg = OmegaConf.structured(CheckpointConfig(save_dir=str(tmp_path), finetune_from_model=str(model)))
    trainer = Trainer()
    checkpoint_utils.load_checkpoint(cfg, trainer)
    assert trainer.restored == str(own)
    assert cfg.finetune_from_model == str(model)  # the trainer's own goes into every checkpoint


def test_half_written_files_are_removed(tmp_path):
    save(tmp_path / LAST, 1)
    (tmp_path / "checkpoint_1_2.pt.tmp").write_bytes(b"half")
    choose(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [LAST]


@pytest.mark.parametrize("write", ["save", "copy"])
def test_bytes_are_on_the_disk_before_the_name_and_the_name_before_the_end(tmp_path, monkeypatch, write):
    events, names = [], {}
    real_open, real_sync, real_replace = os.open, os.fsync, os.replace

    def opening(path, *args, **kwargs):
        descriptor = real_open(path, *args, **kwargs)
        names[descriptor] = Path(path).name
        return descriptor

    def syncing(descriptor):
        events.append(f"sync {names[descriptor]}")
        real_sync(descriptor)

    def replacing(source, target):
        events.append(f"rename {Path(source).name} {Path(target).name}")
        real_replace(source, target)

    source = save(tmp_path / "checkpoint1.pt", 1)
    monkeypatch.setattr(os, "open", opening)
    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(os, "replace", replacing)
    if write == "save":
        checkpoint_utils.torch_persistent_save(state(2), str(tmp_path / LAST))
    else:
        assert PathManager.copy(str(source), str(tmp_path / LAST), overwrite=True)
    assert events == [f"sync {LAST}.tmp", f"rename {LAST}.tmp {LAST}", f"sync {tmp_path.name}"]
    assert damage(tmp_path / LAST) is None


@contextmanager
def largest_file(size: int):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("write", ["save", "copy"])
def test_where_there_is_no_room_the_old_checkpoint_stays(tmp_path, write):
    last, other = save(tmp_path / LAST, 1), tmp_path / "checkpoint1.pt"
    torch.save(state(2, 200_000), other)
    before = last.read_bytes()
    writes = {
        "save": partial(checkpoint_utils.torch_persistent_save, state(2, 200_000), str(last)),
        "copy": partial(PathManager.copy, str(other), str(last), overwrite=True),
    }
    with pytest.raises(SystemExit) as raised, largest_file(1_000_000):
        writes[write]()
    message = str(raised.value)
    assert message.startswith(f"error: checkpoint '{last}' was not saved (File too large): it needs 6.4 MB, ")
    assert message.endswith(
        " MB are free; the checkpoints before it are whole: make room, then the same command goes on from them"
    )
    assert last.read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {LAST, "checkpoint1.pt"}


def no_room(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_tried_once_and_named(tmp_path, monkeypatch):
    tries = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: tries.append(descriptor) or no_room())
    with pytest.raises(SystemExit, match="was not saved \\(No space left on device\\): it needs 0.0 MB"):
        checkpoint_utils.torch_persistent_save(state(1), str(tmp_path / LAST))
    assert len(tries) == 1
    assert not list(tmp_path.iterdir())


def test_a_full_disk_does_not_hide_what_crashed(tmp_path, monkeypatch, caplog):
    """fairseq writes crash.pt on its way out of an exception."""
    monkeypatch.setattr(os, "fsync", no_room)
    checkpoint_utils.torch_persistent_save(state(1), str(tmp_path / "crash.pt"))
    assert "crash.pt' was not saved (No space left on device)" in caplog.text


def test_another_error_is_left_as_it_is(tmp_path):
    with pytest.raises(FileNotFoundError):
        checkpoint_utils.torch_persistent_save(state(1), str(tmp_path / "none" / LAST))


class Training:
    """What fairseq's save_checkpoint asks of a trainer and an epoch's iterator, at the end of an epoch."""

    data_parallel_rank, checkpoint_suffix, should_save_checkpoint_on_current_rank, task = 0, "", True, None

    def __init__(self) -> None:
        self.epoch = 0

    def consolidate_optimizer(self) -> None:
        pass

    def get_num_updates(self) -> int:
        return self.epoch

    def end_of_epoch(self) -> bool:
        return True

    def state_dict(self) -> dict:
        return {"epoch": self.epoch}

    def save_checkpoint(self, path: str, extra_state: dict) -> None:
        Path(path).write_text(str(self.epoch), encoding="ascii")


@pytest.mark.parametrize(("mended", "best"), [(True, "2"), (False, "4")])
def test_a_validation_without_a_number_costs_no_best_checkpoint(tmp_path, monkeypatch, caplog, mended, best):
    save = checkpoint_utils.save_checkpoint
    if not mended:
        while hasattr(save, "__wrapped__"):
            save = save.__wrapped__
        monkeypatch.setattr(checkpoint_utils, "save_checkpoint", save)
    cfg, training = OmegaConf.structured(CheckpointConfig(save_dir=str(tmp_path))), Training()
    monkeypatch.delattr(save, "best", raising=False)
    try:
        for loss in (3.0, 2.5, float("nan"), 2.9, float("inf")):
            training.epoch += 1
            checkpoint_utils.save_checkpoint(cfg, training, training, loss)
    finally:
        del save.best
    assert (tmp_path / "checkpoint_best.pt").read_text() == best
    assert (tmp_path / "checkpoint_last.pt").read_text() == "5"
    assert ("the validation's loss is nan: this is not taken for the best checkpoint" in caplog.text) is mended


def test_a_folder_that_cannot_be_synced_is_no_reason_to_stop(tmp_path, monkeypatch):
    """As on some network file systems; a file is another matter."""

    def only(refused):
        def fsync(descriptor: int) -> None:
            if refused(Path(f"/proc/self/fd/{descriptor}").resolve()):
                raise OSError(errno.EINVAL, "Invalid argument")

        monkeypatch.setattr(os, "fsync", fsync)

    only(Path.is_dir)
    checkpoint_utils.torch_persistent_save(state(1), str(tmp_path / "a.pt"))
    assert damage(tmp_path / "a.pt") is None
    only(Path.is_file)
    with pytest.raises(OSError, match="Invalid argument"):
        checkpoint_utils.torch_persistent_save(state(2), str(tmp_path / "a.pt"))
    assert torch.load(tmp_path / "a.pt")["optimizer_history"] == [{"num_updates": 1}]


def test_what_fails_in_the_first_process_is_told_to_the_others():
    def decide():
        raise PermissionError(errno.EACCES, "Permission denied", "a.pt")

    assert _or_error(decide).error == (
        "the checkpoints of the run cannot be looked at: [Errno 13] Permission denied: 'a.pt'"
    )
