"""Accounts are found by id and name, with the same result from the table and from the store."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from uuid import UUID

import msgspec
import pytest

from portward.base.characters import unshown
from portward.config.load import load_config
from portward.errors import InputError, PortwardError, StoreError
from portward.i18n.language import ENGLISH
from portward.model import Exemption, ExemptionState, Reason, Record, Workload
from portward.ops import explanation, host
from portward.ops.diagnosis import gather, suggestion
from portward.ops.diagnosis.accounts import Accounts, StoreAccounts, TableAccounts
from portward.ops.diagnosis.agent_counts import counts_of
from portward.ops.diagnosis.answer import lines
from portward.ops.diagnosis.facts import FactSource
from portward.ops.diagnosis.outcome import Blocking
from portward.ops.host_state import Agent, Host, Ruleset, Workers
from portward.policy import presets
from portward.store.codec import encode, key_of
from portward.store.sqlite.store import SqliteStore
from portward.store.values import Put
from portward.table.commits import Answers
from portward.table.reader import Reader
from portward.table.writer import Writer
from unit.ops.diagnosis.samples import AFTER, BEFORE, GRANTED, ID, attachment, subscription

AZURE = presets.load("azure-2020")
OTHER, THIRD = UUID(int=5), UUID(int=6)
RECORDS: list[Record] = [
    subscription("csp"),
    msgspec.structs.replace(subscription("azure-sponsorship"), id=OTHER, name="twice"),
    msgspec.structs.replace(subscription("free-trial"), id=THIRD, name="twice"),
    Exemption(subscription=ID, state=ExemptionState.GRANTED, decided=GRANTED),
    attachment("10.0.0.4", BEFORE),
    attachment("10.0.0.5", AFTER),
    attachment("10.0.1.0/24", None, workload=Workload.PAAS),
    attachment("2001:db8::4", AFTER),
    attachment("10.0.0.4", AFTER, segment="vni1003"),
    msgspec.structs.replace(attachment("10.0.1.7"), subscription=OTHER),
]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A configuration whose store holds the records."""
    path = tmp_path / "portward.toml"
    path.write_text(
        f'segments = ["vni*"]\nuplinks = ["up0"]\nstore = "sqlite:{tmp_path}/p.db"\ntable = "{tmp_path}/table"\n'
    )
    store = SqliteStore(tmp_path / "p.db", create=True)
    puts = [Put(key_of(record), encode(record)) for record in RECORDS]
    store.write(puts, expected=0, actor="t", at=datetime.now(UTC))
    store.close()
    return path


@pytest.fixture(params=FactSource)
def place(request: pytest.FixtureRequest, config: Path, tmp_path: Path) -> Iterator[Accounts]:
    """The same records in the table and in the store."""
    if request.param is FactSource.STORE:
        found: Accounts = StoreAccounts(SqliteStore(tmp_path / "p.db"))
    else:
        now = datetime.now(UTC)
        writer = Writer(tmp_path / "table", AZURE, Answers(observe=False, reject=False))
        writer.replace(RECORDS, revision=1, store=b"a store's 16 ids", now=now)
        writer.close()
        reader = Reader.open(tmp_path / "table")
        head = reader.head()
        assert head is not None
        found = TableAccounts(reader, head, AZURE)
    yield found
    found.close()


def test_an_account_is_found_by_id_and_by_name_with_all_its_machines(place: Accounts, config: Path) -> None:
    for wanted in (str(ID), str(ID).upper(), ID.hex, "fabrikam"):
        (held,) = place.found(wanted)
        assert (held.id, held.subscription, held.exemption) == (ID, RECORDS[0], RECORDS[3])
        assert set(held.attachments) == set(RECORDS[4:9])
        machines = gather.machines_of(load_config(config), AZURE, place, held)
        assert {(one.segment, str(one.address), one.reason) for one in machines} == {
            ("vni1002", "10.0.0.4/32", Reason.DENIED_RESTART_REQUIRED),
            ("vni1002", "10.0.0.5/32", Reason.ALLOWED_EXEMPT),
            ("vni1002", "10.0.1.0/24", Reason.DENIED_PAAS),
            ("vni1002", "2001:db8::4/128", Reason.ALLOWED_EXEMPT),
            ("vni1003", "10.0.0.4/32", Reason.ALLOWED_EXEMPT),
        }


def test_a_name_is_found_whole_and_all_that_have_it(place: Accounts) -> None:
    assert {held.id for held in place.found("twice")} == {OTHER, THIRD}
    for nothing in ("fabrika", "Fabrikam", "csp", str(UUID(int=99)), '"', "\\u"):
        assert place.found(nothing) == []


