"""What one update of the optimiser costs: AdamW, torch's Muon beside it, ours, and ours as a share of a whole step.

    python tests/benchmarks/bench_optimizer.py [REPEATS]      # the CPU twin, and the 12.3M and 20.3M models; about two minutes

Interleaved, median and range in milliseconds; prints a table and writes outputs/benchmarks/optimizer.json. The whole step is
one of the recipe's batch on the CPU twin, and one sequence of 1,024 tokens on the others, times the batch.
"""
import dataclasses
import json
import statistics
import sys
import time
from pathlib import Path

import torch

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO))
import stentor_utils as su                            # noqa: E402
from stentor.engine import Engine, accumulate_gradients                 # noqa: E402
from stentor.optimizers import make_optimizer, optimizer_groups, set_learning_rate          # noqa: E402

RECIPES = [("stentor2-12m-tuned-qk", "cpu"), ("stentor2-12m-tuned-qk", "t4"), ("stentor3-20m-tuned-qk", "t4")]


def contestants(model, recipe, device) -> dict:
    """{name: a function that makes one update with the gradients that are there}."""
    plain = dataclasses.replace(recipe, optimizer=None, matrix_learning_rate=None)
    precision = "bf16" if su.cpu_has_bf16() or device.type == "cuda" else "no"
    groups = optimizer_groups(model, recipe)
    torchs = [torch.optim.Muon(groups[0]["params"], lr=1e-9, adjust_lr_fn="match_rms_adamw"),
              torch.optim.AdamW(groups[1]["params"], lr=1e-9, fused=True)]
    adamw = make_optimizer(plain, optimizer_groups(model, plain), device)
    ours = {kind: make_optimizer(recipe, optimizer_groups(model, recipe), device, print, kind)
            for kind in dict.fromkeys((precision, "no"))}
    for optimizer in (adamw, *ours.values()):
        set_learning_rate(optimizer, 1e-9)            # the weights stay
    return {"AdamW": adamw.step, "torch's Muon and AdamW": lambda: [one.step() for one in torchs],
            **{f"ours, {'fp32' if kind == 'no' else 'bf16'}": one.step for kind, one in ours.items()}}


def measure(name: str, profile: str, repeats: int) -> dict:
    recipe = su.find_recipe(name, profile, {"torch_compile": False})
    engine = Engine("bf16" if su.cpu_has_bf16() else "no")
    model = engine.place(su.build_model(recipe.shape)).train()
    parallel = engine.prepare(model)
    rows, length = (recipe.total_batch_size, recipe.block_size) if profile == "cpu" else (1, 1024)
    ids = torch.randint(0, recipe.shape.vocab_size, (rows, length))
    share = recipe.tokens_per_step / (rows * length)

    def whole():
        model.zero_grad(set_to_none=True)
        accumulate_gradients(parallel, {"input_ids": ids, "labels": ids}, engine, rows)
    timed = {"forward and backward": whole, **contestants(model, recipe, engine.device)}
    times = {what: [] for what in timed}
    for turn in range(repeats + 2):
        for what, update in timed.items():
            engine.wait()
            began = time.perf_counter()
            update()
            engine.wait()
            if turn > 1:                              # the first two warm up
                times[what].append(1e3 * (time.perf_counter() - began))
    times["forward and backward"] = [share * value for value in times["forward and backward"]]
    base = statistics.median(times["forward and backward"])
    print(f"\n{recipe.name}: {su.count_parameters(recipe.shape):,} parameters, {recipe.tokens_per_step:,} tokens a step, "
          f"{engine.device}, {torch.get_num_threads()} threads\n\n| | ms | share of the step |\n|---|---|---|")
    for what, values in times.items():
        middle = statistics.median(values)
        part = "" if values is times["forward and backward"] else f"{middle / (middle + base):.1%}"
        print(f"| {what} | {middle:,.1f} ({min(values):,.1f} to {max(values):,.1f}) | {part} |", flush=True)
    return {"recipe": recipe.name, "tokens_per_step": recipe.tokens_per_step, "milliseconds": times}


if __name__ == "__main__":
    found = [measure(*one, repeats=int(sys.argv[1]) if sys.argv[1:] else 10) for one in RECIPES]
    folder = REPO / "outputs" / "benchmarks"
    folder.mkdir(parents=True, exist_ok=True)
    su.write_atomically(folder / "optimizer.json",
                        json.dumps({"threads": torch.get_num_threads(), "measured": found}, indent=1))
