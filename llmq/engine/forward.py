"""The forward pass: one compiled call per thread, whose layer loop reads like the paper.

A batch is rows of (token, position, KV ring). Threads share every step and meet at a barrier after it; steps over
matrix rows are dealt out by a counter, so that slow and fast cores stay busy together. Mixture layers put the rows of
each expert together first; a dense layer is one expert that takes every row.
"""

from numba import types

from llmq.engine.feed_forward import add_down, gate_and_up, prepare_entries, route_rows
from llmq.engine.job import (
    COUNTERS_PER_LAYER,
    LAYER_BYTES,
    job_at,
    layer_at,
    model_at,
    n_blocks,
    next_items,
    prepare_all,
    prepare_rows,
    product,
    share,
    store_tile,
)
from llmq.engine.self_attention import add_output, attend_rows, project_qkv, rotate_and_store
from llmq.jit import jit, kernel
from llmq.kernels.elementwise import rms_norm, rope_angles
from llmq.kernels.floats import FLOATS_TYPES
from llmq.kernels.panel import ROWS
from llmq.kernels.router import group_by_expert
from llmq.simd import call, load_i32, load_i64
from llmq.team import barrier

call_floats = call(*FLOATS_TYPES)


@jit
def embed(job, model, thread):
    """x = embedding rows; the angles that RoPE turns each row's heads by."""
    m, half = model.token_embd, model.head_dim // 2
    begin, end = share(job.n_rows, thread, job.n_threads)
    for row in range(begin, end):
        w = m.address + load_i32(job.tokens + 4 * row) * m.row_bytes
        call_floats(model.floats, job.x + 4 * row * m.cols, w, m.n_groups, m.tail_bytes, m.cols - 256 * m.n_groups)
        rope_angles(job.angles + 8 * row * half, model.frequencies, half, load_i64(job.positions + 8 * row))


@jit
def norm_rows(job, model, weight, kinds, thread):
    """normed = RMSNorm(x), and prepared for the kinds of weights that read it."""
    n = model.dim
    begin, end = share(job.n_rows, thread, job.n_threads)
    for row in range(begin, end):
        rms_norm(job.normed + 4 * row * n, job.x + 4 * row * n, weight, n, model.rms_eps)
        prepare_rows(job, kinds, job.normed, n, row, row, 0, job.n_rows, 0, n_blocks(n, 256))


@jit
def write_logits(job, model, counter, thread, tile, panel):
    """logits [n_outputs][vocab_size] of the rows asked for."""
    n, m, count = model.dim, model.output, job.n_outputs
    begin, end = share(count, thread, job.n_threads)
    for i in range(begin, end):
        row = load_i64(job.output_rows + 8 * i)
        rms_norm(job.normed + 4 * i * n, job.x + 4 * row * n, model.output_norm, n, model.rms_eps)
        prepare_rows(job, 1 << m.kind, job.normed, n, i, i, 0, count, 0, n_blocks(n, 256))
    barrier(job.shared, job.n_threads)
    n_items = n_blocks(m.rows, ROWS)
    begin, end = next_items(job, counter, n_items)
    while begin < end:
        for item in range(begin, end):
            row = item * ROWS
            product(job, tile, m, 0, row, 0, count, panel)
            store_tile(job.logits + 4 * row, m.rows, tile, min(ROWS, m.rows - row), count)
        begin, end = next_items(job, counter, n_items)


@kernel(types.int64, types.int64, name="forward")
def forward(job_address, thread):
    """Layers first_layer .. end_layer for a batch; embeds before the first layer, writes logits after the last."""
    job = job_at(job_address)
    model, shared, n_threads = model_at(job.model), job.shared, job.n_threads
    scratch = job.scratch + thread * job.scratch_bytes
    tile, panel, attention = scratch, scratch + job.panel_at, scratch + job.attention_at
    if job.first_layer == 0:
        embed(job, model, thread)
        barrier(shared, n_threads)
    for i in range(job.first_layer, job.end_layer):
        layer, counter = layer_at(model.layers + i * LAYER_BYTES), i * COUNTERS_PER_LAYER
        norm_rows(job, model, layer.attn_norm, layer.attn_kinds, thread)
        barrier(shared, n_threads)
        project_qkv(job, layer, counter, tile, panel)
        barrier(shared, n_threads)
        rotate_and_store(job, model, i, thread)
        barrier(shared, n_threads)
        attend_rows(job, model, i, counter + 1, attention)
        barrier(shared, n_threads)
        prepare_all(job, 1 << layer.attn_output.kind, job.attended, model.n_heads * model.head_dim, thread)
        barrier(shared, n_threads)
        add_output(job, layer, counter + 2, tile, panel)
        barrier(shared, n_threads)

        route_rows(job, model, layer, attention, thread)
        barrier(shared, n_threads)
        if layer.ffn_gate_inp:
            if thread == 0:
                group_by_expert(
                    job.entries, job.entry_weights, job.starts, job.active, job.chosen, job.chosen_weights,
                    job.n_rows, model.n_experts, model.n_used,
                )  # fmt: skip
            barrier(shared, n_threads)
        prepare_entries(job, model, layer.ffn_kinds, job.normed, model.dim, True, thread)
        barrier(shared, n_threads)
        gate_and_up(job, model, layer, counter + 3, tile, panel)
        barrier(shared, n_threads)
        prepare_entries(job, model, 1 << layer.ffn_down.kind, job.hidden, model.ffn_dim, False, thread)
        barrier(shared, n_threads)
        add_down(job, layer, counter + 4, tile, panel)
        barrier(shared, n_threads)
    if job.end_layer == model.n_layers and job.n_outputs > 0:
        write_logits(job, model, model.n_layers * COUNTERS_PER_LAYER, thread, tile, panel)
        barrier(shared, n_threads)
