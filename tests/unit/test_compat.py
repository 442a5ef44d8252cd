"""Each mend of compat/: what goes wrong without it, and that it does not with it (docs/fairseq.md)."""

import argparse
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from fairseq import checkpoint_utils
from fairseq.data import data_utils
from fairseq.dataclass.configs import FairseqConfig
from fairseq.distributed import utils as distributed_utils
from fairseq.file_io import PathManager
from fairseq.models import distributed_fairseq_model
from omegaconf import OmegaConf

import intra_distillation_fairseq  # noqa: F401  puts the mends in place
from intra_distillation_fairseq import compat
from intra_distillation_fairseq.compat import wrapping
from intra_distillation_fairseq.compat.batches import _nothing
from intra_distillation_fairseq.errors import UserError


def unmended(function):
    return function.__wrapped__


def test_installing_twice_wraps_once():
    before = data_utils.batch_by_size
    compat.install()
    assert data_utils.batch_by_size is before
    assert not hasattr(unmended(before), "mended_by")


def test_a_mend_that_somebody_has_replaced_is_seen(monkeypatch):
    assert set(wrapping.in_place().values()) == {True}
    monkeypatch.setattr(data_utils, "batch_by_size", unmended(data_utils.batch_by_size))
    assert [name for name, stands in wrapping.in_place().items() if not stands] == ["keep_last_batch"]


# P1: sentences dropped from every set whose size is no multiple of 8
def test_no_sentence_is_dropped():
    rng = np.random.default_rng(0)
    dropped = 0
    for size in range(1, 120):
        lengths = np.sort(rng.integers(1, 40, size))
        arguments = (np.arange(size), None, lengths, 200, None, 8)
        batches = data_utils.batch_by_size(*arguments)
        assert np.concatenate(batches).tolist() == list(range(size))
        without = unmended(data_utils.batch_by_size)(*arguments)
        assert [list(b) for b in batches[: len(without)]] == [list(b) for b in without]
        dropped += size - sum(map(len, without))
    assert dropped > 0, "fairseq no longer drops the last batch: keep_last_batch can go"


def test_no_sentence_at_all_gives_no_batch():
    assert data_utils.batch_by_size(np.array([], dtype=np.int64), None, np.array([]), 200, None, 8) == []


