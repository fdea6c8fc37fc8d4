"""A hub on the loopback that goes wrong where a test wants it to, and keeps what it was asked and what it sent.

It lists repositories, and sends requests for large files on to another name of the loopback, as the real one does.
"""

import contextlib
import functools
import gzip
import hashlib
import json
import re
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_CANARY"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
BLOCK = 1 << 16
LONGEST_WAIT = 20.0


@dataclass
class Fault:
    """What goes wrong, by its name in CHANGES or WAYS, with answers that hold byte `at` of a file (None: any part),
    to paths in which `where`, a regular expression, occurs, and how many `times`. What `n` means is said where the
    fault is."""

    name: str
    at: int | None = None
    times: int = 1 << 30
    n: int = 0
    where: str = "^/cdn/"
    headers: dict[str, str] = field(default_factory=dict)
    fired: int = 0

    def fits(self, path: str, answer: "Answer") -> bool:
        here = self.at is None or answer.start <= self.at < max(answer.stop, 1)
        return self.fired < self.times and bool(re.search(self.where, path)) and here


@dataclass
class Answer:
    """Bytes `start` to `stop` of `file`, unless `body` is something else."""

    status: int
    headers: dict[str, str]
    file: bytes = b""
    start: int = 0
    stop: int = 0
    body: bytes = b""


@dataclass
class Seen:
    """A request and the answer to it; bytes `start` to `stop` were asked for, and `sent` of them were sent."""

    path: str
    headers: dict[str, str]
    status: int
    start: int
    stop: int
    sent: int = 0


