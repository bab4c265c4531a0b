"""Writing a model card, and holding one against the files of its run.

The check can do without trusting the card: it fills the marks again from the files as they are
now, holds the numbers of README.md against them one by one, and refuses any number that stands in
our prose outside ALLOWED_PROSE.
"""
from __future__ import annotations

import dataclasses
import difflib
import json
import shutil
import time
from pathlib import Path

from stentor.card.facts import Facts, MARK, NUMBER, SUBJECTS, fill
from stentor.card.scores import CHARTS
from stentor.card.template import card_template
from stentor.card.footprint import ASSUMED_INTENSITY, assumed_watts
from stentor.checkpoints import newest_state, recipe_differences
from stentor.files import ParameterError, sha256, write_atomically
from stentor.recipes import Recipe
from stentor.tokenizer import load_tokenizer, tokenizer_sha256

# The only numbers that our own prose may hold: confidence level, counts in formulas, names. Whole
# phrases, not digits.
ALLOWED_PROSE = (
    "95% interval", "95% Wilson interval", "apache-2.0", "2 × hidden", "3 × hidden", "× (2 ×",
    "+ 2 ×", "× 3 ×", "× 2 ×", "FP32", "INT8", "/ 3,600,000", "UTF-8")


def write_model_card(run_dir, *, of: str = "final", name: str | None = None,
                     repo_id: str | None = None, base_model: str | None = None,
                     watts: float | None = None, grams_per_kwh: float | None = None,
                     authors: tuple[str, ...] = (), license: str = "apache-2.0",
                     language: str = "en") -> Path:
    """Write the card of a model of this run from the run's files, into its folder's README.md, and
    the record of it, model_card.json; returns the card's path.

    of: "final"; "instruct", what 04 made of it; "growth", what 07 made of it; "export", 08's
    files. name: the model's name, by default the folder's (and -instruct, ...). repo_id: what the
    loading example names, by default `name`. base_model: the hub name of what it was made from, for
    the metadata. watts: mean power draw of the whole machine for the energy estimate; by default
    ASSUMED_WATTS for each GPU or CPU core. grams_per_kwh: CO2e of the region's electricity; by
    default ASSUMED_INTENSITY. model_card.json holds these parameters, the SHA-256 of each file that
    was read, and where each figure is from. Raises ParameterError where there is no model to
    describe, or where the files are of another run than its checkpoints.
    """
    run_dir, facts = Path(run_dir), Facts(run_dir, of)
    if not (run_dir / facts.model / MADE_OF[of][0]).is_file():
        raise ParameterError([f"{run_dir} has no {facts.model}/{MADE_OF[of][0]}: "
                              f"{MADE_OF[of][1]}."])
    if problems := description_problems(run_dir):
        raise ParameterError(problems)
    name = name or run_dir.resolve().name + f"-{of}" * (of != "final")
    parameters = {"name": name, "repo_id": repo_id or name, "base_model": base_model,
                  **energy_parameters(facts, watts, grams_per_kwh), "authors": list(authors),
                  "license": license, "language": language, "written": time.strftime("%Y-%m-%d")}
    record = run_dir / facts.record
    write_atomically(record, json.dumps({"parameters": parameters}, indent=1))
    facts = Facts(run_dir, of)
    text, _ = fill(card_template(facts), facts.figures)
    content = {"parameters": parameters, "inputs": inputs_of(facts),
               "figures": [dataclasses.asdict(figure) for figure in facts.figures]}
    write_atomically(record, json.dumps(content, indent=1, ensure_ascii=False))
    copy_charts(facts)
    write_atomically(run_dir / facts.model / "README.md", text)
    return run_dir / facts.model / "README.md"


# What shows that there is a model to describe, and who makes it.
MADE_OF = {"final": ("config.json", "train a model there first (notebook 02 or 03)"),
           "instruct": ("config.json", "tune the model first (notebook 04)"),
           "growth": ("config.json", "grow the model first (notebook 07)"),
           "export": ("export.json", "export the model first (notebook 08)")}


def described_models(run_dir) -> list[str]:
    """Which models of this run a card can be written of, as `of` of write_model_card."""
    return [of for of, (file, _) in MADE_OF.items()
            if (Path(run_dir) / SUBJECTS[of][0] / file).is_file()]


def energy_parameters(facts: Facts, watts: float | None, grams: float | None) -> dict:
    """The assumptions of the energy estimate, each with its basis in words."""
    (assumed, basis), (usual, region) = assumed_watts(facts), ASSUMED_INTENSITY
    return {"watts": assumed if watts is None else watts,
            "watts_are": basis if watts is None else "as given",
            "grams_per_kwh": usual if grams is None else grams,
            "grams_are": region if grams is None else "as given"}


def copy_charts(facts: Facts) -> None:
    """06's charts that the card shows, beside it; those of an earlier card go."""
    if facts.of != "final":
        return
    shown = facts.folder / facts.model / "charts"
    shown.mkdir(exist_ok=True)
    for chart in (f"{chart}.png" for chart in CHARTS):
        (shown / chart).unlink(missing_ok=True)
        if (facts.folder / "charts" / chart).is_file():
            shutil.copy(facts.folder / "charts" / chart, shown / chart)


