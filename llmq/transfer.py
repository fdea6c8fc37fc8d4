"""Fetching one file: ranges over several connections into a ledger, and its sha256 before it has its name.

Workers take spans of chunks and put them into the ledger as they come; a checker follows behind, in order, with the
sha256 of what is on disk. What fails is asked for again, with growing pauses, for as long as now and then a chunk
arrives. The first answer decides whether there will be several connections: a server that ignores ranges gets one.
"""

import dataclasses
import hashlib
import random
import threading
import time
import zlib
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPResponse
from pathlib import Path
from urllib.parse import urlsplit

from llmq.answer import GONE, REFUSED, RetryError, check_answer, reason
from llmq.errors import FileFormatError, NetworkError
from llmq.gguf_header import quoted
from llmq.http import BROKEN, Line, Request, host_of
from llmq.ledger import CHUNK, Ledger

# Chunks of one request: few enough that connections end together, many enough that asking costs little.
LEAST_SPAN, MOST_SPAN, SPANS_EACH = 4, 32, 4
READ_BYTES = 1 << 18
TICK_SECONDS = 0.1
WAIT_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Limits:
    """When patience ends: a connection without a byte, or with fewer than `slow_bytes`, for so many seconds; a worker
    after so many `tries` in which nothing arrived, with pauses from `first_wait` seconds to `longest_wait`."""

    connections: int = 4
    idle_seconds: float = 30.0
    slow_seconds: float = 60.0
    slow_bytes: int = 60 << 10
    tries: int = 6
    first_wait: float = 0.5
    longest_wait: float = 60.0


LIMITS = Limits()


