"""Devices that take a segment's packets before the ruleset sees them under the segment's name. Pure.

A packet that comes in on a port of a bridge, or is for a macvlan, has that device as its input interface when it
reaches the table `inet`, so it matches no segment. A VRF is not such a device: the ruleset sees the packet with
the name of the port first. Neither is a bridge if the table `bridge` is there, which sees each frame with the name
of the port by which it came: `bridged` says so.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, Iterable, Iterator, Set
from enum import StrEnum
from typing import Final, NamedTuple

from portward.base.interfaces import shown
from portward.config.keys import Config, QueueReader
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


def past_bridges(devices: Iterable[Device]) -> list[Device]:
    """The devices as they are with the table `bridge`: a bridge takes no packets from its ports, and a port is
    like any other interface."""
    devices = list(devices)
    bridges = {device.ifindex for device in devices if device.kind == _BRIDGE}
    if not bridges:
        return devices
    apart = (device._replace(master=0) if device.master in bridges else device for device in devices)
    return [device._replace(kind="") if device.ifindex in bridges else device for device in apart]


def ports(devices: Iterable[Device], config: Config) -> list[Stacked]:
    """Each bridge with each of its ports that is a segment, by the name of the port."""
    devices = sorted(devices, key=lambda device: device.name)
    bridges = {device.ifindex: device for device in devices if device.kind == _BRIDGE}
    return [
        Stacked(bridges[device.master], device)
        for device in devices
        if device.master in bridges and config.segment(device.name)
    ]


def asked_twice(devices: Iterable[Device], config: Config) -> list[str]:
    """The mistakes with the table `bridge`: a sentence for each pair of a segment that is a port and another
    segment that sends what it has got through a bridge. Its packets get the verdict of the port, and then that of
    the other segment, and pass only if both allow it."""
    return [line for _, line in _asked_twice(list(devices), config)]


def unread(devices: Iterable[Device], config: Config) -> list[str]:
    """The mistakes with the table `bridge`: a sentence for each segment that is a port, if the reader of the
    queues gives no verdict to bridged frames."""
    return [line for _, line in _unread(list(devices), config)]


def _asked_twice(devices: list[Device], config: Config) -> Iterator[tuple[str, str]]:
    """The name of each port, and the sentence of `asked_twice`."""
    above = _above(devices)
    if not any(config.segment(device.name) for found in above.values() for device in found):
        return  # as usual; what follows is slow with thousands of ports
    past = _above(past_bridges(devices))
    for _, port in ports(devices, config):
        own = {device.ifindex for device in _reached(port, past)}
        for device in sorted(_reached(port, above)):
            if config.segment(device.name) and device.ifindex not in own:
                yield port.name, _twice(device, shown(port.name))


def _twice(device: Device, port: str) -> str:
    name = shown(device.name)
    return (
        f"{device.kind or 'interface'} {name} and {port}, whose packets a bridge passes to it, are both segments: "
        f"such a packet gets two verdicts, and passes only if both allow it; take {name} off `segments`, or {port}"
    )


def _unread(devices: list[Device], config: Config) -> Iterator[tuple[str, str]]:
    """The name of each port, and the sentence of `unread`."""
    if config.queue.reader is not QueueReader.NETFILTERQUEUE:
        return
    for bridge, port in ports(devices, config):
        yield (
            port.name,
            (
                f"segment {shown(port.name)} is a port of bridge {shown(bridge.name)}, and queue.reader = "
                f'"{QueueReader.NETFILTERQUEUE}" gives no verdict to bridged frames: nothing of it reaches a '
                f'policy port; "{QueueReader.BATCH}" would be right'
            ),
        )


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


def warnings(devices: Iterable[Device], config: Config, *, bridged: bool = False) -> list[str]:
    """The warnings about these devices for the operator, one line each."""
    devices = list(devices)
    about_ports = [line for _, line in _about_ports(devices, config)] if bridged else []
    devices = past_bridges(devices) if bridged else devices
    found = stacked(devices, config.segment)
    stopped = enforced(found, config)
    unseen = [line for _, line in _unseen(devices, config)]
    return [*about_ports, *unseen, *(_warning(one, config, stopped) for one in found)]


def _about_ports(devices: list[Device], config: Config) -> Iterator[tuple[str, str]]:
    """The warnings about segments that are ports of a bridge with the table `bridge`, each with the segment."""
    yield from _asked_twice(devices, config)
    yield from _unread(devices, config)


def concerning(
    devices: Iterable[Device], config: Config, segments: Set[str], *, bridged: bool = False
) -> list[str]:
    """The warnings about these segments, and about the devices that take their packets and are segments
    themselves."""
    devices = list(devices)
    about_ports = [line for name, line in _about_ports(devices, config) if name in segments] if bridged else []
    devices = past_bridges(devices) if bridged else devices
    unseen = [line for names, line in _unseen(devices, config) if names & segments]
    found = stacked(devices, config.segment)
    stopped = enforced(found, config)
    above = (one for one in found if one.segment.name in segments)
    other = [
        f"{one.kind} {shown(one.name)}, a segment itself, takes the packets of {_in_words(segment, config)}: "
        f"those are classified as sources of {shown(config.segment_of(one.name) or one.name)}"
        for segment in sorted(segments)
        for one in _segments_above(devices, config, segment)
    ]
    return [*about_ports, *unseen, *(_warning(one, config, stopped) for one in above), *other]


def _segments_above(devices: list[Device], config: Config, segment: str) -> list[Device]:
    """The devices above an interface that belong to another segment."""
    above, own = _above(devices), config.segment_of(segment)
    return sorted(
        device
        for one in devices
        if one.name == segment and own is not None
        for device in _reached(one, above)
        if config.segment_of(device.name) not in (own, None)
    )


def fate(devices: Iterable[Device], config: Config, segment: str, *, bridged: bool = False) -> Fate:
    """The fate of a segment's packets because of the devices on top of it."""
    devices = list(devices)
    if bridged:
        if any(name == segment for name, _ in _asked_twice(devices, config)):
            return Fate.UNCLEAR
        if any(name == segment for name, _ in _unread(devices, config)):
            return Fate.OBSERVED if config.observes(segment) else Fate.STOPPED
        devices = past_bridges(devices)
    all_found = stacked(devices, config.segment)
    found = [one for one in all_found if one.segment.name == segment]
    if any(segment in names for names, _ in _unseen(devices, config)):
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


