"""The output of child processes is read line by line, and fills neither log nor memory."""

from __future__ import annotations

import asyncio
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from portward.daemon.child_output import LogLimiter, lines_of


def read(parts: list[bytes], longest: int) -> list[bytes]:
    """The lines of a stream that arrives in these parts."""

    async def collected() -> list[bytes]:
        stream = asyncio.StreamReader(limit=16)
        found = []

        async def feed() -> None:
            for part in parts:
                stream.feed_data(part)
                await asyncio.sleep(0)
            stream.feed_eof()

        feeding = asyncio.ensure_future(feed())
        async for line in lines_of(stream, longest):
            found.append(line)
        await feeding
        return found

    return asyncio.run(collected())


@given(st.lists(st.binary(max_size=40).map(lambda part: part.replace(b"z", b"\n"))), st.integers(1, 30))
def test_lines_are_those_of_the_whole_however_it_arrives(parts: list[bytes], longest: int) -> None:
    lines = b"".join(parts).split(b"\n")
    expected = [line[:longest] for line in (lines if lines[-1] else lines[:-1])]
    assert read(parts, longest) == expected


def test_a_flood_of_lines_is_logged_in_part(caplog: pytest.LogCaptureFixture) -> None:
    now = 0.0
    limited = LogLimiter(logging.getLogger("foreign"), lambda: now)
    with caplog.at_level(logging.INFO):
        for number in range(1_000):
            assert limited.line(logging.INFO, "they say: ", b"line %d\r" % number) == f"line {number}"
        assert [record.getMessage() for record in caplog.records] == [f"they say: line {n}" for n in range(20)]
        caplog.clear()
        now = 61.0
        limited.line(logging.INFO, "they say: ", b"later")
    assert [record.getMessage() for record in caplog.records] == [
        "they say: 980 more lines, which are not shown",
        "they say: later",
    ]


def test_a_line_cannot_forge_another_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        LogLimiter(logging.getLogger("foreign")).line(logging.INFO, "", b"a\rCRITICAL \x1b[2J\xff\0")
    assert caplog.records[0].getMessage() == "a\\rCRITICAL \\x1b[2J\\xff\\x00"
