"""What two or more Stentor notebooks share: recipes, the one training loop, checkpoints, launch.

Top to bottom:  parameters checked -> recipes -> model -> precision -> checkpoints -> engine -> train -> launch.
Text, sources and the token store are in stentor_data.py, and imported here.
Also a command:  python -m stentor_utils train outputs/demo/run.json      (what `launch` starts)
"""
from __future__ import annotations

import contextlib
import copy
import dataclasses
import difflib
import errno
import faulthandler
import fcntl
import functools
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
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")       # transformers' too: they fill a papermill log
warnings.filterwarnings("ignore", message="IProgress not found")

import torch                                          # noqa: E402
import torch.nn.functional as F                       # noqa: E402
from torch import nn                                  # noqa: E402
from torch.overrides import TorchFunctionMode         # noqa: E402

from stentor_data import (                            # noqa: E402, F401  re-exported: notebooks import one name
    FeedStopped, GrowingStore, HubFile, ParameterError, Source, SourceError, TokenStore, clean_documents, clean_text,
    documents, encode_documents, fill_source, find_vocabulary, load_tokenizer, local_corpus, pin_revision, plan_sources,
    planned_shards, prepare_tokens, redact, source_files, source_names, tokenizer_problem,
    tokenizer_sha256, write_atomically)


# ---------------------------------------------------------------------------------------------------------------------
# Parameters are checked before any work starts, all of them, and every problem is one sentence.


def number(low=None, high=None, *, integer=False, optional=False):
    """A rule for `check_notebook_parameters`: a finite number in [low, high]; None too when `optional`."""
    def rule(value):
        if value is None and optional:
            return None
        kind = "a whole number" if integer else "a number"
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or (
                integer and value != int(value)):
            return f"must be {kind}"
        if low is not None and value < low:
            return f"must be at least {low:,}"
        if high is not None and value > high:
            return f"must be at most {high:,}"
    return rule


def check_notebook_parameters(namespace: dict, spec: dict) -> None:
    """Check a notebook's parameters: call it with `globals()` right after the parameters cell.

    spec maps each parameter to a rule: a type (or tuple of types), a set/list of allowed values, or a function that
    returns what is wrong ("must be at least 1") or None. A public variable that is not in `spec` is an unknown
    parameter: papermill only warns about `-p TOKENBUDGET 1` and would then train with the default.
    Raises ParameterError with every problem.
    """
    given = {name: value for name, value in namespace.items()
             if not name.startswith("_") and name not in {"In", "Out"} and not isinstance(value, types.ModuleType)
             and not callable(value)}
    problems = []
    for name in given:
        if name not in spec:
            near = difflib.get_close_matches(name.upper(), spec, n=1, cutoff=0.6)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(spec)}."
            problems.append(f"{name} is not a parameter of this notebook; {hint}")
    for name, rule in spec.items():
        if name not in given:
            problems.append(f"{name} is missing: run the parameters cell first.")
            continue
        value, wrong = given[name], None
        if isinstance(rule, (type, tuple)):
            if not isinstance(value, rule):
                kinds = rule if isinstance(rule, tuple) else (rule,)
                wrong = f"must be of type {' or '.join(kind.__name__ for kind in kinds)}"
        elif isinstance(rule, (set, frozenset, list, dict)):
            if value not in list(rule):
                near = difflib.get_close_matches(str(value), [str(v) for v in rule], n=1)
                wrong = f"must be one of {', '.join(map(str, rule))}" + (f" (did you mean {near[0]}?)" if near else "")
        else:
            wrong = rule(value)
        if wrong:
            problems.append(f"{name} = {value!r} {wrong}.")
        problems += secret_problems(**{name: value})
    if problems:
        raise ParameterError(problems)


def secret_problems(**values) -> list[str]:
    """One sentence for each value that holds what looks like a token or password; the sentence does not."""
    return [f"{name} holds what looks like a secret, and would be kept in clear (executed notebook, run.json): put it into the "
            "environment instead, such as HF_TOKEN." for name, value in values.items() if redact(repr(value)) != repr(value)]


def run_name(value) -> str | None:
    """A rule: RUN becomes a folder name, so no slashes, spaces or leading dots."""
    if not isinstance(value, str) or not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,99}", value):
        return "must be a plain name of letters, digits, '.', '_' and '-'"


def writable_folder(path) -> str | None:
    """What is wrong with `path` as a folder to write to ("cannot be written: ..."), or None; makes it if missing."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        probe = Path(path) / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        return f"is not a folder that can be written to ({error.strerror}); choose another"


# ---------------------------------------------------------------------------------------------------------------------
# Shapes and recipes. Every figure is from the model card named; where a card contradicts itself the exact parameter
# count decides (the table in the design notes). What a card does not print is taken from the Preview's card and listed
# in `unpublished`, so that nobody mistakes it for a published figure.


@dataclass(frozen=True)
class Shape:
    """The shape of a LlamaForCausalLM, in the names of `transformers.LlamaConfig`."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    max_position_embeddings: int = 1024
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = True

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    def problems(self) -> list[str]:
        rules = {"int": lambda v: type(v) is int and v > 0, "bool": lambda v: type(v) is bool,
                 "float": lambda v: not number()(v) and v > 0}
        kinds = {"int": "a positive whole number", "float": "a number above 0", "bool": "True or False"}
        wrong = [f"shape.{f.name} = {getattr(self, f.name)!r} must be {kinds[f.type]}."
                 for f in dataclasses.fields(self) if not rules[f.type](getattr(self, f.name))]
        if wrong:
            return wrong
        if self.hidden_size % self.num_attention_heads:
            wrong.append(f"shape.hidden_size = {self.hidden_size} is not divisible by num_attention_heads = "
                         f"{self.num_attention_heads}; head_dim must be whole: choose a multiple.")
        elif self.head_dim % 2:
            wrong.append(f"shape: head_dim = {self.head_dim} is odd; rotary embeddings need an even one.")
        if self.num_attention_heads % self.num_key_value_heads:
            wrong.append(f"shape.num_attention_heads = {self.num_attention_heads} is not divisible by "
                         f"num_key_value_heads = {self.num_key_value_heads}.")
        if self.vocab_size > 65_536:
            wrong.append(f"shape.vocab_size = {self.vocab_size:,} does not fit the uint16 token store (65,536 at most).")
        return wrong


def parameter_budget(shape: Shape) -> dict[str, int]:
    """Parameters by kind: embedding (with an untied lm_head), attention, ffn, norms; their sum is the model's total."""
    h, layers = shape.hidden_size, shape.num_hidden_layers
    kv = shape.num_key_value_heads * shape.head_dim
    return {"embedding": shape.vocab_size * h * (1 if shape.tie_word_embeddings else 2),
            "attention": layers * (2 * h * h + 2 * h * kv),               # q, o: h x h; k, v: h x kv
            "ffn": layers * 3 * h * shape.intermediate_size,              # gate, up, down
            "norms": layers * 2 * h + h}


def count_parameters(shape: Shape) -> int:
    """Trainable parameters of a LlamaForCausalLM of this shape; the published totals to the digit."""
    return sum(parameter_budget(shape).values())


