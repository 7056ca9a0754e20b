"""The changes that an inventory would make are found, checked against preset and store, and printed one a line."""

from __future__ import annotations

from pathlib import Path
from uuid import UUID

import pytest
from msgspec.structs import replace

from portward.errors import InputError
from portward.inventory.difference import check_offers, check_references, described, difference
from portward.model import Record, Standing
from portward.policy import presets
from portward.store.codec import encode, key_of
from unit.inventory.test_document import read
from unit.store.samples import ALL, CONTOSO, EXAMPLE, FABRIKAM, GRANT, MACHINE, PREFIX, put, texts

HAVE = texts(*ALL)


def without(*records: Record) -> dict[str, str]:
    """The store's records without these."""
    return {key: body for key, body in HAVE.items() if key not in {key_of(record) for record in records}}


def part(folder: Path, *names: str) -> str:
    """A file with only these lists of the example."""
    lists = EXAMPLE.replace("attachments:", "\0attachments:").replace("exemptions:", "\0exemptions:").split("\0")
    return "".join(text for text in lists if text.split(":")[0] in names)


def test_what_is_the_same_is_no_difference(tmp_path: Path) -> None:
    change = difference(HAVE, read(tmp_path, EXAMPLE), prune=True)
    assert change.puts() == []
    assert change.counts() == {"added": 0, "changed": 0, "removed": 0}


def test_what_is_new_is_added(tmp_path: Path) -> None:
    change = difference(without(MACHINE), read(tmp_path, EXAMPLE), prune=True)
    assert change.puts() == [put(MACHINE)]
    assert list(change.added) == [key_of(MACHINE)]


def test_what_differs_is_changed(tmp_path: Path) -> None:
    have = HAVE | texts(replace(FABRIKAM, standing=Standing.DISABLED))
    change = difference(have, read(tmp_path, EXAMPLE), prune=True)
    assert list(change.changed) == [key_of(FABRIKAM)]
    assert change.puts() == [put(FABRIKAM)]


def test_only_pruning_removes(tmp_path: Path) -> None:
    inventory = read(tmp_path, part(tmp_path, "subscriptions", "attachments"))
    assert difference(HAVE, inventory, prune=False).puts() == []
    assert difference(HAVE, inventory, prune=True).puts() == [(key_of(GRANT), None)]


def test_a_record_that_was_written_otherwise_is_the_same(tmp_path: Path) -> None:
    key, body = key_of(CONTOSO), encode(CONTOSO)
    spaced = body.replace(",", " , ").replace(',"standing":"good"', "")
    assert difference({**HAVE, key: spaced}, read(tmp_path, EXAMPLE), prune=True).puts() == []


@pytest.mark.parametrize("body", ["{}", "garbage", '{"id":"x","new_field":1}'])
def test_a_record_that_cannot_be_read_is_put_right(tmp_path: Path, body: str) -> None:
    inventory = read(tmp_path, EXAMPLE)
    have = HAVE | {key_of(CONTOSO): body}
    change = difference(have, inventory, prune=False)
    assert change.puts() == [put(CONTOSO)]
    (line,) = described(have, inventory, change)
    assert line.startswith("~ subscription contoso-prod: ")


def test_each_change_is_said_in_a_line(tmp_path: Path) -> None:
    other = UUID(int=9)
    have = without(MACHINE, PREFIX, GRANT) | texts(
        replace(FABRIKAM, standing=Standing.DISABLED, name="fab"),
        replace(PREFIX, segment="vni7"),
        replace(CONTOSO, id=other),
        replace(GRANT, subscription=other),
    )
    inventory = read(tmp_path, EXAMPLE)
    assert sorted(described(have, inventory, difference(have, inventory, prune=True))) == sorted(
        [
            "~ subscription fabrikam: name fab → fabrikam, standing disabled → good",
            "+ attachment vni1001 10.0.0.4 → contoso-prod (enterprise-agreement)",
            "+ attachment vni1002 10.0.0.0/24 → fabrikam (pay-as-you-go)",
            "+ exemption of fabrikam (pay-as-you-go): granted",
            "- attachment vni7 10.0.0.0/24 → fabrikam (pay-as-you-go)",
            f"- subscription contoso-prod {other} (enterprise-agreement, created 2021-03-02, good)",
            "- exemption of contoso-prod (enterprise-agreement): granted",
        ]
    )


def test_an_offer_that_the_preset_does_not_know_is_refused(tmp_path: Path) -> None:
    inventory = read(tmp_path, EXAMPLE.replace("pay-as-you-go", "pay-as-yuo-go"))
    with pytest.raises(InputError) as caught:
        check_offers(inventory, presets.load("azure-2020"))
    assert str(caught.value).endswith(
        "inventory.yaml:8: subscriptions[1].offer: the preset azure-2020 knows no offer 'pay-as-yuo-go'; "
        "did you mean 'pay-as-you-go'?"
    )
    check_offers(read(tmp_path, EXAMPLE), presets.load("azure-2020"))


@pytest.mark.parametrize(
    ("list_", "line", "field"), [("attachments", 3, "attachments[0]"), ("exemptions", 1, "exemptions[0]")]
)
def test_an_unknown_subscription_is_refused(tmp_path: Path, list_: str, line: int, field: str) -> None:
    inventory = read(tmp_path, part(tmp_path, list_))
    check_references(HAVE, inventory, prune=False)
    with pytest.raises(InputError) as caught:
        check_references({}, inventory, prune=False)
    known = (CONTOSO if list_ == "attachments" else FABRIKAM).id
    problem = f"{field}.subscription: no subscription {known} is in the files or in the store"
    assert problem in str(caught.value)
    assert caught.value.line == line + 1


def test_a_subscription_that_is_still_needed_cannot_be_pruned(tmp_path: Path) -> None:
    inventory = read(tmp_path, part(tmp_path, "attachments"))
    with pytest.raises(InputError, match=r"attachments\[0\].subscription: .* --prune would remove it"):
        check_references(HAVE, inventory, prune=True)
