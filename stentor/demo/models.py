"""Which models there are to try, and one thread that loads them, within a memory limit, and runs them.

Everything a model does happens in that one thread, in turn: what two people ask at once cannot mix,
memory holds the cache of one answer whatever waits, and torch keeps one pool of threads.
"""
from __future__ import annotations

import math
import os
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from stentor.alone import PUBLISHED_MODELS
from stentor.cards import card_name
from stentor.files import ParameterError, StentorError, read_object
from stentor.folders import load_model
from stentor.hub import hub_commit
from stentor.published import RECIPES
from stentor.shapes import count_parameters
from stentor.tokenizer import load_tokenizer, tokenizer_fit

# Baselines of the Stentor3 card's demo space, with their parameters in millions as their own cards
# print them: only to match sizes before a model is loaded, when it is counted.
BASELINES = {"EleutherAI/pythia-14m": 14, "EleutherAI/pythia-31m": 31, "EleutherAI/pythia-70m": 70,
             "EleutherAI/pythia-160m": 162, "distilbert/distilgpt2": 82, "openai-community/gpt2": 124,
             "facebook/opt-125m": 125, "EleutherAI/gpt-neo-125m": 125,
             "HuggingFaceTB/SmolLM2-135M": 135}


@dataclass(frozen=True)
class Entry:
    """A model that can be tried: its name on the page, and where it is."""
    name: str
    where: str                             # a folder, or a hub name "hf:owner/name"
    baseline: bool = False                 # nobody's here: what ours are held against
    chat: bool = False                     # tuned to answer: the chat's default
    parameters: int | None = None          # None: not known before it is loaded
    system: str = ""                       # the system prompt that it was tuned with
    recipe: str = ""                       # decides its presets


@dataclass
class Loaded:
    """A model in memory, ready to generate."""
    entry: Entry
    model: object
    tokenizer: object
    bytes: int

    @property
    def context(self) -> int:
        """Tokens that it can hold; a model that does not say gets 1,024."""
        config = self.model.config.get_text_config()
        return getattr(config, "max_position_embeddings", None) or 1024


# Which there are.

def find_models(outputs, baselines=(), hub: bool | None = None) -> list[Entry]:
    """Every model of the run folders in `outputs` (newest run first), the baselines, the hub's.

    baselines: folders of any transformers models, or hub names. hub: whether to offer the published
    models and the card's baselines; None asks the hub, once and briefly. Nothing is loaded.
    """
    # not: best/, which is the same model at another step
    found = []
    for folder in sorted(Path(outputs).glob("*"), key=_newest_model, reverse=True):
        found += models_of_run(folder)
    for where in baselines:
        folder = Path(where)
        name = folder.name if folder.is_dir() else str(where).removeprefix("hf:")
        found.append(Entry(name, str(where), True, parameters=_parameters(folder)))
    if hub or hub is None and hub_answers():
        found += hub_models()
    names = set()
    return [entry for entry in found if not (entry.name in names or names.add(entry.name))]


def _newest_model(folder: Path) -> float:
    times = [path.stat().st_mtime for path in (folder / "final" / "config.json",
             folder / "instruct" / "final" / "config.json") if path.is_file()]
    return max(times, default=0.0)


def models_of_run(folder) -> list[Entry]:
    """final/ and instruct/final/ of a run folder, those that are there."""
    folder, found = Path(folder), []
    run = read_object(folder / "run.json").get("recipe") or {}
    recipe = card_name(str(run.get("name", "")))
    if (folder / "final" / "config.json").is_file():
        found.append(Entry(folder.name, str(folder / "final"), recipe=recipe,
                           parameters=_parameters(folder / "final")))
    tuned = folder / "instruct" / "final"
    if (tuned / "config.json").is_file():
        system = read_object(folder / "instruct" / "sft_summary.json").get("system") or ""
        found.append(Entry(f"{folder.name}, instruct", str(tuned), chat=True, system=str(system),
                           recipe="stentor-12m-instruct", parameters=_parameters(tuned)))
    return found


def _parameters(folder: Path) -> int | None:
    """Parameters of a model folder, from the heads of its safetensors files; None without any."""
    from safetensors import safe_open
    total = 0
    try:
        for path in folder.glob("*.safetensors"):
            with safe_open(path, "pt") as file:
                total += sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())
    except Exception:                      # a damaged file: load_model will say so
        return None
    return total or None


