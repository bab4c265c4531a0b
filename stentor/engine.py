"""The engine: what differs between devices.

This one serves the CPU and CUDA, with 1..N processes; xla.py holds the one for TPUs.
"""
from __future__ import annotations

import contextlib
import math
import os

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from stentor.loss import compile_layers, use_chunked_loss
from stentor.optimizers import make_optimizer, optimizer_groups, set_learning_rate
from stentor.process import peak_memory
from stentor.recipes import Recipe


def find_engine(mixed_precision: str, cache_dir=None):
    """XLA where the environment says STENTOR_ENGINE=xla, as `launch` does, else the CPU or CUDA.
    (PJRT_DEVICE alone says nothing: importing torch_xla sets it.)"""
    if os.environ.get("STENTOR_ENGINE") != "xla":
        return Engine(mixed_precision)
    from stentor.xla import XlaEngine
    return XlaEngine(mixed_precision, cache_dir)


class Engine:
    """Device, autocast, loss scaling, gradient exchange.

    `mixed_precision` is as in the recipe; `autocast_dtype` is what runs.
    fp16 with dynamic loss scaling is for GPUs below compute capability 8 (a T4 only emulates
    bf16); from 8 up, bf16.
    """

    static_shapes = False                             # True: another shape costs a compilation

    def __init__(self, mixed_precision: str):
        self.rank = int(os.environ.get("RANK", 0))
        self.world_size = int(os.environ.get("WORLD_SIZE", 1))
        if self.world_size > 1:
            from accelerate import PartialState       # sets up the launcher's process group
            self.device = PartialState(cpu=not torch.cuda.is_available()).device
        else:
            self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if mixed_precision == "fp16" and self.device.type == "cuda":
            if torch.cuda.get_device_capability()[0] >= 8:
                mixed_precision = "bf16"
        self.mixed_precision = mixed_precision
        dtypes = {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}
        self.autocast_dtype = dtypes[mixed_precision]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=mixed_precision == "fp16")

    def problems(self, recipe: Recipe) -> list[str]:
        """What in a recipe is not for this kind of device, one sentence each."""
        return []

    def autocast(self):
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.autocast_dtype)

    def attention(self, name: str) -> str:
        """The attention implementation to build the model with where the recipe says `name`."""
        return name

    def place(self, model):
        """The model on the device."""
        return model.to(self.device)

    def on_cpu(self, model):
        """The model as save_pretrained can take it."""
        return model

    def optimizer(self, model, recipe: Recipe, say=print):
        groups = optimizer_groups(model, recipe)
        return make_optimizer(recipe, groups, self.device, say, self.mixed_precision)

    def prepare(self, model, torch_compile: bool = False):
        """The model to call in the loop: the chunked loss; DistributedDataParallel when there are
        several processes."""
        use_chunked_loss(model, torch_compile)
        if torch_compile:
            compile_layers(model)
        if self.world_size == 1:
            return model
        from torch.nn.parallel import DistributedDataParallel
        index = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=index)

    def no_sync(self, model, last: bool):
        return contextlib.nullcontext() if last or self.world_size == 1 else model.no_sync()

    def sum(self, *values: float) -> list[float]:
        """Sum numbers over all processes, in float64."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.world_size > 1:
            torch.distributed.all_reduce(total)
        return total.tolist()

    def sum_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over all processes, in place, without waiting for the device."""
        if self.world_size > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def to_device(self, batch: dict) -> dict:
        return {key: value.to(self.device, non_blocking=True) for key, value in batch.items()}

    # The loop's own steps. An engine may run behind the host: the loop asks `read` for figures
    # only where it needs them.

    def begin(self, recipe: Recipe, state: dict, say) -> None:
        """Take over the counters of a run that begins or goes on."""
        self.recipe, self.updates, self.skipped = recipe, state["updates"], state["skipped_steps"]
        # summed loss since the log's last line
        self.window = torch.tensor(state["window"][0], device=self.device)
        self.grad_norm = self.learning_rate = self.loss_scale = 0.0

    def micro_batch(self, model, batch: dict, per_device: int, say) -> int:
        """Sequences that one device takes at a time."""
        return fit_micro_batch(model, batch, self, per_device, say)

    def feed(self, store, step: int) -> dict:
        """The global batch of this step."""
        return store.batch(step)

    def step(self, model, optimizer, batch: dict, per_device: int) -> bool | None:
        """One optimiser step over the global batch; whether it was done (False: its gradient was
        not finite)."""
        loss = accumulate_gradients(model, batch, self, per_device)
        self.scaler.unscale_(optimizer)
        self.grad_norm = nn.utils.clip_grad_norm_(model.parameters(), self.recipe.max_grad_norm)
        self.learning_rate = self.recipe.learning_rate_at(self.updates)
        set_learning_rate(optimizer, self.learning_rate)
        finite = bool(torch.isfinite(self.grad_norm))
        self.loss_scale = self.scaler.get_scale()
        if finite:
            self.scaler.step(optimizer)
            self.updates += 1                         # a skipped step does not advance the schedule
        else:
            self.skipped += 1
        if self.scaler.is_enabled():
            self.scaler.update()                      # halved by an overflow, x 2 by 2,000 steps
        optimizer.zero_grad(set_to_none=True)
        loss = self.sum_tensor(loss)
        self.window = self.window + loss if finite else self.window
        return finite

    def read(self) -> dict:
        """The counters, and the figures of the last step; waits for the device."""
        return {"updates": self.updates, "skipped_steps": self.skipped,
                "window_loss": float(self.window), "grad_norm": float(self.grad_norm),
                "learning_rate": self.learning_rate, "loss_scale": self.loss_scale}

    def clear_window(self) -> None:
        self.window = torch.zeros_like(self.window)

    def counters(self) -> dict[str, int]:
        """More columns for the log: what only this kind of device has."""
        return {}

    def eval_batch_size(self, batch_size: int) -> int:
        return batch_size

    def sync(self) -> None:
        """Start what has been asked for, where the device is lazy."""

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def memory(self) -> str:
        """Peak memory of this process, for the log."""
        if self.device.type == "cuda":
            return f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB on the device"
        return f"{peak_memory() / 2**30:.1f} GiB of memory"

    def close(self):
        if self.world_size > 1:
            # all wait for process 0 to save: one that leaves early breaks the rest
            self.sum(0)
            torch.distributed.destroy_process_group()


