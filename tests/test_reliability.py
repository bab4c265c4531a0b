"""Never lose a run: kills, damage, full disks, signals, deadlines, runs that come apart, crafted
folders, secrets.

What test_train, test_hub and test_store already show is not repeated here. The long form is
tests/soak.py (`make soak`).
"""
import dataclasses
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPO

import lint
import stentor.engine
import stentor.learner
import stentor.secrets
import stentor.stopping
import stentor.tokens
import stentor.train
import stentor_utils as su


def quiet(text):
    pass


@pytest.fixture(scope="module")
def micro(tiny):
    """The smallest recipe that still does everything, for tests that train many times: 16 steps,
    EMA, Muon and QK-norm, one layer."""
    shape = su.Shape(tiny.recipe.shape.vocab_size, 8, 8, 1, 1, 1, 16, qk_norm=True)
    return dataclasses.replace(tiny.tuned, name="micro", shape=shape, block_size=16, token_budget=16 * 4 * 16, ema_decay=0.9,
                               per_device_train_batch_size=2, fp32_critical_first=0, eval_steps=4, best_eval_steps=4,
                               logging_steps=2)


def train(tiny, recipe, folder, store=None, **more):
    return su.train(recipe, store or su.TokenStore(tiny.store_dir, recipe), folder, say=more.pop("say", quiet), **more)


def weights(folder: Path) -> bytes:
    return (folder / "final" / "model.safetensors").read_bytes()


class Wrapped:
    """A token store with something happening at each batch: `at(step, batch) -> batch`. The
    evaluation is a short one."""

    def __init__(self, tiny, recipe, at):
        self.store, self.at = su.TokenStore(tiny.store_dir, recipe), at

    def __getattr__(self, name):
        return getattr(self.store, name)

    def validation(self):
        ids, size = self.store.validation()
        return ids[:65], size

    def batch(self, step):
        return self.at(step, self.store.batch(step))


# --- kill -9


def test_kill_9_at_random_instants(tiny):
    """20 runs of fp16 with loss scaling, INT8's random rounding and EMA, 3 kills each, against one
    left alone.

    A run that ends before its last kill is compared all the same, and one more is made, until 60
    have struck.

    Tried: with the averages, or the loss scale, not taken from the checkpoint, it fails.
    """
    done = subprocess.run([sys.executable, "tests/soak.py", "--runs", "20", "--kills", "3", "--store", str(tiny.store_dir)],
                          cwd=REPO, capture_output=True, text=True)
    assert done.stdout, done.stderr[-3000:]
    counts = json.loads(done.stdout.splitlines()[-1])
    print(counts)
    assert counts["kills"] >= 60 and counts["runs"] >= 20
    assert counts["differing_files"] == [], done.stderr[-3000:]
    assert counts["unloadable_resumes"] == 0, done.stderr[-3000:]
    assert counts["restarts_from_step_0_although_saved"] == 0 and counts["left_behind"] == []
    assert sum(n > 0 for n in counts["kills_by_phase"].values()) >= 4


@pytest.mark.parametrize("instant", ["before the last rename", "between the two renames", "while deleting"])
def test_a_save_cut_between_two_calls_loses_nothing(tmp_path, monkeypatch, instant):
    """The only checkpoint is saved again at its own step (an evaluation, then a stop) and the
    process dies inside."""
    tensors = {"model": {"w": torch.ones(3)}, "optimizer": {"w.step": torch.zeros(())}}
    su.save_checkpoint(tmp_path, 8, tensors, {"evaluated": False})

    class Killed(BaseException):
        pass

    rename, calls = os.rename, []

    def dying_rename(a, b):
        calls.append(1)
        if len(calls) == {"before the last rename": 1, "between the two renames": 2}.get(instant):
            raise Killed
        rename(a, b)

    def dying_rmtree(path, *args, **kwargs):
        for name in os.listdir(path)[:2]:
            os.unlink(Path(path) / name)
        raise Killed
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", dying_rename)
        if instant == "while deleting":
            patch.setattr(shutil, "rmtree", dying_rmtree)
        with pytest.raises(Killed):
            su.save_checkpoint(tmp_path, 8, tensors, {"evaluated": True})
    said = []
    found, state = su.load_checkpoint(tmp_path, said.append)
    assert found["model"]["w"].tolist() == [1, 1, 1] and not said
    assert state["evaluated"] == (instant != "before the last rename")
    su.save_checkpoint(tmp_path, 16, tensors, {})
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {
        "step-00000008",
        "step-00000016"}


def test_the_crash_of_one_of_two_processes_restarts_both_from_the_checkpoint(tiny, tmp_path, monkeypatch):
    """kill -9 of one worker: `launch` starts both again, once, and the weights are those of two
    that were left alone.

    Process 1 kills itself where it would read batch 6, so that it is dead there however fast the
    machine is. The restarted process 1 is late: process 0 must wait for its new address, not
    connect to the dead one's.
    """
    (tmp_path / "sitecustomize.py").write_text("""
import os, signal, time
attempt, killed = os.environ.get("TORCHELASTIC_RESTART_COUNT"), os.environ.get("KILLED")
if killed and attempt == "0" and os.environ["RANK"] == "1":
    import stentor.engine
    import stentor.secrets
    import stentor.tokens
    batch = stentor.tokens.TokenStore.batch
    def last_batch(self, step):
        if step == 6:
            os.close(os.open(killed, os.O_CREAT | os.O_EXCL))
            os.kill(os.getpid(), signal.SIGKILL)
        return batch(self, step)
    stentor.tokens.TokenStore.batch = last_batch
if attempt == "1" and os.environ["RANK"] == "1":
    time.sleep(4)
""")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(REPO)]))
    recipe = dataclasses.replace(
        tiny.recipe, token_budget=16 * 8 * 64, eval_steps=4, best_eval_steps=4, logging_steps=1)
    for name in ("alone", "killed"):
        log = []
        summary = su.launch(recipe, tiny.store_dir, tiny.tokenizer_dir, tmp_path / name, num_processes=2, say=log.append)
        monkeypatch.setenv("KILLED", str(tmp_path / "mark"))
    assert (tmp_path / "mark").exists() and summary["processes"] == 2
    went_on = [line for line in log
               if "going on from step 4 of 16" in line or "going on from step 6" in line]
    assert len(went_on) == 1, log[-20:]
    assert weights(tmp_path / "alone") == weights(tmp_path / "killed")


