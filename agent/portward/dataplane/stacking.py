"""Devices that take a segment's packets before portward sees them under the segment's name. Pure.

A packet that comes in on a port of a bridge, or is meant for a macvlan, has that device as its input interface
when it reaches the ruleset, so it matches no segment. A VRF is no such device: the ruleset sees the packet with
the port's name first."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Set
from enum import StrEnum
from typing import Final, NamedTuple

from portward.base.interfaces import shown
from portward.config.keys import Config
from portward.dataplane.links import VRF, Device

_BRIDGE: Final = "bridge"
# Kinds whose devices give out the packets of their ports.
_WITH_PORTS: Final = frozenset((_BRIDGE, "bond", "team", "batadv"))
# Masters that take every packet of a port. A batadv takes only those of its own protocol.
_TAKES_ALL: Final = frozenset((_BRIDGE, "bond", "team", "openvswitch"))
# Its ports have one device as their master (ovs-system), and packets come out of any other one of this kind.
_OPEN_VSWITCH: Final = "openvswitch"


class Stacked(NamedTuple):
    """A device that takes packets of a segment."""

    device: Device
    segment: Device


class Fate(StrEnum):
    """What becomes of a segment's packets to a judged port. FREE: no device takes them. STOPPED: all are taken,
    and the ruleset of a running agent drops them, whoever sends. OBSERVED: the segment is only observed, and so
    they pass. UNCLEAR: devices take some of them, judge them by another name, or forward them past the ruleset."""

    FREE = "free"
    STOPPED = "stopped"
    OBSERVED = "observed"
    UNCLEAR = "unclear"


def stacked(devices: Iterable[Device], is_segment: Callable[[str], bool]) -> list[Stacked]:
    """Each device that takes packets of a segment, with each such segment. One that is itself a segment is judged
    under its own name and is left out; what stands on it is found from there."""
    devices = sorted(devices)
    above = _above(devices)
    return [
        Stacked(device, segment)
        for segment in devices
        if is_segment(segment.name)
        for device in sorted(_reached(segment, above))
        if not is_segment(device.name)
    ]


def enforced(found: Iterable[Stacked], config: Config) -> frozenset[int]:
    """The indexes of those devices whose packets must be stopped: all but those of observed segments alone."""
    return frozenset(one.device.ifindex for one in found if not config.observes(one.segment.name))


def known(devices: Iterable[Device], is_segment: Callable[[str], bool]) -> frozenset[int]:
    """The indexes of the interfaces, other than segments, of which it is clear whether they give out a segment's
    packets. Not clear is a device that still has no port: the first one may be a segment, and by the time that
    this shows, packets have come out. Neither is what stands on such a device (a VLAN), or has no other ports."""
    devices = list(devices)
    found = frozenset(device.ifindex for device in devices if not is_segment(device.name))
    clear, before = found, None
    while clear != before:
        before = clear
        masters = {device.master for device in devices if device.ifindex in clear or is_segment(device.name)}
        switched = any(device.kind == _OPEN_VSWITCH and device.ifindex in masters for device in devices)
        clear -= {device.ifindex for device in devices if _is_empty(device, masters, switched=switched)}
        unclear = found - clear
        clear -= {device.ifindex for device in devices if device.lower in unclear}
    return clear


def _is_empty(device: Device, masters: Set[int], *, switched: bool) -> bool:
    """Whether a device whose packets come out of its ports has none; `masters` have one."""
    if device.kind == _OPEN_VSWITCH:
        return not switched
    return device.kind in _WITH_PORTS and device.ifindex not in masters


def warnings(devices: Iterable[Device], config: Config) -> list[str]:
    """What an operator must know of these devices, a line each."""
    devices = list(devices)
    found = stacked(devices, config.segment)
    stopped = enforced(found, config)
    return [*(line for _, line in _bridged(devices, config)), *(_warning(one, config, stopped) for one in found)]


def concerning(devices: Iterable[Device], config: Config, segments: Set[str]) -> list[str]:
    """Those of the warnings that are about these segments; and which devices, segments themselves, take their
    packets."""
    devices = list(devices)
    bridged = [line for ports, line in _bridged(devices, config) if ports & segments]
    found = stacked(devices, config.segment)
    stopped = enforced(found, config)
    above = (one for one in found if one.segment.name in segments)
    other = [
        f"{one.kind} {shown(one.name)}, a segment itself, takes the packets of segment {shown(segment)}: those "
        f"are judged as sources of {shown(one.name)}"
        for segment in sorted(segments)
        for one in _segments_above(devices, config, segment)
    ]
    return [*bridged, *(_warning(one, config, stopped) for one in above), *other]


def _segments_above(devices: list[Device], config: Config, segment: str) -> list[Device]:
    """The devices above a segment that are segments themselves."""
    above = _above(devices)
    return sorted(
        device
        for one in devices
        if one.name == segment and config.segment(segment)
        for device in _reached(one, above)
        if config.segment(device.name)
    )


def fate(devices: Iterable[Device], config: Config, segment: str) -> Fate:
    """What the devices above a segment do to its packets."""
    devices = list(devices)
    all_found = stacked(devices, config.segment)
    found = [one for one in all_found if one.segment.name == segment]
    if any(segment in ports for ports, _ in _bridged(devices, config)):
        return Fate.UNCLEAR
    if _segments_above(devices, config, segment):
        return Fate.UNCLEAR
    if not found:
        return Fate.FREE
    stopped = enforced(all_found, config)
    if config.observes(segment) and not any(one.device.ifindex in stopped for one in found):
        return Fate.OBSERVED
    taken = any(one.device.ifindex == one.segment.master and one.device.kind in _TAKES_ALL for one in found)
    return Fate.STOPPED if taken and all(one.device.ifindex in stopped for one in found) else Fate.UNCLEAR


def is_bare(devices: Iterable[Device], segment: str) -> bool:
    """Whether nothing stands on a segment, as on most: then `concerning` has no line and its fate is FREE. That is
    found sooner than what devices above it do, which matters for an account with hundreds of segments."""
    devices = list(devices)
    found = {device.ifindex for device in devices if device.name == segment}
    return not any(one.lower in found or (one.master and one.ifindex in found) for one in devices)


def _warning(one: Stacked, config: Config, stopped: Set[int]) -> str:
    """`stopped` are the devices whose packets the ruleset drops."""
    name, segment = shown(one.device.name), shown(one.segment.name)
    begin = f"{one.device.kind} {name} takes the packets of segment {segment}"
    if config.observes(one.segment.name) and one.device.ifindex not in stopped:
        return f"{begin}, which is only observed: they pass, and are not counted"
    if config.uplink(one.device.name):
        return (
            f"{begin} and is an uplink: nothing that comes from it may reach a judged port beyond the segments, "
            f"until {segment} is taken off it"
        )
    return (
        f"{begin}: nothing that comes from it may reach a judged port, whoever sends it, until {segment} is taken "
        f"off it or {name} is one of `segments`"
    )


def _bridged(devices: list[Device], config: Config) -> Iterator[tuple[Set[str], str]]:
    """Bridges that can forward frames between a segment and an uplink, which never reach the ruleset: the names of
    the segments, and the warning."""
    members: dict[int, list[Device]] = {}
    for device in devices:
        members.setdefault(device.master, []).append(device)
    for bridge in devices:
        if bridge.kind not in (_BRIDGE, _OPEN_VSWITCH):
            continue
        ports = members.get(bridge.ifindex, [])
        names = {port.name for port in ports if config.segment(port.name)}
        segments = sorted(map(shown, names))
        uplinks = sorted(shown(port.name) for port in ports if config.uplink(port.name))
        if segments and uplinks:
            line = (
                f"bridge {shown(bridge.name)} forwards frames between segment {', '.join(segments)} and uplink "
                f"{', '.join(uplinks)} past this host's IP stack: PORT 25 IS OPEN THERE"
            )
            yield names, line


def _above(devices: list[Device]) -> dict[int, set[Device]]:
    """For each index the devices that take its packets, each with the next step only."""
    known = {device.ifindex: device for device in devices}
    switches = {device for device in devices if device.kind == _OPEN_VSWITCH}
    above: dict[int, set[Device]] = {}
    for device in devices:
        if device.lower and device.kind != VRF:
            above.setdefault(device.lower, set()).add(device)
        master = known.get(device.master)
        if master is not None and master.kind != VRF:
            above.setdefault(device.ifindex, set()).add(master)
            if device.peer in known:  # what a bridge sends out of one end of a pair comes in at the other
                above.setdefault(master.ifindex, set()).add(known[device.peer])
            if master.kind == _OPEN_VSWITCH:
                above[device.ifindex] |= switches
    return above


def _reached(segment: Device, above: dict[int, set[Device]]) -> set[Device]:
    """All devices above a segment."""
    found: set[Device] = set()
    ahead = [segment]
    while ahead:
        new = above.get(ahead.pop().ifindex, set()) - found - {segment}
        found |= new
        ahead += new
    return found
