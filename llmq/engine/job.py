"""A batch as compiled code sees it: the job record, and the steps that every part of the forward pass is made of."""

import numpy as np

from llmq.engine.plan import LAYER, MODEL
from llmq.jit import jit
from llmq.kernels.activation import PREPARE_TYPES
from llmq.kernels.dot import DOT_TYPES
from llmq.kernels.panel import PANEL_TYPES
from llmq.layout import FEW, FLOAT, GROUP_BYTES, K
from llmq.simd import ROWS, call, load_f32, record_at, store_f32
from llmq.team import fetch_add, wait_for

# A phase is a list of items that threads take and finish. Its words: items taken (0), number of items where that is not
# known beforehand (8), items finished (64, on a cache line of its own).
PHASES_PER_LAYER, PHASES_BESIDES, PHASE_BYTES = 13, 3, 128
NORM, PROJECT, ROTATE, ATTEND, COMBINE, PREPARE, OUTPUT = range(7)
ROUTE, GROUP, PREPARE_FFN, GATE_UP, PREPARE_DOWN, DOWN = range(7, 13)

# Addresses of buffers, sizes of this batch, and what a call covers.
JOB = np.dtype(
    [
        (name, np.int64)
        for name in (
            "model", "phases", "n_threads", "first_layer", "end_layer",
            "n_rows", "tokens", "positions", "rings", "capacities", "n_outputs", "output_rows", "logits",
            "x", "normed", "act0", "act1", "act2", "q", "k", "v", "attended", "angles", "hidden",
            "chosen", "chosen_weights", "entries", "entry_weights", "starts", "active", "scratch", "scratch_bytes",
            "tile_bytes", "attention_at", "panel_at", "attend_most", "attend4", "attend1", "store_kv", "kv_row_bytes",
            "parts", "first_part", "n_parts", "prepare",
        )
    ]
)  # fmt: skip

job_at, layer_at, model_at = record_at(JOB), record_at(LAYER), record_at(MODEL)
LAYER_BYTES = LAYER.itemsize
call_prepare, call_dot, call_panel = call(*PREPARE_TYPES), call(*DOT_TYPES), call(*PANEL_TYPES)


@jit
def n_blocks(n, size):
    return (n + size - 1) // size


@jit
def act_buffer(job, kind):
    """Where prepared activations of a kind lie, and the bytes of one group."""
    if kind == FLOAT:
        return job.act0, GROUP_BYTES[FLOAT]
    return job.act1 if kind == K else job.act2, GROUP_BYTES[K]


@jit
def prepare_rows(job, kinds, x, n, row, slot, first, count, group_begin, group_end):
    """Groups of x[row] to the batch of `count` rows whose first is `first`; the row is number `slot` in it."""
    n_groups = n_blocks(n, 256)
    for kind in range(3):
        if (kinds >> kind) & 1:
            base, size = act_buffer(job, kind)
            base += first * n_groups * size
            for g in range(group_begin, group_end):
                source = x + 4 * (row * n + 256 * g)
                call_prepare(job.prepare, base + (g * count + slot) * size, kind, source, min(256, n - 256 * g), 1)


@jit
def product(job, out, m, expert, row, first, count, panel):
    """out [count][ROWS] = ROWS rows of a matrix from `row` on, times the prepared rows first .. first + count."""
    base, size = act_buffer(job, m.kind)
    n_groups = n_blocks(m.cols, 256)
    x = base + first * n_groups * size
    w = m.address + expert * m.expert_bytes + row * m.row_bytes
    n_rows = min(ROWS, m.rows - row)
    if count <= FEW:
        call_dot(m.dot, out, w, m.row_bytes, n_rows, x, count * size, count, m.n_groups, m.tail_bytes)
    else:
        call_panel(
            m.panel, out, w, m.row_bytes, n_rows, x, count * size, count, m.n_groups, m.tail_bytes, panel
        )  # fmt: skip


@jit
def take(job, phase, n_items, finished):
    """Report items that are finished, and take the next run of items that no thread has taken."""
    at = job.phases + PHASE_BYTES * phase
    if finished:
        fetch_add(at + 64, finished)
    grain = max(1, n_items // (job.n_threads * 8))
    begin = fetch_add(at, grain)
    return min(begin, n_items), min(begin + grain, n_items)


@jit
def wait_until_done(job, phase, n_items):
    """All items of the phase are finished, by whomever."""
    wait_for(job.phases + PHASE_BYTES * phase + 64, n_items)


@jit
def store_tile(out, stride, tile, n_rows, count):
    for t in range(count):
        for r in range(n_rows):
            store_f32(out + 4 * (t * stride + r), load_f32(tile + 4 * (t * ROWS + r)))


@jit
def prepare_all(job, phase, kinds, x, n):
    """Prepare the batch's rows of x, shared out by groups."""
    n_groups = n_blocks(n, 256)
    n_items = job.n_rows * n_groups
    begin, end = take(job, phase, n_items, 0)
    while begin < end:
        for item in range(begin, end):
            row, g = item // n_groups, item % n_groups
            prepare_rows(job, kinds, x, n, row, row, 0, job.n_rows, g, g + 1)
        begin, end = take(job, phase, n_items, end - begin)
    wait_until_done(job, phase, n_items)
