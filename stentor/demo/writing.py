"""The tabs that write: Generate, Token Explorer, Temperature Sweep."""
from __future__ import annotations

import json
import time

import gradio as gr

from stentor.conversation import tokens
from stentor.demo import page
from stentor.demo.generating import probabilities, prompt_ids, settings_of, stream
from stentor.demo.tab import WAITING, Demo, model_choice, sampling, seed_of, stop_button, told
from stentor.files import ParameterError, write_atomically

FIRST_PROMPT = "Once upon a time"          # a widget of the cards
COMPLETIONS, KEPT = 5, 50                  # of one prompt, as the card's space; in the history


# Generate.

def generate_tab(demo: Demo) -> None:
    """Up to five completions of one prompt in sequence, and the history of this page."""
    past = gr.State([])
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=300):
            model = model_choice(demo)
            prompt = gr.Textbox(FIRST_PROMPT, label="Prompt", lines=3, max_lines=12,
                                info="The model goes on from here. Empty: from nothing.")
            chosen = sampling(demo, model, open=False)
            count = gr.Slider(1, COMPLETIONS, 1, step=1, label="Completions")
            with gr.Row():
                start = gr.Button("Generate", variant="primary", min_width=120)
                stop_button(demo, "generate")
        with gr.Column(scale=3, min_width=300):
            shown = gr.HTML(page.note("What the model writes appears here."),
                            elem_id="generated", padding=False)
    with gr.Accordion("History", open=False):
        rows = gr.HTML(page.history([]), elem_id="history", padding=False)
        file = gr.DownloadButton("Download as JSON", interactive=False, size="sm")

    def generate(model, prompt, temperature, top_p, repetition_penalty, max_new_tokens, seed,
                 completions, past, request: gr.Request = None):
        yield from completions_of(demo, request, model, prompt,
                                  (temperature, top_p, repetition_penalty, max_new_tokens), seed,
                                  completions, past)
    inputs = [model, prompt, *chosen.inputs, chosen.seed, count, past]
    for event in (start.click, prompt.submit):
        event(generate, inputs, [shown, past, rows, file], api_name="generate", **WAITING)


def completions_of(demo: Demo, request, model, prompt, sliders, seed, count, past):
    """(HTML, history, its HTML, its file) again and again, while the model writes."""
    stop, done = demo.begin(request, "generate"), []
    same = gr.skip(), gr.skip(), gr.skip()
    yield page.note(f"Waiting for {model} …"), *same
    try:
        settings, first = settings_of(*sliders), seed_of(seed)
        count = max(1, min(COMPLETIONS, int(count)))
        for i in range(count):
            title = f"{model} · {i + 1} of {count}" if count > 1 else str(model)
            text = None
            for text in stream(demo.models, model, prompt, settings, first + i, stop):
                yield page.cards([*done, page.card(text, title)]), *same
            done.append(page.card(text, title))
            past = [*past, _record(model, settings, first + i, text)][-KEPT:]
            yield page.cards(done), past, page.history(past), _download(demo, request, past)
            if stop.is_set():
                break
    except Exception as error:
        yield page.cards([*done, page.refused(told(error))]), *same


def _record(model: str, settings: dict, seed: int, text) -> dict:
    """A line of the history, as the JSON file has it."""
    return {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "model": model,
            "settings": settings, "seed": seed, "prompt": text.prompt, "text": text.text,
            "tokens": text.tokens, "seconds": round(text.seconds, 3),
            "tokens_per_second": round(text.speed, 1), "ended": text.ended}


def _download(demo: Demo, request, past: list[dict]) -> gr.DownloadButton:
    """The button with the history's file."""
    path = demo.private(request) / "stentor-history.json"
    write_atomically(path, json.dumps(past, indent=1, ensure_ascii=False))
    return gr.DownloadButton(value=str(path), interactive=True)


# Token Explorer.

def explorer_tab(demo: Demo) -> None:
    """Tokens coloured by probability, each with the eight likeliest; any of them can be taken."""
    at = gr.State(None)
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=280):
            model = model_choice(demo)
            prompt = gr.Textbox(FIRST_PROMPT, label="Prompt, or a text to be judged", lines=4,
                                max_lines=14)
            chosen = sampling(demo, model, chips=False, open=False)
            with gr.Row():
                start = gr.Button("Generate", variant="primary", size="md", min_width=90)
                judge = gr.Button("Judge text", size="md", min_width=90)
                stop_button(demo, "explore", size="md")
        with gr.Column(scale=4, min_width=300):
            shown = gr.HTML(page.legend(), elem_id="explorer", padding=False,
                            js_on_load=page.explorer_script())

    def explore(model, prompt, temperature, top_p, repetition_penalty, max_new_tokens, seed,
                request: gr.Request = None):
        yield from explored(demo, request, model, prompt,
                            (temperature, top_p, repetition_penalty, max_new_tokens), seed)

    def surprise(model, text, request: gr.Request = None):
        yield from explored(demo, request, model, text, None, None)

    def branch(at, temperature, top_p, repetition_penalty, max_new_tokens, seed,
               chosen: gr.EventData, request: gr.Request = None):
        if not at:
            return
        place, choice = chosen.place, chosen.choice
        yield from branched(demo, request, at, place, choice,
                            (temperature, top_p, repetition_penalty, max_new_tokens), seed)
    sliders = [*chosen.inputs, chosen.seed]
    start.click(explore, [model, prompt, *sliders], [shown, at], api_name="explore", **WAITING)
    judge.click(surprise, [model, prompt], [shown, at], api_name="judge", **WAITING)
    shown.submit(branch, [at, *sliders], [shown, at], api_visibility="private", **WAITING)


