"""What a user calls a model that is to be fetched: a name of the catalog, a repository, an address or a path.

What a text means is told by its form alone, in this order:

1. `hf:`, `hf.co/` or `huggingface.co/` in front, with or without https://: a repository on the hub, or a file in it
2. another http or https address that ends in .gguf: that file
3. beginning with `.`, `/` or `~`, or ending in .gguf: a path
4. a name or alias of the catalog
5. `org/repo`: a repository on the hub
6. what is none of these but lies on disk: a path

So `org/repo` is a repository even where a folder of that name lies, and a path is written `./org/repo`: the same
command means the same in every folder, and what lies in a folder cannot pass for what is published. `:TYPE` may follow
a name or a repository, `@REVISION` a repository. Nothing here looks at the network.
"""

import difflib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import SplitResult, unquote, urlsplit

from llmq.catalog import CatalogEntry, catalog, find_entry, is_repository
from llmq.errors import UsageError
from llmq.store import NAME, RESERVED, SUFFIX

TEXT_LIMIT, PART_LIMIT = 4096, 255

_HUB_PREFIX = re.compile(r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)(?:/|$)|hf:(?://)?", re.IGNORECASE)
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):/")
_DRIVE = re.compile(r"[A-Za-z]:[/\\]")
_TYPE = re.compile(r"[A-Za-z0-9_]{1,32}")
# Branches, tags, commits and refs/pr/1: no part begins with a dot, so none is a folder above.
_REVISION = re.compile(r"(?=.{1,128}$)[A-Za-z0-9_][A-Za-z0-9._-]*(?:/[A-Za-z0-9_][A-Za-z0-9._-]*)*")
_HOST = re.compile(r"(?=.{1,253}$)[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?|\[[0-9A-Fa-f:.]+\]")
# In an address a part of the path may be quoted, but not a separator, a dot, a percent sign or a control character.
_URL_PART = re.compile(r"(?!\.\.?$)(?:[A-Za-z0-9._~!$&'()*+,;=@-]|%(?!2[ef5]|5c|7f|[01])[0-9a-f]{2})+", re.IGNORECASE)
# What on the hub looks like an organization and is none.
_NO_MODELS = {"api", "blog", "collections", "datasets", "docs", "models", "papers", "settings", "spaces"}


@dataclass(frozen=True, slots=True)
class Published:
    """A model of the catalog; `type` is lower-case, "" if none was given, and not checked."""

    entry: CatalogEntry
    type: str = ""


@dataclass(frozen=True, slots=True)
class Repo:
    """A repository on the hub, "org/repo"; `revision` is a branch, a tag or a commit, "" for the main one, and `file`
    one of its .gguf files, where one was named."""

    repo: str
    revision: str = ""
    type: str = ""
    file: str = ""


@dataclass(frozen=True, slots=True)
class Url:
    """The http or https address of a .gguf file; its query may hold a secret."""

    url: str


@dataclass(frozen=True, slots=True)
class Local:
    """A file or folder, which may not exist."""

    path: Path


Reference = Published | Repo | Url | Local


def parse_reference(text: str) -> Reference:
    """What `text` means. UsageError where it means nothing; what could be a password is not repeated there."""
    _refuse_hostile(text)
    prefix = _HUB_PREFIX.match(text)
    if prefix:
        return _on_hub(text, text[prefix.end() :])
    if _SCHEME.match(text) and not _is_drive(text):
        return _address(text)
    is_file = text.endswith(SUFFIX) and not _has_login(text)
    if text[:1] in (".", "/", "~") or is_file or _is_drive(text):
        return Local(_expanded(text))
    if NAME.fullmatch(text.partition(":")[0]):
        return _named(text)
    if is_repository(re.split("[@:]", text)[0]):
        return _repository(text, text)
    if _is_there(text):
        return Local(Path(text))
    raise UsageError(
        f"{_shown(text)} is no name, no repository and no file; a repository is written org/repo, a file ./file.gguf"
    )


def _refuse_hostile(text: str) -> None:
    if not text:
        raise UsageError("the model's name is empty; `llmq list --available` shows what there is")
    if len(text) > TEXT_LIMIT or any(len(part) > PART_LIMIT for part in re.split(r"[/\\?]", text.partition("?")[0])):
        raise UsageError(f"{_shown(text)} is too long for a name; check what was typed")
    if not text.isprintable() or text != text.strip():
        raise UsageError(f"{_shown(text)} holds characters that cannot be seen; type the name by hand")
    if "\\" in text and os.name != "nt":
        raise UsageError(f"{_shown(text)} holds a backslash; write / between folders")


def _shown(text: str) -> str:
    """The text in quotes, fit for a line: cut, escaped, and without what could be a password or a token."""
    if _has_login(text):
        text = f"...@{text.rpartition('@')[2]}"
    text = text.partition("?")[0]
    return ascii(text if len(text) <= 100 else f"{text[:97]}...")


def _has_login(text: str) -> bool:
    """Whether something like user:password@ is in it, well-formed or not."""
    return ":" in text.rpartition("@")[0]


