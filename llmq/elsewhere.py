"""The same file in other programs' folders: the Hugging Face cache and Ollama's models.

Both keep files under the sha256 of their content: `models--ORG--REPO/blobs/SHA256` (files of git-lfs) and
`blobs/sha256-SHA256`. Names there say what to look at; what a file is, only its content says.
"""

import errno
import json
import os
import re
import stat
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmq.errors import FileFormatError, UsageError, quoted
from llmq.files import SHA256, check_target, explained, open_regular, read_blocks, sha256_of, sync_folder
from llmq.part import PartFile, part_paths

# Where Ollama's Linux service keeps models.
OLLAMA_SERVICE = Path("/usr/share/ollama/.ollama/models")
OLLAMA_HOST, OLLAMA_USER, OLLAMA_TAG = "registry.ollama.ai", "library", "latest"
OLLAMA_PART = re.compile("[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
MODEL_LAYER = "application/vnd.ollama.image.model"
MANIFEST_LIMIT = 1 << 20
# What the system says where there can be no hard link.
NO_LINK = {errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}

OnBytes = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class OllamaModel:
    """A model by Ollama's name ("mistral:7b"), with the file that its manifest names; not yet checked."""

    name: str
    path: Path
    sha256: str
    n_bytes: int


def find_by_sha256(sha256: str, n_bytes: int, on_bytes: OnBytes | None = None) -> Path | None:
    """A file of this content in another program's folder, or None; its size is compared, then its content is read.

    A file counts only if it is a regular one that lies inside the folder, not behind a link that leads out of it.
    """
    if not SHA256.fullmatch(sha256):
        return None
    for root, path in _candidates(sha256):
        try:
            if _is_inside(root, path, n_bytes) and sha256_of(path, on_bytes, follow=False) == sha256:
                return path
        except (OSError, UsageError):
            continue  # another user's, or gone meanwhile
    return None


def link_or_copy(
    source: Path,
    target: Path,
    sha256: str = "",
    *,
    replace: bool = False,
    copy: bool = False,
    on_bytes: OnBytes | None = None,
) -> str:
    """Puts a file under another name: "linked" where the file is this user's and the file system allows a hard link,
    else "copied". The name appears when the file is whole and on disk. A source that is a link is refused; a target
    that is one is replaced, never followed.

    sha256: what a copy must turn out to be. replace: also where the name is taken. copy: never link.

    Raises UsageError (nothing to read, the name is taken), ResourceError (no room), FileFormatError (another sha256).
    """
    check_target(target)
    with explained(source, "read"):
        descriptor = open_regular(source, follow=False)
    try:
        status = os.fstat(descriptor)
        if not copy and _is_own(status) and _link(source, target, status, replace=replace):
            return "linked"
        _copy(descriptor, source, target, sha256, on_bytes, replace=replace)
        return "copied"
    finally:
        os.close(descriptor)


def find_gguf_models() -> list[OllamaModel]:
    """Models in Ollama's folders whose manifests can be read and whose files are there, by name."""
    found: dict[str, OllamaModel] = {}
    for root in _ollama_folders():
        for manifest in sorted((root / "manifests").glob("*/*/*/*")):
            model = _read_manifest(root, manifest)
            if model:
                found.setdefault(model.name, model)
    return sorted(found.values(), key=lambda model: model.name)


def find_ollama_model(name: str) -> OllamaModel:
    """The model that Ollama has under this name, with or without the tag. UsageError where it has none."""
    wanted = name if ":" in name else f"{name}:{OLLAMA_TAG}"
    models = find_gguf_models()
    for model in models:
        if model.name == wanted:
            return model
    known = ", ".join(model.name for model in models[:5]) or "none"
    raise UsageError(f"Ollama has no model {quoted(name)} here; found: {known}")


def _candidates(sha256: str) -> Iterator[tuple[Path, Path]]:
    """Folders, and where in them a file of this digest would be."""
    hub = _hub_cache()
    for path in sorted(hub.glob(f"models--*/blobs/{sha256}")):
        yield hub, path
    for root in _ollama_folders():
        yield root, root / "blobs" / f"sha256-{sha256}"


def _hub_cache() -> Path:
    """The Hugging Face cache, by the variables that its documentation names."""
    for name in "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE":
        if os.environ.get(name):
            return _expanded(os.environ[name])
    if os.environ.get("HF_HOME"):
        return _expanded(os.environ["HF_HOME"]) / "hub"
    return _expanded(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface" / "hub"


def _ollama_folders() -> list[Path]:
    configured = os.environ.get("OLLAMA_MODELS")
    folders = [_expanded(configured) if configured else _expanded("~/.ollama/models")]
    return [*folders, OLLAMA_SERVICE] if sys.platform == "linux" else folders


def _expanded(path: str) -> Path:
    return Path(os.path.abspath(os.path.expandvars(os.path.expanduser(path))))  # noqa: PTH100, PTH111


def _is_inside(root: Path, path: Path, n_bytes: int) -> bool:
    """Whether a regular file of this size is there, and its folder is within `root` when all links are followed."""
    status = path.lstat()
    folder = Path(os.path.realpath(path.parent))
    return stat.S_ISREG(status.st_mode) and status.st_size == n_bytes and folder.is_relative_to(os.path.realpath(root))


def _is_own(status: os.stat_result) -> bool:
    """What belongs to another user could be changed by them later, also under the name that we give it."""
    return not hasattr(os, "getuid") or status.st_uid == os.getuid()


def _link(source: Path, target: Path, status: os.stat_result, *, replace: bool) -> bool:
    """Whether `target` is now a name of the file that `status` tells of."""
    # To replace is to link under a name of our own and rename that; where it is in use, a copy sees to it.
    name = part_paths(target)[0] if replace else target
    with explained(target):
        if replace and _is_file(name, status):
            name.unlink()  # of an import that was killed here
        try:
            os.link(source, name, follow_symlinks=False)
        except FileExistsError:
            if replace:
                return False
            raise UsageError(_taken(target)) from None
        except OSError as error:
            if error.errno in NO_LINK:
                return False
            raise
        try:
            if not _is_file(name, status):
                raise UsageError(f"{quoted(source.name)} was replaced while it was read; try again")
            if replace:
                name.replace(target)
        except BaseException:
            name.unlink(missing_ok=True)
            raise
        sync_folder(target.parent)
    return True


def _is_file(path: Path, status: os.stat_result) -> bool:
    return os.path.lexists(path) and os.path.samestat(status, path.lstat())


def _copy(descriptor: int, source: Path, target: Path, sha256: str, on_bytes: OnBytes | None, *, replace: bool) -> None:
    if not replace and os.path.lexists(target):
        raise UsageError(_taken(target))
    part = PartFile(target, follow=False)
    part.open(b"", os.fstat(descriptor).st_size)
    try:
        with explained(source, "read"):
            for block in read_blocks(descriptor):
                part.write(block)
                if on_bytes:
                    on_bytes(len(block))
        if sha256 and part.sha256 != sha256:
            raise FileFormatError(f"{quoted(source.name)} is damaged: its sha256 is not {sha256}; get it again")
    except BaseException as error:
        part.leave(error)
        raise
    part.publish(new=not replace)


def _taken(target: Path) -> str:
    return f"there is a file {quoted(str(target), 120)} already; it was left"


def _read_manifest(root: Path, manifest: Path) -> OllamaModel | None:
    """The model of a manifest; None where anything in it is not as Ollama writes it, or the file is not there."""
    host, user, name, tag = manifest.relative_to(root / "manifests").parts
    if not all(OLLAMA_PART.fullmatch(part) for part in (host, user, name, tag)):
        return None
    try:
        descriptor = open_regular(manifest, follow=False)
        with os.fdopen(descriptor, "rb") as file:
            text = file.read(MANIFEST_LIMIT + 1)
        layer = _model_layer(json.loads(text)) if len(text) <= MANIFEST_LIMIT else None
        if layer is None:
            return None
        sha256, n_bytes = layer
        path = root / "blobs" / f"sha256-{sha256}"
        if not _is_inside(root, path, n_bytes):
            return None
    except (OSError, ValueError, RecursionError):
        return None
    # As Ollama shows it: its own host and the library of its own models go without saying.
    owner = [host, user] if host != OLLAMA_HOST else [user] if user != OLLAMA_USER else []
    return OllamaModel("/".join([*owner, name]) + f":{tag}", path, sha256, n_bytes)


def _model_layer(manifest: Any) -> tuple[str, int] | None:
    """Digest and size of the one layer with the weights."""
    layers = manifest.get("layers") if isinstance(manifest, dict) else None
    if not isinstance(layers, list):
        return None
    models = [layer for layer in layers if isinstance(layer, dict) and layer.get("mediaType") == MODEL_LAYER]
    if len(models) != 1:
        return None
    digest, n_bytes = models[0].get("digest"), models[0].get("size")
    if not isinstance(digest, str) or type(n_bytes) is not int or n_bytes < 1:
        return None
    sha256 = digest.removeprefix("sha256:")
    return (sha256, n_bytes) if digest.startswith("sha256:") and SHA256.fullmatch(sha256) else None
