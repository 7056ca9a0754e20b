"""A reader caches what it has read under one commit. A second thread would mix two commits, so it is refused."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from ipaddress import ip_address
from pathlib import Path

import pytest

from portward.table.reader import Reader
from portward.table.writer import Writer
from unit.table.test_table import AZURE, ENFORCE, NOW, attachment, load, subscription

ADDRESS = ip_address("10.0.0.1").packed


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[Writer]:
    """A table with one attachment behind interface 2."""
    with closing(Writer(tmp_path, AZURE, ENFORCE)) as found:
        load(found, [subscription(1), attachment("10.0.0.1", 1)])
        found.put_links({2: ("vni1", False)}, touched=frozenset(), now=NOW)
        yield found


def used(reader: Reader, method: str) -> None:
    """Uses a reader."""
    if method == "view":
        with reader.view():
            reader.lookup(2, ADDRESS)
    elif method == "owner":
        reader.owner(2, ADDRESS)
    else:
        reader.lookup(2, ADDRESS)


@pytest.mark.parametrize("method", ["lookup", "owner", "view"])
def test_a_second_thread_is_refused(writer: Writer, method: str) -> None:
    reader = writer.reader()
    used(reader, method)
    with ThreadPoolExecutor(1) as other, pytest.raises(RuntimeError, match="belongs to the thread"):
        other.submit(used, reader, method).result()
    used(reader, method)


def test_a_reader_may_be_made_on_one_thread_for_another(writer: Writer) -> None:
    reader = writer.reader()
    with ThreadPoolExecutor(1) as other:
        other.submit(used, reader, "lookup").result()
