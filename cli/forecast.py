"""What a model that is not there would do on this machine: its bytes and products, at the rates that were measured."""

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmq.catalog import CatalogEntry, catalog, find_entry
from llmq.errors import UsageError

if TYPE_CHECKING:
    from llmq.speed import Speed, Work

TYPICAL, TYPE = "mistral-7b", "q4_k_m"
# 7B, 22.2B or 350M weights; behind a slash, those that a token uses
WEIGHTS = re.compile(r"(\d+(?:\.\d+)?)([BM])(?:/(\d+(?:\.\d+)?)([BM]))?", re.IGNORECASE)
LEAST, MOST = 1e6, 1e13  # weights
# A model's weights leave room for the rest of the system.
MEMORY_SHARE = 0.9


@dataclass(frozen=True, slots=True)
class Size:
    """A model as a file of a type: its weights, its bytes, and what a token takes."""

    name: str
    type: str
    n_weights: float
    n_bytes: float
    work: "Work"


@dataclass(frozen=True, slots=True)
class Forecast:
    """Tokens a second; None for a model that does not fit into memory."""

    size: Size
    prefill: float | None
    decode: float | None

    @property
    def fits(self) -> bool:
        return self.decode is not None


def catalog_sizes() -> list[Size]:
    """The published models that run here; base models are as fast as those that were made of them."""
    return [size_of(entry, TYPE) for entry in catalog() if entry.instruct and not entry.unsupported]


def parse_size(text: str) -> Size:
    """NAME, WEIGHTS or WEIGHTS/USED, and a type behind a colon: mixtral-8x7b, 13B:Q8_0, 47B/13B:Q4_K_M.

    Raises UsageError for anything else.
    """
    from quant.recipe import PRESETS

    what, colon, kind = text.partition(":")
    kind = kind.lower() if colon else TYPE
    if kind not in PRESETS:
        raise UsageError(f"there is no type {kind[:20]!a}; there are {', '.join(PRESETS)}")
    entry = find_entry(what)
    if entry:
        return size_of(entry, kind)
    match = WEIGHTS.fullmatch(what)
    if not match:
        raise UsageError(
            f"cannot predict {text[:20]!a}: give a name that `llmq list --available` shows, or weights and a type, as "
            "in 7B:Q4_K_M, or all and used weights, as in 47B/13B:Q4_K_M"
        )
    total = weights(match[1], match[2])
    used = weights(match[3], match[4]) if match[3] else total
    if not LEAST <= used <= total <= MOST:
        raise UsageError(
            f"cannot predict {text[:20]!a}: give 1M to 10000B weights, of which a token uses no more than there are"
        )
    typical = next(entry for entry in catalog() if entry.name == TYPICAL)
    return scaled(size_of(typical, kind), what, total, used)


def weights(number: str, unit: str) -> float:
    return float(number) * (1e9 if unit.upper() == "B" else 1e6)


def size_of(entry: CatalogEntry, kind: str) -> Size:
    """A published model's tensors with the formats that `llmq quantize` gives them."""
    from llmq.config import ModelConfig, tensor_shapes
    from llmq.speed import work_per_token
    from quant.recipe import PRESETS, assign

    config = ModelConfig(
        name=entry.name, n_layers=entry.n_layers, dim=entry.dim, n_heads=entry.n_heads, n_kv_heads=entry.n_kv_heads,
        head_dim=entry.head_dim, ffn_dim=entry.ffn_dim, vocab_size=entry.vocab_size,
        context_length=entry.context_length, rms_eps=1e-5, rope_base=1e6, rope_interleaved=True,
        n_experts=entry.n_experts, n_experts_used=entry.n_experts_used, window=entry.window,
        tied_embeddings=entry.tied_embeddings,
    )  # fmt: skip
    shapes = tensor_shapes(config)
    formats = assign(PRESETS[kind], shapes)
    tensors = {name: (shape, formats[name]) for name, shape in shapes.items()}
    n_bytes = sum(math.prod(shape) / fmt.block_size * fmt.block_bytes for shape, fmt in tensors.values())
    return Size(entry.name, kind, entry.n_weights, n_bytes, work_per_token(config, tensors))


def scaled(typical: Size, name: str, total: float, used: float) -> Size:
    """A model of other size with the same bytes for a weight, all of which are for layers."""
    from llmq.speed import Work

    per_weight = typical.n_bytes / typical.n_weights
    return Size(name, typical.type, total, total * per_weight, Work(used * per_weight, used))


def forecast(size: Size, speed: "Speed", memory_bytes: float) -> Forecast:
    """Decode reads a token's bytes, and prefill makes its products, as fast as in what was measured."""
    if size.n_bytes > MEMORY_SHARE * memory_bytes:
        return Forecast(size, None, None)
    return Forecast(size, 1e9 * speed.product_rate / size.work.n_products, 1e9 * speed.read_rate / size.work.n_bytes)
