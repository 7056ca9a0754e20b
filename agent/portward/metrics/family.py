"""The type of a metric, and of the numbers of one moment. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, TypeAlias

# Values of a family's labels, in the order of its names.
Labels: TypeAlias = tuple[str, ...]
# One number, or one for each combination of label values.
Numbers: TypeAlias = Mapping[Labels, float] | float
# Name of a family → its numbers. A family that has not been read yet is absent.
Snapshot: TypeAlias = Mapping[str, Numbers]


class Family(NamedTuple):
    """A Prometheus metric. `name` has neither the prefix `portward_` nor, for a counter, the suffix `_total`."""

    name: str
    counter: bool
    labels: Labels
    help: str

    def numbers(self, snapshot: Snapshot) -> Mapping[Labels, float]:
        """Label values → number in this snapshot. Before the first reading: 0, or nothing if there are labels."""
        found = snapshot.get(self.name, {} if self.labels else 0.0)
        return found if isinstance(found, Mapping) else {(): found}
