"""Parameter groups, the optimisers of the cards, Muon, and the average of the weights."""
from __future__ import annotations

import contextlib
import math

import torch
from torch import nn

from stentor.recipes import Recipe, cpu_has_bf16

# bitsandbytes' names for Adam's two moments, which are the same.
BITSANDBYTES_MOMENTS = {"exp_avg": "state1", "exp_avg_sq": "state2"}


def parameter_groups(model, weight_decay: float) -> list[dict]:
    """The cards' AdamW groups: decay on the Linear weight matrices, none on embeddings, norms and
    biases."""
    linear = {f"{name}.weight" for name, module in model.named_modules()
              if isinstance(module, nn.Linear)}
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decay = [p for name, p in trained if name in linear]
    rest = [p for name, p in trained if name not in linear]
    return [{"params": decay, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]


def optimizer_groups(model, recipe: Recipe) -> list[dict]:
    """The groups of the recipe's optimiser; a group's "share" is its peak rate over learning_rate,
    where that is not 1.

    Of Muon: first the matrices of the layers (also those of adapters), then AdamW's two, the rest.
    """
    groups = parameter_groups(model, recipe.weight_decay)
    if recipe.optimizer != "muon":
        return groups
    inside = {id(p) for name, p in model.named_parameters() if ".layers." in name}
    matrices = [p for p in groups[0]["params"] if id(p) in inside]
    groups[0]["params"] = [p for p in groups[0]["params"] if id(p) not in inside]
    share = recipe.matrix_learning_rate / recipe.learning_rate
    muon = {"params": matrices, "weight_decay": recipe.weight_decay, "share": share,
            "momentum": recipe.muon_momentum}
    return [muon, *(group for group in groups if group["params"])]


def moments(group: dict) -> tuple[str, ...]:
    """The names of what torch's AdamW, or Muon, keeps of each parameter of a group."""
    return ("momentum_buffer",) if "momentum" in group else ("step", "exp_avg", "exp_avg_sq")


def set_learning_rate(optimizer, rate) -> None:
    """Give every group its share of the schedule's rate, a float or a tensor."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["share"] if "share" in group else rate


def make_optimizer(recipe: Recipe, groups: list[dict], device: torch.device, say=print,
                   mixed_precision: str = "no", **more):
    """The recipe's optimiser: torch's fused AdamW, Muon beside it, or bitsandbytes' paged one where
    it is asked for and works on this GPU.

    more: settings of torch's AdamW in place of `fused`.
    """
    settings = {"lr": recipe.learning_rate, "eps": recipe.adam_epsilon,
                "betas": (recipe.adam_beta1, recipe.adam_beta2)}
    more = more or {"fused": device.type in ("cuda", "cpu")}
    if recipe.optimizer == "muon":
        return MuonAdamW(groups, dtype=muon_dtype(device, mixed_precision), **settings, **more)
    if recipe.optimizer == "paged_adamw_32bit":
        why = f"pages are for a GPU's memory, this is {device}"
        if device.type == "cuda":
            try:
                from bitsandbytes.optim import PagedAdamW32bit
                # a build for another CUDA fails at its first step
                probe = nn.Parameter(torch.ones(8, device=device))
                probe.grad = torch.ones_like(probe)
                PagedAdamW32bit([probe]).step()
                return PagedAdamW32bit(groups, **settings)
            except Exception as error:
                reason = f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
                why = f"bitsandbytes cannot be used here ({reason})"
        say(f"optimizer: torch's AdamW stands in for paged_adamw_32bit; {why}")
    return torch.optim.AdamW(groups, **settings, **more)


class MuonAdamW(torch.optim.AdamW):
    """Muon (Jordan et al. 2024) for the groups that have a "momentum", AdamW for the others.

    A matrix's update is its Nesterov momentum made orthogonal, times 0.2 x sqrt(max(rows, columns)),
    which gives it the size of an AdamW update (Liu et al. 2025, "Muon is scalable for LLM
    training"): torch.optim.Muon with adjust_lr_fn="match_rms_adamw". That one is not used: it is
    not in the TPU image's torch 2.8, it multiplies in bf16 on a T4, which has no such units, and it
    takes one matrix at a time, 15 small products each; here matrices of one shape are one batch.
    One optimiser for both, so that loss scaling, checkpoints and the loop see one.
    Each process of several makes the same update: at the cards' batches it is under 1% of a step
    (tests/benchmarks/bench_optimizer.py), too little to share out and send round.
    """

    def __init__(self, groups: list[dict], *, dtype: torch.dtype, **adamw):
        super().__init__(groups, **adamw)
        self.dtype = dtype                            # of the products in `orthogonalized`

    @torch.no_grad()
    def step(self, closure=None):
        groups = self.param_groups
        for group in groups:
            if "momentum" in group:
                self._muon(group)
        self.param_groups = [group for group in groups if "momentum" not in group]
        try:
            return super().step(closure)
        finally:
            self.param_groups = groups

    def _muon(self, group: dict) -> None:
        by_shape = {}
        for p in group["params"]:
            if p.grad is not None:
                by_shape.setdefault(p.shape, []).append(p)
        rate, momentum = group["lr"], group["momentum"]
        for (rows, columns), matrices in by_shape.items():
            for p in matrices:
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            averages = [self.state[p]["momentum_buffer"] for p in matrices]
            gradients = [p.grad for p in matrices]
            torch._foreach_lerp_(averages, gradients, 1 - momentum)
            ahead = torch._foreach_lerp(gradients, averages, momentum)
            updates = orthogonalized(torch.stack(ahead), self.dtype)
            updates = updates.float() * (-0.2 * math.sqrt(max(rows, columns)) * rate)
            torch._foreach_mul_(matrices, 1 - rate * group["weight_decay"])
            torch._foreach_add_(matrices, updates.unbind())


def muon_dtype(device: torch.device, mixed_precision: str) -> torch.dtype:
    """What Muon multiplies in: FP32 in an FP32 run; else bf16 where the device has units for it,
    fp16 on older GPUs (a T4's are for fp16, and 11 bits of mantissa are more than bf16's 8; all
    values are between -2 and 2), FP32 on other CPUs."""
    if mixed_precision == "no" or device.type == "cpu" and not cpu_has_bf16():
        return torch.float32
    old = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] < 8
    return torch.float16 if old else torch.bfloat16


def orthogonalized(matrices: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """U V^T of each matrix U S V^T, roughly: singular values come out between 0.7 and 1.2.

    matrices: (n, rows, columns) FP32; the result is in `dtype`. Five quintic Newton-Schulz steps
    with Jordan's coefficients. Scaled in FP32: fp16 would lose gradients below 6e-8.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mT
    x = (wide / wide.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)).to(dtype).contiguous()
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide is matrices else x.mT


def update_ema(averages: list[torch.Tensor], parameters: list[torch.Tensor], decay: float,
               updates: int) -> None:
    """averages <- d x averages + (1 - d) x parameters, in place, with d = min(decay, (1 + updates)
    / (10 + updates)).

    The ramp is TensorFlow's ExponentialMovingAverage(num_updates): with a plain 0.999, 273 steps
    leave 76% of the start.
    """
    decay = min(decay, (1 + updates) / (10 + updates))
    average = torch.optim.swa_utils.get_ema_multi_avg_fn(decay)
    average(averages, [parameter.detach() for parameter in parameters], None)


@contextlib.contextmanager
def weights_swapped(parameters: list[torch.Tensor], averages: list[torch.Tensor]):
    """Inside the block the averages stand in for the parameters (an empty list of averages:
    nothing happens)."""
    def swap():
        for parameter, average in zip(parameters, averages):
            parameter.data, average.data = average.data, parameter.data
    swap()
    try:
        yield
    finally:
        swap()
