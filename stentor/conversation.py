"""A conversation as the tokens of a model: the chat template, and what goes when it is too long.

04_instruct_sft trains on what these functions give, and the demo's chat asks with them, so that a
model sees in use what it saw in training.
"""
from __future__ import annotations

import functools
import itertools


def text_of(content) -> str:
    """The text of a message's content: a string, or a list of text parts, which are joined.

    Raises ValueError for a part that is no text, such as a picture.
    """
    parts = [content] if isinstance(content, str) else content or []
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    for part, text in zip(parts, texts):
        if not isinstance(text, str):
            raise ValueError("a message's content must be text or a list of text parts, not "
                             f"{str(part)[:60]}.")
    return "".join(texts)


def without_special(tokenizer, text: str) -> str:
    """`text` without any special token written out in it: nobody may type an EOS."""
    def shortened_once(text):
        special = tokenizer.all_special_tokens
        return functools.reduce(lambda t, token: t.replace(token, ""), special, text)
    while (shorter := shortened_once(text)) != text:
        text = shorter
    return text


def render(tokenizer, messages, plain: bool = False) -> str:
    """The text a model is prompted with: `messages` in the chat template, opened for the assistant.

    plain: what they hold stays as it was typed, for `tokens` with `plain`, which makes no special
    token of it; otherwise special tokens written out in it are left out.
    """
    def clean(message):
        text = text_of(message["content"])
        return {**message, "content": text if plain else without_special(tokenizer, text)}
    messages = [clean(message) for message in messages]
    if messages:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    said = [{"role": "assistant", "content": "ANSWER"}]   # transformers renders no empty conversation
    return tokenizer.apply_chat_template(said, tokenize=False).partition("ANSWER")[0]


def tokens(tokenizer, text: str, plain: bool = False) -> list[int]:
    """Ids of a text, none added; plain: special tokens written out in it are text like any other."""
    how = {"split_special_tokens": True} if plain else {}
    return tokenizer(text, add_special_tokens=False, **how)["input_ids"]


def pieces_of(tokenizer, messages, plain: bool = False) -> list[tuple[str, list[int], bool]]:
    """[(text, ids, whether it is in the loss)] of a conversation in turn, up to its last answer.

    A prompt is encoded in one go, as it is when the model is asked; an answer by itself, as it is
    generated, with its EOS.
    """
    pieces, rendered = [], ""
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt, answer = render(tokenizer, messages[:i], plain), text_of(message["content"])
            answer = answer if plain else without_special(tokenizer, answer)
            if not prompt.startswith(rendered):
                raise ValueError("the chat template changes earlier turns when one is added; "
                                 "encode single turns only.")
            opening, rendered = prompt[len(rendered):], prompt + answer + tokenizer.eos_token
            pieces += [(opening, tokens(tokenizer, opening, plain), False),
                       (answer, [*tokens(tokenizer, answer, plain), tokenizer.eos_token_id], True)]
    return pieces


# What is too long is cut as text and then encoded: the model sees in training what it will see when
# it is asked, and the marker that opens its answer is never cut or frayed.

def shortened(tokenizer, text: str, excess, plain: bool = False) -> str:
    """The beginning of `text` that fits: excess(beginning) says by how many tokens it is too long.

    (0 or less: it fits.) Cut between two tokens and never inside a character, then encoded anew
    together with what surrounds it: ids that are cut and joined would lose a part of the
    assistant's marker wherever a token reaches over its edge.
    """
    def beginning(n):
        if not n:
            return ""
        return tokenizer.decode(ids[:n], clean_up_tokenization_spaces=False).rstrip("\ufffd")
    if (over := excess(text)) <= 0:
        return text
    ids = tokens(tokenizer, text, plain)
    n = max(0, len(ids) - over)
    while n and (over := excess(beginning(n))) > 0:
        n = max(0, n - over)
    while n < len(ids) and excess(beginning(n + 1)) <= 0:   # cut there it may have become fewer tokens
        n += 1
    return beginning(n)


