"""A vocabulary learnt from text: TokenMonster's, by candidates, distillation, swaps; and a BPE.

01_tokenizer explains every step and calls it; so does `alone`, where nobody has run 01.
"""
from __future__ import annotations

import hashlib
import json
import re
import time
from collections import Counter
from pathlib import Path

import numpy as np

from stentor.files import write_atomically

MARKERS = ("", "\x7f", "CDW")  # by capcode level
DELETE_SPACE = (b"", b"\x7f ", b"D ")  # how a word begins that no space precedes
# Kinds of units: W word with its space, w without, N number, S white space, M marker, Q brackets
# and quotes, P other punctuation; t is the tail of a word. A mode is a pattern over kinds: the runs
# that may be one token.
MODES = {
    "clean": "t?[WwPQM]+|[PQMS]+",
    "balanced": "[WwPQM]+|[PQMS]+",
    "consistent": "P?M?[Ww]W*|[PQMS]+",
    "strict": "W+|[PQMS]+",
}
MODE_NUMBER = {"clean": 1, "balanced": 2, "consistent": 3, "strict": 4}  # in the .vocab header
BOUNDARY = b"\xff"  # stands behind each document; no UTF-8 text holds it


def unit_pattern(capcode):
    """The expression that cuts text in capcode form into units without losing a character."""
    markers = MARKERS[capcode]
    # NFD text carries its accents as separate characters
    letter = rf"(?:[^\W\d_{markers}]|[\u0300-\u036f])"
    word = rf" ?{letter}+(?:['’]{letter}+)*"
    punctuation = rf" ?(?:_|[^\w\s\udcff{markers}])+"
    marker = rf"|[{markers}]+" if markers else ""
    return re.compile(rf"\udcff|{word}| ?\d+{marker}|{punctuation}|\s+(?= \S)|\s+|.", re.DOTALL)


def kind_of(unit, capcode):
    if unit[0] in MARKERS[capcode]:
        return "M"
    first = unit.lstrip(" ")[:1] or " "
    if first == "\udcff":
        return "X"
    if first.isspace():
        return "S"
    if first.isdecimal():
        return "N"
    if first.isalnum() or "\u0300" <= first <= "\u036f":
        return "W" if unit[0] == " " else "w"
    return "Q" if set(unit) & set("()[]{}<>\"'`“”‘’") else "P"


def split_units(datas, capcode):
    """Documents (normalised bytes) -> (units: list of bytes, kinds: array of letters, stream).

    stream: the number of the unit at each position; BOUNDARY's unit stands behind each document.
    """
    pattern, index, stream = unit_pattern(capcode), {}, []
    for data in datas:
        found = pattern.findall((data + BOUNDARY).decode("utf-8", "surrogateescape"))
        numbers = (index.setdefault(unit, len(index)) for unit in found)
        stream.append(np.fromiter(numbers, np.int64, len(found)))
    kinds = np.frombuffer("".join(kind_of(unit, capcode) for unit in index).encode(), "S1")
    units = [unit.encode("utf-8", "surrogateescape") for unit in index]
    return units, kinds, np.concatenate(stream)


def count_pieces(units, counts, min_count, longest, seed):
    """{piece: occurrences} for pieces of 2..longest bytes of the units.

    counts: occurrences of each unit. All pieces of one length at a time: their hashes are sorted,
    and a piece too rare is not made longer. Pieces begin and end on whole UTF-8 characters.
    """
    flat = np.frombuffer(b"".join(units), np.uint8)
    lengths = np.array([len(unit) for unit in units])
    end, weight = np.repeat(np.cumsum(lengths), lengths), np.repeat(counts, lengths)  # by byte
    begins_character = np.append((flat & 0xC0) != 0x80, True)
    letters = np.random.default_rng(seed).integers(1, 2**63, 256, dtype=np.uint64)
    letters = letters * np.uint64(2) + np.uint64(1)
    start = np.flatnonzero(begins_character[:-1])
    hashes, found = np.zeros(len(start), np.uint64), {}
    for length in range(1, longest + 1):
        inside = start + length <= end[start]
        start, hashes = start[inside], hashes[inside]
        if not len(start):
            break
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15)                   # wraps at 2^64
        hashes = hashes + letters[flat[start + length - 1]]
        _, first, group = np.unique(hashes, return_index=True, return_inverse=True)
        uses = np.bincount(group, weight[start]).astype(np.int64)
        frequent = uses >= min_count
        if length > 1:
            for i in np.flatnonzero(frequent & begins_character[start[first] + length]):
                found[flat[start[first[i]]:start[first[i]] + length].tobytes()] = int(uses[i])
        start, hashes = start[frequent[group]], hashes[frequent[group]]
    return found


