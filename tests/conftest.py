"""What several test files share: the repository on the path, a tiny tokenizer, corpus, recipe and token store."""
import dataclasses
import json
import os
import signal
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
SHARED = REPO.parent / "shared"
sys.path.insert(0, str(REPO))
sys.path.insert(0, str(REPO / "tests"))
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPO), os.environ.get("PYTHONPATH")]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
signal.signal(signal.SIGINT, signal.default_int_handler)      # a shell starts what it puts behind `&` with SIGINT ignored
os.environ.setdefault("GOMP_SPINCOUNT", "2000")   # before torch is imported; see stentor.process.PROCESS_ENVIRONMENT


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def chain(tmp_path_factory):
    """The one run of the notebooks that several test files look at: see test_notebooks.make_chain."""
    from test_notebooks import make_chain
    return make_chain(tmp_path_factory.mktemp("outputs"))


def make_tiny(folder):
    """A namespace: recipe (70k parameters, 24 steps), its tuned twin, tokenizer, tokenizer_dir, store_dir, source; real English
    text."""
    from pydoc_data.topics import topics

    import stentor_utils as su
    import tokenmonster_hf as tm
    with open(folder / "topics.jsonl", "w") as file:
        for name in sorted(topics):
            file.write(json.dumps({"text": topics[name]}) + "\n")
    words = {f" {word}".encode() for text in topics.values() for word in text.split() if word.isalpha()}
    vocabulary = tm.Vocabulary.from_tokens(sorted(words)[:700], capcode=0, include="all256")
    tokenizer = tm.TokenMonsterTokenizer.from_vocabulary(vocabulary)
    tokenizer.save_pretrained(folder / "tokenizer")
    source = su.Source("topics", str(folder / "topics.jsonl"))
    recipe, tuned = (dataclasses.replace(
        base, name="tiny", sources=(source,), token_budget=24 * 8 * 64,
        shape=su.Shape(len(tokenizer), 32, 64, 3, 2, 2, 64, qk_norm=base.shape.qk_norm), block_size=64,
        per_device_train_batch_size=4, gradient_accumulation_steps=2, eval_steps=8, best_eval_steps=8, logging_steps=4,
        max_eval_samples=4, save_every_minutes=1000, mixed_precision="no", source_token_budget=None,
        torch_compile=False, attn_implementation="sdpa")
        for base in (su.ALL_RECIPES[f"stentor2-12m{twin}"].scaled_to("cpu") for twin in ("", "-tuned-qk")))
    store_dir = su.prepare_tokens([source], tokenizer, folder / "tokens", tokens_per_source={"topics": 60_000},
                                  validation_documents=4, shard_tokens=20_000)
    from types import SimpleNamespace
    return SimpleNamespace(recipe=recipe, tuned=tuned, tokenizer=tokenizer, tokenizer_dir=folder / "tokenizer",
                           store_dir=store_dir, source=source, folder=folder)
