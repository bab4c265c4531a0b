"""The figures of runs: several draws of one recipe, and the tables made of them."""
from __future__ import annotations

import json
import os
import statistics
from pathlib import Path

from stentor.files import ParameterError, duration, write_atomically
from stentor.notebooks import run_notebooks
from stentor.parameters import run_name
from stentor.published import find_recipe
from stentor.recipes import DRAW, Recipe
from stentor.rules import free_fields
from stentor.session import find_outputs


def run_seeds(seeds: list[int], given: dict[str, str]) -> Path:
    """Train RUN's recipe again by 02 alone, once a seed; seeds that are there are kept.

    Its tokenizer and token store are RUN's. given: RUN and OUTPUTS; all else is as RUN has it. The
    runs are <RUN>-seed<seed>. Returns RUN's folder. Raises ParameterError where RUN has not ended,
    or was not made by 02.
    """
    outputs, name = find_outputs(given.get("OUTPUTS", "outputs")), given.get("RUN", "demo")
    problems = [f"{key} is RUN's own here: only RUN, OUTPUTS and SEEDS are taken."
                for key in given if key not in ("RUN", "OUTPUTS")]
    ended = (outputs / name / "summary.json").is_file()
    if wrong := run_name(name) or not ended and f"has not ended in {outputs}":
        problems.append(f"RUN = {name!r} {wrong}.")
    if problems:
        raise ParameterError(problems)
    run = read_json(outputs / name / "run.json")
    if run.get("fill"):
        raise ParameterError([
            f"RUN = {name!r} was made by 03, which keeps no token store for other runs."])
    parameters = {**same_recipe(Recipe.from_dict(run["recipe"])), "OUTPUTS": str(outputs),
                  "TOKENIZER": str((outputs / name / run["tokenizer"]).resolve())}
    for seed in seeds:
        if seed in [draw["seed"] for draw in draws_like(outputs / name)]:
            print(f"seed {seed} is there already")
            continue
        folder = outputs / f"{name}-seed{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        if not os.path.lexists(folder / "tokens"):    # one store: the seeds differ in nothing else
            (folder / "tokens").symlink_to(Path("..") / name / "tokens")
        run_notebooks(["02_pretrain_t4"], {**parameters, "SEED": str(seed), "RUN": folder.name})
    return outputs / name


def same_recipe(recipe: Recipe) -> dict[str, str]:
    """The parameters of 02 that make this recipe again, but for its seed."""
    base, twin = recipe.name.removesuffix("-cpu"), recipe.name.endswith("-cpu")
    profile = "cpu" if twin else "t4"
    changed = {field.removeprefix("shape."): value
               for field, value, _ in recipe.difference(find_recipe(base, profile))
               if field not in ("seed", "mixed_precision")}
    if "sources" in changed:
        changed["sources"] = recipe.to_dict()["sources"]
    return {"PROFILE": profile, "RECIPE": base, "OVERRIDES": json.dumps(changed)}


FIGURES = ("eval_loss", "perplexity", "bits_per_byte", "tokens_per_second")


def draws_like(run_dir) -> list[dict]:
    """Every finished run beside `run_dir` of its recipe, other in seed or machine only.

    Each as {"run", "seed", ...FIGURES}. A copy of a run, alike in seed and loss to the last digit,
    is no second draw.
    """
    free = free_fields(Recipe, DRAW)

    def read(folder):
        try:
            run, summary = (json.loads((folder / name).read_text())
                            for name in ("run.json", "summary.json"))
            recipe = Recipe.completed(run["recipe"])
            same = {key: value for key, value in recipe.items() if key not in free}
            draw = {key: summary[key] for key in FIGURES}
            return (json.dumps(same, sort_keys=True),
                    {"run": folder.name, "seed": recipe["seed"], **draw})
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None, None                         # not a run, or one that has not ended
    run_dir = Path(os.path.abspath(run_dir))
    wanted, own = read(run_dir)
    found = {(own["seed"], own["eval_loss"]): own} if own else {}
    for path in sorted(run_dir.parent.glob("*/summary.json")):
        recipe, draw = read(path.parent)
        if recipe and recipe == wanted:
            found.setdefault((draw["seed"], draw["eval_loss"]), draw)
    return sorted(found.values(), key=lambda draw: (draw["seed"], draw["run"]))


def spread(draws: list[dict], key: str, digits: int = 4) -> str:
    """"1.7232 (1.6834 to 1.8712, n = 4)", or of one run "1.6834 (one draw)"."""
    values = [draw[key] for draw in draws]
    mean, least, most = (f"{figure:.{digits}f}"
                         for figure in (statistics.mean(values), min(values), max(values)))
    if len(values) == 1:
        return f"{mean} (one draw)"
    return f"{mean} ({least} to {most}, n = {len(values)})"


