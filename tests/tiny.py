"""Tiny `llama` models with random weights and a small SentencePiece vocabulary, for tests of the whole engine."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llmq.formats import BF16, F16, F32, Format, dequantize, row_bytes
from llmq.gguf import GGUFWriter, TensorSpec

NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6

# Where a block has its half floats, and the value that brings the weights to a standard deviation of about 0.03; a
# minimum is half the range, so that the mean is near 0.
HALVES = {
    "Q8_0": {0: 0.0004},
    "Q4_0": {0: 0.006},
    "Q4_1": {0: 0.006, 2: -0.045},
    "Q5_0": {0: 0.003},
    "Q5_1": {0: 0.003, 2: -0.0465},
    "Q4_K": {0: 0.00018, 2: 0.00135},
    "Q5_K": {0: 0.00009, 2: 0.0014},
    "Q6_K": {208: 0.00003},
    "Q2_K": {80: 0.0035, 82: 0.0053},
    "Q3_K": {108: 0.0007},
    "IQ4_NL": {0: 0.0004},
    "IQ4_XS": {0: 0.00002},
}


def random_rows(rng: np.random.Generator, fmt: Format, shape: tuple[int, ...]) -> np.ndarray:
    """Valid packed rows, uint8 [*shape[:-1], row_bytes], of weights with a standard deviation near 0.03."""
    if fmt in (F32, F16, BF16):
        weights = (rng.standard_normal(shape) * 0.03).astype(np.float32)
        if fmt == BF16:
            halves = (weights.view(np.uint32) >> 16).astype(np.uint16)
            return halves.view(np.uint8)
        return weights.astype(np.float32 if fmt == F32 else np.float16).view(np.uint8)
    n_rows = int(np.prod(shape[:-1]))
    blocks = rng.integers(0, 256, (n_rows, shape[-1] // fmt.block_size, fmt.block_bytes), dtype=np.uint8)
    for at, value in HALVES[fmt.name].items():
        scale = (value * rng.uniform(0.8, 1.2, blocks.shape[:2])).astype(np.float16)
        blocks[:, :, at : at + 2] = scale[..., None].view(np.uint8)
    return blocks.reshape(*shape[:-1], row_bytes(fmt, shape[-1]))


def vocabulary(size: int) -> dict[str, Any]:
    """<unk>, <s>, </s>, the 256 byte tokens, then pieces: letters, and short words that merge from them."""
    letters = ["\u2581", *"etaoinshrdlucmfwypvbgkqjxz", *"ETAOINSHRDLUCMFWYPVBGKQJXZ", *",.!?'\"-:;0123456789"]
    starts = ["\u2581" + letter for letter in "tahiswbcmf"]
    pairs = [a + b for a in "thesanriol" for b in "heanrtiosu"]
    triples = [start + letter for start in starts for letter in "heaoinrtsu"]
    fillers = [f"\u2581w{i}" for i in range(size)]
    # dict.fromkeys: a pair may come up twice.
    pieces = list(dict.fromkeys([*starts, *pairs, *triples, *fillers]))[: size - 259 - len(letters)] + letters
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    assert len(tokens) == size, f"a vocabulary has at least {259 + len(letters)} tokens"
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": np.array([0.0] * 259 + [-float(i) for i in range(len(pieces))], np.float32),
        "tokenizer.ggml.token_type": np.array(
            [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * len(pieces), np.int32
        ),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
    }


def tiny_gguf(
    path: Path,
    *,
    n_layers: int = 2,
    dim: int = 256,
    n_heads: int = 8,
    n_kv_heads: int = 2,
    head_dim: int = 32,
    ffn_dim: int = 512,
    vocab_size: int = 512,
    n_experts: int = 0,
    n_experts_used: int = 2,
    window: int = 0,
    format: Format | Mapping[str, Format] = F32,
    rope_base: float = 10_000.0,
    seed: int = 0,
    tied: bool = False,
) -> dict[str, np.ndarray]:
    """Writes a model and returns its float32 weights by tensor name, as the file holds them.

    `format` is one for all matrices, or several by the end of the tensor's name ({"attn_v.weight": Q6_K, "": Q4_K}:
    the first that fits). Norms and routers are F32 in any case.
    """
    metadata: dict[str, Any] = {
        "general.architecture": "llama",
        "general.name": "tiny",
        "llama.block_count": n_layers,
        "llama.context_length": 4096,
        "llama.embedding_length": dim,
        "llama.feed_forward_length": ffn_dim,
        "llama.attention.head_count": n_heads,
        "llama.attention.head_count_kv": n_kv_heads,
        "llama.attention.key_length": head_dim,
        "llama.attention.value_length": head_dim,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.dimension_count": head_dim,
        "llama.rope.freq_base": rope_base,
        "llama.vocab_size": vocab_size,
    }
    if window:
        metadata["llama.attention.sliding_window"] = window
    if n_experts:
        metadata |= {"llama.expert_count": n_experts, "llama.expert_used_count": n_experts_used}
    metadata |= vocabulary(vocab_size)
    formats = format if isinstance(format, Mapping) else {"": format}
    shapes = _shapes(n_layers, dim, n_heads * head_dim, n_kv_heads * head_dim, ffn_dim, vocab_size, n_experts)
    if tied:
        del shapes["output.weight"]
    specs = [TensorSpec(name, shape, _format(name, shape, formats)) for name, shape in shapes.items()]
    rng = np.random.default_rng(seed)
    weights = {}
    with GGUFWriter(path, metadata, specs) as writer:
        for spec in specs:
            if len(spec.shape) == 1:
                rows = rng.uniform(0.8, 1.2, spec.shape).astype(np.float32).view(np.uint8)
            else:
                rows = random_rows(rng, spec.format, spec.shape)
            writer.write(spec.name, rows)
            weights[spec.name] = dequantize(spec.format, rows)
    return weights


def _format(name: str, shape: tuple[int, ...], formats: Mapping[str, Format]) -> Format:
    if len(shape) == 1 or name.endswith("ffn_gate_inp.weight"):
        return F32
    return next(fmt for suffix, fmt in formats.items() if name.endswith(suffix))


def _shapes(
    n_layers: int, dim: int, q_dim: int, kv_dim: int, ffn_dim: int, vocab_size: int, n_experts: int
) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (vocab_size, dim),
        "output_norm.weight": (dim,),
        "output.weight": (vocab_size, dim),
    }
    for n in range(n_layers):
        blk = f"blk.{n}."
        shapes[blk + "attn_norm.weight"] = (dim,)
        shapes[blk + "attn_q.weight"] = (q_dim, dim)
        shapes[blk + "attn_k.weight"] = (kv_dim, dim)
        shapes[blk + "attn_v.weight"] = (kv_dim, dim)
        shapes[blk + "attn_output.weight"] = (dim, q_dim)
        shapes[blk + "ffn_norm.weight"] = (dim,)
        if n_experts:
            shapes[blk + "ffn_gate_inp.weight"] = (n_experts, dim)
            shapes[blk + "ffn_gate_exps.weight"] = (n_experts, ffn_dim, dim)
            shapes[blk + "ffn_up_exps.weight"] = (n_experts, ffn_dim, dim)
            shapes[blk + "ffn_down_exps.weight"] = (n_experts, dim, ffn_dim)
        else:
            shapes[blk + "ffn_gate.weight"] = (ffn_dim, dim)
            shapes[blk + "ffn_up.weight"] = (ffn_dim, dim)
            shapes[blk + "ffn_down.weight"] = (dim, ffn_dim)
    return shapes
