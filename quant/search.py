"""The search for scales, minima and levels of a row's sub-blocks; lanes are sub-blocks, 16 at a time.

Every lane first tries spans of its own and fits scale and minimum to the levels of each by weighted least squares. The
scales of a block then become integers times a half float. What that costs is won back jointly: integers move by a step
or two where that fits better, and the half floats are fitted to all levels of the block, again and again.

The first part is what ggml does (`ggml-quants.c`); moving integers after rounding is in ik_llama.cpp, pull request 624.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import types

from llmq.simd import (
    abs_f32x16,
    clear_bytes,
    copy_bytes,
    i8_of_i32x16,
    i32_of_f32x16,
    load_f32x16,
    max_lanes_f32x16,
    round_f32x16,
    stack,
    store_f32x16,
    store_i8x16,
    where_less,
)
from quant.grid import TABLE, UNIFORM, Grid
from quant.lanes import (
    StrictKernel,
    as_finite_half,
    as_half,
    clamp,
    divide_or_zero,
    half_unit,
    larger,
    largest_of_8,
    nearest_of_iq4,
    other_half,
    smaller,
    splat,
    strict,
    strict_kernel,
    sum_of_8,
    transpose,
)
from quant.pack import Blocks

LANES = 16
SMALLEST_NORMAL_HALF = np.float32(2.0**-14)
# Of the largest column's: where nothing counts, what is nearest to the weights is still the best.
LEAST_IMPORTANCE = 2.0**-40
# Bytes of d, dmin, scales and minima of 16 sub-blocks.
PARAMS = 4 * 64
I64, F32 = types.int64, types.float32
# Shares of the weights' squares. Where weights have few values, several scales fit exactly, and rounding must not
# choose among them: sub-blocks with the same scale are what a block's integers hold best.
EXACT_FIT, SAME_FIT = 2.0**-40, 2.0**-20
# Above this, what was lost is weights that became 0 beside a larger one, which no scale brings back.
MOST_GAIN = 1.03125


@strict
def group_sum(x, n_sub):  # type: ignore[no-untyped-def]
    """Each lane gets the sum over the lanes of its block."""
    if n_sub == 1:
        return x
    x = sum_of_8(x)
    return x + other_half(x) if n_sub == 16 else x


@strict
def group_largest(x, n_sub):  # type: ignore[no-untyped-def]
    if n_sub == 1:
        return x
    x = largest_of_8(x)
    return larger(x, other_half(x)) if n_sub == 16 else x


@strict
def uniform(y, low, high):  # type: ignore[no-untyped-def]
    return clamp(round_f32x16(y), low, high)


@strict
def tabled(y, low, high):  # type: ignore[no-untyped-def]  # noqa: ARG001
    return nearest_of_iq4(y)


@strict
def load_lanes(tile, source, size):  # type: ignore[no-untyped-def]
    """16 sub-blocks one after the other at `source` to `size` rows of 16 lanes."""
    transpose(tile, 64, source, 4 * size)
    if size == 32:
        transpose(tile + 1024, 64, source + 64, 128)


def make_search(has_minima: bool, nearest: Callable[..., Any], name: str) -> StrictKernel:
    """The kernel (levels, params, x, importance, n_rows, n_cols, size, n_sub, unweighted, low, high, scale_low,
    scale_high, minimum_high, first, step, tries, rounds) that fills `levels` and `params` of Found.

    Inside, `x` and `w` are addresses of `size` rows of 16 floats, weights and their importance, and `params` is that of
    d, dmin, scales and minima of 16 sub-blocks, f32x16 each. `unweighted`: importance is the same for all.
    """

    @strict
    def error(x, w, size, low, high, scale, minimum):  # type: ignore[no-untyped-def]
        """Sum of w * (scale * level - minimum - x)^2 per lane, with the levels nearest to x."""
        inverse, total = divide_or_zero(splat(1), scale), splat(0)
        for i in range(0, 64 * size, 64):
            value = load_f32x16(x + i)
            off = scale * nearest((value + minimum) * inverse, low, high) - (value + minimum)
            total = total + load_f32x16(w + i) * (off * off)
        return total

    @strict
    def fit_span(x, w, size, low, high, free, first, step, tries):  # type: ignore[no-untyped-def]
        """Scale and minimum per lane, from the levels of `tries` inverse scales (first + k * step) / span."""
        zero = splat(0)
        least, most = load_f32x16(x), load_f32x16(x)
        sum_w, sum_wx, sum_wxx = zero, zero, zero
        for i in range(0, 64 * size, 64):
            value, weight = load_f32x16(x + i), load_f32x16(w + i)
            least, most = smaller(least, value), larger(most, value)
            sum_w, sum_wx = sum_w + weight, sum_wx + weight * value
            sum_wxx = sum_wxx + weight * (value * value)
        if free == 0:
            least = smaller(least, zero)
        span = most - least
        scale, minimum = span / splat(high), zero - least
        best = error(x, w, size, low, high, scale, minimum)
        for k in range(tries):
            inverse = divide_or_zero(splat(first + step * np.float32(k)), span)
            sum_q, sum_qq, sum_qx = zero, zero, zero
            for i in range(0, 64 * size, 64):
                value = load_f32x16(x + i)
                level = nearest((value - least) * inverse, low, high)
                weighted = load_f32x16(w + i) * level
                sum_q, sum_qq = sum_q + weighted, sum_qq + weighted * level
                sum_qx = sum_qx + weighted * value
            determinant = sum_w * sum_qq - sum_q * sum_q
            new_scale = divide_or_zero(sum_w * sum_qx - sum_wx * sum_q, determinant)
            new_minimum = divide_or_zero(sum_q * sum_qx - sum_qq * sum_wx, determinant)
            if free == 0:
                new_scale = where_less(new_minimum, zero, divide_or_zero(sum_qx, sum_qq), new_scale)
                new_minimum = larger(new_minimum, zero)
            new_error = error(x, w, size, low, high, new_scale, new_minimum)
            new_error = where_less(zero, determinant, new_error, splat(np.inf))
            enough = best - sum_wxx * splat(EXACT_FIT)
            scale = where_less(new_error, enough, new_scale, scale)
            minimum = where_less(new_error, enough, new_minimum, minimum)
            best = where_less(new_error, enough, new_error, best)
        return scale, minimum

    @strict
    def fit_farthest(x, w, size, n_sub, low, high, first, step, tries):  # type: ignore[no-untyped-def]
        """Scale per lane, from the levels of inverse scales -(first + k * step) / (weight farthest from zero), and,
        where levels are not evenly spaced, of the opposite sign too; a half float where it stands alone."""
        zero = splat(0)
        extreme = zero
        for i in range(0, 64 * size, 64):
            value = load_f32x16(x + i)
            extreme = where_less(abs_f32x16(extreme), abs_f32x16(value), value, extreme)
        scale, best = zero, zero
        if n_sub == 1:
            best = zero - error(x, w, size, low, high, zero, zero)
        for k in range(2 * tries):
            end = -(first + step * np.float32(k)) if k < tries else first + step * np.float32(k - tries) + low + high
            inverse = divide_or_zero(splat(end), extreme)
            sum_qq, sum_qx = zero, zero
            for i in range(0, 64 * size, 64):
                value = load_f32x16(x + i)
                level = nearest(value * inverse, low, high)
                weighted = load_f32x16(w + i) * level
                sum_qq, sum_qx = sum_qq + weighted * level, sum_qx + weighted * value
            new_scale = divide_or_zero(sum_qx, sum_qq)
            fitted, enough = new_scale * sum_qx, best * splat(1 + SAME_FIT)
            if n_sub == 1:
                new_scale = as_finite_half(new_scale)
                fitted, enough = zero - error(x, w, size, low, high, new_scale, zero), best
            scale = where_less(enough, fitted, new_scale, scale)
            best = where_less(enough, fitted, fitted, best)
        return scale

    @strict
    def units(values, n_sub, least, most):  # type: ignore[no-untyped-def]
        """Half floats of which the block's values are whole numbers from `least` to `most`, and these numbers."""
        if n_sub == 1:
            return as_finite_half(values), splat(1)
        zero = splat(0)
        up, down = group_largest(values, n_sub), group_largest(zero - values, n_sub)
        count = most if least == 0 else -least
        reach = larger(up, down)
        if least < 0:
            # The farthest value becomes the lowest integer, which reaches farther than the highest: so must the unit,
            # where the farthest on the other side is nearly as far.
            reach = larger(reach, smaller(up, down) * splat(count / most))
        unit = half_unit(reach, count)
        if least < 0:
            unit = where_less(down, up, zero - unit, unit)
        return unit, clamp(round_f32x16(divide_or_zero(values, unit)), least, most)

    @strict
    def fit_minimum(x, w, size, low, high, scale, minimum):  # type: ignore[no-untyped-def]
        """The minimum that fits the levels nearest to x best."""
        inverse, sum_w, total = divide_or_zero(splat(1), scale), splat(0), splat(0)
        for i in range(0, 64 * size, 64):
            value, weight = load_f32x16(x + i), load_f32x16(w + i)
            sum_w = sum_w + weight
            total = total + weight * (scale * nearest((value + minimum) * inverse, low, high) - value)
        return divide_or_zero(total, sum_w)

    @strict
    def move_integers(x, w, size, low, high, d, dmin, scales, minima, least, most, minimum_high):  # type: ignore[no-untyped-def]
        """The best of each lane's integers, their neighbours and what minimum fits each scale, and the error."""
        best = error(x, w, size, low, high, d * scales, dmin * minima)
        new_scales, new_minima = scales, minima
        for i in range(-1, 2):
            scale = clamp(scales + splat(i), least, most)
            fitted = minima
            if has_minima:
                fitted = fit_minimum(x, w, size, low, high, d * scale, dmin * minima)
                fitted = round_f32x16(divide_or_zero(fitted, dmin))
            for j in range(-2 if has_minima else 0, 4 if has_minima else 1):
                minimum = minima + splat(j) if j < 3 else fitted
                minimum = clamp(minimum, np.float32(0), minimum_high)
                off = error(x, w, size, low, high, d * scale, dmin * minimum)
                new_scales = where_less(off, best, scale, new_scales)
                new_minima = where_less(off, best, minimum, new_minima)
                best = smaller(off, best)
        return new_scales, new_minima, best

    @strict
    def fit_units(x, w, size, n_sub, low, high, d, dmin, scales, minima):  # type: ignore[no-untyped-def]
        """d and dmin that fit the levels of all lanes of a block best, as half floats."""
        zero = splat(0)
        scale, minimum = d * scales, dmin * minima
        inverse = divide_or_zero(splat(1), scale)
        sum_w, sum_x, sum_q, sum_qq, sum_qx = zero, zero, zero, zero, zero
        for i in range(0, 64 * size, 64):
            value, weight = load_f32x16(x + i), load_f32x16(w + i)
            level = nearest((value + minimum) * inverse, low, high)
            weighted = weight * level
            sum_w, sum_x, sum_q = sum_w + weight, sum_x + weight * value, sum_q + weighted
            sum_qq, sum_qx = sum_qq + weighted * level, sum_qx + weighted * value
        qq = group_sum(scales * scales * sum_qq, n_sub)
        qx = group_sum(scales * sum_qx, n_sub)
        if not has_minima:
            return as_finite_half(divide_or_zero(qx, qq)), dmin
        qm = group_sum(scales * minima * sum_q, n_sub)
        mm = group_sum(minima * minima * sum_w, n_sub)
        mx = group_sum(minima * sum_x, n_sub)
        determinant = qq * mm - qm * qm
        apart = where_less(qq * mm * splat(1e-5), determinant, splat(1), zero)
        new_d = where_less(
            zero, apart, divide_or_zero(mm * qx - qm * mx, determinant), divide_or_zero(qx + qm * dmin, qq)
        )
        new_dmin = where_less(zero, apart, divide_or_zero(qm * qx - qq * mx, determinant), dmin)
        return as_finite_half(new_d), as_finite_half(new_dmin)

    @strict
    def try_units(x, w, size, n_sub, low, high, scale, d, dmin, minima, least, most):  # type: ignore[no-untyped-def]
        """The best of `d` and half floats fitted to the integers of units around it, mostly larger; with its dmin and
        integers. Scales that hardly differ would all lie between the two highest integers of `d`."""
        scales = clamp(round_f32x16(divide_or_zero(scale, d)), least, most)
        best = group_sum(error(x, w, size, low, high, d * scales, dmin * minima), n_sub)
        best_d, best_dmin, best_scales = d, dmin, scales
        for k in range(-2, 11):
            unit = as_half(d * splat(1 + 0.006 * k * abs(k)))
            scales = clamp(round_f32x16(divide_or_zero(scale, unit)), least, most)
            new_d, new_dmin = fit_units(x, w, size, n_sub, low, high, unit, dmin, scales, minima)
            off = group_sum(error(x, w, size, low, high, new_d * scales, new_dmin * minima), n_sub)
            best_d, best_dmin = where_less(off, best, new_d, best_d), where_less(off, best, new_dmin, best_dmin)
            best_scales, best = where_less(off, best, scales, best_scales), smaller(off, best)
        return best_d, best_dmin, best_scales

    @strict
    def mean(x, w, size):  # type: ignore[no-untyped-def]
        sum_w, sum_wx = splat(0), splat(0)
        for i in range(0, 64 * size, 64):
            weight = load_f32x16(w + i)
            sum_w, sum_wx = sum_w + weight, sum_wx + weight * load_f32x16(x + i)
        return divide_or_zero(sum_wx, sum_w)

    @strict
    def zero_if_better(x, w, size, n_sub, low, high, d, dmin, scales, minima):  # type: ignore[no-untyped-def]
        """d and dmin, both 0 where that leaves less error, as it can where `d` is among the subnormal halves."""
        zero, few_bits = splat(0), splat(SMALLEST_NORMAL_HALF)
        if max_lanes_f32x16(zero - abs_f32x16(d)) <= -SMALLEST_NORMAL_HALF:
            return d, dmin
        off = group_sum(error(x, w, size, low, high, d * scales, dmin * minima), n_sub)
        none = group_sum(error(x, w, size, low, high, zero, zero), n_sub)
        none = where_less(abs_f32x16(d), few_bits, none, splat(np.inf))
        return where_less(none, off, zero, d), where_less(none, off, zero, dmin)

    @strict
    def regain(params, x, size, n_sub, low, high):  # type: ignore[no-untyped-def]
        """Makes d and dmin at `params` larger by what the block's product with its own weights has lost.

        A least squares fit is smaller on the whole than what it fits, by the share of squares that is error. Random
        errors of many matrices cancel for the most part; this one is the same in all of them, and adds up.
        """
        zero, d, dmin = splat(0), load_f32x16(params), load_f32x16(params + 64)
        scale, minimum = d * load_f32x16(params + 128), dmin * load_f32x16(params + 192)
        inverse, sum_xx, sum_xy = divide_or_zero(splat(1), scale), zero, zero
        for i in range(0, 64 * size, 64):
            value = load_f32x16(x + i)
            made = scale * nearest((value + minimum) * inverse, low, high) - minimum
            sum_xx, sum_xy = sum_xx + value * value, sum_xy + value * made
        gain = divide_or_zero(group_sum(sum_xx, n_sub), group_sum(sum_xy, n_sub))
        gain = clamp(gain, np.float32(1), np.float32(MOST_GAIN))
        store_f32x16(params, as_finite_half(d * gain))
        store_f32x16(params + 64, as_finite_half(dmin * gain))

    @strict
    def set_levels(levels, x, size, low, high, params):  # type: ignore[no-untyped-def]
        """The levels of 16 sub-blocks, bytes, one sub-block after the other."""
        scale = load_f32x16(params) * load_f32x16(params + 128)
        minimum = load_f32x16(params + 64) * load_f32x16(params + 192)
        inverse = divide_or_zero(splat(1), scale)
        for i in range(0, 64 * size, 64):
            store_f32x16(x + i, nearest((load_f32x16(x + i) + minimum) * inverse, low, high))
        rows = stack(1024)
        for half in range(0, size, 16):
            transpose(rows, 64, x + 64 * half, 64)
            for lane in range(16):
                level = i8_of_i32x16(i32_of_f32x16(load_f32x16(rows + 64 * lane)))
                store_i8x16(levels + size * lane + half, level)

    @strict
    def search(  # type: ignore[no-untyped-def]
        params, x, w, size, n_sub, low, high, scale_low, scale_high, minimum_high, first, step, tries, rounds
    ):
        zero, zero_f = splat(0), np.float32(0)
        if has_minima:
            scale, minimum = fit_span(x, w, size, low, high, 1 if n_sub == 1 else 0, first, step, tries)
            d, scales = units(scale, n_sub, scale_low, scale_high)
            # Where the scale is lost, the minimum alone has to stand for the sub-block.
            lost = zero - mean(x, w, size)
            lost = lost if n_sub == 1 else larger(lost, zero)
            minimum = where_less(zero, d * scales, minimum, lost)
            dmin, minima = units(minimum, n_sub, zero_f, minimum_high)
            if n_sub == 1:
                # Weights all alike: the scale makes good what the minimum loses as a half float.
                d = where_less(zero, abs_f32x16(d), d, as_half(mean(x, w, size) + dmin))
        else:
            scale = fit_farthest(x, w, size, n_sub, low, high, first, step, tries)
            d, scales = units(scale, n_sub, scale_low, scale_high)
            dmin, minima = zero, zero
        if n_sub > 1 and rounds > 0:
            d, dmin, scales = try_units(x, w, size, n_sub, low, high, scale, d, dmin, minima, scale_low, scale_high)
        for _ in range(rounds):
            if n_sub > 1:
                scales, minima, off = move_integers(
                    x, w, size, low, high, d, dmin, scales, minima, scale_low, scale_high, minimum_high
                )
            else:
                off = error(x, w, size, low, high, d * scales, dmin * minima)
            new_d, new_dmin = fit_units(x, w, size, n_sub, low, high, d, dmin, scales, minima)
            new_off = error(x, w, size, low, high, new_d * scales, new_dmin * minima)
            off, new_off = group_sum(off, n_sub), group_sum(new_off, n_sub)
            d, dmin = where_less(new_off, off, new_d, d), where_less(new_off, off, new_dmin, dmin)
        d, dmin = zero_if_better(x, w, size, n_sub, low, high, d, dmin, scales, minima)
        store_f32x16(params, d)
        store_f32x16(params + 64, dmin)
        store_f32x16(params + 128, scales)
        store_f32x16(params + 192, minima)

    @strict_kernel(*[I64] * 9, *[F32] * 7, *[I64] * 2, name=name)
    def kernel(  # type: ignore[no-untyped-def]
        levels, params, x, importance, n_rows, n_cols, size, n_sub, unweighted,
        low, high, scale_low, scale_high, minimum_high, first, step, tries, rounds,
    ):  # fmt: skip
        space, column_space, bytes_space = stack(2048), stack(2048), stack(512)
        tile, w = stack(2048), stack(2048)
        per_group = LANES * size
        for group in range((n_cols + per_group - 1) // per_group):
            at = per_group * group
            n = min(per_group, n_cols - at)
            clear_bytes(column_space, 2048)
            copy_bytes(column_space, importance + 4 * at, 4 * n)
            for row in range(n_rows):
                clear_bytes(space, 4 * per_group)
                copy_bytes(space, x + 4 * (row * n_cols + at), 4 * n)
                load_lanes(tile, space, size)
                load_lanes(w, column_space, size)
                search(
                    params, tile, w, size, n_sub, low, high, scale_low, scale_high, minimum_high, first, step, tries,
                    rounds,
                )  # fmt: skip
                if unweighted:
                    regain(params, tile, size, n_sub, low, high)
                set_levels(bytes_space, tile, size, low, high, params)
                copy_bytes(levels + row * n_cols + at, bytes_space, n)
                params += PARAMS

    return kernel


KERNELS = {
    (True, UNIFORM): make_search(True, uniform, "search_span"),
    (False, UNIFORM): make_search(False, uniform, "search_farthest"),
    (False, TABLE): make_search(False, tabled, "search_table"),
}


@dataclass(frozen=True, slots=True)
class Found:
    """`levels` int8 [n, n_cols]; `params` float32 [n_groups, n, 4, 16]: d, dmin, scales and minima of 16 sub-blocks."""

    levels: np.ndarray
    params: np.ndarray


def search(grid: Grid, rows: np.ndarray, importance: np.ndarray | None, *, rounds: int) -> Found:
    """Levels and scales for float32 `rows` [n, n_cols].

    `importance` float32 [n_cols] weighs the squared errors of the columns. None: all alike, and products keep their
    size, as `regain` has it. `rounds` is how often scales are fitted jointly.
    """
    n_rows, n_cols = rows.shape
    n_groups = -(-n_cols // (LANES * grid.size))
    columns = np.ones(n_cols, np.float32) if importance is None else _scaled(importance)
    levels = np.empty((n_rows, n_cols), np.int8)
    params = np.empty((n_groups, n_rows, 4, LANES), np.float32)
    KERNELS[grid.minima is not None, grid.spacing](
        levels.ctypes.data, params.ctypes.data, rows.ctypes.data, columns.ctypes.data, n_rows, n_cols, grid.size,
        grid.n_sub, importance is None, *grid.levels, *grid.scales, (grid.minima or (0, 0))[1], grid.first, grid.step,
        grid.tries, rounds,
    )  # fmt: skip
    return Found(levels, params)


def _scaled(importance: np.ndarray) -> np.ndarray:
    """The same in relation to each other, from LEAST_IMPORTANCE to 1: products of them stay within float32's range."""
    _, exponent = np.frexp(importance.max())
    return np.maximum(np.ldexp(importance, -exponent), LEAST_IMPORTANCE).astype(np.float32)


def blocks_of(grid: Grid, found: Found) -> Blocks:
    """What was found, block by block."""
    n_rows, n_cols = found.levels.shape
    n_blocks, n_lanes = n_rows * n_cols // grid.format.block_size, n_cols // grid.size
    fields = found.params.transpose(2, 1, 0, 3).reshape(4, n_rows, -1)[:, :, :n_lanes]
    d, dmin, scales, minima = fields.reshape(4, n_blocks, grid.n_sub)
    levels = found.levels.reshape(n_blocks, -1)
    return Blocks(levels, d[:, 0], dmin[:, 0], scales.astype(np.int8), minima.astype(np.int8))
