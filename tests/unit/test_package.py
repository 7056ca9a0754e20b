"""The package, as far as it can be checked without building it: manual, completions, libraries, units, scripts."""

from __future__ import annotations

import re
import shutil
import subprocess
from configparser import ConfigParser
from datetime import UTC, datetime
from importlib.metadata import requires
from pathlib import Path

import pytest
from package import completions, manual
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from portward import __version__
from portward.config.keys import Config
from portward.daemon.workers import STAY
from unit.cli.test_cli import verbs

SYSTEMD = Path(__file__).resolve().parents[2] / "systemd"
ROOT = SYSTEMD.parent
PAGES = dict(manual.pages("1.2.3", datetime(2026, 1, 1, tzinfo=UTC)))


def unit(name: str) -> ConfigParser:
    """A unit file. If a key occurs several times, the last value."""
    parser = ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment, method-assign] # keys keep their case
    parser.read_string((SYSTEMD / name).read_text())
    return parser


def test_every_verb_has_a_page_with_its_options() -> None:
    assert set(PAGES) == {"portward", *("-".join(("portward", *verb)) for verb in verbs())}
    assert "\\-\\-dry\\-run" in PAGES["portward-apply"]
    assert all(page.replace("\\-", "-").startswith(f".TH {name.upper()} 1 ") for name, page in PAGES.items())


@pytest.mark.parametrize("name", PAGES)
def test_groff_takes_a_page_without_a_warning(name: str) -> None:
    groff = shutil.which("groff")
    assert groff, "the Makefile installs groff-base"
    said = subprocess.run(
        [groff, "-man", "-Tascii", "-ww", "-z"], input=PAGES[name], capture_output=True, text=True, check=True
    )
    assert said.stderr == ""


def test_every_shell_gets_completions_for_the_program() -> None:
    for path, text in completions.files().items():
        assert "portward" in text, path


def needed(program: str) -> set[str]:
    """The names of all packages that a requirement needs here, without its own."""
    found: set[str] = set()
    waiting = [Requirement(program)]
    while waiting:
        wanted = waiting.pop()
        for line in requires(wanted.name) or []:
            one = Requirement(line)
            environments = [{"extra": extra} for extra in (*wanted.extras, "")]
            if one.marker is None or any(map(one.marker.evaluate, environments)):
                name = canonicalize_name(one.name)
                if name not in found or one.extras:
                    found.add(name)
                    waiting.append(one)
    return found


def test_the_package_has_all_that_the_program_imports_and_nothing_of_the_tests() -> None:
    """debian/rules lets pip take these, and no other, from wheels of the packages that requirements.txt locks."""
    names = needed("portward[lab]")
    assert {"msgspec", "lmdb", "netfilterqueue", "aiosmtpd", "attrs"} <= names  # attrs: aiosmtpd needs it
    assert not names & {"pytest", "scapy", "mypy", "ruff", "atheris"}
    entries = re.findall(r"(?m)^[a-zA-Z0-9].*(?:\n .*)*\n", (ROOT / "requirements.txt").read_text())
    locked = {canonicalize_name(entry.partition("==")[0]) for entry in entries if "--hash=sha256:" in entry}
    assert names <= locked


def test_the_package_has_the_programs_version() -> None:
    """pyproject.toml reads it from the program; debian/changelog cannot."""
    first = (ROOT / "debian" / "changelog").read_text().splitlines()[0]
    assert first.startswith(f"portward ({__version__}) ")


def test_units_of_the_package_are_those_that_debhelper_is_given() -> None:
    """A unit that dh_installsystemd is not given is not enabled, so it would never start. A template cannot be
    enabled without the name of an instance."""
    units = {path.name for kind in ("service", "path") for path in SYSTEMD.glob(f"*.{kind}")}
    installed = (ROOT / "debian" / "portward.install").read_text()
    rules = (ROOT / "debian" / "rules").read_text()
    assert {name for name in units if f"systemd/{name} lib/systemd/system\n" in installed} == units
    assert set(re.findall(r"dh_installsystemd .* (\S+\.service)", rules)) == {
        name for name in units if "@" not in name
    }


