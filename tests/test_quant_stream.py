"""A file read as it arrives: its bytes, its sha256, no more of it in memory than the window, and an end to waiting."""

import hashlib
import random
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import pytest
from downloads import asked
from hub import Hub, serving, sha256
from hypothesis import given, settings
from hypothesis import strategies as st

from llmq import fetcher
from llmq.errors import NetworkError
from llmq.fetcher import Limits, Remote
from llmq.http import Request
from quant import stream as module
from quant.quantize import in_order
from quant.sha256 import Sha256
from quant.stream import Stream

CHUNK = 1 << 14
WINDOW = 8 * CHUNK
DATA = random.Random(3).randbytes(3_000_000)
QUICK = Limits(idle_seconds=0.4, slow_seconds=0.4, tries=3, first_wait=0.01, longest_wait=0.02)


@pytest.fixture(autouse=True, scope="module")
def small_chunks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for each in (fetcher, module):
            patch.setattr(each, "CHUNK", CHUNK)
        patch.setattr(module, "TICK_SECONDS", 0.01)
        yield


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    # Those of the hub end with it.
    assert not [each for each in set(threading.enumerate()) - before if "ThreadPool" in each.name]


class Watched(Stream):
    """Knows how many chunks it held at most."""

    most = 0

    def _put(self, index: int, data: memoryview) -> None:
        super()._put(index, data)
        self.most = max(self.most, len(self._chunks))


def opened(hub: Hub, data: bytes, start: int = 0, kept: str = "", marks: Sequence[int] = (), **more: Any) -> Watched:
    remote = Remote(Request(hub.add("org/model", "x.safetensors", data), {}, {}), len(data))
    return Watched(remote, start, kept, marks, **{"limits": QUICK, "window": WINDOW, **more})


def read_on(stream: Stream, data: bytes, start: int = 0, step: int = 20_000, threads: int = 3) -> None:
    """All from `start` on, as the quantizer reads: by several threads, some pieces ahead, released in order."""
    pieces = [(at, min(at + step, len(data))) for at in range(start, len(data), step)]
    with ThreadPoolExecutor(threads) as pool:
        results = in_order(pool, lambda piece: stream.read(*piece), iter(pieces), ahead=2 * threads)
        for (at, end), result in zip(pieces, results, strict=True):
            assert result == data[at:end]
            stream.release(end)


