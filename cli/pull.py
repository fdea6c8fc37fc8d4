"""llmq pull: a published model into the store, verified, or one line that says why not."""

import contextlib
import functools
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli import options
from cli.progress import content_of, show_transfer
from cli.published import DEFAULT_TYPE, find_offer
from cli.screen import note, one_line, size
from llmq.errors import BusyError, UnsupportedError, UsageError
from llmq.store import make_private, new_model_path

if TYPE_CHECKING:
    from llmq.config import ModelConfig
    from llmq.gguf_header import TensorInfo
    from llmq.offer import Offer
    from llmq.reference import Published, Repo, Url
    from quant.size import Size


def complete_published(incomplete: str) -> list[str]:
    from llmq.catalog import catalog

    return [entry.name for entry in catalog() if entry.name.startswith(incomplete) and not entry.unsupported]


Wanted = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A name that `llmq list --available` shows, org/repo, either with :TYPE, an address, or a path.",
        show_default=False,
        autocompletion=complete_published,
    ),
]
Type = Annotated[
    str | None, typer.Option("--type", "-q", metavar="TYPE", help=f"Type of the file.  [default: {DEFAULT_TYPE}]")
]
Name = Annotated[
    str | None, typer.Option("--name", metavar="NAME", help="Name in the store.  [default: the model's and its type]")
]
FromSource = Annotated[
    bool, typer.Option("--from-source", help="Quantize the official weights as they arrive; they never lie on disk.")
]
Fast = Annotated[bool, typer.Option("--fast", help="With --from-source: search less, a little more error.")]
Force = Annotated[
    bool, typer.Option("--force", help="Go on where memory will not do, and replace another model of the name.")
]


@dataclass(frozen=True, slots=True)
class Target:
    """Where a model goes: a file of the store, and what it is called there."""

    name: str
    path: Path


def pull(
    model: Wanted,
    kind: Type = None,
    name: Name = None,
    context: options.Context = None,
    from_source: FromSource = False,
    fast: Fast = False,
    force: Force = False,
) -> None:
    """Fetch a published model; an interrupted pull is continued by the same command."""
    from llmq.reference import Local, Published, Url, parse_reference

    wanted = parse_reference(options.utf8(model))
    for option, text in (("--name", name), ("--type", kind)):
        if text == "":
            raise UsageError(f"what {option} gives is empty; give one, or leave it away")
    if name:
        new_model_path(name)
    if fast and not from_source:
        raise UsageError("--fast goes with --from-source; what is fetched is as it is, and `llmq quantize` has its own")
    if from_source and isinstance(wanted, Local | Url):
        raise UsageError("--from-source takes a model's name or org/repo, not an address or a path")
    if isinstance(wanted, Local):
        if context is not None:
            raise UsageError("--ctx goes with what is fetched, whose memory is judged; leave it away")
        take_local(wanted.path, name, kind, force=force)
        return
    if isinstance(wanted, Published) and wanted.entry.unsupported:
        raise UnsupportedError(f"llmq cannot run {wanted.entry.name} yet: {wanted.entry.unsupported}")
    check_one_type(wanted, kind)
    if from_source and not isinstance(wanted, Url):
        asked = kind or wanted.type or DEFAULT_TYPE
        finish(make_from_source(wanted, asked, name, context, fast=fast, force=force))
        return
    offer, label = find_offer(wanted, checked_type(wanted, kind))
    target = target_of(name or label)
    if is_there(target, offer, reread=force):
        note(f"{target.name} is there already, the same as {one_line(offer.origin, 120)}")
    else:
        check = functools.partial(check_replaced, target, offer.origin, force=force)
        check()
        if not take_from_elsewhere(target, offer, check):
            download(target, offer, context, check, force=force)
    finish(target)


def check_one_type(wanted: "Published | Repo | Url", kind: str | None) -> None:
    """UsageError where the name says another type than --type does."""
    said = getattr(wanted, "type", "")
    if kind and said and said != kind.lower():
        raise UsageError(f"the name asks for {said} and --type for {kind[:40]!a}; give one of them")