def test_a_stopped_unit_removes_no_rule() -> None:
    for path in SYSTEMD.glob("*.service"):
        assert not [key for key in unit(path.name)["Service"] if key.startswith("ExecStop")]


# Lines of an instance's unit in place of the line of the host's own. The section [Unit] is another one.
OF_INSTANCE = {
    "ExecStartPre=-+/bin/chown -R --from=root portward:portward /var/cache/portward": (
        "ExecStartPre=-+/bin/chown -R --from=root portward:portward /var/cache/portward-instances/%i"
    ),
    "ExecStartPre=/usr/bin/portward check --without-store": (
        "ExecStartPre=/usr/bin/portward check --without-store --instance %i"
    ),
    "ExecStart=/usr/bin/portward run --config /etc/portward/portward.toml": (
        "ExecStart=/usr/bin/portward run --instance %i"
    ),
    "CacheDirectory=portward": "CacheDirectory=portward-instances portward-instances/%i",
    # A namespace that was made anew has no rules until the baseline has run, before the next start.
    "RestartSec=1s": "RestartSec=100ms",
}


def test_the_agent_of_an_instance_runs_as_the_hosts_own_does() -> None:
    """Both have the same sandbox, limits and order of commands."""
    own, instance = (
        (SYSTEMD / name).read_text().partition("\n[Service]\n")[2].splitlines()
        for name in ("portward.service", "portward@.service")
    )
    assert OF_INSTANCE.keys() <= set(own)
    assert instance == ["NetworkNamespacePath=/run/netns/%i", *(OF_INSTANCE.get(line, line) for line in own)]


def test_no_start_of_an_instance_is_refused_because_there_were_many() -> None:
    """systemd refuses the sixth start within ten seconds, unless a unit says otherwise. A new namespace would stay
    open then, because each start of the agent runs the baseline first."""
    for name in ("portward@.service", "portward-baseline@.service"):
        assert unit(name)["Unit"]["StartLimitIntervalSec"] == "0"


def test_the_baseline_of_an_instance_may_enter_a_namespace_and_nothing_else_more() -> None:
    own, instance = (unit(f"portward-baseline{at}.service")["Service"] for at in ("", "@"))
    assert instance["CapabilityBoundingSet"] == f"{own['CapabilityBoundingSet']} CAP_SYS_ADMIN"
    assert (own["RestrictNamespaces"], instance["RestrictNamespaces"]) == ("yes", "net")
    # Without RemainAfterExit, each start of the agent runs it again.
    differ = {"CapabilityBoundingSet", "RestrictNamespaces", "RemainAfterExit", "ExecReload", "ExecStart"}
    assert {key: value for key, value in own.items() if key not in differ} == {
        key: value for key, value in instance.items() if key not in differ
    }
    assert instance["ExecStart"] == f"{own['ExecStart']} %i"
    assert instance.keys() == own.keys() - {"RemainAfterExit", "ExecReload"}


def test_the_port_of_a_namespace_is_closed_before_its_agent_starts() -> None:
    text = (SYSTEMD / "portward@.service").read_text()
    assert "\nWants=portward-baseline@%i.service" in text
    assert "\nAfter=portward-baseline@%i.service" in text
    assert unit("portward@.path")["Path"]["PathExists"] == "/run/netns/%i"


def test_a_table_folder_of_an_instance_is_one_that_its_agent_sees() -> None:
    """systemd mounts the folders of the cache below the agent's root folder, which is on a file system that may be
    read-only, so the package makes the place."""
    folders = (ROOT / "debian" / "portward.dirs").read_text().split()
    for name in ("portward.service", "portward@.service"):
        for key, place in (("StateDirectory", "var/lib"), ("CacheDirectory", "var/cache")):
            folder = unit(name)["Service"][key].split()[0]
            assert f"usr/lib/portward/root/{place}/{folder}" in folders
            assert (
                f"d /{place}/{folder} 0750 portward portward -\n"
                in (SYSTEMD / "tmpfiles.d" / "portward.conf").read_text()
            )


