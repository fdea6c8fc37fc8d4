"""Connections: kept, sent on, through proxies, given up; and who gets to see the token."""

import contextlib
import http.client
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from hub import TOKEN, Hub, serving
from hypothesis import given
from hypothesis import strategies as st

from llmq import http as module
from llmq.errors import NetworkError
from llmq.http import BROKEN, Line, Request, checked, encryption, joined, proxy_of

DATA = bytes(range(256)) * 1000
SECRET = {"Authorization": f"Bearer {TOKEN}"}
PROXIES = [f"{kind}_proxy" for kind in ("http", "https", "all", "no")]


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@contextlib.contextmanager
def line(idle_seconds: float = 10.0) -> Iterator[Line]:
    made = Line(idle_seconds)
    try:
        yield made
    finally:
        made.close()


@contextlib.contextmanager
def answering(*answers: bytes) -> Iterator[tuple[str, list[bytes]]]:
    """A server that takes one connection for each answer, reads a request's head, sends that, and waits for the other
    side to close; its URL, and the heads."""
    heads: list[bytes] = []

    def serve() -> None:
        for data in answers:
            with contextlib.suppress(OSError):
                connection, _ = listener.accept()
                with connection, connection.makefile("rb") as file:
                    connection.settimeout(20)
                    heads.append(b"".join(iter(file.readline, b"\r\n")))
                    connection.sendall(data)
                    file.read()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(20)
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}", heads
        finally:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            thread.join()


def test_a_connection_is_kept(hub: Hub) -> None:
    url = hub.add("org/model", "x", DATA).replace(hub.url, f"{hub.url}/cdn")
    with line() as connection:
        for _ in range(3):
            answer, at = connection.get(Request(url, {"Range": "bytes=0-9"}, {}))
            assert (answer.read(), at) == (DATA[:10], url)
    assert len(hub.connections) == 1


def test_a_kept_connection_that_the_server_has_closed(hub: Hub) -> None:
    url = hub.add("org/model", "x", DATA).replace(hub.url, f"{hub.url}/cdn")
    with line() as connection:
        for _ in range(2):
            answer, _ = connection.get(Request(url, {}, {}))
            assert answer.read() == DATA
            hub.connections[-1].shutdown(socket.SHUT_RDWR)
    assert len(hub.connections) == 2


def test_the_token_stays_with_the_hub(hub: Hub) -> None:
    request = Request(hub.add("org/model", "x", DATA), {"Range": "bytes=5-9"}, SECRET)
    with line() as connection:
        answer, url = connection.get(request)
        assert answer.read() == DATA[5:10]
    assert url.startswith(f"{hub.cdn}/cdn/")
    assert [seen.headers.get("authorization") for seen in hub.seen] == [SECRET["Authorization"], None]
    assert all(seen.headers["accept-encoding"] == "identity" for seen in hub.seen)
    assert all(seen.headers["user-agent"].startswith("llmq/") for seen in hub.seen)


@pytest.mark.parametrize("change", [lambda url: url.replace("127.0.0.1", "127.0.0.2"), lambda url: url + "0"])
def test_another_host_or_port_is_not_the_hub(hub: Hub, change: Callable[[str], str]) -> None:
    """Nobody is there; that the token is not among what is sent is seen from the headers."""
    sent: list[dict[str, str]] = []

    class Watched(Line):
        def _ask(self, parts, headers):  # type: ignore[no-untyped-def]
            sent.append(headers)
            return super()._ask(parts, headers)

    hub.fail("onward", where="^/org/", headers={"Location": change(hub.url)})
    watched = Watched(0.5)
    with contextlib.suppress(NetworkError, *BROKEN):
        watched.get(Request(hub.add("org/model", "x", DATA), {}, SECRET))
    watched.close()
    assert "Authorization" in sent[0]
    assert not any("Authorization" in headers for headers in sent[1:])


