"""The forward pass: one compiled call per thread, whose layer loop reads like the paper.

A batch is rows of (token, position, KV ring). A step is a list of items that threads take from a counter, and the next
step begins when all are finished, so that slow and fast cores stay busy together and a thread that is not running holds
nobody up. Mixture layers put the rows of each expert together first; a dense layer is one expert that takes every row.
"""

from numba import types

from llmq.engine.feed_forward import add_down, gate_and_up, group_rows, prepare_entries, route_rows
from llmq.engine.job import (
    ATTEND,
    COMBINE,
    DOWN,
    GATE_UP,
    GROUP,
    LAYER_BYTES,
    NORM,
    OUTPUT,
    PHASES_PER_LAYER,
    PREPARE,
    PREPARE_DOWN,
    PREPARE_FFN,
    PROJECT,
    ROTATE,
    ROUTE,
    job_at,
    layer_at,
    model_at,
    n_blocks,
    prepare_all,
    prepare_rows,
    product,
    store_tile,
    take,
    wait_until_done,
)  # fmt: skip
from llmq.engine.self_attention import add_output, attend_rows, combine_rows, project_qkv, rotate_and_store
from llmq.jit import jit, kernel
from llmq.kernels.elementwise import rms_norm, rope_angles
from llmq.kernels.floats import FLOATS_TYPES
from llmq.simd import ROWS, call, load_i32, load_i64

call_floats = call(*FLOATS_TYPES)


@jit
def embed(job, model, phase):
    """x = embedding rows; the angles that RoPE turns each row's heads by."""
    m, half = model.token_embd, model.head_dim // 2
    begin, end = take(job, phase, job.n_rows, 0)
    while begin < end:
        for row in range(begin, end):
            w = m.address + load_i32(job.tokens + 4 * row) * m.row_bytes
            call_floats(model.floats, job.x + 4 * row * m.cols, w, m.n_groups, m.tail_bytes, m.cols - 256 * m.n_groups)
            rope_angles(job.angles + 8 * row * half, model.frequencies, half, load_i64(job.positions + 8 * row))
        begin, end = take(job, phase, job.n_rows, end - begin)
    wait_until_done(job, phase, job.n_rows)


@jit
def norm_rows(job, model, layer, phase):
    """normed = RMSNorm(x), and prepared for the kinds of weights that read it."""
    n = model.dim
    begin, end = take(job, phase, job.n_rows, 0)
    while begin < end:
        for row in range(begin, end):
            rms_norm(job.normed + 4 * row * n, job.x + 4 * row * n, layer.attn_norm, n, model.rms_eps)
            prepare_rows(job, layer.attn_kinds, job.normed, n, row, row, 0, job.n_rows, 0, n_blocks(n, 256))
        begin, end = take(job, phase, job.n_rows, end - begin)
    wait_until_done(job, phase, job.n_rows)


@jit
def norm_outputs(job, model, phase):
    """normed = the final RMSNorm of the rows whose logits are asked for, prepared for the output matrix."""
    n, count = model.dim, job.n_outputs
    begin, end = take(job, phase, count, 0)
    while begin < end:
        for i in range(begin, end):
            row = load_i64(job.output_rows + 8 * i)
            rms_norm(job.normed + 4 * i * n, job.x + 4 * row * n, model.output_norm, n, model.rms_eps)
            prepare_rows(job, 1 << model.output.kind, job.normed, n, i, i, 0, count, 0, n_blocks(n, 256))
        begin, end = take(job, phase, count, end - begin)
    wait_until_done(job, phase, count)


@jit
def write_logits(job, model, phase, tile, panel):
    """logits [n_outputs][vocab_size]."""
    m = model.output
    n_items = n_blocks(m.rows, ROWS)
    begin, end = take(job, phase, n_items, 0)
    while begin < end:
        for item in range(begin, end):
            row = item * ROWS
            product(job, tile, m, 0, row, 0, job.n_outputs, panel)
            store_tile(job.logits + 4 * row, m.rows, tile, min(ROWS, m.rows - row), job.n_outputs)
        begin, end = take(job, phase, n_items, end - begin)
    wait_until_done(job, phase, n_items)


@kernel(types.int64, types.int64, name="forward")
def forward(job_address, thread):
    """Layers first_layer .. end_layer for a batch; embeds before the first layer, writes logits after the last."""
    job = job_at(job_address)
    model = model_at(job.model)
    scratch = job.scratch + thread * job.scratch_bytes
    tile, panel, attention = scratch, scratch + job.panel_at, scratch + job.attention_at
    besides = model.n_layers * PHASES_PER_LAYER
    if job.first_layer == 0:
        embed(job, model, besides)
    for i in range(job.first_layer, job.end_layer):
        layer, phase = layer_at(model.layers + i * LAYER_BYTES), i * PHASES_PER_LAYER
        norm_rows(job, model, layer, phase + NORM)
        project_qkv(job, layer, phase + PROJECT, tile, panel)
        rotate_and_store(job, model, i, phase + ROTATE)
        attend_rows(job, model, i, phase + ATTEND, attention)
        if job.n_parts > 1:
            combine_rows(job, model, phase + COMBINE)
        prepare_all(job, phase + PREPARE, 1 << layer.attn_output.kind, job.attended, model.n_heads * model.head_dim)
        add_output(job, layer, phase + OUTPUT, tile, panel)

        route_rows(job, model, layer, phase + ROUTE, attention)
        group_rows(job, model, layer, phase + GROUP)
        prepare_entries(job, model, phase + PREPARE_FFN, layer.ffn_kinds, job.normed, model.dim, True)
        gate_and_up(job, model, layer, phase + GATE_UP, tile, panel)
        prepare_entries(job, model, phase + PREPARE_DOWN, 1 << layer.ffn_down.kind, job.hidden, model.ffn_dim, False)
        add_down(job, layer, phase + DOWN, tile, panel)
    if job.end_layer == model.n_layers and job.n_outputs > 0:
        norm_outputs(job, model, besides + 1)
        write_logits(job, model, besides + 2, tile, panel)
