"""A portward.toml with every key, its default, and a line that explains it.

    python -m portward.config.template > systemd/portward.toml

The defaults come from `config.keys`. A key without a line here raises KeyError, so none can be forgotten.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any, Final

import msgspec

from portward.config.keys import Config
from portward.config.store_url import FORMS

# The keys without a default: names that many gateways use.
_EXAMPLES: Final = {"segments": ["vni*"], "uplinks": ["eth0"]}

_HEAD: Final = """\
# The configuration of portward. Every key but `segments` and `uplinks` shows its default and may be left out.
# `portward check` reads it; `systemctl reload portward` puts it in force, or, where it is wrong, keeps the old.
# `store`, `table`, [queue] and [metrics] take a restart. Paths are relative to the folder of this file.
"""

_WHAT: Final = {
    "segments": "tenant-facing interfaces, one for each virtual network; '*' only at the end of a name",
    "uplinks": "interfaces towards the Internet: what comes in there is never judged",
    "store": f"where policy is kept: {FORMS}",
    "table": "folder of the cached policy: a restart enforces it at once, also without the store",
    "preset": "the published policy, see `portward policy list`, or the path of your own",
    "mode": '"enforce", or "observe": every verdict is worked out and counted, every packet passes',
    "on_agent_down": 'unknown sources while no agent runs: "closed", they are dropped, or "open", they pass',
    "max_flip_share": "a change that flips more of all subscriptions waits for `portward apply --confirm`",
    "queue": "The way of unremembered sources to the workers; rates are in packets a second.",
    "queue.first": "number of the first worker's queue; other programs must not use these numbers",
    "queue.workers": "worker processes, each with a queue and at most a core of its own",
    "queue.length": "packets that may wait for one worker; beyond it the kernel drops",
    "queue.reader": '"batch", or "netfilterqueue": one packet at a time, through that library',
    "queue.segment_rate": "unremembered packets a second that one segment may ask about",
    "queue.segment_burst": "so many of them at once",
    "queue.segment_committed": "of these a second each segment is answered whatever the others do",
    "queue.rate": "unremembered packets a second of all segments together",
    "queue.burst": "so many of them at once",
    "queue.source_resets": 'with refuse_with = "reject": resets a second for a source, beyond it silence',
    "queue.segment_resets": "resets a second for all sources of one segment",
    "queue.resets": "resets a second for all segments together; each takes a worker some 0.1 ms",
    "verdicts": "How a source is refused, and what the kernel remembers.",
    "verdicts.refuse_with": '"drop", or "reject": a TCP reset, on the interface that the packet came from',
    "verdicts.observe": "segments that are only observed, by name as above",
    "verdicts.allow_seconds": "how long the kernel remembers who may send; a change of policy ends it at once",
    "verdicts.deny_seconds": "how long it remembers who may not",
    "verdicts.unknown_seconds": "how long it remembers sources of no known subscription",
    "verdicts.sources": "sources remembered, for each verdict and address family",
    "verdicts.segment_sources": "a segment's share of them; what goes beyond is acted on and not remembered",
    "verdicts.unknown_sources": "sources of no known subscription that are remembered",
    "tunnels": "Packets from segments to tunnels that end on this host. VXLAN, GRE, L2TP and such: dropped.",
    "tunnels.encrypted": 'IPsec and WireGuard, which prove who sends: "pass", or "drop"',
    "tunnels.ports": "UDP ports of further tunnels, which portward cannot find: a program's, or a namespace's",
    "metrics": "For Prometheus.",
    "metrics.address": 'ADDRESS:PORT, ":PORT" for all addresses, "" for none; other hosts take IPAddressAllow=',
    "metrics.subscriptions": "also count by subscription",
    "exemptions": "What is asked before a person decides a request for review.",
    "exemptions.check": "a program with its arguments that looks at each (see exemptions.md); none: no check",
    "exemptions.check_seconds": "what it may take; longer means that a person has to look",
}


def template() -> str:
    """The text of the file."""
    settings = msgspec.to_builtins(Config(segments=("_",), uplinks=("_",)), enc_hook=str) | _EXAMPLES
    return _HEAD + "".join(_lines(settings, ""))


def _lines(settings: dict[str, Any], prefix: str) -> Iterator[str]:
    tables = {name: value for name, value in settings.items() if isinstance(value, dict)}
    for name, value in settings.items():
        if name not in tables:
            # JSON writes strings, numbers, lists and booleans as TOML does.
            yield f"\n# {_WHAT[prefix + name]}\n{name} = {json.dumps(value)}\n"
    for name, table in tables.items():
        yield f"\n\n# {_WHAT[name]}\n[{name}]\n"
        yield from _lines(table, f"{name}.")


if __name__ == "__main__":
    sys.stdout.write(template())
