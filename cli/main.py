"""The llmq program: its commands, and the one place where errors become a line on stderr and an exit code."""

import errno
import os
import signal
import sys
import traceback
from types import FrameType
from typing import Annotated, TextIO

import typer
from typer.exceptions import TyperException
from typer.main import get_command

from cli.bench import bench
from cli.chat import chat
from cli.eval import evaluate
from cli.fit import fit
from cli.models import list_models, show
from cli.pull import pull
from cli.quantize import quantize
from cli.run import run
from cli.screen import one_line, status
from cli.store import import_model, prune, rm, verify, where
from llmq import __version__
from llmq.errors import LlmqError, ResourceError

LINE_LIMIT = 240
# Set by the scripts of --install-completion when a shell asks what could follow.
COMPLETION = "_LLMQ_COMPLETE"

app = typer.Typer(
    name="llmq",
    help="Local, quantized language models: chat with one, or make one from a checkpoint.",
    no_args_is_help=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(chat)
app.command()(run)
app.command()(pull)
app.command()(quantize)
app.command("eval")(evaluate)
app.command("list")(list_models)
app.command()(show)
app.command()(where)
app.command()(verify)
app.command("import")(import_model)
app.command()(rm)
app.command()(prune)
app.command()(fit)
app.command()(bench)


def print_version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"llmq {__version__}\n")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=print_version, help="Show the version.")
    ] = False,
) -> None:
    del version


def main() -> None:
    """Runs the command line and exits with its code."""
    prepare_streams()
    signal.signal(signal.SIGTERM, leave)
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, leave)
    try:
        code = execute(sys.argv[1:])
    except BrokenPipeError:
        code = 141  # Not even the line about an error found a reader,
    except OSError:
        code = 1  # or room.
    sys.exit(finish(code))


def execute(arguments: list[str]) -> int:
    """Runs one command and returns its exit code; whatever goes wrong is one line on stderr."""
    try:
        command = get_command(app)
        if COMPLETION in os.environ:
            command.main([], prog_name="llmq", complete_var=COMPLETION)
        with command.make_context("llmq", arguments or ["--help"]) as context:
            command.invoke(context)
        sys.stdout.flush()
        return 0
    except typer.Exit as wanted:
        sys.stdout.flush()
        return wanted.exit_code
    except LlmqError as error:
        return fail(str(error), error.exit_code)
    except TyperException as error:
        wrong = getattr(error, "ctx", None)  # the command whose words are wrong
        page = wrong.command_path if wrong else "llmq"
        return fail(f"{error.format_message().rstrip('.')}; try `{page} --help`", error.exit_code)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 141
    except OSError as error:
        return fail(os_error_line(error), ResourceError.exit_code if error.errno == errno.ENOMEM else 1)
    except MemoryError:
        return fail("out of memory; try a smaller --ctx or a smaller model", ResourceError.exit_code)
    except Exception as error:  # noqa: BLE001 - the boundary: a bug is reported, not shown as a traceback
        what = f"{type(error).__name__}: {error}"
        return fail(f"a bug in llmq: {one_line(what, 140)}; LLMQ_DEBUG=1 shows where", 1)


def fail(line: str, code: int) -> int:
    if os.environ.get("LLMQ_DEBUG") == "1":
        traceback.print_exc()
    status.clear()
    sys.stderr.write(f"{one_line('llmq: ' + line, LINE_LIMIT)}\n")
    return code


def os_error_line(error: OSError) -> str:
    reason = error.strerror or str(error)
    where = f"{str(error.filename)!a}: " if error.filename is not None else ""
    hints = {
        errno.ENOSPC: "; free some disk space",
        errno.EACCES: "; check who may read or write there",
        errno.EROFS: "; choose a place that can be written to",
        errno.ENOTDIR: "; it lies below something that is not a folder",
    }
    return f"{where}{reason}{hints.get(error.errno or 0, '')}"


def prepare_streams() -> None:
    """Text that a stream cannot encode becomes '?', and a stream that was closed swallows what it is given."""
    if sys.stdin is None:
        sys.stdin = open_null("r")
    if sys.stdout is None:
        sys.stdout = open_null("w")
    if sys.stderr is None:
        sys.stderr = open_null("w")
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]


def open_null(mode: str) -> TextIO:
    return open(os.devnull, mode)  # type: ignore[return-value]  # noqa: PTH123


def finish(code: int) -> int:
    """Flushes both streams; one whose reader is gone or whose disk is full is turned into /dev/null, so that the
    interpreter has nothing to complain about on its way out.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            status.clear()
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return code


def leave(number: int, frame: FrameType | None) -> None:
    """A polite kill unwinds, so that the terminal gets its settings back."""
    del frame
    raise SystemExit(128 + number)


if __name__ == "__main__":
    main()
