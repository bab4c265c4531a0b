"""The sections of a model card, in order; every value in them is a mark of `facts`."""
from __future__ import annotations

import dataclasses
import math
import re

from stentor.card.facts import (
    Facts, NOT_MEASURED, benchmark_rows, cell, own_recipe, plain, yaml_text)
from stentor.files import ParameterError, duration
from stentor.published import ALL_RECIPES
from stentor.recipes import Recipe
from stentor.shapes import Shape, count_parameters, parameter_budget


def metadata(facts: Facts) -> str:
    """The YAML head: huggingface_hub's ModelCardData with an EvalResult for every score; values
    are marks still."""
    from huggingface_hub import EvalResult, ModelCardData

    def quoted(file, *path):
        return facts.show(file, *path, form=yaml_text)

    results = []
    held_out = {"task_type": "text-generation", "dataset_type": "held-out",
                "dataset_name": "held-out documents of the training sources"}
    for key, title in (("eval_loss", "loss, nats per token"), ("perplexity", "perplexity"), ("bits_per_byte", "bits per byte")):
        value = facts.show("summary.json", key, form=".4f")
        if value != NOT_MEASURED:
            results.append(EvalResult(**held_out, metric_type=key, metric_name=title, metric_value=value))
    for i in benchmark_rows(facts)[1]:
        value = facts.show("benchmark/results.csv", i, "score", form=".4f")
        if value != NOT_MEASURED:
            bounds = {key: facts.show("benchmark/results.csv", i, key, form=form)
                      for key, form in (("low", ".4f"), ("high", ".4f"), ("n", ".0f"))}
            results.append(EvalResult(
                task_type="text-generation", dataset_type=quoted("benchmark/results.csv", i, "task"),
                dataset_name=quoted("benchmark/results.csv", i, "task"), metric_value=value,
                metric_type=quoted("benchmark/results.csv", i, "metric"), source_name="lm-evaluation-harness",
                source_url="https://github.com/EleutherAI/lm-evaluation-harness",
                metric_args={key: text for key, text in bounds.items() if text != NOT_MEASURED}))
    sources = facts.get("run.json", "recipe", "sources") or []
    datasets = [facts.derive(lambda path: yaml_text(path.removeprefix("hf:")), str, "the hub source's name",
                             ("run.json", "recipe", "sources", i, "path"))
                for i, source in enumerate(sources) if str(source.get("path", "")).startswith("hf:")]
    given = {key: quoted("model_card.json", "parameters", key) for key in ("name", "language", "license")}
    data = ModelCardData(
        language=given["language"], license=given["license"],
        library_name="transformers", pipeline_tag="text-generation", tags=["stentor", "llama", "small-language-model"],
        datasets=datasets or None, model_name=given["name"] if results else None,
        eval_results=results or None)
    return f"---\n{data.to_yaml()}\n---\n"


def opening(facts: Facts) -> str:
    fields = {"parameters": ("parameters", ","), "tokens": ("tokens", ",")}
    count, tokens = (facts.show("summary.json", key, form=form) for key, form in fields.values())
    return f"""# {facts.show("model_card.json", "parameters", "name", form=cell)}

A Llama language model of {count} parameters, trained from nothing on {tokens} tokens by the recipe
{facts.show("run.json", "recipe", "name", form=cell)} of the Stentor suite. It is a small model: it continues text fluently
before it knows anything, so check what it says.

Every number below was filled in from a file of the run; `model_card.json` names the file and the place of each. What no file
holds stands as *{NOT_MEASURED}*. Figures of the published recipe are labelled as published.
"""


