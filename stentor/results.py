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
    """Train RUN's recipe again by 02 alone, once a seed, with RUN's tokenizer and token store; seeds that are there are kept.

    given: RUN and OUTPUTS; all else is as RUN has it. The runs are <RUN>-seed<seed>. Returns RUN's folder. Raises
    ParameterError where RUN has not ended, or was not made by 02.
    """
    outputs, name = find_outputs(given.get("OUTPUTS", "outputs")), given.get("RUN", "demo")
    problems = [f"{key} is RUN's own here: only RUN, OUTPUTS and SEEDS are taken." for key in given
                if key not in ("RUN", "OUTPUTS")]
    if wrong := run_name(name) or not (outputs / name / "summary.json").is_file() and f"has not ended in {outputs}":
        problems.append(f"RUN = {name!r} {wrong}.")
    if problems:
        raise ParameterError(problems)
    run = json.loads((outputs / name / "run.json").read_text())
    if run.get("fill"):
        raise ParameterError([f"RUN = {name!r} was made by 03, which keeps no token store for other runs."])
    recipe = Recipe.from_dict(run["recipe"])
    base, profile = recipe.name.removesuffix("-cpu"), "cpu" if recipe.name.endswith("-cpu") else "t4"
    changed = {field.removeprefix("shape."): value for field, value, _ in recipe.difference(find_recipe(base, profile))
               if field not in ("seed", "mixed_precision")}
    if "sources" in changed:
        changed["sources"] = recipe.to_dict()["sources"]
    for seed in seeds:
        if seed in [draw["seed"] for draw in draws_like(outputs / name)]:
            print(f"seed {seed} is there already")
            continue
        folder = outputs / f"{name}-seed{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        if not os.path.lexists(folder / "tokens"):    # one store for all: the seeds differ in nothing else
            (folder / "tokens").symlink_to(Path("..") / name / "tokens")
        run_notebooks(["02_pretrain_t4"], {
            "PROFILE": profile, "RECIPE": base, "OVERRIDES": json.dumps(changed), "OUTPUTS": str(outputs), "SEED": str(seed),
            "RUN": folder.name, "TOKENIZER": str((outputs / name / run["tokenizer"]).resolve())})
    return outputs / name


def draws_like(run_dir) -> list[dict]:
    """Every finished run beside `run_dir` of its recipe, other in seed or machine only: {"run", "seed", "cpu", ...summary}.

    A copy of a run, alike in seed and loss to the last digit, is no second draw.
    """
    free = free_fields(Recipe, DRAW)

    def read(folder):
        try:
            run, summary = (json.loads((folder / name).read_text()) for name in ("run.json", "summary.json"))
            recipe = run["recipe"]
            same = {key: value for key, value in recipe.items() if key not in free}
            draw = {key: summary[key] for key in ("eval_loss", "perplexity", "bits_per_byte", "tokens_per_second")}
            return json.dumps(same, sort_keys=True), {"run": folder.name, "seed": recipe["seed"], **draw}
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
    if len(values) == 1:
        return f"{values[0]:.{digits}f} (one draw)"
    return f"{statistics.mean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f}, n = {len(values)})"


def print_spread(run_dir) -> None:
    """What the recipe gives over every seed and machine that ran it here, and that one run is one draw."""
    draws = draws_like(run_dir)
    for key, title, digits in (("eval_loss", "eval loss", 4), ("perplexity", "perplexity", 2),
                               ("bits_per_byte", "bits per byte", 4)):
        print(f"{title:14}{spread(draws, key, digits)}")
    print("bits per byte of each: " + ", ".join(
        f"seed {draw['seed']} ({draw['run']}) {draw['bits_per_byte']:.4f}" for draw in draws))
    if len(draws) == 1:
        print("That is one draw: another seed or machine gives another figure. `make run-seeds SEEDS=\"42 43 44\"` makes more.")


def write_results(run_dir, readme) -> None:
    """Put the measured figures of a run between the `results` markers of README.md."""
    run_dir, readme = Path(run_dir), Path(readme)
    found = {name: json.loads((run_dir / name).read_text()) for name in (
        "summary.json", "baseline.json", "environment.json", "tokens/manifest.json")}
    summary, machine, store = found["summary.json"], found["environment.json"], found["tokens/manifest.json"]["sources"]
    bigram = found["baseline.json"]["byte_bigram_bits_per_byte"]
    draws = draws_like(run_dir)
    mean = statistics.mean(draw["bits_per_byte"] for draw in draws)
    tokens, text_bytes = (sum(entry[key] for entry in store.values()) for key in ("tokens", "bytes"))
    rows = {"recipe": summary["recipe"], "parameters": f"{summary['parameters']:,}", "tokens seen": f"{summary['tokens']:,}",
            "tokens per second": f"{summary['tokens_per_second']:,.0f}", "training time": duration(summary["seconds"]),
            "eval loss, nats per token": spread(draws, "eval_loss"), "perplexity": spread(draws, "perplexity", 2),
            "bits per byte": spread(draws, "bits_per_byte"),
            "bits per byte of each run": ", ".join(f"seed {d['seed']}: {d['bits_per_byte']:.4f}" for d in draws),
            "bits per byte of a byte bigram model, same text": f"{bigram:.4f} ({bigram - mean:.4f} more)",
            "bytes per token of the training text": f"{text_bytes / tokens:.3f}",
            "machine": f"{machine['cpu']}, {machine['cpu_count']} cores; Python {machine['python']}, "
                       f"torch {machine['packages']['torch']}"}
    table = "\n".join(["| `make run` | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])
    for path in sorted((run_dir.parent / "benchmarks").glob("*.md")):       # what `make bench` wrote
        table += f"\n\n{path.read_text().strip()}"
    text = readme.read_text()
    begin, end = "<!-- results:begin -->", "<!-- results:end -->"
    write_atomically(readme, f"{text[:text.index(begin)]}{begin}\n{table}\n{text[text.index(end):]}")
