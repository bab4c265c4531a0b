"""GGUF, the file of llama.cpp, LM Studio and Ollama, written from one of our folders.

The names and the order of the metadata are the gguf package's; what llama.cpp expects in them is in its
own converter (conversion/llama.py and conversion/qwen.py). Written are the stock architectures llama and
qwen3, which are all that this suite trains.
"""
from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from stentor.export.gguf_tokenizer import FED, GgufTokenizer, gguf_tokenizer
from stentor.export.k_quants import BLOCK, encode_q4_k, encode_q6_k
from stentor.export.packages import require
from stentor.files import ParameterError, remove
from stentor.folders import load_model
from stentor.tokenizer import load_tokenizer

# {kind: (matrices, embedding and head, where the width is no multiple of 256, LlamaFileType)}.
# llama-quantize too keeps the embedding, where it is the head as well, finer than the matrices.
KINDS = {
    "f32": ("F32", "F32", None, 0), "f16": ("F16", "F16", None, 1),
    "q8_0": ("Q8_0", "Q8_0", None, 7), "q4_0": ("Q4_0", "Q8_0", None, 2),
    "q6_k": ("Q6_K", "Q6_K", "Q8_0", 18), "q4_k": ("Q4_K", "Q6_K", "Q8_0", 14),
}
ROW = 32                                              # a Q8_0 or Q4_0 block


def write_gguf(source, file, kind: str) -> dict:
    """`file`, a GGUF of the model in the folder `source`: {"bytes", "types", "fallback", "tokenizer"}.

    kind: of KINDS. types: {tensor type: tensors}; fallback: the matrices whose width the kind's blocks
    do not divide, and that are Q8_0 or F16 instead; tokenizer: None where llama.cpp tokenises exactly
    as ours does, else why it must be fed ids. Complete or not there at all. Raises ParameterError.
    """
    require("gguf")
    if kind not in KINDS:
        raise ParameterError([f"kind = {kind!r} must be one of {', '.join(KINDS)}."])
    model, tokenizer = load_model(source), load_tokenizer(source)
    if problem := _architecture_problem(model.config):
        raise ParameterError([f"{source} cannot be written as GGUF: {problem}."])
    mapped = gguf_tokenizer(tokenizer, model.config.vocab_size)
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        types, fallback = _write(temporary, model, tokenizer, mapped, kind, Path(source).name)
        os.replace(temporary, file)
    finally:
        remove(temporary)
    return {"bytes": file.stat().st_size, "types": types, "fallback": fallback,
            "tokenizer": mapped.why_fed}


def _architecture_problem(config) -> str | None:
    """What the file could not say about a model."""
    rope = config.rope_parameters
    if config.model_type not in ("llama", "qwen3"):
        return f"its model_type is {config.model_type!r}, neither llama nor qwen3"
    if rope["rope_type"] != "default":
        return f"its rotary embedding is of type {rope['rope_type']!r}"
    if config.hidden_act != "silu" or getattr(config, "use_sliding_window", False):
        return "it has another activation than silu, or a sliding window"
    if getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False):
        return "its linear layers have biases"


def _write(path: Path, model, tokenizer, mapped: GgufTokenizer, kind: str, name: str):
    import gguf
    config = model.config
    writer = gguf.GGUFWriter(path, config.model_type)
    writer.add_name(name)
    writer.add_file_type(KINDS[kind][3])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _describe_model(writer, config)
    _describe_tokenizer(writer, tokenizer, mapped)
    types, fallback = {}, []
    for tensor, values in gguf_tensors(model):
        wanted, used = tensor_type(tensor, values.shape, kind)
        fallback += [tensor] if used != wanted else []
        types[used] = types.get(used, 0) + 1
        writer.add_tensor(tensor, encode(values, used), raw_dtype=gguf.GGMLQuantizationType[used])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return types, fallback


def _describe_model(writer, config) -> None:
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def _describe_tokenizer(writer, tokenizer, mapped: GgufTokenizer) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(mapped.tokens)
    writer.add_token_types(mapped.types)
    writer.add_token_merges(mapped.merges)
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    for add, i in ((writer.add_bos_token_id, tokenizer.bos_token_id),
                   (writer.add_eos_token_id, tokenizer.eos_token_id), (writer.add_pad_token_id, pad)):
        if i is not None:
            add(i)
    writer.add_add_bos_token(mapped.adds_bos)
    writer.add_add_eos_token(mapped.adds_eos)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)
    if not mapped.exact:
        writer.add_description(f"{FED} ({mapped.why_fed}); its tokenizer travels beside this file.")
        writer.add_string("stentor.tokenizer", "fed with ids")


def gguf_tensors(model):
    """(llama.cpp's name, float32 array) of each weight; a tied head is the embedding, once."""
    import gguf
    config = model.config
    arch = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen3": gguf.MODEL_ARCH.QWEN3}[config.model_type]
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = weight.float().cpu().numpy()
        part = name.split(".")[-2]
        if config.model_type == "llama" and part in heads:
            values = rope_pairs(values, heads[part])
        yield names.get_name(name, try_suffixes=(".weight",)), np.ascontiguousarray(values)


def rope_pairs(rows: np.ndarray, heads: int) -> np.ndarray:
    """q_proj or k_proj (heads x head_dim, width) in the order of llama.cpp's llama.

    transformers turns dimension i of a head with i + head_dim / 2, llama.cpp's llama 2i with 2i + 1; its
    qwen3 does as transformers.
    """
    halves = rows.reshape(heads, 2, -1, rows.shape[1])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def tensor_type(name: str, shape: tuple, kind: str) -> tuple[str, str]:
    """(the type that `kind` means for a tensor, the type that its width allows)."""
    matrices, ends, narrower, _ = KINDS[kind]
    if len(shape) == 1:
        return "F32", "F32"                           # norms, as llama.cpp wants them
    wanted = used = ends if name.startswith(("token_embd", "output.")) else matrices
    if wanted.endswith("_K") and shape[-1] % BLOCK:
        used = narrower
    if used.startswith("Q") and shape[-1] % ROW:
        used = "F16"
    return wanted, used


def encode(values: np.ndarray, kind: str) -> np.ndarray:
    """float32 (n, width) in the bytes of a tensor type."""
    from gguf import GGMLQuantizationType, quants
    own = {"Q6_K": encode_q6_k, "Q4_K": encode_q4_k}.get(kind)
    return own(values) if own else quants.quantize(values, GGMLQuantizationType[kind])
