"""Whether a format says the same as the model it was made of, and what it costs.

The same prompts and the same held-out text for every format, each in a process of its own. The reference
is transformers in fp32 on the CPU. A difference of losses is paired, window by window; its 95% interval is
the bootstrap's over the windows.
"""
from __future__ import annotations

import json
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stentor.files import ParameterError, StentorError, write_atomically
from stentor.process import own_environment, run_process
from stentor.recipes import Source
from stentor.sources import clean_documents
from stentor.statistics import bootstrap
from stentor.tokenizer import encode_documents, tokenizer_sha256
from stentor.tokens import held_out_text

RESAMPLES = 2000


class MeasuringFailed(StentorError):
    """A format's process ended with an error."""


@dataclass(frozen=True)
class HeldOut:
    """What every format is asked: prompts to continue, and windows of text to predict."""
    prompts: list[list[int]]
    windows: list[list[int]]                          # of one length; the first id is context only
    bytes: int                                        # of the windows' text in UTF-8, the first id left out
    text: str                                         # where it comes from


def held_out(run_dir, tokenizer, *, prompts: int = 50, prompt_tokens: int = 8, windows: int = 32,
             window_tokens: int = 48) -> HeldOut:
    """Prompts and windows from text that was kept out of training, each the beginning of a stretch.

    From the run's token store where it has one of this tokenizer, else from the documentation text that
    comes with Python (the CPU twins' own held-out documents). Raises ParameterError where that is less.
    """
    documents, said = _held_out_ids(run_dir, tokenizer)
    eos, size = tokenizer.eos_token_id, window_tokens
    pieces = [ids[i:i + size] for ids in documents for i in range(0, len(ids) - size + 1, size)]
    if len(pieces) < prompts + windows:
        raise ParameterError([f"held-out text ({said}) gives {len(pieces)} stretches of {size} tokens, "
                              f"{prompts + windows} are wanted: take fewer, or shorter ones."])
    spread = np.linspace(0, len(pieces) - 1, prompts + windows).astype(int)
    order = np.random.default_rng(0).permutation(spread)          # of all documents, not of the first
    chosen = [[eos, *map(int, pieces[i])] for i in order]
    texts = chosen[prompts:]
    return HeldOut([ids[:prompt_tokens + 1] for ids in chosen[:prompts]], texts,
                   sum(text_bytes(tokenizer, ids[1:]) for ids in texts), said)


def _held_out_ids(run_dir, tokenizer) -> tuple[list[np.ndarray], str]:
    """(ids of each held-out document, what they are)."""
    store = Path(run_dir) / "tokens"
    if (store / "manifest.json").is_file():
        manifest = json.loads((store / "manifest.json").read_text())
        if manifest["fingerprint"]["tokenizer_sha256"] == tokenizer_sha256(tokenizer):
            ids, _ = held_out_text(store, manifest)
            ends = np.flatnonzero(ids == manifest["eos_token_id"])
            documents = [piece[piece != manifest["eos_token_id"]] for piece in np.split(ids, ends)]
            return documents, "the run's held-out documents"
    texts = []
    for text, skipped, _ in clean_documents(Source("prose", "local:prose")):
        texts += [] if skipped else [text]
        if len(texts) == 150:
            break
    ids, offsets = encode_documents(tokenizer, texts)
    return np.split(ids, offsets[1:-1]), "documentation text that comes with Python"


def text_bytes(tokenizer, ids: list[int]) -> int:
    """Bytes of text that ids stand for, special tokens none."""
    if hasattr(tokenizer, "token_byte_lengths"):
        return int(tokenizer.token_byte_lengths(np.asarray(ids)).sum())
    return len(tokenizer.decode(ids, skip_special_tokens=True).encode())


def measure_format(form: str, path, asked: HeldOut, folder, *, context: int, new_tokens: int = 32,
                   threads: int | None = None, kept: int = 1) -> dict:
    """What `worker.measure` finds of one format, kept in `folder`/<form>.json.

    Raises MeasuringFailed with the last line of a process that failed.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    longest = max(max(map(len, asked.prompts)) + new_tokens, len(asked.windows[0]))
    if longest > context:
        raise ParameterError([f"prompts and windows need {longest} positions, the model has "
                              f"{context}: take shorter ones."])
    out = folder / f"{form}.json"
    spec = {"form": form, "path": str(path), "prompts": asked.prompts, "windows": asked.windows,
            "new_tokens": new_tokens, "kept": kept, "context": context, "out": str(out),
            "threads": threads or os.cpu_count()}
    write_atomically(folder / f"{form}.spec.json", json.dumps(spec))
    log = []
    ended = run_process([sys.executable, "-m", "stentor.export.worker", f"{folder / form}.spec.json"],
                        own_environment(OMP_NUM_THREADS=str(spec["threads"])), say=log.append)
    if ended.code:
        said = list(ended.errors or ended.tail)[-1:] or ["no word"]
        raise MeasuringFailed(f"{form} could not be measured (exit code {ended.code}): {said[0].strip()}")
    return json.loads(out.read_text())


def compare(reference: dict, other: dict, asked: HeldOut, folder) -> dict:
    """One format against the reference, of `measure_format` in that `folder`: a row of the table.

    Losses in nats a token; largest_difference: of the log probabilities of any token.
    """
    equal = [mine == theirs for mine, theirs in zip(other["greedy"], reference["greedy"])]
    per_window = len(asked.windows[0]) - 1
    difference = (np.array(other["nats"]) - np.array(reference["nats"])) / per_window
    low, high = bootstrap(difference, RESAMPLES)
    mine, theirs = (np.fromfile(Path(folder) / f"{row['form']}.f32", "<f4") for row in (other, reference))
    return {"greedy_equal": sum(equal), "greedy_of": len(equal),
            "bits_per_byte": sum(other["nats"]) / math.log(2) / asked.bytes,
            "loss_difference": float(difference.mean()), "loss_low": low, "loss_high": high,
            "largest_difference": float(np.abs(mine - theirs).max()), "threads": other["threads"],
            **other["speed"]}
