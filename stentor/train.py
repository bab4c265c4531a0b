"""The one training loop, of every device and phase: `Run.train` is its table of contents."""
from __future__ import annotations

import contextlib
import errno
import json
import math
import signal
import time
from pathlib import Path

import numpy as np
import torch

from stentor.checkpoints import (
    another_run, checkpoint_folders, checkpoint_tensors, fingerprint_differences, load_checkpoint,
    restore, run_fingerprint, save_checkpoint, weights_sha256)
from stentor.engine import Engine, evaluate, find_engine
from stentor.files import (
    FeedStopped, ParameterError, RunLock, StentorError, TrainingFailed, duration,
    write_atomically)
from stentor.folders import load_model, save_model_folder
from stentor.metrics import Metrics
from stentor.model import build_model
from stentor.optimizers import update_ema, weights_swapped
from stentor.precision import apply_precision_recipe
from stentor.recipes import Recipe
from stentor.tokenizer import tokenizer_sha256

SPIKE = 2.0                # nats/token above its running mean at which a logged loss means that the run has come apart
NONFINITE_IN_A_ROW = 10    # steps: fp16's first scale, 65,536, is down to 64 by then
ROLLBACKS = 2              # of a run; the next trouble stops it


class TrainingDiverged(StentorError, RuntimeError):
    """The run came apart again after it had gone back to a good checkpoint; the message says where, and what to try."""


