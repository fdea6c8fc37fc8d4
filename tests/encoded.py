"""What encoders wrote, decoded by the gguf package, so that encoder and decoder cannot share a mistake."""

import gguf
import numpy as np

from llmq.formats import Format
from quant.grid import Grid
from quant.pack import pack
from quant.search import Found, blocks_of


def decoded(fmt: Format, raw: np.ndarray) -> np.ndarray:
    """float32 weights of uint8 [n, row_bytes]."""
    with np.errstate(all="ignore"):
        return gguf.dequantize(raw, gguf.GGMLQuantizationType(fmt.id))


def decoded_search(grid: Grid, found: Found) -> np.ndarray:
    """float64 [n, n_cols], what the search found for rows of weights."""
    packed = pack(grid.format, blocks_of(grid, found))
    return decoded(grid.format, packed).reshape(found.levels.shape).astype(np.float64)


def lcg_rows(n_rows: int, n_cols: int) -> np.ndarray:
    """float32 from -1/16 to 1/16, the same on every machine."""
    state, values = 12345, []
    for _ in range(n_rows * n_cols):
        state = state * 1103515245 + 12345 & 0x7FFFFFFF
        values.append((state >> 16) - 16384)
    return (np.array(values, np.float32) * np.float32(2.0**-18)).reshape(n_rows, n_cols)
