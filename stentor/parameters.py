"""Parameters are checked before any work starts, all of them, and every problem is one sentence."""
from __future__ import annotations

import contextlib
import difflib
import functools
import math
import numbers
import os
import re
import sys
import tempfile
import time
import types
from pathlib import Path

from stentor.files import ParameterError
from stentor.secrets import redact, secret_problems


@functools.cache
def session_start() -> float:
    """time.monotonic() of this process's first check: a second one begins no new session."""
    return time.monotonic()


LARGEST = 2**63 - 1                # whole number that an array's index or a file's size can be


def number(low=None, high=None, *, integer=False, optional=False):
    """A rule: a finite number in [low, high]; None too when `optional`.

    With `integer` a whole one, which is made an int: 1e6 passes as 1000000.
    """
    kind = "a whole number" if integer else "a number"
    top = high if high is not None else LARGEST if integer else sys.float_info.max

    def rule(value):
        if value is None and optional:
            return None
        if isinstance(value, bool) or not isinstance(value, numbers.Real) or value != value:
            return f"must be {kind}"
        if abs(value) == math.inf or integer and value != int(value):
            return f"must be {kind}"
        if low is not None and value < low:
            return f"must be at least {low:,}"
        if value > top:            # 10**400 too, which no float holds
            return f"must be at most {top:,}" if top < 1e19 else f"must be at most {top:g}"

    def convert(value):
        if value is None or type(value) in (int, float) and not integer:
            return value
        return int(value) if integer else float(value)
    rule.convert = convert
    return rule


def string(*, optional=False, empty=False):
    """A rule: text that a file can hold (no NUL, no half of an emoji).

    "" only with `empty`, None only with `optional`.
    """
    def rule(value):
        if value is None and optional:
            return None
        if not isinstance(value, str):
            return "must be text"
        if not value and not empty:
            return "must not be empty"
        if "\0" in value:
            return "must not hold a NUL character"
        if re.search("[\ud800-\udfff]", value):
            return "must be text that UTF-8 can hold"
    return rule


def items(rule, *, optional=False, empty=False, repeated=False):
    """A rule: a list (or tuple) whose every item passes `rule`; may be `empty`, its items `repeated`."""
    def check(values):
        if values is None and optional:
            return None
        if not isinstance(values, (list, tuple)):
            return "must be a list"
        if not values and not empty:
            return "must not be empty"
        for i, value in enumerate(values):
            if wrong := problem_with(value, rule):
                return f"has {shown(value)} in place {i + 1}, which {wrong}"
            if not repeated and value in values[:i]:
                return f"holds {shown(value)} twice"

    check.convert = lambda values: values and [as_wanted(value, rule) for value in values]
    return check


# The settings of `su.generate` that a notebook takes, named as in transformers.GenerationConfig.
_GENERATION_RULES = {
    "do_sample": bool,
    "temperature": number(1e-6, 1e6),
    "top_p": number(1e-9, 1),
    "min_p": number(0, 1),
    "typical_p": number(1e-9, 1),
    "top_k": number(0, integer=True),
    "repetition_penalty": number(1e-6, 1e6),
    "no_repeat_ngram_size": number(0, integer=True),
    "max_new_tokens": number(1, integer=True),
}


def generation_settings(value) -> str | None:
    """A rule: a dict of settings for sampling, each known and in range."""
    if not isinstance(value, dict):
        return "must be a dict"
    for name, setting in value.items():
        if name not in _GENERATION_RULES:
            return f"has {shown(name)}, which is none of {', '.join(_GENERATION_RULES)}"
        if wrong := problem_with(setting, _GENERATION_RULES[name]):
            return f"has {name} = {shown(setting)}, which {wrong}"


generation_settings.convert = lambda value: {
    name: as_wanted(setting, _GENERATION_RULES[name]) for name, setting in value.items()}


def shown(value) -> str:
    """`value` as it would be typed, for a message: without secrets, and cut where it is long."""
    try:
        whole = redact(repr(value))
    except ValueError:             # Python writes no int of over 4,300 digits
        return "a number of thousands of digits"
    return whole if len(whole) <= 200 else f"{whole[:200]}..."