LONGEST_TAIL = 5


def word_tails(units, kinds):
    """For each tail length: (tail number of each unit or -1, the tails)."""
    words = np.flatnonzero((kinds == b"W") | (kinds == b"w"))
    for length in range(1, LONGEST_TAIL + 1):
        numbers, tails = np.full(len(units), -1), {}
        for i in words:
            tail = units[i][-length:]
            if len(units[i]) > length and tail[0] & 0xC0 != 0x80 and tail[0] != 32:
                numbers[i] = tails.setdefault(tail, len(tails))
        yield numbers, list(tails)


def count_runs(units, kinds, stream, permitted, min_count, longest):
    """{run: occurrences} for the runs of units that the pattern `permitted` allows.

    Those of at most `longest` bytes.
    """
    found, n_units = Counter(), len(units)  # the same bytes may come about in two ways
    # the byte behind each unit of the stream
    end = np.cumsum(np.array([len(unit) for unit in units])[stream])
    begin = np.concatenate([[0], end[:-1]])
    data = b"".join([units[i] for i in stream.tolist()])
    tails = list(word_tails(units, kinds)) if "t" in permitted.pattern else []
    allowed = {}
    at = np.flatnonzero(kinds[stream] != b"X")  # where a run starts
    run = stream[at]  # which run it is
    size = 1
    while len(at):
        _, first, run, uses = np.unique(
            run, return_index=True, return_inverse=True, return_counts=True)
        first, frequent = at[first], uses >= min_count
        tailed = np.zeros(len(first), bool)
        for i in np.flatnonzero(frequent):
            pattern = kinds[stream[first[i]:first[i] + size]].tobytes().decode()
            if pattern not in allowed:
                allowed[pattern] = [permitted.fullmatch(p) is not None
                                    for p in (pattern, "t" + pattern)]
            if size > 1 and allowed[pattern][0]:
                found[data[begin[first[i]]:end[first[i] + size - 1]]] += int(uses[i])
            tailed[i] = allowed[pattern][1]
        for numbers, names in tails:  # the unit before the run, by its tail
            before = stream[np.maximum(at - 1, 0)]
            here = tailed[run] & (numbers[before] >= 0) & (at > 0)
            key = numbers[before[here]] * len(first) + run[here]
            key, uses = np.unique(key, return_counts=True)
            often = uses >= min_count
            for tail, i, count in zip(*divmod(key[often], len(first)), uses[often]):
                token = names[tail] + data[begin[first[i]]:end[first[i] + size - 1]]
                if len(token) <= longest:
                    found[token] += int(count)
        # one unit more, where the run was frequent, the document goes on and the token is short
        keep = frequent[run] & (at + size < len(stream))
        at, run = at[keep], run[keep]
        keep = (kinds[stream[at + size]] != b"X") & (end[at + size] - begin[at] <= longest)
        at, run = at[keep], run[keep]
        run = run * n_units + stream[at + size]
        size += 1
    return found


