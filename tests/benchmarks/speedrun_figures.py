"""What the runs of a speedrun come to: pure functions of their results, and the tables and the picture of them."""
import math
import statistics
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import stentor_utils as su  # noqa: E402
from stentor.statistics import bootstrap  # noqa: E402

TITLES = {"card": "card's recipe, our loop", "card-own-rate": "the same at 4e-3, the rate that suits the twin",
          "ours": "ours", "trainer": "card's recipe, transformers.Trainer (FP32, its default)",
          "trainer-bf16": "card's recipe, transformers.Trainer in bf16", "nanochat": "nanochat's model and optimiser"}


# What the figures come to.


def tokens_to(losses: dict[int, float], target: float) -> float:
    """Tokens at which the loss meets `target`: log(tokens) interpolated between the two runs around it.

    losses: {tokens: loss at the end of a run of so many}. The smallest run where that meets it already ("at most so
    many"); inf where none does.
    """
    met = [tokens for tokens in sorted(losses) if losses[tokens] <= target]
    if not met:
        return math.inf
    below = [tokens for tokens in losses if tokens < met[0]]
    if not below:
        return met[0]
    low, high = max(below), met[0]
    part = (losses[low] - target) / (losses[low] - losses[high])
    return math.exp(math.log(low) + part * (math.log(high) - math.log(low)))


def value_at(values: dict[int, float], tokens: float) -> float:
    """A straight line between the two runs around `tokens`: of their seconds, say. inf beyond the last."""
    if tokens > max(values):
        return math.inf
    at = sorted(values)
    return float(np.interp(tokens, at, [values[n] for n in at]))


def bisected(loss_at, budgets: list[int], target: float) -> dict[int, float]:
    """{tokens: loss} of the runs that find the neighbours of `target` among `budgets`, ascending; the loss must fall with
    the tokens. loss_at(tokens) trains."""
    losses, low, high = {}, -1, len(budgets)
    while high - low > 1:
        middle = (low + high) // 2
        losses[budgets[middle]] = loss_at(budgets[middle])
        low, high = (low, middle) if losses[budgets[middle]] <= target else (middle, high)
    return losses


def interval(values: list[float | None], form: str = "{:.3f}") -> str:
    """"0.312 (0.300 to 0.330; n = 5)": mean and 95% bootstrap; of one value, that it is one. None was not measured."""
    values = [value for value in values if value is not None]
    if not values:
        return ""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return "not reached"
    missed = f"; {len(values) - len(finite)} never" if len(finite) < len(values) else ""
    mean = form.format(statistics.mean(finite))
    if len(finite) == 1:
        return f"{mean} (one seed{missed})"
    low, high = (form.format(end) for end in bootstrap(finite, 4000))
    return f"{mean} ({low} to {high}; n = {len(finite)}{missed})"


# The report: pure functions of the runs.


def of(runs, who: str, **where) -> list[dict]:
    return [run for run in runs if run["who"] == who and all(run[key] == value for key, value in where.items())]


def ratio(runs, card: dict) -> dict:
    """Ours against one run of the card's recipe, of the same seed and width: shares of its tokens and of its time."""
    ours = of(runs, "ours", seed=card["seed"], width=card["width"])
    tokens = tokens_to({run["tokens"]: run["eval_loss"] for run in ours}, card["eval_loss"])
    timed = [run for run in ours if run["seconds"] is not None]
    seconds = value_at({run["tokens"]: run["seconds"] for run in timed}, tokens) if timed else None
    return {"seed": card["seed"], "width": card["width"], "parameters": card["parameters"], "target": card["eval_loss"],
            "bits_per_byte": card["bits_per_byte"], "tokens": tokens, "share": tokens / card["tokens"], "seconds": seconds,
            "at_most": tokens == min(run["tokens"] for run in ours)}


