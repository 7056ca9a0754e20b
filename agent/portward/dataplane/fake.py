"""A fake of the kernel's nf_tables as portward uses it, for tests without root of all code that writes the kernel.

`FakeKernel` is one network namespace. `netlink()` and `nft()` return the real classes `NfNetlink` and `Nft` with
the kernel replaced. `tests/kernel/test_fake.py` runs the same commands on the fake and in the kernel, and
compares.

As in the kernel, a transaction is all or nothing. It raises the generation by one, or not at all if it
changes nothing. A full set refuses another element (ENFILE); an element that has expired and was not collected
still takes room. The deletion of an element that is missing or has expired fails (ENOENT). A table with an owner
belongs to one socket (EPERM). Rules are opaque text: no packet passes the fake.

`journal` has each committed transaction. A test prepares faults with `refuse`, `meanwhile`, `die`, `unreadable`,
`overlook` and `permitted`.
"""

from __future__ import annotations

import errno
import os
import re
import struct
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import contextmanager
from hashlib import blake2b
from math import inf
from typing import NamedTuple, NoReturn, TypeAlias

from portward.base.netlink import attributes_of
from portward.dataplane import faketext
from portward.dataplane import nf_tables as nf
from portward.dataplane.elements import (
    Change,
)
from portward.dataplane.fakemessages import change_of, read, reports_of, text_of
from portward.dataplane.faketables import Draft, FakeElement, FakeSet, FakeTable, handle
from portward.dataplane.faketext import SyntaxFault
from portward.dataplane.names import TABLE
from portward.dataplane.nfnetlink import Chain, Expression, NfNetlink
from portward.dataplane.nft import Nft
from portward.dataplane.setdump import SetElement, SetRow
from portward.errors import KernelError


class ProcessDied(BaseException):  # no code under test may catch it
    """The process ended right after a transaction; see `FakeKernel.die`."""


@contextmanager
def _kernel_text() -> Iterator[None]:
    """Adds the kernel's text to the errors of `faketables`, which have only the errno."""
    try:
        yield
    except OSError as error:
        refuse(error.errno or 0)


def refuse(number: int) -> NoReturn:
    """Raises OSError with this errno and the kernel's text."""
    raise OSError(number, os.strerror(number))


# nft's text; or what netlink messages do: changes of elements, or a description.
Done: TypeAlias = str | tuple[Change | str, ...]


class Transaction(NamedTuple):
    """A committed transaction, and the generation after it."""

    done: Done
    generation: int


