"""The policy table finds a source by its most specific prefix, and writes only changes."""

from __future__ import annotations

import ipaddress
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from ipaddress import ip_address, ip_network
from pathlib import Path
from tempfile import TemporaryDirectory
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from portward.model import (
    Address,
    Attachment,
    Exemption,
    ExemptionState,
    Mode,
    Network,
    RateLimit,
    Reason,
    Record,
    Standing,
    Subscription,
    Workload,
)
from portward.policy import presets
from portward.policy.decide import decide
from portward.table.commits import Answers, Committed
from portward.table.database import TableError
from portward.table.reader import Reader
from portward.table.writer import Writer

NOW = datetime(2026, 6, 1, tzinfo=UTC)
STORE = b"a store's 16 ids"
AZURE = presets.load("azure-2020")
ENFORCE = Answers(observe=False, reject=False)


def subscription(number: int, offer: str = "enterprise-agreement", **more: object) -> Subscription:
    """A subscription of 2022."""
    return Subscription(id=UUID(int=number), offer=offer, created=date(2022, 1, 1), **more)  # type: ignore[arg-type]


def attachment(address: str | Network, number: int, segment: str = "vni1", **more: object) -> Attachment:
    """An attachment of the subscription with that number."""
    return Attachment(segment=segment, address=ip_network(address), subscription=UUID(int=number), **more)  # type: ignore[arg-type]


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[Writer]:
    """A table with segment vni1 behind interface 1, and vni2 behind interface 2."""
    found = Writer(tmp_path / "table", AZURE, ENFORCE)
    load(found, [])
    found.put_links({1: ("vni1", False), 2: ("vni2", False)}, touched=frozenset(), now=NOW)
    yield found
    found.close()


def load(writer: Writer, records: list[Record]) -> Committed:
    """Makes the table hold these records."""
    return writer.replace(records, revision=1, store=STORE, now=NOW)


def reason(writer: Writer, source: str, index: int = 1) -> Reason:
    """The reason that a worker finds."""
    found = writer.reader().lookup(index, ip_address(source).packed)
    assert found is not None
    return found.reason


def places(committed: Committed) -> set[tuple[str, str]]:
    """The changed places as text."""
    return {(place.segment, str(place.network)) for place in committed.changed}


def test_an_unknown_source_in_a_known_segment_is_denied(writer: Writer) -> None:
    assert reason(writer, "10.0.0.4") is Reason.DENIED_UNKNOWN_SOURCE


def test_an_interface_of_no_segment_has_no_finding(writer: Writer) -> None:
    assert writer.reader().lookup(99, b"\x0a\0\0\x04") is None


def test_a_table_without_a_policy_has_no_finding(tmp_path: Path) -> None:
    writer = Writer(tmp_path, AZURE, ENFORCE)
    assert writer.head() is None
    assert writer.reader().lookup(1, b"\x0a\0\0\x04") is None
    writer.close()


def test_a_reader_of_no_table_says_so(tmp_path: Path) -> None:
    with pytest.raises(TableError, match="systemctl restart portward"):
        Reader.open(tmp_path)


def test_segments_are_kept_apart(writer: Writer) -> None:
    load(
        writer,
        [subscription(1), subscription(2, "csp"), attachment("10.0.0.4", 1), attachment("10.0.0.4", 2, "vni2")],
    )
    assert reason(writer, "10.0.0.4", 1) is Reason.ALLOWED_OFFER
    assert reason(writer, "10.0.0.4", 2) is Reason.DENIED_NOT_EXEMPT


def test_families_are_kept_apart(writer: Writer) -> None:
    load(writer, [subscription(1), attachment("0.0.0.0/0", 1)])
    assert reason(writer, "10.0.0.4") is Reason.ALLOWED_OFFER
    assert reason(writer, "2001:db8::4") is Reason.DENIED_UNKNOWN_SOURCE


