"""Small Hugging Face checkpoints with random weights and a trained vocabulary, written as json and bytes."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from vocabularies import trained_model

VOCAB_SIZE = 608  # eight more than the trained vocabulary has


def safetensors_bytes(tensors: Mapping[str, tuple[str, np.ndarray]], **changes: Any) -> bytes:
    """A file of {name: (dtype, array of the bit patterns)}; `changes` replace whole entries of the header."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (dtype, array) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [at, at + array.nbytes]}
        at += array.nbytes
    raw = json.dumps(header | changes).encode()
    return len(raw).to_bytes(8, "little") + raw + b"".join(array.tobytes() for _dtype, array in tensors.values())


def bf16(weights: np.ndarray) -> np.ndarray:
    """Cut to the upper half of each float: bit patterns as u2."""
    return (weights.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def hf_config(**changes: Any) -> dict[str, Any]:
    return {
        "model_type": "mistral", "hidden_act": "silu", "vocab_size": VOCAB_SIZE, "hidden_size": 256,
        "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 64, "max_position_embeddings": 1024, "sliding_window": 64, "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    } | changes  # fmt: skip


def hf_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    dim, ffn, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    experts = config.get("num_local_experts", 0)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], dim)}
    for i in range(config["num_hidden_layers"]):
        at = f"model.layers.{i}."
        shapes |= {at + "input_layernorm.weight": (dim,), at + "post_attention_layernorm.weight": (dim,)}
        shapes |= {at + "self_attn.q_proj.weight": (q, dim), at + "self_attn.k_proj.weight": (kv, dim)}
        shapes |= {at + "self_attn.v_proj.weight": (kv, dim), at + "self_attn.o_proj.weight": (dim, q)}
        if not experts:
            shapes |= {f"{at}mlp.{role}_proj.weight": (ffn, dim) for role in ("gate", "up")}
            shapes[at + "mlp.down_proj.weight"] = (dim, ffn)
            continue
        shapes[at + "block_sparse_moe.gate.weight"] = (experts, dim)
        for e in range(experts):
            expert = f"{at}block_sparse_moe.experts.{e}."
            shapes |= {
                expert + "w1.weight": (ffn, dim),
                expert + "w2.weight": (dim, ffn),
                expert + "w3.weight": (ffn, dim),
            }
    shapes["model.norm.weight"] = (dim,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], dim)
    return shapes


def stored(weights: np.ndarray, dtype: str) -> tuple[str, np.ndarray]:
    return dtype, {"BF16": bf16, "F16": np.float16, "F32": np.float32}[dtype](weights)


def exact(dtype: str, array: np.ndarray) -> np.ndarray:
    """The float32 weights that a file's bit patterns stand for."""
    if dtype == "BF16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32)


def write_checkpoint(folder: Path, dtype: str = "BF16", shards: int = 1, **changes: Any) -> dict[str, np.ndarray]:
    """Writes a checkpoint and returns its float32 weights by Hugging Face name; `changes` go into config.json."""
    config = hf_config(**changes)
    rng = np.random.default_rng(3)
    tensors = {
        name: stored(rng.standard_normal(shape) * 0.05 + (len(shape) == 1), dtype)
        for name, shape in hf_shapes(config).items()
    }
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.model").write_bytes(trained_model())
    (folder / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": True, "add_eos_token": False}))
    if shards == 1:
        (folder / "model.safetensors").write_bytes(safetensors_bytes(tensors))
    else:
        names = list(tensors)
        weight_map = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(names)}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        for shard in set(weight_map.values()):
            part = {name: tensors[name] for name in names if weight_map[name] == shard}
            (folder / shard).write_bytes(safetensors_bytes(part))
    return {name: exact(*tensor) for name, tensor in tensors.items()}
