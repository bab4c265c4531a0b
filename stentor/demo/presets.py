"""The chips of the demo, from the inference guide: what each sets, and whose card it is from."""
from __future__ import annotations

from stentor.inference import PRESETS as NAMES
from stentor.inference import guide_for, presets


def preset(chip: str, recipe: str) -> tuple[tuple[float, float, float, int], str]:
    """((temperature, top_p, repetition penalty, new tokens), the card whose ranges they are from).

    chip: one of NAMES. recipe: that of the model, such as "stentor2-12m"; "" for none that is known.
    """
    settings = presets(recipe)[chip]
    return (settings["temperature"], settings["top_p"], settings["repetition_penalty"],
            settings["max_new_tokens"]), guide_for(recipe)[0].card


__all__ = ["NAMES", "preset"]
