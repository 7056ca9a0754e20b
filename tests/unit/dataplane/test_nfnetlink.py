"""Answers of the kernel to dumps and transactions, as bytes."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterable

import pytest

from portward.base.netlink import (
    HEADER,
    NLM_F_ECHO,
    NLMSG_DONE,
    NLMSG_ERROR,
    attribute,
    messages_of,
    nest,
    string,
)
from portward.dataplane import nf_tables as nf
from portward.dataplane import nfsocket
from portward.dataplane.nfnetlink import Chain, Expression, NfNetlink
from portward.errors import KernelError

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
    netlink._shared = nfsocket._Shared(max_sent=1_000)
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
    """The readings differ from each other."""
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


# --- requests ---


def u32(value: int) -> bytes:
    return struct.pack(">I", value)


def u64(value: int) -> bytes:
    return struct.pack(">Q", value)


def reply(kind: int, *attributes: bytes, family: int = 1) -> tuple[int, int, int, bytes]:
    """A message of nf_tables with these attributes."""
    return 10 << 8 | kind, _MULTI, 0, bytes([family, 0, 0, 0]) + b"".join(attributes)


def answering(*replies: tuple[int, int, int, bytes]) -> NfNetlink:
    """Answers every dump with these replies."""
    return asking([[*replies], [done()]])[0]


MISSING = [[refused(errno.ENOENT, 0)]]


def test_the_generation_is_that_of_the_kernel() -> None:
    assert asking([[reply(nf.NFT_MSG_NEWGEN, attribute(1, u32(2**32 - 1)))]])[0].generation() == 2**32 - 1


def owned(flags: int, userdata: bytes = b"") -> tuple[int, int, int, bytes]:
    more = [attribute(6, userdata)] if userdata else []
    return reply(nf.NFT_MSG_NEWTABLE, attribute(1, string("t")), attribute(2, u32(flags)), *more)


@pytest.mark.parametrize(
    ("table", "comment"),
    [
        (owned(2, b"\7\2ab" + b"\0\5one \0"), "one "),
        (owned(2, b"\7\2ab"), ""),
        (owned(2), ""),
        (owned(1, b"\0\4one\0"), None),
        (refused(errno.ENOENT, 0), None),
    ],
    ids=["a comment behind another entry", "no comment", "no user data", "no owner", "no table"],
)
def test_an_owned_table_has_its_comment(table: tuple[int, int, int, bytes], comment: str | None) -> None:
    assert asking([[table]])[0].owned_table("t") == comment


def test_the_sets_of_a_table_are_those_with_a_name_of_their_own() -> None:
    found = [reply(nf.NFT_MSG_NEWSET, attribute(2, string(name))) for name in ("allow4", "__set0", "deny4")]
    assert answering(*found).sets("t") == {"allow4", "deny4"}
    assert asking(MISSING)[0].sets("t") == set()


def chained(name: str, *attributes: bytes, family: int = 1) -> tuple[int, int, int, bytes]:
    return reply(
        nf.NFT_MSG_NEWCHAIN, attribute(1, string("t")), attribute(3, string(name)), *attributes, family=family
    )


def hook(number: int, priority: int) -> bytes:
    return nest(4, attribute(1, u32(number)) + attribute(2, struct.pack(">i", priority)))


def test_base_chains_of_all_families_are_given_with_hook_and_priority() -> None:
    """A chain without a hook is no base chain, whatever its name."""
    netlink = answering(
        chained("pre", hook(0, -300), attribute(7, string("filter")), family=2),
        chained("plain"),
        chained("named filter", attribute(9, string("filter"))),
        chained("post", hook(4, 100), attribute(7, string("nat"))),
    )
    assert list(netlink.chains()) == [
        Chain(2, "t", "pre", "filter", 0, -300),
        Chain(1, "t", "post", "nat", 4, 100),
    ]


def test_chains_are_given_and_then_an_error_if_each_reading_was_interrupted() -> None:
    """The readings differ from each other, so chains may be missing."""
    answers = []
    for number in range(40):
        kind, flags, offset, body = chained(f"c{number}", hook(0, 0), attribute(7, string("filter")))
        answers.append([[(kind, flags | _INTERRUPTED, offset, body)], [done()]])
    chains = asking(*answers)[0].chains()
    assert next(chains).name.startswith("c")
    with pytest.raises(InterruptedError, match="faster than they can be read"):
        next(chains)


def expression(name: str, *attributes: bytes) -> bytes:
    return nest(1, attribute(1, string(name)) + nest(2, b"".join(attributes)))


def ruled(*expressions: bytes, table: str = "t", chain: str = "c", handle: int = 1) -> tuple[int, int, int, bytes]:
    names = attribute(1, string(table)), attribute(2, string(chain)), attribute(3, u64(handle))
    return reply(nf.NFT_MSG_NEWRULE, *names, nest(4, b"".join(expressions)), family=7)


def test_the_expressions_of_a_rule_are_given_if_the_rule_holds_a_wanted_one() -> None:
    netlink = answering(
        ruled(expression("meta", attribute(2, u32(4))), expression("masq")), ruled(expression("counter"))
    )
    assert list(netlink.expressions((b"masq\0", b"snat\0"))) == [
        Expression(7, "t", "c", "meta", {2: u32(4)}),
        Expression(7, "t", "c", "masq", {}),
    ]


def test_the_rules_on_a_set_are_those_of_the_chain_that_look_it_up() -> None:
    """Rules of other chains and tables in the reply do not count."""
    looks = expression("lookup", attribute(1, string("s")))
    netlink = answering(
        ruled(looks, handle=5),
        ruled(expression("lookup", attribute(1, string("other"))), handle=6),
        ruled(looks, chain="d", handle=7),
        ruled(looks, table="u", handle=8),
        ruled(expression("counter"), looks, handle=9),
    )
    assert netlink.rules_on("t", "c", "s") == [5, 9]
    with pytest.raises(FileNotFoundError):
        asking(MISSING)[0].rules_on("t", "c", "s")


def named(name: str, type_: int, data: bytes = b"", table: str = "t") -> tuple[int, int, int, bytes]:
    names = attribute(1, string(table)), attribute(2, string(name)), attribute(3, u32(type_))
    return reply(nf.NFT_MSG_NEWOBJ, *names, nest(4, data))


def test_objects_are_given_by_type_and_table() -> None:
    """Counters with their packets, limits by name."""
    counted = attribute(1, u64(9)) + attribute(2, u64(2**40))
    netlink = answering(
        named("answered", nf.NFT_OBJECT_COUNTER, counted),
        named("rate", nf.NFT_OBJECT_LIMIT),
        named("theirs", nf.NFT_OBJECT_COUNTER, counted, table="u"),
    )
    assert netlink.counters("t") == {"answered": 2**40}
    assert netlink.limits("t") == ["rate"]


def test_one_element_is_found_by_its_key() -> None:
    found = asking([[listed([b"k" * 8]), refused(0, 0)]])[0].element("t", "s", b"k" * 8)
    assert found is not None
    assert found.key == b"k" * 8
    assert asking(MISSING)[0].element("t", "s", b"k" * 8) is None
    assert asking([[refused(0, 0)]])[0].element("t", "s", b"k" * 8) is None
    with pytest.raises(PermissionError):
        asking([[refused(errno.EPERM, 0)]])[0].element("t", "s", b"k" * 8)


def fingerprinted(
    flags: int = 0, hooked: int = 0, rule: bytes = b"", set_: int = 8, element: bytes = b"k", stranger: str = "x"
) -> bytes | None:
    """The fingerprint of a table with a chain, a rule, a set and an element, beside another program's rule."""
    return asking(
        [[owned(flags)]],
        [[chained("screen", attribute(2, u64(1)), hook(hooked, -300))], [done()]],
        [[ruled(expression("counter", rule)), ruled(table=stranger, chain=stranger)], [done()]],
        [[reply(9, attribute(1, string("t")), attribute(2, string("s")), attribute(5, u32(set_)))], [done()]],
        [[listed([b"a" * 8, element * 8])], [done()]],
    )[0].fingerprint("t", ("s",))


