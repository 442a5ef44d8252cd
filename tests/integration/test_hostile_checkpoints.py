"""Checkpoints from strangers: every file of tests/malicious.py is refused at every entry point, and nothing of it runs."""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import dataclasses
import importlib
import io
import multiprocessing
import pickle
import random
import resource
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import fairseq
import malicious
import numpy as np
import pytest
import torch
from fairseq import checkpoint_utils, models, registry, tasks
from fairseq.dataclass.configs import FairseqConfig
from fairseq.models.transformer import TransformerModel
from fairseq_commands import USER_DIR, command
from omegaconf import OmegaConf
from test_train_evaluate import CONFIG, UPDATES, arguments, prepared  # noqa: F401  a fixture
from torch import _weights_only_unpickler

from intra_distillation_fairseq import checkpoints, load, settings_vetting, vetting, whole_checkpoints
from intra_distillation_fairseq.cli import main
from intra_distillation_fairseq.errors import UserError

TRAINING = (
    "--arch transformer_small --encoder-layers 1 --decoder-layers 1 --encoder-embed-dim 16 --decoder-embed-dim 16 "
    "--encoder-ffn-embed-dim 32 --decoder-ffn-embed-dim 32 --encoder-attention-heads 2 --decoder-attention-heads 2 "
    "--optimizer adam --max-tokens 200 --num-workers 0 --max-update 9 --no-progress-bar --cpu"
).split()


class Case(NamedTuple):
    """Attributes:
    file: one malicious checkpoint.
    run: a run folder of which every checkpoint is that file.
    data: prepared data folder.
    home: an empty folder.
    """

    file: Path
    run: Path
    data: Path
    home: Path


@pytest.fixture(scope="module")
def trained(prepared, tmp_path_factory) -> Path:  # noqa: F811
    config = tmp_path_factory.mktemp("config") / "three.yaml"
    text = CONFIG.replace(f"max-update: {UPDATES}", "max-update: 4").replace(
        "interval-updates: 40", "interval-updates: 2"
    )
    config.write_text(text.replace("keep-interval-updates: 1", "keep-interval-updates: 2"), encoding="utf-8")
    folder = tmp_path_factory.mktemp("runs") / "lauf é"
    assert main.main(["train", *arguments(prepared, config, folder, method="transformer")]) == 0
    return folder


@pytest.fixture(scope="module")
def state(trained) -> dict[str, Any]:
    return checkpoints.load(trained / "checkpoint_best.pt")


@pytest.fixture
def make_case(trained, state, prepared, tmp_path) -> Callable[[str], Case]:  # noqa: F811
    def make(name: str) -> Case:
        home = tmp_path / str(len(list(tmp_path.iterdir())))
        file, run = home / "fremd é.pt", home / "run"
        shutil.copytree(trained, run, ignore=shutil.ignore_patterns("*.log", "logs"))
        malicious.write(name, state, home / "marker", file)
        for name in ("checkpoint_best.pt", "checkpoint_last.pt", "checkpoint1.pt", "checkpoint2.pt"):
            shutil.copyfile(file, run / name)
        return Case(file, run, prepared, home)

    return make


@pytest.fixture(autouse=True)
def a_resolver_of_somebody():
    """An application that loads the file may have registered a resolver that does things."""
    OmegaConf.register_new_resolver("mark", lambda path: Path(path).touch(), replace=True)
    yield
    OmegaConf.clear_resolver("mark")


# -- the entry points: each gives the command, for a process of its own or for this one


def fairseq_train(case: Case, *flags: object) -> list[object]:
    return ["train", case.data / "bin", "--user-dir", USER_DIR, *TRAINING, "--save-dir", case.home / "saved", *flags]


def fairseq_last(case: Case) -> list[object]:
    (case.home / "saved").mkdir()
    shutil.copyfile(case.file, case.home / "saved" / "checkpoint_last.pt")
    return fairseq_train(case)


def fairseq_interactive(case: Case) -> list[object]:
    (case.home / "input").write_text("a b\n")
    return ["interactive", case.data / "bin", "--user-dir", USER_DIR, "--path", case.file, "--input", case.home / "input",
            "--cpu"]  # fmt: skip


