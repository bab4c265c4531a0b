"""The model card of a run, in which every number has a file; the check of that; publishing to the hub.

    write_model_card("outputs/demo")      final/README.md, and model_card.json: the file and the place of each number in it
    check_model_card("outputs/demo")      [], or what is wrong, one sentence each
    publish("outputs/demo", "me/demo")    a list of what would be uploaded; uploads only with dry_run=False

Card text is written with marks where values go. A mark remembers file, path and format; the values are filled in at the end.
So the check can do without trusting the card: it fills the marks again from the files as they are now, holds the numbers of
README.md against them one by one, and refuses any number that stands in our prose outside ALLOWED_PROSE.
"""
from __future__ import annotations

import csv
import dataclasses
import difflib
import hashlib
import json
import math
import os
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import stentor_utils as su
from stentor_data import secret_kinds, secret_values

NOT_MEASURED = "not measured"
MARK = re.compile(r"FIGUREx(\d+)x")                   # plain letters: YAML must not quote it
# A number and what is glued to it (4.9041, 240,001,024, 12M, v5e-8, 1e-05): any word with a digit in it.
NUMBER = re.compile(r"[\w+.,%-]*\d[\w+.,%-]*")
# The only numbers that our own prose may hold: confidence level, counts in formulas, names. Whole phrases, not digits.
ALLOWED_PROSE = ("95% interval", "95% Wilson interval", "apache-2.0", "2 × hidden", "3 × hidden", "× (2 ×", "+ 2 ×", "× 3 ×",
                 "× 2 ×", "FP32", "INT8", "/ 3,600,000", "UTF-8")
# Mean power draw that the energy estimate assumes where the caller names none, in watts for one device or core.
# cuda: board power limit of a T4 (NVIDIA T4 datasheet), so an upper bound; cpu: our guess. A v5e's is not published.
ASSUMED_WATTS = {"cuda": 70.0, "cpu": 10.0}


# ---------------------------------------------------------------------------------------------------------------------
# Values and where they come from.

@dataclass(frozen=True)
class Figure:
    """Something in the card that is not our prose: its text, the file it is from, and the place in it or the formula."""
    text: str
    file: str
    path: str


class Facts:
    """The files of a run folder, and the figures taken from them in the order in which they were asked for.

    `show`, `derive` and the others return a mark to write into the text, or "not measured".
    """

    def __init__(self, run_dir):
        self.folder, self.files, self.figures = Path(run_dir), {}, []

    def read(self, file: str):
        """The parsed .json, .jsonl (list of rows) or .csv (list of dicts of text); None where it is not there or broken."""
        if file not in self.files:
            path, content = self.folder / str(file), None
            try:
                if file is None:
                    pass
                elif file.startswith("published recipe "):       # not a file of the run: shown as published, see `show`
                    content = su.ALL_RECIPES[file.removeprefix("published recipe ")].to_dict()
                elif file.endswith(".csv"):
                    with open(path, newline="", encoding="utf-8") as opened:
                        content = list(csv.DictReader(opened))
                elif file.endswith(".jsonl"):
                    content = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
                else:
                    content = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError, KeyError):
                pass
            self.files[file] = content
        return self.files[file]

    def get(self, file: str, *path):
        """The value at `path` in `file`; None where it is not there, empty, or not a finite number."""
        value = self.read(file)
        for key in path:
            try:
                value = value[key]
            except (KeyError, IndexError, TypeError):
                return None
        return None if value == "" or (isinstance(value, float) and not math.isfinite(value)) else value

    def mark(self, text: str, file: str, path: str) -> str:
        self.figures.append(Figure(text, file, path))
        return f"FIGUREx{len(self.figures) - 1}x"

    def show(self, file: str, *path, form=",") -> str:
        """The value at `path`: a number by the format `form`, or through `form` where that is a function."""
        value = self.get(file, *path)
        text = None if value is None else write(value, form)
        return NOT_MEASURED if text is None else self.mark(text, file, ".".join(map(str, path)))

    def derive(self, compute, form, formula: str, *inputs) -> str:
        """compute(values of the inputs), each input a (file, *path); "not measured" when one of them is missing."""
        values = [self.get(*place) for place in inputs]
        text = None
        if None not in values:
            try:
                text = write(compute(*values), form)
            except (TypeError, ValueError, ZeroDivisionError, KeyError, AttributeError):
                pass                                  # a value that is there but makes no sense
        return NOT_MEASURED if text is None else self.mark(
            text, ", ".join(dict.fromkeys(place[0] for place in inputs)), formula)

    def name(self, file: str, *path) -> str:
        """The last key of `path` itself, such as the name of a source: names hold digits too."""
        return self.mark(cell(path[-1]), file, ".".join(map(str, path)) + " (its name)")