@pytest.mark.parametrize("source", ["10.0.0.4", "2001:db8::4"])
def test_a_change_of_subscription_changes_all_that_it_holds(writer: Writer, source: str) -> None:
    load(
        writer,
        [
            subscription(1),
            subscription(2),
            attachment(source, 1),
            attachment("10.9.0.0/16", 1),
            attachment("10.8.0.1", 2),
        ],
    )
    before = writer.head()
    committed = writer.apply([subscription(1, "csp")], [], revision=2, now=NOW)
    network = str(ip_network(source))
    assert places(committed) == {("vni1", network), ("vni1", "10.9.0.0/16")}
    assert reason(writer, source) is Reason.DENIED_NOT_EXEMPT
    assert before is not None
    assert committed.generation == before.generation + 1
    assert committed.revision == 2


def test_a_change_that_changes_no_verdict_starts_no_generation(writer: Writer) -> None:
    load(writer, [subscription(1), attachment("10.0.0.4", 1)])
    before = writer.head()
    assert before is not None
    committed = writer.apply(
        [subscription(1, name="renamed", standing=Standing.PAST_DUE)], [], revision=2, now=NOW
    )
    assert not committed.new
    assert (committed.generation, committed.revision) == (before.generation, 2)


def test_one_reason_for_another_of_the_same_kind_needs_no_forgetting(writer: Writer) -> None:
    load(writer, [subscription(1, "csp"), attachment("10.0.0.4", 1)])
    asked = Exemption(subscription=UUID(int=1), state=ExemptionState.REQUESTED)
    committed = writer.apply([asked], [], revision=2, now=NOW)
    assert not committed.new
    assert reason(writer, "10.0.0.4") is Reason.DENIED_PENDING


def test_an_attachment_that_moves_to_another_customer_is_forgotten(writer: Writer) -> None:
    """This holds even if both may send, because its packets count for the other customer from now on."""
    load(writer, [subscription(1), subscription(2), attachment("10.0.0.4", 1)])
    committed = writer.apply([attachment("10.0.0.4", 2)], [], revision=2, now=NOW)
    assert places(committed) == {("vni1", "10.0.0.4/32")}
    changed = writer.apply([subscription(1, "csp")], [], revision=3, now=NOW)
    assert not changed.new, "the first customer holds nothing any more"
    assert reason(writer, "10.0.0.4") is Reason.ALLOWED_OFFER


def test_a_removed_attachment_uncovers_the_prefix_around_it(writer: Writer) -> None:
    load(
        writer, [subscription(1), subscription(2, "csp"), attachment("10.0.0.0/24", 2), attachment("10.0.0.4", 1)]
    )
    committed = writer.apply([], [attachment("10.0.0.4", 1)], revision=2, now=NOW)
    assert places(committed) == {("vni1", "10.0.0.4/32")}
    assert reason(writer, "10.0.0.4") is Reason.DENIED_NOT_EXEMPT
    writer.apply([], [attachment("10.0.0.0/24", 2)], revision=3, now=NOW)
    assert reason(writer, "10.0.0.4") is Reason.DENIED_UNKNOWN_SOURCE


def test_a_removed_subscription_leaves_its_sources_unknown(writer: Writer) -> None:
    load(writer, [subscription(1), attachment("10.0.0.4", 1)])
    writer.apply([], [subscription(1)], revision=2, now=NOW)
    assert reason(writer, "10.0.0.4") is Reason.DENIED_UNKNOWN_SOURCE
    writer.apply([subscription(1)], [], revision=3, now=NOW)
    assert reason(writer, "10.0.0.4") is Reason.ALLOWED_OFFER


def test_accounts_without_records_are_dropped(writer: Writer) -> None:
    load(writer, [subscription(1), attachment("10.0.0.4", 1)])
    writer.apply([], [attachment("10.0.0.4", 1), subscription(1)], revision=2, now=NOW)
    assert writer.reader().counts() == (0, 0)


