"""The precision recipe: the T4 / TPU stability techniques of the Stentor2 and Stentor3 cards, on a
stock Llama, or Qwen3.

Each one puts a forward() in front of a module's own class. Parameters and their names stay where
they were, so state_dict, save_pretrained, deepcopy, DDP and resume see a stock model.
"""
from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from stentor.stock import stock_classes


def apply_precision_recipe(model, *, fp32_norms=False, fp32_critical_layers=(), int8_qat=False,
                           fp32_softmax=False) -> dict:
    """Switch the cards' precision techniques on, in place; return the number of modules each one
    changed, and notes.

    model: LlamaForCausalLM or Qwen3ForCausalLM with FP32 parameters, before DDP and torch.compile.
    torch.autocast decides about the rest.
    fp32_norms: every RMSNorm (QK-norms too: two more a layer). fp32_critical_layers: indices of
    the layers run in FP32. int8_qat: every linear of the other layers (7 each). fp32_softmax:
    every attention, if it is eager.
    On 12 layers the cards count                             INT8  norms  softmax
        Stentor2-12M-Preview  critical {0, 1, 9, 10, 11}       49     25       12
        Stentor2-12M          critical {0, 1}, SDPA             0     25        0
        Stentor3-20M          critical {0, 11}, SDPA            0     25        0

    A saved model reloads through AutoModelForCausalLM as a stock Llama with bit-equal weights. In
    eval mode its logits are bit-equal if INT8 is off (under autocast: and no layer is critical),
    and always once the recipe is applied to it again, because INT8 rounds in eval mode too, to
    nearest.
    torch.compile takes every technique without a graph break (its random numbers are others than
    eager mode's). Applying twice is harmless; only building a new model switches a technique off.
    Raises TypeError for another model class, ValueError for parameters that are not FP32 or layers
    that do not exist.
    """
    critical = set(fp32_critical_layers)
    _check(model, critical)
    layers, notes = model.model.layers, []
    norms = linears = softmaxes = 0
    if fp32_norms:
        norms = _apply(FP32Norm, model.modules(), stock_classes("RMSNorm"))
        notes.append(NORMS_NOTE)
    _apply(FP32Layer, [layers[i] for i in critical], stock_classes("DecoderLayer"))
    if int8_qat:
        ordinary = [m for i, layer in enumerate(layers) if i not in critical
                    for m in layer.modules()]
        linears = _apply(Int8Linear, ordinary, nn.Linear)
        notes.append(INT8_NOTE)
    attention = model.config._attn_implementation
    if fp32_softmax and attention == "eager":
        softmaxes = _apply(FP32SoftmaxAttention, model.modules(), stock_classes("Attention"))
        notes.append(SOFTMAX_NOTE)
    elif fp32_softmax:
        notes.append(NO_SOFTMAX_NOTE.format(attention=attention))
    return {"fp32_norm_modules": norms, "fp32_critical_layers": len(critical),
            "int8_linear_modules": linears, "fp32_softmax_modules": softmaxes, "notes": notes}


NORMS_NOTE = (
    "FP32 norms: with FP32 weights under autocast the residual stream is FP32 and stock Llama "
    "already normalises in FP32, so results change only where hidden states are half.")
INT8_NOTE = (
    "INT8: a checkpoint reloaded as a plain Llama leaves the rounding out, so its logits differ by "
    "the quantisation error until the recipe is applied again.")
SOFTMAX_NOTE = (
    "FP32 softmax: transformers' eager attention already asks for it, so this pins it without "
    "changing a bit; the scores q k^T keep the autocast dtype and in fp16 overflow past 65,504.")
NO_SOFTMAX_NOTE = (
    "FP32 softmax: skipped, because {attention} attention has no softmax call to wrap (its kernel "
    'accumulates in FP32 itself); build the model with attn_implementation="eager" to have it.')


def _check(model, critical: set[int]) -> None:
    if not isinstance(model, stock_classes("ForCausalLM")):
        raise TypeError(
            f"The precision recipe is for a bare LlamaForCausalLM or Qwen3ForCausalLM, not "
            f"{type(model).__name__}; apply it before DDP, PEFT or torch.compile wrap the model.")
    for name, p in model.named_parameters():
        if p.dtype != torch.float32:
            raise ValueError(
                f"The precision recipe needs FP32 master weights, but {name} is {p.dtype}; load "
                "the model with dtype=torch.float32 and let torch.autocast choose the compute "
                "dtype.")
    count = len(model.model.layers)
    if not critical <= set(range(count)):
        raise ValueError(f"fp32_critical_layers={sorted(critical)}, but this model has layers 0 to "
                         f"{count - 1}.")


def _apply(technique: type, modules, stock) -> int:
    """Put `technique` in front of those of the modules that are of the class, or classes, `stock`;
    how many."""
    found = [m for m in modules if isinstance(m, stock)]
    for m in found:
        m.__class__ = in_front_of(getattr(type(m), "stock", type(m)), technique)
    return len(found)


