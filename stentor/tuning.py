"""The learning rates of the tuned recipes, by a rule of the shape alone.

Found at a width of 128 (1.4M parameters) and carried to others by width ** -1/2. Muon's update,
scaled by 0.2 x sqrt(width), has a spectral norm of that times the rate, and the spectral condition
for feature learning (Yang, Simon and Bernstein 2023) wants it the same at every width. AdamW's rate
for embedding and head follows the same power, as in nanochat (Karpathy 2025).
"""
from __future__ import annotations

from stentor.shapes import Shape

WIDTH = 128                                           # where the rates below were swept
ADAMW_RATE, MUON_RATE = 2e-2, 5e-3


def tuned_rates(shape: Shape) -> dict[str, float]:
    """The fields of a recipe that are rates: AdamW's for embedding, head and norms, Muon's for the
    matrices of the layers."""
    factor = (WIDTH / shape.hidden_size) ** 0.5
    rates = {"learning_rate": ADAMW_RATE * factor, "matrix_learning_rate": MUON_RATE * factor}
    return {name: float(f"{rate:.3g}") for name, rate in rates.items()}
