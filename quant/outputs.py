"""Files that one command writes: none of them is read by it too, or is another one of them."""

import os
from collections.abc import Sequence
from pathlib import Path

from llmq.errors import UsageError
from llmq.files import check_target, explained
from llmq.gguf import quoted
from llmq.part import part_paths


def check_outputs(outputs: Sequence[Path], inputs: Sequence[Path]) -> None:
    """UsageError for an output that cannot be written, or would destroy one of `inputs` or another output, by whatever
    name. What lies beside an output while it is made counts as well.
    """
    earlier: list[Path] = []
    for out in outputs:
        check_target(out)
        with explained(out):
            real = Path(os.path.realpath(out))
            written = [real, *part_paths(real)]
            for path in written:
                if any(_same(path, other) for other in inputs):
                    raise UsageError(f"{quoted(path.name)} is an input, which would be destroyed; give another output")
                if any(_same(path, other) for other in earlier):
                    raise UsageError(f"{quoted(path.name)} would be written twice; give each output a name of its own")
            earlier += written


def _same(a: Path, b: Path) -> bool:
    # Not resolve(), which raises for a link that leads to itself.
    return os.path.realpath(a) == os.path.realpath(b) or (a.exists() and b.exists() and a.samefile(b))
