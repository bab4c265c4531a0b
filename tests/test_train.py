"""The training loop: it learns, it can be killed anywhere, and it ends with the same bytes."""
import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import REPO

import stentor_utils as su


def hashes(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*"))
            if p.suffix in (".safetensors", ".csv") or p.name == "metrics.jsonl"}


def without_clock(data: bytes) -> list:
    rows = [json.loads(line) for line in data.decode().splitlines()]
    clock = {"tokens_per_second", "wait_seconds", "elapsed_seconds"}
    return [{key: value for key, value in row.items() if key not in clock} for row in rows]


def same_run(a: Path, b: Path) -> None:
    """Weights, optimiser and metrics of two finished runs are equal, bit for bit; only clocks
    differ."""
    names = ("final/model.safetensors", "best/model.safetensors", "training_curves.csv")
    newest = su.checkpoint_folders(a)[-1].name
    for name in (*names, f"checkpoints/{newest}/model.safetensors", f"checkpoints/{newest}/optimizer.safetensors"):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    assert without_clock((a / "metrics.jsonl").read_bytes()) == without_clock(
        (b / "metrics.jsonl").read_bytes())
    states = [
        json.loads((folder / "checkpoints" / newest / "state.json").read_text())
        for folder in (a, b)]
    for state in states:
        del state["seconds"]
    assert states[0] == states[1]


@pytest.fixture(scope="module", params=["card", "tuned"])
def tiny(tiny, request):
    """The tiny recipe as the card's optimiser trains it, and its tuned twin: Muon, a Qwen3 with QK-norm."""
    return SimpleNamespace(**{**vars(tiny), "recipe": tiny.recipe if request.param == "card" else tiny.tuned})


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """A run of the tiny recipe left alone."""
    folder = tmp_path_factory.mktemp("whole")
    summary = su.train(
        tiny.recipe,
        su.TokenStore(tiny.store_dir, tiny.recipe),
        folder,
        tokenizer=tiny.tokenizer,
        say=lambda text: None)
    return folder, summary


def test_a_run_leaves_what_it_promises(tiny, whole):
    folder, summary = whole
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if row["kind"] == "eval"]
    assert [row["step"] for row in rows if row["kind"] == "eval"] == [0, 8, 16, 24]
    # knows nothing at first
    assert losses[0] == pytest.approx(np.log(tiny.recipe.shape.vocab_size), abs=0.15)
    assert losses[-1] < losses[0] - 0.5
    assert summary["tokens"] == tiny.recipe.total_tokens == 24 * 8 * 64
    # read back from final/
    assert summary["eval_loss"] == pytest.approx(losses[-1], abs=1e-5)
    assert summary["bits_per_byte"] < 8
    header, *lines = (folder / "training_curves.csv").read_text().splitlines()
    assert header == "step,epoch,train_loss,eval_loss,eval_ppl,note"
    assert sum(line.endswith(",best") for line in lines) == 1
    assert {p.name for p in su.checkpoint_folders(folder)} == {"step-00000016", "step-00000024"}
    assert not list((folder / "checkpoints").glob(".*"))


