"""`portward check`: whether `portward run` would start with this configuration. It changes nothing."""

from __future__ import annotations

import resource
import shutil
import socket
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Final

from portward.base import descriptors, ownership
from portward.base.clock import utc_now
from portward.base.instance import command, unit
from portward.base.interfaces import matches, shown
from portward.base.words import counted
from portward.config.files import mistake
from portward.config.keys import DEFAULT_TABLE, Config, Encrypted, InterfaceGroup
from portward.config.load import load_config
from portward.config.paths import is_path
from portward.daemon.runtime import read_status, running
from portward.dataplane import (
    genetlink,
    namespacelock,
    others,
    reconciler,
    rtnetlink,
    ruleset,
    stacking,
    surroundings,
    templates,
    tunnels,
    xtables,
)
from portward.dataplane.links import Device
from portward.dataplane.names import KernelTable
from portward.dataplane.nfnetlink import NfNetlink
from portward.dataplane.nft import Nft
from portward.errors import KernelError, PortwardError, StoreError, together
from portward.metrics.listeners import try_to_listen
from portward.ops import mistyped
from portward.ops.behind import other_store
from portward.ops.instances import same_table
from portward.policy import presets
from portward.policy.preset import Preset
from portward.store.backends import open_store
from portward.store.unreadable import unreadable
from portward.table.database import FILE, LOCK_FILE, OtherFormatError, TableError
from portward.table.invariants import verify

# How many devices of each kind, and how many records of the store, are named; the others are counted.
_NAMED: Final = 3
_NAMED_RECORDS: Final = 20
# How many interfaces of a group are named.
_NAMED_INTERFACES: Final = 10


def check(path: Path, *, with_store: bool = True, instance: str | None = None) -> Iterator[str]:
    """Yields a line for each result as it is found. Raises PortwardError at the first mistake. `instance` is the
    one that the configuration belongs to, None for the host's own agent.

    Without `with_store`, store and table are not checked. An agent with a policy table starts even if its store
    cannot be reached, and no start waits for a check of the table, because a damaged row affects only one source.
    Two agents with one table folder are not looked for either: the lock of the folder lets the first one start.
    """
    config = load_config(path)
    yield f"{path}: segments {config.segments_in_words()}; uplinks {', '.join(config.uplinks)}"
    if config.table.exists() and not config.table.is_dir():
        raise mistake(path, f"{str(config.table)!r} is no folder", "table")
    _own_table(path, config, instance, with_others=with_store)
    yield from _ownership(config.table)
    preset = presets.load(config.preset, named_in=path)
    origin = f" ({config.preset})" if is_path(config.preset) else ""
    yield f"preset {preset.name}{origin}: ports {', '.join(map(str, preset.ports))}, mode {config.mode}"
    devices = rtnetlink.devices()
    yield from _interfaces(config, devices)
    netlink = NfNetlink()
    # Raises KernelError if this user may not read the kernel. libnftables would write to stderr itself.
    reconciler.loaded(netlink)
    bridged = xtables.has_native_queue(Nft(netlink), KernelTable.BRIDGE)
    warnings = stacking.warnings(devices, config, bridged=bridged)
    yield from (f"WARNING: {line}" for line in warnings)
    yield from _ports(config, devices, bridged=bridged, refuse=with_store)
    yield from _tunnels(config, devices)
    translating = others.seen(netlink)
    yield from _ruleset(config, preset, netlink, warnings, guard=translating.guard)
    yield from _loopback()
    yield from _metrics(config)
    if (limit := resource.getrlimit(resource.RLIMIT_NOFILE)[1]) < descriptors.ENOUGH:
        yield f"WARNING: {descriptors.few_text(limit)}"
    for line in translating.why:
        yield f"{line}: forwarded packets are classified again (forward guard)"
    if translating.guard and (ports := stacking.ports(devices, config)):
        yield (
            f"WARNING: {_named(ports)}: packets of theirs that other programs translate are NOT classified again, "
            "so no rule may translate them to a policy port"
        )
    if not with_store:
        return
    # The verbs run this program, not the agent, which starts without it and sees less of the file system.
    yield from _fraud_check(config)
    yield from _table(config.table)
    if line := other_store(config):
        yield f"WARNING: {line}"
    if config.groups:
        yield from _attachments(config)
    yield from _store(config.store)


def _own_table(path: Path, config: Config, instance: str | None, *, with_others: bool) -> None:
    """Raises InputError if an instance has the default table folder, which is that of the host's own agent. With
    `with_others`, also if another agent of this host has the same folder."""
    if instance is not None and config.table == DEFAULT_TABLE:
        raise mistake(
            path,
            f"{str(config.table)!r} is the folder of the host's own agent: {DEFAULT_TABLE}-instances/{instance} "
            "would be right",
            "table",
        )
    if with_others and (other := same_table(path, config, instance)) is not None:
        problem = f"{str(config.table)!r} is the folder of {other} too: each agent needs its own"
        raise mistake(path, problem, "table")


