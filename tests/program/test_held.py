"""A change that would flip the verdicts of many customers is held, from the operator's mistake to the kernel."""

from __future__ import annotations

import json
from contextlib import closing
from datetime import UTC, date, datetime, timedelta
from ipaddress import ip_address, ip_network
from pathlib import Path
from uuid import UUID

import msgspec

from portward.base.resources import rules
from portward.config.documents import enc_hook
from portward.lab.agent import Agent, until
from portward.lab.demo import records
from portward.lab.topology import CONTOSO
from portward.model import Attachment, Exemption, ExemptionState, Record, Standing, Subscription
from portward.store.codec import encode, key_of
from portward.store.sqlite.store import SqliteStore
from portward.store.values import Put
from portward.table.reader import Reader

COUNT = 12


def customers(standing: Standing = Standing.GOOD) -> list[Record]:
    """Customers who may send, unless their standing says otherwise, with an address each."""
    records: list[Record] = []
    for number in range(1, COUNT + 1):
        id_ = UUID(int=number)
        offer = "enterprise-agreement"
        records.append(Subscription(id=id_, offer=offer, created=date(2022, 1, 1), standing=standing))
        records.append(
            Attachment(segment=CONTOSO.segment, address=ip_network(f"10.0.1.{number}"), subscription=id_)
        )
    return records


def inventory(agent: Agent, standing: Standing) -> str:
    """An inventory file with these customers and their standing."""
    records = customers(standing)
    path = agent.folder / "inventory.json"
    path.write_bytes(
        msgspec.json.encode({"subscriptions": records[::2], "attachments": records[1::2]}, enc_hook=enc_hook)
    )
    return str(path)


def allowed(agent: Agent) -> bool:
    """Whether the first customer may send, by the table that the workers read."""
    with closing(Reader.open(agent.folder / "table")) as reader:
        holding = reader.holding(CONTOSO.segment, ip_address("10.0.1.1"))
    assert holding is not None
    return holding.entry.reason.allows


def test_apply_refuses_it_and_says_what_to_type(agent: Agent) -> None:
    agent.apply(*customers())
    file = inventory(agent, Standing.DISABLED)
    message = "would flip the verdict of 12 of 12 subscriptions, more than max_flip_share = 0.1 lets pass"
    refused = agent.portward("apply", file)
    assert refused.returncode == 1
    assert refused.stderr == (
        f"portward: nothing was written: this {message}; --dry-run shows it, --confirm applies it\n"
    )
    dry = agent.portward("apply", "--dry-run", file)
    assert dry.returncode == 0
    assert dry.stdout.splitlines()[-1] == f"it {message}: to be applied with --confirm only"
    machine = json.loads(agent.portward("apply", "--dry-run", "--json", file).stdout)
    assert machine["held"] == {"flipped": 12, "subscriptions": 12}
    with closing(SqliteStore(agent.folder / "portward.db")) as store:
        assert store.revision() == 1
    confirmed = agent.portward("apply", "--confirm", file)
    assert confirmed.stdout == "applied revision 2: 0 added, 12 changed, 0 removed\n"


def test_pruning_away_everybody_is_refused(agent: Agent) -> None:
    agent.apply(*customers())
    (agent.folder / "empty.yaml").write_text("subscriptions: []\n")
    refused = agent.portward("apply", "--prune", str(agent.folder / "empty.yaml"))
    assert refused.returncode == 1
    assert "12 of 12 subscriptions" in refused.stderr


def test_a_confirmed_change_is_enforced_at_once(agent: Agent) -> None:
    agent.apply(*customers())
    agent.start()
    assert agent.portward("apply", "--confirm", inventory(agent, Standing.DISABLED)).returncode == 0
    until(lambda: agent.revision() == 2, "revision 2 in force")
    assert not allowed(agent)


def test_what_another_tool_writes_is_held_until_it_is_confirmed(agent: Agent) -> None:
    agent.apply(*customers())
    agent.start()
    with closing(SqliteStore(agent.folder / "portward.db")) as store:
        batch = [Put(key_of(record), encode(record)) for record in customers(Standing.DISABLED)]
        store.write(batch, expected=1, actor="another tool", at=datetime.now(UTC))
    until(lambda: agent.metrics()["portward_policy_held"] == 1, "held")
    assert agent.revision() == 1
    assert allowed(agent)
    said = (
        "HELD      revision 2 would flip the verdict of 12 of 12 subscriptions: `portward apply --confirm` lets it"
        " through\n"
    )
    until(lambda: agent.portward("status").stdout.startswith(said), "status says so")
    # The change stays held after a restart.
    agent.stop()
    agent.start()
    until(lambda: agent.metrics()["portward_policy_held"] == 1, "held")
    assert allowed(agent)
    result = agent.portward("apply", "--confirm")
    assert result.stdout == "applied revision 3: everything up to it is confirmed\n"
    until(lambda: agent.revision() == 3, "revision 3 in force")
    until(lambda: agent.metrics()["portward_policy_held"] == 0, "held no more")
    assert not allowed(agent)
    assert "confirmed" not in agent.portward("export").stdout


