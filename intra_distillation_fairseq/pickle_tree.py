"""Reads a pickle as a tree of what it asks to build, and builds nothing of it.

A file of a few hundred bytes can stand for gigabytes, by calls that copy what was built before, and whoever builds it
to look at it has lost. Here a call is a node that points to its arguments; the tree is as large as the file.
"""

from __future__ import annotations

import pickle
import pickletools
from collections.abc import Container
from dataclasses import dataclass
from io import BufferedIOBase
from typing import Any

from torch._utils import IMPORT_MAPPING, NAME_MAPPING


class Unwanted(pickle.UnpicklingError):
    """What is wrong with a file, as the end of the sentence "checkpoint '...' was not loaded: ..."."""


class Name(str):
    """Names a function or a type, as in "collections.OrderedDict"."""


@dataclass(eq=False, slots=True)
class Node:
    """A value that holds others.

    Attributes:
        kind: list, dict, tuple, set, storage (what a persistent id stands for), or the name of what is called.
        parts: what it holds, in their order, of a dict keys and values in turn; of a call the tuple of arguments, and
            then whatever else the result is given.
    """

    kind: str
    parts: list[Any]


def read(file: BufferedIOBase, names: Container[str]) -> Any:
    """The tree of the next pickle in a file: nodes, names, texts; None for some of the other plain values.

    Args:
        names: the functions and types that may be named.
    Raises:
        Unwanted: another name, or instructions that torch does not write.
        EOFError: the pickle has no end.
    """
    try:
        return _read(file, names)
    except ValueError as error:  # of pickletools
        cut = ("not enough data", "pickle exhausted", "no newline found", "expected ")
        if str(error).startswith(cut):
            raise EOFError from None
        raise Unwanted("its content is not that of a checkpoint") from None
    except (IndexError, KeyError, AttributeError):  # a value that is not there, or cannot hold others
        raise Unwanted("its content is not that of a checkpoint") from None


# The instructions that torch writes; its loader knows no others either.
_PLAIN = frozenset("BINUNICODE SHORT_BINSTRING BININT BININT1 BININT2 LONG1 BINFLOAT NONE NEWTRUE NEWFALSE".split())
_EMPTY = {"EMPTY_LIST": "list", "EMPTY_DICT": "dict", "EMPTY_TUPLE": "tuple", "EMPTY_SET": "set"}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def _read(file: BufferedIOBase, names: Container[str]) -> Any:
    stack: list[Any] = []
    below: list[list[Any]] = []  # what was on the stack at each open mark
    memo: dict[int, Any] = {}
    for operation, argument, _ in pickletools.genops(file):
        name = operation.name
        if name in _PLAIN:
            stack.append(argument)
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "MARK":
            below.append(stack)
            stack = []
        elif name in _EMPTY:
            stack.append(Node(_EMPTY[name], []))
        elif name == "TUPLE":
            parts, stack = stack, below.pop()
            stack.append(Node("tuple", parts))
        elif name in _TUPLES:
            parts = [stack.pop() for _ in range(_TUPLES[name])]
            stack.append(Node("tuple", parts[::-1]))
        elif name in ("APPENDS", "SETITEMS"):
            parts, stack = stack, below.pop()
            stack[-1].parts.extend(parts)
        elif name in ("APPEND", "BUILD"):
            part = stack.pop()
            stack[-1].parts.append(part)
        elif name == "SETITEM":
            held, key = stack.pop(), stack.pop()
            stack[-1].parts.extend((key, held))
        elif name == "GLOBAL":
            called = _today(*argument.split(" ", 1))
            if called not in names:
                raise Unwanted(f"it holds {called}")
            stack.append(called)
        elif name in ("REDUCE", "NEWOBJ"):
            arguments, called = stack.pop(), stack.pop()
            if not isinstance(called, Name) or arguments.kind != "tuple":
                raise Unwanted("it calls what is no function")
            stack.append(Node(called, [arguments]))
        elif name == "BINPERSID":
            stack.append(Node("storage", [stack.pop()]))
        elif name == "STOP":
            if below or len(stack) != 1:  # what is left over would be built, and seen by nobody
                raise Unwanted("its content is not that of a checkpoint")
            return stack[0]
        elif name != "PROTO":
            raise Unwanted(f"it holds the instruction {name}")
    raise EOFError


def _today(module: str, name: str) -> Name:
    """Pickles of torch hold the names of Python 2, which its loader translates."""
    if (module, name) in NAME_MAPPING:
        return Name(".".join(NAME_MAPPING[module, name]))
    return Name(f"{IMPORT_MAPPING.get(module, module)}.{name}")
