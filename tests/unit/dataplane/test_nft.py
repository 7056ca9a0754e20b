"""nft's answers become errors of one line, and transactions of other programs are noticed."""

from __future__ import annotations

import contextlib
import errno
import os
import struct
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest

from portward.base.netlink import NLM_F_CREATE, NLM_F_EXCL, attribute, string
from portward.dataplane import compiled
from portward.dataplane import nf_tables as nf
from portward.dataplane import nft as module
from portward.dataplane.compiled import Message
from portward.dataplane.elements import Add, messages
from portward.dataplane.fake import FakeKernel
from portward.dataplane.names import KernelTable
from portward.dataplane.nft import Nft
from portward.dataplane.ruleset import Wanted
from portward.errors import KernelError
from unit.scarce import no_descriptors


class Library:
    """A fake libnftables with one error and one output. It records its calls, and contexts that were not freed."""

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
    ("said", "message"),
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
    library: Callable[..., Library], said: bytes, message: str
) -> None:
    found = library(errors=said)
    for ask in (Nft().load, Nft().check, Nft().listing):
        with pytest.raises(KernelError) as raised:
            ask("inet t")
        assert str(raised.value) == message
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
    netlink = kernel.netlink()
    nft = kernel.nft(netlink)
    nft.load("add table inet first")
    nft.load(text)
    assert (netlink.disturbed, netlink.left_at) == (False, kernel.generation)


def test_one_of_others_between_two_of_ours_is_noticed(kernel: FakeKernel) -> None:
    netlink = kernel.netlink()
    nft = kernel.nft(netlink)
    nft.load("add table inet first")
    kernel.load("add table inet theirs")
    assert not netlink.disturbed, "no check has run yet"
    nft.load(OURS)
    assert netlink.disturbed


def test_one_of_others_within_ours_is_noticed(kernel: FakeKernel) -> None:
    netlink = kernel.netlink()
    nft = kernel.nft(netlink)
    kernel.meanwhile(lambda: kernel.load("add table inet theirs"))
    nft.load(OURS)
    assert netlink.disturbed


def test_a_refused_one_of_ours_leaves_the_number_as_it_was(kernel: FakeKernel) -> None:
    netlink = kernel.netlink()
    nft = kernel.nft(netlink)
    nft.load(OURS)
    left = netlink.left_at
    with pytest.raises(KernelError, match="File exists"):
        nft.load("create table inet t")
    assert (netlink.left_at, netlink.disturbed) == (left, False)


def test_the_number_may_wrap_within_ours(kernel: FakeKernel) -> None:
    netlink = kernel.netlink()
    nft = kernel.nft(netlink)
    kernel.generation = 2**32 - 1
    nft.load(OURS)
    assert (netlink.left_at, netlink.disturbed) == (0, False)


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


# --- texts that libnftables only compiles ---

ROW = "----------------\t------------------\n"


def printed(kind: int, body: bytes = b"", family: int = 1) -> str:
    """A message as libmnl prints it, with one attribute of type 1."""
    attributes = ""
    if body:
        data = body + bytes(-len(body) % 4)
        attributes = f"|{4 + len(body):05d}|--|00001|\t|len |flags| type|\n" + "".join(
            f"| {data[at : at + 4].hex(' ')}  |\t|      data      |\t\n" for at in range(0, len(data), 4)
        )
        body = bytes(4) + data
    return (
        f"{ROW}|  {20 + len(body):010d}  |\t| message length |\n| {kind:05d} | R--- |\t|  type | flags  |\n"
        f"|  0000000000  |\t| sequence number|\n|  0000000000  |\t|     port ID    |\n{ROW}"
        f"| {family:02x} 00 00 00  |\t|  extra header  |\n{attributes}{ROW}"
    )


