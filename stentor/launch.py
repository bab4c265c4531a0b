"""Training in a process of its own: a crash does not take the notebook's kernel along.

CUDA is never initialised in the kernel.
"""
from __future__ import annotations

import contextlib
import functools
import json
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from stentor.checkpoints import check_run
from stentor.files import ParameterError, TrainingFailed, write_atomically
from stentor.growing import GrowingStore, fill_source, planned_shards
from stentor.hub import is_hub_name
from stentor.recipes import Recipe, cpu_has_bf16
from stentor.secrets import redact, secret_problems
from stentor.session import hours_left
from stentor.tokenizer import load_tokenizer, tokenizer_problem
from stentor.tokens import TokenStore
from stentor.train import train


def environment() -> dict:
    """Versions and hardware, for environment.json. No environment variables: they may hold secrets."""
    from importlib.metadata import distributions
    cpu = next((line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")), platform.processor()) if Path("/proc/cpuinfo").exists() else ""
    return {"python": platform.python_version(), "platform": platform.platform(), "cpu": cpu, "cpu_count": os.cpu_count(),
            "gpus": torch.cuda.device_count(), "cpu_has_bf16": cpu_has_bf16(),
            "packages": dict(sorted((d.metadata["Name"] or "", d.version) for d in distributions()))}


# What the training process must have in its environment before it starts; a user's own setting wins.
# MALLOC_*: glibc gives every large tensor back to the kernel at each free and page-faults it in again at the next step;
# keeping the pages made a 1.5M-parameter step 1.3x as fast here.
# GOMP_SPINCOUNT: how long an OpenMP thread spins for the others before it sleeps. When another process has the core that one
# of them waits for, spinning burns the time it needs; sleeping at once costs a wake-up at each of a step's thousand loops.
# 1.4M parameters, compiled, 2 cores, tokens/s (mean of 2 runs each; unset is 300,000):
#     spins                    0    2,000   20,000
#     idle cores          18,000   20,200   22,700
#     one busy process    11,500   10,700    5,500
PROCESS_ENVIRONMENT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "4294967296", "MALLOC_TOP_PAD_": "67108864",
                       "GOMP_SPINCOUNT": "2000"}


def launch(recipe: Recipe, store_dir, tokenizer_dir, run_dir, *, num_processes: int | None = None,
           deadline_hours: float | None = None, xla: str | None = None, fill: dict | None = None, say=None) -> dict:
    """Train in a process of its own (several with torchrun) that writes run.json and environment.json; show its log here.

    num_processes: default one a GPU, or 1 on the CPU. xla: "TPU", or "CPU" for 8 virtual devices (CPU_NUM_DEVICES); one
    process serves them all, with PJRT_DEVICE set for it. fill: {"shard_tokens", "rolling", "ahead_shards"}: the store is
    a GrowingStore, filled by one worker process a source while training runs.
    Stopping the notebook's cell stops the training after its step, saved. Returns summary.json's content; raises
    TrainingFailed with the last lines of the log.
    """
    say = say or (lambda text: print(text, flush=True))
    run_dir = Path(run_dir)
    if problems := secret_problems(store_dir=str(store_dir), tokenizer_dir=str(tokenizer_dir), run_dir=str(run_dir),
                                   recipe=json.dumps(recipe.to_dict())):
        raise ParameterError(problems)
    run_dir.mkdir(parents=True, exist_ok=True)
    places = {"store": store_dir, "tokenizer": tokenizer_dir}
    described = {"recipe": recipe.to_dict(), **{name: place_in(run_dir, path) for name, path in places.items()},
                 "were_at": {name: os.path.realpath(path) for name, path in places.items() if not is_hub_name(path)},
                 "deadline_hours": deadline_hours, "fill": fill}
    num_processes = 1 if xla else num_processes or max(1, torch.cuda.device_count())
    here = str(Path(__file__).resolve().parents[1])
    command = [sys.executable, "-m", "stentor_utils", "train", str(run_dir / "run.json")]
    if num_processes > 1:
        # What `accelerate launch` starts too, but also without a GPU. A process that crashes takes the others along; all
        # start again, once, from the last checkpoint.
        command[1:3] = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes),
                        "--max-restarts", "1", "--module", "stentor_utils"]
    # T4s have no peer access. A store shared by all attempts keeps the addresses of the dead processes, and the restarted ones
    # connect to those (pytorch issue 135712; with one process 4 s late 4 of 6 restarts failed, 0 of 6 with this).
    group = {"NCCL_P2P_DISABLE": "1", "NCCL_IB_DISABLE": "1",
             "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"} if num_processes > 1 else {}
    # run.json is written by the training process, once the run is found to be its own (train's `begin`).
    env = {**PROCESS_ENVIRONMENT, **group, **os.environ, "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false",
           "STENTOR_RUN_JSON": json.dumps(described),
           "PYTHONPATH": os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))}
    env.pop("STENTOR_DEADLINE", None)
    if deadline_hours:                                # one clock for every process: imports and a restart count too
        env["STENTOR_DEADLINE"] = str(time.monotonic() + 3600 * deadline_hours)
    if xla:                                           # TF_CPP...: XLA's compiler warns at length, of nothing we can change
        virtual = {"CPU_NUM_DEVICES": os.environ.get("CPU_NUM_DEVICES", "8")} if xla == "CPU" else {}
        env |= {"STENTOR_ENGINE": "xla", "PJRT_DEVICE": xla, "TF_CPP_MIN_LOG_LEVEL": "2", **virtual}
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               errors="replace", start_new_session=True)
    tail = []
    try:
        for line in process.stdout:
            line = redact(line)                       # an exception may hold a URL or a header with a token
            say(line.rstrip("\n"))
            tail = (tail + [line])[-60:]
        code = process.wait()
    except BaseException:                             # the stop button: let the step end and the checkpoint be written
        os.killpg(process.pid, signal.SIGINT)
        try:
            process.wait(timeout=120)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        raise
    if code:
        raise TrainingFailed(f"training ended with exit code {code}. Its last lines:\n" + "".join(tail))
    return json.loads((run_dir / "summary.json").read_text())


