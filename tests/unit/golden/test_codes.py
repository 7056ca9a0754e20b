"""Each enum value keeps the number or word that stands for it on disk, wherever a new value is added to the
enum."""

from __future__ import annotations

from enum import Enum

import pytest

from portward.base.codes import REASON_NUMBER, REASON_NUMBERS, REASON_OF
from portward.dataplane.selfcheck import DifferenceKind
from portward.ipc.counters import WorkerEvent
from portward.ipc.mark import Class, PacketOutcome
from portward.model import Authentication, ExemptionState, FraudCheck, Mode, Reason, Standing, Workload
from portward.store.chain import IntegrityIssueKind
from unit.golden import golden

CODES = golden("codes.json")
WORDS: dict[str, type[Enum]] = {
    "Standing": Standing,
    "Workload": Workload,
    "Mode": Mode,
    "ExemptionState": ExemptionState,
    "FraudCheck": FraudCheck,
    "Authentication": Authentication,
    "Difference": DifferenceKind,
    "LogFinding": IntegrityIssueKind,
}


def test_each_reason_has_a_number_of_its_own_that_fits() -> None:
    assert set(REASON_NUMBER) == set(Reason), "give the new reason the next free number in codes.py"
    assert len(set(REASON_NUMBER.values())) == len(Reason), "two reasons share a number"
    assert all(0 < number < REASON_NUMBERS for number in REASON_NUMBER.values())
    assert {reason: number for number, reason in REASON_OF.items()} == REASON_NUMBER


def test_reasons_keep_their_numbers() -> None:
    numbers = {reason.value: number for reason, number in REASON_NUMBER.items()}
    given = CODES["reason"]
    kept = {name: number for name, number in given.items() if name in numbers}
    assert {name: numbers[name] for name in kept} == kept, "a reason has another number than before"
    assert len(set(given.values())) == len(given), "a number is given again"
    missing = numbers.keys() - given.keys()
    assert not missing, f"add the numbers of new reasons to codes.json: {missing}"


@pytest.mark.parametrize(
    ("kind", "numbered"), [("outcome", PacketOutcome), ("event", WorkerEvent), ("class", Class)]
)
def test_numbers_in_marks_and_counters_stay(kind: str, numbered: type[Enum]) -> None:
    numbers = {member.name: member.value for member in numbered}
    assert CODES[kind].items() <= numbers.items()
    assert len(set(numbers.values())) == len(numbers)


@pytest.mark.parametrize("name", WORDS)
def test_words_in_records_metrics_and_findings_stay(name: str) -> None:
    assert set(CODES["values"][name]) <= {member.value for member in WORDS[name]}
