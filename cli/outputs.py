"""Files that one command writes: none of them is read by it too, or is another one of them."""

from collections.abc import Sequence
from pathlib import Path

from llmq.errors import UsageError
from llmq.gguf import quoted
from llmq.part import explained, part_paths


def check_outputs(outputs: Sequence[Path], inputs: Sequence[Path]) -> None:
    """UsageError, before anything is written, for an output that cannot be: in no folder or a folder itself, one of
    `inputs` or another output, by whatever name. What lies beside an output while it is made counts as well.
    """
    earlier: list[Path] = []
    for out in outputs:
        with explained(out):
            if out.is_dir() or not out.parent.is_dir():
                what = "it is a folder" if out.is_dir() else "its folder is not there"
                raise UsageError(f"cannot write {quoted(str(out), 120)}: {what}; give the path of a file")
            written = [out, *part_paths(out)]
            if any(_same(path, other) for path in written for other in inputs):
                raise UsageError(f"{quoted(out.name)} is an input of this command; give another file to write")
            if any(_same(path, other) for path in written for other in earlier):
                raise UsageError(f"{quoted(out.name)} would be written twice; give another file for one of the outputs")
            earlier += written


def _same(a: Path, b: Path) -> bool:
    return a.resolve() == b.resolve() or (a.exists() and b.exists() and a.samefile(b))
