"""llmq pull --from-source: the official weights quantized as they arrive."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cli.fit import check_fit, judge_download
from cli.output import identity, write_origin
from cli.progress import content_of
from cli.published import config_at
from cli.quantize import follow
from cli.screen import note, one_line, show_compiling, size
from llmq.errors import BusyError, FileFormatError, UnsupportedError

if TYPE_CHECKING:
    from llmq.hub import Snapshot

WAIT_SECONDS = 0.5


class _MadeMeanwhileError(Exception):
    """Another process made what was about to be made."""


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


def is_made(making: Making, *, reread: bool = False) -> bool:
    """Whether the store has it: a record says so, or, of a file that no record tells of yet, its own receipt. One that
    has another date than its record is read again, and any with `reread`."""
    from llmq.gguf import open_gguf
    from llmq.records import read_record, write_record
    from quant.receipt import is_made_of, settings

    path, record = making.path, read_record(making.path)
    if not path.is_file():
        return False
    if record and record.origin == making.origin:
        if reread or not record.fits(path):
            if path.stat().st_size != record.n_bytes or content_of(path) != record.sha256:
                return False
            write_record(path, record.sha256, record.origin, record.added)
        return True
    if reread:
        return False
    try:
        with open_gguf(path) as gguf:
            made_as = making.kind, settings(making.fast, (), ())
            return is_made_of(gguf.metadata, making.found.repo, making.found.commit, *made_as)
    except (FileFormatError, UnsupportedError):
        return False


def quantize_published(making: Making, context: int | None, check_replaced: Callable[[], None], *, force: bool) -> None:
    """Makes it; where another process does so already, waits for that, and takes over if it dies. `check_replaced` is
    called whenever a file of the name is about to be replaced."""
    from llmq.jit import compile_log
    from llmq.locks import is_held
    from llmq.part import part_paths
    from llmq.records import drop_record

    before = identity(making.path)

    def check_held() -> None:
        if identity(making.path) != before and is_made(making):
            raise _MadeMeanwhileError
        check_replaced()

    def wait() -> None:
        time.sleep(WAIT_SECONDS)
        while is_held(part_paths(making.path)[0]):
            time.sleep(WAIT_SECONDS)
        check_held()

    check_replaced()
    compile_log.listener = show_compiling
    judge(making, context, force=force)
    if before:
        note(f"{making.path.stem} is replaced when the new one is there")
    try:
        while not follow_stream(making, check_held):
            wait()
        drop_record(making.path)  # of a file that was there before
    except _MadeMeanwhileError:
        pass
    made = f"{size(making.path.stat().st_size)} made of {one_line(making.found.repo, 60)}"
    note(f"{made}; the sha256 of all its files was checked")


def follow_stream(making: Making, check_held: Callable[[], None]) -> bool:
    """False where another process is at it; once more from where a file begins that arrived damaged."""
    from quant.quantize import quantize
    from quant.remote import open_remote
    from quant.source import DamagedStreamError

    title = f"{one_line(making.found.repo, 60)} to {making.kind}"
    is_again = False
    while True:
        source = open_remote(making.found)
        reports = quantize(source, making.path, making.kind, fast=making.fast, follow=False, held=check_held)
        try:
            follow(reports, title, making.path)
            return True
        except BusyError as error:
            who = f"process {error.holder}" if error.holder else "another process"
            note(f"{who} is writing a model of this name; waiting for it")
            return False
        except DamagedStreamError as error:
            if is_again:
                raise
            note(f"{error.file} arrived damaged, and is read once more")
            is_again = True


def remember(making: Making) -> None:
    """Writes the record of what is made, unless there is one that says where the file came from."""
    from llmq.records import current_record

    record = current_record(making.path)
    if not (record and record.origin):
        write_origin(making.path, making.origin)


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
