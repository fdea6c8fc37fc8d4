"""How long llmq takes to start: help, first token from a cold kernel cache, first token from a warm one.

    python bench/startup.py [--rounds 5] [--model storyteller]

Whole processes, medians over the rounds (the cold start is measured once, in an empty cache folder).
"""

import argparse
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", default="storyteller")
    arguments = parser.parse_args()
    one_token = ["run", "-m", arguments.model, "-n", "1", "Hello"]
    with tempfile.TemporaryDirectory() as cache:
        helped = statistics.median(seconds(["--help"], cache) for _ in range(arguments.rounds))
        cold = seconds(one_token, cache)
        warm = statistics.median(seconds(one_token, cache) for _ in range(arguments.rounds))
    print(f"--help {helped:.2f} s, first token: cold cache {cold:.1f} s, warm {warm:.2f} s")  # noqa: T201


if __name__ == "__main__":
    main()
