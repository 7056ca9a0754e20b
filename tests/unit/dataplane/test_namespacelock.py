"""The lock allows one writer for each network namespace, and a refusal names the holder."""

from __future__ import annotations

import errno

import pytest

from portward.dataplane import namespacelock
from portward.dataplane.fake import FakeKernel
from portward.dataplane.namespacelock import LOCK_TABLE, NamespaceLock, NamespaceTakenError
from portward.errors import KernelError


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> FakeKernel:
    """The kernel whose namespace is locked."""
    found = FakeKernel()
    monkeypatch.setattr(namespacelock, "NfNetlink", found.netlink)
    return found


def test_the_lock_is_one_for_all_and_ends_with_its_holder(kernel: FakeKernel) -> None:
    with NamespaceLock(0):
        with pytest.raises(NamespaceTakenError, match=r"runs already, as process \d+ by its own count") as raised:
            NamespaceLock(0)
        found = namespacelock.holder(kernel.netlink())
        assert found is not None
        assert found.process == raised.value.process
    assert namespacelock.holder(kernel.netlink()) is None
    NamespaceLock(0).close()


def test_a_refused_lock_changes_nothing(kernel: FakeKernel) -> None:
    with NamespaceLock(0):
        before = kernel.state()
        written = len(kernel.journal)
        with pytest.raises(NamespaceTakenError):
            NamespaceLock(0)
        namespacelock.require(kernel.netlink())
        assert kernel.state() == before
        assert len(kernel.journal) == written


def test_a_holder_that_ends_while_another_agent_waits_makes_room(
    kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = NamespaceLock(0)
    pauses = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        first.close()

    monkeypatch.setattr("portward.dataplane.namespacelock.time.sleep", pause)
    NamespaceLock(60).close()
    assert len(pauses) == 1


def test_a_table_of_that_name_without_an_owner_blocks_no_agent(kernel: FakeKernel) -> None:
    kernel.load(f"table inet {LOCK_TABLE} {{ chain theirs {{ type filter hook forward priority 0; }} }}")
    assert namespacelock.holder(kernel.netlink()) is None
    with NamespaceLock(0):
        assert namespacelock.holder(kernel.netlink()) is not None
        assert not kernel.tables[LOCK_TABLE].chains


def test_another_program_that_owns_the_table_is_said_to_be_one(kernel: FakeKernel) -> None:
    kernel.load(f"add table inet {LOCK_TABLE} {{ flags owner; }}")
    with pytest.raises(NamespaceTakenError, match="another program owns table inet portward_lock") as raised:
        NamespaceLock(0)
    assert raised.value.process is None


def test_without_the_privilege_it_says_so(kernel: FakeKernel) -> None:
    kernel.permitted = False
    for ask in (NamespaceLock, lambda: namespacelock.require(kernel.netlink())):
        with pytest.raises(KernelError, match=r"root or CAP_NET_ADMIN\?"):
            ask()


@pytest.mark.parametrize(
    ("number", "message"),
    [(errno.EINVAL, "Linux 5.12"), (errno.EOPNOTSUPP, "Linux 5.12"), (errno.ENOMEM, "Cannot allocate memory")],
)
def test_a_kernel_without_owners_is_said_to_be_too_old(kernel: FakeKernel, number: int, message: str) -> None:
    kernel.refuse(number)
    with pytest.raises(KernelError, match=message):
        NamespaceLock(0)


def test_a_lock_survives_a_flush_of_all_rules(kernel: FakeKernel) -> None:
    with NamespaceLock(0):
        kernel.load("flush ruleset")
        assert namespacelock.holder(kernel.netlink()) is not None
