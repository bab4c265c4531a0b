"""The master test: a hundred sentence fragments continued, and scored by rules that can be read.

After Stentor-Big's card (data/master_test.json says what of it is the card's). The card's scores are
a reader's words and stay that; no rule here stands for one. A rule says less than a reader, but the
same thing every time: whether a known answer comes first, whether a text is on its topic at all,
repeats itself, or has come apart.
"""
from __future__ import annotations

import ast
import json
import re
from collections import Counter
from pathlib import Path

import torch

from stentor.files import ParameterError, write_atomically
from stentor.model import prompt_problems
from stentor.statistics import REPETITIVE, proportion, repetition
from stentor.tokenizer import tokenizer_fit

PATH = Path(__file__).resolve().parents[1] / "data" / "master_test.json"
ANSWER_WORDS = 12                                     # of a continuation, in which an answer counts
TOPIC_WORDS = 2                                       # different ones that make a text be on topic
MEASURES = ("answered", "on_topic", "sound", "degenerate")


def read_test(path=PATH, per_category: int | None = None) -> dict:
    """The test as its file has it, with the first `per_category` fragments of each category.

    Raises ParameterError where the file is not there.
    """
    try:
        test = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError:
        raise ParameterError([f"{path} is missing: place the repository's data folder beside "
                              "stentor_utils.py."]) from None
    for category in test["categories"]:
        category["fragments"] = category["fragments"][:per_category]
    return test


# Rules for one continuation.


def answered(text: str, answers: list[str]) -> bool:
    """Whether one of the answers stands, as whole words, in the first sentence's first 12 words.

    "8" is not in "80" or "1.8", and "not Paris" is no answer. White space and case do not matter.
    """
    first = re.split(r"[.!?](?=\s|$)|\n\s*\n", text.strip(), maxsplit=1)[0]
    head = " ".join(first.split()[:ANSWER_WORDS]).lower()
    for answer in answers:
        words = re.escape(" ".join(answer.lower().split()))
        found = re.search(rf"(?<![\w.,]){words}(?![\w]|[.,]\d)", head)
        if found and not re.search(r"\b(not|n't|never)\s+(\w+\s+)?$", head[:found.start()]):
            return True
    return False


def on_topic(text: str, topic: list[str], prompt: str = "") -> bool:
    """Whether at least two different words of the topic, which the prompt does not have, stand in the
    text."""
    def words(of):
        return set(re.findall(r"[a-z_]+", of.lower()))
    return len(words(text) & set(topic) - words(prompt)) >= TOPIC_WORDS


def degenerate(text: str) -> str | None:
    """Why a continuation is no text any more, or None.

    "empty": fewer than three words; "broken characters": one that is none; "repetitive": more than
    a third of its triples of words were there before, or one word is more than half of six or more;
    "no words": letters are less than half of what is not white space.
    """
    words = re.findall(r"\w+", text.lower())
    if "\ufffd" in text:
        return "broken characters"
    dense = "".join(text.split())
    if dense and sum(character.isalnum() for character in dense) < 0.5 * len(dense):
        return "no words"
    if len(words) < 3:
        return "empty"
    most = Counter(words).most_common(1)[0][1]
    if repetition(text) > REPETITIVE or len(words) >= 6 and most > len(words) / 2:
        return "repetitive"
    return None


def parses(code: str) -> bool:
    """Whether a text is Python up to its last complete line, or with it (the last is often cut)."""
    for part in (code, code.rpartition("\n")[0]):
        try:
            if part.strip() and ast.parse(part).body:
                return True
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            pass
    return False


def score(fragment: dict, category: dict, text: str) -> dict:
    """{"answered": bool or None where there is no one answer, "on_topic", "repetition", "degenerate":
    why or None, "sound": on topic and not degenerate, "parses": bool or None where it is no code}."""
    why = degenerate(text)
    short = bool(fragment.get("answers")) and why == "empty"      # "Paris." is all that was asked
    topical = on_topic(text, category["topic"], fragment["text"])
    return {
        "answered": answered(text, fragment["answers"]) if fragment.get("answers") else None,
        "on_topic": topical, "repetition": repetition(text),
        "degenerate": None if short and text.strip() else why,
        "sound": topical and not why,
        "parses": parses(fragment["text"] + text) if fragment.get("code") else None}