def test_a_fingerprint_changes_with_each_part_of_the_table_and_with_no_other_table() -> None:
    changed = [
        fingerprinted(),
        fingerprinted(flags=1),
        fingerprinted(hooked=1),
        fingerprinted(rule=attribute(1, b"more")),
        fingerprinted(set_=16),
        fingerprinted(element=b"l"),
    ]
    assert None not in changed
    assert len(set(changed)) == len(changed)
    assert fingerprinted(stranger="y") == fingerprinted()


def test_a_table_that_is_missing_has_no_fingerprint_and_an_unreadable_one_is_an_error() -> None:
    assert asking(MISSING)[0].fingerprint("t", ()) is None
    with pytest.raises(PermissionError):
        asking([[refused(errno.EPERM, 0)]])[0].fingerprint("t", ())


# --- transactions ---


def test_a_dry_run_has_no_end_so_the_kernel_rolls_it_back() -> None:
    netlink, kernel = asking([[refused(0, 1)]])
    netlink.commit([(12, b"")], dry_run=True)
    netlink.commit([(12, b"")])
    kinds = [[kind for kind, *_ in messages_of(data)] for data in kernel.sent]
    assert kinds == [[16, 10 << 8 | 12], [16, 10 << 8 | 12, 17]]


def test_the_reports_of_deleted_elements_are_given() -> None:
    """Reports without a sequence number, as Linux 6.18 sends them, count too. Only the wanted messages ask for a
    report."""
    deleted = attribute(3, b"counted.")
    netlink, kernel = asking([[(10 << 8 | 14, 0, -1, b"\1\0\0\0" + deleted), refused(0, 2)]])
    assert netlink.commit([(14, b""), (14, b"")], reported={1}) == [deleted]
    echoes = [bool(flags & NLM_F_ECHO) for kind, flags, *_ in messages_of(kernel.sent[0]) if kind == 10 << 8 | 14]
    assert echoes == [False, True]


