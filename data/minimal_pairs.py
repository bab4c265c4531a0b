"""Writes minimal pairs in BLiMP's format, so that a benchmark has something real to score with no network.

    python data/minimal_pairs.py OUT_DIR [--pairs 100] [--seed 0]

One OUT_DIR/<UID>.jsonl a phenomenon. The lexicon and the grammar are below and take from BLiMP (Warstadt et al., 2020)
only the field names, so scores on these sets do not compare with scores on its sets: shorter sentences, plainer words.

A phenomenon is a function (r, flip) -> (good, bad), r a random.Random. flip is False and True by turns and says which
of two forms is the right one (singular or plural, he or she, ...), so that a model that always prefers one form scores
50%. Where a construction has one right form only, flip chooses between two frames.
"""
import argparse
import json
import random
from pathlib import Path

# -------------------- lexicon

PEOPLE = ("teacher doctor nurse farmer student driver singer writer painter lawyer neighbor soldier baker pilot artist "
          "dancer worker player guest visitor scientist manager cook reporter").split()
MALE = "Tom John Peter David Jack James Robert Paul Henry Daniel".split()
FEMALE = "Anna Mary Sarah Emma Lucy Julia Alice Helen Susan Jane".split()
MEN = "boy king father brother uncle prince grandfather son".split()
WOMEN = "girl queen mother sister aunt princess grandmother daughter".split()

ACTIONS = {  # what can be done to what, for sentences that make sense
    "open": "door window box gate bottle bag", "close": "door window box gate shop",
    "clean": "room kitchen table car house", "wash": "plate cup shirt window car dress",
    "buy": "house car book shirt bicycle lamp chair ring coat boat",
    "sell": "house car book bicycle lamp chair picture ring boat",
    "break": "cup window chair plate bottle lamp toy", "carry": "box bag chair basket bottle table",
    "paint": "house door fence picture gate wall boat", "find": "key coin letter bag ring map cup",
    "steal": "car bag ring bicycle picture coin", "read": "book letter story poem report",
    "write": "book letter story poem report song", "repair": "car bicycle lamp clock roof boat chair",
    "draw": "map picture tree house horse", "visit": "city museum school farm village castle",
    "eat": "apple sandwich cake egg orange", "build": "house boat wall bridge tower",
    "borrow": "book bicycle car pen lamp boat", "wear": "coat hat shirt dress ring",
    "make": "box chair table dress cake toy", "bring": "bag book box lamp map cake",
    "destroy": "house bridge wall tower letter", "mention": "city book film song village",
    "describe": "city book film picture castle", "use": "pen map lamp knife bicycle boat",
}
# "The boy found" is no sentence, while "the boy read" is.
NEED_OBJECT = "find repair carry make bring destroy mention describe wear".split()
# With no receiver: "what did she find the dog?" may mean a bone, "what did she repair the dog?" means nothing.
ONE_OBJECT = "repair borrow wear carry destroy mention describe use".split()
# To people; all need their object, and none takes a clause or a bare infinitive ("helped the boy laugh").
TO_PEOPLE = "admire thank invite like trust blame greet surprise hug meet".split()
NEVER_OBJECT = "arrive sleep smile laugh sneeze cough disappear exist appear die".split()
STATES = "laugh smile sleep sing dance wait work cry shout run walk".split()
REFLEXIVE = "hurt blame introduce describe wash teach trust admire save help".split()

MOODS = "happy tired hungry angry sad busy famous quiet nice sick".split()
LOOKS = "old new small big nice beautiful strange".split()
AGES = "young old tall kind clever rich poor".split()
PLACES = ["in the garden", "at school", "in the kitchen", "near the river", "at home", "in the park", "after dinner",
          "before lunch", "this morning", "in the city", "after work", "near the house"]
PAST_TIMES = ["yesterday", "last week", "last night", "last year", "two days ago", "an hour ago", "last month"]
FUTURE_TIMES = ["tomorrow", "next week", "next year", "next month", "tomorrow morning", "two days from now"]
NUMBERS = "two three four five six seven".split()
OWNERS = ["the"] * 4 + ["my", "our", "your", "their"]  # say nothing about number, so the noun alone decides

