"""`make demo`: its parameters, checked as a notebook's are."""
from __future__ import annotations

import ast
from importlib.util import find_spec

from stentor.files import ParameterError
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
    if find_spec("gradio") is None:
        raise ParameterError(["the demo needs Gradio, which is not installed: pip install "
                              "'gradio>=6.0'"])


def opened_demo(pairs: list[str]):
    """(Gradio Blocks, the parameters) for NAME=VALUE words, with nothing served yet."""
    from stentor.commands import read_pairs
    values = read_demo_parameters(read_pairs(pairs))
    needs_gradio()
    from stentor.demo.app import open_demo
    blocks = open_demo(find_outputs(values["OUTPUTS"]), values["RUN"], hub=values["HUB"],
                       baselines=values["BASELINES"], memory_gb=values["MEMORY_GB"])
    return blocks, values


def demo_command(pairs: list[str]) -> None:
    """Serve the demo until Ctrl-C."""
    blocks, values = opened_demo(pairs)
    from stentor.demo.app import close, start
    try:
        start(blocks, port=values["PORT"], share=values["SHARE"], wait=True)
    finally:
        close(blocks)
