"""The models llmq knows by name, from models.toml: where they are published, their shape and their licence."""

import tomllib
from dataclasses import dataclass
from pathlib import Path

MODELS_TOML = Path(__file__).parents[1] / "models.toml"

# Bytes per weight of a whole file as Q4_K_M; the mix of types gives 4.78 to 4.88 bits for these shapes.
Q4_K_M_BYTES = 4.85 / 8


@dataclass(frozen=True, slots=True)
class CatalogEntry:
    """A published model. `window` is 0 where attention reaches back over the whole context, `n_experts` 0 if dense."""

    name: str
    repo: str
    licence: str
    tokenizer: str
    n_layers: int
    dim: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    ffn_dim: int
    vocab_size: int
    context_length: int
    window: int
    n_experts: int
    n_experts_used: int

    @property
    def n_weights(self) -> int:
        """All weights, with untied embeddings, as the llama architecture has them."""
        attention = 2 * self.dim * self.head_dim * (self.n_heads + self.n_kv_heads)
        experts = 3 * self.dim * self.ffn_dim * max(self.n_experts, 1)
        router = self.dim * self.n_experts
        return self.n_layers * (attention + experts + router + 2 * self.dim) + self.dim * (2 * self.vocab_size + 1)

    @property
    def q4_k_m_bytes(self) -> int:
        """About what the model takes on disk as Q4_K_M."""
        return round(self.n_weights * Q4_K_M_BYTES)


def catalog() -> list[CatalogEntry]:
    """All entries, in the order of models.toml."""
    with MODELS_TOML.open("rb") as file:
        table = tomllib.load(file)
    return [CatalogEntry(name=name, **entry) for name, entry in table.items()]
