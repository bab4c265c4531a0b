"""Our own commands in processes of their own: the one runner of training, benchmark and workers.

A crash does not take the notebook's kernel along, and CUDA is never initialised in the kernel.
"""
from __future__ import annotations

import contextlib
import os
import re
import resource
import signal
import subprocess
import sys
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

from stentor.secrets import redact

HERE = str(Path(__file__).resolve().parents[1])       # where stentor_utils.py is

# What our processes must have in their environment before they start; a user's own setting wins.
# MALLOC_*: glibc gives every large tensor back to the kernel at each free and page-faults it in
# again at the next step; keeping the pages made a 1.5M-parameter step 1.3x as fast here.
# GOMP_SPINCOUNT: how long an OpenMP thread spins for the others before it sleeps. When another
# process has the core that one of them waits for, spinning burns the time it needs; sleeping at
# once costs a wake-up at each of a step's thousand loops.
# 1.4M parameters, compiled, 2 cores, tokens/s (mean of 2 runs each; unset is 300,000):
#     spins                    0    2,000   20,000
#     idle cores          18,000   20,200   22,700
#     one busy process    11,500   10,700    5,500
PROCESS_ENVIRONMENT = {
    "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "4294967296",
    "MALLOC_TOP_PAD_": "67108864", "GOMP_SPINCOUNT": "2000"}

AN_ERROR = re.compile(r"(\[rank\d+\]: ?)?[\w.]+(Error|Exception)\b")


def peak_memory() -> int:
    """The highest resident size of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024       # Linux counts kB


@dataclass
class Ended:
    """How a process ended: its exit code, its last 60 lines, its last 3 lines that name an error.

    torchrun buries the error of one process under a report of its own, longer than the tail.
    """
    code: int = 0
    tail: deque[str] = field(default_factory=lambda: deque(maxlen=60))
    errors: deque[str] = field(default_factory=lambda: deque(maxlen=3))


def own_command(*arguments, num_processes: int = 1, restarts: int = 0) -> list[str]:
    """`python -m stentor_utils <arguments>`, by torchrun where several processes are to work.

    torchrun is what `accelerate launch` starts too, but also without a GPU. A process that crashes
    takes the others along; all start again, at most `restarts` times.
    """
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
                str(num_processes), "--max-restarts", str(restarts), "--module"]
    return [sys.executable, *(torchrun if num_processes > 1 else ["-m"]), "stentor_utils",
            *map(str, arguments)]


def own_environment(defaults: dict[str, str] | None = None, **settings: str | None) -> dict:
    """This process's environment and what ours need; `defaults` hold where it has no setting.

    settings: what holds in any case; None takes a variable away.
    """
    path = os.pathsep.join(filter(None, [HERE, os.environ.get("PYTHONPATH")]))
    env = {**PROCESS_ENVIRONMENT, **(defaults or {}), **os.environ,
           "PYTHONUNBUFFERED": "1", "PYTHONPATH": path, **settings}
    return {name: value for name, value in env.items() if value is not None}


def run_process(command: list[str], env: dict[str, str], *, patience: float = 0,
                say=None) -> Ended:
    """Run a command to its end and show its log here, line by line, without secrets.

    patience: what the stop button means. So many seconds for the process to save and end by itself
    after an interrupt, before it is killed; 0 kills it, and all that it started, at once.
    """
    say = say or (lambda text: print(text, flush=True))
    ended = Ended()
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               text=True, errors="replace", start_new_session=True)
    try:
        for line in process.stdout:
            line = redact(line)                       # an error may hold a URL with a token
            say(line.rstrip("\n"))
            ended.tail.append(line)
            if AN_ERROR.match(line):
                ended.errors.append(line)
        ended.code = process.wait()
    except BaseException:                             # the stop button
        stop(process, patience)
        raise
    return ended


def stop(process: subprocess.Popen, patience: float) -> None:
    """End a process and all that it started, within `patience` seconds."""
    if patience:
        os.killpg(process.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=patience)
            return
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def leave_with(parent: int) -> None:
    """Ask the kernel for a SIGTERM when the process `parent` dies.

    Leaves at once if it has died already, while this one imported.
    """
    import ctypes
    PR_SET_PDEATHSIG = 1                              # linux/prctl.h
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        raise SystemExit(0)
