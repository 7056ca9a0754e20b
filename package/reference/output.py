"""The page on the output of verbs with `--json`. The keys of structs come from the code. Keys that a verb puts
together by hand are listed in meanings.toml; `tests/unit/test_reference.py` compares them with the real output."""

from __future__ import annotations

from typing import Final

import msgspec
from msgspec import inspect

from package.reference.tables import MEANINGS, code, in_words, struct_table, table
from portward.daemon.runtime import STATUS_FORMAT
from portward.exemptions.lifecycle import State
from portward.model import Reason
from portward.ops.diagnosis.advice import Step
from portward.ops.diagnosis.answer import Diagnosis, MatterReport
from portward.ops.diagnosis.facts import Asked, Drops, Facts, Machine, SinceStart
from portward.ops.effect import Now
from portward.ops.explanation import Explanation
from portward.policy.preset import Preset
from portward.store.chain import IntegrityIssueKind

# Verb → its structs, the outermost first.
_STRUCTS: Final[dict[str, tuple[type[msgspec.Struct], ...]]] = {
    "explain": (Explanation, Now),
    "diagnose": (Diagnosis, MatterReport, Facts, Machine, Drops, SinceStart, Asked),
}
# Verb with a table in meanings.toml → the sentence before that table.
VERBS: Final = {
    "status": "",
    "apply": "",
    "apply --confirm": "Without a file:",
    "export": "",
    "audit": "",
    "exemption request": "`grant`, `reject`, `limit`, and `revoke` of one subscription, print the same:",
    "exemption revoke --offer": "With `--offer` or `--file`:",
    "exemption list": "An object on each line. `exemption show` prints one such object:",
    "exemption history": "An object on each line:",
    "attachment started": "",
    "policy list": "A list of:",
}


def fills() -> dict[str, object]:
    """The values for the text of the page."""
    sections = [f"## {verb}\n\n" + "\n".join(map(_struct, structs)) for verb, structs in _STRUCTS.items()]
    for verb, note in VERBS.items():
        rows = ((code(key.removeprefix("?")), _filled(text)) for key, text in MEANINGS[verb].items())
        sections.append(f"## {verb}\n\n" + (f"{note}\n\n" if note else "") + table(("key", "meaning"), rows))
    keys = ", ".join(map(code, Preset.__struct_fields__))
    sections.append(f"## policy show\n\nThe [preset](presets.md#keys): {keys}.\n")
    return {"verbs": "\n".join(sections)}


def _struct(struct: type[msgspec.Struct]) -> str:
    return f"### {struct.__name__}\n\n" + struct_table(struct, struct.__name__, typed=_type, filled=_filled)


def _type(type_: inspect.Type) -> str:
    """The type in words. Records and reasons lead to their own pages."""
    own = {struct for structs in _STRUCTS.values() for struct in structs}
    match type_:
        case inspect.EnumType(cls=cls) if cls is Reason:
            return "[reason code](reasons.md)"
        case inspect.StructType(cls=cls) if cls not in own:
            return f"[{cls.__name__}](inventory.md#{cls.__name__.lower()})"
        case inspect.UnionType(types=types):
            return " or ".join("null" if isinstance(one, inspect.NoneType) else _type(one) for one in types)
        case inspect.VarTupleType(item_type=inspect.VarTupleType()):
            return "list of lists of steps"
        case inspect.VarTupleType(item_type=item):
            return f"list of: {_type(item)}"
    return in_words(type_)


def _filled(text: str) -> str:
    return (
        text.replace("{states}", ", ".join(map(code, State)))
        .replace("{steps}", ", ".join(map(code, Step)))
        .replace("{kinds}", ", ".join(map(code, IntegrityIssueKind)))
        .replace("{format}", str(STATUS_FORMAT))
    )
