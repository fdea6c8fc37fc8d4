"""HTTP GET as a stream, over a connection that is kept: redirects, proxies, and a token that stays at home.

What comes back is not decoded: a body with a Content-Encoding is refused by those who read it. Reading past the idle
limit raises TimeoutError; `abort` from another thread makes a read that hangs end at once.
"""

import contextlib
import functools
import http.client
import os
import socket
import ssl
import urllib.request
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast
from urllib.parse import SplitResult, unquote, urljoin, urlsplit

from llmq import __version__
from llmq.errors import NetworkError, quoted

USER_AGENT = f"llmq/{__version__}"
CONNECT_SECONDS = 10.0
MOST_REDIRECTS = 5
REDIRECTS = {301, 302, 303, 307, 308}
LOOPBACK = {"localhost", "127.0.0.1", "::1"}
PORTS = {"http": 80, "https": 443}
# What a server that breaks off, or speaks something else, makes of a request: worth another try.
BROKEN = (OSError, http.client.HTTPException)


@dataclass(frozen=True, slots=True)
class Request:
    """`secret` headers go to the host of `url` only, and only where the way there is encrypted or never leaves the
    machine."""

    url: str
    headers: Mapping[str, str]
    secret: Mapping[str, str]


class Line:
    """One connection, to the host that was asked last."""

    def __init__(self, idle_seconds: float) -> None:
        self._idle = idle_seconds
        self._connection: http.client.HTTPConnection | None = None
        # A connection lets go of these when the server says that it will close.
        self._socket: socket.socket | None = None
        self._response: http.client.HTTPResponse | None = None
        self._host: tuple[str, str] = ("", "")
        self._aborted = False

    def get(self, request: Request) -> tuple[http.client.HTTPResponse, str]:
        """The answer, after all redirects, and the URL that gave it.

        Raises one of BROKEN where the connection fails, and NetworkError for redirects that llmq does not follow.
        """
        home, url = urlsplit(request.url), request.url
        for _ in range(MOST_REDIRECTS + 1):
            parts = checked(url)
            headers = {"User-Agent": USER_AGENT, "Accept-Encoding": "identity", **request.headers}
            if (parts.scheme, parts.netloc) == (home.scheme, home.netloc) and is_private(parts):
                headers |= request.secret
            response = self._ask(parts, headers)
            if response.status not in REDIRECTS:
                return response, url
            # Not read: its body is nothing that anybody wants.
            self.close()
            url = joined(url, response.headers.get("Location", ""))
            if parts.scheme == "https" and urlsplit(url).scheme != "https":
                raise NetworkError(f"{host_of(parts)} sends on to a connection without encryption; not followed")
        raise NetworkError(f"{host_of(home)} sends from one address to the next without end; try again later")

    def abort(self) -> None:
        """Ends what the connection waits for; from any thread, for good."""
        self._aborted = True
        if self._socket:
            with contextlib.suppress(OSError):
                # Of the plain socket: an encrypted one would go on as a plain one, and take what comes as it is.
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    def close(self) -> None:
        if self._response:
            self._response.close()
        if self._connection:
            self._connection.close()
        self._connection = self._socket = self._response = None

    def _ask(self, parts: SplitResult, headers: dict[str, str]) -> http.client.HTTPResponse:
        host = (parts.scheme, parts.netloc)
        kept = self._connection if self._host == host else None
        if not kept:
            self.close()
            self._connection, self._host = connect(parts), host
        connection = cast("http.client.HTTPConnection", self._connection)
        try:
            return self._send(connection, parts, headers)
        except BROKEN:
            self.close()
            if not kept or self._aborted:
                raise
        # A kept connection that the server had closed meanwhile.
        return self._ask(parts, headers)

    def _send(
        self, connection: http.client.HTTPConnection, parts: SplitResult, headers: dict[str, str]
    ) -> http.client.HTTPResponse:
        if not connection.sock:
            connection.timeout = CONNECT_SECONDS
            connection.connect()
            connection.sock.settimeout(self._idle)
        self._socket = connection.sock
        if self._aborted:
            raise TimeoutError("given up")
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        if proxy_of(parts) and parts.scheme == "http":
            path = parts._replace(fragment="").geturl()
            headers = headers | proxy_headers(proxy_of(parts))
        connection.request("GET", path, headers=headers)
        self._response = connection.getresponse()
        return self._response


def checked(url: str) -> SplitResult:
    """The parts of an http or https URL. NetworkError for any other."""
    try:
        parts = urlsplit(url)
        known = parts.scheme in PORTS and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        known = False
    if not known or not url.isascii() or any(c <= " " or c == "\x7f" for c in url):
        shown = quoted(url.partition("?")[0].rpartition("@")[2])
        raise NetworkError(f"{shown} is not an address that llmq can fetch from")
    return parts


def joined(url: str, location: str) -> str:
    """Where a redirect leads. NetworkError where that is no address."""
    try:
        return urljoin(url, location)
    except ValueError:
        raise NetworkError(f"{host_of(urlsplit(url))} sends on to {quoted(location)}, which is no address") from None


def host_of(parts: SplitResult) -> str:
    return quoted(parts.hostname or "", 80).strip("'")


def is_private(parts: SplitResult) -> bool:
    """Whether nobody between here and there can read along."""
    return parts.scheme == "https" or parts.hostname in LOOPBACK


def connect(parts: SplitResult) -> http.client.HTTPConnection:
    """A connection, not yet open, to the host or to the proxy that the environment names for it."""
    port = parts.port or PORTS[parts.scheme]
    proxy = proxy_of(parts)
    host, at = (proxy.hostname or "", proxy.port or PORTS[proxy.scheme]) if proxy else (parts.hostname or "", port)
    if parts.scheme == "http":
        return http.client.HTTPConnection(host, at)
    authorities = tuple(os.environ.get(name, "") for name in ("SSL_CERT_FILE", "SSL_CERT_DIR"))
    connection = http.client.HTTPSConnection(host, at, context=encryption(authorities))
    if proxy:
        connection.set_tunnel(parts.hostname or "", port, proxy_headers(proxy))
    return connection


@functools.lru_cache(maxsize=1)
def encryption(authorities: tuple[str, ...]) -> ssl.SSLContext:
    """The system's certificates, or those that SSL_CERT_FILE and SSL_CERT_DIR name, which are the `authorities`; where
    there are none, certifi's."""
    context = ssl.create_default_context()
    # Those in a folder are read one by one when they are needed.
    folder = ssl.get_default_verify_paths().capath
    if not any(authorities) and not context.get_ca_certs() and not (folder and any(Path(folder).iterdir())):
        import certifi

        context.load_verify_locations(certifi.where())
    return context


def proxy_of(parts: SplitResult) -> SplitResult | None:
    host = parts.hostname or ""
    if urllib.request.proxy_bypass(f"{host}:{parts.port or PORTS[parts.scheme]}") or host in LOOPBACK:
        return None
    proxies = urllib.request.getproxies()
    text = proxies.get(parts.scheme) or proxies.get("all")
    if not text:
        return None
    proxy = urlsplit(text if "://" in text else f"http://{text}")
    try:
        known = proxy.scheme == "http" and bool(proxy.hostname) and (proxy.port or 1) > 0
    except ValueError:
        known = False
    if not known:
        raise NetworkError(f"the proxy for {parts.scheme} is of a kind that llmq does not speak; give an http:// one")
    return proxy


def proxy_headers(proxy: SplitResult | None) -> dict[str, str]:
    if not proxy or proxy.username is None:
        return {}
    pair = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}"
    return {"Proxy-Authorization": f"Basic {b64encode(pair.encode()).decode()}"}
