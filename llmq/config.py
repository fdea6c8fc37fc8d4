"""ModelConfig: the hyper-parameters of a model, and the tensors that must go with them.

This is the only reader of the `llama.*` keys. Keys and tensor names: ggml, `docs/gguf.md`; defaults of absent keys are
llama.cpp's.
"""

from dataclasses import dataclass

import numpy as np

from llmq.errors import FileFormatError, UnsupportedError, UsageError
from llmq.formats import F32
from llmq.gguf import GGUF, quoted

ARCHITECTURE = "llama"
# Far above every known model; they keep what follows from a damaged number small.
MAX_LAYERS, MAX_SIZE, MAX_EXPERTS, MAX_EXPERTS_USED = 1024, 2**24, 64, 8
MAX_HEAD_DIM = 1024  # what the attention kernels have room for

DEFAULT_CONTEXT = 4096
MAX_POSITIONS = 2**31


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Shape of a decoder; lengths in tokens, sizes in weights.

    `rope_interleaved`: rotary pairs are neighbours (2i, 2i+1) and not half a head apart. `n_experts` is 0 in a dense
    model, `window` is 0 without a sliding window, and with `tied_embeddings` token_embd is the output matrix too.
    """

    n_layers: int
    dim: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    ffn_dim: int
    vocab_size: int
    context_length: int
    rms_eps: float
    rope_base: float
    rope_interleaved: bool
    n_experts: int
    n_experts_used: int
    window: int
    tied_embeddings: bool
    name: str


def read_config(gguf: GGUF) -> ModelConfig:
    """The configuration that a file declares.

    Raises FileFormatError where a key is missing or makes no sense, UnsupportedError where it asks for what the engine
    cannot do.
    """
    keys = _Keys(gguf)
    architecture = keys.text("general.architecture")
    if architecture != ARCHITECTURE:
        raise keys.unsupported(f"it has the architecture {quoted(architecture)}; it runs {ARCHITECTURE} models")
    _refuse_rope_scaling(gguf, keys)
    n_heads = keys.integer("attention.head_count", 1, MAX_SIZE)
    dim = keys.integer("embedding_length", 1, MAX_SIZE)
    head_dim = keys.integer("attention.key_length", 1, MAX_SIZE, dim // n_heads)
    n_experts = keys.integer("expert_count", 0, MAX_EXPERTS, 0)
    config = ModelConfig(
        n_layers=keys.integer("block_count", 1, MAX_LAYERS),
        dim=dim,
        n_heads=n_heads,
        n_kv_heads=keys.integer("attention.head_count_kv", 1, n_heads, n_heads),
        head_dim=head_dim,
        ffn_dim=keys.integer("feed_forward_length", 1, MAX_SIZE),
        vocab_size=_vocab_size(gguf, keys),
        context_length=keys.integer("context_length", 1, 2**31 - 1),
        rms_eps=keys.real("attention.layer_norm_rms_epsilon", 0.0, 1.0),
        rope_base=keys.real("rope.freq_base", 1.0, 1e12, 10_000.0),
        rope_interleaved=True,
        n_experts=n_experts,
        n_experts_used=keys.integer("expert_used_count", 1, min(n_experts, MAX_EXPERTS_USED)) if n_experts else 0,
        window=keys.integer("attention.sliding_window", 0, 2**31 - 1, 0),
        tied_embeddings="output.weight" not in gguf.tensors,
        name=keys.text("general.name", gguf.path.stem),
    )
    _check_heads(config, keys)
    return config


class _Keys:
    """Typed access to the metadata of one file; `llama.` is put before a name without `general.`."""

    __slots__ = ("file", "metadata")

    def __init__(self, gguf: GGUF) -> None:
        self.file = quoted(gguf.path.name)
        self.metadata = gguf.metadata

    def damaged(self, what: str) -> FileFormatError:
        return FileFormatError(f"{self.file} is damaged or incomplete: {what}; download or make it again")

    def unsupported(self, what: str) -> UnsupportedError:
        return UnsupportedError(f"llmq cannot run {self.file}: {what}")

    def text(self, key: str, default: str | None = None) -> str:
        value = self.metadata.get(key, default)
        if not isinstance(value, str):
            raise self.damaged(f"{key} is missing or not a string")
        return value

    def integer(self, name: str, least: int, most: int, default: int | None = None) -> int:
        key = f"{ARCHITECTURE}.{name}"
        value = self.metadata.get(key, default)
        if isinstance(value, np.ndarray):
            raise self.unsupported(f"{key} differs from layer to layer")
        if not isinstance(value, int | np.integer) or isinstance(value, bool):
            raise self.damaged(f"{key} is missing or not a whole number")
        if not least <= value <= most:
            raise self.damaged(f"{key} is {value}, not {least} to {most}")
        return int(value)

    def real(self, name: str, above: float, most: float, default: float | None = None) -> float:
        key = f"{ARCHITECTURE}.{name}"
        value = self.metadata.get(key, default)
        if not isinstance(value, int | float | np.number) or isinstance(value, bool):
            raise self.damaged(f"{key} is missing or not a number")
        if not above < value <= most:
            raise self.damaged(f"{key} is {value:g}, not above {above:g} and up to {most:g}")
        return float(value)


def _refuse_rope_scaling(gguf: GGUF, keys: _Keys) -> None:
    if "rope_freqs.weight" in gguf.tensors:
        raise keys.unsupported("it scales rotary frequencies by a tensor, rope_freqs.weight")
    kind = keys.text(f"{ARCHITECTURE}.rope.scaling.type", "")
    if kind not in ("", "none"):
        raise keys.unsupported(f"it scales rotary positions ({ARCHITECTURE}.rope.scaling.type is {quoted(kind)})")
    # A factor without a type means linear scaling to llama.cpp; 0 and 1 mean none.
    for name in "rope.scaling.factor", "rope.scale_linear":
        if not kind and keys.real(name, -1.0, 1e9, 1.0) not in (0.0, 1.0):
            raise keys.unsupported(f"it scales rotary positions ({ARCHITECTURE}.{name})")


def _vocab_size(gguf: GGUF, keys: _Keys) -> int:
    if f"{ARCHITECTURE}.vocab_size" in gguf.metadata:
        return keys.integer("vocab_size", 1, MAX_SIZE)
    if "token_embd.weight" not in gguf.tensors:
        raise keys.damaged("tensor token_embd.weight is missing")
    return gguf.tensors["token_embd.weight"].shape[0]


def _check_heads(config: ModelConfig, keys: _Keys) -> None:
    for name in "attention.value_length", "rope.dimension_count":
        if keys.integer(name, 1, MAX_SIZE, config.head_dim) != config.head_dim:
            raise keys.unsupported(f"{ARCHITECTURE}.{name} is not the head size, {config.head_dim}")
    if config.n_heads % config.n_kv_heads:
        raise keys.damaged(f"{config.n_heads} heads cannot share {config.n_kv_heads} key-value heads")
    if config.head_dim % 16 or config.head_dim > MAX_HEAD_DIM:
        raise keys.unsupported(f"its head size is {config.head_dim}, not a multiple of 16 up to {MAX_HEAD_DIM}")
    sizes = {"width": config.dim, "attention width": config.n_heads * config.head_dim, "feed-forward": config.ffn_dim}
    for what, size in sizes.items():
        if size % 32:
            raise keys.unsupported(f"its {what} size is {size}, not a multiple of 32")
    if config.n_experts == 1:
        raise keys.unsupported("it is a mixture of one expert")


def choose_context(config: ModelConfig, n_ctx: int | None) -> int:
    """Positions to keep where `n_ctx` are asked for; None: the model's own, DEFAULT_CONTEXT at most without a window.

    Raises UsageError for more than the model knows.
    """
    if n_ctx is None:
        return config.context_length if config.window else min(config.context_length, DEFAULT_CONTEXT)
    if not 1 <= n_ctx <= MAX_POSITIONS:
        raise UsageError(f"the context is {n_ctx} tokens; it must be from 1 to {MAX_POSITIONS}")
    if n_ctx > config.context_length and not config.window:
        raise UsageError(
            f"the context is {n_ctx} tokens, and this model was trained for {config.context_length}; "
            "give less, or run it with a sliding window (--window)"
        )
    return n_ctx


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape (rows first) of every tensor that a file with this configuration holds, and of no other."""
    dim, ffn_dim = config.dim, config.ffn_dim
    q_dim, kv_dim = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    layer: dict[str, tuple[int, ...]] = {
        "attn_norm": (dim,),
        "attn_q": (q_dim, dim),
        "attn_k": (kv_dim, dim),
        "attn_v": (kv_dim, dim),
        "attn_output": (dim, q_dim),
        "ffn_norm": (dim,),
    }
    if config.n_experts:
        layer["ffn_gate_inp"] = (config.n_experts, dim)
        layer["ffn_gate_exps"] = layer["ffn_up_exps"] = (config.n_experts, ffn_dim, dim)
        layer["ffn_down_exps"] = (config.n_experts, dim, ffn_dim)
    else:
        layer["ffn_gate"] = layer["ffn_up"] = (ffn_dim, dim)
        layer["ffn_down"] = (dim, ffn_dim)
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (config.vocab_size, dim), "output_norm.weight": (dim,)}
    if not config.tied_embeddings:
        shapes["output.weight"] = (config.vocab_size, dim)
    for n in range(config.n_layers):
        shapes |= {f"blk.{n}.{name}.weight": shape for name, shape in layer.items()}
    return shapes


