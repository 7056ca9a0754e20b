"""What stands around portward on its host and shapes the ruleset: tunnels, devices on top of segments, NAT rules.

The daemon finds these out, keeps them up to date, and loads the ruleset again when they change (`Core.surround`).
`portward rules baseline`, which runs without a daemon, finds them out once.
"""

from __future__ import annotations

from typing import Final, NamedTuple


class Surroundings(NamedTuple):
    """What the ruleset must take into account besides configuration and preset.

    `tunnel_ports` are the UDP ports at which tunnels end on this host, `encrypted_ports` those of WireGuard.
    `stacked` are the indexes of interfaces that take packets of an enforced segment before portward sees the
    segment's name (a bridge that the segment is a port of, a macvlan on top of it). `known` are the indexes of all
    interfaces beside the segments that are classified: mail from an interface that is neither a segment nor an
    uplink nor one of these is dropped, because a device that was put on a segment a moment ago is one. `guard`
    says whether the forward chain is needed that judges what others translated."""

    tunnel_ports: frozenset[int] = frozenset()
    encrypted_ports: frozenset[int] = frozenset()
    stacked: frozenset[int] = frozenset()
    known: frozenset[int] = frozenset()
    guard: bool = False


NOTHING: Final = Surroundings()
