"""Checkpoints that would run code, leak or fill the memory: each would leave a marker file if it ran.

`FILES` maps a name to a function (state, marker, path) that writes the file from the state of a good checkpoint, so that
nothing but the payload is wrong with it.
"""

from __future__ import annotations

import argparse
import builtins
import collections
import copy
import functools
import importlib
import io
import operator
import os
import pickle
import runpy
import shutil
import struct
import subprocess
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import omegaconf
import torch

State = dict[str, Any]
Writer = Callable[[State, Path, Path], None]
FILES: dict[str, Writer] = {}

HUGE = 10**12


class Calls:
    """An object whose pickle calls a function."""

    def __init__(self, function: Any, *args: Any):
        self.function, self.args = function, args

    def __reduce__(self) -> tuple:
        return self.function, self.args


class Called(argparse.Namespace):
    """Would be built as a Namespace, with a call as its state."""

    def __init__(self, state: Any):
        self.state = state

    def __reduce__(self) -> tuple:
        return argparse.Namespace, (), self.state


def _save(state: State, path: Path, zipped: bool = True) -> None:
    torch.save(state, path, _use_new_zipfile_serialization=zipped)


def _touch(marker: Path) -> str:
    return f"open({str(marker)!r}, 'w').close()"


# -- calls of functions


def _calls(marker: Path) -> dict[str, Calls]:
    shell, code = f"touch '{marker}'", _touch(marker)
    return {
        "os.system": Calls(os.system, shell),
        "os.popen": Calls(os.popen, shell),
        "os.mkdir": Calls(os.mkdir, str(marker)),
        "subprocess.Popen": Calls(subprocess.Popen, ["touch", str(marker)]),
        "subprocess.check_output": Calls(subprocess.check_output, ["touch", str(marker)]),
        "eval": Calls(eval, code),
        "exec": Calls(exec, code),
        "compile": Calls(compile, code, "x", "exec"),
        "open": Calls(open, str(marker), "w"),
        "import": Calls(builtins.__import__, "this"),
        "getattr": Calls(getattr, "", "upper"),
        "import_module": Calls(importlib.import_module, "this"),
        "run_module": Calls(runpy.run_module, "this"),
        "partial": Calls(functools.partial, os.system, shell),
        "called partial": Calls(functools.partial(os.system, shell)),
        "attrgetter": Calls(operator.attrgetter, "system"),
        "called attrgetter": Calls(operator.attrgetter("__class__"), ""),
        "methodcaller": Calls(operator.methodcaller, "system", shell),
        "called methodcaller": Calls(operator.methodcaller("write_text", ""), marker),
        "pickle.loads": Calls(pickle.loads, pickle.dumps(Calls(os.system, shell))),
        "rmtree": Calls(shutil.rmtree, str(marker)),
        "torch.load": Calls(torch.load, str(marker)),
        "torch.hub": Calls(torch.hub.load, str(marker), "model", "local"),
        "torch.jit": Calls(torch.jit.load, str(marker)),
        "torch.storage": Calls(torch.storage._load_from_bytes, pickle.dumps(Calls(os.system, shell))),
        "np.load": Calls(np.load, str(marker), None, True),
        "np.ndarray of addresses": Calls(np.ndarray, (1,), "O", b"AAAAAAAA"),
        "a resolver": Calls(omegaconf.OmegaConf.register_new_resolver, "mark", eval),
        "bytearray": Calls(bytearray, HUGE),
        "storage": Calls(torch.UntypedStorage, HUGE),
        "a tensor's type": Calls(torch.FloatTensor, HUGE),
        "counter": Calls(collections.Counter, "text"),
        "a reduce in a reduce": Calls(argparse.Namespace, Calls(os.system, shell)),
        "a default factory": Calls(collections.defaultdict, Calls(functools.partial, os.system, shell)),
        "an argument of a dict": Calls(collections.OrderedDict, [["a", Calls(os.system, shell)]]),
        "torch rebuild": Calls(torch._utils._rebuild_tensor_v2, Calls(os.system, shell), 0, (1,), (1,), False, {}),
    }


_NAMES = list(_calls(Path("x")))


def _in_extra_state(state: State, value: Any) -> None:
    state["extra_state"]["x"] = value


