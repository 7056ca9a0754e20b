"""Network namespaces that exist within a `with`, and are removed at its end even after an error."""

from __future__ import annotations

from typing import Self

from kernel.conftest import lab_name
from portward.lab import namespaces


class Standing:
    """Namespaces with names that no other run has; `_up` makes them and what is in them."""

    def __init__(self, *sides: str) -> None:
        """One namespace for each side."""
        name = lab_name()
        self.names = [f"{name}-{side}" for side in sides]

    def __enter__(self) -> Self:
        namespaces.require_root()
        try:
            for name in self.names:
                namespaces.make(name)
            self._up()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for name in self.names:
            if name in namespaces.names(name):
                namespaces.remove(name)

    def _up(self) -> None:
        """Makes what is in the namespaces."""
        raise NotImplementedError
