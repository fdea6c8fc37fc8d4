"""What a hub is asked and told, and what is made of its answers, whoever gives them."""

import contextlib
import dataclasses
import hashlib
import json
import socketserver
import threading
from collections.abc import Iterator

import pytest
from hub import COMMIT, TOKEN, Answer, Hub, sha256
from hypothesis import given
from hypothesis import strategies as st

from llmq import ask, http
from llmq import hub as asked
from llmq.errors import FileFormatError, LlmqError, NetworkError
from llmq.fetcher import Limits
from llmq.hub import HubFile, Snapshot, credentials, endpoint, is_content, is_offline, read_small, snapshot

QUICK = Limits(idle_seconds=5.0, tries=3, first_wait=0.01, longest_wait=0.02)
CONFIG = b'{"model_type": "mistral"}'


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LLMQ_OFFLINE", "HF_HUB_OFFLINE", "HF_ENDPOINT", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)


@pytest.fixture
def here(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """A hub that is HF_ENDPOINT, with a small and a large file."""
    monkeypatch.setenv("HF_ENDPOINT", hub.url + "/")
    hub.add("org/model", "config.json", CONFIG)
    hub.add("org/model", "model.gguf", b"GGUF" * 100)
    hub.small.add("config.json")
    return hub


# ---- where, and by whom
@pytest.mark.parametrize("name", ["LLMQ_OFFLINE", "HF_HUB_OFFLINE"])
@pytest.mark.parametrize("value", ["1", "true", "YES", "on"])
def test_offline_opens_no_connection(here: Hub, monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    assert not is_offline()
    monkeypatch.setenv(name, value)
    assert is_offline()
    with pytest.raises(NetworkError, match="unset it"):
        snapshot("org/model", limits=QUICK)
    assert here.connections == []


@pytest.mark.parametrize("value", ["", "0", "no", "false", "off"])
def test_what_is_not_offline(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", value)
    assert not is_offline()


def test_the_endpoint_is_that_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert endpoint() == "https://huggingface.co"
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.example/mirror/")
    assert endpoint() == "https://hub.example/mirror"
    for wrong in ("hub.example", "ftp://hub.example", "https://", "https://a b", "file:///etc/passwd"):
        monkeypatch.setenv("HF_ENDPOINT", wrong)
        with pytest.raises(NetworkError, match="not an address"):
            endpoint()


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://huggingface.co", True),
        ("https://hub.example", True),
        ("http://127.0.0.1:8000", True),
        ("http://localhost", True),
        ("http://[::1]:80", True),
        ("http://hub.example", False),
        ("http://127.0.0.1.example", False),
        ("http://localhost.example", False),
    ],
)
def test_a_token_goes_where_nobody_reads_along(monkeypatch: pytest.MonkeyPatch, url: str, shown: bool) -> None:
    monkeypatch.setenv("HF_ENDPOINT", url)
    assert credentials() == ({"Authorization": f"Bearer {TOKEN}"} if shown else {})
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert credentials() == {}


@pytest.mark.parametrize("token", ["hf_\u00e9", "hf_a\r\nX-Other: 1", "hf_\x00"])
def test_a_token_that_is_none_is_refused_and_not_shown(monkeypatch: pytest.MonkeyPatch, token: str) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: token)
    with pytest.raises(NetworkError) as refused:
        credentials()
    assert "hf_" not in str(refused.value)


def test_the_token_goes_to_the_hub_and_not_to_where_it_sends_on(here: Hub) -> None:
    found = snapshot("org/model", limits=QUICK)
    assert read_small(found, "config.json", 1000, QUICK) == CONFIG
    assert read_small(found, "model.gguf", 1000, QUICK) == b"GGUF" * 100
    home = [seen for seen in here.seen if not seen.path.startswith("/cdn/")]
    assert [seen.path.partition("/")[2].partition("/")[0] for seen in home] == ["api", "org", "org"]
    assert all(seen.headers["authorization"] == f"Bearer {TOKEN}" for seen in home)
    assert len(here.seen) == 4  # the fixture looks at what the other name was told


