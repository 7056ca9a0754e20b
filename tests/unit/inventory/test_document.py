"""Inventories are read from YAML and JSON, and each mistake is reported with file, line and field."""

from __future__ import annotations

import io
import json
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from portward.cli.times import instant
from portward.errors import InputError
from portward.inventory.files import read_inventory
from portward.inventory.records import Inventory
from portward.model import Record
from portward.store.codec import decode, encode, key_of
from unit.store.samples import ALL, CONTOSO, EXAMPLE, FABRIKAM, GRANT, MACHINE

ID = "11111111-0000-4000-8000-000000000001"
OTHER = "11111111-0000-4000-8000-000000000002"

EXAMPLE_JSON = f"""\
{{
  "subscriptions": [
    {{"id": "{ID}", "name": "contoso-prod", "offer": "enterprise-agreement", "created": "2021-03-02"}}
  ],
  "attachments": [
    {{
      "segment": "vni1001",
      "address": "10.0.0.4",
      "subscription": "{ID}",
      "workload": "vm"
    }}
  ]
}}
"""


def read(folder: Path, text: str, name: str = "inventory.yaml") -> Inventory:
    """The inventory in one file with this text."""
    path = folder / name
    path.write_text(text)
    return read_inventory([str(path)])


def refused(folder: Path, text: str, name: str = "inventory.yaml") -> str:
    """The error message for a file with this text, without the path of its folder."""
    with pytest.raises(InputError) as caught:
        read(folder, text, name)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(f"{folder}/", "")


def test_a_yaml_inventory_is_read(tmp_path: Path) -> None:
    records = {key: decode(key, body) for key, body in read(tmp_path, EXAMPLE).records.items()}
    assert records == {key_of(record): record for record in ALL}


def test_json_and_yaml_say_the_same(tmp_path: Path) -> None:
    lists: dict[str, list[Record]] = {
        "subscriptions": [CONTOSO, FABRIKAM],
        "attachments": [record for record in ALL if key_of(record).startswith("attachments/")],
        "exemptions": [GRANT],
    }
    text = json.dumps({kind: [json.loads(encode(record)) for record in found] for kind, found in lists.items()})
    assert read(tmp_path, text, "inventory.json").records == read(tmp_path, EXAMPLE).records


@pytest.mark.parametrize("name", ["inventory", "inventory.yaml", "inventory.json"])
def test_json_is_recognised_by_its_name_or_its_beginning(tmp_path: Path, name: str) -> None:
    assert len(read(tmp_path, f"\n  {EXAMPLE_JSON}", name).records) == 2


def test_a_byte_order_mark_is_no_mistake(tmp_path: Path) -> None:
    assert len(read(tmp_path, f"\ufeff{EXAMPLE_JSON}", "inventory.json").records) == 2
    assert len(read(tmp_path, f"\ufeff{EXAMPLE}").records) == len(ALL)


def test_standard_input_is_read_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(EXAMPLE.encode())))
    assert len(read_inventory(["-"]).records) == len(ALL)
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(b"subscription: []")))
    with pytest.raises(InputError, match=r"^standard input:1: subscription: unknown key"):
        read_inventory(["-"])


def test_records_may_be_spread_over_files(tmp_path: Path) -> None:
    one, two = tmp_path / "one.json", tmp_path / "two.yaml"
    one.write_text(EXAMPLE_JSON)
    two.write_text(f"subscriptions:\n  - {{id: {OTHER}, offer: csp, created: 2020-01-01}}\n")
    assert len(read_inventory([str(one), str(two)]).records) == 3


def test_an_instant_is_kept_in_utc(tmp_path: Path) -> None:
    text = EXAMPLE.replace("2026-01-10T08:00:00Z", "2026-01-10T09:30:00+01:30")
    record = decode(key_of(MACHINE), read(tmp_path, text).records[key_of(MACHINE)])
    assert record == MACHINE
    assert "2026-01-10T08:00:00Z" in encode(record)


