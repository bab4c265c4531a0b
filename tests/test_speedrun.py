"""The speedrun: what its figures come to, that the rival is the same recipe, and a whole one of a minute."""
import dataclasses
import json
import math
import os
import subprocess
import sys

import pytest

import stentor_utils as su
from conftest import REPO

sys.path.insert(0, str(REPO / "tests/benchmarks"))
import speedrun  # noqa: E402
import speedrun_contestants  # noqa: E402
import speedrun_figures as figures  # noqa: E402


def loss_after(tokens):
    """A run's end that is a straight line in log(tokens), as between two neighbours it nearly is."""
    return 9.0 - 0.4 * math.log(tokens)


BUDGETS = [100_000, 140_000, 200_000, 300_000, 400_000, 1_000_000]


@pytest.mark.parametrize("wanted", [110_000, 200_000, 333_333, 999_000])
def test_bisection_finds_the_tokens_of_the_target(wanted):
    trained = []
    losses = figures.bisected(lambda n: trained.append(n) or loss_after(n), BUDGETS, loss_after(wanted))
    assert len(trained) == len(set(trained)) <= 3          # of six
    assert figures.tokens_to(losses, loss_after(wanted)) == pytest.approx(wanted)


def test_a_target_outside_the_budgets():
    assert figures.bisected(loss_after, BUDGETS, loss_after(90_000)).keys() >= {100_000}
    assert figures.tokens_to({100_000: 4.0, 200_000: 3.9}, 4.5) == 100_000          # at most so many
    losses = figures.bisected(loss_after, BUDGETS, loss_after(2_000_000))
    assert max(losses) == 1_000_000 and figures.tokens_to(losses, loss_after(2_000_000)) == math.inf


def run_of(who, tokens, loss, seconds, seed=1, width=128):
    return {"who": who, "width": width, "seed": seed, "budget": tokens, "tokens": tokens, "parameters": 10_000 * width,
            "matrix_parameters": 5_000, "eval_loss": loss, "bits_per_byte": loss / 3, "seconds": seconds}


def made_runs():
    """Two seeds at two widths: ours meets the card's loss at 1/4 and 1/5 of its tokens, and of its time."""
    for width in (64, 128):
        for seed, share in ((1, 1 / 4), (2, 1 / 5)):
            target = loss_after(share * 1_000_000)
            yield run_of("card", 1_000_000, target, 1000.0, seed, width)
            yield run_of("trainer", 1_000_000, target, 2000.0, seed, width)
            for tokens in (150_000, 400_000, 1_000_000):
                yield run_of("ours", tokens, loss_after(tokens), tokens / 1000, seed, width)
    yield run_of("without Muon", 400_000, loss_after(400_000) + 0.3, 390.0)


def test_the_figures_of_known_runs():
    found = figures.summarised(list(made_runs()), 1_000_000)
    assert [row["share"] for row in found["ratios"]] == pytest.approx([1 / 4, 1 / 5] * 2)
    shares = {(row["who"], row["seed"]): row["share"] for row in found["times"] if row["width"] == 128}
    assert shares["card", 1] == pytest.approx(1 / 4) and shares["trainer", 2] == pytest.approx(1 / 10)
    assert found["away"] == {"Muon": [{"seed": 1, "tokens": 400_000, "bits_per_byte": pytest.approx(0.1),
                                       "seconds": pytest.approx(-10)}]}
    text = figures.markdown({"machine": {"cpu": "a CPU", "cpu_count": 2}, "tokens": 1_000_000, "seed_tokens": 1_000_000,
                              "width": 128, **found,
                              "runs": list(made_runs())})
    assert "seed 1: 0.250, seed 2: 0.200" in text and "| Muon | 400,000 | +0.1000 (one seed) | -10 (one seed) |" in text
    each = [loss_after(1_000_000) / 3] * 2
    assert f"0.0000 | 1: {each[0]:.4f}, 2: {each[1]:.4f} |" in text
    assert "| 64 | 640,000 | 0.225 (0.200 to 0.250; n = 2) |" in text
    assert figures.draw(found["ratios"]).axes[0].lines[0].get_ydata() == pytest.approx([25, 20] * 2)


def test_runs_without_a_time_count_in_tokens_alone():
    """Seed 2 was run with --loss-only: its share of the tokens stays, of the time there is only seed 1."""
    runs = [run | {"seconds": None} if run["seed"] == 2 else run for run in made_runs()]
    found = figures.summarised(runs, 1_000_000)
    assert [row["share"] for row in found["ratios"]] == pytest.approx([1 / 4, 1 / 5] * 2)
    assert {row["seed"] for row in found["times"]} == {1} and found["times"][1]["share"] == pytest.approx(1 / 4)
    late = [run | {"seconds": None} if run["who"] == "without Muon" else run for run in made_runs()]
    changed = figures.summarised(late, 1_000_000)
    text = figures.markdown({"machine": {"cpu": "a CPU", "cpu_count": 2}, "tokens": 1_000_000, "seed_tokens": 1_000_000,
                             "width": 128, **changed, "runs": late})
    assert "| Muon | 400,000 | +0.1000 (one seed) |  |" in text


