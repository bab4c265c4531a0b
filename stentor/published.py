"""Every published recipe, its repaired form, its tuned ones, and how a name and some overrides
become one.

Every figure is from the model card named; where a card contradicts itself the exact parameter count
decides (the table in the design notes). What a card does not print is taken from the Preview's card
and listed in `unpublished`, so that nobody takes it for a published figure.
"""
from __future__ import annotations

import dataclasses
import difflib

from stentor.cards import card_name
from stentor.files import ParameterError
from stentor.parameters import shown
from stentor.recipes import Recipe, Source
from stentor.shapes import Shape
from stentor.tuning import tuned_rates

_FINEWEB_EDU = Source("fineweb-edu", "hf:HuggingFaceFW/fineweb-edu", config="sample-10BT")
_FINEWEB_HQ = Source("fineweb-hq", "hf:epfml/FineWeb-HQ")
_STENCORE = Source("stencore", "hf:StentorLabs/StenCore")
_COSMOPEDIA = Source("cosmopedia-v2", "hf:HuggingFaceTB/smollm-corpus", config="cosmopedia-v2")
_STENTOR3_SOURCES = (                                 # Stentor3 card: 75 / 15 / 10
    Source("web", "hf:epfml/FineWeb-HQ", 0.75, config="CC-MAIN-2024-51"),
    Source("code", "hf:Cyrile/dataset-the-stack-v2-dedup-sub", 0.15, config="Python",
           text_field="content", preserve_linebreaks=True),
    Source("math", "hf:HuggingFaceTB/finemath", 0.10, config="finemath-4plus"))
_SFT_SOURCES = (                                      # one without a commit is pinned when read
    Source("falsereject", "hf:AmazonScience/FalseReject", 7_125, text_field=None),
    Source("beavertails", "hf:PKU-Alignment/BeaverTails", 5_708, split="30k_train", text_field=None,
           revision="8401fe609d288129cc684a9b3be6a93e41cfe678"),
    Source("dolly", "hf:databricks/databricks-dolly-15k", 5_153, text_field=None,
           revision="d72c16e4644a463b9c678c71d9440befd4594556"),
    Source("seed-safety", "seed_safety.jsonl", 14, text_field=None))
_UNSAID = ("learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps",
           "eval_steps", "best_eval_steps", "save_epochs", "logging_steps", "fp32_critical_first",
           "sources.weight", "sources.config")

_PREVIEW = Recipe(                                    # card: Stentor2-12M-Preview
    "stentor2-12m-preview", Shape(8064, 256, 768, 12, 4, 4, 1024), "english-8000-consistent-v1",
    (_FINEWEB_EDU, dataclasses.replace(_COSMOPEDIA, weight=0.0)), learning_rate=2e-4,
    per_device_train_batch_size=4, per_device_eval_batch_size=4, gradient_accumulation_steps=4,
    num_processes=1, token_budget=240_000_000, budget_check="micro_batch",
    eval_steps=375, best_eval_steps=375, save_epochs=1, max_eval_samples=2_000, logging_steps=125,
    fp32_critical_last=3, fp32_softmax=True, int8_qat=True, attn_implementation="eager",
    gradient_checkpointing=True,
    published={"parameters": 12_294_400, "best_eval_loss": 3.9145, "best_perplexity": 50.07,
               "final_eval_loss": 4.0083, "training_hours": 4.4},
    unpublished=("sources.config",))
_STENTOR2_12M = Recipe(                               # card: Stentor2-12M
    "stentor2-12m", Shape(8064, 256, 768, 12, 4, 4, 1024), "english-8000-strict-nocapcode-v1",
    (_FINEWEB_HQ, _STENCORE), source_token_budget=240_000_000, max_train_steps=9_552,
    # best at 1,500 + k x 900, and at the end of epoch 0
    best_eval_start_step=1_500, save_epochs=1, validation_sources=("fineweb-hq",),
    published={"parameters": 12_294_400, "best_eval_loss": 3.2814, "best_perplexity": 26.61,
               "final_eval_loss": 3.2565, "blimp": 68.95, "training_hours": 2.1},
    unpublished=("sources.weight", "sources.config"))
