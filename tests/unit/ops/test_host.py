"""The state of this host comes from the ruleset in the kernel, not from the configuration file."""

from __future__ import annotations

from pathlib import Path

import pytest

from portward.base.interfaces import matches
from portward.config.keys import Config
from portward.dataplane import loaded, stacking
from portward.dataplane.links import Device
from portward.dataplane.names import NO_INTERFACE, KernelTable
from portward.dataplane.setdump import SetElement
from portward.ops import effect, host, host_state


def bounds(pattern: str) -> tuple[bytes, bytes]:
    """The first name that a pattern matches, and the first one behind it, in the kernel's form."""
    first = pattern.removesuffix("*").encode().ljust(16, b"\0")
    width = 1 << 8 * (16 - len(pattern) + 1) if pattern.endswith("*") else 1
    return first, (int.from_bytes(first, "big") + width).to_bytes(16, "big")


class Kernel:
    """A kernel with these patterns in its sets."""

    def __init__(self, **sets: tuple[str, ...]) -> None:
        self._sets = sets

    def element(self, _: str, set_: str, key: bytes) -> SetElement | None:
        """The element whose interval has the key in it."""
        found = matches(self._sets.get(set_, ()), key.rstrip(b"\0").decode())
        return SetElement(key, 0, 0) if found else None

    def elements(self, _: str, set_: str) -> list[SetElement]:
        """The begin and end of each interval, the last ones first, and the end mark that the kernel adds."""
        if set_ not in self._sets:
            raise FileNotFoundError
        keys = sorted((key for pattern in self._sets[set_] for key in bounds(pattern)), reverse=True)
        return [SetElement(key, 0, 0) for key in (*keys, bytes(16))]

    def rules_on(self, _: str, chain: str, set_: str) -> list[int]:
        """The rules are loaded."""
        assert (chain, set_) == ("screen", "deny4")
        return [7]

    def of(self, table: KernelTable) -> Kernel:
        """The table `inet` has the sets; the table `bridge` is not there."""
        return self if table is KernelTable.INET else Kernel()

    def sets(self, _: str) -> set[str]:
        """The names of the sets."""
        return set(self._sets)

    def close(self) -> None:
        """Does nothing."""


@pytest.mark.parametrize(
    ("opened", "observed", "found"),
    [
        (("vni*",), ("vni*",), (True, True)),
        (("vni*",), ("vni1",), (True, False)),
        (("vni*",), (NO_INTERFACE,), (True, False)),
        (("vni1",), ("vni1",), (False, False)),
        ((NO_INTERFACE,), (NO_INTERFACE,), (False, False)),
    ],
)
def test_segments_are_open_without_an_agent_if_the_loaded_ruleset_says_it_of_each(
    monkeypatch: pytest.MonkeyPatch,
    opened: tuple[str, ...],
    observed: tuple[str, ...],
    found: tuple[bool, bool],
) -> None:
    monkeypatch.setattr(host, "NfNetlink", lambda: Kernel(open_segments=opened, observed_segments=observed))
    assert host._opens(Config(segments=("vni*",), uplinks=("up0",)), ["vni1", "vni2"]) == found


@pytest.mark.parametrize(
    "patterns", [(), ("vni*",), ("br1002", "vni*"), ("a*", "b*"), ("an-interface-15",), ("fourteen-bytes*",)]
)
def test_the_patterns_of_a_loaded_ruleset_are_read_as_they_were_written(patterns: tuple[str, ...]) -> None:
    assert loaded.patterns(Kernel(open_segments=patterns or (NO_INTERFACE,)), loaded.OPEN) == patterns  # type: ignore[arg-type]
    assert loaded.patterns(Kernel(), loaded.OPEN) == ()  # type: ignore[arg-type] # an older ruleset


def test_while_the_ruleset_is_reported_as_not_in_force_the_handling_is_unknown(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    status = {"ruleset_error": "No buffer space available", "workers": []}
    monkeypatch.setattr(host, "_agent", lambda _: (host_state.Agent.RUNS, status))
    monkeypatch.setattr(host, "NfNetlink", lambda: Kernel(open_segments=(NO_INTERFACE,)))
    config = Config(segments=("vni*",), uplinks=("up0",), table=tmp_path)
    monkeypatch.setattr(host, "_ruleset", lambda _: (host_state.Ruleset.LOADED, ""))
    found = host.look(config, ["vni1"])
    assert effect.handling(found) is effect.Handling.UNKNOWN
    why = effect.now(found, host_state.CachedState(), effect.Policy(verdict="deny")).why
    assert why.startswith("the agent says that its ruleset is not in force")
    assert why.endswith("No buffer space available")
    monkeypatch.setattr(host, "_ruleset", lambda _: (host_state.Ruleset.NONE, ""))
    assert effect.handling(host.look(config, ["vni1"])) is effect.Handling.OPEN


def test_a_segment_with_nothing_on_it_costs_no_look_at_what_stands_on_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An account may have hundreds of segments on a gateway with thousands of devices."""
    looked: list[str] = []

    def concerning(*_: object, bridged: bool) -> list[str]:
        looked.append("concerning")
        return []

    monkeypatch.setattr(stacking, "concerning", concerning)
    monkeypatch.setattr(host, "bridged", lambda: False)
    config = Config(segments=("vni*",), uplinks=("up0",))
    devices = (Device(1, "vni1"), Device(2, "vni2", master=3), Device(3, "br0", "bridge"))
    seen = host_state.Host()
    assert host.at_interfaces(seen, devices, config, ["vni1"]) == seen
    assert host.at_interfaces(seen, devices, config, ["vni7"]) == seen, "not here"
    assert not looked
    assert host.at_interfaces(seen, devices, config, ["vni2"]).fate is stacking.Fate.STOPPED
    assert looked