FAIRSEQ: dict[str, Callable[[Case], list[object]]] = {
    "--restore-file": lambda case: fairseq_train(case, "--restore-file", case.file),
    "--finetune-from-model": lambda case: fairseq_train(case, "--finetune-from-model", case.file),
    "checkpoint_last.pt": fairseq_last,
    "--teacher": lambda case: fairseq_train(case, "--criterion", "self_distillation", "--teacher", case.file),
    "generate": lambda case: ["generate", case.data / "bin", "--user-dir", USER_DIR, "--path", case.file, "--cpu"],
    "interactive": fairseq_interactive,
    "validate": lambda case: [
        "validate",
        case.data / "bin",
        "--user-dir",
        USER_DIR,
        "--path",
        case.file,
        "--cpu",
        "--task",
        "translation",
        "--max-tokens",
        "200",
    ],
}
OURS: dict[str, Callable[[Case], list[object]]] = {
    "evaluate": lambda case: ["evaluate", case.run, "--cpu"],
    "evaluate average": lambda case: ["evaluate", case.run, "--checkpoint", "average2", "--cpu"],
    "sensitivity": lambda case: ["sensitivity", case.run, "--cpu"],
    "prune": lambda case: ["prune", case.run, "--cpu"],
    "truncate": lambda case: ["truncate", case.file, "--layers", "1"],
    "layers": lambda case: ["layers", case.run, "--out", case.home / "layers.pdf", "--cpu"],
}
PYTHON: dict[str, Callable[[Case], Any]] = {
    "load a file": lambda case: load(case.file, data=case.data),
    "load a run": lambda case: load(case.run),
    "load_checkpoint_to_cpu": lambda case: checkpoint_utils.load_checkpoint_to_cpu(str(case.file)),
    "load_model_ensemble": lambda case: checkpoint_utils.load_model_ensemble([str(case.file)]),
    "from_pretrained": lambda case: TransformerModel.from_pretrained(str(case.home), case.file.name),
    "facts": lambda case: checkpoints.facts(case.file),
    "average": lambda case: checkpoints.average([case.file], case.home / "mean.pt"),
}
ENTRY_POINTS = [*FAIRSEQ, *OURS, *PYTHON]


def attempt(entry: str, case: Case) -> str:
    """Call an entry point in this process; returns what it says as it fails. It must fail."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            if entry in OURS:
                status = main.main([str(word) for word in OURS[entry](case)])
                assert status == 2, f"exit code {status}"
                return said.getvalue().splitlines()[-1]
            if entry in FAIRSEQ:
                name, *words = FAIRSEQ[entry](case)
                sys.argv = [f"fairseq-{name}", *map(str, words)]
                importlib.import_module(f"fairseq_cli.{name}").cli_main()
            else:
                PYTHON[entry](case)
    except (UserError, SystemExit) as error:
        return str(error)
    raise AssertionError(f"{entry} took the file")


def check(said: str, entry: str, case: Case) -> None:
    assert "\n" not in said
    assert str(case.file) in said or str(case.run) in said or str(case.home / "saved") in said, said
    assert "was not loaded" in said or "cannot be read" in said or "is not a whole file" in said, said
    assert not (case.home / "marker").exists()
    assert not [path for path in case.home.rglob("*.pt") if "average" in path.name or "layers" in path.name]


@pytest.fixture(autouse=True)
def argv_as_before(monkeypatch):
    monkeypatch.setattr(sys, "argv", sys.argv)


# -- every file


@pytest.mark.parametrize("name", malicious.FILES)
def test_every_file_is_refused(name, make_case, record_property):
    case = make_case(name)
    for entry in ("facts", "load_checkpoint_to_cpu"):
        check(attempt(entry, case), entry, case)
    record_property("malicious files refused", 1)


@pytest.mark.parametrize("entry", ENTRY_POINTS)
def test_every_entry_point_refuses(entry, make_case, full, record_property):
    """A sample of the files for each entry point; every file under --full."""
    names = list(malicious.FILES)
    if not full:
        names = random.Random(entry).sample(names, 2)
    for name in names:
        case = make_case(name)
        try:
            check(attempt(entry, case), entry, case)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
        shutil.rmtree(case.home)
    record_property("refusals at entry points", len(names))


@pytest.mark.parametrize("entry", FAIRSEQ)
def test_fairseqs_commands_end_with_one_line(entry, make_case):
    case = make_case("code for a cutoff, zip" if entry != "checkpoint_last.pt" else "os.system, legacy")
    done = command(*FAIRSEQ[entry](case))
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    check(done.stderr.rstrip("\n").split("\n")[-1], entry, case)
    assert done.stderr.rstrip("\n").split("\n")[-1].startswith("error: ")


def test_none_takes_memory(tmp_path):
    """Of files that stand for gigabytes, none makes the process larger by 400 MiB."""
    torch.save({}, tmp_path / "good.pt")
    assert checkpoints.read(tmp_path / "good.pt") == {}  # so that everything is imported
    process = multiprocessing.get_context("fork").Process(target=_read_all_amplified, args=(tmp_path,))
    process.start()
    process.join(300)
    assert process.exitcode == 0


def _read_all_amplified(folder: Path) -> None:
    for name in malicious.AMPLIFIED:
        malicious.write(name, {"model": {}, "extra_state": {}}, folder / "marker", folder / "a.pt")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(checkpoints.RefusedCheckpoint, match="was not loaded"):
            checkpoints.read(folder / "a.pt")
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400 * 1024, name


def test_in_a_process_of_its_own(make_case):
    """As a user would: nothing of this test's process is there."""
    case = make_case("os.system, zip")
    done = command(*FAIRSEQ["generate"](case), fresh=True)
    assert done.returncode == 1
    assert done.stderr.rstrip("\n").split("\n")[-1] == (
        f"error: checkpoint '{case.file}' was not loaded: it holds posix.system; allowed are tensors, plain values and "
        "the types of fairseq's own checkpoints, since anything else can run code while it is read"
    )
    assert not (case.home / "marker").exists()


