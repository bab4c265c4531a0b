"""The training loss without logits in memory, and the layers compiled one by one."""
from __future__ import annotations

import types

import torch

from stentor.stock import stock_classes


def use_chunked_loss(model, compiled: bool = False) -> None:
    """Let a LlamaForCausalLM or Qwen3ForCausalLM (bare or inside peft) compute its training loss by
    ChunkedCrossEntropy; the same loss.

    Only the call is replaced, on this object: without labels, or in eval mode, it is the stock
    forward.
    """
    from transformers.modeling_outputs import CausalLMOutputWithPast
    stock = next(m for m in model.modules() if isinstance(m, stock_classes("ForCausalLM")))
    rows_loss = torch.compile(softmax_gradient, dynamic=False) if compiled else softmax_gradient

    def forward(self, input_ids=None, labels=None, num_items_in_batch=None, **kwargs):
        if labels is None or not self.training:
            return type(self).forward(self, input_ids=input_ids, labels=labels,
                                      num_items_in_batch=num_items_in_batch, **kwargs)
        hidden = self.model(input_ids=input_ids, **{"use_cache": False, **kwargs}).last_hidden_state
        hidden = hidden[:, :-1].flatten(0, 1)
        device, dtype = hidden.device.type, hidden.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        targets = labels[:, 1:].flatten()
        with torch.autocast(device, enabled=False):
            loss = ChunkedCrossEntropy.apply(hidden, self.lm_head.weight, targets, dtype, rows_loss)
        counted = (targets != -100).sum() if num_items_in_batch is None else num_items_in_batch
        return CausalLMOutputWithPast(loss=loss / counted)
    stock.forward = types.MethodType(forward, stock)


def compile_layers(model) -> None:
    """torch.compile every decoder layer, in place: parameter names, saving and DDP stay as they
    are.

    Layer by layer, because all equal layers share one compilation: 12.3M's first three steps took
    38 s, not 67 s.
    """
    for module in model.modules():
        if isinstance(module, stock_classes("DecoderLayer")):
            module.compile(dynamic=False)


class ChunkedCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy of `hidden @ weight.T`, a few rows at a time, with the gradient made in
    the same pass.

    hidden (n, hidden_size), weight (vocab_size, hidden_size), targets (n,) with -100 where nothing
    is to be predicted; matrix products in `dtype`, the softmax in FP32; `rows_loss` is
    softmax_gradient or the same compiled. The (n, vocab_size) logits never exist: at 8 x 512 x
    4,096 they and their gradients are 200 MB that leave the cache at every pass.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, dtype, rows_loss):
        least, scores = (256, 2**22) if hidden.device.type == "cpu" else (1024, 2**26)
        rows = max(least, scores // len(weight))
        w, valid = weight.to(dtype), targets != -100
        total = hidden.new_zeros((), dtype=torch.float32)
        grad_hidden = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_hidden = torch.empty_like(hidden, dtype=dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        for i in range(0, len(hidden), rows):
            h = hidden[i:i + rows].to(dtype)
            target, ok = targets[i:i + rows, None].clamp(min=0), valid[i:i + rows, None]
            loss, gradient = rows_loss(h, w, target, ok)
            total += loss
            if grad_hidden is not None:
                torch.mm(gradient, w, out=grad_hidden[i:i + rows])
            if grad_weight is not None:
                grad_weight += gradient.T @ h
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.dtypes = hidden.dtype, weight.dtype
        return total

    @staticmethod
    def backward(ctx, upstream):
        # the loss scale comes in FP32
        grads = (None if grad is None else (grad.float() * upstream).to(dtype)
                 for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes))
        return *grads, None, None, None


def softmax_gradient(hidden, weight, target, ok):
    """Summed cross-entropy of `hidden @ weight.T` and its gradient to the scores, in hidden's
    dtype; the softmax in FP32.

    hidden (n, hidden_size), weight (vocab_size, hidden_size), target (n, 1), ok (n, 1): False
    where nothing is predicted.
    """
    scores = (hidden @ weight.T).float()              # (n, vocab_size)
    largest, wanted = scores.amax(-1, keepdim=True), scores.gather(-1, target)
    scores.sub_(largest).exp_()                       # one exponential a score
    normalizer = scores.sum(-1, keepdim=True)
    loss = ((normalizer.log() + largest - wanted) * ok).sum()
    # softmax - one_hot, 0 where masked
    gradient = scores.mul_(ok / normalizer).to(hidden.dtype)
    at_target = ((wanted - largest).exp() / normalizer - 1) * ok
    return loss, gradient.scatter_(-1, target, at_target.to(hidden.dtype))
