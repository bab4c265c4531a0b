"""Every model on every block, in a process of its own; what is done is not done again."""
from __future__ import annotations

import contextlib
import datetime
import functools
import json
import os
import re
from pathlib import Path

import torch

from stentor.benchmark.contamination import contamination_report
from stentor.benchmark.lm import Cache, SEED, StentorLM
from stentor.benchmark.scoring import evaluate_block
from stentor.files import ParameterError, StentorError, duration, write_atomically
from stentor.folders import load_model, weights_problem
from stentor.process import own_command, own_environment, run_process
from stentor.secrets import redact
from stentor.tokenizer import load_tokenizer, tokenizer_fit
from stentor.watching import watching


class EvaluationFailed(StentorError, RuntimeError):
    """The evaluating process ended with an error; the message is its last lines."""


def launch(config: dict, folder, *, num_processes: int | None = None, say=None) -> dict:
    """Write <folder>/benchmark.json and run it in a process of its own (several with torchrun).

    config: see `run`. Its log is shown here. num_processes: default one a GPU, or 1 on the CPU;
    the cores are divided among several. Killed, or stopped? The same call goes on: the cache
    holds every batch that is done. Returns run_summary.json's content; raises EvaluationFailed.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "benchmark.json", json.dumps(config, indent=1))
    num_processes = num_processes or max(1, torch.cuda.device_count())
    cores = str(max(1, (os.cpu_count() or 1) // num_processes))
    env = own_environment({"OMP_NUM_THREADS": cores} if num_processes > 1 else {})
    command = own_command("benchmark", folder / "benchmark.json", num_processes=num_processes)
    with contextlib.nullcontext(say) if say else watching(log=folder / "log.txt") as tell:
        ended = run_process(command, env, say=tell)
    if ended.code:
        raise EvaluationFailed(f"the evaluation ended with exit code {ended.code}. " + "".join(
            ended.errors or ["Its last lines:\n", *list(ended.tail)[-15:]]))
    return json.loads((folder / "run_summary.json").read_text())


def run_file(path) -> dict:
    """What `launch` starts: `run`, as benchmark.json describes it, in that file's folder.

    Raises ParameterError, in a sentence, for a file that is not there or describes no benchmark.
    """
    path = Path(path).resolve()
    try:
        config = json.loads(path.read_text())
        for name, kind in (("models", dict), ("blocks", dict), ("dtype", str)):
            if not isinstance(config[name], kind):
                raise ValueError(f"{name} is no {kind.__name__}")
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ParameterError([f"{path} cannot be read as a benchmark ({type(error).__name__}: "
                              f"{error}): start it with notebook 05."]) from error
    return run(config, path.parent, say=functools.partial(print, flush=True))


def run(config: dict, folder: Path, say=print) -> dict:
    """Score every model on every block of `config`; what is done is not done again.

    config: {"models": {name: path}, "blocks": {name: {"title", "tasks" | "local",
    "num_fewshot"}}, "dtype", and if need be "limit", "seed", "tokens_per_batch", "store":
    {"path", "tokenizer"} of a token store to look for the items in, or None}.
    Writes <folder>/<model>/<block>.json as each is done and <folder>/run_summary.json after each;
    a block that fails is written down as failed and the next one begins. With torchrun every
    process computes its part of each block's requests; they meet in the cache, and process 0
    writes. Returns run_summary.json's content.
    """
    processes = Processes()
    benchmark = Benchmark(config, folder, processes, say)
    for name, path in config["models"].items():
        benchmark.score_model(name, path)
    if processes.rank == 0 and benchmark.texts:
        contamination_report(config["store"], benchmark.texts, folder, say)
    processes.leave()
    return benchmark.summary


class Processes:
    """This process among those that torchrun started: `rank` of `count`, and its device."""

    def __init__(self):
        self.rank = int(os.environ.get("RANK", 0))
        self.count = int(os.environ.get("WORLD_SIZE", 1))
        self.device = torch.device("cpu")
        if self.count > 1:
            torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(days=2))
        if torch.cuda.is_available():
            number = int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count()
            self.device = torch.device("cuda", number)
            torch.cuda.set_device(self.device)

    def wait(self) -> None:
        """Until every process is here."""
        if self.count > 1:
            torch.distributed.barrier()

    def leave(self) -> None:
        if self.count > 1:
            torch.distributed.destroy_process_group()


class Benchmark:
    """What `run` has found so far: `summary`, and the items' `texts` if a store is searched."""

    def __init__(self, config: dict, folder: Path, processes: Processes, say):
        self.config, self.folder, self.processes, self.say = config, folder, processes, say
        self.summary, self.texts = {"models": {}}, {}
        if processes.rank:
            processes.wait()                          # only one may make it and switch it to WAL
        self.cache = Cache(folder / "cache.sqlite")
        if processes.rank == 0:
            processes.wait()

    def score_model(self, name: str, path: str) -> None:
        """Load one model and score it on every block."""
        models = self.summary["models"]
        try:
            model, tokenizer = load_scored(path, self.config["dtype"], self.processes.device)
        except Exception as error:                    # a peer that the hub does not give
            if not models:                            # the first is the one that this is about
                raise
            models[name] = {"path": path, "error": sentence(error)[:500], "blocks": {}}
            self.say(f"{name} | not loaded: {sentence(error)}")
            return self.write_summary()
        rank, say = self.processes.rank, self.say if self.processes.rank == 0 else None
        lm = StentorLM(model, tokenizer, cache=self.cache, rank=rank,
                       world_size=self.processes.count, barrier=self.processes.wait, say=say,
                       tokens_per_batch=self.config.get("tokens_per_batch"))
        models[name] = {"path": path, "dtype": self.config["dtype"], **describe(lm), "blocks": {}}
        (self.folder / name).mkdir(parents=True, exist_ok=True)
        for block_name, block in self.config["blocks"].items():
            target = self.folder / name / f"{block_name}.json"
            models[name]["blocks"][block_name] = self.score_block(lm, name, block, target)
            self.write_summary()
            self.processes.wait()

    def write_summary(self) -> None:
        if self.processes.rank == 0:
            summary = json.dumps(self.summary, indent=1)
            write_atomically(self.folder / "run_summary.json", summary)

    def score_block(self, lm: StentorLM, name: str, block: dict, target: Path) -> dict:
        """Score one block of one model, kept in `target`. Returns its entry in the summary."""
        before = functools.partial(finished, target)
        try:
            result = evaluate_block(
                lm, block, limit=self.config.get("limit"), seed=self.config.get("seed", SEED),
                done=before, texts=self.texts if self.config.get("store") else None)
        except Exception as error:                    # must not cost the other blocks
            # Where not all processes found it, the others wait in this block: start all again.
            if self.processes.count > 1 and not isinstance(error, ParameterError):
                raise
            self.say(f"{name} | {block['title']} | failed: {sentence(error)}")
            return {"status": "failed", "error": sentence(error)[:500]}
        if self.processes.rank == 0:
            again = before(result["key"])
            if not again:
                result |= {"title": block["title"], "model": name}
                write_atomically(target, json.dumps(result, indent=1))
            items = sum(task["n"] for task in result["tasks"].values())
            self.say(f"{name} | {block['title']} | {items:,} items "
                     + ("were already done" if again else f"in {duration(result['seconds'])}"))
        return {"status": "ok", "key": result["key"], "title": block["title"],
                "lm_eval": result["lm_eval"]}