def _interfaces(config: Config, devices: Sequence[Device]) -> Iterator[str]:
    """The interfaces that the patterns of the configuration match."""
    for kind, patterns in (("segments", config.segments), ("uplinks", config.uplinks)):
        for pattern in patterns:
            found = [shown(device.name) for device in devices if matches((pattern,), device.name)]
            yield f"{kind} {pattern!r}: {', '.join(found) or 'no such interface now'}"
    for group in config.groups:
        yield from _group(group, [device.name for device in devices])


def _group(group: InterfaceGroup, names: Sequence[str]) -> Iterator[str]:
    """The interfaces of a group. `names` are those of all interfaces."""
    found = [shown(name) for name in names if matches(group.interfaces, name)]
    if not found:
        yield f"WARNING: group {shown(group.name)!r}: no interface matches {', '.join(group.interfaces)} now"
    elif len(found) <= _NAMED_INTERFACES:
        yield f"group {shown(group.name)!r}: {', '.join(found)}"
    else:
        more = len(found) - _NAMED_INTERFACES
        yield f"group {shown(group.name)!r}: {', '.join(found[:_NAMED_INTERFACES])} and {more} more"
    if group.name in names and not matches(group.interfaces, group.name):
        yield (
            f"WARNING: interface {shown(group.name)!r} has the name of a group and does not belong to it: verbs "
            "and records that name it mean the group"
        )


def _ports(config: Config, devices: Sequence[Device], *, bridged: bool, refuse: bool) -> Iterator[str]:
    """Raises PortwardError if a segment is a port of a bridge and cannot get its verdicts there, or if its packets
    would get two. Without `refuse` this is only a warning: an agent must start, because without one the other
    segments are closed, too."""
    mistakes = _mistakes_with_ports(config, devices, bridged=bridged)
    if mistakes and refuse:
        raise together([PortwardError(line) for line in mistakes[:_NAMED]])
    if mistakes and not bridged:  # the other mistakes are warnings already
        yield f"WARNING: {mistakes[0]}"


def _mistakes_with_ports(config: Config, devices: Sequence[Device], *, bridged: bool) -> list[str]:
    if bridged:
        return [*stacking.unread(devices, config), *stacking.asked_twice(devices, config)]
    if not (ports := stacking.ports(devices, config)):
        return []
    return [
        f"{_named(ports)}, and this kernel takes no queue in a bridge, for which it needs nft_queue "
        "(CONFIG_NFT_QUEUE) and tables of family bridge (CONFIG_NF_TABLES_BRIDGE): take them off the bridge, or "
        "off `segments`"
    ]


def _named(ports: Sequence[stacking.Stacked]) -> str:
    """The first segments that are ports, with their bridges."""
    named = ", ".join(f"{shown(one.segment.name)} of {shown(one.device.name)}" for one in ports[:_NAMED])
    more = f" and {len(ports) - _NAMED} more" if len(ports) > _NAMED else ""
    return f"segments are ports of bridges ({named}{more})"


def _ruleset(
    config: Config, preset: Preset, netlink: NfNetlink, warnings: Sequence[str], *, guard: bool
) -> Iterator[str]:
    """Checks that the kernel would take the ruleset, and that the namespace is free. Raises KernelError.
    `warnings` on stacked devices are printed already, so they are not logged."""
    nft = Nft(netlink)
    native, bridged = xtables.has_native_queue(nft), xtables.has_native_queue(nft, KernelTable.BRIDGE)
    found = surroundings.found(config, bridged=bridged, printed=warnings)._replace(guard=guard)
    try:
        for want in ruleset.without_policy(
            templates.read(), config, preset, found, native=native, bridged=bridged
        ):
            nft.check(want.whole)
    except KernelError as error:
        raise KernelError(f"the kernel does not take the ruleset: {error}") from None
    if not native:
        xtables.require(netlink)
    yield from _lock(config, netlink)
    yield f"the kernel takes the ruleset; queue by {'nft' if native else 'the xtables NFQUEUE target'}"


def _attachments(config: Config) -> Iterator[str]:
    """Warns of attachments that name an interface in the place of its group. Raises StoreError."""
    with closing(open_store(config.store)) as store:
        yield from (f"WARNING: {line}" for line in mistyped.in_groups(config, store))


def _store(url: str) -> Iterator[str]:
    """Checks that each record of the store can be read. Raises StoreError with what to do if one cannot."""
    with closing(open_store(url)) as store:
        yield f"store {url}: revision {store.revision()}"
        number = 0
        for number, error in enumerate(unreadable(store), 1):
            if number <= _NAMED_RECORDS:
                yield f"  {error}"
    if number > _NAMED_RECORDS:
        yield f"  and {number - _NAMED_RECORDS} more"
    if number:
        raise StoreError(
            f"{counted(number, 'record')} of the store cannot be read: gateways that had the one before keep it, "
            f"others deny the sources; put each right by `{command('apply')}`, or take it out"
        )


