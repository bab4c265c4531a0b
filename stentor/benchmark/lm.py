"""A model class for lm-eval: context and continuation joined rightly, contexts shared, resumable."""
from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import logging
import sqlite3
import time

import numpy as np
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs

from stentor.benchmark.trees import Request, Tree, common_prefix, lay_out, make_trees
from stentor.files import duration
from stentor.tokenizer import encode_documents, tokenizer_sha256

# It warns once a task about what we do on purpose.
logging.getLogger("lm_eval").setLevel(logging.ERROR)

PROTOCOL = 3  # raised whenever scores may change: it is part of every cache key
SEED = 42     # of the cards' script


class Cache:
    """Every answer of a model, by a hash of all that it depends on: {sha256: JSON value}.

    One sqlite file, shared by the processes of a run. Each batch is one transaction: it is safe
    against kill -9.
    """

    def __init__(self, path):
        self.connection = sqlite3.connect(path, timeout=120, isolation_level=None)
        self.connection.execute("PRAGMA journal_mode = WAL")
        self.connection.execute("PRAGMA synchronous = NORMAL")
        self.connection.execute("CREATE TABLE IF NOT EXISTS answers "
                                "(key BLOB PRIMARY KEY, value TEXT) WITHOUT ROWID")

    def get(self, keys: list[bytes]) -> dict[bytes, list]:
        found = {}
        for i in range(0, len(keys), 500):
            part = keys[i:i + 500]
            marks = ",".join("?" * len(part))
            asked = f"SELECT key, value FROM answers WHERE key IN ({marks})"
            found.update(self.connection.execute(asked, part))
        return {key: json.loads(value) for key, value in found.items()}

    def put(self, answers: dict[bytes, list]) -> None:
        """The first answer to a key stays: another's last bits differ where its batches did."""
        rows = [(key, json.dumps(value)) for key, value in answers.items()]
        with self.connection:
            self.connection.execute("BEGIN IMMEDIATE")
            self.connection.executemany("INSERT OR IGNORE INTO answers VALUES (?, ?)", rows)


