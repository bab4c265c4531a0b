"""What 05_benchmark runs in a process of its own: lm-eval's tasks and metrics, scored by a model class that fits us.

Top to bottom:  what a score is -> the model class -> tasks -> the runner -> launch.
Also a command:  python -m stentor_eval outputs/demo/benchmark/benchmark.json      (what `launch` starts)
"""
from __future__ import annotations

import contextlib
import csv
import functools
import hashlib
import json
import logging
import math
import os
import random
import re
import signal
import sqlite3
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

PROTOCOL = 2  # raised whenever scores may change: it is part of every cache key
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

    def tok_encode(self, string, *args, **kwargs):
        return self.encode([string])[0] if self.ours else super().tok_encode(string, *args, **kwargs)

    def _encode_pair(self, context, continuation):
        """(tokens that are only condition, tokens to sum): together always encode(context + continuation)."""
        request = self.requests_of([(context, continuation)])[0]
        return request.whole[:request.start], request.whole[request.start:]

    def requests_of(self, pairs: list[tuple[str, str]]) -> list[Request]:
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
            requests.append(Request(self.key("loglikelihood", context, continuation), whole, before, start))
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
        texts = [request.args[0] for request in requests]
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
        """lm-eval's own generation, in batches of like length, each cached when it is done."""
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
# Tasks: lm-eval's by name, and files of your own.


def read_rows(path: Path) -> list[dict]:
    """The rows of a .jsonl or .csv file (UTF-8). In a csv, a cell that starts with [ is read as JSON."""
    with open(path, encoding="utf-8", newline="") as file:
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in file if line.strip()]
        return [{key: json.loads(value) if value.startswith("[") else value for key, value in row.items()}
                for row in csv.DictReader(file)]


def task_config(rows: list[dict], path: Path) -> tuple[dict, list[dict]]:
    """(lm-eval's configuration of the task that these rows are, rows in the form it expects). By the columns:

    sentence_good, sentence_bad                    minimal pairs (BLiMP): the likelier sentence, each behind EOS
    choices, label|gold|answer, query|question|ctx|context|prompt     multiple choice; label an index or a letter
    question, answer                               GSM8K: generated, compared by lm-eval's two filters
    text                                           perplexity and bits per byte
    """
    columns = set(rows[0]) if rows else set()
    accuracy = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")]
    asked = next((name for name in ("query", "question", "ctx", "context", "prompt") if name in columns), None)
    label = next((name for name in ("label", "gold", "answer") if name in columns), None)
    if {"sentence_good", "sentence_bad"} <= columns:
        return {"output_type": "multiple_choice", "doc_to_text": "", "doc_to_target": 0, "target_delimiter": "",
                "doc_to_choice": "{{[sentence_good, sentence_bad]}}", "metric_list": accuracy[:1]}, rows
    if "choices" in columns and asked and label:
        for number, row in enumerate(rows):
            gold = str(row[label])
            gold = int(gold) if gold.isdigit() else "ABCDEFGHIJ".find(gold)
            if not (isinstance(row["choices"], list) and 0 <= gold < len(row["choices"])):
                raise su.ParameterError([f"{path}, row {number}: {label} = {row[label]!r} does not name one of the choices "
                                         f"{row['choices']!r}; give an index from 0, or a letter."])
            row["gold"] = gold
        return {"output_type": "multiple_choice", "doc_to_text": "{{%s}}" % asked, "doc_to_target": "gold",
                "doc_to_choice": "choices", "metric_list": accuracy}, rows
    if {"question", "answer"} <= columns:
        filters = [{"name": name, "filter": [{"function": "regex", **how}, {"function": "take_first"}]} for name, how in (
            ("strict-match", {"regex_pattern": r"#### (\-?[0-9\.\,]+)"}),
            ("flexible-extract", {"group_select": -1, "regex_pattern": r"(-?[$0-9.,]{2,})|(-?[0-9]+)"}))]
        exact = {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True, "ignore_case": True,
                 "ignore_punctuation": False, "regexes_to_ignore": [",", r"\$", "(?s).*#### ", r"\.$"]}
        return {"output_type": "generate_until", "doc_to_text": "Question: {{question}}\nAnswer:",
                "doc_to_target": "{{answer}}", "filter_list": filters, "metric_list": [exact],
                "generation_kwargs": {"until": ["Question:", "</s>", "<|im_end|>"], "do_sample": False}}, rows
    if "text" in columns:
        metrics = [{"metric": name, "aggregation": aggregation, "higher_is_better": False} for name, aggregation in (
            ("word_perplexity", "weighted_perplexity"), ("byte_perplexity", "weighted_perplexity"),
            ("bits_per_byte", "bits_per_byte"))]
        return {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
                "metric_list": metrics}, rows
    raise su.ParameterError([f"{path} is no task: its columns are {', '.join(sorted(columns)) or 'none'}; see "
                             "stentor_eval.task_config for the four kinds that are known."])


