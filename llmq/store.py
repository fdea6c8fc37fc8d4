"""Where models live: a folder of plain GGUF files, one per name. Nothing here opens a model."""

import difflib
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

from platformdirs import user_cache_path, user_data_path, user_state_path

from llmq.errors import UsageError

BUNDLED = "storyteller"
BUNDLED_PATH = Path(__file__).with_name("storyteller.gguf")
BUNDLED_SHA256 = "c41e85c6d6fe77bad08625b69fa3a7a88b2cd23205f468629ae82913bda30179"
SUFFIX = ".gguf"

# A name becomes a file name: no separators, no leading dot or dash, nothing that a terminal could act on.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
# What Windows takes for a device, with or without an ending.
RESERVED = re.compile(r"(?:con|prn|aux|nul|com[0-9]|lpt[0-9])(?:\..*)?", re.IGNORECASE)
# What ends the name of a model in a type, as `llmq pull` and `llmq quantize` give them.
TYPED = re.compile(r"(.+)[-.](i?q[1-8](?:_[a-z0-9]+)*|bf16|f16|f32)$")


@dataclass(frozen=True, slots=True)
class Entry:
    """An installed model: its name, its file, and the file's size in bytes."""

    name: str
    path: Path
    n_bytes: int


def models_dir() -> Path:
    """$LLMQ_HOME/models, or the user's data folder. It may not exist yet."""
    home = os.environ.get("LLMQ_HOME")
    return (Path(home).absolute() if home else user_data_path("llmq")) / "models"


def state_dir() -> Path:
    """$LLMQ_HOME/state, or the user's state folder: what was typed, never models. It may not exist yet."""
    home = os.environ.get("LLMQ_HOME")
    return Path(home).absolute() / "state" if home else user_state_path("llmq")


def cache_root() -> Path:
    """Where compiled kernels are kept: $LLMQ_CACHE_DIR/kernels, or in the user's cache folder."""
    configured = os.environ.get("LLMQ_CACHE_DIR")
    return (Path(configured) if configured else user_cache_path("llmq")) / "kernels"


def make_private(folder: Path) -> Path:
    """Creates the folder, for this user only, unless it is there already."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder


def model_path(name: str) -> Path:
    """The file that a model of this name has in the store. UsageError where the name cannot be one."""
    if not NAME.fullmatch(name):
        raise UsageError(
            f"{name[:70]!a} is not a model name: use 1 to 64 letters, digits, dots, dashes and underscores, "
            "beginning with a letter or digit"
        )
    return models_dir() / (name + SUFFIX)


def new_model_path(name: str) -> Path:
    """model_path() of a model that is to come. UsageError also where the name is taken or is no file's everywhere."""
    path = model_path(name)
    if name == BUNDLED or RESERVED.fullmatch(name):
        why = "the name of the model that is part of llmq" if name == BUNDLED else "no name for a file everywhere"
        raise UsageError(f"{name} is {why}; give another with --name")
    return path


def resolve(name_or_path: str | os.PathLike[str]) -> Path:
    """The file meant by a name in the store, the bundled model's name, or a path to a .gguf file.

    A name may leave away the type that ends it, or give it behind a colon: mistral-7b and mistral-7b:q4_k_m are both
    mistral-7b-q4_k_m. UsageError where there is no such model, or several, and what to do instead.
    """
    text = os.fspath(name_or_path)
    if not text:
        raise UsageError("the model's name is empty; `llmq list` shows what is installed")
    if text == BUNDLED:
        return BUNDLED_PATH
    path = Path(text)
    is_path = text.endswith(SUFFIX) or path.name != text
    if not is_path and NAME.fullmatch(text) and model_path(text).is_file():
        return model_path(text)
    mode = _mode(path)
    if stat.S_ISDIR(mode):
        raise UsageError(f"{text[:120]!a} is a folder; make a model of it first with `llmq quantize`")
    if is_path and mode:
        return path
    if is_path:
        raise UsageError(f"there is no file {text[:120]!a}; check the path, or see `llmq list`")
    found = _by_type(text)
    if len(found) > 1:
        raise UsageError(f"{text[:70]!a} is here as {' and '.join(found)}; say which")
    if not found:
        raise UsageError(_unknown(text))
    return model_path(found[0])


def _by_type(text: str) -> list[str]:
    """Names in the store that are this one and a type behind it."""
    name, colon, kind = text.lower().partition(":")
    found = [(entry.name, TYPED.fullmatch(entry.name.lower())) for entry in installed()]
    return [each for each, match in found if match and match[1] == name and (not colon or match[2] == kind)]


def _mode(path: Path) -> int:
    """The file's mode, 0 where there is none: also for text that no system takes for a path."""
    try:
        return path.stat().st_mode
    except (OSError, ValueError):
        return 0


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name, [entry.name for entry in installed()], n=1)
    hint = f"did you mean {near[0]}?" if near else "`llmq list` shows what is installed, and `llmq pull` fetches more"
    return f"no model is named {name[:70]!a}; {hint}"


def installed() -> list[Entry]:
    """The bundled model, then those in the store by name; files that no name could mean are left out."""
    bundled = [Entry(BUNDLED, BUNDLED_PATH, BUNDLED_PATH.stat().st_size)] if BUNDLED_PATH.is_file() else []
    return bundled + [
        Entry(path.stem, path, path.stat().st_size)
        for path in sorted(models_dir().glob("*" + SUFFIX))
        if NAME.fullmatch(path.stem) and path.stem != BUNDLED and path.is_file()
    ]


def stored(name: str) -> Path:
    """The file of a model of the store, or the link in its place; UsageError where there is none of that name."""
    if name == BUNDLED:
        raise UsageError(f"{BUNDLED} is part of llmq and cannot be removed")
    path = model_path(name)
    if not path.is_file() and not path.is_symlink():
        raise UsageError(_unknown(name))
    return path


def remove(name: str) -> Entry:
    """Deletes a model of the store, of a link the link, and returns what it was.

    UsageError where there is none of that name.
    """
    path = stored(name)
    entry = Entry(name, path, path.lstat().st_size)
    path.unlink()
    return entry
