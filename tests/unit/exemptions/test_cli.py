"""`portward exemption …` and `portward attachment started` as the support and abuse teams use them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from typer.testing import CliRunner, Result

from portward.cli.program import app
from portward.errors import InputError, PortwardError
from portward.exemptions.lifecycle import RefusedError
from portward.model import Exemption, ExemptionState, RateLimit, Standing, Subscription
from portward.store.codec import decode
from portward.store.confirmation import confirmed_alone
from unit.store.samples import CONTOSO, FABRIKAM, MACHINE, PREFIX, opened, put, write

PAYG = FABRIKAM
REVIEWED = Subscription(
    id=CONTOSO.id.__class__("11111111-0000-4000-8000-000000000003"),
    name="tailspin",
    offer="azure-sponsorship",
    created=FABRIKAM.created,
)
WHY = ("--justification", "own servers")
Run = Callable[..., Result]


@pytest.fixture
def files(tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with portward.toml and a store with three customers, in which the program runs."""
    (tmp_path / "portward.toml").write_text(f'segments = ["vni*"]\nuplinks = ["up0"]\nstore = "sqlite:{path}"\n')
    with closing(opened(path)) as store:
        write(store, *(put(record) for record in (CONTOSO, PAYG, REVIEWED, MACHINE, PREFIX)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(files: Path) -> Run:
    """Runs a verb of `exemption` in that folder, and raises its errors."""
    assert files.is_dir()

    def ran(*arguments: Any, code: int = 0, group: str = "exemption") -> Result:
        argv = [group, *map(str, arguments), "--config", "portward.toml"]
        result = CliRunner().invoke(app, argv, catch_exceptions=False, standalone_mode=False)
        # Without standalone mode typer gives the code of an Exit as the value.
        assert (result.return_value or 0, result.stderr) == (code, "")
        return result

    return ran


def stored(path: Path, id_: Any) -> Exemption:
    with closing(opened(path)) as store:
        body = store.get(f"exemptions/{id_}")
    assert body is not None
    record = decode(f"exemptions/{id_}", body)
    assert isinstance(record, Exemption)
    return record


def test_self_service_is_granted_at_once_and_says_what_comes_next(run: Run, path: Path) -> None:
    printed = run("request", PAYG.id, "--as", "bob").stdout
    assert printed.startswith(f"exemption of {PAYG.id} (fabrikam): granted at ")
    assert "by self-service, as revision 2" in printed
    assert "stop the virtual machine and start it again" in printed
    assert stored(path, PAYG.id).state is ExemptionState.GRANTED


def test_self_service_that_is_rejected_ends_with_1(run: Run, path: Path) -> None:
    with closing(opened(path)) as store:
        write(store, put(Subscription(id=PAYG.id, name="fabrikam", offer=PAYG.offer, created=PAYG.created)))
    printed = run("request", PAYG.id, code=1).stdout
    assert "rejected at" in printed
    assert "first invoice" in printed
    assert stored(path, PAYG.id).state is ExemptionState.REJECTED


def test_a_review_from_the_request_to_the_revocation(run: Run, path: Path) -> None:
    id_ = REVIEWED.id
    printed = run(
        "request", id_, *WHY, "--mail-software", "postfix", "--volume", 900, "--reverse-dns", "mx.example.net",
        "--authentication", "spf", "--authentication", "dkim", "--terms", "--as", "bob",
    ).stdout  # fmt: skip
    assert "requested at" in printed
    assert f"`portward exemption grant {id_} --fraud-check TEXT`" in printed
    shown = run("show", id_).stdout
    for part in ("own servers", "postfix", "900 messages a day", "mx.example.net", "SPF, DKIM", "accepted", "bob"):
        assert part in shown
    with pytest.raises(RefusedError, match="anti-fraud check that was passed, and none is on record"):
        run("grant", id_)
    printed = run("grant", id_, "--fraud-check", "called back", "--rate", 60, "--as", "carol").stdout
    assert "granted at" in printed
    assert "by carol" in printed
    assert "60 new connections a minute, 5 at once" in printed
    printed = run("revoke", id_, "--reason", "spam, case 4711", "--as", "dave").stdout
    assert "revoked at" in printed
    assert "spam, case 4711" in printed
    printed = run("history", id_).stdout
    states = re.findall(r"^\S+ \S+Z  revision (\d)  (\w+): (\w+)$", printed, re.MULTILINE)
    assert states == [("2", "bob", "requested"), ("3", "carol", "granted"), ("4", "dave", "revoked")]
    assert stored(path, id_).by == "dave"


def test_a_limit_can_be_given_and_taken_away(run: Run, path: Path) -> None:
    run("request", PAYG.id)
    before = stored(path, PAYG.id)
    printed = run("limit", PAYG.id, "--rate", 120, "--burst", 9).stdout
    assert "limit     120 new connections a minute, 9 at once" in printed
    assert "restart" not in printed
    assert "stop the virtual machine" not in printed, "it counts at once"
    assert "next      nothing: it counts at once" in printed
    assert stored(path, PAYG.id) == replace(before, limit=RateLimit(per_minute=120, burst=9))
    run("limit", PAYG.id, "--none")
    assert stored(path, PAYG.id) == before


def test_a_reason_that_cannot_be_printed_is_not_written(run: Run, path: Path) -> None:
    run("request", PAYG.id)
    with pytest.raises(InputError, match=r"reason: .* holds U\+001B"):
        run("revoke", PAYG.id, "--reason", "spam\x1b[31m")
    assert stored(path, PAYG.id).state is ExemptionState.GRANTED


def test_a_check_that_the_configuration_names_is_asked(run: Run, files: Path, path: Path) -> None:
    check = files / "check"
    check.write_text("""#!/bin/sh\ncat > asked; echo '{"result": "pass", "note": "known since 2019"}'\n""")
    check.chmod(0o700)
    with (files / "portward.toml").open("a") as config:
        config.write('[exemptions]\ncheck = ["./check"]\n')
    printed = run("request", REVIEWED.id, *WHY).stdout
    assert "pass: known since 2019" in printed
    assert f"`portward exemption grant {REVIEWED.id}`," in printed
    assert json.loads((files / "asked").read_text())["justification"] == "own servers"
    run("grant", REVIEWED.id)
    assert stored(path, REVIEWED.id).state is ExemptionState.GRANTED


def test_a_check_is_not_asked_for_what_is_refused_or_decided_at_once(run: Run, files: Path) -> None:
    with (files / "portward.toml").open("a") as config:
        config.write('[exemptions]\ncheck = ["/bin/sh", "-c", "touch asked"]\n')
    run("request", PAYG.id)
    with pytest.raises(RefusedError, match="justification"):
        run("request", REVIEWED.id)
    with pytest.raises(RefusedError, match="none is needed"):
        run("request", CONTOSO.id, *WHY)
    assert not (files / "asked").exists()


def test_a_check_that_fails_rejects_and_one_that_crashes_only_refers(run: Run, files: Path, path: Path) -> None:
    config = (files / "portward.toml").read_text()
    for script, state in (("exit 1", "requested"), ('echo \'{"result": "fail"}\'', "rejected")):
        command = json.dumps(["/bin/sh", "-c", script])
        (files / "portward.toml").write_text(f"{config}[exemptions]\ncheck = {command}\n")
        if state == "rejected":
            run("reject", REVIEWED.id, "--reason", "again")
        run("request", REVIEWED.id, *WHY, code=int(state == "rejected"))
        assert stored(path, REVIEWED.id).state == state


def test_many_are_revoked_with_their_count_or_not_at_all(run: Run, files: Path, path: Path) -> None:
    ids = [CONTOSO.id.__class__(int=1000 + number) for number in range(30)]
    with closing(opened(path)) as store:
        write(
            store,
            *(put(Subscription(id=id_, offer="csp", created=PAYG.created, payment_history=True)) for id_ in ids),
            *(
                put(
                    Exemption(
                        subscription=id_, state=ExemptionState.GRANTED, decided=datetime(2026, 1, 9, tzinfo=UTC)
                    )
                )
                for id_ in ids
            ),
        )
    with pytest.raises(
        PortwardError, match=r"would revoke 30 exemptions; nothing was written: --confirm 30 does it"
    ):
        run("revoke", "--offer", "csp", "--reason", "spam")
    with pytest.raises(PortwardError, match="would revoke 30 exemptions, and not 29"):
        run("revoke", "--offer", "csp", "--reason", "spam", "--confirm", 29)
    listed = files / "ids"
    listed.write_text(f"# case 4711\n{ids[0]}\n\n{ids[1]}  # the second\n{PAYG.id}\n")
    with pytest.raises(PortwardError, match="no exemption that could be revoked"):
        run("revoke", "--file", listed, "--reason", "spam", "--confirm", 3)
    assert stored(path, ids[0]).state is ExemptionState.GRANTED, "all or none"
    listed.write_text(f"{ids[0]}\n{ids[1]}\n{ids[1]}\n")
    assert "revoked 2 exemptions, as revision 3" in run(
        "revoke", "--file", listed, "--reason", "spam", "--confirm", 2
    ).stdout  # fmt: skip
    printed = run("revoke", "--offer", "csp", "--reason", "spam", "--confirm", 28, "--json").stdout
    assert json.loads(printed) == {"revoked": 28, "revision": 4, "enforced_after_ms": None}
    with closing(opened(path)) as store:
        assert confirmed_alone(store.get("confirmed")) == 4, "however many it flips"


def test_an_empty_list_revokes_nothing_and_names_the_revision(run: Run, files: Path) -> None:
    (files / "ids").write_text("# nobody\n")
    many = ("revoke", "--file", "ids", "--reason", "spam", "--confirm", 0)
    assert run(*many).stdout == "nothing to revoke, the store stays at revision 1\n"
    assert json.loads(run(*many, "--json").stdout) == {"revoked": 0, "revision": 1, "enforced_after_ms": None}


def test_nothing_to_revoke_needs_no_confirmation(run: Run, path: Path) -> None:
    printed = run("revoke", "--offer", "csp", "--reason", "spam").stdout
    assert printed == "nothing to revoke, the store stays at revision 1\n"
    with pytest.raises(PortwardError, match="there is nothing to revoke, and not 3; nothing was written"):
        run("revoke", "--offer", "csp", "--reason", "spam", "--confirm", 3)


@pytest.mark.parametrize("confirm", [(), ("--confirm", 3)])
def test_a_list_with_what_cannot_be_revoked_is_refused_at_once_by_its_lines(
    run: Run, files: Path, path: Path, confirm: tuple[Any, ...]
) -> None:
    """The list is refused before the count has to be confirmed."""
    run("request", PAYG.id)
    unknown = "11111111-0000-4000-8000-0000000000ff"
    (files / "ids").write_text(f"# spam\n{PAYG.id}\n{unknown}\n{REVIEWED.id}\n{unknown}\n")
    with pytest.raises(PortwardError) as error:
        run("revoke", "--file", "ids", "--reason", "spam", *confirm)
    assert error.value.exit_code == 1
    assert error.value.lines() == [
        f"ids:3: no subscription {unknown} is in the store: `portward apply` brings it in",
        f"ids:4: exemption of {REVIEWED.id} (tailspin): there is no exemption that could be revoked",
    ]
    assert stored(path, PAYG.id).state is ExemptionState.GRANTED


def test_of_a_long_list_a_screen_of_mistakes_is_printed(run: Run, files: Path) -> None:
    (files / "ids").write_text("".join(f"{CONTOSO.id.__class__(int=number)}\n" for number in range(1, 41)))
    with pytest.raises(PortwardError) as error:
        run("revoke", "--file", "ids", "--reason", "spam")
    assert len(error.value.lines()) == 21
    assert error.value.lines()[-1] == "ids: and 20 lines more like these"


def test_mistakes_in_a_list_have_file_and_line(run: Run, files: Path) -> None:
    (files / "ids").write_text(f"{PAYG.id}\nfabrikam\n")
    with pytest.raises(InputError, match=r"^ids:2: 'fabrikam' is no subscription's id$"):
        run("revoke", "--file", "ids", "--reason", "spam")


@pytest.mark.parametrize("what", [(), ("1", "--offer", "csp"), ("--file", "x", "--offer", "csp")])
def test_a_revocation_names_one_thing(run: Run, what: tuple[str, ...]) -> None:
    with pytest.raises(InputError, match="name one of them"):
        run("revoke", *what, "--reason", "spam")


def test_waiting_where_no_agent_runs_writes_nothing(run: Run, path: Path) -> None:
    run("request", PAYG.id)
    with pytest.raises(PortwardError, match=r"no agent runs on table .*; nothing was written"):
        run("revoke", PAYG.id, "--reason", "spam", "--wait")
    assert stored(path, PAYG.id).state is ExemptionState.GRANTED


def test_a_list_can_be_narrowed(run: Run) -> None:
    run("request", PAYG.id)
    run("request", REVIEWED.id, *WHY)

    def found(*filters: str) -> list[str]:
        return [json.loads(line)["name"] for line in run("list", "--json", *filters).stdout.splitlines()]

    assert found() == ["fabrikam", "tailspin"]
    assert found("--state", "requested") == ["tailspin"]
    assert found("--state", "requested", "--state", "granted") == ["fabrikam", "tailspin"]
    assert found("--offer", "pay-as-you-go") == ["fabrikam"]
    assert found("--name", "TAIL") == ["tailspin"]
    assert found("--state", "revoked") == []
    assert "tailspin (azure-sponsorship)" in run("list").stdout


def test_a_list_without_a_line_says_so(run: Run) -> None:
    assert run("list").stdout == "the store has no exemption\n"
    run("request", PAYG.id)
    assert run("list", "--name", "zzz").stdout == "none of 1 exemption is such a one\n"
    assert run("list", "--name", "zzz", "--json").stdout == ""
    assert "such a one" not in run("list").stdout


def test_the_name_of_one_subscription_is_taken_for_its_id(run: Run, path: Path) -> None:
    run("request", "fabrikam")
    assert f"{PAYG.id}  fabrikam" in run("show", "fabrikam").stdout
    assert "granted" in run("history", "fabrikam").stdout
    assert f"exemption of {PAYG.id} (fabrikam): revoked" in run("revoke", "fabrikam", "--reason", "spam").stdout


def test_the_name_of_several_subscriptions_is_refused_with_their_ids(run: Run, path: Path) -> None:
    twin = replace(PAYG, id=CONTOSO.id.__class__(int=77))
    with closing(opened(path)) as store:
        write(store, put(twin))
    with pytest.raises(InputError) as error:
        run("revoke", "fabrikam", "--reason", "spam")
    assert str(error.value) == (
        f"SUBSCRIPTION: 'fabrikam' is the name of 2 subscriptions; write the id instead: {twin.id}, {PAYG.id}"
    )


@pytest.mark.parametrize(
    ("owner", "state", "next_step"),
    [
        (
            replace(PAYG, offer="free-trial"),
            "granted",
            "the grant makes no difference: subscriptions of the offer .* can never be exempt: ",
        ),
        (
            replace(PAYG, offer="enterprise-agreement"),
            "granted",
            "the grant makes no difference: none is needed: subscriptions of the offer Enterprise Agreement ",
        ),
        (
            replace(PAYG, standing=Standing.DISABLED),
            "granted",
            "the grant makes no difference: the account's standing is disabled, and then no machine may send",
        ),
        (
            replace(PAYG, offer="free-trial"),
            "requested",
            "no grant is possible: subscriptions of the offer .* can never be exempt: send through an "
            "authenticated relay, or use another kind of subscription; `portward exemption reject ",
        ),
        (
            replace(PAYG, offer="free-trial"),
            "revoked",
            "no new request is possible: subscriptions of the offer .* can never be exempt: ",
        ),
        (
            replace(PAYG, offer="none-such"),
            "revoked",
            "no new request is possible: the preset azure-2020 does not ",
        ),
        (PAYG, "granted", "it counts for machines started after it was granted: "),
        (replace(PAYG, standing=Standing.DISABLED), "revoked", "a new request is possible: "),
    ],
)
def test_the_next_step_is_one_that_can_be_taken(
    run: Run, path: Path, owner: Subscription, state: str, next_step: str
) -> None:
    """This holds for records of another tool, and if the preset has changed since."""
    decided = datetime(2026, 1, 9, tzinfo=UTC)
    with closing(opened(path)) as store:
        write(
            store, put(owner), put(Exemption(subscription=owner.id, state=ExemptionState(state), decided=decided))
        )
    line = rf"(?m)^  next      {next_step}"
    assert re.search(line, run("show", owner.id).stdout)
    if state == "granted" and owner != PAYG:
        assert re.search(line, run("limit", owner.id, "--rate", 9).stdout)


def test_an_exemption_of_no_subscription_has_no_next_step(run: Run, path: Path) -> None:
    id_ = CONTOSO.id.__class__(int=78)
    with closing(opened(path)) as store:
        write(store, put(Exemption(subscription=id_, state=ExemptionState.REVOKED)))
    assert "next      nothing: the store has no such subscription any more" in run("show", id_).stdout


def test_a_revoked_exemption_is_shown_without_its_limit(run: Run, path: Path) -> None:
    """The limit has no effect any more, because nothing passes. The record keeps it."""
    run("request", PAYG.id)
    run("limit", PAYG.id, "--rate", 120)
    assert "limit     120" in run("show", PAYG.id).stdout
    assert "limit" not in run("revoke", PAYG.id, "--reason", "spam").stdout
    assert "limit" not in run("show", PAYG.id).stdout
    assert stored(path, PAYG.id).limit == RateLimit(per_minute=120)
    history = run("history", PAYG.id).stdout
    assert history.count("limit     120") == 1, "the log shows what was"


def test_a_grant_that_has_ended_is_shown_as_expired(run: Run, path: Path) -> None:
    ended = datetime(2026, 2, 1, tzinfo=UTC)
    with closing(opened(path)) as store:
        granted = datetime(2026, 1, 9, tzinfo=UTC)
        write(
            store,
            put(Exemption(subscription=PAYG.id, state=ExemptionState.GRANTED, decided=granted, until=ended)),
        )
    assert "expired at 2026-02-01 00:00:00Z" in run("list", "--state", "expired").stdout
    with pytest.raises(RefusedError, match="has ended by itself at 2026-02-01"):
        run("revoke", PAYG.id, "--reason", "spam")
    run("request", PAYG.id)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("show", "fabrikan"),
            "SUBSCRIPTION: 'fabrikan' is no subscription's id like 11111111-0000-4000-8000-000000000001, and no "
            "subscription in the store has exactly this name",
        ),
        (("show", PAYG.id), "there is no request for an exemption of"),
        (("show", "11111111-0000-4000-8000-0000000000ff"), "no subscription 11111111-0000-4000-8000-0000000000ff"),
        (("history", PAYG.id), "there is no request for an exemption of"),
        (("request", "11111111-0000-4000-8000-0000000000ff"), "`portward apply` brings it in"),
        (("request", PAYG.id, "--until", "tomorrow"), "--until: 'tomorrow' is no time"),
        (("request", PAYG.id, "--until", "2030-01-01T00:00:00"), "has no time zone: 2030-01-01T00:00:00Z is"),
        (("request", PAYG.id, "--until", "2020-01-01"), "which has passed"),
        (("request", PAYG.id, "--as", " "), "--as: ' ' is no name"),
        (("request", REVIEWED.id, *WHY, "--mail-software", "a\x1b[2J"), "details: "),
        (("request", REVIEWED.id, "--justification", "a\x1b[2J"), "justification: "),
        (("grant", PAYG.id, "--burst", 5), "--burst: a burst needs a rate"),
        (("grant", PAYG.id, "--fraud-check", " "), "--fraud-check: says nothing"),
        (("revoke", PAYG.id, "--reason", "x", "--confirm", 1), "--confirm: goes with --file and --offer"),
        (
            ("revoke", "--offer", "csq", "--reason", "x"),
            "--offer: the preset azure-2020 knows no 'csq'; did you mean",
        ),
        (("list", "--offer", "csq"), "--offer: the preset azure-2020 knows no 'csq'; did you mean 'csp'?"),
        (("limit", PAYG.id, "--burst", 5), "--burst: a burst needs a rate: --rate says it"),
        (("limit", PAYG.id, "--burst", 5, "--none"), "--burst: a burst needs a rate: --rate says it"),
        (("limit", PAYG.id), "--rate: say either --rate or --none"),
        (("limit", PAYG.id, "--rate", 9, "--none"), "--rate: say either --rate or --none"),
        (("limit", PAYG.id, "--rate", 9), "there is no exemption that could have a limit"),
    ],
)
def test_mistakes_are_reported_with_a_right_value(run: Run, arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(PortwardError) as error:
        run(*arguments)
    assert message in str(error.value)


# --- starts ---


def test_a_start_counts_for_a_grant_before_it(run: Run, path: Path) -> None:
    printed = run("request", PAYG.id, "--json").stdout
    decided = datetime.fromisoformat(json.loads(printed)["exemption"]["decided"])
    printed = run("started", "vni1002", "10.0.0.9", "--as", "hypervisor", group="attachment").stdout
    assert printed.startswith("vni1002 10.0.0.0/24: started ")
    assert "it may send: the subscription's exemption counts for this machine (allowed-exempt)" in printed
    before = (decided - timedelta(seconds=1)).isoformat()
    with pytest.raises(PortwardError, match="a later start is recorded already"):
        run("started", "vni1002", "10.0.0.9", "--at", before, group="attachment")


def test_a_start_before_the_grant_is_said_not_to_count(run: Run) -> None:
    run("request", PAYG.id)
    printed = run("started", "vni1002", "10.0.0.9", "--at", "2026-01-01T00:00:00Z", group="attachment").stdout
    assert "it may NOT send: an exemption is granted, but the machine was not restarted since" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("vni1001", "10.0.0.9"), "no attachment covers 10.0.0.9 in segment vni1001"),
        (("vni1001", "10.0.0.x"), "ADDRESS: '10.0.0.x' is no IPv4 or IPv6 address"),
        (("vni1001", "10.0.0.4", "--at", "2099-01-01"), "lies in the future"),
    ],
)
def test_a_start_that_cannot_be_is_refused(run: Run, arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(PortwardError) as error:
        run("started", *arguments, group="attachment")
    assert message in str(error.value)


def test_apply_takes_no_start_that_lies_in_the_future(files: Path) -> None:
    (files / "inventory.yaml").write_text(
        "attachments:\n"
        "  - {segment: vni1001, address: 10.0.0.4, subscription: 11111111-0000-4000-8000-000000000001}\n"
        "  - segment: vni1001\n    address: 10.0.0.5\n"
        "    subscription: 11111111-0000-4000-8000-000000000001\n    started: 2099-01-01T00:00:00Z\n"
    )
    with pytest.raises(
        InputError, match=r"^inventory.yaml:6: attachments\[1\].started: 2099-\S+ lies in the future"
    ):
        CliRunner().invoke(
            app,
            ["apply", "inventory.yaml", "--config", "portward.toml"],
            catch_exceptions=False,
            standalone_mode=False,
        )


# --- clocks ---


def test_a_clock_that_goes_back_decides_nothing(run: Run, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a grant were dated before a machine's last start, it would count without a restart."""
    run("request", PAYG.id)
    run("revoke", PAYG.id, "--reason", "spam")
    back = datetime.now(UTC) - timedelta(hours=1)
    monkeypatch.setattr("portward.cli.exemption.utc_now", lambda: back)
    with pytest.raises(PortwardError, match=r"this host's clock says .*, and the store's newest change is of"):
        run("request", PAYG.id)
    assert stored(path, PAYG.id).state is ExemptionState.REVOKED
    run("request", PAYG.id, "--trust-clock")
    assert stored(path, PAYG.id).decided == back


def test_a_clock_that_is_a_moment_late_dates_after_what_there_is(
    run: Run, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("request", PAYG.id)
    before = stored(path, PAYG.id).decided
    assert before is not None
    monkeypatch.setattr("portward.cli.exemption.utc_now", lambda: before - timedelta(seconds=1))
    run("revoke", PAYG.id, "--reason", "spam")
    assert stored(path, PAYG.id).decided == before + timedelta(microseconds=1)
