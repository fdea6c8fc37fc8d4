"""Errors of our encoders over those of llama.cpp's, on weights of many kinds.

    python bench/encoders.py LIB [SEEDS]      LIB: llama.cpp's libggml-base, a shared library

For each format and kind of weights, the worst of 4 (or SEEDS) draws: the root mean square of decode(encode(x)) - x,
ours over theirs, without importance (plain squares count) and with a random one (squares weighted by it count). Exits 1
where a ratio is above 1 or ours is not finite; where theirs is not finite, ours has only to be.
"""

import ctypes
import sys
from collections.abc import Callable

import numpy as np

from llmq.formats import Q8_0, Format, dequantize, row_bytes
from quant.encode import encode
from quant.grid import GRIDS

N_ROWS, N_COLS = 32, 1024
SHAPE = (N_ROWS, N_COLS)


def outliers_in_rows(rng: np.random.Generator) -> np.ndarray:
    x = rng.standard_normal(SHAPE) * 0.01
    x[np.arange(N_ROWS), rng.integers(0, N_COLS, N_ROWS)] = 3
    return x


def smooth(rng: np.random.Generator) -> np.ndarray:
    return np.sin(np.arange(N_COLS) / 40 + rng.uniform(0, 6, (N_ROWS, 1)))


KINDS: dict[str, Callable[[np.random.Generator], np.ndarray]] = {
    "normal": lambda rng: rng.standard_normal(SHAPE) * 0.02,
    "laplace": lambda rng: rng.laplace(size=SHAPE) * 0.02,
    "student t": lambda rng: rng.standard_t(3, SHAPE) * 0.02,
    "uniform": lambda rng: rng.uniform(-1, 1, SHAPE),
    "sparse": lambda rng: rng.standard_normal(SHAPE) * (rng.random(SHAPE) < 0.05),
    "zeros": lambda _: np.zeros(SHAPE),
    "constant": lambda _: np.full(SHAPE, 0.37),
    "negative constant": lambda _: np.full(SHAPE, -0.37),
    "positive": lambda rng: np.abs(rng.standard_normal(SHAPE)),
    "negative": lambda rng: -np.abs(rng.standard_normal(SHAPE)),
    "ternary": lambda rng: rng.integers(-1, 2, SHAPE) * 0.05,
    "an outlier a row": outliers_in_rows,
    "outlier channels": lambda rng: rng.standard_normal(SHAPE) * np.where(rng.random(N_COLS) < 0.02, 20, 1),
    "narrow around 1": lambda rng: 1 + rng.standard_normal(SHAPE) * 0.01,
    "decades": lambda rng: rng.standard_normal(SHAPE) * np.repeat(10.0 ** rng.uniform(-6, 2, (N_ROWS, 32)), 32, 1),
    "around 1e-5": lambda rng: rng.standard_normal(SHAPE) * 1e-5,
    "around 1e-6": lambda rng: rng.standard_normal(SHAPE) * 1e-6,
    "around 1e-8": lambda rng: rng.standard_normal(SHAPE) * 1e-8,
    "largest halves": lambda rng: rng.choice([65504.0, -65504.0, 30000.0, 1.0], SHAPE),
    "float subnormals": lambda rng: rng.standard_normal(SHAPE) * 1e-40,
    "mixture": lambda rng: rng.standard_normal(SHAPE) * np.where(rng.random(SHAPE) < 0.1, 5, 1),
    "smooth": smooth,
    "rows of one value": lambda rng: np.repeat(rng.standard_normal((N_ROWS, 1)), N_COLS, 1),
}


def encode_theirs(lib: ctypes.CDLL, fmt: Format, rows: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    packed = np.empty((N_ROWS, row_bytes(fmt, N_COLS)), np.uint8)
    weights = None if importance is None else importance.ctypes.data
    size = lib.ggml_quantize_chunk(fmt.id, rows.ctypes.data, packed.ctypes.data, 0, N_ROWS, N_COLS, weights)
    assert size == packed.size, (fmt.name, size)
    return packed


def mean_square(fmt: Format, rows: np.ndarray, packed: np.ndarray, importance: np.ndarray | None) -> float:
    with np.errstate(all="ignore"):
        off = np.square(dequantize(fmt, packed).reshape(SHAPE).astype(np.float64) - rows)
        return float(np.average(off.mean(0), weights=importance))


def compare(fmt: Format, rows: np.ndarray, lib: ctypes.CDLL, importance: np.ndarray | None) -> float:
    """Ours over theirs, infinite where ours is not finite and 0 where only theirs is not."""
    ours = mean_square(fmt, rows, encode(fmt, rows, importance), importance)
    theirs = mean_square(fmt, rows, encode_theirs(lib, fmt, rows, importance), importance)
    if not np.isfinite(ours):
        return np.inf
    if ours == theirs or not np.isfinite(theirs):
        return float(ours == theirs)
    return float(np.sqrt(ours / theirs)) if theirs else np.inf


def main() -> None:
    lib = ctypes.CDLL(sys.argv[1])
    address, count = ctypes.c_void_p, ctypes.c_int64
    lib.ggml_quantize_chunk.argtypes = [ctypes.c_int, address, address, count, count, count, address]
    lib.ggml_quantize_chunk.restype = ctypes.c_size_t
    formats, n_seeds = [*GRIDS, Q8_0], int(sys.argv[2]) if len(sys.argv) > 2 else 4
    worst = 0.0
    for weighted in (False, True):
        print(f"\n{'weighted' if weighted else 'plain':18}" + "".join(f"{fmt.name:>9}" for fmt in formats))  # noqa: T201
        for kind, draw in KINDS.items():
            found = [0.0] * len(formats)
            for seed in range(1, n_seeds + 1):
                rng = np.random.default_rng(seed)
                rows = draw(rng).astype(np.float32)
                importance = np.square(rng.standard_normal(N_COLS, np.float32)) + np.float32(0.01) if weighted else None
                found = [
                    max(before, compare(fmt, rows, lib, importance)) for before, fmt in zip(found, formats, strict=True)
                ]
            print(f"{kind:18}" + "".join(f"{value:9.4f}" for value in found), flush=True)  # noqa: T201
            worst = max(worst, *found)
    print(f"\nworst: {worst:.6f}")  # noqa: T201
    sys.exit(worst > 1)


if __name__ == "__main__":
    main()
