"""Growth keeps the function: of any small Llama grown to any larger shape the logits are those of before, to rounding."""
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
    small = su.Shape(draw(st.integers(8, 20)), heads * head_dim, draw(st.integers(3, 9)), draw(st.integers(1, 3)), heads, kv,
                     16, tie_word_embeddings=tied)
    new_kv = draw(st.integers(kv, 6))
    new_heads = new_kv * draw(st.integers(-(-heads // new_kv), 4))
    large = su.Shape(small.vocab_size + draw(st.integers(0, 5)), new_heads * head_dim,
                     small.intermediate_size + draw(st.integers(0, 9)), small.num_hidden_layers + draw(st.integers(0, 3)),
                     new_heads, new_kv, 32, tie_word_embeddings=tied and draw(st.booleans()))
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


def test_every_new_unit_gets_a_gradient_of_its_own():
    grown = su.grow_model(trained(SMALL), LARGE)
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
    ({"num_attention_heads": 8, "hidden_size": 32, "num_key_value_heads": 8}, None),
    ({"num_attention_heads": 4, "num_key_value_heads": 4}, None)])
def test_shapes_that_cannot_be_reached_are_refused_in_a_sentence(change, sentence):
    import dataclasses
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
