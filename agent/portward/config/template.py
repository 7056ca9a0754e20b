"""A portward.toml with every key, its default, and a line that explains it.

    python -m portward.config.template > systemd/portward.toml

The defaults come from `config.keys`. A key without a line here raises KeyError, so none can be forgotten.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from typing import Any, Final

import msgspec

from portward.config.keys import Config
from portward.config.store_url import FORMS

# The keys without a default: names that many gateways use.
_EXAMPLES: Final = {"segments": ["vni*"], "uplinks": ["eth0"]}

# The tables that there may be several of. The file has one, as comments, because the default is none.
_GROUPS: Final = {"groups": {"name": "calico", "interfaces": ["cali*"]}}

_HEAD: Final = """\
# The configuration of portward. Every key but `segments` and `uplinks` shows its default and may be left out.
# `portward check` reads it; `systemctl reload portward` puts it in force, or, if it is wrong, keeps the old one.
# `store`, `table`, [queue] and [metrics] take a restart. Paths are relative to the folder of this file.
"""

_WHAT: Final = {
    "segments": "tenant-facing interfaces, one for each virtual network; '*' only at the end of a name",
    "uplinks": "interfaces towards the Internet: packets that come in there never get a verdict",
    "groups": "Interfaces that share one address space, as one segment: a table for each group.",
    "groups.name": "the name of the segment: no interface that is not in the group may have it",
    "groups.interfaces": "its interfaces, as in `segments`; none may be in two segments",
    "store": f"where policy is kept: {FORMS}",
    "table": "folder of the policy table: a restart enforces it at once, also without the store",
    "preset": "the published policy, see `portward policy list`, or the path of your own",
    "mode": '"enforce", or "observe": every verdict is decided and counted, and every packet passes',
    "on_agent_down": 'unknown sources while no agent runs: "closed", they are dropped, or "open", they pass',
    "max_flip_share": "a change that flips more of all subscriptions waits for `portward apply --confirm`",
    "queue": "How packets of sources without a cached verdict reach the workers; rates are in packets a second.",
    "queue.first": "number of the first worker's queue; other programs must not use these numbers",
    "queue.workers": "worker processes, each with a queue and at most a core of its own",
    "queue.length": "packets that may wait for one worker; beyond it the kernel drops",
    "queue.reader": '"batch", or "netfilterqueue": one packet at a time, through that library',
    "queue.segment_rate": "such packets a second from one segment",
    "queue.segment_burst": "such packets at once from one segment",
    "queue.segment_committed": "such packets a second that each segment gets, whatever the others send",
    "queue.rate": "such packets a second from all segments together",
    "queue.burst": "such packets at once from all segments together",
    "queue.source_resets": 'with refuse_with = "reject": resets a second for a source',
    "queue.segment_resets": "resets a second for all sources of one segment",
    "queue.resets": "resets a second for all segments together; each takes a worker some 0.1 ms",
    "verdicts": "How a source is refused, and which verdicts the kernel caches.",
    "verdicts.refuse_with": '"drop", or "reject": a TCP reset, on the interface that the packet came from',
    "verdicts.observe": "segments that are only observed, by name as above; a group by its name",
    "verdicts.allow_seconds": "how long the kernel caches that a source may send, unless the policy changes",
    "verdicts.deny_seconds": "how long it caches that a source may not send",
    "verdicts.unknown_seconds": "how long it caches that a source has no known subscription",
    "verdicts.sources": "cached sources for each verdict and address family",
    "verdicts.segment_sources": "a segment's share of them; verdicts beyond it are enforced, but not cached",
    "verdicts.unknown_sources": "cached sources without a known subscription",
    "tunnels": "Packets from segments to tunnels that end on this host. VXLAN, GRE, L2TP and such: dropped.",
    "tunnels.encrypted": 'IPsec and WireGuard, which prove who sends: "pass", or "drop"',
    "tunnels.ports": "UDP ports of further tunnels, which portward cannot find: a program's, or a namespace's",
    "bridge": "Frames from segments that are ports of a bridge of this host.",
    "bridge.unknown_frames": 'neither IP nor ARP, such as PPPoE or a second VLAN tag: "drop", or "pass" unseen',
    "metrics": "For Prometheus.",
    "metrics.address": 'ADDRESS:PORT, ":PORT" for all addresses, "" for none; other hosts take IPAddressAllow=',
    "metrics.subscriptions": "also count by subscription",
    "exemptions": "The check of a request for review, before a person decides.",
    "exemptions.check": "a program with its arguments that checks each (see exemptions.md); none: no check",
    "exemptions.check_seconds": "how long it may take; if it takes longer, only the person decides",
}


def template() -> str:
    """The text of the file."""
    settings = msgspec.to_builtins(Config(segments=("_",), uplinks=("_",)), enc_hook=str) | _EXAMPLES
    del settings["groups"]
    tables = {name: value for name, value in settings.items() if isinstance(value, dict)}
    main = {name: value for name, value in settings.items() if name not in tables}
    found = [_HEAD, *_keys(main, ""), *_tables(_GROUPS, "#[[{}]]", "#"), *_tables(tables, "[{}]", "")]
    return "".join(found)


def _keys(values: dict[str, Any], prefix: str, mark: str = "") -> Iterator[str]:
    """The keys of a table, whose names in `_WHAT` begin with `prefix`. `mark` is put before each."""
    for name, value in values.items():
        # JSON writes strings, numbers, lists and booleans as TOML does.
        yield f"\n# {_WHAT[prefix + name]}\n{mark}{name} = {json.dumps(value)}\n"


def _tables(tables: Mapping[str, dict[str, Any]], head: str, mark: str) -> Iterator[str]:
    """Tables with their keys. `head` is the line that begins a table, with its name for `{}`."""
    for name, values in tables.items():
        yield f"\n\n# {_WHAT[name]}\n{head.format(name)}\n"
        yield from _keys(values, f"{name}.", mark)


if __name__ == "__main__":
    sys.stdout.write(template())