def test_the_power_of_known_rates():
    """Losses with their least at 4e-3 x (128 / width) ** 0.5, asked around 5e-3 at every width: found, and predicted."""
    runs = []
    for width in (64, 128, 192, 256):
        best = 4e-3 * (128 / width) ** 0.5
        for who, rate in (("matrix_learning_rate x 0.5", 2.5e-3), ("ours", 5e-3), ("matrix_learning_rate x 2", 1e-2)):
            loss = 4.0 + 0.1 * math.log2(rate / best) ** 2
            runs.append(run_of(who, 100_000, loss, 1.0, width=width) | {"matrix_learning_rate": rate})
    found = figures.best_rates(runs, "matrix_learning_rate", test_width=256)
    assert [row["best"] for row in found["rows"]] == pytest.approx([4e-3 * (128 / w) ** 0.5 for w in (64, 128, 192, 256)])
    assert found["power"] == pytest.approx(-0.5) and found["power_of_rule"] == pytest.approx(0, abs=1e-9)
    assert found["predicted"] == pytest.approx(4e-3 * 0.5 ** 0.5)
    assert found["rows"][1]["lost"] == pytest.approx(0.1 * math.log2(5 / 4) ** 2 / 3)
    assert "-0.50 in the best rates" in figures.rate_table("matrix_learning_rate", found)


def test_the_card_is_laid_out_as_it_was_trained():
    """The card's own rate, at 73% of its peak at the end as the Stentor2-12M card; what is ours is not in it."""
    card, own = (speedrun.card_recipe(4_000_000, 1, 128, own_rate=own) for own in (False, True))
    assert card.learning_rate == 8e-4 and card.optimizer is None and card.lr_scheduler_type == "cosine"
    published = su.RECIPES["stentor2-12m"]
    left = [recipe.learning_rate_at(recipe.total_steps - 1) / recipe.learning_rate for recipe in (card, published)]
    assert left[0] == pytest.approx(left[1], abs=0.002) and left[0] == pytest.approx(0.73, abs=0.01)
    assert own.learning_rate == 4e-3 and own.schedule_steps == own.total_steps
    ours = speedrun.our_recipe(4_000_000, 1, 128)
    assert su.count_parameters(ours.shape) - su.count_parameters(card.shape) <= 2 * 4 * 64       # q_norm and k_norm
    large = [make(4_000_000, 1, 256, 12) for make in (speedrun.card_recipe, speedrun.our_recipe)]
    assert all(11e6 < su.count_parameters(recipe.shape) < 13e6 for recipe in large)
    for name, fields in (speedrun.without_one() | speedrun.tried()).items():
        assert not dataclasses.replace(ours, **fields).problems(), name


def test_trainer_is_given_the_same_recipe(tiny, tmp_path):
    """transformers.Trainer over our rows ends at our loop's loss: the race is between two ways, not two recipes."""
    recipe = dataclasses.replace(tiny.recipe, token_budget=12 * 8 * 64, max_train_steps=30, learning_rate=4e-3)
    store = su.TokenStore(tiny.store_dir, recipe)
    ours = su.train(recipe, store, tmp_path / "run", tokenizer=tiny.tokenizer, say=lambda line: None)
    theirs = speedrun_contestants.run_trainer(recipe, store, mixed=False)
    assert theirs["tokens"] == ours["tokens"] and theirs["parameters"] == ours["parameters"]
    assert theirs["eval_loss"] == pytest.approx(ours["eval_loss"], abs=2e-4)


@pytest.mark.skipif("STENTOR_SLOW" not in os.environ, reason="a minute of processes that start; set STENTOR_SLOW=1")
def test_a_whole_speedrun_and_its_second_call(tiny, tmp_path):
    """Every part on a shape of width 32; called again it trains nothing."""
    store = su.prepare_tokens([su.Source("prose", str(tiny.source.path))], tiny.tokenizer, tmp_path / "tokens",
                              tokens_per_source={"prose": 60_000}, validation_documents=4)
    command = [sys.executable, "tests/benchmarks/speedrun.py", "--parts", "target", "own-rate", "trainer", "trainer-bf16",
               "--seeds", "1", "--tokens", "30000", "--width", "32", "--shares", "0.3", "1.0",
               "--tokenizer", str(tiny.tokenizer_dir), "--store", str(store), "--out", str(tmp_path / "out")]
    first, second = (subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True).stdout for _ in range(2))
    report = json.loads((tmp_path / "out/speedrun.json").read_text())
    losses = {(run["who"], run["budget"]): run["eval_loss"] for run in report["runs"]}
    assert first.count("bits per byte") == len(losses) and second == ""
    wanted = {(who, 30_000) for who in ("card", "card-own-rate", "trainer", "trainer-bf16")} | {("ours", 9_000)}
    met = losses["ours", 9_000] <= losses["card", 30_000]          # then no larger budget is trained
    assert set(losses) == (wanted if met else wanted | {("ours", 30_000)})
    assert losses["trainer", 30_000] == pytest.approx(losses["card", 30_000], abs=0.01)
    assert "transformers.Trainer in bf16" in (tmp_path / "out/benchmarks/speedrun.md").read_text()
