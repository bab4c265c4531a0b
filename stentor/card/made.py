"""The sections of cards of what was made from a model: the instruct version, the grown model, the
exported files."""
from __future__ import annotations

from pathlib import Path

from stentor.card.facts import Facts, NOT_MEASURED, cell, fenced, plain, row
from stentor.card.scores import delivered, interval, phases, probes

SFT, STAGES, PAYOFF = ("instruct/sft_summary.json", "growth/curriculum.json",
                       "growth/payoff.json")


def folder_name(path) -> str:
    """A path as a card may show it: where it lay on somebody's disk is nobody's business."""
    return cell(Path(path).name if Path(path).is_absolute() else path)


def title(facts: Facts) -> str:
    return f"# {facts.show(facts.record, 'parameters', 'name', form=cell)}\n"


def instruct_opening(facts: Facts) -> str:
    return f"""{title(facts)}
A chat version of the model in `{facts.show(SFT, "base", form=folder_name)}`: LoRA adapters of \
{facts.show(SFT, "trainable_parameters")} trainable parameters,
trained in phases on conversations and merged into {facts.show(SFT, "parameters")} parameters. \
{what_the_probe_found(facts)}

Every number below was filled in from a file of the run; `model_card.json` names the file and the \
place of each. What no file
holds stands as *{NOT_MEASURED}*.
"""


def what_the_probe_found(facts: Facts) -> str:
    """What the measured answers allow to be said of it as a chat model."""
    file = "instruct/probe.json"
    scores = facts.get(file, "models", delivered(facts), "scores") or {}
    suite = next((suite for suite in scores if suite.endswith("greedy")), None)
    if suite is None:
        return f"What it answers: {NOT_MEASURED}."
    place = (file, "models", delivered(facts), "scores", suite)
    helped, apart = (interval(facts, *place, key) for key in ("benign helped", "degenerate"))
    said = f"Of harmless questions it helped with {helped}; of all its answers {apart} came apart."
    if (facts.get(*place, "degenerate", "share") or 0) > 0.5:
        return said + " It is no assistant: most of what it answers is noise."
    return said + " Read the answers below before you call it an assistant."


def instruct_training(facts: Facts) -> str:
    names = {"deliver": "recipe", "seeds": "seeds", "examples": "examples", "held_out": "held out",
             "batch": "conversations in a step", "max_length": "tokens of a conversation",
             "rate": "learning rates times", "profile": "profile",
             "merge_error": "merged and adapter logits differ by"}
    lines = ["## Training", "", "| | |", "|---|---|"]
    lines += [row(title, facts.show(SFT, key, form=plain)) for key, title in names.items()]
    lines += ["", *phases(facts, SFT), *probes(facts, delivered(facts)), ""]
    for who in facts.get(SFT, "stopping") or {}:
        lines.append(f"Stops by itself, {facts.name(SFT, 'stopping', who)}: "
                     f"{interval(facts, SFT, 'stopping', who)}.\n")
    return "\n".join(lines)


def instruct_answers(facts: Facts, count: int = 4) -> str:
    """The first answers of the probe to harmless prompts, unselected."""
    place = ("instruct/probe.json", "models", delivered(facts), "answers")
    rows = facts.get(*place) or []
    lines = ["## Answers", ""]
    if not rows:
        return "\n".join([*lines, f"Answers: {NOT_MEASURED}.", ""])
    benign = [i for i, one in enumerate(rows)
              if (one.get("decoding"), one.get("kind")) == ("greedy", "benign")][:count]
    lines += ["Not selected: the first of the probe's harmless prompts, greedy. What it answers to "
              "harmful ones is counted above and stands in `probe.json`.", ""]
    for i in benign:
        lines += [f"**{facts.show(*place, i, 'prompt', form=cell)}** "
                  f"({facts.show(*place, i, 'label', form=cell)})", "",
                  fenced(facts, *place, i, "answer"), ""]
    return "\n".join(lines)


def chat(facts: Facts) -> str:
    system = facts.show(SFT, "system", form=cell)
    name = facts.show(facts.record, "parameters", "repo_id", form=cell)
    return f"""## How to load

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}", trust_remote_code=True)   # runs the folder's \
tokenmonster_hf.py
talk = [{{"role": "system", "content": SYSTEM}}, {{"role": "user", "content": "Hello"}}]
inputs = tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_dict=True, \
return_tensors="pt")
output = model.generate(**inputs, do_sample=True)
print(tokenizer.decode(output.flatten().tolist()))
```

`SYSTEM` in training: {system}
"""


