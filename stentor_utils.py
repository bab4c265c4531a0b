"""What two or more Stentor notebooks share: recipes, the one training loop, checkpoints, launch.

Top to bottom:  model -> checkpoints -> engine -> train -> launch. Imported here, so that a notebook imports one name:
stentor_recipes (parameters, shapes, recipes), stentor_precision, stentor_data (text, sources, the token store).
Also a command:  python -m stentor_utils train outputs/demo/run.json      (what `launch` starts)
"""
from __future__ import annotations

import contextlib
import copy
import errno
import faulthandler
import fcntl
import functools
import glob
import hashlib
import json
import math
import os
import platform
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import types
import warnings
from pathlib import Path

import numpy as np

os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")       # transformers' too: they fill a papermill log
warnings.filterwarnings("ignore", message="IProgress not found")

import torch                                          # noqa: E402
import torch.nn.functional as F                       # noqa: E402
from torch import nn                                  # noqa: E402

from stentor_data import (                            # noqa: E402, F401  re-exported: notebooks import one name
    FeedStopped, GrowingStore, HubFile, ParameterError, Source, SourceError, StentorError, TokenStore, clean_documents,
    clean_text, documents, encode_documents, fill_source, find_vocabulary, hub_folder, load_tokenizer, local_corpus,
    pin_revision, plan_sources, planned_shards, prepare_tokens, redact, source_files, source_names, store_problems,
    tokenizer_problem, tokenizer_sha256, vocabulary_rows, write_atomically)
from stentor_precision import (                       # noqa: E402, F401
    FP32Layer, FP32Norm, FP32SoftmaxAttention, Int8Linear, _in_front_of, _int8_codes, apply_precision_recipe,
    rename_weight_master)
from stentor_recipes import (                         # noqa: E402, F401
    ALL_RECIPES, RECIPES, REPAIRED, SESSION_HOURS, Recipe, Shape, check_notebook_parameters, count_parameters, cpu_has_bf16,
    find_recipe, fit_to_tokenizer, generation_settings, hours_left, items, kv_cache_bytes, number, open_tokenizer,
    parameter_budget, run_name, secret_problems, session_end, session_start, shown, string, tokenizer_misfit, writable_folder)


# ---------------------------------------------------------------------------------------------------------------------
# The model: a stock LlamaForCausalLM with one of the cards' two initialisations.


def build_model(shape: Shape, seed: int = 42, *, initialization: str = "normal", attn_implementation: str = "sdpa",
                eos_token_id: int | None = None, bos_token_id: int | None = None):
    """A freshly initialised transformers.LlamaForCausalLM of this shape, fp32, on the CPU. Same seed, same weights."""
    from transformers import LlamaConfig, LlamaForCausalLM
    config = LlamaConfig(
        vocab_size=shape.vocab_size, hidden_size=shape.hidden_size, intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_hidden_layers, num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_key_value_heads, head_dim=shape.head_dim,
        max_position_embeddings=shape.max_position_embeddings, rms_norm_eps=shape.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        tie_word_embeddings=shape.tie_word_embeddings, attention_bias=False, mlp_bias=False, hidden_act="silu",
        eos_token_id=eos_token_id, bos_token_id=bos_token_id, pad_token_id=eos_token_id,
        attn_implementation=attn_implementation)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    model.generation_config.update(**GENERATION)      # what its saved folder will tell its users
    initialize_weights(model, residual_scaled=initialization == "residual_scaled")
    total = sum(parameter.numel() for parameter in model.parameters())
    assert total == count_parameters(shape), (total, count_parameters(shape))
    return model


def initialize_weights(model, std: float = 0.02, residual_scaled: bool = False) -> None:
    """The cards' initialisation: Linear and Embedding normal(0, 0.02), RMSNorm 1.

    residual_scaled (Stentor3 card, after GPT-2): o_proj and down_proj with std / sqrt(2 x layers), 0.00408 at 12 layers.
    """
    residual_std = std / math.sqrt(2 * model.config.num_hidden_layers)
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            if name == "lm_head" and model.config.tie_word_embeddings:
                continue                              # the embedding's own tensor
            scaled = residual_scaled and name.endswith(("o_proj", "down_proj"))
            nn.init.normal_(module.weight, 0.0, residual_std if scaled else std)
        elif "rmsnorm" in type(module).__name__.lower():
            nn.init.ones_(module.weight)


# ---------------------------------------------------------------------------------------------------------------------
# Sampling, and saving as a plain Hugging Face folder.

GENERATION = {"do_sample": True, "temperature": 0.8, "top_p": 0.7, "repetition_penalty": 1.2}   # Stentor2-12M card


def prompt_problems(prompts) -> list[str]:
    """One sentence for each prompt that is not a text; an empty one is a text, it continues from EOS."""
    if not isinstance(prompts, (list, tuple)):
        return [f"prompts = {prompts!r} must be a list of texts."]
    return [f"prompts[{i}] = {prompt!r} must be a text (\"\" continues from EOS)."
            for i, prompt in enumerate(prompts) if not isinstance(prompt, str)]


def generate(model, tokenizer, prompts: list[str], *, max_new_tokens: int = 60, seed: int = 42, **settings) -> list[str]:
    """One continuation of each prompt (without the prompt), sampled with the Stentor2-12M card's favourite settings.

    An empty prompt continues from EOS, which in training stands before each document. Raises ParameterError for a prompt
    that is no text, or a tokenizer of more tokens than the model has rows, before any is continued.
    """
    if problems := prompt_problems(prompts) + tokenizer_fit(tokenizer, model.config.vocab_size):
        raise ParameterError(problems)
    texts = []
    was_training = model.training
    model.eval()
    for i, prompt in enumerate(prompts):
        torch.manual_seed(seed + i)
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"] or [tokenizer.eos_token_id]
        ids = torch.tensor([ids], device=model.device)
        with torch.inference_mode():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_length=ids.shape[1] + max_new_tokens,
                                 use_cache=True, pad_token_id=tokenizer.eos_token_id, **{**GENERATION, **settings})
        texts.append(tokenizer.decode(out[0, ids.shape[1]:].tolist(), skip_special_tokens=True))
    model.train(was_training)
    return texts


def tokenizer_fit(tokenizer, rows: int) -> list[str]:
    """One sentence where the tokenizer has ids beyond the model's rows of embedding, else none."""
    needed = vocabulary_rows(tokenizer)
    return [f"the tokenizer needs {needed:,} rows, the model has only vocab_size = {rows:,}: take the tokenizer that it was "
            "trained with."] if needed > rows else []


def published_configs(model, tokenizer, generation: dict | None = None):
    """(config, generation_config) as the users of a saved folder want them, whatever training, or an old folder, had set.

    With the cache (without it, 200 tokens took 26.5 s instead of 1.3 s, and assisted generation raises), up to the whole
    context, with the tokenizer's ids of EOS, BOS and padding. generation: sampling settings; None: those the model has.
    """
    config, generating = copy.deepcopy(model.config), copy.deepcopy(model.generation_config)
    config.use_cache = generating.use_cache = True
    generating._from_model_config = False             # or some versions make it anew from config.json, without the sampling
    generating.max_length = config.max_position_embeddings
    generating.update(**generation or {})
    if tokenizer is not None:
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        ids = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id, "pad_token_id": pad}
        if isinstance(generating.eos_token_id, list) and ids["eos_token_id"] in generating.eos_token_id:
            ids["eos_token_id"] = generating.eos_token_id         # more ways to end, as chat models have
        for name, value in ids.items():
            setattr(config, name, value)
            setattr(generating, name, value)
    return config, generating


