"""Tokens and time until the loss that the card's recipe ends with: the card's way against ours.

    make speedrun                                     # everything; hours on two cores
    python tests/benchmarks/speedrun.py --parts target --seeds 42 43 44 45 46
    python tests/benchmarks/speedrun.py --parts nanochat --nanochat CHECKOUT

Model, rows and machine are the same for all. The target of a seed is the evaluation loss of the card's recipe in our loop
at the end of its budget. A run that decays to zero cannot be read before its end, so ours is trained anew for shares of
the card's tokens, each laid out for its own budget; which shares is found by bisection over --shares, and between the two
neighbours of the target log(tokens) is interpolated. Time is that of a whole process, imports, compilation and the saved
model included, at the same place between the same two runs; contestants alternate, and each seed turns their order round.

Parts, each in its turn:
    target, own-rate    the card's recipe, at the card's rate and at the twin's own, and ours up to its loss
    trainer, trainer-bf16   the card's recipe in transformers.Trainer, in FP32, its default, and in bf16
    seeds, fp32         ours at the tokens of `make run`, and in FP32, as on a CPU without bf16 units
    ablation, tried     each ingredient of ours taken away alone; what might pay, added alone (at --ablation-share)
    widths, rates       the target at other widths, rates by the rule; the rule itself: half and double of each rate at
                        --widths, to which a power is fitted, and at --test-width, to which it is not
    nanochat            its own model and optimiser, from a checkout
A loss is the same on a busy machine, a time is not: with --loss-only no time is kept, and two calls with parts of their own
may run beside each other. Every run is kept in outputs/speedrun/runs/, so a call goes on where the last one stopped; a run
without its time is not timed later, until its file is deleted. Writes outputs/speedrun.json, outputs/speedrun/ratio.png and
outputs/benchmarks/speedrun.md (which `make results` shows).
"""
import argparse
import dataclasses
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import stentor_utils as su  # noqa: E402
from speedrun_figures import bisected, draw, markdown, summarised  # noqa: E402
from stentor.launch import machine  # noqa: E402
from stentor.notebooks import run_notebooks  # noqa: E402
from stentor.tuning import tuned_rates  # noqa: E402

CARD, OURS = "stentor2-12m", "stentor2-12m-tuned-qk"
SHARES = (0.08, 0.1, 0.125, 0.15, 0.18, 0.22, 0.26, 0.3, 0.35, 0.42, 0.5, 0.7, 1.0)    # of the card's tokens
PARTS = ("target", "own-rate", "seeds", "fp32", "trainer", "trainer-bf16", "ablation", "tried", "widths", "rates", "nanochat")
NEVER = 2**31                                         # steps: no evaluation but the first and the last
FIGURES = ("parameters", "matrix_parameters", "tokens", "eval_loss", "bits_per_byte", "train_seconds")


# The recipes.


def with_budget(recipe, tokens: int, seed: int):
    return dataclasses.replace(recipe, token_budget=tokens, seed=seed, eval_steps=NEVER, best_eval_steps=NEVER)


