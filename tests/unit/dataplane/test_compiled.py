"""The messages that libnftables prints are read word by word, and refused if they are not understood."""

from __future__ import annotations

import pytest

from portward.base.netlink import NLM_F_CREATE, attribute, string
from portward.dataplane import compiled
from portward.dataplane.compiled import Message, UnreadableError

LINE = "----------------\t------------------\n"
NAME = (
    "|\x1b[1;31m00006\x1b[0m|\x1b[1;32m--\x1b[0m|\x1b[1;34m00001\x1b[0m|\t|len |flags| type|\n"
    "| 74 00 00 00  |\t|      data      |\t t      \n"
)


def printed(length: int, kind: int, body: str = "", family: int = 1) -> str:
    """A message as libmnl prints it."""
    return (
        f"{LINE}|  {length:010d}  |\t| message length |\n| {kind:05d} | R--- |\t|  type | flags  |\n"
        f"|  0000000000  |\t| sequence number|\n|  0000000000  |\t|     port ID    |\n{LINE}"
        f"| {family:02x} 00 00 00  |\t|  extra header  |\n{body}{LINE}"
    )


BEGIN = printed(20, 2576) + printed(20, 16) + printed(20, 2562, family=3)


def test_the_messages_behind_the_first_line_are_given() -> None:
    found = compiled.messages(BEGIN + printed(28, 2560, NAME, family=2))
    assert found == [Message(0, 2, NLM_F_CREATE, attribute(1, string("t")))]


@pytest.mark.parametrize(
    "text",
    ["", "anything else", printed(28, 2560, NAME), BEGIN + printed(32, 2560, NAME), BEGIN + printed(28, 2560)],
)
def test_what_is_not_understood_is_an_error(text: str) -> None:
    """The texts have another format, no transaction, or a truncated message."""
    with pytest.raises(UnreadableError):
        compiled.messages(text)


def test_plain_commands_need_no_library() -> None:
    text = "add table inet t\nflush table inet t\ndelete chain inet t c\ndelete map inet t m\nflush set inet t s\n"
    table = attribute(1, string("t"))
    assert compiled.plain(text) == [
        Message(0, 1, NLM_F_CREATE, table),
        Message(8, 1, 0, table),
        Message(5, 1, 0, table + attribute(3, string("c"))),
        Message(11, 1, 0, table + attribute(2, string("m"))),
        Message(14, 1, 0, table + attribute(2, string("s"))),
    ]
    assert compiled.plain("delete table bridge t\n") == [Message(2, 7, 0, table)]


@pytest.mark.parametrize(
    "text", ["add rule inet t c drop", "delete table ip t", "flush ruleset", "delete set inet t"]
)
def test_other_commands_are_not_taken_for_plain_ones(text: str) -> None:
    with pytest.raises((KeyError, ValueError)):
        compiled.plain(text)
