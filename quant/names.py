"""Hugging Face names to GGUF names: tensors, hyper-parameters, and the order of rotary rows.

Hugging Face keeps the two halves of a rotary pair half a head apart, GGUF's llama architecture side by side; the rows
of attn_q and attn_k are reordered for that. Keys and names: llama.cpp's converter and `docs/gguf.md` of ggml.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmq.config import MAX_EXPERTS, MAX_EXPERTS_USED, MAX_LAYERS, MAX_SIZE, ModelConfig
from llmq.errors import FileFormatError, UnsupportedError
from llmq.gguf import quoted
from quant.files import damaged
from quant.safetensors import Stored

CONFIG = "config.json"
MODEL_TYPES = ("mistral", "mixtral", "llama")
Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Placement:
    """One GGUF tensor and the checkpoint's tensors that make it: one, or one per expert, rows of each `shape`."""

    name: str
    sources: tuple[str, ...]
    shape: Shape
    rotary_heads: int = 0


def read_hf_config(values: Mapping[str, Any], name: str) -> ModelConfig:
    """The model that a parsed config.json describes.

    Raises FileFormatError where a value is missing or cannot be, UnsupportedError for other kinds of model.
    """
    _refuse_others(values)
    n_heads = _integer(values, "num_attention_heads", 1, MAX_SIZE)
    dim = _integer(values, "hidden_size", 1, MAX_SIZE)
    n_experts = _integer(values, "num_local_experts", 1, MAX_EXPERTS) if values["model_type"] == "mixtral" else 0
    config = ModelConfig(
        n_layers=_integer(values, "num_hidden_layers", 1, MAX_LAYERS),
        dim=dim,
        n_heads=n_heads,
        n_kv_heads=_integer(values, "num_key_value_heads", 1, n_heads, n_heads),
        head_dim=_integer(values, "head_dim", 2, MAX_SIZE, dim // n_heads),
        ffn_dim=_integer(values, "intermediate_size", 1, MAX_SIZE),
        vocab_size=_integer(values, "vocab_size", 1, MAX_SIZE),
        context_length=_integer(values, "max_position_embeddings", 1, 2**31 - 1),
        rms_eps=_real(values, "rms_norm_eps"),
        rope_base=_rope_base(values),
        rope_interleaved=True,
        n_experts=n_experts,
        n_experts_used=_integer(values, "num_experts_per_tok", 1, min(n_experts, MAX_EXPERTS_USED)) if n_experts else 0,
        window=_integer(values, "sliding_window", 0, 2**31 - 1, 0),
        tied_embeddings=values.get("tie_word_embeddings", False) is True,
        name=name,
    )
    if config.n_heads % config.n_kv_heads or config.head_dim % 2:
        raise damaged(
            CONFIG, f"{n_heads} heads of {config.head_dim} do not go with {config.n_kv_heads} key-value heads"
        )
    return config


def _refuse_others(values: Mapping[str, Any]) -> None:
    kind = values.get("model_type")
    if kind not in MODEL_TYPES:
        raise UnsupportedError(
            f"model_type {quoted(str(kind))} in {CONFIG} is not one that llmq quantizes: {', '.join(MODEL_TYPES)}"
        )
    activation = values.get("hidden_act", "silu")
    if activation != "silu":
        raise UnsupportedError(f"hidden_act {quoted(str(activation))} in {CONFIG} is not silu, the only one llmq runs")
    if values.get("rope_scaling") is not None:
        scaling = values["rope_scaling"]
        kind = scaling.get("rope_type", scaling.get("type")) if isinstance(scaling, dict) else scaling
        raise UnsupportedError(
            f"rope_scaling {quoted(str(kind))} in {CONFIG} is not supported; llmq runs plain rotary models"
        )


def _rope_base(values: Mapping[str, Any]) -> float:
    """rope_theta, which newer checkpoints keep in rope_parameters; Llama's first configurations leave it out."""
    parameters = values.get("rope_parameters")
    if isinstance(parameters, dict):
        kind = parameters.get("rope_type", "default")
        if kind != "default":
            raise UnsupportedError(
                f"rope_type {quoted(str(kind))} in {CONFIG} is not supported; llmq runs plain rotary models"
            )
        return _real(parameters, "rope_theta")
    if values["model_type"] == "llama" and "rope_theta" not in values:
        return 10_000.0
    return _real(values, "rope_theta")


def _integer(values: Mapping[str, Any], key: str, least: int, most: int, absent: int | None = None) -> int:
    value = values.get(key)
    if value is None and absent is not None:
        value = absent
    # type(), not isinstance(): True is an int too.
    if type(value) is not int or not least <= value <= most:
        raise damaged(CONFIG, f"{key} is {quoted(repr(value), 30)}, not an integer from {least} to {most}")
    return value


def _real(values: Mapping[str, Any], key: str) -> float:
    value = values.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e12:
        raise damaged(CONFIG, f"{key} is {quoted(repr(value), 30)}, not a positive number")
    return float(value)


def model_metadata(config: ModelConfig) -> dict[str, Any]:
    """general.* and llama.* keys; window, too, which llama.cpp ignores."""
    keys: dict[str, Any] = {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": config.name,
        "llama.block_count": config.n_layers,
        "llama.context_length": config.context_length,
        "llama.embedding_length": config.dim,
        "llama.feed_forward_length": config.ffn_dim,
        "llama.vocab_size": config.vocab_size,
        "llama.attention.head_count": config.n_heads,
        "llama.attention.head_count_kv": config.n_kv_heads,
        "llama.attention.key_length": config.head_dim,
        "llama.attention.value_length": config.head_dim,
        "llama.attention.layer_norm_rms_epsilon": config.rms_eps,
        "llama.rope.dimension_count": config.head_dim,
        "llama.rope.freq_base": config.rope_base,
    }
    if config.n_experts:
        keys |= {"llama.expert_count": config.n_experts, "llama.expert_used_count": config.n_experts_used}
    if config.window:
        keys["llama.attention.sliding_window"] = config.window
    return keys


def tensor_map(config: ModelConfig) -> Iterator[Placement]:
    """Every tensor of the model in the order it is written."""
    embedding = (config.vocab_size, config.dim)
    yield Placement("token_embd.weight", ("model.embed_tokens.weight",), embedding)
    for layer in range(config.n_layers):
        yield from _layer_map(config, f"blk.{layer}.", f"model.layers.{layer}.")
    yield Placement("output_norm.weight", ("model.norm.weight",), (config.dim,))
    if not config.tied_embeddings:
        yield Placement("output.weight", ("lm_head.weight",), embedding)


def _layer_map(config: ModelConfig, to: str, source: str) -> Iterator[Placement]:
    dim, ffn, q_dim, kv_dim = (
        config.dim,
        config.ffn_dim,
        config.n_heads * config.head_dim,
        config.n_kv_heads * config.head_dim,
    )
    for name, hf_name, shape, heads in (
        ("attn_norm", "input_layernorm", (dim,), 0),
        ("attn_q", "self_attn.q_proj", (q_dim, dim), config.n_heads),
        ("attn_k", "self_attn.k_proj", (kv_dim, dim), config.n_kv_heads),
        ("attn_v", "self_attn.v_proj", (kv_dim, dim), 0),
        ("attn_output", "self_attn.o_proj", (dim, q_dim), 0),
        ("ffn_norm", "post_attention_layernorm", (dim,), 0),
    ):
        yield Placement(f"{to}{name}.weight", (f"{source}{hf_name}.weight",), shape, heads)
    if config.n_experts:
        moe = f"{source}block_sparse_moe."
        yield Placement(f"{to}ffn_gate_inp.weight", (f"{moe}gate.weight",), (config.n_experts, dim))
    for name, dense, expert, shape in (
        ("ffn_gate", "gate_proj", "w1", (ffn, dim)),
        ("ffn_up", "up_proj", "w3", (ffn, dim)),
        ("ffn_down", "down_proj", "w2", (dim, ffn)),
    ):
        if config.n_experts:
            sources = tuple(f"{moe}experts.{e}.{expert}.weight" for e in range(config.n_experts))
            yield Placement(f"{to}{name}_exps.weight", sources, shape)
        else:
            yield Placement(f"{to}{name}.weight", (f"{source}mlp.{dense}.weight",), shape)


def check_tensors(entries: list[Placement], config: ModelConfig, tensors: Mapping[str, Stored]) -> None:
    """Raises FileFormatError where a tensor is missing or misshaped, UnsupportedError where one has no place."""
    expected = {source: entry.shape for entry in entries for source in entry.sources}
    for name, shape in expected.items():
        if name not in tensors:
            raise FileFormatError(f"the checkpoint has no tensor {quoted(name)}; complete it or download it again")
        if tensors[name].shape != shape:
            found = "x".join(map(str, tensors[name].shape))
            wanted = "x".join(map(str, shape))
            raise FileFormatError(
                f"tensor {quoted(name)} is {found} and {CONFIG} asks for {wanted}; get matching files"
            )
    for name in tensors.keys() - expected.keys():
        derived = name.endswith(".rotary_emb.inv_freq") or (config.tied_embeddings and name == "lm_head.weight")
        if not derived:
            raise UnsupportedError(
                f"the checkpoint has a tensor {quoted(name)} that a plain Mistral model does not have"
            )


def interleaved(n_rows: int, heads: int) -> np.ndarray:
    """Which row of a Hugging Face attn_q or attn_k goes where: int64 [n_rows], pair (i, i + half) to (2i, 2i + 1)."""
    return np.arange(n_rows).reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)