class StentorLM(HFLM):
    """lm-eval's HFLM with right joins, shared contexts, batches cut by tokens, and a cache.

    What is right: the model never saw a text cut at lm-eval's join. TokenMonster looks ahead and
    its tokens span words, so encode(context) need not be a prefix of encode(context +
    continuation); lm-eval then takes the whole's tokens from number len(encode(context)) on, and
    loses or misplaces some. Here the whole string is encoded once and

        logP(continuation | context)
            = logP(encode(context + continuation)) - logP(encode(context)).

    Where nothing merges this is lm-eval's sum, term by term. Where something does, every choice
    still pays for the same bytes, the whole string, less a constant of the item, so choices
    compare as the model ranks the strings. (Summing from the first token that reaches into the
    continuation would charge a merging choice for the end of the context too, and its rival not.)
    A continuation that leaves the tokens as they are has log-probability 0.
    Trailing spaces of a context count to the continuation, and contexts that do not fit lose their
    left, as in lm-eval. An empty context is the prefix token: EOS for our tokenizer, since that is
    what stands before a document in training (BOS is never trained); as lm-eval chooses for any
    other.

    model: a causal LM in eval mode on its device. max_length: default from its config.
    tokens_per_batch: by default what a quarter of the free memory holds, 4,096 at most on the CPU
    (its caches), 65,536 on a GPU; halved when memory runs out. rank, world_size, barrier: this
    process among several that share the cache.
    """

    def __init__(self, model, tokenizer, *, cache: Cache | None = None,
                 max_length: int | None = None, tokens_per_batch: int | None = None,
                 rank: int = 0, world_size: int = 1, barrier=lambda: None, say=None):
        self.ours = hasattr(tokenizer, "vocabulary")
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=1,
                         max_length=max_length, truncation=True,
                         prefix_token_id=tokenizer.eos_token_id if self.ours else None)
        self.answers = cache or Cache(":memory:")
        self.tokens_per_batch = tokens_per_batch or self._tokens_that_fit()
        self.part, self.parts, self.wait = rank, world_size, barrier
        self.say = say or (lambda text: None)
        self.fingerprint = (model_fingerprint(model, tokenizer)
                            + f"|{self.max_length}|{self.prefix_token_id}|{PROTOCOL}")
        self.share, self.fast_head = True, True
        self.counts = {}
        self._check_shortcuts()

    @property
    def max_gen_toks(self) -> int:
        return min(256, self.max_length // 2)

    def _tokens_that_fit(self) -> int:
        """Logits weigh most: vocabulary x (own dtype, FP32, and what logsumexp makes) a token."""
        per_token = 12 * self.model.get_input_embeddings().num_embeddings
        if self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.device)
            return int(min(65_536, max(1_024, free / 4 / per_token)))
        return int(min(4_096, max(256, 1e9 / per_token)))

    # -- tokens

    def encode(self, texts: list[str]) -> list[list[int]]:
        if self.ours:                                 # special tokens in a text are text: as trained
            ids, offsets = encode_documents(self.tokenizer, texts)
            ids = ids.tolist()
            return [ids[a:b] for a, b in zip(offsets, offsets[1:])]
        return [self.tok_encode(text) for text in texts]

    def tok_batch_encode(self, strings, padding_side="left", left_truncate_len=None,
                         truncation=False):
        """(ids, attention mask) int64 of rows padded left; an empty text is the prefix token."""
        rows = [torch.tensor(ids[-(left_truncate_len or 0):] or [self.prefix_token_id])
                for ids in self.encode(strings)]
        pad = functools.partial(torch.nn.utils.rnn.pad_sequence, batch_first=True,
                                padding_side="left")
        ids = pad(rows, padding_value=self.tokenizer.pad_token_id)
        return ids, pad([torch.ones_like(row) for row in rows])

    def tok_encode(self, string, *args, **kwargs):
        if self.ours:
            return self.encode([string])[0]
        return super().tok_encode(string, *args, **kwargs)

    def _encode_pair(self, context, continuation):
        """(tokens that are only condition, tokens to sum), together encode(context + continuation)."""
        request = self.requests_of([(context, continuation)])[0]
        return request.whole[:request.start], request.whole[request.start:]

    def requests_of(self, pairs: list[tuple[str, str]]) -> list[Request]:
        pairs = [(context or "", continuation or "") for context, continuation in pairs]
        contexts = {context: context.rstrip() for context, _ in pairs}
        wholes = (context + continuation for context, continuation in pairs)
        texts = list(dict.fromkeys([*contexts.values(), *wholes]))
        tokens = dict(zip(texts, self.encode(texts)))
        requests = []
        for context, continuation in pairs:
            whole = tokens[context + continuation]
            before = tokens[contexts[context]] if contexts[context] else []
            start = common_prefix(whole, before)
            if start == 0:                            # nothing to predict the first token from
                prefix = [self.prefix_token_id]
                if not (whole[:1] == prefix and not before):
                    whole, before = prefix + whole, prefix + before
                else:
                    before = prefix
                start = 1
            # By its tokens: two texts of the same tokens are one request, and tie to the last bit.
            key = self.key("loglikelihood", whole, before, start)
            requests.append(Request(key, whole, before, start))
        return requests

    def key(self, *parts) -> bytes:
        text = json.dumps([self.fingerprint, *parts])
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()

    # -- the forward pass

    @torch.inference_mode()
    def score(self, trees: list[Tree]) -> list[list[tuple[np.ndarray, np.ndarray]]]:
        """For each branch of each tree (log-probabilities float64, is it the likeliest bool)."""
        rows, device = lay_out(trees), self.device
        inputs = {"input_ids": torch.from_numpy(rows.ids).to(device), "use_cache": False}
        if any(len(tree.branches) > 1 for tree in trees):
            inputs["attention_mask"] = self._branch_mask(torch.from_numpy(rows.segment).to(device))
            inputs["position_ids"] = torch.from_numpy(rows.position).to(device)
        # A row's padding stands to its right, where a causal model does not look.
        where, back = np.unique(np.array(rows.sources), return_inverse=True)
        where, back = torch.from_numpy(where).to(device), torch.from_numpy(back).to(device)
        if self.fast_head:                            # the vocabulary only where it is asked for
            hidden = self.model.base_model(**inputs).last_hidden_state.flatten(0, 1)[where]
            logits = self.model.get_output_embeddings()(hidden)
        else:
            logits = self.model(**inputs).logits.flatten(0, 1)[where]
        logits = logits.float()
        target = torch.tensor(rows.targets, device=device)
        chosen = logits[back, target]
        logprobs = (chosen - logits.logsumexp(-1)[back]).double().cpu().numpy()
        greedy = (logits.argmax(-1)[back] == target).cpu().numpy()
        cuts = np.cumsum([len(branch) for tree in trees for branch in tree.branches])[:-1]
        flat = iter(zip(np.split(logprobs, cuts), np.split(greedy, cuts)))
        return [[next(flat) for _ in tree.branches] for tree in trees]

    def _branch_mask(self, segment: torch.Tensor) -> torch.Tensor:
        """What is added to attention, (rows, 1, length, length): a branch sees the trunk and itself."""
        seen = (segment[:, None, :] == 0) | (segment[:, None, :] == segment[:, :, None])
        seen &= torch.ones(seen.shape[1:], dtype=torch.bool, device=segment.device).tril()
        mask = torch.zeros(seen.shape, dtype=self.model.dtype, device=segment.device)
        return mask.masked_fill_(~seen, torch.finfo(self.model.dtype).min)[:, None]

    def _check_shortcuts(self) -> None:
        """Both shortcuts are tried against the model's plain forward() once.

        They are left out where they change anything.
        """
        vocabulary = self.model.get_input_embeddings().num_embeddings
        tokens = np.random.default_rng(0).integers(0, vocabulary, 14).tolist()
        tree = Tree(tokens[:5], [tokens[5:9], tokens[9:10], tokens[10:14]], [None] * 3)
        with torch.inference_mode():
            plain = []
            for row in (tree.trunk + branch for branch in tree.branches):
                logits = self.model(torch.tensor([row], device=self.device)).logits[0].float()
                logprobs = logits.log_softmax(-1)[range(4, len(row) - 1), row[5:]]
                plain.append(logprobs.double().cpu().numpy())
        tolerance = 1e-4 if self.model.dtype == torch.float32 else 0.1
        apart = [Tree(tree.trunk, [branch], [None]) for branch in tree.branches]
        for share, fast_head in itertools.product((True, False), repeat=2):
            self.share, self.fast_head = share, fast_head
            trees = [tree] if share else apart
            with contextlib.suppress(Exception):      # a model that does not take a mask like ours
                found = [logprobs for branches in self.score(trees) for logprobs, _ in branches]
                if all(np.allclose(a, b, atol=tolerance) for a, b in zip(found, plain)):
                    return

    # -- what lm-eval calls

    def loglikelihood(self, requests, disable_tqdm=False) -> list[tuple[float, bool]]:
        """[(log-likelihood in nats, is greedy decoding)] in the order asked."""
        ours = self.requests_of([request.args for request in requests])
        items, last = [], None
        for instance, request in zip(requests, ours): # an item's choices follow one another
            item = (instance.task_name, instance.doc_id)
            if item != last or item == (None, None):
                items.append([])
                last = item
            items[-1].append(request)
        self._count((instance.task_name, {
            "merged": request.merged, "empty": request.empty,
            "truncated": len(request.whole) - 1 > self.max_length})
            for instance, request in zip(requests, ours))
        answers = self._answer(items)
        return [(answers[request.key][0], bool(answers[request.key][1])) for request in ours]

    def _count(self, found) -> None:
        """Put into `counts` how many requests a task has, and of how many each thing is true.

        found: (task name, {what: whether it is true of this request}), one a request.
        """
        tasks = {}
        for task, facts in found:
            count = tasks.setdefault(task, dict.fromkeys(["requests", *facts], 0))
            count["requests"] += 1
            for name, true in facts.items():
                count[name] += int(true)
        self.counts.update(tasks)

    def loglikelihood_rolling(self, requests, disable_tqdm=False) -> list[float]:
        """Log-likelihood in nats of each text behind the prefix token, in windows of max_length."""
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
        """{key: [log-likelihood, greedy]} of all requests, from the cache or computed by batches.

        The batches follow from the whole list alone, not from what the cache holds: a resumed run
        computes the very batches that an uninterrupted one would, and ends with the same bits.
        """
        first = {}                                    # what is asked twice is not summed twice
        for item in items:
            for request in item:
                first.setdefault(request.key, request)
        items = [[request for request in item if first[request.key] is request] for item in items]
        work = []
        for item in items:
            if trees := make_trees(item, self.max_length, self.share):
                work.append((trees, item))
            else:
                self.answers.put({request.key: [0.0, True] for request in item})
        work.sort(key=longest, reverse=True)          # memory fails early
        batches, room = [], 0
        for entry in work:
            size = len(entry[0])
            if size > room:
                batches.append([])
                room = max(size, self.tokens_per_batch // longest(entry))
            batches[-1].append(entry)
            room -= size

        def keys_of(batch):
            return (request.key for _, item in batch for request in item)
        return self._work_off(list(first), batches, keys_of, self._compute, "batches")

    def _work_off(self, keys: list[bytes], batches: list, keys_of, compute, what: str) -> dict:
        """{key: answer} of all `keys`; what is new of this process's part of the batches is computed.

        keys_of(batch): the keys that compute(batch) answers. Every batch is kept as it is done.
        """
        done, mine = self.answers.get(keys), batches[self.part::self.parts]
        began = said = time.monotonic()
        for number, batch in enumerate(mine, 1):
            if all(key in done for key in keys_of(batch)):
                continue
            self.answers.put(compute(batch))
            if time.monotonic() - said > 5:
                said = time.monotonic()
                left = (said - began) / number * (len(mine) - number)
                self.say(f"    {number:,} of {len(mine):,} {what}, {duration(left)} left")
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

        An empty context goes on from the prefix token. However many tokens a task asks for, half
        the context is the prompt's.
        """
        requests = [self._generation(request) for request in requests]
        prompts = self.encode([request.args[0] for request in requests])
        self._count((request.task_name, {
            "truncated": len(tokens) > self.max_length - request.args[1]["max_gen_toks"]})
            for request, tokens in zip(requests, prompts))
        keys = [self.key("generate", *request.args[:2]) for request in requests]
        order = sorted(range(len(requests)), key=lambda i: (-len(requests[i].args[0]), i))
        size = max(1, min(64, self.tokens_per_batch // self.max_length))
        batches = [order[i:i + size] for i in range(0, len(order), size)]
        generate = functools.partial(super().generate_until, disable_tqdm=True)

        def compute(batch):
            self.batch_size_per_gpu = len(batch)
            texts = self._in_memory(generate, [requests[i] for i in batch])
            return {keys[i]: [text] for i, text in zip(batch, texts)}
        answers = self._work_off(keys, batches, lambda batch: (keys[i] for i in batch), compute,
                                 "batches generated")
        return [answers[key][0] for key in keys]

    def _generation(self, request):
        """The request with a text as its context, no empty stop text, and room for the prompt."""
        context, asked = request.args
        wanted = normalize_gen_kwargs(asked, self.max_gen_toks)
        wanted["max_gen_toks"] = max(1, min(wanted["max_gen_toks"], self.max_length // 2))
        # An empty one would stop at once.
        wanted["until"] = [text for text in wanted.get("until") or [] if text]
        return dataclasses.replace(request, arguments=(context or "", wanted))


def longest(entry: tuple[list[Tree], list[Request]]) -> int:
    """Tokens of the longest row that an item needs."""
    return max(tree.length for tree in entry[0])


def model_fingerprint(model, tokenizer) -> str:
    """A hash of the weights as they are (so of their dtype), the config, and the tokenizer.

    Of the config only what is computed with.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    ignored = {"_name_or_path", "transformers_version", "architectures", "use_cache", "dtype",
               "torch_dtype"}
    config = {key: value for key, value in model.config.to_dict().items() if key not in ignored}
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    digest.update(tokenizer_sha256(tokenizer).encode())
    return digest.hexdigest()