def below(devices: Iterable[Device], interfaces: Collection[str]) -> set[str]:
    """Those of these interfaces that have a device on top of them. Of all others `concerning` has no line, and
    their fate is FREE. This takes less time than `concerning` and `fate`, which matters for an account with
    hundreds of segments, and for a group with as many interfaces."""
    devices, names = list(devices), frozenset(interfaces)
    under = {device.lower for device in devices}
    return {one.name for one in devices if one.name in names and (one.ifindex in under or one.master)}


def _warning(one: Stacked, config: Config, stopped: Set[int]) -> str:
    """The warning about one device. `stopped` are the devices whose packets the ruleset drops."""
    name, segment = shown(one.device.name), shown(one.segment.name)
    begin = f"{one.device.kind} {name} takes the packets of {_in_words(one.segment.name, config)}"
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


def _in_words(interface: str, config: Config) -> str:
    group = config.group_of(interface)
    if group is None:
        return f"segment {shown(interface)}"
    return f"interface {shown(interface)} of group {shown(group.name)}"


def _unseen(devices: list[Device], config: Config) -> Iterator[tuple[Set[str], str]]:
    """The bridges that can forward frames between a segment and an uplink, also by way of other bridges. Such
    frames never reach the ruleset. Yields the names of the segments, and the warning, which names their bridge."""
    bridges = {device.ifindex: device for device in devices if device.kind in (_BRIDGE, _OPEN_VSWITCH)}
    connected = _connected(devices, bridges)
    members: dict[int, set[str]] = {}
    uplinks_of: dict[int, set[str]] = {}
    for device in devices:
        if device.master in bridges and config.segment(device.name):
            members.setdefault(device.master, set()).add(device.name)
        if device.master in bridges and config.uplink(device.name):
            uplinks_of.setdefault(connected[device.master], set()).add(shown(device.name))
    for index, names in members.items():
        bridge, segments = bridges[index], sorted(map(shown, names))
        uplinks = sorted(uplinks_of.get(connected[index], ()))
        if uplinks:
            line = (
                f"bridge {shown(bridge.name)} forwards frames between segment {', '.join(segments)} and uplink "
                f"{', '.join(uplinks)} past this host's IP stack: PORT 25 IS OPEN THERE"
            )
            yield names, line


def _connected(devices: list[Device], bridges: Container[int]) -> dict[int, int]:
    """Index of a bridge → a number that it has in common with all bridges to which pairs of veth connect it, as
    Proxmox connects the bridge of a machine's firewall."""
    by_index = {device.ifindex: device for device in devices}
    beside: dict[int, set[int]] = {index: set() for index in by_index if index in bridges}
    for port in devices:
        end = by_index.get(port.peer)
        if port.master in bridges and end is not None and end.master in bridges:
            beside[port.master].add(end.master)
            beside[end.master].add(port.master)
    found: dict[int, int] = {}
    for first in beside:
        ahead = [first]
        while ahead:
            index = ahead.pop()
            if index not in found:
                found[index] = first
                ahead += beside[index]
    return found


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
