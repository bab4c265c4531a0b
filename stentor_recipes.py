"""Parameters and recipes: the rules that notebooks check, the shape of a model, and every published recipe.

Needs no model and no GPU; stentor_utils re-exports all of it.
"""
from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import json
import math
import numbers
import os
import re
import shutil
import sys
import tempfile
import time
import types
from dataclasses import dataclass, field
from pathlib import Path

from stentor_data import (
    ParameterError, Source, find_vocabulary, load_tokenizer, redact, store_problems, tokenizer_problem, vocabulary_rows)

# ---------------------------------------------------------------------------------------------------------------------
# Parameters are checked before any work starts, all of them, and every problem is one sentence.


LARGEST = 2**63 - 1                                   # whole number that an array's index or a file's size can be


def number(low=None, high=None, *, integer=False, optional=False):
    """A rule for `check_notebook_parameters`: a finite number in [low, high]; None too when `optional`.

    With `integer` a whole one, which is made an int: 1e6 passes as 1000000.
    """
    kind = "a whole number" if integer else "a number"
    top = high if high is not None else LARGEST if integer else sys.float_info.max

    def rule(value):
        if value is None and optional:
            return None
        if isinstance(value, bool) or not isinstance(value, numbers.Real) or value != value:
            return f"must be {kind}"
        if abs(value) == math.inf or integer and value != int(value):
            return f"must be {kind}"
        if low is not None and value < low:
            return f"must be at least {low:,}"
        if value > top:                               # 10**400 too, which no float holds
            return f"must be at most {top:,}" if top < 1e19 else f"must be at most {top:g}"

    def convert(value):
        if value is None or type(value) in (int, float) and not integer:
            return value
        return int(value) if integer else float(value)
    rule.convert = convert
    return rule


def string(*, optional=False, empty=False):
    """A rule: text that a file can hold (no NUL, no half of an emoji); "" only with `empty`, None with `optional`."""
    def rule(value):
        if value is None and optional:
            return None
        if not isinstance(value, str):
            return "must be text"
        if not value and not empty:
            return "must not be empty"
        if "\0" in value:
            return "must not hold a NUL character"
        if re.search("[\ud800-\udfff]", value):
            return "must be text that UTF-8 can hold"
    return rule


def items(rule, *, optional=False, empty=False, repeated=False):
    """A rule: a list (or tuple) whose every item passes `rule`; `empty` and `repeated` say that it may be so."""
    def check(values):
        if values is None and optional:
            return None
        if not isinstance(values, (list, tuple)):
            return "must be a list"
        if not values and not empty:
            return "must not be empty"
        for i, value in enumerate(values):
            if wrong := problem_with(value, rule):
                return f"has {shown(value)} in place {i + 1}, which {wrong}"
            if not repeated and value in values[:i]:
                return f"holds {shown(value)} twice"

    check.convert = lambda values: values and [as_wanted(value, rule) for value in values]
    return check


# The settings of `su.generate` that a notebook takes, under their names in transformers.GenerationConfig.
_GENERATION_RULES = {
    "do_sample": bool, "temperature": number(1e-6, 1e6), "top_p": number(1e-9, 1), "min_p": number(0, 1),
    "typical_p": number(1e-9, 1), "top_k": number(0, integer=True), "repetition_penalty": number(1e-6, 1e6),
    "no_repeat_ngram_size": number(0, integer=True), "max_new_tokens": number(1, integer=True)}


def generation_settings(value) -> str | None:
    """A rule: a dict of settings for sampling, each known and in range."""
    if not isinstance(value, dict):
        return "must be a dict"
    for name, setting in value.items():
        if name not in _GENERATION_RULES:
            return f"has {shown(name)}, which is none of {', '.join(_GENERATION_RULES)}"
        if wrong := problem_with(setting, _GENERATION_RULES[name]):
            return f"has {name} = {shown(setting)}, which {wrong}"


generation_settings.convert = lambda value: {
    name: as_wanted(setting, _GENERATION_RULES[name]) for name, setting in value.items()}


