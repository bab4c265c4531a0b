"""Whether growing pays is counted from the runs: budgets, shares and the verdict, on written curves and on a tiny trial."""
import dataclasses
import json

import pytest
import stentor_utils as su
from stentor.payoff import AIM, catches_up, command, first_at, loss_at, verdict
from stentor.shapes import training_flops


def test_flops_of_stentor_30m_by_hand():
    """6 x (layers and head) + 12 x layers x hidden x length: the embedding only hands out rows."""
    shape = su.RECIPES["stentor-30m"].shape
    assert training_flops(shape, 512) == 6 * (5_505_024 + 16_515_072 + 8_388_608) + 12 * 21 * 256 * 512
    untied = dataclasses.replace(shape, tie_word_embeddings=False)
    assert training_flops(untied, 512) == training_flops(shape, 512)


@pytest.fixture(scope="module")
def trial(tiny):
    recipe = dataclasses.replace(tiny.recipe, name="trial", shape=su.Shape(len(tiny.tokenizer), 32, 64, 2, 2, 2, 64),
                                 gradient_accumulation_steps=1)
    return su.payoff.Trial(recipe, base_tokens=10_000, scratch_tokens=20_000, rate=0.5, evaluations=3)


def test_every_runs_compute_is_its_share_of_from_scratchs(trial):
    runs = trial.runs()
    assert list(runs) == ["base", "grown 60%", "grown 100%", "copied", "scratch"]
    for name, share in (("grown 60%", 0.6), ("grown 100%", 1.0), ("copied", 1.0)):
        spent = trial.base_flops + runs[name][1] * trial.flops_per_token("grown")
        assert spent == pytest.approx(share * trial.scratch_flops)
    for name in runs:
        recipe = trial.recipe_of(name, 7)
        assert recipe.problems() == [] and recipe.total_tokens == pytest.approx(runs[name][1], abs=recipe.tokens_per_step)
        assert recipe.seed == (1007 if name in ("grown 60%", "grown 100%", "copied") else 7)
    assert trial.recipe_of("scratch", 7).learning_rate == 2 * trial.recipe_of("copied", 7).learning_rate
    too_long = dataclasses.replace(trial, base_tokens=200_000)
    assert too_long.problems() and "lower base_tokens" in too_long.problems()[0]


def run(seed, curve, before=0.0):
    return {"seed": seed, "loss": curve[-1][1], "curve": curve, "flops_per_token": 10, "before": before}


def test_the_verdict_of_written_curves(trial):
    scratch = run(1, [[0, 8.0], [100, 6.0], [200, 5.0]])
    grown = run(1, [[0, 6.5], [50, 5.5], [100, 4.5]], before=400.0)
    assert first_at(grown, 5.0) == 750 and first_at(grown, 7.0) == 0 and first_at(grown, 4.0) is None
    assert catches_up(scratch, grown) is None and catches_up(run(1, [[0, 8.0], [100, 4.0]]), grown) == 1000
    assert loss_at(scratch, 500) == 7.0
    found = {"base": [run(1, [[0, 8.0], [40, 6.5]])], f"grown {AIM:.0%}": [run(1, [[0, 6.5], [60, 4.9]], 400.0)],
             "grown 100%": [grown], "copied": [run(1, [[0, 9.0], [100, 5.2]], 400.0)], "scratch": [scratch]}
    fixed = dataclasses.replace(trial, scratch_tokens=2000 / trial.flops_per_token("scratch"),
                                base_tokens=400 / trial.flops_per_token("base"))
    said = verdict(fixed, found)
    assert said["pays"] and said["gap"]["grown 60%"] == [pytest.approx(-0.1)] and said["gap"]["copied"] == [pytest.approx(0.2)]
    assert said["reached"] == {1: pytest.approx((750 + 400) / 2000)} and said["reached_uncounted"] == {1: pytest.approx(0.375)}
    assert said["sentence"].startswith("It pays here: with 60%") and "0.100 nats/token below it" in said["sentence"]
    assert said["lead"] == [pytest.approx(8.0 - 2.0 * 400 / 1000 - 6.5)]
    found[f"grown {AIM:.0%}"] = [run(1, [[0, 6.5], [60, 5.1]], 400.0)]
    said = verdict(fixed, found)
    assert not said["pays"] and said["ahead"] and "not pay as much as hoped" in said["sentence"]
    assert "at equal compute 0.500 nats/token below" in said["sentence"] and "there at 57%" in said["sentence"]
    found["grown 100%"] = [run(1, [[0, 6.5], [100, 5.3]], 400.0)]
    said = verdict(fixed, found)
    assert not said["ahead"] and said["reached"] == {1: None} and said["sentence"].startswith("It does not pay here:")


def test_a_tiny_trial_trains_every_run_of_every_seed_and_writes_it_down(trial, tiny, tmp_path):
    found = su.payoff.run_trial(trial, tiny.tokenizer, tmp_path, [1], say=lambda text: None)
    assert json.loads((tmp_path / "payoff.json").read_text())["runs"] == json.loads(json.dumps(found["runs"]))
    assert {name: len(seeds) for name, seeds in found["runs"].items()} == dict.fromkeys(trial.runs(), 1)
    for base, grown, copied in zip(*(found["runs"][name] for name in ("base", "grown 100%", "copied"))):
        assert grown["curve"][0][1] == pytest.approx(base["loss"], rel=1e-5)      # the function of the base, to rounding
        assert abs(copied["curve"][0][1] - base["loss"]) > 1e-3
        assert grown["before"] == trial.base_flops and base["before"] == 0
    ends = [run["loss"] for runs in found["runs"].values() for run in runs]
    assert len(set(ends)) == 5 and found["verdict"]["sentence"].startswith("It ")
    log = []
    again = su.payoff.run_trial(trial, tiny.tokenizer, tmp_path, [1], say=log.append)    # what is done is kept
    assert [runs[0]["loss"] for runs in again["runs"].values()] == ends and not any("| loss" in line for line in log)


@pytest.mark.parametrize("given, said", [
    ({"SEED": "3"}, "SEED is not"), ({"SEEDS": "a"}, "SEEDS"), ({"SEEDS": "2147483647"}, "SEEDS"),
    ({"RECIPE": "stentor-31m"}, "RECIPE"), ({"RATE": "0"}, "RATE")])
def test_the_command_refuses_in_a_sentence(given, said, tmp_path):
    with pytest.raises(su.ParameterError, match=said):
        command(tmp_path / "growth", given)
    assert not (tmp_path / "growth").exists()
