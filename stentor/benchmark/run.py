"""Every model on every block, in a process of its own; what is done is not done again."""
from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import torch

from stentor.benchmark.contamination import contamination_report
from stentor.benchmark.lm import Cache, SEED, StentorLM
from stentor.benchmark.scoring import evaluate_block
from stentor.files import ParameterError, StentorError, duration, write_atomically
from stentor.folders import load_model, weights_problem
from stentor.launch import PROCESS_ENVIRONMENT
from stentor.tokenizer import load_tokenizer, tokenizer_fit


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
