"""Which sections a card has, in order: of a trained model, and of what was made from one."""
from __future__ import annotations

from stentor.card.facts import Facts
from stentor.card.footprint import memory, resources
from stentor.card.made import (
    chat, export_opening, formats, growth_opening, growth_stages, instruct_answers,
    instruct_opening, instruct_training, master_test)
from stentor.card.scores import curves, instruct, results
from stentor.card.sections import (
    architecture, citation, data, limitations, loading, metadata, opening, precision, samples,
    tokenizer, training)
from stentor.card.uses import comparable, intended, recommended, risks, what_is_next

FOR_USERS = (intended, risks, resources, comparable, what_is_next)
SECTIONS = {
    "final": (
        metadata, opening, recommended, results, instruct, curves, architecture, memory, tokenizer,
        data, training, precision, samples, limitations, *FOR_USERS, loading, citation),
    "instruct": (
        metadata, instruct_opening, recommended, instruct_training, instruct_answers, architecture,
        memory, *FOR_USERS, chat, citation),
    "growth": (
        metadata, growth_opening, recommended, growth_stages, master_test, architecture, memory,
        *FOR_USERS, loading, citation),
    "export": (
        metadata, export_opening, formats, recommended, memory,
        *(section for section in FOR_USERS if section is not resources), citation)}


def card_template(facts: Facts) -> str:
    """The card's text with a mark for each figure."""
    return "\n".join(section(facts) for section in SECTIONS[facts.of])