def local_tasks(folder) -> list:
    """lm-eval tasks from a folder: its own YAML files if it has any, else every .jsonl and .csv, named <folder>/<file>."""
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask
    folder = Path(folder)
    if list(folder.glob("*.yaml")):
        from lm_eval.tasks import TaskManager
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        return list(manager.load(manager.all_subtasks)["tasks"].values())
    paths = sorted(path for path in folder.glob("*") if path.suffix in (".jsonl", ".csv")) if folder.is_dir() else []
    if not paths:
        raise su.ParameterError([f"{folder} is not a folder with .jsonl, .csv or .yaml task files."])
    tasks = []
    for path in paths:
        config, rows = task_config(read_rows(path), path)
        data = Dataset.from_list(rows)
        tasks.append(ConfigurableTask(config={
            "task": f"{folder.name}/{path.stem}", "custom_dataset": lambda data=data, **_: {"test": data},
            "test_split": "test", "num_fewshot": 0, "metadata": {"version": "local"}, **config}))
    return tasks


def load_tasks(block: dict, seed: int) -> dict:
    """{"tasks": {name: Task}, "groups": ...} of a block: {"local": folder} or {"tasks": [names], "num_fewshot": n}."""
    if "local" in block:
        loaded = {"tasks": {task.config.task: task for task in local_tasks(block["local"])}, "groups": {}}
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
        task.build_all_requests = lambda **_: None    # evaluate() would build them once more, which costs more than scoring
        digest.update(json.dumps([name, str(task.VERSION), task.config.num_fewshot, task.config.metric_list],
                                 default=str).encode())
        for instance in task.instances:
            digest.update(json.dumps([instance.request_type, instance.doc_id, instance.args, instance.doc],
                                     default=str).encode("utf-8", "surrogatepass"))
        if texts is not None:
            texts[name] = item_texts(task)
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


