"""A written ONNX graph in onnxruntime, on the CPU: see `onnx_files` for its inputs and outputs."""
from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np

from stentor.export.packages import require


class OnnxModel:
    """A written graph in onnxruntime, on the CPU."""

    def __init__(self, file, *, threads: int | None = None):
        require("onnxruntime")
        import onnxruntime
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or os.cpu_count()
        self.session = onnxruntime.InferenceSession(str(file), options, ["CPUExecutionProvider"])
        self.past = {entry.name: entry.shape for entry in self.session.get_inputs()[1:]}
        about = json.loads((Path(file).parent / "model.json").read_text())
        self.eos = about["eos_token_id"]

    def empty_cache(self) -> dict[str, np.ndarray]:
        return {name: np.zeros((1, shape[1], 0, shape[3]), np.float32)
                for name, shape in self.past.items()}

    def step(self, ids: list[int], cache: dict) -> tuple[np.ndarray, dict]:
        """(logits (new, rows), the cache with `ids` in it)."""
        logits, *present = self.session.run(None, {"input_ids": np.array([ids], np.int64), **cache})
        return logits[0], dict(zip(self.past, present))

    def greedy(self, ids: list[int], new_tokens: int) -> list[int]:
        """The likeliest continuation, up to `new_tokens` ids, EOS left out."""
        cache, found, ids = self.empty_cache(), [], list(ids)
        for _ in range(new_tokens):
            logits, cache = self.step(ids, cache)
            ids = [int(logits[-1].argmax())]
            if ids[0] == self.eos:
                break
            found += ids
        return found

    def log_probabilities(self, ids: list[int]) -> np.ndarray:
        """float32 (len(ids), rows): after each beginning of `ids`, the log probability of each token."""
        logits = self.step(ids, self.empty_cache())[0]
        logits = logits - logits.max(-1, keepdims=True)
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    def losses(self, ids: list[int]) -> np.ndarray:
        """float32 (len(ids) - 1,): nats of each token after the first."""
        return -self.log_probabilities(ids)[np.arange(len(ids) - 1), ids[1:]]

    def close(self) -> None:
        self.session = None
