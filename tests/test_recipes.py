"""Every published number that a recipe must reproduce, one test case each (design notes, 2.1)."""
import dataclasses
import json

import pytest
import torch

import stentor.checkpoints
import stentor.train
import stentor_utils as su
from stentor.checkpoints import fingerprint_differences, recipe_fingerprint
from stentor.recipes import DRAW, RESUME
from stentor.rules import free_fields
from stentor.shapes import head_dim_note
from stentor.tuning import tuned_rates

R = su.RECIPES


@pytest.mark.parametrize("name, total", [
    ("stentor-12m", 12_047_040), ("stentor-30m", 30_419_712), ("stentor2-12m-preview", 12_294_400),
    ("stentor2-12m", 12_294_400), ("stentor2-30m", 30_353_920), ("stentor3-20m", 20_324_160),
    ("stentor3-50m", 49_430_016), ("portimbria-150m", 151_026_432), ("stentor-big", 142_637_568)])
def test_published_parameter_count(name, total):
    assert su.count_parameters(R[name].shape) == total


@pytest.mark.parametrize("name, share", [
    ("stentor-12m", 52.2), ("stentor-30m", 27.6), ("stentor2-12m", 16.8), ("stentor2-30m", 13.6),
    ("stentor3-20m", 12.9), ("stentor3-50m", 8.5), ("portimbria-150m", 16.7)])
def test_published_embedding_share(name, share):
    budget = su.parameter_budget(R[name].shape)
    assert round(100 * budget["embedding"] / sum(budget.values()), 1) == share


@pytest.mark.parametrize("name, field, value", [
    ("stentor2-12m-preview", "schedule_steps", 14_649),
    ("stentor2-12m-preview", "warmup_steps", 732), ("stentor2-12m-preview", "stable_steps", 11_719),
    ("stentor2-12m-preview", "tokens_per_step", 16_384),
    ("stentor2-12m-preview", "total_batch_size", 16),
    ("stentor2-12m-preview", "total_tokens", 240_001_024),
    ("stentor2-12m-preview", "fp32_critical_layers", (0, 1, 9, 10, 11)),
    ("stentor2-12m", "schedule_steps", 9_552), ("stentor2-12m", "warmup_steps", 477),
    ("stentor2-12m", "stable_steps", 7_641), ("stentor2-12m", "tokens_per_step", 131_072),
    ("stentor2-12m", "total_batch_size", 128), ("stentor2-12m", "total_steps", 3_663),
    ("stentor2-12m", "total_tokens", 480_116_736), ("stentor2-12m", "fp32_critical_layers", (0, 1)),
    ("stentor3-20m", "schedule_steps", 32_425), ("stentor3-20m", "warmup_steps", 1_621),
    ("stentor3-20m", "stable_steps", 25_940), ("stentor3-20m", "tokens_per_step", 262_144),
    ("stentor3-20m", "fp32_critical_layers", (0, 11))])
def test_published_accounting(name, field, value):
    assert getattr(R[name], field) == value


def test_preview_ends_in_the_middle_of_a_step():
    recipe = R["stentor2-12m-preview"]
    assert recipe.sequences_to_train // 4 == 58_594   # micro-batches of 4 sequences, 4,096 tokens
    assert recipe.total_steps == 14_649 and recipe.sequences_to_train % recipe.total_batch_size == 8


def test_stentor2_12m_stopped_at_73_percent_of_the_peak():
    recipe = R["stentor2-12m"]
    assert round(recipe.learning_rate_at(recipe.total_steps) / recipe.learning_rate, 2) == 0.73


def test_kv_cache_of_the_stentor3_card():
    shape = R["stentor3-20m"].shape
    # The formula printed under the card's table. The table itself prints half of it (12 MB in FP32,
    # 6 in FP16).
    def megabytes(shape):
        return [su.kv_cache_bytes(shape, 4096, size) / 2**20 for size in (4, 2, 1, 0.5)]
    assert megabytes(shape) == [24, 12, 6, 3]         # FP32, FP16, INT8, INT4
    assert megabytes(R["stentor3-50m"].shape) == [60, 30, 15, 7.5]
    full = dataclasses.replace(shape, num_key_value_heads=10)
    # "an 80% reduction"
    assert su.kv_cache_bytes(shape, 4096) == 0.2 * su.kv_cache_bytes(full, 4096)


def test_repaired_twins_reach_the_end_of_their_schedule():
    for name, recipe in R.items():
        repaired = su.find_recipe(f"{name}-repaired", "t4")
        assert repaired.schedule_steps == repaired.total_steps == recipe.total_steps
        assert repaired.learning_rate_at(repaired.total_steps) < 1e-9
    changed = [name for name, recipe in R.items()
               if su.REPAIRED[f"{name}-repaired"].max_train_steps != recipe.max_train_steps]
    assert changed == ["stentor2-12m"]


