"""One engine in a process of its own, started and asked by compare.py: a line of JSON is a task, or its figures.

The rival's worker needs nothing but NumPy and llama-cpp-python, so that it can run in another environment. An engine
reads ids after those it holds, and can go back to a shorter length; `save` and `restore` keep a long context in a file.
"""

import ctypes
import hashlib
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

SEED, BATCH = 7, 512
WARM_UP_TOKENS = 64
FILL_WORTH_KEEPING = 1024


class Llmq:
    def __init__(self, path: str, n_threads: int, n_ctx: int, window: int, settings: set[str]) -> None:  # noqa: ARG002
        import llvmlite
        import numba

        import llmq
        from llmq import cache, simd
        from llmq.kernels import attention

        self.model = llmq.load(path, n_ctx=n_ctx, threads=n_threads, window=window)
        self.n_vocab = self.model.config.vocab_size
        self.ring = self.model._ring
        self.about = {
            "llmq": llmq.__version__,
            "isa": simd.ISA,
            "numba": numba.__version__,
            "llvmlite": llvmlite.__version__,
            "numpy": np.__version__,
        }
        sources = [Path(module.__file__).read_bytes() for module in (cache, attention)]
        self.layout = hashlib.sha256(b"".join(sources)).hexdigest() + str(self.ring.memory.size)

    @property
    def length(self) -> int:
        return self.model.n_ctx - self.model.room

    def truncate(self, length: int) -> None:
        self.model.take_back(self.length - length)

    def read(self, ids: list[int]) -> None:
        self.model.read(ids)

    def read_rows(self, ids: list[int]) -> None:
        """The same with logits after every id."""
        self.model.read(ids, len(ids))

    def save(self, path: Path) -> None:
        self.ring.memory.tofile(path)

    def restore(self, path: Path, ids: list[int]) -> None:
        self.truncate(0)
        self.ring.memory[:] = np.fromfile(path, self.ring.memory.dtype)
        self.ring.advance(len(ids))
        self.model._ids += ids


class LlamaCpp:
    def __init__(self, path: str, n_threads: int, n_ctx: int, window: int, settings: set[str]) -> None:  # noqa: ARG002
        import llama_cpp

        self.lib = llama_cpp
        llama_cpp.llama_backend_init()
        loading = llama_cpp.llama_model_default_params()
        loading.use_extra_bufts = "plain" not in settings
        model = llama_cpp.llama_model_load_from_file(path.encode(), loading)
        running = llama_cpp.llama_context_default_params()
        running.n_ctx, running.n_batch, running.n_ubatch = n_ctx, BATCH, BATCH
        running.n_threads = running.n_threads_batch = n_threads
        flash = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        running.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED if "no-flash" in settings else flash
        running.no_perf = True
        self.context = llama_cpp.llama_init_from_model(model, running)
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        self.length = 0
        self.batch = llama_cpp.llama_batch_init(BATCH, 0, 1)
        fields = ("token", "pos", "logits", "n_seq_id")
        self.token, self.pos, self.logits, n_seq_id = (
            np.ctypeslib.as_array(getattr(self.batch, name), (BATCH,)) for name in fields
        )
        n_seq_id[:] = 1
        for i in range(BATCH):
            self.batch.seq_id[i][0] = 0
        self.about = {"llama-cpp-python": llama_cpp.__version__, **self._versions()}
        self.layout = json.dumps([self.about, "no-flash" in settings])
        self.about["settings"] = sorted(settings)

    def _versions(self) -> dict[str, Any]:
        shared = self.lib.llama_cpp._lib
        found = {"features": self.lib.llama_print_system_info().decode()}
        for name, symbol in (("llama.cpp", "llama_version"), ("ggml", "ggml_version"), ("commit", "ggml_commit")):
            function = getattr(shared, symbol)
            function.restype = ctypes.c_char_p
            found[name] = function().decode()
        return found

    def truncate(self, length: int) -> None:
        assert self.lib.llama_memory_seq_rm(self.memory, 0, length, -1)
        self.length = length

    def read(self, ids: list[int]) -> None:
        for first in range(0, len(ids), BATCH):
            part = ids[first : first + BATCH]
            self.logits[: len(part)] = 0
            self.logits[len(part) - 1] = first + len(part) == len(ids)
            self._decode(part)

    def read_rows(self, ids: list[int]) -> None:
        self.logits[: len(ids)] = 1
        self._decode(ids)

    def _decode(self, ids: list[int]) -> None:
        n = self.batch.n_tokens = len(ids)
        self.token[:n] = ids
        self.pos[:n] = range(self.length, self.length + n)
        assert self.lib.llama_decode(self.context, self.batch) == 0
        self.length += n
        self.lib.llama_synchronize(self.context)

    def save(self, path: Path) -> None:
        none = (self.lib.llama_token * 1)()
        assert self.lib.llama_state_seq_save_file(self.context, bytes(path), 0, none, 0)

    def restore(self, path: Path, ids: list[int]) -> None:
        self.truncate(0)
        none, count = (self.lib.llama_token * 1)(), ctypes.c_size_t()
        assert self.lib.llama_state_seq_load_file(self.context, bytes(path), 0, none, 1, ctypes.byref(count))
        self.length = len(ids)


