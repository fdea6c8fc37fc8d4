"""How long llmq takes to start: help, first token from a cold kernel cache, first token from a warm one.

    python bench/startup.py [--rounds 5] [--model storyteller] [--kernels]

Whole processes, medians over the rounds (the cold start is measured once, in an empty cache folder). With --kernels
also the seconds that each kernel takes to compile, in one process that compiles them all.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time


def seconds(arguments: list[str], cache: str) -> float:
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "cli.main", *arguments],
        check=True,
        capture_output=True,
        env={**os.environ, "LLMQ_CACHE_DIR": cache},
    )
    return time.perf_counter() - start


ALONE = """
import json, sys, time
from llmq import load
from llmq.engine import compilers
from llmq.jit import Kernel

compilers.MAX_HELPERS = 0
taken, compile_now = {}, Kernel._compile

def timed(kernel):
    start = time.perf_counter()
    address = compile_now(kernel)
    taken[kernel.name] = time.perf_counter() - start
    return address

Kernel._compile = timed
load(sys.argv[1], threads=1).close()
print(json.dumps(taken))
"""


def kernel_seconds(model: str) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "LLMQ_CACHE_DIR": cache}
        done = subprocess.run([sys.executable, "-c", ALONE, model], check=True, capture_output=True, env=environment)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", default="storyteller")
    parser.add_argument("--kernels", action="store_true")
    arguments = parser.parse_args()
    one_token = ["run", "-m", arguments.model, "-n", "1", "Hello"]
    with tempfile.TemporaryDirectory() as cache:
        helped = statistics.median(seconds(["--help"], cache) for _ in range(arguments.rounds))
        cold = seconds(one_token, cache)
        warm = statistics.median(seconds(one_token, cache) for _ in range(arguments.rounds))
    print(f"--help {helped:.2f} s, first token: cold cache {cold:.1f} s, warm {warm:.2f} s")  # noqa: T201
    if arguments.kernels:
        found = kernel_seconds(arguments.model)
        for name, taken in sorted(found.items(), key=lambda item: -item[1]):
            print(f"{taken:6.2f} s  {name}")  # noqa: T201
        print(f"{sum(found.values()):6.2f} s  all of them, one after the other")  # noqa: T201


if __name__ == "__main__":
    main()
