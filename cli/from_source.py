"""llmq pull --from-source: the official weights quantized as they arrive."""

from pathlib import Path
from typing import TYPE_CHECKING

from cli.fit import check_fit, judge_download
from cli.quantize import follow
from cli.screen import note, one_line, show_compiling, size

if TYPE_CHECKING:
    from llmq.hub import Snapshot


def quantize_published(
    found: "Snapshot", target: Path, kind: str, context: int | None, *, fast: bool, force: bool
) -> None:
    """Quantizes what a repository holds into a file of the store. A file that arrived damaged is read once more."""
    from llmq.files import sha256_of
    from llmq.jit import compile_log
    from llmq.records import current_record, drop_record, write_record
    from quant.quantize import quantize
    from quant.remote import open_remote
    from quant.source import DamagedStreamError

    origin = f"{found.repo}@{found.commit}, quantized as {kind}{', --fast' if fast else ''}"
    record = current_record(target)
    if record and record.origin == origin:
        note(f"{target.stem} is there already, made of {one_line(found.repo, 60)}")
        return
    compile_log.listener = show_compiling
    judge(found, target.parent, kind, context, force=force)
    title = f"{one_line(found.repo, 60)} to {kind}"
    try:
        follow(quantize(open_remote(found), target, kind, fast=fast), title)
    except DamagedStreamError as error:
        note(f"{one_line(str(error), 160)}: now")
        follow(quantize(open_remote(found), target, kind, fast=fast), title)
    drop_record(target)
    write_record(target, sha256_of(target), origin)
    note(f"{size(target.stat().st_size)} made of {one_line(found.repo, 60)}; the sha256 of all its files was checked")


def judge(found: "Snapshot", folder: Path, kind: str, context: int | None, *, force: bool) -> None:
    """Refuses what would not run here, before its weights are asked for."""
    from llmq.hub import read_small
    from quant.checkpoint import CONFIG, CONFIG_LIMIT
    from quant.files import parse_json
    from quant.names import read_hf_config
    from quant.size import planned

    config = read_hf_config(parse_json(CONFIG, read_small(found, CONFIG, CONFIG_LIMIT)), found.repo.rpartition("/")[2])
    check_fit(judge_download(planned(config, kind), context, folder), force)
    shards = sum(file.n_bytes for name, file in found.files.items() if "/" not in name and name.startswith("model"))
    note(f"{size(shards)} will be read over the network, and lie nowhere on disk")