def checked_type(wanted: "Published | Repo | Url", kind: str | None) -> str:
    """The type that is asked for, in lower case, "" for none: any that a file's name may say."""
    from llmq.offer import type_of
    from llmq.reference import Repo, Url

    if kind and (isinstance(wanted, Url) or (isinstance(wanted, Repo) and wanted.file)):
        raise UsageError("--type goes with a model's name or org/repo; the address of a file says which one it is")
    asked = (kind or ("" if isinstance(wanted, Url) else wanted.type)).lower()
    known = type_of(f"{asked}.gguf")
    if known != asked.replace("fp", "f"):
        raise UsageError(f"there is no type {asked[:40]!a}; write one as in q4_k_m, q8_0 or f16")
    return known


def target_of(name: str) -> Target:
    """Raises UsageError where nothing can be written there, or nothing remembered of it."""
    from llmq.files import check_target, explained
    from llmq.records import check_record

    path = new_model_path(name)
    with explained(path):
        make_private(path.parent)
    check_target(path)
    check_record(path)
    return Target(name, path)


def finish(target: Target) -> None:
    note(f"talk to it: llmq chat {target.name}")
    sys.stdout.write(f"{one_line(str(target.path), 4096)}\n")


def make_from_source(
    wanted: "Published | Repo", kind: str, name: str | None, context: int | None, *, fast: bool, force: bool
) -> Target:
    from cli.from_source import Making, is_made, quantize_published, remember
    from llmq.hub import snapshot
    from llmq.offer import has_weights, store_name
    from llmq.reference import Published
    from quant.size import kind_of

    kind = kind_of(kind)
    found = snapshot(wanted.entry.repo) if isinstance(wanted, Published) else snapshot(wanted.repo, wanted.revision)
    if not has_weights(found):
        raise UsageError(f"{found.repo} has no safetensors to quantize; leave --from-source away for its GGUF files")
    label = wanted.entry.name if isinstance(wanted, Published) else found.repo.rpartition("/")[2]
    target = target_of(name or store_name(label, kind))
    making = Making(found, target.path, kind, fast)
    if is_made(making, reread=force):
        note(f"{target.name} is there already, made of {one_line(found.repo, 60)}")
    else:
        check = functools.partial(check_replaced, target, making.origin, force=force)
        quantize_published(making, context, check, force=force)
    remember(making)
    return target


# ---- what is there
def check_replaced(target: Target, origin: str, *, force: bool) -> None:
    """A model gives way to another version of itself, damaged or not, and to nothing else unless `force` is given."""
    from llmq.records import read_record

    if force or not os.path.lexists(target.path):
        return
    record = None if target.path.is_symlink() else read_record(target.path)
    if not (
        record
        and origin
        and of_any_version(record.origin) == of_any_version(origin)
        and record.n_bytes == target.path.stat().st_size
    ):
        raise UsageError(
            f"there is another model named {target.name}; give this one a --name, or --force to replace it"
        )


def of_any_version(origin: str) -> str:
    """What a record says of where a model came from, but for the commit, and how thoroughly it was made."""
    return re.sub("@[0-9a-f]{40}", "", origin, count=1).removesuffix(", --fast")


def is_there(target: Target, offer: "Offer", *, reread: bool) -> bool:
    """Whether the store has this very file. One that was changed, or that nothing is known of, is read again, and any
    with `reread`."""
    from llmq.records import current_record, write_record

    remote = offer.remote
    if not target.path.is_file() or target.path.stat().st_size != remote.n_bytes:
        return False
    record = current_record(target.path)
    if not remote.sha256:
        if not record or record.origin != offer.origin:
            return False
        return not reread or content_of(target.path) == record.sha256
    if record and not reread:
        return record.sha256 == remote.sha256
    if content_of(target.path) != remote.sha256:
        return False
    write_record(target.path, remote.sha256, offer.origin)
    return True


