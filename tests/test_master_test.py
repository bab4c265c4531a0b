"""The master test's file is what it says it is, and each of its rules does on written examples what a reader would."""
import json
import math
from collections import Counter

import pytest
import stentor_utils as su
import torch
from stentor import master_test as mt
from stentor.statistics import wilson

TEST = mt.read_test()


def test_a_hundred_fragments_in_ten_categories_of_which_the_cards_are_labelled():
    categories = TEST["categories"]
    assert len(categories) == 10 and all(len(category["fragments"]) == 10 for category in categories)
    assert Counter(category["named_by"] for category in categories) == {"the card": 7, "us": 3}
    texts = [fragment["text"] for category in categories for fragment in category["fragments"]]
    assert len(set(texts)) == 100
    printed = {fragment["text"] for category in categories for fragment in category["fragments"] if fragment.get("published")}
    assert printed == {"Photosynthesis is the process by which plants", "The meaning of life is a question that",
                       "The capital of France is", "The square root of 64 is"}
    words = {category["name"]: category.get("card_score") for category in categories}
    assert Counter(words.values()) == {"Excellent": 3, "Moderate": 3, "Poor": 1, None: 3}
    assert all(word == word.lower() for category in categories for word in category["topic"])


@pytest.mark.parametrize("text, answers, yes", [
    (" Paris, which lies on the Seine.", ["Paris"], True), (" the city of\nParis", ["paris"], True),
    (" a complex system. Paris is large.", ["Paris"], False),
    (" not Paris but Lyon", ["Paris"], False), (" never in Paris", ["Paris"], False),
    (" Parisian", ["Paris"], False), (" 8.", ["8"], True),
    (" 80", ["8"], False), (" 1.8", ["8"], False), (" 8.5", ["8"], False),
    (" eight", ["8", "eight"], True), (" 3.14159 and so on", ["3.14159"], True), (" Vitamin  C.", ["vitamin C"], True),
    (" one of the many cities that were built by the kings of the land near Paris", ["Paris"], False),    # too late
    ("", ["Paris"], False), (" a + b\n", ["a + b"], True)])
def test_an_answer_counts_where_a_reader_would_count_it(text, answers, yes):
    assert mt.answered(text, answers) is yes


@pytest.mark.parametrize("text, why", [
    ("convert sunlight and water into glucose.", None), ("", "empty"), (" \n ", "empty"), ("the end", "empty"),
    ("It is \ufffd and so on for a while", "broken characters"),
    ("the process of growth is the process of growth is the process of growth is the process", "repetitive"),
    ("very very very very good very very", "repetitive"), ("a b a c a d", None), ("{ } ( ) ; ; ; = = a b c", "no words"),
    ("It is the process of growth and development of the organism. The process of growth is the process of growth.", None)])
def test_a_text_that_came_apart_is_named(text, why):
    """The last is what the card prints of Stentor-30M: poor, and still a text: 15% of its triples return."""
    assert mt.degenerate(text) == why


def test_a_topic_is_two_words_that_the_prompt_did_not_give():
    topic = TEST["categories"][0]["topic"]
    assert mt.on_topic("turn light and carbon dioxide into sugar", topic)
    assert not mt.on_topic("are green and light", topic) and not mt.on_topic("is about a light, a LIGHT, a light", topic)
    assert not mt.on_topic("plants and light", topic, "the process by which plants")
    assert not mt.on_topic("enlightening watery starlings", topic)      # words, not their parts


def test_code_is_read_up_to_its_last_whole_line():
    assert mt.parses("def add(a, b):\n    return a + b")
    assert mt.parses("def f(n):\n    if n < 2:\n        return n\n    return f(n - 1) + f(")
    assert not mt.parses("def add(a, b):\n    return the sum of\n    both\n") and not mt.parses("")


def test_scores_of_one_text():
    category = next(category for category in TEST["categories"] if category["name"] == "Geography & facts")
    fragment = category["fragments"][0]
    found = mt.score(fragment, category, " Paris.")
    assert found["answered"] and found["degenerate"] is None and not found["sound"]    # short, and all that was asked
    wrong = mt.score(fragment, category, " a city on a river, a river, a river, a river, a river, a river")
    assert not wrong["answered"] and wrong["on_topic"] and wrong["degenerate"] == "repetitive" and not wrong["sound"]
    assert mt.score(category["fragments"][0] | {"answers": None}, category, "x")["answered"] is None


def test_the_log_is_whole_and_the_summary_is_counted_from_it(tiny, tmp_path):
    model = su.build_model(tiny.recipe.shape, eos_token_id=tiny.tokenizer.eos_token_id)
    test = mt.read_test(per_category=2)
    for category in test["categories"]:
        category["max_new_tokens"] = 6
    found = mt.run_master_test({"one": model, "two": model}, tiny.tokenizer, tmp_path / "log.json", test=test)
    assert json.loads((tmp_path / "log.json").read_text()) == found
    assert len(found["log"]) == 2 * 20 and len(found["summary"]) == 2 * 11
    settings = {(row["category"], row["temperature"], row["max_new_tokens"]) for row in found["log"]}
    assert len(settings) == 10 and all(isinstance(row["text"], str) for row in found["log"])
    texts = [[row["text"] for row in found["log"] if row["model"] == name] for name in ("one", "two")]
    assert texts[0] == texts[1] and len(set(texts[0])) > 5               # the same model, prompts and seed
    every = next(row for row in found["summary"] if row["category"] == "all" and row["model"] == "one")
    asked = [row for row in found["log"] if row["model"] == "one" and row["answers"]]
    assert every["answered"]["n"] == len(asked) and every["sound"]["n"] == 20
    low, high = wilson(every["sound"]["hits"], 20)
    assert (every["sound"]["low"], every["sound"]["high"]) == (low, high) and not math.isnan(found["elsewhere"]["one"]["share"])


def test_padding_on_the_left_changes_no_continuation(tiny):
    """Greedy: alone and in a batch with a longer prompt the same text; a wrong mask or position shows."""
    model = su.build_model(tiny.recipe.shape, 3, eos_token_id=tiny.tokenizer.eos_token_id)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    prompts = ["The name", "An object of a class that was defined in the module is"]
    settings = {"max_new_tokens": 12, "temperature": 1e-4, "top_p": 1.0}
    together = mt.continue_all(model, tiny.tokenizer, prompts, **settings)
    assert together == [mt.continue_all(model, tiny.tokenizer, [prompt], **settings)[0] for prompt in prompts]
    assert all(together)
