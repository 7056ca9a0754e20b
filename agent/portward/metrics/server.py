"""The HTTP server of the metrics: one thread, with a limit for everything that a client can take.

It runs in the agent, and the agent must go on enforcing whatever clients do. Limits:
- descriptors: at most `MAX_CONNECTIONS` connections, in descriptors that are reserved for them. A new connection
  closes the oldest idle one, so idle connections neither use up descriptors nor delay a scrape;
- time: `HEAD_TIMEOUT_S` for a request; for an answer `STALL_TIMEOUT_S` without progress, `ANSWER_TIMEOUT_S` in
  all;
- memory: `http.MAX_HEAD_BYTES` for a request, and `MAX_ANSWERS` answers at a time;
- processor: after each answer the thread makes no other one for as long as it took, and after other work it sleeps
  for as long as that took (`_rest`). So each of the two takes at most half a core.

An address need not exist yet: listening is retried until it works, and `problem` says what is wrong meanwhile.

Only the thread closes descriptors, each through its own socket object. The one exception is the eventfd that wakes
the thread: `close` closes it after the thread has ended.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import selectors
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from portward.base import descriptors
from portward.base.descriptors import Reserve
from portward.config.endpoint import Endpoint
from portward.metrics import http
from portward.metrics.connection import Connection
from portward.metrics.http import Answer, BadRequestError, Request
from portward.metrics.listeners import listening, unreachable

# More than the Prometheus servers of any site, with room for people.
MAX_CONNECTIONS: Final = 32
# Connections take at most one in this many of the agent's descriptors.
_LIMIT_PARTS: Final = 8
# An answer for 100,000 subscriptions has some 10 MB, so four take 40 MB.
MAX_ANSWERS: Final = 4
# An answer keeps its place for this long if another request waits for one.
_FAIR_S: Final = 1.0
# The first pause between two attempts to listen; each attempt doubles it up to the second value.
_RETRY_S, _MAX_RETRY_S = 1.0, 30.0
# The pause between two attempts if there is no descriptor or memory for a connection.
_PAUSE_S: Final = 0.5
# New connections in a row before other connections get their turn.
_MAX_ACCEPTED: Final = 64
_READ_BYTES: Final = 4_096
# `close` waits this long for the thread.
_CLOSE_TIMEOUT_S: Final = 0.5
# After this much processor time the thread checks whether it has slept for as long.
_WORK_S: Final = 0.01
# A client may cause the same error again and again; it is logged once in this time.
_LOG_S: Final = 60.0
# The errors of accept(2) if a descriptor or memory is missing.
_SCARCE: Final = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_log = logging.getLogger("portward.metrics")


@dataclass(eq=False)
class _Listener:
    """An address, and its listening socket if there is one. Times are of the monotonic clock."""

    endpoint: Endpoint
    socket: socket.socket | None = None
    error: OSError | None = None
    retry_at: float = 0.0
    pause: float = _RETRY_S
    paused: bool = False


class MetricsServer:
    """Answers scrapes at some addresses. Any thread may read `refused` (cause → connections that ended without an
    answer), `retries` (failed attempts to listen) and `problem`."""

    def __init__(self, endpoints: Sequence[Endpoint], answer: Callable[[Request], Answer]) -> None:
        """`answer` is called on the server's thread. Nothing is opened yet."""
        self._answer = answer
        self._listeners = [_Listener(endpoint) for endpoint in endpoints]
        self._connections: dict[int, Connection] = {}
        self._rest_until = self._log_again = 0.0
        # When the thread had last slept enough: its processor time without answers, and the monotonic time.
        self._worked = self._rested = 0.0
        self.refused: Counter[str] = Counter(dict.fromkeys(("crowded", "slow", "malformed", "descriptors"), 0))
        self.retries = 0
        self._failed = ""
        self._closing = False
        self._thread: threading.Thread | None = None
        self._selector: selectors.BaseSelector
        self._reserve: Reserve
        self._share = 0
        self._wake = -1

    def start(self) -> None:
        """Listens at the addresses that exist, and begins to answer. Never raises: without descriptors or threads
        there are no metrics, which is logged and set in `problem`."""
        if not self._listeners:
            return
        with contextlib.ExitStack() as opened:
            try:
                self._selector = opened.enter_context(selectors.DefaultSelector())
                # Connections use only these descriptors, so the rest of the agent keeps its own.
                self._share = max(1, min(MAX_CONNECTIONS, descriptors.limit() // _LIMIT_PARTS))
                self._reserve = Reserve(self._share)
                opened.callback(self._reserve.release)
                self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
                opened.callback(os.close, self._wake)
                self._selector.register(self._wake, selectors.EVENT_READ)
                opened.callback(self._close_listeners)
                self._listen()
                thread = threading.Thread(target=self._run, name="metrics", daemon=True)
                thread.start()
            except (OSError, RuntimeError) as error:
                self._failed = str(error)
                _log.error("there are no metrics until portward is restarted: %s", error)
                return
            self._thread = thread
            opened.pop_all()  # from now on the thread closes all of it, except the eventfd

    def close(self) -> None:
        """Frees addresses and descriptors. Waits up to `_CLOSE_TIMEOUT_S` for the thread. Idempotent."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        self._closing = True
        os.eventfd_write(self._wake, 1)
        thread.join(_CLOSE_TIMEOUT_S)
        if not thread.is_alive():  # otherwise it makes a large answer, and ends with the process
            os.close(self._wake)

    @property
    def problem(self) -> str:
        """Why the metrics cannot be scraped at one of the addresses; empty if they can."""
        if self._failed:
            return self._failed
        return unreachable({listener.endpoint: listener.error for listener in self._listeners})

    # --- the thread ---

    def _run(self) -> None:
        while not self._closing:
            try:
                self._turn()
                self._rest()
            except Exception:
                # No memory, or a bug. It costs the connections and nothing else.
                _log.exception("the metrics server closes all connections and continues")
                self._drop_all()
                time.sleep(_PAUSE_S)
        self._end()

    def _turn(self) -> None:
        """Waits for the next events, and handles them."""
        for key, _ in self._selector.select(self._timeout()):
            if isinstance(key.data, _Listener):
                self._accept(key.data)
            elif isinstance(key.data, Connection) and self._connections.get(key.fd) is key.data:
                self._serve(key.data)
        self._expire()
        self._answer_next()
        self._listen()

    def _rest(self) -> None:
        """Sleeps if the thread has worked for longer than it has slept, because clients can connect and send data
        as fast as they like."""
        worked = time.thread_time() - self._worked
        if worked < _WORK_S:
            return
        slept = time.monotonic() - self._rested - worked
        if slept < worked:
            time.sleep(min(worked - slept, _PAUSE_S))
        self._worked, self._rested = time.thread_time(), time.monotonic()

    def _timeout(self) -> float | None:
        """Seconds until the next timeout or attempt; None if none is due."""
        due = [connection.expires() for connection in self._connections.values()]
        due += [one.retry_at for one in self._listeners if one.socket is None or one.paused]
        if self._waiting():
            due.append(self._next_answer())
        return max(0.0, min(due) - time.monotonic()) if due else None

    # --- addresses ---

    def _listen(self) -> None:
        """Retries addresses that do not listen yet, and accepts again at those that waited for descriptors."""
        now = time.monotonic()
        for listener in self._listeners:
            if now < listener.retry_at:
                continue
            if listener.socket is None:
                self._open(listener, now)
            elif listener.paused:
                self._selector.register(listener.socket, selectors.EVENT_READ, listener)
                listener.paused = False

    def _open(self, listener: _Listener, now: float) -> None:
        try:
            opened = self._watched(listener)
        except OSError as error:
            self.retries += 1
            # Logged once for each cause, because a second agent may have the address for days.
            if listener.error is None or listener.error.errno != error.errno:
                _log.warning("metrics.address %s: %s: retrying", listener.endpoint, error.strerror)
            listener.error, listener.retry_at = error, now + listener.pause
            listener.pause = min(2 * listener.pause, _MAX_RETRY_S)
            return
        if listener.error is not None:
            _log.info("metrics.address %s: metrics can be scraped now", listener.endpoint)
        listener.socket, listener.error, listener.pause = opened, None, _RETRY_S

    def _watched(self, listener: _Listener) -> socket.socket:
        """A listening socket that the selector waits for. Raises OSError, and then there is none."""
        opened = listening(listener.endpoint, alone=len(self._listeners) == 1)
        try:
            self._selector.register(opened, selectors.EVENT_READ, listener)
        except OSError:
            opened.close()
            raise
        return opened

    # --- connections ---

    def _accept(self, listener: _Listener) -> None:
        for turn in range(_MAX_ACCEPTED):
            accepted = self._accepted(listener, waits=turn == 0)
            if accepted is None:
                return
            self._take(accepted)

    def _accepted(self, listener: _Listener, *, waits: bool) -> socket.socket | None:
        """The next client, if there is one and a descriptor for it. `waits`: the selector has reported a client.
        Without a free descriptor, accept(2) fails before it looks for a client, so its error says nothing about
        clients."""
        assert listener.socket is not None  # noqa: S101 # it is registered
        while True:
            self._reserve.give_one()
            try:
                return listener.socket.accept()[0]
            except OSError as error:
                self._reserve.refill(len(self._connections))
                # Otherwise no client waits, or it has left.
                if not waits or error.errno not in _SCARCE:
                    return None
            if not self._close_oldest_idle():
                self.refused["descriptors"] += 1
                self._pause(listener)
                return None

    def _pause(self, listener: _Listener) -> None:
        """Stops accepting for `_PAUSE_S`. Without a free descriptor the listener would wake the thread all the
        time."""
        assert listener.socket is not None  # noqa: S101 # it is registered
        self._selector.unregister(listener.socket)
        listener.paused, listener.retry_at = True, time.monotonic() + _PAUSE_S

    def _take(self, accepted: socket.socket) -> None:
        if len(self._connections) >= self._share and not self._close_oldest_idle():
            self.refused["crowded"] += 1
            accepted.close()
            return
        accepted.setblocking(False)
        connection = Connection(accepted, time.monotonic(), bytearray())
        self._connections[accepted.fileno()] = connection
        self._watch(connection, selectors.EVENT_READ)
        self._serve(connection)  # the request has often arrived already

    def _watch(self, connection: Connection, events: int) -> None:
        """Makes the selector wait for these events of a connection; 0: for none."""
        if not events:
            if connection.watched:
                self._selector.unregister(connection.socket)
        elif connection.watched:
            self._selector.modify(connection.socket, events, connection)
        else:
            self._selector.register(connection.socket, events, connection)
        connection.watched = events

    def _close_oldest_idle(self) -> bool:
        """Closes the oldest idle connection; False if there is none."""
        for connection in self._connections.values():  # in the order in which they came
            if connection.idle:
                self._drop(connection, "" if connection.ending else "crowded")
                return True
        return False

    def _drop(self, connection: Connection, cause: str = "") -> None:
        """Closes a connection; `cause` says why it got no answer."""
        if cause:
            self.refused[cause] += 1
        self._watch(connection, 0)
        del self._connections[connection.socket.fileno()]
        connection.socket.close()
        self._reserve.refill(len(self._connections))

    def _serve(self, connection: Connection) -> None:
        try:
            if connection.answer is not None:
                self._send(connection)
            else:
                self._receive(connection)
        except BlockingIOError:
            return
        except OSError:  # the client has left
            self._drop(connection)

    def _receive(self, connection: Connection) -> None:
        data = connection.socket.recv(_READ_BYTES)
        if not data:  # the client has left
            self._drop(connection)
            return
        if connection.ending:
            return
        connection.received += data
        try:
            request = http.request(bytes(connection.received))
        except BadRequestError as error:
            self.refused["malformed"] += error.malformed
            self._begin(connection, http.encoded(error.answer))
            return
        if request is not None:
            connection.request, connection.since = request, time.monotonic()
            # Until it is answered. A client that goes on sending would wake the thread all the time.
            self._watch(connection, 0)

    def _send(self, connection: Connection) -> None:
        assert connection.answer is not None  # noqa: S101 # asked by `_serve`
        while connection.answer:
            sent = connection.socket.send(connection.answer)
            connection.answer, connection.progress = connection.answer[sent:], time.monotonic()
        connection.answer, connection.request, connection.ending = None, None, True
        connection.since = time.monotonic()
        connection.socket.shutdown(socket.SHUT_WR)
        self._watch(connection, selectors.EVENT_READ)

    # --- answers ---

    def _waiting(self) -> list[Connection]:
        """The connections whose request has no answer yet."""
        return [one for one in self._connections.values() if one.request is not None and one.answer is None]

    def _sending(self) -> list[Connection]:
        """The connections that receive their answer now."""
        return [one for one in self._connections.values() if one.answer is not None]

    def _answer_next(self) -> None:
        """Answers the request that has waited longest, if the thread has rested and there is room for an
        answer."""
        now, waiting = time.monotonic(), self._waiting()
        if not waiting or now < self._next_answer():
            return
        sending = self._sending()
        if len(sending) >= MAX_ANSWERS:  # the oldest one has had `_FAIR_S`
            self._drop(min(sending, key=_since), "slow")
        connection = min(waiting, key=_since)
        assert connection.request is not None  # noqa: S101 # it waits
        worked = time.thread_time()
        made = self._made(connection.request)
        self._rest_until = 2 * time.monotonic() - now
        self._worked += time.thread_time() - worked
        self._begin(connection, made)

    def _next_answer(self) -> float:
        """When the next answer may be made: after a rest, and, if `MAX_ANSWERS` are being sent, when the oldest
        one has had `_FAIR_S`."""
        sending = self._sending()
        if len(sending) < MAX_ANSWERS:
            return self._rest_until
        return max(self._rest_until, min(map(_since, sending)) + _FAIR_S)

    def _made(self, request: Request) -> bytes:
        try:
            return http.encoded(self._answer(request), with_body=request.method == "GET")
        except Exception:
            if time.monotonic() >= self._log_again:
                _log.exception("a scrape could not be answered")
                self._log_again = time.monotonic() + _LOG_S
            return http.encoded(Answer("500 Internal Server Error", (), b"The log of portward says why.\n"))

    def _begin(self, connection: Connection, answer: bytes) -> None:
        connection.answer, connection.since = memoryview(answer), time.monotonic()
        connection.progress = connection.since
        self._watch(connection, selectors.EVENT_WRITE)
        self._serve(connection)

    # --- ends ---

    def _expire(self) -> None:
        now = time.monotonic()
        for connection in [one for one in self._connections.values() if one.expires() <= now]:
            self._drop(connection, "" if connection.ending else "slow")

    def _drop_all(self) -> None:
        for connection in list(self._connections.values()):
            self._drop(connection)

    def _end(self) -> None:
        """Closes everything except the eventfd."""
        self._drop_all()
        self._close_listeners()
        self._selector.close()
        self._reserve.release()

    def _close_listeners(self) -> None:
        for listener in self._listeners:
            if listener.socket is not None:
                listener.socket.close()
                listener.socket = None


def _since(connection: Connection) -> float:
    return connection.since