def test_learning_rate_equals_transformers_schedules():
    from transformers import (
        get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup, get_wsd_schedule)
    recipe = dataclasses.replace(
        R["stentor2-12m"], max_train_steps=200, warmup_ratio=0.1, stable_ratio=0.6)
    for kind in ("cosine", "linear", "warmup_stable_decay"):
        recipe = dataclasses.replace(recipe, lr_scheduler_type=kind)
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=recipe.learning_rate)
        if kind == "cosine":
            schedule = get_cosine_schedule_with_warmup(optimizer, 20, 200)
        elif kind == "linear":
            schedule = get_linear_schedule_with_warmup(optimizer, 20, 200)
        else:
            schedule = get_wsd_schedule(optimizer, num_warmup_steps=20, num_stable_steps=120,
                                        num_decay_steps=60, decay_type="linear")
        for update in range(200):
            rate = schedule.get_last_lr()[0]
            assert recipe.learning_rate_at(update) == pytest.approx(rate, abs=1e-12), (kind, update)
            optimizer.step()
            schedule.step()


@pytest.mark.parametrize("name", su.ALL_RECIPES)
def test_recipes_are_sound_and_survive_json(name):
    recipe, twin = su.ALL_RECIPES[name], su.ALL_RECIPES[name].scaled_to("cpu")
    for one in (recipe, twin):
        assert one.problems() == []
        assert su.Recipe.from_dict(json.loads(json.dumps(one.to_dict()))) == one
    assert 1e6 < su.count_parameters(twin.shape) < 2e6


def test_tuned_twins_are_the_cards_models_on_the_cards_data():
    """Same parameters (QK-norm: two vectors of head_dim a layer more), data, budget and batch; the
    rate reaches 0 at the end; what differs is what `difference` prints."""
    assert len(su.TUNED) == 2 * 9 and not any("instruct" in name for name in su.TUNED)
    for name, tuned in su.TUNED.items():
        card = su.card_recipe(name)
        assert card is R[name.removesuffix("-qk").removesuffix("-tuned")]
        more = 2 * card.shape.head_dim * card.shape.num_hidden_layers if name.endswith("-qk") else 0
        assert su.count_parameters(tuned.shape) == su.count_parameters(card.shape) + more
        for field in ("tokenizer", "sources", "anneal_weights", "token_budget", "total_batch_size",
                      "block_size", "source_token_budget", "total_tokens"):
            assert getattr(tuned, field) == getattr(card, field), field
        assert tuned.learning_rate_at(tuned.total_steps) == 0
        fields = {field for field, _, _ in tuned.difference(card)}
        assert {"name", "optimizer", "matrix_learning_rate", "lr_scheduler_type"} <= fields
        assert ("shape.qk_norm" in fields) == name.endswith("-qk")


def test_tuned_rates_follow_the_width_alone():
    """Swept at 128; the update's spectral norm, 0.2 sqrt(width) x rate, is the same at every width,
    so four times as wide is half the rate."""
    at = {width: tuned_rates(su.Shape(4096, width, 3 * width, 4, 2, 2)) for width in (64, 128, 512)}
    for name in ("learning_rate", "matrix_learning_rate"):
        assert at[512][name] == pytest.approx(at[128][name] / 2, rel=5e-3)
        assert at[64][name] == pytest.approx(at[128][name] * 2**0.5, rel=5e-3)
    for recipe in (*su.TUNED.values(), su.find_recipe("stentor3-20m-tuned", "cpu")):
        assert tuned_rates(recipe.shape).items() <= vars(recipe).items()


def test_a_run_of_before_a_field_was_there_is_still_the_same():
    """A checkpoint's fingerprint, or a run.json, without the fields that came later, is that of the
    recipe with their defaults, and not that of one which sets them."""
    recipe = R["stentor2-12m"]
    old = recipe_fingerprint(recipe)
    for field in ("matrix_learning_rate", "muon_momentum"):
        del old[field]
    del old["shape"]["qk_norm"]
    completed = su.Recipe.completed(old)
    assert not fingerprint_differences(
        {key: completed[key] for key in recipe_fingerprint(recipe)}, recipe_fingerprint(recipe))
    qk = dataclasses.replace(recipe, shape=dataclasses.replace(recipe.shape, qk_norm=True))
    assert [line.split()[0] for line in fingerprint_differences(
        {key: completed[key] for key in recipe_fingerprint(qk)}, recipe_fingerprint(qk))] == ["shape"]


