"""llmq where, verify, import, rm and prune: the folder of models and what is in it. Headers only, no kernels."""

import os
import stat
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from cli import options
from cli.progress import show_bytes
from cli.screen import is_terminal, note, one_line, size, table
from llmq.errors import FileFormatError, LlmqError, UsageError
from llmq.files import explained, sha256_of
from llmq.records import Record, drop_record, lost_records, read_record, write_record
from llmq.store import (
    BUNDLED,
    BUNDLED_PATH,
    BUNDLED_SHA256,
    NAME,
    SUFFIX,
    installed,
    make_private,
    model_path,
    models_dir,
    new_model_path,
    remove,
    resolve,
    stored,
)

OLLAMA = "ollama:"

Names = Annotated[
    list[str],
    typer.Argument(
        metavar="NAME",
        help="Names of installed models, as in llmq list.",
        show_default=False,
        autocompletion=options.complete_model,
    ),
]
Models = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="MODEL",
        help="Names of installed models, or paths of .gguf files.",
        show_default=False,
        autocompletion=options.complete_model,
    ),
]
Model = Annotated[
    str,
    typer.Argument(
        metavar="NAME",
        help="Name of an installed model.  [default: the folder]",
        show_default=False,
        autocompletion=options.complete_model,
    ),
]
Every = Annotated[bool, typer.Option("--all", "-a", help="Every installed model.")]
Accept = Annotated[bool, typer.Option("--accept", help="Remember a file that has changed as it is now.")]
Source = Annotated[
    str,
    typer.Argument(metavar="FILE", help=f"A .gguf file, or {OLLAMA}NAME for a model of Ollama's.", show_default=False),
]
Called = Annotated[str | None, typer.Option("--name", metavar="NAME", help="Name in the store.  [default: the file's]")]
Copy = Annotated[bool, typer.Option("--copy", help="Copy, also where a hard link could be made.")]
Force = Annotated[bool, typer.Option("--force", help="Replace another model of that name.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Remove without asking.")]


def where(name: Model = "") -> None:
    """Print the folder of the installed models, or one model's file."""
    path = resolve(name) if name else models_dir()
    sys.stdout.write(f"{one_line(str(path), 4096)}\n")


def verify(models: Models = None, every: Every = False, accept: Accept = False) -> None:
    """Read model files again and compare them with what they were."""
    if every == bool(models):
        raise UsageError("give names of models to verify, or --all")
    chosen = [(entry.name, entry.path) for entry in installed()] if every else [(n, resolve(n)) for n in models or ()]
    failed: dict[str, LlmqError] = {}
    for name, path in chosen:
        try:
            verdict = verified(name, path, accept)
        except LlmqError as error:
            if len(chosen) == 1:
                raise
            failed[name] = error
            verdict = str(error)
        sys.stdout.write(f"{one_line(name, 240)}: {one_line(verdict, 240)}\n")
        sys.stdout.flush()
    if failed:
        names = ", ".join(one_line(name, 60) for name in failed)
        damaged = any(isinstance(error, FileFormatError) for error in failed.values())
        kind = FileFormatError if damaged else UsageError
        raise kind(f"{len(failed)} of {len(chosen)} models did not pass, as said above: {names}")


def verified(name: str, path: Path, accept: bool) -> str:
    """What there is to say of a file that is sound, with its sha256; FileFormatError for one that is not."""
    from llmq.gguf import open_gguf

    record = read_record(path)
    if accept or (record is None and path != BUNDLED_PATH):
        open_gguf(path).close()  # Nothing to compare with: then at least the header, and all tensors in the file.
    with explained(path, "read"):
        n_bytes = path.stat().st_size
    with show_bytes(f"reading {one_line(name, 40)}", n_bytes) as on_bytes:
        sha256 = sha256_of(path, on_bytes)
    if path == BUNDLED_PATH:
        if sha256 != BUNDLED_SHA256:
            raise FileFormatError(f"{BUNDLED} is not as it was packaged; install llmq again")
        return f"as it was packaged, sha256 {sha256}"
    if record is None:
        write_record(path, sha256, "")
        return f"nothing was known of it and its header is sound; from now on it is, sha256 {sha256}"
    if sha256 == record.sha256:
        if record.fits(path):
            return f"as it was, sha256 {sha256}"
        write_record(path, sha256, record.origin, record.added)
        return f"as it was but for its date, sha256 {sha256}"
    if accept:
        write_record(path, sha256, "")
        return f"remembered as it is now, sha256 {sha256}"
    raise FileFormatError(mismatch(name, path, record))


def mismatch(name: str, path: Path, record: Record) -> str:
    day = time.strftime("%Y-%m-%d", time.gmtime(record.added))
    again = "get it again"
    if path.parent == models_dir():
        again = f"get it again with `llmq pull --force`, or remove it with `llmq rm {path.stem}`"
    if record.fits(path):
        return f"{one_line(name, 40)} is damaged: its sha256 is not that of {day}; {again}"
    return f"{one_line(name, 40)} has changed since {day}: {again}, or --accept it if that was you"


