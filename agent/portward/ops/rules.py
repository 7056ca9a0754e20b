"""The verbs of `portward rules`: show the loaded ruleset, show the wanted one, load one at boot, and remove it.

Removing the ruleset is the only way to stop enforcement.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from portward.base.instance import command, unit
from portward.base.interfaces import shown
from portward.config.keys import Config, OnAgentDown
from portward.config.load import load_config
from portward.config.paths import from_file, is_path
from portward.daemon import settings
from portward.dataplane import loaded as opened
from portward.dataplane import namespacelock, others, reconciler, ruleset, templates, xtables
from portward.dataplane.names import KernelTable
from portward.dataplane.namespacelock import NamespaceLock, NamespaceTakenError
from portward.dataplane.nfnetlink import NfNetlink
from portward.dataplane.nft import Nft
from portward.dataplane.queue_statistics import states
from portward.dataplane.ruleset import uncovered
from portward.dataplane.surroundings import found
from portward.errors import InputError, KernelError, PortwardError
from portward.model import Mode
from portward.ops import host
from portward.policy import presets
from portward.policy.preset import Preset

_ALREADY: Final = "portward's ruleset is loaded already: nothing is changed"

# The line of the configuration that names the preset.
_PRESET: Final = re.compile(r"(?m)^preset\s*=\s*[\"']([^\"'\n]*)[\"']")
# The ports to close if no preset can be read.
_LEAST_PORTS: Final = (25,)
# The descriptor of stderr, which C libraries write to.
_STDERR: Final = 2


def loaded(path: Path) -> str:
    """The loaded ruleset as nft prints it. Raises KernelError if none is loaded, or if this user may not read the
    kernel. `path` is the configuration; only its table folder is used."""
    netlink = NfNetlink()
    each = [netlink.of(table) for table in KernelTable]
    tables = [str(one.table) for one in each if reconciler.loaded(one)]
    tables += [one.table.closed for one in each if reconciler.closed(one)]
    if not tables:
        raise host.nothing_loaded(settings.folder(path))
    nft = Nft()
    with _without_libxtables():
        return "".join(map(nft.listing, tables))


def without_agent(config: Config) -> str:
    """The fate of packets here while no agent runs on the table of `config`, and what to do."""
    try:
        netlink = NfNetlink()
        if (taken := namespacelock.holder(netlink)) is not None:
            return host.in_words(taken)
        found = _without_agent(settings.last(config), netlink)
    except (KernelError, OSError) as error:
        found = f"it is not known what the kernel enforces: {error}"
    return f"{found} (start it: `systemctl start {unit()}`)"


def _without_agent(config: Config, netlink: NfNetlink) -> str:
    """The effect of the loaded ruleset. `config` is that of the last agent, if it is known."""
    if reconciler.closed(netlink):
        return (
            f"no packet to port 25 is forwarded: table {KernelTable.INET.closed} is loaded "
            f"(`{command('rules show')}` names all its ports)"
        )
    if not reconciler.loaded(netlink):
        return "no ruleset of portward is loaded here, NOTHING IS ENFORCED and port 25 is open"
    if not opened.has_rules(netlink):
        return "another program has taken rules out of the loaded ruleset, so PORT 25 MAY BE OPEN"
    queues = range(config.queue.first, config.queue.first + config.queue.workers)
    bound = {state.number for state in states()} & set(queues)
    opens = opened.patterns(netlink, opened.OPEN)
    if not opens:
        become = "are dropped, allowed or not"
    elif set(opens) == set(uncovered(config.patterns())):
        become = "pass, allowed or not"
    else:
        become = f"pass in {', '.join(map(shown, opens))} and are dropped elsewhere, allowed or not"
    cached = f"cached verdicts end within {max(config.verdicts.allow_seconds, config.verdicts.deny_seconds)} s"
    if not bound:
        return f"sources without a cached verdict {become}; {cached}"
    left = f"{len(bound)} of {len(queues)} workers that it left have their queue still"
    rest = "" if len(bound) == len(queues) else "; packets in the other queues get no verdict"
    return (
        f"{left}, and go by the policy table as it was left{rest}; once they end, sources without a cached "
        f"verdict {become}"
    )


def wanted(path: Path) -> str:
    """The ruleset that `portward run` would load here with the configuration at `path`, as nft text."""
    config = load_config(path)
    preset = presets.load(config.preset, named_in=path)
    netlink = NfNetlink()
    nft = Nft(netlink)
    native, bridged = xtables.has_native_queue(nft), xtables.has_native_queue(nft, KernelTable.BRIDGE)
    surroundings = found(config, bridged=bridged)._replace(guard=others.seen(netlink).guard)
    texts = ruleset.without_policy(templates.read(), config, preset, surroundings, native=native, bridged=bridged)
    return "".join(one.whole for one in texts)


def baseline(path: Path) -> str:
    """Closes the policy ports before the agent starts, and returns what it did. It needs neither store nor table.

    If portward's ruleset is loaded, nothing changes, because an agent has loaded it and may run. Then the result
    names the segments that this ruleset leaves open, if the configuration at `path` differs. Otherwise the ruleset
    of that configuration is loaded, with no worker behind its queue. If that is impossible, packets to the ports
    of its preset are no longer forwarded (if the preset is unreadable: to port 25), and PortwardError says why.
    The table `bridge` is loaded, too, if the agent will load it.

    A crash between any two steps leaves the state before, or a closed port. If another process has the namespace
    and its ruleset is not loaded yet, nothing changes, and PortwardError is raised.
    """
    netlink = NfNetlink()
    if reconciler.loaded(netlink):
        return _already(path, netlink)
    try:
        with NamespaceLock():
            return _begin(path, netlink)
    except NamespaceTakenError as error:
        if reconciler.loaded(netlink):  # an agent was starting, and is done by now
            return _already(path, netlink)
        raise PortwardError(f"nothing is changed, and no ruleset is loaded yet: {error}") from error


def _begin(path: Path, netlink: NfNetlink) -> str:
    """`baseline`, while this process has the lock of the namespace."""
    if reconciler.loaded(netlink):  # an agent was faster, and has ended
        return _already(path, netlink)
    nft = Nft(netlink)
    try:
        config = load_config(path)
        preset = presets.load(config.preset, named_in=path)
        bridged = xtables.has_native_queue(nft, KernelTable.BRIDGE)
        # With the guard, because no agent watches yet whether other programs translate packets.
        surroundings = found(config, bridged=bridged)._replace(guard=True)
        texts = ruleset.without_policy(
            templates.read(), config, preset, surroundings, native=False, bridged=bridged
        )
        # The table `inet` last: if the process dies in between, the next run, which looks for that one, begins
        # again.
        for want in reversed(list(texts)):
            if want.table is KernelTable.INET or not reconciler.loaded(netlink.of(want.table)):
                reconciler.begin(nft, want)
    except PortwardError as error:
        ports = _ports(path)
        reconciler.close(nft, ports)
        with contextlib.suppress(KernelError):  # there may be no such tables
            reconciler.close(nft, ports, KernelTable.BRIDGE)
        closed = f"{'port' if len(ports) == 1 else 'ports'} {', '.join(map(str, ports))}"
        raise PortwardError(f"no packet to {closed} is forwarded until this is mended: {error}") from error
    for table in KernelTable:
        reconciler.lift(nft, netlink.of(table))
    return _without_workers(config, preset)


def _already(path: Path, netlink: NfNetlink) -> str:
    """The result if nothing changes, with the differences between the loaded ruleset and the configuration."""
    try:
        config = load_config(path)
        found = opened.patterns(netlink, opened.OPEN)
    except (InputError, OSError):  # the loaded ruleset does not need the file: it was read before
        return _ALREADY
    wanted = uncovered(ruleset.opened(config))
    if set(found) == set(wanted):
        return _ALREADY
    return (
        f"{_ALREADY}. It is not what {path} wants: it leaves open {_named(found)} while no agent runs, the file "
        f"{_named(wanted)}. An agent loads that when it starts or reloads"
    )


def _named(patterns: Sequence[str]) -> str:
    return ", ".join(map(shown, patterns)) or "no segment"


def _ports(path: Path) -> tuple[int, ...]:
    """The ports of the preset that the configuration at `path` names, even if the rest of it is unreadable; port
    25 if the preset is unreadable."""
    with contextlib.suppress(OSError, UnicodeDecodeError, InputError):
        if named := _PRESET.findall(path.read_text("utf-8")):
            name = named[-1]
            return presets.load(from_file(name, path) if is_path(name) else name).ports
    return _LEAST_PORTS


def _without_workers(config: Config, preset: Preset) -> str:
    """The effect of the new ruleset while no agent runs."""
    segments, ports = config.segments_in_words(), ", ".join(map(str, preset.ports))
    if config.mode is Mode.OBSERVE:
        return f'nothing is closed: mode = "observe", segments {segments}'
    if config.on_agent_down is OnAgentDown.OPEN:
        return f'nothing is closed: on_agent_down = "open", segments {segments}'
    seen = f"; only observed: {', '.join(config.verdicts.observe)}" if config.verdicts.observe else ""
    return f"closed until portward runs: ports {ports} for {segments}{seen}"


def check_removable() -> None:
    """Raises PortwardError if `remove` would: if no ruleset is loaded, or if an agent runs in this network
    namespace, whatever its configuration, because it would load the ruleset again within a second. Changes
    nothing."""
    netlink = NfNetlink()
    _require_loaded(netlink)
    if (taken := namespacelock.lasting_holder(netlink)) is not None:
        raise _taken(taken)


def remove() -> str:
    """Removes the ruleset and returns a sentence about it. Raises PortwardError as `check_removable` does."""
    netlink = NfNetlink()
    _require_loaded(netlink)
    try:
        with NamespaceLock():
            for table in KernelTable:
                reconciler.remove(Nft(netlink), netlink.of(table))
    except NamespaceTakenError as error:
        raise _taken(error) from error
    return "portward's ruleset is removed: port 25 is open for every source behind this gateway"


def _require_loaded(netlink: NfNetlink) -> None:
    each = [netlink.of(table) for table in KernelTable]
    if not any(reconciler.loaded(one) or reconciler.closed(one) for one in each):
        raise PortwardError("no ruleset of portward is loaded here: nothing was enforced")


def _taken(error: NamespaceTakenError) -> PortwardError:
    """The error if another process has the lock of the namespace, so that the ruleset cannot be removed."""
    if error.process is None:
        return error
    return PortwardError(
        f"the agent runs (process {error.process} by its own count) and would put the ruleset back: stop it first"
    )


@contextlib.contextmanager
def _without_libxtables() -> Iterator[None]:
    """Discards what C libraries write to stderr, in a process with one thread.

    libxtables does not know the family inet, and writes so for each rule with its target, although nft lists the
    rule. nft's own errors are raised as exceptions.
    """
    kept = os.dup(_STDERR)
    try:
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), _STDERR)
        yield
    finally:
        os.dup2(kept, _STDERR)
        os.close(kept)
