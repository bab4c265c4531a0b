"""Kaggle: attached inputs, a run that goes on in another session, its room and its network.

A notebook there has a working folder of its own, and sees what other notebooks and its own earlier
versions saved as read-only inputs. `adopt` copies the run that is wanted before work starts.
"""
from __future__ import annotations

import contextlib
import errno
import functools
import json
import math
import os
import shutil
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

from stentor.checkpoints import (
    checkpoint_folders, fingerprint_differences, newest_state, recipe_fingerprint, verify_checkpoint)
from stentor.files import (
    CheckpointError, ParameterError, RunLock, fsync_folder, read_object, remove, write_atomically)
from stentor.recipes import Recipe
from stentor.shapes import count_parameters

WORKING_BYTES = 20 * 10**9             # what Kaggle keeps of a working folder
# the first folder of the newer layout
INPUT_KINDS = {"datasets", "notebooks", "kernels", "models", "competitions"}
OFFLINE = ("there is no internet: on Kaggle switch it on (Settings > Internet; it needs a verified "
           "phone number)")


def on_kaggle() -> bool:
    return "KAGGLE_KERNEL_RUN_TYPE" in os.environ


# Attached inputs.

def find_inputs(root=None) -> list[Path]:
    """The attached inputs: <root>/<slug>, in the newer layout <root>/<kind>/<owner>/<slug>; or [].

    root: default $KAGGLE_INPUT, else /kaggle/input. One mounted at both addresses is given once.
    """
    root = Path(root or os.environ.get("KAGGLE_INPUT") or "/kaggle/input")
    found = {}
    for path in _folders(root):
        owners = _folders(path) if path.name in INPUT_KINDS and not _signs(path) else []
        nested = [slug for owner in owners for slug in _folders(owner)]
        for place in nested or [path]:
            found.setdefault(os.path.realpath(place), place)
    return sorted(found.values())


def find_runs(inputs) -> list[Path]:
    """Every run folder in these folders, at any depth; what stands inside a run is none of its own."""
    found, seen = [], set()
    waiting = [Path(path) for path in inputs]
    while waiting:
        folder = waiting.pop(0)
        if (real := os.path.realpath(folder)) in seen:        # a link to a folder above it
            continue
        seen.add(real)
        below = _folders(folder)
        if _signs(folder):
            found.append(folder)
            below = [path for path in below if path.name not in RUN_FOLDERS]
        waiting += below
    return found


def _folders(path: Path) -> list[Path]:
    try:
        return sorted(inner for inner in path.iterdir() if inner.name[0] != "." and inner.is_dir())
    except OSError:
        return []


# What a run may hold, and the files that show it.
PARTS = {
    "tokenizer": ("tokenizer/tokenmonster.vocab", "tokenizer/tokenizer.json"),
    "store": ("tokens/manifest.json", "tokens/*/manifest.json"),
    "checkpoints": ("checkpoints/step-*/manifest.json",),
    "final": ("final/config.json",),
    "summary": ("summary.json",),
    "metrics": ("metrics.jsonl",),
    "run": ("run.json",),
}
RUN_FOLDERS = {"tokenizer", "tokens", "checkpoints", "best", "final", "sft", "instruct", "benchmark",
               "charts", "notebooks", "xla-cache"}


def _signs(folder: Path, parts=tuple(PARTS)) -> list[Path]:
    """The files that show these parts of a run; [] for a folder that is none."""
    return [path for part in parts for sign in PARTS[part] for path in folder.glob(sign)
            if path.is_file()]


def newest_run(what, recipe: Recipe | None = None, inputs=None, name: str | None = None
               ) -> Path | None:
    """The newest run under the attached inputs that holds `what`, one of PARTS or several; or None.

    recipe: only runs of it (`another_recipe`). name: runs of that name come first. The newest is the
    last written; a mount that gives every file one time leaves it to the furthest.
    """
    what = [what] if isinstance(what, str) else list(what)
    runs = [run for run in find_runs(find_inputs() if inputs is None else inputs)
            if all(_signs(run, [part]) for part in what)
            and not (recipe and another_recipe(run, recipe))]

    def age(run: Path) -> int:
        return max(int(path.stat().st_mtime) for path in _signs(run, what))
    return max(runs, default=None, key=lambda run: (run.name == name, age(run), progress(run)))


# Is it the same run, and how far did it come?

