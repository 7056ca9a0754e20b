"""The verbs of `portward rules`: what is loaded, what would be, what a gateway boots with, and the one way to stop
enforcing."""

from __future__ import annotations

from pathlib import Path

from portward import config as configuration
from portward.config import Config, OnAgentDown
from portward.errors import InputError, KernelError, PortwardError
from portward.gateway import keeper, ruleset, xtables
from portward.gateway.around import found
from portward.gateway.nfnetlink import NfNetlink
from portward.gateway.nft import Nft
from portward.model import Mode
from portward.policy import preset as presets
from portward.policy.preset import Preset
from portward.runtime import running


def loaded() -> str:
    """The ruleset as nft prints it; raises KernelError where there is none, or the kernel may not be asked."""
    netlink = NfNetlink()
    tables = [ruleset.FAMILY_TABLE] if keeper.loaded(netlink) else []
    tables += [f"inet {keeper.CLOSED}"] if keeper.closed(netlink) else []
    if not tables:
        raise KernelError(keeper.NOT_LOADED)
    nft = Nft()
    return "".join(map(nft.listing, tables))


def without_agent(config: Config) -> str:
    """What becomes of packets here while no agent runs, in words; `config` is what the last one ran with."""
    try:
        netlink = NfNetlink()
        if keeper.loaded(netlink):
            passed = config.on_agent_down is OnAgentDown.OPEN or config.mode is Mode.OBSERVE
            return f"known verdicts stay in the kernel, unknown sources are {'passed' if passed else 'dropped'}"
        if keeper.closed(netlink):
            return f"no packet to port 25 is forwarded: table inet {keeper.CLOSED} stands where no ruleset is"
    except KernelError as error:
        return f"what the kernel enforces is not known: {error}"
    return "no ruleset of portward is loaded here, NOTHING IS ENFORCED and port 25 is open"


def wanted(path: Path) -> str:
    """The ruleset that `portward run` would load here with the configuration at `path`."""
    config = configuration.load(path)
    state = ruleset.State(0, synced=False)
    native = xtables.has_native_queue(Nft())
    preset = presets.load(config.preset, named_in=path)
    return ruleset.wanted(config, preset, native=native, state=state, surroundings=found(config)).text


def baseline(path: Path) -> str:
    """Sees to it that port 25 is closed before there is an agent, and says what it did. It needs neither store nor
    policy table.

    Where portward's ruleset is loaded nothing is changed: an agent has put it there, and may run. Else the ruleset
    of the configuration at `path` is loaded, with nobody behind its queue; where that cannot be had, no packet to
    port 25 is forwarded any more, and PortwardError says why. A crash between any two steps leaves what was there
    before, or a closed port."""
    nft, netlink = Nft(), NfNetlink()
    if keeper.loaded(netlink):
        return "portward's ruleset is loaded already: nothing is changed"
    try:
        config = configuration.load(path)
        preset = presets.load(config.preset, named_in=path)
        state = ruleset.State(0, synced=False)
        keeper.begin(nft, ruleset.wanted(config, preset, native=False, state=state, surroundings=found(config)))
    except PortwardError as error:
        if keeper.loaded(netlink):  # an agent was quicker
            return "portward's ruleset is loaded already: nothing is changed"
        keeper.close(nft)
        raise PortwardError(f"no packet to port 25 is forwarded until this is mended: {error}") from error
    keeper.lift(nft, netlink)
    return _told(config, preset)


def _told(config: Config, preset: Preset) -> str:
    """What a ruleset without an agent does."""
    segments, ports = ", ".join(config.segments), ", ".join(map(str, preset.ports))
    if config.mode is Mode.OBSERVE:
        return f'nothing is closed: mode = "observe", segments {segments}'
    if config.on_agent_down is OnAgentDown.OPEN:
        return f'nothing is closed: on_agent_down = "open", segments {segments}'
    seen = f"; only observed: {', '.join(config.verdicts.observe)}" if config.verdicts.observe else ""
    return f"closed until portward runs: ports {ports} for {segments}{seen}"


def remove(path: Path) -> str:
    """Takes the ruleset out and says so. Raises PortwardError where none is loaded, and where the agent of the
    configuration at `path` runs: it would put the ruleset back within a second."""
    nft, netlink = Nft(), NfNetlink()
    if not (keeper.loaded(netlink) or keeper.closed(netlink)):
        raise PortwardError("no ruleset of portward is loaded here: nothing was enforced")
    try:
        pid = running(configuration.load(path).table)
    except InputError:
        pid = None  # without a readable configuration enforcement must still come to an end
    if pid is not None:
        raise PortwardError(f"the agent runs (process {pid}) and would put the ruleset back: stop it first")
    keeper.remove(nft, netlink)
    return "portward's ruleset is removed: port 25 is open for every source behind this gateway"
