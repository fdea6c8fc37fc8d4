"""Where llmq quantize writes: a place by default, and a model of the store that is replaced only by its like."""

import math
import os
import re
import shlex
import shutil
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cli.progress import content_of
from cli.screen import one_line, size
from llmq.errors import BusyError, FileFormatError, ResourceError, UnsupportedError, UsageError, quoted
from llmq.files import allocated_bytes, explained
from llmq.locks import is_held
from llmq.part import part_paths
from llmq.records import current_record, drop_record, write_record
from llmq.store import BUNDLED, NAME, SUFFIX, make_private, model_path, models_dir

if TYPE_CHECKING:
    from quant.source import Source


@dataclass(frozen=True, slots=True)
class Making:
    """What is made: `path` of `source`, with settings in the receipt's words and what guides it, by sha256. `label` is
    the type or the budget."""

    path: Path
    source: Path
    label: str
    settings: str
    guided_by: str

    @property
    def origin(self) -> str:
        """For the record: a receipt has no path, and two sources may have one name."""
        return f"{os.path.realpath(self.source)}, quantized as {self.label}"


def default_out(source: Path, label: str) -> Path:
    """<source>-<label> in the store; a GGUF's name loses the type at its end, so that none is piled on another."""
    stem = source.absolute().name if source.is_dir() else source.stem
    stem = re.sub(r"[-.](f16|bf16|f32|fp16|fp32)$", "", stem, flags=re.IGNORECASE)
    if not NAME.fullmatch(f"{stem}-{label}"):
        raise UsageError(f"{f'{stem}-{label}'[:70]!a} is not a model name; give the file to write with -o")
    path = model_path(f"{stem}-{label}")
    make_private(path.parent)
    return path


def in_store(path: Path) -> bool:
    return os.path.realpath(path.parent) == os.path.realpath(models_dir())


def check_folders(outputs: Sequence[Path]) -> None:
    """UsageError where no file can be made in the folder of one of them: only making one tells."""
    for path in outputs:
        with explained(path):
            tempfile.TemporaryFile(dir=written(path).parent).close()


def check_room(out: Path, n_bytes: int) -> None:
    """ResourceError where the disk has no room for `n_bytes` of `out`."""
    parts = part_paths(written(out))
    with explained(out):
        free = shutil.disk_usage(parts[0].parent).free
    there = sum(map(allocated_bytes, parts))
    if free + there < n_bytes:
        raise ResourceError(
            f"{quoted(out.name)} takes {size(n_bytes - there)} more of disk and {size(free)} is free; make room or "
            "give another folder with -o"
        )


def check_idle(out: Path) -> None:
    """BusyError where a process is writing `out`, which writing it would say only when much has been run."""
    if is_held(part_paths(written(out))[0]):
        raise BusyError(f"cannot write {quoted(str(out), 120)}", 0)


def written(path: Path) -> Path:
    """The file that is replaced: of a link in the store itself, elsewhere what it leads to."""
    return path if in_store(path) else Path(os.path.realpath(path))


def check_replaced(making: Making, *, force: bool) -> None:
    """A model of the store gives way to one made of the same source with the same settings, and to nothing else unless
    `force` is given."""
    path = making.path
    if force or not in_store(path) or not os.path.lexists(path) or is_made(making):
        return
    raise UsageError(
        f"there is another model named {path.stem}; give this one another name (-o of `llmq quantize`, --name of "
        "`llmq pull`), or --force to replace it"
    )


def is_made(making: Making) -> bool:
    """Whether record and receipt of the file that is there say that it was made so."""
    from llmq.gguf import open_gguf
    from quant.receipt import CALIBRATION, SETTINGS

    record = current_record(making.path)
    if not record or record.origin != making.origin:
        return False
    with open_gguf(making.path) as gguf:
        said = gguf.metadata.get(SETTINGS), gguf.metadata.get(CALIBRATION, "")
    return said == (making.settings, making.guided_by)


def remember(making: Making) -> None:
    """Writes the record of a model of the store that was just made; what was known of a file in its place is gone."""
    drop_record(making.path)
    if not in_store(making.path):
        return
    write_origin(making.path, making.origin)


def write_origin(path: Path, origin: str) -> None:
    """Writes the record of a file of the store that was just made."""
    before = identity(path)
    sha256 = content_of(path)
    if identity(path) == before:  # else it is another process's, and so is its record
        write_record(path, sha256, origin)


def identity(path: Path) -> tuple[int, ...]:
    """Another one where the file is another one; () where there is none."""
    if not os.path.lexists(path):
        return ()
    status = path.lstat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def why_not_run(source: "Source") -> str:
    """Why llmq cannot run what is made of it, though others may; "" where it can."""
    from llmq.formats import F32
    from llmq.gguf import GGUF, TensorInfo
    from llmq.supported import check_supported

    tensors = {weights.name: TensorInfo(weights.name, weights.shape, F32, 0, 0) for weights in source.weights}
    try:
        check_supported(GGUF(Path(source.name), source.metadata, tensors, None))
    except (FileFormatError, UnsupportedError) as error:
        return str(error)
    return ""


def quantized_type(source: "Source") -> str:
    """The type that most weights of a source are quantized to; "" where they are what the model was published with."""
    from llmq.formats import FORMATS
    from quant.recipe import takes_type

    matrices = [weights for weights in source.weights if takes_type(weights.name, weights.shape)]
    quantized = {fmt.name for fmt in FORMATS.values() if fmt.block_size > 1}
    counts: Counter[str] = Counter()
    for weights in matrices:
        counts[weights.source] += math.prod(weights.shape) if weights.source in quantized else 0
    kind, count = counts.most_common(1)[0]
    return kind if count else ""


def chat_command(path: Path) -> str:
    """What to type to talk to a model that lies there."""
    named = path.parent == models_dir() and path.suffix == SUFFIX and NAME.fullmatch(path.stem)
    if named and path.stem != BUNDLED:
        return f"llmq chat {path.stem}"
    text = str(path)
    # Without a separator it would be a name, and with a dash in front an option.
    if text.startswith("-") or (path.name == text and path.suffix != SUFFIX):
        text = os.path.join(os.curdir, text)  # noqa: PTH118 - a Path drops the dot
    return f"llmq chat {shlex.quote(one_line(text, 4096))}"
