"""Notebooks executed by papermill, live on this terminal; values by their parameters' types."""
from __future__ import annotations

import ast
import difflib
import json
import math
import os
import re
import sys
import tempfile
from pathlib import Path

from stentor.files import ParameterError, write_atomically
from stentor.process import PROCESS_ENVIRONMENT
from stentor.parameters import run_name, string, writable_folder
from stentor.secrets import secret_problems
from stentor.session import find_outputs

HERE = Path(__file__).resolve().parents[1]


def _assignments(path):
    """(name, annotation or None, value), as ast nodes, of each in the cell tagged `parameters`."""
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
    """{name: "str", "int", "list[str]" ...}: the type written beside it, else its default's."""
    kinds = {}
    for name, annotation, value in _assignments(path):
        default = ast.literal_eval(value)
        of = f"[{type(default[0]).__name__}]" if isinstance(default, list) and default else ""
        kinds[name] = ast.unparse(annotation) if annotation else type(default).__name__ + of
    return kinds


def read_value(typed: str, kind: str, optional: bool):
    """What was typed on the command line as the value of a parameter of type `kind`.

    optional: "None" means None. Text is taken letter by letter. What does not fit the type comes
    back as it is, and the notebook's check names it. A list is a Python or JSON list, or items
    with commas between (a comma before a space belongs to its item).
    """
    if optional and typed == "None":
        return None
    if kind in ("int", "float"):
        for read in (int, float):
            try:
                value = read(typed)
                infinite = abs(value) == math.inf and "inf" not in typed.lower()     # 1e400 is not inf
                return typed if infinite else value
            except ValueError:
                pass
    elif kind == "bool":
        return {"true": True, "false": False}.get(typed.strip().lower(), typed)
    elif kind == "dict":
        return _plain(_literal(typed))
    elif kind.startswith("list"):
        item, value = kind[5:-1] or "str", _literal(typed)
        bracket = typed.lstrip()[:1] in ("[", "(")
        texts = isinstance(value, (list, tuple)) and all(isinstance(v, str) for v in value)
        if texts or bracket and isinstance(value, (list, tuple)):
            return _plain(value)
        if not bracket:                               # with one it was meant to be a list, and is none
            comma = ",(?! )" if item == "str" else ", *"
            return [read_value(part, item, False) for part in re.split(comma, typed)]
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
    """Execute notebooks, one after another; a parameter goes to each that knows it.

    given: {name: what was typed}. Executed copies go to <OUTPUTS>/<RUN>/notebooks/, but not that
    of a notebook that refused its parameters: nothing was started, nothing is left. Raises
    ParameterError for a name that no notebook knows.
    """
    paths = {name: HERE / "notebooks" / f"{name}.ipynb" for name in names}
    if absent := [name for name, path in paths.items() if not path.is_file()]:
        there = ", ".join(sorted(path.stem for path in (HERE / "notebooks").glob("*.ipynb")))
        raise ParameterError([f"there is no notebook {name!r}; there are {there}."
                              for name in absent])
    known = {name: notebook_parameters(path) for name, path in paths.items()}
    problems = given_problems(known, given)
    outputs, folders = find_outputs(given.get("OUTPUTS", "outputs")), {}
    if writable_folder(outputs):      # 06 draws what can only be read; the others refuse it themselves
        outputs = find_outputs("outputs")
    for name in names:
        default = ast.literal_eval(known[name].get("RUN", "'demo'"))
        runs = [run.strip() for run in given.get("RUN", default).split(",")]      # 06 takes several
        problems += [f"RUN = {run!r} {wrong}." for run in runs if (wrong := run_name(run))]
        folders[name] = outputs / "_vs_".join(runs) / "notebooks"
    if problems:
        raise ParameterError(list(dict.fromkeys(problems)))
    # The kernels inherit it: 04 trains in its own, and nobody looks at one that papermill started.
    for name, value in {**PROCESS_ENVIRONMENT, "STENTOR_PROGRESS": "log"}.items():
        os.environ.setdefault(name, value)
    for name, path in paths.items():
        print(f"\n=== {name} ===", flush=True)
        kinds, defaults = parameter_kinds(path), known[name]
        execute(path, folders[name], {
            key: read_value(typed, kinds[key], optional=defaults[key] == "None")
            for key, typed in given.items() if key in defaults})


def given_problems(known: dict[str, dict], given: dict[str, str]) -> list[str]:
    """What is wrong with parameters that were typed, before their values are read, in sentences.

    known: {notebook: its parameters}.
    """
    every = sorted({parameter for parameters in known.values() for parameter in parameters})
    problems = []
    for name, typed in given.items():
        if name not in every:
            near = difflib.get_close_matches(name.upper(), every, n=1, cutoff=0.6)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(every)}."
            problems.append(f"{name} is not a parameter of {', '.join(known)}; {hint}")
        if wrong := string(empty=True)(typed):
            problems.append(f"{name} = {typed!r} {wrong}.")
    return problems + secret_problems(**given)    # papermill writes parameters into the notebook


def execute(path: Path, folder: Path, parameters: dict) -> None:
    """Execute one notebook; its copy goes to `folder`, unless it refused its parameters."""
    import papermill
    with tempfile.TemporaryDirectory() as elsewhere:
        executed, refused = Path(elsewhere) / path.name, False
        try:
            papermill.execute_notebook(
                path, executed, cwd=HERE, progress_bar=False, parameters=parameters,
                kernel_name="python3",
                # No warning that the kernel's local socket is plain.
                extra_arguments=["--IPKernelApp.log_level=40"],
                # On a busy machine papermill's 60 and 4 s lose the run.
                start_timeout=3600, iopub_timeout=3600,
                stdout_file=sys.stdout, stderr_file=sys.stderr, log_output=False)
        except papermill.PapermillExecutionError as error:
            refused = error.ename == "ParameterError"
            raise
        finally:
            if executed.exists() and not refused:
                folder.mkdir(parents=True, exist_ok=True)
                write_atomically(folder / path.name, executed.read_bytes())