def test_a_source_is_of_its_most_specific_prefix(place: Accounts) -> None:
    found = place.matched("vni1002", ip_address("10.0.1.8"))
    assert found is not None
    assert (found.subscription, str(found.prefix)) == (ID, "10.0.1.0/24")
    found = place.matched("vni1002", ip_address("10.0.1.7"))
    assert found is not None
    assert found.subscription == OTHER
    assert place.matched("vni1009", ip_address("10.0.1.7")) is None


def test_several_of_a_name_are_listed_and_nothing_found_says_what_to_type(config: Path) -> None:
    with pytest.raises(PortwardError, match=f"2 subscriptions: {OTHER} .azure-sponsorship.*{THIRD}"):
        gather.diagnose(config, "twice", None, ENGLISH)
    for nothing in ("nix", str(UUID(int=99)), "", "\x1b[31m"):
        with pytest.raises(PortwardError, match="diagnose SEGMENT ADDRESS") as caught:
            gather.diagnose(config, nothing, None, ENGLISH)
        assert caught.value.exit_code == 1
        assert unshown(str(caught.value)) is None


def test_a_source_brings_its_account_and_an_unknown_source_none(config: Path) -> None:
    _, found = gather.diagnose(config, "vni1002", "10.0.1.8", ENGLISH)
    assert found.facts.id == ID
    assert str(found.facts.machines[0].address) == "10.0.1.0/24"
    _, found = gather.diagnose(config, "vni1002", "10.9.9.9", ENGLISH)
    assert found.facts.id is None
    assert [matter.reason for matter in found.matters] == [Reason.DENIED_UNKNOWN_SOURCE]