IRREGULAR_PLURALS = dict(pair.split("/") for pair in (
    "man/men woman/women child/children policeman/policemen fisherman/fishermen thief/thieves mouse/mice goose/geese "
    "wolf/wolves calf/calves knife/knives shelf/shelves scarf/scarves loaf/loaves").split())
IRREGULAR_VERBS = {entry.split(":")[0]: entry.split(":")[1].split("/") for entry in (  # base:past/participle
    "buy:bought/bought sell:sold/sold break:broke/broken find:found/found steal:stole/stolen read:read/read "
    "write:wrote/written draw:drew/drawn eat:ate/eaten build:built/built wear:wore/worn make:made/made take:took/taken "
    "bring:brought/brought meet:met/met hurt:hurt/hurt teach:taught/taught sleep:slept/slept drive:drove/driven "
    "throw:threw/thrown choose:chose/chosen ride:rode/ridden see:saw/seen fly:flew/flown sing:sang/sung run:ran/run "
    "hug:hugged/hugged feed:fed/fed catch:caught/caught").split()}


def plural(noun):
    return IRREGULAR_PLURALS.get(noun) or with_s(noun)


def with_s(word):
    """The -s of plural nouns and of third persons: boxes, cities, boys, chairs."""
    if word.endswith(("s", "x", "ch", "sh")):
        return word + "es"
    return word[:-1] + "ies" if word.endswith("y") and word[-2] not in "aeiou" else word + "s"


def past(verb):
    if verb in IRREGULAR_VERBS:
        return IRREGULAR_VERBS[verb][0]
    if verb.endswith("y") and verb[-2] not in "aeiou":
        return verb[:-1] + "ied"
    return verb + ("d" if verb.endswith("e") else "ed")


def participle(verb):
    return IRREGULAR_VERBS[verb][1] if verb in IRREGULAR_VERBS else past(verb)


def ing(verb):
    if verb == "hug":
        return "hugging"
    return verb[:-1] + "ing" if verb.endswith("e") else verb + "ing"


# -------------------- pieces of sentences

def sentence(*words, end="."):
    text = " ".join(word for word in words if word)
    return text[0].upper() + text[1:] + end


def noun_phrase(r, noun, many=False, adjectives=()):
    adjective = r.choice(adjectives) if adjectives and r.random() < 0.4 else ""
    return " ".join(filter(None, [r.choice(OWNERS), adjective, plural(noun) if many else noun]))


def person(r, many=False, without=()):
    """Somebody (many: some people) who can be a subject or an object; `without` keeps a noun from coming twice."""
    names, nouns = [[word for word in words if not any(word in text for text in without)]
                    for words in (MALE + FEMALE, PEOPLE)]
    if r.random() < 0.25:
        return " and ".join(r.sample(names, 2)) if many else r.choice(names)
    return noun_phrase(r, r.choice(nouns), many, AGES)


def one(noun):
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def action(r, verbs=tuple(ACTIONS)):
    """(verb, noun) that go together."""
    verb = r.choice(verbs)
    return verb, r.choice(ACTIONS[verb].split())


def predicate(r, many):
    """(right, wrong) finite verb of a subject of that number, and what follows it."""
    if r.random() < 0.5:
        verb = r.choice(STATES)
        forms, rest = (with_s(verb), verb), r.choice(PLACES)
    else:
        forms = r.choice([("is", "are"), ("was", "were")])
        rest = r.choice(MOODS) + r.choice(["", " " + r.choice(PLACES)])
    return forms[many], forms[not many], rest


PHENOMENA = {}


def phenomenon(field, term, one_prefix=False):
    """Registers a function as a phenomenon. one_prefix: the pair parts at its critical word, so that comparing this one
    word after the common prefix (BLiMP's one-prefix method) makes sense."""
    def register(function):
        PHENOMENA[function.__name__] = function, field, term, one_prefix
        return function
    return register


# -------------------- agreement

@phenomenon("morphology", "subject_verb_agreement", one_prefix=True)
def subject_verb(r, flip):  # The teachers are/is tired.
    subject = person(r, many=flip)
    right, wrong, rest = predicate(r, flip)
    return sentence(subject, right, rest), sentence(subject, wrong, rest)


