"""The forward pass: one compiled call per thread, whose layer loop reads like the paper.

A batch is rows of (token, position, KV ring). Threads share every step and meet at a barrier after it; steps over
matrix rows are dealt out by a counter, so that slow and fast cores stay busy together. Mixture layers put the rows of
each expert together first; a dense layer is one expert that takes every row.
"""

import numpy as np
from numba import types

from llmq.engine.plan import LAYER, MATRIX, MODEL
from llmq.jit import jit, kernel
from llmq.kernels.activation import FLOAT, prepare_group
from llmq.kernels.attention import QUERIES, attend1, attend4, attend8, store_kv
from llmq.kernels.dot import DOT_TYPES
from llmq.kernels.elementwise import rms_norm, rope, rope_angles, silu_mul
from llmq.kernels.floats import FLOATS_TYPES
from llmq.kernels.panel import PANEL_TYPES, ROWS
from llmq.kernels.router import choose_experts, group_by_expert
from llmq.simd import call, load_f32, load_i32, load_i64, record_at, stack, store_f32, store_i64
from llmq.team import barrier, fetch_add

COUNTERS_PER_LAYER = 5

# Addresses of buffers, sizes of this batch, and what a call covers.
JOB = np.dtype(
    [
        (name, np.int64)
        for name in (
            "model", "shared", "counters", "n_threads", "first_layer", "end_layer",
            "n_rows", "tokens", "positions", "rings", "capacities", "n_outputs", "output_rows", "logits",
            "x", "normed", "act0", "act1", "act2", "q", "k", "v", "attended", "angles", "hidden",
            "chosen", "chosen_weights", "entries", "entry_weights", "starts", "active", "scratch", "scratch_bytes",
            "tile_bytes", "attention_at", "panel_at",
        )
    ]
)  # fmt: skip

job_at, layer_at, model_at = record_at(JOB), record_at(LAYER), record_at(MODEL)
LAYER_BYTES, MATRIX_BYTES = LAYER.itemsize, MATRIX.itemsize
call_dot, call_panel, call_floats = call(*DOT_TYPES), call(*PANEL_TYPES), call(*FLOATS_TYPES)


@jit
def share(n, thread, n_threads):  # type: ignore[no-untyped-def]
    """This thread's even part of 0..n."""
    return n * thread // n_threads, n * (thread + 1) // n_threads


@jit
def n_blocks(n, size):  # type: ignore[no-untyped-def]
    return (n + size - 1) // size


@jit
def act_buffer(job, kind):  # type: ignore[no-untyped-def]
    """Where prepared activations of a kind lie, and the bytes of one group."""
    if kind == FLOAT:
        return job.act0, 1024
    return job.act1 if kind == 1 else job.act2, 320


@jit
def prepare_rows(job, kinds, x, n, row, slot, first, count, group_begin, group_end):  # type: ignore[no-untyped-def]
    """Groups of x[row] to the batch of `count` rows whose first is `first`; the row is number `slot` in it."""
    n_groups = n_blocks(n, 256)
    for kind in range(3):
        if (kinds >> kind) & 1:
            base, size = act_buffer(job, kind)
            base += first * n_groups * size
            for g in range(group_begin, group_end):
                source = x + 4 * (row * n + 256 * g)
                prepare_group(base + (g * count + slot) * size, kind, source, min(256, n - 256 * g))


@jit
def product(job, out, m, expert, row, first, count, panel):  # type: ignore[no-untyped-def]
    """out [count][16] = 16 rows of a matrix from `row` on, times the prepared rows first .. first + count."""
    base, size = act_buffer(job, m.kind)
    n_groups = n_blocks(m.cols, 256)
    x = base + first * n_groups * size
    w = m.address + expert * m.expert_bytes + row * m.row_bytes
    n_rows = min(ROWS, m.rows - row)
    if count == 1:
        call_dot(m.dot, out, w, m.row_bytes, n_rows, x, size, m.n_groups, m.tail_bytes)
    else:
        call_panel(
            m.panel, out, w, m.row_bytes, n_rows, x, size, count * size, count, m.n_groups, m.tail_bytes, panel
        )  # fmt: skip


