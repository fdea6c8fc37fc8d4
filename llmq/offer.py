"""What of a published model can be fetched: the GGUF file of a type, where it is, and what its header says."""

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

from llmq.ask import probe, read_piece
from llmq.errors import FileFormatError, UsageError, quoted
from llmq.fetcher import LIMITS, Limits, Remote
from llmq.gguf_header import HEADER_LIMIT, MAGIC, CutShortError, Header, TensorInfo, read_header
from llmq.hub import HubFile, Snapshot, refuse_offline, remote_file
from llmq.reference import Url
from llmq.store import NAME, SUFFIX

# Of a file's name the last word is its type: Mistral-7B-Instruct-v0.3-Q4_K_M.gguf, mixtral.IQ4_XS.gguf, nemo-f16.gguf,
# and some write devstralQ4_K_M.gguf.
TYPE = re.compile(
    r"(?:^|[-._]|(?<=[a-z])(?=I?Q[1-8]_|B?FP?16))(I?Q[1-8](?:_[A-Z0-9]+)*|BF16|FP?16|FP?32)$", re.IGNORECASE
)
SPLIT = re.compile(r"-\d{5}-of-\d{5}$")
# What lies beside models and is none.
OTHERS = re.compile(r"(^|[-._/])(mmproj|imatrix|lora|adapter|vocab)([-._]|$)", re.IGNORECASE)
FIRST_PIECE = 1 << 20
# Of a long name for the store this much is left, and so much of it from its end.
LONGEST, TAIL = 64, 24


@dataclass(frozen=True, slots=True)
class Offer:
    """A file that can be fetched: `file` is its name there, `type` what that says, `origin` is for its record. `types`
    are all that there are beside it."""

    file: str
    type: str
    remote: Remote
    origin: str
    types: tuple[str, ...] = ()


def offers_of(found: Snapshot) -> dict[str, HubFile]:
    """The GGUF files of a repository by type, in lower case; of several with one type the shortest name."""
    files: dict[str, HubFile] = {}
    for file in sorted(found.files.values(), key=lambda file: (len(file.name), file.name), reverse=True):
        stem = PurePosixPath(file.name).stem
        if file.name.lower().endswith(SUFFIX) and not SPLIT.search(stem) and not OTHERS.search(stem):
            files[type_of(file.name)] = file
    return files


def has_weights(found: Snapshot) -> bool:
    return any(name.endswith(".safetensors") for name in found.files)


def type_of(name: str) -> str:
    """The type that a file's name ends in, in lower case; "" where it does not say."""
    match = TYPE.search(PurePosixPath(name).stem)
    return match[1].lower().replace("fp", "f") if match else ""


def choose(found: Snapshot, wanted: Sequence[str], *, exact: bool) -> Offer:
    """The file of the first of `wanted` that there is; else, unless `exact`, any.

    Raises UsageError, which names what there is.
    """
    files = offers_of(found)
    kind = next((kind for kind in wanted if kind in files), None)
    if kind is None and files and not exact:
        kind = min(files)
    if kind is None:
        raise UsageError(_nothing(found, files, wanted[0]))
    return dataclasses.replace(offer_of(found, files[kind]), types=tuple(files))


def offer_of(found: Snapshot, file: HubFile) -> Offer:
    origin = f"{found.repo}@{found.commit}/{file.name}"
    return Offer(file.name, type_of(file.name), remote_file(found, file), origin)


def offer_at(url: Url, limits: Limits = LIMITS) -> Offer:
    """A file at an address. What is behind the ? may be a secret: the origin does not have it."""
    parts = urlsplit(url.url)
    refuse_offline("fetching this")
    name = unquote(PurePosixPath(parts.path).name)
    return Offer(name, type_of(name), probe(url.url, limits), parts._replace(query="").geturl())


def _nothing(found: Snapshot, files: dict[str, HubFile], wanted: str) -> str:
    if files:
        return f"{found.repo} has no {wanted}; it has {', '.join(sorted(filter(None, files)))}"
    if any(name.lower().endswith(SUFFIX) and SPLIT.search(PurePosixPath(name).stem) for name in found.files):
        advice = "--from-source makes one of its weights" if has_weights(found) else "choose another repository"
        return f"the GGUF files of {found.repo} are in parts, which llmq does not read; {advice}"
    if has_weights(found):
        return f"{found.repo} has no GGUF files; --from-source makes one of its weights"
    return f"{found.repo} has neither GGUF files nor safetensors; is it a model's repository?"


def store_name(label: str, kind: str = "") -> str:
    """A name for the store made of another one. UsageError where nothing of it can stay."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", f"{label}-{kind}" if kind else label).strip("._-")
    if len(name) > LONGEST:
        # Its end tells the type.
        name = f"{name[: LONGEST - TAIL]}{name[-TAIL:]}"
    if not NAME.fullmatch(name):
        raise UsageError(f"{quoted(label)} cannot be a model's name here; give one with --name")
    return name


def peek(offer: Offer, limits: Limits = LIMITS) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    """Metadata and tensors from the beginning of the file, which nothing vouches for yet.

    Raises FileFormatError and UnsupportedError as open_gguf does, and NetworkError.
    """
    head, total = b"", offer.remote.n_bytes
    if not total:
        raise FileFormatError(f"{quoted(offer.file)} is empty; choose another file")
    while True:
        head += read_piece(offer.remote, len(head), min(max(FIRST_PIECE, 4 * len(head)), total), limits)
        if head[:4] != MAGIC:
            raise FileFormatError(f"{quoted(offer.file)} is not a GGUF file; choose another one")
        try:
            return read_header(Header(head, quoted(offer.file), total))
        except CutShortError:
            if len(head) >= min(total, HEADER_LIMIT):
                raise