# The request for the generation, the beginning, the message of FETCH_NOTHING, and one that makes table t.
COMPILED = (printed(2576) + printed(16) + printed(2562, family=3) + printed(2560, b"t\0")).encode()
TABLE_T = Message(nf.NFT_MSG_NEWTABLE, nf.NFPROTO_INET, NLM_F_CREATE, attribute(1, string("t")))
DELETE_OLD = Message(nf.NFT_MSG_DELTABLE, nf.NFPROTO_INET, 0, attribute(1, string("old")))
CREATE_T = TABLE_T._replace(flags=NLM_F_CREATE | NLM_F_EXCL)
# Text and fixed part differ, so that a test can see which of them is used.
WANTED = Wanted(KernelTable.INET, "whole\n", 0, (), native=True, fixed="fixed\n", numbers={"numbers": (7,)})
(ELEMENT,) = compiled.making(KernelTable.INET, list(messages(Add("numbers", [struct.pack("=I", 7)]))))
DELETE = "delete table inet old\n"


class Compiling(Library):
    """libnftables that prints the messages of each text."""

    def nft_ctx_output_set_debug(self, _: int, level: int) -> None:
        """Takes NFT_DEBUG_MNL."""
        assert level == 1 << 4


class Sent:
    """Notes transactions (messages, dry run), or refuses them."""

    def __init__(self, refusal: OSError | None = None) -> None:
        self._refusal = refusal
        self.transactions: list[tuple[list[Message], bool]] = []

    def committing(self) -> AbstractContextManager[None]:
        """Counts nothing."""
        return contextlib.nullcontext()

    def transact(self, messages: list[Message], *, dry_run: bool = False) -> None:
        """Takes a transaction."""
        if self._refusal is not None:
            raise self._refusal
        self.transactions.append((messages, dry_run))


@pytest.fixture
def compiling(monkeypatch: pytest.MonkeyPatch) -> Compiling:
    """Stands in for libnftables."""
    found = Compiling(output=COMPILED)
    monkeypatch.setattr(module, "_library", lambda: found)
    return found


CALLS: dict[str, tuple[Callable[[Nft], None], list[Message], bool, str, bool]] = {
    # The call; the messages and the dry run that the kernel gets; without a socket the text and the dry run.
    "check": (lambda nft: nft.check("fixed\n", DELETE), [DELETE_OLD, TABLE_T], True, DELETE + "fixed\n", True),
    "check_replacement": (
        lambda nft: nft.check_replacement(DELETE, WANTED),
        [DELETE_OLD, TABLE_T, ELEMENT], True, DELETE + "whole\n", True,
    ),
    "replace": (
        lambda nft: nft.replace(DELETE, WANTED),
        [DELETE_OLD, TABLE_T, ELEMENT], False, DELETE + "whole\n", False,
    ),
    "add": (lambda nft: nft.add("fixed\n"), [TABLE_T], False, "fixed\n", False),
    "create": (
        lambda nft: nft.create("inet t", "fixed\n"),
        [CREATE_T, TABLE_T], False, "create table inet t\nfixed\n", False,
    ),
    "delete": (lambda nft: nft.delete("inet old"), [DELETE_OLD], False, DELETE, False),
}  # fmt: skip


@pytest.mark.parametrize("call", CALLS)
def test_a_transaction_has_the_messages_that_libnftables_has_compiled(compiling: Compiling, call: str) -> None:
    """libnftables gets the text that does not change, as a dry run, and never the kernel's rulesets."""
    ask, messages_, dry_run, *_ = CALLS[call]
    sent = Sent()
    nft = Nft(sent)
    ask(nft)
    assert sent.transactions == [(messages_, dry_run)]
    assert compiling.asked == ([] if call == "delete" else [(compiled.FETCH_NOTHING + "fixed\n", True, 0)])
    assert nft.compiles


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("how", ["no socket", "another form of messages"])
def test_libnftables_makes_the_transaction_itself_if_its_messages_cannot_be_used(
    library: Callable[..., Library], monkeypatch: pytest.MonkeyPatch, call: str, how: str
) -> None:
    ask, _, _, text, dry_run = CALLS[call]
    sent = Sent()
    if how == "no socket":
        found, nft = library(), Nft()
    else:
        found = Compiling(output=b"messages in another form")
        monkeypatch.setattr(module, "_library", lambda: found)
        nft = Nft(sent)
        with contextlib.suppress(KernelError):
            nft.check("add table inet t\n")
        assert not nft.compiles, "it is not tried again"
        found.asked.clear()
    nft.prepare(WANTED)
    assert found.asked == [], "nothing is compiled in advance"
    ask(nft)
    assert found.asked == [(text, dry_run, 0)]
    assert sent.transactions == []