_PLACES: dict[str, Callable[[State, Any], None]] = {
    "at the top": lambda state, value: state.update(x=value),
    "as a dict key": lambda state, value: state["extra_state"].update({(value,): 1}),
    "in the optimizer": lambda state, value: state["last_optimizer_state"].update(x=value),
    "in its history": lambda state, value: state["optimizer_history"][-1].update(x=value),
    "in the model": lambda state, value: state["model"].update(x=value),
    "in the metrics": lambda state, value: state["extra_state"].update(metrics=value),
    "in a Namespace": lambda state, value: setattr(state["cfg"]["model"], "x", value),
    "as a Namespace's state": lambda state, value: state.update(x=Called({"x": value})),
    "as cfg": lambda state, value: state.update(cfg=value),
    "as args": lambda state, value: state.update(args=value),
    "in a list in a list": lambda state, value: state.update(x=[[[value]]]),
    "in an OrderedDict": lambda state, value: state.update(x=collections.OrderedDict(a=value)),
    "in an array": lambda state, value: state.update(x=np.array([value, None], dtype=object)),
    "in the task": lambda state, value: state.update(task_state={"x": value}),
}


def _writer_of_call(name: str, place: Callable[[State, Any], None], zipped: bool) -> Writer:
    def write(state: State, marker: Path, path: Path) -> None:
        place(state, _calls(marker)[name])
        _save(state, path, zipped)

    return write


for _zipped, _format in ((True, "zip"), (False, "legacy")):
    for _name in _NAMES:
        FILES[f"{_name}, {_format}"] = _writer_of_call(_name, _in_extra_state, _zipped)
    for _place, _put in _PLACES.items():
        FILES[f"os.system {_place}, {_format}"] = _writer_of_call("os.system", _put, _zipped)


# -- pickles that torch.save would not write


def _text(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text.encode())) + text.encode()


def _raw(marker: Path) -> dict[str, bytes]:
    """Instructions that leave one value on the stack."""
    shell = _text(f"touch '{marker}'")
    system = b"cos\nsystem\n"
    return {
        "STACK_GLOBAL": _text("os") + _text("system") + b"\x93" + shell + b"\x85R",
        "INST": b"(" + shell + b"ios\nsystem\n",
        "OBJ": b"(" + system + shell + b"o",
        "NEWOBJ": b"csubprocess\nPopen\n" + shell + b"\x85\x81",
        "NEWOBJ_EX": b"csubprocess\nPopen\n" + shell + b"\x85}\x92",
        "BUILD": b"cbuiltins\nprint\n}" + _text("a") + b"K\x01sb",
        "BUILD of a type": b"cargparse\nNamespace\n}" + _text("__getattr__") + b"cos\nsystem\nsb",
        "EXT1": b"\x82\x01" + shell + b"\x85R",
        "dotted": b"ctorch\nserialization.os.system\n" + shell + b"\x85R",
        "dotted module": b"ctorch.serialization\nos.system\n" + shell + b"\x85R",
        "getattr of an import": b"c__builtin__\ngetattr\n(c__builtin__\n__import__\n" + _text("os") + b"\x85R"
        + _text("system") + b"tR" + shell + b"\x85R",
        "CodeType": b"ctypes\nCodeType\n)R",
        "FunctionType": b"ctypes\nFunctionType\n)R",
        "sys.modules": b"csys\nmodules\n" + _text("os") + b"\x85R",
        "text as a persistent id": _text("os.system") + b"Q",
        "number as a persistent id": b"K\x07Q",
        "line as a persistent id": b"Pos.system\n",
        "persistent module": b"(" + _text("module") + system + _text("x") + _text("y") + b"tQ",
        "persistent storage of a function": b"(" + _text("storage") + system + _text("0") + _text("cpu") + b"K\x01tQ",
        "unknown memo": b"j\xff\xff\xff\x7f",
        "REDUCE of a text": _text("os.system") + shell + b"\x85R",
        "dtype of objects": b"cnumpy\ndtype\n" + _text("O8") + b"\x89\x88\x87R",
        "dtype of a text": b"cnumpy\ndtype\n" + _text("f8,O") + b"\x89\x88\x87R",
        "new array": b"cnumpy\nndarray\n(K\x01\x85" + _text("O") + b"c_codecs\nencode\n" + _text("AAAAAAAA")
        + _text("latin1") + b"\x86Rt\x81",
        "array of a huge shape": b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n\x8a\x06"
        + HUGE.to_bytes(6, "little") + b"\x85" + _text("b") + b"\x87R(K\x01K\x01\x85cnumpy\ndtype\n" + _text("O8")
        + b"\x89\x88\x87R\x89]tb",
        "number of objects": b"cnumpy.core.multiarray\nscalar\ncnumpy\ndtype\n" + _text("O8") + b"\x89\x88\x87R"
        + _text("x") + b"\x86R",
    }  # fmt: skip


