"""What a model writes, as it writes it; how sure it was of each token; what a reader asked for.

transformers' own `generate` does the work, in the model's thread: the text is that of `su.generate`
with the same seed and settings.
"""
from __future__ import annotations

import dataclasses
import queue
import threading
import time

import torch

from stentor.conversation import fit_chat, tokens
from stentor.demo.models import Loaded, Models
from stentor.files import ParameterError
from stentor.parameters import generation_settings

LONGEST_PROMPT = 200_000                   # characters that are tokenised before one is refused
SHOW_EVERY = 0.12                          # seconds between two pictures of a growing text
ALTERNATIVES = 8                           # as many as the Stentor3 card's space shows


@dataclasses.dataclass
class Text:
    """A text as far as it is written."""
    prompt: str
    text: str = ""
    tokens: int = 0
    seconds: float = 0.0
    ended: str = ""                        # why no more comes: "end of text", "length", "stopped"
    note: str = ""                         # what the reader should know: the context was nearly full
    ids: list[int] = dataclasses.field(default_factory=list)     # of the prompt and the text

    @property
    def speed(self) -> float:
        """Tokens a second; 0 before the first."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def figures(self) -> str:
        """"80 tokens in 1.3 s, 62 tokens/s"."""
        return f"{self.tokens:,} tokens in {self.seconds:.1f} s, {self.speed:,.0f} tokens/s"


class Words:
    """Text of ids as they come: whole characters only, no special tokens.

    What `push` returns one after the other, with `flush` at the end, is what the tokenizer's decode
    makes of all ids without special tokens (but for white space that decode itself takes away).
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.special = set(tokenizer.all_special_ids)
        vocabulary = getattr(tokenizer, "vocabulary", None)
        self.own = vocabulary.decoder() if vocabulary is not None else None
        self.rows = vocabulary.n_ids if vocabulary is not None else None
        self.ids, self.shown = [], ""

    def push(self, token: int) -> str:
        """The text that is complete with this token."""
        if self.own is not None:
            if token in self.special or token >= self.rows:
                return self.own.flush()
            return self.own.push(token)
        if token in self.special:
            return ""
        # Other tokenizers decode from the start: a token's text depends on what stands before it.
        self.ids.append(token)
        whole = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        if whole.endswith("\ufffd"):
            return ""
        new, self.shown = whole[len(self.shown):], whole
        return new

    def flush(self) -> str:
        """What no more tokens will complete: the bytes of a broken character, as U+FFFD."""
        if self.own is not None:
            return self.own.flush()
        whole = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        new, self.shown = whole[len(self.shown):], whole
        return new


# What is asked.

def settings_of(temperature, top_p, repetition_penalty, max_new_tokens) -> dict:
    """Settings for `generate`; temperature 0 is greedy. ParameterError, one sentence for each problem.

    Every name and range is that of a notebook's GENERATION.
    """
    given = {"top_p": top_p, "repetition_penalty": repetition_penalty,
             "max_new_tokens": max_new_tokens, "do_sample": bool(temperature)}
    if temperature:
        given["temperature"] = temperature
    if wrong := generation_settings(given):
        raise ParameterError([f"The settings: {wrong.removeprefix('has ')}."])
    settings = generation_settings.convert(given)
    if not temperature:                    # top_p has no meaning then, and transformers says so
        settings |= {"temperature": 1.0, "top_p": 1.0}
    for name in ("temperature", "repetition_penalty", "top_p"):
        settings[name] = float(settings[name])      # transformers refuses a whole number
    return settings