def find_candidates(datas, mode, capcode, min_count, seed=42, longest=28):
    """{token: occurrences}: all in the documents (normalised bytes) that `mode` permits."""
    units, kinds, stream = split_units(datas, capcode)
    counts = np.bincount(stream, minlength=len(units))
    found = count_runs(units, kinds, stream, re.compile(MODES[mode]), min_count, longest)
    numbers = kinds == b"N"
    for which, limit in ((~numbers & (kinds != b"X"), longest), (numbers, 5)):
        chosen = np.flatnonzero(which)
        if len(chosen):
            pieces = [units[i] for i in chosen]
            found.update(count_pieces(pieces, counts[chosen], min_count, limit, seed))
    # `⌫ word` comes free with `word`: the engine gives both the same id.
    return {token: count for token, count in found.items()
            if not (capcode and token.startswith(DELETE_SPACE[capcode]))}


def spelling_cost(token, known):
    """The fewest other known tokens that spell it, by dynamic programming over its bytes."""
    best = [0]
    for stop in range(1, len(token) + 1):
        best.append(1 + min(best[start] for start in range(stop)
                            if token[start:stop] in known and stop - start < len(token)))
    return best[-1]


def worth_of(tokens, uses, singles):
    """{token: tokens that the text would grow by without it}; uses: {token: times used}."""
    known = {*tokens, *singles}
    return {token: uses[token] * (spelling_cost(token, known) - 1) for token in tokens}


def most_useful(tokens, uses, singles, keep):
    worth = worth_of(tokens, uses, singles)
    return sorted(tokens, key=lambda token: (-worth[token], token))[:keep]


def make_vocabulary(tokens, mode, capcode, scores=None):
    """The engine's Vocabulary of these tokens and every single byte."""
    from tokenmonster_hf import Vocabulary
    return Vocabulary.from_tokens(
        tokens, capcode=capcode, charset=1, normalization=1, mode=MODE_NUMBER[mode],
        include="all256", encoded=True, scores=scores)


def measure(tokens, texts, mode, capcode):
    """(vocabulary of the tokens, ids of all texts, offsets, {token: times used})"""
    vocabulary = make_vocabulary(tokens, mode, capcode)
    ids, offsets = vocabulary.encode_batch(texts)
    uses = np.bincount(ids, minlength=vocabulary.n_ids).tolist()
    return vocabulary, ids.astype(np.int64), offsets, dict(zip(vocabulary.tokens, uses))


def training_shares(tokens, singles, uses):
    """{token: share of the training bytes}.

    Never 0 for a longer token, since that means: not to be dropped.
    """
    total = sum(uses[token] * len(token) for token in [*tokens, *singles])
    shares = {token: uses[token] * len(token) / total for token in singles}
    return shares | {token: max(uses[token] * len(token) / total, 1e-9) for token in tokens}


def merge_gains(ids, offsets, names, candidates, known, min_count, delete_space=b"", longest=4):
    """{candidate: tokens saved} if it replaced the neighbouring tokens that spell it now.

    ids: the tokenised text; offsets: where its documents begin and end.
    """
    gains, n = {}, len(names)
    last = np.zeros(len(ids), bool)
    last[offsets[1:][np.diff(offsets) > 0] - 1] = True  # no run goes beyond a document
    at, run = np.arange(len(ids)), ids
    for size in range(2, longest + 1):
        keep = ~last[at + size - 2]
        at, run = at[keep], run[keep]
        _, first, run, uses = np.unique(
            run * n + ids[at + size - 1],
            return_index=True, return_inverse=True, return_counts=True)
        frequent = uses >= min_count
        for i in np.flatnonzero(frequent):
            begin = at[first[i]]
            token = b"".join(names[j] for j in ids[begin:begin + size]).removeprefix(delete_space)
            if token in candidates and token not in known:
                gains[token] = gains.get(token, 0) + int(uses[i]) * (size - 1)
        at, run = at[frequent[run]], run[frequent[run]]
    return gains


def grow(tokens, gains, by_frequency, size):
    """The tokens and the candidates that save most, then the most frequent ones, `size` in all."""
    best = sorted(gains, key=lambda token: (-gains[token], token))
    return list(dict.fromkeys([*tokens, *best, *by_frequency]))[:size]


