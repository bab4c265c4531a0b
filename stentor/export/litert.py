"""`make litert`: a model for phones, a .tflite file, in an environment of its own (litert-torch, 6.6 GB).

    .venv-litert/bin/python -m stentor.export.litert FOLDER FILE [LENGTH]

The graph takes `LENGTH` token ids at once, int32 (1, LENGTH), and gives the logits of all of them, fp32. It
has no cache: behind the text stands padding, which a causal model does not look back at, and each new token
is another pass. The file is checked against transformers by greedy continuations before it is kept.
"""
from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

from stentor.files import StentorError, remove
from stentor.folders import load_model

CHECKED = 10                                          # prompts, of 6 ids each
NEW_TOKENS = 16


class Whole(nn.Module):
    """ids (1, length) -> logits (1, length, rows)."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(input_ids=ids.long(), use_cache=False).logits


def write_litert(source, file, length: int = 128) -> dict:
    """`file`, the model of the folder `source` as LiteRT: {"bytes", "greedy_equal", "of"}.

    Raises StentorError where its continuations are not transformers', and keeps no file then.
    """
    import litert_torch
    model = load_model(source, dtype=torch.float32, attn_implementation="eager").eval()
    length = min(length, model.config.max_position_embeddings)
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.stem}.{os.getpid()}.tflite")
    try:
        converted = litert_torch.convert(Whole(model), (torch.zeros(1, length, dtype=torch.int32),))
        converted.export(str(temporary))
        run = open_litert(temporary)
        generator = np.random.default_rng(0)
        prompts = generator.integers(0, model.config.vocab_size - 2, (CHECKED, 6)).tolist()
        wanted = [greedy(lambda ids: model(torch.tensor([ids])).logits[0].numpy(), ids) for ids in prompts]
        equal = sum(greedy(lambda ids: run(ids, length), ids) == want
                    for ids, want in zip(prompts, wanted))
        if equal < CHECKED:
            raise StentorError(f"{file.name} continues {equal} of {CHECKED} prompts as transformers does.")
        os.replace(temporary, file)
    finally:
        remove(temporary)
    return {"bytes": file.stat().st_size, "greedy_equal": equal, "of": CHECKED, "length": length}


def open_litert(file):
    """(ids, length) -> logits (len(ids), rows), by ai_edge_litert's interpreter."""
    from ai_edge_litert.interpreter import Interpreter
    interpreter = Interpreter(model_path=str(file))
    interpreter.allocate_tensors()
    into, out = interpreter.get_input_details()[0], interpreter.get_output_details()[0]

    def run(ids: list[int], length: int) -> np.ndarray:
        padded = np.zeros((1, length), np.int32)
        padded[0, :len(ids)] = ids
        interpreter.set_tensor(into["index"], padded)
        interpreter.invoke()
        return interpreter.get_tensor(out["index"])[0, :len(ids)]
    return run


@torch.inference_mode()
def greedy(logits, ids: list[int], new_tokens: int = NEW_TOKENS) -> list[int]:
    """The likeliest continuation by whole passes; EOS is a token like any other here."""
    ids = list(ids)
    for _ in range(new_tokens):
        ids.append(int(logits(ids)[-1].argmax()))
    return ids[-new_tokens:]


if __name__ == "__main__":
    print(write_litert(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:4])))