def save_model_folder(model, tokenizer, folder, generation: dict | None = None) -> None:
    """A plain Hugging Face folder, complete or not there at all: written beside, fsynced, then renamed into place.

    Where `folder` is a link, what it points to is replaced, and the link stays. peft adapters are merged into a copy of the
    base weights first, so the folder loads where there is no peft. generation: as for `published_configs`.
    Raises ParameterError for a tokenizer of more tokens than the model has rows.
    """
    from safetensors import SafetensorError
    if tokenizer is not None and (problems := tokenizer_fit(tokenizer, model.config.vocab_size)):
        raise ParameterError(problems)
    folder = Path(os.path.realpath(folder))
    folder.parent.mkdir(parents=True, exist_ok=True)
    if hasattr(model, "merge_and_unload"):
        model = copy.deepcopy(model).merge_and_unload()
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    for left in folder.parent.glob(f".{glob.escape(folder.name)}.[0-9]*"):    # what a killed run left half-written
        _remove(left)
    own = model.config, model.generation_config
    model.config, model.generation_config = published_configs(model, tokenizer, generation)
    try:
        model.save_pretrained(temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        _replace_folder(temporary, folder)
    except SafetensorError as error:                  # its own name for a write that failed
        raise OSError(errno.ENOSPC if "os error 28" in str(error) else errno.EIO, str(error)) from error
    finally:
        model.config, model.generation_config = own
        _remove(temporary)


def save_tokenizer(tokenizer, folder) -> None:
    """A tokenizer folder, complete or not there at all."""
    folder = Path(folder)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        tokenizer.save_pretrained(temporary)
        _replace_folder(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load_model(folder, **settings):
    """AutoModelForCausalLM from a folder (or hub name) that nobody vouches for: safetensors only, and none of its code.

    settings: as for from_pretrained. Every weight is the file's: old weight_master names are converted. Raises
    ParameterError, in one sentence, for pickled weights, code (auto_map), a kind of model that transformers does not have,
    a LoRA adapter, an index that points out of the folder, damaged files, and weights that are missing, left over or of
    another shape.
    """
    try:
        path = _model_files(folder, settings.pop("revision", None))
        problem = _folder_problem(path)
        if not problem:
            model, problem = _load_weights(path, settings)
        if not problem:
            return model
    except ParameterError:
        raise
    except Exception as error:                        # whatever a crafted file makes of the parsers
        problem = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    raise ParameterError([f"{folder} cannot be loaded as a model: {problem}."])


def _model_files(folder, revision: str | None = None) -> Path:
    """The folder itself, or the hub's files of that name in the local cache."""
    if Path(folder).is_dir():
        return Path(folder)
    if not re.fullmatch(r"(hf:)?[\w.-]+(/[\w.-]+)?", str(folder)):
        raise FileNotFoundError("there is no such folder")
    try:
        return hub_folder(str(folder), ["*.safetensors", "*.json"], f"model {str(folder)!r} (no folder here)", revision)
    except SourceError as error:
        raise ParameterError([str(error)]) from None


def _weight_files(path: Path) -> list[str]:
    index = path / "model.safetensors.index.json"
    return sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.exists() else ["model.safetensors"]


def _folder_problem(path: Path) -> str | None:
    """Why a model folder is not to be opened, or None."""
    config, files = json.loads((path / "config.json").read_text()), _weight_files(path)
    if "auto_map" in config:
        return "its config.json asks for code from elsewhere (auto_map)"
    if (path / "adapter_config.json").exists():
        return "it holds a LoRA adapter, which names another model to load: merge the two first"
    if strange := [name for name in files if Path(name).name != name or not name.endswith(".safetensors")]:
        return f"its index names {strange[0]!r}, which is not a .safetensors file of this folder"
    if missing := [name for name in files if not (path / name).is_file()]:
        return f"{missing[0]} is not there (pickled weights, such as pytorch_model.bin, are never opened)"


def _load_weights(path: Path, settings: dict):
    """(model, None), or (None, what is wrong with its weights)."""
    from safetensors import safe_open
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, LlamaForCausalLM
    settings = {"use_safetensors": True, **settings, "trust_remote_code": False, "output_loading_info": True,
                "ignore_mismatched_sizes": True}      # they are refused below, by name
    old = False
    for name in _weight_files(path):
        with safe_open(path / name, "pt") as file:
            old = old or any(key.endswith(".weight_master") for key in file.keys())
    with _transformers_silent():                      # its report of the same is a page long
        if old:                                       # the first Preview's names, and a Llama then
            tensors = {key: value for name in _weight_files(path) for key, value in load_file(path / name).items()}
            model, info = LlamaForCausalLM.from_pretrained(
                None, state_dict=rename_weight_master(tensors), **settings,
                config=AutoConfig.from_pretrained(path, trust_remote_code=False))
            if (path / "generation_config.json").exists():
                model.generation_config = GenerationConfig.from_pretrained(path)
        else:
            model, info = AutoModelForCausalLM.from_pretrained(path, **settings)
    problem = weights_problem(model, info)
    if not problem:
        model.tie_weights()                           # 5.0 leaves apart what the file holds twice
        # folders saved before published_configs said no
        model.config.use_cache = model.generation_config.use_cache = True
    return (None, problem) if problem else (model, None)


def weights_problem(model, info: dict) -> str | None:
    """What from_pretrained's loading info (output_loading_info) says is not as it was trained, or None."""
    shapes = [f"{key} is {list(found)} in the file and {list(wanted)} by config.json"
              for key, found, wanted in info["mismatched_keys"]]
    for said, keys in (("of another shape", shapes), ("missing", info["missing_keys"]),
                       ("left over", info["unexpected_keys"]), ("wrong", info["error_msgs"])):
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            return f"weights are {said} ({sorted(map(str, keys))[0]}{more})"
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    tied = model.config.get_text_config().tie_word_embeddings and None not in ends
    if tied and not torch.equal(ends[0].weight, ends[1].weight):
        return "config.json ties lm_head to the embedding, and the file holds two different ones"


@contextlib.contextmanager
def _transformers_silent():
    from transformers.utils import logging
    level = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _remove(path: Path) -> None:
    """A folder and all in it, a file, or a link (never what it points to); nothing where there is nothing."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _replace_folder(temporary: Path, folder: Path) -> None:
    """Rename `temporary` to `folder`, fsynced and readable as the umask says (what mkstemp made is 0600)."""
    mode = temporary.stat().st_mode & 0o777           # of a folder that was just made: what the umask says
    for path in temporary.rglob("*"):
        path.chmod(mode if path.is_dir() else mode & 0o666)
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    old = folder.with_name(f".{folder.name}.old")
    _remove(old)
    if folder.exists():
        os.rename(folder, old)
    os.rename(temporary, folder)
    _fsync_folder(folder.parent)
    _remove(old)


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints: safetensors + JSON, never pickle. Written to a temporary folder, fsynced, hashed, renamed; the newest that
# verifies is loaded. No RNG state is kept: each step seeds itself from (seed, step), so there is none to lose.


class CheckpointError(StentorError, RuntimeError):
    """A checkpoint does not belong to this run, or none of those present can be read."""


def checkpoint_folders(run_dir) -> list[Path]:
    """Complete checkpoints of a run, oldest first: folders, or links to folders."""
    return [path for path in _checkpoint_names(run_dir) if path.is_dir()]


def _checkpoint_names(run_dir) -> list[Path]:
    """All that is called step-NNNNNNNN, whatever it is."""
    return sorted((Path(run_dir) / "checkpoints").glob("step-" + "[0-9]" * 8))


def save_checkpoint(run_dir, step: int, tensors: dict[str, dict[str, torch.Tensor]], state: dict, keep: int = 2) -> Path:
    """Save {"model": {...}, "optimizer": {...}} and the JSON-able `state` as checkpoints/step-NNNNNNNN; keep the newest."""
    from safetensors.torch import save
    folder = Path(run_dir) / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(".*step-*"):              # what a killed run left half-written
        _remove(left)
    final = folder / f"step-{step:08d}"
    temporary = folder / f".step-{step:08d}"
    files = {f"{name}.safetensors": save({key: value.contiguous() for key, value in group.items()})
             for name, group in tensors.items()}
    files["state.json"] = json.dumps(state, indent=1).encode()
    manifest = {name: {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)} for name, data in files.items()}
    try:
        temporary.mkdir()
        for name, data in {**files, "manifest.json": json.dumps(manifest, indent=1).encode()}.items():
            with open(temporary / name, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
    except BaseException:                             # a full disk: give back what this took of it
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _fsync_folder(temporary)
    if os.path.lexists(final):                        # between the two renames only the temporary one is there: see
        os.rename(final, folder / f".old-{final.name}")       # load_checkpoint
    os.rename(temporary, final)
    _fsync_folder(folder)
    good = [path for path in checkpoint_folders(run_dir) if int(path.name[5:]) <= state.get("good_step", -1)][-1:]
    for old in checkpoint_folders(run_dir)[:-keep]:
        if old not in good:                           # renamed first: a half-deleted one must not look complete
            os.rename(old, old.with_name(f".old-{old.name}"))
    for gone in folder.glob(".old-step-*"):           # of a link the link, not what it points to
        _remove(gone)
    return final


def read_checkpoint(folder: Path) -> tuple[dict[str, dict[str, torch.Tensor]], dict]:
    """(tensors, state) of one checkpoint, every file verified before it is parsed; CheckpointError says what is wrong.

    A file is opened only if it is a regular file of this folder with one of the names that save_checkpoint gives.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load
    try:
        manifest, data = json.loads((folder / "manifest.json").read_text()), {}
        for name in {"model.safetensors", "optimizer.safetensors", "state.json", *manifest}:
            if name not in manifest:
                raise CheckpointError(f"manifest.json does not list {name}")
            if not re.fullmatch(r"[a-z]+\.safetensors|state\.json", name) or (folder / name).is_symlink():
                raise CheckpointError(f"{name!r} is not a file of a checkpoint")
            data[name] = (folder / name).read_bytes()
            if hashlib.sha256(data[name]).hexdigest() != manifest[name]["sha256"]:
                raise CheckpointError(f"{name} does not match its hash")
        state = json.loads(data.pop("state.json"))
        if not isinstance(state, dict):
            raise CheckpointError("state.json is not an object")
        if "fingerprint" in state and (problem := state_problem(state, int(folder.name[-8:]))):
            raise CheckpointError(f"state.json: {problem}")
        return {name.removesuffix(".safetensors"): load(value) for name, value in data.items()}, state
    except (OSError, ValueError, TypeError, KeyError, RecursionError, SafetensorError) as error:
        raise CheckpointError(f"{type(error).__name__}: {str(error)[:200]}") from error


def state_problem(state: dict, step: int) -> str | None:
    """What is wrong with the state of a training run in the folder of that step, or None."""
    def whole(low):
        return lambda value: type(value) is int and value >= low

    def real(value):
        return type(value) in (int, float)
    rules = {"step": whole(0), "updates": whole(0), "skipped_steps": whole(0), "metrics_lines": whole(0),
             "nonfinite": whole(0), "evaluated_step": whole(-1), "good_step": whole(-1),
             "best_step": lambda value: value is None or whole(0)(value),
             "best_eval_loss": lambda value: value is None or real(value),
             "loss_level": lambda value: value is None or real(value), "seconds": lambda value: real(value) and value >= 0,
             "window": lambda value: isinstance(value, list) and len(value) == 3 and all(map(real, value)),
             "scaler": lambda value: isinstance(value, dict), "rollbacks": lambda value: isinstance(value, list),
             "fingerprint": lambda value: isinstance(value, dict)}
    for name, rule in rules.items():
        if not rule(state.get(name, "not there")):
            return f"{name} is {json.dumps(state.get(name, 'not there'))[:60]}"
    if state["step"] != step:
        return f"its step is {state['step']:,}, the folder's name says {step:,}"
    if max(state["updates"], state["skipped_steps"]) > step:
        return f"{state['updates']:,} updates and {state['skipped_steps']:,} skipped ones in {step:,} steps"
    rows, batch = (state["fingerprint"].get(key) for key in ("sequences_to_train", "total_batch_size"))
    if whole(1)(rows) and whole(1)(batch) and step > -(-rows // batch):
        return f"step {step:,} of a run of {-(-rows // batch):,}"


def newest_state(run_dir) -> dict:
    """The state of the newest checkpoint that has a readable one (its hash is not checked), or {}."""
    for folder in reversed(checkpoint_folders(run_dir)):
        with contextlib.suppress(OSError, ValueError):
            state = json.loads((folder / "state.json").read_text())
            if isinstance(state, dict) and isinstance(state.get("fingerprint"), dict):
                return state
    return {}


def verify_checkpoint(folder: Path) -> str | None:
    """What is wrong with a checkpoint ("model.safetensors does not match its hash"), or None."""
    try:
        read_checkpoint(folder)
    except CheckpointError as error:
        return str(error)


def load_checkpoint(run_dir, say=print, newest: float = math.inf) -> tuple[dict[str, dict[str, torch.Tensor]], dict] | None:
    """(tensors, state) of the newest checkpoint, up to step `newest`, that verifies; None when there is none.

    A bad one, and whatever else has such a name, is set aside (renamed to bad-step-N) and said so. Raises CheckpointError
    when there are only bad ones: starting again from step 0 must be somebody's decision.
    """
    place = Path(run_dir) / "checkpoints"
    if os.path.lexists(place) and not place.is_dir():
        raise CheckpointError(f"{place} is not a folder: move it away; checkpoints are written there.")
    for left in place.glob(".step-*"):
        complete = left.with_name(left.name[1:])      # killed right before its last rename
        if not os.path.lexists(complete) and not verify_checkpoint(left):
            os.rename(left, complete)

    def set_aside(path, problem):
        os.rename(path, path.with_name(f"bad-{path.name}-{time.time_ns()}"))
        say(f"checkpoint {path.name} set aside: {problem}")
    for path in _checkpoint_names(run_dir):
        if not path.is_dir():
            set_aside(path, "it is not a folder")
    folders = [folder for folder in checkpoint_folders(run_dir) if int(folder.name[5:]) <= newest]
    for folder in reversed(folders):
        try:
            return read_checkpoint(folder)
        except CheckpointError as problem:
            set_aside(folder, problem)
    if folders or list(place.glob("bad-*")):
        raise CheckpointError(f"no checkpoint under {run_dir}/checkpoints can be read (all set aside as bad-...); delete "
                              "that folder to start from step 0.")
    return None


# ---------------------------------------------------------------------------------------------------------------------
# The engine: what differs between devices. This one serves the CPU and CUDA, with 1..N processes.


def softmax_gradient(hidden, weight, target, ok):
    """Summed cross-entropy of `hidden @ weight.T` and its gradient to the scores, in hidden's dtype; the softmax in FP32.

    hidden (n, hidden_size), weight (vocab_size, hidden_size), target (n, 1), ok (n, 1): False where nothing is predicted.
    """
    scores = (hidden @ weight.T).float()                                             # (n, vocab_size)
    largest, wanted = scores.amax(-1, keepdim=True), scores.gather(-1, target)
    scores.sub_(largest).exp_()                                                      # one exponential a score
    normalizer = scores.sum(-1, keepdim=True)
    loss = ((normalizer.log() + largest - wanted) * ok).sum()
    gradient = scores.mul_(ok / normalizer).to(hidden.dtype)                         # softmax - one_hot, 0 where masked
    at_target = ((wanted - largest).exp() / normalizer - 1) * ok
    return loss, gradient.scatter_(-1, target, at_target.to(hidden.dtype))


class ChunkedCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy of `hidden @ weight.T`, a few rows at a time, with the gradient made in the same pass.

    hidden (n, hidden_size), weight (vocab_size, hidden_size), targets (n,) with -100 where nothing is to be predicted;
    matrix products in `dtype`, the softmax in FP32; `rows_loss` is softmax_gradient or the same compiled. The
    (n, vocab_size) logits never exist: at 8 x 512 x 4,096 they and their gradients are 200 MB that leave the cache at
    every pass.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, dtype, rows_loss=softmax_gradient):
        rows = max(256, 2**22 // len(weight)) if hidden.device.type == "cpu" else max(1024, 2**26 // len(weight))
        w, valid, total = weight.to(dtype), targets != -100, hidden.new_zeros((), dtype=torch.float32)
        grad_hidden = torch.empty_like(hidden, dtype=dtype) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for i in range(0, len(hidden), rows):
            h = hidden[i:i + rows].to(dtype)
            loss, gradient = rows_loss(h, w, targets[i:i + rows, None].clamp(min=0), valid[i:i + rows, None])
            total += loss
            if grad_hidden is not None:
                torch.mm(gradient, w, out=grad_hidden[i:i + rows])
            if grad_weight is not None:
                grad_weight += gradient.T @ h
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.dtypes = hidden.dtype, weight.dtype
        return total

    @staticmethod
    def backward(ctx, upstream):
        grads = (None if grad is None else (grad.float() * upstream).to(dtype)      # the loss scale comes in FP32
                 for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes))
        return *grads, None, None, None


def use_chunked_loss(model, compiled: bool = False) -> None:
    """Let a LlamaForCausalLM (bare or inside peft) compute its training loss by ChunkedCrossEntropy; the same loss.

    Only the call is replaced, on this object: without labels, or in eval mode, it is the stock forward.
    """
    from transformers import LlamaForCausalLM
    from transformers.modeling_outputs import CausalLMOutputWithPast
    llama = next(module for module in model.modules() if isinstance(module, LlamaForCausalLM))
    rows_loss = torch.compile(softmax_gradient, dynamic=False) if compiled else softmax_gradient

    def forward(self, input_ids=None, labels=None, num_items_in_batch=None, **kwargs):
        if labels is None or not self.training:
            return type(self).forward(self, input_ids=input_ids, labels=labels, num_items_in_batch=num_items_in_batch, **kwargs)
        hidden = self.model(input_ids=input_ids, **{"use_cache": False, **kwargs}).last_hidden_state[:, :-1].flatten(0, 1)
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        targets = labels[:, 1:].flatten()
        with torch.autocast(device, enabled=False):
            loss = ChunkedCrossEntropy.apply(hidden, self.lm_head.weight, targets, dtype, rows_loss)
        counted = (targets != -100).sum() if num_items_in_batch is None else num_items_in_batch
        return CausalLMOutputWithPast(loss=loss / counted)
    llama.forward = types.MethodType(forward, llama)


def compile_layers(model) -> None:
    """torch.compile every decoder layer, in place: parameter names, saving and DDP stay as they are.

    Layer by layer, because all equal layers share one compilation: 12.3M's first three steps took 38 s, not 67 s.
    """
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer
    for module in model.modules():
        if isinstance(module, LlamaDecoderLayer):
            module.compile(dynamic=False)


def accumulate_gradients(model, batch: dict, engine: Engine, per_device: int) -> torch.Tensor:
    """Forward and backward over the global batch; every process takes its `per_device` rows of each micro-batch.

    batch: input_ids and labels (total_batch_size, length). The loss is summed over real tokens and divided once by their
    number in the global batch, so it does not depend on how the batch is cut. Returns this process's share of it.
    """
    counted = int((batch["labels"][:, 1:] != -100).sum())
    starts = range(0, len(batch["input_ids"]), per_device * engine.world_size)
    loss = torch.zeros((), device=engine.device)
    for start in starts:
        mine = slice(start + engine.rank * per_device, start + (engine.rank + 1) * per_device)
        part = {key: value[mine] for key, value in batch.items()}
        if len(part["input_ids"]) == 0:               # an odd last micro-batch: every process must take part all the same
            part = {key: value[:1] for key, value in batch.items()}
            part["labels"] = torch.full_like(part["labels"], -100)
        part = engine.to_device(part)
        with engine.no_sync(model, last=start == starts[-1]), engine.autocast():
            part_loss = model(**part, num_items_in_batch=counted).loss
            engine.scaler.scale(part_loss * engine.world_size).backward()     # DDP averages over processes
        loss += part_loss.detach()
    return loss


def fit_micro_batch(model, batch: dict, engine: Engine, per_device: int, say) -> int:
    """The largest of per_device, per_device / 2, ... that fits the memory of every process; the global batch stays."""
    while True:
        fits = 1.0
        try:
            part = engine.to_device({key: value[:per_device] for key, value in batch.items()})
            with engine.no_sync(model, last=False), engine.autocast():
                engine.scaler.scale(model(**part, num_items_in_batch=1).loss).backward()
        except torch.OutOfMemoryError:
            fits = 0.0
        model.zero_grad(set_to_none=True)
        if engine.sum(fits)[0] == engine.world_size:
            return per_device
        if per_device == 1:
            raise torch.OutOfMemoryError("one sequence does not fit the memory: lower block_size or the model's size, or set "
                                         "gradient_checkpointing.")
        per_device //= 2
        say(f"out of memory: micro-batch halved to {per_device} sequences, the global batch stays")
        if engine.device.type == "cuda":
            torch.cuda.empty_cache()


class Engine:
    """Device, autocast, loss scaling, gradient exchange. `mixed_precision` as in the recipe; `autocast_dtype` is what runs.

    fp16 with dynamic loss scaling is for GPUs below compute capability 8 (a T4 only emulates bf16); from 8 up, bf16.
    """

    static_shapes = False                             # whether a batch of another shape costs a compilation

    def __init__(self, mixed_precision: str):
        self.rank, self.world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if self.world_size > 1:
            from accelerate import PartialState       # sets up the process group for whatever the launcher started
            self.device = PartialState(cpu=not torch.cuda.is_available()).device
        else:
            self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if mixed_precision == "fp16" and self.device.type == "cuda" and torch.cuda.get_device_capability()[0] >= 8:
            mixed_precision = "bf16"
        self.mixed_precision = mixed_precision
        self.autocast_dtype = {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}[mixed_precision]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=mixed_precision == "fp16")

    def autocast(self):
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.autocast_dtype)

    def attention(self, name: str) -> str:
        """The attention implementation to build the model with where the recipe says `name`."""
        return name

    def place(self, model):
        """The model on the device."""
        return model.to(self.device)

    def on_cpu(self, model):
        """The model as save_pretrained can take it."""
        return model

    def optimizer(self, model, recipe: Recipe, say=print):
        return make_optimizer(recipe, parameter_groups(model, recipe.weight_decay), self.device, say)

    def prepare(self, model, torch_compile: bool = False):
        """The model to call in the loop: the chunked loss; DistributedDataParallel when there are several processes."""
        use_chunked_loss(model, torch_compile)
        if torch_compile:
            compile_layers(model)
        if self.world_size == 1:
            return model
        from torch.nn.parallel import DistributedDataParallel
        return DistributedDataParallel(model, device_ids=[self.device.index] if self.device.type == "cuda" else None)

    def no_sync(self, model, last: bool):
        return contextlib.nullcontext() if last or self.world_size == 1 else model.no_sync()

    def sum(self, *values: float) -> list[float]:
        """Sum numbers over all processes, in float64."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.world_size > 1:
            torch.distributed.all_reduce(total)
        return total.tolist()

    def sum_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over all processes, in place, without waiting for the device."""
        if self.world_size > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def to_device(self, batch: dict) -> dict:
        return {key: value.to(self.device, non_blocking=True) for key, value in batch.items()}

    # The loop's own steps. An engine may run behind the host: the loop asks `read` for figures only where it needs them.

    def begin(self, recipe: Recipe, state: dict, say) -> None:
        """Take over the counters of a run that begins or goes on."""
        self.recipe, self.updates, self.skipped = recipe, state["updates"], state["skipped_steps"]
        self.window = torch.tensor(state["window"][0], device=self.device)       # summed loss since the log's last line
        self.grad_norm = self.learning_rate = self.loss_scale = 0.0

    def micro_batch(self, model, batch: dict, per_device: int, say) -> int:
        """Sequences that one device takes at a time."""
        return fit_micro_batch(model, batch, self, per_device, say)

    def feed(self, store, step: int) -> dict:
        """The global batch of this step."""
        return store.batch(step)

    def step(self, model, optimizer, batch: dict, per_device: int) -> bool | None:
        """One optimiser step over the global batch; whether it was done (False: its gradient was not finite)."""
        loss = accumulate_gradients(model, batch, self, per_device)
        self.scaler.unscale_(optimizer)
        self.grad_norm = nn.utils.clip_grad_norm_(model.parameters(), self.recipe.max_grad_norm)
        self.learning_rate = self.recipe.learning_rate_at(self.updates)
        for group in optimizer.param_groups:
            group["lr"] = self.learning_rate
        finite = bool(torch.isfinite(self.grad_norm))
        self.loss_scale = self.scaler.get_scale()
        if finite:
            self.scaler.step(optimizer)
            self.updates += 1                         # a skipped step does not advance the schedule
        else:
            self.skipped += 1
        if self.scaler.is_enabled():
            self.scaler.update()                      # halves the scale after an overflow, doubles it after 2,000 good steps
        optimizer.zero_grad(set_to_none=True)
        loss = self.sum_tensor(loss)
        self.window = self.window + loss if finite else self.window
        return finite

    def read(self) -> dict:
        """The counters, and the figures of the last step; waits for the device."""
        return {"updates": self.updates, "skipped_steps": self.skipped, "window_loss": float(self.window),
                "grad_norm": float(self.grad_norm), "learning_rate": self.learning_rate, "loss_scale": self.loss_scale}

    def clear_window(self) -> None:
        self.window = torch.zeros_like(self.window)

    def counters(self) -> dict[str, int]:
        """More columns for the log: what only this kind of device has."""
        return {}

    def eval_batch_size(self, batch_size: int) -> int:
        return batch_size

    def sync(self) -> None:
        """Start what has been asked for, where the device is lazy."""

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def memory(self) -> str:
        """Peak memory of this process, for the log."""
        if self.device.type == "cuda":
            return f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB on the device"
        return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB of memory"

    def close(self):
        if self.world_size > 1:
            self.sum(0)                               # all wait for process 0 to save: one that leaves early breaks the rest
            torch.distributed.destroy_process_group()