@pytest.mark.parametrize("form", ["yaml", "json"])
def test_a_day_is_its_beginning_in_utc_as_the_options_take_it(tmp_path: Path, form: str) -> None:
    text = EXAMPLE.replace("2026-01-10T08:00:00Z", "2026-01-10").replace("2026-01-08T09:00:00Z", "2026-01-08")
    text = text.replace("    by: self", "    until: 2027-01-09\n    by: self")
    if form == "json":
        text = json.dumps(yaml.load(text, yaml.BaseLoader))  # this loader reads every value as a text
        text = text.replace('"true"', "true")
    records = read(tmp_path, text, f"inventory.{form}").records
    machine, exemption = json.loads(records[key_of(MACHINE)]), json.loads(records[key_of(GRANT)])
    assert machine["started"] == "2026-01-10T00:00:00Z"
    assert (exemption["requested"], exemption["until"]) == ("2026-01-08T00:00:00Z", "2027-01-09T00:00:00Z")
    assert exemption["decided"] == "2026-01-09T12:00:00Z"
    assert instant("2027-01-09", "--until") == datetime.fromisoformat(exemption["until"])


def test_a_day_does_not_hide_another_mistake_in_json(tmp_path: Path) -> None:
    text = '{"exemptions": [{"subscription": 1,\n"state": "requested", "until": "2027-01-09"}]}'
    message = refused(tmp_path, text, "inventory.json")
    assert message.startswith("inventory.json:1: exemptions[0].subscription: expected a UUID like")


@pytest.mark.parametrize(
    ("written", "kept"),
    [
        ("10.0.0.4/32", "10.0.0.4"),
        ("10.0.0.0/24", "10.0.0.0/24"),
        ("2001:DB8:0::1", "2001:db8::1"),
        ("2001:db8::/64", "2001:db8::/64"),
        ("0.0.0.0/0", "0.0.0.0/0"),
    ],
)
def test_an_address_has_one_key(tmp_path: Path, written: str, kept: str) -> None:
    text = EXAMPLE.replace("address: 10.0.0.4", f'address: "{written}"')
    assert f"attachments/vni1001/{kept}" in read(tmp_path, text).records


@pytest.mark.parametrize(
    ("was", "becomes", "message"),
    [
        ("subscriptions:", "subscription:", ":1: subscription: unknown key; did you mean 'subscriptions'?"),
        ("exemptions:", "machines:", ":20: machines: unknown key; known here: subscriptions, "),
        ("payment_history:", "payment_histroy:",
         ":11: subscriptions[1].payment_histroy: unknown key; did you mean 'payment_history'?"),
        ("payment_history: true", "payment_history: sometimes",
         ":11: subscriptions[1].payment_history: expected true or false, got 'sometimes'"),
        (f"id: {ID}", "id: contoso",
         ":2: subscriptions[0].id: expected a UUID like 11111111-0000-4000-8000-000000000001, got 'contoso'"),
        ("created: 2021-03-02", "created: 2021-02-30",
         ":5: subscriptions[0].created: expected a date like 2017-11-15, got '2021-02-30'"),
        ("created: 2021-03-02", "created: yesterday",
         ":5: subscriptions[0].created: expected a date like 2017-11-15, got 'yesterday'"),
        ("    created: 2021-03-02\n", "", ":2: subscriptions[0].created: is missing"),
        ("standing: good", "standing: god",
         ":10: subscriptions[1].standing: 'god' is not a valid value (good, past-due, disabled); did you mean"
         " 'good'?"),
        ("started: 2026-01-10T08:00:00Z", "started: 2026-01-10T08:00:00",
         ":16: attachments[0].started: a time needs its zone: '2026-01-10T08:00:00' and a Z at its end for UTC"),
        ("started: 2026-01-10T08:00:00Z", "started: 2026-02-30",
         ":16: attachments[0].started: expected a time like 2026-01-10T08:00:00Z, got '2026-02-30'"),
        ("10.0.0.0/24", "10.0.0.4/24",
         ":18: attachments[1].address: '10.0.0.4/24' has bits beyond its prefix length: 10.0.0.0/24, or the"),
        ("10.0.0.0/24", "10.0.0.256", ":18: attachments[1].address: '10.0.0.256' is no IPv4 or IPv6 address"),
        ("10.0.0.0/24", "10.0", ":18: attachments[1].address: expected an address or a prefix in quotes, got"),
        ("10.0.0.0/24", "fe80::1%eth0", ":18: attachments[1].address: an address needs no zone: the segment says"),
        ("segment: vni1001", "segment: vni/1", ":13: attachments[0].segment: 'vni/1' is no interface name: 1"),
        ("segment: vni1001", "segment: 'vni 1'", ":13: attachments[0].segment: 'vni 1' is no interface name"),
        ("segment: vni1001", "segment: ''", ":13: attachments[0].segment: '' is no interface name"),
        ("segment: vni1001", "segment: vni*", ":13: attachments[0].segment: 'vni*' is no interface name"),
        ("segment: vni1001", "segment: ..", ":13: attachments[0].segment: '..' is no interface name"),
        ("segment: vni1001", "segment: sixteen-letters-", ":13: attachments[0].segment: 'sixteen-letters-' is no"),
        ("segment: vni1001", "segment: ääääääää", ":13: attachments[0].segment: 'ääääääää' is no interface name"),
        ("segment: vni1001", "segment: 1001", ":13: attachments[0].segment: expected text in quotes, got 1001"),
        ("    decided: 2026-01-09T12:00:00Z\n", "",
         ":22: exemptions[0].state: an exemption that is granted needs `decided`, the time of that decision"),
        ("    by: self", "    until: 2026-01-09T12:00:00Z\n    by: self", ":25: exemptions[0].until: "),
        ("    by: self", "    until: 2026-01-09T11:00:00Z\n    by: self",
         ":25: exemptions[0].until: 2026-01-09T11:00:00Z is not after `decided`, 2026-01-09T12:00:00Z"),
        ("    name: fabrikam\n", "    name: fabrikam\n    name: twice\n",
         ":8: name: stands twice in one mapping, first in line 7"),
        ("exemptions:", "attachments:", ":20: attachments: stands twice in one mapping, first in line 12"),
        ("name: fabrikam", "name: [", ":9: not YAML: did not find"),
        ("name: fabrikam", "name: a\tb: c", ":7: not YAML: "),
        ("name: fabrikam", "name: *unknown", ":7: not YAML: found undefined alias"),
        ("name: fabrikam", "name: a\x00b", ":7: not YAML: "),
        ("segment: vni1002\n    address: 10.0.0.0/24", "segment: vni1001\n    address: 10.0.0.4/32",
         ":17: attachments[1]: attachments/vni1001/10.0.0.4 stands in inventory.yaml:13 already"),
        (f"id: {OTHER}", f"id: {ID}", f":6: subscriptions[1]: subscriptions/{ID} stands in inventory.yaml:2 "),
    ],
)  # fmt: skip
def test_a_mistake_in_yaml_is_reported_with_its_place(
    tmp_path: Path, was: str, becomes: str, message: str
) -> None:
    assert EXAMPLE.count(was) >= 1
    assert refused(tmp_path, EXAMPLE.replace(was, becomes, 1)).startswith(f"inventory.yaml{message}")


