"""What generation costs, and how often it breaks a character."""
from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

from stentor.process import peak_memory


def generation_speed(generate: Callable[[list[int], int], list[int]], prompts: list[list[int]],
                     new_tokens: int) -> dict:
    """Tokens per second and per CPU-second, seconds to the first token, and peak memory.

    generate(ids, n): the new ids alone, at most n; any runtime. The first call is not counted
    (compilers, caches). first_token_seconds: median of the prompts, generate(ids, 1).
    cpu_seconds: of every thread of this process. memory_bytes: the highest resident size of this
    process so far, and on a GPU torch's peak of these calls.
    """
    torch = sys.modules.get("torch")                  # importing it takes 200 MB of what is measured
    gpu = torch is not None and torch.cuda.is_available()
    generate(prompts[0], 2)
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    first = []
    for ids in prompts:
        begun = time.perf_counter()
        generate(ids, 1)
        first.append(time.perf_counter() - begun)
    begun, cpu = time.perf_counter(), time.process_time()
    made = sum(len(generate(ids, new_tokens)) for ids in prompts)
    seconds, cpu = time.perf_counter() - begun, time.process_time() - cpu
    return {"tokens": made, "tokens_per_second": made / seconds,
            "tokens_per_cpu_second": made / cpu, "cpu_seconds": cpu, "seconds": seconds,
            "first_token_seconds": statistics.median(first),
            "memory_bytes": torch.cuda.max_memory_allocated() if gpu else peak_memory()}


def replacement_rate(model, tokenizer, prompts: list[str], settings: list[dict], *,
                     max_new_tokens: int = 60, seed: int = 42) -> list[dict]:
    """How many continuations hold a U+FFFD (broken UTF-8) under each of `settings`.

    One continuation of each prompt. Rows: the setting, hits, n, share with its 95% Wilson interval
    (low, high). S2's card says that it rises below temperature or top_p 0.6.
    """
    from stentor.model import generate
    from stentor.statistics import proportion
    rows = []
    for setting in settings:
        texts = generate(model, tokenizer, list(prompts), max_new_tokens=max_new_tokens, seed=seed,
                         **setting)
        hits = sum("\ufffd" in text for text in texts)
        rows.append({**setting, "hits": hits, "n": len(texts), **proportion(hits, len(texts))})
    return rows
