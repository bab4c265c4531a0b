"""What `make run` and its like start.

    python -m stentor_utils run 01_tokenizer 02_pretrain_t4 -p PROFILE=cpu RUN=demo
    python -m stentor_utils seeds | train | fill | benchmark | summary | recipes | results
"""
from __future__ import annotations

import argparse
import faulthandler
import json
import os
import re
import signal
import statistics
import sys
from pathlib import Path

from stentor.files import (
    CheckpointError, FeedStopped, ParameterError, SourceError, TrainingFailed, duration)
from stentor.launch import fill_from_file, train_from_file
from stentor.notebooks import read_value, run_notebooks
from stentor.parameters import items, number, shown
from stentor.published import RECIPES
from stentor.results import draws_like, print_spread, run_seeds, write_results
from stentor.secrets import redact
from stentor.session import find_outputs
from stentor.shapes import count_parameters
from stentor.train import TrainingDiverged


def print_summary(run_dir) -> None:
    """The closing lines of `make run`, from the run's files."""
    run_dir = Path(run_dir)
    summary = json.loads((run_dir / "summary.json").read_text())
    print(f"\n{summary['recipe']}: {summary['parameters']:,} parameters, {summary['tokens']:,} tokens seen at "
          f"{summary['tokens_per_second']:,.0f} tokens/s ({duration(summary['seconds'])})")
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
    for recipe in RECIPES.values():
        print(f"{recipe.name:22}{count_parameters(recipe.shape):>12,}{recipe.total_steps:>8,}{recipe.total_tokens:>15,}  "
              + ", ".join(f"{key} {value:,}" for key, value in recipe.published.items()))


def read_pairs(pairs: list[str]) -> dict[str, str]:
    """{name: what was typed} of NAME=VALUE words."""
    if without := [pair for pair in pairs if "=" not in pair]:
        raise ParameterError([f"{redact(pair)!r} is no NAME=VALUE." for pair in without])
    return {name: value for name, _, value in (pair.partition("=") for pair in pairs)}


def read_seeds(words: list[str]) -> list[int]:
    """Whole numbers, with commas or spaces between."""
    seeds = [read_value(word, "int", False) for word in re.split(r"[\s,]+", " ".join(words).strip())]
    if wrong := items(number(0, 2**31 - 1, integer=True))(seeds):
        raise ParameterError([f"SEEDS = {shown(seeds)} {wrong}."])
    return [int(seed) for seed in seeds]


def train_command(arguments) -> int:
    """What `launch` starts, and for its workers `fill`: exit code 2 for what was refused, 130 / 143 for a stop."""
    faulthandler.enable()                             # a crash in native code says where it was
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))       # where train() does not take it: before and after its loop
    signal.signal(signal.SIGINT, signal.default_int_handler)      # a shell starts what it puts behind `&` with SIGINT ignored
    try:
        if arguments.command == "fill":
            fill_from_file(arguments.run_json, arguments.source, arguments.parent)
        else:
            train_from_file(arguments.run_json)
    except (ParameterError, CheckpointError, SourceError, FeedStopped) as error:
        print(error, file=sys.stderr)
        return 2
    except (TrainingDiverged, TrainingFailed) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        # All is written and every process is here (Engine.close). One process of two once aborted (SIGABRT, in CI), most
        # likely in the teardown of its communication threads; it was not seen again. Leave without that teardown.
        sys.stdout.flush()
        os._exit(0)
    return 0


def benchmark_command(arguments) -> int:
    """What `benchmark.launch` starts."""
    from stentor.benchmark.run import run             # it needs lm_eval
    path = Path(arguments.benchmark_json).resolve()
    try:
        run(json.loads(path.read_text()), path.parent, say=lambda text: print(text, flush=True))
    except ParameterError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def notebooks_command(arguments) -> int:
    """`run` and `seeds`: notebooks, executed by papermill."""
    try:
        given = read_pairs(arguments.parameters)
        if arguments.command == "seeds":
            print_spread(run_seeds(read_seeds(arguments.seeds), given))
            return 0
        run_notebooks(arguments.notebooks, given)
    except ParameterError as error:
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
        print_summary(find_outputs(given.get("OUTPUTS", "outputs")) / given.get("RUN", "demo"))
    return 0


def results_command(arguments) -> int:
    write_results(arguments.run_dir, arguments.readme)
    print_spread(arguments.run_dir)
    return 0


def read_command_line(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m stentor_utils", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name, does, help, *positional):
        made = commands.add_parser(name, help=help)
        for argument in positional:
            made.add_argument(argument, nargs="+" if argument in ("notebooks", "seeds") else None)
        made.set_defaults(does=does)
        return made
    for name, help, argument in (("run", "execute notebooks with papermill", "notebooks"),
                                 ("seeds", "train a run's recipe again with other seeds", "seeds")):
        command(name, notebooks_command, help, argument).add_argument(
            "-p", dest="parameters", nargs="*", default=[], metavar="NAME=VALUE")
    command("train", train_command, "train the run described by a run.json", "run_json")
    fill = command("fill", train_command, "fill one source of a run that is being trained", "run_json", "source")
    fill.add_argument("parent", nargs="?", type=int, help="the process to leave with")
    command("benchmark", benchmark_command, "score what a benchmark.json describes", "benchmark_json")
    command("summary", lambda arguments: print_summary(arguments.run_dir), "print what a run came to", "run_dir")
    command("recipes", lambda arguments: print_recipes(), "print the published recipes")
    command("results", results_command, "put a run's figures into README.md", "run_dir", "readme")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """`python -m stentor_utils COMMAND ...`; exit code 2 for what was refused."""
    arguments = read_command_line(argv)
    return arguments.does(arguments) or 0
