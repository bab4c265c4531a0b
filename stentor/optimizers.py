"""Parameter groups, the optimisers of the cards, and the average of the weights."""
from __future__ import annotations

import contextlib

import torch
from torch import nn

from stentor.recipes import Recipe

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


def make_optimizer(recipe: Recipe, groups: list[dict], device: torch.device, say=print):
    """The recipe's optimiser: torch's fused AdamW, or bitsandbytes' paged one where it is asked
    for and works on this GPU."""
    settings = {"lr": recipe.learning_rate, "eps": recipe.adam_epsilon,
                "betas": (recipe.adam_beta1, recipe.adam_beta2)}
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
    return torch.optim.AdamW(groups, **settings, fused=device.type in ("cuda", "cpu"))


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