def summarised(runs: list[dict], tokens: int, test_width: int = 0) -> dict:
    """{"ratios", "to_own_rate", "times", "away", "tried", "rates"}: see `ratio`, `changes` and `best_rates`.

    times: seconds of each contestant to the target, and ours' share of them, by seed.
    """
    def against(who):
        cards = of(runs, who, budget=tokens)
        return [ratio(runs, card) for card in cards if of(runs, "ours", seed=card["seed"], width=card["width"])]
    ratios, times = against("card"), []
    for row in ratios:
        if row["seconds"] is None:
            continue
        times.append({"who": "ours", **row, "share": 1.0})
        for who in ("card", "trainer", "trainer-bf16"):
            times += [{"who": who, "seed": row["seed"], "width": row["width"], "seconds": run["seconds"],
                       "eval_loss": run["eval_loss"], "share": row["seconds"] / run["seconds"]}
                      for run in of(runs, who, seed=row["seed"], width=row["width"], budget=tokens) if run["seconds"]]
    return {"ratios": ratios, "to_own_rate": against("card-own-rate"), "times": times,
            "away": changes(runs, "without "), "tried": changes(runs, "with "),
            "rates": {name: best_rates(runs, name, test_width) for name in ("matrix_learning_rate", "learning_rate")}}


def changes(runs: list[dict], kind: str) -> dict[str, list[dict]]:
    """{what was changed, named after the word `kind`: [{"seed", "tokens", "bits_per_byte", "seconds"}]}, the last two as
    more than ours of the same seed and tokens."""
    found = {}
    for run in runs:
        if run["who"].startswith(kind):
            ours = of(runs, "ours", seed=run["seed"], width=run["width"], budget=run["budget"])[0]
            times = run["seconds"], ours["seconds"]
            found.setdefault(run["who"].removeprefix(kind), []).append(
                {"seed": run["seed"], "tokens": run["tokens"], "bits_per_byte": run["bits_per_byte"] - ours["bits_per_byte"],
                 "seconds": None if None in times else times[0] - times[1]})
    return found


def best_rates(runs: list[dict], name: str, test_width: int) -> dict:
    """How the best rate goes with the width: {"rows", "power", "predicted", "power_of_rule"}.

    rows: {"width", "seed", "rate": the rule's, "best", "lost"} of each width and seed that has half, once and double the rate:
    `best` is where a parabola through the three losses over log(rate) is least (at most a factor of 3 away), `lost` the bits
    per byte that the rule's rate is above that. power: of the width in `best`, without test_width; predicted: by that power
    for test_width; power_of_rule: of the width in the rule's own rates.
    """
    rows = []
    for run in of(runs, f"{name} x 0.5"):
        same = {key: run[key] for key in ("seed", "width", "budget")}
        three = [run, *of(runs, "ours", **same), *of(runs, f"{name} x 2", **same)]
        if len(three) == 3:
            a, b, c = np.polyfit([-1, 0, 1], [one["bits_per_byte"] for one in three], 2)
            least = float(np.clip(-b / (2 * a), -1.5, 1.5)) if a > 0 else min((-1, 0, 1), key=lambda x: a * x * x + b * x)
            rows.append({"width": run["width"], "seed": run["seed"], "rate": 2 * run[name], "best": 2 * run[name] * 2 ** least,
                         "lost": float(c - np.polyval([a, b, c], least))})
    fitted = [row for row in rows if row["width"] != test_width]
    if len({row["width"] for row in fitted}) < 2:
        return {"rows": rows, "power": None, "predicted": None, "power_of_rule": None}
    widths = np.log([row["width"] for row in fitted])
    power, at_one = np.polyfit(widths, np.log([row["best"] for row in fitted]), 1)
    own, _ = np.polyfit(widths, np.log([row["rate"] for row in fitted]), 1)
    predicted = float(np.exp(at_one) * test_width ** power) if test_width else None
    return {"rows": rows, "power": float(power), "predicted": predicted, "power_of_rule": float(own)}


def table(head: list[str], rows: list[list]) -> str:
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in [head, ["---"] * len(head), *rows])


def means(rows: list[dict], key: str, form: str = "{:.3f}") -> str:
    return interval([row[key] for row in rows], form)


