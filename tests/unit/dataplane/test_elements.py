"""Changes of elements as netlink messages."""

from __future__ import annotations

import errno
import struct
from collections.abc import Container, Iterable
from contextlib import AbstractContextManager, nullcontext

import pytest

from portward.base.netlink import attributes_of, string
from portward.dataplane.elements import (
    Add,
    AddLimit,
    Change,
    Delete,
    DeleteLimit,
    DeleteRule,
    Draw,
    Flush,
    InsertRule,
    RefusedError,
    messages,
)
from portward.dataplane.names import KernelTable
from portward.dataplane.nfnetlink import KernelElements
from portward.dataplane.setdump import elements


@pytest.mark.parametrize(("change", "kind"), [(Add, 12), (Delete, 14)])
@pytest.mark.parametrize("size", [8, 20])
def test_many_keys_go_in_messages_below_64_kib(change: type[Add | Delete], kind: int, size: int) -> None:
    keys = [number.to_bytes(size, "big") for number in range(10_000)]
    found = []
    for type_, body in messages(change("allow6", keys)):
        attributes = dict(attributes_of(body))
        assert (type_, attributes[1], attributes[2]) == (kind, string("portward"), string("allow6"))
        assert len(body) < 1 << 16
        found += [element.key for element in elements(attributes[3])]
    assert found == keys


def test_a_flush_names_no_elements() -> None:
    ((kind, body),) = messages(Flush("deny4"))
    assert (kind, dict(attributes_of(body))) == (14, {1: string("portward"), 2: string("deny4")})


def test_a_limit_is_an_object_with_its_bucket() -> None:
    ((kind, body),) = messages(AddLimit("s1-60-5", 60, 5))
    attributes = dict(attributes_of(body))
    bucket = dict(attributes_of(attributes[4]))
    assert (kind, attributes[2], attributes[3]) == (18, string("s1-60-5"), struct.pack(">I", 4))
    assert (bucket[1], bucket[2], bucket[3]) == (
        struct.pack(">Q", 60),
        struct.pack(">Q", 60),
        struct.pack(">I", 5),
    )
    ((kind, body),) = messages(DeleteLimit("s1-60-5"))
    assert (kind, dict(attributes_of(body))[2]) == (20, string("s1-60-5"))


def test_the_keys_of_a_map_name_their_limits() -> None:
    limits = {number.to_bytes(20, "big"): f"s{number}-4294967295-4294967295" for number in range(3_000)}
    found = {}
    for kind, body in messages(Draw("rates6", limits)):
        assert (kind, len(body) < 1 << 16) == (12, True)
        found.update({element.key: element.object for element in elements(dict(attributes_of(body))[3])})
    assert found == limits


def test_a_rule_names_the_set_and_where_it_leads() -> None:
    ((kind, body),) = messages(InsertRule("screen", "gated", "gate"))
    attributes = dict(attributes_of(body))
    assert (kind, attributes[1], attributes[2]) == (6, string("portward"), string("screen"))
    names = [dict(attributes_of(one))[1] for _, one in attributes_of(attributes[4])]
    assert names == [string("meta"), string("lookup"), string("immediate")]
    ((kind, body),) = messages(DeleteRule("screen", 77))
    assert (kind, dict(attributes_of(body))[3]) == (8, struct.pack(">Q", 77))


class Netlink:
    """Takes transactions, or refuses them."""

    def __init__(self, refusal: int = 0) -> None:
        self.refusal, self.taken, self.table = refusal, 0, KernelTable.INET

    def committing(self) -> AbstractContextManager[None]:
        """Counts nothing."""
        return nullcontext()

    def expect(self, messages: int) -> None:
        """Makes room for reports."""

    def commit(self, messages: Iterable[tuple[int, bytes]], *, reported: Container[int]) -> list[bytes]:
        self.taken += 1
        if self.refusal:
            raise OSError(self.refusal, "no")
        return []


def test_a_refusal_carries_the_kernels_errno() -> None:
    with pytest.raises(RefusedError) as raised:
        KernelElements(Netlink(errno.ENFILE)).commit([Flush("allow4")])  # type: ignore[arg-type]
    assert raised.value.errno == errno.ENFILE


@pytest.mark.parametrize("changes", [[], [Add("allow4", [])]])
def test_no_change_is_no_transaction(changes: list[Change]) -> None:
    netlink = Netlink()
    KernelElements(netlink).commit(changes)  # type: ignore[arg-type]
    assert netlink.taken == 0
