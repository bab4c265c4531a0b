"""The two stock architectures that the suite trains, by the names of transformers' classes.

Llama is the cards'; Qwen3 is the same with QK-norm. Whatever names a class of the one asks here
for both. transformers is imported when it is asked.
"""
from __future__ import annotations

import functools


@functools.cache
def stock_classes(part: str) -> tuple[type, type]:
    """(Llama's, Qwen3's) class of a part: "Config", "ForCausalLM", "DecoderLayer", "Attention" or
    "RMSNorm"."""
    import transformers
    from transformers.models.llama import modeling_llama as llama
    from transformers.models.qwen3 import modeling_qwen3 as qwen3
    if part == "Config":
        return transformers.LlamaConfig, transformers.Qwen3Config
    return getattr(llama, f"Llama{part}"), getattr(qwen3, f"Qwen3{part}")