@functools.cache
def in_front_of(stock: type, technique: type) -> type:
    """`technique` itself when it is a kind of `stock`, else a class of both (transformers is not
    imported for it)."""
    if issubclass(technique, stock):
        return technique
    return type(technique.__name__ + stock.__name__, (technique, stock), {"stock": stock})


# The techniques.


class FP32Norm:
    """RMSNorm with one rounding, at its end.

    Stock Llama also squares in FP32, but rounds before multiplying by weight, and with an FP32
    weight gives FP32 back for a half input.
    """

    def forward(self, hidden_states):                 # (batch, length, hidden_size)
        normed = super().forward(hidden_states.float().contiguous())
        return normed.to(hidden_states.dtype)


class FP32Layer:
    """A whole layer outside autocast: every matmul, attention included, in FP32; gives back the
    dtype it was given."""

    def forward(self, hidden_states, *args, **kwargs):    # (batch, length, hidden_size)
        args, kwargs = _to_fp32(args), {key: _to_fp32(value) for key, value in kwargs.items()}
        with torch.autocast(hidden_states.device.type, enabled=False):
            out = super().forward(hidden_states.float(), *args, **kwargs)
        return out.to(hidden_states.dtype)


def _to_fp32(value):
    """Floating tensors, also inside tuples such as (cos, sin), as FP32; masks of bools, ids and
    None as they are."""
    if isinstance(value, tuple):
        return tuple(_to_fp32(v) for v in value)
    return value.float() if torch.is_tensor(value) and value.is_floating_point() else value


class FP32SoftmaxAttention:
    """Eager attention whose softmax is given FP32 scores, whatever this transformers version asks
    for."""

    def forward(self, *args, **kwargs):
        with _SoftmaxInFP32():
            return super().forward(*args, **kwargs)


class _SoftmaxInFP32(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not F.softmax:
            return func(*args, **kwargs)
        out = func(args[0].float(), *args[1:], **kwargs)
        return out.to(kwargs.get("dtype") or args[0].dtype)


class Int8Linear(nn.Linear):
    """nn.Linear that multiplies int8-rounded, dequantised operands; `weight` is the FP32 master
    the optimiser sees."""

    def forward(self, x):
        out = _Int8Matmul.apply(x, self.weight, self.training)
        return out if self.bias is None else out + self.bias.to(out.dtype)


class _Int8Matmul(torch.autograd.Function):
    """Gradients of x + (xq - x).detach() and w + (wq - w).detach(), but what waits for backward is
    int8."""

    @staticmethod
    def forward(ctx, x, weight, stochastic):          # (..., in), (out, in) -> (..., out)
        xq, xs = int8_codes(x, stochastic)
        wq, ws = int8_codes(weight, stochastic)
        ctx.save_for_backward(xq, xs, wq, ws)
        ctx.dtypes = x.dtype, weight.dtype
        return F.linear(xq * xs, wq * ws)             # autocast casts both to its dtype

    @staticmethod
    def backward(ctx, grad):
        xq, xs, wq, ws = ctx.saved_tensors
        grad_x = grad_w = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ (wq * ws).to(grad.dtype)).to(ctx.dtypes[0])
        if ctx.needs_input_grad[1]:
            x = (xq * xs).to(grad.dtype).flatten(0, -2)
            grad_w = (grad.flatten(0, -2).T @ x).to(ctx.dtypes[1])
        return grad_x, grad_w, None


def int8_codes(x, stochastic):
    """x (..., k) -> int8 codes (..., k) and FP32 scales (..., 1) with x ~ codes * scales, one scale
    per row or token.

    Stochastic rounding, floor(v + u) with u uniform in [0, 1), is written round(v + n) with
    n = u - 1/2. n is an odd multiple of 2**-16 (so whole v stay as they are, and E[code] is v to
    within 2**-16), four of them cut from one int64: torch draws random numbers on one CPU core,
    where rand_like costs as much as a bf16 matmul.
    """
    scales = x.abs().amax(-1, keepdim=True).float().clamp_min(1e-8) / 127
    codes = x / scales
    if stochastic:
        size = (codes.numel() // 4 + 1,)
        bits = torch.randint(-(2**63), 2**63 - 1, size, device=x.device) | 0x0001_0001_0001_0001
        noise = bits.view(torch.int16)[: codes.numel()].view_as(codes)
        codes.add_(noise, alpha=2**-16)
    return codes.round_().clamp_(-127, 127).to(torch.int8), scales


# Old checkpoints.


def rename_weight_master(state_dict: dict) -> dict:
    """Standard names for an old Preview checkpoint: X.weight_master -> X.weight, in place of a
    stale X.weight."""
    stale = {key.removesuffix("_master") for key in state_dict if key.endswith(".weight_master")}
    return {key.removesuffix("_master") if key.endswith(".weight_master") else key: value
            for key, value in state_dict.items() if key not in stale}