@phenomenon("morphology", "subject_verb_agreement", one_prefix=True)
def subject_verb_attractor(r, flip):  # The friends of the doctor laugh/laughs at home.
    links, nouns, others = r.choice([
        (["of"], ["friend", "enemy", "guest", "neighbor"], PEOPLE),
        (["behind", "near", "with", "next to"], PEOPLE, PEOPLE),
        (["near", "behind", "next to"], "picture lamp clock box chair".split(), "door window table wall bed".split())])
    noun = r.choice(nouns)
    other = r.choice([other for other in others if other != noun])
    subject = f"{noun_phrase(r, noun, flip)} {r.choice(links)} {noun_phrase(r, other, not flip)}"
    right, wrong, rest = predicate(r, flip)
    if others is not PEOPLE:
        right, wrong, rest = *[("is", "are"), ("are", "is")][flip], r.choice(LOOKS)
    return sentence(subject, right, rest), sentence(subject, wrong, rest)


@phenomenon("morphology", "subject_verb_agreement", one_prefix=True)
def subject_verb_relative_clause(r, flip):  # The nurse who likes the boys is/are happy.
    noun, other = r.sample(PEOPLE, 2)
    verb = r.choice(TO_PEOPLE)
    other = noun_phrase(r, other, not flip)
    if r.random() < 0.5:
        clause = f"{r.choice(['who', 'that'])} {verb if flip else with_s(verb)} {other}"
    else:
        clause = f"that {other} {with_s(verb) if flip else verb}"
    subject = f"{noun_phrase(r, noun, flip)} {clause}"
    right, wrong, rest = predicate(r, flip)
    return sentence(subject, right, rest), sentence(subject, wrong, rest)


@phenomenon("morphology", "determiner_noun_agreement", one_prefix=True)
def determiner_noun(r, flip):  # Anna washed these plates/plate.
    verb, noun = action(r)
    determiner = r.choice(["these", "those"] if flip else ["this", "that"])
    forms = noun, plural(noun)
    start = person(r), past(verb), determiner
    return sentence(*start, forms[flip]), sentence(*start, forms[not flip])


@phenomenon("morphology", "determiner_noun_agreement", one_prefix=True)
def determiner_noun_irregular(r, flip):  # The farmer fed those geese/goose.
    verbs, nouns = r.choice([("thank meet invite greet admire trust", "man woman child policeman fisherman"),
                             ("meet greet blame surprise", "thief man woman child"),
                             ("feed catch see draw", "mouse goose wolf calf"), ("buy wash sell use borrow", "knife"),
                             ("clean build repair paint", "shelf"), ("buy wear wash sell", "scarf"),
                             ("buy eat make", "loaf")])
    noun = r.choice(nouns.split())
    forms = noun, plural(noun)
    start = person(r), past(r.choice(verbs.split())), r.choice(["these", "those"] if flip else ["this", "that"])
    return sentence(*start, forms[flip]), sentence(*start, forms[not flip])


@phenomenon("morphology", "determiner_noun_agreement")
def determiner_noun_with_adjective(r, flip):  # Tom sold those/that old lamps.
    verb, noun = action(r)
    determiners = r.choice([("this", "these"), ("that", "those")])
    start, rest = (person(r), past(verb)), (r.choice(LOOKS), plural(noun) if flip else noun)
    return sentence(*start, determiners[flip], *rest), sentence(*start, determiners[not flip], *rest)


@phenomenon("morphology", "anaphor_agreement", one_prefix=True)
def reflexive_gender(r, flip):  # Mary blamed herself/himself.
    names, nouns, forms = (FEMALE, WOMEN, ("herself", "himself")) if flip else (MALE, MEN, ("himself", "herself"))
    start = r.choice(names) if r.random() < 0.5 else noun_phrase(r, r.choice(nouns)), past(r.choice(REFLEXIVE))
    rest = r.choice(PLACES + [""])
    return sentence(*start, forms[0], rest), sentence(*start, forms[1], rest)


@phenomenon("morphology", "anaphor_agreement", one_prefix=True)
def reflexive_number(r, flip):  # The boys hurt themselves/himself.
    # Gendered nouns only: "the doctor hurt themselves" has become good English.
    nouns, singular = r.choice([(MEN, "himself"), (WOMEN, "herself")])
    forms = singular, "themselves"
    start = noun_phrase(r, r.choice(nouns), flip), past(r.choice(REFLEXIVE))
    rest = r.choice(PLACES + [""])
    return sentence(*start, forms[flip], rest), sentence(*start, forms[not flip], rest)