class FakeKernel:
    """One network namespace. `native`: it has nft_queue. `xtables`: it has the xtables target NFQUEUE. `bridge`:
    it has base chains in tables of family bridge. A table has the key that `faketext.key` gives."""

    def __init__(self, *, native: bool = True, xtables: bool = True, bridge: bool = False) -> None:
        self.native, self.xtables, self.bridge = native, xtables, bridge
        self.tables: dict[str, FakeTable] = {}
        self.generation = 7
        self.now = 1_000.0  # seconds
        self.permitted = True
        self.journal: list[Transaction] = []
        # The tables after each transaction of the journal.
        self.history: list[dict[str, FakeTable]] = []
        self._faults: list[tuple[int, Callable[[], object]]] = []
        self._unreadable: list[int] = []
        self._overlooked: dict[str, set[bytes]] = {}
        self._dies_after: int | None = None

    # --- the two ways in ---

    def netlink(self) -> FakeNetlink:
        """A socket to this kernel."""
        return FakeNetlink(self)

    def nft(self, socket: FakeNetlink | None = None) -> FakeNft:
        """nftables on this kernel, which takes texts as they are. Its transactions count as those of `socket`."""
        return FakeNft(self, socket)

    # --- faults ---

    def refuse(self, number: int, *, after: int = 0, times: int = 1) -> None:
        """Lets the kernel refuse `times` transactions with this errno, after `after` more attempts."""
        for place in range(after, after + times):
            self._faults.append((place, lambda: refuse(number)))

    def meanwhile(self, work: Callable[[], object], *, after: int = 0) -> None:
        """Runs another program's work right before a transaction, after `after` more attempts."""
        self._faults.append((after, work))

    def die(self, after: int | None) -> None:
        """Raises ProcessDied right after `after` more transactions; None: not at all."""
        self._dies_after = after

    def unreadable(self, number: int, times: int = 1) -> None:
        """Lets the next `times` readings of elements fail with this errno."""
        self._unreadable += [number] * times

    def overlook(self, set_: str, keys: Iterable[bytes]) -> None:
        """Lets the next reading of a set miss these keys, as if the kernel's collector had disturbed it."""
        self._overlooked[set_] = set(keys)

    def collect(self) -> None:
        """Deletes expired elements, as the kernel does once a second."""
        for table in self.tables.values():
            for set_ in table.sets.values():
                set_.elements = {key: one for key, one in set_.elements.items() if one.expires > self.now}

    def learn(self, set_: str, key: bytes, packets: int = 0, table: str = "portward") -> bool:
        """Lets a packet put a key into a set, which is no transaction. False if the set is full."""
        found = self.tables[table].sets[set_]
        if key not in found.elements and found.size and len(found.elements) >= found.size:
            return False
        found.elements[key] = FakeElement(self._expiry(found), packets)
        return True

    # --- transactions ---

    def transact(
        self, work: Callable[[Draft], None], done: Callable[[], Done], socket: object, *, dry_run: bool = False
    ) -> None:
        """Does `work` on a draft of the tables for `socket`. `done` returns the entry of the journal. Raises
        OSError, and then nothing has changed."""
        if not self.permitted:
            refuse(errno.EPERM)
        if not dry_run:
            self._inject()
        draft = Draft(self.tables, self.now, socket, native=self.native, bridge=self.bridge)
        with _kernel_text():
            work(draft)
        if dry_run or not draft.touched:
            return
        self.tables = draft.tables
        self.generation = (self.generation + 1) % 2**32
        self.journal.append(Transaction(done(), self.generation))
        self.history.append(self.state())
        if self._dies_after is not None:
            self._dies_after -= 1
            if self._dies_after == 0:
                self._dies_after = None
                raise ProcessDied

    def state(self) -> dict[str, FakeTable]:
        """A copy of the tables."""
        return {name: table.copy() for name, table in self.tables.items()}

    def release(self, socket: object) -> None:
        """Closes a socket, which deletes its tables."""
        self.tables = {name: table for name, table in self.tables.items() if table.owner is not socket}

    def _inject(self) -> None:
        due = [fault for after, fault in self._faults if after == 0]
        self._faults = [(after - 1, fault) for after, fault in self._faults if after > 0]
        for fault in due:
            fault()

    def load(self, text: str, socket: FakeNetlink | None = None) -> None:
        """Runs `nft -f` of another program. Raises KernelError."""
        FakeNft(self, socket).load(text)

    # --- readings ---

    def read(self, table: str, set_: str) -> list[SetElement]:
        """The elements of a set that have not expired. Raises OSError."""
        if not self.permitted:
            refuse(errno.EPERM)
        if self._unreadable:
            refuse(self._unreadable.pop(0))
        missed = self._overlooked.pop(set_, set())
        return [
            SetElement(key, one.packets, self._left_ms(one), one.object)
            for key, one in self.found(table, set_).elements.items()
            if one.expires > self.now and key not in missed
        ]

    def found(self, table: str, set_: str) -> FakeSet:
        """A set with all its elements. Raises FileNotFoundError."""
        if table not in self.tables or set_ not in self.tables[table].sets:
            refuse(errno.ENOENT)
        return self.tables[table].sets[set_]

    def _left_ms(self, entry: FakeElement) -> int:
        return 0 if entry.expires == inf else max(1, round((entry.expires - self.now) * 1000))

    def _expiry(self, set_: FakeSet) -> float:
        return self.now + set_.timeout_ms / 1000 if set_.timeout_ms else inf


class FakeNft(Nft):
    """nftables on a fake kernel."""

    def __init__(self, kernel: FakeKernel, socket: FakeNetlink | None = None) -> None:
        self._kernel, self._socket = kernel, socket

    def _once(self, text: str, *, dry_run: bool, flags: int = 0, debug: int = 0) -> str:
        assert not debug  # noqa: S101 # no text is compiled
        try:
            if text.startswith("list table "):
                return self._listed(*text.removeprefix("list table ").split())
            commands = faketext.commands(text)
            asking = self._socket or self
            self._kernel.transact(lambda draft: draft.run(commands), lambda: text, asking, dry_run=dry_run)
        except SyntaxFault as error:
            raise KernelError(f"nft: {error}") from None
        except OSError as error:
            raise KernelError(f"nft: Error: Could not process rule: {error.strerror}") from None
        return ""

    def _listed(self, family: str, name: str) -> str:
        table = faketext.key(family, name)
        if table not in self._kernel.tables:
            refuse(errno.ENOENT)
        lines = [f"table {family} {name} {{"]
        for chain, found in self._kernel.tables[table].chains.items():
            lines += [f"\tchain {chain} {{", *(f"\t\t{rule}" for rule in found.rules), "\t}"]
        return "\n".join([*lines, "}"]) + "\n"


