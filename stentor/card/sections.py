"""The sections of a model card, in order; every value in them is a mark of `facts`."""
from __future__ import annotations

import dataclasses
import re

from stentor.card.facts import (
    Facts, NOT_MEASURED, PUBLISHED, benchmark_rows, cell, fenced, own_recipe, plain, row,
    shape_from, shape_place, yaml_text)
from stentor.card.scores import interval
from stentor.card.uses import quality
from stentor.files import ParameterError
from stentor.published import ALL_RECIPES
from stentor.recipes import Recipe
from stentor.shapes import count_parameters, parameter_budget


def metadata(facts: Facts) -> str:
    """The YAML head: huggingface_hub's ModelCardData with an EvalResult for every score; values are
    marks still."""
    from huggingface_hub import ModelCardData
    scores = held_out_results(facts) + benchmark_results(facts) if facts.of == "final" else []
    given = {key: facts.show(facts.record, "parameters", key, form=yaml_text)
             for key in ("name", "language", "license")}
    authors = [facts.show(facts.record, "parameters", "authors", i, form=yaml_text)
               for i, _ in enumerate(facts.get(facts.record, "parameters", "authors") or [])]
    more = {"model_card_authors": authors or None, "widget": widget(facts) or None}
    if facts.get(facts.record, "parameters", "base_model"):
        more["base_model"] = facts.show(facts.record, "parameters", "base_model", form=yaml_text)
        more["base_model_relation"] = "quantized" if facts.of == "export" else "finetune"
    data = ModelCardData(
        language=given["language"], license=given["license"],
        library_name="transformers", pipeline_tag="text-generation", tags=tags(facts),
        datasets=datasets(facts) or None, model_name=given["name"] if scores else None,
        eval_results=scores or None, **{key: value for key, value in more.items() if value})
    return f"---\n{data.to_yaml()}\n---\n"


def tags(facts: Facts) -> list[str]:
    """What the model is, of words that its files bear out."""
    size = facts.derive(lambda v: f"{count_parameters(shape_from(v)) / 1e6:.0f}m-parameters", str,
                        "parameters / 1,000,000", shape_place(facts))
    kind = facts.show(f"{facts.config}/config.json", "model_type", form=yaml_text)
    own = {"instruct": ["conversational", "lora", "sft"], "growth": ["model-growth"],
           "export": ["quantized"]}
    found = ["stentor", kind, "small-language-model", "text-generation", size, "educational",
             "research", *own.get(facts.of, [])]
    vocabulary = facts.folder / "final" / "tokenmonster.vocab"
    found += ["tokenmonster"] if vocabulary.is_file() else []
    return [tag for tag in found if tag != NOT_MEASURED]


def widget(facts: Facts) -> list[dict]:
    """The hub's example prompts: those that the card has samples of."""
    if facts.of == "instruct":
        place = ("instruct/probe.json", "models", "base", "answers")
        asked = [i for i, one in enumerate(facts.get(*place) or []) if one.get("kind") == "benign"]
        return [{"messages": [{"role": "user", "content": facts.show(
            *place, i, "prompt", form=yaml_text)}]} for i in asked[:3]]
    if facts.of != "final":
        return []
    return [{"text": facts.show("samples.json", "samples", i, "prompt", form=yaml_text)}
            for i, one in enumerate(facts.get("samples.json", "samples") or [])
            if one.get("prompt")]


def datasets(facts: Facts) -> list[str]:
    """The hub's names of what the model learned from; text that comes with Python has none."""
    recipes, found, seen = [("run.json", "recipe")], [], set()
    if facts.of == "growth":
        stages = facts.get("growth/curriculum.json", "stages") or []
        recipes = [("growth/curriculum.json", "stages", i) for i, _ in enumerate(stages)]
    for recipe in recipes:
        for i, source in enumerate(facts.get(*recipe, "sources") or []):
            path = str(source.get("path", ""))
            if path.startswith("hf:") and path not in seen:
                seen.add(path)
                found.append(facts.derive(
                    lambda path: yaml_text(path.removeprefix("hf:")), str,
                    "the hub source's name", (*recipe, "sources", i, "path")))
    return found


def held_out_results(facts: Facts) -> list:
    from huggingface_hub import EvalResult
    held_out = {"task_type": "text-generation", "dataset_type": "held-out",
                "dataset_name": "held-out documents of the training sources"}
    titles = {"eval_loss": "loss, nats per token", "perplexity": "perplexity",
              "bits_per_byte": "bits per byte"}
    values = {key: facts.show("summary.json", key, form=".4f") for key in titles}
    return [EvalResult(**held_out, metric_type=key, metric_name=titles[key], metric_value=value)
            for key, value in values.items() if value != NOT_MEASURED]