def shown(value) -> str:
    """`value` as it would be typed, for a message: without secrets, and cut where it is long."""
    try:
        whole = redact(repr(value))
    except ValueError:                                # Python writes no int of over 4,300 digits
        return "a number of thousands of digits"
    return whole if len(whole) <= 200 else f"{whole[:200]}..."


def problem_with(value, rule) -> str | None:
    """What is wrong with `value` by `rule` ("must be at least 1"), or None; rules as in check_notebook_parameters."""
    if isinstance(rule, (type, tuple)):
        kinds = rule if isinstance(rule, tuple) else (rule,)
        if not isinstance(value, kinds) or isinstance(value, bool) and bool not in kinds:
            return f"must be of type {' or '.join(kind.__name__ for kind in kinds)}"
    elif isinstance(rule, (set, frozenset, list, dict)):
        if not _allowed(value, rule):
            near = difflib.get_close_matches(str(value)[:100], [str(v) for v in rule], n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            return f"must be one of {', '.join(map(str, rule))}{hint}"
    else:
        return rule(value)


def as_wanted(value, rule):
    """A value that passes `rule` in the type that the rule wants: 1e6 as 1000000, a tuple as a list."""
    if isinstance(rule, (set, frozenset, list, dict)):
        return _allowed(value, rule)[0]
    return rule.convert(value) if hasattr(rule, "convert") else value


def _allowed(value, choices) -> list:
    """The choice that equals `value`, in a list; True is not 1."""
    return [choice for choice in choices if isinstance(choice, bool) == isinstance(value, bool) and choice == value]


def check_notebook_parameters(namespace: dict, spec: dict) -> None:
    """Check a notebook's parameters: call it with `globals()` right after the parameters cell.

    spec maps each parameter to a rule: a type (or tuple of types), a set/list of allowed values, or a function that
    returns what is wrong ("must be at least 1") or None. A public variable that is not in `spec` is an unknown
    parameter: papermill only warns about `-p TOKENBUDGET 1` and would then train with the default.
    Raises ParameterError with every problem. Without any, whole numbers written as floats are made int in `namespace`.
    The session's clock starts at the first call.
    """
    session_start()
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
        if wrong := problem_with(given[name], rule):
            problems.append(f"{name} = {shown(given[name])} {wrong}.")
        problems += secret_problems(**{name: given[name]})
    if problems:
        raise ParameterError(problems)
    namespace.update({name: as_wanted(given[name], rule) for name, rule in spec.items()})


def secret_problems(**values) -> list[str]:
    """One sentence for each value that holds what looks like a token or password; the sentence does not."""
    def secret(value):
        try:
            return redact(repr(value)) != repr(value) or isinstance(value, str) and redact(value) != value
        except ValueError:                            # a number too long to be written is no secret
            return False
    return [f"{name} holds what looks like a secret, and would be kept in clear (executed notebook, run.json): put it into the "
            "environment instead, such as HF_TOKEN." for name, value in values.items() if secret(value)]


# Names that a folder cannot have on Windows, and the one that `make bench` writes to beside the runs.
_RESERVED = {"con", "prn", "aux", "nul", "benchmarks",
             *(f"{port}{i}" for port in ("com", "lpt") for i in range(10))}


def run_name(value) -> str | None:
    """A rule: RUN becomes a folder's name, so no slashes, spaces or leading dots, and not too long for a file system."""
    if not isinstance(value, str) or not re.fullmatch(r"[A-Za-z0-9][\w.-]*", value) or value.endswith("."):
        return "must be a plain name of letters, digits, '.', '_' and '-'"
    if len(value.encode()) > 100:
        return "must be at most 100 bytes long"
    if value.split(".")[0].lower() in _RESERVED:
        return "is a reserved name; choose another"


def writable_folder(path) -> str | None:
    """What is wrong with `path` as a folder to write to ("is not a folder ..."), or None.

    Nothing is created: the nearest folder above that is there decides, by an unnamed file.
    """
    try:
        path = Path(path)
        with contextlib.suppress(FileNotFoundError):
            os.lstat(path)                            # a name too long, a file in the way
        nearest = next(folder for folder in (path, *path.parents) if os.path.lexists(folder))
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        return f"is not a folder that can be written to ({reason}); choose another"


# ---------------------------------------------------------------------------------------------------------------------
# The session. Kaggle ends GPU and CPU sessions after 12 hours and a TPU's after 9; half an hour is for what comes after
# training. One deadline for all notebooks: so many hours after the first check, on the clock that nobody sets.

SESSION_HOURS = {"t4": 11.5, "cpu": 11.5, "tpu": 8.5}


@functools.cache
def session_start() -> float:
    """time.monotonic() of the first check of parameters in this process; checking again does not begin a new session."""
    return time.monotonic()


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


# ---------------------------------------------------------------------------------------------------------------------
# Shapes and recipes. Every figure is from the model card named; where a card contradicts itself the exact parameter
# count decides (the table in the design notes). What a card does not print is taken from the Preview's card and listed
# in `unpublished`, so that nobody mistakes it for a published figure.


def _settle_types(record) -> None:
    """In a frozen dataclass, as it is made: 1e6 in a field of type int becomes 1000000, a list becomes a tuple."""
    for f in dataclasses.fields(record):
        value = getattr(record, f.name)
        if f.type.startswith("int") and value is not None and not number(integer=True)(value):
            object.__setattr__(record, f.name, int(value))
        elif f.type.startswith("tuple") and isinstance(value, list):
            object.__setattr__(record, f.name, tuple(value))


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

    __post_init__ = _settle_types

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    def problems(self) -> list[str]:
        rules = {"int": lambda v: not number(1, 2**31, integer=True)(v), "bool": lambda v: type(v) is bool,
                 "float": lambda v: not number()(v) and v > 0}
        kinds = {"int": "a positive whole number", "float": "a number above 0", "bool": "True or False"}
        wrong = [f"shape.{f.name} = {shown(getattr(self, f.name))} must be {kinds[f.type]}."
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


MOST_SEQUENCES = 2**28                                # of a run: their plan is held in memory, 8 bytes each


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
    torch_compile: bool = False                       # layers and loss; on a CPU fastest with "eager" attention; not on XLA
    initialization: str = "normal"                    # or "residual_scaled" (Stentor3)
    published: dict = field(default_factory=dict)     # figures printed in the card, for comparison only
    unpublished: tuple[str, ...] = ()                 # fields that the card does not print

    __post_init__ = _settle_types

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
                limit = "" if rule(value) is None or "number" in rule(value) else f" and {rule(value)[8:]}"
                kind = "a whole number" if name in whole else "a number"
                wrong.append(f"{name} = {shown(value)} must be {kind} above 0{limit}.")
        for name, low, high in (("warmup_ratio", 0, 1), ("stable_ratio", 0, 1), ("anneal_fraction", 0, 1),
                                ("adam_beta1", 0, 0.9999999), ("adam_beta2", 0, 0.9999999), ("weight_decay", 0, 10)):
            if reason := number(low, high)(getattr(self, name)):
                wrong.append(f"{name} = {shown(getattr(self, name))} {reason}.")
        layers = None if wrong and wrong[0].startswith("shape.") else self.shape.num_hidden_layers
        for name, rule in {
                "ema_decay": number(0, 0.9999999, optional=True), "seed": number(0, 2**31 - 1, integer=True),
                "max_train_steps": number(1, integer=True, optional=True), "best_eval_start_step": number(0, integer=True),
                "source_token_budget": number(1, integer=True, optional=True),
                "fp32_critical_first": number(0, layers, integer=True), "fp32_critical_last": number(0, layers, integer=True),
                **{f.name: lambda value: None if isinstance(value, bool) else "must be True or False"
                   for f in dataclasses.fields(self) if f.type == "bool"}}.items():
            if reason := rule(getattr(self, name)):
                wrong.append(f"{name} = {shown(getattr(self, name))} {reason}.")
        for name, allowed in (("lr_scheduler_type", ("cosine", "warmup_stable_decay", "cosine_with_restart")),
                              ("optimizer", (None, "paged_adamw_32bit")),
                              ("budget_check", ("step", "micro_batch")), ("mixed_precision", ("no", "fp16", "bf16")),
                              ("initialization", ("normal", "residual_scaled")),
                              ("attn_implementation", ("sdpa", "eager"))):
            if getattr(self, name) not in allowed:
                wrong.append(f"{name} = {shown(getattr(self, name))} must be one of {', '.join(map(str, allowed))}.")
        bad = {sentence.split(" = ")[0] for sentence in wrong}
        batch = {"block_size", "per_device_train_batch_size", "gradient_accumulation_steps", "num_processes", "token_budget",
                 "max_train_steps", "budget_check"}
        if not bad & batch and self.sequences_to_train > MOST_SEQUENCES:
            wrong.append(f"token_budget = {self.token_budget:,} makes {self.sequences_to_train:,} sequences of block_size = "
                         f"{self.block_size}; a run can plan at most {MOST_SEQUENCES:,}.")
        if not bad & {"block_size", "shape.max_position_embeddings"} and self.block_size > self.shape.max_position_embeddings:
            wrong.append(f"block_size = {self.block_size} is longer than max_position_embeddings = "
                         f"{self.shape.max_position_embeddings}.")
        if not bad & {"warmup_ratio", "stable_ratio"} and self.lr_scheduler_type == "warmup_stable_decay" and (
                self.warmup_ratio + self.stable_ratio > 1):
            wrong.append(f"warmup_ratio + stable_ratio = {self.warmup_ratio + self.stable_ratio:g} must be at most 1.")
        if self.torch_compile is True and not shutil.which(compiler := os.environ.get("CXX", "g++")):
            wrong.append(f"torch_compile = True needs a C++ compiler, and {compiler} is not here: install it, or set "
                         "torch_compile to False.")
        return wrong + self._source_problems() + secret_problems(
            tokenizer=self.tokenizer, sources=[getattr(source, "path", None) for source in self.sources or ()])

    def _source_problems(self) -> list[str]:
        """What is wrong with the sources, their weights and the tokenizer's name."""
        wrong = [f"{name} = {shown(getattr(self, name))} {reason}." for name in ("name", "tokenizer")
                 if (reason := string()(getattr(self, name)))]
        if not isinstance(self.sources, tuple) or not all(isinstance(source, Source) for source in self.sources):
            return [*wrong, f"sources = {shown(self.sources)} must be a list of sources, each with a name and a path."]
        if not self.sources:
            return [*wrong, "sources is empty: name at least one."]
        rules = {"name": run_name, "path": string(), "weight": number(0), "config": string(optional=True), "split": string(),
                 "revision": string(optional=True), "text_field": string(optional=True), "preserve_linebreaks": bool}
        for i, source in enumerate(self.sources):
            wrong += [f"sources: {field} = {shown(getattr(source, field))} of source {i + 1} {reason}." for field, rule
                      in rules.items() if field != "weight" and (reason := problem_with(getattr(source, field), rule))]
            if source.name in [other.name for other in self.sources[:i]]:
                wrong.append(f"sources: {shown(source.name)} is the name of two sources; each needs one of its own.")
        if not _are_weights([source.weight for source in self.sources]):
            wrong.append("the weights of the sources must be 0 or more, and not all 0.")
        if self.anneal_weights is not None and not isinstance(self.anneal_weights, tuple):
            wrong.append(f"anneal_weights = {shown(self.anneal_weights)} must be a list of weights.")
        elif self.anneal_weights is not None and len(self.anneal_weights) != len(self.sources):
            wrong.append(f"anneal_weights has {len(self.anneal_weights)} weights for {len(self.sources)} sources.")
        elif self.anneal_weights is not None and not _are_weights(self.anneal_weights):
            wrong.append(f"anneal_weights = {shown(self.anneal_weights)} must be 0 or more, and not all 0.")
        return wrong

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
        """The recipe that `to_dict` gave; ParameterError where fields are missing, unknown or no fields at all."""
        try:
            return Recipe(**{**values, "shape": Shape(**values["shape"]),
                             "sources": tuple(Source(**source) for source in values["sources"])})
        except (TypeError, KeyError) as error:
            raise ParameterError([f"this is not a recipe that can be read ({type(error).__name__}: {error})."]) from None


def _are_weights(values) -> bool:
    return not any(number(0)(value) for value in values) and sum(values) > 0


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
    if name not in list(ALL_RECIPES):
        near = difflib.get_close_matches(str(name), ALL_RECIPES, n=1)
        raise ParameterError([f"RECIPE = {shown(name)} is not known" + (f" (did you mean {near[0]}?)" if near else "")
                              + f"; known: {', '.join(RECIPES)}, each also as ...-repaired."])
    recipe = ALL_RECIPES[name].scaled_to("cpu") if profile == "cpu" else ALL_RECIPES[name]
    shape_fields = {f.name for f in dataclasses.fields(Shape)}
    recipe_fields = {f.name for f in dataclasses.fields(Recipe)} - {"name", "shape", "published", "unpublished"}
    problems, in_shape, in_recipe = [], {}, {}
    for key, value in (overrides or {}).items():
        if key in shape_fields:
            in_shape[key] = value
        elif key == "sources" and isinstance(value, (list, tuple)):
            in_recipe[key] = tuple(_read_source(source, problems) for source in value)
        elif key in recipe_fields:
            in_recipe[key] = value
        else:
            near = difflib.get_close_matches(str(key), shape_fields | recipe_fields, n=1)
            problems.append(f"{key} is not a field of a recipe" + (f"; did you mean {near[0]}?" if near else "."))
    recipe = dataclasses.replace(recipe, shape=dataclasses.replace(recipe.shape, **in_shape), **in_recipe)
    if problems := problems + recipe.problems():
        raise ParameterError(problems)
    return recipe


def _read_source(given, problems: list[str]):
    """A Source from a dict of its fields; what is wrong with it is added to `problems`."""
    if not isinstance(given, dict):
        return given                                  # a Source; anything else is refused with the recipe
    known = [f.name for f in dataclasses.fields(Source)]
    wrong = [f"sources: {shown(key)} is not a field of a source; known: {', '.join(known)}." for key in given
             if key not in known]
    wrong += [f"sources: {shown(given)} has no {key}." for key in ("name", "path") if key not in given]
    problems += wrong
    return Source(**given) if not wrong else Source("unread", "unread")


# ---------------------------------------------------------------------------------------------------------------------
# A recipe and its tokenizer.


def open_tokenizer(named: str | None, recipe: Recipe, run_dir):
    """(where, tokenizer) for a run: a folder or hub name, and what it holds.

    The one named, else run_dir/tokenizer, else the hub tokenizer that the recipe names, else one that 01 made for this recipe
    under another RUN, else the released vocabulary that the recipe names. The last two are for `save_tokenizer` to keep in
    run_dir/tokenizer, which is not there yet: this creates nothing. Raises ParameterError, in one sentence.
    """
    own = Path(run_dir) / "tokenizer"
    if named or own.exists():
        return named or own, _load_or_refuse(named or own, recipe, own)
    if recipe.tokenizer.startswith("hf:"):
        return recipe.tokenizer, _load_or_refuse(recipe.tokenizer, recipe, own)
    if others := [path for path in own.parent.parent.glob("*/tokenizer") if _made_for(path, recipe)]:
        newest = max(others, key=lambda path: (path / "report.json").stat().st_mtime)
        print(f"TOKENIZER: there is no {own}; taken is {newest}, which 01 made for this recipe.")
        return own, _load_or_refuse(newest, recipe, own)
    if recipe.tokenizer in ("build", "bpe"):
        return own, _load_or_refuse(own, recipe, own)
    from tokenmonster_hf import TokenMonsterTokenizer, Vocabulary
    try:
        vocabulary = Vocabulary.from_file(find_vocabulary(recipe.tokenizer))
    except (ValueError, OSError) as error:            # a ParameterError too
        raise ParameterError([f"TOKENIZER: there is no {own}, and {str(error).rstrip('.')}; run 01_tokenizer first, or switch "
                              "internet on (Kaggle: Settings, Internet)."]) from None
    rows = recipe.shape.vocab_size
    if len(vocabulary) > rows - 2:                    # as 01 does
        vocabulary = vocabulary.resize(rows - 2)
    return own, TokenMonsterTokenizer.from_vocabulary(vocabulary, vocab_size=rows)


def _load_or_refuse(where, recipe: Recipe, own: Path):
    """The tokenizer in a folder or at a hub name; ParameterError, in one sentence, where there is none."""
    try:
        wrong = tokenizer_problem(where)
        if not wrong:
            return load_tokenizer(where)
    except Exception as error:                        # whatever a damaged or missing file makes of the parsers
        wrong = f"cannot be loaded ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
    way = f"run 01_tokenizer first (RUN = {own.parent.name!r}, RECIPE = {recipe.name.removesuffix('-cpu')!r})"
    if str(where).startswith("hf:"):
        way = "switch internet on (Kaggle: Settings, Internet)"
    raise ParameterError([f"TOKENIZER = {str(where)!r} {wrong}; {way}, or name a tokenizer folder."])


def _made_for(folder: Path, recipe: Recipe) -> bool:
    """Whether 01's report beside a tokenizer says that it is this recipe's: the same vocabulary, as large."""
    try:
        report = json.loads((folder / "report.json").read_text())
        return (report["vocabulary"], report["vocab_size"]) == (recipe.tokenizer, recipe.shape.vocab_size)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def tokenizer_misfit(recipe: Recipe, tokenizer) -> str | None:
    """Why a tokenizer does not belong to a recipe ("has 4,096 tokens, ..."), or None."""
    size, wanted = vocabulary_rows(tokenizer), recipe.shape.vocab_size
    if size != wanted:
        other = count_parameters(dataclasses.replace(recipe.shape, vocab_size=size))
        return (f"has {size:,} tokens, {recipe.name} {wanted:,}: the model would have {other:,} parameters instead of "
                f"{count_parameters(recipe.shape):,}")
    if hasattr(tokenizer, "vocabulary") == (recipe.tokenizer == "bpe" or recipe.tokenizer.startswith("hf:")):
        kinds = ("a TokenMonster vocabulary", "a BPE")
        mine, theirs = kinds if hasattr(tokenizer, "vocabulary") else kinds[::-1]
        return f"is {mine}, {recipe.name} has {theirs}"


def fit_to_tokenizer(recipe: Recipe, tokenizer, say=print) -> Recipe:
    """The recipe with the tokenizer's vocabulary size, checked again.

    Where the two do not belong together, a recipe that names its tokenizer raises ParameterError; the CPU twin, which takes
    what 01 built, says it aloud.
    """
    rows = vocabulary_rows(tokenizer)
    if problems := store_problems(tokenizer):
        raise ParameterError(problems)
    if wrong := tokenizer_misfit(recipe, tokenizer):
        if recipe.tokenizer not in ("build", "bpe"):
            on_purpose = {"vocab_size": rows, "tokenizer": "build" if hasattr(tokenizer, "vocabulary") else "bpe"}
            raise ParameterError([
                f"the tokenizer {wrong}. Run 01_tokenizer with PROFILE = 't4' or 'tpu' (it needs no accelerator) and RECIPE = "
                f"{recipe.name!r} for the recipe's own; to train the other model on purpose: OVERRIDES = {on_purpose}."])
        say(f"NOTE: the tokenizer {wrong}.")
    fitted = dataclasses.replace(recipe, shape=dataclasses.replace(recipe.shape, vocab_size=rows))
    if problems := fitted.problems():
        raise ParameterError(problems)
    return fitted