def place_in(run_dir, path) -> str:
    """How run.json names a store or tokenizer: a hub name as it is, else the path from the run's folder.

    What is in the folder is named so though the folder is a link; from a real folder to another, no link is in between.
    """
    if is_hub_name(path):
        return str(path)
    inside = os.path.relpath(path, run_dir)
    return inside if inside.split(os.sep)[0] != ".." else os.path.relpath(os.path.realpath(path), os.path.realpath(run_dir))


def find_place(run_dir, run: dict, what: str) -> Path | str:
    """Where run.json's "store" or "tokenizer" is: a hub name, or a path.

    Where it names nothing that is there (a run folder that was copied), what `launch` was given, then what the folder itself
    holds. A wrong one is refused by its hash when training begins. Raises ParameterError where there is none.
    """
    run_dir, named = Path(run_dir), str(run[what])
    if is_hub_name(named):
        return named
    inside = {"tokenizer": ("tokenizer", "final", "best"), "store": ("tokens",)}[what]
    tried = [run_dir / named, *(Path(path) for path in [(run.get("were_at") or {}).get(what)] if path),
             *(run_dir / name for name in inside)]
    if run.get("fill") and what == "store":           # it grows where it is, or begins there; never in another run's folder
        return tried[0]
    for path in tried:
        if (tokenizer_problem(path) is None) if what == "tokenizer" else (path / "manifest.json").is_file():
            return path
    raise ParameterError([f"{run_dir / 'run.json'} names the {what} {named}, and there is none, nor in {run_dir / inside[0]}: "
                          "copy it there, or start the run with launch (notebook 02 or 03)."])


