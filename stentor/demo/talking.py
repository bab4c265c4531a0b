"""The tabs for judging and for talking: Arena and Chat."""
from __future__ import annotations

import html
import random
import secrets
import threading

import gradio as gr

from stentor.demo import arena, page
from stentor.demo.generating import chat_ids, settings_of, stream
from stentor.demo.models import closest
from stentor.demo.tab import WAITING, Demo, model_choice, sampling, seed_of, stop_button, told
from stentor.demo.writing import FIRST_PROMPT
from stentor.files import ParameterError

VOTES = {"A is better": "A is better", "B is better": "B is better", "Tie": "tie",
         "Both bad": "both bad"}


# Arena.

def arena_tab(demo: Demo) -> None:
    """Two models on one prompt: names shown, hidden until the vote, or drawn against a baseline."""
    round_ = gr.State(None)
    known = list(demo.models.entries.values())
    near = closest(known[0], known)                    # a pair of one size to begin with
    with gr.Row():
        mode = gr.Radio(list(arena.MODES), value="Show", label="Mode", info=(
            "Show: you choose. Blind: two of about one size, names hidden until you vote. Random: a "
            "model of yours against a baseline, names hidden."))
    with gr.Row() as sides:
        first = model_choice(demo, label="Model A")
        second = model_choice(demo, near[0].name if near else None, label="Model B")
    prompt = gr.Textbox(FIRST_PROMPT, label="Prompt", lines=2, max_lines=8)
    chosen = sampling(demo, first, chips=False, open=False)
    with gr.Row():
        start = gr.Button("Let both write", variant="primary", min_width=140)
        stop_button(demo, "arena")
    shown = gr.HTML(page.note("Two texts appear here; then vote. Kept are the two names, the mode, "
                              "your vote and the time, not your prompt."),
                    elem_id="arena", padding=False)
    with gr.Row(elem_classes="st-vote"):
        buttons = [gr.Button(label, interactive=False) for label in VOTES]
    table = gr.HTML(page.ratings(arena.rate(arena.read_votes(demo.votes))), elem_id="ratings",
                    padding=False)

    def compare(mode, first, second, prompt, temperature, top_p, repetition_penalty, max_new_tokens,
                seed, request: gr.Request = None):
        sliders = temperature, top_p, repetition_penalty, max_new_tokens
        names = first, second
        for shown, state, open_ in compared(demo, request, mode, names, prompt, sliders, seed):
            yield shown, state, *[gr.Button(interactive=open_)] * len(buttons)

    def vote(round_, choice):
        shown, state, ratings = voted(demo, round_, choice)
        return shown, state, ratings, *[gr.Button(interactive=False)] * len(buttons)
    mode.change(lambda mode: gr.Row(visible=mode == "Show"), mode, sides, queue=False,
                api_visibility="private")
    inputs = [mode, first, second, prompt, *chosen.inputs, chosen.seed]
    start.click(compare, inputs, [shown, round_, *buttons], api_name="compare", **WAITING)
    choice = gr.Textbox(visible=False)
    for button in buttons:
        button.click(lambda state, label=button.value: vote(state, label), round_,
                     [shown, round_, table, *buttons], queue=False, show_progress="hidden",
                     api_visibility="private")
    choice.submit(vote, [round_, choice], [shown, round_, table, *buttons], api_name="vote")


def compared(demo: Demo, request, mode, names, prompt, sliders, seed):
    """(HTML, the round, whether it can be voted on) while two models write, one after the other.

    A round whose names are hidden shows nothing by which to tell them: no speed, and an error
    without a name.
    """
    stop, hidden = demo.begin(request, "arena"), mode != "Show"
    yield page.note("Waiting for the models …"), None, False
    done, texts = [], []
    try:
        if mode not in arena.MODES:
            raise ParameterError([f"mode = {mode!r} must be one of {', '.join(arena.MODES)}."])
        settings, seed = settings_of(*sliders), seed_of(seed)
        if hidden:
            draw = random.Random(secrets.randbits(64))
            names = arena.draw_pair(list(demo.models.entries.values()), mode, draw)
        elif names[0] == names[1]:
            raise ParameterError(["Model A and Model B are the same; choose two."])
        for side, name in zip("AB", names):
            title, text = f"Model {side}" if hidden else f"{side} · {name}", None
            for text in stream(demo.models, name, prompt, settings, seed, stop):
                yield _pair([*done, page.card(text, title, figures=not hidden)]), None, False
            done.append(page.card(text, title, figures=not hidden))
            texts.append(text)
            if stop.is_set():
                yield _pair(done) + page.note("Stopped; nothing to vote on."), None, False
                return
        state = {"names": list(names), "mode": mode, "texts": texts, "lock": threading.Lock(),
                 "voted": False}
        yield _pair(done) + page.note("Which is better?"), Round(state), True
    except Exception as error:
        said = told(error)
        if hidden:
            for side, name in zip("AB", names):
                said = said.replace(name, f"Model {side}")
        yield _pair([*done, page.refused(said)]), None, False