@pytest.mark.parametrize(
    ("kind", "body", "note"),
    [
        (12, attribute(2, string("allow4")), "an element of set allow4"),
        (0, attribute(1, string("t")), "table t"),
        (99, b"", "message 99"),
    ],
)
def test_a_refusal_names_the_object_of_its_message(kind: int, body: bytes, note: str) -> None:
    netlink, _ = asking([[refused(errno.ENFILE, 1)]])
    with pytest.raises(OSError, match=os.strerror(errno.ENFILE)) as raised:
        netlink.commit([(kind, body)])
    assert raised.value.__notes__ == [note]


def test_the_receive_buffer_grows_for_many_reports_alone() -> None:
    netlink, kernel = asking([[done()]])
    netlink.expect(10)
    assert not hasattr(kernel, "option")
    netlink.expect(100_000)
    assert kernel.option[2] >= 100_000 * 130
    del kernel.option
    netlink.expect(50_000)
    assert not hasattr(kernel, "option"), "it is large enough already"


def test_a_barrier_is_a_dry_run_whose_refusal_does_not_matter() -> None:
    netlink, kernel = asking([[refused(errno.EPERM, 1)]])
    netlink.barrier()
    assert [kind for kind, *_ in messages_of(kernel.sent[0])] == [16, 10 << 8]


def test_a_kernel_without_nfnetlink_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: int) -> None:
        raise OSError(errno.EPROTONOSUPPORT, "Protocol not supported")

    monkeypatch.setattr("portward.dataplane.nfsocket.socket.socket", missing)
    with pytest.raises(KernelError, match="this kernel lacks CONFIG_NETFILTER_NETLINK"):
        NfNetlink()