def _writer_of_pickle(name: str, zipped: bool) -> Writer:
    def write(state: State, marker: Path, path: Path) -> None:
        mark = "the place of the payload"
        state["extra_state"]["x"] = mark
        _save(state, path, zipped)
        content = {**_raw(marker), **_AMPLIFIED}[name]
        old = _text(mark)
        if not zipped:
            path.write_bytes(path.read_bytes().replace(old, content))
            return
        _change_zip(path, lambda pickled: pickled.replace(old, content))

    return write


# -- pickles that copy what they hold, for a few bytes each time

_REMEMBER, _RECALL = b"r\x00\x00\x10\x00", b"j\x00\x00\x10\x00"


def _copying(first: bytes, copy: bytes, times: int = 2000) -> bytes:
    """A list of `first`, and of many times `copy`, in which %b recalls it."""
    return b"](" + first + _REMEMBER + copy.replace(b"%b", _RECALL) * times + b"e"


def _amplified() -> dict[str, bytes]:
    """Instructions that leave one value on the stack: gigabytes, or one that takes for ever to make."""
    text, latin1 = _text("A" * 300_000), _text("latin1")
    nones, ones = b"](" + b"N" * 100_000 + b"e", b"](" + b"K\x01" * 100_000 + b"e"
    pairs = b"}(" + b"".join(_text(f"{number:04}") + b"N" for number in range(4000)) + b"u"
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + _text("b") + b"\x87R(K\x01J"
        + struct.pack("<i", 300_000 // 8) + b"\x85cnumpy\ndtype\n" + _text("f8") + b"\x89\x88\x87R(K\x03"
        + _text(">") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89%btb"
    )  # fmt: skip
    return {
        "copies of a text": _copying(text, b"c_codecs\nencode\n%b" + latin1 + b"\x86R", 8000),
        "copies of a list": _copying(nones, b"c__builtin__\nlist\n%b\x85R"),
        "copies as shapes": _copying(ones, b"ctorch\nSize\n%b\x85R"),
        "copies of a dict": _copying(pairs, b"c__builtin__\ndict\n%b\x85R", 10_000),
        "copies as sets": _copying(pairs, b"c__builtin__\nset\n%b\x85R", 10_000),
        "copies as ordered dicts": _copying(pairs, b"ccollections\nOrderedDict\n%b\x85R", 10_000),
        "copies as attributes": _copying(pairs, b"ccollections\nOrderedDict\n)R%bb", 10_000),
        "copies as Namespaces": _copying(pairs, b"cargparse\nNamespace\n)\x81%bb", 10_000),
        "copies as default dicts": _copying(pairs, b"ccollections\ndefaultdict\nc__builtin__\nlist\n%b\x86R", 10_000),
        "copies as arrays": _copying(b"c_codecs\nencode\n" + text + latin1 + b"\x86R", array, 8000),
        "copies above a node": b"comegaconf.nodes\nAnyNode\n)\x81}" + _text("_parent")
        + _copying(ones, b"ctorch\nSize\n%b\x85R") + b"sb",
        "bytes that unpack": b"c_codecs\nencode\n" * 21 + _text("A" * 4096) + latin1 + b"\x86R"
        + (_text("hex") + b"\x86R") * 20,
        "pairs of pairs as a key": b"}K\x01" + (_REMEMBER + _RECALL + b"\x86") * 40 + b"Ns",
        "a very deep nest": b"]" * 10**5 + b"a" * (10**5 - 1),
    }  # fmt: skip


def _change_zip(path: Path, change: Callable[[bytes], bytes], compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path) as source:
        members = [(info.filename, source.read(info)) for info in source.infolist()]
    with zipfile.ZipFile(path, "w", compression) as out:
        for name, content in members:
            out.writestr(name, change(content) if name.endswith("/data.pkl") else content)


_AMPLIFIED = _amplified()
for _zipped, _format in ((True, "zip"), (False, "legacy")):
    for _name in [*_raw(Path("x")), *_AMPLIFIED]:
        FILES[f"{_name}, {_format}"] = _writer_of_pickle(_name, _zipped)