def take_from_elsewhere(target: Target, offer: "Offer", check: Callable[[], None]) -> bool:
    """Links or copies the file where another program has it; `check` tells whether one of the name may be replaced."""
    from cli.progress import show_bytes
    from llmq.elsewhere import find_by_sha256, link_or_copy
    from llmq.gguf import open_gguf
    from llmq.records import drop_record, write_record
    from llmq.supported import check_supported

    remote = offer.remote
    if not remote.sha256:
        return False
    with show_bytes("looking elsewhere", remote.n_bytes) as on_bytes:
        source = find_by_sha256(remote.sha256, remote.n_bytes, on_bytes)
    if not source:
        return False
    with open_gguf(source) as gguf:
        check_supported(gguf)
    check()  # looking may have taken long
    try:
        how = link_or_copy(source, target.path, remote.sha256, replace=os.path.lexists(target.path))
    except BusyError:  # which the transfer waits for
        return False
    drop_record(target.path)
    write_record(target.path, remote.sha256, offer.origin)
    note(f"{how} from {one_line(str(source), 200)}; nothing had to be fetched")
    return True


def take_local(path: Path, name: str | None, kind: str | None, *, force: bool) -> None:
    """A file is imported, a folder quantized."""
    from cli.output import default_out
    from cli.quantize import quantize
    from cli.store import import_model
    from quant.size import kind_of

    if path.is_dir():
        kind = kind_of(kind or DEFAULT_TYPE)
        target = target_of(name or default_out(path, kind).stem)
        quantize(path, target.path, kind, force=force)
    elif kind:
        raise UsageError(
            "--type goes with what is fetched or a checkpoint folder; `llmq quantize` changes a file's type"
        )
    else:
        import_model(str(path), name, force=force)


# ---- fetching
def download(target: Target, offer: "Offer", context: int | None, check: Callable[[], None], *, force: bool) -> None:
    """Fetches what is judged to work here, and compiles for it meanwhile; `check` as for take_from_elsewhere()."""
    from cli.fit import check_fit, judge_download
    from llmq.files import allocated_bytes
    from llmq.gguf import GGUF
    from llmq.offer import peek
    from llmq.part import part_paths
    from llmq.records import drop_record, write_record
    from llmq.supported import check_supported
    from llmq.transfer import fetch

    if target.path.exists():
        note(f"{target.name} is replaced when the new one is there")
    metadata, tensors = peek(offer)
    config = check_supported(GGUF(Path(offer.file), metadata, tensors, None))
    already = allocated_bytes(part_paths(target.path)[0])
    verdict = judge_download(sized(offer, config, tensors), context, target.path.parent, already, offer.types)
    check_fit(verdict, force)
    with warm(tensors):
        done = show_transfer(fetch(offer.remote, target.path, held=check), target.name)
    drop_record(target.path)
    write_record(target.path, done.sha256, offer.origin)
    vouched = "its sha256 is what was announced" if offer.remote.sha256 else "nobody announced its sha256"
    note(f"{size(done.total)} of {one_line(offer.origin, 120)}; {vouched}")


def sized(offer: "Offer", config: "ModelConfig", tensors: "dict[str, TensorInfo]") -> "Size":
    from quant.size import size_of

    shapes = {name: (info.shape, info.format) for name, info in tensors.items()}
    return size_of(config, offer.type or "it is", shapes, offer.remote.n_bytes)


def warm(tensors: "dict[str, TensorInfo]") -> contextlib.AbstractContextManager[None]:
    """Kernels for the formats of these tensors, compiled while the network is busy."""
    from llmq.warm import warming

    embedding = tensors["token_embd.weight"].format
    matrices = [info.format for name, info in tensors.items() if len(info.shape) > 1 and "_gate_inp" not in name]
    return warming(list(dict.fromkeys(matrices)), embedding, "f16")