@jit
def next_items(job, counter, n_items):  # type: ignore[no-untyped-def]
    """The next run of items that no thread has taken."""
    grain = max(1, n_items // (job.n_threads * 8))
    begin = fetch_add(job.counters + 8 * counter, grain)
    return min(begin, n_items), min(begin + grain, n_items)


@jit
def store_tile(out, stride, tile, n_rows, count):  # type: ignore[no-untyped-def]
    for t in range(count):
        for r in range(n_rows):
            store_f32(out + 4 * (t * stride + r), load_f32(tile + 64 * t + 4 * r))


@jit
def embed(job, model, thread):  # type: ignore[no-untyped-def]
    """x = embedding rows; the angles that RoPE turns each row's heads by."""
    m, half = model.token_embd, model.head_dim // 2
    begin, end = share(job.n_rows, thread, job.n_threads)
    for row in range(begin, end):
        w = m.address + load_i32(job.tokens + 4 * row) * m.row_bytes
        call_floats(model.floats, job.x + 4 * row * m.cols, w, m.n_groups, m.tail_bytes, m.cols - 256 * m.n_groups)
        rope_angles(job.angles + 8 * row * half, model.frequencies, half, load_i64(job.positions + 8 * row))


@jit
def norm_rows(job, model, weight, kinds, thread):  # type: ignore[no-untyped-def]
    """normed = RMSNorm(x), and prepared for the kinds of weights that read it."""
    n = model.dim
    begin, end = share(job.n_rows, thread, job.n_threads)
    for row in range(begin, end):
        rms_norm(job.normed + 4 * row * n, job.x + 4 * row * n, weight, n, model.rms_eps)
        prepare_rows(job, kinds, job.normed, n, row, row, 0, job.n_rows, 0, n_blocks(n, 256))


@jit
def project_qkv(job, layer, counter, tile, panel):  # type: ignore[no-untyped-def]
    """q, k, v = normed times three matrices, as one list of 16-row strips."""
    nq, nk = n_blocks(layer.attn_q.rows, ROWS), n_blocks(layer.attn_k.rows, ROWS)
    n_items = nq + nk + n_blocks(layer.attn_v.rows, ROWS)
    begin, end = next_items(job, counter, n_items)
    while begin < end:
        for item in range(begin, end):
            if item < nq:
                m, out, row = layer.attn_q, job.q, item * ROWS
            elif item < nq + nk:
                m, out, row = layer.attn_k, job.k, (item - nq) * ROWS
            else:
                m, out, row = layer.attn_v, job.v, (item - nq - nk) * ROWS
            product(job, tile, m, 0, row, 0, job.n_rows, panel)
            store_tile(out + 4 * row, m.rows, tile, min(ROWS, m.rows - row), job.n_rows)
        begin, end = next_items(job, counter, n_items)


@jit
def ring_at(job, model, row, layer, head):  # type: ignore[no-untyped-def]
    """Addresses of one KV head's keys and values in a row's ring, and the ring's capacity."""
    capacity = load_i64(job.capacities + 8 * row)
    plane = capacity * model.head_dim * 2
    keys = load_i64(job.rings + 8 * row) + (layer * 2 * model.n_kv_heads + head) * plane
    return keys, keys + model.n_kv_heads * plane, capacity


@jit
def rotate_and_store(job, model, layer, thread):  # type: ignore[no-untyped-def]
    """RoPE on q and k; k and v go into the ring at slot position % capacity."""
    hd, n_rep = model.head_dim, model.n_heads // model.n_kv_heads
    begin, end = share(job.n_rows * model.n_kv_heads, thread, job.n_threads)
    for item in range(begin, end):
        row, head = item // model.n_kv_heads, item % model.n_kv_heads
        angles = job.angles + 4 * row * hd
        for h in range(head * n_rep, (head + 1) * n_rep):
            rope(job.q + 4 * (row * model.n_heads + h) * hd, angles, hd // 2, model.rope_step, model.rope_gap)
        k = job.k + 4 * (row * model.n_kv_heads + head) * hd
        rope(k, angles, hd // 2, model.rope_step, model.rope_gap)
        keys, values, capacity = ring_at(job, model, row, layer, head)
        store_kv(keys, values, load_i64(job.positions + 8 * row) % capacity, k, job.v + (k - job.k), hd)


@jit
def attend_rows(job, model, layer, counter, scratch):  # type: ignore[no-untyped-def]
    """attended = softmax(q k / sqrt(head_dim)) v; rows of one ring and the heads of one KV head go together."""
    n_rep = model.n_heads // model.n_kv_heads
    span = max(1, QUERIES // n_rep)
    n_spans = n_blocks(job.n_rows, span)
    n_items = n_spans * model.n_kv_heads
    begin, end = next_items(job, counter, n_items)
    while begin < end:
        for item in range(begin, end):
            head, row = item // n_spans, item % n_spans * span
            end_row = min(row + span, job.n_rows)
            while row < end_row:
                until = row + 1
                while until < end_row and load_i64(job.rings + 8 * until) == load_i64(job.rings + 8 * row):
                    until += 1
                attend_span(job, model, layer, head, row, until, scratch)
                row = until
        begin, end = next_items(job, counter, n_items)


@jit
def attend_span(job, model, layer, head, row, until, scratch):  # type: ignore[no-untyped-def]
    """Queries of rows row .. until (one ring) and all heads over one KV head, eight at a time."""
    hd, n_rep = model.head_dim, model.n_heads // model.n_kv_heads
    keys, values, capacity = ring_at(job, model, row, layer, head)
    outs, queries, at = stack(64), stack(64), stack(64)
    n, done = (until - row) * n_rep, 0
    while done < n:
        size = 8 if n - done >= 8 else (4 if n - done >= 4 else 1)
        for i in range(size):
            r = row + (done + i) // n_rep
            offset = 4 * (r * model.n_heads + head * n_rep + (done + i) % n_rep) * hd
            store_i64(outs + 8 * i, job.attended + offset)
            store_i64(queries + 8 * i, job.q + offset)
            store_i64(at + 8 * i, load_i64(job.positions + 8 * r))
        if size == 8:
            attend8(outs, queries, at, keys, values, capacity, hd, model.window, scratch)
        elif size == 4:
            attend4(outs, queries, at, keys, values, capacity, hd, model.window, scratch)
        else:
            attend1(outs, queries, at, keys, values, capacity, hd, model.window, scratch)
        done += size


@jit
def prepare_all(job, kinds, x, n, thread):  # type: ignore[no-untyped-def]
    """Prepare the batch's rows of x, shared out by groups."""
    n_groups = n_blocks(n, 256)
    begin, end = share(job.n_rows * n_groups, thread, job.n_threads)
    for item in range(begin, end):
        row, g = item // n_groups, item % n_groups
        prepare_rows(job, kinds, x, n, row, row, 0, job.n_rows, g, g + 1)


@jit
def add_output(job, layer, counter, tile, panel):  # type: ignore[no-untyped-def]
    """x += attended times attn_output."""
    m = layer.attn_output
    n_items = n_blocks(m.rows, ROWS)
    begin, end = next_items(job, counter, n_items)
    while begin < end:
        for item in range(begin, end):
            row = item * ROWS
            product(job, tile, m, 0, row, 0, job.n_rows, panel)
            for t in range(job.n_rows):
                for r in range(min(ROWS, m.rows - row)):
                    at = job.x + 4 * (t * m.rows + row + r)
                    store_f32(at, load_f32(at) + load_f32(tile + 64 * t + 4 * r))
        begin, end = next_items(job, counter, n_items)


@jit
def route_rows(job, model, layer, scratch, thread):  # type: ignore[no-untyped-def]
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
def prepare_entries(job, model, kinds, x, n, by_token, thread):  # type: ignore[no-untyped-def]
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
def gate_and_up(job, model, layer, counter, tile, panel):  # type: ignore[no-untyped-def]
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
def add_down(job, model, layer, counter, tile, panel):  # type: ignore[no-untyped-def]
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


@jit
def write_logits(job, model, counter, thread, tile, panel):  # type: ignore[no-untyped-def]
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
def forward(job_address, thread):  # type: ignore[no-untyped-def]
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
        add_down(job, model, layer, counter + 4, tile, panel)
        barrier(shared, n_threads)
    if job.end_layer == model.n_layers and job.n_outputs > 0:
        write_logits(job, model, model.n_layers * COUNTERS_PER_LAYER, thread, tile, panel)
        barrier(shared, n_threads)