def of_width(recipe, width: int, layers: int | None):
    """The same with another hidden_size: heads as wide as they were, rates of a tuned one by its rule."""
    shape = recipe.shape
    heads = max(1, width // shape.head_dim)
    shape = dataclasses.replace(shape, hidden_size=width, intermediate_size=3 * width, num_attention_heads=heads,
                                num_key_value_heads=heads, num_hidden_layers=layers or shape.num_hidden_layers)
    rates = tuned_rates(shape) if recipe.optimizer == "muon" else {}
    return dataclasses.replace(recipe, shape=shape, **rates)


def card_recipe(tokens: int, seed: int, width: int, layers: int | None = None, own_rate: bool = False):
    """The card's optimiser, rate and schedule (laid out for 2.6 times the tokens that were trained) on the CPU twin.

    own_rate: 4e-3 and a schedule of the budget's length instead, as the twin without Muon has it.
    """
    published = su.RECIPES[CARD]
    recipe = with_budget(of_width(published.scaled_to("cpu"), width, layers), tokens, seed)
    if own_rate:
        return recipe
    planned = math.ceil(recipe.total_steps * published.schedule_steps / published.total_steps)
    return dataclasses.replace(recipe, learning_rate=published.learning_rate, max_train_steps=planned)


def our_recipe(tokens: int, seed: int, width: int, layers: int | None = None):
    return with_budget(of_width(su.find_recipe(OURS, "cpu"), width, layers), tokens, seed)


def without_one() -> dict[str, dict]:
    """{ingredient: the fields that take it away}; what ours does not have is not in it."""
    ours, card = (su.find_recipe(name, "cpu") for name in (OURS, CARD))
    away = {
        "Muon": {"optimizer": None, "matrix_learning_rate": None},
        "straight decay to zero": {"lr_scheduler_type": "cosine"},
        "residual-scaled projections": {"initialization": "normal"},
        "QK-norm": {"shape": dataclasses.replace(ours.shape, qk_norm=False)},
        "smaller batch": {"per_device_train_batch_size": card.per_device_train_batch_size},
        "momentum of the twin (0.95, Muon's default)": {"muon_momentum": 0.95},
        "no FP32 techniques": {name: getattr(card, name) for name in
                               ("fp32_norms", "fp32_critical_first", "fp32_critical_last", "fp32_softmax")},
        "torch_compile": {"torch_compile": False, "attn_implementation": "sdpa"}}
    return {name: fields for name, fields in away.items() if dataclasses.replace(ours, **fields) != ours}


def tried() -> dict[str, dict]:
    """{what might pay beside ours: its fields}: what did not is in the table with its figure."""
    ours = su.find_recipe(OURS, "cpu")
    return {
        "zero projections": {"initialization": "zero_projections"},
        "average of the weights, 0.99": {"ema_decay": 0.99},
        "no weight decay": {"weight_decay": 0.0},
        "ten times the weight decay": {"weight_decay": 0.1},
        "warm-up of 1%": {"warmup_ratio": 0.01},
        "constant rate, then a decay over 40%": {"lr_scheduler_type": "warmup_stable_decay", "stable_ratio": 0.55},
        "half the batch": {"per_device_train_batch_size": ours.per_device_train_batch_size // 2},
        "Muon at half the rate": {"matrix_learning_rate": (ours.matrix_learning_rate or 0) / 2},
        "Muon at twice the rate": {"matrix_learning_rate": 2 * (ours.matrix_learning_rate or 0)},
        "AdamW at half the rate": {"learning_rate": ours.learning_rate / 2},
        "AdamW at twice the rate": {"learning_rate": 2 * ours.learning_rate}}


# The runs.


class Speedrun:
    """The folder of a speedrun: tokenizer, token store, and every run with its result."""

    def __init__(self, given):
        self.given, self.folder = given, given.out / "speedrun"
        self.tokenizer = given.tokenizer or self.folder / "tokenizer"
        if not self.tokenizer.is_dir():
            run_notebooks(["01_tokenizer"], {"PROFILE": "cpu", "OUTPUTS": str(given.out), "RUN": "speedrun", "RECIPE": OURS})
        recipe = our_recipe(given.tokens, given.seeds[0], given.width, given.layers)
        tokenizer = su.load_tokenizer(self.tokenizer)
        self.store = given.store or su.prepare_tokens(
            recipe.sources, tokenizer, self.folder / "tokens", validation_documents=recipe.max_eval_samples,
            tokens_per_source={source.name: max(given.tokens, given.seed_tokens) for source in recipe.sources})

    def path(self, who: str, recipe) -> Path:
        name = "".join(character if character.isalnum() else "-" for character in who)
        return (self.folder / "runs"
                / f"{name}-w{recipe.shape.hidden_size}-{recipe.token_budget}-s{recipe.seed}.json")

    def run(self, who: str, recipe, **job) -> dict:
        """The result of this run, from its file where the same recipe is in it, else by running it."""
        path, told = self.path(who, recipe), json.loads(json.dumps(recipe.to_dict()))
        if path.exists() and (kept := json.loads(path.read_text()))["recipe"] == told:
            return kept
        print(f"{who}, width {recipe.shape.hidden_size}, {recipe.token_budget:,} tokens, seed {recipe.seed}", flush=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        load, began = os.getloadavg()[0], time.monotonic()
        result = self.other(who, recipe, path, job) if job else self.our_loop(recipe, path)
        figures = {key: result[key] for key in FIGURES if key in result}
        found = {"who": who, "width": recipe.shape.hidden_size, "budget": recipe.token_budget, "seed": recipe.seed, **figures,
                 "learning_rate": recipe.learning_rate, "matrix_learning_rate": recipe.matrix_learning_rate,
                 "seconds": None if self.given.loss_only else time.monotonic() - began, "load_before": load, "recipe": told}
        su.write_atomically(path, json.dumps(found, indent=1))
        took = f", {found['seconds']:.0f} s" if found["seconds"] else ""
        print(f"  loss {found['eval_loss']:.4f}, {found['bits_per_byte']:.4f} bits per byte{took}", flush=True)
        return found

    def our_loop(self, recipe, path: Path) -> dict:
        summary = su.launch(recipe, self.store, self.tokenizer, path.with_suffix(""), say=lambda line: None)
        return summary | {"train_seconds": summary["seconds"]}

    def other(self, who: str, recipe, path: Path, job: dict) -> dict:
        """A contestant that is not ours, in a process of its own as its user starts it."""
        work = path.with_suffix(".job")
        su.write_atomically(work, json.dumps(job | {"recipe": recipe.to_dict(), "store": str(self.store),
                                                    "result": str(path.with_suffix(".result"))}))
        command = [sys.executable, str(Path(__file__).with_name("speedrun_contestants.py")), who.split("-")[0], str(work)]
        env = {**os.environ, "TOKENIZERS_PARALLELISM": "false", **job.get("env", {})}
        subprocess.run(command, env=env, check=True, stdout=subprocess.DEVNULL)
        return json.loads(path.with_suffix(".result").read_text())

    def ours(self, tokens: int, seed: int, width: int | None = None):
        return our_recipe(tokens, seed, width or self.given.width, self.given.layers)

    # The parts.

    def target(self, seed: int, width: int, own_rate: bool = False) -> None:
        tokens, layers = self.given.tokens, self.given.layers
        card = self.run("card-own-rate" if own_rate else "card", card_recipe(tokens, seed, width, layers, own_rate))
        budgets = [int(tokens * share) for share in self.given.shares]
        bisected(lambda n: self.run("ours", self.ours(n, seed, width))["eval_loss"], budgets, card["eval_loss"])

    def own_rate(self, seed: int) -> None:
        self.target(seed, self.given.width, own_rate=True)

    def seeds(self, seed: int) -> None:
        """What `make run` trains."""
        self.run("ours", self.ours(self.given.seed_tokens, seed))

    def fp32(self, seed: int) -> None:
        """The same where no bf16 is: Muon's products are then in FP32 too."""
        recipe = self.ours(self.given.seed_tokens, seed)
        self.run("ours in FP32", dataclasses.replace(recipe, mixed_precision="no"))

    def trainer(self, seed: int, mixed: bool = False) -> None:
        recipe = card_recipe(self.given.tokens, seed, self.given.width, self.given.layers)
        self.run("trainer-bf16" if mixed else "trainer", recipe, mixed=mixed)

    def changed(self, seed: int, kind: str, changes: dict[str, dict]) -> None:
        """Ours and each change to it alone; kind: "without" or "with"."""
        ours = self.ours(int(self.given.ablation_share * self.given.tokens), seed)
        self.run("ours", ours)
        for name, fields in changes.items():
            self.run(f"{kind} {name}", dataclasses.replace(ours, **fields))
            self.report()

    def rates(self, seed: int, width: int) -> None:
        """Ours at a width with the rule's rates, and with half and double of each."""
        ours = self.ours(self.given.rate_tokens, seed, width)
        self.run("ours", ours)
        for name in ("matrix_learning_rate", "learning_rate"):
            for factor in (0.5, 2):
                self.run(f"{name} x {factor:g}", dataclasses.replace(ours, **{name: factor * getattr(ours, name)}))

    def nanochat(self, seed: int) -> None:
        recipe = self.ours(self.given.tokens, seed)
        self.run("ours", recipe)
        self.run("nanochat", recipe, checkout=str(self.given.nanochat), rates=self.given.nanochat_rates,
                 env={"NANOCHAT_DTYPE": {"bf16": "bfloat16"}.get(recipe.mixed_precision, "float32")})

    def everything(self) -> None:
        """The parts that were asked for; the report is written after each step of them."""
        given = self.given
        of_seed = {"target": lambda seed: self.target(seed, given.width), "own-rate": self.own_rate,
                   "seeds": self.seeds, "fp32": self.fp32, "trainer": self.trainer,
                   "trainer-bf16": lambda seed: self.trainer(seed, mixed=True)}
        for i, seed in enumerate(given.seeds):
            for part in [part for part in of_seed if part in given.parts][::-1 if i % 2 else 1]:
                of_seed[part](seed)
                self.report()
        for seed in given.seeds[:given.ablation_seeds]:
            for part, kind, changes in (("ablation", "without", without_one()), ("tried", "with", tried())):
                if part in given.parts:
                    self.changed(seed, kind, changes)
        for width in given.widths if "widths" in given.parts else ():
            for seed in given.seeds[:given.width_seeds]:
                self.target(seed, width)
                self.report()
        for width in sorted({*given.widths, given.test_width}) if "rates" in given.parts else ():
            for seed in given.seeds[:given.width_seeds]:
                self.rates(seed, width)
                self.report()
        for seed in given.seeds[:given.width_seeds] if "nanochat" in given.parts and given.nanochat else ():
            self.nanochat(seed)
            self.report()

    def report(self) -> None:
        runs = [json.loads(path.read_text()) for path in sorted((self.folder / "runs").glob("*.json"))]
        report = {"machine": machine(),
                  "tokens": self.given.tokens, "seed_tokens": self.given.seed_tokens, "width": self.given.width,
                  **summarised(runs, self.given.tokens, self.given.test_width),
                  "runs": [{key: value for key, value in run.items() if key != "recipe"} for run in runs]}
        su.write_atomically(self.given.out / "speedrun.json", json.dumps(report, indent=1))
        (self.given.out / "benchmarks").mkdir(exist_ok=True)
        su.write_atomically(self.given.out / "benchmarks" / "speedrun.md", markdown(report))
        if len(report["ratios"]) > 1:
            draw(report["ratios"]).savefig(self.folder / "ratio.png", dpi=120)


def read_command_line(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44, 45, 46])
    parser.add_argument("--tokens", type=int, default=4_000_000, help="the card recipe's budget")
    parser.add_argument("--seed-tokens", type=int, default=su.find_recipe(OURS, "cpu").token_budget, help="of `seeds`")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, help="other than the twin's; give it an --out of its own. 256 x 12: about 12M")
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES, help="of --tokens, ascending: budgets of ours")
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 192])
    parser.add_argument("--width-seeds", type=int, default=2)
    parser.add_argument("--test-width", type=int, default=256, help="of `rates`: the one that the power is not fitted to")
    parser.add_argument("--rate-tokens", type=int, default=1_000_000)
    parser.add_argument("--ablation-seeds", type=int, default=2)
    parser.add_argument("--ablation-share", type=float, default=0.35, help="of --tokens")
    parser.add_argument("--loss-only", action="store_true", help="keep no times: other work runs beside")
    parser.add_argument("--nanochat", type=Path, help="a checkout of github.com/karpathy/nanochat")
    parser.add_argument("--nanochat-rates", type=float, default=0.35)
    parser.add_argument("--tokenizer", type=Path, help="a tokenizer folder; by default 01 makes one")
    parser.add_argument("--store", type=Path, help="a token store of that tokenizer; by default one is made")
    parser.add_argument("--out", type=Path, default=ROOT / "outputs")
    return parser.parse_args(argv)


if __name__ == "__main__":
    Speedrun(read_command_line()).everything()
