"""A rule beside each field: the records that decide a run (Shape, Source, Recipe) check themselves.

`checked` declares a field with its rule, `broken_rules` asks them all. What is about several
fields is a function marked `about` them, which yields sentences; it is asked only where each of
these fields passes its own rule, so it need not doubt their types.
"""
from __future__ import annotations

import dataclasses

from stentor.parameters import number, problem_with, shown


def checked(rule, default=dataclasses.MISSING, *, free: set[str] = frozenset()):
    """A field of a dataclass with its rule, as in check_notebook_parameters, and perhaps a default.

    free: in what respects two records that differ only here are still the same (`free_fields`).
    """
    return dataclasses.field(default=default, metadata={"rule": rule, "free": free})


def free_fields(record: type, respect: set[str]) -> set[str]:
    """The names of a dataclass's fields that are free in this respect."""
    return {f.name for f in dataclasses.fields(record) if respect <= f.metadata.get("free", set())}


def settle_types(record) -> None:
    """In a frozen dataclass, as it is made: 1e6 in an int field is 1000000, a list a tuple."""
    for f in dataclasses.fields(record):
        value = getattr(record, f.name)
        if f.type.startswith("int") and value is not None and not number(integer=True)(value):
            object.__setattr__(record, f.name, int(value))
        elif f.type.startswith("tuple") and isinstance(value, list):
            object.__setattr__(record, f.name, tuple(value))


def broken_rules(record, form: str = "{} = {} {}.") -> dict[str, str]:
    """{field: sentence} for each field that breaks the rule beside it.

    form: the sentence, with places for the field's name, its value and what the rule says.
    """
    broken = {}
    for f in dataclasses.fields(record):
        value, rule = getattr(record, f.name), f.metadata.get("rule")
        if rule and (reason := problem_with(value, rule)):
            broken[f.name] = form.format(f.name, shown(value), reason)
    return broken


def about(rules: list, *names: str):
    """Decorator: adds to `rules` a function that yields what is wrong between these fields."""
    def add(rule):
        rules.append((set(names), rule))
        return rule
    return add


def problems_between(record, rules: list, broken) -> list[str]:
    """What the rules about several fields say, where none of their fields is `broken`."""
    return [sentence for names, rule in rules if names.isdisjoint(broken)
            for sentence in rule(record)]


# Rules that Shape and Recipe share.


def positive(*, integer: bool = False):
    """A rule: a finite number above 0; with `integer` a whole one."""
    finite, kind = number(integer=integer), "a whole number" if integer else "a number"

    def rule(value):
        wrong = finite(value)
        if wrong or value <= 0:
            most = f" and {wrong.removeprefix('must be ')}" if wrong and "at most" in wrong else ""
            return f"must be {kind} above 0{most}"
    return rule


def flag(value) -> str | None:
    """A rule: True or False, and not 1 or 0."""
    return None if isinstance(value, bool) else "must be True or False"
