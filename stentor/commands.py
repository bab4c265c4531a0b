"""What `make run` and its like start.

    python -m stentor_utils run 01_tokenizer 02_pretrain_t4 -p PROFILE=cpu RUN=demo
    python -m stentor_utils seeds | growth | train | fill | benchmark | summary | recipes | results
    python -m stentor_utils demo -p RUN=demo PORT=7860
    python -m stentor_utils space outputs/demo
    python -m stentor_utils gallery outputs/demo docs/gallery outputs/html

Exit codes: 2 for what was refused, in a sentence; 1 for what failed; 130 and 143 for a stop.
"""
from __future__ import annotations

import argparse
import faulthandler
import os
import re
import signal
import sys

from stentor.files import ParameterError, StentorError, TrainingFailed
from stentor.launch import fill_from_file, train_from_file
from stentor.notebooks import read_value, run_notebooks
from stentor.parameters import items, number, shown
from stentor.published import RECIPES, TUNED
from stentor.reporting import write_results
from stentor.results import print_spread, print_summary, run_seeds
from stentor.secrets import redact
from stentor.session import find_outputs
from stentor.shapes import count_parameters
from stentor.train import TrainingDiverged


def print_recipes() -> None:
    """One line a recipe, then one a tuned twin: shapes, budgets and rates, all derived."""
    def line(recipe, more):
        print(f"{recipe.name:30}{count_parameters(recipe.shape):>12,}{recipe.total_steps:>8,}"
              f"{recipe.total_tokens:>15,}  {more}")
    print(f"{'recipe':30}{'parameters':>12}{'steps':>8}{'tokens':>15}  published")
    for recipe in RECIPES.values():
        line(recipe, ", ".join(f"{key} {value:,}" for key, value in recipe.published.items()))
    print(f"\n{'tuned twin':30}{'parameters':>12}{'steps':>8}{'tokens':>15}  "
          "learning_rate, matrix_learning_rate")
    for recipe in TUNED.values():
        line(recipe, f"{recipe.learning_rate:.3g}, {recipe.matrix_learning_rate:.3g}")


def read_pairs(pairs: list[str]) -> dict[str, str]:
    """{name: what was typed} of NAME=VALUE words."""
    if without := [pair for pair in pairs if "=" not in pair]:
        raise ParameterError([f"{redact(pair)!r} is no NAME=VALUE." for pair in without])
    return {name: value for name, _, value in (pair.partition("=") for pair in pairs)}


def read_seeds(words: list[str]) -> list[int]:
    """Whole numbers, with commas or spaces between."""
    typed = re.split(r"[\s,]+", " ".join(words).strip())
    seeds = [read_value(word, "int", False) for word in typed]
    if wrong := items(number(0, 2**31 - 1, integer=True))(seeds):
        raise ParameterError([f"SEEDS = {shown(seeds)} {wrong}."])
    return [int(seed) for seed in seeds]


def train_command(arguments) -> None:
    """What `launch` starts, and for its workers `fill`."""
    faulthandler.enable()                             # a crash in native code says where it was
    # Where train() does not take it: before and after its loop.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    # A shell starts what it puts behind `&` with SIGINT ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if arguments.command == "fill":
        return fill_from_file(arguments.run_json, arguments.source, arguments.parent)
    train_from_file(arguments.run_json)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        # All is written and every process is here (Engine.close). One process of two once aborted
        # (SIGABRT, in CI), most likely in the teardown of its communication threads; it was not
        # seen again. Leave without that teardown.
        sys.stdout.flush()
        os._exit(0)


def benchmark_command(arguments) -> None:
    """What `benchmark.launch` starts."""
    from stentor.benchmark.run import run_file        # it needs lm_eval
    run_file(arguments.benchmark_json)


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
    except Exception as error:
        if type(error).__name__ != "PapermillExecutionError":
            raise
        # Without papermill's pages of context.
        told = error.evalue if error.ename in TOLD else error
        print(f"\n{told}", file=sys.stderr)
        return 2 if error.ename == "ParameterError" else 1
    if "02_pretrain_t4" in arguments.notebooks:
        print_summary(find_outputs(given.get("OUTPUTS", "outputs")) / given.get("RUN", "demo"))
    return 0


