"""A store that holds a policy, and its configuration. A refused change must leave both as they were."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from inputs.corpus import portward
from unit.store.samples import ALL, held, opened, put, write


class Held(NamedTuple):
    """The configuration of a store with records."""

    config: Path
    store: Path

    def state(self) -> tuple[int, dict[str, str], str, bytes]:
        """Revision, records, export, and the bytes of the database."""
        store = opened(self.store)
        found = store.revision(), held(store)
        store.close()
        return *found, portward("export", "--config", str(self.config)).stdout, self.store.read_bytes()


def hold(folder: Path, preset: str = "azure-2020") -> Held:
    """Makes a store with the sample records in `folder`, and a configuration that names it."""
    made = Held(folder / "portward.toml", folder / "portward.db")
    made.config.write_text(
        f'segments = ["vni*"]\nuplinks = ["up0"]\npreset = "{preset}"\n'
        f'store = "sqlite:{made.store}"\ntable = "{folder / "table"}"\n'
    )
    store = opened(made.store)
    write(store, *map(put, ALL))
    store.close()
    return made
