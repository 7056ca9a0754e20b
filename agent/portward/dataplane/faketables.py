"""The tables of the fake kernel (`fake`), and what a transaction does to them. Pure.

Every refusal is an OSError with the errno of the kernel.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from math import inf
from typing import NamedTuple, NoReturn
from zlib import crc32

from portward.dataplane import faketext
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
)
from portward.dataplane.faketext import Base, Command


def refuse(number: int) -> NoReturn:
    """Raises OSError with this errno. `fake` adds the kernel's text."""
    raise OSError(number, "")


def handle(rule: str) -> int:
    """The handle of a rule. Equal rules share a handle in the fake."""
    return crc32(rule.encode())


class FakeElement(NamedTuple):
    """An element: its expiry by the fake's clock in seconds, packets counted, and the object that a map
    assigns."""

    expires: float = inf
    packets: int = 0
    object: str = ""


@dataclass
class FakeSet:
    """A set, or a map of limits."""

    definition: str
    size: int
    timeout_ms: int
    elements: dict[bytes, FakeElement] = field(default_factory=dict)


@dataclass
class FakeChain:
    """A chain: type, hook and priority if it is a base chain, and its rules."""

    base: Base | None = None
    rules: list[str] = field(default_factory=list)


@dataclass
class FakeTable:
    """A table."""

    flags: str = ""
    owner: object = None
    comment: str = ""
    chains: dict[str, FakeChain] = field(default_factory=dict)
    sets: dict[str, FakeSet] = field(default_factory=dict)
    limits: dict[str, tuple[int, int]] = field(default_factory=dict)
    counters: dict[str, int] = field(default_factory=dict)

    def copy(self) -> FakeTable:
        """A copy that shares nothing with this table."""
        return replace(
            self,
            chains={name: replace(chain, rules=[*chain.rules]) for name, chain in self.chains.items()},
            sets={name: replace(set_, elements={**set_.elements}) for name, set_ in self.sets.items()},
            limits={**self.limits},
            counters={**self.counters},
        )

    def uses(self, what: str) -> bool:
        """Whether a rule matches this pattern: a set (`@name`), or a jump to a chain."""
        named = re.compile(rf"{what}(?![\w])")
        return any(named.search(rule) for chain in self.chains.values() for rule in chain.rules)


