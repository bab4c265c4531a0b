"""The inference guide: what each card recommends for sampling, as data, and what a recipe takes.

All figures are the cards', published and not measured here; `stentor.speed.replacement_rate` tests
one claim of them.
"""
from __future__ import annotations

import dataclasses

from stentor.cards import card_name

SETTINGS = ("temperature", "top_p", "repetition_penalty", "max_new_tokens")


@dataclasses.dataclass(frozen=True)
class Guide:
    """One card's settings: temperature, top_p, repetition_penalty, max_new_tokens (tokens).

    quick_start: of the card's first example. ranges: (low, high), both inside; {} where the card
    prints none. favourite: what a saved folder recommends. favourite_from: where in the card that
    stands. A setting the card does not print is absent.
    """
    card: str
    quick_start: dict
    ranges: dict
    favourite: dict
    favourite_from: str
    notes: tuple[str, ...] = ()


def _settings(*values) -> dict:
    return {name: value for name, value in zip(SETTINGS, values) if value is not None}


GUIDES: dict[str, Guide] = {
    "stentor2-12m-preview": Guide(
        "Stentor2-12M-Preview", _settings(1.1, 0.55, 1.15, 80),
        _settings((0.65, 1.2), (0.5, 0.8), (1.1, 1.2), (10, 60)), _settings(0.9, 0.65, 1.15, 50),
        "the defaults of its helper function (it names no favourite)",
        ("the quick start's 80 tokens are more than its range",)),
    "stentor2-12m": Guide(
        "Stentor2-12M", _settings(1.1, 0.55, 1.15, 80),
        _settings((0.6, 0.9), (0.6, 0.8), (1.1, 1.4), (10, 500)), _settings(0.8, 0.7, 1.2, None),
        "its favourite",
        ("the quick start's temperature and top_p are outside its own ranges",
         "the ceiling of max_new_tokens is 1,000",
         "says that U+FFFD rises below temperature or top_p 0.6")),
    "stentor3-20m": Guide(
        "Stentor3-20M", _settings(0.8, 0.9, 1.1, 150),
        _settings((0.5, 0.8), (0.8, 0.9), (1.15, 1.4), (40, 4096)),
        _settings(0.6, 0.85, 1.25, 200),
        "the protocol of its samples (it names no favourite)",
        ("the quick start's repetition penalty is below its range",)),
    "stentor-big": Guide(
        "Stentor-Big", _settings(0.5, 0.9, None, 80), {}, _settings(0.5, 0.9, None, 80),
        "its quick start (it prints no ranges)"),
    "stentor-12m-instruct": Guide(
        "Stentor-12M-Instruct", _settings(1.1, 0.6, 1.3, 80),
        _settings((0.6, 1.5), (0.5, 0.9), None, (10, 200)), _settings(1.1, 0.6, 1.3, 80),
        "its quick start (it names no favourite)")}
# Whose guide a recipe without one takes: the family that its data and tokenizer are nearest to.
NEAREST = {"stentor-12m": "stentor2-12m-preview", "stentor-30m": "stentor2-12m-preview",
           "stentor2-30m": "stentor2-12m", "stentor3-50m": "stentor3-20m",
           "portimbria-150m": "stentor3-20m"}
PRESETS = ("Creative", "Balanced", "Focused")         # the demo's chips; no card prints their values


def guide_for(recipe: str | None) -> tuple[Guide, str, bool]:
    """(guide, the recipe in GUIDES it is of, whether that is this recipe's own card).

    recipe: a recipe's name; a twin's or a stage's is that of its card, and an unknown name, or
    None, gets Stentor2-12M's.
    """
    name = card_name(str(recipe or ""))
    of = NEAREST.get(name, name if name in GUIDES else "stentor2-12m")
    return GUIDES[of], of, name == of


def recommended(recipe: str | None = None) -> dict:
    """The favourite as transformers names it, for generation_config.json: do_sample, temperature,
    top_p, repetition_penalty (1.0, none, where the card prints none)."""
    favourite = guide_for(recipe)[0].favourite
    return {"do_sample": True, "temperature": favourite["temperature"],
            "top_p": favourite["top_p"],
            "repetition_penalty": favourite.get("repetition_penalty", 1.0)}


def presets(recipe: str | None = None) -> dict[str, dict]:
    """{"Creative", "Balanced", "Focused": settings with max_new_tokens} for a recipe.

    Balanced is the favourite; Creative and Focused are the upper and the lower ends of the card's
    temperature and top_p, with its favourite penalty. Where it prints no ranges: 0.2 above and
    below in temperature and 0.05 in top_p, ours.
    """
    guide = guide_for(recipe)[0]
    middle = {"repetition_penalty": 1.0, "max_new_tokens": guide.quick_start["max_new_tokens"],
              **guide.favourite}

    def end(index: int) -> dict:
        ends = {name: guide.ranges[name][index] if name in guide.ranges else
                round(middle[name] + (-step, step)[index], 2)
                for name, step in (("temperature", 0.2), ("top_p", 0.05))}
        return {**middle, **ends}
    return dict(zip(PRESETS, (end(1), middle, end(0))))


def guide_record(recipe: str | None = None) -> dict:
    """The guide that a recipe takes as plain JSON, with `of` and `own` (see guide_for)."""
    guide, of, own = guide_for(recipe)
    record = dataclasses.asdict(guide)
    return {"of": of, "own": own, **record, "notes": list(guide.notes),
            "ranges": {name: list(ends) for name, ends in guide.ranges.items()}}


def guide_table(recipe: str | None = None):
    """The guide as a table, with whose it is in its columns' name."""
    import pandas as pd
    guide, _, own = guide_for(recipe)
    whose = f"published by {guide.card}" + ("" if own else ", the nearest card")
    rows = {name: [guide.quick_start.get(name), guide.favourite.get(name),
                   " to ".join(f"{end:g}" for end in guide.ranges.get(name, ())) or None]
            for name in SETTINGS}
    table = pd.DataFrame.from_dict(rows, "index", columns=["quick start", "used here", "range"])
    table.columns.name = whose
    return table.astype(object).where(table.notna(), "not printed")