# --- damage


def test_every_file_of_a_checkpoint_damaged_in_every_way_is_noticed(tiny, micro, tmp_path):
    """5 files x {cut at 0, 50, 99%, one bit flipped at 20 places, deleted}; then a run goes on
    past a bad one, same weights."""
    train(tiny, micro, tmp_path / "a")
    newest = su.checkpoint_folders(tmp_path / "a")[-1]
    files = {path.name: path.read_bytes() for path in newest.iterdir()}
    assert len(files) == 5, files.keys()
    tried, draw, hashed = 0, random.Random(0), ("model", "optimizer", "ema", "state")
    for name, data in files.items():
        damaged = [data[:0], data[:len(data) // 2], data[:max(len(data) * 99 // 100, 1)], None]
        for at in [0, 7, len(data) - 1, *(draw.randrange(len(data)) for _ in range(17))]:
            damaged.append(data[:at] + bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1:])
        for bad in damaged:
            (newest / name).unlink()
            if bad is not None:
                (newest / name).write_bytes(bad)
            problem = su.verify_checkpoint(newest)
            if name == "manifest.json" and bad and not problem:      # a flip in its white space or in "bytes": all else holds
                old, new = json.loads(data), json.loads(bad)
                assert {n: e["sha256"] for n, e in old.items()} == {
                    n: e["sha256"] for n, e in new.items()}
            else:
                assert problem and "\n" not in problem, (name, bad)
            tried += 1
            (newest / name).write_bytes(data)
    print(f"{tried} damages over {len(files)} files")
    assert su.verify_checkpoint(newest) is None and all(f"{n}." in " ".join(files) for n in hashed)
    (newest / "ema.safetensors").write_bytes(files["ema.safetensors"][:-1])
    said, before = [], weights(tmp_path / "a")
    (tmp_path / "a" / "final").rename(tmp_path / "a" / "gone")
    train(tiny, micro, tmp_path / "a", say=said.append)
    assert weights(tmp_path / "a") == before
    assert [line for line in said if "set aside" in line] == [
        "checkpoint step-00000016 set aside: ema.safetensors does not match its hash"]


# --- disk full


def mounted(folder: Path, size: str):
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder],
        capture_output=True,
        text=True)
    if done.returncode:
        pytest.skip(f"a small tmpfs cannot be mounted here: {done.stderr.strip()}")


