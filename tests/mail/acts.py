"""The acts on one gateway, in order, and the checks that must hold."""

from __future__ import annotations

import errno
import socket
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Final

from mail.clients import SERVERS, Fate
from mail.machines import Memory
from mail.report import Checks
from mail.rows import EXPECTED, Row, State
from mail.site import FAMILIES, Site, site
from portward.errors import PortwardError
from portward.lab import namespaces
from portward.lab.agent import until

_MIDDLE: Final = 20  # packets after which a mail of `_BIG` bytes is on its way for sure
_REFUSALS: Final = (100, 20.0, 0.05, 0.99)  # connections, how many a second, seconds to the refusal, share


def play(
    folder: Path, roots: dict[str, Path], memory: Memory, rows: list[Row], refuse_with: str, checks: Checks
) -> None:
    """Runs all acts on a gateway with this `refuse_with`, and reports each check to `checks`."""
    cut = [row for row in rows if row.state is State.REVOKED]
    steady = [row for row in rows if row.state is not State.REVOKED]
    with site(folder, roots, memory, rows, refuse_with) as there:
        with ThreadPoolExecutor() as pool:
            sending = pool.submit(there.send, steady, "first")
            revoked = pool.submit(_revoke, there, cut)
            sending.result()
            late = _lines(revoked)
        checks.hold(f"{refuse_with}: each software says what it should", _wrong_fates(steady))
        checks.hold(
            f"{refuse_with}: the servers have the mails that were delivered", _missing(there, steady, "first")
        )
        checks.hold(f"{refuse_with}: nothing passes after a revocation", late)
        checks.hold(f"{refuse_with}: the counters equal tcpdump's", there.differences(rows))
        checks.hold(f"{refuse_with}: each packet is counted under its verdict", there.misnamed(rows))
        if refuse_with == "reject":
            checks.hold("reject: 20 connections a second are refused at once", _refusals(there, steady[0]))
            checks.hold("reject: these too are counted", there.differences(rows))
        first = {row.tenant.vni: dict(row.said) for row in steady}
        quick = [row for row in steady if row.state is not State.DROPPED]
        # The verdicts of the first mails have expired. These mails fill the cache again, so that the new agent
        # finds cached elements that it could count a second time.
        there.send(quick, "again")
        checks.hold(f"{refuse_with}: the counters equal tcpdump's before the restart", there.differences(rows))
        there.restart()
        checks.hold(f"{refuse_with}: a restart counts nothing", there.unchanged())
        there.send(quick, "second")
        checks.hold(f"{refuse_with}: the same fates after the restart", _wrong_fates(quick))
        checks.hold(f"{refuse_with}: the counters equal tcpdump's after the restart", there.differences(rows))
        for row in steady:
            row.said = first[row.tenant.vni]


def _lines(found: Future[list[str]]) -> list[str]:
    """The lines of a check, or the error that ended it as its only line, so that the other checks go on."""
    try:
        return found.result()
    except (TimeoutError, OSError, RuntimeError, PortwardError) as error:
        return [f"{type(error).__name__}: {error}"]


def _wrong_fates(rows: Sequence[Row]) -> Iterator[str]:
    for row in rows:
        for family, said in row.said.items():
            for one in said:
                if one.fate is not EXPECTED[row.state]:
                    yield f"{row}, IPv{family}: {one}"


def _missing(there: Site, rows: Sequence[Row], mark: str) -> Iterator[str]:
    for row in rows:
        for family, said in row.said.items():
            delivered = sum(one.fate is Fate.DELIVERED for one in said)
            if (arrived := there.arrived(row, mark, family)) != delivered:
                yield f"{row}, IPv{family}: {delivered} delivered by its own words, {arrived} at the server"


def _revoke(there: Site, rows: Sequence[Row]) -> list[str]:
    """Revokes customers while their mails are on the way; gives a line for each mail that arrived whole all the
    same."""
    pairs = [(row, family) for row in rows for family in FAMILIES]
    with ThreadPoolExecutor() as pool:
        sending = pool.submit(there.send, rows, "cut")
        until(
            lambda: all(there.sent(*pair) >= _MIDDLE for pair in pairs), "all mails are on their way", every_s=0.2
        )
        there.agent.apply(*(record for row in rows for record in row.revocations()), confirm=True)
        passed = {(row.tenant.vni, family): there.sent(row, family) for row, family in pairs}
        until(
            lambda: all(there.sent(row, family) > passed[row.tenant.vni, family] for row, family in pairs)
            or sending.done(),
            "all have sent something after it", every_s=0.2,
        )  # fmt: skip
        # Silence the machines and kill their connections. Otherwise each software would wait minutes for the
        # timeout of its cut connection.
        for row in rows:
            there.machines[row.tenant.vni].silence()
            namespaces.run(there.machines[row.tenant.vni].namespace, ["ss", "-K", "dport", "=", ":25"])
        sending.result()
    whole = [f"{row}, IPv{family}" for row, family in pairs if there.arrived(row, "cut", family)]
    return [f"{name}: its mail arrived whole" for name in whole]


def _refusals(there: Site, row: Row) -> list[str]:
    """Opens twenty connections a second from a refused customer, over each family. Gives a line for each family
    with too few refusals in time."""
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(lambda family: _refused(there.machines[row.tenant.vni].namespace, family), FAMILIES))
    count, _, _, share = _REFUSALS
    return [
        f"IPv{family}: {refused} of {count}"
        for family, refused in zip(FAMILIES, found, strict=True)
        if refused < share * count
    ]


def _refused(namespace: str, family: int) -> int:
    """How many connections are refused within the time of `_REFUSALS`."""
    count, each_second, within_s, _ = _REFUSALS
    refused, began = 0, time.monotonic()
    for number in range(count):
        time.sleep(max(0.0, began + number / each_second - time.monotonic()))  # pause: the pace of the connections
        with namespaces.inside(namespace):
            client = socket.socket(socket.AF_INET if family == 4 else socket.AF_INET6)
        with client:
            client.settimeout(within_s)
            try:
                refused += client.connect_ex((SERVERS[family], 25)) == errno.ECONNREFUSED
            except TimeoutError:
                continue
    return refused