def import_model(source: Source, name: Called = None, copy: Copy = False, force: Force = False) -> None:
    """Put a GGUF file into the store, as a hard link where that can be."""
    from llmq.elsewhere import link_or_copy

    found = find_source(source)
    target = new_model_path(default_name(found.label) if name is None else name)
    n_bytes = check_runs(found.path)
    with explained(models_dir()):
        make_private(models_dir())
    if is_same_file(found.path, target) and not (copy and force):
        tell_import(target, "in the store already" + (", as a link; --force makes a copy of it" if copy else ""))
        return
    with show_bytes(f"reading {one_line(found.label, 40)}", n_bytes) as on_bytes:
        sha256 = sha256_of(found.path, on_bytes, follow=False)
        if found.sha256 and sha256 != found.sha256:
            raise FileFormatError(f"{one_line(found.label, 60)} is damaged: its sha256 is another; get it again")
    if os.path.lexists(target) and not force:
        if not has_content(target, n_bytes, sha256):
            raise UsageError(f"there is another model named {target.stem}; give --name, or --force to replace it")
        tell_import(target, "in the store already")
        return
    # What is known of the old file must not be said of the new one, whatever happens in between.
    drop_record(target)
    with show_bytes(f"copying {one_line(found.label, 40)}", n_bytes) as on_bytes:
        done = link_or_copy(found.path, target, sha256, replace=force, copy=copy, on_bytes=on_bytes)
    write_record(target, sha256, found.origin)
    tell_import(target, f"{done}, {size(n_bytes)}")


@dataclass(frozen=True, slots=True)
class Found:
    """A file to import: no link, and its sha256 where that is known beforehand."""

    path: Path
    label: str
    origin: str
    sha256: str = ""


def find_source(text: str) -> Found:
    from llmq.elsewhere import find_ollama_model

    if text.startswith(OLLAMA):
        model = find_ollama_model(text.removeprefix(OLLAMA))
        return Found(model.path, model.name, OLLAMA + model.name, model.sha256)
    given = Path(text) if "\0" not in text and os.path.lexists(text) else resolve(text)
    path = Path(os.path.realpath(given))
    return Found(path, given.name.removesuffix(SUFFIX), str(path))


def default_name(label: str) -> str:
    name = label.replace(":", "-").replace("/", "-")
    if not NAME.fullmatch(name):
        raise UsageError(f"{one_line(label, 60)!a} is not a model name; give one with --name")
    return name


def check_runs(path: Path) -> int:
    """The size of a file that llmq can run; an error says why it cannot."""
    from llmq.gguf import open_gguf
    from llmq.supported import check_supported

    with open_gguf(path) as gguf:
        check_supported(gguf)
    return path.stat().st_size


def is_same_file(path: Path, target: Path) -> bool:
    return target.is_file() and os.path.samestat(path.stat(), target.stat())


def has_content(target: Path, n_bytes: int, sha256: str) -> bool:
    return target.is_file() and target.stat().st_size == n_bytes and sha256_of(target) == sha256


def tell_import(target: Path, done: str) -> None:
    note(f"{done}; talk to it: llmq chat {target.stem}")
    sys.stdout.write(f"{one_line(str(target), 4096)}\n")


def rm(names: Names) -> None:
    """Delete models from the store."""
    from llmq.locks import is_held
    from llmq.part import discard, part_paths

    left = {name: [path for path in part_paths(model_path(name)) if os.path.lexists(path)] for name in names}
    for name, parts in left.items():  # all of them, before any is gone
        if not parts or name == BUNDLED:
            stored(name)
        if is_held(part_paths(model_path(name))[0]):
            raise UsageError(f"a process is writing {name}; wait for it to end")
    for name, parts in left.items():
        path = model_path(name)
        n_bytes = sum(map(freed_by, [path, *parts]))
        is_model = path.is_file() or path.is_symlink()
        kept = "; its file is still elsewhere" if is_model and not freed_by(path) else ""
        if is_model:
            remove(name)
        if parts:
            discard(path)
        drop_record(path)
        note(f"removed {name}, {size(n_bytes)} freed{kept}")


def freed_by(path: Path) -> int:
    """Bytes of disk that go with this name: none with a link, or where the file has another name."""
    if not os.path.lexists(path):
        return 0
    status = path.lstat()
    return status.st_size if stat.S_ISREG(status.st_mode) and status.st_nlink == 1 else 0


def prune(yes: Yes = False) -> None:
    """Remove what interrupted commands left, and records of files that are gone."""
    from llmq.part import discard

    left, lost = leftovers(), lost_records()
    paths = [path for part in left.values() for path in part] + lost
    if not paths:
        note("nothing to remove")
        return
    sys.stdout.write(table([(one_line(str(path), 4096), size(freed_by(path))) for path in paths]) + "\n")
    sys.stdout.flush()
    n_bytes, n_files = sum(map(freed_by, paths)), f"{len(paths)} {'file' if len(paths) == 1 else 'files'}"
    if not yes and not confirmed(f"remove {n_files}, {size(n_bytes)}?"):
        note("nothing was removed")
        return
    for target in left:
        discard(target)
    for path in lost:
        with explained(path):
            path.unlink(missing_ok=True)
    note(f"removed {n_files}, {size(n_bytes)} freed")


def leftovers() -> dict[Path, list[Path]]:
    """What lies beside each target in the store, but where a process is writing it."""
    from llmq.locks import is_held
    from llmq.part import part_paths

    found: dict[Path, list[Path]] = {}
    for journal in sorted([*models_dir().glob("*.part"), *models_dir().glob("*.part.journal*")]):
        target = models_dir() / journal.name.rpartition(".part")[0]
        if target == models_dir():
            continue  # ".part" is of nothing
        paths = [path for path in part_paths(target) if os.path.lexists(path)]
        removable = all(path.is_symlink() or not path.is_dir() for path in paths)
        if journal in paths and removable and not is_held(part_paths(target)[0]):
            found[target] = paths
    return found


def confirmed(question: str) -> bool:
    if not (is_terminal(sys.stdin) and is_terminal(sys.stderr)):
        raise UsageError("nothing was removed, since there is nobody to ask; --yes removes what is listed")
    sys.stderr.write(f"{question} [y/N] ")
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")