def test_without_the_checks_a_setting_would_run(make_case, monkeypatch):
    """torch's safe loader alone does not help: fairseq itself evaluates --adaptive-softmax-cutoff of the checkpoint."""
    case = make_case("code for a cutoff, zip")
    monkeypatch.setattr(vetting, "check_values", lambda *_: None)
    with pytest.raises(TypeError):  # open(...).close() gives no list of numbers
        checkpoint_utils.load_model_ensemble_and_task([str(case.file)], {"data": str(case.data / "bin")})
    assert (case.home / "marker").exists()


# -- good files


def test_a_good_file_passes_every_check(trained, state, tmp_path):
    for zipped in (True, False):
        path = tmp_path / f"{zipped}.pt"
        torch.save(state, path, _use_new_zipfile_serialization=zipped)
        read = checkpoints.load(path)
        assert read["model"].keys() == state["model"].keys()
        assert all(torch.equal(read["model"][name], value) for name, value in state["model"].items())
        assert vars(read["cfg"]["model"]) == vars(state["cfg"]["model"])


@pytest.mark.parametrize("dtype", ["f4", ">f8", "i8", "u1", "?", "f2", "c16"])
def test_numbers_of_numpy_are_read(dtype, tmp_path):
    array = np.array([[0, 1, 2], [3, 4, 5]]).astype(dtype)
    content = {
        "c": array,
        "fortran": np.asfortranarray(array),
        "one": array[1, 2],
        "none": array[0, 0],
    }
    torch.save({"model": {}, "extra_state": content}, tmp_path / "a.pt")
    read = checkpoints.load(tmp_path / "a.pt")["extra_state"]
    for name, value in content.items():
        assert np.array_equal(read[name], value) and read[name].dtype == value.dtype.newbyteorder("=")
    torch.save({"model": {}, "extra_state": read}, tmp_path / "b.pt")  # as the next training does
    assert b"intra_distillation" not in (tmp_path / "b.pt").read_bytes()
    assert np.array_equal(checkpoints.load(tmp_path / "b.pt")["extra_state"]["c"], array)


@pytest.mark.parametrize(
    "value",
    ["data (copy)/bin", "checkpoint_last.pt", "(0.9, 0.98)", "[(512, 3)] * 20", '{"beam": 4}', "a-b", "1e-7", "x"],
)
def test_ordinary_settings_are_not_taken_for_code(value):
    vetting.check_values({"cfg": {"task": {"data": value}}}, 1000)
    if value != "data (copy)/bin":
        vetting.check_values({"cfg": {"task": {"x": value}}}, 1000)


def test_references_between_settings_are_let_through(tmp_path):
    torch.save({"model": {}, "cfg": {"a": "${common.seed}", "common": {"seed": 1}}}, tmp_path / "a.pt")
    assert checkpoints.load(tmp_path / "a.pt")["cfg"]["a"] == "${common.seed}"


def test_old_formats_are_opened(state, prepared, tmp_path):  # noqa: F811
    """fairseq before 1.0.0 wrote a Namespace, 1.0.0a a configuration of omegaconf with references in it."""
    settings = {
        **vars(state["cfg"]["model"]),
        **_without(state["cfg"]["task"], "_name"),
        "task": "translation",
        "criterion": "cross_entropy",
        "optimizer": "adam",
        "lr_scheduler": "fixed",
    }
    config = OmegaConf.create(copy.deepcopy(state["cfg"]), flags={"allow_objects": True})
    config.criterion.sentence_avg = "${optimization.sentence_avg}"
    old = {"args": argparse.Namespace(**settings), "cfg": None}
    for number, changed in enumerate([old, {"cfg": config}]):
        torch.save({**state, **changed}, tmp_path / f"{number}.pt")
        model, _, opened = load(tmp_path / f"{number}.pt", data=prepared)
        assert all(torch.equal(value, state["model"][name]) for name, value in model.named_parameters())
        assert opened.criterion.sentence_avg is False