def check_tensors(gguf: GGUF, config: ModelConfig) -> None:
    """Checks that a file holds exactly the tensors and the vocabulary that its configuration asks for.

    Norms and routers must be F32. Raises FileFormatError naming the first that is missing, unknown or wrong.
    """
    keys = _Keys(gguf)
    shapes = tensor_shapes(config)
    for name in gguf.tensors:
        if name not in shapes:
            raise keys.damaged(f"tensor {quoted(name)} has no place in such a model")
    for name, shape in shapes.items():
        if name not in gguf.tensors:
            raise keys.damaged(f"tensor {name} is missing")
        info = gguf.tensors[name]
        if info.shape != shape:
            raise keys.damaged(f"tensor {name} has the shape {info.shape}, not {shape}")
        if (len(shape) == 1 or name.endswith("ffn_gate_inp.weight")) and info.format != F32:
            raise keys.damaged(f"tensor {name} is {info.format.name}, and must be F32")
    _check_vocabulary(keys, config.vocab_size)


def _check_vocabulary(keys: _Keys, vocab_size: int) -> None:
    """One token per embedding row; a SentencePiece vocabulary has a score and a type for each."""
    model = keys.text("tokenizer.ggml.model")
    if model == "no_vocab":
        return
    tokens = keys.metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list):
        raise keys.damaged("tokenizer.ggml.tokens is missing or not an array of strings")
    if len(tokens) != vocab_size:
        raise keys.damaged(f"it has {len(tokens)} tokens for {vocab_size} embedding rows")
    for key, dtype in ("tokenizer.ggml.scores", np.float32), ("tokenizer.ggml.token_type", np.int32):
        values = keys.metadata.get(key)
        if values is None and model != "llama":
            continue
        if not isinstance(values, np.ndarray) or values.dtype != dtype or len(values) != vocab_size:
            raise keys.damaged(f"{key} is not {vocab_size} numbers of type {np.dtype(dtype).name}")
