"""The monitor of the kernel's notices reports each change that matters to portward, however many notices come."""

from __future__ import annotations

import select
import socket
from collections.abc import Callable, Iterator

import pytest

from kernel.conftest import lab_name
from portward.base.netlink import attribute, string
from portward.dataplane.monitor import LOST, NOTHING, NoticeFilter, RulesetChanges, RulesetMonitor
from portward.dataplane.names import CLOSED, TABLE
from portward.dataplane.nfnetlink import NfNetlink
from portward.dataplane.reconciler import hearing
from portward.lab import namespaces

THEIRS = """
table ip theirs {
  set numbers { type inet_service; }
  map names { type inet_service : verdict; }
  chain one {
    counter
  }
}
"""
OTHERS, GAINED, GONE = (
    RulesetChanges(others=True),
    RulesetChanges(gained=True, others=True),
    RulesetChanges(gone=True, others=True),
)
OURS = RulesetChanges(ours=True, others=True)


@pytest.fixture
def namespace() -> Iterator[str]:
    """A network namespace with another program's table and ours."""
    name = lab_name()
    namespaces.make(name)
    namespaces.load(
        name, f"{THEIRS}table inet {TABLE} {{\n set allow4 {{ type ipv4_addr; }}\n chain screen {{ }}\n}}"
    )
    yield name
    namespaces.remove(name)


@pytest.fixture
def own(namespace: str) -> Iterator[NfNetlink]:
    """A netlink socket of portward in that namespace."""
    with namespaces.inside(namespace):
        found = NfNetlink()
    yield found
    found.close()


@pytest.fixture
def notices(namespace: str, own: NfNetlink) -> Iterator[RulesetMonitor]:
    """A monitor of that namespace that filters nothing."""
    with namespaces.inside(namespace):
        found = hearing(lambda: (own.port,), receive_bytes=0, notice_filter=NoticeFilter.NONE)
    yield found
    found.close()


def waiting(notices: RulesetMonitor) -> bool:
    """Whether a notice can be read. The kernel queues it before the program that made the change continues."""
    return bool(select.select([notices], [], [], 0)[0])


CHANGES = [
    ("add element ip theirs numbers { 7 }", OTHERS),
    ("add element ip theirs numbers { 7 }\ndelete element ip theirs numbers { 7 }", OTHERS),
    ("add table ip more\nadd chain ip more one\nadd rule ip more one counter", OTHERS),
    ("add set ip theirs more { type ipv4_addr; }", OTHERS),
    (
        "add chain ip theirs two\nadd rule ip theirs two drop\nadd element ip theirs names { 7 : goto two }",
        OTHERS,
    ),
    ("add chain ip theirs hooked { type filter hook forward priority 0; }", GAINED),
    ("add chain ip theirs nat { type nat hook prerouting priority -100; }", GAINED),
    ("add rule ip theirs one tcp dport set 25", GAINED),
    ("flush chain ip theirs one", GONE),
    ("delete table ip theirs", GONE),
    ("flush set ip theirs numbers", NOTHING),
    (f"add table ip {TABLE}", OTHERS),
    (f"add element inet {TABLE} allow4 {{ 10.0.0.1 }}", OURS),
    (f"flush chain inet {TABLE} screen\nadd rule inet {TABLE} screen accept", OURS),
    (f"add chain inet {TABLE} extra", OURS),
    (f"add table inet {CLOSED}", OURS),
    (f"add element ip theirs numbers {{ 7 }}\nadd element inet {TABLE} allow4 {{ 10.0.0.1 }}", OURS),
]


@pytest.mark.parametrize(("text", "heard"), CHANGES)
@pytest.mark.parametrize("notice_filter", [NoticeFilter.FOREIGN_ELEMENTS, NoticeFilter.FOREIGN_TABLES])
def test_what_others_do_among_themselves_is_not_even_queued(
    namespace: str, own: NfNetlink, notice_filter: NoticeFilter, text: str, heard: RulesetChanges
) -> None:
    """A change that matters is queued, at any place in a transaction."""
    with namespaces.inside(namespace):
        notices = hearing(lambda: (own.port,), notice_filter=notice_filter)
    namespaces.load(namespace, text)
    chains = "chain" in text or "rule" in text or "table" in text
    expected = heard.ours or (notice_filter is NoticeFilter.FOREIGN_ELEMENTS and chains)
    assert waiting(notices) == expected
    found = notices.read()
    assert found.ours == heard.ours
    if notice_filter is NoticeFilter.FOREIGN_ELEMENTS:
        assert (found.gained, found.gone) == (heard.gained, heard.gone)
    notices.close()


