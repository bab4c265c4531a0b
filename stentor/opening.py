"""A notebook opens its run: everything is checked, nothing created, and what it needs comes back."""
from __future__ import annotations

import dataclasses
import inspect
import json
from pathlib import Path
from types import NoneType

from stentor.alone import build_tokenizer, builds_alone, find_model, offline_problem
from stentor.checkpoints import check_run, checkpoint_folders
from stentor.files import CheckpointError, ParameterError, write_atomically
from stentor.hub import is_hub_name
from stentor.kaggle import adopt, how_to_go_on, is_finished, room_problem, stop_here
from stentor.launch import launch
from stentor.parameters import (
    items, number, read_parameters, run_name, shown, split_names, string, writable_folder)
from stentor.published import ALL_RECIPES, card_recipe, find_recipe
from stentor.recipes import Recipe
from stentor.session import (
    absent_runs, any_run, find_outputs, find_profile, find_run, hours_left, session_end)
from stentor.tokenizer import NoTokenizer, fit_to_tokenizer, open_tokenizer, save_tokenizer

# Parameters that mean the same wherever they stand. What only one notebook has, or has otherwise,
# is in its SPEC.
RULES = {
    "PROFILE": ["auto", "t4", "tpu", "cpu"],
    "RECIPE": list(ALL_RECIPES),
    "RUN": run_name,
    "OUTPUTS": string(),
    "TOKENIZER": string(optional=True),
    "BASE": string(optional=True),
    "TOKEN_BUDGET": number(1, integer=True, optional=True),
    "LEARNING_RATE": number(1e-9, 1, optional=True),
    "SEED": number(0, 2**31 - 1, integer=True, optional=True),
    "WEIGHTS": items(number(0), optional=True, repeated=True),
    "ANNEAL_WEIGHTS": items(number(0), optional=True, repeated=True),
    "NUM_PROCESSES": number(1, 64, integer=True, optional=True),
    "TORCH_COMPILE": (bool, NoneType),
    "DEADLINE_HOURS": number(0.01, 1000, optional=True),
    "OVERRIDES": dict,
    "PROMPTS": items(string(empty=True), optional=True, repeated=True),
}
# Fields of a recipe that have a parameter of their own; all others come through OVERRIDES.
_FIELDS = ("TOKEN_BUDGET", "LEARNING_RATE", "SEED", "TORCH_COMPILE", "ANNEAL_WEIGHTS")
# What 03's rolling store keeps at most: of each of three sources 64 shards of 2^24 tokens ahead.
ROLLING_TOKENS = 3 * 64 * 2**24
_ELSEWHERE = {"tpu": "a TPU: 03_pretrain_tpu", "t4": "a GPU: 02_pretrain_t4"}


def rules(names: str, **own) -> dict:
    """A notebook's SPEC: the shared rules of the parameters named, and those that are its own."""
    return {**{name: RULES[name] for name in names.split()}, **own}


@dataclasses.dataclass
class OpenRun:
    """What `open_run` found; what a notebook has no parameter for is None."""
    profile: str | None = None                # "t4", "tpu" or "cpu"
    deadline: float | None = None             # of `session_end`: one for all that this session does
    outputs: Path | None = None
    names: list[str] | None = None            # of the runs: one, but where several are read
    dirs: list[Path] | None = None            # their folders
    base_dir: Path | None = None              # BASE, or the run's final/
    published: Recipe | None = None           # as the card has it
    recipe: Recipe | None = None              # as it will be trained, its tokenizer's size in it
    tokenizer_dir: Path | str | None = None   # where it is, or will be after `keep_tokenizer`
    tokenizer: object = None
    report: dict | None = None                # of a tokenizer that was built here, as 01's report.json

    @property
    def dir(self) -> Path:
        """The run's folder."""
        return self.dirs[0]

    def hours_left(self) -> float | None:
        """Hours until the deadline, for `launch`; None: no deadline."""
        return hours_left(self.deadline)

    def keep_tokenizer(self) -> None:
        """Another run's tokenizer, a released or a built one becomes this run's: a resume finds it."""
        if self.tokenizer_dir == self.dir / "tokenizer" and not self.tokenizer_dir.exists():
            save_tokenizer(self.tokenizer, self.tokenizer_dir)
            if self.report:
                path = self.tokenizer_dir / "report.json"
                write_atomically(path, json.dumps(self.report, indent=1))

    def train(self, store_dir, **how) -> dict:
        """`launch` this run (`how` is for it) to its end: summary.json's content.

        One that was stopped, by the deadline or by hand, ends the notebook in a sentence. A finished
        one whose checkpoints are not here any more, such as an attached one, is not trained again.
        """
        if is_finished(self.dir) and not checkpoint_folders(self.dir):
            return json.loads((self.dir / "summary.json").read_text())
        summary = launch(self.recipe, store_dir, self.tokenizer_dir, self.dir,
                         deadline_hours=self.hours_left(), **how)
        if summary["stopped"]:
            stop_here(how_to_go_on(summary))
        return summary