def hub_models() -> list[Entry]:
    """The published models, and the baselines of the card's space, by their hub names."""
    ours = [Entry(hub.removeprefix("hf:"), hub, chat=name.endswith("instruct"), recipe=name,
                  parameters=count_parameters(RECIPES[name].shape))
            for name, hub in PUBLISHED_MODELS.items()]
    return ours + [Entry(hub, f"hf:{hub}", True, parameters=millions * 10**6)
                   for hub, millions in BASELINES.items()]


def hub_answers() -> bool:
    """Whether the hub can be reached: one question, not repeated."""
    from huggingface_hub import constants
    if constants.HF_HUB_OFFLINE:
        return False
    name = PUBLISHED_MODELS["stentor2-12m"]
    try:
        hub_commit("the demo", name, f"models/{name.removeprefix('hf:')}", "main", tries=1)
    except StentorError:
        return False
    return True


def closest(entry: Entry, others: list[Entry]) -> list[Entry]:
    """The others by how close their size is to `entry`'s, in the logarithm; unknown sizes last."""
    def distance(other):
        if not (entry.parameters and other.parameters):
            return math.inf
        return abs(math.log(other.parameters / entry.parameters))
    return sorted((other for other in others if other.name != entry.name), key=distance)


# In memory.

def memory_limit() -> int:
    """Bytes that the models may take: half of what is free now, at least 1 GB, at most 8 GB."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if torch.cuda.is_available():
        free = torch.cuda.mem_get_info()[0]
    return min(max(free // 2, 10**9), 8 * 10**9)


class Models:
    """The models by name, those in memory, and the one thread in which they work.

    limit: bytes of weights in memory at once; those used longest ago go first. None: `memory_limit`.
    """

    def __init__(self, entries: list[Entry], limit: int | None = None):
        if not entries:
            raise ParameterError([
                "there is no model to try: run notebook 02 or `make run` first, or name a folder "
                "of a transformers model (BASELINES)."])
        self.entries = {entry.name: entry for entry in entries}
        self.limit = limit or memory_limit()
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self._loaded: OrderedDict[str, Loaded] = OrderedDict()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")

    def submit(self, work, *arguments):
        """A Future of `work(*arguments)`, in the model's thread, after all that waits."""
        return self._thread.submit(work, *arguments)

    def close(self) -> None:
        """Ends the thread; what waits is dropped."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    @property
    def names(self) -> list[str]:
        return list(self.entries)

    def chat_default(self) -> str:
        """The first model that was tuned to answer, else the first."""
        return next((entry.name for entry in self.entries.values() if entry.chat), self.names[0])

    def load(self, name: str) -> Loaded:
        """The model `name`, in memory from now on. In the model's thread only.

        Raises ParameterError, one sentence, for one that is not listed, cannot be loaded, or does
        not fit the limit.
        """
        if name not in self.entries:
            raise ParameterError([f"there is no model {str(name)[:80]!r} here; choose one of the "
                                  "list."])
        if name in self._loaded:
            self._loaded.move_to_end(name)
            return self._loaded[name]
        entry = self.entries[name]
        if entry.parameters and 4 * entry.parameters > self.limit:
            raise ParameterError([self._too_large(name, 4 * entry.parameters)])
        self._make_room(4 * (entry.parameters or 0))
        model = load_model(entry.where, dtype=torch.float32).eval()
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        if size > self.limit:
            raise ParameterError([self._too_large(name, size)])
        tokenizer = load_tokenizer(entry.where)
        rows = model.config.get_text_config().vocab_size
        if problems := tokenizer_fit(tokenizer, rows):
            raise ParameterError(problems)
        self._make_room(size)
        self._loaded[name] = Loaded(entry, model.to(self.device), tokenizer, size)
        return self._loaded[name]

    def _too_large(self, name: str, size: int) -> str:
        return (f"{name} needs {size / 1e9:.1f} GB, and the demo may hold {self.limit / 1e9:.1f} GB "
                "of models: choose a smaller one, or start it with a higher MEMORY_GB.")

    def _make_room(self, size: int) -> None:
        while self._loaded and size + sum(one.bytes for one in self._loaded.values()) > self.limit:
            self._loaded.popitem(last=False)
            if self.device == "cuda":
                torch.cuda.empty_cache()

    def in_memory(self) -> dict[str, int]:
        """{name: bytes} of the models that are loaded, the one used longest ago first."""
        return {name: one.bytes for name, one in self._loaded.items()}
