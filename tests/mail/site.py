"""A gateway with its customers, the mail servers on the Internet side, and tcpdump on the gateway."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from kernel.conftest import lab_name
from mail.clients import SERVERS, Client
from mail.ledger import Ledger
from mail.machines import Machine, Memory
from mail.rows import VERDICTS, Row, State
from mail.wire import Sender, Wire, wire
from portward.lab import namespaces
from portward.lab.agent import Agent, until
from portward.lab.topology import Lab

FAMILIES: Final = (4, 6)
# The link of a customer that will be revoked in the middle of a mail: at this rate the mail takes a minute.
_SLOW: Final = ("tbf", "rate", "400kbit", "burst", "4kb", "latency", "400ms")
_PATIENCE_S: Final = 40.0


class Site:
    """See `site`."""

    def __init__(self, lab: Lab, agent: Agent, rows: list[Row], clients: dict[int, Client], mx: Machine) -> None:
        self.lab, self.agent, self.rows = lab, agent, rows
        self._clients, self._mx, self.ledger = clients, mx, Ledger()
        self.machines: dict[int, Machine] = {}
        self.wire: Wire
        self.indexes: dict[str, int] = {}

    def send(self, rows: Sequence[Row], mark: str) -> None:
        """Lets the software of all these rows send at once, over both families; puts the results into the rows."""
        jobs = [(row, family) for row in rows for family in FAMILIES]

        def one(job: tuple[Row, int]) -> None:
            row, family = job
            client = self._clients[row.tenant.vni]
            row.said[family] = client.send(family, row.mails(f"{mark}-{row.tenant.vni}-{family}"))

        with ThreadPoolExecutor(max_workers=len(jobs) or 1) as pool:
            list(pool.map(one, jobs))

    def arrived(self, row: Row, mark: str, family: int) -> int:
        """How many mails of a row the server has received completely."""
        end = f"end-{mark}-{row.tenant.vni}-{family}-"
        return sum(text.count(end) for text in self._taken(family))

    def _taken(self, family: int) -> Iterator[str]:
        for file in (self._mx.root / f"var/mx{family}").iterdir():
            yield file.read_text(errors="replace")

    def sent(self, row: Row, family: int) -> int:
        """How many packets of a row have reached the gateway so far, by tcpdump."""
        return self.wire.packets()[Sender(self.indexes[row.tenant.segment], row.address(family))]

    def restart(self) -> None:
        """Stops the agent and starts it again."""
        self.agent.stop()
        self.agent.start()

    def differences(self, rows: Sequence[Row]) -> list[str]:
        """A line for each row whose counters still differ from tcpdump's after `_PATIENCE_S` seconds."""
        found: list[str] = []

        def agree() -> bool:
            self.ledger.scraped(self.agent.metrics())
            on_wire = self.wire.packets()
            found[:] = [line for row in rows for line in self._wrong(row, on_wire)]
            return not found

        with contextlib.suppress(TimeoutError):
            until(agree, "the counters agree", seconds=_PATIENCE_S, every_s=0.5)
        return [*found, f"counted by rule, of all customers: {self._by_rule()}"] if found else []

    def _by_rule(self) -> dict[str, int]:
        """The packets that the ruleset has counted, by rule, without the zeros. These include the packets
        that got no verdict from a worker or the cache."""
        rule = re.compile(r'portward_screen_packets_total\{rule="(\w+)"\}')
        named = ((rule.fullmatch(name), int(value)) for name, value in self.agent.metrics().items())
        return {found[1]: value for found, value in named if found and value}

    def _wrong(self, row: Row, on_wire: dict[Sender, int]) -> Iterator[str]:
        index, segment = self.indexes[row.tenant.segment], row.tenant.segment
        packets = {family: on_wire.get(Sender(index, row.address(family)), 0) for family in FAMILIES}
        for family, id_ in row.subscriptions.items():
            if self.ledger.of(str(id_)) != packets[family]:
                yield (
                    f"{row}, IPv{family}: tcpdump has {packets[family]} packets, the subscription's counters "
                    f"{self.ledger.by_verdict(str(id_))}"
                )
        if self.ledger.of(segment) != sum(packets.values()):
            yield (
                f"{row}: tcpdump has {sum(packets.values())} packets, the counters of {segment} "
                f"{self.ledger.by_verdict(segment)}"
            )

    def misnamed(self, rows: Sequence[Row]) -> Iterator[str]:
        """A line for each subscription whose packets are counted under a verdict that they did not get."""
        for row in rows:
            for family, id_ in row.subscriptions.items():
                counted = self.ledger.by_verdict(str(id_))
                if not (VERDICTS[row.state].always <= counted.keys() <= VERDICTS[row.state].all):
                    yield f"{row}, IPv{family}: counted as {counted}"

    def unchanged(self) -> list[str]:
        """Waits without traffic until the agent has read its counters twice; gives a line for each counter that
        has risen meanwhile."""
        before = dict(self.ledger.packets)
        end = time.monotonic() + 12.0  # the sets are read every five seconds
        while time.monotonic() < end:
            self.ledger.scraped(self.agent.metrics())
            time.sleep(0.5)  # pause: the pace of the scrapes
        return [
            f"{owner}, {verdict}: {packets - before.get((owner, verdict), 0)} packets without a sender"
            for (owner, verdict), packets in self.ledger.packets.items()
            if packets != before.get((owner, verdict), 0)
        ]


@contextlib.contextmanager
def site(
    folder: Path, roots: dict[str, Path], memory: Memory, rows: list[Row], refuse_with: str
) -> Iterator[Site]:
    """A running gateway for these rows, with its servers and customers, before any of them has sent."""
    folder.mkdir()
    lab = Lab(lab_name(), tuple(row.tenant for row in rows))
    with lab, contextlib.ExitStack() as stack:
        mx = Machine(lab.internet, roots["postfix"], memory)
        _serve(mx)
        agent = Agent(lab, folder, verdicts={"refuse_with": refuse_with})
        agent.apply(*(record for row in rows for record in row.records()), confirm=True)
        stack.callback(agent.stop)
        agent.start()
        found = Site(lab, agent, rows, {}, mx)
        for row in rows:
            machine = Machine(lab.home(row.tenant), roots[row.kind.ROOT], memory)
            found.machines[row.tenant.vni] = machine
            found._clients[row.tenant.vni] = row.kind(machine)
            if row.state is State.REVOKED:
                namespaces.run(machine.namespace, ["tc", "qdisc", "add", "dev", "eth0", "root", *_SLOW])
            path = f"/sys/class/net/{row.tenant.segment}/ifindex"
            found.indexes[row.tenant.segment] = int(namespaces.run(lab.gateway, ["cat", path]).stdout)
        found.wire = stack.enter_context(wire(Machine(lab.gateway, roots["postfix"], memory)))
        yield found


def _serve(mx: Machine) -> None:
    """Starts a mail server for each family: Postfix's `smtp-sink`, which keeps each mail in a file."""
    for family, address in SERVERS.items():
        mx.run("install", "-d", "-m", "777", f"/var/mx{family}")
        host = address if family == 4 else f"[{address}]"
        mx.start("smtp-sink", "-u", "nobody", "-d", f"/var/mx{family}/mail.", f"{host}:25", "1024")
        _until_it_answers(mx, address)


def _until_it_answers(mx: Machine, address: str) -> None:
    import smtplib

    def answers() -> bool:
        with contextlib.suppress(OSError, smtplib.SMTPException), namespaces.inside(mx.namespace):
            smtplib.SMTP(address, 25, "test.example", timeout=10).quit()
            return True
        return False

    until(answers, f"the server at {address} answers")