_STENTOR2_30M = dataclasses.replace(
    _STENTOR2_12M, name="stentor2-30m", shape=Shape(8064, 512, 1024, 10, 8, 8, 1024),
    token_budget=800_000_000, source_token_budget=None, max_train_steps=None,
    published={"parameters": 30_353_920, "best_perplexity": 18.07, "training_hours": 6.75},
    unpublished=(*_UNSAID, "source_token_budget", "validation_sources"))
_STENTOR_12M = dataclasses.replace(                   # figures of v1 as the later cards print them
    _PREVIEW, name="stentor-12m", shape=Shape(32_768, 192, 576, 12, 3, 3, 512),
    tokenizer="hf:StentorLabs/Stentor-12M", sources=(_FINEWEB_EDU, _COSMOPEDIA),
    block_size=512, token_budget=200_000_000, budget_check="step",
    fp32_critical_last=0, fp32_softmax=False, int8_qat=False, attn_implementation="sdpa",
    gradient_checkpointing=False,
    published={"parameters": 12_047_040, "best_eval_loss": 4.4887, "best_perplexity": 89.01,
               "training_hours": 1.3},
    unpublished=_UNSAID)
_STENTOR_30M = dataclasses.replace(
    _STENTOR_12M, name="stentor-30m", shape=Shape(32_768, 256, 1024, 21, 4, 4, 512),
    tokenizer="hf:StentorLabs/Stentor-30M", token_budget=600_000_000,
    published={"parameters": 30_419_712, "best_perplexity": 33.02, "training_hours": 7.88})
_STENTOR3_20M = Recipe(                               # card: Stentor3-20M
    "stentor3-20m", Shape(4096, 320, 1280, 12, 10, 2, 4096, rope_theta=50_000.0,
                          tie_word_embeddings=False),
    "english-4096-strict-nocapcode-v1", _STENTOR3_SOURCES, anneal_weights=(0.50, 0.30, 0.20),
    block_size=4096, per_device_train_batch_size=8, per_device_eval_batch_size=8,
    gradient_accumulation_steps=1, num_processes=8,
    token_budget=8_500_000_000, source_token_budget=8_500_000_000,
    eval_steps=1_000, best_eval_steps=1_000, best_eval_start_step=1_000,
    validation_sources=("web",),
    mixed_precision="bf16", fp32_critical_first=1, fp32_critical_last=1,
    initialization="residual_scaled",
    published={"parameters": 20_324_160, "best_eval_loss": 2.6406, "best_perplexity": 14.02,
               "training_hours": 8.15, "tokens_per_second": 304_000},
    unpublished=("anneal_weights", "per_device_eval_batch_size", "logging_steps",
                 "save_every_minutes", "save_total_limit", "sources.text_field"))
_STENTOR3_50M = dataclasses.replace(
    _STENTOR3_20M, name="stentor3-50m",
    shape=Shape(4096, 512, 1536, 15, 8, 2, 4096, rope_theta=50_000.0, tie_word_embeddings=False),
    token_budget=8_300_000_000, source_token_budget=8_300_000_000,
    published={"parameters": 49_430_016, "best_perplexity": 9.64, "training_hours": 8.74},
    unpublished=(*_STENTOR3_20M.unpublished, "per_device_train_batch_size", "learning_rate",
                 "validation_sources"))
_PORTIMBRIA = dataclasses.replace(
    _STENTOR3_20M, name="portimbria-150m", shape=Shape(32_768, 768, 2048, 20, 6, 2, 4096),
    tokenizer="hf:StentorLabs/Portimbria-150M",
    token_budget=6_000_000_000, source_token_budget=6_000_000_000,
    published={"parameters": 151_026_432, "best_perplexity": 18.00, "training_hours": 8},
    unpublished=(*_STENTOR3_20M.unpublished, "sources", "per_device_train_batch_size",
                 "learning_rate", "validation_sources"))
_BIG_UNSAID = (                                       # torch's own AdamW, where the card says "AdamW"
    "adam_beta1", "adam_beta2", "adam_epsilon", "per_device_train_batch_size",
    "gradient_accumulation_steps", "eval_steps", "best_eval_steps", "max_eval_samples",
    "logging_steps", "sources.config")