@phenomenon("syntax_semantics", "binding", one_prefix=True)
def reflexive_possessor(r, flip):  # The king's sister hurt herself/himself.
    forms = ("herself", "himself") if flip else ("himself", "herself")
    owners, nouns = (MALE + MEN, WOMEN) if flip else (FEMALE + WOMEN, MEN)
    owner = r.choice(owners)
    owner = (owner if owner[0].isupper() else f"{r.choice(OWNERS)} {owner}") + "'s"
    noun = r.choice([noun for noun in nouns if noun not in ("king", "queen", "prince", "princess", "boy", "girl")])
    start, rest = (owner, noun, past(r.choice(REFLEXIVE))), r.choice(PLACES + [""])
    return sentence(*start, forms[0], rest), sentence(*start, forms[1], rest)


@phenomenon("morphology", "case", one_prefix=True)
def pronoun_case(r, flip):  # The nurse thanked him/he at home.   Tom ran and she/her met Paul.
    subject, object_ = r.choice([("he", "him"), ("she", "her"), ("they", "them"), ("we", "us"), ("I", "me")])
    verb, rest = past(r.choice(TO_PEOPLE)), r.choice(PLACES)
    if flip:  # after a first subject, so that the pair has a common prefix
        start, other = (person(r), past(r.choice(STATES)), "and"), person(r)
        return sentence(*start, subject, verb, other), sentence(*start, object_, verb, other)
    start = person(r), verb
    return sentence(*start, object_, rest), sentence(*start, subject, rest)


# -------------------- verb forms

@phenomenon("morphology", "irregular_forms", one_prefix=True)
def irregular_past(r, flip):  # Tom broke/broken the cup.   Tom has broken/broke the cup.
    verb, noun = r.choice([("take", "bag"), ("take", "book"), ("drive", "car"), ("drive", "bus"), ("throw", "ball"),
                           ("throw", "stone"), ("choose", "book"), ("choose", "dress"), ("ride", "bicycle"),
                           ("ride", "horse"), ("see", "film"), ("see", "castle"), ("fly", "plane"),
                           action(r, ["break", "steal", "write", "draw", "eat", "wear"])])
    forms = past(verb), participle(verb)
    start = person(r), r.choice(["has", "had"] if flip else ["", "never", "once"])
    rest = noun_phrase(r, noun)
    return sentence(*start, forms[flip], rest), sentence(*start, forms[not flip], rest)


@phenomenon("morphology", "irregular_forms", one_prefix=True)
def irregular_participle_adjective(r, flip):  # Anna found the stolen/stole ring.
    good, bad, nouns = r.choice([
        ("broken", "broke", "window cup chair plate lamp toy"), ("stolen", "stole", "car bag ring bicycle coin"),
        ("frozen", "froze", "lake river field"), ("torn", "tore", "shirt letter dress map bag"),
        ("hidden", "hid", "key door box letter"), ("fallen", "fell", "tree branch wall bridge"),
        ("forgotten", "forgot", "song story village poem"), ("written", "wrote", "report story letter")])
    noun = r.choice(nouns.split())
    if flip:
        start, rest = (person(r), r.choice(["saw", "found", "remembered", "described"]), "the"), (noun,)
    else:
        start, rest = ("the",), (noun, r.choice(["was very old", "was still there", "looked strange", "was not new"]))
    return sentence(*start, good, *rest), sentence(*start, bad, *rest)


@phenomenon("morphology", "verb_form", one_prefix=True)
def auxiliary_verb_form(r, flip):  # The pilot can repair/repaired the boat.
    verb, noun = action(r, [verb for verb in ACTIONS if verb != "read"])
    subject, rest = person(r), noun_phrase(r, noun, adjectives=LOOKS)
    if flip:
        auxiliary, right, wrong = r.choice(["can", "will", "should", "did not"]), verb, past(verb)
    else:
        auxiliary, right, wrong = r.choice([("is", ing(verb)), ("has", participle(verb)), ("was", ing(verb))]) + (verb,)
    return sentence(subject, auxiliary, right, rest), sentence(subject, auxiliary, wrong, rest)


