"""What the notebooks show of a run: tables and samples that more than one of them needs."""
from __future__ import annotations

import inspect
import json
from pathlib import Path

from stentor.files import write_atomically
from stentor.model import build_model, generate, sampling_of
from stentor.precision import apply_precision_recipe
from stentor.recipes import Recipe
from stentor.shapes import count_parameters, parameter_budget


def card_table(recipe: Recipe, published: Recipe, unprinted: str):
    """What differs from the card, as a table; prints what the recipe comes to.

    unprinted: where the values come from that the card does not print.
    """
    import pandas as pd
    print(f"{recipe.name}: {recipe.total_steps:,} steps x {recipe.tokens_per_step:,} tokens = "
          f"{recipe.total_tokens:,} tokens; warm-up {recipe.warmup_steps:,} steps, "
          f"schedule laid out for {recipe.schedule_steps:,}")
    if recipe.unpublished:
        print(f"not printed in the card, {unprinted}:", ", ".join(recipe.unpublished))
    columns = ["field", "this run", f"card: {published.name}"]
    rows = recipe.difference(published)
    if not rows:
        return "no difference from the card"
    return pd.DataFrame(rows, columns=columns).set_index("field")


def budget_table(recipe: Recipe, published: Recipe):
    """Parameters and share of each part of the shape; prints their sum."""
    import pandas as pd
    budget, total = parameter_budget(recipe.shape), count_parameters(recipe.shape)
    same = recipe.shape == published.shape
    card = f" (published: {published.published['parameters']:,})" if same else ""
    print(f"{total:,} parameters{card}")
    shares = {name: f"{count / total:.1%}" for name, count in budget.items()}
    return pd.DataFrame({"parameters": budget, "share": shares})


def precision_table(recipe: Recipe):
    """What the precision recipe switches on, counted on a model of this shape; prints its notes."""
    import pandas as pd
    report = apply_precision_recipe(
        build_model(recipe.shape, attn_implementation=recipe.attn_implementation),
        fp32_norms=recipe.fp32_norms, fp32_critical_layers=recipe.fp32_critical_layers,
        fp32_softmax=recipe.fp32_softmax, int8_qat=recipe.int8_qat)
    for note in report.pop("notes"):
        print("-", note)
    said = {"autocast": recipe.mixed_precision, "layers in FP32": recipe.fp32_critical_layers}
    return pd.Series(said | report, name="this run")


def write_samples(run_dir, model, tokenizer, prompts: list[str], *, seed: int) -> None:
    """One continuation of each prompt: printed, and kept in samples.json with settings and seed."""
    texts = generate(model, tokenizer, list(prompts), max_new_tokens=60, seed=seed)
    samples = [{"prompt": prompt, "text": text} for prompt, text in zip(prompts, texts)]
    described = {"settings": sampling_of(model), "seed": seed, "samples": samples}
    write_atomically(Path(run_dir) / "samples.json", json.dumps(described, indent=1))
    for prompt, text in zip(prompts, texts):
        print(f"{prompt} >>>{text}\n")


def show_source(function):
    """The source of a function or class of the house, for the lesson that explains it."""
    from IPython.display import Code
    return Code(inspect.getsource(function), language="python")


def summary_table(summary: dict, *also: str, **more):
    """The figures of summary.json that a lesson ends with, those of `also` that it has, and `more`."""
    import pandas as pd
    names = ("parameters", "tokens", "tokens_per_second", "eval_loss", "perplexity",
             "bits_per_byte", "best_step", "skipped_steps", *also)
    return pd.Series({name: summary[name] for name in names if name in summary} | more)
