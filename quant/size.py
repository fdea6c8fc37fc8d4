"""A model as a file of a type, told from its shape: weights, bytes, formats, and the work that a token takes."""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from llmq.catalog import CatalogEntry, catalog, find_entry
from llmq.config import ModelConfig, tensor_shapes
from llmq.errors import UsageError
from llmq.formats import FORMATS, Format
from llmq.gguf import GGUF, open_gguf
from llmq.work import Work, work_per_token
from quant.recipe import PRESETS, assign, takes_type

TYPICAL, TYPE = "mistral-7b", "q4_k_m"
# 7B, 22.2B or 350M weights; behind a slash, those that a token uses
WEIGHTS = re.compile(r"(\d+(?:\.\d+)?)([BM])(?:/(\d+(?:\.\d+)?)([BM]))?", re.IGNORECASE)
LEAST, MOST = 1e6, 1e13  # weights

Tensors = Mapping[str, tuple[tuple[int, ...], Format]]


@dataclass(frozen=True, slots=True)
class Size:
    """`formats` are those of the matrices that are multiplied with."""

    name: str
    type: str
    config: ModelConfig
    n_weights: float
    n_bytes: float
    formats: frozenset[Format]
    work: Work


def size_of(config: ModelConfig, kind: str, tensors: Tensors, n_bytes: int | None = None) -> Size:
    """Of a model with these tensors (shape and format by name); `n_bytes` of its file, of the tensors alone if None."""
    in_tensors = sum(math.prod(shape) // fmt.block_size * fmt.block_bytes for shape, fmt in tensors.values())
    matrices = {name: fmt for name, (shape, fmt) in tensors.items() if takes_type(name, shape)}
    if not config.tied_embeddings:
        del matrices["token_embd.weight"]
    return Size(
        name=config.name,
        type=kind,
        config=config,
        n_weights=sum(math.prod(shape) for shape, _ in tensors.values()),
        n_bytes=in_tensors if n_bytes is None else n_bytes,
        formats=frozenset(matrices.values()),
        work=work_per_token(config, tensors),
    )


def planned(config: ModelConfig, kind: str) -> Size:
    """What `llmq quantize` makes of a model of this shape."""
    shapes = tensor_shapes(config)
    formats = assign(PRESETS[kind], shapes)
    return size_of(config, kind, {name: (shape, formats[name]) for name, shape in shapes.items()})


def size_of_file(path: Path, name: str) -> Size:
    """Of a GGUF file, which is checked as for a run. Its type is that of its metadata, or most of its bytes' format.

    Raises FileFormatError and UnsupportedError.
    """
    with open_gguf(path) as gguf:
        return size_of_gguf(gguf, path.stat().st_size, name)


def size_of_gguf(gguf: GGUF, n_bytes: int, name: str) -> Size:
    """As size_of_file(), of a header; `n_bytes` is the file's size."""
    from llmq.supported import check_supported  # its tokenizer is heavy, and not needed for what is not there

    config = check_supported(gguf)
    tensors = {info.name: (info.shape, info.format) for info in gguf.tensors.values()}
    by_format: Counter[str] = Counter()
    for info in gguf.tensors.values():
        by_format[info.format.name.lower()] += info.n_bytes
    kinds = {preset.file_type: preset.name for preset in PRESETS.values()}
    declared = gguf.metadata.get("general.file_type")
    kind = kinds.get(declared, "") if isinstance(declared, int) else ""
    found = size_of(config, kind or by_format.most_common(1)[0][0], tensors, n_bytes)
    return dataclasses.replace(found, name=name)


def config_of(entry: CatalogEntry) -> ModelConfig:
    """A published model's configuration, as far as sizes and work depend on it."""
    return ModelConfig(
        name=entry.name, n_layers=entry.n_layers, dim=entry.dim, n_heads=entry.n_heads, n_kv_heads=entry.n_kv_heads,
        head_dim=entry.head_dim, ffn_dim=entry.ffn_dim, vocab_size=entry.vocab_size,
        context_length=entry.context_length, rms_eps=1e-5, rope_base=1e6, rope_interleaved=True,
        n_experts=entry.n_experts, n_experts_used=entry.n_experts_used, window=entry.window,
        tied_embeddings=entry.tied_embeddings,
    )  # fmt: skip


def catalog_sizes() -> list[Size]:
    """The published models that run here; base models are as fast as those that were made of them."""
    return [planned(config_of(entry), TYPE) for entry in catalog() if entry.instruct and not entry.unsupported]


# ---- models that only their numbers of weights are known of
def parse_size(text: str) -> Size:
    """NAME, WEIGHTS or WEIGHTS/USED, and a type behind a colon: mixtral-8x7b, 13B:Q8_0, 47B/13B:Q4_K_M.

    Raises UsageError for anything else.
    """
    what, colon, kind = text.partition(":")
    kind = kind_of(kind) if colon else TYPE
    entry = find_entry(what)
    if entry:
        return planned(config_of(entry), kind)
    found = parse_weights(what)
    if not found:
        raise UsageError(
            f"cannot predict {text[:12]!a}: give a name that `llmq list --available` shows, or weights and a type, as "
            "in 7B:Q4_K_M, or all and used weights, as in 47B/13B:Q4_K_M"
        )
    return scaled(what, *found, kind)


def kind_of(text: str) -> str:
    """A type by its name in any case. Raises UsageError."""
    kind = text.lower().replace("fp", "f")
    if kind not in PRESETS:
        is_format = kind in {fmt.name.lower() for fmt in FORMATS.values()}
        hint = f", and for tensors `llmq quantize --tensor-type '.={kind}'`" if is_format else ""
        raise UsageError(f"there is no type {text[:40]!a}; there are {', '.join(PRESETS)}{hint}")
    return kind


def parse_weights(text: str) -> tuple[float, float] | None:
    """All weights and those that a token uses, of 13B or 47B/13B; None where the text is no such thing.

    Raises UsageError for numbers that no model has.
    """
    match = WEIGHTS.fullmatch(text)
    if not match:
        return None
    total = _weights(match[1], match[2])
    used = _weights(match[3], match[4]) if match[3] else total
    if not LEAST <= used <= total <= MOST:
        raise UsageError(
            f"cannot predict {text[:20]!a}: give 1M to 10000B weights, of which a token uses no more than there are"
        )
    return total, used


def _weights(number: str, unit: str) -> float:
    return float(number) * (1e9 if unit.upper() == "B" else 1e6)


def scaled(name: str, total: float, used: float, kind: str) -> Size:
    """A model of other size with the same bytes for a weight, all of which are for layers.

    Depth and width grow with the cube root of the weights that a token uses, which is within a fifth of what the
    published models have; heads for keys and values stay as many.
    """
    typical = planned(config_of(next(entry for entry in catalog() if entry.name == TYPICAL)), kind)
    c, times = typical.config, (used / typical.n_weights) ** (1 / 3)
    config = ModelConfig(
        name=name, n_layers=max(1, round(c.n_layers * times)), dim=_wide(c.dim * times),
        n_heads=_wide(c.dim * times) // c.head_dim, n_kv_heads=c.n_kv_heads, head_dim=c.head_dim,
        ffn_dim=_wide(c.ffn_dim * times), vocab_size=c.vocab_size, context_length=c.context_length, rms_eps=c.rms_eps,
        rope_base=c.rope_base, rope_interleaved=True, n_experts=0, n_experts_used=0, window=0, tied_embeddings=False,
    )  # fmt: skip
    per_weight = typical.n_bytes / typical.n_weights
    work = Work(used * per_weight, used)
    return Size(name, kind, config, total, total * per_weight, typical.formats, work)


def _wide(width: float) -> int:
    return max(256, round(width / 256) * 256)
