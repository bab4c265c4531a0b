"""The shape of a model, and what follows from it alone: parameters, their budget, the KV cache."""
from __future__ import annotations

from dataclasses import dataclass

from stentor.parameters import number
from stentor.rules import (
    about, broken_rules, checked, flag, positive, problems_between, settle_types)


def _size(value) -> str | None:
    """A rule: a whole number that a layer can be wide or a model deep."""
    return "must be a positive whole number" if number(1, 2**31, integer=True)(value) else None


@dataclass(frozen=True)
class Shape:
    """The shape of a LlamaForCausalLM, in the names of `transformers.LlamaConfig`.

    qk_norm: queries and keys get an RMSNorm over head_dim before the rotary embedding, and the
    model is a stock Qwen3ForCausalLM, which is Llama in all else (Qwen3 report, 2025; after ViT-22B,
    Dehghani et al. 2023).
    """
    vocab_size: int = checked(_size)
    hidden_size: int = checked(_size)
    intermediate_size: int = checked(_size)
    num_hidden_layers: int = checked(_size)
    num_attention_heads: int = checked(_size)
    num_key_value_heads: int = checked(_size)
    max_position_embeddings: int = checked(_size, 1024)
    rope_theta: float = checked(positive(), 10_000.0)
    rms_norm_eps: float = checked(positive(), 1e-5)
    tie_word_embeddings: bool = checked(flag, True)
    qk_norm: bool = checked(flag, False)

    __post_init__ = settle_types

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    def problems(self) -> list[str]:
        """Everything wrong with this shape, one sentence each."""
        broken = broken_rules(self, "shape.{} = {} {}.")
        return [*broken.values(), *problems_between(self, _BETWEEN, broken)]


_BETWEEN: list = []                                   # rules about several fields of a shape


@about(_BETWEEN, "hidden_size", "num_attention_heads")
def _heads(shape: Shape):
    if shape.hidden_size % shape.num_attention_heads:
        yield (f"shape.hidden_size = {shape.hidden_size} is not divisible by num_attention_heads = "
               f"{shape.num_attention_heads}; head_dim must be whole: choose a multiple.")
    elif shape.head_dim % 2:
        yield f"shape: head_dim = {shape.head_dim} is odd; rotary embeddings need an even one."


@about(_BETWEEN, "num_attention_heads", "num_key_value_heads")
def _groups(shape: Shape):
    if shape.num_attention_heads % shape.num_key_value_heads:
        yield (f"shape.num_attention_heads = {shape.num_attention_heads} is not divisible by "
               f"num_key_value_heads = {shape.num_key_value_heads}.")


@about(_BETWEEN, "vocab_size")
def _vocabulary(shape: Shape):
    if shape.vocab_size > 65_536:
        yield (f"shape.vocab_size = {shape.vocab_size:,} does not fit the uint16 token store "
               "(65,536 at most).")


def parameter_budget(shape: Shape) -> dict[str, int]:
    """Parameters by kind: embedding (with an untied lm_head), attention, ffn and norms.

    Their sum is the model's total.
    """
    h, layers = shape.hidden_size, shape.num_hidden_layers
    kv = shape.num_key_value_heads * shape.head_dim
    qk_norms = 2 * shape.head_dim if shape.qk_norm else 0        # one for all heads of a layer
    return {"embedding": shape.vocab_size * h * (1 if shape.tie_word_embeddings else 2),
            "attention": layers * (2 * h * h + 2 * h * kv),      # q, o: h x h; k, v: h x kv
            "ffn": layers * 3 * h * shape.intermediate_size,     # gate, up, down
            "norms": layers * (2 * h + qk_norms) + h}


def count_parameters(shape: Shape) -> int:
    """Trainable parameters of a model of this shape: the published totals, exactly."""
    return sum(parameter_budget(shape).values())


def training_flops(shape: Shape, length: int) -> int:
    """Floating-point operations of training on one token, in sequences of `length`.

    6 for each parameter that multiplies it (the table of an embedding only hands out rows; the head
    multiplies, tied or not) and 12 x layers x hidden_size x length for the attention, forward and
    backward (PaLM, Chowdhery et al. 2022, appendix B).
    """
    budget = parameter_budget(shape)
    multiplied = budget["attention"] + budget["ffn"] + shape.vocab_size * shape.hidden_size
    return 6 * multiplied + 12 * shape.num_hidden_layers * shape.hidden_size * length


def kv_cache_bytes(shape: Shape, length: int, bytes_per_element: float = 2) -> float:
    """Bytes of the key-value cache of one sequence of `length` tokens.

    2 x kv_heads x head_dim x layers x length x bytes, the formula of the Stentor3 card, whose table
    prints half of it: stentor3-20m at 4,096 is 12 MiB in FP16 and 24 in FP32.
    """
    per_token = 2 * shape.num_key_value_heads * shape.head_dim * shape.num_hidden_layers
    return per_token * length * bytes_per_element


# Bytes of a weight of a Linear layer, and of all others, by how the model is loaded. bitsandbytes
# replaces the Linear layers of the decoder only; embedding, norms and lm_head stay fp16 (with tied
# ends lm_head is the embedding). nf4 keeps an fp32 scale for each 64 weights.
WEIGHT_BYTES = {"fp32": (4, 4), "fp16 or bf16": (2, 2), "8-bit": (1, 2), "4-bit": (0.5 + 4 / 64, 2)}


def weight_bytes(shape: Shape, precision: str) -> float:
    """Bytes of the weights of a model of this shape, loaded as `precision`, a key of WEIGHT_BYTES.

    stentor-12m in 8-bit is 18.3 MB, of which the embedding alone is 12.6: its card prints 12.
    """
    linear, other = WEIGHT_BYTES[precision]
    parts = parameter_budget(shape)
    layers = parts["attention"] + parts["ffn"]
    return layers * linear + (sum(parts.values()) - layers) * other
