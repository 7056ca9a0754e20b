"""Devices that take a segment's packets before the ruleset sees them under the segment's name. Pure.

A packet that comes in on a port of a bridge, or is for a macvlan, has that device as its input interface when it
reaches the ruleset, so it matches no segment. A VRF is not such a device: the ruleset sees the packet with the
name of the port first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Set
from enum import StrEnum
from typing import Final, NamedTuple

from portward.base.interfaces import shown
from portward.config.keys import Config
from portward.dataplane.links import VRF, Device

_BRIDGE: Final = "bridge"
# Devices of these kinds send the packets of their ports under their own name.
_WITH_PORTS: Final = frozenset((_BRIDGE, "bond", "team", "batadv"))
# Masters that take every packet of a port. A batadv takes only packets of its own protocol.
_TAKES_ALL: Final = frozenset((_BRIDGE, "bond", "team", "openvswitch"))
# All ports have the same master (ovs-system), and their packets come out of any other device of this kind.
_OPEN_VSWITCH: Final = "openvswitch"


class Stacked(NamedTuple):
    """A device that takes packets of a segment, and the segment."""

    device: Device
    segment: Device


class Fate(StrEnum):
    """The fate of a segment's packets to a policy port. FREE: no device takes them. STOPPED: devices take all
    of them, and the ruleset of a running agent drops them, whatever their source is. OBSERVED: devices take them,
    and they pass because the segment is only observed. UNCLEAR: devices take some of them, send them under the
    name of another segment, or forward them past the ruleset."""

    FREE = "free"
    STOPPED = "stopped"
    OBSERVED = "observed"
    UNCLEAR = "unclear"


def stacked(devices: Iterable[Device], is_segment: Callable[[str], bool]) -> list[Stacked]:
    """Each device that takes packets of a segment, with each such segment. A device that is itself a segment is
    left out, because its packets are classified under its own name. The devices on top of it are found from
    there."""
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
    """The indexes of the devices whose packets must be dropped: all that take packets of a segment that is not
    only observed."""
    return frozenset(one.device.ifindex for one in found if not config.observes(one.segment.name))


def known(devices: Iterable[Device], is_segment: Callable[[str], bool]) -> frozenset[int]:
    """The indexes of the interfaces, other than segments, that are known to send a segment's packets or not to
    send them. A bridge or bond without a port is not known: its first port may be a segment, and packets come out
    of it before the agent notices. A device on top of such a device (a VLAN) is not known either, and neither is a
    bridge or bond that has only such devices as ports."""
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
    """Whether a device that sends the packets of its ports has no known port. `masters` have one."""
    if device.kind == _OPEN_VSWITCH:
        return not switched
    return device.kind in _WITH_PORTS and device.ifindex not in masters


def warnings(devices: Iterable[Device], config: Config) -> list[str]:
    """The warnings about these devices for the operator, one line each."""
    devices = list(devices)
    found = stacked(devices, config.segment)
    stopped = enforced(found, config)
    return [*(line for _, line in _bridged(devices, config)), *(_warning(one, config, stopped) for one in found)]


def concerning(devices: Iterable[Device], config: Config, segments: Set[str]) -> list[str]:
    """The warnings about these segments, and about the devices that take their packets and are segments
    themselves."""
    devices = list(devices)
    bridged = [line for ports, line in _bridged(devices, config) if ports & segments]
    found = stacked(devices, config.segment)
    stopped = enforced(found, config)
    above = (one for one in found if one.segment.name in segments)
    other = [
        f"{one.kind} {shown(one.name)}, a segment itself, takes the packets of segment {shown(segment)}: those "
        f"are classified as sources of {shown(one.name)}"
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
    """The fate of a segment's packets because of the devices on top of it."""
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
    """Whether no device is on top of a segment. Then `concerning` has no line and the fate is FREE. This takes
    less time than `concerning` and `fate`, which matters for an account with hundreds of segments."""
    devices = list(devices)
    found = {device.ifindex for device in devices if device.name == segment}
    return not any(one.lower in found or (one.master and one.ifindex in found) for one in devices)


def _warning(one: Stacked, config: Config, stopped: Set[int]) -> str:
    """The warning about one device. `stopped` are the devices whose packets the ruleset drops."""
    name, segment = shown(one.device.name), shown(one.segment.name)
    begin = f"{one.device.kind} {name} takes the packets of segment {segment}"
    if config.observes(one.segment.name) and one.device.ifindex not in stopped:
        return f"{begin}, which is only observed: they pass, and are not counted"
    if config.uplink(one.device.name):
        return (
            f"{begin} and is an uplink: nothing that comes from it may reach a policy port beyond the segments, "
            f"until {segment} is taken off it"
        )
    return (
        f"{begin}: nothing that comes from it may reach a policy port, whatever its source is, until {segment} is "
        f"taken off it or {name} is one of `segments`"
    )


def _bridged(devices: list[Device], config: Config) -> Iterator[tuple[Set[str], str]]:
    """The bridges that can forward frames between a segment and an uplink. Such frames never reach the ruleset.
    Yields the names of the segments, and the warning."""
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
    """Index of an interface → the devices directly on top of it, which take its packets."""
    known = {device.ifindex: device for device in devices}
    switches = {device for device in devices if device.kind == _OPEN_VSWITCH}
    above: dict[int, set[Device]] = {}
    for device in devices:
        if device.lower and device.kind != VRF:
            above.setdefault(device.lower, set()).add(device)
        master = known.get(device.master)
        if master is not None and master.kind != VRF:
            above.setdefault(device.ifindex, set()).add(master)
            if device.peer in known:  # a frame that a bridge sends out of one end of a pair comes in at the other
                above.setdefault(master.ifindex, set()).add(known[device.peer])
            if master.kind == _OPEN_VSWITCH:
                above[device.ifindex] |= switches
    return above


def _reached(segment: Device, above: dict[int, set[Device]]) -> set[Device]:
    """All devices on top of a segment, directly or not."""
    found: set[Device] = set()
    ahead = [segment]
    while ahead:
        new = above.get(ahead.pop().ifindex, set()) - found - {segment}
        found |= new
        ahead += new
    return found
