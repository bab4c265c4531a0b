"""The shape of a model, and what follows from it alone: parameters, their budget, the KV cache."""
from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from stentor.parameters import number, shown


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
