"""The counts and the table of the test with real mail software. docs/explanation/mail.md shows the table."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest

from mail import report
from mail.clients import CLIENTS, Fate, Said, classified
from mail.ledger import Ledger
from mail.rows import EXPECTED, STATES, State, mail, rows

DOCUMENT = Path(__file__).resolve().parents[2] / "docs/explanation/mail.md"
# The text of a cell, as `Said` prints it.
CELL = re.compile(r"(delivered|timed out|refused|cut) after \d+ s(: `[^`]+`)?")


def table(text: str) -> list[list[str]]:
    """The cells of the first table, its head first."""
    first = itertools.dropwhile(lambda line: not line.startswith("|"), text.splitlines())
    lines = itertools.takewhile(lambda line: line.startswith("|"), first)
    return [[one.strip() for one in line.strip("|").split("|")] for line in lines if "---" not in line]


@pytest.mark.parametrize("text", [DOCUMENT.read_text(), report.table(rows(list(State)))], ids=["document", "run"])
def test_the_table_has_each_software_and_each_way_to_refuse(text: str) -> None:
    head, *body = table(text)
    assert head == ["software", *report.COLUMNS]
    assert [row[0] for row in body] == [kind.NAME for kind in CLIENTS]
    assert {len(row) for row in body} == {len(head)}


def test_the_document_shows_what_each_software_said_as_the_run_prints_it() -> None:
    _, *body = table(DOCUMENT.read_text())
    for _, *cells in body:
        for title, cell in zip(report.COLUMNS, cells, strict=True):
            found = CELL.fullmatch(cell)
            assert found is not None, cell
            assert found[1] == EXPECTED[report.COLUMNS[title]], cell


def test_the_run_prints_the_mail_that_took_longest() -> None:
    customers = rows([State.DROPPED, State.REJECTED, State.LIMITED])
    customers[0].said = {
        4: [Said(Fate.TIMED_OUT, 3.2, "a|b"), Said(Fate.TIMED_OUT, 30.4, "Connection | timed out")]
    }
    _, first, *_ = table(report.table(customers))
    assert first[1] == "timed out after 30 s: `Connection / timed out`"
    assert first[2:] == ["not measured", "not measured"]


def test_every_software_is_in_every_state_on_one_gateway_or_both() -> None:
    for states in STATES.values():
        customers = rows(states)
        assert {(row.kind, row.state) for row in customers} == {
            (kind, state) for kind in CLIENTS for state in states
        }
        assert len({row.tenant.vni for row in customers}) == len(customers)
    assert {state for states in STATES.values() for state in states} == set(State)


def test_the_last_line_of_a_mail_holds_its_mark() -> None:
    text = mail("first-1101-4-0", 5_000)
    assert 4_900 < len(text) < 5_200
    assert text.splitlines()[-1] == "end-first-1101-4-0"


@pytest.mark.parametrize(
    ("words", "fate"),
    [
        ("TimeoutError: [Errno 110] Connection timed out", Fate.TIMED_OUT),
        ("Error connecting to 203.0.113.25:25: IO::Socket::INET6: connect: timeout", Fate.TIMED_OUT),
        ("connect to 203.0.113.25[203.0.113.25]:25: Connection refused", Fate.REFUSED),
        ("lost connection with 203.0.113.25 while sending message body", Fate.CUT),
    ],
)
def test_the_words_of_an_error_give_the_fate(words: str, fate: Fate) -> None:
    assert classified(words, 1.0) == Said(fate, 1.0, words)


def scrape(segment: float, subscription: float) -> dict[str, float]:
    """Two of the agent's counters among others."""
    return {
        'portward_packets_total{segment="vni1",verdict="deny"}': segment,
        'portward_subscription_packets_total{subscription="x",verdict="deny"}': subscription,
        'portward_screen_packets_total{rule="unknown"}': 7.0,
    }


def test_increases_are_added_up_over_a_restart_that_begins_anew() -> None:
    ledger = Ledger()
    for both in ((3, 2), (5, 2), (0, 0), (4, 1)):
        ledger.scraped(scrape(*both))
    assert (ledger.of("vni1"), ledger.of("x")) == (9, 3)
    assert ledger.by_verdict("vni1") == {"deny": 9}


def test_a_counter_that_goes_on_after_a_restart_is_not_counted_twice() -> None:
    ledger = Ledger()
    for both in ((3, 2), (3, 2), (5, 2)):
        ledger.scraped(scrape(*both))
    assert (ledger.of("vni1"), ledger.of("x")) == (5, 2)


@pytest.mark.parametrize(("back", "packets"), [((1, 1), (4, 3)), ((5, 2), (5, 2))], ids=["anew", "goes on"])
def test_a_counter_that_a_scrape_does_not_have_is_compared_when_it_is_back(
    back: tuple[int, int], packets: tuple[int, int]
) -> None:
    ledger = Ledger()
    for metrics in (scrape(3, 2), {}, scrape(*back)):
        ledger.scraped(metrics)
    assert (ledger.of("vni1"), ledger.of("x")) == packets