def open_run(namespace: dict, spec: dict, *checks, makes: str | None = "",
             published: str | None = None, without_runs: str | None = None) -> OpenRun:
    """Check a notebook's parameters and all that they name, before any work, creating nothing.

    On Kaggle one thing is done before that: what an attached input holds of this run, and this session
    does not have, is copied into its folder (`kaggle.adopt`), once the parameters themselves are right.

    namespace: `globals()`, right after the parameters cell.
    spec: {parameter: rule}, of `rules`. What is checked follows from the parameters that are in it.
        OUTPUTS and RUN say where the run is, BASE which model it begins from. RECIPE is found and
        scaled to the profile; where there is a TOKENIZER too the notebook trains, and the recipe gets
        the notebook's changes and a tokenizer that fits.
    checks: the notebook's own, generators of sentences. Their arguments are named like what they need,
        parameters or fields of OpenRun; one that needs what is wrong already is left out.
    makes: the folder inside the run that the notebook writes to; None: it reads runs, which must be
        there, and hardware and deadline are no matter.
    published: "hf:owner/name" that stands in for a model that nobody has trained or attached.
    without_runs: with makes=None; the RUN (the notebook's own default) for which names and dirs are
    empty where no run is found at all; any other that is not there is refused.

    A run that trains and has no tokenizer gets one: the released one, or, once nothing is wrong, one
    built from its text; nothing is written yet (`keep_tokenizer`).

    Raises ParameterError with every problem. Without any, `namespace` gets the values in their rules'
    types: whole numbers written as floats are made int.
    """
    again = any(isinstance(value, OpenRun) for value in namespace.values())   # has other names by now
    given, problems = read_parameters(namespace, spec, unknown=not again)
    run = OpenRun()
    if "PROFILE" in given and makes is not None:
        run.profile = find_profile(given["PROFILE"])
        run.deadline = session_end(given.get("DEADLINE_HOURS"), run.profile)
    if "OUTPUTS" in given and "RUN" in given:
        if not problems and "TOKENIZER" not in spec:
            for name in split_names(given["RUN"]):
                problems += _take_over(find_run(find_outputs(given["OUTPUTS"]), name),
                                       leave=("tokens", "checkpoints"))
        problems += _find_folders(run, given, makes, published)
        if problems and given["RUN"] == without_runs and not any_run(run.outputs, run.names):
            print(f"RUN = {shown(given['RUN'])}: there is no run in {run.outputs}, and none is "
                  "attached; what is published is taken alone.")
            problems.pop()                            # the last one says that it is not there
            run.names, run.dirs = [], []
    if "RECIPE" in given and run.profile:
        run.published = card_recipe(given["RECIPE"])
        run.recipe = find_recipe(given["RECIPE"], run.profile)
        if "TOKENIZER" in spec:
            problems += _prepare_training(run, given, spec)
    known = given | {name: value for name, value in vars(run).items() if value is not None}
    for check in checks:
        needs = inspect.signature(check).parameters
        if needs.keys() <= known.keys():
            problems += check(**{name: known[name] for name in needs})
    if problems:
        raise ParameterError(problems)
    if run.tokenizer_dir and run.tokenizer is None:
        _build_tokenizer(run)
    namespace.update(given)
    return run


def _build_tokenizer(run: OpenRun) -> None:
    print(f"TOKENIZER: there is no {run.tokenizer_dir}; one is built from the recipe's text, "
          "as 01_tokenizer does it.", flush=True)
    run.tokenizer, run.report = build_tokenizer(run.recipe, run.profile)
    run.recipe = fit_to_tokenizer(run.recipe, run.tokenizer)