# P3: copies of checkpoints that a kill leaves half written
def interrupted_copy(source, target):
    """A copy that stops half-way, as if killed."""
    with open(source, "rb") as a, open(target, "wb") as b:
        b.write(a.read()[: os.path.getsize(source) // 2])
    raise KeyboardInterrupt


@pytest.mark.parametrize("mended", [True, False])
def test_an_interrupted_copy_leaves_the_old_checkpoint(tmp_path, monkeypatch, mended):
    new, last = tmp_path / "checkpoint1.pt", tmp_path / "checkpoint_last.pt"
    new.write_bytes(b"new" * 1000)
    last.write_bytes(b"old")
    monkeypatch.setattr("shutil.copyfile", interrupted_copy)
    copy = PathManager.copy if mended else unmended(PathManager.copy)
    with pytest.raises(KeyboardInterrupt):
        copy(str(new), str(last), overwrite=True)
    assert (last.read_bytes() == b"old") is mended


def test_a_copy_is_whole_and_says_so(tmp_path):
    (tmp_path / "a").write_bytes(b"content")
    assert PathManager.copy(str(tmp_path / "a"), str(tmp_path / "b"), overwrite=True)
    assert (tmp_path / "b").read_bytes() == b"content"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


# P4, P5: checkpoints and the safe loader
def checkpoint_content() -> dict:
    return {
        "args": None,
        "cfg": {"model": argparse.Namespace(arch="x"), "task": {}},
        "model": {"w": torch.ones(2)},
        "extra_state": {"counts": np.array([1, 2]), "loss": np.float64(0.5)},
    }


def test_fairseqs_types_are_loaded_safely(tmp_path):
    torch.save(checkpoint_content(), tmp_path / "c.pt")
    state = torch.load(tmp_path / "c.pt", weights_only=True)
    assert state["cfg"]["model"].arch == "x"
    assert state["extra_state"]["counts"].tolist() == [1, 2]


def test_without_the_list_of_types_they_are_not(tmp_path):
    torch.save(checkpoint_content(), tmp_path / "c.pt")
    code = f"import torch; torch.load({str(tmp_path / 'c.pt')!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "argparse.Namespace was not an allowed global" in done.stderr


def test_the_configuration_sent_to_other_processes_is_loaded(tmp_path):
    torch.save({"cfg": OmegaConf.create({"a": {"b": [1, "x"]}}, flags={"allow_objects": True})}, tmp_path / "c.pt")
    assert torch.load(tmp_path / "c.pt")["cfg"].a.b[1] == "x"


class RunsACommand:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch '{self.marker}'",)


def test_a_checkpoint_with_code_is_refused_with_its_name_and_reason(tmp_path):
    torch.save({"cfg": {}, "model": {}, "x": RunsACommand(tmp_path / "ran")}, tmp_path / "evil.pt")
    with pytest.raises(pickle.UnpicklingError) as error:
        checkpoint_utils.load_checkpoint_to_cpu(str(tmp_path / "evil.pt"))
    message = str(error.value)
    assert message.startswith(f"checkpoint '{tmp_path / 'evil.pt'}' was not loaded: it holds posix.system; allowed are")
    assert "weights_only" not in message
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("length", [0, 1, 500])
def test_a_cut_off_checkpoint_is_named(tmp_path, length):
    torch.save(checkpoint_content(), tmp_path / "whole.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:length])
    with pytest.raises(pickle.UnpicklingError, match=r"checkpoint '.*cut\.pt' (is not a whole file|was not loaded)"):
        checkpoint_utils.load_checkpoint_to_cpu(str(tmp_path / "cut.pt"))


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("part", [0.1, 0.5, 0.99])
def test_a_cut_off_checkpoint_is_no_whole_file_in_either_format(tmp_path, zipped, part):
    path = tmp_path / "cut.pt"
    torch.save({"model": {"w": torch.ones(10000)}}, path, _use_new_zipfile_serialization=zipped)
    path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])
    with pytest.raises(UserError) as caught:
        checkpoint_utils.load_checkpoint_to_cpu(str(path))
    assert str(caught.value) == (
        f"checkpoint '{path}' is not a whole file (cut off while it was written or copied?): take another one "
        "(to train on from it: --continue-once)"
    )


@pytest.mark.parametrize(
    "error", [RuntimeError("CUDA error: out of memory"), MemoryError(), FileNotFoundError(2, "No such file", "a")]
)
def test_errors_that_are_not_the_files_pass_unchanged(tmp_path, monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    torch.save({"model": {}, "optimizer_history": [{}]}, tmp_path / "c.pt")
    monkeypatch.setattr(checkpoint_utils, "_upgrade_state_dict", fail)
    with pytest.raises(type(error)) as caught:
        checkpoint_utils.load_checkpoint_to_cpu(str(tmp_path / "c.pt"))
    assert caught.value is error


# c10d without a GPU
def test_ddp_on_cpu_ignores_the_device(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        model = torch.nn.Linear(2, 2)
        with pytest.raises(ValueError, match="device_ids"):
            torch.nn.parallel.DistributedDataParallel(model, device_ids=[0], output_device=0)
        wrapped = distributed_fairseq_model.DistributedDataParallel(model, device_ids=[0], output_device=0)
        assert wrapped(torch.ones(1, 2)).shape == (1, 2)
    finally:
        torch.distributed.destroy_process_group()


# P9: launches that do not train. What is refused: test_rendezvous.py.
def launch(cpu=False, criterion=None, model=None, **distributed):
    """The calls of main that this launch makes."""
    cfg = OmegaConf.structured(FairseqConfig())
    cfg.common.cpu = cpu
    cfg.criterion, cfg.model = criterion, model
    for name, value in {"distributed_world_size": 1, **distributed}.items():
        cfg.distributed_training[name] = value
    called = []
    distributed_utils.call_main(cfg, lambda cfg: called.append(cfg))
    return called


@pytest.fixture
def started_by_hand(monkeypatch):
    for name in [name for name in os.environ if name.startswith("SLURM_")] + ["WORLD_SIZE", "RANK"]:
        monkeypatch.delenv(name, raising=False)


def test_a_plain_launch_is_let_through(started_by_hand):
    assert len(launch()) == 1


def test_a_launcher_without_world_size_is_refused(started_by_hand, monkeypatch):
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        SystemExit, match="^error: torchrun started 2 processes, but --distributed-world-size is 1: each"
    ):
        launch()
    monkeypatch.delenv("RANK")
    with pytest.raises(SystemExit, match="^error: WORLD_SIZE is '2', but RANK is not set"):
        launch()


def test_spawning_without_a_gpu_is_refused(started_by_hand):
    with pytest.raises(SystemExit, match="^error: --distributed-world-size '2' without a GPU: fairseq would start no"):
        launch(cpu=True, distributed_world_size=2, distributed_init_method="tcp://127.0.0.1:1")


# fully_sharded
@pytest.mark.parametrize(
    ("gpus", "fairscale", "criterion", "model", "message"),
    [
        (0, True, {}, {}, "which needs a GPU: use --ddp-backend legacy_ddp or pytorch_ddp"),
        (1, False, {}, {}, r"which needs fairscale: install it \(pip install fairscale\)"),
        (
            1,
            True,
            {"id_pass_mode": "recompute"},
            {},
            "and --id-pass-mode 'recompute'.*use stacked with --checkpoint-act",
        ),
        (1, True, {"id_pass_mode": "stacked"}, {"arch": "switch_transformer_big"}, "routers of experts"),
        (1, True, {}, {"arch": "transformer", "decoder_layerdrop": 0.1}, "LayerDrop"),
    ],
)
def test_sharding_that_does_not_work_is_refused(
    started_by_hand, monkeypatch, gpus, fairscale, criterion, model, message
):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if fairscale else None)
    with pytest.raises(SystemExit, match=f"^error: --ddp-backend is 'fully_sharded'.*{message}"):
        launch(ddp_backend="fully_sharded", criterion=criterion, model=model)


def test_sharding_is_let_through_where_it_works(started_by_hand, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    model = {"arch": "transformer_big", "encoder_layerdrop": 0}
    assert launch(ddp_backend="fully_sharded", criterion={"id_pass_mode": "stacked"}, model=model)
    assert launch(ddp_backend="legacy_ddp", criterion={"id_pass_mode": "recompute"}, model=model)


def test_an_empty_batch_counts_nothing_whatever_a_criterion_logs():
    logged = {"loss": torch.ones(2), "ntokens": 3, "nll_loss": 0.5, "names": ["a"], "nothing": None}
    counted = {name: _nothing(value) for name, value in logged.items()}
    assert counted.pop("loss").tolist() == [0, 0]
    assert counted == {"ntokens": 0, "nll_loss": 0.0, "names": ["a"], "nothing": None}