def test_no_way_without_encryption_after_one_with_it(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        module, "connect", lambda parts: http.client.HTTPConnection(parts.hostname or "", parts.port or 0)
    )
    url = hub.add("org/model", "x", DATA).replace("http:", "https:")
    with line() as connection, pytest.raises(NetworkError, match="without encryption"):
        connection.get(Request(url, {}, SECRET))
    assert len(hub.seen) == 1


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file with the key and the certificate of 127.0.0.1 and localhost, signed by itself."""
    if not shutil.which("openssl"):
        pytest.skip("needs openssl")
    path = tmp_path_factory.mktemp("certificate") / "both.pem"
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-days",
        "2",
        "-subj",
        "/CN=localhost",
        "-addext",
    ]
    names = "subjectAltName=IP:127.0.0.1,DNS:localhost"
    subprocess.run(
        [*command, names, "-keyout", str(path), "-out", f"{path}.crt"], check=True, capture_output=True, timeout=60
    )
    path.write_bytes(path.read_bytes() + Path(f"{path}.crt").read_bytes())
    return path


@pytest.fixture
def encrypted(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    monkeypatch.setenv("SSL_CERT_FILE", f"{certificate}.crt")
    with serving(context) as hub:
        yield hub
        assert not hub.told()


def test_encrypted(encrypted: Hub) -> None:
    request = Request(encrypted.add("org/model", "x", DATA), {}, SECRET)
    with line() as connection:
        answer, url = connection.get(request)
        assert answer.read() == DATA
    assert url.startswith("https://localhost")
    encrypted.fail("onward", where="^/org/", headers={"Location": encrypted.cdn.replace("https", "http")})
    with line() as connection, pytest.raises(NetworkError, match="without encryption"):
        connection.get(request)


def test_a_certificate_that_nobody_vouches_for(encrypted: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SSL_CERT_FILE")
    with line() as connection, pytest.raises(BROKEN, match="certificate"):
        connection.get(Request(encrypted.add("org/model", "x", DATA), {}, SECRET))
    assert not encrypted.seen


def test_certificates_of_the_system_come_before_others(
    certificate: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """certifi's are for systems that have none, be it in a file or in a folder, which is not read beforehand."""
    for name in ("SSL_CERT_FILE", "SSL_CERT_DIR"):
        monkeypatch.delenv(name, raising=False)
    found = ssl.get_default_verify_paths()
    monkeypatch.setattr(ssl, "create_default_context", lambda: ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))

    def loaded(folder: Path | None) -> int:
        monkeypatch.setattr(ssl, "get_default_verify_paths", lambda: found._replace(capath=folder and str(folder)))
        encryption.cache_clear()
        return len(encryption(("", "")).get_ca_certs())

    assert loaded(None) > 100
    assert loaded(tmp_path) > 100
    (tmp_path / "12345678.0").write_bytes(certificate.read_bytes())
    assert loaded(tmp_path) == 0
    encryption.cache_clear()


def give_up(connection: Line, url: str) -> bytes:
    """What had arrived when a read that hangs was given up."""
    got = threading.Event()

    def read() -> bytes:
        answer, _ = connection.get(Request(url, {}, {}))
        data = answer.read(1)
        got.set()
        with contextlib.suppress(*BROKEN):
            while piece := answer.read1(1 << 16):
                data += piece
        return data

    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(read)
        assert got.wait(20)
        connection.abort()
        return reading.result(timeout=20)


LENGTH, CLOSE = b"Content-Length: 9\r\n", b"Connection: close\r\n"


@pytest.mark.parametrize("header", [LENGTH, CLOSE, LENGTH + CLOSE])
def test_a_read_that_hangs_can_be_given_up(header: bytes) -> None:
    with answering(b"HTTP/1.1 200 OK\r\n" + header + b"\r\nabc") as (url, _), line(30) as connection:
        assert give_up(connection, url) == b"abc"
        with pytest.raises(TimeoutError):
            connection.get(Request(url, {}, {}))


def test_an_encrypted_read_that_hangs_can_be_given_up(encrypted: Hub) -> None:
    """And what is on its way is not taken for the body as it is, encrypted."""
    encrypted.fail("stall", at=100_000)
    url = encrypted.add("org/model", "x", DATA).replace(encrypted.url, f"{encrypted.url}/cdn")
    with line(30) as connection:
        assert DATA.startswith(give_up(connection, url))


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"nonsense\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 1000 + b"\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * 100_000 + b"\r\n\r\n",
        b"HTTP/1.1 99999999999 OK\r\n\r\n",
        b"HTTP/3.0 200 OK\r\n\r\n",
        b"220 ftp\r\n",
    ],
    ids=lambda answer: repr(answer[:20]),
)
def test_what_is_not_an_answer(answer: bytes) -> None:
    with answering(answer) as (url, _), line(0.5) as connection, pytest.raises(BROKEN):
        connection.get(Request(url, {}, {}))


