"""GGUF files of real shapes with random weights, for measuring speed and memory without a download.

    python bench/synthetic.py SHAPE TYPE OUT.gguf        e.g. 7b Q4_K_M 7b.gguf (4.4 GB)

Shapes: 7b (Mistral 7B), mid (six of its layers), moe (four layers of Mixtral 8x7B). Types: Q4_K_M, Q5_K_M, Q6_K, Q8_0,
Q4_0, with llama.cpp's mix of formats. Every tensor has the format, shape and size of the real thing. Quants are random
bytes; scales are set so that weights have a mean of zero and a deviation of 1 / sqrt(columns), which keeps activations
and logits in the range of a trained model's. There is no vocabulary: ids go in, logits come out, in llama.cpp too.
"""

import argparse
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from llmq.config import ModelConfig, tensor_shapes
from llmq.formats import F32, Q4_0, Q4_K, Q5_K, Q6_K, Q8_0, Format
from llmq.gguf_writer import GGUFWriter, TensorSpec
from quant.recipe import PRESETS, Preset, assign

CHUNK_BYTES = 1 << 24


def shape(name: str, **different: Any) -> ModelConfig:
    """Mistral 7B, but for what is given."""
    mistral: dict[str, Any] = {
        "n_layers": 32, "dim": 4096, "n_heads": 32, "n_kv_heads": 8, "head_dim": 128, "ffn_dim": 14336,
        "vocab_size": 32000, "context_length": 32768, "rms_eps": 1e-5, "rope_base": 1e6, "rope_interleaved": True,
        "n_experts": 0, "n_experts_used": 0, "window": 0, "tied_embeddings": False,
    }  # fmt: skip
    return ModelConfig(name=name, **(mistral | different))


SHAPES = {
    "7b": shape("synthetic 7B"),
    "mid": shape("synthetic six layers", n_layers=6),
    "moe": shape("synthetic mixture", n_layers=4, n_experts=8, n_experts_used=2),
}
TYPES = {name: PRESETS[name.lower()] for name in ("Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0")}
TYPES["Q4_0"] = Preset("q4_0", 2, Q4_0)


def write(path: Path, config: ModelConfig, preset: Preset, seed: int = 0) -> None:
    """Write a model of this shape; peak memory is a few chunks of 16 MiB."""
    shapes = tensor_shapes(config)
    formats = assign(preset, shapes)
    rng = np.random.Generator(np.random.SFC64(seed))
    with GGUFWriter(path, metadata(config, preset), [TensorSpec(n, s, formats[n]) for n, s in shapes.items()]) as out:
        for name, dims in shapes.items():
            for chunk in weights(rng, formats[name], dims):
                out.write(name, chunk)


def metadata(config: ModelConfig, preset: Preset) -> dict[str, Any]:
    numbers: dict[str, Any] = {
        "block_count": config.n_layers,
        "context_length": config.context_length,
        "embedding_length": config.dim,
        "feed_forward_length": config.ffn_dim,
        "attention.head_count": config.n_heads,
        "attention.head_count_kv": config.n_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_eps,
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": config.rope_base,
        "vocab_size": config.vocab_size,
    }
    if config.n_experts:
        numbers |= {"expert_count": config.n_experts, "expert_used_count": config.n_experts_used}
    return {
        "general.architecture": "llama",
        "general.name": config.name,
        "general.file_type": preset.file_type,
        "tokenizer.ggml.model": "no_vocab",
        **{f"llama.{name}": value for name, value in numbers.items()},
    }


def weights(rng: np.random.Generator, fmt: Format, dims: tuple[int, ...]) -> Iterator[np.ndarray]:
    """The tensor's bytes, in chunks of whole blocks. A norm is all ones."""
    if len(dims) == 1:
        yield np.ones(dims, np.float32)
        return
    deviation = 1 / math.sqrt(dims[-1])
    left = math.prod(dims) // fmt.block_size
    while left:
        n = min(left, CHUNK_BYTES // fmt.block_bytes)
        yield blocks(rng, fmt, n, deviation)
        left -= n


def blocks(rng: np.random.Generator, fmt: Format, n: int, deviation: float) -> np.ndarray:
    """uint8 [n, block_bytes]: `n` blocks of weights with a mean of zero and this standard deviation."""
    if fmt is F32:
        return (rng.standard_normal((n, 1), np.float32) * np.float32(deviation)).view(np.uint8)
    words = rng.integers(0, 2**64, -(-n * fmt.block_bytes // 8), np.uint64)
    found = words.view(np.uint8)[: n * fmt.block_bytes].reshape(n, fmt.block_bytes)
    SCALE[fmt](found, deviation)
    return found


# Standard deviations: of a number of b bits 2^b / sqrt(12), of a random int8 74, of a 6-bit scale from 32 to 63 and its
# mean together 48.4. In K formats the minimum has its scale's bits, and dmin is d times the middle quant.
def _scale_q8_0(found: np.ndarray, deviation: float) -> None:
    _put_half(found, 0, deviation / 74)


def _scale_q4_0(found: np.ndarray, deviation: float) -> None:
    sign = found[:, 1] & 0x80  # quants go from -8 to 7: scales of either sign bring the mean to zero
    _put_half(found, 0, deviation * math.sqrt(12) / 16)
    found[:, 1] |= sign


def _scale_k(middle: float) -> Callable[[np.ndarray, float], None]:
    def scale(found: np.ndarray, deviation: float) -> None:
        d = deviation * math.sqrt(12) / (2 * middle + 1) / 48.4
        _put_half(found, 0, d)
        _put_half(found, 2, d * middle)
        found[:, 4:8] |= 0xA0  # the highest bit of scales 0 to 3, and of 4 to 7
        found[:, 8:12] = found[:, 4:8]
        found[:, 12:16] = (found[:, 12:16] & 15) * np.uint8(17)

    return scale


def _scale_q6_k(found: np.ndarray, deviation: float) -> None:
    _put_half(found, 208, deviation * math.sqrt(12) / 64 / 74)


def _put_half(found: np.ndarray, at: int, value: float) -> None:
    found[:, at : at + 2] = np.array([value], "<f2").view(np.uint8)


SCALE: dict[Format, Callable[[np.ndarray, float], None]] = {
    Q4_0: _scale_q4_0, Q8_0: _scale_q8_0, Q4_K: _scale_k(7.5), Q5_K: _scale_k(15.5), Q6_K: _scale_q6_k,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("type", choices=TYPES)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    write(arguments.out, SHAPES[arguments.shape], TYPES[arguments.type])


if __name__ == "__main__":
    main()
