"""Mixture of experts: which experts a token takes, and the tokens of each expert put together.

Mixtral: softmax over the scores of the chosen experts only, which is the softmax over all of them, renormalised.
"""

import math

import numpy as np

from llmq.jit import jit
from llmq.simd import add_lanes_f32x16, fma, load_f32, load_f32x16, load_i32, splat_f32x16, store_f32, store_i32


@jit
def choose_experts(chosen, weights, x, gate, dim, n_experts, n_used, scores):
    """The `n_used` best of gate [n_experts][dim] . x [dim]: i32 ids, f32 weights with sum 1; ties to the lower id.

    `scores` is scratch of n_experts floats.
    """
    for e in range(n_experts):
        acc, row = splat_f32x16(np.float32(0)), gate + 4 * e * dim
        for i in range(0, dim, 16):
            acc = fma(load_f32x16(row + 4 * i), load_f32x16(x + 4 * i), acc)
        store_f32(scores + 4 * e, add_lanes_f32x16(acc))
    top, total = np.float32(0), np.float32(0)
    for k in range(n_used):
        best = 0
        for e in range(1, n_experts):
            if load_f32(scores + 4 * e) > load_f32(scores + 4 * best):
                best = e
        score = load_f32(scores + 4 * best)
        if k == 0:
            top = score
        weight = np.float32(math.exp(score - top))
        total += weight
        store_i32(chosen + 4 * k, np.int32(best))
        store_f32(weights + 4 * k, weight)
        store_f32(scores + 4 * best, np.float32(-np.inf))
    for k in range(n_used):
        store_f32(weights + 4 * k, load_f32(weights + 4 * k) / total)


@jit
def group_by_expert(entries, entry_weights, starts, active, chosen, weights, n_rows, n_experts, n_used):
    """A counting sort: expert e takes entries starts[e] .. starts[e + 1], rows (i32) with their weights (f32).

    `active` gets the number of experts that have any entry, then their ids.
    """
    at = n_active = 0
    for e in range(n_experts):
        store_i32(starts + 4 * e, np.int32(at))
        before = at
        for i in range(n_rows * n_used):
            if load_i32(chosen + 4 * i) == e:
                store_i32(entries + 4 * at, np.int32(i // n_used))
                store_f32(entry_weights + 4 * at, load_f32(weights + 4 * i))
                at += 1
        if at > before:
            n_active += 1
            store_i32(active + 4 * n_active, np.int32(e))
    store_i32(starts + 4 * n_experts, np.int32(at))
    store_i32(active, np.int32(n_active))
