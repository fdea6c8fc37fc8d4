"""Sizes that kernels, the engine and forecasts of its memory agree on."""

from llmq.formats import F16, IQ4_XS, Q8_0, Format

# Kinds of activations, 256 at a time: floats, bytes with one scale, bytes with a scale for every 32; and the bytes that
# each takes (kernels/activation.py has what lies in them).
FLOAT, K, BLOCK = 0, 1, 2
GROUP_BYTES = (1024, 320, 320)

BATCH = 512  # most tokens that the engine reads together
FEW = 8  # more tokens than this go faster by panels, and have enough to share without parts of their context
PART = 1024  # positions of a part
PART_STATE = 64  # bytes of a part's maximum and total, behind its sums f32 [head_dim]

# The types of a cache, by what rows of it are kept as.
KV_LAYOUTS = {"f16": F16, "q8_0": Q8_0}


def activation_kind(fmt: Format) -> int:
    """The kind of activations that rows of this format are multiplied with: FLOAT, K or BLOCK."""
    if fmt.block_size == 1:
        return FLOAT
    return BLOCK if fmt.block_size == 32 or fmt == IQ4_XS else K
