"""Obviously right twins of the kernels: loops and float64, nothing shared with the code under test but the layouts."""

import math
from collections.abc import Callable, Sequence

import numpy as np

from llmq.config import ModelConfig

Weights = dict[str, np.ndarray]


def quantize(x: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Scales [n / size] and integers [n] of one activation row: the largest of each `size` becomes +-127."""
    scales, q = [], []
    for start in range(0, len(x), size):
        part = x[start : start + size].astype(np.float64)
        top = max(abs(part))
        scales.append(top / 127)
        q += [value * 127 / top if top else 0.0 for value in part]
    return np.array(scales), np.rint(np.array(q))


def dot(rows: np.ndarray, x: np.ndarray) -> np.ndarray:
    """[n_rows] of float weights [n_rows, n] times one activation [n]."""
    return np.array([math.fsum(float(w) * float(a) for w, a in zip(row, x, strict=True)) for row in rows])


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    x = x.astype(np.float64)
    return x / math.sqrt(np.mean(x * x) + eps) * weight


def rope(head: np.ndarray, position: int, base: float, interleaved: bool) -> np.ndarray:
    """One head turned: pair i of head_dim / 2 by position * base ** (-2 i / head_dim)."""
    n = len(head) // 2
    out = np.zeros(2 * n)
    for i in range(n):
        angle = position * base ** (-i / n)
        first, second = (2 * i, 2 * i + 1) if interleaved else (i, n + i)
        turned = complex(head[first], head[second]) * complex(math.cos(angle), math.sin(angle))
        out[first], out[second] = turned.real, turned.imag
    return out


def silu_mul(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    gate, up = gate.astype(np.float64), up.astype(np.float64)
    with np.errstate(over="ignore"):  # 1 / (1 + inf) = 0 is right
        return gate / (1 + np.exp(-gate)) * up


def softmax(scores: np.ndarray) -> np.ndarray:
    powers = np.exp(scores - scores.max())
    return powers / powers.sum()


def seen(position: int, window: int) -> range:
    """Positions that a query sees: itself and those before it, `window` in all (0: no limit)."""
    return range(max(0, position - window + 1) if window else 0, position + 1)


def attend(query: np.ndarray, position: int, keys: np.ndarray, values: np.ndarray, window: int) -> np.ndarray:
    """One query [head_dim] over keys and values [n_positions, head_dim], which are indexed by position."""
    where = list(seen(position, window))
    scores = keys[where] @ query / math.sqrt(len(query))
    return softmax(scores) @ values[where]


def route(x: np.ndarray, gate: np.ndarray, n_used: int) -> list[tuple[int, float]]:
    """The best experts, first the best, ties to the lower id, with the softmax over their scores alone."""
    scores = gate.astype(np.float64) @ x
    best = sorted(range(len(scores)), key=lambda e: (-scores[e], e))[:n_used]
    return list(zip(best, softmax(scores[best]).tolist(), strict=True))


def group(choices: Sequence[Sequence[tuple[int, float]]], n_experts: int) -> list[list[tuple[int, float]]]:
    """For each expert its (row, weight), rows ascending, of what each row chose."""
    experts: list[list[tuple[int, float]]] = [[] for _ in range(n_experts)]
    for row, choice in enumerate(choices):
        for expert, weight in choice:
            experts[expert].append((row, weight))
    return experts


def feed_forward(x: np.ndarray, config: ModelConfig, w: Callable[[str], np.ndarray]) -> np.ndarray:
    """What the dense or mixture feed-forward adds to one normed row [dim]."""
    if not config.n_experts:
        return w("ffn_down") @ silu_mul(w("ffn_gate") @ x, w("ffn_up") @ x)
    out = np.zeros(config.dim)
    for e, weight in route(x, w("ffn_gate_inp"), config.n_experts_used):
        hidden = silu_mul(w("ffn_gate_exps")[e] @ x, w("ffn_up_exps")[e] @ x)
        out += weight * (w("ffn_down_exps")[e] @ hidden)
    return out


def forward(config: ModelConfig, weights: Weights, ids: Sequence[int]) -> np.ndarray:
    """Logits float64 [n, vocab] of a whole sequence; keys and values are rounded to half floats, as in the cache."""
    weights = {name: value.astype(np.float64) for name, value in weights.items()}
    n_rep, hd = config.n_heads // config.n_kv_heads, config.head_dim
    x = weights["token_embd.weight"][list(ids)]

    def turned(rows: np.ndarray) -> np.ndarray:
        """Every head of [n, n_heads, head_dim] turned by its row's position."""
        return np.array(
            [[rope(h, p, config.rope_base, config.rope_interleaved) for h in row] for p, row in enumerate(rows)]
        )

    for n in range(config.n_layers):
        w = lambda name, n=n: weights[f"blk.{n}.{name}.weight"]  # noqa: E731
        normed = np.array([rms_norm(row, w("attn_norm"), config.rms_eps) for row in x])
        q = turned((normed @ w("attn_q").T).reshape(len(ids), config.n_heads, hd))
        k = turned((normed @ w("attn_k").T).reshape(len(ids), config.n_kv_heads, hd))
        v = (normed @ w("attn_v").T).reshape(len(ids), config.n_kv_heads, hd)
        k, v = k.astype(np.float16).astype(np.float64), v.astype(np.float16).astype(np.float64)
        attended = np.array(
            [
                np.concatenate(
                    [
                        attend(q[p, h], p, k[:, h // n_rep], v[:, h // n_rep], config.window)
                        for h in range(config.n_heads)
                    ]
                )
                for p in range(len(ids))
            ]
        )
        x = x + attended @ w("attn_output").T
        normed = np.array([rms_norm(row, w("ffn_norm"), config.rms_eps) for row in x])
        x = x + np.array([feed_forward(row, config, w) for row in normed])
    out = weights["token_embd.weight" if config.tied_embeddings else "output.weight"]
    return np.array([rms_norm(row, weights["output_norm.weight"], config.rms_eps) for row in x]) @ out.T
