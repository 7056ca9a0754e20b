"""The packets that come out while other programs try to remove a table with an owner, under a flood: none.

A blocked tenant floods port 25 over IPv4 and IPv6, from a source with a cached denial and from unknown ones.
Another program flushes the rulesets, deletes and changes portward's table, and runs the script of
nftables.service. Counters on the Internet side say how many packets came out. They are the kernel's, so none is
missed.

In turns: while the agent runs; while it is ended and started again all the time, by SIGTERM and SIGKILL; and while
reloads make a plain table of it and one with an owner. While the agent is ended, the owner is looked up all the
time: a reading without one is the gap. The same with a plain table shows that the counters see what comes out.
"""

from __future__ import annotations

import contextlib
import ipaddress
import itertools
import os
import random
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Final

from bench import flood
from bench.figures import Figure
from kernel.conftest import Gateway, running_gateway
from kernel.owner import COMMANDS, look, nft, owner, owning
from kernel.wire import Sender, meanwhile, segment
from portward.dataplane.names import TABLE
from portward.dataplane.nfnetlink import NfNetlink
from portward.lab import namespaces
from portward.lab.agent import until
from portward.lab.topology import FABRIKAM

_SCRIPT: Final = Path(__file__).resolve().parents[2] / "systemd" / "nftables"
_FLUSH: Final = "add table inet theirs\nflush ruleset\n"
_PPS: Final = 20_000
_SOURCES: Final = 2_000
# The agent is started at least this often while the other program is at work.
_RESTARTS: Final = 20
_WATCH: Final = """
table inet watch {
  counter mail { }
  counter other { }
  chain c {
    type filter hook prerouting priority -400;
    tcp dport 25 counter name mail
    tcp dport 587 counter name other
  }
}
"""