@pytest.mark.parametrize("notice_filter", [NoticeFilter.FOREIGN_ELEMENTS, NoticeFilter.FOREIGN_TABLES])
@pytest.mark.parametrize("before", [0, 1, 5, 15, 16, 17, 60])
def test_ours_is_heard_of_behind_any_number_of_changes_of_others(
    namespace: str, own: NfNetlink, notice_filter: NoticeFilter, before: int
) -> None:
    with namespaces.inside(namespace):
        notices = hearing(lambda: (own.port,), notice_filter=notice_filter)
    text = "".join(f"add element ip theirs numbers {{ {number} }}\n" for number in range(before))
    namespaces.load(namespace, f"{text}add element inet {TABLE} allow4 {{ 10.0.0.1 }}\n")
    assert notices.read().ours
    namespaces.load(namespace, f"{text}flush set ip theirs numbers\n")
    assert not notices.read().ours
    notices.close()


@pytest.mark.parametrize(("text", "heard"), CHANGES)
def test_a_notice_says_what_was_changed(
    namespace: str, notices: RulesetMonitor, text: str, heard: RulesetChanges
) -> None:
    assert not waiting(notices)
    namespaces.load(namespace, text)
    assert notices.read() == heard
    assert notices.read() == NOTHING
    assert not waiting(notices)


def test_everything_that_is_flushed_is_heard_of(namespace: str, notices: RulesetMonitor) -> None:
    namespaces.load(namespace, "flush ruleset")
    heard = notices.read()
    assert heard.ours
    assert heard.gone


def test_our_own_transactions_are_not_heard_of(own: NfNetlink, notices: RulesetMonitor) -> None:
    own.commit([(0, attribute(1, string(TABLE))), (3, attribute(1, string(TABLE)) + attribute(3, string("more")))])
    assert waiting(notices)
    assert notices.read() == NOTHING


def test_those_of_another_socket_of_this_process_are(namespace: str, notices: RulesetMonitor) -> None:
    with namespaces.inside(namespace):
        other = NfNetlink()
    other.commit([(3, attribute(1, string(TABLE)) + attribute(3, string("more")))])
    other.close()
    assert notices.read() == OURS


def test_a_dry_run_is_not_heard_of(own: NfNetlink, notices: RulesetMonitor) -> None:
    own.commit([(0, attribute(1, string("probe")))], dry_run=True)
    own.barrier()
    assert not waiting(notices)


@pytest.mark.parametrize("last", ["add element ip theirs numbers { 9 }", f"delete table inet {TABLE}"])
def test_what_is_lost_may_be_anything(namespace: str, notices: RulesetMonitor, last: str) -> None:
    """The kernel queues only some hundred kilobytes for a socket. Notices beyond that are lost, and then anything
    may have changed."""
    for _ in range(6):
        text = "\n".join(f"add element ip theirs numbers {{ {number} }}" for number in range(20_000, 22_000))
        namespaces.load(namespace, f"{text}\nflush set ip theirs numbers")
    namespaces.load(namespace, last)
    assert notices.read() == LOST
    assert notices.read() == NOTHING
    namespaces.load(namespace, "add table ip more")
    assert notices.read() == OTHERS


def test_only_the_kernel_is_believed(
    namespace: str, notices: RulesetMonitor, own: NfNetlink, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = own._message(10 << 8 | 2, 0, b"\1\0\0\0" + attribute(1, string(TABLE)))
    with namespaces.inside(namespace), socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12) as forger:
        forger.sendto(message, (0, 1 << 6))
    assert notices.read() == NOTHING


def test_a_message_that_does_not_begin_with_a_table_may_be_anything() -> None:
    listening: Callable[[int, bytes], RulesetChanges] = RulesetMonitor(())._message
    assert listening(12, b"\1\0\0\0" + attribute(2, b"x\0")) == LOST
    assert listening(12, b"\1\0\0\0") == LOST