def prompt_ids(loaded: Loaded, prompt: str) -> list[int]:
    """Ids of a prompt, in which a special token that was typed is text. Empty: EOS, as in training.

    Raises ParameterError for one that leaves no room to write in the model's context.
    """
    if len(prompt) > LONGEST_PROMPT:
        raise ParameterError([f"The prompt has {len(prompt):,} characters; the demo reads at most "
                              f"{LONGEST_PROMPT:,}: shorten it."])
    prompt = prompt.encode("utf-8", "replace").decode()         # no half of an emoji
    tokenizer = loaded.tokenizer
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if hasattr(tokenizer, "vocabulary"):
        start = tokenizer.eos_token_id                          # what stands before each document
    ids = tokens(tokenizer, prompt, plain=True) or [start if start is not None else 0]
    if len(ids) >= loaded.context:
        raise ParameterError([
            f"The prompt has {len(ids):,} tokens, and {loaded.entry.name} holds {loaded.context:,} "
            "of prompt and answer together: shorten the prompt."])
    return ids


def fit_settings(loaded: Loaded, ids: list[int], settings: dict) -> tuple[dict, str]:
    """(the settings with no more tokens than the context has room for, a note where that is fewer)."""
    room, wanted = loaded.context - len(ids), settings["max_new_tokens"]
    if wanted <= room:
        return settings, ""
    note = f"room for {room:,} of {wanted:,} tokens: the model's context is {loaded.context:,}"
    return {**settings, "max_new_tokens": room}, note


# Writing.

class _Streamer:
    """What `generate` hands each token to: into a queue, for whoever shows it."""

    def __init__(self, put):
        self.hand_on, self.prompt_seen = put, False

    def put(self, value):
        if self.prompt_seen:
            self.hand_on(int(value.reshape(-1)[0]))
        self.prompt_seen = True

    def end(self):
        pass


def write(loaded: Loaded, ids: list[int], settings: dict, seed: int, hand_on=None,
          stopped=lambda: False) -> list[int]:
    """The new ids of one continuation. In the model's thread only.

    hand_on(token) is called with each as it is chosen; `stopped()` true ends it early.
    """
    from transformers import GenerationConfig, StoppingCriteriaList
    model, tokenizer = loaded.model, loaded.tokenizer
    prompt = torch.tensor([ids], device=model.device)
    ends = model.generation_config.eos_token_id
    ends = tokenizer.eos_token_id if ends is None else ends
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    torch.manual_seed(seed)
    halt = StoppingCriteriaList([lambda ids, scores, **_: torch.full(
        (ids.shape[0],), stopped(), device=ids.device, dtype=torch.bool)])
    with torch.inference_mode():
        out = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), stopping_criteria=halt,
            generation_config=GenerationConfig(use_cache=True, eos_token_id=ends, pad_token_id=pad,
                                               **settings),
            streamer=_Streamer(hand_on) if hand_on else None)
    return out[0, len(ids):].tolist()


def stream(models: Models, name: str, prompt, settings: dict, seed: int, stop: threading.Event,
           ids_of=prompt_ids):
    """A continuation of `prompt` by the model `name`, as `Text`s: about eight a second, and the last.

    ids_of(loaded, prompt) gives the prompt's ids. Raises what loading or ids_of refuses. Where the
    reader of this generator goes away, or sets `stop`, the model stops at its next token.
    """
    said, gone = queue.SimpleQueue(), threading.Event()

    def work():
        loaded = models.load(name)
        ids = ids_of(loaded, prompt)
        fitted, note = fit_settings(loaded, ids, settings)
        said.put((loaded, ids, note))
        write(loaded, ids, fitted, seed, said.put, lambda: stop.is_set() or gone.is_set())

    done = models.submit(work)
    done.add_done_callback(lambda _: said.put(None))
    try:
        first = said.get()
        if first is None:
            done.result()                  # what it refused
            return
        yield from _texts(first, said, prompt, settings, stop, done)
    finally:
        gone.set()


def _texts(first, said, prompt, settings, stop, done):
    """`Text`s of what comes out of the queue."""
    loaded, ids, note = first
    words = Words(loaded.tokenizer)
    ends = loaded.model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends, loaded.tokenizer.eos_token_id])
    text = Text(prompt if isinstance(prompt, str) else "", note=note, ids=list(ids))
    began = shown = time.monotonic()
    last = None
    while (token := said.get()) is not None:
        last, text.tokens = token, text.tokens + 1
        text.ids.append(token)
        text.text += words.push(token)
        text.seconds = (now := time.monotonic()) - began
        if now - shown >= SHOW_EVERY:
            shown = now
            yield dataclasses.replace(text)
    done.result()
    text.text += words.flush()
    text.ended = "end of text" if last in ends else "stopped" if stop.is_set() else "length"
    yield text


