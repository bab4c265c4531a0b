"""`make demo`: its parameters, checked as a notebook's are."""
from __future__ import annotations

import ast
import subprocess
import sys
from importlib import invalidate_caches
from importlib.metadata import PackageNotFoundError, version

from stentor.files import ParameterError
from stentor.kaggle import on_kaggle
from stentor.notebooks import given_problems, read_value
from stentor.parameters import items, number, read_parameters, run_name, string
from stentor.session import find_outputs

# {parameter: (kind, default as written, rule)}
PARAMETERS = {
    "RUN": ("str", "None", lambda value: None if value is None else run_name(value)),
    "OUTPUTS": ("str", "'outputs'", string()),
    "PORT": ("int", "None", number(1, 65535, integer=True, optional=True)),
    "SHARE": ("bool", "False", bool),
    "HUB": ("bool", "None", (bool, type(None))),
    "BASELINES": ("list[str]", "[]", items(string(), empty=True)),
    "MEMORY_GB": ("float", "None", number(0.01, 1000, optional=True)),
}


def read_demo_parameters(typed: dict[str, str]) -> dict:
    """{name: value} of PARAMETERS from what was typed; ParameterError with every problem."""
    defaults = {name: default for name, (_, default, _) in PARAMETERS.items()}
    problems = given_problems({"the demo": defaults}, typed)
    values = {name: ast.literal_eval(default) for name, default in defaults.items()}
    for name, text in typed.items():
        if name in PARAMETERS:
            kind, default, _ = PARAMETERS[name]
            values[name] = read_value(text, kind, optional=default == "None")
    spec = {name: rule for name, (_, _, rule) in PARAMETERS.items()}
    right, wrong = read_parameters(values, spec)
    if problems or wrong:
        raise ParameterError(problems + wrong)
    return right


def needs_gradio() -> None:
    """Gradio 6 can be imported. On Kaggle pip is tried; hub, numpy and transformers stay as they are.

    Raises ParameterError, one sentence, where there is none.
    """
    if _gradio() < 6 and on_kaggle():
        held = [f"{name}=={version(name)}" for name in ("huggingface_hub", "numpy", "transformers")]
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--retries", "1",
                        "--timeout", "15", "gradio>=6", *held], capture_output=True)
        invalidate_caches()
    if (found := _gradio()) < 6:
        there = f"version {found} is" if found else "none is"
        raise ParameterError([f"the demo needs Gradio 6 and {there} installed: pip install "
                              "'gradio>=6' (on Kaggle: switch the internet on, Settings)."])


def _gradio() -> int:
    """The first number of the installed Gradio's version; 0 without one."""
    try:
        return int(version("gradio").partition(".")[0])
    except PackageNotFoundError:
        return 0


def opened_demo(typed: dict[str, str]):
    """(Gradio Blocks, the parameters) for what was typed, with nothing served yet."""
    values = read_demo_parameters(typed)
    needs_gradio()
    from stentor.demo.app import open_demo
    blocks = open_demo(find_outputs(values["OUTPUTS"]), values["RUN"], hub=values["HUB"],
                       baselines=values["BASELINES"], memory_gb=values["MEMORY_GB"])
    return blocks, values


def serve(typed: dict[str, str]) -> None:
    """Serve the demo until Ctrl-C. typed: {name of PARAMETERS: what was typed}."""
    blocks, values = opened_demo(typed)
    from stentor.demo.app import close, start
    try:
        start(blocks, port=values["PORT"], share=values["SHARE"], wait=True)
    finally:
        close(blocks)