# Errors of a notebook whose message is written for the reader.
TOLD = ("ParameterError", "TrainingFailed", "TrainingDiverged", "EvaluationFailed", "FeedStopped",
        "CheckpointError", "SourceError", "SystemExit")


def demo_command(arguments) -> int:
    """What `make demo` starts; Ctrl-C ends it."""
    from stentor.demo.command import serve            # it needs Gradio
    try:
        serve(read_pairs(arguments.parameters))
    except ParameterError as error:
        print("\n".join(error._render_traceback_()), file=sys.stderr)
        return 2
    return 0


def space_command(arguments) -> None:
    """A folder for a Hugging Face Space of a run."""
    from stentor.demo.space import write_space        # it needs Gradio
    folder = write_space(arguments.run_dir, arguments.folder)
    print(f"{folder}: a Space of {sum(path.is_file() for path in folder.rglob('*'))} files; its "
          "README.md says how to push it.")


def gallery_command(arguments) -> None:
    """What `make gallery` starts."""
    from stentor.gallery import make_gallery          # it needs matplotlib
    make_gallery(arguments.run_dir, arguments.gallery, arguments.html)


def growth_command(arguments) -> None:
    """`growth`: does growing pay? The trial of `stentor.payoff`, of any recipe's optimiser, and its verdict."""
    from stentor.payoff import command
    print(command(arguments.folder, read_pairs(arguments.parameters)))


def results_command(arguments) -> None:
    """`results`: the figures of README.md and docs/, from outputs/."""
    written = write_results(arguments.run_dir, *arguments.pages)
    print(f"written: {', '.join(written)}")
    print_spread(arguments.run_dir)


def read_command_line(argv: list[str] | None) -> argparse.Namespace:
    about = __doc__.split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m stentor_utils", description=about)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name, does, help, *positional):
        made = commands.add_parser(name, help=help, description=help)
        for argument in positional:
            made.add_argument(argument, nargs="+" if argument in ("notebooks", "seeds", "pages") else None)
        made.set_defaults(does=does)
        return made
    for name, help, argument in (
            ("run", "execute notebooks with papermill", "notebooks"),
            ("seeds", "train a run's recipe again with other seeds", "seeds")):
        command(name, notebooks_command, help, argument).add_argument(
            "-p", dest="parameters", nargs="*", default=[], metavar="NAME=VALUE")
    command("demo", demo_command, "try the models of the runs in a browser").add_argument(
        "-p", dest="parameters", nargs="*", default=[], metavar="NAME=VALUE")
    command("space", space_command, "write a Hugging Face Space folder of a run",
            "run_dir").add_argument("folder", nargs="?", help="default: RUN_DIR/space")
    command("gallery", gallery_command, "put the pictures of a run into a folder, with their page",
            "run_dir", "gallery", "html")
    command("growth", growth_command, "compare grown models with one from scratch, over compute",
            "folder").add_argument("-p", dest="parameters", nargs="*", default=[],
                                   metavar="NAME=VALUE")
    command("train", train_command, "train the run described by a run.json", "run_json")
    fill = command("fill", train_command, "fill one source of a run that is being trained",
                   "run_json", "source")
    fill.add_argument("parent", nargs="?", type=int, help="the process to leave with")
    command("benchmark", benchmark_command, "score what a benchmark.json describes",
            "benchmark_json")
    command("summary", lambda arguments: print_summary(arguments.run_dir),
            "print what a run came to", "run_dir")
    command("recipes", lambda arguments: print_recipes(), "print the published recipes")
    command("results", results_command, "put the figures of outputs/ into README.md and docs/", "run_dir",
            "pages")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """`python -m stentor_utils COMMAND ...`: the exit code, see above."""
    arguments = read_command_line(argv)
    try:
        return arguments.does(arguments) or 0
    except StentorError as error:
        print(redact(str(error)), file=sys.stderr)
        return 1 if isinstance(error, (TrainingDiverged, TrainingFailed)) else 2
    except KeyboardInterrupt:
        return 130