def write(value, form) -> str | None:
    """`value` as text; None where a number is wanted and it is none."""
    if callable(form):
        return form(value)
    try:
        value = float(value) if isinstance(value, str) else value
        return None if isinstance(value, bool) or not math.isfinite(value) else format(value, form)
    except (TypeError, ValueError):
        return None


def cell(value) -> str:
    """Any text as one line that cannot break out of a table cell."""
    return " ".join(str(value).split()).replace("|", "\\|").replace("<", "&lt;")


def plain(value) -> str:
    """A hyperparameter as one reads it: 4,000,000; 0.004; prose, code; none."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, (int, float)):
        return f"{value:,}" if isinstance(value, int) else f"{value:g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(plain(item) for item in value) or "none"
    return cell(value)


def fill(text: str, figures: list[Figure]) -> tuple[str, list[tuple[int, int, Figure]]]:
    """The text with its marks replaced, and (start, end, figure) of each in it."""
    pieces, spans, at, size = [], [], 0, 0
    for found in MARK.finditer(text):
        figure = figures[int(found.group(1))]
        pieces += [text[at:found.start()], figure.text]
        size += found.start() - at
        spans.append((size, size + len(figure.text), figure))
        size, at = size + len(figure.text), found.end()
    return "".join([*pieces, text[at:]]), spans


# ---------------------------------------------------------------------------------------------------------------------
# The card, section by section.

def own_recipe(facts: Facts) -> str | None:
    """The published recipe that the run's recipe comes from, as the name of a file of `Facts`; None for an own one."""
    name = str(facts.get("run.json", "recipe", "name") or "").removesuffix("-cpu")
    return f"published recipe {name}" if name in su.ALL_RECIPES else None


def benchmark_rows(facts: Facts) -> tuple[str | None, list[int]]:
    """(this model's name in benchmark/results.csv, the numbers of its rows)."""
    model = facts.get("benchmark/model_index.json", "model-index", 0, "name")
    rows = facts.read("benchmark/results.csv") or []
    return model, [i for i, row in enumerate(rows) if row.get("model") == model]


def yaml_text(value) -> str:
    """Any text as one quoted line of YAML. JSON is not it: its \\ud83d\\ude00 for an emoji is read as two broken halves."""
    import yaml
    return yaml.safe_dump(str(value), default_style='"', allow_unicode=True, width=math.inf).strip()


def metadata(facts: Facts) -> str:
    """The YAML head: huggingface_hub's ModelCardData with an EvalResult for every score; values are marks still."""
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