def benchmark_results(facts: Facts) -> list:
    from huggingface_hub import EvalResult
    file, found = "benchmark/results.csv", []
    for i in benchmark_rows(facts)[1]:
        value = facts.show(file, i, "score", form=".4f")
        if value == NOT_MEASURED:
            continue
        bounds = {key: facts.show(file, i, key, form=form)
                  for key, form in (("low", ".4f"), ("high", ".4f"), ("n", ".0f"))}
        found.append(EvalResult(
            task_type="text-generation",
            dataset_type=facts.show(file, i, "task", form=yaml_text),
            dataset_name=facts.show(file, i, "task", form=yaml_text), metric_value=value,
            metric_type=facts.show(file, i, "metric", form=yaml_text),
            source_name="lm-evaluation-harness",
            source_url="https://github.com/EleutherAI/lm-evaluation-harness",
            metric_args={key: text for key, text in bounds.items() if text != NOT_MEASURED}))
    return found


def opening(facts: Facts) -> str:
    count, tokens = (facts.show("summary.json", key) for key in ("parameters", "tokens"))
    return f"""# {facts.show(facts.record, "parameters", "name", form=cell)}

A language model of {count} parameters, trained from nothing on {tokens} tokens by the recipe
{facts.show("run.json", "recipe", "name", form=cell)} of the Stentor suite. {quality(facts)}

Every number below was filled in from a file of the run; `model_card.json` names the file and the \
place of each. What no file
holds stands as *{NOT_MEASURED}*. Figures of the published recipe are labelled as published.
"""


def architecture(facts: Facts) -> str:
    place = shape_place(facts)

    def shape(key, form=","):
        if key == "rope_theta":                       # a config.json has it elsewhere than a recipe
            return facts.derive(lambda v: shape_from(v).rope_theta, form, key, place)
        return facts.show(*place, key, form=form)

    head = head_dim(facts, place)
    total = facts.derive(lambda values: count_parameters(shape_from(values)), ",",
                         "sum of the parts", place)
    kind = facts.show(f"{facts.config}/config.json", "architectures", 0, form=cell)
    counted = ""
    if facts.of == "final":
        counted = f"\n| counted on the model | | {facts.show('summary.json', 'parameters')} | |"
    tied = facts.get(*place, "tie_word_embeddings")
    parts = "\n".join(budget(facts, place, shape))
    return f"""## Architecture

`{kind}`, {"input and output embeddings tied" if tied else "output embeddings of its own"}.

| | |
|---|---|
| layers | {shape("num_hidden_layers")} |
| hidden size | {shape("hidden_size")} |
| feed-forward size | {shape("intermediate_size")} |
| query heads | {shape("num_attention_heads")} |
| key-value heads | {shape("num_key_value_heads")} |
| head dimension | {head} |
| context, tokens | {shape("max_position_embeddings")} |
| vocabulary | {shape("vocab_size")} |
| RoPE theta | {shape("rope_theta", ",g")} |

How the parameters add up (no biases):

| part | formula | parameters | share |
|---|---|---|---|
{parts}
| **sum** | | **{total}** | |{counted}
"""


def head_dim(facts: Facts, place: tuple) -> str:
    return facts.derive(lambda s: s["hidden_size"] // s["num_attention_heads"], ",",
                        "hidden_size / num_attention_heads", place)


def budget(facts: Facts, place: tuple, shape) -> list[str]:
    """A row for each part of the parameters: the formula with this shape's figures, the count."""
    def layers():
        return shape("num_hidden_layers")

    def hidden():
        return shape("hidden_size")

    def keys():                                       # their width: head dimension times heads
        return facts.derive(
            lambda s: s["hidden_size"] // s["num_attention_heads"] * s["num_key_value_heads"],
            ",", "head_dim × num_key_value_heads", place)

    def part(key, form, formula, of=lambda shape: 1):
        return facts.derive(
            lambda values: parameter_budget(shape_from(values))[key] / of(shape_from(values)), form,
            f"parameter_budget(shape)[{key}]{formula}", place)

    # an untied lm_head is a second table
    table = "× 2 × " if facts.get(*place, "tie_word_embeddings") is False else "× "
    norms = f"{layers()} × 2 × {hidden()} + {hidden()}"
    if facts.get(*place, "qk_norm"):
        norms += f" + {layers()} × 2 × {head_dim(facts, place)}"
    formulas = {
        "embedding": f"{shape('vocab_size')} {table}{hidden()}",
        "attention": f"{layers()} × (2 × {hidden()} × {hidden()} + 2 × {hidden()} × {keys()})",
        "ffn": f"{layers()} × 3 × {hidden()} × {shape('intermediate_size')}",
        "norms": norms}
    return [row(key.replace("ffn", "feed-forward"), formula, part(key, ",.0f", ""),
                part(key, ".1%", " / total", count_parameters))
            for key, formula in formulas.items()]