def results(facts: Facts) -> str:
    summary = "summary.json"
    gain = facts.derive(lambda bigram, bits: bigram - bits, ".4f", "byte_bigram_bits_per_byte - bits_per_byte",
                        ("baseline.json", "byte_bigram_bits_per_byte"), (summary, "bits_per_byte"))
    return f"""## Results

Measured on the saved weights, read back, over {facts.show(summary, "eval_tokens")} tokens of held-out documents of the training
sources. Loss and perplexity compare only under the same tokenizer; bits per byte compares across tokenizers.

| held-out text | |
|---|---|
| loss, nats per token | {facts.show(summary, "eval_loss", form=".4f")} |
| perplexity | {facts.show(summary, "perplexity", form=",.2f")} |
| bits per byte | {facts.show(summary, "bits_per_byte", form=".4f")} |
| bits per byte of a byte bigram model, same text | {facts.show("baseline.json", "byte_bigram_bits_per_byte", form=".4f")} |
| better than the bigram model by | {gain} |
| best loss during training | {facts.show(summary, "best_eval_loss", form=".4f")} |
| at step | {facts.show(summary, "best_step")} |

### Benchmarks

{benchmarks(facts)}
"""


def benchmarks(facts: Facts) -> str:
    model, mine = benchmark_rows(facts)
    if not mine:
        return f"Benchmark scores: {NOT_MEASURED}."
    lines = ["Brackets: 95% interval. A rank such as *first–last* is a range where paired tests cannot tell models apart.", "",
             "| task | metric | items | model | score | chance | rank |", "|---|---|---|---|---|---|---|"]
    file = "benchmark/results.csv"
    for i, row in enumerate(facts.read(file)):
        score, low, high = (facts.show(file, i, key, form=".4f") for key in ("score", "low", "high"))
        lines.append("| " + " | ".join([
            facts.show(file, i, "task", form=cell), facts.show(file, i, "metric", form=cell),
            facts.show(file, i, "n", form=",.0f") if row.get("n") else "",
            "**this model**" if row["model"] == model else facts.show(file, i, "model", form=cell),
            f"{score} [{low}, {high}]", facts.show(file, i, "chance", form=".4f") if row.get("chance") else "no chance level",
            facts.show(file, i, "rank", form=cell) if row.get("rank") else ""]) + " |")
    lines += cautions(facts, file)
    tasks = facts.get("benchmark/contamination.json", "tasks")
    if isinstance(tasks, dict):
        place = ("benchmark/contamination.json", "tasks")
        hits, checked = (facts.derive(lambda rows, key=key: sum(row[key] for row in rows.values()), ",",
                                      f"sum of tasks.*.{key}", place) for key in ("contaminated", "items_checked"))
        short, whole = (facts.derive(lambda rows, key=key: sum(row[key] for row in rows.values()), ",",
                                     f"sum of tasks.*.{key}", place) for key in ("short_checked", "short_found"))
        rest = facts.derive(
            lambda rows: sum(row["items"] - row["items_checked"] - row["short_checked"] for row in rows.values()), ",",
            "sum of tasks.*.items less items_checked and short_checked", place)
        words = facts.show(place[0], "ngram")
        lines += ["", f"Contamination: of {checked} items of {words} words or more, {hits} share {words} words in a row with "
                  f"the training text; of {short} shorter ones, {whole} stand in it whole; {rest} are too short to be checked."]
    else:
        lines += ["", f"Contamination of the training text by benchmark items: {NOT_MEASURED}."]
    return "\n".join([*lines, "", *pictures(facts, "benchmark", "blimp")])


