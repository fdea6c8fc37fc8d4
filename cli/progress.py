"""How far a long command is: a progress bar on a terminal; elsewhere, of llmq quantize one line per tensor."""

import contextlib
import sys
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from cli.screen import is_terminal, note, one_line, size, status

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

    from llmq.transfer import Progress
    from quant.quantize import TensorReport

# Where there is no terminal, a line no more often than this.
SECONDS_A_LINE = 10.0


def show_reports(reports: "Iterator[TensorReport]", title: str) -> "list[TensorReport]":
    """All of them, each shown as it comes."""
    done = []
    if not is_terminal(sys.stderr):
        for report in reports:
            note(describe(report))
            done.append(report)
        return done
    with tensor_bar() as progress:
        task = progress.add_task("", total=None, title=title, count="")
        status.bar = lambda line: progress.update(task, description=line)
        try:
            for report in reports:
                n_done = report.index + 1
                count = f"{n_done}/{report.total}"
                progress.update(task, completed=n_done, total=report.total, count=count, description=shortly(report))
                done.append(report)
        finally:
            status.bar = None
    return done


def tensor_bar() -> "Bar":
    """Tensors and times; what is said of one has the room that is left in the line, and is cut first."""
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar
    from rich.table import Column

    # Names come from files: markup stays off for them.
    return Bar(
        TextColumn("{task.fields[title]}", markup=False, table_column=Column(max_width=22, no_wrap=True)),
        BarColumn(8),
        TextColumn("{task.fields[count]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}", markup=False, table_column=Column(ratio=1, no_wrap=True)),
        console=Console(stderr=True),
        transient=True,
        expand=True,
    )


@contextlib.contextmanager
def show_bytes(title: str, n_bytes: int) -> Iterator[Callable[[int], None]]:
    """Gives what is to be told of bytes as they are read; away from a terminal nothing is shown of them."""
    if not is_terminal(sys.stderr):
        yield lambda _: None
        return
    with _byte_bar() as bar:
        task = bar.add_task("", total=n_bytes, title=one_line(title, 60))
        yield lambda n_read: bar.advance(task, n_read)


def content_of(path: Path) -> str:
    """The sha256 of a file of the store, which takes a while."""
    from llmq.files import sha256_of

    with show_bytes(f"reading {path.stem}", path.stat().st_size) as on_bytes:
        return sha256_of(path, on_bytes)


def _byte_bar() -> "Bar":
    """Bytes, their rate and the time left, between the field `title` and a description."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    return Bar(
        TextColumn("{task.fields[title]}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}", markup=False),
        console=Console(stderr=True),
        transient=True,
    )


def shortly(report: "TensorReport") -> str:
    """blk.1.ffn_up_exps Q4_K"""
    return f"{one_line(report.name.removesuffix('.weight'), 64)} {report.format.name}"


def describe(report: "TensorReport") -> str:
    return (
        f"{one_line(report.name, 64)} {'x'.join(map(str, report.shape))} {one_line(report.source, 10)} -> "
        f"{report.format.name}, {size(report.n_bytes)}, error {report.rms_error:.2%}"
        f"{', done before' if report.resumed else ''}"
    )


def show_transfer(transfer: "Generator[Progress]", title: str) -> "Progress":
    """The last of them. On a terminal a bar with rate and time left; elsewhere a line now and then.

    Stopped before, it leaves what has come for another run.
    """
    try:
        with contextlib.closing(transfer) as events:
            return _show_bar(events, title) if is_terminal(sys.stderr) else _show_lines(events, title)
    except (KeyboardInterrupt, SystemExit):
        note("stopped; the same command goes on from here")
        raise


def _show_lines(events: "Iterator[Progress]", title: str) -> "Progress":
    start, told = time.monotonic(), 0.0
    last = None
    for last in events:
        now = time.monotonic()
        if last.sha256 or now - told < SECONDS_A_LINE:
            continue
        told = now
        rate = (last.n_bytes - last.resumed) / max(now - start, 1e-3)
        resumed = f", {size(last.resumed)} of it from before" if last.resumed else ""
        trouble = f"; {one_line(last.trouble, 80)}" if last.trouble else ""
        done = f"{size(last.n_bytes)} of {size(last.total)}{resumed}, {size(int(rate))}/s{trouble}"
        note(f"{one_line(title, 60)}: {waiting(last) if last.holder is not None else done}")
    assert last is not None
    return last


def _show_bar(events: "Iterator[Progress]", title: str) -> "Progress":
    last = None
    with _byte_bar() as bar:
        task = bar.add_task("", total=None, title=one_line(title, 40))
        for last in events:
            said = waiting(last) if last.holder is not None else one_line(last.trouble, 80)
            bar.update(task, completed=last.n_bytes, total=last.total, description=said)
    assert last is not None
    return last


def waiting(event: "Progress") -> str:
    who = f"process {event.holder}" if event.holder else "another process"
    return f"{who} fetches this already; waiting for it"