def tokenizer(facts: Facts) -> str:
    report = "tokenizer/report.json"
    lines = ["## Tokenizer", "", "| | |", "|---|---|"]
    sha = ("tokens/manifest.json", "fingerprint", "tokenizer_sha256")
    rows = [("vocabulary", facts.show(report, "vocabulary", form=cell)),
            ("mode", facts.show(report, "mode", form=cell)),
            ("capcode level", facts.show(report, "capcode", form=plain)),
            ("tokens", facts.show(report, "vocab_size")),
            ("SHA of its file", facts.show(*sha, form=cell))]
    for kind in ("chars_per_token", "bytes_per_token"):
        for name in facts.get(report, kind) or {}:
            title = kind.replace("_", " ").replace("chars", "characters")
            rows.append((f"{title}, held-out {facts.name(report, kind, name)}",
                         facts.show(report, kind, name, form=".3f")))
    return "\n".join([*lines, *(row(*pair) for pair in rows)]) + """

The folder brings its tokenizer as one Python file, `tokenmonster_hf.py`, where it is a \
TokenMonster vocabulary.
"""


def data(facts: Facts) -> str:
    store = "tokens/manifest.json"
    names = list(facts.get(store, "sources") or {})
    lines = ["## Data", ""]
    if not names:
        return "\n".join([*lines, f"Tokens per source: {NOT_MEASURED}.", ""])
    recipe = facts.get("run.json", "recipe", "sources") or []
    at = {source.get("name"): i for i, source in enumerate(recipe)}
    lines += ["Cleaned, tokenised and packed without padding; counted in the token store. Held-out "
              "documents never enter training.", "",
              "| source | from | revision | documents | tokens | UTF-8 bytes | bytes per token "
              "| skipped | held out | weight |", "|---|---|---|---|---|---|---|---|---|---|"]
    for name in names:
        where = (store, "sources", name)
        weight = ("run.json", "recipe", "sources", at.get(name, len(recipe)))
        anneal = ("run.json", "recipe", "anneal_weights", at.get(name, len(recipe)))
        weights = facts.show(*weight, "weight", form="g")
        if facts.get(*anneal) is not None:
            weights += f", then {facts.show(*anneal, form='g')}"
        lines.append(row(
            facts.name(*where), facts.show(*weight, "path", form=cell),
            facts.show(*where, "revision", form=cell) if facts.get(*where, "revision") else "none",
            *(facts.show(*where, key) for key in ("documents", "tokens", "bytes")),
            facts.derive(lambda size, tokens: size / tokens, ".3f", "bytes / tokens",
                         (*where, "bytes"), (*where, "tokens")),
            facts.derive(lambda skipped: sum(skipped.values()), ",", "sum of skipped",
                         (*where, "skipped")),
            facts.show(*where, "validation", "documents"), weights))
    epoch = [i for i, found in enumerate(facts.read("metrics.jsonl") or [])
             if isinstance(found, dict) and "epoch" in found]
    last = ("metrics.jsonl", epoch[-1] if epoch else 0, "epoch")
    lines += ["", f"Tokens seen in training: {facts.show('summary.json', 'tokens')}, which is "
              f"{facts.show(*last, form='.2f')} times through the store."]
    if facts.get("run.json", "recipe", "anneal_weights"):
        share = facts.show("run.json", "recipe", "anneal_fraction", form=".0%")
        lines.append(f"The second weight holds for the last {share} of the tokens.")
    return "\n".join(lines) + "\n"


def training(facts: Facts) -> str:
    recipe, published = facts.get("run.json", "recipe"), own_recipe(facts)
    lines = ["## Training", ""]
    if not isinstance(recipe, dict):
        return "\n".join([*lines, f"Hyperparameters: {NOT_MEASURED}.", ""])
    try:
        card = ALL_RECIPES[published.removeprefix(PUBLISHED)]
        different = [name for name, _, _ in Recipe.from_dict(recipe).difference(card)]
    except (AttributeError, KeyError, ParameterError):       # an own recipe, or of another version
        published, different = None, []
    lines += ["What differs from the published recipe is in bold." if published else
              "There is no published recipe of this name to hold it against.", "",
              "| hyperparameter | this run | published |", "|---|---|---|"]
    names = [field.name for field in dataclasses.fields(Recipe)]
    for name in [*names, *(name for name in different if "." in name)]:
        place = name.split(".")
        if place[0] not in recipe or name in ("name", "shape", "published", "unpublished"):
            continue
        mine, theirs = hyperparameter(facts, "run.json", "recipe", *place), "no published figure"
        if published:
            theirs = hyperparameter(facts, published, *place)
            theirs += " (not printed in the card)" * (name in card.unpublished)
        title = ("shape." if place[0] == "shape" else "") + facts.name("run.json", "recipe", *place)
        lines.append(row(f"**{title}**" if name in different else title, mine, theirs))
    done, steps, skipped = (facts.show("summary.json", key)
                            for key in ("step", "steps", "skipped_steps"))
    lines += ["", f"Steps done: {done} of {steps}; skipped for a gradient that was not finite: "
              f"{skipped}."]
    return "\n".join(lines) + "\n"


