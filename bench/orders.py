"""How much of a ratio of bench/quality.py is chance: the same for one model with its channels in other orders.

    python bench/orders.py CHECKPOINT BIN TEXT [--orders 5] [--types q3_k_m ...] [--chunks 60]

Channels of the hidden state, and those between a feed-forward's matrices, may come in any order: the model stays the
same, to a rounding of sums, but other weights share a block. Each order is quantized by llama-quantize and by llmq,
without calibration and with the same mix of types. Prints the ratio of mean KL divergences for each order, and for each
type the mean of the ratios with its standard error.
"""

import argparse
import math
import tempfile
from pathlib import Path

import numpy as np
from gguf import GGUFReader
from quality import LIMITS, Ruler, llama_quantize, llmq_quantize, tell

# Divergence, in nats, of sums that are added up in another order.
SAME = 1e-6


def reorder(path: Path, rng: np.random.Generator) -> None:
    """Changes an F32 file in place."""
    tensors = {tensor.name: tensor.data for tensor in GGUFReader(path, "r+").tensors}
    hidden = rng.permutation(tensors["output_norm.weight"].size)
    for name, data in tensors.items():
        if "attn_output" in name or "ffn_down" in name:
            data[...] = data[..., hidden, :]
        else:
            data[...] = data[..., hidden]
    for name, down in tensors.items():
        if "ffn_down" not in name:
            continue
        between = rng.permutation(down.shape[-1])
        down[...] = down[..., between]
        for other in ("ffn_gate", "ffn_up"):
            data = tensors[name.replace("ffn_down", other)]
            data[...] = data[..., between, :]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("tools", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--orders", type=int, default=5)
    parser.add_argument("--types", nargs="+", choices=LIMITS, default=list(LIMITS))
    parser.add_argument("--ctx", type=int, default=256)
    parser.add_argument("--chunks", type=int, default=60)
    arguments = parser.parse_args()
    ratios: dict[str, list[float]] = {preset: [] for preset in arguments.types}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        full = llmq_quantize(arguments.checkpoint, folder / "f32.gguf", "-q", "f32")
        ruler = Ruler(full, arguments.text.read_text("utf-8"), arguments.ctx, arguments.chunks)
        for order in range(arguments.orders):
            reorder(full, np.random.default_rng(order))  # on top of the order before
            assert ruler.divergences(full).mean() < SAME, "another model"
            for preset, found in ratios.items():
                theirs = llama_quantize(arguments.tools, full, folder / "theirs.gguf", preset)
                ours = llmq_quantize(full, folder / "ours.gguf", "-q", preset)
                found.append(float(ruler.divergences(ours).mean() / ruler.divergences(theirs).mean()))
                tell(f"{preset:8} order {order + 1}  {found[-1]:.3f}")
    for preset, found in ratios.items():
        error = np.std(found, ddof=1) / math.sqrt(len(found)) if len(found) > 1 else math.nan
        tell(f"{preset:8} mean {np.mean(found):.3f} +- {error:.3f}")


if __name__ == "__main__":
    main()
