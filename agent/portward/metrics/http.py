"""HTTP as far as a scrape needs it: the head of a request as bytes → what is asked for; an answer → bytes. Pure.

One request a connection, GET or HEAD, without a body. Everything else gets an answer that says so. What a client
writes is never repeated in an answer or in the log.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple

# Prometheus sends half a kilobyte.
MAX_HEAD_BYTES: Final = 8_192
_END: Final = re.compile(rb"\r?\n\r?\n")
_REQUEST: Final = re.compile(r"([!-~]{1,32}) ([!-~]+) HTTP/1\.[01]")
_HEADER: Final = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):(.*)")
_PATHS: Final = ("/metrics", "/")
_METHODS: Final = ("GET", "HEAD")


class Request(NamedTuple):
    """A scrape: GET or HEAD, the query behind `?`, and the headers that decide about the format."""

    method: str
    query: str
    accept: str
    accept_encoding: str


class Answer(NamedTuple):
    """Status as in `200 OK`, headers without length and end of connection, body."""

    status: str
    headers: tuple[tuple[str, str], ...]
    body: bytes


class BadRequestError(Exception):
    """A request that gets no metrics; `answer` is what it gets. `malformed`: it is no HTTP."""

    def __init__(self, status: str, text: str, *headers: tuple[str, str], malformed: bool = False) -> None:
        super().__init__(status)
        self.malformed = malformed
        plain = ("Content-Type", "text/plain; charset=utf-8")
        self.answer = Answer(status, (plain, *headers), text.encode() + b"\n")


def request(received: bytes) -> Request | None:
    """What is asked for by the bytes received so far; None if the head is not complete. Raises BadRequestError."""
    end = _END.search(received)
    if end is None:
        if len(received) > MAX_HEAD_BYTES:
            raise BadRequestError(
                "431 Request Header Fields Too Large", f"A head has up to {MAX_HEAD_BYTES} bytes.", malformed=True
            )
        return None
    lines = re.split(r"\r?\n", received[: end.start()].decode("latin-1"))
    asked = _REQUEST.fullmatch(lines[0])
    headers = [found for line in lines[1:] if (found := _HEADER.fullmatch(line)) is not None]
    if asked is None or len(headers) < len(lines) - 1:
        raise BadRequestError("400 Bad Request", "This is no HTTP/1.1 request.", malformed=True)
    return _of(asked[1], asked[2], [(found[1].lower(), found[2].strip()) for found in headers])


def _of(method: str, target: str, headers: list[tuple[str, str]]) -> Request:
    if method not in _METHODS:
        allowed = ", ".join(_METHODS)
        raise BadRequestError("405 Method Not Allowed", f"Allowed here: {allowed}.", ("Allow", allowed))
    # A proxy sends the whole URL.
    path, _, query = re.sub(r"(?i)^http://[^/?]*", "", target).partition("?")
    if (path or "/") not in _PATHS:
        raise BadRequestError("404 Not Found", "The metrics are at /metrics.")
    return Request(method, query, _joined("accept", headers), _joined("accept-encoding", headers))


def _joined(name: str, headers: list[tuple[str, str]]) -> str:
    return ", ".join(value for found, value in headers if found == name)


def encoded(answer: Answer, *, with_body: bool = True) -> bytes:
    """The answer on the wire. It ends the connection."""
    headers = (*answer.headers, ("Content-Length", str(len(answer.body))), ("Connection", "close"))
    head = f"HTTP/1.1 {answer.status}\r\n" + "".join(f"{name}: {value}\r\n" for name, value in headers) + "\r\n"
    return head.encode("latin-1") + (answer.body if with_body else b"")