def test_a_text_is_compiled_once_and_the_last_eight_are_cached(compiling: Compiling) -> None:
    nft = Nft(Sent())
    nft.prepare(WANTED)
    nft.replace("", WANTED)
    assert len(compiling.asked) == 1, "prepared in advance"
    for text in "1234567887654321":
        nft.add(text)
    assert [asked[0].removeprefix(compiled.FETCH_NOTHING) for asked in compiling.asked] == ["fixed\n", *"12345678"]
    nft.replace("", WANTED)
    assert len(compiling.asked) == 10, "the oldest is compiled again"


def test_the_elements_of_the_table_bridge_are_written_into_that_table(compiling: Compiling) -> None:
    sent = Sent()
    Nft(sent).replace("delete table bridge old\n", WANTED._replace(table=KernelTable.BRIDGE))
    ((messages_, _),) = sent.transactions
    assert [message.family for message in messages_] == [nf.NFPROTO_BRIDGE, nf.NFPROTO_INET, nf.NFPROTO_BRIDGE]


def test_an_advance_compilation_in_another_form_is_left_to_the_transaction(compiling: Compiling) -> None:
    compiling._output = b"messages in another form"
    nft = Nft(Sent())
    nft.prepare(WANTED)
    assert nft.compiles


def test_a_text_with_a_mistake_is_refused_by_its_line_as_the_operator_wrote_it(
    library: Callable[..., Library], monkeypatch: pytest.MonkeyPatch
) -> None:
    """libnftables prints no messages then. The error does not show the added command that fetches nothing."""
    found = Compiling(errors=b"/dev/stdin:1:20-22: Error: unknown\nflush ruleset arp; fixed\n^^^\n")
    monkeypatch.setattr(module, "_library", lambda: found)
    sent = Sent()
    with pytest.raises(KernelError) as raised:
        Nft(sent).add("fixed\n")
    assert str(raised.value) == "nft: 1:20-22: Error: unknown: fixed"
    assert (sent.transactions, found.open) == ([], {})


def test_an_error_of_the_kernel_during_the_compilation_does_not_matter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The dry run of libnftables may fail, for example without the privilege. The transaction decides."""
    found = Compiling(errors=b"Error: Operation not permitted\n", output=COMPILED)
    monkeypatch.setattr(module, "_library", lambda: found)
    sent = Sent()
    Nft(sent).add("fixed\n")
    assert sent.transactions == [([TABLE_T], False)]


def test_a_refusal_names_its_reason_and_its_object(compiling: Compiling) -> None:
    refusal = OSError(errno.EEXIST, "File exists")
    refusal.add_note("table t")
    nft = Nft(Sent(refusal))
    with pytest.raises(KernelError) as raised:
        nft.create("inet t", "fixed\n")
    assert str(raised.value) == "nft: Error: Could not process rule: File exists (table t)"
    assert nft.compiles, "a refusal is no reason to compile no more"


def test_a_whole_ruleset_that_is_not_fixed_is_left_to_libnftables(compiling: Compiling) -> None:
    sent = Sent()
    Nft(sent).load("text")
    assert (sent.transactions, compiling.asked) == ([], [("text", False, 0)])