def cautions(facts: Facts, file: str) -> list[str]:
    """A paragraph for each score of benchmark/results.csv that contexts were cut for, or where choices tie."""
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
    """A row for each phase of the delivered recipe: losses from the phase's own metrics, the rest from the summary."""
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
        return facts.derive(lambda values: su.parameter_budget(su.Shape(**values))[key], ",", f"parameter_budget(shape)[{key}]",
                            place)

    def share(key):
        return facts.derive(lambda values: su.parameter_budget(su.Shape(**values))[key]
                            / su.count_parameters(su.Shape(**values)), ".1%", f"parameter_budget(shape)[{key}] / total", place)

    def kv():                                         # width of the keys: head dimension times heads
        return facts.derive(lambda s: s["hidden_size"] // s["num_attention_heads"] * s["num_key_value_heads"], ",",
                            "head_dim × num_key_value_heads", place)

    head = facts.derive(lambda s: s["hidden_size"] // s["num_attention_heads"], ",", "hidden_size / num_attention_heads", place)
    total = facts.derive(lambda values: su.count_parameters(su.Shape(**values)), ",", "sum of the parts", place)
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
        card = su.ALL_RECIPES[published.removeprefix("published recipe ")]
        different = [name for name, _, _ in su.Recipe.from_dict(recipe).difference(card)]
    except (AttributeError, KeyError, su.ParameterError):       # an own recipe, or a run.json of another version of the suite
        published, different = None, []
    lines += ["What differs from the published recipe is in bold." if published else
              "There is no published recipe of this name to hold it against.", "",
              "| hyperparameter | this run | published |", "|---|---|---|"]
    for name in [field.name for field in dataclasses.fields(su.Recipe)] + [name for name in different if "." in name]:
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
| training time | {facts.show(summary, "seconds", form=su.duration)} |
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


# ---------------------------------------------------------------------------------------------------------------------
# Limitations are measured, not claimed.

def repetition(text: str) -> float:
    """Share of the words' triples that occurred before in the same text, from 0 to 1; 0 below four words."""
    words = re.findall(r"\w+", text.lower())
    triples = list(zip(words, words[1:], words[2:]))
    return 1 - len(set(triples)) / len(triples) if len(triples) > 1 else 0.0


def held_out_starts(run_dir, count: int, length: int) -> list[list[int]]:
    """The first `length` token ids of up to `count` held-out documents, the sources in turn; [] without a token store."""
    import numpy as np
    try:
        run = Facts(run_dir).read("run.json")
        store = su.find_place(run_dir, run if isinstance(run, dict) and "store" in run else {"store": "tokens"}, "store")
        manifest = json.loads((store / "manifest.json").read_text())
        by_source = []
        for source in manifest["sources"].values():
            ids = np.fromfile(store / source["validation"]["file"], "<u2")
            documents = np.split(ids, np.flatnonzero(ids == manifest["eos_token_id"]) + 1)
            by_source.append([document[:length].tolist() for document in documents if len(document) > length])
    except (OSError, ValueError, KeyError):           # ParameterError is a ValueError
        return []
    return [starts[i] for i in range(count) for starts in by_source if i < len(starts)][:count]


def measure_limitations(run_dir, *, count: int = 32, prompt_tokens: int = 16, max_new_tokens: int = 80, seed: int = 42
                        ) -> dict | None:
    """Let final/ continue `count` held-out documents and write limitations.json: stopping, repetition, broken characters.

    Sampled with su.GENERATION, one continuation each, none left out; shares come with 95% Wilson intervals. Returns what it
    wrote; None, and no file, where there is no token store to take prompts from.
    """
    import torch
    from scipy.stats import binomtest
    run_dir = Path(run_dir)
    prompts = held_out_starts(run_dir, count, prompt_tokens)
    if not prompts:
        return None
    model = su.load_model(run_dir / "final").eval()
    tokenizer = su.load_tokenizer(run_dir / "final")
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    max_new_tokens = min(max_new_tokens, model.config.max_position_embeddings - prompt_tokens)
    torch.manual_seed(seed)
    ids = torch.tensor(prompts, device=model.device)                  # (count, prompt_tokens): all of one length, no padding
    with torch.inference_mode():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_length=prompt_tokens + max_new_tokens,
                             use_cache=True, pad_token_id=tokenizer.eos_token_id, **su.GENERATION)[:, prompt_tokens:].tolist()
    stopped = [tokenizer.eos_token_id in row for row in out]
    texts = [tokenizer.decode(row[:row.index(tokenizer.eos_token_id)] if end else row, skip_special_tokens=True)
             for row, end in zip(out, stopped)]
    repeated = [repetition(text) for text in texts]

    def share(hits):
        interval = binomtest(sum(hits), len(hits)).proportion_ci(method="wilson")
        return {"hits": sum(hits), "share": sum(hits) / len(hits), "low": interval.low, "high": interval.high}

    found = {"n": len(texts), "prompt_tokens": prompt_tokens, "max_new_tokens": max_new_tokens, "seed": seed,
             "settings": su.GENERATION, "stopped": share(stopped), "repetitive": share([value > 1 / 3 for value in repeated]),
             "mean_repetition": sum(repeated) / len(repeated), "replacement": share(["\ufffd" in text for text in texts]),
             "texts": texts}
    su.write_atomically(run_dir / "limitations.json", json.dumps(found, indent=1, ensure_ascii=False))
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Writing and checking.