def instruct(facts: Facts) -> str:
    """The instruct version that 04 made of this model, where there is one."""
    file, probe = "instruct/sft_summary.json", "instruct/probe.json"
    if facts.read(file) is None:
        return f"## Instruct version\n\nNone in this run: refusal and over-refusal {NOT_MEASURED}.\n"
    lines = ["## Instruct version", "",
             f"`instruct/final/`: LoRA of {facts.show(file, 'trainable_parameters')} trainable parameters in phases, merged; "
             f"recipe *{facts.show(file, 'deliver', form=cell)}*, {facts.show(file, 'examples')} examples, "
             f"{facts.show(file, 'held_out')} held out.", ""]
    delivered = f"{facts.get(file, 'deliver')}-{facts.get(file, 'seeds', 0)}"
    lines += phases(facts, file)
    models = facts.get(probe, "models") or {}
    for suite in (models.get(delivered) or {}).get("scores", {}):
        if not suite.endswith("greedy"):
            continue
        title = facts.name(probe, "models", delivered, "scores", suite)
        lines += ["", f"Probe, {title}; share of answers and 95% Wilson interval:", "", "| | before | after |", "|---|---|---|"]
        for key in models[delivered]["scores"][suite]:
            if key.startswith("card's") or not isinstance(models[delivered]["scores"][suite][key], dict):
                continue
            shares = []
            for who in ("base", delivered):
                share, low, high = (facts.show(probe, "models", who, "scores", suite, key, part, form=".1%")
                                    for part in ("share", "low", "high"))
                shares.append(NOT_MEASURED if share == NOT_MEASURED else f"{share} [{low}, {high}]")
            lines.append(f"| {facts.name(probe, 'models', delivered, 'scores', suite, key)} | " + " | ".join(shares) + " |")
    return "\n".join([*lines, "", *pictures(facts, "sft", "probe")])


def phases(facts: Facts, file: str) -> list[str]:
    """A row for each phase of the delivered recipe: losses from the phase's own metrics, the rest
    from the summary."""
    lines = ["| phase | examples | steps | loss before | loss after |", "|---|---|---|---|---|"]
    for number in range(1, 100):
        metrics = f"instruct/sft_metrics-{facts.get(file, 'deliver')}-phase{number}.jsonl"
        evaluated = [i for i, row in enumerate(facts.read(metrics) or []) if row.get("kind") == "eval"]
        if not evaluated:
            break
        last = facts.get(metrics, evaluated[-1], "loss")
        rows = facts.get(file, "phases") or []
        at = next((i for i, row in enumerate(rows) if (row.get("number"), row.get("loss_after")) == (number, last)), len(rows))
        show = [facts.show(file, "phases", at, "phase", form=cell)]
        show += [facts.show(file, "phases", at, key) for key in ("examples", "steps")]
        show += [facts.show(metrics, i, "loss", form=".4f") for i in (evaluated[0], evaluated[-1])]
        lines.append("| " + " | ".join(show) + " |")
    return lines if len(lines) > 2 else []