def test_a_grant_ends_when_its_time_comes(writer: Writer) -> None:
    until = NOW + timedelta(days=1)
    grant = Exemption(
        subscription=UUID(int=1), state=ExemptionState.GRANTED, decided=NOW - timedelta(days=2), until=until
    )
    load(writer, [subscription(1, "csp"), grant, attachment("10.0.0.4", 1, started=NOW - timedelta(days=1))])
    assert reason(writer, "10.0.0.4") is Reason.ALLOWED_EXEMPT
    assert writer.next_expiry() == until
    assert not writer.decide_due(now=until - timedelta(microseconds=1)).new
    assert places(writer.decide_due(now=until)) == {("vni1", "10.0.0.4/32")}
    assert reason(writer, "10.0.0.4") is Reason.DENIED_NOT_EXEMPT
    assert writer.next_expiry() is None


@pytest.mark.parametrize("granted_first", [True, False])
def test_a_start_that_is_recorded_for_later_counts_when_its_time_has_come(
    writer: Writer, granted_first: bool
) -> None:
    start = NOW + timedelta(hours=1)
    grant = Exemption(subscription=UUID(int=1), state=ExemptionState.GRANTED, decided=NOW - timedelta(days=2))
    machine = attachment("10.0.0.4", 1, started=start)
    load(writer, [subscription(1, "csp"), *([grant] if granted_first else [machine])])
    writer.apply([machine if granted_first else grant], [], revision=2, now=NOW)
    assert reason(writer, "10.0.0.4") is Reason.DENIED_RESTART_REQUIRED
    assert writer.next_expiry() == start
    assert not writer.decide_due(now=start - timedelta(microseconds=1)).new
    assert places(writer.decide_due(now=start)) == {("vni1", "10.0.0.4/32")}
    assert reason(writer, "10.0.0.4") is Reason.ALLOWED_EXEMPT
    assert writer.next_expiry() is None


def test_a_limit_stands_in_the_finding_and_another_one_makes_its_sources_new(writer: Writer) -> None:
    def grant(rate: int | None) -> Exemption:
        limit = None if rate is None else RateLimit(per_minute=rate)
        return Exemption(
            subscription=UUID(int=1), state=ExemptionState.GRANTED, decided=NOW - timedelta(days=2), limit=limit
        )

    def limited() -> bool:
        found = writer.reader().lookup(1, ip_address("10.0.0.4").packed)
        assert found is not None
        assert found.reason is Reason.ALLOWED_EXEMPT
        return found.limited

    machine = attachment("10.0.0.4", 1, started=NOW - timedelta(days=1))
    load(writer, [subscription(1, "csp"), grant(None), subscription(2), machine, attachment("10.0.0.5", 2)])
    assert not limited()
    for revision, rate in enumerate((60, 30, None), start=2):
        changed = writer.apply([grant(rate)], [], revision=revision, now=NOW)
        assert places(changed) == {("vni1", "10.0.0.4/32")}
        assert limited() is (rate is not None)
        assert not writer.apply([grant(rate)], [], revision=revision, now=NOW).new
    other = writer.reader().lookup(1, ip_address("10.0.0.5").packed)
    assert other is not None
    assert not other.limited


def test_a_grant_that_is_replaced_takes_its_end_with_it(writer: Writer) -> None:
    def grant(until: datetime | None) -> Exemption:
        return Exemption(subscription=UUID(int=1), state=ExemptionState.GRANTED, decided=NOW, until=until)

    load(writer, [subscription(1, "csp"), grant(NOW + timedelta(days=1))])
    writer.apply([grant(NOW + timedelta(days=9))], [], revision=2, now=NOW)
    assert writer.next_expiry() == NOW + timedelta(days=9)
    writer.apply([grant(None)], [], revision=3, now=NOW)
    assert writer.next_expiry() is None


