"""Tells whether a checkpoint file holds only what fairseq writes: before it is loaded, and once it is.

Before: what the instructions of its pickles name, and its strings (the text of a pickle is only read here, not run).
After: the types, sizes and depth of its values, and settings that fairseq would evaluate as Python. In between, torch's
safe loader builds the values; by itself it would also take types that fairseq never writes, and know no sizes.
"""

from __future__ import annotations

import argparse
import ast
import collections
import pickle
import pickletools
import re
import typing
from collections.abc import Iterator
from io import BufferedIOBase, BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import omegaconf
import torch
from torch._utils import IMPORT_MAPPING, NAME_MAPPING

_DTYPES = (
    "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool complex64 complex128".split()
)  # those of fairseq's tensors, with room for complex ones
_STORAGES = "Double Float Half BFloat16 Long Int Short Char Byte Bool ComplexFloat ComplexDouble".split()

# What the pickles of fairseq's checkpoints name. torch's safe loader allows more by itself: bytearray and storages of
# any size, sparse, quantised and wrapped tensors.
ALLOWED_GLOBALS = frozenset(
    [
        "argparse.Namespace",
        "collections.OrderedDict",
        "torch._utils._rebuild_tensor",
        "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_parameter",
        *(f"torch.{name}Storage" for name in _STORAGES),
        *(f"torch.{name}" for name in _DTYPES),
        "torch.Size",
        "torch.device",
        "_codecs.encode",  # bytes, in the pickles that torch writes
        "builtins.set",
        # Counts of BLEU and numbers computed by numpy, whose name of the module is not that of every version.
        "numpy.ndarray",
        "numpy.dtype",
        *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
        # The configuration as fairseq 1.0.0a wrote it.
        "omegaconf.dictconfig.DictConfig",
        "omegaconf.listconfig.ListConfig",
        "omegaconf.nodes.AnyNode",
        "omegaconf.base.ContainerMetadata",
        "omegaconf.base.Metadata",
        "typing.Any",
        "collections.defaultdict",
        "builtins.dict",
        "builtins.list",
        "builtins.int",
    ]
)  # fmt: skip

# Instructions of pickles that name or build an object in a way torch does not write.
_FORBIDDEN_INSTRUCTIONS = frozenset("STACK_GLOBAL INST OBJ NEWOBJ_EX EXT1 EXT2 EXT4 PERSID NEXT_BUFFER".split())

_REFERENCE = re.compile(r"\$\{[.\w]*\}")  # to another setting: fairseq 1.0.0a wrote some; no resolver, nothing nested
_MOST_VALUES = 1_000_000
_DEEPEST = 50
_MOST_BYTES_PER_FILE_BYTE = 64  # parameters may be shared: one storage, several names

_PLAIN = {type(None), bool, int, float, complex, str, bytes, torch.Size, torch.device, torch.dtype}
_NODES = (omegaconf.DictConfig, omegaconf.ListConfig, omegaconf.nodes.AnyNode)
_METADATA = (omegaconf.base.ContainerMetadata, omegaconf.base.Metadata)
_TYPES_OF_NODES = (typing.Any, dict, list, int)

# Settings that are names of files and folders or texts, which fairseq does not evaluate.
_TEXTS = frozenset(
    "data save_dir restore_file finetune_from_model continue_once path results_path tensorboard_logdir log_file "
    "wandb_project aim_repo user_dir input teacher".split()
)
_OPERATIONS = (ast.Call, ast.Lambda, ast.NamedExpr, ast.JoinedStr, ast.comprehension, ast.Await, ast.Yield, ast.Pow)


class Unwanted(pickle.UnpicklingError):
    """What is wrong with a file, as the end of the sentence "checkpoint '...' was not loaded: ..."."""


def check_file(path: Path) -> bool:
    """Check what a file would do if it were loaded, without loading it.

    Returns:
        Whether it has today's format, a zip archive, which alone can be mapped.
    Raises:
        Unwanted: its pickles name something that fairseq does not write, or hold the call of a resolver.
        EOFError: it ends too early.
    """
    with open(path, "rb") as file:
        if file.read(4) == b"PK\3\4":
            _check_pickle(BytesIO(_pickle_of_zip(path)))
            return True
        file.seek(0)
        for _ in range(5):  # torch's old format: magic number, version, machine, the values, the keys of the storages
            _check_pickle(file)
        return False


def _pickle_of_zip(path: Path) -> bytes:
    # torch's own reader: another one might take another part of the file for the pickle
    reader = torch._C.PyTorchFileReader(str(path))
    if sum(map(reader.get_record_size, reader.get_all_records())) > path.stat().st_size:
        raise Unwanted("it is packed, or parts of it lie over each other, and it would unpack to more than its size")
    if not reader.has_record("data.pkl") or reader.has_record("constants.pkl"):
        raise Unwanted("it is a zip archive, but not one of tensors and plain values")
    return reader.get_record("data.pkl")


def _check_pickle(file: BufferedIOBase) -> None:
    instructions = pickletools.genops(file)
    while True:
        try:
            operation, argument, _ = next(instructions)
        except StopIteration:
            return
        except ValueError as error:
            cut = ("not enough data", "pickle exhausted", "no newline found", "expected ")
            raise (
                EOFError if str(error).startswith(cut) else Unwanted("its content is not that of a checkpoint")
            ) from None
        if operation.name == "GLOBAL":
            name = _today(*argument.split(" ", 1))
            if name not in ALLOWED_GLOBALS:
                raise Unwanted(f"it holds {name}")
        if operation.name in _FORBIDDEN_INSTRUCTIONS:
            raise Unwanted(f"it holds the instruction {operation.name}")
        if isinstance(argument, (str, bytes)):
            _check_interpolations(argument if isinstance(argument, str) else argument.decode("latin-1"))


