"""The minimal pairs (data/minimal_pairs.py) are what they claim to be; the published scores are the cards'."""
import difflib
import importlib.util
import itertools
import json
import re
import subprocess
import sys
from collections import Counter
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
PUBLISHED = json.loads((ROOT / "data/published_benchmarks.json").read_text(encoding="utf-8"))
spec = importlib.util.spec_from_file_location("minimal_pairs", ROOT / "data/minimal_pairs.py")
minimal_pairs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(minimal_pairs)
SUITE = {name: minimal_pairs.generate(name) for name in minimal_pairs.PHENOMENA}
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared")


def words(text):
    return text.rstrip(".?").split()


def pairs(name):
    return [(row["sentence_good"], row["sentence_bad"]) for row in SUITE[name]]


def difference(good, bad):
    """(words only in good, words only in bad), a moved word counted on neither side."""
    good, bad = Counter(words(good.lower())), Counter(words(bad.lower()))
    return list((good - bad).elements()), list((bad - good).elements())


# ------------------------------------------------------------------------------------------------------ minimal pairs

def test_command_line_writes_the_same_suite_each_time(tmp_path):
    script = str(ROOT / "data/minimal_pairs.py")
    subprocess.run([sys.executable, script, str(tmp_path)], check=True, capture_output=True)
    files = {path.stem: list(map(json.loads, path.read_text().splitlines())) for path in tmp_path.glob("*.jsonl")}
    assert files == SUITE  # another process, so no hash seed plays a part
    assert len(SUITE) >= 14 and all(len(rows) == 100 for rows in SUITE.values())
    assert minimal_pairs.generate("subject_verb", 20, seed=1) != SUITE["subject_verb"][:20]


def test_more_pairs_than_the_grammar_holds_is_refused():
    with pytest.raises(ValueError, match="irregular_participle_adjective: 300 pairs asked for, [0-9]+ distinct"):
        minimal_pairs.generate("irregular_participle_adjective", 300)


@pytest.mark.parametrize("name", SUITE)
def test_schema_and_minimal_difference(name):
    fields = {"sentence_good", "sentence_bad", "field", "linguistics_term", "UID", "simple_LM_method",
              "one_prefix_method", "two_prefix_method", "lexically_identical", "pairID"}
    for number, row in enumerate(SUITE[name]):
        good, bad = row["sentence_good"], row["sentence_bad"]
        assert fields <= row.keys() and row["UID"] == name and row["pairID"] == str(number)
        assert row["field"] in {"morphology", "syntax", "semantics", "syntax_semantics"} and row["simple_LM_method"]
        for text in (good, bad):
            assert re.fullmatch(r"[A-Z][A-Za-z']*( [A-Za-z']+)+[.?]", text), text
            assert not re.search(r"\b(\w+) \1\b|\ba [aeiou]|\ban (?!hour)[^aeiou]", text), text
        assert good != bad and good[-1] == bad[-1]
        assert row["lexically_identical"] == (difference(good, bad) == ([], []))
        changed = [max(i2 - i1, j2 - j1) for tag, i1, i2, j1, j2 in
                   difflib.SequenceMatcher(None, words(good.lower()), words(bad.lower()), autojunk=False).get_opcodes()
                   if tag != "equal"]
        assert len(changed) <= 2 and sum(changed) <= 6, (good, bad)
        assert max(map(len, difference(good, bad))) <= 3
        if row["one_prefix_method"]:
            a, b = words(good), words(bad)
            at = [i for i, (x, y) in enumerate(zip(a, b)) if x != y]
            assert len(a) == len(b) and len(at) == 1 and at[0] > 0
            assert (row["one_prefix_prefix"], row["one_prefix_word_good"], row["one_prefix_word_bad"]) == (
                " ".join(a[:at[0]]), a[at[0]], b[at[0]])


