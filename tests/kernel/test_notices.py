"""The kernel's notices of changed rulesets arrive, however many there are."""

from __future__ import annotations

import select
from collections.abc import Iterator
from contextlib import closing

import pytest

from kernel.conftest import lab_name
from portward.gateway.notices import Notices
from portward.lab import namespaces


@pytest.fixture(scope="module")
def namespace() -> Iterator[str]:
    """An empty network namespace."""
    name = lab_name()
    namespaces.make(name)
    yield name
    namespaces.remove(name)


@pytest.fixture
def notices(namespace: str) -> Iterator[Notices]:
    """What hears of that namespace."""
    with namespaces.inside(namespace):
        found = Notices()
    with closing(found):
        yield found


def heard(notices: Notices, seconds: float) -> bool:
    """Whether there is a notice within so many seconds."""
    return bool(select.select([notices], [], [], seconds)[0])


def nft(namespace: str, text: str) -> None:
    """Changes the namespace's rules."""
    namespaces.load(namespace, text)


def test_a_change_is_heard_and_then_forgotten(namespace: str, notices: Notices) -> None:
    assert not heard(notices, 0)
    nft(namespace, "add table inet heard")
    assert heard(notices, 5)
    notices.drain()
    assert not heard(notices, 0.2)


def test_more_changes_than_are_kept_are_one(namespace: str, notices: Notices) -> None:
    nft(namespace, "table inet many {\n set numbers { type inet_service; }\n}")
    for number in range(300):
        nft(namespace, f"add element inet many numbers {{ {number} }}\nflush set inet many numbers")
    notices.drain()
    assert not heard(notices, 0.2)
    nft(namespace, "delete table inet many")
    assert heard(notices, 5)