def test_compiling_without_a_compiler_is_refused_before_anything_starts(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    recipe = dataclasses.replace(R["stentor2-12m"], torch_compile=True)
    assert recipe.problems() == [
        "torch_compile = True needs a C++ compiler, and no-such-compiler is not here: install it, "
        "or set torch_compile to False."]
    with pytest.raises(su.ParameterError, match="no-such-compiler"):
        su.find_recipe("stentor2-12m", "cpu", {"torch_compile": True})


def test_built_model_has_the_published_shape_and_initialisation():
    recipe = R["stentor3-20m"]
    model = su.build_model(recipe.shape, initialization=recipe.initialization)
    assert sum(p.numel() for p in model.parameters()) == 20_324_160
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.config.rope_parameters["rope_theta"] == 50_000
    layer = model.model.layers[5]
    scaled = layer.mlp.down_proj.weight.std().item()
    assert scaled == pytest.approx(0.02 / 24**0.5, rel=0.02)       # 0.00408
    assert layer.self_attn.q_proj.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert model.lm_head.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()
    again = su.build_model(recipe.shape, initialization=recipe.initialization)
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


def test_plain_initialisation_is_002_everywhere():
    model = su.build_model(su.Shape(512, 128, 384, 2, 2, 2))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert torch.equal(parameter, torch.ones_like(parameter))
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.03), name


def test_zero_projections_make_each_layer_the_identity():
    shape = su.Shape(512, 64, 192, 2, 2, 2, qk_norm=True)
    model = su.build_model(shape, initialization="zero_projections")
    x = torch.randn(1, 5, 64)
    places = model.model.rotary_emb(x, torch.arange(5)[None])
    for layer in model.model.layers:
        out = layer(x, position_embeddings=places)
        assert torch.equal(out[0] if isinstance(out, tuple) else out, x)
    plain = su.build_model(shape)
    assert torch.equal(plain.model.embed_tokens.weight, model.model.embed_tokens.weight)
    assert plain.model.layers[0].self_attn.o_proj.weight.std() > 0.01


def test_weight_decay_reaches_linear_weights_only():
    for tie in (True, False):
        model = su.build_model(su.Shape(512, 128, 384, 2, 2, 2, tie_word_embeddings=tie))
        decay, rest = su.parameter_groups(model, 0.01)
        names = {id(p): n for n, p in model.named_parameters()}
        linear = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
        assert {names[id(p)].split(".")[-2] for p in decay["params"]} == (
            linear if tie else linear | {"lm_head"})
        assert all("norm" in names[id(p)] or "embed" in names[id(p)] for p in rest["params"])
        assert len(decay["params"]) + len(rest["params"]) == len(names)


def test_every_problem_of_a_recipe_is_reported_at_once():
    with pytest.raises(su.ParameterError) as error:
        su.find_recipe("stentor2-12m", "cpu", {
            "token_budget": -5, "num_attention_heads": 3, "lr_scheduler_type": "cosin",
            "learning_rat": 1, "rope_theta": 0, "anneal_weights": "x", "fp32_critical_first": 9})
    text = str(error.value)
    for part in ("token_budget = -5", "num_attention_heads = 3", "'cosin'",
                 "did you mean learning_rate", "rope_theta = 0 must be a number above 0",
                 "anneal_weights = 'x'", "fp32_critical_first = 9 must be at most 4"):
        assert part in text
    with pytest.raises(su.ParameterError, match="did you mean stentor2-12m"):
        su.find_recipe("stentor2-12")


def test_difference_from_the_card_lists_exactly_the_changes():
    recipe = su.find_recipe("stentor2-12m", "t4", {"learning_rate": 1e-3, "hidden_size": 512})
    assert recipe.difference(R["stentor2-12m"]) == [
        ("shape.hidden_size", 512, 256), ("learning_rate", 1e-3, 8e-4)]


def test_what_a_resumed_run_and_a_second_draw_may_change():
    """Said beside each field; another list here would continue, or refuse, other checkpoints."""
    both = {"published", "unpublished", "per_device_eval_batch_size", "num_processes",
            "save_every_minutes", "save_total_limit", "logging_steps", "torch_compile"}
    assert free_fields(su.Recipe, RESUME) == both | {
        "name", "sources", "per_device_train_batch_size", "gradient_accumulation_steps",
        "eval_steps", "best_eval_steps", "best_eval_start_step", "save_epochs", "gradient_checkpointing",
        "budget_check"}
    assert free_fields(su.Recipe, DRAW) == both | {"seed", "mixed_precision", "attn_implementation"}


