"""The model in a browser: a Gradio app with the five tabs of the Stentor3 card's demo space.

    python -m stentor_utils demo -p RUN=demo PORT=7860       what `make demo` starts
    python -m stentor_utils space outputs/demo               a complete Hugging Face Space folder

models      which there are; one thread that loads and runs them within a memory limit
generating  texts as they are written, the probabilities of tokens, a chat's prompt
arena       pairs of one size, votes in a file, a rating with its interval
page        every piece of HTML; `writing` and `talking` are the tabs, `app` puts them together
space       the folder for a Space; `pictures` takes the gallery's screenshots
"""
import importlib


def __getattr__(name: str):
    """`su.demo.models` and its like, when they are asked for: Gradio is not in every image."""
    if name.startswith("_"):
        raise AttributeError(name)
    try:
        return importlib.import_module(f"stentor.demo.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"stentor.demo.{name}":
            raise
        raise AttributeError(f"stentor.demo has no {name!r}") from None
