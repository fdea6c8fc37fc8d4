"""llmq pull --from-source: the official weights quantized as they arrive."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cli.fit import check_fit, judge_download
from cli.progress import show_bytes
from cli.published import config_at
from cli.quantize import follow
from cli.screen import note, one_line, show_compiling, size
from llmq.errors import BusyError, FileFormatError, UnsupportedError

if TYPE_CHECKING:
    from llmq.hub import Snapshot

WAIT_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Making:
    """What is made: a file of the store, of what a repository holds at a commit."""

    found: "Snapshot"
    path: Path
    kind: str
    fast: bool

    @property
    def origin(self) -> str:
        return f"{self.found.repo}@{self.found.commit}, quantized as {self.kind}{', --fast' if self.fast else ''}"


def is_made(making: Making) -> bool:
    """Whether the store has it: a record says so, or, of a file that no record tells of yet, its own receipt."""
    from llmq.gguf import open_gguf
    from llmq.records import read_record
    from quant.receipt import is_made_of, settings

    record = read_record(making.path)
    if record and record.origin == making.origin:
        return record.fits(making.path)
    if not making.path.is_file():
        return False
    try:
        with open_gguf(making.path) as gguf:
            made_as = making.kind, settings(making.fast, (), ())
            return is_made_of(gguf.metadata, making.found.repo, making.found.commit, *made_as)
    except (FileFormatError, UnsupportedError):
        return False


def quantize_published(making: Making, context: int | None, *, force: bool) -> None:
    """Makes it; where another process does so already, waits for that, and takes over if it dies."""
    from llmq.jit import compile_log
    from llmq.locks import is_held
    from llmq.part import part_paths
    from llmq.records import drop_record

    compile_log.listener = show_compiling
    judge(making, context, force=force)
    while not is_made(making):
        try:
            follow_stream(making)
            drop_record(making.path)  # of a file that was there before
            remember(making)
        except BusyError as error:
            note(f"{one_line(str(error).rpartition(';')[0], 160)}; waiting for it")
            while is_held(part_paths(making.path)[0]):
                time.sleep(WAIT_SECONDS)
    made = f"{size(making.path.stat().st_size)} made of {one_line(making.found.repo, 60)}"
    note(f"{made}; the sha256 of all its files was checked")


def follow_stream(making: Making) -> None:
    """Once more from where a file begins that arrived damaged."""
    from quant.quantize import quantize
    from quant.remote import open_remote
    from quant.source import DamagedStreamError

    title = f"{one_line(making.found.repo, 60)} to {making.kind}"
    for is_last in (False, True):
        try:
            follow(quantize(open_remote(making.found), making.path, making.kind, fast=making.fast), title)
            return
        except DamagedStreamError as error:
            if is_last:
                raise
            note(f"{one_line(str(error), 160)}: now")


def remember(making: Making) -> None:
    """Writes the record of what is made, unless there is one."""
    from llmq.files import sha256_of
    from llmq.records import current_record, write_record

    if current_record(making.path):
        return
    with show_bytes(f"reading {making.path.stem}", making.path.stat().st_size) as on_bytes:
        sha256 = sha256_of(making.path, on_bytes)
    write_record(making.path, sha256, making.origin)


def judge(making: Making, context: int | None, *, force: bool) -> None:
    """Refuses what would not run here, before its weights are asked for."""
    from llmq.files import allocated_bytes
    from llmq.part import part_paths
    from quant.size import planned

    size_then = planned(config_at(making.found), making.kind)
    already = allocated_bytes(part_paths(making.path)[0])
    check_fit(judge_download(size_then, context, making.path.parent, already), force)
    files = making.found.files.items()
    shards = sum(file.n_bytes for name, file in files if "/" not in name and name.startswith("model"))
    note(f"{size(shards)} will be read over the network, and lie nowhere on disk")
