"""ONNX with a KV cache, for onnxruntime on any machine, a browser or a phone.

One graph serves prompt and continuation: `input_ids` (batch, new) int64 and for each layer `past.i.key`
and `past.i.value` (batch, kv heads, past, head_dim) fp32 give `logits` (batch, new, rows) and
`present.i.*` (batch, kv heads, past + new, head_dim); past is 0 at first. All texts of a batch are as long.
optimum-onnx, which the cards use, reads transformers 5's rope_theta of 50,000 as 10,000; torch.onnx takes
the model as it runs.
"""
from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import shutil
import warnings
from pathlib import Path

import torch
from torch import nn

from stentor.export.onnx_page import DECODE_JS, PAGE
from stentor.export.packages import require
from stentor.files import remove, replace_folder
from stentor.folders import load_model
from stentor.tokenizer import load_tokenizer, vocabulary_rows

OPSET = 18                                            # onnxruntime-web 1.20 and later read it
FILE, INT8_FILE = "model.onnx", "model.int8.onnx"


class Step(nn.Module):
    """The model as a function of tensors alone: (input_ids, past ...) -> (logits, present ...)."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, *past):
        from transformers import DynamicCache
        cache = DynamicCache()
        for layer in range(len(past) // 2):
            cache.update(past[2 * layer], past[2 * layer + 1], layer)
        before, new = past[0].shape[2], input_ids.shape[1]
        positions = torch.arange(before, before + new).unsqueeze(0)
        out = self.model(input_ids=input_ids, position_ids=positions, past_key_values=cache,
                         use_cache=True)
        present = [part for layer in out.past_key_values.layers for part in (layer.keys, layer.values)]
        return out.logits, *present


def write_onnx(source, folder, *, int8: bool = True) -> dict:
    """A folder with `model.onnx` (fp32), `model.int8.onnx`, the tokenizer, and a page for a browser.

    int8: weights of the matrix products in int8, a scale a column (onnxruntime.quantization, dynamic).
    The page, index.html, generates from ids; model.json beside it holds the shape of the cache and the
    bytes of each token. Returns {file: bytes}. Complete or not there at all. Raises ParameterError.
    """
    require("onnx", "onnxscript", *(["onnxruntime"] if int8 else []))
    model, tokenizer = load_model(source, dtype=torch.float32).eval(), load_tokenizer(source)
    folder = Path(os.path.realpath(folder))
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    remove(temporary)
    temporary.mkdir()
    try:
        export_step(model, temporary / FILE)
        if int8:
            write_int8(temporary / FILE, temporary / INT8_FILE)
        tokenizer.save_pretrained(temporary)
        (temporary / "model.json").write_text(json.dumps(page_data(model, tokenizer)))
        (temporary / "decode.js").write_text(DECODE_JS)
        (temporary / "index.html").write_text(PAGE)
        replace_folder(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return {path.name: path.stat().st_size for path in sorted(folder.glob("*.onnx"))}


def cache_names(layers: int, kind: str) -> list[str]:
    return [f"{kind}.{layer}.{part}" for layer in range(layers) for part in ("key", "value")]


def export_step(model, file) -> None:
    """The graph of `Step`, by torch.onnx's dynamo exporter."""
    config = model.config
    layers = config.num_hidden_layers
    shape = (2, config.num_key_value_heads, 5, config.head_dim)        # 0 and 1 would become constants
    past = tuple(torch.zeros(shape) for _ in range(2 * layers))
    free = torch.export.Dim.DYNAMIC
    with _quiet():
        program = torch.onnx.export(
            Step(model), (torch.zeros(2, 3, dtype=torch.int64), *past), dynamo=True,
            opset_version=OPSET, verbose=False,
            input_names=["input_ids", *cache_names(layers, "past")],
            output_names=["logits", *cache_names(layers, "present")],
            dynamic_shapes=({0: free, 1: free}, tuple({0: free, 2: free} for _ in past)))
    for node in program.model.graph:                  # where in Python each came from: 10% of a small file
        node.metadata_props.clear()
    program.save(str(file), external_data=False)


def write_int8(file, to) -> None:
    """The same graph with its matrices in int8."""
    from onnxruntime.quantization import QuantType, quantize_dynamic
    with _quiet():
        quantize_dynamic(str(file), str(to), weight_type=QuantType.QInt8, per_channel=True)


@contextlib.contextmanager
def _quiet():
    """Without the exporters' warnings: that torchvision is not here, that a graph could be optimised."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def page_data(model, tokenizer) -> dict:
    """What a program without our tokenizer needs: the cache's shape, EOS, each token's bytes.

    A character of `tokens` is a byte (Latin-1). capcode: how decode.js makes text of them.
    """
    config, vocabulary = model.config, getattr(tokenizer, "vocabulary", None)
    capcode, encoding = 0, "utf-8"
    if vocabulary is not None:
        tokens = [token.decode("latin-1") for token in vocabulary.tokens]
        capcode, encoding = vocabulary.capcode, "utf-16le" if vocabulary.charset == 2 else encoding
    else:
        tokens = [token_bytes(tokenizer, i).decode("latin-1") for i in range(vocabulary_rows(tokenizer))]
    tokens += [""] * (config.vocab_size - len(tokens))
    for i in tokenizer.all_special_ids:
        tokens[i] = ""
    return {"layers": config.num_hidden_layers, "kv_heads": config.num_key_value_heads,
            "head_dim": config.head_dim, "context": config.max_position_embeddings,
            "eos_token_id": tokenizer.eos_token_id, "capcode": capcode, "encoding": encoding,
            "tokens": tokens}


def token_bytes(tokenizer, i: int) -> bytes:
    """The bytes that one id of a byte-level BPE stands for; of another tokenizer its text's."""
    from stentor.export.gguf_tokenizer import why_not_gpt2
    token = tokenizer.convert_ids_to_tokens(i)
    if token is None or i in tokenizer.all_special_ids:
        return b""
    if why_not_gpt2(tokenizer):
        return tokenizer.decode([i]).encode()
    return bytes(byte_alphabet()[char] for char in token)


@functools.cache
def byte_alphabet() -> dict[str, int]:
    """{character: byte} of GPT-2's way to print bytes: those that print stand for themselves, the others
    for the characters from U+0100 on, in order."""
    plain = [*range(0x21, 0x7f), *range(0xa1, 0xad), *range(0xae, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}
