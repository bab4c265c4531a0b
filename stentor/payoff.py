"""Does growing pay? A small model, what it grows into, and the large one from scratch, over compute.

    python -m stentor_utils growth outputs/growth [-p SEEDS=42,43,44 SCRATCH_TOKENS=... ...]

Each seed trains four kinds of run on one token store, through the one loop:

    base     the small shape
    grown    from the base, its function preserved; at each of several shares of scratch's compute
    copied   from the base, the Stentor-Big card's way: blocks copied, the rest random
    scratch  the large shape from nothing, with all of the compute

The compute of grown and copied holds the base's. Each run's schedule ends with its budget, so a run
is judged by its end: along its way the rate is still high, and its curve lies above what a shorter
run would have reached.
"""
from __future__ import annotations

import dataclasses
import itertools
import json
import statistics
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stentor.files import ParameterError, write_atomically
from stentor.folders import load_model
from stentor.growth import grow_model, larger_shape
from stentor.launch import machine
from stentor.metrics import read_metrics
from stentor.model import build_model
from stentor.notebooks import read_value
from stentor.parameters import items, number, read_parameters
from stentor.preparing import prepare_tokens
from stentor.published import ALL_RECIPES
from stentor.recipes import Recipe, Source
from stentor.shapes import Shape, count_parameters, training_flops
from stentor.sources import clean_documents
from stentor.tokenizer import load_tokenizer, save_tokenizer, vocabulary_rows
from stentor.tokens import TokenStore
from stentor.train import train
from stentor.tuning import tuned_rates
from stentor.vocabulary import bpe_tokenizer, train_bpe

TOKENS = 150_000                                      # of a small trial: three seeds in half of 6 minutes
# A small model learns more of a little compute than a large one: with 400,000 tokens of scratch, bases of
# 10%, 27% and 48% of its compute made grown models at 60% of it end 0.20, 0.09 and less above it.
BASE_SHARE = 0.45
# The base's rate ended at 0. At half the recipe's rate the loss rose from 4.636 to 4.84 in 19 steps and was
# 4.750 after 95; at a quarter it ended at 4.684, at a tenth at 4.644 (one seed, 0.3M to 1.1M parameters).
RATE = 0.1
AIM = 0.6                                             # of scratch's compute: what growing should need


