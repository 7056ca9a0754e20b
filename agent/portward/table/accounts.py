"""The accounts of one write transaction: found by number, given a number, written, removed."""

from __future__ import annotations

from uuid import UUID

from portward.model import Exemption
from portward.table import layout
from portward.table.account import Account
from portward.table.damage import Damage
from portward.table.database import Part, Rows, TableError, Transaction


class Accounts:
    """Subscriptions and exemptions, by the table's own number of the subscription (from 1 on)."""

    def __init__(self, transaction: Transaction, parts: dict[bytes, Part], damage: Damage) -> None:
        """`damage` takes the accounts that cannot be read."""
        self._transaction, self._part, self._damage = transaction, parts[b"accounts"], damage
        self._ids = Rows(transaction, parts[b"ids"])
        self._cached: dict[int, Account] = {}
        # Number → UUID, of subscriptions whose account cannot be read.
        self._uuids: dict[int, UUID] = {}
        # The numbers of subscriptions whose attachments must be decided again.
        self.dirty: set[int] = set()

    def numbers(self) -> list[int]:
        """The numbers of all accounts."""
        with self._transaction.cursor(self._part) as cursor:
            return [int.from_bytes(key, "big") for key in cursor.iternext(keys=True, values=False)]

    def find(self, number: int) -> Account | None:
        """The account with this number; None if there is none, or if it cannot be read."""
        account = self._cached.get(number)
        if account is None:
            data = self._transaction.get(layout.number(number), db=self._part)
            if data is None:
                return None
            try:
                account = self._cached[number] = Account.unpack(data)
            except layout.DamagedError as error:
                self._damage.found(f"account {number}: {error}; its sources are denied")
                return None
        return account

    def number_of(self, id_: UUID) -> int | None:
        """The number of the subscription with this UUID; None if it has none."""
        row = self._ids.find(id_.bytes)
        return None if row is None else int.from_bytes(row[len(id_.bytes) :], "big")

    def exemption(self, id_: UUID) -> Exemption | None:
        """The exemption of the subscription with this UUID."""
        number = self.number_of(id_)
        account = None if number is None else self.find(number)
        return None if account is None else account.exemption

    def uuid_of(self, number: int) -> UUID:
        """The UUID of the subscription with this number, also if its account cannot be read. If the number is not
        listed either, a UUID that no subscription has."""
        account = self.find(number)
        if account is not None:
            return account.id
        found = self._uuids.get(number)
        if found is None:
            # Searches all subscriptions, but only after a damage, and once for each number.
            end = layout.number(number)
            id_ = next((row[:16] for row in self._ids if row[16:] == end), b"\xff" * 12 + end)
            found = self._uuids[number] = UUID(bytes=id_)
        return found

    def number_for(self, uuid: UUID) -> int:
        """The number of a subscription, a new one if it has none. Raises TableError if all numbers are used."""
        number = self.number_of(uuid)
        if number is not None:
            account = self.find(number)
            if account is not None and account.id == uuid:
                return number
            self._damage.found(f"subscription {uuid} has no account that can be read; what it holds is denied")
            self.dirty.add(number)
            if account is None:
                # Fail closed: of the lost records only those that the store sends again are there.
                self.write(number, Account(uuid))
                return number
            # The number is another customer's: the new records must not be written into that account.
            self._ids.remove(uuid.bytes + layout.number(number))
        number = self._next_number()
        self._ids.put(uuid.bytes + layout.number(number))
        self.write(number, Account(uuid))
        return number

    def write(self, number: int, account: Account) -> None:
        """Writes an account."""
        self._cached[number] = account
        self._transaction.put(layout.number(number), account.pack(), db=self._part)

    def remove(self, number: int, account: Account) -> None:
        """Removes an account and its number."""
        self._ids.remove(account.id.bytes + layout.number(number))
        self._transaction.delete(layout.number(number), db=self._part)
        self._cached.pop(number, None)

    def _next_number(self) -> int:
        with self._transaction.cursor(self._part) as cursor:
            number = int.from_bytes(cursor.key(), "big") + 1 if cursor.last() else 1
        if number > layout.LAST_NUMBER:
            raise TableError("the policy table has no number left for another subscription")
        return number
