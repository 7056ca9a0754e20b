"""As much of HTTP as a scrape needs: bytes → request, answer → bytes. Pure.

A connection carries one request: GET or HEAD, without a body. Every other request gets an answer that says so. An
answer or a log line never repeats text of a client.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple

# Prometheus sends half a kilobyte. A client that sends more than this without an end of the head is refused.
MAX_HEAD_BYTES: Final = 8_192
_END: Final = re.compile(rb"\r?\n\r?\n")
_REQUEST: Final = re.compile(r"([!-~]{1,32}) ([!-~]+) HTTP/1\.[01]")
_HEADER: Final = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):(.*)")
_PATHS: Final = ("/metrics", "/")
_METHODS: Final = ("GET", "HEAD")


class Request(NamedTuple):
    """A scrape: the method, the query behind `?`, and the headers that select the format."""

    method: str
    query: str
    accept: str
    accept_encoding: str


class Answer(NamedTuple):
    """Status as in `200 OK`, headers without `Content-Length` and `Connection`, and body."""

    status: str
    headers: tuple[tuple[str, str], ...]
    body: bytes


class BadRequestError(Exception):
    """A request that gets `answer` instead of metrics. `malformed`: it is not HTTP."""

    def __init__(self, status: str, text: str, *headers: tuple[str, str], malformed: bool = False) -> None:
        super().__init__(status)
        self.malformed = malformed
        plain = ("Content-Type", "text/plain; charset=utf-8")
        self.answer = Answer(status, (plain, *headers), text.encode() + b"\n")


def request(received: bytes) -> Request | None:
    """The request in the bytes received so far; None if its head is not complete. Raises BadRequestError."""
    end = _END.search(received)
    if end is None:
        if len(received) > MAX_HEAD_BYTES:
            raise BadRequestError(
                "431 Request Header Fields Too Large", f"A head has up to {MAX_HEAD_BYTES} bytes.", malformed=True
            )
        return None
    lines = re.split(r"\r?\n", received[: end.start()].decode("latin-1"))
    line = _REQUEST.fullmatch(lines[0])
    headers = [found for line in lines[1:] if (found := _HEADER.fullmatch(line)) is not None]
    if line is None or len(headers) < len(lines) - 1:
        raise BadRequestError("400 Bad Request", "This is no HTTP/1.1 request.", malformed=True)
    return _of(line[1], line[2], [(found[1].lower(), found[2].strip()) for found in headers])


def _of(method: str, target: str, headers: list[tuple[str, str]]) -> Request:
    if method not in _METHODS:
        allowed = ", ".join(_METHODS)
        raise BadRequestError("405 Method Not Allowed", f"Allowed here: {allowed}.", ("Allow", allowed))
    # A client behind a proxy sends the whole URL.
    path, _, query = re.sub(r"(?i)^http://[^/?]*", "", target).partition("?")
    if (path or "/") not in _PATHS:
        raise BadRequestError("404 Not Found", "The metrics are at /metrics.")
    return Request(method, query, _joined("accept", headers), _joined("accept-encoding", headers))


def _joined(name: str, headers: list[tuple[str, str]]) -> str:
    return ", ".join(value for found, value in headers if found == name)


def encoded(answer: Answer, *, with_body: bool = True) -> bytes:
    """The answer as bytes. It announces the end of the connection."""
    headers = (*answer.headers, ("Content-Length", str(len(answer.body))), ("Connection", "close"))
    head = f"HTTP/1.1 {answer.status}\r\n" + "".join(f"{name}: {value}\r\n" for name, value in headers) + "\r\n"
    return head.encode("latin-1") + (answer.body if with_body else b"")
