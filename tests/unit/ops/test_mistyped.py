"""A warning for segments of an inventory that this host lacks."""

from __future__ import annotations

from datetime import UTC, date, datetime
from ipaddress import ip_network
from uuid import UUID

from portward.config.keys import Config, InterfaceGroup
from portward.model import Attachment, Record, Subscription
from portward.ops.mistyped import in_groups, segments_of, warnings
from portward.store.codec import encode, key_of
from portward.store.sqlite.store import SqliteStore
from portward.store.values import Put

CONFIG = Config(segments=("vni*", "tap7"), uplinks=("up0",))
HERE = ("lo", "up0", "vni1001", "vni1002")


def test_segments_are_those_of_attachments_each_once() -> None:
    keys = [
        "subscriptions/11111111-0000-4000-8000-000000000002",
        "attachments/vni1001/10.0.0.4",
        "attachments/vni1001/10.0.0.0/24",
        "attachments/vni1002/10.0.0.4",
        "confirmed",
    ]
    assert segments_of(keys) == ["vni1001", "vni1002"]


def test_a_segment_that_is_here_is_no_mistake() -> None:
    assert list(warnings(CONFIG, ["vni1001"], HERE)) == []


def test_a_segment_that_this_configuration_does_not_match_is_warned_of() -> None:
    (line,) = warnings(CONFIG, ["vmi1001"], HERE)
    assert line == (
        "segment vmi1001: none of `segments` in the configuration (vni*, tap7), so this gateway enforces nothing "
        "there"
    )


def test_one_that_matches_and_is_no_interface_here_is_warned_of_with_the_nearest() -> None:
    (line,) = warnings(CONFIG, ["vni10022"], HERE)
    assert line == "segment vni10022: this host has no such interface now; did you mean 'vni1002'?"
    (line,) = warnings(CONFIG, ["tap7"], HERE)
    assert line == "segment tap7: this host has no such interface now"


def test_a_host_without_segments_is_no_gateway() -> None:
    assert list(warnings(CONFIG, ["vni10022"], ("lo", "eth0"))) == []
    assert len(list(warnings(CONFIG, ["vmi1001"], ()))) == 1


def test_many_are_counted() -> None:
    lines = list(warnings(CONFIG, [f"x{number}" for number in range(9)], HERE))
    assert len(lines) == 6
    assert lines[-1] == "and 4 more segments like these"


# --- interface groups ---

GROUPS = (
    InterfaceGroup(name="calico", interfaces=("cali*",)),
    InterfaceGroup(name="acme", interfaces=("eth2", "eth3")),
)
GROUPED = Config(segments=("vni*",), uplinks=("up0",), groups=GROUPS)


def test_an_interface_in_the_place_of_its_group_is_warned_of() -> None:
    (line,) = warnings(GROUPED, ["cali12"], ("vni1001", "cali12"))
    assert line == (
        "segment cali12: this interface belongs to group calico here, so name the group; its attachments do "
        "nothing on this gateway"
    )


def test_a_group_is_no_mistake_unless_it_has_no_interface_here() -> None:
    assert list(warnings(GROUPED, ["calico", "vni1001"], ("vni1001", "cali12"))) == []
    (line,) = warnings(GROUPED, ["acme"], ("vni1001", "cali12"))
    assert line == "segment acme: this host has no interface of this group now"


def test_the_groups_are_among_the_segments_that_there_are() -> None:
    (line,) = warnings(GROUPED, ["calicoo"], ("cali12",))
    assert line.startswith("segment calicoo: this interface belongs to group calico here"), "its pattern matches"
    (line,) = warnings(GROUPED, ["kalico"], ("cali12",))
    assert "(vni*, group calico (cali*), group acme (eth2, eth3))" in line


def test_the_attachments_of_a_store_to_interfaces_of_groups_are_found(store: SqliteStore) -> None:
    id_ = UUID(int=7)
    records: list[Record] = [
        Attachment(segment=segment, address=ip_network(address), subscription=id_)
        for segment, address in (
            ("calico", "10.0.0.4"), ("cali1", "10.0.0.4"), ("cali1", "10.0.0.5"), ("eth3", "10.0.0.0/24"),
            ("eth33", "10.0.0.4"), ("vni1", "10.0.0.4"),
        )
    ]  # fmt: skip
    owner = Subscription(id=id_, offer="csp", created=date(2022, 6, 30))
    batch = [Put(key_of(record), encode(record)) for record in [owner, *records]]
    store.write(batch, expected=0, actor="test", at=datetime.now(UTC))
    found = list(in_groups(GROUPED, store))
    assert [line.partition(":")[0] for line in found] == ["segment cali1", "segment eth3"]
    assert found[0].endswith("so name the group; its attachments do nothing on this gateway")
    assert list(in_groups(CONFIG, store)) == []