def assumed_watts(facts: Facts) -> tuple[float | None, str]:
    """(mean power draw in watts to assume for the run's device, the assumption in words); None where there is no basis."""
    device, processes = str(facts.get("summary.json", "device") or ""), facts.get("summary.json", "processes") or 1
    cores = facts.get("environment.json", "cpu_count")
    if device.startswith("cuda"):
        return ASSUMED_WATTS["cuda"] * processes, (f"{ASSUMED_WATTS['cuda']:g} W for each of {processes} GPUs, the power limit "
                                                   "of a T4; the rest of the machine not counted")
    if device == "cpu" and cores:
        return ASSUMED_WATTS["cpu"] * cores, f"{ASSUMED_WATTS['cpu']:g} W for each of {cores} CPU cores, a guess"
    return None, "no figure for this device"


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def description_problems(run_dir) -> list[str]:
    """What in the files that describe a run is not of the run that its checkpoints hold, one sentence each."""
    run_dir = Path(run_dir)
    state, facts = su.newest_state(run_dir), Facts(run_dir)
    try:
        different = su.recipe_differences(su.Recipe.from_dict(facts.read("run.json")["recipe"]), run_dir)
    except (su.ParameterError, TypeError, KeyError, AttributeError):
        different = []                                # not there, or of another version of the suite: shown as not measured
    problems = [f"run.json is not of the run that was trained: {'; '.join(different)}. Launch the run with the checkpoint's "
                "values again (what is done is not done again)."] if different else []
    steps = facts.get("summary.json", "step"), state.get("step")
    if all(type(step) is int for step in steps) and steps[0] > steps[1]:
        problems.append(f"summary.json is of step {steps[0]:,}, the newest checkpoint of step {steps[1]:,}: another run has "
                        "begun.")
    trained = facts.get("tokens/manifest.json", "fingerprint", "tokenizer_sha256")
    for name in ("tokenizer", "final"):
        if trained and (run_dir / name / "tokenmonster.vocab").is_file():
            found = su.tokenizer_sha256(su.load_tokenizer(run_dir / name))
            if found != trained:
                problems.append(f"{name}/ holds the tokenizer {found[:12]}, the tokens were made by {trained[:12]} (sha256).")
    return problems


def write_model_card(run_dir, *, name: str | None = None, repo_id: str | None = None, watts: float | None = None,
                     license: str = "apache-2.0", language: str = "en") -> Path:
    """Write run_dir/final/README.md from the files of the run, and run_dir/model_card.json; returns the card's path.

    name: the model's name, by default the folder's. repo_id: what the loading example names, by default `name`. watts: mean
    power draw of the whole machine for the energy estimate; by default ASSUMED_WATTS for each GPU or CPU core.
    model_card.json holds these parameters, the SHA-256 of each file that was read, and where each figure is from.
    Raises ParameterError where there is no final/ to describe, or where the files are of another run than its checkpoints.
    """
    run_dir = Path(run_dir)
    if not (run_dir / "final" / "config.json").is_file():
        raise su.ParameterError([f"{run_dir} has no final/config.json: train a model there first (notebook 02 or 03)."])
    if problems := description_problems(run_dir):
        raise su.ParameterError(problems)
    assumed, basis = assumed_watts(Facts(run_dir))
    parameters = {"name": name or run_dir.resolve().name, "repo_id": repo_id or name or run_dir.resolve().name,
                  "watts": watts if watts is not None else assumed, "watts_are": "as given" if watts is not None else basis,
                  "license": license, "language": language, "written": time.strftime("%Y-%m-%d")}
    su.write_atomically(run_dir / "model_card.json", json.dumps({"parameters": parameters}, indent=1))
    facts = Facts(run_dir)
    text, _ = fill(card_template(facts), facts.figures)
    record = {"parameters": parameters, "inputs": inputs_of(facts),
              "figures": [dataclasses.asdict(figure) for figure in facts.figures]}
    su.write_atomically(run_dir / "model_card.json", json.dumps(record, indent=1, ensure_ascii=False))
    (run_dir / "final" / "charts").mkdir(exist_ok=True)
    for chart in CHARTS:
        (run_dir / "final" / "charts" / f"{chart}.png").unlink(missing_ok=True)        # of an earlier card
        if (run_dir / "charts" / f"{chart}.png").is_file():
            shutil.copy(run_dir / "charts" / f"{chart}.png", run_dir / "final" / "charts" / f"{chart}.png")
    su.write_atomically(run_dir / "final" / "README.md", text)
    return run_dir / "final" / "README.md"