def test_a_full_disk_costs_checkpoints_and_not_the_run(tiny, tmp_path):
    """A 4 MB disk that something else fills up during training, and that is freed again before the
    end, or is not."""
    disk = tmp_path / "disk"
    mounted(disk, "4m")
    try:
        for freed in (True, False):
            run_dir, ballast, said = disk / f"run-{freed}", disk / "ballast", []

            def fill(step, batch):
                if step == 10:                        # steps 0 and 8 are saved
                    with open(ballast, "wb", buffering=0) as file:
                        try:
                            while file.write(b"x" * 4096):
                                pass
                        except OSError:
                            pass
                if step == 20 and freed:
                    ballast.unlink(missing_ok=True)
                return batch
            recipe, store = tiny.recipe, Wrapped(tiny, tiny.recipe, fill)
            best = run_dir / "best" / "model.safetensors"
            if freed:
                summary = train(
                    tiny, recipe, run_dir, store=store, tokenizer=tiny.tokenizer, say=said.append)
                assert summary["step"] == 24 and (run_dir / "final" / "model.safetensors").exists()
                rows = [
                    json.loads(line)
                    for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
                # none lost meanwhile
                assert [row["step"] for row in rows if row["kind"] == "eval"] == [0, 8, 16, 24]
                whole = weights(run_dir)
            else:
                with pytest.raises(su.TrainingFailed, match="has no room .*No space left"):
                    train(tiny, recipe, run_dir, store=store, tokenizer=tiny.tokenizer, say=said.append)
                assert not (run_dir / "final").exists() and best.exists()
                assert su.checkpoint_folders(run_dir)[-1].name == "step-00000008"
                ballast.unlink()
                train(tiny, recipe, run_dir, tokenizer=tiny.tokenizer, say=said.append,
                      store=Wrapped(tiny, recipe, lambda step, batch: batch))
                assert (
                    any("going on from step 8" in line for line in said)
                    and weights(run_dir) == whole)
            warned = [line for line in said if line.startswith("WARNING")]
            assert any("no checkpoint at step 16 (No space left on device); the last one, of step 8, is kept" in line
                       for line in warned) and any("best/ could not be written" in line for line in warned), said
            assert su.verify_checkpoint(su.checkpoint_folders(run_dir)[-1]) is None
            assert not [p for p in run_dir.rglob(".*") if p.name != ".lock"]
            subprocess.run(["rm", "-rf", run_dir, ballast], check=True)
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


# --- signals


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_in_a_step_in_the_wait_for_data_and_in_an_evaluation(tiny, micro, tmp_path, monkeypatch, number, code):
    """Nothing is lost, neither evaluation nor data is waited for, the lock and the handlers are
    given back."""
    train(tiny, micro, tmp_path / "alone", store=Wrapped(tiny, micro, lambda step, batch: batch))
    accumulate = stentor.engine.accumulate_gradients
    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    for phase, saved in (("step", 7), ("data", 6), ("evaluation", 4)):
        folder, reached, now = tmp_path / phase, [], []

        def in_the_step(*args):
            loss = accumulate(*args)
            if phase == "step" and now[-1] == 6 and not reached:
                reached.append(6)
                os.kill(os.getpid(), number)
            return loss
        monkeypatch.setattr(stentor.engine, "accumulate_gradients", in_the_step)

        class Store(Wrapped):
            def batch(self, step):
                now.append(step)
                if phase == "data" and step == 6 and not reached:
                    reached.append(step)
                    os.kill(os.getpid(), number)
                    time.sleep(0.01)
                    reached.append("the wait went on")
                return super().batch(step)

            def evaluate(self, model, engine):
                ids, size = self.validation()
                if phase == "evaluation" and len(su.checkpoint_folders(folder)) == 2 and not reached:
                    reached.append(1)
                    os.kill(os.getpid(), number)
                    time.sleep(0.01)
                    reached.append("the evaluation went on")
                return su.evaluate(model, ids, size, block_size=16, batch_size=4, engine=engine)
        stopped = pytest.raises(KeyboardInterrupt if code == 130 else SystemExit)
        with stopped as caught:
            train(tiny, micro, folder, store=Store(tiny, micro, lambda step, batch: batch))
        assert code == 130 or caught.value.code == 143
        assert len(reached) == 1, reached
        assert su.checkpoint_folders(folder)[-1].name == f"step-{saved:08d}"
        assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == handlers
        # the same kernel goes on
        train(tiny, micro, folder, store=Store(tiny, micro, lambda step, batch: batch))
        assert weights(folder) == weights(tmp_path / "alone")


def test_a_signal_that_c_code_makes_another_error_of_stops_all_the_same(tiny, micro, tmp_path):
    """np.fromfile asks its file name what it is, and made a SystemError of what a handler raised."""
    class Store(Wrapped):
        def batch(self, step):
            try:
                if step == 6:
                    os.kill(os.getpid(), signal.SIGTERM)
                    time.sleep(0.01)
            except BaseException as error:
                raise SystemError("returned a result with an exception set") from error
            return super().batch(step)
    with pytest.raises(SystemExit) as caught:
        train(tiny, micro, tmp_path / "run", store=Store(tiny, micro, lambda step, batch: batch))
    assert caught.value.code == 143
    assert su.checkpoint_folders(tmp_path / "run")[-1].name == "step-00000006"
    with pytest.raises(SystemError):                  # without a signal it is what it is
        def broken(step, batch):
            raise SystemError("of its own")
        train(tiny, micro, tmp_path / "broken", store=Wrapped(tiny, micro, broken))


def test_an_error_leaves_the_kernel_usable(tiny, micro, tmp_path):
    """An exception whose traceback is kept, as a notebook keeps it, does not keep the run's folder
    locked."""
    def broken(step, batch):
        raise RuntimeError("a batch could not be read")
    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(RuntimeError) as kept:
        train(tiny, micro, tmp_path, store=Wrapped(tiny, micro, broken))
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert train(tiny, micro, tmp_path)["step"] == 16 and kept.tb


def test_the_stop_button_in_data_preparation(tiny, tmp_path):
    """KeyboardInterrupt after the third shard and at 8 random instants, in one process that goes
    on each time: the stores are those of one call. Where one comes too late the store is whole,
    and the next one is drawn for another store."""
    def prepare(folder, **more):
        su.prepare_tokens([tiny.source], tiny.tokenizer, folder, tokens_per_source={"topics": 150_000},
                          validation_documents=4, shard_tokens=8_000, progress=quiet, **more)

    def press(shards):
        if shards == 3:
            os.kill(os.getpid(), signal.SIGINT)
    began = time.monotonic()
    prepare(tmp_path / "whole")
    took, draw = time.monotonic() - began, random.Random(1)
    stops, folders = 0, [tmp_path / "stopped-0"]
    with pytest.raises(KeyboardInterrupt):
        prepare(folders[0], after_shard=press)
    while stops < 8:
        timer = threading.Timer(draw.uniform(0, took), os.kill, (os.getpid(), signal.SIGINT))
        try:
            timer.start()
            prepare(folders[-1])
            folders.append(tmp_path / f"stopped-{len(folders)}")
            timer.cancel()
            # it may be striking just now: here, and not behind the `try`
            timer.join()
            time.sleep(0)
        except KeyboardInterrupt:
            stops += 1
        assert len(folders) < 100, f"{stops} stops in 100 stores"
    prepare(folders[-1])
    print(f"{stops} stops in {len(folders)} stores")
    for folder in folders:
        for path in (tmp_path / "whole").rglob("*.*"):
            assert path.read_bytes() == (folder / path.relative_to(tmp_path / "whole")).read_bytes()
        assert not list(folder.rglob(".*"))


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_exit_codes_before_the_loop(tiny, micro, tmp_path, number, code):
    """A signal while the process still builds its model: the documented exit code, nothing
    half-written."""
    run = {"recipe": micro.to_dict(), "store": str(tiny.store_dir),
           "tokenizer": str(tiny.tokenizer_dir)}
    (tmp_path / "run.json").write_text(json.dumps(run))
    script = ("import os, sys, stentor.commands, stentor.learner as loop\nbuild = loop.build_model\n"
              f"loop.build_model = lambda *a, **k: (os.kill(os.getpid(), {int(number)}), build(*a, **k))[1]\n"
              "sys.exit(stentor.commands.main(['train', sys.argv[1]]))")
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "run.json")],
        cwd=REPO,
        capture_output=True,
        text=True)
    assert done.returncode == code, done.stderr[-1000:]
    assert not (tmp_path / "checkpoints").exists()


# --- the deadline