def read_run(path: Path) -> dict:
    """The content of run.json; in a process that `launch` started, the content that it will have.

    Raises ParameterError, in a sentence, for a file that is not there or no description of a run.
    """
    try:
        run = json.loads(os.environ.get("STENTOR_RUN_JSON") or path.read_text())
        return {**run, "recipe": Recipe.from_dict(run["recipe"]), "store": run["store"], "tokenizer": run["tokenizer"]}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ParameterError([f"{path} cannot be read as a run ({type(error).__name__}: {error}): start it with launch "
                              "(notebook 02 or 03)."]) from error


def describe_run(path: Path) -> None:
    """run.json and environment.json of a run that `launch` started; one that was started from run.json has them."""
    if text := os.environ.get("STENTOR_RUN_JSON"):
        write_atomically(path, json.dumps(json.loads(text), indent=1))
        write_atomically(path.parent / "environment.json", json.dumps(environment(), indent=1))


def train_from_file(path) -> dict:
    """What `launch` starts: train the run described by run.json."""
    path = Path(path).resolve()
    run = read_run(path)
    recipe = run["recipe"]
    if problems := recipe.problems():
        raise ParameterError(problems)
    if os.environ.get("RANK", "0") == "0":
        check_run(recipe, path.parent)                # before the workers of a run that is not to be begin to fill
    tokenizer = load_tokenizer(find_place(path.parent, run, "tokenizer"))
    store = find_place(path.parent, run, "store")
    end = os.environ.get("STENTOR_DEADLINE")          # from launch
    hours = hours_left(float(end)) if end else run.get("deadline_hours")
    go = functools.partial(train, recipe, run_dir=path.parent, tokenizer=tokenizer, deadline_hours=hours,
                           begin=functools.partial(describe_run, path))
    if not run.get("fill"):
        return go(store=TokenStore(store, recipe))
    with fill_while_training(path, recipe, run["fill"]["shard_tokens"]) as failed:
        return go(store=GrowingStore(store, recipe, run["fill"]["shard_tokens"], rolling=run["fill"].get("rolling", False),
                                     failed=failed))


@contextlib.contextmanager
def fill_while_training(path, recipe: Recipe, shard_tokens: int):
    """Worker processes, one a source, as long as the block runs; gives a function that says what is wrong with them."""
    env = {key: value for key, value in os.environ.items() if key not in ("STENTOR_ENGINE", "CPU_NUM_DEVICES")}
    env |= {"PJRT_DEVICE": "CPU"}                     # they import transformers, which imports torch_xla: not the chips
    logs = {name: open(Path(path).parent / f"feed-{name}.log", "w+") for name in planned_shards(recipe, shard_tokens)}
    command = [sys.executable, "-m", "stentor_utils", "fill", str(path)]
    workers = {name: subprocess.Popen([*command, name, str(os.getpid())], env=env, stdout=log, stderr=log)
               for name, log in logs.items()}

    def failed():
        for name, worker in workers.items():
            if worker.poll():
                return f"the worker that fills source {name} ended with exit code {worker.returncode}: " + "".join(
                    Path(logs[name].name).read_text().splitlines(keepends=True)[-8:])
    try:
        yield failed
    finally:
        for worker in workers.values():
            worker.terminate()
        for worker in workers.values():
            worker.wait()
        for log in logs.values():
            log.close()


def leave_with(parent: int) -> None:
    """Ask the kernel for a SIGTERM when the process `parent` dies, and leave at once if it has: while this one imported."""
    import ctypes
    PR_SET_PDEATHSIG = 1                              # linux/prctl.h
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        raise SystemExit(0)


def fill_from_file(path, name: str, parent: int | None = None) -> None:
    """What a worker does: fill one source of the run described by run.json, as long as the process `parent` lives."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)      # the stop button: training ends its step, saves, and ends its workers
    if parent:
        leave_with(int(parent))
    path = Path(path).resolve()
    run = read_run(path)
    fill_source(run["recipe"], load_tokenizer(find_place(path.parent, run, "tokenizer")), find_place(path.parent, run, "store"),
                name, shard_tokens=run["fill"]["shard_tokens"], ahead_shards=run["fill"].get("ahead_shards"))