def test_another_preset_decides_everything_again(tmp_path: Path) -> None:
    writer = Writer(tmp_path, AZURE, ENFORCE)
    load(writer, [subscription(1), subscription(2, "pay-as-you-go"), attachment("10.0.0.4", 1)])
    writer.put_links({1: ("vni1", False)}, touched=frozenset(), now=NOW)
    writer.preset = presets.load("google")
    assert places(writer.decide_due(now=NOW)) == {("vni1", "10.0.0.4/32")}
    assert reason(writer, "10.0.0.4") is Reason.DENIED_INELIGIBLE
    assert not writer.decide_due(now=NOW).new, "and only once"
    writer.close()


def test_other_answers_make_everything_new(writer: Writer) -> None:
    load(writer, [subscription(1, "csp"), attachment("10.0.0.4", 1)])
    writer.answers = Answers(observe=True, reject=True)
    assert writer.decide_due(now=NOW).everything
    found = writer.reader().lookup(1, ip_address("10.0.0.4").packed)
    assert found is not None
    assert (found.observed, found.reject) == (True, True)
    assert not writer.decide_due(now=NOW).new


@pytest.mark.parametrize("where", ["segment", "subscription"])
def test_observing_a_segment_or_a_subscription(writer: Writer, where: str) -> None:
    mode = Mode.OBSERVE if where == "subscription" else Mode.ENFORCE
    load(writer, [subscription(1, "csp", mode=mode), attachment("10.0.0.4", 1)])
    writer.put_links({1: ("vni1", where == "segment")}, touched=frozenset(), now=NOW)
    found = writer.reader().lookup(1, ip_address("10.0.0.4").packed)
    assert found is not None
    assert found.observed


def test_links_that_changed_or_were_touched_are_returned(writer: Writer) -> None:
    def put(want: dict[int, tuple[str, bool]], *touched: int) -> set[int]:
        return set(writer.put_links(want, touched=frozenset(touched), now=NOW).links)

    same = {1: ("vni1", False), 2: ("vni2", False)}
    assert put(same) == set()
    assert put(same, 2) == {2}, "deleted and made again under the same name"
    assert put(same, 7) == set(), "never a segment"
    assert put({1: ("vni2", False), 3: ("vni1", False)}) == {1, 2, 3}
    assert writer.reader().lookup(2, b"\x0a\0\0\x04") is None


def test_a_reader_elsewhere_follows_each_commit(writer: Writer, tmp_path: Path) -> None:
    load(writer, [subscription(1), attachment("10.0.0.4", 1)])
    reader = writer.reader()
    assert reader.lookup(1, ip_address("10.0.0.4").packed).reason is Reason.ALLOWED_OFFER  # type: ignore[union-attr]
    writer.apply(
        [attachment("10.0.0.0/28", 1), subscription(1, "csp")], [attachment("10.0.0.4", 1)], revision=2, now=NOW
    )
    assert reader.lookup(1, ip_address("10.0.0.4").packed).reason is Reason.DENIED_NOT_EXEMPT  # type: ignore[union-attr]


def test_a_table_outlives_its_process(tmp_path: Path) -> None:
    writer = Writer(tmp_path, AZURE, ENFORCE)
    load(writer, [subscription(1), attachment("10.0.0.4", 1)])
    head = writer.head()
    writer.close()
    again = Writer(tmp_path, AZURE, ENFORCE)
    assert again.head() == head
    again.put_links({1: ("vni1", False)}, touched=frozenset(), now=NOW)
    assert reason(again, "10.0.0.4") is Reason.ALLOWED_OFFER
    again.close()


def test_a_full_table_grows_and_loses_nothing(tmp_path: Path) -> None:
    writer = Writer(tmp_path, AZURE, ENFORCE, map_size=1 << 18)
    load(writer, [subscription(1)])
    writer.put_links({1: ("vni1", False)}, touched=frozenset(), now=NOW)
    first = int(ip_address("10.0.0.0"))
    many: list[Record] = [attachment(str(ip_address(first + number)), 1) for number in range(20_000)]
    committed = writer.apply(many, [], revision=2, now=NOW)
    assert len(committed.changed) == 20_000
    assert writer.reader().counts() == (20_000, 1)
    assert reason(writer, "10.0.78.31") is Reason.ALLOWED_OFFER
    writer.close()


