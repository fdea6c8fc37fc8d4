"""The feed-forward of a batch: route, gather by expert, gate and up, down. A dense layer is one expert."""

import numpy as np

from llmq.engine.job import (
    GATE_UP,
    GROUP,
    PHASE_BYTES,
    n_blocks,
    prepare_rows,
    product,
    take,
    wait_until_done,
)
from llmq.jit import jit
from llmq.kernels.elementwise import rms_norm, silu_mul
from llmq.kernels.router import choose_experts, group_by_expert
from llmq.simd import ROWS, load_f32, load_i32, load_i64, store_f32, store_i64


@jit
def route_rows(job, model, layer, phase, scratch):
    """normed = RMSNorm(x); each row's experts and their weights."""
    n, k = model.dim, model.n_used
    begin, end = take(job, phase, job.n_rows, 0)
    while begin < end:
        for row in range(begin, end):
            normed = job.normed + 4 * row * n
            rms_norm(normed, job.x + 4 * row * n, layer.ffn_norm, n, model.rms_eps)
            if layer.ffn_gate_inp:
                at = 4 * row * k
                choose_experts(
                    job.chosen + at, job.chosen_weights + at, normed, layer.ffn_gate_inp, n, model.n_experts, k, scratch
                )  # fmt: skip
        begin, end = take(job, phase, job.n_rows, end - begin)
    wait_until_done(job, phase, job.n_rows)


@jit
def group_rows(job, model, layer, phase):
    """The rows of each expert together, by one thread; then the number of strips of the next product is known."""
    begin, end = take(job, phase, 1, 0)
    if begin < end:
        if layer.ffn_gate_inp:
            group_by_expert(
                job.entries, job.entry_weights, job.starts, job.active, job.chosen, job.chosen_weights,
                job.n_rows, model.n_experts, model.n_used,
            )  # fmt: skip
        n_strips = load_i32(job.active) * n_blocks(model.ffn_dim, ROWS)
        store_i64(job.phases + PHASE_BYTES * (phase - GROUP + GATE_UP) + 8, n_strips)
        take(job, phase, 1, 1)
    wait_until_done(job, phase, 1)


@jit
def prepare_entries(job, model, phase, kinds, x, n, by_token):
    """Prepare rows for the experts, each expert's together; entry i is row entries[i] of x, or row i itself."""
    n_groups = n_blocks(n, 256)
    n_items = job.n_rows * model.n_used * n_groups
    begin, end = take(job, phase, n_items, 0)
    while begin < end:
        expert = 0
        for item in range(begin, end):
            i, g = item // n_groups, item % n_groups
            while load_i32(job.starts + 4 * (expert + 1)) <= i:
                expert += 1
            first = load_i32(job.starts + 4 * expert)
            count = load_i32(job.starts + 4 * (expert + 1)) - first
            row = load_i32(job.entries + 4 * i) if by_token else i
            prepare_rows(job, kinds, x, n, np.int64(row), i - first, first, count, g, g + 1)
        begin, end = take(job, phase, n_items, end - begin)
    wait_until_done(job, phase, n_items)


@jit
def gate_and_up(job, model, layer, phase, tile, panel):
    """hidden = silu(gate) * up for each entry, one expert's strip of ROWS columns at a time."""
    strips = n_blocks(model.ffn_dim, ROWS)
    n_items = load_i64(job.phases + PHASE_BYTES * phase + 8)
    other = tile + job.tile_bytes
    begin, end = take(job, phase, n_items, 0)
    while begin < end:
        for item in range(begin, end):
            expert, row = load_i32(job.active + 4 + 4 * (item // strips)), item % strips * ROWS
            first = load_i32(job.starts + 4 * expert)
            count = load_i32(job.starts + 4 * (expert + 1)) - first
            product(job, tile, layer.ffn_gate, expert, row, first, count, panel)
            product(job, other, layer.ffn_up, expert, row, first, count, panel)
            for t in range(count):
                out = job.hidden + 4 * ((first + t) * model.ffn_dim + row)
                silu_mul(out, tile + 4 * ROWS * t, other + 4 * ROWS * t, min(ROWS, model.ffn_dim - row))
        begin, end = take(job, phase, n_items, end - begin)
    wait_until_done(job, phase, n_items)


@jit
def add_down(job, layer, phase, tile, panel):
    """x[row] += weight * (hidden times ffn_down), expert after expert within one strip, so that no two threads meet."""
    m = layer.ffn_down
    n_items = n_blocks(m.rows, ROWS)
    begin, end = take(job, phase, n_items, 0)
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
                        store_f32(at, load_f32(at) + weight * load_f32(tile + 4 * (t * ROWS + r)))
        begin, end = take(job, phase, n_items, end - begin)
    wait_until_done(job, phase, n_items)
