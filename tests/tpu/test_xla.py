"""The XLA engine on 8 virtual CPU devices against the CPU engine. `make tpu-test` has torch_xla; `make test` skips this."""
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import REPO

import stentor_utils as su

pytest.importorskip("torch_xla", reason="torch_xla has an environment of its own: make tpu-test")


def run(recipe, tiny, run_dir, **launching):
    log = []
    summary = su.launch(recipe, tiny.store_dir, tiny.tokenizer_dir, run_dir, say=log.append, **launching)
    return summary, [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()], log


def losses(rows, kind="train"):
    return [row["loss"] for row in rows if row["kind"] == kind]


@pytest.fixture(scope="module")
def stentor3(tiny):
    """The tiny recipe with what is Stentor3's own: GQA, untied embeddings, residual scaling, first and last layer in FP32."""
    shape = dataclasses.replace(tiny.recipe.shape, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False,
                                rope_theta=50_000.0, num_hidden_layers=4)
    return dataclasses.replace(tiny.recipe, shape=shape, initialization="residual_scaled", fp32_critical_first=1,
                               fp32_critical_last=1, token_budget=50 * 8 * 64, logging_steps=1, eval_steps=20,
                               best_eval_steps=20)


@pytest.fixture(scope="module")
def cpu_curve(stentor3, tiny, tmp_path_factory):
    return run(stentor3, tiny, tmp_path_factory.mktemp("cpu"))


@pytest.mark.parametrize("precision, tolerance", [("no", 1e-4), ("bf16", 0.02)])
def test_50_steps_on_8_devices_are_the_cpu_engines(stentor3, tiny, cpu_curve, tmp_path, precision, tolerance):
    summary, rows, log = run(dataclasses.replace(stentor3, mixed_precision=precision), tiny, tmp_path, xla="CPU")
    expected = cpu_curve[1]
    assert len(losses(rows)) == 50 and losses(rows) == pytest.approx(losses(expected), rel=tolerance)
    assert losses(rows, "eval") == pytest.approx(losses(expected, "eval"), rel=tolerance)
    if precision == "bf16":                           # and it is bf16: not the fp32 curve
        assert losses(rows)[5:] != pytest.approx(losses(expected)[5:], rel=1e-6)
    assert summary["precision"]["fp32_norm_modules"] == 9 and summary["precision"]["fp32_critical_layers"] == 2
    assert any("8 sequences a step on 8 devices" in line for line in log)
    # one graph for training, one for evaluation, none after; evaluations and checkpoints come in between
    trained = [row for row in rows if row["kind"] == "train"]
    assert [row["compilations"] for row in trained] == [2] * 50 and summary["compilations"] == 2
    ran = np.diff([row["executions"] for row in trained])
    evaluated = set(range(20, 50, 20))
    alone = [n for row, n in zip(trained[1:], ran) if row["step"] - 1 not in evaluated]
    # the counter is read while the device runs: one step's execution may be counted with the next (0, 2 was seen)
    assert abs(sum(alone) - len(alone)) <= 1 and max(alone) <= 2, ran


@pytest.fixture(scope="module")
def tuned(tiny, tmp_path_factory):
    """(recipe, the CPU engine's losses, the run's folder on 8 devices) of Muon with QK-norm."""
    recipe = dataclasses.replace(tiny.tuned, logging_steps=1)
    folder = tmp_path_factory.mktemp("tuned")
    _, expected, _ = run(recipe, tiny, folder / "cpu")
    return recipe, expected, folder / "xla", run(recipe, tiny, folder / "xla", xla="CPU")


def test_muon_and_qk_norm_on_8_devices_are_the_cpu_engines(tuned):
    recipe, expected, folder, (summary, rows, _) = tuned
    assert losses(rows) == pytest.approx(losses(expected), rel=1e-4) and len(losses(rows)) == 24
    assert losses(rows, "eval") == pytest.approx(losses(expected, "eval"), rel=1e-4)
    assert summary["optimizer"] == "stentor.MuonAdamW" and summary["compilations"] == 2
    assert {row["compilations"] for row in rows if row["kind"] == "train"} == {2}
    assert json.loads((folder / "final" / "config.json").read_text())["architectures"] == ["Qwen3ForCausalLM"]


