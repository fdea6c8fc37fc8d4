"""llmq beside llama.cpp on one GGUF file: prefill and decode, interleaved, medians and ratios.

    python bench/compare.py MODEL.gguf [--threads 1 2] [--rounds 5] [--prompt 512] [--tokens 32] [--depth 0]

Each engine runs in a process of its own that has loaded the model and warmed up; the parent lets them work in turn, so
that both meet the same noise. A plain streaming read of the file's pages runs between them. Needs llama-cpp-python,
built from its source package on this machine.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

SEED = 7


class LlmqWorker:
    def __init__(self, path: str, threads: int, n_ctx: int, window: int) -> None:
        import llmq

        self.model = llmq.load(path, n_ctx=n_ctx, threads=threads, window=window)
        self.n_vocab = self.model.config.vocab_size

    def clear(self) -> None:
        self.model._ids.clear()
        self.model._ring.length = 0

    def read(self, ids: list[int]) -> None:
        self.model.read(ids)


class LlamaWorker:
    def __init__(self, path: str, threads: int, n_ctx: int, window: int) -> None:  # noqa: ARG002
        import llama_cpp

        self.lib = llama_cpp
        llama_cpp.llama_backend_init()
        parameters = llama_cpp.llama_model_default_params()
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), parameters)
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch = n_ctx, 512, 512
        settings.n_threads = settings.n_threads_batch = threads
        settings.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        self.context = llama_cpp.llama_init_from_model(self.model, settings)
        self.n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model)) or 32000
        self.length = 0

    def clear(self) -> None:
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), False)

    def read(self, ids: list[int]) -> None:
        for first in range(0, len(ids), 512):
            part = ids[first : first + 512]
            tokens = (self.lib.llama_token * len(part))(*part)
            assert self.lib.llama_decode(self.context, self.lib.llama_batch_get_one(tokens, len(part))) == 0
        self.lib.llama_get_logits_ith(self.context, -1)


class ReadWorker:
    """Sums the file's bytes as 64-bit words, each thread its own part: what memory gives at best."""

    def __init__(self, path: str, threads: int, n_ctx: int, window: int) -> None:  # noqa: ARG002
        self.data = np.memmap(path, np.uint64, "r", shape=Path(path).stat().st_size // 8)
        self.threads = threads

    def sweep(self) -> float:
        import threading

        parts = np.array_split(self.data, self.threads)
        start = time.perf_counter()
        readers = [threading.Thread(target=np.add.reduce, args=(part,)) for part in parts]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
        return self.data.nbytes / (time.perf_counter() - start) / 1e9


WORKERS = {"llmq": LlmqWorker, "llama.cpp": LlamaWorker, "read": ReadWorker}


def work(kind: str, path: str, threads: int, n_ctx: int, window: int) -> None:
    """A worker process: reads `prefill N` or `decode DEPTH N` on stdin, answers tokens per second (or GB/s)."""
    worker = WORKERS[kind](path, threads, n_ctx, window)
    print("ready", flush=True)  # noqa: T201
    rng = np.random.default_rng(SEED)
    for line in sys.stdin:
        task, *numbers = line.split()
        if kind == "read":
            print(worker.sweep(), flush=True)  # noqa: T201
            continue
        depth, n = (int(numbers[0]), int(numbers[1])) if task == "decode" else (0, int(numbers[0]))
        ids = rng.integers(3, worker.n_vocab, depth + n + 1).tolist()
        worker.clear()
        if task == "decode":
            worker.read(ids[: depth + 1])
        start = time.perf_counter()
        if task == "prefill":
            worker.read(ids[:n])
        else:
            for token in ids[depth + 1 :]:
                worker.read([token])
        print(n / (time.perf_counter() - start), flush=True)  # noqa: T201


class Process:
    def __init__(self, kind: str, arguments: argparse.Namespace, threads: int) -> None:
        command = [sys.executable, __file__, arguments.model, "--worker", kind, "--threads", str(threads)]
        command += ["--context", str(arguments.context), "--window", str(arguments.window)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert self.answer() == "ready", f"the {kind} process did not start"

    def answer(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline().strip()

    def ask(self, task: str) -> float:
        assert self.process.stdin
        self.process.stdin.write(task + "\n")
        self.process.stdin.flush()
        return float(self.answer())

    def close(self) -> None:
        self.process.communicate()


def measure(arguments: argparse.Namespace, threads: int) -> dict[str, dict[str, list[float]]]:
    """figures[task][engine] over the rounds."""
    processes = {kind: Process(kind, arguments, threads) for kind in WORKERS}
    tasks = [f"prefill {arguments.prompt}", f"decode {arguments.depth} {arguments.tokens}"]
    figures: dict[str, dict[str, list[float]]] = {task: {kind: [] for kind in WORKERS} for task in tasks}
    for task in tasks:
        for kind in ("llmq", "llama.cpp"):
            processes[kind].ask(task)  # warm-up
        for _ in range(arguments.rounds):
            for kind, process in processes.items():
                figures[task][kind].append(process.ask(task))
    for process in processes.values():
        process.close()
    return figures


def report(arguments: argparse.Namespace) -> list[dict[str, object]]:
    size = Path(arguments.model).stat().st_size
    rows: list[dict[str, object]] = []
    for threads in arguments.threads:
        for task, found in measure(arguments, threads).items():
            ours, theirs, read = (statistics.median(found[kind]) for kind in ("llmq", "llama.cpp", "read"))
            ratio = statistics.median(a / b for a, b in zip(found["llmq"], found["llama.cpp"], strict=True))
            share = ours * size / 1e9 / read
            rows.append(
                {"threads": threads, "task": task, "llmq": ours, "llama.cpp": theirs, "ratio": ratio, "read": read}
            )
            tail = f", {share:4.0%} of a streaming read ({read:.1f} GB/s)" if task.startswith("decode") else ""
            speeds = f"llmq {ours:8.2f}  llama.cpp {theirs:8.2f} tokens/s  ratio {ratio:.2f}"
            print(f"{threads} threads  {task:16} {speeds}{tail}", flush=True)  # noqa: T201
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--depth", type=int, default=0)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--window", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", choices=WORKERS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.worker, arguments.model, arguments.threads[0], arguments.context, arguments.window)
        return
    rows = report(arguments)
    if arguments.json:
        machine = {"machine": platform.processor() or platform.machine(), "file": Path(arguments.model).name}
        arguments.json.write_text(json.dumps({**machine, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