def inputs_of(facts: Facts) -> dict[str, str]:
    """{file: SHA-256} of every file that the card was made from, and of the weights that it
    describes."""
    files = [file for file, content in facts.files.items() if content is not None
             and file != facts.record and (facts.folder / file).is_file()]
    weights = sorted((facts.folder / facts.model).glob("*.safetensors"))
    return {file: sha256(facts.folder / file)
            for file in [*sorted(files), *(f"{facts.model}/{path.name}" for path in weights)]}


def check_model_card(run_dir, *, of: str = "final", allow: tuple[str, ...] = ()) -> list[str]:
    """What is wrong with the card of a model of this run (`of`: as in write_model_card), one
    sentence each; an empty list: every number has its file.

    The card is made again from the files as they are now, and its numbers are compared with those
    of README.md, in order. Also wrong: an input that changed or went since the card was written, a
    number that the suite's prose itself holds without a file, metadata that huggingface_hub cannot
    parse. allow: numbers that you typed into the card on purpose.
    """
    from huggingface_hub import ModelCard
    run_dir, facts = Path(run_dir), Facts(run_dir, of)
    try:
        text = (run_dir / facts.model / "README.md").read_text(encoding="utf-8")
        record = json.loads((run_dir / facts.record).read_text(encoding="utf-8"))
        inputs, recorded = dict(record["inputs"]), list(record["figures"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"{facts.model}/README.md or {facts.record} cannot be read "
                f"({type(error).__name__}: {error}): write the card again."]
    problems = description_problems(run_dir)
    for file, digest in inputs.items():
        if not (run_dir / file).is_file():
            problems.append(f"{file} is gone since the card was written.")
        elif sha256(run_dir / file) != digest:
            problems.append(f"{file} has changed since the card was written.")
    template = card_template(facts)
    problems += [f"{number} stands in the suite's own prose and no file accounts for it."
                 for number in typed_numbers(template)]
    if [dataclasses.asdict(figure) for figure in facts.figures] != recorded:
        problems.append(f"{facts.record} lists other figures than the files give now: write the "
                        "card again.")
    problems += number_problems(text, *fill(template, facts.figures), allow)
    try:
        if not ModelCard(text).data.to_dict().get("license"):
            problems.append("the card's metadata names no license.")
    except Exception as error:        # yaml's and huggingface_hub's errors have no common base
        problems.append("huggingface_hub cannot parse the card's metadata: "
                        f"{str(error).splitlines()[0]}.")
    return problems


def typed_numbers(template: str) -> list[str]:
    """Numbers in the card's own prose that ALLOWED_PROSE does not cover: figures with no file."""
    prose = MARK.sub("\0", template)
    for phrase in ALLOWED_PROSE:
        prose = prose.replace(phrase, "\0")
    return NUMBER.findall(prose)


def number_problems(text: str, expected: str, spans: list, allow: tuple[str, ...]) -> list[str]:
    """Where the numbers of `text` are not those of `expected`, in order; spans: see `fill`."""
    found, wanted = list(NUMBER.finditer(text)), list(NUMBER.finditer(expected))

    def source(number):
        """Where the number of the re-made card is from."""
        return next((f"{figure.file}: {figure.path}" for start, end, figure in spans
                     if start < number.end() and number.start() < end), "the card's prose")

    def line(number):
        return text.count("\n", 0, number.start()) + 1

    problems = []
    matcher = difflib.SequenceMatcher(
        None, [n.group() for n in found], [n.group() for n in wanted], autojunk=False)
    for kind, a, b, c, d in matcher.get_opcodes():
        if kind == "equal":
            continue
        pairs = list(zip(found[a:b], wanted[c:d]))
        problems += [f"line {line(one)}: {one.group()} in the card, {other.group()} in "
                     f"{source(other)}." for one, other in pairs if one.group() not in allow]
        problems += [f"line {line(one)}: {one.group()} is in the card, and no file accounts for it "
                     "there." for one in found[a + len(pairs):b] if one.group() not in allow]
        problems += [f"{other.group()} in {source(other)} is missing from the card."
                     for other in wanted[c + len(pairs):d]]
    return problems


def description_problems(run_dir) -> list[str]:
    """What in the files that describe a run is not of the run that its checkpoints hold, one
    sentence each."""
    run_dir = Path(run_dir)
    state, facts = newest_state(run_dir), Facts(run_dir)
    try:
        different = recipe_differences(Recipe.from_dict(facts.read("run.json")["recipe"]), run_dir)
    except (ParameterError, TypeError, KeyError, AttributeError):
        different = []                # not there, or of another version: shown as not measured
    problems = []
    if different:
        problems.append(f"run.json is not of the run that was trained: {'; '.join(different)}. "
                        "Launch the run with the checkpoint's values again (what is done is not "
                        "done again).")
    steps = facts.get("summary.json", "step"), state.get("step")
    if all(type(step) is int for step in steps) and steps[0] > steps[1]:
        problems.append(f"summary.json is of step {steps[0]:,}, the newest checkpoint of step "
                        f"{steps[1]:,}: another run has begun.")
    trained = facts.get("tokens/manifest.json", "fingerprint", "tokenizer_sha256")
    for name in ("tokenizer", "final"):
        if trained and (run_dir / name / "tokenmonster.vocab").is_file():
            found = tokenizer_sha256(load_tokenizer(run_dir / name))
            if found != trained:
                problems.append(f"{name}/ holds the tokenizer {found[:12]}, the tokens were made "
                                f"by {trained[:12]} (sha256).")
    return problems