def test_beyond_many_changes_everything_is_new(writer: Writer) -> None:
    first = int(ip_address("10.0.0.0"))
    many: list[Record] = [attachment(str(ip_address(first + number)), 1) for number in range(20_001)]
    assert writer.apply([subscription(1), *many], [], revision=2, now=NOW).everything


def test_beyond_many_changes_the_other_sources_of_who_has_changed_are_decided_too(writer: Writer) -> None:
    """An example is a revocation in the same step as a large inventory."""
    load(writer, [subscription(1), subscription(2), attachment("192.0.2.4", 1)])
    assert reason(writer, "192.0.2.4").allows
    first = int(ip_address("10.0.0.0"))
    many: list[Record] = [attachment(str(ip_address(first + number)), 2) for number in range(20_001)]
    revoked = subscription(1, standing=Standing.DISABLED)
    assert writer.apply([revoked, *many], [], revision=2, now=NOW).everything
    assert reason(writer, "192.0.2.4") is Reason.DENIED_DISABLED


OFFERS = ("enterprise-agreement", "csp", "msdn", "azure-sponsorship")
NETWORKS = [
    ip_network(text)
    for text in ("0.0.0.0/0", "10.0.0.0/8", "10.0.0.0/24", "10.0.0.0/30", "10.0.0.1", "10.0.0.2", "::/0",
                 "2001:db8::/32", "2001:db8::/64", "2001:db8::1")
]  # fmt: skip
SOURCES = [
    ip_address(text)
    for text in ("10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.9", "10.9.9.9", "192.0.2.1",
                 "2001:db8::1", "2001:db8::2", "2001:db8:1::1", "2001:dead::1")
]  # fmt: skip

subscriptions = st.builds(
    subscription,
    st.integers(1, 4),
    st.sampled_from(OFFERS),
    standing=st.sampled_from(Standing),
    mode=st.sampled_from(Mode),
)
attachments = st.builds(
    attachment,
    st.sampled_from(NETWORKS),
    st.integers(1, 4),
    st.sampled_from(["vni1", "vni2"]),
    workload=st.sampled_from(Workload),
    started=st.sampled_from([None, NOW - timedelta(days=3), NOW]),
)
exemptions = st.builds(
    lambda number, state, decided: Exemption(subscription=UUID(int=number), state=state, decided=decided),
    st.integers(1, 4),
    st.sampled_from(ExemptionState),
    st.sampled_from([NOW - timedelta(days=1), NOW - timedelta(days=5)]),
)
records = st.one_of(subscriptions, attachments, exemptions)
steps = st.lists(st.tuples(st.booleans(), records), max_size=25)


def identity(record: Record) -> tuple[object, ...]:
    """The identity of a record. A record replaces another one with the same identity."""
    match record:
        case Attachment():
            return ("attachment", record.segment, record.address)
        case Subscription():
            return ("subscription", record.id)
        case Exemption():
            return ("exemption", record.subscription)


def expected(held: dict[tuple[object, ...], Record], segment: str, source: Address) -> tuple[Reason, bool]:
    """The reason of a source, and whether it is observed, from the records alone."""
    covering = [
        record
        for record in held.values()
        if isinstance(record, Attachment)
        and record.segment == segment
        and record.address.version == source.version
        and source in record.address
    ]
    if not covering:
        return Reason.DENIED_UNKNOWN_SOURCE, False
    best = max(covering, key=lambda record: record.address.prefixlen)
    owner = held.get(("subscription", best.subscription))
    grant = held.get(("exemption", best.subscription))
    assert owner is None or isinstance(owner, Subscription)
    assert grant is None or isinstance(grant, Exemption)
    decision = decide(AZURE, subscription=owner, exemption=grant, attachment=best, now=NOW)
    return decision.reason, owner is not None and owner.mode is Mode.OBSERVE


