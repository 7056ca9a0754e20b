"""The cost of a packet with a cached verdict, and of one that does not go to port 25.

The real agent's ruleset runs beside rulesets that an operator might write by hand, each on a gateway of its own
(`lanes.py`). The agent's kernel has cached a thousand sources from their own packets.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import date
from ipaddress import ip_address, ip_network
from pathlib import Path
from uuid import uuid4

from bench import flood, lanes
from bench.figures import Figure
from bench.lanes import SEGMENT, Lane, Rates, ratio
from kernel.conftest import ALLOWED, DENIED
from portward.lab.agent import Agent, until
from portward.model import Attachment, Subscription

SOURCES = 1_000
_PREFIXES = {DENIED: ("10.1.0.0/16", "2001:db8:1001:1::/64"), ALLOWED: ("10.2.0.0/16", "2001:db8:1001:2::/64")}
_HOOK = "type filter hook {} priority {}; policy accept;"
_SCREEN = _HOOK.format("prerouting", "raw - 2")  # where portward's own screen stands
_FORWARD = _HOOK.format("forward", "filter")
# At least one slice of each lane in half a second; the more rounds, the less the noise of the machine.
_ROUNDS = 400


def measure(folder: Path, rounds: int = _ROUNDS) -> Iterator[Figure]:
    """The ratios `cached_deny_…`, `cached_allow_…` and `bystander_…`."""
    with ExitStack() as stack:
        ours = stack.enter_context(portward(folder))
        by_hand = {name: stack.enter_context(Lane(ruleset)) for name, ruleset in _rulesets().items()}

        def race(*names: str, offer: str, port: int = 25, family: int = 4) -> Rates:
            packets = lanes.frames(folder / "frames", sources(offer, SOURCES, family), port, family=family)
            chosen = {"portward": ours} | {name: by_hand[name] for name in names}
            return lanes.race(folder, chosen, packets, rounds=rounds)

        for family in (4, 6):
            suffix = "" if family == 4 else "_ipv6"
            rates = race(
                "at the door", "static", f"set{family}", f"forward set{family}", offer=DENIED, family=family
            )
            goals = (">= 0.87", ">= 0.96", ">= 1.25") if family == 4 else ("", "", "")
            yield ratio(f"static_drop_vs_generator{suffix}", rates, "static", "at the door")
            yield ratio(f"cached_deny_vs_static{suffix}", rates, "portward", "static", goals[0])
            yield ratio(f"cached_deny_vs_set{suffix}", rates, "portward", f"set{family}", goals[1])
            yield ratio(f"cached_deny_vs_forward_set{suffix}", rates, "portward", f"forward set{family}", goals[2])
            rates = race("empty", "static accept", f"one lookup{family}", offer=ALLOWED, family=family)
            goal = ">= 0.88" if family == 4 else ""
            yield ratio(f"cached_allow_vs_empty{suffix}", rates, "portward", "empty", goal)
            yield ratio(f"static_accept_vs_empty{suffix}", rates, "static accept", "empty")
            yield ratio(f"one_lookup_vs_empty{suffix}", rates, f"one lookup{family}", "empty")
            rates = race("empty", "never matches", offer=ALLOWED, port=443, family=family)
            yield ratio(f"bystander_vs_static_rule{suffix}", rates, "portward", "never matches", ">= 0.97")
            yield ratio(f"bystander_vs_empty{suffix}", rates, "portward", "empty")


def sources(offer: str, count: int, family: int = 4) -> Iterator[bytes]:
    """The first addresses of the prefix whose subscription has this offer."""
    network = ip_network(_PREFIXES[offer][0 if family == 4 else 1])
    first = int(network.network_address) + 256
    return (ip_address(first + number).packed for number in range(count))


@contextmanager
def portward(folder: Path) -> Iterator[Lane]:
    """A lane with the real agent, whose kernel has cached a thousand sources of each offer and family."""
    with Lane() as lane:
        agent = Agent(
            lane, folder, segments=[SEGMENT],
            verdicts={"allow_seconds": 3600, "deny_seconds": 3600, "segment_sources": 65536},
        )  # fmt: skip
        records: list[Subscription | Attachment] = []
        for offer, prefixes in _PREFIXES.items():
            id_ = uuid4()
            records.append(Subscription(id=id_, offer=offer, created=date(2022, 6, 30)))
            records += [
                Attachment(segment=SEGMENT, address=ip_network(prefix), subscription=id_) for prefix in prefixes
            ]
        agent.apply(*records)
        agent.start()
        try:
            for offer in _PREFIXES:
                for family in (4, 6):
                    _cache(lane, folder, offer, family)
            want = {"allow": 2 * SOURCES, "deny": 2 * SOURCES}

            def cached() -> dict[str, float]:
                metrics = agent.metrics()
                return {name: metrics.get(f'portward_remembered_sources{{verdict="{name}"}}', 0) for name in want}

            until(lambda: cached() == want, f"the kernel has cached {want}", seconds=20)
            yield lane
        finally:
            agent.stop()


def _cache(lane: Lane, folder: Path, offer: str, family: int) -> None:
    """Sends one packet of each source, slowly enough for the worker to give each its verdict."""
    packets = lanes.frames(folder / "cached", sources(offer, SOURCES, family), 25, family=family)
    flood.run(lane.tenant, flood.build(folder), packets, dev="eth0", pps=2_000, count=SOURCES)


def _rulesets() -> dict[str, str]:
    """Rulesets that an operator might write by hand, by name."""
    found = {
        "empty": "",
        # Nothing but the generator and the link, to show how much of the other rates is not due to the ruleset.
        "at the door": (
            f"table netdev door {{ chain c {{ type filter hook ingress device {SEGMENT} priority 0; "
            "policy drop; }; }\n"
        ),
        "static": _chain(_SCREEN, "tcp dport 25 counter drop"),
        "static accept": _chain(_SCREEN, "tcp dport 25 counter accept"),
        "never matches": _chain(_SCREEN, "tcp dport 26 counter drop"),
    }
    for family, key, match in ((4, "ipv4_addr", "ip saddr"), (6, "ipv6_addr", "ip6 saddr")):
        elements = ", ".join(str(ip_address(source)) for source in sources(DENIED, SOURCES, family))
        blocked = f"set blocked {{ type {key}; counter; elements = {{ {elements} }}; }}; "
        for name, hook in (("set", _SCREEN), ("forward set", _FORWARD)):
            found[f"{name}{family}"] = _chain(hook, f"tcp dport 25 {match} @blocked drop", blocked)
        # The least that cached verdicts can cost: a set that packets may fill, with its counters, and no other
        # rule.
        entries = ", ".join(f"{SEGMENT} . {ip_address(source)}" for source in sources(ALLOWED, SOURCES, family))
        allowed = (
            f"set allowed {{ typeof iif . {match}; flags dynamic,timeout; timeout 1h; size 262144; counter; "
            f"elements = {{ {entries} }}; }}; "
        )
        found[f"one lookup{family}"] = _chain(_SCREEN, f"tcp dport 25 iif . {match} @allowed accept", allowed)
    return found


def _chain(hook: str, rule: str, sets: str = "") -> str:
    return f"table inet byhand {{ {sets}chain c {{ {hook} {rule}; }}; }}\n"
