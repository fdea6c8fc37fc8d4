"""llmq beside llama.cpp on one GGUF file: the same work with the same threads, in turn, medians and ratios.

    python bench/compare.py MODEL.gguf --threads 2 --rounds 5 --tasks prefill:512 decode:32 decode:16@4096 batch:4

A task is KIND:N or KIND:N@DEPTH. prefill reads N tokens at once, decode N tokens one after the other, batch N tokens at
once with logits after each (its time is compared with that of one token in the same engine); all start from a context
of DEPTH tokens and go back to it. Short tasks are repeated for `--seconds` and give the median.

Each engine runs in a process of its own (worker.py) that has loaded the model and warmed up. One works while the other
is stopped, so that threads which wait by spinning take nothing from it. A plain streaming read of the file runs between
them: what decode reads for a token, as a share of what memory gives, stands beside its speed.

llama.cpp copies the weights of some formats into another order when it loads them, which is its default and helps
decoding; --rival-settings plain leaves them as they are, which helps some of its prefills. no-flash turns off its flash
attention, which does not always help on processors. Work of other processes on the same processors is measured too, and
shown where it is more than a little.

--fills FOLDER keeps deep contexts in files for the next run; --rounds 0 only makes them. --isa compiles llmq for a
narrower instruction set, and --rival-python runs llama.cpp from another environment, built for the same. --json OUT
writes all raw figures; table.py makes a table of such files. Needs llama-cpp-python, built from its source package.
"""

import argparse
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from table import line
from worker import WARM_UP_TOKENS

from llmq.config import read_config
from llmq.cores import cpu_name
from llmq.formats import F16
from llmq.gguf import open_gguf
from llmq.kernels.probe import CHUNK
from llmq.machine import measure_read
from llmq.memory import ring_bytes
from llmq.work import work_per_token

ROOT = Path(__file__).parents[1]
DEPTHS = {"prefill": 0, "decode": 1, "batch": 64}
# What Numba is told to compile for.
TARGETS = {
    "avx2": ("haswell", "+avx2,+fma,+f16c"),
    "avxvnni": ("alderlake", "+avx2,+fma,+f16c,+avxvnni"),
    "generic": ("x86-64", ""),
}


@dataclass(frozen=True, slots=True)
class Task:
    """`n` tokens from a context of `depth`; passes go on for `seconds`."""

    kind: str
    n: int
    depth: int
    seconds: float


def task(text: str, seconds: float = 0.0) -> Task:
    match = re.fullmatch(r"(prefill|decode|batch):(\d+)(?:@(\d+))?", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text} is not KIND:N or KIND:N@DEPTH")
    return Task(match[1], int(match[2]), int(match[3] or DEPTHS[match[1]]), seconds)


