"""Checkpoints: safetensors + JSON, never pickle; the newest that verifies is loaded.

Written to a temporary folder, fsynced, hashed, renamed. No RNG state is kept: each step seeds
itself from (seed, step), so there is none to lose.
"""
from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import time
from pathlib import Path

import torch

from stentor.files import CheckpointError, RunLock, fsync_folder, remove
from stentor.optimizers import BITSANDBYTES_MOMENTS
from stentor.recipes import RESUME, Recipe
from stentor.rules import free_fields


def checkpoint_folders(run_dir) -> list[Path]:
    """Complete checkpoints of a run, oldest first: folders, or links to folders."""
    return [path for path in _checkpoint_names(run_dir) if path.is_dir()]


def _step_of(folder: Path) -> int:
    return int(folder.name[5:])


def _checkpoint_names(run_dir) -> list[Path]:
    """All that is called step-NNNNNNNN, whatever it is."""
    return sorted((Path(run_dir) / "checkpoints").glob("step-" + "[0-9]" * 8))


def save_checkpoint(run_dir, step: int, tensors: dict[str, dict[str, torch.Tensor]], state: dict,
                    keep: int = 2) -> Path:
    """Save {"model": {...}, "optimizer": {...}} and the JSON-able `state` as
    checkpoints/step-NNNNNNNN; keep the newest, and the last good one."""
    folder = Path(run_dir) / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(".*step-*"):              # what a killed run left half-written
        remove(left)
    final = folder / f"step-{step:08d}"
    temporary = folder / f".step-{step:08d}"
    files = _contents(tensors, state)
    try:
        temporary.mkdir()
        for name, data in files.items():
            with open(temporary / name, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
    except BaseException:                             # a full disk: give back what this took of it
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync_folder(temporary)
    # between the two renames only the temporary one is there: see load_checkpoint
    if os.path.lexists(final):
        os.rename(final, folder / f".old-{final.name}")
    os.rename(temporary, final)
    fsync_folder(folder)
    _remove_old(run_dir, keep, state.get("good_step", -1))
    return final


def _contents(tensors: dict[str, dict[str, torch.Tensor]], state: dict) -> dict[str, bytes]:
    """The files of a checkpoint; manifest.json, the last one, holds the hashes of the others."""
    from safetensors.torch import save
    files = {}
    for name, group in tensors.items():
        group = {key: value.contiguous() for key, value in group.items()}
        files[f"{name}.safetensors"] = save(group)
    files["state.json"] = json.dumps(state, indent=1).encode()
    manifest = {name: {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
                for name, data in files.items()}
    return {**files, "manifest.json": json.dumps(manifest, indent=1).encode()}


def _remove_old(run_dir, keep: int, good_step: int) -> None:
    """All but the newest `keep`, and the newest of up to `good_step`."""
    folders = checkpoint_folders(run_dir)
    good = [path for path in folders if _step_of(path) <= good_step][-1:]
    for old in folders[:-keep]:
        if old not in good:           # renamed first: a half-deleted one must not look complete
            os.rename(old, old.with_name(f".old-{old.name}"))
    for gone in (Path(run_dir) / "checkpoints").glob(".old-step-*"):
        remove(gone)                  # of a link the link, not what it points to


def read_checkpoint(folder: Path) -> tuple[dict[str, dict[str, torch.Tensor]], dict]:
    """(tensors, state) of one checkpoint, every file verified before it is parsed; CheckpointError
    says what is wrong.

    A file is opened only if it is a regular file of this folder with one of the names that
    save_checkpoint gives.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load
    try:
        manifest, data = json.loads((folder / "manifest.json").read_text()), {}
        for name in {"model.safetensors", "optimizer.safetensors", "state.json", *manifest}:
            if name not in manifest:
                raise CheckpointError(f"manifest.json does not list {name}")
            ours = re.fullmatch(r"[a-z]+\.safetensors|state\.json", name)
            if not ours or (folder / name).is_symlink():
                raise CheckpointError(f"{name!r} is not a file of a checkpoint")
            data[name] = (folder / name).read_bytes()
            if hashlib.sha256(data[name]).hexdigest() != manifest[name]["sha256"]:
                raise CheckpointError(f"{name} does not match its hash")
        state = json.loads(data.pop("state.json"))
        if not isinstance(state, dict):
            raise CheckpointError("state.json is not an object")
        if "fingerprint" in state and (problem := state_problem(state, int(folder.name[-8:]))):
            raise CheckpointError(f"state.json: {problem}")
        _complete_fingerprint(state)
        tensors = {name.removesuffix(".safetensors"): load(value) for name, value in data.items()}
        return tensors, state
    except (OSError, ValueError, TypeError, KeyError, RecursionError, SafetensorError) as error:
        raise CheckpointError(f"{type(error).__name__}: {str(error)[:200]}") from error


def state_problem(state: dict, step: int) -> str | None:
    """What is wrong with the state of a training run in the folder of that step, or None."""
    for name, rule in STATE_RULES.items():
        if not rule(state.get(name, "not there")):
            return f"{name} is {json.dumps(state.get(name, 'not there'))[:60]}"
    if state["step"] != step:
        return f"its step is {state['step']:,}, the folder's name says {step:,}"
    if max(state["updates"], state["skipped_steps"]) > step:
        return (f"{state['updates']:,} updates and {state['skipped_steps']:,} skipped ones in "
                f"{step:,} steps")
    rows, batch = (state["fingerprint"].get(key)
                   for key in ("sequences_to_train", "total_batch_size"))
    if _count(rows) and _count(batch) and step > -(-rows // batch):
        return f"step {step:,} of a run of {-(-rows // batch):,}"


def _whole(low: int):
    return lambda value: type(value) is int and value >= low


def _real(value) -> bool:
    return type(value) in (int, float)


_count = _whole(1)
STATE_RULES = {
    **dict.fromkeys(("step", "updates", "skipped_steps", "metrics_lines", "nonfinite"), _whole(0)),
    **dict.fromkeys(("evaluated_step", "good_step"), _whole(-1)),
    "best_step": lambda value: value is None or _whole(0)(value),
    "best_eval_loss": lambda value: value is None or _real(value),
    "loss_level": lambda value: value is None or _real(value),
    "seconds": lambda value: _real(value) and value >= 0,
    "window": lambda value: isinstance(value, list) and len(value) == 3 and all(map(_real, value)),
    "scaler": lambda value: isinstance(value, dict),
    "rollbacks": lambda value: isinstance(value, list),
    "fingerprint": lambda value: isinstance(value, dict)}


def new_state(fingerprint: dict) -> dict:
    """The state of a run that has made no step; what `state_problem` asks for."""
    return {
        "step": 0, "updates": 0, "skipped_steps": 0, "best_eval_loss": None, "best_step": None,
        "seconds": 0.0, "evaluated_step": -1, "metrics_lines": 0, "scaler": {},
        "window": [0.0, 0, 0], "fingerprint": fingerprint,
        # for going back: the last good evaluation, skipped steps in a row, the loss's running mean
        "good_step": -1, "nonfinite": 0, "loss_level": None, "rollbacks": []}


def verify_checkpoint(folder: Path) -> str | None:
    """What is wrong with a checkpoint ("model.safetensors does not match its hash"), or None."""
    try:
        read_checkpoint(folder)
    except CheckpointError as error:
        return str(error)


def load_checkpoint(run_dir, say=print, newest: float = math.inf
                    ) -> tuple[dict[str, dict[str, torch.Tensor]], dict] | None:
    """(tensors, state) of the newest checkpoint, up to step `newest`, that verifies; None when
    there is none.

    A bad one, and whatever else has such a name, is set aside (renamed to bad-step-N) and said so.
    Raises CheckpointError when there are only bad ones: starting again from step 0 must be
    somebody's decision.
    """
    place = Path(run_dir) / "checkpoints"
    if os.path.lexists(place) and not place.is_dir():
        raise CheckpointError(f"{place} is not a folder: move it away; checkpoints are written "
                              "there.")
    for left in place.glob(".step-*"):
        complete = left.with_name(left.name[1:])      # killed right before its last rename
        if not os.path.lexists(complete) and not verify_checkpoint(left):
            os.rename(left, complete)
    for path in _checkpoint_names(run_dir):
        if not path.is_dir():
            _set_aside(path, "it is not a folder", say)
    folders = [folder for folder in checkpoint_folders(run_dir) if _step_of(folder) <= newest]
    for folder in reversed(folders):
        try:
            return read_checkpoint(folder)
        except CheckpointError as problem:
            _set_aside(folder, problem, say)
    if folders or list(place.glob("bad-*")):
        raise CheckpointError(
            f"no checkpoint under {run_dir}/checkpoints can be read (all set aside as bad-...); "
            "delete that folder to start from step 0.")
    return None


def _set_aside(path: Path, problem, say) -> None:
    os.rename(path, path.with_name(f"bad-{path.name}-{time.time_ns()}"))
    say(f"checkpoint {path.name} set aside: {problem}")


def newest_state(run_dir) -> dict:
    """The state of the newest checkpoint that has a readable one (its hash is not checked), or
    {}."""
    for folder in reversed(checkpoint_folders(run_dir)):
        with contextlib.suppress(OSError, ValueError):
            state = json.loads((folder / "state.json").read_text())
            if isinstance(state, dict) and isinstance(state.get("fingerprint"), dict):
                return _complete_fingerprint(state)
    return {}


def _complete_fingerprint(state: dict) -> dict:
    """The state, its fingerprint with the fields that a recipe did not have yet, at their
    defaults."""
    if theirs := state.get("fingerprint"):
        whole, free = Recipe.completed(theirs), free_fields(Recipe, RESUME)
        state["fingerprint"] = {key: value for key, value in whole.items()
                                if key in theirs or key not in free}
    return state


def weights_sha256(model) -> str:
    """A hash of every parameter's name and bytes: what a run with a model given to it started
    from."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        data = parameter.detach().cpu().contiguous().numpy().tobytes()
        digest.update(name.encode() + data)
    return digest.hexdigest()


def checkpoint_tensors(model, optimizer, names: dict) -> dict[str, dict[str, torch.Tensor]]:
    """{"model": state_dict without the tied lm_head and what is frozen, "optimizer":
    "<parameter>.<moment>"}, on the CPU. names: {parameter: its name}."""
    left_out = _left_out(model)
    weights = {key: value.cpu() for key, value in model.state_dict().items()
               if key not in left_out}
    moments = {f"{names[parameter]}.{key}": torch.as_tensor(value).cpu()
               for parameter, values in optimizer.state.items() for key, value in values.items()}
    return {"model": weights, "optimizer": moments}


def restore(model, optimizer, names: dict, tensors: dict[str, dict[str, torch.Tensor]]) -> None:
    """Put a checkpoint's tensors back; every key must be there."""
    try:
        missing, unexpected = model.load_state_dict(tensors["model"], strict=False)
    except RuntimeError as error:
        raise _no_fit(" ".join(str(error).split())[:200]) from error
    left_out = _left_out(model)
    missing = [key for key in missing if key not in left_out]
    if missing or unexpected:
        raise _no_fit(f"missing {missing[:3]}, unexpected {unexpected[:3]}.")
    by_name = {name: parameter for parameter, name in names.items()}
    for key, value in tensors["optimizer"].items():
        name, _, moment = key.rpartition(".")
        if name not in by_name:
            raise _no_fit(f"{key!r} belongs to none of its parameters.")
        _restore_moment(optimizer, by_name[name], moment, value)


def _left_out(model) -> set[str]:
    """Keys of the state_dict that no checkpoint holds: what is frozen, and a tied lm_head."""
    frozen = {name for name, parameter in model.named_parameters(remove_duplicate=False)
              if not parameter.requires_grad}
    return frozen | ({"lm_head.weight"} if model.config.tie_word_embeddings else set())


def _no_fit(why: str) -> CheckpointError:
    return CheckpointError(f"the checkpoint does not fit the model: {why}")


def _restore_moment(optimizer, parameter, moment: str, value: torch.Tensor) -> None:
    adamw, state = isinstance(optimizer, torch.optim.AdamW), optimizer.state[parameter]
    for theirs, ours in BITSANDBYTES_MOMENTS.items():      # a session may have what another lacked
        if moment in (theirs, ours):
            moment = theirs if adamw else ours
    if moment == "step" and not adamw:                # bitsandbytes counts in a Python int
        state[moment] = int(value)
    elif moment == "step" and not optimizer.defaults.get("capturable"):
        state[moment] = value.clone()
    else:
        state[moment] = value.clone().to(parameter.device)


def recipe_fingerprint(recipe: Recipe) -> dict:
    """What must be equal for a checkpoint to be continued; cadences and micro-batch sizes may change, these may not."""
    free = free_fields(Recipe, RESUME)
    values = {key: value for key, value in recipe.to_dict().items() if key not in free}
    values |= {"total_batch_size": recipe.total_batch_size, "sequences_to_train": recipe.sequences_to_train,
               "source_weights": {source.name: source.weight for source in recipe.sources}}
    return json.loads(json.dumps(values))


def run_fingerprint(recipe: Recipe, store) -> dict:
    """The recipe's, and the token store's hashes."""
    return recipe_fingerprint(recipe) | {"store": {
        name: [shard["sha256"] for shard in entry["shards"]]
        for name, entry in store.manifest["sources"].items() if name in store.names}}


def fingerprint_differences(theirs: dict, mine: dict) -> list[str]:
    """"seed is 1 in the checkpoint, 2 in this run" for each key of either that differs."""
    return [f"{key} is {json.dumps(theirs.get(key))[:80]} in the checkpoint, "
            f"{json.dumps(mine.get(key))[:80]} in this run"
            for key in {**theirs, **mine} if theirs.get(key) != mine.get(key)]


def recipe_differences(recipe: Recipe, run_dir) -> list[str]:
    """`fingerprint_differences` of the recipe and the newest checkpoint of run_dir; [] where there
    is none."""
    mine, theirs = recipe_fingerprint(recipe), newest_state(run_dir).get("fingerprint")
    if not theirs:
        return []
    return fingerprint_differences({key: theirs[key] for key in mine if key in theirs}, mine)


def check_run(recipe: Recipe, run_dir) -> None:
    """Raise for a run folder in use (ParameterError) or with checkpoints of another recipe
    (CheckpointError).

    To ask before work that a refused run would have done in vain; it writes nothing. `train` asks
    again, under its lock, and also about the store and the start weights.
    """
    with contextlib.suppress(FileNotFoundError), open(Path(run_dir) / ".lock") as file:
        RunLock.take(file, run_dir)
    if different := recipe_differences(recipe, run_dir):
        raise another_run(run_dir, different)


def another_run(run_dir, different: list[str]) -> CheckpointError:
    return CheckpointError(f"{run_dir} holds checkpoints of another run: " + "; ".join(different)
                           + ". Choose another RUN, or delete its checkpoints folder.")
