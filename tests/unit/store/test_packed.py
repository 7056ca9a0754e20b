"""`Packer.quick` accepts only texts that `decode` accepts, with the same result. It accepts all that portward
writes."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from uuid import UUID

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from inputs.corpus import Case, cases
from inputs.rows import row, write_rows
from portward.base.limits import FIRST_TIME, LAST_TIME
from portward.config.documents import network_text
from portward.model import Attachment, Network, Workload
from portward.store.codec import attachment_key, decode, encode, key_of
from portward.store.packed import Packed, Packer, packed
from portward.store.values import RecordError
from unit.store.samples import CONTOSO, MACHINE, PREFIX, held, opened

RECORDS = cases("records")


QUICK = Packer().quick


def careful(key: str, body: str) -> Packed | None:
    """The result of `decode` for a text; None if `decode` refuses it, or it is no attachment."""
    try:
        record = decode(key, body)
    except RecordError:
        return None
    return packed(record) if isinstance(record, Attachment) else None


def same(key: str, body: str) -> bool:
    """Whether `quick` accepts a text. If it does, its result must be that of `decode`."""
    found = QUICK(key, body)
    assert found is None or found == careful(key, body)
    return found is not None


zones = st.timedeltas(min_value=timedelta(hours=-23), max_value=timedelta(hours=23)).map(
    lambda delta: timezone(timedelta(minutes=delta // timedelta(minutes=1)))
)
networks: st.SearchStrategy[Network] = st.one_of(
    st.builds(
        lambda at, length: IPv4Network((at, length), strict=False), st.ip_addresses(v=4), st.integers(0, 32)
    ),
    st.builds(
        lambda at, length: IPv6Network((at, length), strict=False), st.ip_addresses(v=6), st.integers(0, 128)
    ),
)
attachments = st.builds(
    lambda segment, address, subscription, workload, started: Attachment(
        segment=segment, address=address, subscription=subscription, workload=workload, started=started
    ),
    st.sampled_from(["vni1001", "eth0.5", "ä", "*", "..", "a b", "a" * 16, ""]) | st.text(max_size=16),
    networks,
    st.uuids(),
    st.sampled_from(Workload),
    st.none() | st.datetimes(datetime(1969, 12, 1), datetime(9999, 12, 31), timezones=zones),  # noqa: DTZ001 # theirs
)


@settings(max_examples=500)
@given(attachments)
def test_what_portward_writes(attachment: Attachment) -> None:
    key, body = key_of(attachment), encode(attachment)
    taken = same(key, body)
    if careful(key, body) is not None:
        # The C library writes the end of some IPv6 addresses like an IPv4 address.
        assert taken or "::" in network_text(attachment.address)


# Other spellings of the same values, and values that look almost like them.
addresses = st.one_of(
    networks.map(network_text),
    networks.map(lambda network: network.with_netmask),
    networks.map(lambda network: network.exploded.upper()),
    networks.map(str),
    st.ip_addresses(v=6).map(lambda address: f"{address}%eth0"),
    st.sampled_from(
        ["10.0.0.04", "10.0.0", "10.0.0.4/032", "10.0.0.4/+32", "10.0.0.0/ 24", " 10.0.0.4", "10.0.0.4\0", "0/0",
         "10.0.0.4/", "::/0", "::/00", "0.0.0.0/0", "::ffff:10.0.0.4", "::10.0.0.4", "::ffff:a00:4", "1:0:0:2::",
         "1:2:3:4:5:6:7::", "١٠.0.0.4", "10.0.0.0/٢٤", "::1/64", "10.0.0.0/33", "::/129", "", "/", "4"]
    ),
)  # fmt: skip
bodies = st.fixed_dictionaries(
    {
        "segment": st.sampled_from(["vni1001", "vni1001", "vni1002", "a/b", "", 5, None]),
        "address": addresses,
        "subscription": st.sampled_from(
            ["11111111-0000-4000-8000-00000000000a", "11111111-0000-4000-8000-00000000000a",
             "11111111-0000-4000-8000-00000000000A", "1111111100004000800000000000000a",
             "{11111111-0000-4000-8000-00000000000a}", "x", None, 1]
        ),
    },
    optional={
        "workload": st.sampled_from(["vm", "paas", "paas", "VM", "", None, 1]),
        "started": st.sampled_from(
            [None, "2026-01-10T08:00:00Z", "2026-01-10t08:00:00z", "2026-01-10 08:00:00+01:30",
             "2026-01-10T08:00:00", "2026-01-10", "1970-01-01T12:00:00Z", "1970-01-02T00:00:00Z",
             "1970-01-02T00:00:00.000001+00:00", "1970-01-01T23:59:59.999999Z", "9999-12-30T00:00:00Z",
             "9999-12-30T00:00:00.000001Z", "9999-12-31T23:59:59-23:00", "0001-01-01T00:00:00+23:00", 5, "now"]
        ),
    },
)  # fmt: skip


@settings(max_examples=1_500)
@given(bodies, st.booleans())
@example({"segment": "vni1001", "address": "10.0.0.4", "subscription": str(CONTOSO.id), "more": None}, True)
def test_what_another_tool_writes(body: dict[str, object], spaced: bool) -> None:
    text = msgspec.json.encode(body).decode()
    if spaced:
        text = msgspec.json.format(text, indent=2)
    segment, address = str(body["segment"]), str(body["address"])
    for key in (attachment_key(segment, address), attachment_key("vni1001", "10.0.0.4"), "subscriptions/x"):
        same(key, text)


@settings(max_examples=500)
@given(st.integers(0, len(encode(MACHINE)) - 1), st.characters() | st.just(""))
def test_a_character_that_is_another(at: int, character: str) -> None:
    body = encode(MACHINE)
    same(key_of(MACHINE), body[:at] + character + body[at + 1 :])


@pytest.mark.parametrize("case", RECORDS, ids=lambda case: case.path.stem)
def test_the_corpus(case: Case, tmp_path: Path) -> None:
    """No record that `decode` refuses is accepted."""
    path = tmp_path / "portward.db"
    store = opened(path)
    write_rows(path, case.path.read_text(), row(key_of(MACHINE), encode(MACHINE)))
    assert sum(same(key, body) for key, body in held(store).items()) <= 1
    store.close()


@pytest.mark.parametrize("at", [FIRST_TIME, LAST_TIME, datetime(2026, 1, 10, 8, 0, 0, 1, tzinfo=UTC)])
def test_the_first_and_the_last_instant(at: datetime) -> None:
    assert same(key_of(MACHINE), encode(msgspec.structs.replace(MACHINE, started=at)))


@pytest.mark.parametrize("attachment", [MACHINE, PREFIX], ids=["host", "prefix"])
def test_bytes(attachment: Attachment) -> None:
    found = QUICK(key_of(attachment), encode(attachment))
    assert found is not None
    assert IPv4Network((found.address, found.length)) == attachment.address
    assert UUID(found.subscription) == attachment.subscription


def test_attachments_come_last(tmp_path: Path) -> None:
    """This holds for any other records that another tool has written between them."""
    path = tmp_path / "portward.db"
    store = opened(path)
    write_rows(
        path,
        row(key_of(MACHINE), encode(MACHINE)),
        row("subscriptions/x", "{}"),
        row("exemptions/x", "{}"),
        row("zzz", "{}"),
    )
    keys = list(held(store))
    assert keys.index(key_of(MACHINE)) == len(keys) - 1
    store.close()
