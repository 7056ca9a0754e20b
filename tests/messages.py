"""`make messages`: collects the translatable texts and updates the catalogues.

A translatable text is an argument of `say`, `say.many`, `marked` or `marked_many` in the code, or a text of a
bundled preset that customers read. A new text is added to each catalogue with an empty translation. A text that no
longer exists is removed.
"""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Final

from babel.messages.catalog import Catalog
from babel.messages.extract import extract_from_file
from babel.messages.pofile import read_po, write_po

from portward.i18n.catalogues import DOMAIN, FOLDER
from portward.policy import presets
from portward.policy.preset import Offer, Preset

ROOT: Final = Path(__file__).resolve().parents[1]
PACKAGE: Final = ROOT / "agent" / "portward"
TEMPLATE: Final = FOLDER / f"{DOMAIN}.pot"
_KEYWORDS: Final = {
    "say": None,
    "_say": None,
    "self": None,  # a `Language` that calls itself
    "many": (1, 2),
    "marked": None,
    "marked_many": (1, 2),
    "pgettext": ((1, "c"), 2),
}
_WIDTH: Final = 100


def sources() -> list[Path]:
    """The files that may contain translatable texts."""
    return sorted(PACKAGE.rglob("*.py"))


def collected() -> Catalog:
    """All texts, with the files that they stand in."""
    catalogue = Catalog(project="portward", charset="utf-8", fuzzy=False)
    for path in sources():
        place = path.relative_to(ROOT).as_posix()
        for _, message, comments, context in extract_from_file("python", path, keywords=_KEYWORDS):
            catalogue.add(message, locations=[(place, 0)], auto_comments=comments, context=context)
    for name in presets.bundled():
        for text in texts_of(presets.load(name)):
            catalogue.add(text, locations=[(f"rules/policy/{name}.toml", 0)])
    return catalogue


def texts_of(preset: Preset) -> list[str]:
    """The texts of a preset that customers read, each once, in the preset's order."""
    offers: list[Offer] = [*preset.offers, *([] if preset.otherwise is None else [preset.otherwise])]
    texts = [preset.restart, preset.request]
    for offer in offers:
        texts += [offer.title, *offer.requires]
    return list(dict.fromkeys(filter(None, texts)))


def catalogue_of(path: Path) -> Catalog:
    """The catalogue in a file."""
    with path.open("rb") as file:
        return read_po(file, abort_invalid=True)


def written(catalogue: Catalog) -> str:
    """A catalogue as text. It has no dates, tool versions or line numbers, so it changes only with the texts."""
    target = BytesIO()
    write_po(
        target,
        catalogue,
        width=_WIDTH,
        omit_header=True,
        sort_output=True,
        include_lineno=False,
        ignore_obsolete=True,
    )
    return target.getvalue().decode()


def merged(path: Path, texts: Catalog) -> str:
    """A language's catalogue with exactly the texts of `texts`. Existing translations stay."""
    have = catalogue_of(path)
    have.update(texts, no_fuzzy_matching=True)
    return f"{_header(path)}\n{written(have)}"


def _header(path: Path) -> str:
    """The header of a catalogue, before its first text: the language and its plural forms."""
    return path.read_text().partition("\n\n")[0] + "\n"


def main() -> None:
    """Rewrites the template and the catalogues, and prints how many texts lack a translation."""
    texts = collected()
    TEMPLATE.write_text('msgid ""\nmsgstr ""\n"Content-Type: text/plain; charset=utf-8\\n"\n\n' + written(texts))
    for path in sorted(FOLDER.glob(f"*/LC_MESSAGES/{DOMAIN}.po")):
        path.write_text(merged(path, texts))
        missing = [message.id for message in catalogue_of(path) if message.id and not message.string]
        print(f"{path.relative_to(ROOT)}: {len(texts)} texts, {len(missing)} without a translation")


if __name__ == "__main__":
    main()
