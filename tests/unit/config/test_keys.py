"""portward.toml: its defaults, and the error text of each mistake, with its line and what would be right."""

from __future__ import annotations

from pathlib import Path

import pytest

from portward.base.interfaces import matches
from portward.config.endpoint import Endpoint
from portward.config.keys import Config, OnAgentDown, Refusal
from portward.config.load import load_config
from portward.errors import InputError
from portward.model import Mode

LEAST = 'segments = ["vni*"]\nuplinks = ["up0"]\n'


def read(tmp_path: Path, text: str) -> Config:
    """The configuration with this text."""
    path = tmp_path / "portward.toml"
    path.write_text(text)
    return load_config(path)


def test_only_segments_and_uplinks_must_be_given(tmp_path: Path) -> None:
    found = read(tmp_path, LEAST)
    assert found.store == "sqlite:/var/lib/portward/portward.db"
    assert found.table == Path("/var/cache/portward")
    assert found.preset == "azure-2020"
    assert found.mode is Mode.ENFORCE
    assert found.on_agent_down is OnAgentDown.CLOSED
    assert found.verdicts.refuse_with is Refusal.DROP
    assert found.metrics_endpoints() == (Endpoint("127.0.0.1", 9125),)


def test_an_ipv6_address_and_none_for_the_metrics(tmp_path: Path) -> None:
    found = read(tmp_path, LEAST + '[metrics]\naddress = "[::1]:9125"\n')
    assert found.metrics_endpoints() == (Endpoint("::1", 9125),)
    assert read(tmp_path, LEAST + '[metrics]\naddress = ""\n').metrics_endpoints() == ()


@pytest.mark.parametrize(
    ("text", "line", "field", "message"),
    [
        ('uplinks = ["up0"]\n', None, "segments", "missing"),
        ("segments = []\n" + LEAST[20:], 1, "segments", "at least 1"),
        (LEAST + "mode = 'watch'\n", 3, "mode", "observe"),
        (LEAST + "modes = 'observe'\n", 3, "modes", "did you mean 'mode'"),
        (LEAST + "[queue]\nworkers = 0\n", 4, "queue.workers", "at least 1"),
        (LEAST + "[queue]\nworker = 2\n", 4, "queue.worker", "did you mean 'workers'"),
        (LEAST + "[verdicts]\n\nrefuse_with = 'RST'\n", 5, "verdicts.refuse_with", "reject"),
        (LEAST + "[metrics]\naddress = 'here'\n", 4, "metrics.address", "HOST:PORT"),
        ("segments = ['vni 1']\nuplinks = ['up0']\n", 1, "segments[0]", "no interface name"),
        ("segments = ['v*i']\nuplinks = ['up0']\n", 1, "segments[0]", "only at its end"),
        ("segments = ['vni*']\nuplinks = ['eth0', 'vni9']\n", 2, "uplinks[1]", "also a segment"),
        ("segments = ['vni1']\nuplinks = ['vni*']\n", 2, "uplinks[0]", "also a segment"),
        (LEAST + "[verdicts]\nobserve = ['tap0']\n", 4, "verdicts.observe[0]", "not one of the segments"),
        (LEAST + "[metrics]\naddress = '127.0.0.1:65536'\n", 4, "metrics.address", "HOST:PORT"),
        (LEAST + "[metrics]\naddress = 'gateway.example:9125'\n", 4, "metrics.address", "no name is looked up"),
        (LEAST + "store = 5\n", 3, "store", "text"),
        (LEAST + "store = 'etcd://localhost'\n", 3, "store", "sqlite:PATH"),
        (LEAST + "store = 'sqlite:'\n", 3, "store", "sqlite:PATH"),
        (LEAST + "store = 'sqlite://'\n", 3, "store", "sqlite:PATH"),
        (
            LEAST + "store = 'sqlite://x'\n",
            3,
            "store",
            "'sqlite:x' is a file beside this one, 'sqlite:/x'",
        ),
        (LEAST + "table = ''\n", 3, "table", "no folder of its own"),
        (LEAST + "table = '.'\n", 3, "table", "no folder of its own"),
        (LEAST + "mode = \n", 3, None, "no value stands here"),
        (LEAST + LEAST, 3, None, "segments"),
        (LEAST + "[queue]\nfirst = 65535\nworkers = 2\n", 5, "queue.workers", "65535"),
    ],
)
def test_a_mistake_is_reported_with_its_place(
    tmp_path: Path, text: str, line: int | None, field: str | None, message: str
) -> None:
    with pytest.raises(InputError) as caught:
        read(tmp_path, text)
    place = f"{tmp_path / 'portward.toml'}{f':{line}' if line else ''}: {f'{field}: ' if field else ''}"
    assert str(caught.value).startswith(place), str(caught.value)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        load_config(tmp_path / "nowhere.toml")


@pytest.mark.parametrize(
    ("patterns", "name", "is_one"),
    [
        (("vni*",), "vni1", True),
        (("vni*",), "vni", True),
        (("vni*",), "vn", False),
        (("vni1",), "vni10", False),
        (("tap0", "vni1"), "vni1", True),
        (("*",), "anything", True),
        ((), "vni1", False),
    ],
)
def test_patterns_match_as_nft_matches_them(patterns: tuple[str, ...], name: str, is_one: bool) -> None:
    assert matches(patterns, name) is is_one


def test_a_segment_is_observed_by_mode_or_by_name(tmp_path: Path) -> None:
    some = read(tmp_path, LEAST + "[verdicts]\nobserve = ['vni1*']\n")
    assert [some.observes(name) for name in ("vni10", "vni2")] == [True, False]
    assert read(tmp_path, LEAST + "mode = 'observe'\n").observes("vni2")
