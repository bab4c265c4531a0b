"""A session: what the hardware is, when it ends, and where its run folder is."""
from __future__ import annotations

import functools
import hashlib
import os
import shutil
import time
from pathlib import Path

import torch

from stentor.parameters import session_start, writable_folder

# The session. Kaggle ends GPU and CPU sessions after 12 hours and a TPU's after 9; half an hour is for what comes after
# training. One deadline for all notebooks: so many hours after the first check, on the clock that nobody sets.

SESSION_HOURS = {"t4": 11.5, "cpu": 11.5, "tpu": 8.5}


def session_end(hours: float | None, profile: str) -> float | None:
    """The instant, as time.monotonic(), by which the session's work must be saved; None where there is none.

    hours: counted from `session_start`; None: SESSION_HOURS of the profile on Kaggle, no deadline elsewhere.
    """
    if hours is None and "KAGGLE_KERNEL_RUN_TYPE" in os.environ:
        hours = SESSION_HOURS[profile]
    return None if hours is None else session_start() + 3600 * hours


def hours_left(end: float | None) -> float | None:
    """Hours until `end` of `session_end`, never 0 or less: training then saves and stops at once. None for None."""
    return None if end is None else max(1e-6, (end - time.monotonic()) / 3600)


# Launch: training runs in a process of its own, so a crash does not take the notebook's kernel along, and CUDA is never
# initialised in the kernel.


def find_profile(profile: str) -> str:
    """"auto" -> "tpu", "t4" or "cpu", from the hardware; CUDA is not initialised by asking."""
    if profile != "auto":
        return profile
    if os.environ.get("PJRT_DEVICE") == "TPU" or list(Path("/dev").glob("accel*")) or list(Path("/dev").glob("vfio/[0-9]*")):
        return "tpu"
    if torch.cuda.device_count():
        return "t4"
    say_cpu_twin()
    return "cpu"


@functools.cache
def say_cpu_twin() -> None:
    """Once in a process: what "auto" means where there is no accelerator."""
    print("PROFILE = 'auto' found no accelerator: this is the recipe's small CPU twin (about 1.4M parameters, the text that "
          "comes with Python); for the recipe itself choose a GPU or TPU accelerator, or set PROFILE = 't4' or 'tpu', in "
          "01 as in the notebook that trains.", flush=True)


def find_outputs(outputs: str) -> Path:
    """A relative OUTPUTS is beside stentor_utils.py, or in the working folder where that is read-only (Kaggle inputs)."""
    here = Path(__file__).resolve().parents[1]
    return Path(outputs) if Path(outputs).is_absolute() else (here if os.access(here, os.W_OK) else Path.cwd()) / outputs


def run_problem(folder) -> str | None:
    """What is wrong with `folder` as a run, ours or a foreign one: "holds no run: ...", or None."""
    folder = Path(folder)
    if not folder.is_dir():
        return "is not a folder"
    signs = ("run.json", "summary.json", "metrics.jsonl", "final/config.json", "config.json", "*.csv", "benchmark/*",
             "instruct/sft_summary.json", "**/trainer_state.json", "**/results*.json")
    if not any(next(folder.glob(sign), None) for sign in signs):
        return "holds no run: no log, no model, no scores; run notebook 02 or 03 first"


def writable_run(run_dir, say=print) -> Path:
    """`run_dir`, or where that cannot be written to (a Kaggle input) a copy in the working folder's outputs.

    Files, final/ and charts/ are copied; other folders, such as tokens/ and checkpoints/, are linked.
    """
    run_dir = Path(os.path.abspath(run_dir))
    if not writable_folder(run_dir):
        return run_dir
    mark = hashlib.sha256(str(run_dir).encode()).hexdigest()[:8]       # two inputs may hold runs of one name
    copy_dir = find_outputs("outputs") / f"attached-{mark}" / run_dir.name
    say(f"{run_dir} cannot be written to: what is made here goes to {copy_dir}, a copy of it")
    copy_dir.mkdir(parents=True, exist_ok=True)
    for path in run_dir.glob("[!.]*"):
        if path.is_dir() and path.name not in ("final", "charts"):
            if not os.path.lexists(copy_dir / path.name):
                (copy_dir / path.name).symlink_to(path)
        else:
            for file in [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]:
                to = copy_dir / file.relative_to(run_dir)
                to.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, to)             # not its mode: that of an input forbids to write
    return copy_dir