def find_engine(mixed_precision: str, cache_dir=None):
    """XLA where the environment says STENTOR_ENGINE=xla, as `launch` does, else the CPU or CUDA. (PJRT_DEVICE alone says
    nothing: importing torch_xla sets it.)"""
    if os.environ.get("STENTOR_ENGINE") != "xla":
        return Engine(mixed_precision)
    from stentor_xla import XlaEngine
    return XlaEngine(mixed_precision, cache_dir)


@torch.no_grad()
def evaluate(model, ids: np.ndarray, text_bytes: int, *, block_size: int, batch_size: int, engine: Engine | None = None
             ) -> dict[str, float]:
    """Loss of `model` on one token stream: {"loss" nats/token, "perplexity", "bits_per_byte", "tokens"}.

    ids: (n,); ids[0] is context only. Windows of block_size + 1 overlap by one token, so every other token is predicted
    exactly once. In fp32 whatever the training precision, summed in float64 and over all processes.
    """
    rank, world_size = (engine.rank, engine.world_size) if engine else (0, 1)
    device = next(model.parameters()).device
    batch_size = engine.eval_batch_size(batch_size) if engine else batch_size
    windows = list(range(0, len(ids) - 1, block_size))[rank::world_size]
    was_training = model.training
    model.eval()
    losses, count = [], 0
    for i in range(0, len(windows), batch_size):
        chunk = windows[i:i + batch_size]
        height = batch_size if engine and engine.static_shapes else len(chunk)
        tokens = np.zeros((height, block_size + 1), np.int64)
        targets = np.full((height, block_size), -100, np.int64)
        for row, start in enumerate(chunk):
            part = ids[start:start + block_size + 1]
            tokens[row, :len(part)] = part
            targets[row, :len(part) - 1] = part[1:]
        part = {"ids": torch.from_numpy(tokens[:, :-1]), "target": torch.from_numpy(targets)}
        part = engine.to_device(part) if engine else {key: value.to(device) for key, value in part.items()}
        losses.append(F.cross_entropy(model(input_ids=part["ids"], use_cache=False).logits.float().flatten(0, 1),
                                      part["target"].flatten(), ignore_index=-100, reduction="sum"))
        if engine:
            engine.sync()
        count += int((targets != -100).sum())
    total = sum(loss.double().item() for loss in [value.cpu() for value in losses])
    model.train(was_training)
    if engine:
        total, count = engine.sum(total, count)
    loss = total / count
    return {"loss": loss, "perplexity": math.exp(min(loss, 700)), "bits_per_byte": total / math.log(2) / text_bytes,
            "tokens": int(count)}