def _today(module: str, name: str) -> str:
    """Pickles of torch hold the names of Python 2, which its loader translates."""
    if (module, name) in NAME_MAPPING:
        return ".".join(NAME_MAPPING[module, name])
    return f"{IMPORT_MAPPING.get(module, module)}.{name}"


def _check_interpolations(text: str) -> None:
    if "${" in text and "${" in _REFERENCE.sub("", text):
        raise Unwanted(f"it holds {_short(text)}, which would call a resolver of omegaconf")


def check_values(state: Any, file_bytes: int) -> None:
    """Check what was loaded from a file.

    Args:
        state: as torch's safe loader gives it.
        file_bytes: the file's size.
    Raises:
        Unwanted: types, tensors or settings that fairseq's checkpoints do not hold, or more values than a file of this
            size can mean.
    """
    weigher = _Weigher()
    weigher.weigh(state)
    if weigher.tensor_bytes > _MOST_BYTES_PER_FILE_BYTE * file_bytes:
        raise Unwanted(f"its {file_bytes:,} bytes stand for tensors of {weigher.tensor_bytes:,} bytes")
    if isinstance(state, dict):
        for part in ("cfg", "args"):
            _check_settings(part, state.get(part))


class _Weigher:
    """Counts values as if nothing were shared, which is how many a copy of them would have."""

    def __init__(self) -> None:
        self.tensor_bytes = 0
        self._counts: dict[int, int | None] = {}  # of what is being counted: None

    def weigh(self, value: Any, depth: int = 0) -> int:
        if type(value) in _PLAIN or isinstance(value, np.generic):
            return 1
        if isinstance(value, torch.Tensor):
            self._check_tensor(value)
            return 1
        if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
            return 1
        if depth > _DEEPEST:
            raise Unwanted(f"its values are nested more than {_DEEPEST} deep")
        if id(value) in self._counts:
            count = self._counts[id(value)]
            if count is None:
                raise Unwanted("a value holds itself")
            return count
        self._counts[id(value)] = None
        count = 1 + sum(self.weigh(part, depth + 1) for part in _parts(value))
        if count > _MOST_VALUES:
            raise Unwanted(f"it stands for more than {_MOST_VALUES:,} values")
        self._counts[id(value)] = count
        return count

    def _check_tensor(self, tensor: torch.Tensor) -> None:
        if (
            type(tensor) not in (torch.Tensor, torch.nn.Parameter)
            or tensor.layout is not torch.strided
            or tensor.device.type != "cpu"
            or tensor.is_quantized
        ):
            raise Unwanted(f"it holds a tensor of the kind {type(tensor).__name__}, {tensor.layout}, {tensor.device}")
        declared = tensor.numel() * tensor.element_size()
        if declared > tensor.untyped_storage().nbytes():
            raise Unwanted(
                f"it holds a tensor of the shape {tuple(tensor.shape)} with only "
                f"{tensor.untyped_storage().nbytes():,} bytes behind it"
            )
        self.tensor_bytes += declared


def _parts(value: Any) -> Iterator[Any]:
    """The values in a container."""
    kind = type(value)
    if kind in (list, tuple, set):
        yield from value
    elif kind in (dict, collections.OrderedDict) or (
        kind is collections.defaultdict and value.default_factory in (None, *_TYPES_OF_NODES)
    ):
        for key, held in value.items():
            yield key
            yield held
        yield from getattr(value, "__dict__", {}).values()  # as `_metadata` of a state_dict
    elif kind is argparse.Namespace:
        yield from vars(value).values()
    elif kind in _NODES:
        # Its parent is what it was reached from, or is never looked at by fairseq.
        yield from (held for name, held in vars(value).items() if name != "_parent")
    elif kind in _METADATA:
        yield from (held for held in vars(value).values() if held not in _TYPES_OF_NODES)
    else:
        what = value.__name__ if isinstance(value, type) or callable(value) else kind.__name__
        raise Unwanted(f"it holds {what}")


def _check_settings(name: str, value: Any) -> None:
    """Refuse a setting that would run code: fairseq evaluates some as Python, as --adaptive-softmax-cutoff."""
    if isinstance(value, omegaconf.nodes.AnyNode):
        value = value._val
    elif isinstance(value, (omegaconf.DictConfig, omegaconf.ListConfig)):
        value = value._content
    elif isinstance(value, argparse.Namespace):
        value = vars(value)
    if isinstance(value, str) and name not in _TEXTS and _is_code(value):
        raise Unwanted(f"its setting {name} is code: {_short(value)}")
    if isinstance(value, dict):
        if "_target_" in value:
            raise Unwanted(f"its setting {name} asks to build {_short(str(value['_target_']))}")
        for key, held in value.items():
            _check_settings(str(key), held)
    elif isinstance(value, (list, tuple, set)):
        for held in value:
            _check_settings(name, held)


def _is_code(text: str) -> bool:
    """Whether a text is an expression of Python that does anything: numbers, tuples, sums and products do not."""
    if text.isidentifier():
        return False
    try:
        tree = ast.parse(text.lstrip(" \t"), mode="eval")
        return any(isinstance(node, _OPERATIONS) for node in ast.walk(tree))
    except (SyntaxError, ValueError):
        return False  # nor could fairseq evaluate it
    except (RecursionError, MemoryError):
        return True


def _short(text: str) -> str:
    shown = ascii(text)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."
