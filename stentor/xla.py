"""The XLA engine: what the one training loop needs from TPUs, and from XLA's CPU backend in tests.

One process, all chips (SPMD): the batch is cut along the mesh axis "data", weights and optimiser
are replicated, and XLA puts the gradient exchange into the graph. A whole optimiser step is one
graph of static shapes: forward, backward, accumulation, clipping, the test for a finite gradient,
the learning rate, AdamW and the log's sums. The host only sends batches and, once a line of the
log, reads four numbers; it never waits for the device in between.
Uses only what torch_xla 2.8 (Kaggle's image) and 2.9 both have. Another TPU backend would replace
this file.
"""
from __future__ import annotations

import contextlib
import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torch_xla
import torch_xla.core.xla_model as xm
import torch_xla.debug.metrics as met
import torch_xla.distributed.spmd as xs
import torch_xla.runtime as xr
from torch import nn

from stentor.files import ParameterError
from stentor.optimizers import make_optimizer, moments, optimizer_groups, set_learning_rate
from stentor.precision import FP32Layer, Int8Linear, in_front_of
from stentor.process import peak_memory


class XlaEngine:
    """The interface of engine.Engine, on every XLA device at once.

    PJRT_DEVICE in the environment says which: "TPU", or "CPU" with CPU_NUM_DEVICES virtual
    devices. mixed_precision: "bf16" (also for "fp16", which a TPU has not) or "no". Not
    torch.autocast and never XLA_USE_BF16 (it rounds the master weights): the linears of every
    layer that is not critical, and lm_head, multiply in bf16; norms, critical layers, rotary
    embeddings, residual stream, softmax, loss and AdamW are FP32.
    """
    static_shapes = True

    def __init__(self, mixed_precision: str, cache_dir=None):
        from transformers import AttentionInterface
        if "XLA_USE_BF16" in os.environ:
            raise ParameterError(["XLA_USE_BF16 is set and would round the master weights to bf16: "
                                  "unset it."])
        if cache_dir and os.environ["PJRT_DEVICE"] == "TPU":
            xr.initialize_cache(str(Path(cache_dir)))     # the CPU backend cannot read its cache
        xr.use_spmd()                                 # before any question about devices
        self.device = torch_xla.device()
        self.devices = xr.global_runtime_device_count()
        self.mesh = xs.Mesh(np.arange(self.devices), (self.devices,), ("data",))
        self.rank, self.world_size = 0, 1             # processes
        self.mixed_precision = "no" if mixed_precision == "no" else "bf16"
        self.autocast_dtype = {"no": None, "bf16": torch.bfloat16}[self.mixed_precision]
        self.scaler = torch.amp.GradScaler("cpu", enabled=False)
        self.feeder, self.fed = ThreadPoolExecutor(1, thread_name_prefix="feed"), {}
        AttentionInterface.register("stentor_causal", causal_attention)

    def problems(self, recipe) -> list[str]:
        """What in a recipe is not for XLA, one sentence each."""
        if recipe.ema_decay:
            return [f"ema_decay = {recipe.ema_decay} is not for XLA: set it to None, or use a GPU "
                    "or the CPU."]
        return []

    # The model

    def attention(self, name: str) -> str:
        return "stentor_causal"

    def place(self, model):
        """The model on the devices, its linears in bf16 where the recipe has them so."""
        int8 = any(isinstance(m, Int8Linear) for m in model.modules())
        if int8 or getattr(model.model, "gradient_checkpointing", False):
            raise ParameterError(["gradient_checkpointing and int8_qat are not made for XLA; set "
                                  "both to False."])
        if self.autocast_dtype:
            layers = [layer for layer in model.model.layers if not isinstance(layer, FP32Layer)]
            for module in [m for layer in layers for m in layer.modules()] + [model.lm_head]:
                if isinstance(module, nn.Linear):
                    module.__class__ = in_front_of(nn.Linear, BF16Linear)
        model.to(self.device)
        model.tie_weights()           # .to() gave lm_head a copy of its own, which would drift away
        return model

    def on_cpu(self, model):
        """A stock copy in host memory, as it is saved."""
        config = type(model.config)(**{**model.config.to_dict(), "attn_implementation": "sdpa"})
        copy = type(model)(config)
        copy.generation_config = model.generation_config
        copy.load_state_dict({key: value.cpu() for key, value in model.state_dict().items()})
        copy.tie_weights()
        return copy

    def optimizer(self, model, recipe, say=print):
        """Torch's AdamW, or Muon beside it, whose step count and learning rate are tensors on the
        device: no number that changes is in the graph."""
        optimizer = make_optimizer(
            recipe, optimizer_groups(model, recipe), self.device, say, self.mixed_precision,
            capturable=True, foreach=False)
        for group in optimizer.param_groups:
            for p in group["params"]:     # made now, or the first step would be another graph
                optimizer.state[p] = {
                    name: torch.zeros(() if name == "step" else p.shape).to(self.device)
                    for name in moments(group)}
        return optimizer

    def prepare(self, model, torch_compile: bool = False):
        """The model itself; torch_compile is no matter here, XLA compiles everything."""
        return model

    # The step

    def begin(self, recipe, state: dict, say) -> None:
        self.recipe = recipe
        # Of shape (1,), not (): XLA takes a scalar that happens to be 0 or 1 for a constant of the
        # graph, and compiles again.
        table = [recipe.learning_rate_at(update) for update in range(recipe.total_steps + 1)]
        self.learning_rates = torch.tensor(table, dtype=torch.float32).to(self.device)
        self.updates = torch.tensor([state["updates"]], dtype=torch.int32).to(self.device)
        self.window = torch.tensor([state["window"][0]], dtype=torch.float32).to(self.device)
        self.grad_norm, self.learning_rate = (torch.zeros(1).to(self.device) for _ in range(2))
        self.done = state["updates"] + state["skipped_steps"]
        self.say, self.skipped = say, state["skipped_steps"]

    def micro_batch(self, model, batch: dict, per_device: int, say) -> int:
        """Sequences a device takes at a time: as the recipe says. Too many are refused by the
        compiler, at the first step."""
        rows = self.recipe.total_batch_size
        if rows % self.devices:
            raise ParameterError([
                f"the global batch of {rows} sequences does not divide among {self.devices} "
                "devices; change per_device_train_batch_size or gradient_accumulation_steps."])
        a_device = rows // self.devices
        per_device = min(per_device, a_device)
        while a_device % per_device:
            per_device -= 1
        say(f"{rows} sequences a step on {self.devices} devices: {a_device} a device, in "
            f"{a_device // per_device} micro-batches of {per_device}")
        return per_device

    def _upload(self, batch: dict, rows: int) -> dict:
        """The batch cut over the devices, with `rows` rows (rows beyond those given count for
        nothing), and its tokens."""
        given = len(batch["input_ids"])
        labels = F.pad(batch["labels"].int(), (0, 0, 0, rows - given), value=-100)
        ids = F.pad(batch["input_ids"].int(), (0, 0, 0, rows - given))
        spec = xs.ShardingSpec(self.mesh, ("data", None))
        count = (labels[:, 1:] != -100).sum().float()[None]
        ids, labels = xm.send_cpu_data_to_device([ids, labels], self.device, input_sharding=spec)
        count, = xm.send_cpu_data_to_device([count], self.device)
        return {"input_ids": ids, "labels": labels, "count": count}

    def feed(self, store, step: int) -> dict:
        """The batch of this step, on the devices already; the next one is read and sent while this
        one trains."""
        def load(step):
            return self._upload(store.batch(step), self.recipe.total_batch_size)
        batch = self.fed.pop(step, None) or self.feeder.submit(load, step)
        if step + 1 < self.recipe.total_steps:
            self.fed = {step + 1: self.feeder.submit(load, step + 1)}
        return batch.result()

    def step(self, model, optimizer, batch: dict, per_device: int) -> bool | None:
        """One optimiser step, as one graph; started, not waited for. Whether it was skipped is not
        known yet: None."""
        self._describe_step(model, optimizer, batch, per_device)
        torch_xla.sync()
        self.done += 1

    def _describe_step(self, model, optimizer, batch: dict, per_device: int) -> None:
        """The graph of a step. A function of its own: every tensor alive at the sync would be a
        result to keep in memory."""
        ids, labels = batch["input_ids"].long(), batch["labels"].long()
        parts = len(ids) // (per_device * self.devices)
        loss = 0.0
        for part in range(parts):     # every parts-th row: so each device keeps the rows it has
            part_loss = model(input_ids=ids[part::parts], labels=labels[part::parts],
                              use_cache=False, num_items_in_batch=batch["count"][0]).loss
            part_loss.backward()
            loss = loss + part_loss.detach()
        with torch.no_grad():
            grad_norm = nn.utils.clip_grad_norm_(model.parameters(), self.recipe.max_grad_norm)
            finite = torch.isfinite(grad_norm)
            update = self.updates.clamp(max=len(self.learning_rates) - 1)
            self.learning_rate = self.learning_rates.index_select(0, update)
            # at 0, torch's capturable AdamW divides 0 by 0
            tensors, rate = [], self.learning_rate[0].clamp(min=1e-20)
            set_learning_rate(optimizer, rate)
            for group in optimizer.param_groups:
                tensors += [t for p in group["params"] for t in (p, *optimizer.state[p].values())]
            before = [t.clone() for t in tensors]
            optimizer.step()
            # a gradient that is not finite leaves everything as it was, the schedule too
            for tensor, old in zip(tensors, before):
                tensor.copy_(torch.where(finite, tensor, old))
            self.updates = self.updates + finite.int()
            self.window = self.window + torch.where(finite, loss, torch.zeros_like(loss))
            self.grad_norm = grad_norm
        optimizer.zero_grad(set_to_none=True)

    def read(self) -> dict:
        """Counters and the log's figures; waits for the device."""
        updates = int(self.updates.cpu())
        skipped = self.done - updates
        if skipped > self.skipped:
            self.say(f"step {self.done:>6,} | gradient was not finite: {skipped - self.skipped} "
                     "step skipped lately")
            self.skipped = skipped
        figures = {"window_loss": self.window, "grad_norm": self.grad_norm,
                   "learning_rate": self.learning_rate}
        return {"updates": updates, "skipped_steps": skipped, "loss_scale": 1.0,
                **{name: float(value.cpu()) for name, value in figures.items()}}

    def clear_window(self) -> None:
        self.window = torch.zeros(1).to(self.device)

    def counters(self) -> dict[str, int]:
        """Graphs compiled and executed so far, for the log: after warm-up the first must stand
        still."""
        compiled = met.metric_data("CompileTime")
        executed = met.metric_data("ExecuteReplicatedTime")
        return {"compilations": compiled[0] if compiled else 0,
                "executions": executed[0] if executed else 0}

    # Evaluation and the rest

    def eval_batch_size(self, batch_size: int) -> int:
        return -(-batch_size // self.devices) * self.devices

    def to_device(self, batch: dict) -> dict:
        """Rows cut over the devices; their number must divide by that of the devices."""
        names = list(batch)
        spec = xs.ShardingSpec(self.mesh, ("data", None))
        sent = xm.send_cpu_data_to_device(
            [batch[name] for name in names], self.device, input_sharding=spec)
        return dict(zip(names, sent))

    def autocast(self):
        return contextlib.nullcontext()

    def no_sync(self, model, last: bool):
        return contextlib.nullcontext()

    def sync(self) -> None:
        """Start what has been asked for."""
        torch_xla.sync()

    def wait(self) -> None:
        xm.wait_device_ops()

    def sum(self, *values: float) -> list[float]:
        return [float(value) for value in values]

    def sum_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def memory(self) -> str:
        """Memory of one device where the backend tells, else of this process."""
        try:
            info = xm.get_memory_info(self.device)
            used, limit = info["bytes_used"] / 2**30, info["bytes_limit"] / 2**30
            return f"{used:.1f} of {limit:.1f} GiB on a device"
        except (RuntimeError, KeyError, TypeError):
            return f"{peak_memory() / 2**30:.1f} GiB of memory"

    def close(self) -> None:
        self.feeder.shutdown(wait=False, cancel_futures=True)


# Attention. transformers builds its mask on the host for the attentions it knows, which waits for
# the device every step; for one registered under a name of its own it builds none.


def causal_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """What transformers calls; rotary embeddings leave q and k in FP32 beside a bf16 v: all get
    v's dtype."""
    out = CausalAttention.apply(query.to(value.dtype), key.to(value.dtype), value, scaling)
    return out.transpose(1, 2).contiguous(), None


class CausalAttention(torch.autograd.Function):
    """Causal grouped-query attention in blocks of queries; nothing of size length x length
    outlives its block.

    The scores of 8 sequences of 4,096 tokens and 10 heads are 2.7 GB a layer in bf16, 12 layers of
    them twice a v5e's memory, so the backward pass makes them again from q, k and the row's
    log-sum-exp, as FlashAttention does. A block sees only the keys up to its own last one: the
    upper half of the square is never computed.
    """
    block = 512                                       # queries

    @staticmethod
    def scores(q, k, first, scale):
        """q (b, kv, g, n, d): queries first .. first + n of each group; k (b, kv, m, d). FP32 (b,
        kv, g, n, m), masked."""
        b, kv, g, n, d = q.shape
        m = k.shape[2]
        s = q.reshape(b, kv, g * n, d) @ k.transpose(-1, -2)
        s = s.reshape(b, kv, g, n, m).float() * scale
        rows = torch.arange(first, first + n, device=q.device)
        return s.masked_fill(torch.arange(m, device=q.device) > rows[:, None], -math.inf)

    @staticmethod
    def forward(ctx, q, k, v, scale):
        """q (b, heads, length, d), k and v (b, kv_heads, length, d), all of one dtype -> (b,
        heads, length, d)."""
        b, heads, length, d = q.shape
        kv = k.shape[1]
        grouped = q.reshape(b, kv, heads // kv, length, d)
        outs, sums = [], []
        for first in range(0, length, CausalAttention.block):
            last = min(first + CausalAttention.block, length)
            s = CausalAttention.scores(grouped[:, :, :, first:last], k[:, :, :last], first, scale)
            log_sum = s.logsumexp(-1, keepdim=True)
            p = (s - log_sum).exp().to(v.dtype).reshape(b, kv, -1, last)
            outs.append((p @ v[:, :, :last]).reshape(b, kv, heads // kv, last - first, d))
            sums.append(log_sum)
        out = torch.cat(outs, 3).reshape(b, heads, length, d)
        ctx.save_for_backward(q, k, v, out, torch.cat(sums, 3))
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx, grad):
        saved = [t.detach() for t in ctx.saved_tensors] + [grad.contiguous()]
        if grad.device.type == "xla":
            xm.optimization_barrier_(saved)           # or XLA keeps the forward's equal scores
        q, k, v, out, log_sum, grad = saved
        b, heads, length, d = q.shape
        kv = k.shape[1]
        q, out, grad = (t.reshape(b, kv, heads // kv, length, d) for t in (q, out, grad))
        delta = (out.float() * grad.float()).sum(-1, keepdim=True)
        dq = []
        dk, dv = (torch.zeros_like(t, dtype=torch.float32) for t in (k, v))
        for first in range(0, length, CausalAttention.block):
            last = min(first + CausalAttention.block, length)
            queries, grads = (t[:, :, :, first:last].reshape(b, kv, -1, d) for t in (q, grad))
            keys, values = k[:, :, :last], v[:, :, :last]
            s = CausalAttention.scores(q[:, :, :, first:last], keys, first, ctx.scale)
            p = (s - log_sum[:, :, :, first:last]).exp()
            dp = (grads @ values.transpose(-1, -2)).float().view_as(p)
            ds = p * (dp - delta[:, :, :, first:last]) * ctx.scale
            p, ds = (t.to(q.dtype).reshape(b, kv, -1, last) for t in (p, ds))
            dq.append((ds @ keys).reshape(b, kv, heads // kv, last - first, d))
            rest = (0, 0, 0, length - last)
            dk = dk + F.pad((ds.transpose(-1, -2) @ queries).float(), rest)
            dv = dv + F.pad((p.transpose(-1, -2) @ grads).float(), rest)
        return torch.cat(dq, 3).reshape(b, heads, length, d), dk.to(k.dtype), dv.to(v.dtype), None


class BF16Linear:
    """In front of nn.Linear: bf16 operands and result in training; FP32 in evaluation, which is
    FP32 everywhere."""

    def forward(self, x):                             # (batch, length, in) -> (batch, length, out)
        if not self.training:
            return super().forward(x)
        bias = None if self.bias is None else self.bias.bfloat16()
        return F.linear(x.bfloat16(), self.weight.bfloat16(), bias)
