"""Whether a model will run here, in which type and how fast, told before it is there.

Memory is what the engine will allocate, by the functions that it allocates by (llmq/memory.py). Speed is the work of a
token over what the machine was measured to give.
"""

import dataclasses
import itertools
import shutil
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from llmq.config import ModelConfig
from llmq.figures import Machine
from llmq.files import spare_bytes
from llmq.layout import BATCH, FLOAT, GROUP_BYTES, KV_LAYOUTS, activation_kind
from llmq.memory import activation_kinds, memory_free, most_buffer_bytes, ring_bytes, ring_capacity
from llmq.work import Work
from quant.size import Size, planned

# The interpreter, the compiler and the kernels, and of a token in the vocabulary.
PROGRAM_BYTES = 136 << 20
TEXT_BYTES = 300

# Of all memory that is free a model leaves this much, or it is tight.
MARGIN = 0.1

# How much of the machine's reading rate a reply gets, and of its products a prompt: of integers, and of floats, of
# which a register holds a quarter. docs/performance.md has what was measured.
READ_SHARE, PRODUCT_SHARE, FLOAT_SHARE = 0.9, 0.6, 0.15
# What a layer takes of a token's time besides, in which threads wait for each other: nothing to a large model.
LAYER_SECONDS = 20e-6

# Best first. Beyond Q6_K nothing is gained that shows, and below Q4_K_M what is lost does: those come only if need be.
PREFERRED = ("q6_k", "q5_k_m", "q4_k_m", "q4_k_s", "iq4_xs", "q3_k_l", "q3_k_m", "q3_k_s", "q2_k")
SMALLER_CONTEXTS = (65536, 32768, 16384, 8192, 4096, 2048, 1024)