def another_recipe(run: Path, recipe: Recipe) -> str | None:
    """Why `run` is not one of `recipe` ("seed is 1 in the checkpoint, 2 in this run"), or None.

    As far as its files say: its newest checkpoint, else run.json, else 01's report on its tokenizer.
    """
    mine = recipe_fingerprint(recipe)
    theirs = newest_state(run).get("fingerprint") or _described(run)
    if theirs:
        if recipe.tokenizer in ("build", "bpe") and isinstance(theirs.get("shape"), dict):
            mine["shape"]["vocab_size"] = theirs["shape"].get("vocab_size")   # 01 decides it
        known = {key: theirs[key] for key in mine if key in theirs}
        return "; ".join(fingerprint_differences(known, mine)) or None
    report = read_object(run / "tokenizer" / "report.json")
    made = report.get("vocabulary"), report.get("vocab_size")
    if report and made != (recipe.tokenizer, recipe.shape.vocab_size):
        return (f"its tokenizer is {made[0]} of {made[1]} rows, {recipe.name} has "
                f"{recipe.tokenizer} of {recipe.shape.vocab_size}")
    return None


def _described(run: Path) -> dict:
    """The fingerprint of the recipe in run.json, or {}."""
    try:
        return recipe_fingerprint(Recipe.from_dict(read_object(run / "run.json")["recipe"]))
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}


def is_finished(run) -> bool:
    """Whether the run has its final model and a summary that no stop cut short."""
    summary = read_object(Path(run) / "summary.json")
    return bool(summary) and not summary.get("stopped") and bool(_signs(Path(run), ["final"]))


def progress(run, leave=()) -> tuple:
    """(finished, newest checkpoint's step or -1, token shards, has a tokenizer, files).

    The larger is further; the last tells only attached copies of one run from each other. Folders in
    `leave` do not count.
    """
    run, files = Path(run), _files(Path(run), leave)
    steps = [-1] if "checkpoints" in leave else [int(path.name[5:]) for path in checkpoint_folders(run)]
    shards = sum(path.parts[0] == "tokens" and path.name[:6] == "train-" for path in files)
    return (is_finished(run), max(steps, default=-1), shards, bool(_signs(run, ["tokenizer"])),
            len(files))


# Taking over an attached run.

@dataclass(frozen=True)
class Adopted:
    """What `adopt` did: the attached run that was taken (None: none was), and what run_dir holds."""
    run: Path | None
    finished: bool
    step: int                          # of the newest checkpoint; -1: there is none


def adopt(run_dir, inputs=None, recipe: Recipe | None = None, say=print, leave=()) -> Adopted:
    """Copy the attached run that came furthest into run_dir, where that is not as far.

    Its newest checkpoint that verifies (and the older one that a rollback would need), tokenizer,
    store, metrics, models and whatever else stands in it; `leave` names folders, such as "tokens",
    that are not wanted. Killed at any instant, the same call goes on: files are copied aside, then
    moved in, what decides last. A run_dir that is as far keeps all its own.
    Raises as `attached_runs` does, and ParameterError where run_dir is in use or has no room. Where
    there is nothing to take, nothing is made.
    """
    run_dir = Path(os.path.abspath(run_dir))
    for run in attached_runs(run_dir, inputs, recipe, say):
        if progress(run, leave)[:4] <= progress(run_dir, leave)[:4]:
            remove(run_dir / ".adopting")
            say(f"{run_dir} is as far as the attached {run}: nothing is taken from there")
            break
        if _take(run, run_dir, leave, say):
            finished, step = progress(run_dir)[:2]
            state = ("finished" if finished else f"saved at step {step:,}" if step >= 0
                     else "not trained yet")
            say(f"taken from {run}: a run that is {state}")
            return Adopted(run, finished, step)
    return Adopted(None, *progress(run_dir)[:2])


def attached_runs(run_dir, inputs=None, recipe: Recipe | None = None, say=print) -> list[Path]:
    """The attached runs that may be this one, the furthest first; nothing is written.

    Without a recipe any may be, and those of run_dir's name come first. One of another recipe, or
    with another tokenizer than run_dir has, is named and left out; if it has run_dir's very name and
    checkpoints, and no other fits, it was meant: that raises CheckpointError.
    """
    run_dir, runs, refused = Path(os.path.abspath(run_dir)), [], {}
    for run in find_runs(find_inputs() if inputs is None else inputs):
        if os.path.realpath(run) == os.path.realpath(run_dir):
            continue
        wrong = recipe and another_recipe(run, recipe) or _other_tokenizer(run, run_dir)
        if wrong:
            refused[run] = wrong
        else:
            runs.append(run)
    for run, wrong in refused.items():
        if run.name == run_dir.name and newest_state(run) and not runs and not newest_state(run_dir):
            raise CheckpointError(
                f"{run}, an attached run, is not this one: {wrong}. Choose another RUN, detach that "
                "input, or set the parameters as they were.")
        say(f"attached, but not taken: {run} ({wrong})")

    def furthest(run: Path) -> tuple:
        return (recipe is not None or run.name == run_dir.name, progress(run))
    return sorted(runs, key=furthest, reverse=True)


