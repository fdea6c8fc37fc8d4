"""A file from a server on the loopback, by llmq and by huggingface_hub, in turn: medians, and the ratio of the speeds.

    python bench/pull.py FOLDER [--megabytes 1000] [--rounds 5]

llmq's time has everything that `llmq pull` does with a file: several connections, the journal, the sha256 of what is on
the disk, fsync and rename. huggingface_hub's is that of hf_hub_download over plain HTTP (HF_HUB_DISABLE_XET=1), which
compares sizes. The server is a process of its own and sends by sendfile. FOLDER holds the file and one copy at a time,
and what was in it stays; where it is in memory (/dev/shm) the disk has no part in the figures.

The last line is the median of the ratios of each round, llmq over huggingface_hub; below 1 the exit code is 1.
"""

import argparse
import hashlib
import http.server
import multiprocessing
import os
import re
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

from llmq.fetcher import Remote
from llmq.hub import remote_file, snapshot
from llmq.transfer import fetch

REPO, NAME, COMMIT = "org/model", "model.gguf", "0" * 40
BLOCK = 1 << 20


class Handler(http.server.BaseHTTPRequestHandler):
    """One repository with one file, which is sent at once."""

    protocol_version = "HTTP/1.1"

    def __init__(self, path: Path, sha256: str, *arguments: object) -> None:
        self.file, self.sha256 = path, sha256
        super().__init__(*arguments)  # type: ignore[arg-type]

    def log_message(self, *_arguments: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.head(200, 0, self.file.stat().st_size)

    def do_GET(self) -> None:
        n_bytes = self.file.stat().st_size
        if self.path.startswith("/api/"):
            self.listing(n_bytes)
            return
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        start, stop = (int(wanted[1]), int(wanted[2] or n_bytes - 1) + 1) if wanted else (0, n_bytes)
        self.head(206 if wanted else 200, start, stop)
        with self.file.open("rb") as file:
            self.connection.sendfile(file, start, stop - start)

    def head(self, status: int, start: int, stop: int) -> None:
        self.send_response(status)
        self.send_header("ETag", f'"{self.sha256}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Accept-Ranges", "bytes")
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{self.file.stat().st_size}")
        self.send_header("Content-Length", str(stop - start))
        self.end_headers()

    def listing(self, n_bytes: int) -> None:
        lfs = f'{{"sha256": "{self.sha256}", "size": {n_bytes}}}'
        entry = f'{{"rfilename": "{NAME}", "size": {n_bytes}, "lfs": {lfs}}}'
        body = f'{{"sha": "{COMMIT}", "siblings": [{entry}]}}'.encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def tell(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def serve(path: Path, sha256: str, port: Connection) -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, path, sha256)) as server:
        port.send(server.server_address[1])
        server.serve_forever()


def make(path: Path, n_bytes: int) -> str:
    """A file of random bytes; its sha256."""
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for at in range(0, n_bytes, BLOCK):
            block = os.urandom(min(BLOCK, n_bytes - at))
            digest.update(block)
            file.write(block)
    return digest.hexdigest()


def by_llmq(remote: Remote, folder: Path) -> Path:
    for _ in fetch(remote, folder / NAME):
        pass
    return folder / NAME


def by_huggingface_hub(folder: Path) -> Path:
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(REPO, NAME, local_dir=folder, token=False))


def seconds(get: Callable[[Path], Path], parent: Path, n_bytes: int) -> float:
    folder = Path(tempfile.mkdtemp(dir=parent))
    try:
        start = time.perf_counter()
        path = get(folder)
        took = time.perf_counter() - start
        assert path.stat().st_size == n_bytes
        return took
    finally:
        shutil.rmtree(folder)


def compare(folder: Path, n_bytes: int, rounds: int) -> float:
    """The median ratio of speeds; prints every round."""
    file = snapshot(REPO).files[NAME]
    ways: dict[str, Callable[[Path], Path]] = {
        "llmq": partial(by_llmq, remote_file(snapshot(REPO), file)),
        "huggingface_hub": by_huggingface_hub,
    }
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds):
        for name in list(ways)[:: -1 if number % 2 else 1]:
            speeds[name].append(n_bytes / 1e6 / seconds(ways[name], folder, n_bytes))
        tell(f"round {number + 1}: " + ", ".join(f"{name} {found[-1]:.0f} MB/s" for name, found in speeds.items()))
    for name, found in speeds.items():
        tell(f"{name}: {statistics.median(found):.0f} MB/s ({min(found):.0f} to {max(found):.0f})")
    return statistics.median(a / b for a, b in zip(speeds["llmq"], speeds["huggingface_hub"], strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    n_bytes = options.megabytes * 10**6
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = Path(folder) / "served"
        listen, port = multiprocessing.Pipe(duplex=False)
        server = multiprocessing.Process(target=serve, args=(path, make(path, n_bytes), port))
        server.start()
        try:
            # Before huggingface_hub is imported, which keeps what it finds then.
            os.environ |= {
                "HF_ENDPOINT": f"http://127.0.0.1:{listen.recv()}",
                "HF_HOME": f"{folder}/cache",
                "HF_HUB_DISABLE_XET": "1",
                "HF_HUB_DISABLE_PROGRESS_BARS": "1",
                "HF_HUB_DISABLE_TELEMETRY": "1",
            }
            ratio = compare(Path(folder), n_bytes, options.rounds)
        finally:
            server.terminate()
            server.join()
    tell(f"llmq / huggingface_hub: {ratio:.2f}")
    sys.exit(ratio < 1.0)


if __name__ == "__main__":
    main()