@settings(max_examples=60, deadline=None)
@given(steps)
def test_step_by_step_the_table_says_what_the_records_say(changes: list[tuple[bool, Record]]) -> None:
    """The table is compared with records in a dict. Each source whose verdict differs lies in the reported
    changes."""
    with TemporaryDirectory() as folder:
        writer = Writer(Path(folder), AZURE, ENFORCE)
        load(writer, [])
        writer.put_links({1: ("vni1", False), 2: ("vni2", False)}, touched=frozenset(), now=NOW)
        reader = writer.reader()
        held: dict[tuple[object, ...], Record] = {}
        before = {(index, source): reader.lookup(index, source.packed) for index in (1, 2) for source in SOURCES}
        for number, (keep, record) in enumerate(changes):
            if keep:
                held[identity(record)] = record
            else:
                held.pop(identity(record), None)
            put, gone = ([record], []) if keep else ([], [record])
            committed = writer.apply(put, gone, revision=number + 2, now=NOW)
            for (index, source), old in before.items():
                found = reader.lookup(index, source.packed)
                assert found is not None
                assert old is not None
                assert (found.reason, found.observed) == expected(held, f"vni{index}", source)
                if (found.reason.allows, found.observed) != (old.reason.allows, old.observed):
                    assert any(
                        place.segment == f"vni{index}" and ipaddress.ip_address(str(source)) in place.network
                        for place in committed.changed
                    )
                before[index, source] = found
        writer.close()


def test_a_reader_in_another_process_goes_on_when_the_table_grows(tmp_path: Path) -> None:
    """A worker is such a reader. The map that it opened is too small for later writes."""
    writer = Writer(tmp_path, AZURE, ENFORCE, map_size=1 << 18)
    load(writer, [subscription(1), attachment("10.0.0.4", 1)])
    writer.put_links({1: ("vni1", False)}, touched=frozenset(), now=NOW)
    program = f"""
import sys
from ipaddress import ip_address
from pathlib import Path
from portward.table import database
database.MAP_SIZE = 1 << 18
database.open_database.__kwdefaults__["map_size"] = 1 << 18
from portward.table.reader import Reader
reader = Reader.open(Path({str(tmp_path)!r}))
for line in sys.stdin:
    print(reader.lookup(1, ip_address(line.strip()).packed).reason, flush=True)
"""
    argv = [sys.executable, "-c", program]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("10.0.0.4\n")
        assert process.stdout.readline().strip() == "allowed-offer"
        first = int(ip_address("10.1.0.0"))
        many: list[Record] = [attachment(str(ip_address(first + number)), 1) for number in range(20_000)]
        writer.apply(many, [], revision=2, now=NOW)
        process.stdin.write("10.1.78.31\n")
        assert process.stdout.readline().strip() == "allowed-offer"
        process.stdin.close()
    writer.close()


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_all_addresses_that_a_finding_reaches_are_found_like_it(data: st.DataObject) -> None:
    """`reach` gives the range of addresses that share a lookup result. Every address in the range has the same
    range, so that cached ranges never overlap."""
    # A few addresses close together, so that prefixes hold, touch and follow each other.
    base, size = data.draw(st.sampled_from([("10.0.0.0", 4), ("2001:db8::", 16)]))
    first, bits = int(ip_address(base)), size * 8
    prefixes = data.draw(
        st.lists(st.tuples(st.integers(0, 63), st.sampled_from([0, 1, 2, 4, 8, bits])), max_size=6)
    )
    records: dict[Network, Record] = {}
    for offset, width in prefixes:
        wide = ip_network((ip_address(first + offset), bits - width), strict=False)
        records[wide] = attachment(wide, data.draw(st.sampled_from([1, 2])))
    subscriptions = [subscription(1), subscription(2, "pay-as-you-go")]
    with TemporaryDirectory() as folder:
        writer = Writer(Path(folder), AZURE, ENFORCE)
        load(writer, [*subscriptions, *records.values(), attachment(f"{base}/{bits}", 1, "vni2")])
        writer.put_links({1: ("vni1", False), 2: ("vni2", False)}, touched=frozenset(), now=NOW)
        reader = writer.reader()
        with reader.view():
            for offset in range(66):
                source = (first + offset).to_bytes(size, "big")
                low, high = reader.reach(1, source)
                assert low <= first + offset <= high
                for other in range(max(low, first), min(high, first + 70) + 1):
                    packed = other.to_bytes(size, "big")
                    assert reader.lookup(1, packed) == reader.lookup(1, source)
                    assert reader.reach(1, packed) == (low, high)
            if not prefixes:
                assert reader.reach(1, ip_address(base).packed) == (0, (1 << bits) - 1), (
                    "what vni2 holds is not met"
                )
        writer.close()


