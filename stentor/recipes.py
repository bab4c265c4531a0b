"""A recipe: everything that decides a pretraining run, and what must be true of it."""
from __future__ import annotations

import dataclasses
import functools
import math
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from stentor.files import ParameterError
from stentor.parameters import number, run_name, shown, string
from stentor.rules import (
    about, broken_rules, checked, flag, positive, problems_between, settle_types)
from stentor.secrets import secret_problems
from stentor.shapes import Shape
from stentor.tuning import tuned_rates


@dataclass(frozen=True)
class Source:
    """Where documents come from.

    path: "local:prose" | "local:code" | "local:math" (read from the installed Python),
    "hf:owner/dataset" (the hub), or a file or folder of them: .jsonl or .ndjson, .json (an array,
    an object or lines), .csv, .tsv, .txt, all of these also as .gz, .bz2, .xz, .zst or .lz4;
    .parquet, .arrow. In a .txt a line <|doc|>, or <|endoftext|> anywhere, stands between two
    documents. Hidden files and folders are not read. `revision` pins a hub dataset; `weight` is
    relative.
    """
    name: str = checked(run_name)
    path: str = checked(string())
    weight: float = 1.0                               # its rule is about all sources: _weights
    config: str | None = checked(string(optional=True), None)
    split: str = checked(string(), "train")
    revision: str | None = checked(string(optional=True), None)
    # None: documents are whole rows, as dicts
    text_field: str | None = checked(string(optional=True), "text")
    preserve_linebreaks: bool = checked(flag, False)


MOST_SEQUENCES = 2**28                                # of a run: 8 bytes each in memory

# The rules that many fields of a recipe share.
AMOUNT, COUNT = positive(), positive(integer=True)
FROM_0, PERHAPS_COUNT = number(0, integer=True), number(1, integer=True, optional=True)
SHARE, BELOW_1 = number(0, 1), number(0, 0.9999999)


def _perhaps_amount(value) -> str | None:
    return None if value is None else AMOUNT(value)


# In what respects two recipes that differ in a field are still the same one. RESUME: a checkpoint
# of the one is continued by the other; cadences and micro-batch sizes may change. DRAW: their runs
# are two draws of one recipe; they differ in the seed, or in how a machine takes it only.
RESUME, DRAW = {"resume"}, {"draw"}


def _sources(value) -> str | None:
    if not isinstance(value, tuple) or not all(isinstance(source, Source) for source in value):
        return "must be a list of sources, each with a name and a path"


def _weight_list(value) -> str | None:
    if value is not None and not isinstance(value, tuple):
        return "must be a list of weights"


