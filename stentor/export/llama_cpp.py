"""llama.cpp, from xllamacpp's wheel, fed with ids: what a GGUF file says, token by token."""
from __future__ import annotations

import json
import os
import urllib.request

import numpy as np

from stentor.export.packages import require


class LlamaCpp:
    """A GGUF file in llama.cpp's own server, in this process.

    exact: keys and values in fp32 and no flash attention, so that nothing but the order of additions
    differs from transformers; False: llama.cpp's defaults (an fp16 cache). It listens on a port of the
    loopback until `close`.
    """

    def __init__(self, file, *, context: int, threads: int | None = None, exact: bool = True):
        require("xllamacpp")
        import xllamacpp
        settings = xllamacpp.CommonParams()
        settings.model.path = str(file)
        settings.n_ctx, settings.n_parallel, settings.warmup = context, 1, False
        settings.verbosity = -1                       # its log is a page a model
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = threads or os.cpu_count()
        if exact:
            settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
            settings.flash_attn_type = \
                xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.server, self.whole = xllamacpp.Server(settings), None

    @property
    def address(self) -> str:
        """http://127.0.0.1:port of its HTTP server."""
        return self.server.listening_address

    def close(self) -> None:
        self.server = None

    def tokenize(self, text: str) -> list[int]:
        """llama.cpp's own ids of a text; of a file that must be fed, none."""
        return self._post("tokenize", {"content": text, "add_special": False,
                                       "parse_special": False})["tokens"]

    def _post(self, path: str, body: dict) -> dict:
        asked = urllib.request.Request(f"{self.address}/{path}", json.dumps(body).encode(),
                                       {"Content-Type": "application/json"})
        with urllib.request.urlopen(asked) as answer:
            return json.load(answer)

    def greedy(self, ids: list[int], new_tokens: int) -> list[int]:
        """The likeliest continuation, up to `new_tokens` ids, EOS left out."""
        answer = self._post("completion", self._settings(ids, new_tokens, 0, return_tokens=True))
        found = answer["tokens"]
        return found[:-1] if answer["stop_type"] == "eos" else found

    def log_probabilities(self, ids: list[int]) -> np.ndarray:
        """float32 (len(ids), rows): after each beginning of `ids`, the log probability of each token."""
        return np.stack([self._row(ids[:end]) for end in range(1, len(ids) + 1)])

    def losses(self, ids: list[int]) -> np.ndarray:
        """float32 (len(ids) - 1,): nats of each token after the first.

        A bias makes the sampler take the text's own token, and the server reports what that had
        before any bias: 1 ms a token, where all of 4,096 probabilities took 50. A token that ends
        within a character it does not report; there the whole row is asked for.
        """
        found = []
        for end in range(1, len(ids)):
            entries = self._complete(ids[:end], 1, logit_bias=[[int(ids[end]), 1e6]])
            assert not entries or entries[0]["id"] == ids[end]
            found.append(entries[0]["logprob"] if entries else self._row(ids[:end])[ids[end]])
        return -np.array(found, np.float32)

    def _row(self, ids: list[int]) -> np.ndarray:
        """float32 (rows,): the log probability of each token after `ids`."""
        if self.whole is None:                        # a token that ends a character, to be reported
            self.whole = [[self.tokenize("a")[0], 1e6]] if self.tokenize("a") else []
        entry, = self._complete(ids, 1 << 20, logit_bias=self.whole)
        row = np.empty(len(entry["top_logprobs"]), np.float32)
        row[[token["id"] for token in entry["top_logprobs"]]] = \
            [token["logprob"] for token in entry["top_logprobs"]]
        return row

    def _settings(self, ids: list[int], new_tokens: int, top: int, **more) -> dict:
        return {"prompt": list(map(int, ids)), "n_predict": new_tokens, "temperature": 0, "top_k": 1,
                "samplers": ["top_k"], "repeat_penalty": 1.0, "n_probs": top,
                "cache_prompt": top > 0, **more}

    def _complete(self, ids: list[int], top: int, **more) -> list[dict]:
        """What is reported of one more token: at most one entry."""
        answer = self.server.handle_completions(self._settings(ids, 1, top, **more))
        if "choices" not in answer:
            raise RuntimeError(f"llama.cpp: {str(answer)[:200]}")
        return (answer["choices"][0]["logprobs"] or {"content": []})["content"]
