"""What a server's answer to a request for a range is worth: taken, asked for again, or the end of it."""

import email.utils
import time
from http.client import HTTPResponse

from llmq.errors import NetworkError, quoted

BUSY = {408, 425, 429, 500, 502, 503, 504}
REFUSED = {401, 403}
GONE = {404, 410, 451}
RANGE = 416  # of a range that was right: another try may meet another server


class RetryError(Exception):
    """An answer that another try may better; `wait` is how many seconds the server asks for."""

    def __init__(self, what: str, wait: float = 0.0) -> None:
        super().__init__(what)
        self.wait = wait


def check_answer(answer: HTTPResponse, host: str, start: int, end: int, total: int, etag: str = "") -> None:
    """Whether the body is bytes `start` to `end` of a file of `total` bytes (206), or all of it (200).

    `etag`, where it is given, is the file's. Raises RetryError, or NetworkError where asking again is of no use.
    """
    check_status(answer, host)
    headers = answer.headers
    if headers.get("Content-Type", "").startswith("text/html"):
        raise NetworkError(f"{host} answers with a web page instead of the file; does this network ask for a login?")
    if headers.get("Content-Encoding", "identity") != "identity":
        raise RetryError(f"it sends the file as {quoted(headers['Content-Encoding'])}")
    if etag and headers.get("ETag", etag) != etag:
        raise NetworkError(f"{host} has another version of the file than a moment ago; run the command again")
    expected = end - start if answer.status == 206 else total
    length = headers.get("Content-Length", "no length")
    if length != str(expected):
        raise RetryError(f"it announces {quoted(length)} bytes instead of {expected}")
    if answer.status == 206 and headers.get("Content-Range") != f"bytes {start}-{end - 1}/{total}":
        raise RetryError("it sends another part than was asked for")


def check_status(answer: HTTPResponse, host: str) -> None:
    status = answer.status
    if answer.headers.get("X-Error-Code") == "GatedRepo":
        raise NetworkError(
            f"{host}: this repository is gated; accept its terms on its page there, put a token of that account into "
            "HF_TOKEN (or run `hf auth login`), and run this again"
        )
    if status in REFUSED:
        raise NetworkError(f"{host} refuses access ({status}); a token in HF_TOKEN is missing, or may not read this")
    if status in GONE:
        raise NetworkError(f"{host} has no such file ({status}); check the name")
    if status not in (200, 206):
        what = f"it answers {status} {quoted(answer.reason)}"
        if 400 <= status < 500 and status not in BUSY | {RANGE}:
            raise NetworkError(f"{host}: {what}; is the address right?")
        raise RetryError(what, retry_after(answer.headers.get("Retry-After", "")) if status in BUSY else 0.0)


def retry_after(text: str) -> float:
    """Seconds, from a number or a date; 0 for anything else."""
    if text.isdecimal():
        return float(text[:6])
    date = email.utils.parsedate_tz(text)
    try:
        return max(0.0, email.utils.mktime_tz(date) - time.time()) if date else 0.0
    except (ValueError, OverflowError):  # a year that no calendar has
        return 0.0


def reason(error: Exception) -> str:
    """Why a connection failed, in the system's words."""
    return quoted(getattr(error, "strerror", None) or str(error) or type(error).__name__).strip("'")
