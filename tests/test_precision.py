"""Each precision technique does what its card says, in numbers, and leaves checkpoints stock."""
import copy
import os

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama as llama

import stentor.precision
import stentor_utils as su

HALF = pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
TINY = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
STENTOR2_12M = {
    "vocab_size": 8064,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 4}


def build(shape=TINY, attention="sdpa", seed=0):
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**shape, num_key_value_heads=shape["num_attention_heads"], use_cache=False,
                                         tie_word_embeddings=True, attn_implementation=attention))
    for p in model.parameters():  # the initial 0.02 makes logits too flat to show a difference
        nn.init.normal_(p, 1.0 if p.dim() == 1 else 0.0, 0.2)
    return model


def tokens(batch=2, length=16):
    return torch.randint(
        TINY["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(1))


def autocast(dtype):
    return torch.autocast("cpu", dtype, enabled=dtype != torch.float32)


def loss_and_gradients(model, ids, seed=3):
    torch.manual_seed(seed)
    with autocast(torch.bfloat16):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.detach(), [p.grad for p in model.parameters()]


class OpDtypes(TorchDispatchMode):
    """Floating input dtypes of every operation that computes (casts and copies aside)."""

    def __init__(self):
        super().__init__()
        self.seen = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name not in ("_to_copy", "clone", "copy_"):
            inputs = [a.dtype for a in args if torch.is_tensor(a) and a.is_floating_point()]
            self.seen.setdefault(name, set()).update(inputs)
        return func(*args, **(kwargs or {}))

    @property
    def dtypes(self):
        return set().union(*self.seen.values())


# ---- counts and names ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("attention", "options", "counts"), [
    ("eager", {"fp32_critical_layers": {0, 1, 9, 10, 11}, "int8_qat": True, "fp32_softmax": True}, (49, 5, 25, 12)),
    ("sdpa", {"fp32_critical_layers": {0, 1}, "fp32_softmax": True}, (0, 2, 25, 0)),
    ("sdpa", {"fp32_critical_layers": {0, 11}}, (0, 2, 25, 0)),
], ids=["stentor2-12m-preview", "stentor2-12m", "stentor3-20m"])
def test_counts_of_the_cards(attention, options, counts):
    model = build(STENTOR2_12M, attention)
    assert sum(p.numel() for p in model.parameters()) == 12_294_400
    before = {k: v.data_ptr() for k, v in model.state_dict().items()}
    report = su.apply_precision_recipe(model, fp32_norms=True, **options)
    names = (
        "int8_linear_modules",
        "fp32_critical_layers",
        "fp32_norm_modules",
        "fp32_softmax_modules")
    assert tuple(report[name] for name in names) == counts
    kinds = (stentor.precision.Int8Linear, stentor.precision.FP32Layer, stentor.precision.FP32Norm,
             stentor.precision.FP32SoftmaxAttention)
    assert tuple(sum(isinstance(m, kind) for m in model.modules()) for kind in kinds) == counts
    critical = options["fp32_critical_layers"]
    assert {
        i
        for i, layer in enumerate(model.model.layers)
        if isinstance(layer, stentor.precision.FP32Layer)
    } == critical
    for i, layer in enumerate(model.model.layers):
        int8 = sum(isinstance(m, stentor.precision.Int8Linear) for m in layer.modules())
        assert int8 == (7 if counts[0] and i not in critical else 0)
    assert any("skipped" in note for note in report["notes"]) == (
        "fp32_softmax" in options and attention == "sdpa")
    # same names, same storage, tie included
    assert {k: v.data_ptr() for k, v in model.state_dict().items()} == before


@pytest.mark.parametrize(("attention", "int8"), [("eager", True), ("sdpa", False)])
def test_a_qwen3_gets_every_technique_and_stays_stock(attention, int8, tmp_path):
    """QK-norm's two a layer are norms too. Logits of the saved folder, read by transformers alone, are the technique-free
    model's; those under the techniques come near the FP32 ones in training."""
    shape = su.Shape(96, 64, 128, 3, 4, 2, 64, qk_norm=True)
    model, stock = (su.build_model(shape, seed=2, attn_implementation=attention) for _ in range(2))
    report = su.apply_precision_recipe(model, fp32_norms=True, fp32_critical_layers={0}, int8_qat=int8, fp32_softmax=True)
    counts = tuple(report[f"{name}_modules"] for name in ("fp32_norm", "int8_linear", "fp32_softmax"))
    assert counts == (3 * 4 + 1, 14 if int8 else 0, 3 if attention == "eager" else 0) and report["fp32_critical_layers"] == 1
    assert isinstance(model.model.layers[0], stentor.precision.FP32Layer)
    ids = tokens()
    (loss, gradients), (wanted, _) = loss_and_gradients(model.train(), ids), loss_and_gradients(stock.train(), ids)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-2) and all(g.isfinite().all() for g in gradients)
    su.save_model_folder(model, None, tmp_path / "final")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    assert type(saved).__name__ == "Qwen3ForCausalLM" and saved.state_dict().keys() == stock.state_dict().keys()
    assert torch.allclose(saved.eval()(ids).logits, stock.eval()(ids).logits, atol=1e-5)


