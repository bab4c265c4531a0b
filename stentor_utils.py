"""The one import of every notebook, and the map of the house.

    import stentor_utils as su                        python -m stentor_utils run | train | recipes | results ...

Where does what happen? In stentor/, in the order of a token's journey; each file uses only those above it:

    secrets files       errors for readers, atomic writes, run locks; what a secret looks like
    parameters session  rules for notebook parameters; hardware, deadline, run folder
    rules               a rule beside each field: how a shape and a recipe check themselves
    shapes tuning       what a model is, and the rates that suit it
    recipes published   what decides a run; every card's recipe, and its twins; `cards`: what else they say
    hub formats prose   asking the hub; reading people's files; sentences without mark-up
    corpus              the text that comes with Python
    sources tokenizer   documents, cleaned; the tokenizer that belongs to a recipe
    preparing tokens    the token store: how it is filled, how it is read
    growing             the one that is filled while training reads it
    stock precision     the two stock architectures; the cards' precision techniques
    model               build, initialise, sample
    folders growth loss saved models; a small one made larger; the loss without logits in memory
    stages              a store whose evaluations measure the texts of other stages too
    optimizers engine   what differs between CPU and CUDA; `xla` for TPUs
    checkpoints metrics what a killed run goes on from; its log
    learner stopping    model, optimiser and average in one; signals and the deadline
    train process       Run.train, the one loop; our own processes, `launch` the one that trains, `watching` for who looks on
    benchmark/ card/    scores with intervals; the model card, and the check of it; `publish`
    inference speed     what the cards recommend for sampling; what generation costs
    decoding serving    a small model writes ahead of a large one; an OpenAI-compatible server
    export/             GGUF, ONNX, quantised folders: written, and held against the model
    statistics charts   intervals and repetition; one palette and one way to draw
    notebooks results   executing notebooks; the tables of runs; `commands` is the command line
    reporting gallery   the figures of README.md and docs/, sealed; their pictures
    kaggle bundle       attached runs taken over; notebooks that carry the house with them
    vocabulary alone    a vocabulary built from text; what a notebook takes where no other ran
    curriculum payoff   stages one after the other; whether growing pays, over compute
    master_test         a hundred fragments, continued and scored by rules
    opening lesson      a notebook's parameters checked, its run found; the tables that lessons share
    conversation demo/  a chat as tokens, trimmed as in training; the model in a browser (Gradio)

tokenmonster_hf.py, beside this file, is the tokenizer: it travels alone inside every saved model.
"""
import importlib
import sys

from stentor import conversation, statistics, vocabulary                                           # noqa: F401
from stentor.alone import (                                                                         # noqa: F401
    EFFORT, bring, build_tokenizer, find_model, offline_problem, published_model, read_source)
from stentor.cards import card_prompts, departures                                                  # noqa: F401
from stentor.checkpoints import (                                                                   # noqa: F401
    check_run, checkpoint_folders, load_checkpoint, save_checkpoint, verify_checkpoint)
from stentor.corpus import clean_text, local_corpus                                                 # noqa: F401
from stentor.engine import Engine, evaluate                                                         # noqa: F401
from stentor.files import (                                                                         # noqa: F401
    CheckpointError, FeedStopped, ParameterError, RunLock, SourceError, StentorError, TrainingFailed, duration,
    write_atomically)
from stentor.folders import load_model, load_stentor2, save_model_folder                            # noqa: F401
from stentor.growing import GrowingStore                                                            # noqa: F401
from stentor.kaggle import how_to_go_on, internet, on_kaggle, room_problem, stop_here               # noqa: F401
from stentor.growth import (                                                                        # noqa: F401
    copied_share, grow_model, growth_problems, larger_shape, layer_origins, matrices, model_problems, shape_of)
from stentor.inference import GUIDES, guide_for, guide_record, guide_table, presets, recommended    # noqa: F401
from stentor.launch import environment, launch                                                      # noqa: F401
from stentor.lesson import budget_table, card_table, precision_table, show_source, summary_table, write_samples  # noqa: F401
from stentor.loss import use_chunked_loss                                                           # noqa: F401
from stentor.model import GENERATION, build_model, generate, initialize_weights, sampling_of        # noqa: F401
from stentor.opening import open_run, rules                                                         # noqa: F401
from stentor.optimizers import parameter_groups                                                     # noqa: F401
from stentor.parameters import (                                                                    # noqa: F401
    check_notebook_parameters, generation_settings, items, number, run_name, run_names, string, writable_folder)
from stentor.precision import apply_precision_recipe, rename_weight_master                          # noqa: F401
from stentor.preparing import prepare_tokens                                                        # noqa: F401
from stentor.published import ALL_RECIPES, CURRICULA, RECIPES, REPAIRED, TUNED, card_recipe, find_recipe       # noqa: F401
from stentor.recipes import Recipe, Source, cpu_has_bf16                                            # noqa: F401
from stentor.session import find_outputs, find_profile, hours_left, run_problem, session_end, writable_run  # noqa: F401
from stentor.shapes import Shape, count_parameters, kv_cache_bytes, parameter_budget, weight_bytes  # noqa: F401
from stentor.sources import clean_documents, documents, pin_revision                                # noqa: F401
from stentor.tokenizer import (                                                                     # noqa: F401
    encode_documents, find_vocabulary, fit_to_tokenizer, load_tokenizer, open_tokenizer,
    save_tokenizer, tokenizer_problem, tokenizer_sha256, vocabulary_rows)
from stentor.tokens import TokenStore, plan_sources, source_names                                   # noqa: F401
from stentor.train import TrainingDiverged, train                                                   # noqa: F401
from stentor.watching import watching                                                               # noqa: F401

# What not every notebook carries, or every image has the packages for: modules, and names of modules.
LATE = ("benchmark", "charts", "curriculum", "decoding", "demo", "export", "master_test", "payoff", "serving", "speed")
LATE_NAMES = {"check_model_card": "card", "described_models": "card", "measure_limitations": "card",
              "write_model_card": "card", "publish": "publish"}


def __getattr__(name: str):
    """`su.charts`, `su.write_model_card` and the rest of LATE and LATE_NAMES, when they are asked for."""
    if name not in LATE and name not in LATE_NAMES:
        raise AttributeError(f"stentor_utils has no {name!r}")
    module = importlib.import_module(f"stentor.{LATE_NAMES.get(name, name)}")
    return getattr(module, name) if name in LATE_NAMES else module


if __name__ == "__main__":
    from stentor.commands import main
    sys.exit(main())