def kv_cache_bytes(shape: Shape, length: int, bytes_per_element: float = 2) -> float:
    """Bytes of the key-value cache of one sequence: 2 x kv_heads x head_dim x layers x length x bytes (Stentor3 card).

    The card's table prints half of what its formula gives: stentor3-20m at 4,096 is 12 MiB in FP16 and 24 in FP32.
    """
    return 2 * shape.num_key_value_heads * shape.head_dim * shape.num_hidden_layers * length * bytes_per_element


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a pretraining run. `dataclasses.replace` changes it; `difference` prints the change."""
    name: str
    shape: Shape
    tokenizer: str                                    # released TokenMonster vocabulary, or a hub tokenizer
    sources: tuple[Source, ...]
    anneal_weights: tuple[float, ...] | None = None   # other source weights over the last `anneal_fraction` of the budget
    anneal_fraction: float = 0.15
    # optimiser: AdamW; decay on Linear weights only, not on embeddings, norms, biases
    learning_rate: float = 8e-4
    weight_decay: float = 0.01
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    optimizer: str | None = None                      # None: torch's AdamW; "paged_adamw_32bit": bitsandbytes' where a GPU is
    ema_decay: float | None = None                    # of the averaged weights that evaluation, best/ and final/ then use
    lr_scheduler_type: str = "cosine"                 # or "warmup_stable_decay", "cosine_with_restart"
    warmup_ratio: float = 0.05
    stable_ratio: float = 0.80                        # only warmup_stable_decay uses it; the cards print its steps anyway
    # batch and budget
    block_size: int = 1024
    per_device_train_batch_size: int = 32
    per_device_eval_batch_size: int = 16
    gradient_accumulation_steps: int = 2
    num_processes: int = 2                            # of the published run; the global batch is their product
    token_budget: int = 480_000_000
    source_token_budget: int | None = None            # tokens made from the sources; less than token_budget = epochs
    max_train_steps: int | None = None                # the schedule's length; None: computed from token_budget
    budget_check: str = "step"                        # or "micro_batch": stop in the middle of a step, as the Preview did
    # evaluation, checkpoints, log
    eval_steps: int = 900
    best_eval_steps: int = 900
    best_eval_start_step: int = 0
    max_eval_samples: int = 5_000                     # validation documents of each source
    save_every_minutes: float = 30
    save_total_limit: int = 2
    logging_steps: int = 300
    seed: int = 42
    # precision
    mixed_precision: str = "fp16"                     # "no" | "fp16" | "bf16"
    fp32_norms: bool = True
    fp32_critical_first: int = 2
    fp32_critical_last: int = 0
    fp32_softmax: bool = False
    int8_qat: bool = False
    attn_implementation: str = "sdpa"
    gradient_checkpointing: bool = False
    initialization: str = "normal"                    # or "residual_scaled" (Stentor3)
    published: dict = field(default_factory=dict)     # figures printed in the card, for comparison only
    unpublished: tuple[str, ...] = ()                 # fields that the card does not print

    @property
    def total_batch_size(self) -> int:
        """Sequences in one optimiser step, over all processes."""
        return self.per_device_train_batch_size * self.num_processes * self.gradient_accumulation_steps

    @property
    def tokens_per_step(self) -> int:
        return self.total_batch_size * self.block_size

    @property
    def schedule_steps(self) -> int:
        """The length the learning-rate schedule is laid out for (`max_train_steps` in the cards)."""
        return self.max_train_steps or -(-self.token_budget // self.tokens_per_step)

    @property
    def warmup_steps(self) -> int:
        return int(self.schedule_steps * self.warmup_ratio)

    @property
    def stable_steps(self) -> int:
        return int(self.schedule_steps * self.stable_ratio)

    @property
    def sequences_to_train(self) -> int:
        """Sequences after which the budget is spent: whole micro-batches or whole steps, and never past the schedule."""
        unit = self.total_batch_size
        if self.budget_check == "micro_batch":
            unit //= self.gradient_accumulation_steps
        return min(-(-self.token_budget // (unit * self.block_size)) * unit, self.schedule_steps * self.total_batch_size)

    @property
    def total_steps(self) -> int:
        return -(-self.sequences_to_train // self.total_batch_size)

    @property
    def total_tokens(self) -> int:
        return self.sequences_to_train * self.block_size

    @property
    def fp32_critical_layers(self) -> tuple[int, ...]:
        n = self.shape.num_hidden_layers
        return tuple(i for i in range(n) if i < self.fp32_critical_first or i >= n - self.fp32_critical_last)

    def learning_rate_at(self, update: int) -> float:
        """Learning rate of optimiser update number `update` (0-based), as transformers' schedules give it.

        cosine: linear warm-up from 0, then half a cosine to 0 at `schedule_steps`.
        warmup_stable_decay: warm-up, `stable_steps` at the peak, then a straight line to 0.
        cosine_with_restart: after the warm-up two half cosines, the second from the peak again (one restart).
        """
        if update < self.warmup_steps:
            return self.learning_rate * update / self.warmup_steps
        if self.lr_scheduler_type == "warmup_stable_decay":
            decay_start = self.warmup_steps + self.stable_steps
            if update < decay_start:
                return self.learning_rate
            return self.learning_rate * max(0.0, (self.schedule_steps - update) / (self.schedule_steps - decay_start))
        progress = (update - self.warmup_steps) / max(1, self.schedule_steps - self.warmup_steps)
        if self.lr_scheduler_type == "cosine_with_restart" and progress < 1:
            progress = 2 * progress % 1
        return self.learning_rate * max(0.0, 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0))))

    def problems(self) -> list[str]:
        """Everything wrong with this recipe, one sentence each."""
        wrong = self.shape.problems()
        positive = ("learning_rate", "block_size", "per_device_train_batch_size", "per_device_eval_batch_size",
                    "gradient_accumulation_steps", "num_processes", "token_budget", "eval_steps", "best_eval_steps",
                    "max_eval_samples", "save_every_minutes", "save_total_limit", "logging_steps", "max_grad_norm",
                    "adam_epsilon")
        whole = {f.name for f in dataclasses.fields(self) if f.type == "int"}
        for name in positive:
            rule = number(integer=name in whole)
            value = getattr(self, name)
            if rule(value) or value <= 0:
                wrong.append(f"{name} = {value!r} must be {'a whole number' if name in whole else 'a number'} above 0.")
        for name, low, high in (("warmup_ratio", 0, 1), ("stable_ratio", 0, 1), ("anneal_fraction", 0, 1),
                                ("adam_beta1", 0, 0.9999999), ("adam_beta2", 0, 0.9999999), ("weight_decay", 0, 10)):
            if reason := number(low, high)(getattr(self, name)):
                wrong.append(f"{name} = {getattr(self, name)!r} {reason}.")
        layers = None if wrong and wrong[0].startswith("shape.") else self.shape.num_hidden_layers
        for name, rule in {
                "ema_decay": number(0, 0.9999999, optional=True), "seed": number(0, 2**31 - 1, integer=True),
                "max_train_steps": number(1, integer=True, optional=True), "best_eval_start_step": number(0, integer=True),
                "source_token_budget": number(1, integer=True, optional=True),
                "fp32_critical_first": number(0, layers, integer=True), "fp32_critical_last": number(0, layers, integer=True),
                **{f.name: lambda value: None if isinstance(value, bool) else "must be True or False"
                   for f in dataclasses.fields(self) if f.type == "bool"}}.items():
            if reason := rule(getattr(self, name)):
                wrong.append(f"{name} = {getattr(self, name)!r} {reason}.")
        for name, allowed in (("lr_scheduler_type", ("cosine", "warmup_stable_decay", "cosine_with_restart")),
                              ("optimizer", (None, "paged_adamw_32bit")),
                              ("budget_check", ("step", "micro_batch")), ("mixed_precision", ("no", "fp16", "bf16")),
                              ("initialization", ("normal", "residual_scaled")),
                              ("attn_implementation", ("sdpa", "eager"))):
            if getattr(self, name) not in allowed:
                wrong.append(f"{name} = {getattr(self, name)!r} must be one of {', '.join(allowed)}.")
        bad = {sentence.split(" = ")[0] for sentence in wrong}
        if not bad & {"block_size", "shape.max_position_embeddings"} and self.block_size > self.shape.max_position_embeddings:
            wrong.append(f"block_size = {self.block_size} is longer than max_position_embeddings = "
                         f"{self.shape.max_position_embeddings}.")
        if not bad & {"warmup_ratio", "stable_ratio"} and self.lr_scheduler_type == "warmup_stable_decay" and (
                self.warmup_ratio + self.stable_ratio > 1):
            wrong.append(f"warmup_ratio + stable_ratio = {self.warmup_ratio + self.stable_ratio:g} must be at most 1.")
        if not self.sources:
            wrong.append("sources is empty: name at least one.")
        elif any(number(0)(s.weight) for s in self.sources) or not sum(s.weight for s in self.sources) > 0:
            wrong.append("the weights of the sources must be 0 or more, and not all 0.")
        if self.anneal_weights is not None and len(self.anneal_weights) != len(self.sources):
            wrong.append(f"anneal_weights has {len(self.anneal_weights)} weights for {len(self.sources)} sources.")
        return wrong + secret_problems(tokenizer=self.tokenizer, sources=[source.path for source in self.sources])

    def scaled_to(self, profile: str) -> Recipe:
        """The small twin of this recipe for `profile` "cpu": the same code path on 2 CPU cores and the embedded corpus.

        About 1.4M parameters and 4M tokens. AdamW at 4e-3: a trial found 3.91 nats/token there against 4.17 at the
        cards' 8e-4. At least one layer is not critical, so that INT8 keeps modules to work on. The twins of the recipes
        with a 32k BPE have a BPE too, with over half of an equal budget in the embedding, as Stentor-12M's 52%.
        """
        if profile != "cpu":
            raise ParameterError([f"profile {profile!r} has no scaled twin; the only one is 'cpu'."])
        s = self.shape
        kv_heads = 1 if s.num_key_value_heads < s.num_attention_heads else 2
        bpe = self.tokenizer.startswith("hf:")
        vocab_size, hidden_size, layers = (8192, 96, 5) if bpe else (
            min(s.vocab_size, 4096), 128, max(4, self.fp32_critical_first + self.fp32_critical_last + 1))
        shape = dataclasses.replace(
            s, vocab_size=vocab_size, hidden_size=hidden_size, intermediate_size=3 * hidden_size, num_hidden_layers=layers,
            num_attention_heads=2, num_key_value_heads=kv_heads, max_position_embeddings=256)
        local = {"code": Source("code", "local:code", preserve_linebreaks=True), "math": Source("math", "local:math")}
        sources = tuple(dataclasses.replace(local.get(source.name, Source("prose", "local:prose")), weight=source.weight)
                        for source in self.sources)
        merged = {}                                   # two web sources become one local:prose with their summed weight
        anneal = {}
        for i, source in enumerate(sources):
            weight = source.weight + (merged[source.name].weight if source.name in merged else 0)
            merged[source.name] = dataclasses.replace(source, weight=weight)
            if self.anneal_weights:
                anneal[source.name] = anneal.get(source.name, 0) + self.anneal_weights[i]
        return dataclasses.replace(
            self, name=f"{self.name}-cpu", shape=shape, tokenizer="bpe" if bpe else "build", sources=tuple(merged.values()),
            anneal_weights=tuple(anneal.values()) or None,
            learning_rate=4e-3, block_size=256, per_device_train_batch_size=16, per_device_eval_batch_size=32,
            gradient_accumulation_steps=1, num_processes=1, token_budget=4_000_000, source_token_budget=None,
            max_train_steps=None, eval_steps=250, best_eval_steps=250, best_eval_start_step=0, max_eval_samples=150,
            save_every_minutes=2, logging_steps=25, mixed_precision="bf16" if cpu_has_bf16() else "no", published={},
            unpublished=())

    def difference(self, other: Recipe) -> list[tuple[str, object, object]]:
        """(field, this, other) for every field that differs, shape fields by their own name."""
        rows = []
        for f in dataclasses.fields(Recipe):
            mine, theirs = getattr(self, f.name), getattr(other, f.name)
            if f.name == "shape":
                rows += [(f"shape.{g.name}", getattr(mine, g.name), getattr(theirs, g.name))
                         for g in dataclasses.fields(Shape) if getattr(mine, g.name) != getattr(theirs, g.name)]
            elif mine != theirs and f.name not in ("published", "unpublished"):
                rows.append((f.name, mine, theirs))
        return rows

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(values: dict) -> Recipe:
        values = dict(values)
        values["shape"] = Shape(**values["shape"])
        values["sources"] = tuple(Source(**source) for source in values["sources"])
        for name in ("anneal_weights", "unpublished"):
            values[name] = tuple(values[name]) if values.get(name) is not None else None
        return Recipe(**values)


@functools.cache
def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bf16 in hardware (AMX or AVX512-BF16): elsewhere bf16 autocast is slower than fp32."""
    try:
        return bool({"avx512_bf16", "amx_bf16"} & set(Path("/proc/cpuinfo").read_text().split()))
    except OSError:
        return False


