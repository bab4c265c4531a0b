"""One block of tasks scored by one model: lm-eval's figures, but for ties, and each item's own."""
from __future__ import annotations

import hashlib
import json
import math
import random
import time

import numpy as np
import torch

from stentor.benchmark.lm import SEED, StentorLM
from stentor.benchmark.rows import shortened
from stentor.benchmark.tasks import golds_of, item_texts, load_tasks
from stentor.files import ParameterError


def evaluate_block(lm: StentorLM, block: dict, *, limit: int | None = None, seed: int = SEED,
                   done=lambda key: None, texts: dict | None = None) -> dict:
    """Score one block: {"key", "tasks": {name: its scores and items}, "groups", ...}.

    limit: at most so many items of each task, drawn by `seed`. done(key) may give a finished
    answer. The key hashes the model, every prompt, choice and target, task versions, settings and
    the harness version. texts, if given, is filled with each task's item texts.
    """
    import lm_eval
    from lm_eval.evaluator import evaluate
    random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
    loaded = load_tasks(block, seed)
    about = [lm.fingerprint, lm_eval.__version__, seed, limit]
    digest = hashlib.sha256(json.dumps(about).encode())
    samples = {}
    for name, task in loaded["tasks"].items():
        samples[name] = build_requests(name, task, limit, seed)
        refuse_unlabelled(task)
        add_to_key(digest, name, task)
        if texts is not None:
            items = item_texts(task)                  # two blocks may have a task of one name
            own = name if texts.get(name, items) == items else f"{name} [{block.get('title')}]"
            texts[own] = items
    key = digest.hexdigest()
    if finished := done(key):
        return finished
    lm.counts.clear()
    began = time.monotonic()
    results = evaluate(lm, loaded, samples=samples, bootstrap_iters=0, log_samples=True)
    seconds = time.monotonic() - began
    tasks = {name: task_result(lm, task, results["samples"][name], results["results"][name])
             for name, task in loaded["tasks"].items()}
    groups = {name: [task if isinstance(task, str) else task.task_name
                     for task in group.get_all_tasks()]
              for name, group in loaded["groups"].items()}
    return {"key": key, "tasks": tasks, "groups": groups, "seconds": seconds,
            "lm_eval": lm_eval.__version__, "limit": limit, "seed": seed}


def build_requests(name: str, task, limit: int | None, seed: int) -> list[int]:
    """Build the requests of at most `limit` items of a task, drawn by `seed`; their numbers."""
    count = len(task.eval_docs)
    drawn = random.Random(f"{seed} {name}").sample(range(count), min(limit or count, count))
    chosen = sorted(drawn)
    task.build_all_requests(samples=chosen, rank=0, world_size=1)
    # evaluate() would build them once more, which costs more than scoring.
    task.build_all_requests = lambda **_: None
    return chosen


def refuse_unlabelled(task) -> None:
    """Raises ParameterError if an item has no right answer: lm-eval would count it as wrong."""
    own_scores = task.config.process_results is not None
    if own_scores or task.OUTPUT_TYPE not in ("multiple_choice", "generate_until"):
        return
    for instance in task.instances:
        if instance.idx:                              # one request of an item stands for it
            continue
        target = task.doc_to_target(instance.doc)
        if task.OUTPUT_TYPE == "multiple_choice":
            golds = golds_of(task, instance.doc)
            wrong = None in golds or not golds
        else:
            wrong = target is None or target == [] or str(target).strip() in ("", "None")
        if wrong:
            raise ParameterError([
                f"{task.config.task}, item {instance.doc_id}: its target {shortened(target)} is "
                "no right answer; a split without labels, as test splits are, cannot be scored."])


def add_to_key(digest, name: str, task) -> None:
    """All that a task's scores depend on, but for the model and what holds for every task."""
    config = task.config
    about = [name, str(task.VERSION), config.num_fewshot, config.metric_list]
    digest.update(json.dumps(about, default=str).encode())
    for instance in task.instances:
        asked = [instance.request_type, instance.doc_id, instance.args, instance.doc]
        digest.update(json.dumps(asked, default=str).encode("utf-8", "surrogatepass"))


