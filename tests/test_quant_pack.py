"""Packing of bits: what the gguf package reads out of the bytes is what was put in."""

import numpy as np
import pytest
from encoded import decoded
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from llmq.formats import IQ4_VALUES
from quant.grid import GRIDS, TABLE, Grid
from quant.pack import PACK, Blocks, pack

ALL = pytest.mark.parametrize("grid", GRIDS.values(), ids=lambda grid: grid.format.name)


def integers(low: int, high: int) -> st.SearchStrategy[int]:
    return st.integers(int(low), int(high))


@st.composite
def blocks(draw: st.DrawFn, grid: Grid) -> Blocks:
    n, per_block = draw(st.integers(1, 3)), grid.format.block_size
    levels = st.sampled_from([int(v) for v in IQ4_VALUES]) if grid.spacing == TABLE else integers(*grid.levels)
    halves = arrays(np.float16, n, elements=st.floats(-65504, 65504, width=16))
    shape = (n, grid.n_sub)
    return Blocks(
        draw(arrays(np.int8, (n, per_block), elements=levels, fill=st.nothing())),
        draw(halves).astype(np.float32),
        draw(halves).astype(np.float32) if grid.minima else np.zeros(n, np.float32),
        draw(arrays(np.int8, shape, elements=integers(*grid.scales), fill=st.nothing())),
        draw(arrays(np.int8, shape, elements=integers(*(grid.minima or (0, 0))), fill=st.nothing())),
    )


@ALL
@given(data=st.data())
@settings(deadline=None, max_examples=40)
def test_bytes_hold_what_was_packed(grid: Grid, data: st.DataObject) -> None:
    packed = data.draw(blocks(grid))
    scales = np.repeat(packed.d[:, None] * packed.scales.astype(np.float32), grid.size, 1)
    minima = np.repeat(packed.dmin[:, None] * packed.minima.astype(np.float32), grid.size, 1)
    expected = scales * packed.levels.astype(np.float32) - minima
    raw = pack(grid.format, packed)
    assert raw.shape == (len(packed.d), grid.format.block_bytes)
    np.testing.assert_array_equal(decoded(grid.format, raw), expected)


def test_every_grid_is_packed() -> None:
    assert PACK.keys() == GRIDS.keys()