# Growth from stentor-30m, then three stages, each of which begins from the one before. The card's
# figures do not agree (`curriculum.accounting`), and here the tokens hold: they alone are summed up
# again in the card, "2.33 billion, 81% of 2.88B". What it does not name is off: FP32 norms, critical
# layers, QAT.
_STENTOR_BIG = Recipe(                                # card: Stentor-Big, stage 1
    "stentor-big", Shape(32_768, 512, 2048, 30, 8, 8, 512), "hf:stas122/Stentor-Big",
    (_FINEWEB_EDU,), learning_rate=2e-4, adam_beta2=0.999, block_size=512, chunk_eos=True,
    per_device_train_batch_size=32, gradient_accumulation_steps=4, num_processes=1,
    token_budget=279_000_000, max_eval_samples=500, mixed_precision="bf16", fp32_norms=False,
    fp32_critical_first=0, gradient_checkpointing=True,
    published={"parameters": 142_639_104, "tokens": 279_000_000, "steps": 9_500, "batch": 128,
               "gpus": 1, "total_tokens": 2_330_000_000, "optimal_tokens": 2_880_000_000},
    unpublished=_BIG_UNSAID)
# Its fan fiction was never published; stories stand in for it.
_STORIES = Source("stories", "hf:roneneldan/TinyStories")
_TEXTBOOKS = Source("textbooks", "hf:SciPhi/textbooks-are-all-you-need-lite",
                    text_field="completion")
CURRICULA: dict[str, tuple[Recipe, ...]] = {"stentor-big": (
    _STENTOR_BIG,
    dataclasses.replace(
        _STENTOR_BIG, name="stentor-big-stage2", sources=(_STORIES,),
        gradient_accumulation_steps=2, num_processes=2, token_budget=1_030_000_000,
        published={"tokens": 1_030_000_000, "steps": 6_500, "batch": 128, "gpus": 2},
        unpublished=(*_BIG_UNSAID, "sources.path")),
    dataclasses.replace(                              # "to preserve previously learned style"
        _STENTOR_BIG, name="stentor-big-stage3", sources=(_FINEWEB_EDU, _TEXTBOOKS),
        learning_rate=1.5e-4, gradient_accumulation_steps=3, num_processes=2,
        token_budget=1_020_000_000,
        published={"tokens": 1_020_000_000, "steps": 7_171, "batch": 192, "gpus": 2},
        unpublished=(*_BIG_UNSAID, "sources.path", "sources.weight")))}
# The main phase of the fine-tune, whose rows are dicts; the other four, and LoRA, are in
# 04_instruct_sft. 273 steps hold 17,460 x 3 examples. "Cosine with 1 restart" is taken at its word;
# transformers' num_cycles=1 would be a plain cosine.
_INSTRUCT = dataclasses.replace(
    _STENTOR_12M, name="stentor-12m-instruct", block_size=384, token_budget=273 * 192 * 384,
    sources=_SFT_SOURCES, learning_rate=3e-5, lr_scheduler_type="cosine_with_restart",
    warmup_ratio=0.06, weight_decay=0.1, optimizer="paged_adamw_32bit", adam_epsilon=1e-6,
    ema_decay=0.999, mixed_precision="no", fp32_norms=False, fp32_critical_first=0,
    per_device_train_batch_size=48, gradient_accumulation_steps=4,
    eval_steps=40, best_eval_steps=40, save_epochs=0, logging_steps=10,
    published={"parameters": 12_047_040, "best_eval_loss": 4.300, "best_perplexity": 73.7},
    unpublished=("adam_beta1", "adam_beta2"))
RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in (
    _STENTOR_12M, _STENTOR_30M, _PREVIEW, _STENTOR2_12M, _STENTOR2_30M, _STENTOR3_20M,
    _STENTOR3_50M, _PORTIMBRIA, _STENTOR_BIG, _INSTRUCT)}
# The twin of each recipe whose schedule is laid out for the real budget, so that the learning rate
# reaches its end: for stentor2-12m, whose run stopped at 73% of the peak, that is a change; for the
# others the two are equal.
REPAIRED: dict[str, Recipe] = {
    f"{name}-repaired": dataclasses.replace(recipe, name=f"{name}-repaired", max_train_steps=None)
    for name, recipe in RECIPES.items()}


