"""Weights that a format cannot hold, or that are no numbers: refused by the name of their tensor."""

import numpy as np

from llmq.errors import FileFormatError, UnsupportedError
from llmq.formats import BF16, F32, Format, dequantize, row_bytes
from llmq.gguf import GGUF

# Weights that are looked at together.
STRIP = 1 << 20
# The largest magnitude a format holds; block formats keep scales and minima as half floats.
BF16_MAX = float(np.uint32(0x7F7F8000 - 1).view(np.float32))
LIMITS = {F32: float(np.finfo(np.float32).max), BF16: BF16_MAX}
HALF_MAX = 65504.0


def check_range(name: str, fmt: Format, rows: np.ndarray) -> None:
    """Raises FileFormatError where weights are not finite, UnsupportedError where one is too large for the format."""
    largest = max(float(rows.max()), -float(rows.min()))
    # Written so that NaN, which compares false with everything, is caught too.
    if not largest < np.inf:
        raise FileFormatError(f"tensor {name} has weights that are not finite; download or make the checkpoint again")
    if largest > LIMITS.get(fmt, HALF_MAX):
        raise UnsupportedError(
            f"tensor {name} has a weight of magnitude {largest:.4g}, too large for {fmt.name}; quantize to bf16 or f32"
        )


def check_finite(gguf: GGUF, *prefixes: str) -> None:
    """Raises FileFormatError where a tensor whose name begins so has weights that are not finite.

    It reads them all, so it is for when a run of the model gave no numbers.
    """
    for name, info in gguf.tensors.items():
        if name.startswith(prefixes):
            rows = gguf.data(name).reshape(-1, row_bytes(info.format, info.shape[-1]))
            step = max(1, STRIP // info.shape[-1])
            for at in range(0, len(rows), step):
                check_range(name, F32, dequantize(info.format, rows[at : at + step]))