@phenomenon("semantics", "tense")
def tense_adverb(r, flip):  # Lucy will visit/visited the farm tomorrow.
    verb, noun = action(r, [verb for verb in ACTIONS if verb != "read"])
    subject, rest = person(r), noun_phrase(r, noun)
    forms = past(verb), f"will {verb}"
    time = r.choice(FUTURE_TIMES if flip else PAST_TIMES)
    return sentence(subject, forms[flip], rest, time), sentence(subject, forms[not flip], rest, time)


# -------------------- argument structure

@phenomenon("syntax", "argument_structure")
def passive_verb(r, flip):  # The car was repaired/arrived by the farmer.
    if flip:
        verb, noun = action(r)
        subject, agent = noun_phrase(r, noun, adjectives=LOOKS), person(r)
    else:
        verb, subject = r.choice(TO_PEOPLE), person(r)
        agent = person(r, without=[subject])
    start, rest = (subject, r.choice(["was", "was not"])), ("by", agent)
    return sentence(*start, participle(verb), *rest), sentence(*start, participle(r.choice(NEVER_OBJECT)), *rest)


@phenomenon("syntax", "argument_structure")
def verb_with_object(r, flip):  # The baker cleaned/sneezed the kitchen.
    verb, noun = action(r)
    subject, rest = person(r, many=flip), noun_phrase(r, noun, adjectives=LOOKS)
    return sentence(subject, past(verb), rest), sentence(subject, past(r.choice(NEVER_OBJECT)), rest)


@phenomenon("syntax", "argument_structure")
def verb_without_object(r, flip):  # The artist smiled/mentioned in the park.
    verb = r.choice(NEED_OBJECT + ["admire", "thank", "greet", "invite"])
    where = r.choice([place for place in PLACES if not place.startswith("this")])  # one can describe "this morning"
    subject = person(r, many=flip)
    return sentence(subject, past(r.choice(STATES)), where), sentence(subject, past(verb), where)


@phenomenon("syntax", "ellipsis")
def noun_ellipsis(r, flip):  # Tom bought two red cups and Lucy bought three.
    verb, noun = action(r)
    first, second = r.sample(NUMBERS, 2)
    first, noun = ("one", noun) if flip else (first, plural(noun))
    look, start = r.choice(LOOKS), (person(r), past(verb), first)
    end = "and", r.choice(MALE + FEMALE), past(verb), second
    if end[1] in start[0]:
        end = "and", "my friend", past(verb), second
    return sentence(*start, look, noun, *end), sentence(*start, noun, *end, look)


# -------------------- questions, gaps and islands

def embedding(r):
    return person(r), r.choice(["knows", "knew", "remembered", "noticed", "discovered", "explained", "learned"])


@phenomenon("syntax", "filler_gap_dependency")
def wh_or_that_with_gap(r, flip):  # Emma knows what/that the driver borrowed.
    start = embedding(r)
    wh, verb = ("what", r.choice(NEED_OBJECT)) if flip else ("who", r.choice(TO_PEOPLE))
    rest = person(r, without=start), past(verb)
    return sentence(*start, wh, *rest), sentence(*start, "that", *rest)


@phenomenon("syntax", "filler_gap_dependency")
def wh_or_that_no_gap(r, flip):  # Emma knows that/what the driver borrowed the lamp.
    start = embedding(r)
    subject = person(r, without=start)
    if flip:
        wh, (verb, noun) = "what", action(r, ONE_OBJECT)
        other = noun_phrase(r, noun)
    else:
        wh, verb, other = "who", r.choice(TO_PEOPLE), person(r, without=[*start, subject])
    rest = subject, past(verb), other
    return sentence(*start, "that", *rest), sentence(*start, wh, *rest)


@phenomenon("syntax", "filler_gap_dependency")
def filled_gap(r, flip):  # What did Jane carry (the box)?
    verb, noun = action(r, ONE_OBJECT)
    subject, other = person(r), noun_phrase(r, r.choice([other for other in ACTIONS[verb].split() if other != noun]))
    if flip:
        start, end = (r.choice(["what did", "what can", "what will", "what should"]), subject, verb), "?"
        return sentence(*start, end=end), sentence(*start, other, end=end)
    start, rest = ("the", noun, "that", subject, past(verb)), ("is", r.choice(LOOKS))
    return sentence(*start, *rest), sentence(*start, other, *rest)


