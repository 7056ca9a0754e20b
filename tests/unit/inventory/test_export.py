"""An export can be applied again without any difference, whatever the records hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, date, datetime
from ipaddress import IPv4Network, IPv6Network
from uuid import UUID

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from portward.base.characters import unshown
from portward.inventory.difference import difference
from portward.inventory.json_document import JsonDocument, json_text
from portward.inventory.records import Inventory
from portward.inventory.yaml_document import YamlDocument, yaml_text
from portward.model import Attachment, Exemption, ExemptionState, Mode, Record, Standing, Subscription, Workload
from portward.store.codec import decode, encode, key_of
from portward.store.values import RecordError
from unit.store.samples import ALL, EXAMPLE, texts

instants = st.datetimes(datetime(1970, 1, 2), datetime(2200, 1, 1), timezones=st.just(UTC))  # noqa: DTZ001 # naive is asked for
ids = st.text(max_size=20).filter(str.isprintable).map(str.strip).filter(bool)
words = st.text(max_size=20).filter(lambda text: unshown(text) is None) | st.sampled_from(
    ["null", "yes", "1", "1e3", "2026-01-01", "2026-01-01T00:00:00Z", "- a", "# x", "a: b", "'", '"', " "]
)
lines = st.lists(words, max_size=3).map("\n".join) | st.just("\t")
subscriptions = st.builds(
    Subscription,
    id=st.uuids(),
    offer=ids,
    created=st.dates(date(1970, 1, 1)),
    name=words,
    standing=st.sampled_from(Standing),
    payment_history=st.booleans(),
    mode=st.sampled_from(Mode),
)
# IPv4-mapped addresses. No packet has such a source, and attachments with them are refused.
MAPPED = IPv6Network("::ffff:0:0/96")
networks = st.one_of(
    st.tuples(st.ip_addresses(v=4), st.integers(0, 32)).map(lambda found: IPv4Network(found, strict=False)),
    st.tuples(st.ip_addresses(v=6), st.integers(0, 128))
    .map(lambda found: IPv6Network(found, strict=False))
    .filter(lambda found: not MAPPED.supernet_of(found)),
)
letters = st.characters(codec="ascii", min_codepoint=33, max_codepoint=126, exclude_characters="/:*%")
segments = st.text(letters, min_size=1, max_size=15)
owners = st.sampled_from([UUID(int=number) for number in range(3)])
attachments = st.builds(
    Attachment,
    segment=segments.filter(lambda name: name not in (".", "..")),
    address=networks,
    subscription=owners,
    workload=st.sampled_from(Workload),
    started=st.none() | instants,
)
said = {"subscription": owners, "by": words, "justification": lines}
requested = st.builds(Exemption, state=st.just(ExemptionState.REQUESTED), requested=st.none() | instants, **said)
decided = st.builds(
    Exemption,
    state=st.sampled_from([state for state in ExemptionState if state is not ExemptionState.REQUESTED]),
    requested=st.none() | st.just(datetime(1970, 1, 2, tzinfo=UTC)),
    decided=instants,
    **said,
)
exemptions = requested | decided
records: st.SearchStrategy[list[Record]] = st.lists(
    st.one_of(subscriptions, attachments, exemptions), max_size=12, unique_by=key_of
)

Writer = Callable[[Mapping[str, str]], Iterator[str]]
FORMS: list[tuple[Writer, type[JsonDocument | YamlDocument]]] = [
    (json_text, JsonDocument),
    (yaml_text, YamlDocument),
]


@pytest.mark.parametrize(("text_of", "document"), FORMS)
@given(found=records)
def test_what_was_exported_comes_back(
    text_of: Writer, document: type[JsonDocument | YamlDocument], found: list[Record]
) -> None:
    have = texts(*found)
    text = "".join(text_of(have))
    inventory = Inventory([document("export", text)])
    assert inventory.records == have
    assert difference(have, inventory, prune=True).puts() == []


@given(found=st.one_of(subscriptions, attachments, exemptions))
def test_a_record_comes_back_from_its_json(found: Record) -> None:
    assert decode(key_of(found), encode(found)) == found


def test_an_exported_inventory_looks_as_operators_write_it() -> None:
    exported = yaml.safe_load("".join(yaml_text(texts(*ALL))))
    written = yaml.safe_load(EXAMPLE)
    assert list(exported) == ["subscriptions", "attachments", "exemptions"]
    for kind, lists in written.items():
        for have, want in zip(exported[kind], lists, strict=True):
            assert have.items() >= want.items()
    assert "created: 2021-03-02\n" in "".join(yaml_text(texts(*ALL)))


def test_many_records_are_one_list_each() -> None:
    many = (Subscription(id=UUID(int=number), offer="csp", created=date(2020, 1, 1)) for number in range(2_500))
    have = texts(*many)
    assert Inventory([YamlDocument("export", "".join(yaml_text(have)))]).records == have


@pytest.mark.parametrize("text_of", [json_text, yaml_text])
@pytest.mark.parametrize(
    ("key", "body", "message"),
    [
        ("subscriptions/1", "{}", "subscriptions/1: id: is missing"),
        ("attachments/vni1/10.0.0.4", '{"segment":5,', "attachments/vni1/10.0.0.4: "),
        ("machines/1", "{}", "machines/1: not a key of"),
        (
            "subscriptions/00000000-0000-0000-0000-000000000007",
            encode(ALL[0]),
            "holds the record of subscriptions/1111",
        ),
        ("exemptions/1", '{"state":"granted","x":1}', "exemptions/1: "),
    ],
)
def test_a_record_that_cannot_be_read_is_not_left_out_in_silence(
    text_of: Writer, key: str, body: str, message: str
) -> None:
    with pytest.raises(RecordError, match=message):
        list(text_of({key: body}))