def everything(model):
    return su.apply_precision_recipe(
        model,
        fp32_norms=True,
        fp32_critical_layers=(0,),
        int8_qat=True,
        fp32_softmax=model.config._attn_implementation == "eager")


def test_survives_deepcopy_and_a_second_application():
    model = build(attention="eager").eval()
    report = everything(model)
    ids = tokens()
    logits = model(ids).logits
    twin = copy.deepcopy(model)
    assert torch.equal(twin(ids).logits, logits)
    assert everything(model) == report
    assert torch.equal(model(ids).logits, logits)


def test_errors_name_the_value_and_the_way_out():
    with pytest.raises(ValueError, match=r"\[1, 3\].*layers 0 to 2"):
        su.apply_precision_recipe(build(), fp32_critical_layers=(1, 3))
    with pytest.raises(ValueError, match=r"embed_tokens.weight is torch.float16.*dtype=torch.float32"):
        su.apply_precision_recipe(build().half(), fp32_norms=True)
    with pytest.raises(TypeError, match="Linear.*before DDP"):
        su.apply_precision_recipe(nn.Linear(2, 2), fp32_norms=True)


# ---- INT8 ------------------------------------------------------------------------------------------------------------

def int8_linear(training, inputs=256, outputs=64, batch=128):
    torch.manual_seed(0)
    linear = nn.Linear(inputs, outputs, bias=False).train(training)
    linear.__class__ = stentor.precision.Int8Linear
    return linear, torch.randn(batch, inputs)


def scale(x):
    return x.abs().amax(dim=-1, keepdim=True).clamp_min(1e-8) / 127.0


@pytest.mark.parametrize(("training", "variance"), [(False, 1 / 12), (True, 1 / 6)], ids=["nearest", "stochastic"])
def test_int8_error_is_the_expected_one(training, variance):
    """Rounding to a grid of step s errs by +-s/2 with variance s^2/12 to nearest, by +-s with
    s^2/6 stochastically."""
    linear, x = int8_linear(training)
    w, (sx, sw) = linear.weight.detach(), (scale(x), scale(linear.weight.detach()))
    with torch.no_grad():
        error = linear(x) - F.linear(x, w)
    reach = 1.0 if training else 0.5
    bound = F.linear(reach * sx.expand_as(x), w.abs()) + F.linear(
        x.abs() + reach * sx, reach * sw.expand_as(w))
    assert (error.abs() <= bound * (1 + 1e-5)).all()
    expected = variance * (sx**2 * (w**2).sum(-1) + (x**2).sum(-1, keepdim=True) * (sw**2).T)
    assert error.pow(2).mean().item() == pytest.approx(expected.mean().item(), rel=0.05)