@phenomenon("syntax", "question_formation")
def question_inversion(r, flip):  # Where will the guest sleep?   *Where the guest will sleep?
    auxiliary, subject = r.choice(["will", "can", "should", "did"]), person(r, many=r.random() < 0.5)
    if flip:
        wh, rest = r.choice(["where", "when", "why"]), r.choice(STATES)
    else:
        wh, rest = "what", r.choice(NEED_OBJECT)
    return sentence(wh, auxiliary, subject, rest, end="?"), sentence(wh, subject, auxiliary, rest, end="?")


@phenomenon("syntax", "island_effects")
def adjunct_extraction(r, flip):  # What did Paul wash before selling the car?
    if flip:
        wh, other = "who", person(r)
        first, second = r.sample(["thank", "invite", "blame", "greet", "surprise", "hug", "meet"], 2)
    else:
        wh = "what"
        verbs, nouns = r.choice([("repair sell", "car boat bicycle"), ("paint sell", "house boat picture"),
                                 ("wash wear", "dress shirt coat"), ("wash borrow", "car boat"),
                                 ("open clean", "window box"), ("close clean", "shop window box"),
                                 ("carry break", "chair bottle lamp")])
        first, second = r.sample(verbs.split(), 2)
        other = noun_phrase(r, r.choice(nouns.split()))
    subject = person(r, without=[other])
    start, when = (wh, "did", subject, first), (r.choice(["before", "after", "without"]), ing(second))
    return sentence(*start, *when, other, end="?"), sentence(*start, other, *when, end="?")


@phenomenon("syntax", "island_effects")
def conjunct_extraction(r, flip):  # Who did Jane and my aunt meet?   *Who did Jane meet and my aunt?
    wh, verb = ("who", r.choice(TO_PEOPLE)) if flip else ("what", r.choice(NEED_OBJECT))
    first, second = r.choice(MALE + FEMALE), noun_phrase(r, r.choice(PEOPLE), adjectives=AGES)
    start = wh, r.choice(["did", "should", "will", "can"]), first
    return sentence(*start, "and", second, verb, end="?"), sentence(*start, verb, "and", second, end="?")


@phenomenon("syntax", "island_effects")
def left_branch_extraction(r, flip):  # Whose car did David repair?   *Whose did David repair car?
    verb, noun = action(r)
    noun = plural(noun) if r.random() < 0.5 else noun
    wh, rest = "whose" if flip else "which", (r.choice(["did", "should", "will", "can"]), person(r), verb)
    return sentence(wh, noun, *rest, end="?"), sentence(wh, *rest, noun, end="?")


# -------------------- licensing and quantifiers

def has_done(r, adverb):
    verb, noun = action(r)
    return "has", adverb, participle(verb), one(noun)


@phenomenon("semantics", "npi_licensing")
def npi_licensor(r, flip):  # No/My nurse has ever visited the castle.
    if flip:
        who, rest = r.choice(PEOPLE), has_done(r, "ever")
        return sentence("no", who, *rest), sentence(r.choice(["the", "my", "some", "that"]), who, *rest)
    where, rest = r.choice(["in the village", "in this city", "at school", "in my family"]), has_done(r, "ever")
    good, *bad = r.choice([("nobody", "somebody", "everybody"), ("no one", "someone", "everyone")])
    return sentence(good, where, *rest), sentence(r.choice(bad), where, *rest)


@phenomenon("semantics", "npi_licensing")
def npi_scope(r, flip):  # No cook that the boy likes has ever built a wall.
    noun, other = r.sample(PEOPLE, 2)
    verb, rest = r.choice(TO_PEOPLE), has_done(r, "ever")
    if flip:
        return (sentence("no", noun, "that the", other, with_s(verb), *rest),
                sentence("the", noun, "that no", other, with_s(verb), *rest))
    return (sentence("no", noun, "who", with_s(verb), "the", other, *rest),
            sentence("the", noun, "who", with_s(verb), "no", other, *rest))