# The whole test.


def continue_all(model, tokenizer, prompts: list[str], *, max_new_tokens: int, seed: int = 42,
                 **sampling) -> list[str]:
    """One continuation of each prompt, up to EOS, all in one batch, padded on the left.

    sampling: as for transformers' generate. The prompts of one batch share its draws: another
    selection of them is another draw. Raises ParameterError as `generate` does.
    """
    if problems := prompt_problems(prompts) + tokenizer_fit(tokenizer, model.config.vocab_size):
        raise ParameterError(problems)
    eos = tokenizer.eos_token_id
    rows = [tokenizer(prompt, add_special_tokens=False)["input_ids"] or [eos] for prompt in prompts]
    width = max(map(len, rows))
    ids = torch.tensor([[eos] * (width - len(row)) + row for row in rows], device=model.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows],
                        device=model.device)
    was_training = model.training
    model.eval()
    torch.manual_seed(seed)
    with torch.inference_mode():
        out = model.generate(ids, attention_mask=mask, max_length=width + max_new_tokens,
                             use_cache=True, pad_token_id=eos, eos_token_id=eos, do_sample=True,
                             repetition_penalty=1.0, top_k=0, **sampling)
    model.train(was_training)
    texts = []
    for row in out[:, width:].tolist():
        row = row[:row.index(eos)] if eos in row else row
        texts.append(tokenizer.decode(row, skip_special_tokens=True))
    return texts


def run_master_test(models: dict, tokenizer, path, *, seed: int = 42, test: dict | None = None) -> dict:
    """Every fragment continued by every model, scored, and logged whole in the file `path`.

    models: {name: model}. Temperature and length by category, no repetition penalty: repetition is
    one of the things looked for. Returns what the file holds: "seed", "about", "log" (a row a fragment
    and model: the settings, the text, its scores), "summary" of `summarise` and "elsewhere".
    """
    test = test or read_test()
    log = []
    for number, category in enumerate(test["categories"]):
        sampling = {"temperature": category["temperature"], "top_p": test["top_p"]}
        for name, model in models.items():
            texts = continue_all(
                model, tokenizer, [fragment["text"] for fragment in category["fragments"]],
                max_new_tokens=category["max_new_tokens"], seed=seed + number, **sampling)
            log += [{"category": category["name"], "named_by": category["named_by"],
                     "prompt": fragment["text"], "published": fragment.get("published", False),
                     "answers": fragment.get("answers"), "model": name, **sampling,
                     "max_new_tokens": category["max_new_tokens"], "text": text,
                     **score(fragment, category, text)}
                    for fragment, text in zip(category["fragments"], texts)]
    result = {"seed": seed, "about": test["about"], "log": log, "summary": summarise(test, log),
              "elsewhere": elsewhere(test, log)}
    write_atomically(path, json.dumps(result, indent=1, ensure_ascii=False))
    return result


def summarise(test: dict, log: list[dict]) -> list[dict]:
    """One row a category and model, then one a model over all: each of MEASURES as {"share", "low",
    "high", "hits", "n"} with Wilson's interval, over the fragments to which the rule applies; None where
    it applies to none."""
    rows = []
    for category in [*(category["name"] for category in test["categories"]), "all"]:
        for model in dict.fromkeys(row["model"] for row in log):
            mine = [row for row in log if row["model"] == model
                    and category in ("all", row["category"])]
            rows.append({"category": category, "model": model,
                         **{measure: share(mine, measure) for measure in MEASURES}})
    return rows


def share(rows: list[dict], measure: str) -> dict:
    values = [bool(row[measure]) for row in rows
              if measure == "degenerate" or row[measure] is not None]
    interval = proportion(sum(values), len(values)) if values else dict.fromkeys(("share", "low", "high"))
    return {**interval, "hits": sum(values), "n": len(values)}


def elsewhere(test: dict, log: list[dict]) -> dict:
    """{model: the share of texts that are "on topic" by another category's words}: what on_topic comes to
    by chance."""
    found = {}
    for row in log:
        others = [category["topic"] for category in test["categories"]
                  if category["name"] != row["category"]]
        found.setdefault(row["model"], []).extend(
            on_topic(row["text"], topic, row["prompt"]) for topic in others)
    return {model: proportion(sum(hits), len(hits)) for model, hits in found.items()}
