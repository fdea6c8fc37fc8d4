"""The work that a token takes, told from a model's tensors: bytes that are read and products that are made."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from llmq.config import ModelConfig
from llmq.formats import Format


@dataclass(frozen=True, slots=True)
class Work:
    """What one token takes: weight bytes that decode reads, and multiply-adds that prefill makes."""

    n_bytes: float
    n_products: float


def work_per_token(config: ModelConfig, tensors: Mapping[str, tuple[tuple[int, ...], Format]]) -> Work:
    """Of tensors (shape and format by name): of the experts those that are used, of the embedding one row at most."""
    n_bytes = n_products = 0.0
    for name, (shape, fmt) in tensors.items():
        if name == "token_embd.weight" and not config.tied_embeddings:
            continue
        count = math.prod(shape) * (config.n_experts_used / config.n_experts if "_exps." in name else 1)
        n_bytes += count / fmt.block_size * fmt.block_bytes
        # Only the last token of a prompt goes through the output matrix.
        n_products += count if name.startswith("blk.") and len(shape) > 1 else 0
    return Work(n_bytes, n_products)