# ---------------------------------------------------------------------------------------------------------------------
# The one training loop.


def parameter_groups(model, weight_decay: float) -> list[dict]:
    """The cards' AdamW groups: decay on the Linear weight matrices, none on embeddings, norms and biases."""
    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    decay = [p for name, p in model.named_parameters() if p.requires_grad and name in linear]
    rest = [p for name, p in model.named_parameters() if p.requires_grad and name not in linear]
    return [{"params": decay, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]


def make_optimizer(recipe: Recipe, groups: list[dict], device: torch.device, say=print):
    """The recipe's optimiser: torch's fused AdamW, or bitsandbytes' paged one where it is asked for and works on this GPU."""
    settings = {"lr": recipe.learning_rate, "eps": recipe.adam_epsilon, "betas": (recipe.adam_beta1, recipe.adam_beta2)}
    if recipe.optimizer == "paged_adamw_32bit":
        why = f"pages are for a GPU's memory, this is {device}"
        if device.type == "cuda":
            try:
                from bitsandbytes.optim import PagedAdamW32bit
                probe = nn.Parameter(torch.ones(8, device=device))           # a build for another CUDA fails at its first step
                probe.grad = torch.ones_like(probe)
                PagedAdamW32bit([probe]).step()
                return PagedAdamW32bit(groups, **settings)
            except Exception as error:
                why = f"bitsandbytes cannot be used here ({type(error).__name__}: {' '.join(str(error).split())[:100]})"
        say(f"optimizer: torch's AdamW stands in for paged_adamw_32bit; {why}")
    return torch.optim.AdamW(groups, **settings, fused=device.type in ("cuda", "cpu"))


def update_ema(averages: list[torch.Tensor], parameters: list[torch.Tensor], decay: float, updates: int) -> None:
    """averages <- d x averages + (1 - d) x parameters, in place, with d = min(decay, (1 + updates) / (10 + updates)).

    The ramp is TensorFlow's ExponentialMovingAverage(num_updates): with a plain 0.999, 273 steps leave 76% of the start.
    """
    decay = min(decay, (1 + updates) / (10 + updates))
    torch.optim.swa_utils.get_ema_multi_avg_fn(decay)(averages, [parameter.detach() for parameter in parameters], None)


@contextlib.contextmanager
def weights_swapped(parameters: list[torch.Tensor], averages: list[torch.Tensor]):
    """Inside the block the averages stand in for the parameters (an empty list of averages: nothing happens)."""
    def swap():
        for parameter, average in zip(parameters, averages):
            parameter.data, average.data = average.data, parameter.data
    swap()
    try:
        yield
    finally:
        swap()


class RunLock:
    """One process owns a run folder. The lock is the kernel's (flock), so it dies with its process, kill -9 included."""

    def __init__(self, run_dir):
        self.path = Path(run_dir) / ".lock"
        self.file = open(self.path, "a+")
        self.take(self.file, run_dir)
        self.file.truncate(0)
        self.file.write(f"process {os.getpid()} on {platform.node()}, started {time.strftime('%Y-%m-%d %H:%M:%S')}")
        self.file.flush()

    @staticmethod
    def take(file, run_dir):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise ParameterError([f"{run_dir} is in use by {file.read().strip() or 'another run'}; wait for it, stop it, or "
                                  "choose another RUN."]) from None

    def release(self):
        self.file.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):                           # also after an error, whose traceback would keep the lock alive
        self.release()


