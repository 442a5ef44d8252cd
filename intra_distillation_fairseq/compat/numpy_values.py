"""Arrays and numbers of numpy in a checkpoint, built without letting the file choose memory or objects.

A pickle builds an array by calling numpy's own functions. They trust their arguments: `numpy.ndarray(shape, object,
bytes)` takes bytes for addresses of objects, and the state of a dtype sets its internal flags. Under numpy's names
torch's safe loader is therefore given what is here, which takes plain numbers only.
"""

from __future__ import annotations

import pickle
import re
from typing import Any

import numpy as np


class DType:
    """Stands for numpy.dtype.

    Args:
        code: kind and bytes, as in "f8"; the other arguments of numpy's are of no account here.
    """

    def __init__(self, code: str, align: Any = False, copy: Any = False):
        if not isinstance(code, str) or not re.fullmatch(r"b1|[iu][1248]|f[248]|c8|c16", code):
            raise pickle.UnpicklingError("numpy values that are no plain numbers")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        if state[1] == ">":
            self.dtype = self.dtype.newbyteorder(">")


class Array(np.ndarray):
    """Stands for numpy.ndarray while a file is read; an array like any other afterwards, and saved as numpy's."""

    def __new__(cls) -> Array:
        return super().__new__(cls, (0,), np.int8)

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran, data = state
        if type(dtype) is not DType or type(data) is not bytes:
            raise pickle.UnpicklingError("numpy values that are no plain numbers")
        super().__setstate__((1, tuple(map(int, shape)), dtype.dtype, bool(fortran), data))

    def __reduce_ex__(self, protocol: int) -> tuple:
        return self.view(np.ndarray).__reduce_ex__(protocol)


def reconstruct(kind: Any, shape: Any, code: Any) -> Array:
    """Stands for numpy's `_reconstruct`: an empty array, which gets its content next."""
    return Array()


def scalar(dtype: DType, data: bytes) -> np.generic:
    """Stands for numpy's `scalar`: one number from its bytes."""
    if type(dtype) is not DType or type(data) is not bytes:
        raise pickle.UnpicklingError("numpy values that are no plain numbers")
    return np.frombuffer(data, dtype.dtype, count=1)[0]
