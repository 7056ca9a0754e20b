"""`make demo`: real mail through a real gateway, act by act, with the expected result beside the real one."""

from __future__ import annotations

import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, date, datetime, timedelta
from ipaddress import ip_network
from pathlib import Path
from typing import Final, NamedTuple
from uuid import UUID

from rich.console import Console
from rich.table import Table

from portward.base import locks
from portward.base.resources import PYTHON
from portward.errors import PortwardError
from portward.inventory.yaml_document import yaml_text
from portward.lab import namespaces
from portward.lab.agent import Agent, until
from portward.lab.mail import READY, Fate, OpenSession, Outcome, Postbox, send
from portward.lab.topology import CONTOSO, FABRIKAM, MAIL4, MAIL6, Lab, Tenant
from portward.model import Attachment, Exemption, ExemptionState, RateLimit, Record, Subscription
from portward.store.codec import encode, key_of

_IDS: Final = {
    CONTOSO: UUID("11111111-0000-4000-8000-000000000001"),
    FABRIKAM: UUID("11111111-0000-4000-8000-000000000002"),
}
# Columns, if there is no terminal: wide enough for a row on one line.
_WIDTH: Final = 120
_LOCKS: Final = Path("/run/portward-lab")
_GRANTED: Final = datetime(2026, 1, 9, 12, tzinfo=UTC)
# Customers without a machine here: a person reviews the request of the first, and the second can never be exempt.
_REVIEWED: Final = UUID("11111111-0000-4000-8000-000000000003")
_NEVER: Final = UUID("11111111-0000-4000-8000-000000000004")


class Act(NamedTuple):
    """An act of the demo: its title, the expected and the real result, and whether they agree."""

    what: str
    expected: str
    happened: str
    good: bool


def records() -> tuple[Record, ...]:
    """Two customers with the same address: the offer of the first may send, that of the second may not. And two
    more for the other ways to an exemption."""
    return (
        Subscription(
            id=_IDS[CONTOSO], name="contoso-prod", offer="enterprise-agreement", created=date(2021, 3, 2)
        ),
        Subscription(
            id=_IDS[FABRIKAM],
            name="fabrikam",
            offer="pay-as-you-go",
            created=date(2022, 6, 30),
            payment_history=True,
        ),
        Subscription(id=_REVIEWED, name="tailspin", offer="azure-sponsorship", created=date(2022, 6, 30)),
        Subscription(id=_NEVER, name="trey", offer="free-trial", created=date(2022, 6, 30)),
        *attachments(CONTOSO),
        *attachments(FABRIKAM),
    )


def attachments(tenant: Tenant, started: datetime = _GRANTED - timedelta(days=30)) -> tuple[Record, ...]:
    """The attachments of a tenant's machine, one for each address, last started at `started`."""
    return tuple(
        Attachment(segment=tenant.segment, address=ip_network(address), subscription=_IDS[tenant], started=started)
        for address in (tenant.address4, tenant.address6)
    )


def exemption(limit: RateLimit | None = None) -> Exemption:
    """A grant for fabrikam, which needs one, from before its machine was started."""
    return Exemption(
        subscription=_IDS[FABRIKAM], state=ExemptionState.GRANTED, requested=_GRANTED, decided=_GRANTED, by="demo",
        limit=limit,
    )  # fmt: skip


@contextmanager
def stage(lab: Lab, folder: Path) -> Iterator[tuple[Agent, Postbox]]:
    """Runs the mail servers and the agent in a lab that is up."""
    postbox = Postbox(folder / "mail.jsonl")
    server = start_mail(lab, postbox)
    agent = Agent(lab, folder)
    try:
        agent.apply(*records())
        agent.start()
        yield agent, postbox
    finally:
        agent.stop()
        server.kill()
        server.wait()


def start_mail(lab: Lab, postbox: Postbox, *, detached: bool = False) -> subprocess.Popen[bytes]:
    """Starts the mail servers, and waits until they listen. Raises PortwardError. Their stderr is a log file
    beside the postbox, because a server that outlives this process must not keep its terminal or pipe open."""
    with postbox.path.with_suffix(".log").open("ab") as log:
        server = namespaces.start(
            lab.internet, [*PYTHON, "-m", "portward.lab.mail", str(postbox.path)],
            stdout=subprocess.PIPE, stderr=log, detached=detached,
        )  # fmt: skip
    assert server.stdout is not None  # noqa: S101 # opened as a pipe above
    if server.stdout.readline().strip() != READY.encode():
        server.kill()
        raise PortwardError("the lab's mail servers did not start: is portward installed with its [lab] extra?")
    return server


