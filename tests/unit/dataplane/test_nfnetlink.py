"""Answers of the kernel to dumps and transactions, as bytes."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterable

import pytest

from portward.base.netlink import HEADER, NLMSG_DONE, NLMSG_ERROR, attribute, nest, string
from portward.dataplane.nfnetlink import NfNetlink

_INTERRUPTED, _MULTI = 0x10, 0x2
_NEW_ELEMENTS = 10 << 8 | 12


class Kernel:
    """A socket that answers each request with the next of the given lists of datagrams; a datagram is a list of
    (type, flags, how far the sequence is from the request's first one, content)."""

    def __init__(self, *answers: list[list[tuple[int, int, int, bytes]]]) -> None:
        self._answers = list(answers)
        self._datagrams: list[bytes] = []
        self.sent: list[bytes] = []

    def send(self, data: bytes) -> None:
        self.sent.append(data)
        first = HEADER.unpack_from(data)[3]
        self._datagrams += [
            b"".join(
                HEADER.pack(16 + len(content), kind, flags, first + offset, 0) + content
                for kind, flags, offset, content in datagram
            )
            for datagram in (self._answers.pop(0) if len(self._answers) > 1 else self._answers[0])
        ]

    def recv(self, size: int) -> bytes:
        return self._datagrams.pop(0)

    def setsockopt(self, *option: int) -> None:
        self.option = option


def asking(*answers: list[list[tuple[int, int, int, bytes]]]) -> tuple[NfNetlink, Kernel]:
    netlink = NfNetlink.__new__(NfNetlink)
    kernel = Kernel(*answers)
    netlink._socket = kernel  # type: ignore[assignment]
    netlink._sequence, netlink._max_sent = 0, 1_000
    return netlink, kernel


def listed(keys: Iterable[bytes], flags: int = _MULTI) -> tuple[int, int, int, bytes]:
    """A message of a dump with these elements."""
    elements = b"".join(nest(1, nest(1, attribute(1, key))) for key in keys)
    return _NEW_ELEMENTS, flags, 0, b"\1\0\0\0" + nest(3, elements)


def chain(table: str, name: str, handle: int, flags: int = _MULTI) -> tuple[int, int, int, bytes]:
    """A message of a dump with a base chain in prerouting."""
    hook = attribute(1, struct.pack(">I", 0)) + attribute(2, struct.pack(">i", -300))
    body = attribute(1, string(table)) + attribute(2, struct.pack(">Q", handle)) + attribute(3, string(name))
    return 10 << 8 | 3, flags, 0, b"\1\0\0\0" + body + nest(4, hook)


def done(flags: int = _MULTI) -> tuple[int, int, int, bytes]:
    return NLMSG_DONE, flags, 0, bytes(4)


def refused(code: int, offset: int) -> tuple[int, int, int, bytes]:
    return NLMSG_ERROR, 0, offset, struct.pack("=i", -code) + bytes(16)


def test_a_dump_goes_over_many_messages() -> None:
    first, second, third = b"a" * 8, b"b" * 8, b"c" * 8
    netlink, _ = asking([[listed([first])], [listed([second, third])], [done()]])
    assert [key for key, _, _ in netlink.rows("t", "s")] == [first, second, third]


@pytest.mark.parametrize("where", [0, 1])
def test_a_dump_that_a_transaction_interrupted_is_read_again_as_a_whole(where: int) -> None:
    old, new = b"o" * 8, b"n" * 8
    flags = [_MULTI, _MULTI]
    flags[where] |= _INTERRUPTED
    netlink, kernel = asking([[listed([old], flags[0])], [done(flags[1])]], [[listed([new])], [done()]])
    assert [key for key, _, _ in netlink.rows("t", "s")] == [new]
    assert len(kernel.sent) == 2


def test_a_dump_that_is_interrupted_each_time_is_an_error() -> None:
    """Each reading has something else."""
    netlink, _ = asking(
        *([[listed([bytes([number]) * 8], _MULTI | _INTERRUPTED)], [done()]] for number in range(40))
    )
    with pytest.raises(OSError, match="faster than they can be read") as raised:
        netlink.rows("t", "s")
    assert raised.value.errno == errno.EINTR


def test_two_interrupted_dumps_in_a_row_that_are_equal_lack_nothing() -> None:
    answers = [[[listed([key * 8], _MULTI | _INTERRUPTED)], [done()]] for key in (b"a", b"b", b"b")]
    netlink, kernel = asking(*answers)
    assert [key for key, _, _ in netlink.rows("t", "s")] == [b"b" * 8]
    assert len(kernel.sent) == 3


def test_what_answers_an_older_request_is_not_taken_for_this_one() -> None:
    stray = (*listed([b"s" * 8])[:2], -1, listed([b"s" * 8])[3])
    netlink, _ = asking([[stray, listed([b"n" * 8])], [done()]])
    assert [key for key, _, _ in netlink.rows("t", "s")] == [b"n" * 8]


def test_a_dump_that_the_kernel_refuses_raises_its_errno() -> None:
    netlink, _ = asking([[refused(errno.ENOENT, 0)]])
    with pytest.raises(FileNotFoundError):
        netlink.rows("t", "s")


def test_a_dump_that_fails_half_way_raises_the_errno_of_its_last_message() -> None:
    """The replies before it are incomplete."""
    failed = (NLMSG_DONE, _MULTI, 0, struct.pack("=i", -errno.ENOMEM))
    netlink, _ = asking([[listed([b"a" * 8])], [failed]])
    with pytest.raises(OSError, match=os.strerror(errno.ENOMEM)):
        netlink.rows("t", "s")


def test_our_own_chains_are_read_while_those_of_others_come_and_go() -> None:
    answers = [
        [[chain("ours", "screen", 1, _MULTI | _INTERRUPTED), chain(f"other{number}", "c", number)], [done()]]
        for number in range(40)
    ]
    netlink, kernel = asking(*answers)
    assert netlink.hooks("ours") == {"screen": (0, -300)}
    assert len(kernel.sent) == 2


@pytest.mark.parametrize(
    "answers",
    [
        [[refused(errno.ENFILE, 2), refused(0, 3)]],
        [[refused(errno.ENFILE, 2)], [refused(errno.ENOENT, 3)]],
        [[refused(errno.ENFILE, 0)]],
    ],
    ids=["one message", "several messages", "the batch as a whole"],
)
def test_a_transaction_raises_the_first_refusal(answers: list[list[tuple[int, int, int, bytes]]]) -> None:
    netlink, _ = asking(answers)
    with pytest.raises(OSError, match=os.strerror(errno.ENFILE)) as raised:
        netlink.commit([(12, b""), (12, b""), (14, b"")])
    assert raised.value.errno == errno.ENFILE


def test_a_transaction_is_over_when_its_last_message_is_answered() -> None:
    netlink, kernel = asking([[refused(0, 2)]])
    netlink.commit([(12, b""), (14, b"")])
    assert len(kernel.sent) == 1


def test_a_large_transaction_goes_in_one_piece() -> None:
    netlink, kernel = asking([[refused(0, 1)]])
    netlink.commit([(12, bytes(60_000))])
    assert len(kernel.sent) == 1
    assert kernel.option[2] > 60_000
