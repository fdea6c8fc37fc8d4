"""Self-attention of a batch: project, rotate, store, attend, project back."""

import numpy as np

from llmq.engine.job import n_blocks, product, store_tile, take, wait_until_done
from llmq.jit import jit
from llmq.kernels.attention import ATTEND_TYPES, QUERIES, combine_parts
from llmq.kernels.elementwise import rope
from llmq.kernels.kv import STORE_TYPES
from llmq.layout import PART, PART_STATE
from llmq.simd import ROWS, call, load_f32, load_i64, stack, store_f32, store_i64

call_attend, call_store = call(*ATTEND_TYPES), call(*STORE_TYPES)
FAR = 2**62  # past every position


@jit
def project_qkv(job, layer, phase, tile, panel):
    """q, k, v = normed times three matrices, as one list of strips of ROWS rows."""
    nq, nk = n_blocks(layer.attn_q.rows, ROWS), n_blocks(layer.attn_k.rows, ROWS)
    n_items = nq + nk + n_blocks(layer.attn_v.rows, ROWS)
    begin, end = take(job, phase, n_items, 0)
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
        begin, end = take(job, phase, n_items, end - begin)
    wait_until_done(job, phase, n_items)


@jit
def ring_at(job, model, row, layer, head):
    """Addresses of one KV head's keys and values in a row's ring, and the ring's capacity."""
    capacity = load_i64(job.capacities + 8 * row)
    plane = capacity * job.kv_row_bytes
    keys = load_i64(job.rings + 8 * row) + (layer * 2 * model.n_kv_heads + head) * plane
    return keys, keys + model.n_kv_heads * plane, capacity


@jit
def rotate_head(job, model, layer, row, head):
    """One KV head of one row, and the query heads that read it."""
    hd, n_rep = model.head_dim, model.n_heads // model.n_kv_heads
    angles = job.angles + 4 * row * hd
    for h in range(head * n_rep, (head + 1) * n_rep):
        rope(job.q + 4 * (row * model.n_heads + h) * hd, angles, hd // 2, model.rope_step, model.rope_gap)
    k = job.k + 4 * (row * model.n_kv_heads + head) * hd
    rope(k, angles, hd // 2, model.rope_step, model.rope_gap)
    keys, values, capacity = ring_at(job, model, row, layer, head)
    slot = load_i64(job.positions + 8 * row) % capacity
    call_store(job.store_kv, keys, values, slot, k, job.v + (k - job.k), hd)


@jit
def rotate_and_store(job, model, layer, phase):
    """RoPE on q and k; k and v go into the ring at slot position % capacity."""
    n_items = job.n_rows * model.n_kv_heads
    begin, end = take(job, phase, n_items, 0)
    while begin < end:
        for item in range(begin, end):
            rotate_head(job, model, layer, item // model.n_kv_heads, item % model.n_kv_heads)
        begin, end = take(job, phase, n_items, end - begin)
    wait_until_done(job, phase, n_items)


@jit
def part_at(job, model, row, head, part):
    """What one query head of one row leaves for a part of its context."""
    return job.parts + ((row * model.n_heads + head) * job.n_parts + part) * (4 * model.head_dim + PART_STATE)


@jit
def attend_span(job, model, layer, head, row, until, part, scratch):
    """Queries of rows row .. until (one ring) and all heads over one KV head, several at a time."""
    hd, n_rep = model.head_dim, model.n_heads // model.n_kv_heads
    keys, values, capacity = ring_at(job, model, row, layer, head)
    outs, queries, at = stack(64), stack(64), stack(64)
    is_part = job.n_parts > 1
    begin = PART * (job.first_part + part) if is_part else 0
    end = begin + PART if is_part else FAR
    n, done = (until - row) * n_rep, 0
    while done < n:
        size = QUERIES if n - done >= QUERIES else (4 if n - done >= 4 else 1)
        for i in range(size):
            r, h = row + (done + i) // n_rep, head * n_rep + (done + i) % n_rep
            offset = 4 * (r * model.n_heads + h) * hd
            store_i64(outs + 8 * i, part_at(job, model, r, h, part) if is_part else job.attended + offset)
            store_i64(queries + 8 * i, job.q + offset)
            store_i64(at + 8 * i, load_i64(job.positions + 8 * r))
        first_seen = load_i64(at) - model.window + 1
        if first_seen < end and load_i64(at + 8 * (size - 1)) >= begin:
            attend = job.attend_most if size == QUERIES else (job.attend4 if size == 4 else job.attend1)
            call_attend(
                attend, outs, queries, at, keys, values, capacity, hd, model.window, begin, end, np.int64(is_part),
                scratch,
            )  # fmt: skip
        done += size


@jit
def attend_rows(job, model, layer, phase, scratch):
    """attended = softmax(q k / sqrt(head_dim)) v; rows of one ring and the heads of one KV head go together.

    A few rows with a long context are shared out by parts of it, many rows by a few rows each.
    """
    n_rep = model.n_heads // model.n_kv_heads
    span = job.n_rows if job.n_parts > 1 else max(1, QUERIES // n_rep)
    n_spans = n_blocks(job.n_rows, span)
    n_items = n_spans * model.n_kv_heads * job.n_parts
    begin, end = take(job, phase, n_items, 0)
    while begin < end:
        for item in range(begin, end):
            part, place = item % job.n_parts, item // job.n_parts
            head, row = place // n_spans, place % n_spans * span
            end_row = min(row + span, job.n_rows)
            while row < end_row:
                until = row + 1
                while until < end_row and load_i64(job.rings + 8 * until) == load_i64(job.rings + 8 * row):
                    until += 1
                attend_span(job, model, layer, head, row, until, part, scratch)
                row = until
        begin, end = take(job, phase, n_items, end - begin)
    wait_until_done(job, phase, n_items)


@jit
def combine_rows(job, model, phase):
    """attended = what the parts of each row's context give together."""
    hd, n_items = model.head_dim, job.n_rows * model.n_heads
    begin, end = take(job, phase, n_items, 0)
    while begin < end:
        for item in range(begin, end):
            row, head = item // model.n_heads, item % model.n_heads
            position = load_i64(job.positions + 8 * row)
            first, last = max(0, position - model.window + 1) // PART, position // PART
            parts = part_at(job, model, row, head, first - job.first_part)
            combine_parts(job.attended + 4 * item * hd, parts, last - first + 1, hd)
        begin, end = take(job, phase, n_items, end - begin)
    wait_until_done(job, phase, n_items)


@jit
def add_output(job, layer, phase, tile, panel):
    """x += attended times attn_output."""
    m = layer.attn_output
    n_items = n_blocks(m.rows, ROWS)
    begin, end = take(job, phase, n_items, 0)
    while begin < end:
        for item in range(begin, end):
            row = item * ROWS
            product(job, tile, m, 0, row, 0, job.n_rows, panel)
            for t in range(job.n_rows):
                for r in range(min(ROWS, m.rows - row)):
                    at = job.x + 4 * (t * m.rows + row + r)
                    store_f32(at, load_f32(at) + load_f32(tile + 4 * (t * ROWS + r)))
        begin, end = take(job, phase, n_items, end - begin)
    wait_until_done(job, phase, n_items)
