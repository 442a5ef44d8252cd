"""Tells whether a checkpoint file holds only what fairseq writes: before it is loaded, and once it is.

Before: what its pickles name, how much they stand for, and their texts (a pickle is only read here, not run). After:
the types of its values, the sizes of its tensors, its settings. In between, torch's safe loader builds the values; by
itself it would also take types that fairseq never writes, and know no sizes.
"""

from __future__ import annotations

import argparse
import collections
import typing
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import omegaconf
import torch

from intra_distillation_fairseq import pickle_tree, settings_vetting
from intra_distillation_fairseq.pickle_tree import Name, Node, Unwanted

_DTYPES = (
    "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool complex64 complex128".split()
)  # those of fairseq's tensors, with room for complex ones
_STORAGES = "Double Float Half BFloat16 Long Int Short Char Byte Bool ComplexFloat ComplexDouble".split()

# What the pickles of fairseq's checkpoints call. torch's safe loader allows more by itself: bytearray and storages of
# any size, sparse, quantised and wrapped tensors.
_CALLED = frozenset(
    [
        "argparse.Namespace",
        "collections.OrderedDict",
        "torch._utils._rebuild_tensor",
        "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_parameter",
        "torch.Size",
        "torch.device",
        "_codecs.encode",  # bytes, in the pickles that torch writes
        "builtins.set",
        # Counts of BLEU and numbers computed by numpy, whose name of the module is not that of every version.
        "numpy.dtype",
        *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
        # The configuration as fairseq 1.0.0a wrote it.
        "omegaconf.dictconfig.DictConfig",
        "omegaconf.listconfig.ListConfig",
        "omegaconf.nodes.AnyNode",
        "omegaconf.base.ContainerMetadata",
        "omegaconf.base.Metadata",
        "collections.defaultdict",
    ]
)  # fmt: skip
# What they name as a value, and never call.
_NAMED = frozenset(
    [
        *(f"torch.{name}Storage" for name in _STORAGES),
        *(f"torch.{name}" for name in _DTYPES),
        *("numpy.ndarray", "typing.Any", "builtins.dict", "builtins.list", "builtins.int"),
    ]
)
ALLOWED_GLOBALS = _CALLED | _NAMED

_MOST_VALUES = 2_000_000  # a tensor is some twenty of them, with its shape and where it lies
_CHARACTERS_PER_VALUE = 100
_DEEPEST = 50
_TOO_DEEP = f"its values are nested more than {_DEEPEST} deep"
_MOST_BYTES_PER_FILE_BYTE = 64  # parameters may be shared: one storage, several names

_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.Size, torch.device, torch.dtype)
_NODES = (omegaconf.DictConfig, omegaconf.ListConfig, omegaconf.nodes.AnyNode)
_METADATA = (omegaconf.base.ContainerMetadata, omegaconf.base.Metadata)
_TYPES_OF_NODES = (typing.Any, dict, list, int)
_KINDS_OF_NODES = tuple(f"{node.__module__}.{node.__qualname__}" for node in _NODES)


def check_file(path: Path) -> bool:
    """Check what a file would do if it were loaded, without loading it.

    Returns:
        Whether it has today's format, a zip archive, which alone can be mapped.
    Raises:
        Unwanted: its pickles name something that fairseq does not write, stand for more than a checkpoint can hold, or
            have texts that omegaconf would take for a call.
        EOFError: it ends too early.
    """
    with open(path, "rb") as file:
        if file.read(4) == b"PK\3\4":
            _Scales().check(pickle_tree.read(BytesIO(_pickle_of_zip(path)), ALLOWED_GLOBALS))
            return True
        file.seek(0)
        for _ in range(5):  # torch's old format: magic number, version, machine, the values, the keys of the storages
            _Scales().check(pickle_tree.read(file, ALLOWED_GLOBALS))
        return False


def _pickle_of_zip(path: Path) -> bytes:
    # torch's own reader: another one might take another part of the file for the pickle
    reader = torch._C.PyTorchFileReader(str(path))
    if sum(map(reader.get_record_size, reader.get_all_records())) > path.stat().st_size:
        raise Unwanted("it is packed, or parts of it lie over each other, and it would unpack to more than its size")
    if not reader.has_record("data.pkl") or reader.has_record("constants.pkl"):
        raise Unwanted("it is a zip archive, but not one of tensors and plain values")
    return reader.get_record("data.pkl")