def _llama(vocab, hidden, intermediate, layers, heads, kv_heads, context, **more) -> Shape:
    return Shape(vocab, hidden, intermediate, layers, heads, kv_heads, context, **more)


_FINEWEB_EDU = Source("fineweb-edu", "hf:HuggingFaceFW/fineweb-edu", config="sample-10BT")
_FINEWEB_HQ = Source("fineweb-hq", "hf:epfml/FineWeb-HQ")
_STENCORE = Source("stencore", "hf:StentorLabs/StenCore")
_COSMOPEDIA = Source("cosmopedia-v2", "hf:HuggingFaceTB/smollm-corpus", config="cosmopedia-v2")
_STENTOR3_SOURCES = (                                 # Stentor3 card: 75 / 15 / 10
    Source("web", "hf:epfml/FineWeb-HQ", 0.75, config="CC-MAIN-2024-51"),
    Source("code", "hf:Cyrile/dataset-the-stack-v2-dedup-sub", 0.15, config="Python", text_field="content",
           preserve_linebreaks=True),
    Source("math", "hf:HuggingFaceTB/finemath", 0.10, config="finemath-4plus"))
_SFT_SOURCES = (                                      # rows are dicts; a source without a commit is pinned when first read
    Source("falsereject", "hf:AmazonScience/FalseReject", 7_125, text_field=None),
    Source("beavertails", "hf:PKU-Alignment/BeaverTails", 5_708, split="30k_train", text_field=None,
           revision="8401fe609d288129cc684a9b3be6a93e41cfe678"),
    Source("dolly", "hf:databricks/databricks-dolly-15k", 5_153, text_field=None,
           revision="d72c16e4644a463b9c678c71d9440befd4594556"))
_UNSAID = ("learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps", "eval_steps", "logging_steps",
           "fp32_critical_first", "sources.weight")

_PREVIEW = Recipe(                                    # card: Stentor2-12M-Preview
    "stentor2-12m-preview", _llama(8064, 256, 768, 12, 4, 4, 1024), "english-8000-consistent-v1",
    (_FINEWEB_EDU, dataclasses.replace(_COSMOPEDIA, weight=0.0)), learning_rate=2e-4,
    per_device_train_batch_size=4, per_device_eval_batch_size=4, gradient_accumulation_steps=4, num_processes=1,
    token_budget=240_000_000, budget_check="micro_batch", eval_steps=375, best_eval_steps=375, max_eval_samples=2_000,
    logging_steps=125, fp32_critical_last=3, fp32_softmax=True, int8_qat=True, attn_implementation="eager",
    gradient_checkpointing=True,
    published={"parameters": 12_294_400, "best_eval_loss": 3.9145, "best_perplexity": 50.07, "final_eval_loss": 4.0083,
               "training_hours": 4.4})
_STENTOR2_12M = Recipe(                               # card: Stentor2-12M
    "stentor2-12m", _llama(8064, 256, 768, 12, 4, 4, 1024), "english-8000-strict-nocapcode-v1",
    (_FINEWEB_HQ, _STENCORE), source_token_budget=240_000_000, max_train_steps=9_552, best_eval_start_step=1_500,
    published={"parameters": 12_294_400, "best_eval_loss": 3.2814, "best_perplexity": 26.61, "final_eval_loss": 3.2565,
               "blimp": 68.95, "training_hours": 2.1})
_STENTOR_12M = dataclasses.replace(                   # figures of v1 as the later cards print them
    _PREVIEW, name="stentor-12m", shape=_llama(32_768, 192, 576, 12, 3, 3, 512), tokenizer="hf:StentorLabs/Stentor-12M",
    sources=(_FINEWEB_EDU, _COSMOPEDIA), block_size=512, token_budget=200_000_000, budget_check="step",
    fp32_critical_last=0, fp32_softmax=False, int8_qat=False, attn_implementation="sdpa", gradient_checkpointing=False,
    published={"parameters": 12_047_040, "best_eval_loss": 4.4887, "best_perplexity": 89.01, "training_hours": 1.3},
    unpublished=_UNSAID)
_STENTOR3_20M = Recipe(                               # card: Stentor3-20M
    "stentor3-20m", _llama(4096, 320, 1280, 12, 10, 2, 4096, rope_theta=50_000.0, tie_word_embeddings=False),
    "english-4096-strict-nocapcode-v1", _STENTOR3_SOURCES, anneal_weights=(0.50, 0.30, 0.20), block_size=4096,
    per_device_train_batch_size=8, per_device_eval_batch_size=8, gradient_accumulation_steps=1, num_processes=8,
    token_budget=8_500_000_000, source_token_budget=8_500_000_000, eval_steps=1_000, best_eval_steps=1_000,
    best_eval_start_step=1_000, mixed_precision="bf16", fp32_critical_first=1, fp32_critical_last=1,
    initialization="residual_scaled",
    published={"parameters": 20_324_160, "best_eval_loss": 2.6406, "best_perplexity": 14.02, "training_hours": 8.15,
               "tokens_per_second": 304_000},
    unpublished=("anneal_weights", "per_device_eval_batch_size", "logging_steps"))

RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in (
    _STENTOR_12M,
    dataclasses.replace(_STENTOR_12M, name="stentor-30m", shape=_llama(32_768, 256, 1024, 21, 4, 4, 512),
                        tokenizer="hf:StentorLabs/Stentor-30M", token_budget=600_000_000,
                        published={"parameters": 30_419_712, "best_perplexity": 33.02, "training_hours": 7.88}),
    _PREVIEW, _STENTOR2_12M,
    dataclasses.replace(_STENTOR2_12M, name="stentor2-30m", shape=_llama(8064, 512, 1024, 10, 8, 8, 1024),
                        token_budget=800_000_000, source_token_budget=None, max_train_steps=None,
                        published={"parameters": 30_353_920, "best_perplexity": 18.07, "training_hours": 6.75},
                        unpublished=_UNSAID),
    _STENTOR3_20M,
    dataclasses.replace(_STENTOR3_20M, name="stentor3-50m",
                        shape=_llama(4096, 512, 1536, 15, 8, 2, 4096, rope_theta=50_000.0, tie_word_embeddings=False),
                        token_budget=8_300_000_000, source_token_budget=8_300_000_000,
                        published={"parameters": 49_430_016, "best_perplexity": 9.64, "training_hours": 8.74},
                        unpublished=("anneal_weights", "per_device_train_batch_size", "learning_rate")),
    dataclasses.replace(_STENTOR3_20M, name="portimbria-150m",
                        shape=_llama(32_768, 768, 2048, 20, 6, 2, 4096), tokenizer="hf:StentorLabs/Portimbria-150M",
                        token_budget=6_000_000_000, source_token_budget=6_000_000_000,
                        published={"parameters": 151_026_432, "best_perplexity": 18.00, "training_hours": 8},
                        unpublished=("sources", "anneal_weights", "per_device_train_batch_size", "learning_rate")),
    dataclasses.replace(_STENTOR_12M, name="stentor-big", shape=_llama(32_768, 512, 2048, 30, 8, 8, 512),
                        tokenizer="hf:stas122/Stentor-Big", sources=(_FINEWEB_EDU,),
                        learning_rate=2e-4, per_device_train_batch_size=32, gradient_accumulation_steps=4,
                        token_budget=279_000_000, mixed_precision="bf16", gradient_checkpointing=True,   # stage 1 of 3
                        published={"parameters": 142_639_104}, unpublished=("block_size", "eval_steps")),
    # The main phase of the fine-tune; the other four, and LoRA, are in 04_instruct_sft. 273 steps hold 17,460 x 3 examples.
    # "Cosine with 1 restart" is taken at its word; transformers' num_cycles=1 would be a plain cosine.
    dataclasses.replace(_STENTOR_12M, name="stentor-12m-instruct", block_size=384, token_budget=273 * 192 * 384,
                        sources=(*_SFT_SOURCES, Source("seed-safety", "seed_safety.jsonl", 14, text_field=None)),
                        learning_rate=3e-5, lr_scheduler_type="cosine_with_restart", warmup_ratio=0.06, weight_decay=0.1,
                        optimizer="paged_adamw_32bit", adam_epsilon=1e-6, ema_decay=0.999, mixed_precision="no",
                        fp32_norms=False, fp32_critical_first=0, per_device_train_batch_size=48,
                        gradient_accumulation_steps=4, eval_steps=40, best_eval_steps=40, logging_steps=10,
                        published={"parameters": 12_047_040, "best_eval_loss": 4.300, "best_perplexity": 73.7},
                        unpublished=("adam_beta1", "adam_beta2")),
)}


