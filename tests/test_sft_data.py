"""The written data for instruct tuning and its probe: counts, fields, no duplicates, nothing of the probe in training."""
import json
import re
from collections import Counter

import pytest
from conftest import REPO
from notebook_functions import load_functions

FOLDER = REPO / "data" / "sft"
TRAINING = {"seed_safety": 100, "concise_qa": 512, "beavertails_standin": 120, "falsereject_standin": 150, "dolly_standin": 150}
PROBES = {"probe_35": 35, "probe_extended": 160}


def rows(name):
    return [json.loads(line) for line in (FOLDER / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def question(row):
    return row.get("prompt") or " ".join(filter(None, (row["instruction"], row["context"])))


def answer(row):
    return row.get("response") or row["instruct_response"]


def plain(text):
    return " ".join(re.findall(r"\w+", text.lower()))


@pytest.mark.parametrize("name, count", {**TRAINING, **PROBES, "labelled_answers": 201}.items())
def test_files_hold_what_they_say(name, count):
    found = rows(name)
    assert len(found) == count and len({tuple(sorted(set(row) - {"expression", "expects"})) for row in found}) == 1
    if name != "labelled_answers":
        assert len({plain(question(row)) for row in found}) == count          # no prompt twice


@pytest.mark.parametrize("name", TRAINING)
def test_training_text_is_clean_and_short(name):
    for row in rows(name):
        for text in (question(row), answer(row)):
            assert text == text.strip() and 1 <= len(text) <= 600 and "<|" not in text and "  " not in text, row
        assert answer(row)[-1] in ".!?\"')" or len(answer(row).split()) < 12 or " / " in answer(row), row


def test_no_prompt_of_the_probe_is_trained_on():
    """Neither the same words nor nearly: "capital of Spain" beside "capital of Norway" is as near as it gets (0.71)."""
    train = [(name, question(row), set(plain(question(row)).split())) for name in TRAINING for row in rows(name)]
    for name in PROBES:
        for row in rows(name):
            words = set(plain(row["prompt"]).split())
            for source, other, theirs in train:
                near = len(words & theirs) / len(words | theirs)
                assert near < 0.8, (row["prompt"], source, other)
    both = {plain(row["prompt"]) for row in rows("probe_35")} & {plain(row["prompt"]) for row in rows("probe_extended")}
    assert not both


def test_the_35_prompts_give_the_published_accuracy():
    kinds = Counter(row["kind"] for row in rows("probe_35"))
    assert kinds == {"harmful": 18, "benign": 17}
    assert round(100 * kinds["benign"] / 35, 1) == 48.6           # published: no harmful one refused, every benign one helped
    for row in rows("probe_35") + rows("probe_extended"):         # what an answer that helps would mention
        assert ("expects" in row) == (row["kind"] == "benign") and all(w == w.lower() for w in row.get("expects", ())), row
    assert Counter(row["type"] for row in rows("probe_extended")) == {"alarming": 60, "plain": 60, "harmful": 40}


def test_seed_safety_refuses_and_sends_the_despairing_to_988():
    label = load_functions("04_instruct_sft")["label_answer"]
    for row in rows("seed_safety"):
        said = row["response"].lower().replace("’", "'")
        if row["kind"] == "crisis":
            assert "988" in said and re.search(r"sorry|worried|hear|glad|pain|matter|care|hurts|treatable|be safe", said), row
        assert label(row["prompt"], "harmful", row["response"]) == "refusal", row
        assert len(re.findall(r"[.!?]", said)) >= 2, row             # says no, then something of use
    assert Counter(row["kind"] for row in rows("seed_safety"))["crisis"] >= 10


def test_arithmetic_answers_are_right():
    checked = [row for row in rows("concise_qa") if "expression" in row]
    assert len(checked) == 32
    for row in checked:
        assert re.fullmatch(r"[\d+\-*/%(). ]+", row["expression"])
        value = eval(row["expression"])                           # digits and operators only, asserted above
        assert f"{value:g}" in row["response"].replace(",", ""), row


def test_stand_ins_have_the_fields_of_what_they_stand_for():
    assert {"prompt", "response", "category", "is_safe"} <= set(rows("beavertails_standin")[0])
    assert {"prompt", "instruct_response", "category_text"} <= set(rows("falsereject_standin")[0])
    assert {"instruction", "context", "response", "category"} <= set(rows("dolly_standin")[0])
    for name in TRAINING:
        if name.endswith("_standin"):
            assert all(row["source"].startswith("stand-in for ") for row in rows(name))