def _find_folders(run: OpenRun, given: dict, makes: str | None, published) -> list[str]:
    """Where the run is; what is wrong with that, and with the model that it begins from."""
    run.outputs, run.names = find_outputs(given["OUTPUTS"]), split_names(given["RUN"])
    run.dirs = [find_run(run.outputs, name) for name in run.names]
    if makes is None:
        wrong = absent_runs(run.outputs, run.names)
        return [f"RUN = {shown(given['RUN'])} {wrong}."] if wrong else []
    wrong = writable_folder(run.dir / makes)
    problems = [f"OUTPUTS = {given['OUTPUTS']!r} {wrong}."] if wrong else []
    if "BASE" in given:
        try:
            run.base_dir = Path(find_model(run.dir, given["BASE"], published, what="BASE"))
        except ParameterError as error:
            problems += error.problems
    return problems


def _take_over(folder: Path, **what) -> list[str]:
    """`kaggle.adopt`; what is wrong with an attached run of this name."""
    try:
        adopt(folder, **what)
    except ParameterError as error:
        return error.problems
    except CheckpointError as error:
        return [str(error)]
    return []


def _prepare_training(run: OpenRun, given: dict, spec: dict) -> list[str]:
    """The recipe with the notebook's changes, and its tokenizer; what is wrong with them.

    That the run's folder is in use, or has checkpoints of another recipe, is found here too, and not
    after the tokens are made.
    """
    problems, changed = [], True
    if run.profile not in spec["PROFILE"]:
        problems.append(f"PROFILE = 'auto' found {_ELSEWHERE[run.profile]} is for it; "
                        "or set PROFILE = 'cpu'.")
    try:
        run.recipe = _changed_recipe(run.profile, given)
    except ParameterError as error:
        problems, changed = problems + error.problems, False
    if "TOKENIZER" not in given or not run.dirs:
        return problems
    if changed and not problems:
        problems += _take_over(run.dir, recipe=run.recipe)
    try:
        try:
            run.tokenizer_dir, run.tokenizer = open_tokenizer(given["TOKENIZER"], run.recipe, run.dir)
        except NoTokenizer:
            if not builds_alone(run.recipe):
                raise
            run.tokenizer_dir = run.dir / "tokenizer"              # built when all else is right
        if changed:
            if run.tokenizer:
                run.recipe = fit_to_tokenizer(run.recipe, run.tokenizer)
            problems += _surroundings(run, given)
            check_run(run.recipe, run.dir)
    except ParameterError as error:
        problems += error.problems
    except CheckpointError as error:
        problems.append(str(error))
    return problems


def _surroundings(run: OpenRun, given: dict) -> list[str]:
    """What is in the way of this recipe's work here: the hub out of reach, or too little room."""
    from_hub = [source.path for source in run.recipe.sources
                if source.weight > 0 and is_hub_name(source.path)]
    rolling = given.get("ROLLING", False)
    if rolling is None:
        rolling = run.profile == "tpu"
    wrong = [offline_problem(f"the text ({', '.join(from_hub)})") if from_hub else None,
             room_problem(run.recipe, run.dir, store_tokens=ROLLING_TOKENS if rolling else None)]
    return [sentence for sentence in wrong if sentence]


def _changed_recipe(profile: str, given: dict) -> Recipe:
    """The recipe with what the notebook's parameters change; ParameterError with all that is wrong."""
    chosen = {name.lower(): given[name] for name in _FIELDS if given.get(name) is not None}
    recipe = find_recipe(given["RECIPE"], profile, chosen | given.get("OVERRIDES", {}))
    if not (weights := given.get("WEIGHTS")):
        return recipe
    if len(weights) != len(recipe.sources):
        names = ", ".join(source.name for source in recipe.sources)
        raise ParameterError([f"WEIGHTS has {len(weights)} shares for the sources {names}."])
    sources = [dataclasses.replace(source, weight=weight)
               for source, weight in zip(recipe.sources, weights)]
    recipe = dataclasses.replace(recipe, sources=tuple(sources))
    if problems := recipe.problems():
        raise ParameterError(problems)
    return recipe
