"""What the five tabs share: the models, who may stop what, the sliders."""
from __future__ import annotations

import contextlib
import random
import secrets
import shutil
import tempfile
import threading
import traceback
from dataclasses import dataclass, field
from pathlib import Path

import gradio as gr

from stentor.demo.models import Models
from stentor.demo.presets import NAMES, preset
from stentor.files import ParameterError, StentorError
from stentor.parameters import number
from stentor.secrets import redact

# All that works with a model: this many may wait for it at once, the rest waits in Gradio's queue.
WAITING = {"concurrency_id": "model", "concurrency_limit": 16, "show_progress": "hidden"}


@dataclass
class Demo:
    """What every tab needs."""
    models: Models
    votes: Path                            # the arena's file
    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="stentor-demo-")))
    _stops: dict = field(default_factory=dict)
    _private: dict = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def begin(self, request, tab: str) -> threading.Event:
        """The event that Stop sets, of a new piece of work of this page and tab."""
        stop = threading.Event()
        with self._lock:
            self._stops[_session(request), tab] = stop
        return stop

    def stop(self, request, tab: str) -> None:
        if found := self._stops.get((_session(request), tab)):
            found.set()

    def private(self, request) -> Path:
        """A folder of this page, by a name that nobody can guess; it goes with the page."""
        with self._lock:
            if _session(request) not in self._private:
                made = self.folder / secrets.token_urlsafe(16)
                made.mkdir(parents=True)
                self._private[_session(request)] = made
            return self._private[_session(request)]

    def leave(self, request) -> None:
        """A page was closed: what it waits for stops, its file goes."""
        with self._lock:
            for key in [key for key in self._stops if key[0] == _session(request)]:
                self._stops.pop(key).set()
            if made := self._private.pop(_session(request), None):
                shutil.rmtree(made, ignore_errors=True)

    def recipe(self, name: str) -> str:
        entry = self.models.entries.get(name)
        return entry.recipe if entry else ""


def _session(request) -> str:
    return getattr(request, "session_hash", None) or ""


def seed_of(seed) -> int:
    """The seed asked for, a number or its text; a new one for an empty field. ParameterError for
    what is no seed."""
    if seed is None or not str(seed).strip():
        return random.randrange(2**31)
    with contextlib.suppress(ValueError):
        seed = float(seed)
    if wrong := number(0, 2**31 - 1, integer=True)(seed):
        raise ParameterError([f"Seed = {seed} {wrong}."])
    return int(seed)


def told(error: Exception) -> str:
    """What a page says of an error: our own sentences; of others only that there was one."""
    if isinstance(error, StentorError):
        return redact(str(error))
    traceback.print_exception(error)       # for whoever runs the demo
    return f"Something went wrong ({type(error).__name__}); the demo's terminal says what."


# Pieces of the form.

def model_choice(demo: Demo, value: str | None = None, label: str = "Model") -> gr.Dropdown:
    return gr.Dropdown(demo.models.names, value=value or demo.models.names[0], label=label,
                       filterable=len(demo.models.names) > 8)


@dataclass
class Sampling:
    """The sliders; `inputs` in the order of `generating.settings_of`."""
    inputs: list
    seed: gr.Textbox


def sampling(demo: Demo, model: gr.Dropdown, chips: bool = True, temperature: bool = True,
             open: bool = True) -> Sampling:
    """Chips and sliders, set to Balanced for the first model."""
    (warm, top_p, penalty, length), card = preset("Balanced", demo.recipe(model.value))
    buttons = []
    if chips:
        with gr.Row(elem_classes="st-chips"):
            buttons = [gr.Button(name, size="sm", min_width=90) for name in NAMES]
    about = gr.HTML(_source(card), visible=chips, padding=False)
    with gr.Accordion("Settings", open=open):
        sliders = [
            gr.Slider(0, 2, warm, step=0.05, label="Temperature", visible=temperature,
                      info="0 always takes the likeliest token"),
            gr.Slider(0.05, 1, top_p, step=0.05, label="Top-p",
                      info="only the likeliest tokens that together have this probability"),
            gr.Slider(1, 2, penalty, step=0.05, label="Repetition penalty", info="1 is none"),
            gr.Slider(1, 1000, length, step=1, label="New tokens at most")]
        # No gr.Number: an empty one says 0 as soon as the accordion is opened (Gradio 6.31).
        seed = gr.Textbox("", label="Seed", info="empty: another text every time")
    for button in buttons:
        button.click(lambda name, chip=button.value: _chip(demo, chip, name), model,
                     [*sliders, about], queue=False, api_visibility="private")
    return Sampling(sliders, seed)


def _source(card: str) -> str:
    return f'<p class="st-note">Presets from the ranges of the {card} card.</p>'


def _chip(demo: Demo, chip: str, name: str):
    values, card = preset(chip, demo.recipe(name))
    return [*values, _source(card)]


def stop_button(demo: Demo, tab: str, size: str = "lg") -> gr.Button:
    """Stops what this page waits for in this tab, at the next token."""
    button = gr.Button("Stop", variant="stop", size=size, min_width=70)

    def stop(request: gr.Request):
        demo.stop(request, tab)
    button.click(stop, queue=False, show_progress="hidden", api_visibility="private")
    return button