ENGINES: dict[str, Callable[..., Any]] = {"llmq": Llmq, "llama.cpp": LlamaCpp}


def fill(engine: Any, ids: list[int], kept: Path | None) -> None:
    """Bring the engine to hold exactly `ids`, of which what it holds already is a beginning or a continuation."""
    if engine.length > len(ids):
        engine.truncate(len(ids))
    if engine.length == len(ids):
        return
    if kept and kept.exists():
        engine.restore(kept, ids)
        return
    engine.read(ids[engine.length :])
    if kept:
        partial = kept.with_suffix(".tmp")
        engine.save(partial)
        partial.replace(kept)


def kept_at(engine: Any, model: Path, folder: str, depth: int) -> Path | None:
    """Where a context of this depth is kept; the name changes with the file and with how the engine lays it out."""
    if not folder or depth < FILL_WORTH_KEEPING:
        return None
    status = model.stat()
    key = f"{model.name} {status.st_size} {status.st_mtime_ns} {engine.layout}"
    kind = type(engine).__name__.lower()
    return Path(folder) / f"{kind}-{depth}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.kv"


def seconds_of(engine: Any, read: Callable[[list[int]], None], ids: list[int], step: int) -> float:
    """How long it takes to read `ids`, `step` at a time; the engine is then as it was."""
    length = engine.length
    parts = [ids[i : i + step] for i in range(0, len(ids), step)]
    start = time.perf_counter()
    for part in parts:
        read(part)
    took = time.perf_counter() - start
    engine.truncate(length)
    return took


def measure(engine: Any, task: dict[str, Any], ids: list[int]) -> dict[str, float]:
    """Passes of the task until `seconds` have gone by (one at least); figures from their medians."""
    n, at, passes, alone = task["n"], task["depth"], [], []
    while not passes or sum(passes) < task["seconds"]:
        part = [ids[(at + i) % len(ids)] for i in range(n)]  # other ids each time: other experts
        at += n
        if task["kind"] == "batch":
            alone.append(seconds_of(engine, engine.read_rows, part[:1], 1))
            passes.append(seconds_of(engine, engine.read_rows, part, n))
        else:
            passes.append(seconds_of(engine, engine.read, part, 1 if task["kind"] == "decode" else n))
    took = statistics.median(passes)
    found = {"speed": n / took, "passes": len(passes)}
    return found | {"of_one": took / statistics.median(alone)} if alone else found


def main() -> None:
    kind, path, n_threads, n_ctx, window, folder, *settings = sys.argv[1:]
    engine = ENGINES[kind](path, int(n_threads), int(n_ctx), int(window), set(settings))
    ids = np.random.default_rng(SEED).integers(3, engine.n_vocab, int(n_ctx)).tolist()
    answer = engine.about
    while True:
        print(json.dumps(answer), flush=True)  # noqa: T201
        line = sys.stdin.readline()
        if not line:
            return
        task = json.loads(line)
        fill(engine, ids[: task["depth"]], kept_at(engine, Path(path), folder, task["depth"]))
        answer = measure(engine, task, ids)


if __name__ == "__main__":
    main()
