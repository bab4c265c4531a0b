"""What `make run` starts: notebooks executed by papermill, live on this terminal, and the figures of the run they made.

    python run_notebooks.py run 01_tokenizer 02_pretrain_t4 -p PROFILE=cpu RUN=demo
    python run_notebooks.py seeds 42,43,44 -p PROFILE=cpu RUN=demo
    python run_notebooks.py summary outputs/demo | recipes | results outputs/demo README.md
"""
import argparse
import ast
import difflib
import json
import math
import os
import re
import statistics
import sys
import tempfile
from pathlib import Path

import stentor_utils as su

HERE = Path(__file__).resolve().parent


def _assignments(path):
    """(name, annotation or None, value) of each parameter, as ast nodes, from the cell tagged `parameters`."""
    for cell in json.loads(Path(path).read_text(encoding="utf-8"))["cells"]:
        if "parameters" in cell["metadata"].get("tags", []):
            for node in ast.parse("".join(cell["source"])).body:
                if isinstance(node, ast.AnnAssign):
                    yield node.target.id, node.annotation, node.value
                elif isinstance(node, ast.Assign):
                    yield from ((target.id, None, node.value) for target in node.targets)


def notebook_parameters(path) -> dict[str, str]:
    """{name: default as written} of the cell tagged `parameters`."""
    return {name: ast.unparse(value) for name, _, value in _assignments(path)}


def parameter_kinds(path) -> dict[str, str]:
    """{name: "str", "int", "list[str]" ...}: the type written beside a parameter, else that of its default."""
    kinds = {}
    for name, annotation, value in _assignments(path):
        default = ast.literal_eval(value)
        of = f"[{type(default[0]).__name__}]" if isinstance(default, list) and default else ""
        kinds[name] = ast.unparse(annotation) if annotation else type(default).__name__ + of
    return kinds


def read_value(typed: str, kind: str, optional: bool):
    """What was typed on the command line as the value of a parameter of type `kind`; `optional`: None means None.

    Text is taken letter by letter. What does not fit the type comes back as it is, and the notebook's check names it.
    A list is a Python or JSON list, or items with commas between (a comma before a space belongs to its item).
    """
    if optional and typed == "None":
        return None
    if kind in ("int", "float"):
        for read in (int, float):
            try:
                value = read(typed)
                return typed if abs(value) == math.inf and "inf" not in typed.lower() else value     # 1e400 is not inf
            except ValueError:
                pass
    elif kind == "bool":
        return {"true": True, "false": False}.get(typed.strip().lower(), typed)
    elif kind == "dict":
        return _plain(_literal(typed))
    elif kind.startswith("list"):
        item, value = kind[5:-1] or "str", _literal(typed)
        if isinstance(value, (list, tuple)) and (typed.lstrip()[:1] in "[(" or all(isinstance(v, str) for v in value)):
            return _plain(value)
        if typed.lstrip()[:1] not in ("[", "("):      # one of these was meant to be a list, and is none
            return [read_value(part, item, False) for part in re.split(",(?! )" if item == "str" else ", *", typed)]
    return typed


def _literal(typed: str):
    """A Python literal or JSON; the text itself where it is neither."""
    for read in (ast.literal_eval, json.loads):
        try:
            return read(typed)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            pass
    return typed


def _plain(value):
    """Tuples as lists, all the way down: papermill writes a tuple as a text."""
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return {key: _plain(item) for key, item in value.items()} if isinstance(value, dict) else value


def run_notebooks(names: list[str], given: dict[str, str]) -> None:
    """Execute notebooks with papermill, their output live on this terminal; a parameter goes to each that knows it.

    given: {name: what was typed}. Executed copies go to <OUTPUTS>/<RUN>/notebooks/, but not that of a notebook that refused
    its parameters: nothing was started, nothing is left. Raises ParameterError for a name that no notebook knows.
    """
    paths = {name: HERE / "notebooks" / f"{name}.ipynb" for name in names}
    if absent := [name for name, path in paths.items() if not path.is_file()]:
        there = ", ".join(sorted(path.stem for path in (HERE / "notebooks").glob("*.ipynb")))
        raise su.ParameterError([f"there is no notebook {name!r}; there are {there}." for name in absent])
    known = {name: notebook_parameters(path) for name, path in paths.items()}
    every = sorted({parameter for parameters in known.values() for parameter in parameters})
    problems = []
    for name, typed in given.items():
        if name not in every:
            near = difflib.get_close_matches(name.upper(), every, n=1, cutoff=0.6)
            problems.append(f"{name} is not a parameter of {', '.join(names)}; "
                            + (f"did you mean {near[0]}?" if near else f"known: {', '.join(every)}."))
        if wrong := su.string(empty=True)(typed):
            problems.append(f"{name} = {typed!r} {wrong}.")
    problems += su.secret_problems(**given)           # papermill writes parameters into the executed notebook
    outputs, folders = su.find_outputs(given.get("OUTPUTS", "outputs")), {}
    if su.writable_folder(outputs):                   # 06 draws what can only be read; the others refuse it themselves
        outputs = su.find_outputs("outputs")
    for name in names:
        runs = given.get("RUN", ast.literal_eval(known[name].get("RUN", "'demo'"))).split(",")       # 06 takes several
        problems += [f"RUN = {run!r} {wrong}." for run in runs if (wrong := su.run_name(run.strip()))]
        folders[name] = outputs / "_vs_".join(run.strip() for run in runs) / "notebooks"
    if problems:
        raise su.ParameterError(list(dict.fromkeys(problems)))
    for name, value in su.PROCESS_ENVIRONMENT.items():      # the kernels inherit it: 04 trains in its own
        os.environ.setdefault(name, value)
    for name, path in paths.items():
        print(f"\n=== {name} ===", flush=True)
        kinds = parameter_kinds(path)
        execute(path, folders[name], {key: read_value(typed, kinds[key], known[name][key] == "None")
                                      for key, typed in given.items() if key in known[name]})


