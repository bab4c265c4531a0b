"""Which of two models wrote better: pairs of one size, votes in a file, a rating from them."""
from __future__ import annotations

import contextlib
import fcntl
import json
import math
import random
import time
from pathlib import Path

import numpy as np

from stentor.demo.models import Entry, closest
from stentor.files import ParameterError, write_atomically
from stentor.statistics import Z, proportion

POINTS = {"A is better": 1.0, "B is better": 0.0, "tie": 0.5, "both bad": 0.5}     # those of A
MODES = ("Show", "Blind", "Random")
MATCHED = 2.0                              # a pair's sizes differ at most by this factor, if any does
SPREAD = 400 / math.log(10)                # of Elo's scale: 400 points are odds of 10 to 1
MIDDLE = 1000                              # a rating in the middle


def draw_pair(entries: list[Entry], mode: str, draw: random.Random) -> tuple[str, str]:
    """Names of two models of about one size, on sides that chance decides.

    Blind: any two. Random: one of ours against a baseline. Raises ParameterError, in one sentence,
    where there are not two.
    """
    ours = [entry for entry in entries if not entry.baseline]
    others = [entry for entry in entries if entry.baseline] if mode == "Random" else entries
    if mode == "Random" and not (ours and others):
        raise ParameterError(["Random holds a model of yours against a baseline, and there is no "
                              "baseline here: start the demo with BASELINES, a folder of another "
                              "model, or with internet."])
    if len(entries) < 2:
        raise ParameterError(["An arena needs two models, and there is one: train another run, or "
                              "start the demo with BASELINES."])
    first = draw.choice(ours if mode == "Random" else entries)
    near = closest(first, others)
    matched = [other for other in near if first.parameters and other.parameters and
               max(first.parameters, other.parameters)
               <= MATCHED * min(first.parameters, other.parameters)]
    pair = [first.name, draw.choice(matched or near[:1]).name]
    draw.shuffle(pair)
    return pair[0], pair[1]


# The votes, one JSON object a line.

def add_vote(path, a: str, b: str, vote: str, mode: str) -> None:
    """One more line in the file, which is whole at any instant; its folder is made.

    Whoever writes at the same time waits. What people typed is not kept.
    """
    if vote not in POINTS:
        raise ParameterError([f"vote = {vote!r} must be one of {', '.join(POINTS)}."])
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    row = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "a": a, "b": b, "vote": vote,
           "mode": mode}
    with open(path.with_name(f".{path.name}.lock"), "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = path.read_text(encoding="utf-8") if path.is_file() else ""
        before += "\n" * bool(before and not before.endswith("\n"))
        write_atomically(path, before + json.dumps(row, ensure_ascii=False) + "\n")


def read_votes(path) -> list[dict]:
    """The votes in a file; [] without one. Lines that are no vote are left out."""
    votes, path = [], Path(path)
    for line in path.read_text(encoding="utf-8").split("\n") if path.is_file() else ():
        with contextlib.suppress(ValueError, TypeError, KeyError):
            row = json.loads(line)
            if row["vote"] in POINTS and row["a"] != row["b"]:
                votes.append({key: str(row[key]) for key in ("a", "b", "vote")})
    return votes


# The rating.

def rate(votes: list[dict]) -> list[dict]:
    """[{"name", "votes", "share", "share_low", "share_high", "rating", "low", "high"}], best first.

    share: points (1, half for a tie or both bad) a vote, with Wilson's 95% interval. rating: Bradley
    and Terry's (1952) on Elo's scale, 1,000 the models' mean, its 95% interval from the curvature of
    the likelihood; to keep it finite each model has one tie more, against a model of rating 1,000.
    """
    names = sorted({row[side] for row in votes for side in "ab"})
    index = {name: i for i, name in enumerate(names)}
    points, played = np.zeros(len(names)), np.zeros((len(names), len(names)))
    for row in votes:
        i, j, point = index[row["a"]], index[row["b"]], POINTS[row["vote"]]
        points[i] += point
        points[j] += 1 - point
        played[i, j] += 1
        played[j, i] += 1
    strength, spread = _bradley_terry(points, played)
    table = []
    for i, name in enumerate(names):
        n = int(played[i].sum())
        share = proportion(float(points[i]), n)
        rating, half = MIDDLE + SPREAD * strength[i], SPREAD * Z * spread[i]
        table.append({"name": name, "votes": n, "share": share["share"], "share_low": share["low"],
                      "share_high": share["high"], "rating": float(rating),
                      "low": float(rating - half), "high": float(rating + half)})
    return sorted(table, key=lambda row: -row["rating"])


def _bradley_terry(points: np.ndarray, played: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(log strengths, their standard errors) around their mean, by Newton's method.

    One tie with strength 0 is added to each.
    """
    strength = np.zeros(len(points))
    for _ in range(100):
        against = 1 / (1 + np.exp(np.clip(strength[None] - strength[:, None], -700, 700)))
        middle = 1 / (1 + np.exp(-strength))
        slope = points + 0.5 - (played * against).sum(1) - middle
        weight = played * against * (1 - against)
        curve = np.diag(weight.sum(1) + middle * (1 - middle)) - weight
        step = np.linalg.solve(curve, slope)
        strength = strength + np.clip(step, -2, 2)
        if np.abs(step).max(initial=0) < 1e-9:
            break
    centre = np.eye(len(points)) - 1 / max(1, len(points))      # only differences are measured
    spread = np.diag(centre @ np.linalg.inv(curve) @ centre)
    return centre @ strength, np.sqrt(np.maximum(spread, 0))