@pytest.mark.parametrize("then", ["CPU", None], ids=["xla", "cpu"])
def test_a_run_with_muon_goes_on_from_its_middle(tuned, tiny, tmp_path, then):
    """On XLA to the same bits, on the CPU engine to the same losses."""
    recipe, expected, folder, _ = tuned
    shutil.copytree(folder / "checkpoints" / "step-00000016", tmp_path / "checkpoints" / "step-00000016")
    shutil.copy(folder / "metrics.jsonl", tmp_path)
    _, rows, log = run(recipe, tiny, tmp_path, xla=then)
    assert any("going on from step 16 of 24" in line for line in log)
    assert losses(rows) == pytest.approx(losses(expected), rel=1e-4)
    for name in ("model", "optimizer") if then else ():
        name = f"checkpoints/step-00000024/{name}.safetensors"
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes(), name


def test_the_final_evaluation_needs_no_graph_of_its_own(tiny, tmp_path):
    """What was saved is read back and measured by the evaluation's graph: three compilations would be a second one."""
    code = ("import sys, stentor.launch\nstentor.launch.train_from_file(sys.argv[1])\n"
            "import torch_xla.debug.metrics as met\nprint('compiled', met.metric_data('CompileTime')[0])\n")
    (tmp_path / "run.json").write_text(json.dumps({"recipe": tiny.recipe.to_dict(), "store": str(tiny.store_dir),
                                                   "tokenizer": str(tiny.tokenizer_dir)}))
    env = {**os.environ, "STENTOR_ENGINE": "xla", "PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": "8", "TF_CPP_MIN_LOG_LEVEL": "2"}
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "run.json"], env=env, capture_output=True, text=True,
                          cwd=REPO)
    assert "compiled 2" in done.stdout, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.fixture(scope="module")