def test_no_sentence_comes_twice_or_is_both_right_and_wrong():
    for name in SUITE:
        sentences = list(itertools.chain(*pairs(name)))
        assert len(sentences) == len(set(sentences)), name
    good, bad = ({row[side] for rows in SUITE.values() for row in rows} for side in ("sentence_good", "sentence_bad"))
    assert not good & bad


def test_vocabulary_is_small_and_used():
    used = Counter(word for name in SUITE for pair in pairs(name) for word in words(pair[0].lower()))
    assert 300 < len(used) < 700
    assert sum(count == 1 for count in used.values()) < 40  # rare words would be noise, not a test of grammar


@needs_shared
def test_nothing_is_taken_from_blimp():
    blimp = {row[side] for path in sorted((SHARED / "data/blimp").glob("*.jsonl"))
             for row in map(json.loads, path.read_text().splitlines()) for side in ("sentence_good", "sentence_bad")}
    assert len(blimp) > 100_000
    assert not blimp & {text for name in SUITE for pair in pairs(name) for text in pair}
    assert not {path.stem for path in (SHARED / "data/blimp").glob("*.jsonl")} & SUITE.keys()  # nor can scores be


# The rules below know nothing of the generator: they read the number off the words of the sentence.

MANY = re.compile(r"(?:the|my|our|your|their) (?:\w+ )?\w+s\b", re.I)
TWO_NAMES = re.compile(r"[A-Z][a-z]+ and [A-Z]")


def is_plural(phrase):
    """Whether a subject (a determiner, perhaps an adjective, a regular noun; or names) stands for several."""
    return bool(TWO_NAMES.match(phrase) or MANY.fullmatch(phrase))


def finite_verb_is_plural(verb):
    return verb in ("are", "were") or not (verb in ("is", "was") or verb.endswith("s"))


@pytest.mark.parametrize("name", ["subject_verb", "subject_verb_attractor", "subject_verb_relative_clause"])
def test_verb_follows_the_number_of_its_subject(name):
    for row in SUITE[name]:
        subject = row["one_prefix_prefix"]
        head = re.split(r" (?:of|behind|near|with|next to|who|that) ", subject)[0]
        assert is_plural(head) == finite_verb_is_plural(row["one_prefix_word_good"]), row["sentence_good"]
        assert is_plural(head) != finite_verb_is_plural(row["one_prefix_word_bad"]), row["sentence_bad"]
        if name == "subject_verb_attractor":
            assert is_plural(re.split(r" (?:of|behind|near|with|next to) ", subject)[1]) != is_plural(head), subject
        if name == "subject_verb_relative_clause":
            clause = words(re.split(r" (?:who|that) ", subject)[1])
            if clause[0] in minimal_pairs.OWNERS:  # "that the boys like"
                assert is_plural(" ".join(clause[:-1])) == finite_verb_is_plural(clause[-1]) != is_plural(head), subject
            else:  # "who likes the boys"
                assert is_plural(" ".join(clause[1:])) != finite_verb_is_plural(clause[0]) == is_plural(head), subject


@pytest.mark.parametrize("name", ["determiner_noun", "determiner_noun_irregular", "determiner_noun_with_adjective"])
def test_determiner_agrees_with_noun_in_good_only(name):
    irregular = {"men", "women", "children", "policemen", "fishermen", "thieves", "mice", "geese", "wolves", "calves",
                 "knives", "shelves", "scarves", "loaves"}
    for good, bad in pairs(name):
        for text, agrees in ((good, True), (bad, False)):
            determiner, noun = re.search(r"\b(this|that|these|those)\b.* (\w+)\.$", text).groups()
            several = noun in irregular or noun.endswith("s") and not noun.endswith("ss")  # dress
            assert (several == (determiner in ("these", "those"))) == agrees, text