class Demo:
    """All acts."""

    def __init__(self, lab: Lab, agent: Agent, postbox: Postbox, show: Callable[[Act], None]) -> None:
        """`show` is called with each act when it has ended."""
        self._lab, self._agent, self._postbox, self._show = lab, agent, postbox, show

    def play(self) -> None:
        """Plays all acts in order."""
        self._mail("Enterprise Agreement, port 25", CONTOSO, Fate.DELIVERED)
        self._mail("Pay-As-You-Go of 2022, port 25, the same 10.0.0.4", FABRIKAM, Fate.TIMED_OUT)
        self._mail("the same customer through a relay, port 587", FABRIKAM, Fate.DELIVERED, port=587)
        self._mail("Enterprise Agreement over IPv6", CONTOSO, Fate.DELIVERED, server=MAIL6)
        self._mail("Pay-As-You-Go over IPv6", FABRIKAM, Fate.TIMED_OUT, server=MAIL6)
        self._reason("denied-not-exempt")
        self._other_ways()
        self._exemption()
        self._limit()
        self._revocation(Fate.TIMED_OUT)
        self._agent.configure(verdicts={"refuse_with": "reject"})
        self._agent.reload()
        self._mail("answered with a reset from now on: refused at once", FABRIKAM, Fate.REFUSED)
        self._mail("… over IPv6", FABRIKAM, Fate.REFUSED, server=MAIL6)
        self._mail("… and the other customer's 10.0.0.4 goes on", CONTOSO, Fate.DELIVERED)
        self._agent.apply(exemption())
        self._revocation(Fate.CUT)
        self._audit()
        self._counters()

    def _other_ways(self) -> None:
        """Requests of customers that need no exemption, never get one, or wait for a person."""
        self._verb("asks for an exemption: not needed", "none is needed", "request", _IDS[CONTOSO])
        self._verb("asks for an exemption: never", "can never be exempt", "request", _NEVER)
        self._verb("… review, without a reason", "wants to know more", "request", _REVIEWED)
        why = ("--justification", "mail servers of our own")
        self._verb("… review, with one", "requested", "request", _REVIEWED, *why)
        self._verb("… granted without an anti-fraud check", "needs an anti-fraud check", "grant", _REVIEWED)
        self._verb("… granted after one", "granted", "grant", _REVIEWED, "--fraud-check", "called back")

    def _exemption(self) -> None:
        """Self-service: granted at once, and valid after a restart of the machine."""
        self._verb("asks for an exemption: self-service", "granted", "request", _IDS[FABRIKAM])
        self._mail("exemption granted, machine not restarted", FABRIKAM, Fate.TIMED_OUT)
        self._reason("denied-restart-required")
        letter = self._agent.portward("diagnose", str(_IDS[FABRIKAM]), "--customer", "--lang", "en").stdout
        self._found("portward diagnose, for the customer", "stop the virtual machine and start it again", letter)
        for address in (FABRIKAM.address4, FABRIKAM.address6):
            self._agent.portward("attachment", "started", FABRIKAM.segment, address)
        until(
            lambda: self._agent.explain(FABRIKAM.segment, FABRIKAM.address6)["verdict"] == "allow", "the restart"
        )
        self._mail("machine restarted after the grant", FABRIKAM, Fate.DELIVERED)
        self._mail("… over IPv6", FABRIKAM, Fate.DELIVERED, server=MAIL6)
        self._reason("allowed-exempt")

    def _revocation(self, expected: Fate) -> None:
        """Revokes the exemption in the middle of an open session. The session times out if its packets are
        dropped, and is cut if they are answered with a reset."""
        session = OpenSession(self._lab, FABRIKAM, MAIL4, 25)
        session.go_on()
        self._verb("revoked with --wait", "enforced after", "revoke", _IDS[FABRIKAM], "--reason", "spam", "--wait")
        outcome = session.finish(self._postbox)
        self._row("… in the middle of an open session", expected, outcome)
        after = Fate.TIMED_OUT if expected is Fate.TIMED_OUT else Fate.REFUSED
        self._mail("… and a new one after it", FABRIKAM, after)
        self._reason("denied-revoked")

    def _limit(self) -> None:
        """An exemption with a rate limit."""
        self._agent.apply(exemption(RateLimit(per_minute=1, burst=2)))
        for number in ("first", "second"):
            self._mail(f"exempt for two connections: the {number}", FABRIKAM, Fate.DELIVERED)
        self._mail("… and the third", FABRIKAM, Fate.TIMED_OUT)
        self._agent.apply(exemption())

    def _audit(self) -> None:
        """The log of everything above is unchanged."""
        result = self._agent.portward("audit")
        self._found("portward audit", "whole", result.stdout + result.stderr)

    def _verb(self, what: str, expected: str, verb: str, subscription: UUID, *options: str) -> None:
        """An act that runs a verb of `portward exemption`, with a part of its expected output."""
        result = self._agent.portward("exemption", verb, str(subscription), *options)
        self._found(what, expected, result.stdout or result.stderr)

    def _found(self, what: str, expected: str, output: str) -> None:
        """An act with an output that must contain `expected`. Shows the rest of that line."""
        line = next((line for line in output.splitlines() if expected in line), output.strip() or "nothing")
        place = line.find(expected)
        happened = re.split(r"[:,]", line[place:])[0] if place >= 0 else line
        self._show(Act(what, expected, happened, expected in output))

    def _mail(self, what: str, tenant: Tenant, expected: Fate, *, server: str = MAIL4, port: int = 25) -> None:
        self._row(what, expected, send(self._lab, tenant, server, port, self._postbox))

    def _row(self, what: str, expected: Fate, outcome: Outcome) -> None:
        self._show(Act(what, expected, str(outcome), outcome.fate is expected))

    def _reason(self, expected: str) -> None:
        found = self._agent.explain(FABRIKAM.segment, FABRIKAM.address4)["reason"]
        self._show(
            Act(f"portward explain {FABRIKAM.segment} {FABRIKAM.address4}", expected, found, found == expected)
        )

    def _counters(self) -> None:
        """The metrics by subscription contain the denied packets, which the kernel counts."""
        name = f'portward_subscription_packets_total{{subscription="{_IDS[FABRIKAM]}",verdict="deny"}}'
        until(lambda: self._agent.metrics().get(name, 0) > 0, "the denied packets in the metrics")
        count = self._agent.metrics()[name]
        self._show(Act("packets denied to fabrikam, in the metrics", "some", f"{count:.0f}", count > 0))