sizes = st.one_of(st.integers(1, 3 * CHUNK), st.integers(1, len(DATA)), st.integers(1, 100).map(lambda n: n * CHUNK))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_file_read_by_threads_from_anywhere_on(data: st.DataObject) -> None:
    file = DATA[: data.draw(sizes, "size")]
    marks = sorted(data.draw(st.sets(st.integers(1, len(file)), max_size=5), "marks"))
    start = data.draw(st.sampled_from([0, *(mark for mark in marks if mark < len(file))]), "start")
    before = Sha256()
    before.update(file[:start])
    kept = before.kept if start else ""
    window = CHUNK * data.draw(st.integers(2, 9), "chunks of the window")
    with serving() as hub, closing(opened(hub, file, start, kept, marks, window=window)) as stream:
        # As much as fits behind any byte: a chunk may begin before it.
        step = data.draw(st.integers(min(window - CHUNK, 5000), window - CHUNK), "step")
        read_on(stream, file, start, step, data.draw(st.integers(1, 4), "threads"))
        assert stream.sha256() == hashlib.sha256(file).hexdigest()
        for mark in [mark for mark in marks if mark >= start]:
            rest = Sha256(stream.state_at(mark))
            assert rest.n_bytes == mark
            rest.update(file[mark:])
            assert rest.hexdigest() == hashlib.sha256(file).hexdigest()
        assert stream.most <= window // CHUNK
        assert sorted(asked(hub)) == list(range(start // CHUNK, -(-len(file) // CHUNK)))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_reads_in_any_order_within_the_window(data: st.DataObject) -> None:
    file = DATA[: data.draw(sizes, "size")]
    released = 0
    with serving() as hub, closing(opened(hub, file)) as stream:
        for _ in range(data.draw(st.integers(1, 12), "steps")):
            most = min(released + WINDOW - CHUNK, len(file))
            start = data.draw(st.integers(released, most - 1), "start")
            end = data.draw(st.integers(start + 1, most), "end")
            assert stream.read(start, end) == file[start:end]
            released = data.draw(st.integers(released, min(end, len(file) - 1)), "released")
            stream.release(released)
        stream.release(len(file))
        assert stream.sha256() == hashlib.sha256(file).hexdigest()
        assert stream.most <= WINDOW // CHUNK


def test_what_is_beyond_the_window_is_waited_for(hub: Hub) -> None:
    with closing(opened(hub, DATA)) as stream, ThreadPoolExecutor(1) as pool:
        far = pool.submit(stream.read, len(DATA) - 10, len(DATA))
        assert stream.read(0, 10) == DATA[:10]
        assert not far.done()
        stream.release(len(DATA) - 10)
        assert far.result() == DATA[-10:]


FAULTS: list[tuple[str, dict[str, Any]]] = [
    ("cut", {"at": 1_700_001, "times": 2}),
    ("cut", {"times": 2}),
    ("rst", {"at": 1_500_000, "times": 2}),
    ("status", {"n": 503, "times": 2}),
    ("status", {"n": 429, "at": 2_000_000, "times": 1, "headers": {"Retry-After": "3600"}}),
    ("stall", {"at": 100_000, "times": 1}),
    ("trickle", {"at": 900_000, "times": 1, "n": 500}),
    ("hang_headers", {"times": 1}),
    ("wrong_range", {"at": 0, "times": 1}),
    ("short_len", {"at": 2_900_000, "times": 1}),
    ("ignore_range", {}),
]


@pytest.mark.parametrize(("fault", "how"), FAULTS)
@pytest.mark.parametrize("start", [0, 1_234_567])
def test_faults_on_the_way_change_nothing(hub: Hub, fault: str, how: dict[str, Any], start: int) -> None:
    before = Sha256()
    before.update(DATA[:start])
    stream = opened(hub, DATA, start, before.kept if start else "")
    fired = hub.fail(fault, **how)
    with closing(stream):
        read_on(stream, DATA, start)
        assert stream.sha256() == hashlib.sha256(DATA).hexdigest()
        assert stream.most <= WINDOW // CHUNK + 1  # the window may begin within a chunk
    assert fired.fired or fired.at is not None


def test_a_flipped_bit_shows_in_the_sha256(hub: Hub) -> None:
    hub.fail("flip", at=1_000_000, n=5, times=1)
    with closing(opened(hub, DATA)) as stream:
        stream.release(len(DATA))
        flipped = bytearray(DATA)
        flipped[1_000_000] ^= 1 << 5
        assert stream.sha256() == sha256(bytes(flipped))


def test_closing_ends_those_who_wait(hub: Hub) -> None:
    hub.fail("hang_headers")
    with ThreadPoolExecutor(4) as pool:
        with closing(opened(hub, DATA, marks=[5], limits=Limits())) as stream:
            waiting = [pool.submit(stream.read, 10, 20) for _ in range(2)]
            waiting += [pool.submit(stream.state_at, 5), pool.submit(stream.sha256)]
        assert [str(each.exception()) for each in waiting] == ["the stream is closed"] * 4


def test_a_server_that_is_gone_ends_all_who_wait(hub: Hub) -> None:
    with ThreadPoolExecutor(4) as pool, closing(opened(hub, DATA, marks=[2_000_000])) as stream:
        assert stream.read(0, 100) == DATA[:100]
        hub.fail("rst")
        stream.release(1_000_000)
        waiting = [pool.submit(stream.read, 1_500_000 + i, 1_500_010 + i) for i in range(2)]
        waiting += [pool.submit(stream.state_at, 2_000_000), pool.submit(stream.sha256)]
        errors = [each.exception() for each in waiting]
    assert [type(error) for error in errors] == [NetworkError] * 4
    assert "3 times in a row" in str(errors[0])


def test_what_waits_for_a_slow_reader_is_no_stall(hub: Hub) -> None:
    """Connections that wait for room are not given up, and nothing is fetched twice."""
    with closing(opened(hub, DATA)) as stream:
        read_on(stream, DATA, step=3000, threads=1)
        assert stream.sha256() == sha256(DATA)
    assert len(asked(hub)) == -(-len(DATA) // CHUNK)
