"""What a repository or an address has to offer, as sizes: its files, or what can be made of its weights."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cli.screen import one_line

if TYPE_CHECKING:
    from llmq.config import ModelConfig
    from llmq.hub import Snapshot
    from llmq.offer import Offer
    from llmq.reference import Repo, Url
    from quant.size import Size


def sizes_offered(wanted: "Repo | Url", kinds: Sequence[str]) -> "tuple[list[Size], bool]":
    """The file that is asked for, or all of a repository, of which one header is read; of one with weights alone what
    each of `kinds` would be. And whether those are to be quantized first.

    Raises NetworkError, UsageError (no such file or type), UnsupportedError and FileFormatError (the header).
    """
    from cli.pull import FETCHED, find_offer
    from llmq.hub import snapshot
    from llmq.offer import choose, offers_of
    from llmq.reference import Url
    from quant.recipe import PRESETS
    from quant.size import kind_of, planned

    if isinstance(wanted, Url) or wanted.file:
        return [size_offered(find_offer(wanted, "")[0])], False
    found = snapshot(wanted.repo, wanted.revision)
    files = offers_of(found)
    if not files and any(name.endswith(".safetensors") for name in found.files):
        config = config_at(found)
        return [planned(config, kind) for kind in ([kind_of(wanted.type)] if wanted.type else kinds)], True
    offer = choose(found, [wanted.type] if wanted.type else FETCHED, exact=bool(wanted.type))
    one = size_offered(offer)
    known = {kind: file.n_bytes for kind, file in files.items() if kind in PRESETS}
    if wanted.type or offer.type not in known:
        return [one], False
    sizes = [dataclasses.replace(planned(one.config, kind), name=one.name, n_bytes=known[kind]) for kind in known]
    return sorted(sizes, key=lambda size: size.n_bytes), False


def size_offered(offer: "Offer") -> "Size":
    """Of a file by its header, which is checked as for a run."""
    from llmq.gguf import GGUF
    from llmq.offer import peek
    from llmq.tokenizer import load_tokenizer
    from quant.size import size_of_gguf

    metadata, tensors = peek(offer)
    gguf = GGUF(Path(offer.file), metadata, tensors, None)
    size = size_of_gguf(gguf, offer.remote.n_bytes, one_line(Path(offer.file).stem, 40))
    load_tokenizer(metadata)
    return dataclasses.replace(size, type=offer.type or size.type)


def config_at(found: "Snapshot") -> "ModelConfig":
    """The shape of a repository's weights."""
    from llmq.hub import read_small
    from quant.checkpoint import CONFIG, CONFIG_LIMIT
    from quant.files import parse_json
    from quant.names import read_hf_config

    return read_hf_config(parse_json(CONFIG, read_small(found, CONFIG, CONFIG_LIMIT)), found.repo.rpartition("/")[2])
