"""metrics.jsonl and training_curves.csv of a run."""
from __future__ import annotations

import json
import os
import time
from pathlib import Path

from stentor.files import write_atomically


class Metrics:
    """metrics.jsonl, and training_curves.csv (the cards' columns) made from it. Only process 0 writes."""

    def __init__(self, run_dir, keep_lines: int, say=print):
        self.folder = Path(run_dir)
        self.path = self.folder / "metrics.jsonl"
        lines = self.path.read_text(errors="replace").splitlines() if self.path.exists() else []
        self.rows = [row for row in map(self.row_of, lines[:keep_lines]) if row]      # later ones are trained again
        if lost := keep_lines - len(self.rows):
            aside = f"bad-metrics-{time.time_ns()}.jsonl"
            if lines:
                os.rename(self.path, self.folder / aside)
            say(f"metrics.jsonl: {lost} of the {keep_lines} rows that the checkpoint counts are broken or gone; it goes on "
                "with the others" + f" (the file as it was: {aside})" * bool(lines))
        for left in self.folder.glob(".*.[0-9]*"):    # what write_atomically of a killed run left behind
            if left.is_file():
                left.unlink()
        self.write()

    @staticmethod
    def row_of(line: str) -> dict | None:
        """The row of that line; None where it is none, or lacks what the curves are made of."""
        needs = {"train": {"epoch", "loss", "tokens_per_second"}, "eval": {"epoch", "loss", "perplexity"}}
        try:
            row = json.loads(line)
            return row if type(row["step"]) is int and needs.get(row["kind"], set()) <= set(row) else None
        except (ValueError, TypeError, KeyError, RecursionError):
            return None

    def write(self):
        write_atomically(self.path, "".join(json.dumps(row) + "\n" for row in self.rows))
        self.whole = True

    def add(self, **row):
        self.rows.append(row)
        try:
            with open(self.path, "a") as file:
                file.write(json.dumps(row) + "\n")
        except OSError:                               # the disk is full: `complete` comes before the next checkpoint
            self.whole = False

    def complete(self):
        """Every row is in the file and on the disk, as the checkpoint that counts them will be, or OSError."""
        if not self.whole:
            self.write()
        with open(self.path, "a") as file:
            os.fsync(file.fileno())

    def write_curves(self, final_step: int | None = None):
        lines = ["step,epoch,train_loss,eval_loss,eval_ppl,note"]
        best = min((row for row in self.rows if row["kind"] == "eval"), key=lambda row: row["loss"], default={})
        for row in self.rows:
            if row["kind"] == "train":
                lines.append(f"{row['step']},{row['epoch']:.6g},{row['loss']:.6g},,,")
            elif row["kind"] == "eval":
                note = "best" if row["step"] == best["step"] else "final" if row["step"] == final_step else ""
                lines.append(f"{row['step']},{row['epoch']:.6g},,{row['loss']:.6g},{row['perplexity']:.6g},{note}")
        write_atomically(self.folder / "training_curves.csv", "\n".join(lines) + "\n")
