"""Small things from elsewhere, in memory: a request that is asked again with growing pauses until it is answered."""

import socket
import threading
import time
from collections.abc import Callable
from http.client import HTTPResponse
from typing import TypeVar
from urllib.parse import urlsplit

from llmq.answer import RetryError, check_answer, check_status, reason
from llmq.errors import NetworkError
from llmq.fetcher import LIMITS, Limits, Remote
from llmq.http import BROKEN, Line, Request, checked, host_of

Taken = TypeVar("Taken")

MOST_PIECE = 256 << 20
LEAST_RATE = 10_000  # bytes a second
# Where there is no network, or nobody at the address, waiting seldom helps.
NOBODY, FEW_TRIES = (ConnectionRefusedError, socket.gaierror), 3


def ask(request: Request, take: Callable[[HTTPResponse], Taken], limits: Limits = LIMITS, n_bytes: int = 0) -> Taken:
    """What `take` makes of the answer, of about `n_bytes`, which it may refuse by RetryError.

    Raises NetworkError where there is none.
    """
    host = host_of(checked(request.url))
    tries, most = 0, limits.tries
    while tries < most:
        tries += 1
        line = Line(limits.idle_seconds)
        # A server that sends a byte now and then would never be idle.
        deadline = threading.Timer(limits.slow_seconds + n_bytes / LEAST_RATE, line.abort)
        deadline.start()
        try:
            answer, _ = line.get(request)
            return take(answer)
        except (RetryError, *BROKEN) as error:
            what = str(error) if isinstance(error, RetryError) else f"cannot be reached ({reason(error)})"
            asked = error.wait if isinstance(error, RetryError) else 0.0
            if isinstance(error, NOBODY):
                most = min(most, FEW_TRIES)
        finally:
            deadline.cancel()
            line.close()
        if tries < most:
            time.sleep(limits.pause(tries, asked))
    raise NetworkError(f"{host}: {what}, {tries} times in a row; try again later")


def read_body(answer: HTTPResponse, limit: int) -> bytes:
    """All of it. NetworkError above `limit` bytes, RetryError where the connection ends before it does."""
    body = answer.read(limit + 1)
    if len(body) > limit:
        raise NetworkError(f"the answer is longer than {limit >> 20} MiB; is this address right?")
    announced = answer.headers.get("Content-Length", "")
    if announced.isdecimal() and len(body) < int(announced):
        raise RetryError("the connection ended early")
    return body


def read_piece(remote: Remote, start: int, end: int, limits: Limits = LIMITS) -> bytes:
    """Bytes `start` to `end` of a file elsewhere; nothing vouches for them but their length."""
    assert 0 <= start < end <= remote.n_bytes, (start, end)
    assert end - start <= MOST_PIECE, (start, end)
    request = Request(remote.request.url, {"Range": f"bytes={start}-{end - 1}"}, remote.request.secret)
    host = host_of(urlsplit(request.url))

    def take(answer: HTTPResponse) -> bytes:
        check_answer(answer, host, start, end, remote.n_bytes, remote.etag)
        if answer.status == 206:
            return read_body(answer, end - start)
        answer.read(start)
        piece = answer.read(end - start)
        if len(piece) < end - start:
            raise RetryError("the connection ended early")
        return piece

    return ask(request, take, limits, end - start)


def probe(url: str, limits: Limits = LIMITS) -> Remote:
    """A file at an address of which nothing is known: its size and its entity tag, by asking for the first byte."""
    request = Request(url, {"Range": "bytes=0-0"}, {})
    host = host_of(checked(url))

    def take(answer: HTTPResponse) -> Remote:
        check_status(answer, host)
        length = answer.headers.get("Content-Length", "")
        if answer.status == 206:
            length = answer.headers.get("Content-Range", "").rpartition("/")[2]
        if not length.isdecimal():
            raise NetworkError(f"{host} does not tell how long this file is; get it another way")
        etag = answer.headers.get("ETag", "")
        return Remote(Request(url, {}, {}), int(length), etag="" if etag.startswith("W/") else etag)

    return ask(request, take, limits)
