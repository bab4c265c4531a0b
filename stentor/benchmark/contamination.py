"""Do the questions stand in the training text? Possible to say because the token store is ours.

contamination_report -> contamination -> task_hashes (what to look for), store_texts (where).
"""
from __future__ import annotations

import contextlib
import hashlib
import json
import random
import re
import time
import unicodedata
from pathlib import Path

import numpy as np

from stentor.benchmark.lm import PROTOCOL
from stentor.files import duration, write_atomically
from stentor.tokenizer import load_tokenizer

NGRAM = 13        # words, as GPT-3's appendix C
SHORT = 5         # items of fewer than 13 words are looked for whole, down to this length
# What stands before a question or an answer in prompts and in dumps of data sets: no word of it.
HEADERS = re.compile(r"\b(?:question|answer|q|a)\W{0,3}:")
# Signs inside a word or a number, which some leave out: don't and dont, well-known, 1,000.
INSIDE = re.compile(r"(?<=\w)['\u2019\u2010\u2011-](?=\w)|(?<=\d)[.,](?=\d)")


def contamination_report(store: dict, texts: dict, folder: Path, say) -> None:
    """Write contamination.json, unless it is there for these very items and this store."""
    store_dir = Path(store["path"])
    asked = json.dumps([PROTOCOL, NGRAM, SHORT, texts])
    digest = hashlib.sha256(asked.encode("utf-8", "surrogatepass"))
    digest.update((store_dir / "manifest.json").read_bytes())
    key, target = digest.hexdigest(), folder / "contamination.json"
    with contextlib.suppress(OSError, ValueError):
        if json.loads(target.read_text())["key"] == key:
            return
    began = time.monotonic()
    tasks = contamination(texts, store_dir, load_tokenizer(store["tokenizer"]))
    write_atomically(target, json.dumps({"key": key, "ngram": NGRAM, "tasks": tasks}, indent=1))
    count, took = sum(map(len, texts.values())), duration(time.monotonic() - began)
    say(f"contamination | {count:,} items against the token store in {took}")


def contamination(texts: dict[str, list[list[str]]], store_dir, tokenizer) -> dict[str, dict]:
    """{task: counts} of items whose words stand in the store's training text.

    texts: task -> items -> their forms. The first form of an item is itself, question and right
    answer, and decides how it is looked for. items_checked: items of 13 words or more;
    contaminated: those of which any 13 in a row are in the store. short_checked, short_found:
    items of 5 to 12 words, looked for whole. Shorter ones cannot be checked: they are in `items`
    alone. The other forms (see item_texts) are looked for alike, except for words that another
    item of the task has too, which tell nothing of this one. Memory holds the items, never the
    store.
    """
    values = word_values(texts)

    def ids_of(text):
        return np.array([values.get(word, 0) for word in words_of(text)], dtype=np.uint64)
    items = {name: task_hashes([[ids_of(text) for text in item] for item in task])
             for name, task in texts.items()}
    wanted = {}                                       # length -> set of hashes
    for rows in items.values():
        for _, found in rows:
            for length, hashes in found.items():
                wanted.setdefault(length, set()).update(hashes)
    there = hashes_there(wanted, map(ids_of, store_texts(store_dir, tokenizer)))
    report = {}
    for name, rows in items.items():
        hit = [any(not hashes.isdisjoint(there[length]) for length, hashes in found.items())
               for _, found in rows]
        long = [length == NGRAM for length, _ in rows]
        short = [SHORT <= length < NGRAM for length, _ in rows]
        report[name] = {"items": len(rows),
                        "items_checked": sum(long), "contaminated": sum(map(min, hit, long)),
                        "short_checked": sum(short), "short_found": sum(map(min, hit, short))}
    return report


def word_values(texts: dict[str, list[list[str]]]) -> dict[str, int]:
    """A random odd 64-bit number for each word of the items, the same in every run."""
    values, numbers = {}, random.Random(0)
    for text in (text for task in texts.values() for item in task for text in item):
        for word in words_of(text):
            if word not in values:
                values[word] = numbers.getrandbits(64) | 1
    values.pop("\x00", None)
    return values


