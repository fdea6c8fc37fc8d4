"""Fetching one file: its chunks into a ledger, and its sha256 before it has its name.

A checker follows behind those who fetch, in order, with the sha256 of what is on disk.
"""

import hashlib
import time
import zlib
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from llmq.errors import FileFormatError, quoted
from llmq.fetcher import CHUNK, LIMITS, Fetcher, Limits, Remote
from llmq.files import sha256_of
from llmq.ledger import Ledger
from llmq.part import nothing_to_check

TICK_SECONDS = 0.1
WAIT_SECONDS = 0.5


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


def fetch(
    remote: Remote, target: Path, limits: Limits = LIMITS, held: Callable[[], None] = nothing_to_check
) -> Generator[Progress]:
    """Fetches a file to `target`, which is untouched until all of it is there and right; yields several times a second.

    Closed early, or killed, it leaves what it has to the next call for the same content. Where another process fetches
    the same, it waits for that to end, and takes over if it dies. `held` is called when nobody else fetches, before
    anything is; what it raises is passed on.

    Raises NetworkError (nothing arrives, access, not found), FileFormatError (the sha256 differs twice), UsageError and
    ResourceError (the target).
    """
    ledger = Ledger(target, remote)
    while (found := ledger.try_open()) is None:
        yield Progress(0, remote.n_bytes, 0, holder=ledger.holder())
        time.sleep(WAIT_SECONDS)
    # Whoever held it is done, or was killed after the file got its name.
    try:
        done = not found and is_there(remote, target)
        if not done:
            held()
    except BaseException:
        if found:
            ledger.close()
        else:
            ledger.discard()
        raise
    if done:
        ledger.discard()
        yield Progress(remote.n_bytes, remote.n_bytes, remote.n_bytes, sha256=remote.sha256)
        return
    yield from Transfer(remote, ledger, found, limits).run()


def is_there(remote: Remote, path: Path) -> bool:
    """Whether the file has all of the content already; unknown means no."""
    same_size = bool(remote.sha256) and path.is_file() and path.stat().st_size == remote.n_bytes
    return same_size and sha256_of(path) == remote.sha256


class Transfer:
    """One download under way."""

    def __init__(self, remote: Remote, ledger: Ledger, found: dict[int, int], limits: Limits) -> None:
        self._remote, self._ledger = remote, ledger
        self._fetcher = Fetcher(remote, ledger.put, limits)
        self._fetcher.done = set(found)
        self._doubtful = dict(found)  # CRCs of what an earlier run left, until checked
        self._fetcher.ask_for(set(range(remote.n_chunks)) - set(found))
        self._sha256 = ""

    def run(self) -> Generator[Progress]:
        resumed = self._n_bytes()
        with ThreadPoolExecutor(1) as pool:
            try:
                self._ledger.reserve()
                checking = pool.submit(self._check)
                while not checking.done():
                    yield Progress(self._n_bytes(), self._remote.n_bytes, resumed, trouble=self._fetcher.trouble)
                    self._fetcher.watch()
                    with self._fetcher.changed:
                        self._fetcher.changed.wait(TICK_SECONDS)
                checking.result()
            finally:
                self._fetcher.close()
                pool.shutdown()
                self._leave()
        yield Progress(self._remote.n_bytes, self._remote.n_bytes, resumed, sha256=self._sha256)

    def _n_bytes(self) -> int:
        with self._fetcher.changed:
            last = self._remote.n_chunks - 1
            missing = CHUNK - self._remote.chunk_bytes(last) if last in self._fetcher.done else 0
            return len(self._fetcher.done) * CHUNK - missing

    def _leave(self) -> None:
        """What is there is for the next run, unless it has its name, or is nothing."""
        if self._sha256:
            return
        if self._fetcher.done:
            self._ledger.close()
        else:
            self._ledger.discard()

    def _check(self) -> None:
        """Follows the workers; a file that is not what it should be is fetched once more."""
        again = False
        while (digest := self._digest()) is not None:
            if digest == (self._remote.sha256 or digest):
                self._ledger.publish()
                self._sha256 = digest
                return
            self._forget(f"what came has the sha256 {digest[:12]}... instead of {self._remote.sha256[:12]}...")
            if again:
                raise FileFormatError(
                    f"{quoted(self._ledger.target.name)} is not what {self._remote.host} says it is: its sha256 "
                    "differed twice; try another network, or tell those who publish it"
                )
            again = True
            self._fetcher.ask_for(range(self._remote.n_chunks))

    def _digest(self) -> str | None:
        """Of all chunks as they are on disk, waiting for each; None where everything is stopped before."""
        fetcher, space, digest, index = self._fetcher, memoryview(bytearray(CHUNK)), hashlib.sha256(), 0
        while index < self._remote.n_chunks:
            with fetcher.changed:
                while index not in fetcher.done and not fetcher.stopped:
                    fetcher.changed.wait()
                if fetcher.stopped:
                    return None
            chunk, crc = self._ledger.read(index, space), self._doubtful.pop(index, None)
            if crc is not None and zlib.crc32(chunk) != crc:
                # The journal tells of it, and the disk has something else.
                fetcher.ask_for([index])
                continue
            digest.update(chunk)
            index += 1
        return digest.hexdigest()

    def _forget(self, why: str) -> None:
        with self._fetcher.changed:
            self._ledger.forget()
            self._doubtful.clear()
            self._fetcher.done.clear()
            self._fetcher.trouble = why