def test_a_view_shows_one_commit_and_ends(writer: Writer) -> None:
    load(writer, [subscription(1), attachment("10.0.0.4", 1)])
    reader = writer.reader()
    with reader.view() as before:
        writer.apply([subscription(1, "pay-as-you-go")], [], revision=2, now=NOW)
        found = reader.lookup(1, ip_address("10.0.0.4").packed)
        assert found is not None
        assert found.reason.allows
    with reader.view() as after:
        found = reader.lookup(1, ip_address("10.0.0.4").packed)
        assert found is not None
        assert not found.reason.allows
    assert before != after
    assert reason(writer, "10.0.0.4") is Reason.DENIED_NOT_EXEMPT
    writer.apply([subscription(1)], [], revision=3, now=NOW)
    assert reason(writer, "10.0.0.4").allows, "no view is left open"


def test_a_change_says_whether_it_may_stop_packets(writer: Writer) -> None:
    """If it cannot stop packets, no cached allow is wrong after it."""
    load(writer, [subscription(1), attachment("10.0.0.0/24", 1), attachment("10.0.0.4", 1)])
    revoked = writer.apply([subscription(1, "csp")], [], revision=2, now=NOW)
    assert (bool(revoked.changed), revoked.closes) == (True, True)
    allowed = writer.apply([subscription(1)], [], revision=3, now=NOW)
    assert (bool(allowed.changed), allowed.closes) == (True, False)
    # Until now the allowed /24 around it covered this address.
    narrower = writer.apply([subscription(2, "csp"), attachment("10.0.0.5", 2)], [], revision=4, now=NOW)
    assert (bool(narrower.changed), narrower.closes) == (True, True)
    gone = writer.apply([], [attachment("10.0.0.5", 2)], revision=5, now=NOW)
    assert (bool(gone.changed), gone.closes) == (True, True)


def test_a_change_says_whether_it_may_let_packets_pass(writer: Writer) -> None:
    """If it cannot let packets pass, cached denials are still right, so it is in force before they are
    forgotten."""
    load(writer, [subscription(1), attachment("10.0.0.0/24", 1), attachment("10.0.0.4", 1)])
    revoked = writer.apply([subscription(1, "csp")], [], revision=2, now=NOW)
    assert (bool(revoked.changed), revoked.opens) == (True, False)
    allowed = writer.apply([subscription(1)], [], revision=3, now=NOW)
    assert (bool(allowed.changed), allowed.opens) == (True, True)
    narrower = writer.apply([subscription(2, "csp"), attachment("10.0.0.5", 2)], [], revision=4, now=NOW)
    assert (bool(narrower.changed), narrower.opens) == (True, False)
    # From now on the allowed /24 around it covers this address.
    gone = writer.apply([], [attachment("10.0.0.5", 2)], revision=5, now=NOW)
    assert (bool(gone.changed), gone.opens) == (True, True)
