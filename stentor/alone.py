"""A notebook alone: what it makes, takes or installs where no earlier notebook's output is there.

The order is one for all: what the run's folder has; the newest of the attached inputs; else made
here or, with internet, the published one. One line says what was chosen.
"""
from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import random
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

from stentor.cards import card_name
from stentor.checkpoints import newest_state
from stentor.files import ParameterError
from stentor.hub import is_hub_name
from stentor.kaggle import OFFLINE, internet, newest_run, on_kaggle
from stentor.recipes import Recipe, Source
from stentor.sources import clean_documents
from stentor.vocabulary import bpe_tokenizer, build_vocabulary, train_bpe

# Where the hub has the model of a recipe, as the cards write it; of the others no card says.
PUBLISHED_MODELS = {
    "stentor-12m": "hf:StentorLabs/Stentor-12M",
    "stentor-30m": "hf:StentorLabs/Stentor-30M",
    "stentor2-12m-preview": "hf:StentorLabs/Stentor2-12M-Preview",
    "stentor2-12m": "hf:StentorLabs/Stentor2-12M",
    "stentor3-20m": "hf:StentorLabs/Stentor3-20M",
    "portimbria-150m": "hf:StentorLabs/Portimbria-150M",
    "stentor-big": "hf:stas122/Stentor-Big",
    "stentor-12m-instruct": "hf:StentorLabs/Stentor-12M-Instruct",
}


@functools.cache
def _say_once(sentence: str) -> None:
    """A notebook asks in its check and again for the value: one line is enough."""
    print(sentence, flush=True)


# The model.


def published_model(recipe: str) -> str | None:
    """"hf:owner/name" of the model of the recipe's card; None where no card prints its address."""
    return PUBLISHED_MODELS.get(card_name(recipe))


def find_model(run_dir, named=None, published: str | None = None, what: str = "MODEL") -> str:
    """The model that a notebook begins from: a folder, or "hf:owner/name".

    `named`; run_dir/final; the newest final/ of an attached input; `published`, where there is
    internet. A line is printed where it is one of the last two. Raises ParameterError, in one
    sentence: what to attach, or which notebook to run.
    """
    own = Path(run_dir) / "final"
    if named:
        return str(named)
    if (own / "config.json").is_file():
        return str(own)
    begun = newest_state(run_dir).get("step")
    absent = f"{what}: there is no model in {own}" + (
        f" (its training has come to step {begun:,})" if begun is not None else "")
    if attached := newest_run("final", name=Path(run_dir).name):
        _say_once(f"{absent}; taken is {attached / 'final'}, attached.")
        return str(attached / "final")
    if published and internet():
        _say_once(f"{absent}; taken is {published.removeprefix('hf:')}, the published model.")
        return published
    raise ParameterError([f"{absent}; {_way_to_a_model(Path(run_dir).name, published)}."])


def _way_to_a_model(name: str, published: str | None) -> str:
    if not on_kaggle():
        return f"run 02_pretrain_t4 for RUN = {name!r} first, or name a model"
    switch = (f", or switch internet on (Settings > Internet) for {published.removeprefix('hf:')}"
              if published else "")
    return ("attach the output of a notebook that has trained one (Add Input > Your Work > "
            f"02_pretrain_t4 or 03_pretrain_tpu){switch}")


# The network, and what the image lacks.


def offline_problem(what: str) -> str | None:
    """One sentence where Kaggle's internet is off and `what` comes from the hub; or None.

    Elsewhere None: a machine may have a cache or a mirror, and `stentor.hub` says what is wrong.
    """
    if on_kaggle() and not internet():
        return f"{what} comes from the hub, and {OFFLINE}."
    return None


def bring(*requirements: str) -> list[str]:
    """Install what cannot be imported; the names of those that still cannot be.

    requirements: as pip takes them, "lm-eval==0.4.13". On Kaggle with internet only, and every
    package of the image stays as it is: a constraint file holds them all at their versions. What does
    not agree with them is installed alone, without what it depends on.
    """
    missing = [wanted for wanted in requirements if not _importable(wanted)]
    if missing and on_kaggle() and internet():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
               "--retries", "1", "--timeout", "15"]
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as held:
            held.write("".join(f"{line}\n" for line in _image()))
            held.flush()
            for wanted in missing:                    # one that fails leaves the others alone
                for how in (["--constraint", held.name], ["--no-deps"]):
                    if not subprocess.run([*pip, *how, wanted], capture_output=True).returncode:
                        break
        importlib.invalidate_caches()
    return [_module(wanted) for wanted in missing if not _importable(wanted)]