def task_result(lm: StentorLM, task, samples: list[dict], scores: dict) -> dict:
    """What is kept of one task: counts, metrics as lm-eval gives them, and each item's scores for paired tests.

    bits_per_byte and perplexity: of the right continuation, over all items (multiple choice with an index as its target).
    chance: mean over items of 1 / number of choices; None for tasks that are no choice.
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
              "chance": None, **lm.counts.get(task.config.task, {}),
              "phenomenon": samples[0]["doc"].get("linguistics_term"),
              "doc_ids": [sample["doc_id"] for sample in samples], "items": items}
    if task.OUTPUT_TYPE == "multiple_choice":
        result["chance"] = float(np.mean([1 / len(sample["arguments"]) for sample in samples]))
        result["loglikelihoods"] = [[answer[0] for answer in sample["filtered_resps"]] for sample in samples]
        golds = [task.doc_to_text(sample["doc"]) if task.multiple_input else sample["target"] for sample in samples]
        if all(isinstance(gold, str) for gold in golds):          # CommonsenseQA names the letter
            choices = [task.doc_to_choice(sample["doc"]) for sample in samples]
            golds = [have.index(gold) if gold in have else None for gold, have in zip(golds, choices)]
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


def words_of(text: str) -> list[str]:
    """Lower-case words without punctuation; \x00, the end of a document, is one of its own."""
    return re.findall(r"\w+|\x00", unicodedata.normalize("NFKC", text).lower())


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
    """{task: counts} of items whose words stand in the store's training text. texts: task -> items -> their strings.

    items_checked: items with 13 words in a row somewhere; contaminated: those of which any 13 are in the store.
    short_checked, short_found: items of 5 to 12 words, looked for whole. Memory holds the items, never the store.
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

    wanted, items = {}, {}                            # length -> set of hashes; task -> [(length, hashes)]
    for name, task in texts.items():
        items[name] = []
        for item in task:
            rows = [ids_of(text) for text in item]
            length = min(NGRAM, max(map(len, rows), default=0))
            found = [h for row in rows for h in (ngram_hashes(row, length) if length >= SHORT else ()) if h]
            wanted.setdefault(length, set()).update(map(int, found))
            items[name].append((length, np.array(found, np.uint64)))
    tables = {length: np.array(sorted(hashes), np.uint64) for length, hashes in wanted.items() if hashes}
    seen = {length: np.zeros(len(table), bool) for length, table in tables.items()}
    for text in store_texts(store_dir, tokenizer):
        ids = ids_of(text)
        for length, table in tables.items():
            hashes = ngram_hashes(ids, length)
            place = np.minimum(np.searchsorted(table, hashes), len(table) - 1)
            seen[length][place[table[place] == hashes]] = True
    report = {}
    for name, rows in items.items():
        hit = [length >= SHORT and bool(seen[length][np.searchsorted(tables[length], found)].any()) if len(found) else False
               for length, found in rows]
        long = [length == NGRAM for length, _ in rows]
        short = [SHORT <= length < NGRAM for length, _ in rows]
        report[name] = {"items": len(rows), "items_checked": sum(long),
                        "contaminated": sum(h for h, is_long in zip(hit, long) if is_long), "short_checked": sum(short),
                        "short_found": sum(h for h, is_short in zip(hit, short) if is_short)}
    return report


def item_texts(task) -> list[list[str]]:
    """The strings of each item: question with each choice, without few-shot examples."""
    items = {}
    for instance in task.instances:
        strings = items.setdefault(instance.doc_id, [])
        if task.config.num_fewshot:
            strings += [str(task.doc_to_text(instance.doc)), str(task.doc_to_target(instance.doc))]
        else:
            strings.append("".join(part for part in instance.args if isinstance(part, str)))
    return list(items.values())


def model_problem(path: str) -> str | None:
    """What is wrong with `path` as a model folder; None for a hub id ("hf:owner/name", or owner/name that is no folder)."""
    folder = Path(path)
    if str(path).startswith("hf:") or (not folder.is_dir() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(path))):
        return None
    if not (folder / "config.json").is_file():
        return "is not a model folder (no config.json); run 02 first, or name a folder or a hub id"


def load_model(path: str, dtype: str, device: torch.device):
    """(model in eval mode, tokenizer) from a folder or a hub id; never code from there, but for our own tokenizer."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging
    transformers_logging.set_verbosity_error()
    name = str(path).removeprefix("hf:")
    if Path(name).is_dir():
        tokenizer = su.load_tokenizer(name)
    else:                                             # a hub id; one of ours has its vocabulary file there
        from huggingface_hub import snapshot_download
        files = Path(snapshot_download(name, allow_patterns=["tokenmonster.vocab", "*token*.json", "config.json"]))
        tokenizer = su.load_tokenizer(files if (files / "tokenmonster.vocab").is_file() else name)
    # Some peers on the hub have pickled weights only (TinyStories-33M): transformers reads those with weights_only=True.
    load = su.load_model if Path(name).is_dir() else AutoModelForCausalLM.from_pretrained
    model = load(name, dtype=getattr(torch, dtype)).to(device).eval()
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
            model, tokenizer = load_model(path, config["dtype"], device)
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
                if world_size > 1:
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