def test_final_folder_loads_where_there_is_only_transformers(tiny, whole, tmp_path):
    """A new process, outside the repository, without numba: the same loss on the validation text
    within 1e-4."""
    folder, summary = whole
    texts = [su.clean_text(value) for value, _ in su.documents(tiny.source)][:4]
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    (tmp_path / "check.py").write_text("""
import json, sys
sys.modules["numba"] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, size = sys.argv[1], int(sys.argv[2])
model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
ids = [tokenizer.eos_token_id]
for text in json.load(open("texts.json")):
    ids += tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
total = 0.0
with torch.no_grad():
    for start in range(0, len(ids) - 1, size):
        part = torch.tensor([ids[start:start + size + 1]])
        logits = model(part[:, :-1]).logits[0]
        total += torch.nn.functional.cross_entropy(logits, part[0, 1:], reduction="sum").item()
out = model.generate(torch.tensor([ids[:5]]), max_new_tokens=5, do_sample=False)
print(json.dumps({"loss": total / (len(ids) - 1), "generated": out.shape[1], "modules": "stentor_utils" in sys.modules,
                  "text": tokenizer.decode(out[0])}))
""")
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {
        "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(
        [sys.executable, "check.py", folder / "final", str(tiny.recipe.block_size)],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["loss"] == pytest.approx(summary["eval_loss"], abs=1e-4)
    assert found["generated"] == 10 and found["text"] and not found["modules"]


def test_the_weights_are_a_stock_models(tiny, whole):
    from safetensors import safe_open
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM
    kind, config = (Qwen3ForCausalLM, Qwen3Config) if tiny.recipe.shape.qk_norm else (LlamaForCausalLM, LlamaConfig)
    folder, _ = whole
    with safe_open(folder / "final" / "model.safetensors", "pt") as file:
        names = set(file.keys())
    stock = kind(config.from_pretrained(folder / "final"))
    assert stock.config.architectures == [kind.__name__]
    assert names == set(stock.state_dict()) - {"lm_head.weight"}


def train_here(tiny, run_dir):
    """(summary, the lines of its log) of the tiny run, in this process."""
    said = []
    store = su.TokenStore(tiny.store_dir, tiny.recipe)
    return su.train(tiny.recipe, store, run_dir, tokenizer=tiny.tokenizer, say=said.append), said


def child(tiny, run_dir, recipe=None, kill=(), **env):
    """Start the run in a process of its own, as `launch` does; kill: (line, calls) of
    kill_here.train."""
    run_dir.mkdir(exist_ok=True)
    (run_dir / "run.json").write_text(
        json.dumps(
            {
                "recipe": (recipe or tiny.recipe).to_dict(),
                "store": str(tiny.store_dir),
                "tokenizer": str(tiny.tokenizer_dir)}))
    command = ["tests/kill_here.py", str(run_dir / "run.json"), *map(str, kill)] if kill else [
        "-m", "stentor_utils", "train", str(run_dir / "run.json")]
    return subprocess.Popen([sys.executable, *command], cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env={**os.environ, "PYTHONUNBUFFERED": "1", **env})


def test_kill_9_in_the_middle_ends_with_the_same_bits(tiny, whole, tmp_path):
    """kill -9 at a random place in the first steps and in two saves and evaluations, then left to
    finish: the same bytes.

    A step of this run makes 10,000 calls, a save with the evaluation after it 80,000.
    """
    draw, run_dir = random.Random(0), tmp_path / "killed"
    for wanted in ("step      0 |", "step      8/24", "step     16/24"):
        process = child(tiny, run_dir, kill=(wanted, draw.randrange(60_000)))
        log = process.communicate()[0]
        assert process.returncode == -signal.SIGKILL and wanted in log, log[-2000:]
    log = child(tiny, run_dir).communicate()[0]
    assert "going on from step 8 of 24" in log or "going on from step 16 of 24" in log, log[-2000:]
    # the process's thread count and allocator may differ from this one's: compare with a run
    # started the same way
    alone = tmp_path / "alone"
    assert child(tiny, alone).wait() == 0
    same_run(alone, run_dir)


@pytest.mark.parametrize("tiny", ["card"], indirect=True)
def test_sigterm_saves_and_goes_on(tiny, tmp_path):
    """Of a run so long that it cannot end before the signal reaches it, however late that is."""
    steps = 100_000
    recipe = dataclasses.replace(tiny.recipe, token_budget=steps * 8 * 64, logging_steps=1)
    process = child(tiny, tmp_path / "run", recipe)
    for line in process.stdout:
        if line.startswith("step      3/"):
            process.send_signal(signal.SIGTERM)
            break
    log = process.communicate()[0]
    assert process.returncode == 143 and "Run the same again to go on" in log, log[-2000:]
    stopped = int(su.checkpoint_folders(tmp_path / "run")[-1].name[5:])
    assert 3 <= stopped < steps
    process = child(tiny, tmp_path / "run", recipe)
    # to its end if it is not
    assert any(f"going on from step {stopped} of 100,000" in line for line in process.stdout)
    process.kill()
    process.wait()


def test_deadline_saves_and_the_next_call_goes_on(tiny, whole, tmp_path):
    store = su.TokenStore(tiny.store_dir, tiny.recipe)
    stops = 0
    # the first call stops at once, in the middle of a window of the log: the log must not show it
    while (summary := su.train(tiny.recipe, store, tmp_path, tokenizer=tiny.tokenizer, say=lambda text: None,
                               deadline_hours=None if stops else 1e-6))["stopped"]:
        stops += 1
        assert summary["stopped"] == "deadline" and not (tmp_path / "final").exists()
    assert stops == 1
    same_run(whole[0], tmp_path)


def test_a_second_run_in_the_same_folder_is_refused(tiny, tmp_path):
    lock = su.RunLock(tmp_path)
    with pytest.raises(su.ParameterError, match=f"in use by process {os.getpid()}"):
        su.RunLock(tmp_path)
    lock.release()
    su.RunLock(tmp_path).release()


def test_a_checkpoint_of_another_run_is_refused(tiny, whole):
    other = dataclasses.replace(tiny.recipe, learning_rate=1e-3)
    with pytest.raises(su.CheckpointError, match=f"learning_rate is {tiny.recipe.learning_rate} in the checkpoint, 0.001 in"):
        su.train(other, su.TokenStore(tiny.store_dir, other), whole[0], tokenizer=tiny.tokenizer, say=lambda text: None)


@pytest.mark.parametrize("damage", ["cut", "flip", "delete", "empty"])
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
def test_a_damaged_checkpoint_is_set_aside(tmp_path, name, damage):
    for step in (1, 2):
        tensors = {
            "model": {"w": torch.full((3,), float(step))},
            "optimizer": {"w.exp_avg": torch.zeros(3)}}
        su.save_checkpoint(tmp_path, step, tensors, {"step": step})
    path = tmp_path / "checkpoints" / "step-00000002" / name
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 4
    path.unlink()
    if damage != "delete":
        path.write_bytes(data[:-1] if damage == "cut" else b"" if damage == "empty" else data)
    said = []
    tensors, state = su.load_checkpoint(tmp_path, said.append)
    assert state["step"] == 1 and tensors["model"]["w"].tolist() == [1, 1, 1]
    assert len(said) == 1 and "step-00000002 set aside" in said[0]


def test_only_damaged_checkpoints_stop_loudly(tmp_path):
    assert su.load_checkpoint(tmp_path) is None
    folder = su.save_checkpoint(tmp_path, 1, {"model": {"w": torch.zeros(1)}, "optimizer": {}}, {})
    (folder / "model.safetensors").write_bytes(b"")
    for _ in range(2):                                # and again the next time: never silently from step 0
        with pytest.raises(su.CheckpointError, match="no checkpoint under .* can be read"):
            su.load_checkpoint(tmp_path, lambda text: None)


def test_gradient_accumulation_does_not_change_the_run(tiny, whole, tmp_path):
    """Four micro-batches of 2 instead of two of 4: the same global batch, the same loss curve."""
    recipe = dataclasses.replace(
        tiny.recipe, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    summary = su.train(recipe, su.TokenStore(tiny.store_dir, recipe), tmp_path, tokenizer=tiny.tokenizer, say=lambda text: None)
    assert summary["eval_loss"] == pytest.approx(whole[1]["eval_loss"], rel=1e-5)


def test_two_processes_give_the_run_of_one(tiny, tmp_path):
    """50 steps in fp32: the same loss curve within 1e-5, whoever computes which rows."""
    recipe = dataclasses.replace(tiny.recipe, token_budget=50 * 8 * 64)
    one, two = (su.launch(recipe, tiny.store_dir, tiny.tokenizer_dir, tmp_path / str(n), num_processes=n,
                          say=lambda text: None) for n in (1, 2))
    assert (one["processes"], two["processes"], two["steps"]) == (1, 2, 50)
    assert two["eval_loss"] == pytest.approx(one["eval_loss"], rel=1e-5)
    first, second = (
        without_clock((tmp_path / str(n) / "metrics.jsonl").read_bytes()) for n in (1, 2))
    for a, b in zip(first, second, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5) and a["step"] == b["step"]


def test_an_infinite_gradient_on_one_process_skips_the_step_on_all(tiny, tmp_path):
    """Process 1 alone gets an inf into its gradient at the third step: both must skip it, or their
    weights part."""
    (tmp_path / "run.json").write_text(
        json.dumps(
            {
                "recipe": tiny.recipe.to_dict(),
                "store": str(tiny.store_dir),
                "tokenizer": str(tiny.tokenizer_dir)}))
    (tmp_path / "poisoned.py").write_text("""
import os, sys, torch
import stentor.commands
import stentor.learner
calls, build = [0], stentor.learner.build_model
def poisoned_model(*args, **kwargs):
    model = build(*args, **kwargs)
    def hook(gradient):                       # runs before DDP's exchange; once a micro-batch, and once in the probe
        calls[0] += 1
        return gradient * float("inf") if os.environ["RANK"] == "1" and calls[0] == 4 else gradient
    model.model.norm.weight.register_hook(hook)
    return model
stentor.learner.build_model = poisoned_model
sys.exit(stentor.commands.main(["train", sys.argv[1]]))
""")
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
                           str(tmp_path / "poisoned.py"), str(tmp_path / "run.json")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["skipped_steps"] == 1 and done.stdout.count("step skipped") == 1
    assert summary["eval_loss"] < np.log(tiny.recipe.shape.vocab_size) - 0.5


@pytest.mark.parametrize("tiny", ["card"], indirect=True)
def test_compiled_training_is_the_same_training_and_resumes_to_the_same_bits(tiny, tmp_path):
    """torch_compile with INT8 (stochastic rounding) and checkpointed layers, stopped after step 8
    and gone on with."""
    recipe = dataclasses.replace(tiny.recipe, token_budget=16 * 8 * 64, logging_steps=1, int8_qat=True, torch_compile=True,
                                 gradient_checkpointing=True, fp32_critical_first=1, attn_implementation="eager")

    def run(name, say=lambda text: None, **changes):
        changed = dataclasses.replace(recipe, **changes)
        su.train(changed, su.TokenStore(tiny.store_dir, changed), tmp_path / name, tokenizer=tiny.tokenizer, say=say)
        return [
            row["loss"]
            for row in without_clock((tmp_path / name / "metrics.jsonl").read_bytes())
            if "loss" in row]

    def stop_after_8(line):
        if line.startswith("step      8/"):
            os.kill(os.getpid(), signal.SIGTERM)
    torch._dynamo.utils.counters.clear()
    compiled = run("compiled")
    counters = torch._dynamo.utils.counters
    # the critical layer, the other two, the loss
    assert counters["stats"]["unique_graphs"] == 3, counters["stats"]
    assert not counters["graph_break"]
    with pytest.raises(SystemExit):
        run("resumed", say=stop_after_8)
    run("resumed")
    same_run(tmp_path / "compiled", tmp_path / "resumed")
    eager = run("eager", torch_compile=False)
    # rounded by other random numbers
    assert compiled == pytest.approx(eager, rel=2e-3) and eager[-1] < eager[0] - 0.1
    names = [
        set(su.load_model(tmp_path / name / "final").state_dict())
        for name in ("compiled", "eager")]
    assert names[0] == names[1]


def test_out_of_memory_halves_the_micro_batch_and_keeps_the_run(tiny, whole, tmp_path, monkeypatch):
    """A device that holds two sequences at a time: the loss curve is that of the run that held
    four."""
    from transformers import LlamaModel, Qwen3Model
    kind = Qwen3Model if tiny.recipe.shape.qk_norm else LlamaModel
    forward = kind.forward

    def small(self, input_ids=None, **kwargs):
        if self.training and len(input_ids) > 2:
            raise torch.OutOfMemoryError("pretend")
        return forward(self, input_ids=input_ids, **kwargs)
    monkeypatch.setattr(kind, "forward", small)
    summary, said = train_here(tiny, tmp_path)
    assert [line for line in said if "halved" in line] == [
        "out of memory: micro-batch halved to 2 sequences, the global batch stays"]
    assert summary["eval_loss"] == pytest.approx(whole[1]["eval_loss"], rel=1e-5)


def test_a_budget_checked_per_micro_batch_ends_inside_a_step(tiny, tmp_path):
    recipe = dataclasses.replace(tiny.recipe, budget_check="micro_batch", token_budget=9 * 4 * 64)
    store = su.TokenStore(tiny.store_dir, recipe)
    assert (
        recipe.total_steps == 5
        and len(store.batch(4)["input_ids"]) == 4
        and len(store.batch(3)["input_ids"]) == 8)
    assert (
        su.train(recipe, store, tmp_path, tokenizer=tiny.tokenizer, say=lambda text: None)[
            "tokens"]
        == 9 * 4 * 64)


def test_an_infinite_gradient_skips_the_step_and_not_the_schedule(tiny, tmp_path, monkeypatch):
    clip, calls = torch.nn.utils.clip_grad_norm_, []

    def poisoned(parameters, max_norm):
        parameters = list(parameters)
        calls.append(1)
        if len(calls) in (3, 4):
            parameters[0].grad[0, 0] = float("inf")
        return clip(parameters, max_norm)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", poisoned)
    summary, said = train_here(tiny, tmp_path)
    assert summary["skipped_steps"] == 2 and sum("step skipped" in line for line in said) == 2
    state = json.loads((su.checkpoint_folders(tmp_path)[-1] / "state.json").read_text())
    assert state["updates"] == 22 and np.isfinite(summary["eval_loss"])


@pytest.mark.parametrize("kind", ["fp16", "bf16"])
def test_half_precision_autocast_follows_fp32(tiny, whole, tmp_path, kind):
    recipe = dataclasses.replace(tiny.recipe, mixed_precision=kind)
    summary = su.train(recipe, su.TokenStore(tiny.store_dir, recipe), tmp_path, tokenizer=tiny.tokenizer, say=lambda text: None)
    assert summary["eval_loss"] == pytest.approx(whole[1]["eval_loss"], rel=5e-3)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    scales = {row["loss_scale"] for row in rows if row["kind"] == "train"}
    assert (scales == {1.0}) == (kind == "bf16")      # fp16 really scales its loss


@pytest.mark.skipif("STENTOR_SLOW" not in os.environ, reason="two minutes; set STENTOR_SLOW=1 (make bench does)")
def test_2000_steps_of_fp16_stay_finite_and_near_fp32(tiny, tmp_path):
    results = {}
    for kind in ("no", "fp16"):
        recipe = dataclasses.replace(tiny.recipe, mixed_precision=kind, learning_rate=8e-4, eval_steps=500,
                                     token_budget=2000 * 8 * 64, best_eval_steps=500, logging_steps=50)
        results[kind] = su.train(
            recipe,
            su.TokenStore(tiny.store_dir, recipe),
            tmp_path / kind,
            tokenizer=tiny.tokenizer,
            say=lambda text: None)
        rows = [
            json.loads(line)
            for line in (tmp_path / kind / "metrics.jsonl").read_text().splitlines()]
        assert all(np.isfinite(row["loss"]) for row in rows)
    print({kind: (r["eval_loss"], r["skipped_steps"]) for kind, r in results.items()})
    assert results["fp16"]["eval_loss"] == pytest.approx(results["no"]["eval_loss"], rel=5e-3)


def test_evaluate_predicts_every_token_once(tiny, whole):
    """Against one long forward without windows, on a model whose context covers the text."""
    shape = dataclasses.replace(tiny.recipe.shape, max_position_embeddings=512)
    model = su.build_model(shape, seed=1)
    ids = np.random.default_rng(0).integers(0, shape.vocab_size, 300).astype(np.uint16)
    result = su.evaluate(model, ids, 1000, block_size=299, batch_size=2)
    logits = model(torch.from_numpy(ids[None, :-1].astype(np.int64))).logits[0]
    loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(ids[1:].astype(np.int64)))
    assert result["loss"] == pytest.approx(loss.item(), rel=1e-5) and result["tokens"] == 299
    assert result["bits_per_byte"] == pytest.approx(loss.item() * 299 / np.log(2) / 1000, rel=1e-5)
    short = su.evaluate(model, ids, 1000, block_size=64, batch_size=3)
    assert short["tokens"] == 299 and short["loss"] != result["loss"]


@pytest.mark.parametrize("tied", [True, False])
def test_the_chunked_loss_is_the_stock_loss(tiny, tied):
    """Value and every gradient, with masked labels and a row count that is no multiple of the
    chunk."""
    # chunks of 256 rows
    shape = dataclasses.replace(tiny.recipe.shape, tie_word_embeddings=tied, vocab_size=16_411)
    ids = torch.randint(0, shape.vocab_size, (5, 64), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[1] = labels[3, 10:40] = -100
    results = []
    for chunked in (False, True):
        model = su.build_model(shape, seed=3).train()
        if chunked:
            su.use_chunked_loss(model)
            model.register_forward_hook(lambda module, args, output: results.append(output.logits))
        loss = model(input_ids=ids, labels=labels, num_items_in_batch=200).loss
        loss.backward()
        results.append((loss.item(), {name: p.grad for name, p in model.named_parameters()}))
        assert torch.equal(
            model.eval()(ids).logits, su.build_model(shape, seed=3).eval()(ids).logits)
    (stock, stock_grads), no_logits, _, (ours, grads) = results[0], results[1], None, results[2]
    assert no_logits is None and ours == pytest.approx(stock, rel=1e-6)
    assert grads.keys() == stock_grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, stock_grads[name], rtol=1e-4, atol=1e-7)