def explored(demo: Demo, request, model, prompt, sliders, seed):
    """(HTML, where it stands) of a prompt and what the model writes; sliders None: of a text alone."""
    stop = demo.begin(request, "explore")
    yield page.note(f"Waiting for {model} …"), gr.skip()
    try:
        if sliders is None:
            ids = demo.models.submit(_text_ids, demo, model, prompt).result()
        else:
            text = None
            for text in stream(demo.models, model, prompt, settings_of(*sliders), seed_of(seed), stop):
                yield page.cards([page.card(text, model)]), gr.skip()
            ids = text.ids
        yield from _coloured(demo, model, ids)
    except Exception as error:
        yield page.refused(told(error)), gr.skip()


def branched(demo: Demo, request, at: dict, place, choice, sliders, seed):
    """The same for a text that goes on with another token at `place`."""
    stop = demo.begin(request, "explore")
    try:
        ids, model = at["ids"], at["model"]
        if not (isinstance(place, int) and 0 <= place < len(ids)):
            raise ParameterError([f"There is no token {place!r} in this text."])

        def taken(loaded, _):
            rows = loaded.model.config.get_text_config().vocab_size
            if not (isinstance(choice, int) and 0 <= choice < rows):
                raise ParameterError([f"There is no token {choice!r} in this vocabulary."])
            return [*ids[:place], choice]
        text = None
        for text in stream(demo.models, model, "", settings_of(*sliders), seed_of(seed), stop, taken):
            yield page.cards([page.card(text, model)]), gr.skip()
        yield from _coloured(demo, model, text.ids)
    except Exception as error:
        yield page.refused(told(error)), gr.skip()


def _text_ids(demo: Demo, model: str, text: str) -> list[int]:
    loaded = demo.models.load(model)
    prompt_ids(loaded, text)               # what is too long is refused
    ids = tokens(loaded.tokenizer, text, plain=True)
    if not ids:
        raise ParameterError(["There is no text to judge: type or paste one."])
    return ids


def _coloured(demo: Demo, model: str, ids: list[int]):
    def judged():
        return probabilities(demo.models.load(model), ids)
    seen = demo.models.submit(judged).result()
    yield page.tokens(seen), {"model": model, "ids": ids}


# Temperature Sweep.

def sweep_tab(demo: Demo) -> None:
    """One prompt at two or three temperatures, side by side, from one seed."""
    with gr.Row():
        model = model_choice(demo)
        count = gr.Radio(["2", "3"], value="3", label="How many temperatures")
    prompt = gr.Textbox(FIRST_PROMPT, label="Prompt", lines=2, max_lines=8)
    with gr.Row():
        warmth = [gr.Slider(0, 2, value, step=0.05, label=f"Temperature {i}", min_width=160)
                  for i, value in enumerate((0.3, 0.7, 1.2), 1)]
    chosen = sampling(demo, model, chips=False, temperature=False, open=False)
    with gr.Row():
        start = gr.Button("Sweep", variant="primary", min_width=120)
        stop_button(demo, "sweep")
    shown = gr.HTML(page.note("The texts appear here side by side."), elem_id="swept", padding=False)

    def sweep(model, prompt, count, first, second, third, top_p, repetition_penalty, max_new_tokens,
              seed, request: gr.Request = None):
        yield from swept(demo, request, model, prompt, [first, second, third][:int(count)],
                         (top_p, repetition_penalty, max_new_tokens), seed)
    count.change(lambda count: gr.Slider(visible=count == "3"), count, warmth[2], queue=False,
                 api_visibility="private")
    inputs = [model, prompt, count, *warmth, *chosen.inputs[1:], chosen.seed]
    start.click(sweep, inputs, shown, api_name="sweep", **WAITING)


def swept(demo: Demo, request, model, prompt, temperatures, others, seed):
    """HTML of a text at each temperature, one after the other, all from one seed."""
    stop, done, columns = demo.begin(request, "sweep"), [], len(temperatures)
    yield page.note(f"Waiting for {model} …")
    try:
        seed = seed_of(seed)
        every = [settings_of(warm, *others) for warm in temperatures]
        for warm, settings in zip(temperatures, every):
            title, text = f"temperature {warm:g}", None
            for text in stream(demo.models, model, prompt, settings, seed, stop):
                yield page.cards([*done, page.card(text, title)], columns)
            done.append(page.card(text, title))
            if stop.is_set():
                break
        yield page.cards(done, columns) + page.note(f"All from seed {seed:,}.")
    except Exception as error:
        yield page.cards([*done, page.refused(told(error))], columns)
