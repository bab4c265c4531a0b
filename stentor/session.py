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

# Kaggle ends GPU and CPU sessions after 12 hours and a TPU's after 9; half an hour is for what
# comes after training. One deadline for all notebooks: so many hours after the first check, on the
# clock that nobody sets.
SESSION_HOURS = {"t4": 11.5, "cpu": 11.5, "tpu": 8.5}


def session_end(hours: float | None, profile: str) -> float | None:
    """The instant, as time.monotonic(), by which the session's work must be saved; None: no deadline.

    hours: counted from `session_start`. Where it is None: SESSION_HOURS of the profile on Kaggle,
    no deadline elsewhere.
    """
    if hours is None and "KAGGLE_KERNEL_RUN_TYPE" in os.environ:
        hours = SESSION_HOURS[profile]
    return None if hours is None else session_start() + 3600 * hours


def hours_left(end: float | None) -> float | None:
    """Hours until `end` of `session_end`; None for None.

    Never 0 or less: at the end training saves and stops at once.
    """
    return None if end is None else max(1e-6, (end - time.monotonic()) / 3600)


def find_profile(profile: str) -> str:
    """"auto" -> "tpu", "t4" or "cpu", from the hardware; CUDA is not initialised by asking."""
    if profile != "auto":
        return profile
    chips = [path for pattern in ("accel*", "vfio/[0-9]*") for path in Path("/dev").glob(pattern)]
    if chips or os.environ.get("PJRT_DEVICE") == "TPU":
        return "tpu"
    if torch.cuda.device_count():
        return "t4"
    say_cpu_twin()
    return "cpu"


@functools.cache
def say_cpu_twin() -> None:
    """Once in a process: what "auto" means where there is no accelerator."""
    print("PROFILE = 'auto' found no accelerator: this is the recipe's small CPU twin (about 1.4M "
          "parameters, the text that comes with Python); for the recipe itself choose a GPU or TPU "
          "accelerator, or set PROFILE = 't4' or 'tpu', in 01 as in the notebook that trains.",
          flush=True)


def find_outputs(outputs: str) -> Path:
    """A relative OUTPUTS is in the repository; in the working folder where there is none to write to.

    There is none where the helper was installed by pip, carried by a notebook, or is a Kaggle input.
    """
    here = Path(__file__).resolve().parents[1]
    if Path(outputs).is_absolute():
        return Path(outputs)
    repository = (here / "notebooks").is_dir() and os.access(here, os.W_OK)
    return (here if repository else Path.cwd()) / outputs


def find_run(outputs, name: str) -> Path:
    """The folder of the run `name`, there or not: the one place that decides it.

    outputs: of `find_outputs`. Nothing is created or copied here; `writable_run` makes the copy of a
    run that can only be read.
    """
    return Path(outputs) / name


def run_problem(folder) -> str | None:
    """What is wrong with `folder` as a run, ours or a foreign one: "holds no run: ...", or None."""
    folder = Path(folder)
    if not folder.is_dir():
        return "is not a folder"
    signs = ("run.json", "summary.json", "metrics.jsonl", "final/config.json", "config.json",
             "*.csv", "benchmark/*", "instruct/sft_summary.json", "**/trainer_state.json",
             "**/results*.json")
    if not any(next(folder.glob(sign), None) for sign in signs):
        return "holds no run: no log, no model, no scores; run notebook 02 or 03 first"


def any_run(outputs, names: list[str] = ()) -> bool:
    """Whether `outputs` holds a run, ours or a foreign one, or a folder of one of these names."""
    return (any(find_run(outputs, name).is_dir() for name in names)
            or any(not run_problem(path) for path in Path(outputs).glob("[!.]*")))


def absent_runs(outputs, names: list[str]) -> str | None:
    """What is wrong with `names` as runs to read, with those that are there; or None."""
    folders = [find_run(outputs, name) for name in names]
    for folder in folders:
        if folder.is_dir() and (wrong := run_problem(folder)):
            return f"is no run to draw: {folder} {wrong}"
    if not all(folder.is_dir() for folder in folders):
        there = sorted(path.name for path in Path(outputs).glob("*") if not run_problem(path))
        what = ", ".join(there) or "no run yet: run notebook 02 first"
        return f"is not in {outputs}, which holds {what}"


def writable_run(run_dir, say=print) -> Path:
    """`run_dir`; where it cannot be written to (a Kaggle input) a copy in the working folder's outputs.

    Files, final/ and charts/ are copied; other folders, such as tokens/ and checkpoints/, linked.
    """
    run_dir = Path(os.path.abspath(run_dir))
    if not writable_folder(run_dir):
        return run_dir
    mark = hashlib.sha256(str(run_dir).encode()).hexdigest()[:8]    # two inputs, runs of one name
    copy_dir = find_outputs("outputs") / f"attached-{mark}" / run_dir.name
    say(f"{run_dir} cannot be written to: what is made here goes to {copy_dir}, a copy of it")
    copy_dir.mkdir(parents=True, exist_ok=True)
    for path in run_dir.glob("[!.]*"):
        if path.is_dir() and path.name not in ("final", "charts"):
            if not os.path.lexists(copy_dir / path.name):
                (copy_dir / path.name).symlink_to(path)
            continue
        for file in [path, *path.rglob("*")]:
            if file.is_file():
                to = copy_dir / file.relative_to(run_dir)
                to.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, to)    # not its mode: that of an input forbids to write
    return copy_dir