def xla_alone(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    return folder, run(tiny.recipe, tiny, folder, xla="CPU")


@pytest.fixture(scope="module")
def cpu_alone(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cpu-alone")
    return folder, run(tiny.recipe, tiny, folder)


def test_kill_9_and_going_on_ends_with_the_same_bits(tiny, xla_alone, tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"recipe": tiny.recipe.to_dict(), "store": str(tiny.store_dir),
                                                   "tokenizer": str(tiny.tokenizer_dir)}))
    env = {**os.environ, "STENTOR_ENGINE": "xla", "PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": "8"}
    done = subprocess.run([sys.executable, "tests/kill_here.py", str(tmp_path / "run.json"), "step     12/24", "0"], cwd=REPO,
                          env=env, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    summary, rows, log = run(tiny.recipe, tiny, tmp_path, xla="CPU")
    assert any("going on from step 8 of 24" in line for line in log)
    for name in ("final/model.safetensors", "checkpoints/step-00000024/model.safetensors",
                 "checkpoints/step-00000024/optimizer.safetensors", "training_curves.csv"):
        assert (tmp_path / name).read_bytes() == (xla_alone[0] / name).read_bytes(), name


@pytest.mark.parametrize("source, then", [("xla", None), ("cpu", "CPU")], ids=["xla-cpu", "cpu-xla"])
def test_a_checkpoint_of_the_middle_goes_on_under_the_other_engine(tiny, xla_alone, cpu_alone, tmp_path, source, then):
    folder = (xla_alone if source == "xla" else cpu_alone)[0]
    shutil.copytree(folder / "checkpoints" / "step-00000016", tmp_path / "checkpoints" / "step-00000016")
    shutil.copy(folder / "metrics.jsonl", tmp_path)
    summary, rows, log = run(tiny.recipe, tiny, tmp_path, xla=then)
    assert any("going on from step 16 of 24" in line for line in log)
    assert losses(rows) == pytest.approx(losses(cpu_alone[1][1]), rel=1e-4)
    assert summary["eval_loss"] == pytest.approx(cpu_alone[1][0]["eval_loss"], rel=1e-4)


def test_micro_batches_in_the_graph_and_an_odd_last_step(tiny, tmp_path):
    """32 sequences as 4 micro-batches of one a device, and a last step of 20: still one graph."""
    recipe = dataclasses.replace(tiny.recipe, per_device_train_batch_size=1, gradient_accumulation_steps=32, logging_steps=1,
                                 eval_steps=100, best_eval_steps=100, budget_check="micro_batch",
                                 token_budget=(5 * 32 + 20) * 64)
    _, expected, _ = run(recipe, tiny, tmp_path / "cpu")
    summary, rows, log = run(recipe, tiny, tmp_path / "xla", xla="CPU")
    assert any("4 a device, in 4 micro-batches of 1" in line for line in log)
    assert losses(rows) == pytest.approx(losses(expected), rel=1e-4) and len(losses(rows)) == 6
    assert summary["compilations"] == 2 and summary["tokens"] == (5 * 32 + 20) * 64


@pytest.mark.parametrize("twin", ["recipe", "tuned"])
def test_an_infinite_gradient_skips_the_step_on_the_device(tiny, tmp_path, twin):
    recipe = getattr(tiny, twin)
    (tmp_path / "run.json").write_text(json.dumps({"recipe": recipe.to_dict(), "store": str(tiny.store_dir),
                                                   "tokenizer": str(tiny.tokenizer_dir)}))
    (tmp_path / "poisoned.py").write_text("""
import sys, stentor.launch, stentor.xla
calls, place = [0], stentor.xla.XlaEngine.place
def poisoned(self, model):
    model = place(self, model)
    def hook(gradient):
        calls[0] += 1
        return gradient * float("inf") if calls[0] in (3, 6) else gradient
    model.model.norm.weight.register_hook(hook)
    return model
stentor.xla.XlaEngine.place = poisoned
stentor.launch.train_from_file(sys.argv[1])
""")
    env = {**os.environ, "STENTOR_ENGINE": "xla", "PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": "8"}
    done = subprocess.run([sys.executable, str(tmp_path / "poisoned.py"), str(tmp_path / "run.json")], env=env,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["skipped_steps"] == 2 and done.stdout.count("step skipped") == 2
    state = json.loads((su.checkpoint_folders(tmp_path)[-1] / "state.json").read_text())
    assert state["updates"] == 22 and np.isfinite(summary["eval_loss"])
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    rates = {row["step"]: row["learning_rate"] for row in rows if row["kind"] == "train"}
    assert rates[4] == pytest.approx(recipe.learning_rate_at(2))         # one behind: the schedule waited


def test_what_xla_cannot_do_is_refused(tiny, tmp_path):
    recipe = dataclasses.replace(tiny.recipe, int8_qat=True)
    with pytest.raises(su.TrainingFailed, match="int8_qat are not made for XLA"):
        run(recipe, tiny, tmp_path, xla="CPU")
    recipe = dataclasses.replace(tiny.recipe, gradient_accumulation_steps=1, per_device_train_batch_size=12)
    with pytest.raises(su.TrainingFailed, match="12 sequences does not divide among 8 devices"):
        run(recipe, tiny, tmp_path / "odd", xla="CPU")


@pytest.mark.parametrize("length, block", [(64, 64), (50, 16), (33, 8)])
def test_blocked_attention_is_sdpa(length, block, monkeypatch):
    """Values and gradients of grouped-query attention, in blocks that do and do not divide the length."""
    import stentor.xla
    monkeypatch.setattr(stentor.xla.CausalAttention, "block", block)
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, length, 8, requires_grad=True) for heads in (6, 2, 2))
    weight = torch.randn(2, 6, length, 8)
    ours = stentor.xla.CausalAttention.apply(q, k, v, 8 ** -0.5)
    stock = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert torch.allclose(ours, stock, atol=1e-5)
    gradients = [torch.autograd.grad((out * weight).sum(), (q, k, v)) for out in (ours, stock)]
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, atol=1e-5)
