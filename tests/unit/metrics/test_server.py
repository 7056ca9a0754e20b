"""With harmful clients, the metrics server still answers scrapes, and its use of resources stays bounded."""

from __future__ import annotations

import contextlib
import errno
import http.client
import logging
import os
import selectors
import socket
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from portward.config.endpoint import Endpoint, parse
from portward.daemon.metrics import FAMILIES
from portward.metrics import connection, exporter, listeners
from portward.metrics import server as metricsserver
from portward.metrics.http import Answer, Request
from portward.metrics.server import MAX_ANSWERS, MAX_CONNECTIONS, MetricsServer
from unit.scarce import count, no_descriptors

SECONDS = 60.0
ANSWER = Answer("200 OK", (("Content-Type", "text/plain"),), b"up 1\n")
SCRAPE = b"GET /metrics HTTP/1.1\r\n\r\n"
# More than the sockets of both ends hold.
LARGE = b"x" * (64 << 20)


def free() -> Endpoint:
    """An address that no process has now."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return Endpoint("127.0.0.1", taken.getsockname()[1])


def until(true: Callable[[], bool]) -> None:
    """Waits until `true()` is true."""
    deadline = time.monotonic() + SECONDS
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)  # pause: of a poll


class Ground:
    """A server at an address of the loopback, and its clients."""

    def __init__(self) -> None:
        self.endpoint = free()
        self.answer: Callable[[Request], Answer] = lambda _: ANSWER
        self.server = MetricsServer([self.endpoint], self._answered)
        self.clients = contextlib.ExitStack()

    def _answered(self, request: Request) -> Answer:
        return self.answer(request)

    def connect(self, sends: bytes = b"") -> socket.socket:
        """A client that sends this and reads nothing."""
        client = self.clients.enter_context(
            socket.create_connection((self.endpoint.host, self.endpoint.port), timeout=SECONDS)
        )
        client.sendall(sends)
        return client

    def ask(self, sends: bytes = SCRAPE) -> bytes:
        """Everything that a client receives until the end."""
        with socket.create_connection((self.endpoint.host, self.endpoint.port), timeout=SECONDS) as client:
            client.sendall(sends)
            return b"".join(iter(lambda: client.recv(65536), b""))

    def held(self) -> int:
        """Connections that the server has now."""
        return len(self.server._connections)


@pytest.fixture
def ground() -> Iterator[Ground]:
    """A server that listens."""
    found = Ground()
    found.server.start()
    yield found
    found.clients.close()
    found.server.close()


def test_a_scrape_is_answered_as_a_client_expects_it(ground: Ground) -> None:
    for method, body in (("GET", b"up 1\n"), ("HEAD", b"")):
        connection = http.client.HTTPConnection(ground.endpoint.host, ground.endpoint.port, timeout=SECONDS)
        connection.request(method, "/metrics")
        reply = connection.getresponse()
        assert (reply.status, reply.read()) == (200, body)
        assert reply.getheader("Content-Length") == "5"
        connection.close()


def test_the_metrics_come_in_the_format_that_is_asked_for() -> None:
    answer = exporter.scrape_handler(FAMILIES, dict)
    plain = answer(Request("GET", "", "", ""))
    assert plain.status == "200 OK"
    assert b"portward_build_info" in plain.body
    modern = answer(Request("GET", "", "application/openmetrics-text; version=1.0.0", ""))
    assert modern.body.endswith(b"# EOF\n")
    packed = answer(Request("GET", "", "", "gzip"))
    assert ("Content-Encoding", "gzip") in packed.headers


def test_idle_connections_give_way_and_a_scrape_is_answered(ground: Ground) -> None:
    before = count()
    idle = [ground.connect() for _ in range(300)]
    assert ground.ask().endswith(b"up 1\n")
    until(lambda: ground.server.refused["crowded"] >= 300 - MAX_CONNECTIONS)
    assert ground.held() <= MAX_CONNECTIONS
    assert count() - before <= len(idle) + MAX_CONNECTIONS
    assert ground.ask().endswith(b"up 1\n")


def test_a_request_that_is_half_written_counts_as_idle(ground: Ground) -> None:
    for _ in range(2 * MAX_CONNECTIONS):
        ground.connect(SCRAPE[:10])
    assert ground.ask().endswith(b"up 1\n")


def test_who_does_not_ask_in_time_is_closed(ground: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEAD_TIMEOUT_S", 0.05)
    client = ground.connect(b"GET /metrics")
    assert client.recv(1) == b""
    until(lambda: ground.server.refused["slow"] == 1)
    assert ground.held() == 0


def test_who_sends_bytes_one_by_one_is_closed_too(ground: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEAD_TIMEOUT_S", 0.1)
    client = ground.connect()

    def ends() -> bool:
        with contextlib.suppress(BlockingIOError):
            try:
                client.send(b"x")
                client.setblocking(False)
                return client.recv(1) == b""
            except ConnectionError:
                return True
        return False

    until(ends)


def test_who_does_not_read_is_closed(ground: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "STALL_TIMEOUT_S", 0.05)
    ground.answer = lambda _: ANSWER._replace(body=LARGE)
    ground.connect(SCRAPE)
    until(lambda: ground.server.refused["slow"] == 1)
    assert ground.held() == 0


def test_slow_readers_hold_few_answers_and_give_way(ground: Ground) -> None:
    """Each answer takes memory for as long as it is sent."""
    made: list[None] = []

    def large(_: Request) -> Answer:
        made.append(None)
        return ANSWER._replace(body=LARGE)

    ground.answer = large
    for _ in range(MAX_ANSWERS):
        ground.connect(SCRAPE)
    until(lambda: len(made) == MAX_ANSWERS)
    assert ground.ask().endswith(b"xxx")
    assert ground.server.refused["slow"] == 1


def test_a_busy_scraper_leaves_half_of_the_time(ground: Ground) -> None:
    """After each answer the thread rests for as long as the answer took. So two more answers take at least five
    times as long as one."""

    def slow(_: Request) -> Answer:
        time.sleep(0.1)  # pause: how slow the answer is
        return ANSWER

    ground.answer = slow
    began = time.monotonic()
    for _ in range(3):
        ground.ask()
    assert time.monotonic() - began >= 0.5


@pytest.mark.parametrize(
    ("sends", "status", "malformed"),
    [
        (b"GET /other HTTP/1.1\r\n\r\n", b"404", 0),
        (b"DELETE /metrics HTTP/1.1\r\n\r\n", b"405", 0),
        (b"POST /metrics HTTP/1.1\r\nContent-Length: 200000\r\n\r\n" + b"x" * 200_000, b"405", 0),
        (b"hello\r\n\r\n", b"400", 1),
        (b"GET / HTTP/1.1\r\nx: " + b"x" * 50_000 + b"\r\n\r\n", b"431", 1),
    ],
)
def test_what_is_no_scrape_gets_an_answer(ground: Ground, sends: bytes, status: bytes, malformed: int) -> None:
    assert ground.ask(sends).startswith(b"HTTP/1.1 " + status)
    assert ground.server.refused["malformed"] == malformed


def test_an_answer_that_fails_is_a_500_and_logged_once(ground: Ground, caplog: pytest.LogCaptureFixture) -> None:
    def broken(_: Request) -> Answer:
        raise RuntimeError("no numbers")

    ground.answer = broken
    for _ in range(3):
        assert ground.ask().startswith(b"HTTP/1.1 500")
    assert sum("could not be answered" in record.message for record in caplog.records) == 1
    ground.answer = lambda _: ANSWER
    assert ground.ask().startswith(b"HTTP/1.1 200")


def test_an_address_that_is_taken_is_tried_again(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metricsserver, "_RETRY_S", 0.02)
    monkeypatch.setattr(metricsserver, "_MAX_RETRY_S", 0.02)
    caplog.set_level(logging.INFO)
    ground = Ground()
    with socket.create_server((ground.endpoint.host, ground.endpoint.port)):
        ground.server = MetricsServer([ground.endpoint], lambda _: ANSWER)
        for listener in ground.server._listeners:
            listener.pause = 0.02
        ground.server.start()
        until(lambda: ground.server.retries >= 3)
        assert ground.server.problem == f"{ground.endpoint}: Address already in use"
    until(lambda: not ground.server.problem)
    assert ground.ask().endswith(b"up 1\n")
    ground.server.close()
    logged = [record.message for record in caplog.records]
    assert sum("Address already in use" in line for line in logged) == 1
    assert sum("can be scraped now" in line for line in logged) == 1


def test_of_localhost_one_family_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    port = free().port
    real = listeners.listening

    def without_ipv6(endpoint: Endpoint, *, alone: bool) -> socket.socket:
        if endpoint.version == 6:
            raise OSError(errno.EADDRNOTAVAIL, "Cannot assign requested address")
        return real(endpoint, alone=alone)

    monkeypatch.setattr(metricsserver, "listening", without_ipv6)
    server = MetricsServer(parse(f"localhost:{port}"), lambda _: ANSWER)
    server.start()
    assert server.problem == ""
    server.close()
    monkeypatch.setattr(listeners, "listening", without_ipv6)
    assert "::1" in listeners.try_to_listen(parse(f"[::1]:{port}"))
    assert listeners.try_to_listen(parse(f"localhost:{port}")) == ""


def test_a_scrape_is_answered_though_no_descriptor_is_left(ground: Ground) -> None:
    clients = [socket.socket() for _ in range(2 * MAX_CONNECTIONS)]
    with contextlib.ExitStack() as stack:
        for client in clients:
            stack.enter_context(client)
        with no_descriptors():
            for client in clients:
                client.connect((ground.endpoint.host, ground.endpoint.port))
            clients[-1].settimeout(SECONDS)
            clients[-1].sendall(SCRAPE)
            said = clients[-1].recv(4096)
        assert said.startswith(b"HTTP/1.1 200")


def test_no_descriptor_at_the_start_costs_only_the_metrics(caplog: pytest.LogCaptureFixture) -> None:
    ground = Ground()
    with no_descriptors():
        ground.server.start()
    assert "Too many open files" in ground.server.problem
    ground.server.close()


def test_no_thread_at_the_start_costs_only_the_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_thread(_: object) -> None:
        raise RuntimeError("can't start new thread")

    before = count()
    ground = Ground()
    monkeypatch.setattr("threading.Thread.start", no_thread)
    ground.server.start()
    assert ground.server.problem == "can't start new thread"
    ground.server.close()
    assert count() == before


def test_its_end_frees_address_and_descriptors_and_nothing_else() -> None:
    before = count()
    ground = Ground()
    ground.server.start()
    for _ in range(40):
        ground.connect()
    ground.ask()
    ground.server.close()
    ground.clients.close()
    until(lambda: count() == before)
    stranger = os.eventfd(0)
    ground.server.close()
    os.close(stranger)  # raises if the server has closed it
    with socket.create_server((ground.endpoint.host, ground.endpoint.port)):
        pass


def test_a_fault_of_its_own_costs_the_connections_and_not_the_server(
    ground: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metricsserver, "_PAUSE_S", 0.01)
    real = ground.server._expire
    faults = [MemoryError()]

    def failing() -> None:
        if faults:
            raise faults.pop()
        real()

    monkeypatch.setattr(ground.server, "_expire", failing)
    ground.connect()
    until(lambda: not faults)
    assert ground.ask().endswith(b"up 1\n")


def test_a_listener_that_cannot_be_waited_for_is_opened_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """For example, the kernel has no memory for epoll. A server that listens and never accepts would look
    healthy."""

    class Scarce(selectors.DefaultSelector):
        failed = False

        def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
            if isinstance(data, metricsserver._Listener) and not Scarce.failed:
                Scarce.failed = True
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().register(fileobj, events, data)

    monkeypatch.setattr(metricsserver, "_RETRY_S", 0.01)
    monkeypatch.setattr(selectors, "DefaultSelector", Scarce)
    other = Ground()
    other.server.start()
    try:
        until(lambda: not other.server.problem)
        assert other.ask().endswith(b"up 1\n")
        assert other.server.retries == 1
    finally:
        other.server.close()


def test_who_keeps_the_thread_busy_has_half_of_a_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clients connect, or send useless data, as fast as they can."""
    work, pauses = 0.0, list[float]()
    now = 1_000.0

    def sleep(seconds: float) -> None:
        nonlocal now
        pauses.append(seconds)
        now += seconds

    clocks = SimpleNamespace(thread_time=lambda: work, monotonic=lambda: now, sleep=sleep)
    monkeypatch.setattr(metricsserver, "time", clocks)
    server = MetricsServer([], lambda _: ANSWER)
    for _ in range(1_000):
        work, now = work + 0.001, now + 0.001
        server._rest()
    assert sum(pauses) == pytest.approx(work, rel=0.05)
    assert max(pauses) < metricsserver._CLOSE_TIMEOUT_S
    pauses.clear()
    for _ in range(1_000):
        work, now = work + 0.001, now + 0.003
        server._rest()
    assert len(pauses) <= 1, "it has slept by itself, but for the end of what was before"
