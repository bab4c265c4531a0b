"""What the model cards say beside their recipes: prompts, and where we depart from them.

Figures are as printed; each name is a key of `published.RECIPES`.
"""
from __future__ import annotations

# What our code does otherwise than a card says, where no field of the recipe shows it.
DEPARTURES = {
    "stentor2-12m-preview": (
        "the card shuffles a stream in a buffer of 20,000 documents and pads the last sequence with "
        "EOS, left out of the loss; here all sequences are permuted and the tail is dropped",),
    "stentor2-12m": (
        "the card's best weights are of step 3,300 although its last evaluation was lower; here the "
        "lowest is the best",),
    "stentor-12m-instruct": (
        "average of the weights: the card's decay is 0.999 throughout; here it rises to that, "
        "(1 + n) / (10 + n) after n steps, so that a short phase is not its start weights",
        "\"cosine with 1 restart\" is read as two half cosines, each from the peak",
        "the phases' schedules, warm-ups and precision other than the main phase's are not printed",
        "instruct/final is what DELIVER names, by default the better recipe; the published model is "
        "the card's recipe",
        "one GPU with the card's batch in pieces; the card used two T4s")}


def card_name(name: str) -> str:
    """The card that a recipe's name goes back to: without what its twins and stages append."""
    for ending in ("-cpu", "-repaired", "-tuned-qk", "-tuned", "-stage2", "-stage3"):
        name = name.removesuffix(ending)
    return name


# Prompts of the cards: a sample protocol where one has it (of Stentor3's ten the four that it calls
# unselected), else the widgets of the Stentor2-12M card. `cpu`: the suite's own, for the text that
# comes with Python.
PROMPTS = {
    "stentor2-12m-preview": (
        "Some sicknesses are", "In the early 20th century",
        "In Egypt there were massive sand cones called"),
    "stentor3-20m": (
        "Exercise can improve strength and energy levels. Many people walk, run, or play sports "
        "every week. Regular physical activity is often connected to better health. Exercise is "
        "important for",
        "The internet is used for communication, entertainment, and education. Many students read "
        "articles and watch videos online every day. Websites provide information on many different "
        "topics. People use the internet to",
        "Music is listened to in many countries around the world. Different styles of music are "
        "popular with different groups of people. Songs are often used for relaxation, celebration, "
        "or entertainment. Music is popular because",
        "Books have been used for learning and entertainment for many years. Libraries contain "
        "information about science, history, and literature. Reading can improve vocabulary and "
        "understanding. Books are useful because"),
    "stentor-big": (
        "Photosynthesis is the process by which plants", "The meaning of life is a question that",
        "The capital of France is", "The square root of 64 is"),
    "widget": (
        "Once upon a time", "Explain neural networks in simple terms.", "def fibonacci(n):",
        "The laws of thermodynamics describe"),
    "cpu": (
        "This function returns", "The result of the operation is", "The history of computing")}


def card_prompts(name: str) -> list[str]:
    """The prompts of the card that a recipe's name goes back to; a CPU twin has those for its text."""
    wanted = "cpu" if name.endswith("-cpu") else card_name(name)
    return list(PROMPTS.get(wanted, PROMPTS["widget"]))


def departures(name: str) -> tuple[str, ...]:
    """What our code does otherwise than the card of this recipe, where no field shows it."""
    return DEPARTURES.get(card_name(name), ())