def _ownership(folder: Path) -> Iterator[str]:
    """Checks that only the agent can use the table's folder and files. Raises PortwardError if the agent would
    refuse them."""
    try:
        found = ownership.look(folder)
    except OSError as error:
        raise PortwardError(f"table {folder}: {error.strerror}") from None
    if found.refused:
        raise together([PortwardError(one) for one in found.refused])
    for place, mode in found.open:
        yield f"table {folder}: others may open {place}; `{command('run')}` makes it {mode:04o}"


def _fraud_check(config: Config) -> Iterator[str]:
    """Checks that the anti-fraud program can be run, and shows its path."""
    if not config.exemptions.check:
        return
    program = config.exemptions.check[0]
    if (found := shutil.which(program)) is None:
        yield (
            f"WARNING: exemptions.check: {program} cannot be run here: there is no such program, or it may not be "
            "executed; each request for review waits for a person"
        )
    else:
        yield f"exemptions.check: {found}"


def _starting(folder: Path) -> bool:
    """Whether the agent on this table has not reported since its start, so that it may be about to make the
    table."""
    try:
        return read_status(folder) is None
    except PortwardError:  # an agent of another version has
        return False


def _table(folder: Path) -> Iterator[str]:
    """Checks that the policy table is whole. Raises TableError with what to do if it is not."""
    if not (folder / FILE).exists():
        if (process := running(folder)) is None:
            yield f"table {folder}: there is none yet"
        elif _starting(folder):
            yield f"table {folder}: there is none yet; an agent is starting (process {process})"
        else:
            yield (
                f"WARNING: table {folder}: there is none, although an agent runs on it (process {process}): it "
                "was removed; a restart of the agent makes it anew"
            )
        return
    remedy = (
        f"`systemctl stop {unit()}`, remove {folder / FILE} and {folder / LOCK_FILE}, `systemctl start "
        f"{unit()}`: the start reads the store anew"
    )
    try:
        found = verify(folder, utc_now())
    except OtherFormatError as error:
        yield f"{error}: the next start reads the store anew"
        return
    except TableError as error:
        raise TableError(f"{error}; {remedy}") from None
    yield (
        f"table {folder}: {counted(found.attachments, 'attachment')} of "
        f"{counted(found.subscriptions, 'subscription')}, "
        f"{counted(found.broken, 'damaged row') if found.broken else 'no damaged rows'}"
    )
    for finding in found.listed:
        yield f"  {finding}"
    if found.broken > len(found.listed):
        yield f"  and {found.broken - len(found.listed)} more"
    if found.broken:
        raise TableError(f"the policy table is damaged, and the sources concerned may be denied: {remedy}")


def _lock(config: Config, netlink: NfNetlink) -> Iterator[str]:
    """Checks that `portward run` would get the network namespace. Raises KernelError. If the agent on this table
    has the namespace, this is a check before a reload."""
    namespacelock.require(netlink)
    own = running(config.table)
    taken = namespacelock.holder(netlink) if own is not None else namespacelock.lasting_holder(netlink)
    if taken is not None and (own is None or taken.process != own):
        raise taken
    if taken is not None:
        yield f"the agent runs here with this table, as process {own}"


def _loopback() -> Iterator[str]:
    """Checks that the loopback has an address. `ip netns add` makes it without one, and down."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        try:
            one.bind(("127.0.0.1", 0))
        except OSError:
            yield (
                "WARNING: the loopback of this network namespace has no address, so the agent cannot query its "
                "workers, and an address there cannot be scraped: `ip link set lo up`"
            )


def _metrics(config: Config) -> Iterator[str]:
    """Checks that the metrics can be scraped at their address. If not, it is only a warning."""
    if running(config.table) is None and (problem := try_to_listen(config.metrics_endpoints())):
        yield (
            f"WARNING: metrics.address {problem}: `{command('run')}` enforces all the same, and tries again until "
            "it can be had"
        )


def _tunnels(config: Config, devices: Sequence[Device]) -> Iterator[str]:
    """The tunnels that end here, and what the host's own firewall must do about them."""
    ends = tunnels.ending_here(devices)
    try:
        ports = genetlink.tunnel_ports(devices)
    except OSError as error:
        ports = tunnels.Ports(tunnels.of_devices(devices))
        yield f"tunnels of FOU, L2TP and WireGuard: the kernel does not say: {error.strerror}"
    if not (ends or ports.open or ports.encrypted):
        return
    kinds: dict[str, list[str]] = {}
    for device in ends:
        kinds.setdefault(device.kind, []).append(shown(device.name))
    named = [
        f"{kind} {', '.join(names[:_NAMED])}" + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
        for kind, names in sorted(kinds.items())
    ]
    numbers = ", ".join(map(str, sorted(ports.open | ports.encrypted))) or "none"
    yield f"tunnels that end here: {'; '.join(named) or 'no device'}; UDP ports {numbers}"
    yield (
        "no segment reaches them"
        + (", but IPsec and WireGuard" if config.tunnels.encrypted is Encrypted.PASS else "")
        + "; from the uplinks THIS HOST'S OWN FIREWALL must close them: packets that come in there get no verdict"
    )
