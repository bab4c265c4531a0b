"""Folders that transformers itself loads in one line: other float types, and quantised linear layers.

In each of them the embedding counts. A small model is mostly that: of Stentor-12M's 12.0 million
parameters 6.3 are its table, so "8 bits" is not a quarter of fp32 while the table stays as it was.
Neither torchao nor bitsandbytes quantises an embedding or the head tied to it; they stay tied, in 16 bits
(torchao bf16, bitsandbytes fp16).
"""
from __future__ import annotations

import copy
import warnings

import torch
from torch import nn

from stentor.export.packages import missing
from stentor.files import ParameterError
from stentor.folders import load_model, save_model_folder
from stentor.tokenizer import load_tokenizer

FLOATS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# {format: (package, needs CUDA, what it is)}. bitsandbytes runs on the CPU too; torchao's 4-bit
# weights have kernels for CUDA alone ("does not support device 'cpu' yet", torchao 0.18).
QUANTISED = {
    "int8-torchao": ("torchao", False, "int8 weights, a scale a row; the rest bf16"),
    "int4-torchao": ("torchao", True, "int4 weights, a scale and a zero for 32 weights; the rest bf16"),
    "int8-bnb": ("bitsandbytes", False, "LLM.int8(): int8 weights and activations, outliers apart"),
    "nf4-bnb": ("bitsandbytes", False, "NF4: 16 levels of a normal distribution, blocks of 64"),
    "fp4-bnb": ("bitsandbytes", False, "FP4: a sign, two bits of exponent, one of fraction"),
}


def why_not(form: str) -> str | None:
    """Why a format of QUANTISED cannot be made here, in one sentence; None: it can."""
    package, cuda, _ = QUANTISED[form]
    if wanting := missing(package):
        return wanting
    if cuda and not torch.cuda.is_available():
        return f"{form} has kernels for CUDA only, and there is no GPU here"


def write_floats(source, folder, form: str) -> None:
    """The model in the folder `source` as a folder in fp32, fp16 or bf16, tokenizer and all."""
    if form not in FLOATS:
        raise ParameterError([f"form = {form!r} must be one of {', '.join(FLOATS)}."])
    model = load_model(source, dtype=FLOATS[form])
    save_model_folder(model, load_tokenizer(source), folder)


def write_quantised(source, folder, form: str) -> None:
    """The model in the folder `source` with linear layers as QUANTISED says: a folder that
    `AutoModelForCausalLM.from_pretrained(folder)` loads where the package is installed.

    Raises ParameterError where it cannot be made here.
    """
    if form not in QUANTISED:
        raise ParameterError([f"form = {form!r} must be one of {', '.join(QUANTISED)}."])
    if problem := why_not(form):
        raise ParameterError([f"{problem}."])
    # torchao multiplies by the scale after summing int8 x fp16: past 65,504, and the loss was nan
    dtype = torch.bfloat16 if QUANTISED[form][0] == "torchao" else torch.float16
    device = "cuda" if form == "int4-torchao" else None
    model = load_model(source, dtype=dtype, quantization_config=_config(form), device_map=device)
    if form in ("nf4-bnb", "fp4-bnb") and not torch.cuda.is_available():
        widths = {model.config.hidden_size, model.config.intermediate_size}
        if odd := [width for width in sorted(widths) if width % 64]:
            raise ParameterError([f"{form}: bitsandbytes' 4 bits run on the CPU only where widths are "
                                  f"multiples of 64, and a layer here is {odd[0]} wide."])
    assert tied_as_configured(model), f"{form} untied the head"
    save_model_folder(model, load_tokenizer(source), folder)


def _config(form: str):
    """transformers' quantization_config of a format."""
    from transformers import BitsAndBytesConfig, TorchAoConfig
    if form.endswith("bnb"):
        if form == "int8-bnb":
            return BitsAndBytesConfig(load_in_8bit=True)
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=form[:3],
                                  bnb_4bit_compute_dtype=torch.float16)
    from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig
    if form == "int8-torchao":
        return TorchAoConfig(Int8WeightOnlyConfig())
    return TorchAoConfig(Int4WeightOnlyConfig(group_size=32))


def tied_as_configured(model) -> bool:
    """Whether head and embedding are one tensor where config.json says so."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    return not model.config.tie_word_embeddings or head.weight is embedding.weight


def load_dynamic_int8(folder, *, head: bool = False):
    """torch's dynamic int8 for the CPU, from a plain folder: fp32 in and out, int8 inside.

    It has no folder of its own: what torch saves of it is a pickle. head: also the head, as the cards
    print it, {nn.Linear}; it then is a second table beside the embedding, untied. torch says that this
    way will go (torch.ao.quantization); torchao is what follows it.
    """
    model = load_model(folder, dtype=torch.float32).eval()
    return dynamic_int8(model, head=head)


def dynamic_int8(model, *, head: bool = False):
    """A copy of an fp32 model on the CPU with its linear layers in torch's dynamic int8."""
    from torch.ao.quantization import default_dynamic_qconfig, quantize_dynamic
    model = copy.deepcopy(model)
    names = {name for name, module in model.named_modules()
             if isinstance(module, nn.Linear) and (head or module is not
                                                   model.get_output_embeddings())}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")               # that it will go
        return quantize_dynamic(model, dict.fromkeys(names, default_dynamic_qconfig))


def bytes_held(model) -> int:
    """Bytes of the weights of a plain or dynamic int8 model in memory, what is tied counted once."""
    seen, total = set(), 0
    for module in model.modules():
        packed = getattr(module, "_packed_params", None)
        if packed is not None and hasattr(module, "weight") and callable(module.weight):
            weight = module.weight()                  # int8, with one fp32 scale
            total += weight.numel() + 4
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            total += tensor.numel() * tensor.element_size()
    return total