# ---- names and repositories


def _named(text: str) -> Reference:
    name, colon, kind = text.partition(":")
    entry = find_entry(name)
    if entry:
        return Published(entry, _type(text, kind) if colon else "")
    if _is_there(text):
        return Local(Path(text))
    near = difflib.get_close_matches(name.lower(), _all_names(), n=1)
    hint = f"did you mean {near[0]}?" if near else "`llmq list --available` shows those there are"
    raise UsageError(f"no published model is named {_shown(name)}; {hint}")


def _all_names() -> list[str]:
    return [name for entry in catalog() for name in (entry.name, *entry.aliases)]


def _type(text: str, kind: str) -> str:
    """A type as it is typed behind a colon, in lower case."""
    if not _TYPE.fullmatch(kind):
        raise UsageError(f"what is behind the colon of {_shown(text)} is no type; write one as in mistral-7b:q5_k_m")
    return kind.lower()


def _repository(text: str, body: str) -> Repo:
    """`org/repo`, `org/repo@REVISION`, either with `:TYPE`. `text` is what the user typed, for the error."""
    address, colon, kind = body.partition(":")
    repo, at, revision = address.partition("@")
    if not is_repository(repo) or repo.partition("/")[0].lower() in _NO_MODELS:
        raise UsageError(
            f"{_shown(text)} names no repository with models; write org/repo, as in mistralai/Mistral-7B-v0.3"
        )
    if at and not _is_revision(revision):
        raise UsageError(f"{_shown(revision)} is no revision of {repo}; give a branch, a tag or a commit")
    return Repo(repo, revision, _type(text, kind) if colon else "")


def _is_revision(text: str) -> bool:
    return bool(_REVISION.fullmatch(text)) and ".." not in text and not any(map(RESERVED.fullmatch, text.split("/")))


# ---- addresses


def _on_hub(text: str, rest: str) -> Repo:
    """What stands behind the hub's own address: org/repo, or a page of it as a browser shows it."""
    path = re.split("[?#]", rest)[0].rstrip("/")
    parts = path.split("/")
    repo, page = _repository(text, path if "@" in path else "/".join(parts[:2])), parts[2:]
    if "@" in path or not page:
        return repo
    if repo.type:
        raise UsageError(f"{_shown(text)} has a type within an address; write {repo.repo}:{repo.type}")
    if not all(map(_URL_PART.fullmatch, page)):
        raise UsageError(f"{_shown(text)} holds a part that no address on the hub has; copy it from the browser again")
    if page[0] in ("blob", "resolve") and len(page) > 2 and page[-1].endswith(SUFFIX):
        if not _is_revision(page[1]):
            raise UsageError(f"{_shown(page[1])} is no revision of {repo.repo}; give a branch, a tag or a commit")
        return Repo(repo.repo, unquote(page[1]), file=unquote("/".join(page[2:])))
    revision = page[1] if page[0] in ("blob", "resolve", "tree", "commit") and len(page) > 1 else ""
    if revision and not _is_revision(revision):
        raise UsageError(f"{_shown(revision)} is no revision of {repo.repo}; give a branch, a tag or a commit")
    return Repo(repo.repo, revision)


def _address(text: str) -> Url:
    """An http or https address of a .gguf file anywhere. The fragment, which is never sent, is left away."""
    try:
        parts = urlsplit(text)
        host, _port = parts.hostname or "", parts.port
    except ValueError:
        raise UsageError(f"{_shown(text)} is no address; copy it again") from None
    if parts.scheme not in ("http", "https"):
        raise UsageError(
            f"llmq fetches by http and https, not by {_shown(parts.scheme)}; give such an address, or a path"
        )
    if "@" in parts.netloc:
        raise UsageError(
            f"the address on {_shown(host)} holds a name or a password, which llmq does not send; leave it away"
        )
    if not _HOST.fullmatch(parts.netloc.rpartition(":")[0] if _has_port(parts) else parts.netloc):
        raise UsageError(f"{_shown(text)} has no name of a host that llmq takes: letters, digits, dots and dashes")
    path = parts.path.removeprefix("/").split("/")
    if not all(map(_URL_PART.fullmatch, path)):
        raise UsageError(f"{_shown(text)} holds a part that leads elsewhere or cannot be sent; copy the address again")
    if not path[-1].endswith(SUFFIX):
        raise UsageError(f"{_shown(text)} does not end in {SUFFIX}; give the address of the file itself")
    return Url(parts._replace(fragment="").geturl())


def _has_port(parts: SplitResult) -> bool:
    return not parts.netloc.endswith("]") and ":" in parts.netloc


# ---- paths


def _is_drive(text: str) -> bool:
    return os.name == "nt" and bool(_DRIVE.match(text))


def _expanded(text: str) -> Path:
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise UsageError(
            f"{_shown(text)} begins with the home of a user that is not known; write the whole path"
        ) from None


def _is_there(text: str) -> bool:
    """Whether it lies on disk: False also for text that no system takes for a path."""
    try:
        return Path(text).exists()
    except OSError:
        return False
