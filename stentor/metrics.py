"""What a run says of itself: metrics.jsonl, training_curves.csv, and the window of the log."""
from __future__ import annotations

import json
import os
import time
from pathlib import Path

from stentor.files import remove_leftovers, write_atomically


def read_metrics(path) -> list[dict]:
    """Rows of a metrics.jsonl; a line cut short by a kill is skipped, [] without a file."""
    path, rows = Path(path), []
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if (isinstance(row, dict) and row.get("kind") in ("train", "eval")
                and isinstance(row.get("step"), int)):
            rows.append(row)
    return rows


class Metrics:
    """metrics.jsonl, and training_curves.csv (the cards' columns) made from it.

    Only process 0 writes. keep_lines: what the checkpoint counts; later ones are trained again.
    """

    def __init__(self, run_dir, keep_lines: int, say=print):
        self.folder = Path(run_dir)
        self.path = self.folder / "metrics.jsonl"
        lines = []
        if self.path.exists():
            lines = self.path.read_text(errors="replace").splitlines()
        self.rows = [row for row in map(self.row_of, lines[:keep_lines]) if row]
        if lost := keep_lines - len(self.rows):
            aside = f"bad-metrics-{time.time_ns()}.jsonl"
            if lines:
                os.rename(self.path, self.folder / aside)
            say(f"metrics.jsonl: {lost} of the {keep_lines} rows that the checkpoint counts are "
                "broken or gone; it goes on with the others"
                + f" (the file as it was: {aside})" * bool(lines))
        remove_leftovers(self.folder, "*")            # of a killed run
        self.write()

    def add(self, **row):
        self.rows.append(row)
        try:
            with open(self.path, "a") as file:
                file.write(json.dumps(row) + "\n")
        except OSError:                               # a full disk: see `complete`
            self.whole = False

    def complete(self):
        """Every row is in the file and on the disk, as the checkpoint that counts them will be, or
        OSError."""
        if not self.whole:
            self.write()
        with open(self.path, "a") as file:
            os.fsync(file.fileno())

    def write(self):
        write_atomically(self.path, "".join(json.dumps(row) + "\n" for row in self.rows))
        self.whole = True

    def write_curves(self, final_step: int | None = None):
        lines = ["step,epoch,train_loss,eval_loss,eval_ppl,note"]
        evaluated = [row for row in self.rows if row["kind"] == "eval"]
        best = min(evaluated, key=lambda row: row["loss"], default={})
        for row in self.rows:
            if row["kind"] == "train":
                lines.append(f"{row['step']},{row['epoch']:.6g},{row['loss']:.6g},,,")
            elif row["kind"] == "eval":
                step, loss = row["step"], f"{row['loss']:.6g},{row['perplexity']:.6g}"
                note = "best" if step == best["step"] else "final" if step == final_step else ""
                lines.append(f"{step},{row['epoch']:.6g},,{loss},{note}")
        write_atomically(self.folder / "training_curves.csv", "\n".join(lines) + "\n")

    @staticmethod
    def row_of(line: str) -> dict | None:
        """The row of that line; None where it is none, or lacks what the curves are made of."""
        needs = {"train": {"epoch", "loss", "tokens_per_second"},
                 "eval": {"epoch", "loss", "perplexity"}}
        try:
            row = json.loads(line)
            complete = type(row["step"]) is int and needs.get(row["kind"], set()) <= set(row)
        except (ValueError, TypeError, KeyError, RecursionError):
            return None
        return row if complete else None


class LogWindow:
    """What the next line of the log is made of: counted since the last one.

    steps and skipped_before (skipped steps of the run until then) are in the checkpoint, so that a
    resumed log is the same; tokens, seconds and wait (seconds of them for data) are this session's.
    """

    def __init__(self, steps: int = 0, skipped_before: int = 0):
        self.reset(skipped_before)
        self.steps = steps

    def reset(self, skipped_before: int) -> None:
        self.steps, self.skipped_before = 0, skipped_before
        self.tokens, self.seconds, self.wait = 0.0, 0.0, 0.0