# How sure.

def probabilities(loaded: Loaded, ids: list[int]) -> list[dict]:
    """For each id, its probability given those before it, and the likeliest in its place.

    [{"id", "text", "label", "probability", "rank", "alternatives": [{"id", "text", "probability"}]}],
    the model's own (temperature 1, no penalty): one softmax over its logits, in float32. The first
    token of a text is judged after EOS, as in training; of a text longer than the context only the
    last tokens are judged. In the model's thread only.
    """
    lead = loaded.tokenizer.eos_token_id
    first = [lead if lead is not None else ids[0]]
    whole = (first + list(ids))[-loaded.context - 1:]
    dropped = len(ids) + 1 - len(whole)
    with torch.inference_mode():
        logits = loaded.model(torch.tensor([whole[:-1]], device=loaded.model.device)).logits[0]
        rows = logits.float().softmax(-1)
        top, which = rows.topk(min(ALTERNATIVES, rows.shape[-1]), -1)
        chosen = torch.tensor(whole[1:], device=rows.device)
        own = rows.gather(-1, chosen[:, None])[:, 0]
        ranks = (rows > own[:, None]).sum(-1) + 1
    words, seen = Words(loaded.tokenizer), []
    for token in ids[:dropped]:
        words.push(token)
    for token, p, rank, ps, tokens_ in zip(chosen.tolist(), own.tolist(), ranks.tolist(),
                                           top.tolist(), which.tolist()):
        seen.append({"id": token, "text": words.push(token), "label": label(loaded, token),
                     "probability": p, "rank": rank,
                     "alternatives": [{"id": i, "text": label(loaded, i), "probability": q}
                                      for i, q in zip(tokens_, ps)]})
    return seen


def label(loaded: Loaded, token: int) -> str:
    """A token by itself, for a reader: spaces and line ends visible, bytes of a character as hex."""
    tokenizer = loaded.tokenizer
    if token in tokenizer.all_special_ids:
        return str(tokenizer.convert_ids_to_tokens(token))
    vocabulary = getattr(tokenizer, "vocabulary", None)
    if vocabulary is not None and token < vocabulary.n_ids:
        data = vocabulary.tokens[token]
        text = data.decode("utf-8", "backslashreplace")
    else:
        text = tokenizer.decode([token])
        if "\ufffd" in text:
            text = str(tokenizer.convert_ids_to_tokens(token))
    for hidden, shown in ((" ", "␣"), ("\n", "↵"), ("\t", "⇥"), ("\x7f", "⌫")):
        text = text.replace(hidden, shown)    # ⌫: capcode's mark that the next word has no space
    return text or "(nothing)"


def chat_ids(loaded: Loaded, messages: list[dict], max_new_tokens: int) -> list[int]:
    """Ids of a chat that ends with a question, trimmed as in training to leave room for an answer.

    A quarter of the context at least is the question's, as in 04's probe. Raises ParameterError for
    a model without a chat template.
    """
    tokenizer = loaded.tokenizer
    if not tokenizer.chat_template:
        raise ParameterError([f"{loaded.entry.name} has no chat template: it was never taught to "
                              "answer. Choose an instruct model."])
    if tokenizer.eos_token_id is None:
        raise ParameterError([f"{loaded.entry.name} has no end of text, by which an answer ends: "
                              "choose another model."])
    longest = 4 * LONGEST_PROMPT
    if sum(len(message["content"]) for message in messages) > longest:
        messages = messages[:1] * (messages[0]["role"] == "system") + messages[-1:]
    room = loaded.context - min(max_new_tokens, loaded.context // 4)
    return fit_chat(tokenizer, messages, room)[0]
