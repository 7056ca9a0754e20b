"""nft's answers become errors of one line, and transactions of other programs are noticed."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest

from portward.dataplane import nft as module
from portward.dataplane.fake import FakeKernel
from portward.dataplane.nft import Nft
from portward.errors import KernelError
from unit.scarce import no_descriptors


class Library:
    """libnftables that says one thing; it notes what it was asked, and contexts that were not freed."""

    def __init__(self, errors: bytes = b"", output: bytes = b"") -> None:
        self._errors, self._output = errors, output
        self.asked: list[tuple[str, bool, int]] = []
        self.open: dict[int, list[Any]] = {}

    def nft_ctx_new(self, _: int) -> int:
        """A new context: dry run, flags."""
        number = len(self.asked) + len(self.open) + 1
        self.open[number] = [False, 0]
        return number

    def nft_ctx_free(self, context: int) -> None:
        """Notes it."""
        del self.open[context]

    def nft_ctx_set_dry_run(self, context: int, dry_run: bool) -> None:
        """Notes it."""
        self.open[context][0] = dry_run

    def nft_ctx_output_set_flags(self, context: int, flags: int) -> None:
        """Notes it."""
        self.open[context][1] = flags

    def nft_ctx_buffer_output(self, _: int) -> int:
        """Does nothing."""
        return 0

    nft_ctx_buffer_error = nft_ctx_buffer_output

    def nft_ctx_get_output_buffer(self, _: int) -> bytes:
        """The listing."""
        return self._output

    def nft_ctx_get_error_buffer(self, _: int) -> bytes:
        """The error."""
        return self._errors

    def nft_run_cmd_from_buffer(self, context: int, text: bytes) -> int:
        """Fails if there is an error."""
        self.asked.append((text.decode(), *self.open[context]))
        return -bool(self._errors)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Library]:
    """Puts a library in place of libnftables."""

    def make(**answers: bytes) -> Library:
        found = Library(**answers)
        monkeypatch.setattr(module, "_library", lambda: found)
        return found

    return make


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (b"/dev/stdin:3:1-5: Error: syntax error, unexpected x\nx y\n^\n",
         "nft: 3:1-5: Error: syntax error, unexpected x: x y"),
        (b"Error: Could not process rule: Operation not permitted\n\n",
         "nft: Error: Could not process rule: Operation not permitted"),
        (b"Error: one\nadd table inet t\n^^^\nError: two\n", "nft: Error: one: add table inet t"),
        (b"netlink: Error: cache initialization failed: Operation not permitted\n",
         "nft: netlink: Error: cache initialization failed: Operation not permitted"),
        (b"\n", "nft: failed without a word"),
    ],
)  # fmt: skip
def test_an_error_is_one_line_and_the_command_it_points_at(
    library: Callable[..., Library], said: bytes, told: str
) -> None:
    found = library(errors=said)
    for ask in (Nft().load, Nft().check, Nft().listing):
        with pytest.raises(KernelError) as raised:
            ask("inet t")
        assert str(raised.value) == told
    assert not found.open, "no context is left, also after an error"


def test_a_check_is_a_dry_run_and_a_listing_leaves_elements_out(library: Callable[..., Library]) -> None:
    found = library(output=b"table inet t {}\n")
    nft = Nft()
    nft.load("text")
    nft.check("text")
    assert nft.listing("inet t") == "table inet t {}\n"
    assert found.asked == [("text", False, 0), ("text", True, 0), ("list table inet t", False, 1 << 11)]
    assert not found.open


def test_without_the_library_the_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: str) -> None:
        raise OSError("libnftables.so.1: cannot open shared object file")

    monkeypatch.setattr("portward.dataplane.nft.ctypes.CDLL", missing)
    with pytest.raises(KernelError, match="install the package nftables"):
        Nft()


# --- whose transaction was it ---

OURS, NOTHING = "add table inet t", "add table inet old"


@pytest.fixture
def kernel() -> FakeKernel:
    """A kernel with a table."""
    found = FakeKernel()
    found.load(NOTHING)
    return found


@pytest.mark.parametrize("text", [OURS, NOTHING])
def test_our_own_transactions_disturb_nothing(kernel: FakeKernel, text: str) -> None:
    nft = kernel.nft()
    nft.load("add table inet first")
    nft.load(text)
    assert (nft.disturbed, nft.left_at) == (False, kernel.generation)


def test_one_of_others_between_two_of_ours_is_noticed(kernel: FakeKernel) -> None:
    nft = kernel.nft()
    nft.load("add table inet first")
    kernel.load("add table inet theirs")
    assert not nft.disturbed, "nobody has looked yet"
    nft.load(OURS)
    assert nft.disturbed


def test_one_of_others_within_ours_is_noticed(kernel: FakeKernel) -> None:
    nft = kernel.nft()
    kernel.meanwhile(lambda: kernel.load("add table inet theirs"))
    nft.load(OURS)
    assert nft.disturbed


def test_a_refused_one_of_ours_leaves_the_number_as_it_was(kernel: FakeKernel) -> None:
    nft = kernel.nft()
    nft.load(OURS)
    left = nft.left_at
    with pytest.raises(KernelError, match="File exists"):
        nft.load("create table inet t")
    assert (nft.left_at, nft.disturbed) == (left, False)


def test_the_number_may_wrap_within_ours(kernel: FakeKernel) -> None:
    nft = kernel.nft()
    kernel.generation = 2**32 - 1
    nft.load(OURS)
    assert (nft.left_at, nft.disturbed) == (0, False)


def test_without_descriptors_libnftables_is_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends the process if it gets no socket."""
    library = Library()
    monkeypatch.setattr(module, "_library", lambda: library)
    nft = Nft()
    with no_descriptors():
        nft.check("add table inet t\n")
        nft.reserve.release()
        taken = [os.eventfd(0) for _ in range(7)]
        with pytest.raises(KernelError, match="no descriptor is left for nftables"):
            nft.check("add table inet u\n")
        for descriptor in taken:
            os.close(descriptor)
    assert [asked[0] for asked in library.asked] == ["add table inet t\n"]
