"""One way to ask each format: a runner has `greedy(ids, n)`, `losses(ids)`, `log_probabilities(ids)`, `close()`.

greedy: up to n new ids, the likeliest each time, EOS left out. losses: float32 (len(ids) - 1,), nats of
each token after the first. log_probabilities: float32 (len(ids), rows), after each beginning of ids.
"""
from __future__ import annotations

from pathlib import Path

import numpy as np


class Transformers:
    """A model of transformers, greedy whatever its folder recommends."""

    def __init__(self, model):
        import torch
        from transformers import GenerationConfig
        self.torch, self.model = torch, model.eval()
        self.on_gpu = self.model.device.type == "cuda"
        ends = model.generation_config
        self.eos = ends.eos_token_id
        model.generation_config = GenerationConfig(eos_token_id=self.eos, pad_token_id=ends.pad_token_id)

    def greedy(self, ids: list[int], new_tokens: int) -> list[int]:
        ids = self.torch.tensor([ids], device=self.model.device)
        with self.torch.inference_mode():
            out = self.model.generate(ids, attention_mask=self.torch.ones_like(ids), use_cache=True,
                                      do_sample=False, max_new_tokens=new_tokens)
        found = out[0, ids.shape[1]:].tolist()
        ends = self.eos if isinstance(self.eos, list) else [self.eos]
        return found[:-1] if found and found[-1] in ends else found

    def log_probabilities(self, ids: list[int]) -> np.ndarray:
        with self.torch.inference_mode():
            logits = self.model(self.torch.tensor([ids], device=self.model.device)).logits[0]
        return self.torch.log_softmax(logits.float(), -1).cpu().numpy()

    def losses(self, ids: list[int]) -> np.ndarray:
        return -self.log_probabilities(ids)[np.arange(len(ids) - 1), ids[1:]]

    def close(self) -> None:
        self.model = None


def load_runtime(form: str) -> None:
    """Import what a format runs on, so that the memory measured after it is the model's."""
    if form.startswith("gguf"):
        import xllamacpp                              # noqa: F401
    elif form.startswith("onnx"):
        import onnxruntime                            # noqa: F401
    else:
        import stentor.folders                        # noqa: F401
        from transformers import GenerationConfig, LlamaForCausalLM, Qwen3ForCausalLM      # noqa: F401


def open_runner(form: str, path, *, context: int, threads: int):
    """The runner of a format: `path` is what `formats.write_format` says."""
    if form.startswith("gguf"):
        from stentor.export.llama_cpp import LlamaCpp
        return LlamaCpp(path, context=context, threads=threads)
    if form.startswith("onnx"):
        from stentor.export.onnx_model import OnnxModel
        return OnnxModel(path, threads=threads)
    import torch

    from stentor.export.quantised import load_dynamic_int8
    from stentor.folders import load_model
    torch.set_num_threads(threads)
    if form.startswith("int8-dynamic"):
        return Transformers(load_dynamic_int8(path, head=form.endswith("head")))
    model = load_model(Path(path))
    device = "cuda" if form == "int4-torchao" else None
    return Transformers(model.to(device) if device else model)
