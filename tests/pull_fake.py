"""A machine that is known, with memory and disk to spare, where nothing is compiled: for tests of llmq pull.

`python tests/pull_fake.py pull ...` is the llmq program there.
"""

import importlib
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from llmq.figures import Machine

ROOT = Path(__file__).parents[1]
GB = 10**9
# What stands for a process that compiles in the background: it waits for the end of the one that started it.
IDLE = "import os; os.read(0, 1)"
INSTEAD: dict[str, Any] = {
    "llmq.figures.remembered": lambda _folder, _n: Machine(2, {1: 20.0, 2: 40.0}, 400.0, 1.7e9),
    "llmq.warm.PROGRAM": IDLE,
    "quant.fit.memory_free": lambda: 8 * GB,
    "quant.fit.disk_free": lambda _folder: 50 * GB,
}

if __name__ == "__main__":
    for name, value in INSTEAD.items():
        module, _, attribute = name.rpartition(".")
        setattr(importlib.import_module(module), attribute, value)
    from cli.main import main

    main()
