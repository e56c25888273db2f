"""How a setting states its rule: once, at its field.

    epochs: int = setting(20, above=0, may_change=True)
    gate: str = setting("scalar", choices=("scalar", "vector", "none"))

`check` holds a section to its rules, `names_of` and `resumable` derive the lists that others would keep by hand.
Sections are frozen dataclasses that live with the part they configure; this module knows none of them.
"""

import math
from collections.abc import Iterator
from dataclasses import Field, dataclass, field, fields, is_dataclass
from typing import Any

KEY = "rule"
"""Of the field's metadata."""


@dataclass(frozen=True)
class Rule:
    """What a value must satisfy beside its type."""

    choices: tuple[object, ...] = ()
    """The values there are; for a list, those of its items. Empty: any."""
    at_least: float = -math.inf
    above: float = -math.inf
    at_most: float = math.inf
    below: float = math.inf
    """Range of a number; a number is finite in any case."""
    may_change: bool = False
    """A run may be continued with another value."""

    def refuse(self, name: str, value: object) -> None:
        """Raise ValueError, naming the setting and what it may be, unless the value obeys the rule."""
        if self.choices:
            for item in value if isinstance(value, list | tuple) else (value,):
                if item not in self.choices:
                    known = ", ".join(map(str, self.choices))
                    raise ValueError(f"{name} is {value!r}; choose {'any' if item is not value else 'one'} of {known}")
        if isinstance(value, bool) or not isinstance(value, int | float):
            return
        if not (self.at_least <= value <= self.at_most and self.above < value < self.below and math.isfinite(value)):
            raise ValueError(f"{name} is {value}; it must be {self._range()}")

    def _range(self) -> str:
        bounds = {"at least": self.at_least, "above": self.above, "at most": self.at_most, "below": self.below}
        said = [f"{word} {bound:g}" for word, bound in bounds.items() if math.isfinite(bound)]
        return " and ".join(said if math.isfinite(min(self.at_most, self.below)) else [*said, "finite"])


def setting(
    default: Any = None,
    *,
    choices: tuple[object, ...] = (),
    at_least: float | None = None,
    above: float | None = None,
    at_most: float = math.inf,
    below: float = math.inf,
    may_change: bool = False,
) -> Any:
    """A dataclass field with a rule. A default list is copied for each section; numbers are at least 0 by default."""
    lower = at_least if at_least is not None else (0.0 if above is None else -math.inf)
    rule = Rule(choices, lower, -math.inf if above is None else above, at_most, below, may_change)
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={KEY: rule})
    return field(default=default, metadata={KEY: rule})


def rule_of(one: Field[Any]) -> Rule:
    """The rule of a field; a field without `setting` takes any value that its type admits."""
    rule = one.metadata.get(KEY, Rule())
    assert isinstance(rule, Rule)
    return rule


def check(section: Any, name: str = "") -> None:
    """Raise ValueError for the first setting of a section that breaks its rule; `name` stands before its own."""
    for one in fields(section):
        full, value = f"{name}.{one.name}" if name else one.name, getattr(section, one.name)
        if one.type is int and not isinstance(value, int):
            raise ValueError(f"{full} is {value!r}; it must be a whole number")
        rule_of(one).refuse(full, value)


def walk(config: Any) -> Iterator[tuple[str, Field[Any], Any]]:
    """(`section.setting`, field, value) of every setting of a configuration, in the order of declaration."""
    for outer in fields(config):
        section = getattr(config, outer.name)
        assert is_dataclass(section)
        for inner in fields(section):
            yield f"{outer.name}.{inner.name}", inner, getattr(section, inner.name)