# The twin of each recipe whose schedule is laid out for the real budget, so that the learning rate reaches its end: for
# stentor2-12m, whose run stopped at 73% of the peak, that is a change; for the others the two are equal.
REPAIRED: dict[str, Recipe] = {f"{name}-repaired": dataclasses.replace(recipe, name=f"{name}-repaired", max_train_steps=None)
                               for name, recipe in RECIPES.items()}
ALL_RECIPES = {**RECIPES, **REPAIRED}


def find_recipe(name: str, profile: str = "t4", overrides: dict | None = None) -> Recipe:
    """The recipe `name`, scaled when profile is "cpu", with `overrides` of its fields or of its shape's fields.

    Raises ParameterError with everything that is wrong: unknown recipe, unknown field, values out of range.
    """
    if name not in ALL_RECIPES:
        near = difflib.get_close_matches(name, ALL_RECIPES, n=1)
        raise ParameterError([f"RECIPE = {name!r} is not known" + (f" (did you mean {near[0]}?)" if near else "")
                              + f"; known: {', '.join(RECIPES)}, each also as ...-repaired."])
    recipe = ALL_RECIPES[name].scaled_to("cpu") if profile == "cpu" else ALL_RECIPES[name]
    shape_fields = {f.name for f in dataclasses.fields(Shape)}
    recipe_fields = {f.name for f in dataclasses.fields(Recipe)} - {"name", "shape", "published", "unpublished"}
    problems, in_shape, in_recipe = [], {}, {}
    for key, value in (overrides or {}).items():
        if key in shape_fields:
            in_shape[key] = value
        elif key in recipe_fields:
            in_recipe[key] = tuple(Source(**s) if isinstance(s, dict) else s for s in value) if key == "sources" else value
        else:
            near = difflib.get_close_matches(key, shape_fields | recipe_fields, n=1)
            problems.append(f"{key} is not a field of a recipe" + (f"; did you mean {near[0]}?" if near else "."))
    recipe = dataclasses.replace(recipe, shape=dataclasses.replace(recipe.shape, **in_shape), **in_recipe)
    if problems := problems + recipe.problems():
        raise ParameterError(problems)
    return recipe


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
        eos_token_id=eos_token_id, bos_token_id=bos_token_id, pad_token_id=eos_token_id, use_cache=False,
        attn_implementation=attn_implementation)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
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
# The precision recipe: the T4 / TPU stability techniques of the Stentor2 and Stentor3 cards, on a stock Llama. Each one
# puts a forward() in front of a module's own class. Parameters and their names stay where they were, so state_dict,
# save_pretrained, deepcopy, DDP and resume see a stock Llama.


def _to_fp32(value):
    """Floating tensors, also inside tuples such as (cos, sin), as FP32; masks of bools, ids and None as they are."""
    if isinstance(value, tuple):
        return tuple(_to_fp32(v) for v in value)
    return value.float() if torch.is_tensor(value) and value.is_floating_point() else value


class FP32Norm:
    """RMSNorm with one rounding, at its end. Stock Llama also squares in FP32, but rounds before multiplying by weight,
    and with an FP32 weight gives FP32 back for a half input."""

    def forward(self, hidden_states):                 # (batch, length, hidden_size)
        return super().forward(hidden_states.float().contiguous()).to(hidden_states.dtype)


class FP32Layer:
    """A whole layer outside autocast: every matmul, attention included, in FP32; gives back the dtype it was given."""

    def forward(self, hidden_states, *args, **kwargs):    # (batch, length, hidden_size)
        with torch.autocast(hidden_states.device.type, enabled=False):
            out = super().forward(hidden_states.float(), *_to_fp32(args), **{k: _to_fp32(v) for k, v in kwargs.items()})
        return out.to(hidden_states.dtype)


