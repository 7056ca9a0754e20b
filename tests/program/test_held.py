"""A change that would turn many customers' verdicts, from the operator's mistake to the kernel, and back."""

from __future__ import annotations

import json
from contextlib import closing
from datetime import UTC, date, datetime
from ipaddress import ip_address, ip_network
from pathlib import Path
from uuid import UUID

import msgspec

from portward.documents import enc_hook
from portward.lab.agent import Agent, until
from portward.lab.topology import CONTOSO
from portward.model import Attachment, Record, Standing, Subscription
from portward.resources import rules
from portward.store.protocol import Put, encode, key_of
from portward.store.sqlite import SqliteStore
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
    """A file that says so."""
    records = customers(standing)
    path = agent.folder / "inventory.json"
    path.write_bytes(
        msgspec.json.encode({"subscriptions": records[::2], "attachments": records[1::2]}, enc_hook=enc_hook)
    )
    return str(path)


def allowed(agent: Agent) -> bool:
    """Whether the first of them may send, by what the workers read."""
    with closing(Reader.open(agent.folder / "table")) as reader:
        holding = reader.holding(CONTOSO.segment, ip_address("10.0.1.1"))
    assert holding is not None
    return holding.entry.reason.allows


def test_apply_refuses_it_and_says_what_to_type(agent: Agent) -> None:
    agent.apply(*customers())
    file = inventory(agent, Standing.DISABLED)
    told = "would flip the verdict of 12 of 12 subscriptions, more than max_flip_share = 0.1 lets pass"
    refused = agent.portward("apply", file)
    assert refused.returncode == 1
    assert refused.stderr == (
        f"portward: nothing was written: this {told}; --dry-run shows it, --confirm applies it\n"
    )
    dry = agent.portward("apply", "--dry-run", file)
    assert dry.returncode == 0
    assert dry.stdout.splitlines()[-1] == f"it {told}: to be applied with --confirm only"
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
    assert agent.portward("status").stdout.startswith(
        "HELD      revision 2 would flip the verdict of 12 of 12 subscriptions: `portward apply --confirm` lets it"
        " through\n"
    )
    # A restart lets nothing through either.
    agent.stop()
    agent.start()
    until(lambda: agent.metrics()["portward_policy_held"] == 1, "held")
    assert allowed(agent)
    told = agent.portward("apply", "--confirm")
    assert told.stdout == "confirmed everything up to revision 2, as revision 3\n"
    until(lambda: agent.revision() == 3, "revision 3 in force")
    until(lambda: agent.metrics()["portward_policy_held"] == 0, "held no more")
    assert not allowed(agent)
    assert "confirmed" not in agent.portward("export").stdout


def test_applying_again_what_is_held_confirms_it(agent: Agent) -> None:
    agent.apply(*customers())
    with closing(SqliteStore(agent.folder / "portward.db")) as store:
        batch = [Put(key_of(record), encode(record)) for record in customers(Standing.DISABLED)]
        store.write(batch, expected=1, actor="another tool", at=datetime.now(UTC))
    told = agent.portward("apply", "--confirm", inventory(agent, Standing.DISABLED))
    assert told.stdout == "confirmed everything up to revision 2, as revision 3\n"
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
    assert "where that is meant, raise max_flip_share with it" in said
    told = agent.explain(CONTOSO.segment, "10.0.1.1")
    assert told["decided_from"].endswith("as it is now, which the agent has not taken")
    agent.configure(max_flip_share=1)
    agent.reload()
    until(lambda: agent.metrics()["portward_reload_failed"] == 0, "taken")
    assert not allowed(agent)


def test_nothing_to_apply_is_told(agent: Agent) -> None:
    for arguments in ((), ("--dry-run", "--confirm"), ("--prune", "--confirm")):
        told = agent.portward("apply", *arguments)
        assert (told.returncode, told.stderr) == (
            2, "portward: FILE: missing: name an inventory, or - for standard input\n",
        )  # fmt: skip


def test_there_is_nothing_to_confirm_without_a_store(agent: Agent) -> None:
    told = agent.portward("apply", "--confirm")
    assert told.returncode == 1
    assert "no such file; create it with 'portward apply'" in told.stderr
