"""`portward diagnose`: what blocks an account and each of its machines, and the exact next step.

Invariants: texts are in the requested language; the codes of reasons and steps never change. A diagnosis
says what it does not know, and why. It changes nothing.

In reading order:

- `facts`: everything that is known of the account, as values (pure)
- `outcome`: whether what happens on this host is what the policy says (pure)
- `advice`: facts → matters, each with the ways to a solution (pure)
- `answer`: the diagnosis as one value for programs, and as lines for the support engineer (pure)
- `letter`: the text for the customer (pure)
- `gather`: finds the account and gathers the facts; `diagnose` is the entry point
- `accounts`: accounts from the running agent's table, or from the store
- `host_view`: what this host does now to each machine
- `recent_drops`: what the kernel has dropped within about the last minute
- `agent_counts`: what the agents have counted, from the metrics
- `suggestion`: what an operator probably meant by a word that names no subscription
"""