@dataclass(frozen=True, slots=True)
class Remote:
    """A file elsewhere: how to ask for it, its size, and its sha256; "" where nobody tells it, then `etag` stands for
    the content as well as it can."""

    request: Request
    n_bytes: int
    sha256: str = ""
    etag: str = ""

    @property
    def key(self) -> str:
        """The same for two downloads whose parts belong together."""
        return self.sha256 or hashlib.sha256(f"{self.request.url} {self.etag}".encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Progress:
    """`n_bytes` of `total` are there, `resumed` of them from before. `holder` is a process that is waited for (0: one
    that is not known), `trouble` what went wrong last and is tried again; `sha256` comes with the last one, when the
    file has its name."""

    n_bytes: int
    total: int
    resumed: int
    holder: int | None = None
    trouble: str = ""
    sha256: str = ""


def fetch(remote: Remote, target: Path, limits: Limits = LIMITS) -> Generator[Progress]:
    """Fetches a file to `target`, which is untouched until all of it is there and right; yields several times a second.

    Closed early, or killed, it leaves what it has to the next call for the same content. Where another process fetches
    the same, it waits for that to end, and takes over if it dies.

    Raises NetworkError (nothing arrives, access, not found), FileFormatError (the sha256 differs twice), UsageError and
    ResourceError (the target).
    """
    ledger, waited = Ledger(target, remote.key, remote.n_bytes), False
    while (found := ledger.try_open()) is None:
        waited = True
        yield Progress(0, remote.n_bytes, 0, holder=ledger.holder())
        time.sleep(WAIT_SECONDS)
    if waited and remote.sha256 and target.is_file() and file_sha256(target) == remote.sha256:
        ledger.discard()
        yield Progress(remote.n_bytes, remote.n_bytes, remote.n_bytes, sha256=remote.sha256)
        return
    yield from Transfer(remote, ledger, found, limits).run()


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(slots=True, eq=False)
class Worker:
    """A connection and what it is doing: bytes of the request it waits for, since when (0: none)."""

    line: Line
    n_bytes: int = 0
    since: float = 0.0


class Transfer:
    """One download under way. `_changed` guards everything below it."""

    def __init__(self, remote: Remote, ledger: Ledger, found: dict[int, int], limits: Limits) -> None:
        self._remote, self._ledger, self._limits = remote, ledger, limits
        self._changed = threading.Condition()
        self._done = set(found)
        self._doubtful = dict(found)  # CRCs of what an earlier run left, until checked
        self._todo = spans(set(range(ledger.n_chunks)) - self._done, limits.connections)
        self._resumed = sum(map(ledger.chunk_bytes, found))
        self._n_bytes = self._resumed
        self._workers: list[Worker] = []
        self._final_url = ""  # where the first answer came from: asked directly from then on
        self._ranged: bool | None = None  # None: nobody has answered yet
        self._stopped = False
        self._trouble = ""
        self._arrivals = 0
        self._sha256 = ""

    def run(self) -> Generator[Progress]:
        with ThreadPoolExecutor(self._limits.connections + 1) as pool:
            try:
                running = [pool.submit(self._check)]
                if self._todo:
                    running.append(pool.submit(self._work))
                yield from self._follow(pool, running)
            finally:
                with self._changed:
                    self._stopped = True
                    self._changed.notify_all()
                for worker in self._workers:
                    worker.line.abort()
                pool.shutdown()
                if not self._sha256:  # which comes when all of it has its name
                    self._leave()
        yield dataclasses.replace(self._progress(), sha256=self._sha256)

    def _follow(self, pool: ThreadPoolExecutor, running: list[Future[None]]) -> Generator[Progress]:
        """Until all have ended; more workers come when the first answer shows that there is work for them."""
        wanted = self._limits.connections + 1
        while not running[0].done():
            yield self._progress()
            with self._changed:
                self._changed.wait(TICK_SECONDS)
                more = wanted - len(running) if self._ranged else 0
            running += [pool.submit(self._work) for _ in range(min(more, len(self._todo)))]
            self._abort_slow()
            for each in running:
                if each.done():
                    each.result()
        running[0].result()

    def _leave(self) -> None:
        if self._done:
            self._ledger.close()
        else:
            self._ledger.discard()

    def _progress(self) -> Progress:
        return Progress(self._n_bytes, self._remote.n_bytes, self._resumed, trouble=self._trouble)

    def _abort_slow(self) -> None:
        now = time.monotonic()
        for worker in self._workers:
            if worker.since and now - worker.since >= self._limits.slow_seconds:
                if worker.n_bytes < self._limits.slow_bytes:
                    worker.line.abort()
                worker.since, worker.n_bytes = now, 0

    # ---- the checker
    def _check(self) -> None:
        """Follows the workers; a file that is not what it should be is fetched once more."""
        for _ in range(2):
            digest = self._digest()
            if digest is None:
                return
            if digest == (self._remote.sha256 or digest):
                self._ledger.publish()
                with self._changed:
                    self._sha256, self._stopped = digest, True
                    self._changed.notify_all()
                return
            self._begin_again(f"has the sha256 {digest[:12]}... instead of {self._remote.sha256[:12]}...")
        with self._changed:
            self._done.clear()
        raise FileFormatError(
            f"{quoted(self._ledger.target.name)} is not what {self._host()} says it is: its sha256 differed twice; "
            "try another network, or report it to those who publish it"
        )

    def _digest(self) -> str | None:
        """Of all chunks as they are on disk, waiting for each; None where everything is stopped before."""
        space, digest, index = memoryview(bytearray(CHUNK)), hashlib.sha256(), 0
        while index < self._ledger.n_chunks:
            with self._changed:
                while index not in self._done and not self._stopped:
                    self._changed.wait()
                if self._stopped:
                    return None
                crc = self._doubtful.pop(index, None)
            chunk = self._ledger.read(index, space)
            if crc is not None and zlib.crc32(chunk) != crc:
                self._lose(index)
                continue
            digest.update(chunk)
            index += 1
        return digest.hexdigest()

    def _lose(self, index: int) -> None:
        """The journal tells of a chunk, and the disk has something else."""
        with self._changed:
            self._done.discard(index)
            self._n_bytes -= self._ledger.chunk_bytes(index)
            self._resumed -= self._ledger.chunk_bytes(index)
        self._give_back(index, index + 1)

    def _begin_again(self, why: str) -> None:
        with self._changed:
            self._ledger.forget()
            self._done.clear()
            self._doubtful.clear()
            self._todo = spans(set(range(self._ledger.n_chunks)), self._limits.connections)
            self._n_bytes = self._resumed = 0
            self._trouble = f"what came {why}; fetching it again"
            self._changed.notify_all()

    # ---- the workers
    def _work(self) -> None:
        worker, tries, arrivals = Worker(Line(self._limits.idle_seconds)), 0, -1
        with self._changed:
            self._workers.append(worker)
        while span := self._take():
            try:
                self._fetch(worker, *span)
            except (RetryError, *BROKEN) as error:
                worker.line.close()
                with self._changed:
                    tries = tries + 1 if self._arrivals == arrivals else 1
                    arrivals = self._arrivals
                    worker.line, worker.since = Line(self._limits.idle_seconds), 0.0
                self._pause(error, tries)
        worker.line.close()

    def _take(self) -> tuple[int, int] | None:
        """The next span; None where there is nothing more to do."""
        with self._changed:
            while not self._todo and not self._stopped:
                self._changed.wait()
            return None if self._stopped else self._todo.pop(0)

    def _give_back(self, start: int, stop: int) -> None:
        """What of the span has not arrived is for the next who asks."""
        with self._changed:
            self._todo[:0] = runs(set(range(start, stop)) - self._done)
            self._changed.notify_all()

    def _pause(self, error: Exception, tries: int) -> None:
        what = str(error) if isinstance(error, RetryError) else f"the connection broke off ({reason(error)})"
        if tries >= self._limits.tries:
            raise NetworkError(
                f"{self._host()}: {what}, {tries} times in a row; what is there is kept, and the same command goes on"
            )
        asked = error.wait if isinstance(error, RetryError) else 0.0
        wait = min(self._limits.first_wait * 2 ** (tries - 1) * random.uniform(0.75, 1.25), self._limits.longest_wait)
        until = time.monotonic() + max(wait, min(asked, self._limits.longest_wait))
        with self._changed:
            self._trouble = f"{what}; trying again"
            while not self._stopped and (left := until - time.monotonic()) > 0:
                self._changed.wait(left)

    def _fetch(self, worker: Worker, start: int, stop: int) -> None:
        """One request; what of the span has not arrived is given back."""
        at, end = start, min(stop * CHUNK, self._remote.n_bytes)
        try:
            with self._changed:
                worker.n_bytes, worker.since = 0, time.monotonic()
            response = self._ask(worker.line, start * CHUNK, end)
            if response.status == 200:
                # All from the first byte on, whatever is asked: this one connection then takes what is left.
                at, stop = 0, self._ledger.n_chunks
                with self._changed:
                    self._todo.clear()
            space = memoryview(bytearray(CHUNK))
            while at < stop and not self._stopped:
                self._put(at, self._read_chunk(worker, response, at, space))
                at += 1
            response.read(1)  # sees the end, so that the connection can be asked again
        finally:
            worker.since = 0.0
            self._give_back(at, stop)

    def _read_chunk(self, worker: Worker, response: HTTPResponse, index: int, space: memoryview) -> memoryview:
        view, got = space[: self._ledger.chunk_bytes(index)], 0
        while got < len(view):
            n = response.readinto(view[got : got + READ_BYTES])
            if not n:
                raise RetryError("the connection ended early")
            got += n
            worker.n_bytes += n
        return view

    def _put(self, index: int, data: memoryview) -> None:
        with self._changed:
            if self._stopped or index in self._done:
                return
            self._ledger.put(index, data)
            self._done.add(index)
            self._n_bytes += len(data)
            self._arrivals += 1
            self._changed.notify_all()

    def _ask(self, line: Line, start: int, end: int) -> HTTPResponse:
        """A response whose body begins at `start`, or at 0 where its status is 200."""
        request = dataclasses.replace(self._remote.request, headers={"Range": f"bytes={start}-{end - 1}"})
        direct = self._final_url
        if direct:
            request = dataclasses.replace(request, url=direct, secret=self._secret_for(direct))
        response, url = line.get(request)
        if direct and response.status in REFUSED | GONE:
            self._final_url = ""  # such addresses are valid for a while
            raise RetryError("the address that it sent on to is no longer valid")
        check_answer(response, self._host(), start, end, self._remote.n_bytes, self._remote.etag)
        with self._changed:
            self._final_url = url
            if self._ranged is None:
                self._ranged = response.status == 206
            elif self._ranged and response.status == 200:
                raise RetryError("it sends all of the file instead of a part")
            self._changed.notify_all()
        return response

    def _secret_for(self, url: str) -> dict[str, str]:
        home, there = urlsplit(self._remote.request.url), urlsplit(url)
        same = (home.scheme, home.netloc) == (there.scheme, there.netloc)
        return dict(self._remote.request.secret) if same else {}

    def _host(self) -> str:
        return host_of(urlsplit(self._remote.request.url))


def spans(chunks: set[int], connections: int) -> list[tuple[int, int]]:
    """The chunks as ranges for requests."""
    step = min(max(len(chunks) // (connections * SPANS_EACH), LEAST_SPAN), MOST_SPAN)
    return [(a, min(a + step, stop)) for start, stop in runs(chunks) for a in range(start, stop, step)]


def runs(numbers: set[int]) -> list[tuple[int, int]]:
    """Ranges of consecutive numbers, [start, stop)."""
    starts = sorted(n for n in numbers if n - 1 not in numbers)
    stops = sorted(n + 1 for n in numbers if n + 1 not in numbers)
    return list(zip(starts, stops, strict=True))
