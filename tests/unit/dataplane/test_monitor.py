"""Notices of the kernel, as bytes, become changes that matter to portward."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any, cast

import pytest

from portward.base.netlink import HEADER, NFGEN, attribute, nest, string
from portward.dataplane import monitor_filter
from portward.dataplane import nf_tables as nf
from portward.dataplane.monitor import LOST, NOTHING, NoticeFilter, RulesetChanges, RulesetMonitor

OURS = RulesetChanges(ours=True, others=True)
OTHERS = RulesetChanges(others=True)
GAINED = RulesetChanges(gained=True, others=True)
GONE = RulesetChanges(gone=True, others=True)

KERNEL, OWN_PORT, FOREIGN_PORT = (0, 0), 4_000, 5_000
SO_RCVBUFFORCE, SO_ATTACH_FILTER = 33, 26


def notice(
    kind: int,
    table: str = "theirs",
    *more: bytes,
    family: int = nf.NFPROTO_INET,
    port: int = FOREIGN_PORT,
    subsystem: int = nf.NFNL_SUBSYS_NFTABLES,
) -> bytes:
    """A message of the kernel about something in a table, in a transaction of the socket at `port`."""
    body = NFGEN.pack(family, 0, 0) + attribute(1, string(table)) + b"".join(more)
    return HEADER.pack(HEADER.size + len(body), subsystem << 8 | kind, 0, 0, port) + body


class Socket:
    """A netlink socket with waiting datagrams. An OSError among them is raised when its turn comes. It records
    calls."""

    def __init__(self, *waiting: bytes | OSError, sender: tuple[int, int] = KERNEL) -> None:
        self.waiting, self.sender = list(waiting), sender
        self.done: list[str | int] = []
        self.refuses_filter = False

    def setsockopt(self, _: int, option: int, value: object) -> None:
        if option == SO_ATTACH_FILTER and self.refuses_filter:
            raise OSError(errno.ENOMEM, "no room for a filter")
        self.done.append(option)

    def bind(self, address: tuple[int, int]) -> None:
        self.done.append("bound")
        self.address = address

    def recvfrom(self, _: int) -> tuple[bytes, tuple[int, int]]:
        if not self.waiting:
            raise BlockingIOError
        found = self.waiting.pop(0)
        if isinstance(found, OSError):
            raise found
        return found, self.sender

    def fileno(self) -> int:
        return 77

    def close(self) -> None:
        self.done.append("closed")


Make = Callable[..., RulesetMonitor]


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Make:
    """Makes a monitor of table `portward` that reads from a given socket."""

    def make(kernel: Socket, **options: Any) -> RulesetMonitor:
        with monkeypatch.context() as patched:
            patched.setattr("portward.dataplane.monitor.socket.socket", lambda *_: kernel)
            own = [(nf.NFPROTO_INET, "portward")]
            return RulesetMonitor(own, lambda: [OWN_PORT], writing=[b"masq\0"], **options)

    return make


HOOK = nest(nf.NFTA_CHAIN_HOOK, attribute(nf.NFTA_HOOK_HOOKNUM, bytes(4)))


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        (notice(nf.NFT_MSG_NEWRULE, "portward"), OURS),
        (notice(nf.NFT_MSG_NEWSETELEM, "portward"), OURS),
        (notice(nf.NFT_MSG_NEWRULE, "portward", family=nf.NFPROTO_IPV4), OTHERS),
        (notice(nf.NFT_MSG_NEWRULE, "portward2"), OTHERS),
        (notice(nf.NFT_MSG_NEWSETELEM), OTHERS),
        (notice(nf.NFT_MSG_NEWCHAIN, "theirs", HOOK), GAINED),
        (notice(nf.NFT_MSG_NEWCHAIN), OTHERS),
        (notice(nf.NFT_MSG_NEWRULE, "theirs", attribute(4, b"masq\0")), GAINED),
        (notice(nf.NFT_MSG_NEWRULE, "theirs", attribute(4, b"counter\0")), OTHERS),
        (notice(nf.NFT_MSG_NEWSETELEM, "theirs", attribute(4, b"masq\0")), OTHERS),
        (notice(nf.NFT_MSG_DELTABLE), GONE),
        (notice(nf.NFT_MSG_DELCHAIN, "theirs", HOOK), GONE),
        (notice(nf.NFT_MSG_DELRULE), GONE),
        (notice(nf.NFT_MSG_DELSET), OTHERS),
        (notice(nf.NFT_MSG_NEWRULE, "portward", port=OWN_PORT), NOTHING),
        (notice(nf.NFT_MSG_NEWGEN), NOTHING),
        (notice(nf.NFT_MSG_NEWRULE, "portward", subsystem=1), NOTHING),
    ],
    ids=[
        "a rule in our table", "an element in our table", "our name in another family", "a longer name",
        "an element elsewhere", "a chain with a hook", "a chain without one", "a rule that writes",
        "a rule that does not", "no rule", "a table is deleted", "a chain is deleted", "a rule is deleted",
        "a set is deleted", "our own transaction", "the end of a transaction", "not of nftables",
    ],
)  # fmt: skip
def test_a_notice_says_what_has_changed(opened: Make, message: bytes, changes: RulesetChanges) -> None:
    assert opened(Socket(message)).read() == changes


def test_the_changes_of_all_messages_and_datagrams_are_added_up(opened: Make) -> None:
    """Each message names the socket of its own transaction; the lengths are padded to four bytes."""
    first = notice(nf.NFT_MSG_NEWRULE, "portward", port=OWN_PORT) + notice(nf.NFT_MSG_DELRULE, "odd name")
    found = opened(Socket(first, notice(nf.NFT_MSG_NEWCHAIN, "theirs", HOOK)))
    assert found.read() == RulesetChanges(gained=True, gone=True, others=True)
    assert found.read() == NOTHING, "a change is reported once"


def test_a_message_that_does_not_begin_with_a_table_may_mean_anything(opened: Make) -> None:
    body = NFGEN.pack(nf.NFPROTO_INET, 0, 0) + attribute(9, b"new")
    head = HEADER.pack(HEADER.size + len(body), nf.NFNL_SUBSYS_NFTABLES << 8 | nf.NFT_MSG_NEWRULE, 0, 0, 1)
    assert opened(Socket(head + body)).read() == LOST


def test_dropped_notices_mean_that_anything_may_have_changed_and_the_rest_is_read(opened: Make) -> None:
    kernel = Socket(
        notice(nf.NFT_MSG_NEWSETELEM), OSError(errno.ENOBUFS, "no room"), notice(nf.NFT_MSG_NEWSETELEM)
    )
    found = opened(kernel)
    assert found.read() == LOST
    assert (kernel.waiting, found.read()) == ([], NOTHING)


def test_another_error_of_the_socket_is_raised(opened: Make) -> None:
    with pytest.raises(OSError, match="gone") as raised:
        opened(Socket(OSError(errno.EBADF, "gone"))).read()
    assert raised.value.errno == errno.EBADF


def test_a_message_of_another_process_is_not_believed(opened: Make) -> None:
    assert opened(Socket(notice(nf.NFT_MSG_DELTABLE, "portward"), sender=(FOREIGN_PORT, 0))).read() == NOTHING


@pytest.mark.parametrize(
    ("notice_filter", "everything"),
    [(NoticeFilter.FOREIGN_ELEMENTS, False), (NoticeFilter.FOREIGN_TABLES, True)],
)
def test_buffer_and_filter_are_set_before_the_first_notice_can_come(
    opened: Make, monkeypatch: pytest.MonkeyPatch, notice_filter: NoticeFilter, everything: bool
) -> None:
    kernel = Socket()
    sizes = []
    program = monitor_filter._program

    def noted(*, everything: bool) -> list[tuple[int, int, int, int]]:
        sizes.append(everything)
        return program(everything=everything)

    monkeypatch.setattr(monitor_filter, "_program", noted)
    found = opened(kernel, receive_bytes=1 << 20, notice_filter=notice_filter)
    assert kernel.done == [SO_RCVBUFFORCE, SO_ATTACH_FILTER, "bound"]
    assert kernel.address == (0, 1 << (nf.NFNLGRP_NFTABLES - 1))
    assert sizes == [everything]
    assert found.fileno() == 77
    found.close()
    assert kernel.done[-1] == "closed"


def test_a_kernel_that_refuses_the_filter_sends_all_notices(opened: Make) -> None:
    kernel = Socket(notice(nf.NFT_MSG_NEWRULE, "portward"))
    kernel.refuses_filter = True
    assert opened(kernel, notice_filter=NoticeFilter.FOREIGN_TABLES).read() == OURS


def test_on_a_big_endian_host_there_is_no_filter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its program reads lengths as little-endian bytes."""
    monkeypatch.setattr("portward.dataplane.monitor_filter.sys.byteorder", "big")
    kernel = Socket()
    monitor_filter.attach(cast(Any, kernel), everything=True)
    assert kernel.done == []