@contextmanager
def alone(lab: Lab) -> Iterator[None]:
    """Within this context, no other demo runs in a lab with this name, because each would remove the namespaces of
    the other. Raises PortwardError if one runs already."""
    namespaces.require_root()
    _LOCKS.mkdir(parents=True, exist_ok=True)
    # The file is never removed: otherwise two demos could each lock a file with this name.
    with (_LOCKS / f"{lab.name}.lock").open("a+b") as file:
        if not locks.try_lock(file.fileno()):
            raise PortwardError(
                f"another demo, process {locks.holder(file.fileno()) or 'unknown'}, runs in the lab {lab.name}: "
                "wait for it, or choose another lab with --name"
            )
        yield


def run(name: str, *, keep: bool = False) -> bool:
    """Plays the demo in a lab with this name, and prints the results. Returns whether all are as expected. Raises
    PortwardError, also if another demo runs there."""
    lab = Lab(name)
    with alone(lab):
        return _run(lab, keep=keep)


def _run(lab: Lab, *, keep: bool) -> bool:
    console, began, rows = Console(), time.monotonic(), list[Act]()
    if not console.is_terminal:
        console.width = _WIDTH
    lab.up()
    try:
        with (
            tempfile.TemporaryDirectory(prefix="portward-demo-") as folder,
            stage(lab, Path(folder)) as (agent, postbox),
        ):
            try:
                with console.status("") as line:

                    def show(row: Act) -> None:
                        rows.append(row)
                        line.update(f"{row.what}: {row.happened}")

                    Demo(lab, agent, postbox, show).play()
            finally:
                console.print(_table(rows))
            _epilogue(console, agent)
    finally:
        if not keep:
            lab.down()
    good = all(row.good for row in rows)
    verdict = "every act as expected" if good else "NOT as expected: see the rows marked NOT"
    console.print(f"{verdict}, {len(rows)} acts in {time.monotonic() - began:.0f} s")
    return good


def _epilogue(console: Console, agent: Agent) -> None:
    """Prints the counters, and for each customer the answer to "why can't I send mail?"."""
    console.print("\nWhat the agent counted:")
    for metric, value in sorted(agent.metrics().items()):
        if "_total" in metric and value:
            console.print(f"  {metric} {value:.0f}", highlight=False, soft_wrap=True)
    for tenant in (FABRIKAM, CONTOSO):
        console.print(f"\n$ portward explain {tenant.segment} {tenant.address4}")
        answer = agent.portward("explain", tenant.segment, tenant.address4).stdout
        console.print(answer.rstrip(), highlight=False, soft_wrap=True)
    console.print()


def _table(rows: list[Act]) -> Table:
    table = Table(title="portward demo", title_justify="left")
    for title in ("what", "expected", "happened", ""):
        table.add_column(title)
    for row in rows:
        table.add_row(row.what, row.expected, row.happened, "ok" if row.good else "NOT")
    return table


def sample_inventory() -> str:
    """The demo's inventory as YAML, for a lab that keeps running."""
    return "".join(yaml_text({key_of(record): encode(record) for record in records()}))
