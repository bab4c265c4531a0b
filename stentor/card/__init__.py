"""The model card of a run, in which every number has a file, and the check of that.

    write_model_card("outputs/demo")      final/README.md, and model_card.json: the file and the
                                          place of each number in it
    check_model_card("outputs/demo")      [], or what is wrong, one sentence each
"""
from stentor.card.check import (                                          # noqa: F401
    check_model_card, described_models, write_model_card)
from stentor.card.limitations import measure_limitations                  # noqa: F401
