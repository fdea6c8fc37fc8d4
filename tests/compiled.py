"""Inline kernel code made callable from tests: addresses in, results in memory."""

import hashlib
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import types

from llmq.jit import Kernel, kernel


def compiled(function: Callable[..., Any]) -> Kernel:
    """A kernel of int64 arguments. Cached under its source, which the cache folder's own stamp does not cover."""
    stamp = hashlib.sha256(inspect.getsource(inspect.getmodule(function)).encode()).hexdigest()[:8]
    arguments = (types.int64,) * len(inspect.signature(function).parameters)
    return kernel(*arguments, name=f"{function.__name__}_{stamp}")(function)


def address(array: np.ndarray) -> int:
    assert array.flags.c_contiguous
    return array.ctypes.data


def aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Zeros that start on a multiple of 64 bytes."""
    n_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = np.zeros(n_bytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + n_bytes].view(dtype).reshape(shape)
