"""The work of the command line's verbs: they read the agent's files, the store and the kernel, and report.

Invariants: a verb reports what happens on this host apart from what the policy says. If it cannot find out
something, it says so and why. Only `rules` changes the kernel, and no verb here writes the store or the table.

In reading order:

- `host_state`: what is known of this host, as values (pure)
- `host`: reads these values
- `effect`: host state + policy → what happens to the next packet (pure)
- `segment_interfaces`: the interfaces behind a segment
- `sources`: a source as an operator names it
- `explanation`: `portward explain`
- `diagnosis`: `portward diagnose`
- `instances`: agents in named network namespaces, `--instance`
- `check`: `portward check`
- `rules`: `portward rules`
- `top_talkers`: `portward top`
- `audit`: `portward audit`
- `enforcement_waiter`: waits until the agent here enforces a revision
- `behind`: what the agent here has not taken from the store yet
- `mistyped`: segments of an inventory that are probably mistyped
"""
