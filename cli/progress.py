"""How far a long command is: a progress bar on a terminal; elsewhere, of llmq quantize one line per tensor."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from cli.screen import is_terminal, note, one_line, size, status

if TYPE_CHECKING:
    from quant.quantize import TensorReport


def show_reports(reports: "Iterator[TensorReport]", title: str) -> "list[TensorReport]":
    """All of them, each shown as it comes."""
    done = []
    if not is_terminal(sys.stderr):
        for report in reports:
            note(describe(report))
            done.append(report)
        return done
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    # The tensor's name comes from a file: markup stays off for it.
    columns = (
        TextColumn("{task.fields[title]}", markup=False),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}", markup=False),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=None, title=title)
        status.bar = lambda line: progress.update(task, description=line)
        try:
            for report in reports:
                progress.update(task, completed=report.index + 1, total=report.total, description=describe(report))
                done.append(report)
        finally:
            status.bar = None
    return done


@contextlib.contextmanager
def show_bytes(title: str, n_bytes: int) -> Iterator[Callable[[int], None]]:
    """Gives what is to be told of bytes as they are read; away from a terminal nothing is shown of them."""
    if not is_terminal(sys.stderr):
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(one_line(title, 60), total=n_bytes)
        yield lambda n_read: progress.advance(task, n_read)


def describe(report: "TensorReport") -> str:
    return (
        f"{one_line(report.name, 64)} {'x'.join(map(str, report.shape))} {one_line(report.source, 10)} -> "
        f"{report.format.name}, {size(report.n_bytes)}, error {report.rms_error:.2%}"
        f"{', done before' if report.resumed else ''}"
    )