def test_the_cards_evaluate_where_they_say():
    """S2's best evaluations at 1,500 + k x 900, its regular ones every 900, the ends of epochs (step 2,350 of a store of
    308M tokens); P's every 375; what is measured is the web source alone."""
    class Store:
        def epoch(self, step):
            return step / 2350
    due = stentor.train.Run.evaluation_due

    def steps(recipe, last):
        run = stentor.train.Run.__new__(stentor.train.Run)
        run.recipe, run.store, found = recipe, Store(), []
        for step in range(last + 1):
            run.state = {"step": step, "evaluated_step": None}
            found += [step] if due(run) else []
        return found
    second = su.RECIPES["stentor2-12m"]
    assert steps(second, 3663) == [0, 900, 1500, 1800, 2350, 2400, 2700, 3300, 3600, 3663]
    assert steps(dataclasses.replace(second, save_epochs=0), 3663) == [0, 900, 1500, 1800, 2400, 2700, 3300, 3600, 3663]
    assert 2350 not in steps(dataclasses.replace(second, save_epochs=2), 3000)
    assert steps(su.RECIPES["stentor2-12m-preview"], 1200) == [0, 375, 750, 1125]
    assert steps(su.RECIPES["stentor3-20m"], 3500) == [0, 1000, 2000, 3000]
    assert second.validation_sources == ("fineweb-hq",) and su.RECIPES["stentor3-20m"].validation_sources == ("web",)
    assert second.scaled_to("cpu").validation_sources is None
    other = {"sources": [{"name": "mine", "path": "local:prose"}]}
    assert su.find_recipe("stentor2-12m", "t4", other).validation_sources is None
    with pytest.raises(su.ParameterError, match="validation_sources: 'stencor' is none of the sources that are read"):
        su.find_recipe("stentor2-12m", "t4", {"validation_sources": ["stencor"]})


def test_a_validated_source_is_measured_alone(tiny, tmp_path):
    sources = [tiny.source, dataclasses.replace(tiny.source, name="again")]
    store_dir = su.prepare_tokens(sources, tiny.tokenizer, tmp_path / "tokens", validation_documents=4, shard_tokens=20_000,
                                  tokens_per_source={"topics": 20_000, "again": 20_000})
    recipe = dataclasses.replace(tiny.recipe, sources=tuple(sources))
    both, text = su.TokenStore(store_dir, recipe).validation()
    one, its_text = su.TokenStore(store_dir, dataclasses.replace(recipe, validation_sources=("topics",))).validation()
    assert 0 < its_text < text and len(one) < len(both) and both[:len(one)].tolist() == one.tolist()


def test_old_runs_keep_their_fingerprint_where_their_recipe_did_not_change():
    """A checkpoint's fingerprint from before `validation_sources`: equal but for the recipes whose card names a source."""
    for name, recipe in su.ALL_RECIPES.items():
        mine = stentor.checkpoints.recipe_fingerprint(recipe)
        old = {key: value for key, value in mine.items() if key != "validation_sources"}
        changed = stentor.checkpoints.fingerprint_differences(old, mine)
        assert bool(changed) == bool(recipe.validation_sources), (name, changed)
        assert stentor.checkpoints.recipe_fingerprint(recipe.scaled_to("cpu"))["validation_sources"] is None
        assert su.Recipe.from_dict({key: value for key, value in recipe.to_dict().items()
                                    if key not in ("validation_sources", "save_epochs")}).validation_sources is None


def test_what_no_card_prints_is_said_to_be_unpublished():
    for name, fields in {"stentor2-12m": ("sources.weight", "sources.config"), "stentor2-12m-preview": ("sources.config",),
                         "stentor3-20m": ("save_every_minutes", "sources.text_field"),
                         "stentor2-30m": ("source_token_budget",)}.items():
        assert set(fields) <= set(su.RECIPES[name].unpublished), name
    known = {field.name for field in dataclasses.fields(su.Recipe)}
    known |= {f"sources.{field.name}" for field in dataclasses.fields(su.Source)}
    for name, recipe in su.RECIPES.items():
        assert set(recipe.unpublished) <= known, name


def test_each_card_has_its_own_prompts_and_departures():
    assert su.card_prompts("stentor2-12m-preview")[0] == "Some sicknesses are" and len(su.card_prompts("stentor3-20m")) == 4
    assert su.card_prompts("stentor-30m") == su.card_prompts("stentor2-12m")
    assert su.card_prompts("stentor3-20m-cpu")[0] == "This function returns"
    assert su.departures("stentor3-20m") == () and any("0.999" in one for one in su.departures("stentor-12m-instruct"))
    assert su.departures("stentor2-12m-tuned-qk") == su.departures("stentor2-12m") != ()
    assert su.card_prompts("stentor3-20m-tuned-qk") == su.card_prompts("stentor3-20m")


def test_heads_other_than_64_are_warned_of_where_a_t4_would_run_them():
    t4, tpu = su.RECIPES["stentor2-12m"], su.RECIPES["stentor3-20m"]
    assert head_dim_note(t4.shape, "fp16") == [] == head_dim_note(tpu.shape, "bf16")
    assert "head_dim = 32" in head_dim_note(tpu.shape, "fp16")[0]