def test_systemd_lets_workers_stay_after_the_agent() -> None:
    service = unit("portward.service")["Service"]
    assert service["KillMode"] == "process"
    assert re.fullmatch(rf"{STAY}=\d+", service["Environment"])


def test_files_of_root_beside_the_table_do_not_keep_the_agent_from_starting() -> None:
    service = unit("portward.service")["Service"]
    folder = Path("/var/cache") / service["CacheDirectory"]
    assert folder == Config(segments=("a",), uplinks=("b",)).table
    wanted = f"ExecStartPre=-+/bin/chown -R --from=root {service['User']}:{service['Group']} {folder}\n"
    assert wanted in (SYSTEMD / "portward.service").read_text()


def test_the_port_is_closed_before_the_network() -> None:
    section = unit("portward-baseline.service")["Unit"]
    assert "network-pre.target" in section["Before"].split()
    assert "network-pre.target" in section["Wants"].split()
    assert "nftables.service" in section["After"].split()


def test_the_port_is_closed_again_after_each_action_of_nftables_service() -> None:
    """Its file begins with `flush ruleset`, and is loaded by a start, a restart and a reload."""
    baseline = unit("portward-baseline.service")
    assert "nftables.service" in baseline["Install"]["WantedBy"].split()
    assert baseline["Unit"]["PartOf"] == baseline["Unit"]["ReloadPropagatedFrom"] == "nftables.service"
    assert baseline["Service"]["ExecReload"] == baseline["Service"]["ExecStart"]
    for key, word in (("ExecStart", "start"), ("ExecReload", "start"), ("ExecStop", "stop")):
        wanted = f"{key}=\n{key}=/usr/lib/portward/nftables {word}\n"  # in place of Debian's own
        assert wanted in (SYSTEMD / "nftables.service.d" / "portward.conf").read_text()


# The line of debhelper that restarts the agent after an upgrade; debhelper puts it in place of its mark.
RESTART = 'if [ -n "$2" ]; then deb-systemd-invoke try-restart portward.service || true; fi'
# `systemctl is-active` succeeds while a file `active` exists.
STUBS = {
    "deb-systemd-invoke": '[ "$STATE" != failing ] || { rm "${0%/*}/active"; exit 1; }',
    "systemctl": '[ -e "${0%/*}/active" ]',
}


def postinst(
    folder: Path, stubs: dict[str, str], *arguments: str, state: str = ""
) -> subprocess.CompletedProcess[str]:
    """Runs the script on a machine with systemd, with these programs in place of its own."""
    for name, text in stubs.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    script = (ROOT / "debian" / "portward.postinst").read_text()
    assert "\n#DEBHELPER#\n" in script
    script = script.replace("#DEBHELPER#", RESTART).replace("/run/systemd/system", str(folder))
    return subprocess.run(
        ["sh", "-c", script, "postinst", *arguments],
        env={"PATH": f"{folder}:/usr/bin:/bin", "STATE": state}, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "state", "said"),
    [
        ("configure", "inactive", "nothing is enforced yet"),
        ("configure 0.0.9", "active", ""),  # an upgrade: it is restarted
        ("configure 0.0.9", "failing", "the agent does not start"),
        ("configure 0.0.9", "inactive", "the agent does not run"),  # an installation after a removal
        ("abort-remove", "inactive", "the agent does not run"),
    ],
)
def test_an_installation_prints_that_the_agent_does_not_run(
    tmp_path: Path, arguments: str, state: str, said: str
) -> None:
    if state != "inactive":
        (tmp_path / "active").touch()
    result = postinst(tmp_path, STUBS, *arguments.split(), state=state)
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert said in lines[0] if said else not lines