@pytest.mark.usefixtures("here")
def test_a_proxy_is_not_asked_for_what_is_on_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    assert snapshot("org/model", limits=QUICK).commit == COMMIT
    assert http.proxy_of(http.checked("http://hub.example/")) is not None
    monkeypatch.setenv("no_proxy", "hub.example")
    assert http.proxy_of(http.checked("http://hub.example/")) is None


# ---- what a repository holds
def test_a_snapshot_has_files_by_name_with_what_vouches_for_them(here: Hub) -> None:
    found = snapshot("org/model", "v1.0", QUICK)
    assert here.seen[0].path == "/api/models/org/model/revision/v1.0?blobs=true"
    assert (found.repo, found.commit) == ("org/model", COMMIT)
    blob = hashlib.sha1(b"blob 25\0" + CONFIG).hexdigest()
    assert found.files == {
        "config.json": HubFile("config.json", 25, "", blob),
        "model.gguf": HubFile("model.gguf", 400, sha256(b"GGUF" * 100), found.files["model.gguf"].blob),
    }


def test_a_revision_with_slashes_is_one_part_of_the_address(here: Hub) -> None:
    with pytest.raises(NetworkError):
        snapshot("org/model", "refs/pr/1", QUICK)
    assert here.seen[0].path == "/api/models/org/model/revision/refs%2Fpr%2F1?blobs=true"


GATED = {"X-Error-Code": "GatedRepo"}


