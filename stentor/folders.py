"""Model folders: written as plain Hugging Face folders, loaded with safetensors only and none of
their code."""
from __future__ import annotations

import contextlib
import copy
import errno
import glob
import json
import os
import re
from pathlib import Path

import torch

from stentor.files import ParameterError, SourceError, remove, replace_folder
from stentor.hub import hub_folder
from stentor.precision import rename_weight_master
from stentor.tokenizer import load_tokenizer, tokenizer_fit


def save_model_folder(model, tokenizer, folder, generation: dict | None = None) -> None:
    """A plain Hugging Face folder, complete or not there at all: written beside, fsynced, then
    renamed into place.

    Where `folder` is a link, what it points to is replaced, and the link stays. peft adapters are
    merged into a copy of the base weights first, so the folder loads where there is no peft.
    generation: as for `published_configs`. Raises ParameterError for a tokenizer of more tokens
    than the model has rows.
    """
    from safetensors import SafetensorError
    if tokenizer is not None and (problems := tokenizer_fit(tokenizer, model.config.vocab_size)):
        raise ParameterError(problems)
    folder = Path(os.path.realpath(folder))
    folder.parent.mkdir(parents=True, exist_ok=True)
    if hasattr(model, "merge_and_unload"):
        model = copy.deepcopy(model).merge_and_unload()
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    for left in folder.parent.glob(f".{glob.escape(folder.name)}.[0-9]*"):
        remove(left)                                  # what a killed run left half-written
    own = model.config, model.generation_config
    model.config, model.generation_config = published_configs(model, tokenizer, generation)
    try:
        model.save_pretrained(temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        replace_folder(temporary, folder)
    except SafetensorError as error:                  # its own name for a write that failed
        number = errno.ENOSPC if "os error 28" in str(error) else errno.EIO
        raise OSError(number, str(error)) from error
    finally:
        model.config, model.generation_config = own
        remove(temporary)


def published_configs(model, tokenizer, generation: dict | None = None):
    """(config, generation_config) as the users of a saved folder want them, whatever training, or
    an old folder, had set.

    With the cache (without it, 200 tokens took 26.5 s instead of 1.3 s, and assisted generation
    raises), up to the whole context, with the tokenizer's ids of EOS, BOS and padding. generation:
    sampling settings; None: those the model has.
    """
    config, generating = copy.deepcopy(model.config), copy.deepcopy(model.generation_config)
    config.use_cache = generating.use_cache = True
    # or some versions make it anew from config.json, without the sampling
    generating._from_model_config = False
    generating.max_length = config.max_position_embeddings
    generating.update(**generation or {})
    if tokenizer is not None:
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        ids = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id,
               "pad_token_id": pad}
        ends = generating.eos_token_id
        if isinstance(ends, list) and tokenizer.eos_token_id in ends:
            ids["eos_token_id"] = ends                # more ways to end, as chat models have
        for name, value in ids.items():
            setattr(config, name, value)
            setattr(generating, name, value)
    return config, generating


def load_model(folder, **settings):
    """AutoModelForCausalLM from a folder (or hub name) that nobody vouches for: safetensors only,
    and none of its code.

    settings: as for from_pretrained. Every weight is the file's: old weight_master names are
    converted. Raises ParameterError, in one sentence, for pickled weights, code (auto_map), a kind
    of model that transformers does not have, a LoRA adapter, an index that points out of the
    folder, damaged files, and weights that are missing, left over or of another shape.
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
        what = f"model {str(folder)!r} (no folder here)"
        return hub_folder(str(folder), ["*.safetensors", "*.json"], what, revision)
    except SourceError as error:
        raise ParameterError([str(error)]) from None


def _folder_problem(path: Path) -> str | None:
    """Why a model folder is not to be opened, or None."""
    config, files = json.loads((path / "config.json").read_text()), _weight_files(path)
    if "auto_map" in config:
        return "its config.json asks for code from elsewhere (auto_map)"
    if (path / "adapter_config.json").exists():
        return "it holds a LoRA adapter, which names another model to load: merge the two first"
    strange = [name for name in files
               if Path(name).name != name or not name.endswith(".safetensors")]
    if strange:
        return f"its index names {strange[0]!r}, which is not a .safetensors file of this folder"
    if missing := [name for name in files if not (path / name).is_file()]:
        return (f"{missing[0]} is not there (pickled weights, such as pytorch_model.bin, are never "
                "opened)")


def _weight_files(path: Path) -> list[str]:
    index = path / "model.safetensors.index.json"
    if not index.exists():
        return ["model.safetensors"]
    return sorted(set(json.loads(index.read_text())["weight_map"].values()))


def _load_weights(path: Path, settings: dict):
    """(model, None), or (None, what is wrong with its weights)."""
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM
    settings = {"use_safetensors": True, **settings, "trust_remote_code": False,
                "output_loading_info": True, "ignore_mismatched_sizes": True}   # refused below
    old = False
    for name in _weight_files(path):
        with safe_open(path / name, "pt") as file:
            old = old or any(key.endswith(".weight_master") for key in file.keys())
    with _transformers_silent():                      # its report of the same is a page long
        if old:
            model, info = _load_weight_master(path, settings)
        else:
            model, info = AutoModelForCausalLM.from_pretrained(path, **settings)
    problem = weights_problem(model, info)
    if not problem:
        model.tie_weights()                           # 5.0 leaves apart what the file holds twice
        # folders saved before published_configs said no
        model.config.use_cache = model.generation_config.use_cache = True
    return (None, problem) if problem else (model, None)


def _load_weight_master(path: Path, settings: dict):
    """(model, loading info) of a folder with the first Preview's names, a Llama then.

    transformers alone leaves these layers random, without a word.
    """
    from safetensors.torch import load_file
    from transformers import AutoConfig, GenerationConfig, LlamaForCausalLM
    tensors = {}
    for name in _weight_files(path):
        tensors |= load_file(path / name)
    model, info = LlamaForCausalLM.from_pretrained(
        None, state_dict=rename_weight_master(tensors), **settings,
        config=AutoConfig.from_pretrained(path, trust_remote_code=False))
    if (path / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(path)
    return model, info


def load_stentor2(path_or_repo, dtype=torch.float32):
    """(model, tokenizer), as the helper of this name in the Stentor2-12M-Preview card, whose first
    weights are named X.weight_master beside a stale X.weight.

    `load_model` by another name: it uses the same renaming wherever it meets such a folder. Raises
    ParameterError as it does.
    """
    return load_model(path_or_repo, dtype=dtype), load_tokenizer(path_or_repo)


def weights_problem(model, info: dict) -> str | None:
    """What from_pretrained's loading info (output_loading_info) says is not as it was trained, or
    None."""
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