def inputs_of(facts: Facts) -> dict[str, str]:
    """{file: SHA-256} of every file that the card was made from, and of the weights that it describes."""
    files = [file for file, content in facts.files.items() if content is not None and (facts.folder / file).is_file()]
    weights = [f"final/{path.name}" for path in sorted((facts.folder / "final").glob("*.safetensors"))]
    return {file: sha256(facts.folder / file) for file in [*sorted(files), *weights] if file != "model_card.json"}


def typed_numbers(template: str) -> list[str]:
    """Numbers in the card's own prose that ALLOWED_PROSE does not cover: figures with no file."""
    prose = MARK.sub("\0", template)
    for phrase in ALLOWED_PROSE:
        prose = prose.replace(phrase, "\0")
    return NUMBER.findall(prose)


def check_model_card(run_dir, *, allow: tuple[str, ...] = ()) -> list[str]:
    """What is wrong with run_dir/final/README.md, one sentence each; an empty list: every number has its file.

    The card is made again from the files as they are now, and its numbers are compared with those of README.md, in order.
    Also wrong: an input that changed or went since the card was written, a number that the suite's prose itself holds
    without a file, metadata that huggingface_hub cannot parse. allow: numbers that you typed into the card on purpose.
    """
    from huggingface_hub import ModelCard
    run_dir = Path(run_dir)
    try:
        text = (run_dir / "final" / "README.md").read_text(encoding="utf-8")
        record = json.loads((run_dir / "model_card.json").read_text(encoding="utf-8"))
        inputs, recorded = dict(record["inputs"]), list(record["figures"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"final/README.md or model_card.json cannot be read ({type(error).__name__}: {error}): write the card again."]
    problems = description_problems(run_dir)
    for file, digest in inputs.items():
        if not (run_dir / file).is_file():
            problems.append(f"{file} is gone since the card was written.")
        elif sha256(run_dir / file) != digest:
            problems.append(f"{file} has changed since the card was written.")
    facts = Facts(run_dir)
    template = card_template(facts)
    expected, spans = fill(template, facts.figures)
    problems += [f"{number} stands in the suite's own prose and no file accounts for it." for number in typed_numbers(template)]
    if [dataclasses.asdict(figure) for figure in facts.figures] != recorded:
        problems.append("model_card.json lists other figures than the files give now: write the card again.")

    found, wanted = list(NUMBER.finditer(text)), list(NUMBER.finditer(expected))

    def source(number):
        """Where the number of the re-made card is from."""
        return next((f"{figure.file}: {figure.path}" for start, end, figure in spans
                     if start < number.end() and number.start() < end), "the card's prose")

    def line(number):
        return text.count("\n", 0, number.start()) + 1

    matcher = difflib.SequenceMatcher(None, [n.group() for n in found], [n.group() for n in wanted], autojunk=False)
    for kind, a, b, c, d in matcher.get_opcodes():
        if kind == "equal":
            continue
        pairs = list(zip(found[a:b], wanted[c:d]))
        problems += [f"line {line(one)}: {one.group()} in the card, {other.group()} in {source(other)}."
                     for one, other in pairs if one.group() not in allow]
        problems += [f"line {line(one)}: {one.group()} is in the card, and no file accounts for it there."
                     for one in found[a + len(pairs):b] if one.group() not in allow]
        problems += [f"{other.group()} in {source(other)} is missing from the card." for other in wanted[c + len(pairs):d]]
    try:
        if not ModelCard(text).data.to_dict().get("license"):
            problems.append("the card's metadata names no license.")
    except Exception as error:                        # yaml's own errors, and huggingface_hub's, have no common base
        problems.append(f"huggingface_hub cannot parse the card's metadata: {str(error).splitlines()[0]}.")
    return problems


# ---------------------------------------------------------------------------------------------------------------------
# Publishing. Off unless called, a dry run unless told otherwise, private always.

# What a model folder is made of.
UPLOADED = {".safetensors", ".json", ".md", ".txt", ".model", ".vocab", ".py", ".jinja", ".png"}


def find_token() -> str | None:
    """The hub token from Kaggle's secrets (label HF_TOKEN) or the environment variable HF_TOKEN; None without either."""
    try:
        from kaggle_secrets import UserSecretsClient
        return UserSecretsClient().get_secret("HF_TOKEN")
    except Exception:                                 # not on Kaggle, or no such secret there: it raises various kinds
        return os.environ.get("HF_TOKEN") or None


def upload_plan(folder) -> tuple[list[Path], list[str]]:
    """(files to upload, what is left out and why): plain visible files of the kinds that a model folder is made of."""
    folder, files, left_out = Path(folder), [], []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            left_out.append(f"{name}: a link")
        elif path.is_file():
            hidden = any(part.startswith(".") for part in Path(name).parts)
            if hidden or path.suffix not in UPLOADED:
                left_out.append(f"{name}: " + ("hidden" if hidden else "no part of a model folder"))
            else:
                files.append(path)
    return files, left_out


def find_secrets(files, values: tuple[str, ...] = ()) -> list[str]:
    """"<file>: <kind of secret>" for everything in `files` that looks like a secret or holds one of `values`.

    Bytes are searched, weights included. Also looked for: `secret_values` of the environment. No value is ever returned.
    """
    known = {"the token itself": values,
             **{f"the value of ${name}": (value,) for name, value in secret_values().items() if len(value) >= 12}}
    found = []
    for path in files:
        content = Path(path).read_bytes()
        found += [f"{path.name}: {kind}" for kind in secret_kinds(content)]
        found += [f"{path.name}: {kind}" for kind, texts in known.items() if any(text.encode() in content for text in texts)]
    return found


def publish(run_dir, repo_id: str, *, dry_run: bool = True, allow: tuple[str, ...] = (), endpoint: str | None = None
            ) -> list[str]:
    """Upload run_dir/final to the private hub repository `repo_id`; with dry_run only say what would be uploaded.

    Returns the lines to show: every file with its size, what is left out, what is wrong. The token comes from `find_token`.
    Raises ParameterError, before any upload, for a number in the card with no file (see check_model_card for `allow`), for
    anything that looks like a secret, for a missing token, and for a repository that is public already.
    """
    folder = Path(run_dir) / "final"
    files, left_out = upload_plan(folder)
    token = find_token()
    problems = [f"the model card: {problem}" for problem in check_model_card(run_dir, allow=allow)]
    problems += [f"a secret would be uploaded: {found}." for found in find_secrets(files, (token,) if token else ())]
    total = sum(path.stat().st_size for path in files)
    lines = [f"{'would be uploaded' if dry_run else 'uploading'} to {repo_id} (private): {len(files)} files, {total:,} bytes"]
    lines += [f"  {path.relative_to(folder).as_posix()}  {path.stat().st_size:,}" for path in files]
    lines += [f"  left out: {name}" for name in left_out]
    if dry_run:
        return [*lines, *(f"wrong: {problem}" for problem in problems), "nothing was uploaded: a dry run"]
    if not token:
        problems.append("there is no token: add HF_TOKEN to Kaggle's secrets or to the environment.")
    if problems:
        raise su.ParameterError(problems)
    from huggingface_hub import CommitOperationAdd, HfApi
    api = HfApi(token=token, endpoint=endpoint)
    try:
        api.create_repo(repo_id, private=True, exist_ok=True)
        private = api.repo_info(repo_id).private
        if private:
            added = [CommitOperationAdd(path.relative_to(folder).as_posix(), path) for path in files]
            commit = api.create_commit(repo_id, added, commit_message="Model and card, uploaded by stentor_card.publish")
    except Exception as error:                        # huggingface_hub's own, and those of whichever HTTP library it has
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise su.ParameterError([f"{repo_id} could not be uploaded ({reason}); check that internet is on (Kaggle: Settings, "
                                 "Internet), that the token may write, and HF_HUB_OFFLINE."]) from error
    if not private:
        raise su.ParameterError([f"{repo_id} exists and is public: upload to a private one, look at it, then make it public."])
    return [*lines, f"done: {commit.commit_url}"]