def growth_opening(facts: Facts) -> str:
    stages = facts.get(STAGES, "summaries") or []
    last = max(0, len(stages) - 1)
    count = facts.show(STAGES, "summaries", last, "parameters")
    tokens = facts.derive(lambda rows: sum(one["tokens"] for one in rows), ",",
                          "sum of summaries.*.tokens", (STAGES, "summaries"))
    pays = facts.show(PAYOFF, "verdict", "sentence", form=cell)
    return f"""{title(facts)}
A language model of {count} parameters, made from a smaller trained one whose weights stand in a \
corner of its own, and
trained on {tokens} tokens more, in stages. Whether that paid, in a trial of its own: {pays}

Every number below was filled in from a file of the run; `model_card.json` names the file and the \
place of each. What no file
holds stands as *{NOT_MEASURED}*.
"""


def growth_stages(facts: Facts) -> str:
    lines = ["## Stages", ""]
    stages = facts.get(STAGES, "summaries") or []
    if not stages:
        return "\n".join([*lines, f"Stages: {NOT_MEASURED}.", ""])
    lines += ["| stage | text | tokens | steps | peak learning rate | loss | bits per byte |",
              "|---|---|---|---|---|---|---|"]
    for i, _ in enumerate(stages):
        def done(key, form=",", i=i):
            return facts.show(STAGES, "summaries", i, key, form=form)
        texts = facts.derive(lambda sources: plain([one["name"] for one in sources]), str,
                             f"stages.{i}.sources.*.name", (STAGES, "stages", i, "sources"))
        lines.append(row(facts.mark(str(i + 1), STAGES, f"summaries.{i} (its number)"), texts,
                         done("tokens"), done("steps"),
                         facts.show(STAGES, "stages", i, "learning_rate", form="g"),
                         done("eval_loss", ".4f"), done("bits_per_byte", ".4f")))
    return "\n".join([*lines, "", *forgotten(facts)]) + "\n"


def forgotten(facts: Facts) -> list[str]:
    """Bits per byte on the text of each stage, before the first and after each."""
    rows = facts.get(STAGES, "bits_per_byte") or []
    names = [name for name in (rows[0] if rows else {}) if name != "after"]
    if not names:
        return [f"What each stage forgot: {NOT_MEASURED}."]
    lines = ["Bits per byte on the held-out text of each stage; what rises after its own stage was "
             "forgotten.", "",
             row("after stage", *(facts.name(STAGES, "bits_per_byte", 0, name) for name in names)),
             row(*["---"] * (len(names) + 1))]
    for i, _ in enumerate(rows):
        lines.append(row(facts.show(STAGES, "bits_per_byte", i, "after", form="d"),
                         *(facts.show(STAGES, "bits_per_byte", i, name, form=".4f")
                           for name in names)))
    return lines


def master_test(facts: Facts) -> str:
    """What 07's master test counted, all categories together."""
    file, lines = "growth/master_test.json", ["## Master test", ""]
    rows = [i for i, one in enumerate(facts.get(file, "summary") or [])
            if one.get("category") == "all"]
    if not rows:
        return "\n".join([*lines, f"Master test: {NOT_MEASURED}.", ""])
    measures = [key for key, value in facts.get(file, "summary", rows[0]).items()
                if isinstance(value, dict)]
    lines += ["Sentence fragments continued, scored by rules that can be read; shares with "
              "95% Wilson interval.", "",
              row("model", *(facts.name(file, "summary", rows[0], key) for key in measures)),
              row(*["---"] * (len(measures) + 1))]
    lines += [row(facts.show(file, "summary", i, "model", form=cell),
                  *(interval(facts, file, "summary", i, key) for key in measures)) for i in rows]
    return "\n".join(lines) + "\n"


def export_opening(facts: Facts) -> str:
    return f"""{title(facts)}
Files of one model in other formats, made from `{facts.show("export/export.json", "source", form=cell)}` \
of its run. What a format costs is measured against
the model as it was trained, on the same text.

Every number below was filled in from a file of the run; `model_card.json` names the file and the \
place of each. What no file
holds stands as *{NOT_MEASURED}*.
"""


def formats(facts: Facts) -> str:
    """A row for each format of export.json, a column for each plain value that any of them has."""
    file, lines = "export/export.json", ["## Formats", ""]
    rows = [one for one in facts.get(file, "formats") or [] if isinstance(one, dict)]
    columns = list(dict.fromkeys(key for one in rows for key, value in one.items()
                                 if isinstance(value, (int, float, str))))
    if not columns:
        return "\n".join([*lines, f"Formats: {NOT_MEASURED}.", ""])
    names = (facts.mark(cell(key).replace("_", " "), file, f"formats.*.{key} (its name)")
             for key in columns)
    lines += [row(*names), row(*["---"] * len(columns))]
    lines += [row(*(facts.show(file, "formats", i, key, form=plain) for key in columns))
              for i, _ in enumerate(rows)]
    return "\n".join(lines) + "\n"
