"""What the demo's pages are made of. What a person or a model wrote is escaped here."""
from __future__ import annotations

import html
import json
from pathlib import Path

from stentor.charts import BLUE, ORANGE
from stentor.demo.generating import Text

SURE, UNSURE = 0.80, 0.35                  # the Stentor3 card's thresholds, green and red there
_HERE = Path(__file__).parent


def css() -> str:
    """page.css with the suite's colours for it."""
    return f":root {{ --sure: {BLUE}; --unsure: {ORANGE}; }}\n" + (_HERE / "page.css").read_text()


def explorer_script() -> str:
    return (_HERE / "explorer.js").read_text()


def alone(*pieces: str) -> str:
    """Pieces for a notebook's output, where there is no page around them: their style goes along."""
    named = ("body-text-color: #222222", "body-text-color-subdued: #5b6470",
             "border-color-primary: #d5d9de", "background-fill-primary: #ffffff")
    given = "".join(f"--{value}; " for value in named)
    return (f"<style>{css()}\n.st-alone {{ {given} background: #ffffff; color: #222222; "
            f"padding: 0.6rem; border-radius: 8px; }}</style>"
            f'<div class="st-alone">{"".join(pieces)}</div>')


def note(text: str) -> str:
    """A line that says what is going on."""
    return f'<p class="st-note" role="status">{html.escape(text)}</p>'


def refused(error) -> str:
    """Why nothing was written, in a sentence."""
    return f'<p class="st-refused" role="alert">{html.escape(str(error))}</p>'


def card(text: Text, title: str, prompt: bool = True, figures: bool = True) -> str:
    """One text, the prompt before it in grey; below its figures, unless they would tell whose it is."""
    said = html.escape(text.text)
    asked = f'<span class="st-prompt">{html.escape(text.prompt)}</span>' if prompt else ""
    busy = "" if text.ended else ' aria-busy="true"'
    ended = {"stopped": "stopped by you", "end of text": "ended by itself"}.get(text.ended, "")
    parts = [text.figures()] * bool(text.tokens and figures) + [ended, text.note * figures]
    below = " · ".join(part for part in parts if part)
    caret = "" if text.ended else '<span class="st-caret" aria-hidden="true"></span>'
    return (f'<article class="st-card"{busy}><h3>{html.escape(title)}</h3>'
            f'<p class="st-said" dir="auto">{asked}{said}{caret}</p>'
            f'<p class="st-figures">{html.escape(below)}</p></article>')


def cards(items: list[str], columns: int = 1) -> str:
    """Cards below each other, or side by side where there is room."""
    return f'<div class="st-cards st-columns-{columns}">{"".join(items)}</div>'


# The Token Explorer.

def legend() -> str:
    """What the colours mean; told by underlines too, for readers who see no colours."""
    levels = (("sure", f"at least {SURE:.0%}"), ("", f"{UNSURE:.0%} to {SURE:.0%}"),
              ("unsure", f"under {UNSURE:.0%}"))
    items = "".join(f'<li><span class="st-token st-{name or "middle"}">token</span> {text}</li>'
                    for name, text in levels)
    return (f'<div class="st-legend"><span>How likely the model thought each token:</span>'
            f'<ul>{items}</ul></div>')


def tokens(seen: list[dict]) -> str:
    """The coloured tokens of `generating.probabilities`, and the panel of alternatives."""
    body = "".join(_token(row, place) for place, row in enumerate(seen))
    return (f'<div class="st-explorer">{legend()}'
            '<p class="st-note">Point at a token, or reach it with Tab and the arrow keys. Click it, '
            'or press Enter, to keep its alternatives; choose one to go on from there.</p>'
            f'<div class="st-split"><div class="st-tokens" role="group" dir="auto" '
            f'aria-label="Tokens, from first to last">{body}</div>'
            '<aside class="st-panel" aria-label="Alternatives of a token" aria-live="polite">'
            '<p class="st-note">No token chosen.</p></aside></div></div>')


def _token(row: dict, place: int) -> str:
    p = row["probability"]
    level = "sure" if p >= SURE else "unsure" if p < UNSURE else "middle"
    facts = {"label": row["label"], "p": p, "rank": row["rank"], "place": place,
             "others": [[a["id"], a["text"], a["probability"]] for a in row["alternatives"]]}
    said = f'{row["label"]}, {percent(p)}, choice {row["rank"]}'
    text = html.escape(row["text"])
    bare = " st-bare" * (not row["text"].strip())
    return (f'<span class="st-token st-{level}{bare}" role="button" '
            f'tabindex="{0 if place == 0 else -1}" aria-label="{html.escape(said)}" '
            f'data-facts="{html.escape(json.dumps(facts))}">{text}</span>')


def percent(p: float) -> str:
    """0.123 -> "12.3%"; small ones with as many places as they need."""
    return f"{p:.1%}" if p >= 0.001 else f"{p:.1e}".replace("e-0", "e-")


# Tables.

def table(columns: list[str], rows: list[list], caption: str) -> str:
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in columns)
    def cell(value):
        long = ' class="st-long"' * (len(str(value)) > 28)
        return f"<td{long}>{html.escape(str(value))}</td>"
    body = "".join(f'<tr>{"".join(map(cell, row))}</tr>' for row in rows)
    return (f'<div class="st-table" tabindex="0" role="region" aria-label="{html.escape(caption)}">'
            f'<table><caption>{html.escape(caption)}</caption>'
            f'<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>')


def history(rows: list[dict]) -> str:
    """What was written in this session, newest first."""
    if not rows:
        return note("Nothing yet. What you generate is listed here, and kept only while this page "
                    "is open.")
    shown = [[row["time"][11:19], row["model"], _settings(row), _cut(row["prompt"]),
              _cut(row["text"]), f'{row["tokens"]:,}', f'{row["tokens_per_second"]:,.0f}']
             for row in reversed(rows)]
    return table(["Time", "Model", "Settings", "Prompt", "Text", "Tokens", "Tokens/s"], shown,
                 f"History of this page: {len(rows):,}")


def _settings(row: dict) -> str:
    settings = row["settings"]
    if not settings["do_sample"]:
        return f'greedy, penalty {settings["repetition_penalty"]:g}'
    return (f'temperature {settings["temperature"]:g}, top-p {settings["top_p"]:g}, '
            f'penalty {settings["repetition_penalty"]:g}, seed {row["seed"]}')


def _cut(text: str, length: int = 160) -> str:
    return text if len(text) <= length else text[:length] + "…"


def ratings(rows: list[dict]) -> str:
    """The arena's table."""
    if not rows:
        return note("No votes yet.")
    shown = [[row["name"], f'{row["votes"]:,}',
              f'{row["share"]:.0%} [{row["share_low"]:.0%}, {row["share_high"]:.0%}]',
              f'{row["rating"]:,.0f} [{row["low"]:,.0f}, {row["high"]:,.0f}]'] for row in rows]
    return table(["Model", "Votes", "Points won [95%]", "Rating [95%]"], shown,
                 "Rating from all votes (Bradley-Terry on Elo's scale, mean 1,000)")