def _tuned(recipe: Recipe, name: str, *, qk_norm: bool) -> Recipe:
    """The twin of a card's recipe; rates by the rule of `stentor.tuning`."""
    shape = dataclasses.replace(recipe.shape, qk_norm=qk_norm)
    return dataclasses.replace(
        recipe, name=name, shape=shape, optimizer="muon", lr_scheduler_type="linear",
        initialization="residual_scaled", max_train_steps=None, **tuned_rates(shape))


# The twin of each pretraining recipe by what paid in our own trials on the CPU twin (docs/tried.md):
# the card's parameters, data, budget and batch, with Muon and a straight decay to zero; also with
# QK-norm, as Qwen3ForCausalLM.
_PRETRAINING = {name: recipe for name, recipe in RECIPES.items() if name != _INSTRUCT.name}
TUNED: dict[str, Recipe] = {
    tuned.name: tuned for recipe in _PRETRAINING.values() for tuned in (
        _tuned(recipe, f"{recipe.name}-tuned", qk_norm=False),
        _tuned(recipe, f"{recipe.name}-tuned-qk", qk_norm=True))}
ALL_RECIPES = {**RECIPES, **REPAIRED, **TUNED}


def card_recipe(name: str) -> Recipe:
    """The published recipe that `name` is, or is the twin of."""
    return RECIPES[card_name(name)]


def find_recipe(name: str, profile: str = "t4", overrides: dict | None = None) -> Recipe:
    """The recipe `name`, scaled when profile is "cpu", with `overrides`.

    overrides: values of its fields or of its shape's fields; a source is a dict of its fields.
    Raises ParameterError with everything that is wrong: unknown recipe, unknown field, values out
    of range.
    """
    if name not in list(ALL_RECIPES):
        near = difflib.get_close_matches(str(name), ALL_RECIPES, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ParameterError([f"RECIPE = {shown(name)} is not known{hint}; known: "
                              f"{', '.join(RECIPES)}, each also as ...-repaired, ...-tuned "
                              "and ...-tuned-qk."])
    recipe = ALL_RECIPES[name].scaled_to("cpu") if profile == "cpu" else ALL_RECIPES[name]
    recipe, problems = _overridden(recipe, overrides or {})
    if problems := problems + recipe.problems():
        raise ParameterError(problems)
    return recipe


def _overridden(recipe: Recipe, overrides: dict) -> tuple[Recipe, list[str]]:
    """(the recipe with the overrides that name a field, a sentence for each that names none)."""
    shape_fields = {f.name for f in dataclasses.fields(Shape)}
    recipe_fields = {f.name for f in dataclasses.fields(Recipe)} - {
        "name", "shape", "published", "unpublished"}
    problems, in_shape, in_recipe = [], {}, {}
    for key, value in overrides.items():
        if key in shape_fields:
            in_shape[key] = value
        elif key == "sources" and isinstance(value, (list, tuple)):
            in_recipe[key] = tuple(_read_source(source, problems) for source in value)
        elif key in recipe_fields:
            in_recipe[key] = value
        else:
            near = difflib.get_close_matches(str(key), shape_fields | recipe_fields, n=1)
            hint = f"; did you mean {near[0]}?" if near else "."
            problems.append(f"{key} is not a field of a recipe{hint}")
    if "sources" in in_recipe and "validation_sources" not in in_recipe:
        in_recipe["validation_sources"] = None        # other sources: the card's say nothing of them
    shape = dataclasses.replace(recipe.shape, **in_shape)
    return dataclasses.replace(recipe, shape=shape, **in_recipe), problems


def _read_source(given, problems: list[str]):
    """A Source from a dict of its fields; what is wrong with it is added to `problems`."""
    if not isinstance(given, dict):
        return given                                  # a Source; else it is refused with the recipe
    known = [f.name for f in dataclasses.fields(Source)]
    wrong = [f"sources: {shown(key)} is not a field of a source; known: {', '.join(known)}."
             for key in given if key not in known]
    wrong += [f"sources: {shown(given)} has no {key}." for key in ("name", "path")
              if key not in given]
    problems += wrong
    return Source(**given) if not wrong else Source("unread", "unread")
