"""Request heads: those of scrapes are recognised, and any other gets the right error."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from portward.metrics.http import MAX_HEAD_BYTES, Answer, BadRequestError, Request, encoded, request

PROMETHEUS = (
    b"GET /metrics HTTP/1.1\r\nHost: 127.0.0.1:9125\r\nUser-Agent: Prometheus/2.42.0\r\n"
    b"Accept: application/openmetrics-text;version=1.0.0,text/plain\r\nAccept-Encoding: gzip\r\n"
    b"X-Prometheus-Scrape-Timeout-Seconds: 10\r\n\r\n"
)


def test_the_request_of_prometheus_is_read() -> None:
    accept = "application/openmetrics-text;version=1.0.0,text/plain"
    assert request(PROMETHEUS) == Request("GET", "", accept, "gzip")


def test_a_head_that_is_not_complete_is_waited_for() -> None:
    for end in range(len(PROMETHEUS) - 1):
        assert request(PROMETHEUS[:end]) is None


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        (b"GET / HTTP/1.0\n\n", Request("GET", "", "", "")),
        (b"HEAD /metrics?name[]=up HTTP/1.1\r\n\r\n", Request("HEAD", "name[]=up", "", "")),
        (b"GET http://[::1]:9125/metrics HTTP/1.1\r\n\r\n", Request("GET", "", "", "")),
        (b"GET http://host HTTP/1.1\r\n\r\n", Request("GET", "", "", "")),
        (b"GET / HTTP/1.1\r\nAccept: a\r\nACCEPT:  b  \r\n\r\nmore", Request("GET", "", "a, b", "")),
    ],
)
def test_what_is_a_scrape(head: bytes, expected: Request) -> None:
    assert request(head) == expected


@pytest.mark.parametrize(
    ("head", "status", "malformed"),
    [
        (b"GET /other HTTP/1.1\r\n\r\n", 404, False),
        (b"GET /metrics/.. HTTP/1.1\r\n\r\n", 404, False),
        (b"POST /metrics HTTP/1.1\r\nContent-Length: 5\r\n\r\nhello", 405, False),
        (b"OPTIONS * HTTP/1.1\r\n\r\n", 405, False),
        (b"GET /metrics\r\n\r\n", 400, True),
        (b"GET /metrics HTTP/2.0\r\n\r\n", 400, True),
        (b"\x16\x03\x01\x02\x00 client hello\r\n\r\n", 400, True),
        (b"GET /metrics HTTP/1.1\r\nno header\r\n\r\n", 400, True),
        (b"GET /metrics HTTP/1.1\r\nAccept: a\r\n folded\r\n\r\n", 400, True),
        (b"\r\n\r\n", 400, True),
        (b"GET /" + b"x" * MAX_HEAD_BYTES, 431, True),
    ],
)
def test_a_request_that_is_no_scrape_gets_the_right_error(head: bytes, status: int, malformed: bool) -> None:
    with pytest.raises(BadRequestError) as caught:
        request(head)
    assert caught.value.answer.status.startswith(str(status))
    assert caught.value.malformed is malformed


def test_a_method_that_is_not_allowed_names_those_that_are() -> None:
    with pytest.raises(BadRequestError) as caught:
        request(b"PUT / HTTP/1.1\r\n\r\n")
    assert ("Allow", "GET, HEAD") in caught.value.answer.headers


@given(
    st.binary(max_size=300) | st.binary(max_size=300).map(lambda tail: b"GET / HTTP/1.1\r\n" + tail + b"\r\n\r\n")
)
def test_any_bytes_are_a_request_or_refused(received: bytes) -> None:
    try:
        found = request(received)
    except BadRequestError:
        return
    assert found is None or found.method in ("GET", "HEAD")


def test_an_answer_says_how_long_it_is_and_that_it_is_the_last() -> None:
    wire = encoded(Answer("200 OK", (("Content-Type", "text/plain"),), b"up 1\n"))
    assert wire == (
        b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 5\r\nConnection: close\r\n\r\nup 1\n"
    )
    assert encoded(Answer("200 OK", (), b"up 1\n"), with_body=False).endswith(
        b"Content-Length: 5\r\nConnection: close\r\n\r\n"
    )
