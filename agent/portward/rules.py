"""The verbs of `portward rules`: what is loaded, what would be, and the one way to stop enforcing."""

from __future__ import annotations

from pathlib import Path

from portward import config as configuration
from portward.errors import InputError, KernelError, PortwardError
from portward.gateway import keeper, ruleset, xtables
from portward.gateway.nfnetlink import NfNetlink
from portward.gateway.nft import Nft
from portward.policy import preset as presets
from portward.runtime import running


def loaded() -> str:
    """The ruleset as nft prints it; raises KernelError where there is none."""
    if not keeper.loaded(NfNetlink()):
        raise KernelError("no ruleset of portward is loaded here: nothing is enforced (start `portward run`)")
    return Nft().listing(ruleset.FAMILY_TABLE)


def wanted(path: Path) -> str:
    """The ruleset that `portward run` would load here with the configuration at `path`."""
    config = configuration.load(path)
    state = ruleset.State(0, synced=False)
    native = xtables.has_native_queue(Nft())
    return ruleset.wanted(config, presets.load(config.preset), native=native, state=state).text


def remove(path: Path) -> str:
    """Takes the ruleset out and says so. Raises PortwardError where none is loaded, and where the agent of the
    configuration at `path` runs: it would put the ruleset back within a second."""
    nft, netlink = Nft(), NfNetlink()
    if not keeper.loaded(netlink):
        raise PortwardError("no ruleset of portward is loaded here: nothing was enforced")
    try:
        pid = running(configuration.load(path).table)
    except InputError:
        pid = None  # without a readable configuration enforcement must still come to an end
    if pid is not None:
        raise PortwardError(f"the agent runs (process {pid}) and would put the ruleset back: stop it first")
    keeper.remove(nft, netlink)
    return "portward's ruleset is removed: port 25 is open for every source behind this gateway"
