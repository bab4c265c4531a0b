"""The sections of a model card for who wants to use the model: settings, what for and what not, its
relatives. Written as text; the figures in it are marks."""
from __future__ import annotations

import math

from stentor.card.facts import (
    Facts, GUIDE, NOT_MEASURED, PUBLISHED, cell, plain, row, shape_from, shape_place)
from stentor.card.scores import interval
from stentor.published import RECIPES
from stentor.shapes import count_parameters

SETTINGS = {"temperature": "temperature", "top_p": "top_p", "repetition_penalty": "repetition "
            "penalty"}


def quality(facts: Facts) -> str:
    """What the measurements allow to be said of the model's text, in a sentence or two."""
    bits, bigram = ("summary.json", "bits_per_byte"), ("baseline.json", "byte_bigram_bits_per_byte")
    ours, theirs = (facts.show(*place, form=".4f") for place in (bits, bigram))
    if NOT_MEASURED in (ours, theirs):
        said = "How well it predicts text was not measured against anything."
    elif facts.get(*bits) < facts.get(*bigram):
        said = (f"On held-out text it needs {ours} bits per byte, where counting pairs of bytes "
                f"needs {theirs}.")
    else:
        said = (f"On held-out text it needs {ours} bits per byte, no fewer than counting pairs of "
                f"bytes, which needs {theirs}: it has learned next to nothing.")
    file = "limitations.json"
    repeats, broken = (facts.get(file, key, "share") for key in ("repetitive", "replacement"))
    if repeats is None:
        return f"{said} What its own texts are like was not measured: read the samples."
    said += (f" Of the texts it wrote, {interval(facts, file, 'repetitive')} repeat themselves and "
             f"{interval(facts, file, 'replacement')} hold broken characters.")
    if max(repeats, broken) > 0.5:
        said += " Most of what it writes is noise."
    return said + (" Whether the rest makes sense nobody has judged: read the samples, and check "
                   "what it says.")


def recommended(facts: Facts) -> str:
    """The defaults in the folder's generation_config.json, beside the card's ranges as published."""
    file = f"{facts.config}/generation_config.json"
    recipe = {"instruct": "stentor-12m-instruct", "growth": "stentor-big"}.get(
        facts.of, str(facts.get("run.json", "recipe", "name") or ""))
    guide = GUIDE + recipe
    lines = ["## Recommended settings", "",
             "`generate()` uses the first column by itself; it stands in `generation_config.json`. The "
             f"others are as published by {facts.show(guide, 'card', form=cell)}, whose guide comes "
             "nearest: they were not measured on this model.", "",
             "| setting | here | quick start | from | to |", "|---|---|---|---|---|"]
    for key, title in SETTINGS.items():
        published = (facts.show(guide, *place, form="g") for place in (
            ("quick_start", key), ("ranges", key, 0), ("ranges", key, 1)))
        lines.append(row(title, facts.show(file, key, form="g"),
                         *(text.replace(NOT_MEASURED, "not printed") for text in published)))
    length = facts.derive(lambda v: shape_from(v).max_position_embeddings, ",",
                          "max_position_embeddings, prompt and answer", shape_place(facts))
    lines += ["", f"Prompt and answer together have at most {length} tokens. Give `attention_mask`: "
              "padding is the end-of-text token. To compare texts, fix the seed; for one that is "
              "always the same, `do_sample=False`."]
    return "\n".join(lines) + "\n"


INTENDED = {
    "final": """- learning how a language model is trained, step by step, with every file to look at
- experiments that need a whole training run to fit into minutes or hours: data, tokenizers, \
schedules, precision
- a base for fine-tuning on one narrow task, measured on that task before use
- a draft model for speculative decoding, or a test model for software that handles models""",
    "instruct": """- studying instruct tuning: what phases, data and refusals do to a model this small
- a test model for chat software
- a base for further tuning on conversations of your own""",
    "growth": """- studying how a trained model is made larger, and what that saves
- a base for fine-tuning on one narrow task, measured on that task before use""",
    "export": """- running the model where there is no PyTorch, after a look at what the format cost
- a test model for software that reads these formats"""}


def intended(facts: Facts) -> str:
    return f"""## Intended uses

{INTENDED[facts.of]}

## Out of scope

- answers that somebody relies on: medicine, law, money, safety, news, homework to hand in
- deciding about people, or talking to people who do not know that it is a program
- texts in languages that its training text does not hold, and texts longer than its context
- production of any kind without tests of your own on your own task

"""


def risks(facts: Facts) -> str:
    tuned = ("It was tuned to decline some harmful requests; the probe says how often it does, and "
             "how often it declines harmless ones." if facts.of == "instruct" else
             "It is a base model: it was not tuned to follow instructions or to decline anything.")
    return f"""## Risks and ethics

It makes up facts, names, quotations and code, in the tone of its training text; a model this small \
does so most of the
time. {tuned}

It was trained on documents that people wrote. They hold errors, prejudice and offensive language, \
and may hold personal
data; filters take out some of it, and the model can repeat the rest. Nobody has measured its bias \
towards any group.

Whoever publishes its text should say that a machine wrote it. Whoever builds on it should test the \
result on the people
and the language that it is meant for. The datasets' own licenses and terms hold for what was made \
from them.
"""


def comparable(facts: Facts, count: int = 3) -> str:
    """The published models nearest in parameters, with their published figures."""
    lines = ["## Comparable models", ""]
    try:
        own = count_parameters(shape_from(facts.get(*shape_place(facts))))
    except (KeyError, TypeError, AttributeError):
        return "\n".join([*lines, f"Parameters: {NOT_MEASURED}.", ""])

    def apart(name):
        return abs(math.log(count_parameters(RECIPES[name].shape) / own))
    others = [name for name in RECIPES if not name.endswith("-instruct")]
    lines += ["The published models nearest in size, with the figures **as published** in their "
              "cards; perplexity compares only under the same tokenizer, and these were measured on "
              "other text.", "",
              "| model | parameters | tokens | vocabulary | perplexity |", "|---|---|---|---|---|"]
    for name in sorted(others, key=apart)[:count]:
        file = PUBLISHED + name
        figures = [facts.show(file, "published", "parameters"), facts.show(file, "token_budget"),
                   facts.show(file, "tokenizer", form=cell),
                   facts.show(file, "published", "best_perplexity", form=",.2f")]
        lines.append(row(facts.show(file, "name", form=plain),
                         *(text.replace(NOT_MEASURED, "not published") for text in figures)))
    return "\n".join(lines) + "\n"


NEXT = {
    "final": "Teach it to answer (the instruct notebook), measure it against its peers (benchmark), "
             "make it larger (growth) or take it elsewhere (export). More tokens, or another seed, "
             "come first where the loss still falls at the end.",
    "instruct": "Read the answers in `probe.json` before you believe a rate; tune it further on "
                "conversations of your own (the LoRA section of the instruct notebook).",
    "growth": "Measure it against its peers (the benchmark notebook); train its last stage longer "
              "where the loss still falls at the end.",
    "export": "Choose the smallest file whose cost you can accept, on your own text."}


def what_is_next(facts: Facts) -> str:
    return f"## What is next\n\n{NEXT[facts.of]}\n"