def task_result(lm: StentorLM, task, samples: list[dict], scores: dict) -> dict:
    """What is kept of one task: counts, metrics, and each item's scores for paired tests.

    metrics: lm-eval's, but for ties (see share_of_ties): "ties" counts them, "lm_eval_metrics"
    has its own figure if other. headline: the metric to report, where the task's files say so.
    bits_per_byte and perplexity: of the right continuation, over all items (multiple choice with
    one right choice). chance: mean over items of 1 / number of choices; None for tasks that are
    no choice.
    """
    names = [name for name in scores
             if "," in name and not name.split(",")[0].endswith("_stderr")]
    items = item_scores(samples)
    samples = [sample for sample in samples if sample["filter"] == samples[0]["filter"]]
    result = {
        "version": str(task.VERSION), "num_fewshot": task.config.num_fewshot, "n": len(samples),
        "output_type": task.OUTPUT_TYPE, "metrics": {name: scores[name] for name in names},
        "chance": None, "headline": (task.config.metadata or {}).get("headline"),
        **lm.counts.get(task.config.task, {}),
        "phenomenon": samples[0]["doc"].get("linguistics_term"),
        "doc_ids": [sample["doc_id"] for sample in samples], "items": items}
    if task.OUTPUT_TYPE == "multiple_choice":
        choices = [len(task.doc_to_choice(sample["doc"])) for sample in samples]
        result["chance"] = float(np.mean([1 / count for count in choices]))
        result["loglikelihoods"] = [[answer[0] for answer in sample["filtered_resps"]]
                                    for sample in samples]
        if task.config.process_results is None:
            count_ties(task, samples, result)
        result |= right_answers_cost(lm, task, samples)
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        nats = -sum(sample["filtered_resps"][0] for sample in samples)
        texts = [sample["arguments"][0][0] for sample in samples]
        result |= cost(nats, texts, sum(map(len, lm.encode(texts))))
    return result


def item_scores(samples: list[dict]) -> dict[str, list]:
    """{"metric,filter": what each item scored}: a number, or the numbers that it is made of."""
    items = {}
    for sample in samples:
        for metric in sample["metrics"]:
            value = sample[metric]
            one = isinstance(value, (int, float, np.number))
            items.setdefault(f"{metric},{sample['filter']}", []).append(
                float(value) if one else list(map(float, value)))
    return items


def count_ties(task, samples: list[dict], result: dict) -> None:
    """Put every accuracy's items, mean and number of ties into `result`.

    lm-eval's own mean stands beside it where it differs. Raises ValueError for a likelihood that
    is not a number.
    """
    lengths = {"acc": lambda choice: 1, "acc_norm": len,
               "acc_bytes": lambda choice: len(choice.encode())}
    for name in [name for name in result["items"] if name.split(",")[0] in lengths]:
        length = lengths[name.split(",")[0]]
        found = []
        for sample in samples:
            choices = task.doc_to_choice(sample["doc"])
            lls = [answer[0] / max(1, length(choice))
                   for answer, choice in zip(sample["filtered_resps"], choices)]
            if any(map(math.isnan, lls)):             # none is the likeliest, yet argmax names one
                raise ValueError(
                    f"{task.config.task}, item {sample['doc_id']}: the model's log-likelihood is "
                    "not a number; where its weights are sound, try DTYPE = 'float32'.")
            found.append(share_of_ties(lls, golds_of(task, sample["doc"])))
        items, own = [score for score, _ in found], result["metrics"][name]
        result["items"][name], result["metrics"][name] = items, float(np.mean(items))
        if ties := sum(tied for _, tied in found):
            result.setdefault("ties", {})[name] = ties
        if not math.isclose(own, result["metrics"][name], abs_tol=1e-9):
            result.setdefault("lm_eval_metrics", {})[name] = own


def share_of_ties(scores, golds: list[int]) -> tuple[float, bool]:
    """(what an item scores, whether choices tie for the best).

    It scores 1 or 0, and among k tied choices a k-th for each right one: what guessing among them
    scores. lm-eval takes the first, which in minimal pairs is the good sentence.
    """
    best = max(scores)
    tied = [i for i, score in enumerate(scores) if math.isclose(score, best, rel_tol=1e-9)]
    return len(set(golds) & set(tied)) / len(tied), len(tied) > 1


def right_answers_cost(lm: StentorLM, task, samples: list[dict]) -> dict:
    """`cost` of the right continuations; nothing where an item has not one right choice."""
    golds = [golds_of(task, sample["doc"]) for sample in samples]
    if any(len(gold) != 1 or gold[0] is None for gold in golds):
        return {}
    golds = [gold for gold, in golds]
    nats = -sum(sample["filtered_resps"][gold][0] for sample, gold in zip(samples, golds))
    pairs = [sample["arguments"][gold] for sample, gold in zip(samples, golds)]
    return cost(nats, [continuation for _, continuation in pairs], sum(lm.token_counts(pairs)))


def cost(nats: float, texts: list[str], tokens: int) -> dict:
    """{"bits_per_byte", "perplexity"} of texts; no bits a byte (None) where they hold no byte."""
    text_bytes = sum(len(text.encode()) for text in texts)
    return {"bits_per_byte": nats / math.log(2) / text_bytes if text_bytes else None,
            "perplexity": math.exp(nats / max(1, tokens))}
