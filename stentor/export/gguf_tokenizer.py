"""A tokenizer in a GGUF file: exactly as one of llama.cpp's kinds, or as ids that must be fed.

Byte-level BPE as 01 trains it (GPT-2's splitting, no normalisation) is llama.cpp's kind "gpt2", token for token.

A TokenMonster vocabulary is none of its kinds. They are: merges by rank (BPE) or by score (SPM), the
longest match (WPM, RWKV), and the segmentation of the highest sum of scores (UGM, PLaMo-2). TokenMonster
compares up to six ways to cut the next two tokens by rules about words and takes one that is often not
the longest match; the rules look at neighbours, so no score of single tokens gives the same cut; and
capcode rewrites the text before. A vocabulary of single bytes alone would agree, and no other need to.
So such a file has its tokens under names that no text can contain: llama.cpp, given a text, finds no
token in it and answers nothing, where a near-match would have answered something wrong.
"""
from __future__ import annotations

import json
from dataclasses import dataclass

from stentor.tokenizer import vocabulary_rows

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5    # gguf.TokenType
FED = "Feed token ids: llama.cpp cannot tokenise text for this model"


@dataclass(frozen=True)
class GgufTokenizer:
    """What is written into a GGUF file about a tokenizer; all lists have a row a token."""
    tokens: list[str]
    types: list[int]
    merges: list[str]
    why_fed: str | None                               # None: llama.cpp's own ids are exactly ours
    adds_bos: bool = False
    adds_eos: bool = False

    @property
    def exact(self) -> bool:
        return self.why_fed is None


def gguf_tokenizer(tokenizer, rows: int) -> GgufTokenizer:
    """The mapping of a tokenizer to llama.cpp, padded to the model's `rows` of embedding."""
    why = why_not_gpt2(tokenizer)
    if why:
        return _fed(tokenizer, rows, why)
    data = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = [f"[PAD{i}]" for i in range(rows)]
    types = [UNUSED] * rows
    for token, i in data["model"]["vocab"].items():
        tokens[i], types[i] = token, NORMAL
    for added in data["added_tokens"]:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in data["model"]["merges"]]
    sample = tokenizer("a")["input_ids"]
    return GgufTokenizer(tokens, types, merges, None,
                         adds_bos=sample[0] == tokenizer.bos_token_id,
                         adds_eos=sample[-1] == tokenizer.eos_token_id)


def _fed(tokenizer, rows: int, why: str) -> GgufTokenizer:
    names = tokenizer.convert_ids_to_tokens(list(range(vocabulary_rows(tokenizer))))
    tokens = [f"<|{i}|{name}|>" for i, name in enumerate(names)]
    tokens += [f"<|{i}||>" for i in range(len(names), rows)]
    # one merge that joins nothing: llama.cpp reads no file of this kind without any
    return GgufTokenizer(tokens, [CONTROL] * rows, [f"{tokens[0]} {tokens[1]}"], why)


def why_not_gpt2(tokenizer) -> str | None:
    """In what a tokenizer is not llama.cpp's byte-level BPE with GPT-2's splitting, or None."""
    if hasattr(tokenizer, "vocabulary"):
        return "a TokenMonster vocabulary cuts text in a way that none of llama.cpp's kinds can"
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        return "it has no tokenizer.json"
    data = json.loads(tokenizer.backend_tokenizer.to_str())
    model, before = data["model"], data["pre_tokenizer"] or {}
    if model["type"] != "BPE":
        return f"its model is {model['type']}, not BPE"
    options = ("byte_fallback", "fuse_unk", "ignore_merges", "dropout", "unk_token",
               "continuing_subword_prefix", "end_of_word_suffix")
    if on := [name for name in options if model.get(name)]:
        return f"its BPE has {on[0]}"
    if data["normalizer"]:
        return f"it normalises text ({data['normalizer']['type']})"
    if before.get("type") != "ByteLevel":
        return f"it splits text by {before.get('type', 'nothing')}, not as GPT-2 does"
    if before.get("add_prefix_space") or not before.get("use_regex", True):
        return "its ByteLevel adds a space in front, or splits no words"
    odd = [added["content"] for added in data["added_tokens"]
           if added["lstrip"] or added["rstrip"] or added["single_word"]]
    return f"its added token {odd[0]!r} takes white space beside it" if odd else None


def longest_match_share(tokenizer, texts: list[str]) -> tuple[int, int]:
    """(texts that the longest match cuts as TokenMonster does, texts): how near llama.cpp's nearest
    kind (rwkv) comes, even when it is given the text in TokenMonster's own form of it."""
    vocabulary = tokenizer.vocabulary
    ids_of = {token: i for i, token in enumerate(vocabulary.tokens) if token}
    longest, equal = max(map(len, ids_of)), 0
    for text in texts:
        wanted = vocabulary.encode(text).tolist()
        data = b"".join(vocabulary.tokens[i] for i in wanted)
        found, at = [], 0
        while at < len(data):
            size = next(n for n in range(longest, 0, -1) if data[at:at + n] in ids_of)
            found.append(ids_of[data[at:at + size]])
            at += size
        equal += found == wanted
    return equal, len(texts)