class Round(dict):
    """What a page's round is; one vote each, however often it is sent."""

    def __deepcopy__(self, memo):          # Gradio copies a State's first value: the lock stays one
        return self

    def vote_once(self) -> bool:
        with self["lock"]:
            first, self["voted"] = not self["voted"], True
        return first


def _pair(items: list[str]) -> str:
    return page.cards(items, 2)


def voted(demo: Demo, round_, choice: str):
    """(HTML with the names, the round, the ratings) after a vote."""
    if not round_:
        return page.refused("There is nothing to vote on: let both write first."), None, gr.skip()
    if choice not in VOTES:
        return (page.refused(f"vote = {str(choice)[:40]!r} must be one of {', '.join(VOTES)}."), round_,
                gr.skip())
    try:
        if round_.vote_once():
            arena.add_vote(demo.votes, *round_["names"], VOTES[choice], round_["mode"])
        titles = [f"{side} · {name}" for side, name in zip("AB", round_["names"])]
        shown = _pair([page.card(text, title) for text, title in zip(round_["texts"], titles)])
        winner = {"A is better": titles[0], "B is better": titles[1]}.get(choice)
        said = f"Your vote: {choice}" + (f" ({winner})." if winner else ".")
        ratings = page.ratings(arena.rate(arena.read_votes(demo.votes)))
        return shown + page.note(said), None, ratings
    except Exception as error:
        return page.refused(told(error)), None, gr.skip()


# Chat.

def chat_tab(demo: Demo) -> None:
    """A conversation in the tokenizer's template, with the instruct model where there is one."""
    said = gr.State([])
    default = demo.models.chat_default()
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=280):
            model = model_choice(demo, default)
            system = gr.Textbox(demo.models.entries[default].system, label="System prompt", lines=2,
                                max_lines=8, info="what the model was tuned with, unless you change it")
            chosen = sampling(demo, model, open=False)
        with gr.Column(scale=4, min_width=300):
            window = gr.Chatbot([], label="Conversation", height=420, render_markdown=False,
                                sanitize_html=True, elem_id="chat", buttons=[],
                                placeholder="Ask something below.")
            note = gr.HTML("", elem_id="chat-note", padding=False)
            question = gr.Textbox(label="Your message", lines=1, max_lines=8,
                                  placeholder="Enter sends, Shift+Enter starts a new line")
            with gr.Row():
                send = gr.Button("Send", variant="primary", min_width=100)
                stop_button(demo, "chat")
                anew = gr.Button("New chat", min_width=100)

    def chat(model, system, message, said, temperature, top_p, repetition_penalty, max_new_tokens,
             seed, request: gr.Request = None):
        yield from chatted(demo, request, model, system, message, said,
                           (temperature, top_p, repetition_penalty, max_new_tokens), seed)
    inputs = [model, system, question, said, *chosen.inputs, chosen.seed]
    for event in (send.click, question.submit):
        event(chat, inputs, [window, said, question, note], api_name="chat", **WAITING)
    for clear in (anew.click, window.clear):
        clear(lambda: ([], [], "", ""), None, [window, said, question, note], queue=False,
              show_progress="hidden", api_visibility="private")
    model.change(lambda name: demo.models.entries[name].system if name in demo.models.entries else "",
                 model, system, queue=False, api_visibility="private")


def bubbles(messages: list[dict]) -> list[dict]:
    """Messages for the window, which takes even plain text for HTML: escaped, so that they show as
    they were typed, in lines as they were."""
    return [{**message, "content": html.escape(message["content"])} for message in messages]


def chatted(demo: Demo, request, model, system, message, said, sliders, seed):
    """(window, messages, question, note) while the model answers; messages: [{"role", "content"}]."""
    stop = demo.begin(request, "chat")
    if not message.strip():
        yield gr.skip(), gr.skip(), gr.skip(), page.note("Type a message first.")
        return
    asked = [*said, {"role": "user", "content": message}]
    yield bubbles(asked), gr.skip(), "", page.note(f"Waiting for {model} …")
    try:
        settings, text = settings_of(*sliders), None
        whole = [{"role": "system", "content": system}] * bool(system.strip()) + asked

        def ids_of(loaded, messages):
            return chat_ids(loaded, messages, settings["max_new_tokens"])
        for text in stream(demo.models, model, whole, settings, seed_of(seed), stop, ids_of):
            answer = {"role": "assistant", "content": text.text or "…"}
            yield bubbles([*asked, answer]), gr.skip(), gr.skip(), gr.skip()
        shown = {"role": "assistant", "content": text.text.strip() or "(no words: it ended at once)"}
        kept = [*asked, {"role": "assistant", "content": text.text}]
        below = " · ".join(filter(None, (text.figures(), text.note)))
        yield bubbles([*asked, shown]), kept, gr.skip(), page.note(below)
    except Exception as error:
        yield bubbles(said), gr.skip(), message, page.refused(told(error))