def test_the_deadline_is_kept_with_saves_three_times_as_slow(tiny, micro, tmp_path, monkeypatch):
    """50 sessions of the real loop on a clock that only steps, saves and evaluations move; each
    ends in time, with its state.

    A step or evaluation takes up to the longest so far (a first one cannot be foreseen), a save
    three times the slowest.
    """
    from types import SimpleNamespace
    draw, now, longest = random.Random(0), [0.0], {}

    def spend(kind):
        ceiling = (
            {"step": 20, "evaluation": 300}.get(kind) if kind not in longest else longest[kind])
        if kind == "save":
            ceiling = 3 * longest.setdefault(kind, 1.0)
        seconds = draw.uniform(0.3, 1) * min(ceiling, 120 if kind == "save" else ceiling)
        longest[kind] = max(longest.get(kind, 0), seconds)
        now[0] += seconds

    class Store(Wrapped):
        def evaluate(self, model, engine):
            spend("evaluation")
            return {"loss": 5.0, "perplexity": 148.0, "bits_per_byte": 2.0, "tokens": 64}

    def batch(step, batch):
        spend("step")
        return batch
    save = su.save_checkpoint

    def slow_save(*args):
        spend("save")
        return save(*args)
    for module in (stentor.train, stentor.stopping):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(stentor.train, "save_checkpoint", slow_save)
    stops, trained, margins = 0, 0, []
    recipe = dataclasses.replace(micro, token_budget=32 * 4 * 16, save_every_minutes=4, logging_steps=100, eval_steps=16,
                                 best_eval_steps=16)
    for case in range(50):
        folder, hours = tmp_path / str(case), draw.uniform(300, 1500) / 3600
        began, said = now[0], []
        longest.clear()
        # the process's first step must be seen before it can be allowed for: the fit of the
        # micro-batch calls batch() once
        summary = train(tiny, recipe, folder, store=Store(tiny, recipe, batch), deadline_hours=hours, say=said.append)
        newest = su.checkpoint_folders(folder)[-1]
        assert json.loads((newest / "state.json").read_text())["step"] == summary["step"]
        if summary["stopped"]:
            stops += 1
            trained += summary["step"] > 0
            margins.append(hours * 3600 - (now[0] - began))
            assert margins[-1] >= 0, (case, margins[-1], longest)
            assert summary["stopped"] == "deadline" and not (folder / "final").exists()
            assert "Run the same again to go on." in said[-1]
    print(f"{stops} of 50 stopped, {trained} after training; seconds to spare: {min(margins):.0f} to {max(margins):.0f}")
    assert 25 <= stops < 50 and trained >= 20


# --- one owner


def test_the_lock_dies_with_its_process(tmp_path):
    (ready, say_ready), (end, held) = os.pipe(), os.pipe()
    pid = os.fork()
    if not pid:
        os.close(held)
        su.RunLock(tmp_path)
        # the first was collected and released: hold one for real
        lock = su.RunLock.__new__(su.RunLock)
        lock.__init__(tmp_path)
        os.write(say_ready, b"x")
        os.read(end, 1)                               # comes back only when the parent is gone
        os._exit(0)
    os.close(say_ready)
    try:
        assert os.read(ready, 1) == b"x"
        with pytest.raises(su.ParameterError, match=f"in use by process {pid} on"):
            su.RunLock(tmp_path)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        for pipe in (ready, end, held):
            os.close(pipe)
    su.RunLock(tmp_path).release()


# --- bad documents