def recipe_fingerprint(recipe: Recipe) -> dict:
    """What must be equal for a checkpoint to be continued; cadences and micro-batch sizes may change, these may not."""
    free = {"name", "published", "unpublished", "per_device_train_batch_size", "per_device_eval_batch_size", "num_processes",
            "gradient_accumulation_steps", "eval_steps", "best_eval_steps", "best_eval_start_step", "save_every_minutes",
            "save_total_limit", "logging_steps", "gradient_checkpointing", "budget_check", "torch_compile",
            "sources"}
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
    return [f"{key} is {json.dumps(theirs.get(key))[:80]} in the checkpoint, {json.dumps(mine.get(key))[:80]} in this run"
            for key in {**theirs, **mine} if theirs.get(key) != mine.get(key)]


def recipe_differences(recipe: Recipe, run_dir) -> list[str]:
    """`fingerprint_differences` of the recipe and the newest checkpoint of run_dir; [] where there is none."""
    mine, theirs = recipe_fingerprint(recipe), newest_state(run_dir).get("fingerprint")
    return fingerprint_differences({key: theirs[key] for key in mine if key in theirs}, mine) if theirs else []


def check_run(recipe: Recipe, run_dir) -> None:
    """Raise for a run folder in use (ParameterError) or with checkpoints of another recipe (CheckpointError).

    To ask before work that a refused run would have done in vain; it writes nothing. `train` asks again, under its lock, and
    also about the store and the start weights.
    """
    with contextlib.suppress(FileNotFoundError), open(Path(run_dir) / ".lock") as file:
        RunLock.take(file, run_dir)
    if different := recipe_differences(recipe, run_dir):
        raise another_run(run_dir, different)


def another_run(run_dir, different: list[str]) -> CheckpointError:
    return CheckpointError(f"{run_dir} holds checkpoints of another run: " + "; ".join(different)
                           + ". Choose another RUN, or delete its checkpoints folder.")


class Metrics:
    """metrics.jsonl, and training_curves.csv (the cards' columns) made from it. Only process 0 writes."""

    def __init__(self, run_dir, keep_lines: int, say=print):
        self.folder = Path(run_dir)
        self.path = self.folder / "metrics.jsonl"
        lines = self.path.read_text(errors="replace").splitlines() if self.path.exists() else []
        self.rows = [row for row in map(self.row_of, lines[:keep_lines]) if row]      # later ones are trained again
        if lost := keep_lines - len(self.rows):
            aside = f"bad-metrics-{time.time_ns()}.jsonl"
            if lines:
                os.rename(self.path, self.folder / aside)
            say(f"metrics.jsonl: {lost} of the {keep_lines} rows that the checkpoint counts are broken or gone; it goes on "
                "with the others" + f" (the file as it was: {aside})" * bool(lines))
        for left in self.folder.glob(".*.[0-9]*"):    # what write_atomically of a killed run left behind
            if left.is_file():
                left.unlink()
        self.write()

    @staticmethod
    def row_of(line: str) -> dict | None:
        """The row of that line; None where it is none, or lacks what the curves are made of."""
        needs = {"train": {"epoch", "loss", "tokens_per_second"}, "eval": {"epoch", "loss", "perplexity"}}
        try:
            row = json.loads(line)
            return row if type(row["step"]) is int and needs.get(row["kind"], set()) <= set(row) else None
        except (ValueError, TypeError, KeyError, RecursionError):
            return None

    def write(self):
        write_atomically(self.path, "".join(json.dumps(row) + "\n" for row in self.rows))
        self.whole = True

    def add(self, **row):
        self.rows.append(row)
        try:
            with open(self.path, "a") as file:
                file.write(json.dumps(row) + "\n")
        except OSError:                               # the disk is full: `complete` comes before the next checkpoint
            self.whole = False

    def complete(self):
        """Every row is in the file and on the disk, as the checkpoint that counts them will be, or OSError."""
        if not self.whole:
            self.write()
        with open(self.path, "a") as file:
            os.fsync(file.fileno())

    def write_curves(self, final_step: int | None = None):
        lines = ["step,epoch,train_loss,eval_loss,eval_ppl,note"]
        best = min((row for row in self.rows if row["kind"] == "eval"), key=lambda row: row["loss"], default={})
        for row in self.rows:
            if row["kind"] == "train":
                lines.append(f"{row['step']},{row['epoch']:.6g},{row['loss']:.6g},,,")
            elif row["kind"] == "eval":
                note = "best" if row["step"] == best["step"] else "final" if row["step"] == final_step else ""
                lines.append(f"{row['step']},{row['epoch']:.6g},,{row['loss']:.6g},{row['perplexity']:.6g},{note}")
        write_atomically(self.folder / "training_curves.csv", "\n".join(lines) + "\n")


SPIKE = 2.0                # nats/token above its running mean at which a logged loss means that the run has come apart
NONFINITE_IN_A_ROW = 10    # steps: fp16's first scale, 65,536, is down to 64 by then
ROLLBACKS = 2              # of a run; the next trouble stops it


class TrainingDiverged(StentorError, RuntimeError):
    """The run came apart again after it had gone back to a good checkpoint; the message says where, and what to try."""