def test_explain_says_of_agents_on_its_table_alone_and_of_none_that_it_may_not_see(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An agent with another table folder may run."""
    found = explanation.explain(config, "vni1002", "10.0.0.4", None)
    assert found.decided_from == "store (no agent runs on this table)"
    monkeypatch.setattr(explanation, "hidden", lambda _: True)
    found = explanation.explain(config, "vni1002", "10.0.0.4", None)
    assert found.decided_from == "store (whether an agent runs is not known)"


def test_who_may_read_neither_store_nor_table_reads_so_of_the_store(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "p.db").unlink()
    (tmp_path / "table").mkdir()
    exists = Path.exists

    def refused(path: Path) -> bool:
        if path.parent == tmp_path / "table":
            raise PermissionError(13, "Permission denied", str(path))
        return exists(path)

    monkeypatch.setattr(Path, "exists", refused)
    with pytest.raises(StoreError, match=r"^sqlite:.*/p\.db: "):
        explanation.explain(config, "vni1002", "10.0.0.4", None)


@pytest.mark.parametrize(("segment", "address"), [("vni1002", "10.0.0"), ("eth0", "10.0.0.4")])
def test_what_is_no_address_or_no_segment_is_bad_usage(config: Path, segment: str, address: str) -> None:
    with pytest.raises(InputError):
        gather.diagnose(config, segment, address, ENGLISH)


@pytest.mark.parametrize(
    ("segment", "address", "message"),
    [
        ("10.0.0.4", "vni1002", "'10.0.0.4' is an address: the segment comes before it"),
        ("vni*", "10.0.0.4", "'vni*' is a pattern: name one segment, such as vni1002"),
        ("vni-of-twenty-letters", "10.0.0.4", "'vni-of-twenty-letters' is no interface name: up to 15 bytes"),
        ("vni/1", "10.0.0.4", "'vni/1' is no interface name"),
        ("eth0", "10.0.0.4", "'eth0' is not a segment of"),
    ],
)
def test_what_can_be_no_source_is_refused_by_both_verbs(
    config: Path, segment: str, address: str, message: str
) -> None:
    with pytest.raises(InputError) as diagnosed:
        gather.diagnose(config, segment, address, ENGLISH)
    with pytest.raises(InputError) as explained:
        explanation.explain(config, segment, address, None)
    assert str(diagnosed.value) == str(explained.value)
    assert str(diagnosed.value).startswith(f"SEGMENT: {message}")


@pytest.mark.parametrize(
    ("address", "to"), [("10.0.0.4", "2001:db8::1"), ("10.0.0.4", "fc00::1"), ("2001:db8::4", "198.51.100.1")]
)
def test_source_and_destination_of_a_packet_are_of_one_family(config: Path, address: str, to: str) -> None:
    with pytest.raises(InputError, match=r"--to: .*no packet has both, an IPv. address would be right"):
        explanation.explain(config, "vni1002", address, to)
    assert explanation.explain(config, "vni1002", "10.0.0.4", "::ffff:198.51.100.1").destination == "198.51.100.1"


@pytest.mark.parametrize(
    ("who", "message"),
    [
        ("fabricam", "did you mean 'fabrikam'?"),
        ("Fabrikam", "did you mean 'fabrikam'?"),
        (" fabrikam", "did you mean 'fabrikam'?"),
        ("10.0.0.4", "this is an address: `portward diagnose SEGMENT 10.0.0.4` asks about a source"),
        ("2001:db8::4", "this is an address"),
        (str(ID)[:-1], "this looks like an id, of which all 32 digits are needed (it has 31)"),
        (str(ID)[:8] + str(ID), "this looks like an id, of which all 32 digits are needed (it has 40)"),
        ("vni1002", "if it is a segment, ADDRESS is missing: `portward diagnose vni1002 ADDRESS`"),
        ("nobody-like-this", "`portward export` lists all"),
        (str(UUID(int=77)), "no subscription with this id"),
    ],
)
def test_an_account_that_is_not_found_gets_the_nearest_names(
    place: Accounts, config: Path, who: str, message: str
) -> None:
    with pytest.raises(PortwardError) as error:
        gather._the_one(load_config(config), place, who)
    assert message in str(error.value)
    assert ("did you mean" in str(error.value)) is ("did you mean" in message)


def test_a_segment_that_is_here_is_said_to_be_one(
    place: Accounts, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suggestion, "index_of", {"vni1002": 7}.get)
    with pytest.raises(PortwardError, match="this is a segment: `portward diagnose vni1002 ADDRESS` asks about a"):
        gather._the_one(load_config(config), place, "vni1002")


def test_the_time_is_that_of_a_faster_clock_by_which_the_agent_decided(tmp_path: Path) -> None:
    ahead = datetime.now(UTC) + timedelta(hours=2)
    writer = Writer(tmp_path / "table", AZURE, Answers(observe=False, reject=False))
    writer.replace(RECORDS, revision=1, store=b"a store's 16 ids", now=ahead)
    writer.close()
    reader = Reader.open(tmp_path / "table")
    head = reader.head()
    assert head is not None
    assert abs(TableAccounts(reader, head, AZURE).at - ahead) < timedelta(seconds=1)
    slow = head._replace(decided_at=time.time() - 3600)
    assert abs(TableAccounts(reader, slow, AZURE).at.timestamp() - time.time()) < 1800, "not an hour ago"
    reader.close()


def test_counts_of_a_subscription_are_read_from_a_scrape() -> None:
    text = (
        "# HELP portward_subscription_packets_total …\n"
        f'portward_subscription_packets_total{{subscription="{ID}",verdict="deny"}} 12.0\n'
        f'portward_subscription_packets_total{{subscription="{ID}",verdict="throttled"}} 3.0\n'
        f'portward_subscription_packets_total{{subscription="{OTHER}",verdict="deny"}} 99.0\n'
    )
    assert counts_of(text, ID) == {"deny": 12, "throttled": 3}


def test_files_of_the_store_are_only_read(config: Path, tmp_path: Path) -> None:
    before = (tmp_path / "p.db").stat().st_mtime_ns
    gather.diagnose(config, "fabrikam", None, ENGLISH)
    assert (tmp_path / "p.db").stat().st_mtime_ns == before


@pytest.mark.parametrize("loaded", list(Ruleset))
def test_what_this_host_does_is_not_said_of_a_segment_that_is_not_here(
    config: Path, monkeypatch: pytest.MonkeyPatch, loaded: Ruleset
) -> None:
    """Support may ask on a host that is not a gateway. Although it has no ruleset, nothing passes there."""
    monkeypatch.setattr(host, "look", lambda *_: Host(agent=Agent.NONE, ruleset=loaded, workers=Workers.NONE))
    _, made = gather.diagnose(config, "fabrikam", None, ENGLISH)
    assert {machine.outcome for machine in made.facts.machines} == {Blocking.UNKNOWN}
    assert "may pass all the same" not in made.customer
    assert "may be dropped all the same" not in made.customer


def test_where_the_agent_is_instead_is_said_also_if_no_segment_is_here(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    away = Host(agent=Agent.AWAY, workers=Workers.NONE, elsewhere="the agent runs in another network namespace")
    monkeypatch.setattr(host, "look", lambda *_: away)
    preset, made = gather.diagnose(config, "fabrikam", None, ENGLISH)
    assert {machine.outcome for machine in made.facts.machines} == {Blocking.UNKNOWN}
    assert f"not known: {away.elsewhere}" in "\n".join(lines(preset, made, ENGLISH))
    assert made.facts.machines[0].now is not None
    assert made.facts.machines[0].now.why == away.elsewhere