def accumulate_gradients(model, batch: dict, engine: Engine, per_device: int) -> torch.Tensor:
    """Forward and backward over the global batch; every process takes its `per_device` rows of
    each micro-batch.

    batch: input_ids and labels (total_batch_size, length). The loss is summed over real tokens and
    divided once by their number in the global batch, so it does not depend on how the batch is
    cut. Returns this process's share of it.
    """
    counted = int((batch["labels"][:, 1:] != -100).sum())
    starts = range(0, len(batch["input_ids"]), per_device * engine.world_size)
    loss = torch.zeros((), device=engine.device)
    for start in starts:
        mine = slice(start + engine.rank * per_device, start + (engine.rank + 1) * per_device)
        part = {key: value[mine] for key, value in batch.items()}
        if len(part["input_ids"]) == 0:               # an odd last micro-batch: all must take part
            part = {key: value[:1] for key, value in batch.items()}
            part["labels"] = torch.full_like(part["labels"], -100)
        part = engine.to_device(part)
        with engine.no_sync(model, last=start == starts[-1]), engine.autocast():
            part_loss = model(**part, num_items_in_batch=counted).loss
            whole = part_loss * engine.world_size     # DDP averages over processes
            engine.scaler.scale(whole).backward()
        loss += part_loss.detach()
    return loss


