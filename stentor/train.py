"""The one training loop, of every device and phase: `Run.train` is its table of contents."""
from __future__ import annotations

import contextlib
import errno
import json
import math
import time
from pathlib import Path

import numpy as np
import torch

from stentor.checkpoints import (
    another_run, checkpoint_folders, fingerprint_differences, load_checkpoint, new_state,
    run_fingerprint, save_checkpoint)
from stentor.engine import find_engine, make_measure
from stentor.files import (
    FeedStopped, ParameterError, RunLock, StentorError, TrainingFailed, duration,
    write_atomically)
from stentor.folders import load_model
from stentor.learner import Learner
from stentor.metrics import LogWindow, Metrics
from stentor.recipes import Recipe
from stentor.shapes import head_dim_note
from stentor.stopping import CutShort, Stopping
from stentor.tokenizer import tokenizer_sha256

SPIKE = 2.0                # nats/token above its running mean: a logged loss there has come apart
NONFINITE_IN_A_ROW = 10    # steps: fp16's first scale, 65,536, is down to 64 by then
ROLLBACKS = 2              # of a run; the next trouble stops it


def train(recipe: Recipe, store, run_dir, *, tokenizer=None, model=None,
          deadline_hours: float | None = None, say=None, begin=lambda: None) -> dict:
    """Train, or go on with, the run in `run_dir`; the only training loop there is.

    store: anything with .batch(step) -> {"input_ids", "labels"} int64 (total_batch_size, length),
    .validation(), .mixture, .epoch, .manifest, .names (TokenStore); more keys of a batch, such as
    attention_mask, go to the model too. With .evaluate(model, engine) -> the keys of `evaluate`
    and whatever else is to be logged, that is used, and no .validation(); with .tokens_per_step,
    that is what a step is counted as.
    model: one that is built already, used as it is instead of the recipe's shape and precision
    techniques; only what requires gradients is trained and kept in checkpoints, and its start
    weights are part of what a checkpoint must match.
    begin: called once the run is this process's and its checkpoint is found to be of this very
    run; what describes a run is written there, and not before.

    Writes checkpoints/, metrics.jsonl, training_curves.csv, best/, final/ and summary.json; returns
    what summary.json holds.
    SIGTERM and SIGINT finish the step (an evaluation, or a wait for data, is cut short), save, and
    raise SystemExit(143) or KeyboardInterrupt.
    Before `deadline_hours` after its start, early enough for what comes next and a save three times
    as slow as the slowest so far, the loop saves and returns with "stopped": "deadline" instead of
    final/; the same call goes on from there.
    NONFINITE_IN_A_ROW skipped steps, or a logged loss SPIKE above its running mean: back to the
    weights of the last evaluation that was not so, and on with the next batch; what decides is in
    the checkpoint, so a resumed run decides the same.

    Raises ParameterError for a folder in use, CheckpointError for a checkpoint of another run,
    TrainingDiverged at the third trouble, TrainingFailed when final/ finds no room (a checkpoint
    that finds none is only warned of).
    """
    run_dir = Path(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    engine = find_engine(recipe.mixed_precision, run_dir / "xla-cache")
    say = say or (lambda text: print(text, flush=True))
    say = say if engine.rank == 0 else (lambda text: None)
    with RunLock(run_dir) if engine.rank == 0 else contextlib.nullcontext():
        try:
            run = Run(engine, recipe, store, run_dir, tokenizer, model, deadline_hours, say, begin)
            return run.train()
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise TrainingFailed(
                f"{run_dir} has no room ({error.strerror}); its last checkpoint is kept: free some "
                "space and run the same again.") from error


class TrainingDiverged(StentorError, RuntimeError):
    """The run came apart again after it had gone back to a good checkpoint; the message says where,
    and what to try."""


class Run:
    """One session of a training run.

    `train()` is the loop, the methods are its steps; `state` is what lasts, as checkpoints hold it.
    """

    def __init__(self, engine, recipe: Recipe, store, run_dir: Path, tokenizer, model,
                 deadline_hours, say, begin):
        self.engine, self.recipe, self.store = engine, recipe, store
        self.run_dir, self.tokenizer, self.say = run_dir, tokenizer, say
        self.main = engine.rank == 0
        self.stopping = Stopping(engine, deadline_hours)
        self.last_save = time.monotonic()
        self.check()
        self.learner = Learner(engine, recipe, tokenizer, model, say)
        self.measure = make_measure(recipe, store)
        self.resume(begin)
        self.announce()
        # a batch of this run's shape shows what fits the memory
        first_batch = store.batch(min(self.state["step"], recipe.total_steps - 1))
        self.per_device = engine.micro_batch(
            self.learner.parallel, first_batch, recipe.per_device_train_batch_size, say)

    def train(self) -> dict:
        """The loop. Save before evaluating: an evaluation that fails must cost no training."""
        with self.stopping.noticing_signals():
            try:
                while True:
                    if self.evaluation_due():
                        self.save()
                        if self.stopping.must_stop(before="evaluation"):
                            break
                        self.evaluate()
                    if self.finished() or self.stopping.must_stop(before="step"):
                        break
                    done = self.one_step()
                    trouble = self.log(done)
                    if trouble:
                        self.go_back(trouble)
                    if trouble or self.save_due():
                        self.save()
            except CutShort:
                self.stopping.must_stop()
            self.save_the_end()
        return self.finish()

    # Before the first step

    def check(self) -> None:
        """What can be refused before anything is made."""
        problems = self.engine.problems(self.recipe)
        if self.tokenizer is not None:
            problems = store_problems(self.store.manifest, self.tokenizer) + problems
        if problems:
            raise ParameterError(problems)

    def resume(self, begin) -> None:
        """Go on from the newest checkpoint, or begin; `begin()` once it is this run's."""
        fingerprint = run_fingerprint(self.recipe, self.store) | self.learner.start_weights
        if not self.main:
            self.engine.sum(0)                        # process 0 goes first: it sets bad ones aside
        loaded = load_checkpoint(self.run_dir, self.say)
        if self.main:
            self.engine.sum(0)
        self.saved_step = None                        # of the newest checkpoint
        if loaded:
            self.go_on_from(*loaded, fingerprint)
        else:
            self.state = new_state(fingerprint)
        self.first_step = self.state["step"]
        self.window = LogWindow(*self.state["window"][1:])
        if self.main:
            begin()
            self.metrics = Metrics(self.run_dir, self.state["metrics_lines"], self.say)
        self.note_optimizer()
        self.engine.begin(self.recipe, self.state, self.say)

    def go_on_from(self, tensors: dict, state: dict, fingerprint: dict) -> None:
        """That checkpoint, if it is of the run with this fingerprint."""
        theirs = state.get("fingerprint") or {"fingerprint": None}
        if different := fingerprint_differences(theirs, fingerprint):
            raise another_run(self.run_dir, different)
        self.state = state
        self.learner.put_back(tensors)
        if state["scaler"]:
            self.engine.scaler.load_state_dict(state["scaler"])
        self.saved_step = state["step"]
        self.say(f"going on from step {state['step']:,} of {self.recipe.total_steps:,}")

    def note_optimizer(self) -> None:
        """state["optimizers"]: all that made steps of this run; one may stand in for another."""
        kind = type(self.learner.optimizer)
        used = f"{kind.__module__.partition('.')[0]}.{kind.__name__}"
        done = self.state.setdefault("optimizers", [])
        if not self.finished() and used not in done:
            done.append(used)

    def announce(self) -> None:
        engine, recipe, learner = self.engine, self.recipe, self.learner
        part = f"{learner.trainable:,} of " if learner.start_weights else ""
        precision = engine.mixed_precision if engine.autocast_dtype else "fp32"
        techniques = ", ".join(f"{key} {value}" for key, value in learner.precision.items()
                               if key != "notes")
        self.say(f"{part}{learner.size:,} parameters on {engine.device} x {engine.world_size}, "
                 f"{precision}; {recipe.total_steps:,} steps x {self.step_tokens:,.0f} tokens; "
                 f"{techniques}")
        notes = head_dim_note(recipe.shape, engine.mixed_precision)
        for note in [*learner.precision["notes"], *notes]:
            self.say(note)

    # What follows from the rest

    @property
    def step_tokens(self) -> float:
        return getattr(self.store, "tokens_per_step", self.recipe.tokens_per_step)

    def tokens_at(self, step: int) -> float:
        """Tokens trained on after `step` steps; the last step may hold fewer than the others."""
        return min(step * self.step_tokens, self.recipe.total_tokens)

    def elapsed(self) -> float:
        """Seconds of training in all sessions."""
        return self.state["seconds"] + self.stopping.elapsed()

    def finished(self) -> bool:
        return self.state["step"] >= self.recipe.total_steps

    def evaluation_due(self) -> bool:
        step, recipe = self.state["step"], self.recipe
        since = step - recipe.best_eval_start_step
        on_time = (step % recipe.eval_steps == 0 or self.epoch_ended(step)
                   or since >= 0 and since % recipe.best_eval_steps == 0)
        return (on_time or self.finished()) and self.state["evaluated_step"] != step

    def epoch_ended(self, step: int) -> bool:
        """Whether step `step` was the last of save_epochs passes over the tokens."""
        every = self.recipe.save_epochs
        if not every or not step:
            return False
        return self.store.epoch(step) // every > self.store.epoch(step - 1) // every

    def save_due(self) -> bool:
        return time.monotonic() - self.last_save > 60 * self.recipe.save_every_minutes

    # One step, and the log of it

    def one_step(self) -> bool | None:
        """One optimiser step; whether it was done (None: an engine that tells later).

        What a step draws at random is a function of (seed, step, rank).
        """
        self.lap, state, step = time.monotonic(), self.state, self.state["step"]
        try:
            with self.stopping.cut_short_by_a_signal():       # it may have to wait for the hub
                batch = self.engine.feed(self.store, step)
        except FeedStopped:                           # what was trained is kept
            self.save()
            raise
        self.window.wait += time.monotonic() - self.lap
        torch.manual_seed((self.recipe.seed << 32) + step * 1024 + self.engine.rank)
        done = self.learner.step(batch, self.per_device)
        state["step"] = step + 1
        state["nonfinite"] = state["nonfinite"] + 1 if done is False else 0
        return done

    def log(self, done: bool | None) -> str | None:
        """Say and write down what the step gave; returns what is wrong with the run, or None."""
        step, engine, window = self.state["step"], self.engine, self.window
        in_a_row, trouble = self.state["nonfinite"], None
        if done is False:
            self.log_skipped()
        window.steps += 1
        window.tokens += self.tokens_at(step) - (step - 1) * self.step_tokens
        self.stopping.preflight(step - self.first_step, self.recipe.total_steps - step, self.say)
        due = step % self.recipe.logging_steps == 0 or self.finished()
        progress = engine.read() if due else {}       # waits for the device
        window.seconds += time.monotonic() - self.lap
        if due:
            skipped = progress["skipped_steps"] - window.skipped_before
            if done is None:                          # XLA tells only now: as many in one window
                in_a_row = skipped                    # count as in a row
            trouble = self.log_line(progress, trained=window.steps - skipped)
            engine.clear_window()
            window.reset(progress["skipped_steps"])
        self.stopping.took("step", time.monotonic() - self.lap)
        if in_a_row >= NONFINITE_IN_A_ROW:
            return f"the gradients of {in_a_row} steps in a row were not finite"
        return trouble

    def log_skipped(self) -> None:
        step, scale = self.state["step"], self.engine.loss_scale
        scaled = f", loss scale {scale:,.0f}" if self.engine.scaler.is_enabled() else ""
        self.say(f"step {step:>6,} | gradient is not finite: step skipped{scaled}")
        if self.main:
            self.metrics.add(kind="skipped", step=step, batch=step - 1, loss_scale=scale)

    def log_line(self, progress: dict, trained: int) -> str | None:
        """The line of this window with `trained` steps in it; what is wrong with its loss."""
        step, window, steps = self.state["step"], self.window, self.recipe.total_steps
        loss, rate = progress["window_loss"] / max(1, trained), window.tokens / window.seconds
        trouble = self.too_high(loss) if trained else None
        if trained and self.main:
            figures = ("learning_rate", "grad_norm", "loss_scale", "skipped_steps")
            self.metrics.add(
                kind="train", step=step, tokens=round(self.tokens_at(step)),
                epoch=self.store.epoch(step), loss=loss,
                **{key: progress[key] for key in figures}, tokens_per_second=rate,
                wait_seconds=window.wait, elapsed_seconds=self.elapsed(),
                mixture=self.store.mixture(step - 1), **self.engine.counters())
        left = (steps - step) * self.step_tokens / rate
        self.say(f"step {step:>6,}/{steps:,} | loss {loss:.4f} | lr "
                 f"{progress['learning_rate']:.2e} | {rate:,.0f} tokens/s | {duration(left)} left")
        return trouble

    def too_high(self, loss: float) -> str | None:
        """What is wrong with the loss of a window, or None; its running mean moves on then."""
        level = self.state["loss_level"]
        if level is not None and not loss <= level + SPIKE:
            return f"the loss rose to {loss:.2f} from about {level:.2f}"
        self.state["loss_level"] = loss if level is None else 0.9 * level + 0.1 * loss
        return None

    # Evaluation

    def evaluate(self) -> None:
        """Measure the model (or the average of its weights); the best so far goes to best/."""
        state, step, began = self.state, self.state["step"], time.monotonic()
        with self.learner.averaged(), self.stopping.cut_short_by_a_signal():
            result = self.measure(self.learner.model, self.engine)
        self.stopping.took("evaluation", time.monotonic() - began)
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
                state.update(before)                  # best/ still holds what it held
                self.say(f"WARNING: best/ could not be written at step {step:,} "
                         f"({error.strerror})")
        self.say(f"step {step:>6,} | eval loss {result['loss']:.4f} | perplexity "
                 f"{result['perplexity']:,.2f} | {result['bits_per_byte']:.4f} bits per byte"
                 + (" | best so far" if best and step else ""))

    def write_evaluation(self, result: dict, best: bool) -> None:
        step = self.state["step"]
        more = {key: value for key, value in result.items() if key != "tokens"}
        self.metrics.add(
            kind="eval", step=step, tokens=round(self.tokens_at(step)),
            epoch=self.store.epoch(step), best=best, elapsed_seconds=self.elapsed(), **more)
        self.metrics.write_curves(final_step=step if self.finished() else None)
        if best and step:
            self.learner.save(self.run_dir / "best")

    # Checkpoints, and going back to one

    def save(self) -> None:
        """A checkpoint; a full disk costs that, not the training."""
        began, progress, step = time.monotonic(), self.engine.read(), self.state["step"]
        self.state.update({key: progress[key] for key in ("updates", "skipped_steps")})
        if self.main:
            try:
                self.write_checkpoint(progress)
            except OSError as error:
                kept = "there is none yet" if self.saved_step is None else (
                    f"the last one, of step {self.saved_step:,}, is kept")
                self.say(f"WARNING: no checkpoint at step {step:,} ({error.strerror}); {kept}. "
                         f"Free some space under {self.run_dir}.")
        self.last_save = time.monotonic()
        self.stopping.took("save", self.last_save - began)

    def write_checkpoint(self, progress: dict) -> None:
        tensors, window = self.learner.tensors(), self.window
        self.metrics.complete()
        state = {**self.state, "scaler": self.engine.scaler.state_dict(),
                 "metrics_lines": len(self.metrics.rows), "seconds": self.elapsed(),
                 "window": [progress["window_loss"], window.steps, window.skipped_before]}
        step = state["step"]
        save_checkpoint(self.run_dir, step, tensors, state, self.recipe.save_total_limit)
        self.saved_step = step
        if hasattr(self.store, "release"):            # one that is filled meanwhile
            oldest = checkpoint_folders(self.run_dir)[0]
            self.store.release(int(oldest.name[5:]))  # what no checkpoint needs any more

    def go_back(self, why: str) -> None:
        """Weights and optimiser of the last good checkpoint; the batches since are left out."""
        state, step, found = self.state, self.state["step"], None
        state["skipped_steps"] = self.engine.read()["skipped_steps"]
        if len(state["rollbacks"]) < ROLLBACKS:
            found = load_checkpoint(self.run_dir, self.say, newest=state["good_step"])
        if not found:
            raise self.diverged(why)
        tensors, saved = found
        self.learner.optimizer.state.clear()
        self.learner.put_back(tensors)
        state["rollbacks"].append([saved["step"], step, why])
        state.update(updates=saved["updates"], loss_level=saved["loss_level"], nonfinite=0,
                     window=[0.0, 0, state["skipped_steps"]])
        self.window.reset(state["skipped_steps"])
        self.engine.begin(self.recipe, state, self.say)      # the loss scale stays where it is
        if self.main:
            self.metrics.add(kind="rollback", step=step, good_step=saved["step"], reason=why,
                             elapsed_seconds=self.elapsed())
        self.say(f"step {step:>6,} | {why}: back to the weights of step {saved['step']:,}, the "
                 f"batches since then left out ({len(state['rollbacks'])} of {ROLLBACKS})")

    def diverged(self, why: str) -> TrainingDiverged:
        before = "; ".join(f"back from step {b:,} to {a:,} because {reason}"
                           for a, b, reason in self.state["rollbacks"])
        return TrainingDiverged(
            f"training came apart at step {self.state['step']:,}: {why} "
            f"({before or 'no good checkpoint yet'}); the learning rate was "
            f"{self.engine.read()['learning_rate']:.2e}. Lower learning_rate or lengthen "
            "warmup_ratio under another RUN, and look at the batches of these steps.")

    # The end

    def save_the_end(self) -> None:
        if not self.stopping.reason or self.saved_step != self.state["step"]:
            self.save()
        self.stopping.must_stop(before="evaluation")  # final/ can wait for the next session

    def finish(self) -> dict:
        """final/ if the run is done, summary.json; leaves as the signal that stopped it asks."""
        summary, stopped = self.summary(), self.stopping.reason
        if self.main and not stopped:
            summary |= self.measure_final()
        if self.main:
            write_atomically(self.run_dir / "summary.json", json.dumps(summary, indent=1))
        self.engine.close()
        if stopped:
            step = self.state["step"]
            saved = "saved" if self.saved_step == step else f"last saved at step {self.saved_step}"
            self.say(f"stopped at step {step:,} of {self.recipe.total_steps:,} ({stopped}); "
                     f"{saved}. Run the same again to go on.")
        if stopped == "SIGINT":
            raise KeyboardInterrupt
        if stopped == "SIGTERM":
            raise SystemExit(143)
        return summary

    def summary(self) -> dict:
        """What summary.json holds of every run, finished or not."""
        state, engine, learner = self.state, self.engine, self.learner
        counts = {"trainable_parameters": learner.trainable} if learner.start_weights else {}
        return {
            "recipe": self.recipe.name, "parameters": learner.size, "step": state["step"],
            "steps": self.recipe.total_steps, "tokens": round(self.tokens_at(state["step"])),
            "skipped_steps": state["skipped_steps"], "best_eval_loss": state["best_eval_loss"],
            "best_step": state["best_step"], "seconds": self.elapsed(),
            "device": str(engine.device), "processes": engine.world_size,
            "precision": {"autocast": engine.mixed_precision, **learner.precision},
            "stopped": self.stopping.reason, "optimizer": ", then ".join(state["optimizers"]),
            **engine.counters(), **counts}

    def measure_final(self) -> dict:
        """Write final/, and measure what was saved, read back as anybody would."""
        engine, folder = self.engine, self.run_dir / "final"
        self.learner.save(folder)
        saved = load_model(folder, attn_implementation=engine.attention("sdpa"))
        alone = engine if engine.world_size == 1 else None
        result = self.measure(engine.place(saved), alone)
        rates = [row["tokens_per_second"] for row in self.metrics.rows if row["kind"] == "train"]
        return {"eval_loss": result["loss"], "perplexity": result["perplexity"],
                "bits_per_byte": result["bits_per_byte"], "eval_tokens": result["tokens"],
                "tokens_per_second": float(np.median(rates)) if rates else None}


def store_problems(manifest: dict, tokenizer) -> list[str]:
    """Why a token store was not made by this tokenizer, one sentence each."""
    problems = []
    made_for = manifest.get("fingerprint", {}).get("tokenizer_sha256")
    if made_for and made_for != (given := tokenizer_sha256(tokenizer)):
        problems.append(f"the token store was made by the tokenizer {made_for[:12]}, given is "
                        f"{given[:12]} (sha256); use the one it was made by.")
    ends = manifest.get("eos_token_id")
    if ends is not None and ends != tokenizer.eos_token_id:
        problems.append(f"the documents of the token store end in the id {ends:,}, the tokenizer's "
                        f"EOS is {tokenizer.eos_token_id:,}; use the tokenizer it was made by.")
    return problems