def _module(requirement: str) -> str:
    """"lm-eval==0.4.13" -> "lm_eval", the name that it is imported by."""
    for end, letter in enumerate(requirement):
        if not (letter.isalnum() or letter in "-_."):
            requirement = requirement[:end]
            break
    return requirement.replace("-", "_")


def _importable(requirement: str) -> bool:
    try:
        return importlib.util.find_spec(_module(requirement)) is not None
    except ValueError:                                # sys.modules holds None: hidden on purpose
        return False


def _image() -> list[str]:
    """"name==version" of every package that is installed; of two the first on the path."""
    from packaging.version import InvalidVersion, Version
    held = {}
    for found in metadata.distributions():
        with contextlib.suppress(InvalidVersion, TypeError):      # pip would refuse the whole file
            held.setdefault(found.metadata["Name"], Version(found.version))
    return [f"{name}=={version}" for name, version in held.items() if name]


# The tokenizer.


def builds_alone(recipe: Recipe) -> bool:
    """Whether a tokenizer can be built here: all of the recipe's text is on this disk."""
    return not any(is_hub_name(source.path) for source in recipe.sources if source.weight > 0)


def read_source(source: Source, held_out: int, megabytes: float, seed: int):
    """(held-out documents, training documents) of a source.

    Held out: the first `held_out`, on which training validates. Training: `megabytes` MB drawn by
    `seed` from the next 2 x as much, so that memory does not grow with the corpus.
    """
    first, pool, characters = [], [], 0
    for text in (text for text, skipped, _ in clean_documents(source) if not skipped):
        if len(first) < held_out:
            first.append(text)
        elif characters < 2e6 * megabytes:
            pool.append(text)
            characters += len(text)
        else:
            break
    random.Random(seed).shuffle(pool)
    training, characters = [], 0
    while pool and characters < 1e6 * megabytes:
        training.append(pool.pop())
        characters += len(training[-1])
    return first, training


# What 01 takes where its parameters are None: (MB of text, seconds for the build, rounds of swaps).
# On the CPU the rounds end it: the same text gives the same vocabulary however busy the machine is. The
# embedded text is that of the installed packages, so one package more is another vocabulary.
EFFORT = {"cpu": (6, 900, 12), "t4": (25, 170, 60), "tpu": (25, 170, 60)}


def build_tokenizer(recipe: Recipe, profile: str = "cpu", *, seed: int = 42, say=print):
    """(tokenizer, report) of recipe.shape.vocab_size rows, learnt from the recipe's own text.

    As 01 makes it with its default parameters: TokenMonster, mode strict, capcode 1; a byte-level
    BPE where the recipe says "bpe". Held-out documents are not learnt from. report: what 01 writes
    beside a tokenizer, as far as it is known by then. Raises as `documents` does.
    """
    from tokenmonster_hf import TokenMonsterTokenizer
    megabytes, seconds, rounds = EFFORT[profile]
    rows, total = recipe.shape.vocab_size, sum(source.weight for source in recipe.sources)
    held_out, training = set(), []
    for source in (source for source in recipe.sources if source.weight > 0):
        first, texts = read_source(source, recipe.max_eval_samples,
                                   megabytes * source.weight / total, seed)
        held_out.update(first)
        training += texts
    training = [text for text in training if text not in held_out]
    kind = "bpe" if recipe.tokenizer == "bpe" or recipe.tokenizer.startswith("hf:") else "build"
    report = {"vocabulary": kind, "vocab_size": rows, "recipe": recipe.name, "seed": seed,
              "training_documents": len(training), "training_characters": sum(map(len, training))}
    if kind == "bpe":
        return bpe_tokenizer(train_bpe(training, rows - 2)), report
    vocabulary, build = build_vocabulary(training, rows - 2, seed=seed, seconds=seconds,
                                         rounds=rounds, progress=say)
    report |= {"mode": "strict", "capcode": 1, "tokens": len(vocabulary),
               "build_seconds": build["seconds"], "build_finished": build["finished"],
               "build_history": build["history"]}
    return TokenMonsterTokenizer.from_vocabulary(vocabulary, vocab_size=rows), report
