"""What the notebooks show of a run: tables and samples that more than one of them needs."""
from __future__ import annotations

import inspect
import json
from pathlib import Path

from stentor.cards import card_prompts, departures
from stentor.files import write_atomically
from stentor.model import build_model, generate, sampling_of
from stentor.precision import apply_precision_recipe
from stentor.recipes import Recipe
from stentor.shapes import count_parameters, head_dim_note, parameter_budget


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
    for departure in departures(published.name):
        print("not as the card:", departure)
    columns = ["field", "this run", f"card: {published.name}"]
    rows = recipe.difference(published)
    if not rows:
        return "no difference from the card"
    return pd.DataFrame(rows, columns=columns).set_index("field")


def budget_table(recipe: Recipe, published: Recipe):
    """Parameters and share of each part of the shape; prints their sum, and draws them beside the
    card's."""
    import pandas as pd

    from stentor.charts import draw_parameters, show
    show(draw_parameters({one.name: parameter_budget(one.shape) for one in (recipe, published)}))
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
    for note in [*report.pop("notes"), *head_dim_note(recipe.shape, recipe.mixed_precision)]:
        print("-", note)
    said = {"autocast": recipe.mixed_precision, "layers in FP32": recipe.fp32_critical_layers}
    return pd.Series(said | report, name="this run")


def write_samples(run_dir, model, tokenizer, prompts: list[str] | None, *, seed: int,
                  recipe: str = "") -> None:
    """One continuation of each prompt: printed, and kept in samples.json with settings and seed.

    The settings are those that the model's folder recommends. prompts: None for the card's own of
    the recipe of this name.
    """
    prompts, settings = prompts or card_prompts(recipe), sampling_of(model)
    texts = generate(model, tokenizer, list(prompts), max_new_tokens=60, seed=seed, **settings)
    samples = [{"prompt": prompt, "text": text} for prompt, text in zip(prompts, texts)]
    described = {"settings": settings, "seed": seed, "samples": samples}
    write_atomically(Path(run_dir) / "samples.json", json.dumps(described, indent=1))
    for prompt, text in zip(prompts, texts):
        print(f"{prompt} >>>{text}\n")


def show_source(*things):
    """The source of functions and classes of the house, for the lesson that explains them."""
    from IPython.display import Code
    return Code("\n\n".join(map(inspect.getsource, things)), language="python")


def summary_table(summary: dict, *also: str, **more):
    """The figures of summary.json that a lesson ends with, those of `also` that it has, and `more`."""
    import pandas as pd
    names = ("parameters", "tokens", "tokens_per_second", "eval_loss", "perplexity",
             "bits_per_byte", "best_step", "skipped_steps", *also)
    return pd.Series({name: summary[name] for name in names if name in summary} | more)
