"""Strict arithmetic in 16 lanes: what an encoder writes must not depend on the processor or on the number of threads.

The runtime's kernels let the compiler reorder sums and replace divisions. These do not: every operation is rounded as
written, so the same weights give the same bytes on every machine.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
from numba import njit, types
from numba.core.ccallback import CFunc

from llmq.formats import IQ4_VALUES
from llmq.jit import Kernel
from llmq.simd import (
    f32x16,
    ll,
    load_f16x16,
    splat_f32x16,
    stack,
    store_f16x16,
    tile_f32,
    tile_load,
    tile_store,
    transpose_f32,
    where_less,
)
from llmq.simd.vector import const, op, shuffle

SMALLEST_HALF = 2.0**-24
EXACT: dict[str, Any] = {"error_model": "numpy"}
INLINE: dict[str, Any] = {"forceinline": True, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}

strict = njit(nogil=True, **INLINE, **EXACT)


class StrictKernel(Kernel):
    """An entry point like `llmq.jit.Kernel`, compiled without the liberties of fast-math."""

    def _cfunc(self) -> CFunc:
        cfunc = CFunc(self._function, (self._signature.args, types.void), locals={}, options=dict(EXACT))
        cfunc.compile()
        return cfunc


def strict_kernel(*argtypes: Any, name: str = "") -> Callable[[Callable[..., Any]], StrictKernel]:
    """Decorate a function of addresses, sizes (int64) and float32 values."""

    def wrap(function: Callable[..., Any]) -> StrictKernel:
        return StrictKernel(function, types.void(*argtypes), name or function.__name__)

    return wrap


def _across(step: int) -> Callable[..., Any]:
    return lambda b, x: shuffle(b, x, x, [lane ^ step for lane in range(16)])


# Each lane gets the one whose number differs in one bit. Sums built from them are the same in all lanes, bit for bit.
across1, across2, across4, other_half = (op(_across(step), f32x16, f32x16) for step in (1, 2, 4, 8))


def _nearest_of_iq4(b: Any, x: Any) -> Any:
    """The nearest of IQ4_VALUES: the lowest, plus the step to the next for every midpoint that x is above."""
    every = lambda value: const(ll(f32x16), [float(value)] * 16)  # noqa: E731
    values = [int(value) for value in IQ4_VALUES]
    found = every(values[0])
    for low, high in pairwise(values):
        above = b.fcmp_ordered(">", x, every((low + high) / 2))
        found = b.fadd(found, b.select(above, every(high - low), every(0)))
    return found


nearest_of_iq4 = op(_nearest_of_iq4, f32x16, f32x16)


@strict
def splat(x):  # type: ignore[no-untyped-def]
    return splat_f32x16(np.float32(x))


@strict
def smaller(x, y):  # type: ignore[no-untyped-def]
    return where_less(x, y, x, y)


@strict
def larger(x, y):  # type: ignore[no-untyped-def]
    return where_less(x, y, y, x)


@strict
def clamp(x, low, high):  # type: ignore[no-untyped-def]
    return larger(smaller(x, splat(high)), splat(low))


@strict
def sum_of_8(x):  # type: ignore[no-untyped-def]
    """Each lane gets the sum of its half of the vector."""
    x = x + across1(x)
    x = x + across2(x)
    return x + across4(x)


@strict
def largest_of_8(x):  # type: ignore[no-untyped-def]
    x = larger(x, across1(x))
    x = larger(x, across2(x))
    return larger(x, across4(x))


@strict
def divide_or_zero(x, y):  # type: ignore[no-untyped-def]
    """x / y in the lanes where y is not zero, 0 in the others."""
    zero, one = splat(0), splat(1)
    size = larger(y, zero - y)
    safe = where_less(zero, size, y, one)
    return where_less(zero, size, x / safe, zero)


@strict
def transpose(to, to_stride, x, stride):  # type: ignore[no-untyped-def]
    """16 rows of 16 floats, `stride` bytes apart at address `x`, to 16 columns `to_stride` bytes apart at `to`."""
    tile_store(to, to_stride, transpose_f32(tile_load(tile_f32(16, 16), x, stride)))


@strict
def as_half(x):  # type: ignore[no-untyped-def]
    """Each lane rounded to the nearest half float."""
    space = stack(32)
    store_f16x16(space, x)
    return load_f16x16(space)


@strict
def as_finite_half(x):  # type: ignore[no-untyped-def]
    return as_half(clamp(x, np.float32(-65504), np.float32(65504)))


@strict
def half_unit(largest, count):  # type: ignore[no-untyped-def]
    """Per lane the half float of which `count` reach `largest` (not negative).

    Among subnormal halves the nearest can be far too small, or 0; then it is the next one.
    """
    unit = as_half(largest / splat(count))
    return where_less(unit * splat(count + 0.5), largest, as_half(unit + splat(SMALLEST_HALF)), unit)
