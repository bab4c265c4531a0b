"""What 05_benchmark runs in a process of its own: lm-eval's tasks and metrics, scored by a model class that fits us.

Top to bottom:  what a score is -> the model class -> tasks -> the runner -> launch.
Also a command:  python -m stentor_eval outputs/demo/benchmark/benchmark.json      (what `launch` starts)
"""
from __future__ import annotations

import ast
import codecs
import contextlib
import csv
import dataclasses
import functools
import hashlib
import io
import json
import logging
import math
import os
import random
import re
import signal
import sqlite3
import string
import subprocess
import sys
import time
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import numpy as np

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TQDM_DISABLE", "1")                # read when tqdm is imported; its bars fill a log

import stentor_utils as su                            # noqa: E402

logging.getLogger("lm_eval").setLevel(logging.ERROR)      # it warns once a task about what we do on purpose

import torch                                          # noqa: E402
from lm_eval.models.huggingface import HFLM           # noqa: E402
from lm_eval.models.utils import normalize_gen_kwargs  # noqa: E402

PROTOCOL = 3  # raised whenever scores may change: it is part of every cache key
SEED = 42     # of the cards' script

# The blocks of the Stentor3 card's script, and BLiMP: name -> (title, lm-eval tasks, number of few-shot examples).
BLOCKS = {
    "openbookqa_truthfulqa": ("OpenBookQA · TruthfulQA", ("openbookqa", "truthfulqa_mc2"), 0),
    "winogrande_commonsenseqa": ("Winogrande · CommonsenseQA", ("winogrande", "commonsense_qa"), 0),
    "hellaswag": ("HellaSwag", ("hellaswag",), 0),
    "arc": ("ARC-Easy · ARC-Challenge", ("arc_easy", "arc_challenge"), 0),
    "mmlu": ("MMLU", ("mmlu",), 0),
    "gsm8k_0shot": ("GSM8K (0-shot)", ("gsm8k",), 0),
    "gsm8k_5shot": ("GSM8K (5-shot)", ("gsm8k",), 5),
    "blimp": ("BLiMP", ("blimp",), 0),
}

# Those of its peers that are on the hub under a name the card's table makes plain.
PEERS = {"DistilGPT2": "hf:distilbert/distilgpt2", "Pythia-14M": "hf:EleutherAI/pythia-14m",
         "Pythia-31M": "hf:EleutherAI/pythia-31m", "Pythia-70M": "hf:EleutherAI/pythia-70m",
         "TinyStories-33M": "hf:roneneldan/TinyStories-33M"}

# ---------------------------------------------------------------------------------------------------------------------
# What a score is.


def common_prefix(*rows) -> int:
    """Number of leading tokens that all rows share."""
    shortest, longest = min(rows), max(rows)          # in lexical order: what these two share, all share
    for i, (a, b) in enumerate(zip(shortest, longest)):
        if a != b:
            return i
    return min(len(shortest), len(longest))


@dataclass(slots=True)
class Request:
    """One (context, continuation) in tokens. logP(continuation | context) = logP(whole) - logP(context).

    whole, context: token ids of the two strings, each encoded once and whole, behind the prefix token where the context
    is empty. start: the number of leading tokens they share, whose terms cancel; at least 1, as the first token of a
    row is never predicted. text_bytes: UTF-8 bytes of the continuation.
    """
    key: bytes
    whole: list
    context: list
    start: int

    @property
    def merged(self) -> bool:
        """Whether a token crosses the join, or lookahead changed one before it: lm-eval's own split is then wrong."""
        return self.start < len(self.context)

    @property
    def empty(self) -> bool:
        return len(self.whole) <= self.start


@dataclass(slots=True)
class Tree:
    """Rows of tokens that begin with the same `trunk`, computed in one row of the batch."""
    trunk: list
    branches: list                                    # of lists of tokens, each at least one long
    owners: list                                      # (request, "whole" | "context", offset of the branch in its tokens)

    @property
    def length(self) -> int:
        return len(self.trunk) + sum(len(branch) - 1 for branch in self.branches)     # nothing follows a last token


def windows(tokens: list, start: int, max_length: int) -> list[tuple[int, int, int]]:
    """(begin, first, end): predict tokens[first:end] from tokens[begin:end - 1], at most max_length of them at a time.

    A row that fits is one window. Else the left of the context is cut off, as lm-eval does; a continuation longer than
    the model is predicted in as many windows as it takes, the last with all the context there is room for.
    """
    cuts = list(range(start, len(tokens), max_length)) if len(tokens) - start > max_length else [start]
    ends = cuts[1:] + [len(tokens)]
    return [(max(0, end - 1 - max_length), first, end) for first, end in zip(cuts, ends)]


def make_trees(requests: list[Request], max_length: int, share: bool = True) -> list[Tree]:
    """The trees that give every log-probability that `requests`, the choices of one item, need.

    Choices share their context: a four-choice item is one row, not four, where that saves a quarter of the tokens.
    """
    rows = [(request, kind, tokens) for request in requests
            for kind, tokens in (("whole", request.whole), ("context", request.context)) if len(tokens) > request.start]
    trees, fitting = [], []
    for request, kind, tokens in rows:
        if len(tokens) - 1 <= max_length and len(request.whole) - 1 <= max_length:
            fitting.append((request, kind, tokens))
            continue
        # The context's tail is predicted from the same left edge as the whole.
        edge = max(0, len(request.whole) - 1 - max_length) if len(request.whole) - request.start <= max_length else 0
        for begin, first, end in windows(tokens, request.start, max_length):
            begin = max(begin, min(edge, first - 1))
            trees.append(Tree(tokens[begin:first], [tokens[first:end]], [(request, kind, first)]))
    if fitting:
        trunk = min(common_prefix(*(tokens for _, _, tokens in fitting)), *(request.start for request, _, _ in fitting))
        together = Tree(fitting[0][2][:trunk], [tokens[trunk:] for _, _, tokens in fitting],
                        [(request, kind, trunk) for request, kind, _ in fitting])
        apart = [Tree(tokens[:request.start], [tokens[request.start:]], [(request, kind, request.start)])
                 for request, kind, tokens in fitting]
        saves = trunk > 0 and together.length <= 0.75 * sum(tree.length for tree in apart)
        trees += [together] if share and saves else apart
    return trees


# ---------------------------------------------------------------------------------------------------------------------
# The cache: every answer of a model, by a hash of all that it depends on. sqlite: each batch is one transaction.


class Cache:
    """{sha256: JSON value} in one sqlite file, shared by the processes of a run; safe against kill -9."""

    def __init__(self, path):
        self.connection = sqlite3.connect(path, timeout=120, isolation_level=None)
        self.connection.execute("PRAGMA journal_mode = WAL")
        self.connection.execute("PRAGMA synchronous = NORMAL")
        self.connection.execute("CREATE TABLE IF NOT EXISTS answers (key BLOB PRIMARY KEY, value TEXT) WITHOUT ROWID")

    def get(self, keys: list[bytes]) -> dict[bytes, list]:
        found = {}
        for i in range(0, len(keys), 500):
            part = keys[i:i + 500]
            marks = ",".join("?" * len(part))
            found.update(self.connection.execute(f"SELECT key, value FROM answers WHERE key IN ({marks})", part))
        return {key: json.loads(value) for key, value in found.items()}

    def put(self, answers: dict[bytes, list]) -> None:
        """The first answer to a key stays: answers of a second run differ in the last bits where batches differed."""
        with self.connection:
            self.connection.execute("BEGIN IMMEDIATE")
            self.connection.executemany("INSERT OR IGNORE INTO answers VALUES (?, ?)",
                                        [(key, json.dumps(value)) for key, value in answers.items()])


# ---------------------------------------------------------------------------------------------------------------------
# The model class.