def _names(value) -> str | None:
    if value is not None and not (isinstance(value, tuple) and value
                                  and all(isinstance(name, str) for name in value)):
        return "must be None or a list of names of sources"


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a pretraining run, each field with its rule (`stentor.rules`).

    `dataclasses.replace` changes it; `difference` prints the change.
    """
    name: str = checked(string(), free=RESUME)
    shape: Shape
    tokenizer: str = checked(string())                # released TokenMonster vocabulary, or a hub's
    sources: tuple[Source, ...] = checked(_sources, free=RESUME)
    # other source weights over the last `anneal_fraction` of the budget
    anneal_weights: tuple[float, ...] | None = checked(_weight_list, None)
    anneal_fraction: float = checked(SHARE, 0.15)
    # optimiser: AdamW, or Muon for the matrices of the layers and AdamW for the rest; decay on
    # Linear weights only, not on embeddings, norms, biases
    learning_rate: float = checked(AMOUNT, 8e-4)
    weight_decay: float = checked(number(0, 10), 0.01)
    adam_beta1: float = checked(BELOW_1, 0.9)
    adam_beta2: float = checked(BELOW_1, 0.95)
    adam_epsilon: float = checked(AMOUNT, 1e-8)
    max_grad_norm: float = checked(AMOUNT, 1.0)
    # None: torch's AdamW; "paged_adamw_32bit": bitsandbytes' where a GPU is; see stentor.optimizers
    optimizer: str | None = checked([None, "paged_adamw_32bit", "muon"], None)
    # Muon's peak rate; learning_rate is then AdamW's, and both follow the one schedule
    matrix_learning_rate: float | None = checked(_perhaps_amount, None)
    muon_momentum: float = checked(BELOW_1, 0.95)     # Jordan et al. 2024
    # of the averaged weights that evaluation, best/ and final/ then use
    ema_decay: float | None = checked(number(0, 0.9999999, optional=True), None)
    lr_scheduler_type: str = checked(
        ["cosine", "linear", "warmup_stable_decay", "cosine_with_restart"], "cosine")
    warmup_ratio: float = checked(SHARE, 0.05)
    stable_ratio: float = checked(SHARE, 0.80)        # of warmup_stable_decay; the cards print it
    # batch and budget
    block_size: int = checked(COUNT, 1024)
    # each sequence is block_size - 1 tokens and an EOS (Stentor-Big's), not end to end (the others')
    chunk_eos: bool = checked(flag, False)
    per_device_train_batch_size: int = checked(COUNT, 32, free=RESUME)
    per_device_eval_batch_size: int = checked(COUNT, 16, free=RESUME | DRAW)
    gradient_accumulation_steps: int = checked(COUNT, 2, free=RESUME)
    # of the published run; the global batch is the product of these, without the eval batch
    num_processes: int = checked(COUNT, 2, free=RESUME | DRAW)
    token_budget: int = checked(COUNT, 480_000_000)
    # tokens made from the sources; less than token_budget = epochs
    source_token_budget: int | None = checked(PERHAPS_COUNT, None)
    # the schedule's length; None: computed from token_budget
    max_train_steps: int | None = checked(PERHAPS_COUNT, None)
    # "micro_batch": stop in the middle of a step, as the Preview did
    budget_check: str = checked(["step", "micro_batch"], "step", free=RESUME)
    # evaluation, checkpoints, log
    eval_steps: int = checked(COUNT, 900, free=RESUME)
    best_eval_steps: int = checked(COUNT, 900, free=RESUME)
    # best evaluations: at this step, and every best_eval_steps from there
    best_eval_start_step: int = checked(FROM_0, 0, free=RESUME)
    # saved and evaluated too where every so many passes over the tokens end; 0: not for that
    save_epochs: int = checked(FROM_0, 0, free=RESUME)
    max_eval_samples: int = checked(COUNT, 5_000)     # validation documents of each source
    # whose held-out documents are measured; None: every source's
    validation_sources: tuple[str, ...] | None = checked(_names, None)
    save_every_minutes: float = checked(AMOUNT, 30, free=RESUME | DRAW)
    save_total_limit: int = checked(COUNT, 2, free=RESUME | DRAW)
    logging_steps: int = checked(COUNT, 300, free=RESUME | DRAW)
    seed: int = checked(number(0, 2**31 - 1, integer=True), 42, free=DRAW)
    # precision
    mixed_precision: str = checked(["no", "fp16", "bf16"], "fp16", free=DRAW)
    fp32_norms: bool = checked(flag, True)
    fp32_critical_first: int = checked(FROM_0, 2)
    fp32_critical_last: int = checked(FROM_0, 0)
    fp32_softmax: bool = checked(flag, False)
    int8_qat: bool = checked(flag, False)
    attn_implementation: str = checked(["sdpa", "eager"], "sdpa", free=DRAW)
    gradient_checkpointing: bool = checked(flag, False, free=RESUME)
    # layers and loss; on a CPU fastest with "eager" attention; not on XLA
    torch_compile: bool = checked(flag, False, free=RESUME | DRAW)
    initialization: str = checked(                    # Stentor3: scaled; see initialize_weights
        ["normal", "residual_scaled", "zero_projections"], "normal")
    # figures printed in the card, for comparison only; fields that the card does not print
    published: dict = field(default_factory=dict, metadata={"free": RESUME | DRAW})
    unpublished: tuple[str, ...] = field(default=(), metadata={"free": RESUME | DRAW})

    __post_init__ = settle_types

    @property
    def total_batch_size(self) -> int:
        """Sequences in one optimiser step, over all processes."""
        per_process = self.per_device_train_batch_size * self.gradient_accumulation_steps
        return per_process * self.num_processes

    @property
    def tokens_per_step(self) -> int:
        return self.total_batch_size * self.block_size

    @property
    def stride(self) -> int:
        """Tokens of the store in a sequence."""
        return self.block_size - self.chunk_eos

    @property
    def schedule_steps(self) -> int:
        """The length the learning-rate schedule is laid out for (the cards' `max_train_steps`)."""
        return self.max_train_steps or -(-self.token_budget // self.tokens_per_step)

    @property
    def warmup_steps(self) -> int:
        return int(self.schedule_steps * self.warmup_ratio)

    @property
    def stable_steps(self) -> int:
        return int(self.schedule_steps * self.stable_ratio)

    @property
    def sequences_to_train(self) -> int:
        """Sequences after which the budget is spent: whole micro-batches or whole steps.

        Never more than the schedule has.
        """
        unit = self.total_batch_size
        if self.budget_check == "micro_batch":
            unit //= self.gradient_accumulation_steps
        wanted = -(-self.token_budget // (unit * self.block_size)) * unit
        return min(wanted, self.schedule_steps * self.total_batch_size)

    @property
    def total_steps(self) -> int:
        return -(-self.sequences_to_train // self.total_batch_size)

    @property
    def total_tokens(self) -> int:
        return self.sequences_to_train * self.block_size

    @property
    def fp32_critical_layers(self) -> tuple[int, ...]:
        n = self.shape.num_hidden_layers
        return tuple(i for i in range(n)
                     if i < self.fp32_critical_first or i >= n - self.fp32_critical_last)

    def learning_rate_at(self, update: int) -> float:
        """Learning rate of optimiser update `update` (0-based), as transformers' schedules have it.

        cosine: linear warm-up from 0, then half a cosine to 0 at `schedule_steps`.
        linear: the same with a straight line to 0.
        warmup_stable_decay: warm-up, `stable_steps` at the peak, then a straight line to 0.
        cosine_with_restart: after the warm-up two half cosines, the second from the peak again.
        """
        if update < self.warmup_steps:
            return self.learning_rate * update / self.warmup_steps
        if self.lr_scheduler_type == "warmup_stable_decay":
            decay_start = self.warmup_steps + self.stable_steps
            if update < decay_start:
                return self.learning_rate
            left = (self.schedule_steps - update) / (self.schedule_steps - decay_start)
            return self.learning_rate * max(0.0, left)
        progress = (update - self.warmup_steps) / max(1, self.schedule_steps - self.warmup_steps)
        if self.lr_scheduler_type == "linear":
            return self.learning_rate * max(0.0, 1.0 - progress)
        if self.lr_scheduler_type == "cosine_with_restart" and progress < 1:
            progress = 2 * progress % 1
        return self.learning_rate * max(0.0, 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0))))

    def problems(self) -> list[str]:
        """Everything wrong with this recipe, one sentence each."""
        broken = broken_rules(self)
        in_shape = {f"shape.{name}" for name in broken_rules(self.shape)}
        return [*self.shape.problems(), *broken.values(),
                *problems_between(self, _BETWEEN, {*broken, *in_shape})]

    def scaled_to(self, profile: str) -> Recipe:
        """The small twin of this recipe for `profile` "cpu": 2 CPU cores and the embedded corpus.

        The same code path; about 1.4M parameters and 4M tokens. AdamW at 4e-3: a trial found 3.91
        nats/token there against 4.17 at the cards' 8e-4. The twins of the recipes with a 32k BPE
        have a BPE too. Those of tuned recipes: see `_small_tuned`.
        """
        if profile != "cpu":
            raise ParameterError([
                f"profile {profile!r} has no scaled twin; the only one is 'cpu'."])
        sources, anneal_weights = self._local_sources()
        twin = dataclasses.replace(
            self, name=f"{self.name}-cpu", shape=self._small_shape(), learning_rate=4e-3,
            tokenizer="bpe" if self.tokenizer.startswith("hf:") else "build",
            sources=sources, anneal_weights=anneal_weights, block_size=256,
            per_device_train_batch_size=16, per_device_eval_batch_size=32,
            gradient_accumulation_steps=1, num_processes=1,
            token_budget=4_000_000, source_token_budget=None, max_train_steps=None,
            eval_steps=250, best_eval_steps=250, best_eval_start_step=0, save_epochs=0,
            max_eval_samples=150, validation_sources=None,
            save_every_minutes=2, logging_steps=25,
            mixed_precision="bf16" if cpu_has_bf16() else "no", published={}, unpublished=())
        return twin._small_tuned() if self.optimizer == "muon" else twin

    def _small_tuned(self) -> Recipe:
        """This CPU twin with what paid for it, in bits per byte after 1M tokens (one seed each).

        Half the batch, so twice the steps (1.7446 against 1.7924), and for such a batch a shorter
        momentum (1.7221 against 1.7446); rates by the rule. No FP32 techniques, which only cost
        where all weights are FP32. Compiled layers where a compiler is: a third faster
        (docs/results.md).
        Fewer evaluations: one takes as long as 300,000 tokens. In the minutes that this leaves half as
        many tokens more: 4M ended at 1.4036 bits per byte.
        """
        fast = {"torch_compile": True, "attn_implementation": "eager"} if has_compiler() else {}
        return dataclasses.replace(
            self, per_device_train_batch_size=8, muon_momentum=0.9, token_budget=6_000_000,
            **tuned_rates(self.shape),
            fp32_norms=False, fp32_critical_first=0, fp32_critical_last=0, fp32_softmax=False,
            eval_steps=1000, best_eval_steps=1000, logging_steps=50, **fast)

    def _small_shape(self) -> Shape:
        """The twin's shape. At least one layer is not critical: INT8 keeps modules to work on.

        With a BPE over half of an equal budget is in the embedding, as Stentor-12M's 52%.
        """
        if self.tokenizer.startswith("hf:"):
            vocab_size, hidden_size, layers = 8192, 96, 5
        else:
            vocab_size, hidden_size = min(self.shape.vocab_size, 4096), 128
            layers = max(4, self.fp32_critical_first + self.fp32_critical_last + 1)
        grouped = self.shape.num_key_value_heads < self.shape.num_attention_heads
        return dataclasses.replace(
            self.shape, vocab_size=vocab_size, hidden_size=hidden_size,
            intermediate_size=3 * hidden_size, num_hidden_layers=layers, num_attention_heads=2,
            num_key_value_heads=1 if grouped else 2, max_position_embeddings=256)

    def _local_sources(self) -> tuple[tuple[Source, ...], tuple[float, ...] | None]:
        """The twin's sources and anneal weights: two web sources are one local:prose, summed up."""
        local = {"code": Source("code", "local:code", preserve_linebreaks=True),
                 "math": Source("math", "local:math")}
        merged, anneal = {}, {}
        for source, late in zip(self.sources, self.anneal_weights or [0] * len(self.sources)):
            twin = local.get(source.name, Source("prose", "local:prose"))
            weight = source.weight + (merged[twin.name].weight if twin.name in merged else 0)
            merged[twin.name] = dataclasses.replace(twin, weight=weight)
            anneal[twin.name] = anneal.get(twin.name, 0) + late
        return tuple(merged.values()), tuple(anneal.values()) if self.anneal_weights else None

    def difference(self, other: Recipe) -> list[tuple[str, object, object]]:
        """(field, this, other) for every field that differs, shape fields by their own name."""
        rows = []
        for f in dataclasses.fields(Recipe):
            mine, theirs = getattr(self, f.name), getattr(other, f.name)
            if f.name == "shape":
                pairs = [(g.name, getattr(mine, g.name), getattr(theirs, g.name))
                         for g in dataclasses.fields(Shape)]
                rows += [(f"shape.{name}", a, b) for name, a, b in pairs if a != b]
            elif mine != theirs and f.name not in ("published", "unpublished"):
                rows.append((f.name, mine, theirs))
        return rows

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    @staticmethod
    def completed(values: dict) -> dict:
        """What `to_dict` gave, or gave before some fields were there, with these at their defaults:
        a run of then is still the same one. Whatever else stays as it is."""
        def complete(record, known):
            return known | {f.name: f.default for f in dataclasses.fields(record)
                            if f.name not in known and f.default is not dataclasses.MISSING}
        if not isinstance(values.get("shape"), dict):
            return values
        return {**complete(Recipe, values), "shape": complete(Shape, values["shape"])}

    @staticmethod
    def from_dict(values: dict) -> Recipe:
        """The recipe that `to_dict` gave; ParameterError where fields are missing or unknown."""
        try:
            return Recipe(**{**values, "shape": Shape(**values["shape"]),
                             "sources": tuple(Source(**source) for source in values["sources"])})
        except (TypeError, KeyError) as error:
            raise ParameterError([f"this is not a recipe that can be read "
                                  f"({type(error).__name__}: {error})."]) from None


# The rules about several fields of a recipe.


_BETWEEN: list = []


@about(_BETWEEN, "block_size", "per_device_train_batch_size", "gradient_accumulation_steps",
       "num_processes", "token_budget", "max_train_steps", "budget_check")
def _plan(recipe: Recipe):
    if recipe.sequences_to_train > MOST_SEQUENCES:
        yield (f"token_budget = {recipe.token_budget:,} makes {recipe.sequences_to_train:,} "
               f"sequences of block_size = {recipe.block_size}; a run can plan at most "
               f"{MOST_SEQUENCES:,}.")


@about(_BETWEEN, "block_size", "shape.max_position_embeddings")
def _context(recipe: Recipe):
    longest = recipe.shape.max_position_embeddings
    if recipe.block_size > longest:
        yield (f"block_size = {recipe.block_size} is longer than max_position_embeddings = "
               f"{longest}.")


@about(_BETWEEN, "block_size", "chunk_eos")
def _room_for_text(recipe: Recipe):
    if recipe.stride < 1:
        yield "block_size = 1 has no room for text beside the EOS of chunk_eos = True."


@about(_BETWEEN, "fp32_critical_first", "shape.num_hidden_layers")
def _critical_first(recipe: Recipe):
    if recipe.fp32_critical_first > (layers := recipe.shape.num_hidden_layers):
        yield f"fp32_critical_first = {recipe.fp32_critical_first} must be at most {layers:,}."


@about(_BETWEEN, "fp32_critical_last", "shape.num_hidden_layers")
def _critical_last(recipe: Recipe):
    if recipe.fp32_critical_last > (layers := recipe.shape.num_hidden_layers):
        yield f"fp32_critical_last = {recipe.fp32_critical_last} must be at most {layers:,}."


@about(_BETWEEN, "lr_scheduler_type", "warmup_ratio", "stable_ratio")
def _schedule(recipe: Recipe):
    ratio = recipe.warmup_ratio + recipe.stable_ratio
    if recipe.lr_scheduler_type == "warmup_stable_decay" and ratio > 1:
        yield f"warmup_ratio + stable_ratio = {ratio:g} must be at most 1."


@about(_BETWEEN, "optimizer", "matrix_learning_rate")
def _matrix_rate(recipe: Recipe):
    rate = recipe.matrix_learning_rate
    if recipe.optimizer == "muon" and rate is None:
        yield ("optimizer = 'muon' needs a matrix_learning_rate, its peak rate for the matrices of "
               "the layers (0.005 at a hidden_size of 128).")
    elif recipe.optimizer != "muon" and rate is not None:
        yield (f"matrix_learning_rate = {rate:g} is Muon's: set optimizer = 'muon', or leave it "
               "None.")


@about(_BETWEEN, "torch_compile")
def _compiler(recipe: Recipe):
    if recipe.torch_compile and not has_compiler():
        compiler = os.environ.get("CXX", "g++")
        yield (f"torch_compile = True needs a C++ compiler, and {compiler} is not here: install "
               "it, or set torch_compile to False.")


@about(_BETWEEN, "sources")
def _each_source(recipe: Recipe):
    if not recipe.sources:
        yield "sources is empty: name at least one."
    names = [source.name for source in recipe.sources]
    for i, source in enumerate(recipe.sources):
        yield from broken_rules(source, f"sources: {{}} = {{}} of source {i + 1} {{}}.").values()
        if source.name in names[:i]:
            yield (f"sources: {shown(source.name)} is the name of two sources; each needs one of "
                   "its own.")


@about(_BETWEEN, "sources")
def _weights(recipe: Recipe):
    if recipe.sources and not _are_weights([source.weight for source in recipe.sources]):
        yield "the weights of the sources must be 0 or more, and not all 0."


@about(_BETWEEN, "sources", "anneal_weights")
def _late_weights(recipe: Recipe):
    late = recipe.anneal_weights
    if late is None or not recipe.sources:
        return
    if len(late) != len(recipe.sources):
        yield f"anneal_weights has {len(late)} weights for {len(recipe.sources)} sources."
    elif not _are_weights(late):
        yield f"anneal_weights = {shown(late)} must be 0 or more, and not all 0."


@about(_BETWEEN, "sources", "anneal_weights", "validation_sources")
def _validated(recipe: Recipe):
    read = [source.name for source in recipe.sources if source.weight or recipe.anneal_weights]
    for name in recipe.validation_sources or ():
        if name not in read:
            yield (f"validation_sources: {shown(name)} is none of the sources that are read "
                   f"({', '.join(read)}); None measures them all.")


def _are_weights(values) -> bool:
    return not any(number(0)(value) for value in values) and sum(values) > 0


@about(_BETWEEN, "tokenizer")
def _no_secret_in_tokenizer(recipe: Recipe):
    yield from secret_problems(tokenizer=recipe.tokenizer)


@about(_BETWEEN, "sources")
def _no_secret_in_sources(recipe: Recipe):
    yield from secret_problems(sources=[source.path for source in recipe.sources])


def has_compiler() -> bool:
    """Whether the C++ compiler that torch.compile needs is here."""
    return shutil.which(os.environ.get("CXX", "g++")) is not None


@functools.cache
def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bf16 in hardware (AMX or AVX512-BF16).

    Elsewhere bf16 autocast is slower than fp32.
    """
    try:
        return bool({"avx512_bf16", "amx_bf16"} & set(Path("/proc/cpuinfo").read_text().split()))
    except OSError:
        return False
