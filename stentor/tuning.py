"""The learning rates of the tuned recipes, by a rule of the shape alone."""
from __future__ import annotations

from stentor.shapes import Shape


def tuned_rates(shape: Shape) -> dict[str, float]:
    """The fields of a recipe that are rates: AdamW's for embedding, head and norms, Muon's for the
    matrices of the layers."""
    return {"learning_rate": 4e-3, "matrix_learning_rate": 5e-3}
