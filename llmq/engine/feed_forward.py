"""The feed-forward of a batch: route, gather by expert, gate and up, down. A dense layer is one expert."""

import numpy as np

from llmq.engine.job import n_blocks, next_items, prepare_rows, product, share
from llmq.jit import jit
from llmq.kernels.elementwise import rms_norm, silu_mul
from llmq.kernels.panel import ROWS
from llmq.kernels.router import choose_experts
from llmq.simd import load_f32, load_i32, store_f32


@jit
def route_rows(job, model, layer, scratch, thread):
    """normed = RMSNorm(x); each row's experts and their weights."""
    n, k = model.dim, model.n_used
    begin, end = share(job.n_rows, thread, job.n_threads)
    for row in range(begin, end):
        normed = job.normed + 4 * row * n
        rms_norm(normed, job.x + 4 * row * n, layer.ffn_norm, n, model.rms_eps)
        if layer.ffn_gate_inp:
            at = 4 * row * k
            choose_experts(
                job.chosen + at, job.chosen_weights + at, normed, layer.ffn_gate_inp, n, model.n_experts, k, scratch
            )  # fmt: skip


@jit
def prepare_entries(job, model, kinds, x, n, by_token, thread):
    """Prepare rows for the experts, each expert's together; entry i is row entries[i] of x, or row i itself."""
    n_groups = n_blocks(n, 256)
    begin, end = share(job.n_rows * model.n_used * n_groups, thread, job.n_threads)
    expert = 0
    for item in range(begin, end):
        i, g = item // n_groups, item % n_groups
        while load_i32(job.starts + 4 * (expert + 1)) <= i:
            expert += 1
        first = load_i32(job.starts + 4 * expert)
        count = load_i32(job.starts + 4 * (expert + 1)) - first
        row = load_i32(job.entries + 4 * i) if by_token else i
        prepare_rows(job, kinds, x, n, np.int64(row), i - first, first, count, g, g + 1)


@jit
def gate_and_up(job, model, layer, counter, tile, panel):
    """hidden = silu(gate) * up for each entry, one expert's strip of 16 columns at a time."""
    strips = n_blocks(model.ffn_dim, ROWS)
    n_items = load_i32(job.active) * strips
    other = tile + job.tile_bytes
    begin, end = next_items(job, counter, n_items)
    while begin < end:
        for item in range(begin, end):
            expert, row = load_i32(job.active + 4 + 4 * (item // strips)), item % strips * ROWS
            first = load_i32(job.starts + 4 * expert)
            count = load_i32(job.starts + 4 * (expert + 1)) - first
            product(job, tile, layer.ffn_gate, expert, row, first, count, panel)
            product(job, other, layer.ffn_up, expert, row, first, count, panel)
            for t in range(count):
                out = job.hidden + 4 * ((first + t) * model.ffn_dim + row)
                silu_mul(out, tile + 64 * t, other + 64 * t)
        begin, end = next_items(job, counter, n_items)


@jit
def add_down(job, layer, counter, tile, panel):
    """x[row] += weight * (hidden times ffn_down), expert after expert within one strip, so that no two threads meet."""
    m = layer.ffn_down
    n_items = n_blocks(m.rows, ROWS)
    begin, end = next_items(job, counter, n_items)
    while begin < end:
        for item in range(begin, end):
            row = item * ROWS
            for a in range(load_i32(job.active)):
                expert = load_i32(job.active + 4 + 4 * a)
                first = load_i32(job.starts + 4 * expert)
                count = load_i32(job.starts + 4 * (expert + 1)) - first
                product(job, tile, m, expert, row, first, count, panel)
                for t in range(count):
                    weight = load_f32(job.entry_weights + 4 * (first + t))
                    base = job.x + 4 * (load_i32(job.entries + 4 * (first + t)) * m.rows + row)
                    for r in range(min(ROWS, m.rows - row)):
                        at = base + 4 * r
                        store_f32(at, load_f32(at) + weight * load_f32(tile + 64 * t + 4 * r))
        begin, end = next_items(job, counter, n_items)
