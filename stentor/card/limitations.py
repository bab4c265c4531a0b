"""Limitations are measured, not claimed: what final/ writes is counted."""
from __future__ import annotations

import json
import re
from pathlib import Path

from stentor.card.facts import Facts
from stentor.files import write_atomically
from stentor.folders import load_model
from stentor.launch import find_place
from stentor.model import GENERATION
from stentor.tokenizer import load_tokenizer


# Limitations are measured, not claimed.

def repetition(text: str) -> float:
    """Share of the words' triples that occurred before in the same text, from 0 to 1; 0 below four words."""
    words = re.findall(r"\w+", text.lower())
    triples = list(zip(words, words[1:], words[2:]))
    return 1 - len(set(triples)) / len(triples) if len(triples) > 1 else 0.0


def held_out_starts(run_dir, count: int, length: int) -> list[list[int]]:
    """The first `length` token ids of up to `count` held-out documents, the sources in turn; [] without a token store."""
    import numpy as np
    try:
        run = Facts(run_dir).read("run.json")
        store = find_place(run_dir, run if isinstance(run, dict) and "store" in run else {"store": "tokens"}, "store")
        manifest = json.loads((store / "manifest.json").read_text())
        by_source = []
        for source in manifest["sources"].values():
            ids = np.fromfile(store / source["validation"]["file"], "<u2")
            documents = np.split(ids, np.flatnonzero(ids == manifest["eos_token_id"]) + 1)
            by_source.append([document[:length].tolist() for document in documents if len(document) > length])
    except (OSError, ValueError, KeyError):           # ParameterError is a ValueError
        return []
    return [starts[i] for i in range(count) for starts in by_source if i < len(starts)][:count]


def measure_limitations(run_dir, *, count: int = 32, prompt_tokens: int = 16, max_new_tokens: int = 80, seed: int = 42
                        ) -> dict | None:
    """Let final/ continue `count` held-out documents and write limitations.json: stopping, repetition, broken characters.

    Sampled with su.GENERATION, one continuation each, none left out; shares come with 95% Wilson intervals. Returns what it
    wrote; None, and no file, where there is no token store to take prompts from.
    """
    import torch
    from scipy.stats import binomtest
    run_dir = Path(run_dir)
    prompts = held_out_starts(run_dir, count, prompt_tokens)
    if not prompts:
        return None
    model = load_model(run_dir / "final").eval()
    tokenizer = load_tokenizer(run_dir / "final")
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    max_new_tokens = min(max_new_tokens, model.config.max_position_embeddings - prompt_tokens)
    torch.manual_seed(seed)
    ids = torch.tensor(prompts, device=model.device)                  # (count, prompt_tokens): all of one length, no padding
    with torch.inference_mode():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_length=prompt_tokens + max_new_tokens,
                             use_cache=True, pad_token_id=tokenizer.eos_token_id, **GENERATION)[:, prompt_tokens:].tolist()
    stopped = [tokenizer.eos_token_id in row for row in out]
    texts = [tokenizer.decode(row[:row.index(tokenizer.eos_token_id)] if end else row, skip_special_tokens=True)
             for row, end in zip(out, stopped)]
    repeated = [repetition(text) for text in texts]

    def share(hits):
        interval = binomtest(sum(hits), len(hits)).proportion_ci(method="wilson")
        return {"hits": sum(hits), "share": sum(hits) / len(hits), "low": interval.low, "high": interval.high}

    found = {"n": len(texts), "prompt_tokens": prompt_tokens, "max_new_tokens": max_new_tokens, "seed": seed,
             "settings": GENERATION, "stopped": share(stopped), "repetitive": share([value > 1 / 3 for value in repeated]),
             "mean_repetition": sum(repeated) / len(repeated), "replacement": share(["\ufffd" in text for text in texts]),
             "texts": texts}
    write_atomically(run_dir / "limitations.json", json.dumps(found, indent=1, ensure_ascii=False))
    return found
