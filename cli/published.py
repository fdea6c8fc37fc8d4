"""What is offered of a model, by its name, in a repository or at an address: files, or weights to make them of."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cli.screen import one_line
from llmq.errors import NetworkError, UsageError
from llmq.store import SUFFIX

if TYPE_CHECKING:
    from llmq.config import ModelConfig
    from llmq.hub import Snapshot
    from llmq.offer import Offer
    from llmq.reference import Published, Repo, Url
    from quant.size import Size

DEFAULT_TYPE = "q4_k_m"
# Of a repository without it, the first of these that it has.
FETCHED = (
    DEFAULT_TYPE, "q4_k_s", "q4_k_l", "iq4_xs", "q4_0", "q5_k_m", "q5_k_s", "q6_k", "q8_0", "q3_k_l", "q3_k_m", "f16",
)  # fmt: skip


def find_offer(wanted: "Published | Repo | Url", kind: str) -> "tuple[Offer, str]":
    """The file to fetch, and a name for it. Asks the hub."""
    from llmq.hub import snapshot
    from llmq.offer import choose, offer_at, offer_of, store_name
    from llmq.reference import Published, Url

    if isinstance(wanted, Url):
        offer = offer_at(wanted)
        return offer, store_name(offer.file.removesuffix(SUFFIX))
    if isinstance(wanted, Published):
        return published_offer(wanted, kind)
    found = snapshot(wanted.repo, wanted.revision)
    if wanted.file:
        file = found.files.get(wanted.file)
        if not file:
            raise NetworkError(f"{wanted.repo} has no file {one_line(wanted.file, 80)!a}; check the name")
        offer = offer_of(found, file)
    else:
        offer = choose(found, [kind] if kind else FETCHED, exact=bool(kind))
    stem = Path(offer.file).name.removesuffix(SUFFIX)
    return offer, store_name(stem)


def published_offer(wanted: "Published", kind: str) -> "tuple[Offer, str]":
    from llmq.hub import snapshot
    from llmq.offer import choose, store_name

    entry = wanted.entry
    if not entry.gguf:
        raise UsageError(f"no ready file of {entry.name} is known; `llmq pull {entry.name} --from-source` makes one")
    offer = choose(snapshot(entry.gguf), [kind or DEFAULT_TYPE], exact=True)
    return offer, store_name(entry.name, offer.type)


@dataclass(frozen=True, slots=True)
class Offered:
    """What there is in each of the types that are asked for; `types` are all that could be, and `to_make` says that it
    is to be quantized first."""

    sizes: "list[Size]"
    types: Sequence[str]
    to_make: bool = False


def sizes_offered(wanted: "Repo | Url", kinds: Sequence[str]) -> Offered:
    """The file that is asked for, or all of a repository, of which one header is read; of one with weights alone what
    each of `kinds` would be.

    Raises NetworkError, UsageError (no such file or type), UnsupportedError and FileFormatError (the header).
    """
    from llmq.hub import snapshot
    from llmq.offer import choose, has_weights, offers_of
    from llmq.reference import Url
    from quant.recipe import PRESETS
    from quant.size import kind_of, planned

    if isinstance(wanted, Url) or wanted.file:
        return Offered([size_offered(find_offer(wanted, "")[0])], ())
    found = snapshot(wanted.repo, wanted.revision)
    files = offers_of(found)
    if not files and has_weights(found):
        config = config_at(found)
        asked = [kind_of(wanted.type)] if wanted.type else kinds
        return Offered([planned(config, kind) for kind in asked], kinds, to_make=True)
    kind = wanted.type.replace("fp", "f")
    offer = choose(found, [kind] if kind else FETCHED, exact=bool(kind))
    one = size_offered(offer)
    known = {kind: file.n_bytes for kind, file in files.items() if kind in PRESETS}
    if wanted.type or offer.type not in known:
        return Offered([one], tuple(known))
    sizes = [dataclasses.replace(planned(one.config, kind), name=one.name, n_bytes=known[kind]) for kind in known]
    return Offered(sorted(sizes, key=lambda size: size.n_bytes), tuple(known))


def size_offered(offer: "Offer") -> "Size":
    """Of a file by its header, which is checked as for a run."""
    from llmq.gguf import GGUF
    from llmq.offer import peek
    from quant.size import size_of_gguf

    metadata, tensors = peek(offer)
    gguf = GGUF(Path(offer.file), metadata, tensors, None)
    size = size_of_gguf(gguf, offer.remote.n_bytes, one_line(Path(offer.file).stem, 40))
    return dataclasses.replace(size, type=offer.type or size.type)


def config_at(found: "Snapshot") -> "ModelConfig":
    """The shape of a repository's weights, none of which are read. FileFormatError where it has not all of a model."""
    from llmq.hub import read_small
    from quant.checkpoint import CONFIG, CONFIG_LIMIT
    from quant.files import parse_json
    from quant.names import read_hf_config
    from quant.remote import check_files

    check_files(found)
    return read_hf_config(parse_json(CONFIG, read_small(found, CONFIG, CONFIG_LIMIT)), found.repo.rpartition("/")[2])