def measure(folder: Path, rounds: int = 1_000) -> Iterator[Figure]:
    """`owned_leaked_…`: packets that came out; `owned_gap`: readings without an owner; `plain_leaked`: the same
    with a plain table."""
    choose = random.Random(1)
    (folder / "owned").mkdir()
    with owning(folder / "owned") as gateway, _flooded(gateway, folder) as leaked:
        attack = itertools.cycle(choose.sample(_attacks(gateway), k=len(_attacks(gateway))))
        yield _figure(
            "owned_leaked_running", leaked(lambda: _times(rounds, attack)), f"packets in {rounds} attacks"
        )
        with _looked_up(gateway) as readings:
            found, starts = _restarted(gateway, rounds, attack, leaked)
        yield _figure("owned_leaked_restarting", found, f"packets in {rounds} attacks and {starts} starts")
        yield _figure("owned_gap", readings.count(0), f"readings without an owner, of {len(readings)}")
        changes = max(rounds // 10, 2)
        yield _figure(
            "owned_leaked_converting", leaked(lambda: _convert(gateway, changes)), f"packets in {changes} reloads"
        )
    (folder / "plain").mkdir()
    with running_gateway(folder / "plain") as gateway, _flooded(gateway, folder) as leaked:
        found = leaked(lambda: _times(20, itertools.repeat(lambda: nft(gateway, f"delete table inet {TABLE}\n"))))
        if not found:
            raise RuntimeError("no packet came out of a gateway without rules: nothing was seen")
        yield Figure("plain_leaked", found, found, found, "packets in 20 deletions of a plain table")


def _figure(name: str, value: int, unit: str) -> Figure:
    return Figure(name, value, value, value, unit, "<= 0")


def _attacks(gateway: Gateway) -> list[Callable[[], object]]:
    """The attempts of another program: most often a flush."""
    commands = [*[_FLUSH] * 5, *(f"{command}\n" for command in COMMANDS)]
    found: list[Callable[[], object]] = [lambda text=text: nft(gateway, text) for text in commands]  # type: ignore[misc]
    return [*found, *(lambda word=word: _service(gateway, word) for word in ("start", "stop"))]


def _service(gateway: Gateway, word: str) -> None:
    """Runs the script of nftables.service, with a configuration that flushes."""
    rules = gateway.agent.folder / "nftables.conf"
    rules.write_text(_FLUSH)
    inner = 'mount --bind "$1" /etc/nftables.conf; exec sh "$2" "$3"'
    argv = ["unshare", "--mount", "sh", "-ec", inner, "sh", os.fspath(rules), os.fspath(_SCRIPT), word]
    namespaces.run(gateway.lab.gateway, argv)


def _times(rounds: int, attack: Iterator[Callable[[], object]]) -> None:
    for _ in range(rounds):
        next(attack)()


def _restarted(
    gateway: Gateway,
    rounds: int,
    attack: Iterator[Callable[[], object]],
    leaked: Callable[[Callable[[], None]], int],
) -> tuple[int, int]:
    """The packets that came out, and how often the agent was started."""
    starts, done = itertools.count(), threading.Event()

    def restart() -> None:
        if not done.is_set():
            gateway.agent.stop(signal.SIGKILL if next(starts) % 2 else signal.SIGTERM)
            gateway.agent.start()

    def go_on() -> None:
        _times(rounds, attack)
        while next(starts) < 2 * _RESTARTS:  # this counts, too
            next(attack)()
        done.set()

    with meanwhile(restart):
        found = leaked(go_on)
    return found, next(starts) - _RESTARTS


@contextlib.contextmanager
def _looked_up(gateway: Gateway) -> Iterator[list[int]]:
    """Looks the owner up all the time."""
    readings: list[int] = []

    def reading(netlink: NfNetlink) -> None:
        found = netlink.state(TABLE)
        readings.append(0 if found is None else found.owner)

    with closing(look(gateway)) as netlink, meanwhile(lambda: reading(netlink)):
        yield readings


def _convert(gateway: Gateway, changes: int) -> None:
    """Reloads with and without an owner, in turns; at the end it is there."""
    for number in range(2 * (changes // 2)):
        owned = bool(number % 2)
        gateway.agent.configure(ruleset={"owned": "auto" if owned else "never"})
        gateway.agent.reload()
        until(lambda: bool(owner(gateway)) is owned, "the table is of the other kind")  # noqa: B023 # at once


@contextlib.contextmanager
def _flooded(gateway: Gateway, folder: Path) -> Iterator[Callable[[Callable[[], None]], int]]:
    """The flood goes on within the `with`. Yields a function that gives how many packets to port 25 came out
    while some work was done. Raises RuntimeError if no packet to another port did."""
    namespaces.load(gateway.lab.internet, _WATCH)
    with namespaces.inside(gateway.lab.internet):
        watch = NfNetlink()
    program = flood.build(folder)
    floods = [
        flood.start(gateway.lab.home(FABRIKAM), program, frames, dev="eth0", pps=_PPS / 2)
        for frames in _frames(gateway, folder)
    ]

    def came_out(work: Callable[[], None]) -> int:
        before = watch.counters("watch")
        work()
        after = watch.counters("watch")
        if after["other"] == before["other"]:
            raise RuntimeError("no packet to another port came out")
        return after["mail"] - before["mail"]

    try:
        yield came_out
    finally:
        for one in floods:
            flood.finish(one, now=True)
        watch.close()


def _frames(gateway: Gateway, folder: Path) -> Iterator[Path]:
    """For each family a file of frames: to port 25 from the denied source and unknown ones in turns, and some to
    port 587."""
    with closing(Sender(gateway.lab, FABRIKAM)) as sender:
        link = sender.frame
    for known, network in (
        ("10.0.0.4", ipaddress.ip_network("10.9.0.0/16")),
        (FABRIKAM.address6, ipaddress.ip_network("2001:db8:1002:9::/64")),
    ):
        first = ipaddress.ip_address(known)
        sources = [first.packed, *(network[number].packed for number in range(1, _SOURCES))]
        mail, other = (bytes(link / segment(known, port=port)) for port in (25, 587))
        frames = [*flood.from_sources(mail, sources), *[mail] * _SOURCES, *[other] * 20]
        random.Random(2).shuffle(frames)
        yield flood.write(folder / f"{first.version}", frames)
