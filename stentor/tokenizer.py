"""The tokenizer of a run: found, loaded, encoding, held against its recipe, store and model.

Never is code from a tokenizer's folder run.
"""
from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np

from stentor.files import ParameterError, SourceError, StentorError, replace_folder
from stentor.hub import hub_folder
from stentor.recipes import Recipe
from stentor.shapes import count_parameters

TOKENIZER_FILES = ["*token*", "*.json", "*.jinja", "*.txt", "*.model", "*.vocab", "*.tiktoken"]
STORE_ROWS = 1 << 16                                  # ids that fit the uint16 of a token store


class NoTokenizer(ParameterError):
    """A run has no tokenizer yet, and none was named: one may be built (`alone.build_tokenizer`)."""


# What a tokenizer is: its rows, its hash, its ids.


def vocabulary_rows(tokenizer) -> int:
    """Rows that a model's embedding needs for a tokenizer's ids: the highest + 1.

    (len() counts the ids, holes left out.)
    """
    return 1 + max(tokenizer.get_vocab().values())


def tokenizer_sha256(tokenizer) -> str:
    """What identifies a tokenizer: a hash of its vocabulary file and size.

    A store made with another one is refused.
    """
    backend = getattr(tokenizer, "vocabulary", None)
    if backend is not None:
        data = backend.to_bytes()
    else:
        data = tokenizer.backend_tokenizer.to_str().encode()
    return hashlib.sha256(data + str(len(tokenizer)).encode()).hexdigest()


def encode_documents(tokenizer, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """(ids, offsets): unsigned and as wide as they need; int64 of len(texts) + 1.

    No EOS is added, and special tokens in the text are taken as plain text.
    """
    if hasattr(tokenizer, "encode_batch"):
        return tokenizer.encode_batch(texts)
    rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
    return np.array([i for row in rows for i in row], dtype=np.uint32), offsets


# A tokenizer's folder.


def load_tokenizer(path, **reading):
    """A tokenizer from a folder or a hub name ("hf:owner/name"; owner/name where no folder is).

    Only our own tokenizer class is built from this repository's code; for anything else
    transformers' own classes are used, never code from the folder (no trust_remote_code). Raises
    ParameterError where there is neither, or no network.
    """
    folder = Path(path)
    if not folder.is_dir():
        if not re.fullmatch(r"(hf:)?[\w.-]+(/[\w.-]+)?", str(path)):
            raise ParameterError([f"tokenizer {str(path)!r} is not there."])
        try:
            folder = hub_folder(str(path), TOKENIZER_FILES,
                                f"tokenizer {str(path)!r} (no folder here)", **reading)
        except SourceError as error:
            raise ParameterError([str(error)]) from None
    if (folder / "tokenmonster.vocab").is_file():
        from tokenmonster_hf import TokenMonsterTokenizer
        return TokenMonsterTokenizer.from_pretrained(str(folder))
    from transformers import AutoTokenizer
    return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)


def find_vocabulary(name: str, **reading) -> Path:
    """A TokenMonster vocabulary by name ("english-8000-strict-nocapcode-v1"), or a .vocab file.

    Looked for as a path, then in the folders of $STENTOR_VOCABS, then on the hub
    (alasdairforsythe/tokenmonster). Raises ParameterError when it is nowhere; `reading` as for
    `documents`.
    """
    folders = os.environ.get("STENTOR_VOCABS", "").split(os.pathsep)
    for path in (Path(name), *(Path(folder) / f"{name}.vocab" for folder in folders if folder)):
        if path.is_file():
            return path
    if not re.fullmatch(r"[a-z]+-\d+-[a-z0-9-]+", name):
        raise ParameterError([
            f"vocabulary {name!r} is neither a .vocab file nor the name of a released vocabulary "
            "(such as english-8000-strict-nocapcode-v1)."])
    file = f"vocabs/{name}.vocab"
    try:
        path = hub_folder("hf:alasdairforsythe/tokenmonster", [file], f"vocabulary {name!r}",
                          **reading) / file
    except StentorError as error:
        raise ParameterError([f"{error} Or give a .vocab file, or build one "
                              "(VOCABULARY = 'build')."]) from None
    if not path.is_file():
        raise ParameterError([
            f"vocabulary {name!r} is not among the released ones "
            "(hf:alasdairforsythe/tokenmonster); give a .vocab file instead, or build one "
            "(VOCABULARY = 'build')."])
    return path


