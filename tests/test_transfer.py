"""Whatever a server does to a file on its way: it arrives right, or not at all and with a sentence; never wrong."""

import dataclasses
import itertools
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from downloads import leave
from hub import TOKEN, Hub, sha256

from llmq import transfer
from llmq.errors import FileFormatError, LlmqError, NetworkError
from llmq.fetcher import CHUNK, Fetcher, Limits, Remote
from llmq.http import Request
from llmq.part import part_paths
from llmq.transfer import Progress, fetch

# Two requests; the last chunk is shorter than others.
SIZE = 5 * CHUNK + 12345
DATA = random.Random(1).randbytes(SIZE)
PLACES = {"first byte": 0, "1 %": SIZE // 100, "half": SIZE // 2, "last byte": SIZE - 1}
QUICK = Limits(idle_seconds=0.4, slow_seconds=0.4, tries=3, first_wait=0.01, longest_wait=0.02)
RIGHT = None


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "TICK_SECONDS", 0.01)


def remote(hub: Hub, data: bytes = DATA, **arguments: Any) -> Remote:
    url = hub.add("org/model", "model.gguf", data)
    request = Request(url, {}, {"Authorization": f"Bearer {TOKEN}"})
    return Remote(request, len(data), **{"sha256": sha256(data), **arguments})


def run(file: Remote, target: Path, limits: Limits = QUICK) -> list[Progress]:
    """To the end, with no more steps than a minute has."""
    steps = list(itertools.islice(fetch(file, target, limits), 6000))
    assert steps[-1].sha256
    return steps


def check(
    file: Remote, target: Path, expected: type[LlmqError] | None, data: bytes = DATA, limits: Limits = QUICK
) -> None:
    """The file and nothing beside it; or the error, and no file."""
    if not expected:
        assert run(file, target, limits)[-1].sha256 == sha256(data)
        assert target.read_bytes() == data
        assert [path.name for path in target.parent.iterdir()] == [target.name]
        return
    with pytest.raises(expected) as caught:
        run(file, target, limits)
    assert caught.value.exit_code == expected.exit_code
    assert TOKEN not in str(caught.value)
    assert not target.exists()
    if expected is FileFormatError:
        assert not list(target.parent.iterdir())


# A fault, what it leads to when it happens once, and when it happens again and again.
CASES = {
    "cut": ({}, RIGHT, NetworkError),
    "rst": ({}, RIGHT, NetworkError),
    "stall": ({}, RIGHT, NetworkError),
    "trickle": ({"n": 500}, RIGHT, NetworkError),
    "status 429, seconds": ({"n": 429, "headers": {"Retry-After": "3600"}}, RIGHT, NetworkError),
    "status 503, date": ({"n": 503, "headers": {"Retry-After": "Fri, 31 Dec 2099 23:59:59 GMT"}}, RIGHT, NetworkError),
    "status 500, nonsense": ({"n": 500, "headers": {"Retry-After": "1 Jan 99999 00:00:00 GMT"}}, RIGHT, NetworkError),
    "status 416": ({"n": 416}, RIGHT, NetworkError),
    "status 204": ({"n": 204}, RIGHT, NetworkError),
    "wrong_range": ({}, RIGHT, NetworkError),
    "shift": ({"n": 7}, RIGHT, FileFormatError),
    "flip": ({"n": 3}, RIGHT, FileFormatError),
    "short_len": ({}, RIGHT, NetworkError),
    "no_len": ({}, RIGHT, NetworkError),
    "long": ({}, RIGHT, NetworkError),
    "truncated": ({}, RIGHT, NetworkError),
    "gzip_bomb": ({}, RIGHT, NetworkError),
    "lfs_ptr": ({}, RIGHT, NetworkError),
    "html": ({}, NetworkError, NetworkError),
    "hang_headers": ({}, RIGHT, NetworkError),
    "drip_headers": ({"n": 100}, RIGHT, NetworkError),
    "new_etag": ({}, RIGHT, RIGHT),  # the sha256 alone says what belongs together
}


