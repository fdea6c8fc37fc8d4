"""A file elsewhere as a stream that passes once: fetched ahead, hashed on its way, and never on disk.

  released       read                fetched ahead
|-----------|-------------|---------------------------|..........|
                          hashed up to here or further           end: the sha256 must be right
"""

from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from llmq.fetcher import CHUNK, LIMITS, Fetcher, Limits, Remote
from quant.sha256 import Sha256

# Bytes in memory at most: what several threads read at a time, and enough more to keep connections busy.
WINDOW = 64 << 20
TICK_SECONDS = 0.1


class Stream:
    """Bytes of `remote` from `start` on, by any threads, until close(). `kept` is the state of the hash there.

    At each of the `marks`, ascending offsets, the state of the hash is kept too. The `window` is at least a chunk.
    Raises NetworkError where nothing arrives any more.
    """

    def __init__(
        self, remote: Remote, start: int, kept: str, marks: Sequence[int], limits: Limits = LIMITS, window: int = WINDOW
    ) -> None:
        self.start, self._remote, self._sha256 = start, remote, Sha256(kept)
        self._marks = deque(mark for mark in marks if mark > start)
        self._states: dict[int, str] = {start: kept}
        self._chunks: dict[int, bytes] = {}
        self._released = self._hashed = start
        self._window = window
        self._ended = False
        self._fetcher = Fetcher(remote, self._put, limits, self._reach)
        self._fetcher.ask_for(range(start // CHUNK, remote.n_chunks))
        self._pool = ThreadPoolExecutor(1)
        self._hashing = self._pool.submit(self._hash)

    def read(self, start: int, end: int) -> bytes:
        """Waits for these bytes, none of which may be released; for those beyond the window, until it comes there."""
        numbers = range(start // CHUNK, -(-end // CHUNK))
        with self._fetcher.changed:
            assert self._released <= start < end, (self._released, start, end)
            while not all(number in self._chunks for number in numbers):
                self._wait()
            pieces = [self._chunks[number] for number in numbers]
        first = numbers.start * CHUNK
        return b"".join(pieces)[start - first : end - first]

    def release(self, offset: int) -> None:
        """Nothing before `offset` is read any more."""
        with self._fetcher.changed:
            self._released = max(self._released, offset)
            self._drop()

    def state_at(self, mark: int) -> str:
        """The state of the hash, once it has come so far."""
        with self._fetcher.changed:
            while mark not in self._states:
                self._wait()
            return self._states[mark]

    def sha256(self) -> str:
        """Of the whole file, once all of it was read."""
        with self._fetcher.changed:
            while self._hashed < self._remote.n_bytes:
                self._wait()
            return self._sha256.hexdigest()

    def close(self) -> None:
        self._fetcher.close()
        self._pool.shutdown()

    def _wait(self) -> None:
        if self._ended:
            self._hashing.result()
            raise AssertionError("the stream is closed")
        self._fetcher.changed.wait()

    def _put(self, index: int, data: memoryview) -> None:
        # A server that ignores ranges sends what comes before the start, too.
        if index >= self.start // CHUNK:
            self._chunks[index] = bytes(data)

    def _reach(self) -> int:
        return (min(self._released, self._hashed) + self._window) // CHUNK

    def _drop(self) -> None:
        """What is both hashed and released goes, and room is for more."""
        for number in [number for number in self._chunks if (number + 1) * CHUNK <= min(self._released, self._hashed)]:
            del self._chunks[number]
        self._fetcher.changed.notify_all()

    def _hash(self) -> None:
        """Follows what arrives, and watches over those who fetch."""
        changed = self._fetcher.changed
        try:
            while self._hashed < self._remote.n_bytes:
                self._fetcher.watch()
                with changed:
                    if self._fetcher.stopped:
                        return
                    chunk = self._chunks.get(self._hashed // CHUNK)
                    if chunk is None:
                        changed.wait(TICK_SECONDS)
                if chunk is not None:
                    self._take(memoryview(chunk))
        finally:
            with changed:
                self._ended = True
                changed.notify_all()

    def _take(self, chunk: memoryview) -> None:
        first = self._hashed // CHUNK * CHUNK
        ends = [mark for mark in self._marks if mark <= first + len(chunk)]
        for end in sorted({*ends, first + len(chunk)}):
            self._sha256.update(chunk[self._hashed - first : end - first])
            with self._fetcher.changed:
                self._hashed = end
                if end in ends:
                    self._states[end] = self._sha256.kept
                    self._marks.popleft()
        with self._fetcher.changed:
            self._drop()
