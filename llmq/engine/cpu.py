"""The CPU engine: buffers, threads, and batches in; logits out."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llmq.cache import KVRing
from llmq.config import ModelConfig
from llmq.engine.compilers import compile_together
from llmq.engine.forward import forward
from llmq.engine.job import JOB, PHASE_BYTES, PHASES_BESIDES, PHASES_PER_LAYER
from llmq.engine.plan import Plan, make_plan, matrix_formats
from llmq.gguf import GGUF
from llmq.kernels.activation import prepare
from llmq.kernels.attention import HEAD_DIM_LIMIT, QUERIES, SCRATCH_BYTES, attend_kernel
from llmq.kernels.kv import F16_KV, KVFormat
from llmq.kernels.panel import PANEL_BYTES
from llmq.kernels.rows import SHARED
from llmq.layout import BATCH, FEW, PART
from llmq.memory import batch_room, buffer_bytes, parts_bytes, tile_bytes
from llmq.simd import ROWS, TOKENS
from llmq.team import Team, aligned

# Weight bytes times rows between two looks at the keyboard: about a third of a second of work on two cores.
WORK_PER_CALL = 5e10
# Tokens past the last that a product may read and write: it computes whole tiles.
SPARE = max(TOKENS, SHARED[0]) - 1


@dataclass(frozen=True, slots=True)
class LayerInputs:
    """What a layer's matrices have read for a batch of n rows: views, good until the engine runs again.

    `attended` f32 [n, n_heads * head_dim] went into attn_output, `normed` f32 [n, dim] into ffn_gate and ffn_up,
    `hidden` f32 [n * n_used, ffn_dim] into ffn_down. Row i of `hidden` comes from row entries[i] of the batch, and
    expert e took the rows starts[e] .. starts[e + 1] of it; a dense layer is one expert. Both are int32.
    """

    attended: np.ndarray
    normed: np.ndarray
    hidden: np.ndarray
    entries: np.ndarray
    starts: np.ndarray


class Engine:
    """One model ready to run; one batch at a time."""

    def __init__(
        self, gguf: GGUF, config: ModelConfig, n_threads: int, batch: int = BATCH, kv: KVFormat = F16_KV
    ) -> None:
        assert config.head_dim <= HEAD_DIM_LIMIT, config.head_dim
        self.config, self.batch, self.n_threads, self.kv = config, batch, n_threads, kv
        compile_together(matrix_formats(gguf), gguf.tensors["token_embd.weight"].format, kv)
        self.plan: Plan = make_plan(gguf, config)
        self._layer_bytes = self.plan.layer_bytes
        self._rows = 0
        self._memory: dict[str, np.ndarray] = {}
        self._given: dict[str, np.ndarray] = {}
        self._job = np.zeros(1, JOB)
        self._phases = aligned(PHASE_BYTES * (PHASES_PER_LAYER * config.n_layers + PHASES_BESIDES))
        self._team = Team(n_threads, forward.address, self._job)
        for name, value in (
            ("model", self.plan.model.ctypes.data),
            ("phases", self._phases.ctypes.data), ("n_threads", n_threads),
            ("attend_most", attend_kernel(QUERIES, kv).address), ("attend4", attend_kernel(4, kv).address),
            ("attend1", attend_kernel(1, kv).address), ("store_kv", kv.store.address), ("prepare", prepare.address),
            ("kv_row_bytes", kv.row_bytes(config.head_dim)),
        ):  # fmt: skip
            self._job[name] = value
        self._make_room(1)

    def ring(self, n_ctx: int) -> KVRing:
        """Room for one conversation of up to `n_ctx` positions."""
        return KVRing(self.config, n_ctx, self.config.window, self.batch, self.kv)

    def forward(
        self,
        tokens: Sequence[int],
        positions: Sequence[int],
        rings: Sequence[KVRing],
        outputs: Sequence[int] = (),
    ) -> np.ndarray:
        """Run rows of (token, position, ring); logits f32 [len(outputs), vocab_size] of the rows listed.

        Rows of one ring stand together, positions ascending. Keys and values are written to the rings; to advance them
        is the caller's. May be interrupted (KeyboardInterrupt) between layers: then no ring has changed its length.
        """
        self._begin(tokens, positions, rings, outputs)
        n_layers = self.config.n_layers
        step = max(1, int(WORK_PER_CALL / (self._layer_bytes * len(tokens))))
        for first in range(0, n_layers, step):
            self._run(first, min(first + step, n_layers))
        return self._given["logits"]

    def embed(self, tokens: Sequence[int], positions: Sequence[int], rings: Sequence[KVRing]) -> np.ndarray:
        """Begin a batch whose layers are run one by one: its hidden states, f32 [len(tokens), dim].

        They are a view that run_layer reads and writes, so that another batch's can be put there in between.
        """
        self._begin(tokens, positions, rings, ())
        self._run(0, 0)
        return self._rows_of("x", len(tokens), self.config.dim)

    def run_layer(self, i: int) -> LayerInputs:
        """Layer `i` for the batch that embed began; layer 0 always begins with the embedding."""
        c, n = self.config, int(self._job["n_rows"][0])
        self._run(i, i + 1)
        n_entries, n_experts = n * max(1, c.n_experts_used), max(1, c.n_experts)
        return LayerInputs(
            attended=self._rows_of("attended", n, c.n_heads * c.head_dim),
            normed=self._rows_of("normed", n, c.dim),
            hidden=self._rows_of("hidden", n_entries, c.ffn_dim),
            entries=self._memory["entries"].view(np.int32)[:n_entries],
            starts=self._memory["starts"].view(np.int32)[: n_experts + 1],
        )

    def close(self) -> None:
        self._team.close()

    def _begin(
        self, tokens: Sequence[int], positions: Sequence[int], rings: Sequence[KVRing], outputs: Sequence[int]
    ) -> None:
        """Put a batch into the job."""
        n_rows = len(tokens)
        assert 0 < n_rows <= self.batch, n_rows
        self._make_room(n_rows)
        self._given = {
            "tokens": np.asarray(tokens, np.int32),
            "positions": np.asarray(positions, np.int64),
            "rings": np.asarray([ring.address for ring in rings], np.int64),
            "capacities": np.asarray([ring.capacity for ring in rings], np.int64),
            "output_rows": np.asarray(outputs, np.int64),
            "logits": np.empty((len(outputs), self.config.vocab_size), np.float32),
        }
        assert self._given["tokens"].min() >= 0, tokens
        assert self._given["tokens"].max() < self.config.vocab_size, tokens
        for name, array in self._given.items():
            self._job[name] = array.ctypes.data
        self._job["n_rows"], self._job["n_outputs"] = n_rows, len(outputs)
        self._cut_context(self._given["positions"])
        if not self.config.n_experts:
            self._one_expert(n_rows)

    def _run(self, first_layer: int, end_layer: int) -> None:
        self._phases[:] = 0
        self._job["first_layer"], self._job["end_layer"] = first_layer, end_layer
        self._team.run()

    def _rows_of(self, name: str, n_rows: int, n_cols: int) -> np.ndarray:
        return self._memory[name].view(np.float32)[: n_rows * n_cols].reshape(n_rows, n_cols)

    def _cut_context(self, positions: np.ndarray) -> None:
        """A few rows attend by parts of their context, which threads share out; many rows have enough to share."""
        window = int(self.plan.model["window"][0])
        first = int(max(0, positions.min() - window + 1)) // PART
        n_parts = int(positions.max()) // PART - first + 1 if len(positions) <= FEW else 1
        n_bytes = parts_bytes(self.config, len(positions), n_parts)
        if n_parts > 1 and n_bytes > self._memory["parts"].nbytes:
            self._memory["parts"] = aligned(2 * n_bytes)
        self._job["first_part"], self._job["n_parts"] = first, n_parts
        self._job["parts"] = self._memory["parts"].ctypes.data

    def _one_expert(self, n_rows: int) -> None:
        """A dense feed-forward is one expert that takes every row with weight 1."""
        self._memory["starts"].view(np.int32)[:2] = 0, n_rows
        self._memory["active"].view(np.int32)[:2] = 1, 0

    def _make_room(self, n_rows: int) -> None:
        """Buffers for batches of up to `n_rows`: they grow when a longer one comes."""
        if n_rows <= self._rows:
            return
        self._rows = n_rows = batch_room(n_rows, self.batch)
        for name, n_bytes in self._sizes(n_rows).items():
            self._memory[name] = aligned(n_bytes)
            self._job[name] = self._memory[name].ctypes.data
        tile = tile_bytes(n_rows, ROWS, SPARE)
        self._job["tile_bytes"], self._job["panel_at"] = tile, 2 * tile
        self._job["attention_at"] = 2 * tile + PANEL_BYTES
        self._job["scratch_bytes"] = self._scratch_bytes(n_rows)
        if not self.config.n_experts:
            self._memory["entries"].view(np.int32)[:n_rows] = np.arange(n_rows)
            self._memory["entry_weights"].view(np.float32)[:n_rows] = 1

    def _scratch_bytes(self, n_rows: int) -> int:
        return 2 * tile_bytes(n_rows, ROWS, SPARE) + PANEL_BYTES + -(-SCRATCH_BYTES // 64) * 64

    def _sizes(self, n_rows: int) -> dict[str, int]:
        scratch = self.n_threads * self._scratch_bytes(n_rows)
        return buffer_bytes(self.config, self._kinds(), n_rows, SPARE) | {"parts": 0, "scratch": scratch}

    def _kinds(self) -> set[int]:
        """The kinds of activation that any matrix of this model reads."""
        layers, model = self.plan.layers, self.plan.model
        names = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
        return {int(kind) for name in names for kind in layers[name]["kind"]} | {int(model["output"]["kind"][0])}