class StentorLM(HFLM):
    """lm-eval's HFLM with right joins, shared contexts, batches cut by tokens, and a cache.

    What is right: the model never saw a text cut at lm-eval's join. TokenMonster looks ahead and its tokens span words,
    so encode(context) need not be a prefix of encode(context + continuation); lm-eval then takes the whole's tokens from
    number len(encode(context)) on, and loses or misplaces some. Here the whole string is encoded once and

        logP(continuation | context) = logP(encode(context + continuation)) - logP(encode(context)).

    Where nothing merges this is lm-eval's sum, term by term. Where something does, every choice still pays for the same
    bytes, the whole string, less a constant of the item, so choices compare as the model ranks the strings. (Summing
    from the first token that reaches into the continuation would charge a merging choice for the end of the context too,
    and its rival not.) A continuation that leaves the tokens as they are has log-probability 0.
    Trailing spaces of a context count to the continuation, and contexts that do not fit lose their left, as in lm-eval.
    An empty context is the prefix token: EOS for our tokenizer, since that is what stands before a document in training
    (BOS is never trained); as lm-eval chooses for any other.

    model: a causal LM in eval mode on its device. max_length: default from its config. tokens_per_batch: by default what
    a quarter of the free memory holds, 4,096 at most on the CPU (its caches), 65,536 on a GPU; halved when memory runs out.
    """

    def __init__(self, model, tokenizer, *, cache: Cache | None = None, max_length: int | None = None,
                 tokens_per_batch: int | None = None, rank: int = 0, world_size: int = 1, barrier=lambda: None, say=None):
        self.ours = hasattr(tokenizer, "vocabulary")
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=max_length, truncation=True,
                         prefix_token_id=tokenizer.eos_token_id if self.ours else None)
        self.answers = cache or Cache(":memory:")
        self.tokens_per_batch = tokens_per_batch or self._tokens_that_fit()
        self.part, self.parts, self.wait = rank, world_size, barrier
        self.say = say or (lambda text: None)
        self.fingerprint = model_fingerprint(model, tokenizer) + f"|{self.max_length}|{self.prefix_token_id}|{PROTOCOL}"
        self.share, self.fast_head = True, True
        self.counts = {}
        self._check_shortcuts()

    @property
    def max_gen_toks(self) -> int:
        return min(256, self.max_length // 2)

    def _tokens_that_fit(self) -> int:
        """Logits weigh most: vocabulary x (their own dtype, FP32, and what logsumexp makes on the way) a token."""
        per_token = 12 * self.model.get_input_embeddings().num_embeddings
        if self.device.type == "cuda":
            return int(min(65_536, max(1_024, torch.cuda.mem_get_info(self.device)[0] / 4 / per_token)))
        return int(min(4_096, max(256, 1e9 / per_token)))

    # -- tokens

    def encode(self, texts: list[str]) -> list[list[int]]:
        if self.ours:                                 # special tokens in a text are text, as in training
            ids, offsets = su.encode_documents(self.tokenizer, texts)
            ids = ids.tolist()
            return [ids[a:b] for a, b in zip(offsets, offsets[1:])]
        return [self.tok_encode(text) for text in texts]

    def tok_batch_encode(self, strings, padding_side="left", left_truncate_len=None, truncation=False):
        """(ids, attention mask) int64 of rows padded on the left; an empty text is the prefix token."""
        rows = [torch.tensor(ids[-(left_truncate_len or 0):] or [self.prefix_token_id]) for ids in self.encode(strings)]
        pad = torch.nn.utils.rnn.pad_sequence
        ids = pad(rows, batch_first=True, padding_value=self.tokenizer.pad_token_id, padding_side="left")
        return ids, pad([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")

    def tok_encode(self, string, *args, **kwargs):
        return self.encode([string])[0] if self.ours else super().tok_encode(string, *args, **kwargs)

    def _encode_pair(self, context, continuation):
        """(tokens that are only condition, tokens to sum): together always encode(context + continuation)."""
        request = self.requests_of([(context, continuation)])[0]
        return request.whole[:request.start], request.whole[request.start:]

    def requests_of(self, pairs: list[tuple[str, str]]) -> list[Request]:
        pairs = [(context or "", continuation or "") for context, continuation in pairs]
        contexts = {context: context.rstrip() for context, _ in pairs}
        texts = list(dict.fromkeys([*contexts.values(), *(context + continuation for context, continuation in pairs)]))
        tokens = dict(zip(texts, self.encode(texts)))
        requests = []
        for context, continuation in pairs:
            whole, before = tokens[context + continuation], tokens[contexts[context]] if contexts[context] else []
            start = common_prefix(whole, before)
            if start == 0:                            # nothing to predict the first token from
                prefix = [self.prefix_token_id]
                if not (whole[:1] == prefix and not before):
                    whole, before = prefix + whole, prefix + before
                else:
                    before = prefix
                start = 1
            # by its tokens: two texts of the same tokens are one request, and tie to the last bit
            requests.append(Request(self.key("loglikelihood", whole, before, start), whole, before, start))
        return requests

    def key(self, *parts) -> bytes:
        return hashlib.sha256(json.dumps([self.fingerprint, *parts]).encode("utf-8", "surrogatepass")).digest()

    # -- the forward pass

    @torch.inference_mode()
    def score(self, trees: list[Tree]) -> list[list[tuple[np.ndarray, np.ndarray]]]:
        """For each branch of each tree: (log-probability float64, is the likeliest token bool), one a token."""
        length = max(tree.length for tree in trees)
        ids = np.zeros((len(trees), length), np.int64)
        position = np.zeros((len(trees), length), np.int64)
        segment = np.zeros((len(trees), length), np.int64)        # 0 the trunk, then 1, 2, ... a branch each
        sources, targets, sizes = [], [], []
        for row, tree in enumerate(trees):
            n = len(tree.trunk)
            ids[row, :n], position[row, :n] = tree.trunk, range(n)
            at = n
            for number, branch in enumerate(tree.branches, 1):
                inside = slice(at, at + len(branch) - 1)
                ids[row, inside], segment[row, inside] = branch[:-1], number
                position[row, inside] = range(n, n + len(branch) - 1)
                sources += [row * length + n - 1, *range(row * length + at, row * length + inside.stop)]
                targets += branch
                sizes.append(len(branch))
                at = inside.stop
        device = self.device
        inputs = {"input_ids": torch.from_numpy(ids).to(device), "use_cache": False}
        if any(len(tree.branches) > 1 for tree in trees):         # a branch sees the trunk and itself
            segment = torch.from_numpy(segment).to(device)
            seen = (segment[:, None, :] == 0) | (segment[:, None, :] == segment[:, :, None])
            seen &= torch.ones(length, length, dtype=torch.bool, device=device).tril()
            mask = torch.zeros(seen.shape, dtype=self.model.dtype, device=device)
            mask = mask.masked_fill_(~seen, torch.finfo(self.model.dtype).min)
            inputs |= {"attention_mask": mask[:, None], "position_ids": torch.from_numpy(position).to(device)}
        # A row's padding stands to its right, where a causal model does not look.
        where, back = np.unique(np.array(sources), return_inverse=True)
        where, back = torch.from_numpy(where).to(device), torch.from_numpy(back).to(device)
        if self.fast_head:                            # the vocabulary only where something is predicted
            hidden = self.model.base_model(**inputs).last_hidden_state.flatten(0, 1)[where]
            logits = self.model.get_output_embeddings()(hidden)
        else:
            logits = self.model(**inputs).logits.flatten(0, 1)[where]
        logits = logits.float()
        target = torch.tensor(targets, device=device)
        chosen = logits[back, target]
        logprobs = (chosen - logits.logsumexp(-1)[back]).double().cpu().numpy()
        greedy = (logits.argmax(-1)[back] == target).cpu().numpy()
        cuts = np.cumsum(sizes)[:-1]
        flat = iter(zip(np.split(logprobs, cuts), np.split(greedy, cuts)))
        return [[next(flat) for _ in tree.branches] for tree in trees]

    def _check_shortcuts(self) -> None:
        """Both shortcuts are tried against the model's plain forward() once, and left out where they change anything."""
        vocabulary = self.model.get_input_embeddings().num_embeddings
        tokens = np.random.default_rng(0).integers(0, vocabulary, 14).tolist()
        tree = Tree(tokens[:5], [tokens[5:9], tokens[9:10], tokens[10:14]], [None] * 3)
        with torch.inference_mode():
            rows = [tree.trunk + branch for branch in tree.branches]
            plain = [self.model(torch.tensor([row], device=self.device)).logits[0].float().log_softmax(-1)[
                range(4, len(row) - 1), row[5:]].double().cpu().numpy() for row in rows]
        for share, fast_head in ((True, True), (True, False), (False, True), (False, False)):
            self.share, self.fast_head = share, fast_head
            trees = [tree] if share else [Tree(tree.trunk, [branch], [None]) for branch in tree.branches]
            tolerance = 1e-4 if self.model.dtype == torch.float32 else 0.1
            with contextlib.suppress(Exception):      # a model that does not take a mask like ours
                found = [logprobs for branches in self.score(trees) for logprobs, _ in branches]
                if all(np.allclose(a, b, atol=tolerance) for a, b in zip(found, plain)):
                    return

    # -- what lm-eval calls

    def loglikelihood(self, requests, disable_tqdm=False) -> list[tuple[float, bool]]:
        """[(log-likelihood in nats, is greedy decoding)] in the order asked."""
        pairs = [request.args for request in requests]
        ours = self.requests_of(pairs)
        items, last = [], None
        for instance, request in zip(requests, ours):             # the choices of an item stand one after another
            item = (instance.task_name, instance.doc_id)
            if item != last or item == (None, None):
                items.append([])
                last = item
            items[-1].append(request)
        tasks = {}
        for instance, request in zip(requests, ours):
            count = tasks.setdefault(instance.task_name, {"requests": 0, "merged": 0, "empty": 0, "truncated": 0})
            for name, value in (("requests", 1), ("merged", request.merged), ("empty", request.empty),
                                ("truncated", len(request.whole) - 1 > self.max_length)):
                count[name] += int(value)
        self.counts.update(tasks)
        answers = self._answer(items)
        return [(answers[request.key][0], bool(answers[request.key][1])) for request in ours]

    def loglikelihood_rolling(self, requests, disable_tqdm=False) -> list[float]:
        """Log-likelihood in nats of each whole text behind the prefix token, in windows of max_length."""
        texts = [request.args[0] or "" for request in requests]
        prefix = [self.prefix_token_id]
        ours = [Request(self.key("rolling", text), prefix + tokens, prefix, 1)
                for text, tokens in zip(texts, self.encode(texts))]
        answers = self._answer([[request] for request in ours])
        return [answers[request.key][0] for request in ours]

    def token_counts(self, pairs) -> list[int]:
        """Tokens that each pair's log-likelihood sums over, net of those of the context."""
        return [len(r.whole) - len(r.context) for r in self.requests_of(pairs)]

    def _answer(self, items: list[list[Request]]) -> dict[bytes, list]:
        """{key: [log-likelihood, greedy]} of all requests: from the cache, else computed, batch by batch.

        The batches follow from the whole list alone, not from what the cache holds: a resumed run computes the very
        batches that an uninterrupted one would, and ends with the same bits.
        """
        first = {}                                    # the same text asked twice is computed once, not summed twice
        for item in items:
            for request in item:
                first.setdefault(request.key, request)
        items = [[request for request in item if first[request.key] is request] for item in items]
        keys = list(first)
        work = []
        for item in items:
            trees = make_trees(item, self.max_length, self.share)
            work += [(trees, item)] if trees else []
            if not trees:
                self.answers.put({request.key: [0.0, True] for request in item})
        work.sort(key=lambda entry: -max(tree.length for tree in entry[0]))      # the longest first: memory fails early
        batches, room = [], 0
        for entry in work:
            cost = len(entry[0])
            if cost > room:
                batches.append([])
                room = max(cost, self.tokens_per_batch // max(tree.length for tree in entry[0]))
            batches[-1].append(entry)
            room -= cost
        done, began, said = self.answers.get(keys), time.monotonic(), time.monotonic()
        mine = batches[self.part::self.parts]
        for number, batch in enumerate(mine, 1):
            needed = [request for _, item in batch for request in item]
            if all(request.key in done for request in needed):
                continue
            self.answers.put(self._compute(batch))
            if time.monotonic() - said > 5:
                said = time.monotonic()
                left = (said - began) / number * (len(mine) - number)
                self.say(f"    {number:,} of {len(mine):,} batches, {su.duration(left)} left")
        self.wait()                                   # every process has written its part
        return self.answers.get(keys)

    def _compute(self, batch) -> dict[bytes, list]:
        trees = [tree for item_trees, _ in batch for tree in item_trees]
        sums = {request.key: [0.0, True] for _, item in batch for request in item}
        for tree, branches in zip(trees, self._in_memory(self.score, trees)):
            for (owner, kind, offset), (logprobs, greedy) in zip(tree.owners, branches):
                skip = max(0, owner.start - offset)
                answer = sums[owner.key]
                answer[0] += float(logprobs[skip:].sum()) * (1 if kind == "whole" else -1)
                if kind == "whole":
                    answer[1] = answer[1] and bool(greedy[skip:].all())
        return sums

    def _in_memory(self, function, batch: list) -> list:
        """function(batch), in halves if the device's memory does not hold it whole."""
        try:
            return function(batch)
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise
        torch.cuda.empty_cache()
        self.say(f"    out of memory: a batch of {len(batch)} rows is cut in two")
        half = len(batch) // 2
        return self._in_memory(function, batch[:half]) + self._in_memory(function, batch[half:])

    def generate_until(self, requests, disable_tqdm=False) -> list[str]:
        """lm-eval's own generation, in batches of like length, each cached when it is done.

        An empty context goes on from the prefix token. However many tokens a task asks for, half the context is the prompt's.
        """
        requests = [self._generation(request) for request in requests]
        self._count_generations(requests)
        keys = [self.key("generate", request.args[0], request.args[1]) for request in requests]
        order = sorted(range(len(requests)), key=lambda i: (-len(requests[i].args[0]), i))
        size = max(1, min(64, self.tokens_per_batch // self.max_length))
        batches = [order[i:i + size] for i in range(0, len(order), size)]
        done, began, said = self.answers.get(keys), time.monotonic(), time.monotonic()
        mine = batches[self.part::self.parts]
        for number, batch in enumerate(mine, 1):
            if all(keys[i] in done for i in batch):
                continue
            self.batch_size_per_gpu = len(batch)
            generate = functools.partial(super().generate_until, disable_tqdm=True)
            texts = self._in_memory(generate, [requests[i] for i in batch])
            self.answers.put({keys[i]: [text] for i, text in zip(batch, texts)})
            if time.monotonic() - said > 5:
                said = time.monotonic()
                left = (said - began) / number * (len(mine) - number)
                self.say(f"    {number:,} of {len(mine):,} batches generated, {su.duration(left)} left")
        self.wait()
        answers = self.answers.get(keys)
        return [answers[key][0] for key in keys]


    def _generation(self, request):
        """The request with a text as its context, stop texts that are not empty, and room left for the prompt."""
        context, asked = request.args
        wanted = normalize_gen_kwargs(asked, self.max_gen_toks)
        wanted["max_gen_toks"] = max(1, min(wanted["max_gen_toks"], self.max_length // 2))
        wanted["until"] = [text for text in wanted.get("until") or [] if text]      # an empty one would stop at once
        return dataclasses.replace(request, arguments=(context or "", wanted))

    def _count_generations(self, requests) -> None:
        tasks = {}
        for request, tokens in zip(requests, self.encode([request.args[0] for request in requests])):
            count = tasks.setdefault(request.task_name, {"requests": 0, "truncated": 0})
            count["requests"] += 1
            count["truncated"] += int(len(tokens) > self.max_length - request.args[1]["max_gen_toks"])
        self.counts.update(tasks)


def model_fingerprint(model, tokenizer) -> str:
    """A hash of the weights as they are (so also of their dtype), what the config computes with, and the tokenizer."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    ignored = {"_name_or_path", "transformers_version", "architectures", "use_cache", "dtype", "torch_dtype"}
    config = {key: value for key, value in model.config.to_dict().items() if key not in ignored}
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    digest.update(su.tokenizer_sha256(tokenizer).encode())
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# Task files: their rows, read as they are published, in the one form that a task is made of.

TASK_FILES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
PACKED = (".gz", ".bz2", ".xz", ".zst", ".zip", ".arrow", ".feather", ".xlsx")
PASSAGES = ("context", "passage", "article")
QUESTIONS = ("query", "question", "question_stem", "ctx", "context", "prompt", "goal")
LABELS = ("label", "gold", "answer", "answerKey")


class Row(dict):
    """One row of a task file. where: which one, to be said of a fault in it."""
    where = ""


class RowError(ValueError):
    """What is wrong with one row, without its file and number."""


def read_rows(path: Path) -> list[Row]:
    """The rows of a .jsonl, .json, .csv, .tsv or .parquet file, every value as it stands there.

    Text is UTF-8, with or without a byte order mark, or UTF-16 with one; any line ends. Bytes that are no UTF-8 are kept
    as lone surrogates, and refused where a task reads them. Raises ParameterError, naming file, line and row.
    """
    path = Path(path)
    try:
        if path.suffix.lower() == ".parquet":
            from pyarrow.parquet import read_table
            rows = [(None, row) for row in read_table(path).to_pylist()]
        else:
            data = path.read_bytes()
            utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
            text = data.decode("utf-16" if utf16 else "utf-8-sig", "surrogateescape")
            if path.suffix.lower() in (".csv", ".tsv"):
                rows = table_rows(text, "," if path.suffix.lower() == ".csv" else "\t")
            else:
                rows = json_rows(text, lines_only=path.suffix.lower() == ".jsonl")
    except (RowError, OSError, ValueError) as error:              # pyarrow's errors are ValueErrors
        comma = ", " if isinstance(error, RowError) else " cannot be read: "
        raise su.ParameterError([f"{path}{comma}{error}"]) from None
    found = []
    for number, (line, row) in enumerate(rows):
        where = f"line {line}, row {number}" if line else f"row {number}"
        if not isinstance(row, dict):
            raise su.ParameterError([f"{path}, {where}: {shortened(row)} is no row of named columns."])
        found.append(Row(row))
        found[-1].where = where
    return found


def table_rows(text: str, delimiter: str) -> list[tuple[int, dict]]:
    """[(line, row)] of a table with a header, as spreadsheets write it."""
    csv.field_size_limit(2**31 - 1)                   # the module's own limit is 131,072 characters a cell
    reader, rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True), []
    try:
        header = [name.strip() for name in next(reader, [])]
        if twice := sorted({name for name in header if header.count(name) > 1}):
            raise RowError(f"line 1: the column name {twice[0]!r} stands there twice.")
        line = reader.line_num + 1
        for cells in reader:
            if any(cells) and len(cells) != len(header):
                raise RowError(f"line {line}, row {len(rows)}: {len(cells)} cells under {len(header)} column names; "
                               "put a cell that holds the separator in quotes.")
            if any(cells):
                rows.append((line, dict(zip(header, cells))))
            line = reader.line_num + 1
    except csv.Error as error:
        raise RowError(f"line {reader.line_num}, row {len(rows)}: {error}.") from None
    return rows


def json_rows(text: str, lines_only: bool) -> list[tuple[int | None, object]]:
    """[(line, row)] of one JSON value a line; or, without lines, of a list, alone or the only list of an object."""
    if not lines_only:
        try:
            whole = json.loads(text)
        except (ValueError, RecursionError):
            whole = None                              # then it may be lines under another name
        lists = [value for value in whole.values() if isinstance(value, list)] if isinstance(whole, dict) else []
        whole = lists[0] if len(lists) == 1 and all(isinstance(row, dict) for row in lists[0]) else whole
        if isinstance(whole, list):
            return [(None, row) for row in whole]
    rows = []
    for line, part in enumerate(io.StringIO(text, newline=None), 1):
        if not part.strip():
            continue
        try:
            rows.append((line, json.loads(part)))
        except (ValueError, RecursionError) as error:
            what = f"{error.msg} at its character {error.pos + 1}" if hasattr(error, "msg") else error
            raise RowError(f"line {line}, row {len(rows)}: {shortened(part)} is not JSON: {what}.") from None
    return rows


def shortened(value) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def text_of(value, column: str) -> str:
    """A value that stands for text: a string, or a number as it is written."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and value == value:
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise RowError(f"{column} = {shortened(value)} is no text.")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise RowError(f"{column} = {shortened(value)} is not UTF-8 text; save the file as UTF-8.") from None
    return value


def structure(value):
    """A list or an object that a table's cell holds as JSON, or as Python prints it; any other value as it is."""
    if isinstance(value, str):
        for read in (json.loads, ast.literal_eval):
            with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):
                return read(value)
    return value


def question_of(row: dict) -> str:
    """The question of a row, behind the passage that it is asked of, if that has a column of its own."""
    name = next((name for name in QUESTIONS if name in row), None)
    if name is None:
        raise RowError(f"there is no question; name its column {', '.join(QUESTIONS[:-1])} or {QUESTIONS[-1]}.")
    passage = next((column for column in PASSAGES if name == "question" and row.get(column)), None)
    return "\n".join(text_of(row[column], column) for column in (passage, name) if column)


def choices_of(row: dict) -> tuple[list[str], list[str]]:
    """(texts of the choices, the names that a label may call them by: [] where the file gives none)."""
    column = next((name for name in ("choices", "endings", "options") if name in row), None)
    found, names = (structure(row[column]), []) if column else (None, [])
    if isinstance(found, dict):                       # ARC on the hub: {"text": [...], "label": [...]}
        found, names = found.get("text"), found.get("label") or []
    elif isinstance(found, list) and found and all(isinstance(choice, dict) for choice in found):      # ARC's own files
        found, names = [choice.get("text") for choice in found], [choice.get("label") for choice in found]
    elif column is None and "sol1" in row:            # PIQA
        column, found = "sol1, sol2", [row["sol1"], row.get("sol2")]
    elif column is None:                              # MMLU's tables: a column a choice
        column = "A, B, C, ..."
        found = [row[name] for name in string.ascii_uppercase if name in row and row[name] not in (None, "")]
    if found == []:
        raise RowError("there are no choices; name their column choices or endings.")
    if not isinstance(found, list):
        raise RowError(f"{column} = {shortened(row.get(column))} is no list of choices.")
    return [text_of(choice, f"a choice of {column}") for choice in found], [str(name).strip() for name in names]


def whole_number(value) -> int | None:
    """The number that a label is, also as "2", 2.0 or "2.0"; None for anything else."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return int(value) if value == value and abs(value) < 1e9 and value == int(value) else None
    if isinstance(value, str) and re.fullmatch(r"-?[0-9]{1,9}(\.0+)?", value.strip()):
        return int(float(value))
    return None


def gold_of(label, texts: list[str], names: list[str], counting: str) -> int | None:
    """The index of the choice that a label names; None if it names none. counting: "from 0", "from 1" or "as text"."""
    name = str(label).strip()
    if name in names:
        return names.index(name)
    number = whole_number(label)
    if number is not None:
        index = number - (counting == "from 1")
        if counting == "as text":
            index = texts.index(name) if texts.count(name) == 1 else -1
    elif isinstance(label, str) and re.fullmatch(r"\(?[A-Za-z]\)?[.:]?", name):
        index = string.ascii_uppercase.index(name.strip("().:").upper())
    else:
        index = texts.index(name) if isinstance(label, str) and texts.count(name) == 1 else -1
    return index if 0 <= index < len(texts) else None


def counting_of(column: str, labels: list, choices: list[tuple[list[str], list[str]]]) -> str:
    """How a file's labels name choices, read off all its rows: from 0, unless only another way names one in every row."""
    numbers = [whole_number(label) for label in labels]
    if column == "answerKey" and 0 not in numbers:    # ARC's way
        return "from 1"
    fits = [way for way in ("from 0", "from 1", "as text")
            if all(gold_of(label, *choice, way) is not None for label, choice in zip(labels, choices))]
    return fits[0] if fits else "from 0"


def choice_docs(rows: list[Row]) -> list[dict]:
    """[{"query", "choices", "gold"}] of rows of multiple choice. Raises RowError, its row in `where`."""
    rows = [inner_question(row) for row in rows]
    column = next((name for name in LABELS if any(name in row for row in rows)), "label")
    labels, questions, choices = [], [], []
    for row in rows:
        with faults_of(row):
            label = row.get(column)
            number = whole_number(label)
            if label is None or label != label or str(label).strip() == "" or isinstance(label, bool) or (number or 0) < 0:
                raise RowError(f"{column} = {shortened(label)} does not name one of the choices: a row without a label, "
                               "as in a test split, cannot be scored.")
            labels.append(label)
            choices.append(choices_of(row))
            questions.append(question_of(row))
    counting, docs = counting_of(column, labels, choices), []
    for row, label, (texts, names), question in zip(rows, labels, choices, questions):
        with faults_of(row):
            gold = gold_of(label, texts, names, counting)
            if gold is None:
                raise RowError(f"{column} = {shortened(label)} does not name one of the choices {shortened(texts)}; give an "
                               "index from 0, or a letter.")
            if len(texts) < 2:
                raise RowError(f"there is one choice, {shortened(texts[0])}: it takes two to choose.")
            other = gold_of(label, texts, [], "as text") if column == "answer" and whole_number(label) is not None else None
            if other not in (None, gold) and (counting == "from 1" or not isinstance(first_choice(row), str)):
                raise RowError(f"{column} = {shortened(label)} may be the number of a choice or the choice itself, of "
                               f"{shortened(texts)}; give a letter.")
            docs.append({"query": question, "choices": texts, "gold": gold})
    return docs


def first_choice(row: dict):
    """The first choice as the file has it, a number where it is one."""
    found = structure(row.get("choices"))
    return found[0] if isinstance(found, list) else ""


def inner_question(row: Row) -> Row:
    """ARC's, OpenBookQA's and CommonsenseQA's own files keep stem and choices inside `question`."""
    inner = structure(row.get("question")) if not isinstance(row.get("question"), str) or "stem" in row["question"] else None
    if not (isinstance(inner, dict) and "stem" in inner):
        return row
    found = Row({**row, "question": inner["stem"], "choices": inner.get("choices")})
    found.where = row.where
    return found


def pair_docs(rows: list[Row]) -> list[dict]:
    docs = []
    for row in rows:
        with faults_of(row):
            sentences = [text_of(row.get(column), column) for column in ("sentence_good", "sentence_bad")]
            term = row.get("linguistics_term")
            docs.append({"choices": sentences, "gold": 0, "linguistics_term": term if isinstance(term, str) else None})
    return docs


def blank_docs(rows: list[Row]) -> list[dict]:
    """Winogrande: the sentence up to its blank with either option is a context, what follows is scored behind both."""
    docs = []
    for row in rows:
        with faults_of(row):
            sentence, *options = (text_of(row.get(column), column) for column in ("sentence", "option1", "option2"))
            before, blank, after = sentence.partition("_")
            after = after.lstrip("_").strip()
            if not (blank and after):
                raise RowError(f"sentence = {shortened(sentence)} has no blank _ with something behind it.")
            gold = gold_of(row.get("answer"), options, [], "from 1")
            if gold is None:
                raise RowError(f"answer = {shortened(row.get('answer'))} is not 1 or 2: a row without a label, as in a test "
                               "split, cannot be scored.")
            docs.append({"choices": [before + option for option in options], "gold": gold, "continuation": after,
                         "sentence": sentence})
    return docs


def sum_docs(rows: list[Row]) -> list[dict]:
    """GSM8K: the number behind #### is what an answer is compared with."""
    docs = []
    for row in rows:
        with faults_of(row):
            question, answer = (text_of(row.get(column), column) for column in ("question", "answer"))
            if not re.fullmatch(r"-?\$?-?[0-9][0-9,]*(\.[0-9]+)?\.?", answer.rpartition("####")[2].strip()):
                raise RowError(f"answer = {shortened(answer)} ends in no number that an answer could be compared with; write "
                               "#### and the number.")
            docs.append({"query": f"Question: {question}\nAnswer:", "answer": answer, "question": question})
    return docs


def text_docs(rows: list[Row]) -> list[dict]:
    docs = []
    for row in rows:
        with faults_of(row):
            docs.append({"text": text_of(row.get("text"), "text")})
    return docs


@contextlib.contextmanager
def faults_of(row: Row):
    """Names the row in what is raised about it."""
    try:
        yield
    except RowError as error:
        raise RowError(f"{row.where}: {error}") from None


ACCURACY = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")]
NUMBERS = [{"name": name, "filter": [{"function": "regex", **how}, {"function": "take_first"}]} for name, how in (
    ("strict-match", {"regex_pattern": r"#### (\-?[0-9\.\,]+)"}),
    ("flexible-extract", {"group_select": -1, "regex_pattern": r"(-?[$0-9.,]{2,})|(-?[0-9]+)"}))]
EXACT = {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True, "ignore_case": True,
         "ignore_punctuation": False, "regexes_to_ignore": [",", r"\$", "(?s).*#### ", r"\.$"]}
BITS = [{"metric": name, "aggregation": aggregation, "higher_is_better": False} for name, aggregation in (
    ("word_perplexity", "weighted_perplexity"), ("byte_perplexity", "weighted_perplexity"),
    ("bits_per_byte", "bits_per_byte"))]

# A column's name, never a template: lm-eval evaluates what a template gives, and takes a text of digits for an index.
CHOICE = {"output_type": "multiple_choice", "doc_to_text": "query", "doc_to_choice": "choices", "doc_to_target": "gold",
          "metric_list": ACCURACY}
# name -> (columns that tell it, docs from rows, lm-eval's configuration)
KINDS = {
    "minimal pairs": (({"sentence_good", "sentence_bad"},), pair_docs,
                      {**CHOICE, "doc_to_text": "", "target_delimiter": "", "metric_list": ACCURACY[:1]}),
    "blanks": (({"sentence", "option1", "option2"},), blank_docs,
               {**CHOICE, "doc_to_text": "gold", "doc_to_target": "continuation", "metric_list": ACCURACY[:1]}),
    "choice": (({"choices"}, {"endings"}, {"options"}, {"sol1", "sol2"}, {"A", "B"}), choice_docs, CHOICE),
    "sums": (({"question", "answer"},), sum_docs,
             {"output_type": "generate_until", "doc_to_text": "query", "doc_to_target": "answer", "filter_list": NUMBERS,
              "metric_list": [EXACT], "generation_kwargs": {"until": ["Question:", "</s>", "<|im_end|>"], "do_sample": False}}),
    "text": (({"text"},), text_docs, {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "text",
                                      "metric_list": BITS}),
}


def task_config(rows: list[Row], path: Path) -> tuple[dict, list[dict]]:
    """(lm-eval's configuration of the task that these rows are, rows in the form it expects). By the columns:

    sentence_good, sentence_bad              minimal pairs (BLiMP): the likelier sentence, each behind EOS
    sentence, option1, option2, answer       Winogrande: what follows the blank, behind either option; answer 1 or 2
    choices | endings | options | sol1, sol2 | A, B, ...
                                             multiple choice, after query | question | question_stem | ctx | context |
                                             prompt | goal as it stands, question behind context | passage | article;
                                             label | gold | answer | answerKey an index, a letter, one of the file's own
                                             names or the choice itself. choices may be a list or ARC's {"text", "label"}
    question, answer                         GSM8K: generated, compared by lm-eval's two filters
    text                                     perplexity and bits per byte

    Indices count from 0, unless that leaves a row of the file without a choice and counting from 1 does not. No column but
    these is read. Raises ParameterError naming file and row.
    """
    if not rows:
        raise su.ParameterError([f"{path} has no rows."])
    columns = set().union(*map(inner_question, rows))
    for kind, (tells, make, config) in KINDS.items():
        if any(names <= columns for names in tells):
            try:
                docs = make(rows)
            except RowError as error:
                raise su.ParameterError([f"{path}, {error}"]) from None
            return {**config, "metadata": {"version": "local", "headline": headline(kind, columns)}}, docs
    raise su.ParameterError([f"{path} is no task: its columns are {', '.join(sorted(map(str, columns)))}; the kinds that are "
                             "known, by their columns, stand in 05_benchmark and in stentor_eval.task_config."])


def headline(kind: str, columns: set) -> str | None:
    """The metric that is reported for files of HellaSwag, ARC, OpenBookQA and PIQA; None leaves it to the reader."""
    published = bool({"endings", "sol1"} & columns or ("answerKey" in columns and "question_concept" not in columns))
    return "acc_norm" if kind == "choice" and published else None


def task_files(place) -> list[Path]:
    """The task files of a folder, or the one file; none of those that begin with a dot."""
    place = Path(place)
    paths = [place] if place.is_file() else sorted(place.glob("*")) if place.is_dir() else []
    return [path for path in paths
            if path.suffix.lower() in TASK_FILES and path.is_file() and not path.name.startswith(".")]


def read_local(place) -> tuple[list[tuple[Path, dict, list]], list[str]]:
    """([(file, lm-eval's configuration, docs)], [what is wrong, a sentence a file]) of a folder of task files, or one file."""
    place, found, problems = Path(place), [], []
    for path in task_files(place):
        try:
            found.append((path, *task_config(read_rows(path), path)))
        except su.ParameterError as error:
            problems += error.problems
    packed = [path for path in place.glob("*") if path.suffix.lower() in PACKED and not path.name.startswith(".")]
    problems += [f"{path} cannot be read as it is; unpack or convert it to {', '.join(TASK_FILES)}." for path in sorted(packed)]
    if not (found or problems):
        problems = [f"{str(place)!r} is not a folder with {', '.join(TASK_FILES)} or .yaml task files, nor one such file."]
    return found, problems


def local_problems(place) -> list[str]:
    """What is wrong with a folder of task files, or one file, in sentences; a folder of YAML is lm-eval's own to judge."""
    return [] if list(Path(place).glob("*.yaml")) else read_local(place)[1]


def local_tasks(place, name: str | None = None) -> list:
    """lm-eval tasks from a folder: its own YAML files if it has any, else every task file, called <name>/<file>.

    name: by default the folder's. place may be one task file: called `name`, or by default <its folder>/<file>.
    Raises ParameterError with every file's first fault.
    """
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask
    place = Path(place)
    if list(place.glob("*.yaml")):
        from lm_eval.tasks import TaskManager
        manager = TaskManager(include_path=str(place), include_defaults=False)
        return list(manager.load(manager.all_subtasks)["tasks"].values())
    found, problems = read_local(place)
    if problems:
        raise su.ParameterError(problems)
    stems, tasks = [path.stem for path, _, _ in found], []
    for path, config, docs in found:
        data = Dataset.from_list(docs)
        own = path.stem if stems.count(path.stem) == 1 else path.name       # x.csv beside x.jsonl
        called = name if name and place.is_file() else f"{name or path.absolute().parent.name}/{own}"
        tasks.append(ConfigurableTask(config={
            "task": called, "custom_dataset": lambda data=data, **_: {"test": data},
            "test_split": "test", "num_fewshot": 0, **config}))
    return tasks


# ---------------------------------------------------------------------------------------------------------------------
# Tasks: lm-eval's by name, and files of your own.


def local_blocks(places) -> dict[str, dict]:
    """{block name: block for `run`} of folders and task files, named by as much of each path's end as tells them apart."""
    paths, blocks = list(dict.fromkeys(Path(place).resolve() for place in places)), {}
    for path in paths:
        length = next(n for n in range(1, len(path.parts) + 1)
                      if sum(path.parts[-n:] == other.parts[-n:] for other in paths) == 1)
        name = "/".join(path.parts[-length:])
        key = "local_" + name.replace("/", "_")
        key += "_" * (key in blocks)
        blocks[key] = {"title": f"local: {name}", "local": str(path), "name": name}
    return blocks


def load_tasks(block: dict, seed: int) -> dict:
    """{"tasks": {name: Task}, "groups": ...} of a block: {"local": folder or file, "name"} or
    {"tasks": [names], "num_fewshot": n}."""
    if "local" in block:
        loaded = {"tasks": {task.config.task: task for task in local_tasks(block["local"], block.get("name"))},
                  "groups": {}}
    else:
        loaded = task_manager().load(list(block["tasks"]))
    for task in loaded["tasks"].values():
        if task.config.num_fewshot != 0 and "num_fewshot" in block:
            task.set_config(key="num_fewshot", value=block["num_fewshot"])
        elif task.config.num_fewshot is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=seed)
    return loaded


@functools.cache
def task_manager():
    from lm_eval.tasks import TaskManager
    return TaskManager()                              # reads the index of all tasks: some seconds


# ---------------------------------------------------------------------------------------------------------------------
# The runner.


def evaluate_block(lm: StentorLM, block: dict, *, limit: int | None = None, seed: int = SEED, done=lambda key: None,
                   texts: dict | None = None) -> dict:
    """Score one block: {"key", "tasks": {name: its scores and items}, "groups", ...}. done(key) may give a finished one.
    texts, if given, is filled with each task's item texts.

    limit: at most so many items of each task, drawn by `seed`. The key hashes the model, every prompt, choice and target,
    task versions, settings and the harness version.
    """
    import lm_eval
    from lm_eval.evaluator import evaluate
    random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
    loaded = load_tasks(block, seed)
    digest = hashlib.sha256(json.dumps([lm.fingerprint, lm_eval.__version__, seed, limit]).encode())
    samples = {}
    for name, task in loaded["tasks"].items():
        count = len(task.eval_docs)
        samples[name] = sorted(random.Random(f"{seed} {name}").sample(range(count), min(limit or count, count)))
        task.build_all_requests(samples=samples[name], rank=0, world_size=1)
        refuse_unlabelled(task)
        task.build_all_requests = lambda **_: None    # evaluate() would build them once more, which costs more than scoring
        digest.update(json.dumps([name, str(task.VERSION), task.config.num_fewshot, task.config.metric_list],
                                 default=str).encode())
        for instance in task.instances:
            digest.update(json.dumps([instance.request_type, instance.doc_id, instance.args, instance.doc],
                                     default=str).encode("utf-8", "surrogatepass"))
        if texts is not None:
            items = item_texts(task)                  # two blocks may have a task of one name
            texts[name if texts.get(name, items) == items else f"{name} [{block.get('title')}]"] = items
    key = digest.hexdigest()
    if finished := done(key):
        return finished
    lm.counts.clear()
    began = time.monotonic()
    results = evaluate(lm, loaded, samples=samples, bootstrap_iters=0, log_samples=True)
    seconds = time.monotonic() - began
    tasks = {name: task_result(lm, loaded["tasks"][name], results["samples"][name], results["results"][name])
             for name in loaded["tasks"]}
    groups = {name: list(group.get_all_tasks()) for name, group in loaded["groups"].items()}
    groups = {name: [task if isinstance(task, str) else task.task_name for task in members]
              for name, members in groups.items()}
    return {"key": key, "tasks": tasks, "groups": groups, "seconds": seconds, "lm_eval": lm_eval.__version__,
            "limit": limit, "seed": seed}


def golds_of(task, doc: dict) -> list[int | None]:
    """The indices of an item's right choices; None stands for a target that names none of them."""
    found = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    choices = task.doc_to_choice(doc)
    golds = [choices.index(gold) if gold in choices else gold for gold in (found if isinstance(found, list) else [found])]
    return [gold if isinstance(gold, int) and 0 <= gold < len(choices) else None for gold in golds]


def refuse_unlabelled(task) -> None:
    """Raises ParameterError if an item has no right answer: lm-eval would count it as wrong."""
    if task.config.process_results is not None or task.OUTPUT_TYPE not in ("multiple_choice", "generate_until"):
        return
    for instance in task.instances:
        if instance.idx:                              # one request of an item stands for it
            continue
        target = task.doc_to_target(instance.doc)
        if task.OUTPUT_TYPE == "multiple_choice":
            wrong = None in golds_of(task, instance.doc) or not golds_of(task, instance.doc)
        else:
            wrong = target is None or target == [] or str(target).strip() in ("", "None")
        if wrong:
            raise su.ParameterError([f"{task.config.task}, item {instance.doc_id}: its target {shortened(target)} is no right "
                                     "answer; a split without labels, as test splits are, cannot be scored."])


def share_of_ties(scores, golds: list[int]) -> tuple[float, bool]:
    """(what an item scores, whether choices tie for the best): 1 or 0, and among k tied ones a k-th each right one.

    That is what guessing among them scores; lm-eval takes the first, which in minimal pairs is the good sentence.
    """
    best = max(scores)
    tied = [i for i, score in enumerate(scores) if math.isclose(score, best, rel_tol=1e-9)]
    return len(set(golds) & set(tied)) / len(tied), len(tied) > 1


def count_ties(task, samples: list[dict], result: dict) -> None:
    """Put every accuracy's items, mean and number of ties into `result`; lm-eval's own mean beside it where it differs."""
    lengths = {"acc": lambda choice: 1, "acc_norm": len, "acc_bytes": lambda choice: len(choice.encode())}
    for name in [name for name in result["items"] if name.split(",")[0] in lengths]:
        length = lengths[name.split(",")[0]]
        found = []
        for sample in samples:
            choices = task.doc_to_choice(sample["doc"])
            lls = [answer[0] / max(1, length(choice)) for answer, choice in zip(sample["filtered_resps"], choices)]
            if any(map(math.isnan, lls)):             # no choice is the likeliest, yet argmax names one
                raise ValueError(f"{task.config.task}, item {sample['doc_id']}: the model's log-likelihood is not a number; "
                                 "where its weights are sound, try DTYPE = 'float32'.")
            found.append(share_of_ties(lls, golds_of(task, sample["doc"])))
        items, own = [score for score, _ in found], result["metrics"][name]
        result["items"][name], result["metrics"][name] = items, float(np.mean(items))
        if ties := sum(tied for _, tied in found):
            result.setdefault("ties", {})[name] = ties
        if not math.isclose(own, result["metrics"][name], abs_tol=1e-9):
            result.setdefault("lm_eval_metrics", {})[name] = own


def task_result(lm: StentorLM, task, samples: list[dict], scores: dict) -> dict:
    """What is kept of one task: counts, metrics, and each item's scores for paired tests.

    metrics: lm-eval's, but for ties (see share_of_ties): "ties" counts them, "lm_eval_metrics" has its own figure if other.
    headline: the metric to report, where the task's files say so. bits_per_byte and perplexity: of the right continuation,
    over all items (multiple choice with one right choice). chance: mean over items of 1 / number of choices; None for
    tasks that are no choice.
    """
    names = [name for name in scores if "," in name and not name.split(",")[0].endswith("_stderr")]
    items = {}
    for sample in samples:
        for metric in sample["metrics"]:
            value = sample[metric]
            items.setdefault(f"{metric},{sample['filter']}", []).append(
                float(value) if isinstance(value, (int, float, np.number)) else list(map(float, value)))
    samples = [sample for sample in samples if sample["filter"] == samples[0]["filter"]]
    result = {"version": str(task.VERSION), "num_fewshot": task.config.num_fewshot, "n": len(samples),
              "output_type": task.OUTPUT_TYPE, "metrics": {name: scores[name] for name in names},
              "chance": None, "headline": (task.config.metadata or {}).get("headline"), **lm.counts.get(task.config.task, {}),
              "phenomenon": samples[0]["doc"].get("linguistics_term"),
              "doc_ids": [sample["doc_id"] for sample in samples], "items": items}
    if task.OUTPUT_TYPE == "multiple_choice":
        result["chance"] = float(np.mean([1 / len(task.doc_to_choice(sample["doc"])) for sample in samples]))
        result["loglikelihoods"] = [[answer[0] for answer in sample["filtered_resps"]] for sample in samples]
        if task.config.process_results is None:
            count_ties(task, samples, result)
        golds = [golds_of(task, sample["doc"]) for sample in samples]
        golds = [gold[0] if len(gold) == 1 else None for gold in golds]
        if all(isinstance(gold, int) for gold in golds):
            pairs = [sample["arguments"][gold] for sample, gold in zip(samples, golds)]
            nats = -sum(lls[gold] for lls, gold in zip(result["loglikelihoods"], golds))
            text_bytes = sum(len(continuation.encode()) for _, continuation in pairs)
            result["bits_per_byte"] = nats / math.log(2) / text_bytes if text_bytes else None
            result["perplexity"] = math.exp(nats / max(1, sum(lm.token_counts(pairs))))
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        nats = -sum(sample["filtered_resps"][0] for sample in samples)
        texts = [sample["arguments"][0][0] for sample in samples]
        result["bits_per_byte"] = nats / math.log(2) / sum(len(text.encode()) for text in texts)
        result["perplexity"] = math.exp(nats / sum(map(len, lm.encode(texts))))
    return result


# ---------------------------------------------------------------------------------------------------------------------
# Contamination: which items stand in the text that the model was trained on. Possible because the token store is ours.

NGRAM = 13        # words, as GPT-3's appendix C
SHORT = 5         # items of fewer than 13 words are looked for whole, down to this length


# What stands before a question or an answer in prompts and in dumps of data sets: no word of the item.
HEADERS = re.compile(r"\b(?:question|answer|q|a)\W{0,3}:")
# Signs inside a word or a number, which some leave out: don't and dont, well-known, 1,000.
INSIDE = re.compile(r"(?<=\w)['\u2019\u2010\u2011-](?=\w)|(?<=\d)[.,](?=\d)")


def words_of(text: str) -> list[str]:
    """Words without case, punctuation, "Question:" and "Answer:"; \x00, the end of a document, is one of its own."""
    text = unicodedata.normalize("NFKC", text).casefold()
    return re.findall(r"\w+|\x00", INSIDE.sub("", HEADERS.sub(" ", text) if ":" in text else text))


def ngram_hashes(ids: np.ndarray, n: int) -> np.ndarray:
    """A 64-bit hash of each n words in a row (ids: uint64, 0 for a word of no item); 0 where one of them is 0."""
    if len(ids) < n:
        return np.zeros(0, np.uint64)
    hashes = np.zeros(len(ids) - n + 1, np.uint64)
    for i in range(n):
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + ids[i:len(ids) - n + 1 + i]
    unknown = np.cumsum(np.concatenate([[0], ids == 0]))
    hashes[unknown[n:] > unknown[:-n]] = 0
    return hashes


def store_texts(store_dir, tokenizer, chunk_tokens: int = 1 << 20):
    """The training text of a token store, about chunk_tokens at a time, cut between documents (\x00 stands there)."""
    store_dir = Path(store_dir)
    manifest = json.loads((store_dir / "manifest.json").read_text())
    eos = manifest["eos_token_id"]
    decode = tokenizer.vocabulary.decode if hasattr(tokenizer, "vocabulary") else tokenizer.decode
    for source in manifest["sources"].values():
        carry = np.zeros(0, np.int64)
        for shard in source["shards"]:
            tokens = np.memmap(store_dir / shard["file"], dtype="<u2", mode="r")
            for start in range(0, len(tokens), chunk_tokens):
                ids = np.concatenate([carry, tokens[start:start + chunk_tokens].astype(np.int64)])
                ends = np.flatnonzero(ids == eos)
                cut = int(ends[-1]) + 1 if len(ends) else 0      # the longest document is what memory must hold
                carry = ids[cut:]
                yield "\n\x00\n".join(decode(part[part != eos]) for part in np.split(ids[:cut], ends + 1) if len(part))
        yield decode(carry)


def contamination(texts: dict[str, list[list[str]]], store_dir, tokenizer) -> dict[str, dict]:
    """{task: counts} of items whose words stand in the store's training text. texts: task -> items -> their forms.

    The first form of an item is itself, question and right answer, and decides how it is looked for. items_checked: items
    of 13 words or more; contaminated: those of which any 13 in a row are in the store. short_checked, short_found: items of
    5 to 12 words, looked for whole. Shorter ones cannot be checked: they are in `items` alone. The other forms (see
    item_texts) are looked for alike, except for words that another item of the task has too, which tell nothing of this one.
    Memory holds the items, never the store.
    """
    values, random_ids = {}, random.Random(0)
    for task in texts.values():
        for item in task:
            for text in item:
                for word in words_of(text):
                    if word not in values:
                        values[word] = random_ids.getrandbits(64) | 1
    values.pop("\x00", None)

    def ids_of(text):
        return np.array([values.get(word, 0) for word in words_of(text)], dtype=np.uint64)

    wanted, items = {}, {}                            # length -> set of hashes; task -> what task_hashes gives
    for name, task in texts.items():
        items[name] = task_hashes([[ids_of(text) for text in item] for item in task])
        for _, found in items[name]:
            for length, hashes in found.items():
                wanted.setdefault(length, set()).update(hashes)
    tables = {length: np.array(sorted(hashes), np.uint64) for length, hashes in wanted.items() if hashes}
    seen = {length: np.zeros(len(table), bool) for length, table in tables.items()}
    for text in store_texts(store_dir, tokenizer):
        ids = ids_of(text)
        for length, table in tables.items():
            hashes = ngram_hashes(ids, length)
            place = np.minimum(np.searchsorted(table, hashes), len(table) - 1)
            seen[length][place[table[place] == hashes]] = True
    there = {length: set(table[seen[length]].tolist()) for length, table in tables.items()}
    report = {}
    for name, rows in items.items():
        hit = [any(not hashes.isdisjoint(there[length]) for length, hashes in found.items()) for _, found in rows]
        long, short = ([low <= length <= high for length, _ in rows] for low, high in ((NGRAM, NGRAM), (SHORT, NGRAM - 1)))
        report[name] = {"items": len(rows), "items_checked": sum(long), "contaminated": sum(map(min, hit, long)),
                        "short_checked": sum(short), "short_found": sum(map(min, hit, short))}
    return report


def task_hashes(task: list[list[np.ndarray]]) -> list[tuple[int, dict[int, set]]]:
    """[(words of the item, 13 at most, {length: hashes to look for})] of one task's items in word ids.

    Nothing is looked for where the item itself is too short.
    """
    owner, found = {}, []                             # a hash -> the item that has it, None if several have
    for forms in task:
        item = forms[0].tobytes()
        rows = [(min(NGRAM, len(ids)), ids) for ids in dict((ids.tobytes(), ids) for ids in forms).values()]
        hashes = [(length, {h for h in map(int, ngram_hashes(ids, length)) if h} if length >= SHORT else set())
                  for length, ids in rows]
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


def item_texts(task) -> list[list[str]]:
    """The forms of each item, without few-shot examples or the task's description. The first is its own question with its
    right answer; the others: each question column with the answer as it is written or scored, the prompt with the answer,
    the question with all choices, and each question alone."""
    docs = {instance.doc_id: instance.doc for instance in task.instances}
    return [item_forms(task, doc) for doc in docs.values()]


def item_forms(task, doc: dict) -> list[str]:
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        return [str(task.doc_to_target(doc))]
    answers, exams, prompt, target = [], [], task.doc_to_text(doc), task.doc_to_target(doc)
    if task.OUTPUT_TYPE == "multiple_choice":
        choices = task.doc_to_choice(doc)
        right = [choices[gold] for gold in golds_of(task, doc) if gold is not None]
        if task.multiple_input:
            prompt = right[0] if right else ""
        else:
            target = right[0] if right else ""
    with contextlib.suppress(RowError, TypeError, AttributeError):      # its own words, where the prompt has a letter
        row, = choice_docs([Row(doc)])
        answers.append(row["choices"][row["gold"]])
        for form in ("{1}", "{0} {1}"):               # as exams print it, each choice behind its letter or not
            exams.append(" ".join([row["query"], *map(form.format, string.ascii_uppercase, row["choices"])]))
    answers.append(str(target[0] if isinstance(target, list) and target else target))
    questions = [text for text in (doc.get(name) for name in QUESTIONS) if isinstance(text, str) and text.strip()]
    with contextlib.suppress(RowError):
        questions.insert(0, question_of(doc))
    questions = list(dict.fromkeys(questions or [str(prompt)]))
    pairs = [f"{question} {answer}" for question in questions for answer in answers]
    others = [f"{prompt} {answers[-1]}", *exams, *questions, *filter(None, [doc.get("sentence")])]
    return list(dict.fromkeys([*pairs, *others]))


def model_problem(path: str) -> str | None:
    """What is wrong with `path` as a model folder; None for a hub id ("hf:owner/name", or owner/name that is no folder)."""
    folder = Path(path)
    if str(path).startswith("hf:") or (not folder.is_dir() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(path))):
        return None
    if not (folder / "config.json").is_file():
        return "is not a model folder (no config.json); run 02 first, or name a folder or a hub id"


def load_scored(path: str, dtype: str, device: torch.device):
    """(model in eval mode, tokenizer) from a folder or a hub id; never code from there, but for our own tokenizer."""
    from transformers import AutoModelForCausalLM, GenerationConfig
    from transformers.utils import logging as transformers_logging
    transformers_logging.set_verbosity_error()
    name = str(path).removeprefix("hf:")
    tokenizer, settings = su.load_tokenizer(path), {"dtype": getattr(torch, dtype)}
    if Path(name).is_dir():
        model = su.load_model(name, **settings)
    else:
        # Some peers on the hub have pickled weights only (TinyStories-33M): transformers reads those with weights_only=True.
        model, info = AutoModelForCausalLM.from_pretrained(name, output_loading_info=True, **settings)
        if problem := su.weights_problem(model, info):
            raise su.ParameterError([f"{name} cannot be scored: {problem}."])
    if problems := su.tokenizer_fit(tokenizer, model.get_input_embeddings().num_embeddings):
        raise su.ParameterError(problems)
    # Sampling settings that a folder recommends to its users are no part of the protocol (greedy, unless a task says so).
    ids = {f"{kind}_token_id": getattr(model.generation_config, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    model.generation_config = GenerationConfig(**ids)
    model.to(device).eval()
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def contamination_report(store: dict, texts: dict, folder: Path, say) -> None:
    """Write contamination.json, unless it is there for these very items and this store."""
    store_dir = Path(store["path"])
    digest = hashlib.sha256(json.dumps([PROTOCOL, NGRAM, SHORT, texts]).encode("utf-8", "surrogatepass"))
    digest.update((store_dir / "manifest.json").read_bytes())
    key, target = digest.hexdigest(), folder / "contamination.json"
    with contextlib.suppress(OSError, ValueError):
        if json.loads(target.read_text())["key"] == key:
            return
    began = time.monotonic()
    tasks = contamination(texts, store_dir, su.load_tokenizer(store["tokenizer"]))
    su.write_atomically(target, json.dumps({"key": key, "ngram": NGRAM, "tasks": tasks}, indent=1))
    say(f"contamination | {sum(map(len, texts.values())):,} items against the token store in "
        f"{su.duration(time.monotonic() - began)}")


def run(config: dict, folder: Path, say=print) -> dict:
    """Score every model on every block of `config`; what is done is not done again. Returns run_summary.json's content.

    config: {"models": {name: path}, "blocks": {name: {"title", "tasks" | "local", "num_fewshot"}}, "dtype", and if
    need be "limit", "seed", "tokens_per_batch",
    "store": {"path", "tokenizer"} of a token store to look for the items in, or None}.
    Writes <folder>/<model>/<block>.json as each is done and <folder>/run_summary.json after each; a block that fails is
    written down as failed and the next one begins. With torchrun every process computes its part of each block's
    requests; they meet in the cache, and process 0 writes.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    barrier = contextlib.nullcontext
    if world_size > 1:
        import datetime
        torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(days=2))
        barrier = torch.distributed.barrier
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    if rank:
        barrier()                                     # process 0 makes the file: only one may switch a new one to WAL
    cache = Cache(folder / "cache.sqlite")
    if not rank:
        barrier()
    summary, texts = {"models": {}}, {}
    for name, path in config["models"].items():
        try:
            model, tokenizer = load_scored(path, config["dtype"], device)
        except Exception as error:                    # a peer that the hub does not give must not cost the model
            if not summary["models"]:
                raise
            summary["models"][name] = {"path": path, "error": f"{type(error).__name__}: {error}"[:500], "blocks": {}}
            say(f"{name} | not loaded: {type(error).__name__}: {error}")
            continue
        lm = StentorLM(model, tokenizer, cache=cache, rank=rank, world_size=world_size, barrier=barrier,
                       tokens_per_batch=config.get("tokens_per_batch"), say=say if rank == 0 else None)
        entry = summary["models"][name] = {
            "path": path, "fingerprint": lm.fingerprint, "parameters": sum(p.numel() for p in model.parameters()),
            "dtype": config["dtype"], "prefix_token": tokenizer.convert_ids_to_tokens(lm.prefix_token_id),
            "max_length": lm.max_length, "tokens_per_batch": lm.tokens_per_batch, "contexts_shared": lm.share, "blocks": {}}
        (folder / name).mkdir(parents=True, exist_ok=True)
        for block_name, block in config["blocks"].items():
            target = folder / name / f"{block_name}.json"

            def finished(key):
                with contextlib.suppress(OSError, ValueError):
                    before = json.loads(target.read_text())
                    return before if before.get("key") == key else None

            before_key = target.stat().st_mtime_ns if target.exists() else None
            try:
                result = evaluate_block(lm, block, limit=config.get("limit"), seed=config.get("seed", SEED), done=finished,
                                        texts=texts if config.get("store") else None)
            except (KeyboardInterrupt, SystemExit):
                raise
            except Exception as error:                # one block's failure must not cost the others
                if world_size > 1 and not isinstance(error, su.ParameterError):       # that all processes found alike
                    raise                             # the other processes wait in this block: start all again
                entry["blocks"][block_name] = {"status": "failed", "error": f"{type(error).__name__}: {error}"[:500]}
                say(f"{name} | {block['title']} | failed: {type(error).__name__}: {error}")
            else:
                if rank == 0:
                    result |= {"title": block["title"], "model": name}
                    data = json.dumps(result, indent=1)
                    again = before_key is not None and finished(result["key"]) is not None
                    if not again:
                        su.write_atomically(target, data)
                    items = sum(task["n"] for task in result["tasks"].values())
                    say(f"{name} | {block['title']} | {items:,} items "
                        + ("were already done" if again else f"in {su.duration(result['seconds'])}"))
                entry["blocks"][block_name] = {"status": "ok", "key": result["key"], "title": block["title"],
                                               "lm_eval": result["lm_eval"]}
            if rank == 0:
                su.write_atomically(folder / "run_summary.json", json.dumps(summary, indent=1))
            barrier()
        del model, lm
    if rank == 0 and texts:
        contamination_report(config["store"], texts, folder, say)
    if world_size > 1:
        torch.distributed.destroy_process_group()
    return summary


class EvaluationFailed(su.StentorError, RuntimeError):
    """The evaluating process ended with an error; the message is its last lines."""


def launch(config: dict, folder, *, num_processes: int | None = None, say=None) -> dict:
    """Write <folder>/benchmark.json and run it in a process of its own (several with torchrun), its log shown here.

    num_processes: default one a GPU, or 1 on the CPU. Killed? The same call goes on. Returns run_summary.json's content.
    """
    say = say or (lambda text: print(text, flush=True))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    su.write_atomically(folder / "benchmark.json", json.dumps(config, indent=1))
    num_processes = num_processes or max(1, torch.cuda.device_count())
    here = str(Path(__file__).resolve().parent)
    command = [sys.executable, "-m", "stentor_eval", str(folder / "benchmark.json")]
    if num_processes > 1:
        command[1:3] = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes),
                        "--module", "stentor_eval"]
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // num_processes))} if num_processes > 1 else {}
    env = {**su.PROCESS_ENVIRONMENT, **threads, **os.environ, "PYTHONUNBUFFERED": "1",
           "PYTHONPATH": os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))}
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               errors="replace", start_new_session=True)
    tail, errors = [], []
    try:
        for line in process.stdout:
            say(line.rstrip("\n"))
            tail = (tail + [line])[-15:]
            if re.match(r"(\[rank\d+\]: ?)?[\w.]+(Error|Exception)\b", line):
                errors.append(line)                   # torchrun buries it under its own report
        code = process.wait()
    except BaseException:                             # the stop button: the cache holds every batch that is done
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
    if code:
        raise EvaluationFailed(f"the evaluation ended with exit code {code}. "
                               + "".join(errors[-3:] or ["Its last lines:\n", *tail]))
    return json.loads((folder / "run_summary.json").read_text())


def main(argv: list[str] | None = None) -> int:
    """`python -m stentor_eval BENCHMARK_JSON`."""
    arguments = argv or sys.argv[1:]
    if len(arguments) != 1:
        print("usage: python -m stentor_eval BENCHMARK_JSON", file=sys.stderr)
        return 2
    path = Path(arguments[0]).resolve()
    try:
        run(json.loads(path.read_text()), path.parent, say=lambda text: print(text, flush=True))
    except su.ParameterError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.modules.setdefault("stentor_eval", sys.modules["__main__"])
    sys.exit(main())