def test_an_http_proxy(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked for the whole address, shown its own password, and no token: others can read along."""
    hub.add("org/model", "x", DATA)
    monkeypatch.setenv("http_proxy", hub.url.replace("//", "//user:p%40ss@"))
    url = "http://hub.example/cdn/org/model/resolve/main/x"
    with line() as connection:
        for _ in range(2):
            answer, at = connection.get(Request(url, {}, SECRET))
            assert (answer.read(), at) == (DATA, url)
    # "user:p@ss" in base64
    expected = ("hub.example", "Basic dXNlcjpwQHNz")
    assert [(seen.headers["host"], seen.headers["proxy-authorization"]) for seen in hub.seen] == [expected] * 2
    assert [seen.path for seen in hub.seen] == [url] * 2
    assert len(hub.connections) == 1


def test_a_proxy_for_encrypted_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    with answering(b"HTTP/1.1 403 no\r\n\r\n") as (proxy, heads), line() as connection:
        monkeypatch.setenv("https_proxy", proxy.replace("//", "//user:secret@"))
        with pytest.raises(BROKEN) as caught:
            connection.get(Request("https://hub.example/x", {}, SECRET))
    assert heads[0].startswith(b"CONNECT hub.example:443 ")
    assert b"\r\nproxy-authorization: basic " in heads[0].lower()
    assert TOKEN.encode() not in heads[0]
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("environment", "url", "expected"),
    [
        ({"http_proxy": "http://p:1"}, "http://x.example/", "p"),
        ({"http_proxy": "p:1"}, "http://x.example/", "p"),
        ({"all_proxy": "http://p:1"}, "http://x.example/", "p"),
        ({"http_proxy": "http://p:1"}, "https://x.example/", None),
        ({"http_proxy": "http://p:1", "no_proxy": "x.example"}, "http://x.example/", None),
        ({"http_proxy": "http://p:1", "no_proxy": ".example"}, "http://x.example/", None),
        ({"http_proxy": "http://p:1", "no_proxy": "x.example:80"}, "http://x.example/", None),
        ({"http_proxy": "http://p:1", "no_proxy": "*"}, "http://x.example/", None),
        ({"http_proxy": "http://p:1", "no_proxy": "y.example"}, "http://x.example/", "p"),
        ({"http_proxy": "http://p:1"}, "http://localhost:9/", None),
        ({"http_proxy": "http://p:1"}, "http://127.0.0.1:9/", None),
    ],
)
def test_which_proxy(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], url: str, expected: str | None
) -> None:
    for name, text in environment.items():
        monkeypatch.setenv(name, text)
    proxy = proxy_of(urlsplit(url))
    assert (proxy.hostname if proxy else None) == expected


def test_proxies_of_other_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("all_proxy", "socks5://user:secret@p:1")
    with pytest.raises(NetworkError, match="http://") as caught:
        proxy_of(urlsplit("http://x.example/"))
    assert "secret" not in str(caught.value)


BEGINNINGS = st.sampled_from(["http://", "https://", "//", "file:", ""])
URLS = st.text() | st.builds("{}{}{}".format, BEGINNINGS, st.text("[]@:/%.0a\\ \r\n\x7f"), st.text())


def assert_shown(sentence: str) -> None:
    assert sentence.isprintable()


@given(URLS)
def test_addresses(url: str) -> None:
    try:
        parts = checked(url)
    except NetworkError as error:
        assert_shown(str(error))
        return
    assert parts.scheme in ("http", "https")
    assert parts.hostname
    assert url.isascii()
    assert not set(url) & set("\r\n \t")


@given(URLS)
def test_redirects(location: str) -> None:
    with contextlib.suppress(NetworkError):
        checked(joined("https://x.example/a/b", location))
