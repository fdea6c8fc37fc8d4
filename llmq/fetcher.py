"""Workers that ask for parts of a file elsewhere over several connections, and hand on each chunk that arrives.

What fails is asked for again, with growing pauses, for as long as now and then a chunk arrives. The first answer
decides whether there will be several connections: a server that ignores ranges gets one.
"""

import contextlib
import dataclasses
import random
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPResponse
from urllib.parse import urlsplit

from llmq.answer import GONE, REFUSED, RetryError, check_answer, reason
from llmq.errors import NetworkError
from llmq.http import BROKEN, Line, Request, host_of

# What is handed on: bytes from a multiple of this on.
CHUNK = 1 << 20
# Chunks of one request: few enough that connections end together, many enough that asking costs little.
LEAST_SPAN, MOST_SPAN, SPANS_EACH = 4, 32, 4
READ_BYTES = 1 << 18


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

    def pause(self, tries: int, asked: float) -> float:
        """Seconds before the next try after so many; `asked` is what the server asks for."""
        grown = self.first_wait * 2 ** (tries - 1) * random.uniform(0.75, 1.25)
        return min(max(grown, asked), self.longest_wait)


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
    def n_chunks(self) -> int:
        return -(-self.n_bytes // CHUNK)

    @property
    def host(self) -> str:
        return host_of(urlsplit(self.request.url))

    def chunk_bytes(self, index: int) -> int:
        return min(CHUNK, self.n_bytes - index * CHUNK)


@dataclass(slots=True, eq=False)
class Worker:
    """A connection and what it is doing: chunks of the span that have not arrived, bytes of the request it waits for,
    and since when (0: none)."""

    line: Line
    span: tuple[int, int] = (0, 0)
    n_bytes: int = 0
    since: float = 0.0


class Fetcher:
    """Fetches what ask_for() names, while somebody calls watch() now and then, until close().

    `put(index, data)` gets each chunk once, with `changed` held, which guards all that is public here and whatever the
    owner shares with it. Chunks from `reach()` on have to wait.
    """

    def __init__(
        self,
        remote: Remote,
        put: Callable[[int, memoryview], None],
        limits: Limits = LIMITS,
        reach: Callable[[], int] | None = None,
    ) -> None:
        self.changed = threading.Condition()
        self.done: set[int] = set()
        self.stopped = False
        self.trouble = ""
        self._remote, self._put, self._limits = remote, put, limits
        self._reach = reach or (lambda: remote.n_chunks)
        self._todo: list[tuple[int, int]] = []
        self._workers: list[Worker] = []
        self._pool = ThreadPoolExecutor(limits.connections)
        self._running: list[Future[None]] = []
        self._final_url = ""  # where the first answer came from: asked directly from then on
        self._ranged: bool | None = None  # None: nobody has answered yet
        self._n_asking = 0  # workers with a span
        self._arrivals = 0
        # Failures in which nothing arrived, one after the other.
        self._tries, self._tried_at, self._tried_for = 0, 0.0, -1

    def ask_for(self, chunks: Iterable[int]) -> None:
        """Chunks that are not there, or not right."""
        wanted = set(chunks)
        with self.changed:
            self.done -= wanted
            self._todo = spans(wanted.union(*(range(*span) for span in self._todo)), self._limits.connections)
            self.changed.notify_all()

    def watch(self) -> None:
        """Starts workers, ends requests that hardly move, and raises what a worker failed with."""
        with self.changed:
            wanted = self._limits.connections if self._ranged else 1
            wanted = min(wanted - len(self._running), len(self._todo))
            if not self.stopped:
                self._running += [self._pool.submit(self._work) for _ in range(wanted)]
        self._abort_slow()
        for each in self._running:
            if each.done():
                each.result()

    def close(self) -> None:
        """Ends all requests; nothing is put any more."""
        with self.changed:
            self.stopped = True
            self.changed.notify_all()
            workers = list(self._workers)
        # A signal that raises just behind the taking of the lock leaves it with this thread.
        with contextlib.suppress(RuntimeError):
            while True:
                self.changed.release()
        for worker in workers:
            worker.line.abort()
        self._pool.shutdown()

    def _abort_slow(self) -> None:
        now = time.monotonic()
        for worker in list(self._workers):
            if worker.since and now - worker.since >= self._limits.slow_seconds:
                if worker.n_bytes < self._limits.slow_bytes:
                    worker.line.abort()
                worker.since, worker.n_bytes = now, 0

    def _work(self) -> None:
        worker = Worker(Line(self._limits.idle_seconds))
        with self.changed:
            self._workers.append(worker)
        try:
            while span := self._take():
                asked_at, worker.span = time.monotonic(), span
                try:
                    self._fetch(worker)
                except (RetryError, *BROKEN) as error:
                    worker.line.close()
                    with self.changed:
                        worker.line = Line(self._limits.idle_seconds)
                        self._final_url = ""  # another way there may be better
                        tries = self._count_try(asked_at)
                    self._pause(error, tries)
                finally:
                    self._give_back(*worker.span)
        finally:
            worker.line.close()

    def _take(self) -> tuple[int, int] | None:
        """The next span; None where there is nothing more to do."""
        with self.changed:
            while not self.stopped and not self._is_worth_asking():
                self.changed.wait()
            if self.stopped:
                return None
            self._n_asking += 1
            start, stop = self._todo.pop(0)
            within = min(stop, self._reach())
            if within < stop:
                self._todo.insert(0, (within, stop))
            return start, within

    def _is_worth_asking(self) -> bool:
        """Whether enough is within reach for a request; anything is, where nobody else asks."""
        if not self._todo:
            return False
        start, stop = self._todo[0]
        within = min(stop, self._reach()) - start
        return within >= (min(LEAST_SPAN, stop - start) if self._n_asking else 1)

    def _give_back(self, start: int, stop: int) -> None:
        """What of the span has not arrived is for the next who asks."""
        with self.changed:
            self._n_asking -= 1
            self._todo[:0] = runs(set(range(start, stop)) - self.done)
            self.changed.notify_all()

    def _count_try(self, asked_at: float) -> int:
        """How many times in a row nothing arrived; connections that fail together count once."""
        if self._tried_for != self._arrivals:
            self._tries, self._tried_for = 0, self._arrivals
        if asked_at >= self._tried_at:
            self._tries += 1
            self._tried_at = time.monotonic()
        return self._tries

    def _pause(self, error: Exception, tries: int) -> None:
        what = str(error) if isinstance(error, RetryError) else f"the connection broke off ({reason(error)})"
        if tries >= self._limits.tries:
            raise NetworkError(
                f"{self._remote.host}: {what}, {tries} times in a row; what is there is kept, and the same command "
                "goes on from there"
            )
        asked = error.wait if isinstance(error, RetryError) else 0.0
        until = time.monotonic() + self._limits.pause(tries, asked)
        with self.changed:
            self.trouble = f"{what}; trying again"
            while not self.stopped and (left := until - time.monotonic()) > 0:
                self.changed.wait(left)

    def _fetch(self, worker: Worker) -> None:
        """One request; what of the span has not arrived is left in it."""
        (start, stop), n_bytes = worker.span, self._remote.n_bytes
        try:
            with self.changed:
                worker.n_bytes, worker.since = 0, time.monotonic()
            response = self._ask(worker.line, start * CHUNK, min(stop * CHUNK, n_bytes))
            if response.status == 200:
                # All from the first byte on, whatever is asked: this one connection then takes what is left.
                start, stop = 0, self._remote.n_chunks
                with self.changed:
                    self._todo.clear()
            space = memoryview(bytearray(CHUNK))
            for index in range(start, stop):
                worker.span = index, stop
                if self.stopped:
                    return
                self._arrived(worker, index, self._read_chunk(worker, response, index, space))
            worker.span = stop, stop
            response.read(1)  # sees the end, so that the connection can be asked again
        finally:
            worker.since = 0.0

    def _read_chunk(self, worker: Worker, response: HTTPResponse, index: int, space: memoryview) -> memoryview:
        view, got = space[: self._remote.chunk_bytes(index)], 0
        while got < len(view):
            # What is there now: waiting for more would make a slow connection look like one that does not move.
            piece = response.read1(min(READ_BYTES, len(view) - got))
            if not piece:
                raise RetryError("the connection ended early")
            view[got : got + len(piece)] = piece
            got += len(piece)
            worker.n_bytes += len(piece)
        return view

    def _arrived(self, worker: Worker, index: int, data: memoryview) -> None:
        with self.changed:
            while index >= self._reach() and not self.stopped:
                worker.since = 0.0  # it is not the server that makes this wait
                self.changed.wait()
            worker.since = worker.since or time.monotonic()
            if not self.stopped and index not in self.done:
                self._put(index, data)
                self.done.add(index)
                self._arrivals += 1
                self.trouble = ""
                self.changed.notify_all()

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
        check_answer(response, self._remote.host, start, end, self._remote.n_bytes, self._remote.etag)
        with self.changed:
            self._final_url = url
            if self._ranged is None:
                self._ranged = response.status == 206
            elif self._ranged and response.status == 200:
                raise RetryError("it sends all of the file instead of a part")
            self.changed.notify_all()
        return response

    def _secret_for(self, url: str) -> dict[str, str]:
        home, there = urlsplit(self._remote.request.url), urlsplit(url)
        same = (home.scheme, home.netloc) == (there.scheme, there.netloc)
        return dict(self._remote.request.secret) if same else {}


def spans(chunks: set[int], connections: int) -> list[tuple[int, int]]:
    """The chunks as ranges for requests."""
    step = min(max(len(chunks) // (connections * SPANS_EACH), LEAST_SPAN), MOST_SPAN)
    return [(a, min(a + step, stop)) for start, stop in runs(chunks) for a in range(start, stop, step)]


def runs(numbers: set[int]) -> list[tuple[int, int]]:
    """Ranges of consecutive numbers, [start, stop)."""
    starts = sorted(n for n in numbers if n - 1 not in numbers)
    stops = sorted(n + 1 for n in numbers if n + 1 not in numbers)
    return list(zip(starts, stops, strict=True))