class Draft:
    """A copy of the tables that a transaction changes. Methods name a table by its key (`faketext.key`)."""

    def __init__(
        self, tables: dict[str, FakeTable], now: float, socket: object, *, native: bool, bridge: bool = True
    ) -> None:
        """`now` is the fake's clock in seconds, `socket` the one that makes the transaction. `native`: a rule may
        have the statement `queue`. `bridge`: a table of family bridge may have base chains."""
        self.tables = {name: table.copy() for name, table in tables.items()}
        self._now, self._socket, self._native, self._bridge = now, socket, native, bridge
        # Whether anything has changed. If not, the generation stays.
        self.touched = False

    def table(self, name: str) -> FakeTable:
        """A table to change. Raises OSError if it is missing, or if it belongs to another socket."""
        if name not in self.tables:
            refuse(errno.ENOENT)
        found = self.tables[name]
        if found.owner is not None and found.owner is not self._socket:
            refuse(errno.EPERM)
        return found

    def set(self, table: str, name: str) -> FakeSet:
        """A set to change. Raises OSError."""
        sets = self.table(table).sets
        if name not in sets:
            refuse(errno.ENOENT)
        return sets[name]

    def add_table(self, name: str, flags: str = "", comment: str = "") -> None:
        """Makes a table. One with the same ownership may exist already."""
        if name in self.tables:
            found = self.table(name)
            if ("owner" in found.flags) != ("owner" in flags):
                refuse(errno.EOPNOTSUPP)
            self.touched |= found.flags != flags
            found.flags = flags
            return
        owner = (self._socket or object()) if "owner" in flags else None
        self.tables[name] = FakeTable(flags, owner, comment)
        self.touched = True

    def delete_table(self, name: str) -> None:
        """Deletes a table with all its objects."""
        self.table(name)
        del self.tables[name]
        self.touched = True

    def add_chain(self, table: str, chain: str, base: Base | None = None) -> None:
        """Makes a chain. One with the same type, hook and priority may exist already."""
        chains = self.table(table).chains
        if base is not None and chain in chains and chains[chain].base != base:
            refuse(errno.EOPNOTSUPP)
        if base is not None and not self._bridge and table.startswith("bridge "):
            refuse(errno.ENOENT)
        chains.setdefault(chain, FakeChain(base))
        self.touched = True  # the kernel counts a chain that exists as updated

    def add_rule(self, table: str, chain: str, rule: str) -> None:
        """Puts a rule at the end of a chain."""
        if chain not in self.table(table).chains or (not self._native and " queue " in f" {rule} "):
            refuse(errno.ENOENT)
        self.table(table).chains[chain].rules.append(rule)
        self.touched = True

    def insert_rule(self, table: str, chain: str, rule: str) -> None:
        """Puts a rule at the head of a chain."""
        self.add_rule(table, chain, rule)
        rules = self.table(table).chains[chain].rules
        rules.insert(0, rules.pop())

    def _insert_goto(self, table: str, rule: InsertRule) -> None:
        found = self.table(table)
        if rule.chain not in found.chains or rule.set not in found.sets or rule.target not in found.chains:
            refuse(errno.ENOENT)
        self.insert_rule(table, rule.chain, f"iif @{rule.set} goto {rule.target}")

    def _delete_rule(self, table: str, rule: DeleteRule) -> None:
        chains = self.table(table).chains
        rules = chains[rule.chain].rules if rule.chain in chains else []
        found = next((one for one in rules if handle(one) == rule.handle), None)
        if found is None:
            refuse(errno.ENOENT)
        rules.remove(found)
        self.touched = True

    def change(self, table: str, change: Change) -> None:
        """Makes one change of elements, limits or rules."""
        match change:
            case Add(set_, keys):
                for key in keys:
                    self._add(self.set(table, set_), key, "")
            case Draw(map_, limits):
                for key, limit in limits.items():
                    if limit not in self.table(table).limits:
                        refuse(errno.ENOENT)
                    self._add(self.set(table, map_), key, limit)
            case Delete(set_, keys):
                for key in keys:
                    self._delete(self.set(table, set_), key)
            case Flush(set_):
                found = self.set(table, set_)
                self.touched |= bool(found.elements)
                found.elements.clear()
            case AddLimit(name, per_minute, burst):
                limits_ = self.table(table).limits
                self.touched |= name not in limits_
                limits_.setdefault(name, (per_minute, burst))
            case DeleteLimit(name):
                self._delete_limit(self.table(table), name)
            case InsertRule():
                self._insert_goto(table, change)
            case DeleteRule():
                self._delete_rule(table, change)

    def _add(self, set_: FakeSet, key: bytes, limit: str) -> None:
        before = set_.elements.get(key)
        if before is not None and before.expires > self._now:
            if before.object != limit:
                refuse(errno.EEXIST)
            return
        if before is None and set_.size and len(set_.elements) >= set_.size:
            refuse(errno.ENFILE)
        expires = self._now + set_.timeout_ms / 1000 if set_.timeout_ms else inf
        set_.elements[key] = FakeElement(expires, 0, limit)
        self.touched = True

    def _delete(self, set_: FakeSet, key: bytes) -> None:
        if key not in set_.elements or set_.elements[key].expires <= self._now:
            refuse(errno.ENOENT)
        del set_.elements[key]
        self.touched = True

    def _delete_limit(self, table: FakeTable, name: str) -> None:
        if name not in table.limits:
            refuse(errno.ENOENT)
        if any(entry.object == name for set_ in table.sets.values() for entry in set_.elements.values()):
            refuse(errno.EBUSY)
        del table.limits[name]
        self.touched = True

    # --- what nft's text does ---

    def run(self, commands: Iterable[Command]) -> None:
        """Runs the commands of a text in their order."""
        for command in commands:
            kind = {"map": "set", "insert": "rule"}.get(command.kind, command.kind)
            getattr(self, f"_{command.verb}_{kind}")(command)

    def _flush_ruleset(self, _: Command) -> None:
        kept = {name: table for name, table in self.tables.items() if table.owner not in (None, self._socket)}
        self.touched |= len(kept) != len(self.tables)
        self.tables = kept

    def _add_table(self, command: Command) -> None:
        flags = "owner" if "owner" in command.body else "dormant" if "dormant" in command.body else ""
        self.add_table(command.table, flags)

    def _create_table(self, command: Command) -> None:
        if command.table in self.tables:
            refuse(errno.EEXIST)
        self._add_table(command)

    def _delete_table(self, command: Command) -> None:
        self.delete_table(command.table)

    def _flush_table(self, command: Command) -> None:
        for chain in self.table(command.table).chains.values():
            self.touched |= bool(chain.rules)
            chain.rules.clear()

    def _add_chain(self, command: Command) -> None:
        self.add_chain(command.table, command.name, faketext.base(command.body))
        for rule in faketext.rules_of(command.body):
            self.add_rule(command.table, command.name, rule)

    def _delete_chain(self, command: Command) -> None:
        table = self.table(command.table)
        if command.name not in table.chains:
            refuse(errno.ENOENT)
        if table.uses(rf"(?:goto|jump) {command.name}"):
            refuse(errno.EBUSY)
        del table.chains[command.name]
        self.touched = True

    def _flush_chain(self, command: Command) -> None:
        chains = self.table(command.table).chains
        if command.name not in chains:
            refuse(errno.ENOENT)
        self.touched |= bool(chains[command.name].rules)
        chains[command.name].rules.clear()

    def _add_rule(self, command: Command) -> None:
        self.add_rule(command.table, command.name, command.body)

    def _insert_rule(self, command: Command) -> None:
        self.insert_rule(command.table, command.name, command.body)

    def _add_set(self, command: Command) -> None:
        sets, wanted = self.table(command.table).sets, faketext.set_definition(command.body)
        if command.name in sets and _kind(sets[command.name].definition) != _kind(wanted.text):
            refuse(errno.EEXIST)
        self.touched |= command.name not in sets
        sets.setdefault(command.name, FakeSet(wanted.text, wanted.size, wanted.timeout_ms))
        self.change(command.table, Add(command.name, wanted.keys))

    def _delete_set(self, command: Command) -> None:
        self.set(command.table, command.name)
        if self.table(command.table).uses(f"@{command.name}"):
            refuse(errno.EBUSY)
        del self.table(command.table).sets[command.name]
        self.touched = True

    def _flush_set(self, command: Command) -> None:
        self.change(command.table, Flush(command.name))

    def _add_element(self, command: Command) -> None:
        self.change(command.table, Add(command.name, tuple(faketext.keys(command.body))))

    def _delete_element(self, command: Command) -> None:
        self.change(command.table, Delete(command.name, tuple(faketext.keys(command.body))))

    def _add_counter(self, command: Command) -> None:
        counters = self.table(command.table).counters
        self.touched |= command.name not in counters
        counters.setdefault(command.name, 0)


def _kind(definition: str) -> str:
    """The part of a definition that must be the same when a set is added again. An existing set keeps its size and
    timeout, and nft reports no error."""
    return re.sub(r"(size|timeout) \w+(; )?", "", definition)