# Those that take the time that is waited for them.
WAITING = {"stall", "trickle", "hang_headers", "drip_headers"}


def cases() -> Iterator[Any]:
    for case, place in itertools.product(CASES, PLACES):
        long = case in WAITING and place != "half"
        yield pytest.param(case, place, marks=[pytest.mark.slow] if long else [])


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("case", "place"), list(cases()))
def test_faults(hub: Hub, tmp_path: Path, case: str, place: str) -> None:
    arguments, once, ever = CASES[case]
    name = re.split("[ ,]", case)[0]
    if (name, place) == ("trickle", "last byte"):
        ever = RIGHT
    file = remote(hub)
    fault = hub.fail(name, at=PLACES[place], times=1, **arguments)
    (tmp_path / "once").mkdir()
    check(file, tmp_path / "once" / "model.gguf", once)
    assert fault.fired == 1
    hub.reset()
    fault = hub.fail(name, at=PLACES[place], **arguments)
    (tmp_path / "ever").mkdir()
    target = tmp_path / "ever" / "model.gguf"
    check(file, target, ever, limits=dataclasses.replace(QUICK, connections=1 if name in WAITING else 4))
    assert fault.fired >= 1
    if ever is NetworkError:
        kept = sum(path.exists() for path in part_paths(target))
        hub.faults.clear()
        steps = run(file, target)
        assert target.read_bytes() == DATA
        assert bool(steps[0].resumed) == bool(kept)


def test_parts_that_never_come_end_it(hub: Hub, tmp_path: Path) -> None:
    """However many connections try at the same time, a round of failures counts once."""
    data = random.Random(2).randbytes(20 * CHUNK)
    file = remote(hub, data)
    for missing, requests in (({9}, QUICK.tries), ({3, 9, 15}, 3 * QUICK.tries)):
        target = tmp_path / f"{len(missing)}.gguf"
        leave(file, target, data, set(range(20)) - missing)
        fault = hub.fail("rst")
        with pytest.raises(NetworkError):
            run(file, target)
        assert QUICK.tries <= fault.fired <= requests
        hub.faults.clear()


def test_after_a_failure_the_hub_is_asked_for_another_way(hub: Hub, tmp_path: Path) -> None:
    hub.fail("rst", at=SIZE - 1, times=1)
    check(remote(hub), tmp_path / "model.gguf", RIGHT, limits=dataclasses.replace(QUICK, connections=1))
    assert sum(not seen.path.startswith("/cdn/") for seen in hub.seen) == 2


def test_slow_is_not_stalled(hub: Hub, tmp_path: Path) -> None:
    """100 kB in about two seconds, from a server that would be left if it sent less than 10 kB in each half."""
    hub.fail("trickle", at=0, n=50_000)
    limits = dataclasses.replace(QUICK, slow_seconds=0.5, slow_bytes=10_000, tries=1)
    check(remote(hub, DATA[:100_000]), tmp_path / "model.gguf", RIGHT, DATA[:100_000], limits)


@pytest.mark.parametrize("status", [401, 403, 404, 410, 451])
@pytest.mark.parametrize("where", ["^/org/", "^/cdn/"])
def test_what_may_not_be_had_is_not_asked_for_again(hub: Hub, tmp_path: Path, where: str, status: int) -> None:
    fault = hub.fail("status", n=status, where=where, headers={"X-Error-Code": "GatedRepo"})
    check(remote(hub), tmp_path / "model.gguf", NetworkError)
    assert fault.fired == 1
    assert not list(tmp_path.iterdir())


def test_an_address_that_ran_out_is_asked_for_anew(hub: Hub, tmp_path: Path) -> None:
    fault = hub.fail("status", n=403, at=SIZE - 1, times=1)
    check(remote(hub), tmp_path / "model.gguf", RIGHT, limits=dataclasses.replace(QUICK, connections=1))
    assert fault.fired == 1
    assert sum(not seen.path.startswith("/cdn/") for seen in hub.seen) == 2


