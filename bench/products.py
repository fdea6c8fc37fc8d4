"""Matrix products alone: decode rows and prefill panels of each format, one and two threads.

    python bench/products.py [--formats Q4_K Q6_K Q8_0] [--tokens 512] [--rounds 7]

Prefill in 10^9 multiply-adds a second on a 1024 x 4096 matrix; decode in GB of weights a second on rows that no cache
holds, beside a plain streaming read of the same bytes. Rounds of all formats are interleaved; medians are printed.
"""

import argparse
import statistics
import threading
import time
from collections.abc import Callable

import numpy as np

from llmq.engine.cpu import SPARE
from llmq.engine.plan import kernels
from llmq.formats import FORMATS, Format
from llmq.kernels.activation import prepare
from llmq.kernels.panel import PANEL_BYTES
from llmq.kernels.probe import CHUNK
from llmq.layout import GROUP_BYTES, activation_kind
from llmq.machine import measure_read
from llmq.memory import tile_bytes
from llmq.simd import ROWS
from llmq.team import aligned
from quant.encode import encode

N_ROWS, COLS = 1024, 4096
STREAM_BYTES = 600_000_000


def seconds(work: Callable[[int, int], None], n_threads: int) -> float:
    threads = [threading.Thread(target=work, args=(i, n_threads)) for i in range(n_threads)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - start


class Product:
    """One format's matrix, and the activations of a batch."""

    def __init__(self, fmt: Format, n_tokens: int) -> None:
        rng = np.random.default_rng(0)
        self.fmt, self.n_tokens, self.kernels = fmt, n_tokens, kernels(fmt)
        self.size = GROUP_BYTES[activation_kind(fmt)]
        self.weights = encode(fmt, (rng.standard_normal((N_ROWS, COLS)) * 0.02).astype(np.float32))
        self.row_bytes = self.weights.shape[1]
        self.stream = np.tile(self.weights, (STREAM_BYTES // self.weights.nbytes, 1))
        x = rng.standard_normal((n_tokens, COLS)).astype(np.float32)
        kind = activation_kind(fmt)
        self.batch, self.single = (aligned((COLS // 256 * n + SPARE) * self.size) for n in (n_tokens, 1))
        prepare(self.batch.ctypes.data, kind, x.ctypes.data, COLS, n_tokens)
        prepare(self.single.ctypes.data, kind, x.ctypes.data, COLS, 1)

    def prefill(self, thread: int, n_threads: int) -> None:
        out, panel = aligned(tile_bytes(self.n_tokens, ROWS, SPARE)), aligned(PANEL_BYTES)
        for row in range(thread * ROWS, N_ROWS, ROWS * n_threads):
            at = self.weights.ctypes.data + row * self.row_bytes
            step = self.size
            self.kernels.panel(
                out.ctypes.data, at, self.row_bytes, ROWS, self.batch.ctypes.data, step * self.n_tokens,
                self.n_tokens, COLS // 256, 0, panel.ctypes.data,
            )  # fmt: skip

    def decode(self, thread: int, n_threads: int) -> None:
        n = len(self.stream) // n_threads
        out = np.empty(n, np.float32)
        at = self.stream.ctypes.data + thread * n * self.row_bytes
        x = self.single.ctypes.data
        self.kernels.dot(out.ctypes.data, at, self.row_bytes, n, x, self.size, 1, COLS // 256, 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", default=["Q4_K", "Q5_K", "Q6_K", "Q8_0", "Q4_0"])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    by_name = {fmt.name: fmt for fmt in FORMATS.values()}
    products = [Product(by_name[name], arguments.tokens) for name in arguments.formats]
    found: dict[tuple[str, str, int], list[float]] = {}
    for round_ in range(arguments.rounds + 1):
        for product in products:
            macs, streamed = N_ROWS * COLS * arguments.tokens / 1e9, product.stream.nbytes / 1e9
            chunks = product.stream.reshape(-1)[: product.stream.nbytes // CHUNK * CHUNK]
            for n in (1, 2):
                rates = {
                    "prefill": macs / seconds(product.prefill, n),
                    "decode": streamed / seconds(product.decode, n),
                    "read": measure_read(chunks, n),
                }
                for what, rate in rates.items():
                    if round_:  # the first is a warm-up
                        found.setdefault((product.fmt.name, what, n), []).append(rate)
    for product in products:
        name = product.fmt.name
        figures = [f"{what} {' '.join(f'{statistics.median(found[name, what, n]):6.1f}' for n in (1, 2))}"
                   for what in ("prefill", "decode", "read")]  # fmt: skip
        print(f"{name:5} {'   '.join(figures)}   (1 and 2 threads; GMAC/s, GB/s, GB/s)")  # noqa: T201


if __name__ == "__main__":
    main()