@pytest.mark.parametrize(
    ("status", "headers", "revision", "said", "requests"),
    [
        (401, GATED, "", "org/model is gated: accept its terms at ", 1),
        (403, GATED, "", "HF_TOKEN", 1),
        (401, {}, "", "is not there, or not for everybody", 1),
        (401, {"X-Error-Code": "RepoNotFound"}, "", "check the name", 1),
        (403, {}, "", "for a private one put a token into HF_TOKEN", 1),
        (404, {"X-Error-Code": "RepoNotFound"}, "", "is not there", 1),
        (404, {}, "", "no such repository", 1),
        (404, {"X-Error-Code": "RevisionNotFound"}, "v9", "no revision 'v9'", 1),
        (410, {}, "", "no such file", 1),
        (429, {}, "", "429", 3),
        (500, {}, "", "500", 3),
        (503, {"Retry-After": "0"}, "", "503", 3),
        (504, {}, "", "3 times in a row; try again later", 3),
        (200, {"Content-Encoding": "gzip"}, "", "compressed", 3),
        (302, {"Location": "/api/models/org/model/revision/main?blobs=true"}, "", "without end", 6),
    ],
)
def test_a_hub_that_says_no(
    here: Hub, status: int, headers: dict[str, str], revision: str, said: str, requests: int
) -> None:
    here.fail("status", n=status, where="^/api/", headers=headers)
    with pytest.raises(NetworkError) as refused:
        snapshot("org/model", revision, QUICK)
    assert said in str(refused.value)
    assert TOKEN not in str(refused.value)
    assert refused.value.exit_code == 5
    assert len(here.seen) == requests


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_hub_that_is_busy_is_asked_again_when_it_says(
    here: Hub, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(ask.time, "sleep", waits.append)
    here.fail("status", n=status, where="^/api/", headers={"Retry-After": "7"}, times=2)
    assert snapshot("org/model", limits=Limits(tries=3, first_wait=0.01, longest_wait=60)).commit == COMMIT
    assert waits == [7.0, 7.0]


def test_a_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(NetworkError, match=r"cannot be reached .* 3 times in a row"):
        snapshot("org/model", limits=dataclasses.replace(QUICK, tries=6))


@pytest.mark.parametrize("way", ["cut", "rst", "short_len"])
def test_a_listing_that_breaks_off_is_asked_for_again(here: Hub, way: str) -> None:
    here.fail(way, where="^/api/", times=1, at=0 if way != "short_len" else None)
    if way == "short_len":
        with pytest.raises(NetworkError, match="not a hub's"):
            snapshot("org/model", limits=QUICK)
        return
    assert snapshot("org/model", limits=QUICK).commit == COMMIT


# ---- answers that are not what they should be
GOOD = {"rfilename": "model.gguf", "size": 400, "blobId": "0" * 40, "lfs": {"sha256": "a" * 64, "size": 400}}
HOSTILE_NAMES = [
    "../model.gguf", "../../etc/passwd", "/etc/passwd", "a/../../b.gguf", "a/..", "..", ".", "", "/", "a//b.gguf",
    "a/", "./a.gguf", ".hidden.gguf", "a/.git/config", "~/a.gguf", "C:\\a.gguf", "a\\b.gguf", "a\0b.gguf", "a\nb.gguf",
    "a\x1b[2Jb.gguf", "\u202egguf.exe", "a b.gguf", "-rf.gguf", "a" * 256, "a/" * 9 + "b.gguf", "%2e%2e/a.gguf",
    "a?b.gguf", "a#b.gguf", "a:b.gguf", "a*b", "$(id).gguf", "`id`.gguf", "a;b.gguf", "a|b", "\u00e9.gguf", "\ud800",
    "a..b.gguf",
]  # fmt: skip


def listed(here: Hub, body: bytes) -> Snapshot:
    here.answer = lambda _url, _wanted: json_answer(body)  # type: ignore[method-assign]
    return snapshot("org/model", limits=QUICK)


def json_answer(body: bytes) -> Answer:
    return Answer(200, {"Content-Length": str(len(body)), "Content-Type": "application/json"}, body=body)


def entries(here: Hub, *siblings: object) -> dict[str, HubFile]:
    return listed(here, json.dumps({"sha": COMMIT, "siblings": siblings}).encode()).files


@pytest.mark.parametrize("name", HOSTILE_NAMES, ids=ascii)
def test_a_name_that_could_lead_elsewhere_is_no_file(here: Hub, name: str) -> None:
    assert list(entries(here, GOOD | {"rfilename": name}, GOOD)) == ["model.gguf"]


@pytest.mark.parametrize(
    "change",
    [
        {"size": -1}, {"size": 1 << 60}, {"size": 10**4000}, {"size": None}, {"size": "400"}, {"size": True},
        {"size": 4.0}, {"lfs": {"sha256": "a" * 63}}, {"lfs": {"sha256": "A" * 64}}, {"lfs": None, "blobId": None},
        {"lfs": None, "blobId": "0" * 39}, {"lfs": None, "blobId": "x" * 40}, {"lfs": {}, "blobId": ""},
    ],
    ids=lambda change: str(change)[:40],
)  # fmt: skip
def test_a_file_without_size_or_hash_is_none(here: Hub, change: dict[str, object]) -> None:
    assert entries(here, GOOD | change | {"rfilename": "other.gguf"}, GOOD).keys() == {"model.gguf"}


@pytest.mark.parametrize(
    "body",
    [
        b"", b"null", b"[]", b"{}", b"not JSON", b"<html>", b"\xff\xfe", b"\x1f\x8b", b"[" * 100_000, b'{"sha": 1',
        b'{"sha": "' + COMMIT.encode() + b'"}',
        *(
            json.dumps({"sha": commit, "siblings": []}).encode()
            for commit in (None, 1, "main", "../..", COMMIT.upper(), COMMIT[:-1], COMMIT + "\n")
        ),
        *(
            json.dumps({"sha": COMMIT, "siblings": siblings}).encode()
            for siblings in (None, 1, "abc", {}, [1], ["a"], [None], [[]], [{}], [GOOD | {"lfs": 1}],
                             [GOOD | {"lfs": {"sha256": 1}}], [GOOD | {"rfilename": 1}], [GOOD | {"rfilename": None}],
                             [GOOD | {"lfs": None, "blobId": 1}])
        ),
    ],
    ids=lambda body: str(body[:60]),
)  # fmt: skip
def test_an_answer_that_is_no_listing_is_one_sentence(here: Hub, body: bytes) -> None:
    with pytest.raises(NetworkError, match="is HF_ENDPOINT right"):
        listed(here, body)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*GOOD, "sha256", "x"]), inner),
    max_leaves=8,
)


