"""The chips of the demo: temperature, top_p, repetition penalty and tokens from the cards' ranges.

The Stentor3 card names its chips Creative, Balanced and Focused and prints no values: here they are
the ends and the favourites of each card's own recommended ranges.
"""
from __future__ import annotations

NAMES = ("Creative", "Balanced", "Focused")
# {family: (card, {chip: (temperature, top_p, repetition penalty, new tokens)})}
_BY_FAMILY = {
    "stentor2-12m-preview": ("Stentor2-12M-Preview", {
        "Creative": (1.2, 0.8, 1.15, 60), "Balanced": (0.9, 0.65, 1.15, 50),
        "Focused": (0.65, 0.5, 1.15, 40)}),
    "stentor2": ("Stentor2-12M", {
        "Creative": (0.9, 0.8, 1.1, 200), "Balanced": (0.8, 0.7, 1.2, 100),
        "Focused": (0.6, 0.6, 1.2, 60)}),
    "stentor3": ("Stentor3-20M", {
        "Creative": (0.8, 0.9, 1.15, 200), "Balanced": (0.6, 0.85, 1.25, 200),
        "Focused": (0.5, 0.8, 1.25, 80)}),
    "stentor-12m-instruct": ("Stentor-12M-Instruct", {
        "Creative": (1.5, 0.9, 1.3, 120), "Balanced": (1.1, 0.6, 1.3, 80),
        "Focused": (0.6, 0.5, 1.3, 80)}),
    "stentor-big": ("Stentor-Big", {
        "Creative": (0.8, 0.9, 1.1, 120), "Balanced": (0.5, 0.9, 1.1, 80),
        "Focused": (0.3, 0.9, 1.1, 60)}),
}


def preset(chip: str, recipe: str) -> tuple[tuple[float, float, float, int], str]:
    """((temperature, top_p, repetition penalty, new tokens), the card whose ranges they are from).

    recipe: that of the model, such as "stentor2-12m"; the Stentor2-12M card's for all others.
    """
    family = next((name for name in _BY_FAMILY if recipe.startswith(name)), "stentor2")
    card, chips = _BY_FAMILY[family]
    return chips[chip], card