# `systemctl list-units` prints a line for each file of the folder `units`, and `systemctl is-active` succeeds
# while there is one. A restart of `portward@bad` fails, and the one of `portward@slow` never ends.
INSTANCE_STUBS = {
    "deb-systemd-invoke": """
case "$2" in *@*) echo "$2" >>"${0%/*}/restarted" ;; esac
case "$2" in
portward@bad.service) rm "${0%/*}/units/$2"; echo "Job failed" >&2; exit 1 ;;
portward@slow.service) rm "${0%/*}/units/$2"; exec sleep 60 ;;
esac""",
    "systemctl": """
case "$1" in
list-units) for each in "${0%/*}/units/"*@*; do echo "${each##*/} loaded active running Policy"; done ;;
is-active) [ -e "${0%/*}/units/$3" ] ;;
esac""",
    "timeout": 'shift; exec /usr/bin/timeout 0.2 "$@"',
}


def test_an_upgrade_restarts_each_instance_and_names_those_that_do_not_start(tmp_path: Path) -> None:
    (tmp_path / "units").mkdir()
    names = ["bad", "blue", "slow", "z:1.a"]
    for unit_name in ("portward.service", *(f"portward@{name}.service" for name in names)):
        (tmp_path / "units" / unit_name).touch()
    result = postinst(tmp_path, INSTANCE_STUBS, "configure", "0.0.9")
    assert (result.returncode, result.stderr) == (0, "")
    restarted = (tmp_path / "restarted").read_text().splitlines()
    assert restarted == [f"portward@{name}.service" for name in names], "one after another, and each of them"
    assert result.stdout.splitlines() == [
        f"portward: the agent portward@{name} does not start: journalctl -u portward@{name}"
        for name in ("bad", "slow")
    ]


@pytest.mark.parametrize("arguments", ["configure", "abort-remove", "abort-upgrade 0.0.9"])
def test_only_an_upgrade_restarts_instances(tmp_path: Path, arguments: str) -> None:
    (tmp_path / "units").mkdir()
    (tmp_path / "units" / "portward@blue.service").touch()
    assert postinst(tmp_path, INSTANCE_STUBS, *arguments.split()).returncode == 0
    assert not (tmp_path / "restarted").exists()


# The documents of the package keep their paths from the checkout below this folder.
SHIPPED = "/usr/share/doc/portward/"
_LISTED = [ROOT / line for line in (ROOT / "debian" / "portward.docs").read_text().split()]
DOCUMENTS = {path for one in _LISTED for path in (one, *one.rglob("*")) if path.is_file()}


def test_links_of_the_packages_documents_lead_to_documents_of_the_package() -> None:
    dead: list[tuple[str, str]] = []
    for page in DOCUMENTS:
        if page.suffix == ".md":
            text = re.sub(r"(?ms)^ *```.*?^ *```$|`[^`\n]*`", "", page.read_text())
            targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", text)
            dead += [
                (page.name, target)
                for target in targets
                if not target.startswith("https:") and (page.parent / target).resolve() not in DOCUMENTS
            ]
    assert not dead


def test_a_document_that_the_package_names_is_in_it() -> None:
    sources = [*SYSTEMD.rglob("*"), *(ROOT / "debian").glob("portward.*"), *(ROOT / "package").glob("*.py")]
    texts = [path.read_text() for path in sources if path.is_file()]
    named = {ROOT / found for text in texts for found in re.findall(rf"{SHIPPED}([\w./-]*\w)", text)}
    assert ROOT / "docs/how-to/operations.md" in named
    assert named <= DOCUMENTS


def test_documents_are_not_compressed_because_others_name_them() -> None:
    rules = (ROOT / "debian" / "rules").read_text()
    assert {f"--exclude={path.suffix}" for path in DOCUMENTS} <= set(rules.split())
