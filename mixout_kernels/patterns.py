"""Shell patterns for the names of modules and parameters, and a p for each layer by them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

from . import checks


def matches(name: str, pattern: str) -> bool:
    """A shell pattern matches the whole dotted name or one of its parts."""
    return fnmatchcase(name, pattern) or any(fnmatchcase(part, pattern) for part in name.split("."))


def patterns(function: str, argument: str, patterns: Iterable[str]) -> tuple[str, ...]:
    return strings(function, argument, patterns, "patterns")


def strings(function: str, argument: str, values: Iterable[str], what: str) -> tuple[str, ...]:
    """A string would be an iterable of strings too: of its characters."""
    if isinstance(values, str):
        raise TypeError(f"{function}: {argument}: expected a list of {what}, got the string {values!r}")
    found = tuple(values) if isinstance(values, Iterable) else (None,)
    if not all(isinstance(value, str) for value in found):
        raise TypeError(f"{function}: {argument}: expected a list of {what}, got {values!r}")
    return found


def each_must_match(
    function: str, argument: str, patterns: Iterable[str], names: Iterable[str], what: str = "linear layer"
) -> None:
    """A pattern that matches nothing is a typo, and would be a silent one."""
    names = list(dict.fromkeys(names))
    for pattern in patterns:
        if not any(matches(name, pattern) for name in names):
            raise ValueError(
                f"{function}: {argument}: expected patterns that match a {what} of the model, got {pattern!r}, which "
                f"matches none of {len(names)}: {', '.join(names[:8])}"
            )


class Rates:
    """p for each layer: one number, or the first matching pattern's."""

    def __init__(self, function: str, p: float | Mapping[str, float]) -> None:
        self.function = function
        self.of_pattern = dict(p) if isinstance(p, Mapping) else {"*": p}
        for pattern, rate in self.of_pattern.items():
            if not isinstance(pattern, str):
                raise TypeError(f"{function}: p: expected patterns as keys, got {pattern!r}")
            checks.probability(function, "p" if pattern == "*" else f"p[{pattern!r}]", rate)

    def of(self, name: str) -> float | None:
        pattern = self._pattern(name)
        return None if pattern is None else self.of_pattern[pattern]

    def _pattern(self, name: str) -> str | None:
        return next((pattern for pattern in self.of_pattern if matches(name, pattern)), None)

    def each_must_apply(self, names: Iterable[str]) -> None:
        names = list(names)
        if not names:
            return
        used = {self._pattern(name) for name in names}
        for pattern in self.of_pattern:
            if pattern not in used:
                earlier = any(matches(name, pattern) for name in names)
                why = "only layers that an earlier pattern has taken" if earlier else "no linear layer of the model"
                raise ValueError(f"{self.function}: p: expected patterns that match, got {pattern!r}: it matches {why}")
