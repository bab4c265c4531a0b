"""Evaluation on a CPU keeps no tensor of a batch, however small, when the next one begins."""
import gc

import numpy as np
import torch

import stentor_utils as su


def test_evaluation_keeps_no_tensor_of_the_batches_before():
    """Training's pages are never given back (stentor/process.py), so each small tensor that was kept lay where the next
    logits would have fitted: 200 batches could take 200 times the memory of their logits, 1.8 million tokens took 23 GB.
    Whether they do depends on the heap, so what is counted is tensors."""
    model = su.build_model(su.Shape(512, 16, 32, 1, 1, 1, 32))
    ids = np.random.default_rng(0).integers(0, 512, 20 * 4 * 32 + 1).astype("<u2")
    alive = []
    model.register_forward_pre_hook(
        lambda *_: alive.append(sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())))
    su.evaluate(model, ids, 1000, block_size=32, batch_size=4)
    assert len(alive) == 20
    assert max(alive[2:]) == min(alive[2:]), alive