@phenomenon("semantics", "quantifiers")
def superlative_quantifiers(r, flip):  # No guest bought more than / at least two cakes.
    verb, noun = action(r)
    good, bad = ("more than", "at least") if flip else ("fewer than", "at most")
    start, rest = ("no", r.choice(PEOPLE), past(verb)), (r.choice(NUMBERS), plural(noun))
    return sentence(*start, good, *rest), sentence(*start, bad, *rest)


@phenomenon("semantics", "quantifiers")
def existential_there(r, flip):  # There were some/most cups on the table.
    places = {"on the table": "cup plate book letter map lamp cake", "in the garden": "tree chair bicycle horse child",
              "near the river": "house farm tower castle boat", "in the room": "table bed clock student guest box",
              "on the wall": "picture clock lamp map"}
    where = r.choice(list(places))
    noun = r.choice(places[where].split())
    if flip:
        noun, be, bad = plural(noun), r.choice(["are", "were"]), r.choice(["all", "most"])
        good = r.choice(["many", "some", "few", "no", "several", r.choice(NUMBERS)])
    else:
        be, bad, good = r.choice(["is", "was"]), r.choice(["every", "each"]), r.choice(["a", "no", "one"])
    start, rest = ("there", be), (noun, where)
    return sentence(*start, good, *rest), sentence(*start, bad, *rest)


@phenomenon("semantics", "quantifiers")
def many_or_much(r, flip):  # Helen bought too much/many sugar.
    if flip:
        verb, noun = action(r)
        noun = plural(noun)
    else:
        verb, nouns = r.choice([("buy", "bread rice sugar salt butter milk furniture"),
                                ("carry", "water sand wood snow"),
                                ("eat", "bread rice sugar butter soup"), ("use", "water salt sugar butter paper money"),
                                ("bring", "food water bread money"), ("make", "soup bread noise coffee")])
        noun = r.choice(nouns.split())
    forms = "much", "many"
    start = person(r), r.choice([f"{past(verb)} too", f"did not {verb}", f"will not {verb}", f"{past(verb)} so"])
    return sentence(*start, forms[flip], noun), sentence(*start, forms[not flip], noun)


# -------------------- output

def words_of(text):
    return text.rstrip(".?").split()


def record(good, bad, name, number):
    """One line in BLiMP's format."""
    _, field, term, one_prefix = PHENOMENA[name]
    prefix = {}
    if one_prefix:
        a, b = words_of(good), words_of(bad)
        split = next(i for i, (x, y) in enumerate(zip(a, b)) if x != y)
        prefix = {"one_prefix_prefix": " ".join(a[:split]),
                  "one_prefix_word_good": a[split], "one_prefix_word_bad": b[split]}
    same_words = sorted(words_of(good.lower())) == sorted(words_of(bad.lower()))
    return {"sentence_good": good, "sentence_bad": bad, **prefix, "field": field, "linguistics_term": term, "UID": name,
            "simple_LM_method": True, "one_prefix_method": one_prefix, "two_prefix_method": False,
            "lexically_identical": same_words, "pairID": str(number)}


def generate(name, pairs=100, seed=0):
    """`pairs` records of the phenomenon `name`, the same for the same seed; no sentence comes twice.

    Raises ValueError if the grammar does not hold that many.
    """
    r, seen, records = random.Random(f"{seed} {name}"), set(), []
    for _ in range(50 * pairs):
        if len(records) == pairs:
            break
        good, bad = PHENOMENA[name][0](r, len(records) % 2 == 1)
        if not {good, bad} & seen:
            seen |= {good, bad}
            records.append(record(good, bad, name, len(records)))
    if len(records) < pairs:
        raise ValueError(f"{name}: {pairs} pairs asked for, {len(records)} distinct ones found: ask for fewer.")
    return records


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--pairs", type=int, default=100, help="pairs a phenomenon (default 100)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.out_dir.mkdir(parents=True, exist_ok=True)
    for name in PHENOMENA:
        lines = [json.dumps(row) + "\n" for row in generate(name, arguments.pairs, arguments.seed)]
        (arguments.out_dir / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    print(f"{len(PHENOMENA)} phenomena x {arguments.pairs} pairs in {arguments.out_dir}")


if __name__ == "__main__":
    main()