def swap_weakest(tokens, worth, gains, most):
    """(tokens, up to `most` of the weakest replaced by candidates that save more; how many)."""
    weak = sorted(tokens, key=lambda token: (worth[token], token))
    strong = sorted(gains, key=lambda token: (-gains[token], token))[:most]
    swaps = [(out, new) for out, new in zip(weak, strong) if gains[new] > worth[out]]
    dropped = {out for out, _ in swaps}
    kept = [token for token in tokens if token not in dropped]
    return kept + [new for _, new in swaps], len(swaps)


class BuildLog:
    """What a build has come to, kept in the file `path`.

    state: `step` (index into the plan; behind it the swaps, then done), `tokens`, `history`,
    `seconds`.
    """

    def __init__(self, texts, arguments, path, progress):
        digest = hashlib.sha256(repr(arguments).encode())
        for text in texts:
            digest.update(text.encode() + BOUNDARY)
        self.path, self.progress, self.began = path and Path(path), progress, time.time()
        self.characters = sum(map(len, texts))
        self.state = {"fingerprint": digest.hexdigest(), "step": 1, "tokens": None, "share": 0.05,
                      "round": 0, "seconds": 0.0, "history": []}
        if self.path and self.path.exists():
            try:
                kept = json.loads(self.path.read_text())
            except ValueError:
                kept = {}
            if kept.get("fingerprint") == self.state["fingerprint"]:
                self.state = kept
                progress(f"going on from {self.path.name}: {len(kept['history'])} rounds are done")
        self.earlier = self.state["seconds"]

    def seconds(self):
        return round(self.earlier + time.time() - self.began, 1)

    def note(self, what, tokens, size, n_ids):
        """One round: the tokens it ended with, the vocabulary's size, the ids of the whole text."""
        ratio = round(self.characters / n_ids, 4)
        self.state.update(tokens=[token.decode("latin-1") for token in tokens],
                          seconds=self.seconds())
        self.state["history"].append([what, size, ratio, self.seconds()])
        self.progress(f"{what}: {size:,} tokens, {ratio:.3f} characters per token "
                      f"({self.seconds():.0f} s)")
        if self.path:
            write_atomically(self.path, json.dumps(self.state))


def build_vocabulary(texts, size, mode="strict", capcode=1, *, seed=42, seconds=170, rounds=30,
                     state_file=None, progress=print, plan=(5, 0.25, 1.5, 1)):
    """A vocabulary of `size` tokens learnt from `texts`, and a report.

    All bytes are tokens (at capcode 2 all but A-Z without C, D, W, which cannot occur), so no text
    loses anything; scores are shares of the training bytes. `plan`: sizes to go through, as
    multiples of the room beside the single bytes, the first by frequency, then by distilling and
    growing; `rounds`: rounds of swaps at most. The same texts and arguments give the same vocabulary
    unless the time budget `seconds` ends the build. state_file: see BuildLog.

    report: {"candidates", "history": [step, tokens, characters per token, seconds], "seconds",
    "finished"}. Raises ValueError when `size` does not hold the single bytes.
    """
    build = Build(texts, size, mode, capcode, BuildLog(
        texts, (size, mode, capcode, seed, rounds, plan), state_file, progress))
    build.find_candidates(seed, plan)
    while build.state["step"] < len(plan):
        late = build.log.seconds() > seconds / 2      # the rest is for one distillation and swaps
        if late:
            build.state["step"] = len(plan) - 1
        build.resize(build.room if late else int(plan[build.state["step"]] * build.room), late)
    while build.state["step"] == len(plan) and build.log.seconds() < seconds:
        build.swap(rounds)
    shares = training_shares(build.tokens, build.singles, build.uses)
    report = {"candidates": len(build.candidates), "history": build.state["history"],
              "seconds": build.log.seconds(), "finished": build.state["step"] > len(plan)}
    return make_vocabulary(list(shares), mode, capcode, list(shares.values())), report


