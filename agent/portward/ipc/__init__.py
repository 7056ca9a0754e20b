"""The formats that daemon, workers and custodian share. All import this room, and none imports the others'.

This always holds: each shared layout has explicit numbers, and a change of it raises a version, because an upgrade
lets an old daemon start a new worker.

- `mark`: verdicts, and the bits of the packet mark that carry them
- `counters`: the block of counters in shared memory
- `lines`: the lines that a worker writes to the daemon
- `probe`: the self-check's question to a worker
- `custody`: how the daemon finds the custodian of its table, and what they say
"""
