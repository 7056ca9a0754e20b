"""The HTTP server of the metrics: one thread, and a bound for everything that a client can take.

It runs in the agent, so whatever clients do, the agent must go on enforcing. What is bounded:
- descriptors: at most `MAX_CONNECTIONS` connections, in descriptors that are held for them. The oldest one that
  has not asked for anything gives way to a new one, so idle connections neither use up the agent's descriptors nor
  keep a scrape waiting;
- time: `HEAD_SECONDS` for a request, `STALL_SECONDS` without progress and `ANSWER_SECONDS` in all for an answer;
- memory: `scrape.MAX_HEAD_BYTES` of a request, and `MAX_ANSWERS` answers at a time;
- processor: after an answer was made no other one is made for as long as that took, and after all other work the
  thread sleeps for as long as that took (`_rest`), so each costs at most half a core.

The addresses need not be there: each is tried again until it can be had (`problem` says what is wrong meanwhile).

Descriptors are closed by the thread alone, each through its own socket object. The one exception is the eventfd
that wakes the thread: `close` closes it, after the thread has ended.
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
from portward.metrics.http import Answer, BadRequestError, Request
from portward.metrics.listeners import listening, unreachable

MAX_CONNECTIONS: Final = 32
HEAD_SECONDS: Final = 5.0
# Connections never have more than this part of the agent's descriptors.
_LIMIT_PARTS: Final = 8
# An answer makes progress, or its connection ends. A request waits no longer than Prometheus does, 10 s.
STALL_SECONDS: Final = 5.0
WAIT_SECONDS: Final = 10.0
ANSWER_SECONDS: Final = 30.0
# An answer about 100,000 subscriptions has some 10 MB.
MAX_ANSWERS: Final = 4
# So long an answer keeps its place if another request waits for one.
_FAIR_SECONDS: Final = 1.0
# How long the end of an answered connection is awaited. To close before would reset it if the client had sent more
# than a head, and a reset destroys what the client has not read.
_LINGER_SECONDS: Final = 1.0
# Between two tries to listen; each one doubles it up to the second value.
_RETRY_SECONDS, _LONGEST_RETRY = 1.0, 30.0
# Without descriptors or memory for a connection: between two tries.
_PAUSE_SECONDS: Final = 0.5
# New connections in a row before the others have their turn.
_ACCEPTED: Final = 64
_READ_BYTES: Final = 4_096
_END_SECONDS: Final = 0.5
# Processor time after which the thread looks whether it has slept as long.
_WORK_SECONDS: Final = 0.01
_LOG_SECONDS: Final = 60.0
_SCARCE: Final = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_log = logging.getLogger("portward.metrics.registry")


@dataclass(eq=False)
class _Listener:
    """An address, and the socket that listens there once it can be had. Times by the monotonic clock."""

    endpoint: Endpoint
    socket: socket.socket | None = None
    error: OSError | None = None
    retry_at: float = 0.0
    pause: float = _RETRY_SECONDS
    paused: bool = False


@dataclass(eq=False)
class _Connection:
    """A client: it sends its request, waits, receives its answer, and ends. `since`: when that state began."""

    socket: socket.socket
    since: float
    received: bytearray
    request: Request | None = None
    answer: memoryview | None = None
    progress: float = 0.0
    ending: bool = False
    watched: int = 0  # the events that the selector is asked for

    @property
    def idle(self) -> bool:
        """Whether it has asked for nothing, or has got everything."""
        return self.ending or (self.request is None and self.answer is None)

    def expires(self) -> float:
        """When it has taken too long."""
        if self.ending:
            return self.since + _LINGER_SECONDS
        if self.answer is not None:
            return min(self.progress + STALL_SECONDS, self.since + ANSWER_SECONDS)
        return self.since + (WAIT_SECONDS if self.request is not None else HEAD_SECONDS)


class MetricsServer:
    """Answers scrapes at some addresses. `refused` (cause → connections that ended without an answer), `retries`
    (failed tries to listen) and `problem` may be read on any thread."""

    def __init__(self, endpoints: Sequence[Endpoint], answer: Callable[[Request], Answer]) -> None:
        """`answer` is called on the server's thread. Opens nothing."""
        self._answer = answer
        self._listeners = [_Listener(endpoint) for endpoint in endpoints]
        self._connections: dict[int, _Connection] = {}
        self._rest_until = self._log_again = 0.0
        # Processor time of the thread, without answers, and the time, when it last had slept enough.
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
        """Listens at once at the addresses that can be had, and begins to answer. Never raises: without
        descriptors or threads there are no metrics, which is logged and stands in `problem`."""
        if not self._listeners:
            return
        with contextlib.ExitStack() as opened:
            try:
                self._selector = opened.enter_context(selectors.DefaultSelector())
                # Connections take these descriptors and no others: none of what else the agent needs.
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
            opened.pop_all()  # from here on the thread closes all of it, and `close` the eventfd

    def close(self) -> None:
        """Frees addresses and descriptors. Waits a moment for the thread; idempotent."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        self._closing = True
        os.eventfd_write(self._wake, 1)
        thread.join(_END_SECONDS)
        if not thread.is_alive():  # else it is making a large answer, and ends with the process
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
                # No memory, or a fault of portward's own: it costs the connections, and nothing else.
                _log.exception("the metrics server begins anew")
                self._drop_all()
                time.sleep(_PAUSE_SECONDS)
        self._end()

    def _turn(self) -> None:
        """Waits for what happens next, and does it."""
        for key, _ in self._selector.select(self._patience()):
            if isinstance(key.data, _Listener):
                self._accept(key.data)
            elif isinstance(key.data, _Connection) and self._connections.get(key.fd) is key.data:
                self._serve(key.data)
        self._expire()
        self._answer_next()
        self._listen()

    def _rest(self) -> None:
        """Sleeps if the thread has worked for longer than it has slept: clients can connect, or send what nobody
        asked for, as fast as they like."""
        worked = time.thread_time() - self._worked
        if worked < _WORK_SECONDS:
            return
        slept = time.monotonic() - self._rested - worked
        if slept < worked:
            time.sleep(min(worked - slept, _PAUSE_SECONDS))
        self._worked, self._rested = time.thread_time(), time.monotonic()

    def _patience(self) -> float | None:
        """Seconds until something is due; None: nothing is."""
        due = [connection.expires() for connection in self._connections.values()]
        due += [one.retry_at for one in self._listeners if one.socket is None or one.paused]
        if self._waiting():
            due.append(self._next_answer())
        return max(0.0, min(due) - time.monotonic()) if due else None

    # --- addresses ---

    def _listen(self) -> None:
        """Opens what does not listen yet, and lets in again what had to wait for descriptors."""
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
            # Once for each cause: a second agent may have the address for days.
            if listener.error is None or listener.error.errno != error.errno:
                _log.warning("metrics.address %s: %s: it is tried again", listener.endpoint, error.strerror)
            listener.error, listener.retry_at = error, now + listener.pause
            listener.pause = min(2 * listener.pause, _LONGEST_RETRY)
            return
        if listener.error is not None:
            _log.info("metrics.address %s: metrics can be scraped now", listener.endpoint)
        listener.socket, listener.error, listener.pause = opened, None, _RETRY_SECONDS

    def _watched(self, listener: _Listener) -> socket.socket:
        """A socket that listens, and that the selector waits for; raises OSError, and then there is none."""
        opened = listening(listener.endpoint, alone=len(self._listeners) == 1)
        try:
            self._selector.register(opened, selectors.EVENT_READ, listener)
        except OSError:
            opened.close()
            raise
        return opened

    # --- connections ---

    def _accept(self, listener: _Listener) -> None:
        for turn in range(_ACCEPTED):
            accepted = self._accepted(listener, waits=turn == 0)
            if accepted is None:
                return
            self._take(accepted)

    def _accepted(self, listener: _Listener, *, waits: bool) -> socket.socket | None:
        """The next client, if there is one and a descriptor for it. `waits`: the selector says that there is one.
        Without a descriptor the kernel does not say it: it fails before it looks."""
        assert listener.socket is not None  # noqa: S101 # it is registered
        while True:
            self._reserve.give_one()
            try:
                return listener.socket.accept()[0]
            except OSError as error:
                self._reserve.refill(len(self._connections))
                # Else nobody waits, or the client has left.
                if not waits or error.errno not in _SCARCE:
                    return None
            if not self._give_way():
                self.refused["descriptors"] += 1
                self._pause(listener)
                return None

    def _pause(self, listener: _Listener) -> None:
        """Without a descriptor the listener would wake the thread over and over."""
        assert listener.socket is not None  # noqa: S101 # it is registered
        self._selector.unregister(listener.socket)
        listener.paused, listener.retry_at = True, time.monotonic() + _PAUSE_SECONDS

    def _take(self, accepted: socket.socket) -> None:
        if len(self._connections) >= self._share and not self._give_way():
            self.refused["crowded"] += 1
            accepted.close()
            return
        accepted.setblocking(False)
        connection = _Connection(accepted, time.monotonic(), bytearray())
        self._connections[accepted.fileno()] = connection
        self._watch(connection, selectors.EVENT_READ)
        self._serve(connection)  # a scrape's request is often there already

    def _watch(self, connection: _Connection, events: int) -> None:
        """Has the selector wait for these events of a connection, or for none."""
        if not events:
            if connection.watched:
                self._selector.unregister(connection.socket)
        elif connection.watched:
            self._selector.modify(connection.socket, events, connection)
        else:
            self._selector.register(connection.socket, events, connection)
        connection.watched = events

    def _give_way(self) -> bool:
        """Closes the oldest connection that is idle; False if none is."""
        for connection in self._connections.values():  # in the order in which they came
            if connection.idle:
                self._drop(connection, "" if connection.ending else "crowded")
                return True
        return False

    def _drop(self, connection: _Connection, cause: str = "") -> None:
        """Closes a connection; `cause` says why it got no answer."""
        if cause:
            self.refused[cause] += 1
        self._watch(connection, 0)
        del self._connections[connection.socket.fileno()]
        connection.socket.close()
        self._reserve.refill(len(self._connections))

    def _serve(self, connection: _Connection) -> None:
        try:
            if connection.answer is not None:
                self._send(connection)
            else:
                self._receive(connection)
        except BlockingIOError:
            return
        except OSError:  # the client has left
            self._drop(connection)

    def _receive(self, connection: _Connection) -> None:
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
            # Not until it is answered: whoever goes on sending would wake the thread over and over.
            self._watch(connection, 0)

    def _send(self, connection: _Connection) -> None:
        assert connection.answer is not None  # noqa: S101 # asked by `_serve`
        while connection.answer:
            sent = connection.socket.send(connection.answer)
            connection.answer, connection.progress = connection.answer[sent:], time.monotonic()
        connection.answer, connection.request, connection.ending = None, None, True
        connection.since = time.monotonic()
        connection.socket.shutdown(socket.SHUT_WR)
        self._watch(connection, selectors.EVENT_READ)

    # --- answers ---

    def _waiting(self) -> list[_Connection]:
        """Those whose request is not answered yet."""
        return [one for one in self._connections.values() if one.request is not None and one.answer is None]

    def _sending(self) -> list[_Connection]:
        """Those that receive an answer now."""
        return [one for one in self._connections.values() if one.answer is not None]

    def _answer_next(self) -> None:
        """Makes the answer for the request that has waited for longest, if it is time and there is room."""
        now, waiting = time.monotonic(), self._waiting()
        if not waiting or now < self._next_answer():
            return
        sending = self._sending()
        if len(sending) >= MAX_ANSWERS:  # it has had its time
            self._drop(min(sending, key=_since), "slow")
        connection = min(waiting, key=_since)
        assert connection.request is not None  # noqa: S101 # it waits
        worked = time.thread_time()
        made = self._made(connection.request)
        self._rest_until = 2 * time.monotonic() - now
        self._worked += time.thread_time() - worked
        self._begin(connection, made)

    def _next_answer(self) -> float:
        """When the next answer may be made: after a rest, and if all places are taken, once the oldest answer has
        had `_FAIR_SECONDS`."""
        sending = self._sending()
        if len(sending) < MAX_ANSWERS:
            return self._rest_until
        return max(self._rest_until, min(map(_since, sending)) + _FAIR_SECONDS)

    def _made(self, request: Request) -> bytes:
        try:
            return http.encoded(self._answer(request), with_body=request.method == "GET")
        except Exception:
            if time.monotonic() >= self._log_again:  # a client may ask for the same again and again
                _log.exception("a scrape could not be answered")
                self._log_again = time.monotonic() + _LOG_SECONDS
            return http.encoded(Answer("500 Internal Server Error", (), b"The log of portward says why.\n"))

    def _begin(self, connection: _Connection, answer: bytes) -> None:
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
        """Closes everything but the eventfd."""
        self._drop_all()
        self._close_listeners()
        self._selector.close()
        self._reserve.release()

    def _close_listeners(self) -> None:
        for listener in self._listeners:
            if listener.socket is not None:
                listener.socket.close()
                listener.socket = None


def _since(connection: _Connection) -> float:
    return connection.since