@pytest.mark.parametrize(
    ("was", "becomes", "message"),
    [
        ('"attachments"', '"attachment"', ":5: attachment: unknown key; did you mean 'attachments'?"),
        ('"workload"', '"wokload"', ":10: attachments[0].wokload: unknown key; did you mean 'workload'?"),
        (
            '"vm"',
            '"container"',
            ":10: attachments[0].workload: 'container' is not a valid value (vm, paas)",
        ),
        ('"10.0.0.4"', '"10.0.0.4/8"', ":8: attachments[0].address: '10.0.0.4/8' has bits beyond its prefix"),
        ('"10.0.0.4"', "104", ":8: attachments[0].address: expected an address or a prefix in quotes, got 104"),
        ('"vni1001"', '"vni:1001"', ":7: attachments[0].segment: 'vni:1001' is no interface name"),
        ('"vni1001",\n', '"vni1001"\n', ":8: not JSON: expected ',' or '}'"),
        ('"10.0.0.4"', "1e999", ":8: attachments[0].address: "),
        ('"vni1001"', '"vni\\q"', ":7: not JSON: invalid escaped character"),
        ("]\n}\n", "]\n", ":13: not JSON: Input data was truncated"),
        ("]\n}\n", "]\n} x\n", ":13: not JSON: trailing characters"),
    ],
)
def test_a_mistake_in_json_is_reported_with_its_place(
    tmp_path: Path, was: str, becomes: str, message: str
) -> None:
    assert EXAMPLE_JSON.count(was) == 1
    assert refused(tmp_path, EXAMPLE_JSON.replace(was, becomes), "inventory.json").startswith(
        f"inventory.json{message}"
    )