class Worker:
    """One engine's process, stopped whenever it has nothing to do."""

    def __init__(self, kind: str, python: str, options: argparse.Namespace, threads: int, n_ctx: int) -> None:
        command = [python, str(ROOT / "bench" / "worker.py"), kind, str(options.model), str(threads), str(n_ctx)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        if kind == "llmq" and options.isa:
            environment["NUMBA_CPU_NAME"], environment["NUMBA_CPU_FEATURES"] = TARGETS[options.isa]
        self.kind = kind
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            [*command, str(options.window), options.fills, *options.rival_settings],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True, env=environment,
        )  # fmt: skip
        self.about = self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout
        answer = self.process.stdout.readline()
        if not answer:
            self.log.seek(0)
            raise SystemExit(f"the {self.kind} process ended:\n{self.log.read()[-2000:]}")
        self.process.send_signal(signal.SIGSTOP)
        found: dict[str, Any] = json.loads(answer)
        return found

    def ask(self, wanted: Task) -> dict[str, float]:
        assert self.process.stdin
        self.process.send_signal(signal.SIGCONT)
        self.process.stdin.write(json.dumps(asdict(wanted)) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def processor_seconds(self) -> float:
        return sum(psutil.Process(self.process.pid).cpu_times()[:2])

    def close(self) -> None:
        self.process.send_signal(signal.SIGCONT)
        self.process.communicate()


def seconds_elsewhere(workers: list[Worker]) -> float:
    """Processor time that went to other processes, or was taken from this machine, since it started."""
    times = psutil.cpu_times()
    everyone = sum(getattr(times, name, 0.0) for name in ("user", "nice", "system", "irq", "softirq", "steal"))
    return everyone - sum(psutil.Process().cpu_times()[:2]) - sum(worker.processor_seconds() for worker in workers)


def measure(options: argparse.Namespace, threads: int, workers: list[Worker]) -> Iterator[dict[str, Any]]:
    """For each task the answers of all engines, round by round; the order turns round from one to the next."""
    data = np.memmap(options.model, np.uint8, "r")
    chunks = data[: len(data) // CHUNK * CHUNK]
    for wanted in options.tasks:
        rounds: dict[str, list[Any]] = {worker.kind: [] for worker in workers} | {"read": [], "elsewhere": []}
        for worker in workers:
            worker.ask(Task(wanted.kind, min(wanted.n, WARM_UP_TOKENS), wanted.depth, 0.0))
        for i in range(options.rounds):
            before, start = seconds_elsewhere(workers), time.perf_counter()
            for worker in workers if i % 2 else workers[::-1]:
                rounds[worker.kind].append(worker.ask(wanted))
            rounds["read"].append(measure_read(chunks, threads) * 1e9)
            took = (time.perf_counter() - start) * (os.cpu_count() or 1)
            rounds["elsewhere"].append((seconds_elsewhere(workers) - before) / took)
        yield {"threads": threads, **asdict(wanted), "rounds": rounds}


def model_facts(path: Path) -> dict[str, Any]:
    with open_gguf(path) as gguf:
        config = read_config(gguf)
        tensors = {name: (info.shape, info.format) for name, info in gguf.tensors.items()}
        return {
            "file": path.name,
            "name": config.name,
            "bytes": path.stat().st_size,
            "token_bytes": work_per_token(config, tensors).n_bytes,
            "kv_bytes_per_position": ring_bytes(config, 1, F16),
        }


def source_commit() -> str:
    """The commit of this source tree, with a + where files differ from it."""
    head, changed = (
        subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()
        for words in (("rev-parse", "--short", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
    )
    return head + "+" * bool(changed)


def machine_facts() -> dict[str, Any]:
    return {
        "machine": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "system": platform.system(),
        "commit": source_commit(),
        "date": date.today().isoformat(),
    }


def run(options: argparse.Namespace) -> dict[str, Any]:
    deepest = max(wanted.depth + wanted.n for wanted in options.tasks)
    n_ctx = -(-deepest // 256) * 256
    pythons = {"llmq": sys.executable, "llama.cpp": options.rival_python}
    report: dict[str, Any] = {
        **machine_facts(),
        **model_facts(options.model),
        "isa": options.isa,
        "engines": {},
        "tasks": [],
    }
    for threads in options.threads:
        workers = [Worker(kind, pythons[kind], options, threads, n_ctx) for kind in options.engines]
        report["engines"] = {worker.kind: worker.about for worker in workers}
        for found in measure(options, threads, workers):
            report["tasks"].append(found)
            if options.rounds:
                print(line(report, found), flush=True)  # noqa: T201
        for worker in workers:
            worker.close()
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--tasks", type=task, nargs="+", default=[task("prefill:512"), task("decode:32")])
    parser.add_argument("--threads", type=int, nargs="+", default=[len(os.sched_getaffinity(0))])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--engines", nargs="+", choices=("llmq", "llama.cpp"), default=["llmq", "llama.cpp"])
    parser.add_argument("--isa", choices=TARGETS)
    parser.add_argument("--rival-python", default=sys.executable)
    parser.add_argument("--rival-settings", nargs="+", choices=("plain", "no-flash"), default=[])
    parser.add_argument("--window", type=int, default=0)
    parser.add_argument("--fills", default="")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.tasks = [Task(t.kind, t.n, t.depth, options.seconds) for t in options.tasks]
    report = run(options)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
