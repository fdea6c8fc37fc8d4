"""Repositories of a Hugging Face hub: their files at a commit, of what size and sha256, and how to ask for them.

`HF_ENDPOINT` names another hub, `HF_TOKEN` or a login a token, which goes to that hub alone. The layout of answers:
https://huggingface.co/docs/hub/api.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from http.client import HTTPResponse
from typing import Any
from urllib.parse import quote, urlsplit

from llmq.answer import REFUSED, RetryError, check_answer, check_status
from llmq.ask import ask, read_body
from llmq.errors import FileFormatError, NetworkError, quoted
from llmq.fetcher import LIMITS, Limits, Remote
from llmq.files import SHA256
from llmq.http import Request, checked, host_of, is_private

TRUE = {"1", "true", "yes", "on"}
LISTING_LIMIT = 16 << 20
MOST_FILES, MOST_BYTES = 20_000, 1 << 44
ENDPOINT = "https://huggingface.co"
SHA1 = COMMIT = re.compile("[0-9a-f]{40}")
# Segments of a path in a repository; names that could lead elsewhere do not occur to us.
FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,254}(/[A-Za-z0-9_][A-Za-z0-9_.+-]{0,254}){0,7}")


@dataclass(frozen=True, slots=True)
class HubFile:
    """`sha256` is of large files' content, else "", and `blob` the sha1 of the git object that small ones are."""

    name: str
    n_bytes: int
    sha256: str
    blob: str


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A repository at a commit. Files whose names could not be files here are left out."""

    repo: str
    commit: str
    files: dict[str, HubFile]


def is_offline() -> bool:
    """Whether no connection may be opened: LLMQ_OFFLINE or HF_HUB_OFFLINE is 1, true, yes or on."""
    return any(os.environ.get(name, "").lower() in TRUE for name in ("LLMQ_OFFLINE", "HF_HUB_OFFLINE"))


def refuse_offline(what: str) -> None:
    if is_offline():
        raise NetworkError(f"{what} would need the network, and LLMQ_OFFLINE or HF_HUB_OFFLINE is set; unset it")


def endpoint() -> str:
    url = os.environ.get("HF_ENDPOINT", "").rstrip("/") or ENDPOINT
    if checked(url).username is not None:
        raise NetworkError("HF_ENDPOINT holds a login, which llmq does not send; put a token into HF_TOKEN")
    return url


def credentials() -> dict[str, str]:
    """The header that shows who is asking; none where there is no token, or where it could be read on its way."""
    from huggingface_hub import get_token

    token = get_token()
    if not token or not is_private(urlsplit(endpoint())):
        return {}
    if not token.isascii() or not token.isprintable():
        raise NetworkError("the token in HF_TOKEN or of the login holds characters that no token has; set it again")
    return {"Authorization": f"Bearer {token}"}


def snapshot(repo: str, revision: str = "", limits: Limits = LIMITS) -> Snapshot:
    """What a repository holds at a branch, tag or commit ("": its main branch).

    Raises NetworkError: offline, no such repository or revision, gated, no answer.
    """
    refuse_offline(f"asking about {repo}")
    url = f"{endpoint()}/api/models/{quote(repo)}/revision/{quote(revision or 'main', safe='')}?blobs=true"

    def take(answer: HTTPResponse) -> Snapshot:
        _check_access(answer, repo, revision)
        check_listing(answer, host_of(urlsplit(url)))
        return _parse(repo, read_body(answer, LISTING_LIMIT))

    return ask(Request(url, {"Accept": "application/json"}, credentials()), take, limits)


def file_url(repo: str, commit: str, name: str) -> str:
    return f"{endpoint()}/{quote(repo)}/resolve/{quote(commit, safe='')}/{quote(name)}"


def remote_file(found: Snapshot, file: HubFile) -> Remote:
    request = Request(file_url(found.repo, found.commit, file.name), {}, credentials())
    return Remote(request, file.n_bytes, file.sha256)


def read_small(found: Snapshot, name: str, limit: int, limits: Limits = LIMITS) -> bytes:
    """A whole file in memory, its hash checked.

    Raises FileFormatError where the repository does not have it or it is larger than `limit`, NetworkError where it
    cannot be had or arrives with another hash again and again.
    """
    file = found.files.get(name)
    if not file or file.n_bytes > limit:
        what = f"is larger than {limit >> 20} MiB" if file else "is not there"
        raise FileFormatError(f"{name} of {found.repo} {what}; is it a model's repository?")
    if not file.n_bytes:
        return b""
    request = remote_file(found, file).request

    def take(answer: HTTPResponse) -> bytes:
        _check_access(answer, found.repo, found.commit)
        check_answer(answer, host_of(urlsplit(request.url)), 0, file.n_bytes, file.n_bytes)
        data = read_body(answer, file.n_bytes)
        if not is_content(file, data):
            raise RetryError(f"{name} arrived damaged")
        return data

    return ask(request, take, limits)


def is_content(file: HubFile, data: bytes) -> bool:
    """Whether its hash is the file's: a sha256, or git's sha1 of a blob."""
    if file.sha256:
        return hashlib.sha256(data).hexdigest() == file.sha256
    blob = b"blob %d\0%b" % (len(data), data)
    return hashlib.sha1(blob, usedforsecurity=False).hexdigest() == file.blob


def check_listing(answer: HTTPResponse, host: str) -> None:
    check_status(answer, host)
    if answer.headers.get("Content-Encoding", "identity") != "identity":
        raise RetryError("it sends its list of files compressed, which was not asked for")


def _check_access(answer: HTTPResponse, repo: str, revision: str) -> None:
    """The hub says why not in a header; a repository that is not there looks like one that asks for a login."""
    status, code = answer.status, answer.headers.get("X-Error-Code", "")
    page = f"{endpoint()}/{repo}"
    if code == "GatedRepo":
        raise NetworkError(
            f"{repo} is gated: accept its terms at {page}, put a token of that account into HF_TOKEN (or run `hf auth "
            "login`), and run this again"
        )
    if status in REFUSED or code == "RepoNotFound":
        raise NetworkError(
            f"{repo} is not there, or not for everybody: check the name at {page}; for a private one put a token into "
            "HF_TOKEN"
        )
    if status == 404:
        what = f"revision {quoted(revision)}" if revision and code == "RevisionNotFound" else "such repository or file"
        raise NetworkError(f"{host_of(urlsplit(page))} has no {what} in {repo}; check the name at {page}")


def _parse(repo: str, body: bytes) -> Snapshot:
    try:
        content = json.loads(body)
        commit, siblings = content["sha"], content["siblings"]
        files = [_file(entry) for entry in siblings[:MOST_FILES]]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise NetworkError(f"the answer about {repo} is not a hub's; is HF_ENDPOINT right?") from error
    if not isinstance(commit, str) or not COMMIT.fullmatch(commit):
        raise NetworkError(f"the answer about {repo} names no commit; is HF_ENDPOINT right?")
    return Snapshot(repo, commit, {file.name: file for file in files if file})


def _file(entry: Mapping[str, Any]) -> HubFile | None:
    name, n_bytes, lfs = entry["rfilename"], entry.get("size"), entry.get("lfs") or {}
    sha256, blob = lfs.get("sha256") or "", entry.get("blobId") or ""
    if type(n_bytes) is not int or not 0 <= n_bytes <= MOST_BYTES:
        return None
    named = FILE_NAME.fullmatch(name) and ".." not in name
    hashed = SHA256.fullmatch(sha256) or (not sha256 and SHA1.fullmatch(blob))
    return HubFile(name, n_bytes, sha256, blob) if named and hashed else None