AMPLIFIED = [f"{name}, zip" for name in _AMPLIFIED]  # of FILES


def _left_over(state: State, marker: Path, path: Path) -> None:
    """The copies are no part of what is loaded: they stay on the stack below it."""
    _save(state, path)
    _change_zip(path, lambda pickled: pickled[:2] + _AMPLIFIED["copies of a text"] + pickled[2:])


FILES["copies that are left over"] = _left_over
AMPLIFIED.append("copies that are left over")


# -- values that mean more than the file holds


def _nest(levels: int) -> list:
    value: list = []
    for _ in range(levels):
        value = [value]
    return value


def _laughs() -> list:
    value: Any = "ha"
    for _ in range(12):
        value = [value] * 10
    return value


def _itself() -> list:
    value: list = []
    value.append(value)
    return value


def _laughs_in_settings() -> dict:
    value: Any = 1
    for _ in range(20):
        value = {"a": value, "b": value}
    return value


_VALUES: dict[str, Callable[[State, Path], None]] = {
    "a million laughs": lambda state, _: _in_extra_state(state, _laughs()),
    "laughs in the settings": lambda state, _: state["cfg"].update(x=_laughs_in_settings()),
    "a deep nest": lambda state, _: _in_extra_state(state, _nest(200)),
    "a list in itself": lambda state, _: _in_extra_state(state, _itself()),
    "a huge view": lambda state, _: state["model"].update(x=torch.zeros(1).expand(HUGE)),
    "a huge view in the optimizer": lambda state, _: state["last_optimizer_state"].update(
        x=torch.zeros(1).expand(HUGE)
    ),
    "overlapping rows": lambda state, _: state["model"].update(x=torch.zeros(10**4).as_strided((9000, 1000), (1, 1))),
    "one storage, many names": lambda state, _: state["model"].update(
        dict.fromkeys(map(str, range(2000)), torch.zeros(10**5))
    ),
    "a tensor without memory": lambda state, _: state["model"].update(x=torch.empty(HUGE, device="meta")),
    "a sparse tensor": lambda state, _: state["model"].update(x=torch.sparse_coo_tensor([[0]], [1.0], (HUGE,))),
    "a function": lambda state, _: _in_extra_state(state, torch._utils._rebuild_tensor_v2),
    "a type": lambda state, _: _in_extra_state(state, argparse.Namespace),
}


def _writer_of_value(change: Callable[[State, Path], None], zipped: bool) -> Writer:
    def write(state: State, marker: Path, path: Path) -> None:
        change(state, marker)
        _save(state, path, zipped)

    return write


# -- settings that would run code or leak


def _set_model(name: str, value: Any) -> Callable[[State, Path], None]:
    def change(state: State, marker: Path) -> None:
        setattr(state["cfg"]["model"], name, value(marker) if callable(value) else value)

    return change


def _set_task(name: str, value: Any) -> Callable[[State, Path], None]:
    def change(state: State, marker: Path) -> None:
        state["cfg"]["task"][name] = value(marker) if callable(value) else value

    return change


def _into_args(value: str) -> Callable[[State, Path], None]:
    def change(state: State, marker: Path) -> None:
        state["args"], state["cfg"] = argparse.Namespace(**vars(state["cfg"]["model"]), x=value), None

    return change


def _into_config(value: str) -> Callable[[State, Path], None]:
    def change(state: State, marker: Path) -> None:
        state["cfg"] = omegaconf.OmegaConf.create({**state["cfg"], "x": value}, flags={"allow_objects": True})

    return change


def _into_both(model: Any, **settings: Any) -> Callable[[State, Path], None]:
    """One setting of the model that fairseq evaluates, and others beside it; functions get the marker."""

    def change(state: State, marker: Path) -> None:
        state["cfg"]["model"].adaptive_softmax_cutoff = model
        filled = {name: value(marker) if callable(value) else value for name, value in settings.items()}
        state["cfg"]["common"] = {**state["cfg"]["common"], **filled}

    return change


def _as_config(change: Callable[[omegaconf.DictConfig, State, str], Any]) -> Callable[[State, Path], None]:
    """The configuration as fairseq 1.0.0a wrote it, changed."""

    def as_config(state: State, marker: Path) -> None:
        state["cfg"] = omegaconf.OmegaConf.create(state["cfg"], flags={"allow_objects": True})
        change(state["cfg"], state, _touch(marker))

    return as_config