def fit_prompt(tokenizer, messages, room: int, plain: bool = False) -> tuple[str, list[int]]:
    """(text, ids) of the prompt of `messages`, at most `room` (1 or more) tokens.

    The last message loses its end first, system prompts after all others; what does not fit even
    without a word is left out. The marker at the prompt's end stays whole wherever there is room
    for it.
    """
    kept = dict(enumerate(messages))
    for i in sorted(reversed(kept), key=lambda i: messages[i]["role"] == "system"):
        def excess(text):
            changed = {**kept, i: {**messages[i], "content": text}}
            prompt = render(tokenizer, changed.values(), plain)
            return len(tokens(tokenizer, prompt, plain)) - room
        text = text_of(messages[i]["content"])
        text = text if plain else without_special(tokenizer, text)
        text = shortened(tokenizer, text, excess, plain)
        if excess(text) <= 0:
            kept[i] = {**messages[i], "content": text}
            break
        del kept[i]
    prompt = render(tokenizer, kept.values(), plain)
    return prompt, tokens(tokenizer, prompt, plain)[-room:]


def oldest_exchange(messages) -> set[int]:
    """Indices of the oldest turn that can go and of the answers to it.

    None of the system prompts, the last question and the last message, which answers it.
    """
    roles = [message["role"] for message in messages[:-1]]
    question = max((i for i, role in enumerate(roles) if role == "user"), default=None)
    first = next((i for i, role in enumerate(roles) if role != "system" and i != question), None)
    if first is None:
        return set()
    later = itertools.takewhile(lambda i: roles[i] != "user", range(first + 1, len(roles)))
    return {first, *(i for i in later if roles[i] != "system")}


def fit(tokenizer, messages, max_length: int) -> list[tuple[str, list[int], bool]]:
    """The pieces of a conversation (see `pieces_of`) in at most max_length (2 or more) tokens.

    Its oldest turns go first, then the end of its question, then the end of its answer, but never
    its EOS.
    """
    said = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not said:
        raise ValueError("a conversation without an answer of the assistant has nothing to learn "
                         "from.")
    messages = messages[:said[-1] + 1]
    while True:
        pieces = pieces_of(tokenizer, messages)
        if sum(len(ids) for _, ids, _ in pieces) <= max_length:
            return pieces
        if not (gone := oldest_exchange(messages)):
            break
        messages = [message for i, message in enumerate(messages) if i not in gone]
    answer, whole_answer, _ = pieces[-1]
    marker, half = len(tokens(tokenizer, render(tokenizer, []))), max_length // 2
    least = min(half, max_length - marker) if marker < max_length else half    # left to the answer
    prompt, ids = fit_prompt(tokenizer, messages[:-1], max_length - min(len(whole_answer), least))
    room = max_length - len(ids) - 1
    answer = shortened(tokenizer, answer, lambda text: len(tokens(tokenizer, text)) - room)
    return [(prompt, ids, False), (answer, [*tokens(tokenizer, answer), tokenizer.eos_token_id], True)]


def template_is_text(tokenizer) -> bool:
    """Whether the chat template's own marks hold no special token, as those of this suite do.

    What a user types can then be encoded with all special tokens as text; else it must lose them.
    """
    marks = render(tokenizer, [{"role": role, "content": ""} for role in ("system", "user")])
    return not any(token in marks for token in tokenizer.all_special_tokens)


def fit_chat(tokenizer, messages, room: int) -> tuple[list[int], int]:
    """(ids, how many messages were left out) of a chat that ends with a question.

    At most `room` (1 or more) tokens, trimmed as in training: the oldest exchanges go, then the end
    of the question. Each answer is encoded by itself and ends in EOS, as it was generated.
    """
    plain, kept = template_is_text(tokenizer), list(messages)
    asked = {"role": "assistant", "content": ""}
    while True:
        pieces = pieces_of(tokenizer, [*kept, asked], plain)[:-1]
        ids = [token for _, piece, _ in pieces for token in piece]
        if len(ids) <= room:
            return ids, len(messages) - len(kept)
        if not (gone := oldest_exchange([*kept, asked])):
            break
        kept = [message for i, message in enumerate(kept) if i not in gone]
    return fit_prompt(tokenizer, kept, room, plain)[1], len(messages) - len(kept)