def test_applying_again_what_is_held_confirms_it(agent: Agent) -> None:
    agent.apply(*customers())
    with closing(SqliteStore(agent.folder / "portward.db")) as store:
        batch = [Put(key_of(record), encode(record)) for record in customers(Standing.DISABLED)]
        store.write(batch, expected=1, actor="another tool", at=datetime.now(UTC))
    result = agent.portward("apply", "--confirm", inventory(agent, Standing.DISABLED))
    assert result.stdout == (
        "WARNING   no agent runs here: it is not known whether anything was held\n"
        "applied revision 3: everything up to it is confirmed\n"
    )
    agent.start()
    until(lambda: agent.revision() == 3, "revision 3 in force")
    assert not allowed(agent)


def test_a_preset_that_turns_all_of_them_is_not_taken_by_a_reload(agent: Agent, tmp_path: Path) -> None:
    agent.apply(*customers())
    agent.start()
    preset = tmp_path / "strict.toml"
    text = rules("policy", "azure-2020.toml").read_text()
    preset.write_text(text.replace('exemption = "not-needed"', 'exemption = "never"'))
    agent.configure(preset=str(preset))
    agent.reload()
    until(lambda: agent.metrics()["portward_reload_failed"] == 1, "refused")
    assert allowed(agent)
    said = agent.log.read_text()
    assert "preset azure-2020 would flip the verdict of 12 of 12 subscriptions" in said
    assert "if you intend that, raise max_flip_share with it; if not, put the old preset back" in said
    # `explain` goes by the preset in force, and remarks that the file names another one.
    printed = agent.explain(CONTOSO.segment, "10.0.1.1")
    assert (printed["verdict"], printed["decided_from"]) == ("allow", "table")
    assert printed["remarks"][0].endswith(
        "portward.toml: not what the agent has in force (preset): `systemctl reload portward` takes it in, or "
        "the log says why not"
    )
    agent.configure(max_flip_share=1)
    agent.reload()
    until(lambda: agent.metrics()["portward_reload_failed"] == 0, "taken")
    assert not allowed(agent)


SPAMMER = UUID(int=99)
GRANTED = datetime(2026, 1, 9, 12, tzinfo=UTC)


def hold(agent: Agent) -> None:
    """Starts an agent that holds revision 2. A spammer may send by an exemption, and another customer asks for
    one."""
    machine = Attachment(
        segment=CONTOSO.segment, address=ip_network("10.0.2.1"), subscription=SPAMMER,
        started=GRANTED + timedelta(days=1),
    )  # fmt: skip
    agent.apply(
        *customers(),
        Subscription(id=SPAMMER, offer="pay-as-you-go", created=date(2022, 1, 1)),
        Subscription(id=UUID(int=98), offer="pay-as-you-go", created=date(2022, 1, 1)),
        machine,
        msgspec.structs.replace(machine, address=ip_network("10.0.2.2"), subscription=UUID(int=98)),
        Exemption(subscription=SPAMMER, state=ExemptionState.GRANTED, requested=GRANTED, decided=GRANTED),
        Exemption(subscription=UUID(int=98), state=ExemptionState.REQUESTED, requested=GRANTED),
    )
    agent.start()
    with closing(SqliteStore(agent.folder / "portward.db")) as store:
        batch = [Put(key_of(record), encode(record)) for record in customers(Standing.DISABLED)]
        store.write(batch, expected=1, actor="another tool", at=datetime.now(UTC))
    until(lambda: agent.metrics()["portward_policy_held"] == 1, "held")


def verdict(agent: Agent, address: str) -> str:
    """The reason code of a source in the table that the workers read."""
    with closing(Reader.open(agent.folder / "table")) as reader:
        holding = reader.holding(CONTOSO.segment, ip_address(address))
    assert holding is not None
    return holding.entry.reason.value


def test_a_revocation_is_in_force_ahead_of_what_is_held_and_verbs_say_so(agent: Agent) -> None:
    hold(agent)
    revoked = agent.portward("exemption", "revoke", str(SPAMMER), "--reason", "spam", "--wait")
    assert revoked.returncode == 0, revoked.stderr
    assert revoked.stdout.splitlines()[1] == "  in force here, ahead of the held revision 2"
    assert verdict(agent, "10.0.2.1") == "denied-revoked"
    assert allowed(agent)
    assert agent.revision() == 1
    until(lambda: json.loads(agent.portward("status", "--json").stdout)["held"]["ahead"] == 3, "status shows it")
    said = agent.portward("status").stdout.splitlines()
    assert said[0].startswith("HELD      revision 2 would flip the verdict of 12 of 14 subscriptions")
    assert said[1] == (
        "          denials in later revisions are enforced, up to revision 3; everything else in them waits"
    )
    assert any(line.endswith(", NOT in step: revision 2 is held") for line in said)
    printed = agent.explain(CONTOSO.segment, "10.0.2.1")
    assert printed["reason"] == "denied-revoked"
    assert (
        printed["decided_from"]
        == "table; the store's revision 2 is held, and denials up to revision 3 are in force ahead of it"
    )


