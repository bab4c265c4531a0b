"""Muon: torch.optim.Muon's update for many matrices at once, beside AdamW's for the rest."""
import copy
import dataclasses

import pytest
import torch

import stentor_utils as su
from stentor.optimizers import (
    MuonAdamW, make_optimizer, muon_dtype, optimizer_groups, orthogonalized, set_learning_rate)

SHAPES = [(48, 48), (48, 48), (96, 48), (48, 96), (96, 48)]


def newton_schulz(gradient, steps=5):
    """Jordan's iteration for one matrix, in float64: the definition."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = gradient.shape[0] > gradient.shape[1]
    x = gradient.double().T if tall else gradient.double()
    x = x / x.norm()
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


def both(dtype, rate=1e-2, weight_decay=0.1):
    """Two equal lists of matrices, torch's Muon for the one and ours for the other."""
    torch.manual_seed(0)
    theirs = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    ours = copy.deepcopy(theirs)
    muon = torch.optim.Muon(theirs, lr=rate, weight_decay=weight_decay, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    group = {"params": ours, "weight_decay": weight_decay, "momentum": 0.95}
    return theirs, ours, muon, MuonAdamW([group], dtype=dtype, lr=rate)


def step(parameters, optimizer, seed, scale=1e-4):
    generator = torch.Generator().manual_seed(seed)
    before = [p.detach().clone() for p in parameters]
    for p in parameters:
        p.grad = scale * torch.randn(p.shape, generator=generator)
    optimizer.step()
    return [p.detach() - old for p, old in zip(parameters, before)]


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with torch 2.9")
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.03), (torch.float16, 0.03), (torch.float32, 0.03)])
def test_ours_is_torchs_muon_to_its_rounding(dtype, tolerance):
    """Torch's own multiplies in bf16, 8 bits of mantissa: relative to the update's size the two may part by that much and
    no more, in every step; momentum is FP32 in both and equal."""
    theirs, ours, muon, mine = both(dtype)
    for seed in range(4):
        for a, b in zip(step(theirs, muon, seed), step(ours, mine, seed), strict=True):
            assert (a - b).norm() < tolerance * a.norm()
    for a, b in zip(theirs, ours):
        torch.testing.assert_close(muon.state[a]["momentum_buffer"], mine.state[b]["momentum_buffer"], rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float16, 3e-3), (torch.bfloat16, 3e-2)])
def test_the_update_is_the_definitions(dtype, tolerance):
    """Against the iteration in float64; fp16 (a T4) is ten times nearer to it than bf16, also for gradients that fp16 cannot
    hold, and weight decay is decoupled."""
    torch.manual_seed(1)
    for scale in (1e-8, 1.0, 1e6):
        for shape in [(3, 48, 48), (2, 96, 48), (2, 48, 96)]:
            gradients = scale * torch.randn(shape)
            found = orthogonalized(gradients, dtype).double()
            for one, gradient in zip(found, gradients):
                wanted = newton_schulz(gradient)
                assert (one - wanted).norm() < tolerance * wanted.norm()
    _, ours, _, mine = both(torch.float32, rate=0.5, weight_decay=0.2)
    before = [p.detach().clone() for p in ours]
    for p, old, delta in zip(ours, before, step(ours, mine, 5)):
        update = newton_schulz((1 - 0.95 + 0.95 * (1 - 0.95)) * p.grad) * 0.2 * max(p.shape) ** 0.5
        torch.testing.assert_close(delta.double(), -0.5 * (update + 0.2 * old.double()), rtol=1e-4, atol=1e-5)


def test_a_gradient_of_zeros_moves_nothing():
    _, ours, _, mine = both(torch.float32, weight_decay=0.0)
    assert all(torch.equal(delta, torch.zeros_like(delta)) for delta in step(ours, mine, 0, scale=0.0))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("qk_norm", [True, False])
def test_the_layers_matrices_are_muons_and_the_rest_is_adamws(tied, qk_norm):
    recipe = su.TUNED["stentor2-12m-tuned"]
    shape = su.Shape(64, 32, 64, 2, 2, 1, 64, tie_word_embeddings=tied, qk_norm=qk_norm)
    model = su.build_model(shape)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = optimizer_groups(model, recipe)
    muon, rest = groups[0], groups[1:]
    assert {names[id(p)].split(".")[-2] for p in muon["params"]} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    others = {names[id(p)]: group["weight_decay"] for group in rest for p in group["params"]}
    assert len(muon["params"]) + len(others) == len(names) and len(muon["params"]) == 14
    decayed = {name for name, decay in others.items() if decay}
    assert decayed == (set() if tied else {"lm_head.weight"}) and "model.embed_tokens.weight" in others
    assert ("model.layers.0.self_attn.q_norm.weight" in others) == qk_norm
    optimizer = make_optimizer(recipe, groups, torch.device("cpu"))
    set_learning_rate(optimizer, recipe.learning_rate / 2)
    rates = {"momentum" in group: group["lr"] for group in optimizer.param_groups}
    assert rates == pytest.approx({True: recipe.matrix_learning_rate / 2, False: recipe.learning_rate / 2})


def test_the_rest_moves_exactly_as_adamw_moves_it():
    """The embedding and the norms of a model, three steps: bit for bit torch's fused AdamW alone."""
    recipe = su.TUNED["stentor2-12m-tuned-qk"]
    mine = su.build_model(su.Shape(64, 32, 64, 2, 2, 1, 64, qk_norm=True))
    theirs = copy.deepcopy(mine)
    ours = make_optimizer(recipe, optimizer_groups(mine, recipe), torch.device("cpu"))
    alone = dataclasses.replace(recipe, optimizer=None, matrix_learning_rate=None)
    adamw = make_optimizer(alone, optimizer_groups(theirs, alone), torch.device("cpu"))
    ids = torch.arange(64)[None]
    for _ in range(3):
        mine(input_ids=ids, labels=ids).loss.backward()
        for p, q in zip(mine.parameters(), theirs.parameters()):
            q.grad = p.grad.clone()
        for optimizer in (ours, adamw):
            optimizer.step()
            optimizer.zero_grad()
    for (name, p), q in zip(mine.named_parameters(), theirs.parameters()):
        assert torch.equal(p, q) == (not name.endswith("_proj.weight")), name


def test_what_it_multiplies_in_is_what_the_device_has(monkeypatch):
    import stentor.optimizers
    cuda, cpu, xla = torch.device("cuda"), torch.device("cpu"), torch.device("xla")
    for units in (True, False):
        monkeypatch.setattr(stentor.optimizers, "cpu_has_bf16", lambda: units)
        assert muon_dtype(cpu, "bf16") is (torch.bfloat16 if units else torch.float32)
    for capability, kind in (((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        assert muon_dtype(cuda, "fp16") is kind
    assert muon_dtype(xla, "bf16") is torch.bfloat16
    assert {muon_dtype(device, "no") for device in (cuda, cpu, xla)} == {torch.float32}


def test_a_recipe_says_what_muon_needs():
    for changes, sentence in (({"optimizer": "muon"}, "optimizer = 'muon' needs a matrix_learning_rate"),
                              ({"matrix_learning_rate": 5e-3}, "matrix_learning_rate = 0.005 is Muon's")):
        with pytest.raises(su.ParameterError, match=sentence):
            su.find_recipe("stentor2-12m", "cpu", changes)
    recipe = su.find_recipe("stentor2-12m", "cpu", {"optimizer": "muon", "matrix_learning_rate": 5e-3})
    assert recipe.matrix_learning_rate == 5e-3