def _other_tokenizer(run: Path, run_dir: Path) -> str | None:
    """One sentence where both have a tokenizer, and not the same: neither can use the other's work."""
    for name in ("tokenmonster.vocab", "tokenizer.json"):
        mine, theirs = run_dir / "tokenizer" / name, run / "tokenizer" / name
        if mine.is_file() and theirs.is_file() and mine.read_bytes() != theirs.read_bytes():
            return f"it has another tokenizer than {run_dir}"
    return None


def _take(run: Path, run_dir: Path, leave, say) -> bool:
    """Copy `run` aside and move it into place; False where none of its checkpoints can be used."""
    wanted = [path for path in _files(run, leave) if path.parts[0] != "checkpoints"]
    saved = [] if "checkpoints" in leave else checkpoint_folders(run)
    size = sum((run / path).stat().st_size for path in wanted)
    size += sum(path.stat().st_size for folder in saved[-2:] for path in folder.iterdir())
    run_dir.mkdir(parents=True, exist_ok=True)
    if size > (free := shutil.disk_usage(run_dir).free):
        raise ParameterError([f"{run}, attached, takes {size / 1e9:,.1f} GB, and {run_dir} has "
                              f"{free / 1e9:,.1f} GB free."])
    with RunLock(run_dir):
        aside = run_dir / ".adopting"
        source = {"run": str(run), "progress": list(progress(run))}
        if read_object(aside / ".from.json") != source:     # of another run, or half moved in
            remove(aside)
            aside.mkdir()
            write_atomically(aside / ".from.json", json.dumps(source))
        try:
            for path in wanted:
                _copy(run / path, aside / path)
            steps = _copy_checkpoints(saved, aside / "checkpoints", say)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise ParameterError([f"{run}, attached, does not fit into {run_dir} "
                                  f"({error.strerror}): free some space."]) from None
        usable = steps or not saved or is_finished(run)
        if usable:
            _move_in(aside, run_dir)
        remove(aside)
    return bool(usable)


def _files(run: Path, leave=()) -> list[Path]:
    """The files of a run, as paths from it: no hidden ones, and no links, which may lead anywhere."""
    found = []
    for place, folders, names in os.walk(run):
        folders[:] = sorted(name for name in folders if name[0] != "." and name[:4] != "bad-"
                            and not (name in leave and Path(place) == run))
        found += [Path(place, name).relative_to(run) for name in sorted(names)
                  if name[0] != "." and not Path(place, name).is_symlink()]
    return found


def _copy(source: Path, target: Path) -> None:
    """A file and its time, not its mode (an input's forbids to write); nothing if it is there."""
    found = source.stat()
    if target.is_file() and target.stat().st_size == found.st_size:   # renamed to this name: whole
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.part")
    shutil.copyfile(source, part)
    with open(part, "rb") as file:
        os.fsync(file.fileno())
    os.utime(part, ns=(found.st_atime_ns, found.st_mtime_ns))
    os.replace(part, target)


def _copy_checkpoints(saved: list[Path], to: Path, say) -> list[int]:
    """The newest checkpoint that verifies once copied, and the one to go back to; their steps."""
    steps, newest = [], math.inf
    for folder in reversed(saved):
        step = int(folder.name[5:])
        if step > newest:
            continue
        for path in folder.iterdir():
            if path.is_file() and not path.is_symlink():
                _copy(path, to / folder.name / path.name)
        if problem := verify_checkpoint(to / folder.name):
            say(f"attached checkpoint {folder} is left out: {problem}")
            remove(to / folder.name)
            continue
        steps.append(step)
        good = read_object(folder / "state.json").get("good_step", step)
        if len(steps) == 2 or not isinstance(good, int) or not 0 <= good < step:
            break
        newest = good
    return steps