def curves(facts: Facts) -> str:
    rows = facts.read("metrics.jsonl") or []
    evaluated = [i for i, row in enumerate(rows) if isinstance(row, dict) and row.get("kind") == "eval"]
    if len(evaluated) > 12:                           # evenly over the run, the last and the best among them
        best = min(evaluated, key=lambda i: rows[i].get("loss", math.inf))
        evaluated = sorted({*evaluated[::-(-len(evaluated) // 10)], best, evaluated[-1]})
    lines = ["## Curves", "", *pictures(facts, "loss", "bits_per_byte")]
    if not evaluated:
        return "\n".join([*lines, f"Evaluations during training: {NOT_MEASURED}.", ""])
    lines += ["| step | tokens | loss | perplexity | bits per byte |", "|---|---|---|---|---|"]
    for i in evaluated:
        values = [facts.show("metrics.jsonl", i, key, form=form) for key, form in (
            ("step", ","), ("tokens", ","), ("loss", ".4f"), ("perplexity", ",.2f"), ("bits_per_byte", ".4f"))]
        lines.append("| " + " | ".join(values) + " |")
    return "\n".join(lines) + "\n"


CHARTS = ("loss", "bits_per_byte", "benchmark", "blimp", "sft", "probe")      # those of 06 that a card shows


def pictures(facts: Facts, *names: str) -> list[str]:
    """Lines that show those of the charts that 06 drew."""
    return [line for name in names if (facts.folder / "charts" / f"{name}.png").is_file()
            for line in (f"![{name.replace('_', ' ')}](charts/{name}.png)", "")]


def architecture(facts: Facts) -> str:
    place = ("run.json", "recipe", "shape")

    def shape(key, form=","):
        return facts.show(*place, key, form=form)

    def part(key):
        return facts.derive(lambda values: parameter_budget(Shape(**values))[key], ",", f"parameter_budget(shape)[{key}]",
                            place)

    def share(key):
        return facts.derive(lambda values: parameter_budget(Shape(**values))[key]
                            / count_parameters(Shape(**values)), ".1%", f"parameter_budget(shape)[{key}] / total", place)

    def kv():                                         # width of the keys: head dimension times heads
        return facts.derive(lambda s: s["hidden_size"] // s["num_attention_heads"] * s["num_key_value_heads"], ",",
                            "head_dim × num_key_value_heads", place)

    head = facts.derive(lambda s: s["hidden_size"] // s["num_attention_heads"], ",", "hidden_size / num_attention_heads", place)
    total = facts.derive(lambda values: count_parameters(Shape(**values)), ",", "sum of the parts", place)
    tied = facts.get(*place, "tie_word_embeddings")
    table = "× 2 × " if tied is False else "× "       # an untied lm_head is a second table
    layers, hidden, ffn = (lambda key=key: shape(key) for key in ("num_hidden_layers", "hidden_size", "intermediate_size"))
    formulas = {
        "embedding": f"{shape('vocab_size')} {table}{hidden()}",
        "attention": f"{layers()} × (2 × {hidden()} × {hidden()} + 2 × {hidden()} × {kv()})",
        "ffn": f"{layers()} × 3 × {hidden()} × {ffn()}",
        "norms": f"{layers()} × 2 × {hidden()} + {hidden()}"}
    sums = "\n".join(f"| {key.replace('ffn', 'feed-forward')} | {formula} | {part(key)} | {share(key)} |"
                     for key, formula in formulas.items())
    return f"""## Architecture

`LlamaForCausalLM`, {"input and output embeddings tied" if tied else "output embeddings of its own"}.

| | |
|---|---|
| layers | {layers()} |
| hidden size | {hidden()} |
| feed-forward size | {ffn()} |
| query heads | {shape("num_attention_heads")} |
| key-value heads | {shape("num_key_value_heads")} |
| head dimension | {head} |
| context, tokens | {shape("max_position_embeddings")} |
| vocabulary | {shape("vocab_size")} |
| RoPE theta | {shape("rope_theta", ",g")} |

How the parameters add up (no biases):

| part | formula | parameters | share |
|---|---|---|---|
{sums}
| **sum** | | **{total}** | |
| counted on the model | | {facts.show("summary.json", "parameters")} | |
"""


def tokenizer(facts: Facts) -> str:
    report = "tokenizer/report.json"
    lines = ["## Tokenizer", "", "| | |", "|---|---|"]
    rows = [("vocabulary", facts.show(report, "vocabulary", form=cell)), ("mode", facts.show(report, "mode", form=cell)),
            ("capcode level", facts.show(report, "capcode", form=plain)), ("tokens", facts.show(report, "vocab_size")),
            ("SHA of its file", facts.show("tokens/manifest.json", "fingerprint", "tokenizer_sha256", form=cell))]
    for kind in ("chars_per_token", "bytes_per_token"):
        for name in facts.get(report, kind) or {}:
            rows.append((f"{kind.replace('_', ' ').replace('chars', 'characters')}, held-out "
                         + facts.name(report, kind, name), facts.show(report, kind, name, form=".3f")))
    return "\n".join([*lines, *(f"| {title} | {value} |" for title, value in rows)]) + """

The folder brings its tokenizer as one Python file, `tokenmonster_hf.py`, where it is a TokenMonster vocabulary.
"""


def data(facts: Facts) -> str:
    store = "tokens/manifest.json"
    names = list(facts.get(store, "sources") or {})
    lines = ["## Data", ""]
    if not names:
        return "\n".join([*lines, f"Tokens per source: {NOT_MEASURED}.", ""])
    recipe = facts.get("run.json", "recipe", "sources") or []
    at = {source.get("name"): i for i, source in enumerate(recipe)}
    lines += ["Cleaned, tokenised and packed without padding; counted in the token store. Held-out documents never enter "
              "training.", "",
              "| source | from | revision | documents | tokens | UTF-8 bytes | bytes per token | skipped | held out | weight |",
              "|---|---|---|---|---|---|---|---|---|---|"]
    for name in names:
        where = (store, "sources", name)
        weight = ("run.json", "recipe", "sources", at.get(name, len(recipe)))
        anneal = ("run.json", "recipe", "anneal_weights", at.get(name, len(recipe)))
        weights = facts.show(*weight, "weight", form="g")
        if facts.get(*anneal) is not None:
            weights += f", then {facts.show(*anneal, form='g')}"
        lines.append("| " + " | ".join([
            facts.name(*where), facts.show(*weight, "path", form=cell),
            facts.show(*where, "revision", form=cell) if facts.get(*where, "revision") else "none",
            facts.show(*where, "documents"), facts.show(*where, "tokens"), facts.show(*where, "bytes"),
            facts.derive(lambda size, tokens: size / tokens, ".3f", "bytes / tokens", (*where, "bytes"), (*where, "tokens")),
            facts.derive(lambda skipped: sum(skipped.values()), ",", "sum of skipped", (*where, "skipped")),
            facts.show(*where, "validation", "documents"), weights]) + " |")
    epoch = [i for i, row in enumerate(facts.read("metrics.jsonl") or []) if isinstance(row, dict) and "epoch" in row]
    lines += ["", f"Tokens seen in training: {facts.show('summary.json', 'tokens')}, which is "
              f"{facts.show('metrics.jsonl', epoch[-1] if epoch else 0, 'epoch', form='.2f')} times through the store."]
    if facts.get("run.json", "recipe", "anneal_weights"):
        lines.append(f"The second weight holds for the last {facts.show('run.json', 'recipe', 'anneal_fraction', form='.0%')} "
                     "of the tokens.")
    return "\n".join(lines) + "\n"


def training(facts: Facts) -> str:
    recipe, published = facts.get("run.json", "recipe"), own_recipe(facts)
    lines = ["## Training", ""]
    if not isinstance(recipe, dict):
        return "\n".join([*lines, f"Hyperparameters: {NOT_MEASURED}.", ""])
    try:
        card = ALL_RECIPES[published.removeprefix("published recipe ")]
        different = [name for name, _, _ in Recipe.from_dict(recipe).difference(card)]
    except (AttributeError, KeyError, ParameterError):       # an own recipe, or a run.json of another version of the suite
        published, different = None, []
    lines += ["What differs from the published recipe is in bold." if published else
              "There is no published recipe of this name to hold it against.", "",
              "| hyperparameter | this run | published |", "|---|---|---|"]
    for name in [field.name for field in dataclasses.fields(Recipe)] + [name for name in different if "." in name]:
        place = name.split(".")
        if place[0] not in recipe or name in ("name", "shape", "published", "unpublished"):
            continue
        columns = ["no published figure"] * 2
        for i, file in enumerate(filter(None, ("run.json", published))):
            path = place if file == published else ["recipe", *place]
            value = facts.read(file)
            for key in path:                          # not `show`: None is a value here, "none"
                value = value[key]
            value = [source["name"] for source in value] if name == "sources" else value
            columns[i] = facts.mark(plain(value), file, ".".join(path) + ".*.name" * (name == "sources"))
        if published and name in card.unpublished:
            columns[1] += " (not printed in the card)"
        title = ("shape." if place[0] == "shape" else "") + facts.name("run.json", "recipe", *place)
        lines.append(f"| {f'**{title}**' if name in different else title} | {' | '.join(columns)} |")
    lines += ["", f"Steps done: {facts.show('summary.json', 'step')} of {facts.show('summary.json', 'steps')}; "
              f"skipped for a gradient that was not finite: {facts.show('summary.json', 'skipped_steps')}."]
    return "\n".join(lines) + "\n"


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


def fenced(facts: Facts, text_of, *place) -> str:
    """A text from a file in a fence longer than any in it."""
    value = str(facts.get(*place))
    fence = "~" * max(3, 1 + max(map(len, re.findall("~+", value)), default=0))
    return f"{fence}text\n{facts.show(*place, form=text_of)}\n{fence}"


def samples(facts: Facts) -> str:
    file = "samples.json"
    lines = ["## Samples", ""]
    if not facts.get(file, "samples"):
        return "\n".join([*lines, f"Sampled outputs: {NOT_MEASURED}.", ""])
    settings = "; ".join(f"{facts.name(file, 'settings', key)} {facts.show(file, 'settings', key, form=plain)}"
                         for key in facts.get(file, "settings") or {})
    lines += [f"Not selected: one continuation of each prompt, from seed {facts.show(file, 'seed', form='d')} on. Settings: "
              f"{settings}.", ""]
    for i, _ in enumerate(facts.get(file, "samples")):
        lines += [f"**{facts.show(file, 'samples', i, 'prompt', form=cell)}** …", "",
                  fenced(facts, lambda text: str(text).strip() or "(nothing)", file, "samples", i, "text"), ""]
    return "\n".join(lines)


def limitations(facts: Facts) -> str:
    file = "limitations.json"

    def share(key):
        text, low, high = (facts.show(file, key, part, form=".1%") for part in ("share", "low", "high"))
        return text if text == NOT_MEASURED else f"{text} [{low}, {high}]"

    how = (f"{facts.show(file, 'n')} continuations of {facts.show(file, 'prompt_tokens')} held-out tokens, at most "
           f"{facts.show(file, 'max_new_tokens')} tokens, seed {facts.show(file, 'seed', form='d')}, the samples' settings; "
           "95% Wilson interval.") if facts.read(file) else f"Continuations of held-out text: {NOT_MEASURED}."
    refusal = facts.get("instruct/probe.json", "models") is not None
    over = "in the table of the instruct version" if refusal else f"{NOT_MEASURED}; a base model is not tuned to refuse"
    return f"""## Limitations, measured

{how}

| | |
|---|---|
| stops by itself | {share("stopped")} |
| repeats itself: over a third of its word triples occurred before | {share("repetitive")} |
| mean share of word triples that occurred before | {facts.show(file, "mean_repetition", form=".1%")} |
| has a replacement character (broken UTF-8) | {share("replacement")} |
| over-refusal | {over} |

Not measured at all: truthfulness, bias, safety of the base model. It was trained on documents that people wrote and repeats
what they hold. Do not rely on it for facts, advice or decisions.
"""


def cautions(facts: Facts, file: str) -> list[str]:
    """A paragraph for each score of benchmark/results.csv that contexts were cut for, or where
    choices tie."""
    lines = []
    for i, row in enumerate(facts.read(file)):
        where = " of ".join(facts.show(file, i, key, form=cell) for key in ("task", "model"))
        truncated, requests, ties, items = (facts.show(file, i, key, form=",.0f") if float(row.get(key) or 0) else ""
                                            for key in ("truncated", "requests", "ties", "n"))
        if truncated:
            lines += ["", f"{where}: {truncated} of {requests} requests were longer than the model and lost the left of their "
                      "context."]
        if ties:
            lines += ["", f"{where}: in {ties} of {items} items the best choices tie and share the point."]
    return lines


# Mean power draw that the energy estimate assumes where the caller names none, in watts for one
# device or core. cuda: board power limit of a T4 (NVIDIA T4 datasheet), so an upper bound; cpu:
# our guess. A v5e's is not published.
ASSUMED_WATTS = {"cuda": 70.0, "cpu": 10.0}


# Writing and checking.

def assumed_watts(facts: Facts) -> tuple[float | None, str]:
    """(mean power draw in watts to assume for the run's device, the assumption in words); None
    where there is no basis."""
    device, processes = str(facts.get("summary.json", "device") or ""), facts.get("summary.json", "processes") or 1
    cores = facts.get("environment.json", "cpu_count")
    if device.startswith("cuda"):
        return ASSUMED_WATTS["cuda"] * processes, (f"{ASSUMED_WATTS['cuda']:g} W for each of {processes} GPUs, the power limit "
                                                   "of a T4; the rest of the machine not counted")
    if device == "cpu" and cores:
        return ASSUMED_WATTS["cpu"] * cores, f"{ASSUMED_WATTS['cpu']:g} W for each of {cores} CPU cores, a guess"
    return None, "no figure for this device"


def resources(facts: Facts) -> str:
    summary, machine = "summary.json", "environment.json"
    energy = facts.derive(lambda watts, seconds: watts * seconds / 3_600_000, ".3g", "watts × seconds / 3,600,000",
                          ("model_card.json", "parameters", "watts"), (summary, "seconds"))
    assumption = facts.show("model_card.json", "parameters", "watts_are", form=cell)
    packages = ", ".join(f"{name} {facts.show(machine, 'packages', name, form=cell)}"
                         for name in ("torch", "transformers", "accelerate", "torch_xla")
                         if facts.get(machine, "packages", name))
    return f"""## Hardware, time, energy

| | |
|---|---|
| device | {facts.show(summary, "device", form=cell)} |
| processes | {facts.show(summary, "processes")} |
| GPUs in the machine | {facts.show(machine, "gpus")} |
| CPU | {facts.show(machine, "cpu", form=cell)} |
| CPU cores | {facts.show(machine, "cpu_count")} |
| Python | {facts.show(machine, "python", form=cell)} |
| packages | {packages or NOT_MEASURED} |
| training time | {facts.show(summary, "seconds", form=duration)} |
| tokens per second, median | {facts.show(summary, "tokens_per_second", form=",.0f")} |
| energy, estimated | {energy} kWh |

Energy = watts × seconds / 3,600,000, an estimate and no meter's reading: {facts.show(summary, "seconds", form=",.0f")} s at an
assumed mean of {facts.show("model_card.json", "parameters", "watts", form=",g")} W ({assumption}).
"""


def loading(facts: Facts) -> str:
    name = facts.show("model_card.json", "parameters", "repo_id", form=cell)
    penalty = facts.show("samples.json", "settings", "repetition_penalty", form="g")
    sampling = "do_sample=True" + (f", repetition_penalty={penalty}" if penalty != NOT_MEASURED else "")
    return f"""## How to load

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}", trust_remote_code=True)   # runs the folder's tokenmonster_hf.py
inputs = tokenizer("Once upon a time", return_tensors="pt")
output = model.generate(**inputs, {sampling})
print(tokenizer.decode(output.flatten().tolist()))
```

## Citation

```bibtex
@misc{{{facts.show("model_card.json", "parameters", "name", form=lambda name: re.sub("[^A-Za-z0-9]", "", name))},
  title = {{{facts.show("model_card.json", "parameters", "name", form=cell)}}},
  year  = {{{facts.show("model_card.json", "parameters", "written", form=lambda day: day[:4])}}},
  note  = {{Trained with the Stentor notebook suite after the recipe {facts.show("run.json", "recipe", "name", form=cell)}}}
}}
```

Card written {facts.show("model_card.json", "parameters", "written", form=cell)}.
"""


SECTIONS = (metadata, opening, results, instruct, curves, architecture, tokenizer, data, training, precision, samples,
            limitations, resources, loading)


def card_template(facts: Facts) -> str:
    """The card's text with a mark for each figure."""
    return "\n".join(section(facts) for section in SECTIONS)
