"""One boundary decides which values are valid. All code behind it can hold every valid value, and no invalid value
is stored."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, date, datetime, timedelta, timezone
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from uuid import UUID

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from typer.testing import CliRunner

from portward.base import limits
from portward.cli.program import app
from portward.cli.times import instant
from portward.dataplane.rate_limits import Bucket
from portward.errors import InputError
from portward.inventory.files import read_inventory
from portward.inventory.records import mistakes
from portward.model import (
    Attachment,
    Authentication,
    Details,
    Exemption,
    ExemptionState,
    FraudCheck,
    Mode,
    RateLimit,
    Record,
    Standing,
    Subscription,
    Workload,
)
from portward.store.codec import decode, encode, key_of
from portward.store.validity import flaws
from portward.store.values import Put, RecordError
from portward.table.follower import Follower
from portward.table.invariants import verify
from portward.table.writer import Writer
from unit.store.samples import FABRIKAM, GRANT, MACHINE, NOON, opened, write
from unit.table.test_table import AZURE, ENFORCE

OWNER = UUID(int=7)
HOUR = timezone(timedelta(hours=-1))
BEYOND_TIME = (
    "9999-12-31T23:59:59-01:00",
    "9999-12-31T00:00:00Z",
    "0001-01-01T00:00:00+01:00",
    "0001-01-01",
    "1970-01-01T00:00:00Z",
    "1970-01-02T00:00:00+00:01",
    "9999-12-31",
)
NO_TIME = ("2023-02-29T00:00:00Z", "2024-02-29T24:00:00Z", "2024-02-30", "2026-06-01T00:00:00", "10000-01-01", "")
GOOD_TIME = (
    "2024-02-29",
    "2024-02-29T23:59:59-23:59",
    "9999-12-30",
    "1970-01-02T00:00:00Z",
    "2027-01-09T12:00:00Z",
)

times = st.datetimes(datetime(1, 1, 2), datetime(9999, 12, 30), timezones=st.just(UTC)) | st.sampled_from(  # noqa: DTZ001 # hypothesis puts the zone in
    (limits.FIRST_TIME, limits.LAST_TIME)
)
texts = st.text(max_size=40) | st.sampled_from(
    ("", "a\0b", "é" * limits.MAX_NAME_CHARS, "x" * (limits.MAX_NAME_CHARS + 1))
)
counts = st.integers(-1, 2**70) | st.sampled_from(
    (1, limits.MAX_MESSAGES_PER_DAY, limits.MAX_MESSAGES_PER_DAY + 1, 2**63, 2**64)
)
subscriptions = st.builds(
    Subscription,
    id=st.just(OWNER),
    offer=st.sampled_from(("pay-as-you-go", "enterprise-agreement")) | texts,
    created=st.dates(),
    name=texts,
    standing=st.sampled_from(Standing),
    payment_history=st.booleans(),
    mode=st.sampled_from(Mode),
)
exemptions = st.builds(
    Exemption,
    subscription=st.just(OWNER),
    state=st.sampled_from(ExemptionState),
    requested=st.none() | times,
    decided=st.none() | times,
    until=st.none() | times,
    by=texts,
    justification=texts,
    reason=texts,
    details=st.none() | st.builds(
        Details,
        mail_software=texts,
        volume=st.none() | counts,
        reverse_dns=texts,
        authentication=st.lists(st.sampled_from(Authentication), max_size=3).map(tuple),
        terms_accepted=st.booleans(),
    ),
    fraud_check=st.none() | st.sampled_from(FraudCheck),
    fraud_note=texts,
    limit=st.none() | st.builds(RateLimit, per_minute=counts, burst=counts),
)  # fmt: skip
attachments = st.builds(
    Attachment,
    segment=st.sampled_from(("vni1", "a" * 15, "a" * 16, "vni*", "", "\udcff", "eth0:1")),
    address=st.sampled_from((ip_network("10.0.0.1"), ip_network("10.0.0.0/8"), ip_network("2001:db8::/64"))),
    subscription=st.just(OWNER),
    workload=st.sampled_from(Workload),
    started=st.none() | times,
)


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with TemporaryDirectory() as made:
        yield Path(made)


@settings(max_examples=60, deadline=None)
@given(subscription=subscriptions, exemption=exemptions, attachment=attachments)
def test_what_the_boundary_takes_goes_through_store_table_and_kernel_text(
    folder: Path, subscription: Subscription, exemption: Exemption, attachment: Attachment
) -> None:
    taken = [record for record in (subscription, exemption, attachment) if not list(flaws(record))]
    with TemporaryDirectory(dir=folder) as made:
        place = Path(made)
        with (
            closing(opened(place / "portward.db")) as store,
            closing(Writer(place / "t", AZURE, ENFORCE)) as writer,
        ):
            write(store, *(Put(key_of(record), encode(record)) for record in taken))
            follower = Follower(store, writer)
            follower.step(NOON)
            assert follower.refused == 0
            writer.put_links({1: ("vni1", False), 2: ("a" * 15, False)}, touched=frozenset(), now=NOON)
            # The same again, as a change of an existing table.
            write(store, Put("subscriptions/" + str(UUID(int=8)), encode(replace(FABRIKAM, id=UUID(int=8)))))
            write(store, *(Put(key_of(record), None) for record in taken))
            follower.step(NOON)
            write(store, *(Put(key_of(record), encode(record)) for record in taken))
            follower.step(NOON)
            assert follower.refused == 0
            reader = writer.reader()
            for link in (1, 2):
                reader.lookup(link, ip_network("10.0.0.1").network_address.packed)
            for record in taken:
                if not (isinstance(record, Attachment) and record.started is not None):
                    assert reader.record_like(record) == record
                if isinstance(record, Exemption) and record.limit is not None:
                    bucket = Bucket.of(1, record.limit)
                    assert (bucket.per_minute, bucket.burst) == (record.limit.per_minute, record.limit.burst)
            now = NOON
            while (due := writer.next_expiry()) is not None and due < limits.LAST_TIME:
                now = due
                writer.decide_due(now=now)
        assert verify(place / "t", now).broken == 0


@settings(max_examples=100, deadline=None)
@given(record=subscriptions | exemptions | attachments)
def test_a_store_takes_exactly_what_the_boundary_takes(record: Record) -> None:
    try:
        body = msgspec.json.encode(record, enc_hook=str).decode()
    except UnicodeEncodeError:  # JSON cannot hold this text
        assert list(flaws(record))
        return
    if list(flaws(record)):
        with pytest.raises(RecordError):
            decode(key_of(record), body)
    else:
        assert decode(key_of(record), encode(record)) == record


@pytest.mark.parametrize("text", BEYOND_TIME)
def test_a_time_out_of_range_is_refused_by_name_wherever_a_time_is_read(text: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^--until: .* is out of range: from 1970-01-02 to 9999-12-30"):
        instant(text, "--until")
    if "T" in text:  # a day alone is no time in a document
        file = tmp_path / "inventory.yaml"
        file.write_text(
            f"exemptions:\n  - subscription: {OWNER}\n    state: granted\n    decided: 2026-01-01T00:00:00Z\n"
            f"    until: {text}\n"
        )
        with pytest.raises(InputError, match=r"inventory.yaml:5: exemptions\[0\].until: .* is out of range"):
            read_inventory([str(file)])
        key = f"exemptions/{OWNER}"
        with pytest.raises(RecordError, match=r"until: .* is out of range"):
            decode(key, f'{{"subscription":"{OWNER}","state":"granted","until":"{text}"}}')


@pytest.mark.parametrize("text", NO_TIME)
def test_what_is_no_time_is_refused_with_what_would_be_right(text: str) -> None:
    with pytest.raises(InputError, match=r"^--until: .*(is no time|has no time zone)"):
        instant(text, "--until")


@pytest.mark.parametrize("text", GOOD_TIME)
def test_a_time_at_the_edge_is_taken(text: str) -> None:
    found = instant(text, "--until")
    assert found is not None
    assert found.tzinfo is UTC


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (("request", FABRIKAM.id, "--volume", 2**64), "less than or equal to 1000000000000"),
        (("request", FABRIKAM.id, "--volume", 2**63), "less than or equal to 1000000000000"),
        (("request", FABRIKAM.id, "--until", "9999-12-31T23:59:59-01:00"), "is out of range"),
        (("request", FABRIKAM.id, "--mail-software", "x" * 1_001), "1001 characters are too many"),
        (("request", FABRIKAM.id, "--justification", "x" * 100_001), "100001 characters are too many"),
        (("grant", FABRIKAM.id, "--rate", 2**64), "less than or equal to 1000000"),
        (("grant", FABRIKAM.id, "--rate", 1, "--burst", 2**32), "less than or equal to 100000"),
    ],
)
def test_a_flag_beyond_its_limit_is_refused_with_a_sentence_and_nothing_is_written(
    tmp_path: Path, options: tuple[Any, ...], problem: str
) -> None:
    path = tmp_path / "portward.db"
    config = tmp_path / "portward.toml"
    config.write_text(f'segments = ["vni*"]\nuplinks = ["up0"]\nstore = "sqlite:{path}"\n')
    with closing(opened(path)) as store:
        write(store, Put(key_of(FABRIKAM), encode(FABRIKAM)))
    argv = ["exemption", *map(str, options), "--config", str(config)]
    result = CliRunner().invoke(app, argv)
    message = f"{result.stderr} {result.exception or ''}".replace("\n", " ")
    assert problem in " ".join(message.replace("│", " ").split())
    assert isinstance(result.exception, InputError | SystemExit)
    assert result.exit_code != 0
    with closing(opened(path)) as store:
        assert store.revision() == 1


@pytest.mark.parametrize(
    "argv",
    [
        ("audit", "--since", 2**64),
        ("audit", "--last", 2**64),
        ("top", "--interval", "nan"),
        ("top", "--interval", "inf"),
        ("top", "--interval", "1e300"),
    ],
)
def test_a_number_that_no_system_call_takes_is_refused(tmp_path: Path, argv: tuple[Any, ...]) -> None:
    config = tmp_path / "portward.toml"
    config.write_text(f'segments = ["vni*"]\nuplinks = ["up0"]\nstore = "sqlite:{tmp_path / "portward.db"}"\n')
    opened(tmp_path / "portward.db").close()
    result = CliRunner().invoke(app, [*map(str, argv), "--config", str(config)])
    assert isinstance(result.exception, SystemExit)
    assert "is not in the range" in result.stderr or "less than or equal to" in result.stderr


def test_a_record_that_a_verb_made_is_checked_like_one_that_was_read() -> None:
    huge = replace(GRANT, details=Details(volume=2**64), limit=RateLimit(per_minute=0, burst=10**9))
    assert {field for field, _ in mistakes(huge)} == {"details.volume", "limit.per_minute", "limit.burst"}
    late = replace(MACHINE, started=datetime(9999, 12, 31, 23, 59, 59, tzinfo=HOUR))
    assert [field for field, _ in mistakes(late)] == ["started"]


def test_the_right_value_stands_in_the_message_of_each_reader(tmp_path: Path) -> None:
    file = tmp_path / "inventory.json"
    file.write_text(
        f'{{"exemptions":[{{"subscription":"{OWNER}","state":"requested",\n"details":{{"volume":{2**64}}}}}]}}'
    )
    with pytest.raises(
        InputError, match=r"json:2: exemptions\[0\].details.volume: .* at most 1000000000000, got 1844"
    ):
        read_inventory([str(file)])


def test_networks_and_dates_have_no_edge_that_the_table_cannot_hold() -> None:
    for network in (IPv4Network("0.0.0.0/0"), IPv6Network("::/0"), IPv4Network("255.255.255.255/32")):
        assert not list(flaws(replace(MACHINE, address=network)))
    for day in (date.min, date.max):
        assert not list(flaws(replace(FABRIKAM, created=day)))
