"""What the cards print about their sizes, beside what a model of that shape weighs.

Published, not ours: `stated` are megabytes (10^6 bytes) as printed. The other side is calculated from the
shape alone by the layout of each format; tests hold it against files that were written.
"""
from __future__ import annotations

from dataclasses import dataclass

from stentor.published import ALL_RECIPES
from stentor.shapes import Shape, kv_cache_bytes, parameter_budget, weight_bytes


@dataclass(frozen=True)
class Claim:
    card: str                                         # a name of ALL_RECIPES
    what: str                                         # in the card's words
    form: str                                         # of formats.FORMATS, or "kv-fp32", "kv-fp16"
    stated: float                                     # MB


P, S3, INSTRUCT = "stentor2-12m-preview", "stentor3-20m", "stentor-12m-instruct"
WEIGHTS = {"fp32": "fp32", "fp16": "fp16 or bf16", "bf16": "fp16 or bf16",       # of shapes.WEIGHT_BYTES
           "int8-bnb": "8-bit", "nf4-bnb": "4-bit", "fp4-bnb": "4-bit"}
CLAIMS = (
    Claim(P, "FP32", "fp32", 49), Claim(P, "FP16", "fp16", 25),
    Claim(P, "\"~12 MB in FP16\", in another place", "fp16", 12),
    Claim(P, "dynamic INT8, -75%", "int8-dynamic-head", 12),
    Claim(P, "bitsandbytes INT8", "int8-bnb", 12),
    Claim(S3, "FP32", "fp32", 81), Claim(S3, "FP16", "fp16", 41), Claim(S3, "INT8", "int8-bnb", 21),
    Claim(S3, "INT4", "nf4-bnb", 11),
    Claim(S3, "KV cache at 4,096, FP32", "kv-fp32", 12),
    Claim(S3, "KV cache at 4,096, FP16", "kv-fp16", 6),
    Claim(INSTRUCT, "8-bit", "int8-bnb", 12), Claim(INSTRUCT, "4-bit", "nf4-bnb", 6),
)


def format_bytes(shape: Shape, form: str) -> float:
    """Bytes of the weights of a model of this shape, without a file's header.

    As shapes.weight_bytes has it, and here an fp32 scale a row of bitsandbytes' int8. torch's dynamic
    int8 has embedding and norms in fp32.
    """
    if form.startswith("kv-"):
        return kv_cache_bytes(shape, 4096, 4 if form == "kv-fp32" else 2)
    if form in WEIGHTS:
        kv = shape.num_key_value_heads * shape.head_dim
        rows = shape.num_hidden_layers * (3 * shape.hidden_size + 2 * kv + 2 * shape.intermediate_size)
        return weight_bytes(shape, WEIGHTS[form]) + (4 * rows if form == "int8-bnb" else 0)
    parts = parameter_budget(shape)
    linear = parts["attention"] + parts["ffn"]
    table = shape.vocab_size * shape.hidden_size if form == "int8-dynamic-head" else 0
    return 4 * (sum(parts.values()) - linear) + linear + table


def claims_table():
    """The claims as a table: published MB, calculated MB of the same shape, and how far it is off."""
    import pandas as pd
    rows = []
    for claim in CLAIMS:
        size = format_bytes(ALL_RECIPES[claim.card].shape, claim.form) / 1e6
        rows.append({"card": claim.card, "published": claim.what, "MB, published": claim.stated,
                     "as": claim.form, "MB, calculated": round(size, 1),
                     "off": f"{claim.stated / size - 1:+.0%}"})
    return pd.DataFrame(rows).set_index("card")