class _SoftmaxInFP32(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not F.softmax:
            return func(*args, **kwargs)
        return func(args[0].float(), *args[1:], **kwargs).to(kwargs.get("dtype") or args[0].dtype)


class FP32SoftmaxAttention:
    """Eager attention whose softmax is given FP32 scores, whatever this transformers version asks for."""

    def forward(self, *args, **kwargs):
        with _SoftmaxInFP32():
            return super().forward(*args, **kwargs)


def _int8_codes(x, stochastic):
    """x (..., k) -> int8 codes (..., k) and FP32 scales (..., 1) with x ~ codes * scales, one scale per row or token.

    Stochastic rounding, floor(v + u) with u uniform in [0, 1), is written round(v + n) with n = u - 1/2.
    n is an odd multiple of 2**-16 (so whole v stay as they are, and E[code] is v to within 2**-16), four of them cut
    from one int64: torch draws random numbers on one CPU core, where rand_like costs as much as a bf16 matmul.
    """
    scales = x.abs().amax(-1, keepdim=True).float().clamp_min(1e-8) / 127
    codes = x / scales
    if stochastic:
        bits = torch.randint(-(2**63), 2**63 - 1, (codes.numel() // 4 + 1,), device=x.device) | 0x0001_0001_0001_0001
        codes.add_(bits.view(torch.int16)[: codes.numel()].view_as(codes), alpha=2**-16)
    return codes.round_().clamp_(-127, 127).to(torch.int8), scales


class _Int8Matmul(torch.autograd.Function):
    """Gradients of x + (xq - x).detach() and w + (wq - w).detach(), but what waits for backward is int8."""

    @staticmethod
    def forward(ctx, x, weight, stochastic):          # (..., in), (out, in) -> (..., out)
        xq, xs = _int8_codes(x, stochastic)
        wq, ws = _int8_codes(weight, stochastic)
        ctx.save_for_backward(xq, xs, wq, ws)
        ctx.dtypes = x.dtype, weight.dtype
        return F.linear(xq * xs, wq * ws)             # autocast casts both to its dtype

    @staticmethod
    def backward(ctx, grad):
        xq, xs, wq, ws = ctx.saved_tensors
        grad_x = grad_w = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ (wq * ws).to(grad.dtype)).to(ctx.dtypes[0])
        if ctx.needs_input_grad[1]:
            grad_w = (grad.flatten(0, -2).T @ (xq * xs).to(grad.dtype).flatten(0, -2)).to(ctx.dtypes[1])
        return grad_x, grad_w, None


class Int8Linear(nn.Linear):
    """nn.Linear that multiplies int8-rounded, dequantised operands; `weight` is the FP32 master the optimiser sees."""

    def forward(self, x):
        out = _Int8Matmul.apply(x, self.weight, self.training)
        return out if self.bias is None else out + self.bias.to(out.dtype)


@functools.cache
def _in_front_of(stock: type, technique: type) -> type:
    """`technique` itself when it is a kind of `stock`, else a class of both (transformers is not imported for it)."""
    if issubclass(technique, stock):
        return technique
    return type(technique.__name__ + stock.__name__, (technique, stock), {"stock": stock})


def apply_precision_recipe(model, *, fp32_norms=False, fp32_critical_layers=(), int8_qat=False, fp32_softmax=False) -> dict:
    """Switch the cards' precision techniques on, in place; return the number of modules each one changed, and notes.

    model: LlamaForCausalLM with FP32 parameters, before DDP and torch.compile. torch.autocast decides about the rest.
    fp32_norms: every RMSNorm. fp32_critical_layers: indices of the layers run in FP32. int8_qat: every linear of the
    other layers (7 each). fp32_softmax: every attention, if it is eager. On 12 layers the cards count
        Stentor2-12M-Preview  all four, critical {0, 1, 9, 10, 11}   INT8 49  critical 5  norms 25  softmax 12
        Stentor2-12M          norms, critical {0, 1}, SDPA           INT8  0  critical 2  norms 25  softmax  0
        Stentor3-20M          norms, critical {0, 11}, SDPA          INT8  0  critical 2  norms 25  softmax  0

    A saved model reloads through AutoModelForCausalLM as a stock Llama with bit-equal weights. In eval mode its logits
    are bit-equal if INT8 is off (under autocast: and no layer is critical), and always once the recipe is applied to it
    again, because INT8 rounds in eval mode too, to nearest.
    torch.compile takes every technique without a graph break (its random numbers are others than eager mode's).
    Applying twice is harmless; only building a new model switches a technique off.
    Raises TypeError for another model class, ValueError for parameters that are not FP32 or layers that do not exist.
    """
    from transformers.models.llama import modeling_llama as llama
    if not isinstance(model, llama.LlamaForCausalLM):
        raise TypeError(f"The precision recipe is for a bare LlamaForCausalLM, not {type(model).__name__}; "
                        "apply it before DDP, PEFT or torch.compile wrap the model.")
    for name, p in model.named_parameters():
        if p.dtype != torch.float32:
            raise ValueError(f"The precision recipe needs FP32 master weights, but {name} is {p.dtype}; "
                             "load the model with dtype=torch.float32 and let torch.autocast choose the compute dtype.")
    layers, critical = model.model.layers, set(fp32_critical_layers)
    if not critical <= set(range(len(layers))):
        raise ValueError(f"fp32_critical_layers={sorted(critical)}, but this model has layers 0 to {len(layers) - 1}.")

    def apply(modules, stock, technique):
        found = [m for m in modules if isinstance(m, stock)]
        for m in found:
            m.__class__ = _in_front_of(getattr(type(m), "stock", type(m)), technique)
        return len(found)

    norms = linears = softmaxes = 0
    notes = []
    if fp32_norms:
        norms = apply(model.modules(), llama.LlamaRMSNorm, FP32Norm)
        notes.append("FP32 norms: with FP32 weights under autocast the residual stream is FP32 and stock Llama already "
                     "normalises in FP32, so results change only where hidden states are half.")
    apply([layers[i] for i in critical], llama.LlamaDecoderLayer, FP32Layer)
    if int8_qat:
        ordinary = [m for i, layer in enumerate(layers) if i not in critical for m in layer.modules()]
        linears = apply(ordinary, nn.Linear, Int8Linear)
        notes.append("INT8: a checkpoint reloaded as a plain Llama leaves the rounding out, so its logits differ by the "
                     "quantisation error until the recipe is applied again.")
    attention = model.config._attn_implementation
    if fp32_softmax and attention == "eager":
        softmaxes = apply(model.modules(), llama.LlamaAttention, FP32SoftmaxAttention)
        notes.append("FP32 softmax: transformers' eager attention already asks for it, so this pins it without "
                     "changing a bit; the scores q k^T keep the autocast dtype and in fp16 overflow past 65,504.")
    elif fp32_softmax:
        notes.append(f"FP32 softmax: skipped, because {attention} attention has no softmax call to wrap (its kernel "
                     'accumulates in FP32 itself); build the model with attn_implementation="eager" to have it.')
    return {"fp32_norm_modules": norms, "fp32_critical_layers": len(critical), "int8_linear_modules": linears,
            "fp32_softmax_modules": softmaxes, "notes": notes}


def rename_weight_master(state_dict: dict) -> dict:
    """Standard names for an old Preview checkpoint: X.weight_master -> X.weight, in place of a stale X.weight."""
    stale = {key.removesuffix("_master") for key in state_dict if key.endswith(".weight_master")}
    return {key.removesuffix("_master") if key.endswith(".weight_master") else key: value
            for key, value in state_dict.items() if key not in stale}


# ---------------------------------------------------------------------------------------------------------------------
# Sampling, and saving as a plain Hugging Face folder.

GENERATION = {"do_sample": True, "temperature": 0.8, "top_p": 0.7, "repetition_penalty": 1.2}   # Stentor2-12M card


def generate(model, tokenizer, prompts: list[str], *, max_new_tokens: int = 60, seed: int = 42, **settings) -> list[str]:
    """One continuation of each prompt (without the prompt), sampled with the Stentor2-12M card's favourite settings."""
    texts = []
    was_training = model.training
    model.eval()
    for i, prompt in enumerate(prompts):
        torch.manual_seed(seed + i)
        ids = torch.tensor([tokenizer(prompt, add_special_tokens=False)["input_ids"]], device=model.device)
        with torch.inference_mode():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, use_cache=True,
                                 pad_token_id=tokenizer.eos_token_id, **{**GENERATION, **settings})
        texts.append(tokenizer.decode(out[0, ids.shape[1]:].tolist(), skip_special_tokens=True))
    model.train(was_training)
    return texts


def save_model_folder(model, tokenizer, folder) -> None:
    """A plain Hugging Face folder, complete or not there at all: written beside, fsynced, then renamed into place.

    peft adapters are merged into a copy of the base weights first, so the folder loads where there is no peft.
    """
    from safetensors import SafetensorError
    folder = Path(folder)
    if hasattr(model, "merge_and_unload"):
        model = copy.deepcopy(model).merge_and_unload()
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    for left in folder.parent.glob(f".{folder.name}.[0-9]*"):                 # what a killed run left half-written
        shutil.rmtree(left, ignore_errors=True)
    use_cache, model.config.use_cache = model.config.use_cache, True          # generation wants it, training not
    try:
        model.save_pretrained(temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        _replace_folder(temporary, folder)
    except SafetensorError as error:                  # its own name for a write that failed
        raise OSError(errno.ENOSPC if "os error 28" in str(error) else errno.EIO, str(error)) from error
    finally:
        model.config.use_cache = use_cache
        shutil.rmtree(temporary, ignore_errors=True)


def load_model(folder, **settings):
    """AutoModelForCausalLM from a folder (or hub name) that nobody vouches for: safetensors only, and none of its code.

    settings: as for from_pretrained. Raises ParameterError, in one sentence, for pickled weights, code (auto_map), a kind of
    model that transformers does not have, a LoRA adapter, an index that points out of the folder, or damaged files.
    """
    from transformers import AutoModelForCausalLM
    path, problem = Path(folder), None
    try:
        if path.is_dir():
            config = json.loads((path / "config.json").read_text())
            index = path / "model.safetensors.index.json"
            files = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {"model.safetensors"}
            if "auto_map" in config:
                problem = "its config.json asks for code from elsewhere (auto_map)"
            elif (path / "adapter_config.json").exists():
                problem = "it holds a LoRA adapter, which names another model to load: merge the two first"
            elif strange := [name for name in files if Path(name).name != name or not name.endswith(".safetensors")]:
                problem = f"its index names {strange[0]!r}, which is not a .safetensors file of this folder"
            elif missing := [name for name in files if not (path / name).is_file()]:
                problem = f"{missing[0]} is not there (pickled weights, such as pytorch_model.bin, are never opened)"
        if not problem:
            return AutoModelForCausalLM.from_pretrained(str(folder).removeprefix("hf:"), trust_remote_code=False,
                                                        use_safetensors=True, **settings)
    except Exception as error:                        # whatever a crafted file makes of the parsers
        problem = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    raise ParameterError([f"{folder} cannot be loaded as a model: {problem}."])


def _replace_folder(temporary: Path, folder: Path) -> None:
    for path in temporary.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.rename(folder, old)
    os.rename(temporary, folder)
    _fsync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints: safetensors + JSON, never pickle. Written to a temporary folder, fsynced, hashed, renamed; the newest that
# verifies is loaded. No RNG state is kept: each step seeds itself from (seed, step), so there is none to lose.


class CheckpointError(RuntimeError):
    """A checkpoint does not belong to this run, or none of those present can be read."""


def checkpoint_folders(run_dir) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return sorted((Path(run_dir) / "checkpoints").glob("step-" + "[0-9]" * 8))


def save_checkpoint(run_dir, step: int, tensors: dict[str, dict[str, torch.Tensor]], state: dict, keep: int = 2) -> Path:
    """Save {"model": {...}, "optimizer": {...}} and the JSON-able `state` as checkpoints/step-NNNNNNNN; keep the newest."""
    from safetensors.torch import save
    folder = Path(run_dir) / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(".*step-*"):              # what a killed run left half-written
        shutil.rmtree(left, ignore_errors=True)
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
    if final.exists():                                # between the two renames only the temporary one is there: see
        os.rename(final, folder / f".old-{final.name}")       # load_checkpoint
    os.rename(temporary, final)
    _fsync_folder(folder)
    good = [path for path in checkpoint_folders(run_dir) if int(path.name[5:]) <= state.get("good_step", -1)][-1:]
    for old in checkpoint_folders(run_dir)[:-keep]:
        if old not in good:                           # renamed first: a half-deleted one must not look complete
            os.rename(old, old.with_name(f".old-{old.name}"))
    for gone in folder.glob(".old-step-*"):
        shutil.rmtree(gone)
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
        return {name.removesuffix(".safetensors"): load(value) for name, value in data.items()}, state
    except (OSError, ValueError, TypeError, KeyError, RecursionError, SafetensorError) as error:
        raise CheckpointError(f"{type(error).__name__}: {str(error)[:200]}") from error


def verify_checkpoint(folder: Path) -> str | None:
    """What is wrong with a checkpoint ("model.safetensors does not match its hash"), or None."""
    try:
        read_checkpoint(folder)
    except CheckpointError as error:
        return str(error)


def load_checkpoint(run_dir, say=print, newest: float = math.inf) -> tuple[dict[str, dict[str, torch.Tensor]], dict] | None:
    """(tensors, state) of the newest checkpoint, up to step `newest`, that verifies; None when there is none.

    A bad one is set aside (renamed to bad-step-N) and said so. Raises CheckpointError when there are only bad ones:
    starting again from step 0 must be somebody's decision.
    """
    for left in (Path(run_dir) / "checkpoints").glob(".step-*"):
        complete = left.with_name(left.name[1:])      # killed right before its last rename
        if not complete.exists() and not verify_checkpoint(left):
            os.rename(left, complete)
    folders = [folder for folder in checkpoint_folders(run_dir) if int(folder.name[5:]) <= newest]
    for folder in reversed(folders):
        try:
            return read_checkpoint(folder)
        except CheckpointError as problem:
            os.rename(folder, folder.with_name(f"bad-{folder.name}-{time.time_ns()}"))
            say(f"checkpoint {folder.name} set aside: {problem}")
    if folders or list((Path(run_dir) / "checkpoints").glob("bad-*")):
        raise CheckpointError(f"no checkpoint under {run_dir}/checkpoints can be read (all set aside as bad-...); delete "
                              "that folder to start from step 0.")
    return None


# ---------------------------------------------------------------------------------------------------------------------
# The engine: what differs between devices. This one serves the CPU and CUDA, with 1..N processes.


class ChunkedCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy of `hidden @ weight.T`, a few rows at a time, with the gradient made in the same pass.

    hidden (n, hidden_size), weight (vocab_size, hidden_size), targets (n,) with -100 where nothing is to be predicted;
    matrix products in `dtype`, the softmax in FP32. The (n, vocab_size) logits never exist: at 8 x 512 x 4,096 they and
    their gradients are 200 MB that leave the cache at every pass.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, dtype):
        rows = max(256, 2**22 // len(weight)) if hidden.device.type == "cpu" else max(1024, 2**26 // len(weight))
        w, valid, total = weight.to(dtype), targets != -100, hidden.new_zeros((), dtype=torch.float32)
        grad_hidden = torch.empty_like(hidden, dtype=dtype) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for i in range(0, len(hidden), rows):
            h, ok = hidden[i:i + rows].to(dtype), valid[i:i + rows, None]
            target = targets[i:i + rows, None].clamp(min=0)
            scores = (h @ w.T).float()                                               # (rows, vocab_size)
            largest, wanted = scores.amax(-1, keepdim=True), scores.gather(-1, target)
            scores.sub_(largest).exp_()                                              # one exponential a score
            normalizer = scores.sum(-1, keepdim=True)
            total += ((normalizer.log() + largest - wanted) * ok).sum()
            gradient = scores.mul_(ok / normalizer)                                  # softmax - one_hot, 0 where masked
            gradient = gradient.scatter_add_(-1, target, -ok.float()).to(dtype)
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
        return *grads, None, None


def use_chunked_loss(model) -> None:
    """Let a LlamaForCausalLM (bare or inside peft) compute its training loss by ChunkedCrossEntropy; the same loss.

    Only the call is replaced, on this object: without labels, or in eval mode, it is the stock forward.
    """
    from transformers import LlamaForCausalLM
    from transformers.modeling_outputs import CausalLMOutputWithPast
    llama = next(module for module in model.modules() if isinstance(module, LlamaForCausalLM))

    def forward(self, input_ids=None, labels=None, num_items_in_batch=None, **kwargs):
        if labels is None or not self.training:
            return type(self).forward(self, input_ids=input_ids, labels=labels, num_items_in_batch=num_items_in_batch, **kwargs)
        hidden = self.model(input_ids=input_ids, **kwargs).last_hidden_state[:, :-1].flatten(0, 1)
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        targets = labels[:, 1:].flatten()
        with torch.autocast(device, enabled=False):
            loss = ChunkedCrossEntropy.apply(hidden, self.lm_head.weight, targets, dtype)
        counted = (targets != -100).sum() if num_items_in_batch is None else num_items_in_batch
        return CausalLMOutputWithPast(loss=loss / counted)
    llama.forward = types.MethodType(forward, llama)


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

    def prepare(self, model):
        """The model to call in the loop: the chunked loss; DistributedDataParallel when there are several processes."""
        use_chunked_loss(model)
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
    """The recipe's optimiser: torch's fused AdamW, or bitsandbytes' paged one where it is asked for and there is a GPU."""
    settings = {"lr": recipe.learning_rate, "eps": recipe.adam_epsilon, "betas": (recipe.adam_beta1, recipe.adam_beta2)}
    if recipe.optimizer == "paged_adamw_32bit":
        if device.type == "cuda":
            from bitsandbytes.optim import PagedAdamW32bit
            return PagedAdamW32bit(groups, **settings)
        say(f"optimizer: torch's AdamW stands in for paged_adamw_32bit; pages are for a GPU's memory, this is {device}")
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
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.file.seek(0)
            raise ParameterError([f"{run_dir} is in use by {self.file.read().strip() or 'another run'}; wait for it, stop "
                                  "it, or choose another RUN."]) from None
        self.file.truncate(0)
        self.file.write(f"process {os.getpid()} on {platform.node()}, started {time.strftime('%Y-%m-%d %H:%M:%S')}")
        self.file.flush()

    def release(self):
        self.file.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):                           # also after an error, whose traceback would keep the lock alive
        self.release()


def run_fingerprint(recipe: Recipe, store) -> dict:
    """What must be equal for a checkpoint to be continued; cadences and micro-batch sizes may change, these may not."""
    free = {"name", "published", "unpublished", "per_device_train_batch_size", "per_device_eval_batch_size", "num_processes",
            "gradient_accumulation_steps", "eval_steps", "best_eval_steps", "best_eval_start_step", "save_every_minutes",
            "save_total_limit", "logging_steps", "gradient_checkpointing", "budget_check", "sources"}
    values = {key: value for key, value in recipe.to_dict().items() if key not in free}
    values |= {"total_batch_size": recipe.total_batch_size, "sequences_to_train": recipe.sequences_to_train,
               "source_weights": {source.name: source.weight for source in recipe.sources}}
    values["store"] = {name: [shard["sha256"] for shard in entry["shards"]]
                       for name, entry in store.manifest["sources"].items() if name in store.names}
    return json.loads(json.dumps(values))


class Metrics:
    """metrics.jsonl, and training_curves.csv (the cards' columns) made from it. Only process 0 writes."""

    def __init__(self, run_dir, keep_lines: int):
        self.folder = Path(run_dir)
        self.path = self.folder / "metrics.jsonl"
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        self.rows = [json.loads(line) for line in lines[:keep_lines]]        # later ones are trained again
        for left in self.folder.glob(".*.[0-9]*"):    # what write_atomically of a killed run left behind
            if left.is_file():
                left.unlink()
        self.write()

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
        """Every row is in the file, or OSError."""
        if not self.whole:
            self.write()

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


class TrainingDiverged(RuntimeError):
    """The run came apart again after it had gone back to a good checkpoint; the message says where, and what to try."""


def train(recipe: Recipe, store, run_dir, *, tokenizer=None, model=None, deadline_hours: float | None = None, say=None
          ) -> dict:
    """Train, or go on with, the run in `run_dir`; the only training loop there is.

    store: anything with .batch(step) -> {"input_ids", "labels"} int64 (total_batch_size, length), .validation(), .mixture,
    .epoch, .manifest, .names (TokenStore); more keys of a batch, such as attention_mask, go to the model too. With
    .evaluate(model, engine) -> the keys of `evaluate` and whatever else is to be logged, that is used, and no .validation();
    with .tokens_per_step, that is what a step is counted as. model: one that is built already, used as it is instead of the
    recipe's shape and precision techniques; only what requires gradients is trained and kept in checkpoints, and its start
    weights are part of what a checkpoint must match. Writes checkpoints/, metrics.jsonl, training_curves.csv, best/, final/ and
    summary.json; returns what summary.json holds.
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
            return _train(engine, recipe, store, run_dir, tokenizer, model, deadline_hours, say)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise TrainingFailed(f"{run_dir} has no room ({error.strerror}); its last checkpoint is kept: free some space and "
                                 "run the same again.") from error


def _train(engine, recipe, store, run_dir, tokenizer, model, deadline_hours, say) -> dict:
    main = engine.rank == 0
    started = time.monotonic()
    made_for = store.manifest.get("fingerprint", {}).get("tokenizer_sha256")
    if tokenizer is not None and made_for and made_for != tokenizer_sha256(tokenizer):
        raise ParameterError([f"the token store was made by the tokenizer {made_for[:12]}, given is "
                              f"{tokenizer_sha256(tokenizer)[:12]} (sha256); use the one it was made by."])

    # model, precision, optimiser
    if tokenizer is not None:
        tokenizer.model_max_length = recipe.shape.max_position_embeddings     # saved with the model; truncation goes by it
    special = {} if tokenizer is None else {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
    start_weights, precision = {}, {"notes": []}
    if model is None:
        model = build_model(recipe.shape, recipe.seed, initialization=recipe.initialization,
                            attn_implementation=engine.attention(recipe.attn_implementation), **special)
        precision = apply_precision_recipe(
            model, fp32_norms=recipe.fp32_norms, fp32_critical_layers=recipe.fp32_critical_layers,
            fp32_softmax=recipe.fp32_softmax, int8_qat=recipe.int8_qat)
    else:
        start_weights = {"start_weights": weights_sha256(model)}
    if recipe.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model = engine.place(model).train()
    optimizer = engine.optimizer(model, recipe, say)
    names = {parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if recipe.ema_decay and engine.static_shapes:
        raise ParameterError([f"ema_decay = {recipe.ema_decay} is not for XLA: set it to None, or use a GPU or the CPU."])
    averages = [parameter.detach().clone() for parameter in names] if recipe.ema_decay else []
    parallel = engine.prepare(model)

    # where to begin
    fingerprint = run_fingerprint(recipe, store) | start_weights
    state = {"step": 0, "updates": 0, "skipped_steps": 0, "best_eval_loss": None, "best_step": None, "seconds": 0.0,
             "evaluated_step": -1, "metrics_lines": 0, "scaler": {}, "window": [0.0, 0, 0], "fingerprint": fingerprint,
             # for going back: the last evaluation that was good, skipped steps in a row, the loss's running mean
             "good_step": -1, "nonfinite": 0, "loss_level": None, "rollbacks": []}
    if not main:
        engine.sum(0)                                 # process 0 reads first: it sets bad checkpoints aside
    loaded = load_checkpoint(run_dir, say)
    if main:
        engine.sum(0)
    if loaded:
        tensors, saved = loaded
        theirs = saved.get("fingerprint") or {"fingerprint": None}
        different = [f"{key} is {json.dumps(theirs.get(key))[:80]} in the checkpoint, "
                     f"{json.dumps(fingerprint.get(key))[:80]} in this run" for key in {**theirs, **fingerprint}
                     if theirs.get(key) != fingerprint.get(key)]
        if different:
            raise CheckpointError(f"{run_dir} holds checkpoints of another run: " + "; ".join(different)
                                  + ". Choose another RUN, or delete its checkpoints folder.")
        state = saved
        restore(model, optimizer, names, tensors)
        averages = [tensors["ema"][name].to(engine.device) for name in names.values()] if recipe.ema_decay else []
        if state["scaler"]:
            engine.scaler.load_state_dict(state["scaler"])
        say(f"going on from step {state['step']:,} of {recipe.total_steps:,}")
    metrics = Metrics(run_dir, state["metrics_lines"]) if main else None
    engine.begin(recipe, state, say)

    def save():
        nonlocal saved_step
        began = time.monotonic()
        progress = engine.read()
        state.update({key: progress[key] for key in ("updates", "skipped_steps")})
        if main:
            tensors = checkpoint_tensors(model, optimizer, names)
            if averages:
                tensors["ema"] = {name: average.cpu() for name, average in zip(names.values(), averages)}
            try:
                metrics.complete()
                save_checkpoint(run_dir, state["step"], tensors,
                                {**state, "scaler": engine.scaler.state_dict(), "metrics_lines": len(metrics.rows),
                                 "window": [progress["window_loss"], window_steps, window_skipped], "seconds": elapsed()},
                                recipe.save_total_limit)
                saved_step = state["step"]
                if hasattr(store, "release"):         # of a store that is filled meanwhile: what no checkpoint needs any more
                    store.release(int(checkpoint_folders(run_dir)[0].name[5:]))
            except OSError as error:                  # a full disk costs a checkpoint, not the training
                kept = "there is none yet" if saved_step is None else f"the last one, of step {saved_step:,}, is kept"
                say(f"WARNING: no checkpoint at step {state['step']:,} ({error.strerror}); {kept}. Free some space under "
                    f"{run_dir}.")
        slowest["save"] = max(slowest["save"], time.monotonic() - began)

    def go_back(why):
        """Weights and optimiser of the last good checkpoint; the batches since then are left out."""
        step, found = state["step"], None
        if len(state["rollbacks"]) < ROLLBACKS:
            found = load_checkpoint(run_dir, say, newest=state["good_step"])
        if not found:
            before = "; ".join(f"back from step {b:,} to {a:,} because {reason}" for a, b, reason in state["rollbacks"])
            raise TrainingDiverged(f"training came apart at step {step:,}: {why} ({before or 'no good checkpoint yet'}); the "
                                   f"learning rate was {engine.read()['learning_rate']:.2e}. Lower learning_rate or lengthen "
                                   "warmup_ratio under another RUN, and look at the batches of these steps.")
        tensors, saved = found
        optimizer.state.clear()
        restore(model, optimizer, names, tensors)
        for name, average in zip(names.values(), averages):
            average.copy_(tensors["ema"][name])
        state["rollbacks"].append([saved["step"], step, why])
        state.update(updates=saved["updates"], loss_level=saved["loss_level"], nonfinite=0,
                     window=[0.0, 0, state["skipped_steps"]])
        engine.begin(recipe, state, say)              # the loss scale stays where it has fallen to
        if main:
            metrics.add(kind="rollback", step=step, good_step=saved["step"], reason=why, elapsed_seconds=elapsed())
        say(f"step {step:>6,} | {why}: back to the weights of step {saved['step']:,}, the batches since then left out "
            f"({len(state['rollbacks'])} of {ROLLBACKS})")

    def elapsed():
        return state["seconds"] + time.monotonic() - started

    def asked_to_stop(seconds):
        """Why to stop before something that takes `seconds`, or None."""
        left = deadline_hours * 3600 - (time.monotonic() - started) if deadline_hours else math.inf
        return stop_reason(engine, stop, left - seconds - 3 * slowest["save"])

    stop, can_be_cut = [], []                         # filled by a signal and looked at between steps; not empty: raise at once

    def on_signal(received, frame):
        stop.append(received)
        if can_be_cut:
            can_be_cut.clear()
            raise CutShort

    if hasattr(store, "evaluate"):
        measure = store.evaluate
    else:
        validation_ids, validation_bytes = store.validation()

        def measure(model, engine=None):
            return evaluate(model, validation_ids, validation_bytes, block_size=recipe.block_size,
                            batch_size=recipe.per_device_eval_batch_size, engine=engine)
    step_tokens = getattr(store, "tokens_per_step", recipe.tokens_per_step)
    all_tokens = min(recipe.total_steps * step_tokens, recipe.total_tokens)
    trainable = sum(parameter.numel() for parameter in names)
    say((f"{trainable:,} of " if start_weights else "")
        + f"{sum(p.numel() for p in model.parameters()):,} parameters on {engine.device} x {engine.world_size}, "
        f"{engine.mixed_precision if engine.autocast_dtype else 'fp32'}; {recipe.total_steps:,} steps x "
        f"{step_tokens:,.0f} tokens; " + ", ".join(f"{k} {v}" for k, v in precision.items() if k != "notes"))
    for note in precision["notes"]:
        say(note)

    per_device = engine.micro_batch(parallel, store.batch(min(state["step"], recipe.total_steps - 1)),
                                    recipe.per_device_train_batch_size, say)
    first_step, last_save, saved_step = state["step"], time.monotonic(), state["step"] if loaded else None
    slowest = {"save": 1.0, "evaluation": 0.0, "step": 0.0}          # seconds, in this session
    # since the last line of the log: the steps (in the checkpoint, so that a resumed log is the same), and the clocks
    (_, window_steps, window_skipped), window_time, window_tokens, wait, stopped = state["window"], 0.0, 0, 0.0, None
    handlers = {number: signal.signal(number, on_signal)              # on every process: torchrun passes SIGTERM to all
                for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        while True:
            step = state["step"]
            # Save before evaluating (an evaluation that fails must not cost the training before it), then evaluate.
            last = step >= recipe.total_steps
            due = step % recipe.eval_steps == 0 or step % recipe.best_eval_steps == 0 or last
            if due and state["evaluated_step"] != step:
                save()
                last_save = began = time.monotonic()
                if stopped := asked_to_stop(slowest["evaluation"]):
                    break
                try:
                    with weights_swapped(list(names), averages), cut_short_by_a_signal(can_be_cut, engine):
                        result = measure(model, engine)
                except CutShort:
                    stopped = asked_to_stop(0)
                    break
                slowest["evaluation"] = max(slowest["evaluation"], time.monotonic() - began)
                state["evaluated_step"] = step
                if result["loss"] < (state["best_eval_loss"] or math.inf) + SPIKE and not state["nonfinite"]:
                    state["good_step"] = step
                best = step >= recipe.best_eval_start_step and (state["best_eval_loss"] is None
                                                                or result["loss"] < state["best_eval_loss"])
                before = {key: state[key] for key in ("best_eval_loss", "best_step")}
                if best:
                    state.update(best_eval_loss=result["loss"], best_step=step)
                if main:
                    extra = {key: value for key, value in result.items() if key not in
                             ("loss", "perplexity", "bits_per_byte", "tokens")}
                    metrics.add(kind="eval", step=step, tokens=min(round(step * step_tokens), all_tokens),
                                epoch=store.epoch(step), loss=result["loss"], perplexity=result["perplexity"],
                                bits_per_byte=result["bits_per_byte"], best=best, elapsed_seconds=elapsed(), **extra)
                    try:
                        metrics.write_curves(final_step=step if last else None)
                        if best and step:
                            with weights_swapped(list(names), averages):
                                save_model_folder(engine.on_cpu(model), tokenizer, run_dir / "best")
                    except OSError as error:
                        state.update(before)          # best/ still holds what it held: the next better one is written again
                        say(f"WARNING: best/ could not be written at step {step:,} ({error.strerror})")
                    say(f"step {step:>6,} | eval loss {result['loss']:.4f} | perplexity {result['perplexity']:,.2f} | "
                        f"{result['bits_per_byte']:.4f} bits per byte" + (" | best so far" if best and step else ""))
            if last:
                break
            if stopped := asked_to_stop(slowest["step"]):
                break
            lap = time.monotonic()

            # One optimiser step over the global batch. What it draws at random is a function of (seed, step, rank).
            began = time.monotonic()
            try:
                with cut_short_by_a_signal(can_be_cut, engine):               # it may have to wait for the hub
                    batch = engine.feed(store, step)
            except CutShort:
                stopped = asked_to_stop(0)
                break
            except FeedStopped:                       # what was trained is kept; the same call goes on from there
                save()
                raise
            wait += time.monotonic() - began
            torch.manual_seed((recipe.seed << 32) + step * 1024 + engine.rank)
            done = engine.step(parallel, optimizer, batch, per_device)
            if done and averages:
                update_ema(averages, list(names), recipe.ema_decay, engine.updates - 1)
            state["nonfinite"] = state["nonfinite"] + 1 if done is False else 0
            if done is False:
                say(f"step {step + 1:>6,} | gradient is not finite: step skipped"
                    + (f", loss scale {engine.loss_scale:,.0f}" if engine.scaler.is_enabled() else ""))
                if main:
                    metrics.add(kind="skipped", step=step + 1, batch=step, loss_scale=engine.loss_scale)
            in_a_row, trouble = state["nonfinite"], None
            state["step"] = step = step + 1

            # the log
            window_steps += 1
            window_tokens += min(step * step_tokens, all_tokens) - (step - 1) * step_tokens
            window_time += time.monotonic() - began
            if step == first_step + 2:                # what is compiled is compiled by now
                engine.wait()
                warm = time.monotonic()
            if step == first_step + 5:                # preflight: the first steps, measured
                engine.wait()
                a_step = (time.monotonic() - warm) / 3
                left = (recipe.total_steps - step) * a_step
                say(f"preflight: {a_step:.2f} s a step, {engine.memory()}; about {duration(left)} to go")
                if deadline_hours:
                    until = deadline_hours * 3600 - (time.monotonic() - started)
                    say(f"the session's deadline is in {duration(until)}: " + (
                        "the run fits" if left < until else "the run will be saved then; run it again to go on"))
            if step % recipe.logging_steps == 0 or step == recipe.total_steps:
                began = time.monotonic()
                progress = engine.read()
                window_time += time.monotonic() - began
                skipped = progress["skipped_steps"] - window_skipped
                mean, rate = progress["window_loss"] / max(1, window_steps - skipped), window_tokens / window_time
                if done is None:                      # XLA tells only now: as many in one window count as in a row
                    in_a_row = skipped
                level = state["loss_level"]
                if window_steps > skipped:
                    if level is not None and not mean <= level + SPIKE:
                        trouble = f"the loss rose to {mean:.2f} from about {level:.2f}"
                    else:
                        state["loss_level"] = mean if level is None else 0.9 * level + 0.1 * mean
                if main and window_steps > skipped:
                    metrics.add(kind="train", step=step, tokens=min(round(step * step_tokens), all_tokens),
                                epoch=store.epoch(step), loss=mean, learning_rate=progress["learning_rate"],
                                grad_norm=progress["grad_norm"], loss_scale=progress["loss_scale"],
                                skipped_steps=progress["skipped_steps"], tokens_per_second=rate, wait_seconds=wait,
                                elapsed_seconds=elapsed(), mixture=store.mixture(step - 1), **engine.counters())
                left = (recipe.total_steps - step) * step_tokens / rate
                say(f"step {step:>6,}/{recipe.total_steps:,} | loss {mean:.4f} | lr {progress['learning_rate']:.2e} | "
                    f"{rate:,.0f} tokens/s | {duration(left)} left")
                engine.clear_window()
                window_steps, window_time, window_tokens, wait, window_skipped = 0, 0.0, 0, 0.0, progress["skipped_steps"]
            if in_a_row >= NONFINITE_IN_A_ROW:
                trouble = f"the gradients of {in_a_row} steps in a row were not finite"
            if trouble:
                state["skipped_steps"] = engine.read()["skipped_steps"]
                go_back(trouble)
                window_steps, window_time, window_tokens, wait, window_skipped = 0, 0.0, 0, 0.0, state["skipped_steps"]
            slowest["step"] = max(slowest["step"], time.monotonic() - lap)
            if trouble or time.monotonic() - last_save > 60 * recipe.save_every_minutes:
                save()
                last_save = time.monotonic()
        if not stopped or saved_step != state["step"]:
            save()
        stopped = stopped or asked_to_stop(slowest["evaluation"])    # final/ can wait for the next session
    finally:
        for number_, handler in handlers.items():
            signal.signal(number_, handler)

    summary = {"recipe": recipe.name, "parameters": sum(p.numel() for p in model.parameters()), "step": state["step"],
               "steps": recipe.total_steps, "tokens": min(round(state["step"] * step_tokens), all_tokens),
               "skipped_steps": state["skipped_steps"], "best_eval_loss": state["best_eval_loss"],
               "best_step": state["best_step"], "seconds": elapsed(), "device": str(engine.device),
               "processes": engine.world_size, "precision": {"autocast": engine.mixed_precision, **precision},
               "stopped": stopped, **engine.counters()}
    if start_weights:
        summary["trainable_parameters"] = trainable
    if main and not stopped:
        with weights_swapped(list(names), averages):
            save_model_folder(engine.on_cpu(model), tokenizer, run_dir / "final")
        # What is reported is measured on what was saved, read back as anybody would.
        saved = engine.place(load_model(run_dir / "final", attn_implementation=engine.attention("sdpa")))
        result = measure(saved, engine if engine.world_size == 1 else None)
        rates = [row["tokens_per_second"] for row in metrics.rows if row["kind"] == "train"]
        summary |= {"eval_loss": result["loss"], "perplexity": result["perplexity"],
                    "bits_per_byte": result["bits_per_byte"], "eval_tokens": result["tokens"],
                    "tokens_per_second": float(np.median(rates))}
    if main:
        write_atomically(run_dir / "summary.json", json.dumps(summary, indent=1))
    engine.close()
    if stopped:
        say(f"stopped at step {state['step']:,} of {recipe.total_steps:,} ({stopped}); "
            + ("saved" if saved_step == state["step"] else f"last saved at step {saved_step}")
            + ". Run the same again to go on.")
    if stopped == "SIGINT":
        raise KeyboardInterrupt
    if stopped == "SIGTERM":
        raise SystemExit(143)
    return summary


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
    return "t4" if torch.cuda.device_count() else "cpu"


def write_model_card(run_dir, **settings) -> Path:
    """stentor_card.write_model_card: final/README.md, filled from the run's files alone."""
    import stentor_card                               # it imports this module
    return stentor_card.write_model_card(run_dir, **settings)


def find_outputs(outputs: str) -> Path:
    """A relative OUTPUTS is beside stentor_utils.py, or in the working folder where that is read-only (Kaggle inputs)."""
    here = Path(__file__).resolve().parent
    return Path(outputs) if Path(outputs).is_absolute() else (here if os.access(here, os.W_OK) else Path.cwd()) / outputs


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
# OMP_WAIT_POLICY: OpenMP threads spin while they wait for each other. When another process has the core that one of them
# waits for, they burn the time it needs: 1.4M parameters on 2 cores, tokens/s (median of 2 or 3 runs)
#     other busy processes      0        1        2
#     spinning (default)   16,700    3,700    2,800  (and less than 1,000 at worst)
#     passive              15,500    9,100    9,900
PROCESS_ENVIRONMENT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "4294967296", "MALLOC_TOP_PAD_": "67108864",
                       "OMP_WAIT_POLICY": "passive"}


