"""`portward exemption revoke --wait`: the time until the kernel enforces it, and the packets that leak afterwards.

A tenant has an open SMTP transfer, and also sends a segment every millisecond. Each revocation is one run of the
program, and the time is the one that it prints. A packet is a leak if it was sent after the program had returned,
and arrives. Then one command revokes ten thousand subscriptions.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, date, datetime, timedelta
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any, Final
from uuid import UUID

from bench.change import Stream
from bench.figures import Figure, percentile
from kernel.conftest import Gateway, running_gateway
from portward.lab.agent import until
from portward.lab.demo import start_mail
from portward.lab.mail import OpenSession, Postbox
from portward.lab.topology import FABRIKAM, MAIL4
from portward.model import Attachment, Exemption, ExemptionState, Record, Subscription
from portward.store.backends import open_store
from portward.store.codec import encode, key_of
from portward.store.confirmation import confirmation
from portward.store.values import Put

_GRANTED: Final = datetime(2026, 1, 9, 12, tzinfo=UTC)
_ONE: Final = UUID("33333333-0000-4000-8000-000000000001")
_MANY: Final = 10_000
_BULK_ROUNDS: Final = 3
_FIRST: Final = int(ip_address("10.128.0.0"))
_LAST: Final = str(ip_address(_FIRST + _MANY - 1))
_AFTERWARDS: Final = 0.05
_EVERY: Final = 0.001
_ON_ITS_WAY: Final = 0.003


def measure(folder: Path, revocations: int = 200) -> list[Figure]:
    """`revoke_p99_ms`, `revoke_leaked_packets`, and `revoke_10000_s`: from the command's start to its end."""
    sys.setswitchinterval(0.0002)
    with running_gateway(folder) as gateway:
        one, leaked = _one_by_one(gateway, revocations)
        command, enforced = _at_once(gateway)
    return [
        Figure(
            "revoke_p99_ms", percentile(one, 0.99), percentile(one, 0.5), max(one),
            "ms, as the program says (from: median, to: largest)", "<= 20",
        ),
        Figure(
            "revoke_leaked_packets", leaked, leaked, leaked,
            f"packets sent after one of {revocations} had returned", "<= 0",
        ),
        Figure(
            "revoke_10000_s", percentile(command, 0.5), min(command), max(command),
            f"s, the whole command, median of {len(command)}", "<= 5",
        ),
        Figure(
            "revoke_10000_enforced_s", percentile(enforced, 0.5), min(enforced), max(enforced),
            "s of it from the write to the kernel",
        ),
    ]  # fmt: skip


def _one_by_one(gateway: Gateway, revocations: int) -> tuple[list[float], int]:
    times, leaked = [], 0
    machine = Attachment(
        segment=FABRIKAM.segment, address=ip_network(FABRIKAM.address4), subscription=_ONE,
        started=_GRANTED + timedelta(days=1),
    )  # fmt: skip
    _write(gateway, Subscription(id=_ONE, offer="pay-as-you-go", created=date(2022, 6, 30)), machine)
    postbox = Postbox(gateway.agent.folder / "mail.jsonl")
    server = start_mail(gateway.lab, postbox)
    stream = Stream(gateway, FABRIKAM.address4, FABRIKAM, _EVERY)
    try:
        for _ in range(revocations):
            _write(gateway, _exemption(_ONE))
            seen = len(stream.arrived)
            until(lambda seen=seen: len(stream.arrived) > seen, "the tenant may send")  # type: ignore[misc]
            with _transfer(gateway):
                printed = _revoke(gateway, str(_ONE))
                returned = time.monotonic()
                time.sleep(_ON_ITS_WAY)  # pause: packets that are on their way arrive
                mark = len(stream.arrived)
                time.sleep(_AFTERWARDS)  # pause: the denied tenant sends all this time
            times.append(printed["enforced_after_ms"])
            # A segment of the stream leaks if it was sent too late. For the transfer, any packet that arrives
            # after the pause for those on their way is a leak.
            leaked += sum(stream.sent.get(number, 0) > returned for number in stream.arrived)
            leaked += sum(number not in stream.sent for number in stream.arrived[mark:])
            if stream.sent[max(stream.sent)] < returned:
                raise RuntimeError("nothing was sent after the revocation")
            stream.arrived.clear()
    finally:
        stream.close()
        server.kill()
        server.wait()
    return times, leaked


def _at_once(gateway: Gateway) -> tuple[list[float], list[float]]:
    ids = [UUID(int=(4 << 96) | 0x4000_8000 << 48 | number) for number in range(_MANY)]
    _write(
        gateway,
        *(Subscription(id=id_, offer="csp", created=date(2022, 6, 30)) for id_ in ids),
        *(
            Attachment(
                segment=FABRIKAM.segment, address=ip_network(_FIRST + number), subscription=id_,
                started=_GRANTED + timedelta(days=1),
            )
            for number, id_ in enumerate(ids)
        ),
    )  # fmt: skip
    command, enforced = [], []
    for _ in range(_BULK_ROUNDS):
        _write(gateway, *map(_exemption, ids))
        until(lambda: gateway.passes(FABRIKAM, _LAST), "the last of them may send")
        began = time.monotonic()
        printed = _revoke(gateway, "--offer", "csp", "--confirm", str(_MANY))
        command.append(time.monotonic() - began)
        enforced.append(printed["enforced_after_ms"] / 1000)
        if printed["revoked"] != _MANY or gateway.passes(FABRIKAM, _LAST):
            raise RuntimeError(f"not all were revoked: {printed}")
    return command, enforced


def _revoke(gateway: Gateway, *what: str) -> dict[str, Any]:
    result = gateway.agent.portward("exemption", "revoke", *what, "--reason", "spam", "--wait", "--json")
    if result.returncode:
        raise RuntimeError(f"revoke: {result.stderr}")
    printed: dict[str, Any] = json.loads(result.stdout)
    return printed


@contextmanager
def _transfer(gateway: Gateway) -> Iterator[None]:
    """An SMTP transfer of the tenant that does not end."""
    session = OpenSession(gateway.lab, FABRIKAM, MAIL4, 25)
    ended = threading.Event()

    def go_on() -> None:
        with suppress(OSError):
            while not ended.wait(0.001):
                session.go_on()

    thread = threading.Thread(target=go_on, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        session.close()
        thread.join()


def _exemption(id_: UUID) -> Exemption:
    return Exemption(subscription=id_, state=ExemptionState.GRANTED, requested=_GRANTED, decided=_GRANTED)


def _write(gateway: Gateway, *records: Record) -> None:
    """Writes records, without regard to how many subscriptions they flip, and waits until the agent enforces
    them."""
    store = open_store(f"sqlite:{gateway.agent.folder / 'portward.db'}")
    try:
        before = store.revision()
        puts = [Put(key_of(record), encode(record)) for record in records]
        revision = store.write(
            [*puts, confirmation(before + 1)], expected=before, actor="bench", at=datetime.now(UTC)
        )
    finally:
        store.close()
    until(lambda: gateway.agent.revision() >= revision, f"revision {revision}", seconds=60)