class FakeNetlink(NfNetlink):
    """A socket to a fake kernel."""

    def __init__(self, kernel: FakeKernel) -> None:
        self._kernel = kernel

    def close(self) -> None:
        """See `NfNetlink`."""
        self._kernel.release(self)

    def generation(self) -> int:
        """See `NfNetlink`."""
        return self._kernel.generation

    def owned_table(self, table: str) -> str | None:
        """See `NfNetlink`."""
        found = self._table(table)
        return None if found is None or found.owner is None else found.comment

    def sets(self, table: str) -> set[str]:
        """See `NfNetlink`."""
        found = self._table(table)
        return set() if found is None else set(found.sets)

    def hooks(self, table: str) -> dict[str, tuple[int, int]]:
        """See `NfNetlink`."""
        found = self._table(table)
        chains = {} if found is None else found.chains
        return {name: chain.base[1:] for name, chain in chains.items() if chain.base is not None}

    def chains(self) -> Iterator[Chain]:
        """See `NfNetlink`."""
        self._permit()
        for key, found in [*self._kernel.tables.items()]:
            family = nf.NFPROTO_BRIDGE if key.startswith("bridge ") else nf.NFPROTO_INET
            for name, chain in found.chains.items():
                if chain.base is not None:
                    yield Chain(family, key.removeprefix("bridge "), name, *chain.base)

    def expressions(self, holding: tuple[bytes, ...]) -> Iterator[Expression]:
        """None, since rules are opaque here."""
        yield from ()

    def rules_on(self, table: str, chain: str, set_: str) -> list[int]:
        """See `NfNetlink`."""
        found = self._table(table)
        if found is None or chain not in found.chains:
            refuse(errno.ENOENT)
        return [handle(rule) for rule in found.chains[chain].rules if re.search(rf"@{set_}\b", rule)]

    def counters(self, table: str) -> dict[str, int]:
        """See `NfNetlink`."""
        found = self._table(table)
        return {} if found is None else {**found.counters}

    def limits(self, table: str) -> list[str]:
        """See `NfNetlink`."""
        found = self._table(table)
        return [] if found is None else [*found.limits]

    def elements(self, table: str, set_: str) -> list[SetElement]:
        """See `NfNetlink`."""
        return self._kernel.read(self._key(table), set_)

    def rows(self, table: str, set_: str) -> list[SetRow]:
        """See `NfNetlink`."""
        return [element[:3] for element in self._kernel.read(self._key(table), set_)]

    def element(self, table: str, set_: str, key: bytes) -> SetElement | None:
        """See `NfNetlink`."""
        found = self._table(table)
        if found is None or set_ not in found.sets:
            return None
        return next((one for one in self._kernel.read(self._key(table), set_) if one.key == key), None)

    def fingerprint(self, table: str, fixed_sets: tuple[str, ...]) -> bytes | None:
        """See `NfNetlink`."""
        found = self._table(table)
        if found is None or not set(fixed_sets) <= set(found.sets):
            return None
        what = [
            found.flags,
            sorted((name, chain.base, chain.rules) for name, chain in found.chains.items()),
            sorted((name, set_.definition) for name, set_ in found.sets.items()),
            [(name, sorted(found.sets[name].elements)) for name in fixed_sets],
        ]
        return blake2b(repr(what).encode(), digest_size=16).digest()

    def expect(self, messages: int) -> None:
        """See `NfNetlink`. The fake has room for all reports."""

    def commit(
        self, messages: Iterable[tuple[int, bytes]], *, dry_run: bool = False, reported: Container[int] = ()
    ) -> list[bytes]:
        """See `NfNetlink`."""
        found, reports = list(messages), list[bytes]()

        def work(draft: Draft) -> None:
            for place, (kind, body) in enumerate(found):
                if place in reported:
                    reports.extend(reports_of(draft, self._key(TABLE), body))
                self._do(draft, kind, body)

        self._kernel.transact(work, lambda: tuple(read(found)), self._first or self, dry_run=dry_run)
        return reports

    def _do(self, draft: Draft, kind: int, body: bytes) -> None:
        attributes = dict(attributes_of(body))
        table = self._key(text_of(attributes[nf.NFTA_TABLE_NAME]))  # the same attribute in all messages
        match kind:
            case nf.NFT_MSG_NEWTABLE:
                owned = attributes.get(nf.NFTA_TABLE_FLAGS) == struct.pack(">I", nf.NFT_TABLE_F_OWNER)
                comment = text_of(attributes.get(nf.NFTA_TABLE_USERDATA, b"")[2:])
                draft.add_table(table, "owner" if owned else "", comment)
            case nf.NFT_MSG_DELTABLE:
                draft.delete_table(table)
            case nf.NFT_MSG_NEWCHAIN:
                draft.add_chain(table, text_of(attributes[nf.NFTA_CHAIN_NAME]))
            case nf.NFT_MSG_NEWRULE if b"NFQUEUE" in attributes[nf.NFTA_RULE_EXPRESSIONS]:
                if not self._kernel.xtables:
                    refuse(errno.ENOENT)
                chain, target = text_of(attributes[nf.NFTA_RULE_CHAIN]), attributes[nf.NFTA_RULE_EXPRESSIONS]
                draft.insert_rule(table, chain, f"xtables {target.hex()}")
            case _:
                draft.change(table, change_of(kind, attributes))

    def _table(self, name: str) -> FakeTable | None:
        self._permit()
        return self._kernel.tables.get(self._key(name))

    def _key(self, name: str) -> str:
        return faketext.key(self.table.family, name)

    def _permit(self) -> None:
        if not self._kernel.permitted:
            refuse(errno.EPERM)
