"""The sections of a model card that say what a model takes: memory to run it, energy to train it."""
from __future__ import annotations

from stentor.card.facts import Facts, NOT_MEASURED, cell, row, shape_from, shape_place
from stentor.files import duration
from stentor.shapes import WEIGHT_BYTES, kv_cache_bytes, weight_bytes

# Mean power draw that the energy estimate assumes where the caller names none, in watts for one
# device or core. cuda: board power limit of a T4 (NVIDIA T4 datasheet), so an upper bound; cpu: our
# guess. A v5e's is not published.
ASSUMED_WATTS = {"cuda": 70.0, "cpu": 10.0}
# Grams of CO2e for a kWh where the caller names none, and where that is from: the card prints 8 g
# for 24 minutes of two T4s, which at their power limit are 0.056 kWh.
ASSUMED_INTENSITY = (143.0, "what the Stentor-12M-Instruct card's 8 g for 24 minutes of two T4s "
                            "come to, western USA; where this run's machine stands is not known")
# Of each card: the seconds of training in its files (how to add them up, from what), the device
# that they were spent on, and the description of the machine.
TIMES = {
    "final": (lambda seconds: seconds, (("summary.json", "seconds"),),
              ("summary.json", "device"), "environment.json"),
    "instruct": (lambda rows, recipe, seeds: sum(
                     row["seconds"] for row in rows
                     if (row["recipe"], row["seed"]) == (recipe, seeds[0])),
                 tuple(("instruct/sft_summary.json", key) for key in ("phases", "deliver", "seeds")),
                 ("instruct/sft_summary.json", "profile"), "environment.json"),
    "growth": (lambda stages: sum(stage["seconds"] for stage in stages),
               (("growth/curriculum.json", "summaries"),),
               ("growth/curriculum.json", "summaries", 0, "device"),
               "growth/stage1/environment.json")}
COUNTED = {
    "final": "Counted is this model's training, all sessions; not its evaluation, nor runs that were "
             "thrown away.",
    "instruct": "Counted are the phases of the delivered recipe; not its base, nor the other recipe "
                "and seeds.",
    "growth": "Counted are the stages after growing; not the model that was grown, nor the trial."}


def assumed_watts(facts: Facts) -> tuple[float | None, str]:
    """(mean power draw in watts to assume for the run's device, the assumption in words); None
    where there is no basis."""
    _, _, where, machine = TIMES.get(facts.of, TIMES["final"])
    device = str(facts.get(*where) or "")
    processes = facts.get(*where[:-1], "processes") or 1
    cores = facts.get(machine, "cpu_count")
    if device.startswith(("cuda", "t4")):
        watts = ASSUMED_WATTS["cuda"]
        return watts * processes, (f"{watts:g} W for each of {processes} GPUs, the power limit of "
                                   "a T4; the rest of the machine not counted")
    if device == "cpu" and cores:
        watts = ASSUMED_WATTS["cpu"]
        return watts * cores, f"{watts:g} W for each of {cores} CPU cores, a guess"
    return None, "no figure for this device"


def memory(facts: Facts) -> str:
    """Weights and KV cache by precision, from the shape: calculated, and said to be so."""
    place = shape_place(facts)
    length = facts.derive(lambda v: shape_from(v).max_position_embeddings, ",",
                          "max_position_embeddings", place)
    lines = ["## Memory to run it", "",
             f"Calculated from the shape, in MB; the cache is that of one sequence of {length} "
             "tokens, the whole context.", "",
             "| weights | weights | cache | together |", "|---|---|---|---|"]
    for precision in WEIGHT_BYTES:
        element = 4 if precision == "fp32" else 2     # of the cache: quantising the weights leaves it

        def weights(values, precision=precision):
            return weight_bytes(shape_from(values), precision) / 1e6

        def cache(values, element=element):
            shape = shape_from(values)
            return kv_cache_bytes(shape, shape.max_position_embeddings, element) / 1e6
        one, two, both = (facts.derive(compute, ",.1f", f"{what}, {precision}, MB", place)
                          for what, compute in (
                              ("weight_bytes(shape)", weights), ("kv_cache_bytes(shape)", cache),
                              ("weights and cache", lambda v: weights(v) + cache(v))))
        title = facts.mark(precision, "stentor/shapes.py", "WEIGHT_BYTES (its name)")
        lines.append(row(title, one, two, both))
    return "\n".join([*lines, "", """A quantised row is what bitsandbytes makes of it: it replaces \
the layers' linear weights only, so the embedding
stays as it is. Activations, the framework itself and training come on top."""]) + "\n"


def resources(facts: Facts) -> str:
    """Hardware, time, and energy and carbon as estimates with their assumptions."""
    total, spent, device, machine = TIMES[facts.of]
    watts, grams = ((facts.record, "parameters", key) for key in ("watts", "grams_per_kwh"))
    energy = facts.derive(lambda watts, *of: watts * total(*of) / 3_600_000, ".3g",
                          "watts × seconds / 3,600,000", watts, *spent)
    carbon = facts.derive(
        lambda watts, grams, *of: grams * watts * total(*of) / 3_600_000, ".3g",
        "grams_per_kwh × watts × seconds / 3,600,000", watts, grams, *spent)
    packages = ", ".join(f"{name} {facts.show(machine, 'packages', name, form=cell)}"
                         for name in ("torch", "transformers", "accelerate", "torch_xla")
                         if facts.get(machine, "packages", name))
    return f"""## Hardware, time, energy

| | |
|---|---|
| device | {facts.show(*device, form=cell)} |
| processes | {facts.show(*device[:-1], "processes")} |
| GPUs in the machine | {facts.show(machine, "gpus")} |
| CPU | {facts.show(machine, "cpu", form=cell)} |
| CPU cores | {facts.show(machine, "cpu_count")} |
| Python | {facts.show(machine, "python", form=cell)} |
| packages | {packages or NOT_MEASURED} |
| training time | {facts.derive(total, duration, "seconds", *spent)} |
| tokens per second, median | {facts.show(*device[:-1], "tokens_per_second", form=",.0f")} |
| energy, estimated | {energy} kWh |
| carbon dioxide equivalent, estimated | {carbon} g |

Energy = watts × seconds / 3,600,000, an estimate and no meter's reading: \
{facts.derive(total, ",.0f", "seconds, in full", *spent)} s at an
assumed mean of {facts.show(*watts, form=",g")} W \
({facts.show(facts.record, "parameters", "watts_are", form=cell)}). Carbon: that energy at an assumed
{facts.show(*grams, form=",g")} g for a kWh \
({facts.show(facts.record, "parameters", "grams_are", form=cell)}). {COUNTED[facts.of]}
"""