def markdown(report: dict) -> str:
    """The tables of docs/results.md, every seed listed."""
    machine = f"{report['machine']['cpu']}, {report['machine']['cpu_count']} cores"
    parts = [f"The speedrun (`make speedrun`): to the evaluation loss of the card's recipe after {report['tokens']:,} tokens; "
             f"means with 95% intervals over seeds; {machine}:"]
    here = {key: [row for row in report[key] if row["width"] == report["width"]]
            for key in ("ratios", "to_own_rate", "times")}
    if here["ratios"]:
        parts += target_tables(**here)
    draws = {who: of(report["runs"], who, width=report["width"], budget=report["seed_tokens"])
             for who in ("ours", "ours in FP32")}
    if any(draws.values()):
        parts.append(table([f"{report['seed_tokens']:,} tokens", "bits per byte", "max - min", "each seed"], [
            [who, means(runs, "bits_per_byte", "{:.4f}"), f"{np.ptp([run['bits_per_byte'] for run in runs]):.4f}",
             ", ".join(f"{run['seed']}: {run['bits_per_byte']:.4f}" for run in runs)] for who, runs in draws.items() if runs]))
    widths = sorted({row["width"] for row in report["ratios"]})
    if len(widths) > 1:
        of_width = {width: [row for row in report["ratios"] if row["width"] == width] for width in widths}
        parts.append(table(["hidden_size", "parameters", "share of the card's tokens"], [
            [width, f"{rows[0]['parameters']:,}", means(rows, "share")] for width, rows in of_width.items()]))
    for key, title in (("away", "taken away alone"), ("tried", "added alone")):
        if report[key]:
            parts.append(table([title, "tokens", "bits per byte more", "seconds more"], [
                [name, f"{rows[0]['tokens']:,}", means(rows, "bits_per_byte", "{:+.4f}"), means(rows, "seconds", "{:+.0f}")]
                for name, rows in report[key].items()]))
    for name, found in report["rates"].items():
        if found["rows"]:
            parts.append(rate_table(name, found))
    if nanochat := of(report["runs"], "nanochat", width=report["width"]):
        ours = [of(report["runs"], "ours", seed=run["seed"], width=run["width"], budget=run["budget"])[0] for run in nanochat]
        parts.append(table(["", "parameters", "tokens", "bits per byte", "seconds"], [
            [TITLES[who], f"{rows[0]['parameters']:,}", f"{rows[0]['tokens']:,}", means(rows, "bits_per_byte"),
             means(rows, "seconds", "{:.0f}")] for who, rows in (("nanochat", nanochat), ("ours", ours))]))
    return "\n\n".join(parts) + "\n"


def target_tables(ratios: list[dict], to_own_rate: list[dict], times: list[dict]) -> list[str]:
    """Tokens to each target with every seed, and the times to the card's."""
    rows = [[name, means(found, "bits_per_byte"), means(found, "share")] for name, found in (
        ("card's recipe", ratios), ("the same at 4e-3, with a schedule of its length", to_own_rate)) if found]
    each = ", ".join(f"seed {row['seed']}: {'at most ' if row['at_most'] else ''}{row['share']:.3f}" for row in ratios)
    names = list(dict.fromkeys(row["who"] for row in times))
    by_name = {who: [row for row in times if row["who"] == who] for who in names}
    return [table(["target", "its bits per byte", "share of its tokens that ours needs"], rows), f"Each: {each}.",
            table(["", "seconds to the target", "ours' share of them"], [
                [TITLES[who], means(found, "seconds", "{:.0f}"), means(found, "share")] for who, found in by_name.items()])]


def rate_table(name: str, found: dict) -> str:
    widths = sorted({row["width"] for row in found["rows"]})
    rows = {width: [row for row in found["rows"] if row["width"] == width] for width in widths}
    text = table([f"hidden_size, {name}", "by the rule", "best", "bits per byte lost by the rule"], [
        [width, f"{there[0]['rate']:.2g}", means(there, "best", "{:.2g}"), means(there, "lost", "{:.4f}")]
        for width, there in rows.items()])
    if found["power"] is None:
        return text
    return (f"{text}\n\nPower of the width: {found['power']:.2f} in the best rates, {found['power_of_rule']:.2f} in the "
            f"rule's; predicted for the width left out: {found['predicted']:.2g}.")


def draw(ratios: list[dict]):
    """The share of the card's tokens against the size of the model, a dot a seed."""
    figure, axes = su.charts.panels(6, 3.4)
    axes.plot([row["parameters"] for row in ratios], [100 * row["share"] for row in ratios], "o", color=su.charts.BLUE)
    axes.set(xscale="log", ylim=(0, None), xlabel="parameters",
             ylabel="% of the tokens", title="Tokens to the card recipe's final loss, of the card's")
    su.charts.short_ticks(axes.xaxis)
    return figure