class TrainingFailed(RuntimeError):
    """The training process ended with an error; the message is its last lines."""


def launch(recipe: Recipe, store_dir, tokenizer_dir, run_dir, *, num_processes: int | None = None,
           deadline_hours: float | None = None, xla: str | None = None, fill: dict | None = None, say=None) -> dict:
    """Write run.json and environment.json, train in a process of its own (several with torchrun), show its log here.

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
    write_atomically(run_dir / "run.json", json.dumps({
        "recipe": recipe.to_dict(), "store": os.path.relpath(store_dir, run_dir),
        "tokenizer": os.path.relpath(tokenizer_dir, run_dir), "deadline_hours": deadline_hours, "fill": fill}, indent=1))
    write_atomically(run_dir / "environment.json", json.dumps(environment(), indent=1))
    num_processes = 1 if xla else num_processes or max(1, torch.cuda.device_count())
    here = str(Path(__file__).resolve().parent)
    command = [sys.executable, "-m", "stentor_utils", "train", str(run_dir / "run.json")]
    if num_processes > 1:
        # What `accelerate launch` starts too, but also without a GPU. A process that crashes takes the others along; all
        # start again, once, from the last checkpoint.
        command[1:3] = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes),
                        "--max-restarts", "1", "--module", "stentor_utils"]
    t4_link = {"NCCL_P2P_DISABLE": "1", "NCCL_IB_DISABLE": "1"} if num_processes > 1 else {}   # T4s have no peer access
    env = {**PROCESS_ENVIRONMENT, **t4_link, **os.environ, "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false",
           "PYTHONPATH": os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))}
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


def train_from_file(path) -> dict:
    """What `launch` starts: train the run described by run.json."""
    path = Path(path).resolve()
    run = json.loads(path.read_text())
    recipe = Recipe.from_dict(run["recipe"])
    tokenizer = load_tokenizer(path.parent / run["tokenizer"])
    go = functools.partial(train, recipe, run_dir=path.parent, tokenizer=tokenizer, deadline_hours=run.get("deadline_hours"))
    if not run.get("fill"):
        return go(store=TokenStore(path.parent / run["store"], recipe))
    with fill_while_training(path, recipe, run["fill"]["shard_tokens"]) as failed:
        return go(store=GrowingStore(path.parent / run["store"], recipe, run["fill"]["shard_tokens"],
                                     rolling=run["fill"].get("rolling", False), failed=failed))


@contextlib.contextmanager
def fill_while_training(path, recipe: Recipe, shard_tokens: int):
    """Worker processes, one a source, as long as the block runs; gives a function that says what is wrong with them."""
    env = {key: value for key, value in os.environ.items() if key not in ("STENTOR_ENGINE", "CPU_NUM_DEVICES")}
    env |= {"PJRT_DEVICE": "CPU"}                     # they import transformers, which imports torch_xla: not the chips
    logs = {name: open(Path(path).parent / f"feed-{name}.log", "w+") for name in planned_shards(recipe, shard_tokens)}
    workers = {name: subprocess.Popen([sys.executable, "-m", "stentor_utils", "fill", str(path), name], env=env, stdout=log,
                                      stderr=log) for name, log in logs.items()}

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


def fill_from_file(path, name: str) -> None:
    """What a worker does: fill one source of the run described by run.json."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)      # the stop button: training ends its step, saves, and ends its workers
    path = Path(path).resolve()
    run = json.loads(path.read_text())
    fill_source(Recipe.from_dict(run["recipe"]), load_tokenizer(path.parent / run["tokenizer"]), path.parent / run["store"],
                name, shard_tokens=run["fill"]["shard_tokens"], ahead_shards=run["fill"].get("ahead_shards"))


def main(argv: list[str] | None = None) -> int:
    """`python -m stentor_utils train RUN_JSON`, and for its workers `fill RUN_JSON SOURCE`; exit code 2 for a refused
    parameter or checkpoint or a failed worker, 130 / 143 for a stop."""
    arguments = argv or sys.argv[1:]
    filling = len(arguments) == 3 and arguments[0] == "fill"
    if not filling and (len(arguments) != 2 or arguments[0] != "train"):
        print("usage: python -m stentor_utils train RUN_JSON", file=sys.stderr)
        return 2
    faulthandler.enable()                             # a crash in native code says where it was
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))       # where train() does not take it: before and after its loop
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
        # likely in the teardown of its communication threads; more than 100 tries did not show it again. Leave without.
        sys.stdout.flush()
        os._exit(0)
    return 0


if __name__ == "__main__":
    sys.modules.setdefault("stentor_utils", sys.modules["__main__"])      # one module, also for pickled worker functions
    sys.exit(main())
