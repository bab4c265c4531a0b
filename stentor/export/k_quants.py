"""Q6_K and Q4_K, llama.cpp's K-quants, encoded with numpy: the gguf package decodes them, but does
not encode them.

Layout of a block of 256 weights: ggml-common.h of llama.cpp (block_q6_K, block_q4_K). The format is
theirs bit for bit; how scales are chosen is free, and here it is the plainest way: the largest
weight of each group decides its scale, where llama-quantize searches for a better one.
"""
from __future__ import annotations

import numpy as np

BLOCK = 256                                           # weights in one K-quant block: QK_K


def encode_q6_k(rows: np.ndarray) -> np.ndarray:
    """float32 (n, width) -> uint8 (n, width / 256 x 210): 6.5625 bits a weight.

    16 groups of 16 weights, each with an int8 scale; one fp16 scale for the block.
    """
    blocks = rows.reshape(-1, 16, 16)
    top = np.take_along_axis(blocks, np.abs(blocks).argmax(2)[..., None], 2)[..., 0]
    scale = top / -32                                 # the largest weight is exactly -32 of them
    whole = _fp16(_largest(scale) / -128)
    steps = np.clip(np.rint(_divide(scale, whole[:, None])), -128, 127)
    unit = whole[:, None] * steps
    quants = np.clip(np.rint(_divide(blocks, unit[..., None])), -32, 31) + 32
    quants = quants.reshape(-1, 2, 4, 32).astype(np.uint8)             # halves of 4 x 32
    low = np.concatenate([quants[:, :, 0] & 15 | (quants[:, :, 2] & 15) << 4,
                          quants[:, :, 1] & 15 | (quants[:, :, 3] & 15) << 4], axis=2)
    high = quants >> 4
    high = high[:, :, 0] | high[:, :, 1] << 2 | high[:, :, 2] << 4 | high[:, :, 3] << 6
    packed = [low.reshape(len(low), 128), high.reshape(len(low), 64),
              steps.astype(np.int8).view(np.uint8), whole.astype("<f2")[:, None].view(np.uint8)]
    return np.concatenate(packed, axis=1).reshape(len(rows), -1)


def encode_q4_k(rows: np.ndarray) -> np.ndarray:
    """float32 (n, width) -> uint8 (n, width / 256 x 144): 4.5 bits a weight.

    8 groups of 32 weights, each with a 6-bit scale and a 6-bit minimum below zero; two fp16 scales
    for the block.
    """
    blocks = rows.reshape(-1, 8, 32)
    floor = np.minimum(blocks.min(2), 0)
    scale, lowest = (blocks.max(2) - floor) / 15, -floor
    whole, whole_low = _fp16(scale.max(1) / 63), _fp16(lowest.max(1) / 63)
    steps = np.clip(np.rint(_divide(scale, whole[:, None])), 0, 63).astype(np.uint8)
    lows = np.clip(np.rint(_divide(lowest, whole_low[:, None])), 0, 63).astype(np.uint8)
    unit, shift = whole[:, None] * steps, whole_low[:, None] * lows
    quants = np.rint(_divide(blocks + shift[..., None], unit[..., None]))
    quants = np.clip(quants, 0, 15).astype(np.uint8)
    packed = [whole.astype("<f2")[:, None].view(np.uint8),
              whole_low.astype("<f2")[:, None].view(np.uint8), _pack_6_bits(steps, lows),
              (quants[:, ::2] | quants[:, 1::2] << 4).reshape(len(blocks), 128)]
    return np.concatenate(packed, axis=1).reshape(len(rows), -1)


def _pack_6_bits(steps: np.ndarray, lows: np.ndarray) -> np.ndarray:
    """Two times eight 6-bit numbers in 12 bytes, as get_scale_min_k4 of ggml reads them."""
    return np.concatenate([
        steps[:, :4] | (steps[:, 4:] >> 4) << 6, lows[:, :4] | (lows[:, 4:] >> 4) << 6,
        steps[:, 4:] & 15 | (lows[:, 4:] & 15) << 4], axis=1)


def _largest(values: np.ndarray) -> np.ndarray:
    """Of each row the value farthest from zero, with its sign."""
    return np.take_along_axis(values, np.abs(values).argmax(1)[:, None], 1)[:, 0]


def _fp16(values: np.ndarray) -> np.ndarray:
    """As they will be read back: rounded to fp16."""
    return values.astype(np.float16).astype(np.float32)


def _divide(values: np.ndarray, by: np.ndarray) -> np.ndarray:
    return np.divide(values, by, out=np.zeros(np.broadcast_shapes(values.shape, by.shape)),
                     where=by != 0)
