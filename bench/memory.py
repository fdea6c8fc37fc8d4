"""How much memory a model takes beyond its mapped file and its keys and values: loading, a prompt, and some tokens.

    python bench/memory.py MODEL.gguf [--prompt 512] [--tokens 16] [--threads 2]

Anonymous memory is sampled all the while, and its peak counts. Pages of libraries are listed beside it: the system can
drop them, and other processes share them. The first run on a cold kernel cache also holds what compiling took. Linux.
"""

import argparse
import os
import re
import threading
import time
from pathlib import Path

import numpy as np

SEED, PERIOD = 7, 0.002
STATUS = Path("/proc/self/status")


def anonymous() -> int:
    """Bytes of this process that no file stands behind."""
    text = STATUS.read_text()
    return 1024 * sum(int(n) for n in re.findall(r"Rss(?:Anon|Shmem):\s+(\d+) kB", text))


def file_pages(model: Path) -> tuple[int, int]:
    """Resident bytes of the model's file, and of all other files."""
    of_model = of_others = 0
    name = ""
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            parts = line.split(maxsplit=5)
            name = parts[5] if len(parts) == 6 and parts[5].startswith("/") else ""
        elif line.startswith(("Rss:", "Anonymous:")) and name:
            amount = int(line.split()[1]) * 1024 * (1 if line.startswith("Rss:") else -1)
            if name == str(model):
                of_model += amount
            else:
                of_others += amount
    return of_model, of_others


class Peak:
    """Samples anonymous memory in a thread; `most` is the largest seen."""

    def __init__(self) -> None:
        self.most = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def _watch(self) -> None:
        while not self._over.is_set():
            self.most = max(self.most, anonymous())
            time.sleep(PERIOD)

    def stop(self) -> None:
        self._over.set()
        self._thread.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    path = arguments.model.resolve()
    peak = Peak()
    import llmq
    from llmq.jit import compile_log

    steps = {"imported": anonymous()}
    # Exactly as many positions as are used, so that all of the ring is touched.
    model = llmq.load(path, n_ctx=arguments.prompt + arguments.tokens, threads=arguments.threads, window=0)
    steps["loaded"] = anonymous()
    ids = np.random.default_rng(SEED).integers(3, model.config.vocab_size, arguments.prompt + arguments.tokens).tolist()
    model.read(ids[: arguments.prompt])
    steps["prompt read"] = anonymous()
    for token in ids[arguments.prompt :]:
        model.read([token])
    steps["decoded"] = anonymous()
    peak.stop()
    ring = model._ring.memory.nbytes
    of_model, of_others = file_pages(path)
    compiled = compile_log.seconds
    for step, amount in steps.items():
        print(f"{step:12} {amount / 1e6:7.1f} MB anonymous")  # noqa: T201
    print(  # noqa: T201
        f"peak {peak.most / 1e6:.1f} MB anonymous, of which keys and values {ring / 1e6:.1f}: "
        f"{(peak.most - ring) / 1e6:.1f} MB beyond the file ({of_model / 1e6:.0f} MB resident) and the ring, "
        f"{(peak.most - ring + of_others) / 1e6:.1f} MB with pages of libraries; compiled for {compiled:.0f} s"
    )


if __name__ == "__main__":
    main()