def _code_in_a_namespace(config: omegaconf.DictConfig, state: State, code: str) -> None:
    config.model = argparse.Namespace(**{**vars(config.model), "adaptive_softmax_cutoff": code})


def _code_in_a_node(config: omegaconf.DictConfig, state: State, code: str) -> None:
    node = omegaconf.nodes.AnyNode(parent=config, key="model")
    node._val = omegaconf.OmegaConf.create({**vars(config.model), "adaptive_softmax_cutoff": code})
    config._content["model"] = node


def _code_above(config: omegaconf.DictConfig, state: State, code: str) -> None:
    config.task.left_pad_source = "${elsewhere.code}"
    state["extra_state"]["x"] = omegaconf.OmegaConf.create({"elsewhere": {"code": code}})
    config._set_parent(state["extra_state"]["x"])


def _code_above_a_node(config: omegaconf.DictConfig, state: State, code: str) -> None:
    _code_above(config, state, code)
    config._set_parent(None)
    config.task._content["left_pad_source"]._set_parent(state["extra_state"]["x"])


def _code_as_attribute(state: State, marker: Path) -> None:
    settings = collections.OrderedDict()
    vars(settings).update(vars(state["cfg"]["model"]), adaptive_softmax_cutoff=_touch(marker))
    state["cfg"]["model"] = settings


_SETTINGS: dict[str, Callable[[State, Path], None]] = {
    "env": _set_task("source_lang", "${oc.env:HOME}"),
    "env in a Namespace": _set_model("activation_fn", "${oc.env:HOME}"),
    "env in args": _into_args("${oc.env:HOME}"),
    "env in a DictConfig": _into_config("${oc.env:HOME}"),
    "env as a key": lambda state, _: state["cfg"].update({"${oc.env:HOME}": 1}),
    "env in a reference": _set_task("source_lang", "${task.${oc.env:HOME}}"),
    "env beside text": _set_task("data", "a/${common.seed}/${oc.env:HOME}"),
    "decode": _set_task("data", "${oc.decode:${oc.env:HOME}}"),
    "create": _set_task("data", "${oc.create:{a: 1}}"),
    "a resolver of somebody": _set_task("data", lambda marker: "${mark:" + str(marker) + "}"),
    "a resolver without colon's key": _set_task("data", "${ oc.env : HOME }"),
    "target": _set_task("_target_", "os.system"),
    "target deep": _set_task("generator", {"_target_": "subprocess.Popen", "args": ["touch"]}),
    "code for a cutoff": _set_model("adaptive_softmax_cutoff", _touch),
    "code behind a blank": _set_model("adaptive_softmax_cutoff", lambda marker: " \t" + _touch(marker)),
    "code in a list": _set_model("adaptive_softmax_cutoff", lambda marker: f"[1, {_touch(marker)}]"),
    "code in a comprehension": _set_model("adaptive_softmax_cutoff", "[x for x in (1, 2)]"),
    "a power": _set_model("adaptive_softmax_cutoff", "9**9**9**9"),
    "code for layers": _set_model("encoder_layers", _touch),
    "code for a task": _set_task("left_pad_source", _touch),
    "code for a criterion": lambda state, marker: state["cfg"].update(criterion={"wer_args": _touch(marker)}),
    "code for args": lambda state, marker: _into_args(_touch(marker))(state, marker),
    "code for a DictConfig": lambda state, marker: _into_config(_touch(marker))(state, marker),
    "a reference to code": _into_both("${common.wandb_project}", wandb_project=_touch),
    "a reference to code from where it is": _into_both("${..common.wandb_project}", wandb_project=_touch),
    "a chain of references": _into_both("${common.a}", a="${common.wandb_project}", wandb_project=_touch),
    "references that join": _into_both(
        "${common.a}${common.b}", a="open(", b=lambda marker: f"{str(marker)!r}, 'w').close()"
    ),
    "a reference beside text": _into_both(
        "open(${common.wandb_project}, 'w')", wandb_project=lambda marker: repr(str(marker))
    ),
    "a resolver behind backslashes": lambda state, marker: (
        _into_args("")(state, marker), setattr(state["args"], "bpe", "$\\{mark:" + str(marker) + "\\}")
    ),
    "code as bytes": _set_model("adaptive_softmax_cutoff", lambda marker: _touch(marker).encode()),
    "code as an array": _set_model("adaptive_softmax_cutoff", np.arange(3)),
    "code in a Namespace": _as_config(_code_in_a_namespace),
    "code in a node": _as_config(_code_in_a_node),
    "code above": _as_config(_code_above),
    "code above a node": _as_config(_code_above_a_node),
    "code as an attribute": _code_as_attribute,
    "a shift": _set_model("adaptive_softmax_cutoff", "1<<99999999999"),
    "a long text": _set_model("adaptive_softmax_cutoff", "'a'*99999999999"),
    "a long tuple": _set_model("adaptive_softmax_cutoff", "(1,)*99999999999"),
    "products of products": _set_model("adaptive_softmax_cutoff", "[[[0]*9000]*9000]*9000"),
    "a product of an unknown": _set_model("adaptive_softmax_cutoff", "[0]*(9999999999+1)"),
    "a format": _set_model("adaptive_softmax_cutoff", "'%99999999999d'%1"),
    "a text of megabytes": _set_model("adaptive_softmax_cutoff", "1," * 500_000),
}  # fmt: skip

