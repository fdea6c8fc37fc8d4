"""Memory: what a model takes besides its file, known before any of it is allocated, and what is free.

The engine and the cache allocate what these functions say. Nothing here needs the compiler.
"""

import math
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

import psutil

from llmq.cgroup import cgroup_folders, read_text
from llmq.config import ModelConfig
from llmq.formats import Format, row_bytes
from llmq.layout import BATCH, FEW, GROUP_BYTES, PART, PART_STATE, activation_kind

SLOTS = 16  # positions that lie together in the cache

# The widest registers: rows that a strip has, tokens that a product may compute too many, bytes of a thread's scratch
# for panels and attention. Others take less.
STRIP, SPARE, THREAD_BYTES = 64, 7, 132 << 10


# ---- the cache
def ring_capacity(n_ctx: int, window: int, batch: int) -> int:
    """Slots for a context of `n_ctx` positions, of which a query sees `window` (0: all), in batches of up to `batch`.

    A multiple of SLOTS.
    """
    needed = min(n_ctx, window + batch) if window else n_ctx
    return -(-needed // SLOTS) * SLOTS


def ring_bytes(config: ModelConfig, capacity: int, layout: Format) -> int:
    """Bytes of a ring of `capacity` positions: a key and a value for each layer and KV head."""
    return 2 * config.n_layers * config.n_kv_heads * row_bytes(layout, config.head_dim) * capacity


# ---- the engine's buffers
def activation_kinds(formats: Iterable[Format]) -> set[int]:
    """The kinds of activations that matrices of these formats read."""
    return {activation_kind(fmt) for fmt in formats}


def batch_room(n_rows: int, batch: int) -> int:
    """Rows that buffers are made for where `n_rows` come: the next power of two, `batch` at most."""
    return min(batch, 1 << (n_rows - 1).bit_length())


def tile_bytes(n_rows: int, strip: int, spare: int) -> int:
    """Of a strip's results for `n_rows` tokens."""
    return 4 * strip * (n_rows + spare)


def parts_bytes(config: ModelConfig, n_rows: int, n_parts: int) -> int:
    """What `n_rows` rows need to attend by `n_parts` parts."""
    return n_rows * config.n_heads * n_parts * (4 * config.head_dim + PART_STATE)


def buffer_bytes(config: ModelConfig, kinds: Collection[int], n_rows: int, spare: int) -> dict[str, int]:
    """The engine's buffers for batches of `n_rows` rows, by name, without the threads' scratch and the parts."""
    n_used, n_experts = max(1, config.n_experts_used), max(1, config.n_experts)
    heads, kv_heads = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    groups = n_rows * n_used * -(-max(config.dim, config.ffn_dim, heads) // 256) + spare
    return {
        "x": 4 * n_rows * config.dim,
        "normed": 4 * n_rows * config.dim,
        **{f"act{kind}": groups * size * (kind in kinds) for kind, size in enumerate(GROUP_BYTES)},
        "q": 4 * n_rows * heads,
        "k": 4 * n_rows * kv_heads,
        "v": 4 * n_rows * kv_heads,
        "attended": 4 * n_rows * heads,
        "angles": 4 * n_rows * config.head_dim,
        "hidden": 4 * n_rows * n_used * config.ffn_dim,
        "chosen": 4 * n_rows * n_used,
        "chosen_weights": 4 * n_rows * n_used,
        "entries": 4 * n_rows * n_used,
        "entry_weights": 4 * n_rows * n_used,
        "starts": 4 * (n_experts + 1),
        "active": 4 * (n_experts + 1),
    }


def most_buffer_bytes(config: ModelConfig, kinds: Collection[int], n_ctx: int, n_threads: int) -> int:
    """All buffers of an engine that fills a context of `n_ctx` positions, on a processor with the widest registers."""
    n_rows = batch_room(min(n_ctx, BATCH), BATCH)
    n_parts = math.ceil(min(n_ctx, config.window or n_ctx) / PART)
    scratch = n_threads * (2 * tile_bytes(n_rows, STRIP, SPARE) + THREAD_BYTES)
    buffers = sum(buffer_bytes(config, kinds, n_rows, SPARE).values())
    return buffers + scratch + (parts_bytes(config, FEW, n_parts) if n_parts > 1 else 0)


# ---- what is free
def memory_free(root: Path = Path("/")) -> int:
    """Bytes that this process may still have: of the machine's, within what its control groups leave."""
    return max(0, min([psutil.virtual_memory().available, *_cgroup_rooms(root)]))


def _cgroup_rooms(root: Path) -> Iterator[int]:
    v2, v1 = cgroup_folders("memory", root)
    for folder in v2:
        yield from _room(folder, "memory.max", "memory.current", "")
    for folder in v1:
        yield from _room(folder, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_")


def _room(folder: Path, limit: str, usage: str, prefix: str) -> Iterator[int]:
    """A group's limit less what it uses, where it has one; pages of files count as free, as they can be dropped."""
    most, used = read_text(folder / limit), read_text(folder / usage)
    if most.isdecimal() and used.isdecimal():
        lines = [line.partition(" ") for line in read_text(folder / "memory.stat").splitlines()]
        files = {f"{prefix}active_file", f"{prefix}inactive_file"}
        dropped = sum(int(value) for name, _, value in lines if name in files and value.isdecimal())
        yield int(most) - int(used) + dropped