OK, TIGHT, NO_MEMORY, NO_DISK = "ok", "tight", "no memory", "no disk"


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes: of the file, all of which is mapped and read; of keys and values; of the engine's buffers and threads; of
    the program itself.
    """

    weights: int
    cache: int
    buffers: int
    program: int

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.buffers + self.program


@dataclass(frozen=True, slots=True)
class Here:
    """This machine: free bytes, 10^9 bytes that its threads read and multiply-adds of bytes that they make a second."""

    memory_free: int
    disk_free: int
    read_rate: float
    product_rate: float
    n_threads: int


@dataclass(frozen=True, slots=True)
class Verdict:
    """One model in one type at one context. `prefill` and `decode` are tokens a second at the beginning of a context,
    `disk_needed` is 0 for a file that is there. `instead` is what would work where this does not.
    """

    model: str
    type: str
    file_bytes: int
    n_ctx: int
    memory: Memory
    memory_free: int
    disk_needed: int
    disk_free: int
    prefill: float
    decode: float
    instead: "Verdict | None" = None

    @property
    def answer(self) -> str:
        """OK, TIGHT (fits, and leaves less than a tenth of the free memory), NO_MEMORY or NO_DISK."""
        if self.memory.total > self.memory_free:
            return NO_MEMORY
        if self.disk_needed > self.disk_free:
            return NO_DISK
        return TIGHT if self.memory.total > (1 - MARGIN) * self.memory_free else OK

    @property
    def fits(self) -> bool:
        return self.answer in (OK, TIGHT)


Table = list[list[Verdict]]


# ---- what is needed
def memory_needed(
    config: ModelConfig,
    file_bytes: int,
    n_ctx: int,
    kv_type: str = "f16",
    *,
    kinds: Collection[int] = range(len(GROUP_BYTES)),
    n_threads: int = 1,
) -> Memory:
    """At a full context of `n_ctx` positions. `kinds` are those of the activations that the weights read."""
    capacity = ring_capacity(n_ctx, config.window, BATCH)
    return Memory(
        weights=file_bytes,
        cache=ring_bytes(config, capacity, KV_LAYOUTS[kv_type]),
        buffers=most_buffer_bytes(config, kinds, n_ctx, n_threads),
        program=PROGRAM_BYTES + TEXT_BYTES * config.vocab_size,
    )


def disk_needed(file_bytes: int, already: int = 0) -> int:
    """Bytes that must be free for a file of which `already` bytes are there: what is missing, and a margin."""
    missing = file_bytes - already
    return missing + spare_bytes(file_bytes) if missing > 0 else 0


def disk_free(folder: Path) -> int:
    """Bytes that this user may write to the folder, or to the nearest one above it that there is."""
    while not folder.is_dir():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def here(machine: Machine, folder: Path) -> Here:
    """What is free now, with files going to `folder`, and what the machine was measured to give."""
    n_threads = machine.n_threads
    return Here(memory_free(), disk_free(folder), machine.read_rate, machine.dot_rate * n_threads, n_threads)


# ---- how fast
def rates(work: Work, read_rate: float, product_rate: float) -> tuple[float, float]:
    """Tokens a second of a prompt and of a reply, at 10^9 products and bytes of weights a second."""
    return 1e9 * product_rate / work.n_products, 1e9 * read_rate / work.n_bytes


def predicted_rates(size: Size, at: Here) -> tuple[float, float]:
    """Tokens a second of a prompt and of a reply."""
    floats = all(activation_kind(fmt) == FLOAT for fmt in size.formats)
    share = FLOAT_SHARE if floats else PRODUCT_SHARE
    prefill, decode = rates(size.work, READ_SHARE * at.read_rate, share * at.product_rate)
    return prefill, 1 / (1 / decode + LAYER_SECONDS * size.config.n_layers)


# ---- the verdict
def judge(size: Size, n_ctx: int, at: Here, *, kv_type: str = "f16", already: int = 0) -> Verdict:
    """`already`: bytes of the file that are on the disk."""
    n_bytes = round(size.n_bytes)
    kinds = activation_kinds(size.formats)
    memory = memory_needed(size.config, n_bytes, n_ctx, kv_type, kinds=kinds, n_threads=at.n_threads)
    needed = disk_needed(n_bytes, already)
    prefill, decode = predicted_rates(size, at)
    return Verdict(size.name, size.type, n_bytes, n_ctx, memory, at.memory_free, needed, at.disk_free, prefill, decode)


def judge_with_advice(
    size: Size, n_ctx: int, at: Here, *, kv_type: str = "f16", already: int = 0, types: Collection[str] = PREFERRED
) -> Verdict:
    """As judge(); where it does not fit, `instead` is the same type with a smaller context, or else a smaller one of
    `types` with the same context, or with a smaller one.
    """
    verdict = judge(size, n_ctx, at, kv_type=kv_type, already=already)
    if verdict.fits:
        return verdict
    contexts = [n for n in SMALLER_CONTEXTS if n < n_ctx]
    smaller = [planned(size.config, kind) for kind in PREFERRED if kind in types and kind != size.type]
    others = itertools.chain(
        (judge(size, n, at, kv_type=kv_type, already=already) for n in contexts),
        (judge(other, n, at, kv_type=kv_type) for n in (n_ctx, *contexts) for other in smaller),
    )
    return dataclasses.replace(verdict, instead=next((other for other in others if other.fits), None))


def verdicts(sizes: Iterable[Size], contexts: Sequence[int], at: Here, *, is_there: bool = False) -> Table:
    """A row for each size, a column for each context; `is_there`: the files are on the disk."""
    return [
        [judge(size, n_ctx, at, already=round(size.n_bytes) if is_there else 0) for n_ctx in contexts] for size in sizes
    ]


def best_type(found: Sequence[Verdict]) -> Verdict | None:
    """Of one context's verdicts: the first of PREFERRED that fits with a margin, else the first that fits at all, else
    whatever fits; None where nothing does.
    """
    rank = {kind: i for i, kind in enumerate(PREFERRED)}

    def order(each: Verdict) -> tuple[bool, bool, int]:
        return each.type not in rank, each.answer != OK, rank.get(each.type, 0)

    return min((verdict for verdict in found if verdict.fits), key=order, default=None)
