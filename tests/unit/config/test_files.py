"""TOML files are read with a bound; a file that cannot be read is named in one line."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from portward.config.files import mistake, path_hook, read_toml
from portward.errors import InputError


class Document(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A document with a path."""

    name: str
    home: Path = Path("/var")
    nets: tuple[str, ...] = ()


def written(tmp_path: Path, text: bytes) -> Path:
    """A file with a text."""
    path = tmp_path / "a.toml"
    path.write_bytes(text)
    return path


def test_a_path_is_read_from_text(tmp_path: Path) -> None:
    path = written(tmp_path, b'name = "x"\nhome = "/srv"\n')
    assert read_toml(path, Document) == Document(name="x", home=Path("/srv"))


def test_what_is_no_path_is_refused_with_its_line(tmp_path: Path) -> None:
    path = written(tmp_path, b'name = "x"\nhome = 3\n')
    with pytest.raises(InputError) as caught:
        read_toml(path, Document)
    assert str(caught.value) == f"{path}:2: home: expected a path in quotes, got 3"


def test_a_byte_order_mark_is_no_mistake(tmp_path: Path) -> None:
    assert read_toml(written(tmp_path, b'\xef\xbb\xbfname = "x"\n'), Document).name == "x"


def test_a_byte_that_is_not_utf8_has_a_line(tmp_path: Path) -> None:
    path = written(tmp_path, b'name = "x"\n# \xff\n')
    with pytest.raises(InputError) as caught:
        read_toml(path, Document)
    assert str(caught.value) == f"{path}:2: byte 0xff is not UTF-8"


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file or directory") as caught:
        read_toml(tmp_path / "gone.toml", Document)
    assert caught.value.file == str(tmp_path / "gone.toml")


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Is a directory"):
        read_toml(tmp_path, Document)


def test_a_mistake_that_its_type_does_not_show_has_a_line_too(tmp_path: Path) -> None:
    path = written(tmp_path, b'name = "x"\n\nnets = [\n  "::1",\n]\n')
    assert str(mistake(path, "no loopback", "nets", 0)) == f"{path}:4: nets[0]: no loopback"


def test_the_hook_refuses_types_that_are_not_its_own() -> None:
    with pytest.raises(NotImplementedError):
        path_hook(complex, "1")
