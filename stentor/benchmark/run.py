"""Every model on every block, in a process of its own; what is done is not done again."""
from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

from stentor.benchmark.contamination import contamination_report
from stentor.benchmark.lm import Cache, SEED, StentorLM
from stentor.benchmark.rows import shortened
from stentor.benchmark.tasks import golds_of, item_texts, load_tasks
from stentor.files import ParameterError, StentorError, duration, write_atomically
from stentor.folders import load_model, weights_problem
from stentor.launch import PROCESS_ENVIRONMENT
from stentor.tokenizer import load_tokenizer, tokenizer_fit


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
            raise ParameterError([f"{task.config.task}, item {instance.doc_id}: its target {shortened(target)} is no right "
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
    tokenizer, settings = load_tokenizer(path), {"dtype": getattr(torch, dtype)}
    if Path(name).is_dir():
        model = load_model(name, **settings)
    else:
        # Some peers on the hub have pickled weights only (TinyStories-33M): transformers reads those with weights_only=True.
        model, info = AutoModelForCausalLM.from_pretrained(name, output_loading_info=True, **settings)
        if problem := weights_problem(model, info):
            raise ParameterError([f"{name} cannot be scored: {problem}."])
    if problems := tokenizer_fit(tokenizer, model.get_input_embeddings().num_embeddings):
        raise ParameterError(problems)
    # Sampling settings that a folder recommends to its users are no part of the protocol (greedy, unless a task says so).
    ids = {f"{kind}_token_id": getattr(model.generation_config, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    model.generation_config = GenerationConfig(**ids)
    model.to(device).eval()
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


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
                if world_size > 1 and not isinstance(error, ParameterError):       # that all processes found alike
                    raise                             # the other processes wait in this block: start all again
                entry["blocks"][block_name] = {"status": "failed", "error": f"{type(error).__name__}: {error}"[:500]}
                say(f"{name} | {block['title']} | failed: {type(error).__name__}: {error}")
            else:
                if rank == 0:
                    result |= {"title": block["title"], "model": name}
                    data = json.dumps(result, indent=1)
                    again = before_key is not None and finished(result["key"]) is not None
                    if not again:
                        write_atomically(target, data)
                    items = sum(task["n"] for task in result["tasks"].values())
                    say(f"{name} | {block['title']} | {items:,} items "
                        + ("were already done" if again else f"in {duration(result['seconds'])}"))
                entry["blocks"][block_name] = {"status": "ok", "key": result["key"], "title": block["title"],
                                               "lm_eval": result["lm_eval"]}
            if rank == 0:
                write_atomically(folder / "run_summary.json", json.dumps(summary, indent=1))
            barrier()
        del model, lm
    if rank == 0 and texts:
        contamination_report(config["store"], texts, folder, say)
    if world_size > 1:
        torch.distributed.destroy_process_group()
    return summary


class EvaluationFailed(StentorError, RuntimeError):
    """The evaluating process ended with an error; the message is its last lines."""


def launch(config: dict, folder, *, num_processes: int | None = None, say=None) -> dict:
    """Write <folder>/benchmark.json and run it in a process of its own (several with torchrun), its log shown here.

    num_processes: default one a GPU, or 1 on the CPU. Killed? The same call goes on. Returns run_summary.json's content.
    """
    say = say or (lambda text: print(text, flush=True))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "benchmark.json", json.dumps(config, indent=1))
    num_processes = num_processes or max(1, torch.cuda.device_count())
    here = str(Path(__file__).resolve().parents[2])
    command = [sys.executable, "-m", "stentor_utils", "benchmark", str(folder / "benchmark.json")]
    if num_processes > 1:
        command[1:3] = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes),
                        "--module", "stentor_utils"]
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // num_processes))} if num_processes > 1 else {}
    env = {**PROCESS_ENVIRONMENT, **threads, **os.environ, "PYTHONUNBUFFERED": "1",
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
