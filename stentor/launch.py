"""Training in a process of its own, and run.json, which says what it trains.

`launch` starts `python -m stentor_utils train run.json`, which is `train_from_file`; that starts a
`fill` for each source of a store that grows, which is `fill_from_file`.
"""
from __future__ import annotations

import contextlib
import functools
import json
import os
import platform
import signal
import subprocess
import time
from pathlib import Path

import torch

from stentor.checkpoints import check_run
from stentor.files import ParameterError, TrainingFailed, write_atomically
from stentor.folders import load_model
from stentor.growing import GrowingStore, fill_source, planned_shards
from stentor.hub import is_hub_name
from stentor.process import leave_with, own_command, own_environment, run_process
from stentor.recipes import Recipe, cpu_has_bf16
from stentor.secrets import secret_problems
from stentor.session import hours_left
from stentor.stages import StageStore
from stentor.tokenizer import load_tokenizer, tokenizer_problem
from stentor.tokens import TokenStore
from stentor.train import train
from stentor.watching import watching

# Of several processes. T4s have no peer access. A store shared by all attempts keeps the addresses
# of the dead processes, and the restarted ones connect to those (pytorch issue 135712; with one
# process 4 s late 4 of 6 restarts failed, 0 of 6 with this).
GROUP_ENVIRONMENT = {"NCCL_P2P_DISABLE": "1", "NCCL_IB_DISABLE": "1",
                     "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
STOP_SECONDS = 120    # what the stop button leaves for the step and its checkpoint


def launch(recipe: Recipe, store_dir, tokenizer_dir, run_dir, *, num_processes: int | None = None,
           deadline_hours: float | None = None, xla: str | None = None, fill: dict | None = None,
           start=None, texts: dict | None = None, say=None) -> dict:
    """Train in a process of its own (several with torchrun), its log shown here.

    The process writes run.json and environment.json. num_processes: default one a GPU, or 1 on the
    CPU. xla: "TPU", or "CPU" for 8 virtual devices (CPU_NUM_DEVICES); one process serves them all,
    with PJRT_DEVICE set for it. fill: {"shard_tokens", "rolling", "ahead_shards"}: the store is a
    GrowingStore, filled by one worker process a source while training runs. start: a folder of the
    model to go on from, used as it is, in fp32, without the recipe's precision techniques; None:
    a new one. texts: {name: token store}, whose held-out text every evaluation measures too.
    Neither of these two goes with `xla` or `fill`.
    Stopping the notebook's cell stops the training after its step, saved. Returns summary.json's
    content; raises TrainingFailed with the last lines of the log.
    """
    run_dir = Path(run_dir)
    if problems := secret_problems(store_dir=str(store_dir), tokenizer_dir=str(tokenizer_dir),
                                   run_dir=str(run_dir), recipe=json.dumps(recipe.to_dict())):
        raise ParameterError(problems)
    if (start or texts) and (xla or fill):
        raise ParameterError(["start and texts go with neither xla nor fill: leave those out."])
    run_dir.mkdir(parents=True, exist_ok=True)
    places = {"store": store_dir, "tokenizer": tokenizer_dir}
    described = {"recipe": recipe.to_dict(),
                 **{name: place_in(run_dir, path) for name, path in places.items()},
                 "were_at": {name: os.path.realpath(path) for name, path in places.items()
                             if not is_hub_name(path)},
                 "deadline_hours": deadline_hours, "fill": fill}
    if start:
        described["start"] = place_in(run_dir, start)
    if texts:
        described["texts"] = {name: place_in(run_dir, path) for name, path in texts.items()}
    num_processes = 1 if xla else num_processes or max(1, torch.cuda.device_count())
    # One clock for every process: imports and a restart count too.
    end = str(time.monotonic() + 3600 * deadline_hours) if deadline_hours else None
    # run.json is written by the training process, once the run is found to be its own.
    env = own_environment(GROUP_ENVIRONMENT if num_processes > 1 else {},
                          STENTOR_RUN_JSON=json.dumps(described), STENTOR_DEADLINE=end,
                          TOKENIZERS_PARALLELISM="false", **xla_environment(xla))
    command = own_command("train", run_dir / "run.json", num_processes=num_processes, restarts=1)
    with contextlib.nullcontext(say) if say else watch_run(run_dir) as tell:
        ended = run_process(command, env, patience=STOP_SECONDS, say=tell)
    if ended.code:
        raise TrainingFailed(f"training ended with exit code {ended.code}. Its last lines:\n"
                             + "".join(ended.tail))
    return json.loads((run_dir / "summary.json").read_text())


def watch_run(run_dir: Path):
    """`watching` a run that is trained in `run_dir`: its loss grows above the log's last lines."""
    def picture():
        from stentor.charts import draw_progress      # matplotlib, where somebody looks
        return draw_progress(run_dir)
    return watching(picture=picture, log=run_dir / "log.txt")


def xla_environment(xla: str | None) -> dict[str, str]:
    """What makes a process train with the XLA engine, on "TPU" or "CPU"; None: with another."""
    if not xla:
        return {}
    virtual = {"CPU_NUM_DEVICES": os.environ.get("CPU_NUM_DEVICES", "8")} if xla == "CPU" else {}
    # TF_CPP_...: XLA's compiler warns at length, of nothing we can change.
    return {"STENTOR_ENGINE": "xla", "PJRT_DEVICE": xla, "TF_CPP_MIN_LOG_LEVEL": "2", **virtual}


def place_in(run_dir, path) -> str:
    """How run.json names a store or tokenizer: a hub name as it is, else the path from its folder.

    What is in the folder is named so though the folder is a link; from a real folder to another,
    no link is in between.
    """
    if is_hub_name(path):
        return str(path)
    inside = os.path.relpath(path, run_dir)
    if inside.split(os.sep)[0] != "..":
        return inside
    return os.path.relpath(os.path.realpath(path), os.path.realpath(run_dir))


def find_place(run_dir, run: dict, what: str) -> Path | str:
    """Where run.json's "store" or "tokenizer" is: a hub name, or a path.

    Where it names nothing that is there (a run folder that was copied), what `launch` was given,
    then what the folder itself holds. A wrong one is refused by its hash when training begins.
    Raises ParameterError where there is none.
    """
    run_dir, named = Path(run_dir), str(run[what])
    if is_hub_name(named):
        return named
    if run.get("fill") and what == "store":           # it grows there, never in another folder
        return run_dir / named
    inside = {"tokenizer": ("tokenizer", "final", "best"), "store": ("tokens",)}[what]
    was_at = (run.get("were_at") or {}).get(what)
    tried = [run_dir / named, *([Path(was_at)] if was_at else []),
             *(run_dir / name for name in inside)]
    for path in tried:
        if what == "tokenizer" and tokenizer_problem(path) is None:
            return path
        if what == "store" and (path / "manifest.json").is_file():
            return path
    raise ParameterError([
        f"{run_dir / 'run.json'} names the {what} {named}, and there is none, nor in "
        f"{run_dir / inside[0]}: copy it there, or start the run with launch (notebook 02 or "
        "03)."])


def read_run(path: Path) -> dict:
    """The content of run.json; in a process that `launch` started, the content that it will have.

    Raises ParameterError, in a sentence, for a file that is not there or no description of a run.
    """
    try:
        run = json.loads(os.environ.get("STENTOR_RUN_JSON") or path.read_text())
        return {**run, "recipe": Recipe.from_dict(run["recipe"]),
                "store": run["store"], "tokenizer": run["tokenizer"]}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ParameterError([f"{path} cannot be read as a run ({type(error).__name__}: {error}): "
                              "start it with launch (notebook 02 or 03)."]) from error


def describe_run(path: Path) -> None:
    """Write run.json and environment.json, if `launch` started this; else they are there."""
    if text := os.environ.get("STENTOR_RUN_JSON"):
        write_atomically(path, json.dumps(json.loads(text), indent=1))
        write_atomically(path.parent / "environment.json", json.dumps(environment(), indent=1))


def machine() -> dict:
    """The hardware and what runs on it, for a file of figures."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
               platform.processor() if lines else "")
    return {"python": platform.python_version(), "platform": platform.platform(),
            "cpu": cpu, "cpu_count": os.cpu_count(),
            "gpus": torch.cuda.device_count(), "cpu_has_bf16": cpu_has_bf16(),
            "torch": torch.__version__}


def environment() -> dict:
    """`machine` and all versions, for environment.json. No environment variables: they may hold secrets."""
    from importlib.metadata import distributions
    return machine() | {"packages": dict(sorted((one.metadata["Name"] or "", one.version)
                                                for one in distributions()))}


def train_from_file(path) -> dict:
    """What `launch` starts: train the run that run.json describes. Returns the summary."""
    path = Path(path).resolve()
    run = read_run(path)
    recipe, fill = run["recipe"], run.get("fill")
    if problems := recipe.problems():
        raise ParameterError(problems)
    if os.environ.get("RANK", "0") == "0":
        check_run(recipe, path.parent)                # before workers fill a run that is not to be
    tokenizer = load_tokenizer(find_place(path.parent, run, "tokenizer"))
    store = find_place(path.parent, run, "store")
    end = os.environ.get("STENTOR_DEADLINE")          # from launch
    hours = hours_left(float(end)) if end else run.get("deadline_hours")
    go = functools.partial(train, recipe, run_dir=path.parent, tokenizer=tokenizer,
                           deadline_hours=hours, begin=functools.partial(describe_run, path))
    if start := run.get("start"):
        go.keywords["model"] = load_model(path.parent / start, dtype=torch.float32,
                                          attn_implementation=recipe.attn_implementation)
    if texts := run.get("texts"):
        places = {name: path.parent / place for name, place in texts.items()}
        return go(store=StageStore(store, recipe, places))
    if not fill:
        return go(store=TokenStore(store, recipe))
    with fill_while_training(path, recipe, fill["shard_tokens"]) as failed:
        return go(store=GrowingStore(store, recipe, fill["shard_tokens"],
                                     rolling=fill.get("rolling", False), failed=failed))


@contextlib.contextmanager
def fill_while_training(path, recipe: Recipe, shard_tokens: int):
    """Worker processes, one a source, as long as the block runs.

    Gives a function that says what is wrong with them: a sentence, or None.
    """
    # They import transformers, which imports torch_xla: it must not take the chips.
    env = own_environment(STENTOR_ENGINE=None, CPU_NUM_DEVICES=None, PJRT_DEVICE="CPU")
    logs = {name: open(Path(path).parent / f"feed-{name}.log", "w+")
            for name in planned_shards(recipe, shard_tokens)}
    workers = {name: subprocess.Popen(own_command("fill", path, name, os.getpid()), env=env,
                                      stdout=log, stderr=log) for name, log in logs.items()}

    def failed() -> str | None:
        for name, worker in workers.items():
            if worker.poll():
                lines = Path(logs[name].name).read_text().splitlines(keepends=True)
                return (f"the worker that fills source {name} ended with exit code "
                        f"{worker.returncode}: " + "".join(lines[-8:]))
    try:
        yield failed
    finally:
        for worker in workers.values():
            worker.terminate()
        for worker in workers.values():
            worker.wait()
        for log in logs.values():
            log.close()


def fill_from_file(path, name: str, parent: int | None = None) -> None:
    """What a worker does: fill one source of the run described by run.json.

    parent: the process to leave with.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)      # the stop button: training ends us
    if parent:
        leave_with(int(parent))
    path = Path(path).resolve()
    run = read_run(path)
    recipe, fill = run["recipe"], run.get("fill")
    if not fill or name not in planned_shards(recipe, fill["shard_tokens"]):
        raise ParameterError([f"{path}: no worker fills the source {name!r} of this run."])
    tokenizer = load_tokenizer(find_place(path.parent, run, "tokenizer"))
    fill_source(recipe, tokenizer, find_place(path.parent, run, "store"), name,
                shard_tokens=fill["shard_tokens"], ahead_shards=fill.get("ahead_shards"))