def problem_with(value, rule) -> str | None:
    """What is wrong with `value` by `rule` ("must be at least 1"), or None.

    A rule is a type (or tuple of types), a set, list or dict of allowed values, or a function that says
    what is wrong.
    """
    if isinstance(rule, (type, tuple)):
        kinds = rule if isinstance(rule, tuple) else (rule,)
        if not isinstance(value, kinds) or isinstance(value, bool) and bool not in kinds:
            return f"must be of type {' or '.join(kind.__name__ for kind in kinds)}"
    elif isinstance(rule, (set, frozenset, list, dict)):
        if not _allowed(value, rule):
            near = difflib.get_close_matches(str(value)[:100], [str(v) for v in rule], n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            return f"must be one of {', '.join(map(str, rule))}{hint}"
    else:
        return rule(value)


def as_wanted(value, rule):
    """A value that passes `rule`, in the type that it wants: 1e6 as 1000000, a tuple as a list."""
    if isinstance(rule, (set, frozenset, list, dict)):
        return _allowed(value, rule)[0]
    return rule.convert(value) if hasattr(rule, "convert") else value


def _allowed(value, choices) -> list:
    """The choice that equals `value`, in a list; True is not 1."""
    kind = isinstance(value, bool)
    return [choice for choice in choices if choice == value and isinstance(choice, bool) == kind]


def read_parameters(namespace: dict, spec: dict, *, unknown=True) -> tuple[dict, list[str]]:
    """({name: value} of the parameters that are right, a sentence for each that is wrong).

    spec: {parameter: rule}, rules as in `problem_with`. A value comes back in the type that its rule wants.
    unknown: a public variable that is not in `spec` is an unknown parameter. papermill only warns about
    `-p TOKENBUDGET 1` and would then train with the default.
    The session's clock starts at the first call.
    """
    session_start()
    given = {name: value for name, value in namespace.items()
             if _is_parameter(name, value) and value is not spec}
    problems = [_unknown(name, spec) for name in given if unknown and name not in spec]
    right = {}
    for name, rule in spec.items():
        if name not in given:
            problems.append(f"{name} is missing: run the parameters cell first.")
            continue
        wrong = problem_with(given[name], rule)
        found = [f"{name} = {shown(given[name])} {wrong}."] if wrong else []
        if found := found + secret_problems(**{name: given[name]}):
            problems += found
        else:
            right[name] = as_wanted(given[name], rule)
    return right, problems


def _is_parameter(name: str, value) -> bool:
    """Whether a variable was meant as a parameter: public, and no module, function or class."""
    if name.startswith("_") or name in {"In", "Out"}:
        return False
    return not isinstance(value, types.ModuleType) and not callable(value)


def _unknown(name: str, spec: dict) -> str:
    near = difflib.get_close_matches(name.upper(), spec, n=1, cutoff=0.6)
    hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(spec)}."
    return f"{name} is not a parameter of this notebook; {hint}"


def check_notebook_parameters(namespace: dict, spec: dict) -> None:
    """`read_parameters` of `globals()`, right after the parameters cell.

    Raises ParameterError with every problem. Without any, `namespace` gets the values in their rules'
    types: whole numbers written as floats are made int.
    """
    right, problems = read_parameters(namespace, spec)
    if problems:
        raise ParameterError(problems)
    namespace.update(right)


# Names that a folder cannot have on Windows, and the one that `make bench` writes to.
_RESERVED = {"con", "prn", "aux", "nul", "benchmarks",
             *(f"{port}{i}" for port in ("com", "lpt") for i in range(10))}


def run_name(value) -> str | None:
    """A rule: RUN becomes a folder's name, without slashes, spaces or leading dots, and not too long."""
    if not isinstance(value, str) or not re.fullmatch(r"[A-Za-z0-9]([\w.-]*[\w-])?", value):
        return "must be a plain name of letters, digits, '.', '_' and '-'"
    if len(value.encode()) > 100:
        return "must be at most 100 bytes long"
    if value.split(".")[0].lower() in _RESERVED:
        return "is a reserved name; choose another"


def run_names(value) -> str | None:
    """A rule: RUN where several are read, with commas between; another's run may be called anything."""
    if not isinstance(value, str):
        return "must be the name of a run folder in OUTPUTS, or several with commas between"
    names = split_names(value)
    for name in names:
        if Path(name).name != name or name in ("", "..") or names.count(name) > 1:
            return f"must be names of run folders, each once; {name!r} is none"


def split_names(value: str) -> list[str]:
    """"demo, other" -> ["demo", "other"]"""
    return [name.strip() for name in value.split(",")]


def writable_folder(path) -> str | None:
    """What is wrong with `path` as a folder to write to ("is not a folder ..."), or None.

    Nothing is created: the nearest folder above that is there decides, by an unnamed file.
    """
    try:
        path = Path(path)
        with contextlib.suppress(FileNotFoundError):
            os.lstat(path)         # a name too long, a file in the way
        nearest = next(folder for folder in (path, *path.parents) if os.path.lexists(folder))
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        return f"is not a folder that can be written to ({reason}); choose another"
