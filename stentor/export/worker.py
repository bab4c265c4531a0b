"""`python -m stentor.export.worker spec.json`: one format measured in a process of its own.

Its memory is then its own, and a runtime that aborts takes nothing along. spec.json: {"form", "path",
"prompts", "new_tokens", "windows", "kept", "context", "threads", "out"}; written are `out` (JSON) and
beside it, as .f32, the log probabilities of the first `kept` windows.
"""
from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import numpy as np

from stentor.export.runners import load_runtime, open_runner
from stentor.files import write_atomically
from stentor.process import peak_memory
from stentor.speed import generation_speed


def measure(spec: dict) -> dict:
    """{"greedy": ids of each prompt, "nats": of each window, "load_seconds", "speed"}; of the memory in
    it, what loading and generating added to the process at its highest."""
    load_runtime(spec["form"])
    before = resident()
    started = time.perf_counter()
    runner = open_runner(spec["form"], spec["path"], context=spec["context"], threads=spec["threads"])
    loaded = time.perf_counter() - started
    found = {"form": spec["form"], "load_seconds": loaded, "threads": spec["threads"]}
    said = {}

    def generate(ids: list[int], new_tokens: int) -> list[int]:
        new = runner.greedy(ids, new_tokens)
        if new_tokens == spec["new_tokens"]:
            said[tuple(ids)] = new
        return new
    found["speed"] = generation_speed(generate, spec["prompts"], spec["new_tokens"])
    if not getattr(runner, "on_gpu", False):          # else torch's own peak of the GPU it is on
        found["speed"]["memory_bytes"] = max(0, peak_memory() - before)
    found["greedy"] = [said[tuple(ids)] for ids in spec["prompts"]]
    found["nats"] = [float(np.sum(runner.losses(ids), dtype=np.float64)) for ids in spec["windows"]]
    kept = [runner.log_probabilities(ids)[:-1] for ids in spec["windows"][:spec["kept"]]]
    np.concatenate(kept).astype("<f4").tofile(Path(spec["out"]).with_suffix(".f32"))
    runner.close()
    return found


def resident() -> int:
    """Bytes of this process in memory now; where the system has no /proc, at its highest so far."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return peak_memory()
    return pages * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    asked = json.loads(Path(sys.argv[1]).read_text())
    write_atomically(asked["out"], json.dumps(measure(asked)))
