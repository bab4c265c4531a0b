"""A recipe: everything that decides a pretraining run, and the rules for it."""
from __future__ import annotations

import dataclasses
import functools
import math
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from stentor.files import ParameterError
from stentor.parameters import number, problem_with, run_name, shown, string
from stentor.secrets import secret_problems
from stentor.shapes import Shape, _settle_types


@dataclass(frozen=True)
class Source:
    """Where documents come from.

    path: "local:prose" | "local:code" | "local:math" (read from the installed Python), "hf:owner/dataset" (the hub),
    or a file or folder of them: .jsonl or .ndjson, .json (an array, an object or lines), .csv, .tsv, .txt, all of these also
    as .gz, .bz2, .xz, .zst or .lz4; .parquet, .arrow. In a .txt a line <|doc|>, or <|endoftext|> anywhere, stands between
    two documents. Hidden files and folders are not read. `revision` pins a hub dataset; `weight` is relative.
    """
    name: str
    path: str
    weight: float = 1.0
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    text_field: str | None = "text"                   # None: documents are whole rows, as dicts
    preserve_linebreaks: bool = False


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
