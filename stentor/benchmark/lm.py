"""A model class for lm-eval that joins context and continuation rightly, shares contexts and resumes.

Top to bottom:  what a score is -> the model class.
"""
from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import sqlite3
import time

import numpy as np
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs

from stentor.benchmark.trees import Request, Tree, common_prefix, make_trees
from stentor.files import duration
from stentor.tokenizer import encode_documents, tokenizer_sha256

logging.getLogger("lm_eval").setLevel(logging.ERROR)      # it warns once a task about what we do on purpose

PROTOCOL = 3  # raised whenever scores may change: it is part of every cache key
SEED = 42     # of the cards' script


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
            ids, offsets = encode_documents(self.tokenizer, texts)
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
                self.say(f"    {number:,} of {len(mine):,} batches, {duration(left)} left")
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
                self.say(f"    {number:,} of {len(mine):,} batches generated, {duration(left)} left")
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
    digest.update(tokenizer_sha256(tokenizer).encode())
    return digest.hexdigest()