@given(st.lists(json_values, max_size=3))
def test_any_siblings_give_files_or_a_sentence(siblings: list[object]) -> None:
    body = json.dumps({"sha": COMMIT, "siblings": siblings}).encode()
    with contextlib.suppress(NetworkError):
        assert all(asked.FILE_NAME.fullmatch(name) for name in asked._parse("org/model", body).files)


def test_a_million_files_are_not_all_looked_at(here: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asked, "MOST_FILES", 5)
    siblings = [GOOD | {"rfilename": f"model-{n}.gguf"} for n in range(50)]
    assert len(entries(here, *siblings)) == 5


@contextlib.contextmanager
def endless(head: bytes) -> Iterator[tuple[str, list[int]]]:
    """A server that sends `head`, and then a gigabyte in pieces; how many bytes it got rid of."""
    sent: list[int] = []

    class Endless(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(1 << 16)
            with contextlib.suppress(OSError):
                self.request.sendall(head)
                for _ in range(1 << 12):
                    self.request.sendall(b"40000\r\n" + b"[" * (1 << 18) + b"\r\n")
                    sent.append(1 << 18)

    with socketserver.TCPServer(("127.0.0.1", 0), Endless) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}", sent
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    "how",
    [b"Content-Length: 1073741824\r\n", b"Transfer-Encoding: chunked\r\n", b""],
    ids=["told", "chunked", "untold"],
)
def test_a_gigabyte_of_listing_is_not_read(monkeypatch: pytest.MonkeyPatch, how: bytes) -> None:
    with endless(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n" + how + b"\r\n") as (url, sent):
        monkeypatch.setenv("HF_ENDPOINT", url)
        with pytest.raises(NetworkError, match="longer than 16 MiB"):
            snapshot("org/model", limits=QUICK)
    assert sum(sent) < 64 << 20


# ---- small files
def test_a_hash_is_that_of_the_content_or_of_its_git_object() -> None:
    # git hash-object of a file with "hello\n"
    blob = "ce013625030ba8dba906f756967f9e9ca394464a"
    assert is_content(HubFile("a", 6, "", blob), b"hello\n")
    assert not is_content(HubFile("a", 6, "", blob), b"hello!")
    large = HubFile("a", 6, "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03", "")
    assert is_content(large, b"hello\n")
    assert not is_content(large, b"hello!")


@pytest.mark.parametrize("name", ["config.json", "model.gguf"])
def test_a_small_file_that_arrives_damaged_is_read_again(here: Hub, name: str) -> None:
    found = snapshot("org/model", limits=QUICK)
    right = here.repos["org/model"][name]
    where = f"{'/cdn' if name == 'model.gguf' else '^'}/org/model/"
    here.fail("flip", at=3, where=where, times=1)
    assert read_small(found, name, 1000, QUICK) == right
    for way in ("flip", "cut", "html", "gzip_bomb", "lfs_ptr", "long", "short_len"):
        here.reset()
        here.fail(way, at=3, where=where)
        with pytest.raises(LlmqError) as refused:
            read_small(found, name, 1000, QUICK)
        assert refused.value.exit_code == 5, way


def test_a_small_file_that_is_too_large_or_not_there_is_not_asked_for(here: Hub) -> None:
    found = snapshot("org/model", limits=QUICK)
    here.reset()
    with pytest.raises(FileFormatError, match="is not there"):
        read_small(found, "tokenizer.model", 1000, QUICK)
    with pytest.raises(FileFormatError, match="larger than"):
        read_small(found, "model.gguf", 399, QUICK)
    empty = Snapshot("org/model", COMMIT, {"empty": HubFile("empty", 0, "", "0" * 40)})
    assert read_small(empty, "empty", 10, QUICK) == b""
    assert here.seen == []


@pytest.mark.parametrize(("status", "headers"), [(401, GATED), (403, {}), (404, {}), (503, {})])
def test_a_small_file_that_is_refused(here: Hub, status: int, headers: dict[str, str]) -> None:
    found = snapshot("org/model", limits=QUICK)
    here.fail("status", n=status, where="config.json", headers=headers)
    with pytest.raises(NetworkError) as refused:
        read_small(found, "config.json", 1000, QUICK)
    assert TOKEN not in str(refused.value)
    assert ("gated" in str(refused.value)) == bool(headers)
