"""Growth keeps the function: of any small Llama grown to any larger shape the logits are those of before, to rounding."""
import dataclasses
import json
import subprocess
import sys

import pytest
import stentor_utils as su
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stentor.growth import growth_problems, layer_origins


@st.composite
def shapes(draw):
    """(a small shape, a larger one)."""
    head_dim, kv = draw(st.sampled_from([4, 8])), draw(st.integers(1, 2))
    heads, tied = kv * draw(st.integers(1, 3)), draw(st.booleans())
    more = {"rms_norm_eps": draw(st.sampled_from([1e-5, 0.1])), "qk_norm": draw(st.booleans())}
    small = su.Shape(draw(st.integers(8, 20)), heads * head_dim, draw(st.integers(3, 9)), draw(st.integers(1, 3)), heads, kv,
                     16, tie_word_embeddings=tied, **more)
    new_kv = draw(st.integers(kv, 6))
    new_heads = new_kv * draw(st.integers(-(-heads // new_kv), 4))
    large = su.Shape(small.vocab_size + draw(st.integers(0, 5)), new_heads * head_dim,
                     small.intermediate_size + draw(st.integers(0, 9)), small.num_hidden_layers + draw(st.integers(0, 3)),
                     new_heads, new_kv, 32, tie_word_embeddings=tied and draw(st.booleans()), qk_norm=small.qk_norm)
    return small, large


def trained(shape, seed=0):
    """A model whose weights look trained: nothing is as initialised, no norm is 1."""
    model = su.build_model(shape, seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(shapes(), st.sampled_from(["spread", "end", "start"]))
def test_grown_logits_are_the_bases(pair, layers):
    small, large = pair
    if growth_problems(small, large, layers):
        with pytest.raises(su.ParameterError):
            su.grow_model(trained(small), large, layers=layers)
        return
    model = trained(small)
    grown = su.grow_model(model, large, layers=layers)
    ids = torch.randint(0, small.vocab_size, (2, 16))
    with torch.no_grad():
        before, after = model(ids).logits, grown(ids).logits[..., :small.vocab_size]
    assert (before - after).abs().max() <= 1e-5 * before.abs().max()
    carried = sum(parameter.numel() for parameter in model.parameters())
    assert grown.copied_parameters >= carried         # more where a key-value head or a tied table is copied twice


SMALL = su.Shape(50, 16, 24, 2, 4, 2, 16)
LARGE = su.Shape(60, 32, 48, 4, 8, 4, 16)
# One kind of growth alone; RMSNorm's epsilon is as large as the numbers that it is added to.
ALONE = {"width": {"hidden_size": 32, "num_attention_heads": 8}, "feed-forward": {"intermediate_size": 40},
         "key-value heads": {"num_key_value_heads": 4}, "depth": {"num_hidden_layers": 5},
         "vocabulary": {"vocab_size": 61}, "untying": {"tie_word_embeddings": False}}


@pytest.mark.parametrize("qk_norm", [False, True], ids=["Llama", "Qwen3"])
@pytest.mark.parametrize("kind", ALONE)
def test_each_kind_of_growth_alone_keeps_the_function(kind, qk_norm):
    small = dataclasses.replace(SMALL, rms_norm_eps=0.1, qk_norm=qk_norm)
    model, ids = trained(small), torch.randint(0, 50, (2, 16))
    grown = su.grow_model(model, dataclasses.replace(small, **ALONE[kind]))
    assert grown.config.model_type == ("qwen3" if qk_norm else "llama")
    with torch.no_grad():
        before, after = model(ids).logits, grown(ids).logits[..., :50]
    assert (before - after).abs().max() <= 1e-5 * before.abs().max()


@pytest.mark.parametrize("qk_norm", [False, True], ids=["Llama", "Qwen3"])
def test_every_new_unit_gets_a_gradient_of_its_own(qk_norm):
    grown = su.grow_model(trained(dataclasses.replace(SMALL, qk_norm=qk_norm)), dataclasses.replace(LARGE, qk_norm=qk_norm))
    optimizer, ids = torch.optim.AdamW(grown.parameters(), lr=1e-3), torch.randint(0, 50, (4, 16))
    for _ in range(2):                                # what nobody listens to yet learns from the second step on
        optimizer.zero_grad()
        grown(ids, labels=ids).loss.backward()
        optimizer.step()
    for name, parameter in grown.named_parameters():
        if parameter.dim() == 2:
            assert (parameter.grad != 0).any(1).all() and (parameter.grad != 0).any(0).all(), name
            assert len(torch.unique(parameter.grad, dim=0)) == len(parameter), name


def test_the_cards_way_does_not_keep_the_function():
    model, ids = trained(SMALL), torch.randint(0, 50, (2, 16))
    with torch.no_grad():
        before = model(ids).logits
        copied = su.grow_model(model, LARGE, layers="end", function_preserving=False)(ids).logits[..., :50]
    assert (before - copied).abs().max() > 0.1 * before.abs().max()


def test_a_grown_model_is_a_folder_like_any_other(tiny, tmp_path):
    small = su.build_model(tiny.recipe.shape, eos_token_id=tiny.tokenizer.eos_token_id)
    larger = su.Shape(len(tiny.tokenizer), 64, 128, 5, 4, 2, 64)
    grown = su.grow_model(small, larger)
    su.save_model_folder(grown, tiny.tokenizer, tmp_path / "grown")
    ids = torch.randint(0, len(tiny.tokenizer), (1, 32))
    with torch.no_grad():
        before, after = small(ids).logits, su.load_model(tmp_path / "grown")(ids).logits
    assert (before - after).abs().max() <= 1e-5 * before.abs().max()


@pytest.mark.parametrize("change, sentence", [
    ({"hidden_size": 8, "num_attention_heads": 2, "num_key_value_heads": 2}, "growing never takes away"),
    ({"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4}, "head_dim would become 8"),
    ({"rope_theta": 5e5}, "rope_theta = 500000"),
    ({"qk_norm": True}, "qk_norm = True where the model has False"),
    ({"num_attention_heads": 8, "hidden_size": 32, "num_key_value_heads": 8}, None),
    ({"num_attention_heads": 4, "num_key_value_heads": 4}, None)])
def test_shapes_that_cannot_be_reached_are_refused_in_a_sentence(change, sentence):
    wanted = dataclasses.replace(SMALL, **change)
    found = growth_problems(SMALL, wanted)
    assert any(sentence in problem for problem in found) if sentence else not found, found


def test_new_layers_stand_where_they_are_wanted():
    assert layer_origins(3, 5, "end") == [0, 1, 2, None, None] and layer_origins(3, 5, "start") == [None, None, 0, 1, 2]
    assert layer_origins(3, 5, [1, 3]) == [0, None, 1, None, 2] and layer_origins(2, 2) == [0, 1]
    assert layer_origins(4, 8).count(None) == 4 and layer_origins(21, 30, "spread").count(None) == 9
    for wrong in ("middle", [1], [1, 1], [0, 5]):
        with pytest.raises(ValueError, match="layers = "):
            layer_origins(3, 5, wrong)


@pytest.mark.parametrize("change, sentence", [
    ({"attention_bias": True}, "attention_bias = True; only False"), ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "rope_type = 'linear'"),
    ({"head_dim": 8}, "head_dim = 8; only 4")])
def test_a_model_with_what_a_shape_does_not_hold_is_refused_and_loses_nothing(change, sentence):
    from transformers import LlamaConfig, LlamaForCausalLM
    known = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**known, **change))
    with pytest.raises(su.ParameterError, match=sentence):
        su.grow_model(model, LARGE)


def test_another_kind_of_model_is_refused():
    from transformers import GPT2Config, GPT2LMHeadModel
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=16))
    with pytest.raises(su.ParameterError, match="a gpt2 cannot be grown"):
        su.grow_model(model, LARGE)


def test_the_share_of_copied_parameters_of_stentor_big():
    """All of Stentor-30M in Stentor-Big; counted on shapes an eighth as wide: the shares of the matrices are the same."""
    small, large = su.Shape(4096, 32, 128, 21, 4, 4, 64), su.Shape(4096, 64, 256, 30, 8, 8, 64)
    grown = su.grow_model(su.build_model(small), large)
    assert grown.copied_parameters == su.count_parameters(small)
    assert su.copied_share(grown) == su.count_parameters(small) / su.count_parameters(large)


def test_a_killed_run_of_a_grown_model_ends_in_the_same_weights(tiny, tmp_path):
    """The process leaves after the 13th of 24 steps without a word; the next one goes on from the checkpoint of step 8."""
    code = """
import os, sys, json, torch, stentor_utils as su
recipe, store_dir, tokenizer, folder, kill = json.loads(sys.argv[1])
recipe, tokenizer = su.Recipe.from_dict(recipe), su.load_tokenizer(tokenizer)
small = su.build_model(su.Shape(len(tokenizer), 32, 64, 2, 2, 2, 64), 5)
grown = su.grow_model(small, recipe.shape)
store = su.TokenStore(store_dir, recipe)
if kill:
    batch = store.batch
    store.batch = lambda step: os._exit(7) if step == kill else batch(step)
su.train(recipe, store, folder, tokenizer=tokenizer, model=grown)
"""
    recipe = dataclasses.replace(tiny.recipe, shape=su.Shape(len(tiny.tokenizer), 64, 96, 3, 4, 4, 64))
    exits = []
    for folder, kill in (("whole", 0), ("killed", 13), ("killed", 0)):
        given = json.dumps([recipe.to_dict(), str(tiny.store_dir), str(tiny.tokenizer_dir), str(tmp_path / folder), kill])
        done = subprocess.run([sys.executable, "-c", code, given], capture_output=True, text=True)
        exits.append(done.returncode)
    assert exits == [0, 7, 0] and "going on from step 8 of 24" in done.stdout, done.stdout + done.stderr
    whole, killed = ((tmp_path / folder / "final" / "model.safetensors").read_bytes() for folder in ("whole", "killed"))
    assert whole == killed


def test_07_grows_the_run_s_model_or_the_published_one_and_refuses_before_work(tiny, tmp_path, monkeypatch):
    from stentor import alone
    from notebook_functions import load_functions
    notebook = load_functions("07_growth")
    folder = notebook["model_folder"]
    assert folder(None, "cpu", [tmp_path]) is None                        # a small one is trained first
    monkeypatch.setattr(alone, "internet", lambda: False)
    assert "there is no model in" in next(notebook["shape_problems"](None, {}, "spread", "t4", [tmp_path]))
    monkeypatch.setattr(alone, "internet", lambda: True)
    assert folder(None, "t4", [tmp_path]) == "hf:StentorLabs/Stentor-30M"
    small = su.build_model(tiny.recipe.shape, eos_token_id=tiny.tokenizer.eos_token_id)
    su.save_model_folder(small, tiny.tokenizer, tmp_path / "final")
    assert folder(None, "t4", [tmp_path]) == folder(None, "cpu", [tmp_path]) == str(tmp_path / "final")
    assert folder("hf:some/model", "t4", [tmp_path]) == "hf:some/model"

    def problems(shape):
        return list(notebook["shape_problems"](None, shape, "spread", "cpu", [tmp_path]))
    assert problems({}) == []
    assert notebook["wanted_shape"](su.RECIPES["stentor-30m"].shape, {}) == su.RECIPES["stentor-big"].shape
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text(json.dumps({"model_type": "odd", "auto_map": {"AutoConfig": "odd.Config"}}))
    assert "cannot be grown" in next(notebook["shape_problems"](str(tmp_path / "odd"), {}, "spread", "cpu", [tmp_path]))
    assert "never takes away" in problems({"hidden_size": 16})[0] and "'hidden_sice'" in problems({"hidden_sice": 5})[0]