for _zipped, _format in ((True, "zip"), (False, "legacy")):
    for _name, _change in {**_VALUES, **_SETTINGS}.items():
        FILES[f"{_name}, {_format}"] = _writer_of_value(_change, _zipped)


# -- files that are no checkpoint


def _file(name: str) -> Callable[[Writer], Writer]:
    def register(write: Writer) -> Writer:
        FILES[name] = write
        return write

    return register


@_file("a DictConfig")
def _dict_config(state: State, marker: Path, path: Path) -> None:
    """Its `get` and keys are those of a dict."""
    state["cfg"]["model"].adaptive_softmax_cutoff = _touch(marker)
    _save(omegaconf.OmegaConf.create(state, flags={"allow_objects": True}), path)


@_file("packed")
def _packed(state: State, marker: Path, path: Path) -> None:
    state["model"]["x"] = torch.zeros(10**6)
    _save(state, path)
    _change_zip(path, bytes, zipfile.ZIP_DEFLATED)


@_file("larger than declared")
def _larger(state: State, marker: Path, path: Path) -> None:
    state["model"]["x"] = torch.zeros(12_345)
    _save(state, path)
    _change_zip(
        path, lambda pickled: pickled.replace(struct.pack("<cH", b"M", 12_345), struct.pack("<cH", b"M", 54_321))
    )


@_file("larger than declared, legacy")
def _larger_legacy(state: State, marker: Path, path: Path) -> None:
    state["model"]["x"] = torch.zeros(12_345)
    _save(state, path, zipped=False)
    path.write_bytes(path.read_bytes().replace(struct.pack("<cH", b"M", 12_345), struct.pack("<cH", b"M", 54_321)))


@_file("TorchScript")
def _script(state: State, marker: Path, path: Path) -> None:
    torch.jit.save(torch.jit.trace(torch.nn.Linear(1, 1), torch.ones(1)), str(path))


@_file("tar")
def _tar(state: State, marker: Path, path: Path) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in (("sys_info", {}), ("pickle", state), ("storages", 0), ("tensors", 0)):
            data = pickle.dumps(content, protocol=2)
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@_file("a bare pickle")
def _bare(state: State, marker: Path, path: Path) -> None:
    path.write_bytes(pickle.dumps(_calls(marker)["os.system"], protocol=2))


@_file("an npz")
def _npz(state: State, marker: Path, path: Path) -> None:
    with open(path, "wb") as file:
        np.savez(file, x=np.array([_calls(marker)["os.system"]], dtype=object))


@_file("an empty zip")
def _empty_zip(state: State, marker: Path, path: Path) -> None:
    zipfile.ZipFile(path, "w").close()


@_file("a web page")
def _web_page(state: State, marker: Path, path: Path) -> None:
    path.write_text("<!DOCTYPE html><html><script>touch()</script></html>")


@_file("Python")
def _python(state: State, marker: Path, path: Path) -> None:
    path.write_text(f"{_touch(marker)}\n")


def write(name: str, state: State, marker: Path, path: Path) -> None:
    """Write one of the files, from a copy of a good checkpoint's state."""
    FILES[name](copy.deepcopy(state), marker, path)