@dataclass(frozen=True)
class Trial:
    """What is compared. recipe: of every run but for shape, budget, seed and rate, so its optimiser,
    batch and data are all runs' own.

    base_tokens: of the base. scratch_tokens: of the large shape from scratch, which are the compute
    that all is measured by. shares: of that compute, for grown; 1.0 is copied's too. rate: factor of the
    recipe's rates for a model that goes on (grown and copied alike): the base's end was at rate 0.
    """
    recipe: Recipe
    base_tokens: int
    scratch_tokens: int
    shares: tuple[float, ...] = (AIM, 1.0)
    rate: float = RATE
    evaluations: int = 5
    large: Shape | None = None
    large_fields: dict | None = None                  # of the large shape's recipe, such as its rates

    @property
    def large_shape(self) -> Shape:
        return self.large or larger_shape(self.recipe.shape)

    def flops_per_token(self, kind: str) -> int:
        shape = self.recipe.shape if kind == "base" else self.large_shape
        return training_flops(shape, self.recipe.block_size)

    @property
    def base_flops(self) -> float:
        return self.base_tokens * self.flops_per_token("base")

    @property
    def scratch_flops(self) -> float:
        return self.scratch_tokens * self.flops_per_token("scratch")

    def runs(self) -> dict[str, tuple[str, float]]:
        """{name: (kind, tokens)} of one seed's runs, the base first."""
        def after_base(share):
            return (share * self.scratch_flops - self.base_flops) / self.flops_per_token("grown")
        grown = {f"grown {share:.0%}": ("grown", after_base(share)) for share in self.shares}
        return {"base": ("base", self.base_tokens), **grown,
                "copied": ("copied", after_base(1.0)), "scratch": ("scratch", self.scratch_tokens)}

    def recipe_of(self, name: str, seed: int) -> Recipe:
        """The recipe of one run. What goes on from the base draws its batches anew."""
        kind, tokens = self.runs()[name]
        recipe, goes_on = self.recipe, kind in ("grown", "copied")
        if kind != "base":
            recipe = dataclasses.replace(recipe, **self.large_fields or {})
        steps = max(1, round(tokens / recipe.tokens_per_step))
        every = max(1, steps // self.evaluations)
        rates = {rate: getattr(recipe, rate) * self.rate for rate in
                 ("learning_rate", "matrix_learning_rate") if goes_on and getattr(recipe, rate)}
        return dataclasses.replace(
            recipe, name=f"{recipe.name} {name}", seed=seed + 1000 * goes_on, **rates,
            shape=recipe.shape if kind == "base" else self.large_shape,
            token_budget=steps * recipe.tokens_per_step, max_train_steps=None,
            eval_steps=every, best_eval_steps=every, logging_steps=every)

    def problems(self) -> list[str]:
        """One sentence for each reason why this cannot be run."""
        least = self.base_flops / self.scratch_flops
        if wrong := [share for share in self.shares if not least < share]:
            return [f"shares: {wrong[0]:g} of scratch's compute leaves nothing after the base, which is "
                    f"{least:.0%} of it: lower base_tokens or raise scratch_tokens."]
        return []


def small_trial(recipe: Recipe, rows: int, *, base_tokens: int | None = None,
                scratch_tokens: int = TOKENS, **more) -> Trial:
    """A trial that a CPU does in minutes: what `recipe` is about, on prose, from 0.3M to 1.1M parameters.

    rows: of the tokenizer. base_tokens: None: BASE_SHARE of scratch's compute. more: other fields of
    Trial.
    """
    twin = recipe.scaled_to("cpu")
    shape = dataclasses.replace(
        twin.shape, vocab_size=rows, hidden_size=64, intermediate_size=192, num_hidden_layers=3,
        num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=True)
    twin = dataclasses.replace(
        twin, name="trial", shape=shape, sources=(Source("prose", "local:prose"),),
        anneal_weights=None, block_size=128, per_device_train_batch_size=4, max_eval_samples=12,
        save_every_minutes=1000, fp32_norms=False, fp32_critical_first=0, fp32_critical_last=0,
        fp32_softmax=False, int8_qat=False, attn_implementation="sdpa", torch_compile=False)
    if twin.optimizer == "muon":                      # each size at the rates that its shape asks for
        twin = dataclasses.replace(twin, **tuned_rates(shape))
        more = {"large_fields": tuned_rates(larger_shape(shape)), **more}
    trial = Trial(twin, 1, scratch_tokens, **more)
    affordable = BASE_SHARE * trial.scratch_flops / trial.base_flops
    return dataclasses.replace(trial, base_tokens=base_tokens or round(affordable))


def run_trial(trial: Trial, tokenizer, folder, seeds, say=print) -> dict:
    """Every run of every seed, in <folder>/<run>-<seed>/, and <folder>/payoff.json, which is returned.

    Runs that are done are kept, a killed one goes on. Writes the json after each seed.
    """
    if problems := trial.problems():
        raise ParameterError(problems)
    folder, found = Path(folder), {}
    store = trial_store(trial, tokenizer, folder)
    for seed in seeds:
        for name in trial.runs():
            found.setdefault(name, []).append(run_one(trial, name, seed, store, tokenizer, folder, say))
        result = {"machine": machine(), "recipe": trial.recipe.to_dict(), "seeds": list(seeds),
                  "parameters": {"base": count_parameters(trial.recipe.shape),
                                 "large": count_parameters(trial.large_shape)},
                  "base_flops": trial.base_flops, "scratch_flops": trial.scratch_flops,
                  "runs": found, "verdict": verdict(trial, found)}
        write_atomically(folder / "payoff.json", json.dumps(result, indent=1))
    return result


def trial_store(trial: Trial, tokenizer, folder) -> Path:
    """One token store for all runs, as long as the longest."""
    longest = max(tokens for _, tokens in trial.runs().values())
    recipe = trial.recipe
    weights = sum(source.weight for source in recipe.sources)
    wanted = {source.name: int(longest * source.weight / weights) + recipe.block_size
              for source in recipe.sources}
    return prepare_tokens(recipe.sources, tokenizer, Path(folder) / "tokens", tokens_per_source=wanted,
                          validation_documents=recipe.max_eval_samples)


def run_one(trial: Trial, name: str, seed: int, store_dir, tokenizer, folder, say) -> dict:
    """{"seed", "loss", "curve": [[tokens, loss], ...]} of one run; base-<seed> must be there for grown."""
    recipe, (kind, _) = trial.recipe_of(name, seed), trial.runs()[name]
    run_dir = Path(folder) / f"{name.replace(' ', '-').replace('%', '')}-{seed}"
    if kind in ("grown", "copied"):
        model = grow_model(load_model(Path(folder) / f"base-{seed}" / "final"), trial.large_shape,
                           function_preserving=kind == "grown", seed=seed)
    else:
        model = build_model(recipe.shape, seed, initialization=recipe.initialization,
                            attn_implementation=recipe.attn_implementation,
                            eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id)
    say(f"--- {name}, seed {seed}")
    # In this process: a dozen runs of a few seconds, which a process each would double.
    summary = train(recipe, TokenStore(store_dir, recipe), run_dir, tokenizer=tokenizer, model=model,
                    say=say)
    curve = [[row["tokens"], row["loss"]] for row in read_metrics(run_dir / "metrics.jsonl")
             if row["kind"] == "eval"]
    return {"seed": seed, "loss": summary["eval_loss"], "seconds": summary["seconds"], "curve": curve,
            "flops_per_token": trial.flops_per_token(kind), "before": trial.base_flops * (
                kind in ("grown", "copied"))}


def train_base(trial: Trial, tokenizer, folder, seed: int, say=print) -> Path:
    """The trial's base of one seed alone, as `run_trial` finds it again: the folder of the model."""
    run_one(trial, "base", seed, trial_store(trial, tokenizer, folder), tokenizer, folder, say)
    return Path(folder) / f"base-{seed}" / "final"


def verdict(trial: Trial, found: dict) -> dict:
    """What the runs say, and why.

    "pays": with AIM of scratch's compute, the base's counted, grown ended at or below scratch's loss in
    every seed; "ahead": with all of it. "gap": {run: [its loss - scratch's, a seed]}. "reached": {seed:
    share of scratch's compute, base counted, at which the longest grown curve first was at scratch's end, or
    None}, an upper bound: its rate is still high there; "reached_uncounted" the same without the base's.
    "caught_up": {seed: FLOPs at which scratch's curve first was not above grown's, or None}. "lead": [scratch's
    loss at the base's compute - the base's, a seed]. "base_gap": [the base's loss - scratch's, a seed]: what
    growing has to keep. "sentence": all that in words.
    """
    ends = [run["loss"] for run in found["scratch"]]
    gap = {name: [run["loss"] - end for run, end in zip(runs, ends)]
           for name, runs in found.items() if name not in ("base", "scratch")}
    longest = found[f"grown {max(trial.shares):.0%}"]
    flops = {long["seed"]: first_at(long, end) for long, end in zip(longest, ends)}
    said = {
        "pays": max(gap.get(f"grown {AIM:.0%}", [np.inf])) <= 0,
        "ahead": max(gap[f"grown {max(trial.shares):.0%}"]) <= 0, "gap": gap,
        "reached": {seed: None if at is None else (at + trial.base_flops) / trial.scratch_flops
                    for seed, at in flops.items()},
        "reached_uncounted": {seed: None if at is None else at / trial.scratch_flops
                              for seed, at in flops.items()},
        "caught_up": {end["seed"]: catches_up(end, long) for end, long in zip(found["scratch"], longest)},
        "lead": [loss_at(end, trial.base_flops) - base["loss"]
                 for base, end in zip(found["base"], found["scratch"])],
        "base_gap": [base["loss"] - end for base, end in zip(found["base"], ends)]}
    return said | {"sentence": sentence(trial, said)}


def sentence(trial: Trial, said: dict) -> str:
    """The verdict in words, with the figures that it is from."""
    aim, whole = f"grown {AIM:.0%}", f"grown {max(trial.shares):.0%}"
    if aim not in said["gap"]:
        return f"Not measured: no run had {AIM:.0%} of the compute."

    def ended(gaps):
        where = "below" if statistics.mean(gaps) <= 0 else "above"
        return (f"{abs(statistics.mean(gaps)):.3f} nats/token {where} it ({min(gaps):+.3f} to "
                f"{max(gaps):+.3f} over {len(gaps)} seed{'s' * (len(gaps) > 1)})")
    share, lead = trial.base_flops / trial.scratch_flops, statistics.mean(said["lead"])
    told = f"with {AIM:.0%} of from-scratch's compute, the base's {share:.0%} counted, grown ended {ended(said['gap'][aim])}"
    alone = f"the base alone ended {ended(said['base_gap'])}"
    if said["pays"]:
        return f"It pays here: {told}; {alone}, which growing had to keep."
    why = (f"the base's {share:.0%} bought a lead of {lead:.3f} over from-scratch at that point"
           if lead > 0 else f"at the base's {share:.0%} from-scratch was {-lead:.3f} better than the base")
    if not said["ahead"]:
        return f"It does not pay here: {told}, and with {max(trial.shares):.0%} of it {ended(said['gap'][whole])}; {why}."
    shares = {key: [value for value in said[key].values() if value is not None]
              for key in ("reached", "reached_uncounted")}
    first = (f"; its curve first was there at {max(shares['reached']):.0%} (not counting the base: "
             f"{max(shares['reached_uncounted']):.0%})" if shares["reached"] else "")
    return (f"It does not pay as much as hoped here: {told}; at equal compute {ended(said['gap'][whole])}{first}, because "
            f"{why}, which the steps that follow use up before {AIM:.0%}.")


def loss_at(run: dict, flops: float) -> float:
    """The loss of a run's curve at so many FLOPs of its own; a line between evaluations."""
    at = [tokens * run["flops_per_token"] for tokens, _ in run["curve"]]
    return float(np.interp(flops, at, [loss for _, loss in run["curve"]]))


def first_at(run: dict, loss: float) -> float | None:
    """FLOPs, without the base's, at which a run's curve first is at `loss`; a line between evaluations."""
    before = None
    for tokens, value in run["curve"]:
        flops = tokens * run["flops_per_token"]
        if value <= loss:
            if before is None:
                return flops
            part = (before[1] - loss) / (before[1] - value)
            return before[0] + part * (flops - before[0])
        before = flops, value
    return None


def catches_up(scratch: dict, grown: dict) -> float | None:
    """FLOPs, the base's counted, at which scratch's curve first is not above grown's; None: never."""
    last = grown["curve"][-1][0] * grown["flops_per_token"] * 1.02    # both end on whole steps
    for tokens, loss in scratch["curve"]:
        own = tokens * scratch["flops_per_token"] - grown["before"]
        if 0 <= own <= last and loss <= loss_at(grown, own):
            return own + grown["before"]
    return None


# The command.


def command(folder, given: dict[str, str]) -> str:
    """`python -m stentor_utils growth FOLDER -p NAME=VALUE ...`; returns the verdict.

    RECIPE (its optimiser and schedule), SEEDS, BASE_TOKENS, SCRATCH_TOKENS, RATE. Raises
    ParameterError with all that is wrong.
    """
    kinds = {"SEEDS": "list[int]", "BASE_TOKENS": "int", "SCRATCH_TOKENS": "int", "RATE": "float",
             "RECIPE": "str"}
    rules = {"SEEDS": items(number(0, 2**31 - 2000, integer=True)),    # + 1000 in recipe_of
             "RATE": number(1e-6, 100),
             "BASE_TOKENS": number(1, integer=True, optional=True), "SCRATCH_TOKENS": number(1, integer=True),
             "RECIPE": list(ALL_RECIPES)}
    values = {"SEEDS": [42, 43, 44], "BASE_TOKENS": None, "SCRATCH_TOKENS": TOKENS, "RATE": RATE,
              "RECIPE": "stentor-30m-tuned"}
    values |= {name: read_value(typed, kinds.get(name, "str"), False)
               for name, typed in given.items()}
    values, problems = read_parameters(values, rules, unknown=True)
    if problems:
        raise ParameterError(problems)
    trial, tokenizer = small_trial_of(
        values["RECIPE"], folder, values["SCRATCH_TOKENS"], values["BASE_TOKENS"], rate=values["RATE"])
    return run_trial(trial, tokenizer, folder, values["SEEDS"])["verdict"]["sentence"]


def small_trial_of(name: str, folder, scratch_tokens: int, base_tokens: int | None = None, **more):
    """(the `small_trial` of a recipe by its name, its tokenizer): a BPE in <folder>/tokenizer, trained
    on some prose if none is there. base_tokens: None: as `small_trial` has it."""
    keep_small_tokenizer(Path(folder) / "tokenizer")
    tokenizer = load_tokenizer(Path(folder) / "tokenizer")
    return small_trial(ALL_RECIPES[name], vocabulary_rows(tokenizer), scratch_tokens=scratch_tokens,
                       base_tokens=base_tokens, **more), tokenizer


def keep_small_tokenizer(folder, rows: int = 2048) -> None:
    """A BPE of `rows` tokens, trained on some prose, in `folder` if none is there."""
    if not Path(folder).exists():
        prose = clean_documents(Source("prose", "local:prose"))
        texts = list(itertools.islice((text for text, wrong, _ in prose if not wrong), 800))
        Path(folder).parent.mkdir(parents=True, exist_ok=True)
        save_tokenizer(bpe_tokenizer(train_bpe(texts, rows - 2)), folder)
