"""Where llmq quantize writes: a place by default, and a model of the store that is replaced only by its like."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from cli.progress import content_of
from llmq.errors import UsageError
from llmq.records import current_record, drop_record, write_record
from llmq.store import NAME, make_private, model_path, models_dir


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
    before = identity(making.path)
    sha256 = content_of(making.path)
    if identity(making.path) == before:  # else it is another process's, and so is its record
        write_record(making.path, sha256, making.origin)


def identity(path: Path) -> tuple[int, ...]:
    """Another one where the file is another one; () where there is none."""
    if not os.path.lexists(path):
        return ()
    status = path.lstat()
    return status.st_ino, status.st_size, status.st_mtime_ns