@pytest.mark.parametrize("training", [False, True])
def test_int8_gradient_is_the_straight_through_one(training):
    linear, x = int8_linear(training)
    x.requires_grad_()
    torch.manual_seed(7)
    out = linear(x)
    g = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    out.backward(g)
    torch.manual_seed(7)  # the same rounding, seen from outside
    xq, xs = stentor.precision.int8_codes(x.detach(), training)
    wq, ws = stentor.precision.int8_codes(linear.weight.detach(), training)
    xq, wq = xq * xs, wq * ws
    assert torch.equal(out, F.linear(xq, wq))
    assert torch.equal(x.grad, g @ wq)
    assert torch.equal(linear.weight.grad, g.T @ xq)
    # the formula, by autograd
    a, b = x.detach().requires_grad_(), linear.weight.detach().requires_grad_()
    F.linear(a + (xq - a).detach(), b + (wq - b).detach()).backward(g)
    torch.testing.assert_close(x.grad, a.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(linear.weight.grad, b.grad, rtol=1e-4, atol=1e-5)


def test_int8_nearest_codes_follow_the_formula():
    x = torch.cat([torch.randn(5, 33) * 10.0 ** torch.arange(-2, 3)[:, None], torch.zeros(1, 33)])
    codes, scales = stentor.precision.int8_codes(x, False)
    assert torch.equal(scales, scale(x))
    assert torch.equal(codes, torch.round(x / scale(x)).clamp(-127, 127).to(torch.int8))
    assert torch.equal(codes, stentor.precision.int8_codes(x, False)[0])


def test_stochastic_rounding_is_unbiased():
    torch.manual_seed(0)
    # scale 1: code = value
    values = torch.tensor([127.0, -127, 0, 3, 0.02, 0.25, 0.5, 0.9, -0.1, -41.5, 100.75])
    draws = 40_000
    codes, scales = stentor.precision.int8_codes(values.repeat(draws, 1), True)
    assert torch.allclose(scales, torch.ones(1))
    codes = codes.float()
    assert ((codes == values.floor()) | (codes == values.ceil())).all()
    share = values - values.floor()
    z = (codes.mean(0) - values) / (share * (1 - share) / draws).sqrt().clamp_min(1e-9)
    assert z.abs().max() < 4, z
    # four numbers come from one 64-bit draw
    neighbours = torch.corrcoef(codes[:, 4:8].T) - torch.eye(4)
    assert neighbours.abs().max() < 5 / draws**0.5
    assert not torch.equal(codes[: draws // 2], codes[draws // 2 :])


@HALF
def test_int8_under_autocast_multiplies_in_half_and_trains_the_fp32_master(half):
    linear, x = int8_linear(True)
    x.requires_grad_()
    saved = []
    with autocast(half), OpDtypes() as ops, torch.autograd.graph.saved_tensors_hooks(
            lambda t: saved.append(t) or t, lambda t: t):
        out = linear(x)
    out.sum().backward()
    assert out.dtype == half
    assert ops.seen["mm"] == {half}
    assert (x.grad.dtype, linear.weight.grad.dtype, linear.weight.dtype) == (torch.float32,) * 3
    # what waits for backward: half the bytes of stock autocast
    codes = [t for t in saved if t.dtype == torch.int8]
    assert sum(t.numel() for t in codes) == x.numel() + linear.weight.numel()
    assert sum(t.nbytes for t in saved) < 1.1 * sum(t.numel() for t in codes)


def test_int8_does_not_hide_an_overflow_from_the_loss_scaler():
    linear, x = int8_linear(True, batch=4)
    x[2, 5] = float("inf")
    assert linear(x).isfinite().all(dim=-1).tolist() == [True, True, False, True]


# ---- FP32 norms, layers, softmax -------------------------------------------------------------------------------------

@HALF
def test_fp32_norm_rounds_once(half):
    model = build()
    su.apply_precision_recipe(model, fp32_norms=True)
    norm = model.model.norm
    x = torch.randn(64, 3, 32).to(half).transpose(0, 1)  # not contiguous
    with torch.no_grad(), autocast(half), OpDtypes() as ops:
        out = norm(x)
    assert out.dtype == half
    assert ops.dtypes == {torch.float32}
    rms = (x.double().pow(2).mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()
    exact = x.double() / rms * norm.weight.double()
    normal = exact.abs() > torch.finfo(half).tiny
    error = ((out.double() - exact) / exact).abs()[normal].max()
    # stock Llama, rounding twice, has up to twice that
    assert error < 1.01 * torch.finfo(half).eps / 2
    norm.__class__ = llama.LlamaRMSNorm
    with torch.no_grad(), autocast(half):
        assert ((norm(x).to(half).double() - exact) / exact).abs()[normal].max() > error


@HALF
def test_fp32_critical_layer_computes_in_fp32(half):
    model = build(attention="eager")
    su.apply_precision_recipe(model, fp32_critical_layers=(1,))
    x, cos, sin = (torch.randn(2, 8, n).to(half) for n in (32, 16, 16))
    mask = torch.full((1, 1, 8, 8), -3e4).triu(1).to(half)

    def run(layer, x, cos, sin, mask):
        with torch.no_grad(), autocast(half), OpDtypes() as ops:
            return layer(x, attention_mask=mask, position_embeddings=(cos, sin)), ops
    out, ops = run(model.model.layers[1], x, cos, sin, mask)
    assert out.dtype == half
    assert ops.dtypes == {torch.float32}
    # its neighbour is in half: autocast is on
    assert half in run(model.model.layers[0], x, cos, sin, mask)[1].dtypes
    model.model.layers[1].__class__ = llama.LlamaDecoderLayer
    with torch.no_grad():
        plain = model.model.layers[1](x.float(), attention_mask=mask.float(),
                                      position_embeddings=(cos.float(), sin.float()))
    assert torch.equal(out, plain.to(half))


def test_all_layers_critical_under_autocast_is_the_fp32_model():
    model, ids = build().eval(), tokens()
    with torch.no_grad():
        plain = model.model(ids).last_hidden_state
        with autocast(torch.bfloat16):
            assert not torch.equal(model.model(ids).last_hidden_state, plain)
            su.apply_precision_recipe(model, fp32_critical_layers=range(3), fp32_norms=True)
            assert torch.equal(model.model(ids).last_hidden_state, plain)


@HALF
def test_fp32_softmax_sees_fp32_whatever_eager_attention_asks_for(half, monkeypatch):
    model, ids = build(attention="eager").eval(), tokens()

    def run():
        with torch.no_grad(), autocast(half), OpDtypes() as ops:
            return model(ids).logits, ops.seen["_softmax"]
    stock = run()
    assert stock[1] == {torch.float32}  # the note says that transformers already does it
    counts = su.apply_precision_recipe(model, fp32_softmax=True)
    assert counts["fp32_softmax_modules"] == 3
    pinned = run()
    assert torch.equal(pinned[0], stock[0])

    def half_softmax(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
        # rope gave FP32 q, k
        scores = (query @ key.transpose(2, 3) * scaling + attention_mask).to(value.dtype)
        with torch.autocast("cpu", enabled=False):  # CPU autocast itself would leave the softmax in half
            weights = F.softmax(scores, dim=-1)
        return (weights @ value).transpose(1, 2), weights
    monkeypatch.setattr(llama, "eager_attention_forward", half_softmax)
    assert run()[1] == {torch.float32}
    for layer in model.model.layers:
        layer.self_attn.__class__ = llama.LlamaAttention
    assert run()[1] == {half}


# ---- composition -----------------------------------------------------------------------------------------------------

@HALF
@pytest.mark.parametrize("options", [
    {"fp32_norms": True}, {"fp32_norms": True, "fp32_critical_layers": (0, 2)},
    {"fp32_norms": True, "fp32_critical_layers": (0,), "int8_qat": True}], ids=["norms", "critical", "int8"])
def test_checkpoint_reloads_with_equal_logits(options, half, tmp_path):
    model, ids = build().eval(), tokens()
    su.apply_precision_recipe(model, **options)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert {type(m) for m in again.modules()} == {type(m) for m in build().modules()}

    def equal(dtype):
        with torch.no_grad(), autocast(dtype):
            return torch.equal(again(ids).logits, model(ids).logits)
    assert equal(torch.float32) == ("int8_qat" not in options)
    assert equal(half) == (set(options) == {"fp32_norms"})
    su.apply_precision_recipe(again, **options)
    assert equal(torch.float32)
    assert equal(half)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable")  # its new name is not in transformers 5.0
def test_gradient_checkpointing_gives_the_same_gradients():
    ids = tokens()
    model = build(attention="eager").train()
    everything(model)
    loss, gradients = loss_and_gradients(model, ids)
    saved = copy.deepcopy(model)
    saved.zero_grad()
    saved.gradient_checkpointing_enable({"use_reentrant": False})
    again, recomputed = loss_and_gradients(saved, ids)
    assert torch.equal(again, loss)
    assert all(torch.equal(a, b) for a, b in zip(gradients, recomputed, strict=True))
    saved.zero_grad()
    other, _ = loss_and_gradients(saved, ids, seed=4)
    # stochastic rounding was on, so recomputation had to repeat its draws
    assert not torch.equal(other, loss)


def test_ddp_gives_the_same_gradients():
    ids = tokens()
    model = build().train()
    everything(model)
    _, gradients = loss_and_gradients(model, ids)
    wrapped = copy.deepcopy(model)
    wrapped.zero_grad()
    torch.distributed.init_process_group(
        "gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    try:
        _, reduced = loss_and_gradients(nn.parallel.DistributedDataParallel(wrapped), ids)
    finally:
        torch.distributed.destroy_process_group()
    assert all(torch.equal(a, b) for a, b in zip(gradients, reduced, strict=True))


def test_weight_master_checkpoints_load():
    model = build()
    stock = model.state_dict()
    names = [
        f"{name}.weight"
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear) and "layers.1" in name]
    assert len(names) == 7
    old = {(k + "_master" if k in names else k): v for k, v in stock.items()}
    old[names[0]] = torch.zeros_like(stock[names[0]])  # a stale copy beside its master
    renamed = su.rename_weight_master(old)
    assert renamed.keys() == stock.keys()
    assert all(torch.equal(renamed[k], stock[k]) for k in stock)
    build(seed=1).load_state_dict(renamed)
    assert su.rename_weight_master(stock) == stock


@pytest.mark.skipif(not os.environ.get("STENTOR_SLOW"), reason="compiling takes half a minute; set STENTOR_SLOW=1")
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_torch_compile_gives_the_same_loss_without_graph_breaks(attention):
    ids = tokens()
    # eval rounds to nearest: no random numbers
    model = build(TINY | {"num_hidden_layers": 2}, attention).eval()
    everything(model)
    loss, gradients = loss_and_gradients(model, ids)
    twin = copy.deepcopy(model)
    twin.zero_grad()
    torch._dynamo.reset()
    compiled, got = loss_and_gradients(torch.compile(twin, fullgraph=True), ids)
    assert compiled.item() == pytest.approx(loss.item(), rel=2e-3)
    for a, b in zip(gradients, got, strict=True):
        assert (a - b).norm() < 0.03 * a.norm()