class _Scales:
    """Counts what a pickle stands for as if nothing were shared, which is the most that its calls can copy."""

    def __init__(self) -> None:
        self._measures: dict[int, tuple[int, int] | None] = {}  # of a node: values, depth; of one under way: None
        self._parents: list[Node] = []

    def check(self, tree: Any) -> None:
        """Refuse a tree that stands for too much, or holds what fairseq does not write."""
        self._measure(tree, 0)
        if any(id(parent) not in self._measures for parent in self._parents):
            raise Unwanted("a part of a configuration belongs to something else")

    def _measure(self, value: Any, above: int) -> tuple[int, int]:
        """How many values it is, and how deep they are nested; `above`: in how many it is nested itself."""
        if isinstance(value, Name):
            if value not in _NAMED:
                raise Unwanted(f"it holds {value}")
            return 1, 0
        if isinstance(value, str):
            settings_vetting.check_references(value)
            return 1 + len(value) // _CHARACTERS_PER_VALUE, 0
        if not isinstance(value, Node):
            return 1, 0
        if id(value) not in self._measures:
            if above > _DEEPEST:
                raise Unwanted(_TOO_DEEP)
            self._measures[id(value)] = None
            count, depth = 1, 0
            for part in self._parts(value):
                count_of_part, depth_of_part = self._measure(part, above + 1)
                count, depth = count + count_of_part, max(depth, depth_of_part)
                if count > _MOST_VALUES:
                    raise Unwanted(f"it stands for more than {_MOST_VALUES:,} values")
            self._measures[id(value)] = count, depth + 1
        measured = self._measures[id(value)]
        if measured is None:
            raise Unwanted("a value holds itself")
        if above + measured[1] > _DEEPEST:  # where it is held a second time
            raise Unwanted(_TOO_DEEP)
        return measured

    def _parts(self, node: Node) -> Iterator[Any]:
        """What is built to build a node; in configurations of omegaconf each node also points to the one above it."""
        if node.kind in _KINDS_OF_NODES:
            for state in node.parts[1:]:
                if getattr(state, "kind", "") != "dict":
                    raise Unwanted(f"it holds a {node.kind} that is none")
                for key, held in zip(state.parts[::2], state.parts[1::2]):
                    if key == "_parent" and isinstance(held, Node):
                        self._parents.append(held)
                    else:
                        yield from (key, held)
            return
        if isinstance(node.kind, Name):
            if node.kind not in _CALLED:
                raise Unwanted(f"it calls {node.kind}")
            if node.kind == "_codecs.encode" and node.parts[0].parts[1:] != ["latin1"]:
                raise Unwanted("it holds bytes in an encoding that torch does not use")  # some unpack
        yield from node.parts


def check_values(state: Any, file_bytes: int) -> None:
    """Check what was loaded from a file that has passed `check_file`.

    Args:
        state: as torch's safe loader gives it.
        file_bytes: the file's size.
    Raises:
        Unwanted: types, tensors or settings that fairseq's checkpoints do not hold, or larger tensors than a file of
            this size can mean.
    """
    if type(state) is not dict:
        raise Unwanted(f"it is a {type(state).__name__}, not a dict")
    tensor_bytes = sum(_tensor_bytes(tensor) for tensor in _tensors(state))
    if tensor_bytes > _MOST_BYTES_PER_FILE_BYTE * file_bytes:
        raise Unwanted(f"its {file_bytes:,} bytes stand for tensors of {tensor_bytes:,} bytes")
    settings_vetting.check(state)


def _tensors(state: Any) -> Iterator[torch.Tensor]:
    """Every tensor, for each of its names, on the way through all values."""
    left, seen = [state], set()
    while left:
        value = left.pop()
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
            pass
        elif not (type(value) in _PLAIN or isinstance(value, np.generic)) and id(value) not in seen:
            seen.add(id(value))
            left.extend(_held(value))


def _tensor_bytes(tensor: torch.Tensor) -> int:
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
    return declared


def _held(value: Any) -> Iterator[Any]:
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
    elif kind in (argparse.Namespace, *_NODES):
        yield from vars(value).values()
    elif kind in _METADATA:
        yield from (held for held in vars(value).values() if held not in _TYPES_OF_NODES)
    else:
        what = value.__name__ if isinstance(value, type) or callable(value) else kind.__name__
        raise Unwanted(f"it holds {what}")