def test_a_record_that_stands_twice_names_both_files(tmp_path: Path) -> None:
    one, two = tmp_path / "one.yaml", tmp_path / "two.json"
    one.write_text(EXAMPLE)
    two.write_text(EXAMPLE_JSON)
    with pytest.raises(InputError) as caught:
        read_inventory([str(one), str(two)])
    assert str(caught.value) == (f"{two}:3: subscriptions[0]: subscriptions/{ID} stands in {one}:2 already")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "inventory.yaml: the document is empty"),
        ("# nothing\n", "inventory.yaml: the document is empty"),
        ("subscriptions", "inventory.yaml:1: expected a table, got 'subscriptions'"),
        ("- a\n- b\n", "inventory.yaml:1: expected a table, got ['a', 'b']"),
        ("subscriptions:\n", "inventory.yaml:1: subscriptions: expected a list, got nothing"),
        ("subscriptions:\n- 5\n", "inventory.yaml:2: subscriptions[0]: expected a table, got 5"),
        ("a: 1\n---\nb: 2\n", "inventory.yaml:2: not YAML: but found another document"),
        ("? [a]\n: b\n", "inventory.yaml:1: not YAML: found unhashable key"),
        ("[" * 100_000, "inventory.yaml:1: expected a table, got nothing"),
        ("subscriptions: " + "[" * 3_000, "inventory.yaml"),
        ('{"subscriptions": ' + "[" * 100_000, "inventory.yaml"),
        ('{"subscriptions": [' + '{"id":' * 100_000, "inventory.yaml"),
    ],
)
def test_a_document_of_another_form_is_refused(tmp_path: Path, text: str, message: str) -> None:
    assert refused(tmp_path, text).startswith(message)


MERGED = f"""\
subscriptions:
- &one {{id: {ID}, offer: csp, created: 2020-01-01}}
- &two {{<<: *one, id: {OTHER}}}
- {{<<: *two, id: 11111111-0000-4000-8000-000000000003}}
- {{<<: [*two, *one], id: 11111111-0000-4000-8000-000000000004, offer: trial}}
"""


def test_a_key_that_overrides_a_merged_one_does_not_stand_twice(tmp_path: Path) -> None:
    records = [json.loads(body) for body in read(tmp_path, MERGED).records.values()]
    assert [record["offer"] for record in records] == ["csp", "csp", "csp", "trial"]


def test_of_two_mistakes_in_yaml_the_first_is_reported(tmp_path: Path) -> None:
    text = EXAMPLE.replace("payment_history: true", "payment_history: !mine true")
    text = text.replace("    by: self\n", "    by: self\n    by: other\n")
    assert refused(tmp_path, text).startswith("inventory.yaml:11: not YAML: the tag '!mine' is not taken")


def test_a_wrong_document_is_not_printed_whole(tmp_path: Path) -> None:
    assert len(refused(tmp_path, json.dumps(["x" * 100_000]))) < 500


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "bomb",
    [
        "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 60)),
        "subscriptions: &a [*a]\n",
    ],
)
def test_aliases_of_aliases_come_to_an_end(tmp_path: Path, bomb: str) -> None:
    assert "inventory.yaml:1: " in refused(tmp_path, bomb)


def test_bytes_that_are_not_utf_8_are_reported_with_their_line(tmp_path: Path) -> None:
    path = tmp_path / "latin.yaml"
    path.write_bytes(b"subscriptions:\n- name: m\xfcller\n")
    with pytest.raises(InputError, match=r"latin\.yaml:2: byte 0xfc is not UTF-8"):
        read_inventory([str(path)])


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone\.yaml: No such file or directory"):
        read_inventory([str(tmp_path / "gone.yaml")])
    with pytest.raises(InputError, match="Is a directory"):
        read_inventory([str(tmp_path)])


def test_yaml_numbers_that_look_like_addresses_are_refused(tmp_path: Path) -> None:
    text = EXAMPLE.replace("address: 10.0.0.4", "address: 1:20")  # 80, for YAML 1.1
    assert "attachments[0].address: expected an address or a prefix in quotes, got 80" in refused(tmp_path, text)


def test_progress_is_heard(tmp_path: Path) -> None:
    heard: list[int] = []
    path = tmp_path / "many.json"
    attachments = [
        {"segment": "vni1", "address": f"10.0.{number // 256}.{number % 256}", "subscription": ID}
        for number in range(25_000)
    ]
    path.write_text(json.dumps({"attachments": attachments}))
    read_inventory([str(path)], heard.append)
    assert heard == [10_000, 20_000]


def test_a_requested_exemption_needs_no_decision(tmp_path: Path) -> None:
    text = f"exemptions:\n- {{subscription: {ID}, state: requested, requested: 2026-01-08T09:00:00Z}}\n"
    ((key, body),) = read(tmp_path, text).records.items()
    record = decode(key, body)
    assert getattr(record, "requested", None) == datetime(2026, 1, 8, 9, tzinfo=UTC)