def _move_in(aside: Path, run_dir: Path) -> None:
    """Every file of `aside` to its place: checkpoints after the rest, summary.json last.

    A folder that must be of one piece replaces that of run_dir; of others file replaces file.
    """
    (aside / ".from.json").unlink()                   # killed from here on: copied again, all of it
    last = ["checkpoints", "summary.json"]
    there = sorted((path.name for path in aside.iterdir() if path.name[0] != "."),
                   key=lambda name: (name in last, name))
    for name in there:
        entry, target = aside / name, run_dir / name
        if name in ("tokens", "tokenizer", "best", "final") and os.path.lexists(target):
            os.rename(target, aside / f".old-{name}")
        if not os.path.lexists(target):
            os.rename(entry, target)
        elif name == "checkpoints":                   # by folders: part of one is none
            for folder in sorted(entry.iterdir()):
                if os.path.lexists(target / folder.name):
                    os.rename(target / folder.name, aside / f".old-{folder.name}")
                os.rename(folder, target / folder.name)
        else:
            for path in _files(entry) if entry.is_dir() else [Path()]:
                (target / path).parent.mkdir(parents=True, exist_ok=True)
                os.replace(entry / path, target / path)
    fsync_folder(run_dir)


# Room, network, the end of a session.

def bytes_to_write(recipe: Recipe, store_tokens: int | None = None) -> dict[str, int]:
    """{"token store", "checkpoints", "models"}: bytes that a run has on disk at its largest.

    store_tokens: default the recipe's source budget; of a rolling store what it keeps. 2 bytes each.
    A checkpoint: weights and two moments in FP32, and the average where one is kept; one more than
    are kept, while the next is written, and the one to go back to. Models: best/, final/ and the one
    that is being written beside them, FP32.
    """
    parameters = count_parameters(recipe.shape)
    tokens = min(recipe.source_token_budget or recipe.total_tokens, recipe.total_tokens)
    checkpoint = 4 * parameters * (4 if recipe.ema_decay else 3)
    return {"token store": 2 * (tokens if store_tokens is None else store_tokens),
            "checkpoints": checkpoint * (recipe.save_total_limit + 2),
            "models": 3 * 4 * parameters}


def room_problem(recipe: Recipe, folder, store_tokens: int | None = None) -> str | None:
    """One sentence where what the recipe will write does not fit the disk, or Kaggle's 20 GB; or None.

    What `folder` holds already is counted as written. To ask before work starts; creates nothing.
    """
    folder = Path(os.path.abspath(folder))
    needs = bytes_to_write(recipe, store_tokens)
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    room = shutil.disk_usage(nearest).free
    where = f"{folder} has {room / 1e9:,.1f} GB free"
    if on_kaggle() and folder.is_relative_to(Path.cwd()):
        left = max(0, WORKING_BYTES - _bytes_in(Path.cwd()))
        if left < room:
            room, where = left, (f"{left / 1e9:,.1f} GB are left of the 20 GB that Kaggle keeps of a "
                                 "working folder")
    if sum(needs.values()) - _bytes_in(folder) <= room:
        return None
    parts = ", ".join(f"{what} {size / 1e9:,.2f} GB" for what, size in needs.items())
    return (f"{recipe.name} will write {sum(needs.values()) / 1e9:,.1f} GB ({parts}), and {where}: "
            "lower source_token_budget or save_total_limit (OVERRIDES), or delete something.")


def _bytes_in(folder: Path) -> int:
    return sum(os.lstat(os.path.join(place, name)).st_size
               for place, _, names in os.walk(folder) for name in names)


@functools.cache
def internet(seconds: float = 4.0) -> bool:
    """Whether the hub answers anything within `seconds`; asked once in a process. See OFFLINE."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        return False
    answered = []

    def ask():
        with contextlib.suppress(Exception):          # whatever the HTTP library makes of no network
            from huggingface_hub import constants
            from huggingface_hub.utils import get_session
            get_session().head(constants.ENDPOINT, timeout=seconds)
            answered.append(True)
    asking = threading.Thread(target=ask, daemon=True)        # a resolver may hang far longer
    asking.start()
    asking.join(seconds)
    return bool(answered)


def how_to_go_on(summary: dict) -> str:
    """The sentence for a run that had to stop: on Kaggle the two clicks that continue it."""
    stopped = (f"Stopped at step {summary['step']:,} of {summary['steps']:,} ({summary['stopped']}), "
               "saved. ")
    if not on_kaggle():
        return stopped + "Run this notebook again to go on."
    return stopped + ("To go on: 1. Save Version, so that the output of this session is kept; 2. Add "
                      "Input > Your Work > this notebook. Then Run All: the run is found there.")


def stop_here(sentence: str) -> None:
    """End a notebook whose run had to stop.

    A version that Kaggle saves in the background ("Batch") must not fail for it, or the whole run
    counts as failed: there the cells that follow are skipped. Elsewhere SystemExit says the sentence.
    """
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    if os.environ.get("KAGGLE_KERNEL_RUN_TYPE") != "Batch" or shell is None:
        raise SystemExit(sentence)
    print(sentence + " The cells below are skipped.", flush=True)
    shell.input_transformers_cleanup.append(lambda lines: [])
