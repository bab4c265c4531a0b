"""Every format by name: what it is, whether it claims the same tokens, who can load it, and how it is written."""
from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from stentor.export.gguf_file import KINDS, write_gguf
from stentor.export.onnx_files import FILE, INT8_FILE, write_onnx
from stentor.export.packages import missing
from stentor.export.quantised import (
    FLOATS, QUANTISED, bytes_held, load_dynamic_int8, why_not, write_floats, write_quantised)
from stentor.files import ParameterError
from stentor.hub import is_hub_name

_TORCH = "AutoModelForCausalLM.from_pretrained(folder)"
_LLAMA = "llama.cpp, LM Studio, Ollama"


@dataclass(frozen=True)
class Format:
    """One row of the table before anything is measured."""
    name: str
    what: str
    loads: str                                        # with what
    exact: bool = False                               # whether it claims fp32's very tokens


def _all_formats() -> dict[str, Format]:
    rows = [Format("fp32", "as it was trained", _TORCH, True),
            Format("fp16", "every weight in 16 bits", _TORCH),
            Format("bf16", "every weight in 16 bits, 8 of them exponent", _TORCH),
            Format("int8-dynamic", "torch's dynamic int8, the tied head left to the embedding",
                   "stentor.export.load_dynamic_int8(folder)"),
            Format("int8-dynamic-head", "the same as the cards print it: the head a second table",
                   "stentor.export.load_dynamic_int8(folder, head=True)")]
    rows += [Format(name, what, _TORCH) for name, (_, _, what) in QUANTISED.items()]
    blocks = {"f32": "fp32", "f16": "fp16", "q8_0": "8 bits, a scale for 32 weights",
              "q4_0": "4 bits, a scale for 32 weights; the embedding Q8_0",
              "q6_k": "6.6 bits, blocks of 256", "q4_k": "4.5 bits, blocks of 256; the embedding Q6_K"}
    rows += [Format(f"gguf-{kind}", blocks[kind], _LLAMA, kind == "f32") for kind in KINDS]
    rows += [Format("onnx", "fp32 with a KV cache", "onnxruntime, a browser, a phone", True),
             Format("onnx-int8", "matrices and embedding in int8", "onnxruntime, a browser, a phone")]
    return {row.name: row for row in rows}


FORMATS = _all_formats()


def skipped(name: str) -> str | None:
    """Why a format cannot be made and run here, in one sentence; None: it can."""
    if name not in FORMATS:
        return f"{name!r} is none of {', '.join(FORMATS)}"
    if name in QUANTISED:
        return why_not(name)
    if name.startswith("gguf"):
        return missing("gguf", "xllamacpp")
    if name.startswith("onnx"):
        return missing("onnx", "onnxscript", "onnxruntime")
    if name.startswith("int8-dynamic") and "fbgemm" not in torch.backends.quantized.supported_engines:
        return "torch's dynamic int8 needs its fbgemm or x86 kernels, which this processor's build lacks"


@dataclass(frozen=True)
class Written:
    """What `write_format` made: what a runner opens, its weights' bytes, and what there is to say."""
    path: Path
    bytes: int
    note: str = ""


def write_format(name: str, source, folder) -> Written:
    """The model in the folder `source` in the format `name`, in `folder`/<name>.

    Of the two ONNX formats the first written makes both. Raises ParameterError, in one sentence, where
    `skipped` has one.
    """
    if said := skipped(name):
        raise ParameterError([f"{name}: {said}."])
    folder = Path(folder)
    if name.startswith("int8-dynamic"):
        held = bytes_held(load_dynamic_int8(source, head=name.endswith("head")))
        return Written(Path(source), held, "in memory only: torch saves it as a pickle")
    if name.startswith("gguf"):
        return _write_gguf(name, source, folder / "gguf")
    if name.startswith("onnx"):
        file = folder / "onnx" / (FILE if name == "onnx" else INT8_FILE)
        if name == "onnx" or not file.is_file():
            write_onnx(source, folder / "onnx")
        return Written(file, file.stat().st_size)
    (write_floats if name in FLOATS else write_quantised)(source, folder / name, name)
    sizes = [path.stat().st_size for path in (folder / name).glob("*.safetensors")]
    return Written(folder / name, sum(sizes))


def _write_gguf(name: str, source, folder: Path) -> Written:
    kind = name.removeprefix("gguf-")
    file = folder / f"model-{kind}.gguf"
    made = write_gguf(source, file, kind)
    note = []
    if made["fallback"]:
        types = ", ".join(sorted(set(made["types"]) - {"F32"}))
        note.append(f"{len(made['fallback'])} matrices are no multiple of the block wide: {types}")
    if made["tokenizer"]:
        _tokenizer_beside(source, folder)
        note.append("must be fed ids")
    return Written(file, made["bytes"], "; ".join(note))


def _tokenizer_beside(source, folder: Path) -> None:
    """What turns text into a fed GGUF's ids: the tokenizer's files, in `folder`/tokenizer."""
    from stentor.tokenizer import load_tokenizer, save_tokenizer
    shutil.rmtree(folder / "tokenizer", ignore_errors=True)
    save_tokenizer(load_tokenizer(source), folder / "tokenizer")


def model_problem(model: str) -> str | None:
    """What is wrong with a folder or hub name as a model to export, or None."""
    if not is_hub_name(model) and not (Path(model) / "config.json").is_file():
        return "is neither a model folder (it has no config.json) nor a hub name (hf:owner/name)"


def local_folder(model: str, folder) -> Path:
    """The folder of a model, or that of a hub name's files, saved in `folder` in fp32 as ours are."""
    if Path(model).is_dir():
        return Path(model)
    write_floats(model, folder, "fp32")
    return Path(folder)


FIVE_LINES = '''import xllamacpp
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("tokenizer", trust_remote_code=True)
settings = xllamacpp.CommonParams()
settings.model.path = "{file}"
server = xllamacpp.Server(settings)
ids = tokenizer("{prompt}", add_special_tokens=False)["input_ids"]
said = server.handle_completions({{"prompt": ids, "n_predict": 50, "n_probs": 1}})
print(tokenizer.decode([token["id"] for token in said["choices"][0]["logprobs"]["content"]]))
'''