def test_reflexives_follow_their_antecedent():
    women = ("Anna Mary Sarah Emma Lucy Julia Alice Helen Susan Jane "
             "girl queen mother sister aunt princess grandmother daughter")
    for name in ("reflexive_gender", "reflexive_number", "reflexive_possessor"):
        for row in SUITE[name]:
            right, wrong = row["one_prefix_word_good"], row["one_prefix_word_bad"]
            *_, antecedent, _ = row["one_prefix_prefix"].split()  # the king's sister | hurt
            if antecedent in women.split():
                assert right == "herself", row
            else:
                several = antecedent.endswith("s") and antecedent != "James"
                assert right == ("themselves" if several else "himself"), row
            assert (right, wrong).count("themselves") == (name == "reflexive_number")


def test_rules_of_the_other_phenomena():
    """One rule a phenomenon that a good sentence keeps and its bad one breaks, read off the words."""
    participles = "broken|stolen|written|drawn|eaten|worn|taken|driven|thrown|chosen|ridden|seen|flown"
    pasts = "broke|stole|wrote|drew|ate|wore|took|drove|threw|chose|rode|saw|flew"
    never_object = "arrived|slept|smiled|laughed|sneezed|coughed|disappeared|existed|appeared|died"
    clause = r"(?:the|my|our|your|their) (?:\w+ )?\w+|[A-Z]\w+"  # a person in one to three words
    verbs = "|".join([*minimal_pairs.ACTIONS, *minimal_pairs.TO_PEOPLE])
    rules = {
        "irregular_past": rf"\b(has|had) ({participles})\b|^(?!.*\b(has|had)\b).*\b({pasts})\b",
        "irregular_participle_adjective": r"[Tt]he \w+(en|rn|ow|tten) \w+(\.| was| looked)",
        "npi_licensor": r"^(No|Nobody)\b", "npi_scope": r"^No\b",
        "many_or_much": r"\bmany \w+s\.$|\bmuch \w+(?<!s)\.$",
        "superlative_quantifiers": r"^No \w+ \w+ (more|fewer) than",
        "existential_there": r"^There \w+ (?!every|each|all|most)",
        "tense_adverb": r"^(?!.*\bwill\b).*(ago|yesterday|last \w+)\.$|\bwill\b.*(tomorrow.*|next \w+|from now)\.$",
        "wh_or_that_with_gap": r" (who|what) ", "wh_or_that_no_gap": r" that ",
        "question_inversion": r"^\w+ (will|can|should|did) ",
        "left_branch_extraction": r"^(Whose|Which) (?!will|can|should|did)",
        "adjunct_extraction": rf"^\w+ did (?:{clause}) ({verbs}) (before|after|without) ",
        "conjunct_extraction": r"^\w+ \w+ \w+ and ",
        "filled_gap": rf"^What \w+ (?:{clause}) \w+\?$|^The \w+ that (?:{clause}) \w+ is",
        "noun_ellipsis": rf"({'|'.join(minimal_pairs.NUMBERS)})\.$",
        "passive_verb": rf"^(?!.* ({never_object}) by)", "verb_with_object": rf"^(?!.* ({never_object}) \w+ )",
        "verb_without_object": r" (laughed|smiled|slept|sang|danced|waited|worked|cried|shouted|ran|walked) ",
        "auxiliary_verb_form": rf"\b(is|was) (?!bring )\w+ing |\bhas (?!({verbs}) )|\b(can|will|should|not) ({verbs}) ",
        "pronoun_case": r" and (I|we|they|he|she) |^(?!.* and (me|us|them|him|her)\b).* (me|us|them|him|her) ",
    }
    checked = set(rules) | {name for name in SUITE if name.startswith(("subject_verb", "determiner_noun", "reflexive"))}
    assert checked == set(SUITE)
    for name, rule in rules.items():
        for good, bad in pairs(name):
            assert re.search(rule, good), (name, good)
            assert not re.search(rule, bad), (name, bad)


