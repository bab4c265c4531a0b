"""The sections of a model card that say how well the model does: losses, benchmarks, the instruct
version."""
from __future__ import annotations

import math

from stentor.card.facts import Facts, NOT_MEASURED, benchmark_rows, cell, plain, row

CHARTS = ("loss", "bits_per_byte", "benchmark", "blimp", "sft", "probe")   # of 06, on a card


def results(facts: Facts) -> str:
    summary, bigram = "summary.json", ("baseline.json", "byte_bigram_bits_per_byte")
    gain = facts.derive(lambda bigram, bits: bigram - bits, ".4f",
                        "byte_bigram_bits_per_byte - bits_per_byte",
                        bigram, (summary, "bits_per_byte"))
    place = ("run.json", "recipe", "validation_sources")
    which = "the training\nsources"
    if facts.get(*place):
        which = f"the source\n{facts.show(*place, form=plain)} alone"
    return f"""## Results

Measured on the saved weights, read back, over {facts.show(summary, "eval_tokens")} tokens of \
held-out documents of {which}. Loss and perplexity compare only under the same tokenizer; bits per byte compares across \
tokenizers.

| held-out text | |
|---|---|
| loss, nats per token | {facts.show(summary, "eval_loss", form=".4f")} |
| perplexity | {facts.show(summary, "perplexity", form=",.2f")} |
| bits per byte | {facts.show(summary, "bits_per_byte", form=".4f")} |
| bits per byte of a byte bigram model, same text | {facts.show(*bigram, form=".4f")} |
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
    lines = ["Brackets: 95% interval. A rank such as *first–last* is a range where paired tests "
             "cannot tell models apart.", "",
             "| task | metric | items | model | score | chance | rank |",
             "|---|---|---|---|---|---|---|"]
    file = "benchmark/results.csv"
    for i, found in enumerate(facts.read(file)):
        score, low, high = (facts.show(file, i, key, form=".4f")
                            for key in ("score", "low", "high"))
        lines.append(row(
            facts.show(file, i, "task", form=cell), facts.show(file, i, "metric", form=cell),
            facts.show(file, i, "n", form=",.0f") if found.get("n") else "",
            "**this model**" if found["model"] == model
            else facts.show(file, i, "model", form=cell),
            f"{score} [{low}, {high}]",
            facts.show(file, i, "chance", form=".4f") if found.get("chance")
            else "no chance level",
            facts.show(file, i, "rank", form=cell) if found.get("rank") else ""))
    lines += [*cautions(facts, file), "", contamination(facts), ""]
    return "\n".join([*lines, *pictures(facts, "benchmark", "blimp")])


def cautions(facts: Facts, file: str) -> list[str]:
    """A paragraph for each score of benchmark/results.csv that contexts were cut for, or where
    choices tie."""
    lines = []
    for i, found in enumerate(facts.read(file)):
        where = " of ".join(facts.show(file, i, key, form=cell) for key in ("task", "model"))
        truncated, requests, ties, items = (
            facts.show(file, i, key, form=",.0f") if float(found.get(key) or 0) else ""
            for key in ("truncated", "requests", "ties", "n"))
        if truncated:
            lines += ["", f"{where}: {truncated} of {requests} requests were longer than the model "
                      "and lost the left of their context."]
        if ties:
            lines += ["", f"{where}: in {ties} of {items} items the best choices tie and share the "
                      "point."]
    return lines


def contamination(facts: Facts) -> str:
    place = ("benchmark/contamination.json", "tasks")
    if not isinstance(facts.get(*place), dict):
        return f"Contamination of the training text by benchmark items: {NOT_MEASURED}."
    hits, checked, short, whole = (
        facts.derive(lambda tasks, key=key: sum(task[key] for task in tasks.values()), ",",
                     f"sum of tasks.*.{key}", place)
        for key in ("contaminated", "items_checked", "short_checked", "short_found"))
    rest = facts.derive(
        lambda tasks: sum(task["items"] - task["items_checked"] - task["short_checked"]
                          for task in tasks.values()),
        ",", "sum of tasks.*.items less items_checked and short_checked", place)
    words = facts.show(place[0], "ngram")
    return (f"Contamination: of {checked} items of {words} words or more, {hits} share {words} "
            f"words in a row with the training text; of {short} shorter ones, {whole} stand in it "
            f"whole; {rest} are too short to be checked.")


def instruct(facts: Facts) -> str:
    """The instruct version that 04 made of this model, where there is one."""
    file = "instruct/sft_summary.json"
    if facts.read(file) is None:
        return ("## Instruct version\n\n"
                f"None in this run: refusal and over-refusal {NOT_MEASURED}.\n")
    lines = ["## Instruct version", "",
             f"`instruct/final/`: LoRA of {facts.show(file, 'trainable_parameters')} trainable "
             f"parameters in phases, merged; recipe *{facts.show(file, 'deliver', form=cell)}*, "
             f"{facts.show(file, 'examples')} examples, {facts.show(file, 'held_out')} held out.",
             ""]
    lines += phases(facts, file) + probes(facts, delivered(facts))
    return "\n".join([*lines, "", *pictures(facts, "sft", "probe")])


def delivered(facts: Facts) -> str:
    """The name in probe.json of the model that 04 delivered: its recipe and seed."""
    file = "instruct/sft_summary.json"
    return f"{facts.get(file, 'deliver')}-{facts.get(file, 'seeds', 0)}"


def phases(facts: Facts, file: str) -> list[str]:
    """A row for each phase of the delivered recipe: losses from the phase's own metrics, the rest
    from the summary."""
    lines = ["| phase | examples | steps | loss before | loss after |", "|---|---|---|---|---|"]
    rows = facts.get(file, "phases") or []
    for number in range(1, 100):
        metrics = f"instruct/sft_metrics-{facts.get(file, 'deliver')}-phase{number}.jsonl"
        evaluated = [i for i, line in enumerate(facts.read(metrics) or [])
                     if line.get("kind") == "eval"]
        if not evaluated:
            break
        this = number, facts.get(metrics, evaluated[-1], "loss")
        at = next((i for i, phase in enumerate(rows)
                   if (phase.get("number"), phase.get("loss_after")) == this), len(rows))
        lines.append(row(
            facts.show(file, "phases", at, "phase", form=cell),
            *(facts.show(file, "phases", at, key) for key in ("examples", "steps")),
            *(facts.show(metrics, i, "loss", form=".4f") for i in (evaluated[0], evaluated[-1]))))
    return lines if len(lines) > 2 else []


def probes(facts: Facts, delivered: str) -> list[str]:
    """A table for each suite of the probe: shares of answers before and after."""
    file, lines = "instruct/probe.json", []
    models = facts.get(file, "models") or {}
    for suite, scores in (models.get(delivered) or {}).get("scores", {}).items():
        if not suite.endswith("greedy"):
            continue
        title = facts.name(file, "models", delivered, "scores", suite)
        lines += ["", f"Probe, {title}; share of answers and 95% Wilson interval:", "",
                  "| | before | after |", "|---|---|---|"]
        for key, score in scores.items():
            if key.startswith("card's") or not isinstance(score, dict):
                continue
            shares = [interval(facts, file, "models", who, "scores", suite, key)
                      for who in ("base", delivered)]
            lines.append(row(facts.name(file, "models", delivered, "scores", suite, key), *shares))
    return lines


def interval(facts: Facts, *place) -> str:
    """"12.0% [8.1%, 16.9%]" of the share, low and high that stand there."""
    share, low, high = (facts.show(*place, part, form=".1%") for part in ("share", "low", "high"))
    return share if share == NOT_MEASURED else f"{share} [{low}, {high}]"


def curves(facts: Facts) -> str:
    rows = facts.read("metrics.jsonl") or []
    evaluated = [i for i, found in enumerate(rows)
                 if isinstance(found, dict) and found.get("kind") == "eval"]
    if len(evaluated) > 12:           # evenly over the run, the last and the best among them
        best = min(evaluated, key=lambda i: rows[i].get("loss", math.inf))
        evaluated = sorted({*evaluated[::-(-len(evaluated) // 10)], best, evaluated[-1]})
    lines = ["## Curves", "", *pictures(facts, "loss", "bits_per_byte")]
    if not evaluated:
        return "\n".join([*lines, f"Evaluations during training: {NOT_MEASURED}.", ""])
    lines += ["| step | tokens | loss | perplexity | bits per byte |", "|---|---|---|---|---|"]
    forms = {"step": ",", "tokens": ",", "loss": ".4f", "perplexity": ",.2f",
             "bits_per_byte": ".4f"}
    lines += [row(*(facts.show("metrics.jsonl", i, key, form=form)
                    for key, form in forms.items())) for i in evaluated]
    return "\n".join(lines) + "\n"


def pictures(facts: Facts, *names: str) -> list[str]:
    """Lines that show those of the charts that 06 drew."""
    return [line for name in names if (facts.folder / "charts" / f"{name}.png").is_file()
            for line in (f"![{name.replace('_', ' ')}](charts/{name}.png)", "")]
