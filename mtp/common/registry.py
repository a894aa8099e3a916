"""Choices by name. Code outside the package adds choices before a run's config is read."""

from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Registry(Generic[T]):
    """Named choices of one kind, in the order in which they were added."""

    def __init__(self, **choices: T):
        self._choices: dict[str, T] = dict(choices)

    def add(self, name: str, choice: T) -> T:
        """Adds a choice and returns it. Raises ValueError if another choice has the name."""
        if self._choices.setdefault(name, choice) is not choice:
            raise ValueError(f"{name!r} is registered already; choose another name")
        return choice

    def get(self, name: str, key: str) -> T:
        """The choice of that name. Raises ValueError naming the config's key if there is none."""
        self.check(name, key)
        return self._choices[name]

    def check(self, name: str | None, key: str, *, optional: bool = False) -> None:
        """Raises ValueError naming the key of an unknown name; `optional` allows None."""
        if name in self._choices or (optional and name is None):
            return
        shown = ", ".join([*(["null"] if optional else []), *self._choices])
        raise ValueError(f"{key} must be one of {shown}, got {name!r}")

    def __iter__(self) -> Iterator[str]:
        return iter(self._choices)

    def __contains__(self, name: object) -> bool:
        return name in self._choices
