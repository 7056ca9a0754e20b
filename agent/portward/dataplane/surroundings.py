"""Finding the surroundings of the ruleset: once for verbs without an agent, again and again for the agent."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Final

from portward.base.descriptors import Reserve
from portward.config.keys import Config
from portward.dataplane import genetlink, rtnetlink, stacking, tunnels
from portward.dataplane.desired import NOTHING, Surroundings
from portward.dataplane.links import Device

_log: Final = logging.getLogger("portward")


class SurroundingsMonitor:
    """Finds the surroundings of portward in the network namespace of the thread that asks. `warnings` has a line
    for each device that takes packets of segments, as last found. Each line is logged once while it is true."""

    def __init__(self, *, bridged: bool = False) -> None:
        """`bridged`: the table `bridge` is there."""
        self.warnings: list[str] = []
        self._bridged = bridged
        self._reserve = Reserve(2)
        self._error = ""

    def look(self, devices: Sequence[Device], config: Config, before: Surroundings) -> Surroundings:
        """The surroundings with these devices. Anything that cannot be found out now stays as it was `before`,
        such as the ports of FOU, L2TP and WireGuard if the kernel does not answer."""
        self._warn(stacking.warnings(devices, config, bridged=self._bridged))
        found = self.with_devices(devices, config, before)
        try:
            with self._reserve.lent():
                ports = genetlink.tunnel_ports(devices)
        except OSError as error:
            if str(error) != self._error:
                _log.error("the kernel does not say which tunnels of FOU, L2TP and WireGuard end here: %s", error)
            self._error = str(error)
            return found._replace(tunnel_ports=before.tunnel_ports | tunnels.of_devices(devices))
        self._error = ""
        return found._replace(tunnel_ports=ports.open, encrypted_ports=ports.encrypted)

    def with_devices(self, devices: Sequence[Device], config: Config, before: Surroundings) -> Surroundings:
        """The surroundings with these devices, and everything else as it was `before`."""
        seen = stacking.past_bridges(devices) if self._bridged else devices
        stopped = stacking.enforced(stacking.stacked(seen, config.segment), config)
        return before._replace(stacked=stopped, known=stacking.known(seen, config.segment))

    def _warn(self, warnings: list[str]) -> None:
        logged = frozenset(self.warnings)
        for line in warnings:
            if line not in logged:
                _log.error("%s", line)
        for line in self.warnings:
            if line not in warnings:
                _log.info("no longer: %s", line)
        self.warnings = warnings


def found(config: Config, *, bridged: bool, printed: Sequence[str] = ()) -> Surroundings:
    """The surroundings of portward in this thread's network namespace now. If generic netlink does not answer, the
    UDP ports of tunnels are those of devices alone. If rtnetlink does not answer, nothing is found. `bridged`: the
    table `bridge` is there. `printed` are warnings on devices that the caller has reported already, so they are
    not logged."""
    lookout = SurroundingsMonitor(bridged=bridged)
    lookout.warnings = list(printed)
    try:
        return lookout.look(rtnetlink.devices(), config, NOTHING)
    except OSError as error:
        _log.error("the kernel does not say which interfaces there are: %s", error)
        return NOTHING