def part(file: bytes, wanted: str) -> Answer:
    """The right answer to a request with the Range header `wanted`."""
    size, match = len(file), re.fullmatch(r"bytes=(\d+)-(\d*)", wanted)
    start, stop = (int(match[1]), min(int(match[2] or size) + 1, size)) if match else (0, size)
    headers = {"ETag": f'"{sha256(file)}"', "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
    if start >= size and match:
        return Answer(416, headers | {"Content-Range": f"bytes */{size}", "Content-Length": "0"})
    if match:
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
    headers["Content-Length"] = str(stop - start)
    return Answer(206 if match else 200, headers, file, start, stop, file[start:stop])


@functools.lru_cache(8)  # every answer has it
def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def instead(answer: Answer, status: int, body: bytes, headers: dict[str, str]) -> None:
    answer.status, answer.body, answer.headers = status, body, {"Content-Length": str(len(body)), **headers}


# ---- answers that are wrong


def status(answer: Answer, fault: Fault) -> None:
    """`n` is the status."""
    instead(answer, fault.n, b'{"error": "no"}', fault.headers)


def ignore_range(answer: Answer, _fault: Fault) -> None:
    whole = part(answer.file, "")
    answer.status, answer.headers, answer.body = 200, whole.headers, whole.body


def wrong_range(answer: Answer, _fault: Fault) -> None:
    answer.headers["Content-Range"] = f"bytes {answer.start + 7}-{answer.stop - 1}/{len(answer.file)}"


def shift(answer: Answer, fault: Fault) -> None:
    """Headers are right, and the body comes from `n` bytes further on, or before."""
    turn = fault.n % len(answer.file)
    answer.body = (answer.file[turn:] + answer.file[:turn])[answer.start : answer.stop]


def flip(answer: Answer, fault: Fault) -> None:
    """Bit `n` of byte `at`."""
    body, at = bytearray(answer.body), (fault.at or 0) - answer.start
    body[at] ^= 1 << fault.n
    answer.body = bytes(body)


def short_len(answer: Answer, _fault: Fault) -> None:
    answer.body = answer.body[: len(answer.body) // 2]
    answer.headers["Content-Length"] = str(len(answer.body))


def no_len(answer: Answer, _fault: Fault) -> None:
    del answer.headers["Content-Length"]
    answer.headers["Connection"] = "close"


def long(answer: Answer, _fault: Fault) -> None:
    answer.body += b"more"
    answer.headers["Content-Length"] = str(len(answer.body))


def truncated(answer: Answer, _fault: Fault) -> None:
    """The file has lost its last byte."""
    size = len(answer.file) - 1
    answer.body = answer.file[answer.start : min(answer.stop, size)]
    answer.headers["Content-Length"] = str(len(answer.body))
    answer.headers["Content-Range"] = f"bytes {answer.start}-{min(answer.stop, size) - 1}/{size}"


def gzip_bomb(answer: Answer, _fault: Fault) -> None:
    instead(answer, 200, gzip.compress(bytes(64 << 20), 1), {"Content-Encoding": "gzip"})


def html(answer: Answer, _fault: Fault) -> None:
    instead(answer, 200, b"<html>Please log in to this network</html>", {"Content-Type": "text/html; charset=utf-8"})


def lfs_ptr(answer: Answer, _fault: Fault) -> None:
    text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256(answer.file)}\nsize {len(answer.file)}\n"
    instead(answer, 200, text.encode(), {"Content-Type": "text/plain"})


def new_etag(answer: Answer, _fault: Fault) -> None:
    answer.headers["ETag"] = '"another"'


def onward(answer: Answer, fault: Fault) -> None:
    """A redirect, to what `headers` say."""
    instead(answer, 302, b"", fault.headers)


CHANGES: dict[str, Callable[[Answer, Fault], None]] = {
    each.__name__: each
    for each in (
        status, ignore_range, wrong_range, shift, flip, short_len, no_len, long, truncated, gzip_bomb, html, lfs_ptr,
        new_etag, onward,
    )
}  # fmt: skip


# ---- right answers that do not arrive


def cut(handler: "Handler", answer: Answer, fault: Fault) -> None:
    """The connection ends just before byte `at`."""
    handler.send(answer, before(answer, fault))
    handler.close_connection = True


def rst(handler: "Handler", answer: Answer, fault: Fault) -> None:
    cut(handler, answer, fault)
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()


def stall(handler: "Handler", answer: Answer, fault: Fault) -> None:
    cut(handler, answer, fault)
    handler.wait(LONGEST_WAIT)


def trickle(handler: "Handler", answer: Answer, fault: Fault) -> None:
    """From byte `at` on, `n` bytes a second."""
    cut(handler, answer, fault)
    end = time.monotonic() + LONGEST_WAIT
    piece = max(fault.n // 100, 1)
    for at in range(before(answer, fault), len(answer.body), piece):
        if time.monotonic() > end or handler.wait(piece / fault.n):
            return
        handler.send_body(answer.body[at : at + piece])


def hang_headers(handler: "Handler", _answer: Answer, _fault: Fault) -> None:
    handler.close_connection = True
    handler.wait(LONGEST_WAIT)


def drip_headers(handler: "Handler", _answer: Answer, fault: Fault) -> None:
    """`n` bytes a second of a head that has no end."""
    handler.close_connection = True
    end = time.monotonic() + LONGEST_WAIT
    handler.wfile.write(b"HTTP/1.1 206 Partial Content\r\n")
    while time.monotonic() < end and not handler.wait(1 / fault.n):
        handler.wfile.write(b"X")


def before(answer: Answer, fault: Fault) -> int:
    return max((fault.at or 0) - answer.start, 0)


WAYS: dict[str, Callable[["Handler", Answer, Fault], None]] = {
    each.__name__: each for each in (cut, rst, stall, trickle, hang_headers, drip_headers)
}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # answers would wait for the acknowledgement of their head
    timeout = LONGEST_WAIT
    server: "Server"
    seen: Seen

    def log_message(self, *_arguments: object) -> None:
        pass

    def setup(self) -> None:
        super().setup()
        self.server.hub.connections.append(self.connection)

    def do_GET(self) -> None:
        hub = self.server.hub
        answer = hub.answer(self.path, self.headers.get("Range", ""))
        with hub.lock:
            fault = next((each for each in hub.faults if each.fits(self.path, answer)), None)
            if fault:
                fault.fired += 1
            if fault and fault.name in CHANGES:
                CHANGES[fault.name](answer, fault)
            headers = {name.lower(): text for name, text in self.headers.items()}
            self.seen = Seen(self.path, headers, answer.status, answer.start, answer.stop)
            hub.seen.append(self.seen)
        if fault and fault.name in WAYS:
            WAYS[fault.name](self, answer, fault)
        else:
            self.send(answer, len(answer.body))

    def send(self, answer: Answer, n_bytes: int) -> None:
        """The head, and so much of the body."""
        self.send_response(answer.status)
        for name, text in answer.headers.items():
            self.send_header(name, text)
        self.end_headers()
        body = memoryview(answer.body)[:n_bytes]
        for at in range(0, n_bytes, BLOCK):
            self.send_body(body[at : at + BLOCK])

    def send_body(self, data: bytes | memoryview) -> None:
        if rate := self.server.hub.bytes_per_second:
            self.wait(len(data) / rate)
        self.wfile.write(data)
        self.seen.sent += len(data)

    def wait(self, seconds: float) -> bool:
        """Whether the hub is about to close."""
        return self.server.hub.closing.wait(seconds)


class Server(ThreadingHTTPServer):
    daemon_threads = False  # so that closing waits for all of them
    request_queue_size = 128
    hub: "Hub"

    def handle_error(self, *_arguments: object) -> None:
        """Clients go away."""


@dataclass
class Hub:
    url: str
    cdn: str  # the same under another name
    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    small: set[str] = field(default_factory=set)  # files that are sent at once, as those outside LFS are
    faults: list[Fault] = field(default_factory=list)
    seen: list[Seen] = field(default_factory=list)
    bytes_per_second: float = 0.0  # of a connection; 0 for as fast as it goes
    connections: list[socket.socket] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    closing: threading.Event = field(default_factory=threading.Event)

    def add(self, repo: str, name: str, data: bytes) -> str:
        """The URL of a new file."""
        self.repos.setdefault(repo, {})[name] = data
        return f"{self.url}/{repo}/resolve/{COMMIT}/{name}"

    def fail(self, name: str, **arguments: object) -> Fault:
        """Answers go wrong from now on; an earlier fault comes first."""
        assert name in CHANGES or name in WAYS
        fault = Fault(name, **arguments)  # type: ignore[arg-type]
        self.faults.append(fault)
        return fault

    def reset(self) -> None:
        with self.lock:
            self.faults.clear()
            self.seen.clear()

    def answers(self) -> list[Seen]:
        """Those to requests for files, redirects aside."""
        return [seen for seen in self.seen if seen.path.startswith("/cdn/")]

    def n_sent(self) -> int:
        return sum(seen.sent for seen in self.answers())

    def told(self) -> list[Seen]:
        """Requests under the other name that hold the token, which only the hub itself should see."""
        home = urlsplit(self.url).netloc
        return [seen for seen in self.seen if seen.headers["host"] != home and TOKEN in str(seen)]

    def answer(self, url: str, wanted: str) -> Answer:
        """The right one."""
        path = unquote(urlsplit(url).path)
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/revision/([^/]+)", path):
            if match[1] in self.repos:
                body = json.dumps(self.listing(match[1])).encode()
                return Answer(200, {"Content-Length": str(len(body)), "Content-Type": "application/json"}, body=body)
        elif match := re.fullmatch(r"(/cdn)?/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            file = self.repos.get(match[2], {}).get(match[3])
            if file is not None and (match[1] or match[3] in self.small):
                return part(file, wanted)
            if file is not None:
                onward = f"{self.cdn}/cdn{url}"
                linked = {"X-Linked-Etag": f'"{sha256(file)}"', "X-Linked-Size": str(len(file))}
                return Answer(302, {"X-Repo-Commit": COMMIT, **linked, "Location": onward, "Content-Length": "0"})
        return Answer(404, {"X-Error-Code": "EntryNotFound", "Content-Length": "0"})

    def listing(self, repo: str) -> dict[str, object]:
        siblings = []
        for name, data in self.repos[repo].items():
            blob = hashlib.sha1(b"blob %d\0%b" % (len(data), data)).hexdigest()
            entry: dict[str, object] = {"rfilename": name, "size": len(data), "blobId": blob}
            if name not in self.small:
                entry["lfs"] = {"sha256": sha256(data), "size": len(data), "pointerSize": 134}
            siblings.append(entry)
        return {"id": repo, "sha": COMMIT, "gated": False, "siblings": siblings}


@contextlib.contextmanager
def serving(encryption: ssl.SSLContext | None = None) -> Iterator[Hub]:
    with Server(("127.0.0.1", 0), Handler) as server:
        scheme = "http"
        if encryption:
            server.socket = encryption.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
            scheme = "https"
        port = server.server_address[1]
        server.hub = Hub(f"{scheme}://127.0.0.1:{port}", f"{scheme}://localhost:{port}")
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server.hub
        finally:
            server.hub.closing.set()
            server.shutdown()
            thread.join()
            for connection in server.hub.connections:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
