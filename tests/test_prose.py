"""local:prose is sentences: what is kept of docstrings, what is not, and what is taken off."""
import json
import re
from itertools import islice

import pytest

import stentor_utils as su
from stentor.prose import running_text

SENTENCE = "The iterator returns the next item of the list, and stops at the end of it."

KEPT = {
    "as it is": (SENTENCE, [SENTENCE]),
    "lines are joined": (SENTENCE.replace(" of ", "\n    of "), [SENTENCE]),
    "roles and quotes": ("This is what :meth:`~list.sort` does to a ``list`` when it is used with `key` in *place*.",
                         ["This is what list.sort does to a list when it is used with key in place."]),
    "links": ("See [the guide](https://example.org/a) for more on how this is used, and when it is not.",
              ["See the guide for more on how this is used, and when it is not."]),
    "items of a list": (f"- {SENTENCE}\n- too short\n2. {SENTENCE.replace('next', 'last')}",
                        [SENTENCE, SENTENCE.replace("next", "last")]),
    "what is under a heading": (f"Notes\n-----\n{SENTENCE}", [SENTENCE]),
    "a colon in a sentence": (SENTENCE.replace(", and", ": it"), [SENTENCE.replace(", and", ": it")]),
    "an abbreviation and a year": ("In 1989 the ASCII form of it was the one that all of the programs could read.",) * 2,
}
DROPPED = {
    "a field": ":param item: The item that is to be added at the end of the list, if there is one.",
    "Google's parameters": f"Args:\n    item (int): {SENTENCE}",
    "numpy's parameters": f"item : int\n    {SENTENCE}",
    "a typed parameter alone": f"item (`int`, *optional*): {SENTENCE}",
    "a directive": f".. note:: {SENTENCE}",
    "a doctest": f"{SENTENCE}\n>>> next(iterator)",
    "a table": f"| {SENTENCE} | {SENTENCE} |",
    "code": f"value = iterator.next()\n# {SENTENCE}",
    "a list of names": "Alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron.",
    "identifiers": "The read_item of base_list is set by make_it to next_one in the do_it of go_to and to_be.",
    "cut off at the front": SENTENCE[4:],
    "cut off at the end": SENTENCE[:-1],
    "a formula": "The sum is a1*x**2 + b2*y**2 + c3*(x - y)/(z + 1) of the {1, 2, 3} and the [4, 5, 6].",
}


@pytest.mark.parametrize("case", KEPT)
def test_sentences_are_kept(case):
    text, wanted = KEPT[case]
    assert running_text(text) == ([wanted] if isinstance(wanted, str) else wanted)


@pytest.mark.parametrize("case", DROPPED)
def test_what_is_no_sentence_goes(case):
    assert running_text(DROPPED[case]) == []
    kept = f"{SENTENCE}\n\n{DROPPED[case]}\n\n{SENTENCE}"    # and takes nothing along
    assert running_text(kept) == [SENTENCE, SENTENCE]


def test_the_embedded_corpus_is_sentences():
    """Of what Python has installed here: no mark-up in 500 documents, no paragraph in two of them."""
    with su.local_corpus("prose").open() as lines:
        documents = [json.loads(line)["text"] for line in islice(lines, 500)]
    paragraphs = [paragraph for text in documents for paragraph in text.split("\n\n")]
    assert len(documents) == 500 and len({paragraph.lower() for paragraph in paragraphs}) == len(paragraphs)
    marked = [p for p in paragraphs if re.search(r"^:\w+ |^\.\. |>>> |``|----|====|^\w+ : ", p)]
    assert not marked, marked[:5]
    assert all(re.match(r"[A-Z\"'“(]", p) and re.search(r"[.!?][\"')”]*$", p) for p in paragraphs)