def hashes_there(wanted: dict[int, set], rows) -> dict[int, set]:
    """Those of the `wanted` hashes, {length: set}, that stand in `rows` of word ids."""
    tables = {length: np.array(sorted(hashes), np.uint64) for length, hashes in wanted.items()}
    seen = {length: np.zeros(len(table), bool) for length, table in tables.items()}
    for ids in rows:
        for length, table in tables.items():
            hashes = ngram_hashes(ids, length)
            place = np.minimum(np.searchsorted(table, hashes), len(table) - 1)
            seen[length][place[table[place] == hashes]] = True
    return {length: set(table[seen[length]].tolist()) for length, table in tables.items()}


def task_hashes(task: list[list[np.ndarray]]) -> list[tuple[int, dict[int, set]]]:
    """[(words of the item, 13 at most, {length: hashes to look for})] of one task's items.

    task: items -> their forms, in word ids. Nothing is looked for where the item itself is too
    short.
    """
    owner, found = {}, []             # of a hash: the item that has it, None if several have
    for forms in task:
        item = forms[0].tobytes()
        different = {ids.tobytes(): ids for ids in forms}.values()
        hashes = [form_hashes(ids) for ids in different]
        for length, some in hashes:
            for h in some:
                owner[length, h] = item if owner.get((length, h), item) == item else None
        found.append((item, hashes))
    rows = []
    for item, hashes in found:
        wanted = {}
        for number, (length, some) in enumerate(hashes if hashes[0][0] >= SHORT else []):
            own = some if number == 0 else {h for h in some if owner[length, h] == item}
            if own:
                wanted.setdefault(length, set()).update(own)
        rows.append((hashes[0][0], wanted))
    return rows


def form_hashes(ids: np.ndarray) -> tuple[int, set[int]]:
    """(words, 13 at most, the hashes of so many in a row); no hashes where they are too few."""
    length = min(NGRAM, len(ids))
    found = map(int, ngram_hashes(ids, length)) if length >= SHORT else []
    return length, {h for h in found if h}


def words_of(text: str) -> list[str]:
    """Words without case, punctuation, "Question:" and "Answer:".

    \x00, the end of a document, is one of its own.
    """
    text = unicodedata.normalize("NFKC", text).casefold()
    return re.findall(r"\w+|\x00", INSIDE.sub("", HEADERS.sub(" ", text) if ":" in text else text))


def ngram_hashes(ids: np.ndarray, n: int) -> np.ndarray:
    """A 64-bit hash of each n words in a row; 0 where the id of one of them is 0.

    ids: uint64, 0 for a word of no item.
    """
    if len(ids) < n:
        return np.zeros(0, np.uint64)
    hashes = np.zeros(len(ids) - n + 1, np.uint64)
    for i in range(n):
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + ids[i:len(ids) - n + 1 + i]
    unknown = np.cumsum(np.concatenate([[0], ids == 0]))
    hashes[unknown[n:] > unknown[:-n]] = 0
    return hashes


def store_texts(store_dir, tokenizer, chunk_tokens: int = 1 << 20):
    """The training text of a token store, about chunk_tokens at a time, cut between documents.

    \x00 stands there.
    """
    store_dir = Path(store_dir)
    manifest = json.loads((store_dir / "manifest.json").read_text())
    eos = manifest["eos_token_id"]
    ours = hasattr(tokenizer, "vocabulary")
    decode = tokenizer.vocabulary.decode if ours else tokenizer.decode
    for source in manifest["sources"].values():
        carry = np.zeros(0, np.int64)
        for shard in source["shards"]:
            tokens = np.memmap(store_dir / shard["file"], dtype="<u2", mode="r")
            for start in range(0, len(tokens), chunk_tokens):
                chunk = tokens[start:start + chunk_tokens].astype(np.int64)
                ids = np.concatenate([carry, chunk])
                ends = np.flatnonzero(ids == eos)
                cut = int(ends[-1]) + 1 if len(ends) else 0
                carry = ids[cut:]                     # memory must hold the longest document
                documents = np.split(ids[:cut], ends + 1)
                yield "\n\x00\n".join(decode(part[part != eos]) for part in documents if len(part))
        yield decode(carry)
