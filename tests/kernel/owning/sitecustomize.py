"""Lets the agent own its table on a host whose nft is older than 1.1, because the kernel alone decides that: the
flags are in messages of the agent's own. Python imports this at its start if PYTHONPATH names this folder."""

from portward.dataplane import tableowner

tableowner._old_nft = lambda: ""
# A text that every libnftables takes.
tableowner._PROBE = "table inet portward_probe { }\n"  # type: ignore[misc] # for the test