def fit_micro_batch(model, batch: dict, engine: Engine, per_device: int, say) -> int:
    """The largest of per_device, per_device / 2, ... that fits the memory of every process; the
    global batch stays."""
    while True:
        fits = 1.0
        try:
            part = engine.to_device({key: value[:per_device] for key, value in batch.items()})
            with engine.no_sync(model, last=False), engine.autocast():
                engine.scaler.scale(model(**part, num_items_in_batch=1).loss).backward()
        except torch.OutOfMemoryError:
            fits = 0.0
        model.zero_grad(set_to_none=True)
        if engine.sum(fits)[0] == engine.world_size:
            return per_device
        if per_device == 1:
            raise torch.OutOfMemoryError(
                "one sequence does not fit the memory: lower block_size or the model's size, or "
                "set gradient_checkpointing.")
        per_device //= 2
        say(f"out of memory: micro-batch halved to {per_device} sequences, the global batch stays")
        if engine.device.type == "cuda":
            torch.cuda.empty_cache()


def make_measure(recipe: Recipe, store):
    """measure(model, engine) -> the keys of `evaluate`: by the store's own, or by `evaluate` on its
    validation tokens."""
    if hasattr(store, "evaluate"):
        measure = store.evaluate
    else:
        ids, text_bytes = store.validation()

        def measure(model, engine=None):
            return evaluate(model, ids, text_bytes, block_size=recipe.block_size,
                            batch_size=recipe.per_device_eval_batch_size, engine=engine)
    if recipe.torch_compile:          # other shapes in another precision: not worth compiling
        measure = torch.compiler.set_stance("force_eager")(measure)
    return measure


@torch.no_grad()
def evaluate(model, ids: np.ndarray, text_bytes: int, *, block_size: int, batch_size: int,
             engine: Engine | None = None) -> dict[str, float]:
    """Loss of `model` on one token stream: {"loss" nats/token, "perplexity", "bits_per_byte",
    "tokens"}.

    ids: (n,); ids[0] is context only. Windows of block_size + 1 overlap by one token, so every
    other token is predicted exactly once. In fp32 whatever the training precision, summed in
    float64 and over all processes.
    """
    rank, world_size = (engine.rank, engine.world_size) if engine else (0, 1)
    device = next(model.parameters()).device
    batch_size = engine.eval_batch_size(batch_size) if engine else batch_size
    windows = list(range(0, len(ids) - 1, block_size))[rank::world_size]
    was_training = model.training
    model.eval()
    losses, count = [], 0
    on_accelerator = device.type != "cpu"
    for i in range(0, len(windows), batch_size):
        chunk = windows[i:i + batch_size]
        height = batch_size if engine and engine.static_shapes else len(chunk)
        part = _windows(ids, chunk, height, block_size)
        count += int((part["target"] != -100).sum())
        if engine:
            part = engine.to_device(part)
        else:
            part = {key: value.to(device) for key, value in part.items()}
        loss = _summed_loss(model, part)
        # An accelerator's are read at the end, without waiting. The CPU's are numbers at once: a
        # small tensor kept from each batch lies where the next logits would have fitted, and with
        # pages that are never given back (process.py) 1.8 million tokens took 23 GB instead of 1.
        losses.append(loss if on_accelerator else loss.double().item())
        if engine:
            engine.sync()
    total = sum(float(loss) for loss in losses)
    model.train(was_training)
    if engine:
        total, count = engine.sum(total, count)
    loss = total / count
    return {"loss": loss, "perplexity": math.exp(min(loss, 700)),
            "bits_per_byte": total / math.log(2) / text_bytes, "tokens": int(count)}


def _summed_loss(model, part: dict) -> torch.Tensor:
    """Of the part's known targets, in nats; fp32. The logits do not outlive the call."""
    logits = model(input_ids=part["ids"], use_cache=False).logits.float().flatten(0, 1)
    return F.cross_entropy(logits, part["target"].flatten(), ignore_index=-100, reduction="sum")


def _windows(ids: np.ndarray, starts: list[int], height: int, block_size: int) -> dict:
    """The windows that begin there: "ids" (height, block_size), and "target", one token on; -100
    where there is none."""
    tokens = np.zeros((height, block_size + 1), np.int64)
    targets = np.full((height, block_size), -100, np.int64)
    for row, start in enumerate(starts):
        part = ids[start:start + block_size + 1]
        tokens[row, :len(part)] = part
        targets[row, :len(part) - 1] = part[1:]
    return {"ids": torch.from_numpy(tokens[:, :-1]), "target": torch.from_numpy(targets)}