def train(recipe: Recipe, store, run_dir, *, tokenizer=None, model=None, deadline_hours: float | None = None, say=None,
          begin=lambda: None) -> dict:
    """Train, or go on with, the run in `run_dir`; the only training loop there is.

    store: anything with .batch(step) -> {"input_ids", "labels"} int64 (total_batch_size, length), .validation(), .mixture,
    .epoch, .manifest, .names (TokenStore); more keys of a batch, such as attention_mask, go to the model too. With
    .evaluate(model, engine) -> the keys of `evaluate` and whatever else is to be logged, that is used, and no .validation();
    with .tokens_per_step, that is what a step is counted as. model: one that is built already, used as it is instead of the
    recipe's shape and precision techniques; only what requires gradients is trained and kept in checkpoints, and its start
    weights are part of what a checkpoint must match. begin: called once the run is this process's and its checkpoint is found
    to be of this very run; what describes a run is written there, and not before. Writes checkpoints/, metrics.jsonl,
    training_curves.csv, best/, final/ and summary.json; returns what summary.json holds.
    SIGTERM and SIGINT finish the step (an evaluation, or a wait for data, is cut short), save, and raise SystemExit(143) or
    KeyboardInterrupt.
    Before `deadline_hours` after its start, early enough for what comes next and a save three times as slow as the slowest so
    far, the loop saves and returns with "stopped": "deadline" instead of final/; the same call goes on from there.
    NONFINITE_IN_A_ROW skipped steps, or a logged loss SPIKE above its running mean: back to the weights of the last evaluation
    that was not so, and on with the next batch; what decides is in the checkpoint, so a resumed run decides the same.
    Raises ParameterError for a folder in use, CheckpointError for a checkpoint of another run, TrainingDiverged at the third
    trouble, TrainingFailed when final/ finds no room (a checkpoint that finds none is only warned of).
    """
    run_dir = Path(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    engine = find_engine(recipe.mixed_precision, run_dir / "xla-cache")
    say = (say or (lambda text: print(text, flush=True))) if engine.rank == 0 else (lambda text: None)
    with RunLock(run_dir) if engine.rank == 0 else contextlib.nullcontext():
        try:
            return Run(engine, recipe, store, run_dir, tokenizer, model, deadline_hours, say, begin).train()
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise TrainingFailed(f"{run_dir} has no room ({error.strerror}); its last checkpoint is kept: free some space and "
                                 "run the same again.") from error


class LogWindow:
    """What the next line of the log is made of: counted since the last one.

    steps and skipped_before (skipped steps of the run until then) are in the checkpoint, so that a resumed log is the
    same; tokens, seconds and wait (seconds of them for data) are this session's.
    """

    def __init__(self, steps: int = 0, skipped_before: int = 0):
        self.reset(skipped_before)
        self.steps = steps

    def reset(self, skipped_before: int) -> None:
        self.steps, self.skipped_before = 0, skipped_before
        self.tokens, self.seconds, self.wait = 0.0, 0.0, 0.0


class Run:
    """One session of a training run: `train()` is the loop, its methods are the steps of it, `state` is what lasts."""

    def __init__(self, engine, recipe: Recipe, store, run_dir: Path, tokenizer, model, deadline_hours, say, begin):
        self.engine, self.recipe, self.store, self.run_dir = engine, recipe, store, run_dir
        self.tokenizer, self.deadline_hours, self.say = tokenizer, deadline_hours, say
        self.main = engine.rank == 0
        self.started = self.last_save = time.monotonic()
        self.stopped = None                           # why the loop was left before its end
        self.signals, self.can_be_cut = [], []        # filled by a signal and looked at between steps; raise at once if set
        self.slowest = {"save": 1.0, "evaluation": 0.0, "step": 0.0}      # seconds, in this session
        self.check()
        self.make_model(model)
        self.resume(begin)
        self.announce()
        # a batch of this run's shape shows what fits the memory
        first_batch = store.batch(min(self.state["step"], recipe.total_steps - 1))
        self.per_device = engine.micro_batch(self.parallel, first_batch, recipe.per_device_train_batch_size, say)

    def train(self) -> dict:
        """The loop. Save before evaluating: an evaluation that fails must not cost the training before it."""
        with self.noticing_signals():
            try:
                while True:
                    if self.evaluation_due():
                        self.save()
                        if self.must_stop(before="evaluation"):
                            break
                        self.evaluate()
                    if self.finished() or self.must_stop(before="step"):
                        break
                    done = self.one_step()
                    trouble = self.log(done)
                    if trouble:
                        self.go_back(trouble)
                    if trouble or self.save_due():
                        self.save()
            except CutShort:
                self.must_stop()
            self.save_the_end()
        return self.finish()

    # Before the first step

    def check(self) -> None:
        """What can be refused before anything is made."""
        recipe, problems = self.recipe, []
        made_for = self.store.manifest.get("fingerprint", {}).get("tokenizer_sha256")
        if self.tokenizer is not None and made_for and made_for != tokenizer_sha256(self.tokenizer):
            problems.append(f"the token store was made by the tokenizer {made_for[:12]}, given is "
                            f"{tokenizer_sha256(self.tokenizer)[:12]} (sha256); use the one it was made by.")
        ends = self.store.manifest.get("eos_token_id")
        if self.tokenizer is not None and ends is not None and ends != self.tokenizer.eos_token_id:
            problems.append(f"the documents of the token store end in the id {ends:,}, the tokenizer's EOS is "
                            f"{self.tokenizer.eos_token_id:,}; use the tokenizer it was made by.")
        if recipe.ema_decay and self.engine.static_shapes:
            problems.append(f"ema_decay = {recipe.ema_decay} is not for XLA: set it to None, or use a GPU or the CPU.")
        if recipe.torch_compile and self.engine.static_shapes:
            problems.append("torch_compile = True is not for XLA, which compiles by itself: set it to False.")
        if problems:
            raise ParameterError(problems)

    def make_model(self, model) -> None:
        """The model with its precision techniques, the optimiser, the average of the weights where one is kept."""
        recipe, engine, tokenizer = self.recipe, self.engine, self.tokenizer
        special = {}
        if tokenizer is not None:
            tokenizer.model_max_length = recipe.shape.max_position_embeddings    # saved with it; truncation goes by it
            special = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
        self.start_weights, self.precision = {}, {"notes": []}
        if model is not None:
            self.start_weights = {"start_weights": weights_sha256(model)}
        else:
            model = build_model(recipe.shape, recipe.seed, initialization=recipe.initialization,
                                attn_implementation=engine.attention(recipe.attn_implementation), **special)
            self.precision = apply_precision_recipe(
                model, fp32_norms=recipe.fp32_norms, fp32_critical_layers=recipe.fp32_critical_layers,
                fp32_softmax=recipe.fp32_softmax, int8_qat=recipe.int8_qat)
        if recipe.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        self.model = engine.place(model).train()
        self.optimizer = engine.optimizer(self.model, recipe, self.say)
        self.names = {parameter: name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        self.parameters = list(self.names)            # what is trained
        self.averages = [parameter.detach().clone() for parameter in self.parameters] if recipe.ema_decay else []
        self.parallel = engine.prepare(self.model, recipe.torch_compile)
        self.measure = self.make_measure()

    def make_measure(self):
        """measure(model, engine) -> the keys of `evaluate`: the store's own, or its validation tokens through `evaluate`."""
        recipe, measure = self.recipe, getattr(self.store, "evaluate", None)
        if measure is None:
            ids, text_bytes = self.store.validation()

            def measure(model, engine=None):
                return evaluate(model, ids, text_bytes, block_size=recipe.block_size,
                                batch_size=recipe.per_device_eval_batch_size, engine=engine)
        if recipe.torch_compile:                      # other shapes in another precision: not worth their compilation
            measure = torch.compiler.set_stance("force_eager")(measure)
        return measure

    def resume(self, begin) -> None:
        """Go on from the newest checkpoint of this run, or begin; `begin()` once it is sure to be of this run."""
        fingerprint = run_fingerprint(self.recipe, self.store) | self.start_weights
        if not self.main:
            self.engine.sum(0)                        # process 0 reads first: it sets bad checkpoints aside
        loaded = load_checkpoint(self.run_dir, self.say)
        if self.main:
            self.engine.sum(0)
        self.saved_step = None                        # of the newest checkpoint
        if loaded:
            tensors, self.state = loaded
            theirs = self.state.get("fingerprint") or {"fingerprint": None}
            if different := fingerprint_differences(theirs, fingerprint):
                raise another_run(self.run_dir, different)
            self.put_back(tensors)
            if self.state["scaler"]:
                self.engine.scaler.load_state_dict(self.state["scaler"])
            self.saved_step = self.state["step"]
            self.say(f"going on from step {self.state['step']:,} of {self.recipe.total_steps:,}")
        else:
            self.state = {
                "step": 0, "updates": 0, "skipped_steps": 0, "best_eval_loss": None, "best_step": None, "seconds": 0.0,
                "evaluated_step": -1, "metrics_lines": 0, "scaler": {}, "window": [0.0, 0, 0], "fingerprint": fingerprint,
                # for going back: the last evaluation that was good, skipped steps in a row, the loss's running mean
                "good_step": -1, "nonfinite": 0, "loss_level": None, "rollbacks": []}
        self.first_step = self.state["step"]
        self.window = LogWindow(*self.state["window"][1:])
        if self.main:
            begin()
        self.metrics = Metrics(self.run_dir, self.state["metrics_lines"], self.say) if self.main else None
        self.note_optimizer()
        self.engine.begin(self.recipe, self.state, self.say)

    def note_optimizer(self) -> None:
        """state["optimizers"]: each that made steps of this run; one may have stood in for another."""
        used = f"{type(self.optimizer).__module__.partition('.')[0]}.{type(self.optimizer).__name__}"
        done = self.state.setdefault("optimizers", [])
        if not self.finished() and used not in done:
            done.append(used)

    def put_back(self, tensors: dict) -> None:
        """Weights, optimiser and average of a checkpoint."""
        restore(self.model, self.optimizer, self.names, tensors)
        for name, average in zip(self.names.values(), self.averages):
            average.copy_(tensors["ema"][name])

    def announce(self) -> None:
        engine, recipe, precision = self.engine, self.recipe, self.precision
        everything = sum(parameter.numel() for parameter in self.model.parameters())
        part = f"{self.trainable:,} of " if self.start_weights else ""
        techniques = ", ".join(f"{key} {value}" for key, value in precision.items() if key != "notes")
        self.say(f"{part}{everything:,} parameters on {engine.device} x {engine.world_size}, "
                 f"{engine.mixed_precision if engine.autocast_dtype else 'fp32'}; {recipe.total_steps:,} steps x "
                 f"{self.step_tokens:,.0f} tokens; {techniques}")
        for note in precision["notes"]:
            self.say(note)

    # What follows from the rest

    @property
    def trainable(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters)

    @property
    def step_tokens(self) -> float:
        return getattr(self.store, "tokens_per_step", self.recipe.tokens_per_step)

    def tokens_at(self, step: int) -> float:
        """Tokens trained on after `step` steps; the last step may hold fewer than the others."""
        return min(step * self.step_tokens, self.recipe.total_tokens)

    def elapsed(self) -> float:
        """Seconds of training in all sessions."""
        return self.state["seconds"] + time.monotonic() - self.started

    def until_deadline(self) -> float:
        """Seconds left of this session."""
        if not self.deadline_hours:
            return math.inf
        return self.deadline_hours * 3600 - (time.monotonic() - self.started)

    def finished(self) -> bool:
        return self.state["step"] >= self.recipe.total_steps

    def evaluation_due(self) -> bool:
        step, recipe = self.state["step"], self.recipe
        due = step % recipe.eval_steps == 0 or step % recipe.best_eval_steps == 0 or self.finished()
        return due and self.state["evaluated_step"] != step

    def save_due(self) -> bool:
        return time.monotonic() - self.last_save > 60 * self.recipe.save_every_minutes

    # Stopping

    @contextlib.contextmanager
    def noticing_signals(self):
        """Inside the block SIGTERM and SIGINT only leave a note; on every process: torchrun passes SIGTERM to all."""
        def on_signal(received, frame):
            self.signals.append(received)
            if self.can_be_cut:
                self.can_be_cut.clear()
                raise CutShort
        handlers = {kind: signal.signal(kind, on_signal) for kind in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for kind, handler in handlers.items():
                signal.signal(kind, handler)

    def must_stop(self, before: str | None = None) -> bool:
        """Whether to stop now, before a "step" or an "evaluation" that may be as slow as the slowest so far."""
        spare = self.until_deadline() - self.slowest.get(before, 0.0) - 3 * self.slowest["save"]
        self.stopped = self.stopped or stop_reason(self.engine, self.signals, spare)
        return bool(self.stopped)

    # One step, and the log of it

    def one_step(self) -> bool | None:
        """One optimiser step over the global batch; whether it was done (None: an engine that tells later).

        What a step draws at random is a function of (seed, step, rank).
        """
        self.lap, state, step = time.monotonic(), self.state, self.state["step"]
        try:
            with cut_short_by_a_signal(self.can_be_cut, self.engine):         # it may have to wait for the hub
                batch = self.engine.feed(self.store, step)
        except FeedStopped:                           # what was trained is kept; the same call goes on from there
            self.save()
            raise
        self.window.wait += time.monotonic() - self.lap
        torch.manual_seed((self.recipe.seed << 32) + step * 1024 + self.engine.rank)
        done = self.engine.step(self.parallel, self.optimizer, batch, self.per_device)
        if done and self.averages:
            update_ema(self.averages, self.parameters, self.recipe.ema_decay, self.engine.updates - 1)
        state["step"] = step + 1
        state["nonfinite"] = state["nonfinite"] + 1 if done is False else 0
        return done

    def log(self, done: bool | None) -> str | None:
        """Say and write down what the step gave; returns what is wrong with the run, if anything is."""
        step, engine, window = self.state["step"], self.engine, self.window
        in_a_row, trouble = self.state["nonfinite"], None
        if done is False:
            self.say(f"step {step:>6,} | gradient is not finite: step skipped"
                     + (f", loss scale {engine.loss_scale:,.0f}" if engine.scaler.is_enabled() else ""))
            if self.main:
                self.metrics.add(kind="skipped", step=step, batch=step - 1, loss_scale=engine.loss_scale)
        window.steps += 1
        window.tokens += self.tokens_at(step) - (step - 1) * self.step_tokens
        self.preflight()
        if step % self.recipe.logging_steps == 0 or self.finished():
            progress = engine.read()                  # waits for the device
            skipped = progress["skipped_steps"] - window.skipped_before
            if done is None:                          # XLA tells only now: as many in one window count as in a row
                in_a_row = skipped
            window.seconds += time.monotonic() - self.lap
            trouble = self.log_line(progress, trained=window.steps - skipped)
            engine.clear_window()
            window.reset(progress["skipped_steps"])
        else:
            window.seconds += time.monotonic() - self.lap
        self.slowest["step"] = max(self.slowest["step"], time.monotonic() - self.lap)
        if in_a_row >= NONFINITE_IN_A_ROW:
            return f"the gradients of {in_a_row} steps in a row were not finite"
        return trouble

    def log_line(self, progress: dict, trained: int) -> str | None:
        """The log's line of this window, in which `trained` steps were not skipped; what is wrong with its loss."""
        state, step, window, trouble = self.state, self.state["step"], self.window, None
        loss, rate = progress["window_loss"] / max(1, trained), window.tokens / window.seconds
        if trained:
            level = state["loss_level"]
            if level is not None and not loss <= level + SPIKE:
                trouble = f"the loss rose to {loss:.2f} from about {level:.2f}"
            else:
                state["loss_level"] = loss if level is None else 0.9 * level + 0.1 * loss
        if trained and self.main:
            self.metrics.add(
                kind="train", step=step, tokens=round(self.tokens_at(step)), epoch=self.store.epoch(step), loss=loss,
                learning_rate=progress["learning_rate"], grad_norm=progress["grad_norm"],
                loss_scale=progress["loss_scale"], skipped_steps=progress["skipped_steps"], tokens_per_second=rate,
                wait_seconds=window.wait, elapsed_seconds=self.elapsed(), mixture=self.store.mixture(step - 1),
                **self.engine.counters())
        left = (self.recipe.total_steps - step) * self.step_tokens / rate
        self.say(f"step {step:>6,}/{self.recipe.total_steps:,} | loss {loss:.4f} | lr {progress['learning_rate']:.2e} | "
                 f"{rate:,.0f} tokens/s | {duration(left)} left")
        return trouble

    def preflight(self) -> None:
        """After a few steps of a session: what a step takes, and whether the run fits the session."""
        steps = self.state["step"] - self.first_step
        if steps not in (2, 5):
            return
        self.engine.wait()
        if steps == 2:                                # what is compiled is compiled by now
            self.warm = time.monotonic()
            return
        a_step, until = (time.monotonic() - self.warm) / 3, self.until_deadline()
        left = (self.recipe.total_steps - self.state["step"]) * a_step
        self.say(f"preflight: {a_step:.2f} s a step, {self.engine.memory()}; about {duration(left)} to go")
        if self.deadline_hours:
            self.say(f"the session's deadline is in {duration(until)}: " + (
                "the run fits" if left < until else "the run will be saved then; run it again to go on"))

    # Evaluation

    def evaluate(self) -> None:
        """Measure the model (the average of its weights, where one is kept); the best so far goes to best/."""
        state, step, began = self.state, self.state["step"], time.monotonic()
        with weights_swapped(self.parameters, self.averages), cut_short_by_a_signal(self.can_be_cut, self.engine):
            result = self.measure(self.model, self.engine)
        self.slowest["evaluation"] = max(self.slowest["evaluation"], time.monotonic() - began)
        state["evaluated_step"] = step
        lowest = math.inf if state["best_eval_loss"] is None else state["best_eval_loss"]
        if result["loss"] < lowest + SPIKE and not state["nonfinite"]:
            state["good_step"] = step
        best = step >= self.recipe.best_eval_start_step and result["loss"] < lowest
        before = {key: state[key] for key in ("best_eval_loss", "best_step")}
        if best:
            state.update(best_eval_loss=result["loss"], best_step=step)
        if self.main:
            try:
                self.write_evaluation(result, best)
            except OSError as error:
                state.update(before)                  # best/ still holds what it held: the next better one is written again
                self.say(f"WARNING: best/ could not be written at step {step:,} ({error.strerror})")
        self.say(f"step {step:>6,} | eval loss {result['loss']:.4f} | perplexity {result['perplexity']:,.2f} | "
                 f"{result['bits_per_byte']:.4f} bits per byte" + (" | best so far" if best and step else ""))

    def write_evaluation(self, result: dict, best: bool) -> None:
        step = self.state["step"]
        more = {key: value for key, value in result.items() if key != "tokens"}
        self.metrics.add(kind="eval", step=step, tokens=round(self.tokens_at(step)), epoch=self.store.epoch(step),
                         best=best, elapsed_seconds=self.elapsed(), **more)
        self.metrics.write_curves(final_step=step if self.finished() else None)
        if best and step:
            self.save_model("best")

    def save_model(self, name: str) -> Path:
        """The model as a Hugging Face folder of the run."""
        with weights_swapped(self.parameters, self.averages):
            save_model_folder(self.engine.on_cpu(self.model), self.tokenizer, self.run_dir / name)
        return self.run_dir / name

    # Checkpoints, and going back to one

    def save(self) -> None:
        """A checkpoint; a full disk costs that, not the training."""
        began, progress, step = time.monotonic(), self.engine.read(), self.state["step"]
        self.state.update({key: progress[key] for key in ("updates", "skipped_steps")})
        if self.main:
            try:
                self.write_checkpoint(progress)
            except OSError as error:
                kept = "there is none yet" if self.saved_step is None else f"the last one, of step {self.saved_step:,}, is kept"
                self.say(f"WARNING: no checkpoint at step {step:,} ({error.strerror}); {kept}. Free some space under "
                         f"{self.run_dir}.")
        self.last_save = time.monotonic()
        self.slowest["save"] = max(self.slowest["save"], self.last_save - began)

    def write_checkpoint(self, progress: dict) -> None:
        tensors = checkpoint_tensors(self.model, self.optimizer, self.names)
        if self.averages:
            tensors["ema"] = {name: average.cpu() for name, average in zip(self.names.values(), self.averages)}
        self.metrics.complete()
        state = {**self.state, "scaler": self.engine.scaler.state_dict(), "metrics_lines": len(self.metrics.rows),
                 "window": [progress["window_loss"], self.window.steps, self.window.skipped_before],
                 "seconds": self.elapsed()}
        save_checkpoint(self.run_dir, state["step"], tensors, state, self.recipe.save_total_limit)
        self.saved_step = state["step"]
        if hasattr(self.store, "release"):            # of a store that is filled meanwhile: what no checkpoint needs any more
            self.store.release(int(checkpoint_folders(self.run_dir)[0].name[5:]))

    def go_back(self, why: str) -> None:
        """Weights and optimiser of the last good checkpoint; the batches since then are left out."""
        state, step, found = self.state, self.state["step"], None
        state["skipped_steps"] = self.engine.read()["skipped_steps"]
        if len(state["rollbacks"]) < ROLLBACKS:
            found = load_checkpoint(self.run_dir, self.say, newest=state["good_step"])
        if not found:
            before = "; ".join(f"back from step {b:,} to {a:,} because {reason}" for a, b, reason in state["rollbacks"])
            raise TrainingDiverged(
                f"training came apart at step {step:,}: {why} ({before or 'no good checkpoint yet'}); the learning rate was "
                f"{self.engine.read()['learning_rate']:.2e}. Lower learning_rate or lengthen warmup_ratio under another RUN, "
                "and look at the batches of these steps.")
        tensors, saved = found
        self.optimizer.state.clear()
        self.put_back(tensors)
        state["rollbacks"].append([saved["step"], step, why])
        state.update(updates=saved["updates"], loss_level=saved["loss_level"], nonfinite=0,
                     window=[0.0, 0, state["skipped_steps"]])
        self.window.reset(state["skipped_steps"])
        self.engine.begin(self.recipe, state, self.say)      # the loss scale stays where it has fallen to
        if self.main:
            self.metrics.add(kind="rollback", step=step, good_step=saved["step"], reason=why, elapsed_seconds=self.elapsed())
        self.say(f"step {step:>6,} | {why}: back to the weights of step {saved['step']:,}, the batches since then left out "
                 f"({len(state['rollbacks'])} of {ROLLBACKS})")

    # The end

    def save_the_end(self) -> None:
        if not self.stopped or self.saved_step != self.state["step"]:
            self.save()
        self.must_stop(before="evaluation")           # final/ can wait for the next session

    def finish(self) -> dict:
        """final/ if the run is done, summary.json; leaves as the signal that stopped it asks."""
        summary = self.summary()
        if self.main and not self.stopped:
            summary |= self.measure_final(self.save_model("final"))
        if self.main:
            write_atomically(self.run_dir / "summary.json", json.dumps(summary, indent=1))
        self.engine.close()
        if self.stopped:
            step = self.state["step"]
            self.say(f"stopped at step {step:,} of {self.recipe.total_steps:,} ({self.stopped}); "
                     + ("saved" if self.saved_step == step else f"last saved at step {self.saved_step}")
                     + ". Run the same again to go on.")
        if self.stopped == "SIGINT":
            raise KeyboardInterrupt
        if self.stopped == "SIGTERM":
            raise SystemExit(143)
        return summary

    def summary(self) -> dict:
        """What summary.json holds of every run, finished or not."""
        state, engine, recipe = self.state, self.engine, self.recipe
        counts = {"trainable_parameters": self.trainable} if self.start_weights else {}
        return {"recipe": recipe.name, "parameters": sum(p.numel() for p in self.model.parameters()), "step": state["step"],
                "steps": recipe.total_steps, "tokens": round(self.tokens_at(state["step"])),
                "skipped_steps": state["skipped_steps"], "best_eval_loss": state["best_eval_loss"],
                "best_step": state["best_step"], "seconds": self.elapsed(), "device": str(engine.device),
                "processes": engine.world_size, "precision": {"autocast": engine.mixed_precision, **self.precision},
                "stopped": self.stopped, "optimizer": ", then ".join(state["optimizers"]), **engine.counters(), **counts}

    def measure_final(self, folder: Path) -> dict:
        """What is reported is measured on what was saved, read back as anybody would."""
        engine = self.engine
        saved = engine.place(load_model(folder, attn_implementation=engine.attention("sdpa")))
        result = self.measure(saved, engine if engine.world_size == 1 else None)
        rates = [row["tokens_per_second"] for row in self.metrics.rows if row["kind"] == "train"]
        return {"eval_loss": result["loss"], "perplexity": result["perplexity"], "bits_per_byte": result["bits_per_byte"],
                "eval_tokens": result["tokens"], "tokens_per_second": float(np.median(rates)) if rates else None}


class CutShort(BaseException):
    """A signal came during an evaluation, or while the next batch was waited for."""


@contextlib.contextmanager
def cut_short_by_a_signal(can_be_cut: list, engine: Engine):
    """Inside the block a signal need not wait: no step is in flight. Several processes wait: they could not leave together."""
    can_be_cut += [True] * (engine.world_size == 1)
    yield
    can_be_cut.clear()


def stop_reason(engine: Engine, received: list, seconds_to_spare: float):
    """"SIGTERM", "SIGINT" or "deadline" when the loop is to save and stop now, else None; the same on every process."""
    code = int(received[0]) if received else -1 if seconds_to_spare < 0 else 0
    if engine.world_size > 1:
        code = int(engine.sum(code if engine.rank == 0 else 0)[0])
    return {0: None, -1: "deadline"}.get(code) or (signal.Signals(code).name if code > 0 else None)