def test_control_characters_and_a_50_mb_document(tiny, tmp_path):
    import tracemalloc
    controls = "".join(
        map(chr, [*range(32), 0x7F, *range(0x80, 0xA0), 0x200B, 0x202E, 0xFEFF, 0xFFFE, 0x1F600]))
    rows = ["good one", f"with {controls} inside", "x " * 25_000_000, "good two", "good three"]
    with open(tmp_path / "docs.jsonl", "w") as file:
        for text in rows:
            file.write(json.dumps({"text": text}) + "\n")
    tracemalloc.start()
    su.prepare_tokens(
        [su.Source("docs", str(tmp_path / "docs.jsonl"))],
        tiny.tokenizer,
        tmp_path / "store",
        tokens_per_source={"docs": 1000},
        validation_documents=1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    entry = json.loads((tmp_path / "store" / "manifest.json").read_text())["sources"]["docs"]
    assert entry["skipped"] == {"longer than 2,000,000 characters": 1} and entry["documents"] == 3
    ids = np.fromfile(tmp_path / "store" / entry["shards"][0]["file"], "<u2")
    first = ids[:ids.tolist().index(tiny.tokenizer.eos_token_id)]
    assert tiny.tokenizer.decode(first.tolist()) == su.clean_text(rows[1])
    print(f"peak {peak / 2**20:.0f} MiB for a document of 48 MiB")
    assert peak < 4 * 50e6


# --- runs that come apart


def poison(monkeypatch, bad_steps: dict):
    """at(step, batch) for Wrapped: in `bad_steps` {step: factor} the gradient of that batch is
    multiplied by the factor."""
    now, build = [None], su.build_model

    def build_poisoned(*args, **kwargs):
        model = build(*args, **kwargs)
        model.model.norm.weight.register_hook(lambda grad: grad * bad_steps.get(now[0], 1.0))
        return model
    monkeypatch.setattr(stentor.learner, "build_model", build_poisoned)

    def at(step, batch):
        now[0] = step
        return batch
    return at


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_twenty_nonfinite_gradients_leave_the_weights_finite(tiny, micro, tmp_path, monkeypatch):
    recipe, draw = dataclasses.replace(micro, token_budget=64 * 4 * 16), random.Random(3)
    bad = {
        step: draw.choice([float("nan"), float("inf"), -float("inf")])
        for step in draw.sample(range(64), 20)}
    summary = train(tiny, recipe, tmp_path, store=Wrapped(tiny, recipe, poison(monkeypatch, bad)))
    assert summary["skipped_steps"] == 20
    assert [row["batch"] for row in rows_of(tmp_path) if row["kind"] == "skipped"] == sorted(bad)
    for folder in su.checkpoint_folders(tmp_path):
        tensors, state = su.load_checkpoint(tmp_path)
        assert all(torch.isfinite(t).all() for group in tensors.values() for t in group.values())
    assert all(np.isfinite(row["loss"]) for row in rows_of(tmp_path) if "loss" in row)
    assert state["updates"] == 44 and state["rollbacks"] == []


@pytest.mark.parametrize("mixed_precision, times", [("no", (1, 3)), ("fp16", (2,))])
def test_ten_bad_steps_in_a_row_go_back_and_three_times_stop(tiny, micro, tmp_path, monkeypatch, mixed_precision, times):
    """Back to the last good evaluation, the batches since left out; a run that is stopped and
    resumed decides the same."""
    recipe = dataclasses.replace(micro, token_budget=64 * 4 * 16, mixed_precision=mixed_precision)
    for troubles in times:
        bad = {start + i: float("inf") for start in (9, 25, 41)[:troubles] for i in range(10)}
        outcomes = []
        for name, stops in (("alone", []), ("stopped", [5, 12, 18, 22, 30, 38])):
            folder, left = tmp_path / f"{troubles}-{name}", list(stops)

            with monkeypatch.context() as patch:
                poisoned = poison(patch, bad)

                def at(step, batch):
                    if left and step == left[0]:
                        left.pop(0)
                        os.kill(os.getpid(), signal.SIGINT)
                    return poisoned(step, batch)
                while True:
                    try:
                        train(tiny, recipe, folder, store=Wrapped(tiny, recipe, at))
                        break
                    except KeyboardInterrupt:
                        continue
                    except su.TrainingDiverged as error:
                        outcomes.append(str(error))
                        break
            assert not left
            tensors, state = su.load_checkpoint(folder)
            assert all(
                torch.isfinite(t).all() for group in tensors.values() for t in group.values())
            went_back = [
                (row["step"], row["good_step"])
                for row in rows_of(folder)
                if row["kind"] == "rollback"]
            assert went_back == [(19, 8), (35, 24)][:troubles]
            norm = tensors["model"]["model.norm.weight"].tolist()
            outcomes.append((state["rollbacks"], norm, state["updates"]))
        if troubles < 3:
            assert outcomes[0] == outcomes[1]
            alone, stopped = (tmp_path / f"{troubles}-{how}" for how in ("alone", "stopped"))
            assert weights(alone) == weights(stopped)
            assert outcomes[0][2] == 64 - sum(end - start for start, end, _ in outcomes[0][0])
        else:
            assert outcomes[0] == outcomes[2]
            assert "came apart at step 51: the gradients of 10 steps in a row" in outcomes[0]
            assert "back from step 19 to 8" in outcomes[0] and "learning_rate" in outcomes[0]
            assert not (tmp_path / "3-alone" / "final").exists()


def test_a_loss_spike_goes_back_and_on(tiny, tmp_path):
    """In batches 24 to 27 the labels are one token never seen: the logged loss leaps, and those
    batches leave no trace."""
    recipe = dataclasses.replace(tiny.recipe, token_budget=36 * 8 * 64, logging_steps=2)
    rare, stops, same, folder = tiny.recipe.shape.vocab_size - 1, [], [], None

    def at(step, batch):
        if stops and step == stops[0]:
            stops.pop(0)
            os.kill(os.getpid(), signal.SIGINT)
        if step in (26, 28):                          # saved right after going back: the weights of step 24
            good, now = (
                (folder / "checkpoints" / f"step-{n:08d}" / "model.safetensors").read_bytes()
                for n in (24, step))
            same.append(good == now)
        return (
            {**batch, "labels": torch.full_like(batch["labels"], rare)}
            if 24 <= step < 28
            else batch)
    for name, at_steps in (("alone", []), ("stopped", [24, 27])):
        stops[:], folder = at_steps, tmp_path / name
        while True:
            try:
                train(tiny, recipe, tmp_path / name, store=Wrapped(tiny, recipe, at))
                break
            except KeyboardInterrupt:
                continue
        back = [row for row in rows_of(tmp_path / name) if row["kind"] == "rollback"]
        assert [(row["step"], row["good_step"]) for row in back] == [(26, 24), (28, 24)]
        assert all(row["reason"].startswith("the loss rose to ") for row in back)
    losses = [row["loss"] for row in rows_of(tmp_path / "alone") if row["kind"] == "eval"]
    assert losses == sorted(losses, reverse=True) and not stops and all(same) and len(same) == 4, (
        same)
    assert weights(tmp_path / "alone") == weights(tmp_path / "stopped")


# --- a checkpoint of something else


@pytest.mark.parametrize("what", ["shape", "store", "tokenizer", "base model"])
def test_what_does_not_belong_to_a_checkpoint_is_refused_before_the_first_step(tiny, micro, tmp_path, what):
    base = su.build_model(micro.shape, seed=1)
    given = {"model": base} if what == "base model" else {}
    train(tiny, micro, tmp_path / "run", **given)
    recipe, store, words = micro, None, None
    if what == "shape":
        recipe = dataclasses.replace(
            micro, shape=dataclasses.replace(micro.shape, intermediate_size=16))
        words = ("shape is", '"intermediate_size": 8', '"intermediate_size": 16')
    if what == "store":
        su.prepare_tokens([tiny.source], tiny.tokenizer, tmp_path / "other", tokens_per_source={"topics": 30_000},
                          validation_documents=4, shard_tokens=9_000)
        store, words = (
            su.TokenStore(tmp_path / "other", micro),
            ("store is", "in the checkpoint", "in this run"))
    if what == "base model":
        given, words = (
            {"model": su.build_model(micro.shape, seed=2)},
            ("start_weights is", "in the checkpoint", "in this run"))
    if what == "tokenizer":
        import tokenmonster_hf as tm
        other = tm.TokenMonsterTokenizer.from_vocabulary(
            tm.Vocabulary.from_tokens([b" the"], capcode=0, include="all256"))
        shas = [su.tokenizer_sha256(one)[:12] for one in (tiny.tokenizer, other)]
        given, words = {"tokenizer": other}, ("made by the tokenizer", *shas)
    said = []
    with pytest.raises((su.CheckpointError, su.ParameterError)) as caught:
        train(tiny, recipe, tmp_path / "run", store=store, say=said.append, **given)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert not [line for line in said if line.startswith("step")]


# --- parameters


def test_200_bad_configurations_are_listed_whole():
    """1 to 6 fields out of range, of the wrong type, or misspelt: every one is named, and nothing
    is built for it."""
    draw, nan = random.Random(0), float("nan")
    counts = ("per_device_train_batch_size", "gradient_accumulation_steps", "num_processes", "token_budget", "eval_steps",
              "best_eval_steps", "max_eval_samples", "save_total_limit", "logging_steps", "block_size", "hidden_size",
              "num_hidden_layers", "num_attention_heads", "vocab_size", "max_position_embeddings", "intermediate_size")
    bad = {**{name: [0, -1, 2.5, nan, "8", None, True] for name in counts},
           **{name: [0, -1e-9, nan, float("inf"), "1e-3", None] for name in ("learning_rate", "max_grad_norm", "rope_theta",
                                                                             "adam_epsilon", "rms_norm_eps")},
           **{name: [-0.01, 1.01, nan, "half"] for name in ("warmup_ratio", "stable_ratio", "adam_beta1", "adam_beta2",
                                                                 "muon_momentum")},
           **{name: ["yes", 1, None] for name in ("int8_qat", "fp32_norms", "tie_word_embeddings", "qk_norm",
                                                     "gradient_checkpointing")},
           **{name: ["adam", 3, None] for name in ("lr_scheduler_type", "mixed_precision", "initialization", "budget_check")},
           "weight_decay": [-1, 11, nan], "seed": [-1, 1.5, 2**40, None], "max_train_steps": [0, -3, "all"],
           "matrix_learning_rate": [0, -1, nan, "x"], "optimizer": ["adamw", 1],
           "ema_decay": [1, -1], "fp32_critical_first": [-1, 1.5], "best_eval_start_step": [-1, 0.5],
           "source_token_budget": [0, 1.5], "learning_rte": [1], "blocksize": [1]}
    began = time.process_time()
    for _ in range(200):
        overrides = {
            name: draw.choice(bad[name]) for name in draw.sample(sorted(bad), draw.randint(1, 6))}
        with pytest.raises(su.ParameterError) as caught:
            su.find_recipe(
                draw.choice(sorted(su.ALL_RECIPES)), draw.choice(["t4", "cpu"]), overrides)
        for name in overrides:
            assert any(name in problem for problem in caught.value.problems), (
                name,
                overrides,
                caught.value.problems)
        assert all(len(problem) < 300 and "\n" not in problem for problem in caught.value.problems)
    with pytest.raises(su.ParameterError, match="fp32_critical_first = 13 must be at most 12"):
        su.find_recipe("stentor2-12m", "t4", {"fp32_critical_first": 13})
    assert time.process_time() - began < 30           # of the CPU; 0.1 s where it is idle


# --- crafted checkpoints and model folders


class Payload:
    """Unpickled, it creates the file `mark`: then something has been executed."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


@pytest.fixture(scope="module")
def finished(tiny, micro, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    train(tiny, micro, folder, tokenizer=tiny.tokenizer)
    return folder


def header(content: bytes, length: int | None = None) -> bytes:
    return (len(content) if length is None else length).to_bytes(8, "little") + content


MODEL_ATTACKS = {
    "a pickle named model.safetensors": lambda f, evil: (f / "model.safetensors").write_bytes(evil),
    "a torch file named model.safetensors": lambda f, evil: torch.save({"x": torch.ones(1)}, f / "model.safetensors"),
    "pytorch_model.bin instead of safetensors": lambda f, evil: (
        (f / "model.safetensors").unlink(), (f / "pytorch_model.bin").write_bytes(evil)),
    "an index of pickled shards": lambda f, evil: (
        (f / "model.safetensors").unlink(), (f / "x.bin").write_bytes(evil),
        (f / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {"w": "x.bin"}}))),
    "an index that leaves the folder": lambda f, evil: (
        (f / "model.safetensors").rename(f.parent / "outside.safetensors"),
        (f / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {
            "w": "../outside.safetensors"}}))),
    "an absolute path in the index": lambda f, evil: (f / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": {"w": "/etc/passwd"}})),
    "auto_map to code in the folder": lambda f, evil: (
        (f / "evil.py").write_text(f"import os\nos.system('touch {f.parent / 'executed'}')\nclass M: pass\n"),
        change(f / "config.json", auto_map={"AutoModelForCausalLM": "evil.M", "AutoConfig": "evil.M"})),
    "an unknown model with auto_map": lambda f, evil: (
        (f / "evil.py").write_text(f"import os\nos.system('touch {f.parent / 'executed'}')\nclass M: pass\n"),
        change(f / "config.json", model_type="evil", auto_map={"AutoConfig": "evil.M", "AutoModelForCausalLM": "evil.M"})),
    "an unknown model without": lambda f, evil: change(f / "config.json", model_type="evil"),
    "a header of 2**60 bytes": lambda f, evil: (f / "model.safetensors").write_bytes(header(b"{}", 2**60)),
    "a tensor beyond the file": lambda f, evil: (f / "model.safetensors").write_bytes(
        header(json.dumps({"w": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode())),
    "a config nested 100,000 deep": lambda f, evil: (f / "config.json").write_text("[" * 100_000),
    "an adapter for another model": lambda f, evil: (f / "adapter_config.json").write_text(json.dumps({
        "peft_type": "LORA", "base_model_name_or_path": "/etc"})),
    "nothing in it": lambda f, evil: [path.unlink() for path in f.iterdir() if path.is_file()],
}


def change(path: Path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("attack", MODEL_ATTACKS)
def test_a_crafted_model_folder_is_refused(finished, tmp_path, attack, capfd):
    import shutil
    folder, mark = tmp_path / "model", tmp_path / "executed"
    shutil.copytree(finished / "final", folder)
    MODEL_ATTACKS[attack](folder, pickle.dumps(Payload(mark), 2))
    began = time.process_time()
    with pytest.raises(su.ParameterError) as caught:
        su.load_model(folder)
    assert not mark.exists(), "the payload was executed"
    assert (
        str(folder) in str(caught.value)
        and len(caught.value.problems) == 1
        and len(str(caught.value)) < 500)
    # of the CPU, not of the clock: a second where nothing is wrong
    assert time.process_time() - began < 60


def test_the_payload_is_a_real_one_and_a_sound_folder_loads(finished, tmp_path):
    """What the attacks carry does execute where it is unpickled; beside sound weights it is not
    even opened."""
    import shutil
    mark = tmp_path / "executed"
    pickle.loads(pickle.dumps(Payload(mark), 2))
    assert mark.exists()
    mark.unlink()
    shutil.copytree(finished / "final", tmp_path / "model")
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(mark), 2))
    su.load_model(tmp_path / "model")
    assert not mark.exists()


@pytest.mark.parametrize("attack", ["code in auto_map", "template", "pickled vocabulary"])
def test_a_crafted_tokenizer_folder_executes_nothing(tiny, tmp_path, attack):
    import shutil
    folder, mark = tmp_path / "tokenizer", tmp_path / "executed"
    shutil.copytree(tiny.tokenizer_dir, folder)
    evil = f"import os\nos.system('touch {mark}')\n"
    if attack == "code in auto_map":                  # the folder's own copy of our file replaced
        (folder / "tokenmonster_hf.py").write_text(evil)
        (folder / "evil.py").write_text(evil + "class T: pass\n")
        change(
            folder / "tokenizer_config.json",
            auto_map={"AutoTokenizer": ["evil.T", None]},
            tokenizer_class="T")
        assert len(su.load_tokenizer(folder)) == len(tiny.tokenizer)
        # no longer ours: transformers' own classes or nothing
        (folder / "tokenmonster.vocab").unlink()
        with pytest.raises(Exception):
            su.load_tokenizer(folder)
    elif attack == "template":
        tokenizer = su.load_tokenizer(folder)
        tokenizer.chat_template = (
            "{{ ''.__class__.__mro__[1].__subclasses__() }}"
            "{{ cycler.__init__.__globals__.os.system('touch " + str(mark) + "') }}")
        with pytest.raises(Exception, match="(?i)unsafe|undefined|access"):
            tokenizer.apply_chat_template([{"role": "user", "content": "x"}])
    else:
        (folder / "tokenmonster.vocab").write_bytes(pickle.dumps(Payload(mark), 2))
        assert su.tokenizer_problem(folder).startswith("is damaged")
    assert not mark.exists()


CHECKPOINT_ATTACKS = {
    "a pickle named model.safetensors": lambda f, evil: {"model.safetensors": evil},
    "a pickle named state.json": lambda f, evil: {"state.json": evil},
    "a manifest that reads another folder": lambda f, evil: {"../../../secret.safetensors": b"x"},
    "an absolute path": lambda f, evil: {"/etc/passwd": b"x"},
    "a file nobody asked for": lambda f, evil: {"evil.pkl": evil},
    "a header of 2**60 bytes": lambda f, evil: {"optimizer.safetensors": header(b"{}", 2**60)},
    "a state nested 100,000 deep": lambda f, evil: {"state.json": b"[" * 100_000},
    "a list for a state": lambda f, evil: {"state.json": b"[]"},
    "a symlink": lambda f, evil: (f / "ema.safetensors").rename(f.parent / "moved") and (
        f / "ema.safetensors").symlink_to(f.parent / "moved") or {},
    "no hash": lambda f, evil: {"manifest.json": b'{"model.safetensors": {}, "optimizer.safetensors": 3, "state.json": null}'},
}


@pytest.mark.parametrize("attack", CHECKPOINT_ATTACKS)
def test_a_crafted_checkpoint_with_matching_hashes_is_refused(finished, tmp_path, attack):
    import hashlib
    import shutil
    mark = tmp_path / "executed"
    shutil.copytree(finished, tmp_path / "run")
    for folder in su.checkpoint_folders(tmp_path / "run"):
        files = CHECKPOINT_ATTACKS[attack](folder, pickle.dumps(Payload(mark), 2))
        manifest = json.loads((folder / "manifest.json").read_text())
        for name, data in files.items():
            if "/" not in name:
                (folder / name).write_bytes(data)
            if name != "manifest.json":
                manifest[name] = {
                    "sha256": hashlib.sha256(
                        Path(folder / name).read_bytes() if Path(folder / name).exists() else data
                    ).hexdigest()}
                (folder / "manifest.json").write_text(json.dumps(manifest))
    said = []
    with pytest.raises(su.CheckpointError, match="no checkpoint under"):
        su.load_checkpoint(tmp_path / "run", said.append)
    assert len(said) == 2 and all("set aside" in line and len(line) < 400 for line in said), said
    assert not mark.exists()


def test_a_checkpoint_of_another_model_with_the_right_fingerprint(tiny, micro, finished, tmp_path):
    import shutil
    shutil.copytree(finished, tmp_path / "run")
    _, state = su.load_checkpoint(finished)
    for tensors in ({"model": {"model.norm.weight": torch.ones(3)}, "optimizer": {}},
                    {"model": {}, "optimizer": {}},
                    {"model": su.load_checkpoint(finished)[0]["model"], "optimizer": {"evil.exp_avg": torch.ones(1)}}):
        su.save_checkpoint(tmp_path / "run", 16, tensors, state)
        with pytest.raises(su.CheckpointError, match="does not fit the model"):
            train(tiny, micro, tmp_path / "run", tokenizer=tiny.tokenizer)
    su.save_checkpoint(tmp_path / "run", 16, tensors, {"step": 3})
    with pytest.raises(su.CheckpointError, match="checkpoints of another run"):
        train(tiny, micro, tmp_path / "run")


def test_nothing_in_the_suite_loads_pickles_or_foreign_code():
    assert lint.problems(REPO) == []
    for planted, found in (("import pickle", "imports pickle"), ("from joblib import load", "imports joblib"),
                           ("x = torch.load('a')", "torch.load"), ("np.load('a', allow_pickle=True)", "allow_pickle"),
                           ("AutoModelForCausalLM.from_pretrained(x, trust_remote_code=True)", "trust_remote_code"),
                           ("f(trust_remote_code=flag)", "trust_remote_code"), ("eval(text)", "eval")):
        assert any(found in problem for problem in lint.unsafe(planted, "x")), planted
    token = "hf_" + "aB3" * 9                         # made up, and here in two halves
    assert lint.secret_kinds(f"token = '{token}'") and not lint.secret_kinds(
        "hf_hub_download_and_something_long")


# --- secrets


CANARY = "Canary7Canary7Canary7Canary7"
HF = "hf_" + CANARY
PLACES = {"an error in a list": lambda: str(su.ParameterError([f"no such token {HF}"])),
          "the rendering of that error": lambda: "".join(su.ParameterError([HF])._render_traceback_()),
          "a URL with a password": lambda: stentor.secrets.redact(f"GET https://me:{CANARY}@host/x failed"),
          "a signed URL": lambda: stentor.secrets.redact(f"https://cdn/x?Signature={CANARY}&Expires=1"),
          "a header": lambda: stentor.secrets.redact(f"{{'authorization': 'Bearer {CANARY}'}}"),
          "the value of HF_TOKEN": lambda: stentor.secrets.redact(f"token {os.environ['HF_TOKEN']} is invalid"),
          "the value of KAGGLE_KEY": lambda: stentor.secrets.redact(f"key={os.environ['KAGGLE_KEY']}"),
          "a file of the environment": lambda: json.dumps(su.environment()),
          "a recipe's source": lambda: "\n".join(dataclasses.replace(su.RECIPES["stentor-12m"], sources=(
              su.Source("x", f"https://u:{CANARY}@h/d"),)).problems()),
          "a notebook's parameter": lambda: refused(lambda: su.check_notebook_parameters({"OUTPUTS": HF}, {"OUTPUTS": str})),
          "a parameter that is wrong": lambda: refused(lambda: su.check_notebook_parameters({"A": HF}, {"A": int, "B": int})),
          "an unknown vocabulary": lambda: refused(lambda: su.find_vocabulary(f"https://u:{CANARY}@host/x.vocab")),
          "a source that is not there": lambda: refused(lambda: list(su.documents(su.Source("x", f"/no/{HF}"))))}


def refused(call) -> str:
    with pytest.raises(su.ParameterError) as caught:
        call()
    return str(caught.value)


@pytest.mark.parametrize("place", PLACES)
def test_a_secret_is_not_repeated(place, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", CANARY)
    monkeypatch.setenv("KAGGLE_KEY", CANARY[::-1])
    text = PLACES[place]()
    assert text and CANARY not in text and CANARY[::-1] not in text, text
    if not place.startswith("a file"):
        assert "secret" in text, text


def test_no_secret_in_anything_a_run_writes(tiny, micro, tmp_path, monkeypatch, capfd):
    """Canaries in the environment, a parameter, a URL and an exception of the training process;
    all that is written is read."""
    names = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "KAGGLE_KEY", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "GH_TOKEN")
    canaries = {name: f"{name}-{CANARY}" for name in names} | {"parameter": HF}
    for name in names:
        monkeypatch.setenv(name, canaries[name])
    monkeypatch.setattr(stentor.tokens, "print", print, raising=False)
    log = []
    outputs = tmp_path / "outputs"
    # 1. a run that ends well
    su.launch(micro, tiny.store_dir, tiny.tokenizer_dir, outputs / "run", say=log.append)
    # 2. an exception in the training process that holds two of them
    broken = tmp_path / "broken"
    broken.mkdir()
    manifest = json.loads((tiny.store_dir / "manifest.json").read_text())
    manifest["sources"]["topics"]["shards"][0]["file"] = (
        f"https://u:{HF}@host/{canaries['KAGGLE_KEY']}")
    (broken / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(su.TrainingFailed) as failed:
        su.launch(micro, broken, tiny.tokenizer_dir, outputs / "failed", say=log.append)
    assert "FileNotFoundError" in str(failed.value) and "[secret]" in str(failed.value)
    # 3. parameters that would be kept in clear are refused before anything is written, by launch
    # and by the runner
    with pytest.raises(su.ParameterError, match="tokenizer_dir holds what looks like a secret"):
        su.launch(micro, tiny.store_dir, f"https://u:{HF}@host/tokenizer", outputs / "refused", say=log.append)
    done = subprocess.run([sys.executable, "-m", "stentor_utils", "run", "02_pretrain_t4", "-p", f"TOKENIZER=https://u:{HF}@host/t",
                           f"OUTPUTS={outputs}", "RUN=nb"], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 2 and "TOKENIZER holds what looks like a secret" in done.stderr
    shown = "\n".join([*log, str(failed.value), done.stdout, done.stderr, *capfd.readouterr()])
    files = [path for path in outputs.rglob("*") if path.is_file()]
    assert len(files) > 10
    for place, text in [("shown", shown), *((path, path.read_bytes().decode("latin-1")) for path in files)]:
        for name, canary in canaries.items():
            assert canary not in text, f"{name} is in {place}"


# --- resuming


def test_resuming_reads_nothing_of_what_went_before(tiny, micro, tmp_path):
    """At 10, 50 and 90% of a run: before the second step is begun, the batch of the first has been
    read and no other."""
    for percent in (10, 50, 90):
        recipe = dataclasses.replace(
            micro, token_budget=100 * 4 * 16, eval_steps=1000, best_eval_steps=1000)
        with pytest.raises(KeyboardInterrupt):
            train(tiny, recipe, tmp_path / str(percent), store=Wrapped(tiny, recipe, lambda step, batch: (
                os.kill(os.getpid(), signal.SIGINT) if step == percent else None, batch)[1]))
        read = []

        def at(step, batch):
            read.append(step)
            if len(read) == 3:                        # the probe of the micro-batch, the first step, the second
                os.kill(os.getpid(), signal.SIGINT)
            return batch
        with pytest.raises(KeyboardInterrupt):
            train(tiny, recipe, tmp_path / str(percent), store=Wrapped(tiny, recipe, at))
        assert read == [percent, percent, percent + 1], read