def execute(path: Path, folder: Path, parameters: dict) -> None:
    """Execute one notebook; its copy goes to `folder`, unless it refused its parameters."""
    import papermill
    with tempfile.TemporaryDirectory() as elsewhere:
        executed, refused = Path(elsewhere) / path.name, False
        try:
            papermill.execute_notebook(
                path, executed, cwd=HERE, progress_bar=False, parameters=parameters, kernel_name="python3",
                extra_arguments=["--IPKernelApp.log_level=40"],   # no warning that the kernel's local socket is plain
                start_timeout=3600, iopub_timeout=3600,           # on a busy machine papermill's 60 and 4 s lose the run
                stdout_file=sys.stdout, stderr_file=sys.stderr, log_output=False)
        except papermill.PapermillExecutionError as error:
            refused = error.ename == "ParameterError"
            raise
        finally:
            if executed.exists() and not refused:
                folder.mkdir(parents=True, exist_ok=True)
                su.write_atomically(folder / path.name, executed.read_bytes())


def run_seeds(seeds: list[int], given: dict[str, str]) -> Path:
    """Train RUN's recipe again by 02 alone, once a seed, with RUN's tokenizer and token store; seeds that are there are kept.

    given: RUN and OUTPUTS; all else is as RUN has it. The runs are <RUN>-seed<seed>. Returns RUN's folder. Raises
    ParameterError where RUN has not ended, or was not made by 02.
    """
    outputs, name = su.find_outputs(given.get("OUTPUTS", "outputs")), given.get("RUN", "demo")
    problems = [f"{key} is RUN's own here: only RUN, OUTPUTS and SEEDS are taken." for key in given
                if key not in ("RUN", "OUTPUTS")]
    if wrong := su.run_name(name) or not (outputs / name / "summary.json").is_file() and f"has not ended in {outputs}":
        problems.append(f"RUN = {name!r} {wrong}.")
    if problems:
        raise su.ParameterError(problems)
    run = json.loads((outputs / name / "run.json").read_text())
    if run.get("fill"):
        raise su.ParameterError([f"RUN = {name!r} was made by 03, which keeps no token store for other runs."])
    recipe = su.Recipe.from_dict(run["recipe"])
    base, profile = recipe.name.removesuffix("-cpu"), "cpu" if recipe.name.endswith("-cpu") else "t4"
    changed = {field.removeprefix("shape."): value for field, value, _ in recipe.difference(su.find_recipe(base, profile))
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


# What may differ between two draws of one recipe: the seed, and what only says how the machine takes it.
MACHINE = {"seed", "mixed_precision", "num_processes", "per_device_eval_batch_size", "save_every_minutes", "save_total_limit",
           "torch_compile", "attn_implementation", "logging_steps", "published", "unpublished"}


def draws_like(run_dir) -> list[dict]:
    """Every finished run beside `run_dir` of its recipe, other in seed or machine only: {"run", "seed", "cpu", ...summary}.

    A copy of a run, alike in seed and loss to the last digit, is no second draw.
    """
    def read(folder):
        try:
            run, summary = (json.loads((folder / name).read_text()) for name in ("run.json", "summary.json"))
            recipe = run["recipe"]
            same = {key: value for key, value in recipe.items() if key not in MACHINE}
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


def print_summary(run_dir) -> None:
    """The closing lines of `make run`, from the run's files."""
    run_dir = Path(run_dir)
    summary = json.loads((run_dir / "summary.json").read_text())
    print(f"\n{summary['recipe']}: {summary['parameters']:,} parameters, {summary['tokens']:,} tokens seen at "
          f"{summary['tokens_per_second']:,.0f} tokens/s ({su.duration(summary['seconds'])})")
    print_spread(run_dir)
    if (baseline := run_dir / "baseline.json").exists():
        bigram = json.loads(baseline.read_text())["byte_bigram_bits_per_byte"]
        print(f"a byte bigram model on the same text: {bigram:.4f} bits per byte "
              f"({bigram - statistics.mean(draw['bits_per_byte'] for draw in draws_like(run_dir)):.4f} more)")
    if (samples := run_dir / "samples.json").exists():
        for sample in json.loads(samples.read_text())["samples"][:3]:
            print(f"\n  {sample['prompt']} >>> {' '.join(sample['text'].split())}")
    if (tuned := run_dir / "instruct" / "sft_summary.json").exists():
        stops = json.loads(tuned.read_text())["stopping"]
        print("\nstops by itself: " + ", ".join(f"{who} {found['share']:.0%} of {found['n']}" for who, found in stops.items()))
    print(f"\ncharts  {os.path.relpath(run_dir / 'charts')}\nmodel   {os.path.relpath(run_dir / 'final')}")
    if (card := run_dir / "final" / "README.md").exists():
        print(f"card    {os.path.relpath(card)}")


def print_recipes() -> None:
    """One line a recipe: the published shapes and budgets, all derived."""
    print(f"{'recipe':22}{'parameters':>12}{'steps':>8}{'tokens':>15}  published")
    for recipe in su.RECIPES.values():
        print(f"{recipe.name:22}{su.count_parameters(recipe.shape):>12,}{recipe.total_steps:>8,}{recipe.total_tokens:>15,}  "
              + ", ".join(f"{key} {value:,}" for key, value in recipe.published.items()))


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
            "tokens per second": f"{summary['tokens_per_second']:,.0f}", "training time": su.duration(summary["seconds"]),
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
    su.write_atomically(readme, f"{text[:text.index(begin)]}{begin}\n{table}\n{text[text.index(end):]}")


def read_pairs(pairs: list[str]) -> dict[str, str]:
    """{name: what was typed} of NAME=VALUE words."""
    if without := [pair for pair in pairs if "=" not in pair]:
        raise su.ParameterError([f"{su.redact(pair)!r} is no NAME=VALUE." for pair in without])
    return {name: value for name, _, value in (pair.partition("=") for pair in pairs)}


def read_seeds(words: list[str]) -> list[int]:
    """Whole numbers, with commas or spaces between."""
    seeds = [read_value(word, "int", False) for word in re.split(r"[\s,]+", " ".join(words).strip())]
    if wrong := su.items(su.number(0, 2**31 - 1, integer=True))(seeds):
        raise su.ParameterError([f"SEEDS = {su.shown(seeds)} {wrong}."])
    return [int(seed) for seed in seeds]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="execute notebooks with papermill")
    run.add_argument("notebooks", nargs="+")
    run.add_argument("-p", dest="parameters", nargs="*", default=[], metavar="NAME=VALUE")
    seeds = commands.add_parser("seeds", help="train a run's recipe again with other seeds")
    seeds.add_argument("seeds", nargs="+")
    seeds.add_argument("-p", dest="parameters", nargs="*", default=[], metavar="NAME=VALUE")
    commands.add_parser("summary", help="print what a run came to").add_argument("run_dir")
    commands.add_parser("recipes", help="print the published recipes")
    results = commands.add_parser("results", help="put a run's figures into README.md")
    results.add_argument("run_dir")
    results.add_argument("readme")
    arguments = parser.parse_args()
    if arguments.command == "recipes":
        print_recipes()
    elif arguments.command == "results":
        write_results(arguments.run_dir, arguments.readme)
        print_spread(arguments.run_dir)
    elif arguments.command == "summary":
        print_summary(arguments.run_dir)
    else:
        try:
            given = read_pairs(arguments.parameters)
            if arguments.command == "seeds":
                print_spread(run_seeds(read_seeds(arguments.seeds), given))
                return 0
            run_notebooks(arguments.notebooks, given)
        except su.ParameterError as error:
            print("\n".join(error._render_traceback_()), file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            return 130
        except Exception as error:
            if type(error).__name__ != "PapermillExecutionError":
                raise
            known = error.ename in ("ParameterError", "TrainingFailed", "TrainingDiverged", "EvaluationFailed", "FeedStopped",
                                    "CheckpointError", "SourceError", "SystemExit")
            print(f"\n{error.evalue if known else error}", file=sys.stderr)     # without papermill's pages of context
            return 2 if error.ename == "ParameterError" else 1
        if "02_pretrain_t4" in arguments.notebooks:
            print_summary(su.find_outputs(given.get("OUTPUTS", "outputs")) / given.get("RUN", "demo"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