def test_another_version_under_the_same_name(hub: Hub, tmp_path: Path) -> None:
    """Where no sha256 is known, the ETag is what tells."""
    hub.fail("new_etag", at=SIZE - 1)
    check(remote(hub, sha256="", etag=f'"{sha256(DATA)}"'), tmp_path / "model.gguf", NetworkError)


NOWHERE = ["LOOP", "", "file:///etc/passwd", "ftp://127.0.0.1/x", "http://[::1", "//", "http://a b/", "http://\u00e9/"]


@pytest.mark.parametrize("target", NOWHERE)
def test_redirects_that_lead_nowhere(hub: Hub, tmp_path: Path, target: str) -> None:
    file = remote(hub)
    hub.fail("onward", where="^/org/", headers={"Location": target.replace("LOOP", file.request.url)})
    check(file, tmp_path / "model.gguf", NetworkError)
    assert len(hub.seen) <= 18


def test_servers_without_ranges(hub: Hub, tmp_path: Path) -> None:
    hub.fail("ignore_range")
    check(remote(hub), tmp_path / "model.gguf", RIGHT)
    assert [seen.status for seen in hub.answers()] == [200]


def test_ranges_that_are_ignored_later(hub: Hub, tmp_path: Path) -> None:
    hub.fail("ignore_range", at=SIZE - 1, times=2)
    check(remote(hub), tmp_path / "model.gguf", RIGHT)
    hub.reset()
    hub.fail("ignore_range", at=SIZE - 1)
    check(remote(hub), tmp_path / "other.gguf", NetworkError)


def corruptions() -> Iterator[tuple[str, int, int]]:
    rng = random.Random(2)
    for _ in range(100):
        yield "flip", rng.randrange(SIZE), rng.randrange(8)
    for _ in range(20):
        yield "shift", rng.randrange(4 * CHUNK, SIZE), rng.choice([-CHUNK, -16, -1, 1, 7, 4096, CHUNK])


def test_120_corruptions(hub: Hub, tmp_path: Path) -> None:
    """100 single bits, and 20 right-looking answers with what lies elsewhere in the file: each is caught."""
    file, target, caught = remote(hub), tmp_path / "model.gguf", 0
    for name, at, n in corruptions():
        hub.reset()
        fault = hub.fail(name, at=at, n=n, times=1)
        check(file, target, RIGHT)
        caught += fault.fired == 1 and hub.n_sent() == 2 * SIZE
        target.unlink()
    assert caught == 120


@pytest.mark.parametrize("n_bytes", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 5 * CHUNK])
def test_sizes(hub: Hub, tmp_path: Path, n_bytes: int) -> None:
    data = DATA[:n_bytes]
    check(remote(hub, data), tmp_path / "model.gguf", RIGHT, data)
    assert sum(seen.stop - seen.start for seen in hub.answers()) == n_bytes


def test_without_a_sha256(hub: Hub, tmp_path: Path) -> None:
    check(remote(hub, sha256=""), tmp_path / "model.gguf", RIGHT)


def test_the_token_goes_to_the_hub_alone(hub: Hub, tmp_path: Path) -> None:
    run(remote(hub), tmp_path / "model.gguf")
    told = {TOKEN in seen.headers.get("authorization", ""): seen.path.split("/")[1] for seen in hub.seen}
    assert told == {True: "org", False: "cdn"}


def test_connections_are_kept(hub: Hub, tmp_path: Path) -> None:
    run(remote(hub), tmp_path / "model.gguf", dataclasses.replace(QUICK, connections=1))
    assert len(hub.answers()) == 2
    assert len(hub.connections) == 2  # one to each host


def test_a_lock_that_an_interrupt_left_held_does_not_keep_it_from_closing(hub: Hub) -> None:
    """As where Ctrl-C comes just behind the taking of it."""
    file = remote(hub)
    fetcher = Fetcher(file, lambda _index, _data: None, QUICK)
    fetcher.ask_for(range(file.n_chunks))
    for _ in range(2):
        fetcher.changed.acquire()
    fetcher.watch()
    fetcher.close()
    assert fetcher.stopped