def test_always_preferring_one_form_scores_a_half():
    """E.g. a model that likes 'himself' better than 'herself' whatever stands before them."""
    def prefers(name, form):
        return sum(bool(re.search(form, good)) for good, _ in pairs(name))
    for name in ("subject_verb", "subject_verb_attractor", "subject_verb_relative_clause"):
        assert sum(finite_verb_is_plural(row["one_prefix_word_good"]) for row in SUITE[name]) == 50
    for name in ("determiner_noun", "determiner_noun_irregular", "determiner_noun_with_adjective"):
        assert prefers(name, r" (these|those) ") == 50
    assert prefers("reflexive_gender", "herself") == prefers("reflexive_possessor", "herself") == 50
    assert prefers("reflexive_number", "themselves") == prefers("tense_adverb", " will ") == 50
    assert prefers("many_or_much", " many ") == prefers("irregular_past", " (has|had) ") == 50


# ---------------------------------------------------------------------------------------------------- published figures

def card(name):
    return (SHARED / "seeds" / PUBLISHED[name]["card"]).read_text(encoding="utf-8")


@needs_shared
def test_peer_table_is_the_cards():
    peers, text = PUBLISHED["peers"], card("peers")
    assert peers["section"] in text
    header = "".join(re.findall(r"^\| Model \|.*?Avg↑Random \|$", text, re.M | re.S)).replace("\n", " ")
    titles = [f"{column['title']} ({column['metric']})" for column in peers["columns"]]
    assert header == "| Model | " + " | ".join(titles) + " | Avg↑Random |"
    for row in peers["models"]:
        assert f"\n| {' | '.join([row['model'], *row['scores'], row['average_over_random']])} |\n" in text
    chance = " | ".join(column["chance"] or "—" for column in peers["columns"])
    assert f"\n| Random / Baseline | {chance} | — |\n" in text
    table = text[text.index("| Model | OpenBookQA"):text.index("| Random / Baseline")]
    assert table.count("\n| ") == len(peers["models"])


@needs_shared
def test_own_table_and_blimp_are_the_cards():
    text = card("stentor3-20m")
    for row in PUBLISHED["stentor3-20m"]["rows"]:
        assert f"\n| {row['title']} | {row['metric']} | {row['score']} |\n" in text
    blimp, text = PUBLISHED["blimp"], card("blimp")
    assert f"| Overall BLiMP Accuracy | {blimp['overall']} |" in text and blimp["section"] in text
    for band in blimp["bands"]:  # the card's signs are mangled, its figures are not
        numbers = r"\D+".join(re.findall(r"\d+", band["range"]))
        assert re.search(rf"\| .*{band['band'].title()} \(\D*{numbers}%\) \| {band['sets']} tasks \|", text)


def test_the_two_tables_agree():
    peers = PUBLISHED["peers"]
    scores = next(row["scores"] for row in peers["models"] if row["model"] == "Stentor3-20M")
    own = {(row["task"], row["num_fewshot"]): row["score"] for row in PUBLISHED["stentor3-20m"]["rows"]}
    for column, score in zip(peers["columns"], scores, strict=True):
        assert own[column["task"], column["num_fewshot"]] == f"{Decimal(score) * 100:.2f}%"


def test_average_over_random_from_the_tables_own_columns():
    """Four of seven come out; the other three are the card's, from scores with more decimals than it prints."""
    peers = PUBLISHED["peers"]
    chance = [Decimal(column["chance"] or 0) for column in peers["columns"]]
    assert chance[1] == min(Decimal(row["scores"][1]) for row in peers["models"])  # TruthfulQA has no floor of its own
    differ = {}
    for row in peers["models"]:
        average = sum(Decimal(score) - c for score, c in zip(row["scores"], chance, strict=True)) / len(chance)
        rounded, printed = average.quantize(Decimal("0.0001"), ROUND_HALF_UP), Decimal(row["average_over_random"])
        if rounded != printed:
            differ[row["model"]] = str(rounded)
        assert abs(average - printed) <= Decimal("0.00005") * 2  # all columns rounded the same way, then the mean
    assert differ == {"Pythia-31M": "0.0109", "Pythia-70M": "0.0126", "Portimbria-150M": "0.0143"}


def test_blimp_bands_cover_all_sets():
    assert sum(band["sets"] for band in PUBLISHED["blimp"]["bands"]) == PUBLISHED["blimp"]["sets"] == 67