class Build:
    """A vocabulary in the making: its tokens, and the texts as these cut them (see `measure`)."""

    def __init__(self, texts, size, mode, capcode, log):
        self.texts, self.mode, self.capcode, self.log, self.state = (
            texts, mode, capcode, log, log.state)
        self.empty = make_vocabulary([], mode, capcode)
        self.singles = [token for token in self.empty.tokens if token]
        self.room = size - len(self.singles)
        if self.room < 1:
            raise ValueError(f"A vocabulary of {size} tokens has no room beside the "
                             f"{len(self.singles)} single bytes.")
        # A token of the finished one saves several times min_count tokens: rarer ones are left.
        self.min_count = max(2, log.characters // (100 * size))

    def find_candidates(self, seed, plan):
        """The candidates, and the tokens to begin with: the most frequent, or those of the log."""
        self.candidates = {}
        if self.state["step"] <= len(plan):
            datas = [self.empty.normalize(text) for text in self.texts]
            self.candidates = find_candidates(datas, self.mode, self.capcode, self.min_count, seed)
            self.log.progress(f"{len(self.candidates):,} candidates that occur {self.min_count} "
                              f"times or more ({self.log.seconds():.0f} s)")
        self.by_frequency = sorted(self.candidates, key=lambda token: (
            -self.candidates[token] * (len(token) - 1), token))
        kept = self.state["tokens"]
        self.take(self.by_frequency[:int(plan[0] * self.room)] if kept is None else
                  [token.encode("latin-1") for token in kept])

    def take(self, tokens, measured=None):
        self.tokens = tokens
        self.vocabulary, self.ids, self.offsets, self.uses = measured or measure(
            tokens, self.texts, self.mode, self.capcode)

    def gains(self):
        return merge_gains(self.ids, self.offsets, self.vocabulary.tokens, self.candidates,
                           {*self.tokens, *self.singles}, self.min_count,
                           DELETE_SPACE[self.capcode])

    def note(self, what):
        self.log.note(what, self.tokens, len(self.vocabulary), len(self.ids))

    def resize(self, goal, at_once):
        """Distil or grow towards `goal` tokens; at_once: all the way, else by 30% at most."""
        before = len(self.tokens)
        if before > goal:
            keep = goal if at_once else max(goal, int(0.7 * before))
            self.take(most_useful(self.tokens, self.uses, self.singles, keep))
        else:
            most = goal if at_once else min(goal, before + max(100, int(0.3 * before)))
            self.take(grow(self.tokens, self.gains(), self.by_frequency, most))
        self.state["step"] += len(self.tokens) in (goal, before)
        self.note("distil" if len(self.tokens) < before else "grow")

    def swap(self, rounds):
        """One round of swaps, taken back where the text gets no shorter; the last of at most
        `rounds` ends the build."""
        worth = worth_of(self.tokens, self.uses, self.singles)
        trial, swaps = swap_weakest(self.tokens, worth, self.gains(),
                                    max(1, int(self.state["share"] * self.room)))
        result = measure(trial, self.texts, self.mode, self.capcode)
        if better := len(result[1]) < len(self.ids):
            self.take(trial, result)
        else:
            self.state["share"] = swaps / self.room / 2
        self.state["round"] += 1
        if self.state["round"] >= rounds or self.state["share"] * self.room < 4:
            self.state["step"] += 1
        self.note(f"{swaps} swaps {'made' if better else 'taken back'}")


def train_bpe(texts, size):
    """A byte-level BPE of `size` tokens, GPT-2's splitting into words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    tokenizer = Tokenizer(models.BPE())
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts, length=len(texts), trainer=trainers.BpeTrainer(
            vocab_size=size, initial_alphabet=alphabet, show_progress=False))
    return tokenizer


def bpe_tokenizer(bpe):
    """`train_bpe`'s result as a `transformers` tokenizer, with </s> (padding too) and <s>."""
    from transformers import PreTrainedTokenizerFast
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>", bos_token="<s>",
                                   pad_token="</s>", padding_side="left")