def test_no_setting_of_fairseq_is_taken_for_code():
    """The defaults of every architecture, model, task, criterion and optimizer that is registered, ours too."""
    count = 0
    for configure in models.ARCH_CONFIG_REGISTRY.values():
        settings = argparse.Namespace(attention_dropout=0.0)  # lightconv_lm asks for it
        configure(settings)
        settings_vetting.check({"args": settings})
        count += len(vars(settings))
    kinds = [FairseqConfig, *tasks.TASK_DATACLASS_REGISTRY.values(), *models.MODEL_DATACLASS_REGISTRY.values()]
    for registered in registry.REGISTRIES.values():
        kinds += registered["dataclass_registry"].values()
    for kind in filter(None, kinds):
        settings = _defaults(kind)
        for value in filter(lambda value: isinstance(value, str), settings.values()):
            settings_vetting.check_references(value)
        settings_vetting.check({"cfg": settings})
        count += len(settings)
    assert count > 5000


def _defaults(kind: type) -> dict[str, Any]:
    plain = {}
    for field in dataclasses.fields(kind):
        made = field.default_factory() if callable(field.default_factory) else field.default
        if dataclasses.is_dataclass(made):
            plain.update(_defaults(made if isinstance(made, type) else type(made)))
        elif made is not dataclasses.MISSING:
            plain[field.name] = str(made) if isinstance(made, str) else made  # choices are texts too
    return plain


# -- ill-formed files, which harm nobody


def _without(part: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in part.items() if key != name}


ILL_FORMED: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "history is a dict": lambda state: {"optimizer_history": {"a": 1}},
    "history of texts": lambda state: {"optimizer_history": ["a"]},
    "history is a number": lambda state: {"optimizer_history": 1},
    "history is empty": lambda state: {"optimizer_history": []},
    "history of nothing": lambda state: {"optimizer_history": [{}]},
    "updates are a text": lambda state: {"optimizer_history": [{**state["optimizer_history"][-1], "num_updates": "1"}]},
    "model is a list": lambda state: {"model": [1]},
    "model is nothing": lambda state: {"model": None},
    "model of texts": lambda state: {"model": {"encoder.x": "a"}},
    "model of numbered tensors": lambda state: {"model": {1: torch.zeros(1)}},
    "cfg is a text": lambda state: {"cfg": "a"},
    "cfg is a list": lambda state: {"cfg": OmegaConf.create(["a"])},
    "cfg without task": lambda state: {"cfg": _without(state["cfg"], "task")},
    "cfg without model": lambda state: {"cfg": _without(state["cfg"], "model")},
    "cfg model is nothing": lambda state: {"cfg": {**state["cfg"], "model": None}},
    "cfg model is a text": lambda state: {"cfg": {**state["cfg"], "model": "a"}},
    "cfg of numbers": lambda state: {"cfg": {1: 2}},
    "unknown architecture": lambda state: {"cfg": {**state["cfg"], "model": {"_name": "nothing"}}},
    "unknown task": lambda state: {"cfg": {**state["cfg"], "task": {**state["cfg"]["task"], "_name": "nothing"}}},
    "layers are a text": lambda state: {"cfg": {**state["cfg"], "model": {"_name": "transformer", "encoder": {"layers": "x"}}}},
    "extra_state is a list": lambda state: {"extra_state": [1]},
    "val_loss is a text": lambda state: {"extra_state": {**state["extra_state"], "val_loss": "low"}},
    "args is a text": lambda state: {"args": "a", "cfg": None},
    "args of nothing": lambda state: {"args": argparse.Namespace(), "cfg": None},
    "reference to nothing": lambda state: {"cfg": {**state["cfg"], "task": {**state["cfg"]["task"], "source_lang": "${nowhere.x}"}}},
    "reference to itself": lambda state: {"cfg": {**state["cfg"], "task": {**state["cfg"]["task"], "source_lang": "${task.source_lang}"}}},
}  # fmt: skip
READERS: dict[str, Callable[[Case], Any]] = {
    **{name: PYTHON[name] for name in ("load a file", "load a run", "load_checkpoint_to_cpu", "facts", "average")},
    "newest_whole": lambda case: whole_checkpoints.newest_whole(case.run),
    "truncate": lambda case: main.main(["truncate", str(case.file), "--layers", "1"]),
}
HARMLESS = ("updates are a text", "val_loss is a text")  # fairseq itself never looks at them


