"""Notebooks executed by papermill, live on this terminal, every value by the type of its parameter."""
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
        raise ParameterError([f"there is no notebook {name!r}; there are {there}." for name in absent])
    known = {name: notebook_parameters(path) for name, path in paths.items()}
    every = sorted({parameter for parameters in known.values() for parameter in parameters})
    problems = []
    for name, typed in given.items():
        if name not in every:
            near = difflib.get_close_matches(name.upper(), every, n=1, cutoff=0.6)
            problems.append(f"{name} is not a parameter of {', '.join(names)}; "
                            + (f"did you mean {near[0]}?" if near else f"known: {', '.join(every)}."))
        if wrong := string(empty=True)(typed):
            problems.append(f"{name} = {typed!r} {wrong}.")
    problems += secret_problems(**given)           # papermill writes parameters into the executed notebook
    outputs, folders = find_outputs(given.get("OUTPUTS", "outputs")), {}
    if writable_folder(outputs):                   # 06 draws what can only be read; the others refuse it themselves
        outputs = find_outputs("outputs")
    for name in names:
        runs = given.get("RUN", ast.literal_eval(known[name].get("RUN", "'demo'"))).split(",")       # 06 takes several
        problems += [f"RUN = {run!r} {wrong}." for run in runs if (wrong := run_name(run.strip()))]
        folders[name] = outputs / "_vs_".join(run.strip() for run in runs) / "notebooks"
    if problems:
        raise ParameterError(list(dict.fromkeys(problems)))
    for name, value in PROCESS_ENVIRONMENT.items():      # the kernels inherit it: 04 trains in its own
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
                write_atomically(folder / path.name, executed.read_bytes())
