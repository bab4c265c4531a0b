"""Limitations are measured, not claimed: what final/ writes is counted."""
from __future__ import annotations

import json
from pathlib import Path

from stentor.card.facts import Facts
from stentor.files import write_atomically
from stentor.folders import load_model
from stentor.launch import find_place
from stentor.model import sampling_of
from stentor.statistics import REPETITIVE, proportion, repetition
from stentor.tokenizer import load_tokenizer


def held_out_starts(run_dir, count: int, length: int) -> list[list[int]]:
    """The first `length` token ids of up to `count` held-out documents, the sources in turn.

    [] where there is no token store.
    """
    import numpy as np
    try:
        run = Facts(run_dir).read("run.json")
        known = run if isinstance(run, dict) and "store" in run else {"store": "tokens"}
        store = find_place(run_dir, known, "store")
        manifest = json.loads((store / "manifest.json").read_text())
        by_source = []
        for source in manifest["sources"].values():
            ids = np.fromfile(store / source["validation"]["file"], "<u2")
            documents = np.split(ids, np.flatnonzero(ids == manifest["eos_token_id"]) + 1)
            by_source.append([document[:length].tolist() for document in documents
                              if len(document) > length])
    except (OSError, ValueError, KeyError):           # ParameterError is a ValueError
        return []
    in_turn = [starts[i] for i in range(count) for starts in by_source if i < len(starts)]
    return in_turn[:count]


def continuations(run_dir, prompts: list[list[int]], max_new_tokens: int, seed: int):
    """(texts, stopped, max_new_tokens, settings): what final/ makes of each prompt, sampled as it
    recommends.

    prompts: token ids, all of one length. stopped: whether a text ended by itself. max_new_tokens
    comes back as the context allowed it.
    """
    import torch
    model = load_model(run_dir / "final").eval()
    tokenizer = load_tokenizer(run_dir / "final")
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    length, end = len(prompts[0]), tokenizer.eos_token_id
    max_new_tokens = min(max_new_tokens, model.config.max_position_embeddings - length)
    settings = sampling_of(model)
    torch.manual_seed(seed)
    ids = torch.tensor(prompts, device=model.device)  # (count, length): no padding
    with torch.inference_mode():
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_length=length + max_new_tokens,
            use_cache=True, pad_token_id=end, **settings)[:, length:].tolist()
    texts = [tokenizer.decode(row[:row.index(end)] if end in row else row, skip_special_tokens=True)
             for row in out]
    return texts, [end in row for row in out], max_new_tokens, settings


def measure_limitations(
        run_dir, *, count: int = 32, prompt_tokens: int = 16, max_new_tokens: int = 80,
        seed: int = 42) -> dict | None:
    """Let final/ continue `count` held-out documents and write limitations.json: stopping,
    repetition, broken characters.

    Sampled as final/ recommends, one continuation each, none left out; shares come with 95% Wilson
    intervals. Returns what it wrote; None, and no file, where there is no token store to take
    prompts from.
    """
    run_dir = Path(run_dir)
    prompts = held_out_starts(run_dir, count, prompt_tokens)
    if not prompts:
        return None
    texts, stopped, max_new_tokens, settings = continuations(
        run_dir, prompts, max_new_tokens, seed)
    repeated = [repetition(text) for text in texts]

    def share(hits):
        return {"hits": sum(hits), **proportion(sum(hits), len(hits))}

    found = {
        "n": len(texts), "prompt_tokens": prompt_tokens, "max_new_tokens": max_new_tokens,
        "seed": seed, "settings": settings, "stopped": share(stopped),
        "repetitive": share([value > REPETITIVE for value in repeated]),
        "mean_repetition": sum(repeated) / len(repeated),
        "replacement": share(["\ufffd" in text for text in texts]), "texts": texts}
    write_atomically(run_dir / "limitations.json", json.dumps(found, indent=1, ensure_ascii=False))
    return found