@pytest.mark.parametrize("name", ILL_FORMED)
def test_ill_formed_files_end_with_one_line(name, state, make_case, capsys):
    case = make_case("a web page")
    torch.save({**state, **ILL_FORMED[name](copy.deepcopy(state))}, case.file)
    for path in case.run.glob("*.pt"):
        shutil.copyfile(case.file, path)
    said = [_one_line_of(READERS[entry], case, capsys) for entry in READERS]
    assert name in HARMLESS or any(said)
    for line in filter(None, said):
        assert "\n" not in line and (str(case.file) in line or str(case.run) in line), line


def _one_line_of(read: Callable[[Case], Any], case: Case, capsys) -> str:
    """What an entry point says about a file; nothing where it is content with it."""
    try:
        status = read(case)
    except UserError as error:
        return str(error)
    return capsys.readouterr().err.removesuffix("\n") if isinstance(status, int) and status else ""


def test_the_user_dir_of_a_checkpoint_is_not_imported(state, make_case):
    """It is in every checkpoint; fairseq imports the one of its command line only, and it shall stay so."""
    case = make_case("os.system, zip")
    plugin = case.home / "fremd_plugin"
    plugin.mkdir()
    (plugin / "__init__.py").write_text(f"open({str(case.home / 'marker')!r}, 'w').close()\n")
    changed = pickle.loads(pickle.dumps(state))
    changed["cfg"]["common"]["user_dir"] = str(plugin)
    for path in (case.file, *case.run.glob("*.pt")):
        torch.save(changed, path)
    load(case.run)
    for entry in ("generate", "interactive", "validate", "--restore-file"):
        further = ["--reset-optimizer"] if entry == "--restore-file" else []
        done = command(*FAIRSEQ[entry](case), *further)
        assert done.returncode == 0, done.stderr
    assert not (case.home / "marker").exists()


# -- the lists


@pytest.mark.parametrize("name", sorted(settings_vetting._TEXTS))
def test_what_may_be_code_may_not_be_referred_to(name):
    code = "open('marker', 'w').close()"
    settings_vetting.check({"cfg": {"common": {name: code}, "model": {"x": "common.seed"}}})
    for reference in (f"${{common.{name}}}", "${common.seed}"):  # whatever it names: there may be a chain of them
        with pytest.raises(vetting.Unwanted, match=f"its setting '{name}' is code"):
            settings_vetting.check({"cfg": {"common": {name: code}, "model": {"x": reference}}})


@pytest.mark.parametrize(
    "text", ["[(512, 3)] * 20", "[(850, 6)] * 3 + [(850, 1)] * 1 + [(850, 5)] * 4", "2*0.5", "1-1"]
)
def test_small_products_are_no_code(text):
    assert not settings_vetting.is_code(text)


def test_a_state_is_a_dict():
    """What else has the methods of one looks its values up in its own way."""
    with pytest.raises(vetting.Unwanted, match="it is a DictConfig, not a dict"):
        vetting.check_values(OmegaConf.create({"model": 1}), 1000)


def test_the_settings_that_are_let_be_code_are_never_evaluated():
    """`settings_vetting._TEXTS` holds none of the names that fairseq gives to eval."""
    evaluated = set()
    for path in Path(fairseq.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                called = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
                if called.startswith("eval") and called != "eval_lm" and node.args:
                    names = [getattr(part, "attr", getattr(part, "id", "")) for part in ast.walk(node.args[0])]
                    evaluated.update(names)
    assert {"adaptive_softmax_cutoff", "adam_betas", "conv_feature_layers"} <= evaluated
    assert not evaluated & settings_vetting._TEXTS


def test_torchs_loader_allows_what_the_list_names():
    """Every name on the list is of use: torch's loader knows it, or our stand-ins have it."""
    loader = _weights_only_unpickler
    known = set(loader._get_allowed_globals()) | set(loader._get_user_allowed_globals())
    assert known >= vetting.ALLOWED_GLOBALS, vetting.ALLOWED_GLOBALS - known
    modules = {name.rpartition(".")[0] for name in vetting.ALLOWED_GLOBALS}
    assert not modules & {"os", "posix", "subprocess", "pickle", "importlib"}
