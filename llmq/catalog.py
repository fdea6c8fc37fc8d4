"""The models llmq knows by name, from models.toml and a file of the user's: where they are, their shape and licence."""

import errno
import os
import re
import stat
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from platformdirs import user_config_path

from llmq.errors import UsageError
from llmq.store import NAME, RESERVED

MODELS_TOML = Path(__file__).parents[1] / "models.toml"
FILE_LIMIT = 1 << 20

# Bytes per weight of a whole file as Q4_K_M; the mix of types gives 4.78 to 5.00 bits for these shapes.
Q4_K_M_BYTES = 4.85 / 8

# The hub's rule for names of repositories. Neither part may begin with a dot, so no path leads out of a folder.
_PART = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"
REPOSITORY = re.compile(rf"(?!.*(?:--|\.\.)){_PART}/{_PART}")

SHAPE = ("n_layers", "dim", "n_heads", "n_kv_heads", "head_dim", "ffn_dim", "vocab_size")
# The largest that the runtime takes, as in llmq.config; other numbers go up to 2^24.
MOST = {"n_layers": 1024, "n_experts": 64, "n_experts_used": 8, "context_length": 2**31 - 1, "window": 2**31 - 1}
TEXT_LIMIT = 160


@dataclass(frozen=True, slots=True)
class CatalogEntry:
    """A published model.

    `gguf` is a repository with ready GGUF files, "" where there is none worth naming; `tokenizer` the version of the
    instruct format; `gated` says that the repository asks for an account; `unsupported` is "" or why llmq cannot run
    it yet, a clause as in "its Tekken vocabulary is not read yet". `window` is 0 where attention reaches back over the
    whole context, `n_experts` 0 if dense; with `tied_embeddings` the output matrix is the embedding.
    """

    name: str
    repo: str
    licence: str
    tokenizer: str
    context_length: int
    n_layers: int
    dim: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    ffn_dim: int
    vocab_size: int
    window: int = 0
    n_experts: int = 0
    n_experts_used: int = 0
    tied_embeddings: bool = False
    aliases: tuple[str, ...] = ()
    gguf: str = ""
    instruct: bool = True
    gated: bool = False
    unsupported: str = ""

    @property
    def n_weights(self) -> int:
        """All weights, as the llama architecture has them."""
        attention = 2 * self.dim * self.head_dim * (self.n_heads + self.n_kv_heads)
        experts = 3 * self.dim * self.ffn_dim * max(self.n_experts, 1)
        router = self.dim * self.n_experts
        embeddings = (1 if self.tied_embeddings else 2) * self.vocab_size
        return self.n_layers * (attention + experts + router + 2 * self.dim) + self.dim * (embeddings + 1)

    @property
    def q4_k_m_bytes(self) -> int:
        """About what the model takes on disk as Q4_K_M."""
        return round(self.n_weights * Q4_K_M_BYTES)


FIELDS: dict[str, Any] = {field.name: field.type for field in fields(CatalogEntry) if field.name != "name"}
REQUIRED = [field.name for field in fields(CatalogEntry) if field.default is MISSING and field.name != "name"]
KEYS = FIELDS.keys() - set(SHAPE) | {"shape"}


def user_catalog() -> Path:
    """$LLMQ_HOME/models.toml, or models.toml in the user's configuration folder. It may not exist."""
    home = os.environ.get("LLMQ_HOME")
    return (Path(home).absolute() if home else user_config_path("llmq")) / "models.toml"


def catalog() -> list[CatalogEntry]:
    """All entries: those of models.toml in its order, with what the user's file says of them, then the user's own.

    Raises UsageError, with the file and the key, where the user's file cannot be used.
    """
    tables = {name: _flat(table) for name, table in tomllib.loads(MODELS_TOML.read_text("utf-8")).items()}
    path = user_catalog()
    for name, table in _user_tables(path).items():
        tables[name] = tables.get(name, {}) | _checked(path, name, table)
    entries = [_entry(path, name, table) for name, table in tables.items()]
    _refuse_shared_names(path, entries)
    return entries


def find_entry(name: str) -> CatalogEntry | None:
    """The entry of this name or alias, in upper or lower case. Raises UsageError as catalog() does."""
    wanted = name.lower()
    return next((entry for entry in catalog() if wanted in _names(entry)), None) if NAME.fullmatch(name) else None


def _names(entry: CatalogEntry) -> list[str]:
    return [name.lower() for name in (entry.name, *entry.aliases)]


def _flat(table: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in table.items() if key != "shape"} | table.get("shape", {})


