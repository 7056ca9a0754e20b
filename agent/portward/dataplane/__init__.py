"""The daemon's work on the kernel of one network namespace.

Responsible for the rulesets in the tables `inet portward` and `bridge portward`, the cached verdicts and rate
limits in them, and all that is read from the kernel: counters, interfaces, tunnels, rules of other programs,
queues.

Invariants:
- Only the kernel thread of the daemon writes, over one netlink socket, and only with the namespace lock. Other
  threads and verbs read over sockets of their own.
- Each write is one transaction: all of it takes effect, or nothing. At each step a source that the policy denies
  stays blocked if the process dies right there.
- A change of policy first moves the epoch, so that no older verdict is cached any more, and then deletes what is
  cached.
- Modules marked *pure* do no I/O, also not through what they import.

Modules in reading order:
- `names`: the two tables, their sets, maps and base chains (pure). `ruleset`: configuration → nft text (pure).
  `queue_rules`, `bridgetext`: parts of that text (pure). `templates`: reads the shipped files.
- `desired`: what the kernel should hold (pure). `plane`: the entry point of the daemon, which keeps that up to
  date. `table_control`: all that writes one table. `sync`: the one way in which a table is brought in line.
  `reconciler`: loads the ruleset, and finds out if it was changed. `sources`: verdicts and rate limits of single
  sources. `pending`: the changes that are on their way.
- `elements`: the changes of a transaction (pure). `verdict_cache`, `prefixes`, `gate`, `rate_limits`,
  `interface_sets`: cached verdicts, rate limits, what is known of interfaces (pure). `reach`: which of these a
  change of the policy table reaches (pure).
- `accounting`: packets by segment, subscription and verdict (pure). `deletions`: what deleted elements had
  counted.
- `links`, `tunnels`, `stacking`: what stands around the ruleset (pure). `rtnetlink`, `genetlink`,
  `dumpsocket`, `others`, `surroundings`: find it out.
- `monitor`, `monitor_filter`: notices of changed rulesets. `selfcheck`: differences that were found. `loaded`,
  `queue_statistics`: what verbs read from the kernel.
- `nft`, `compiled`: libnftables. `nf_tables`, `setdump` (pure), `nfsocket`, `xtables`, `namespacelock`:
  nf_tables over netlink. `nfnetlink`: its requests, and the kernel behind `elements`.
- `fake`, `faketables`, `fakemessages`, `faketext`: a fake kernel for tests without root.
"""