def test_diagnose_says_that_a_change_is_held_to_both_its_readers(agent: Agent) -> None:
    hold(agent)
    output = json.loads(agent.portward("diagnose", str(UUID(int=1)), "--json").stdout)
    assert output["facts"]["behind"] == "the store is at revision 2"
    assert output["remarks"] == agent.explain(CONTOSO.segment, "10.0.1.1")["remarks"]
    assert "A change of our records is not in force yet; once it is, this may change." in output["customer"]
    printed = agent.portward("diagnose", str(UUID(int=1))).stdout
    assert printed.startswith("WARNING   the store is at revision 2, which this gateway has not taken in")


def test_what_waits_behind_a_held_change_is_not_said_to_be_in_force(agent: Agent) -> None:
    hold(agent)
    waits = "NOT in force here yet: revision 2 is held, see `portward status`"
    granted = agent.portward("exemption", "grant", str(UUID(int=98)), "--fraud-check", "called back")
    assert granted.returncode == 0, granted.stderr
    assert granted.stdout.splitlines()[1] == f"  {waits}"
    started = agent.portward("attachment", "started", CONTOSO.segment, "10.0.2.2", "--json")
    assert json.loads(started.stdout)["behind"]["held"] == 2
    assert verdict(agent, "10.0.2.2") == "denied-pending"
    newcomer = agent.folder / "newcomer.json"
    records = [msgspec.structs.replace(record, id=UUID(int=77)) for record in customers()[:1]]
    machine = Attachment(segment=CONTOSO.segment, address=ip_network("10.0.3.1"), subscription=UUID(int=77))
    newcomer.write_bytes(
        msgspec.json.encode({"subscriptions": records, "attachments": [machine]}, enc_hook=enc_hook)
    )
    applied = agent.portward("apply", str(newcomer))
    assert applied.stdout.splitlines()[-1] == waits
    tightened = agent.portward("exemption", "limit", str(SPAMMER), "--rate", "5", "--json")
    assert json.loads(tightened.stdout)["behind"] == {"held": 2, "enforced": 1, "records": 1}
    agent.portward("apply", "--confirm")
    until(lambda: agent.metrics()["portward_policy_held"] == 0, "held no more")
    assert not allowed(agent)
    assert verdict(agent, "10.0.3.1") == "allowed-offer"
    quiet = agent.portward("exemption", "limit", str(SPAMMER), "--none")
    assert "in force" not in quiet.stdout


def test_an_early_denial_outlives_a_restart_of_the_agent(agent: Agent) -> None:
    hold(agent)
    agent.portward("exemption", "revoke", str(SPAMMER), "--reason", "spam", "--wait")
    agent.stop()
    agent.start()
    until(lambda: agent.metrics()["portward_policy_held"] == 1, "held")
    assert verdict(agent, "10.0.2.1") == "denied-revoked"
    assert allowed(agent)


def test_apply_without_a_file_is_refused(agent: Agent) -> None:
    for arguments in ((), ("--dry-run", "--confirm"), ("--prune", "--confirm")):
        result = agent.portward("apply", *arguments)
        assert (result.returncode, result.stderr) == (
            2, "portward: FILE: missing: name an inventory, or - for standard input\n",
        )  # fmt: skip


def test_nothing_held_is_nothing_to_confirm(agent: Agent) -> None:
    """`apply --confirm`, alone or with a file that changes nothing, writes no revision."""
    agent.apply(*records())
    agent.start()
    until(lambda: agent.revision() == 1, "it is enforced")
    result = agent.portward("apply", "--confirm")
    assert (result.returncode, result.stderr) == (0, "")
    nothing = "nothing to confirm: the agent here holds nothing, the store stays at revision 1\n"
    assert result.stdout == nothing
    assert json.loads(agent.portward("apply", "--confirm", "--json").stdout) == {"revision": 1, "confirmed": None}
    exported = agent.folder / "same.yaml"
    exported.write_text(agent.portward("export").stdout)
    assert agent.portward("apply", "--confirm", str(exported)).stdout.endswith(nothing)
    assert agent.apply() == 1


def test_a_mistyped_segment_is_warned_of(agent: Agent) -> None:
    agent.apply(*records())
    inventory = agent.folder / "typo.yaml"
    inventory.write_text(agent.portward("export").stdout.replace("vni1002", "vni10022"))
    result = agent.portward("apply", str(inventory))
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[0] == (
        "WARNING   segment vni10022: this host has no such interface now; did you mean 'vni1002'?"
    )


def test_there_is_nothing_to_confirm_without_a_store(agent: Agent) -> None:
    result = agent.portward("apply", "--confirm")
    assert result.returncode == 1
    assert "no such file: put it back from a backup" in result.stderr