def save_tokenizer(tokenizer, folder) -> None:
    """A tokenizer folder, complete or not there at all."""
    folder = Path(folder)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        tokenizer.save_pretrained(temporary)
        replace_folder(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def tokenizer_problem(path) -> str | None:
    """What is wrong with `path` as a tokenizer folder, or None; None for a hub name.

    Found without loading transformers.
    """
    folder = Path(path)
    if str(path).startswith("hf:"):
        return None
    if not folder.is_dir():
        return "is not there"
    if not any((folder / name).is_file() for name in ("tokenmonster.vocab", "tokenizer.json")):
        return "holds neither tokenmonster.vocab nor tokenizer.json"
    try:
        rows = _rows_of_folder(folder)
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        return f"is damaged ({error})"
    if rows > STORE_ROWS:
        return f"has {_too_wide(rows)}"


def _rows_of_folder(folder: Path) -> int:
    """What `vocabulary_rows` would say of the tokenizer in a folder."""
    def read(name):
        path = folder / name
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    config, fast = read("tokenizer_config.json"), read("tokenizer.json")
    vocab = fast.get("model", {}).get("vocab", {})      # {token: id}, or a list of (token, score)
    ids = [*(vocab.values() if isinstance(vocab, dict) else range(len(vocab)))]
    ids += [token["id"] for token in fast.get("added_tokens", [])]
    ids += [int(i) for i in config.get("added_tokens_decoder", {})]
    if (folder / "tokenmonster.vocab").is_file():
        from tokenmonster_hf import Vocabulary
        vocabulary = Vocabulary.from_file(folder / "tokenmonster.vocab")
        ids += [vocabulary.n_ids - 1, config.get("vocab_size", 0) - 1]
    return 1 + max(ids)


# The tokenizer of a run.


def open_tokenizer(named: str | None, recipe: Recipe, run_dir):
    """(where, tokenizer) for a run: a folder or hub name, and what it holds.

    The one named, else run_dir/tokenizer, else the hub tokenizer that the recipe names, else one
    that 01 made for this recipe under another RUN, else the released vocabulary that the recipe
    names. The last two are for `save_tokenizer` to keep in run_dir/tokenizer, which is not there
    yet: this creates nothing. Raises ParameterError, in one sentence; NoTokenizer where nothing is
    wrong but that there is none.
    """
    own = Path(run_dir) / "tokenizer"
    if named or own.exists():
        return named or own, _load_or_refuse(named or own, recipe, own)
    if recipe.tokenizer.startswith("hf:"):
        return recipe.tokenizer, _load_or_refuse(recipe.tokenizer, recipe, own)
    others = [path for path in own.parent.parent.glob("*/tokenizer") if _made_for(path, recipe)]
    if others:
        newest = max(others, key=lambda path: (path / "report.json").stat().st_mtime)
        print(f"TOKENIZER: there is no {own}; taken is {newest}, which 01 made for this recipe.")
        return own, _load_or_refuse(newest, recipe, own)
    if recipe.tokenizer in ("build", "bpe"):
        raise NoTokenizer([f"TOKENIZER = {str(own)!r} is not there; {_run_01(recipe, own)}, or name "
                           "a tokenizer folder."])
    return own, _released(recipe, own)


def _released(recipe: Recipe, own: Path):
    """The released vocabulary that a recipe names, cut to the recipe's rows as 01 does it."""
    from tokenmonster_hf import TokenMonsterTokenizer, Vocabulary
    try:
        vocabulary = Vocabulary.from_file(find_vocabulary(recipe.tokenizer))
    except (ValueError, OSError) as error:            # a ParameterError too
        refused = NoTokenizer if isinstance(error, ParameterError) else ParameterError
        raise refused([
            f"TOKENIZER: there is no {own}, and {str(error).rstrip('.')}; run 01_tokenizer first, "
            "or switch internet on (Kaggle: Settings, Internet)."]) from None
    print(f"TOKENIZER: there is no {own}; taken is {recipe.tokenizer}, the recipe's released one.")
    rows = recipe.shape.vocab_size
    if len(vocabulary) > rows - 2:
        vocabulary = vocabulary.resize(rows - 2)
    return TokenMonsterTokenizer.from_vocabulary(vocabulary, vocab_size=rows)


def _load_or_refuse(where, recipe: Recipe, own: Path):
    """The tokenizer in a folder or at a hub name; ParameterError, one sentence, where none is."""
    try:
        wrong = tokenizer_problem(where)
        if not wrong:
            return load_tokenizer(where)
    except Exception as error:                        # whatever the parsers make of a damaged file
        wrong = f"cannot be loaded ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
    way = _run_01(recipe, own)
    if str(where).startswith("hf:"):
        way = "switch internet on (Kaggle: Settings, Internet)"
    raise ParameterError([
        f"TOKENIZER = {str(where)!r} {wrong}; {way}, or name a tokenizer folder."])


def _run_01(recipe: Recipe, own: Path) -> str:
    return (f"run 01_tokenizer first (RUN = {own.parent.name!r}, "
            f"RECIPE = {recipe.name.removesuffix('-cpu')!r})")


def _made_for(folder: Path, recipe: Recipe) -> bool:
    """Whether 01's report beside a tokenizer says that it is this recipe's, and as large."""
    try:
        report = json.loads((folder / "report.json").read_text())
        made = report["vocabulary"], report["vocab_size"]
        return made == (recipe.tokenizer, recipe.shape.vocab_size)
    except (OSError, ValueError, KeyError, TypeError):
        return False


# What a tokenizer must fit: a token store, a model, its recipe.


def store_problems(tokenizer) -> list[str]:
    """Why a token store cannot hold what this tokenizer gives, one sentence each."""
    wrong = []
    if (rows := vocabulary_rows(tokenizer)) > STORE_ROWS:
        wrong.append(f"the tokenizer has {_too_wide(rows)}.")
    if tokenizer.eos_token_id is None:
        wrong.append("the tokenizer has no EOS to stand behind each document: set its eos_token to "
                     "one of its tokens.")
    return wrong


def _too_wide(rows: int) -> str:
    return (f"ids up to {rows - 1:,}, but a token store keeps 16 bits of each "
            f"({STORE_ROWS - 1:,} at most): take a tokenizer of at most {STORE_ROWS:,} ids, or "
            "build one with 01_tokenizer")


def tokenizer_fit(tokenizer, rows: int) -> list[str]:
    """One sentence where the tokenizer has ids beyond the model's rows of embedding, else none."""
    needed = vocabulary_rows(tokenizer)
    return [f"the tokenizer needs {needed:,} rows, the model has only vocab_size = {rows:,}: take "
            "the tokenizer that it was trained with."] if needed > rows else []


def tokenizer_misfit(recipe: Recipe, tokenizer) -> str | None:
    """Why a tokenizer does not belong to a recipe ("has 4,096 tokens, ..."), or None."""
    size, wanted = vocabulary_rows(tokenizer), recipe.shape.vocab_size
    if size != wanted:
        other = count_parameters(dataclasses.replace(recipe.shape, vocab_size=size))
        return (f"has {size:,} tokens, {recipe.name} {wanted:,}: the model would have {other:,} "
                f"parameters instead of {count_parameters(recipe.shape):,}")
    if _is_ours(tokenizer) == (recipe.tokenizer == "bpe" or recipe.tokenizer.startswith("hf:")):
        kinds = ("a TokenMonster vocabulary", "a BPE")
        mine, theirs = kinds if _is_ours(tokenizer) else kinds[::-1]
        return f"is {mine}, {recipe.name} has {theirs}"


def _is_ours(tokenizer) -> bool:
    """Whether a tokenizer is a TokenMonster vocabulary, of tokenmonster_hf."""
    return hasattr(tokenizer, "vocabulary")


def fit_to_tokenizer(recipe: Recipe, tokenizer, say=print) -> Recipe:
    """The recipe with the tokenizer's vocabulary size, checked again.

    Where the two do not belong together, a recipe that names its tokenizer raises ParameterError;
    the CPU twin, which takes what 01 built, says it aloud.
    """
    rows = vocabulary_rows(tokenizer)
    if problems := store_problems(tokenizer):
        raise ParameterError(problems)
    if wrong := tokenizer_misfit(recipe, tokenizer):
        if recipe.tokenizer not in ("build", "bpe"):
            kind = "build" if _is_ours(tokenizer) else "bpe"
            on_purpose = {"vocab_size": rows, "tokenizer": kind}
            raise ParameterError([
                f"the tokenizer {wrong}. Run 01_tokenizer with PROFILE = 't4' or 'tpu' (it needs "
                f"no accelerator) and RECIPE = {recipe.name!r} for the recipe's own; to train the "
                f"other model on purpose: OVERRIDES = {on_purpose}."])
        say(f"NOTE: the tokenizer {wrong}.")
    shape = dataclasses.replace(recipe.shape, vocab_size=rows)
    fitted = dataclasses.replace(recipe, shape=shape)
    if problems := fitted.problems():
        raise ParameterError(problems)
    return fitted
