"""The policy table: every decision of the policy, ready for a lookup, in an LMDB file beside the agent.

What always holds here: each change is one transaction, so a reader sees the table before or after it, never
between. An entry is the decision of `policy.decide` on the records of the same transaction. A row that cannot be
read denies the one source that it is about. `invariants` lists what holds between two transactions, and checks it.

In reading order:

- `layout`: keys, values and rows as bytes
- `database`: the LMDB file, its transactions and its rows
- `reader`: a lookup, as the worker does it
- `account`: subscription and exemption in the table, and how they decide entries
- `commits`: what a transaction has changed
- `edit`: one write transaction; `accounts`, `lengths`, `segments`: its parts; `load`: filling an empty table
- `writer`: the daemon's transactions, and what each has changed
- `follower`: the table follows the store; `changes`: what the store's changes say; `history`: is it the same
history
- `denials`: what may pass a held change
- `invariants`, `damage`: checking a table, and what cannot be read
"""
