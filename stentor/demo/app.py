"""The Gradio app: five tabs of one page, and how it is started."""
from __future__ import annotations

import html
import os
import shutil
from pathlib import Path

import gradio as gr

from stentor.charts import BLUE, MODEL_COLOURS
from stentor.demo import page
from stentor.demo.generating import settings_of, write
from stentor.demo.models import Models, find_models
from stentor.demo.tab import Demo
from stentor.demo.talking import arena_tab, chat_tab
from stentor.demo.writing import explorer_tab, generate_tab, sweep_tab
from stentor.files import ParameterError

TABS = {"Generate": generate_tab, "Token Explorer": explorer_tab, "Temperature Sweep": sweep_tab,
        "Arena": arena_tab, "Chat": chat_tab}
DARK_BLUE = MODEL_COLOURS["stentor2-30m"]
QUEUE = 64                                 # requests that may wait; more are told that it is full


def build(models: Models, votes, title: str = "Stentor") -> gr.Blocks:
    """The page; `votes` is the arena's file. Start it with `start`."""
    demo = Demo(models, Path(votes))
    with gr.Blocks(title=f"{title}: try the model", analytics_enabled=False,
                   delete_cache=(3600, 86400)) as blocks:
        gr.HTML(f'<div class="st-title"><h1>{html.escape(title)}</h1><p>Small language models, '
                'trained from scratch. They invent freely: take nothing they say for a fact.</p></div>',
                padding=False)
        with gr.Tabs():
            for name, make in TABS.items():
                with gr.Tab(name):
                    make(demo)

        def leave(request: gr.Request):
            demo.leave(request)
        blocks.unload(leave)
    blocks.queue(max_size=QUEUE, default_concurrency_limit=16)
    blocks.stentor = demo
    return blocks


def theme() -> gr.themes.Base:
    """The reader's own fonts, so that nothing is fetched; the suite's blue; grey that can be read."""
    blue = gr.themes.Color("#EEF6FB", "#D6EAF5", "#AED5EA", "#7DBCDD", "#3D9BD6", BLUE, "#0B65A3",
                           "#0A5485", "#083F66", DARK_BLUE, "#04253F")
    soft = gr.themes.Soft(primary_hue=blue, neutral_hue="slate", font=["system-ui", "sans-serif"],
                          font_mono=["ui-monospace", "monospace"])
    return soft.set(
        body_text_color_subdued="*neutral_600", body_text_color_subdued_dark="*neutral_300",
        block_info_text_color="*neutral_600", block_info_text_color_dark="*neutral_300",
        block_title_text_color="*neutral_700", block_title_text_color_dark="*neutral_200",
        block_title_background_fill="none", block_title_padding="0",
        block_label_text_color="*neutral_700", block_label_text_color_dark="*neutral_200",
        button_primary_background_fill=BLUE, button_primary_background_fill_dark=BLUE,
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_hover_dark="*primary_700",
        button_primary_text_color="white", button_primary_text_color_dark="white")


def start(blocks: gr.Blocks, *, host: str | None = "127.0.0.1", port: int | None = None,
          share: bool = False, wait: bool = False, **how) -> str:
    """Serve the page, and load the first model meanwhile; its address.

    host, port: None are Gradio's own, the first free port from 7860 on. share: a public address
    for 72 hours, which needs internet: whoever knows it can use the demo. wait: until Ctrl-C.
    Raises ParameterError where the port is taken.
    """
    demo = blocks.stentor
    demo.models.submit(_warm, demo.models)
    try:
        _, local, public = blocks.launch(
            server_name=host, server_port=port, share=share, prevent_thread_lock=True, quiet=True,
            theme=theme(), css=page.css(), footer_links=["settings"], ssr_mode=False,
            show_error=False, max_file_size=1, **how)
    except OSError as error:
        raise ParameterError([f"PORT = {port} cannot be used ({error}); choose another."]) from None
    address = public or local
    print(f"The demo is open at {address} (Ctrl-C ends it)" if wait else
          f"The demo is open at {address}", flush=True)
    if wait:
        blocks.block_thread()
    return address


def _warm(models: Models) -> None:
    """The first answer takes no longer than the second."""
    try:
        loaded = models.load(models.names[0])
        write(loaded, [loaded.tokenizer.eos_token_id or 0], settings_of(1, 1, 1, 2), 0)
    except Exception as error:             # the page says it when it is asked
        print(f"{models.names[0]} could not be loaded yet: {error}", flush=True)


def close(blocks: gr.Blocks) -> None:
    """Ends the server and the models' thread; the files of histories go."""
    blocks.close(verbose=False)
    blocks.stentor.models.close()
    shutil.rmtree(blocks.stentor.folder, ignore_errors=True)


def open_demo(outputs, run: str | None = None, *, baselines=(), hub: bool | None = None,
              memory_gb: float | None = None, votes=None) -> gr.Blocks:
    """The page for all models of `outputs`, those of `run` first (None: the newest run).

    baselines, hub: as for `find_models`. votes: None is arena_votes.jsonl in `outputs`.
    """
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    entries = find_models(outputs, baselines, hub)
    first = [entry for entry in entries
             if run and Path(entry.where).is_relative_to(Path(outputs) / run)]
    if run and not first:
        there = ", ".join(entry.name for entry in entries) or "no model yet"
        raise ParameterError([f"RUN = {run!r} has no model in {outputs}, which holds {there}; run "
                              "notebook 02 or 03 for it first."])
    rest = [entry for entry in entries if entry not in first]
    models = Models(first + rest, limit=int(memory_gb * 1e9) if memory_gb else None)
    return build(models, votes or Path(outputs) / "arena_votes.jsonl")