def finished(target: Path, key: str) -> dict | None:
    """The content of a block's file, if it is the answer to `key`."""
    with contextlib.suppress(OSError, ValueError):
        before = json.loads(target.read_text())
        return before if before.get("key") == key else None


def describe(lm: StentorLM) -> dict:
    """What decides a model's scores, as run_summary.json has it."""
    return {"fingerprint": lm.fingerprint,
            "parameters": sum(parameter.numel() for parameter in lm.model.parameters()),
            "prefix_token": lm.tokenizer.convert_ids_to_tokens(lm.prefix_token_id),
            "max_length": lm.max_length, "tokens_per_batch": lm.tokens_per_batch,
            "contexts_shared": lm.share}


def sentence(error: Exception) -> str:
    return redact(f"{type(error).__name__}: {error}")


def model_problem(path: str) -> str | None:
    """What is wrong with `path` as a model folder.

    None also for a hub id: "hf:owner/name", or owner/name that is no folder.
    """
    folder = Path(path)
    hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) and not folder.is_dir()
    if not (str(path).startswith("hf:") or hub_id or (folder / "config.json").is_file()):
        return ("is not a model folder (no config.json); run 02 first, or name a folder or "
                "a hub id")


def load_scored(path: str, dtype: str, device: torch.device):
    """(model in eval mode, tokenizer) from a folder or a hub id.

    Never runs code from there, but for our own tokenizer. Raises ParameterError for weights that
    do not fit the model, and for a tokenizer that does not.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig
    from transformers.utils import logging as transformers_logging
    transformers_logging.set_verbosity_error()
    name = str(path).removeprefix("hf:")
    tokenizer, settings = load_tokenizer(path), {"dtype": getattr(torch, dtype)}
    if Path(name).is_dir():
        model = load_model(name, **settings)
    else:
        # Some peers on the hub have pickled weights only (TinyStories-33M): transformers reads
        # those with weights_only=True.
        model, info = AutoModelForCausalLM.from_pretrained(
            name, output_loading_info=True, **settings)
        if problem := weights_problem(model, info):
            raise ParameterError([f"{name} cannot be scored: {problem}."])
    if problems := tokenizer_fit(tokenizer, model.get_input_embeddings().num_embeddings):
        raise ParameterError(problems)
    # Sampling settings that a folder recommends to its users are no part of the protocol (greedy,
    # unless a task says so).
    ids = {f"{kind}_token_id": getattr(model.generation_config, f"{kind}_token_id")
           for kind in ("bos", "eos", "pad")}
    model.generation_config = GenerationConfig(**ids)
    model.to(device).eval()
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer
