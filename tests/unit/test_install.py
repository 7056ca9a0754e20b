"""`make install` into a folder: the paths of the files, the paths that they name, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from package import install

ROOT = Path(__file__).resolve().parents[2]
PREFIX = Path("/opt/portward")


@pytest.fixture
def stage(tmp_path: Path) -> Path:
    """The package's tree, without its libraries."""
    folder = tmp_path / "stage"
    for place, text in (
        ("usr/lib/portward/bin/portward", "#!/usr/lib/portward/bin/python3 -I\n"),
        ("usr/lib/portward/baseline", (ROOT / "systemd" / "baseline").read_text()),
        ("usr/lib/portward/nftables", (ROOT / "systemd" / "nftables").read_text()),
        ("usr/lib/portward/closed.nft", "closed"),
        ("usr/lib/portward/lib/one.py", "1\n"),
        *(
            (f"usr/lib/systemd/system/{path.name}", path.read_text())
            for kind in ("service", "path")
            for path in (ROOT / "systemd").glob(f"*.{kind}")
        ),
        (
            "usr/lib/systemd/system/nftables.service.d/portward.conf",
            (ROOT / "systemd" / "nftables.service.d" / "portward.conf").read_text(),
        ),
        ("usr/lib/systemd/system-preset/50-portward.preset", "enable\n"),
        ("usr/lib/sysusers.d/portward.conf", "u portward\n"),
        ("etc/portward/portward.toml", "segments\n"),
        (
            "usr/share/doc/portward/docs/how-to/runbook.md",
            "`nft -f /usr/lib/portward/closed.nft`. /usr/lib/portward.\n",
        ),
    ):
        path = folder / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (folder / "usr/bin").mkdir()
    (folder / "usr/bin/portward").symlink_to("../lib/portward/bin/portward")
    interpreter = Path("/usr/bin/python3").resolve().name
    (folder / "usr/lib/portward/bin/python3").symlink_to(f"../../../bin/{interpreter}")
    return folder


def test_everything_names_the_places_where_it_lies(stage: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    install.install(stage, root, PREFIX)
    for path in root.rglob("*"):
        if path.is_file() and path.suffix in (".service", ".path", ".md", "") and not path.is_symlink():
            assert "/usr/lib/portward" not in path.read_text(), path
            assert "/usr/bin/portward" not in path.read_text(), path
    for name in ("portward.service", "portward@.service"):
        unit = (root / "etc/systemd/system" / name).read_text()
        assert "\nExecStart=/opt/portward/bin/portward run " in unit
        assert "\nBindReadOnlyPaths=/opt/portward\n" in unit
    of_instance = (root / "etc/systemd/system/portward-baseline@.service").read_text()
    assert "\nExecStart=/opt/portward/baseline %i\n" in of_instance
    assert (root / "etc/systemd/system/portward@.path").exists()
    baseline = (root / "etc/systemd/system/portward-baseline.service").read_text()
    assert "\nExecStart=/opt/portward/baseline\n" in baseline
    assert "\nRequiresMountsFor=/usr /etc /opt/portward\n" in baseline
    drop_in = root / "etc/systemd/system/nftables.service.d/portward.conf"
    assert "ExecStop=/opt/portward/nftables stop" in drop_in.read_text()
    assert "/opt/portward/closed.nft" in (root / "opt/portward/nftables").read_text()
    assert "/opt/portward/bin/portward rules baseline" in (root / "opt/portward/baseline").read_text()
    assert (root / "usr/local/bin/portward").readlink() == PREFIX / "bin/portward"
    assert (root / "opt/portward/bin/python3").readlink() == Path("/usr/bin/python3").resolve()
    assert (root / "etc/sysusers.d/portward.conf").exists()
    assert not (root / "lib").exists()
    assert {path.name for path in (root / "opt").iterdir()} == {"portward"}


def test_the_second_time_replaces_all_but_the_configuration(stage: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    install.install(stage, root, PREFIX)
    (root / "etc/portward/portward.toml").write_text("mine\n")
    (root / "opt/portward/lib/old.py").write_text("2\n")
    held = (root / "opt/portward/closed.nft").open()
    (stage / "usr/lib/portward/closed.nft").write_text("new")
    assert not install.refused(PREFIX, root)
    install.install(stage, root, PREFIX)
    assert (root / "etc/portward/portward.toml").read_text() == "mine\n"
    assert not (root / "opt/portward/lib/old.py").exists()
    assert (root / "opt/portward/closed.nft").read_text() == "new"
    with held:
        assert held.read() == "closed", "who has the old file open keeps it"


@pytest.mark.parametrize(
    "prefix", ["/usr/local", "/opt", "/", "opt/portward", "/opt/../portward", "/root/portward", "/home/a/portward"]
)
def test_a_folder_that_is_others_or_unseen_is_refused(prefix: str, tmp_path: Path) -> None:
    assert install.refused(Path(prefix), tmp_path).startswith(f"PREFIX={prefix}")


def test_a_folder_with_files_of_others_is_refused(stage: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    install.install(stage, root, PREFIX)
    (root / "opt/portward/share").mkdir()
    assert "share" in install.refused(PREFIX, root)
    (root / "elsewhere").mkdir()
    (root / "srv").mkdir()
    (root / "srv/portward").symlink_to("../elsewhere")
    assert install.refused(Path("/srv/portward"), root)


def test_beside_the_package_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "usr/lib/portward").mkdir(parents=True)
    assert "apt remove portward" in install.refused(PREFIX, tmp_path)


def test_only_whole_paths_are_replaced() -> None:
    text = "/usr/bin/portward /usr/lib/portward. /usr/share/doc/portward/a /usr/bin/portwardx /etc/portward"
    assert install.relocated(text, PREFIX) == (
        "/usr/local/bin/portward /opt/portward. /usr/local/share/doc/portward/a /usr/bin/portwardx /etc/portward"
    )