def _entry(path: Path, name: str, table: dict[str, Any]) -> CatalogEntry:
    missing = [key for key in REQUIRED if key not in table]
    if missing:
        raise _wrong(path, name, f"lacks {', '.join(missing)}; docs/models.md has an example")
    entry = CatalogEntry(name, **(table | {"aliases": tuple(table.get("aliases", ()))}))
    if entry.n_experts_used > entry.n_experts or (entry.n_experts and not entry.n_experts_used):
        raise _wrong(
            path, name, f"uses {entry.n_experts_used} of {entry.n_experts} experts; n_experts_used is 1 or more"
        )
    return entry


def _refuse_shared_names(path: Path, entries: list[CatalogEntry]) -> None:
    owners: dict[str, str] = {}
    for entry in entries:
        for name in _names(entry):
            owner = owners.setdefault(name, entry.name)
            if owner != entry.name or _names(entry).count(name) > 1:
                raise _wrong(path, entry.name, f"is called {name!a}, which already means {owner}; choose another name")


# ---- the user's file


def _wrong(path: Path, name: str, what: str) -> UsageError:
    return UsageError(f"in {str(path)[:120]!a}, [{ascii(name[:64])[1:-1]}] {what}")


def _user_tables(path: Path) -> dict[str, Any]:
    """The tables of the user's file, none where there is no file."""
    try:
        data = _read(path)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise UsageError(f"cannot read {str(path)!a}: {error.strerror}; check it, or remove it") from error
    if len(data) > FILE_LIMIT:
        raise UsageError(f"{str(path)!a} is larger than {FILE_LIMIT >> 20} MiB, too large for a list of models")
    try:
        tables = tomllib.loads(data.decode("utf-8-sig"))
    # RecursionError: brackets nested by the thousand.
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{str(path)!a} is no TOML file: {str(error)[:80]!a}; correct it, or remove it") from error
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise UsageError(f"{name[:64]!a} in {str(path)!a} stands outside any [model]; put it below one")
    return tables


def _read(path: Path) -> bytes:
    """At most one byte more than FILE_LIMIT of a regular file."""
    # O_NONBLOCK: opening a named pipe must not wait for a writer.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is not a regular file")
    with os.fdopen(descriptor, "rb") as file:
        return file.read(FILE_LIMIT + 1)


def _checked(path: Path, name: str, table: Mapping[str, Any]) -> dict[str, Any]:
    """A table of the user's file, flat, after a look at each key and value."""
    if not _is_plain(name):
        raise _wrong(path, name, "is not a model name: use up to 64 letters, digits, dots, dashes and underscores")
    shape = table.get("shape", {})
    if not isinstance(shape, dict):
        raise _wrong(path, name, f"has a shape that is no table; write shape = {{ {SHAPE[0]} = 32, ... }}")
    unknown = [key for key in table if key not in KEYS] + [key for key in shape if key not in SHAPE]
    if unknown:
        raise _wrong(path, name, f"has an unknown key {unknown[0][:40]!a}; docs/models.md lists the keys")
    values = _flat(table)
    for key, value in values.items():
        right = _expected(key)
        if not right.fits(value):
            raise _wrong(path, name, f"has a wrong {key}: it must be {right.what}")
    return values


@dataclass(frozen=True, slots=True)
class _Kind:
    """What the value of a key may be, in words and as a test."""

    what: str
    fits: Callable[[Any], bool]


def _expected(key: str) -> _Kind:
    if key == "aliases":
        return _Kind("a list of names like those of models", _are_plain)
    if key in ("repo", "gguf"):
        return _Kind("a repository, as in mistralai/Mistral-7B-v0.3", lambda value: _names_repository(value, key))
    if FIELDS[key] is bool:
        return _Kind("true or false", lambda value: isinstance(value, bool))
    if FIELDS[key] is int:
        least, most = int(key in REQUIRED), MOST.get(key, 2**24)
        # type(), not isinstance(): True is an int too.
        return _Kind(
            f"a whole number from {least} to {most}", lambda value: type(value) is int and least <= value <= most
        )
    shortest = int(key in REQUIRED)
    return _Kind(
        f"a text of {shortest} to {TEXT_LIMIT} printable characters",
        lambda value: isinstance(value, str) and value.isprintable() and shortest <= len(value) <= TEXT_LIMIT,
    )


def _are_plain(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(alias, str) and _is_plain(alias) for alias in value)


def _names_repository(value: Any, key: str) -> bool:
    return isinstance(value, str) and (is_repository(value) or (key == "gguf" and not value))


def _is_plain(name: str) -> bool:
    return bool(NAME.fullmatch(name)) and not RESERVED.fullmatch(name)


def is_repository(text: str) -> bool:
    """Whether a text can be the name of a repository on the hub, `org/repo`, and of a folder on any system."""
    return bool(REPOSITORY.fullmatch(text)) and not any(map(RESERVED.fullmatch, text.split("/")))
