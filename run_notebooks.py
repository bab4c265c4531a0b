"""What `make run` starts: notebooks executed by papermill, live on this terminal, and the figures of the run they made.

    python run_notebooks.py run 01_tokenizer 02_pretrain_t4 -p PROFILE=cpu RUN=demo
    python run_notebooks.py summary outputs/demo | recipes | results outputs/demo README.md
"""
import argparse
import ast
import difflib
import json
import os
import sys
from pathlib import Path

import stentor_utils as su

HERE = Path(__file__).resolve().parent


def notebook_parameters(path) -> dict[str, str]:
    """{name: default as written} of the cell tagged `parameters`."""
    for cell in json.loads(Path(path).read_text())["cells"]:
        if "parameters" in cell["metadata"].get("tags", []):
            tree = ast.parse("".join(cell["source"]))
            return {target.id: ast.unparse(node.value) for node in tree.body if isinstance(node, ast.Assign)
                    for target in node.targets}
    return {}


def run_notebooks(names: list[str], given: dict) -> None:
    """Execute notebooks with papermill, their output live on this terminal; a parameter goes to each that knows it.

    Executed copies go to <OUTPUTS>/<RUN>/notebooks/. Raises ParameterError for a name that no notebook knows.
    """
    paths = {name: HERE / "notebooks" / f"{name}.ipynb" for name in names}
    known = {name: notebook_parameters(path) for name, path in paths.items()}
    every = sorted({parameter for parameters in known.values() for parameter in parameters})
    problems = []
    for name in given:
        if name not in every:
            near = difflib.get_close_matches(name.upper(), every, n=1, cutoff=0.6)
            problems.append(f"{name} is not a parameter of {', '.join(names)}; "
                            + (f"did you mean {near[0]}?" if near else f"known: {', '.join(every)}."))
    problems += su.secret_problems(**given)           # papermill writes parameters into the executed notebook
    defaults = {"OUTPUTS": "outputs", "RUN": "demo", **given}
    outputs = su.find_outputs(str(defaults["OUTPUTS"]))
    if wrong := su.run_name(defaults["RUN"]):
        problems.append(f"RUN = {defaults['RUN']!r} {wrong}.")
    elif wrong := su.writable_folder(outputs / str(defaults["RUN"]) / "notebooks"):
        problems.append(f"OUTPUTS = {defaults['OUTPUTS']!r} {wrong}.")
    if problems:
        raise su.ParameterError(problems)
    for name, value in su.PROCESS_ENVIRONMENT.items():      # the kernels inherit it: 04 trains in its own
        os.environ.setdefault(name, value)
    import papermill
    for name, path in paths.items():
        print(f"\n=== {name} ===", flush=True)
        papermill.execute_notebook(
            path, outputs / str(defaults["RUN"]) / "notebooks" / f"{name}.ipynb", cwd=HERE, progress_bar=False,
            parameters={key: value for key, value in given.items() if key in known[name]}, kernel_name="python3",
            extra_arguments=["--IPKernelApp.log_level=40"],       # no warning that the kernel's local socket is plain
            stdout_file=sys.stdout, stderr_file=sys.stderr, log_output=False)


def print_summary(run_dir) -> None:
    """The closing lines of `make run`, from the run's files."""
    run_dir = Path(run_dir)
    summary = json.loads((run_dir / "summary.json").read_text())
    print(f"\n{summary['recipe']}: {summary['parameters']:,} parameters, {summary['tokens']:,} tokens seen at "
          f"{summary['tokens_per_second']:,.0f} tokens/s ({su.duration(summary['seconds'])})")
    print(f"eval loss {summary['eval_loss']:.4f}   perplexity {summary['perplexity']:.2f}   "
          f"bits per byte {summary['bits_per_byte']:.4f}")
    if (baseline := run_dir / "baseline.json").exists():
        bigram = json.loads(baseline.read_text())["byte_bigram_bits_per_byte"]
        print(f"a byte bigram model on the same text: {bigram:.4f} bits per byte "
              f"({bigram - summary['bits_per_byte']:.4f} more)")
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
    tokens, text_bytes = (sum(entry[key] for entry in store.values()) for key in ("tokens", "bytes"))
    rows = {"recipe": summary["recipe"], "parameters": f"{summary['parameters']:,}", "tokens seen": f"{summary['tokens']:,}",
            "tokens per second": f"{summary['tokens_per_second']:,.0f}", "training time": su.duration(summary["seconds"]),
            "eval loss, nats per token": f"{summary['eval_loss']:.4f}", "perplexity": f"{summary['perplexity']:.2f}",
            "bits per byte": f"{summary['bits_per_byte']:.4f}",
            "bits per byte of a byte bigram model, same text": f"{bigram:.4f} ({bigram - summary['bits_per_byte']:.4f} more)",
            "bytes per token of the training text": f"{text_bytes / tokens:.3f}",
            "machine": f"{machine['cpu']}, {machine['cpu_count']} cores; Python {machine['python']}, "
                       f"torch {machine['packages']['torch']}"}
    table = "\n".join(["| `make run` | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])
    for path in sorted((run_dir.parent / "benchmarks").glob("*.md")):       # what `make bench` wrote
        table += f"\n\n{path.read_text().strip()}"
    text = readme.read_text()
    begin, end = "<!-- results:begin -->", "<!-- results:end -->"
    su.write_atomically(readme, f"{text[:text.index(begin)]}{begin}\n{table}\n{text[text.index(end):]}")


def _value(text: str):
    """A parameter from the command line: a Python literal if it is one, else the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="execute notebooks with papermill")
    run.add_argument("notebooks", nargs="+")
    run.add_argument("-p", dest="parameters", nargs="*", default=[], metavar="NAME=VALUE")
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
    elif arguments.command == "summary":
        print_summary(arguments.run_dir)
    else:
        given = {name: _value(value) for name, _, value in (pair.partition("=") for pair in arguments.parameters)}
        try:
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
            print_summary(su.find_outputs(str(given.get("OUTPUTS", "outputs"))) / str(given.get("RUN", "demo")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