def train(recipe: Recipe, store, run_dir, *, tokenizer=None, model=None, deadline_hours: float | None = None, say=None,
          begin=lambda: None) -> dict:
    """Train, or go on with, the run in `run_dir`; the only training loop there is.

    store: anything with .batch(step) -> {"input_ids", "labels"} int64 (total_batch_size, length), .validation(), .mixture,
    .epoch, .manifest, .names (TokenStore); more keys of a batch, such as attention_mask, go to the model too. With
    .evaluate(model, engine) -> the keys of `evaluate` and whatever else is to be logged, that is used, and no .validation();
    with .tokens_per_step, that is what a step is counted as. model: one that is built already, used as it is instead of the
    recipe's shape and precision techniques; only what requires gradients is trained and kept in checkpoints, and its start
    weights are part of what a checkpoint must match. begin: called once the run is this process's and its checkpoint is found
    to be of this very run; what describes a run is written there, and not before. Writes checkpoints/, metrics.jsonl,
    training_curves.csv, best/, final/ and summary.json; returns what summary.json holds.
    SIGTERM and SIGINT finish the step (an evaluation, or a wait for data, is cut short), save, and raise SystemExit(143) or
    KeyboardInterrupt.
    Before `deadline_hours` after its start, early enough for what comes next and a save three times as slow as the slowest so
    far, the loop saves and returns with "stopped": "deadline" instead of final/; the same call goes on from there.
    NONFINITE_IN_A_ROW skipped steps, or a logged loss SPIKE above its running mean: back to the weights of the last evaluation
    that was not so, and on with the next batch; what decides is in the checkpoint, so a resumed run decides the same.
    Raises ParameterError for a folder in use, CheckpointError for a checkpoint of another run, TrainingDiverged at the third
    trouble, TrainingFailed when final/ finds no room (a checkpoint that finds none is only warned of).
    """
    run_dir = Path(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    engine = find_engine(recipe.mixed_precision, run_dir / "xla-cache")
    say = (say or (lambda text: print(text, flush=True))) if engine.rank == 0 else (lambda text: None)
    with RunLock(run_dir) if engine.rank == 0 else contextlib.nullcontext():
        try:
            return Run(engine, recipe, store, run_dir, tokenizer, model, deadline_hours, say, begin).train()
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise TrainingFailed(f"{run_dir} has no room ({error.strerror}); its last checkpoint is kept: free some space and "
                                 "run the same again.") from error


class LogWindow:
    """What the next line of the log is made of: counted since the last one.

    steps and skipped_before (skipped steps of the run until then) are in the checkpoint, so that a resumed log is the
    same; tokens, seconds and wait (seconds of them for data) are this session's.
    """

    def __init__(self, steps: int = 0, skipped_before: int = 0):
        self.reset(skipped_before)
        self.steps = steps

    def reset(self, skipped_before: int) -> None:
        self.steps, self.skipped_before = 0, skipped_before
        self.tokens, self.seconds, self.wait = 0.0, 0.0, 0.0


class Run:
    """One session of a training run: `train()` is the loop, its methods are the steps of it, `state` is what lasts."""

    def __init__(self, engine, recipe: Recipe, store, run_dir: Path, tokenizer, model, deadline_hours, say, begin):
        self.engine, self.recipe, self.store, self.run_dir = engine, recipe, store, run_dir
        self.tokenizer, self.deadline_hours, self.say = tokenizer, deadline_hours, say
        self.main = engine.rank == 0
        self.started = self.last_save = time.monotonic()
        self.stopped = None                           # why the loop was left before its end
        self.signals, self.can_be_cut = [], []        # filled by a signal and looked at between steps; raise at once if set
        self.slowest = {"save": 1.0, "evaluation": 0.0, "step": 0.0}      # seconds, in this session
        self.check()
        self.make_model(model)
        self.resume(begin)
        self.announce()
        # a batch of this run's shape shows what fits the memory
        first_batch = store.batch(min(self.state["step"], recipe.total_steps - 1))
        self.per_device = engine.micro_batch(self.parallel, first_batch, recipe.per_device_train_batch_size, say)

    def train(self) -> dict:
        """The loop. Save before evaluating: an evaluation that fails must not cost the training before it."""
        with self.noticing_signals():
            try:
                while True:
                    if self.evaluation_due():
                        self.save()
                        if self.must_stop(before="evaluation"):
                            break
                        self.evaluate()
                    if self.finished() or self.must_stop(before="step"):
                        break
                    done = self.one_step()
                    trouble = self.log(done)
                    if trouble:
                        self.go_back(trouble)
                    if trouble or self.save_due():
                        self.save()
            except CutShort:
                self.must_stop()
            self.save_the_end()
        return self.finish()

    # Before the first step

    def check(self) -> None:
        """What can be refused before anything is made."""
        recipe, problems = self.recipe, []
        made_for = self.store.manifest.get("fingerprint", {}).get("tokenizer_sha256")
        if self.tokenizer is not None and made_for and made_for != tokenizer_sha256(self.tokenizer):
            problems.append(f"the token store was made by the tokenizer {made_for[:12]}, given is "
                            f"{tokenizer_sha256(self.tokenizer)[:12]} (sha256); use the one it was made by.")
        ends = self.store.manifest.get("eos_token_id")
        if self.tokenizer is not None and ends is not None and ends != self.tokenizer.eos_token_id:
            problems.append(f"the documents of the token store end in the id {ends:,}, the tokenizer's EOS is "
                            f"{self.tokenizer.eos_token_id:,}; use the tokenizer it was made by.")
        if recipe.ema_decay and self.engine.static_shapes:
            problems.append(f"ema_decay = {recipe.ema_decay} is not for XLA: set it to None, or use a GPU or the CPU.")
        if recipe.torch_compile and self.engine.static_shapes:
            problems.append("torch_compile = True is not for XLA, which compiles by itself: set it to False.")
        if problems:
            raise ParameterError(problems)

    def make_model(self, model) -> None:
        """The model with its precision techniques, the optimiser, the average of the weights where one is kept."""
        recipe, engine, tokenizer = self.recipe, self.engine, self.tokenizer
        special = {}
        if tokenizer is not None:
            tokenizer.model_max_length = recipe.shape.max_position_embeddings    # saved with it; truncation goes by it
            special = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
        self.start_weights, self.precision = {}, {"notes": []}
        if model is not None:
            self.start_weights = {"start_weights": weights_sha256(model)}
        else:
            model = build_model(recipe.shape, recipe.seed, initialization=recipe.initialization,
                                attn_implementation=engine.attention(recipe.attn_implementation), **special)
            self.precision = apply_precision_recipe(
                model, fp32_norms=recipe.fp32_norms, fp32_critical_layers=recipe.fp32_critical_layers,
                fp32_softmax=recipe.fp32_softmax, int8_qat=recipe.int8_qat)
        if recipe.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        self.model = engine.place(model).train()
        self.optimizer = engine.optimizer(self.model, recipe, self.say)
        self.names = {parameter: name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        self.parameters = list(self.names)            # what is trained
        self.averages = [parameter.detach().clone() for parameter in self.parameters] if recipe.ema_decay else []
        self.parallel = engine.prepare(self.model, recipe.torch_compile)
        self.measure = self.make_measure()

    def make_measure(self):
        """measure(model, engine) -> the keys of `evaluate`: the store's own, or its validation tokens through `evaluate`."""
        recipe, measure = self.recipe, getattr(self.store, "evaluate", None)
        if measure is None:
            ids, text_bytes = self.store.validation()

            def measure(model, engine=None):
                return evaluate(model, ids, text_bytes, block_size=recipe.block_size,
                                batch_size=recipe.per_device_eval_batch_size, engine=engine)
        if recipe.torch_compile:                      # other shapes in another precision: not worth their compilation
            measure = torch.compiler.set_stance("force_eager")(measure)
        return measure

    def resume(self, begin) -> None:
        """Go on from the newest checkpoint of this run, or begin; `begin()` once it is sure to be of this run."""
        fingerprint = run_fingerprint(self.recipe, self.store) | self.start_weights
        if not self.main:
            self.engine.sum(0)                        # process 0 reads first: it sets bad checkpoints aside
        loaded = load_checkpoint(self.run_dir, self.say)
        if self.main:
            self.engine.sum(0)
        self.saved_step = None                        # of the newest checkpoint
        if loaded:
            tensors, self.state = loaded
            theirs = self.state.get("fingerprint") or {"fingerprint": None}
            if different := fingerprint_differences(theirs, fingerprint):
                raise another_run(self.run_dir, different)
            self.put_back(tensors)
            if self.state["scaler"]:
                self.engine.scaler.load_state_dict(self.state["scaler"])
            self.saved_step = self.state["step"]
            self.say(f"going on from step {self.state['step']:,} of {self.recipe.total_steps:,}")
        else:
            self.state = {
                "step": 0, "updates": 0, "skipped_steps": 0, "best_eval_loss": None, "best_step": None, "seconds": 0.0,
                "evaluated_step": -1, "metrics_lines": 0, "scaler": {}, "window": [0.0, 0, 0], "fingerprint": fingerprint,
                # for going back: the last evaluation that was good, skipped steps in a row, the loss's running mean
                "good_step": -1, "nonfinite": 0, "loss_level": None, "rollbacks": []}
        self.first_step = self.state["step"]
        self.window = LogWindow(*self.state["window"][1:])
        if self.main:
            begin()
        self.metrics = Metrics(self.run_dir, self.state["metrics_lines"], self.say) if self.main else None
        self.note_optimizer()
        self.engine.begin(self.recipe, self.state, self.say)

    def note_optimizer(self) -> None:
        """state["optimizers"]: each that made steps of this run; one may have stood in for another."""
        used = f"{type(self.optimizer).__module__.partition('.')[0]}.{type(self.optimizer).__name__}"
        done = self.state.setdefault("optimizers", [])
        if not self.finished() and used not in done:
            done.append(used)

    def put_back(self, tensors: dict) -> None:
        """Weights, optimiser and average of a checkpoint."""
        restore(self.model, self.optimizer, self.names, tensors)
        for name, average in zip(self.names.values(), self.averages):
            average.copy_(tensors["ema"][name])

    def announce(self) -> None:
        engine, recipe, precision = self.engine, self.recipe, self.precision
        everything = sum(parameter.numel() for parameter in self.model.parameters())
        part = f"{self.trainable:,} of " if self.start_weights else ""
        techniques = ", ".join(f"{key} {value}" for key, value in precision.items() if key != "notes")
        self.say(f"{part}{everything:,} parameters on {engine.device} x {engine.world_size}, "
                 f"{engine.mixed_precision if engine.autocast_dtype else 'fp32'}; {recipe.total_steps:,} steps x "
                 f"{self.step_tokens:,.0f} tokens; {techniques}")
        for note in precision["notes"]:
            self.say(note)

    # What follows from the rest

    @property
    def trainable(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters)

    @property
    def step_tokens(self) -> float:
        return getattr(self.store, "tokens_per_step", self.recipe.tokens_per_step)

    def tokens_at(self, step: int) -> float:
        """Tokens trained on after `step` steps; the last step may hold fewer than the others."""
        return min(step * self.step_tokens, self.recipe.total_tokens)

    def elapsed(self) -> float:
        """Seconds of training in all sessions."""
        return self.state["seconds"] + time.monotonic() - self.started

    def until_deadline(self) -> float:
        """Seconds left of this session."""
        if not self.deadline_hours:
            return math.inf
        return self.deadline_hours * 3600 - (time.monotonic() - self.started)

    def finished(self) -> bool:
        return self.state["step"] >= self.recipe.total_steps

    def evaluation_due(self) -> bool:
        step, recipe = self.state["step"], self.recipe
        due = step % recipe.eval_steps == 0 or step % recipe.best_eval_steps == 0 or self.finished()
        return due and self.state["evaluated_step"] != step

    def save_due(self) -> bool:
        return time.monotonic() - self.last_save > 60 * self.recipe.save_every_minutes

    # Stopping

    @contextlib.contextmanager
    def noticing_signals(self):
        """Inside the block SIGTERM and SIGINT only leave a note; on every process: torchrun passes SIGTERM to all."""
        def on_signal(received, frame):
            self.signals.append(received)
            if self.can_be_cut:
                self.can_be_cut.clear()
                raise CutShort
        handlers = {kind: signal.signal(kind, on_signal) for kind in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for kind, handler in handlers.items():
                signal.signal(kind, handler)

    def must_stop(self, before: str | None = None) -> bool:
        """Whether to stop now, before a "step" or an "evaluation" that may be as slow as the slowest so far."""
        spare = self.until_deadline() - self.slowest.get(before, 0.0) - 3 * self.slowest["save"]
        self.stopped = self.stopped or stop_reason(self.engine, self.signals, spare)
        return bool(self.stopped)

    # One step, and the log of it

    def one_step(self) -> bool | None:
        """One optimiser step over the global batch; whether it was done (None: an engine that tells later).

        What a step draws at random is a function of (seed, step, rank).
        """
        self.lap, state, step = time.monotonic(), self.state, self.state["step"]
        try:
            with cut_short_by_a_signal(self.can_be_cut, self.engine):         # it may have to wait for the hub
                batch = self.engine.feed(self.store, step)
        except FeedStopped:                           # what was trained is kept; the same call goes on from there
            self.save()
            raise
        self.window.wait += time.monotonic() - self.lap
        torch.manual_seed((self.recipe.seed << 32) + step * 1024 + self.engine.rank)
        done = self.engine.step(self.parallel, self.optimizer, batch, self.per_device)
        if done and self.averages:
            update_ema(self.averages, self.parameters, self.recipe.ema_decay, self.engine.updates - 1)
        state["step"] = step + 1
        state["nonfinite"] = state["nonfinite"] + 1 if done is False else 0
        return done

    def log(self, done: bool | None) -> str | None:
        """Say and write down what the step gave; returns what is wrong with the run, if anything is."""
        step, engine, window = self.state["step"], self.engine, self.window
        in_a_row, trouble = self.state["nonfinite"], None
        if done is False:
            self.say(f"step {step:>6,} | gradient is not finite: step skipped"
                     + (f", loss scale {engine.loss_scale:,.0f}" if engine.scaler.is_enabled() else ""))
            if self.main:
                self.metrics.add(kind="skipped", step=step, batch=step - 1, loss_scale=engine.loss_scale)
        window.steps += 1
        window.tokens += self.tokens_at(step) - (step - 1) * self.step_tokens
        self.preflight()
        if step % self.recipe.logging_steps == 0 or self.finished():
            progress = engine.read()                  # waits for the device
            skipped = progress["skipped_steps"] - window.skipped_before
            if done is None:                          # XLA tells only now: as many in one window count as in a row
                in_a_row = skipped
            window.seconds += time.monotonic() - self.lap
            trouble = self.log_line(progress, trained=window.steps - skipped)
            engine.clear_window()
            window.reset(progress["skipped_steps"])
        else:
            window.seconds += time.monotonic() - self.lap
        self.slowest["step"] = max(self.slowest["step"], time.monotonic() - self.lap)
        if in_a_row >= NONFINITE_IN_A_ROW:
            return f"the gradients of {in_a_row} steps in a row were not finite"
        return trouble

    def log_line(self, progress: dict, trained: int) -> str | None:
        """The log's line of this window, in which `trained` steps were not skipped; what is wrong with its loss."""
        state, step, window, trouble = self.state, self.state["step"], self.window, None
        loss, rate = progress["window_loss"] / max(1, trained), window.tokens / window.seconds
        if trained:
            level = state["loss_level"]
            if level is not None and not loss <= level + SPIKE:
                trouble = f"the loss rose to {loss:.2f} from about {level:.2f}"
            else:
                state["loss_level"] = loss if level is None else 0.9 * level + 0.1 * loss
        if trained and self.main:
            self.metrics.add(
                kind="train", step=step, tokens=round(self.tokens_at(step)), epoch=self.store.epoch(step), loss=loss,
                learning_rate=progress["learning_rate"], grad_norm=progress["grad_norm"],
                loss_scale=progress["loss_scale"], skipped_steps=progress["skipped_steps"], tokens_per_second=rate,
                wait_seconds=window.wait, elapsed_seconds=self.elapsed(), mixture=self.store.mixture(step - 1),
                **self.engine.counters())
        left = (self.recipe.total_steps - step) * self.step_tokens / rate
        self.say(f"step {step:>6,}/{self.recipe.total_steps:,} | loss {loss:.4f} | lr {progress['learning_rate']:.2e} | "
                 f"{rate:,.0f} tokens/s | {duration(left)} left")
        return trouble

    def preflight(self) -> None:
        """After a few steps of a session: what a step takes, and whether the run fits the session."""
        steps = self.state["step"] - self.first_step
        if steps not in (2, 5):
            return
        self.engine.wait()
        if steps == 2:                                # what is compiled is compiled by now
            self.warm = time.monotonic()
            return
        a_step, until = (time.monotonic() - self.warm) / 3, self.until_deadline()
        left = (self.recipe.total_steps - self.state["step"]) * a_step
        self.say(f"preflight: {a_step:.2f} s a step, {self.engine.memory()}; about {duration(left)} to go")
        if self.deadline_hours:
            self.say(f"the session's deadline is in {duration(until)}: " + (
                "the run fits" if left < until else "the run will be saved then; run it again to go on"))

    # Evaluation

    def evaluate(self) -> None:
        """Measure the model (the average of its weights, where one is kept); the best so far goes to best/."""
        state, step, began = self.state, self.state["step"], time.monotonic()
        with weights_swapped(self.parameters, self.averages), cut_short_by_a_signal(self.can_be_cut, self.engine):
            result = self.measure(self.model, self.engine)
        self.slowest["evaluation"] = max(self.slowest["evaluation"], time.monotonic() - began)
        state["evaluated_step"] = step
        lowest = math.inf if state["best_eval_loss"] is None else state["best_eval_loss"]
        if result["loss"] < lowest + SPIKE and not state["nonfinite"]:
            state["good_step"] = step
        best = step >= self.recipe.best_eval_start_step and result["loss"] < lowest
        before = {key: state[key] for key in ("best_eval_loss", "best_step")}
        if best:
            state.update(best_eval_loss=result["loss"], best_step=step)
        if self.main:
            try:
                self.write_evaluation(result, best)
            except OSError as error:
                state.update(before)                  # best/ still holds what it held: the next better one is written again
                self.say(f"WARNING: best/ could not be written at step {step:,} ({error.strerror})")
        self.say(f"step {step:>6,} | eval loss {result['loss']:.4f} | perplexity {result['perplexity']:,.2f} | "
                 f"{result['bits_per_byte']:.4f} bits per byte" + (" | best so far" if best and step else ""))

    def write_evaluation(self, result: dict, best: bool) -> None:
        step = self.state["step"]
        more = {key: value for key, value in result.items() if key != "tokens"}
        self.metrics.add(kind="eval", step=step, tokens=round(self.tokens_at(step)), epoch=self.store.epoch(step),
                         best=best, elapsed_seconds=self.elapsed(), **more)
        self.metrics.write_curves(final_step=step if self.finished() else None)
        if best and step:
            self.save_model("best")

    def save_model(self, name: str) -> Path:
        """The model as a Hugging Face folder of the run."""
        with weights_swapped(self.parameters, self.averages):
            save_model_folder(self.engine.on_cpu(self.model), self.tokenizer, self.run_dir / name)
        return self.run_dir / name

    # Checkpoints, and going back to one

    def save(self) -> None:
        """A checkpoint; a full disk costs that, not the training."""
        began, progress, step = time.monotonic(), self.engine.read(), self.state["step"]
        self.state.update({key: progress[key] for key in ("updates", "skipped_steps")})
        if self.main:
            try:
                self.write_checkpoint(progress)
            except OSError as error:
                kept = "there is none yet" if self.saved_step is None else f"the last one, of step {self.saved_step:,}, is kept"
                self.say(f"WARNING: no checkpoint at step {step:,} ({error.strerror}); {kept}. Free some space under "
                         f"{self.run_dir}.")
        self.last_save = time.monotonic()
        self.slowest["save"] = max(self.slowest["save"], self.last_save - began)

    def write_checkpoint(self, progress: dict) -> None:
        tensors = checkpoint_tensors(self.model, self.optimizer, self.names)
        if self.averages:
            tensors["ema"] = {name: average.cpu() for name, average in zip(self.names.values(), self.averages)}
        self.metrics.complete()
        state = {**self.state, "scaler": self.engine.scaler.state_dict(), "metrics_lines": len(self.metrics.rows),
                 "window": [progress["window_loss"], self.window.steps, self.window.skipped_before],
                 "seconds": self.elapsed()}
        save_checkpoint(self.run_dir, state["step"], tensors, state, self.recipe.save_total_limit)
        self.saved_step = state["step"]
        if hasattr(self.store, "release"):            # of a store that is filled meanwhile: what no checkpoint needs any more
            self.store.release(int(checkpoint_folders(self.run_dir)[0].name[5:]))

    def go_back(self, why: str) -> None:
        """Weights and optimiser of the last good checkpoint; the batches since then are left out."""
        state, step, found = self.state, self.state["step"], None
        state["skipped_steps"] = self.engine.read()["skipped_steps"]
        if len(state["rollbacks"]) < ROLLBACKS:
            found = load_checkpoint(self.run_dir, self.say, newest=state["good_step"])
        if not found:
            before = "; ".join(f"back from step {b:,} to {a:,} because {reason}" for a, b, reason in state["rollbacks"])
            raise TrainingDiverged(
                f"training came apart at step {step:,}: {why} ({before or 'no good checkpoint yet'}); the learning rate was "
                f"{self.engine.read()['learning_rate']:.2e}. Lower learning_rate or lengthen warmup_ratio under another RUN, "
                "and look at the batches of these steps.")
        tensors, saved = found
        self.optimizer.state.clear()
        self.put_back(tensors)
        state["rollbacks"].append([saved["step"], step, why])
        state.update(updates=saved["updates"], loss_level=saved["loss_level"], nonfinite=0,
                     window=[0.0, 0, state["skipped_steps"]])
        self.window.reset(state["skipped_steps"])
        self.engine.begin(self.recipe, state, self.say)      # the loss scale stays where it has fallen to
        if self.main:
            self.metrics.add(kind="rollback", step=step, good_step=saved["step"], reason=why, elapsed_seconds=self.elapsed())
        self.say(f"step {step:>6,} | {why}: back to the weights of step {saved['step']:,}, the batches since then left out "
                 f"({len(state['rollbacks'])} of {ROLLBACKS})")

    # The end

    def save_the_end(self) -> None:
        if not self.stopped or self.saved_step != self.state["step"]:
            self.save()
        self.must_stop(before="evaluation")           # final/ can wait for the next session

    def finish(self) -> dict:
        """final/ if the run is done, summary.json; leaves as the signal that stopped it asks."""
        summary = self.summary()
        if self.main and not self.stopped:
            summary |= self.measure_final(self.save_model("final"))
        if self.main:
            write_atomically(self.run_dir / "summary.json", json.dumps(summary, indent=1))
        self.engine.close()
        if self.stopped:
            step = self.state["step"]
            self.say(f"stopped at step {step:,} of {self.recipe.total_steps:,} ({self.stopped}); "
                     + ("saved" if self.saved_step == step else f"last saved at step {self.saved_step}")
                     + ". Run the same again to go on.")
        if self.stopped == "SIGINT":
            raise KeyboardInterrupt
        if self.stopped == "SIGTERM":
            raise SystemExit(143)
        return summary

    def summary(self) -> dict:
        """What summary.json holds of every run, finished or not."""
        state, engine, recipe = self.state, self.engine, self.recipe
        counts = {"trainable_parameters": self.trainable} if self.start_weights else {}
        return {"recipe": recipe.name, "parameters": sum(p.numel() for p in self.model.parameters()), "step": state["step"],
                "steps": recipe.total_steps, "tokens": round(self.tokens_at(state["step"])),
                "skipped_steps": state["skipped_steps"], "best_eval_loss": state["best_eval_loss"],
                "best_step": state["best_step"], "seconds": self.elapsed(), "device": str(engine.device),
                "processes": engine.world_size, "precision": {"autocast": engine.mixed_precision, **self.precision},
                "stopped": self.stopped, "optimizer": ", then ".join(state["optimizers"]), **engine.counters(), **counts}

    def measure_final(self, folder: Path) -> dict:
        """What is reported is measured on what was saved, read back as anybody would."""
        engine = self.engine
        saved = engine.place(load_model(folder, attn_implementation=engine.attention("sdpa")))
        result = self.measure(saved, engine if engine.world_size == 1 else None)
        rates = [row["tokens_per_second"] for row in self.metrics.rows if row["kind"] == "train"]
        return {"eval_loss": result["loss"], "perplexity": result["perplexity"], "bits_per_byte": result["bits_per_byte"],
                "eval_tokens": result["tokens"], "tokens_per_second": float(np.median(rates)) if rates else None}


class CutShort(BaseException):
    """A signal came during an evaluation, or while the next batch was waited for."""


@contextlib.contextmanager
def cut_short_by_a_signal(can_be_cut: list, engine: Engine):
    """Inside the block a signal need not wait: no step is in flight. Several processes wait: they could not leave together."""
    can_be_cut += [True] * (engine.world_size == 1)
    yield
    can_be_cut.clear()


def stop_reason(engine: Engine, received: list, seconds_to_spare: float):
    """"SIGTERM", "SIGINT" or "deadline" when the loop is to save and stop now, else None; the same on every process."""
    code = int(received[0]) if received else -1 if seconds_to_spare < 0 else 0
    if engine.world_size > 1:
        code = int(engine.sum(code if engine.rank == 0 else 0)[0])
    return {0: None, -1: "deadline"}.get(code) or (signal.Signals(code).name if code > 0 else None)


def frozen(model) -> set[str]:
    """Names in the state_dict of parameters that are not trained: a checkpoint leaves them out."""
    return {name for name, parameter in model.named_parameters(remove_duplicate=False) if not parameter.requires_grad}


def weights_sha256(model) -> str:
    """A hash of every parameter's name and bytes: what a run with a model given to it started from."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(name.encode() + parameter.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def checkpoint_tensors(model, optimizer, names: dict) -> dict[str, dict[str, torch.Tensor]]:
    """{"model": state_dict without the tied lm_head and what is frozen, "optimizer": "<parameter>.<moment>"}, on the CPU."""
    tied, left_out = model.config.tie_word_embeddings, frozen(model)
    weights = {key: value.cpu() for key, value in model.state_dict().items()
               if key not in left_out and not (tied and key == "lm_head.weight")}
    moments = {f"{names[parameter]}.{key}": torch.as_tensor(value).cpu() for parameter, values in optimizer.state.items()
               for key, value in values.items()}
    return {"model": weights, "optimizer": moments}


BITSANDBYTES_MOMENTS = {"exp_avg": "state1", "exp_avg_sq": "state2"}          # its names for Adam's two, which are the same


def restore(model, optimizer, names: dict, tensors: dict[str, dict[str, torch.Tensor]]) -> None:
    """Put a checkpoint's tensors back; every key must be there."""
    try:
        missing, unexpected = model.load_state_dict(tensors["model"], strict=False)
    except RuntimeError as error:
        raise CheckpointError(f"the checkpoint does not fit the model: {' '.join(str(error).split())[:200]}") from error
    missing = [key for key in missing if not (key == "lm_head.weight" and model.config.tie_word_embeddings)
               and key not in frozen(model)]
    if missing or unexpected:
        raise CheckpointError(f"the checkpoint does not fit the model: missing {missing[:3]}, unexpected {unexpected[:3]}.")
    by_name = {name: parameter for parameter, name in names.items()}
    for key, value in tensors["optimizer"].items():
        name, _, moment = key.rpartition(".")
        if name not in by_name:
            raise CheckpointError(f"the checkpoint does not fit the model: {key!r} belongs to none of its parameters.")
        parameter = by_name[name]
        for theirs, ours in BITSANDBYTES_MOMENTS.items():       # a session may have what another lacked
            if moment in (theirs, ours):
                moment = theirs if isinstance(optimizer, torch.optim.AdamW) else ours
        on_host = moment == "step" and not optimizer.defaults.get("capturable")
        optimizer.state[parameter][moment] = value.clone() if on_host else value.clone().to(parameter.device)
        if moment == "step" and not isinstance(optimizer, torch.optim.AdamW):
            optimizer.state[parameter][moment] = int(value)       # bitsandbytes counts in a Python int


def duration(seconds: float) -> str:
    """"2h 05m", "3m 20s" or "12s"."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h {minutes:02d}m" if hours else f"{minutes}m {seconds:02d}s" if minutes else f"{seconds}s"


# ---------------------------------------------------------------------------------------------------------------------
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


def write_model_card(run_dir, **settings) -> Path:
    """stentor_card.write_model_card: final/README.md, filled from the run's files alone."""
    import stentor_card                               # it imports this module
    return stentor_card.write_model_card(run_dir, **settings)


def find_outputs(outputs: str) -> Path:
    """A relative OUTPUTS is beside stentor_utils.py, or in the working folder where that is read-only (Kaggle inputs)."""
    here = Path(__file__).resolve().parent
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


class TrainingFailed(StentorError, RuntimeError):
    """The training process ended with an error; the message is its last lines."""


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
    here = str(Path(__file__).resolve().parent)
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


def is_hub_name(path) -> bool:
    return str(path).startswith("hf:")


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


def main(argv: list[str] | None = None) -> int:
    """`python -m stentor_utils train RUN_JSON`, and for its workers `fill RUN_JSON SOURCE PARENT`; exit code 2 for a refused
    parameter or checkpoint or a failed worker, 130 / 143 for a stop."""
    arguments = argv or sys.argv[1:]
    filling = len(arguments) in (3, 4) and arguments[0] == "fill"
    if not filling and (len(arguments) != 2 or arguments[0] != "train"):
        print("usage: python -m stentor_utils train RUN_JSON", file=sys.stderr)
        return 2
    faulthandler.enable()                             # a crash in native code says where it was
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))       # where train() does not take it: before and after its loop
    signal.signal(signal.SIGINT, signal.default_int_handler)      # a shell starts what it puts behind `&` with SIGINT ignored
    try:
        fill_from_file(*arguments[1:]) if filling else train_from_file(arguments[1])
    except (ParameterError, CheckpointError, SourceError, FeedStopped) as error:
        print(error, file=sys.stderr)
        return 2
    except (TrainingDiverged, TrainingFailed) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        # All is written and every process is here (Engine.close). One process of two once aborted (SIGABRT, in CI), most
        # likely in the teardown of its communication threads; it was not seen again. Leave without that teardown.
        sys.stdout.flush()
        os._exit(0)
    return 0


if __name__ == "__main__":
    sys.modules.setdefault("stentor_utils", sys.modules["__main__"])      # one module, also for pickled worker functions
    sys.exit(main())