def print_spread(run_dir) -> None:
    """What the recipe gives over every seed and machine that ran it here; one run is one draw."""
    draws = draws_like(run_dir)
    for key, title, digits in (("eval_loss", "eval loss", 4), ("perplexity", "perplexity", 2),
                               ("bits_per_byte", "bits per byte", 4)):
        print(f"{title:14}{spread(draws, key, digits)}")
    print("bits per byte of each: " + ", ".join(
        f"seed {draw['seed']} ({draw['run']}) {draw['bits_per_byte']:.4f}" for draw in draws))
    if len(draws) == 1:
        print("That is one draw: another seed or machine gives another figure. "
              "`make run-seeds SEEDS=\"42 43 44\"` makes more.")


def read_json(path: Path) -> dict:
    """The content of a file of a finished run. Raises ParameterError, in a sentence."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ParameterError([f"{path} cannot be read ({type(error).__name__}): name the folder of "
                              "a run that has ended."]) from error


def print_summary(run_dir) -> None:
    """The closing lines of `make run`, from the run's files."""
    run_dir = Path(run_dir)
    summary = read_json(run_dir / "summary.json")
    print(f"\n{summary['recipe']}: {summary['parameters']:,} parameters, "
          f"{summary['tokens']:,} tokens seen at {summary['tokens_per_second']:,.0f} tokens/s "
          f"({duration(summary['seconds'])})")
    print_spread(run_dir)
    if (baseline := run_dir / "baseline.json").exists():
        print("a byte bigram model on the same text: "
              + bigram_line(baseline, draws_like(run_dir), "bits per byte "))
    if (samples := run_dir / "samples.json").exists():
        for sample in json.loads(samples.read_text())["samples"][:3]:
            print(f"\n  {sample['prompt']} >>> {' '.join(sample['text'].split())}")
    if (tuned := run_dir / "instruct" / "sft_summary.json").exists():
        stops = json.loads(tuned.read_text())["stopping"]
        print("\nstops by itself: " + ", ".join(
            f"{who} {found['share']:.0%} of {found['n']}" for who, found in stops.items()))
    print(f"\ncharts  {os.path.relpath(run_dir / 'charts')}")
    print(f"model   {os.path.relpath(run_dir / 'final')}")
    if (card := run_dir / "final" / "README.md").exists():
        print(f"card    {os.path.relpath(card)}")


def bigram_line(baseline: Path, draws: list[dict], unit: str = "") -> str:
    """What a byte bigram model scores on the same text, and how much more that is than draws do."""
    bigram = read_json(baseline)["byte_bigram_bits_per_byte"]
    more = bigram - statistics.mean(draw["bits_per_byte"] for draw in draws)
    return f"{bigram:.4f} {unit}({more:.4f} more)"


def write_results(run_dir, readme) -> None:
    """Put the measured figures of a run between the `results` markers of README.md."""
    run_dir, readme = Path(run_dir), Path(readme)
    rows = figures(run_dir)
    table = "\n".join(["| `make run` | |", "|---|---|",
                       *(f"| {name} | {value} |" for name, value in rows.items())])
    for path in sorted((run_dir.parent / "benchmarks").glob("*.md")):   # what `make bench` wrote
        table += f"\n\n{path.read_text().strip()}"
    begin, end = "<!-- results:begin -->", "<!-- results:end -->"
    text = readme.read_text() if readme.is_file() else ""
    if not (begin in text and end in text):
        raise ParameterError([f"{readme} has no {begin} and {end} to write between."])
    before, after = text[:text.index(begin)], text[text.index(end):]
    write_atomically(readme, f"{before}{begin}\n{table}\n{after}")


def figures(run_dir: Path) -> dict[str, str]:
    """{what: figure} of a finished run and its other draws, as README.md has them."""
    summary, machine = (read_json(run_dir / f"{name}.json") for name in ("summary", "environment"))
    store = read_json(run_dir / "tokens" / "manifest.json")["sources"].values()
    tokens, text_bytes = (sum(entry[key] for entry in store) for key in ("tokens", "bytes"))
    draws = draws_like(run_dir)
    each = (f"seed {draw['seed']}: {draw['bits_per_byte']:.4f}" for draw in draws)
    return {
        "recipe": summary["recipe"], "parameters": f"{summary['parameters']:,}",
        "tokens seen": f"{summary['tokens']:,}",
        "tokens per second": f"{summary['tokens_per_second']:,.0f}",
        "training time": duration(summary["seconds"]),
        "eval loss, nats per token": spread(draws, "eval_loss"),
        "perplexity": spread(draws, "perplexity", 2),
        "bits per byte": spread(draws, "bits_per_byte"),
        "bits per byte of each run": ", ".join(each),
        "bits per byte of a byte bigram model, same text":
            bigram_line(run_dir / "baseline.json", draws),
        "bytes per token of the training text": f"{text_bytes / tokens:.3f}",
        "machine": f"{machine['cpu']}, {machine['cpu_count']} cores; Python {machine['python']}, "
                   f"torch {machine['packages']['torch']}"}