def hyperparameter(facts: Facts, file: str, *path: str) -> str:
    """The value there; not by `show`, because None is a value here, "none"."""
    value, place = facts.read(file), ".".join(path)
    for key in path:
        value = value[key]
    if path[-1] == "sources":
        value, place = [source["name"] for source in value], f"{place}.*.name"
    return facts.mark(plain(value), file, place)


def precision(facts: Facts) -> str:
    found = facts.get("summary.json", "precision")
    lines = ["## Precision recipe", ""]
    if not isinstance(found, dict):
        return "\n".join([*lines, f"Precision: {NOT_MEASURED}.", ""])
    lines += ["Counted on the model that was trained.", "", "| | |", "|---|---|"]
    for key in found:
        if key != "notes":
            lines.append(f"| {facts.name('summary.json', 'precision', key)} | "
                         f"{facts.show('summary.json', 'precision', key, form=plain)} |")
    for i, _ in enumerate(found.get("notes") or []):
        lines += ["", facts.show("summary.json", "precision", "notes", i, form=cell)]
    return "\n".join(lines) + "\n"


def samples(facts: Facts) -> str:
    file = "samples.json"
    lines = ["## Samples", ""]
    if not facts.get(file, "samples"):
        return "\n".join([*lines, f"Sampled outputs: {NOT_MEASURED}.", ""])
    settings = "; ".join(facts.name(file, "settings", key) + " "
                         + facts.show(file, "settings", key, form=plain)
                         for key in facts.get(file, "settings") or {})
    lines += ["Not selected: one continuation of each prompt, from seed "
              f"{facts.show(file, 'seed', form='d')} on. Settings: {settings}.", ""]
    for i, _ in enumerate(facts.get(file, "samples")):
        lines += [f"**{facts.show(file, 'samples', i, 'prompt', form=cell)}** …", "",
                  fenced(facts, file, "samples", i, "text"), ""]
    return "\n".join(lines)


def limitations(facts: Facts) -> str:
    file = "limitations.json"
    how = f"Continuations of held-out text: {NOT_MEASURED}."
    if facts.read(file):
        how = (f"{facts.show(file, 'n')} continuations of {facts.show(file, 'prompt_tokens')} "
               f"held-out tokens, at most {facts.show(file, 'max_new_tokens')} tokens, seed "
               f"{facts.show(file, 'seed', form='d')}, the samples' settings; "
               "95% Wilson interval.")
    over = f"{NOT_MEASURED}; a base model is not tuned to refuse"
    if facts.get("instruct/probe.json", "models") is not None:
        over = "in the table of the instruct version"
    return f"""## Limitations, measured

{how}

| | |
|---|---|
| stops by itself | {interval(facts, file, "stopped")} |
| repeats itself: over a third of its word triples occurred before | \
{interval(facts, file, "repetitive")} |
| mean share of word triples that occurred before | \
{facts.show(file, "mean_repetition", form=".1%")} |
| has a replacement character (broken UTF-8) | {interval(facts, file, "replacement")} |
| over-refusal | {over} |

Not measured at all: truthfulness, bias, safety of the base model. It was trained on documents \
that people wrote and repeats
what they hold. Do not rely on it for facts, advice or decisions.
"""


def loading(facts: Facts) -> str:
    name = facts.show(facts.record, "parameters", "repo_id", form=cell)
    return f"""## How to load

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}", trust_remote_code=True)   # runs the folder's \
tokenmonster_hf.py
inputs = tokenizer("Once upon a time", return_tensors="pt")
output = model.generate(**inputs, do_sample=True)
print(tokenizer.decode(output.flatten().tolist()))
```
"""


def citation(facts: Facts) -> str:
    given, recipe = (facts.record, "parameters"), ("run.json", "recipe", "name")
    return f"""## Citation

```bibtex
@misc{{{facts.show(*given, "name", form=lambda name: re.sub("[^A-Za-z0-9]", "", name))},
  title = {{{facts.show(*given, "name", form=cell)}}},
  year  = {{{facts.show(*given, "written", form=lambda day: day[:4])}}},
  note  = {{Trained with the Stentor notebook suite after the recipe \
{facts.show(*recipe, form=cell)}}}
}}
```

Card written {facts.show(*given, "written", form=cell)}.
"""
